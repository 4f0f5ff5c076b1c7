"""Steps of a pipeline measured on emulated devices, beside the same schedule simulated with the measured pieces.

    python -m benchmarks.pipeline_times                                # four schedules, 4, 8 and 16 micro-batches
    python -m benchmarks.pipeline_times --schedules 1f1b --micro-batches 8 --seconds 60
    python -m benchmarks.pipeline_times --quick

Two stages of a GPT run on two CPU devices. Each has about one core: XLA's pool gets as many threads as there are
devices (no flag takes fewer), and a device runs its programs one after the other. The first table says how true that
is: two devices at once must be as fast as one on one core, else this machine has no two free cores. Where one device
gets faster on all cores, it borrows the other's while that is idle: pieces at the ends of a step, where one stage
waits, are then faster than simulated.

- step: wall time of a step that is not traced, until all its results are there.
- simulated: `simulate` with the medians of the pieces and transfers, which traced steps give under the same load, plus
  the accumulators' zeros at the start. ratio is step over simulated.
- programs: the same seconds, but the instructions that the driver really runs, replayed on ideal devices. Where it
  differs from simulated, the programs are not what the schedule says; where step differs from it, the driver or the
  devices are not ideal.
- speedup: what all tasks take one after the other, over the step; ideal is S · M / (M + S - 1) for equal stages.
- dispatch: until the driver had handed everything out.

Other programs disturb: plain and traced steps take turns for `--seconds`, and only the fastest tenth of each counts.
`waited` is how long all threads together still stood in line for a core then (Linux's `schedstat`), in percent of the
step; where it is not far below 100 %, the two devices had less than two cores, and ratio says little. The last table is
the cost of the driver: a pipeline whose pieces compute next to nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

import alpa_like as alpa
from alpa_like.models import GPTConfig, Task, gpt_task
from alpa_like.runtime.instructions import Program, Route, Run, Send
from alpa_like.runtime.interpreter import Event, Interpreter
from alpa_like.runtime.local import LocalTransport
from alpa_like.runtime.transport import sharding_of
from alpa_like.schedule import make_schedule
from alpa_like.simulate import Times, simulate
from benchmarks.common import parser, table

STAGES = 2
SCHEDULES = ("1f1b", "gpipe", "eager-1f1b", "zb-h1")
GPT = GPTConfig(vocab_size=512, seq_len=128, d_model=128, num_heads=4, num_layers=4)
TINY = GPTConfig(vocab_size=64, seq_len=8, d_model=16, num_heads=2, num_layers=2)
ROWS = 2  # per micro-batch
WARM_UP = 3
AT_LEAST = 10  # samples
TASKS = ("forward", "backward", "input_grad", "weight_grad")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the three tables."""
    options = _options(arguments)
    os.environ["NPROC"] = "1"  # before XLA makes its pool, which gets a thread per device then
    alpa.init(num_devices=STAGES)
    print(_check_cores())
    heads = (
        "schedule",
        "micro-batches",
        "step ms",
        "simulated ms",
        "ratio",
        "programs ms",
        "speedup",
        "ideal",
        "dispatch ms",
        "waited",
    )
    rows = [_row(name, count, options.seconds) for name in options.schedules for count in options.micro_batches]
    print("\n" + table(heads, rows))
    print("\n" + _driver())


@dataclass
class Pipeline:
    """A compiled pipeline, and the state that it has come to."""

    executable: Any
    state: Any
    batch: Any

    @classmethod
    def of(cls, config: GPTConfig, schedule: str, micro_batches: int) -> Pipeline:
        """A pipeline of two stages of one device."""
        task: Task = gpt_task(config, ROWS * micro_batches)
        method = alpa.PipeshardParallel(
            num_micro_batches=micro_batches,
            schedule=schedule,
            layer_option=alpa.AutoLayerOption(layer_num=STAGES, remat_mode="none"),
            stage_option=alpa.UniformStageOption(num_stages=STAGES),
        )
        step = alpa.parallelize(task.step, method=method)
        executable = step.compile(jax.eval_shape(task.init), task.abstract_batch())
        return cls(executable, task.init(), task.batch(0))

    def step(self) -> float:
        """Run one step; seconds until the driver had handed everything out."""
        start = time.perf_counter()
        self.state, loss = self.executable.run(*self.executable.place(self.state, self.batch))
        dispatched_s = time.perf_counter() - start
        jax.block_until_ready((self.state, loss))
        return dispatched_s

    def traced(self) -> tuple[Event, ...]:
        """Run one traced step; when its pieces ran."""
        (self.state, _), events = self.executable.timed(self.state, self.batch)
        return events


