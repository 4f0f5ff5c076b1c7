"""Arrays to and from files: what the processes of one mesh do for a checkpoint, by Orbax and TensorStore.

A *part* is a folder with one Orbax checkpoint, a flat dict of arrays, written by the processes of one mesh together:
each writes the shards that it holds. Any process reads any rows of any part, so that a checkpoint can be restored on
other meshes than it was saved from.
"""

from __future__ import annotations

import errno
import math
import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import SingleDeviceSharding

from alpa_like.errors import CheckpointError
from alpa_like.runtime.quiet import Quiet

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

__all__ = ["PRNG_KEYS", "PartWriter", "Source", "Wanted", "read_leaves", "reason"]

PRNG_KEYS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}
"""The dtypes of typed random keys and the implementations that JAX wraps their data with; the data is what is saved."""

_CHUNK_BYTES = 64 << 20
"""Shards are cut into chunks of at most so many bytes: what is read for a few rows is never much more than these."""
_BYTES_AHEAD = 1 << 30
"""So many bytes are read ahead of what is on the devices already."""
_BROKEN = (ValueError, KeyError, OSError, RuntimeError)
"""What Orbax and TensorStore raise where files are broken or can't be written."""


@dataclass(frozen=True, slots=True)
class Source:
    """Rows (first, last) of the array `name` in the part `folder`; the whole of it where `rows` is None."""

    folder: str
    name: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """An array to read: `sources`, joined along dim 0, have `shape`. Example: two layers, of two parts with three each:

        Wanted((Source("part_0", "w", (2, 3)), Source("part_1", "w", (0, 1))), (2, 8), "float32", sharding)

    dtype: "key<fry>" and the like for typed random keys; numbers of other sizes are converted. sharding: where it is
    to live, or None for a NumPy array. weak: make a weakly typed scalar, as Python's numbers are. An array without
    elements has no sources.
    """

    sources: tuple[Source, ...]
    shape: tuple[int, ...]
    dtype: str
    sharding: Any
    weak: bool = False


class PartWriter:
    """Writes parts, one after the other, in the background. All processes of a mesh call it alike."""

    def __init__(self) -> None:
        self._running: tuple[ocp.AsyncCheckpointer, Quiet] | None = None

    def start(self, path: str, arrays: Mapping[str, Any]) -> None:
        """Begin to write a part to the folder `path`, which must not exist; its parent must.

        arrays: arrays of the mesh with at least one element, and NumPy arrays (written by process 0). When it returns,
        they may be donated or changed. Waits for the part that was begun before. Raises `CheckpointError`.
        """
        self.wait()
        data = {name: _data(x) for name, x in arrays.items()}
        with Quiet("orbax") as quiet, _explained(), ThreadPoolExecutor(1) as thread:
            # A thread of its own, as Orbax runs an event loop: the caller may be in one, as notebooks are.
            writer = thread.submit(_begun, Path(path).absolute(), data).result()
            self._running = (writer, quiet)
            quiet.keep()

    def wait(self) -> None:
        """Return when all processes have written the part. Raises `CheckpointError`, once, where this one could not.

        A process whose peer failed waits for it in vain, for 20 minutes; other writers can begin other parts meanwhile.
        """
        if self._running is None:
            return
        (writer, quiet), self._running = self._running, None
        with quiet, _explained():
            writer.wait_until_finished()
            writer.close()


@contextmanager
def _explained() -> Generator[None]:
    """Errors of Orbax and TensorStore become a `CheckpointError` of one line."""
    try:
        yield
    except _BROKEN as error:
        raise CheckpointError(reason(error)) from error


def _begun(path: Path, data: dict[str, Any]) -> ocp.AsyncCheckpointer:
    """Orbax, writing. When this returns, it has copies of all data."""
    # Imported late: it takes a seventh of the time that all of this package takes, and sets up logging.
    import orbax.checkpoint as ocp

    group = ocp.options.MultiprocessingOptions(
        primary_host=0,
        active_processes=set(range(jax.process_count())),
        # Barriers are named by the folder: those of a part that failed in one process are never met again.
        barrier_sync_key_prefix="-".join(path.parts[-2:]),
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=group)
    writer = ocp.AsyncCheckpointer(handler, multiprocessing_options=group)
    cut = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in data}
    writer.save(path, args=ocp.args.PyTreeSave(data, save_args=cut))
    return writer


def _data(value: Any) -> Any:
    """What Orbax is given: arrays, whose buffers it copies before it returns, and the data of random keys."""
    if not isinstance(value, jax.Array):
        return np.asarray(value)
    return jax.random.key_data(value) if str(value.dtype) in PRNG_KEYS else value


def read_leaves(wanted: Sequence[Wanted]) -> list[Any]:
    """The arrays, each born in its sharding: a process reads the rows and columns that its devices hold.

    All processes of a mesh call it alike. Raises `CheckpointError` for files that are missing or broken.
    """
    opened = _opened({s for w in wanted for s in w.sources})
    return list(_ahead(_Reading(w, opened) for w in wanted))


def _ahead(readings: Iterator[_Reading]) -> Iterator[Any]:
    """The arrays in order, while those that come next are read."""
    begun: deque[_Reading] = deque()
    for reading in readings:
        begun.append(reading)
        while sum(r.nbytes for r in begun) > _BYTES_AHEAD:
            yield begun.popleft().array()
    while begun:
        yield begun.popleft().array()


