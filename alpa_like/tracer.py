"""Function and arguments → `Trace`: one closed jaxpr, what each argument is for, and its operator graph.

The function is traced once. Nested calls are stepped into when the graph is read; control flow and
rematerialization stay as they are.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import jaxpr_as_fun
from jax.tree_util import keystr, tree_flatten_with_path, tree_leaves, tree_structure, tree_unflatten

from alpa_like import stablehlo
from alpa_like.errors import TraceError
from alpa_like.graph import OpGraph

PyTreeDef = Any
"""JAX declares `jax.tree_util.PyTreeDef` as a value, which type checkers refuse in annotations."""

__all__ = ["Leaf", "Signature", "Trace", "abstract_leaf", "bind", "signature_of", "trace"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array of the arguments or results: its path in the pytree, such as `state.params['w']`, shape and dtype."""

    path: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.path} {self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Signature:
    """What a compiled step depends on: the trees of the dynamic arguments, their leaves, and the static values."""

    tree: PyTreeDef
    leaves: tuple[tuple[tuple[int, ...], str, bool], ...]
    static: tuple[Any, ...]


@dataclass(frozen=True)
class Trace:
    """A traced step. `stored` pairs flat arguments with the flat results that take their place in the next step.

    `donated` are argument numbers (static ones not counted); `batch` and `stored` speak of flat leaves. `platform` is
    what it is lowered for, None for that of this process.
    """

    name: str
    jaxpr: Any
    in_tree: PyTreeDef
    out_tree: PyTreeDef
    arguments: tuple[Leaf, ...]
    results: tuple[Leaf, ...]
    avals: tuple[Any, ...]
    stored: tuple[tuple[int, int], ...]
    donated: tuple[int, ...]
    batch: tuple[int, ...]
    again: Callable[..., Any] | None = field(default=None, compare=False, repr=False)
    platform: str | None = None
    sizes: dict[int, Any] = field(default_factory=dict[int, Any], compare=False, repr=False)

    def at_batch_size(self, size: int) -> Any:
        """The closed jaxpr of the step for batch arguments whose dim 0 is `size`; calls the user's code again."""
        if self.again is None:
            raise TraceError(f"{self.name} was traced without its function and can't be traced for another batch size")
        flat = [
            jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype, weak_type=a.weak_type)
            if i in self.batch and a.shape
            else a
            for i, a in enumerate(self.avals)
        ]
        if size not in self.sizes:
            self.sizes[size] = self.again(*flat)
        return self.sizes[size]

    def function(self) -> Callable[..., Any]:
        """The step as a function of its dynamic arguments, which runs the jaxpr and never the user's code again."""
        run = jaxpr_as_fun(self.jaxpr)

        def step(*args: Any) -> Any:
            return tree_unflatten(self.out_tree, run(*tree_leaves(args)))

        step.__name__ = step.__qualname__ = self.name
        return step

    @cached_property
    def graph(self) -> OpGraph:
        """The operator graph. Uses no device."""
        traced = jax.jit(self.function(), keep_unused=True).trace(*self.abstract_arguments())
        return stablehlo.graph_of(traced, self.platform)

    @cached_property
    def donated_leaves(self) -> tuple[int, ...]:
        """The flat numbers of the leaves of the donated arguments."""
        starts = _starts(self.in_tree)
        return tuple(i for p in self.donated for i in range(starts[p], starts[p + 1]))

    def abstract_arguments(self) -> tuple[Any, ...]:
        """The dynamic arguments as `jax.ShapeDtypeStruct`s."""
        return tree_unflatten(self.in_tree, self.avals)


