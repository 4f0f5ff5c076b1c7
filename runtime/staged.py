"""`Staged`: a piece of a step as plain data, lowered where no device is and compiled where the devices are.

JAX compiles only what it lowered itself. So the process with the devices lowers a stand-in, which has the piece's
types and shardings and computes nothing, and puts the staged operations in place of its own before it compiles it.

Contract
    `make_piece`: a function of flat arrays, types, layouts, devices → `jax.stages.Compiled`, or `Staged` where the
    devices are `AbstractDevices`. `Staged.compile`: the same program on devices, in any process of the same JAX.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.mlir import ir
from jax.stages import Compiled, Lowered, Traced

from alpa_like.errors import ProgramError
from alpa_like.placement import AbstractDevices
from alpa_like.reshard import Layout
from alpa_like.runtime.transport import sharding_of

__all__ = ["BufferType", "Staged", "check_travels", "make_piece", "stage_function"]

_STAY = ("callback", "debug_print", "custom_partitioning", "inspect_sharding", "infeed", "outfeed")
"""Parts of the names of primitives that call back into the process that lowered them."""


@dataclass(frozen=True, slots=True)
class BufferType:
    """One argument or result of a piece: shape, dtype, how it lies; `key_impl` names the generator of typed keys.

    `str(array.dtype)` is the dtype of the arrays: "float32", "bfloat16", "key<fry>".
    """

    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    weak: bool = False
    key_impl: str | None = None

    @classmethod
    def of(cls, value: Any, layout: Layout) -> BufferType:
        """That of an array, or of anything with its shape and dtype."""
        weak = bool(getattr(value, "weak_type", False))
        return cls(tuple(value.shape), str(value.dtype), layout, weak, _key_impl(value.dtype))

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        """What a function is traced with in place of the array."""
        if self.key_impl is None:
            return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype), weak_type=self.weak)
        return jax.ShapeDtypeStruct(self.shape, jax.eval_shape(lambda: jax.random.key(0, impl=self.key_impl)).dtype)

    def nothing(self) -> jax.Array:
        """An array of this type, to be traced."""
        if self.key_impl is not None:
            data = jax.eval_shape(jax.random.key_data, self.struct)
            return jax.random.wrap_key_data(lax.full(data.shape, 0, data.dtype), impl=self.key_impl)
        dtype = jnp.dtype(self.dtype)
        # Only Python's numbers have a weak type; their dtypes are all that a weak type can have.
        return lax.full(self.shape, dtype.type(0).item()) if self.weak else lax.full(self.shape, 0, dtype)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Staged:
    """A piece that is lowered but not compiled. Plain data, which may be pickled.

    `module` is StableHLO bytecode with the plan's constraints; `donated` are the positions of the inputs whose
    buffers it takes. All layouts are on the same devices; a mesh has them row-major in the order of their numbers.
    """

    name: str
    module: bytes
    inputs: tuple[BufferType, ...]
    outputs: tuple[BufferType, ...]
    donated: tuple[int, ...]
    platform: str
    made_with: str

    @property
    def ids(self) -> range:
        """The numbers of the devices that it runs on; none for a piece that takes and makes nothing."""
        buffers = (*self.inputs, *self.outputs)
        return buffers[0].layout.ids if buffers else range(0)

    def compile(self, devices: Sequence[Any]) -> Compiled:
        """The piece on the devices here; `devices` are indexed by global number, and only `ids` are looked up.

        It takes the flat inputs and returns the flat outputs. Raises `ProgramError` where there are other devices, or
        another JAX, than it was staged for.
        """
        if _jax_here() != self.made_with:
            raise self._error(self.made_with, f"{_jax_here()} is here; use the same everywhere")
        here = self._here(devices)
        lowered = _stand_in(self, here)
        module = _module(lowered)
        with module.context:
            staged = ir.Module.parse(self.module)
            for op in list(module.body.operations):
                op.operation.erase()
            for op in list(staged.body.operations):
                module.body.append(op)
        return lowered.compile()

    def _here(self, devices: Sequence[Any]) -> list[Any]:
        """The devices by number, None for those of other pieces."""
        needed = f"devices {self.ids.start} to {self.ids.stop - 1}"
        try:
            here: list[Any] = [*[None] * self.ids.start, *(devices[n] for n in self.ids)]
        except LookupError:
            raise self._error(needed, f"{len(devices)} are here; stage it again for them") from None
        found = {here[n].platform for n in self.ids}
        if not found <= _names_of(self.platform):
            raise self._error(f"platform {self.platform}", f"found {', '.join(sorted(found))}; stage it for that one")
        return here

    def _error(self, expected: str, found: str) -> ProgramError:
        return ProgramError(f"piece {self.name} was staged for {expected}, but {found}")

    def __repr__(self) -> str:
        return f"Staged({self.name}, {len(self.module)} bytes, devices {self.ids.start} to {self.ids.stop - 1})"


def _names_of(platform: str) -> set[str]:
    """What `jax.Device.platform` may be for a lowering platform."""
    return {platform, "gpu"} if platform in ("cuda", "rocm") else {platform}


def _key_impl(dtype: Any) -> str | None:
    """The name of the generator of typed keys, None for any other dtype."""
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return None
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct((), dtype))
    if not isinstance(found[0], str):
        raise ProgramError(
            f"random keys of {dtype} can't travel to other processes: their generator has no name there; "
            "use one of JAX's, such as threefry2x32"
        )
    return found[0]


def _module(lowered: Lowered) -> Any:
    """The very module that `lowered` compiles: what is changed in it is compiled."""
    return lowered.compiler_ir("stablehlo")


def _jax_here() -> str:
    """What has to be equal where a piece is lowered and where it is compiled: bytecode and dtypes depend on it."""
    return f"JAX {jax.__version__}, {8 * jax.dtypes.canonicalize_dtype('int64').itemsize} bits"


def _stand_in(staged: Staged, devices: Sequence[Any]) -> Lowered:
    """A lowered function of the same types and shardings, that makes its results out of nothing."""

    def stand_in(*_: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(output.nothing() for output in staged.outputs)

    before, after = ([b.layout for b in buffers] for buffers in (staged.inputs, staged.outputs))
    # What is donated is written in the module.
    return _trace(staged.name, stand_in, [b.struct for b in staged.inputs], before, after, devices).lower()


# ---------------------------------------------------------------------------------------------------------- making


def stage_function(
    name: str,
    fun: Callable[..., Sequence[Any]],
    types: Sequence[Any],
    input_layouts: Sequence[Layout],
    output_layouts: Sequence[Layout],
    devices: AbstractDevices,
    donated: Sequence[int] = (),
) -> Staged:
    """Any function that `jax.jit` takes, of flat arrays to a sequence of flat arrays, as a piece for other processes.

    All layouts must be on the same devices. Raises `ProgramError` where they are not, and where the function calls
    back into this process.
    """
    made = make_piece(name, fun, types, input_layouts, output_layouts, devices, donated)
    assert isinstance(made, Staged)
    return made


def make_piece(
    name: str,
    fun: Callable[..., Sequence[Any]],
    types: Sequence[Any],
    input_layouts: Sequence[Layout],
    output_layouts: Sequence[Layout],
    devices: Sequence[Any],
    donated: Sequence[int] = (),
    edit: Callable[[Any], None] | None = None,
) -> Compiled | Staged:
    """A function of flat arrays, compiled for `devices`, or staged for `AbstractDevices`; raises as `stage_function`.

    `edit` changes the freshly lowered module in place. The piece returns its results as a tuple.
    """
    _check_layouts(name, (*input_layouts, *output_layouts))
    traced = _trace(name, fun, types, input_layouts, output_layouts, devices, donated)
    lowered = _lower(name, traced, devices)
    if edit is not None:
        edit(_module(lowered))
    if not isinstance(devices, AbstractDevices):
        return lowered.compile()
    inputs, outputs = (
        tuple(BufferType.of(value, layout) for value, layout in zip(values, layouts, strict=True))
        for values, layouts in ((types, input_layouts), (traced.out_info, output_layouts))
    )
    code = io.BytesIO()
    _module(lowered).operation.write_bytecode(code)
    platform = devices.lowering_platform
    return Staged(name, code.getvalue(), inputs, outputs, tuple(donated), platform, _jax_here())


def _check_layouts(name: str, layouts: Sequence[Layout]) -> None:
    found = {layout.devices for layout in layouts}
    if len(found) > 1:
        shown = " and ".join(f"{first} to {first + count - 1}" for first, count in sorted(found))
        raise ProgramError(
            f"piece {name} needs arguments and results on the same devices, found devices {shown}; make one per mesh"
        )


def _trace(
    name: str,
    fun: Callable[..., Sequence[Any]],
    types: Sequence[Any],
    input_layouts: Sequence[Layout],
    output_layouts: Sequence[Layout],
    devices: Sequence[Any],
    donated: Sequence[int] = (),
) -> Traced:
    """The function, traced anew each time: JAX lowers what it has lowered before to the same, changed, module."""

    def piece(*args: Any) -> tuple[Any, ...]:
        return tuple(fun(*args))

    piece.__name__ = piece.__qualname__ = name.replace(" ", "_").replace(".", "_")
    place = cache(lambda layout: sharding_of(layout, devices))  # many buffers share few layouts
    step = jax.jit(
        piece,
        in_shardings=tuple(map(place, input_layouts)),
        out_shardings=tuple(map(place, output_layouts)),
        donate_argnums=tuple(donated),
        keep_unused=True,
    )
    return step.trace(*types)


def _lower(name: str, traced: Traced, devices: Sequence[Any]) -> Lowered:
    if not isinstance(devices, AbstractDevices):
        return traced.lower()
    check_travels(f"piece {name}", traced.jaxpr)
    return traced.lower(lowering_platforms=(devices.lowering_platform,))


def check_travels(name: str, closed: ClosedJaxpr) -> None:
    """Raise `ProgramError` for what can't leave this process; `name` is whatever has the jaxpr."""
    for found in _primitives(closed.jaxpr):
        if any(part in found for part in _STAY):
            raise ProgramError(
                f"{name} calls back into Python ({found}), and a step that runs in other processes can't; "
                "take jax.debug.print, pure_callback, io_callback and the like out of the step"
            )


def _primitives(jaxpr: Jaxpr) -> Iterator[str]:
    """The names of all primitives, those inside others included."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, Jaxpr | ClosedJaxpr):
                    yield from _primitives(inner if isinstance(inner, Jaxpr) else inner.jaxpr)
