"""Folding: parts of a problem that are alike, and meet only in nodes that they share, are decided once.

Nodes are coloured by their costs, memory and surroundings (Weisfeiler and Lehman). Nodes of a colour of their
own are *hubs*: the residual stream, the embedding. Without the hubs the problem falls into parts. For every
choice of the hubs the parts are independent, and two parts with equal costs and equal edges to the same hubs
have equal optima, so one stands for all n with its costs times n. This is exact: the folded optimum is the
unfolded one. Equal nodes that touch each other are in one part and stay free to differ.

Under a memory limit equal parts may want to differ (some rematerialize, some not), which one representative
can't say; n parts are then stood for by representatives of 1, 2, 4, … of them, so that any number of them can
take one of two choices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import networkx as nx
import numpy as np

from alpa_like.passes.assignment import AssignmentProblem, Costs, Usage

__all__ = ["Folded", "fold"]

_ROUNDS = 12
_Part = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Folded:
    """The smaller problem. `stands_for[i]` is the node of `problem` whose choice node i of the original takes."""

    problem: AssignmentProblem
    stands_for: tuple[int, ...]

    def expand(self, choice: Sequence[int]) -> tuple[int, ...]:
        """The choice of every original node."""
        return tuple(choice[node] for node in self.stands_for)


def fold(problem: AssignmentProblem) -> Folded:
    """Fold `problem`; where no two parts are alike, the result is the problem itself."""
    graph = _Graph.of(problem)
    colours = graph.colours()
    members: dict[int, int] = {}
    for colour in colours:
        members[colour] = members.get(colour, 0) + 1
    repeated = [i for i, c in enumerate(colours) if members[c] > 1]
    classes: dict[object, list[_Part]] = {}
    for part in graph.parts(repeated):
        classes.setdefault(graph.signature(part, colours), []).append(part)
    return _merge(problem, [parts for parts in classes.values() if len(parts) > 1])


@dataclass(frozen=True)
class _Graph:
    """A problem with its arrays replaced by numbers: equal content, equal number."""

    nodes: list[int]
    edges: dict[int, list[tuple[int, int]]]

    @classmethod
    def of(cls, problem: AssignmentProblem) -> _Graph:
        names = _Names()
        used: dict[int, list[tuple[int, int, int]]] = {}
        for u in problem.usages:
            used.setdefault(u.node, []).append((u.start, u.end, names.array(u.bytes)))
        nodes = [names.of((names.array(c), tuple(used.get(i, ())))) for i, c in enumerate(problem.unary)]
        edges: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(nodes))}
        for (i, j), costs in problem.pairs.items():
            number = names.array(costs)
            edges[i].append((j, 2 * number))
            edges[j].append((i, 2 * number + 1))
        return cls(nodes, edges)

    def colours(self) -> list[int]:
        """Colours that are equal for nodes whose surroundings look alike for some steps."""
        current = self.nodes
        for _ in range(_ROUNDS):
            names = _Names()
            new = [
                names.of((current[i], tuple(sorted((kind, current[j]) for j, kind in self.edges[i]))))
                for i in range(len(current))
            ]
            if len(set(new)) == len(set(current)):
                return new
            current = new
        return current

    def parts(self, nodes: list[int]) -> list[_Part]:
        """The connected parts among `nodes`, each in ascending order."""
        inside = set(nodes)
        graph: nx.Graph[int] = nx.Graph()
        graph.add_nodes_from(nodes)
        graph.add_edges_from((i, j) for i in nodes for j, _ in self.edges[i] if j in inside)
        return sorted(tuple(sorted(part)) for part in nx.connected_components(graph))

    def signature(self, part: _Part, colours: list[int]) -> object:
        """Equal for parts that map onto each other node by node in their order, with the same hubs."""
        position = {node: k for k, node in enumerate(part)}
        edges = sorted(
            (k, kind, position[j], -1) if j in position else (k, kind, -1, j)
            for k, i in enumerate(part)
            for j, kind in self.edges[i]
        )
        return tuple(self.nodes[i] for i in part), tuple(edges), tuple(colours[i] for i in part)


class _Names:
    """Numbers for values, by content."""

    def __init__(self) -> None:
        self.known: dict[object, int] = {}
        self.by_identity: dict[int, int] = {}

    def of(self, value: object) -> int:
        return self.known.setdefault(value, len(self.known))

    def array(self, costs: Costs) -> int:
        if id(costs) not in self.by_identity:
            content = np.ascontiguousarray(costs)
            key = (content.shape, hashlib.blake2b(content.tobytes(), digest_size=16).digest())
            self.by_identity[id(costs)] = self.of(key)
        return self.by_identity[id(costs)]


def _merge(problem: AssignmentProblem, classes: list[list[_Part]]) -> Folded:
    """Keep some parts of each class, with their costs multiplied; drop the others."""
    stands = list(range(len(problem.unary)))
    weight = [1] * len(problem.unary)
    for parts in classes:
        for kept, others in _representatives(parts, split=bool(problem.usages)):
            for i, node in enumerate(kept):
                weight[node] = 1 + len(others)
                for other in others:
                    stands[other[i]] = node
    kept_nodes = [i for i, node in enumerate(stands) if i == node]
    index = {node: k for k, node in enumerate(kept_nodes)}
    unary = tuple(problem.unary[i] * weight[i] if weight[i] > 1 else problem.unary[i] for i in kept_nodes)
    pairs = {
        (index[i], index[j]): costs * max(weight[i], weight[j])
        for (i, j), costs in problem.pairs.items()
        if i in index and j in index
    }
    usages = tuple(Usage(index[stands[u.node]], u.start, u.end, u.bytes) for u in problem.usages)
    names = tuple(problem.name(i) for i in kept_nodes)
    return Folded(
        replace(problem, unary=unary, pairs=pairs, usages=usages, names=names),
        tuple(index[node] for node in stands),
    )


def _representatives(parts: list[_Part], *, split: bool) -> list[tuple[_Part, list[_Part]]]:
    """The parts that are kept, each with those it stands for."""
    if not split:
        return [(parts[0], parts[1:])]
    found: list[tuple[_Part, list[_Part]]] = []
    rest, size = parts, 1
    while rest:
        taken, rest = rest[: min(size, len(rest))], rest[size:]
        found.append((taken[0], taken[1:]))
        size *= 2
    return found
