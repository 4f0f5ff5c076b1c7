"""A jaxpr as one flat list of equations, functions of parts of it, and the same program for another batch size.

Calls (`jit`, custom derivatives) are stepped into, so that a program can be cut between any two equations; control
flow and rematerialization stay whole. Every equation keeps its name stack, joined with that of the calls around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend import core, source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from alpa_like.errors import TraceError
from alpa_like.passes.avals import dtype_of, shape_of

__all__ = [
    "Flat", "Resizer", "body_of", "cone_of", "equation_flops", "flatten", "function_of", "inner_jaxprs", "nbytes",
    "reads", "replace_bodies", "scan_counts", "split_dims", "sub_jaxpr",
]  # fmt: skip

_CALLS = frozenset(
    (
        "jit",
        "pjit",
        "call",
        "closed_call",
        "core_call",
        "eval_jaxpr",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_lin",
    )
)
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_REMAT = ("remat2", "remat", "checkpoint")
_CONTROL = ("scan", "while", "cond", *_REMAT)
"""The primitives whose bodies follow the batch size."""
_SIZES = {
    "broadcast_in_dim": ("shape",),
    "iota": ("shape",),
    "reshape": ("new_sizes",),
    "slice": ("start_indices", "limit_indices"),
    "dynamic_slice": ("slice_sizes",),
    "gather": ("slice_sizes",),
}
"""The parameters that are sizes of dims: of results, and in the last three of the dims of the first operand."""


@dataclass(frozen=True)
class Flat:
    """Equations in program order. Every variable is made once; `constants` are arrays closed over.

    `remats` numbers the rematerializations, by their first result.
    """

    equations: tuple[JaxprEqn, ...]
    inputs: tuple[Var, ...]
    outputs: tuple[Any, ...]
    constants: dict[Var, Any]
    remats: dict[Var, int] = field(default_factory=dict[Var, int])


def flatten(closed: ClosedJaxpr, opened: Collection[int] = ()) -> Flat:
    """Step into all calls, and into the rematerializations of these numbers.

    The variables are new, so two flattenings share none.
    """
    inliner = _Inliner(opened)
    inputs = tuple(inliner.fresh(v) for v in closed.jaxpr.invars)
    outputs = inliner.inline(closed.jaxpr, closed.consts, inputs, source_info_util.new_name_stack())
    return Flat(tuple(inliner.equations), inputs, tuple(outputs), inliner.constants, inliner.remats)


class _Inliner:
    def __init__(self, opened: Collection[int]) -> None:
        self.opened = opened
        self.equations: list[JaxprEqn] = []
        self.constants: dict[Var, Any] = {}
        self.known: dict[int, Var] = {}
        self.remats: dict[Var, int] = {}
        self.count = 0
        self.new = core.gensym()

    def fresh(self, var: Any) -> Var:
        return self.new(var.aval)

    def constant(self, var: Any, value: Any) -> Var:
        """One variable per array, however often calls close over it."""
        if id(value) not in self.known:
            self.known[id(value)] = self.fresh(var)
            self.constants[self.known[id(value)]] = value
        return self.known[id(value)]

    def inline(self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], stack: Any) -> list[Any]:
        env: dict[Any, Any] = dict(zip(jaxpr.invars, arguments, strict=True))
        env.update((v, self.constant(v, c)) for v, c in zip(jaxpr.constvars, consts, strict=True))

        def read(atom: Any) -> Any:
            return atom if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            names = stack + eqn.source_info.name_stack
            body = self.called(eqn)
            if body is not None:
                results = self.inline(body.jaxpr, body.consts, _arguments(eqn, operands), names)
                env.update(zip(eqn.outvars, results, strict=True))
                continue
            outs = [self.fresh(v) for v in eqn.outvars]
            env.update(zip(eqn.outvars, outs, strict=True))
            if eqn.primitive.name in _REMAT:
                self.remats[outs[0]] = self.count - 1
            info = eqn.source_info.replace(name_stack=names)
            self.equations.append(eqn.replace(invars=operands, outvars=outs, source_info=info))
        return [read(v) for v in jaxpr.outvars]

    def called(self, eqn: JaxprEqn) -> ClosedJaxpr | None:
        """What is to be stepped into; None for equations that stay."""
        if eqn.primitive.name == "custom_linear_solve":
            return eqn.params["jaxprs"].solve
        if eqn.primitive.name in _REMAT:
            self.count += 1
            return _body(eqn) if self.count - 1 in self.opened else None
        return _body(eqn) if eqn.primitive.name in _CALLS else None


def _arguments(eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
    """What a call hands to its body. A linear solve has the constants of four bodies, then the right-hand sides."""
    if eqn.primitive.name != "custom_linear_solve":
        return operands
    counts = eqn.params["const_lengths"]
    first = counts.matvec + counts.vecmat
    return [*operands[first : first + counts.solve], *operands[sum(counts) :]]


def _body(eqn: JaxprEqn) -> ClosedJaxpr | None:
    for name in _BODIES:
        body = eqn.params.get(name)
        if isinstance(body, ClosedJaxpr):
            return body
        if isinstance(body, Jaxpr) and not body.constvars:
            return ClosedJaxpr(body, ())
    return None


def inner_jaxprs(eqn: JaxprEqn) -> list[ClosedJaxpr]:
    """The bodies of an equation: those of a loop, the branches of a condition, what is rematerialized."""
    found: list[ClosedJaxpr] = []
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                found.append(one)
            elif isinstance(one, Jaxpr):
                found.append(ClosedJaxpr(one, ()))
    return found


def reads(eqn: JaxprEqn) -> list[Var]:
    """The variables that an equation reads."""
    return [v for v in eqn.invars if isinstance(v, Var)]


def sub_jaxpr(
    equations: Iterable[JaxprEqn], inputs: Sequence[Var], outputs: Sequence[Any], constants: dict[Var, Any]
) -> ClosedJaxpr:
    """The equations as a jaxpr of its own. `inputs` and the constants must hold all that they read."""
    listed = list(equations)
    read = {v for eqn in listed for v in reads(eqn)} | {v for v in outputs if isinstance(v, Var)}
    held = [v for v in constants if v in read]
    effects = frozenset().union(*(eqn.effects for eqn in listed)) if listed else frozenset()
    jaxpr = Jaxpr(held, list(inputs), list(outputs), listed, effects, debug_info=_debug_info(len(inputs), len(outputs)))
    return ClosedJaxpr(jaxpr, [constants[v] for v in held])


def _debug_info(inputs: int, outputs: int) -> Any:
    return core.DebugInfo(
        "piece", "piece", tuple(f"a{i}" for i in range(inputs)), tuple(f"r{i}" for i in range(outputs))
    )


def function_of(closed: ClosedJaxpr, name: str) -> Callable[..., Any]:
    """A jaxpr as a function of its flat inputs that returns a list."""
    run = core.jaxpr_as_fun(closed)

    def piece(*args: Any) -> Any:
        return run(*args)

    piece.__name__ = piece.__qualname__ = name
    return piece


def nbytes(var: Any) -> float:
    """Bytes of a value; typed random keys count their data."""
    if not hasattr(var.aval, "shape"):
        return 0.0
    return float(math.prod(shape_of(var)) * (getattr(dtype_of(var), "itemsize", 0) or 8))


def equation_flops(eqn: JaxprEqn) -> float:
    """Floating-point operations: 2 per multiply-add of contractions, 1 per element of results otherwise."""
    name = eqn.primitive.name
    out = sum(math.prod(shape_of(v)) for v in eqn.outvars)
    if name == "dot_general":
        (contracting, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * out * math.prod(shape_of(eqn.invars[0])[d] for d in contracting)
    if name == "conv_general_dilated":
        kernel, spec = shape_of(eqn.invars[1]), eqn.params["dimension_numbers"].rhs_spec
        return 2.0 * out * math.prod(kernel) / max(1, kernel[spec[0]])
    bodies = inner_jaxprs(eqn)
    if not bodies:
        return float(out)
    costs = [sum(equation_flops(e) for e in body.jaxpr.eqns) for body in bodies]
    return float(eqn.params.get("length", 1)) * (max(costs) if name == "cond" else sum(costs))


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried from turn to turn."""
    if "ft_in" in eqn.params:  # JAX 0.12 keeps a tree of three parts instead of two counts
        consts, carries, _ = (len(part) for part in eqn.params["ft_in"].unpack())
        return consts, carries
    return eqn.params["num_consts"], eqn.params["num_carry"]


