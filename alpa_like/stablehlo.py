"""Reads a StableHLO module into an `OpGraph`, and remembers which MLIR op each `Op` came from.

Input: a module without calls whose ops carry `sdy.sharding_rule` (`annotate` sees to both).
The walk is deterministic, so two modules of one program give equal graphs and the plan made on one can be
enforced on the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.mlir import passmanager
from jax.extend.mlir.dialects import sdy
from jax.stages import Traced

from alpa_like.errors import GraphError
from alpa_like.graph import Op, OpGraph, Rule, Tensor, identity_rule
from alpa_like.inline import inline_calls, where

__all__ = ["Reading", "annotate", "graph_of", "read", "strip"]

_PIPELINE = "builtin.module(func.func(sdy-populate-op-sharding-rules))"
_FREE = ("stablehlo.constant", "stablehlo.iota", "stablehlo.partition_id")
_TERMINATORS = ("stablehlo.return", "func.return", "sdy.return")
_COMBINERS = ("add", "maximum", "minimum", "and", "or", "xor")
_NOT_ELEMENTWISE = ("chlo.top_k", "chlo.ragged_dot")


def graph_of(traced: Traced, platform: str | None) -> OpGraph:
    """The operator graph of a traced function as it is lowered for a platform, that of this process if None."""
    lowered = traced.lower() if platform is None else traced.lower(lowering_platforms=(platform,))
    module = lowered.compiler_ir("stablehlo")
    annotate(module)
    return read(module).graph


def annotate(module: Any) -> None:
    """Inline all calls and give every op its sharding rule, in place."""
    inline_calls(module)
    with module.context:
        passmanager.PassManager.parse(_PIPELINE).run(module.operation)


def strip(reading: Reading) -> None:
    """Take the sharding rules off again: the partitioner crashes on ops that carry one."""
    for handle in reading.handles:
        if "sdy.sharding_rule" in handle.attributes:
            del handle.attributes["sdy.sharding_rule"]


@dataclass(slots=True)
class Reading:
    """A graph and, per op, the MLIR operation; `ports[op]` gives the MLIR operand numbers of its operands.

    For a loop's `enter` and `yield` ops the operation is the `while` op or the body's terminator, for a `branch` op
    the `case` or `if`, whose regions end in the operands.
    """

    graph: OpGraph
    handles: list[Any]
    ports: list[tuple[int, ...]]


def read(module: Any) -> Reading:
    """The graph of the module's function `main`. Raises `GraphError` for manual (shard_map) computations."""
    reader = _Reader()
    block = next(op for op in module.body.operations if op.operation.name == "func.func").regions[0].blocks[0]
    arguments = tuple(reader.new_tensor(a, -1) for a in block.arguments)
    results = reader.walk(block, 1.0)
    graph = OpGraph(tuple(reader.tensors), tuple(reader.ops), arguments, tuple(results), tuple(reader.aliases))
    graph.verify()
    return Reading(graph, reader.handles, reader.ports)


