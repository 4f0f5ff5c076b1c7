"""The Wide-ResNet of Alpa's benchmarks (OSDI'22): a ResNet (He et al. 2016) with wider 3×3 convolutions and BatchNorm.

Images are [B, height, width, channels].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from alpa_like.models.batches import Batch, labelled
from alpa_like.models.tasks import BatchNormState, Optimizer, Task, cross_entropy

EXPANSION = 4  # a block's output channels over its filters (He et al. 2016, table 1)
BN_EPSILON = 1e-5


@dataclass(frozen=True)
class WideResNetConfig:
    """Sizes and options of a Wide-ResNet: stage i is blocks[i] bottlenecks of channels · 2**i filters.

    The 3×3 convolution of a bottleneck has `width_factor` times its filters. The stem quarters the image, every stage
    but the first halves it. `remat` recomputes each bottleneck in the backward pass. Parameters are float32.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    channels: int = 64
    width_factor: int = 1
    num_classes: int = 1000
    image_size: int = 224
    in_channels: int = 3
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def num_params(self) -> int:
        """Number of trainable parameters, in closed form; the running statistics are not counted."""
        before = self.channels
        total = 49 * self.in_channels * before + 2 * before
        for stage, count in enumerate(self.blocks):
            filters = self.channels * 2**stage
            wide, after = filters * self.width_factor, EXPANSION * filters
            inner = filters * 9 * wide + wide * after + 2 * (filters + wide + after)
            shortcut = before * after + 2 * after if stage or before != after else 0
            total += count * inner + (before + (count - 1) * after) * filters + shortcut
            before = after
        return total + (before + 1) * self.num_classes


def _conv(config: WideResNetConfig, filters: int, size: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(filters, (size, size), (stride, stride), use_bias=False, dtype=config.dtype, name=name)


def _norm(config: WideResNetConfig, train: bool, name: str, *, starts_at_zero: bool = False) -> nn.BatchNorm:
    scale_init = nn.initializers.zeros if starts_at_zero else nn.initializers.ones
    return nn.BatchNorm(
        not train, momentum=0.9, epsilon=BN_EPSILON, dtype=config.dtype, scale_init=scale_init, name=name
    )


class Bottleneck(nn.Module):
    """Convolutions 1×1, 3×3, 1×1, plus the input; [B, N, N, channels in] → [B, N/stride, N/stride, 4 · filters].

    Where the shape changes, the shortcut is a 1×1 convolution.
    """

    config: WideResNetConfig
    filters: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The block's output for x, with batch statistics if `train`, with running ones if not."""
        cfg, after = self.config, EXPANSION * self.filters
        y = jax.nn.relu(_norm(cfg, train, "bn1")(_conv(cfg, self.filters, 1, 1, "conv1")(x)))
        y = _conv(cfg, self.filters * cfg.width_factor, 3, self.stride, "conv2")(y)
        y = jax.nn.relu(_norm(cfg, train, "bn2")(y))
        y = _norm(cfg, train, "bn3", starts_at_zero=True)(_conv(cfg, after, 1, 1, "conv3")(y))
        if x.shape != y.shape:
            x = _norm(cfg, train, "bn_shortcut")(_conv(cfg, after, 1, self.stride, "shortcut")(x))
        return jax.nn.relu(x + y)


class WideResNet(nn.Module):
    """Images [B, N, N, in_channels] → logits [B, num_classes] in `dtype`; collections `params` and `batch_stats`.

    With `train=True` apply it with `mutable=["batch_stats"]`.
    """

    config: WideResNetConfig

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits [B, num_classes] of images [B, N, N, in_channels]."""
        cfg = self.config
        x = jax.nn.relu(_norm(cfg, train, "bn_stem")(_conv(cfg, cfg.channels, 7, 2, "stem")(images)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        block: Callable[..., Any] = nn.remat(Bottleneck, static_argnums=(2,)) if cfg.remat else Bottleneck
        for stage, count in enumerate(cfg.blocks):
            for index in range(count):
                stride = 2 if stage and not index else 1
                x = block(cfg, cfg.channels * 2**stage, stride, name=f"stage{stage}_block{index}")(x, train)
        return nn.Dense(cfg.num_classes, dtype=cfg.dtype, name="head")(jnp.mean(x, axis=(1, 2)))


def wide_resnet_task(
    config: WideResNetConfig, batch_size: int, optimizer: Optimizer | None = None, name: str = "wide_resnet"
) -> Task:
    """Classify images: batch {inputs float32 [B, N, N, in_channels], labels int32 [B]}; Adam if no optimizer is given.

    The state is a `BatchNormState`: the statistics are those of the batch.
    """
    module = WideResNet(config)
    tx = optax.adam(1e-3) if optimizer is None else optimizer
    image = (config.image_size, config.image_size, config.in_channels)
    source = labelled((batch_size, *image), config.num_classes)
    apply_fn = module.apply  # one object, so that all states have one treedef

    def init() -> BatchNormState:
        variables = module.init(jax.random.PRNGKey(0), jnp.zeros((1, *image)))
        state = BatchNormState.create(apply_fn=apply_fn, tx=tx, **variables)
        return state.replace(step=jnp.zeros((), jnp.int32))  # `create` leaves a Python int

    return Task(name, jax.jit(init), _step(module), source.batch, source.abstract_batch)


def _step(module: WideResNet) -> Callable[[Any, Batch], tuple[Any, jax.Array]]:
    def step(state: Any, batch: Batch) -> tuple[Any, jax.Array]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, changed = module.apply(variables, batch["inputs"], train=True, mutable=["batch_stats"])
            return cross_entropy(logits, batch["labels"]), changed

        (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, **changed), value

    return step
