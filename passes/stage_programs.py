"""The two dynamic programs of the search of stages, and the tables of costs that they run on; see `stage_search`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from alpa_like.cluster import Cluster
from alpa_like.errors import PlanError
from alpa_like.passes.stage_options import Costs, Flags, Ints, Option, Rooms, Submesh

__all__ = [
    "NOTHING_FITS",
    "Edges",
    "Floats",
    "Known",
    "Layered",
    "Numbers",
    "Problem",
    "Range",
    "Relaxed",
    "Stage",
    "make_room",
]

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int32]
"""As `Ints`, where there are millions."""
Range = tuple[int, int, int]
"""Number of the submesh, first layer, last layer (inclusive)."""

_KEPT = 128
"""Tables, and relaxed programs, that are kept for when they are needed again; each takes about a megabyte."""

NOTHING_FITS = 1e30
"""Stands for the bytes of a layer for which there is no option at all."""


# ------------------------------------------------------------------------------------------------ what is known


@dataclass(frozen=True)
class Problem:
    cluster: Cluster
    shapes: tuple[Submesh, ...]
    rooms: Rooms
    layers: int
    micro_batches: int
    memory: float
    counts: tuple[int, ...]
    flying: tuple[int, ...]
    """`flying[s - 1]` micro-batches are held by a stage with s stages to the end."""

    @cached_property
    def least_flying(self) -> Floats:
        """(layers,): the fewest that a stage ending with this layer can hold; only the last layer ends with s = 1."""
        least = [min(self.flying[1 : self.layers - last], default=self.flying[0]) for last in range(self.layers - 1)]
        return np.array([*least, self.flying[0]], np.float64)

    def all_flying(self, stages: int) -> Floats:
        return np.full(self.layers, float(self.flying[stages - 1]))


@dataclass(frozen=True, slots=True)
class Stage:
    """A range in a plan. `option` is None while it was not asked for; then the seconds are its bound."""

    range: Range
    seconds: float
    update_s: float
    option: Option | None


class Known:
    """The costs as far as they were asked for; tables have shape (submeshes, first layer, last layer)."""

    def __init__(self, problem: Problem, costs: Costs) -> None:
        self.problem, self.costs = problem, costs
        layers, shapes = problem.layers, problem.shapes
        sends = [costs.send_s(b) for b in range(layers - 1)]
        if not all(0 <= s < math.inf for s in sends):
            raise PlanError(f"send_s must be finite and at least 0, found {sends}")
        self.send = np.array([*(2 * s for s in sends), 0.0])
        self.bound = np.full((len(shapes), layers, layers), np.inf)
        for m, first in itertools.product(range(len(shapes)), range(layers)):
            for last in range(first, layers):
                self.bound[m, first, last] = self._bound(first, last, shapes[m])
        self.asked = np.zeros(self.bound.shape, np.bool_)
        self.options: dict[Range, tuple[Option, ...]] = {}
        self.where = np.zeros(0, np.int64)
        """For each option the flat index of its range."""
        self.rows = np.zeros((4, 0))
        """For each option seconds, update_s, bytes without and per micro-batch in flight."""
        self.tables: dict[bytes, Floats] = {}

    def _bound(self, first: int, last: int, shape: Submesh) -> float:
        bound = self.costs.lower_bound_s(first, last, shape)
        if not 0 <= bound < math.inf:
            raise PlanError(f"lower_bound_s of layers {first}–{last} must be finite and at least 0, found {bound}")
        return bound

    def ask(self, ranges: Iterable[Range]) -> None:
        """Ask for the options of ranges that were not asked for."""
        where, rows = [self.where], [self.rows]
        for m, first, last in ranges:
            options = tuple(self.costs.options(first, last, self.problem.shapes[m]))
            self._check(options, (m, first, last))
            self.options[m, first, last], self.asked[m, first, last] = options, True
            where.append(np.full(len(options), (m * self.problem.layers + first) * self.problem.layers + last))
            columns = [(o.seconds, o.update_s, o.fixed_bytes + o.peak_bytes, o.micro_bytes) for o in options]
            rows.append(np.array(columns).reshape(-1, 4).T)
        self.where, self.rows = np.concatenate(where), np.concatenate(rows, axis=1)
        self.tables.clear()

    def _check(self, options: Sequence[Option], at: Range) -> None:
        least, bound = min((o.seconds for o in options), default=math.inf), float(self.bound[at])
        if least < bound * (1 - 1e-9):
            raise PlanError(
                f"lower_bound_s of layers {at[1]}–{at[2]} on {self.problem.shapes[at[0]]} is {bound}, above the "
                f"{least} s of an option; the search would miss optima, so make the bound smaller"
            )

    def _fits(self, flying: Floats) -> Flags:
        """Which options keep the memory limit; `flying` is per last layer."""
        _, _, fixed, micro = self.rows
        return fixed + flying[self.where % self.problem.layers] * micro <= self.problem.memory

    def seconds(self, flying: Floats, update_s: float = math.inf) -> Floats:
        """The table of the least seconds of an option that fits and updates in time; the bound where not asked."""
        usable = self._fits(flying) & (self.rows[1] <= update_s)
        key = usable.tobytes()
        if key not in self.tables:
            make_room(self.tables)
            table = np.where(self.asked, np.inf, self.bound)
            np.minimum.at(table.reshape(-1), self.where[usable], self.rows[0][usable])
            self.tables[key] = table
        return self.tables[key]

    def bytes(self, flying: int) -> Floats:
        """The table of the least bytes of an option; 0 where not asked, huge where there is none."""
        sizes = np.arange(self.problem.layers)[None, :] - np.arange(self.problem.layers)[:, None] + 1.0
        table = np.where(self.asked, NOTHING_FITS * sizes, 0.0)
        np.minimum.at(table.reshape(-1), self.where, self.rows[2] + flying * self.rows[3])
        return np.where(np.isfinite(self.bound), table, np.inf)

    def stage(self, at: Range, stages: int, update_s: float) -> Stage | None:
        """The fastest option of a range with that many stages to the end; None if none fits."""
        if at not in self.options:
            return Stage(at, float(self.bound[at]), 0.0, None)
        flying, memory = self.problem.flying[stages - 1], self.problem.memory
        options = [o for o in self.options[at] if o.bytes(flying) <= memory and o.update_s <= update_s]
        if not options:
            return None
        best = min(options, key=lambda o: (o.seconds, o.update_s))
        return Stage(at, best.seconds, best.update_s, best)

    def values(self) -> tuple[Floats, Floats]:
        """All values that the slowest stage and the slowest update can have, rising."""
        usable = self._fits(self.problem.least_flying)
        unasked = self.bound[~self.asked & np.isfinite(self.bound)]
        updates = [self.rows[1][usable], np.zeros(min(1, len(unasked)))]
        return np.unique(np.concatenate([self.rows[0][usable], unasked])), np.unique(np.concatenate(updates))


def make_room(cache: dict[Any, Any]) -> None:
    """Forget all where the cache is full."""
    if len(cache) >= _KEPT:
        cache.clear()


# ------------------------------------------------------------------------------------------------ step 1


def _to_end(steps: Floats, after: Ints, goal: Flags) -> Floats:
    """(layers + 1, rests + 1): the least sum of `steps` from a layer and a rest to the end and a rest in `goal`."""
    count, layers, _ = steps.shape
    least = np.full((layers + 1, len(goal)), np.inf)
    least[layers, goal] = 0.0
    ahead = np.empty(((layers + 1) * count, len(goal)))
    ahead[layers * count :] = least[layers][after]
    # with a limit on the slowest stage most steps are inf, and leaving them out halves the time
    firsts, lasts, m = np.nonzero(np.isfinite(steps.transpose(1, 2, 0)))
    values, targets = steps[m, firsts, lasts, None], (lasts + 1) * count + m
    starts: list[int] = np.searchsorted(firsts, np.arange(layers + 1)).tolist()
    for first in reversed(range(layers)):
        mine = slice(starts[first], starts[first + 1])
        (ahead[targets[mine]] + values[mine]).min(axis=0, initial=np.inf, out=least[first])
        ahead[first * count : (first + 1) * count] = least[first][after]
    return least


@dataclass(frozen=True)
class Relaxed:
    """The relaxed program over `steps` (submeshes, first, last): seconds with sends, inf where a limit forbids."""

    rooms: Rooms
    steps: Floats

    @cached_property
    def to_end(self) -> Floats:
        return _to_end(self.steps, self.rooms.after, self.rooms.done)

    @cached_property
    def from_start(self) -> Floats:
        """(layers + 1, rests + 1): the least sum of all layers before, with this rest left; the mirrored program."""
        mirrored = self.steps[:, ::-1, ::-1].transpose(0, 2, 1)
        return _to_end(mirrored, self.rooms.before, np.arange(len(self.rooms.done)) == 0)[::-1]

    def path(self) -> list[Range]:
        """The stages of the least sum."""
        layer, rest, found = 0, 0, list[Range]()
        while layer < self.steps.shape[1]:
            ahead = self.to_end[layer + 1 :, self.rooms.after[:, rest]].T
            m, extra = np.unravel_index(np.argmin(self.steps[:, layer, layer:] + ahead), ahead.shape)
            found.append((int(m), layer, layer + int(extra)))
            layer, rest = layer + int(extra) + 1, int(self.rooms.after[m, rest])
        return found

    def within(self, first: int, limit: float) -> Ints:
        """The rests with which a plan of a sum of at most `limit` can reach this layer."""
        sums = self.from_start[first] + self.to_end[first]
        return np.flatnonzero(np.isfinite(sums) & (sums <= limit))

    def through(self, first: int, rests: Ints) -> Floats:
        """(rests, submeshes, layers − first): the least sum of a plan with this stage, begun with each of the rests."""
        ahead = self.to_end[first + 1 :].T[self.rooms.after[:, rests].T]
        return self.from_start[first][rests, None, None] + self.steps[:, first, first:] + ahead


# ------------------------------------------------------------------------------------------------ step 2


@dataclass(frozen=True)
class Edges:
    """Stages as edges between states (first layer, rest), sorted by the state that they leave.

    `ranges` are flat indices. The edges from `heads[i]` begin at `starts[i]`.
    """

    ranges: Numbers
    targets: Numbers
    heads: Numbers
    starts: Ints

    @classmethod
    def within(cls, relaxed: Relaxed, limit: float) -> Edges:
        """Those on a plan whose relaxed sum is at most `limit`."""
        _, layers, _ = relaxed.steps.shape
        states, after = len(relaxed.rooms.done), relaxed.rooms.after
        found: list[Numbers] = []
        for first in range(layers):
            rests = relaxed.within(first, limit)
            at, m, extra = np.nonzero(relaxed.through(first, rests) <= min(limit, np.finfo(np.float64).max))
            rest, ranges = rests[at], (m * layers + first) * layers + first + extra
            edges = (first * states + rest, ranges, (first + 1 + extra) * states + after[m, rest])
            found.append(np.array(edges, np.int32))
        sources, ranges, targets = np.concatenate(found, axis=1)
        starts = np.flatnonzero(np.diff(sources, prepend=-1))
        return cls(ranges, targets, sources[starts], starts)

    def of(self, state: int) -> slice:
        """The edges that leave a state."""
        i = int(np.searchsorted(self.heads, state))
        return slice(self.starts[i], self.starts[i + 1] if i + 1 < len(self.starts) else None)


@dataclass(frozen=True)
class Layered:
    """The program over (stages to the end, first layer, devices left); `join` is np.add, np.maximum for a bottleneck.

    `cost(s, ranges)` is what stages (flat indices of ranges) with s stages to the end cost.
    """

    problem: Problem
    edges: Edges
    cost: Callable[[int, Numbers], Floats]
    join: np.ufunc

    @cached_property
    def least(self) -> list[Floats]:
        """For s = 0, 1, … while there are any: (states,) the least cost from a state to the end in s stages."""
        states = len(self.problem.rooms.done)
        now = np.full((self.problem.layers + 1) * states, np.inf)
        now[self.problem.layers * states :][self.problem.rooms.done] = 0.0
        found: list[Floats] = []
        while np.isfinite(now).any() and len(found) < self.problem.counts[-1]:
            found.append(now)
            costs = self.join(self.cost(len(found), self.edges.ranges), now[self.edges.targets])
            now = np.full_like(now, np.inf)
            now[self.edges.heads] = np.minimum.reduceat(costs, self.edges.starts)
        return [*found, now]

    def best(self) -> tuple[float, int]:
        """The least cost of a whole plan, and its number of stages."""
        if not len(self.edges.heads):
            return math.inf, 0
        return min(
            ((float(self.least[s][0]), s) for s in self.problem.counts if s < len(self.least)), default=(math.inf, 0)
        )

    def path(self, stages: int) -> list[Range]:
        """The stages of the least cost."""
        state, found = 0, list[Range]()
        for s in range(stages, 0, -1):
            at = self.edges.of(state)
            ranges, targets = self.edges.ranges[at], self.edges.targets[at]
            i = int(np.argmin(self.join(self.cost(s, ranges), self.least[s - 1][targets])))
            m, first, last = np.unravel_index(ranges[i], (len(self.problem.shapes), *(self.problem.layers,) * 2))
            found.append((int(m), int(first), int(last)))
            state = int(targets[i])
        return found
