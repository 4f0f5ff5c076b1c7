"""Scans over layers cut into several: the same numbers as the whole step, and no chunk is ever joined."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Literal, jaxpr_as_fun

from alpa_like.errors import GraphError, MethodError
from alpa_like.models.gpt import GPTConfig
from alpa_like.models.tasks import Task, gpt_task
from alpa_like.passes.scans import SplitScans, split_scans, stacked_scan_lengths
from alpa_like.tracer import Trace, trace

L, D, B = 4, 6, 5
FAST: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
if jax.__version_info__ < (0, 11):
    FAST["xla_cpu_use_fusion_emitters"] = False  # compiles four times faster; later versions don't know the option
ADAM = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, eps=1e-3, weight_decay=0.1))


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def stacked() -> dict[str, Any]:
    """Parameters of L layers, and an output layer that is not stacked."""
    return {"layers": {"w": normal(L, D, D) / 3, "b": normal(L, D)}, "head": normal(D, 2)}


def layer(x: Any, p: Any) -> tuple[Any, None]:
    return jnp.tanh(x @ p["w"] + p["b"]), None


def mlp_loss(params: Any, x: Any, **options: Any) -> Any:
    hidden = jax.lax.scan(layer, x, params["layers"], **options)[0]
    return jnp.mean((hidden @ params["head"]) ** 2)


def training(loss: Any, optimizer: Any) -> Callable[..., Any]:
    def step(state: Any, x: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(state[0], x)
        updates, opt_state = optimizer.update(grads, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), value

    return step


def batch() -> jax.Array:
    return normal(B, D)


def run(jaxpr: Any, values: Any) -> list[Any]:
    return jax.jit(jaxpr_as_fun(jaxpr), compiler_options=FAST)(*values)


def plain(value: Any) -> Any:
    return np.asarray(jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value)


def cut(step: Any, args: Any, lengths: tuple[int, ...], scan_length: int = L) -> tuple[Trace, SplitScans]:
    """The step cut at `lengths`, after checking that it computes the same, in the same types."""
    traced = trace(step, args)
    split = split_scans(traced.jaxpr, lengths, scan_length=scan_length, pairs=traced.stored)
    values = jax.tree.leaves(args)
    expected = run(traced.jaxpr, values)
    actual = split.join_outputs(run(split.jaxpr, split.split_values(values)))
    for a, e, leaf in zip(actual, expected, traced.results, strict=True):
        for kind in ("shape", "dtype", "weak_type"):
            assert getattr(a, kind, None) == getattr(e, kind, None), leaf
        a, e = plain(a), plain(e)
        tolerance = 2**-6 if a.dtype == jnp.bfloat16 else 1e-5 if jnp.issubdtype(a.dtype, np.inexact) else 0
        np.testing.assert_allclose(np.float64(a), np.float64(e), rtol=tolerance, atol=tolerance, err_msg=str(leaf))
    return traced, split


def count(jaxpr: Any) -> Counter[str]:
    return Counter(eqn.primitive.name for eqn in jaxpr.jaxpr.eqns)


def scans(jaxpr: Any) -> list[Any]:
    return [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]


def assert_apart(traced: Trace, split: SplitScans, lengths: tuple[int, ...]) -> None:
    """All that is stacked is in chunks, inside and on both sides, and nothing joins or slices them."""
    assert not count(split.jaxpr)["concatenate"]
    shapes = {v.aval.shape[:1] for e in split.jaxpr.jaxpr.eqns for v in e.outvars}
    assert (sum(lengths),) not in shapes or len(lengths) == 1
    for leaves, sides in ((traced.arguments, split.inputs), (traced.results, split.outputs)):
        for leaf, cuts in zip(leaves, sides, strict=True):
            assert cuts == (tuple(lengths) if "layers" in leaf.path or "['h']" in leaf.path else None), leaf
    assert all(split.inputs[i] == split.outputs[o] for i, o in traced.stored)


# ------------------------------------------------------------------------------------------------ whole steps


def by_hand(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    """Runs a jaxpr one operation at a time, a scan as a loop: nothing can be fused or ordered anew."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        values = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        made = loop(values, eqn) if eqn.primitive.name == "scan" else eqn.primitive.bind(*values, **eqn.params)
        env.update(zip(eqn.outvars, made if isinstance(made, list) else [made], strict=True))
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]


