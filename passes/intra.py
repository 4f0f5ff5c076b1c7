"""The sharding of one stage: builds the `AssignmentProblem` of a graph on a mesh, solves it, reads the answer.

Nodes
    one per group of tensors (`passes.groups`), choices = layouts (each mesh axis on a dim or on none);
    one per op that does more than carry a layout along, choices = strategies (each mesh axis to a factor or
    to none).

Costs, in seconds of one step
    group      memory traffic of the element-wise ops in it, by elements per device
    op         seconds of one device's share, padding included; work that is not split is done by all
    op–group   reshard between what the strategy needs (or makes, partial sums included) and the layout
    copy       reshard between two versions of one tensor. A shared copy never takes less memory than its
               source (its readers slice for themselves), so what it takes more is a difference of two terms

Memory: every tensor that is materialized takes its share from where it is made to its last use.

Contract
    Input: `Groups`, a `CostModel`, `Restrictions`. Output: `ShardingProblem`, `decode` → `Decision`.
    Raises: `PlanError` where restrictions leave a tensor or an op no choice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from alpa_like.cost import CostModel
from alpa_like.errors import PlanError
from alpa_like.graph import Op, OpGraph, Rule, batch_dims, dtype_bits
from alpa_like.passes.assignment import AssignmentProblem, Costs, Usage
from alpa_like.passes.groups import ACCUMULATE, Copy, Groups, Member, Port, first_reader, wide_dims
from alpa_like.passes.layouts import PARTIAL, WHOLE, State, TensorSpace, states_of
from alpa_like.passes.liveness import Flying, Liveness

__all__ = ["Decision", "Restrictions", "ShardingProblem", "Shared", "Spaces", "Spec", "build"]

Spec = tuple[tuple[int, ...], ...]
"""Mesh axes per dim of a tensor, major to minor."""

_FREE_OPS = frozenset(
    f"stablehlo.{n}" for n in ("broadcast_in_dim", "reshape", "slice", "pad", "concatenate", "reverse", "transpose")
) | {"enter", "yield", "branch", "barrier"}
"""Ops that are fused into their users, or only move a name."""

_MATMULS = frozenset(("stablehlo.dot_general", "stablehlo.dot"))

_CONTRACTIONS = _MATMULS | {"stablehlo.convolution"}
"""Ops at the rate of matmuls; all others are priced like element-wise work."""

_PADDED = frozenset(f"stablehlo.{n}" for n in ("dot_general", "reduce", "broadcast_in_dim", "transpose", "add"))
"""Node ops that the partitioner splits correctly when dims do not divide. It gets slices, pads, updates, scatters and
others wrong then (wrong numbers, or an abort), so those are split evenly or not at all."""

_COSTLY = frozenset(
    f"stablehlo.{n}" for n in ("exponential", "tanh", "log", "logistic", "power", "rsqrt", "sine", "cosine")
) | {"chlo.erf", "chlo.erf_inv", "stablehlo.exponential_minus_one", "stablehlo.log_plus_one", "stablehlo.cbrt"}
"""Element-wise functions that are computed by a polynomial or a series."""

_WORK = {
    **dict.fromkeys(_COSTLY, 0.0),
    **{f"stablehlo.{n}": 0.0 for n in ("broadcast_in_dim", "convert", "reshape", "transpose", "bitcast_convert")},
    **{f"stablehlo.{n}": 4.0 for n in ("maximum", "minimum", "select", "compare")},
    **{f"stablehlo.{n}": 8.0 for n in ("divide", "sqrt", "remainder")},
}
"""Simple functions that an op amounts to, where it is not one."""

_TIE_BREAK_S_PER_BYTE = 1e-21
"""Prefers the smaller of two layouts that cost the same: 1e-9 s per TB is below any real cost."""


@dataclass(frozen=True)
class Restrictions:
    """What a method forbids. Everything not named is free.

    `tensors` gives the layout that a version of a tensor ("home" or "out") must have; `spread` are tensors that
    must be split over every axis where their dims allow it; `batch` are tensors with dim 0 the batch: if
    given, ops that compute on something with a batch dim may split that dim only.
    """

    tensors: Mapping[tuple[int, str], Spec] = field(default_factory=dict)
    spread: frozenset[int] = frozenset()
    batch: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Decision:
    """The solution in terms of the program: a state per version of a tensor, a strategy per node op.

    States speak of wide dims. `strategies[op][axis]` is the factor that the axis splits, or `WHOLE`.
    """

    layouts: dict[tuple[int, str], State]
    strategies: dict[int, tuple[int, ...]]


def wide_state(spec: Spec, shape: tuple[int, ...], axes: int) -> State:
    """The state of a spec over all dims. Axes on a dim of one element split nothing and are dropped."""
    place = {d: k for k, d in enumerate(wide_dims(shape))}
    state = [WHOLE] * axes
    for dim, names in enumerate(spec):
        for axis in names:
            state[axis] = place.get(dim, WHOLE)
    return tuple(state)


def spec_of(state: State, shape: tuple[int, ...]) -> Spec:
    """The spec of a state over wide dims; partial sums are left out."""
    spec: list[tuple[int, ...]] = [() for _ in shape]
    for k, dim in enumerate(wide_dims(shape)):
        spec[dim] = tuple(axis for axis, place in enumerate(state) if place == k)
    return tuple(spec)


Reshard = tuple[int, int, int, Costs]
"""The op that a reshard is done for, the two nodes that it lies between, and its costs."""


@dataclass
class ShardingProblem:
    """The problem, and what its nodes and choices mean: first all groups, then all node ops."""

    problem: AssignmentProblem
    groups: Groups
    choices: list[list[State]]
    compute: tuple[Costs, ...]
    reshards: tuple[Reshard, ...] = ()
    lasting: tuple[Usage, ...] = ()
    """Memory of what is there all step, and of what is held per micro-batch in flight."""
    others: tuple[Usage, ...] = ()
    """Memory of the micro-batches in flight but the one that the graph runs for."""
    spaces: Spaces = field(default_factory=dict[Any, Any])

    def decode(self, choice: tuple[int, ...]) -> Decision:
        states = [c[x] for c, x in zip(self.choices, choice, strict=True)]
        layouts = {key: _place(m, states[m.group]) for key, m in self.groups.members.items()}
        first = len(self.groups.shapes)
        return Decision(layouts, {op: states[first + i] for i, op in enumerate(self.groups.nodes)})

    def compute_s(self, choice: tuple[int, ...]) -> float:
        """The part of the objective that is not communication."""
        return sum(float(c[x]) for c, x in zip(self.compute, choice, strict=True))

    def reshard_s(self, choice: tuple[int, ...]) -> list[tuple[int, float]]:
        """Every reshard that takes time: the op that it is done for, and its seconds in a step."""
        found = ((op, float(costs[choice[i], choice[j]])) for op, i, j, costs in self.reshards)
        return [(op, seconds) for op, seconds in found if seconds]


Spaces = dict[tuple[tuple[int, ...], int, bool], TensorSpace]
"""Reshard tables by shape, bits and whether collectives travel together."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What the problems of one cost model can have in common: reshard tables, arrays of costs, lists of choices.

    Arrays that are equal in several problems are then the same objects, by which elimination recognises them.
    """

    spaces: Spaces = field(default_factory=dict[Any, Any])
    arrays: dict[object, Costs] = field(default_factory=dict[object, Costs])
    choices: dict[object, list[State]] = field(default_factory=dict[object, list[State]])


def build(
    groups: Groups,
    cost: CostModel,
    liveness: Liveness,
    restrictions: Restrictions,
    shared: Shared | None = None,
) -> ShardingProblem:
    """The problem; `shared` comes from other problems of the same cost model, and saves making the same things anew."""
    known = shared or Shared()
    return _Builder(groups, cost, liveness, restrictions, known.spaces, known.arrays, known.choices).build()


def _place(member: Member, state: State) -> State:
    """The state of a tensor whose group is in `state`."""
    where = {group_dim: k for k, group_dim in enumerate(member.dims)}
    return tuple(where[p] if p >= 0 else p for p in state)


@dataclass
class _Builder:
    groups: Groups
    cost: CostModel
    liveness: Liveness
    restrictions: Restrictions
    spaces: Spaces
    cache: dict[object, Costs]
    lists: dict[object, list[State]]
    reshards: list[Reshard] = field(default_factory=list[Reshard])
    flying: set[int] = field(default_factory=set[int])
    others: list[Usage] = field(default_factory=list[Usage])

    def __post_init__(self) -> None:
        self.graph: OpGraph = self.groups.graph
        self.mesh = self.cost.mesh_shape
        self.batch_dims = batch_dims(self.graph, self.restrictions.batch)

    def build(self) -> ShardingProblem:
        domains = [self.domain(g) for g in range(len(self.groups.shapes))]
        strategies = [self.strategies(self.graph.ops[op]) for op in self.groups.nodes]
        group_costs = [self.group_costs(g, domain) for g, domain in enumerate(domains)]
        op_costs = [self.op_costs(self.graph.ops[op], s) for op, s in zip(self.groups.nodes, strategies, strict=True)]
        pairs = self.pairs(domains, strategies)
        names = (*(f"group {g}" for g in range(len(domains))), *(f"op {op}" for op in self.groups.nodes))
        unary = (*group_costs, *op_costs)
        first = len(domains)
        usages = (
            *self.usages(domains),
            *self.totals(strategies, first),
            *self.held(domains, strategies),
            *self.copied(strategies, first),
        )
        problem = AssignmentProblem(unary, pairs, usages, names=names)
        end = len(self.graph.ops) + 1
        lasting = tuple(u for u in usages if (u.start == 0 and u.end >= end) or id(u) in self.flying)
        return ShardingProblem(
            problem,
            self.groups,
            [*domains, *strategies],
            unary,
            tuple(self.reshards),
            lasting,
            tuple(self.others),
            self.spaces,
        )

    # ------------------------------------------------------------------------------------------- choices

    def space(self, shape: tuple[int, ...], bits: int, combined: bool = True) -> TensorSpace:
        key = (shape, bits, combined)
        if key not in self.spaces:
            self.spaces[key] = TensorSpace(*key, self.cost)
        return self.spaces[key]

    def tensor_space(self, tensor: int) -> TensorSpace:
        t = self.graph.tensors[tensor]
        shape = tuple(t.shape[d] for d in wide_dims(t.shape))
        return self.space(shape, dtype_bits(t.dtype), tensor not in self.liveness.waiting)

    def domain(self, group: int) -> list[State]:
        """The layouts that a group may take. Arguments and results divide evenly, as JAX demands."""
        shape = self.groups.shapes[group]
        members = self.groups.by_group[group]
        required = {self.required(m) for m in members if (m.tensor, m.version) in self.restrictions.tensors}
        stored = any(m.tensor in self.liveness.stored and m.version in ("home", "out") for m in members)
        spread = any(m.tensor in self.restrictions.spread and m.version == "home" for m in members)
        partial = group in self.groups.partial_groups
        key = (shape, frozenset(required), stored, spread, partial)
        if key not in self.lists:
            self.lists[key] = self.allowed(shape, required, stored, spread, partial)
        if not self.lists[key]:
            raise PlanError(self.conflict(members))
        return self.lists[key]

    def allowed(
        self, shape: tuple[int, ...], required: set[State], stored: bool, spread: bool, partial: bool
    ) -> list[State]:
        space = self.space(shape, 32)
        found = [s for s in states_of(len(shape), self.mesh, partial=partial) if space.possible(s)]
        if stored:
            found = [s for s in found if all(n % k == 0 for n, k in zip(shape, space.shards(s), strict=True))]
        if spread and found:
            most = max(math.prod(space.shards(s)) for s in found)
            found = [s for s in found if math.prod(space.shards(s)) == most]
        return [s for s in found if all(s == r for r in required)]

    def required(self, member: Member) -> State:
        spec = self.restrictions.tensors[(member.tensor, member.version)]
        state = wide_state(spec, self.graph.tensors[member.tensor].shape, len(self.mesh))
        return tuple(member.dims[p] if p >= 0 and n > 1 else WHOLE for p, n in zip(state, self.mesh, strict=True))

    def conflict(self, members: tuple[Member, ...]) -> str:
        wanted = [
            f"tensor {m.tensor} {self.graph.tensors[m.tensor].shape} {self.restrictions.tensors[(m.tensor, m.version)]}"
            for m in members
            if (m.tensor, m.version) in self.restrictions.tensors
        ]
        return (
            f"these tensors must lie alike on mesh {self.mesh}, but no layout fits them all: {'; '.join(wanted)}. "
            "Give them specs that agree and that divide their dims, or leave one of them None"
        )

    def strategies(self, op: Op) -> list[State]:
        """All ways to give each mesh axis to a factor or to none, that every operand and result can follow."""
        allowed, even = self.factors(op), op.id in self.groups.summed or op.name not in _PADDED
        rest = (PARTIAL, WHOLE) if op.id in self.groups.sums else (WHOLE,)
        key = ("strategies", op.rule, allowed, rest, even)
        if key not in self.lists:
            places = [(*rest, *allowed) if n > 1 else (WHOLE,) for n in self.mesh]
            self.lists[key] = [s for s in itertools.product(*places) if self.fits(op.rule, s, even)]
        return self.lists[key]

    def factors(self, op: Op) -> tuple[int, ...]:
        free = tuple(f for f, n in enumerate(op.rule.sizes) if n > 1 and f not in op.rule.fixed)
        if not self.restrictions.batch:
            return free
        batch = {
            f
            for tensor, dims in zip(op.operands, op.rule.operands, strict=True)
            for dim in self.batch_dims.get(tensor, ())
            for f in dims[dim]
        }
        return tuple(f for f in free if f in batch) if batch else free

    def fits(self, rule: Rule, strategy: State, even: bool) -> bool:
        """Whether operands and results can be split so; `even`: every split factor must divide."""
        shards = _factor_shards(rule, strategy, self.mesh)
        if any(n > max(size, 1) for n, size in zip(shards, rule.sizes, strict=True)):
            return False
        if even and any(size % n for n, size in zip(shards, rule.sizes, strict=True)):
            return False
        return all(_compound_fits(rule, dim, strategy, shards) for t in (*rule.operands, *rule.results) for dim in t)

    # --------------------------------------------------------------------------------------------- costs

    def group_costs(self, group: int, domain: list[State]) -> Costs:
        nbytes = sum(
            self.graph.tensors[m.tensor].bytes
            / max(1, math.prod(self.graph.tensors[m.tensor].shape))
            * self.liveness.passes(m.tensor)
            for m in self.groups.by_group[group]
            if m.version == "home"
        )
        shape, (simple, costly, kernels) = self.groups.shapes[group], self.elementwise_work(group)
        seconds = self.cost.elementwise_s(simple, costly, nbytes) + _TIE_BREAK_S_PER_BYTE
        launches = kernels * self.cost.launch_s
        key = ("group", shape, id(domain), seconds, launches)
        if key not in self.cache:
            self.cache[key] = self.elements(shape, domain) * seconds + launches
        return self.cache[key]

    def elementwise_work(self, group: int) -> tuple[float, float, float]:
        """Simple and costly functions per element of a group, and the kernels that these come in."""
        simple = costly = kernels = 0.0
        for m in self.groups.by_group[group]:
            maker = self.graph.tensors[m.tensor].op
            if m.version == "home" and maker >= 0 and self.graph.ops[maker].elementwise:
                op = self.graph.ops[maker]
                weight = _WORK.get(op.name, 1.0)
                simple += weight * op.count
                costly += (op.name in _COSTLY) * op.count
                kernels += self.liveness.materialized[m.tensor] * op.count
        return simple, costly, kernels

    def elements(self, shape: tuple[int, ...], domain: list[State]) -> npt.NDArray[np.float64]:
        space = self.space(shape, 32)
        return np.array([space.local_elements(s) for s in domain], float)

    def op_costs(self, op: Op, strategies: list[State]) -> Costs:
        dtype = self.graph.tensors[(*op.operands, *op.results)[0]].dtype
        tensors = tuple(self.graph.tensors[t] for t in (*op.operands, *op.results))
        sizes = tuple((t.shape, dtype_bits(t.dtype)) for t in tensors)
        key = ("op", op.rule, id(strategies), op.count, op.flops, op.name, dtype, sizes, self.transposed_later(op))
        if key not in self.cache:
            self.cache[key] = np.array([op.count * self.op_seconds(op, s, dtype, sizes) for s in strategies])
        return self.cache[key]

    def op_seconds(self, op: Op, strategy: State, dtype: str, sizes: tuple[tuple[tuple[int, ...], int], ...]) -> float:
        local = self.local(op, strategy)
        share = math.prod(k / size for k, size in zip(local, op.rule.sizes, strict=True) if size)
        if op.name in _FREE_OPS:
            return share * op.flops * _TIE_BREAK_S_PER_BYTE
        tensors = zip((*op.rule.operands, *op.rule.results), sizes, strict=True)
        nbytes = [_local_elements(dims, local, shape) * bits / 8 for dims, (shape, bits) in tensors]
        touched, flops = _touched(op.name, nbytes), op.flops * share
        if op.name not in _CONTRACTIONS:
            launch_s = self.cost.library_s if op.name == "stablehlo.reduce" else self.cost.launch_s
            return launch_s + self.cost.elementwise_s(flops, 0.0, touched)
        seconds = self.cost.kernel_s(flops, touched, dtype)
        if op.name == "stablehlo.convolution":
            return seconds + self.convolution_s(op, local, flops, sizes[0][1])
        return seconds + (self.other_order_s(op, strategy, local, sizes[0][1]) if _turned(op, local) else 0.0)

    def convolution_s(self, op: Op, local: list[int], flops: float, bits: int) -> float:
        """Seconds beside its arithmetic: both sides are copied where channels don't come last.

        Where these are images, the convolution makes the gradient of a window. Grouped ones are taken for plain ones.
        """
        copied_s = self.cost.copy_s(_copied(op, local) * bits / 8)
        if _makes_window(op, local):
            return copied_s + self.cost.window_s(_elements(op, local, 2))
        return copied_s + self.cost.odd_taps_s(_odd_taps(op, local, flops))

    def other_order_s(self, op: Op, strategy: State, local: list[int], bits: int) -> float:
        """Seconds for a left side that is contracted over its columns, as in gradients of weights.

        XLA's CPU backend copies it; but it reads matrices as they lie, and what is transposed behind the contraction,
        unless it is reduced before: it then makes the transpose instead, by reading both sides by columns.
        """
        if _matrices(op):
            return self.cost.columns_s(_elements(op, local, 2))
        summed = any(f in op.rule.reduction for f in strategy if f >= 0)
        if not summed and self.transposed_later(op):
            return 2 * self.cost.columns_s(_elements(op, local, 2))
        return self.cost.copy_s(_copied(op, local) * bits / 8)

    def transposed_later(self, op: Op) -> bool:
        """Whether all that becomes of a matmul, which is no batch of them, is its transpose."""
        if op.name not in _MATMULS:
            return False
        left, right, result = ({f for dim in dims for f in dim} for dims in (*op.rule.operands[:2], op.rule.results[0]))
        readers = {self.graph.ops[reader].name for reader, _ in self.graph.uses[op.results[0]]}
        return readers == {"stablehlo.transpose"} and not left & right & result

    def pairs(self, domains: list[list[State]], strategies: list[list[State]]) -> dict[tuple[int, int], Costs]:
        node = {op: len(domains) + i for i, op in enumerate(self.groups.nodes)}
        found: dict[tuple[int, int], list[Costs]] = {}
        for port in self.groups.ports:
            costs = self.port_costs(port, domains[port.member.group], strategies[node[port.op] - len(domains)])
            found.setdefault((port.member.group, node[port.op]), []).append(costs)
            self.reshards.append((port.op, port.member.group, node[port.op], costs))
        for copy in self.groups.copies:
            i, j = copy.source.group, copy.target.group
            costs = self.copy_costs(copy, domains[i], domains[j])
            if i == j:
                raise PlanError(f"tensor {copy.source.tensor} is needed in two layouts by one group")
            found.setdefault((i, j) if i < j else (j, i), []).append(costs if i < j else self.transposed(costs))
            self.reshards.append((first_reader(self.graph, copy, self.liveness.segments), i, j, costs))
        return {edge: self.total(parts) for edge, parts in found.items()}

    def transposed(self, costs: Costs) -> Costs:
        return self.cache.setdefault(("transpose", id(costs)), np.ascontiguousarray(costs.T))

    def total(self, parts: list[Costs]) -> Costs:
        """The sum of several edges between the same nodes; one object for equal parts."""
        if len(parts) == 1:
            return parts[0]
        key = ("sum", *(id(p) for p in parts))
        if key not in self.cache:
            self.cache[key] = np.sum(parts, axis=0)
        return self.cache[key]

    def port_costs(self, port: Port, domain: list[State], strategies: list[State]) -> Costs:
        """Rows: the group's layouts; columns: the op's strategies."""
        op, shape = self.graph.ops[port.op], self.graph.tensors[port.member.tensor].shape
        space = self.tensor_space(port.member.tensor)
        key = (
            "port", op.rule, port.port, port.result, shape, space.bits, space.combined, id(domain),
            port.member.dims, id(strategies), op.count, op.name == ACCUMULATE,
        )  # fmt: skip
        if key not in self.cache:
            mine = [space.index[_place(port.member, s)] for s in domain]
            needs = [space.index[port_state(op.rule, port, s, shape)] for s in strategies]
            table = space.seconds[np.ix_(needs, mine)].T if port.result else space.seconds[np.ix_(mine, needs)]
            # The sum over micro-batches is reduced once, behind the last of them.
            count = 1.0 if port.result and op.name == ACCUMULATE else op.count
            self.cache[key] = np.ascontiguousarray(table) * count
        return self.cache[key]

    def copy_costs(self, copy: Copy, sources: list[State], targets: list[State]) -> Costs:
        space = self.tensor_space(copy.source.tensor)
        key = (
            "copy", space.shape, space.bits, space.combined, id(sources), id(targets), copy.source.dims,
            copy.target.dims, copy.count, copy.target.version,
        )  # fmt: skip
        if key not in self.cache:
            rows = [space.index[_place(copy.source, s)] for s in sources]
            columns = [space.index[_place(copy.target, s)] for s in targets]
            local = space.elements
            grows = local[columns][None, :] >= local[rows][:, None]
            table = space.seconds[np.ix_(rows, columns)] * copy.count
            shared = copy.target.version.startswith("shared")
            self.cache[key] = np.where(grows, table, np.inf) if shared else table
        return self.cache[key]

    def usages(self, domains: list[list[State]]) -> tuple[Usage, ...]:
        """Memory of every version; a shared copy takes what it has more than the tensor that it is a copy of."""
        found: list[Usage] = []
        for (tensor, version), member in self.groups.members.items():
            interval = self.liveness.interval(tensor, version)
            if interval is not None:
                bits = dtype_bits(self.graph.tensors[tensor].dtype)
                found.append(Usage(member.group, *interval, self.local_bytes(member.group, domains, bits)))
                if tensor in self.liveness.flying and version == "home":
                    self.flying.add(id(found[-1]))
                    found.extend(self.of_others(member.group, domains, bits, self.liveness.flying[tensor]))
                if version.startswith("shared"):
                    home = self.groups.home(tensor).group
                    found.append(Usage(home, *interval, self.local_bytes(home, domains, -bits)))
        return tuple(found)

    def of_others(self, group: int, domains: list[list[State]], bits: int, flying: Flying) -> list[Usage]:
        """Memory of a tensor of the other micro-batches in flight."""
        found = [
            Usage(group, start, end, self.local_bytes(group, domains, bits * count))
            for start, end, count in flying.others
        ]
        self.flying.add(id(found[0]))
        self.others.extend(found)
        return found

    def totals(self, strategies: list[list[State]], first: int) -> list[Usage]:
        """Memory of what is accumulated over micro-batches, for the whole step, at least in float32."""
        found: list[Usage] = []
        end = len(self.graph.ops) + 1
        for i, (number, choices) in enumerate(zip(self.groups.nodes, strategies, strict=True)):
            op = self.graph.ops[number]
            if op.name == ACCUMULATE:
                bits = max(32, dtype_bits(self.graph.tensors[op.results[0]].dtype))
                found.append(Usage(first + i, 0, end, self.accumulated_bytes(op, choices, bits)))
        return found

    def held(self, domains: list[list[State]], strategies: list[list[State]]) -> list[Usage]:
        """Memory of partial sums of gradients that wait, whole, until all are there and one collective reduces them.

        While it runs there are its operands and its results; what is kept of these has its own usage already.
        """
        if not self.cost.joins_reductions:
            return []
        waits = [(i, self.graph.ops[n]) for i, n in enumerate(self.groups.nodes) if self.waits(self.graph.ops[n])]
        last, found = max((op.id for _, op in waits), default=0), list[Usage]()
        for i, op in waits:
            tensor = op.results[0]
            bits = dtype_bits(self.graph.tensors[tensor].dtype)
            nbytes = self.partial_bytes(op, strategies[i], bits)
            home = self.groups.home(tensor).group
            found.append(Usage(len(domains) + i, op.id, last + 1, nbytes))
            found.append(Usage(len(domains) + i, last, last + 1, nbytes))
            interval = self.liveness.interval(tensor, "home")
            if interval is not None and interval[0] <= last < interval[1]:
                found.append(Usage(home, last, last + 1, self.local_bytes(home, domains, -bits)))
        return found

    def copied(self, strategies: list[list[State]], first: int) -> list[Usage]:
        """Memory of the left sides of contractions that are copied, and of the right sides of convolutions too."""
        if not self.cost.copies:
            return []
        found: list[Usage] = []
        for i, number in enumerate(self.groups.nodes):
            op = self.graph.ops[number]
            if _copied(op, list(op.rule.sizes)):
                bits = dtype_bits(self.graph.tensors[op.operands[0]].dtype)
                found.append(Usage(first + i, number, number + 1, self.copied_bytes(op, strategies[i], bits)))
        return found

    def copied_bytes(self, op: Op, strategies: list[State], bits: int) -> Costs:
        key = ("copied", op.rule, id(strategies), bits, op.name)
        if key not in self.cache:
            self.cache[key] = np.array([_copied(op, self.local(op, s)) for s in strategies], float) * bits / 8
        return self.cache[key]

    def local(self, op: Op, strategy: State) -> list[int]:
        """The part of every factor's size that a device does."""
        shards = _factor_shards(op.rule, strategy, self.mesh)
        return [-(-size // n) for size, n in zip(op.rule.sizes, shards, strict=True)]

    def waits(self, op: Op) -> bool:
        """Whether an op makes a gradient of a parameter, once a step."""
        single = len(op.results) == 1 and (op.results[0], "home") in self.groups.members
        return single and op.count == 1 and bool(op.rule.reduction) and op.results[0] not in self.liveness.waiting

    def partial_bytes(self, op: Op, strategies: list[State], bits: int) -> Costs:
        """Bytes of an op's result on one device; 0 where it is no partial sum."""
        key = ("partial", op.rule, id(strategies), bits)
        if key not in self.cache:
            summed = [any(f in op.rule.reduction for f in s if f >= 0) for s in strategies]
            self.cache[key] = np.array(summed) * self.result_bytes(op, strategies, bits)
        return self.cache[key]

    def result_bytes(self, op: Op, strategies: list[State], bits: int) -> Costs:
        factors = [f for dim in op.rule.results[0] for f in dim]
        elements = [math.prod(local[f] for f in factors) for local in (self.local(op, s) for s in strategies)]
        return np.array(elements, float) * bits / 8

    def accumulated_bytes(self, op: Op, strategies: list[State], bits: int) -> Costs:
        key = ("total", op.rule, id(strategies), bits)
        if key not in self.cache:
            self.cache[key] = np.array([math.prod(self.local(op, s)) for s in strategies], float) * bits / 8
        return self.cache[key]

    def local_bytes(self, group: int, domains: list[list[State]], bits: float) -> Costs:
        shape = self.groups.shapes[group]
        key = ("bytes", shape, id(domains[group]), bits)
        if key not in self.cache:
            self.cache[key] = self.elements(shape, domains[group]) * (bits / 8)
        return self.cache[key]


def _local_elements(dims: tuple[tuple[int, ...], ...], local: list[int], shape: tuple[int, ...]) -> int:
    """Elements that a device has of a tensor; the factor of a dim that is sliced has the size from before the slice."""
    return math.prod(min(n, math.prod(local[f] for f in dim)) for dim, n in zip(dims, shape, strict=True))


def _touched(name: str, nbytes: list[float]) -> float:
    """Bytes that an op moves through memory, given those of its operands and its result on one device.

    Gathers and slices read what they return; scatters and slice updates read and write what they are given, the
    scatter in a buffer that is filled first.
    """
    match name:
        case "stablehlo.gather" | "stablehlo.dynamic_slice":
            return 2 * nbytes[-1]
        case "stablehlo.scatter":
            return nbytes[-1] + 2 * nbytes[2]
        case "stablehlo.dynamic_update_slice":
            return 2 * nbytes[1]
        case "stablehlo.add":  # of contractions: matmuls add to what is there, which costs one more read
            return nbytes[0]
        case _:
            return sum(nbytes)


def _turned(op: Op, local: list[int]) -> bool:
    """Whether the left side of a contraction is contracted over another than its last dim."""
    return op.name in _CONTRACTIONS and any(local[f] > 1 for f in _behind(op, local))


def _makes_window(op: Op, local: list[int]) -> bool:
    """Whether a convolution makes the gradient of a window: images are contracted, and channels lie behind them."""
    return any(local[f] > 1 for f in _behind(op, local) - op.rule.fixed)


def _behind(op: Op, local: list[int]) -> frozenset[int]:
    """The factors of the left side behind its last dim that is contracted; none if none is."""
    dims = op.rule.operands[0]
    contracted = [k for k, d in enumerate(dims) if any(local[f] > 1 for f in d) and set(d) & op.rule.reduction]
    return frozenset(f for d in dims[contracted[-1] + 1 :] for f in d) if contracted else frozenset()


def _copied(op: Op, local: list[int]) -> int:
    """Elements that are copied where the left side is `_turned`: of convolutions both sides; matrices are not."""
    if not _turned(op, local) or _matrices(op):
        return 0
    return _elements(op, local, 2 if op.name == "stablehlo.convolution" else 1)


def _odd_taps(op: Op, local: list[int], flops: float) -> float:
    """Positions of a convolution's result times those of its window, if these go over an odd number of channels."""
    left, right, result = ({f for dim in dims for f in dim} for dims in (*op.rule.operands, op.rule.results[0]))
    channels = math.prod(local[f] for f in left & right & op.rule.reduction)
    features = max(1, math.prod(local[f] for f in (right & result) - left))
    return flops / (2 * channels * features) if channels % 2 and channels > 1 else 0.0


def _elements(op: Op, local: list[int], operands: int) -> int:
    """Elements that a device has of the first operands together."""
    return sum(math.prod(local[f] for dim in dims for f in dim) for dims in op.rule.operands[:operands])


def _matrices(op: Op) -> bool:
    """Whether an op multiplies two matrices."""
    return op.name in _MATMULS and all(len(dims) == 2 for dims in op.rule.operands[:2])


def _factor_shards(rule: Rule, strategy: State, mesh: tuple[int, ...]) -> list[int]:
    shards = [1] * len(rule.sizes)
    for axis, factor in enumerate(strategy):
        if factor >= 0:
            shards[factor] *= mesh[axis]
    return shards


def _compound_fits(rule: Rule, dim: tuple[int, ...], strategy: State, shards: list[int]) -> bool:
    """Whether a dim of several factors can be split so: minor factors only when all major ones are split whole."""
    wide = [f for f in dim if rule.sizes[f] > 1]
    if len(wide) < 2:
        return True
    order = [axis for f in wide for axis, factor in enumerate(strategy) if factor == f]
    if order != sorted(order):
        return False
    for k, factor in enumerate(wide):
        if rule.sizes[factor] % shards[factor]:
            return False
        if shards[factor] > 1 and any(shards[f] != rule.sizes[f] for f in wide[:k]):
            return False
    return True


def port_state(rule: Rule, port: Port, strategy: State, shape: tuple[int, ...]) -> State:
    """The state that a strategy needs at an operand, or makes at a result (partial sums included)."""
    dims = (rule.results if port.result else rule.operands)[port.port]
    place = {f: k for k, d in enumerate(wide_dims(shape)) for f in dims[d]}
    left = PARTIAL if port.result else WHOLE
    return tuple(PARTIAL if f == PARTIAL else place.get(f, left if f in rule.reduction else WHOLE) for f in strategy)
