"""The problem that sharding is reduced to: one choice per node, costs on nodes and on pairs of nodes.

    minimize    Σ_i unary[i][x_i] + Σ_(i,j) pair[i,j][x_i, x_j]
    subject to  Σ_u usage_u[x_node(u)] over the usages u alive at time t  ≤  limit,   for every time t

`passes.ilp` solves it as an integer program, `passes.eliminate` makes it smaller first, both exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from alpa_like.errors import SolverError

__all__ = ["AssignmentProblem", "Costs", "Solution", "Usage", "brute_force"]

Costs = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes that `node` takes while `start <= t < end`, per choice."""

    node: int
    start: int
    end: int
    bytes: Costs


@dataclass(frozen=True)
class AssignmentProblem:
    """Nodes are numbered 0 … n−1; `unary[i]` has one cost per choice of node i.

    `pairs[(i, j)]`, i < j, has shape (choices of i, choices of j). A cost of `inf` forbids.
    Equal arrays should be the same object: the solvers recognise repeated parts by it.
    """

    unary: tuple[Costs, ...]
    pairs: dict[tuple[int, int], Costs]
    usages: tuple[Usage, ...] = ()
    limit: float = np.inf
    fixed_bytes: float = 0.0
    names: tuple[str, ...] = field(default=(), repr=False)

    def verify(self) -> None:
        """Raise `SolverError` where shapes do not fit each other, or a node has no choice."""
        for i, costs in enumerate(self.unary):
            if not np.isfinite(costs).any():
                raise SolverError(f"node {self.name(i)} has no allowed choice")
        for (i, j), costs in self.pairs.items():
            if not i < j or costs.shape != (len(self.unary[i]), len(self.unary[j])):
                raise SolverError(f"pair ({i}, {j}) has costs of shape {costs.shape}, which do not fit its nodes")

    def name(self, node: int) -> str:
        return self.names[node] if self.names else str(node)

    def cost(self, choice: Sequence[int]) -> float:
        """The objective of a complete choice."""
        total = sum(float(c[x]) for c, x in zip(self.unary, choice, strict=True))
        return total + sum(float(c[choice[i], choice[j]]) for (i, j), c in self.pairs.items())

    def memory(self, choice: Sequence[int]) -> tuple[float, int]:
        """The peak of the bytes in use, and the time at which it is reached first."""
        changes: dict[int, float] = {}
        for u in self.usages:
            used = float(u.bytes[choice[u.node]])
            changes[u.start] = changes.get(u.start, 0.0) + used
            changes[u.end] = changes.get(u.end, 0.0) - used
        times = sorted(changes)
        levels = np.cumsum([changes[t] for t in times]) if times else np.zeros(1)
        peak = int(np.argmax(levels))
        return self.fixed_bytes + max(0.0, float(levels[peak])), times[peak] if times else 0

    def alive(self, time: int) -> tuple[Usage, ...]:
        return tuple(u for u in self.usages if u.start <= time < u.end)


@dataclass(frozen=True, slots=True)
class Solution:
    """`choice[i]` for every node. `bound` is a proven lower bound on the objective.

    `status` is "optimal", "feasible" (time ran out; the gap is stated) or "eliminated" (optimal without an ILP).
    """

    status: str
    choice: tuple[int, ...]
    cost: float
    bound: float
    seconds: float
    variables: int
    solver: str = ""

    @property
    def gap(self) -> float:
        """(cost − bound) / cost: the share by which a better solution could at most be better."""
        return max(0.0, (self.cost - self.bound) / self.cost) if self.cost > 0 else 0.0


def add_pair(pairs: dict[tuple[int, int], Costs], i: int, j: int, costs: Costs) -> None:
    """Add the costs of one more edge between nodes i and j; `costs` has i's choices as rows."""
    key, oriented = ((i, j), costs) if i < j else ((j, i), costs.T)
    pairs[key] = pairs[key] + oriented if key in pairs else oriented


def brute_force(problem: AssignmentProblem) -> tuple[float, tuple[int, ...]]:
    """The optimum by trying every combination; (inf, ()) where nothing fits. For small problems and tests."""

    def candidates() -> Iterable[tuple[int, ...]]:
        return itertools.product(*(range(len(c)) for c in problem.unary))

    best: tuple[float, tuple[int, ...]] = (np.inf, ())
    for choice in candidates():
        cost = problem.cost(choice)
        if cost < best[0] and problem.memory(choice)[0] <= problem.limit:
            best = (cost, choice)
    return best
