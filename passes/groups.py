"""Which tensors must lie alike, and where a tensor may be moved: the part of the problem that no mesh changes.

Ops that only carry a layout along (element-wise ops, transposes, reshapes that drop dims of one element) join
their tensors into a *group* with one layout. All other ops become nodes of their own.

One tensor can exist in several *versions*, each in its own group, with a reshard between them that is paid once:

    home     as it is made, or as an argument is stored
    light    an argument as element-wise ops read it, if it is part of the state or other ops read it too:
             parameters may be stored split and used whole, or stored whole and updated in parts (ZeRO)
    shared   as several heavy ops read it: one gather serves forward and backward
             (in a graph of parts that are compiled apart, each part has its own: "shared 1", "light 1")
    out      as a result leaves; a state's result is stored as the state is

A sum of partial sums is a partial sum. Where an `add` adds what contractions made (the two gradients of a tied
embedding, or what several matmuls send back to one activation), it becomes a node, and its operands may stay
partial, so that one collective serves all of them.

Dims of one element can't be split and are left out everywhere here.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from alpa_like.graph import Op, OpGraph

__all__ = ["ACCUMULATE", "Copy", "Groups", "Member", "Port", "Segments", "first_reader", "form_groups", "wide_dims"]

_SUMMED = ("stablehlo.dot_general", "stablehlo.scatter")
"""Ops whose partial sums can be held back; `passes.sums` knows how."""

ACCUMULATE = "accumulate"
"""The op that adds what one micro-batch makes to what the others have made; its result is the total."""

_LINEAR = ("stablehlo.transpose", "stablehlo.reshape", "stablehlo.convert")

_LIGHT = ("stablehlo.broadcast_in_dim", "stablehlo.reduce", "stablehlo.reshape")


@dataclass(frozen=True, slots=True)
class Member:
    """A version of a tensor. `dims[k]` is the dim of the group that the k-th wide dim of the tensor is."""

    tensor: int
    version: str
    group: int
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Port:
    """Operand (or result) `port` of a node op, and the version of the tensor that it reads (or makes)."""

    op: int
    port: int
    result: bool
    member: Member


@dataclass(frozen=True, slots=True)
class Copy:
    """A reshard of one tensor from one version to another, `count` times a step."""

    source: Member
    target: Member
    count: float


def wide_dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dims that have more than one element."""
    return tuple(d for d, size in enumerate(shape) if size > 1)


def widens(source: str, target: str) -> bool:
    """Whether a conversion between floating-point types loses nothing, so that a sum may be taken after it."""
    floats = ("bf16", "f16", "f32", "f64")
    order = (("f16", "f32"), ("bf16", "f32"), ("f32", "f64"), ("f16", "f64"), ("bf16", "f64"))
    return source in floats and (source == target or (source, target) in order)


@dataclass(frozen=True)
class Groups:
    """Invariant: every port and copy refers to members in `members`; group numbers are 0 … len(shapes) − 1.

    `shapes[g]` are the sizes of group g's dims; `nodes` the ops that are nodes, in program order; `sums` the
    `add`s among them whose operands may be partial sums.
    """

    graph: OpGraph
    shapes: tuple[tuple[int, ...], ...]
    members: dict[tuple[int, str], Member]
    nodes: tuple[int, ...]
    ports: tuple[Port, ...]
    copies: tuple[Copy, ...]
    sums: frozenset[int] = frozenset()

    @cached_property
    def partial_groups(self) -> frozenset[int]:
        """The groups that may hold partial sums: all that is read by, or made for, an `add` in `sums`."""
        read = {p.member.group for p in self.ports if p.op in self.sums and not p.result}
        return frozenset(read)

    @cached_property
    def summed(self) -> frozenset[int]:
        """The ops that make what is held back."""
        return frozenset(
            p.op for p in self.ports if p.result and p.member.group in self.partial_groups and p.op not in self.sums
        )

    @cached_property
    def by_group(self) -> tuple[tuple[Member, ...], ...]:
        found: list[list[Member]] = [[] for _ in self.shapes]
        for member in self.members.values():
            found[member.group].append(member)
        return tuple(tuple(g) for g in found)

    @cached_property
    def node_set(self) -> frozenset[int]:
        return frozenset(self.nodes)

    def home(self, tensor: int) -> Member:
        return self.members[(tensor, "home")]


@dataclass(frozen=True)
class Segments:
    """Parts of a graph that are compiled apart, so that none reads what another has moved.

    `starts` are the first ops of the parts, rising, the first 0; part p runs `counts[p]` times a step.
    """

    starts: tuple[int, ...] = (0,)
    counts: tuple[float, ...] = (1.0,)

    def of(self, op: int) -> int:
        """The part that an op belongs to."""
        return bisect.bisect_right(self.starts, op) - 1

    def name(self, version: str, segment: int) -> str:
        """What a version is called in a part: "shared", "shared 1", …"""
        return f"{version} {segment}" if segment else version


