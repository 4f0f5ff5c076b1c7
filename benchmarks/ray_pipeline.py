"""How much faster a pipeline of 2 worker processes with a core each is than the same model on 1 worker with one core.

    python -m benchmarks.ray_pipeline                        # 8 and 16 micro-batches
    python -m benchmarks.ray_pipeline --micro-batches 4,8,16 --seconds 60
    python -m benchmarks.ray_pipeline --quick

A model of two equal halves. Each side is a program of its own that orders its steps on its own Ray workers:

- 1 worker: both halves as the only stage of a pipeline, so that it runs the same micro-batches with the same kinds of
  pieces, one after the other, and adds up gradients in the same way. Its worker has one core.
- 2 workers: the halves are two stages. Each worker has a core, and tensors travel between the processes.
- 2 on 1 core: the same two workers, confined to one core. What of the difference to `1 worker` it shows is due to other
  compiled pieces, to transfers and to two processes on a core; the rest of it is due to stages that wait.

XLA has one thread in each worker. The three take turns, in an order that alternates, and the core that is alone
does too. A step ends when the new state is there, and the next begins after that, so that steps do not overlap.
speedup is the median of the rounds' ratios of `1 worker` over `2 workers`; ideal is S · M / (M + S - 1), here
2 · M / (M + 1), which leaves out that transfers, and the driver, take time. The driver and Ray have no core of their
own where there are only two. `waited` is how long the threads of the workers stood in line for a core, in percent of
the step: where it is not small, other programs have disturbed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import alpa_like as alpa
from benchmarks.common import parser, table
from benchmarks.ray_support import Halves, described, local_nodes, parallelized, pin, pipelined, wait_for, workers

STAGES = 2
WIDTH = 512
ROWS = 128  # per micro-batch
PRODUCTS = 24  # per half
WARM_UP = 2
AT_LEAST = 5
SIDES = ("1 worker", "2 workers", "2 on 1 core")


@dataclass(frozen=True, slots=True)
class Order:
    """A step to run, with each worker on one of these cores."""

    micro_batches: int
    cores: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of a step, and for how many of them threads of its workers were ready but had no core."""

    seconds: float
    waited_s: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the pieces and the speedups."""
    options = _options(arguments)
    cores = sorted(os.sched_getaffinity(0))[:STAGES]
    if len(cores) < STAGES:
        raise SystemExit(f"this compares {STAGES} cores with one, but only {len(cores)} can be used here")
    with local_nodes(STAGES + 1) as nodes:
        sides = [Side(nodes.address, stages, options.micro_batches) for stages in (1, STAGES)]
        try:
            pieces = [(name, *side.pieces()) for name, side in zip(SIDES, sides, strict=False)]
            print("\n" + table(("ms of a piece", "forward", "backward"), pieces))
            rows = [_row(sides, m, cores, options.seconds) for m in options.micro_batches]
        finally:
            for side in sides:
                side.end()
    heads = ("micro-batches", *(f"{name} ms" for name in SIDES), "speedup", "quartiles", "ideal", "of ideal", "waited")
    print("\n" + table(heads, rows))


class Side:
    """A program that runs steps when it is told to, in `stages` stages on as many workers."""

    def __init__(self, address: str, stages: int, counts: Sequence[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, address, stages, tuple(counts)))
        self._process.start()
        theirs.close()

    def pieces(self) -> tuple[str, ...]:
        """What it says first: how long pieces take."""
        return self._pipe.recv()

    def run(self, order: Order) -> Sample:
        """Run a step."""
        self._pipe.send(order)
        return self._pipe.recv()

    def end(self) -> None:
        """Let the program end."""
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join()


def _serve(pipe: Connection, address: str, stages: int, counts: Sequence[int]) -> None:
    """The program of a side. Its workers have a device each, for which one thread is enough."""
    from alpa_like.runtime import ray_workers

    def environment(*arguments: Any, **options: Any) -> dict[str, str]:
        return usual(*arguments, **options) | {"NPROC": "1"}

    usual = ray_workers.environment
    ray_workers.environment = environment
    alpa.init(described(stages), address=address)
    steps = {count: Steps.of(count, stages) for count in counts}
    pipe.send(steps[counts[0]].pieces())
    while (order := pipe.recv()) is not None:
        for worker, core in zip(workers(), order.cores, strict=True):
            pin(worker.pid, core)
        pipe.send(steps[order.micro_batches].sample())
    alpa.shutdown()


@dataclass
class Steps:
    """A compiled step, and the state that it has come to."""

    step: Callable[..., Any]
    state: Any
    batch: Any

    @classmethod
    def of(cls, micro_batches: int, stages: int) -> Steps:
        """A step of so many micro-batches, whose workers have run it."""
        model = Halves(WIDTH, ROWS * micro_batches, PRODUCTS)
        made = cls(*parallelized(model, pipelined(micro_batches, stages)), model.batch(0))
        for _ in range(WARM_UP):
            made.sample()
        return made

    def sample(self) -> Sample:
        """Run a step to its end."""
        pids = [worker.pid for worker in workers()]
        before_s, start_s = _waited_s(pids), time.perf_counter()
        self.state, _ = self.step(self.state, self.batch)
        wait_for(self.state)
        return Sample(time.perf_counter() - start_s, _waited_s(pids) - before_s)

    def pieces(self) -> tuple[str, ...]:
        """Milliseconds of a forward and of a backward piece of each stage."""
        for number, worker in enumerate(workers()):
            pin(worker.pid, sorted(os.sched_getaffinity(0))[number])
        executable: Any = self.step
        (self.state, _), events = executable.last_executable.timed(self.state, self.batch)
        found: dict[str, dict[int, list[float]]] = {"forward": {}, "backward": {}}
        for event in events:
            kind = event.label.split()[0]
            if kind in found:
                found[kind].setdefault(event.mesh, []).append(event.end_s - event.start_s)
        return tuple(" and ".join(f"{1e3 * median(s):.1f}" for _, s in sorted(f.items())) for f in found.values())


def _waited_s(pids: Iterable[int]) -> float:
    """Seconds that the threads of processes were ready, but not running."""
    return sum(_waited_ns(place) for pid in pids for place in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def _waited_ns(schedstat: Path) -> int:
    try:
        return int(schedstat.read_text(encoding="ascii").split()[1])
    except (FileNotFoundError, ProcessLookupError, IndexError):  # the thread has just ended
        return 0


def _row(sides: Sequence[Side], count: int, cores: Sequence[int], seconds: float) -> tuple[str, ...]:
    """Rounds of all three, for so many seconds."""
    rounds: list[tuple[Sample, ...]] = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s or len(rounds) < AT_LEAST:
        rounds.append(_round(sides, count, cores, len(rounds)))
    alone, both, confined = (np.array([r[i].seconds for r in rounds]) for i in range(3))
    low, middle, high = np.quantile(alone / both, (0.25, 0.5, 0.75))
    ideal = STAGES * count / (count + STAGES - 1)
    waited = median(r[1].waited_s / r[1].seconds for r in rounds)
    return (
        str(count),
        *(f"{1e3 * float(np.median(s)):.0f}" for s in (alone, both, confined)),
        f"{middle:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{ideal:.3f}",
        f"{middle / ideal:.3f}",
        f"{100 * waited:.0f} %",
    )


def _round(sides: Sequence[Side], count: int, cores: Sequence[int], number: int) -> tuple[Sample, ...]:
    """A step of each, in the order of `SIDES`."""
    core = cores[number % STAGES]
    orders = [(sides[0], (core,)), (sides[1], tuple(cores)), (sides[1], (core,) * STAGES)]
    places = [*range(len(orders))][:: -1 if number // 2 % 2 else 1]
    samples = {place: orders[place][0].run(Order(count, orders[place][1])) for place in places}
    return tuple(samples[place] for place in range(len(orders)))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--micro-batches", type=lambda text: [int(n) for n in text.split(",")], default=[8, 16])
    p.add_argument("--seconds", type=float, default=60, help="of rounds for each row")
    p.add_argument("--quick", action="store_true", help="8 micro-batches, 10 seconds")
    options = p.parse_args(arguments)
    if options.quick:
        options.micro_batches, options.seconds = [8], 10.0
    return options


if __name__ == "__main__":
    main()