def split_dims(var: Any, full: Mapping[Any, tuple[int, ...]]) -> list[int]:
    """The dims that are shorter with a micro-batch than with the whole batch."""
    if isinstance(var, Literal):
        return []
    here = shape_of(var)
    return [d for d, (a, b) in enumerate(zip(here, full.get(var, here), strict=True)) if a != b]


def cone_of(makers: dict[Var, JaxprEqn], goals: Iterable[Var]) -> tuple[list[JaxprEqn], set[Var]]:
    """All equations that lead to the goals, in program order, and all variables that they read."""
    found: dict[int, JaxprEqn] = {}
    read: set[Var] = set()
    pending = list(goals)
    while pending:
        var = pending.pop()
        read.add(var)
        maker = makers.get(var)
        if maker is not None and id(maker) not in found:
            found[id(maker)] = maker
            pending.extend(reads(maker))
    places = {id(e): i for i, e in enumerate(makers.values())}
    return sorted(found.values(), key=lambda e: places[id(e)]), read


def body_of(
    equations: Sequence[JaxprEqn], inputs: Sequence[Var], outputs: Sequence[Any], constants: dict[Var, Any]
) -> ClosedJaxpr:
    """The body of a loop or condition."""
    effects = frozenset().union(*(e.effects for e in equations)) if equations else frozenset()
    names = core.DebugInfo("body", "body", tuple(f"a{i}" for i in range(len(inputs))), ("",) * len(outputs))
    jaxpr = Jaxpr(list(constants), list(inputs), list(outputs), list(equations), effects, debug_info=names)
    return ClosedJaxpr(jaxpr, list(constants.values()))


