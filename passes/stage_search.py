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
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from alpa_like.cluster import Cluster
from alpa_like.errors import InfeasibleError, MethodError, PlanError
from alpa_like.plan import bytes_text

__all__ = ["Choice", "Costs", "Option", "Search", "Statistics", "Submesh", "search", "submeshes"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]
"""As `Ints`, where there are millions."""
Flags = npt.NDArray[np.bool_]
Range = tuple[int, int, int]
"""Number of the submesh, first layer, last layer (inclusive)."""

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

_KEPT = 128
"""Tables, and relaxed programs, that are kept for when they are needed again; each takes about a megabyte."""

_NOTHING_FITS = 1e30
"""Stands for the bytes of a layer for which there is no option at all."""


# ------------------------------------------------------------------------------------------------ what goes in and out


@dataclass(frozen=True, slots=True)
class Submesh:
    """`hosts` × `devices_per_host` devices: whole hosts, or a power of two of devices inside one."""

    hosts: int
    devices_per_host: int

    @property
    def num_devices(self) -> int:
        return self.hosts * self.devices_per_host

    def __str__(self) -> str:
        return f"{self.hosts}×{self.devices_per_host}"


def submeshes(cluster: Cluster) -> tuple[Submesh, ...]:
    """(1, 1), (1, 2), (1, 4), … up to a host, the host, and (n, all its devices) for 2 to all hosts."""
    whole = cluster.devices_per_host
    inside = [2**k for k in range(whole.bit_length()) if 2**k < whole]
    return (*(Submesh(1, n) for n in inside), *(Submesh(n, whole) for n in range(1, cluster.hosts + 1)))


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a range of layers on a submesh; bytes are those of the fullest device.

    `forward_s` and `backward_s` are of one micro-batch, `update_s` of the update once per step. `fixed_bytes` are held
    all step, `micro_bytes` for each micro-batch in flight, `peak_bytes` at times on top. `tag` is the caller's own.
    """

    forward_s: float
    backward_s: float
    update_s: float
    fixed_bytes: float
    micro_bytes: float
    peak_bytes: float
    tag: object = None

    def __post_init__(self) -> None:
        numbers = (self.forward_s, self.backward_s, self.update_s, self.fixed_bytes, self.micro_bytes, self.peak_bytes)
        if not all(0 <= n < math.inf for n in numbers):
            raise PlanError(f"seconds and bytes of an option must be finite and at least 0, found {numbers}")

    @property
    def seconds(self) -> float:
        """Of one micro-batch, forward and backward."""
        return self.forward_s + self.backward_s

    def bytes(self, in_flight: int) -> float:
        """Bytes of the fullest device with that many micro-batches in flight."""
        return self.fixed_bytes + self.peak_bytes + in_flight * self.micro_bytes


class Costs(Protocol):
    """What the search asks for. Layers are numbered from 0, `last` is inclusive."""

    def options(self, first: int, last: int, submesh: Submesh) -> Sequence[Option]:
        """The ways that none of the others beats; empty if nothing fits at all. Asked at most once per argument."""
        ...

    def lower_bound_s(self, first: int, last: int, submesh: Submesh) -> float:
        """At most the least forward_s + backward_s of the options, and cheap; 0 is allowed. Asked for all arguments."""
        ...

    def send_s(self, boundary: int) -> float:
        """Seconds to move one micro-batch's activations, one way, across the cut after layer `boundary`."""
        ...


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
    rooms = _Rooms.of(cluster, shapes)
    counts = _counts(rooms, num_layers, cluster, max_stages, num_stages)
    flying = [in_flight(s, num_micro_batches) for s in range(1, counts[-1] + 1)]
    if min(flying) < 0:
        raise MethodError(f"in_flight must return 0 or more micro-batches, found {min(flying)}")
    problem = _Problem(cluster, shapes, rooms, num_layers, num_micro_batches, memory_bytes, counts, tuple(flying))
    return _Finder(problem, _Known(problem, costs)).run(gap)


def _check(num_layers: int, num_micro_batches: int, memory_bytes: float, gap: float) -> None:
    for name, count in (("num_layers", num_layers), ("num_micro_batches", num_micro_batches)):
        if count < 1:
            raise MethodError(f"{name} must be at least 1, found {count}")
    if not memory_bytes > 0 or not 0 <= gap < math.inf:
        raise MethodError(f"memory_bytes must be above 0 and gap at least 0, found {memory_bytes} and {gap}")


