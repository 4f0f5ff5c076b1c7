"""Steps in micro-batches: what the shares add up to is what `jax.jit` computes on the whole batch, or an error says why."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.extend.core import Var

from alpa_like.passes.batch_rules import Split
from alpa_like.passes.flat import function_of, sub_jaxpr
from alpa_like.passes.microbatch import MicroProgram, split_batch
from alpa_like.tracer import Trace, trace

B, D, C, T = 4, 3, 5, 6  # examples, features, classes, tokens
FAST: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
if jax.__version_info__ < (0, 11):
    FAST["xla_cpu_use_fusion_emitters"] = False  # compiles four times faster; later versions don't know the option
COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "add": jnp.add, "max": jnp.maximum, "min": jnp.minimum, "and": jnp.logical_and, "or": jnp.logical_or
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the emulator


def emulated(program: MicroProgram, traced: Trace) -> Callable[..., list[Any]]:
    """What a pipeline computes, in one process: `before`, then `micro` for every micro-batch, then `after`."""
    results = [v for v in program.outputs if isinstance(v, Var)]
    joined = [v for v in results if isinstance(program.statuses[v], Split)]
    goals = [*program.accumulated, *joined]
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

    def part(i: int, x: Any, m: int) -> Any:
        if i not in traced.batch or not x.shape:
            return x
        size = x.shape[0] // program.num_micro_batches
        return x[m * size : (m + 1) * size]

    def run(*flat: Any) -> list[Any]:
        made = before(*flat)
        numbers = range(program.num_micro_batches)
        shares = [
            jax.jit(micro)(*(part(i, x, m) for i, x in enumerate(flat)), *[np.int32(m)] * len(extra), *made)
            for m in numbers
        ]
        for var, share in zip(goals, shares[0], strict=True):
            assert share.shape == var.aval.shape
        return after(*flat, *(total(k, [s[k] for s in shares]) for k in range(len(goals))), *made)

    def total(k: int, shares: list[Any]) -> Any:
        if goals[k] in program.accumulated:
            combined = shares[0]
            for share in shares[1:]:
                combined = COMBINE[program.accumulated[goals[k]]](combined, share)
            return combined
        return jnp.concatenate(shares, program.statuses[goals[k]].dim)

    return run


def split(step: Any, args: Any, num_micro_batches: int, **options: Any) -> MicroProgram:
    return split_batch(trace(step, args), num_micro_batches, **options)


def in_parts(step: Any, args: Any, num_micro_batches: int, **options: Any) -> Any:
    traced = trace(step, args)
    program = split_batch(traced, num_micro_batches, **options)
    flat = [jnp.asarray(x) for x in jax.tree.leaves(args)]
    return jax.tree.unflatten(traced.out_tree, jax.jit(emulated(program, traced), compiler_options=FAST)(*flat))


def check(step: Any, args: Any, num_micro_batches: int, rtol: float = 2e-5) -> None:
    """The results in parts are those of the whole."""
    close(in_parts(step, args, num_micro_batches), jax.jit(step, compiler_options=FAST)(*args), rtol)


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
    return {
        "x": normal(size, D), "y": jnp.asarray(rng.integers(0, C, size), jnp.int32),
        "t": jnp.asarray(rng.integers(0, 7, (size, T)), jnp.int32), "m": jnp.asarray(rng.integers(0, 2, (size, T)) | np.eye(1, T, dtype=int), jnp.float32),
        "s": normal(size, T, D), "i": normal(size, 6, 6, 2), "a": normal(size, D, D), "c": jnp.float32(0.7),
    }  # fmt: skip


def train(loss: Any, optimizer: Any = None) -> Callable[..., Any]:
    """An SGD step of a loss that may return more besides."""
    tx = optimizer or optax.sgd(0.5)

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = state

        def with_more(params: Any) -> Any:
            found = loss(params, batch)
            return found if isinstance(found, tuple) else (found, ())

        (value, more), grads = jax.value_and_grad(with_more, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value, more

    step.init = lambda: (parameters(), tx.init(parameters()))  # pyright: ignore
    return step


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
    more = {
        "logits": out, "best": out.argmax(-1), "accuracy": (out.argmax(-1) == b["y"]).mean(), "most": out.max(),
        "least": out.min(0), "any": (out > 2).any(), "all": (out > -9).all(0), "hits": (out.argmax(-1) == b["y"]).sum(),
        "per class": jnp.zeros(C).at[b["y"]].add(1.0), "half": (b["y"] > 2).sum() // 2, "norm": jnp.sqrt((out**2).sum()),
        "positions": jnp.arange(len(out)) * 10, "batch": b["x"], "scalar": b["c"], "rms": jnp.sqrt((out**2).mean(0)),
        "perplexity": jnp.exp(nll(out, b["y"]).mean()), "f1": 2 * (out > 0).sum() / ((out > 0).sum() + (b["y"] > 0).sum()),
        "nan": jnp.isnan(out).any(), "count": len(b["x"]), "bincount": jnp.bincount(b["y"], length=C),
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
    return ranked.std(-1).mean() + top.sum() + jnp.linalg.norm(out, axis=-1).mean(), (which, jnp.argsort(out, -1), jnp.median(out, -1))


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
    return jnp.linalg.cholesky(m).sum() + solved.mean() + jnp.linalg.slogdet(m)[1].mean() + jnp.linalg.eigh(m)[0].max(-1).mean()


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
    critic = lambda x: jnp.tanh(x @ p["v"]) @ p["w"][:, 0]
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
    """Counters and slices that come out of a loop over the examples, and barriers between what is known early and late."""
    (i, h), sizes = lax.scan(lambda c, w: ((c[0] + 1, jnp.tanh(c[1] @ w)), (w**2).sum()), (0, b["x"]), p["l"])
    loss = nll(h @ p["w"], b["y"]).mean()
    total, count = lax.optimization_barrier((loss, i))
    return loss, (jnp.log(total), count, sizes)


LOSSES = {
    f.__name__: f
    for f in (
        by_row, masked_mean, weighted, several, metrics, rnn, layers, remat, remat_all, remat_scan, loops, condition,
        convolution, lookups, writes, ordered, experts, matrices, merged, pairs, mapped, attention, penalty, tied, custom,
        spectral, constants, nothing_shared,
    )
}  # fmt: skip
RANDOM = {f.__name__: f for f in (dropout, dropout_remat, dropout_scan, dropout_loops, random_places)}


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_means_what_it_meant(name: str) -> None:
    step = train(LOSSES[name])
    check(step, (step.init(), examples()), 2)
