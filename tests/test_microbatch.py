"""Steps in micro-batches: the shares add up to what `jax.jit` computes on the whole batch, or an error says why."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.extend.core import Var

from alpa_like.errors import MethodError, TraceError
from alpa_like.passes.avals import dtype_of, shape_of
from alpa_like.passes.batch_rules import Split
from alpa_like.passes.flat import function_of, sub_jaxpr
from alpa_like.passes.microbatch import MicroProgram, split_batch
from alpa_like.tracer import Trace, trace

B, D, C, T = 4, 3, 5, 6  # examples, features, classes, tokens
FAST: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
if jax.__version_info__ < (0, 11):
    FAST["xla_cpu_use_fusion_emitters"] = False  # compiles four times faster; later versions don't know the option
FIRST, SEEDS = 0, 24  # random programs
COMBINE: dict[str, Callable[..., Any]] = {
    "add": jnp.sum, "max": jnp.max, "min": jnp.min, "and": jnp.all, "or": jnp.any
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the emulator


def emulated(program: MicroProgram, traced: Trace) -> Callable[..., list[Any]]:
    """What a pipeline computes, in one process: `before`, then `micro` for every micro-batch, then `after`."""
    results = [v for v in program.outputs if isinstance(v, Var)]
    dims = {v: s.dim for v in results if isinstance(s := program.statuses[v], Split)}
    goals = [*program.accumulated, *dims]
    prepared = [v for v, _ in program.prepared]
    extra = [program.index] if program.index is not None else []
    before, micro, after = (
        function_of(sub_jaxpr(equations, inputs, outputs, program.constants), "piece")
        for equations, inputs, outputs in (
            (program.before, [program.whole_batch[v] for v in program.inputs], [w for _, w in program.prepared]),
            (program.micro, [*program.inputs, *extra, *prepared], goals),
            (program.after, [*program.inputs, *goals, *prepared], program.outputs),
        )
    )

    def run(*flat: Any) -> list[Any]:
        made = before(*flat)
        parts = {i: x.reshape(program.num_micro_batches, -1, *x.shape[1:]) for i, x in batch_of(flat).items()}

        def one(number: Any, part: dict[int, Any]) -> list[Any]:
            return micro(*(part.get(i, x) for i, x in enumerate(flat)), *[number] * len(extra), *made)

        shares = lax.map(lambda numbered: one(*numbered), (jnp.arange(program.num_micro_batches), parts))
        return after(*flat, *map(total, goals, shares), *made)

    def batch_of(flat: Any) -> dict[int, Any]:
        return {i: x for i, x in enumerate(flat) if i in traced.batch and x.shape}

    def total(goal: Any, shares: Any) -> Any:
        assert shares.shape[1:] == shape_of(goal)
        if goal in program.accumulated:
            return COMBINE[program.accumulated[goal]](shares, axis=0).astype(dtype_of(goal))
        return jnp.concatenate(list(shares), dims[goal])

    return run


def in_parts(step: Any, args: Any, num_micro_batches: int, **options: Any) -> Any:
    traced = trace(step, args)
    program = split_batch(traced, num_micro_batches, **options)
    flat = [jnp.asarray(x) for x in jax.tree.leaves(args)]
    return jax.tree.unflatten(traced.out_tree, jax.jit(emulated(program, traced), compiler_options=FAST)(*flat))


def whole(step: Any, args: Any) -> Any:
    return jax.jit(step, compiler_options=FAST)(*args)


def check(step: Any, args: Any, num_micro_batches: int = 2, rtol: float = 2e-5) -> None:
    """The results in parts are those of the whole."""
    close(in_parts(step, args, num_micro_batches), whole(step, args), rtol)


def close(found: Any, expected: Any, rtol: float = 2e-5) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype, path
        a, b = (np.asarray(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None) for x in (a, b))
        scale = max(1e-6, float(np.max(np.abs(np.where(np.isfinite(b), b, 0)), initial=0.0)))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale, err_msg=jax.tree_util.keystr(path))


# ------------------------------------------------------------------------------------------------- steps to cut


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def parameters() -> dict[str, jax.Array]:
    return {
        "w": normal(D, C), "v": normal(D, D, seed=1), "u": normal(D, D, seed=2), "e": normal(9, D), "b": normal(C),
        "k": normal(3, 3, 2, 4), "d": normal(3, 3, 1, 4), "h": normal(4, C), "l": normal(3, D, D),
    }  # fmt: skip


def examples(size: int = B) -> dict[str, Any]:
    rng = np.random.default_rng(size)
    mask = rng.integers(0, 2, (size, T)) | np.eye(1, T, dtype=int)
    return {
        "x": normal(size, D), "y": jnp.asarray(rng.integers(0, C, size), jnp.int32),
        "t": jnp.asarray(rng.integers(0, 7, (size, T)), jnp.int32), "m": jnp.asarray(mask, jnp.float32),
        "s": normal(size, T, D), "i": normal(size, 6, 6, 2), "a": normal(size, D, D), "c": jnp.float32(0.7),
    }  # fmt: skip


def with_more(loss: Any) -> Any:
    """A loss that may return more besides, as one that always does."""

    def found(*args: Any) -> Any:
        value = loss(*args)
        return value if isinstance(value, tuple) else (value, ())

    return found


def stepped(loss: Any, optimizer: Any = None) -> tuple[Any, Any]:
    """A step of an optimizer, SGD by default, and its arguments."""
    tx = optimizer or optax.sgd(0.5)

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = state
        (value, more), grads = jax.value_and_grad(with_more(loss), has_aux=True)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value, more

    return step, ((parameters(), tx.init(parameters())), examples())


def nll(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def hidden(p: Any, b: Any) -> Any:
    return jnp.tanh(b["x"] @ p["v"])


def by_row(p: Any, b: Any) -> Any:
    logits = hidden(p, b) @ p["w"]
    return -jax.nn.log_softmax(logits)[jnp.arange(len(b["y"])), b["y"]].mean()


def masked_mean(p: Any, b: Any) -> Any:
    per_token = nll(jnp.tanh(p["e"][b["t"]] @ p["v"]) @ p["w"], b["t"] % C)
    return jnp.sum(b["m"] * per_token) / jnp.sum(b["m"])


def weighted(p: Any, b: Any) -> Any:
    return jnp.average(nll(hidden(p, b) @ p["w"], b["y"]), weights=b["m"][:, 0] + 1.0)


def several(p: Any, b: Any) -> Any:
    out = hidden(p, b) @ p["w"]
    return nll(out, b["y"]).mean() + 0.1 * (out**2).sum() + b["c"] * jnp.abs(out).mean() + 0.01 * (p["w"] ** 2).sum()


def metrics(p: Any, b: Any) -> Any:
    out = hidden(p, b) @ p["w"]
    best = out.argmax(-1)
    more = {
        "logits": out, "best": best, "accuracy": (best == b["y"]).mean(), "most": out.max(), "least": out.min(0),
        "any": (out > 2).any(), "all": (out > -9).all(0), "hits": (best == b["y"]).sum(), "nan": jnp.isnan(out).any(),
        "per class": jnp.zeros(C).at[b["y"]].add(1.0), "half": (b["y"] > 2).sum() // 2, "count": len(out),
        "positions": jnp.arange(len(out)) * 10, "batch": b["x"], "scalar": b["c"], "rms": jnp.sqrt((out**2).mean(0)),
        "perplexity": jnp.exp(nll(out, b["y"]).mean()), "bincount": jnp.bincount(b["y"], length=C),
        "f1": 2 * (out > 0).sum() / ((out > 0).sum() + (b["y"] > 0).sum()),
    }  # fmt: skip
    return nll(out, b["y"]).mean(), more


def rnn(p: Any, b: Any) -> Any:
    def cell(h: Any, x: Any) -> Any:
        h = jnp.tanh(h @ p["v"] + x @ p["u"])
        return h, h @ p["w"]

    start = jnp.zeros((len(b["s"]), D))
    last, out = lax.scan(cell, start, b["s"].swapaxes(0, 1))
    return nll(out.swapaxes(0, 1), b["t"] % C).mean() + last.sum(), last


def layers(p: Any, b: Any) -> Any:
    h, norms = lax.scan(lambda h, w: (h + jnp.tanh(h @ w), (h**2).sum()), b["x"], p["l"])
    return nll(h @ p["w"], b["y"]).mean() + 1e-3 * norms.sum(), norms


def remat(p: Any, b: Any) -> Any:
    h = b["x"]
    for i in range(3):
        h = jax.checkpoint(lambda h, w: h + jnp.tanh(h @ w))(h, p["l"][i])
    return nll(h @ p["w"], b["y"]).mean()


def remat_all(p: Any, b: Any) -> Any:
    """The divisor is computed inside of the rematerialization, and the square root of a mean is its result."""
    loss, rms = jax.checkpoint(lambda p: (masked_mean(p, b), jnp.sqrt((p["e"][b["t"]] ** 2).mean())))(p)
    return loss, rms


def remat_scan(p: Any, b: Any) -> Any:
    block = jax.checkpoint(lambda h, w: (h + jnp.tanh(h @ w), None))
    return nll(lax.scan(block, b["x"], p["l"])[0] @ p["w"], b["y"]).mean()


def loops(p: Any, b: Any) -> Any:
    h = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["l"][i]) + i, b["x"])
    g = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 0.5), (0, lax.stop_gradient(h)))
    return nll(h @ p["w"], b["y"]).mean() + g[1].sum(), g[0]


def condition(p: Any, b: Any) -> Any:
    h = lax.cond(p["b"][0] > 0, lambda x: jnp.tanh(x @ p["v"]), lambda x: x * 2, b["x"])
    g = lax.cond(p["b"][1] > 0, lambda x: jnp.zeros_like(x), lambda x: x, h)
    return nll((h + g) @ p["w"], b["y"]).mean()


def dropout(p: Any, b: Any, key: Any) -> Any:
    keys = jax.random.split(key, 2)
    h = hidden(p, b)
    h = jnp.where(jax.random.bernoulli(keys[0], 0.7, h.shape), h / 0.7, 0)
    return nll(h @ p["w"] + jax.random.normal(keys[1], (len(h), C)), b["y"]).mean()


def dropout_remat(p: Any, b: Any, key: Any) -> Any:
    def block(h: Any, key: Any) -> Any:
        return jnp.where(jax.random.bernoulli(key, 0.7, h.shape), jnp.tanh(h @ p["v"]), 0)

    return nll(jax.checkpoint(block)(b["x"], key) @ p["w"], b["y"]).mean()


def dropout_scan(p: Any, b: Any, key: Any) -> Any:
    def block(carry: Any, w: Any) -> Any:
        h, key = carry
        key, mine = jax.random.split(key)
        noise = jnp.swapaxes(jax.random.normal(mine, (D, len(h))), 0, 1)
        return (jnp.tanh(h @ w) * jax.random.bernoulli(mine, 0.7, h.shape) + noise, key), None

    (h, key), _ = lax.scan(jax.checkpoint(block), (b["x"], key), p["l"])
    return nll(h @ p["w"], b["y"]).mean()


def dropout_loops(p: Any, b: Any, key: Any) -> Any:
    """Random numbers in a while loop, in a branch, and by example."""

    def turn(i: Any, h: Any) -> Any:
        return h + jax.random.normal(jax.random.fold_in(key, i), h.shape)

    h = lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, turn(*c)), (0, b["x"]))[1]
    h += lax.cond(p["b"][0] > 0, lambda: jax.random.uniform(key, h.shape), lambda: jnp.zeros_like(h))
    own = jax.vmap(lambda k: jax.random.normal(k, (D,)))(jax.random.split(key, len(h)))
    return nll((h + own + hidden(p, b)) @ p["w"], b["y"]).mean(), own


def random_places(p: Any, b: Any, key: Any) -> Any:
    """Draws whose count is not the batch's, and a count that follows from random bits."""
    keep = jax.random.bernoulli(key, 0.5, b["t"].shape)
    per_token = nll(p["e"][b["t"]] @ p["w"], b["t"] % C)
    label = jax.random.randint(key, b["y"].shape, 0, C)
    gumbel = jax.random.categorical(key, hidden(p, b) @ p["w"])
    return jnp.sum(keep * per_token) / jnp.sum(keep) + nll(hidden(p, b) @ p["w"], label).mean(), gumbel


