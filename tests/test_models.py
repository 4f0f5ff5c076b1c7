"""The models against computations written with loops in numpy, and the tasks against their contract."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alpa_like import models
from alpa_like.models import moe

Array = np.ndarray
Tree = dict[str, Any]
FAST: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}  # compile quickly, the sizes are tiny
RNG = np.random.default_rng(0)

TOKENS = RNG.integers(0, 11, (3, 7), np.int32)
MLP = models.MLPConfig((5, 7, 6, 3), "tanh")
GPT = models.GPTConfig(vocab_size=11, seq_len=9, d_model=15, num_heads=3, num_layers=2, mlp_ratio=3)
BERT = models.BertConfig(vocab_size=11, seq_len=9, d_model=15, num_heads=3, num_layers=2, mlp_ratio=3)
MOE = models.MoEConfig(
    vocab_size=11, seq_len=9, d_model=15, num_heads=3, num_layers=4, num_experts=5, capacity_factor=1.0
)
LLAMA = models.LlamaConfig(
    vocab_size=11, seq_len=9, d_model=36, num_heads=6, num_kv_heads=2, num_layers=2, ffn_dim=21, rope_theta=50.0
)
CONV = models.ResNetConfig(widths=(5, 7), blocks=2, num_classes=5, width_factor=2, image_size=7)
CONV_LAYER, CONV_NONE = replace(CONV, norm="layer"), replace(CONV, norm="none")
TIED = replace(GPT, tied=True)
MODELS = [
    pytest.param(models.MLP(MLP), jnp.zeros((1, 5)), id="mlp"),
    pytest.param(models.GPT(GPT), TOKENS, id="gpt"),
    pytest.param(models.GPT(TIED), TOKENS, id="gpt_tied"),
    pytest.param(models.Bert(BERT), TOKENS, id="bert"),
    pytest.param(models.MoE(MOE), TOKENS, id="moe"),
    pytest.param(models.Llama(LLAMA), TOKENS, id="llama"),
    pytest.param(models.ResNet(CONV), jnp.zeros((1, 7, 7, 3)), id="conv"),
    pytest.param(models.ResNet(CONV_LAYER), jnp.zeros((1, 7, 7, 3)), id="conv_layer"),
    pytest.param(models.ResNet(CONV_NONE), jnp.zeros((1, 7, 7, 3)), id="conv_none"),
]


def run(function: Callable[..., Any], *args: Any) -> Any:
    return jax.jit(function, compiler_options=FAST)(*args)


def shapes(module: nn.Module, example: Any) -> Tree:
    return jax.eval_shape(lambda: module.init(jax.random.PRNGKey(0), example))


def variables_of(module: nn.Module, example: Any) -> Tree:
    """Random values in every leaf, biases and scales too; running statistics are positive."""
    values = {}
    for name, tree in shapes(module, example).items():
        low, high = (0.5, 1.5) if name == "batch_stats" else (-0.7, 0.7)
        values[name] = jax.tree.map(lambda x, a=low, b=high: RNG.uniform(a, b, x.shape).astype(x.dtype), tree)
    return values


def total_size(tree: Tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-4) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


def dense(p: Tree, x: Array, dims: int = 1) -> Array:
    return np.tensordot(x, np.asarray(p["kernel"], np.float64), dims) + p.get("bias", 0.0)


def layer_norm(p: Tree, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def mix(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Attention one row and one head at a time; q, k, v [B, S, H, K], visible [B, S, S]."""
    out = np.zeros_like(v)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        scores = q[b, :, h] @ k[b, :, h].T / np.sqrt(q.shape[-1])
        out[b, :, h] = softmax(np.where(visible[b], scores, -np.inf)) @ v[b, :, h]
    return out


def causal(tokens: Array) -> Array:
    return np.broadcast_to(np.tri(tokens.shape[1], dtype=bool), (*tokens.shape, tokens.shape[1]))


