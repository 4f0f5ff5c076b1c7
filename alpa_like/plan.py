"""`Plan`: every decision about one step, as one value that people read, save, compare, edit and load.

A plan needs no device and no solver: the same program with the same plan compiles to the same executable.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jax.sharding import PartitionSpec

from alpa_like.cluster import Cluster
from alpa_like.errors import AlpaError, PlanError
from alpa_like.records import mistyped
from alpa_like.schedule import SCHEDULES, Schedule, make_schedule
from alpa_like.simulate import Simulation, Times, simulate, write_trace
from alpa_like.texts import bytes_text, common_path, counted, seconds_text

__all__ = [
    "Accumulator",
    "Candidate",
    "PartialSum",
    "Pin",
    "Pipeline",
    "PipelineStage",
    "Placed",
    "Plan",
    "Predicted",
    "SolverReport",
    "Spec",
    "StagePlan",
    "itemsize",
    "partition_spec",
    "shown_stages",
    "spec_text",
]

FORMAT = 3
BATCH_STATISTICS = ("error", "micro_batch")

Spec = tuple[tuple[int, ...], ...]
"""Mesh axes per dim of a tensor, major to minor: `((0,), (), (1, 2))`."""


@dataclass(frozen=True, slots=True)
class Placed:
    """An argument or result of a stage and how it is sharded."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: Spec


@dataclass(frozen=True, slots=True)
class Pin:
    """A layout that the plan enforces at operand or result number `port` of op `op` of the operator graph.

    `path` are the layouts that the tensor takes one after the other; the last is the one the op sees, or that
    its readers see. Example: `Pin(17, 0, False, (((0,), ()), ((), ())))` gathers operand 0 of op 17.
    """

    op: int
    port: int
    result: bool
    path: tuple[Spec, ...]


@dataclass(frozen=True, slots=True)
class PartialSum:
    """An `add` of partial sums that is reduced once, after the addition, over some mesh axes.

    `spec` is the layout of its operands, partial axes left out. `splits` names each contraction behind it and, per
    axis of `axes`, the factor of that op that the axis splits.
    """

    op: int
    axes: tuple[int, ...]
    spec: Spec
    splits: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Accumulator:
    """Result number `result` of a piece, added up over the micro-batches by `op` ("add", "max", …).

    What is added up keeps partial sums over the mesh axes `axes`, one summand per device, and is split by `spec`
    otherwise; `splits` as in `PartialSum`. Behind the last micro-batch it is reduced once, to `total`.
    """

    result: int
    op: str
    axes: tuple[int, ...]
    spec: Spec
    splits: tuple[tuple[int, tuple[int, ...]], ...]
    total: Spec


@dataclass(frozen=True, slots=True)
class PipelineStage:
    """Layers `first` to `last` (inclusive) on mesh number `mesh`; times are predicted for one micro-batch.

    `in_flight` micro-batches are held at most, each `micro_bytes` per device; `remat` computes layers again in the
    backward pass. A schedule that splits the backward pass reads `input_grad_s` and `weight_grad_s`.
    """

    first: int
    last: int
    mesh: int
    remat: bool
    in_flight: int
    micro_bytes: float
    forward_s: float
    backward_s: float
    input_grad_s: float
    weight_grad_s: float


