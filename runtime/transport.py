"""How tensors travel between meshes: the Protocol, and the work on either side that every transport shares.

A transport moves one kind of tensor, as a `Transfer` says. Its two halves may run in different processes: `send` makes
a ticket on the source's side, `receive` turns it into the array on the target's. Neither waits for data.

    Sender.pieces      array → single-device arrays, one per send    (a program on the source mesh, or nothing at all)
    …                  each piece to its device                      (what transports differ in)
    Receiver.join      single-device arrays → array                  (a program on the target mesh, or nothing at all)

A mesh may be spread over processes. All of them make the same `Sender` or `Receiver` and call it in the same order; the
programs run on the whole mesh, and each process has the pieces of its own devices in hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from alpa_like.errors import ProgramError
from alpa_like.placement import device_mesh
from alpa_like.plan import partition_spec
from alpa_like.reshard import Cut, Layout, Transfer, plan_transfer

__all__ = [
    "SUB_BYTE",
    "Carried",
    "Program",
    "Receiver",
    "Sender",
    "Transport",
    "carried",
    "check_kind",
    "compile_cast",
    "compile_reshard",
    "sharding_of",
]

Ticket = TypeVar("Ticket")
Program = Callable[..., Any]

SUB_BYTE = {"int2": "int8", "uint2": "uint8", "int4": "int8", "uint4": "uint8", "float4_e2m1fn": "float8_e4m3fn"}
"""Dtypes of which JAX may pack several elements into a byte, and the dtype of whole bytes that has all their values."""


class Transport(Protocol[Ticket]):
    """Moves arrays of one shape, dtype and pair of layouts; made once, used at every step."""

    def send(self, value: jax.Array) -> Ticket:
        """Start to move `value`, which must lie as the transfer's source says; it may be freed at once."""
        ...

    def receive(self, ticket: Ticket) -> jax.Array:
        """The array on the target mesh, which shares no memory with the one that was sent."""
        ...


def sharding_of(layout: Layout, devices: Sequence[Any]) -> NamedSharding:
    """JAX's form of a layout; `devices` are all devices of the cluster, in its order. `ProgramError` for too few."""
    if len(devices) < layout.ids.stop:
        raise ProgramError(
            f"the layout needs devices {layout.ids.start} to {layout.ids.stop - 1}, but {len(devices)} are here; "
            "plan for the devices here"
        )
    mesh = device_mesh(layout.mesh_shape, layout.axis_names, layout.devices, devices)
    return NamedSharding(mesh, partition_spec(layout.spec, layout.axis_names))


def compile_reshard(transfer: Transfer, devices: Sequence[Any], dtype: Any) -> Program:
    """One program for a transfer between layouts on the same devices. Its result is a copy, even of equal layouts."""
    before, after = (sharding_of(layout, devices) for layout in (transfer.source, transfer.target))
    program = jax.jit(jnp.copy, out_shardings=after)
    return _compiled(program, [jax.ShapeDtypeStruct(transfer.shape, dtype, sharding=before)])


def compile_cast(shape: tuple[int, ...], before: Any, after: Any, sharding: NamedSharding) -> Program:
    """One program that makes a copy of an array, as another dtype where they differ; every device works for itself."""
    program = jax.jit(jnp.copy if before == after else lambda x: x.astype(after), out_shardings=sharding)
    return _compiled(program, [jax.ShapeDtypeStruct(shape, before, sharding=sharding)])


