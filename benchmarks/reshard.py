"""Moving a tensor between two meshes: bytes that cross for 50 pairs of shardings, and microseconds to dispatch.

    python -m benchmarks.reshard
    python -m benchmarks.reshard --repeats 50     # fewer timings

Bytes are counted on 8 emulated devices (all there are, on GPUs or TPUs), from the arrays that land on the target mesh
before its gather. `least` is the lower bound: every element that the target mesh lacks comes in once. `naive` is what
crosses if each receiving device fetches all that it needs, as `jax.device_put` does. `busiest` is the larger of what
one device sends and what one device receives, in shares of what crosses.

The second table is the time that a call keeps the driver busy, data at hand, median; `device_put` is JAX's own between
the same shardings. Where that has to cut or join tiles of several devices, it would also wait for data not at hand and
copy through the host; where it replicates, it moves several times the bytes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import alpa_like as alpa
from alpa_like.reshard import Layout, Transfer, lower_bound_bytes, plan_transfer
from alpa_like.runtime.local import LocalTransport
from alpa_like.runtime.transport import sharding_of
from benchmarks.common import parser, ratio, table

SHAPE = (24, 64, 96)
DTYPE = jnp.bfloat16

# Mesh, first device and mesh axes per dim: `2x2@4:x,-,y` splits dim 0 over x and dim 2 over y on devices 4 to 7.
SOURCES = ("1@0:-,-,-", "3@0:x,-,-", "4@0:x,-,-", "4@0:-,-,-", "2x2@0:x,-,y", "2x2@0:-,x,-")
TARGETS = (
    "1@4:-,-,-",
    "2@4:x,-,-",
    "3@4:-,-,x",
    "4@4:x,-,-",
    "4@4:-,-,x",
    "4@4:-,-,-",
    "2x2@4:x,-,-",
    "2x2@4:x,y,-",
)
PAIRS = (*((s, t) for s in SOURCES for t in TARGETS), ("4@0:x,-,-", "4@2:x,-,-"), ("4@0:x,-,-", "6@2:-,-,-"))

TIMED = (
    ("one device to one", "1@0:-,-,-", "1@4:-,-,-"),
    ("equal tiles", "4@0:x,-,-", "4@4:x,-,-"),
    ("one to four", "1@0:-,-,-", "4@4:x,-,-"),
    ("four to two", "4@0:x,-,-", "2@4:x,-,-"),
    ("other dim", "4@0:x,-,-", "4@4:-,-,x"),
    ("replicated", "4@0:-,-,-", "4@4:-,-,-"),
    ("three to four", "3@0:x,-,-", "4@4:x,-,-"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the two tables."""
    options = _options(arguments)
    alpa.init(num_devices=8)
    size = math.prod(SHAPE) * jnp.dtype(DTYPE).itemsize
    print(f"{jnp.dtype(DTYPE).name}{list(SHAPE)}, {size} bytes; bytes that cross between the meshes\n")
    rows = [_bytes_row(source, target) for source, target in PAIRS]
    print(table(("source -> target", "moved", "least", "ratio", "naive", "naive ratio", "busiest"), rows))
    print(f"\nmicroseconds to dispatch, median of {options.repeats}\n")
    heads = ("transfer", "source -> target", "pieces", "ours us", "device_put us")
    print(table(heads, [_time_row(*timed, options.repeats) for timed in TIMED]))


def _layout(text: str) -> Layout:
    mesh, rest = text.split("@")
    first, spec = rest.split(":")
    sizes = tuple(map(int, mesh.split("x")))
    names = ("x", "y", "z")[: len(sizes)]
    axes = tuple(tuple(names.index(n) for n in dim if n != "-") for dim in spec.split(","))
    return Layout(sizes, names, (int(first), math.prod(sizes)), axes)


def _prepared(source: str, target: str) -> tuple[Transfer, LocalTransport, Any]:
    """The transfer, what moves it, and an array to move."""
    before = _layout(source)
    transfer = plan_transfer(SHAPE, jnp.dtype(DTYPE).itemsize, before, _layout(target))
    value = jax.device_put(np.ones(SHAPE, DTYPE), sharding_of(before, jax.devices()))
    return transfer, LocalTransport(transfer, jax.devices(), DTYPE), value


def _bytes_row(source: str, target: str) -> tuple[str, ...]:
    transfer, transport, value = _prepared(source, target)
    moved = _landed_bytes(transfer, transport.send(value))
    least = lower_bound_bytes(SHAPE, transfer.itemsize_bytes, transfer.source, transfer.target)
    naive = _naive_bytes(transfer, value)
    busiest = max(transfer.busiest_sender_bytes, transfer.busiest_receiver_bytes)
    shares = f"{ratio(moved, least):.3f}", str(naive), f"{ratio(naive, least):.3f}", f"{ratio(busiest, moved):.3f}"
    return f"{source} -> {target}", str(moved), str(least), *shares


def _landed_bytes(transfer: Transfer, landed: Sequence[jax.Array]) -> int:
    """Bytes of the shards that came from outside the target mesh."""
    shards = [shard.data for array in landed for shard in array.addressable_shards]
    return sum(s.nbytes for s, (_, d, _) in zip(shards, transfer.sends, strict=True) if d not in transfer.target.ids)


def _naive_bytes(transfer: Transfer, value: jax.Array) -> int:
    """Bytes if each device of the target fetches from outside the mesh what no device of the mesh has, for itself."""
    lacking, inside = np.ones(SHAPE, bool), [jax.devices()[i] for i in transfer.target.ids]
    for shard in value.addressable_shards:
        if shard.device in inside:
            lacking[shard.index] = False
    indices = sharding_of(transfer.target, jax.devices()).devices_indices_map(SHAPE).values()
    return sum(int(lacking[index].sum()) for index in indices) * transfer.itemsize_bytes


def _time_row(name: str, source: str, target: str, repeats: int) -> tuple[str, ...]:
    transfer, transport, value = _prepared(source, target)
    sharding = sharding_of(transfer.target, jax.devices())
    ours = _median_us(transport, value, repeats)
    theirs = _median_us(lambda v: jax.device_put(v, sharding), value, repeats)
    return name, f"{source} -> {target}", str(len(transfer.sends)), f"{ours:.0f}", f"{theirs:.0f}"


def _median_us(move: Callable[[Any], Any], value: Any, repeats: int) -> float:
    """Of calls with a new array each: JAX caches the shards of one that it has seen."""
    fresh = jax.jit(jnp.copy, out_shardings=value.sharding)
    times: list[float] = []
    for _ in range(repeats + 3):
        array = jax.block_until_ready(fresh(value))
        start = time.perf_counter()
        moved = move(array)
        times.append(time.perf_counter() - start)
        jax.block_until_ready(moved)
    return statistics.median(times[3:]) * 1e6


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--repeats", type=int, default=200, help="timed calls of each transfer")
    return p.parse_args(arguments)


if __name__ == "__main__":
    main()