def attention(p: Tree, x: Array, visible: Array) -> Array:
    q, k, v = np.moveaxis(dense(p["qkv"], x), 2, 0)
    return dense(p["out"], mix(q, k, v, visible), 2)


def feed_forward(p: Tree, x: Array) -> Array:
    return dense(p["down"], gelu(dense(p["up"], x)))


def embedded(p: Tree, tokens: Array) -> Array:
    return p["wte"]["embedding"][tokens].astype(np.float64) + p["wpe"][: tokens.shape[1]]


def gpt_reference(p: Tree, tokens: Array) -> Array:
    x = embedded(p, tokens)
    for layer in (p["h0"], p["h1"]):
        x = x + attention(layer["attn"], layer_norm(layer["ln1"], x), causal(tokens))
        x = x + feed_forward(layer["mlp"], layer_norm(layer["ln2"], x))
    x = layer_norm(p["ln_f"], x)
    return dense(p["head"], x) if "head" in p else x @ p["wte"]["embedding"].T


def bert_reference(p: Tree, tokens: Array, padding_mask: Array) -> Array:
    visible = np.broadcast_to(padding_mask[:, None, :], (*tokens.shape, tokens.shape[1]))
    x = layer_norm(p["ln_e"], embedded(p, tokens))
    for layer in (p["h0"], p["h1"]):
        x = layer_norm(layer["ln1"], x + attention(layer["attn"], x, visible))
        x = layer_norm(layer["ln2"], x + feed_forward(layer["mlp"], x))
    return layer_norm(p["ln_t"], gelu(dense(p["transform"], x))) @ p["wte"]["embedding"].T + p["bias"]


def experts(p: Tree, x: Array, capacity: int) -> tuple[Array, float, int]:
    """Each token walks to its experts by itself: outputs [G, S, D], load-balancing loss, number of dropped choices."""
    out, aux, dropped, num_experts = np.zeros_like(x), 0.0, 0, p["wi"].shape[0]
    for g in range(x.shape[0]):
        gates, used = softmax(dense(p["router"], x[g])), np.zeros(num_experts, int)
        best = np.argsort(-gates, axis=-1)[:, :2]
        for rank, s in np.ndindex(2, x.shape[1]):
            e = best[s, rank]
            used[e] += 1
            if used[e] > capacity:
                dropped += 1
                continue
            out[g, s] += gates[s, e] / gates[s, best[s]].sum() * (gelu(x[g, s] @ p["wi"][e]) @ p["wo"][e])
        share = np.bincount(best[:, 0], minlength=num_experts) / x.shape[1]
        aux += num_experts * (share * gates.mean(0)).sum() / x.shape[0]
    return out, aux, dropped


def moe_reference(p: Tree, tokens: Array) -> tuple[Array, float, int]:
    x, aux, dropped = embedded(p, tokens), [], 0
    for index in range(4):
        layer = p[f"h{index}"]
        x = x + attention(layer["attn"], layer_norm(layer["ln1"], x), causal(tokens))
        normed = layer_norm(layer["ln2"], x)
        if index % 2 == 0:
            x = x + feed_forward(layer["mlp"], normed)
            continue
        mixed, loss, lost = experts(layer["moe"], normed, capacity=2)  # 1.0 · 7 tokens / 5 experts, rounded up
        x, aux, dropped = x + mixed, [*aux, loss], dropped + lost
    return dense(p["head"], layer_norm(p["ln_f"], x)), float(np.mean(aux)), dropped


