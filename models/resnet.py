"""A small Wide-ResNet (Zagoruyko & Komodakis 2016): pre-activation blocks and BatchNorm.

Images are [B, height, width, channels].
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a Wide-ResNet: stage i is `blocks` blocks of widths[i] · width_factor channels.

    Every stage but the first halves the image. The stem has widths[0] channels.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    blocks: int = 2
    num_classes: int = 10
    width_factor: int = 1
    image_size: int = 32
    in_channels: int = 3
    dtype: DTypeLike = jnp.float32

    def num_params(self) -> int:
        """Number of trainable parameters, in closed form; the running statistics are not counted."""
        total, channels = 9 * self.in_channels * self.widths[0], self.widths[0]
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                out = width * self.width_factor
                shortcut = out != channels or (stage > 0 and block == 0)
                total += 2 * channels + 9 * channels * out + 2 * out + 9 * out * out + shortcut * channels * out
                channels = out
        return total + 2 * channels + (channels + 1) * self.num_classes


class ResNetBlock(nn.Module):
    """bn-relu-conv twice, plus the input; [B, N, N, channels in] → [B, N/stride, N/stride, channels].

    Where the shape changes, the shortcut is a 1×1 convolution of the first bn-relu.
    """

    channels: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The block's output for x, with batch statistics if `train`, with running ones if not."""
        strides = (self.stride, self.stride)
        y = jax.nn.relu(nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, name="bn1")(x))
        if self.stride != 1 or x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), strides, use_bias=False, dtype=self.dtype, name="shortcut")(y)
        y = nn.Conv(self.channels, (3, 3), strides, use_bias=False, dtype=self.dtype, name="conv1")(y)
        y = jax.nn.relu(nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, name="bn2")(y))
        return x + nn.Conv(self.channels, (3, 3), use_bias=False, dtype=self.dtype, name="conv2")(y)


class ResNet(nn.Module):
    """Images [B, N, N, in_channels] → logits [B, num_classes] in `dtype`; collections `params` and `batch_stats`.

    With `train=True` apply it with `mutable=["batch_stats"]`.
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
                layer = ResNetBlock(width * cfg.width_factor, stride, cfg.dtype, name=f"stage{stage}_block{block}")
                x = layer(x, train)
        x = jax.nn.relu(nn.BatchNorm(not train, momentum=0.9, dtype=cfg.dtype, name="bn_f")(x))
        return nn.Dense(cfg.num_classes, dtype=cfg.dtype, name="head")(jnp.mean(x, axis=(1, 2)))
