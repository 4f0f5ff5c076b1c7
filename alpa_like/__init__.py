"""Automatic parallelization for JAX: one decorator shards an unmodified train step."""

from alpa_like.api import ParallelFunction, create_state, init, parallelize, shutdown
from alpa_like.cluster import Cluster, Device, Link
from alpa_like.errors import (
    AlpaError,
    ClusterError,
    GraphError,
    InfeasibleError,
    MethodError,
    PlanError,
    ProgramError,
    SolverError,
    TraceError,
)
from alpa_like.methods import DataParallel, ManualParallel, ShardParallel, Zero2Parallel, Zero3Parallel
from alpa_like.plan import Plan
from alpa_like.runtime.executable import Executable

__all__ = [
    "AlpaError",
    "Cluster",
    "ClusterError",
    "DataParallel",
    "Device",
    "Executable",
    "GraphError",
    "InfeasibleError",
    "Link",
    "ManualParallel",
    "MethodError",
    "ParallelFunction",
    "Plan",
    "PlanError",
    "ProgramError",
    "ShardParallel",
    "SolverError",
    "TraceError",
    "Zero2Parallel",
    "Zero3Parallel",
    "create_state",
    "init",
    "parallelize",
    "shutdown",
]