def convolution(p: Any, b: Any) -> Any:
    h = lax.conv_general_dilated(b["i"], p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    h = lax.conv_general_dilated(
        jax.nn.relu(h), p["d"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
    )
    h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    h += lax.reduce_window(b["i"], 0.0, lax.add, (1, 5, 5, 1), (1, 1, 1, 1), "VALID").repeat(2, axis=-1)
    return nll(h.mean((1, 2)) @ p["h"], b["y"]).mean()


def lookups(p: Any, b: Any) -> Any:
    h = jnp.take(p["e"], b["t"], axis=0) @ p["v"]
    size = len(h)
    last = h[jnp.arange(size), b["y"]] + h[np.arange(size), -1]
    picked = jnp.take_along_axis(h, b["t"][:, :2, None] % T, axis=1).sum(1)
    several = h[jnp.arange(size)[:, None], b["t"][:, :2] % T].sum(1)
    sliced = jax.vmap(lambda h, i: lax.dynamic_slice_in_dim(h, i, 2))(h, b["y"] % 4).sum(1)
    return nll((last + picked + several + sliced) @ p["w"], b["y"]).mean()


def writes(p: Any, b: Any) -> Any:
    h = p["e"][b["t"]] @ p["v"]
    rows = jnp.arange(len(h))
    h = h.at[rows, b["y"]].add(b["x"]).at[rows[:, None], b["t"][:, :2] % T].multiply(2.0).at[:, 1].set(b["x"])
    h = h.at[rows, 0, 0].set(1.0)
    one_hot = jnp.zeros((len(h), C)).at[rows, b["y"]].set(1.0)
    h = h.at[:, :2].add(1.0)
    return -(jax.nn.log_softmax(h.sum(1) @ p["w"]) * one_hot).sum(1).mean(), one_hot


def ordered(p: Any, b: Any) -> Any:
    out = hidden(p, b) @ p["w"]
    top, which = lax.top_k(out, 2)
    ranked = jnp.sort(out, axis=-1) + jnp.cumsum(out, axis=-1) + jnp.flip(out, -1) + jnp.roll(out, 1, -1)
    loss = ranked.std(-1).mean() + top.sum() + jnp.linalg.norm(out, axis=-1).mean()
    return loss, (which, jnp.argsort(out, -1), jnp.median(out, -1))


def experts(p: Any, b: Any) -> Any:
    """Tokens of an example are sorted by expert, and go back to where they were."""
    h = p["e"][b["t"]]
    order = jnp.argsort(jnp.argmax(h @ p["w"], -1), axis=-1)
    moved = jnp.take_along_axis(h, order[..., None], axis=1)
    worked = jnp.tanh(moved @ p["v"]) * (1 + jnp.arange(T)[None, :, None])
    back = jnp.zeros_like(worked).at[jnp.arange(len(h))[:, None], order].set(worked)
    gate = jax.nn.one_hot(jnp.argmax(back @ p["w"], -1), C)
    balance = (gate.mean((0, 1)) * 1.0).sum() * C
    return (jax.nn.logsumexp(back @ p["w"], -1) * gate.max(-1)).mean() + balance


def matrices(p: Any, b: Any) -> Any:
    m = b["a"] @ b["a"].swapaxes(1, 2) + jnp.eye(D) * 3 + p["v"] @ p["v"].T
    solved = jnp.linalg.solve(m, b["x"][..., None])[..., 0]
    return jnp.linalg.cholesky(m).sum() + solved.mean() + jnp.linalg.slogdet(m)[1].mean()


def merged(p: Any, b: Any) -> Any:
    """The batch before, behind and between other dims."""
    major = b["s"].reshape(-1, D) @ p["v"]
    minor = b["s"].swapaxes(0, 1).reshape(-1, D) @ p["u"]
    bias = jnp.ones((len(minor), 1)) * minor
    back = (bias + minor).reshape(T, -1, D).swapaxes(0, 1)
    columns = (p["v"] @ b["x"].T)[:, :, None] * b["s"].mean(1).T[:, :, None]
    loss = nll(major @ p["w"], b["t"].reshape(-1) % C).mean() + nll(minor @ p["w"], b["t"].T.reshape(-1) % C).mean()
    return loss + back.sum() + (columns.reshape(D, -1).sum(0) ** 2).mean(), (back, major)


def pairs(p: Any, b: Any) -> Any:
    """Neighbours are compared, and a micro-batch holds whole pairs."""
    score = (hidden(p, b) @ p["w"][:, 0]).reshape(-1, 2)
    return -jax.nn.log_sigmoid(score[:, 0] - score[:, 1]).mean(), score


def mapped(p: Any, b: Any) -> Any:
    def one(x: Any, y: Any, s: Any, key: Any) -> Any:
        h = jnp.tanh(x @ p["v"]) + jnp.where(x[0] > 0, s.max(0), s[y])
        kernel = jax.random.normal(key, (D, D))
        return nll((h @ kernel) @ p["w"], y)

    return jax.vmap(one)(b["x"], b["y"], b["s"], jax.random.split(jax.random.key(3), len(b["x"]))).mean()


def attention(p: Any, b: Any) -> Any:
    q, k, v = (jnp.einsum("btd,de->bte", b["s"], p[n]) for n in ("v", "u", "v"))
    causal = jnp.tril(jnp.ones((T, T), bool)) & (b["m"][:, None, :] > 0)
    weights = jax.nn.softmax(jnp.where(causal, jnp.einsum("bqd,bkd->bqk", q, k), -1e9))
    return nll(jnp.einsum("bqk,bkd->bqd", weights, v).mean(1) @ p["w"], b["y"]).mean()


def penalty(p: Any, b: Any) -> Any:
    """The gradient by example is itself differentiated."""

    def critic(x: Any) -> Any:
        return jnp.tanh(x @ p["v"]) @ p["w"][:, 0]

    slope = jax.grad(lambda x: critic(x).sum())(b["x"])
    return critic(b["x"]).mean() + ((jnp.linalg.norm(slope, axis=-1) - 1) ** 2).mean()


def tied(p: Any, b: Any) -> Any:
    h = jnp.tanh(p["e"][b["t"]] @ p["v"])
    return nll(h @ p["e"].T, b["t"]).mean() + (h @ p["v"]).mean()


@jax.custom_vjp
def clipped(x: Any) -> Any:
    return x * 2


clipped.defvjp(lambda x: (x * 2, x), lambda x, g: (jnp.clip(g, -0.01, 0.01) * jnp.sign(x),))


@jax.custom_jvp
def rounded(x: Any) -> Any:
    return jnp.round(x)


rounded.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))


