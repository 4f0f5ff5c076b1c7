"""Rewrites a sum of contractions so that it is reduced once: `a·b + c·d` over a split dim, one collective.

XLA has no layout for "each device holds a summand". An explicit one does as well: a leading dim as large as the
mesh axis and split over it. So a contraction over `k`, split over n devices,

    [i, k] · [k, j] -> [i, j]       becomes       [n, i, k/n] · [n, k/n, j] -> [n, i, j],

which needs no communication; what follows (transposes, conversions, additions) carries the leading dim along; and
the sum over it at the end is the only all-reduce or reduce-scatter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy
from jax.extend.mlir.dialects import stablehlo as hlo

from alpa_like.errors import PlanError
from alpa_like.graph import Rule
from alpa_like.plan import Accumulator, PartialSum, Spec, StagePlan
from alpa_like.stablehlo import Reading

__all__ = ["hold_back", "hold_share"]


def hold_back(reading: Reading, total: PartialSum, stage: StagePlan, attribute: Callable[[Spec], Any]) -> None:
    """Replace the result of `total.op` by a sum that is reduced once. The old ops are left without readers."""
    add = reading.handles[total.op]
    result = add.results[0]
    with ir.InsertionPoint.after(add):
        writer = _Expansion(reading, total, stage, attribute)
        value = _reduce(writer.merged(writer.add(add)), 1, result.type)
    result.replace_all_uses_with(value)


def hold_share(
    reading: Reading, share: Accumulator, stage: StagePlan, attribute: Callable[[Spec], Any], returned: Any
) -> None:
    """Add each device's own summand to the accumulator, in place of the pad that stands for them."""
    pad = returned.operands[share.result].owner.operands[1].owner
    if pad.name == "stablehlo.convert":
        pad = pad.operands[0].owner
    if pad.name != "stablehlo.pad":
        raise PlanError(
            f"stage {stage.name} accumulates result {share.result} in another way than planned; plan it again"
        )
    value = pad.operands[0].owner.operands[0]
    with ir.InsertionPoint.after(pad):
        writer = _Expansion(reading, PartialSum(-1, share.axes, share.spec, share.splits), stage, attribute)
        summands = writer.pinned(writer.expand(value), share.spec)
    pad.results[0].replace_all_uses_with(summands)


