"""What a layer's forward pass keeps for its backward pass: the fewest bytes from which the rest follows cheaply.

Element-wise work (activation functions, masks, scales) is done again in the backward pass, where the compiler fuses it
into its readers, as it would if both passes were one program. Which values to keep is a minimum cut: of bytes, between
what is too costly to do again and what the backward pass reads (as in min-cut partitioning of PyTorch's AOTAutograd).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import networkx as nx
from jax.extend.core import JaxprEqn, Var

from alpa_like.passes.flat import nbytes, reads

__all__ = ["cheap_again"]

_AGAIN = frozenset(
    [
        "abs",
        "add",
        "add_any",
        "and",
        "broadcast_in_dim",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "cos",
        "div",
        "eq",
        "erf",
        "exp",
        "exp2",
        "expand_dims",
        "expm1",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "iota",
        "is_finite",
        "le",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "not",
        "or",
        "pow",
        "reshape",
        "round",
        "rsqrt",
        "select_n",
        "sign",
        "sin",
        "sqrt",
        "square",
        "squeeze",
        "stop_gradient",
        "sub",
        "tanh",
        "transpose",
        "xor",
    ]
)
"""Primitives that compilers fuse into what reads them."""

_LIMITLESS = float("inf")


def cheap_again(forward: Sequence[JaxprEqn], needed: Iterable[Var], free: set[Var]) -> dict[Var, JaxprEqn]:
    """The forward equations that the backward pass does again, by what they make.

    `needed` is what the backward pass reads of the forward pass; `free` is there anyway: parameters, the batch, what
    the backward pass reads of other layers.
    """
    made = {v: e for e in forward for v in e.outvars}
    goals = [v for v in dict.fromkeys(needed) if v in made]
    again = {v: e for v, e in made.items() if e.primitive.name in _AGAIN}
    graph = _graph(goals, made, again, free)
    if not graph.has_node("goal") or not graph.has_node("start"):
        return {v: e for v, e in _cone(goals, again).items()}
    _, (near, _) = nx.minimum_cut(graph, "start", "goal", flow_func=nx.algorithms.flow.boykov_kolmogorov)
    kept = {v for kind, v in (n for n in near if isinstance(n, tuple)) if kind == "in" and ("out", v) not in near}
    return _cone([v for v in goals if v not in kept], {v: e for v, e in again.items() if v not in kept})


def _graph(goals: Sequence[Var], made: dict[Var, JaxprEqn], again: dict[Var, JaxprEqn], free: set[Var]) -> Any:
    """Every value has an edge as wide as it is large; equations that may be done again join values without limit."""
    graph: Any = nx.DiGraph()
    pending, seen = list(goals), set[Var]()
    for var in goals:
        graph.add_edge(("out", var), "goal", capacity=_LIMITLESS)
    while pending:
        var = pending.pop()
        if var in seen or var in free:
            continue
        seen.add(var)
        graph.add_edge(("in", var), ("out", var), capacity=nbytes(var) + 1.0)
        if var not in again:
            graph.add_edge("start", ("in", var), capacity=_LIMITLESS)
            continue
        for operand in reads(again[var]):
            if operand in free:
                continue
            graph.add_edge(("out", operand), ("in", var), capacity=_LIMITLESS)
            pending.append(operand)
    return graph


def _cone(goals: Sequence[Var], again: dict[Var, JaxprEqn]) -> dict[Var, JaxprEqn]:
    """The equations that lead to the goals, by what they make."""
    found: dict[Var, JaxprEqn] = {}
    pending = list(goals)
    while pending:
        var = pending.pop()
        if var in again and var not in found:
            found[var] = again[var]
            pending.extend(reads(again[var]))
    return found