def loop(values: Any, eqn: Any) -> list[Any]:
    """A scan with one carry and no constants, as those of an MLP are."""
    carry, *xs = values
    length, body = eqn.params["length"], eqn.params["jaxpr"]
    ys = {}
    for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
        carry, *ys[i] = by_hand(body.jaxpr, body.consts, [carry, *(x[i] for x in xs)])
    return [carry, *(jnp.stack(rows) for rows in zip(*(ys[i] for i in range(length)), strict=True))]


@pytest.mark.parametrize("lengths", [(4,), (2, 2), (1, 3), (1, 1, 1, 1)])
def test_sgd_step_is_bit_equal(lengths: tuple[int, ...]) -> None:
    params = stacked()
    optimizer = optax.sgd(0.1, momentum=0.9)
    args = (params, optimizer.init(params)), batch()
    traced = trace(training(mlp_loss, optimizer), args)
    split = split_scans(traced.jaxpr, lengths, scan_length=L, pairs=traced.stored)
    values = jax.tree.leaves(args)
    whole = by_hand(traced.jaxpr.jaxpr, traced.jaxpr.consts, values)
    parts = split.join_outputs(by_hand(split.jaxpr.jaxpr, split.jaxpr.consts, split.split_values(values)))
    for actual, expected in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert_apart(traced, split, lengths)
    assert [e.params["length"] for e in scans(split.jaxpr)] == [*lengths, *reversed(lengths)]
    assert [e.params["reverse"] for e in scans(split.jaxpr)] == [False] * len(lengths) + [True] * len(lengths)


@pytest.mark.parametrize("optimizer", [ADAM, optax.lamb(1e-2)], ids=["adam", "lamb"])
def test_norms_and_moments_stay_in_chunks(optimizer: Any) -> None:
    """Global-norm clipping sums over chunks; LAMB makes each leaf flat before it takes the norm."""
    params = stacked()
    args = (params, optimizer.init(params)), batch()
    traced, split = cut(training(mlp_loss, optimizer), args, (1, 3))
    assert_apart(traced, split, (1, 3))


@cache
def gpt(remat: bool) -> tuple[Task, Any]:
    config = GPTConfig(32, 8, 8, 2, 3, dtype=jnp.float32, remat=remat, scan_layers=True)
    task = gpt_task(config, 2, optimizer=ADAM if remat else optax.sgd(0.1, momentum=0.9))
    state = jax.tree.map(lambda leaf: normal(*leaf.shape).astype(leaf.dtype) / 3, jax.eval_shape(task.init))
    return task, (state, task.batch(0))


@pytest.mark.parametrize("remat", [False, True])
def test_gpt_step(remat: bool) -> None:
    task, args = gpt(remat)
    traced, split = cut(task.step, args, (1, 2), scan_length=3)
    assert stacked_scan_lengths(traced.jaxpr) == (3,)
    assert_apart(traced, split, (1, 2))
    names = [(e.params["length"], str(e.source_info.name_stack)) for e in scans(split.jaxpr)]
    assert names == [(1, "jvp(GPT)"), (2, "jvp(GPT)"), (2, "transpose(jvp(GPT))"), (1, "transpose(jvp(GPT))")]


def test_name_stacks_and_source_lines_stay() -> None:
    """Calls are stepped into, so names are compared with those that stepping in gives for k = 1."""
    task, args = gpt(False)
    traced = trace(task.step, args)
    whole, split = (split_scans(traced.jaxpr, n, scan_length=3, pairs=traced.stored) for n in ((3,), (1, 2)))

    def where(jaxpr: Any) -> set[tuple[str, str]]:
        return {(e.primitive.name, str(e.source_info.name_stack)) for e in jaxpr.jaxpr.eqns}

    assert where(split.jaxpr) == where(whole.jaxpr)
    originals = {str(e.source_info.name_stack) for e in traced.jaxpr.jaxpr.eqns}
    assert originals >= {n for _, n in where(whole.jaxpr)}
    assert any(n.startswith("transpose(jvp") for n in originals)
    first = scans(split.jaxpr)[0].source_info.traceback
    assert "models/layers.py" in str(first)


def test_bfloat16_survives() -> None:
    params, x = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (stacked(), batch()))
    traced, split = cut(training(mlp_loss, optax.sgd(0.1)), ((params, optax.sgd(0.1).init(params)), x), (2, 2))
    assert {v.aval.dtype for v in split.jaxpr.jaxpr.invars} == {jnp.dtype(jnp.bfloat16)}
    assert_apart(traced, split, (2, 2))


