"""Exact presolve: variable elimination with remembered tables.

Eliminating a node replaces it and its tables by one table over its neighbours,

    T[s] = min_v  Σ tables[s, v],

which changes nothing about the optimum; the minimizing v is kept to read the node's choice back. A result is
remembered by the identity of its inputs, so each of n identical parts after the first costs a look-up: a deep
stack costs what a short one costs, and equal neighbours stay free to differ.

Tables over three and more nodes can't be given to the ILP. Where elimination stops at one (it would exceed
`max_entries`), that elimination is undone; what stays is a smaller problem with pairs only.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from alpa_like.passes.assignment import AssignmentProblem, Costs, add_pair

__all__ = ["Reduced", "eliminate"]

_Key = tuple[object, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Costs over the choices of the nodes in `scope` (ascending). `made_by` is the node eliminated for it."""

    scope: tuple[int, ...]
    costs: Costs
    made_by: int = -1


@dataclass(slots=True)
class _Elimination:
    """How one node was eliminated: the tables it consumed and the choice to make for each choice of the scope."""

    consumed: tuple[_Table, ...]
    result: _Table
    choices: npt.NDArray[np.int16]


@dataclass
class Reduced:
    """What is left of a problem. `kept[k]` is the original node of the k-th node of `problem`."""

    problem: AssignmentProblem
    kept: tuple[int, ...]
    steps: list[tuple[int, _Elimination]]
    offset: float

    def expand(self, choice: Sequence[int]) -> tuple[int, ...]:
        """The choice of every original node, given the choice of those that were kept."""
        full = dict(zip(self.kept, choice, strict=True))
        for node, step in reversed(self.steps):
            full[node] = int(step.choices[tuple(full[s] for s in step.result.scope)])
        return tuple(full[i] for i in range(len(full)))


def eliminate(
    problem: AssignmentProblem,
    keep: frozenset[int] = frozenset(),
    max_entries: int = 600_000,
) -> Reduced:
    """Eliminate every node that is not in `keep`, while tables stay under `max_entries`; memory is not looked at.

    Output: an equivalent problem over the nodes that are left, with pairs only. A node under a memory
    constraint must be in `keep`.
    """
    work = _Work(problem, max_entries)
    queue = [(work.size(i), i) for i in range(len(problem.unary)) if i not in keep]
    heapq.heapify(queue)
    while queue:
        size, node = heapq.heappop(queue)
        current = work.size(node)
        if node in work.steps or current > max_entries:
            continue
        if current > size:
            heapq.heappush(queue, (current, node))
            continue
        for touched in work.eliminate(node):
            if touched not in keep:
                heapq.heappush(queue, (work.size(touched), touched))
    work.undo_wide()
    return work.reduced()


