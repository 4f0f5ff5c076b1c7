"""A worker process: it holds arrays by number, compiles pieces, and runs the program of its mesh when it is told to.

The driver (`runtime.remote`) tells all processes of a mesh the same in the same order, so that they stay in step.
Imports no Ray: whatever calls these methods one after the other will do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alpa_like.calibrate import cache_dir
from alpa_like.errors import ProgramError
from alpa_like.reshard import Layout, Transfer
from alpa_like.runtime.checkpoints import PartWriter, Wanted, read_leaves
from alpa_like.runtime.instructions import Program, Ref, Route, Run
from alpa_like.runtime.interpreter import Event, Interpreter
from alpa_like.runtime.ray_actor import WorkerSetup
from alpa_like.runtime.remote_transport import ProcessMap, RemoteReceiver, RemoteSender, TransferServer
from alpa_like.runtime.staged import BufferType, Staged
from alpa_like.runtime.transport import sharding_of

__all__ = ["MeshProgram", "Order", "Partner", "Shards", "Tiles", "Worker"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """What the devices of one process hold of an array: `tiles[places[i]]` for the i-th. Keys come as their data."""

    type: BufferType
    tiles: tuple[np.ndarray[Any, Any], ...]
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shards:
    """What a process has of an array, each element once over all processes: (index, values) of a whole of `shape`."""

    shape: tuple[int, ...]
    shards: tuple[tuple[tuple[slice, ...], np.ndarray[Any, Any]], ...]


@dataclass(frozen=True, slots=True)
class Partner:
    """One half of the transfers of a route: what travels, and the processes of the other mesh.

    `offsets` are the numbers of its buffers, from a step's first number on (see `runtime.remote_transport`).
    """

    transfer: Transfer
    type: BufferType
    processes: ProcessMap
    offsets: Mapping[Ref, int]


@dataclass(frozen=True, slots=True)
class MeshProgram:
    """All that a mesh needs to run its part of a step.

    `numbers` says which of the given buffers hold the number of a micro-batch, and how they lie.
    """

    program: Program
    pieces: Mapping[str, Staged]
    partners: Mapping[Route, Partner]
    numbers: Mapping[int, tuple[int, Layout]]
    names: Mapping[int, str]


class Order(NamedTuple):
    """A step of a program on arrays, by number, and host data, in the order of the given buffers.

    Its transfers have numbers from `base` on; its results get the numbers `results`; `dead` are freed before it. It is
    one argument, as Ray takes its time for each.
    """

    program: int
    base: int
    values: tuple[int | Tiles, ...]
    results: tuple[int, ...]
    dead: tuple[int, ...]


class Worker:
    """One process of a mesh. Arrays and programs have the numbers that the driver gives them."""

    def __init__(self, setup: WorkerSetup) -> None:
        _use_compilation_cache()
        here = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
        # Devices are numbered as in the cluster; those of other meshes are not here.
        self._devices: list[Any] = [*[None] * setup.first, *here]
        self._server = TransferServer(setup.host_ip)
        self._arrays: dict[int, Any] = {}
        self._failures: dict[int, str] = {}
        self._programs: dict[int, _Loaded] = {}
        self._writer = PartWriter()
        self._compiled = 0

    def begin(self, wide: bool) -> str:
        """Take JAX's 64-bit mode from the driver; returns where other workers reach this one."""
        jax.config.update("jax_enable_x64", wide)
        return self._server.address

    def compiled(self) -> int:
        """How many pieces have been compiled so far; may be asked while they are."""
        return self._compiled

    # ------------------------------------------------------------------------------------------------------- steps

    def load(self, number: int, mesh: MeshProgram) -> None:
        """Compile a program, to be run as `number`."""
        pieces: dict[str, Any] = {}
        for name, staged in mesh.pieces.items():
            pieces[name] = staged.compile(self._devices)
            self._compiled += 1
        self._programs[number] = _Loaded(mesh, pieces, self._server, self._devices)

    def unload(self, number: int) -> None:
        """Forget a program."""
        self._programs.pop(number, None)

    def run(self, order: Order) -> None:
        """Start a step.

        Waits until the arrays that it takes are computed, so that no more than a step is ever ahead of the devices.
        """
        self.free(order.dead)
        loaded = self._programs[order.program]
        try:
            returned = loaded.interpreter(self._given(loaded, order))
        except Exception as error:  # whatever it was, the results are known to be missing
            raise self._failed(error, order.results) from error
        self._arrays.update(zip(order.results, returned, strict=True))

    def trace(self, order: Order) -> tuple[float, tuple[Event, ...]]:
        """As `run`; returns when the step began, in seconds since the epoch, and when each piece ran since then."""
        self.free(order.dead)
        loaded = self._programs[order.program]
        try:
            given = self._given(loaded, order)
            began_s = time.time()
            returned, events = loaded.interpreter.trace(given)
        except Exception as error:  # as in `run`
            raise self._failed(error, order.results) from error
        self._arrays.update(zip(order.results, returned, strict=True))
        return began_s, events

    def _failed(self, error: Exception, results: Sequence[int]) -> ProgramError:
        """What to raise for it; whoever asks for the results is told the same."""
        line = next(iter(str(error).splitlines()), type(error).__name__)
        text = str(error) if isinstance(error, ProgramError) else f"a step failed: {line}"
        self._failures.update(dict.fromkeys(results, text))
        return ProgramError(text)

    def _given(self, loaded: _Loaded, order: Order) -> Iterator[Any]:
        loaded.base = order.base
        fresh = [self._made(v) if isinstance(v, Tiles) else None for v in order.values]
        stored = [v for v in order.values if isinstance(v, int)]
        jax.block_until_ready([self._array(v) for v in stored])
        return loaded.buffers(order.values, fresh, self._arrays)

    def _array(self, number: int) -> Any:
        if number in self._failures:
            raise ProgramError(self._failures[number])
        return self._arrays[number]

    # ------------------------------------------------------------------------------------------------------ arrays

    def put(self, number: int, tiles: Tiles) -> None:
        """Make an array of host data."""
        self._arrays[number] = self._made(tiles)

    def _made(self, tiles: Tiles) -> Any:
        kind = tiles.type
        data = jax.eval_shape(jax.random.key_data, kind.struct) if kind.key_impl else kind.struct
        layout = replace(kind.layout, spec=(*kind.layout.spec, *((),) * (len(data.shape) - len(kind.shape))))
        sharding = sharding_of(layout, self._devices)
        mine = [d for d in (self._devices[n] for n in layout.ids) if d.process_index == jax.process_index()]
        shards = jax.device_put([tiles.tiles[place] for place in tiles.places], mine)
        array = jax.make_array_from_single_device_arrays(data.shape, sharding, shards)
        return jax.random.wrap_key_data(array, impl=kind.key_impl) if kind.key_impl else array

    def copy(self, number: int, new: int) -> None:
        """Make a second array of the same values."""
        self._arrays[new] = self._array(number).copy()

    def fetch(self, number: int) -> Shards:
        """What this process has of an array, once it is computed."""
        array = jax.block_until_ready(self._array(number))  # raises where one device failed and others wait for it
        mine = [(s.index, _plain(s.data)) for s in array.addressable_shards if s.replica_id == 0]
        inner = next((tile.shape[array.ndim :] for _, tile in mine), ())
        return Shards((*array.shape, *inner), tuple(mine))

    def wait(self, number: int) -> None:
        """Return when an array is computed."""
        jax.block_until_ready(self._array(number))

    def free(self, numbers: Sequence[int]) -> None:
        """Let go of arrays."""
        for number in numbers:
            self._arrays.pop(number, None)
            self._failures.pop(number, None)

    def held(self) -> tuple[int, int]:
        """How many arrays are held, and their bytes on this process's devices."""
        shards = [s for a in self._arrays.values() for s in a.addressable_shards]
        return len(self._arrays), sum(s.data.nbytes for s in shards)

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save(self, path: str, arrays: Mapping[str, int | np.ndarray[Any, Any]]) -> None:
        """Begin to write a part of a checkpoint: arrays by number, and host data."""
        self._writer = PartWriter()  # a part that failed would keep the old one waiting for the others
        self._writer.start(path, {name: self._array(a) if isinstance(a, int) else a for name, a in arrays.items()})

    def saved(self) -> None:
        """Return when the part that was begun last is complete."""
        self._writer.wait()

    def restore(self, wanted: Sequence[Wanted], numbers: Sequence[int]) -> None:
        """Read arrays whose `sharding` is a `Layout`."""
        placed = [replace(w, sharding=sharding_of(w.sharding, self._devices)) for w in wanted]
        self._arrays.update(zip(numbers, read_leaves(placed), strict=True))

    # ---------------------------------------------------------------------------------------------------- insights

    def texts(self, number: int) -> dict[str, str]:
        """The optimized HLO of every piece of a program."""
        return {name: piece.as_text() for name, piece in self._programs[number].pieces.items()}

    def temporaries(self, number: int) -> dict[str, int]:
        """Bytes on one device that each piece of a program needs beside its arguments and results."""
        pieces = self._programs[number].pieces
        return {name: piece.memory_analysis().temp_size_in_bytes for name, piece in pieces.items()}


