"""Exact narrowing of large problems: drops choices that no optimal solution takes.

Messages between nodes raise a lower bound on the objective (block-coordinate ascent on the dual of the flow
relaxation, with the handshake of Tourani et al., "MPLP++: Fast, Parallel Dual Block-Coordinate Ascent for
Dense Graphical Models", ECCV 2018). The costs are rewritten so that their sum never changes,

    Σ_i θ_i[x_i] + Σ_e θ_e[x_i, x_j],     bound = Σ_i min θ_i + Σ_e min θ_e,

and the bound for a solution that takes choice c of node i exceeds this one by at least

    (θ_i[c] − min θ_i) + Σ_{e at i} (min_j θ_e[c, j] − min θ_e).

A choice for which that is more than the gap to a known solution can go. The known solution comes from solving
the problem over the most promising choices only. What is left keeps the rewritten costs: where elimination then joins
some of its nodes, the next bound starts from this one and rises further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from alpa_like.errors import InfeasibleError, SolverError
from alpa_like.passes.assignment import AssignmentProblem, Costs, Solution, Usage

__all__ = ["Charges", "Narrowed", "Prices", "charged", "flow_entries", "narrow", "priced", "promising"]

Prices = dict[int, float]
"""Seconds per byte in use at a time."""

Charges = dict[object, tuple[Costs, Costs, Costs]]
"""Costs with a price on bytes, with the costs and bytes that they were made of; by the identity of these."""

_Choices = npt.NDArray[np.intp]
_SWEEPS = 20
"""From one look at the bound to the next."""

_ROUNDS = 12

_FEW_SWEEPS, _FEW_ROUNDS = 10, 4
"""The same where only the promising choices are asked for."""

_STALLED, _PATIENCE = 0.9, 3
"""So many rounds that leave more than this share of the flow variables are the last ones."""


@dataclass(frozen=True, slots=True)
class Narrowed:
    """The problem over the choices that are left; `choices[i]` are those of node i.

    `rewritten` is the same problem, without a memory limit, in costs whose sums are the same and that show a bound,
    and `known` the cost of the best solution that was found.
    """

    problem: AssignmentProblem
    choices: tuple[_Choices, ...]
    rewritten: AssignmentProblem | None = None
    known: float = np.inf

    def expand(self, choice: Sequence[int]) -> tuple[int, ...]:
        """The choices of the original problem."""
        return tuple(int(c[x]) for c, x in zip(self.choices, choice, strict=True))


def flow_entries(problem: AssignmentProblem) -> int:
    """About how many flow variables the integer program of a problem has."""
    return sum(costs.size for costs in problem.pairs.values())


def narrow(
    problem: AssignmentProblem,
    solve: Callable[[AssignmentProblem], Solution],
    target: int,
    prices: Prices | None = None,
    known: float = np.inf,
) -> Narrowed:
    """Drop choices until about `target` flow variables are left, or nothing more can be dropped.

    The optimum is unchanged, if it is below `known`, the cost of a solution found elsewhere. `solve` is called on
    problems of about `target` flow variables. Memory: `prices` are seconds per byte at some times (Lagrange
    multipliers), which raise the bound; any prices that are not negative give a valid one.
    """
    bound = _Bound.of(problem, prices or {})
    best: tuple[float, tuple[int, ...]] = (known, ())
    left = [flow_entries(problem)]
    for number in range(_ROUNDS):
        bound.sweeps(_SWEEPS)
        if number % 2 or not problem.usages:  # with a memory limit a solution takes longer than sweeps
            best = min(best, _promising_solution(problem, bound, solve, target))
        bound.drop(best[0], best[1])
        left.append(bound.flow_entries())
        stalled = len(left) > _PATIENCE and left[-1] > _STALLED * left[-1 - _PATIENCE]
        if left[-1] <= target or stalled:
            break
    rewritten = None if problem.usages else replace(problem, unary=tuple(bound.unary), pairs=bound.pairs)
    return replace(restrict(problem, bound.alive), rewritten=rewritten, known=best[0])


def _promising_solution(
    problem: AssignmentProblem, bound: _Bound, solve: Callable[[AssignmentProblem], Solution], target: int
) -> tuple[float, tuple[int, ...]]:
    """The best of the promising choices and its cost; inf where they exclude each other or need too much memory.

    More sweeps tell them apart better.
    """
    chosen = restrict(problem, bound.promising(target))
    try:
        found = chosen.expand(solve(chosen.problem).choice)
    except (InfeasibleError, SolverError):
        return np.inf, ()
    return problem.cost(found), found


def promising(problem: AssignmentProblem, target: int) -> Iterator[tuple[Narrowed, float]]:
    """About `target` flow variables of the choices that the dual bound holds promising, and that bound.

    More and more exactly, some times. The optimum may be lost.
    """
    bound = _Bound.of(problem, {})
    for _ in range(_FEW_ROUNDS):
        bound.sweeps(_FEW_SWEEPS)
        yield restrict(problem, bound.promising(target)), bound.value()


def restrict(problem: AssignmentProblem, choices: Sequence[_Choices]) -> Narrowed:
    """The problem over some of the choices of each node."""
    unary = tuple(costs[c] for costs, c in zip(problem.unary, choices, strict=True))
    pairs = {(i, j): costs[np.ix_(choices[i], choices[j])] for (i, j), costs in problem.pairs.items()}
    usages = tuple(replace(u, bytes=u.bytes[choices[u.node]]) for u in problem.usages)
    return Narrowed(replace(problem, unary=unary, pairs=pairs, usages=usages), tuple(choices))


def charged(
    unary: Sequence[Costs], usages: Iterable[Usage], price_s_per_byte: float, made: Charges
) -> tuple[Costs, ...]:
    """The costs of nodes with a price on the bytes of some usages. Equal costs stay equal objects, by `made`."""
    found = list(unary)
    for u in usages:
        key = ("charged", id(found[u.node]), id(u.bytes), price_s_per_byte)
        if key not in made:
            made[key] = found[u.node] + price_s_per_byte * u.bytes, found[u.node], u.bytes
        found[u.node] = made[key][0]
    return tuple(found)


def priced(problem: AssignmentProblem, prices: Prices) -> tuple[AssignmentProblem, float]:
    """The problem with memory paid for instead of limited, and what the limit's room costs at these prices.

    Cost of a solution there, less that amount, is at most its cost in `problem`, if it fits the limit. Equal
    parts keep equal arrays.
    """
    unary, made = problem.unary, dict[object, Any]()
    for time, price in sorted(prices.items()):
        unary = charged(unary, problem.alive(time), price, made)
    room = problem.limit - problem.fixed_bytes
    return replace(problem, unary=unary, usages=()), sum(prices.values()) * room if prices else 0.0


@dataclass
class _Bound:
    """Rewritten costs over the choices that are `alive`."""

    unary: list[Costs]
    pairs: dict[tuple[int, int], Costs]
    alive: list[_Choices]
    offset: float = 0.0
    at: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: AssignmentProblem, prices: Prices) -> _Bound:
        """`inf` becomes a cost that no solution reaches, so that differences stay numbers."""
        problem, offset = priced(problem, prices)
        finite = [c[np.isfinite(c)] for c in (*problem.unary, *problem.pairs.values())]
        huge = 1e3 * sum(float(np.abs(c).max()) for c in finite if c.size) + 1.0
        unary = [np.where(np.isfinite(c), c, huge) for c in problem.unary]
        pairs = {e: np.where(np.isfinite(c), c, huge) for e, c in problem.pairs.items()}
        self = cls(unary, pairs, [np.arange(len(c)) for c in unary], offset)
        for e in pairs:
            for node in e:
                self.at.setdefault(node, []).append(e)
        return self

    def sweeps(self, count: int) -> None:
        for _ in range(count):
            self.sweep()

    def sweep(self) -> None:
        """One handshake per edge: collect what both ends know, give it back evenly. Never lowers the bound."""
        for (i, j), costs in self.pairs.items():
            costs += self.unary[i][:, None] + self.unary[j][None, :]
            first = costs.min(axis=1) / 2
            costs -= first[:, None]
            second = costs.min(axis=0)
            costs -= second[None, :]
            rest = costs.min(axis=1)
            costs -= rest[:, None]
            self.unary[i] = first + rest
            self.unary[j] = second

    def flow_entries(self) -> int:
        """About how many flow variables are left."""
        return sum(costs.size for costs in self.pairs.values())

    def value(self) -> float:
        """The lower bound."""
        return sum(float(c.min()) for c in (*self.unary, *self.pairs.values())) - self.offset

    def excess(self, node: int) -> Costs:
        """By how much the bound rises when the node takes each of its choices."""
        total = self.unary[node] - self.unary[node].min()
        for i, j in self.at.get(node, ()):
            costs = self.pairs[(i, j)]
            total = total + costs.min(axis=1 if node == i else 0) - costs.min()
        return total

    def promising(self, target: int) -> list[_Choices]:
        """The choices of least excess, as many as give about `target` flow variables."""
        excess = [self.excess(i) for i in range(len(self.unary))]
        levels = np.unique(np.concatenate(excess))
        low, high = 0, len(levels) - 1
        while low < high:
            middle = (low + high + 1) // 2
            counts = [int((e <= levels[middle]).sum()) for e in excess]
            size = sum(counts[i] * counts[j] for i, j in self.pairs)
            low, high = (middle, high) if size <= target else (low, middle - 1)
        return [c[e <= levels[low]] for c, e in zip(self.alive, excess, strict=True)]

    def drop(self, known: float, choice: tuple[int, ...]) -> None:
        """Drop every choice that can't be part of a solution better than one of cost `known`."""
        room = known - self.value() + 1e-9 * abs(known)
        for node in range(len(self.unary)):
            keep = self.excess(node) <= room
            if choice:
                keep |= self.alive[node] == choice[node]
            if not keep.all():
                self._keep(node, keep)

    def _keep(self, node: int, keep: npt.NDArray[np.bool_]) -> None:
        self.alive[node] = self.alive[node][keep]
        self.unary[node] = self.unary[node][keep]
        for i, j in self.at.get(node, ()):
            costs = self.pairs[(i, j)]
            self.pairs[(i, j)] = costs[keep] if node == i else np.ascontiguousarray(costs[:, keep])
