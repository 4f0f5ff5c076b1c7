"""What the planner may choose: frozen values, one class per parallel method, with Alpa's names.

All methods run the same search; each forbids something.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import jax
from jax.sharding import NamedSharding, PartitionSpec

from alpa_like.errors import MethodError, PlanError
from alpa_like.graph import meets_batch
from alpa_like.plan import Spec, partition_spec
from alpa_like.texts import counted
from alpa_like.tracer import Trace

__all__ = [
    "DataParallel",
    "ManualParallel",
    "Method",
    "ShardParallel",
    "Zero2Parallel",
    "Zero3Parallel",
]

AXIS_NAMES = ("x", "y", "z")


@dataclass(frozen=True)
class Requirements:
    """What a method asks of a traced step on a mesh; tensors by number, as in `passes.intra.Restrictions`.

    "home" is where an argument is stored and what an op makes, "out" where a result leaves.
    """

    tensors: Mapping[tuple[int, str], Spec] = field(default_factory=dict)
    spread: frozenset[int] = frozenset()
    batch: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Method:
    """Options that all methods share.

    mesh_shape: "auto" tries every factorization of the number of devices into at most three axes.
    axis_names: names of the mesh axes; "x", "y", "z" where not given.
    memory_budget_bytes: per device; the memory of the cluster's devices where not given.
    solver: "auto", "HiGHS" or "CBC". time_limit_s: for the solver, per mesh shape.
    gap: where memory is short, a plan proven to be within this share of the optimum is taken; the plan states its
        gap. 0 searches on until the optimum is proven. Where memory is not short, the plan is the optimum anyway.
    """

    mesh_shape: Literal["auto"] | tuple[int, ...] = "auto"
    axis_names: tuple[str, ...] | None = None
    memory_budget_bytes: float | None = None
    solver: Literal["auto", "HiGHS", "CBC"] = "auto"
    time_limit_s: float = 600.0
    gap: float = 1e-3

    def __post_init__(self) -> None:
        self._check_mesh()
        self._check_numbers()
        if self.solver not in ("auto", "HiGHS", "CBC"):
            raise MethodError(f"solver must be 'auto', 'HiGHS' or 'CBC', found {self.solver!r}")

    def _check_mesh(self) -> None:
        if self.mesh_shape != "auto":
            shape = tuple(self.mesh_shape) if isinstance(self.mesh_shape, Sequence) else ()
            if not 1 <= len(shape) <= 3 or not all(isinstance(n, int) and n > 0 for n in shape):
                raise MethodError(
                    f"mesh_shape must be 'auto' or 1 to 3 positive whole numbers, found {self.mesh_shape!r}"
                )
            object.__setattr__(self, "mesh_shape", shape)
        names = self.axis_names
        if names is not None and len(set(names)) != len(names):
            raise MethodError(f"axis_names must differ from each other, found {names}")

    def _check_numbers(self) -> None:
        budget = self.memory_budget_bytes
        if budget is not None and not (isinstance(budget, Real) and budget > 0):
            raise MethodError(f"memory_budget_bytes must be a number of bytes above 0, found {budget!r}")
        if not (isinstance(self.gap, Real) and 0 <= self.gap < 1):
            raise MethodError(f"gap must be a share of at least 0 and less than 1, found {self.gap!r}")
        if not (isinstance(self.time_limit_s, Real) and self.time_limit_s > 0):
            raise MethodError(f"time_limit_s must be a number of seconds above 0, found {self.time_limit_s!r}")

    @property
    def name(self) -> str:
        return type(self).__name__

    def names(self, mesh_shape: tuple[int, ...]) -> tuple[str, ...]:
        """The axis names of a mesh."""
        names = self.axis_names or AXIS_NAMES[: len(mesh_shape)]
        if len(names) != len(mesh_shape):
            raise MethodError(f"mesh {mesh_shape} has {len(mesh_shape)} axes, but axis_names are {names}")
        return tuple(names)

    def mesh_shapes(self, devices: int) -> tuple[tuple[int, ...], ...]:
        """The mesh shapes to try on so many devices."""
        if self.mesh_shape == "auto":
            names = self.axis_names
            shapes = tuple(s for s in _factorizations(devices) if names is None or len(s) == len(names))
            if not shapes:
                raise MethodError(f"axis_names are {len(names or ())} names, but {devices} devices form no such mesh")
            return shapes
        if math.prod(self.mesh_shape) != devices:
            raise MethodError(
                f"mesh_shape {self.mesh_shape} needs {math.prod(self.mesh_shape)} devices, but there are {devices}; "
                f"choose sizes whose product is {devices}, or 'auto'"
            )
        return (self.mesh_shape,)

    def requirements(self, trace: Trace, mesh_shape: tuple[int, ...]) -> Requirements:
        """What this method forbids on a mesh."""
        del trace, mesh_shape
        return Requirements()

    def warnings(self, trace: Trace) -> tuple[str, ...]:
        """What of this method has no effect on a step."""
        del trace
        return ()


@dataclass(frozen=True, kw_only=True)
class ShardParallel(Method):
    """The optimal sharding of every tensor, on the best mesh."""


@dataclass(frozen=True, kw_only=True)
class _BatchParallel(Method):
    """Only the batch is split; subclasses say how parameters and optimizer state are stored."""

    mesh_shape: Literal["auto"] | tuple[int, ...] = "auto"

    def mesh_shapes(self, devices: int) -> tuple[tuple[int, ...], ...]:
        if self.mesh_shape == "auto":
            return ((devices,),)
        return super().mesh_shapes(devices)

    def requirements(self, trace: Trace, mesh_shape: tuple[int, ...]) -> Requirements:
        graph = trace.graph
        batch = frozenset(graph.arguments[i] for i in trace.batch if trace.arguments[i].shape)
        if not batch:
            raise MethodError(
                f"{self.name} splits the batch, but {trace.name} has no batch argument with dims; "
                "name it in batch_argnums"
            )
        every = tuple(range(len(mesh_shape)))
        tensors: dict[tuple[int, str], Spec] = {}
        for i in trace.batch:
            shape = trace.arguments[i].shape
            if shape and shape[0] % math.prod(mesh_shape) == 0:
                tensors[(graph.arguments[i], "home")] = (every, *((),) * (len(shape) - 1))
        whole, spread = self.state(trace)
        tensors |= {(graph.arguments[i], "home"): ((),) * len(trace.arguments[i].shape) for i in whole}
        return Requirements(tensors, frozenset(graph.arguments[i] for i in spread), batch)

    def state(self, trace: Trace) -> tuple[list[int], list[int]]:
        """Flat arguments that every device holds whole, and those that are spread over all devices."""
        raise NotImplementedError


def _kept(trace: Trace) -> list[int]:
    return [i for i in range(len(trace.arguments)) if i not in trace.batch]


def _parameters(trace: Trace) -> set[int]:
    """The flat arguments that anything of the forward or backward pass reads: computes with a batch dim."""
    graph = trace.graph
    read = meets_batch(graph, frozenset(graph.arguments[i] for i in trace.batch))
    return {i for i in _kept(trace) if graph.arguments[i] in read}


@dataclass(frozen=True, kw_only=True)
class DataParallel(_BatchParallel):
    """Every device holds the whole state and computes on its part of the batch."""

    def state(self, trace: Trace) -> tuple[list[int], list[int]]:
        return _kept(trace), []


@dataclass(frozen=True, kw_only=True)
class Zero2Parallel(_BatchParallel):
    """Data parallel with gradients and optimizer state spread over the devices (ZeRO stage 2)."""

    def state(self, trace: Trace) -> tuple[list[int], list[int]]:
        parameters = _parameters(trace)
        return sorted(parameters), [i for i in _kept(trace) if i not in parameters]


@dataclass(frozen=True, kw_only=True)
class Zero3Parallel(_BatchParallel):
    """Data parallel with parameters, gradients and optimizer state spread over the devices (ZeRO stage 3, FSDP)."""

    def state(self, trace: Trace) -> tuple[list[int], list[int]]:
        return [], _kept(trace)


@dataclass(frozen=True)
class ManualParallel(Method):
    """Shardings by hand; everything left `None` is chosen by the solver.

    in_specs: one entry per argument (static ones not counted): a `PartitionSpec`, a pytree prefix of them, or None.
    out_specs: the same for the result. constraints: `PartitionSpec`s for what ops make, by a pattern over the
    op's name such as `"*/h*/mlp/up/dot_general"` (`fnmatch` rules; the plan's warnings list patterns without match).
    A spec names mesh axes by `axis_names`; `P()` means whole. An op's name is its JAX name stack and primitive, such
    as `jvp(GPT)/h0/mlp/up/dot_general` forward and `transpose(jvp(GPT))/h0/mlp/up/dot_general` backward;
    `step.op_names(...)` lists them.
    """

    in_specs: Any = None
    out_specs: Any = None
    constraints: Mapping[str, PartitionSpec] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.constraints is not None and not isinstance(self.constraints, Mapping):
            raise MethodError(f"constraints must map patterns to PartitionSpecs, found {self.constraints!r}")

    def mesh_shapes(self, devices: int) -> tuple[tuple[int, ...], ...]:
        """With "auto", the meshes that have every axis that a spec names."""
        shapes = super().mesh_shapes(devices)
        if self.mesh_shape != "auto" or self.axis_names is not None:
            return shapes
        specs = jax.tree.leaves((self.in_specs, self.out_specs, dict(self.constraints or {})), is_leaf=_is_spec)
        used = {
            n for s in specs if isinstance(s, PartitionSpec) for e in s for n in (e if isinstance(e, tuple) else (e,))
        }
        enough = tuple(s for s in shapes if used & set(AXIS_NAMES) <= set(AXIS_NAMES[: len(s)]))
        return enough or shapes[-1:]

    def warnings(self, trace: Trace) -> tuple[str, ...]:
        """The patterns that no op's name matches."""
        sources = {op.source for op in trace.graph.ops}
        return tuple(
            f"the constraint {pattern!r} matches no op; names look like {max(sources, key=len, default='')!r}"
            for pattern in self.constraints or {}
            if not any(fnmatch.fnmatchcase(s, pattern) for s in sources)
        )

    def requirements(self, trace: Trace, mesh_shape: tuple[int, ...]) -> Requirements:
        names, graph = self.names(mesh_shape), trace.graph
        tensors: dict[tuple[int, str], Spec] = {}
        sides = (
            ("in_specs", self.in_specs, trace.in_tree, trace.arguments, graph.arguments, "home"),
            ("out_specs", self.out_specs, trace.out_tree, trace.results, graph.results, "out"),
        )
        for what, given, tree, leaves, ids, version in sides:
            for leaf, tensor, spec in zip(leaves, ids, _broadcast(what, given, tree), strict=True):
                if spec is not None:
                    tensors[(tensor, version)] = to_spec(spec, names, leaf.path, leaf.shape, mesh_shape)
        for a, r in trace.stored:
            enters, leaves_as = tensors.get((graph.arguments[a], "home")), tensors.get((graph.results[r], "out"))
            if enters is not None and leaves_as is not None and enters != leaves_as:
                before, after = partition_spec(enters, names), partition_spec(leaves_as, names)
                raise PlanError(
                    f"{trace.arguments[a].path} enters as {before}, but {trace.results[r].path}, which takes its "
                    f"place, leaves as {after}; give both one spec"
                )
        for pattern, spec in (self.constraints or {}).items():
            for op in graph.ops:
                if fnmatch.fnmatchcase(op.source, pattern):
                    for t in op.results:
                        shape = graph.tensors[t].shape
                        tensors[(t, "home")] = to_spec(spec, names, f"constraint {pattern!r}", shape, None)
        return Requirements(tensors)


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec | NamedSharding)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A leaf with what is given for it, which may be None."""

    spec: Any


def _broadcast(what: str, given: Any, tree: Any) -> list[PartitionSpec | None]:
    """One spec per leaf from a pytree prefix of specs; `what` is the option that they are of."""
    if given is None:
        return [None] * tree.num_leaves
    if isinstance(given, str):
        raise MethodError(f"{what}: expected PartitionSpecs, found the text {given!r}; write P({given!r})")
    full = jax.tree_util.tree_unflatten(tree, range(tree.num_leaves))
    if isinstance(given, Sequence) and not _is_spec(given) and isinstance(full, tuple):
        if len(given) != len(full):
            of = "argument" if what == "in_specs" else "result"
            raise MethodError(
                f"{what} has {counted(len(given), 'entry')} for {counted(len(full), of)}; "
                "give one for each, or one spec for all"
            )
        given = tuple(given)
    try:
        found = jax.tree.map(
            lambda spec, part: jax.tree.map(lambda _: _Entry(spec), part), given, full, is_leaf=_is_spec
        )
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise MethodError(
            f"{what} must be a tree of PartitionSpecs and None, like what it is for or a prefix of that: {reason[:400]}"
        ) from None
    flat = jax.tree.leaves(found)
    if len(flat) != tree.num_leaves:
        raise MethodError(f"expected specs for {tree.num_leaves} leaves, found {len(flat)}")
    return [_as_partition(entry.spec) for entry in flat]


def _as_partition(spec: Any) -> PartitionSpec | None:
    return spec.spec if isinstance(spec, NamedSharding) else spec


def to_spec(
    spec: PartitionSpec,
    names: tuple[str, ...],
    where: str,
    shape: tuple[int, ...],
    divide: tuple[int, ...] | None,
) -> Spec:
    """A `PartitionSpec` in numbers. Raises `MethodError` for unknown or repeated axes, too many dims, uneven dims."""
    if not isinstance(spec, PartitionSpec):
        raise MethodError(f"{where}: expected a PartitionSpec or None, found {spec!r}")
    if len(spec) > len(shape):
        entries = counted(len(spec), "entry")
        raise MethodError(f"{where}: {spec} has {entries}, but the tensor has shape {shape}; give at most one per dim")
    found: list[tuple[int, ...]] = []
    for entry in (*spec, *(None,) * (len(shape) - len(spec))):
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        unknown = [a for a in axes if a not in names]
        if unknown:
            raise MethodError(f"{where}: {spec} names axis {unknown[0]!r}, but the mesh has axes {names}")
        found.append(tuple(names.index(str(a)) for a in axes))
    used = [a for axes in found for a in axes]
    if len(set(used)) < len(used):
        raise MethodError(f"{where}: {spec} uses one mesh axis twice; each axis can split one dim only")
    if any(axes != tuple(sorted(axes)) for axes in found):
        raise MethodError(f"{where}: {spec} must list the axes of one dim in the order of the mesh, {names}")
    for dim, axes in enumerate(found if divide else ()):
        parts = math.prod(divide[a] for a in axes) if divide else 1
        if shape[dim] % parts:
            raise MethodError(
                f"{where}: dim {dim} of shape {shape} is to be split over {parts} devices by {spec}, "
                "which does not divide it; arguments and results are split evenly or not at all, so leave the dim whole"
            )
    return tuple(found)


def _factorizations(devices: int, axes: int = 3) -> list[tuple[int, ...]]:
    """Every mesh of up to `axes` axes of 2 or more devices each, fewest axes first."""
    found: list[tuple[int, ...]] = [(devices,)]
    for count in range(2, axes + 1):
        found.extend(_products(devices, count))
    return found


def _products(devices: int, count: int) -> list[tuple[int, ...]]:
    if count == 1:
        return [(devices,)] if devices > 1 else []
    return [(n, *rest) for n in range(2, devices) if devices % n == 0 for rest in _products(devices // n, count - 1)]