def check_kind(value: jax.Array, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> None:
    """Raise `ProgramError` where an array is not of the kind that a transfer was made for."""
    if value.shape != shape or value.dtype != dtype:
        raise ProgramError(
            f"this transfer was made for {dtype}{list(shape)}, found {value.dtype}{list(value.shape)}; "
            "make one for this kind of tensor"
        )
    if value.sharding != sharding and not value.sharding.is_equivalent_to(sharding, value.ndim):
        raise ProgramError(
            f"this transfer was made for arrays that lie as {sharding}, found {value.sharding}; "
            "plan the transfer from where the array is"
        )


@dataclass(frozen=True, slots=True)
class Carried:
    """What travels for one kind of tensor: itself, or for typed keys (`key<fry>`) their key data, planned anew."""

    transfer: Transfer
    dtype: Any
    key: Any = None
    key_impl: Any = None

    def encode(self, value: jax.Array) -> jax.Array:
        """What travels for `value`, which it may share memory with. `ProgramError` where a key of another kind came."""
        if self.key_impl is None:
            return value
        if value.dtype != self.key:
            raise ProgramError(
                f"this transfer was made for {self.key}, found {value.dtype}; make one for this kind of tensor"
            )
        return jax.random.key_data(value)

    def decode(self, array: jax.Array) -> jax.Array:
        """The inverse of `encode`."""
        return array if self.key_impl is None else jax.random.wrap_key_data(array, impl=self.key_impl)


def carried(transfer: Transfer, dtype: Any) -> Carried:
    """What travels for a tensor of this dtype."""
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return Carried(transfer, jnp.dtype(dtype))
    found: list[Any] = []
    key = jax.ShapeDtypeStruct(transfer.shape, dtype)
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    data = jax.eval_shape(jax.random.key_data, key)
    before, after = (replace(end, spec=(*end.spec, ())) for end in (transfer.source, transfer.target))
    return Carried(plan_transfer(data.shape, data.dtype.itemsize, before, after), data.dtype, dtype, found[0])


class Sender:
    """The source's side: cuts an array into single-device pieces, one for each of `sends`, in order.

    `sends` are the places in `transfer.sends` of what this process sends: all of them, where it has the whole mesh.
    """

    def __init__(self, transfer: Transfer, devices: Sequence[Any], dtype: Any) -> None:
        self._shape, self._dtype = transfer.shape, jnp.dtype(dtype)
        self._sharding = sharding_of(transfer.source, devices)
        outbox = _outbox(transfer)
        self.cuts = bool(transfer.sends) and (
            transfer.sending != transfer.source or not _are_tiles(transfer.cut, transfer.source)
        )
        self._cut = _compile_cut(transfer, self._sharding, self._dtype, outbox) if self.cuts else None
        first = transfer.source.ids.start
        places = {first + device: place for place, device in enumerate(_here(self._sharding))}
        self.sends = tuple(n for n, (_, source, _) in enumerate(transfer.sends) if source in places)
        mine = (transfer.sends[n][:2] for n in self.sends)
        self._order = [(outbox[source - first].index(piece), places[source]) for piece, source in mine]

    def check(self, value: jax.Array) -> None:
        """Raise `ProgramError` where an array is not of the kind that this was made for."""
        check_kind(value, self._shape, self._dtype, self._sharding)

    def rounds(self, value: jax.Array) -> tuple[jax.Array, ...]:
        """Arrays on the source mesh whose shards are the pieces; where `cuts`, pieces are stacked along dim 0."""
        self.check(value)
        return self._cut(value) if self._cut else (value,)

    def pieces(self, value: jax.Array) -> list[jax.Array]:
        """Single-device arrays in the order of `sends`. Raises as `check` does."""
        rounds = self.rounds(value)
        shards = [r.addressable_shards for r in rounds]
        return [shards[slot][place].data for slot, place in self._order]


class Receiver:
    """The target's side: joins single-device pieces, which come in the order of `sends`, to the array.

    `sends` are the places in `transfer.sends` of what this process receives: all, where it has the whole mesh.
    """

    def __init__(self, transfer: Transfer, devices: Sequence[Any], dtype: Any) -> None:
        cut, slots = transfer.cut, _inbox(transfer)
        # XLA does not partition an empty result, so an empty tensor comes from the host.
        self._empty = np.zeros(transfer.shape, jnp.dtype(dtype)) if not math.prod(transfer.shape) else None
        self._shape, self._sharding = transfer.shape, sharding_of(transfer.target, devices)
        self.stacking = NamedSharding(self._sharding.mesh, PartitionSpec(transfer.target.axis_names))
        here = _here(self._sharding)
        self.sends = tuple(sorted(n for slot in slots for n in (slot[i] for i in here) if n is not None))
        self._slots = [[None if slot[i] is None else self.sends.index(slot[i]) for i in here] for slot in slots]
        self.joins = transfer.gather != "none" or len(slots) > 1 or not _are_tiles(cut, transfer.target)
        self._join: Program | None = None
        if self.joins:
            # What a device receives is stacked along the leading dim, over all axes of the mesh.
            self._shape = _stacked(cut.piece_shape(transfer.shape), transfer.target)
            operands = [jax.ShapeDtypeStruct(self._shape, dtype, sharding=self.stacking)] * len(slots)
            self._join = _compile_join(transfer, self._sharding, operands, slots)
            self._sharding = self.stacking
        idle = {place for slot in self._slots for place, piece in enumerate(slot) if piece is None}
        nothing = np.zeros(cut.piece_shape(transfer.shape), jnp.dtype(dtype)) if idle else None
        first = transfer.target.ids.start
        self._fillers = {place: jax.device_put(nothing, devices[first + here[place]]) for place in idle}

    def join(self, pieces: Sequence[jax.Array]) -> jax.Array:
        """The array, sharded as the transfer's target says."""
        if self._empty is not None:
            return jax.make_array_from_callback(self._empty.shape, self._sharding, self._empty.__getitem__)
        rounds = [
            jax.make_array_from_single_device_arrays(
                self._shape,
                self._sharding,
                [self._fillers[i] if piece is None else pieces[piece] for i, piece in enumerate(slot)],
            )
            for slot in self._slots
        ]
        return self._join(*rounds) if self._join else rounds[0]

    def join_stacked(self, stacked: jax.Array) -> jax.Array:
        """The array, where each device has one piece, from the pieces in one array that lies as `stacking` says."""
        if self._join:
            return self._join(stacked)
        shards = [shard.data for shard in stacked.addressable_shards]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)


