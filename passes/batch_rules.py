"""What each JAX primitive does with the batch dim: which dim of a result is the batch, or what was taken over it.

A value of a step that runs on one micro-batch is one of

    Same      equal for all micro-batches; `zero` if it is filled with zeros
    Split     holds this micro-batch's part of a dim; `pure` if the parts, one after the other, make the whole
    Reduced   this micro-batch's share of a sum (or maximum, …) over the batch: the shares are combined
    Own       a number of this micro-batch alone, without a batch dim: its own statistics
    After     computed from combined shares, so known only when all micro-batches have run

`rule(eqn, statuses, full)` gives the statuses of an equation's results for those of its operands, or a `Mixed` that
says why the result of one micro-batch would depend on the others. `full` are the shapes with the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import JaxprEqn, Literal, Var

__all__ = ["After", "Mixed", "Own", "Reduced", "Same", "Split", "Status", "rule", "split_dims"]


@dataclass(frozen=True, slots=True)
class Same:
    zero: bool = False


@dataclass(frozen=True, slots=True)
class Split:
    dim: int
    pure: bool = True


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

_ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp complex conj "
    "convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma "
    "igamma_grad_a igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne neg "
    "nextafter not optimization_barrier or polygamma population_count clz pow real reduce_precision rem round rsqrt "
    "select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh "
    "xor zeta bitcast_convert_type eq_to le_to lt_to regularized_incomplete_beta random_gamma random_wrap random_unwrap "
    "random_fold_in erf_inv reduce_and_precision nan_to_num".split()
)
_REDUCTIONS = {
    "reduce_sum": "add",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_and": "and",
    "reduce_or": "or",
}
_LINEAR = ("convert_element_type", "neg", "transpose", "reshape", "squeeze", "expand_dims", "copy", "copy_p", "name")
_CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
_MATRIX = ("cholesky", "eigh", "lu", "qr", "svd", "triangular_solve", "geqrf", "householder_product", "tridiagonal")


def rule(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
    """The statuses of the results; loops and other equations with bodies are not handled here."""
    if any(isinstance(s, Own) for s in statuses):
        found = rule(eqn, [Same() if isinstance(s, Own) else s for s in statuses], full)
        return found if isinstance(found, Mixed) else [Own() if isinstance(s, Same) else s for s in found]
    if any(isinstance(s, After) for s in statuses):
        if any(isinstance(s, Split) for s in statuses):
            return Mixed("a result of the whole batch meets the examples")
        return [After()] * len(eqn.outvars)
    if any(isinstance(s, Reduced) for s in statuses):
        return _reduced(eqn, statuses)
    if any(isinstance(s, Split) for s in statuses):
        return _split(eqn, statuses, full)
    return [_same(eqn, statuses, out, full) for out in eqn.outvars]


def split_dims(var: Any, full: Full) -> list[int]:
    """The dims that are shorter with a micro-batch than with the whole batch."""
    if isinstance(var, Literal):
        return []
    here = getattr(var.aval, "shape", ())
    return [d for d, (a, b) in enumerate(zip(here, full.get(var, here), strict=True)) if a != b]


def _same(eqn: JaxprEqn, statuses: Sequence[Status], out: Var, full: Full) -> Status:
    born = split_dims(out, full)
    if born:
        return Split(born[0])
    moves = eqn.primitive.name in ("broadcast_in_dim", *_LINEAR)
    operands = zip(eqn.invars, statuses, strict=True)
    return Same(moves and all(_zero(v, s) for v, s in operands))


def _zero(atom: Any, status: Status) -> bool:
    if isinstance(atom, Literal):
        return getattr(atom.aval, "shape", ()) == () and not isinstance(atom.val, str) and bool(atom.val == 0)
    return isinstance(status, Same) and status.zero


def _reduced(eqn: JaxprEqn, statuses: Sequence[Status]) -> list[Status] | Mixed:
    """Linear equations hand a sum of shares on as one; others wait until all shares are there."""
    if any(isinstance(s, Split) for s in statuses):
        return Mixed("a sum (or maximum) over the batch meets the examples")
    ops = {s.op for s in statuses if isinstance(s, Reduced)}
    name, shares = eqn.primitive.name, [isinstance(s, Reduced) for s in statuses]
    if len(ops) == 1:
        op = Reduced(ops.pop())
        if name in ("transpose", "reshape", "squeeze", "expand_dims", "copy", "copy_p", "name"):
            return [op]
        if op.op == "add" and _hands_on(eqn, statuses, shares):
            return [op] * len(eqn.outvars)
    return [After()] * len(eqn.outvars)


def _hands_on(eqn: JaxprEqn, statuses: Sequence[Status], shares: Sequence[bool]) -> bool:
    name = eqn.primitive.name
    floats = all("float" in str(v.aval.dtype) or "int" in str(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars))
    rest = [_zero(v, s) for v, s, share in zip(eqn.invars, statuses, shares, strict=True) if not share]
    if name == "convert_element_type":
        return _widens(eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype)
    if name in ("add", "add_any", "sub", "concatenate"):
        return all(rest)
    if name in ("neg", "reduce_sum", "optimization_barrier", "slice"):
        return all(shares)
    return floats and ((name == "mul" and sum(shares) == 1) or (name == "div" and list(shares) == [True, False]))


def _widens(source: Any, target: Any) -> bool:
    """Whether a conversion loses nothing, so that the sum may be taken after it."""
    kinds = (source.kind if source.kind != "V" else "f", target.kind if target.kind != "V" else "f")
    return kinds[0] == kinds[1] and target.itemsize >= source.itemsize and not (source != target and kinds[0] == "b")


def _split(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
    name = eqn.primitive.name
    for number, (operand, status) in enumerate(zip(eqn.invars, statuses, strict=True)):
        if isinstance(status, Split) and len(split_dims(operand, full)) > 1:
            return Mixed(f"operand {number} has the batch in two dims")
    if name in _ELEMENTWISE:
        return _elementwise(eqn, statuses, full)
    handler = _RULES.get(name)
    if handler is None:
        return Mixed(f"the primitive {name} is not known to keep the examples apart")
    return handler(eqn, statuses, full)


def _elementwise(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
    if eqn.primitive.name == "optimization_barrier":
        return list(statuses)
    found = {s.dim for s in statuses if isinstance(s, Split)}
    wide = [v for v, s in zip(eqn.invars, statuses, strict=True) if isinstance(s, Same) and split_dims(v, full)]
    if len(found) != 1 or wide:
        return Mixed("its operands have the batch in different dims")
    pure = all(s.pure for s in statuses if isinstance(s, Split))
    return _kept(eqn, statuses, full, pure=pure)


def _kept(eqn: JaxprEqn, statuses: Sequence[Status], full: Full, *, pure: bool | None = None) -> list[Status] | Mixed:
    """Every result keeps the batch in one dim."""
    every = pure if pure is not None else all(s.pure for s in statuses if isinstance(s, Split))
    found: list[Status] = []
    for out in eqn.outvars:
        dims = split_dims(out, full)
        if len(dims) != 1:
            return Mixed(f"a result has the batch in {len(dims)} dims")
        found.append(Split(dims[0], every))
    return found


def _the_dim(status: Status) -> int:
    return status.dim if isinstance(status, Split) else -1


def _outside(*names: str) -> Callable[..., list[Status] | Mixed]:
    """The dims that a parameter names must not be the batch."""

    def check(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
        for name in names:
            value = eqn.params[name]
            dims = tuple(value) if isinstance(value, tuple | list) else (value,)
            if any(_the_dim(s) in dims for s in statuses):
                return Mixed(f"{eqn.primitive.name} works along the batch")
        return _kept(eqn, statuses, full)

    return check


def _reduction(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
    if _the_dim(statuses[0]) not in eqn.params["axes"]:
        return _kept(eqn, statuses, full)
    op = _REDUCTIONS.get(eqn.primitive.name)
    return [Reduced(op)] if op else Mixed(f"{eqn.primitive.name} over the batch can't be combined from its parts")


def _reshape(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
    """The batch stays whole in one dim; `pure` is lost where it becomes the minor part of a merged dim."""
    found = _kept(eqn, statuses, full)
    status = statuses[0]
    if isinstance(found, Mixed) or not isinstance(status, Split) or not isinstance(found[0], Split):
        return found
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    same = math.prod(before[: status.dim]) == math.prod(after[: found[0].dim])
    return [Split(found[0].dim, status.pure and same)]


def _dot(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
    (contracting, batch) = eqn.params["dimension_numbers"]
    for dims, status in zip(contracting, statuses, strict=True):
        if _the_dim(status) in dims:
            left, right = (
                tuple(dims).index(_the_dim(s)) if _the_dim(s) in dims else -1
                for dims, s in zip(contracting, statuses, strict=True)
            )
            return [Reduced("add")] if left == right else Mixed("only one operand has the batch where it is summed")
    dims = [tuple(b).index(_the_dim(s)) if _the_dim(s) in b else -1 for b, s in zip(batch, statuses, strict=True)]
    both = all(isinstance(s, Split) for s in statuses)
    if both and (dims[0] != dims[1] or dims[0] < 0):
        return Mixed("every example meets every other")
    if max(dims) >= 0 and not both:
        return Mixed("only one operand has the batch")
    return _kept(eqn, statuses, full)


def _convolution(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
    numbers = eqn.params["dimension_numbers"]
    image, kernel = (_the_dim(s) for s in statuses)
    if image == numbers.lhs_spec[0] and kernel < 0:
        return _kept(eqn, statuses, full)
    grouped = eqn.params["batch_group_count"] > 1 or eqn.params["feature_group_count"] > 1
    if not grouped and image == numbers.lhs_spec[1] and kernel == numbers.rhs_spec[1]:
        return [Reduced("add")]
    if image < 0 and kernel == numbers.rhs_spec[0] and not grouped:
        return _kept(eqn, statuses, full)
    if grouped and not split_dims(eqn.outvars[0], full) and image >= 0 and kernel >= 0:
        inner = numbers.lhs_spec[1] == image and numbers.rhs_spec[1] == kernel
        return [Reduced("add")] if inner else Mixed("its groups mix the examples")
    return Mixed("the convolution mixes the examples")


def _broadcast(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
    status = statuses[0]
    found = _kept(eqn, statuses[:1], full)
    if isinstance(status, Split) and not isinstance(found, Mixed):
        to = eqn.params["broadcast_dimensions"][status.dim]
        if not isinstance(found[0], Split) or found[0].dim != to:
            return Mixed("the batch is repeated")
    return found


def _slice(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
    """slice, dynamic_slice, dynamic_update_slice, pad: the batch is taken whole."""
    dim = _the_dim(statuses[0])
    size = eqn.invars[0].aval.shape[dim] if dim >= 0 else 0
    match eqn.primitive.name:
        case "slice":
            strides = eqn.params["strides"]
            whole = eqn.outvars[0].aval.shape[dim] == size and (strides is None or strides[dim] == 1)
        case "dynamic_slice":
            whole = eqn.params["slice_sizes"][dim] == size and not any(isinstance(s, Split) for s in statuses[1:])
        case "pad":
            whole = eqn.params["padding_config"][dim] == (0, 0, 0) and not isinstance(statuses[1], Split)
        case _:
            whole = dim == _the_dim(statuses[1]) and eqn.invars[1].aval.shape[dim] == size
            whole = whole and not any(isinstance(s, Split) for s in statuses[2:])
    return _kept(eqn, statuses, full) if whole and dim >= 0 else Mixed("it takes or fills a part of the batch")


def _concatenate(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
    if any(_the_dim(s) == eqn.params["dimension"] for s in statuses):
        return Mixed("examples are joined along the batch")
    return _elementwise(eqn, statuses, full)


def _gather(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table, indices = (_the_dim(s) for s in statuses[:2])
    if table < 0:
        return _kept(eqn, statuses, full)
    if table in numbers.operand_batching_dims:
        place = numbers.operand_batching_dims.index(table)
        apart = indices == numbers.start_indices_batching_dims[place]
    else:
        whole = sizes[table] == eqn.invars[0].aval.shape[table]
        apart = whole and indices < 0 and table not in numbers.collapsed_slice_dims
    return _kept(eqn, statuses, full) if apart else Mixed("examples are looked up by their place in the batch")


def _scatter(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
    numbers = eqn.params["dimension_numbers"]
    operand, indices, updates = (_the_dim(s) for s in statuses[:3])
    if operand < 0 and not split_dims(eqn.outvars[0], full):
        if eqn.primitive.name in ("scatter-add", "scatter_add") and _zero(eqn.invars[0], statuses[0]):
            return [Reduced("add")]
        return Mixed("examples are written into something that holds no zeros")
    target = split_dims(eqn.outvars[0], full)
    if len(target) != 1 or updates < 0:
        return Mixed("the batch is written in part")
    if target[0] in numbers.operand_batching_dims:
        place = numbers.operand_batching_dims.index(target[0])
        apart = indices == numbers.scatter_indices_batching_dims[place]
    else:
        window = [d for d in range(len(eqn.outvars[0].aval.shape)) if not _is_inserted(d, numbers)]
        apart = target[0] in window and indices < 0
        apart = apart and numbers.update_window_dims[window.index(target[0])] == updates
        size = eqn.outvars[0].aval.shape[target[0]]
        apart = apart and eqn.invars[2].aval.shape[updates] == size
    return _kept(eqn, statuses, full) if apart else Mixed("examples are written by their place in the batch")


def _is_inserted(dim: int, numbers: Any) -> bool:
    return dim in numbers.inserted_window_dims or dim in numbers.operand_batching_dims


def _window(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
    dims = {_the_dim(s) for s in statuses if isinstance(s, Split)}
    window = eqn.params["window_dimensions"]
    if len(dims) != 1 or window[dims.pop()] != 1:
        return Mixed("a window moves over the batch")
    return _kept(eqn, statuses, full)


def _matrix(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
    for operand, status in zip(eqn.invars, statuses, strict=True):
        if isinstance(status, Split) and status.dim >= len(operand.aval.shape) - 2:
            return Mixed("the batch is part of the matrices")
    return _kept(eqn, statuses, full)


def _last_dim(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[Status] | Mixed:
    if _the_dim(statuses[0]) == len(eqn.invars[0].aval.shape) - 1:
        return Mixed(f"{eqn.primitive.name} works along the batch")
    return _kept(eqn, statuses, full)


_RULES: dict[str, Callable[..., list[Status] | Mixed]] = {
    **dict.fromkeys(_REDUCTIONS, _reduction),
    "reduce_prod": _reduction,
    "reduce_xor": _reduction,
    "argmax": _reduction,
    "argmin": _reduction,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": _kept,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "concatenate": _concatenate,
    "slice": _slice,
    "dynamic_slice": _slice,
    "dynamic_update_slice": _slice,
    "pad": _slice,
    "gather": _gather,
    "scatter": _scatter,
    "scatter-add": _scatter,
    "scatter_add": _scatter,
    "scatter-mul": _scatter,
    "scatter-min": _scatter,
    "scatter-max": _scatter,
    "rev": _outside("dimensions"),
    "sort": _outside("dimension"),
    "split": _outside("axis"),
    "iota": _kept,
    "top_k": _last_dim,
    "fft": _last_dim,
    **{name: _outside("axis") for name in _CUMULATIVE},
    **dict.fromkeys(_MATRIX, _matrix),
    **dict.fromkeys(
        ("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum", "select_and_gather_add"),
        _window,
    ),
    "select_and_scatter_add": _window,
}
