"""The transport inside one process: JAX copies the pieces from device to device, and the driver never waits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import jax

from alpa_like.reshard import Transfer
from alpa_like.runtime.transport import Receiver, Sender, carried, compile_reshard, sharding_of

__all__ = ["LocalTransport"]

_Send = Callable[[jax.Array], list[jax.Array]]
_Receive = Callable[[list[jax.Array]], jax.Array]


class LocalTransport:
    """A `Transport` between devices of this process, for one kind of tensor; everything is compiled here, once.

    `devices` are all devices of the cluster in its order. Called, it sends and receives. Where each device sends what
    it holds to the device of the same place in the other mesh, a call is one `device_put`. Typed keys (`key<fry>`)
    travel as their key data, planned anew. A weak type may become strong. Raises `ProgramError` for an array of
    another shape, dtype or sharding than `transfer` starts from.

    No call blocks: `device_put` would wait on the host where it had to cut or join tiles, so it gets whole ones only.
    """

    def __init__(self, transfer: Transfer, devices: Sequence[Any], dtype: Any) -> None:
        self._carried = carried(transfer, dtype)
        self._send, self._receive = _halves(self._carried.transfer, devices, self._carried.dtype)

    def __call__(self, value: jax.Array) -> jax.Array:
        """The same values on the target mesh."""
        return self.receive(self.send(value))

    def send(self, value: jax.Array) -> list[jax.Array]:
        """What lands on the target mesh; `value` may be freed at once, and is never donated."""
        return self._send(self._carried.encode(value))

    def receive(self, ticket: list[jax.Array]) -> jax.Array:
        """The array of what `send` returned."""
        return self._carried.decode(self._receive(ticket))


def _halves(transfer: Transfer, devices: Sequence[Any], dtype: Any) -> tuple[_Send, _Receive]:
    """What `send` and `receive` do: with as few calls of JAX as the transfer allows."""
    sender = Sender(transfer, devices, dtype)
    if transfer.same_devices and math.prod(transfer.shape):
        return partial(_send_whole, sender, compile_reshard(transfer, devices, dtype)), itemgetter(0)
    receiver, one_copy = Receiver(transfer, devices, dtype), _is_one_copy(transfer)
    if one_copy and sender.cuts:
        put = partial(jax.device_put, device=receiver.stacking)
        return lambda value: list(map(put, sender.rounds(value))), lambda ticket: receiver.join_stacked(ticket[0])
    if one_copy and not receiver.joins:
        put = partial(jax.device_put, device=sharding_of(transfer.target, devices))
        return partial(_send_whole, sender, put), itemgetter(0)
    places = [devices[target] for _, _, target in transfer.sends]
    # A piece that stays where it is must not be freed with the array that was sent.
    may_alias = [source != target or sender.cuts for _, source, target in transfer.sends]
    return lambda value: jax.device_put(sender.pieces(value), places, may_alias=may_alias), receiver.join


def _send_whole(sender: Sender, move: Callable[[jax.Array], jax.Array], value: jax.Array) -> list[jax.Array]:
    sender.check(value)
    return [move(value)]


def _is_one_copy(transfer: Transfer) -> bool:
    """Whether each device sends to the one of the same place in the target mesh."""
    shift = transfer.target.ids.start - transfer.source.ids.start
    same_place = all(target - source == shift for _, source, target in transfer.sends)
    return same_place and len(transfer.sends) == len(transfer.source.ids) == len(transfer.target.ids)
