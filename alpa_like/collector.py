"""Python's garbage collector while much is made that stays: plans of large models."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator

__all__ = ["patient"]

_SELDOM = 1_000
"""Collections of the middle generation before one of everything."""


@contextlib.contextmanager
def patient() -> Generator[None]:
    """Have the collector look through all objects of the process seldom: hardly any of the new ones are garbage.

    Young objects are looked at as before, so cycles that are soon dropped are soon freed. Where that is so already,
    be it by another thread, nothing is changed and nothing changed back.
    """
    before = gc.get_threshold()
    if before[2] >= _SELDOM:
        yield
        return
    gc.set_threshold(before[0], before[1], _SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)
