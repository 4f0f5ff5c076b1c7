"""A decoder whose every second layer is a top-2 mixture of experts, after GShard (Lepikhin et al. 2020, algorithm 1).

Letters in shapes: G groups of tokens that are routed together (here: one per batch row), S tokens of a group,
E experts, C places per expert and group, D model width, F hidden width of an expert, V vocabulary.
"""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from alpa_like.models.layers import LN_EPSILON, FeedForward, SelfAttention, causal_mask, embedding_init


@dataclass(frozen=True)
class MoEConfig:
    """Sizes of a mixture-of-experts decoder; layers 1, 3, 5, … are the sparse ones.

    An expert takes capacity_factor · S / E tokens of each group (2 is enough if the router is balanced); what does not
    fit is dropped. `aux_weight` weighs the load-balancing loss in the training loss.
    """

    vocab_size: int
    seq_len: int
    d_model: int
    num_heads: int
    num_layers: int
    num_experts: int
    mlp_ratio: int = 4
    capacity_factor: float = 2.0
    aux_weight: float = 0.01
    dtype: DTypeLike = jnp.float32

    @property
    def num_sparse_layers(self) -> int:
        """How many of the layers are mixtures of experts."""
        return self.num_layers // 2

    def capacity(self, tokens: int) -> int:
        """C: places per expert in a group of `tokens` tokens."""
        return math.ceil(self.capacity_factor * tokens / self.num_experts)

    def num_params(self) -> int:
        """Number of parameters, in closed form."""
        d, f, e = self.d_model, self.mlp_ratio * self.d_model, self.num_experts
        common = d * 3 * d + 3 * d + d * d + d + 4 * d
        dense, sparse = d * f + f + f * d + d, d * e + 2 * e * d * f
        layers = (self.num_layers - self.num_sparse_layers) * dense + self.num_sparse_layers * sparse
        return (2 * self.vocab_size + self.seq_len) * d + self.num_layers * common + layers + 2 * d


def top2_gating(gates: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Router probabilities [G, S, E] → (combine weights [G, S, E, C], load-balancing loss []).

    Each token goes to its two best experts with weights that sum to 1. First choices are placed in the order of the
    tokens, then second choices; a choice beyond the capacity has weight 0. The loss is 1 when the load is even.
    """
    num_experts = gates.shape[-1]
    first = jax.nn.one_hot(jnp.argmax(gates, axis=-1), num_experts, dtype=gates.dtype)
    second = jax.nn.one_hot(jnp.argmax(jnp.where(first > 0, -1.0, gates), axis=-1), num_experts, dtype=gates.dtype)
    first_gate, second_gate = jnp.sum(gates * first, axis=-1), jnp.sum(gates * second, axis=-1)
    total = first_gate + second_gate
    taken = jnp.sum(first, axis=1, keepdims=True)
    combine = _place(first_gate / total, first, jnp.zeros_like(taken), capacity)
    combine = combine + _place(second_gate / total, second, taken, capacity)
    load = jnp.mean(first, axis=1) * jnp.mean(gates, axis=1)
    return combine, num_experts * jnp.mean(jnp.sum(load, axis=-1))


def _place(weight: jax.Array, choice: jax.Array, taken: jax.Array, capacity: int) -> jax.Array:
    """weight [G, S] at each token's expert and place, [G, S, E, C]; `taken` [G, 1, E] places are occupied before."""
    place = jnp.sum((jnp.cumsum(choice, axis=1) - choice + taken) * choice, axis=-1)
    slot = jax.nn.one_hot(place.astype(jnp.int32), capacity, dtype=choice.dtype)  # a place ≥ C becomes a row of zeros
    return jnp.einsum("gs,gse,gsc->gsec", weight, choice, slot)


class MoELayer(nn.Module):
    """Experts gelu(x·wi)·wo, [G, S, D] → ([G, S, D], load-balancing loss []); wi [E, D, F], wo [E, F, D]."""

    config: MoEConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Combined outputs [G, S, D] of x [G, S, D], and the load-balancing loss."""
        cfg, init = self.config, nn.initializers.lecun_normal(batch_axis=(0,))
        hidden = cfg.mlp_ratio * cfg.d_model
        wi = self.param("wi", init, (cfg.num_experts, cfg.d_model, hidden), jnp.float32).astype(cfg.dtype)
        wo = self.param("wo", init, (cfg.num_experts, hidden, cfg.d_model), jnp.float32).astype(cfg.dtype)
        router = nn.Dense(cfg.num_experts, use_bias=False, name="router")  # in float32, whatever `dtype` is
        gates = jax.nn.softmax(router(x.astype(jnp.float32)), axis=-1)
        combine, aux = top2_gating(gates, cfg.capacity(x.shape[1]))
        tokens = jnp.einsum("gsec,gsd->egcd", (combine > 0).astype(cfg.dtype), x)
        tokens = jax.nn.gelu(jnp.einsum("egcd,edf->egcf", tokens, wi))
        tokens = jnp.einsum("egcf,efd->egcd", tokens, wo)
        return jnp.einsum("gsec,egcd->gsd", combine.astype(cfg.dtype), tokens), aux


class MoEBlock(nn.Module):
    """One pre-LayerNorm decoder layer, [B, S, D] → ([B, S, D], load-balancing loss []), the loss 0 if not `sparse`."""

    config: MoEConfig
    sparse: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The layer's output [B, S, D] for x [B, S, D], and its load-balancing loss."""
        cfg = self.config
        normed = nn.LayerNorm(LN_EPSILON, dtype=cfg.dtype, name="ln1")(x)
        x = x + SelfAttention(cfg.num_heads, cfg.dtype, name="attn")(normed, causal_mask(x.shape[1]))
        normed = nn.LayerNorm(LN_EPSILON, dtype=cfg.dtype, name="ln2")(x)
        if not self.sparse:
            return x + FeedForward(cfg.mlp_ratio * cfg.d_model, cfg.dtype, name="mlp")(normed), jnp.zeros(())
        mixed, aux = MoELayer(cfg, name="moe")(normed)
        return x + mixed, aux


class MoE(nn.Module):
    """int tokens [B, S], S ≤ seq_len → (logits [B, S, V] in `dtype`, load-balancing loss [], mean of the layers)."""

    config: MoEConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits [B, S, V] of tokens [B, S], and the load-balancing loss."""
        cfg = self.config
        embed = nn.Embed(cfg.vocab_size, cfg.d_model, dtype=cfg.dtype, embedding_init=embedding_init(), name="wte")
        positions = self.param("wpe", embedding_init(), (cfg.seq_len, cfg.d_model), jnp.float32)
        x = embed(tokens) + positions[: tokens.shape[1]].astype(cfg.dtype)
        total = jnp.zeros(())
        for index in range(cfg.num_layers):
            x, aux = MoEBlock(cfg, sparse=index % 2 == 1, name=f"h{index}")(x)
            total = total + aux
        x = nn.LayerNorm(LN_EPSILON, dtype=cfg.dtype, name="ln_f")(x)
        logits = nn.Dense(cfg.vocab_size, use_bias=False, dtype=cfg.dtype, name="head")(x)
        return logits, total / max(cfg.num_sparse_layers, 1)
