"""Measures what emulated devices add to peaks and rings: the `Profile` of `alpa_like.calibrate`.

Every program runs on all devices and does its work several times, so that one dispatch is shared by all of it. Matmuls
and collectives are measured as a train step has them, one among the other: devices that share cores don't arrive at a
collective together, and what a matmul reads was last used long ago. Alone, both take about two thirds of that.
Collectives in a row, by which a step gathers its parameters, are measured too; they take a third to a half.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alpa_like.cluster import CallTime, Profile

__all__ = ["fastest", "profile_of", "rounded"]

_Step = Callable[[jax.Array], jax.Array]
_Ready = tuple[_Step, jax.Array]

_ROWS, _WIDTH = 128, 1024
"""Elements of a device's array in element-wise work: half a MiB, which caches hold."""

_LARGE_ROWS = 1024
"""4 MiB, which only the last cache holds: devices that take turns on a core leave nothing in the nearer ones."""

_BUFFERS = (2**12, 2**21)
"""Bytes of the buffers of collectives: one that shows the latency, one that shows the bandwidth."""

_SMALL = (8, 64)
"""A matmul of so many rows and columns on each device takes no time but to start."""

_COLUMNS = (1024, 256)
"""Rows and columns of both sides of the matmul that reads its left side by columns."""

_IMAGES, _CHANNELS, _FEATURES, _WINDOW = (4, 16, 16), 64, 32, 7
"""Images on a device, the channels and features of a convolution over them whose gradient is made; features and width
of the window of one over few channels."""

_IMAGES_FIRST = ("NHWC", "HWIO", "NHWC")

_RUNS, _TIMES, _KERNELS = 5, 8, 64

_COLLECTIVES_IN_A_ROW, _PAIRS = 8, 7
"""Collectives of a run, and pairs of runs with and without something."""

_BETWEEN = 256
"""Rows and columns of the matmuls between collectives."""

_TYPICAL_RUNS = 11
"""Runs of what is measured as in a step, where not the fastest one counts, since steps are no faster than most."""

_DENSE, _DENSE_LENGTH = ((64, 512, 16), (512, 1024, 2)), 32
"""Rows, width and number of the dense layers of train steps; length of their sequences."""

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


