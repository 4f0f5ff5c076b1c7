"""A small Wide-ResNet (Zagoruyko & Komodakis 2016): pre-activation blocks with BatchNorm, or without batch statistics.

Images are [B, height, width, channels].
"""

from dataclasses import dataclass
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from alpa_like.models.layers import LN_EPSILON

Norm = Literal["batch", "layer", "none"]


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a Wide-ResNet: stage i is `blocks` blocks of widths[i] · width_factor channels.

    Every stage but the first halves the image. The stem has widths[0] channels. `norm` stands before every relu:
    "batch" is BatchNorm; "layer" is a LayerNorm over the channels of each pixel, and "none" nothing: with these two no
    image depends on the others of its batch.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    blocks: int = 2
    num_classes: int = 10
    width_factor: int = 1
    image_size: int = 32
    in_channels: int = 3
    dtype: DTypeLike = jnp.float32
    norm: Norm = "batch"

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"ResNetConfig: norm must be one of {', '.join(get_args(Norm))}, found {self.norm!r}")

    def num_params(self) -> int:
        """Number of trainable parameters, in closed form; the running statistics are not counted."""
        per_channel = 0 if self.norm == "none" else 2
        total, channels = 9 * self.in_channels * self.widths[0], self.widths[0]
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                out = width * self.width_factor
                shortcut = out != channels or (stage > 0 and block == 0)
                total += per_channel * (channels + out) + 9 * out * (channels + out) + shortcut * channels * out
                channels = out
        return total + per_channel * channels + (channels + 1) * self.num_classes


def _normed_relu(x: jax.Array, norm: Norm, train: bool, dtype: DTypeLike, name: str) -> jax.Array:
    """relu of the normalized x, whose norm has the parameters `name`. Call it inside a compact method."""
    if norm == "batch":
        x = nn.BatchNorm(not train, momentum=0.9, dtype=dtype, name=name)(x)
    elif norm == "layer":
        x = nn.LayerNorm(LN_EPSILON, dtype=dtype, name=name)(x)
    return jax.nn.relu(x)


class ResNetBlock(nn.Module):
    """norm-relu-conv twice, plus the input; [B, N, N, channels in] → [B, N/stride, N/stride, channels].

    Where the shape changes, the shortcut is a 1×1 convolution of the first norm-relu.
    """

    channels: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    norm: Norm = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The block's output for x, with batch statistics if `train`, with running ones if not."""
        strides = (self.stride, self.stride)
        y = _normed_relu(x, self.norm, train, self.dtype, "bn1")
        if self.stride != 1 or x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), strides, use_bias=False, dtype=self.dtype, name="shortcut")(y)
        y = nn.Conv(self.channels, (3, 3), strides, use_bias=False, dtype=self.dtype, name="conv1")(y)
        y = _normed_relu(y, self.norm, train, self.dtype, "bn2")
        return x + nn.Conv(self.channels, (3, 3), use_bias=False, dtype=self.dtype, name="conv2")(y)


class ResNet(nn.Module):
    """Images [B, N, N, in_channels] → logits [B, num_classes] in `dtype`.

    With norm "batch" there is the collection `batch_stats` besides `params`; with `train=True` apply it with
    `mutable=["batch_stats"]`.
    """

    config: ResNetConfig

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits [B, num_classes] of images [B, N, N, in_channels]."""
        cfg = self.config
        x = nn.Conv(cfg.widths[0], (3, 3), use_bias=False, dtype=cfg.dtype, name="stem")(images)
        for stage, width in enumerate(cfg.widths):
            for block in range(cfg.blocks):
                stride = 2 if stage and not block else 1
                name, channels = f"stage{stage}_block{block}", width * cfg.width_factor
                x = ResNetBlock(channels, stride, cfg.dtype, cfg.norm, name=name)(x, train)
        x = _normed_relu(x, cfg.norm, train, cfg.dtype, "bn_f")
        return nn.Dense(cfg.num_classes, dtype=cfg.dtype, name="head")(jnp.mean(x, axis=(1, 2)))