def bind(fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Positional arguments for a call that may have used keywords."""
    if not kwargs:
        return tuple(args)
    try:
        bound = inspect.signature(fun).bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(f"{_name(fun)} can't be called like this: {error}") from None
    if bound.kwargs:
        raise TraceError(
            f"{_name(fun)} takes {sorted(bound.kwargs)} by keyword only; pass what is to be planned by position"
        )
    return bound.args


def signature_of(fun: Callable[..., Any], args: Sequence[Any], static_argnums: Sequence[int]) -> Signature:
    """The signature of a call. `TraceError` for a leaf that is no array or a static value that can't be hashed."""
    static = tuple((i, type(args[i]), args[i]) for i in static_argnums if i < len(args))  # 1, 1.0 and True are equal
    for i, _, value in static:
        _check_hashable(i, value)
    dynamic = tuple(a for i, a in enumerate(args) if i not in static_argnums)
    flat, tree = jax.tree.flatten(dynamic)
    if any(isinstance(x, Tracer) for x in flat):
        raise TraceError(
            f"{_name(fun)} is parallelized, so it can't be called inside jax.jit, jax.grad or another jax.* "
            "transformation; call it from plain Python, or parallelize the outer function instead"
        )
    try:
        return Signature(tree, tuple(abstract_leaf(x) for x in flat), static)
    except TraceError:
        positions = [i for i in range(len(args)) if i not in static_argnums]
        for path, value in tree_flatten_with_path(dynamic)[0]:
            _leaf(_argument_names(fun, len(args)), positions, path, value)  # names the argument
        raise


def _check_hashable(number: int, value: Any) -> None:
    try:
        hash(value)
    except TypeError:
        raise TraceError(
            f"static argument {number} is a {type(value).__name__}, which can't be hashed; "
            "pass it as a dynamic argument or as something hashable"
        ) from None


def abstract_leaf(leaf: Any) -> tuple[tuple[int, ...], str, bool]:
    """Shape, dtype and whether it is a Python scalar or weakly typed; `TraceError` for what is no array."""
    if isinstance(leaf, bool | numbers.Number) and not isinstance(leaf, np.generic):
        return (), type(leaf).__name__, True
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TraceError(f"a {type(leaf).__name__} is no array: {leaf!r}")
    return tuple(leaf.shape), str(leaf.dtype), bool(getattr(leaf, "weak_type", False))


def trace(
    fun: Callable[..., Any],
    args: Sequence[Any],
    *,
    donate_argnums: Literal["auto"] | Sequence[int] = "auto",
    batch_argnums: Sequence[int] = (1,),
    static_argnums: Sequence[int] = (),
    platform: str | None = None,
) -> Trace:
    """Trace `fun(*args)`; arguments may be arrays or `jax.ShapeDtypeStruct`s.

    platform: what it is lowered for ("cpu", "cuda", "tpu"); that of this process if None.
    Raises `TraceError` for arguments that are no arrays; what the function itself raises passes through.
    """
    names = _argument_names(fun, len(args))
    _check_argnums(_name(fun), len(args), donate_argnums, static_argnums)
    dynamic = [i for i in range(len(args)) if i not in static_argnums]
    given = tuple(args[i] for i in dynamic)
    flat, in_tree = tree_flatten_with_path(given)
    arguments = tuple(_leaf(names, dynamic, path, value) for path, value in flat)

    def call(*leaves: Any) -> Any:
        filled = list(args)
        for i, value in zip(dynamic, tree_unflatten(in_tree, leaves), strict=True):
            filled[i] = value
        return fun(*filled)

    call.__name__ = call.__qualname__ = _name(fun)
    traced = jax.jit(call).trace(*(_shape_only(value) for _, value in flat))
    _check_effects(_name(fun), traced.jaxpr)
    outputs, out_tree = tree_flatten_with_path(traced.out_info)
    results = tuple(Leaf(f"result{keystr(p)}", tuple(o.shape), str(o.dtype)) for p, o in outputs)
    avals = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in traced.jaxpr.in_avals)
    state = _StatePairs.find(in_tree, avals, traced.out_info, _positions(dynamic, batch_argnums))
    donated, stored = state.donation(donate_argnums, dynamic, names)
    starts = _starts(in_tree)
    batch = [k for i in _positions(dynamic, batch_argnums) for k in range(starts[i], starts[i + 1])]

    def again(*leaves: Any) -> Any:
        given = (a if _is_scalar(v) else b for (_, v), a, b in zip(flat, (v for _, v in flat), leaves, strict=True))
        return jax.jit(call).trace(*given).jaxpr

    return Trace(
        _name(fun),
        traced.jaxpr,
        in_tree,
        out_tree,
        arguments,
        results,
        avals,
        stored,
        donated,
        tuple(batch),
        again,
        platform,
    )


def _is_scalar(value: Any) -> bool:
    """Whether an argument is a Python scalar, which promotes differently from an array."""
    return not hasattr(value, "shape")


def _shape_only(value: Any) -> Any:
    """An argument without its placement, which the plan decides. Python scalars stay, as they promote differently."""
    if _is_scalar(value):
        return value
    return jax.ShapeDtypeStruct(value.shape, value.dtype, weak_type=bool(getattr(value, "weak_type", False)))


