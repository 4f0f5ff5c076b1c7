"""The integer program of an `AssignmentProblem`, written with PuLP, solved by HiGHS or CBC.

Variables
    x[i, c] ∈ {0, 1}   node i takes choice c
    f[e, r, k] ≥ 0     flow on edge e from row class r to column class k. Choices of a node whose costs on an
                       edge are all equal form one class, which keeps the program small.

Objective
    Σ unary[i][c] · x[i, c]  +  Σ pair[e][r, k] · f[e, r, k]

Constraints
    (1) one choice:  Σ_c x[i, c] = 1                                       for every node i
    (2) rows:        Σ_k f[e, r, k] = Σ_{c in class r} x[i, c]             for every edge e = (i, j) and class r
    (3) columns:     Σ_r f[e, r, k] = Σ_{c in class k} x[j, c]             for every edge e = (i, j) and class k
    (4) memory:      Σ_u Σ_c usage_u[c] · x[node(u), c] ≤ limit            for the times in `times`

The flow form (2, 3) is the tight relaxation of pairwise costs: the program is mostly solved at the root.
Forbidden choices and combinations (cost inf) get no variable. Constraints (4) are added where a solution
breaks them, until none does; the result is the optimum of the whole problem.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pulp

from alpa_like.errors import InfeasibleError, SolverError
from alpa_like.passes.assignment import AssignmentProblem, Costs, Solution

__all__ = ["OPTIMAL_GAP", "available_solvers", "solve"]

OPTIMAL_GAP = 1e-9
"""Relative gap at which the solver may stop where none is asked for."""


def available_solvers() -> tuple[str, ...]:
    """Names that `solve` accepts here, best first."""
    found = ["HiGHS"] if pulp.HiGHS(msg=False).available() else []
    return (*found, "CBC") if _cbc(msg=False).available() else tuple(found)


def _cbc(**options: Any) -> Any:
    """The CBC that PuLP carries. PuLP 3.3 announces that 4.0 will not; pyproject.toml asks for PuLP below 4."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return pulp.PULP_CBC_CMD(**options)


def solve(
    problem: AssignmentProblem, *, solver: str = "auto", time_limit_s: float = 600.0, gap: float = OPTIMAL_GAP
) -> Solution:
    """The optimum of `problem` within its memory limit, or what is proven to be within `gap` (relative) of it.

    Where the time runs out, the best solution found so far, its status "feasible" and its gap.
    Raises `InfeasibleError` where nothing fits the limit, `SolverError` where no solution was found in time.
    """
    problem.verify()
    start = time.perf_counter()
    times: list[int] = []
    while True:
        left = time_limit_s - (time.perf_counter() - start)
        model = _Model.build(problem, times)
        solution = model.run(solver, max(left, 1.0), start, gap)
        peak, when = problem.memory(solution.choice)
        if peak <= problem.limit * (1 + 1e-9):
            return solution
        if when in times:
            raise SolverError(f"the solver broke the memory limit of {problem.limit:.0f} bytes at time {when}")
        if left <= 0:
            raise SolverError(f"no plan within the memory limit was found in {time_limit_s} s; allow more time")
        times.append(when)