def replace_bodies(params: dict[str, Any], bodies: Sequence[ClosedJaxpr]) -> dict[str, Any]:
    """An equation's parameters with other bodies, in the order of `inner_jaxprs`."""
    left = iter(bodies)

    def swap(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(swap(v) for v in value)
        if isinstance(value, ClosedJaxpr):
            return next(left)
        return next(left).jaxpr if isinstance(value, Jaxpr) else value

    return {name: swap(value) for name, value in params.items()}


# ------------------------------------------------------------------------------------- two traces become one program


@dataclass
class Resizer:
    """Turns a program for `size` examples, and its twin for twice as many, into one for `part` examples.

    The two have the same equations; sizes that differ follow the batch. All other numbers are those for `size`
    examples. What no result needs is left out.

    `full` are the shapes for the whole batch (for twice the batch, if the part is the whole); `twins` the variables of
    the program for `size` examples; `originals` its equations, by the first of the new results.
    """

    size: int
    part: int
    full: dict[Var, tuple[int, ...]] = field(default_factory=dict[Var, tuple[int, ...]])
    twins: dict[Var, Var] = field(default_factory=dict[Var, Var])
    originals: dict[Var, JaxprEqn] = field(default_factory=dict[Var, JaxprEqn])

    def __post_init__(self) -> None:
        self.new = core.gensym()

    def flat(self, whole: Flat, twice: Flat) -> Flat:
        """The program for a part. Raises `TraceError` where the two are different programs, or have side effects."""
        self.require(len(whole.equations) == len(twice.equations), None)
        self.require(len(whole.constants) == len(twice.constants), None)
        for eqn in whole.equations:
            _check_effects(eqn)
        env: dict[Any, Any] = {}
        inputs = self.made(env, whole.inputs, twice.inputs, None)
        constants, merged = self.constants(env, whole, twice)
        makers = {v: e for e in whole.equations for v in e.outvars}
        needed = {id(e) for e in cone_of(makers, [v for v in whole.outputs if isinstance(v, Var)])[0]}
        pairs = zip(whole.equations, twice.equations, strict=True)
        merged += [self.equation(env, a, b) for a, b in pairs if id(a) in needed]
        outputs = tuple(v if isinstance(v, Literal) else env[v] for v in whole.outputs)
        remats = {env[v]: n for v, n in whole.remats.items() if v in env}
        return Flat(tuple(merged), inputs, outputs, constants, remats)

    def require(self, holds: bool, eqn: JaxprEqn | None) -> None:
        if not holds:
            raise TraceError(
                f"for a batch twice as large the step is another program{_where(eqn)}; micro-batches need the same "
                "operations for every batch size: no loop over the batch, and no choice that depends on its size"
            )

    # --------------------------------------------------------------------------------------------------- variables

    def constants(self, env: dict[Any, Any], whole: Flat, twice: Flat) -> tuple[dict[Var, Any], list[JaxprEqn]]:
        """The constants of the program, and equations that take from those as large as the batch the part's share."""
        values: dict[Var, Any] = {}
        merged: list[JaxprEqn] = []
        for (mine, value), other in zip(whole.constants.items(), twice.constants, strict=True):
            if shape_of(mine) == shape_of(other):
                values[self.made(env, [mine], [mine], None)[0]] = value
                continue
            held = self.new(mine.aval)
            values[held], self.full[held] = value, shape_of(mine)
            copy = _copy_of(held, value)
            outs = self.made(env, [mine], [other], None)
            merged.append(copy.replace(outvars=list(outs), params=self.sized_params(copy, outs)))
            self.originals[outs[0]] = copy
        return values, merged

    def sized_params(self, eqn: JaxprEqn, outs: Sequence[Var]) -> dict[str, Any]:
        return {**eqn.params, "shape": shape_of(outs[0])} if "shape" in eqn.params else dict(eqn.params)

    def made(
        self, env: dict[Any, Any], whole: Sequence[Any], twice: Sequence[Any], eqn: JaxprEqn | None
    ) -> tuple[Var, ...]:
        """New variables with the shapes of the part."""
        found: list[Var] = []
        for mine, other in zip(whole, twice, strict=True):
            aval, large = mine.aval, shape_of(other)
            if large != shape_of(mine):
                aval = aval.update(shape=self.sized(shape_of(mine), large, eqn))
            var = self.new(aval)
            self.full[var] = large if self.part == self.size else shape_of(mine)
            self.twins[var] = mine
            env[mine] = var
            found.append(var)
        return tuple(found)

    def sized(self, whole: Any, twice: Any, eqn: JaxprEqn | None) -> Any:
        """Sizes for the part."""
        if isinstance(whole, tuple | list):
            return type(whole)(self.sized(a, b, eqn) for a, b in zip(whole, twice, strict=True))
        if not _changes(whole, twice) or self.part == self.size:
            return whole
        if twice != 2 * whole or whole * self.part % self.size:
            raise TraceError(
                f"a size{_where(eqn)} is {whole} for a batch of {self.size} examples and {twice} for {2 * self.size}; "
                f"micro-batches of {self.part} need sizes that are multiples of the batch's, or do not depend on it"
            )
        return int(whole) * self.part // self.size

    # --------------------------------------------------------------------------------------------------- equations

    def equation(self, env: dict[Any, Any], whole: JaxprEqn, twice: JaxprEqn) -> JaxprEqn:
        self.require(whole.primitive is twice.primitive and len(whole.invars) == len(twice.invars), whole)
        operands = [v if isinstance(v, Literal) else env[v] for v in whole.invars]
        params = self.params(whole, twice)
        if whole.primitive.name in _CONTROL:
            pairs = list(zip(inner_jaxprs(whole), inner_jaxprs(twice), strict=True))
            params = replace_bodies(params, [self.body(a, b) for a, b in pairs])
        outs = self.made(env, whole.outvars, twice.outvars, whole)
        if outs:
            self.originals[outs[0]] = whole
        return whole.replace(invars=operands, outvars=list(outs), params=params)

    def params(self, whole: JaxprEqn, twice: JaxprEqn) -> dict[str, Any]:
        """Parameters for the part. Those of an equation that reads nothing of the batch stay: it runs as a whole."""
        name, found = whole.primitive.name, dict(whole.params)
        changed = [p for p, value in whole.params.items() if _changes(value, twice.params[p])]
        grows = [_grown(a, b) for a, b in zip(whole.invars, twice.invars, strict=True)]
        if self.part == self.size:
            return found
        self.require("length" not in changed, whole)
        if not any(grows) and name not in ("broadcast_in_dim", "iota"):
            return found
        for p in changed:
            sizes = p in _SIZES.get(name, ()) and len(found[p]) == len(twice.params[p])
            if sizes and name in ("slice", "dynamic_slice", "gather"):
                dims = {d for d, (a, b) in enumerate(zip(found[p], twice.params[p], strict=True)) if a != b}
                sizes = dims <= grows[0]
            if not sizes:
                raise TraceError(
                    f"{p} of {name} ({whole.source_info.name_stack}) depends on the batch size: {found[p]} for "
                    f"{self.size} examples, {twice.params[p]} for {2 * self.size}. In micro-batches the examples can't "
                    "be taken or written by their place in the batch; take that out of the step, or use "
                    "num_micro_batches=1"
                )
            found[p] = self.sized(found[p], twice.params[p], whole)
        return found

    def body(self, whole: ClosedJaxpr, twice: ClosedJaxpr) -> ClosedJaxpr:
        flat = self.flat(flatten(whole), flatten(twice))
        return body_of(flat.equations, flat.inputs, flat.outputs, flat.constants)


def _where(eqn: JaxprEqn | None) -> str:
    return f" at {eqn.primitive.name} ({eqn.source_info.name_stack})" if eqn is not None else ""


def _check_effects(eqn: JaxprEqn) -> None:
    kinds = sorted({type(e).__name__ for e in eqn.effects} - {"DebugEffect"})
    if kinds:
        raise TraceError(
            f"{eqn.primitive.name} ({eqn.source_info.name_stack}) has side effects ({', '.join(kinds)}), which would "
            "happen once per micro-batch or not at all; take it out of the step"
        )


def _changes(whole: Any, twice: Any) -> bool:
    """Whether two parameters hold different whole numbers."""
    if _is_list(whole) and _is_list(twice):
        return len(whole) != len(twice) or any(_changes(a, b) for a, b in zip(whole, twice, strict=True))
    return _is_count(whole) and _is_count(twice) and int(whole) != int(twice)


def _is_list(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _grown(whole: Any, twice: Any) -> set[int]:
    """The dims in which two variables differ."""
    shapes = (shape_of(v) for v in (whole, twice))
    return {d for d, (a, b) in enumerate(zip(*shapes, strict=True)) if a != b}


def _copy_of(held: Var, value: Any) -> JaxprEqn:
    """An equation that makes a copy of a constant. Places in the batch, and equal numbers, are made from nothing."""
    shape, dtype, iota = shape_of(held), dtype_of(held), jax.lax.broadcasted_iota
    if _is_plain(dtype) and np.all(np.asarray(value) == np.asarray(value).flat[0]):
        first = np.asarray(value).flat[0]
        return _only_equation(jax.make_jaxpr(lambda: jax.lax.full(shape, first, dtype))())
    for dim in range(len(shape)) if jax.numpy.issubdtype(dtype, np.integer) else ():
        if np.array_equal(np.asarray(value), np.indices(shape)[dim]):
            return _only_equation(jax.make_jaxpr(lambda d=dim: iota(dtype, shape, d))())
    copy = _only_equation(jax.make_jaxpr(jax.numpy.copy)(jax.ShapeDtypeStruct(shape, dtype)))
    return copy.replace(invars=[held])


def _is_plain(dtype: Any) -> bool:
    return not jax.numpy.issubdtype(dtype, jax.dtypes.extended)


def _only_equation(closed: ClosedJaxpr) -> JaxprEqn:
    (eqn,) = flatten(closed).equations
    return eqn