# ------------------------------------------------------------------------------------------------ who has which piece


def _here(sharding: NamedSharding) -> list[int]:
    """The devices of this process, by their place in the mesh; `jax.Array.addressable_shards` come in this order."""
    mine = sharding.addressable_devices
    return [place for place, device in enumerate(np.asarray(sharding.mesh.devices).flat) if device in mine]


def _outbox(transfer: Transfer) -> list[list[int]]:
    """The pieces that each device of the source mesh sends, each once."""
    first = transfer.source.ids.start
    found: list[dict[int, None]] = [{} for _ in transfer.source.ids]
    for piece, source, _ in transfer.sends:
        found[source - first][piece] = None
    return [list(pieces) for pieces in found]


def _inbox(transfer: Transfer) -> list[list[int | None]]:
    """For each slot, what the devices of the target mesh receive into it: the number of a send, or nothing."""
    numbers: list[list[int | None]] = [
        [n for n, (_, _, t) in enumerate(transfer.sends) if t == target] for target in transfer.target.ids
    ]
    slots = max(map(len, numbers))
    return [[sends[slot] if slot < len(sends) else None for sends in numbers] for slot in range(slots)]


def _are_tiles(cut: Cut, layout: Layout) -> bool:
    """Whether the pieces are what the devices of the layout hold."""
    return not cut.chunk and cut.grid == layout.parts