def rms_norm(p: Tree, x: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"]


def turned(x: Array, theta: float) -> Array:
    """Rotary positions as a product of complex numbers; x [B, S, H, K]."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * theta ** (-2 * np.arange(half) / x.shape[-1])
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([z.real, z.imag], -1)


def llama_attention(p: Tree, x: Array, visible: Array) -> Array:
    q, k, v = dense(p["q"], x), dense(p["k"], x), dense(p["v"], x)
    q = q.reshape(*x.shape[:2], 6, 6)
    k, v = np.repeat(k, 3, axis=2), np.repeat(v, 3, axis=2)  # query heads 0, 1, 2 use key-value head 0
    mixed = mix(turned(q, 50.0), turned(k, 50.0), v, visible)
    return dense({"kernel": p["out"]["kernel"].reshape(6, 6, 36)}, mixed, 2)


def llama_reference(p: Tree, tokens: Array) -> Array:
    x = p["wte"]["embedding"][tokens].astype(np.float64)
    for layer in (p["h0"], p["h1"]):
        x = x + llama_attention(layer["attn"], rms_norm(layer["norm1"], x), causal(tokens))
        normed = rms_norm(layer["norm2"], x)
        gate = dense(layer["mlp"]["gate"], normed)
        x = x + dense(layer["mlp"]["down"], gate / (1 + np.exp(-gate)) * dense(layer["mlp"]["up"], normed))
    return dense(p["head"], rms_norm(p["norm_f"], x))


def conv(p: Tree, x: Array, stride: int = 1) -> Array:
    kernel = p["kernel"]
    size, out = kernel.shape[0], -(-x.shape[1] // stride)
    pad = max((out - 1) * stride + size - x.shape[1], 0)
    x = np.pad(x, ((0, 0), (pad // 2, pad - pad // 2), (pad // 2, pad - pad // 2), (0, 0)))
    span = stride * (out - 1) + 1
    taps = np.ndindex(size, size)
    return sum((x[:, i : i + span : stride, j : j + span : stride] @ kernel[i, j] for i, j in taps), np.zeros(()))


def norm_relu(p: Tree | None, stats: Tree | None, x: Array, train: bool) -> Array:
    if not p or not stats:
        return np.maximum(layer_norm(p, x) if p else x, 0)
    mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if train else (stats["mean"], stats["var"])
    return np.maximum((x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"], 0)


def conv_reference(variables: Tree, images: Array, train: bool) -> Array:
    p, stats = variables["params"], variables.get("batch_stats", {})
    x = conv(p["stem"], images.astype(np.float64))
    for name in ("stage0_block0", "stage0_block1", "stage1_block0", "stage1_block1"):
        block, stat, stride = p[name], stats.get(name, {}), 2 if name == "stage1_block0" else 1
        y = norm_relu(block.get("bn1"), stat.get("bn1"), x, train)
        x = conv(block["shortcut"], y, stride) if "shortcut" in block else x
        y = norm_relu(block.get("bn2"), stat.get("bn2"), conv(block["conv1"], y, stride), train)
        x = x + conv(block["conv2"], y)
    return dense(p["head"], norm_relu(p.get("bn_f"), stats.get("bn_f"), x, train).mean((1, 2)))


def test_mlp_equals_numpy() -> None:
    x = RNG.standard_normal((4, 5), np.float32)
    variables = variables_of(models.MLP(MLP), x)
    p = variables["params"]
    expected = dense(p["dense2"], np.tanh(dense(p["dense1"], np.tanh(dense(p["dense0"], x)))))
    assert_close(run(models.MLP(MLP).apply, variables, x), expected)


@pytest.mark.parametrize("config", [GPT, TIED], ids=["untied", "tied"])
def test_gpt_equals_numpy(config: models.GPTConfig) -> None:
    variables = variables_of(models.GPT(config), TOKENS)
    assert_close(run(models.GPT(config).apply, variables, TOKENS), gpt_reference(variables["params"], TOKENS))


def test_bert_equals_numpy_at_the_tokens() -> None:
    padding = np.array([[True] * 7, [True] * 4 + [False] * 3, [True] * 5 + [False] * 2])
    variables = variables_of(models.Bert(BERT), TOKENS)
    logits = run(models.Bert(BERT).apply, variables, TOKENS, padding)
    assert_close(np.asarray(logits), bert_reference(variables["params"], TOKENS, padding))
    without = run(models.Bert(BERT).apply, variables, TOKENS)
    assert_close(np.asarray(without), bert_reference(variables["params"], TOKENS, np.ones_like(padding)))


def test_moe_equals_numpy_with_dropped_tokens() -> None:
    variables = variables_of(models.MoE(MOE), TOKENS)
    logits, aux, dropped = moe_reference(variables["params"], TOKENS)
    assert 0 < dropped < 2 * 2 * TOKENS.size  # of two choices per token in each of two layers
    assert_close(run(models.MoE(MOE).apply, variables, TOKENS), (logits, np.float64(aux)))


def test_llama_equals_numpy() -> None:
    variables = variables_of(models.Llama(LLAMA), TOKENS)
    logits = run(models.Llama(LLAMA).apply, variables, TOKENS)
    assert_close(logits, llama_reference(variables["params"], TOKENS))


def test_conv_equals_numpy() -> None:
    images = RNG.standard_normal((3, 7, 7, 3), np.float32)
    module = models.ResNet(CONV)
    variables = variables_of(module, images)
    assert_close(run(module.apply, variables, images), conv_reference(variables, images, train=False))
    logits, changed = run(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]), variables, images)
    assert_close(logits, conv_reference(variables, images, train=True))
    stem = conv(variables["params"]["stem"], images.astype(np.float64)).mean((0, 1, 2))
    before, after = (
        tree["stage0_block0"]["bn1"]["mean"] for tree in (variables["batch_stats"], changed["batch_stats"])
    )
    assert_close(after, 0.9 * before + 0.1 * stem)


@pytest.mark.parametrize("config", [CONV_LAYER, CONV_NONE], ids=["layer", "none"])
def test_conv_without_batch_statistics_equals_numpy(config: models.ResNetConfig) -> None:
    images = RNG.standard_normal((3, 7, 7, 3), np.float32)
    variables = variables_of(models.ResNet(config), images)
    assert set(variables) == {"params"}
    logits = run(lambda v, x: models.ResNet(config).apply(v, x, train=True), variables, images)
    assert_close(logits, conv_reference(variables, images, train=True))


@pytest.mark.parametrize(("module", "example"), MODELS)
def test_parameter_count_is_the_closed_form(module: Any, example: Any) -> None:
    assert total_size(shapes(module, example)["params"]) == module.config.num_params()


def test_llama_8b_has_the_public_number_of_parameters() -> None:
    config = models.LlamaConfig.llama_8b()
    state = jax.eval_shape(models.llama_task(config, batch_size=8).init)
    assert total_size(state.params) == config.num_params() == 8_030_261_248
    half = models.LlamaConfig.llama_8b(num_layers=16)
    assert (half.num_layers, half.d_model, half.num_kv_heads) == (16, 4096, 8)


def test_top2_gating_fills_the_places_in_order() -> None:
    gates = jnp.array([[[0.6, 0.4, 0.0], [0.5, 0.1, 0.4], [0.2, 0.7, 0.1]]])
    combine, aux = run(lambda g: moe.top2_gating(g, 2), gates)
    expected = np.zeros((1, 3, 3, 2))
    expected[0, 0, 0, 0], expected[0, 1, 0, 1] = 0.6, 5 / 9  # first choices of expert 0: it is full
    expected[0, 2, 1, 0], expected[0, 0, 1, 1] = 7 / 9, 0.4  # expert 1: first choices before second ones
    expected[0, 1, 2, 0] = 4 / 9
    assert_close((combine, aux), (expected, 3 * (2 / 3 * 1.3 / 3 + 1 / 3 * 1.2 / 3)))


def gpt_value_and_grad(params: Tree, **options: Any) -> Any:
    module = models.GPT(replace(GPT, **options))

    def loss(params: Tree) -> jax.Array:
        logits: Any = module.apply({"params": params}, TOKENS)
        return models.cross_entropy(logits, jnp.asarray(TOKENS))

    return run(jax.value_and_grad(loss), params)


def stacked(params: Tree) -> Tree:
    rest = {name: tree for name, tree in params.items() if name not in ("h0", "h1")}
    return rest | {"h": jax.tree.map(lambda a, b: np.stack([a, b]), params["h0"], params["h1"])}


def test_scan_and_remat_change_no_numbers() -> None:
    params = variables_of(models.GPT(GPT), TOKENS)["params"]
    value, grads = gpt_value_and_grad(params)
    assert_close(gpt_value_and_grad(params, remat=True), (value, grads))
    assert_close(gpt_value_and_grad(stacked(params), scan_layers=True), (value, stacked(grads)))
    assert_close(gpt_value_and_grad(stacked(params), scan_layers=True, remat=True), (value, stacked(grads)))


def test_bfloat16_keeps_float32_parameters() -> None:
    config = models.GPTConfig(vocab_size=11, seq_len=8, d_model=12, num_heads=3, num_layers=1, dtype=jnp.bfloat16)
    task = models.gpt_task(config, 2)
    state = jax.eval_shape(task.init)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    logits = jax.eval_shape(state.apply_fn, {"params": state.params}, task.abstract_batch()["tokens"])
    assert (logits.dtype, logits.shape) == (jnp.bfloat16, (2, 8, 11))
    assert jax.eval_shape(task.step, state, task.abstract_batch())[1].dtype == np.float32


TASKS = models.small_tasks() | {
    "llama": models.llama_task(LLAMA, 4, optax.sgd(0.1)),
    "conv_layer": models.resnet_task(CONV_LAYER, 4, optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", TASKS)
def test_step_lowers_the_loss_and_keeps_the_types(name: str) -> None:
    task = TASKS[name]
    state, step = run(task.init), jax.jit(task.step, compiler_options=FAST)
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(task.init))
    new, first = step(state, task.batch(0))
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
    assert int(new.step) == 1
    assert float(step(new, task.batch(0))[1]) < float(first)


@pytest.mark.parametrize("name", TASKS)
def test_batches_follow_the_seed_and_the_abstract_batch(name: str) -> None:
    task = TASKS[name]
    batch, again, other = task.batch(3), task.batch(3), task.batch(4)
    assert {key: (x.shape, x.dtype) for key, x in batch.items()} == {
        key: (x.shape, x.dtype) for key, x in task.abstract_batch().items()
    }
    assert all(np.array_equal(batch[key], again[key]) for key in batch)
    assert not any(np.array_equal(batch[key], other[key]) for key in batch)


def test_dropout_differs_between_steps_and_not_between_runs() -> None:
    config = models.BertConfig(vocab_size=11, seq_len=8, d_model=12, num_heads=3, num_layers=1, dropout_rate=0.5)
    task = models.bert_task(config, 2, optax.sgd(0.0))
    state, step = run(task.init), jax.jit(task.step, compiler_options=FAST)
    new, first = step(state, task.batch(0))
    assert float(step(state, task.batch(0))[1]) == float(first)
    assert float(step(new, task.batch(0))[1]) != float(first)
    assert np.array_equal(new.key, state.key)


@pytest.mark.parametrize(("tied", "size"), [(False, 10_631_168), (True, 8_534_016)])
def test_facts_gpt_has_the_measured_sizes(tied: bool, size: int) -> None:
    task = models.facts_gpt(tied)
    assert total_size(jax.eval_shape(task.init).params) == size
    assert task.abstract_batch()["tokens"].shape == (16, 256)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="needs an input"):
        models.MLPConfig((3,))
    with pytest.raises(ValueError, match="batch, layer, none"):
        models.ResNetConfig(norm="group")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="num_kv_heads 4"):
        models.LlamaConfig(11, 8, d_model=24, num_heads=6, num_kv_heads=4, num_layers=1, ffn_dim=8)
    with pytest.raises(ValueError, match="12 is not a multiple of num_heads 5"):
        shapes(models.GPT(models.GPTConfig(11, 8, d_model=12, num_heads=5, num_layers=1)), TOKENS)
