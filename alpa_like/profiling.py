"""Measures what emulated devices add to peaks and rings: the `Profile` of `alpa_like.calibrate`.

Every program runs on all devices and does its work several times, so that one dispatch is shared by all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alpa_like.cluster import CallTime, Profile

__all__ = ["fastest", "profile_of", "rounded"]

_Step = Callable[[jax.Array], jax.Array]

_ROWS, _WIDTH = 128, 1024
"""Elements of a device's array in element-wise work: half a MiB, which caches hold."""

_BUFFERS = (2**12, 2**21)
"""Bytes of the buffers of collectives: one that shows the latency, one that shows the bandwidth."""

_RUNS, _TIMES, _KERNELS = 5, 8, 64

_JOINED = ("all-reduce",)
"""XLA's CPU backend combines all-reduces, and no other collective."""


def rounded(value: float) -> float:
    """Three digits, which is more than measurements repeat to."""
    return float(f"{value:.3g}")


def fastest(step: _Step, x: jax.Array, *, calls: int = 1, runs: int = _RUNS) -> float:
    """Least seconds of `x = step(x)`, of `runs` times `calls` in a row; the first, which compiles, is left out."""
    x = jax.block_until_ready(step(x))
    times: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(calls):
            x = step(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - start) / calls)
    return min(times)


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
        _transposed_s(mesh),
        tuple(sorted(_calls(mesh, empty), key=lambda call: (call.kind, call.members))),
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


def _transposed_s(mesh: Mesh) -> float:
    """Seconds per element of the left side of a matmul that it takes longer if it is read across rows."""
    n, times = 512, _TIMES // 2

    def multiply(turn: bool, x: jax.Array) -> jax.Array:
        w = x[:, : n // 2] * 0.5
        for _ in range(times):
            y = jax.lax.optimization_barrier((x.T if turn else x) @ w)
            x = jax.lax.dynamic_update_slice(x, y[:1, :1] * 1e-3, (0, 0))
        return x

    plain, turned = (_seconds(mesh, partial(multiply, turn), n, n) for turn in (False, True))
    return rounded(max(0.0, turned - plain) / (times * n * n))


def _seconds(mesh: Mesh, step: _Step, rows: int, width: int, names: tuple[str, ...] = ("devices",)) -> float:
    """Seconds of a step on an array [rows, width] on each device."""
    spec = PartitionSpec(names)
    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jnp.full((mesh.size * rows, width), 0.5, jnp.float32, device=NamedSharding(mesh, spec))
    return fastest(run, x)


def _calls(mesh: Mesh, empty: float) -> list[CallTime]:
    """Every kind of collective among 2, 4, … devices, all groups at once."""
    sizes = [n for n in (2**k for k in range(1, mesh.size.bit_length())) if mesh.size % n == 0]
    members = sorted({*sizes, mesh.size} - {1})
    return [_call(mesh, empty, kind, n) for kind in _COLLECTIVES for n in members]


def _call(mesh: Mesh, empty: float, kind: str, members: int) -> CallTime:
    """Fits seconds = latency + bytes of the buffer / bandwidth to a small and a large buffer."""
    devices = mesh.devices.reshape(-1, members)
    groups, seconds = Mesh(devices, ("groups", "members")), list[float]()
    for nbytes in _BUFFERS:
        step = partial(_repeat, partial(_COLLECTIVES[kind], members), _TIMES)
        # Rows and columns must both be multiples of the members.
        width = nbytes // 4 // (4 * members)
        whole = _seconds(groups, step, 4 * members, width // members * members, ("groups", "members"))
        seconds.append(max(whole - empty, 1e-9) / _TIMES)
    small, large = seconds
    inverse = max(large - small, 1e-12) / (_BUFFERS[1] - _BUFFERS[0])
    latency = max(0.0, small - inverse * _BUFFERS[0])
    return CallTime(kind, members, rounded(latency), rounded(1 / inverse))


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
