"""Layers and devices → pipeline stages of least latency (Alpa, OSDI'22, section 5.1).

    minimize    Σ_i (t_i + 2 · send_i)  +  (M − 1) · max_i t_i  +  max_i u_i
    over        every division of the layers into stages i, a submesh and an option for each
    subject to  the submeshes take all devices and can be packed into hosts,
                fixed_i + peak_i + in_flight(stages from i to the end, M) · micro_i  ≤  memory,   for every stage

M is the number of micro-batches; of an option, t is forward_s + backward_s, u update_s. `send_i` moves a micro-batch's
activations to the next stage, and the factor 2 is for the gradients that come back. Submeshes may come in any order.

Alpa tries every value of max t. Here boxes of values of (max t, max u) are taken best-first: the least sum under the
upper ends of a box, plus its lower ends, bounds all plans inside; the box of the least bound is halved until its plan
reaches its bound, and then no other plan is better. The least sum is found in two steps:

1. A relaxed dynamic program over (first layer, devices left), where each stage has the fewest micro-batches in flight
   that its place allows. Its optimum is a bound, and the answer if it fits with the true numbers.
2. Otherwise the program over (stages to the end, first layer, devices left), restricted to those stages that step 1
   cannot exclude from a plan of a given sum; the sum is raised until it holds an optimum.

Options are asked for lazily: an unasked stage costs its lower bound and takes no memory. Only stages of a plan that is
optimal in this optimistic view are asked for, with the next best ones in a growing batch, until the optimum has none.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from alpa_like.cluster import Cluster
from alpa_like.errors import InfeasibleError, MethodError
from alpa_like.passes.stage_options import Costs, Option, Rooms, Submesh, place, submeshes
from alpa_like.passes.stage_programs import (
    NOTHING_FITS,
    Edges,
    Floats,
    Known,
    Layered,
    Numbers,
    Problem,
    Range,
    Relaxed,
    Stage,
    make_room,
)
from alpa_like.texts import bytes_text, counted

__all__ = ["Choice", "Costs", "Option", "Search", "Statistics", "Submesh", "search", "submeshes"]

_PATIENCE = 50
"""After this many rounds of asking for one plan at a time the batches begin: the bounds say too little."""

_BATCH = 0.01
"""For each round more a batch grows by this share of all that was asked, so that rounds stay about a hundred."""

_WIDER = 1.25
"""That batch comes from plans whose slowest stage takes up to this times that of the plan."""

_NEAR = 0.005
"""A plan this near to the least bound is asked for: cheaper than to find the one that reaches it first."""

_SUMS = (1.1, math.inf)
"""Step 2 looks for a plan within this times the total of a box; if there is none, that is the next total."""


# ------------------------------------------------------------------------------------------------ what comes out


@dataclass(frozen=True, slots=True)
class Choice:
    """One stage: layers `first` to `last` (inclusive) with `option` on `devices`, the number of the first and a count.

    Devices are numbered as in the cluster, host by host. A stage of several hosts has all of their devices; a smaller
    one lies inside a host.
    """

    first: int
    last: int
    submesh: Submesh
    option: Option
    devices: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of `ranges` pairs of a layer range and a submesh, `asked` were asked for their options, in `rounds`.

    `relaxed` and `layered` count the dynamic programs of the two steps.
    """

    ranges: int
    asked: int
    rounds: int
    relaxed: int
    layered: int


@dataclass(frozen=True, slots=True)
class Search:
    """The stages in the order of their layers, and the predicted seconds of a step.

    `latency_s` = `sum_s` (all stages and sends, for one micro-batch) + (M − 1) · `slowest_s` + `update_s`.
    """

    stages: tuple[Choice, ...]
    latency_s: float
    sum_s: float
    slowest_s: float
    update_s: float
    statistics: Statistics