@dataclass
class _Reader:
    tensors: list[Tensor] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    ports: list[tuple[int, ...]] = field(default_factory=list)
    aliases: list[tuple[int, int]] = field(default_factory=list)
    env: dict[Any, int] = field(default_factory=dict)
    rules: dict[Any, Rule] = field(default_factory=dict)
    types: dict[Any, tuple[tuple[int, ...], str]] = field(default_factory=dict)

    def new_tensor(self, value: Any, op: int) -> int:
        shape, dtype = self.type_of(value)
        self.tensors.append(Tensor(len(self.tensors), shape, dtype, op))
        self.env[value] = len(self.tensors) - 1
        return self.env[value]

    def type_of(self, value: Any) -> tuple[tuple[int, ...], str]:
        kind = value.type
        if kind not in self.types:
            shape = getattr(kind, "shape", ())
            dtype = str(kind.element_type) if hasattr(kind, "element_type") else "token"
            self.types[kind] = (tuple(shape), dtype)
        return self.types[kind]

    def walk(self, block: Any, count: float) -> list[int]:
        """Read the ops of a block; return the tensors that its terminator passes on."""
        for view in block.operations:
            op = view.operation
            if op.name in _TERMINATORS:
                return [self.env[v] for v in op.operands]
            self.step(op, count)
        return []

    def step(self, op: Any, count: float) -> None:
        match op.name:
            case "stablehlo.while":
                self.loop(op, count)
            case "stablehlo.case" | "stablehlo.if":
                self.branches(op, count)
            case "sdy.sharding_constraint":  # the user's, or one that JAX puts on random keys: no op of the program
                self.env[op.results[0]] = self.env[op.operands[0]]
            case "stablehlo.optimization_barrier":
                self.barrier(op, count)
            case "sdy.manual_computation":
                line = where(op.location, line=True)[1]
                raise GraphError(
                    f"the step contains a shard_map at {line}: expected a program for one device; remove the shard_map"
                )
            case _:
                self.plain(op, count)

    def plain(self, op: Any, count: float) -> None:
        rule, has_rule = self.rule_of(op)
        operands = [self.env[v] for v in op.operands]
        results = [self.new_tensor(r, len(self.ops)) for r in op.results]
        self.emit(op, op.name, operands, results, rule, count, has_rule, tuple(range(len(operands))))

    def emit(
        self,
        handle: Any,
        name: str,
        operands: Sequence[int],
        results: Sequence[int],
        rule: Rule,
        count: float,
        has_rule: bool = True,
        ports: tuple[int, ...] = (),
    ) -> None:
        source, line = where(handle.location, line=not has_rule)
        shapes = [self.tensors[t].shape for t in (*operands, *results)]
        carries = has_rule and name not in ("enter", "yield") and _carries_layout(rule, shapes)
        flops = _flops(handle, name, shapes, rule)
        op = Op(
            len(self.ops), name, tuple(operands), tuple(results), rule, count, flops, source, line, carries, has_rule
        )
        self.ops.append(op)
        self.handles.append(handle)
        self.ports.append(ports)

    def identity(self, handle: Any, name: str, operand: int, result: int, count: float, port: int) -> None:
        self.emit(handle, name, [operand], [result], identity_rule(self.tensors[result].shape), count, True, (port,))

    def loop(self, op: Any, count: float) -> None:
        """A `while`: `enter` ops before, the body once with its trip count, `yield` ops behind it.

        The carry in the body and the result of the loop are one value in storage. What the body hands on
        unchanged (stacked parameters, say) is read where it is: it needs neither `enter` nor `yield`.
        """
        condition, body = (region.blocks[0] for region in op.regions)
        last = body.operations[len(body.operations) - 1].operation
        constant = [value == arg for value, arg in zip(last.operands, body.arguments, strict=True)]
        for i, (init, arg) in enumerate(zip(op.operands, body.arguments, strict=True)):
            source = self.env[init]
            if constant[i]:
                self.env[arg] = source
            else:
                self.identity(op, "enter", source, self.new_tensor(arg, len(self.ops)), count, i)
            self.env[condition.arguments[i]] = self.env[arg]
        trips = count * _trip_count(op)
        self.walk(condition, trips)
        yielded = self.walk(body, trips)
        for i, (value, result) in enumerate(zip(yielded, op.results, strict=True)):
            if constant[i]:
                self.env[result] = self.env[op.operands[i]]
                continue
            out = self.new_tensor(result, len(self.ops))
            self.aliases.append((self.env[body.arguments[i]], out))
            self.identity(last, "yield", value, out, trips, i)

    def branches(self, op: Any, count: float) -> None:
        """A `case` or `if`: every branch is counted once; its results carry one sharding."""
        yields = [self.walk(region.blocks[0], count) for region in op.regions]
        for i, (result, *values) in enumerate(zip(op.results, *yields, strict=True)):
            out = self.new_tensor(result, len(self.ops))
            dims = identity_rule(self.tensors[out].shape)
            rule = Rule(dims.sizes, dims.operands * len(values), dims.results)
            self.emit(op, "branch", values, [out], rule, count, True, (i,) * len(values))

    def barrier(self, op: Any, count: float) -> None:
        for i, (operand, result) in enumerate(zip(op.operands, op.results, strict=True)):
            source = self.env[operand]
            self.identity(op, "barrier", source, self.new_tensor(result, len(self.ops)), count, i)

    def rule_of(self, op: Any) -> tuple[Rule, bool]:
        if "sdy.sharding_rule" in op.attributes:
            attribute = op.attributes["sdy.sharding_rule"]
            if attribute not in self.rules:
                self.rules[attribute] = _parse_rule(attribute)
            rule = self.rules[attribute]
            if op.name == "stablehlo.convolution":
                rule = _with_windows(rule, [self.type_of(v)[0] for v in (*op.operands, *op.results)])
            return _restrict(op, rule), True
        ins = [self.type_of(v)[0] for v in op.operands]
        outs = [self.type_of(v)[0] for v in op.results]
        if op.name in _FREE and len(outs) == 1:
            return Rule(outs[0], (), identity_rule(outs[0]).results), True
        if _same_shapes(op.name, ins, outs):
            one = identity_rule(outs[0])
            return Rule(one.sizes, one.operands * len(ins), one.results), True
        return _replicated(ins, outs), not any(math.prod(s) > 1 for s in (*ins, *outs))


