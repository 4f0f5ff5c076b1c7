"""Trace and `PipeshardParallel` → `Plan`: chooses micro-batches, layers, stages, submeshes, schedule, rematerialization.

Contract
    Input: a `Trace`, a `Cluster`, a `PipeshardParallel`. Output: a verified `Plan` with a pipeline.
    Raises: `MethodError` for options that the step or the cluster can't meet, `InfeasibleError` where nothing fits in
    memory, `TraceError` where micro-batches would change what the step computes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from alpa_like.cluster import Cluster
from alpa_like.errors import MethodError
from alpa_like.passes.layers import Layers, check_gradient, form_layers
from alpa_like.passes.microbatch import batch_size, split_batch
from alpa_like.passes.pipeline import PipelineWriter, StageSpec, schedule_of
from alpa_like.pipeshard import (
    AutoLayerOption,
    ManualLayerOption,
    ManualStageOption,
    PipeshardParallel,
    UniformStageOption,
)
from alpa_like.plan import Plan
from alpa_like.tracer import Trace

__all__ = ["make_pipeline_plan"]


def make_pipeline_plan(trace: Trace, cluster: Cluster, method: PipeshardParallel) -> Plan:
    """The best pipeline of a traced step for a cluster."""
    start = time.perf_counter()
    plan = _Planner(trace, cluster, method).plan()
    report = replace(plan.solver, seconds=time.perf_counter() - start)
    return replace(plan, solver=report)


@dataclass
class _Planner:
    trace: Trace
    cluster: Cluster
    method: PipeshardParallel
    layered: dict[int, Layers] = field(default_factory=dict[int, Layers])

    def __post_init__(self) -> None:
        self.writer = PipelineWriter(self.trace, self.cluster, self.method)

    def plan(self) -> Plan:
        count = self.method.num_micro_batches
        chosen = min(4, batch_size(self.trace)) if count == "auto" else count
        layers = self.layers(chosen)
        name = self.schedule_name(layers)
        check_gradient(layers, name)
        option = self.method.stage_option
        if isinstance(option, ManualStageOption):
            specs = self.manual(layers, option)
        else:
            specs = self.uniform(layers, option if isinstance(option, UniformStageOption) else UniformStageOption())
        return self.writer.plan(layers, specs, schedule_of(name, specs, chosen), layers.ends)

    def schedule_name(self, layers: Layers) -> str:
        if self.method.schedule != "auto":
            return self.method.schedule
        return "1f1b" if any(layers.backward) else "inference"

    def layers(self, count: int) -> Layers:
        """The layers with so many micro-batches."""
        if count not in self.layered:
            program = split_batch(self.trace, count, statistics=self.method.batch_statistics)
            option = self.method.layer_option
            if isinstance(option, ManualLayerOption):
                self.layered[count] = form_layers(program, boundaries=True)
            else:
                number = None if option.layer_num == "auto" else option.layer_num
                self.layered[count] = form_layers(program, number)
        return self.layered[count]

    @property
    def remat(self) -> bool:
        option = self.method.layer_option
        return isinstance(option, AutoLayerOption | ManualLayerOption) and option.remat_mode == "layer"

    def manual(self, layers: Layers, option: ManualStageOption) -> list[StageSpec]:
        named = option.forward_stage_layer_ids[-1][-1] + 1
        if named != layers.count:
            raise MethodError(
                f"the stages name layers 0 to {named - 1}, but the model has {layers.count}; name each of them once, or "
                f"ask for {named} with AutoLayerOption(layer_num={named})"
            )
        found: list[StageSpec] = []
        start = 0
        for ids, (hosts, per_host), logical in zip(
            option.forward_stage_layer_ids, option.submesh_physical_shapes, option.submesh_logical_shapes or (), strict=True
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

    def check_submesh(
        self, stage: int, hosts: int, per_host: int, start: int, logical: tuple[int, ...] | None
    ) -> None:
        size, whole = hosts * per_host, self.cluster.devices_per_host
        straddles = hosts == 1 and start // whole != (start + size - 1) // whole
        if hosts < 1 or per_host < 1 or per_host > whole or hosts > self.cluster.hosts:
            raise MethodError(
                f"stage {stage} asks for {hosts} hosts of {per_host} devices, but {self.cluster.name} has "
                f"{self.cluster.hosts} of {whole}"
            )
        if straddles or (hosts > 1 and (per_host != whole or start % whole)):
            raise MethodError(
                f"the submesh of stage {stage}, {hosts} × {per_host} from device {start} on, does not lie on whole hosts "
                f"or inside one of {whole} devices; order the stages so that each does"
            )
        product = 1
        for n in logical or (size,):
            product *= n
        if product != size:
            raise MethodError(f"stage {stage} has mesh {logical} on {size} devices; give a shape whose product is {size}")

    def uniform(self, layers: Layers, option: UniformStageOption) -> list[StageSpec]:
        devices = self.cluster.num_devices
        stages = option.num_stages or min(devices, layers.count)
        interleaved = self.method.schedule == "interleaved-1f1b"
        meshes = self.uniform_meshes(stages, interleaved)
        if stages > layers.count:
            raise MethodError(
                f"{stages} stages were asked for, but the model has {layers.count} layers; ask for fewer stages, or for "
                f"more layers with AutoLayerOption(layer_num={stages})"
            )
        if devices % meshes:
            raise MethodError(
                f"{stages} equal stages can't share {devices} devices; choose a number of stages that divides {devices}, or "
                "ManualStageOption"
            )
        each = devices // meshes
        whole = self.cluster.devices_per_host
        if each > whole and each % whole:
            raise MethodError(f"{stages} equal stages would get {each} devices each, which are no whole hosts of {whole}")
        hosts, per_host = (each // whole, whole) if each > whole else (1, each)
        cuts = [round(i * layers.count / stages) for i in range(stages + 1)]
        return [
            StageSpec(a, b - 1, (i % meshes) * each, hosts, per_host, option.submesh_logical_shape, self.remat)
            for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False))
        ]

    def uniform_meshes(self, stages: int, interleaved: bool) -> int:
        if not interleaved:
            return stages
        for meshes in range(stages // 2, 0, -1):
            if stages % meshes == 0 and self.cluster.num_devices % meshes == 0:
                return meshes
        return 1
