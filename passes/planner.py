"""Trace and method → `Plan`: tries every mesh that the method allows and keeps the fastest that fits.

Of meshes that are as fast as each other it keeps the one with the fewest axes.

Contract
    Input: a `Trace`, a `Cluster`, a method. Output: a verified `Plan`.
    Raises: `InfeasibleError` where no plan fits the memory budget (how much is missing, what is largest),
    `MethodError` and `PlanError` for options that contradict each other, `SolverError` where time runs out.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace

from alpa_like.cluster import Cluster
from alpa_like.cost import CostModel, RingCost
from alpa_like.errors import InfeasibleError
from alpa_like.graph import OpGraph
from alpa_like.methods import Method
from alpa_like.passes.activations import activations
from alpa_like.passes.assignment import Solution
from alpa_like.passes.groups import Groups, form_groups
from alpa_like.passes.intra import Restrictions, ShardingProblem, build
from alpa_like.passes.liveness import Liveness
from alpa_like.passes.pins import PinWriter
from alpa_like.passes.solve import least_memory, solve
from alpa_like.plan import Candidate, Placed, Plan, Predicted, SolverReport, Spec, StagePlan
from alpa_like.texts import bytes_text
from alpa_like.tracer import Leaf, Trace

__all__ = ["make_plan"]

logger = logging.getLogger("alpa_like")

_EMULATED = "cpu"
"""What JAX calls the devices that it emulates; their compiler has no reduce-scatter."""


_CLEARLY = 0.02
"""The share of a step that a mesh of more axes must save. Predictions are off by more than that, and what they leave
out, such as copies into the order that a kernel wants, grows with the number of dims that are cut."""


@dataclass(frozen=True, slots=True)
class _Solved:
    cost: CostModel
    problem: ShardingProblem
    solution: Solution

    def is_better(self, other: _Solved) -> bool:
        """Whether it is faster than what was found before: clearly faster, if its mesh has more axes."""
        more = len(self.cost.mesh_shape) > len(other.cost.mesh_shape)
        return self.solution.cost < other.solution.cost * (1 - (_CLEARLY if more else 1e-9))

    @property
    def memory_bytes(self) -> float:
        """Predicted peak per device."""
        return self.problem.problem.memory(self.solution.choice)[0]


def make_plan(trace: Trace, cluster: Cluster, method: Method) -> Plan:
    """The best plan of a traced step for a cluster under a method."""
    start = time.perf_counter()
    graph = trace.graph
    groups = form_groups(graph, trace.stored)
    batch = frozenset(graph.arguments[i] for i in trace.batch)
    liveness = Liveness(graph, _written_in_place(trace), batch, computes_again=_computes_again(cluster))
    budget = method.memory_budget_bytes or float(cluster.device.memory_bytes)
    best: _Solved | None = None
    considered: list[Candidate] = []
    solved: dict[object, Candidate] = {}
    failure: InfeasibleError | None = None
    for mesh in method.mesh_shapes(cluster.num_devices):
        cost = RingCost(cluster, mesh, native_reduce_scatter=cluster.device.name != _EMULATED)
        alike = _alike(cost)
        if alike in solved and method.mesh_shape == "auto" and not _names_axes(method):
            considered.append(replace(solved[alike], name=_mesh_text(mesh)))
            continue
        try:
            found = _solve(trace, groups, liveness, cost, method, budget)
        except InfeasibleError as error:
            failure = error
            considered.append(Candidate(_mesh_text(mesh), math.inf, math.inf))
            continue
        solved[alike] = Candidate(_mesh_text(mesh), found.solution.cost, found.memory_bytes)
        considered.append(solved[alike])
        logger.debug("mesh %s: step %.3g s", mesh, found.solution.cost)
        if best is None or found.is_better(best):
            best = found
    if best is None:
        raise failure or InfeasibleError(f"{method.name} allows no mesh of {cluster.num_devices} devices")
    report = replace(
        _report(best.solution),
        seconds=time.perf_counter() - start,
        considered=tuple(considered),
        budget_bytes=budget,
    )
    return _write(trace, cluster, method, liveness, groups, best, report).verify()


def _computes_again(cluster: Cluster) -> bool:
    return RingCost(cluster, (cluster.num_devices,)).computes_again


def _names_axes(method: Method) -> bool:
    return method.axis_names is not None or hasattr(method, "in_specs")


def _mesh_text(mesh: tuple[int, ...]) -> str:
    return "x".join(map(str, mesh))


def _alike(cost: RingCost) -> object:
    """Equal for meshes of three axes that differ in their order only, where that makes no difference to any link.

    The order of two axes is tried both ways: it decides which of them can leave a dim that both split.
    """
    mesh = cost.mesh_shape
    if len(mesh) < 3:
        return mesh
    order = sorted(range(len(mesh)), key=lambda a: -mesh[a])
    groups = [[a for k, a in enumerate(order) if bits >> k & 1] for bits in range(1, 2 ** len(mesh))]
    links = [cost.cluster.group_link(mesh, tuple(sorted(g))) for g in groups]
    return tuple(mesh[a] for a in order), tuple(links)


def _solve(trace: Trace, groups: Groups, liveness: Liveness, cost: RingCost, method: Method, budget: float) -> _Solved:
    asked = method.requirements(trace, cost.mesh_shape)
    restrictions = Restrictions({**asked.tensors, **_keys(trace)}, asked.spread - _key_tensors(trace), asked.batch)
    problem = build(groups, cost, liveness, restrictions)
    limited = replace(problem.problem, limit=budget)
    try:
        solution = solve(limited, solver=method.solver, time_limit_s=method.time_limit_s, gap=method.gap)
    except InfeasibleError:
        raise InfeasibleError(_too_large(trace, problem, budget, cost.mesh_shape)) from None
    return _Solved(cost, replace(problem, problem=limited), solution)


def _keys(trace: Trace) -> dict[tuple[int, str], Spec]:
    """Typed random keys stay whole: their data has a dim that their type does not show."""
    sides = ((trace.arguments, trace.graph.arguments, "home"), (trace.results, trace.graph.results, "out"))
    return {
        (tensor, version): ((),) * len(trace.graph.tensors[tensor].shape)
        for leaves, tensors, version in sides
        for leaf, tensor in zip(leaves, tensors, strict=True)
        if leaf.dtype.startswith("key<")
    }


def _key_tensors(trace: Trace) -> frozenset[int]:
    return frozenset(tensor for tensor, _ in _keys(trace))


def _written_in_place(trace: Trace) -> frozenset[tuple[int, int]]:
    """Stored pairs whose argument is donated, so that the result takes its memory."""
    donated = frozenset(trace.donated_leaves)
    return frozenset((a, r) for a, r in trace.stored if a in donated)


def _too_large(trace: Trace, problem: ShardingProblem, budget: float, mesh: tuple[int, ...]) -> str:
    """The sentence for a budget that nothing fits: the least that is needed and the largest arguments."""
    least = least_memory(problem.problem)
    largest = sorted(zip(trace.arguments, trace.graph.arguments, strict=True), key=lambda p: -_size(trace.graph, p[1]))
    names = ", ".join(f"{leaf} ({bytes_text(_size(trace.graph, t))})" for leaf, t in largest[:3])
    return (
        f"no plan on mesh {mesh} fits in {bytes_text(budget)} per device: at least {bytes_text(least)} are "
        f"needed, {bytes_text(max(0.0, least - budget))} more. The largest arguments are {names}. Use more "
        "devices, a smaller batch, rematerialization (jax.checkpoint), or a larger memory_budget_bytes"
    )


def _size(graph: OpGraph, tensor: int) -> int:
    return graph.tensors[tensor].bytes


def _report(solution: Solution) -> SolverReport:
    return SolverReport(solution.status, solution.gap, solution.seconds, solution.variables, solution.solver)


# --------------------------------------------------------------------------------------- writing the plan


def _write(
    trace: Trace,
    cluster: Cluster,
    method: Method,
    liveness: Liveness,
    groups: Groups,
    best: _Solved,
    report: SolverReport,
) -> Plan:
    writer = PinWriter(
        groups, best.cost, best.problem.decode(best.solution.choice), liveness, spaces=best.problem.spaces
    )
    mesh = best.cost.mesh_shape
    stage = StagePlan(
        "0",
        mesh,
        method.names(mesh),
        (0, math.prod(mesh)),
        tuple(_placed(writer, leaf, t, "home") for leaf, t in zip(trace.arguments, trace.graph.arguments, strict=True)),
        tuple(_placed(writer, leaf, t, "out") for leaf, t in zip(trace.results, trace.graph.results, strict=True)),
        writer.pins(),
        writer.sums(),
        collective_s=writer.collective_s(),
        activations=activations(groups, sorted(trace.batch), writer),
    )
    compute = best.problem.compute_s(best.solution.choice)
    predicted = Predicted(
        best.solution.cost,
        compute,
        max(0.0, best.solution.cost - compute),
        writer.traffic(),
        best.memory_bytes,
    )
    return Plan(
        trace.name,
        trace.graph.digest,
        method.name,
        cluster,
        (stage,),
        predicted,
        report,
        (*_warnings(trace.graph), *method.warnings(trace)),
    )


def _placed(writer: PinWriter, leaf: Leaf, tensor: int, version: str) -> Placed:
    return Placed(leaf.path, leaf.shape, leaf.dtype, writer.spec(tensor, version)[: len(leaf.shape)])


def _warnings(graph: OpGraph) -> tuple[str, ...]:
    return tuple(
        f"{op.name} at {op.line or 'an unknown line'} ({op.source}) has no sharding rule: all devices compute it whole"
        for op in graph.unruled
    )
