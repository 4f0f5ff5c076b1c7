"""What a step costs: seconds for compute and collectives, bytes on the wire.

The planner takes any `CostModel`; `RingCost` prices a `Cluster` with the roofline and with ring collectives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from alpa_like.cluster import CallTime, Cluster, Device, Link
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

    def elementwise_s(self, simple: float, costly: float, nbytes: float) -> float:
        """Seconds of what is no contraction: elements of simple and of costly functions, bytes through the memory."""
        ...

    def kernel_s(self, flops: float, nbytes: float, dtype: str) -> float:
        """Seconds of a matmul or a convolution, which are kernels of their own."""
        ...

    def columns_s(self, elements: float) -> float:
        """Seconds that a matmul takes longer that reads its left side by columns; `elements` of both sides."""
        ...

    def window_s(self, elements: float) -> float:
        """Seconds that a convolution takes longer that makes a window's gradient; `elements` of both sides."""
        ...

    def odd_taps_s(self, taps: float) -> float:
        """Seconds that one over an odd number of channels takes longer; positions of its result times its window's."""
        ...

    def copy_s(self, nbytes: float) -> float:
        """Seconds to bring so many bytes into another order, which a contraction or a collective needs; 0 if none."""
        ...

    @property
    def copies(self) -> bool:
        """Whether operands of contractions that lie in another order are copied."""
        ...

    @property
    def computes_again(self) -> bool:
        """Whether what several kernels read is computed in each of them where it is cheap, and kept by none."""
        ...

    @property
    def joins_reductions(self) -> bool:
        """Whether partial sums of gradients wait for each other, to be reduced by one collective."""
        ...

    @property
    def launch_s(self) -> float:
        """Seconds that a kernel takes however little it does."""
        ...

    @property
    def library_s(self) -> float:
        """The same of contractions and reductions."""
        ...

    def collective_s(self, kind: str, nbytes: float, axes: tuple[int, ...], *, combined: bool) -> float:
        """Seconds of one collective; `nbytes` as in `ring_bytes`. `combined`: it travels together with others."""
        ...


@dataclass(frozen=True)
class RingCost:
    """The roofline for compute, latency plus ring bytes over bandwidth for collectives.

    The roofline is that of what the device reaches (`flops_efficiency`, `memory_efficiency`); where its kernels don't
    hide all of the shorter of arithmetic and memory traffic, `exposed` adds a share of it.

    Assumptions: no overlap of compute and communication, every group of an axis communicates at once. XLA combines
    collectives that do not wait for each other (parameters, gradients) into few large ones, so those pay no latency.
    Where the platform has no reduce-scatter (XLA's CPU backend), one costs what the all-reduce does that stands in.

    A cluster's `profile` goes before these formulas: measured calls for the collectives inside a host, of which only
    the kinds that it names travel together, and what element-wise kernels and launches take.
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
        rate, bandwidth, exposed = _rates(self.cluster.device, dtype)
        arithmetic, memory = flops / rate, nbytes / bandwidth
        return max(arithmetic, memory) + exposed * min(arithmetic, memory)

    def elementwise_s(self, simple: float, costly: float, nbytes: float) -> float:
        profile = self.cluster.profile
        if not profile:
            return self.compute_s(0.0, nbytes, "f32")
        memory, work = nbytes / profile.bytes_per_s, simple * profile.simple_s + costly * profile.costly_s
        return max(memory, work) + self.cluster.device.exposed * min(memory, work)

    def kernel_s(self, flops: float, nbytes: float, dtype: str) -> float:
        profile = self.cluster.profile
        if not profile or profile.operand_bytes_per_s is None:
            return self.library_s + self.compute_s(flops, nbytes, dtype)
        return self.library_s + self.compute_s(flops, 0.0, dtype) + nbytes / profile.operand_bytes_per_s

    def columns_s(self, elements: float) -> float:
        return elements * self.cluster.profile.columns_s if self.cluster.profile else 0.0

    def window_s(self, elements: float) -> float:
        return elements * self.cluster.profile.window_s if self.cluster.profile else 0.0

    def odd_taps_s(self, taps: float) -> float:
        return taps * self.cluster.profile.odd_tap_s if self.cluster.profile else 0.0

    def copy_s(self, nbytes: float) -> float:
        return 2 * nbytes / self.cluster.profile.bytes_per_s if self.cluster.profile else 0.0

    @property
    def copies(self) -> bool:
        return self.cluster.profile is not None

    @property
    def computes_again(self) -> bool:
        return self.cluster.profile is None  # XLA's CPU backend keeps it

    @property
    def joins_reductions(self) -> bool:
        return self._joined(self.emitted("reduce-scatter"))

    @property
    def launch_s(self) -> float:
        return self.cluster.profile.kernel_s if self.cluster.profile else 0.0

    @property
    def library_s(self) -> float:
        return self.cluster.profile.library_s if self.cluster.profile else 0.0

    def collective_s(self, kind: str, nbytes: float, axes: tuple[int, ...], *, combined: bool) -> float:
        members = math.prod(self.mesh_shape[a] for a in axes)
        if members == 1:
            return 0.0
        kind = self.emitted(kind)
        if self.cluster.profile and (call := _call(self.cluster, kind, self.mesh_shape, axes)):
            return self._waiting_s(call, combined) + nbytes / call.bytes_per_s
        link = (_exchange_link if kind == "all-to-all" else _link)(self.cluster, self.mesh_shape, axes)
        rounds = 2 if kind == "all-reduce" else 1
        sent = ring_bytes(kind, nbytes, members)
        latency = 0.0 if combined else rounds * (members - 1) * link.latency_s
        return latency + sent / link.bandwidth_bytes_per_s

    def _waiting_s(self, call: CallTime, combined: bool) -> float:
        """What a measured collective takes however small it is; those that are joined share it with others.

        Of those that travel together but are not joined, which gather parameters, some run in a row and others between
        the kernels of small layers. They get the mean: where 0.13 ms were measured in a row and 0.26 among matmuls, one
        more gather lengthened steps of a U-Net by 0.2 to 0.35 ms, and steps of a GPT by 0.1 to 0.2.
        """
        if combined and self._joined(call.kind):
            return 0.0
        if not combined or call.queued_s is None:
            return call.latency_s
        return (call.latency_s + call.queued_s) / 2

    def _joined(self, kind: str) -> bool:
        return self.cluster.profile is not None and kind in self.cluster.profile.joined


@lru_cache(maxsize=4096)
def _link(cluster: Cluster, mesh_shape: tuple[int, ...], axes: tuple[int, ...]) -> Link:
    return cluster.group_link(mesh_shape, axes)


@lru_cache(maxsize=4096)
def _exchange_link(cluster: Cluster, mesh_shape: tuple[int, ...], axes: tuple[int, ...]) -> Link:
    return cluster.exchange_link(mesh_shape, axes)


@lru_cache(maxsize=256)
def _rates(device: Device, dtype: str) -> tuple[float, float, float]:
    """FLOP/s and bytes/s that large kernels reach, and the device's `exposed`."""
    # JAX's default precision for float32 matmuls is TensorFloat-32 where the hardware has it.
    rate = device.flops_per_s("tensorfloat32" if dtype == "f32" else dtype) * device.flops_efficiency
    return rate, device.memory_bandwidth_bytes_per_s * device.memory_efficiency, device.exposed


@lru_cache(maxsize=4096)
def _call(cluster: Cluster, kind: str, mesh_shape: tuple[int, ...], axes: tuple[int, ...]) -> CallTime | None:
    return cluster.call(kind, mesh_shape, axes)
