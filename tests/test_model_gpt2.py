"""Published GPT-2 files: read into a GPT that computes what GPT-2 computes, written again, and refused when wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from alpa_like import models

Array = np.ndarray
Tensors = dict[str, Array]
FAST: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}  # compile quickly, the sizes are tiny
V, S, D, HEADS, LAYERS, F = 13, 9, 15, 3, 2, 30
TOKENS = np.random.default_rng(1).integers(0, V, (2, 7), np.int32)
SETTINGS: dict[str, Any] = {"n_head": HEADS, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}


def published(prefix: str = "") -> Tensors:
    """Random tensors under the published names, with the masks that the published files hold."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, D), "wpe.weight": (S, D)}
    shapes |= {"ln_f.weight": (D,), "ln_f.bias": (D,)}
    for n in range(LAYERS):
        sizes = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
        for name, shape in (sizes | {"ln_1": (D,), "ln_2": (D,)}).items():
            shapes |= {f"h.{n}.{name}.weight": shape, f"h.{n}.{name}.bias": shape[-1:]}
    tensors = {prefix + name: rng.uniform(-0.5, 0.6, shape).astype(np.float32) for name, shape in shapes.items()}
    masks = {f"{prefix}h.{n}.attn.bias": np.tri(S, dtype=np.uint8)[None, None] for n in range(LAYERS)}
    return tensors | masks | {f"{prefix}h.0.attn.masked_bias": np.float32([-1e4])}


def gpt2(t: Tensors, tokens: Array) -> Array:
    """GPT-2 for one text, from Radford et al. 2019 and 2018: pre-LayerNorm, Hendrycks & Gimpel's approximate GELU."""

    def norm(name: str, x: Array) -> Array:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-5) * t[f"{name}.weight"] + t[f"{name}.bias"]

    def linear(name: str, x: Array) -> Array:
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    x = t["wte.weight"][tokens] + t["wpe.weight"][: len(tokens)]
    for n in range(LAYERS):
        q, k, v = np.split(linear(f"h.{n}.attn.c_attn", norm(f"h.{n}.ln_1", x)), 3, axis=1)
        heads = []
        for part in np.split(np.arange(D), HEADS):
            scores = q[:, part] @ k[:, part].T / np.sqrt(D / HEADS)
            weights = np.tril(np.exp(scores))
            heads.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
        x = x + linear(f"h.{n}.attn.c_proj", np.concatenate(heads, axis=1))
        y = linear(f"h.{n}.mlp.c_fc", norm(f"h.{n}.ln_2", x))
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + linear(f"h.{n}.mlp.c_proj", y)
    return norm("ln_f", x) @ t["wte.weight"].T


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(published(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    return tmp_path


def logits(config: models.GPTConfig, params: Any) -> Any:
    return jax.jit(models.GPT(config).apply, compiler_options=FAST)({"params": params}, TOKENS)


def same(a: Any, b: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y) and x.dtype == y.dtype, a, b)))


def test_a_loaded_gpt_computes_what_gpt2_computes(folder: Path) -> None:
    config, params = models.load_gpt2(folder)
    assert config == models.GPTConfig(V, S, D, HEADS, LAYERS, mlp_ratio=2, tied=True)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.num_params()
    wide = {name: tensor.astype(np.float64) for name, tensor in published().items()}
    expected = np.stack([gpt2(wide, text) for text in TOKENS])
    np.testing.assert_allclose(logits(config, params), expected, rtol=1e-4, atol=1e-4)


def test_layers_can_be_loaded_stacked(folder: Path) -> None:
    _, params = models.load_gpt2(folder)
    config, stacked = models.load_gpt2(folder, scan_layers=True, remat=True, dtype=jnp.bfloat16)
    assert (config.scan_layers, config.remat, config.dtype) == (True, True, jnp.bfloat16)
    assert same(jax.tree.map(lambda x: x[1], stacked["h"]), params["h1"])
    shapes = jax.eval_shape(models.GPT(config).init, jax.random.PRNGKey(0), TOKENS)["params"]
    assert jax.tree.map(np.shape, stacked) == jax.tree.map(np.shape, shapes)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_saved_files_hold_the_published_names_and_numbers(folder: Path, tmp_path: Path, scan_layers: bool) -> None:
    config, params = models.load_gpt2(folder, scan_layers=scan_layers)
    on_devices = jax.device_put(params, jax.devices()[1])
    models.save_gpt2(tmp_path / "one.safetensors", config, on_devices)
    models.save_gpt2(tmp_path / "many", config, params)
    masks = (".attn.bias", ".attn.masked_bias")
    expected = {name: x for name, x in published().items() if not name.endswith(masks)}
    for file in (tmp_path / "one.safetensors", tmp_path / "many" / "model.safetensors"):
        assert same(load_file(file), expected)
        with safe_open(file, "np") as opened:
            assert opened.metadata()["format"] == "pt"
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["config.json", "model.safetensors"]
    said = json.loads((tmp_path / "many" / "config.json").read_text())
    assert (said["model_type"], said["n_embd"], said["n_layer"], said["n_head"], said["n_inner"]) == (
        "gpt2",
        15,
        2,
        3,
        30,
    )
    for path in (tmp_path / "one.safetensors", tmp_path / "many"):
        again, loaded = models.load_gpt2(path, scan_layers=scan_layers)
        assert again == config
        assert same(loaded, params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_prefix_head_and_dtype_of_a_file_do_not_matter(tmp_path: Path, dtype: Any) -> None:
    tensors = {name: (x.astype(np.float64) / 3).astype(dtype) for name, x in published("transformer.").items()}
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, tmp_path / "x.safetensors")
    config, params = models.load_gpt2(tmp_path / "x.safetensors", num_heads=5)
    assert (config.num_heads, config.num_layers) == (5, 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    fc = params["h1"]["mlp"]["up"]["kernel"]
    assert np.array_equal(fc, tensors["transformer.h.1.mlp.c_fc.weight"].astype(np.float32))


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


def changed(name: str, value: Array) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: value}