def _same_shapes(name: str, ins: list[tuple[int, ...]], outs: list[tuple[int, ...]]) -> bool:
    """CHLO functions (`erf`, `square`, …) carry no rule, but are elementwise when all shapes agree."""
    if not name.startswith("chlo."):
        return False
    return name not in _NOT_ELEMENTWISE and len(outs) == 1 and bool(ins) and all(s == outs[0] for s in ins)


def _replicated(ins: list[tuple[int, ...]], outs: list[tuple[int, ...]]) -> Rule:
    sizes: list[int] = []
    dims: list[tuple[tuple[int, ...], ...]] = []
    for shape in (*ins, *outs):
        dims.append(tuple((len(sizes) + i,) for i in range(len(shape))))
        sizes.extend(shape)
    return Rule(tuple(sizes), tuple(dims[: len(ins)]), tuple(dims[len(ins) :]), fixed=frozenset(range(len(sizes))))


def _parse_rule(attribute: Any) -> Rule:
    rule = sdy.OpShardingRuleAttr(attribute)

    def tensors(mappings: Any) -> tuple[tuple[tuple[int, ...], ...], ...]:
        return tuple(
            tuple(tuple(sdy.DimMappingAttr(d).factor_indices) for d in sdy.TensorMappingAttr(m).dim_mappings)
            for m in mappings
        )

    fixed = (*rule.need_replication_factors, *rule.permutation_factors, *rule.blocked_propagation_factors)
    return Rule(
        tuple(rule.factor_sizes),
        tensors(rule.operand_mappings),
        tensors(rule.result_mappings),
        frozenset(rule.reduction_factors) - frozenset(fixed),
        frozenset(fixed),
    )


def _with_windows(rule: Rule, shapes: list[tuple[int, ...]]) -> Rule:
    """The rule of a convolution with a fixed factor for each dim of its window; those of Shardy's rules are smaller."""
    sizes, tensors = list(rule.sizes), [list(dims) for dims in (*rule.operands, *rule.results)]
    for dims, shape in zip(tensors, shapes, strict=True):
        for k, size in enumerate(shape):
            if math.prod(sizes[f] for f in dims[k]) < size:
                dims[k] = (len(sizes),)
                sizes.append(size)
    operands, results = tensors[: len(rule.operands)], tensors[len(rule.operands) :]
    fixed = rule.fixed | frozenset(range(len(rule.sizes), len(sizes)))
    return Rule(tuple(sizes), tuple(map(tuple, operands)), tuple(map(tuple, results)), rule.reduction, fixed)


def _restrict(op: Any, rule: Rule) -> Rule:
    """Keep whole what the partitioner can't split although the rule would allow it.

    A reduction over several operands, or with a combiner that no collective has; a dim that an update
    writes in part.
    """
    fixed = set(rule.fixed)
    if rule.reduction and len(op.regions) and not _has_plain_combiner(op):
        fixed |= rule.reduction
    # The partitioner writes into every part, not only into one, unless it adds and has more than one index.
    if op.name == "stablehlo.scatter" and (not _adds(op) or _writes_once(rule)):
        fixed |= set(range(len(rule.sizes))) - {f for dim in rule.operands[2] for f in dim} | rule.reduction
    if op.name == "stablehlo.convolution":  # strided and dilated windows that are cut give wrong numbers
        fixed |= _window_factors(op, rule)
    if op.name == "stablehlo.convolution" and _grouped(op):  # the partitioner aborts on groups that it has to cut
        left, right = ({f for dim in dims for f in dim} for dims in rule.operands)
        fixed |= set(range(len(rule.sizes))) - ((left - right) & {f for dim in rule.results[0] for f in dim})
    if op.name == "stablehlo.custom_call":  # LAPACK and the like: each call works on whole matrices
        fixed |= {f for dims in (*rule.operands, *rule.results) for dim in dims[-2:] for f in dim}
    if op.name == "stablehlo.dynamic_update_slice":
        fixed |= set(range(len(rule.sizes))) - {f for dim in rule.operands[1] for f in dim}
    if op.name == "stablehlo.concatenate" or frozenset(fixed) == rule.fixed:
        return rule
    return Rule(rule.sizes, rule.operands, rule.results, rule.reduction - fixed, frozenset(fixed))


def _window_factors(op: Any, rule: Rule) -> set[int]:
    """The factors of the dims that the window moves over, and of the window itself."""
    labels = re.findall(r"\[([^\]]*)\]", str(op.attributes["dimension_numbers"]))
    tensors = zip(labels, (*rule.operands, *rule.results), strict=True)
    return {
        f
        for names, dims in tensors
        for name, dim in zip(names.split(", "), dims, strict=True)
        if name.isdigit()
        for f in dim
    }


