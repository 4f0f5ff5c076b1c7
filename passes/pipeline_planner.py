"""Trace and `PipeshardParallel` → `Plan`: chooses micro-batches, layers, stages, submeshes, schedule and remat.

Contract
    Input: a `Trace`, a `Cluster`, a `PipeshardParallel`. Output: a verified `Plan` with a pipeline.
    Raises: `MethodError` for options that the step or the cluster can't meet, `InfeasibleError` where nothing fits in
    memory, `TraceError` where micro-batches would change what the step computes.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from alpa_like.cluster import Cluster
from alpa_like.errors import InfeasibleError, MethodError
from alpa_like.methods import ShardParallel
from alpa_like.passes.cut_scans import cut_trace, equal_parts, layer_loop
from alpa_like.passes.layers import Layers, check_gradient, ends_by_loop, form_layers, loops_by_layer
from alpa_like.passes.microbatch import batch_size, split_batch
from alpa_like.passes.pipeline import PipelineWriter, StageSpec, schedule_of
from alpa_like.passes.planner import make_plan
from alpa_like.passes.stage_costs import LayerCosts, Tag
from alpa_like.passes.stage_search import Choice, Search, Submesh, search
from alpa_like.pipeshard import (
    AutoLayerOption,
    AutoStageOption,
    ManualLayerOption,
    ManualStageOption,
    PipeshardParallel,
    UniformStageOption,
)
from alpa_like.plan import Candidate, Pipeline, Plan
from alpa_like.schedule import Schedule, make_schedule
from alpa_like.simulate import Times, simulate
from alpa_like.tracer import Trace

__all__ = ["make_pipeline_plan"]

_TRIED = ("1f1b", "eager-1f1b", "zb-h1", "zb-h2")
"""Schedules that "auto" chooses from."""

_EAGER = ("eager-1f1b", "zb-h2", "gpipe", "inference")
"""Schedules that run ahead far enough to hide what is sent."""

_NEAR = 1.15
"""How far the search may be off: stages as a whole are cheaper than the sum of their layers, or dearer."""

_WORTH_IT = 0.002
"""The share of the step time that another schedule must save."""

_MOST_PARTS = 64
"""Into so many parts a loop over layers is cut at most, for the search of stages."""

_ROUNDS = 3
"""How often the search is repeated at most with what the chosen stages taught it."""

_NEARLY = 1.3
"""A stage that takes this times the memory by the sums of its layers may fit as a whole."""

_SHARES = (1.0, 0.9, 0.8, 0.65)
"""Shares of the memory that the search for stages reckons with, until the stages that it finds fit as a whole."""


def make_pipeline_plan(trace: Trace, cluster: Cluster, method: PipeshardParallel) -> Plan:
    """The best pipeline of a traced step for a cluster."""
    start = time.perf_counter()
    plan = _with_cut_loop(trace, cluster, method) or _Planner(trace, cluster, method).plan()
    report = replace(plan.solver, seconds=time.perf_counter() - start)
    return replace(plan, solver=report)


def _with_cut_loop(trace: Trace, cluster: Cluster, method: PipeshardParallel) -> Plan | None:
    """The plan of a model that scans over its layers: the loop is cut into layers for the search, then anew into one
    loop per stage. None where there is no such loop."""
    length = layer_loop(trace)
    if length is None or not isinstance(method.layer_option, AutoLayerOption):
        return None
    asked = method.layer_option.layer_num
    count = min(length, _MOST_PARTS if asked == "auto" else asked)
    lengths = equal_parts(length, count)
    planner = _Planner(cut_trace(trace, length, lengths).trace, cluster, method)
    plan = planner.plan()
    if plan.pipeline is None:
        return plan
    return _one_loop_per_stage(trace, cluster, method, planner, plan, (length, lengths))


def _one_loop_per_stage(
    trace: Trace,
    cluster: Cluster,
    method: PipeshardParallel,
    planner: _Planner,
    plan: Plan,
    scan: tuple[int, tuple[int, ...]],
) -> Plan:
    """The plan with the loops of each stage joined. Layers that are computed again stay loops of their own: what enters
    each of them is kept."""
    pipeline = plan.pipeline
    assert pipeline is not None
    parts = replace(plan, pipeline=replace(pipeline, scan=scan))
    length, lengths = scan
    counts = loops_by_layer(planner.layers(pipeline.num_micro_batches), lengths)
    stages = [sum(counts[s.first : s.last + 1]) for s in pipeline.stages]
    if sum(stages) != len(lengths) or any(s.remat for s in pipeline.stages):
        return parts
    ends = list(itertools.accumulate(stages))
    merged = tuple(sum(lengths[a:b]) for a, b in zip((0, *ends[:-1]), ends, strict=True) if b > a)
    whole = _Planner(cut_trace(trace, length, merged).trace, cluster, method)
    layers = whole.layers_by_loop(pipeline.num_micro_batches, [1 if n else 0 for n in stages], merged)
    if layers is None:
        return parts
    whole.costs(layers)
    specs = [replace(s, first=i, last=i) for i, s in enumerate(planner.specs)]
    try:
        final = whole.written(layers, specs, pipeline.schedule)
    except InfeasibleError:
        return parts
    final = replace(final, solver=replace(final.solver, considered=(*plan.solver.considered, *whole.considered)))
    assert final.pipeline is not None
    return replace(final, pipeline=replace(final.pipeline, scan=(length, merged)))


@dataclass
class _Planner:
    trace: Trace
    cluster: Cluster
    method: PipeshardParallel
    layered: dict[int, Layers] = field(default_factory=dict[int, Layers])
    priced: dict[int, LayerCosts] = field(default_factory=dict[int, LayerCosts])
    considered: list[Candidate] = field(default_factory=list[Candidate])
    """What was written, each once."""

    specs: list[StageSpec] = field(default_factory=list[StageSpec])

    def __post_init__(self) -> None:
        self.writer = PipelineWriter(self.trace, self.cluster, self.method)

    def plan(self) -> Plan:
        """The best plan; its report has all that were considered."""
        plan = self.chosen()
        if plan.pipeline is None:
            return plan
        return replace(plan, solver=replace(plan.solver, considered=tuple(self.considered)))

    def chosen(self) -> Plan:
        asked = self.method.num_micro_batches
        count = self.best_count() if asked == "auto" else asked
        layers = self.layers(count)
        check_gradient(layers, self.first_schedule(layers))
        self.costs(layers)
        plan = self.staged(layers)
        if self.method.schedule != "auto":
            return plan
        return self.undivided(self.rescheduled(layers, plan))

    def undivided(self, plan: Plan) -> Plan:
        """The plan without a pipeline where the search ends at one stage and that is faster."""
        one = plan.pipeline is not None and len(plan.pipeline.stages) == 1
        if not one or not isinstance(self.method.stage_option, AutoStageOption):
            return plan
        if self.method.stage_option.num_stages != "auto" or self.method.num_micro_batches != "auto":
            return plan
        whole = ShardParallel(
            memory_budget_bytes=self.method.memory_budget_bytes,
            solver=self.method.solver,
            time_limit_s=self.method.time_limit_s,
            gap=self.method.gap,
        )
        try:
            other = make_plan(self.trace, self.cluster, whole)
        except InfeasibleError:
            return plan
        faster = other.predicted.step_time_s < plan.predicted.step_time_s
        return replace(other, method=self.method.name) if faster else plan

    def staged(self, layers: Layers) -> Plan:
        """The plan under the first schedule."""
        option, name = self.method.stage_option, self.first_schedule(layers)
        if name == "interleaved-1f1b" and not isinstance(option, UniformStageOption):
            raise MethodError(
                "interleaved-1f1b gives each mesh several stages, which UniformStageOption(num_stages=…) does; found "
                f"{type(option).__name__}"
            )
        if isinstance(option, ManualStageOption):
            return self.written(layers, self.manual(layers, option), name)
        if isinstance(option, UniformStageOption):
            return self.written(layers, self.uniform(layers, option), name)
        return self.searched(layers, option, name)

    def first_schedule(self, layers: Layers) -> str:
        if self.method.schedule != "auto":
            return self.method.schedule
        return "1f1b" if any(layers.backward) else "inference"

    # --------------------------------------------------------------------------------------------- micro-batches

    def best_count(self) -> int:
        """The number of micro-batches with the fastest step: powers of two are tried, from a middle one up or down."""
        size = batch_size(self.trace)
        counts = [n for n in range(1, size + 1) if size % n == 0 and (n & (n - 1) == 0 or n == size)]
        times: dict[int, float] = {}

        def seconds(place: int) -> float:
            if place not in times:
                times[place] = self.quick_s(counts[place]) if 0 <= place < len(counts) else math.inf
            return times[place]

        wanted = 4 * min(self.cluster.num_devices, 8)
        at = max(i for i, n in enumerate(counts) if n <= wanted)
        while math.isinf(seconds(at)) and at + 1 < len(counts):
            at += 1  # smaller ones take less memory
        for step in (1, -1):
            while seconds(at + step) < seconds(at):
                at += step
        return counts[at]

    def quick_s(self, count: int) -> float:
        """Predicted seconds of a step with so many micro-batches; infinite where nothing fits in memory."""
        layers = self.layers(count)
        name = self.first_schedule(layers)
        option = self.method.stage_option
        try:
            if isinstance(option, AutoStageOption):
                return self.found(layers, option, name, 1.0).latency_s
            return self.staged(layers).predicted.step_time_s
        except InfeasibleError:
            return math.inf

    # -------------------------------------------------------------------------------------------------- schedules

    def rescheduled(self, layers: Layers, plan: Plan) -> Plan:
        """The plan under the schedule that makes the step fastest, as far as it fits in memory."""
        best = plan
        for name in self.promising(plan):
            try:
                other = self.written(layers, self.specs, name)
            except InfeasibleError:
                continue
            if other.predicted.step_time_s < best.predicted.step_time_s * (1 - _WORTH_IT):
                best = other
        return best

    def promising(self, plan: Plan) -> list[str]:
        """Schedules that would be faster if half of a backward pass were for the weights, the best one first."""
        pipeline = plan.pipeline
        if pipeline is None or pipeline.schedule == "inference" or len(pipeline.stages) == 1:
            return []
        stages, count = pipeline.stages, pipeline.num_micro_batches
        times = Times.of(
            [s.forward_s for s in stages],
            [s.backward_s for s in stages],
            send_s=pipeline.send_s,
            update_s=pipeline.update_s,
        )
        tried = {n: make_schedule(n, len(stages), count) for n in _TRIED}
        seconds = {n: simulate(s, times).makespan_s for n, s in tried.items() if self.holds(pipeline, s)}
        here = plan.predicted.step_time_s
        better = sorted((s, n) for n, s in seconds.items() if s < here * (1 - _WORTH_IT))
        return [name for _, name in better[:2]]

    def holds(self, pipeline: Pipeline, schedule: Schedule) -> bool:
        """Whether the micro-batches that a schedule has in flight would fit in memory beside what is there."""
        return all(
            pipeline.memory_bytes[s.mesh] + (schedule.in_flight(i) - s.in_flight) * s.micro_bytes <= self.writer.budget
            for i, s in enumerate(pipeline.stages)
        )

    # ----------------------------------------------------------------------------------------------------- stages

    def written(self, layers: Layers, specs: list[StageSpec], name: str) -> Plan:
        self.specs = specs
        schedule = schedule_of(name, specs, layers.program.num_micro_batches)
        try:
            plan = self.writer.plan(layers, specs, schedule)
        except InfeasibleError:
            self.consider(name, specs, math.inf, math.inf)
            raise
        self.consider(name, specs, plan.predicted.step_time_s, plan.predicted.peak_memory_bytes)
        return plan

    def consider(self, name: str, specs: list[StageSpec], step_time_s: float, memory_bytes: float) -> None:
        """Remember a plan for the report."""
        what = f"{name}, {len(specs)} stage{'s' * (len(specs) > 1)}"
        known = [c for c in self.considered if c.name.partition(" (")[0] == what]
        found = Candidate(f"{what} ({len(known) + 1})" if known else what, step_time_s, memory_bytes)
        if all(replace(c, name=found.name) != found for c in known):
            self.considered.append(found)

    def searched(self, layers: Layers, option: AutoStageOption, name: str) -> Plan:
        """The stages that the dynamic program finds.

        It reckons with sums of layers: where a stage turns out not to fit as a whole, it is repeated with less memory.
        How much a stage waits for what it sends depends on the others; so it searches once with all of that waiting and
        once with none, and the plans themselves decide. Where stages as a whole turn out slower, it searches again. At
        last the stages as a whole say which of them need less saving of memory.
        """
        failure: InfeasibleError | None = None
        for share in _SHARES:
            found = [self.found(layers, option, name, share, waits=waits) for waits in (True, False)]
            try:
                plan = self.improved(layers, option, name, share, self.better(layers, name, *found))
                return self.relieved(layers, name, plan)
            except InfeasibleError as error:
                failure = error
        raise failure or InfeasibleError("no stages fit in memory")

    def improved(self, layers: Layers, option: AutoStageOption, name: str, share: float, plan: Plan) -> Plan:
        """The fastest plan of repeated searches, as long as stages turn out slower than the sums of their layers."""
        best, kept = plan, self.specs
        for _ in range(_ROUNDS):
            if not self.news(layers, plan):
                break
            try:
                found = [self.found(layers, option, name, share, waits=waits) for waits in (True, False)]
                plan = self.better(layers, name, *found)
            except InfeasibleError:
                break
            if plan.predicted.step_time_s < best.predicted.step_time_s:
                best, kept = plan, self.specs
        self.specs = kept
        return best

    def relieved(self, layers: Layers, name: str, plan: Plan) -> Plan:
        """The plan with each stage at the lowest price of memory at which it fits as a whole, and not computed again
        where it fits without, as far as that is faster."""
        specs = [replace(s, price=0.0) for s in self.specs]
        best = plan if specs == self.specs else self.faster(layers, name, plan, specs)
        for number in self.nearly_kept(layers, best):
            specs = [replace(s, remat=s.remat and i != number) for i, s in enumerate(self.specs)]
            best = self.faster(layers, name, best, specs)
        return best

    def faster(self, layers: Layers, name: str, plan: Plan, specs: list[StageSpec]) -> Plan:
        """The plan, or that of other stages if they fit in memory and take no longer."""
        kept = self.specs
        try:
            other = self.written(layers, specs, name)
        except InfeasibleError:
            other = plan
        if other is not plan and other.predicted.step_time_s <= plan.predicted.step_time_s:
            return other
        self.specs = kept
        return plan

    def nearly_kept(self, layers: Layers, plan: Plan) -> list[int]:
        """The stages computed again that would not take much more than all memory without, by the sums of layers."""
        if self.method.layer_option.remat_mode != "auto":
            return []
        assert plan.pipeline is not None
        costs, found = self.costs(layers), list[int]()
        for number, (spec, stage) in enumerate(zip(self.specs, plan.pipeline.stages, strict=True)):
            if spec.remat:
                submesh = Submesh(spec.hosts, spec.devices_per_host)
                tags = (Tag(spec.mesh_shape or (), False, price) for price in costs.prices)
                least = min(costs.option(spec.first, spec.last, submesh, t).bytes(stage.in_flight) for t in tags)
                found += [number] * (least <= _NEARLY * self.writer.budget)
        return found

    def news(self, layers: Layers, plan: Plan) -> bool:
        """Whether a plan says that stages are slower than the search reckons; later searches reckon with it."""
        assert plan.pipeline is not None
        costs, found = self.costs(layers), False
        for spec, stage in zip(self.specs, plan.pipeline.stages, strict=True):
            submesh, tag = (
                Submesh(spec.hosts, spec.devices_per_host),
                Tag(spec.mesh_shape or (), spec.remat, spec.price),
            )
            found |= costs.learn(spec.first, spec.last, submesh, tag, stage.forward_s + stage.backward_s)
        return found

    def better(self, layers: Layers, name: str, first: Search, second: Search) -> Plan:
        """The faster of two plans, as far as the estimate of the second one is near."""
        best = self.written(layers, [_spec(choice) for choice in first.stages], name)
        kept = self.specs
        specs = [_spec(choice) for choice in second.stages]
        if specs != kept and second.latency_s < _NEAR * best.predicted.step_time_s:
            try:
                other = self.written(layers, specs, name)
            except InfeasibleError:
                other = best
            if other.predicted.step_time_s < best.predicted.step_time_s:
                best, kept = other, specs
        self.specs = kept
        return best

    def found(self, layers: Layers, option: AutoStageOption, name: str, share: float, *, waits: bool = True) -> Search:
        """The stages of least latency, with a share of the memory; `waits`: for what they send."""
        costs = self.costs(layers)
        costs.budget = self.writer.budget * share
        costs.hides_sends = not waits or name in _EAGER
        count = layers.program.num_micro_batches
        number = None if option.num_stages == "auto" else option.num_stages
        if number is not None and number > layers.count:
            raise MethodError(
                f"{number} stages were asked for, but the model has {layers.count} layers; ask for fewer stages, or "
                f"for more layers with AutoLayerOption(layer_num={number})"
            )
        return search(
            layers.count, self.cluster, count, costs, costs.budget, in_flight=_in_flight(name), num_stages=number
        )

    def costs(self, layers: Layers) -> LayerCosts:
        count = layers.program.num_micro_batches
        if count not in self.priced:
            self.priced[count] = LayerCosts(
                self.trace,
                layers,
                self.cluster,
                self.writer.budget,
                self.method.layer_option.remat_mode,
                self.writer.options,
                self.writer.reader,
                stock=self.writer.stock,
            )
        self.writer.ideal_s = self.priced[count].ideal_s
        return self.priced[count]

    def layers(self, count: int) -> Layers:
        """The layers with so many micro-batches."""
        if count not in self.layered:
            program = split_batch(self.trace, count, statistics=self.method.batch_statistics)
            option = self.method.layer_option
            if isinstance(option, ManualLayerOption):
                self.layered[count] = form_layers(program, boundaries=True)
            else:
                number = None if option.layer_num == "auto" else option.layer_num
                layers = form_layers(program, number)
                wanted = self.wanted_stages()
                if number is None and layers.count < wanted:
                    layers = form_layers(program, wanted)
                self.layered[count] = layers
        return self.layered[count]

    def wanted_stages(self) -> int:
        """How many stages the options ask for at least."""
        number = getattr(self.method.stage_option, "num_stages", None)
        return number if isinstance(number, int) else 1

    def layers_by_loop(self, count: int, loops: list[int], lengths: tuple[int, ...]) -> Layers | None:
        """Layers that end right behind the loops of each stage; None where there is no such cut."""
        program = split_batch(self.trace, count, statistics=self.method.batch_statistics)
        ends = ends_by_loop(program, loops, lengths)
        return form_layers(program, ends=ends) if ends else None

    @property
    def remat(self) -> bool:
        return self.method.layer_option.remat_mode == "layer"

    def manual(self, layers: Layers, option: ManualStageOption) -> list[StageSpec]:
        named = option.forward_stage_layer_ids[-1][-1] + 1
        if named != layers.count:
            raise MethodError(
                f"the stages name layers 0 to {named - 1}, but the model has {layers.count}; name each of them once, "
                f"or ask for {named} with AutoLayerOption(layer_num={named})"
            )
        found: list[StageSpec] = []
        start = 0
        for ids, (hosts, per_host), logical in zip(
            option.forward_stage_layer_ids,
            option.submesh_physical_shapes,
            option.submesh_logical_shapes or (),
            strict=True,
        ):
            self.check_submesh(len(found), hosts, per_host, start, logical)
            found.append(StageSpec(ids[0], ids[-1], start, hosts, per_host, logical, self.remat))
            start += hosts * per_host
        if start != self.cluster.num_devices:
            raise MethodError(
                f"the submeshes have {start} devices in all, but {self.cluster.name} has {self.cluster.num_devices}; "
                "give shapes whose devices add up to that"
            )
        return found

    def check_submesh(self, stage: int, hosts: int, per_host: int, start: int, logical: tuple[int, ...] | None) -> None:
        size, whole = hosts * per_host, self.cluster.devices_per_host
        straddles = hosts == 1 and start // whole != (start + size - 1) // whole
        if hosts < 1 or per_host < 1 or per_host > whole or hosts > self.cluster.hosts:
            raise MethodError(
                f"stage {stage} asks for {hosts} hosts of {per_host} devices, but {self.cluster.name} has "
                f"{self.cluster.hosts} of {whole}"
            )
        if straddles or (hosts > 1 and (per_host != whole or start % whole)):
            raise MethodError(
                f"the submesh of stage {stage}, {hosts} × {per_host} from device {start} on, does not lie on whole "
                f"hosts or inside one of {whole} devices; order the stages so that each does"
            )
        product = 1
        for n in logical or (size,):
            product *= n
        if product != size:
            raise MethodError(
                f"stage {stage} has mesh {logical} on {size} devices; give a shape whose product is {size}"
            )

    def uniform(self, layers: Layers, option: UniformStageOption) -> list[StageSpec]:
        devices = self.cluster.num_devices
        stages = option.num_stages or max(n for n in range(1, layers.count + 1) if devices % n == 0)
        interleaved = self.method.schedule == "interleaved-1f1b"
        meshes = self.uniform_meshes(stages, interleaved)
        if stages > layers.count:
            raise MethodError(
                f"{stages} stages were asked for, but the model has {layers.count} layers; ask for fewer stages, or "
                f"for more layers with AutoLayerOption(layer_num={stages})"
            )
        if devices % meshes:
            raise MethodError(
                f"{stages} equal stages can't share {devices} devices; choose a number of stages that divides it, "
                "or ManualStageOption"
            )
        each = devices // meshes
        whole = self.cluster.devices_per_host
        if each > whole and each % whole:
            raise MethodError(
                f"{stages} equal stages would get {each} devices each, which are no whole hosts of {whole}"
            )
        hosts, per_host = (each // whole, whole) if each > whole else (1, each)
        for stage in range(stages):
            self.check_submesh(stage, hosts, per_host, (stage % meshes) * each, option.submesh_logical_shape)
        cuts = [round(i * layers.count / stages) for i in range(stages + 1)]
        return [
            StageSpec(a, b - 1, (i % meshes) * each, hosts, per_host, option.submesh_logical_shape, self.remat)
            for i, (a, b) in enumerate(itertools.pairwise(cuts))
        ]

    def uniform_meshes(self, stages: int, interleaved: bool) -> int:
        if not interleaved:
            return stages
        for meshes in range(stages // 2, 1, -1):
            if stages % meshes == 0 and self.cluster.num_devices % meshes == 0:
                return meshes
        raise MethodError(
            f"interleaved-1f1b needs two or more stages on each of two or more meshes; {stages} stages on "
            f"{self.cluster.num_devices} devices can't be divided so: ask for 4, 6 or 8 stages"
        )


def _spec(choice: Choice) -> StageSpec:
    tag = choice.option.tag
    if not isinstance(tag, Tag):
        raise TypeError(tag)
    return StageSpec(
        choice.first,
        choice.last,
        choice.devices[0],
        choice.submesh.hosts,
        choice.submesh.devices_per_host,
        tag.mesh_shape,
        tag.remat,
        tag.price,
    )


def _in_flight(name: str) -> Callable[[int, int], int]:
    """How many micro-batches a stage holds, by its place counted from the end."""
    match name:
        case "gpipe":
            return lambda stages, count: count
        case "inference":
            return lambda stages, count: 1
        case "eager-1f1b" | "zb-h2":
            return lambda stages, count: min(2 * stages - 1, count)
        case _:
            return min
