"""Random batches for the tasks: shapes known without drawing, and the same numbers for the same seed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

Batch = dict[str, Any]  # leaves: np.ndarray, jax.Array or jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Source:
    """Where a task's batches come from; `draw` returns arrays of the shapes and dtypes in `abstract`, in that order."""

    abstract: tuple[tuple[str, jax.ShapeDtypeStruct], ...]
    draw: Callable[[np.random.Generator], tuple[np.ndarray, ...]]

    def batch(self, seed: int) -> Batch:
        """Numpy arrays by name."""
        arrays = self.draw(np.random.default_rng(seed))
        return {name: array for (name, _), array in zip(self.abstract, arrays, strict=True)}

    def abstract_batch(self) -> Batch:
        """Shapes and dtypes by name."""
        return dict(self.abstract)


def unlabelled(shape: tuple[int, ...]) -> Source:
    """{inputs float32 `shape`}: normal inputs."""
    inputs = jax.ShapeDtypeStruct(shape, np.float32)
    return Source((("inputs", inputs),), lambda rng: (rng.standard_normal(shape, np.float32),))


def labelled(shape: tuple[int, ...], classes: int, label_dims: int = 1) -> Source:
    """{inputs float32 `shape`, labels int32 shape[:label_dims]}: normal inputs, uniform labels below `classes`."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return rng.standard_normal(shape, np.float32), rng.integers(0, classes, shape[:label_dims], np.int32)

    inputs, labels = jax.ShapeDtypeStruct(shape, np.float32), jax.ShapeDtypeStruct(shape[:label_dims], np.int32)
    return Source((("inputs", inputs), ("labels", labels)), draw)


def next_tokens(batch_size: int, seq_len: int, vocab_size: int) -> Source:
    """{tokens, targets} int32 [B, S]: uniform tokens, and as targets the tokens that follow them."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        text = rng.integers(0, vocab_size, (batch_size, seq_len + 1), np.int32)
        return np.ascontiguousarray(text[:, :-1]), np.ascontiguousarray(text[:, 1:])

    return Source(_tokens_and_targets(batch_size, seq_len), draw)


def masked_tokens(batch_size: int, seq_len: int, vocab_size: int, mask_id: int, rate: float = 0.15) -> Source:
    """{tokens, targets} int32 [B, S]: uniform targets, and as tokens the same, a part `rate` of them `mask_id`."""

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        targets = rng.integers(0, vocab_size, (batch_size, seq_len), np.int32)
        return np.where(rng.random(targets.shape) < rate, np.int32(mask_id), targets), targets

    return Source(_tokens_and_targets(batch_size, seq_len), draw)


def _tokens_and_targets(batch_size: int, seq_len: int) -> tuple[tuple[str, jax.ShapeDtypeStruct], ...]:
    ids = jax.ShapeDtypeStruct((batch_size, seq_len), np.int32)
    return (("tokens", ids), ("targets", ids))
