"""The U-Net against loops in numpy written from the papers, and its two tasks: finding noise, labelling pixels."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alpa_like import models

Array = np.ndarray
Tree = dict[str, Any]
FAST: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}  # compile quickly, the sizes are tiny
CONFIG = models.UNetConfig(
    image_size=6, channels=6, multipliers=(1, 2), blocks=2, attention_levels=(1,), num_heads=3, groups=3, num_times=9
)
# One level: a block on the way down, two in the middle, two on the way up.
NOISE = replace(CONFIG, multipliers=(1,), blocks=1, attention_levels=())
PIXELS = replace(NOISE, in_channels=2, out_channels=5, channels=3, multipliers=(3,), num_times=0)


def shapes(config: models.UNetConfig) -> Tree:
    size = config.image_size
    arguments = [jnp.zeros((1, size, size, config.in_channels)), *([jnp.zeros(1)] if config.num_times else [])]
    return jax.eval_shape(lambda: models.UNet(config).init(jax.random.PRNGKey(0), *arguments))["params"]


def random_params(config: models.UNetConfig) -> Tree:
    """Random values in every leaf, those too that start at zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.uniform(-0.3, 0.35, x.shape).astype(np.float32), shapes(config))


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def dense(p: Tree, x: Array) -> Array:
    return x @ p["kernel"] + p["bias"]


def conv(p: Tree, x: Array, stride: int = 1) -> Array:
    """3×3, one output place at a time. With stride 2 and even sides "SAME" pads at the end only."""
    height, width = x.shape[1] // stride, x.shape[2] // stride
    front = 1 if stride == 1 else 0
    x = np.pad(x, ((0, 0), (front, 1), (front, 1), (0, 0)))
    y = np.zeros((x.shape[0], height, width, p["kernel"].shape[3]))
    for r, c in np.ndindex(height, width):
        y[:, r, c] = np.einsum("bijc,ijco->bo", x[:, r * stride :, c * stride :][:, :3, :3], p["kernel"]) + p["bias"]
    return y


def group_norm(p: Tree, x: Array) -> Array:
    """Three groups of neighbouring channels, normalized over places and channels of one image (Wu & He 2018)."""
    y, size = np.zeros_like(x), x.shape[-1] // 3
    for b, g in np.ndindex(x.shape[0], 3):
        part = x[b, :, :, g * size : (g + 1) * size]
        y[b, :, :, g * size : (g + 1) * size] = (part - part.mean()) / np.sqrt(part.var() + 1e-6)
    return y * p["scale"] + p["bias"]


def attention(p: Tree, x: Array) -> Array:
    y = group_norm(p["norm"], x).reshape(x.shape[0], -1, x.shape[-1])
    mixed = np.zeros_like(y)
    for b, h in np.ndindex(x.shape[0], 3):
        q, k, v = (y[b] @ p["qkv"]["kernel"][:, i, h] + p["qkv"]["bias"][i, h] for i in range(3))
        weights = np.exp(q @ k.T / np.sqrt(q.shape[1]))
        mixed[b] += (weights / weights.sum(1, keepdims=True)) @ v @ p["out"]["kernel"][h]
    return x + (mixed + p["out"]["bias"]).reshape(x.shape)


def block(p: Tree, x: Array, time: Array | None) -> Array:
    y = conv(p["conv1"], silu(group_norm(p["norm1"], x)))
    if time is not None:
        y = y + dense(p["time"], silu(time))[:, None, None]
    y = conv(p["conv2"], silu(group_norm(p["norm2"], y)))
    x = y + (dense(p["shortcut"], x) if "shortcut" in p else x)
    return attention(p["attn"], x) if "attn" in p else x


def embedding(p: Tree, times: Array) -> Array:
    """Sines and cosines of three frequencies from 1 to 1/10000, then two layers."""
    waves = [[f(t * 10000 ** (-i / 2)) for f in (math.sin, math.cos) for i in range(3)] for t in times]
    return dense(p["time2"], silu(dense(p["time1"], np.array(waves))))


def doubled(x: Array) -> Array:
    return x.repeat(2, axis=1).repeat(2, axis=2)


def reference(p: Tree, x: Array, times: Array) -> Array:
    """`CONFIG`, every block by name: two levels, two blocks on each way down, three on each way up."""
    time = embedding(p, times)
    stem = conv(p["stem"], x)
    down0 = block(p["down0"], stem, time)
    down1 = block(p["down1"], down0, time)
    half = conv(p["half0"], down1, stride=2)
    down2 = block(p["down2"], half, time)
    down3 = block(p["down3"], down2, time)
    x = block(p["mid1"], block(p["mid0"], down3, time), time)
    for name, skip in (("up0", down3), ("up1", down2), ("up2", half)):
        x = block(p[name], np.concatenate([x, skip], -1), time)
    x = conv(p["double1"], doubled(x))
    for name, skip in (("up3", down1), ("up4", down0), ("up5", stem)):
        x = block(p[name], np.concatenate([x, skip], -1), time)
    return conv(p["head"], silu(group_norm(p["norm_f"], x)))


