"""Models by name: the published sizes of each family, and two that run anywhere, "tiny" and "laptop".

`SIZES["vit"]["B/16"]` is a config, `task("vit", "B/16", batch_size=64)` trains it. "tiny" steps in milliseconds on
emulated CPU devices, and most of its dims divide by 8; "laptop" has a few million parameters and something to plan.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from alpa_like.models.bert import BertConfig
from alpa_like.models.gpt import GPTConfig
from alpa_like.models.llama import LlamaConfig
from alpa_like.models.mlp import MLPConfig
from alpa_like.models.moe import MoEConfig
from alpa_like.models.paper import (
    GPT_SIZES,
    MOE_SIZES,
    RESNET_50,
    RESNET_101,
    WIDE_RESNET_SIZES,
    paper_gpt_config,
    paper_moe_config,
    paper_wide_resnet_config,
)
from alpa_like.models.resnet import ResNetConfig
from alpa_like.models.tasks import (
    Optimizer,
    Task,
    bert_task,
    gpt_task,
    llama_task,
    mlp_task,
    moe_task,
    resnet_task,
    unet_task,
    vit_task,
)
from alpa_like.models.unet import UNetConfig
from alpa_like.models.vit import ViTConfig
from alpa_like.models.wide_resnet import WideResNetConfig, wide_resnet_task

Entry = TypeVar("Entry")
Config = (
    MLPConfig
    | GPTConfig
    | BertConfig
    | MoEConfig
    | LlamaConfig
    | ViTConfig
    | UNetConfig
    | ResNetConfig
    | WideResNetConfig
)

_TINY_TEXT: dict[str, Any] = dict(vocab_size=64, seq_len=16, d_model=32, num_heads=8, num_layers=2)
_LAPTOP_TEXT: dict[str, Any] = dict(vocab_size=4096, seq_len=128, d_model=256, num_heads=8, num_layers=4)


def _gpt2(d_model: int, num_layers: int, num_heads: int) -> GPTConfig:
    return GPTConfig(50257, 1024, d_model, num_heads, num_layers, tied=True)


def _bert(d_model: int, num_layers: int, num_heads: int) -> BertConfig:
    return BertConfig(30522, 512, d_model, num_heads, num_layers, mask_id=103)


def _llama2(
    d_model: int, num_layers: int, num_heads: int, num_kv_heads: int, ffn_dim: int, seq_len: int = 4096
) -> LlamaConfig:
    sizes = (32_000, seq_len, d_model, num_heads, num_kv_heads, num_layers, ffn_dim)
    return LlamaConfig(*sizes, rope_theta=10_000.0, dtype=jnp.bfloat16)


def _llama3(d_model: int, num_layers: int, num_heads: int, ffn_dim: int) -> LlamaConfig:
    return LlamaConfig(128_256, 8192, d_model, num_heads, 8, num_layers, ffn_dim, dtype=jnp.bfloat16)


def _vit(patch_size: int, d_model: int, num_layers: int, num_heads: int) -> ViTConfig:
    return ViTConfig(224, patch_size, d_model, num_heads, num_layers)


SIZES: dict[str, dict[str, Config]] = {
    "mlp": {
        "tiny": MLPConfig((32, 64, 64, 8)),
        "laptop": MLPConfig((512, 2048, 2048, 512)),
    },
    "gpt": {
        "tiny": GPTConfig(**_TINY_TEXT),
        "laptop": GPTConfig(**_LAPTOP_TEXT),
        # GPT-2 (Radford et al. 2019, table 2), named after what the published files count
        "124M": _gpt2(768, 12, 12),
        "355M": _gpt2(1024, 24, 16),
        "774M": _gpt2(1280, 36, 20),
        "1558M": _gpt2(1600, 48, 25),
        **{name: paper_gpt_config(name) for name in GPT_SIZES},
    },
    "bert": {
        "tiny": BertConfig(**_TINY_TEXT),
        "laptop": BertConfig(**_LAPTOP_TEXT),
        # Devlin et al. 2019, section 3, uncased vocabulary
        "base": _bert(768, 12, 12),
        "large": _bert(1024, 24, 16),
    },
    "moe": {
        "tiny": MoEConfig(**_TINY_TEXT, num_experts=8, capacity_factor=4.0),
        "laptop": MoEConfig(**_LAPTOP_TEXT, num_experts=8),
        **{name: paper_moe_config(name) for name in MOE_SIZES},
    },
    "llama": {
        "tiny": LlamaConfig(**_TINY_TEXT, num_kv_heads=4, ffn_dim=64),
        "laptop": LlamaConfig(**_LAPTOP_TEXT, num_kv_heads=4, ffn_dim=704),
        "1.1B": _llama2(2048, 22, 32, 4, 5632, 2048),  # TinyLlama (Zhang et al. 2024)
        # Llama 2 (Touvron et al. 2023)
        "7B": _llama2(4096, 32, 32, 32, 11_008),
        "13B": _llama2(5120, 40, 40, 40, 13_824),
        # Llama 3 (Dubey et al. 2024, table 3)
        "8B": _llama3(4096, 32, 32, 14_336),
        "70B": _llama3(8192, 80, 64, 28_672),
        "405B": _llama3(16_384, 126, 128, 53_248),
    },
    "vit": {
        "tiny": ViTConfig(image_size=16, patch_size=4, d_model=32, num_heads=8, num_layers=2, num_classes=8),
        "laptop": ViTConfig(image_size=32, patch_size=4, d_model=256, num_heads=8, num_layers=4, num_classes=64),
        # B, L, H: Dosovitskiy et al. 2021, table 1; Ti, S: Touvron et al. 2021, table 1
        "Ti/16": _vit(16, 192, 12, 3),
        "S/16": _vit(16, 384, 12, 6),
        "B/32": _vit(32, 768, 12, 12),
        "B/16": _vit(16, 768, 12, 12),
        "L/32": _vit(32, 1024, 24, 16),
        "L/16": _vit(16, 1024, 24, 16),
        "H/14": _vit(14, 1280, 32, 16),
    },
    "unet": {
        "tiny": UNetConfig(8, channels=16, multipliers=(1, 2), blocks=1, groups=8, num_heads=8),
        "laptop": UNetConfig(32, channels=32, groups=8),
        # Ho et al. 2020, appendix B
        "cifar10": UNetConfig(dropout_rate=0.1),
        "lsun": UNetConfig(256, multipliers=(1, 1, 2, 2, 4, 4), attention_levels=(4,)),
        # labels the pixels of 21 classes, in the first four widths of Ronneberger et al. 2015, figure 1
        "segmentation": UNetConfig(
            256, 3, 21, channels=64, multipliers=(1, 2, 4, 8), blocks=1, attention_levels=(), num_times=0
        ),
    },
    "resnet": {
        "tiny": ResNetConfig(widths=(8, 16), blocks=1, num_classes=8, image_size=8),
        "laptop": ResNetConfig(width_factor=4),
        # Zagoruyko & Komodakis 2016, table 5: CIFAR-10
        "16-8": ResNetConfig(width_factor=8),
        "28-10": ResNetConfig(blocks=4, width_factor=10),
    },
    "wide_resnet": {
        "tiny": WideResNetConfig((1, 1), channels=8, width_factor=2, num_classes=8, image_size=16),
        "laptop": WideResNetConfig((1, 1, 1, 1), channels=32, width_factor=2, num_classes=64, image_size=64),
        # He et al. 2016, table 1
        "50": WideResNetConfig(RESNET_50),
        "101": WideResNetConfig(RESNET_101),
        **{name: paper_wide_resnet_config(name) for name in WIDE_RESNET_SIZES},
    },
}
"""Configs by family and name. Sizes of Alpa's paper have its dtypes, LLaMAs bfloat16, all others float32."""

