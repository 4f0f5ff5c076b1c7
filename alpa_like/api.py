"""What users call. A straight line: trace, plan, lower, run."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
from jax.ad_checkpoint import checkpoint_name

from alpa_like.chunked import ChunkedArray, Parts, bounds
from alpa_like.cluster import Cluster
from alpa_like.collector import patient
from alpa_like.errors import ClusterError, MethodError, PlanError, TraceError
from alpa_like.methods import Method, ShardParallel
from alpa_like.passes.cut_scans import cut_trace
from alpa_like.passes.layers import BOUNDARY
from alpa_like.passes.lower import lower, lower_single
from alpa_like.passes.lower_pipeline import lower_pipeline
from alpa_like.passes.pipeline_planner import make_pipeline_plan
from alpa_like.passes.planner import make_plan
from alpa_like.pipeshard import PipeshardParallel
from alpa_like.placement import AbstractDevices, argument_layouts, matching
from alpa_like.plan import Plan
from alpa_like.runtime import session
from alpa_like.runtime.emulation import EMULATED_DEVICES
from alpa_like.runtime.executable import Executable
from alpa_like.runtime.pipeline import Cutting, PipelineExecutable
from alpa_like.runtime.remote_executable import RemoteExecutable, born
from alpa_like.tracer import Signature, Trace, bind, signature_of, trace

__all__ = [
    "ParallelFunction",
    "create_state",
    "grad",
    "init",
    "mark_pipeline_boundary",
    "parallelize",
    "shutdown",
    "value_and_grad",
]

logger = logging.getLogger("alpa_like")


def init(
    cluster: Cluster | Literal["ray"] | None = None,
    *,
    num_devices: int | None = None,
    address: str | None = None,
    num_hosts: int | None = None,
    max_restarts: int = 0,
    wait_s: float = 300.0,
) -> None:
    """Choose the devices that steps run on: all GPUs or TPUs, or 8 emulated devices where there is only a CPU.

    cluster: what plans are made for by default; `Cluster.local()` if not given. num_devices: use the first so many.
    Call it before anything else uses JAX. Raises `ClusterError` where there are fewer devices than asked for.

    With `cluster="ray"`, or an `address`, steps run on a Ray cluster: on worker processes on its hosts, while this one
    only gives the orders. address: `host:port` of a cluster, "auto" for one that runs on this machine, "local" to start
    one; by default the one that this process is part of, or `RAY_ADDRESS`, else one is started. num_devices, num_hosts:
    how many in all, where not all there are; a description of a cluster says it too. wait_s: seconds to wait for hosts
    to join or to become free. max_restarts: how often `alpa.train` goes on after a worker has died.
    """
    if cluster != "ray" and address is None:
        _check_local(num_hosts, max_restarts)
        session.start(cluster, num_devices)
        return
    if type(max_restarts) is not int or max_restarts < 0:
        raise ClusterError(f"max_restarts must be a whole number from 0 on, found {max_restarts!r}")
    if isinstance(wait_s, bool) or not isinstance(wait_s, int | float) or not wait_s >= 0:
        raise ClusterError(f"wait_s must be a number of seconds from 0 on, found {wait_s!r}")
    if cluster is not None and cluster != "ray" and type(cluster) is not Cluster:
        raise ClusterError(f'cluster must be an alpa_like.Cluster, "ray" or None, found {cluster!r}')
    described = cluster if isinstance(cluster, Cluster) else None
    session.start_on_ray(described, address, num_devices, num_hosts, max_restarts, wait_s)


def _check_local(num_hosts: int | None, max_restarts: int) -> None:
    if num_hosts is not None or max_restarts:
        raise ClusterError('num_hosts and max_restarts are for a Ray cluster: add cluster="ray"')


def shutdown() -> None:
    """End the session that `init` began. Arrays of this process stay valid; workers end, and what they hold is gone."""
    session.stop()


class ParallelFunction:
    """A function that runs in parallel; made by `parallelize`. One compilation per argument signature."""

    def __init__(
        self,
        fun: Callable[..., Any],
        method: Method,
        donate_argnums: Literal["auto"] | tuple[int, ...],
        batch_argnums: tuple[int, ...],
        static_argnums: tuple[int, ...],
    ) -> None:
        self.fun, self.method = fun, method
        self.donate_argnums: Literal["auto"] | tuple[int, ...] = donate_argnums
        self.batch_argnums, self.static_argnums = batch_argnums, static_argnums
        self._session: object = None
        self._last: tuple[tuple[Any, ...], Executable] | None = None
        self._last_plan: tuple[Plan, Trace] | None = None
        self._traces: dict[Signature, Trace] = {}
        self._executables: dict[Signature, Executable] = {}
        self._plans: dict[tuple[Signature, Cluster], Plan] = {}
        self.__name__: str = getattr(fun, "__name__", type(fun).__name__)
        functools.update_wrapper(self, fun)

    @property
    def last_executable(self) -> Executable | None:
        """The executable that was compiled or called last."""
        return self._last[1] if self._last else None

    @property
    def last_trace(self) -> Trace | None:
        """The step as it was traced for the plan that was made, loaded or compiled last."""
        return self._last_plan[1] if self._last_plan else None

    @property
    def is_compiled(self) -> bool:
        """Whether it has been compiled for the devices of this session."""
        return self._last is not None and self._session is session.current()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function; traces, plans and compiles at the first call of a signature."""
        if kwargs:
            args = bind(self.fun, args, kwargs)
        if self._session is not session.current():
            self._begin()
        dynamic, static = self._split(args)
        last = self._last
        if last is not None and last[0] == static and last[1].takes(dynamic):
            try:
                return last[1].run(*dynamic)
            except (TypeError, ValueError):
                pass  # arguments of another signature, or not placed yet: nothing has run, go the long way
        executable = self._executable(args)
        self._last = (static, executable)
        return executable(*dynamic)

    def _begin(self) -> None:
        """Forget what was compiled for the devices of an earlier session."""
        self._session = session.current()
        self._last = None
        self._executables.clear()

    @patient()
    def plan(self, *args: Any, cluster: Cluster | None = None, **kwargs: Any) -> Plan:
        """The plan for these arguments (arrays or `jax.ShapeDtypeStruct`s); nothing runs on a device."""
        args = bind(self.fun, args, kwargs)
        if cluster is not None and not isinstance(cluster, Cluster):
            raise ClusterError(f"cluster must be an alpa_like.Cluster such as Cluster.dgx_a100(), found {cluster!r}")
        session.emulate(EMULATED_DEVICES)
        signature = signature_of(self.fun, args, self.static_argnums)
        where = cluster or session.current().described()
        traced = self._trace(signature, args)
        if (signature, where) not in self._plans:
            make = make_pipeline_plan if isinstance(self.method, PipeshardParallel) else make_plan
            self._plans[(signature, where)] = make(traced, where, self.method)  # pyright: ignore[reportArgumentType]
        self._last_plan = (self._plans[(signature, where)], traced)
        return self._last_plan[0]

    def compile(self, *args: Any, plan: Plan | None = None, cluster: Cluster | None = None) -> Executable:
        """An executable for these arguments, by `plan` or by a new one for `cluster`; runs on the devices here.

        Raises `PlanError` for a plan of another program, or for another number of devices.
        """
        here = session.current()
        if self._session is not here:
            self._begin()
        if plan is not None and not isinstance(plan, Plan):
            raise PlanError(f"plan must be an alpa_like.Plan, such as Plan.load(path) gives, found {plan!r}")
        signature = signature_of(self.fun, args, self.static_argnums)
        chosen = plan or self.plan(*args, cluster=cluster)
        traced = self._trace(signature, args)
        donated = ", ".join(traced.arguments[i].path for i in traced.donated_leaves[:3])
        logger.info(
            "%s: compiling for mesh %s; donated: %s",
            self.__name__,
            chosen.mesh_shape,
            f"{donated}, …" if donated else "nothing",
        )
        executable = _executable(traced, chosen, here)
        self._executables[signature] = executable
        self._last, self._last_plan = (self._split(args)[1], executable), (chosen, traced)
        return executable

    def op_names(self, *args: Any) -> tuple[str, ...]:
        """The names that `ManualParallel` patterns are matched with, in program order, each once."""
        traced = self._trace(signature_of(self.fun, args, self.static_argnums), args)
        return tuple(dict.fromkeys(op.source for op in traced.graph.ops if op.source))

    def state_shardings(self, state: Any) -> Any:
        """Where the last plan places an argument with the tree and shapes of `state`, as `NamedSharding`s."""
        if self._last_plan is None:
            raise PlanError(
                f"{self.__name__} has no plan yet; call {self.__name__}.compile(state, batch) first, with arrays or "
                "with shapes such as jax.eval_shape gives"
            )
        plan, traced = self._last_plan
        here = session.current()
        cut, cutting = _cut(traced, plan)
        flat = [here.place(layout) for layout in argument_layouts(cut, plan, here.devices)]
        places = cutting.places(flat, cutting.inputs)
        return matching(traced, jax.tree.unflatten(traced.in_tree, places), state)

    def _split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        if not self.static_argnums:
            return args, ()
        dynamic = tuple(a for i, a in enumerate(args) if i not in self.static_argnums)
        return dynamic, tuple((type(a), a) for i, a in enumerate(args) if i in self.static_argnums)

    def _trace(self, signature: Signature, args: Sequence[Any]) -> Trace:
        platform = session.current().platform
        known = self._traces.get(signature)
        if known is None or known.platform != platform:
            self._traces[signature] = trace(
                self.fun,
                args,
                donate_argnums=self.donate_argnums,
                batch_argnums=self.batch_argnums,
                static_argnums=self.static_argnums,
                platform=platform,
            )
        return self._traces[signature]

    def _executable(self, args: tuple[Any, ...]) -> Executable:
        signature = signature_of(self.fun, args, self.static_argnums)
        if signature not in self._executables:
            if self._executables:
                logger.warning("%s: %s; compiling again", self.__name__, self._change(signature))
            self.compile(*args)
        return self._executables[signature]

    def _change(self, signature: Signature) -> str:
        """What differs from the signature compiled last."""
        last = list(self._executables)[-1]
        if last.static != signature.static:
            return f"static arguments changed from {last.static} to {signature.static}"
        if last.tree != signature.tree:
            return "the tree of the arguments changed"
        leaves = zip(self._traces[last].arguments, last.leaves, signature.leaves, strict=True)
        name, old, new = next((leaf.path, a, b) for leaf, a, b in leaves if a != b)
        return f"argument {name} changed from {old[1]}{list(old[0])} to {new[1]}{list(new[0])}"


