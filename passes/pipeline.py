"""A cut of the model into stages → the `Plan` of a pipeline: pieces, shardings, schedule, predicted times and memory.

Contract
    Input: `Layers`, a `Cluster`, the stages with their devices and meshes. Output: a verified `Plan`.
    Raises: `InfeasibleError` where a stage does not fit in memory: which, how many bytes, what would help.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jax.extend.core import Var

from alpa_like.cluster import Cluster
from alpa_like.cost import CostModel, RingCost
from alpa_like.errors import InfeasibleError, SolverError
from alpa_like.graph import skeleton
from alpa_like.passes.avals import shape_of
from alpa_like.passes.compose import GraphReader, compose
from alpa_like.passes.layers import Layers
from alpa_like.passes.layouts import PARTIAL
from alpa_like.passes.mesh_plan import Held, MeshProblem, MeshSolution, SolverOptions, Stock
from alpa_like.passes.microbatch import MicroProgram
from alpa_like.passes.pieces import Pieces, StagePiece, StageRange, form_pieces
from alpa_like.pipeshard import PipeshardParallel
from alpa_like.plan import (
    Accumulator,
    PartialSum,
    Pipeline,
    PipelineStage,
    Placed,
    Plan,
    Predicted,
    SolverReport,
    Spec,
    StagePlan,
)
from alpa_like.reshard import Layout, plan_transfer
from alpa_like.schedule import Schedule, make_schedule
from alpa_like.simulate import simulate
from alpa_like.tracer import Trace

__all__ = ["PipelineWriter", "StageSpec", "value_names"]

_LOWEST_PRICE, _HIGHEST_PRICE, _DEARER = 0.1, 100.0, 3.0
"""Prices of all memory, in ideal step times, that are tried where a stage does not fit: each so many times the last."""

_SURELY_DEAR = 1.0
"""The price above which it is not raised further where the last rise saved no memory."""

_PROOF_S, _PROVEN_OPS = 10.0, 3000
"""Seconds for the optimum of a stage, for which a good solution is known already, and how many ops it has at most."""

_STAGE_GAP = 0.01
"""How near the optimum a stage has to be that only fits with prices for the moments when memory is fullest."""

_USUAL_IN_FLIGHT = 4
"""Micro-batches in flight that a price of memory reckons with."""

EMULATED = "cpu"
"""What JAX calls the devices that it emulates; their compiler has no reduce-scatter."""


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage to plan: its layers, the first device and the (hosts, devices per host) that it has, its mesh or None.

    Stages with the same devices share a mesh. `price` is the price of memory to begin with (`stage_costs.Tag`).
    """

    first: int
    last: int
    start: int
    hosts: int
    devices_per_host: int
    mesh_shape: tuple[int, ...] | None = None
    remat: bool = False
    price: float = 0.0

    @property
    def devices(self) -> tuple[int, int]:
        return (self.start, self.hosts * self.devices_per_host)


def meshes_of(specs: Sequence[StageSpec]) -> list[int]:
    """The mesh number of every stage: one per set of devices, in the order of the stages."""
    numbers: dict[tuple[int, int], int] = {}
    return [numbers.setdefault(s.devices, len(numbers)) for s in specs]


def value_names(trace: Trace, pieces: Pieces) -> dict[Var, str]:
    """What values are called in plans: paths of arguments and results, else the piece that makes them and a number."""
    program = pieces.layers.program
    names: dict[Var, str] = {}
    for piece in pieces.pieces:
        names.update((v, f"{piece.name}[{i}]") for i, v in enumerate(piece.outputs))
    for leaf, var in zip(trace.results, program.outputs, strict=True):
        if isinstance(var, Var) and var not in program.inputs:
            names[var] = leaf.path
    for leaf, var in zip(trace.arguments, program.inputs, strict=True):
        names[var] = leaf.path
        names[program.whole_batch[var]] = f"{leaf.path} (whole batch)"
    if program.index is not None:
        names[program.index] = "micro-batch"
    return names


