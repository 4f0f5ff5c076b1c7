"""The models of the papers: parameter counts against the published ones, and a tiny Wide-ResNet against numpy."""

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
RNG = np.random.default_rng(0)
TINY = models.WideResNetConfig(blocks=(2, 1), channels=4, width_factor=2, num_classes=5, image_size=21)


def published(name: str) -> float:
    """What a name such as 6.8B or 250M says, in parameters."""
    return float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]


def total_size(tree: Tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def abstract_state(task: models.Task) -> Any:
    return jax.eval_shape(task.init)


@pytest.mark.parametrize("name", [n for n in models.GPT_SIZES if n != "1024 layers"])
def test_gpt_sizes_are_the_published_ones(name: str) -> None:
    """Names count the vocabulary once and no biases: 12 · L · D² + V · D (Narayanan et al. 2021, section 5.1)."""
    config = models.paper_gpt_config(name, tied=True)
    formula = 12 * config.num_layers * config.d_model**2 + config.vocab_size * config.d_model
    assert formula == pytest.approx(published(name), rel=0.03)
    assert config.num_params() == pytest.approx(formula, rel=0.01)
    assert models.paper_gpt_config(name).num_params() == config.num_params() + 51200 * config.d_model


@pytest.mark.parametrize("name", models.MOE_SIZES)
def test_moe_sizes_are_the_published_ones(name: str) -> None:
    """Half of the layers have 16 · D² in their MLP, half E times that; names count the vocabulary once."""
    config = models.paper_moe_config(name)
    d, pairs, experts = config.d_model, config.num_layers // 2, config.num_experts
    formula = pairs * (8 + 16 + 16 * experts) * d**2 + 32000 * d
    assert formula == pytest.approx(published(name), rel=0.05)
    assert config.num_params() - 32000 * d == pytest.approx(formula, rel=0.01)


@pytest.mark.parametrize("name", models.WIDE_RESNET_SIZES)
def test_wide_resnet_sizes_are_the_published_ones(name: str) -> None:
    assert models.paper_wide_resnet_config(name).num_params() == pytest.approx(published(name), rel=0.03)


def test_resnet_50_and_101_have_the_known_numbers_of_parameters() -> None:
    """torchvision's resnet50 and resnet101; its wide ones widen the first convolution of a block too."""
    assert models.WideResNetConfig().num_params() == 25_557_032
    assert models.WideResNetConfig((3, 4, 23, 3)).num_params() == 44_549_160


def test_big_models_are_traced_without_memory() -> None:
    tasks = {
        models.paper_gpt("39B", 1024, scan_layers=True): 39_507_083_264,
        models.paper_gpt("1024 layers", 1024, scan_layers=True, dtype=jnp.bfloat16): 3_281_519_616,
        models.paper_wide_resnet("250M", 1536): 254_123_104,
        models.paper_moe("380M", 1024): 408_654_336,
    }
    for task, count in tasks.items():
        state = abstract_state(task)
        assert total_size(state.params) == count
        assert total_size(state.opt_state) == 2 * count + 1  # Adam: two moments and a step
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}


def test_traced_steps_keep_the_state() -> None:
    for task in (models.paper_gpt("39B", 1024, scan_layers=True), models.paper_gpt("125M", 8, remat=True)):
        state = abstract_state(task)
        new, loss = jax.eval_shape(task.step, state, task.abstract_batch())
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
        assert (loss.shape, loss.dtype) == ((), np.float32)


def test_sequence_and_dtype_can_be_chosen() -> None:
    assert models.paper_gpt("6.7B", 64, seq_len=2048).abstract_batch()["tokens"].shape == (64, 2048)
    assert models.paper_gpt("6.7B", 64).abstract_batch()["tokens"].shape == (64, 1024)
    assert models.paper_wide_resnet("13B", 8).abstract_batch()["inputs"].shape == (8, 224, 224, 3)
    task = models.paper_gpt("125M", 2, dtype=jnp.bfloat16)
    state = abstract_state(task)
    assert jax.eval_shape(state.apply_fn, {"params": state.params}, jnp.zeros((2, 1024), int)).dtype == jnp.bfloat16


@pytest.mark.parametrize("make", [models.paper_gpt, models.paper_moe, models.paper_wide_resnet])
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(make: Any) -> None:
    with pytest.raises(ValueError, match=r"named '7B'; choose one of .*B"):
        make("7B")


