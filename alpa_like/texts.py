"""Quantities and names as people read them."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["bytes_text", "common_path", "counted", "seconds_text"]


def bytes_text(n: float) -> str:
    """A number of bytes for people."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} B"


def counted(n: int, name: str) -> str:
    """`1 stage`, `8 micro-batches`, `2 entries`."""
    if n != 1 and name.endswith("y"):
        return f"{n} {name.removesuffix('y')}ies"
    return f"{n} {name}{'' if n == 1 else 'es' if name.endswith('ch') else 's'}"


def seconds_text(s: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if s >= size:
            return f"{s / size:.3g} {unit}"
    return f"{s * 1e6:.3g} us"


def common_path(paths: Sequence[str]) -> str:
    """One text for paths that differ in numbers only, with * for each number that is not the same in all."""
    columns = zip(*(re.split(r"(\d+)", path) for path in paths), strict=True)
    return "".join(parts[0] if len(set(parts)) == 1 else "*" for parts in columns)