_FROM_0 = ("mask_id", "num_times")
"""Options that count from 0; all other whole numbers are sizes."""

_TASKS: dict[str, Callable[..., Task]] = {
    "mlp": mlp_task,
    "gpt": gpt_task,
    "bert": bert_task,
    "moe": moe_task,
    "llama": llama_task,
    "vit": vit_task,
    "unet": unet_task,
    "resnet": resnet_task,
    "wide_resnet": wide_resnet_task,
}


def config(family: str, size: str, **options: Any) -> Any:
    """The config `SIZES[family][size]` with fields replaced by `options`, such as `dtype`, `seq_len` or `remat`.

    A dtype may be a name such as "bfloat16". ValueError for an unknown family, size or field, which lists the known
    ones, and for a size that is no whole number of at least 1.
    """
    found = _choice(f"size of {family}", size, _choice("family of models", family, SIZES))
    known = {field.name: None for field in fields(found)}
    for name, value in options.items():
        _choice(f"option of {type(found).__name__}", name, known)
        if type(getattr(found, name)) is int:
            _check_whole(f"{type(found).__name__}: {name}", value, 0 if name in _FROM_0 else 1)
    if not 0 <= options.get("dropout_rate", 0) < 1:
        raise ValueError(f"dropout_rate must be at least 0 and less than 1, found {options['dropout_rate']}")
    if "dtype" in options:
        options["dtype"] = _dtype(options["dtype"])
    return replace(found, **options)


def task(family: str, size: str, *, batch_size: int = 16, optimizer: Optimizer | None = None, **options: Any) -> Task:
    """The training task of `config(family, size, **options)`, named "family size"; Adam if no optimizer is given."""
    chosen = config(family, size, **options)
    _check_whole("task: batch_size", batch_size, 1)
    return _TASKS[family](chosen, batch_size, optimizer, name=f"{family} {size}")


def tiny_tasks(optimizer: Optimizer | None = None, batch_size: int = 16) -> dict[str, Task]:
    """The tiny task of each family, by family; Adam with learning rate 0.001 if no optimizer is given."""
    return {family: task(family, "tiny", batch_size=batch_size, optimizer=optimizer) for family in SIZES}


def _choice(what: str, name: str, choices: Mapping[str, Entry]) -> Entry:
    if name not in choices:
        raise ValueError(f"no {what} is named {name!r}; choose one of {', '.join(choices)}")
    return choices[name]


def _check_whole(what: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{what} must be a whole number of at least {least}, found {value!r}")


def _dtype(dtype: Any) -> Any:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype must be a floating one such as float32, bfloat16 or float16, found {dtype!r}")
    return found
