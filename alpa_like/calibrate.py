"""Measures the devices of this process, and keeps what it measured: `Cluster.local()`.

All devices are busy in every measurement, because emulated CPU devices share cores and memory: the figures are what
one device gets while a sharded program runs on all of them. Each figure is that of the fastest of a few runs, because
whatever else runs on the machine only slows them down. What emulated devices do as in a train step is the lower
quartile of a few; what one thing takes longer than another, such as a step with collectives than one without, is the
median of pairs of runs. Measured are

    FLOP/s per dtype     a large matmul of row-major arrays; for emulated devices also what share of that matmuls
                         reach in a step through dense layers
    memory bandwidth     an element-wise op on an array that no cache holds
    link                 all-reduces of several sizes over all devices, fitted to the formula for rings
    profile              what a kernel takes at least, and one of the library; simple and costly element-wise functions,
                         and the bytes that they read and write; what matmuls read and write beside their arithmetic,
                         and what they take longer to read by columns; what convolutions take longer that make gradients
                         of windows, or go over an odd number of channels; collectives among 2, 4, … devices, as
                         latencies of all kinds and a bandwidth of each (emulated devices only: these meet in shared
                         memory, without a ring)

The result is a JSON file in `$ALPA_LIKE_CACHE_DIR`, else `$XDG_CACHE_HOME/alpa_like`, else `~/.cache/alpa_like`, one
for each platform, kind and number of devices, jaxlib version and number of CPUs. A file that can't be read is measured
anew and replaced. Delete it, or pass `recalibrate=True`, after a change of the machine that these don't show.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib.version import __version__ as jaxlib_version

from alpa_like.cluster import Cluster, Device, Link
from alpa_like.errors import ClusterError
from alpa_like.profiling import fastest, profile_of, rounded

__all__ = ["JaxDevice", "cache_dir", "local_cluster", "measure"]

_log = logging.getLogger(__name__)

# Raise it when a measurement changes its meaning: files of other formats are measured anew.
_FORMAT = 7

# Clusters whose file could not be written, so that one process sees one set of figures all the same.
_unwritten: dict[str, Cluster] = {}

# A lone device has no peers, so nobody pays for its link; it is given its memory's bandwidth and this latency.
_LONE_LATENCY_S = 1e-6


class JaxDevice(Protocol):
    """What is asked of a `jax.Device`, which type checkers see as a variable."""

    @property
    def platform(self) -> str: ...
    @property
    def device_kind(self) -> str: ...
    def memory_stats(self) -> dict[str, Any] | None: ...


@dataclass(frozen=True, slots=True)
class _Sizes:
    """How much to measure with. A run is `calls` calls in a row; an all-reduce call does `reduces` of them."""

    rows: int
    width: int
    stream_bytes: int
    reduce_bytes: tuple[int, ...]
    calls: int
    reduces: int
    runs: int


def _sizes(platform: str, num_devices: int) -> _Sizes:
    """Emulated devices share what one CPU can do in about a second; others each work for some milliseconds."""
    if platform == "cpu":
        largest = max(2**25 // num_devices, 2**16)
        reduce_bytes = (2**12, largest // 8, largest)
        rows = max(2**13 // num_devices, 8)
        return _Sizes(rows, 1024, 2**28 // num_devices, reduce_bytes, calls=1, reduces=4, runs=5)
    return _Sizes(8192, 8192, 2**29, (2**14, 2**22, 2**26), calls=10, reduces=10, runs=5)


def local_cluster(num_devices: int | None = None, *, recalibrate: bool = False) -> Cluster:
    """The first `num_devices` (default: all) of `jax.devices()`; `Cluster.local` is its public name.

    Raises `ClusterError` if there are fewer devices, devices of several kinds, or several processes.
    """
    devices = _devices(num_devices)
    key = _key(devices)
    name = "cluster-" + "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", str(value)) for value in key.values()) + ".json"
    cluster = None if recalibrate else _load(name, key)
    if cluster is None:
        cluster = measure(devices)
        _store(name, key, cluster)
    return cluster


def _devices(num_devices: int | None) -> list[JaxDevice]:
    if jax.process_count() > 1:
        raise ClusterError(
            f"Cluster.local() measures the devices of one process, but {jax.process_count()} run here together; "
            "describe the machines with a preset or with Cluster(...)"
        )
    devices = jax.devices()
    wanted = len(devices) if num_devices is None else num_devices
    if not 1 <= wanted <= len(devices):
        raise ClusterError(
            f"asked for {wanted} devices, JAX sees {len(devices)}; for more emulated ones start Python with "
            f"JAX_NUM_CPU_DEVICES={max(wanted, 1)}"
        )
    kinds = sorted({device.device_kind for device in devices[:wanted]})
    if len(kinds) > 1:
        raise ClusterError(f"the devices of a cluster must be of one kind, found {', '.join(kinds)}")
    return devices[:wanted]


def _key(devices: Sequence[JaxDevice]) -> dict[str, Any]:
    return {
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "jaxlib": jaxlib_version,
        "cpus": os.cpu_count(),
    }


def cache_dir() -> Path:
    """Where measurements are kept. Raises `RuntimeError` if nothing says where the user's files are."""
    if chosen := os.environ.get("ALPA_LIKE_CACHE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "alpa_like"


def _load(name: str, key: dict[str, Any]) -> Cluster | None:
    if name in _unwritten:
        return _unwritten[name]
    try:
        path = cache_dir() / name
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["format"] != _FORMAT or saved["key"] != key:
            raise ClusterError("it describes other devices or an older format")
        return Cluster.from_json(saved["cluster"])
    except FileNotFoundError:
        return None
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        _log.warning("measuring the devices anew: no use of cached figures in %s (%s)", name, error)
        return None


def _store(name: str, key: dict[str, Any], cluster: Cluster) -> None:
    text = json.dumps({"format": _FORMAT, "key": key, "cluster": cluster.to_json()}, indent=1) + "\n"
    try:
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(folder / name, text)
        _unwritten.pop(name, None)
    except (OSError, RuntimeError) as error:
        _unwritten[name] = cluster
        _log.warning("the measured figures are not kept for other processes: %s", error)


def _write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the whole new one, also while several processes write."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def measure(devices: Sequence[JaxDevice]) -> Cluster:
    """One host with these devices, measured now; figures are rounded to 3 digits, which is more than they repeat to."""
    start = time.perf_counter()
    platform, kind = devices[0].platform, devices[0].device_kind
    mesh = Mesh(np.array(devices), ("devices",))
    sizes = _sizes(platform, len(devices))
    bandwidth, peaks = _memory_bandwidth(mesh, sizes), _matmul_flops(mesh, sizes, platform)
    profile, efficiency = None, 1.0
    if platform == "cpu" and len(devices) > 1:
        profile, flops_per_s = profile_of(mesh)
        peaks, efficiency = _of_peak(peaks[0][1], flops_per_s)
    device = Device(
        name=kind,
        peak_flops=peaks,
        memory_bytes=_memory_bytes(devices),
        memory_bandwidth_bytes_per_s=bandwidth,
        flops_efficiency=efficiency,
        exposed=float(platform == "cpu"),  # cores wait for what they read
    )
    link = _all_reduce_link(mesh, sizes) if len(devices) > 1 else Link(bandwidth, _LONE_LATENCY_S)
    source = f"measured by alpa_like.calibrate with jaxlib {jaxlib_version}, all devices busy"
    cluster = Cluster(f"local-{platform}", 1, len(devices), device, link, link, (source,), profile=profile)
    _log.info("measured %s in %.1f s", cluster, time.perf_counter() - start)
    return cluster


def _of_peak(peak: float, reached: float) -> tuple[tuple[tuple[str, float], ...], float]:
    """The peak, and the share of it that matmuls reach in steps; the large one of the peak may have been the slower."""
    return (("float32", max(peak, reached)),), min(1.0, rounded(reached / peak))


def _seconds_per_call(step: Callable[[jax.Array], jax.Array], x: jax.Array, sizes: _Sizes) -> float:
    return fastest(step, x, calls=sizes.calls, runs=sizes.runs)


def _split(mesh: Mesh, shape: tuple[int, ...], dtype: str, *, random: bool = False) -> jax.Array:
    """An array of `shape` on each device; random where equal numbers would save power and so run faster."""

    def make() -> jax.Array:
        whole = (mesh.size * shape[0], *shape[1:])
        return jax.random.normal(jax.random.key(0), whole, dtype) if random else jnp.zeros(whole, dtype)

    return jax.jit(make, out_shardings=NamedSharding(mesh, PartitionSpec("devices")))()


def _matmul_flops(mesh: Mesh, sizes: _Sizes, platform: str) -> tuple[tuple[str, float], ...]:
    """FLOP/s per device of `[rows, width] @ [width, width]`, for the dtypes that the platform has units for."""
    default, exact = jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST
    cases = [("float32", "float32", default)]
    if platform != "cpu":
        cases.append(("bfloat16", "bfloat16", default))
    if platform == "gpu":
        # As in the presets, float32 is true float32 on GPUs, and the default, one bfloat16 pass, on TPUs.
        cases[0] = ("float32", "float32", exact)
        cases += [("tensorfloat32", "float32", default), ("float16", "float16", default)]
    return tuple((name, _matmul_rate(mesh, sizes, dtype, precision)) for name, dtype, precision in cases)


def _matmul_rate(mesh: Mesh, sizes: _Sizes, dtype: str, precision: jax.lax.Precision) -> float:
    rows, width = sizes.rows, sizes.width
    x = _split(mesh, (rows, width), dtype, random=True)
    replicated = NamedSharding(mesh, PartitionSpec())
    weights = jax.device_put(jax.random.normal(jax.random.key(1), (width, width), dtype) / width**0.5, replicated)
    multiply = jax.jit(lambda x, weights: jnp.matmul(x, weights, precision=precision))
    seconds = _seconds_per_call(lambda x: multiply(x, weights), x, sizes)
    return rounded(2 * rows * width * width / seconds)


def _memory_bandwidth(mesh: Mesh, sizes: _Sizes) -> float:
    """Bytes per second and device of reading an array that no cache holds, and writing it in place."""
    x = _split(mesh, (sizes.stream_bytes // 4,), "float32")
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    return rounded(2 * sizes.stream_bytes / _seconds_per_call(add, x, sizes))


def _all_reduce_link(mesh: Mesh, sizes: _Sizes) -> Link:
    """Fits seconds = 2(n-1) latency + 2(n-1)/n bytes / bandwidth, each size weighing the same."""
    n = mesh.size
    steps, share = 2 * (n - 1), 2 * (n - 1) / n
    seconds = np.array([_all_reduce_seconds(mesh, sizes, size) for size in sizes.reduce_bytes])
    terms = np.array([(steps, share * size) for size in sizes.reduce_bytes]) / seconds[:, None]
    latency, inverse = (float(value) for value in np.linalg.lstsq(terms, np.ones(len(seconds)), rcond=None)[0])
    if latency <= 0 or inverse <= 0:  # noise: take each from the size that shows it best
        latency, inverse = float(seconds[0]) / steps, float(seconds[-1]) / (share * sizes.reduce_bytes[-1])
    return Link(rounded(1 / inverse), rounded(latency))


def _all_reduce_seconds(mesh: Mesh, sizes: _Sizes, size: int) -> float:
    """Several all-reduces per call, as a train step pays for one dispatch and not for each collective.

    In between one element is put back, or XLA sees a sum of equal arrays and multiplies instead.
    """

    def reduce(x: jax.Array) -> jax.Array:
        for _ in range(sizes.reduces):
            x = jax.lax.dynamic_update_slice(jax.lax.psum(x, "devices"), x[:1], (0,))
        return x

    spec = PartitionSpec("devices")
    step = jax.jit(jax.shard_map(reduce, mesh=mesh, in_specs=spec, out_specs=spec), donate_argnums=0)
    x = _split(mesh, (size // 4,), "float32")
    return _seconds_per_call(step, x, sizes) / sizes.reduces


def _memory_bytes(devices: Sequence[JaxDevice]) -> int:
    """What JAX may use of a device's memory; emulated devices share the machine's RAM."""
    stats = devices[0].memory_stats()
    if stats and stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
