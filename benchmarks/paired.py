"""Steps of many plans timed in turns in one process, so that what else the machine does hits all of them alike."""

from __future__ import annotations

import ctypes
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

__all__ = ["Clock", "Quartiles", "Runner", "keep_freed_memory", "quartiles", "time_in_turns"]

Clock = Literal["wall", "cpu"]
"""What a step takes: "wall" is the time until its results are there, "cpu" the work of all cores, divided by their
number. The latter hardly changes where other programs run too; waiting does not count."""

Seconds = npt.NDArray[np.float64]

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h


@dataclass
class Runner:
    """A compiled step, the state that it has come to, and its batch, all where the step wants them."""

    step: Callable[[Any, Any], tuple[Any, Any]]
    state: Any
    batch: Any

    def seconds(self) -> tuple[float, float]:
        """What one step takes, by the wall clock and by the cores' clocks."""
        work, start = time.process_time(), time.perf_counter()
        self.state, loss = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, loss))
        return time.perf_counter() - start, (time.process_time() - work) / (os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class Quartiles:
    """Median and quartiles of what paired runs say."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def quartiles(values: Seconds) -> Quartiles:
    low, median, high = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return Quartiles(low, median, high)


def time_in_turns(runners: Sequence[Runner], rounds: int, label: str, warm_up: int = 2) -> dict[Clock, Seconds]:
    """Seconds [rounds, runners] by each clock; a round has one step of every plan, in an order drawn anew."""
    order, found = list(range(len(runners))), np.zeros((2, rounds, len(runners)))
    shuffle = random.Random(0).shuffle
    for number in tqdm(range(-warm_up, rounds), desc=f"{label}: rounds", leave=False):
        shuffle(order)
        for i in order:
            seconds = runners[i].seconds()
            if number >= 0:
                found[:, number, i] = seconds
    return {"wall": found[0], "cpu": found[1]}


def keep_freed_memory() -> None:
    """Ask the C library to keep what is freed instead of giving it back to the kernel (glibc only).

    Emulated devices free all temporaries after a step. Whether the next one gets the same pages, or new ones that the
    kernel has to clear first, otherwise depends on what ran before: some 10 % of a step, at random.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_ARENA_MAX, 1)
