"""`Executable`: a compiled step that takes and returns what the function did, and tells what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import tree_leaves

from alpa_like.chunked import ChunkedArray
from alpa_like.errors import ProgramError, TraceError
from alpa_like.placement import Lowered, matching
from alpa_like.plan import Plan
from alpa_like.runtime import hlo
from alpa_like.tracer import Trace, abstract_leaf

__all__ = ["Executable", "place_of", "same_kind"]


_SCALARS = {bool: "bool", int: "int", float: "float", complex: "complex"}


def _narrowed(dtype: str) -> str:
    """What JAX makes of a dtype: without 64-bit mode, 32 bits."""
    return str(jax.dtypes.canonicalize_dtype(dtype)) if dtype in _WIDE else dtype


_WIDE = ("int64", "uint64", "float64", "complex128")


def _weak(value: Any) -> bool:
    return type(value) in _SCALARS or bool(getattr(value, "weak_type", False))


def same_kind(found: str, compiled: str) -> bool:
    """Whether a dtype, or the name of a Python scalar's type, is what a step was compiled for.

    NumPy's 64-bit numbers become 32-bit ones, unless JAX was told otherwise, as under `jax.jit`.
    """
    narrow = _narrowed(found)
    return narrow == compiled or found == compiled or (found in _SCALARS.values() and compiled.startswith(found))


def place_of(value: Any) -> Any:
    """Where an array lives: a sharding, those of its parts, or None."""
    return value.places if isinstance(value, ChunkedArray) else getattr(value, "sharding", None)


class Executable:
    """A step compiled by a plan. Arguments are moved to where the plan wants them, if they are elsewhere."""

    def __init__(self, trace: Trace, plan: Plan, lowered: Lowered) -> None:
        self._begin(trace, plan, (type(jax.device_put(0.0, lowered.mesh.devices.flat[0])), ChunkedArray))
        self._lowered = lowered
        self._call = lowered.compiled

    def _begin(self, trace: Trace, plan: Plan, kinds: tuple[type, ...]) -> None:
        """What all executables have in common; `kinds` are the classes of leaves that a step may have taken."""
        self.plan = plan
        self._trace = trace
        self._kinds = kinds
        self._scalars = tuple((i, a.weak_type) for i, a in enumerate(trace.avals) if not a.shape)
        self._donated = trace.donated_leaves

    @property
    def traced(self) -> Trace:
        """The step as it was traced."""
        return self._trace

    @property
    def input_shardings(self) -> tuple[Any, ...]:
        """One pytree of `NamedSharding`s per dynamic argument."""
        return self._lowered.input_shardings

    @property
    def output_shardings(self) -> Any:
        """A pytree of `NamedSharding`s like the result."""
        return self._lowered.output_shardings

    @property
    def wanted(self) -> Sequence[Any]:
        """The sharding of each flat argument, None for those that may lie anywhere."""
        return tree_leaves(self._lowered.input_shardings)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The mesh of the stage."""
        return self._lowered.mesh

    def __call__(self, *args: Any) -> Any:
        """Run the step on its dynamic arguments.

        Raises `ProgramError` for arguments of other trees, shapes or dtypes, and where a failed step has
        taken donated arguments with it.
        """
        if self.takes(args):
            try:
                return self.run(*args)
            except (TypeError, ValueError):
                pass  # not placed yet, or no fit: `place` moves them or says what is wrong
        return self.run(*self.place(*args))

    def takes(self, args: tuple[Any, ...]) -> bool:
        """False where XLA would take wrong arguments: scalars that promote otherwise, one buffer donated twice."""
        leaves = tree_leaves(args)
        if len(leaves) != len(self._trace.avals):
            return False
        if any(type(x) in self._kinds and x.is_deleted() for x in leaves):
            return False  # XLA's CPU backend ends the process on these
        if any(_weak(leaves[i]) != weak for i, weak in self._scalars):
            return False
        return len({id(leaves[i]) for i in self._donated}) == len(self._donated)

    def run(self, *args: Any) -> Any:
        """The step on arguments that are where the plan wants them: `TypeError` or `ValueError` if they are not."""
        try:
            return self._call(*args)
        except jax.errors.JaxRuntimeError as error:
            raise self._failed(args, error) from error

    def place(self, *args: Any) -> tuple[Any, ...]:
        """The arguments, moved to the plan's shardings."""
        self.check(args)
        given, tree = jax.tree.flatten(args)
        wanted = self.wanted
        free = [w is None for w in wanted]
        elsewhere = [i for i, x in enumerate(given) if not free[i] and place_of(x) != wanted[i]]
        flat = [x if not f or hasattr(x, "dtype") else np.asarray(x) for x, f in zip(given, free, strict=True)]
        for i in elsewhere:
            flat[i] = self.moved(given[i], wanted[i])
        seen: set[int] = set()
        for i in self._donated:  # a state that holds one array twice would be donated twice
            if id(given[i]) in seen:
                flat[i] = flat[i].copy()
            seen.add(id(given[i]))
        return jax.tree.unflatten(tree, flat)

    def moved(self, value: Any, wanted: Any) -> Any:
        """One leaf in the layout that the plan wants."""
        return jax.device_put(value, wanted)

    def check(self, args: tuple[Any, ...]) -> None:
        """Raise `ProgramError` where arguments differ from those that the step was compiled for."""
        found = jax.tree.structure(args)
        if found != self._trace.in_tree:
            raise ProgramError(
                f"{self._trace.name} was compiled for arguments of another tree: expected {self._trace.in_tree}, "
                f"found {found}; call the parallelized function itself, which compiles again"
            )
        for leaf, aval, value in zip(self._trace.arguments, self._trace.avals, tree_leaves(args), strict=True):
            try:
                shape, dtype, weak = abstract_leaf(value)
            except TraceError as error:
                raise ProgramError(f"argument {leaf.path} must be an array, but {error}") from None
            if getattr(value, "lost", False):
                raise ProgramError(
                    f"argument {leaf.path} was on workers that have ended; restore the state from the last checkpoint"
                )
            if isinstance(value, (jax.Array, *self._kinds)) and value.is_deleted():
                raise ProgramError(
                    f"argument {leaf.path} was donated to an earlier step and is gone; pass the state that it returned"
                )
            if shape != leaf.shape or weak != aval.weak_type or not same_kind(dtype, str(aval.dtype)):
                raise ProgramError(
                    f"argument {leaf.path} has shape {shape} and dtype {dtype}, but {self._trace.name} was compiled "
                    f"for {leaf.shape} and {leaf.dtype}; call the parallelized function itself, which compiles again"
                )

    def _failed(self, args: tuple[Any, ...], error: Exception) -> ProgramError:
        gone = [
            leaf.path
            for leaf, value in zip(self._trace.arguments, tree_leaves(args), strict=True)
            if isinstance(value, jax.Array) and value.is_deleted()
        ]
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[0] if len(lines) == 1 else f"{lines[0].partition(': Traceback')[0]}: {lines[-1]}"
        if not gone:
            return ProgramError(f"{self._trace.name} failed: {reason}. No argument was lost; the state is as it was")
        lost = gone[0] if len(gone) == 1 else f"{gone[0]} and {len(gone) - 1} more"
        return ProgramError(
            f"{self._trace.name} failed: {reason}. The donated arguments are gone ({lost}): "
            "go on from the last checkpoint, or run with donate_argnums=() to keep them"
        )

    def state_shardings(self, state: Any) -> Any:
        """The shardings of the argument that has the tree and shapes of `state`."""
        return matching(self._trace, self.input_shardings, state)

    def hlo_text(self) -> str:
        """The optimized HLO of one device."""
        return self._call.as_text()

    def traffic(self, *, reduce_scatter: bool = False) -> dict[str, int]:
        """Bytes that each device sends in a step, by kind of collective, by ring formulas.

        With `reduce_scatter=True` an all-reduce of which every device keeps its part only counts as the
        reduce-scatter that GPU and TPU compilers make of it; XLA's CPU backend has none.
        """
        return hlo.traffic_by_kind(hlo.read_collectives(self.hlo_text()), reduce_scatter=reduce_scatter)

    def memory_bytes(self) -> int:
        """Peak memory of a step on one device, by XLA: arguments, results without a donated place, temporaries."""
        m = self._call.memory_analysis()
        return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes

    def __repr__(self) -> str:
        return f"Executable({self._trace.name}, mesh {self.plan.mesh_shape}, {self.plan.method})"
