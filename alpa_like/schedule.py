"""Pipeline schedules as data: which task each mesh runs, one after the other.

A schedule says nothing about seconds: `simulate.py` plays it with the times of a cluster, the runtime with real
programs. Stages are counted along the forward pass, micro-batches in the order in which they enter the pipeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from alpa_like.errors import MethodError, PlanError

Kind = Literal["forward", "backward", "input_grad", "weight_grad"]

_LETTERS: dict[Kind, str] = {"forward": "F", "backward": "B", "input_grad": "I", "weight_grad": "W"}
_SHOWN = 64
"""Tasks per mesh that `str` prints; of more it leaves out the middle."""


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of one stage for one micro-batch.

    `backward` is the whole backward pass of the stage. `input_grad` computes the gradient that the stage before waits
    for, `weight_grad` what is left of the backward pass: the gradients of the parameters.

    >>> str(Task("input_grad", 2, 1))
    'I2.1'
    """

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{_LETTERS[self.kind]}{self.stage}.{self.micro_batch}"


Order = tuple[Task, ...]

HELD_CHANGE: dict[Kind, int] = {"forward": 1, "backward": -1, "input_grad": 0, "weight_grad": -1}
"""How many more micro-batches a stage holds the activations of, once it has begun a forward or ended another task."""

_TOWARDS: dict[Kind, int] = {"forward": 1, "backward": -1, "input_grad": -1, "weight_grad": 0}
_FORWARD_ONLY = (frozenset[Kind]({"forward"}),)
_COMPLETE = (frozenset[Kind]({"forward", "backward"}), frozenset[Kind]({"forward", "input_grad", "weight_grad"}))


