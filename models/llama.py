"""LLaMA 3: RMSNorm, rotary positions, SwiGLU, grouped-query attention and an untied head.

Letters in shapes: B batch, S sequence, D model width, N key-value heads, R query heads per key-value head, K width of a
head, F hidden width of the MLP, V vocabulary.
"""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from alpa_like.models.layers import apply_layers, causal_mask, embedding_init, masked_softmax


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of a LLaMA. `dtype` is what is computed in; parameters are float32.

    `remat` and `scan_layers` are as in `GPTConfig`.
    """

    vocab_size: int
    seq_len: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    num_layers: int
    ffn_dim: int
    rope_theta: float = 500_000.0
    norm_epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    scan_layers: bool = False

    def __post_init__(self) -> None:
        if self.d_model % self.num_heads or self.num_heads % self.num_kv_heads or self.head_dim % 2:
            rule = "num_heads must divide d_model, num_kv_heads num_heads, and 2 the width of a head"
            found = f"d_model {self.d_model}, num_heads {self.num_heads}, num_kv_heads {self.num_kv_heads}"
            raise ValueError(f"LlamaConfig: {rule}; found {found}")

    @property
    def head_dim(self) -> int:
        """K."""
        return self.d_model // self.num_heads

    def num_params(self) -> int:
        """Number of parameters, in closed form."""
        d, kv = self.d_model, self.num_kv_heads * self.head_dim
        layer = 2 * d * d + 2 * d * kv + 3 * d * self.ffn_dim + 2 * d
        return 2 * self.vocab_size * d + self.num_layers * layer + d

    @classmethod
    def llama_8b(
        cls,
        num_layers: int = 32,
        seq_len: int = 8192,
        dtype: DTypeLike = jnp.bfloat16,
        remat: bool = True,
        scan_layers: bool = False,
    ) -> "LlamaConfig":
        """The public sizes of Llama 3 8B: 8,030,261,248 parameters with 32 layers."""
        return cls(
            vocab_size=128_256,
            seq_len=seq_len,
            d_model=4096,
            num_heads=32,
            num_kv_heads=8,
            num_layers=num_layers,
            ffn_dim=14_336,
            dtype=dtype,
            remat=remat,
            scan_layers=scan_layers,
        )


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary positions for x [B, S, …, K]: at position s the pair (i, i + K/2) turns by s · theta^(-2i/K) radians."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies
    angles = angles.reshape(x.shape[1], *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    low, high = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


class GroupedQueryAttention(nn.Module):
    """Causal attention, [B, S, D] → [B, S, D]; kernels q [D, N, R, K], k and v [D, N, K], out [N, R, K, D], no bias."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The mixed values [B, S, D] of x [B, S, D]."""
        cfg = self.config
        kv_shape = (cfg.num_kv_heads, cfg.head_dim)
        q_shape = (cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads, cfg.head_dim)
        q = nn.DenseGeneral(q_shape, use_bias=False, dtype=cfg.dtype, name="q")(x)
        k = nn.DenseGeneral(kv_shape, use_bias=False, dtype=cfg.dtype, name="k")(x)
        v = nn.DenseGeneral(kv_shape, use_bias=False, dtype=cfg.dtype, name="v")(x)
        q, k = rotate(q, cfg.rope_theta), rotate(k, cfg.rope_theta)
        scores = jnp.einsum("bsnrk,btnk->bnrst", q, k) / math.sqrt(cfg.head_dim)
        weights = masked_softmax(scores, causal_mask(x.shape[1])).astype(cfg.dtype)
        mixed = jnp.einsum("bnrst,btnk->bsnrk", weights, v)
        return nn.DenseGeneral(cfg.d_model, axis=(-3, -2, -1), use_bias=False, dtype=cfg.dtype, name="out")(mixed)


class SwiGLU(nn.Module):
    """(silu(x·gate) ⊙ x·up)·down without biases, [B, S, D] → [B, S, D]; gate and up [D, F], down [F, D]."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The output [B, S, D] of x [B, S, D]."""
        cfg = self.config
        gate = nn.Dense(cfg.ffn_dim, use_bias=False, dtype=cfg.dtype, name="gate")(x)
        up = nn.Dense(cfg.ffn_dim, use_bias=False, dtype=cfg.dtype, name="up")(x)
        return nn.Dense(cfg.d_model, use_bias=False, dtype=cfg.dtype, name="down")(jax.nn.silu(gate) * up)


class LlamaBlock(nn.Module):
    """One decoder layer, [B, S, D] → [B, S, D]: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The layer's output [B, S, D] for x [B, S, D]."""
        cfg = self.config
        normed = nn.RMSNorm(cfg.norm_epsilon, dtype=cfg.dtype, name="norm1")(x)
        x = x + GroupedQueryAttention(cfg, name="attn")(normed)
        normed = nn.RMSNorm(cfg.norm_epsilon, dtype=cfg.dtype, name="norm2")(x)
        return x + SwiGLU(cfg, name="mlp")(normed)


class Llama(nn.Module):
    """int tokens [B, S] → logits [B, S, V] of the next token, in `dtype`."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits [B, S, V] of tokens [B, S]."""
        cfg = self.config
        embed = nn.Embed(cfg.vocab_size, cfg.d_model, dtype=cfg.dtype, embedding_init=embedding_init(), name="wte")
        x = apply_layers(LlamaBlock, cfg, embed(tokens))
        x = nn.RMSNorm(cfg.norm_epsilon, dtype=cfg.dtype, name="norm_f")(x)
        return nn.Dense(cfg.vocab_size, use_bias=False, dtype=cfg.dtype, name="head")(x)
