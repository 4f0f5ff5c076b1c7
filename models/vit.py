"""The Vision Transformer (Dosovitskiy et al. 2021): an encoder over patches of an image, read at a class token.

Letters in shapes: B batch, N side of the image, P patches of an image, S = P + 1 tokens, D model width.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from alpa_like.models.layers import FeedForward, SelfAttention, apply_layers, embedding_init

VIT_LN_EPSILON = 1e-6  # the authors' code, jax/vision_transformer


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and options of a Vision Transformer; images are square, cut into squares of `patch_size`.

    Dropout acts on the embeddings and before each residual sum. `dtype` is what is computed in; parameters are float32.
    `remat` and `scan_layers` are as in `GPTConfig`.
    """

    image_size: int = 224
    patch_size: int = 16
    d_model: int = 768
    num_heads: int = 12
    num_layers: int = 12
    mlp_ratio: int = 4
    num_classes: int = 1000
    in_channels: int = 3
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    scan_layers: bool = False

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            found = f"image_size {self.image_size}, patch_size {self.patch_size}"
            raise ValueError(f"ViTConfig: patch_size must divide image_size; found {found}")

    @property
    def num_patches(self) -> int:
        """P."""
        return (self.image_size // self.patch_size) ** 2

    def num_params(self) -> int:
        """Number of parameters, in closed form."""
        d, f = self.d_model, self.mlp_ratio * self.d_model
        patches = self.patch_size**2 * self.in_channels * d + d
        tokens = d + (self.num_patches + 1) * d
        attention = d * 3 * d + 3 * d + d * d + d
        mlp = d * f + f + f * d + d
        head = d * self.num_classes + self.num_classes
        return patches + tokens + self.num_layers * (attention + mlp + 4 * d) + 2 * d + head


class ViTBlock(nn.Module):
    """One encoder layer, [B, S, D] → [B, S, D]: x + attn(ln1(x)), then x + mlp(ln2(x)); every token sees every one."""

    config: ViTConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The layer's output [B, S, D] for x [B, S, D]."""
        cfg = self.config
        dropout = nn.Dropout(cfg.dropout_rate, deterministic=self.deterministic)
        normed = nn.LayerNorm(VIT_LN_EPSILON, dtype=cfg.dtype, name="ln1")(x)
        x = x + dropout(SelfAttention(cfg.num_heads, cfg.dtype, name="attn")(normed))
        normed = nn.LayerNorm(VIT_LN_EPSILON, dtype=cfg.dtype, name="ln2")(x)
        return x + dropout(FeedForward(cfg.mlp_ratio * cfg.d_model, cfg.dtype, name="mlp")(normed))


class ViT(nn.Module):
    """Images [B, N, N, in_channels] → logits [B, num_classes] in `dtype`.

    With `deterministic=False` and a dropout rate the caller passes `rngs={"dropout": key}`.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
        """Logits [B, num_classes] of images [B, N, N, in_channels]."""
        cfg = self.config
        size = (cfg.patch_size, cfg.patch_size)
        x = nn.Conv(cfg.d_model, size, size, padding="VALID", dtype=cfg.dtype, name="patches")(images)
        x = x.reshape(x.shape[0], cfg.num_patches, cfg.d_model)
        token = self.param("cls", nn.initializers.zeros, (cfg.d_model,), jnp.float32).astype(cfg.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, cfg.d_model)), x], axis=1)
        x = x + self.param("wpe", embedding_init(), (cfg.num_patches + 1, cfg.d_model), jnp.float32).astype(cfg.dtype)
        x = nn.Dropout(cfg.dropout_rate, deterministic=deterministic)(x)
        x = apply_layers(ViTBlock, cfg, x, deterministic=deterministic)
        x = nn.LayerNorm(VIT_LN_EPSILON, dtype=cfg.dtype, name="ln_f")(x[:, 0])  # of each token by itself
        return nn.Dense(cfg.num_classes, dtype=cfg.dtype, name="head")(x)