def custom(p: Any, b: Any) -> Any:
    h = clipped(hidden(p, b)) + rounded(b["x"] @ p["u"]) + lax.stop_gradient(b["x"] @ p["v"])
    return nll(h @ p["w"], b["y"]).mean()


def half(p: Any, b: Any) -> Any:
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)
    h = jnp.tanh(b["x"].astype(jnp.bfloat16) @ p["v"])
    return nll((h @ p["w"]).astype(jnp.float32), b["y"]).mean()


def spectral(p: Any, b: Any) -> Any:
    waves = jnp.fft.fft2(b["s"] @ p["v"], axes=(1, 2))
    return (jnp.abs(waves) ** 2).mean() + jnp.real(jnp.fft.rfft(b["s"], axis=-1)).sum() * p["b"][0]


def constants(p: Any, b: Any) -> Any:
    """Arrays of NumPy that are as large as the batch, and slices of a parameter by its size."""
    size = len(b["x"])
    weights = np.linspace(0, 1, size * C).reshape(size, C)
    table = lax.stop_gradient(p["e"])[:size] + p["e"][size - 1]
    return ((hidden(p, b) @ p["w"]) * weights).sum() + (table * b["x"]).mean(), jnp.arange(size) < size // 2


def nothing_shared(p: Any, b: Any) -> Any:
    """Counters and sums out of a loop over the examples, and a barrier between what is known early and late."""
    (i, h), sizes = lax.scan(lambda c, w: ((c[0] + 1, jnp.tanh(c[1] @ w)), (w**2).sum()), (0, b["x"]), p["l"])
    loss = nll(h @ p["w"], b["y"]).mean()
    total, count = lax.optimization_barrier((loss, i))
    return loss, (jnp.log(total), count, sizes)


