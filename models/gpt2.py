"""GPT-2 weights as they are published, in safetensors files: read into the parameters of a `GPT`, and written again.

A GPT with `tied=True` computes what GPT-2 computes, so its parameters are the same numbers in other shapes. The
published layout keeps kernels as [inputs, outputs] and joins queries, keys and values into one kernel [D, 3 · D].
Letters in shapes: D model width, H heads, K = D / H, F hidden width of the MLP, V vocabulary, S positions.
"""

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from alpa_like.models.gpt import GPTConfig
from alpa_like.models.layers import LN_EPSILON

Tree = dict[str, Any]
Shape = tuple[int, ...]

WEIGHTS, SETTINGS = "model.safetensors", "config.json"  # what the files of a published folder are called
PREFIX = "transformer."  # before the names, where a file was saved together with its head
HEAD = "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks, which are no parameters
# What a GPT computes with; a config.json that says otherwise belongs to another model.
_COMPUTES: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (LN_EPSILON,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A published tensor: its name and shape, and where it is among the parameters, in which shape."""

    name: str
    shape: Shape
    path: tuple[str, ...]
    own_shape: Shape


def load_gpt2(
    path: str | os.PathLike[str],
    num_heads: int | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    scan_layers: bool = False,
) -> tuple[GPTConfig, Tree]:
    """The config and the parameters (float32 numpy) of a `GPT`, from a file or a folder with model.safetensors.

    Sizes are read from the shapes. The number of heads is in no shape: it is `num_heads`, or what the config.json
    beside the file says, or what `save_gpt2` noted in the file. Names may begin with "transformer."; masks among the
    tensors are left out. The other options are those of `GPTConfig`. FileNotFoundError where there is no file,
    ValueError where it is torn, is no GPT-2, or does not fit `num_heads`.
    """
    library, file = _library(), Path(path)
    file = file / WEIGHTS if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give a safetensors file, or a folder with {WEIGHTS}")
    try:
        with library.safe_open(file, framework="np") as opened:
            sizes, heads = _sizes(file, opened), _num_heads(file, num_heads, opened.metadata() or {})
            config = _config(file, sizes, heads, dtype=dtype, remat=remat, scan_layers=scan_layers)
            return config, _stacked(config, _read(file, opened, config, sizes))
    except library.SafetensorError as error:
        raise ValueError(f"{file} is no complete safetensors file ({error}); copy or download it again") from error


def save_gpt2(path: str | os.PathLike[str], config: GPTConfig, params: Mapping[str, Any]) -> None:
    """Writes the parameters of `GPT(config)` as GPT-2's are published, float32; `load_gpt2` reads them again.

    A path that ends in .safetensors becomes that one file; another one a folder with model.safetensors and config.json,
    which the libraries that run published models can open. What is there is replaced as a whole or stays as it is.
    ValueError for an untied head and for parameters of another model. Arrays on several devices are gathered here.
    """
    if not config.tied:
        raise ValueError("save_gpt2: GPT-2 has no head of its own, found a config with tied=False")
    library, path = _library(), Path(path)
    is_file = path.suffix == ".safetensors"
    params = _unstacked(config, params)
    tensors = {tensor.name: _flat(params, tensor) for tensor in _layout(config)}
    if len(jax.tree.leaves(params)) != len(tensors):
        found = f"{len(jax.tree.leaves(params))} parameters"
        raise ValueError(f"save_gpt2: a GPT of this config has {len(tensors)} parameters, found {found}")
    (path.parent if is_file else path).mkdir(parents=True, exist_ok=True)
    file = path if is_file else path / WEIGHTS
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    notes = {"format": "pt", "n_head": str(config.num_heads)}  # libraries refuse a file without its format
    try:
        library.save_file(tensors, beside, metadata=notes)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
    if not is_file:
        (path / SETTINGS).write_text(json.dumps(_settings(config), indent=2) + "\n", encoding="utf-8")


class _Library:
    """The parts of the package safetensors that are used here."""

    def __init__(self) -> None:
        from safetensors import SafetensorError, safe_open
        from safetensors.numpy import save_file

        self.SafetensorError, self.safe_open, self.save_file = SafetensorError, safe_open, save_file


def _library() -> _Library:
    try:
        return _Library()
    except ModuleNotFoundError as error:
        hint = "run: pip install 'alpa-like[safetensors]'"
        raise ModuleNotFoundError(
            f"GPT-2 weights need safetensors, which is not installed; {hint}", name="safetensors"
        ) from error


# ------------------------------------------------------------------------------------------- the published layout


def _layout(config: GPTConfig) -> Iterator[_Tensor]:
    """All published tensors of a GPT-2, with the layers' parameters under h0, h1, …"""
    d, f, h = config.d_model, config.mlp_ratio * config.d_model, config.num_heads
    heads = (h, d // h)
    yield _Tensor("wte.weight", (config.vocab_size, d), ("wte", "embedding"), (config.vocab_size, d))
    yield _Tensor("wpe.weight", (config.seq_len, d), ("wpe",), (config.seq_len, d))
    yield from _pair("ln_f", ("ln_f",), (d,), (d,), (d,), kernel="scale")
    for layer in range(config.num_layers):
        name, own = f"h.{layer}.", f"h{layer}"
        yield from _pair(name + "ln_1", (own, "ln1"), (d,), (d,), (d,), kernel="scale")
        yield from _pair(name + "attn.c_attn", (own, "attn", "qkv"), (d, 3 * d), (d, 3, *heads), (3, *heads))
        yield from _pair(name + "attn.c_proj", (own, "attn", "out"), (d, d), (*heads, d), (d,))
        yield from _pair(name + "ln_2", (own, "ln2"), (d,), (d,), (d,), kernel="scale")
        yield from _pair(name + "mlp.c_fc", (own, "mlp", "up"), (d, f), (d, f), (f,))
        yield from _pair(name + "mlp.c_proj", (own, "mlp", "down"), (f, d), (f, d), (d,))


def _pair(
    name: str, path: tuple[str, ...], shape: Shape, own: Shape, own_bias: Shape, *, kernel: str = "kernel"
) -> Iterator[_Tensor]:
    """A weight and its bias, which is as long as the weight's last dim."""
    yield _Tensor(f"{name}.weight", shape, (*path, kernel), own)
    yield _Tensor(f"{name}.bias", shape[-1:], (*path, "bias"), own_bias)


def _settings(config: GPTConfig) -> dict[str, Any]:
    """What a config.json says of a GPT-2."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.seq_len,
        "n_ctx": config.seq_len,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_ratio * config.d_model,
        **{key: values[0] for key, values in _COMPUTES.items()},
    }


# ------------------------------------------------------------------------------------------------------- reading


def _sizes(file: Path, opened: Any) -> dict[str, tuple[str, Shape]]:
    """Name in the file and shape of each tensor, by its name without prefix and without what is no parameter."""
    sizes: dict[str, tuple[str, Shape]] = {}
    for full in opened.keys():  # noqa: SIM118 (no mapping: it has no other way to list its names)
        name, part = full.removeprefix(PREFIX), opened.get_slice(full)
        if _MASK.fullmatch(name):
            continue
        if part.get_dtype() not in FLOATS:
            found = f"tensor {full!r} is {part.get_dtype()}"
            raise ValueError(f"{file}: weights must be of one of {', '.join(FLOATS)}; {found}")
        sizes[name] = (full, tuple(part.get_shape()))
    return sizes


def _num_heads(file: Path, given: int | None, notes: Mapping[str, str]) -> int:
    """The number of heads: given, of the config.json beside the file, or noted in it. Also checks that config.json."""
    beside = file.with_name(SETTINGS)
    said = _checked_settings(beside).get("n_head") if beside.is_file() else None
    if given is not None and said is not None and given != said:
        raise ValueError(f"load_gpt2: num_heads {given} was given, but {beside} says n_head {said}")
    noted = notes.get("n_head", "")
    heads = next((n for n in (given, said, int(noted) if noted.isdecimal() else None) if n is not None), None)
    if type(heads) is not int or heads < 1:
        where = f"give num_heads (the published sizes have D / 64), or put {SETTINGS} beside it"
        raise ValueError(f"{file} does not say how many heads the model has; {where}")
    return heads


def _checked_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); copy or download it again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must hold a JSON object, found {type(settings).__name__}")
    for key, allowed in _COMPUTES.items():
        if key in settings and settings[key] not in allowed:
            known = " or ".join(map(str, allowed))
            raise ValueError(f"{file} asks for {key} {settings[key]!r}; a GPT here computes with {known}")
    return settings


def _config(file: Path, sizes: Mapping[str, tuple[str, Shape]], num_heads: int, **options: Any) -> GPTConfig:
    """The config that the shapes tell."""
    vocab_size, width = _two_dims(file, sizes, "wte.weight")
    seq_len, _ = _two_dims(file, sizes, "wpe.weight")
    _, hidden = _two_dims(file, sizes, "h.0.mlp.c_fc.weight")
    layers = {int(name.split(".")[1]) for name in sizes if re.match(r"h\.\d+\.", name)}
    if len(layers) <= max(layers):
        missing = next(n for n in range(len(layers) + 1) if n not in layers)
        raise ValueError(f"{file} has no tensor of layer {missing}, but some of layer {max(layers)}")
    if width % num_heads:
        raise ValueError(f"{file}: num_heads must divide the model width {width}; found {num_heads}")
    if hidden % width:
        raise ValueError(f"{file}: the MLP must be a multiple of the model width {width}; found {hidden}")
    return GPTConfig(vocab_size, seq_len, width, num_heads, max(layers) + 1, hidden // width, tied=True, **options)


def _two_dims(file: Path, sizes: Mapping[str, tuple[str, Shape]], name: str) -> Shape:
    if name not in sizes:
        raise ValueError(f"{file} is no GPT-2: it has no tensor {name!r}{_some(sizes)}")
    shape = sizes[name][1]
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{file}: tensor {name!r} must have two dims, found shape {shape}")
    return shape


def _some(names: Collection[str]) -> str:
    return f"; the first of its {len(names)} are {', '.join(sorted(names)[:3])}" if names else ", nor any other"


def _read(file: Path, opened: Any, config: GPTConfig, sizes: Mapping[str, tuple[str, Shape]]) -> Tree:
    """All parameters, with the layers under h0, h1, …"""
    layout = list(_layout(config))
    unknown = sizes.keys() - {tensor.name for tensor in layout} - {HEAD}
    if unknown:
        raise ValueError(f"{file} is no GPT-2: it has the tensor {min(unknown)!r}, which GPT-2 has not")
    params: Tree = {}
    for tensor in layout:
        if tensor.name not in sizes:
            raise ValueError(f"{file} has no tensor {tensor.name!r}, which a GPT-2 of {config.num_layers} layers has")
        full, shape = sizes[tensor.name]
        if shape != tensor.shape:
            raise ValueError(f"{file}: tensor {full!r} must have shape {tensor.shape}, found {shape}")
        _put(params, tensor.path, _float32(opened, full).reshape(tensor.own_shape))
    if HEAD in sizes and not np.array_equal(_float32(opened, HEAD), params["wte"]["embedding"]):
        raise ValueError(f"{file}: {HEAD!r} differs from 'wte.weight', but GPT-2 has no head of its own")
    return params


def _float32(opened: Any, name: str) -> np.ndarray:
    return np.asarray(opened.get_tensor(name)).astype(np.float32, copy=False)


def _put(params: Tree, path: tuple[str, ...], values: np.ndarray) -> None:
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = values


def _stacked(config: GPTConfig, params: Tree) -> Tree:
    """The parameters as `config` has them: h0, h1, …, or one h with all layers in its leaves' first dim."""
    if not config.scan_layers:
        return params
    layers = [params.pop(f"h{index}") for index in range(config.num_layers)]
    return params | {"h": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}


# ------------------------------------------------------------------------------------------------------- writing


def _unstacked(config: GPTConfig, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters with the layers under h0, h1, …, those of a loop over layers gathered first."""
    if not config.scan_layers:
        return params
    stacked = jax.tree.map(np.asarray, params.get("h"))
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(stacked)}
    if lengths != {(config.num_layers,)}:
        need = f"leaves of {config.num_layers} stacked layers under 'h'"
        raise ValueError(f"save_gpt2: a config with scan_layers needs {need}, found first dims {sorted(lengths)}")
    layers = {f"h{index}": jax.tree.map(lambda leaf, i=index: leaf[i], stacked) for index in range(config.num_layers)}
    return {name: tree for name, tree in params.items() if name != "h"} | layers


def _flat(params: Mapping[str, Any], tensor: _Tensor) -> np.ndarray:
    """The parameter of a published tensor, in float32 and its published shape."""
    where = "/".join(tensor.path)
    leaf: Any = params
    for key in tensor.path:
        if not isinstance(leaf, Mapping) or key not in leaf:
            raise ValueError(f"save_gpt2: these are not the parameters of the config: they have no {where!r}")
        leaf = leaf[key]
    if np.shape(leaf) != tensor.own_shape:
        raise ValueError(f"save_gpt2: parameter {where!r} must have shape {tensor.own_shape}, found {np.shape(leaf)}")
    return np.ascontiguousarray(leaf, np.float32).reshape(tensor.shape)
