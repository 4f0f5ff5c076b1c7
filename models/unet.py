"""The U-Net of diffusion models (Ho et al. 2020), which also labels pixels.

The shape is that of Ronneberger et al. (2015): down through resolutions, up again, and at each resolution the way up
reads what the way down had there. What it does there is what is trained today: residual blocks with GroupNorm, which
knows no other image of the batch, self-attention at coarse resolutions, and the noise level added in every block.
Without `num_times` it is a plain segmentation net. All convolutions keep the size of the image ("SAME"), so that
nothing is cropped.

Letters in shapes: B batch, H and W sides of the feature map, C channels, E = 4 · channels of the time embedding.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from alpa_like.models.layers import attend

GN_EPSILON = 1e-6  # the authors' code, hojonathanho/diffusion


@dataclass(frozen=True)
class UNetConfig:
    """Sizes and options of a U-Net: level i has `blocks` blocks of channels · multipliers[i] channels on the way down.

    On the way up it has one more. Every level but the last halves the image. Levels in `attention_levels`, 0 being the
    finest, have self-attention after each block, and so has the middle. `num_times` is the number of noise levels, 0
    for a net without one. `groups` of GroupNorm must divide all channels. `remat` recomputes each block in the
    backward pass. `dtype` is what is computed in; parameters are float32.
    """

    image_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    num_heads: int = 1
    groups: int = 32
    num_times: int = 1000
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        if not self.multipliers or self.blocks < 1:
            found = f"multipliers {self.multipliers}, blocks {self.blocks}"
            raise ValueError(f"UNetConfig: a net has at least one level and one block a level; found {found}")
        if self.image_size % self.scale:
            rule = f"image_size must be a multiple of {self.scale}, as {len(self.multipliers)} levels halve it"
            raise ValueError(f"UNetConfig: {rule}; found {self.image_size}")
        if self.num_times and (self.channels % 2 or self.channels < 4):
            raise ValueError(f"UNetConfig: time embeddings need even channels from 4 on; found {self.channels}")
        if not set(self.attention_levels) <= set(range(len(self.multipliers))):
            levels = f"attention_levels must be among 0 to {len(self.multipliers) - 1}"
            raise ValueError(f"UNetConfig: {levels}; found {self.attention_levels}")
        for width in (self.channels, *self.widths, *(wide + skip for _, wide, skip in self.up())):
            if width % self.groups:
                found = f"{self.groups} with {width} channels"
                raise ValueError(f"UNetConfig: groups must divide the channels of all blocks; found {found}")
        for width in (self.widths[level] for level in (*self.attention_levels, -1)):
            if width % self.num_heads:
                found = f"{self.num_heads} with {width} channels"
                raise ValueError(f"UNetConfig: num_heads must divide the channels where attention is; found {found}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def scale(self) -> int:
        """How many times smaller than the image the coarsest level is; it divides both sides of every image."""
        return 2 ** (len(self.multipliers) - 1)

    def down(self) -> Iterator[tuple[int, int]]:
        """(level, channels before) of each block on the way down."""
        before = self.channels
        for level, width in enumerate(self.widths):
            for _ in range(self.blocks):
                yield level, before
                before = width

    def up(self) -> Iterator[tuple[int, int, int]]:
        """(level, channels before, channels of what comes from the way down) of each block on the way up."""
        skips = [self.channels]
        for level, width in enumerate(self.widths):
            skips += [width] * (self.blocks + (level + 1 < len(self.widths)))
        before = self.widths[-1]
        for level in reversed(range(len(self.widths))):
            for _ in range(self.blocks + 1):
                yield level, before, skips.pop()
                before = self.widths[level]

    def num_params(self) -> int:
        """Number of parameters, in closed form."""
        base, widths = self.channels, self.widths
        total = _conv(self.in_channels, base) + 2 * widths[0] + _conv(widths[0], self.out_channels)
        total += (base + 1) * 4 * base + (4 * base + 1) * 4 * base if self.num_times else 0
        total += sum(self._block(level, before) for level, before in self.down())
        total += sum(self._block(level, before + skip) for level, before, skip in self.up())
        total += 2 * self._block(-1, widths[-1]) + _attention(widths[-1])  # the middle
        return total + sum(_conv(width, width) for width in (*widths[:-1], *widths[1:]))  # down and up sampling

    def _block(self, level: int, before: int) -> int:
        """Parameters of a block of `before` channels and of the attention after it; level -1 is the middle."""
        after = self.widths[level]
        time = (4 * self.channels + 1) * after if self.num_times else 0
        shortcut = (before + 1) * after if before != after else 0
        attention = _attention(after) if level in self.attention_levels else 0
        return 2 * before + _conv(before, after) + time + 2 * after + _conv(after, after) + shortcut + attention


def _conv(before: int, after: int) -> int:
    """Parameters of a 3×3 convolution with bias."""
    return (9 * before + 1) * after


def _attention(width: int) -> int:
    """Parameters of self-attention with its norm."""
    return 2 * width + 4 * (width + 1) * width


def time_embedding(times: jax.Array, width: int) -> jax.Array:
    """Sines, then cosines, of `times` [B] at frequencies 1 to 1/10000 radians; float32 [B, width], `width` even."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10_000) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = times.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def kept_signal(num_times: int) -> np.ndarray:
    """How much of an image's power is left at each noise level, float32 [num_times], falling from nearly 1 to nearly 0.

    The running product of 1 - β for β rising evenly from 1e-4 to 0.02 (Ho et al. 2020, sections 2 and 4).
    """
    return np.cumprod(1 - np.linspace(1e-4, 0.02, num_times)).astype(np.float32)


