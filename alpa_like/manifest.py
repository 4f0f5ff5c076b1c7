"""What a checkpoint holds and where, as data: written by whoever saves, read before any array is.

    directory/step_00000042/manifest.json      this
                            part_0/, part_1/   Orbax checkpoints, one per mesh that holds a part of the state

A folder without a manifest, or whose files are not those that the manifest lists, is no checkpoint. No function here
touches an array's data, so that a process that holds none can plan for those that do.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path

from alpa_like.chunked import ChunkedArray, bounds
from alpa_like.errors import CheckpointError, TraceError
from alpa_like.runtime.checkpoints import PRNG_KEYS, Source
from alpa_like.tracer import abstract_leaf

__all__ = [
    "Leaf",
    "Manifest",
    "Part",
    "Piece",
    "complete_steps",
    "described",
    "differences",
    "folder_of",
    "plan_parts",
    "read_manifest",
    "step_folders",
    "sync_folder",
]

VERSION = 1
_FILE = "manifest.json"
_FOLDER = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True, slots=True)
class Piece:
    """Where rows (first, last) of a leaf lie: all of the array `name` of a part. `rows` is None for the whole leaf."""

    part: str
    name: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf of the state. dtype: also "int" and the like for Python's numbers, "key<fry>" for typed random keys.

    The pieces are in order of their rows and hold all of them; a leaf without elements has none.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...] = ()

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    def sources(self, folder: Path, rows: tuple[int, int] | None) -> tuple[Source, ...]:
        """Where to read the leaf, or its rows (first, last)."""
        found = (_overlap(folder, p, rows) for p in self.pieces)
        return tuple(s for s in found if s is not None)


def _overlap(folder: Path, piece: Piece, rows: tuple[int, int] | None) -> Source | None:
    """What a piece has of the rows."""
    place = str(folder / piece.part)
    if rows is None:
        return Source(place, piece.name)
    start, end = piece.rows or (0, rows[1])
    first, last = max(start, rows[0]), min(end, rows[1])
    return Source(place, piece.name, (first - start, last - start)) if first < last else None


@dataclass(frozen=True, slots=True)
class Part:
    """A folder to write: the arrays, or handles of them, that `holder` holds, by name."""

    name: str
    holder: Hashable
    arrays: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """`tree` describes the state to people. `files` are the sizes in bytes of all files of the parts, by path."""

    step: int
    leaves: tuple[Leaf, ...]
    tree: str
    files: Mapping[str, int] = field(default_factory=dict[str, int])

    def write(self, folder: Path) -> None:
        """Complete the checkpoint in `folder`, whose parts must be: lists their files and reaches the disk."""
        parts = {piece.part for leaf in self.leaves for piece in leaf.pieces}
        paths = [p for part in sorted(parts) for p in sorted((folder / part).rglob("*")) if p.is_file()]
        listed = replace(self, files={str(p.relative_to(folder)): p.stat().st_size for p in paths})
        with open(folder / _FILE, "w", encoding="utf-8") as file:
            json.dump({"version": VERSION, **asdict(listed)}, file)
            file.flush()
            os.fsync(file.fileno())
        for place in (*(folder / part for part in parts), folder):
            sync_folder(place)

    def check_files(self, folder: Path) -> None:
        """Raise `CheckpointError` where a file is missing or has another size than when it was written."""
        for name, size in self.files.items():
            try:
                found = (folder / name).stat().st_size
            except OSError:
                raise CheckpointError(f"{folder} is incomplete: {name} is missing") from None
            if found != size:
                raise CheckpointError(f"{folder} is damaged: {name} has {found} bytes instead of {size}")


def sync_folder(folder: Path) -> None:
    """Let the names of a folder's files reach the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def folder_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return directory / f"step_{step:08d}"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint; `CheckpointError` if it is incomplete, damaged or of another version."""
    try:
        found = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is incomplete: {_FILE} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is damaged: {_FILE} can't be read ({error})") from None
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, but this package reads version {VERSION}; "
            "restore it with the version that wrote it"
        )
    try:
        manifest = _parsed(found)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} is damaged: {_FILE} can't be read ({error!r})") from None
    manifest.check_files(folder)
    return manifest


def _parsed(found: dict[str, Any]) -> Manifest:
    leaves = tuple(
        Leaf(x["path"], tuple(x["shape"]), x["dtype"], tuple(_piece(p) for p in x["pieces"])) for x in found["leaves"]
    )
    return Manifest(int(found["step"]), leaves, str(found["tree"]), {str(k): int(n) for k, n in found["files"].items()})


def _piece(found: dict[str, Any]) -> Piece:
    rows = found["rows"]
    return Piece(found["part"], found["name"], None if rows is None else (int(rows[0]), int(rows[1])))