@dataclass
class _Expansion:
    """Rebuilds values with one leading dim per axis of `total`."""

    reading: Reading
    total: PartialSum
    stage: StagePlan
    attribute: Callable[[Spec], Any]

    def __post_init__(self) -> None:
        self.sizes = tuple(self.stage.mesh_shape[a] for a in self.total.axes)
        self.by_op = {self.reading.handles[op]: (op, factors) for op, factors in self.total.splits}
        self.operand_specs = {(p.op, p.port): p.path[-1] for p in self.stage.pins if not p.result}

    def expand(self, value: Any) -> Any:
        """`value` with the leading dims."""
        op = value.owner
        match op.name:
            case "stablehlo.dot_general":
                return self.dot(op, *self.by_op[op])
            case "stablehlo.scatter":
                return self.scatter(op, *self.by_op[op])
            case "stablehlo.reduce":
                return self.reduce(op, *self.by_op[op])
            case "stablehlo.add":
                return self.add(op)
            case "stablehlo.transpose":
                return self.transpose(op)
            case "stablehlo.reshape":
                return _reshape(self.expand(op.operands[0]), (*self.sizes, *value.type.shape))
            case "stablehlo.convert":
                inner = self.expand(op.operands[0])
                return hlo.convert(_typed(inner.type.shape, value.type.element_type), inner)
            case _:
                raise PlanError(f"the plan holds back a partial sum of {op.name}, which this version can't")

    def add(self, op: Any) -> Any:
        left, right = (self.pinned(self.expand(v), self.total.spec) for v in op.operands)
        return hlo.add(left, right)

    def merged(self, value: Any) -> Any:
        """The leading dims as one, so that the sum over it is one collective over all axes."""
        whole = _reshape(value, (math.prod(self.sizes), *value.type.shape[len(self.sizes) :]))
        return sdy.ShardingConstraintOp(whole, self.attribute((self.total.axes, *self.total.spec))).result

    def pinned(self, value: Any, spec: Spec) -> Any:
        full = (*((a,) for a in self.total.axes), *spec)
        return sdy.ShardingConstraintOp(value, self.attribute(full)).result

    def transpose(self, op: Any) -> Any:
        count = len(self.sizes)
        order = [*range(count), *(count + int(p) for p in ir.DenseI64ArrayAttr(op.attributes["permutation"]))]
        return hlo.transpose(self.expand(op.operands[0]), ir.DenseI64ArrayAttr.get(order))

    def split(self, op_id: int, port: int, factors: Sequence[int], rule: Rule) -> Any:
        """Operand `port` of an op with the part of its dims that the axes split moved to the front."""
        value = self.reading.handles[op_id].operands[self.reading.ports[op_id][port]]
        spec = self.operand_specs.get((op_id, port), ((),) * len(value.type.shape))
        shape: list[int] = []
        front: dict[int, int] = {}
        for dim, size in enumerate(value.type.shape):
            mine = [k for k, f in enumerate(factors) if f in rule.operands[port][dim]]
            for k in mine:
                front[k] = len(shape)
                shape.append(self.sizes[k])
                size //= self.sizes[k]
            shape.append(size)
        rest = [i for i in range(len(shape)) if i not in front.values()]
        order = [*(front[k] for k in range(len(factors))), *rest]
        moved = hlo.transpose(_reshape(value, shape), ir.DenseI64ArrayAttr.get(order))
        left = tuple(tuple(a for a in axes if a not in self.total.axes) for axes in spec)
        return self.pinned(moved, left)

    def dot(self, op: Any, op_id: int, factors: tuple[int, ...]) -> Any:
        rule = self.reading.graph.ops[op_id].rule
        left, right = (self.split(op_id, port, factors, rule) for port in (0, 1))
        old = hlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
        count = len(factors)
        numbers = hlo.DotDimensionNumbers.get(
            [*range(count), *_shifted(old.lhs_batching_dimensions, count)],
            [*range(count), *_shifted(old.rhs_batching_dimensions, count)],
            _shifted(old.lhs_contracting_dimensions, count),
            _shifted(old.rhs_contracting_dimensions, count),
        )
        attributes = dict(_attributes(op))
        attributes["dot_dimension_numbers"] = numbers
        return _create(op, [left, right], self.lifted(op), attributes)

    def scatter(self, op: Any, op_id: int, factors: tuple[int, ...]) -> Any:
        rule = self.reading.graph.ops[op_id].rule
        indices, updates = (self.split(op_id, port, factors, rule) for port in (1, 2))
        old = hlo.ScatterDimensionNumbers(op.attributes["scatter_dimension_numbers"])
        count = len(factors)
        numbers = hlo.ScatterDimensionNumbers.get(
            _shifted(old.update_window_dims, count),
            _shifted(old.inserted_window_dims, count),
            [*range(count), *_shifted(old.input_batching_dims, count)],
            [*range(count), *_shifted(old.scatter_indices_batching_dims, count)],
            _shifted(old.scattered_dims_to_operand_dims, count),
            old.index_vector_dim + count,
        )
        attributes = dict(_attributes(op))
        attributes["scatter_dimension_numbers"] = numbers
        return _create(op, [self.first_only(op.operands[0]), indices, updates], self.lifted(op), attributes)

    def reduce(self, op: Any, op_id: int, factors: tuple[int, ...]) -> Any:
        operand = self.split(op_id, 0, factors, self.reading.graph.ops[op_id].rule)
        attributes = dict(_attributes(op))
        dims = _shifted((int(d) for d in ir.DenseI64ArrayAttr(op.attributes["dimensions"])), len(factors))
        attributes["dimensions"] = ir.DenseI64ArrayAttr.get(dims)
        return _create(op, [operand, op.operands[1]], self.lifted(op), attributes)

    def lifted(self, op: Any) -> Any:
        kind = op.results[0].type
        return _typed((*self.sizes, *kind.shape), kind.element_type)

    def first_only(self, value: Any) -> Any:
        """What a scatter adds to, for the first summand; zeros for the others, so that it counts once."""
        shape, kind = (*self.sizes, *value.type.shape), value.type.element_type
        count = len(self.sizes)
        wide = hlo.broadcast_in_dim(
            _typed(shape, kind), value, ir.DenseI64ArrayAttr.get(list(range(count, len(shape))))
        )
        zero = hlo.constant(ir.DenseElementsAttr.get_splat(_typed(shape, kind), _zero(kind)))
        mask = np.zeros(self.sizes, np.bool_)
        mask.flat[0] = True
        flags = hlo.constant(
            ir.DenseElementsAttr.get(memoryview(mask.data), type=ir.IntegerType.get_signless(1), shape=list(self.sizes))
        )
        spread = hlo.broadcast_in_dim(
            _typed(shape, ir.IntegerType.get_signless(1)), flags, ir.DenseI64ArrayAttr.get(list(range(count)))
        )
        return self.pinned(hlo.select(spread, wide, zero), ((),) * len(value.type.shape))


def _shifted(dims: Iterable[int], count: int) -> list[int]:
    return [d + count for d in dims]


def _typed(shape: Iterable[int], element: Any) -> Any:
    return ir.RankedTensorType.get(list(shape), element)


def _reshape(value: Any, shape: Iterable[int]) -> Any:
    return hlo.reshape(_typed(shape, value.type.element_type), value)


def _zero(kind: Any) -> Any:
    return ir.FloatAttr.get(kind, 0.0) if isinstance(kind, ir.FloatType) else ir.IntegerAttr.get(kind, 0)


def _attributes(op: Any) -> list[tuple[str, Any]]:
    return [(name, op.attributes[name]) for name in op.attributes if name != "sdy.sharding_rule"]


def _create(op: Any, operands: list[Any], result: Any, attributes: dict[str, Any]) -> Any:
    """An op like `op` on other operands; its region is copied."""
    new = ir.Operation.create(
        op.name, results=[result], operands=operands, attributes=attributes, regions=len(op.regions), loc=op.location
    )
    for source, target in zip(op.regions, new.regions, strict=True):
        block = source.blocks[0]
        copied = target.blocks.append(*(a.type for a in block.arguments), arg_locs=[op.location] * len(block.arguments))
        values = dict(zip(block.arguments, copied.arguments, strict=True))
        for view in block.operations:
            clone = view.operation.clone(ir.InsertionPoint(copied))
            for i, v in enumerate(clone.operands):
                clone.operands[i] = values.get(v, v)
            values.update(zip(view.operation.results, clone.results, strict=True))
    return new.results[0]


def _reduce(value: Any, count: int, result: Any) -> Any:
    """The sum over the leading dims."""
    element = result.element_type
    scalar = _typed((), element)
    zero = hlo.constant(ir.DenseElementsAttr.get_splat(scalar, _zero(element)))
    op = hlo.ReduceOp([result], [value], [zero], ir.DenseI64ArrayAttr.get(list(range(count))))
    block = op.regions[0].blocks.append(scalar, scalar)
    with ir.InsertionPoint(block):
        hlo.return_([hlo.add(block.arguments[0], block.arguments[1])])
    return op.results[0]
