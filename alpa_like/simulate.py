"""What a schedule costs: it is played with the seconds of every task, and what happens is written down.

The planner calls `simulate` for each candidate. `chrome_trace` takes the events of a simulation and those of a measured
run alike.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpa_like.errors import PlanError
from alpa_like.schedule import HELD_CHANGE, Kind, Schedule, Task, receiver


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of every task. The first four have one entry per stage, for one micro-batch.

    `send_s` has one entry per boundary: sending an activation from stage s to s + 1, or its gradient back. `update_s`
    has one per mesh, of the optimizer's update after the last task; empty for none. A schedule uses either
    `backward_s` or the two parts. `PlanError` for lengths that do not fit or seconds that are negative or not finite.

    >>> Times.uniform(2, send_s=0.5).send_s
    (0.5,)
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    input_grad_s: tuple[float, ...]
    weight_grad_s: tuple[float, ...]
    send_s: tuple[float, ...]
    update_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        stages = len(self.forward_s)
        for name in ("backward_s", "input_grad_s", "weight_grad_s"):
            _check_length(name, getattr(self, name), stages)
        _check_length("send_s", self.send_s, max(0, stages - 1))
        for name in self.__slots__:
            if not all(math.isfinite(s) and s >= 0 for s in getattr(self, name)):
                raise PlanError(f"{name} must be finite seconds of at least 0, found {getattr(self, name)}")

    @classmethod
    def uniform(
        cls,
        stages: int,
        forward_s: float = 1,
        backward_s: float = 2,
        *,
        send_s: float = 0,
        update_s: float = 0,
        num_meshes: int | None = None,
    ) -> Times:
        """The same for every stage and mesh; each part of the backward pass takes half of it."""
        updates = (update_s,) * (num_meshes or stages) if update_s else ()
        forward, backward = (forward_s,) * stages, (backward_s,) * stages
        return cls.of(forward, backward, send_s=(send_s,) * (stages - 1), update_s=updates)

    @classmethod
    def of(
        cls,
        forward_s: Sequence[float],
        backward_s: Sequence[float],
        *,
        input_grad_s: Sequence[float] | None = None,
        send_s: Sequence[float] | None = None,
        update_s: Sequence[float] = (),
    ) -> Times:
        """Times per stage. `input_grad_s` is half of `backward_s` if not given, `weight_grad_s` what is left of it."""
        backward = tuple(backward_s)
        inputs = tuple(b / 2 for b in backward) if input_grad_s is None else tuple(input_grad_s)
        _check_length("input_grad_s", inputs, len(backward))
        weights = tuple(b - i for b, i in zip(backward, inputs, strict=True))
        sends = (0.0,) * (len(backward) - 1) if send_s is None else tuple(send_s)
        return cls(tuple(forward_s), backward, inputs, weights, sends, tuple(update_s))


@dataclass(frozen=True, slots=True)
class Event:
    """Something that took time. `kind` is that of the task, `send`, `update`, or whatever a measured run names.

    `task` is `None` for what is no task. Events of one mesh and `lane` follow each other; `lane` is empty for what the
    mesh itself does, and names a link for sends. Seconds count from the start of the step.
    """

    mesh: int
    task: Task | None
    kind: str
    name: str
    start_s: float
    end_s: float
    lane: str = ""


@dataclass(frozen=True, slots=True)
class Simulation:
    """One step. `makespan_s` is when the last task, send or update ends; `events` are in order of their start.

    `bubble_fraction` is the share of all meshes' time until then in which they run no task. `idle_s` is, per mesh, what
    it waits between its first and its last task: the bubble of the zero-bubble paper (Qi et al. 2023) is its maximum,
    which leaves out the ramps because the steps before and after fill them. `peak_bytes` is per mesh.
    """

    makespan_s: float
    bubble_fraction: float
    idle_s: tuple[float, ...]
    peak_bytes: tuple[float, ...]
    events: tuple[Event, ...]


def simulate(
    schedule: Schedule, times: Times, *, activation_bytes: Sequence[float] = (), fixed_bytes: Sequence[float] = ()
) -> Simulation:
    """Play a schedule: each mesh runs its tasks in order, each as soon as the mesh is free and its inputs are there.

    Sends start when their task ends and do not hold up the mesh. Each boundary carries one send at a time in each
    direction, first come first served; between stages of one mesh a send takes no time. `activation_bytes` is what a
    stage holds for one micro-batch from the start of its forward to the end of its backward (of `weight_grad` where
    that is split; of the forward where nothing is trained), `fixed_bytes` what it holds always; each has one entry per
    stage, or none for 0. O(number of tasks). `PlanError` for times or bytes of another number of stages, or an order
    that deadlocks.
    """
    _check(schedule, times, activation_bytes, fixed_bytes)
    play = _Play(schedule, times)
    for task in schedule.sequence():
        play.run(task)
    ends, makespan = tuple(play.free), play.finish(times.update_s)
    total = schedule.num_meshes * makespan
    return Simulation(
        makespan_s=makespan,
        bubble_fraction=1 - sum(play.busy) / total if total else 0.0,
        idle_s=tuple(max(0.0, e - f - b) for e, f, b in zip(ends, play.first, play.busy, strict=True)),
        peak_bytes=_peaks(schedule, activation_bytes, fixed_bytes),
        events=tuple(sorted(play.events, key=_start)),
    )


def _start(event: Event) -> float:
    return event.start_s


class _Play:
    """The clocks of meshes and links, and what has arrived where, while a schedule is played."""

    def __init__(self, schedule: Schedule, times: Times) -> None:
        stages, self._row, self._meshes = schedule.num_stages, schedule.num_micro_batches, schedule.meshes
        self._seconds: dict[Kind, tuple[float, ...]] = {
            "forward": times.forward_s,
            "backward": times.backward_s,
            "input_grad": times.input_grad_s,
            "weight_grad": times.weight_grad_s,
        }
        self._stages, self._send_s = stages, times.send_s
        self._activation, self._gradient = ([0.0] * (stages * self._row) for _ in range(2))
        self._link_free: dict[tuple[int, int], float] = {}
        self.free, self.busy = ([0.0] * schedule.num_meshes for _ in range(2))
        self.first = [math.inf] * schedule.num_meshes
        self.events: list[Event] = []

    def run(self, task: Task) -> None:
        stage, kind, mesh = task.stage, task.kind, self._meshes[task.stage]
        at = stage * self._row + task.micro_batch
        arrived = self._activation[at] if kind == "forward" else 0.0 if kind == "weight_grad" else self._gradient[at]
        start, seconds = max(self.free[mesh], arrived), self._seconds[kind][stage]
        self.free[mesh] = end = start + seconds
        self.busy[mesh] += seconds
        self.first[mesh] = min(self.first[mesh], start)
        self.events.append(Event(mesh, task, kind, str(task), start, end))
        if kind != "weight_grad" and 0 <= (other := receiver(task)) < self._stages:
            arrivals = self._activation if kind == "forward" else self._gradient
            arrivals[other * self._row + task.micro_batch] = self._send(task, other, end)

    def _send(self, task: Task, other: int, ready: float) -> float:
        """When the result of a task is on the mesh of another stage."""
        stage, here, there = task.stage, self._meshes[task.stage], self._meshes[other]
        seconds = self._send_s[min(stage, other)]
        if here == there or not seconds:
            return ready
        start = max(ready, self._link_free.get((stage, other), 0.0))
        self._link_free[stage, other] = end = start + seconds
        lane = f"mesh {here} → {there}, stage {stage} → {other}"
        self.events.append(Event(here, None, "send", f"{task} → {other}", start, end, lane))
        return end

    def finish(self, update_s: Sequence[float]) -> float:
        """Run the updates; when all has ended."""
        for mesh, seconds in enumerate(update_s):
            if seconds:
                start = self.free[mesh]
                self.free[mesh] = start + seconds
                self.events.append(Event(mesh, None, "update", "update", start, start + seconds))
        return max(self.free)


def _peaks(schedule: Schedule, activation: Sequence[float], fixed: Sequence[float]) -> tuple[float, ...]:
    always = [0.0] * schedule.num_meshes
    for stage, nbytes in enumerate(fixed):
        always[schedule.meshes[stage]] += nbytes
    if not activation:
        return tuple(always)
    peak = _trained_peak if schedule.trains else _forward_peak
    return tuple(a + peak(tasks, activation) for a, tasks in zip(always, schedule.order, strict=True))


def _trained_peak(tasks: Iterable[Task], activation: Sequence[float]) -> float:
    held = most = 0.0
    for task in tasks:
        held += HELD_CHANGE[task.kind] * activation[task.stage]
        most = max(most, held)
    return most


def _forward_peak(tasks: Iterable[Task], activation: Sequence[float]) -> float:
    return max(activation[task.stage] for task in tasks)


def _check(schedule: Schedule, times: Times, activation: Sequence[float], fixed: Sequence[float]) -> None:
    stages = schedule.num_stages
    _check_length("forward_s", times.forward_s, stages)
    for name, values, count in (
        ("update_s", times.update_s, schedule.num_meshes),
        ("activation_bytes", activation, stages),
        ("fixed_bytes", fixed, stages),
    ):
        if values:
            _check_length(name, values, count)


def _check_length(name: str, values: Sequence[float], count: int) -> None:
    if len(values) != count:
        raise PlanError(f"{name} needs {count} entries for this pipeline, found {len(values)}")


# --------------------------------------------------------------------------------------------------- traces


def chrome_trace(events: Iterable[Event], *, process_name: str = "alpa_like") -> dict[str, Any]:
    """The events as the JSON object that Perfetto (ui.perfetto.dev) and chrome://tracing open.

    One thread per mesh, and one per lane below them; times in microseconds; the kind as category; stage and micro-batch
    among the arguments of a task.
    """
    events = tuple(events)
    order = sorted({(bool(e.lane), e.mesh, e.lane) for e in events})  # meshes first, so that traces lie over each other
    threads = {(mesh, lane): tid for tid, (_, mesh, lane) in enumerate(order)}
    named = [_named("process_name", 0, name=process_name)]
    for (mesh, lane), tid in threads.items():
        named.append(_named("thread_name", tid, name=lane or f"mesh {mesh}"))
        named.append(_named("thread_sort_index", tid, sort_index=tid))
    return {"traceEvents": named + [_slice(e, threads[e.mesh, e.lane]) for e in events], "displayTimeUnit": "ms"}


def _named(what: str, tid: int, **values: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": 0, "tid": tid, "args": values}


def _slice(event: Event, tid: int) -> dict[str, Any]:
    task = event.task
    return {
        "ph": "X",
        "name": event.name,
        "cat": event.kind,
        "pid": 0,
        "tid": tid,
        "ts": event.start_s * 1e6,
        "dur": (event.end_s - event.start_s) * 1e6,
        "args": {"mesh": event.mesh} | ({"stage": task.stage, "micro_batch": task.micro_batch} if task else {}),
    }


def write_trace(path: str | os.PathLike[str], events: Iterable[Event], *, process_name: str = "alpa_like") -> None:
    """Write `chrome_trace` to a file, atomically. `PlanError` where it can't be written; what was there stays."""
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    text = json.dumps(chrome_trace(events, process_name=process_name), allow_nan=False)
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise PlanError(f"the trace can't be written to {path}: {error.strerror}; choose another path") from None