def _opened(sources: set[Source]) -> dict[tuple[str, str], Any]:
    """TensorStores of the saved arrays, by folder and name."""
    shared = ts.Context({"cache_pool": {"total_bytes_limit": 100 << 20}})
    names = {(s.folder, s.name) for s in sources}
    return {(folder, name): ts.open(_spec(folder, name), context=shared) for folder, name in names}


def _spec(folder: str, name: str) -> dict[str, Any]:
    """Where Orbax keeps an array of a part: Zarr in one OCDBT database per folder. What is missing is no zero."""
    base = {"driver": "file", "path": f"{Path(folder).absolute()}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return {"driver": "zarr", "kvstore": kvstore, "open": True, "fill_missing_data_reads": False}


class _Reading:
    """An array whose shards are on the way from the files."""

    def __init__(self, wanted: Wanted, opened: Mapping[tuple[str, str], Any]) -> None:
        self._wanted = wanted
        self._view = _joined(wanted.sources, opened)
        self._shape = (*wanted.shape, *_key_dims(wanted.dtype))
        self._check()
        self._boxes = _boxes(wanted.sharding, self._shape)
        self._pending = pending = {box: self._read(box) for box in self._boxes.values()}
        size = np.dtype(np.uint32 if self._is_key else wanted.dtype).itemsize
        self.nbytes = size * sum(math.prod(b - a for a, b in box) for box in pending)

    @property
    def _is_key(self) -> bool:
        return self._wanted.dtype in PRNG_KEYS

    def _check(self) -> None:
        """The files must hold what the manifest says."""
        found = self._shape if self._view is None else tuple(self._view.shape)
        if found != self._shape or (self._view is None and math.prod(found)):
            where = ", ".join(s.folder for s in self._wanted.sources) or "no part"
            raise CheckpointError(f"{where} holds {list(found)} where {list(self._shape)} is expected")

    def _read(self, box: tuple[tuple[int, int], ...]) -> Any:
        if self._view is None:
            return None
        return self._view[tuple(slice(a, b) for a, b in box)].read(order="C")

    def _tile(self, box: tuple[tuple[int, int], ...]) -> np.ndarray[Any, Any]:
        dtype = np.uint32 if self._is_key else np.dtype(self._wanted.dtype)
        if self._view is None:
            return np.zeros([b - a for a, b in box], dtype)
        return np.asarray(_result(self._pending[box], self._wanted.sources)).astype(dtype, copy=False)

    def array(self) -> Any:
        """The array, when all its shards are here."""
        wanted, tiles = self._wanted, {box: self._tile(box) for box in self._pending}
        if wanted.sharding is None:
            return next(iter(tiles.values()))
        if wanted.weak and not wanted.shape:
            return _number(next(iter(tiles.values())).item(), wanted)
        kind = wanted.sharding.memory_kind
        shards = [
            jax.device_put(tiles[box], SingleDeviceSharding(device, memory_kind=kind))
            for device, box in self._boxes.items()
        ]
        whole = jax.make_array_from_single_device_arrays(self._shape, wanted.sharding, shards)
        if not self._is_key:
            return whole
        return jax.random.wrap_key_data(whole, impl=PRNG_KEYS[wanted.dtype])


def _number(value: complex, wanted: Wanted) -> jax.Array:
    """A weakly typed scalar, which only comes from Python's numbers."""
    if wanted.sharding.is_fully_addressable:
        made = jax.device_put(value, wanted.sharding)
    else:  # `device_put` would have the processes compare their numbers, which waits for one that failed to read
        made = jax.jit(_same, out_shardings=wanted.sharding)(value)
    return made if str(made.dtype) == wanted.dtype else made.astype(wanted.dtype)


def _same(value: Any) -> Any:
    return value


def _key_dims(dtype: str) -> tuple[int, ...]:
    """The dims that the data of one typed random key has; none for numbers."""
    if dtype not in PRNG_KEYS:
        return ()
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=PRNG_KEYS[dtype]))).shape


def _joined(sources: Sequence[Source], opened: Mapping[tuple[str, str], Any]) -> Any:
    """A virtual TensorStore of all rows, None if there are no sources."""
    views = [_result(opened[s.folder, s.name], (s,)) for s in sources]
    views = [
        v if s.rows is None else v[s.rows[0] : s.rows[1]].translate_to[(0,) * v.ndim]
        for s, v in zip(sources, views, strict=True)
    ]
    return ts.concat(views, axis=0) if len(views) > 1 else next(iter(views), None)


def _boxes(sharding: Any, shape: tuple[int, ...]) -> dict[Any, tuple[tuple[int, int], ...]]:
    """What each device of this process holds: (first, last) per dim. One entry for an array on the host."""
    places = (
        {None: (slice(None),) * len(shape)} if sharding is None else sharding.addressable_devices_indices_map(shape)
    )
    return {
        device: tuple(s.indices(dim)[:2] for s, dim in zip(index, shape, strict=True))
        for device, index in places.items()
    }


def _result(future: Any, sources: Sequence[Source]) -> Any:
    try:
        return future.result()
    except _BROKEN as error:
        folders = ", ".join(sorted({s.folder for s in sources}))
        raise CheckpointError(f"files of {folders} are missing or broken ({reason(error)})") from error


_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than is allowed",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "writing there is not permitted",
}


def reason(error: BaseException) -> str:
    """What went wrong, from an error of the operating system or a text that quotes one."""
    number, text = getattr(error, "errno", None), str(error)
    for code, reason in _REASONS.items():
        if number == code or os.strerror(code) in text:
            return reason
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}"
    line = next(iter(text.splitlines()), "") or type(error).__name__
    return line if len(line) <= 200 else f"{line[:200]}…"