@dataclass
class _Work:
    problem: AssignmentProblem
    max_entries: int
    memo: dict[_Key, tuple[Costs, npt.NDArray[np.int16]]] = field(default_factory=dict)
    held: list[Costs] = field(default_factory=list)
    tables: list[dict[int, _Table]] = field(init=False)
    steps: dict[int, _Elimination] = field(default_factory=dict)
    constants: dict[int, _Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tables = [{} for _ in self.problem.unary]
        for i, costs in enumerate(self.problem.unary):
            self.add(_Table((i,), costs))
        parts: dict[tuple[object, ...], Costs] = {}
        for edge, costs in self.problem.pairs.items():
            free = tuple(len(self.problem.unary[n]) > 1 for n in edge)  # a node without a choice is no variable
            key = (id(costs), *free)
            if key not in parts:
                parts[key] = np.asarray(costs[tuple(slice(None) if f else 0 for f in free)])
            self.add(_Table(tuple(n for n, f in zip(edge, free, strict=True) if f), parts[key]))

    def add(self, table: _Table) -> None:
        for node in table.scope:
            self.tables[node][id(table)] = table
        if not table.scope:
            self.constants[id(table)] = table

    def remove(self, table: _Table) -> None:
        for node in table.scope:
            del self.tables[node][id(table)]
        self.constants.pop(id(table), None)

    def neighbours(self, node: int) -> tuple[int, ...]:
        found = {n for t in self.tables[node].values() for n in t.scope}
        return tuple(sorted(found - {node}))

    def size(self, node: int) -> int:
        """Entries of the table that eliminating `node` would make; any number above the limit if it is above."""
        seen, entries = {node}, 1
        for table in self.tables[node].values():
            for n in table.scope:
                if n not in seen:
                    seen.add(n)
                    entries *= len(self.problem.unary[n])
            if entries > self.max_entries:
                break
        return entries

    def eliminate(self, node: int) -> tuple[int, ...]:
        scope = self.neighbours(node)
        order = sorted(self.tables[node].values(), key=lambda t: (t.scope, t.made_by))
        position = {n: k for k, n in enumerate((*scope, node))}
        key = tuple((id(t.costs), tuple(position[n] for n in t.scope)) for t in order)
        if key not in self.memo:
            sizes = tuple(len(self.problem.unary[n]) for n in scope)
            costs, choices = _minimize([(t.costs, [position[n] for n in t.scope]) for t in order], sizes)
            self.memo[key] = (costs, choices)
            self.held.extend(t.costs for t in order)  # an identity in the memo must never be used again
        costs, choices = self.memo[key]
        result = _Table(scope, costs, node)
        for table in order:
            self.remove(table)
        self.add(result)
        self.steps[node] = _Elimination(tuple(order), result, choices)
        return scope

    def undo_wide(self) -> None:
        """Undo eliminations until no table has more than two nodes left in its scope."""
        wide = [t for ts in self.tables for t in ts.values() if len(t.scope) > 2]
        while wide:
            table = wide.pop()
            step = self.steps.pop(table.made_by, None)
            if step is None:
                continue
            self.remove(table)
            for consumed in step.consumed:
                self.add(consumed)
            wide.extend(t for t in step.consumed if len(t.scope) > 2)

    def reduced(self) -> Reduced:
        kept = tuple(i for i in range(len(self.problem.unary)) if i not in self.steps)
        index = {node: k for k, node in enumerate(kept)}
        unary = [np.zeros(len(self.problem.unary[i])) for i in kept]
        pairs: dict[tuple[int, int], Costs] = {}
        for table in {id(t): t for i in kept for t in self.tables[i].values()}.values():
            nodes = [index[n] for n in table.scope]
            if len(nodes) == 1:
                unary[nodes[0]] = unary[nodes[0]] + table.costs
            else:
                add_pair(pairs, nodes[0], nodes[1], table.costs)
        names = tuple(self.problem.name(i) for i in kept)
        usages = tuple(type(u)(index[u.node], u.start, u.end, u.bytes) for u in self.problem.usages if u.node in index)
        problem = AssignmentProblem(tuple(unary), pairs, usages, self.problem.limit, self.problem.fixed_bytes, names)
        offset = sum(float(t.costs) for t in self.constants.values())
        return Reduced(problem, kept, list(self.steps.items()), offset)


def _minimize(tables: list[tuple[Costs, list[int]]], sizes: tuple[int, ...]) -> tuple[Costs, npt.NDArray[np.int16]]:
    """min and argmin over the last variable of the sum of tables; `sizes` are those of the other variables."""
    aligned = sorted((_align(costs, axes, len(sizes)) for costs, axes in tables), key=lambda a: a.size)
    best = np.full(sizes, np.inf)
    chosen = np.zeros(sizes, np.int16)
    total = np.empty(sizes)
    for v in range(max(len(a) for a in aligned)):
        parts = [a[v] for a in aligned]
        small = sum(parts[:-1], np.zeros((1,) * len(sizes)))  # the smaller tables meet among themselves first
        np.add(small, parts[-1], out=total)
        better = total < best
        np.copyto(best, total, where=better)
        np.copyto(chosen, np.int16(v), where=better)
    return best, chosen


def _align(costs: Costs, axes: list[int], last: int) -> Costs:
    """A table with one dim per variable, the last one first, of length 1 where it doesn't depend on it."""
    order = sorted(range(len(axes)), key=lambda k: (axes[k] != last, axes[k]))
    shape = [1] * (last + 1)
    for k in order:
        shape[0 if axes[k] == last else axes[k] + 1] = costs.shape[k]
    return np.ascontiguousarray(costs.transpose(order)).reshape(shape)
