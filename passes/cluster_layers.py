"""Operators in program order → the layers that pipeline stages are made of (Alpa, OSDI'22, section 5.2).

    minimize    Σ bytes of the cuts between the layers,  and among equals  Σ (flops of a layer)²
    subject to  flops of every layer  ≤  (1 + balance) · total / layers,   every layer has an operator with flops

Alpa minimizes the largest traffic into one layer; the sum is what a step sends if every layer became a stage, and
unlike the maximum it still cares for the other cuts once a single one is expensive. Equal sums are the rule, not the
exception: all cuts of a residual stream carry the same bytes, and then the squares (that is, the variance) decide.

Exact, in O(layers · n log n) for n operators with flops:

* Between two neighbouring operators with flops all cuts divide the flops alike, so only the cheapest can be needed.
* A layer from point i to point j costs (bytes so far, squares so far + (P_j − P_i)²), compared in this order. The first
  part depends on i alone and the second is convex in P_j − P_i, as the limit is, so the best i never falls as j grows
  (a Monge matrix: Yao 1980). Halving the rows finds all best i of one layer with log n sweeps of numpy.

Bytes and flops are float64: exact for whole numbers below 2⁵³ (squares included), else up to rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from alpa_like.errors import MethodError, PlanError

__all__ = ["auto_num_layers", "cluster"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_HEAVY_SHARE = 0.99
"""`auto_num_layers` looks at the largest operators that have this share of all flops; the others are small change."""

_CHEAP = 1.1
"""A cut is natural if it carries at most this times what the cheaper of its neighbours carries."""

_ALIKE = 0.01
"""Layers whose flops differ by less than this share count as repetitions."""


def cluster(
    flops: Sequence[float], cut_bytes: Sequence[float], num_layers: int, *, balance: float = 0.5
) -> tuple[int, ...]:
    """The end (exclusive) of each of `num_layers` layers, rising; the last is `len(flops)`.

    `flops` has one number per operator in program order; `cut_bytes[k]` are the bytes that cross if the program is cut
    after operator k, so there is one fewer. Where no division keeps the limit (one huge operator, say), the least limit
    that can be kept takes its place. Raises `PlanError` for numbers that are no such program, `MethodError` for more
    layers than operators with flops.
    """
    work, traffic = _program(flops, cut_bytes)
    heavy = np.flatnonzero(work > 0)
    _check_options(num_layers, balance, len(heavy))
    if num_layers == 1:
        return (len(work),)
    cuts = _cheapest_cuts(heavy, traffic)
    prefix = np.concatenate([[0.0], np.cumsum(work[heavy])])
    earliest = _earliest(prefix, (1 + balance) * prefix[-1] / num_layers)
    if not _enough(earliest, num_layers):
        earliest = _earliest(prefix, _least_limit(prefix, num_layers))
    points = _divide(prefix, np.concatenate([[0.0], traffic[cuts], [0.0]]), earliest, num_layers)
    return (*(int(cuts[p - 1]) + 1 for p in points), len(work))


def auto_num_layers(flops: Sequence[float], cut_bytes: Sequence[float], *, most: int = 64) -> int:
    """How many layers the program falls into by itself, 1 to `most`.

    Arguments and errors as in `cluster`. Natural cuts are those between heavy operators that carry no more than their
    neighbours do (within 10 %): the residual stream of a transformer, every activation of a plain chain. What lies
    between them repeats with a period (attention, MLP, attention, …), and each repetition is one layer, so L equal
    blocks give L layers; what does not repeat (a head) is one more if it has at least half the flops of a repetition.
    Above `most` several of them form a layer, evenly: 96 blocks give 48 layers of 2.
    """
    work, traffic = _program(flops, cut_bytes)
    if most < 1:
        raise MethodError(f"most must be at least 1 layer, found {most}")
    count = _repetitions(_natural_sizes(work, traffic))
    return math.ceil(count / math.ceil(count / most))


# ------------------------------------------------------------------------------------------------ the program


def _program(flops: Sequence[float], cut_bytes: Sequence[float]) -> tuple[Floats, Floats]:
    work, traffic = np.asarray(flops, np.float64), np.asarray(cut_bytes, np.float64)
    if work.ndim != 1 or not len(work):
        raise PlanError("a program to be cut into layers must have at least one operator, found none")
    if traffic.shape != (len(work) - 1,):
        raise PlanError(
            f"{len(work)} operators have {len(work) - 1} cuts between them, found cut_bytes of shape {traffic.shape}"
        )
    for name, values in (("flops", work), ("cut_bytes", traffic)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if len(bad):
            raise PlanError(f"{name} must be finite and at least 0, found {values[bad[0]]} at operator {bad[0]}")
    return work, traffic


def _check_options(num_layers: int, balance: float, heavy: int) -> None:
    if num_layers < 1:
        raise MethodError(f"a program has at least 1 layer, found num_layers={num_layers}")
    if not balance >= 0:
        raise MethodError(f"balance is the share by which a layer may exceed the mean, at least 0, found {balance}")
    if num_layers > max(heavy, 1):
        raise MethodError(
            f"num_layers={num_layers} is more than the {heavy} operators that have flops; ask for fewer layers"
        )


def _cheapest_cuts(heavy: Ints, traffic: Floats) -> Ints:
    """For each two neighbours in `heavy`, the operator after which cutting carries least; the first where equal."""
    if len(heavy) < 2:
        return np.zeros(0, np.int64)
    gap = np.repeat(np.arange(len(heavy) - 1), np.diff(heavy))
    between = traffic[heavy[0] : heavy[-1]]
    least = np.minimum.reduceat(between, heavy[:-1] - heavy[0])
    hits = np.flatnonzero(between == least[gap])
    return hits[np.unique(gap[hits], return_index=True)[1]] + heavy[0]


# ------------------------------------------------------------------------------------------------ the division


def _earliest(prefix: Floats, limit: float) -> Ints:
    """For each point the first point from which a layer up to here keeps the limit; itself where there is none."""
    first = np.searchsorted(prefix, prefix - limit)
    while (late := (first > 0) & (prefix - prefix[first - 1] <= limit)).any():
        first = first - late
    while (early := prefix - prefix[first] > limit).any():
        first = first + early
    return first


def _enough(earliest: Ints, num_layers: int) -> bool:
    """Whether that many layers reach from the end to the start, each as long as it can be."""
    point = len(earliest) - 1
    for _ in range(num_layers):
        point = int(earliest[point])
    return point == 0


def _least_limit(prefix: Floats, num_layers: int) -> float:
    """The smallest float64 that enough layers can keep: halved until no number is left between."""
    low, high = 0.0, float(prefix[-1])
    while low < (middle := low + (high - low) / 2) < high:
        low, high = (low, middle) if _enough(_earliest(prefix, middle), num_layers) else (middle, high)
    return high


def _divide(prefix: Floats, traffic: Floats, earliest: Ints, num_layers: int) -> list[int]:
    """The inner points of the best division of the points 0 … n into `num_layers` layers."""
    ranges = _ranges(earliest, num_layers)
    bytes_, squares = np.zeros(len(prefix)), np.zeros(len(prefix))
    choices: list[tuple[int, Ints]] = []
    for before, here in itertools.pairwise(ranges):
        rows = np.arange(here[0], here[1] + 1)
        best = _best_starts(prefix, bytes_, squares, earliest, before, rows)
        bytes_[rows], squares[rows] = (
            bytes_[best] + traffic[rows],
            squares[best] + (prefix[rows] - prefix[best]) ** 2,
        )
        choices.append((here[0], best))
    points = [len(prefix) - 1]
    for first, best in reversed(choices[1:]):
        points.append(int(best[points[-1] - first]))
    return points[:0:-1]


def _ranges(earliest: Ints, num_layers: int) -> list[tuple[int, int]]:
    """For k = 0 … num_layers the points where layer k may end; each of them is on some allowed division.

    A layer can be shortened down to one operator, so every point between the first and the last of them is allowed.
    """
    last = len(earliest) - 1
    low, high = [last], [0]
    for k in reversed(range(num_layers)):
        low.append(max(int(earliest[low[-1]]), k))
    for k in range(1, num_layers + 1):
        reach = int(np.searchsorted(earliest, high[-1], side="right")) - 1
        high.append(min(reach, last - (num_layers - k)))
    return list(zip(reversed(low), high, strict=True))


def _best_starts(
    prefix: Floats, bytes_: Floats, squares: Floats, earliest: Ints, before: tuple[int, int], rows: Ints
) -> Ints:
    """For each row (the end of a layer) its best start. Starts rise with rows, so known rows enclose those between."""
    count = len(rows)
    best = np.empty(count + 2, np.int64)
    best[0], best[-1] = before
    stride = 1 << (count.bit_length() - 1)
    while stride:
        at = np.arange(stride, count + 1, 2 * stride)
        ends = rows[at - 1]
        low = np.maximum(best[at - stride], earliest[ends])
        high = np.minimum(best[np.minimum(at + stride, count + 1)], ends - 1)
        best[at] = _least(prefix, bytes_, squares, ends, low, high)
        stride //= 2
    return best[1:-1]


def _least(prefix: Floats, bytes_: Floats, squares: Floats, ends: Ints, low: Ints, high: Ints) -> Ints:
    """For each end the first start in low … high of the least (bytes, squares)."""
    lengths = high - low + 1
    offsets = np.cumsum(lengths) - lengths
    starts = np.arange(lengths.sum()) - np.repeat(offsets - low, lengths)
    # numpy compares complex numbers by the real part, then by the imaginary part
    cost = np.empty(len(starts), np.complex128)
    cost.real = bytes_[starts]
    cost.imag = squares[starts] + (np.repeat(prefix[ends], lengths) - prefix[starts]) ** 2
    hits = np.flatnonzero(cost == np.repeat(np.minimum.reduceat(cost, offsets), lengths))
    return starts[hits[np.searchsorted(hits, offsets)]]


# ------------------------------------------------------------------------------------------------ how many


def _natural_sizes(work: Floats, traffic: Floats) -> Floats:
    """The flops between the natural cuts."""
    largest = np.sort(work)[::-1]
    count = int(np.searchsorted(np.cumsum(largest), _HEAVY_SHARE * work.sum()))
    heavy = np.flatnonzero(work >= max(largest[min(count, len(work) - 1)], np.finfo(np.float64).tiny))
    cuts = _cheapest_cuts(heavy, traffic)
    around = np.concatenate([[np.inf], traffic[cuts], [np.inf]])
    natural = cuts[traffic[cuts] <= _CHEAP * np.minimum(around[:-2], around[2:])]
    return np.add.reduceat(work, np.concatenate([[0], natural + 1]))


def _repetitions(sizes: Floats) -> int:
    """How often the sizes repeat, and those outside that are as large; all of them if nothing repeats."""
    neighbours = int(_alike(sizes, 1).sum())
    for period in range(1, len(sizes) // 2 + 1):
        alike = _alike(sizes, period)
        if alike.mean() > 0.5:
            inside = np.concatenate([alike, [False] * period]) | np.concatenate([[False] * period, alike])
            count = math.ceil(int(inside.sum()) / period)
            if period > 1 and neighbours >= count:
                break  # equal blocks stand side by side, irregularly: each of them is a layer
            return count + int(np.sum(sizes[~inside] >= sizes[inside].sum() / count / 2))
    return len(sizes)


def _alike(sizes: Floats, period: int) -> npt.NDArray[np.bool_]:
    """Which sizes are nearly that of the one a period later."""
    one, other = sizes[:-period], sizes[period:]
    return np.abs(one - other) <= _ALIKE * np.maximum(one, other)
