"""Layers that several models share: attention, feed-forward, and the stack of equal blocks.

Letters in shapes: B batch, S sequence, D model width, H heads, K width of a head, F hidden width of the MLP,
V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

LN_EPSILON = 1e-5  # GPT-2


class StackConfig(Protocol):
    """What `apply_layers` reads of a model's config."""

    @property
    def num_layers(self) -> int: ...
    @property
    def remat(self) -> bool: ...
    @property
    def scan_layers(self) -> bool: ...


def embedding_init() -> jax.nn.initializers.Initializer:
    """Normal with standard deviation 0.02, as GPT-2 and BERT start their embeddings."""
    return nn.initializers.normal(0.02)


def causal_mask(length: int) -> jax.Array:
    """bool [S, S], True where query (row) may see key (column)."""
    return jnp.tril(jnp.ones((length, length), dtype=bool))


def masked_softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """float32 softmax over the last dim; `mask` broadcasts to `scores`, False entries get weight 0."""
    scores = scores.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """softmax(q·k / √K)·v for q [B, S, H, K] and k, v [B, T, H, K]; `mask` broadcasts to [B, H, S, T]. [B, S, H, K]."""
    scores = jnp.einsum("bshk,bthk->bhst", q, k) / math.sqrt(q.shape[-1])
    weights = masked_softmax(scores, mask).astype(v.dtype)
    return jnp.einsum("bhst,bthk->bshk", weights, v)


class SelfAttention(nn.Module):
    """Multi-head self-attention, [B, S, D] → [B, S, D]; kernels qkv [D, 3, H, K] and out [H, K, D], both with bias."""

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"SelfAttention: the model width {width} is not a multiple of num_heads {self.num_heads}")
        qkv = nn.DenseGeneral((3, self.num_heads, width // self.num_heads), dtype=self.dtype, name="qkv")(x)
        mixed = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask)
        return nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(mixed)


class FeedForward(nn.Module):
    """gelu(x·up)·down with biases, [B, S, D] → [B, S, D]; kernels up [D, F] and down [F, D]."""

    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jax.nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, name="up")(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="down")(hidden)


def apply_layers(block: Callable[..., Any], config: StackConfig, x: jax.Array, **options: Any) -> jax.Array:
    """x through `num_layers` modules `block(config, **options)`, each [B, S, D] → [B, S, D].

    Call it inside a compact method. The parameters are named h0, h1, …; with `scan_layers` there is one "h", its leaves
    with a leading dim num_layers.
    """
    # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
    layer = nn.remat(block, prevent_cse=not config.scan_layers) if config.remat else block
    if config.scan_layers:
        return _scan_layers(layer(config, **options, name="h"), config.num_layers, x)
    for index in range(config.num_layers):
        x = layer(config, **options, name=f"h{index}")(x)
    return x


def _scan_layers(layer: Callable[[jax.Array], jax.Array], length: int, x: jax.Array) -> jax.Array:
    def body(module: Callable[[jax.Array], jax.Array], carry: jax.Array, _: None) -> tuple[jax.Array, None]:
        return module(carry), None

    scan: Any = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=length)
    return scan(layer, x, None)[0]
