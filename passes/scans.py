"""Cuts the scan over a model's layers into several, so that each stage of a pipeline can have its part of the layers.

A model that scans over its layers keeps the layers' values stacked: [L, ...]. Cut into lengths l0, …, lk-1 (their sum
is L), its scan becomes k scans that hand the carry on, and what is stacked becomes *chunks*: k values [li, ...].

    carry, ys = scan(params [L, ...])    becomes    carry, ys0 = scan(params0 [l0, ...])
                                                    carry, ys1 = scan(params1 [l1, ...])

Chunks stay apart wherever dim 0 goes through an equation untouched: gradients, clipping, Adam. Which values those are
is one question of reachability. Each equation with a rule (`_rule`) ties the values that its dim 0 goes through; a
group of tied values is in chunks if a scan over the layers reads or writes one of them. Values that are equal along
dim 0 (zeros, say) tie nothing: they are made in whatever size they are wanted. Everything else (loops and branches,
such as `optax.MultiSteps` has, too) reads chunks joined, and what it makes is sliced.

A dim 0 of m·L rows (layers made flat) is cut into chunks of m·li rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from alpa_like.errors import GraphError, MethodError
from alpa_like.passes.flat import equation_flops, flatten, sub_jaxpr

__all__ = ["Cuts", "SplitScans", "split_scans", "stacked_scan_lengths"]

Cuts = tuple[int, ...] | None
"""Rows along dim 0 of each chunk of a value, or None for a value that stays whole."""


@dataclass(frozen=True)
class SplitScans:
    """A step whose scans over the layers are cut. Chunks stand in the place of the value that they were.

    `inputs` and `outputs` have one entry per flat input and output of the step before it was cut.
    """

    jaxpr: ClosedJaxpr
    inputs: tuple[Cuts, ...]
    outputs: tuple[Cuts, ...]

    def split_values(self, values: Sequence[Any]) -> list[Any]:
        """The flat inputs of the cut step for those of the whole step."""
        return [part for value, cuts in zip(values, self.inputs, strict=True) for part in _split(value, cuts)]

    def join_outputs(self, values: Sequence[Any]) -> list[Any]:
        """The flat outputs of the whole step for those of the cut step."""
        rest = iter(values)
        return [next(rest) if cuts is None else _joined([next(rest) for _ in cuts]) for cuts in self.outputs]


def split_scans(
    closed_jaxpr: ClosedJaxpr, lengths: Sequence[int], *, scan_length: int, pairs: Sequence[tuple[int, int]] = ()
) -> SplitScans:
    """Cut every top-level scan of `scan_length` iterations into scans of `lengths`, run in order.

    A scan with `reverse=True` runs its chunks last to first. `pairs` are flat (input, output) numbers of state that
    comes back: both are in chunks, or neither. Calls are stepped into; the bodies of loops, branches and
    rematerialized regions are not, so that a scan inside them (`jax.checkpoint` around the whole stack) stays whole
    and reads chunks joined. All top-level scans of this length are taken for scans over the layers.

    The result computes what the step computed. Reductions over the layers add up chunk by chunk; all else is done in
    the same order.

    Raises `MethodError` for lengths that are not positive or don't add up to `scan_length`, `GraphError` for a step
    without such a scan, for a scan over mutable arrays, and for a pair whose shapes differ.
    """
    if any(n < 1 for n in lengths) or sum(lengths) != scan_length:
        raise MethodError(
            f"expected positive chunk lengths that add up to the scan length {scan_length}, found {tuple(lengths)}; "
            "give each stage at least one layer and all stages together every layer"
        )
    flat = _inlined(closed_jaxpr)
    _check(flat, scan_length, pairs)
    chunked = _chunked(flat, scan_length, pairs)
    inputs, outputs = (
        tuple(_cuts(v, lengths) if isinstance(v, Var) and v in chunked else None for v in side)
        for side in (flat.jaxpr.invars, flat.jaxpr.outvars)
    )
    types = [part for v, cuts in zip(flat.jaxpr.invars, inputs, strict=True) for part in _types(v.aval, cuts)]
    cut = _traced(lambda *args: _Cutter(tuple(lengths), chunked).run(flat, args), types)
    return SplitScans(cut, inputs, outputs)


def stacked_scan_lengths(closed_jaxpr: ClosedJaxpr) -> tuple[int, ...]:
    """Lengths of the top-level scans that run both forwards and backwards, as a scan and its gradient do.

    Sorted by the flops of all scans of a length, most first. A flop is counted for each element of a result, two for
    each product in a matmul or convolution.
    """
    flops: dict[int, float] = {}
    directions: dict[int, set[bool]] = {}
    for eqn in _inlined(closed_jaxpr).jaxpr.eqns:
        if eqn.primitive.name == "scan":
            length = eqn.params["length"]
            flops[length] = flops.get(length, 0.0) + equation_flops(eqn)
            directions.setdefault(length, set()).add(eqn.params["reverse"])
    return tuple(sorted((n for n, seen in directions.items() if len(seen) == 2), key=lambda n: (-flops[n], n)))


def _check(closed: ClosedJaxpr, length: int, pairs: Sequence[tuple[int, int]]) -> None:
    scans = [eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "scan"]
    cut = [eqn for eqn in scans if _is_cut(eqn, length)]
    if not cut:
        found = sorted({eqn.params["length"] for eqn in scans})
        raise GraphError(
            f"expected a scan of {length} layers at the top level of the step, found scans of {found}; cut one of "
            "those, and keep the scan out of other loops, branches and a jax.checkpoint around the whole stack"
        )
    if any(hasattr(v.aval, "inner_aval") for eqn in cut for v in _Operands.of(eqn).xs):
        raise GraphError(
            f"a scan of {length} layers goes over a mutable array, which can't be cut; let it read and return arrays"
        )
    for i, o in pairs:
        before, after = _shape(closed.jaxpr.invars[i]), _shape(closed.jaxpr.outvars[o])
        if before != after:
            raise GraphError(f"input {i} {before} comes back as output {o} {after}; pair only values of one shape")


# -------------------------------------------------------------------------------- jaxprs


def _traced(fun: Callable[..., Any], types: Sequence[Any]) -> ClosedJaxpr:
    return jax.jit(fun).trace(*types).jaxpr


def _types(aval: Any, cuts: Cuts) -> list[Any]:
    shapes = [aval.shape] if cuts is None else [(n, *aval.shape[1:]) for n in cuts]
    return [jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=aval.weak_type) for shape in shapes]


def _inlined(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same jaxpr without calls. Custom derivatives have done their work by the time a whole step is cut."""
    flat = flatten(closed)
    return sub_jaxpr(flat.equations, flat.inputs, flat.outputs, flat.constants)