def _grouped(op: Any) -> bool:
    counts = (op.attributes[f"{kind}_group_count"] for kind in ("batch", "feature"))
    return any(not str(count).startswith("1 ") for count in counts)


def _adds(op: Any) -> bool:
    body = [view.operation.name for view in op.regions[0].blocks[0].operations]
    return body == ["stablehlo.add", "stablehlo.return"]


def _writes_once(rule: Rule) -> bool:
    """Whether a scatter has one index: no dim of the updates runs over several."""
    indices, updates = ({f for dim in rule.operands[k] for f in dim} for k in (1, 2))
    return not any(rule.sizes[f] > 1 for f in indices & updates)


def _has_plain_combiner(op: Any) -> bool:
    body = [view.operation.name for view in op.regions[0].blocks[0].operations]
    return len(body) == 2 and body[0].removeprefix("stablehlo.") in _COMBINERS


def _carries_layout(rule: Rule, shapes: list[tuple[int, ...]]) -> bool:
    """Whether every tensor of the op has the same split dims: the op then takes any sharding as it is.

    Scalars and other tensors of one element don't count.
    """
    if rule.reduction or any(rule.sizes[f] > 1 for f in rule.fixed):
        return False
    tensors = zip((*rule.operands, *rule.results), shapes, strict=True)
    seen = [_single_factors(rule, dims, shape) for dims, shape in tensors if math.prod(shape) > 1]
    return all(s is not None and s == seen[0] for s in seen)


def _single_factors(rule: Rule, dims: tuple[tuple[int, ...], ...], shape: tuple[int, ...]) -> frozenset[int] | None:
    """The factors of the dims with more than one element, None if they are not one whole factor each."""
    found: set[int] = set()
    for dim, size in zip(dims, shape, strict=True):
        wide = [f for f in dim if rule.sizes[f] > 1]
        if math.prod(rule.sizes[f] for f in wide) != size or len(wide) > 1 or found & set(wide):
            return None
        found.update(wide)
    return frozenset(found)


def _flops(handle: Any, name: str, shapes: list[tuple[int, ...]], rule: Rule) -> float:
    """Floating-point operations of one execution: 2 per multiply-add of contractions, 1 per element otherwise.

    What only takes out or puts in a part has none, however large the whole is. The zeros between the elements of a
    dilated left side, which the gradient of a convolution with strides has, are counted: kernels skip them, but take
    half to three quarters of the time that all of it would take (XLA's CPU backend), not a quarter.
    """
    if name in ("stablehlo.dynamic_slice", "stablehlo.dynamic_update_slice", "stablehlo.gather"):
        return 0.0
    if name in ("stablehlo.dot_general", "stablehlo.dot"):
        return 2.0 * math.prod(rule.sizes)
    if name == "stablehlo.convolution":
        numbers = re.search(r"x\[([^\]]*)\]->", str(handle.attributes["dimension_numbers"]))
        features = max(1, shapes[1][numbers[1].split(", ").index("o")]) if numbers else 1
        return 2.0 * math.prod(shapes[2]) * math.prod(shapes[1]) / features
    return float(max((math.prod(s) for s in shapes), default=0))


def _constant_int(value: Any) -> int | None:
    """The integer that a scalar `stablehlo.constant` gives, else None."""
    owner = value.owner
    if getattr(owner, "name", None) != "stablehlo.constant":
        return None
    found = re.search(r"dense<(-?\d+)>", str(owner.attributes["value"]))
    return int(found[1]) if found else None


def _trip_count(op: Any) -> float:
    """How often a counted loop runs (from 0 or another constant, step by step, while less than a bound); else 1."""
    condition, body = (region.blocks[0] for region in op.regions)
    compare = condition.operations[len(condition.operations) - 1].operation.operands[0].owner
    if getattr(compare, "name", "") != "stablehlo.compare" or "LT" not in str(
        compare.attributes["comparison_direction"]
    ):
        return 1.0
    for i, arg in enumerate(condition.arguments):
        if arg == compare.operands[0]:
            bound, start = _constant_int(compare.operands[1]), _constant_int(op.operands[i])
            step = _step(body, i)
            if bound is not None and start is not None and step:
                return float(max(0, math.ceil((bound - start) / step)))
    return 1.0


def _step(body: Any, index: int) -> int | None:
    """What the body adds to its argument `index` in each iteration, if that is a constant."""
    add = body.operations[len(body.operations) - 1].operation.operands[index].owner
    if getattr(add, "name", "") != "stablehlo.add" or body.arguments[index] not in list(add.operands):
        return None
    steps = [_constant_int(v) for v in add.operands if v != body.arguments[index]]
    return steps[0] if steps else None