def _once(step: Callable[..., Any], x: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(step(x))
    return time.perf_counter() - start


def _paired(one: _Ready, other: _Ready) -> float:
    """By how many seconds one step is longer than another: the median of pairs of runs that are close in time."""
    return statistics.median([_once(*one) - _once(*other) for _ in range(_PAIRS + 1)][1:])


def profile_of(mesh: Mesh) -> tuple[Profile, float]:
    """The profile of the devices of a mesh of one axis, and the FLOP/s of their matmuls in a train step."""
    empty = _seconds(mesh, lambda x: x, 8, 8)

    def start_s(kernel: _Step, rows: int, width: int) -> float:
        """Seconds that a kernel takes which has next to nothing to do."""
        many, none = (
            _ready(mesh, step, rows, width, ("devices",), 0.5)
            for step in (partial(_repeat, kernel, _KERNELS), _nothing)
        )
        return max(0.0, _paired(many, none)) / _KERNELS

    elements = _TIMES * _ROWS * _WIDTH
    simple = _seconds(mesh, partial(_repeat, _sixteen, _TIMES), _ROWS, _WIDTH) - empty
    costly = _seconds(mesh, partial(_repeat, lambda x: jnp.tanh(jnp.exp(x)), _TIMES), _ROWS, _WIDTH) - empty
    profile = Profile(
        kernel_s=rounded(start_s(lambda x: jnp.sin(x) + 1, 8, 8)),
        simple_s=rounded(max(0.0, simple) / elements / 16),
        costly_s=rounded(max(0.0, costly) / elements / 2),
        bytes_per_s=rounded(_bytes_per_s(mesh, empty)),
        library_s=rounded(start_s(_product, *_SMALL)),
        columns_s=rounded(_columns_s(mesh)),
        odd_tap_s=rounded(_odd_tap_s(mesh)),
        calls=tuple(sorted(_calls(mesh), key=lambda call: (call.kind, call.members))),
        joined=_JOINED,
    )
    profile = replace(profile, window_s=rounded(_window_s(mesh, profile.bytes_per_s)))
    flops_per_s, bytes_per_s = _reached(mesh, profile)
    return replace(profile, operand_bytes_per_s=rounded(bytes_per_s)), rounded(flops_per_s)


def _repeat(function: _Step, times: int, x: jax.Array) -> jax.Array:
    for _ in range(times):
        x = jax.lax.optimization_barrier(function(x))
    return x


def _kept_apart(function: Callable[[int, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Run a function so many times that each result is there as a whole; x is updated in place, by one element."""
    for number in range(_TIMES):
        y = jax.lax.optimization_barrier(function(number, x))
        x = jax.lax.dynamic_update_slice(x, y[:1, :1] * 1e-3, (0, 0))
    return x


def _sixteen(x: jax.Array) -> jax.Array:
    """Eight multiplications and eight additions per element, in one kernel."""
    y = x
    for number in range(8):
        y = y * x + (number + 0.5)
    return y


def _bytes_per_s(mesh: Mesh, empty: float) -> float:
    """Of products that are kept apart from what they are made of, as most results of a step are."""

    multiply = partial(_kept_apart, lambda number, x: x * (number + 1.5))
    seconds = _seconds(mesh, multiply, _LARGE_ROWS, _WIDTH, typical=True) - empty
    return _TIMES * 2 * 4 * _LARGE_ROWS * _WIDTH / max(seconds, 1e-9)


def _product(x: jax.Array) -> jax.Array:
    """A matmul that is too small to take any time."""
    return x @ jnp.full((x.shape[1], x.shape[1]), 1e-2, jnp.float32)


def _columns_s(mesh: Mesh) -> float:
    """Seconds per element of both sides that a matmul takes longer if it reads its left side by columns."""
    rows, width = _COLUMNS

    def multiply(turn: bool, x: jax.Array) -> jax.Array:
        w = x.reshape(rows, width) * 0.5
        return _kept_apart(lambda _, x: (x.T if turn else x) @ w, x)

    def ready(turn: bool, shape: tuple[int, int]) -> _Ready:
        return _ready(mesh, partial(multiply, turn), *shape, ("devices",), 0.5)

    turned, plain = ready(True, (rows, width)), ready(False, (width, rows))
    return max(0.0, _paired(turned, plain)) / (_TIMES * 2 * rows * width)


def _window_s(mesh: Mesh, bytes_per_s: float) -> float:
    """Seconds per element of both sides that the gradient of a window takes longer than the convolution.

    The copy of the left side has its own price. That of the right side, which stays the same, is made once.
    """
    pixels = math.prod(_IMAGES)

    def convolve(gradient: bool, x: jax.Array) -> jax.Array:
        images = (*_IMAGES, _CHANNELS)
        right, numbers = x.reshape(images) * 0.5, ("CHWN", "IHWO", "HWNC")
        if not gradient:
            right, numbers = jnp.broadcast_to(right[:1, :1, :1, :1], (1, 1, _CHANNELS, _CHANNELS)), _IMAGES_FIRST
        once = partial(_convolution, right=right, numbers=numbers)
        return _kept_apart(lambda _, x: once(x.reshape(images)).reshape(-1, _CHANNELS), x)

    def ready(gradient: bool) -> _Ready:
        return _ready(mesh, partial(convolve, gradient), pixels, _CHANNELS, ("devices",), 0.5)

    copied_s = 2 * 4 * pixels * _CHANNELS / bytes_per_s
    return max(0.0, _paired(ready(True), ready(False)) / _TIMES - copied_s) / (2 * pixels * _CHANNELS)


def _odd_tap_s(mesh: Mesh) -> float:
    """Seconds per position of result and window that a convolution over 3 channels takes longer than one over 4.

    The arithmetic of the fourth channel, about a tenth of that, is not added.
    """
    pixels = math.prod(_IMAGES)

    def ready(channels: int) -> _Ready:
        def once(_: int, x: jax.Array) -> jax.Array:
            window = jnp.full((_WINDOW, _WINDOW, channels, _FEATURES), 1e-2, jnp.float32)
            images = x.reshape(*_IMAGES, channels)
            return _convolution(images, window, _IMAGES_FIRST, "SAME").reshape(-1, _FEATURES)

        return _ready(mesh, partial(_kept_apart, once), pixels, channels, ("devices",), 0.5)

    return max(0.0, _paired(ready(3), ready(4))) / (_TIMES * pixels * _WINDOW**2)


def _convolution(left: jax.Array, right: jax.Array, numbers: tuple[str, str, str], padding: str = "VALID") -> jax.Array:
    return jax.lax.conv_general_dilated(left, right, (1, 1), padding, dimension_numbers=numbers)


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


def _reached(mesh: Mesh, profile: Profile) -> tuple[float, float]:
    """FLOP/s and bytes/s per device of matmuls in a train step: seconds = FLOPs / FLOP/s + bytes / bytes/s.

    Fitted through a step with many and one with few FLOPs per byte.
    """
    steps = [_dense_step(mesh, *shape) for shape in _DENSE]
    # In turns, so that what else the machine does hits both alike.
    times = [[_once(*step) for step in steps] for _ in range(_TYPICAL_RUNS + 1)]
    layers = [
        _alone(_typical([run[i] for run in times[1:]]) / depth, profile, rows, width)
        for i, (rows, width, depth) in enumerate(_DENSE)
    ]
    terms = [(6 * rows * width**2, 3 * 4 * (2 * rows * width + width**2)) for rows, width, _ in _DENSE]
    byte_s = float(np.linalg.solve(terms, layers)[1])
    # Noise may say that bytes, or all but them, take no time; each then gets a tenth of the step with many FLOPs.
    (flops, nbytes), seconds = terms[1], layers[1]
    share = min(0.9, max(0.1, byte_s * nbytes / seconds))
    return flops / ((1 - share) * seconds), nbytes / (share * seconds)


def _alone(seconds: float, profile: Profile, rows: int, width: int) -> float:
    """Seconds of the three matmuls of a dense layer in a train step, without what has a price of its own.

    That is to start them, to copy the left side of one, and to update the weights.
    """
    copied_and_updated = 4 * (2 * rows * width + 3 * width * width)
    return max(0.1 * seconds, seconds - 3 * profile.library_s - copied_and_updated / profile.bytes_per_s)


def _dense_step(mesh: Mesh, rows: int, width: int, depth: int) -> tuple[Callable[..., Any], Any]:
    """A train step through dense layers, and their weights."""

    def step(weights: list[jax.Array]) -> list[jax.Array]:
        """Gradients by hand: what `jax.grad` writes is transposed behind the matmul, which reads by columns then."""
        values = [jnp.tile(weights[0], (-(-rows // width), 1))[:rows].reshape(-1, _DENSE_LENGTH, width)]
        for w in weights:
            values.append(values[-1] @ w)
        gradient, updated = values.pop() * 1e-3, list[jax.Array]()
        for w, x in zip(reversed(weights), reversed(values), strict=True):
            updated.append(w - 1e-9 * jnp.einsum("bsi,bsj->ij", x, gradient))
            gradient = gradient @ w.T
        updated[-1] += 1e-9 * gradient[0, 0]  # or the last gradient is made for nothing, and left out
        return updated[::-1]

    run, weight = _ready(mesh, step, width, width, ("devices",), 1 / width)
    return run, [weight] * depth


def _calls(mesh: Mesh) -> list[CallTime]:
    """Every kind of collective among 2, 4, … devices, all groups at once."""
    sizes = [n for n in (2**k for k in range(1, mesh.size.bit_length())) if mesh.size % n == 0]
    members = sorted({*sizes, mesh.size} - {1})
    return [call for n in members for call in _calls_among(mesh, n)]


def _calls_among(mesh: Mesh, members: int) -> list[CallTime]:
    """Every kind among so many members: a small and a large buffer among matmuls, the small one without them too.

    Devices that share cores come to a collective at other times, the more work lies before it. So one that the step
    waits for takes longer than one of many in a row.
    """
    groups = Mesh(mesh.devices.reshape(-1, members), ("groups", "members"))

    shapes = [_buffer_shape(nbytes, members) for nbytes in _BUFFERS]

    def ready(step: _Step, shape: tuple[int, int], around: Callable[[_Step, jax.Array], jax.Array]) -> _Ready:
        return _ready(groups, partial(around, step), *shape, ("groups", "members"), 0.5)

    cases = [(shapes[0], _among_matmuls), (shapes[1], _among_matmuls), (shapes[0], _in_a_row)]
    alone = [ready(_nothing, *case) for case in cases]

    def extra(step: Callable[[int, jax.Array], jax.Array]) -> list[float]:
        """Seconds of one collective in each case."""
        pairs = [(ready(partial(step, members), *case), other) for case, other in zip(cases, alone, strict=True)]
        return [max(1e-9, _paired(*pair)) / _COLLECTIVES_IN_A_ROW for pair in pairs]

    sizes = [4.0 * rows * width for rows, width in shapes]
    return _alike([_fitted(kind, members, sizes, extra(step)) for kind, step in _COLLECTIVES.items()])


def _alike(calls: list[CallTime]) -> list[CallTime]:
    """The same calls with the latencies of the median one.

    What a small collective takes is that devices meet, whatever they then do. Latencies of one kind vary by half from
    one calibration to the next, and where they differ by noise a planner puts the kind that looks cheap for the other.
    """
    latency = statistics.median(call.latency_s for call in calls)
    queued = statistics.median(call.latency_s if call.queued_s is None else call.queued_s for call in calls)
    return [replace(call, latency_s=latency, queued_s=queued) for call in calls]


def _buffer_shape(nbytes: int, members: int) -> tuple[int, int]:
    """Rows and columns of floats, about so many bytes; both must be multiples of the members."""
    rows = 4 * members
    return rows, max(1, nbytes // 4 // rows // members) * members


def _fitted(kind: str, members: int, sizes: list[float], seconds: list[float]) -> CallTime:
    """seconds = latency + bytes of the buffer / bandwidth, through the times of a small and a large buffer.

    The third time is that of the small one in a row.
    """
    inverse = max(seconds[1] - seconds[0], 1e-12) / (sizes[1] - sizes[0])
    latency = max(0.0, seconds[0] - inverse * sizes[0])
    queued = min(latency, max(0.0, seconds[2] - inverse * sizes[0]))
    return CallTime(kind, members, rounded(latency), rounded(1 / inverse), rounded(queued))


def _among_matmuls(collective: _Step, x: jax.Array) -> jax.Array:
    y = jnp.full((_BETWEEN, _BETWEEN), 1e-3, jnp.float32)
    for _ in range(_COLLECTIVES_IN_A_ROW):
        y, x = jax.lax.optimization_barrier((y + x[0, 0], x))
        x, y = jax.lax.optimization_barrier((x, y @ y))
        x = collective(jax.lax.dynamic_update_slice(x, y[:1, :1], (0, 0)))
    return x


def _in_a_row(collective: _Step, x: jax.Array) -> jax.Array:
    return _repeat(collective, _COLLECTIVES_IN_A_ROW, x)


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
