"""`RemoteExecutable`: a step that runs on worker processes, with a pipeline or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_leaves, tree_unflatten

from alpa_like.chunked import ChunkedArray, Parts, bounds
from alpa_like.errors import PlanError
from alpa_like.placement import LoweredPipeline
from alpa_like.plan import Plan
from alpa_like.runtime.interpreter import Event
from alpa_like.runtime.pipeline import Cutting, PipelineExecutable
from alpa_like.runtime.remote import Remote, RemoteProgram
from alpa_like.runtime.remote_arrays import RemoteArray, RemotePlace
from alpa_like.runtime.remote_programs import making
from alpa_like.runtime.staged import BufferType
from alpa_like.tracer import Trace

__all__ = ["RemoteExecutable", "born"]


class RemoteExecutable(PipelineExecutable):
    """Called as any executable. State leaves and other results are `RemoteArray`s, which stay on the workers."""

    def __init__(
        self, trace: Trace, cut: Trace, plan: Plan, lowered: LoweredPipeline, remote: Remote, cuts: Cutting
    ) -> None:
        """`cut` is the step as the plan speaks of it, whose loop over layers `cuts` may have cut."""
        self._begin(trace, plan, (RemoteArray, ChunkedArray))
        self._prepare(lowered, cuts, remote.place)
        self._remote = remote
        self._program = RemoteProgram(remote, lowered, cut.jaxpr.in_avals, cut.jaxpr.out_avals)
        remote.workers.roles.update(_roles(plan))
        # Host data travels with the step.
        self._wanted = tuple(None if i in trace.batch else place for i, place in enumerate(self._wanted))

    def check(self, args: tuple[Any, ...]) -> None:
        """As for any executable; `WorkerError` where the workers have ended."""
        self._remote.check()
        super().check(args)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        raise PlanError(
            "the devices are those of other processes, so there is no jax.sharding.Mesh of them here; see "
            "input_shardings for where each argument lives, and plan.mesh_shape"
        )

    def moved(self, value: Any, wanted: Any) -> Any:
        """A leaf where the step wants it: from worker to worker, or from here."""
        if not isinstance(wanted, Parts):
            return self._moved(value, wanted)
        whole = np.asarray(value) if not isinstance(value, jax.Array) else value
        rows = zip(bounds(wanted.lengths), wanted.shardings, strict=True)
        return ChunkedArray([self._moved(whole[a:b], place) for (a, b), place in rows])

    def _moved(self, value: Any, wanted: RemotePlace) -> RemoteArray:
        if isinstance(value, RemoteArray) and value.sharding is not None and value.sharding.session == wanted.session:
            return self._remote.moved(value, wanted.layout)
        if isinstance(value, RemoteArray | ChunkedArray):
            value = value.value() if isinstance(value, RemoteArray) else np.asarray(value)
        return self._remote.put(value, BufferType.of(_narrow(value), wanted.layout))

    def run(self, *args: Any) -> Any:
        """Start the step on arguments that are placed. Raises what went wrong in an earlier step."""
        leaves = self._cuts.parts(tree_leaves(args))
        return tree_unflatten(self._trace.out_tree, self._cuts.joined(iter(self._program.run(leaves))))

    def timed(self, *args: Any) -> tuple[Any, tuple[Event, ...]]:
        """A step's result, and when each piece ran, in seconds since the first worker began."""
        leaves = self._cuts.parts(tree_leaves(self.place(*args)))
        results, events = self._program.trace(leaves)
        return tree_unflatten(self._trace.out_tree, self._cuts.joined(iter(results))), events

    @cached_property
    def _each(self) -> Callable[[str], dict[str, Any]]:
        """What the first process of each mesh says of its pieces."""

        def ask(method: str) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for span in self._program.spans.values():
                found |= self._remote.result(self._remote.call(span, method, self._program.number)[:1])[0]
            return found

        return ask

    def _texts(self) -> dict[str, str]:
        return self._each("texts")

    def _temporaries(self) -> dict[str, int]:
        return self._each("temporaries")


def _roles(plan: Plan) -> dict[tuple[int, int], str]:
    """The stages of a pipeline by devices."""
    if plan.pipeline is None:
        return {}
    found: dict[tuple[int, int], list[str]] = {}
    for number in range(len(plan.pipeline.stages)):
        devices = next(s.devices for s in plan.stages if s.name == f"forward {number}")
        found.setdefault(devices, []).append(str(number))
    return {devices: f"stage {' and '.join(numbers)} of {plan.function}" for devices, numbers in found.items()}


def _narrow(value: Any) -> Any:
    """Shape and dtype of host data as JAX takes it: 32 bits, unless it was told otherwise."""
    found = value if hasattr(value, "dtype") else np.asarray(value)
    dtype = found.dtype if jnp.issubdtype(found.dtype, jax.dtypes.extended) else None
    weak = not hasattr(value, "dtype") or bool(getattr(value, "weak_type", False))
    return jax.ShapeDtypeStruct(found.shape, dtype or jax.dtypes.canonicalize_dtype(found.dtype), weak_type=weak)


def born(remote: Remote, name: str, init_fn: Callable[..., Any], args: Sequence[Any], tree: Any, places: Any) -> Any:
    """`init_fn(*args)`, each leaf made by the workers that hold it. `places`: a tree of `RemotePlace`s and `Parts`."""
    flat: list[Any] = tree.flatten_up_to(places)
    given, structure = jax.tree.flatten(args)
    wanted = [p.layout for leaf in flat for p in (leaf.shardings if isinstance(leaf, Parts) else (leaf,))]

    def leaves(*values: Any) -> list[Any]:
        state = jax.tree.leaves(init_fn(*jax.tree.unflatten(structure, values)))
        return [row for value, place in zip(state, flat, strict=True) for row in _rows(value, place)]

    types = [_narrow(x) for x in given]
    program = RemoteProgram(
        remote, making(name, leaves, types, wanted, remote.devices), types, jax.eval_shape(leaves, *types)
    )
    made = iter(program.run(given))
    joined = [
        ChunkedArray([next(made) for _ in leaf.lengths]) if isinstance(leaf, Parts) else next(made) for leaf in flat
    ]
    return jax.tree.unflatten(tree, joined)


def _rows(value: Any, place: Any) -> list[Any]:
    """The parts of a leaf that live on different meshes, or the leaf."""
    return [value[a:b] for a, b in bounds(place.lengths)] if isinstance(place, Parts) else [value]
