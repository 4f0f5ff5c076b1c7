"""What one device takes for its share of a model, measured with our own planner.

A device's share under tensor parallelism is itself a program for one device: fewer heads, a narrower MLP, fewer rows of
the vocabulary, fewer experts. So its seconds and bytes are not guessed: they are those that `PipeshardParallel` gives
for that program with one stage and two micro-batches, on one device of the cluster with memory enough. That is the
roofline, the accumulators and the account of what is kept between forward and backward pass of all our plans. Models of
one and two layers tell what a layer takes and what the rest takes (embedding, head, loss); one and two rows per
micro-batch tell what grows with the rows. Both dependencies are affine in the cost model, which a test checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import alpa_like as alpa
from alpa_like.models import GPTConfig, MoEConfig, Task, cross_entropy
from alpa_like.models.layers import LN_EPSILON, FeedForward, attend, causal_mask, embedding_init
from alpa_like.models.moe import top2_gating

__all__ = [
    "Affine",
    "Measure",
    "Shares",
    "Transformer",
    "one_device",
    "parameters",
    "share_task",
    "shares",
    "unit_layers",
]

Transformer = GPTConfig | MoEConfig


# -------------------------------------------------------------------------------------------------- the program


class _Attention(nn.Module):
    """The heads of one device, [B, S, D] → [B, S, D] before the all-reduce."""

    heads: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = nn.DenseGeneral((3, self.heads, self.width), dtype=self.dtype, name="qkv")(x)
        mixed = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], causal_mask(x.shape[1]))
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), dtype=self.dtype, name="out")(mixed)


class _Experts(nn.Module):
    """The experts of one device, [G, S, D] → ([G, S, D], load-balancing loss []): E / expert of them, each for the
    tokens of `expert` devices, a share of `hidden` wide."""

    config: MoEConfig
    hidden: int
    expert: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        cfg, init = self.config, nn.initializers.lecun_normal(batch_axis=(0,))
        local, groups = cfg.num_experts // self.expert, x.shape[0]
        wi = self.param("wi", init, (local, cfg.d_model, self.hidden), jnp.float32).astype(cfg.dtype)
        wo = self.param("wo", init, (local, self.hidden, cfg.d_model), jnp.float32).astype(cfg.dtype)
        router = nn.Dense(cfg.num_experts, use_bias=False, name="router")
        gates = jax.nn.softmax(router(x.astype(jnp.float32)), axis=-1)
        combine, aux = top2_gating(gates, cfg.capacity(x.shape[1]))
        tokens = jnp.einsum("gsec,gsd->egcd", (combine > 0).astype(cfg.dtype), x)
        sent = tokens.shape
        tokens = tokens.reshape(local, self.expert * groups, *sent[2:])  # what comes back from the others is as large
        tokens = jax.nn.gelu(jnp.einsum("egcd,edf->egcf", tokens, wi))
        tokens = jnp.einsum("egcf,efd->egcd", tokens, wo).reshape(sent)
        return jnp.einsum("gsec,egcd->gsd", combine.astype(cfg.dtype), tokens), aux


class _Share(nn.Module):
    """int tokens [B, S] → (logits [B, S, V / tensor], load-balancing loss []) of one device."""

    config: Transformer
    layers: int
    tensor: int
    expert: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        cfg, t = self.config, self.tensor
        rows, aux = -(-cfg.vocab_size // t), jnp.zeros(())
        embed = nn.Embed(rows, cfg.d_model, dtype=cfg.dtype, embedding_init=embedding_init(), name="wte")
        positions = self.param("wpe", embedding_init(), (cfg.seq_len, cfg.d_model), jnp.float32)
        x = embed(tokens) + positions.astype(cfg.dtype)
        for index in range(self.layers):
            normed = nn.LayerNorm(LN_EPSILON, dtype=cfg.dtype, name=f"ln1_{index}")(x)
            heads, width = cfg.num_heads // t, cfg.d_model // cfg.num_heads
            x = x + _Attention(heads, width, cfg.dtype, name=f"attn_{index}")(normed)
            normed = nn.LayerNorm(LN_EPSILON, dtype=cfg.dtype, name=f"ln2_{index}")(x)
            mixed, more = self._mlp(index, normed)
            x, aux = x + mixed, aux + more
        x = nn.LayerNorm(LN_EPSILON, dtype=cfg.dtype, name="ln_f")(x)
        return nn.Dense(rows, use_bias=False, dtype=cfg.dtype, name="head")(x), aux

    def _mlp(self, index: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        cfg = self.config
        hidden = cfg.mlp_ratio * cfg.d_model // self.tensor
        if isinstance(cfg, MoEConfig) and index % 2:
            return _Experts(cfg, hidden, self.expert, name=f"moe_{index}")(x)
        return FeedForward(hidden, cfg.dtype, name=f"mlp_{index}")(x), jnp.zeros(())


def share_task(config: Transformer, layers: int, rows: int, *, tensor: int = 1, expert: int = 1) -> Task:
    """Train one device's share of a model of some layers with Adam, in batches of `rows` sequences."""
    module = _Share(config, layers, tensor, expert)
    tokens = jax.ShapeDtypeStruct((rows, config.seq_len), jnp.int32)

    def init() -> TrainState:
        params = module.init(jax.random.PRNGKey(0), jnp.zeros((1, config.seq_len), jnp.int32))["params"]
        state = TrainState.create(apply_fn=module.apply, params=params, tx=optax.adam(1e-3))
        return state.replace(step=jnp.zeros((), jnp.int32))

    def step(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
        def loss(params: Any) -> jax.Array:
            made: Any = module.apply({"params": params}, batch["tokens"])
            logits, aux = made
            return cross_entropy(logits, batch["targets"]) + 0.01 * aux

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    def no_batch(_: int) -> Any:
        raise NotImplementedError("a share is planned, never run")

    return Task("share", init, step, no_batch, lambda: {"tokens": tokens, "targets": tokens})


# --------------------------------------------------------------------------------------------------- measures


@dataclass(frozen=True, slots=True)
class Measure:
    """What one device takes for a micro-batch: seconds; bytes held from forward to backward pass, and at the peak."""

    forward_s: float
    backward_s: float
    held_bytes: float
    peak_bytes: float

    def plus(self, other: Measure, factor: float = 1.0) -> Measure:
        return Measure(
            self.forward_s + factor * other.forward_s,
            self.backward_s + factor * other.backward_s,
            self.held_bytes + factor * other.held_bytes,
            self.peak_bytes + factor * other.peak_bytes,
        )


NOTHING = Measure(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Affine:
    """A measure at one row per micro-batch, and what each further row adds."""

    one: Measure
    more: Measure

    def at(self, rows: int) -> Measure:
        return self.one.plus(self.more, rows - 1)

    def minus(self, other: Affine, factor: float = 1.0) -> Affine:
        return Affine(self.one.plus(other.one, -factor), self.more.plus(other.more, -factor))


@dataclass(frozen=True, slots=True)
class Shares:
    """What a unit of layers takes on one device, and what the rest does; parameters of each, experts apart."""

    unit: Affine
    rest: Affine
    unit_params: float
    unit_experts: float
    rest_params: float


def one_device(
    cluster: alpa.Cluster, task: Task, *, remat: bool = False, layers: Literal["auto"] | int = 1
) -> tuple[Measure, float]:
    """A task of two micro-batches on one device that has memory enough: what a micro-batch takes, and the update."""
    method = alpa.PipeshardParallel(
        num_micro_batches=2,
        stage_option=alpa.UniformStageOption(num_stages=1),
        layer_option=alpa.AutoLayerOption(layers, "layer" if remat else "none"),
        schedule="1f1b",
        batch_statistics="micro_batch",
    )
    state = jax.eval_shape(task.init)
    plan = alpa.parallelize(task.step, method=method).plan(state, task.abstract_batch(), cluster=_roomy(cluster))
    assert plan.pipeline is not None
    stage, nbytes = plan.pipeline.stages[0], sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    gradients = 4 * parameters(state.params)
    peak = max(0.0, plan.pipeline.memory_bytes[0] - stage.micro_bytes - nbytes - gradients)
    return Measure(stage.forward_s, stage.backward_s, stage.micro_bytes, peak), plan.pipeline.update_s[0]


def parameters(params: Any) -> float:
    """How many numbers a tree of parameters has."""
    return float(sum(x.size for x in jax.tree.leaves(params)))


def _roomy(cluster: alpa.Cluster) -> alpa.Cluster:
    """One device of the cluster, with more memory than anything needs; equal for all parts of a cluster."""
    lone = cluster.part(1, 1)
    return replace(lone, device=replace(lone.device, memory_bytes=2**50), intra_host=cluster.inter_host)


def shares(config: Transformer, cluster: alpa.Cluster, tensor: int, expert: int) -> Shares:
    """What one device of `tensor` × `expert` takes for a unit of layers and for the rest."""
    return _shares(config, _roomy(cluster), tensor, expert)


@lru_cache(maxsize=64)
def _shares(config: Transformer, cluster: alpa.Cluster, tensor: int, expert: int) -> Shares:
    unit = unit_layers(config)

    def affine(layers: int) -> Affine:
        one, two = (
            one_device(cluster, share_task(config, layers, 2 * rows, tensor=tensor, expert=expert))[0]
            for rows in (1, 2)
        )
        return Affine(one, two.plus(one, -1.0))

    short, long = affine(unit), affine(2 * unit)
    each = long.minus(short)
    counts = [
        jax.eval_shape(share_task(config, n, 1, tensor=tensor, expert=expert).init).params for n in (unit, 2 * unit)
    ]
    first, second = (parameters(c) for c in counts)
    experts = sum(parameters({k: v for k, v in m.items() if k != "router"}) for m in _sparse(counts[0]))
    return Shares(each, short.minus(each), second - first, experts, 2 * first - second)


def _sparse(params: Any) -> Iterator[Any]:
    return (value for name, value in params.items() if name.startswith("moe_"))


def unit_layers(config: Transformer) -> int:
    """Layers that come again and again as a group: a dense one and a sparse one of a mixture of experts."""
    return 2 if isinstance(config, MoEConfig) else 1