def _check_effects(name: str, jaxpr: Any) -> None:
    """Raise `TraceError` for effects that need an order."""
    if any("Ordered" in type(effect).__name__ for effect in jaxpr.effects):
        raise TraceError(
            f"{name} has an ordered callback, and JAX has no order between several devices; "
            "use ordered=False, or take the callback out of the step"
        )


def _check_argnums(name: str, count: int, donate: Literal["auto"] | Sequence[int], static: Sequence[int]) -> None:
    given = () if isinstance(donate, str) else tuple(donate)
    for option, given_numbers in (("donate_argnums", given), ("static_argnums", tuple(static))):
        beyond = [n for n in given_numbers if n >= count]
        if beyond:
            raise TraceError(f"{option} names argument {beyond[0]}, but {name} was called with {count} arguments")
    both = sorted(set(given) & set(static))
    if both:
        raise TraceError(f"argument {both[0]} of {name} is static and can't be donated; name it in one of the two")


def _name(fun: Callable[..., Any]) -> str:
    return getattr(fun, "__name__", type(fun).__name__)


def _argument_names(fun: Callable[..., Any], count: int) -> list[str]:
    try:
        parameters = list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [positional[i] if i < len(positional) else f"args[{i}]" for i in range(count)]


def _leaf(names: list[str], dynamic: list[int], path: tuple[Any, ...], value: Any) -> Leaf:
    where = names[dynamic[path[0].idx]] + keystr(path[1:])
    try:
        shape, dtype, _ = abstract_leaf(value)
    except TraceError as error:
        raise TraceError(
            f"argument {where} must be an array or a jax.ShapeDtypeStruct, but {error}; "
            "convert it, or name its argument in static_argnums"
        ) from None
    return Leaf(where, shape, dtype)


def _positions(dynamic: list[int], argnums: Sequence[int]) -> list[int]:
    return [dynamic.index(i) for i in argnums if i in dynamic]


def _starts(tree: PyTreeDef) -> list[int]:
    """The flat number of the first leaf of each top-level child, and the number of leaves at the end."""
    starts = [0]
    for child in tree.children():
        starts.append(starts[-1] + child.num_leaves)
    return starts


@dataclass(frozen=True, slots=True)
class _StatePairs:
    """Which dynamic arguments come back: argument position → first flat result."""

    found: dict[int, int]
    starts: list[int]

    @classmethod
    def find(cls, in_tree: PyTreeDef, avals: Sequence[Any], out: Any, batch: Sequence[int]) -> _StatePairs:
        starts, found, used = _starts(in_tree), dict[int, int](), set[int]()
        for position, child in enumerate(in_tree.children()):
            mine = avals[starts[position] : starts[position + 1]]
            scalar = len(mine) == 1 and not mine[0].shape and child == tree_structure(0)
            if position in batch or not mine or scalar:
                continue
            first = _subtree(child, mine, out, used)
            if first is not None:
                found[position] = first
                used.add(first)
        return cls(found, starts)

    def donation(
        self, donate: Literal["auto"] | Sequence[int], dynamic: list[int], names: list[str]
    ) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Donated argument positions, and flat (argument, result) pairs of all arguments that come back."""
        positions = sorted(self.found) if donate == "auto" else _positions(dynamic, donate)
        for p in positions:
            if p not in self.found:
                name = names[dynamic[p]]
                raise TraceError(
                    f"argument {name!r} is donated, but the step does not return it: expected a result with the same "
                    f"tree, shapes and dtypes as {name!r}; return the new {name}, or take it out of donate_argnums"
                )
        pairs = [
            (self.starts[p] + k, first + k)
            for p, first in sorted(self.found.items())
            for k in range(self.starts[p + 1] - self.starts[p])
        ]
        return tuple(positions), tuple(pairs)


def _subtree(tree: PyTreeDef, avals: Sequence[Any], out: Any, used: set[int]) -> int | None:
    """The flat number of the first leaf of the first part of `out` that has this tree, these shapes and dtypes."""

    def alike(part: Any) -> bool:
        if tree_structure(part) != tree:
            return False
        return all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(avals, tree_leaves(part), strict=True))

    position = 0
    for part in jax.tree.leaves(out, is_leaf=alike):
        if alike(part) and position not in used:
            return position
        position += len(tree_leaves(part))
    return None
