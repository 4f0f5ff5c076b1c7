"""`ChunkedArray`: an array of stacked layers whose parts live on the meshes of their pipeline stages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["ChunkedArray", "Parts", "bounds"]


@dataclass(frozen=True)
class Parts:
    """Where the parts of an array live: how many rows each has, and its sharding."""

    lengths: tuple[int, ...]
    shardings: tuple[Any, ...]


class ChunkedArray:
    """Parts along dim 0, each a `jax.Array` on the devices of its stage; a leaf of the state, as an array is.

    `np.asarray(x)`, `jnp.asarray(x)` and `jax.device_get(x)` gather it; a parallelized step takes and returns it as it
    is. For other functions gather first: `jax.tree.map(np.asarray, params)`.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        return (sum(p.shape[0] for p in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> Any:
        """The dtype of the elements."""
        return self.parts[0].dtype

    @property
    def ndim(self) -> int:
        """The number of dims."""
        return self.parts[0].ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return sum(p.size for p in self.parts)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many layers each part has."""
        return tuple(p.shape[0] for p in self.parts)

    @property
    def places(self) -> Parts:
        """Where the parts live."""
        return Parts(self.lengths, tuple(p.sharding for p in self.parts))

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return sum(p.nbytes for p in self.parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> jax.Array:
        """Rows of the whole, gathered."""
        return jnp.asarray(np.asarray(self)[index])

    def is_deleted(self) -> bool:
        """Whether a step that it was donated to has taken it."""
        return any(p.is_deleted() for p in self.parts)

    @property
    def lost(self) -> bool:
        """Whether a part was on workers that have ended."""
        return any(getattr(p, "lost", False) for p in self.parts)

    def block_until_ready(self) -> ChunkedArray:
        """This array, once all parts are computed."""
        for part in self.parts:
            part.block_until_ready()
        return self

    def copy(self) -> ChunkedArray:
        """A copy with buffers of its own."""
        return ChunkedArray([p.copy() for p in self.parts])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        del copy
        return np.concatenate([np.asarray(p) for p in self.parts]).astype(dtype or self.dtype)

    def __jax_array__(self) -> jax.Array:
        return jnp.asarray(np.asarray(self))

    def __repr__(self) -> str:
        return f"ChunkedArray({self.dtype}{list(self.shape)}, {len(self.parts)} parts)"


def bounds(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """The rows of each part."""
    return list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))
