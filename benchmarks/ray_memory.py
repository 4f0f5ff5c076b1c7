"""Memory of the driver and of the workers over a long run on Ray: is anything held on to?

    python -m benchmarks.ray_memory
    python -m benchmarks.ray_memory --steps 500
    python -m benchmarks.ray_memory --quick

A pipeline of 2 stages on 2 workers each trains on 4 workers of this machine, with batches from the driver. The loss is
read at every 10th step, and a checkpoint is written at every 100th. After each loss that is read:

- resident: memory of the process in RAM, in MiB, and what it grows by, in KiB per step: straight lines through the
  first and the second half of the samples after the warm-up. Allocators, Ray's tables and Orbax's threads fill up at
  first, mostly with the first checkpoints; what is left in the second half would be a leak.
- arrays, MiB of arrays: what a worker holds for the driver at that moment. These must not grow at all.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import alpa_like as alpa
from alpa_like.runtime import session
from benchmarks.common import MIB, mib, parser, table
from benchmarks.ray_support import Halves, described, local_nodes, pipelined, resident_bytes, workers

WORKERS = 4
MODEL = Halves(width=128, rows=64, products=4, leaves=16)
READ_EVERY = 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per process."""
    options = _options(arguments)
    samples = Samples()
    with local_nodes(WORKERS) as nodes, tempfile.TemporaryDirectory() as folder:
        alpa.init(described(WORKERS), address=nodes.address)
        alpa.train(
            alpa.parallelize(MODEL.step, method=pipelined(4)),
            MODEL.init(),
            MODEL.batches,
            num_steps=options.steps,
            checkpoint_directory=folder,
            checkpoint_every=options.checkpoint_every,
            on_step=samples.on_step,
        )
    print("\n" + samples.table(options.warm_up))


@dataclass(frozen=True, slots=True)
class Sample:
    """What a process has after a step; the driver holds no arrays."""

    step: int
    resident: int
    arrays: int = 0
    array_bytes: int = 0


@dataclass
class Samples:
    """The samples of each process, by name."""

    of: dict[str, list[Sample]] = field(default_factory=dict[str, list[Sample]])

    def on_step(self, step: int, loss: Any) -> None:
        """Take samples if it is time."""
        if (step + 1) % READ_EVERY:
            return
        float(loss)
        self._add("driver", Sample(step + 1, resident_bytes(os.getpid())))
        handles = workers()
        for handle, held in zip(handles, _held(handles), strict=True):
            name = f"stage {handle.first // handle.count}, process {handle.process_id}"
            self._add(name, Sample(step + 1, resident_bytes(handle.pid), *held))

    def _add(self, name: str, sample: Sample) -> None:
        self.of.setdefault(name, []).append(sample)

    def table(self, warm_up: int) -> str:
        """First and last of what was sampled from step `warm_up` on."""
        heads = ("", "resident MiB", "last", "KiB per step", "second half", "arrays", "last", "MiB of arrays", "last")
        rows: list[tuple[str, ...]] = []
        for name, samples in self.of.items():
            kept = [s for s in samples if s.step >= warm_up]
            ends = kept[0], kept[-1]
            slopes = (f"{_slope(half):+.2f}" for half in (kept[: len(kept) // 2], kept[len(kept) // 2 :]))
            resident = (f"{s.resident / MIB:.1f}" for s in ends)
            arrays, array_bytes = (str(s.arrays) for s in ends), (mib(s.array_bytes) for s in ends)
            rows.append((name, *resident, *slopes, *arrays, *array_bytes))
        first, last = (self.of["driver"][i].step for i in (0, -1))
        return f"steps {max(first, warm_up)} to {last}\n{table(heads, rows)}"


def _slope(samples: Sequence[Sample]) -> float:
    """What the resident memory grows by, in KiB per step."""
    return float(np.polyfit([s.step for s in samples], [s.resident for s in samples], 1)[0]) / 1024


def _held(handles: Sequence[Any]) -> list[tuple[int, int]]:
    """Arrays and their bytes on each worker, after the steps that were ordered."""
    remote: Any = session.current().remote
    return remote.result(remote.workers.call(handles, "held", [()] * len(handles)))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--checkpoint-every", type=int, default=100)
    p.add_argument("--warm-up", type=int, default=210, help="samples from this step on count")
    p.add_argument("--quick", action="store_true", help="200 steps, checkpoints every 20")
    options = p.parse_args(arguments)
    if options.quick:
        options.steps, options.checkpoint_every, options.warm_up = 200, 20, 40
    return options


if __name__ == "__main__":
    main()