def first_reader(graph: OpGraph, copy: Copy, segments: Segments) -> int:
    """The first op that reads a copy; one behind the last op for results."""
    segment = copy.target.version.partition(" ")[2]
    if copy.target.version == "out":
        return len(graph.ops)
    readers = [op for op, _ in graph.uses[copy.target.tensor]]
    return next((op for op in readers if segments.of(op) == int(segment or 0)), readers[0])


def form_groups(graph: OpGraph, stored: Iterable[tuple[int, int]], segments: Segments | None = None) -> Groups:
    """Group the tensors of a graph. `stored` pairs argument numbers with the results that take their place."""
    pairs = {result: argument for argument, result in stored}
    builder = _Builder(graph, frozenset(graph.arguments[a] for a in pairs.values()), segments or Segments())
    for op in graph.ops:
        builder.join_op(op)
    for left, right in graph.aliases:
        builder.join((left, "home"), (right, "home"), None)
    builder.join_results(pairs)
    return builder.finish()


_Key = tuple[int, str]


@dataclass
class _Builder:
    graph: OpGraph
    stored: frozenset[int]
    segments: Segments
    parent: dict[_Key, tuple[_Key, tuple[int, ...]]] = field(default_factory=dict)
    nodes: list[int] = field(default_factory=list)
    copies: list[tuple[_Key, _Key, float]] = field(default_factory=list)
    is_node: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.wide = [wide_dims(t.shape) for t in self.graph.tensors]
        self.is_node = {op.id for op in self.graph.ops if not op.elementwise and self._has_wide(op)}
        self.sums = frozenset(op.id for op in self.graph.ops if self._is_sum(op))
        self.arguments = set(self.graph.arguments)
        self.is_node |= self.sums | {op.id for op in self.graph.ops if self._turns_argument(op)}
        self.is_node |= {op.id for op in self.graph.ops if op.name == ACCUMULATE and self._has_wide(op)}
        for tensor in self.graph.tensors:
            if self.wide[tensor.id]:
                self._split(tensor.id)

    def _has_wide(self, op: Op) -> bool:
        return any(self.wide[t] for t in (*op.operands, *op.results))

    def _turns_argument(self, op: Op) -> bool:
        """Whether an op transposes a parameter: it then reads it as heavy ops do, and not as the update does."""
        return op.name == "stablehlo.transpose" and op.operands[0] in self.arguments and self._has_wide(op)

    def _is_sum(self, op: Op) -> bool:
        """Whether an op adds two tensors that contractions made and nothing else reads, or adds up such a tensor."""
        if not self._has_wide(op) or op.name not in ("stablehlo.add", ACCUMULATE):
            return False
        made_by = (*_SUMMED, "stablehlo.reduce") if op.name == ACCUMULATE else _SUMMED
        return all(self._held_back(t, made_by) for t in op.operands)

    def _held_back(self, tensor: int, made_by: tuple[str, ...]) -> bool:
        maker = self.graph.tensors[tensor].op
        if maker < 0 or len(self.graph.uses[tensor]) != 1 or tensor in self.graph.results:
            return False
        op = self.graph.ops[maker]
        if op.name in _LINEAR and op.elementwise:
            before = self.graph.tensors[op.operands[0]].dtype
            return widens(before, self.graph.tensors[tensor].dtype) and self._held_back(op.operands[0], made_by)
        return (op.name in made_by and bool(op.rule.reduction)) or (op.name != ACCUMULATE and self._is_sum(op))

    def _split(self, tensor: int) -> None:
        """Decide which versions of a tensor there are."""
        self._new((tensor, "home"))
        everyone: dict[int, list[Op]] = {}
        for op, _ in self.graph.uses[tensor]:
            everyone.setdefault(self.segments.of(op), []).append(self.graph.ops[op])
        for segment, readers in everyone.items():
            light = [op for op in readers if op.id not in self.is_node]
            apart = tensor in self.stored or len(light) < len(readers) or len(everyone) > 1
            if tensor in self.arguments and light and apart:
                self._copy(tensor, "light", segment)
            heavy = {op.id for op in readers if op.id in self.is_node and op.name not in _LIGHT}
            if len(heavy) > 1:
                self._copy(tensor, "shared", segment)

    def _new(self, key: _Key) -> None:
        self.parent[key] = (key, tuple(range(len(self.wide[key[0]]))))

    def _copy(self, tensor: int, version: str, segment: int) -> None:
        key = (tensor, self.segments.name(version, segment))
        self._new(key)
        maker = self.graph.tensors[tensor].op
        here = maker >= 0 and self.segments.of(maker) == segment
        count = self.graph.ops[maker].count if here else self.segments.counts[segment]
        self.copies.append(((tensor, "home"), key, count))

    def version(self, op: Op, tensor: int) -> _Key:
        """Which version of an operand an op reads."""
        name = "home"
        if op.id not in self.is_node:
            name = "light"
        elif op.name not in _LIGHT:
            name = "shared"
        key = (tensor, self.segments.name(name, self.segments.of(op.id)))
        return key if key in self.parent else (tensor, "home")

    def root(self, key: _Key) -> tuple[_Key, tuple[int, ...]]:
        """The group's first member, and for each wide dim of `key` the dim of that member."""
        above, dims = self.parent[key]
        if above == key:
            return above, dims
        top, upper = self.root(above)
        self.parent[key] = (top, tuple(upper[d] for d in dims))
        return self.parent[key]

    def join_op(self, op: Op) -> None:
        if op.id in self.is_node:
            self.nodes.append(op.id)
            return
        factor_dims: list[tuple[_Key, tuple[int, ...]]] = []
        tensors = [*zip(op.operands, op.rule.operands, strict=True), *zip(op.results, op.rule.results, strict=True)]
        for i, (tensor, dims) in enumerate(tensors):
            if self.wide[tensor]:
                key = self.version(op, tensor) if i < len(op.operands) else (tensor, "home")
                factors = tuple(next(f for f in dims[d] if op.rule.sizes[f] > 1) for d in self.wide[tensor])
                factor_dims.append((key, factors))
        if not self._joins(factor_dims):
            self.is_node.add(op.id)
            self.nodes.append(op.id)
            return
        for key, factors in factor_dims[1:]:
            first, order = factor_dims[0]
            self.join(key, first, tuple(order.index(f) for f in factors))

    def _joins(self, tensors: list[tuple[_Key, tuple[int, ...]]]) -> bool:
        """False where one group would meet itself with other dims, as in x + x.T; nothing is changed."""
        place: dict[_Key, dict[int, int]] = {}
        for key, factors in tensors:
            top, dims = self.root(key)
            mine = dict(zip(factors, dims, strict=True))
            if place.setdefault(top, mine) != mine:
                return False
        return True

    def join(self, key: _Key, other: _Key, dims: tuple[int, ...] | None) -> None:
        """Put two versions into one group; `dims[k]` is the dim of `other` that the k-th dim of `key` is."""
        if key not in self.parent or other not in self.parent:
            return
        top, mine = self.root(key)
        goal, theirs = self.root(other)
        if top == goal:
            return
        dims = dims if dims is not None else tuple(range(len(mine)))
        order = [0] * len(mine)
        for k, d in enumerate(mine):
            order[d] = theirs[dims[k]]
        self.parent[top] = (goal, tuple(order))

    def join_results(self, stored: dict[int, int]) -> None:
        for number, tensor in enumerate(self.graph.results):
            if (tensor, "home") not in self.parent or (tensor, "out") in self.parent:
                continue
            self._new((tensor, "out"))
            maker = self.graph.tensors[tensor].op
            self.copies.append(((tensor, "home"), (tensor, "out"), self.graph.ops[maker].count if maker >= 0 else 1.0))
            if number in stored:
                self.join((tensor, "out"), (self.graph.arguments[stored[number]], "home"), None)

    def finish(self) -> Groups:
        numbers: dict[_Key, int] = {}
        shapes: list[tuple[int, ...]] = []
        members: dict[_Key, Member] = {}
        for key in self.parent:
            top, dims = self.root(key)
            if top not in numbers:
                numbers[top] = len(shapes)
                shape = self.graph.tensors[top[0]].shape
                shapes.append(tuple(shape[d] for d in self.wide[top[0]]))
            members[key] = Member(key[0], key[1], numbers[top], dims)
        copies = [Copy(members[a], members[b], n) for a, b, n in self.copies]
        moved = tuple(c for c in copies if (c.source.group, c.source.dims) != (c.target.group, c.target.dims))
        return Groups(self.graph, tuple(shapes), members, tuple(self.nodes), self._ports(members), moved, self.sums)

    def _ports(self, members: dict[_Key, Member]) -> tuple[Port, ...]:
        ports: list[Port] = []
        for op in (self.graph.ops[i] for i in self.nodes):
            for port, tensor in enumerate(op.operands):
                if self.wide[tensor]:
                    ports.append(Port(op.id, port, False, members[self.version(op, tensor)]))
            for port, tensor in enumerate(op.results):
                if self.wide[tensor]:
                    ports.append(Port(op.id, port, True, members[(tensor, "home")]))
        return tuple(ports)
