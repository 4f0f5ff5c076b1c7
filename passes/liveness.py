"""When each tensor takes memory, and how often it goes through it: a model of what XLA's fusion leaves.

A result of an element-wise op is materialized only if an op that can't be fused reads it, if the program returns it,
or if it is read twice and is costly, or this compiler computes nothing again. What is not materialized takes no memory,
but keeps its inputs alive until it is read. Times are op numbers; the program is assumed to run in its own order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from alpa_like.graph import Op, OpGraph, batch_dims, meets_batch
from alpa_like.passes.groups import ACCUMULATE, Segments

__all__ = ["Flying", "Liveness"]

_FUSED = frozenset(
    f"stablehlo.{n}"
    for n in ("broadcast_in_dim", "reshape", "slice", "pad", "reverse", "iota", "constant", "dynamic_slice")
)
_COSTLY = frozenset(
    f"stablehlo.{n}"
    for n in ("exponential", "tanh", "log", "logistic", "power", "sqrt", "rsqrt", "divide", "sine", "cosine")
)
_READERS = frozenset(("stablehlo.reduce",))


@dataclass(frozen=True, slots=True)
class Flying:
    """How many micro-batches hold a tensor at once. The graph runs for one of them; the others have it all the time.

    Where ops of `start` to `end` run, which are those of the parts from the one that makes the tensor to the last that
    reads it, the one that they run for is one of `count`; elsewhere in `micro`, the ops of micro-batches, it is not.
    """

    count: float
    start: int
    end: int
    micro: tuple[int, int]

    @property
    def others(self) -> tuple[tuple[int, int, float], ...]:
        """Half-open times, and how many others hold the tensor then. The first of them is all of `micro`."""
        first, last = self.micro
        outside = ((first, self.start, 1.0), (self.end, last, 1.0)) if self.count >= 1 else ()
        return (first, last, max(0.0, self.count - 1)), *(time for time in outside if time[0] < time[1])


@dataclass(frozen=True)
class Liveness:
    """`donated` pairs arguments with the results that take their memory; `batch` are arguments with dim 0 the batch.

    `kept` are tensors that a part of the graph hands to another, compiled apart; `flying` are those of which several
    exist at a time, one per micro-batch in flight. `computes_again` is that of the cost model.
    """

    graph: OpGraph
    donated: frozenset[tuple[int, int]]
    batch: frozenset[int] = frozenset()
    segments: Segments = field(default_factory=Segments)
    kept: frozenset[int] = frozenset()
    flying: Mapping[int, Flying] = field(default_factory=dict[int, Flying])
    computes_again: bool = True

    @cached_property
    def waiting(self) -> frozenset[int]:
        """What lies on the path to the loss and back, where one op waits for another.

        That is what has a batch dim, and what is made of such and meets the batch again: statistics of a batch norm.
        """
        found, made = set(batch_dims(self.graph, self.batch)), set(self.batch)
        for op in self.graph.ops:
            if not made.isdisjoint(op.operands):
                made.update(op.results)
        return frozenset(found | made & meets_batch(self.graph, self.batch))

    @cached_property
    def stored(self) -> frozenset[int]:
        return frozenset((*self.graph.arguments, *self.graph.results)) | self.kept

    @cached_property
    def replaced(self) -> frozenset[int]:
        """Results that are written into a donated argument."""
        return frozenset(self.graph.results[r] for _, r in self.donated)

    @cached_property
    def materialized(self) -> tuple[bool, ...]:
        return tuple(self._materialized(t.id) for t in self.graph.tensors)

    def _materialized(self, tensor: int) -> bool:
        maker = self.graph.tensors[tensor].op
        if maker < 0:
            return True
        op = self.graph.ops[maker]
        if tensor in self.stored and op.name != ACCUMULATE:
            return True
        if op.name in ("stablehlo.constant", "stablehlo.iota", "barrier", ACCUMULATE):
            return False  # a barrier's result is its operand
        if not _fusible(op):
            return True
        readers = [self.graph.ops[u] for u, _ in self.graph.uses[tensor]]
        if any(not _reads_in_fusion(r) for r in readers):
            return True
        return len({r.id for r in readers}) > 1 and (op.name in _COSTLY or self._kept_for_readers(op))

    def _kept_for_readers(self, op: Op) -> bool:
        """Whether what several ops read is kept for them; what is made of scalars alone, and reshapes, cost nothing."""
        free = op.name == "stablehlo.reshape" or all(not self.graph.tensors[t].shape for t in op.operands)
        return not (self.computes_again or free)

    @cached_property
    def last_use(self) -> tuple[int, ...]:
        """The op that reads a tensor last, itself or through what is fused; the end for results."""
        end = len(self.graph.ops)
        last = [-1] * len(self.graph.tensors)
        for result in self.graph.results:
            last[result] = end
        for op in reversed(self.graph.ops):
            through = max((last[t] for t in op.results if not self.materialized[t]), default=-1)
            for tensor in op.operands:
                last[tensor] = max(last[tensor], op.id, through)
        return tuple(last)

    def interval(self, tensor: int, version: str) -> tuple[int, int] | None:
        """Half-open time in which a version of a tensor takes memory, or None."""
        end = len(self.graph.ops) + 1
        maker = self.graph.tensors[tensor].op
        if version != "home":
            return self._shared_interval(tensor, version) if version.startswith("shared") else None
        if maker < 0:
            return (0, end)
        if not self.materialized[tensor] or tensor in self.replaced:
            return None
        last = self.last_use[tensor]
        if last < maker:
            return None
        in_place = last < len(self.graph.ops) and _fusible(self.graph.ops[last])
        return (maker, last + (0 if in_place else 1)) if last > maker else (maker, maker + 1)

    def _shared_interval(self, tensor: int, version: str) -> tuple[int, int]:
        """From the first to the last op of a part that is no element-wise op and reads the tensor."""
        segment = int(version.partition(" ")[2] or 0)
        everyone = [op for op, _ in self.graph.uses[tensor] if self.segments.of(op) == segment]
        readers = [op for op in everyone if not self.graph.ops[op].elementwise] or everyone
        return readers[0], readers[-1] + 1

    def passes(self, tensor: int) -> float:
        """How often a tensor goes through memory in element-wise work, as often as its op runs: one write, one read.

        Results of the program that nothing reads are written only; arguments are read by each op, as often as it runs.
        """
        maker = self.graph.tensors[tensor].op
        if maker < 0:
            readers = (self.graph.ops[op] for op in {op for op, _ in self.graph.uses[tensor]})
            return sum(op.count for op in readers if op.elementwise)
        op = self.graph.ops[maker]
        fills = all(not self.graph.tensors[t].shape for t in op.operands)  # the reader's cost includes the fill
        if not op.elementwise or not self.materialized[tensor] or fills:
            return 0.0
        return (2.0 if self.graph.uses[tensor] else 1.0) * op.count


def _fusible(op: Op) -> bool:
    return op.elementwise or op.name in _FUSED


def _reads_in_fusion(op: Op) -> bool:
    return _fusible(op) or op.name in _READERS