def test_mixed_precision_casts_the_chunks() -> None:
    def loss(params: Any, x: Any) -> Any:
        return mlp_loss(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), x.astype(jnp.bfloat16))

    params = stacked()
    traced, split = cut(training(loss, optax.sgd(0.1)), ((params, optax.sgd(0.1).init(params)), batch()), (3, 1))
    assert_apart(traced, split, (3, 1))


# ------------------------------------------------------------------------------------------------ forms of scan


def test_tuple_carry_unused_values_and_values_used_after() -> None:
    """Two carries, a tree of xs of which one is not read, ys of which one is returned and one has no reader."""

    def loss(layers: Any, x: Any) -> Any:
        def body(carry: Any, xs: Any) -> Any:
            (h, total), (p, _, scale) = carry, xs
            h = jnp.tanh(h @ p["w"] + p["b"]) * scale
            return (h, total + jnp.sum(h)), {"mean": jnp.mean(h, 0), "count": jnp.int32(1), "extra": h}

        xs = (layers, jnp.arange(L), jnp.arange(1.0, L + 1))
        (h, total), ys = jax.lax.scan(body, (x, 0.0), xs, unroll=2)
        return jnp.mean(h**2) + 0.1 * total + jnp.sum(ys["mean"] ** 2), (ys["mean"] * 2, ys["count"])

    def step(layers: Any, x: Any) -> Any:
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(layers, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, layers, grads), value, aux

    traced, split = cut(step, (stacked()["layers"], batch()), (1, 3))
    assert [leaf.path for leaf, cuts in zip(traced.results, split.outputs, strict=True) if cuts is None] == [
        "result[1]"
    ]
    assert not count(split.jaxpr)["concatenate"]
    assert [e.params["unroll"] for e in scans(split.jaxpr)] == [1, 2, 2, 1]


def test_dropout_keys_split_over_the_layers() -> None:
    def loss(layers: Any, x: Any, key: Any) -> Any:
        def body(h: Any, xs: Any) -> Any:
            p, key = xs
            return layer(h, p)[0] * jax.random.bernoulli(key, 0.7, h.shape), None

        return jnp.mean(jax.lax.scan(body, x, (layers, jax.random.split(key, L)))[0] ** 2)

    def step(layers: Any, x: Any, key: Any) -> Any:
        grads = jax.grad(loss)(layers, x, jax.random.fold_in(key, 3))
        return jax.tree.map(lambda p, g: p - 0.1 * g, layers, grads), key

    args = stacked()["layers"], batch(), jax.random.key(1)
    _, split = cut(step, args, (1, 3))
    assert split.inputs == ((1, 3), (1, 3), None, None)


def test_layer_numbers_a_length_only_and_a_reversed_forward_scan() -> None:
    def loss(w: Any, x: Any) -> Any:
        h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=L)
        h, _ = jax.lax.scan(lambda h, i: (jnp.sin(h @ w + i), None), h, jnp.arange(L, dtype=jnp.float32), reverse=True)
        return jnp.sum(h**2)

    def step(w: Any, x: Any) -> Any:
        return w - 0.1 * jax.grad(loss)(w, x)

    _, split = cut(step, (stacked()["layers"]["w"][0], batch()), (1, 3))
    lengths = [(e.params["length"], e.params["reverse"]) for e in scans(split.jaxpr)]
    assert lengths[:4] == [(1, False), (3, False), (3, True), (1, True)]
    assert sorted(lengths[4:]) == sorted(lengths[:4])


def test_inner_scans_other_lengths_and_rematerialized_stacks_stay() -> None:
    def loss(layers: Any, x: Any) -> Any:
        def body(h: Any, p: Any) -> Any:
            return jax.lax.scan(lambda h, _: (layer(h, p)[0], None), h, None, length=L)[0], None

        h = jax.lax.scan(body, x, layers)[0]
        h = jax.lax.scan(lambda h, _: (jnp.sin(h), None), h, None, length=7)[0]
        return jnp.sum(jax.checkpoint(lambda h, p: jax.lax.scan(layer, h, p)[0])(h, layers))

    def step(layers: Any, x: Any) -> Any:
        return jax.tree.map(lambda p, g: p - 0.01 * g, layers, jax.grad(loss)(layers, x))

    traced, split = cut(step, (stacked()["layers"], batch()), (1, 3))
    before, after = (Counter(e.params["length"] for e in scans(j)) for j in (traced.jaxpr, split.jaxpr))
    assert after == {1: 3, 3: 3, 7: before[7]}
    inner = [e for s in scans(split.jaxpr) for e in s.params["jaxpr"].eqns if e.primitive.name == "scan"]
    assert {e.params["length"] for e in inner} == {L}
    assert count(split.jaxpr)["remat2"] == count(traced.jaxpr)["remat2"] == 1