def _executable(traced: Trace, plan: Plan, here: session.Session) -> Executable:
    cut, cutting = _cut(traced, plan)
    if isinstance(here.devices, AbstractDevices) and here.remote is not None:
        make = lower_single if plan.pipeline is None else lower_pipeline
        return RemoteExecutable(traced, cut, plan, make(cut, plan, here.devices), here.remote, cutting)
    if plan.pipeline is None:
        return Executable(traced, plan, lower(traced, plan, here.devices))
    return PipelineExecutable(traced, plan, lower_pipeline(cut, plan, here.devices), here.devices, cutting)


def _cut(traced: Trace, plan: Plan) -> tuple[Trace, Cutting]:
    """The step as a plan with a pipeline speaks of it: a loop over layers may be cut."""
    if plan.pipeline is None or plan.pipeline.scan is None:
        return traced, Cutting((None,) * len(traced.arguments), (None,) * len(traced.results))
    cut = cut_trace(traced, *plan.pipeline.scan)
    return cut.trace, Cutting(cut.inputs, cut.outputs)


@overload
def parallelize(fun: Callable[..., Any]) -> ParallelFunction: ...
@overload
def parallelize(
    fun: None = None,
    *,
    method: Method | None = None,
    donate_argnums: Literal["auto"] | int | Sequence[int] = "auto",
    batch_argnums: int | Sequence[int] = (1,),
    static_argnums: int | Sequence[int] = (),
) -> Callable[[Callable[..., Any]], ParallelFunction]: ...
@overload
def parallelize(
    fun: Callable[..., Any],
    *,
    method: Method | None = None,
    donate_argnums: Literal["auto"] | int | Sequence[int] = "auto",
    batch_argnums: int | Sequence[int] = (1,),
    static_argnums: int | Sequence[int] = (),
) -> ParallelFunction: ...
def parallelize(
    fun: Callable[..., Any] | None = None,
    *,
    method: Method | None = None,
    donate_argnums: Literal["auto"] | int | Sequence[int] = "auto",
    batch_argnums: int | Sequence[int] = (1,),
    static_argnums: int | Sequence[int] = (),
) -> ParallelFunction | Callable[[Callable[..., Any]], ParallelFunction]:
    """Run a function written for one device on all devices; results are those of `jax.jit`.

    method: what the planner may choose, `ShardParallel()` if not given.
    donate_argnums: arguments whose memory results may take; "auto" donates those that come back as results with
        the same tree, shapes and dtypes (the state).
    batch_argnums: arguments whose leaves have the batch as dim 0.
    static_argnums: arguments that are no arrays; a change compiles again.

    Usable as `@parallelize`, `@parallelize(method=…)` and `parallelize(fun, …)`.
    """
    if fun is None:
        return functools.partial(
            parallelize,
            method=method,
            donate_argnums=donate_argnums,
            batch_argnums=batch_argnums,
            static_argnums=static_argnums,
        )
    if isinstance(donate_argnums, str) and donate_argnums != "auto":
        raise MethodError(f"donate_argnums must be 'auto' or argument numbers, found {donate_argnums!r}")
    if not callable(fun):
        raise TraceError(f"parallelize needs a function, found {fun!r}; options go by name, as in method=...")
    if method is not None and not isinstance(method, Method):
        raise MethodError(f"method must be a value such as ShardParallel(), found {method!r}")
    return ParallelFunction(
        fun,
        method or ShardParallel(),
        "auto" if isinstance(donate_argnums, str) else _argnums(donate_argnums, "donate_argnums"),
        _argnums(batch_argnums, "batch_argnums"),
        _argnums(static_argnums, "static_argnums"),
    )