@dataclass(frozen=True, slots=True)
class Pipeline:
    """How a step is cut into layers and stages, and the order in which micro-batches run.

    `layer_ends` count the forward equations up to the end of each layer. `send_s` are seconds of one activation across
    each stage boundary, `update_s` of the update per mesh, `memory_bytes` the predicted peak per device of each mesh.
    `scan` says how a loop over `scan[0]` layers was cut: `scan[1]` are the lengths of its parts.
    """

    num_micro_batches: int
    schedule: str
    layer_ends: tuple[int, ...]
    layer_flops: tuple[float, ...]
    stages: tuple[PipelineStage, ...]
    send_s: tuple[float, ...]
    update_s: tuple[float, ...]
    memory_bytes: tuple[float, ...]
    batch_statistics: str = "error"
    scan: tuple[int, tuple[int, ...]] | None = None

    def verify(self) -> None:
        """Raise `PlanError` where stages, layers or the schedule can't be those of one pipeline."""
        if self.schedule not in SCHEDULES or type(self.num_micro_batches) is not int or self.num_micro_batches < 1:
            raise PlanError(
                f"a pipeline needs a schedule of {', '.join(SCHEDULES)} and 1 or more micro-batches, found "
                f"{self.schedule!r} and {self.num_micro_batches!r}"
            )
        ends = self.layer_ends
        if not isinstance(ends, tuple) or not ends or not all(type(n) is int for n in ends):
            raise PlanError(f"layer_ends must be whole numbers, the end of each of the layers, found {ends!r}")
        if not self.stages or len(self.send_s) != len(self.stages) - 1:
            raise PlanError(f"a pipeline of {len(self.stages)} stages has {len(self.send_s)} boundaries; plan it again")
        covered = [n for s in self.stages for n in range(s.first, s.last + 1)]
        if covered != list(range(len(ends))):
            raise PlanError(f"the stages must have the layers 0 to {len(ends) - 1} once and in order, found {covered}")
        meshes = sorted({s.mesh for s in self.stages})
        if meshes != list(range(len(self.memory_bytes))):
            raise PlanError(
                f"the stages are on meshes {meshes}; they must be numbered from 0 on, with one of memory_bytes for each"
            )
        if self.batch_statistics not in BATCH_STATISTICS:
            raise PlanError(
                f"batch_statistics must be {' or '.join(BATCH_STATISTICS)}, found {self.batch_statistics!r}"
            )

    @property
    def num_meshes(self) -> int:
        return max(s.mesh for s in self.stages) + 1

    def ordered(self) -> Schedule:
        """The schedule, task by task."""
        return make_schedule(self.schedule, len(self.stages), self.num_micro_batches, self.num_meshes)

    def times(self) -> Times:
        """The predicted times, as the simulator takes them."""
        return Times(
            tuple(s.forward_s for s in self.stages),
            tuple(s.backward_s for s in self.stages),
            tuple(s.input_grad_s for s in self.stages),
            tuple(s.weight_grad_s for s in self.stages),
            self.send_s,
            self.update_s,
        )

    def simulate(self) -> Simulation:
        """One step by the predicted times."""
        return simulate(self.ordered(), self.times())

    def bubble_fraction(self) -> float:
        """The share of the time until the update that meshes wait."""
        return simulate(self.ordered(), replace(self.times(), update_s=())).bubble_fraction


