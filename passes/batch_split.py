"""What each JAX primitive makes of operands that hold a part of the batch: which dim of a result is the batch.

A primitive without a rule is `Mixed` as soon as it reads the batch. A rule may rely on this: parameters are those of
the whole batch except for sizes of batch dims (`flat.Resizer`), every `Split` operand has one batch dim, and all of
them hold the examples in one order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from alpa_like.passes.avals import dtype_of, shape_of
from alpa_like.passes.batch_status import (
    Fact,
    Found,
    Full,
    Mixed,
    Reduced,
    Split,
    Status,
    batch_dim,
    is_ordered,
    is_zero,
)
from alpa_like.passes.flat import split_dims

__all__ = ["SCATTER_SUMS", "own_row", "split"]

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
_CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
_MATRIX = (
    "cholesky", "eig", "eigh", "geqrf", "hessenberg", "householder_product", "lu", "qr", "schur", "svd",
    "symmetric_product", "triangular_solve", "tridiagonal",
)  # fmt: skip
_KEYS = ("random_bits", "random_split", "random_wrap", "random_unwrap")
SCATTER_SUMS = ("scatter-add", "scatter_add", "scatter-sub", "scatter_sub")


def split(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
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
            return "never" if facts[0] == "place" and is_zero(eqn.invars[1], statuses[1]) else None
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


def _fact_of(status: Status) -> Fact:
    return status.fact if isinstance(status, Split) else None


def _outside(*names: str) -> Callable[..., Found]:
    """The dims that a parameter names must not be the batch."""

    def check(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
        for name in names:
            value = eqn.params[name]
            dims = tuple(value) if isinstance(value, tuple | list) else (value,)
            if any(batch_dim(s) in dims for s in statuses):
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
    if batch_dim(statuses[0]) not in eqn.params["axes"]:
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
    return [tuple(d).index(batch_dim(s)) if batch_dim(s) in d else -1 for d, s in zip(dims, statuses, strict=True)]


def _convolution(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    numbers = eqn.params["dimension_numbers"]
    image, kernel = (batch_dim(s) for s in statuses)
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
    dim = batch_dim(statuses[0])
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
            return dim == batch_dim(statuses[1]) and shape_of(eqn.invars[1])[dim] == size


def _concatenate(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    dim = eqn.params["dimension"]
    if any(batch_dim(s) == dim for s in statuses):
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
    if len(repeated) != len(shape_of(eqn.invars[0])) or repeated[batch_dim(statuses[0])] != 1:
        return Mixed("the batch is repeated")
    return _kept(eqn, statuses, full)


def _stack(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    return (
        _kept(eqn, statuses, full) if len({batch_dim(s) for s in statuses}) == 1 else Mixed("it joins different dims")
    )


def _by_key(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    """Draws whose number is counted inside: apart only if every example has a key of its own."""
    if len({batch_dim(s) for s in statuses}) > 1:
        return Mixed(f"{eqn.primitive.name} draws for all examples from one key")
    return _kept(eqn, statuses, full)


def _bitcast(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    """A dim may come or go at the end."""
    found = _kept(eqn, statuses, full)
    if isinstance(found, Mixed) or batch_dim(found[0]) != batch_dim(statuses[0]):
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
    table, indices = (batch_dim(s) for s in statuses[:2])
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
    operand, indices, updates = (batch_dim(s) for s in statuses[:3])
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
    if eqn.primitive.name in SCATTER_SUMS and is_zero(eqn.invars[0], statuses[0]):
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
    **dict.fromkeys(("scatter", "scatter-mul", "scatter-min", "scatter-max", *SCATTER_SUMS), _scatter),
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
