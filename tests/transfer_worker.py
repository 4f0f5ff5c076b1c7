"""One process of a mesh range, for test_remote_transport.py: does what it is told over its standard input.

    transfer_worker.py DEVICES PROCESSES PROCESS_ID COORDINATOR

Messages are pickles: the name of a function below and its keyword arguments come in; (True, result) or
(False, error text) goes out. The first message that goes out is the address of the transfer server.
"""

import os
import pickle
import sys
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as MemoryLayout

from alpa_like.reshard import Layout, Transfer
from alpa_like.runtime.local import LocalTransport
from alpa_like.runtime.remote_transport import ProcessMap, RemoteReceiver, RemoteSender, TransferServer
from alpa_like.runtime.transport import sharding_of

Shards = list[tuple[tuple[slice, ...], np.ndarray]]
made: dict[str, Any] = {}


def devices_of(layout: Layout) -> list[Any]:
    """All devices of this range, from the layout's first on; the numbers before are those of other ranges."""
    mine = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    return [None] * layout.ids.start + mine


def dtype_of(name: str) -> Any:
    return jax.random.key(0).dtype if name.startswith("key") else jnp.dtype(name)


def put(value: np.ndarray, layout: Layout, dtype: str) -> jax.Array:
    if dtype.startswith("key"):
        layout = Layout(layout.mesh_shape, layout.axis_names, layout.devices, (*layout.spec, ()))
        return jax.random.wrap_key_data(put(value, layout, "uint32"))
    return jax.make_array_from_callback(value.shape, sharding_of(layout, devices_of(layout)), value.__getitem__)


def shards(array: jax.Array) -> Shards:
    data = jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array
    return [(shard.index, np.asarray(shard.data)) for shard in data.addressable_shards]


def sender(transfer: Transfer, dtype: str, targets: ProcessMap) -> None:
    made["sender"] = RemoteSender(made["server"], transfer, devices_of(transfer.source), dtype_of(dtype), targets)


def receiver(transfer: Transfer, dtype: str, sources: ProcessMap) -> None:
    made["receiver"] = RemoteReceiver(made["server"], transfer, devices_of(transfer.target), dtype_of(dtype), sources)
    made["goal"] = sharding_of(transfer.target, devices_of(transfer.target))


def overwrite(value: jax.Array) -> None:
    """Donate a value to a program that writes something else into its memory."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    other = jax.jit(lambda x: ~x if x.dtype == bool else x + 1, donate_argnums=0, out_shardings=value.sharding)(value)
    jax.block_until_ready(other)
    assert value.is_deleted()


def send(value: np.ndarray, layout: Layout, dtype: str, base: int) -> None:
    """Send a value, and at once let a program overwrite it."""
    array = put(value, layout, dtype)
    made["sender"](array, base)
    if value.size:
        overwrite(array)


def receive(base: int) -> tuple[str, Shards]:
    array = made["receiver"](base)
    assert array.sharding.is_equivalent_to(made["goal"], array.ndim), array.sharding
    return str(array.dtype), shards(array)


def send_steps(layout: Layout, bases: list[int]) -> float:
    """Send 0, 1, … in (8, 6) arrays; the seconds it took."""
    arrays = [put(np.full((8, 6), step, np.float32), layout, "float32") for step in range(len(bases))]
    start_s = perf_counter()
    for array, base in zip(arrays, bases, strict=True):
        made["sender"](array, base)
    return perf_counter() - start_s


def receive_steps(bases: list[int]) -> list[float]:
    """The sum of each step's array, received into a program that donates it."""
    total = jax.jit(lambda x: (x.sum(), x + 1), donate_argnums=0)
    return [float(total(made["receiver"](base))[0]) for base in bases]


def expect(base: int) -> float:
    """Ask for an array that was not sent yet; the seconds that the call took."""
    start_s = perf_counter()
    made["array"] = made["receiver"](base)
    return perf_counter() - start_s


def expected(wait: bool) -> tuple[bool, Shards]:
    """Whether that array has come, and what is in it once it has."""
    return made["array"].is_ready(), shards(made["array"]) if wait else []


def send_transposed(value: np.ndarray, layout: Layout, base: int) -> None:
    """Send an array that lies in memory column by column."""
    array = put(value, layout, str(value.dtype))
    made["sender"](jax.device_put(array, Format(MemoryLayout((1, 0)), array.sharding)), base)


def reshard(value: np.ndarray, transfer: Transfer, dtype: str) -> tuple[str, Shards]:
    """A transfer between layouts on the devices of this range."""
    move = LocalTransport(transfer, devices_of(transfer.source), dtype_of(dtype))
    array = move(put(value, transfer.source, dtype))
    return str(array.dtype), shards(array)


def answer(name: str, arguments: dict[str, Any]) -> tuple[bool, Any]:
    try:
        return True, globals()[name](**arguments)
    except Exception as error:  # noqa: BLE001 the test says what it expected
        return False, f"{type(error).__name__}: {error}"


def main(devices: int, processes: int, me: int, coordinator: str) -> None:
    # What libraries print must not get between the messages.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.distributed.initialize(coordinator, processes, me)
    made["server"] = TransferServer("127.0.0.1")
    result: Any = (True, made["server"].address)
    while True:
        pickle.dump(result, out)
        out.flush()
        result = answer(*pickle.load(sys.stdin.buffer))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