def small_reference(p: Tree, x: Array, time: Array | None) -> Array:
    stem = conv(p["stem"], x)
    down = block(p["down0"], stem, time)
    x = block(p["mid1"], block(p["mid0"], down, time), time)
    x = block(p["up0"], np.concatenate([x, down], -1), time)
    x = block(p["up1"], np.concatenate([x, stem], -1), time)
    return conv(p["head"], silu(group_norm(p["norm_f"], x)))


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def applied(config: models.UNetConfig, params: Tree, *arguments: Array) -> Any:
    return jax.jit(models.UNet(config).apply, compiler_options=FAST)({"params": params}, *arguments)


def test_noise_net_equals_numpy_on_an_oblong_image() -> None:
    params, times = random_params(CONFIG), np.array([0, 8, 3])
    x = np.random.default_rng(1).standard_normal((3, 6, 10, 3), np.float32)
    expected = reference(wide(params), wide(x), times)
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(applied(CONFIG, params, x, times), expected, rtol=2e-4, atol=2e-4)


def test_net_without_noise_levels_equals_numpy() -> None:
    params = random_params(PIXELS)
    x = np.random.default_rng(1).standard_normal((3, 5, 4, 2), np.float32)
    expected = small_reference(wide(params), wide(x), None)
    np.testing.assert_allclose(applied(PIXELS, params, x), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        PIXELS,
        replace(PIXELS, image_size=4, multipliers=(2, 1, 3), attention_levels=(0, 2)),
    ],
)
def test_parameter_count_is_the_closed_form(config: models.UNetConfig) -> None:
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(config))) == config.num_params()


def test_noise_loss_is_the_square_error_of_noise_mixed_into_the_images() -> None:
    """Equation 14 of Ho et al. 2020, with the levels and the noise that the state's key gives at step 0."""
    task = models.unet_task(NOISE, 5, optax.sgd(0.1))
    state, batch = jax.eval_shape(task.init), task.batch(0)
    assert {name: x.shape for name, x in batch.items()} == {"inputs": (5, 6, 6, 3)}
    key, params = np.array([0, 7], np.uint32), random_params(NOISE)
    keys = jax.random.split(jax.random.fold_in(key, 0), 3)
    times = np.asarray(jax.random.randint(keys[0], (5,), 0, 9))
    noise = np.asarray(jax.random.normal(keys[1], (5, 6, 6, 3)), np.float64)
    noisy = np.zeros_like(noise)
    for i, t in enumerate(times):
        kept = math.prod(1 - (1e-4 + (0.02 - 1e-4) * s / 8) for s in range(t + 1))
        noisy[i] = math.sqrt(kept) * batch["inputs"][i] + math.sqrt(1 - kept) * noise[i]
    found = small_reference(wide(params), noisy, embedding(wide(params), times))
    expected = ((noise - found) ** 2).mean()

    new, _ = jax.eval_shape(task.step, state, batch)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state).replace(params=params, key=key)
    losses = jax.jit(lambda state, batch: task.step(state, batch)[1], compiler_options=FAST)  # compiles no gradients
    np.testing.assert_allclose(losses(state, batch), expected, rtol=1e-4)
    assert abs(float(losses(state.replace(step=state.step + 1), batch)) - expected) > 1e-3  # another draw


def test_pixel_task_starts_at_even_odds_and_learns() -> None:
    task = models.unet_task(replace(PIXELS, dropout_rate=0.1, remat=True), 5, optax.sgd(0.1))
    state, batch = jax.jit(task.init, compiler_options=FAST)(), task.batch(0)
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "inputs": ((5, 6, 6, 2), "float32"),
        "labels": ((5, 6, 6), "int32"),
    }
    step = jax.jit(task.step, compiler_options=FAST)
    new, first = step(state, batch)
    np.testing.assert_allclose(first, math.log(5), rtol=1e-5)  # a fresh net gives zeros
    assert float(step(new, batch)[1]) < float(first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 7}, "image_size must be a multiple of 2, as 2 levels halve it; found 7"),
        ({"attention_levels": (2,)}, r"attention_levels must be among 0 to 1; found \(2,\)"),
        ({"groups": 4}, "groups must divide the channels of all blocks; found 4 with 6 channels"),
        ({"num_heads": 5}, "num_heads must divide the channels where attention is; found 5 with 12 channels"),
        ({"channels": 9}, "time embeddings need even channels from 4 on; found 9"),
        ({"blocks": 0}, "at least one level and one block a level"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"noise levels \[B\], as num_times is 9"):
        jax.eval_shape(models.UNet(CONFIG).init, jax.random.PRNGKey(0), jnp.zeros((1, 6, 6, 3)))
    with pytest.raises(ValueError, match="none, as num_times is 0"):
        jax.eval_shape(models.UNet(PIXELS).init, jax.random.PRNGKey(0), jnp.zeros((1, 6, 6, 2)), jnp.zeros(1))
    with pytest.raises(ValueError, match="sides of images must be multiples of 2"):
        jax.eval_shape(models.UNet(CONFIG).init, jax.random.PRNGKey(0), jnp.zeros((1, 5, 6, 3)), jnp.zeros(1))
    with pytest.raises(
        ValueError, match="noise has as many channels as the image; found in_channels 3, out_channels 4"
    ):
        models.unet_task(replace(CONFIG, out_channels=4), 5)