@contextmanager
def _at(eqn: JaxprEqn, outer: Any) -> Generator[None]:
    """What is traced inside has the source line of `eqn`, and its name stack after that of the calls around it."""
    info = eqn.source_info
    with source_info_util.user_context(info.traceback, name_stack=outer + info.name_stack), eqn.ctx.manager:
        yield


def _bind(eqn: JaxprEqn, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(params))
    return list(results) if eqn.primitive.multiple_results else [results]


# -------------------------------------------------------------------------------- what an equation does to rows


@dataclass(frozen=True, slots=True)
class _Rule:
    """How rows (the index along dim 0) of operands become rows of results: each depends on the same rows only.

    `rows` marks the operands that have rows. With `combine`, results have none: those of two chunks are combined.
    `sized` names the parameter that holds the shape of the result.
    """

    rows: tuple[bool, ...]
    combine: Callable[[Any, Any], Any] | None = None
    sized: str = ""


# One string, as a list would be laid out with one name per line.
_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
    convert_element_type copy cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
    igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi
    name ne neg nextafter not one_minus_square or polygamma population_count pow real reduce_precision
    regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin
    sinh sqrt square stop_gradient sub tan tanh xor zeta""".split()  # noqa: SIM905
)
# The parameter that names the dims which an equation works along; rows go through if dim 0 is none of them.
_ALONG = {
    **dict.fromkeys(("reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum"), "axes"),
    **dict.fromkeys(("argmax", "argmin", "reduce_xor"), "axes"),
    **dict.fromkeys(("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "split"), "axis"),
    **dict.fromkeys(("concatenate", "sort"), "dimension"),
    **dict.fromkeys(("rev", "squeeze"), "dimensions"),
}
_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "reduce_and": lax.bitwise_and,
    "reduce_max": lax.max,
    "reduce_min": lax.min,
    "reduce_or": lax.bitwise_or,
    "reduce_prod": lax.mul,
    "reduce_sum": lax.add,
    "reduce_xor": lax.bitwise_xor,
}


def _rule(eqn: JaxprEqn, length: int) -> _Rule | None:
    """The rule of an equation whose rows, of operands and of results, are multiples of `length`."""
    rule = _any_rule(eqn)
    if rule is None:
        return None
    having = [*itertools.compress(eqn.invars, rule.rows), *([] if rule.combine else eqn.outvars)]
    return rule if all(_rows(v) and _rows(v) % length == 0 for v in having) else None


def _shape(atom: Any) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())  # tokens have none


def _rows(atom: Any) -> int:
    return _shape(atom)[0] if _shape(atom) else 0


def _any_rule(eqn: JaxprEqn) -> _Rule | None:
    name, params = eqn.primitive.name, eqn.params
    if name in _ELEMENTWISE:
        return _elementwise(eqn)
    if name in _ALONG:
        dims = params[_ALONG[name]]
        along = 0 in dims if isinstance(dims, tuple) else dims == 0
        combine = _COMBINE.get(name) if along else None
        return None if along and combine is None else _Rule((True,) * len(eqn.invars), combine)
    make = _SHAPES.get(name)
    return make(eqn) if make else None


def _elementwise(eqn: JaxprEqn) -> _Rule | None:
    out, *shapes = [_shape(v) for v in (*eqn.outvars, *eqn.invars)]
    if any(len(s) not in (0, len(out)) for s in shapes):
        return None
    # Dims of size 1 are broadcast: such an operand is the same for all rows.
    return _Rule(tuple(bool(s) and s[0] == out[0] for s in shapes))


def _broadcast(eqn: JaxprEqn) -> _Rule | None:
    dims, shape = eqn.params["broadcast_dimensions"], eqn.params["shape"]
    if len(eqn.invars) > 1 or eqn.params.get("sharding") is not None:
        return None
    return _Rule((0 in dims and _rows(eqn.invars[0]) == shape[0],), sized="shape")


def _iota(eqn: JaxprEqn) -> _Rule | None:
    plain = eqn.params["dimension"] != 0 and not eqn.invars and eqn.params.get("sharding") is None
    return _Rule((), sized="shape") if plain else None


def _reshape(eqn: JaxprEqn) -> _Rule | None:
    # Row-major order: equal parts of dim 0 before are equal parts of dim 0 after.
    plain = eqn.params["dimensions"] is None and len(eqn.invars) == 1 and eqn.params.get("sharding") is None
    return _Rule((True,), sized="new_sizes") if plain else None


def _slice(eqn: JaxprEqn) -> _Rule | None:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    whole = starts[:1] == (0,) and limits[0] == _rows(eqn.invars[0]) and (eqn.params["strides"] or (1,))[0] == 1
    return _Rule((True,), sized="limit_indices") if whole else None


def _transpose(eqn: JaxprEqn) -> _Rule | None:
    return _Rule((True,)) if eqn.params["permutation"][:1] == (0,) else None


def _pad(eqn: JaxprEqn) -> _Rule | None:
    config = eqn.params["padding_config"]
    return _Rule((True, False)) if config and tuple(config[0]) == (0, 0, 0) else None


def _same_rows(eqn: JaxprEqn) -> _Rule | None:
    return _Rule((True,) * len(eqn.invars))


def _dot(eqn: JaxprEqn) -> _Rule | None:
    """Rows that are a batch dim, a free dim that comes first in the result, or summed over."""
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    if (0, 0) in zip(left, right, strict=True):
        return _Rule((True, True), lax.add)
    if left_batch:
        return _Rule((True, True)) if left_batch[0] == right_batch[0] == 0 else None
    if 0 not in left and _shape(eqn.invars[0]):
        return _Rule((True, False))
    lone = len(left) == len(_shape(eqn.invars[0])) and 0 not in right
    return _Rule((False, True)) if lone else None


_SHAPES: dict[str, Callable[[JaxprEqn], _Rule | None]] = {
    "bitcast_convert_type": _same_rows,
    "broadcast_in_dim": _broadcast,
    "dot_general": _dot,
    "iota": _iota,
    "pad": _pad,
    "random_unwrap": _same_rows,
    "random_wrap": _same_rows,
    "reshape": _reshape,
    "slice": _slice,
    "transpose": _transpose,
}


# -------------------------------------------------------------------------------- which values are chunked


@dataclass(frozen=True, slots=True)
class _Operands:
    """What a scan reads: the same for all iterations, handed on, and one row for each iteration."""

    consts: list[Any]
    carry: list[Any]
    xs: list[Any]

    @classmethod
    def of(cls, eqn: JaxprEqn) -> _Operands:
        if "ft_in" in eqn.params:  # JAX 0.12 keeps a tree of three parts instead of two counts
            consts, carry, _ = (len(list(part)) for part in eqn.params["ft_in"].unpack())
        else:
            consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
        values = list(eqn.invars)
        return cls(values[:consts], values[consts : consts + carry], values[consts + carry :])


def _is_cut(eqn: JaxprEqn, length: int) -> bool:
    return eqn.primitive.name == "scan" and eqn.params["length"] == length


class _Groups:
    """Values that are in chunks together."""

    def __init__(self) -> None:
        self.parent: dict[Any, Any] = {}

    def find(self, var: Any) -> Any:
        root = self.parent.setdefault(var, var)
        while root is not self.parent[root]:
            root = self.parent[root]
        self.parent[var] = root
        return root

    def tie(self, values: Iterable[Any]) -> None:
        first, *others = values
        for other in others:
            self.parent[self.find(other)] = self.find(first)


def _chunked(closed: ClosedJaxpr, length: int, pairs: Sequence[tuple[int, int]]) -> frozenset[Any]:
    groups, seeds, uniform = _Groups(), list[Any](), set[Any]()
    for eqn in closed.jaxpr.eqns:
        if _is_cut(eqn, length):
            operands = _Operands.of(eqn)
            seeds += [v for v in operands.xs if v not in uniform] + eqn.outvars[len(operands.carry) :]
            continue
        rule = _rule(eqn, length)
        if rule is None:
            continue
        tied = [v for v in itertools.compress(eqn.invars, rule.rows) if v not in uniform]
        if tied:
            groups.tie(tied if rule.combine else [*tied, *eqn.outvars])
        elif not rule.combine:
            uniform.update(eqn.outvars)
    for i, o in pairs:
        if isinstance(closed.jaxpr.outvars[o], Var):
            groups.tie((closed.jaxpr.invars[i], closed.jaxpr.outvars[o]))
    found = {groups.find(v) for v in seeds}
    return frozenset(v for v in list(groups.parent) if groups.find(v) in found)


def _cuts(var: Var, lengths: Sequence[int]) -> tuple[int, ...]:
    each = _rows(var) // sum(lengths)
    return tuple(n * each for n in lengths)


def _split(value: Any, cuts: Cuts) -> list[Any]:
    if cuts is None or len(cuts) == 1:
        return [value]
    ends = itertools.accumulate(cuts)
    return [lax.slice_in_dim(value, end - n, end) for n, end in zip(cuts, ends, strict=True)]


def _joined(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, 0)


# -------------------------------------------------------------------------------- rewriting


@dataclass
class _Chunks:
    parts: list[Any]

    @functools.cached_property
    def whole(self) -> Any:
        return _joined(self.parts)


@dataclass(frozen=True)
class _Uniform:
    """A value that is the same in all rows; `make(n)` is as much of it as n layers need."""

    make: Callable[[int], Any]


class _Cutter:
    """Evaluates a jaxpr without calls. A value is an array, `_Chunks` or `_Uniform`."""

    def __init__(self, lengths: tuple[int, ...], chunked: frozenset[Any]) -> None:
        self.lengths, self.chunked, self.total = lengths, chunked, sum(lengths)
        self.outer = source_info_util.current_name_stack()
        self.env: dict[Any, Any] = {}

    def run(self, closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        """The flat outputs for the flat inputs, chunks side by side."""
        rest = iter(args)
        for var in closed.jaxpr.invars:
            self.env[var] = _Chunks([next(rest) for _ in self.lengths]) if var in self.chunked else next(rest)
        self.write(closed.jaxpr.constvars, closed.consts)
        for eqn in closed.jaxpr.eqns:
            with _at(eqn, self.outer):
                self.write(eqn.outvars, self.results(eqn))
        sides = [self.parts(v) if v in self.chunked else [self.whole(v)] for v in closed.jaxpr.outvars]
        return [value for side in sides for value in side]

    def write(self, variables: Sequence[Any], values: Iterable[Any]) -> None:
        for var, value in zip(variables, values, strict=True):
            array = not isinstance(value, _Chunks | _Uniform)
            self.env[var] = _Chunks(_split(value, _cuts(var, self.lengths))) if array and var in self.chunked else value

    def whole(self, atom: Any) -> Any:
        if isinstance(atom, Literal):
            return atom.val
        match self.env[atom]:
            case _Chunks() as chunks:
                return chunks.whole
            case _Uniform(make):
                return make(self.total)
            case array:
                return array

    def parts(self, var: Any) -> list[Any]:
        value = self.env[var]
        return [value.make(n) for n in self.lengths] if isinstance(value, _Uniform) else value.parts

    def results(self, eqn: JaxprEqn) -> list[Any]:
        if _is_cut(eqn, self.total):
            return self.scans(eqn)
        rule = _rule(eqn, self.total)
        if rule is not None:
            values = [self.env[v] for v in itertools.compress(eqn.invars, rule.rows)]
            if any(isinstance(v, _Chunks) for v in values):
                return self.by_chunk(eqn, rule)
            if not rule.combine and all(isinstance(v, _Uniform) for v in values):
                return self.uniform(eqn, rule)
        return _bind(eqn, [self.whole(v) for v in eqn.invars], eqn.params)

    def by_chunk(self, eqn: JaxprEqn, rule: _Rule) -> list[Any]:
        made = [self.apply(eqn, rule, n, lambda v, i=i: self.parts(v)[i]) for i, n in enumerate(self.lengths)]
        if rule.combine:
            return [functools.reduce(rule.combine, column) for column in zip(*made, strict=True)]
        return [_Chunks(list(column)) for column in zip(*made, strict=True)]

    def uniform(self, eqn: JaxprEqn, rule: _Rule) -> list[Any]:
        @functools.cache
        def make(layers: int) -> list[Any]:
            with _at(eqn, self.outer):
                return self.apply(eqn, rule, layers, lambda v: self.env[v].make(layers))

        return [_Uniform(lambda layers, k=k: make(layers)[k]) for k in range(len(eqn.outvars))]

    def apply(self, eqn: JaxprEqn, rule: _Rule, layers: int, rows_of: Callable[[Any], Any]) -> list[Any]:
        """The equation for so many layers."""
        params = dict(eqn.params)
        if rule.sized:
            rows = layers * (_rows(eqn.outvars[0]) // self.total)
            params[rule.sized] = (rows, *params[rule.sized][1:])
        marked = zip(eqn.invars, rule.rows, strict=True)
        return _bind(eqn, [rows_of(v) if has_rows else self.whole(v) for v, has_rows in marked], params)

    def scans(self, eqn: JaxprEqn) -> list[Any]:
        operands = _Operands.of(eqn)
        consts, carry = [self.whole(v) for v in operands.consts], [self.whole(v) for v in operands.carry]
        xs = [self.parts(v) for v in operands.xs]
        ys: dict[int, list[Any]] = {}
        order = list(enumerate(self.lengths))
        for i, n in reversed(order) if eqn.params["reverse"] else order:
            params = eqn.params | {"length": n, "unroll": min(eqn.params["unroll"], n)}
            made = _bind(eqn, [*consts, *carry, *(x[i] for x in xs)], params)
            carry, ys[i] = made[: len(carry)], made[len(carry) :]
        return [*carry, *(_Chunks(list(column)) for column in zip(*(ys[i] for i, _ in order), strict=True))]