@dataclass(frozen=True, slots=True)
class Predicted:
    """What the cost model says of one step. `traffic_bytes` are sent per device, by kind of collective."""

    step_time_s: float
    compute_time_s: float
    communication_time_s: float
    traffic_bytes: dict[str, float]
    peak_memory_bytes: float

    def verify(self) -> None:
        """Raise `PlanError` for what nothing can take."""
        figures = asdict(self)
        traffic: dict[str, float] = figures.pop("traffic_bytes")
        for name, value in (*figures.items(), *((f"{kind} traffic", sent) for kind, sent in traffic.items())):
            if not 0 <= value < math.inf:
                raise PlanError(
                    f"the predicted {name} must be at least 0 and finite, found {value}; save the plan again"
                )

    @property
    def total_traffic_bytes(self) -> float:
        return sum(self.traffic_bytes.values())


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that was solved for while planning, by its mesh or its schedule and stages.

    What it would take per device and step; inf where nothing fits.
    """

    name: str
    step_time_s: float
    peak_memory_bytes: float


@dataclass(frozen=True, slots=True)
class SolverReport:
    """How the plan was found. `gap` is the share by which the step time could at most be better within the model.

    `considered` has the best plan of every mesh that was tried, or the pipelines that were. `budget_bytes` is the
    memory per device that plans had to fit in, 0 where nobody knows.
    """

    status: str
    gap: float
    seconds: float
    variables: int
    solver: str
    considered: tuple[Candidate, ...] = ()
    budget_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What one mesh runs, or in a pipeline one piece of it.

    `devices` are the first device of the cluster and how many follow row-major. `program` is the digest of a piece.
    For people: `collective_s` are the predicted seconds of each kind of collective in one run ("slice" is the local
    copy of a part), `activations` what the forward pass makes in between, where nothing else in the plan says it.
    """

    name: str
    mesh_shape: tuple[int, ...]
    axis_names: tuple[str, ...]
    devices: tuple[int, int]
    inputs: tuple[Placed, ...]
    outputs: tuple[Placed, ...]
    pins: tuple[Pin, ...]
    sums: tuple[PartialSum, ...] = ()
    accumulators: tuple[Accumulator, ...] = ()
    program: str = ""
    collective_s: tuple[tuple[str, float], ...] = ()
    activations: tuple[Placed, ...] = ()

    def verify(self) -> None:
        """Raise `PlanError` where a spec names an unknown axis, uses one twice, or does not divide its dim."""
        if len(self.axis_names) != len(self.mesh_shape) or len(set(self.axis_names)) != len(self.axis_names):
            raise PlanError(
                f"stage {self.name}: mesh {self.mesh_shape} needs one name per axis, found {self.axis_names}"
            )
        if any(n < 1 for n in self.mesh_shape) or math.prod(self.mesh_shape) != self.devices[1]:
            raise PlanError(f"stage {self.name}: mesh {self.mesh_shape} does not have {self.devices[1]} devices")
        for placed in (*self.inputs, *self.outputs):
            self._verify_spec(placed.spec, f"{placed.path} of shape {placed.shape}", len(placed.shape))
            for dim, axes in enumerate(placed.spec):
                parts = math.prod(self.mesh_shape[a] for a in axes)
                if placed.shape[dim] % parts:
                    raise PlanError(
                        f"stage {self.name}: dim {dim} of {placed.path} has {placed.shape[dim]} elements, which "
                        f"{parts} devices do not divide; choose another axis or none for this dim"
                    )
        self._verify_inside()

    def _verify_inside(self) -> None:
        """The same for activations, sums, accumulators and pins."""
        for placed in self.activations:
            self._verify_spec(placed.spec, f"{placed.path} of shape {placed.shape}", len(placed.shape))
        for total in self.sums:
            self._verify_spec(
                (*total.spec, *((a,) for a in total.axes)), f"the sum op {total.op}", len(total.spec) + len(total.axes)
            )
        for a in self.accumulators:
            if not 0 <= a.result < len(self.outputs):
                raise PlanError(f"stage {self.name}: accumulator {a.result} is none of {len(self.outputs)} results")
            self._verify_spec((*((x,) for x in a.axes), *a.spec), f"accumulator {a.result}", len(a.axes) + len(a.spec))
            self._verify_spec(a.total, f"the total of accumulator {a.result}", len(a.spec))
        for pin in self.pins:
            for spec in pin.path:
                self._verify_spec(spec, f"op {pin.op}, {'result' if pin.result else 'operand'} {pin.port}", len(spec))

    def _verify_spec(self, spec: Spec, what: str, rank: int) -> None:
        used = [a for axes in spec for a in axes]
        if len(spec) != rank:
            raise PlanError(f"stage {self.name}: {what} has a spec of {len(spec)} dims, expected {rank}")
        if len(set(used)) < len(used) or not set(used) <= set(range(len(self.mesh_shape))):
            raise PlanError(
                f"stage {self.name}: the spec {spec} of {what} must use each of the axes 0 to "
                f"{len(self.mesh_shape) - 1} at most once"
            )