F32 = np.float32
WRONG = [
    (without("h.1.ln_2.bias"), r"has no tensor 'h\.1\.ln_2\.bias', which a GPT-2 of 2 layers has"),
    (without("wte.weight"), r"is no GPT-2: it has no tensor 'wte\.weight'; the first of its .* are h\.0"),
    (changed("h.0.attn.c_proj.weight", np.zeros((D, D + 1), F32)), r"must have shape \(15, 15\), found \(15, 16\)"),
    (changed("h.0.mlp.c_fc.weight", np.zeros((D, 31), F32)), "a multiple of the model width 15; found 31"),
    (changed("wpe.weight", np.zeros(D, F32)), r"'wpe\.weight' must have two dims, found shape \(15,\)"),
    (changed("h.3.ln_1.bias", np.zeros(D, F32)), r"has no tensor of layer 2, but some of layer 3"),
    (changed("h.999999999.ln_1.bias", np.zeros(D, F32)), "has no tensor of layer 2, but some of layer 999999999"),
    (
        changed("h.0.crossattention.q.weight", np.zeros(D, F32)),
        r"'h\.0\.crossattention\.q\.weight', which GPT-2 has not",
    ),
    (changed("lm_head.weight", np.zeros((V, D), F32)), r"'lm_head\.weight' differs from 'wte\.weight'"),
    (changed("ln_f.bias", np.zeros(D, np.int8)), r"of one of F64, F32, F16, BF16; tensor 'ln_f\.bias' is I8"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_files_of_other_models_are_refused(folder: Path, change: Callable[[Tensors], Tensors], message: str) -> None:
    save_file(change(published()), folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        models.load_gpt2(folder)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_torn_files_are_refused(folder: Path, length: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors is no complete safetensors file"):
        models.load_gpt2(folder)


@pytest.mark.parametrize(
    ("settings", "num_heads", "message"),
    [
        ('{"n_head": 3}', 5, r"num_heads 5 was given, but .*config\.json says n_head 3"),
        ("{}", None, "does not say how many heads the model has; give num_heads"),
        ("{}", 4, "num_heads must divide the model width 15; found 4"),
        ("{}", -3, "does not say how many heads"),
        ("{}", 0, "does not say how many heads"),
        ("{}", True, "does not say how many heads"),
        ("{", None, r"config\.json is no JSON"),
        ("[3]", None, "must hold a JSON object, found list"),
        ('{"n_head": 3, "activation_function": "relu"}', None, "activation_function 'relu'; .* gelu_new or"),
        ('{"n_head": 3, "layer_norm_epsilon": 1e-6}', None, "layer_norm_epsilon 1e-06; .* with 1e-05"),
        ('{"n_head": 3, "tie_word_embeddings": false}', None, "tie_word_embeddings False"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder: Path, settings: str, num_heads: int | None, message: str) -> None:
    (folder / "config.json").write_text(settings)
    with pytest.raises(ValueError, match=message):
        models.load_gpt2(folder, num_heads)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(
            FileNotFoundError, match=r"safetensors does not exist; give a safetensors file, or a folder"
        ):
            models.load_gpt2(path)


def test_only_the_parameters_of_a_tied_gpt_are_saved(folder: Path, tmp_path: Path) -> None:
    config, params = models.load_gpt2(folder)
    untied = models.GPTConfig(V, S, D, HEADS, LAYERS, mlp_ratio=2)
    less = {name: tree for name, tree in params.items() if name != "h1"}
    looped = models.GPTConfig(V, S, D, HEADS, LAYERS, mlp_ratio=2, tied=True, scan_layers=True)
    wrong = [
        (untied, params, "GPT-2 has no head of its own"),
        (config, less, "they have no 'h1/ln1/scale'"),
        (config, params | {"wpe": np.zeros((S, D + 1))}, r"'wpe' must have shape \(9, 15\), found \(9, 16\)"),
        (config, params | {"h2": params["h1"]}, "has 28 parameters, found 40"),
        (looped, params, r"2 stacked layers under 'h', found first dims \[\]"),
    ]
    for of, tree, message in wrong:
        with pytest.raises(ValueError, match=message):
            models.save_gpt2(tmp_path / "new", of, tree)
    assert not (tmp_path / "new").exists()