def step_folders(directory: Path) -> dict[int, Path]:
    """All folders that are named as checkpoints are, newest step first, complete or not."""
    names = os.listdir(directory) if directory.is_dir() else []
    found = {int(m[1]): directory / m[0] for m in map(_FOLDER.fullmatch, names) if m}
    return dict(sorted(found.items(), reverse=True))


def complete_steps(directory: Path) -> Iterable[int]:
    """The steps whose checkpoints are complete, newest first; looks at each when it is asked for."""
    for step, folder in step_folders(directory).items():
        try:
            read_manifest(folder)
        except CheckpointError:
            continue
        yield step


def plan_parts(state: Any, step: int, holder: Callable[[Any], Hashable]) -> tuple[Manifest, tuple[Part, ...]]:
    """What is to be written where, and the manifest without its list of files. One part per holder of arrays.

    Raises `CheckpointError` for leaves that are no arrays or numbers, and for arrays that a step has taken.
    """
    held: dict[Hashable, dict[str, Any]] = {}
    flat, tree = tree_flatten_with_path(state)
    leaves: list[Leaf] = []
    for i, (path, value) in enumerate(flat):
        leaf = described(keystr(path), value)
        _check_saveable(leaf, value)
        pieces: list[Piece] = []
        for k, (chunk, rows) in enumerate(_chunks(value)):
            arrays = held.setdefault(holder(chunk), {})
            arrays[f"leaf_{i}_{k}"] = chunk
            pieces.append(Piece(f"part_{list(held).index(holder(chunk))}", f"leaf_{i}_{k}", rows))
        leaves.append(replace(leaf, pieces=tuple(pieces)))
    parts = tuple(Part(f"part_{n}", owner, arrays) for n, (owner, arrays) in enumerate(held.items()))
    return Manifest(step, tuple(leaves), str(tree)[:1000]), parts


def _chunks(value: Any) -> list[tuple[Any, tuple[int, int] | None]]:
    """What one holder has of a leaf, and its rows; nothing of arrays without elements."""
    if isinstance(value, ChunkedArray):
        found = zip(value.parts, bounds(value.lengths), strict=True)
        return [(part, rows) for part, rows in found if 0 not in part.shape]
    return [] if 0 in getattr(value, "shape", ()) else [(value, None)]


def described(path: str, value: Any) -> Leaf:
    """A leaf without its place; `CheckpointError` for what is neither an array nor a number."""
    try:
        shape, dtype, _ = abstract_leaf(value)
    except TraceError as error:
        raise CheckpointError(f"leaf {path} of the state must be an array or a number, but {error}") from None
    return Leaf(path, shape, dtype)


def _check_saveable(leaf: Leaf, value: Any) -> None:
    if isinstance(value, jax.ShapeDtypeStruct | Tracer):
        raise CheckpointError(
            f"leaf {leaf.path} is a {type(value).__name__}, which has no data; save the state that a step returned"
        )
    if getattr(value, "lost", False):
        raise CheckpointError(f"leaf {leaf.path} was on workers that have ended; go on from the last checkpoint")
    if hasattr(value, "is_deleted") and value.is_deleted():
        raise CheckpointError(
            f"leaf {leaf.path} was donated to a step and is gone; save the state that the step returned"
        )
    if leaf.dtype.startswith("key<"):
        if leaf.dtype not in PRNG_KEYS:
            raise CheckpointError(
                f"leaf {leaf.path} has random keys of type {leaf.dtype}, expected one of {', '.join(PRNG_KEYS)}; "
                "save jax.random.key_data of them"
            )
        return
    dtype = np.dtype(leaf.dtype) if hasattr(value, "shape") else np.asarray(value).dtype
    if not (jnp.issubdtype(dtype, np.number) or dtype == np.bool_):
        raise CheckpointError(f"leaf {leaf.path} must hold numbers of at most 64 bits, found {dtype} {value!r}")


def differences(saved: Iterable[Leaf], wanted: Iterable[Leaf]) -> list[str]:
    """How two states differ, leaf by leaf in the wanted one's order; a Python number is like an array of its kind."""
    there, here = {x.path: x for x in saved}, {x.path: x for x in wanted}
    changed = [_difference(x, there.get(path)) for path, x in here.items()]
    surplus = [
        f"leaf {x.path} is {x} in the checkpoint, but is not expected" for x in there.values() if x.path not in here
    ]
    return [*filter(None, changed), *surplus]


def _difference(wanted: Leaf, saved: Leaf | None) -> str:
    if saved is None:
        return f"leaf {wanted.path} is expected to be {wanted}, but is not in the checkpoint"
    if saved.shape == wanted.shape and _kind(saved.dtype) == _kind(wanted.dtype):
        return ""
    return f"leaf {wanted.path} is expected to be {wanted}, but is {saved} in the checkpoint"


def _kind(dtype: str) -> str:
    """What JAX makes of a dtype or of Python's numbers: 32 bits where it was not told to use 64."""
    return dtype if dtype.startswith("key<") else str(jax.dtypes.canonicalize_dtype(np.dtype(dtype)))