# ------------------------------------------------------------------------------------------------ quiet samples


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of something: its seconds, how much of them our threads waited for a core, and its result."""

    seconds: float
    waited: float
    result: Any


def _sample(run: Callable[[], Any]) -> Sample:
    before, start = _waited_s(), time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    return Sample(seconds, max(0.0, _waited_s() - before) / seconds, result)


def _waited_s() -> float:
    """Seconds that the threads of this process were ready, but not running; 0 where Linux does not tell."""
    return sum(map(_waited_ns, Path("/proc/self/task").glob("*/schedstat"))) / 1e9


def _waited_ns(schedstat: Path) -> int:
    try:
        return int(schedstat.read_text(encoding="ascii").split()[1])
    except (FileNotFoundError, ProcessLookupError):  # the thread has just ended
        return 0


def _fastest(samples: Iterable[Sample]) -> list[Sample]:
    """The fastest tenth of the samples: the others were disturbed more."""
    ordered = sorted(samples, key=lambda s: s.seconds)
    return ordered[: -(-len(ordered) // 10)]


# ------------------------------------------------------------------------------------------- measured and simulated


def _row(name: str, micro_batches: int, seconds: float) -> tuple[str, ...]:
    pipeline = Pipeline.of(GPT, name, micro_batches)
    for _ in range(WARM_UP):
        pipeline.step()
    plain, traced = list[Sample](), list[Sample]()
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s or len(plain) < AT_LEAST:
        plain.append(_sample(pipeline.step))
        traced.append(_sample(pipeline.traced))
    steps, traces = _fastest(plain), _fastest(traced)
    step_s = median(s.seconds for s in steps)
    pieces = _pieces([s.result for s in traces])
    times = _times(pieces, _send_s(pipeline.executable, micro_batches))
    start_s = pieces.get(("zeros", 0), 0.0)
    simulated_s = start_s + simulate(make_schedule(name, STAGES, micro_batches), times).makespan_s
    programs_s = start_s + _replayed_s(pipeline.executable._lowered_pipeline.programs, pieces, times.send_s)
    alone_s = micro_batches * sum(pieces.get((kind, stage), 0.0) for kind in TASKS for stage in range(STAGES))
    return (
        name,
        str(micro_batches),
        f"{1e3 * step_s:.1f}",
        f"{1e3 * simulated_s:.1f}",
        f"{step_s / simulated_s:.3f}",
        f"{1e3 * programs_s:.1f}",
        f"{alone_s / step_s:.2f}",
        f"{STAGES * micro_batches / (micro_batches + STAGES - 1):.2f}",
        f"{1e3 * median(s.result for s in steps):.1f}",
        f"{100 * median(s.waited for s in steps):.0f} %",
    )


def _pieces(traces: Iterable[Sequence[Event]]) -> dict[tuple[str, int], float]:
    """Median seconds by kind of piece and mesh; a mesh has one stage here."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for event in (e for events in traces for e in events):
        found[event.label.split()[0], event.mesh].append(event.end_s - event.start_s)
    return {key: median(seconds) for key, seconds in found.items()}


def _times(pieces: Mapping[tuple[str, int], float], send_s: tuple[float, ...]) -> Times:
    kinds = [tuple(pieces.get((kind, stage), 0.0) for stage in range(STAGES)) for kind in TASKS]
    update_s = tuple(
        sum(s for (kind, at), s in pieces.items() if at == mesh and kind not in (*TASKS, "zeros"))
        for mesh in range(STAGES)
    )
    return Times(*kinds, send_s=send_s, update_s=update_s)


def _replayed_s(programs: Sequence[Program], pieces: Mapping[tuple[str, int], float], send_s: Sequence[float]) -> float:
    """Seconds of the programs on devices that run what they get in order; each buffer is the time when it is there."""
    clocks: dict[object, float] = defaultdict(float)

    def run(mesh: int, seconds: float, outputs: int, *inputs: float) -> list[float]:
        clocks[mesh] = max(clocks[mesh], *inputs, 0.0) + seconds
        return [clocks[mesh]] * outputs

    def move(route: Route, value: float) -> float:
        link = route.source, route.target
        clocks[link] = max(clocks[link], value) + send_s[min(link)]
        return clocks[link]

    calls: dict[str, Callable[..., list[float]]] = {}
    for program, instruction in ((p, i) for p in programs for i in p.instructions if isinstance(i, Run)):
        kind = instruction.piece.split()[0]
        seconds = 0.0 if kind == "zeros" else pieces[kind, program.mesh]
        calls[instruction.piece] = partial(run, program.mesh, seconds, len(instruction.outputs))
    moves = {route: partial(move, route) for route in _sent(programs)}
    interpreter = Interpreter(programs, calls, moves)
    interpreter(0.0 for _ in interpreter.given)
    return max(clocks.values())


def _send_s(executable: Any, micro_batches: int) -> tuple[float, ...]:
    """Seconds of what one micro-batch sends over each boundary in the forward pass."""
    lowered = executable._lowered_pipeline
    seconds = [0.0] * (STAGES - 1)
    for route in _sent(lowered.programs):
        if route.target == route.source + 1:
            seconds[route.source] += _transfer_s(*lowered.transfers[route]) / micro_batches
    return tuple(seconds)


def _sent(programs: Iterable[Program]) -> Iterator[Route]:
    for program in programs:
        for instruction in program.instructions:
            if isinstance(instruction, Send):
                yield instruction.transfer


