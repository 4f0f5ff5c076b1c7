"""Pieces run one after the other give what `jax.jit` of the step gives; the graphs of those that share a mesh, put
together, have all their ops."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Literal, Var

from alpa_like.models.bert import BertConfig
from alpa_like.models.gpt import GPTConfig
from alpa_like.models.mlp import MLPConfig
from alpa_like.models.moe import MoEConfig
from alpa_like.models.tasks import Task, bert_task, gpt_task, mlp_task, moe_task
from alpa_like.passes.avals import shape_of
from alpa_like.passes.batch_rules import Split
from alpa_like.passes.compose import Composite, GraphReader, compose, fingerprint
from alpa_like.passes.flat import function_of
from alpa_like.passes.groups import ACCUMULATE
from alpa_like.passes.layers import Layers, form_layers
from alpa_like.passes.microbatch import split_batch
from alpa_like.passes.pieces import Pieces, StagePiece, StageRange, form_pieces
from alpa_like.tracer import Trace, trace

ROWS, COUNT = 8, 4
FAST: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
if jax.__version_info__ < (0, 11):
    FAST["xla_cpu_use_fusion_emitters"] = False  # compiles four times faster; later versions don't know the option
SGD = optax.sgd(0.1, momentum=0.9)
ADAM = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2, eps=1e-3))  # a large eps keeps Adam smooth
GPT_SIZES: dict[str, Any] = {"vocab_size": 32, "seq_len": 4, "d_model": 16, "num_heads": 2}

Step = Callable[[Any, Any], tuple[Any, Any]]


# ------------------------------------------------------------------------------------------------ the emulator


@dataclass
class Emulator:
    """Runs pieces as a pipeline would, one after the other on one device; accumulates with numpy."""

    traced: Trace
    pieces: Pieces
    known: dict[Var, Any]

    @classmethod
    def of(cls, traced: Trace, pieces: Pieces, args: Any) -> "Emulator":
        program = pieces.layers.program
        flat = [np.asarray(x) for x in jax.tree.leaves(args)]
        known: dict[Var, Any] = dict(zip(program.inputs, flat, strict=True))
        known.update((program.whole_batch[v], x) for v, x in zip(program.inputs, flat, strict=True))
        return cls(traced, pieces, known)

    def run(self) -> Any:
        order = self.pieces.pieces
        self.know([p for p in order if p.kind == "before"], self.known)
        rows = {v: self.known.pop(v) for v in self.batch()}
        made = [self.micro(number, rows) for number in range(self.count)]
        self.known.update(self.gathered(made))
        self.known.update(rows)
        self.know([p for p in order if p.kind == "update"], self.known)
        outputs = [v.val if isinstance(v, Literal) else self.known[v] for v in self.program.outputs]
        return jax.tree.unflatten(self.traced.out_tree, outputs)

    @property
    def program(self) -> Any:
        return self.pieces.layers.program

    @property
    def count(self) -> int:
        return self.program.num_micro_batches

    def batch(self) -> list[Var]:
        inputs = self.program.inputs
        return [inputs[i] for i in self.traced.batch if shape_of(inputs[i]) != self.traced.arguments[i].shape]

    def micro(self, number: int, rows: dict[Var, Any]) -> dict[Var, Any]:
        mine = dict(self.known)
        mine.update((v, np.split(x, self.count)[number]) for v, x in rows.items())
        if self.program.index is not None:
            mine[self.program.index] = np.int32(number)
        self.know([p for p in self.pieces.pieces if p.is_micro], mine)
        return mine

    def know(self, pieces: Sequence[StagePiece], known: dict[Var, Any]) -> None:
        for piece in pieces:
            given = [known[v] for v in piece.inputs]
            known.update(zip(piece.outputs, map(np.asarray, compiled(self.pieces, piece)(*given)), strict=True))

    def gathered(self, made: list[dict[Var, Any]]) -> dict[Var, Any]:
        """The totals of what is accumulated, and results that have the batch dim."""
        combine = {"add": np.sum, "max": np.max, "min": np.min, "and": np.all, "or": np.any}
        accumulated = self.pieces.layers.accumulated
        found: dict[Var, Any] = {}
        for v, op in accumulated.items():
            values = np.stack([m[v] for m in made])
            found[v] = np.asarray(combine[op](values, axis=0)).astype(values.dtype)
        for v in self.pieces.results:
            status = self.program.statuses.get(v)
            if isinstance(status, Split) and v in made[0] and v not in found:
                found[v] = np.concatenate([m[v] for m in made], status.dim)
        return found


KNOWN: dict[str, Any] = {}


def compiled(pieces: Pieces, piece: StagePiece) -> Any:
    """Equal pieces, such as those of equal layers, are compiled once."""
    key = fingerprint(piece.equations, piece.inputs, piece.outputs, pieces.layers.program.constants)
    if key not in KNOWN:
        function = function_of(pieces.jaxpr(piece), "piece")
        KNOWN[key] = (jax.jit(function, keep_unused=True, compiler_options=FAST), pieces)
    return KNOWN[key][0]


# ------------------------------------------------------------------------------------------------ steps


def chain_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """Clipping, Adam, a metric with the batch dim, a count and a maximum."""

    def loss(params: Any) -> Any:
        x = batch["x"]
        for kernel in params:
            x = jnp.tanh(x @ kernel) + 0.5 * x
        return jnp.mean((x - batch["y"]) ** 2), x

    params, moments = state
    (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, moments = ADAM.update(grads, moments, params)
    metrics = {"loss": value, "out": out, "most": out.max(), "many": (out > 0).sum(), "norm": optax.tree.norm(grads)}
    return (optax.apply_updates(params, updates), moments), metrics


def chain_arguments() -> Any:
    rng = np.random.default_rng(0)
    kernels = [rng.standard_normal((8, 8)).astype(np.float32) / 3 for _ in range(4)]
    x, y = rng.standard_normal((2, ROWS, 8)).astype(np.float32)
    return (kernels, jax.tree.map(np.asarray, ADAM.init(kernels))), {"x": x, "y": y}


def masked_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """One matrix at both ends, dropout, and a mean over the examples that count."""

    def loss(params: Any) -> Any:
        x = batch["x"] @ params[0]
        for n, kernel in enumerate(params[1:]):
            kept = jax.random.bernoulli(jax.random.fold_in(jax.random.key(3), n), 0.7, x.shape)
            x = x + jnp.where(kept, jnp.tanh(x @ kernel), 0.0) / 0.7
        errors = jnp.mean((x @ params[0].T - batch["y"]) ** 2, 1)
        counts = (batch["y"][:, 0] > 0).astype(np.float32)
        return jnp.sum(errors * counts) / jnp.sum(counts)

    value, grads = jax.value_and_grad(loss)(state)
    return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), value


def of_task(task: Task) -> tuple[Step, Any]:
    """With a random state, which is quicker than to compile `init`."""
    rng = np.random.default_rng(0)

    def value(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return np.full(leaf.shape, 3, leaf.dtype)
        return (0.2 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return task.step, (jax.tree.map(value, jax.eval_shape(task.init)), task.batch(0))


CASES: dict[str, tuple[Callable[[], tuple[Step, Any]], int]] = {  # step and arguments, how many layers
    "chain, Adam, outputs": (lambda: (chain_step, chain_arguments()), 4),
    "tied, dropout, masked": (lambda: (masked_step, (chain_arguments()[0][0], chain_arguments()[1])), 3),
    "mlp": (lambda: of_task(mlp_task(MLPConfig((16, 32, 32, 8)), ROWS, SGD)), 3),
    "gpt": (lambda: of_task(gpt_task(GPTConfig(**GPT_SIZES, num_layers=3, tied=True), ROWS, SGD)), 3),
    "moe": (lambda: of_task(moe_task(MoEConfig(**GPT_SIZES, num_layers=2, num_experts=4), ROWS, SGD)), 2),
    "bert": (lambda: of_task(bert_task(BertConfig(**GPT_SIZES, num_layers=2), ROWS, SGD)), 2),
}


@cache
def case(name: str) -> tuple[Trace, Layers, Any, Any]:
    """The trace, its layers, the arguments, and what `jax.jit` returns."""
    make, count = CASES[name]
    step, args = make()
    traced = trace(step, args)
    expected = jax.jit(step, compiler_options=FAST)(*args)
    return traced, form_layers(split_batch(traced, COUNT), count), args, jax.tree.map(np.asarray, expected)


def stages(layers: Layers, count: int, remat: bool) -> list[StageRange]:
    cuts = [i * layers.count // count for i in range(count + 1)]
    return [StageRange(a, b - 1, i, remat) for i, (a, b) in enumerate(itertools.pairwise(cuts))]


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def same(path: Any, a: Any, b: Any) -> None:
        where = jax.tree_util.keystr(path)
        assert (np.shape(a), np.result_type(a)) == (np.shape(b), np.result_type(b)), where
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=where)

    jax.tree_util.tree_map_with_path(same, found, expected)


WAYS = [  # the case, stages, rematerialization, a split backward pass
    *[(name, n, remat, split) for name in list(CASES)[:3] for n in (1, 2, 3) for remat in (0, 1) for split in (0, 1)],
    ("gpt", 3, 0, 1),
    ("gpt", 2, 1, 0),
    ("moe", 2, 0, 0),
    ("bert", 2, 1, 1),
]


@pytest.mark.parametrize(("name", "count", "remat", "split"), WAYS)
def test_pieces_one_after_the_other_are_the_step(name: str, count: int, remat: int, split: int) -> None:
    traced, layers, args, expected = case(name)
    pieces = form_pieces(layers, stages(layers, count, bool(remat)), split_backward=bool(split))
    assert_same(Emulator.of(traced, pieces, args).run(), expected)
    kinds = Counter(p.kind for p in pieces.pieces)
    assert kinds["forward"] == count
    assert (kinds["backward"], kinds["input_grad"], kinds["weight_grad"]) == (
        (0, count, count) if split else (count, 0, 0)
    )


# ------------------------------------------------------------------------------------------------ graphs


def equal_chain_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """Six equal layers with momentum."""

    def loss(params: Any) -> Any:
        x = batch["x"]
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        return jnp.mean((x - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(state["params"])
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, state["velocity"], grads)
    params = jax.tree.map(lambda p, v: p - 0.1 * v, state["params"], velocity)
    return {"params": params, "velocity": velocity}, value


@cache
def equal_chain() -> Layers:
    kernels = [jax.ShapeDtypeStruct((8, 8), np.float32)] * 6
    batch = {name: jax.ShapeDtypeStruct((ROWS, 8), np.float32) for name in "xy"}
    traced = trace(equal_chain_step, ({"params": kernels, "velocity": kernels}, batch))
    return form_layers(split_batch(traced, COUNT), 6)


def composed(pieces: Pieces, mesh: int, reader: GraphReader) -> Composite:
    """The graph of a mesh; what it makes of the results is there at the end."""
    mine = [p for p in pieces.pieces if p.mesh == mesh]
    made = {v for p in mine for v in p.outputs}
    accumulated = {v: op for v, op in pieces.layers.accumulated.items() if v in made}
    return compose(mine, [reader.graph(pieces, p) for p in mine], COUNT, accumulated, pieces.results)


@cache
def meshes(count: int, *, split: bool = False) -> tuple[Pieces, GraphReader, tuple[Composite, ...]]:
    pieces = form_pieces(equal_chain(), stages(equal_chain(), count, remat=False), split_backward=split)
    reader = GraphReader()
    return pieces, reader, tuple(composed(pieces, n, reader) for n in range(count))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_composite_has_the_ops_of_its_pieces(count: int, split: bool) -> None:
    """In their order; those of a micro-batch count as often as there are micro-batches."""
    pieces, reader, found = meshes(count, split=split)
    assert sum(len(c.pieces) for c in found) == len(pieces.pieces)
    for composite in found:
        for piece, (first, last) in zip(composite.pieces, composite.spans, strict=True):
            own, weight = reader.graph(pieces, piece), COUNT if piece.is_micro else 1
            here = composite.graph.ops[first:last]
            assert [(o.name, o.count, o.flops) for o in here] == [(o.name, o.count * weight, o.flops) for o in own.ops]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_work_of_all_meshes_is_that_of_the_step(count: int) -> None:
    """Whatever the stages: 18 matmuls but the first layer's gradient of the batch, for every micro-batch."""
    ops = [op for c in meshes(count)[2] for op in c.graph.ops if op.name == "stablehlo.dot_general"]
    work = sum(op.count * op.flops for op in ops)
    assert work == 17 * 2 * ROWS * 8 * 8


