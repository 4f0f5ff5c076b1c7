"""The largest model and batch that fill a cluster's memory: what `--size auto` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import alpa_like as alpa

__all__ = ["Filled", "fill"]

SHARE = 0.85
"""Of the memory that a plan may predict: what compilers put on top was 5 to 30 % of it in our measurements."""

ROWS = 4
"""A model must leave room for so many rows per device, or its matrix products are too small to be fast."""

MOST_LAYERS = 256
"""Deeper models take minutes to compile without a loop over layers."""

Predict = Callable[[str, int], float]
"""Size and batch → predicted peak bytes per device; infinite where no plan fits."""


@dataclass(frozen=True, slots=True)
class Filled:
    """A size, a batch, and the predicted peak in bytes per device."""

    size: str
    batch_size: int
    peak_bytes: float


def fill(configs: Mapping[str, Any], cluster: alpa.Cluster, predict: Predict) -> Filled | None:
    """The model with the most parameters that fits with `ROWS` rows per device, with that batch times the largest of
    1, 1.5, 2, 3, 4, 6, … that fits; None where not even the smallest model does."""
    limit, devices = SHARE * cluster.device.memory_bytes, cluster.num_devices
    sizes = [n for n, c in configs.items() if getattr(c, "num_layers", 0) <= MOST_LAYERS]
    for size in sorted(sizes, key=lambda n: -configs[n].num_params()):
        if 16 * configs[size].num_params() > limit * devices:
            continue  # parameters, gradients and Adam's moments alone are too many
        batch, peak = ROWS * devices, predict(size, ROWS * devices)
        if peak > limit:
            continue
        while (more := predict(size, 2 * batch)) <= limit:
            batch, peak = 2 * batch, more
        if (more := predict(size, batch * 3 // 2)) <= limit:
            batch, peak = batch * 3 // 2, more
        return Filled(size, batch, peak)
    return None
