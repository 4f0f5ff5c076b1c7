"""The pieces of one mesh as one operator graph, so that one sharding problem decides for all of them together.

Each piece is lowered alone and read as a graph; the graphs are put one behind the other, a value that one piece makes
and another reads being one tensor. What micro-batches accumulate passes through an op `accumulate`, behind which the
total is read once. Ops of pieces that run for every micro-batch count as often as there are micro-batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.extend.core import JaxprEqn, Literal, Var

from alpa_like import stablehlo
from alpa_like.graph import Op, OpGraph, Tensor, identity_rule
from alpa_like.passes.avals import type_of
from alpa_like.passes.flat import function_of
from alpa_like.passes.groups import ACCUMULATE, Segments
from alpa_like.passes.pieces import Pieces, StagePiece

__all__ = ["Composite", "GraphReader", "compose"]


class GraphReader:
    """Reads the graphs of pieces as they are lowered for `platform`; equal pieces are lowered once."""

    def __init__(self, platform: str | None = None) -> None:
        self.platform = platform
        self.known: dict[str, OpGraph] = {}
        self.names: dict[int, tuple[StagePiece, str]] = {}

    def fingerprint(self, pieces: Pieces, piece: StagePiece) -> str:
        """Equal for pieces that compute the same."""
        if id(piece) not in self.names:
            constants = pieces.layers.program.constants
            self.names[id(piece)] = (piece, fingerprint(piece.equations, piece.inputs, piece.outputs, constants))
        return self.names[id(piece)][1]

    def graph(self, pieces: Pieces, piece: StagePiece) -> OpGraph:
        key = self.fingerprint(pieces, piece)
        if key not in self.known:
            closed = pieces.jaxpr(piece)
            types = [type_of(v) for v in piece.inputs]
            traced = jax.jit(function_of(closed, "piece"), keep_unused=True).trace(*types)
            self.known[key] = stablehlo.graph_of(traced, self.platform)
        return self.known[key]


def fingerprint(
    equations: Iterable[JaxprEqn], inputs: Sequence[Var], outputs: Sequence[Var], constants: Mapping[Var, Any]
) -> str:
    """A hash of what equations compute, with variables numbered in the order in which they appear."""
    numbers: dict[Var, int] = {v: i for i, v in enumerate(inputs)}
    text = hashlib.sha256()

    def name(atom: Any) -> str:
        if isinstance(atom, Literal):
            return f"{atom.val}:{atom.aval}"
        if atom in constants:
            return f"constant {id(constants[atom])}"
        return str(numbers.setdefault(atom, len(numbers)))

    for eqn in equations:
        operands = [name(v) for v in eqn.invars]
        results = [f"{name(v)}:{v.aval}" for v in eqn.outvars]
        text.update(f"{eqn.primitive.name}{operands}{results}{eqn.params}".encode())
    text.update(f"{[name(v) for v in outputs]}{[str(v.aval) for v in inputs]}".encode())
    return text.hexdigest()


@dataclass(frozen=True)
class Composite:
    """One graph for a mesh. `spans` are the ops of each piece, `tensors` the tensor of each variable.

    `totals` are the tensors of accumulated variables when all micro-batches have added to them, `accumulate` the ops
    that do. Segments are the pieces, and before those of the update one for all accumulation.
    """

    graph: OpGraph
    pieces: tuple[StagePiece, ...]
    spans: tuple[tuple[int, int], ...]
    segments: Segments
    tensors: Mapping[Var, int]
    totals: Mapping[Var, int]
    accumulate: Mapping[Var, int]
    arguments: Mapping[Var, int]

    def piece_of(self, op: int) -> int:
        """The number of the piece that an op belongs to; the last one for what lies between pieces."""
        return next((i for i, (first, last) in enumerate(self.spans) if first <= op < last), len(self.spans) - 1)


def compose(
    pieces: Sequence[StagePiece], graphs: Sequence[OpGraph], num_micro_batches: int, accumulated: Mapping[Var, str],
    results: Sequence[Var],
) -> Composite:  # fmt: skip
    """The graph of pieces that share a mesh, in an order in which they can run; `results` are there at the end."""
    builder = _Composer(float(num_micro_batches), accumulated)
    for piece, graph in zip(pieces, graphs, strict=True):
        if not piece.is_micro and piece.kind == "update":
            builder.close_micro()
        builder.add(piece, graph)
    builder.close_micro()
    return builder.finish(tuple(pieces), results)


@dataclass
class _Composer:
    count: float
    accumulated: Mapping[Var, str]
    tensors: list[Tensor] = field(default_factory=list[Tensor])
    ops: list[Op] = field(default_factory=list[Op])
    aliases: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    env: dict[Var, int] = field(default_factory=dict[Var, int])
    totals: dict[Var, int] = field(default_factory=dict[Var, int])
    arguments: dict[Var, int] = field(default_factory=dict[Var, int])
    spans: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    starts: list[int] = field(default_factory=list[int])
    counts: list[float] = field(default_factory=list[float])
    accumulate: dict[Var, int] = field(default_factory=dict[Var, int])
    closed: bool = False

    def tensor(self, like: Tensor, op: int) -> int:
        self.tensors.append(Tensor(len(self.tensors), like.shape, like.dtype, op))
        return len(self.tensors) - 1

    def begin(self, count: float) -> None:
        self.starts.append(len(self.ops))
        self.counts.append(count)

    def add(self, piece: StagePiece, graph: OpGraph) -> None:
        weight = self.count if piece.is_micro else 1.0
        self.begin(weight)
        first = len(self.ops)
        here: dict[int, int] = {}
        for var, tensor in zip(piece.inputs, graph.arguments, strict=True):
            here[tensor] = self.incoming(var, graph.tensors[tensor])
        for op in graph.ops:
            number = len(self.ops)
            operands = tuple(here[t] for t in op.operands)
            for t in op.results:
                here[t] = self.tensor(graph.tensors[t], number)
            results = tuple(here[t] for t in op.results)
            self.ops.append(replace(op, id=number, operands=operands, results=results, count=op.count * weight))
        self.aliases.extend((here[a], here[b]) for a, b in graph.aliases)
        self.env.update((v, here[t]) for v, t in zip(piece.outputs, graph.results, strict=True))
        self.spans.append((first, len(self.ops)))

    def incoming(self, var: Var, like: Tensor) -> int:
        if self.closed and var in self.totals:
            return self.totals[var]
        if var not in self.env:
            self.env[var] = self.arguments[var] = self.tensor(like, -1)
        return self.env[var]

    def close_micro(self) -> None:
        """The accumulation of everything that the micro-batches have made here."""
        if self.closed:
            return
        self.closed = True
        self.begin(self.count)
        for var in self.accumulated:
            if var in self.env and var not in self.arguments:
                before = self.tensors[self.env[var]]
                total = self.tensor(before, len(self.ops))
                rule = identity_rule(before.shape)
                name = ACCUMULATE if self.accumulated[var] == "add" else f"{ACCUMULATE} by {self.accumulated[var]}"
                self.accumulate[var], self.totals[var] = len(self.ops), total
                self.ops.append(
                    Op(len(self.ops), name, (before.id,), (total,), rule, self.count, 0.0, ACCUMULATE, "", True)
                )

    def finish(self, pieces: tuple[StagePiece, ...], results: Sequence[Var]) -> Composite:
        ends = {**self.env, **self.totals}
        leaving = tuple(ends[v] for v in results if v in ends)
        graph = OpGraph(
            tuple(self.tensors), tuple(self.ops), tuple(self.arguments.values()), leaving, tuple(self.aliases)
        )
        graph.verify()
        segments = Segments(tuple(self.starts), tuple(self.counts))
        return Composite(
            graph, pieces, tuple(self.spans), segments, self.env, self.totals, self.accumulate, self.arguments
        )
