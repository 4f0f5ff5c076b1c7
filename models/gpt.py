"""GPT: a pre-LayerNorm decoder with learned positions, as GPT-2 is. Letters in shapes as in `layers`."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from alpa_like.models.layers import (
    LN_EPSILON,
    FeedForward,
    SelfAttention,
    apply_layers,
    causal_mask,
    embedding_init,
)


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and options of a GPT. `dtype` is what is computed in; parameters are float32.

    `tied` uses the token embedding as head, `remat` recomputes each layer in the backward pass, `scan_layers` runs the
    layers as one loop over stacked parameters.
    """

    vocab_size: int
    seq_len: int
    d_model: int
    num_heads: int
    num_layers: int
    mlp_ratio: int = 4
    tied: bool = False
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    scan_layers: bool = False

    def num_params(self) -> int:
        """Number of parameters, in closed form."""
        d, f = self.d_model, self.mlp_ratio * self.d_model
        attention = d * 3 * d + 3 * d + d * d + d
        mlp = d * f + f + f * d + d
        layer = attention + mlp + 4 * d
        head = 0 if self.tied else d * self.vocab_size
        return (self.vocab_size + self.seq_len) * d + self.num_layers * layer + 2 * d + head


class GPTBlock(nn.Module):
    """One decoder layer, [B, S, D] → [B, S, D]: x + attn(ln1(x)), then x + mlp(ln2(x))."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The layer's output [B, S, D] for x [B, S, D]."""
        cfg = self.config
        normed = nn.LayerNorm(LN_EPSILON, dtype=cfg.dtype, name="ln1")(x)
        x = x + SelfAttention(cfg.num_heads, cfg.dtype, name="attn")(normed, causal_mask(x.shape[1]))
        normed = nn.LayerNorm(LN_EPSILON, dtype=cfg.dtype, name="ln2")(x)
        return x + FeedForward(cfg.mlp_ratio * cfg.d_model, cfg.dtype, name="mlp")(normed)


class GPT(nn.Module):
    """int tokens [B, S], S ≤ seq_len → logits [B, S, V] of the next token, in `dtype`."""

    config: GPTConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits [B, S, V] of tokens [B, S]."""
        cfg = self.config
        embed = nn.Embed(cfg.vocab_size, cfg.d_model, dtype=cfg.dtype, embedding_init=embedding_init(), name="wte")
        positions = self.param("wpe", embedding_init(), (cfg.seq_len, cfg.d_model), jnp.float32)
        x = embed(tokens) + positions[: tokens.shape[1]].astype(cfg.dtype)
        x = apply_layers(GPTBlock, cfg, x)
        x = nn.LayerNorm(LN_EPSILON, dtype=cfg.dtype, name="ln_f")(x)
        if cfg.tied:
            return embed.attend(x)
        return nn.Dense(cfg.vocab_size, use_bias=False, dtype=cfg.dtype, name="head")(x)