def _norm(config: UNetConfig, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(config.groups, epsilon=GN_EPSILON, dtype=config.dtype, name=name)


def _conv3(config: UNetConfig, channels: int, name: str, stride: int = 1, *, starts_at_zero: bool = False) -> nn.Conv:
    init = nn.initializers.zeros if starts_at_zero else nn.initializers.lecun_normal()
    return nn.Conv(channels, (3, 3), (stride, stride), dtype=config.dtype, kernel_init=init, name=name)


class UNetAttention(nn.Module):
    """x plus self-attention among all places of the normed x, [B, H, W, C] → [B, H, W, C]; starts as the identity."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The output [B, H, W, C] for x [B, H, W, C]."""
        cfg, (batch, height, width, channels) = self.config, x.shape
        normed = _norm(cfg, "norm")(x).reshape(batch, height * width, channels)
        heads = (3, cfg.num_heads, channels // cfg.num_heads)
        qkv = nn.DenseGeneral(heads, dtype=cfg.dtype, name="qkv")(normed)
        mixed = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], None)
        out = nn.DenseGeneral(channels, axis=(-2, -1), dtype=cfg.dtype, kernel_init=nn.initializers.zeros, name="out")
        return x + out(mixed).reshape(x.shape)


class UNetBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + time)))), with attention after it if `attention`.

    [B, H, W, C] and time embedding [B, E] or None → [B, H, W, channels]. Where the channels change, the shortcut is a
    1×1 convolution. The last convolution starts at zero.
    """

    config: UNetConfig
    channels: int
    attention: bool = False
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array | None) -> jax.Array:
        """The block's output [B, H, W, channels] for x [B, H, W, C]."""
        cfg, after = self.config, self.channels
        y = _conv3(cfg, after, "conv1")(jax.nn.silu(_norm(cfg, "norm1")(x)))
        if time is not None:
            y = y + nn.Dense(after, dtype=cfg.dtype, name="time")(jax.nn.silu(time))[:, None, None, :]
        y = nn.Dropout(cfg.dropout_rate, deterministic=self.deterministic)(jax.nn.silu(_norm(cfg, "norm2")(y)))
        if x.shape[-1] != after:
            x = nn.Dense(after, dtype=cfg.dtype, name="shortcut")(x)
        x = x + _conv3(cfg, after, "conv2", starts_at_zero=True)(y)
        return UNetAttention(cfg, name="attn")(x) if self.attention else x


def doubled(x: jax.Array) -> jax.Array:
    """Each place four times, [B, H, W, C] → [B, 2·H, 2·W, C]."""
    batch, height, width, channels = x.shape
    spread = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return spread.reshape(batch, 2 * height, 2 * width, channels)


class UNet(nn.Module):
    """Images [B, H, W, in_channels] and noise levels [B] (none if `num_times` is 0) → [B, H, W, out_channels].

    H and W are multiples of `config.scale`. The output is in `dtype`, and zero for fresh parameters. With
    `deterministic=False` and a dropout rate the caller passes `rngs={"dropout": key}`.
    """

    config: UNetConfig

    @nn.compact
    def __call__(self, images: jax.Array, times: jax.Array | None = None, deterministic: bool = True) -> jax.Array:
        """The noise [B, H, W, out_channels] in images [B, H, W, in_channels], or the logits of their pixels."""
        cfg = self.config
        if images.shape[1] % cfg.scale or images.shape[2] % cfg.scale:
            raise ValueError(f"UNet: the sides of images must be multiples of {cfg.scale}; found {images.shape}")
        time = self._time(times)
        kind = nn.remat(UNetBlock) if cfg.remat else UNetBlock

        def block(level: int, name: str, attention: bool) -> Callable[..., jax.Array]:
            return kind(cfg, cfg.widths[level], attention, deterministic, name=name)

        x = _conv3(cfg, cfg.channels, "stem")(images)
        skips = [x]
        for index, (level, _) in enumerate(cfg.down()):
            x = block(level, f"down{index}", level in cfg.attention_levels)(x, time)
            skips.append(x)
            if (index + 1) % cfg.blocks == 0 and level + 1 < len(cfg.widths):
                x = _conv3(cfg, cfg.widths[level], f"half{level}", stride=2)(x)
                skips.append(x)
        x = block(-1, "mid1", False)(block(-1, "mid0", True)(x, time), time)
        for index, (level, _, _) in enumerate(cfg.up()):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = block(level, f"up{index}", level in cfg.attention_levels)(x, time)
            if (index + 1) % (cfg.blocks + 1) == 0 and level:
                x = _conv3(cfg, cfg.widths[level], f"double{level}")(doubled(x))
        return _conv3(cfg, cfg.out_channels, "head", starts_at_zero=True)(jax.nn.silu(_norm(cfg, "norm_f")(x)))

    def _time(self, times: jax.Array | None) -> jax.Array | None:
        """The embedding [B, E] of the noise levels. Called inside the compact method."""
        cfg = self.config
        if (times is None) != (cfg.num_times == 0):
            need = f"noise levels [B], as num_times is {cfg.num_times}" if times is None else "none, as num_times is 0"
            raise ValueError(f"UNet: the second argument must be {need}")
        if times is None:
            return None
        wide = 4 * cfg.channels
        time = nn.Dense(wide, dtype=cfg.dtype, name="time1")(time_embedding(times, cfg.channels))
        return nn.Dense(wide, dtype=cfg.dtype, name="time2")(jax.nn.silu(time))
