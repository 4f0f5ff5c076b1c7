"""A `Decision` → the layouts that the plan pins in the program, and the traffic of the reshards between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from alpa_like.cost import CostModel
from alpa_like.graph import Op, dtype_bits
from alpa_like.passes.groups import ACCUMULATE, Groups, Port, Segments, first_reader, wide_dims
from alpa_like.passes.intra import Decision, Spaces, port_state, spec_of
from alpa_like.passes.layouts import PARTIAL, WHOLE, Move, State, TensorSpace
from alpa_like.passes.liveness import Liveness
from alpa_like.plan import PartialSum, Pin, Spec

__all__ = ["PinWriter", "Reshard", "by_seconds"]


def by_seconds(total: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """Kinds that take time, the longest first."""
    return tuple(sorted(((k, s) for k, s in total.items() if s), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True, slots=True)
class Reshard:
    """A tensor that changes its layout for op number `op` (one behind the last for results), `count` times a step."""

    op: int
    tensor: int
    moves: tuple[Move, ...]
    count: float

    def seconds(self, cost: CostModel) -> dict[str, float]:
        """Seconds of a step by kind of collective, as the platform emits them; "slice" is the copy of a part."""
        found: dict[str, float] = {}
        for move in self.moves:
            kind = move.kind if move.kind == "slice" else cost.emitted(move.kind)
            found[kind] = found.get(kind, 0.0) + move.seconds * self.count
        return found


@dataclass
class PinWriter:
    """Input: groups and a decision over them, and the cost model that it was made with."""

    groups: Groups
    cost: CostModel
    decision: Decision
    liveness: Liveness
    segments: Segments = field(default_factory=Segments)
    spaces: Spaces = field(default_factory=dict[Any, Any])
    routes: dict[object, tuple[Move, ...]] = field(default_factory=dict)

    def spec(self, tensor: int, version: str) -> Spec:
        """The spec of a version of a tensor; tensors of one element are whole."""
        shape = self.groups.graph.tensors[tensor].shape
        whole = (WHOLE,) * len(self.cost.mesh_shape)
        layouts = self.decision.layouts
        return spec_of(layouts.get((tensor, version), layouts.get((tensor, "home"), whole)), shape)

    def pins(self) -> tuple[Pin, ...]:
        """One pin per operand and result of a node op, and per argument that an element-wise op reads elsewhere."""
        found = (self.port_pin(p) for p in self.groups.ports)
        return (*(p for p in found if p), *self.light_pins())

    def sums(self) -> tuple[PartialSum, ...]:
        """The sums of partial sums that are reduced once: outermost `add`s and what is held back for each."""
        found: list[PartialSum] = []
        for op in (self.groups.graph.ops[i] for i in sorted(self.groups.sums)):
            axes = tuple(a for a, place in enumerate(self.decision.strategies[op.id]) if place == PARTIAL)
            layout = self.decision.layouts[(op.results[0], "home")]
            if any(layout[a] != PARTIAL for a in axes):
                state = port_state(op.rule, self.result_port(op), self.decision.strategies[op.id], self.shape(op))
                splits = tuple(sorted(self.splits(op, axes)))
                found.append(PartialSum(op.id, axes, spec_of(state, self.shape(op)), splits))
        return tuple(found)

    def shape(self, op: Op) -> tuple[int, ...]:
        return self.groups.graph.tensors[op.results[0]].shape

    def result_port(self, op: Op) -> Port:
        return Port(op.id, 0, True, self.groups.home(op.results[0]))

    def splits(self, op: Op, axes: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The contractions behind an `add`, each with the factor that each of the axes splits."""
        for tensor in op.operands:
            maker = self.groups.graph.ops[self.groups.graph.tensors[tensor].op]
            if maker.id in self.groups.summed:
                yield maker.id, tuple(self.decision.strategies[maker.id][a] for a in axes)
            else:
                yield from self.splits(maker, axes)

    def traffic(self) -> dict[str, float]:
        """Ring bytes that each device sends in a step, by kind of collective."""
        total: dict[str, float] = {}
        for reshard in self.reshards():
            for kind, nbytes in self.space(reshard.tensor).traffic(reshard.moves).items():
                total[kind] = total.get(kind, 0.0) + nbytes * reshard.count
        return total

    def collective_s(self) -> tuple[tuple[str, float], ...]:
        """Predicted seconds of a step by kind of collective, the longest first."""
        total: dict[str, float] = {}
        for reshard in self.reshards():
            for kind, seconds in reshard.seconds(self.cost).items():
                total[kind] = total.get(kind, 0.0) + seconds
        return by_seconds(total)

    def reshards(self) -> Iterator[Reshard]:
        """Every reshard of the plan."""
        for port in self.groups.ports:
            op = self.groups.graph.ops[port.op]
            once = port.result and op.name == ACCUMULATE
            yield Reshard(port.op, port.member.tensor, self.port_moves(port), 1.0 if once else op.count)
        for copy in self.groups.copies:
            tensor = copy.source.tensor
            source, target = (self.decision.layouts[(tensor, m.version)] for m in (copy.source, copy.target))
            reader = first_reader(self.groups.graph, copy, self.liveness.segments)
            yield Reshard(reader, tensor, self.moves(tensor, source, target), copy.count)

    def space(self, tensor: int) -> TensorSpace:
        t = self.groups.graph.tensors[tensor]
        key = (tuple(t.shape[d] for d in wide_dims(t.shape)), dtype_bits(t.dtype), tensor not in self.liveness.waiting)
        if key not in self.spaces:
            self.spaces[key] = TensorSpace(*key, self.cost)
        return self.spaces[key]

    def moves(self, tensor: int, source: State, target: State) -> tuple[Move, ...]:
        space = self.space(tensor)
        key = (space.shape, space.bits, space.combined, source, target)
        if key not in self.routes:
            self.routes[key] = space.path(source, target)
        return self.routes[key]

    def port_moves(self, port: Port) -> tuple[Move, ...]:
        op = self.groups.graph.ops[port.op]
        tensor = port.member.tensor
        state = port_state(op.rule, port, self.decision.strategies[op.id], self.groups.graph.tensors[tensor].shape)
        layout = self.decision.layouts[(tensor, port.member.version)]
        return self.moves(tensor, state, layout) if port.result else self.moves(tensor, layout, state)

    def port_pin(self, port: Port) -> Pin | None:
        """The pin of a port; None where the tensor holds partial sums, which `sums` sees to."""
        tensor, version = port.member.tensor, port.member.version
        moves = self.port_moves(port)
        if PARTIAL in (moves[-1].target if moves else self.decision.layouts[(tensor, version)]):
            return None
        home = self.decision.layouts[(tensor, "home")]
        if not port.result and version != "home":
            moves = (*self.moves(tensor, home, self.decision.layouts[(tensor, version)]), *moves)
        before = self.detour(port, moves) if port.result else self.anchor(tensor, moves, home)
        return Pin(port.op, port.port, port.result, (*before, *self.stops(tensor, moves, home)))

    def anchor(self, tensor: int, moves: tuple[Move, ...], home: State) -> tuple[Spec, ...]:
        """The layout of what an element-wise op made, which nothing else pins, before it is moved.

        Without it the layout that is moved to would spread backwards over the element-wise ops.
        """
        maker = self.groups.graph.tensors[tensor].op
        if not moves or maker < 0 or maker in self.groups.node_set:
            return ()
        return (spec_of(home, self.groups.graph.tensors[tensor].shape),)

    def detour(self, port: Port, moves: tuple[Move, ...]) -> tuple[Spec, ...]:
        """A layout to pin before the others.

        What an op makes in another layout than it is kept in is pinned as it is made, or the partitioner may compute
        the op as it is kept, and gather operands for that. Lookups in a split table are summed whole, then cut: the
        partitioner gathers them when it sees the cut at once, but does all-reduce and slice as one reduce-scatter
        where there is one. Pads, slices and others that have dims to be kept whole are computed so, then cut: it gets
        some of them wrong otherwise.
        """
        op = self.groups.graph.ops[port.op]
        cut = bool(op.rule.fixed) and bool(moves) and moves[0].kind == "slice"
        looked_up = op.name == "stablehlo.gather" and any(m.kind == "reduce-scatter" for m in moves)
        moved = bool(moves) and PARTIAL not in moves[0].source and moves[0].kind in ("all-gather", "all-to-all")
        if not (cut or looked_up or moved):
            return ()
        whole = tuple(WHOLE if place == PARTIAL else place for place in moves[0].source)
        return (spec_of(whole, self.groups.graph.tensors[port.member.tensor].shape),)

    def light_pins(self) -> Iterator[Pin]:
        """Arguments that element-wise ops read in another layout than they are stored in."""
        for copy in self.groups.copies:
            tensor = copy.source.tensor
            if not copy.target.version.startswith("light"):
                continue
            home, light = (self.decision.layouts[(tensor, m.version)] for m in (copy.source, copy.target))
            path = self.stops(tensor, self.moves(tensor, home, light), home)
            for op, port in self.groups.graph.uses[tensor]:
                light_here = self.segments.name("light", self.segments.of(op)) == copy.target.version
                if op not in self.groups.node_set and light_here:
                    yield Pin(op, port, False, path)

    def stops(self, tensor: int, moves: tuple[Move, ...], where: State) -> tuple[Spec, ...]:
        """The layouts to pin on a route: one per run of gathers or slices, none while partial sums are left.

        Every all-to-all stands alone: the partitioner does one natively, but replicates the tensor for two at once.
        """
        shape = self.groups.graph.tensors[tensor].shape
        found: list[State] = []
        for k, move in enumerate(moves):
            follower = moves[k + 1].kind if k + 1 < len(moves) else ""
            if PARTIAL not in move.target and (follower != move.kind or move.kind == "all-to-all"):
                found.append(move.target)
        return tuple(spec_of(s, shape) for s in (found or [where]))