@dataclass(frozen=True, slots=True)
class Schedule:
    """Invariant: `verify()` holds. `meshes` has the mesh of each stage, `order` what each mesh runs, in that order.

    >>> print(make_schedule("1f1b", 2, 3))
    1f1b: 2 stages on 2 meshes, 3 micro-batches
    mesh 0: F0.0 F0.1 B0.0 F0.2 B0.1 B0.2
    mesh 1: F1.0 B1.0 F1.1 B1.1 F1.2 B1.2
    """

    name: str
    num_stages: int
    num_micro_batches: int
    meshes: tuple[int, ...]
    order: tuple[Order, ...]

    @property
    def num_meshes(self) -> int:
        return len(self.order)

    @property
    def trains(self) -> bool:
        """Whether there is any backward pass."""
        return any(t.kind != "forward" for tasks in self.order for t in reversed(tasks))

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of inputs and of weights are tasks of their own anywhere."""
        return any(t.kind == "input_grad" for tasks in self.order for t in tasks)

    def in_flight(self, stage: int) -> int:
        """The most micro-batches whose activations the stage holds at once: forward begun, backward not ended.

        A split backward pass ends with its `weight_grad`. Without a backward pass nothing is kept after the forward.
        """
        return self.held(stage, "forward", "weight_grad")

    def held(self, stage: int, since: Kind, until: Kind) -> int:
        """The most micro-batches at once for which a stage has begun `since` and not ended `until`.

        A whole backward pass counts as both of its halves: an `until` of either half ends with it. Where there is no
        backward pass nothing is kept after the forward, so that it is one.
        """
        if not self.trains:
            return 1
        held = most = 0
        for task in self.order[self.meshes[stage]]:
            if task.stage == stage:
                held += (task.kind == since) - (task.kind in (until, "backward"))
                most = max(most, held)
        return most

    def verify(self) -> Schedule:
        """This schedule, or `PlanError` where a task is missing, doubled or misplaced, or waits for ever."""
        if len(self.meshes) != self.num_stages or not set(self.meshes) <= set(range(self.num_meshes)):
            raise PlanError(
                f"schedule {self.name}: {self.num_stages} stages need one mesh each of the {self.num_meshes} that "
                f"have an order, found {self.meshes}"
            )
        kinds, expected = self._kinds(), _COMPLETE if self.trains else _FORWARD_ONLY
        for stage in range(self.num_stages):
            for micro_batch in range(self.num_micro_batches):
                found = kinds.get((stage, micro_batch), frozenset())
                if found not in expected:
                    raise PlanError(
                        f"schedule {self.name}: stage {stage} needs forward and either backward or input_grad and "
                        f"weight_grad of micro-batch {micro_batch}, found {', '.join(sorted(found)) or 'nothing'}"
                    )
        self.sequence()
        return self

    def _kinds(self) -> dict[tuple[int, int], frozenset[Kind]]:
        """The kinds of task of every stage and micro-batch; each task is checked for itself."""
        kinds: dict[tuple[int, int], frozenset[Kind]] = {}
        for mesh, tasks in enumerate(self.order):
            for task in tasks:
                self._check(task, mesh)
                key = task.stage, task.micro_batch
                before = kinds.get(key, frozenset())
                if task.kind in before:
                    raise PlanError(f"schedule {self.name}: mesh {mesh} runs {task} twice; drop one")
                kinds[key] = before.union((task.kind,))
        return kinds

    def _check(self, task: Task, mesh: int) -> None:
        stages, micro_batches = self.num_stages, self.num_micro_batches
        if not (0 <= task.stage < stages and 0 <= task.micro_batch < micro_batches):
            raise PlanError(
                f"schedule {self.name}: mesh {mesh} runs {task}, which is none of {stages} stages × {micro_batches} "
                "micro-batches"
            )
        if self.meshes[task.stage] != mesh:
            raise PlanError(
                f"schedule {self.name}: {task} is on mesh {mesh}, but its stage is on mesh {self.meshes[task.stage]}"
            )

    def sequence(self) -> Order:
        """All tasks in one line that keeps the order of every mesh and never runs a task before its inputs.

        One process can dispatch the whole schedule in this order. `PlanError` where there is none: a forward needs
        that of the stage before; a gradient needs the forward of its stage and the gradient of the stage after; a
        `weight_grad` needs the `input_grad` of its stage. O(number of tasks).
        """
        done = _Done(self.num_stages, self.num_micro_batches)
        line: list[Task] = []
        position, awake = [0] * self.num_meshes, deque(range(self.num_meshes))
        while awake:
            mesh = awake.popleft()
            tasks, at = self.order[mesh], position[mesh]
            while at < len(tasks) and done.ready(tasks[at]):
                done.add(tasks[at])
                line.append(tasks[at])
                if 0 <= (waiting := receiver(tasks[at])) < self.num_stages:
                    awake.append(self.meshes[waiting])
                at += 1
            position[mesh] = at
        if len(line) < sum(map(len, self.order)):
            heads = enumerate(zip(self.order, position, strict=True))
            stuck = ", ".join(f"{tasks[at]} on mesh {mesh}" for mesh, (tasks, at) in heads if at < len(tasks))
            raise PlanError(f"schedule {self.name} waits for ever at {stuck}; run what they need earlier")
        return tuple(line)

    def __str__(self) -> str:
        head = f"{self.name}: {_count(self.num_stages, 'stage')} on {_count(self.num_meshes, 'mesh')}"
        lines = (f"mesh {mesh}: {_shown(tasks)}" for mesh, tasks in enumerate(self.order))
        return "\n".join((f"{head}, {_count(self.num_micro_batches, 'micro-batch')}", *lines))


def receiver(task: Task) -> int:
    """The stage that needs what a task computes: the next, the one before, or its own for a `weight_grad`.

    -1 or `num_stages` at the ends of the pipeline, where nothing is sent.
    """
    return task.stage + _TOWARDS[task.kind]


class _Done:
    """Which forwards and which gradients of inputs there are, while a schedule is walked through."""

    def __init__(self, num_stages: int, num_micro_batches: int) -> None:
        self._row = num_micro_batches
        self._forward = bytearray(num_stages * num_micro_batches)
        self._gradient = bytearray(num_stages * num_micro_batches)

    def ready(self, task: Task) -> bool:
        at = task.stage * self._row + task.micro_batch
        if task.kind == "forward":
            return task.stage == 0 or bool(self._forward[at - self._row])
        if task.kind == "weight_grad":
            return bool(self._gradient[at])
        above = at + self._row
        return bool(self._forward[at]) and (above >= len(self._gradient) or bool(self._gradient[above]))

    def add(self, task: Task) -> None:
        at = task.stage * self._row + task.micro_batch
        if task.kind == "forward":
            self._forward[at] = 1
        elif task.kind != "weight_grad":
            self._gradient[at] = 1


def _shown(tasks: Order) -> str:
    if len(tasks) <= _SHOWN:
        return " ".join(map(str, tasks))
    half = _SHOWN // 2
    left, right = (" ".join(map(str, part)) for part in (tasks[:half], tasks[-half:]))
    return f"{left} … {len(tasks) - 2 * half} more … {right}"


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("h") else "s")
    return f"{number} {noun if number == 1 else plural}"


# --------------------------------------------------------------------------------------------- the schedules


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """What a schedule is made for."""

    stages: int
    micro_batches: int
    meshes: int

    @property
    def chunks(self) -> int:
        """Stages per mesh; stage s is on mesh s % meshes."""
        return self.stages // self.meshes


def make_schedule(name: str, num_stages: int, num_micro_batches: int, num_meshes: int | None = None) -> Schedule:
    """The schedule of one step; `num_meshes` is by default `num_stages`, and stage s runs on mesh s % num_meshes.

    - `gpipe`: all forwards, then all backwards in reverse (Huang et al. 2019).
    - `1f1b`: stage s runs S - s forwards ahead of its backwards (PipeDream-flush, Narayanan et al. 2021).
    - `eager-1f1b`: 2 (S - s) - 1 ahead instead, so that transfers hide behind compute (Zhuang et al. 2023).
    - `interleaved-1f1b`: several stages per mesh (Megatron-LM, Narayanan et al. 2021), for any number of micro-batches.
    - `zb-h1`, `zb-h2`: the backward pass split (Qi et al. 2023). `zb-h1` holds as many micro-batches as the first stage
      of `1f1b`, but on every stage; `zb-h2` up to twice as many, and gains where steps follow without a barrier.
    - `inference`: forwards only.

    `gpipe`, `interleaved-1f1b` and `inference` take several stages per mesh. `MethodError` for an unknown name, counts
    below 1, or meshes that do not divide the stages.
    """
    if name not in _ORDERS:
        raise MethodError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    pipeline = _checked(name, num_stages, num_micro_batches, num_stages if num_meshes is None else num_meshes)
    order = tuple(tuple(_ORDERS[name](pipeline, mesh)) for mesh in range(pipeline.meshes))
    meshes = tuple(s % pipeline.meshes for s in range(num_stages))
    return Schedule(name, num_stages, num_micro_batches, meshes, order)


def _checked(name: str, stages: int, micro_batches: int, meshes: int) -> _Pipeline:
    for what, count in (("stage", stages), ("micro-batch", micro_batches), ("mesh", meshes)):
        if not isinstance(count, int) or count < 1:
            raise MethodError(f"a schedule needs at least one {what}, as an int; found {count!r}")
    if stages % meshes:
        raise MethodError(f"{meshes} meshes must divide {stages} stages; choose a divisor or one mesh per stage")
    if meshes < stages and name not in _SEVERAL:
        raise MethodError(
            f"{name} runs one stage per mesh, found {stages} stages for {meshes} meshes; use one of "
            f"{', '.join(_SEVERAL)} for several stages per mesh"
        )
    return _Pipeline(stages, micro_batches, meshes)


def _inference(p: _Pipeline, mesh: int) -> Iterator[Task]:
    for chunk, micro_batch in _visits(p):
        yield Task("forward", chunk * p.meshes + mesh, micro_batch)


def _gpipe(p: _Pipeline, mesh: int) -> Iterator[Task]:
    forwards = tuple(_inference(p, mesh))
    yield from forwards
    for task in reversed(forwards):
        yield Task("backward", task.stage, task.micro_batch)


def _visits(p: _Pipeline) -> Iterator[tuple[int, int]]:
    """(chunk, micro-batch) in the order in which every mesh runs its forwards.

    As many micro-batches as there are meshes pass through one chunk, then the same through the next: the first comes
    back to a mesh just when the last has left it.
    """
    for first in range(0, p.micro_batches, p.meshes):
        for chunk in range(p.chunks):
            for micro_batch in range(first, min(first + p.meshes, p.micro_batches)):
                yield chunk, micro_batch


def _1f1b(p: _Pipeline, mesh: int) -> Iterator[Task]:
    return _alternate(p, mesh, ahead=p.stages - mesh)


def _eager(p: _Pipeline, mesh: int) -> Iterator[Task]:
    return _alternate(p, mesh, ahead=2 * (p.stages - mesh) - 1)


def _alternate(p: _Pipeline, stage: int, ahead: int) -> Iterator[Task]:
    """Forwards until there are `ahead` more than backwards, then one backward for each forward."""
    for k in range(p.micro_batches + ahead):
        if k < p.micro_batches:
            yield Task("forward", stage, k)
        if 0 <= k - ahead + 1 < p.micro_batches:
            yield Task("backward", stage, k - ahead + 1)


def _zb_h1(p: _Pipeline, mesh: int) -> Iterator[Task]:
    return _split(p, mesh, ahead=p.stages - mesh, held=p.stages)


def _zb_h2(p: _Pipeline, mesh: int) -> Iterator[Task]:
    return _split(p, mesh, ahead=2 * (p.stages - mesh) - 1, held=2 * p.stages - 1)


def _split(p: _Pipeline, stage: int, ahead: int, held: int) -> Iterator[Task]:
    """`_alternate` with a split backward pass; weights wait until `held` micro-batches are held, or forwards are over.

    `held` is the same on every stage. So a late stage, which runs few forwards ahead, hands out its first gradients
    without a pause for weights, and keeps the weights for the end, when gradients no longer come.
    """
    micro_batches = p.micro_batches
    weights = 0
    for k in range(micro_batches + ahead):
        if k < micro_batches:
            yield Task("forward", stage, k)
        backward = k - ahead + 1
        if 0 <= backward < micro_batches:
            yield Task("input_grad", stage, backward)
            if k + 1 >= micro_batches or k + 1 - weights >= held:
                yield Task("weight_grad", stage, weights)
                weights += 1
    yield from (Task("weight_grad", stage, m) for m in range(weights, micro_batches))


def _interleaved(p: _Pipeline, mesh: int) -> Iterator[Task]:
    """Megatron-LM's order of as many slots as the meshes divide. Where micro-batches are fewer, some slots are empty.

    An order without some micro-batches is still free of deadlock, and holds no more. Every mesh meets a gap once per
    chunk, so many small gaps cost less than a large one: the empty slots are spread, except where there is but one
    round, which is fastest when they come last.
    """
    if p.chunks == 1:
        yield from _1f1b(p, mesh)
        return
    slots = -(-p.micro_batches // p.meshes) * p.meshes
    spread = slots if slots > p.meshes else p.micro_batches
    taken = {((m + 1) * spread - 1) // p.micro_batches: m for m in range(p.micro_batches)}
    visits = tuple(_visits(_Pipeline(p.stages, slots, p.meshes)))
    ahead = 2 * (p.meshes - mesh - 1) + (p.chunks - 1) * p.meshes + 1
    for k in range(len(visits) + ahead):
        if k < len(visits) and (forward := taken.get(visits[k][1])) is not None:
            yield Task("forward", visits[k][0] * p.meshes + mesh, forward)
        if 0 <= (b := k - ahead + 1) < len(visits) and (backward := taken.get(visits[b][1])) is not None:
            yield Task("backward", (p.chunks - 1 - visits[b][0]) * p.meshes + mesh, backward)


_ORDERS: dict[str, Callable[[_Pipeline, int], Iterator[Task]]] = {
    "gpipe": _gpipe,
    "1f1b": _1f1b,
    "eager-1f1b": _eager,
    "interleaved-1f1b": _interleaved,
    "zb-h1": _zb_h1,
    "zb-h2": _zb_h2,
    "inference": _inference,
}
SCHEDULES: tuple[str, ...] = tuple(_ORDERS)
_SEVERAL = ("gpipe", "interleaved-1f1b", "inference")
