"""Steps cut into layers: every equation in one place, thin cuts between blocks, parameters where they are used."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Var

import alpa_like as alpa
from alpa_like.errors import MethodError, PlanError
from alpa_like.models.bert import BertConfig
from alpa_like.models.gpt import GPTConfig
from alpa_like.models.mlp import MLPConfig
from alpa_like.models.tasks import Task, bert_task, gpt_task, mlp_task, small_tasks
from alpa_like.passes.avals import shape_of
from alpa_like.passes.batch_rules import Split
from alpa_like.passes.flat import nbytes, reads
from alpa_like.passes.layers import Layers, form_layers
from alpa_like.passes.microbatch import MicroProgram, split_batch
from alpa_like.tracer import Trace, trace

ROWS, WIDTH, COUNT = 8, 16, 4
SGD = optax.sgd(0.1, momentum=0.9)
TRANSFORMER: dict[str, Any] = {"vocab_size": 32, "seq_len": 8, "d_model": 16, "num_heads": 2}

SMALL = small_tasks(SGD)
TASKS: dict[str, tuple[Task, int]] = {  # the task, and how many layers
    "gpt": (gpt_task(GPTConfig(**TRANSFORMER, num_layers=4), ROWS, SGD), 4),
    "tied": (gpt_task(GPTConfig(**TRANSFORMER, num_layers=3, tied=True), ROWS, SGD), 3),
    "bert": (bert_task(BertConfig(**TRANSFORMER, num_layers=3), ROWS, SGD), 3),
    "mlp": (mlp_task(MLPConfig((16, 32, 32, 32, 8)), ROWS, SGD), 4),
    "moe": (SMALL["moe"], 2),
    "remat": (SMALL["gpt_remat"], 2),
    "halves": (SMALL["gpt"], 4),  # more layers than blocks
}
TIED = ("tied", "bert")
BLOCKS = ["gpt", "tied", "bert", "moe", "remat", "mlp"]  # those with one layer per block


@cache
def program_of(name: str) -> tuple[Trace, MicroProgram]:
    task = TASKS[name][0]
    traced = trace(task.step, (jax.eval_shape(task.init), task.abstract_batch()))
    return traced, split_batch(traced, COUNT)


@cache
def layers_of(name: str) -> tuple[Trace, Layers]:
    traced, program = program_of(name)
    return traced, form_layers(program, TASKS[name][1])


def cut(step: Callable[..., Any], args: Sequence[Any], count: int = 2, **options: Any) -> tuple[Trace, Layers]:
    traced = trace(step, args)
    return traced, form_layers(split_batch(traced, count), **options)


def owners(traced: Trace, layers: Layers) -> dict[str, int | None]:
    """The layer of every argument that is an array and no batch."""
    pairs = zip(traced.arguments, layers.program.inputs, strict=True)
    return {leaf.path: layers.owners.get(v) for i, (leaf, v) in enumerate(pairs) if i not in traced.batch}


def foreign(layers: Layers, kind: str, number: int) -> list[tuple[Var, str, int]]:
    """What a layer reads of other layers' forward and backward equations, with the place that makes it."""
    eqns = getattr(layers, kind)[number]
    read = dict.fromkeys(v for e in eqns for v in reads(e) if v in layers.makers)
    return [(v, *layers.makers[v]) for v in read if layers.makers[v][1] != number]


# ------------------------------------------------------------------------------------------------ every task


@pytest.mark.parametrize("name", TASKS)
def test_every_equation_is_in_one_place(name: str) -> None:
    """Also those that only the update reads: they are derived, in a layer, or run once after all."""
    _, layers = layers_of(name)
    parts = [e for part in (*layers.forward, *layers.backward, layers.derived) for e in part]
    places = Counter(id(e) for e in parts)
    once = Counter(id(e) for e in layers.after)
    assert set(places.values()) == {1} == set(once.values())
    missing = {id(e) for e in layers.program.micro} - set(places)
    assert missing <= set(once)  # sums of several layers' shares
    assert set(places) <= {id(e) for e in layers.program.micro}
    assert {id(e) for e in layers.program.after} <= set(once)