def _transfer_s(transfer: Any, dtype: Any) -> float:
    devices, seconds = jax.devices(), list[float]()
    transport = LocalTransport(transfer, devices, dtype)
    value = jax.device_put(jnp.zeros(transfer.shape, dtype), sharding_of(transfer.source, devices))
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(transport(value))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


# ---------------------------------------------------------------------------------------------------------- cores


def _check_cores() -> str:
    """How a train step on one device profits from a second core, and suffers from a second device."""
    task = gpt_task(GPT, ROWS)
    step = jax.jit(task.step)
    given = [jax.device_put((task.init(), task.batch(0)), device) for device in jax.devices()]
    one, two = (partial(_run_all, step, given[:count]) for count in (1, 2))
    for run in (one, two, two):
        run()
    with _on_one_core():
        confined = _milliseconds(one)
    rows = [
        ("one device, one core", f"{confined:.1f}"),
        ("one device, all cores", f"{_milliseconds(one):.1f}"),
        ("two devices at once", f"{_milliseconds(two):.1f}"),
    ]
    return table(("step of a whole GPT on each device", "ms"), rows)


def _run_all(step: Callable[..., Any], given: Sequence[Any]) -> None:
    jax.block_until_ready([step(*arguments) for arguments in given])


def _milliseconds(run: Callable[[], Any], repeats: int = 60) -> float:
    return 1e3 * median(s.seconds for s in _fastest(_sample(run) for _ in range(repeats)))


@contextmanager
def _on_one_core() -> Generator[None]:
    """All threads that exist now on one core; elsewhere than on Linux, nothing changes."""
    threads = [int(p.name) for p in Path("/proc/self/task").glob("*")]
    cores = os.sched_getaffinity(0) if threads else set[int]()
    for thread in threads:
        os.sched_setaffinity(thread, {min(cores)})
    try:
        yield
    finally:
        for thread in threads:
            os.sched_setaffinity(thread, cores)


# --------------------------------------------------------------------------------------------------------- driver


class Clock:
    """Sums up, by name, how often and how long calls took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments)
            self.seconds[name] += time.perf_counter() - start
            self.counts[name] += 1
            return result

        return run


class TimedTransport:
    """A transport whose halves are timed."""

    def __init__(self, transport: LocalTransport, clock: Clock) -> None:
        self.send = clock.timed("send", transport.send)
        self.receive = clock.timed("recv", transport.receive)


def _driver(micro_batches: int = 8, repeats: int = 200) -> str:
    """What the driver's loop takes per instruction, and what of it are the calls."""
    pipeline = Pipeline.of(TINY, "1f1b", micro_batches)
    lowered = pipeline.executable._lowered_pipeline
    plain, counts = pipeline.executable._interpreter, _instruction_counts(lowered.programs)
    loops = [_clocked(pipeline, plain).seconds["loop"] for _ in range(repeats)]
    inside = [_clocked(pipeline, plain, lowered) for _ in range(repeats)]
    rows = [_driver_row(kind, [c.seconds[kind] for c in inside], counts[kind]) for kind in ("run", "send", "recv")]
    rest = [c.seconds["loop"] - sum(c.seconds[kind] for kind in ("run", "send", "recv")) for c in inside]
    rows.append(_driver_row("the loop itself, free included", rest, sum(counts.values())))
    rows.append(_driver_row("all, without the clocks", loops, sum(counts.values())))
    heads = ("driver of a tiny pipeline", "per step", "us each", "least us each")
    return table(heads, rows)


def _driver_row(kind: str, seconds: Sequence[float], count: int) -> tuple[str, ...]:
    return kind, str(count), f"{1e6 * median(seconds) / count:.1f}", f"{1e6 * min(seconds) / count:.1f}"


def _instruction_counts(programs: Iterable[Program]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for program in programs:
        for instruction in program.instructions:
            counts[type(instruction).__name__.lower()] += 1
    return counts


def _clocked(pipeline: Pipeline, interpreter: Interpreter, lowered: Any = None) -> Clock:
    """One step with its loop timed, and with `lowered` every call in it."""
    clock = Clock()
    if lowered is not None:
        pieces = {name: clock.timed("run", piece) for name, piece in lowered.pieces.items()}
        devices = jax.devices()
        moves = {
            route: TimedTransport(LocalTransport(transfer, devices, dtype), clock)
            for route, (transfer, dtype) in lowered.transfers.items()
        }
        interpreter = Interpreter(lowered.programs, pieces, moves)
    pipeline.executable._interpreter = clock.timed("loop", interpreter)
    pipeline.step()
    return clock


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--schedules", type=lambda text: text.split(","), default=list(SCHEDULES))
    p.add_argument("--micro-batches", type=lambda text: [int(n) for n in text.split(",")], default=[4, 8, 16])
    p.add_argument("--seconds", type=float, default=20, help="of plain and traced steps for each row")
    p.add_argument("--quick", action="store_true", help="one schedule, 4 micro-batches, 5 seconds")
    options = p.parse_args(arguments)
    if options.quick:
        options.schedules, options.micro_batches, options.seconds = ["1f1b"], [4], 5.0
    return options


if __name__ == "__main__":
    main()
