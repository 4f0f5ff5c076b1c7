"""What Megatron-LM, DeepSpeed and plain data parallelism would do, under the same cost model as our plans.

What a device computes is measured with our own planner (`benchmarks.share`). What devices say to each other comes on
top, priced by `RingCost` on the mesh (stages, replicas, experts, tensor), tensor parallelism innermost, as Megatron-LM
places it:

- tensor parallel: two all-reduces of [B, S, D] per layer and pass (Shoeybi et al. 2019, figure 4), one for the
  embedding and one for the head, and two of a float32 per token in the loss;
- expert parallel: two all-to-alls of the dispatched tokens per sparse layer and pass (Lepikhin et al. 2020);
- data parallel: one all-reduce of float32 gradients per step; ZeRO-2 and 3 scatter gradients in every micro-batch, and
  ZeRO-2 gathers the parameters once, ZeRO-3 twice per micro-batch in float16 (Rajbhandari et al. 2020);
- between stages: the activations of the boundary, split over all devices of the stage (Narayanan et al. 2021).

Steps are 1F1B with equal layers per stage, played by `alpa_like.simulate`. Recomputation repeats the forward pass of
each layer with its communication. Doubts are settled in the baseline's favour: its working memory is counted on the
last stage only, and a gradient's all-reduce pays no latency.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp

import alpa_like as alpa
from alpa_like.cost import RingCost
from alpa_like.models import MoEConfig
from alpa_like.schedule import make_schedule
from alpa_like.simulate import Times, simulate
from benchmarks.share import Shares, Transformer, shares, unit_layers

__all__ = ["DATA_PARALLEL", "EXPERT_PARALLEL", "MEGATRON", "Baseline", "Grid", "Search", "candidates", "search"]

STATE_BYTES = 16.0
"""Of a parameter: itself, its gradient and Adam's two moments, float32 each, as our plans hold them."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What is tried; `zero` are stages of ZeRO, which go with one pipeline stage only."""

    pipeline: bool = True
    tensor: Sequence[int] = (1, 2, 4, 8)
    experts: bool = False
    zero: Sequence[int] = (0,)


MEGATRON = Grid()
DATA_PARALLEL = Grid(pipeline=False, tensor=(1,), zero=(0, 2, 3))
EXPERT_PARALLEL = Grid(pipeline=False, experts=True, zero=(0, 2))


@dataclass(frozen=True, slots=True, order=True)
class Baseline:
    """One way to train; a device sees `rows` sequences of each micro-batch."""

    step_s: float
    memory_bytes: float
    stages: int
    replicas: int
    expert: int
    tensor: int
    rows: int
    micro_batches: int
    remat: bool
    zero: int

    def __str__(self) -> str:
        parts = [f"dp{self.replicas}", f"tp{self.tensor}", f"pp{self.stages}"]
        parts += [f"ep{self.expert}"] * (self.expert > 1) + [f"zero{self.zero}"] * (self.zero > 0)
        return f"{' '.join(parts)}, {self.micro_batches}×{self.rows} rows{', remat' * self.remat}"


@dataclass(frozen=True, slots=True)
class Search:
    """The best of a grid, None where nothing fits, and how many were tried and fitted."""

    best: Baseline | None
    tried: int
    fitted: int


def search(config: Transformer, batch_size: int, cluster: alpa.Cluster, grid: Grid) -> Search:
    """The fastest of a grid that fits into the cluster's memory."""
    found = list(candidates(config, batch_size, cluster, grid))
    fits = [c for c in found if c.memory_bytes <= cluster.device.memory_bytes]
    best: Baseline | None = None
    for c in sorted(fits):  # their seconds are lower bounds so far
        if best is not None and c.step_s >= best.step_s:
            break
        exact = replace(c, step_s=_Layout(config, cluster, c).simulated_s())
        best = exact if best is None else min(best, exact)
    return Search(best, len(found), len(fits))