@dataclass(slots=True)
class _Model:
    problem: AssignmentProblem
    model: Any
    x: list[list[Any]]
    flows: int
    scale: float

    @classmethod
    def build(cls, problem: AssignmentProblem, times: list[int]) -> _Model:
        model = pulp.LpProblem("sharding", pulp.LpMinimize)
        x = [_choice_variables(model, i, costs) for i, costs in enumerate(problem.unary)]
        scale = _scale(problem)
        objective = [
            (x[i][c], float(cost) * scale)
            for i, costs in enumerate(problem.unary)
            for c, cost in enumerate(costs)
            if x[i][c] is not None
        ]
        self = cls(problem, model, x, 0, scale)
        self._one_choice()
        for edge, costs in problem.pairs.items():
            objective.extend(self._flow(edge, costs))
        model.setObjective(pulp.LpAffineExpression(objective))
        for when in times:
            self._memory(when)
        return self

    def _one_choice(self) -> None:
        """(1)"""
        for i, variables in enumerate(self.x):
            terms = [(v, 1.0) for v in variables if v is not None]
            self.model.addConstraint(pulp.LpAffineExpression(terms) == 1, f"one_{i}")

    def _flow(self, edge: tuple[int, int], costs: Costs) -> list[tuple[Any, float]]:
        """(2) and (3); returns the edge's terms of the objective."""
        i, j = edge
        if not costs.any():
            return []
        rows, row_class = _classes(costs, self.x[i])
        columns, column_class = _classes(costs.T, self.x[j])
        table = costs[np.ix_(rows, columns)]
        name = f"f_{i}_{j}"
        flow = [
            [
                self.model.add_variable(f"{name}_{r}_{k}", 0) if ok else None
                for k, ok in enumerate(np.isfinite(table[r]))
            ]
            for r in range(len(rows))
        ]
        self.flows += int(np.isfinite(table).sum())
        for r, row in enumerate(flow):
            self._balance(f"{name}_r{r}", row, i, row_class, r)
        for k in range(len(columns)):
            self._balance(f"{name}_c{k}", [row[k] for row in flow], j, column_class, k)
        return [
            (variable, float(table[r, k]) * self.scale)
            for r, row in enumerate(flow)
            for k, variable in enumerate(row)
            if variable is not None and table[r, k]
        ]

    def _balance(self, name: str, flow: list[Any], node: int, classes: npt.NDArray[np.intp], which: int) -> None:
        terms = [(v, 1.0) for v in flow if v is not None]
        members = [(self.x[node][c], -1.0) for c in np.flatnonzero(classes == which)]
        members = [(v, w) for v, w in members if v is not None]
        self.model.addConstraint(pulp.LpAffineExpression([*terms, *members]) == 0, name)

    def _memory(self, when: int) -> None:
        """(4), in units of 2^20 bytes to keep the numbers small."""
        unit = 2.0**20
        terms: dict[Any, float] = {}
        for u in self.problem.alive(when):
            for c, used in enumerate(u.bytes):
                if used and self.x[u.node][c] is not None:
                    terms[self.x[u.node][c]] = terms.get(self.x[u.node][c], 0.0) + float(used) / unit
        room = (self.problem.limit - self.problem.fixed_bytes) / unit
        self.model.addConstraint(pulp.LpAffineExpression(list(terms.items())) <= room, f"memory_{when}")

    def run(self, solver: str, time_limit_s: float, start: float, gap: float) -> Solution:
        engine, name = _engine(solver, time_limit_s, gap)
        status = self.model.solve(engine)
        variables = sum(v is not None for row in self.x for v in row) + self.flows
        if status == pulp.LpStatusInfeasible:
            raise InfeasibleError(f"no choice fits the memory limit of {self.problem.limit:.0f} bytes")
        if any(v is not None and v.value() is None for row in self.x for v in row):
            raise SolverError(f"{name} found no plan in {time_limit_s:.0f} s; allow more time or a smaller mesh")
        choice = tuple(max((v.value(), -c) for c, v in enumerate(row) if v is not None)[1] * -1 for row in self.x)
        cost = self.problem.cost(choice)
        bound = _bound(self.model, cost, self.scale)
        done = "optimal" if cost - bound <= 1e-6 * max(abs(cost), 1e-30) else "feasible"
        return Solution(done, choice, cost, bound, time.perf_counter() - start, variables, name)


def _scale(problem: AssignmentProblem) -> float:
    """Brings the largest cost to 1e5: solvers treat coefficients near 1e-7 as nothing, and seconds are that small."""
    finite = [c[np.isfinite(c)] for c in (*problem.unary, *problem.pairs.values())]
    largest = max((float(np.abs(c).max()) for c in finite if c.size), default=0.0)
    return 1e5 / largest if largest else 1.0


def _choice_variables(model: Any, node: int, costs: Costs) -> list[Any]:
    return [
        model.add_variable(f"x_{node}_{c}", 0, 1, "Binary") if np.isfinite(cost) else None
        for c, cost in enumerate(costs)
    ]


def _classes(costs: Costs, variables: list[Any]) -> tuple[list[int], npt.NDArray[np.intp]]:
    """Group the rows that are equal: one representative each, and the class of every row (-1: forbidden)."""
    seen: dict[bytes, int] = {}
    representatives: list[int] = []
    classes = np.full(len(costs), -1, np.intp)
    for c, row in enumerate(np.ascontiguousarray(costs)):
        if variables[c] is None:
            continue
        key = row.tobytes()
        if key not in seen:
            seen[key] = len(representatives)
            representatives.append(c)
        classes[c] = seen[key]
    return representatives, classes


def _engine(solver: str, time_limit_s: float, gap: float) -> tuple[Any, str]:
    names = available_solvers()
    name = names[0] if solver == "auto" and names else solver
    if name not in names:
        raise SolverError(f"solver {solver!r} is not available; expected one of {('auto', *names)}")
    options: dict[str, Any] = {"msg": False, "timeLimit": time_limit_s, "gapRel": gap}
    return (pulp.HiGHS(**options) if name == "HiGHS" else _cbc(**options)), name


def _bound(model: Any, cost: float, scale: float) -> float:
    """The proven lower bound, where the solver tells one; else the cost if it says optimal, 0 if not."""
    engine = getattr(model, "solverModel", None)
    if engine is not None and hasattr(engine, "getInfo"):
        return min(cost, float(engine.getInfo().mip_dual_bound) / scale)
    return cost if model.sol_status == pulp.LpSolutionOptimal else 0.0
