"""How one tensor can lie on a mesh, and what it costs to move it from one layout to another.

A *state* gives every mesh axis a place: `PARTIAL` (each device holds a summand), `WHOLE` (not split by this
axis) or a dim. Axes on one dim are ordered by their number, major to minor. Moves are the steps that the
partitioner does natively, one axis at a time (reductions and all-to-alls also over several):

    all-gather      minor-most axis of a dim  → WHOLE
    slice           WHOLE                     → minor-most axis of a dim     (no communication)
    all-to-all      minor-most axes of a dim  → minor-most of another
    reduce-scatter  all PARTIAL axes at once  → minor-most axes of one dim
    all-reduce      a set of PARTIAL axes     → WHOLE

The cost between two states is the cheapest path of such moves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from alpa_like.cost import CostModel, ring_bytes
from alpa_like.passes.assignment import Costs

__all__ = ["PARTIAL", "WHOLE", "Move", "State", "TensorSpace", "states_of"]

PARTIAL, WHOLE = -2, -1
State = tuple[int, ...]
"""For each mesh axis `PARTIAL`, `WHOLE` or the number of a dim."""


@dataclass(frozen=True, slots=True)
class Move:
    """One step between two states; `nbytes` is the buffer that `ring_bytes` takes."""

    kind: str
    axes: tuple[int, ...]
    source: State
    target: State
    nbytes: float
    seconds: float


def states_of(rank: int, mesh_shape: tuple[int, ...], *, partial: bool = True) -> list[State]:
    """All states of a tensor of `rank` dims, in a fixed order. An axis of one device stays `WHOLE`."""
    places = range(PARTIAL if partial else WHOLE, rank)
    return list(itertools.product(*(places if size > 1 else (WHOLE,) for size in mesh_shape)))


@dataclass
class TensorSpace:
    """All states of a tensor with dims `shape` and elements of `bits` on the mesh of `cost`.

    `combined`: its collectives wait for nothing and travel together with others (see `cost.RingCost`).
    """

    shape: tuple[int, ...]
    bits: int
    combined: bool
    cost: CostModel
    states: list[State] = field(init=False)
    index: dict[State, int] = field(init=False)

    def __post_init__(self) -> None:
        self.states = states_of(len(self.shape), self.cost.mesh_shape)
        self.index = {s: i for i, s in enumerate(self.states)}

    def shards(self, state: State) -> list[int]:
        """Into how many parts each dim is cut."""
        parts = [1] * len(self.shape)
        for axis, place in enumerate(state):
            if place >= 0:
                parts[place] *= self.cost.mesh_shape[axis]
        return parts

    def possible(self, state: State) -> bool:
        """Whether no dim is cut into more parts than it has elements."""
        return all(n <= max(size, 1) for n, size in zip(self.shards(state), self.shape, strict=True))

    def local_elements(self, state: State) -> int:
        """Elements on one device; a dim that does not divide is padded up."""
        return math.prod(-(-size // n) for size, n in zip(self.shape, self.shards(state), strict=True))

    def local_bytes(self, state: State) -> float:
        return self.local_elements(state) * self.bits / 8

    def moves(self, state: State) -> Iterator[Move]:
        """Every move that leads out of `state`."""
        partial = [a for a, place in enumerate(state) if place == PARTIAL]
        for count in range(1, len(partial) + 1):
            for axes in itertools.combinations(partial, count):
                target = tuple(WHOLE if a in axes else place for a, place in enumerate(state))
                yield self._move("all-reduce", axes, state, target)
        yield from self._scatters(state, tuple(partial))
        yield from self._exchanges(state)
        for axis, place in enumerate(state):
            if self.cost.mesh_shape[axis] == 1 or place == PARTIAL:
                continue
            for goal in range(len(self.shape)):
                if goal != place and _minor_most(state, axis, goal):
                    yield from self._to_dim(state, axis, place, goal)
            if place >= 0 and _minor_most(state, axis, place):
                target = (*state[:axis], WHOLE, *state[axis + 1 :])
                yield self._move("all-gather", (axis,), state, target)

    def _scatters(self, state: State, axes: tuple[int, ...]) -> Iterator[Move]:
        """Reduce-scatters of all partial axes. The partitioner can't cut the result in two dims at once."""
        for goal in range(len(self.shape)) if axes else ():
            target = tuple(goal if a in axes else place for a, place in enumerate(state))
            ordered = all(place != goal for a, place in enumerate(state) if a > axes[0] and a not in axes)
            if ordered and self.possible(target):
                yield self._move("reduce-scatter", axes, state, target)

    def _exchanges(self, state: State) -> Iterator[Move]:
        """All-to-alls of several axes: the minor-most ones of a dim become the minor-most of another."""
        for place in range(len(self.shape)):
            mine = [a for a, p in enumerate(state) if p == place]
            for count in range(2, len(mine) + 1):
                yield from self._exchange(state, tuple(mine[-count:]))

    def _exchange(self, state: State, axes: tuple[int, ...]) -> Iterator[Move]:
        for goal in range(len(self.shape)):
            target = tuple(goal if a in axes else place for a, place in enumerate(state))
            behind = all(place != goal for a, place in enumerate(state) if a > axes[0])
            if goal != state[axes[0]] and behind and self.possible(target):
                yield self._move("all-to-all", axes, state, target)

    def _to_dim(self, state: State, axis: int, place: int, goal: int) -> Iterator[Move]:
        target = (*state[:axis], goal, *state[axis + 1 :])
        if not self.possible(target):
            return
        if place == WHOLE:
            yield self._move("slice", (axis,), state, target)
        elif _minor_most(state, axis, place):
            yield self._move("all-to-all", (axis,), state, target)

    def _move(self, kind: str, axes: tuple[int, ...], source: State, target: State) -> Move:
        if kind == "slice":
            seconds = self.cost.compute_s(0.0, self.local_bytes(target), "f32")
            return Move(kind, axes, source, target, 0.0, seconds)
        nbytes = self.local_bytes(target if kind == "all-gather" else source)
        seconds = self.cost.collective_s(kind, nbytes, axes, combined=self.combined)
        if kind == "all-gather" and source[axes[0]] > 0:
            seconds += self.cost.copy_s(nbytes)  # the parts come one behind the other, as they lie along the first dim
        return Move(kind, axes, source, target, nbytes, seconds)

    @cached_property
    def _possible_moves(self) -> list[Move]:
        return [m for s in self.states if self.possible(s) for m in self.moves(s)]

    @cached_property
    def seconds(self) -> Costs:
        """`seconds[s, t]`: the cheapest path from state s to state t (Floyd and Warshall); inf where there is none."""
        n = len(self.states)
        best = np.full((n, n), np.inf)
        for i, state in enumerate(self.states):
            if self.possible(state):
                best[i, i] = 0.0
        for move in self._possible_moves:
            i, j = self.index[move.source], self.index[move.target]
            best[i, j] = min(best[i, j], move.seconds)
        for k in range(n):
            if np.isfinite(best[k, k]):
                best = np.minimum(best, best[:, k : k + 1] + best[k])
        return best

    def path(self, source: State, target: State) -> tuple[Move, ...]:
        """The moves of a cheapest path. Follows `seconds`, so both always agree."""
        steps: list[Move] = []
        goal = self.index[target]
        while source != target:
            rest = self.seconds[:, goal]
            best = min(self.moves(source), key=lambda m: m.seconds + rest[self.index[m.target]])
            steps.append(best)
            source = best.target
        return tuple(steps)

    @cached_property
    def elements(self) -> npt.NDArray[np.float64]:
        """`local_elements` of every state."""
        return np.array([self.local_elements(s) for s in self.states], float)

    def traffic(self, moves: tuple[Move, ...]) -> dict[str, float]:
        """Ring bytes that each device sends in these moves, by kind of collective."""
        found: dict[str, float] = {}
        for m in moves:
            if m.kind != "slice":
                members = math.prod(self.cost.mesh_shape[a] for a in m.axes)
                kind = self.cost.emitted(m.kind)
                found[kind] = found.get(kind, 0.0) + ring_bytes(kind, m.nbytes, members)
        return found


def _minor_most(state: State, axis: int, dim: int) -> bool:
    """Whether `axis` is, or would be, the last of the axes on `dim`."""
    return all(place != dim for place in state[axis + 1 :])