def _argnums(given: int | Sequence[int] | str, name: str) -> tuple[int, ...]:
    numbers = tuple(given) if isinstance(given, Sequence) else (given,)
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise MethodError(f"{name} must be argument numbers from 0 on, found {given!r}")
    return tuple(int(n) for n in numbers)


def create_state(init_fn: Callable[..., Any], *args: Any, like: ParallelFunction | Executable) -> Any:
    """`init_fn(*args)`, born sharded as the plan of `like` wants it: no device ever holds the whole.

    `like` must have been planned, compiled or called. Raises `PlanError` where it was not, or where it takes no
    argument with the tree and shapes that `init_fn` returns.
    """
    if not isinstance(like, ParallelFunction | Executable):
        raise PlanError(f"like must be a parallelized function or an Executable, found {like!r}")
    if isinstance(like, ParallelFunction) and like.last_trace is None:
        made = ", ".join([getattr(init_fn, "__name__", "init_fn"), *_names(init_fn, args)])
        raise PlanError(
            f"{like.__name__} has no plan yet, so where the state is to live is open; call "
            f"{like.__name__}.compile(jax.eval_shape({made}), batch) first"
        )
    shapes = jax.eval_shape(init_fn, *args)
    tree, places = jax.tree.structure(shapes), like.state_shardings(shapes)
    remote = session.current().remote
    if remote is not None:
        return born(remote, getattr(init_fn, "__name__", "init"), init_fn, args, tree, places)
    return _born(init_fn, args, tree, places)


