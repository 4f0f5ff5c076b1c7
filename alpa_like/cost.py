"""What a step costs: seconds for compute and collectives, bytes on the wire.

The planner takes any `CostModel`; `RingCost` prices a `Cluster` with the roofline and with ring collectives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from alpa_like.cluster import Cluster, Link
from alpa_like.errors import ClusterError

__all__ = ["COLLECTIVES", "CostModel", "RingCost", "ring_bytes"]

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")


def ring_bytes(kind: str, nbytes: float, members: int) -> float:
    """Bytes that each device sends in a ring collective of `members` devices.

    `nbytes` is the whole buffer of one device: the gathered result of an all-gather, the operand of the others.
    Formulas: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH" (2005).
    Raises `ClusterError` for a collective that it does not know.
    """
    if kind not in COLLECTIVES:
        raise ClusterError(f"unknown collective {kind!r}: expected one of {COLLECTIVES}")
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * nbytes * (members - 1) / members


class CostModel(Protocol):
    """Prices one device's share of the work. `axes` are the mesh axes that a collective runs over."""

    @property
    def mesh_shape(self) -> tuple[int, ...]: ...

    def emitted(self, kind: str) -> str:
        """The collective that the platform's compiler makes of one of this kind."""
        ...

    def compute_s(self, flops: float, nbytes: float, dtype: str) -> float:
        """Seconds to do `flops` in `dtype` while `nbytes` go through the device's memory."""
        ...

    def collective_s(self, kind: str, nbytes: float, axes: tuple[int, ...], *, combined: bool) -> float:
        """Seconds of one collective; `nbytes` as in `ring_bytes`. `combined`: it travels together with others."""
        ...


@dataclass(frozen=True)
class RingCost:
    """The roofline for compute, latency plus ring bytes over bandwidth for collectives.

    Assumptions: no overlap of compute and communication, every group of an axis communicates at once. XLA combines
    collectives that do not wait for each other (parameters, gradients) into few large ones, so those pay no latency.
    Where the platform has no reduce-scatter (XLA's CPU backend), one costs what the all-reduce does that stands in.
    """

    cluster: Cluster
    mesh_shape: tuple[int, ...]
    native_reduce_scatter: bool = True

    def __post_init__(self) -> None:
        if math.prod(self.mesh_shape) != self.cluster.num_devices:
            raise ClusterError(
                f"mesh {self.mesh_shape} has {math.prod(self.mesh_shape)} devices, but cluster {self.cluster.name} "
                f"has {self.cluster.num_devices}; choose a mesh shape whose product is {self.cluster.num_devices}"
            )

    def emitted(self, kind: str) -> str:
        return "all-reduce" if kind == "reduce-scatter" and not self.native_reduce_scatter else kind

    def compute_s(self, flops: float, nbytes: float, dtype: str) -> float:
        device = self.cluster.device
        # JAX's default precision for float32 matmuls is TensorFloat-32 where the hardware has it.
        peak = device.flops_per_s("tensorfloat32" if dtype == "f32" else dtype) * device.flops_efficiency
        return max(flops / peak, nbytes / device.memory_bandwidth_bytes_per_s)

    def collective_s(self, kind: str, nbytes: float, axes: tuple[int, ...], *, combined: bool) -> float:
        members = math.prod(self.mesh_shape[a] for a in axes)
        if members == 1:
            return 0.0
        kind = self.emitted(kind)
        link = _link(self.cluster, self.mesh_shape, axes)
        rounds = 2 if kind == "all-reduce" else 1
        sent = ring_bytes(kind, nbytes, members)
        latency = 0.0 if combined else rounds * (members - 1) * link.latency_s
        return latency + sent / link.bandwidth_bytes_per_s


@lru_cache(maxsize=4096)
def _link(cluster: Cluster, mesh_shape: tuple[int, ...], axes: tuple[int, ...]) -> Link:
    return cluster.group_link(mesh_shape, axes)