@dataclass(frozen=True, repr=False)
class Plan:
    """Invariant: `verify()` holds. A plan without pipelining has one stage.

    >>> plan = train_step.plan(state, batch, cluster=alpa.Cluster.dgx_a100())      # doctest: +SKIP
    >>> plan.shardings["state.params['head']['kernel']"]                           # doctest: +SKIP
    PartitionSpec(None, 'x')
    """

    function: str
    program: str
    method: str
    cluster: Cluster
    stages: tuple[StagePlan, ...]
    predicted: Predicted
    solver: SolverReport
    warnings: tuple[str, ...] = ()
    pipeline: Pipeline | None = None
    format: int = field(default=FORMAT, repr=False)

    def verify(self) -> Plan:
        """This plan, or `PlanError` where it breaks a rule."""
        if not self.stages:
            raise PlanError("a plan needs at least one stage")
        self.predicted.verify()
        self._verify_pieces()
        for stage in self.stages:
            stage.verify()
            first, count = stage.devices
            if first < 0 or first + count > self.cluster.num_devices:
                raise PlanError(
                    f"stage {stage.name} uses devices {first} to {first + count - 1}, "
                    f"but {self.cluster.name} has {self.cluster.num_devices}"
                )
        return self

    def _verify_pieces(self) -> None:
        if self.pipeline is None:
            if len(self.stages) > 1:
                raise PlanError(f"a plan without a pipeline has one stage, found {len(self.stages)}")
            return
        self.pipeline.verify()
        missing = {f"forward {n}" for n in range(len(self.pipeline.stages))} - {s.name for s in self.stages}
        if missing:
            raise PlanError(f"the plan has no piece named {min(missing)!r}, which its pipeline runs; plan it again")

    @property
    def mesh_shape(self) -> tuple[int, ...]:
        """The mesh of the first stage."""
        return self.stages[0].mesh_shape

    @property
    def shardings(self) -> dict[str, PartitionSpec]:
        """How every argument and result is sharded, by its path in the pytree."""
        return {p.path: partition_spec(p.spec, s.axis_names) for s in self.stages for p in (*s.inputs, *s.outputs)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        target = Path(path)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            part.write_text(json.dumps(_to_json(self), indent=1, allow_nan=False))
            os.replace(part, target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise PlanError(
                f"the plan can't be written to {path}: {error.strerror}; what was there is as it was"
            ) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """The plan that `save` wrote. `PlanError` for a file that is cut short, of another version, or no plan."""
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise PlanError(f"the plan file {path} can't be read: {error.strerror}") from None
        except ValueError as error:
            raise PlanError(f"{path} is no complete plan file ({error}); save the plan again") from None
        plan = _from_json(data, str(path))
        for wrong in mistyped(plan, Plan):
            raise PlanError(f"in the plan file {path}, {wrong}; correct it, or save the plan again")
        return plan.verify()

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write the simulated step as a Chrome trace, which https://ui.perfetto.dev opens."""
        if self.pipeline is None:
            raise PlanError(f"the plan of {self.function} has no pipeline, so there is no schedule to draw")
        write_trace(path, self.pipeline.simulate().events, process_name=f"{self.function} (simulated)")

    def diff(self, other: Plan) -> str:
        """What `other` decides differently, one line each; empty where both decide the same."""
        return "\n".join(_differences(self, other))

    def __str__(self) -> str:
        return "\n".join(_describe(self))

    def __repr__(self) -> str:
        step = seconds_text(self.predicted.step_time_s)
        how = f"mesh {self.mesh_shape}" if self.pipeline is None else f"{len(self.pipeline.stages)} stages"
        return f"Plan({self.function}, {self.method}, {how}, {self.cluster.name}, step {step})"

    def _repr_html_(self) -> str:
        try:
            from alpa_like import viz  # draws with matplotlib, which need not be there
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            return self._table_html()
        picture = base64.b64encode(viz.overview_png(self)).decode()
        return (
            f'<div><img style="width: 1100px; max-width: 100%" alt="{html.escape(repr(self))}" '
            f'src="data:image/png;base64,{picture}">'
            f"<details><summary>the plan as text</summary>{self._table_html()}</details></div>"
        )

    def _table_html(self) -> str:
        rows = [row for stage in shown_stages(self) for row in _rows(stage)]
        table = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
        head = "<br>".join(html.escape(line) for line in _header(self))
        titles = "".join(f"<th>{t}</th>" for t in ("tensor", "count", "shape", "sharding", "per device"))
        return f"<div><p>{head}</p><table><tr>{titles}</tr>{table}</table></div>"


def partition_spec(spec: Spec, axis_names: tuple[str, ...]) -> PartitionSpec:
    """JAX's form of a spec, without trailing `None`s."""
    entries = [_entry(tuple(axis_names[a] for a in axes)) for axes in spec]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _entry(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return (names[0] if len(names) == 1 else names) if names else None


def spec_text(spec: Spec, axis_names: tuple[str, ...]) -> str:
    """A short form for people: `[x, -, yz]`."""
    return "[" + ", ".join("".join(axis_names[a] for a in axes) or "-" for axes in spec) + "]"


# ------------------------------------------------------------------------------------------------ text


def _header(plan: Plan) -> list[str]:
    p, s = plan.predicted, plan.solver
    traffic = ", ".join(f"{k} {bytes_text(v)}" for k, v in p.traffic_bytes.items() if v) or "none"
    parts = f"compute {seconds_text(p.compute_time_s)} + communication {seconds_text(p.communication_time_s)}"
    how = "=" if plan.pipeline is None else "with waiting; the busiest mesh:"
    step = f"step {seconds_text(p.step_time_s)} {how} {parts}"
    lines = [
        f"Plan of {plan.function} by {plan.method} for {plan.cluster}",
        f"{step}, peak memory {bytes_text(p.peak_memory_bytes)} per device",
        f"traffic per device {bytes_text(p.total_traffic_bytes)} ({traffic})",
        f"solver {s.solver} {s.status}, gap {s.gap:.2g}, {s.variables} variables, {s.seconds:.2f} s",
    ]
    if len(s.considered) > 1:
        what, mark = ("meshes", ", ") if plan.pipeline is None else ("considered", "; ")
        lines.append(f"{what} " + mark.join(f"{c.name} {_seconds_or_dash(c.step_time_s)}" for c in s.considered))
    return lines + [f"warning: {w}" for w in plan.warnings]


def _seconds_or_dash(s: float) -> str:
    return seconds_text(s) if s < math.inf else "-"


def _pipeline_lines(plan: Plan, pipeline: Pipeline) -> list[str]:
    """The schedule in one line, and a table of the stages."""
    layers, stages = counted(len(pipeline.layer_ends), "layer"), counted(len(pipeline.stages), "stage")
    shape = f"{counted(pipeline.num_micro_batches, 'micro-batch')}, {layers}, {stages}"
    lines = [f"pipeline {pipeline.schedule}, {shape}, bubble {100 * pipeline.bubble_fraction():.1f} %"]
    rows = [("stage", "layers", "devices", "mesh", "forward", "backward", "in flight", "each", "memory", "remat")]
    for number, stage in enumerate(pipeline.stages):
        piece = next(s for s in plan.stages if s.name == f"forward {number}")
        first, count = piece.devices
        rows.append(
            (
                str(number),
                f"{stage.first}-{stage.last}",
                f"{first}-{first + count - 1}",
                "x".join(map(str, piece.mesh_shape)),
                seconds_text(stage.forward_s),
                seconds_text(stage.backward_s),
                str(stage.in_flight),
                bytes_text(stage.micro_bytes),
                bytes_text(pipeline.memory_bytes[stage.mesh]),
                "yes" if stage.remat else "no",
            )
        )
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    return lines + ["  " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def shown_stages(plan: Plan) -> tuple[StagePlan, ...]:
    """What is listed tensor by tensor: of a pipeline the arguments of each mesh, each once."""
    if plan.pipeline is None:
        return plan.stages
    made = {p.path for s in plan.stages for p in s.outputs}
    seen: set[str] = set()
    found: list[StagePlan] = []
    for mesh in range(plan.pipeline.num_meshes):
        stages = [i for i, s in enumerate(plan.pipeline.stages) if s.mesh == mesh]
        devices = next(s.devices for s in plan.stages if s.name == f"forward {stages[0]}")
        pieces = [s for s in plan.stages if s.devices == devices]
        homes = [s for s in pieces if s.name.startswith("update")] or pieces
        arguments = [p for s in homes for p in s.inputs if p.path not in made and p.shape]
        mine = tuple(p for p in {p.path: p for p in arguments}.values() if p.path not in seen)
        seen.update(p.path for p in mine)
        name = ", ".join(map(str, stages))
        found.append(
            replace(pieces[0], name=name, inputs=mine, outputs=(), pins=tuple(q for s in pieces for q in s.pins))
        )
    return tuple(found)


def _describe(plan: Plan) -> Iterator[str]:
    yield from _header(plan)
    if plan.pipeline is not None:
        yield from _pipeline_lines(plan, plan.pipeline)
    for stage in shown_stages(plan):
        axes = ", ".join(f"{n}={k}" for n, k in zip(stage.axis_names, stage.mesh_shape, strict=True))
        inside = f"{len(stage.pins)} layouts pinned inside"
        if stage.sums:
            inside += f", {len(stage.sums)} sum{'s' * (len(stage.sums) > 1)} reduced once"
        yield f"stage {stage.name} on {stage.devices[1]} devices, mesh ({axes}), {inside}"
        rows = [("tensor", "count", "shape", "sharding", "per device"), *_rows(stage)]
        widths = [max(len(r[c]) for r in rows) for c in range(5)]
        for row in rows:
            yield "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()


def _rows(stage: StagePlan) -> list[tuple[str, str, str, str, str]]:
    """One row for all tensors that differ in numbers of their path only."""
    merged: dict[tuple[str, str, str, str], list[str]] = {}
    returned = {(p.shape, p.dtype, p.spec) for p in stage.inputs}
    for number, p in enumerate((*stage.inputs, *stage.outputs)):
        if number >= len(stage.inputs) and (p.shape, p.dtype, p.spec) in returned and len(stage.outputs) > 8:
            continue  # results of the state mirror its arguments
        parts = [math.prod(stage.mesh_shape[a] for a in axes) for axes in p.spec]
        mine = math.prod(size // n for size, n in zip(p.shape, parts, strict=True)) * itemsize(p.dtype)
        key = (
            re.sub(r"\d+", "*", p.path),
            f"{p.dtype}[{','.join(map(str, p.shape))}]",
            spec_text(p.spec, stage.axis_names),
            bytes_text(mine),
        )
        merged.setdefault(key, []).append(p.path)
    return [(common_path(paths), str(len(paths)), *k[1:]) for k, paths in merged.items()]


def itemsize(dtype: str) -> float:
    digits = re.search(r"(\d+)", dtype)
    return max(1.0, int(digits[1]) / 8) if digits else 1.0


def _differences(left: Plan, right: Plan) -> Iterator[str]:
    if left.program != right.program:
        yield f"program: {left.program} -> {right.program}"
    for name in ("method", "mesh_shape"):
        if getattr(left, name) != getattr(right, name):
            yield f"{name}: {getattr(left, name)} -> {getattr(right, name)}"
    if left.cluster != right.cluster:
        yield f"cluster: {left.cluster} -> {right.cluster}"
    yield from _pipeline_differences(left.pipeline, right.pipeline)
    a, b = left.predicted.step_time_s, right.predicted.step_time_s
    if a != b:
        yield f"step time: {seconds_text(a)} -> {seconds_text(b)}"
    mine, theirs = left.shardings, right.shardings
    for path in [*mine, *(p for p in theirs if p not in mine)]:
        if mine.get(path) != theirs.get(path):
            yield f"{path}: {mine.get(path)} -> {theirs.get(path)}"
    stages = list(zip(left.stages, right.stages, strict=False))
    for what, name in (("layouts inside the step", "pins"), ("sums that are reduced once", "sums")):
        changed = sum(len(set(getattr(a, name)) ^ set(getattr(b, name))) for a, b in stages)
        if changed:
            yield f"{what}: {changed} {name} differ"


def _pipeline_differences(left: Pipeline | None, right: Pipeline | None) -> Iterator[str]:
    if left is None or right is None:
        if left is not right:
            yield f"pipeline: {_stages_text(left)} -> {_stages_text(right)}"
        return
    for name in ("num_micro_batches", "schedule"):
        if getattr(left, name) != getattr(right, name):
            yield f"{name}: {getattr(left, name)} -> {getattr(right, name)}"
    if _stages_text(left) != _stages_text(right):
        yield f"stages: {_stages_text(left)} -> {_stages_text(right)}"


def _stages_text(pipeline: Pipeline | None) -> str:
    if pipeline is None:
        return "none"
    return " ".join(f"{s.first}-{s.last}{' remat' * s.remat}" for s in pipeline.stages)


# ------------------------------------------------------------------------------------------------ JSON


def _to_json(plan: Plan) -> dict[str, Any]:
    data = asdict(replace(plan, cluster=None))  # pyright: ignore[reportArgumentType]
    data["cluster"] = plan.cluster.to_json()
    data["solver"]["considered"] = [
        [c.name, _finite(c.step_time_s), _finite(c.peak_memory_bytes)] for c in plan.solver.considered
    ]
    for stage in data["stages"]:
        stage["pins"] = [[p["op"], p["port"], p["result"], p["path"]] for p in stage["pins"]]
        stage["sums"] = [[t["op"], t["axes"], t["spec"], t["splits"]] for t in stage["sums"]]
        stage["accumulators"] = [list(a.values()) for a in stage["accumulators"]]
    return data


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _candidate(name: Any, *figures: float | None) -> Candidate:
    step_time_s, peak_memory_bytes = (math.inf if x is None else float(x) for x in figures)
    return Candidate(str(name), step_time_s, peak_memory_bytes)


def _from_json(data: Any, where: str) -> Plan:
    if not isinstance(data, dict) or "format" not in data:
        raise PlanError(f"{where} is no plan file: expected a JSON object with a 'format'")
    if data["format"] != FORMAT:
        raise PlanError(
            f"{where} is a plan of format {data['format']!r}, this version reads format {FORMAT}; plan the step again"
        )
    try:
        solver = dict(data["solver"])
        considered = tuple(_candidate(*c) for c in solver.pop("considered"))
        return Plan(
            function=data["function"],
            program=data["program"],
            method=data["method"],
            cluster=Cluster.from_json(data["cluster"]),
            stages=tuple(_stage(s) for s in data["stages"]),
            predicted=Predicted(**data["predicted"]),
            solver=SolverReport(**solver, considered=considered),
            warnings=tuple(data["warnings"]),
            pipeline=_pipeline(data["pipeline"]),
        )
    except AlpaError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{where} is no complete plan ({type(error).__name__}: {error}); save the plan again") from None


def _stage(data: dict[str, Any]) -> StagePlan:
    def placed(p: dict[str, Any]) -> Placed:
        return Placed(p["path"], tuple(p["shape"]), p["dtype"], _spec(p["spec"]))

    return StagePlan(
        data["name"],
        tuple(data["mesh_shape"]),
        tuple(data["axis_names"]),
        (data["devices"][0], data["devices"][1]),
        tuple(placed(p) for p in data["inputs"]),
        tuple(placed(p) for p in data["outputs"]),
        tuple(Pin(op, port, result, tuple(_spec(s) for s in path)) for op, port, result, path in data["pins"]),
        tuple(PartialSum(op, tuple(axes), _spec(spec), _splits(splits)) for op, axes, spec, splits in data["sums"]),
        tuple(
            Accumulator(result, op, tuple(axes), _spec(spec), _splits(splits), _spec(total))
            for result, op, axes, spec, splits, total in data["accumulators"]
        ),
        data["program"],
        tuple((str(kind), float(seconds)) for kind, seconds in data["collective_s"]),
        tuple(placed(p) for p in data["activations"]),
    )


def _pipeline(data: dict[str, Any] | None) -> Pipeline | None:
    if data is None:
        return None
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
    fields["stages"] = tuple(PipelineStage(**s) for s in data["stages"])
    if data["scan"] is not None:
        fields["scan"] = (int(data["scan"][0]), tuple(int(n) for n in data["scan"][1]))
    return Pipeline(**fields)


def _splits(splits: Any) -> tuple[tuple[int, tuple[int, ...]], ...]:
    return tuple((int(op), tuple(int(f) for f in factors)) for op, factors in splits)


def _spec(dims: Any) -> Spec:
    return tuple(tuple(int(a) for a in axes) for axes in dims)