def test_calls_are_stepped_into() -> None:
    """The scan under jit, an un-differentiated custom derivative on the moments."""
    optimizer = optax.sgd(0.1, momentum=0.9)

    @jax.custom_vjp
    def half(x: Any) -> Any:
        return x / 2

    half.defvjp(lambda x: (half(x), None), lambda _, g: (g / 2,))

    def step(state: Any, x: Any) -> Any:
        value, grads = jax.value_and_grad(jax.jit(mlp_loss))(state[0], x)
        grads = jax.jit(lambda g: jax.tree.map(lambda v: jax.nn.relu(half(v)), g))(grads)
        updates, opt_state = optimizer.update(grads, state[1])
        return (optax.apply_updates(state[0], updates), opt_state), value

    params = stacked()
    traced, split = cut(step, ((params, optimizer.init(params)), batch()), (2, 2))
    assert_apart(traced, split, (2, 2))
    assert stacked_scan_lengths(traced.jaxpr) == (L,)


# ------------------------------------------------------------------------------------------------ single equations

THROUGH: dict[str, Callable[[jax.Array], Any]] = {
    "transpose": lambda y: jnp.transpose(y, (0, 2, 1)),
    "flat layers": lambda y: jnp.sin(y.reshape(L * B, D)).reshape(L, D, B),
    "ravel": lambda y: jnp.vdot(y, y),
    "split": lambda y: jnp.split(y, 2, axis=2)[1] * y[:, :, :3],
    "pad": lambda y: jnp.pad(y, ((0, 0), (1, 2), (0, 0))),
    "concatenate": lambda y: jnp.concatenate([y, y * 2], axis=1),
    "sort and cumsum": lambda y: jnp.cumsum(jnp.sort(y, axis=1), axis=2),
    "argmax": lambda y: jnp.argmax(y, axis=1),
    "reductions": lambda y: (y.max(0), y.min((0, 1)), (y > 0).all(0), (y > 1).any(), jnp.prod(y), y.mean((1, 2))),
    "matmul": lambda y: y @ jnp.ones((D, 3)),
    "batched matmul": lambda y: y @ y.mT,
    "right operand": lambda y: jnp.einsum("j,lij->li", jnp.arange(D, dtype=y.dtype), y),
    "broadcast from a row": lambda y: y + y.mean((1, 2), keepdims=True) * jnp.arange(D, dtype=y.dtype),
    "select": lambda y: jnp.where(y.sum() > 0, y, jnp.zeros_like(y) - jnp.square(jnp.full(y.shape, 3.0, y.dtype))),
    "iota": lambda y: jnp.where(jax.lax.broadcasted_iota(jnp.int32, y.shape, 1) > 2, y, 0),
    "clamp": lambda y: jnp.clip(y, -0.5, 0.5),
    "bits": lambda y: jax.lax.bitcast_convert_type(y, jnp.int32) ^ 3,
}
JOINED: dict[str, Callable[[jax.Array], Any]] = {
    "one layer": lambda y: y[1],
    "reverse": lambda y: y[::-1] * y,
    "cumsum": lambda y: jnp.cumsum(y, axis=0),
    "layers last": lambda y: jnp.moveaxis(y, 0, 2),
    "gather": lambda y: y[jnp.array([2, 0])],
    "branch": lambda y: jax.lax.cond(y.sum() > 0, lambda v: v, lambda v: v * 2, y),
}


def outputs_of(functions: dict[str, Any]) -> tuple[Callable[..., Any], Any]:
    """A step that applies all functions to the stacked outputs [L, B, D] of a scan."""

    def step(x: Any, scale: Any) -> Any:
        ys = jax.lax.scan(lambda h, s: (jnp.sin(h) * s, jnp.cos(h) * s), x, scale)[1]
        return {name: function(ys) for name, function in functions.items()}

    return step, (batch(), jnp.arange(1.0, L + 1))


