"""Solves an `AssignmentProblem` exactly: eliminate, fold, narrow, integer program; memory where it turns out to bind.

What elimination and folding leave is narrowed; where that leaves few choices, elimination gets further, and so on in
turns. The integer program is for what resists both.

Most steps fit in memory without being asked to, so the problem is solved without the limit first. Where that
solution breaks the limit, memory gets a price at the time of the peak (a Lagrange multiplier, found by
cutting planes), more times as they turn out to matter. That gives a lower bound and mostly a solution that fits;
the integer program with the limit, narrowed by both, closes what gap is left.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from functools import cached_property

import networkx as nx
import numpy as np

from alpa_like.errors import InfeasibleError, SolverError
from alpa_like.passes import ilp
from alpa_like.passes.assignment import AssignmentProblem, Costs, Solution, Usage
from alpa_like.passes.eliminate import Memo, Reduced, eliminate
from alpa_like.passes.fold import Folded, fold
from alpa_like.passes.narrow import Prices, flow_entries, narrow, priced, promising

__all__ = ["estimate", "least_memory", "solve"]

_NARROW_ABOVE = 20_000
"""Flow variables that HiGHS handles in well under a second."""

_WORTHWHILE = 0.9
"""Narrowing that leaves at most this share of the flow variables is worth another elimination."""

_CLOSE_ENOUGH = 1e-6
"""Relative gap at which a solution counts as optimal: that of the solver's own tolerances."""

_ESTIMATED_BY = (2_000, 10_000)
"""Flow variables of the choices that `estimate` looks at, the larger number where the smaller has no solution."""

_ESTIMATED_BEHIND = (100_000, 600_000)
"""Entries of tables that elimination makes for `estimate`; the larger number where the smaller proves no optimum."""

_MOST_SQUEEZED, _SQUEEZES = 16.0, 5
"""How far prices found for single times are raised together, and how often the least factor is halved."""

_CUTS = 12
_MAX_TIMES = 8


def solve(
    problem: AssignmentProblem,
    *,
    solver: str = "auto",
    time_limit_s: float = 600.0,
    gap: float = 0.0,
    memo: Memo | None = None,
) -> Solution:
    """The optimum of `problem` within its memory limit, or a solution proven to be within `gap` (relative) of it.

    `memo` may be shared by problems with the same arrays.

    Where time runs out, the best solution found, status "feasible", and its gap. Raises `InfeasibleError` where
    nothing fits the limit, `SolverError` where no solution was found in time.
    """
    problem.verify()
    search = _Search(problem, solver, time.perf_counter(), time_limit_s, max(gap, _CLOSE_ENOUGH), memo or Memo())
    solution = search.free({})
    if not search.fits(solution.choice):
        solution = search.limited(solution)
    return replace(solution, seconds=time.perf_counter() - search.start)


def estimate(
    problem: AssignmentProblem, *, solver: str = "auto", time_limit_s: float = 600.0, memo: Memo | None = None
) -> Solution:
    """A good solution, without a memory limit and without proof: the optimum where elimination finds it, else the best
    of the choices that the dual bound holds most promising. `memo` may be shared by problems with the same arrays.
    """
    start = time.perf_counter()
    free, found = replace(problem, usages=()), None
    for entries in _ESTIMATED_BEHIND:
        reduced = eliminate(free, max_entries=entries, memo=memo)
        found = _eliminated(free, reduced) if not reduced.kept else _promised(free, reduced, solver, time_limit_s)
        if found and found.cost - found.bound <= ilp.OPTIMAL_GAP * abs(found.cost):
            break  # the optimum
    if found is None:
        return solve(free, solver=solver, time_limit_s=time_limit_s, memo=memo)
    return replace(found, seconds=time.perf_counter() - start)


def _promised(problem: AssignmentProblem, reduced: Reduced, solver: str, time_limit_s: float) -> Solution | None:
    """The best of the promising choices, of the least number that has a solution."""
    for target in _ESTIMATED_BY:
        found = _most_promising(reduced.problem, target, solver, time_limit_s)
        if found:
            choice = reduced.expand(found.choice)
            cost = problem.cost(choice)
            proven = min(cost, found.bound + reduced.offset)
            status = "optimal" if cost - proven <= _CLOSE_ENOUGH * abs(cost) else "feasible"
            return replace(found, status=status, choice=choice, cost=cost, bound=proven)
    return None


