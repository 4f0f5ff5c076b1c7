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
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2**21  # Linux's mman.h; x86-64 and most Arm kernels
_HEAP_BYTES = 2**33


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
    """Make the C library keep what is freed, in huge pages, instead of giving it back to the kernel (Linux, glibc).

    Emulated devices free all temporaries after a step. Whether the next one gets the same pages, or new ones that the
    kernel has to clear first, and how these lie in the caches, otherwise depends on what ran before: some 10 to 20 % of
    a step, at random. Call it before JAX makes its devices.
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return
    libc = ctypes.CDLL(None)
    for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)):
        libc.mallopt(option, value)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes, libc.madvise.argtypes = (ctypes.c_void_p,), (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # The heap grows once by so much, which takes no memory before it is used, and is not given back.
    start = libc.malloc(_HEAP_BYTES)
    if not start or libc.madvise(-(-start // _HUGE_PAGE) * _HUGE_PAGE, _HEAP_BYTES - _HUGE_PAGE, _MADV_HUGEPAGE):
        print("no huge pages here: steps take longer, and vary more", file=sys.stderr)
    libc.free(start)