def _plain(tile: jax.Array) -> np.ndarray[Any, Any]:
    """What a device has of an array; of random keys their data. Each tile by itself, as other processes do not join."""
    return np.asarray(jax.random.key_data(tile) if jnp.issubdtype(tile.dtype, jax.dtypes.prng_key) else tile)


def _use_compilation_cache() -> None:
    """Keep what is compiled for the next start, unless the user has said where, or not to."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))


class _Loaded:
    """A compiled program. `base` is the first number of the transfers of the step that runs."""

    def __init__(
        self, mesh: MeshProgram, pieces: Mapping[str, Any], server: TransferServer, devices: Sequence[Any]
    ) -> None:
        self.pieces = pieces
        self.base = 0
        self._donated = _donated(mesh.program)
        self._numbers = {
            place: jax.device_put(np.int32(n), sharding_of(layout, devices))
            for place, (n, layout) in mesh.numbers.items()
        }
        halves = {
            route: _Half(self, route.source == mesh.program.mesh, partner, server, devices)
            for route, partner in mesh.partners.items()
        }
        self._count = len(mesh.program.given)
        self.interpreter = Interpreter.of_mesh(mesh.program, pieces, halves, mesh.names)

    def buffers(self, values: Sequence[int | Tiles], fresh: Sequence[Any], arrays: dict[int, Any]) -> Iterator[Any]:
        """The given buffers, in order. Those that the step donates are held here no longer."""
        given = iter(zip(values, fresh, strict=True))
        for place in range(self._count):
            if place in self._numbers:
                yield self._numbers[place]
                continue
            value, made = next(given)
            if not isinstance(value, int):
                yield made
            else:
                yield arrays.pop(value) if place in self._donated else arrays[value]


def _donated(program: Program) -> set[int]:
    """The places of the given buffers that the program takes for good."""
    taken = {i.inputs[n] for i in program.instructions if isinstance(i, Run) for n in i.donated}
    return {place for place, ref in enumerate(program.given) if ref in taken}


class _Half:
    """This mesh's half of a route, as the interpreter wants it."""

    def __init__(
        self, step: _Loaded, sends: bool, partner: Partner, server: TransferServer, devices: Sequence[Any]
    ) -> None:
        make = RemoteSender if sends else RemoteReceiver
        dtype = partner.type.struct.dtype
        self._move: Any = make(server, partner.transfer, devices, dtype, partner.processes)
        self._step, self._offsets = step, partner.offsets

    def send(self, ref: Ref, value: Any, /) -> None:
        self._move(value, self._step.base + self._offsets[ref])

    def receive(self, ref: Ref, /) -> Any:
        return self._move(self._step.base + self._offsets[ref])
