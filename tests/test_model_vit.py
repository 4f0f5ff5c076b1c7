"""The Vision Transformer against loops in numpy written from the paper, and its task."""

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
CONFIG = models.ViTConfig(
    image_size=15, patch_size=5, d_model=15, num_heads=3, num_layers=2, mlp_ratio=3, num_classes=7, in_channels=2
)


@pytest.fixture(scope="module")
def params() -> Tree:
    """Random values in every leaf, biases and scales too; embeddings so small that the epsilon of a norm is seen."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: models.ViT(CONFIG).init(jax.random.PRNGKey(0), jnp.zeros((1, 15, 15, 2))))
    values = jax.tree.map(lambda x: rng.uniform(-0.5, 0.6, x.shape).astype(np.float32), shapes["params"])
    return values | {name: jax.tree.map(lambda x: x / 100, values[name]) for name in ("cls", "wpe", "patches")}


def images(count: int) -> Array:
    return np.random.default_rng(1).standard_normal((count, 15, 15, 2), np.float32)


def layer_norm(p: Tree, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def attention(p: Tree, x: Array) -> Array:
    """Equations 6 to 8 of the paper's appendix, one head at a time, for one image [S, D]."""
    mixed = np.zeros_like(x)
    for head in range(3):
        q, k, v = (x @ p["qkv"]["kernel"][:, i, head] + p["qkv"]["bias"][i, head] for i in range(3))
        weights = np.exp(q @ k.T / np.sqrt(5))
        mixed += (weights / weights.sum(1, keepdims=True)) @ v @ p["out"]["kernel"][head]
    return mixed + p["out"]["bias"]


def feed_forward(p: Tree, x: Array) -> Array:
    x = x @ p["up"]["kernel"] + p["up"]["bias"]
    x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x @ p["down"]["kernel"] + p["down"]["bias"]


def reference(p: Tree, image: Array) -> Array:
    """Equations 1 to 4 of the paper for one image [15, 15, 2]: its patches are 3 rows of 3."""
    kernel = p["patches"]["kernel"].reshape(50, 15)
    corners = [(row, column) for row in (0, 5, 10) for column in (0, 5, 10)]
    patches = [image[r : r + 5, c : c + 5].reshape(50) @ kernel + p["patches"]["bias"] for r, c in corners]
    x = np.stack([p["cls"], *patches]) + p["wpe"]
    for layer in (p["h0"], p["h1"]):
        x = x + attention(layer["attn"], layer_norm(layer["ln1"], x))
        x = x + feed_forward(layer["mlp"], layer_norm(layer["ln2"], x))
    return layer_norm(p["ln_f"], x[0]) @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.fixture(scope="module")
def found(params: Tree) -> Any:
    return logits(CONFIG, params, images(3))


def logits(config: models.ViTConfig, params: Tree, batch: Array) -> Any:
    return jax.jit(models.ViT(config).apply, compiler_options=FAST)({"params": params}, batch)


def test_vit_equals_numpy(params: Tree, found: Any) -> None:
    wide = jax.tree.map(lambda x: x.astype(np.float64), params)
    expected = np.stack([reference(wide, image) for image in images(3).astype(np.float64)])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def stacked(params: Tree) -> Tree:
    rest = {name: tree for name, tree in params.items() if name not in ("h0", "h1")}
    return rest | {"h": jax.tree.map(lambda a, b: np.stack([a, b]), params["h0"], params["h1"])}


def test_scan_and_remat_change_no_numbers(params: Tree, found: Any) -> None:
    looped = logits(replace(CONFIG, scan_layers=True, remat=True), stacked(params), images(3))
    np.testing.assert_allclose(looped, found, rtol=1e-4, atol=1e-4)


def test_layers_of_a_loop_draw_their_own_dropout() -> None:
    """Each of two layers adds 2 to half of the dims of zeros: 0, 2 and 4 if the halves differ, else 0 and 4 only."""
    config = replace(CONFIG, dropout_rate=0.5, scan_layers=True, num_classes=15)
    module, batch = models.ViT(config), np.zeros((3, 15, 15, 2), np.float32)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(module.init, jax.random.PRNGKey(0), batch))[
        "params"
    ]
    params["h"]["mlp"]["down"]["bias"] += 1
    params["ln_f"]["scale"] += 1
    params["head"]["kernel"] = jnp.eye(15)
    drawn = jax.jit(lambda key: module.apply({"params": params}, batch, False, rngs={"dropout": key}))
    for row in np.asarray(drawn(jax.random.PRNGKey(1))):
        assert len(np.unique(row.round(4))) == 3


@pytest.mark.parametrize("scan_layers", [False, True])
def test_parameter_count_is_the_closed_form(scan_layers: bool) -> None:
    config = replace(CONFIG, scan_layers=scan_layers, num_layers=3)
    shapes = jax.eval_shape(lambda: models.ViT(config).init(jax.random.PRNGKey(0), jnp.zeros((1, 15, 15, 2))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == config.num_params()


def test_task_learns_and_draws_new_dropout_at_each_step(params: Tree) -> None:
    task = models.vit_task(replace(CONFIG, dropout_rate=0.5, scan_layers=True), 5, optax.sgd(0.02))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(task.init))
    state, batch = state.replace(params=jax.tree.map(jnp.asarray, stacked(params))), task.batch(0)
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "inputs": ((5, 15, 15, 2), "float32"),
        "labels": ((5,), "int32"),
    }
    step = jax.jit(task.step, compiler_options=FAST)
    new, first = step(state, batch)
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
    assert float(step(state, batch)[1]) == float(first)  # the same draw
    assert float(step(new.replace(step=state.step), batch)[1]) < float(first)
    assert float(step(state.replace(step=state.step + 1), batch)[1]) != float(first)


def test_patches_that_do_not_fill_the_image_are_refused() -> None:
    with pytest.raises(ValueError, match="patch_size must divide image_size; found image_size 224, patch_size 15"):
        models.ViTConfig(patch_size=15)
