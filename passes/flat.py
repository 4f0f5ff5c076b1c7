"""A jaxpr as one flat list of equations, and functions of parts of it.

Calls (`jit`, custom derivatives) are stepped into, so that a program can be cut between any two equations; control
flow and rematerialization stay whole. Every equation keeps its name stack, joined with that of the calls around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.extend import core, source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

__all__ = ["Flat", "equation_flops", "flatten", "function_of", "inner_jaxprs", "nbytes", "reads", "sub_jaxpr"]

_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_lin")
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclass(frozen=True)
class Flat:
    """Equations in program order. Every variable is made once; `constants` are arrays closed over."""

    equations: tuple[JaxprEqn, ...]
    inputs: tuple[Var, ...]
    outputs: tuple[Any, ...]
    constants: dict[Var, Any]


def flatten(closed: ClosedJaxpr) -> Flat:
    """Step into all calls. The variables are new, so two flattenings share none."""
    inliner = _Inliner()
    inputs = tuple(inliner.fresh(v) for v in closed.jaxpr.invars)
    outputs = inliner.inline(closed.jaxpr, closed.consts, inputs, source_info_util.new_name_stack())
    return Flat(tuple(inliner.equations), inputs, tuple(outputs), inliner.constants)


class _Inliner:
    def __init__(self) -> None:
        self.equations: list[JaxprEqn] = []
        self.constants: dict[Var, Any] = {}
        self.known: dict[int, Var] = {}
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
            body = _body(eqn)
            if body is not None:
                results = self.inline(body.jaxpr, body.consts, operands, names)
                env.update(zip(eqn.outvars, results, strict=True))
                continue
            outs = [self.fresh(v) for v in eqn.outvars]
            env.update(zip(eqn.outvars, outs, strict=True))
            info = eqn.source_info.replace(name_stack=names)
            self.equations.append(eqn.replace(invars=operands, outvars=outs, source_info=info))
        return [read(v) for v in jaxpr.outvars]


def _body(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """What a call runs; None for equations that are no calls."""
    if eqn.primitive.name not in _CALLS:
        return None
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
    aval = var.aval
    if not hasattr(aval, "shape"):
        return 0.0
    size = getattr(aval.dtype, "itemsize", 0) or 8
    return float(math.prod(aval.shape) * size)


def equation_flops(eqn: JaxprEqn) -> float:
    """Floating-point operations: 2 per multiply-add of contractions, 1 per element of results otherwise."""
    name = eqn.primitive.name
    out = sum(math.prod(getattr(v.aval, "shape", ())) for v in eqn.outvars)
    if name == "dot_general":
        (contracting, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * out * math.prod(eqn.invars[0].aval.shape[d] for d in contracting)
    if name == "conv_general_dilated":
        kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
        return 2.0 * out * math.prod(kernel) / max(1, kernel[spec[0]])
    bodies = inner_jaxprs(eqn)
    if not bodies:
        return float(out)
    costs = [sum(equation_flops(e) for e in body.jaxpr.eqns) for body in bodies]
    return float(eqn.params.get("length", 1)) * (max(costs) if name == "cond" else sum(costs))


def is_zero(atom: Any) -> bool:
    """Whether an atom is the literal 0."""
    return isinstance(atom, Literal) and np.ndim(atom.val) == 0 and bool(np.asarray(atom.val) == 0)
