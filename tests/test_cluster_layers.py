"""Clustering of operators into layers, against trying every division and against programs with known answers."""

import itertools
import time
from collections.abc import Sequence

import numpy as np
import pytest

from alpa_like.errors import MethodError, PlanError
from alpa_like.passes.cluster_layers import auto_num_layers, cluster

Division = tuple[int, ...]


def score(flops: Sequence[float], cut_bytes: Sequence[float], ends: Division) -> tuple[float, float, float]:
    """Bytes, squares and the largest layer; inf where a layer has no flops."""
    sizes = [sum(flops[a:b]) for a, b in zip((0, *ends), ends, strict=False)]
    cut = sum(cut_bytes[e - 1] for e in ends[:-1]) if min(sizes) > 0 else np.inf
    return cut, sum(s * s for s in sizes), max(sizes)


def best(flops: Sequence[float], cut_bytes: Sequence[float], layers: int, balance: float) -> tuple[float, float, float]:
    """The least (bytes, squares) of all divisions, under the limit or the least limit that can be kept."""
    inner = itertools.combinations(range(1, len(flops)), layers - 1)
    scores = [s for e in inner if np.isfinite((s := score(flops, cut_bytes, (*e, len(flops))))[0])]
    limit = max((1 + balance) * sum(flops) / layers, min(s[2] for s in scores))
    return min(s for s in scores if s[2] <= limit)


def random_program(seed: int) -> tuple[list[float], list[float], int]:
    """Up to 11 operators, a third without flops, some of them huge; few different bytes, so that cuts tie."""
    rng = np.random.default_rng(seed)
    flops = rng.integers(1, 10, rng.integers(1, 12)) * (rng.random() < 0.5 or rng.random() > 0.3)
    flops = np.where(rng.random(len(flops)) < 0.3, 0, flops) * np.where(rng.random(len(flops)) < 0.1, 20, 1)
    cut_bytes = rng.integers(0, rng.choice([2, 4, 100]), len(flops) - 1)
    heavy = max(1, np.count_nonzero(flops))
    return flops.astype(float).tolist(), cut_bytes.astype(float).tolist(), int(rng.integers(1, min(heavy, 6) + 1))


def transformer(blocks: int, *, small: float = 0.0, head: float = 5.0) -> tuple[list[float], list[float]]:
    """Embedding, blocks of attention (4 operators) and MLP (2), head; each followed by two element-wise operators."""
    heavy = [(0.5, 1.0)] + [(3.0, 4.0), (1.0, 6.0), (1.0, 2.0), (1.0, 1.0), (4.0, 5.0), (4.0, 1.0)] * blocks
    flops = [f for heavy_flops, _ in [*heavy, (head, 0.0)] for f in (heavy_flops, small, small)]
    return flops, [b for _, out in heavy for b in (out + 1, out + 0.5, out)] + [9.0, 9.0]


def resnet(*stages: int) -> tuple[list[float], list[float]]:
    """Equal blocks, but for the first of each stage: it halves the image between two operators of its own."""
    flops = [f for count in stages for f in (5.0, 3.0, *[6.0] * (count - 1))]
    return flops, [1.0] * (len(flops) - 1)


def test_clustering_equals_exhaustive_search() -> None:
    relaxed = 0
    for seed in range(250):
        flops, cut_bytes, layers = random_program(seed)
        balance = (0.0, 0.2, 0.5, 2.0)[seed % 4]
        if sum(flops) == 0:
            continue
        ends = cluster(flops, cut_bytes, layers, balance=balance)
        assert (len(ends), ends[-1]) == (layers, len(flops)), seed
        found = score(flops, cut_bytes, ends)
        assert found == best(flops, cut_bytes, layers, balance), seed
        relaxed += found[2] > (1 + balance) * sum(flops) / layers
    assert relaxed > 20


def test_fractional_flops_and_bytes_come_within_rounding_of_exhaustive_search() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        flops, cut_bytes = rng.random(9).tolist(), rng.random(8).tolist()
        found = score(flops, cut_bytes, cluster(flops, cut_bytes, 4, balance=0.3))
        assert found == pytest.approx(best(flops, cut_bytes, 4, 0.3))


def test_equal_cuts_are_divided_evenly() -> None:
    assert cluster([1.0] * 12, [5.0] * 11, 4) == (3, 6, 9, 12)


def test_a_transformer_is_cut_at_its_residual_stream() -> None:
    flops, cut_bytes = transformer(12, small=0.01)
    ends = cluster(flops, cut_bytes, 12)
    assert [cut_bytes[e - 1] for e in ends[:-1]] == [1.0] * 11


def test_a_huge_operator_is_alone_and_the_others_stay_balanced() -> None:
    assert cluster([1, 1, 1, 100, 1, 1, 1], [9, 9, 9, 9, 9, 9], 3) == (3, 4, 7)


@pytest.mark.parametrize("share", [1.0, 0.02])
@pytest.mark.parametrize("layers", [3, 128])
def test_twenty_thousand_operators_take_less_than_two_seconds(share: float, layers: int) -> None:
    rng = np.random.default_rng(0)
    flops = np.where(rng.random(20_000) < share, rng.random(20_000), 0.0).tolist()
    cut_bytes = rng.integers(0, 5, 19_999).tolist()
    start = time.process_time()
    ends = cluster(flops, cut_bytes, layers)
    assert time.process_time() - start < 2
    assert score(flops, cut_bytes, ends)[2] <= 1.5 * sum(flops) / layers


@pytest.mark.parametrize(
    ("program", "layers"),
    [
        (transformer(8), 8),
        (transformer(32, small=1e-4), 32),
        (transformer(64), 64),
        (transformer(24, head=30.0), 25),
        (transformer(96, small=1e-4), 48),
        (([1.0] * 10, [3.0] * 9), 10),
        (resnet(3, 4, 6, 3), 20),
        (([1.0, 2.0, 4.0, 0.0], [3.0, 1.0, 5.0]), 2),
        (([1.0], []), 1),
        (([0.0, 0.0], [1.0]), 1),
    ],
)
def test_natural_layers_are_the_repeated_blocks(program: tuple[list[float], list[float]], layers: int) -> None:
    assert auto_num_layers(*program) == layers


def test_natural_layers_stay_under_the_most_allowed() -> None:
    assert auto_num_layers([1.0] * 100, [1.0] * 99, most=30) == 25


@pytest.mark.parametrize(
    ("flops", "cut_bytes", "layers", "balance", "error", "words"),
    [
        ([], [], 1, 0.5, PlanError, "at least one operator"),
        ([1.0, 2.0], [1.0, 1.0], 1, 0.5, PlanError, "2 operators have 1 cuts"),
        ([1.0, -2.0], [1.0], 1, 0.5, PlanError, "flops must be finite and at least 0, found -2.0 at operator 1"),
        ([1.0, 2.0], [np.nan], 1, 0.5, PlanError, "cut_bytes must be finite"),
        ([1.0, 2.0, 0.0], [1.0, 1.0], 3, 0.5, MethodError, "more than the 2 operators that have flops"),
        ([1.0], [], 0, 0.5, MethodError, "at least 1 layer"),
        ([1.0], [], 1, -0.5, MethodError, "balance"),
    ],
)
def test_bad_input_is_refused(
    flops: list[float], cut_bytes: list[float], layers: int, balance: float, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        cluster(flops, cut_bytes, layers, balance=balance)
