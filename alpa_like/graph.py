"""`OpGraph`: the tensors and ops of one traced program, and for each op its factors.

A *factor* is a group of dims, over operands and results of one op, that must be split together; the rules
come from Shardy's pass `sdy-populate-op-sharding-rules`, so a new StableHLO op needs no code here.

Loops and branches are flattened: the body of a loop appears once, its ops with `count` = trip count, and
identity ops of kind `enter` and `yield` stand where a value passes into or out of the body. Calls are
stepped into. Tensors and ops are numbered in program order, so the numbering is the same in every process.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from alpa_like.errors import GraphError

__all__ = ["Op", "OpGraph", "Rule", "Tensor", "batch_dims", "dtype_bits", "identity_rule", "meets_batch", "skeleton"]

_SPECIAL_BITS = {"i1": 8, "complex<f32>": 64, "complex<f64>": 128}


def dtype_bits(dtype: str) -> int:
    """Bits that one element takes in memory; `dtype` is an MLIR element type such as `f32`, `ui8`, `f8E4M3FN`."""
    if dtype in _SPECIAL_BITS:
        return _SPECIAL_BITS[dtype]
    digits = ""
    for char in dtype.removeprefix("bf").lstrip("uifsc"):
        if not char.isdigit():
            break
        digits += char
    return int(digits) if digits else 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """One value of the program. `op` is the index of the op that makes it, -1 for an argument."""

    id: int
    shape: tuple[int, ...]
    dtype: str
    op: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * dtype_bits(self.dtype) // 8


@dataclass(frozen=True, slots=True)
class Rule:
    """Which dims of an op belong to which factor: `([i, k], [k, j])->([i, j]) {i=8, j=4, k=2} reduction={k}`.

    `operands[o][d]` and `results[r][d]` are the factors of one dim, major to minor. A split factor of
    `reduction` leaves a partial sum on every result that doesn't have it. Factors of `fixed` can't be split.
    """

    sizes: tuple[int, ...]
    operands: tuple[tuple[tuple[int, ...], ...], ...]
    results: tuple[tuple[tuple[int, ...], ...], ...]
    reduction: frozenset[int] = frozenset()
    fixed: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        used = {f for t in (*self.operands, *self.results) for dim in t for f in dim}
        if not used <= set(range(len(self.sizes))):
            raise GraphError(f"a sharding rule names factors {sorted(used)}, but has only {len(self.sizes)} sizes")

    def __str__(self) -> str:
        def dims(tensor: tuple[tuple[int, ...], ...]) -> str:
            return "[" + ", ".join("".join(f"f{f}" for f in dim) for dim in tensor) + "]"

        left, right = (", ".join(map(dims, side)) for side in (self.operands, self.results))
        return f"({left})->({right})"


def identity_rule(shape: tuple[int, ...]) -> Rule:
    """One operand, one result, every dim a factor of its own."""
    dims = tuple((i,) for i in range(len(shape)))
    return Rule(shape, (dims,), (dims,))


@dataclass(frozen=True, slots=True)
class Op:
    """One operation, executed `count` times in a step.

    `source` is the name stack of the equation it came from; `line` the user's file and line, where it has no rule.
    `flops` are those of one execution, unsplit. `elementwise` says that all operands and results have the
    same dims, so that they carry one sharding along. `linear` says that it maps partial sums to partial sums.
    `depends` lists scalar operands too; `operands` only those that the rule mentions.
    """

    id: int
    name: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    rule: Rule
    count: float
    flops: float
    source: str
    line: str
    elementwise: bool = False
    has_rule: bool = True


@dataclass(frozen=True)
class OpGraph:
    """All tensors and ops of a program. Invariant: every operand is made before it is used.

    `arguments` and `results` are tensor ids in the order of the program's flat arguments and results.
    `aliases` pairs tensors that are one value in storage (loop carries), so must have one sharding.

    >>> str(graph)                                                              # doctest: +SKIP
    't2 = stablehlo.dot_general t0 t1 ([f0, f2], [f2, f1])->([f0, f1])'
    """

    tensors: tuple[Tensor, ...]
    ops: tuple[Op, ...]
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    aliases: tuple[tuple[int, int], ...] = ()

    def verify(self) -> None:
        """Raise `GraphError` where a tensor is used before it is made, or an op doesn't fit its rule."""
        made = set(self.arguments)
        for op in self.ops:
            self._verify_op(op, made)
            made.update(op.results)
        missing = set(self.results) - made
        if missing:
            raise GraphError(f"results {sorted(missing)} are made by no op")

    def _verify_op(self, op: Op, made: set[int]) -> None:
        if not set(op.operands) <= made:
            raise GraphError(f"op {op.id} ({op.name}) reads tensors {set(op.operands) - made} before they are made")
        for ids, dims in ((op.operands, op.rule.operands), (op.results, op.rule.results)):
            ranks = [len(self.tensors[t].shape) for t in ids]
            if ranks != [len(d) for d in dims]:
                raise GraphError(f"op {op.id} ({op.name}): tensors of ranks {ranks} do not fit the rule {op.rule}")

    @cached_property
    def uses(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each tensor the (op, operand number) pairs that read it, in program order."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.tensors]
        for op in self.ops:
            for port, tensor in enumerate(op.operands):
                found[tensor].append((op.id, port))
        return tuple(tuple(u) for u in found)

    @cached_property
    def digest(self) -> str:
        """Content hash of the whole graph: equal for equal programs in every process."""
        text = hashlib.sha256()
        for line in self._lines():
            text.update(line.encode())
        return text.hexdigest()[:16]

    @property
    def unruled(self) -> tuple[Op, ...]:
        """Ops that Shardy gives no rule for; they are replicated."""
        return tuple(op for op in self.ops if not op.has_rule)

    def _lines(self) -> Iterator[str]:
        yield f"args {self.arguments} results {self.results} aliases {self.aliases}\n"
        for op in self.ops:
            kinds = [(self.tensors[t].shape, self.tensors[t].dtype) for t in op.results]
            whole = sorted(op.rule.reduction), sorted(op.rule.fixed)
            yield f"{op.results} = {op.name} {op.operands} {op.rule} {whole} {op.count} {kinds}\n"

    def __str__(self) -> str:
        def line(op: Op) -> str:
            left, right = (" ".join(f"t{t}" for t in ids) for ids in (op.results, op.operands))
            return f"{left} = {op.name} {right} {op.rule}" + (f" x{op.count:g}" if op.count != 1 else "")

        return "\n".join(line(op) for op in self.ops)


def skeleton(graph: OpGraph, first: int = 0, last: int | None = None) -> str:
    """How many ops a piece has, and a hash of their names and shapes: enough to know it again."""
    ops = graph.ops[first:last]
    text = hashlib.sha256()
    for op in ops:
        kinds = [(graph.tensors[t].shape, graph.tensors[t].dtype) for t in (*op.operands, *op.results)]
        text.update(f"{op.name}{kinds}".encode())
    return f"{len(ops)}:{text.hexdigest()[:16]}"


def batch_dims(graph: OpGraph, batch: frozenset[int]) -> dict[int, frozenset[int]]:
    """Which dims of each tensor follow from dim 0 of the tensors in `batch`, op by op. Tensors without are left out."""
    found: dict[int, frozenset[int]] = {t: frozenset((0,)) for t in batch if graph.tensors[t].shape}
    for op in graph.ops if found else ():
        factors = {
            f
            for tensor, dims in zip(op.operands, op.rule.operands, strict=True)
            for d in found.get(tensor, ())
            for f in dims[d][:1]
        }
        for tensor, dims in zip(op.results, op.rule.results, strict=True):
            mine = frozenset(d for d, fs in enumerate(dims) if fs and fs[0] in factors)
            if mine:
                found[tensor] = mine
    return found


def meets_batch(graph: OpGraph, batch: frozenset[int]) -> frozenset[int]:
    """The tensors that some computation on the batch reads, directly or after ops of their own: the parameters.

    Optimizer state is not among them: it meets gradients only, which have no batch dim left.
    """
    marked = batch_dims(graph, batch)
    found: set[int] = set()
    for op in reversed(graph.ops):
        tensors = (*op.operands, *op.results)
        if any(t in marked for t in tensors) or any(t in found for t in op.results):
            found.update(t for t in op.operands if t not in marked)
    return frozenset(found)