def search(
    num_layers: int,
    cluster: Cluster,
    num_micro_batches: int,
    costs: Costs,
    memory_bytes: float,
    *,
    in_flight: Callable[[int, int], int],
    max_stages: int | None = None,
    num_stages: int | None = None,
    gap: float = 0.0,
) -> Search:
    """The plan of least latency; with `gap`, one whose latency is at most 1 + `gap` times the least.

    `memory_bytes` is the limit per device. `in_flight(stages, micro_batches)` says for how many micro-batches a stage
    holds activations at once, `stages` counted from this one to the last, both included: `min` for 1F1B. `max_stages`
    limits the number of stages, `num_stages` fixes it. Raises `InfeasibleError` where nothing fits, `MethodError` for
    options that no plan can meet, `PlanError` for costs that break their contract.
    """
    _check(num_layers, num_micro_batches, memory_bytes, gap)
    shapes = submeshes(cluster)
    rooms = Rooms.of(cluster, shapes)
    counts = _counts(rooms, num_layers, cluster, max_stages, num_stages)
    flying = [in_flight(s, num_micro_batches) for s in range(1, counts[-1] + 1)]
    if min(flying) < 0:
        raise MethodError(f"in_flight must return 0 or more micro-batches, found {min(flying)}")
    problem = Problem(cluster, shapes, rooms, num_layers, num_micro_batches, memory_bytes, counts, tuple(flying))
    return _Finder(problem, Known(problem, costs)).run(gap)


def _check(num_layers: int, num_micro_batches: int, memory_bytes: float, gap: float) -> None:
    for name, count in (("num_layers", num_layers), ("num_micro_batches", num_micro_batches)):
        if count < 1:
            raise MethodError(f"{name} must be at least 1, found {count}")
    if not memory_bytes > 0 or not 0 <= gap < math.inf:
        raise MethodError(f"memory_bytes must be above 0 and gap at least 0, found {memory_bytes} and {gap}")


def _counts(
    rooms: Rooms, num_layers: int, cluster: Cluster, max_stages: int | None, num_stages: int | None
) -> tuple[int, ...]:
    """The numbers of stages that are allowed and possible, rising."""
    possible = rooms.counts(min(num_layers, cluster.num_devices))
    most = math.inf if max_stages is None else max_stages
    counts = tuple(n for n in possible if n <= most and num_stages in (None, n))
    if not counts:
        asked = f"max_stages={max_stages}" if num_stages is None else f"num_stages={num_stages}"
        raise MethodError(
            f"{counted(num_layers, 'layer')} on {counted(cluster.hosts, 'host')} of "
            f"{counted(cluster.devices_per_host, 'device')} can form {', '.join(map(str, possible))} stages with "
            f"submeshes of 1, 2, 4, … devices or whole hosts, not {asked}; ask for one of these, or give other "
            "submeshes with ManualStageOption"
        )
    return counts


# ------------------------------------------------------------------------------------------------ best-first


@dataclass(frozen=True, slots=True)
class _Box:
    """The plans with `low` < (max t, max u) ≤ `high`; `total` bounds their sums from below.

    "new": nothing done; "relaxed": step 1 gave a total, but its plan does not fit; "solved": `plan` has the least sum.
    `tries` counts the limits of `_SUMS` under which there was none.
    """

    low: tuple[float, float] = (-1.0, -1.0)
    high: tuple[float, float] = (math.inf, math.inf)
    total: float = 0.0
    tries: int = 0
    status: Literal["new", "relaxed", "solved"] = "new"
    plan: tuple[Stage, ...] = ()

    @property
    def ends(self) -> tuple[float, float]:
        """max t and max u of the plan."""
        return max(s.seconds for s in self.plan), max(s.update_s for s in self.plan)

    @property
    def asked(self) -> bool:
        """Whether all options of the plan were asked for."""
        return all(s.option for s in self.plan)

    def halves(self, axis: int, middle: float) -> Iterator[_Box]:
        """The box up to and the box above a value that the plan exceeds."""
        low, high = list(self.low), list(self.high)
        low[axis] = high[axis] = middle
        yield _Box(self.low, (high[0], high[1]), self.total)
        yield replace(self, low=(low[0], low[1]))