def candidates(config: Transformer, batch_size: int, cluster: alpa.Cluster, grid: Grid) -> Iterator[Baseline]:
    """All of a grid, with lower bounds of their seconds."""
    for stages, replicas, expert, tensor in layouts(config, cluster, grid):
        if batch_size % replicas:
            continue
        share = batch_size // replicas
        for rows in (n for n in range(1, share + 1) if share % n == 0 and n & (n - 1) == 0):
            for remat in (False, True):
                for zero in grid.zero if stages == 1 else (0,):
                    base = Baseline(
                        0.0, 0.0, stages, replicas, expert, tensor, rows, share // rows, remat, zero
                    )  # fmt: skip
                    layout = _Layout(config, cluster, base)
                    yield replace(base, step_s=layout.least_s(), memory_bytes=layout.memory_bytes())


def layouts(config: Transformer, cluster: alpa.Cluster, grid: Grid) -> Iterator[tuple[int, int, int, int]]:
    """Stages, replicas, experts and tensor parts that the model and the cluster allow."""
    units, devices = config.num_layers // unit_layers(config), cluster.num_devices
    for tensor in (t for t in grid.tensor if t <= cluster.devices_per_host and config.num_heads % t == 0):
        left, rest = divmod(devices, tensor)
        for stages in (s for s in range(1, left + 1) if not rest and left % s == 0 and units % s == 0):
            if stages > 1 and not grid.pipeline:
                continue
            replicas = left // stages
            for expert in sorted({1, replicas} if grid.experts else {1}):
                if not (isinstance(config, MoEConfig) and config.num_experts % expert) and expert <= replicas:
                    yield stages, replicas, expert, tensor


