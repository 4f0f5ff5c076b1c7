"""What a trace says of a step: names of leaves, which argument is the state, the batch, or static."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from alpa_like import models
from alpa_like.errors import AlpaError, TraceError
from alpa_like.tracer import bind, signature_of, trace

W, X = jnp.ones((8, 8)), np.ones((16, 8), np.float32)


def update(w, x):
    return w - 0.1 * jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w)


def roles(function, *args, **options):
    """Paths of the arguments that come back as results, paths of those results, donated numbers, batch paths."""
    traced = trace(function, args, **options)
    stored = {traced.arguments[a].path: traced.results[r].path for a, r in traced.stored}
    return stored, traced.donated, [traced.arguments[i].path for i in traced.batch]


# ------------------------------------------------------------------------------------------------ names


def test_leaves_are_named_as_the_user_would():
    def step(state, batch, lr):
        return state, {"loss": batch["x"].sum() * lr, "parts": [batch["x"], (1.0,)]}

    state = {"params": [W, (W,)], "step": jnp.int32(0)}
    traced = trace(step, (state, {"x": X}, 0.1))
    assert [str(leaf) for leaf in traced.arguments] == [
        "state['params'][0] float32[8,8]",
        "state['params'][1][0] float32[8,8]",
        "state['step'] int32[]",
        "batch['x'] float32[16,8]",
        "lr float[]",
    ]
    assert [leaf.path for leaf in traced.results][3:] == [
        "result[1]['loss']",
        "result[1]['parts'][0]",
        "result[1]['parts'][1][0]",
    ]
    assert traced.name == "step"


def test_a_train_state_is_named_by_its_fields():
    task = models.small_tasks()["mlp"]
    traced = trace(task.step, (jax.eval_shape(task.init), task.abstract_batch()))
    names = [leaf.path for leaf in traced.arguments]
    assert "state.params['dense0']['kernel']" in names
    assert "state.opt_state[0].trace['dense0']['kernel']" in names
    assert names[-2:] == ["batch['inputs']", "batch['labels']"]
    assert traced.results[-1].path == "result[1]"


class Step:
    """Something that can be called and has no name of its own."""

    def __call__(self, state, batch):
        return state * 2, batch.sum()


@pytest.mark.parametrize(
    ("function", "name", "first"),
    [
        (Step(), "Step", "state"),
        (functools.partial(lambda lr, state, batch: (state, batch.sum()), 0.1), "partial", "state"),
        (lambda *args: (args[0], args[1].sum()), "<lambda>", "args[0]"),
        (jax.jit(lambda state, batch: (state, batch.sum())), "<lambda>", "state"),
    ],
    ids=["object", "partial", "variadic", "jitted"],
)
def test_what_has_no_name_gets_one(function, name, first):
    traced = trace(function, (W, X))
    assert (traced.name, traced.arguments[0].path) == (name, first)


# ------------------------------------------------------------------------------------------------ state and batch

STEPS = {  # function, arguments, what comes back (argument path: result path), donated argument numbers
    "new state first": (lambda s, x: (update(s, x), x.sum()), (W, X), {"s": "result[0]"}, (0,)),
    "loss first": (lambda s, x: (x.sum(), update(s, x)), (W, X), {"s": "result[1]"}, (0,)),
    "state alone": (update, (W, X), {"w": "result"}, (0,)),
    "loss only": (lambda s, x: (x @ s).sum(), (W, X), {}, ()),
    "auxiliary results": (
        lambda s, x: ({"new": {"s": update(s["s"], x)}, "aux": x}, x.sum()),
        ({"s": W}, X),
        {"s['s']": "result[0]['new']['s']"},
        (0,),
    ),
    "two states": (
        lambda p, x, o: (update(p, x), jax.tree.map(jnp.negative, o), x.sum()),
        (W, X, {"m": W, "v": W}),
        {"p": "result[0]", "o['m']": "result[1]['m']", "o['v']": "result[1]['v']"},
        (0, 2),
    ),
    "two alike": (lambda p, x, q: (p + 1, q + 1), (W, X, W), {"p": "result[0]", "q": "result[1]"}, (0, 2)),
    "only one of two alike": (lambda p, x, q: (p + q, x.sum()), (W, X, W), {"p": "result[0]"}, (0,)),
    "other shape": (lambda s, x: (s[:4], x.sum()), (W, X), {}, ()),
    "other dtype": (lambda s, x: (s.astype(jnp.bfloat16), x.sum()), (W, X), {}, ()),
    "other tree": (lambda s, x: ([s["a"], s["b"]], x.sum()), ({"a": W, "b": W}, X), {}, ()),
    "a batch that comes back": (lambda s, x: (s + 1, x * 2), (W, X), {"s": "result[0]"}, (0,)),
    "a learning rate": (lambda s, x, lr: (s * lr, lr * 0.9), (W, X, jnp.float32(1)), {"s": "result[0]"}, (0,)),
    "a Python scalar": (lambda s, x, lr: (s * lr, lr * 0.9), (W, X, 1.0), {"s": "result[0]"}, (0,)),
    "a scalar in a tree": (
        lambda s, x: ({"w": s["w"], "n": s["n"] + 1}, x.sum()),
        ({"w": W, "n": jnp.int32(0)}, X),
        {"s['n']": "result[0]['n']", "s['w']": "result[0]['w']"},
        (0,),
    ),
    "nothing in the state": (lambda s, x: (s, x.sum()), ({}, X), {}, ()),
    "None leaves": (
        lambda s, x: ({"a": s["a"] + 1, "b": None}, x.sum()),
        ({"a": W, "b": None}, X),
        {"s['a']": "result[0]['a']"},
        (0,),
    ),
    "None in place of an array": (lambda s, x: ({"a": s["a"], "b": None}, 0), ({"a": W, "b": W}, X), {}, ()),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_comes_back_is_the_state(name):
    function, args, stored, donated = STEPS[name]
    found, numbers, batch = roles(function, *args)
    assert (found, numbers, batch) == (stored, donated, ["x"])


def test_a_train_state_comes_back_leaf_by_leaf():
    module = flax.linen.Dense(4)
    state = TrainState.create(apply_fn=module.apply, params=module.init(jax.random.PRNGKey(0), X), tx=optax.adam(1e-3))

    def step(batch, state):
        grads = jax.grad(lambda p: (state.apply_fn(p, batch) ** 2).mean())(state.params)
        return {"loss": batch.sum()}, state.apply_gradients(grads=grads)

    stored, donated, batch = roles(step, X, state.replace(step=jnp.int32(0)), batch_argnums=(0,))
    assert (donated, batch) == ((1,), ["batch"])
    assert len(stored) == len(jax.tree.leaves(state)) == 8
    assert all(result == path.replace("state", "result[1]", 1) for path, result in stored.items())


def test_donation_by_number():
    def step(s, x, t):
        return s + 1, t + 1, x.sum()

    stored = {"s": "result[0]", "t": "result[1]"}
    assert roles(step, W, X, W, donate_argnums=())[:2] == (stored, ())
    assert roles(step, W, X, W, donate_argnums=(2,))[:2] == (stored, (2,))
    with pytest.raises(TraceError, match="argument 'x' is donated, but the step does not return it"):
        roles(step, W, X, W, donate_argnums=(1,))


@pytest.mark.parametrize("option", ["donate_argnums", "static_argnums"])
def test_an_argument_number_beyond_the_last_is_refused(option):
    with pytest.raises(AlpaError, match=f"{option}.*5"):
        trace(lambda s, x: (s, x.sum()), (W, X), **{option: (5,)})


def test_a_static_argument_that_is_also_donated_is_refused():
    with pytest.raises(AlpaError, match="static"):
        trace(lambda s, x, n: (s * n, x.sum()), (W, X, 2), static_argnums=(2,), donate_argnums=(2,))


def test_several_batch_arguments():
    traced = trace(lambda s, x, y: (s, (x * y).sum()), (W, X, X), batch_argnums=(1, 2))
    assert [traced.arguments[i].path for i in traced.batch] == ["x", "y"]
    assert trace(lambda s: s, (W,)).batch == ()


# ------------------------------------------------------------------------------------------------ static arguments


def test_static_arguments_are_values_of_the_program():
    def step(n, state, x, mode):
        return state * n, x.sum() if mode == "sum" else x.mean()

    traced = trace(step, (3, W, X, "sum"), static_argnums=(0, 3), batch_argnums=(2,))
    assert [leaf.path for leaf in traced.arguments] == ["state", "x"]
    assert (traced.donated, traced.batch) == ((0,), (1,))  # static arguments are not counted
    new, total = traced.function()(W, X)
    assert (new[0, 0], total) == (3.0, 128.0)


def test_signatures_tell_apart_what_needs_another_program():
    def signature(*args, static=()):
        return signature_of(len, args, static)

    base = signature(W, X, 1.0)
    assert base == signature(np.asarray(W) + 1, jnp.asarray(X), 2.0)
    assert base == signature(jax.ShapeDtypeStruct((8, 8), jnp.float32), X, 5.0)
    others = [
        (W[:4], X, 1.0),
        (W.astype(jnp.bfloat16), X, 1.0),
        ([W], X, 1.0),
        (W, X, 1),
        (W, X, jnp.float32(1)),
        (W, X),
    ]
    assert all(signature(*args) != base for args in others)
    assert signature(W, 1, static=(1,)) == signature(W, 1, static=(1,)) != signature(W, 2, static=(1,))


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0, False)])
def test_static_values_of_other_types_need_another_program(one, other):
    """1 == 1.0 == True, but `x * 1` and `x * 1.0` have other dtypes."""
    assert signature_of(len, (W, one), (1,)) != signature_of(len, (W, other), (1,))


def test_keywords_are_put_in_their_places():
    def step(state, batch, lr=0.1, *, flag=False):
        return state

    assert bind(step, (1,), {"batch": 2}) == (1, 2)
    assert bind(step, (), {"lr": 3, "batch": 2, "state": 1}) == (1, 2, 3)
    with pytest.raises(TraceError, match=r"step takes \['flag'\] by keyword only"):
        bind(step, (1, 2), {"flag": True})
    with pytest.raises(TraceError, match="step can't be called like this: missing a required argument: 'batch'"):
        bind(step, (1,), {"lr": 2})


# ------------------------------------------------------------------------------------------------ leaves


@pytest.mark.parametrize("bad", ["text", object(), {1, 2}, lambda: 0], ids=["str", "object", "set", "function"])
def test_what_is_no_array_is_named(bad):
    with pytest.raises(TraceError, match=r"argument batch\['y'\] must be an array .*static_argnums"):
        trace(lambda state, batch: state, (W, {"x": X, "y": bad}))


def test_a_static_value_that_cannot_be_hashed_is_named():
    with pytest.raises(TraceError, match="static argument 1 is a list, which can't be hashed"):
        signature_of(len, (W, [1, 2]), (1,))


def test_python_scalars_stay_weak():
    traced = trace(lambda s, x, lr, n: (s * lr, x * n), (W.astype(jnp.bfloat16), X, 0.5, 2))
    assert [leaf.dtype for leaf in traced.results] == ["bfloat16", "float32"]
    assert [aval.weak_type for aval in traced.avals] == [False, False, True, True]


def test_the_traced_function_is_the_function():
    def step(state, batch):
        inner = jax.jit(lambda w, x: jnp.tanh(x @ w))
        return {"w": state["w"] + inner(state["w"], batch["x"]).sum()}, [batch["x"].mean(), None]

    traced = trace(step, ({"w": W}, {"x": X}))
    calls = []
    again = trace(lambda s, b: (calls.append(1), step(s, b))[1], ({"w": W}, {"x": X})).function()
    again({"w": W}, {"x": X})
    assert calls == [1]  # the user's code ran once
    expected = step({"w": W}, {"x": X})
    assert jax.tree.structure(traced.function()({"w": W}, {"x": X})) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_allclose, traced.function()({"w": W}, {"x": X}), expected)


def test_errors_of_the_function_pass_through():
    def broken(state, batch):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        trace(broken, (W, X))


def test_a_key_of_jax_random_is_a_leaf_like_any_other():
    """Its data are 2 words, but the leaf has no dims."""

    def step(state, batch):
        return {"key": jax.random.fold_in(state["key"], 1)}, jax.random.normal(state["key"], (4,))

    traced = trace(step, ({"key": jax.random.key(0)}, X))
    assert [leaf.shape for leaf in traced.arguments] == [(), (16, 8)]
    assert traced.donated == (0,)
    assert [traced.graph.tensors[t].shape for t in traced.graph.arguments] == [(2,), (16, 8)]