# ------------------------------------------------------------------------------------------- Wide-ResNet in numpy


def conv(kernel: Array, x: Array, stride: int) -> Array:
    """Padded as "SAME" pads: what is odd goes to the end."""
    size, out = kernel.shape[0], -(-x.shape[1] // stride)
    pad = max((out - 1) * stride + size - x.shape[1], 0)
    x = np.pad(x, ((0, 0), (pad // 2, pad - pad // 2), (pad // 2, pad - pad // 2), (0, 0)))
    y = np.zeros((x.shape[0], out, out, kernel.shape[3]))
    for row, column in np.ndindex(out, out):
        patch = x[:, row * stride : row * stride + size, column * stride : column * stride + size]
        y[:, row, column] = np.einsum("bijc,ijco->bo", patch, kernel)
    return y


def norm(p: Tree, stats: Tree, x: Array, train: bool) -> Array:
    mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else (stats["mean"], stats["var"])
    return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def max_pool(x: Array) -> Array:
    """The most of each 3×3 window, every second one, of an image with odd sides: one row of padding at each end."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    rows = range(0, x.shape[1] - 2, 2)
    return np.stack([np.stack([x[:, r : r + 3, c : c + 3].max((1, 2)) for c in rows], 1) for r in rows], 1)


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def bottleneck(p: Tree, s: Tree, x: Array, stride: int, train: bool) -> Array:
    y = relu(norm(p["bn1"], s["bn1"], conv(p["conv1"]["kernel"], x, 1), train))
    y = relu(norm(p["bn2"], s["bn2"], conv(p["conv2"]["kernel"], y, stride), train))
    y = norm(p["bn3"], s["bn3"], conv(p["conv3"]["kernel"], y, 1), train)
    if "shortcut" in p:
        x = norm(p["bn_shortcut"], s["bn_shortcut"], conv(p["shortcut"]["kernel"], x, stride), train)
    return relu(x + y)


def reference(variables: Tree, images: Array, train: bool) -> Array:
    p, s = variables["params"], variables["batch_stats"]
    x = max_pool(relu(norm(p["bn_stem"], s["bn_stem"], conv(p["stem"]["kernel"], images, 2), train)))
    for name, stride in (("stage0_block0", 1), ("stage0_block1", 1), ("stage1_block0", 2)):
        x = bottleneck(p[name], s[name], x, stride, train)
    return x.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.mark.parametrize("train", [True, False])
def test_wide_resnet_equals_numpy(train: bool) -> None:
    module = models.WideResNet(TINY)
    images = RNG.standard_normal((3, 21, 21, 3))
    shapes = jax.eval_shape(lambda: module.init(jax.random.PRNGKey(0), jnp.zeros((1, 21, 21, 3))))
    assert total_size(shapes["params"]) == TINY.num_params()
    params = jax.tree.map(lambda x: RNG.uniform(-0.4, 0.6, x.shape), shapes["params"])
    statistics = jax.tree.map(lambda x: RNG.uniform(0.5, 1.5, x.shape), shapes["batch_stats"])
    expected = reference({"params": params, "batch_stats": statistics}, images, train)
    given = jax.tree.map(np.float32, {"params": params, "batch_stats": statistics})
    apply = jax.jit(lambda v, x: module.apply(v, x, train=train, mutable=["batch_stats"])[0])
    np.testing.assert_allclose(apply(given, images.astype(np.float32)), expected, rtol=1e-3, atol=1e-3)


def test_wide_resnet_learns_and_remat_changes_no_numbers() -> None:
    plain, again = (
        models.wide_resnet_task(models.WideResNetConfig((1, 1), 4, 2, 5, 16, remat=remat), 8, optax.sgd(0.01))
        for remat in (False, True)
    )
    state, batch = jax.jit(plain.init, compiler_options=FAST)(), plain.batch(0)
    step = jax.jit(plain.step, compiler_options=FAST)
    new, first = step(state, batch)
    other, loss = jax.jit(again.step, compiler_options=FAST)(state.replace(apply_fn=None), batch)
    np.testing.assert_allclose(loss, first, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), new.params, other.params)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), new.batch_stats, state.batch_stats)
    assert all(jax.tree.leaves(moved))
    assert step(new, batch)[1] < first
