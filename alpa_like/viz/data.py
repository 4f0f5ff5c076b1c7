"""What the figures show, as numbers and names that are read from a `Plan`; nothing here draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from alpa_like.plan import (
    Pipeline,
    Placed,
    Plan,
    StagePlan,
    itemsize,
    shown_stages,
)
from alpa_like.schedule import HELD_CHANGE
from alpa_like.simulate import Event, Simulation

WAIT = "waiting"


@dataclass(frozen=True, slots=True)
class Mesh:
    """Devices that work together. `devices` are the first and how many; `stages` are numbers, several if interleaved.

    `layers` has the first and the last layer of each stage and is empty without a pipeline.
    """

    number: int
    devices: tuple[int, int]
    shape: tuple[int, ...]
    axis_names: tuple[str, ...]
    stages: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]
    memory_bytes: float


def meshes(plan: Plan) -> tuple[Mesh, ...]:
    """The meshes of a plan, in order."""
    if plan.pipeline is None:
        s = plan.stages[0]
        return (Mesh(0, s.devices, s.mesh_shape, s.axis_names, (0,), (), plan.predicted.peak_memory_bytes),)
    return tuple(_mesh(plan, plan.pipeline, number) for number in range(plan.pipeline.num_meshes))


def _mesh(plan: Plan, pipeline: Pipeline, number: int) -> Mesh:
    stages = tuple(i for i, s in enumerate(pipeline.stages) if s.mesh == number)
    piece = forward_piece(plan, stages[0])
    layers = tuple((pipeline.stages[i].first, pipeline.stages[i].last) for i in stages)
    memory = pipeline.memory_bytes[number]
    return Mesh(number, piece.devices, piece.mesh_shape, piece.axis_names, stages, layers, memory)


def forward_piece(plan: Plan, stage: int) -> StagePlan:
    """What a stage of a pipeline runs forward."""
    return next(s for s in plan.stages if s.name == f"forward {stage}")


def mesh_text(shape: Sequence[int], names: Sequence[str]) -> str:
    """`2×4 (x, y)`."""
    return f"{'×'.join(map(str, shape))} ({', '.join(names)})"


def ranges_text(numbers: Iterable[int]) -> str:
    """`0, 2-5` for 0, 2, 3, 4, 5."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


# ------------------------------------------------------------------------------------------------ time


def simulation(plan: Plan) -> Simulation:
    """The simulated step; without a pipeline, compute and then communication on one mesh."""
    if plan.pipeline is not None:
        return plan.pipeline.simulate()
    p = plan.predicted
    end = p.compute_time_s + p.communication_time_s
    parts = (("compute", 0.0, p.compute_time_s), ("communication", p.compute_time_s, end))
    events = tuple(Event(0, None, kind, kind, a, b) for kind, a, b in parts if b > a)
    return Simulation(end, 0.0, (0.0,), (p.peak_memory_bytes,), events)


def own_events(played: Simulation) -> dict[int, list[Event]]:
    """What each mesh itself does, without sends, in order."""
    found: dict[int, list[Event]] = {}
    for event in sorted(played.events, key=lambda e: (e.start_s, e.end_s)):
        if not event.lane:
            found.setdefault(event.mesh, []).append(event)
    return found


def waits(events: Iterable[Event], end_s: float) -> list[tuple[float, float]]:
    """Start and end of every time in which a mesh does nothing, from the start of the step to its end at `end_s`."""
    found: list[tuple[float, float]] = []
    now = 0.0
    for event in events:
        if event.start_s > now:
            found.append((now, event.start_s))
        now = max(now, event.end_s)
    if end_s > now:
        found.append((now, end_s))
    return found


def seconds_by_mesh(plan: Plan) -> list[dict[str, float]]:
    """Per mesh the seconds of each kind of work and of waiting; they add up to the step."""
    played = simulation(plan)
    found: list[dict[str, float]] = []
    events = own_events(played)
    for mesh in meshes(plan):
        row: dict[str, float] = {}
        for event in events.get(mesh.number, ()):
            row[event.kind] = row.get(event.kind, 0.0) + event.end_s - event.start_s
        row[WAIT] = sum(b - a for a, b in waits(events.get(mesh.number, ()), played.makespan_s))
        found.append(row)
    return found


