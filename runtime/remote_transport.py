"""How tensors travel between processes: `jax.experimental.transfer` brings each piece to its device.

Every process has a `TransferServer`. The processes of the source mesh offer their pieces on their own servers, those of
the target mesh pull them. All pieces from one process to another are one message with one number, the *uuid*:

    uuid = base + source process * target processes + target process

Whoever orders a transfer gives both meshes the same `base`, and leaves the next `uuids_needed` numbers to it. A number
is used once: a second pull of it waits for ever, as does one from a process that is gone before it was ever reached.
JAX ends a pull with an error only where a connection breaks, and ignores its time-out, so processes must be watched.

Bytes travel as they lie in memory, whatever type and order of elements the receiver expects of them. So pieces leave
and arrive in JAX's default layout, and elements smaller than a byte travel as whole bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import transfer as jax_transfer
from jax.extend import backend
from jax.sharding import SingleDeviceSharding

from alpa_like.errors import ProgramError
from alpa_like.reshard import Layout, Transfer
from alpa_like.runtime.transport import (
    SUB_BYTE,
    Receiver,
    Sender,
    carried,
    check_kind,
    compile_cast,
    sharding_of,
)

__all__ = ["ProcessMap", "RemoteReceiver", "RemoteSender", "TransferServer", "uuids_needed"]


class TransferServer:
    """This process's end of all transfers; one per process, started after `jax.distributed`.

    `ip` is where other processes reach this one. What was offered stays in memory until it is pulled.
    """

    def __init__(self, ip: str) -> None:
        bind = f"[{ip}]:0" if ":" in ip else f"{ip}:0"
        # Without an address for its transports JAX aborts.
        self._server = jax_transfer.start_transfer_server(backend.get_backend(), bind, [bind])
        self.address: str = self._server.address()
        self._connections: dict[str, Any] = {}

    def connect(self, address: str) -> Any:
        """The connection to another server; made at the first use, and it does not wait for the other side."""
        if address not in self._connections:
            self._connections[address] = self._server.connect(address)
        return self._connections[address]

    def offer(self, uuid: int, arrays: Sequence[jax.Array]) -> None:
        """Let another process pull arrays; they must not be donated, but may be let go of."""
        self._server.await_pull(uuid, list(arrays))

    def pull(self, address: str, uuid: int, specs: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
        """Arrays that the server at `address` offers, or will; does not wait for them."""
        return self.connect(address).pull(uuid, list(specs))


@dataclass(frozen=True, slots=True)
class ProcessMap:
    """The processes of a mesh range in their order: each has equally many devices, and a transfer server.

    Example: `ProcessMap(4, 2, ("10.0.0.1:7000", "10.0.0.2:7000"))` has devices 4 and 5 in the first process.
    """

    first: int
    devices_per_process: int
    addresses: tuple[str, ...]

    def process_of(self, device: int) -> int:
        """The place in `addresses` of the process that has a device, which is numbered as the cluster does."""
        return (device - self.first) // self.devices_per_process

    def check(self, layout: Layout) -> None:
        """Raise `ProgramError` where some device of a layout has no process here."""
        stop = self.first + self.devices_per_process * len(self.addresses)
        if layout.ids.start < self.first or layout.ids.stop > stop:
            raise ProgramError(
                f"the transfer's other side has devices {layout.ids.start} to {layout.ids.stop - 1}, but the processes "
                f"to exchange with have {self.first} to {stop - 1}; give the processes of that side's mesh"
            )


def uuids_needed(transfer: Transfer, source: ProcessMap, target: ProcessMap) -> int:
    """How many numbers from `base` on one use of a transfer takes: one per pair of processes if anything is sent."""
    return len(source.addresses) * len(target.addresses) if transfer.sends else 0


class RemoteSender:
    """The source's half of a transfer to other processes, for one kind of tensor; compiled here, once.

    Every process of the source mesh makes one and calls it in the same order. `devices` are indexed as the cluster
    numbers them, and only those of the source need to be there; `targets` are the processes of the target mesh.
    Raises `ProgramError` where source and target are the same devices: `compile_reshard` does that without a server.
    """

    def __init__(
        self, server: TransferServer, transfer: Transfer, devices: Sequence[Any], dtype: Any, targets: ProcessMap
    ) -> None:
        _check_ends(transfer, targets, transfer.target)
        self._server, self._carried = server, carried(transfer, dtype)
        moved, self._dtype = self._carried.transfer, self._carried.dtype
        self._shape, self._sharding = moved.shape, sharding_of(moved.source, devices)
        wire = _wire(moved, self._dtype)
        self._sender = Sender(moved, devices, wire)
        # Pieces may be pulled long after the value was donated, so they never share memory with it.
        copies = bool(moved.sends) and (wire != self._dtype or not self._sender.cuts)
        self._copy = compile_cast(self._shape, self._dtype, wire, self._sharding) if copies else None
        to = (targets.process_of(moved.sends[n][2]) for n in self._sender.sends)
        first = jax.process_index() * len(targets.addresses)
        self._messages = [(first + process, places) for process, places in _grouped(to).items()]

    def __call__(self, value: jax.Array, base: int) -> None:
        """Offer what this process has of `value`, which may be freed or donated at once. Never waits.

        Raises `ProgramError` where `value` has another shape, dtype or sharding than `transfer` starts from.
        """
        value = self._carried.encode(value)
        check_kind(value, self._shape, self._dtype, self._sharding)
        pieces = self._sender.pieces(self._copy(value) if self._copy else value)
        for offset, places in self._messages:
            self._server.offer(base + offset, [pieces[place] for place in places])


class RemoteReceiver:
    """The target's half of a transfer from other processes; as `RemoteSender`, with the processes of the source."""

    def __init__(
        self, server: TransferServer, transfer: Transfer, devices: Sequence[Any], dtype: Any, sources: ProcessMap
    ) -> None:
        _check_ends(transfer, sources, transfer.source)
        self._server, self._carried = server, carried(transfer, dtype)
        moved, kept = self._carried.transfer, self._carried.dtype
        wire = _wire(moved, kept)
        self._receiver = Receiver(moved, devices, wire)
        sharding = sharding_of(moved.target, devices)
        self._cast = compile_cast(moved.shape, wire, kept, sharding) if wire != kept else None
        shape = moved.cut.piece_shape(moved.shape)
        mine = [moved.sends[n] for n in self._receiver.sends]
        self._specs = [
            jax.ShapeDtypeStruct(shape, wire, sharding=SingleDeviceSharding(devices[target])) for _, _, target in mine
        ]
        grouped = _grouped(sources.process_of(source) for _, source, _ in mine)
        self._messages = [
            (sources.addresses[process], process * jax.process_count() + jax.process_index(), places)
            for process, places in grouped.items()
        ]

    def __call__(self, base: int) -> jax.Array:
        """The array on the target mesh; does not wait for its elements."""
        pieces: dict[int, jax.Array] = {}
        for address, offset, places in self._messages:
            got = self._server.pull(address, base + offset, [self._specs[place] for place in places])
            pieces.update(zip(places, got, strict=True))
        array = self._receiver.join([pieces[place] for place in range(len(pieces))])
        return self._carried.decode(self._cast(array) if self._cast else array)


def _check_ends(transfer: Transfer, processes: ProcessMap, there: Layout) -> None:
    processes.check(there)
    if transfer.same_devices and math.prod(transfer.shape):
        raise ProgramError(
            f"source and target are the same devices {transfer.source.devices}, so nothing travels between processes; "
            "use compile_reshard"
        )


def _wire(transfer: Transfer, dtype: Any) -> Any:
    """The dtype of the pieces: of whole bytes, which lie alike wherever they come from."""
    return jnp.dtype(SUB_BYTE.get(dtype.name, dtype)) if transfer.sends else dtype


def _grouped(processes: Iterable[int]) -> dict[int, list[int]]:
    """For each process, the places where it is named."""
    found: dict[int, list[int]] = {}
    for place, process in enumerate(processes):
        found.setdefault(process, []).append(place)
    return found
