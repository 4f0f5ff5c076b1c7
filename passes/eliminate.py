"""Exact presolve: variable elimination with remembered tables.

Eliminating a node replaces it and its tables by one table over its neighbours,

    T[s] = min_v  Σ tables[s, v],

which changes nothing about the optimum; the minimizing v is found anew where the node's choice is read back. A result
is remembered by the identity of its inputs, so each of n identical parts after the first costs a look-up: a deep
stack costs what a short one costs, and equal neighbours stay free to differ. Problems whose arrays are the same objects
can share what is remembered.

Tables over three and more nodes can't be given to the ILP. Where elimination stops at one (it would exceed
`max_entries`), that elimination is undone; what stays is a smaller problem with pairs only.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np

from alpa_like.passes.assignment import AssignmentProblem, Costs, add_pair

__all__ = ["Memo", "Reduced", "eliminate"]

_Key = tuple[object, ...]

_BLOCK = 2**16
"""Entries that are added up and minimized at once: half a MiB stays in a core's cache."""

_REMEMBERED_BYTES = 2**28
"""Where a memo holds more than this, it starts anew."""


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Costs over the choices of the nodes in `scope` (ascending). `made_by` is the node eliminated for it."""

    scope: tuple[int, ...]
    costs: Costs
    made_by: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A table that an elimination made of others, `parts`, each with the numbers of its variables.

    The variables of `costs` are numbered as its dims; the one that was eliminated has the last number. `choices` has
    what was read back.
    """

    parts: tuple[tuple[Costs, tuple[int, ...]], ...]
    costs: Costs
    choices: dict[tuple[int, ...], int] = field(default_factory=dict[tuple[int, ...], int])

    def choice(self, at: tuple[int, ...]) -> int:
        """The first of the best choices of the eliminated variable, given those of the others."""
        if at not in self.choices:
            index = (*at, slice(None))
            total = _sum(costs[tuple(index[k] for k in variables)] for costs, variables in self.parts)
            self.choices[at] = int(np.argmin(total))
        return self.choices[at]


@dataclass
class Memo:
    """What eliminations made, by the identity of what they made it of."""

    made: dict[_Key, _Made] = field(default_factory=dict[_Key, _Made])
    bytes: int = 0
    views: dict[int, tuple[Costs, Costs]] = field(default_factory=dict[int, tuple[Costs, Costs]])

    def find(self, parts: Iterable[tuple[Costs, tuple[int, ...]]], sizes: tuple[int, ...]) -> _Made:
        """The least of the sum of `parts` over their last variable; `sizes` are the choices of the others."""
        ordered = tuple(sorted(parts, key=lambda part: part[0].size))  # the smaller tables meet among themselves first
        key = tuple((id(costs), variables) for costs, variables in ordered)
        if key not in self.made:
            if self.bytes > _REMEMBERED_BYTES:
                self.made.clear()
                self.bytes = 0
            # what was made holds its parts, so that no identity is used again
            self.made[key] = _Made(ordered, _least(ordered, sizes))
            self.bytes += self.made[key].costs.nbytes
        return self.made[key]

    def squeezed(self, costs: Costs) -> Costs:
        """Costs without the dims of a single choice; the same object for the same costs."""
        if 1 not in costs.shape:
            return costs
        if id(costs) not in self.views:
            self.views[id(costs)] = costs, costs.squeeze()
        return self.views[id(costs)][1]


@dataclass(slots=True)
class _Elimination:
    """How one node was eliminated: the tables it consumed, and the table that was made of them."""

    consumed: tuple[_Table, ...]
    result: _Table
    made: _Made


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
            full[node] = step.made.choice(tuple(full[s] for s in step.result.scope))
        return tuple(full[i] for i in range(len(full)))


def eliminate(
    problem: AssignmentProblem,
    keep: frozenset[int] = frozenset(),
    max_entries: int = 600_000,
    memo: Memo | None = None,
) -> Reduced:
    """Eliminate every node that is not in `keep`, while tables stay under `max_entries`; memory is not looked at.

    Output: an equivalent problem over the nodes that are left, with pairs only. A node under a memory
    constraint must be in `keep`. `memo` may be shared by problems, and helps where their arrays are the same objects.
    """
    work = _Work(problem, max_entries, memo or Memo())
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
    memo: Memo
    tables: list[dict[int, _Table]] = field(init=False)
    steps: dict[int, _Elimination] = field(default_factory=dict)
    constants: dict[int, _Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tables = [{} for _ in self.problem.unary]
        for i, costs in enumerate(self.problem.unary):
            self.add(_Table((i,), costs))
        for edge, costs in self.problem.pairs.items():
            scope = tuple(n for n in edge if len(self.problem.unary[n]) > 1)  # a node without a choice is no variable
            self.add(_Table(scope, self.memo.squeezed(costs)))

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
        sizes = tuple(len(self.problem.unary[n]) for n in scope)
        made = self.memo.find(((t.costs, tuple(position[n] for n in t.scope)) for t in order), sizes)
        result = _Table(scope, made.costs, node)
        for table in order:
            self.remove(table)
        self.add(result)
        self.steps[node] = _Elimination(tuple(order), result, made)
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


def _sum(tables: Iterable[Costs]) -> Costs:
    return reduce(np.add, tables)


def _least(parts: Sequence[tuple[Costs, tuple[int, ...]]], sizes: tuple[int, ...]) -> Costs:
    """min over the last variable of the sum of `parts`; `sizes` are those of the other variables."""
    aligned = [_align(costs, variables, len(sizes)) for costs, variables in parts]
    choices, step = len(aligned[0]), max(1, _BLOCK // math.prod(sizes))
    best: Costs | None = None
    for start in range(0, choices, step):
        total = _sum(a[start : start + step] for a in aligned)
        least = total[0] if len(total) == 1 else np.asarray(total.min(axis=0))
        best = least if best is None else np.minimum(best, least, out=best)
    assert best is not None
    return best


def _align(costs: Costs, variables: Sequence[int], last: int) -> Costs:
    """A table with one dim per variable, the last one first, of length 1 where it doesn't depend on it."""
    order = sorted(range(len(variables)), key=lambda k: (variables[k] != last, variables[k]))
    shape = [1] * (last + 1)
    for k in order:
        shape[0 if variables[k] == last else variables[k] + 1] = costs.shape[k]
    return np.ascontiguousarray(costs.transpose(order)).reshape(shape)