def _counted(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def _counts(
    rooms: _Rooms, num_layers: int, cluster: Cluster, max_stages: int | None, num_stages: int | None
) -> tuple[int, ...]:
    """The numbers of stages that are allowed and possible, rising."""
    possible = rooms.counts(min(num_layers, cluster.num_devices))
    most = math.inf if max_stages is None else max_stages
    counts = tuple(n for n in possible if n <= most and num_stages in (None, n))
    if not counts:
        asked = f"max_stages={max_stages}" if num_stages is None else f"num_stages={num_stages}"
        raise MethodError(
            f"{_counted(num_layers, 'layer')} on {_counted(cluster.hosts, 'host')} of "
            f"{_counted(cluster.devices_per_host, 'device')} can form {', '.join(map(str, possible))} stages with "
            f"submeshes of 1, 2, 4, … devices or whole hosts, not {asked}; ask for one of these, or give other "
            "submeshes with ManualStageOption"
        )
    return counts


# ------------------------------------------------------------------------------------------------ devices


@dataclass(frozen=True)
class _Rooms:
    """The devices that may be left, numbered; 0 is all of them, the last number stands for "impossible".

    Powers of two that are placed from large to small never leave a hole, so they fit into hosts of D devices exactly if
    for each power p the stages of at least p devices take no more blocks of p than the hosts have, floor(D / p) each.
    Where p divides D that follows from the number of devices (Alpa's packing theorem); what is left is therefore a
    vector: the devices, and the blocks of each power of two below D that does not divide it.
    """

    after: Ints
    """(submeshes, rests + 1): what is left after a submesh is taken."""
    before: Ints
    """Its inverse."""
    done: Flags
    """(rests + 1,): no device is left."""

    @classmethod
    def of(cls, cluster: Cluster, shapes: Sequence[Submesh]) -> _Rooms:
        host = cluster.devices_per_host
        powers = [2**k for k in range(host.bit_length()) if 2**k < host]
        blocks = [1, *(p for p in powers if host % p)]
        needs = [np.array([_blocks(shape, host, p) for p in blocks]) for shape in shapes]
        rests = _reachable(np.array([cluster.hosts * (host // p) for p in blocks]), needs)
        number = {rest: i for i, rest in enumerate(rests)}
        table = np.array(rests)

        def look_up(sign: int, need: Ints) -> list[int]:
            return [number.get(tuple(row), len(rests)) for row in (table + sign * need).tolist()] + [len(rests)]

        after, before = (np.array([look_up(sign, need) for need in needs]) for sign in (-1, 1))
        return cls(after, before, np.append(table[:, 0] == 0, False))

    def counts(self, most: int) -> tuple[int, ...]:
        """The numbers of submeshes, up to `most`, that take all devices."""
        now, found = np.arange(len(self.done)) == 0, list[int]()
        for count in range(1, most + 1):
            after = self.after[:, now].ravel()
            now = np.zeros_like(self.done)
            now[after] = True
            now[-1] = False
            found += [count] if (now & self.done).any() else []
        return tuple(found)


def _blocks(shape: Submesh, host: int, power: int) -> int:
    """How many aligned blocks of `power` devices a submesh takes."""
    if shape.devices_per_host == host:
        return shape.hosts * (host // power)
    return shape.num_devices // power


def _reachable(everything: Ints, needs: Sequence[Ints]) -> list[tuple[int, ...]]:
    """All that can be left, most first."""
    start: tuple[int, ...] = tuple(everything.tolist())
    found, new = {start}, [start]
    while new:
        left = np.concatenate([np.array(new) - need for need in needs])
        left = left[(left >= 0).all(1)].tolist()
        new = sorted({tuple(rest) for rest in left} - found)
        found.update(new)
    return sorted(found, reverse=True)


def _place(cluster: Cluster, shapes: Sequence[Submesh]) -> list[int]:
    """The first device of each submesh. From large to small each goes to the first host with room; see `_Rooms`."""
    host = cluster.devices_per_host
    used = [0] * cluster.hosts
    first = [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -shapes[i].num_devices):
        shape = shapes[i]
        at = next(h for h in range(cluster.hosts) if used[h] + shape.devices_per_host <= host)
        first[i] = at * host + used[at]
        for h in range(at, at + shape.hosts):
            used[h] += shape.devices_per_host
    return first


# ------------------------------------------------------------------------------------------------ what is known


@dataclass(frozen=True)
class _Problem:
    cluster: Cluster
    shapes: tuple[Submesh, ...]
    rooms: _Rooms
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
class _Stage:
    """A range in a plan. `option` is None while it was not asked for; then the seconds are its bound."""

    range: Range
    seconds: float
    update_s: float
    option: Option | None


class _Known:
    """The costs as far as they were asked for; tables have shape (submeshes, first layer, last layer)."""

    def __init__(self, problem: _Problem, costs: Costs) -> None:
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
            _make_room(self.tables)
            table = np.where(self.asked, np.inf, self.bound)
            np.minimum.at(table.reshape(-1), self.where[usable], self.rows[0][usable])
            self.tables[key] = table
        return self.tables[key]

    def bytes(self, flying: int) -> Floats:
        """The table of the least bytes of an option; 0 where not asked, huge where there is none."""
        sizes = np.arange(self.problem.layers)[None, :] - np.arange(self.problem.layers)[:, None] + 1.0
        table = np.where(self.asked, _NOTHING_FITS * sizes, 0.0)
        np.minimum.at(table.reshape(-1), self.where, self.rows[2] + flying * self.rows[3])
        return np.where(np.isfinite(self.bound), table, np.inf)

    def stage(self, at: Range, stages: int, update_s: float) -> _Stage | None:
        """The fastest option of a range with that many stages to the end; None if none fits."""
        if at not in self.options:
            return _Stage(at, float(self.bound[at]), 0.0, None)
        flying, memory = self.problem.flying[stages - 1], self.problem.memory
        options = [o for o in self.options[at] if o.bytes(flying) <= memory and o.update_s <= update_s]
        if not options:
            return None
        best = min(options, key=lambda o: (o.seconds, o.update_s))
        return _Stage(at, best.seconds, best.update_s, best)

    def values(self) -> tuple[Floats, Floats]:
        """All values that the slowest stage and the slowest update can have, rising."""
        usable = self._fits(self.problem.least_flying)
        unasked = self.bound[~self.asked & np.isfinite(self.bound)]
        updates = [self.rows[1][usable], np.zeros(min(1, len(unasked)))]
        return np.unique(np.concatenate([self.rows[0][usable], unasked])), np.unique(np.concatenate(updates))


def _make_room(cache: dict[Any, Any]) -> None:
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
class _Relaxed:
    """The relaxed program over `steps` (submeshes, first, last): seconds with sends, inf where a limit forbids."""

    rooms: _Rooms
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
class _Edges:
    """Stages as edges between states (first layer, rest), sorted by the state that they leave.

    `ranges` are flat indices. The edges from `heads[i]` begin at `starts[i]`.
    """

    ranges: Numbers
    targets: Numbers
    heads: Numbers
    starts: Ints

    @classmethod
    def within(cls, relaxed: _Relaxed, limit: float) -> _Edges:
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
class _Layered:
    """The program over (stages to the end, first layer, devices left); `join` is np.add, np.maximum for a bottleneck.

    `cost(s, ranges)` is what stages (flat indices of ranges) with s stages to the end cost.
    """

    problem: _Problem
    edges: _Edges
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
    plan: tuple[_Stage, ...] = ()

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

    problem: _Problem
    known: _Known
    heap: list[tuple[float, int, _Box]] = field(default_factory=list[tuple[float, int, _Box]])
    views: dict[tuple[float, float], _Relaxed] = field(default_factory=dict[tuple[float, float], "_Relaxed"])
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

    def _view(self, high: tuple[float, float]) -> _Relaxed:
        if high not in self.views:
            _make_room(self.views)
            seconds = self.known.seconds(self.problem.least_flying, high[1])
            steps = np.where(seconds <= high[0], seconds + self.known.send, np.inf)
            self.views[high] = _Relaxed(self.problem.rooms, steps)
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

    def _layer(self, high: tuple[float, float], limit: float) -> _Layered:
        """The program of step 2 over the stages on plans of a relaxed sum of at most `limit`."""

        def cost(stages: int, ranges: Numbers) -> Floats:
            seconds = self.known.seconds(self.problem.all_flying(stages), high[1]).reshape(-1)[ranges]
            return np.where(seconds <= high[0], seconds + self.known.send[ranges % self.problem.layers], np.inf)

        self.layered += 1
        return _Layered(self.problem, _Edges.within(self._view(high), limit), cost, np.add)

    def _plan(self, path: Sequence[Range], high: tuple[float, float]) -> list[_Stage | None]:
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
        places = _place(self.problem.cluster, shapes)
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
        view = _Relaxed(self.problem.rooms, np.where(np.isfinite(self.known.bound), 0.0, np.inf))
        flying = self.problem.flying

        def needed(stages: int, ranges: Numbers) -> Floats:
            return self.known.bytes(flying[stages - 1]).reshape(-1)[ranges]

        bottleneck = _Layered(self.problem, _Edges.within(view, 0.0), needed, np.maximum)
        path = bottleneck.path(bottleneck.best()[1])
        held = flying[len(path) - 1 :: -1]
        needs = [float(self.known.bytes(f)[at]) for f, at in zip(held, path, strict=True)]
        worst = int(np.argmax(needs))
        return _blocked(self.problem, path[worst], held[worst], needs[worst])


def _blocked(problem: _Problem, at: Range, flying: int, needed: float) -> str:
    m, first, last = at
    layers = f"layer {first}" if first == last else f"layers {first} to {last}"
    help_ = "use more devices, rematerialization"
    if needed >= _NOTHING_FITS:
        return f"no plan fits: {layers} on {problem.shapes[m]} devices have no option at all; {help_} or more memory"
    return (
        f"no plan fits: {layers} on {problem.shapes[m]} devices need at least {bytes_text(needed)} per device with "
        f"{flying} micro-batches in flight, there are {bytes_text(problem.memory)}; {help_}, more micro-batches, "
        "or a schedule with fewer of them in flight"
    )