LOSSES = {
    f.__name__: f
    for f in (
        by_row, masked_mean, weighted, several, metrics, rnn, layers, remat, remat_all, remat_scan, loops, condition,
        convolution, lookups, writes, ordered, experts, matrices, merged, pairs, mapped, attention, penalty, tied,
        custom, spectral, constants, nothing_shared,
    )
}  # fmt: skip


RANDOM = {f.__name__: f for f in (dropout, dropout_remat, dropout_scan, dropout_loops, random_places)}
CLIPPED = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, eps=1e-3, weight_decay=0.1))


# ------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_means_what_it_meant(name: str) -> None:
    check(*stepped(LOSSES[name]))


@pytest.mark.parametrize("name", ["by_row", "merged"])
def test_one_example_per_micro_batch(name: str) -> None:
    check(*stepped(LOSSES[name]), num_micro_batches=B)


@pytest.mark.parametrize(("name", "raw"), [*((name, False) for name in RANDOM), ("dropout", True)])
def test_random_bits_are_those_of_the_whole_batch(name: str, raw: bool) -> None:
    def step(state: Any, batch: Any) -> Any:
        params, key = state
        key, mine = jax.random.split(key)
        (value, more), grads = jax.value_and_grad(with_more(RANDOM[name]), has_aux=True)(params, batch, mine)
        return (jax.tree.map(lambda p, g: p - g, params, grads), key), value, more

    key = jax.random.PRNGKey(1) if raw else jax.random.key(1)
    check(step, ((parameters(), key), examples()))


