"""What a range of layers costs on a submesh: the prices that the stage search asks for.

A layer alone, and each pair of neighbouring layers, are sharded by the solver; a range costs the sum of its layers and,
for each two neighbours, what the pair costs more than the two alone:

    cost(i … j) = Σ_k alone(k) + Σ_k [pair(k, k+1) − alone(k) − alone(k+1)].

Equal layers are priced once, so a range of n equal layers costs no more to price than one of two. The stages that are
chosen in the end are solved as they are, so this decides which stages there are, and not what the plan says of them.
Where these then take longer than their sums, `learn` raises the sums of all stages that are run in the same way.

Where memory is short, options that take less of it at the price of time are offered: layers computed again in the
backward pass, and shardings found with a price on lasting bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from jax.extend.core import Var

from alpa_like.cluster import Cluster
from alpa_like.cost import RingCost
from alpa_like.graph import OpGraph
from alpa_like.passes.compose import GraphReader
from alpa_like.passes.flat import nbytes
from alpa_like.passes.layers import Layers
from alpa_like.passes.mesh_plan import MeshProblem, MeshSolution, SolverOptions, Stock
from alpa_like.passes.pieces import PieceKind, Pieces, StagePiece, StageRange, form_pieces
from alpa_like.passes.pipeline import EMULATED, problem_of
from alpa_like.passes.stage_search import Option, Submesh
from alpa_like.pipeshard import RematMode
from alpa_like.tracer import Trace

__all__ = ["LayerCosts", "Tag"]

_PRICES = (0.0, 0.3, 3.0, 30.0)
"""Prices of memory that are tried, the lowest first: seconds for the whole budget, in units of the ideal step time."""

_CROWDED = 0.25
"""Where the state takes more than this share of all memory, a price is taken from the start."""

_HELPS = 0.98
"""A higher price of memory must bring the bytes down to this share, or no higher one is tried."""

_MODES: dict[RematMode, tuple[bool, ...]] = {"none": (False,), "layer": (True,), "auto": (False, True)}

_NEWS = 1.03
"""So many times the seconds reckoned with, and more, are reason to search for other stages."""

_IN_FLIGHT = 4
"""Micro-batches in flight that a memory price reckons with."""


@dataclass(frozen=True, slots=True)
class Tag:
    """How an option is run: the mesh of the submesh, whether layers are computed again, and the price of memory."""

    mesh_shape: tuple[int, ...]
    remat: bool
    price: float


@dataclass(frozen=True, slots=True)
class _Measure:
    """Of some layers on a mesh: seconds per micro-batch and of the update, bytes as in `Option`."""

    forward_s: float
    backward_s: float
    update_s: float
    fixed_bytes: float
    micro_bytes: float
    peak_bytes: float
    entering_bytes: float = 0.0

    def computed_again(self, share: float) -> _Measure:
        """With rematerialization: a share of the forward pass runs twice; of a micro-batch only what enters is held.

        What the layers make in between lives while one micro-batch's backward pass runs. The second forward pass is
        taken to be sharded as the first.
        """
        again_s = share * self.forward_s
        return _Measure(
            self.forward_s, self.backward_s + again_s, self.update_s, self.fixed_bytes, self.entering_bytes,
            self.peak_bytes + max(0.0, self.micro_bytes - self.entering_bytes), self.entering_bytes,
        )  # fmt: skip

    def plus(self, other: _Measure, sign: float = 1.0) -> _Measure:
        return _Measure(
            self.forward_s + sign * other.forward_s,
            self.backward_s + sign * other.backward_s,
            self.update_s + sign * other.update_s,
            self.fixed_bytes + sign * other.fixed_bytes,
            self.micro_bytes + sign * other.micro_bytes,
            max(self.peak_bytes, other.peak_bytes),
            self.entering_bytes + sign * other.entering_bytes,
        )


_NOTHING = _Measure(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass
class LayerCosts:
    """The `Costs` of a model's layers. `solves` counts the sharding problems that were solved."""

    trace: Trace
    layers: Layers
    cluster: Cluster
    budget: float
    remat: RematMode
    options_: SolverOptions
    reader: GraphReader
    hides_sends: bool = False
    solves: int = 0
    known: dict[object, _Measure] = field(default_factory=dict[object, _Measure])
    sums: dict[object, list[_Measure]] = field(default_factory=dict[object, list[_Measure]])
    slower: dict[object, float] = field(default_factory=dict[object, float])
    shares: dict[str, float] = field(default_factory=dict[str, float])
    kinds: dict[tuple[int, ...], str] = field(default_factory=dict[tuple[int, ...], str])
    problems: dict[object, MeshProblem] = field(default_factory=dict[object, MeshProblem])
    stock: Stock = field(default_factory=Stock)

    @property
    def micro_batches(self) -> int:
        return self.layers.program.num_micro_batches

    # ------------------------------------------------------------------------------------- what the search asks for

    def options(self, first: int, last: int, submesh: Submesh) -> list[Option]:
        state = self.state_bytes(first, last) / submesh.num_devices
        if state > self.budget:
            least = self.lower_bound_s(first, last, submesh)
            return [Option(least / 3, least * 2 / 3, 0.0, state, 0.0, 0.0)]  # fits nowhere: not worth a solution
        found: list[Option] = []
        ways = {(shape, remat): list[Option]() for remat in _MODES[self.remat] for shape in self.shapes(submesh)}
        for price in self.prices:
            for (shape, remat), mine in ways.items():
                mine.append(self.option(first, last, submesh, Tag(shape, remat, price)))
                found.append(mine[-1])
            fits = min((self.step_s(o) for o in found if self.fits(o, submesh)), default=math.inf)
            ways = {way: mine for way, mine in ways.items() if self.gains(mine, fits, submesh)}
        return _pareto(found)

    def gains(self, mine: Sequence[Option], fits_s: float, submesh: Submesh) -> bool:
        """Whether a higher price of memory may make a faster option than the fastest that fits, of `fits_s` per step.

        `mine` are a way's options so far: with the price it takes longer, and at the last rise it must have saved some.
        """
        now, before = mine[-1], mine[-2] if len(mine) > 1 else None
        if self.fits(now, submesh) or self.step_s(now) >= fits_s:
            return False
        flying = self.most_flying(submesh)
        return before is None or now.bytes(flying) <= _HELPS * before.bytes(flying)

    def fits(self, option: Option, submesh: Submesh) -> bool:
        """Wherever the stage may stand in the pipeline."""
        return option.bytes(self.most_flying(submesh)) <= self.budget

    def most_flying(self, submesh: Submesh) -> int:
        """Micro-batches in flight of the first of as many stages as there can be of this size."""
        return min(self.micro_batches, -(-self.cluster.num_devices // submesh.num_devices))

    def step_s(self, option: Option) -> float:
        return self.micro_batches * option.seconds + option.update_s

    def option(self, first: int, last: int, submesh: Submesh, tag: Tag) -> Option:
        m, send = self.range(first, last, submesh, tag), self.waiting_s(last, submesh)
        slower = self.slower.get((submesh, tag.mesh_shape, tag.remat), 1.0)
        forward_s, backward_s = slower * m.forward_s + send, slower * m.backward_s + send
        return Option(forward_s, backward_s, m.update_s, m.fixed_bytes, m.micro_bytes, m.peak_bytes, tag)

    def learn(self, first: int, last: int, submesh: Submesh, tag: Tag, seconds: float) -> bool:
        """Take note of what a stage takes as a whole, forward and backward; whether that is news for later searches.

        Where it is more than the sum of its layers, all stages run in the same way are reckoned to be so much slower.
        """
        m, key = self.range(first, last, submesh, tag), (submesh, tag.mesh_shape, tag.remat)
        reckoned, before = m.forward_s + m.backward_s, self.slower.get(key, 1.0)
        if not reckoned or seconds <= reckoned * before * _NEWS:
            return False
        self.slower[key] = seconds / reckoned
        return True

    def waiting_s(self, last: int, submesh: Submesh) -> float:
        """Seconds that a stage waits for what it sends, each way.

        Stage s of S has S - s micro-batches in flight, so from a forward pass to its backward pass it can't do more
        than that many, and the sends in between slow down every round; only eager schedules hide them.
        """
        if last + 1 == self.layers.count or self.hides_sends:
            return 0.0
        inside = submesh.num_devices < self.cluster.devices_per_host or self.cluster.hosts == 1
        link = self.cluster.intra_host if inside else self.cluster.inter_host
        return link.latency_s + self.crossing_bytes[last] / (link.bandwidth_bytes_per_s * submesh.num_devices)

    @cached_property
    def crossing_bytes(self) -> list[float]:
        """Bytes of a micro-batch's activations across the cut behind each layer but the last."""
        return [sum(nbytes(v) for v in self.layers.crossing(n)) for n in range(self.layers.count - 1)]

    def state_bytes(self, first: int, last: int) -> float:
        """Bytes of the state of some layers and of what they accumulate, which no plan can do without."""
        return sum(self.layer_bytes[first : last + 1])

    @cached_property
    def layer_bytes(self) -> list[float]:
        found = [0.0] * self.layers.count
        batch = set(self.trace.batch)
        for i, var in enumerate(self.layers.program.inputs):
            if i not in batch:
                found[self.layers.owners.get(var, 0)] += nbytes(var)
        for var in self.layers.accumulated:
            found[self.layers.owners.get(var, 0)] += nbytes(var)
        return found

    def lower_bound_s(self, first: int, last: int, submesh: Submesh) -> float:
        return sum(self.work_s[first : last + 1]) / submesh.num_devices

    def send_s(self, boundary: int) -> float:
        """Sends are part of the options already, unless they are hidden."""
        if not self.hides_sends:
            return 0.0
        link = self.cluster.inter_host if self.cluster.hosts > 1 else self.cluster.intra_host
        bandwidth = link.bandwidth_bytes_per_s * self.cluster.devices_per_host
        return link.latency_s + self.crossing_bytes[boundary] / bandwidth

    @cached_property
    def prices(self) -> tuple[float, ...]:
        """Prices of memory to try, the lowest that makes sense first."""
        crowded = sum(self.layer_bytes) > _CROWDED * self.budget * self.cluster.num_devices
        return _PRICES[1:] if crowded else _PRICES

    def shapes(self, submesh: Submesh) -> list[tuple[int, ...]]:
        """The meshes to try: hosts by devices; inside a host all devices in a row, and halves and pairs of them."""
        count = submesh.num_devices
        if submesh.hosts > 1 and submesh.devices_per_host > 1:
            return [(submesh.hosts, submesh.devices_per_host)]
        divided = [(2, count // 2), (count // 2, 2)] if count >= 4 and count % 2 == 0 else []
        return [(count,), *dict.fromkeys(divided)]

    # ------------------------------------------------------------------------------------------------------- prices

    def range(self, first: int, last: int, submesh: Submesh, tag: Tag) -> _Measure:
        """The price of a range, from sums over all layers that are kept per submesh and tag."""
        key = (submesh, tag)
        if key not in self.sums:
            self.sums[key] = self.running(submesh, tag)
        sums = self.sums[key]
        total = sums[2 * last].plus(sums[2 * first - 1], -1.0) if first else sums[2 * last]
        alone = self.peaks(first, last, submesh, tag)
        return _Measure(
            max(total.forward_s, 0.0), max(total.backward_s, 0.0), max(total.update_s, 0.0),
            max(total.fixed_bytes, 0.0), max(total.micro_bytes, 0.0), alone,
        )  # fmt: skip

    def running(self, submesh: Submesh, tag: Tag) -> list[_Measure]:
        """Sums of alone(0), step(0, 1), alone(1), step(1, 2), …: a range is the difference of two of them."""
        found: list[_Measure] = []
        total = _NOTHING
        for number in range(self.layers.count):
            total = total.plus(self.alone(number, submesh, tag))
            found.append(total)
            if number + 1 < self.layers.count:
                total = total.plus(self.step(number, submesh, tag))
                found.append(total)
        return found

    def peaks(self, first: int, last: int, submesh: Submesh, tag: Tag) -> float:
        key = (submesh, tag, "peaks")
        if key not in self.sums:
            self.sums[key] = [self.alone(n, submesh, tag) for n in range(self.layers.count)]
        return max(m.peak_bytes for m in self.sums[key][first : last + 1])

    def alone(self, layer: int, submesh: Submesh, tag: Tag) -> _Measure:
        measure = self.measure((layer,), submesh, tag)
        return measure.computed_again(self.again_share(layer)) if tag.remat else measure

    def again_share(self, layer: int) -> float:
        """The share of a layer's forward pass that its backward pass needs again: not what only later layers read."""
        key = self.kind((layer,))
        if key not in self.shares:
            forward = self.flops(self.pieces, layer, "forward")
            again = self.flops(self.with_remat, layer, "backward") - self.flops(self.pieces, layer, "backward")
            self.shares[key] = min(1.0, max(0.0, again / forward)) if forward else 1.0
        return self.shares[key]

    def flops(self, pieces: Pieces, layer: int, kind: PieceKind) -> float:
        """FLOPs of a layer's piece for one micro-batch."""
        graphs = [self.reader.graph(pieces, p) for p in pieces.pieces if p.stage == layer and p.kind == kind]
        return sum(op.flops * op.count for graph in graphs for op in graph.ops)

    @cached_property
    def with_remat(self) -> Pieces:
        """The step with one stage per layer, each computed again in the backward pass."""
        return form_pieces(self.layers, [StageRange(n, n, n, True) for n in range(self.layers.count)])

    def step(self, layer: int, submesh: Submesh, tag: Tag) -> _Measure:
        """What two neighbours cost more than each alone."""
        pair = self.measure((layer, layer + 1), submesh, tag)
        left, right = (self.measure((n,), submesh, tag) for n in (layer, layer + 1))
        more = pair.plus(left.plus(right), -1.0)
        if not tag.remat:
            return more
        return replace(more, backward_s=more.backward_s + more.forward_s, micro_bytes=0.0)

    def measure(self, numbers: tuple[int, ...], submesh: Submesh, tag: Tag) -> _Measure:
        key = (self.kind(numbers), submesh, tag.mesh_shape, tag.price)
        if key not in self.known:
            self.known[key] = self.solve(numbers, submesh, tag)
        return self.known[key]

    def solve(self, numbers: tuple[int, ...], submesh: Submesh, tag: Tag) -> _Measure:
        part = self.cluster.part(submesh.hosts, submesh.devices_per_host)
        cost = RingCost(part, tag.mesh_shape, native_reduce_scatter=self.cluster.device.name != EMULATED)
        problem = self.problem(numbers)
        flying = min(self.micro_batches, _IN_FLIGHT)
        stages = sorted(set(problem.held.values()))
        price = tag.price * self.ideal_s / self.budget
        self.solves += 1
        solution = problem.price(cost, dict.fromkeys(stages, flying), self.options_, price, self.stock, exact=False)
        return _measured(solution, flying)

    @cached_property
    def ideal_s(self) -> float:
        """Seconds of a step if all devices did nothing but matmuls."""
        return self.micro_batches * sum(self.work_s) / self.cluster.num_devices

    @cached_property
    def work_s(self) -> list[float]:
        """Seconds of one device for the FLOPs of each layer, forward and backward, one micro-batch."""
        found: list[float] = []
        for number in range(self.layers.count):
            pieces = [p for p in self.by_layer[number] if p.is_micro]
            found.append(sum(self.graph_s(self.reader.graph(self.pieces, p)) for p in pieces))
        return found

    def graph_s(self, graph: OpGraph) -> float:
        one = RingCost(self.cluster.part(1, 1), (1,), native_reduce_scatter=True)
        work = [(op, graph.tensors[(*op.operands, *op.results)[0]].dtype) for op in graph.ops if op.flops]
        return sum(op.count * one.compute_s(op.flops, 0.0, dtype) for op, dtype in work)

    # --------------------------------------------------------------------------------------------- layers as pieces

    @cached_property
    def pieces(self) -> Pieces:
        """The step with one stage per layer."""
        return form_pieces(self.layers, [StageRange(n, n, n) for n in range(self.layers.count)])

    @cached_property
    def by_layer(self) -> list[list[StagePiece]]:
        found: list[list[StagePiece]] = [[] for _ in range(self.layers.count)]
        for piece in self.pieces.pieces:
            found[piece.mesh].append(piece)
        return found

    def together(self, numbers: Sequence[int]) -> list[StagePiece]:
        """The pieces of some layers in an order in which they can run on one mesh."""
        mine = [p for n in numbers for p in self.by_layer[n]]
        order = {"before": 0, "forward": 1, "backward": 2, "update": 3}
        level = {id(p): i for i, p in enumerate(self.pieces.pieces)}
        return sorted(mine, key=lambda p: (order[p.kind], level[id(p)]))

    def problem(self, numbers: tuple[int, ...]) -> MeshProblem:
        key = self.kind(numbers)
        if key not in self.problems:
            self.problems[key] = problem_of(self.trace, self.pieces, self.together(numbers), self.reader)
        return self.problems[key]

    def kind(self, numbers: tuple[int, ...]) -> str:
        """Equal for layers that cost the same."""
        if numbers not in self.kinds:
            self.kinds[numbers] = self.digest(self.together(numbers))
        return self.kinds[numbers]

    def digest(self, pieces: list[StagePiece]) -> str:
        """What each piece computes, and which of its values are those of another piece."""
        numbers: dict[Var, int] = {}
        text = hashlib.sha256()
        for piece in pieces:
            text.update(f"{piece.kind} {self.reader.fingerprint(self.pieces, piece)}".encode())
            for var in (*piece.inputs, *piece.outputs):
                state = var in self.stored, var in self.layers.accumulated
                text.update(f"{numbers.setdefault(var, len(numbers))}{self.role(var)}{state}".encode())
        return text.hexdigest()

    @cached_property
    def stored(self) -> set[Var]:
        program = self.layers.program
        pairs = [(program.inputs[a], program.outputs[r]) for a, r in self.trace.stored]
        return {v for pair in pairs for v in pair if isinstance(v, Var)}

    def role(self, var: Var) -> str:
        return str(self.layers.program.statuses.get(var))


def _measured(solution: MeshSolution, flying: int) -> _Measure:
    seconds = {p.name: solution.seconds[p.name] for p in solution.mesh.composite.pieces}
    kinds = {p.name: p.kind for p in solution.mesh.composite.pieces}

    def total(*names: str) -> float:
        return sum(s for name, s in seconds.items() if kinds[name] in names)

    micro = sum(solution.in_flight_bytes.values())
    fixed = solution.fixed_bytes
    peak = max(0.0, solution.memory_bytes - fixed - flying * micro)
    entering = sum(solution.local_bytes(t) for t in solution.mesh.entering)
    return _Measure(
        total("forward"), total("backward"), total("update", "before"), fixed, micro, peak, min(entering, micro)
    )


def _pareto(found: list[Option]) -> list[Option]:
    """Those that no other beats in time and in every kind of bytes."""

    def better(a: Option, b: Option) -> bool:
        left = (a.seconds, a.update_s, a.fixed_bytes + a.peak_bytes, a.micro_bytes)
        right = (b.seconds, b.update_s, b.fixed_bytes + b.peak_bytes, b.micro_bytes)
        return left != right and all(x <= y for x, y in zip(left, right, strict=True))

    unique = list({(o.seconds, o.update_s, o.fixed_bytes, o.peak_bytes, o.micro_bytes): o for o in found}.values())
    return [o for o in unique if not any(better(p, o) for p in unique)]
