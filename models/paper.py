"""The models of the papers on automatic parallelization, as training tasks to plan for; too big to run here.

Sizes are those of the benchmark scripts of Alpa (Zheng et al., OSDI'22) and of the artifact of Aceso (Liu et al.,
EuroSys'24). Trace them without allocating anything: `jax.eval_shape(task.init)` and `task.abstract_batch()`.
"""

from collections.abc import Mapping
from typing import TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from alpa_like.models.gpt import GPTConfig
from alpa_like.models.moe import MoEConfig
from alpa_like.models.tasks import Optimizer, Task, gpt_task, moe_task
from alpa_like.models.wide_resnet import WideResNetConfig, wide_resnet_task

Sizes = TypeVar("Sizes")

RESNET_50, RESNET_101 = (3, 4, 6, 3), (3, 4, 23, 3)  # bottlenecks per stage (He et al. 2016, table 1)

# seq_len, d_model, num_layers, num_heads
GPT_SIZES: dict[str, tuple[int, int, int, int]] = {
    "125M": (1024, 768, 12, 12),
    "350M": (1024, 1024, 24, 16),
    "760M": (1024, 1536, 24, 16),
    "1.3B": (1024, 2048, 24, 32),
    "2.6B": (1024, 2560, 32, 32),
    "6.7B": (1024, 4096, 32, 32),
    "13B": (2048, 5120, 40, 40),
    "15B": (1024, 5120, 48, 40),
    "39B": (1024, 8192, 48, 64),
    "76B": (1024, 10240, 60, 80),
    "1024 layers": (2048, 512, 1024, 8),
}
"""Alpa's `gpt_specs` (benchmark/alpa/suite_manual_gpt.py); "13B" and "1024 layers" are Aceso's GPT-13B and its deepest
`scale-layer` model (profiler/model_configs.py, scripts/aceso_gpt_search.sh). Aceso trains all with 2048 tokens."""

# d_model, num_layers, num_experts
MOE_SIZES: dict[str, tuple[int, int, int]] = {
    "380M": (768, 8, 8),
    "690M": (768, 8, 16),
    "1.3B": (768, 16, 16),
    "2.4B": (1024, 16, 16),
    "10B": (1536, 16, 32),
    "27B": (2048, 16, 48),
    "70B": (2048, 32, 64),
}
"""Alpa's `moe_specs` (benchmark/alpa/suite_manual_moe.py)."""

# bottlenecks per stage, channels, width_factor
WIDE_RESNET_SIZES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "250M": (RESNET_50, 160, 2),
    "500M": (RESNET_50, 224, 2),
    "1B": (RESNET_50, 320, 2),
    "2B": (RESNET_50, 448, 2),
    "4B": (RESNET_50, 640, 2),
    "6.8B": (RESNET_50, 320, 16),
    "13B": (RESNET_101, 320, 16),
}
"""Alpa's `wresnet_specs` (benchmark/alpa/suite_wresnet.py), which Aceso uses too."""


def paper_gpt_config(
    name: str,
    *,
    dtype: DTypeLike = jnp.float16,
    seq_len: int | None = None,
    tied: bool = False,
    remat: bool = False,
    scan_layers: bool = False,
) -> GPTConfig:
    """The GPT `name` of `GPT_SIZES`, vocabulary 51200; `seq_len` replaces its own. ValueError for another name.

    Names count the vocabulary once, but the papers train with a head of its own: that is `tied=False`.
    """
    length, width, layers, heads = _sizes("GPT", name, GPT_SIZES)
    return GPTConfig(
        vocab_size=51200,
        seq_len=seq_len or length,
        d_model=width,
        num_heads=heads,
        num_layers=layers,
        tied=tied,
        dtype=dtype,
        remat=remat,
        scan_layers=scan_layers,
    )


def paper_moe_config(name: str, *, dtype: DTypeLike = jnp.float16) -> MoEConfig:
    """The mixture of experts `name` of `MOE_SIZES`, after GShard: 1024 tokens, vocabulary 32000, hidden width 8 · D.

    Tokens are routed in groups of one batch row, not of Alpa's 2048 tokens. ValueError for another name.
    """
    width, layers, experts = _sizes("mixture of experts", name, MOE_SIZES)
    return MoEConfig(
        vocab_size=32000,
        seq_len=1024,
        d_model=width,
        num_heads=16,
        num_layers=layers,
        num_experts=experts,
        mlp_ratio=8,
        dtype=dtype,
    )


def paper_wide_resnet_config(name: str, *, dtype: DTypeLike = jnp.float32, remat: bool = False) -> WideResNetConfig:
    """The Wide-ResNet `name` of `WIDE_RESNET_SIZES`: images 224×224×3, 1024 classes. ValueError for another name."""
    blocks, channels, width_factor = _sizes("Wide-ResNet", name, WIDE_RESNET_SIZES)
    return WideResNetConfig(blocks, channels, width_factor, num_classes=1024, dtype=dtype, remat=remat)


def paper_gpt(
    name: str,
    batch_size: int = 1024,
    optimizer: Optimizer | None = None,
    *,
    dtype: DTypeLike = jnp.float16,
    seq_len: int | None = None,
    tied: bool = False,
    remat: bool = False,
    scan_layers: bool = False,
) -> Task:
    """Train `paper_gpt_config(name, …)` with Adam: batch {tokens, targets} int32 [B, S], B = 1024 in both papers."""
    config = paper_gpt_config(name, dtype=dtype, seq_len=seq_len, tied=tied, remat=remat, scan_layers=scan_layers)
    return gpt_task(config, batch_size, optimizer, name=f"GPT {name}")


def paper_moe(
    name: str, batch_size: int = 1024, optimizer: Optimizer | None = None, *, dtype: DTypeLike = jnp.float16
) -> Task:
    """Train `paper_moe_config(name, …)` with Adam: batch {tokens, targets} int32 [B, 1024]."""
    return moe_task(paper_moe_config(name, dtype=dtype), batch_size, optimizer, name=f"MoE {name}")


def paper_wide_resnet(
    name: str,
    batch_size: int = 1536,
    optimizer: Optimizer | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> Task:
    """Train `paper_wide_resnet_config(name, …)` with Adam: batch {inputs [B, 224, 224, 3], labels [B]}.

    Its BatchNorm makes images depend on each other: a pipeline needs `batch_statistics="micro_batch"`,
    as the papers do it.
    """
    config = paper_wide_resnet_config(name, dtype=dtype, remat=remat)
    return wide_resnet_task(config, batch_size, optimizer, name=f"Wide-ResNet {name}")


def _sizes(kind: str, name: str, sizes: Mapping[str, Sizes]) -> Sizes:
    if name not in sizes:
        raise ValueError(f"no {kind} is named {name!r}; choose one of {', '.join(sizes)}")
    return sizes[name]
