"""`PipeshardParallel` and its options: how a step may be cut into layers, stages, micro-batches. Names are Alpa's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from alpa_like.errors import MethodError
from alpa_like.methods import Method
from alpa_like.plan import BATCH_STATISTICS
from alpa_like.schedule import SCHEDULES

__all__ = [
    "AutoLayerOption",
    "AutoStageOption",
    "ManualLayerOption",
    "ManualStageOption",
    "PipeshardParallel",
    "UniformStageOption",
]

RematMode = Literal["auto", "none", "layer"]


def _check_count(what: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MethodError(f"{what} must be 'auto' or a whole number of at least 1, found {value!r}")


def _check_mesh(name: str, shape: object) -> None:
    sizes = shape if isinstance(shape, tuple | list) else ()
    if not 1 <= len(sizes) <= 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
        raise MethodError(f"{name} must be 1 to 3 positive whole numbers, such as (2, 4), found {shape!r}")


def _pairs(shapes: Any) -> tuple[tuple[int, int], ...]:
    """The submeshes, or `MethodError`."""
    found = tuple(shapes) if isinstance(shapes, tuple | list) else (shapes,)
    for shape in found:
        if not (isinstance(shape, tuple | list) and len(shape) == 2 and all(type(n) is int for n in shape)):
            raise MethodError(
                "submesh_physical_shapes must be pairs (hosts, devices per host), such as [(1, 4), (1, 4)]; found "
                f"{shape!r}"
            )
    return tuple((shape[0], shape[1]) for shape in found)


def _layer_ids(stages: Any) -> tuple[tuple[int, ...], ...]:
    """The layers of each stage, or `MethodError`."""
    found = tuple(stages) if isinstance(stages, tuple | list) else (stages,)
    for ids in found:
        if not (isinstance(ids, tuple | list | range) and all(type(n) is int for n in ids)):
            raise MethodError(
                "forward_stage_layer_ids must be lists of layer numbers, such as [[0, 1], [2, 3]]; found "
                f"{ids!r} for a stage"
            )
    return tuple(tuple(ids) for ids in found)


def _check_remat(mode: str) -> None:
    if mode not in ("auto", "none", "layer"):
        raise MethodError(f"remat_mode must be 'auto', 'none' or 'layer', found {mode!r}")


@dataclass(frozen=True)
class AutoLayerOption:
    """Layers of balanced FLOPs with few bytes between them.

    layer_num: how many; "auto" takes as many as the model seems to have.
    remat_mode: "layer" computes each layer again in the backward pass instead of keeping what it made, "none" never
        does, "auto" does where memory would not suffice or the step would take longer without.
    """

    layer_num: Literal["auto"] | int = "auto"
    remat_mode: RematMode = "auto"

    def __post_init__(self) -> None:
        if self.layer_num != "auto":
            _check_count("layer_num", self.layer_num)
        _check_remat(self.remat_mode)


@dataclass(frozen=True)
class ManualLayerOption:
    """Layers end where the model calls `alpa.mark_pipeline_boundary`."""

    remat_mode: RematMode = "auto"

    def __post_init__(self) -> None:
        _check_remat(self.remat_mode)


@dataclass(frozen=True)
class AutoStageOption:
    """Stages and submeshes by dynamic programming (Alpa, OSDI'22, section 5). `num_stages` fixes their number."""

    num_stages: Literal["auto"] | int = "auto"

    def __post_init__(self) -> None:
        if self.num_stages != "auto":
            _check_count("num_stages", self.num_stages)


@dataclass(frozen=True)
class UniformStageOption:
    """Equal numbers of layers on equal submeshes.

    num_stages: by default one per device. submesh_logical_shape: the mesh of every stage, such as (2, 4); the best if
    not given.
    """

    num_stages: int | None = None
    submesh_logical_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_stages is not None:
            _check_count("num_stages", self.num_stages)
        if self.submesh_logical_shape is not None:
            _check_mesh("submesh_logical_shape", self.submesh_logical_shape)


@dataclass(frozen=True)
class ManualStageOption:
    """Stages by hand.

    forward_stage_layer_ids: the layers of each stage, such as [[0, 1], [2, 3, 4]].
    submesh_physical_shapes: (hosts, devices per host) of each stage, in the order of the cluster's devices.
    submesh_logical_shapes: the mesh of each stage; the best where not given or None.
    """

    forward_stage_layer_ids: Sequence[Sequence[int]]
    submesh_physical_shapes: Sequence[tuple[int, int]]
    submesh_logical_shapes: Sequence[tuple[int, ...] | None] | None = None

    def __post_init__(self) -> None:
        layers, shapes = _layer_ids(self.forward_stage_layer_ids), _pairs(self.submesh_physical_shapes)
        logical = tuple(self.submesh_logical_shapes or (None,) * len(layers))
        for shape in logical:
            if shape is not None:
                _check_mesh("submesh_logical_shapes", shape)
        for name, value in (
            ("forward_stage_layer_ids", layers),
            ("submesh_physical_shapes", shapes),
            ("submesh_logical_shapes", logical),
        ):
            object.__setattr__(self, name, value)
        if not layers or len(shapes) != len(layers) or len(logical) != len(layers):
            raise MethodError(
                f"ManualStageOption needs one submesh per stage, found {len(layers)} stages, {len(shapes)} physical "
                f"and {len(logical)} logical shapes"
            )
        flat = [n for ids in layers for n in ids]
        if flat != list(range(len(flat))) or not all(layers):
            raise MethodError(
                "forward_stage_layer_ids must name every layer once, in order and none empty, such as [[0, 1], [2]]; "
                f"found {[list(ids) for ids in layers]}"
            )


LayerOption = AutoLayerOption | ManualLayerOption
StageOption = AutoStageOption | UniformStageOption | ManualStageOption


@dataclass(frozen=True, kw_only=True)
class PipeshardParallel(Method):
    """Pipeline stages on submeshes, each sharded by the sharding solver (Alpa's inter- and intra-operator parallelism).

    num_micro_batches: into how many parts the batch is cut; "auto" takes the fastest predicted.
    layer_option, stage_option: how layers and stages are formed.
    schedule: one of "1f1b", "gpipe", "eager-1f1b", "interleaved-1f1b", "zb-h1", "zb-h2", "inference"; "auto" takes the
        fastest predicted that fits in memory, or "inference" for a step without gradient.
    batch_statistics: "error" refuses a step in which examples depend on each other (BatchNorm); "micro_batch" takes
        such statistics per micro-batch, which is no longer what `jax.jit` of the step computes.
    """

    num_micro_batches: Literal["auto"] | int = "auto"
    layer_option: LayerOption = field(default_factory=AutoLayerOption)
    stage_option: StageOption = field(default_factory=AutoStageOption)
    schedule: str = "auto"
    batch_statistics: Literal["error", "micro_batch"] = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_micro_batches != "auto":
            _check_count("num_micro_batches", self.num_micro_batches)
        if self.schedule not in ("auto", *SCHEDULES):
            raise MethodError(f"schedule must be 'auto' or one of {', '.join(SCHEDULES)}, found {self.schedule!r}")
        if self.batch_statistics not in BATCH_STATISTICS:
            known = " or ".join(map(repr, BATCH_STATISTICS))
            raise MethodError(f"batch_statistics must be {known}, found {self.batch_statistics!r}")
        if not isinstance(self.layer_option, LayerOption):
            raise MethodError(
                f"layer_option must be an AutoLayerOption or ManualLayerOption, found {self.layer_option!r}"
            )
        if not isinstance(self.stage_option, StageOption):
            raise MethodError(
                "stage_option must be an AutoStageOption, UniformStageOption or ManualStageOption, found "
                f"{self.stage_option!r}"
            )
        if self.mesh_shape != "auto":
            raise MethodError(
                "PipeshardParallel has a mesh per stage; give UniformStageOption(submesh_logical_shape=…) or "
                f"ManualStageOption(submesh_logical_shapes=…) instead of mesh_shape={self.mesh_shape}"
            )
