"""What each JAX primitive does with the batch dim: which dim of a result is the batch, or what was taken over it.

A value of a step that runs on one micro-batch is one of

    Same      equal for all micro-batches, and that of the whole batch; `zero` if it is filled with zeros
    Split     holds this micro-batch's part of a dim
    Reduced   this micro-batch's share of a sum (or maximum, …) over the batch: the shares are combined
    Own       a number of this micro-batch alone, without a batch dim: its own statistics
    After     computed from combined shares, so known only when all micro-batches have run

`rule(eqn, statuses, full)` gives the statuses of an equation's results for those of its operands, or a `Mixed` that
says why the result of one micro-batch would depend on the others. `full` are the shapes with the whole batch, so a
dim is the batch where an equation's shape differs from that.

A primitive without a rule is `Mixed` as soon as it reads the batch. A rule may rely on this: parameters are those of
the whole batch except for sizes of batch dims (`flat.Resizer`), every `Split` operand has one batch dim, and all of
them hold the examples in one order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from typing import Literal as Choice

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from alpa_like.passes.avals import dtype_of, shape_of
from alpa_like.passes.flat import inner_jaxprs, scan_counts, split_dims

__all__ = [
    "BODIES", "REMAT", "After", "Mixed", "Own", "Reduced", "Same", "Split", "Status",
    "entered", "is_drawn", "is_ordered", "own_row", "rule", "split_dims", "touches",
]  # fmt: skip

Fact = Choice["place", "never"] | frozenset[int] | None
"""What is known of a `Split`: each element is its place in the batch; all are zero or False; or which columns of the
last dim are places."""


@dataclass(frozen=True, slots=True)
class Same:
    zero: bool = False


@dataclass(frozen=True, slots=True)
class Split:
    """The whole dim is `outer` blocks one after the other, and a part takes the same share of each block.

    `outer` is 1 where the parts, one after the other, make the whole, and 3 for a (3, batch) array that was reshaped
    to one dim. It is None where all elements along the dim are equal, which fits every order.
    """

    dim: int
    outer: int | None = 1
    fact: Fact = None


@dataclass(frozen=True, slots=True)
class Reduced:
    op: str


@dataclass(frozen=True, slots=True)
class After:
    pass


@dataclass(frozen=True, slots=True)
class Own:
    pass


@dataclass(frozen=True, slots=True)
class Mixed:
    """No status: the examples of the batch are mixed."""

    reason: str


Status = Same | Split | Reduced | Own | After
Full = Mapping[Any, tuple[int, ...]]
Found = Sequence[Status] | Mixed

_ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e",
    "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex", "conj", "convert_element_type", "copy", "copy_p",
    "cos", "cosh", "digamma", "div", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge",
    "gt", "igamma", "igamma_grad_a", "igammac", "imag", "integer_pow", "is_finite", "le", "le_to", "lgamma", "log",
    "log1p", "log2", "logistic", "lt", "lt_to", "max", "min", "mul", "mulhi", "name", "ne", "neg", "nextafter",
    "not", "one_minus_square", "or", "polygamma", "population_count", "pow", "random_clone", "random_fold_in",
    "random_seed", "real", "reduce_precision", "regularized_incomplete_beta", "rem", "round", "rsqrt", "select_n",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor", "zeta",
))  # fmt: skip
_REDUCTIONS = {
    "reduce_sum": "add",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_and": "and",
    "reduce_or": "or",
}
_MOVES = ("transpose", "reshape", "squeeze", "expand_dims", "copy", "copy_p", "name")
_UNIFORM = ("broadcast_in_dim", "iota")
"""What makes a batch dim along which nothing changes (an iota does if it counts along another dim)."""
_CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
_MATRIX = (
    "cholesky", "eig", "eigh", "geqrf", "hessenberg", "householder_product", "lu", "qr", "schur", "svd",
    "symmetric_product", "triangular_solve", "tridiagonal",
)  # fmt: skip
_KEYS = ("random_bits", "random_split", "random_wrap", "random_unwrap")
_SCATTER_SUMS = ("scatter-add", "scatter_add", "scatter-sub", "scatter_sub")
REMAT = ("remat2", "remat", "checkpoint")


def rule(eqn: JaxprEqn, statuses: Sequence[Status], full: Full, *, inside: bool = False) -> Found:
    """The statuses of the results of an equation; `inside` of a body nothing can wait for the other shares."""
    if eqn.primitive.name == "optimization_barrier":
        return list(statuses)
    if eqn.primitive.name in BODIES:
        return _with_bodies(eqn, statuses, full)
    own = any(isinstance(s, Own) for s in statuses)
    shared = [Same() if isinstance(s, Own) else s for s in statuses] if own else list(statuses)
    if any(isinstance(s, After | Reduced) for s in shared):
        found = _combined(eqn, shared, full, inside)
    elif any(isinstance(s, Split) for s in shared):
        found = _split(eqn, shared, full)
    elif own and is_drawn(eqn, shared, full):
        return Mixed(f"{eqn.primitive.name} makes something for every example from the micro-batch's own numbers")
    else:
        found = _all_same(eqn, shared, full)
    return found if isinstance(found, Mixed) or not own else [Own() if isinstance(s, Same) else s for s in found]


def is_drawn(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> bool:
    """Whether an equation is to be run for the whole batch, and its results cut.

    It reads nothing of the batch and yet depends on its size: random bits, positions, keys by example.
    """
    if not all(isinstance(s, Same) for s in statuses) or not touches(eqn, full):
        return False
    if eqn.primitive.name in BODIES:
        return isinstance(_through_bodies(eqn, statuses, full), Mixed)
    return not _is_uniform(eqn, full)


def is_ordered(status: Status) -> bool:
    """Whether the parts of all micro-batches, one after the other, are the whole."""
    return not isinstance(status, Split) or status.outer in (1, None)


def _all_same(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    zero = eqn.primitive.name in ("broadcast_in_dim", "convert_element_type", "neg", *_MOVES)
    zero = zero and all(_zero(v, s) for v, s in zip(eqn.invars, statuses, strict=True))
    found: list[Status] = []
    for out in eqn.outvars:
        born = split_dims(out, full)
        if len(born) > 1:
            return Mixed("a result has the batch in two dims")
        found.append(_born(eqn, born[0], full, zero) if born else Same(zero))
    return found


def _born(eqn: JaxprEqn, dim: int, full: Full, zero: bool) -> Split:
    if _is_uniform(eqn, full):
        return Split(dim, None, "never" if zero else None)
    return Split(dim, 1, "place" if eqn.primitive.name == "iota" else None)


def _is_uniform(eqn: JaxprEqn, full: Full) -> bool:
    return eqn.primitive.name in _UNIFORM and eqn.params.get("dimension") not in split_dims(eqn.outvars[0], full)


def touches(eqn: JaxprEqn, full: Full) -> bool:
    """Whether the batch is a dim of anything in an equation."""
    if any(split_dims(v, full) for v in (*eqn.invars, *eqn.outvars)):
        return True
    if eqn.primitive.name not in BODIES:
        return False
    return any(touches(inner, full) for body in inner_jaxprs(eqn) for inner in body.jaxpr.eqns)


def _zero(atom: Any, status: Status) -> bool:
    if isinstance(atom, Literal):
        return shape_of(atom) == () and bool(atom.val == 0)
    return isinstance(status, Same) and status.zero


# --------------------------------------------------------------------------------------------- shares and totals


def _combined(eqn: JaxprEqn, statuses: Sequence[Status], full: Full, inside: bool) -> Found:
    """Linear equations hand a sum of shares on as one; others wait until all shares are there."""
    if any(isinstance(s, Split) for s in statuses):
        return Mixed("a sum (or another result) of the whole batch meets the examples")
    if any(split_dims(v, full) for v in eqn.outvars):
        return Mixed("a sum (or another result) of the whole batch is repeated for every example")
    ops = {s.op for s in statuses if isinstance(s, Reduced)}
    if len(ops) == 1 and not any(isinstance(s, After) for s in statuses):
        op = ops.pop()
        linear = eqn.primitive.name in _MOVES or (op == "add" and _hands_on(eqn, statuses))
        if linear or (op == "add" and inside and _could_hand_on(eqn, statuses)):
            return [Reduced(op)] * len(eqn.outvars)
    return [After()] * len(eqn.outvars)


def _hands_on(eqn: JaxprEqn, statuses: Sequence[Status]) -> bool:
    """Whether f(Σ share) = Σ f(share)."""
    name = eqn.primitive.name
    shares = [isinstance(s, Reduced) for s in statuses]
    rest = [_zero(v, s) for v, s, share in zip(eqn.invars, statuses, shares, strict=True) if not share]
    if name == "convert_element_type":
        return _widens(dtype_of(eqn.invars[0]), dtype_of(eqn.outvars[0]))
    if name in ("add", "add_any", "sub", "concatenate"):
        return all(rest)
    if name in ("neg", "reduce_sum", "slice"):
        return all(shares)
    if name == "mul":
        return sum(shares) == 1
    # whole numbers are rounded when they are divided
    return name == "div" and shares == [True, False] and jnp.issubdtype(dtype_of(eqn.outvars[0]), jnp.inexact)


def _could_hand_on(eqn: JaxprEqn, statuses: Sequence[Status]) -> bool:
    """The same for equations that had better run once, on the whole sum, but in a loop must run now."""
    shares = [isinstance(s, Reduced) for s in statuses]
    linear = [a or _zero(v, s) for a, v, s in zip(shares, eqn.invars, statuses, strict=True)]
    match eqn.primitive.name:
        case "broadcast_in_dim" | "rev" | "pad":
            return all(linear)
        case "dot_general":
            return sum(shares) == 1
        case "dynamic_slice":
            return sum(shares) == 1 == shares[0]
        case "dynamic_update_slice":
            return all(linear[:2]) and not any(shares[2:])
        case "select_n":
            return not shares[0] and all(linear[1:])
        case name if name in _SCATTER_SUMS:
            return linear[0] and not shares[1] and linear[2]
        case _:
            return False


def _widens(source: Any, target: Any) -> bool:
    """Whether a conversion loses nothing, so that the sum may be taken after it. Whole numbers may wrap around."""
    if source == target:
        return True
    floats = all(jnp.issubdtype(t, jnp.floating) for t in (source, target))
    return floats and target.itemsize > source.itemsize


# ------------------------------------------------------------------------------------------------- the batch itself


def _split(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    name = eqn.primitive.name
    for number, operand in enumerate(eqn.invars):
        if len(split_dims(operand, full)) > 1:
            return Mixed(f"operand {number} has the batch in two dims")
    orders = {s.outer for s in statuses if isinstance(s, Split)} - {None}
    if len(orders) > 1:
        return Mixed("its operands have the examples in different orders")
    if name in _ELEMENTWISE:
        return _elementwise(eqn, statuses, full)
    handler = _RULES.get(name)
    if handler is None:
        return Mixed(f"the primitive {name} is not known to keep the examples apart")
    return handler(eqn, statuses, full)


def _elementwise(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    dims = {s.dim for s in statuses if isinstance(s, Split)}
    found = _kept(eqn, statuses, full)
    if isinstance(found, Mixed):
        return found
    if len(dims) != 1 or any(s.dim not in dims for s in found if isinstance(s, Split)):
        return Mixed("its operands have the batch in different dims")
    return [replace(s, fact=_fact(eqn, statuses)) if isinstance(s, Split) else s for s in found]


def _fact(eqn: JaxprEqn, statuses: Sequence[Status]) -> Fact:
    """Places survive copies, and what `jax.numpy` does to count negative indices from the end."""
    facts: list[Fact] = [_fact_of(s) for s in statuses]
    match eqn.primitive.name:
        case "convert_element_type":
            dtype = dtype_of(eqn.outvars[0])
            return facts[0] if jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize >= 4 else None
        case "copy" | "copy_p" | "name" | "stop_gradient":
            return facts[0]
        case "lt":
            return "never" if facts[0] == "place" and _zero(eqn.invars[1], statuses[1]) else None
        case "select_n":
            return facts[1] if facts[0] == "never" else None
        case _:
            return None


def _kept(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    """Every result keeps the batch in one dim."""
    orders = [s.outer for s in statuses if isinstance(s, Split) and s.outer is not None]
    found: list[Status] = []
    for out in eqn.outvars:
        dims = split_dims(out, full)
        if len(dims) != 1:
            return Mixed(f"a result has the batch in {len(dims)} dims")
        found.append(Split(dims[0], orders[0] if orders else None))
    return found


def _the_dim(status: Status) -> int:
    return status.dim if isinstance(status, Split) else -1


def _fact_of(status: Status) -> Fact:
    return status.fact if isinstance(status, Split) else None


def _outside(*names: str) -> Callable[..., Found]:
    """The dims that a parameter names must not be the batch."""

    def check(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
        for name in names:
            value = eqn.params[name]
            dims = tuple(value) if isinstance(value, tuple | list) else (value,)
            if any(_the_dim(s) in dims for s in statuses):
                return Mixed(f"{eqn.primitive.name} works along the batch")
        return _kept(eqn, statuses, full)

    return check


def _trailing(count: Callable[[JaxprEqn], int]) -> Callable[..., Found]:
    """The last dims of every operand must not be the batch."""

    def check(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
        for operand, status in zip(eqn.invars, statuses, strict=True):
            if isinstance(status, Split) and status.dim >= len(shape_of(operand)) - count(eqn):
                return Mixed(f"{eqn.primitive.name} works along the batch")
        return _kept(eqn, statuses, full)

    return check


def _reduction(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    if _the_dim(statuses[0]) not in eqn.params["axes"]:
        return _kept(eqn, statuses, full)
    op = _REDUCTIONS.get(eqn.primitive.name)
    bitwise = op in ("and", "or") and dtype_of(eqn.invars[0]) != jnp.bool_
    if op is None or bitwise:
        return Mixed(f"{eqn.primitive.name} over the batch can't be combined from its parts")
    return [Reduced(op)]


def _reshape(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    """Elements before a part, its length and the elements behind it stay; the dim around them may change."""
    found = _kept(eqn, statuses, full)
    status = statuses[0]
    if isinstance(found, Mixed) or not isinstance(status, Split) or not isinstance(found[0], Split):
        return found
    source, target = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    before, dim = math.prod(source[: status.dim]) * (status.outer or 1), found[0].dim
    outer, rest = divmod(before, math.prod(target[:dim]))
    moved = eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None
    if moved or rest or target[dim] % outer:
        return Mixed("the batch is taken apart")
    if source[status.dim] == target[dim] and outer == (status.outer or 1):
        return [Split(dim, status.outer, status.fact if status.fact == "place" else None)]
    return [Split(dim, outer)]


def _transpose(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    fact = _fact_of(statuses[0])
    found = _kept(eqn, statuses, full)
    return found if isinstance(found, Mixed) else [_with_fact(s, fact if fact == "place" else None) for s in found]


def _with_fact(status: Status, fact: Fact) -> Status:
    return replace(status, fact=fact) if isinstance(status, Split) else status


def _dot(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    contracting, batch = eqn.params["dimension_numbers"]
    summed, kept = (_positions(dims, statuses) for dims in (contracting, batch))
    if max(summed) >= 0:
        whole = summed[0] == summed[1] and not split_dims(eqn.outvars[0], full)
        return [Reduced("add")] if whole else Mixed("only one operand has the batch where it is summed")
    if kept[0] != kept[1]:
        return Mixed("only one operand has the batch")
    if kept[0] < 0 and all(isinstance(s, Split) for s in statuses):
        return Mixed("every example meets every other")
    return _kept(eqn, statuses, full)


def _positions(dims: Sequence[Sequence[int]], statuses: Sequence[Status]) -> list[int]:
    """For each operand, where its batch dim stands in its list of dims; -1 if it does not."""
    return [tuple(d).index(_the_dim(s)) if _the_dim(s) in d else -1 for d, s in zip(dims, statuses, strict=True)]


def _convolution(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    numbers = eqn.params["dimension_numbers"]
    image, kernel = (_the_dim(s) for s in statuses)
    features, groups = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
    if image == numbers.lhs_spec[0] and kernel < 0 and groups == 1:
        return _kept(eqn, statuses, full)
    # The gradient of the kernel: examples are what is summed. Its groups are channels, which stand where a
    # convolution has its images.
    if image == numbers.lhs_spec[1] and kernel == numbers.rhs_spec[1] and features == 1:
        return [Reduced("add")]
    if image < 0 and kernel == numbers.rhs_spec[0] and features == groups == 1:
        return _kept(eqn, statuses, full)
    return Mixed("the convolution mixes the examples")


def _broadcast(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    status, found = statuses[0], _kept(eqn, statuses[:1], full)
    if isinstance(found, Mixed) or not isinstance(status, Split) or not isinstance(found[0], Split):
        return found
    dims = eqn.params["broadcast_dimensions"]
    if found[0].dim != dims[status.dim]:
        return Mixed("the batch is repeated")
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    columns = dims[-1] == len(after) - 1 and before[-1] == after[-1]
    return [replace(found[0], fact=status.fact if columns or status.fact in ("place", "never") else None)]


def _slice(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    """slice, dynamic_slice, dynamic_update_slice, pad: the batch is taken whole."""
    dim = _the_dim(statuses[0])
    if dim < 0 or not _takes_whole(eqn, statuses, dim, shape_of(eqn.invars[0])[dim]):
        return Mixed("it takes or fills a part of the batch")
    return _kept(eqn, statuses, full)


def _takes_whole(eqn: JaxprEqn, statuses: Sequence[Status], dim: int, size: int) -> bool:
    match eqn.primitive.name:
        case "slice":
            strides = eqn.params["strides"]
            return shape_of(eqn.outvars[0])[dim] == size and (strides is None or strides[dim] == 1)
        case "dynamic_slice":
            return eqn.params["slice_sizes"][dim] == size
        case "pad":
            return tuple(eqn.params["padding_config"][dim]) == (0, 0, 0)
        case _:
            return dim == _the_dim(statuses[1]) and shape_of(eqn.invars[1])[dim] == size


def _concatenate(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    dim = eqn.params["dimension"]
    if any(_the_dim(s) == dim for s in statuses):
        return Mixed("examples are joined along the batch")
    found = _elementwise(eqn, statuses, full)
    last = dim == len(shape_of(eqn.outvars[0])) - 1
    return found if isinstance(found, Mixed) or not last else [_with_fact(s, _columns(eqn, statuses)) for s in found]


def _columns(eqn: JaxprEqn, statuses: Sequence[Status]) -> frozenset[int]:
    """Which columns of arrays put side by side are places."""
    found: set[int] = set()
    start = 0
    for operand, status in zip(eqn.invars, statuses, strict=True):
        width = shape_of(operand)[-1]
        found.update(start + c for c in range(width) if _is_place(status, c))
        start += width
    return frozenset(found)


def _is_place(status: Status, column: int) -> bool:
    fact = _fact_of(status)
    return fact == "place" or (isinstance(fact, frozenset) and column in fact)


def _tile(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    repeated = eqn.params["reps"]
    if len(repeated) != len(shape_of(eqn.invars[0])) or repeated[_the_dim(statuses[0])] != 1:
        return Mixed("the batch is repeated")
    return _kept(eqn, statuses, full)


def _stack(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    return _kept(eqn, statuses, full) if len({_the_dim(s) for s in statuses}) == 1 else Mixed("it joins different dims")


def _by_key(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    """Draws whose number is counted inside: apart only if every example has a key of its own."""
    if len({_the_dim(s) for s in statuses}) > 1:
        return Mixed(f"{eqn.primitive.name} draws for all examples from one key")
    return _kept(eqn, statuses, full)


def _bitcast(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    """A dim may come or go at the end."""
    found = _kept(eqn, statuses, full)
    if isinstance(found, Mixed) or _the_dim(found[0]) != _the_dim(statuses[0]):
        return Mixed("the batch is taken apart")
    return found


def _window(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    dims = {s.dim for s in statuses if isinstance(s, Split)}
    dim = dims.pop()
    ones = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    moves = any(eqn.params[name][dim] != 1 for name in ones if eqn.params.get(name))
    if dims or moves or tuple(eqn.params["padding"][dim]) != (0, 0):
        return Mixed("a window moves over the batch")
    return _kept(eqn, statuses, full)


# ------------------------------------------------------------------------------------------------ gather and scatter


def own_row(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> int | None:
    """The column of the indices of a gather or scatter by which every example finds its own row of a batch.

    Such as `x[jnp.arange(batch), labels]`. Where a micro-batch has only its part of the rows, that column counts from
    its first row on.
    """
    name = eqn.primitive.name
    if not (name == "gather" or name.startswith("scatter")) or not isinstance(statuses[0], Split):
        return None
    operand = statuses[0]
    numbers, indices = eqn.params["dimension_numbers"], statuses[1]
    order = numbers.start_index_map if name == "gather" else numbers.scatter_dims_to_operand_dims
    single = (
        eqn.params["slice_sizes"][operand.dim] == 1 if name == "gather" else operand.dim in numbers.inserted_window_dims
    )
    if operand.dim not in order or not single or not isinstance(indices, Split):
        return None
    column = tuple(order).index(operand.dim)
    sizes = full.get(eqn.invars[0], ()), full.get(eqn.invars[1], ())
    counted = sizes[0][operand.dim] == sizes[1][indices.dim] and is_ordered(operand) and is_ordered(indices)
    return column if counted and _is_place(indices, column) else None


def _gather(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table, indices = (_the_dim(s) for s in statuses[:2])
    if table < 0 or own_row(eqn, statuses, full) is not None:
        return _kept(eqn, statuses, full)
    if table in numbers.operand_batching_dims:
        place = tuple(numbers.operand_batching_dims).index(table)
        apart = indices == numbers.start_indices_batching_dims[place]
    else:
        whole = sizes[table] == shape_of(eqn.invars[0])[table]
        apart = whole and indices < 0 and table not in numbers.collapsed_slice_dims
    return _kept(eqn, statuses, full) if apart else Mixed("examples are looked up by their place in the batch")


def _scatter(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    numbers = eqn.params["dimension_numbers"]
    operand, indices, updates = (_the_dim(s) for s in statuses[:3])
    aligned = min(indices, updates) >= 0 and updates == _update_dim(eqn, indices)
    if operand < 0:
        return _scattered_sum(eqn, statuses) if aligned else Mixed("the batch is written by place")
    if own_row(eqn, statuses, full) is not None:
        apart = aligned
    elif operand in numbers.operand_batching_dims:
        place = tuple(numbers.operand_batching_dims).index(operand)
        apart = aligned and indices == numbers.scatter_indices_batching_dims[place]
    else:
        apart = indices < 0 and _fills(eqn, operand, updates)
    return _kept(eqn, statuses, full) if apart else Mixed("examples are written by their place in the batch")


def _scattered_sum(eqn: JaxprEqn, statuses: Sequence[Status]) -> Found:
    if eqn.primitive.name in _SCATTER_SUMS and _zero(eqn.invars[0], statuses[0]):
        return [Reduced("add")]
    return Mixed("examples are written into something that holds no zeros")


def _update_dim(eqn: JaxprEqn, indices: int) -> int:
    """The dim of the updates that belongs to a dim of the indices, whose last one holds coordinates."""
    window = eqn.params["dimension_numbers"].update_window_dims
    dims = [d for d in range(len(shape_of(eqn.invars[2]))) if d not in window]
    return dims[indices] if indices < len(dims) else -1


def _fills(eqn: JaxprEqn, operand: int, updates: int) -> bool:
    """Whether windows of updates take a dim of the operand whole."""
    numbers, shape = eqn.params["dimension_numbers"], shape_of(eqn.invars[0])
    outside = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = [d for d in range(len(shape)) if d not in outside]
    if operand not in window or updates < 0 or numbers.update_window_dims[window.index(operand)] != updates:
        return False
    return shape_of(eqn.invars[2])[updates] == shape[operand]


_RULES: dict[str, Callable[..., Found]] = {
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(("reduce_prod", "reduce_xor", "argmax", "argmin"), _reduction),
    "broadcast_in_dim": _broadcast,
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "transpose": _transpose,
    "bitcast_convert_type": _bitcast,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _outside("axis"),
    "tile": _tile,
    **dict.fromkeys(("slice", "dynamic_slice", "dynamic_update_slice", "pad"), _slice),
    "gather": _gather,
    **dict.fromkeys(("scatter", "scatter-mul", "scatter-min", "scatter-max", *_SCATTER_SUMS), _scatter),
    "rev": _outside("dimensions"),
    "sort": _outside("dimension"),
    "split": _outside("axis"),
    "top_k": _outside("axis"),
    "fft": _trailing(lambda eqn: len(eqn.params["fft_lengths"])),
    **dict.fromkeys(_CUMULATIVE, _outside("axis")),
    **dict.fromkeys(_MATRIX, _trailing(lambda _: 2)),
    "lu_pivots_to_permutation": _trailing(lambda _: 1),
    **dict.fromkeys(_KEYS, _kept),
    "random_gamma": _by_key,
    **dict.fromkeys(
        ("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum", "select_and_gather_add",
         "select_and_scatter_add"),
        _window,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------- loops and conditions


def entered(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[list[Status]] | Mixed:
    """The statuses with which the bodies of an equation begin in any turn, in the order of `inner_jaxprs`."""
    return BODIES[eqn.primitive.name](eqn, statuses, full)


def _with_bodies(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    found = _through_bodies(eqn, statuses, full)
    if not isinstance(found, Mixed):
        return found
    if any(isinstance(s, Split | Own) for s in statuses):
        return found
    if all(isinstance(s, Same) for s in statuses):
        return _all_same(eqn, statuses, full)
    return found if touches(eqn, full) else [After() for _ in eqn.outvars]


def _through_bodies(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    entries = entered(eqn, statuses, full)
    if isinstance(entries, Mixed):
        return entries
    outs: list[list[Status]] = []
    for body, entry in zip(inner_jaxprs(eqn), entries, strict=True):
        found = _results(body.jaxpr, entry, full)
        if isinstance(found, Mixed):
            return found
        outs.append(list(found))
    return _ENDS[eqn.primitive.name](eqn, entries, outs)


def _results(body: Jaxpr, entry: Sequence[Status], full: Full) -> Found:
    """The statuses of a body's results."""
    env: dict[Any, Status] = dict(zip(body.invars, entry, strict=True))
    env.update((v, Same()) for v in body.constvars)
    for eqn in body.eqns:
        found = rule(eqn, [_status(env, v) for v in eqn.invars], full, inside=True)
        if isinstance(found, Mixed):
            return found
        if any(isinstance(s, After) for s in found):
            return Mixed(f"inside a loop or condition {eqn.primitive.name} needs a sum over the whole batch")
        env.update(zip(eqn.outvars, found, strict=True))
    return [_status(env, v) for v in body.outvars]