def _most_promising(problem: AssignmentProblem, target: int, solver: str, time_limit_s: float) -> Solution | None:
    """The best of the promising choices; the optimum as soon as the bound says so. None where they exclude each other.

    `bound` is of the whole problem.
    """
    best: Solution | None = None
    for few, bound in promising(problem, target):
        try:
            found = _solve_few(few.problem, solver, time_limit_s)
        except (InfeasibleError, SolverError):
            continue
        if best is None or found.cost < best.cost:
            best = replace(found, choice=few.expand(found.choice))
        best = replace(best, bound=bound)
        if best.cost - bound <= ilp.OPTIMAL_GAP * abs(best.cost):
            break
    return best


def least_memory(problem: AssignmentProblem) -> float:
    """A lower bound on the peak that every solution has: the least possible at the times that matter most."""
    least, times = 0.0, set[int]()
    choice = tuple(int(np.argmin(c)) for c in problem.unary)
    for _ in range(_MAX_TIMES):
        when = problem.memory(choice)[1]
        if when in times:
            break
        times.add(when)
        found = _least_at(problem, when)
        choice = found.choice
        least = max(least, problem.fixed_bytes + found.cost)
    return least


def _least_at(problem: AssignmentProblem, when: int) -> Solution:
    """The solution of the fewest bytes at one time, which are its cost."""
    made: dict[int, Costs] = {}

    def allowed(costs: Costs) -> Costs:
        if id(costs) not in made:
            made[id(costs)] = np.where(np.isfinite(costs), 0.0, np.inf)
        return made[id(costs)]

    pairs = {e: allowed(c) for e, c in problem.pairs.items() if not np.isfinite(c).all()}
    only = AssignmentProblem(tuple(allowed(c) for c in problem.unary), pairs, problem.usages)
    return _solve_free(priced(only, {when: 1.0})[0], "auto", 60.0)


def _solve_free(
    problem: AssignmentProblem, solver: str, time_limit_s: float, *, known: float = np.inf, memo: Memo | None = None
) -> Solution:
    """The optimum without a memory limit; `known` is the cost of a solution, and may be inf."""
    reduced = eliminate(replace(problem, usages=()), memo=memo)
    if not reduced.kept:
        return _eliminated(problem, reduced)
    folded = fold(reduced.problem)
    part = _solve_core(folded.problem, solver, time_limit_s, known=known - reduced.offset)
    choice = reduced.expand(folded.expand(part.choice))
    cost = _finite(problem.cost(choice))
    return replace(part, choice=choice, cost=cost, bound=min(cost, part.bound + reduced.offset))


def _eliminated(problem: AssignmentProblem, reduced: Reduced) -> Solution:
    """The optimum where elimination has left no node."""
    choice = reduced.expand(())
    cost = _finite(problem.cost(choice))
    return Solution("optimal", choice, cost, cost, 0.0, 0, "elimination")


def _finite(cost: float) -> float:
    if not np.isfinite(cost):
        raise InfeasibleError("the choices exclude each other: no combination is allowed")
    return cost


def _solve_core(
    problem: AssignmentProblem,
    solver: str,
    time_limit_s: float,
    *,
    prices: Prices | None = None,
    known: float = np.inf,
    gap: float = 0.0,
) -> Solution:
    """The optimum of what elimination and folding left: narrowed first where it is large.

    Without a memory limit the two help each other: a few choices are soon eliminated, and what is left then has a
    tighter bound. So they take turns as long as that gets anywhere.
    """

    def run(part: AssignmentProblem) -> Solution:
        return _solve_few(part, solver, time_limit_s, gap)

    before = flow_entries(problem)
    if before <= _NARROW_ABOVE:
        return run(problem)
    narrowed = narrow(problem, run, _NARROW_ABOVE, prices or {}, known)
    if narrowed.rewritten and flow_entries(narrowed.rewritten) <= _WORTHWHILE * before:
        part = _solve_free(narrowed.rewritten, solver, time_limit_s, known=narrowed.known)
    else:
        part = run(narrowed.problem)
    return replace(part, choice=narrowed.expand(part.choice))


def _solve_few(problem: AssignmentProblem, solver: str, time_limit_s: float, gap: float = 0.0) -> Solution:
    """The optimum of a problem of few choices: by elimination alone or, where that is not enough, the integer program.

    Where memory is limited only the integer program can.
    """
    if not problem.usages:
        reduced = eliminate(problem)
        if not reduced.kept:
            return _eliminated(problem, reduced)
    return ilp.solve(problem, solver=solver, time_limit_s=time_limit_s, gap=max(gap, ilp.OPTIMAL_GAP))


