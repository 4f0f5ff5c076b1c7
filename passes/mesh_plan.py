"""The sharding of everything that one mesh of a pipeline runs: builds its problem, solves it, reads times and memory.

Contract
    Input: a `Composite`, a `CostModel` of the mesh, how many micro-batches are in flight in each stage.
    Output: `MeshSolution`. Raises: `InfeasibleError` where nothing fits the memory budget, with the bytes needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jax.extend.core import Var

from alpa_like.cost import CostModel
from alpa_like.errors import InfeasibleError
from alpa_like.graph import dtype_bits
from alpa_like.passes.assignment import Solution, Usage
from alpa_like.passes.avals import dtype_of
from alpa_like.passes.batch_rules import Same, Split, Status
from alpa_like.passes.compose import Composite
from alpa_like.passes.eliminate import Memo
from alpa_like.passes.groups import ACCUMULATE, Groups, form_groups
from alpa_like.passes.intra import Decision, Restrictions, ShardingProblem, Shared, Spec, build
from alpa_like.passes.liveness import Flying, Liveness
from alpa_like.passes.narrow import Charges, charged
from alpa_like.passes.pieces import StagePiece
from alpa_like.passes.pins import PinWriter, by_seconds
from alpa_like.passes.solve import estimate, least_memory, solve
from alpa_like.plan import PartialSum, Pin
from alpa_like.schedule import Kind
from alpa_like.texts import bytes_text

__all__ = ["Held", "MeshProblem", "MeshSolution", "SolverOptions", "Stock"]


@dataclass(frozen=True, slots=True, order=True)
class Held:
    """What a stage keeps of a micro-batch from the begin of its task `since` to the end of its task `until`."""

    stage: int
    since: Kind
    until: Kind


@dataclass(frozen=True, slots=True)
class SolverOptions:
    """How a sharding problem is solved; see `methods.Method`."""

    solver: str = "auto"
    time_limit_s: float = 600.0
    gap: float = 1e-3


@dataclass(frozen=True, slots=True)
class Stock:
    """What problems of the same cost model share, and what eliminations made, which is remembered for all of them."""

    memo: Memo = field(default_factory=Memo)
    charges: Charges = field(default_factory=dict[object, Any])
    known: dict[CostModel, Shared] = field(default_factory=dict[CostModel, Shared])

    def of(self, cost: CostModel) -> Shared:
        """What the problems of a cost model share."""
        return self.known.setdefault(cost, Shared())


@dataclass(frozen=True)
class MeshProblem:
    """What has to be decided for one mesh. `stored` pairs arguments with the results that take their place."""

    composite: Composite
    statuses: Mapping[Var, Status]
    stored: tuple[tuple[Var, Var], ...]
    donated: frozenset[Var]
    results: tuple[Var, ...]
    batch: frozenset[Var] = frozenset()
    built: dict[object, tuple[Liveness, ShardingProblem]] = field(default_factory=dict, compare=False, repr=False)
    least: dict[object, float] = field(default_factory=dict[object, float], compare=False, repr=False)

    @cached_property
    def replaced(self) -> dict[Var, tuple[int, int]]:
        """State that comes back here: the argument, and the flat argument and result numbers."""
        arguments = {v: i for i, v in enumerate(self.composite.arguments)}
        results = {v: i for i, v in enumerate(v for v in self.results if v in self.composite.tensors)}
        return {a: (arguments[a], results[r]) for a, r in self.stored if a in arguments and r in results}

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Flat argument and result numbers of what comes back."""
        return tuple(self.replaced.values())

    @cached_property
    def groups(self) -> Groups:
        return form_groups(self.composite.graph, self.pairs, self.composite.segments)

    @cached_property
    def held(self) -> dict[int, Held]:
        """Tensors that a piece leaves for later pieces of its micro-batch."""
        return {t: self.holding(*pieces) for t, pieces in self.leaving.items()}

    @cached_property
    def leaving(self) -> dict[int, tuple[int, int]]:
        """The tensors of `held`: the numbers of the piece that leaves them and of the last piece that reads them."""
        found: dict[int, tuple[int, int]] = {}
        graph = self.composite.graph
        for number, (piece, (first, last)) in enumerate(zip(self.composite.pieces, self.composite.spans, strict=True)):
            if piece.kind not in ("forward", "input_grad"):
                continue
            incoming = [self.composite.arguments[v] for v in piece.inputs if self.is_micro_argument(v)]
            made = [t for op in graph.ops[first:last] for t in op.results]
            for tensor in (*incoming, *made):
                reader = max((op for op, _ in graph.uses[tensor]), default=-1)
                if reader >= last:
                    found[tensor] = number, self.composite.piece_of(reader)
        accumulated = {graph.ops[op].operands[0] for op in self.composite.accumulate.values()}
        return {t: pieces for t, pieces in found.items() if t not in accumulated}

    def holding(self, maker: int, reader: int) -> Held:
        """What is read last in the first half of a split backward pass is free behind that; all else at its end."""
        made, read = self.composite.pieces[maker], self.composite.pieces[reader]
        early = read.kind == "input_grad" and read.stage == made.stage
        since: Kind = "input_grad" if made.kind == "input_grad" else "forward"
        until: Kind = "input_grad" if early else "weight_grad"
        return Held(made.stage, since, until)

    @cached_property
    def entering(self) -> tuple[int, ...]:
        """Tensors that forward pieces read from other meshes' pieces or hand from layer to layer."""
        found: dict[int, None] = {}
        made: set[Var] = set()
        for piece in self.composite.pieces:
            if piece.kind == "forward":
                passed = [v for v in piece.inputs if v in made or (self.is_micro_argument(v) and v not in self.batch)]
                found.update((self.composite.tensors[v], None) for v in passed)
                made.update(piece.outputs)
        return tuple(found)

    def is_micro_argument(self, var: Var) -> bool:
        return var in self.composite.arguments and not isinstance(self.statuses.get(var, Same()), Same)

    @cached_property
    def kept(self) -> frozenset[int]:
        """Tensors that one piece makes and another reads, or that leave the mesh."""
        passed = {v for p in self.composite.pieces for v in p.outputs} & set(self.composite.tensors)
        return frozenset(self.composite.tensors[v] for v in passed) | frozenset(self.composite.totals.values())

    @cached_property
    def micro(self) -> tuple[int, int]:
        """The ops of micro-batches, half-open."""
        spans = [s for p, s in zip(self.composite.pieces, self.composite.spans, strict=True) if p.is_micro]
        return (spans[0][0], spans[-1][1]) if spans else (0, 0)

    def flying(self, tensor: int, count: float) -> Flying:
        """A tensor of `held` where `count` micro-batches hold it."""
        maker, reader = (self.composite.spans[piece] for piece in self.leaving[tensor])
        return Flying(count, maker[0], reader[1], self.micro)

    def liveness(self, cost: CostModel, in_flight: Mapping[Held, int]) -> Liveness:
        graph = self.composite.graph
        batch = [self.composite.arguments[v] for v in self.composite.arguments if self.status_dim(v) == 0]
        written = frozenset(pair for var, pair in self.replaced.items() if var in self.donated)
        flying = {t: self.flying(t, float(in_flight.get(h, 1))) for t, h in self.held.items()}
        again = cost.computes_again
        return Liveness(graph, written, frozenset(batch), self.composite.segments, self.kept, flying, again)

    def status_dim(self, var: Var) -> int:
        status = self.statuses.get(var)
        return status.dim if isinstance(status, Split) else -1

    def restrictions(self) -> Restrictions:
        """Typed random keys stay whole: their data has a dim that their type does not show."""
        keys = [v for v in (*self.composite.tensors, *self.composite.totals) if str(dtype_of(v)).startswith("key<")]
        tensors: dict[tuple[int, str], Spec] = {}
        for var in keys:
            tensor = self.composite.tensors[var]
            whole = ((),) * len(self.composite.graph.tensors[tensor].shape)
            tensors[(tensor, "home")] = tensors[(tensor, "out")] = whole
        return Restrictions(tensors)

    def build(
        self, cost: CostModel, in_flight: Mapping[Held, int], stock: Stock | None = None
    ) -> tuple[Liveness, ShardingProblem]:
        """What there is to decide on the mesh of `cost`; remembered, as it is asked for with many prices of memory."""
        key = (cost, tuple(sorted(in_flight.items())))
        if key not in self.built:
            liveness = self.liveness(cost, in_flight)
            shared = stock.of(cost) if stock else None
            self.built[key] = liveness, build(self.groups, cost, liveness, self.restrictions(), shared)
        return self.built[key]

    def solve(
        self, cost: CostModel, budget: float, in_flight: Mapping[Held, int], options: SolverOptions
    ) -> MeshSolution:
        """The best sharding on the mesh of `cost`; `InfeasibleError` where it needs more than `budget` bytes."""
        liveness, problem = self.build(cost, in_flight)
        limited = replace(problem.problem, limit=budget)
        try:
            solution = solve(limited, solver=options.solver, time_limit_s=options.time_limit_s, gap=options.gap)
        except InfeasibleError:
            raise self.too_large(self.least_bytes(cost, in_flight), budget) from None
        return MeshSolution(self, cost, liveness, replace(problem, problem=limited), solution)

    def least_bytes(self, cost: CostModel, in_flight: Mapping[Held, int]) -> float:
        """A lower bound on the peak per device on the mesh of `cost`."""
        key = (cost, tuple(sorted(in_flight.items())))
        if key not in self.least:
            self.least[key] = least_memory(self.build(cost, in_flight)[1].problem)
        return self.least[key]

    @staticmethod
    def too_large(least: float, budget: float) -> InfeasibleError:
        return InfeasibleError(f"at least {bytes_text(least)} per device are needed, {bytes_text(budget)} are there")

    def price(
        self,
        cost: CostModel,
        in_flight: Mapping[Held, int],
        options: SolverOptions,
        price_s_per_byte: float,
        stock: Stock | None = None,
        *,
        exact: bool = True,
    ) -> MeshSolution:
        """The best sharding where bytes that are held all step, or per micro-batch in flight, cost seconds.

        Where it is not to be `exact`, a good one does that is found faster.
        """
        here = stock or Stock()
        liveness, problem = self.build(cost, in_flight, here)
        base = replace(problem.problem, usages=())
        if price_s_per_byte:
            base = replace(base, unary=charged(base.unary, problem.lasting, price_s_per_byte, here.charges))
        find = solve if exact else estimate
        solution = find(base, solver=options.solver, time_limit_s=options.time_limit_s, memo=here.memo)
        return MeshSolution(self, cost, liveness, problem, solution)


