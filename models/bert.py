"""BERT: a bidirectional post-LayerNorm encoder with a tied masked-token head. Letters in shapes as in `layers`."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from alpa_like.models.layers import LN_EPSILON, FeedForward, SelfAttention, embedding_init


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT. Dropout acts on the embeddings and before each residual sum; the token `mask_id` is [MASK]."""

    vocab_size: int
    seq_len: int
    d_model: int
    num_heads: int
    num_layers: int
    mlp_ratio: int = 4
    dropout_rate: float = 0.1
    mask_id: int = 0
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if not 0 <= self.mask_id < self.vocab_size:
            found = f"mask_id {self.mask_id}, vocab_size {self.vocab_size}"
            raise ValueError(f"BertConfig: mask_id must be a token of the vocabulary; found {found}")

    def num_params(self) -> int:
        """Number of parameters, in closed form."""
        d, f = self.d_model, self.mlp_ratio * self.d_model
        attention = d * 3 * d + 3 * d + d * d + d
        mlp = d * f + f + f * d + d
        head = d * d + d + 2 * d + self.vocab_size
        return (self.vocab_size + self.seq_len) * d + 2 * d + self.num_layers * (attention + mlp + 4 * d) + head


class BertBlock(nn.Module):
    """One encoder layer, [B, S, D] → [B, S, D]: ln1(x + attn(x)), then ln2(x + mlp(x))."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        """The layer's output [B, S, D]; `mask` broadcasts to [B, H, S, S]."""
        cfg = self.config
        dropout = nn.Dropout(cfg.dropout_rate, deterministic=deterministic)
        mixed = SelfAttention(cfg.num_heads, cfg.dtype, name="attn")(x, mask)
        x = nn.LayerNorm(LN_EPSILON, dtype=cfg.dtype, name="ln1")(x + dropout(mixed))
        hidden = FeedForward(cfg.mlp_ratio * cfg.d_model, cfg.dtype, name="mlp")(x)
        return nn.LayerNorm(LN_EPSILON, dtype=cfg.dtype, name="ln2")(x + dropout(hidden))


class Bert(nn.Module):
    """int tokens [B, S], S ≤ seq_len → logits [B, S, V] of the unmasked token, in `dtype`.

    `padding_mask` is bool [B, S], True at tokens and False at padding, which no position attends to. With
    `deterministic=False` the caller passes `rngs={"dropout": key}`.
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, padding_mask: jax.Array | None = None, deterministic: bool = True
    ) -> jax.Array:
        """Logits [B, S, V] of tokens [B, S]."""
        cfg = self.config
        embed = nn.Embed(cfg.vocab_size, cfg.d_model, dtype=cfg.dtype, embedding_init=embedding_init(), name="wte")
        positions = self.param("wpe", embedding_init(), (cfg.seq_len, cfg.d_model), jnp.float32)
        x = embed(tokens) + positions[: tokens.shape[1]].astype(cfg.dtype)
        x = nn.LayerNorm(LN_EPSILON, dtype=cfg.dtype, name="ln_e")(x)
        x = nn.Dropout(cfg.dropout_rate, deterministic=deterministic)(x)
        mask = None if padding_mask is None else padding_mask[:, None, None, :]
        for index in range(cfg.num_layers):
            x = BertBlock(cfg, name=f"h{index}")(x, mask, deterministic)
        x = jax.nn.gelu(nn.Dense(cfg.d_model, dtype=cfg.dtype, name="transform")(x))
        x = nn.LayerNorm(LN_EPSILON, dtype=cfg.dtype, name="ln_t")(x)
        bias = self.param("bias", nn.initializers.zeros, (cfg.vocab_size,), jnp.float32)
        return embed.attend(x) + bias.astype(cfg.dtype)