def test_equations_that_leave_the_layers_alone_work_chunk_by_chunk() -> None:
    lengths = (2, 1, 1)
    traced, split = cut(*outputs_of(THROUGH), lengths)
    along = [e for e in split.jaxpr.jaxpr.eqns if e.primitive.name == "concatenate" and e.params["dimension"] == 0]
    assert not along
    for leaf, cuts in zip(traced.results, split.outputs, strict=True):
        assert cuts == (lengths if leaf.shape[:1] == (L,) else None), leaf


@pytest.mark.parametrize("name", JOINED)
def test_other_equations_read_the_chunks_joined(name: str) -> None:
    _, split = cut(*outputs_of({name: JOINED[name]}), (1, 3))
    assert count(split.jaxpr)["concatenate"] == 1


def test_pairs_are_in_chunks_on_both_sides_or_on_neither() -> None:
    """A reset moment and one that passes through are never tied to a chunk but by their pair."""

    def step(state: Any, x: Any) -> Any:
        w, reset, kept, other = state
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]
        return (w + reset + kept * 0.0, jnp.zeros_like(reset), kept[::-1], jnp.zeros_like(other)), h

    w = stacked()["layers"]["w"]
    args = ((w, w, w, jnp.ones((L, 2))), batch())
    _, split = cut(step, args, (1, 3))
    assert split.inputs == ((1, 3), (1, 3), (1, 3), None, None)
    assert split.outputs == ((1, 3), (1, 3), (1, 3), None, None)


def test_shared_constants_tie_nothing() -> None:
    """What is the same for all layers, added to parameters and to something else, leaves the latter whole."""

    def step(w: Any, other: Any, x: Any) -> Any:
        same = jnp.sqrt(jnp.full(w.shape, 2.0)) * jnp.arange(D)
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w + same)[0], jnp.sum(other + same, 0)

    w = stacked()["layers"]["w"]
    _, split = cut(step, (w, w, batch()), (1, 3))
    assert split.inputs == ((1, 3), None, None)
    assert split.outputs == (None, None)


# ------------------------------------------------------------------------------------------------ lengths and errors


def scan_of(length: int, width: int, grad: bool = True) -> tuple[Callable[..., Any], Any]:
    def total(w: Any) -> Any:
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), jnp.ones((2, width)), w)[0]
        return jnp.sum(h)

    return jax.grad(total) if grad else total, jax.ShapeDtypeStruct((length, width, width), jnp.float32)


def test_lengths_are_those_with_a_backward_twin_by_flops() -> None:
    """Matmuls of 3 layers of width 32 outweigh 5 of width 8; the scan of 7 has no gradient."""
    parts = [scan_of(5, 8), scan_of(3, 32), scan_of(7, 64, grad=False)]
    closed = (
        jax.jit(lambda *ws: [f(w) for (f, _), w in zip(parts, ws, strict=True)]).trace(*(w for _, w in parts)).jaxpr
    )
    assert stacked_scan_lengths(closed) == (3, 5)


@pytest.mark.parametrize("lengths", [(), (1, 2), (0, 4), (5, -1), (2, 2, 2)])
def test_lengths_must_add_up(lengths: tuple[int, ...]) -> None:
    fun, w = scan_of(L, 4)
    with pytest.raises(MethodError, match=r"add up to the scan length 4, found \("):
        split_scans(jax.jit(fun).trace(w).jaxpr, lengths, scan_length=L)


def test_a_step_without_such_a_scan_is_refused() -> None:
    fun, w = scan_of(3, 4)
    with pytest.raises(GraphError, match=r"a scan of 4 layers .* found scans of \[3\]"):
        split_scans(jax.jit(fun).trace(w).jaxpr, (2, 2), scan_length=4)


def test_a_pair_of_other_shapes_is_refused() -> None:
    fun, w = scan_of(L, 4, grad=False)
    with pytest.raises(GraphError, match=r"input 0 \(4, 4, 4\) comes back as output 0 \(\)"):
        split_scans(jax.jit(fun).trace(w).jaxpr, (2, 2), scan_length=L, pairs=[(0, 0)])


def test_a_scan_over_a_mutable_array_is_refused() -> None:
    def fun(w: Any) -> Any:
        cell = jax.new_ref(w)

        def body(h: Any, row: Any) -> Any:
            row[...] = row[...] * 2
            return h + row[...], None

        return jax.lax.scan(body, jnp.zeros(()), cell)[0], cell[...]

    closed = jax.jit(fun).trace(jax.ShapeDtypeStruct((L,), jnp.float32)).jaxpr
    with pytest.raises(GraphError, match="goes over a mutable array"):
        split_scans(closed, (2, 2), scan_length=L)
