"""Whether a value that was read from a file has the types that its dataclasses are annotated with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

__all__ = ["mistyped"]

_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def mistyped(value: Any, kind: Any, where: str = "") -> Iterator[str]:
    """What is wrong, such as `predicted.step_time_s must be a number, found 'x'`; nothing where all is well.

    kind: a dataclass, str, bool, int, float, or a tuple, dict or optional one of these; others are not looked into.
    """
    if get_origin(kind) is UnionType:
        yield from () if value is None else mistyped(value, get_args(kind)[0], where)
    elif get_origin(kind) in (tuple, dict):
        yield from _in_collection(value, get_origin(kind), get_args(kind), where)
    elif is_dataclass(kind):
        for name, part in _fields(kind).items():
            yield from mistyped(getattr(value, name), part, f"{where}.{name}".removeprefix("."))
    elif kind in _NAMES and (type(value) not in ((int, float) if kind is float else (kind,)) or value != value):
        yield f"{where} must be {_NAMES[kind]}, found {value!r}"


def _in_collection(value: Any, kind: Any, inside: tuple[Any, ...], where: str) -> Iterator[str]:
    if not isinstance(value, kind):
        yield f"{where} must be a {'list' if kind is tuple else 'mapping'}, found {value!r}"
    elif kind is dict:
        for name, part in value.items():
            yield from mistyped(part, inside[1], f"{where}[{name!r}]")
    else:
        kinds = inside[:1] * len(value) if inside[-1] is Ellipsis else inside
        if len(kinds) != len(value):
            yield f"{where} must have {len(kinds)} entries, found {value!r}"
        for number, (part, each) in enumerate(zip(value, kinds, strict=False)):
            yield from mistyped(part, each, f"{where}[{number}]")


@cache
def _fields(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
