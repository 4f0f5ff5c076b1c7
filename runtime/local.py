"""The transport inside one process: JAX copies the pieces from device to device, and the driver never waits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp

from alpa_like.errors import ProgramError
from alpa_like.reshard import Layout, Transfer, plan_transfer
from alpa_like.runtime.transport import Receiver, Sender, compile_reshard, sharding_of

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
        self._dtype, self._key_impl = dtype, _key_impl(dtype)
        if self._key_impl is not None:
            transfer, dtype = _of_key_data(transfer, dtype)
        self._send, self._receive = _halves(transfer, devices, dtype)

    def __call__(self, value: jax.Array) -> jax.Array:
        """The same values on the target mesh."""
        return self.receive(self.send(value))

    def send(self, value: jax.Array) -> list[jax.Array]:
        """What lands on the target mesh; `value` may be freed at once, and is never donated."""
        if self._key_impl is not None:
            value = self._key_data(value)
        return self._send(value)

    def receive(self, ticket: list[jax.Array]) -> jax.Array:
        """The array of what `send` returned."""
        array = self._receive(ticket)
        return array if self._key_impl is None else jax.random.wrap_key_data(array, impl=self._key_impl)

    def _key_data(self, value: jax.Array) -> jax.Array:
        if value.dtype != self._dtype:
            raise ProgramError(
                f"this transfer was made for {self._dtype}, found {value.dtype}; make one for this kind of tensor"
            )
        return jax.random.key_data(value)


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


def _key_impl(dtype: Any) -> Any:
    """The implementation of a typed key, `None` for any other dtype."""
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return None
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct((), dtype))
    return found[0]


def _of_key_data(transfer: Transfer, dtype: Any) -> tuple[Transfer, Any]:
    """The transfer of the key data, which has one dim more, and its dtype."""
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(transfer.shape, dtype))
    return plan_transfer(
        data.shape, data.dtype.itemsize, _longer(transfer.source), _longer(transfer.target)
    ), data.dtype


def _longer(layout: Layout) -> Layout:
    return replace(layout, spec=(*layout.spec, ()))
