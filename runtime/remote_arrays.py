"""`RemoteArray`: the driver's handle of an array that lives on workers, read only when its values are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from alpa_like.errors import ProgramError
from alpa_like.reshard import Layout
from alpa_like.runtime.staged import BufferType

__all__ = ["Holder", "RemoteArray", "RemotePlace"]

_SHOWN_ELEMENTS = 1000
"""Arrays up to this size show their values, as NumPy does before it leaves some out."""


_OF_BOTH = frozenset(n for n in dir(np.ndarray) if not n.startswith("_") and hasattr(jax.Array, n))
_OF_VALUES = (_OF_BOTH | {"at"}) - {"device", "to_device"}
"""What arrays of NumPy and JAX have, such as `x.T` and `x.mean()`: a `jax.Array` of the values is asked for it."""


class Holder(Protocol):
    """Whoever can reach the workers: reads and frees what they hold."""

    alive: bool

    def fetch(self, array: RemoteArray) -> Any: ...

    def wait(self, array: RemoteArray) -> None: ...

    def duplicate(self, array: RemoteArray) -> RemoteArray: ...

    def release(self, stored: Sequence[tuple[tuple[int, int], int]]) -> None: ...


@dataclass(frozen=True, slots=True)
class RemotePlace:
    """Where an array lives: how it lies on the devices, and in which session."""

    layout: Layout
    session: int

    # `jnp.zeros_like(x)` and others ask `x.sharding` for it; what they make of a RemoteArray is on this process.
    _is_concrete: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"devices {self.layout.ids.start} to {self.layout.ids.stop - 1}"


class RemoteArray(NDArrayOperatorsMixin):
    """A leaf of the state, or a result such as the loss. It behaves as an array: shape and dtype are known here.

    Its values are fetched whenever they are read: by `float(x)`, `np.asarray(x)`, `jnp.asarray(x)`,
    `jax.device_get(x)`, printing, methods such as `x.mean()`, and by indexing and arithmetic, which give NumPy arrays.
    `x.block_until_ready()` waits for it without a copy. `x += 1` makes a new array, as with JAX's.

    JAX's functions and `jax.jit` take JAX's own arrays only: give them `jnp.asarray(x)`.

    `stored` are the arrays that the workers hold, as (device range, number); several are joined along `dim`.
    """

    __slots__ = ("__weakref__", "_gone", "_holder", "_place", "_stored", "_type", "dim")

    def __init__(
        self,
        holder: Holder,
        kind: BufferType | jax.ShapeDtypeStruct,
        place: RemotePlace | None,
        stored: tuple[tuple[tuple[int, int], int], ...],
        dim: int = 0,
    ) -> None:
        self._holder, self._place, self._stored, self.dim = holder, place, stored, dim
        self._type = kind.struct if isinstance(kind, BufferType) else kind
        self._gone = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole."""
        return self._type.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the elements."""
        return self._type.dtype

    @property
    def weak_type(self) -> bool:
        """Whether it promotes as Python's numbers do."""
        return bool(self._type.weak_type)

    @property
    def ndim(self) -> int:
        """The number of dims."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, each counted once."""
        return self.size * self.dtype.itemsize

    @property
    def sharding(self) -> RemotePlace | None:
        """Where it lives; None for one whose parts were made by different micro-batches."""
        return self._place

    @property
    def stored(self) -> tuple[tuple[tuple[int, int], int], ...]:
        """What the workers hold, as (device range, number)."""
        return self._stored

    @property
    def lost(self) -> bool:
        """Whether the workers that had it are gone."""
        return not self._holder.alive

    def is_deleted(self) -> bool:
        """Whether a step has taken it, or its workers are gone."""
        return self._gone or not self._holder.alive

    def delete(self) -> None:
        """Free it now rather than when the last reference is gone."""
        if not self._gone:
            self._gone = True
            if self._holder.alive:
                self._holder.release(self._stored)

    def donate(self) -> None:
        """Mark it as taken by a step; the workers have let go of it themselves."""
        self._gone = True

    def copy(self) -> RemoteArray:
        """A second array of the same values on the same devices."""
        self.check()
        return self._holder.duplicate(self)

    def block_until_ready(self) -> RemoteArray:
        """This array, once it is computed. Raises what went wrong in the step that made it."""
        self.check()
        self._holder.wait(self)
        return self

    def check(self) -> None:
        """Raise `ProgramError` if it is gone."""
        if self._gone:
            raise ProgramError("this array was donated to a step, or deleted, and is gone; use what the step returned")
        if not self._holder.alive:
            raise ProgramError("this array was on workers that have ended; restore the state from the last checkpoint")

    def copy_to_host_async(self) -> None:
        """Nothing: values come when they are read. JAX's arrays have it."""

    def value(self) -> Any:
        """The values: a NumPy array, or for random keys a `jax.Array` of this process."""
        self.check()
        return self._holder.fetch(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        del copy
        return np.asarray(self.value(), dtype)

    def __jax_array__(self) -> jax.Array:
        return jnp.asarray(self.value())

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if any(isinstance(x, RemoteArray) for x in options.get("out", ())):
            raise TypeError("a RemoteArray can't be written to; leave out= away and take what the function returns")
        values = [x.value() if isinstance(x, RemoteArray) else x for x in inputs]
        return getattr(ufunc, method)(*values, **options)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_VALUES:
            return getattr(jnp.asarray(self.value()), name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute {name!r}")

    def item(self) -> Any:
        """The only element, as a Python number."""
        return np.asarray(self).item()

    def tolist(self) -> Any:
        """The values as nested lists."""
        return np.asarray(self).tolist()

    def astype(self, dtype: Any) -> np.ndarray[Any, Any]:
        """The values in another dtype."""
        return np.asarray(self).astype(dtype)

    def __getitem__(self, index: Any) -> Any:
        return self.value()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.value())  # one round trip, not one per element

    def __reduce__(self) -> tuple[Any, ...]:
        return np.asarray, (np.asarray(self),)  # what is pickled, or copied deeply, are the values

    def __contains__(self, value: Any) -> bool:
        return bool((np.asarray(self) == value).any())

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without dims")
        return self.shape[0]

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.item(), digits) if not self.shape else np.asarray(self).round(digits or 0)

    def __bool__(self) -> bool:
        return bool(np.asarray(self))

    def __index__(self) -> int:
        return np.asarray(self).__index__()

    def __format__(self, spec: str) -> str:
        return format(self.item() if not self.shape else np.asarray(self), spec)

    def __str__(self) -> str:
        readable = not self.is_deleted() and self.size <= _SHOWN_ELEMENTS
        return str(self.value()) if readable else repr(self)

    def __repr__(self) -> str:
        where = "deleted" if self.is_deleted() else str(self._place or "several devices")
        return f"RemoteArray({self.dtype}{list(self.shape)}, {where})"

    def __del__(self) -> None:
        if not getattr(self, "_gone", True) and self._holder.alive:
            self._holder.release(self._stored)


_IN_PLACE = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor")
for _name in _IN_PLACE:  # `x += 1` is `x = x + 1`
    setattr(RemoteArray, f"__i{_name}__", getattr(NDArrayOperatorsMixin, f"__{_name}__"))


def joined(parts: Sequence[Any], dim: int, wrap: Callable[[Any], Any]) -> Any:
    """One array of parts, which come as NumPy arrays; `wrap` makes random keys of their data."""
    return wrap(parts[0] if len(parts) == 1 else np.concatenate(parts, dim))
