"""What is known of a value of a step that runs on one micro-batch: which dim is the batch, or what was taken over it.

Same      equal for all micro-batches, and that of the whole batch; `zero` if it is filled with zeros
Split     holds this micro-batch's part of a dim
Reduced   this micro-batch's share of a sum (or maximum, …) over the batch: the shares are combined
Own       a number of this micro-batch alone, without a batch dim: its own statistics
After     computed from combined shares, so known only when all micro-batches have run
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from typing import Literal as Choice

from jax.extend.core import Literal

from alpa_like.passes.avals import shape_of

__all__ = [
    "After", "Fact", "Found", "Full", "Mixed", "Own", "Reduced", "Same", "Split", "Status",
    "batch_dim", "is_ordered", "is_zero",
]  # fmt: skip

Fact = Choice["place", "never"] | frozenset[int] | None
"""What is known of a `Split`: each element is its place in the batch; all are zero or False; or which columns of the
last dim are places."""


@dataclass(frozen=True, slots=True)
class Same:
    zero: bool = False


@dataclass(frozen=True, slots=True)
class Split:
    """The whole dim is `outer` blocks one after the other, and a part takes the same share of each block.

    `outer` is 1 where the parts, one after the other, make the whole, and 3 for a (3, batch) array that was reshaped
    to one dim. It is None where all elements along the dim are equal, which fits every order.
    """

    dim: int
    outer: int | None = 1
    fact: Fact = None


@dataclass(frozen=True, slots=True)
class Reduced:
    op: str


@dataclass(frozen=True, slots=True)
class After:
    pass


@dataclass(frozen=True, slots=True)
class Own:
    pass


@dataclass(frozen=True, slots=True)
class Mixed:
    """No status: the examples of the batch are mixed."""

    reason: str


Status = Same | Split | Reduced | Own | After
Full = Mapping[Any, tuple[int, ...]]
Found = Sequence[Status] | Mixed


def is_ordered(status: Status) -> bool:
    """Whether the parts of all micro-batches, one after the other, are the whole."""
    return not isinstance(status, Split) or status.outer in (1, None)


def is_zero(atom: Any, status: Status) -> bool:
    """Whether a variable or literal is known to be filled with zeros."""
    if isinstance(atom, Literal):
        return shape_of(atom) == () and bool(atom.val == 0)
    return isinstance(status, Same) and status.zero


def batch_dim(status: Status) -> int:
    """The dim that a micro-batch has its part of, -1 if there is none."""
    return status.dim if isinstance(status, Split) else -1
