"""Measures what emulated devices add to peaks and rings: the `Profile` of `alpa_like.calibrate`.

Every program runs on all devices and does its work several times, so that one dispatch is shared by all of it. Matmuls
and collectives are measured as a train step has them, one among the other: devices that share cores don't arrive at a
collective together, and what a matmul reads was last used long ago. Alone, both take about two thirds of that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alpa_like.cluster import CallTime, Profile

__all__ = ["dense_flops", "fastest", "profile_of", "rounded"]

_Step = Callable[[jax.Array], jax.Array]

_ROWS, _WIDTH = 128, 1024
"""Elements of a device's array in element-wise work: half a MiB, which caches hold."""

_LARGE_ROWS = 1024
"""4 MiB, which only the last cache holds: devices that take turns on a core leave nothing in the nearer ones."""

_BUFFERS = (2**12, 2**21)
"""Bytes of the buffers of collectives: one that shows the latency, one that shows the bandwidth."""

_TURNED_ROWS = (2**9, 2**10, 2**11, 2**12, 2**13)
"""Bytes from one row to the next of the matrices that are read by columns; caches don't tell longer ones apart."""

_RUNS, _TIMES, _KERNELS = 5, 8, 64

_COLLECTIVES_IN_A_ROW, _PAIRS = 8, 7
"""Collectives of a run, and pairs of runs with and without them."""

_TYPICAL_RUNS = 7
"""Runs of what is measured as in a step, where not the fastest one counts, since steps are no faster than most."""

_DENSE_LAYERS, _DENSE_ROWS, _DENSE_WIDTH = 8, 256, 512

_JOINED = ("all-reduce",)
"""XLA's CPU backend combines all-reduces, and no other collective."""


def rounded(value: float) -> float:
    """Three digits, which is more than measurements repeat to."""
    return float(f"{value:.3g}")


def fastest(step: _Step, x: jax.Array, *, calls: int = 1, runs: int = _RUNS) -> float:
    """Least seconds of `x = step(x)`, of `runs` times `calls` in a row; the first, which compiles, is left out."""
    return min(_times(step, x, calls, runs))


def _times(step: Callable[..., Any], x: Any, calls: int, runs: int) -> list[float]:
    x = jax.block_until_ready(step(x))
    times: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(calls):
            x = step(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - start) / calls)
    return times


def _paired(one: tuple[_Step, jax.Array], other: tuple[_Step, jax.Array]) -> float:
    """By how many seconds one step is longer than another: the median of pairs of runs that are close in time."""

    def seconds(step: _Step, x: jax.Array) -> float:
        start = time.perf_counter()
        jax.block_until_ready(step(x))
        return time.perf_counter() - start

    return statistics.median([seconds(*one) - seconds(*other) for _ in range(_PAIRS + 1)][1:])


def profile_of(mesh: Mesh) -> Profile:
    """The profile of the devices of a mesh of one axis."""
    empty = _seconds(mesh, lambda x: x, 8, 8)
    many = _seconds(mesh, partial(_repeat, lambda x: jnp.sin(x) + 1, _KERNELS), 8, 8)
    kernel_s = max(0.0, many - empty) / _KERNELS
    elements = _TIMES * _ROWS * _WIDTH
    simple = _seconds(mesh, partial(_repeat, _sixteen, _TIMES), _ROWS, _WIDTH) - empty
    costly = _seconds(mesh, partial(_repeat, lambda x: jnp.tanh(jnp.exp(x)), _TIMES), _ROWS, _WIDTH) - empty
    return Profile(
        rounded(kernel_s),
        rounded(max(0.0, simple) / elements / 16),
        rounded(max(0.0, costly) / elements / 2),
        rounded(_bytes_per_s(mesh, empty)),
        tuple((row, rounded(_turned_s(mesh, row))) for row in _TURNED_ROWS),
        tuple(sorted(_calls(mesh), key=lambda call: (call.kind, call.members))),
        _JOINED,
    )