@dataclass(frozen=True)
class _Layout:
    """A candidate on its cluster."""

    config: Transformer
    cluster: alpa.Cluster
    base: Baseline

    @property
    def shares(self) -> Shares:
        return shares(self.config, self.cluster.part(1, 1), self.base.tensor, self.base.expert)

    @property
    def units(self) -> int:
        """Units of layers per stage."""
        return self.config.num_layers // unit_layers(self.config) // self.base.stages

    @property
    def cost(self) -> RingCost:
        b = self.base
        return RingCost(self.cluster, (b.stages, b.replicas // b.expert, b.expert, b.tensor))

    # -------------------------------------------------------------------------------------------------- seconds

    def unit_sends_s(self) -> float:
        """What the devices of a stage tell each other in one pass over a unit of layers."""
        b, c, dense = self.base, self.config, self.row_bytes() * self.base.rows
        reduced = 2 * unit_layers(c) * self.cost.collective_s("all-reduce", dense, (3,), combined=False)
        if not isinstance(c, MoEConfig):
            return reduced
        dispatched = c.num_experts * c.capacity(c.seq_len) / c.seq_len * dense
        return reduced + 2 * self.cost.collective_s("all-to-all", dispatched, (2,), combined=False) * (b.expert > 1)

    def row_bytes(self) -> float:
        """Of the activations [S, D] of one sequence."""
        return self.config.seq_len * self.config.d_model * jnp.dtype(self.config.dtype).itemsize

    def passes_s(self) -> tuple[list[float], list[float]]:
        """Seconds of each stage for one micro-batch: forward, backward."""
        b, sends = self.base, self.unit_sends_s() + self.gathers_s() / max(self.units, 1)
        unit, rest = self.shares.unit.at(b.rows), self.shares.rest.at(b.rows)
        forward = self.units * (unit.forward_s + sends)
        backward = self.units * (unit.backward_s + sends) + b.remat * self.units * (unit.forward_s + sends)
        edge = self.cost.collective_s("all-reduce", self.row_bytes() * b.rows, (3,), combined=False)
        sums = 2 * self.cost.collective_s("all-reduce", 4.0 * self.config.seq_len * b.rows, (3,), combined=False)
        forwards, backwards = [forward] * b.stages, [backward + self.scatters_s()] * b.stages
        forwards[0] += edge
        forwards[-1] += rest.forward_s + sums
        backwards[-1] += rest.backward_s + edge
        return forwards, backwards

    def gathers_s(self) -> float:
        """ZeRO-3: all parameters, float16, before each pass."""
        if self.base.zero < 3:
            return 0.0
        return self.cost.collective_s("all-gather", 2 * sum(self.stage_params()), (1, 2), combined=True)

    def scatters_s(self) -> float:
        """ZeRO-2 and 3: the gradients of a micro-batch."""
        if self.base.zero < 2:
            return 0.0
        return self.over_replicas_s("reduce-scatter", 4.0)

    def over_replicas_s(self, kind: str, nbytes: float) -> float:
        """A collective over the replicas of every parameter of a stage."""
        dense, experts = self.stage_params()
        apart = self.cost.collective_s(kind, nbytes * experts, (1,), combined=True)
        return apart + self.cost.collective_s(kind, nbytes * dense, (1, 2), combined=True)

    def stage_params(self) -> tuple[float, float]:
        """Parameters of one device on the fullest stage: all but experts, experts. Expert parts are in the share."""
        s = self.shares
        ends = s.rest_params if self.base.stages == 1 else s.rest_params / 2
        return self.units * (s.unit_params - s.unit_experts) + ends, self.units * s.unit_experts

    def update_s(self) -> float:
        """Gradients over the replicas, then Adam, which reads four numbers per parameter and writes three."""
        dense, experts = self.stage_params()
        apart, parts = self.copies() if self.base.zero else (1, 1)
        adam = self.cost.compute_s(0.0, 28.0 * (dense / parts + experts / apart), "f32")
        kind = {0: "all-reduce", 2: "all-gather"}.get(self.base.zero)
        return adam + (self.over_replicas_s(kind, 4.0) if kind else 0.0)

    def sends_s(self) -> list[float]:
        """Seconds of one micro-batch's activations across each boundary of stages."""
        b, host = self.base, self.cluster.devices_per_host
        each = b.replicas * b.tensor
        nbytes = self.row_bytes() * b.rows * b.replicas
        inside, outside = self.cluster.intra_host, self.cluster.inter_host
        found: list[float] = []
        for boundary in range(1, b.stages):
            crosses = boundary * each % host == 0
            link, senders = (outside, max(each, host)) if crosses else (inside, each)
            found.append(link.latency_s + nbytes / (link.bandwidth_bytes_per_s * senders))
        return found

    def least_s(self) -> float:
        """No step is shorter: the fullest stage works without a pause."""
        forward, backward = self.passes_s()
        return self.base.micro_batches * max(map(sum, zip(forward, backward, strict=True))) + self.update_s()

    def simulated_s(self) -> float:
        """The step under 1F1B."""
        forward, backward = self.passes_s()
        times = Times.of(forward, backward, send_s=self.sends_s(), update_s=[self.update_s()] * self.base.stages)
        return simulate(make_schedule("1f1b", self.base.stages, self.base.micro_batches), times).makespan_s

    # --------------------------------------------------------------------------------------------------- memory

    def memory_bytes(self) -> float:
        """Of the fullest device: the first stage holds the most micro-batches, the last one computes the loss."""
        b, unit, rest = self.base, self.shares.unit.at(self.base.rows), self.shares.rest.at(self.base.rows)
        entering = unit_layers(self.config) * self.row_bytes() * b.rows
        held = self.units * (entering if b.remat else unit.held_bytes)
        again = max(0.0, unit.held_bytes - entering) if b.remat else 0.0
        first = min(b.stages, b.micro_batches) * held + again
        last = held + again + rest.held_bytes + max(0.0, rest.peak_bytes)
        return self.state_bytes() + (max(first, last) if b.stages > 1 else last)

    def state_bytes(self) -> float:
        """ZeRO spreads part of the state over those devices that hold the same parameters."""
        spread = {0: 0.0, 2: 12.0, 3: 16.0}[self.base.zero]
        apart, parts = self.copies()
        dense, experts = self.stage_params()
        return (STATE_BYTES - spread) * (dense + experts) + spread * (dense / parts + experts / apart)

    def copies(self) -> tuple[int, int]:
        """How many devices of a stage hold the same experts, and how many the same other parameters."""
        return self.base.replicas // self.base.expert, self.base.replicas
