"""How tensors travel between meshes: the Protocol, and the work on either side that every transport shares.

A transport moves one kind of tensor, as a `Transfer` says. Its two halves may run in different processes: `send` makes
a ticket on the source's side, `receive` turns it into the array on the target's. Neither waits for data.

    Sender.pieces      array → single-device arrays, one per send    (a program on the source mesh, or nothing at all)
    …                  each piece to its device                      (what transports differ in)
    Receiver.join      single-device arrays → array                  (a program on the target mesh, or nothing at all)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from alpa_like.errors import ProgramError
from alpa_like.placement import device_mesh
from alpa_like.plan import partition_spec
from alpa_like.reshard import Cut, Layout, Transfer

__all__ = ["Receiver", "Sender", "Transport", "compile_reshard", "sharding_of"]

Ticket = TypeVar("Ticket")
Program = Callable[..., Any]


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


class Sender:
    """The source's side: cuts an array into single-device pieces, one for each entry of `transfer.sends`, in order."""

    def __init__(self, transfer: Transfer, devices: Sequence[Any], dtype: Any) -> None:
        self._shape, self._dtype = transfer.shape, jnp.dtype(dtype)
        self._sharding = sharding_of(transfer.source, devices)
        outbox = _outbox(transfer)
        self.cuts = bool(transfer.sends) and (
            transfer.sending != transfer.source or not _are_tiles(transfer.cut, transfer.source)
        )
        self._cut = _compile_cut(transfer, self._sharding, self._dtype, outbox) if self.cuts else None
        first = transfer.source.ids.start
        self._order = [(outbox[s - first].index(piece), s - first) for piece, s, _ in transfer.sends]

    def check(self, value: jax.Array) -> None:
        """Raise `ProgramError` where an array is not of the kind that this was made for."""
        if value.shape != self._shape or value.dtype != self._dtype:
            raise ProgramError(
                f"this transfer was made for {self._dtype}{list(self._shape)}, found {value.dtype}{list(value.shape)}; "
                "make one for this kind of tensor"
            )
        if value.sharding != self._sharding and not value.sharding.is_equivalent_to(self._sharding, value.ndim):
            raise ProgramError(
                f"this transfer was made for arrays that lie as {self._sharding}, found {value.sharding}; "
                "plan the transfer from where the array is"
            )

    def rounds(self, value: jax.Array) -> tuple[jax.Array, ...]:
        """Arrays on the source mesh whose shards are the pieces; where `cuts`, pieces are stacked along dim 0."""
        self.check(value)
        return self._cut(value) if self._cut else (value,)

    def pieces(self, value: jax.Array) -> list[jax.Array]:
        """Single-device arrays in the order of `transfer.sends`. Raises as `check` does."""
        rounds = self.rounds(value)
        shards = [r.addressable_shards for r in rounds]
        return [shards[slot][device].data for slot, device in self._order]


class Receiver:
    """The target's side: joins single-device pieces, which come in the order of `transfer.sends`, to the array."""

    def __init__(self, transfer: Transfer, devices: Sequence[Any], dtype: Any) -> None:
        cut, self._slots = transfer.cut, _inbox(transfer)
        # XLA does not partition an empty result, so an empty tensor comes from the host.
        self._empty = np.zeros(transfer.shape, jnp.dtype(dtype)) if not math.prod(transfer.shape) else None
        self._shape, self._sharding = transfer.shape, sharding_of(transfer.target, devices)
        self.stacking = NamedSharding(self._sharding.mesh, PartitionSpec(transfer.target.axis_names))
        self.joins = transfer.gather != "none" or len(self._slots) > 1 or not _are_tiles(cut, transfer.target)
        self._join: Program | None = None
        if self.joins:
            # What a device receives is stacked along the leading dim, over all axes of the mesh.
            self._shape = _stacked(cut.piece_shape(transfer.shape), transfer.target)
            operands = [jax.ShapeDtypeStruct(self._shape, dtype, sharding=self.stacking)] * len(self._slots)
            self._join = _compile_join(transfer, self._sharding, operands, self._slots)
            self._sharding = self.stacking
        idle = {device for slot in self._slots for device, send in enumerate(slot) if send is None}
        nothing = np.zeros(cut.piece_shape(transfer.shape), jnp.dtype(dtype)) if idle else None
        self._fillers = {i: jax.device_put(nothing, devices[transfer.target.ids[i]]) for i in idle}

    def join(self, pieces: Sequence[jax.Array]) -> jax.Array:
        """The array, sharded as the transfer's target says."""
        if self._empty is not None:
            return jax.device_put(self._empty, self._sharding)
        rounds = [
            jax.make_array_from_single_device_arrays(
                self._shape,
                self._sharding,
                [self._fillers[i] if send is None else pieces[send] for i, send in enumerate(slot)],
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
    """The program for these operands, ready to run. That of 4-bit integers is compiled at its first call: JAX packs
    them or not depending on where they come from, and only a jitted function takes both.
    """
    if any(operand.dtype.name.endswith("int4") or operand.dtype.name.endswith("int2") for operand in operands):
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