def _names(fun: Callable[..., Any], args: Sequence[Any]) -> list[str]:
    """The names of the parameters that the arguments are for."""
    try:
        return list(inspect.signature(fun).bind(*args).arguments)
    except (TypeError, ValueError):
        return [f"argument_{i}" for i in range(len(args))]


def _born(init_fn: Callable[..., Any], args: tuple[Any, ...], tree: Any, shardings: Any) -> Any:
    """The state, one computation per mesh: each makes the leaves, and the parts of leaves, that live there."""
    flat = tree.flatten_up_to(shardings)
    places = [leaf.shardings if isinstance(leaf, Parts) else (leaf,) for leaf in flat]
    wanted = [(i, k, s) for i, parts in enumerate(places) for k, s in enumerate(parts)]
    made: dict[tuple[int, int], Any] = {}
    for mesh in dict.fromkeys(s.mesh for _, _, s in wanted):
        mine = [(i, k, s) for i, k, s in wanted if s.mesh == mesh]

        def leaves(*values: Any, mine: list[Any] = mine) -> list[Any]:
            state = jax.tree.leaves(init_fn(*values))
            return [_part(state[i], flat[i], k) for i, k, _ in mine]

        values = jax.jit(leaves, out_shardings=[s for _, _, s in mine])(*args)
        made.update(((i, k), v) for (i, k, _), v in zip(mine, values, strict=True))
    joined = [
        ChunkedArray([made[(i, k)] for k in range(len(leaf.lengths))]) if isinstance(leaf, Parts) else made[(i, 0)]
        for i, leaf in enumerate(flat)
    ]
    return jax.tree.unflatten(tree, joined)


def _part(value: jax.Array, place: Any, number: int) -> jax.Array:
    """The rows of one part of a leaf, or the leaf."""
    if not isinstance(place, Parts):
        return value
    first, last = bounds(place.lengths)[number]
    return value[first:last]


def grad(fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """`jax.grad`, under the name that Alpa's users know. A plain `jax.grad` does as well: no mark is needed."""
    return jax.grad(fun, *args, **kwargs)


def value_and_grad(fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """`jax.value_and_grad`, under the name that Alpa's users know."""
    return jax.value_and_grad(fun, *args, **kwargs)


def mark_pipeline_boundary(value: Any = None) -> Any:
    """Mark where a layer ends, for `ManualLayerOption`: returns `value`, the activations that go to the next layer.

    Call it in the forward pass: `x = alpa.mark_pipeline_boundary(x)`. Under other methods it does nothing.
    """
    if value is None:
        raise MethodError(
            "mark_pipeline_boundary needs the activations that go to the next layer: x = alpa.mark_pipeline_boundary(x)"
        )
    return jax.tree.map(lambda x: checkpoint_name(x, BOUNDARY), value)