def _repeat(function: _Step, times: int, x: jax.Array) -> jax.Array:
    for _ in range(times):
        x = jax.lax.optimization_barrier(function(x))
    return x


def _sixteen(x: jax.Array) -> jax.Array:
    """Eight multiplications and eight additions per element, in one kernel."""
    y = x
    for number in range(8):
        y = y * x + (number + 0.5)
    return y


def _bytes_per_s(mesh: Mesh, empty: float) -> float:
    """Of products that are kept apart from what they are made of, as most results of a step are."""

    def multiply(x: jax.Array) -> jax.Array:
        for number in range(_TIMES):
            y = jax.lax.optimization_barrier(x * (number + 1.5))
            x = jax.lax.dynamic_update_slice(x, y[:1, :1] * 1e-3, (0, 0))
        return x

    seconds = _seconds(mesh, multiply, _LARGE_ROWS, _WIDTH, typical=True) - empty
    return _TIMES * 2 * 4 * _LARGE_ROWS * _WIDTH / max(seconds, 1e-9)


def _turned_s(mesh: Mesh, row_bytes: int) -> float:
    """Seconds per element of the left side of a matmul that it takes longer if it is read by its columns."""
    rows, width, narrow = 256, row_bytes // 4, 32

    def multiply(turn: bool, x: jax.Array) -> jax.Array:
        w = x.reshape(rows, width)[:, :narrow] * 0.5
        for number in range(_TIMES):
            y = jax.lax.optimization_barrier(x * (number + 1.0))
            y = jax.lax.optimization_barrier((y.T if turn else y) @ w)
            x = jax.lax.dynamic_update_slice(x, y[:1, :1] * 1e-3, (0, 0))
        return x

    turned = _seconds(mesh, partial(multiply, True), rows, width)
    plain = _seconds(mesh, partial(multiply, False), width, rows)
    return max(0.0, turned - plain) / (_TIMES * rows * width)


def _seconds(mesh: Mesh, step: _Step, rows: int, width: int, *, typical: bool = False) -> float:
    """Seconds of a step on an array [rows, width] on each device: the least, or those of a typical run."""
    run, x = _ready(mesh, step, rows, width, ("devices",), 0.5)
    return _typical(_times(run, x, 1, _TYPICAL_RUNS)) if typical else fastest(run, x)


def _typical(times: list[float]) -> float:
    """The lower quartile: other programs on the machine only slow runs down."""
    return statistics.quantiles(times, n=4)[0]


def _ready(
    mesh: Mesh, step: Callable[..., Any], rows: int, width: int, names: tuple[str, ...], value: float
) -> tuple[Callable[..., Any], jax.Array]:
    """A step on what each device has, and an array [rows, width] on each device that is full of a value."""
    spec = PartitionSpec(names)
    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    return run, jnp.full((mesh.size * rows, width), value, jnp.float32, device=NamedSharding(mesh, spec))


def dense_flops(mesh: Mesh, profile: Profile, bandwidth: float) -> float:
    """FLOP/s per device of matmuls in a train step through dense layers, forward and backward.

    Left out is what has a price of its own: to copy left sides, and to bring operands and results through the memory.
    """
    rows, width = _DENSE_ROWS, _DENSE_WIDTH

    def loss(weights: list[jax.Array]) -> jax.Array:
        y = weights[0][:rows]
        for w in weights:
            y = y @ w
        return (y * y).sum()

    def step(weights: list[jax.Array]) -> list[jax.Array]:
        return jax.tree.map(lambda w, g: w - 1e-9 * g, weights, jax.grad(loss)(weights))

    run, weight = _ready(mesh, step, width, width, ("devices",), 1 / width)
    seconds = _typical(_times(run, [weight] * _DENSE_LAYERS, 1, 2 * _TYPICAL_RUNS)) / _DENSE_LAYERS
    others = (
        rows * width * profile.turn_s(4 * width),
        3 * 4 * (2 * rows * width + width * width) / bandwidth,  # three matmuls
        3 * 4 * width * width / profile.bytes_per_s,  # the update
    )
    return 6 * rows * width * width / max(seconds - sum(others), 0.1 * seconds)


