"""What a step on a Ray cluster costs the driver: 4 workers on this machine, beside 4 empty calls of the same workers.

    python -m benchmarks.ray_overhead
    python -m benchmarks.ray_overhead --leaves 4,40 --rounds 100
    python -m benchmarks.ray_overhead --quick

The driver orders a step and goes on. All rows compute about the same; what differs is the number of leaves of the state
and, in the last row of each method, the batch, which comes from the driver. Ray sends arguments of more than 100 KiB by
way of its object store, which takes longer. The columns are medians of milliseconds in the call of the step, with
quartiles where they are said:

- call: nothing is running when the call begins.
- ahead: the same where the workers are busy with up to three earlier steps; on a machine with few cores, that the
  operating system lets a worker run in the driver's place is in it.
- cpu: CPU time of the thread that calls, which neither waiting nor other processes change.
- 4 empty calls, + get: calls of the same 4 workers that do nothing, and with the wait for their answers, in turns with
  the steps.
- step: until a step is done, when nothing else runs.

The second table counts what passes through the driver in a step: all arguments of calls of workers and all that it
gets from Ray, pickled, beside the size of the state.
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import jax
import numpy as np

import alpa_like as alpa
from benchmarks.common import parser, table
from benchmarks.ray_support import Halves, described, local_nodes, parallelized, pipelined, wait_for, workers

WORKERS = 4
ROWS, MANY_ROWS = 64, 1024
"""Of a batch: 64 KiB and 1 MiB."""
WARM_UP = 5
AHEAD = 3
KIB = 1024.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the two tables."""
    options = _options(arguments)
    methods = (("ShardParallel", alpa.ShardParallel(mesh_shape=(WORKERS,))), ("2 stages", pipelined(2)))
    with local_nodes(WORKERS) as nodes:
        alpa.init(described(WORKERS), address=nodes.address)
        rows = [
            _measured(name, method, size, options.rounds)
            for name, method in methods
            for size in (*((n, ROWS) for n in options.leaves), (options.leaves[0], MANY_ROWS))
        ]
    heads = (
        "ms",
        "leaves",
        "batch KiB",
        "call",
        "quartiles",
        "ahead",
        "cpu",
        f"{WORKERS} empty calls",
        "+ get",
        "step",
    )
    print("\n" + table(heads, [times for times, _ in rows]))
    heads = ("KiB per step", "leaves", "batch", "sent", "received", "messages", "state")
    print("\n" + table(heads, [sizes for _, sizes in rows]))


@dataclass
class Times:
    """Seconds of each round, by what was measured."""

    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def timed(self, name: str, run: Callable[[], Any]) -> Any:
        """Run it; its wall time is kept as `name`, the CPU time of this thread as `name cpu`."""
        start_s, cpu_s = time.perf_counter(), time.thread_time()
        result = run()
        self.add(f"{name} cpu", time.thread_time() - cpu_s)
        self.add(name, time.perf_counter() - start_s)
        return result

    def add(self, name: str, seconds: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)

    def ms(self, name: str, share: float = 0.5) -> str:
        """A quantile in milliseconds."""
        return f"{1e3 * float(np.quantile(self.seconds[name], share)):.2f}"


@dataclass
class Side:
    """A step, and the state that it has come to."""

    step: Callable[..., Any]
    state: Any
    batch: Any

    def call(self) -> None:
        """Order a step."""
        self.state, _ = self.step(self.state, self.batch)

    def settle(self) -> None:
        """Wait until all steps are done."""
        wait_for((self.state[0], self.state[-1]))


def _measured(name: str, method: Any, size: tuple[int, int], rounds: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A line of each table; `size` is the number of leaves of the state and of rows of the batch."""
    leaves, rows = size
    model = Halves(width=128, rows=rows, products=max(2, 50 * ROWS // rows), leaves=leaves)
    side = Side(*parallelized(model, method), model.batch(0))
    for _ in range(WARM_UP):
        side.call()
        side.settle()
    times = Times()
    for number in range(rounds):
        for round_of in (_steps, _empty)[:: -1 if number % 2 else 1]:
            round_of(side, times)
    batch = f"{sum(x.nbytes for x in jax.tree.leaves(side.batch)) / KIB:.0f}"
    head = (name, str(leaves), batch)
    return (*head, *_times_row(times)), (*head, *_sizes_row(side))


def _steps(side: Side, times: Times) -> None:
    """One step alone, then some ahead of the workers."""
    start_s = time.perf_counter()
    times.timed("call", side.call)
    side.settle()
    times.add("step", time.perf_counter() - start_s)
    side.call()
    for _ in range(AHEAD):
        times.timed("ahead", side.call)
    side.settle()


def _empty(side: Side, times: Times) -> None:
    import ray

    del side
    handles = workers()
    start_s = time.perf_counter()
    refs = times.timed("empty", lambda: [worker.actor.call.remote("compiled") for worker in handles])
    ray.get(refs)
    times.add("get", time.perf_counter() - start_s)


def _times_row(times: Times) -> tuple[str, ...]:
    quartiles = f"{times.ms('call', 0.25)} to {times.ms('call', 0.75)}"
    rest = (times.ms(key) for key in ("ahead", "call cpu", "empty", "get", "step"))
    return times.ms("call"), quartiles, *rest


def _sizes_row(side: Side, steps: int = 8) -> tuple[str, ...]:
    with _counted() as counts:
        for _ in range(steps):
            side.call()
    side.settle()
    state = sum(x.nbytes for x in jax.tree.leaves(side.state))
    sizes = (f"{n / KIB:.1f}" for n in (counts["sent"] / steps, counts["received"] / steps))
    return *sizes, f"{counts['messages'] / steps:g}", f"{state / KIB:.0f}"


@contextmanager
def _counted() -> Generator[Counter[str]]:
    """Counts the bytes that this process gives to workers and gets from them, whoever asks for it."""
    import ray

    from alpa_like.runtime.ray_cluster import RayCluster

    counts: Counter[str] = Counter()

    def sending(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(cluster: Any, handles: Sequence[Any], method: str, *per_worker: Any) -> Any:
            for arguments in per_worker[0] if per_worker else [()] * len(handles):
                counts["sent"] += _nbytes((method, arguments))
                counts["messages"] += 1
            return call(cluster, handles, method, *per_worker)

        return counted

    def receiving(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            found = call(*arguments, **options)
            counts["received"] += _nbytes(found)
            return found

        return counted

    def put(value: Any, **options: Any) -> Any:
        counts["sent"] += _nbytes(value)
        return real_put(value, **options)

    real_put = ray.put
    with (
        mock.patch.object(RayCluster, "call", sending(RayCluster.call)),
        mock.patch.object(RayCluster, "ask", sending(RayCluster.ask)),
        mock.patch.object(ray, "get", receiving(ray.get)),
        mock.patch.object(ray, "put", put),
    ):
        yield counts


def _nbytes(value: Any) -> int:
    return len(pickle.dumps(value, protocol=5))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--leaves", type=lambda text: [int(n) for n in text.split(",")], default=[4, 40, 400])
    p.add_argument("--rounds", type=int, default=60)
    p.add_argument("--quick", action="store_true", help="4 and 40 leaves, 10 rounds")
    options = p.parse_args(arguments)
    if options.quick:
        options.leaves, options.rounds = [4, 40], 10
    return options


if __name__ == "__main__":
    main()