def _stacked(piece: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The shape of an array whose shards are pieces."""
    return (piece[0] * layout.devices[1], *piece[1:]) if piece else ()


# ------------------------------------------------------------------------------------------------ the two programs


def _compile_cut(transfer: Transfer, sharding: NamedSharding, dtype: Any, outbox: list[list[int]]) -> Program:
    """Array → one array per round, in which each device's shard is a piece that it sends; a local program, but for
    the reshard to `transfer.sending`.
    """
    mesh, names = sharding.mesh, transfer.source.axis_names
    sending = partition_spec(transfer.sending.spec, names)
    rounds = max(map(len, outbox))
    cells, chunks = _cells_and_chunks(transfer, outbox, rounds)

    def cut(tile: jax.Array) -> tuple[jax.Array, ...]:
        me = lax.axis_index(names)
        return tuple(
            _piece(tile, jnp.asarray(cells)[me, r], jnp.asarray(chunks)[me, r], transfer) for r in range(rounds)
        )

    local = jax.shard_map(cut, mesh=mesh, in_specs=sending, out_specs=PartitionSpec(names))

    def program(value: jax.Array) -> Any:
        return local(lax.with_sharding_constraint(value, NamedSharding(mesh, sending)))

    return _compiled(jax.jit(program), [jax.ShapeDtypeStruct(transfer.shape, dtype, sharding=sharding)])


def _compiled(program: Any, operands: Sequence[jax.ShapeDtypeStruct]) -> Program:
    """The program for these operands, ready to run. Those of `SUB_BYTE` are compiled at their first call: JAX packs
    them or not depending on where they come from, and only a jitted function takes both.
    """
    if any(operand.dtype.name in SUB_BYTE for operand in operands):
        return program
    return program.lower(*operands).compile()


def _cells_and_chunks(transfer: Transfer, outbox: list[list[int]], rounds: int) -> tuple[Any, Any]:
    """Where in its device's tile each piece starts [devices, rounds, rank], and its chunk [devices, rounds].

    A device that sends less than others cuts its first piece, or what is at the start of its tile, in vain.
    """
    cut, shape = transfer.cut, transfer.shape
    size = np.array([n // cells for n, cells in zip(shape, cut.grid, strict=True)], int)
    tile = np.array(transfer.sending.tile_shape(shape), int)
    starts = np.zeros((len(outbox), rounds, len(shape)), np.int32)
    chunks = np.zeros((len(outbox), rounds), np.int32)
    for device, pieces in enumerate(outbox):
        for r, piece in enumerate(pieces):
            starts[device, r] = np.array(cut.cell(piece, shape), int) * size % np.maximum(tile, 1)
            chunks[device, r] = piece % cut.per_tile(shape)
    return starts, chunks


def _piece(tile: jax.Array, start: jax.Array, chunk: jax.Array, transfer: Transfer) -> jax.Array:
    """The piece that starts at `start` in a tile of the sending layout."""
    cut, shape = transfer.cut, transfer.shape
    size = tuple(n // cells for n, cells in zip(shape, cut.grid, strict=True))
    cell = lax.dynamic_slice(tile, tuple(start), size)
    if not cut.chunk:
        return cell
    padding = cut.per_tile(shape) * cut.chunk - cell.size
    rows = jnp.pad(cell.reshape(-1), (0, padding)).reshape(-1, cut.chunk)
    return lax.dynamic_index_in_dim(rows, chunk, keepdims=False)


def _compile_join(
    transfer: Transfer, sharding: NamedSharding, operands: Sequence[Any], slots: list[list[int | None]]
) -> Program:
    """One array per slot, whose shards are pieces → the array; an all-gather where devices need each other's pieces."""
    joins: dict[str, Program] = {"none": _join_own, "replicas": _join_replicas, "mesh": _join_mesh}

    def join(*pieces: jax.Array) -> jax.Array:
        return joins[transfer.gather](jnp.stack(pieces), transfer, slots)

    flat = PartitionSpec(transfer.target.axis_names)
    local = jax.shard_map(join, mesh=sharding.mesh, in_specs=flat, out_specs=sharding.spec, check_vma=False)
    return _compiled(jax.jit(local, out_shardings=sharding), operands)


def _join_own(pieces: jax.Array, transfer: Transfer, _: object) -> jax.Array:
    return _assemble(pieces, transfer.cut.inner, transfer.target.tile_shape(transfer.shape))


def _join_replicas(pieces: jax.Array, transfer: Transfer, _: object) -> jax.Array:
    names = tuple(transfer.target.axis_names[a] for a in transfer.target.free_axes)
    everyones = lax.all_gather(pieces, names, tiled=True)[: transfer.cut.per_tile(transfer.shape)]
    return _join_own(everyones, transfer, None)


def _join_mesh(pieces: jax.Array, transfer: Transfer, slots: list[list[int | None]]) -> jax.Array:
    """Every device gathers the whole and keeps its tile."""
    names, shape = transfer.target.axis_names, transfer.shape
    where = {
        transfer.sends[send][0]: device * len(slots) + slot
        for slot, sends in enumerate(slots)
        for device, send in enumerate(sends)
        if send is not None
    }
    everyones = lax.all_gather(pieces, names, tiled=True)[np.array([where[p] for p in sorted(where)])]
    whole = _assemble(everyones, transfer.cut.grid, shape)
    tile, parts = transfer.target.tile_shape(shape), transfer.target.parts
    cells = np.array([np.unravel_index(t, parts) for t in transfer.target.tiles()]) * np.array(tile)
    return lax.dynamic_slice(whole, tuple(jnp.asarray(cells.astype(np.int32))[lax.axis_index(names)]), tile)


def _assemble(pieces: jax.Array, grid: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """Pieces [n, …] in the row-major order of a grid, or flat chunks [n, chunk], → an array of `shape`."""
    cell = tuple(size // n for size, n in zip(shape, grid, strict=True))
    if pieces.shape != (math.prod(grid), *cell):
        return pieces.reshape(-1)[: math.prod(shape)].reshape(shape)
    rank = len(grid)
    order = [axis for dim in range(rank) for axis in (dim, rank + dim)]
    return pieces.reshape(*grid, *cell).transpose(order).reshape(shape)