def test_the_optimizer_sees_the_whole_gradient() -> None:
    check(*stepped(tied, CLIPPED), rtol=2e-4)


def test_sixteen_bits_are_as_good_as_sums_of_them() -> None:
    check(*stepped(half), rtol=2e-2)


def test_another_place_of_the_batch_argument_and_lists_of_steps() -> None:
    def step(batch: Any, params: Any, rate: Any) -> Any:
        losses = [jax.value_and_grad(f)(params, batch) for f in (by_row, masked_mean)]
        grads = {i: g for i, (_, g) in enumerate(losses)}
        return jax.tree.map(lambda p, a, b: p - rate * (a + b), params, grads[0], grads[1]), grads, losses[0][0]

    args = (examples(), parameters(), 0.5)
    traced = trace(step, args, batch_argnums=(0,))
    found = jax.jit(emulated(split_batch(traced, 2), traced), compiler_options=FAST)(*jax.tree.leaves(args))
    close(jax.tree.unflatten(traced.out_tree, found), whole(step, args))


def test_one_micro_batch_may_mix_examples() -> None:
    def loss(p: Any, b: Any) -> Any:
        h = hidden(p, b)
        h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-3)
        alike = jax.nn.log_softmax(h @ h.T)[jnp.arange(len(h)), jnp.arange(len(h))[::-1]]
        order = jax.random.permutation(jax.random.key(0), len(h))
        later = lax.while_loop(lambda x: (x > 0.5).any(), lambda x: x * 0.5, lax.stop_gradient(h))
        return -alike.mean() + jnp.sqrt((h[order] * jnp.cumsum(h, 0)).mean() ** 2 + 1), (later, jnp.eye(len(h)))

    check(*stepped(loss), num_micro_batches=1)


def test_what_no_result_needs_is_no_hindrance() -> None:
    def loss(p: Any, b: Any) -> Any:
        jnp.cumsum(b["x"], 0)
        jax.debug.print("loss")
        return by_row(p, b)

    check(*stepped(loss))


# ---------------------------------------------------------------------------------------------- batch statistics


def fast_norm(x: Any, scale: Any) -> Any:
    """As flax computes it: E[x²] - E[x]², and the scale is multiplied into the statistic."""
    mean = x.mean(0)
    variance = (x * x).mean(0) - mean * mean
    return (x - mean) * (lax.rsqrt(variance + 1e-3) * scale), (mean, variance)


def slow_norm(x: Any, scale: Any) -> Any:
    mean, variance = x.mean(0), x.var(0)
    return (x - mean) / jnp.sqrt(variance + 1e-3) * scale, (mean, variance)


def largest_norm(x: Any, scale: Any) -> Any:
    largest = jnp.abs(x).max(0)
    return x / (largest + 1) * jnp.tanh(scale * x.mean(0)), (x.mean(0),)


def normed_loss(norm: Any) -> Any:
    def loss(p: Any, b: Any) -> Any:
        h, first = norm(b["x"] @ p["v"], p["b"][:D])
        h, second = norm(jnp.tanh(h) @ p["u"], p["v"][0] + 1)
        return nll(h @ p["w"], b["y"]).mean() + 0.1 * jnp.tanh(second[0] * p["v"][1]).sum(), (first, second)

    return loss


def normed_step(loss: Any, several: Callable[[Any], list[Any]]) -> Any:
    """The loss, its gradient and the statistics are means over `several(batch)`; the update is not linear in them."""

    def step(params: Any, batch: Any) -> Any:
        found = [jax.value_and_grad(loss, has_aux=True)(params, part) for part in several(batch)]
        (value, statistics), grads = jax.tree.map(lambda *x: sum(x) / len(x), *found)
        running = jax.tree.map(lambda x: 0.9 * 0.3 + 0.1 * x, statistics)
        return jax.tree.map(lambda p, g: p - g / (1 + (g * g).sum()), params, grads), value, running

    return step


@pytest.mark.parametrize(("norm", "remat"), [(fast_norm, False), (slow_norm, True), (largest_norm, False)])
def test_statistics_of_the_micro_batch(norm: Any, remat: bool) -> None:
    def halves(batch: Any) -> list[Any]:
        return [jax.tree.map(lambda x, h=half: x[h] if x.ndim else x, batch) for half in (slice(B), slice(B, 2 * B))]

    args, loss = (parameters(), examples(2 * B)), normed_loss(norm)
    step = normed_step(jax.checkpoint(loss) if remat else loss, lambda batch: [batch])
    close(in_parts(step, args, 2, statistics="micro_batch"), whole(normed_step(loss, halves), args), 1e-4)


def test_what_is_no_statistic_stays_whole() -> None:
    """With the option too: the divisor of a masked mean, and a metric that no example reads."""

    def loss(p: Any, b: Any) -> Any:
        value, more = metrics(p, b)
        return value + masked_mean(p, b), more

    step, args = stepped(loss)
    close(in_parts(step, args, 2, statistics="micro_batch"), whole(step, args))


# -------------------------------------------------------------------------------------------------------- errors