def _status(env: Mapping[Any, Status], atom: Any) -> Status:
    return env[atom] if isinstance(atom, Var) else Same(_zero(atom, Same()))


def _join(left: Sequence[Status], right: Sequence[Status]) -> Found:
    """What holds for values that may be one or the other."""
    joined = [_either(a, b) or _either(b, a) for a, b in zip(left, right, strict=True)]
    return Mixed("values that may take each other's place are of different kinds") if None in joined else joined  # pyright: ignore[reportReturnType]


def _either(left: Status, right: Status) -> Status | None:
    match left, right:
        case Same(), Same():
            return Same(left.zero and right.zero)
        case Same(zero=True), Reduced(op="add"):
            return right
        case Split(), Split() if left.dim == right.dim and (left.outer == right.outer or left.outer is None):
            return replace(right, fact=left.fact if left.fact == right.fact else None)
        case _:
            return left if left == right else None


def _fixed(turn: Callable[[list[Status]], Found], carry: list[Status]) -> Found:
    """The statuses of what a loop carries that one more turn does not change."""
    while True:
        found = turn(carry)
        joined = found if isinstance(found, Mixed) else _join(carry, found)
        if isinstance(joined, Mixed) or list(joined) == carry:
            return joined
        carry = list(joined)


def _enter_scan(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[list[Status]] | Mixed:
    consts, carries = scan_counts(eqn)
    rows = statuses[consts + carries :]
    if any(_the_dim(s) == 0 for s in rows):
        return Mixed("the loop runs over the examples")
    xs = [replace(s, dim=s.dim - 1) if isinstance(s, Split) else s for s in rows]
    fixed = list(statuses[:consts])

    def turn(carry: list[Status]) -> Found:
        found = _results(eqn.params["jaxpr"].jaxpr, [*fixed, *carry, *xs], full)
        return found if isinstance(found, Mixed) else found[:carries]

    carry = _fixed(turn, list(statuses[consts : consts + carries]))
    return carry if isinstance(carry, Mixed) else [[*fixed, *carry, *xs]]


def _leave_scan(eqn: JaxprEqn, entries: list[list[Status]], outs: list[list[Status]]) -> Found:
    consts, carries = scan_counts(eqn)
    ys = [replace(s, dim=s.dim + 1) if isinstance(s, Split) else s for s in outs[0][carries:]]
    return [*entries[0][consts : consts + carries], *ys]


def _enter_while(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[list[Status]] | Mixed:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    fixed = list(statuses[first : first + second])
    begin = list(statuses[first + second :])
    carry = _fixed(lambda carry: _results(eqn.params["body_jaxpr"].jaxpr, [*fixed, *carry], full), begin)
    if isinstance(carry, Mixed):
        return carry
    condition = [*statuses[:first], *carry]
    again = _results(eqn.params["cond_jaxpr"].jaxpr, condition, full)
    if isinstance(again, Mixed) or not all(isinstance(s, Same) for s in again):
        return Mixed("how long a loop runs depends on the examples")
    return [condition, [*fixed, *carry]]


def _leave_while(eqn: JaxprEqn, entries: list[list[Status]], outs: list[list[Status]]) -> Found:
    return entries[1][eqn.params["body_nconsts"] :]


def _enter_cond(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[list[Status]] | Mixed:
    if not isinstance(statuses[0], Same):
        return Mixed("a condition depends on the examples")
    return [list(statuses[1:]) for _ in eqn.params["branches"]]


def _leave_cond(eqn: JaxprEqn, entries: list[list[Status]], outs: list[list[Status]]) -> Found:
    joined: Found = outs[0]
    for other in outs[1:]:
        joined = joined if isinstance(joined, Mixed) else _join(joined, other)
    return joined


def _enter_once(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[list[Status]] | Mixed:
    return [list(statuses)]


def _leave_once(eqn: JaxprEqn, entries: list[list[Status]], outs: list[list[Status]]) -> Found:
    return outs[0]


BODIES: dict[str, Callable[..., list[list[Status]] | Mixed]] = {
    "scan": _enter_scan,
    "while": _enter_while,
    "cond": _enter_cond,
    **dict.fromkeys(REMAT, _enter_once),
}
"""The primitives that run bodies, after all calls have been stepped into."""

_ENDS: dict[str, Callable[..., Found]] = {
    "scan": _leave_scan,
    "while": _leave_while,
    "cond": _leave_cond,
    **dict.fromkeys(REMAT, _leave_once),
}
