"""Data parallel and ZeRO for any task, with gradients accumulated over micro-batches, under our cost model.

Every device holds the whole model and computes on its part of each micro-batch, so its seconds and bytes are those that
our planner gives for the task on one device (`share.one_device`), for two sizes of micro-batch; they grow affinely
between them. With recomputation the backward pass runs the forward pass too, and a third plan tells what is held then.
What is sent comes on top, as in `benchmarks.megatron`. Statistics of a batch (BatchNorm) are taken per device and
micro-batch, as data parallel training does it, and cost no communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax

import alpa_like as alpa
from alpa_like.cost import RingCost
from alpa_like.models import Task
from benchmarks.megatron import Baseline, Search
from benchmarks.share import Affine, Measure, one_device, parameters

__all__ = ["search_replicas"]

STAGES_OF_ZERO = (0, 2, 3)
MEASURED_ROWS = (4, 16)

TaskOf = Callable[[int], Task]
"""Rows of a batch → the task."""


def search_replicas(task_of: TaskOf, batch_size: int, cluster: alpa.Cluster) -> Search:
    """The fastest of data parallel, ZeRO-2 and ZeRO-3, with and without recomputation, that fits into memory."""
    found = list(_candidates(task_of, batch_size, cluster))
    fits = [c for c in found if c.memory_bytes <= cluster.device.memory_bytes]
    return Search(min(fits, default=None), len(found), len(fits))


@dataclass(frozen=True, slots=True)
class _Model:
    """Bytes of the parameters and of the optimizer's state, and what a device takes for a micro-batch."""

    params: float
    param_bytes: float
    other_bytes: float
    measures: Affine
    update_s: float
    remat: bool

    def at(self, rows: int) -> Measure:
        return self.measures.one.plus(self.measures.more, rows)


def _candidates(task_of: TaskOf, batch_size: int, cluster: alpa.Cluster) -> Iterator[Baseline]:
    devices = cluster.num_devices
    if batch_size % devices:
        return
    share = batch_size // devices
    for model in _models(task_of, cluster):
        for rows in (n for n in range(1, min(share, 64) + 1) if share % n == 0):
            for zero in STAGES_OF_ZERO if devices > 1 else (0,):
                yield _candidate(model, cluster, rows, share // rows, zero)


def _models(task_of: TaskOf, cluster: alpa.Cluster) -> tuple[_Model, _Model]:
    """Without and with recomputation."""
    state = jax.eval_shape(task_of(1).init)
    count = parameters(state.params)
    total = float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)))
    low, high = MEASURED_ROWS
    first, update_s = one_device(cluster, task_of(2 * low), layers="auto")
    second, _ = one_device(cluster, task_of(2 * high), layers="auto")
    more = _scaled(second.plus(first, -1.0), 1 / (high - low))
    none = first.plus(more, -low)
    again, _ = one_device(cluster, task_of(2 * low), remat=True, layers="auto")
    held, peak = again.held_bytes / low, again.peak_bytes / low
    slower = Measure(more.forward_s, more.backward_s + more.forward_s, held, peak)
    fixed = Measure(none.forward_s, none.backward_s + none.forward_s, 0.0, 0.0)
    plain = _Model(count, 4 * count, total - 4 * count, Affine(none, more), update_s, remat=False)
    return plain, replace(plain, measures=Affine(fixed, slower), remat=True)


def _scaled(measure: Measure, factor: float) -> Measure:
    return Measure(0.0, 0.0, 0.0, 0.0).plus(measure, factor)


def _candidate(model: _Model, cluster: alpa.Cluster, rows: int, count: int, zero: int) -> Baseline:
    devices = cluster.num_devices
    cost, measure = RingCost(cluster, (devices,)), model.at(rows)

    def sent_s(kind: str, nbytes: float) -> float:
        return cost.collective_s(kind, nbytes, (0,), combined=True)

    each = measure.forward_s + measure.backward_s
    each += sent_s("reduce-scatter", 4 * model.params) * (zero >= 2)
    each += 2 * sent_s("all-gather", 2 * model.params) * (zero == 3)
    once = {0: sent_s("all-reduce", 4 * model.params), 2: sent_s("all-gather", 4 * model.params)}.get(zero, 0.0)
    spread = {0: 0.0, 2: model.other_bytes + 4 * model.params}.get(
        zero, model.other_bytes + model.param_bytes + 4 * model.params
    )
    whole = model.param_bytes + model.other_bytes + 4 * model.params - spread
    memory = whole + spread / devices + measure.held_bytes + measure.peak_bytes
    step = count * each + once + model.update_s / (devices if zero else 1)
    return Baseline(step, memory, 1, devices, 1, 1, rows, count, model.remat, zero)