def sends_by_mesh(plan: Plan) -> list[float]:
    """Per mesh the seconds in which its links are busy with what it sends; they may overlap its work."""
    found = [0.0] * len(meshes(plan))
    for event in simulation(plan).events:
        if event.kind == "send":
            found[event.mesh] += event.end_s - event.start_s
    return found


def work_by_mesh(plan: Plan) -> list[dict[str, float]]:
    """Per mesh the seconds of a step that go to each kind of collective and, what is left of its work, to compute."""
    return [_work(plan, mesh, row) for mesh, row in zip(meshes(plan), seconds_by_mesh(plan), strict=True)]


def _work(plan: Plan, mesh: Mesh, row: Mapping[str, float]) -> dict[str, float]:
    collectives: dict[str, float] = {}
    for stage in (s for s in plan.stages if s.devices == mesh.devices):
        for kind, seconds in stage.collective_s:
            collectives[kind] = collectives.get(kind, 0.0) + seconds * _runs(plan.pipeline, stage)
    busy = sum(seconds for kind, seconds in row.items() if kind != WAIT)
    return {"compute": max(0.0, busy - sum(collectives.values())), **collectives}


def _runs(pipeline: Pipeline | None, stage: StagePlan) -> int:
    """How often a mesh runs a piece in a step: tasks of the schedule once per micro-batch, all else once."""
    is_task = stage.name.partition(" ")[0] in HELD_CHANGE
    return pipeline.num_micro_batches if pipeline is not None and is_task else 1


def memory_limit(plan: Plan) -> float:
    """Bytes per device that the plan had to fit in."""
    return plan.solver.budget_bytes or float(plan.cluster.device.memory_bytes)


# ---------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True, slots=True)
class MemoryCurve:
    """Bytes per device of one mesh: `state_bytes` for arguments, `other_bytes` for gradients and temporaries, both all
    step, and `held_bytes[i]` for micro-batches in flight from `times_s[i]` to `times_s[i + 1]`."""

    mesh: int
    state_bytes: float
    other_bytes: float
    times_s: tuple[float, ...]
    held_bytes: tuple[float, ...]

    @property
    def peak_bytes(self) -> float:
        return self.state_bytes + self.other_bytes + max(self.held_bytes)


def memory_curves(plan: Plan) -> list[MemoryCurve]:
    """The memory of each mesh over the simulated step; its peak is the one that the plan predicts.

    A step that trains holds a micro-batch from the start of its forward to the end of its backward pass.
    """
    played = simulation(plan)
    events = own_events(played)
    states = [sum(local_bytes(p, s.mesh_shape) for p in s.inputs) for s in shown_stages(plan)]
    trains = plan.pipeline is not None and plan.pipeline.ordered().trains
    found: list[MemoryCurve] = []
    for mesh, state in zip(meshes(plan), states, strict=True):
        changes = _changes(plan.pipeline, events.get(mesh.number, ()), trains)
        found.append(_curve(mesh, changes, played.makespan_s, state))
    return found


def _curve(mesh: Mesh, changes: Iterable[tuple[float, float]], end_s: float, state: float) -> MemoryCurve:
    times, held = [0.0], [0.0]
    for time, change in changes:
        times.append(time)
        held.append(held[-1] + change)
    fixed = mesh.memory_bytes - max(held)
    state = max(0.0, min(state, fixed))
    return MemoryCurve(mesh.number, state, fixed - state, (*times, end_s), (*held, held[-1]))


def _changes(pipeline: Pipeline | None, events: Iterable[Event], trains: bool) -> Iterable[tuple[float, float]]:
    """When and by how many bytes the micro-batches that are held change."""
    for event in events:
        if event.task is None or pipeline is None:
            continue
        each = pipeline.stages[event.task.stage].micro_bytes
        if event.kind == "forward":
            yield event.start_s, each
        if not trains or HELD_CHANGE[event.task.kind] < 0:
            yield event.end_s, -each


def local_bytes(p: Placed, mesh_shape: Sequence[int]) -> float:
    """Bytes of a tensor on one device; a dim that does not divide is padded."""
    parts = [math.prod(mesh_shape[a] for a in axes) for axes in p.spec]
    return math.prod(-(-n // k) for n, k in zip(p.shape, parts, strict=True)) * itemsize(p.dtype)