@pytest.mark.parametrize("name", TASKS)
def test_layers_read_earlier_ones_forward_and_later_ones_backward(name: str) -> None:
    _, layers = layers_of(name)
    assert layers.count == TASKS[name][1] == len(layers.backward)
    for number in range(layers.count):
        assert all(layers.forward[number])
        assert all(kind == "forward" and at < number for _, kind, at in foreign(layers, "forward", number))
        assert all(at < number for _, kind, at in foreign(layers, "backward", number) if kind == "forward")
        assert all(at > number for _, kind, at in foreign(layers, "backward", number) if kind == "backward")


@pytest.mark.parametrize("name", BLOCKS)
def test_one_activation_and_one_cotangent_cross_each_boundary(name: str) -> None:
    """What the backward pass reads of an earlier layer's forward pass is that activation."""
    _, layers = layers_of(name)
    for number in range(layers.count - 1):
        (activation,) = layers.crossing(number)
        assert [v for v, _, _ in foreign(layers, "forward", number + 1)] == [activation]
        (cotangent,) = [v for v, kind, _ in foreign(layers, "backward", number) if kind == "backward"]
        assert shape_of(cotangent) == shape_of(activation)
        assert isinstance(layers.program.statuses[activation], Split)
        assert {v for v, kind, _ in foreign(layers, "backward", number + 1) if kind == "forward"} <= {activation}


@pytest.mark.parametrize("name", ["gpt", "tied", "bert", "remat", "mlp"])  # the experts of a moe outweigh a block
def test_parameters_and_their_moments_belong_to_the_layer_with_their_name(name: str) -> None:
    traced, layers = layers_of(name)
    found = owners(traced, layers)
    named = {path: re.search(r"\['(?:h|dense)(\d+)'\]", path) for path in found}
    assert {path: found[path] for path, match in named.items() if match} == {
        path: int(match[1]) for path, match in named.items() if match
    }
    ends = {"wte": 0, "wpe": 0, "head": layers.count - 1, "ln_f": layers.count - 1}
    assert all(found[path] == at for path in found for word, at in ends.items() if f"['{word}']" in path)
    assert sum(m is not None for m in named.values()) > layers.count


@pytest.mark.parametrize("name", TASKS)
def test_every_gradient_is_accumulated_where_its_parameter_lives(name: str) -> None:
    """But that of a bias at the end of a layer, which is a sum of what the next layer hands back."""
    traced, layers = layers_of(name)
    assert set(layers.accumulated.values()) == {"add"}
    shares = [v for v in layers.accumulated if shape_of(v)]
    leaves = [p for p in traced.arguments if p.path.startswith("state.params") and p.shape]
    assert len(shares) == len(leaves) + (name in TIED)
    away = [v for v in shares if layers.owners[v] != layers.makers[v][1]]
    assert len(away) < layers.count + (name in TIED)
    assert all(len(shape_of(v)) == 1 for v in away if name not in TIED)


def test_a_tied_embedding_is_accumulated_by_both_layers_that_use_it() -> None:
    """The two sums are added once, in the update, and the parameter belongs to the first of the layers."""
    traced, layers = layers_of("tied")
    places = [layers.makers[v] for v in layers.accumulated if shape_of(v) == (32, 16)]
    assert sorted(places) == [("backward", 0), ("backward", 2)]
    assert owners(traced, layers)["state.params['wte']['embedding']"] == 0
    adds = [e for e in layers.after if set(reads(e)) == {v for v in layers.accumulated if shape_of(v) == (32, 16)}]
    assert [e.primitive.name for e in adds] == ["add_any"]


@pytest.mark.parametrize("name", ["gpt", "tied", "mlp", "halves"])
def test_layers_come_out_again_from_their_ends(name: str) -> None:
    _, layers = layers_of(name)
    again = form_layers(layers.program, ends=layers.ends)
    assert again == layers


def test_ends_of_another_program_are_refused() -> None:
    _, program = program_of("mlp")
    with pytest.raises(PlanError, match="layers end at equation 10, but the program has"):
        form_layers(program, ends=(5, 10))


def test_the_number_of_layers_is_found_from_the_model() -> None:
    """One per block; the cuts are those between blocks, and the FLOPs are balanced."""
    _, program = program_of("gpt")
    layers = form_layers(program)
    assert layers.ends == layers_of("gpt")[1].ends
    assert max(layers.flops) < 1.5 * min(layers.flops)