@dataclass
class _Search:
    """The search for a solution within the limit. `best` fits it; no solution that fits costs less than `bound`."""

    problem: AssignmentProblem
    solver: str
    start: float
    time_limit_s: float
    gap: float
    memo: Memo
    best: Solution | None = None
    bound: float = -np.inf
    prices: Prices = field(default_factory=dict)

    def left(self) -> float:
        return self.time_limit_s - (time.perf_counter() - self.start)

    def fits(self, choice: tuple[int, ...]) -> bool:
        return self.problem.memory(choice)[0] <= self.problem.limit * (1 + 1e-9)

    def free(self, prices: Prices) -> Solution:
        """The optimum with memory at these prices; remembers what it says about the limited problem."""
        weighed, room = priced(self.problem, prices)
        found = _solve_free(weighed, self.solver, max(1.0, self.left()), memo=self.memo)
        self.bound = max(self.bound, found.bound - room)
        cost = self.problem.cost(found.choice)
        if self.fits(found.choice) and (self.best is None or cost < self.best.cost):
            self.best = replace(found, cost=cost)
        return found

    def limited(self, found: Solution) -> Solution:
        """The optimum within the limit, which `found` breaks."""
        while len(self.prices) < _MAX_TIMES and self.left() > 0:
            when = self.problem.memory(found.choice)[1]
            if self.fits(found.choice) or when in self.prices:
                break
            found = self.price(when, found)
            if self.closed():
                return self.result()
        if self.best is None:
            self.squeeze(found)
        return self.result() if self.closed() else self.exact()

    def squeeze(self, below: Solution) -> None:
        """Raise all prices together until a solution fits, and no further than needed: room at one time may only be
        had for memory at others. `below` needs too much at these prices.
        """
        low, high = 1.0, 2.0
        above = self.free(self.times(high))
        while not self.fits(above.choice) and high < _MOST_SQUEEZED:
            low, high, below = high, high * 2, above
            above = self.free(self.times(high))
        for _ in range(_SQUEEZES):
            if self.closed() or not self.fits(above.choice):
                return
            self.mix(below, above)
            middle = math.sqrt(low * high)
            found = self.free(self.times(middle))
            fits = self.fits(found.choice)
            low, high, below, above = (low, middle, below, found) if fits else (middle, high, found, above)

    def times(self, factor: float) -> Prices:
        """All prices found so far, times a factor."""
        return {when: price * factor for when, price in self.prices.items()}

    def price(self, when: int, below: Solution) -> Solution:
        """Find the best price for memory at one time, the other prices as they are; return a solution that fits there.

        `below` is the solution at the other prices, which needs too much memory at that time.
        The bound is a concave function of the price, made of one line per solution; each step goes to where the
        lines of the two nearest solutions cross.
        """
        least = self.problem.fixed_bytes + _least_at(self.problem, when).cost
        if least > self.problem.limit * (1 + 1e-9):
            raise InfeasibleError(f"{least:.0f} bytes are needed at time {when}, the limit is {self.problem.limit:.0f}")
        price = self.first_price()
        above = self.free({**self.prices, when: price})
        while self.level(above, when) > self.problem.limit and self.left() > 0:
            below, price = above, price * 4
            above = self.free({**self.prices, when: price})
        self.prices[when] = price
        for _ in range(_CUTS):
            if self.closed() or self.left() <= 0:
                break
            cut = self.crossing(below, above, when)
            found = self.free({**self.prices, when: cut})
            fits = self.level(found, when) <= self.problem.limit
            if self.level(found, when) in (self.level(below, when), self.level(above, when)):
                break
            below, above = (below, found) if fits else (found, above)
            self.prices[when] = cut
        self.mix(below, above)
        return above

    def mix(self, cheap: Solution, fitting: Solution) -> None:
        """Take as many parts as fit from a solution that is cheaper, but needs too much memory.

        The parts in which the two differ touch nothing else that differs, so each can be exchanged alone: of equal
        layers some then take one choice and some the other.
        """
        parts = self.parts(cheap.choice, fitting.choice)
        gains = sorted((self.gain(part, cheap.choice, fitting.choice), part) for part in parts)
        useful = [part for gain, part in gains if gain < 0]

        def taken(count: int) -> tuple[int, ...]:
            nodes = {node for part in useful[:count] for node in part}
            return tuple(
                c if i in nodes else f for i, (c, f) in enumerate(zip(cheap.choice, fitting.choice, strict=True))
            )

        low, high = 0, len(useful)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(taken(middle)) else (low, middle - 1)
        choice = taken(low)
        cost = self.problem.cost(choice)
        if self.fits(choice) and (self.best is None or cost < self.best.cost):
            self.best = replace(fitting, choice=choice, cost=cost)

    def parts(self, left: tuple[int, ...], right: tuple[int, ...]) -> list[list[int]]:
        """The nodes in which two solutions differ, by connected parts."""
        differ = {i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b}
        graph: nx.Graph[int] = nx.Graph()
        graph.add_nodes_from(differ)
        graph.add_edges_from(e for e in self.problem.pairs if e[0] in differ and e[1] in differ)
        return [sorted(part) for part in nx.connected_components(graph)]

    def gain(self, part: list[int], new: tuple[int, ...], old: tuple[int, ...]) -> float:
        """The change of the cost when a part takes its new choices."""
        inside = set(part)
        change = sum(float(self.problem.unary[i][new[i]] - self.problem.unary[i][old[i]]) for i in part)
        for e in {e for i in part for e in self.edges[i]}:
            costs = self.problem.pairs[e]
            i, j = (new[n] if n in inside else old[n] for n in e)
            change += float(costs[i, j] - costs[old[e[0]], old[e[1]]])
        return change

    @cached_property
    def edges(self) -> dict[int, list[tuple[int, int]]]:
        """The pairs that each node is part of."""
        found: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(self.problem.unary))}
        for e in self.problem.pairs:
            for node in e:
                found[node].append(e)
        return found

    def crossing(self, below: Solution, above: Solution, when: int) -> float:
        """The price at which two solutions cost the same: where the bound is highest, if there is none between them."""
        others = {t: p for t, p in self.prices.items() if t != when}
        dear, cheap = (priced(self.problem, others)[0].cost(s.choice) for s in (above, below))
        return max(0.0, (dear - cheap) / (self.level(below, when) - self.level(above, when)))

    def first_price(self) -> float:
        return max(abs(self.bound), 1e-9) / self.problem.limit

    def level(self, solution: Solution, when: int) -> float:
        used = sum(float(u.bytes[solution.choice[u.node]]) for u in self.problem.alive(when))
        return self.problem.fixed_bytes + used

    def closed(self) -> bool:
        return self.best is not None and self.best.cost - self.bound <= self.gap * abs(self.best.cost)

    def exact(self) -> Solution:
        """The integer program with the limit at the times found so far, and at those that its solutions break."""
        times, folded = sorted(self.prices), True
        while self.left() > 0 and not self.closed():
            try:
                found, proven = self.at(times, fold_it=folded)
            except (InfeasibleError, SolverError):
                if self.best is None:
                    raise
                break  # nothing within the limit is better than what is known
            peak, when = self.problem.memory(found.choice)
            if peak <= self.problem.limit * (1 + 1e-9):
                self.best = min((s for s in (self.best, found) if s), key=lambda s: s.cost)
                if proven:
                    self.bound = max(self.bound, min(found.bound, self.best.cost))
                if proven or self.closed():
                    break
                folded = False  # equal parts may want more than two different choices
                continue
            if when in times:
                break
            times.append(when)
        if self.best is None:
            raise SolverError(
                f"no plan within the memory limit was found in {self.time_limit_s:.0f} s; allow more time"
            )
        return self.result()

    def at(self, times: list[int], *, fold_it: bool) -> tuple[Solution, bool]:
        """The optimum when the limit holds at `times`, and whether it is that: folded it need not be."""
        usages = tuple(Usage(u.node, t, t + 1, u.bytes) for t in times for u in self.problem.alive(t))
        limited = replace(self.problem, usages=usages)
        reduced = eliminate(limited, frozenset(u.node for u in usages))
        folded = fold(reduced.problem) if fold_it else Folded(reduced.problem, tuple(range(len(reduced.kept))))
        known = self.best.cost - reduced.offset if self.best else np.inf
        part = _solve_core(
            folded.problem, self.solver, max(1.0, self.left()), prices=self.prices, known=known, gap=self.gap / 2
        )
        choice = reduced.expand(folded.expand(part.choice))
        cost = self.problem.cost(choice)
        found = replace(part, choice=choice, cost=cost, bound=min(cost, part.bound + reduced.offset))
        return found, len(folded.problem.unary) == len(reduced.kept)

    def result(self) -> Solution:
        """The best solution, "optimal" if it is proven to be within the gap that was asked for."""
        assert self.best is not None
        status = "optimal" if self.closed() else "feasible"
        return replace(self.best, status=status, bound=min(self.bound, self.best.cost))