@pytest.mark.parametrize("count", [1, 2, 6])
def test_each_accumulated_value_has_one_op(count: int) -> None:
    """It reads what a micro-batch makes; the update reads its result."""
    pieces, _, found = meshes(count)
    totals = 0
    for composite in found:
        ops = [op for op in composite.graph.ops if op.name == ACCUMULATE]
        assert [op.id for op in ops] == list(composite.accumulate.values())
        assert all(op.count == COUNT for op in ops)
        for var, number in composite.accumulate.items():
            op = composite.graph.ops[number]
            assert (op.operands, op.results) == ((composite.tensors[var],), (composite.totals[var],))
        totals += len(ops)
        update = [
            op
            for p, span in zip(composite.pieces, composite.spans, strict=True)
            if p.kind == "update"
            for op in range(*span)
        ]
        read = {t for op in update for t in composite.graph.ops[op].operands}
        assert not read & {composite.tensors[v] for v in composite.accumulate}
        assert read >= {composite.totals[v] for v in composite.accumulate if shape_of(v)}
    assert totals == len(pieces.layers.accumulated) == 6 + 1  # the gradients and the loss


def test_a_value_that_a_piece_hands_to_another_is_one_tensor() -> None:
    pieces, _, (first, second) = meshes(2)
    handed = {v for v in pieces.pieces[0].outputs if v in second.arguments}
    assert {shape_of(v) for v in handed} == {(ROWS // COUNT, 8)}
    assert not handed & set(first.arguments)
    for composite in (first, second):
        forward, backward = (next(p for p in composite.pieces if p.kind == k) for k in ("forward", "backward"))
        kept = [composite.tensors[v] for v in backward.inputs if v in forward.outputs]
        start, end = composite.spans[composite.pieces.index(backward)]
        assert kept
        assert all(composite.graph.tensors[t].op < composite.spans[0][1] for t in kept)
        assert all(any(start <= op < end for op, _ in composite.graph.uses[t]) for t in kept)


def test_segments_are_the_pieces_and_one_for_accumulation() -> None:
    _, _, (composite,) = meshes(1)
    assert [p.kind for p in composite.pieces] == ["forward", "backward", "update"]
    forward, backward, update = composite.spans
    assert composite.segments.starts == (forward[0], backward[0], backward[1], update[0])
    assert composite.segments.counts == (COUNT, COUNT, COUNT, 1)
    assert update[0] - backward[1] == len(composite.accumulate)


def test_equal_layers_have_equal_graphs() -> None:
    """The first has no gradient of the batch, the last has the loss."""
    pieces, reader, found = meshes(6)
    digests = [c.graph.digest for c in found]
    assert digests[1] == digests[2] == digests[3] == digests[4]
    assert len(set(digests)) == 3
    assert len(pieces.pieces) == 18
    assert len(reader.known) <= 8  # three of forward, three of backward, two of the update


def test_a_fingerprint_tells_pieces_apart() -> None:
    """By their equations, and by which of their values they read and hand on."""
    pieces, _, _ = meshes(6)
    one, other = (p for p in pieces.pieces if p.name in ("forward 2", "forward 3"))
    constants = equal_chain().program.constants
    same = fingerprint(one.equations, one.inputs, one.outputs, constants)
    assert fingerprint(other.equations, other.inputs, other.outputs, constants) == same
    assert fingerprint(one.equations[:-1], one.inputs, one.outputs, constants) != same
    assert fingerprint(one.equations, one.inputs[::-1], one.outputs, constants) != same
    assert fingerprint(one.equations, one.inputs, one.outputs[1:], constants) != same


def test_results_are_there_at_the_end() -> None:
    _, _, (composite,) = meshes(1)
    shapes = [composite.graph.tensors[t].shape for t in composite.graph.results]
    assert Counter(map(math.prod, shapes)) == {64: 12, 1: 1}
    stages_of_two = meshes(2)[2]
    assert sum(len(c.graph.results) for c in stages_of_two) == 13
