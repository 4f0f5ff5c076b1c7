"""Training tasks: a model, its train state, the plain single-device step, and batches to feed it.

A task knows nothing of where it runs. `init` and `step` are pure functions with all randomness inside jax, so they
can be jitted, traced, or shaped with `jax.eval_shape`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from alpa_like.models.batches import Batch, Source, labelled, masked_tokens, next_tokens, unlabelled
from alpa_like.models.bert import Bert, BertConfig
from alpa_like.models.gpt import GPT, GPTConfig
from alpa_like.models.llama import Llama, LlamaConfig
from alpa_like.models.mlp import MLP, MLPConfig
from alpa_like.models.moe import MoE, MoEConfig
from alpa_like.models.resnet import ResNet, ResNetConfig
from alpa_like.models.unet import UNet, UNetConfig, kept_signal
from alpa_like.models.vit import ViT, ViTConfig

Optimizer = optax.GradientTransformation
# (params, state, batch) → the loss [], and the fields of the state that the forward pass changes
Loss = Callable[[Any, Any, Batch], tuple[jax.Array, dict[str, Any]]]


class DropoutState(TrainState):
    """A train state with the key of all dropout and noise, raw uint32 [2].

    The key stays; step n draws with fold_in(key, n).
    """

    key: jax.Array


class BatchNormState(TrainState):
    """A train state with the running statistics of BatchNorm."""

    batch_stats: Any


@dataclass(frozen=True)
class Task:
    """Something to train.

    `init()` makes the state, the same at every call, and allocates nothing under `jax.eval_shape`. `step(state, batch)`
    returns the new state and the loss. `batch(seed)` makes a dict of numpy arrays, the same for the same seed;
    `abstract_batch()` is its dict of `jax.ShapeDtypeStruct`.
    """

    name: str
    init: Callable[[], Any]
    step: Callable[[Any, Batch], tuple[Any, jax.Array]]
    batch: Callable[[int], Batch]
    abstract_batch: Callable[[], Batch]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy [] in nats, in float32, of logits [..., V] against int labels [...]."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels))


def mlp_task(config: MLPConfig, batch_size: int, optimizer: Optimizer | None = None, name: str = "mlp") -> Task:
    """Classify vectors: batch {inputs float32 [B, widths[0]], labels int32 [B]}."""
    module = MLP(config)

    def loss(params: Any, _: Any, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        return cross_entropy(_forward(module, params, batch["inputs"]), batch["labels"]), {}

    return _task(name, module, loss, labelled((batch_size, config.widths[0]), config.widths[-1]), optimizer)


def gpt_task(config: GPTConfig, batch_size: int, optimizer: Optimizer | None = None, name: str = "gpt") -> Task:
    """Predict the next token: batch {tokens, targets} int32 [B, seq_len]."""
    source = next_tokens(batch_size, config.seq_len, config.vocab_size)
    return _token_task(name, GPT(config), source, optimizer)


def llama_task(config: LlamaConfig, batch_size: int, optimizer: Optimizer | None = None, name: str = "llama") -> Task:
    """Predict the next token: batch {tokens, targets} int32 [B, seq_len]."""
    source = next_tokens(batch_size, config.seq_len, config.vocab_size)
    return _token_task(name, Llama(config), source, optimizer)


def bert_task(config: BertConfig, batch_size: int, optimizer: Optimizer | None = None, name: str = "bert") -> Task:
    """Restore masked tokens, with dropout: batch {tokens, targets} int32 [B, seq_len]; every position counts."""
    module = Bert(config)

    def loss(params: Any, state: Any, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        rngs = {"dropout": jax.random.fold_in(state.key, state.step)}
        logits = _forward(module, params, batch["tokens"], deterministic=False, rngs=rngs)
        return cross_entropy(logits, batch["targets"]), {}

    source = masked_tokens(batch_size, config.seq_len, config.vocab_size, config.mask_id)
    return _task(name, module, loss, source, optimizer, DropoutState)


def moe_task(config: MoEConfig, batch_size: int, optimizer: Optimizer | None = None, name: str = "moe") -> Task:
    """Predict the next token: batch {tokens, targets} int32 [B, seq_len].

    The loss is the cross-entropy plus aux_weight times the load-balancing loss.
    """
    module = MoE(config)

    def loss(params: Any, _: Any, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        logits, aux = _forward(module, params, batch["tokens"])
        return cross_entropy(logits, batch["targets"]) + config.aux_weight * aux, {}

    return _task(name, module, loss, next_tokens(batch_size, config.seq_len, config.vocab_size), optimizer)


def resnet_task(config: ResNetConfig, batch_size: int, optimizer: Optimizer | None = None, name: str = "conv") -> Task:
    """Classify images: batch {inputs float32 [B, N, N, in_channels], labels int32 [B]}."""
    module, has_statistics = ResNet(config), config.norm == "batch"

    def loss(params: Any, state: Any, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        if not has_statistics:
            return cross_entropy(_forward(module, params, batch["inputs"], train=True), batch["labels"]), {}
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, changed = module.apply(variables, batch["inputs"], train=True, mutable=["batch_stats"])
        return cross_entropy(logits, batch["labels"]), dict(changed)

    shape = (batch_size, config.image_size, config.image_size, config.in_channels)
    state_type = BatchNormState if has_statistics else TrainState
    return _task(name, module, loss, labelled(shape, config.num_classes), optimizer, state_type)


def vit_task(config: ViTConfig, batch_size: int, optimizer: Optimizer | None = None, name: str = "vit") -> Task:
    """Classify images: batch {inputs float32 [B, N, N, in_channels], labels int32 [B]}.

    The state is a `DropoutState` where the config has dropout.
    """
    module, drops = ViT(config), config.dropout_rate > 0

    def loss(params: Any, state: Any, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        options = {"rngs": {"dropout": jax.random.fold_in(state.key, state.step)}} if drops else {}
        logits = _forward(module, params, batch["inputs"], deterministic=not drops, **options)
        return cross_entropy(logits, batch["labels"]), {}

    shape = (batch_size, config.image_size, config.image_size, config.in_channels)
    state_type = DropoutState if drops else TrainState
    return _task(name, module, loss, labelled(shape, config.num_classes), optimizer, state_type)


def unet_task(config: UNetConfig, batch_size: int, optimizer: Optimizer | None = None, name: str = "unet") -> Task:
    """Find the noise in images: batch {inputs float32 [B, N, N, in_channels]}.

    Noise and its levels are drawn in the step. The loss is the mean square error of the noise (Ho et al. 2020, equation
    14). A net without noise levels (`num_times` 0) learns to label pixels, out_channels being the classes: batch
    {inputs, labels int32 [B, N, N]}.
    """
    module, shape = UNet(config), (batch_size, config.image_size, config.image_size, config.in_channels)
    if not config.num_times:
        source = labelled(shape, config.out_channels, label_dims=3)
        return _task(name, module, _pixel_loss(module), source, optimizer, DropoutState)
    if config.in_channels != config.out_channels:
        found = f"in_channels {config.in_channels}, out_channels {config.out_channels}"
        raise ValueError(f"unet_task: noise has as many channels as the image; found {found}")
    times = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return _task(name, module, _noise_loss(module), unlabelled(shape), optimizer, DropoutState, times)


def _pixel_loss(module: UNet) -> Loss:
    def loss(params: Any, state: Any, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        rngs = {"dropout": jax.random.fold_in(state.key, state.step)}
        logits = _forward(module, params, batch["inputs"], deterministic=False, rngs=rngs)
        return cross_entropy(logits, batch["labels"]), {}

    return loss


def _noise_loss(module: UNet) -> Loss:
    kept_by_time = kept_signal(module.config.num_times)

    def loss(params: Any, state: Any, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        times = jax.random.randint(keys[0], batch["inputs"].shape[:1], 0, module.config.num_times)
        noise = jax.random.normal(keys[1], batch["inputs"].shape)
        kept = jnp.asarray(kept_by_time)[times][:, None, None, None]
        noisy = jnp.sqrt(kept) * batch["inputs"] + jnp.sqrt(1 - kept) * noise
        found = _forward(module, params, noisy, times, deterministic=False, rngs={"dropout": keys[2]})
        return jnp.mean((noise - found.astype(jnp.float32)) ** 2), {}

    return loss


def small_tasks(optimizer: Optimizer | None = None) -> dict[str, Task]:
    """Tiny tasks for tests: mlp, gpt, gpt_scan, gpt_remat, bert, conv, moe. Most dims divide by 8; batch 16.

    Without `optimizer`: SGD with learning rate 0.1 and momentum 0.9.
    """
    tx = optax.sgd(0.1, momentum=0.9) if optimizer is None else optimizer
    decoder: dict[str, Any] = dict(vocab_size=64, seq_len=16, d_model=32, num_heads=8, num_layers=2)
    bert = BertConfig(vocab_size=64, seq_len=16, d_model=32, num_heads=8, num_layers=2)
    conv = ResNetConfig(widths=(8, 16), blocks=1, num_classes=8, image_size=8)
    tasks = [
        mlp_task(MLPConfig((32, 64, 64, 8)), 16, tx),
        gpt_task(GPTConfig(**decoder), 16, tx),
        gpt_task(GPTConfig(**decoder, scan_layers=True), 16, tx, name="gpt_scan"),
        gpt_task(GPTConfig(**decoder, remat=True), 16, tx, name="gpt_remat"),
        bert_task(bert, 16, tx),
        resnet_task(conv, 16, tx),
        moe_task(MoEConfig(**decoder, num_experts=8, capacity_factor=4.0), 16, tx),
    ]
    return {task.name: task for task in tasks}


def facts_gpt(tied: bool = False) -> Task:
    """The GPT that we measure: 2 layers, width 512, 8 heads, vocabulary 4096, batch 16, sequence 256, float32, Adam."""
    config = GPTConfig(vocab_size=4096, seq_len=256, d_model=512, num_heads=8, num_layers=2, tied=tied)
    return gpt_task(config, 16, optax.adam(1e-3), name="facts_gpt_tied" if tied else "facts_gpt")


def _forward(module: nn.Module, params: Any, *args: Any, **kwargs: Any) -> Any:
    return module.apply({"params": params}, *args, **kwargs)


def _token_task(name: str, module: nn.Module, source: Source, optimizer: Optimizer | None) -> Task:
    def loss(params: Any, _: Any, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        return cross_entropy(_forward(module, params, batch["tokens"]), batch["targets"]), {}

    return _task(name, module, loss, source, optimizer)


def _task(
    name: str,
    module: nn.Module,
    loss: Loss,
    source: Source,
    optimizer: Optimizer | None,
    state_type: type[TrainState] = TrainState,
    *also_read: jax.ShapeDtypeStruct,
) -> Task:
    """The task of a model. Module and optimizer are fixed here, so that all its states have one treedef.

    The module is called with the first array of the batch, and with arrays such as `also_read`.
    """
    tx = optax.adam(1e-3) if optimizer is None else optimizer
    init = _init(module, tx, (source.abstract[0][1], *also_read), state_type)
    return Task(name, init, _step(loss), source.batch, source.abstract_batch)


def _init(
    module: nn.Module, tx: Optimizer, read: tuple[jax.ShapeDtypeStruct, ...], state_type: type[TrainState]
) -> Callable[[], Any]:
    apply_fn = module.apply

    def init() -> TrainState:
        key = jax.random.PRNGKey(0)
        # One example is enough: no parameter's shape depends on the batch size.
        fields = dict(module.init(key, *(jnp.zeros((1, *array.shape[1:]), array.dtype) for array in read)))
        if state_type is DropoutState:
            fields["key"] = jax.random.fold_in(key, 1)
        state = state_type.create(apply_fn=apply_fn, tx=tx, **fields)
        return state.replace(step=jnp.zeros((), jnp.int32))  # `create` leaves a Python int

    return jax.jit(init)  # one compilation instead of one per parameter


def _step(loss: Loss) -> Callable[[Any, Batch], tuple[Any, jax.Array]]:
    def step(state: Any, batch: Batch) -> tuple[Any, jax.Array]:
        (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(state.params, state, batch)
        return state.apply_gradients(grads=grads, **changed), value

    return step
