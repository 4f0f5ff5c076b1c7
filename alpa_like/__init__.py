"""Automatic parallelization for JAX: one decorator shards an unmodified train step."""

import importlib
from typing import Any

from alpa_like.api import (
    ParallelFunction,
    create_state,
    grad,
    init,
    mark_pipeline_boundary,
    parallelize,
    shutdown,
    value_and_grad,
)
from alpa_like.checkpoint import Saving, latest_step, restore_checkpoint, save_checkpoint
from alpa_like.cluster import Cluster, Device, Link
from alpa_like.errors import (
    AlpaError,
    CheckpointError,
    ClusterError,
    GraphError,
    InfeasibleError,
    MethodError,
    PlanError,
    ProgramError,
    SolverError,
    TraceError,
    WorkerError,
)
from alpa_like.methods import DataParallel, ManualParallel, ShardParallel, Zero2Parallel, Zero3Parallel
from alpa_like.pipeshard import (
    AutoLayerOption,
    AutoStageOption,
    ManualLayerOption,
    ManualStageOption,
    PipeshardParallel,
    UniformStageOption,
)
from alpa_like.plan import Plan
from alpa_like.runtime.executable import Executable
from alpa_like.runtime.pipeline import PipelineExecutable
from alpa_like.runtime.remote_arrays import RemoteArray
from alpa_like.runtime.remote_executable import RemoteExecutable
from alpa_like.training import prefetch, train
from alpa_like.tune import tune

__all__ = [
    "AlpaError",
    "AutoLayerOption",
    "AutoStageOption",
    "CheckpointError",
    "Cluster",
    "ClusterError",
    "DataParallel",
    "Device",
    "Executable",
    "GraphError",
    "InfeasibleError",
    "Link",
    "ManualLayerOption",
    "ManualParallel",
    "ManualStageOption",
    "MethodError",
    "ParallelFunction",
    "PipelineExecutable",
    "PipeshardParallel",
    "Plan",
    "PlanError",
    "ProgramError",
    "RemoteArray",
    "RemoteExecutable",
    "Saving",
    "ShardParallel",
    "SolverError",
    "TraceError",
    "UniformStageOption",
    "WorkerError",
    "Zero2Parallel",
    "Zero3Parallel",
    "create_state",
    "grad",
    "init",
    "latest_step",
    "mark_pipeline_boundary",
    "parallelize",
    "prefetch",
    "restore_checkpoint",
    "save_checkpoint",
    "shutdown",
    "train",
    "tune",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    """`alpa_like.viz`, which needs matplotlib, when it is asked for."""
    if name == "viz":
        return importlib.import_module("alpa_like.viz")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