@dataclass
class PipelineWriter:
    """Plans given stages. Solved meshes are remembered, so that equal stages and repeated calls cost nothing.

    `ideal_s` is the least that a step could take, in which prices of memory are given.
    """

    trace: Trace
    cluster: Cluster
    method: PipeshardParallel
    reader: GraphReader = field(init=False)
    ideal_s: float = 1.0
    solved: dict[object, MeshSolution] = field(default_factory=dict[object, MeshSolution])
    stock: Stock = field(default_factory=Stock)

    def __post_init__(self) -> None:
        self.reader = GraphReader(self.trace.platform)

    @property
    def budget(self) -> float:
        return self.method.memory_budget_bytes or float(self.cluster.device.memory_bytes)

    @property
    def options(self) -> SolverOptions:
        return SolverOptions(self.method.solver, self.method.time_limit_s, self.method.gap)

    def plan(self, layers: Layers, specs: Sequence[StageSpec], schedule: Schedule) -> Plan:
        """The plan of these stages under this schedule."""
        meshes = meshes_of(specs)
        ranges = [StageRange(s.first, s.last, m, s.remat) for s, m in zip(specs, meshes, strict=True)]
        pieces = form_pieces(layers, ranges, split_backward=schedule.splits_backward)
        solutions = self.solve(pieces, specs, schedule)
        writer = _PlanWriter(self, pieces, tuple(specs), schedule, solutions)
        return writer.plan()

    def solve(self, pieces: Pieces, specs: Sequence[StageSpec], schedule: Schedule) -> list[MeshSolution]:
        """The sharding of every mesh."""
        found: dict[int, MeshSolution] = {}
        for number in self.tightest_first(pieces, schedule):
            spec = next(s for s, r in zip(specs, pieces.stages, strict=True) if r.mesh == number)
            problem = mesh_problem(self.trace, pieces, number, self.reader)
            try:
                found[number] = self.best(problem, spec, schedule)
            except InfeasibleError as error:
                raise InfeasibleError(too_large(pieces, number, spec, schedule, str(error))) from None
        return [found[number] for number in range(pieces.num_meshes)]

    def tightest_first(self, pieces: Pieces, schedule: Schedule) -> list[int]:
        """The meshes, those first that hold more micro-batches than under 1F1B: what can't fit is found out early."""
        count = len(pieces.stages)
        most = {r.mesh: 0.0 for r in pieces.stages}
        for i, stage in enumerate(pieces.stages):
            most[stage.mesh] = max(most[stage.mesh], schedule.in_flight(i) / (count - i))
        return sorted(range(pieces.num_meshes), key=lambda mesh: (-most[mesh], mesh))

    def best(self, problem: MeshProblem, spec: StageSpec, schedule: Schedule) -> MeshSolution:
        """The fastest of the meshes that a stage may have."""
        part = self.cluster.part(spec.hosts, spec.devices_per_host)
        shapes = [spec.mesh_shape] if spec.mesh_shape else mesh_shapes(part)
        mine = {h: schedule.held(h.stage, h.since, h.until) for h in sorted(set(problem.held.values()))}
        found = [self.fitting(problem, part, shape, mine, spec.price) for shape in shapes]
        fits = [(s, price) for s, price in found if s.memory_bytes <= self.budget]
        if fits:
            solution, price = min(fits, key=lambda pair: pair[0].step_s)
            return self.proven(solution, price).in_flight(mine)
        cost = RingCost(part, shapes[0], native_reduce_scatter=self.native)
        options = replace(self.options, gap=max(self.options.gap, _STAGE_GAP))
        return problem.solve(cost, self.budget, mine, options)  # says what is missing, or finds what prices don't

    def fitting(
        self, problem: MeshProblem, part: Cluster, shape: tuple[int, ...], flying: Mapping[Held, int], price: float
    ) -> tuple[MeshSolution, float]:
        """A solution at the lowest price of memory at which it fits, and that price; the last where none does."""
        solution, before = self.priced(problem, part, shape, price).in_flight(flying), math.inf
        if solution.memory_bytes > self.budget and problem.least_bytes(solution.cost, flying) > self.budget:
            return solution, price
        while solution.memory_bytes > self.budget and price < _HIGHEST_PRICE:
            if solution.memory_bytes == before and price > _SURELY_DEAR:
                break  # a higher price saves nothing more
            before, price = solution.memory_bytes, max(price * _DEARER, _LOWEST_PRICE)
            solution = self.priced(problem, part, shape, price).in_flight(flying)
        return solution, price

    def proven(self, found: MeshSolution, price: float) -> MeshSolution:
        """The optimum at this price, if the stage is small enough to find it quickly, and if it fits and is better."""
        if found.solution.status == "optimal" or len(found.mesh.composite.graph.ops) > _PROVEN_OPS:
            return found
        options = replace(self.options, time_limit_s=min(self.options.time_limit_s, _PROOF_S))
        key = (problem_key(found.mesh), found.cost, price, "proven")
        if key not in self.solved:
            try:
                self.solved[key] = self.price_at(found.mesh, found.cost, price, options, exact=True)
            except SolverError:
                self.solved[key] = found
        best = replace(self.solved[key], mesh=found.mesh).in_flight(found.flying)
        return best if best.memory_bytes <= self.budget and best.step_s <= found.step_s else found

    def price_at(
        self, problem: MeshProblem, cost: CostModel, price: float, options: SolverOptions, *, exact: bool
    ) -> MeshSolution:
        stages = dict.fromkeys(problem.held.values(), _USUAL_IN_FLIGHT)
        return problem.price(cost, stages, options, price * self.ideal_s / self.budget, self.stock, exact=exact)

    @property
    def native(self) -> bool:
        return self.cluster.device.name != EMULATED

    def priced(self, problem: MeshProblem, part: Cluster, shape: tuple[int, ...], price: float) -> MeshSolution:
        key = (problem_key(problem), part, shape, price)
        known = self.solved.get(key)
        if known is None:
            cost = RingCost(part, shape, native_reduce_scatter=self.native)
            known = self.solved[key] = self.price_at(problem, cost, price, self.options, exact=False)
        return known if known.mesh is problem else replace(known, mesh=problem)