def test_more_layers_than_matmuls_are_refused() -> None:
    _, program = program_of("mlp")
    with pytest.raises(MethodError, match=r"9.*4|4.*9"):
        form_layers(program, 9)


# ------------------------------------------------------------------------------------------------ plain functions


def kernels(count: int) -> list[Any]:
    return [jax.ShapeDtypeStruct((WIDTH, WIDTH), np.float32) for _ in range(count)]


BATCH = {name: jax.ShapeDtypeStruct((ROWS, WIDTH), np.float32) for name in "xy"}


def chain_step(state: Any, batch: Any, mark: Sequence[int] = ()) -> tuple[Any, Any]:
    """A loop in Python without any names; with `mark` the user's marks stand behind these layers."""

    def loss(params: Any) -> Any:
        x = batch["x"]
        for number, kernel in enumerate(params):
            x = jnp.tanh(x @ kernel) + x
            x = alpa.mark_pipeline_boundary(x) if number in mark else x
        return jnp.mean((x - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(state)
    return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), value


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_model_without_names(count: int) -> None:
    traced, layers = cut(chain_step, (kernels(6), BATCH), num_layers=count)
    assert list(owners(traced, layers).values()) == [n * count // 6 for n in range(6)]
    assert [len(layers.crossing(n)) for n in range(count - 1)] == [1] * (count - 1)
    for number in range(count - 1):
        crossing = [v for v, kind, _ in foreign(layers, "backward", number) if kind == "backward"]
        assert [nbytes(v) for v in crossing] == [ROWS / 2 * WIDTH * 4]


@pytest.mark.parametrize("marks", [(0,), (4,), (0, 1), (1, 2, 4), (0, 1, 2, 3, 4, 5)])
def test_marks_cut_where_they_stand(marks: tuple[int, ...]) -> None:
    """However unequal the layers are; a mark behind everything starts no layer of its own kernels."""
    traced, layers = cut(lambda s, b: chain_step(s, b, marks), (kernels(6), BATCH), boundaries=True)
    assert list(owners(traced, layers).values()) == [sum(m < n for m in marks) for n in range(6)]


def test_marks_do_nothing_for_automatic_layers() -> None:
    traced, layers = cut(lambda s, b: chain_step(s, b, (0,)), (kernels(6), BATCH), num_layers=2)
    assert list(owners(traced, layers).values()) == [0, 0, 0, 1, 1, 1]


def test_a_skip_over_layers_crosses_every_boundary_on_its_way() -> None:
    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> Any:
            first = x = jnp.tanh(batch["x"] @ params[0])
            for kernel in params[1:]:
                x = jnp.tanh(x @ kernel)
            return jnp.mean((x + first - batch["y"]) ** 2)

        return jax.tree.map(lambda p, g: p - g, state, jax.grad(loss)(state)), 0.0

    traced, layers = cut(step, (kernels(4), BATCH), num_layers=4)
    assert list(owners(traced, layers).values()) == [0, 1, 2, 3]
    assert [len(layers.crossing(n)) for n in range(3)] == [1, 2, 2]


def test_masks_and_labels_belong_to_no_layer() -> None:
    """What follows from the batch alone is derived, and what is random is drawn once."""

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> Any:
            mask, x = batch["x"] > 0, batch["x"]
            for kernel in params:
                x = jnp.where(mask, jnp.tanh(x @ kernel), 0)
            return jnp.mean((x - jnp.sign(batch["y"])) ** 2)

        return jax.tree.map(lambda p, g: p - g, state, jax.grad(loss)(state)), 0.0

    _, layers = cut(step, (kernels(2), BATCH), num_layers=2)
    assert {"gt", "sign"} <= {e.primitive.name for e in layers.derived}
    assert len(layers.crossing(0)) == 1


def test_a_step_without_gradient_has_no_backward_pass() -> None:
    def step(state: Any, batch: Any) -> Any:
        x = batch["x"]
        for kernel in state:
            x = jnp.tanh(x @ kernel)
        return x, jnp.mean(x)

    _, layers = cut(step, (kernels(4), BATCH), num_layers=4)
    assert not any(layers.backward)
    assert len([e for part in layers.forward for e in part if e.primitive.name == "dot_general"]) == 4