@dataclass(frozen=True)
class MeshSolution:
    """A solved mesh, and what it says about times, memory and layouts."""

    mesh: MeshProblem
    cost: CostModel
    liveness: Liveness
    problem: ShardingProblem
    solution: Solution
    flying: Mapping[Held, int] = field(default_factory=dict[Held, int])

    @cached_property
    def decision(self) -> Decision:
        return self.problem.decode(self.solution.choice)

    @cached_property
    def writer(self) -> PinWriter:
        return PinWriter(
            self.problem.groups,
            self.cost,
            self.decision,
            self.liveness,
            self.mesh.composite.segments,
            self.problem.spaces,
        )

    @cached_property
    def pins(self) -> tuple[Pin, ...]:
        """The layouts to enforce, by ops of the composite graph."""
        return self.writer.pins()

    @cached_property
    def sums(self) -> tuple[PartialSum, ...]:
        """What is reduced once, by ops of the composite graph."""
        return self.writer.sums()

    def spec(self, tensor: int) -> Spec:
        """How a tensor lies where pieces hand it on; a result of the step as it leaves."""
        leaves = tensor in self.mesh.composite.graph.results and (tensor, "out") in self.decision.layouts
        return self.writer.spec(tensor, "out" if leaves else "home")

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds of one run of each piece, by name."""
        found: dict[str, float] = {}
        for piece, total in zip(self.mesh.composite.pieces, self._by_piece(self._op_seconds()), strict=True):
            found[piece.name] = total / self._runs(piece)
        return found

    @cached_property
    def collective_s(self) -> dict[str, tuple[tuple[str, float], ...]]:
        """Seconds by kind of collective in one run of each piece, by its name."""
        ops = len(self.mesh.composite.graph.ops)
        kinds: dict[str, list[float]] = {}
        for reshard in self.writer.reshards():
            for kind, seconds in reshard.seconds(self.cost).items():
                kinds.setdefault(kind, [0.0] * (ops + 1))[min(reshard.op, ops)] += seconds
        found: dict[str, dict[str, float]] = {p.name: {} for p in self.mesh.composite.pieces}
        for kind, seconds in kinds.items():
            for piece, total in zip(self.mesh.composite.pieces, self._by_piece(seconds), strict=True):
                found[piece.name][kind] = total / self._runs(piece)
        return {name: by_seconds(total) for name, total in found.items()}

    def _runs(self, piece: StagePiece) -> float:
        return max(self.mesh.composite.segments.counts) if piece.is_micro else 1.0

    def _by_piece(self, seconds: Sequence[float]) -> list[float]:
        """Sums over the ops of each piece. Adding up a gradient counts to the backward piece that makes it."""
        ops = self.mesh.composite.graph.ops
        made = {t: i for i, op in enumerate(ops) for t in op.results}
        totals = [0.0] * len(self.mesh.composite.pieces)
        for number, value in enumerate(seconds):
            place = number
            if number < len(ops) and ops[number].name == ACCUMULATE:
                place = made.get(ops[number].operands[0], 0)
            totals[self.mesh.composite.piece_of(place)] += value
        return totals

    def _op_seconds(self) -> list[float]:
        """Seconds of a step by op; those of a group go to the ops that make its members. The last entry is the rest."""
        graph = self.mesh.composite.graph
        found = [0.0] * (len(graph.ops) + 1)
        first = len(self.problem.groups.shapes)
        for i, op in enumerate(self.problem.groups.nodes):
            found[op] += float(self.problem.compute[first + i][self.solution.choice[first + i]])
        for group, members in enumerate(self.problem.groups.by_group):
            self._share_group(group, [m.tensor for m in members if m.version == "home"], found)
        for op, seconds in self.problem.reshard_s(self.solution.choice):
            found[min(op, len(graph.ops))] += seconds
        return found

    def _share_group(self, group: int, tensors: list[int], found: list[float]) -> None:
        graph = self.mesh.composite.graph
        total = float(self.problem.compute[group][self.solution.choice[group]])
        weights = [graph.tensors[t].bytes * self.liveness.passes(t) for t in tensors]
        for tensor, weight in zip(tensors, weights, strict=True):
            if weight and sum(weights):
                maker = graph.tensors[tensor].op
                place = maker if maker >= 0 else graph.uses[tensor][0][0]
                found[place] += total * weight / sum(weights)

    @cached_property
    def in_flight_bytes(self) -> dict[Held, float]:
        """Bytes per device that one micro-batch in flight takes, by stage and from when to when."""
        found: dict[Held, float] = {}
        for tensor, held in self.mesh.held.items():
            found[held] = found.get(held, 0.0) + self.local_bytes(tensor)
        return found

    @cached_property
    def counts(self) -> dict[Held, float]:
        """The micro-batches in flight that `flying` says, else those that it was solved for."""
        solved = {h: self.liveness.flying[t].count for t, h in self.mesh.held.items()}
        return {h: float(self.flying.get(h, n)) for h, n in solved.items()}

    def micro_bytes(self, stage: int) -> float:
        """Bytes per device that a stage holds of a micro-batch in flight.

        Where some of it is held for fewer micro-batches than the rest, so much less: times the micro-batches in flight
        it is what the stage holds in all.
        """
        mine = {h: n for h, n in self.counts.items() if h.stage == stage}
        return sum(n * self.in_flight_bytes[h] for h, n in mine.items()) / max(mine.values(), default=1.0)

    def local_bytes(self, tensor: int) -> float:
        t = self.mesh.composite.graph.tensors[tensor]
        parts = [math.prod(self.cost.mesh_shape[a] for a in axes) for axes in self.writer.spec(tensor, "home")]
        return math.prod(-(-n // k) for n, k in zip(t.shape, parts, strict=True)) * dtype_bits(t.dtype) / 8

    @cached_property
    def fixed_bytes(self) -> float:
        """Bytes per device that are held all step: the state, and what is accumulated."""
        choice = self.solution.choice
        lasting = sum(float(u.bytes[choice[u.node]]) for u in self.problem.lasting)
        flying = sum(self.local_bytes(t) * max(1.0, self.liveness.flying[t].count) for t in self.mesh.held)
        return max(0.0, lasting - flying)

    @cached_property
    def memory_bytes(self) -> float:
        """Peak per device, with the micro-batches in flight that `counts` says."""
        problem = self.problem.problem
        solved_for = {id(u) for u in self.problem.others}
        own = tuple(u for u in problem.usages if id(u) not in solved_for)
        return replace(problem, usages=(*own, *self._others())).memory(self.solution.choice)[0]

    def _others(self) -> list[Usage]:
        """Memory of the micro-batches in flight but the one that the graph runs for, as they were decided."""
        found: dict[tuple[int, int], float] = {}
        for tensor, held in self.mesh.held.items():
            for start, end, count in self.mesh.flying(tensor, self.counts[held]).others:
                found[start, end] = found.get((start, end), 0.0) + count * self.local_bytes(tensor)
        like = self.problem.problem.unary[0]
        return [Usage(0, *time, np.full(like.shape, nbytes)) for time, nbytes in found.items()]

    @cached_property
    def step_s(self) -> float:
        """Seconds of all that the mesh does in a step, without waiting."""
        micro = max(self.mesh.composite.segments.counts)
        runs = {p.name: micro if p.is_micro else 1.0 for p in self.mesh.composite.pieces}
        return sum(seconds * runs[name] for name, seconds in self.seconds.items())

    def in_flight(self, flying: Mapping[Held, int]) -> MeshSolution:
        """The same with other numbers of micro-batches in flight."""
        return replace(self, flying=dict(flying))