@dataclass
class _Finder:
    """The best-first search; its boxes always hold every plan that could be the best."""

    problem: Problem
    known: Known
    heap: list[tuple[float, int, _Box]] = field(default_factory=list[tuple[float, int, _Box]])
    views: dict[tuple[float, float], Relaxed] = field(default_factory=dict[tuple[float, float], "Relaxed"])
    rounds: int = 0
    relaxed: int = 0
    layered: int = 0
    pushed: int = 0

    def __post_init__(self) -> None:
        self.values = self.known.values()

    def run(self, gap: float) -> Search:
        self._push(_Box())
        while self.heap:
            bound, _, box = heapq.heappop(self.heap)
            if math.isinf(bound):
                break
            if box.status == "new" or any(s.option is None and s.range in self.known.options for s in box.plan):
                self._relax(box)
            elif box.status == "relaxed":
                self._settle(box)
            elif self._sum(box.total, *box.ends) > bound * (1 + (gap if box.asked else max(gap, _NEAR))):
                self._halve_towards(box)
            elif box.asked:
                return self._result(box)
            else:
                self._ask(box)
        raise InfeasibleError(self._why_nothing_fits())

    def _sum(self, total: float, slowest_s: float, update_s: float) -> float:
        """The objective."""
        return total + (self.problem.micro_batches - 1) * slowest_s + update_s

    def _push(self, *boxes: _Box) -> None:
        """Keyed by the bound of the box; inf where no value of an end lies inside, as long as nothing more is known."""
        for box in boxes:
            inside = [self._inside(axis, box) for axis in (0, 1)]
            least = [float(values[0]) if len(values) else math.inf for values in inside]
            bound = math.inf if math.inf in least else self._sum(box.total, *least)
            self.pushed += 1
            heapq.heappush(self.heap, (bound, self.pushed, box))

    def _inside(self, axis: int, box: _Box) -> Floats:
        """The values of an end that lie inside the box, rising."""
        values = self.values[axis]
        at, end = (int(np.searchsorted(values, edge[axis], side="right")) for edge in (box.low, box.high))
        return values[at:end]

    # -- the least sum in a box

    def _view(self, high: tuple[float, float]) -> Relaxed:
        if high not in self.views:
            make_room(self.views)
            seconds = self.known.seconds(self.problem.least_flying, high[1])
            steps = np.where(seconds <= high[0], seconds + self.known.send, np.inf)
            self.views[high] = Relaxed(self.problem.rooms, steps)
            self.relaxed += 1
        return self.views[high]

    def _relax(self, box: _Box) -> None:
        """Step 1: a better total, and the plan if it fits; the box is dropped where there is none."""
        view = self._view(box.high)
        total = float(view.to_end[0, 0])
        if math.isinf(total):
            return
        path = view.path()
        plan = self._plan(path, box.high) if len(path) in self.problem.counts else [None]
        exact = all(s and s.seconds + self.known.send[s.range[2]] == view.steps[s.range] for s in plan)
        found = tuple(s for s in plan if s) if exact else ()
        status = "solved" if found else "relaxed"
        self._push(replace(box, total=max(total, box.total), tries=0, status=status, plan=found))

    def _settle(self, box: _Box) -> None:
        """Step 2 where the ends of the box matter less than its sum; before that it is cheaper to halve it."""
        slowest = self._inside(0, box)
        if (self.problem.micro_batches - 1) * (slowest[-1] - slowest[0]) > box.total:
            return self._push(*box.halves(0, float(slowest[(len(slowest) - 1) // 2])))
        limit = _SUMS[box.tries] * box.total if box.total else math.inf
        # the two programs add in another order, so the edges get a little more room than the plan
        layered = self._layer(box.high, limit * (1 + 1e-9))
        total, stages = layered.best()
        if total < math.inf and total <= limit:
            plan = tuple(s for s in self._plan(layered.path(stages), box.high) if s)
            self._push(replace(box, total=max(total, box.total), status="solved", plan=plan))
        elif limit < math.inf:
            self._push(replace(box, total=limit, tries=box.tries + 1))
        return None

    def _layer(self, high: tuple[float, float], limit: float) -> Layered:
        """The program of step 2 over the stages on plans of a relaxed sum of at most `limit`."""

        def cost(stages: int, ranges: Numbers) -> Floats:
            seconds = self.known.seconds(self.problem.all_flying(stages), high[1]).reshape(-1)[ranges]
            return np.where(seconds <= high[0], seconds + self.known.send[ranges % self.problem.layers], np.inf)

        self.layered += 1
        return Layered(self.problem, Edges.within(self._view(high), limit), cost, np.add)

    def _plan(self, path: Sequence[Range], high: tuple[float, float]) -> list[Stage | None]:
        return [self.known.stage(at, len(path) - i, high[1]) for i, at in enumerate(path)]

    # -- what to do with a solved box

    def _halve_towards(self, box: _Box) -> None:
        """Halve the values below that end of the plan which exceeds the bound by most."""
        inside = [self._inside(axis, box) for axis in (0, 1)]
        over = [end - float(values[0]) for end, values in zip(box.ends, inside, strict=True)]
        axis = int((self.problem.micro_batches - 1) * over[0] < over[1])
        below = inside[axis][inside[axis] < box.ends[axis]]
        self._push(*box.halves(axis, float(below[(len(below) - 1) // 2])))

    def _ask(self, box: _Box) -> None:
        """Ask for the plan's options and for the most promising others; then all bounds may be higher."""
        wanted = {s.range: None for s in box.plan if s.option is None}
        extra = int(_BATCH * max(0, self.rounds - _PATIENCE) * len(self.known.options))
        wanted |= dict.fromkeys(self._promising(box.ends[0], extra) if extra else [])
        self.known.ask(wanted)
        self.rounds += 1
        self.views.clear()
        self.values = self.known.values()
        boxes, self.heap = [entry[2] for entry in self.heap], []
        self._push(box, *boxes)

    def _promising(self, slowest_s: float, count: int) -> list[Range]:
        """The ranges not asked for of the least bound of a plan through them, no more than `count`."""
        view = self._view((_WIDER * slowest_s, math.inf))
        rank = np.full(view.steps.shape, np.inf)
        for first in range(self.problem.layers):
            rests = view.within(first, math.inf)
            rank[:, first, first:] = view.through(first, rests).min(axis=0, initial=math.inf)
        rank += (self.problem.micro_batches - 1) * np.maximum(slowest_s, np.where(np.isfinite(rank), view.steps, 0.0))
        flat = np.where(self.known.asked, np.inf, rank).reshape(-1)
        best = [i for i in np.argsort(flat, kind="stable")[:count] if np.isfinite(flat[i])]
        return [(int(m), int(a), int(b)) for m, a, b in zip(*np.unravel_index(best, rank.shape), strict=True)]

    # -- what comes out

    def _result(self, box: _Box) -> Search:
        shapes = [self.problem.shapes[s.range[0]] for s in box.plan]
        places = place(self.problem.cluster, shapes)
        stages = tuple(
            Choice(s.range[1], s.range[2], shape, s.option, (at, shape.num_devices))
            for s, shape, at in zip(box.plan, shapes, places, strict=True)
            if s.option
        )
        total = sum(s.seconds + float(self.known.send[s.range[2]]) for s in box.plan)
        ranges = int(np.isfinite(self.known.bound).sum())
        statistics = Statistics(ranges, len(self.known.options), self.rounds, self.relaxed, self.layered)
        return Search(stages, self._sum(total, *box.ends), total, *box.ends, statistics)

    def _why_nothing_fits(self) -> str:
        """Names the fullest stage of the plan whose fullest stage needs least; what was not asked needs nothing."""
        view = Relaxed(self.problem.rooms, np.where(np.isfinite(self.known.bound), 0.0, np.inf))
        flying = self.problem.flying

        def needed(stages: int, ranges: Numbers) -> Floats:
            return self.known.bytes(flying[stages - 1]).reshape(-1)[ranges]

        bottleneck = Layered(self.problem, Edges.within(view, 0.0), needed, np.maximum)
        path = bottleneck.path(bottleneck.best()[1])
        held = flying[len(path) - 1 :: -1]
        needs = [float(self.known.bytes(f)[at]) for f, at in zip(held, path, strict=True)]
        worst = int(np.argmax(needs))
        return _blocked(self.problem, path[worst], held[worst], needs[worst])


def _blocked(problem: Problem, at: Range, flying: int, needed: float) -> str:
    m, first, last = at
    layers = f"layer {first}" if first == last else f"layers {first} to {last}"
    help_ = "use more devices, rematerialization"
    if needed >= NOTHING_FITS:
        return f"no plan fits: {layers} on {problem.shapes[m]} devices have no option at all; {help_} or more memory"
    return (
        f"no plan fits: {layers} on {problem.shapes[m]} devices need at least {bytes_text(needed)} per device with "
        f"{flying} micro-batches in flight, there are {bytes_text(problem.memory)}; {help_}, more micro-batches, "
        "or a schedule with fewer of them in flight"
    )