def _calls(mesh: Mesh) -> list[CallTime]:
    """Every kind of collective among 2, 4, … devices, all groups at once."""
    sizes = [n for n in (2**k for k in range(1, mesh.size.bit_length())) if mesh.size % n == 0]
    members = sorted({*sizes, mesh.size} - {1})
    return [call for n in members for call in _calls_among(mesh, n)]


def _calls_among(mesh: Mesh, members: int) -> list[CallTime]:
    """Every kind among so many members, by a small and a large buffer; the matmuls in between are measured too."""
    groups = Mesh(mesh.devices.reshape(-1, members), ("groups", "members"))

    shapes = [_buffer_shape(nbytes, members) for nbytes in _BUFFERS]

    def ready(step: _Step, shape: tuple[int, int]) -> tuple[_Step, jax.Array]:
        return _ready(groups, partial(_among_matmuls, step), *shape, ("groups", "members"), 0.5)

    alone = {shape: ready(_nothing, shape) for shape in shapes}

    def extra(step: Callable[[int, jax.Array], jax.Array], shape: tuple[int, int]) -> float:
        """Seconds of one collective."""
        return max(1e-9, _paired(ready(partial(step, members), shape), alone[shape])) / _COLLECTIVES_IN_A_ROW

    sizes = [4.0 * rows * width for rows, width in shapes]
    return [
        _fitted(kind, members, sizes, [extra(step, shape) for shape in shapes]) for kind, step in _COLLECTIVES.items()
    ]


def _buffer_shape(nbytes: int, members: int) -> tuple[int, int]:
    """Rows and columns of floats, about so many bytes; both must be multiples of the members."""
    rows = 4 * members
    return rows, max(1, nbytes // 4 // rows // members) * members


def _fitted(kind: str, members: int, sizes: list[float], seconds: list[float]) -> CallTime:
    """seconds = latency + bytes of the buffer / bandwidth, through the times of a small and a large buffer."""
    inverse = max(seconds[1] - seconds[0], 1e-12) / (sizes[1] - sizes[0])
    latency = max(0.0, seconds[0] - inverse * sizes[0])
    return CallTime(kind, members, rounded(latency), rounded(1 / inverse))


def _among_matmuls(collective: _Step, x: jax.Array) -> jax.Array:
    y = jnp.full((_DENSE_ROWS, _DENSE_ROWS), 1e-3, jnp.float32)
    for _ in range(_COLLECTIVES_IN_A_ROW):
        y, x = jax.lax.optimization_barrier((y + x[0, 0], x))
        x, y = jax.lax.optimization_barrier((x, y @ y))
        x = collective(jax.lax.dynamic_update_slice(x, y[:1, :1], (0, 0)))
    return x


def _nothing(x: jax.Array) -> jax.Array:
    return x


def _all_reduce(members: int, x: jax.Array) -> jax.Array:
    # One element is put back, or XLA sees a sum of equal arrays and multiplies instead.
    del members
    return jax.lax.dynamic_update_slice(jax.lax.psum(x, "members"), x[:1, :1], (0, 0))


def _all_gather(members: int, x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x[: x.shape[0] // members], "members", tiled=True)


def _all_to_all(members: int, x: jax.Array) -> jax.Array:
    del members
    return jax.lax.all_to_all(x, "members", 1, 0, tiled=True).reshape(x.shape)


_COLLECTIVES: dict[str, Callable[[int, jax.Array], jax.Array]] = {
    "all-gather": _all_gather,
    "all-reduce": _all_reduce,
    "all-to-all": _all_to_all,
}
