"""Solves an `AssignmentProblem` exactly: eliminate, fold, integer program; memory where it turns out to bind.

Most steps fit in memory without being asked to. So the problem is solved without the limit first, and the
limit is imposed at the times at which a solution breaks it, until none does.
"""

from __future__ import annotations

import time
from dataclasses import replace

from alpa_like.errors import SolverError
from alpa_like.passes import ilp
from alpa_like.passes.assignment import AssignmentProblem, Solution, Usage
from alpa_like.passes.eliminate import eliminate
from alpa_like.passes.fold import fold

__all__ = ["solve"]


def solve(problem: AssignmentProblem, *, solver: str = "auto", time_limit_s: float = 600.0) -> Solution:
    """The optimum of `problem` within its memory limit; raises what `passes.ilp.solve` raises."""
    start = time.perf_counter()
    problem.verify()
    times: list[int] = []
    while True:
        left = time_limit_s - (time.perf_counter() - start)
        solution = _solve_at(problem, times, solver, left)
        peak, when = problem.memory(solution.choice)
        if peak <= problem.limit * (1 + 1e-9):
            return replace(solution, seconds=time.perf_counter() - start)
        if left <= 0 or when in times:
            raise SolverError(f"no plan within the memory limit was found in {time_limit_s:.0f} s; allow more time")
        times.append(when)


def _solve_at(problem: AssignmentProblem, times: list[int], solver: str, time_limit_s: float) -> Solution:
    """The optimum when memory counts at `times` only."""
    usages = tuple(Usage(u.node, t, t + 1, u.bytes) for t in times for u in problem.alive(t))
    limited = replace(problem, usages=usages)
    reduced = eliminate(limited, frozenset(u.node for u in usages))
    if not reduced.kept:
        choice = reduced.expand(())
        cost = problem.cost(choice)
        return Solution("optimal", choice, cost, cost, 0.0, 0, "elimination")
    folded = fold(reduced.problem)
    part = ilp.solve(folded.problem, solver=solver, time_limit_s=max(1.0, time_limit_s))
    choice = reduced.expand(folded.expand(part.choice))
    cost = problem.cost(choice)
    return replace(part, choice=choice, cost=cost, bound=min(cost, part.bound + reduced.offset))
