"""A stack of Dense layers: the smallest model with something to plan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax

Activation = Literal["relu", "gelu", "tanh"]

_ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "tanh": jax.numpy.tanh,
}


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of an MLP: `widths` is (input, hidden, …, classes), so (32, 64, 8) has two Dense layers."""

    widths: tuple[int, ...] = (32, 64, 64, 8)
    activation: Activation = "relu"
    use_bias: bool = True

    def __post_init__(self) -> None:
        if len(self.widths) < 2:
            raise ValueError(f"MLPConfig: widths needs an input and an output width, found {self.widths}")
        if self.activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ValueError(f"MLPConfig: activation must be one of {known}, found {self.activation!r}")

    def num_params(self) -> int:
        """Number of parameters, in closed form."""
        pairs = zip(self.widths[:-1], self.widths[1:], strict=True)
        return sum((fan_in + int(self.use_bias)) * fan_out for fan_in, fan_out in pairs)


class MLP(nn.Module):
    """[B, widths[0]] → logits [B, widths[-1]]; kernels dense0, dense1, … of [widths[i], widths[i + 1]].

    The activation stands between layers, not after the last.
    """

    config: MLPConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [B, widths[-1]] of inputs [B, widths[0]]."""
        act = _ACTIVATIONS[self.config.activation]
        for index, width in enumerate(self.config.widths[1:]):
            x = act(x) if index else x
            x = nn.Dense(width, use_bias=self.config.use_bias, name=f"dense{index}")(x)
        return x