MIXED: dict[str, tuple[Any, str]] = {
    "contrastive": (lambda p, b: jax.nn.logsumexp(hidden(p, b) @ b["x"].T), "every example meets every other"),
    "normalized": (lambda p, b: slow_norm(hidden(p, b), 1.0)[0], 'batch_statistics="micro_batch"'),
    "root of a mean": (lambda p, b: jax.grad(lambda p: jnp.sqrt((hidden(p, b) ** 2).mean()))(p), "repeated for every"),
    "learned weights": (
        lambda p, b: jax.grad(lambda p: jnp.average(b["x"][:, 0], weights=jnp.exp(hidden(p, b)[:, 0])))(p), "batch",
    ),
    "gradient norm": (
        lambda p, b: jax.grad(lambda q: optax.tree.norm(jax.grad(by_row)(q, b)))(p), "meets the examples",
    ),
    "largest": (lambda p, b: jax.grad(lambda p: hidden(p, b).max())(p), "meets the examples"),
    "cumulative": (lambda p, b: jnp.cumsum(b["x"], 0), "cumsum works along the batch"),
    "sorted": (lambda p, b: jnp.sort(b["x"], 0), "sort works along the batch"),
    "rolled": (lambda p, b: jnp.roll(b["x"], 1, 0), "for a batch of 4 examples"),
    "flipped": (lambda p, b: jnp.flip(b["x"], 0), "rev works along the batch"),
    "transformed": (lambda p, b: jnp.real(jnp.fft.fft2(b["x"])), "fft"),
    "permuted": (lambda p, b: b["x"][jax.random.permutation(jax.random.key(0), len(b["x"]))], "along the batch"),
    "argmax": (lambda p, b: jnp.argmax(b["x"], 0), "argmax over the batch"),
    "product": (lambda p, b: jnp.prod(b["x"], 0), "reduce_prod over the batch"),
    "first": (lambda p, b: b["x"][0], "takes or fills a part of the batch"),
    "halves": (lambda p, b: b["x"][: len(b["x"]) // 2], "takes or fills a part of the batch"),
    "neighbours": (lambda p, b: b["x"][jnp.arange(len(b["x"])) - 1], "looked up by their place"),
    "other rows": (lambda p, b: b["x"].repeat(2, axis=0)[jnp.arange(len(b["x"]))], "looked up by their place"),
    "chosen rows": (lambda p, b: b["x"][b["y"] % len(b["x"])], "looked up by their place"),
    "written rows": (lambda p, b: b["x"].at[b["y"] % len(b["x"])].set(0.0), "written by their place"),
    "joined": (lambda p, b: jnp.concatenate([b["x"], b["x"]]), "joined along the batch"),
    "counted on": (lambda p, b: p["e"].at[b["t"]].add(1.0), "holds no zeros"),
    "a table by place": (lambda p, b: jnp.zeros((40, D)).at[: len(b["x"])].add(b["x"]), "written by place"),
    "far apart": (lambda p, b: b["x"].reshape(2, -1, D), "taken apart"),
    "two orders": (
        lambda p, b: b["s"].reshape(-1, D).T @ b["s"].swapaxes(0, 1).reshape(-1, D), "different orders",
    ),
    "inside": (lambda p, b: b["s"].swapaxes(0, 1).reshape(-1, D), "the examples inside another dim"),
    "square": (lambda p, b: jnp.eye(len(b["x"])), "the batch in two dims"),
    "until all": (lambda p, b: lax.while_loop(lambda x: (x > 1).any(), lambda x: x / 2, b["x"]), "how long a loop"),
    "one by one": (lambda p, b: lax.map(lambda x: x * 2, b["x"]), "no loop over the batch"),
    "unrolled": (lambda p, b: sum(b["x"][i] for i in range(len(b["x"]))), "no loop over the batch"),
    "mixed groups": (
        lambda p, b: lax.conv_general_dilated(b["x"][:, None], jnp.ones((2, 1, 2)), (1,), "VALID", batch_group_count=2),
        "the convolution mixes",
    ),
    "groups of features": (
        lambda p, b: lax.conv_general_dilated(
            b["x"].T[:, :, None], b["x"].reshape(-1, 2 * D)[:, :2].T[:, :, None], (1,), "VALID", feature_group_count=2
        ),
        "the convolution mixes",
    ),
    "a column by size": (lambda p, b: jnp.tile(b["s"], (1, 2, 1))[:, len(b["s"]) - 1], "depends on the batch size"),
    "pooled": (lambda p, b: lax.reduce_window(b["x"], 0.0, lax.add, (1, 1), (2, 1), "VALID"), "moves over the batch"),
    "one key": (lambda p, b: jax.random.gamma(jax.random.key(0), jnp.abs(b["x"])), "from one key"),
    "unknown": (lambda p, b: jax.pure_callback(lambda x: x, b["x"], b["x"]), "pure_callback is not known"),
    "padded": (lambda p, b: lax.pad(b["x"], 0.0, [(0, 9 - len(b["x"]), 0), (0, 0, 0)]), "padding_config of pad"),
    "constant": (lambda p, b: b["x"] + jnp.ones((B, 1)), "instead of a constant"),
    "key of a loop": (
        lambda p, b: lax.fori_loop(0, 2, lambda i, c: (c[0] * 2, jax.random.clone(c[1])), (b["x"], jax.random.key(0))),
        "make that one outside",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_examples_that_meet_are_an_error(name: str) -> None:
    fun, reason = MIXED[name]
    with pytest.raises(TraceError, match=re.escape(reason)):
        split_batch(trace(lambda p, b: (p, fun(p, b)), (parameters(), examples())), 2)


def test_side_effects_are_an_error() -> None:
    def step(p: Any, b: Any) -> Any:
        return p, io_callback(np.asarray, b["x"], b["x"])

    with pytest.raises(TraceError, match=r"io_callback .* has side effects"):
        split_batch(trace(step, (parameters(), examples())), 2)


def test_the_batch_must_divide() -> None:
    traced = trace(*stepped(by_row))
    with pytest.raises(MethodError, match="does not divide the batch of 4 examples; choose one of 1, 2, 4"):
        split_batch(traced, 3)
    with pytest.raises(MethodError, match=r"one common dim 0, but .* has b"):
        split_batch(trace(lambda p, b: p, (parameters(), {"x": jnp.ones((4, 2)), "y": jnp.ones(3)})), 2)
    with pytest.raises(MethodError, match="has none; name the batch in batch_argnums"):
        split_batch(trace(lambda p, b: p, (parameters(), 1.0)), 2)


# -------------------------------------------------------------------------------------------------- what runs when


def test_what_depends_on_the_batch_alone_is_prepared() -> None:
    """The count of the mask once, on the whole batch; no index where nothing is random."""
    program = split_batch(trace(*stepped(masked_mean)), 2)
    assert {e.primitive.name for e in program.before} >= {"reduce_sum"}
    assert all(shape_of(var) == () for var, _ in program.prepared)
    assert program.index is None
    assert split_batch(trace(*stepped(by_row)), 2).index is not None


def test_the_update_runs_once_and_gradients_are_accumulated() -> None:
    program = split_batch(trace(*stepped(several, CLIPPED)), 2)
    after, micro = ({e.primitive.name for e in eqns} for eqns in (program.after, program.micro))
    assert "sqrt" in after
    assert "sqrt" not in micro
    assert "dot_general" in micro
    assert "dot_general" not in after
    shapes = sorted(shape_of(v) for v, op in program.accumulated.items() if op == "add" and shape_of(v))
    assert shapes == [(D, D), (D, C)]


# ------------------------------------------------------------------------------------------------ random programs

Shapes = list[Any]
Made = tuple[Callable[..., Any], list[int]]
"""A function and the numbers of the values that it reads."""


class Chooser:
    """Chooses among values made so far, late ones more often, and dims, mostly not the batch."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.small: Shapes = jax.tree.leaves(jax.eval_shape(fuzz_arguments))
        self.large: Shapes = jax.tree.leaves(jax.eval_shape(lambda: fuzz_arguments(2 * B)))

    def one(self, fits: Callable[[Any], bool]) -> int:
        found = [i for i, s in enumerate(self.small) if fits(s)]
        weights = np.arange(1.0, len(found) + 1) ** 1.5
        return int(self.rng.choice(found, p=weights / weights.sum()))

    def array(self, rank: int = 1) -> int:
        return self.one(lambda s: jnp.issubdtype(s.dtype, jnp.floating) and s.ndim >= rank)

    def like(self, i: int) -> int:
        return self.one(lambda s: s.shape == self.small[i].shape and s.dtype == self.small[i].dtype)

    def places(self, fits: Callable[[Any], bool] = lambda s: s.ndim > 0) -> int:
        return self.one(lambda s: jnp.issubdtype(s.dtype, jnp.integer) and fits(s))

    def dim(self, i: int) -> int:
        pairs = zip(self.small[i].shape, self.large[i].shape, strict=True)
        weights = np.array([1.0 if a == b else 0.2 for a, b in pairs])
        return int(self.rng.choice(len(weights), p=weights / weights.sum()))

    def of(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]


def fuzz_arguments(size: int = B) -> Any:
    rng = np.random.default_rng(0)
    params = {"w": normal(3, 4), "v": normal(4, 4), "b": normal(4), "e": normal(6, 2)}
    labels = jnp.asarray(rng.integers(0, 6, (size, 2)), jnp.int32)
    return params, {"x": normal(size, 3), "q": normal(size, 4), "s": normal(size, 2, 4), "t": labels, "y": labels[:, 0]}


def elementwise(c: Chooser) -> Made:
    return c.of(jnp.tanh, jnp.sin, lambda x: 0.5 * x + 1, jax.nn.relu, jnp.zeros_like), [c.array(0)]


def binary(c: Chooser) -> Made:
    i = c.array(0)
    return c.of(jnp.add, jnp.subtract, lambda a, b: jnp.tanh(a) * jnp.tanh(b), jnp.maximum), [i, c.like(i)]


def reduction(c: Chooser) -> Made:
    i = c.array()
    dim, fun, keep = c.dim(i), c.of(jnp.sum, jnp.mean, jnp.max, jnp.min), c.of(True, False)
    return lambda x: fun(x, axis=dim, keepdims=keep), [i]


def total(c: Chooser) -> Made:
    return c.of(jnp.sum, jnp.mean, jnp.max), [c.array()]


def product(c: Chooser) -> Made:
    """A dot product over one pair of dims, and perhaps along another."""
    i, j = c.array(), c.array()
    a, b = c.dim(i), c.dim(j)
    kept = [(k, m) for k in range(len(c.small[i].shape)) for m in range(len(c.small[j].shape)) if k != a and m != b]
    chosen = [kept[int(c.rng.integers(len(kept)))]] if kept and c.of(True, False) else []
    along = tuple(k for k, _ in chosen), tuple(m for _, m in chosen)
    return lambda x, y: jnp.tanh(lax.dot_general(x, y, (((a,), (b,)), along))), [i, j]


def moved(c: Chooser) -> Made:
    i = c.array(2)
    order = tuple(int(d) for d in c.rng.permutation(c.small[i].ndim))
    return lambda x: jnp.transpose(x, order), [i]


def joined_dims(c: Chooser) -> Made:
    i = c.array(2)
    d = int(c.rng.integers(c.small[i].ndim - 1))
    return lambda x: x.reshape(*x.shape[:d], -1, *x.shape[d + 2 :]), [i]


def parted_dim(c: Chooser) -> Made:
    i = c.array()
    d, parts = c.dim(i), c.of((2, -1), (-1, 2), (4, -1))
    return lambda x: x.reshape(*x.shape[:d], *parts, *x.shape[d + 1 :]), [i]


def along_dim(c: Chooser) -> Made:
    i = c.array()
    d = c.dim(i)
    funs = (
        lambda x: jnp.cumsum(x, d) / 4, lambda x: jnp.flip(x, d), lambda x: jnp.roll(x, 1, d), lambda x: jnp.sort(x, d),
        lambda x: jax.nn.softmax(x, d), lambda x: x - x.mean(d, keepdims=True), lambda x: jnp.take(x, 0, d),
        lambda x: jnp.concatenate([x, jnp.sin(x)], d), lambda x: jnp.stack([x, x], d), lambda x: jnp.argsort(x, d),
        lambda x: lax.slice_in_dim(x, 1, None, axis=d), lambda x: lax.broadcasted_iota(jnp.float32, x.shape, d),
        lambda x: jnp.repeat(x, 2, d), lambda x: jnp.argmax(x, d),
    )  # fmt: skip
    return c.of(*funs), [i]


def looked_up(c: Chooser) -> Made:
    return lambda x, places: jnp.take(x, places, axis=0, mode="clip"), [c.array(), c.places()]


def own_rows(c: Chooser) -> Made:
    i = c.array(2)
    size, shift = c.small[i].shape[0], c.of(0, 0, 0, 1)
    j = c.places(lambda s: s.shape == (size,))

    def read(x: Any, places: Any) -> Any:
        return x[jnp.arange(len(x)) - shift, places % x.shape[1]]

    def write(x: Any, places: Any) -> Any:
        return x.at[jnp.arange(len(x)) - shift, places % x.shape[1]].set(0.5)

    return c.of(read, write), [i, j]


def collected(c: Chooser) -> Made:
    i = c.array()
    size, kind = c.small[i].shape[0], c.of("add", "add", "max", "set")
    j = c.places(lambda s: s.shape == (size,))
    return lambda x, places: getattr(jnp.zeros((6, *x.shape[1:])).at[places], kind)(x), [i, j]


def loop(c: Chooser) -> Made:
    i = c.array()
    funs = (
        lambda x: lax.scan(lambda h, _: (jnp.tanh(1.1 * h + 0.1), None), x, None, length=3)[0],
        lambda x: lax.scan(lambda h, r: (0.5 * h + r, h), jnp.zeros(x.shape[1:]), x)[1],
        lambda x: lax.scan(lambda h, r: (0.5 * h + r.sum(), jnp.sin(r)), 0.0, x)[0],
    )
    return c.of(*funs), [i]


def again(c: Chooser) -> Made:
    fun = jax.checkpoint(c.of(lambda x, y: jnp.tanh(x) * jnp.sin(y).sum(), lambda x, y: jnp.sin(x).mean() * y))
    return fun, [c.array(), c.array(0)]


def chosen_branch(c: Chooser) -> Made:
    fun = c.of(jnp.zeros_like, jnp.tanh)
    return lambda x, y: lax.cond(y.sum() > 0, lambda x: x * 2, fun, x), [c.array(), c.array(0)]


def whole_numbers(c: Chooser) -> Made:
    if c.of(True, False):
        return lambda x: jnp.floor(3 * x).astype(jnp.int32), [c.array(0)]
    return c.of(lambda x: x // 2, lambda x: x % 3, jnp.sum), [c.places(lambda s: True)]


def drawn(c: Chooser) -> Made:
    seed = c.of(0, 1)
    return lambda x: jax.random.normal(jax.random.key(seed), x.shape), [c.array()]


KINDS = (
    elementwise, binary, binary, reduction, total, product, product, moved, joined_dims, joined_dims, parted_dim,
    along_dim, along_dim, looked_up, own_rows, collected, loop, again, chosen_branch, whole_numbers, drawn,
)  # fmt: skip


def random_program(seed: int, length: int = 7) -> tuple[Any, Any]:
    """A step that does `length` things and returns some of them and the gradient of others, and its arguments."""
    c = Chooser(seed)
    made: list[Made] = []
    first = len(c.small)
    while len(made) < length:
        try:
            fun, operands = c.of(*KINDS)(c)
            shapes = [jax.eval_shape(fun, *(pool[i] for i in operands)) for pool in (c.small, c.large)]
        except (TypeError, ValueError, IndexError):
            continue  # no such values, or shapes that don't fit
        if shapes[0].size < 500 and shapes[0].ndim < 5:
            made.append((fun, operands))
            c.small.append(shapes[0])
            c.large.append(shapes[1])
    floats = [i for i, s in enumerate(c.small) if i >= first and jnp.issubdtype(s.dtype, jnp.floating)]
    summed = [i for i in floats if c.of(True, False)] or floats[-1:]
    returned = [i for i in range(first, len(c.small)) if c.of(True, False)]

    def loss(params: Any, batch: Any) -> Any:
        values = jax.tree.leaves((params, batch))
        for fun, operands in made:
            values.append(fun(*(values[i] for i in operands)))
        return sum((jnp.mean(jnp.tanh(values[i])) for i in summed), params["b"].sum()), [values[i] for i in returned]

    def step(params: Any, batch: Any) -> Any:
        (value, more), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value, more

    return step, fuzz_arguments()


def test_random_programs_are_right_or_refused() -> None:
    """Never silently wrong: about half of them mix examples somewhere."""
    refused = 0
    for seed in range(FIRST, FIRST + SEEDS):
        step, args = random_program(seed)
        try:
            check(step, args, rtol=2e-4)
        except TraceError:
            refused += 1
    assert SEEDS / 4 < refused < SEEDS * 3 / 4
