"""Shape and dtype of the variables and literals of jaxprs, whose types JAX declares as values of any kind."""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import Literal, Var

__all__ = ["dtype_of", "shape_of", "size_of", "type_of"]


def _aval(var: Var | Literal) -> Any:
    return var.aval


def shape_of(var: Var | Literal) -> tuple[int, ...]:
    """The shape; () for what has none."""
    return tuple(getattr(_aval(var), "shape", ()))


def size_of(var: Var) -> int:
    """The number of elements."""
    return int(getattr(_aval(var), "size", 1))


def dtype_of(var: Var | Literal) -> Any:
    """The dtype, that of typed random keys included."""
    return _aval(var).dtype


def type_of(var: Var) -> jax.ShapeDtypeStruct:
    """What a function is traced with in place of the variable."""
    weak = bool(getattr(_aval(var), "weak_type", False))
    return jax.ShapeDtypeStruct(shape_of(var), dtype_of(var), weak_type=weak)