def problem_key(problem: MeshProblem) -> object:
    """Equal for problems that have the same answer."""
    c = problem.composite
    held = tuple(sorted((t, sorted(set(problem.held.values())).index(s)) for t, s in problem.held.items()))
    return c.graph.digest, c.spans, c.segments, problem.pairs, held, len(problem.donated), tuple(sorted(problem.kept))


def mesh_shapes(part: Cluster) -> list[tuple[int, ...]]:
    """The meshes to try: all devices in a row, and every division into two axes."""
    count = part.num_devices
    return [(count,), *((n, count // n) for n in range(2, count) if count % n == 0)]


def mesh_problem(trace: Trace, pieces: Pieces, mesh: int, reader: GraphReader) -> MeshProblem:
    """What one mesh of a pipeline has to decide."""
    return problem_of(trace, pieces, [p for p in pieces.pieces if p.mesh == mesh], reader)


def problem_of(trace: Trace, pieces: Pieces, mine: Sequence[StagePiece], reader: GraphReader) -> MeshProblem:
    """What has to be decided for pieces that share a mesh, in an order in which they can run."""
    program = pieces.layers.program
    made = {v for p in mine for v in p.outputs}
    accumulated = {v: op for v, op in pieces.layers.accumulated.items() if v in made}
    once = [v for v in pieces.results if v in made and (v in accumulated or not is_micro(pieces, v))]
    graphs = [reader.graph(pieces, p) for p in mine]
    composite = compose(mine, graphs, program.num_micro_batches, accumulated, once)
    stored = tuple(
        (program.inputs[a], program.outputs[r]) for a, r in trace.stored if isinstance(program.outputs[r], Var)
    )
    donated = frozenset(program.inputs[i] for i in trace.donated_leaves)
    batch = frozenset(program.inputs[i] for i in trace.batch)
    return MeshProblem(composite, program.statuses, stored, donated, tuple(once), batch)


def is_micro(pieces: Pieces, var: Var) -> bool:
    """Whether a value exists once per micro-batch."""
    maker = pieces.makers.get(var)
    return maker is not None and maker.is_micro


def too_large(pieces: Pieces, mesh: int, spec: StageSpec, schedule: Schedule, reason: str) -> str:
    stages = [i for i, s in enumerate(pieces.stages) if s.mesh == mesh]
    layers = ", ".join(f"{pieces.stages[i].first} to {pieces.stages[i].last}" for i in stages)
    flying = max(schedule.in_flight(i) for i in stages)
    remat = "" if spec.remat else 'rematerialization (AutoLayerOption(remat_mode="layer")), '
    return (
        f"stage {stages[0]} (layers {layers}) does not fit on its {spec.devices[1]} devices: {reason}, with {flying} "
        f"micro-batches in flight. Use {remat}more micro-batches, more devices or stages, or a larger "
        "memory_budget_bytes"
    )


# ------------------------------------------------------------------------------------------------- writing the plan


@dataclass
class _PlanWriter:
    owner: PipelineWriter
    pieces: Pieces
    specs: tuple[StageSpec, ...]
    schedule: Schedule
    solutions: list[MeshSolution]

    def __post_init__(self) -> None:
        self.names = value_names(self.owner.trace, self.pieces)
        self.program: MicroProgram = self.pieces.layers.program

    def plan(self) -> Plan:
        pipeline = self.pipeline()
        stages = tuple(self.stage(piece) for piece in self.pieces.pieces)
        return Plan(
            self.owner.trace.name,
            program_digest(self.owner.trace),
            self.owner.method.name,
            self.owner.cluster,
            stages,
            self.predicted(pipeline),
            self.report(),
            pipeline=pipeline,
        ).verify()

    # ---------------------------------------------------------------------------------------------------- stages

    def stage(self, piece: StagePiece) -> StagePlan:
        solution = self.solutions[piece.mesh]
        composite = solution.mesh.composite
        index = composite.pieces.index(piece)
        first, last = composite.spans[index]
        shape = solution.cost.mesh_shape
        return StagePlan(
            piece.name,
            shape,
            self.owner.method.names(shape),
            self.devices(piece.mesh),
            tuple(self.placed(piece, v) for v in piece.inputs),
            tuple(self.placed(piece, v) for v in piece.outputs),
            tuple(replace(p, op=p.op - first) for p in solution.pins if first <= p.op < last),
            tuple(
                replace(s, op=s.op - first, splits=_shifted(s, first)) for s in solution.sums if first <= s.op < last
            ),
            tuple(self.accumulators(piece, first)),
            skeleton(composite.graph, first, last),
            solution.collective_s[piece.name],
        )

    def devices(self, mesh: int) -> tuple[int, int]:
        return next(s.devices for s, r in zip(self.specs, self.pieces.stages, strict=True) if r.mesh == mesh)

    def placed(self, piece: StagePiece, var: Var) -> Placed:
        aval: Any = var.aval
        return Placed(self.names[var], tuple(aval.shape), str(aval.dtype), self.spec(piece, var))

    def spec(self, piece: StagePiece, var: Var) -> Spec:
        """How a piece has one of its inputs or outputs."""
        solution = self.solutions[piece.mesh]
        composite = solution.mesh.composite
        total = not piece.is_micro and var in composite.totals
        tensor = composite.totals[var] if total else composite.tensors[var]
        return solution.spec(tensor)[: len(shape_of(var))]

    def accumulators(self, piece: StagePiece, first: int) -> list[Accumulator]:
        solution = self.solutions[piece.mesh]
        composite = solution.mesh.composite
        held = {s.op: s for s in solution.sums}
        found: list[Accumulator] = []
        for number, var in enumerate(piece.outputs):
            op = composite.accumulate.get(var)
            if op is None:
                continue
            kind = self.pieces.layers.accumulated[var]
            total = solution.spec(composite.totals[var])
            if op in held:
                s = held[op]
                found.append(Accumulator(number, kind, s.axes, s.spec, _shifted(s, first), total))
            else:
                found.append(Accumulator(number, kind, (), self._whole(solution, op), (), total))
        return found

    def _whole(self, solution: MeshSolution, op: int) -> Spec:
        """The layout in which a micro-batch's share is added, without partial sums."""
        graph = solution.mesh.composite.graph
        rank = len(graph.tensors[graph.ops[op].results[0]].shape)
        strategy = solution.decision.strategies.get(op)
        if strategy is None:
            return solution.writer.spec(graph.ops[op].results[0], "home")
        return tuple(
            tuple(a for a, factor in enumerate(strategy) if factor == d and factor != PARTIAL) for d in range(rank)
        )

    # ------------------------------------------------------------------------------------------------- predictions

    def pipeline(self) -> Pipeline:
        layers = self.pieces.layers
        return Pipeline(
            self.program.num_micro_batches,
            self.schedule.name,
            layers.ends,
            layers.flops,
            tuple(self.stage_times(i) for i in range(len(self.pieces.stages))),
            tuple(self.send_s(i) for i in range(len(self.pieces.stages) - 1)),
            tuple(self.update_s(m) for m in range(self.pieces.num_meshes)),
            tuple(s.memory_bytes for s in self.solutions),
            self.owner.method.batch_statistics,
        )

    def stage_times(self, stage: int) -> PipelineStage:
        r = self.pieces.stages[stage]
        solution = self.solutions[r.mesh]
        seconds = {p.kind: solution.seconds[p.name] for p in solution.mesh.composite.pieces if p.stage == stage}
        inputs, weights = seconds.get("input_grad", 0.0), seconds.get("weight_grad", 0.0)
        backward = seconds.get("backward", inputs + weights)
        return PipelineStage(
            r.first, r.last, r.mesh, r.remat, self.schedule.in_flight(stage),
            solution.micro_bytes(stage), seconds.get("forward", 0.0), backward, inputs, weights,
        )  # fmt: skip

    def update_s(self, mesh: int) -> float:
        solution = self.solutions[mesh]
        return sum(solution.seconds[p.name] for p in solution.mesh.composite.pieces if not p.is_micro)

    def send_s(self, boundary: int) -> float:
        """Seconds that the activations take from one stage to the next."""
        source, target = self.pieces.stages[boundary], self.pieces.stages[boundary + 1]
        if source.mesh == target.mesh:
            return 0.0
        sender = next(p for p in self.pieces.pieces if p.kind == "forward" and p.stage == boundary)
        receiver = next(p for p in self.pieces.pieces if p.kind == "forward" and p.stage == boundary + 1)
        crossing = [v for v in sender.outputs if v in set(receiver.inputs)]
        return sum(self.transfer_s(sender, receiver, v) for v in crossing)

    def transfer_s(self, sender: StagePiece, receiver: StagePiece, var: Var) -> float:
        aval: Any = var.aval
        layouts = (self.layout(p, var) for p in (sender, receiver))
        size = max(1, getattr(aval.dtype, "itemsize", 8) or 8)
        return plan_transfer(tuple(aval.shape), size, *layouts).seconds(self.owner.cluster)

    def layout(self, piece: StagePiece, var: Var) -> Layout:
        shape = self.solutions[piece.mesh].cost.mesh_shape
        return Layout(shape, self.owner.method.names(shape), self.devices(piece.mesh), self.spec(piece, var))

    def predicted(self, pipeline: Pipeline) -> Predicted:
        simulation = simulate(self.schedule, pipeline.times())
        slowest = max(self.solutions, key=lambda s: s.step_s)
        compute = slowest.problem.compute_s(slowest.solution.choice)
        traffic: dict[str, float] = {}
        for solution in self.solutions:
            for kind, nbytes in solution.writer.traffic().items():
                traffic[kind] = max(traffic.get(kind, 0.0), nbytes)
        communication = max(0.0, slowest.step_s - compute)
        return Predicted(simulation.makespan_s, compute, communication, traffic, max(pipeline.memory_bytes))

    def report(self) -> SolverReport:
        found = [s.solution for s in self.solutions]
        return SolverReport(
            "optimal" if all(s.status == "optimal" for s in found) else found[0].status,
            max(s.gap for s in found),
            sum(s.seconds for s in found),
            sum(s.variables for s in found),
            next((s.solver for s in found if s.variables), found[0].solver),
            budget_bytes=self.owner.budget,
        )


def _shifted(total: PartialSum, first: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    return tuple((op - first, factors) for op, factors in total.splits)


def program_digest(trace: Trace) -> str:
    """Content hash of a traced step, without lowering it."""
    return hashlib.sha256(str(trace.jaxpr).encode()).hexdigest()[:16]


def schedule_of(name: str, specs: Sequence[StageSpec], num_micro_batches: int) -> Schedule:
    """A schedule for stages, some of which may share their mesh."""
    return make_schedule(name, len(specs), num_micro_batches, len({s.devices for s in specs}))
