"""`save_checkpoint` and `restore_checkpoint`: a state to a folder and back, on these devices or on others.

Saving: plan the parts, let whoever holds the arrays write them to a hidden folder, list their files, rename.
Restoring: read the manifest, compare it with what is wanted, let whoever is to hold the arrays read their rows.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import operator
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.tree_util import keystr, tree_flatten_with_path

from alpa_like.api import ParallelFunction
from alpa_like.chunked import ChunkedArray, Parts, bounds
from alpa_like.errors import CheckpointError, PlanError, WorkerError
from alpa_like.manifest import (
    Leaf,
    Manifest,
    Part,
    complete_steps,
    described,
    differences,
    folder_of,
    plan_parts,
    read_manifest,
    step_folders,
    sync_folder,
)
from alpa_like.runtime import session
from alpa_like.runtime.checkpoints import PartWriter, Wanted, read_leaves, reason
from alpa_like.runtime.executable import Executable, place_of
from alpa_like.runtime.remote_store import RemoteStore
from alpa_like.tracer import Trace, abstract_leaf

__all__ = [
    "LocalStore",
    "Restoring",
    "Saving",
    "Store",
    "check_directory",
    "check_keep",
    "latest_step",
    "restore_checkpoint",
    "restoring",
    "save_checkpoint",
    "set_aside",
    "survey",
]

logger = logging.getLogger("alpa_like")

_HIDDEN = ".tmp-"
"""What the names of folders begin with that are being written or removed."""


class Store(Protocol):
    """Whoever holds the arrays: this process, or workers of whose arrays this process has handles."""

    def holder(self, array: Any) -> Hashable:
        """Who writes an array or number: those with equal holders go to one part."""
        ...

    def start(self, folder: Path, parts: Sequence[Part]) -> Callable[[], None]:
        """Begin to write the parts to folders of their names in `folder`; afterwards the arrays may be donated.

        Returns a function that waits until all parts are complete and raises what went wrong; a thread calls it.
        """
        ...

    def read(self, wanted: Sequence[Wanted]) -> list[Any]:
        """The arrays, each in its sharding; `CheckpointError` for files that are missing or broken."""
        ...


class LocalStore:
    """The arrays are in this process: one part, whatever meshes they are on."""

    def holder(self, array: Any) -> Hashable:
        del array

    def start(self, folder: Path, parts: Sequence[Part]) -> Callable[[], None]:
        writer = PartWriter()
        for part in parts:
            writer.start(str(folder / part.name), part.arrays)
        return writer.wait

    def read(self, wanted: Sequence[Wanted]) -> list[Any]:
        return read_leaves(wanted)


def _store() -> Store:
    """Who holds the arrays of this session."""
    remote = session.current().remote
    return LocalStore() if remote is None else RemoteStore(remote)


class Saving:
    """A checkpoint that is being written. `path` is where it will be."""

    def __init__(self, path: Path, future: Future[None]) -> None:
        self.path = path
        self._future = future
        self._told = False

    def done(self) -> bool:
        """Whether the writing has ended, well or not."""
        return self._future.done()

    def wait(self) -> Path:
        """The checkpoint's folder, once it is complete.

        Raises `CheckpointError` where it could not be written, `WorkerError` where a worker died.
        """
        error = self.failure()
        self._told = True
        if error is not None:
            raise error
        return self.path

    def failure(self) -> CheckpointError | WorkerError | None:
        """What went wrong, once the writing has ended; None if nobody needs to be told, or was already."""
        error = self._future.exception()
        return None if error is None else _failure(self.path, error)

    @property
    def told(self) -> bool:
        """Whether somebody waited and so knows how it ended."""
        return self._told

    def __repr__(self) -> str:
        return f"Saving({str(self.path)!r}, {'ended' if self.done() else 'running'})"


class _Saver:
    """Completes checkpoints one at a time, in a thread that the end of the interpreter waits for."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "alpa-checkpoint")
        self._last: Saving | None = None
        _before_exit(self._report)

    def begin(self, path: Path, finish: Callable[[], None]) -> Saving:
        """Run `finish` in the thread."""
        self._last = Saving(path, self._pool.submit(finish))
        return self._last

    def settle(self) -> None:
        """Wait for the last save. Raises its error if nobody was told of it."""
        last, self._last = self._last, None
        if last is not None and not last.told:
            last.wait()

    def pause(self) -> None:
        """Wait for the last save, whatever becomes of it."""
        if self._last is not None:
            self._last.failure()

    def _report(self) -> None:
        """Before the interpreter ends: an error that nobody was told of goes to the log."""
        error = self._last.failure() if self._last is not None else None
        if self._last is not None and error is not None and not self._last.told:
            logger.error("%s", error)


def _before_exit(function: Callable[[], None]) -> None:
    """Call a function at the end of the interpreter while threads can still be started, which Orbax does.

    `atexit` would come later, when `concurrent.futures` refuses all work. Only a private name of `threading` comes
    before that; a test ends a process in mid-save.
    """
    getattr(threading, "_register_atexit", atexit.register)(function)


_saver = _Saver()


def save_checkpoint(directory: str | os.PathLike[str], state: Any, step: int, *, keep: int | None = None) -> Saving:
    """Begin to write `state` to `directory/step_…`; it may be donated to the next step at once.

    A checkpoint appears when it is complete, under a new name: a crash or a full disk at any moment leaves the earlier
    ones as they are. keep: how many of the newest to keep, all if None; older ones go when the new one is complete. One
    program at a time saves to a directory, which all hosts must see under the same path.

    Returns a `Saving`: `.wait()` returns the folder when it is complete. Raises `CheckpointError` where the step is
    there already, a leaf can't be saved, or nothing can be written; also for an earlier save that failed since, unless
    `.wait()` told so.
    """
    place, number = _directory(directory), _step(step)
    check_keep(keep)
    _saver.settle()
    final = folder_of(place, number)
    _check_absent(final)
    store = _store()
    manifest, parts = plan_parts(state, number, store.holder)
    temporary = final.with_name(f"{_HIDDEN}{final.name}-{secrets.token_hex(4)}")
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, temporary, ignore_errors=True)
        wait = _started(store, temporary, final, parts)
        undo.pop_all()
    return _saver.begin(final, lambda: _finish(wait, manifest, temporary, final, keep))


def check_keep(keep: Any) -> None:
    """Raise `CheckpointError` for what is no number of checkpoints to keep."""
    if keep is not None and (type(keep) is not int or keep < 1):
        raise CheckpointError(f"keep must be a whole number of at least 1, or None to keep all, found {keep!r}")


def check_directory(directory: str | os.PathLike[str]) -> None:
    """Raise `CheckpointError` where no checkpoint can be written to. Makes the folder."""
    place = _directory(directory)
    try:
        for folder in (place, *place.parents):
            if folder.exists() and not folder.is_dir():
                raise CheckpointError(f"{folder} is a file; a directory is needed for checkpoints")
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise CheckpointError(f"no checkpoint can be written to {place}: {reason(error)}") from error


def _directory(directory: str | os.PathLike[str]) -> Path:
    if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
        raise CheckpointError(f"the directory of a checkpoint must be the path of a folder, found {directory!r}")
    if "://" in os.fspath(directory):
        raise CheckpointError(
            f"a checkpoint goes to a folder, found the address {directory}; mount it and give its path"
        )
    return Path(directory).absolute()


def _step(step: int) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        raise CheckpointError(f"step must be a whole number from 0 on, found {step!r}") from None
    if number < 0:
        raise CheckpointError(f"step must be a whole number from 0 on, found {number}")
    return number


def _check_absent(final: Path) -> None:
    """A complete checkpoint is never replaced; what is left of a broken one is renamed."""
    if not final.exists():
        return
    try:
        read_manifest(final)
    except CheckpointError:
        return
    raise CheckpointError(f"{final} is there already; remove it first, or save to another directory")


def _started(store: Store, temporary: Path, final: Path, parts: Sequence[Part]) -> Callable[[], None]:
    """Begin to write; what earlier attempts left behind goes first."""
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        for left in temporary.parent.glob(f"{_HIDDEN}step_*"):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        return store.start(temporary, parts)
    except (OSError, ValueError, RuntimeError) as error:
        raise _failure(final, error) from error


def _finish(wait: Callable[[], None], manifest: Manifest, temporary: Path, final: Path, keep: int | None) -> None:
    """Complete a checkpoint, or leave nothing of it."""
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, temporary, ignore_errors=True)
        wait()
        manifest.write(temporary)
        if final.exists():
            logger.warning("%s was damaged; it is kept as %s", final, set_aside(final))
        temporary.rename(final)
        undo.pop_all()
    sync_folder(final.parent)
    if keep is not None:
        _prune(final.parent, manifest.step, keep)


def _prune(directory: Path, step: int, keep: int) -> None:
    """Remove complete checkpoints but for the newest `keep`, and never the one of `step`."""
    old = list(complete_steps(directory))[keep:]
    for number in old:
        if number != step:
            _remove(folder_of(directory, number))


def _remove(folder: Path) -> None:
    """Remove a folder; at no moment is there half of it under its name."""
    hidden = folder.with_name(f"{_HIDDEN}{folder.name}-{secrets.token_hex(4)}")
    try:
        folder.rename(hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, reason(error))


def set_aside(folder: Path) -> Path:
    """Give a damaged checkpoint another name, which no checkpoint will have; returns it."""
    names = (folder.with_name(f"{folder.name}.damaged{suffix}") for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    free = next(name for name in names if not name.exists())
    try:
        return folder.rename(free)
    except OSError as error:
        logger.warning("%s could not be renamed: %s", folder, reason(error))
        return folder


def _failure(path: Path, error: BaseException) -> CheckpointError | WorkerError:
    """One sentence about a save that failed, and what there is. A worker's death stays one, with all that it says."""
    if isinstance(error, WorkerError):
        return WorkerError(f"saving {path} failed: {error}")
    return CheckpointError(f"saving {path} failed: {reason(error)}; {_last_complete(path.parent)}")


def _last_complete(directory: Path, before: int | None = None) -> str:
    steps = (s for s in complete_steps(directory) if before is None or s < before)
    step = next(iter(steps), None)
    return (
        "no earlier checkpoint is complete" if step is None else f"the last complete checkpoint is that of step {step}"
    )


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """The newest step with a complete checkpoint, None if there is none. One that is being written does not count."""
    return next(iter(complete_steps(_directory(directory))), None)


def restore_checkpoint(directory: str | os.PathLike[str], like: Any, step: int | None = None) -> Any:
    """The state of a step, the newest complete one if `step` is None, born sharded: no device holds more than its part.

    like: a parallelized step that was planned, compiled or called, or an `Executable`: the state is where its plan
    wants it, on whatever devices it was saved from. Or a pytree of arrays or `jax.ShapeDtypeStruct`s with the tree of
    the state: each leaf is where that of `like` is.

    Raises `CheckpointError` where there is no complete checkpoint, where its files are broken, and where its state has
    other leaves, shapes or dtypes than `like`; `PlanError` for a step without a plan.
    """
    found = restoring(directory, like, step)
    try:
        return found.read()
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_last_complete(_directory(directory), found.manifest.step)}") from error


def restoring(directory: str | os.PathLike[str], like: Any, step: int | None = None) -> Restoring:
    """A checkpoint that holds what is wanted; raises as `restore_checkpoint`, but for files that nobody has read."""
    place = _directory(directory)
    _saver.pause()
    folder, manifest = _found(place, None if step is None else _step(step))
    tree, aims = _aims(like, manifest)
    _check_alike(folder, manifest, aims)
    return Restoring(folder, manifest, tree, aims)


@dataclass(frozen=True)
class Restoring:
    """The checkpoint in `folder`, which holds a state of this tree."""

    folder: Path
    manifest: Manifest
    tree: Any
    aims: Sequence[_Aim]

    def read(self) -> Any:
        """The state, born sharded. Raises `CheckpointError` where its files are broken."""
        saved = {leaf.path: leaf for leaf in self.manifest.leaves}
        wanted = [aim.wanted(saved[aim.leaf.path], self.folder) for aim in self.aims]
        arrays = iter(_store().read([w for group in wanted for w in group]))
        leaves = [aim.made([next(arrays) for _ in group]) for aim, group in zip(self.aims, wanted, strict=True)]
        return jax.tree.unflatten(self.tree, leaves)


def survey(directory: str | os.PathLike[str]) -> tuple[list[int], dict[int, str]]:
    """The steps with complete checkpoints, newest first, and what is wrong with those of other steps."""
    complete: list[int] = []
    broken: dict[int, str] = {}
    for step, folder in step_folders(_directory(directory)).items():
        try:
            read_manifest(folder)
        except CheckpointError as error:
            broken[step] = str(error)
        else:
            complete.append(step)
    return complete, broken


def _found(directory: Path, step: int | None) -> tuple[Path, Manifest]:
    """The checkpoint to restore and what it holds."""
    if step is None:
        return _newest(directory)
    folder = folder_of(directory, step)
    try:
        if not folder.is_dir():
            raise CheckpointError(f"{directory} has no checkpoint of step {step}")
        return folder, read_manifest(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_last_complete(directory, step)}") from None


def _newest(directory: Path) -> tuple[Path, Manifest]:
    """The newest complete checkpoint; newer ones that are broken are named in the log."""
    broken: list[str] = []
    for folder in step_folders(directory).values():
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            broken.append(str(error))
            continue
        for text in broken:
            logger.warning("%s; restoring step %d", text, manifest.step)
        return folder, manifest
    raise CheckpointError("; ".join([f"{directory} holds no complete checkpoint", *broken]))


@dataclass(frozen=True)
class _Aim:
    """What a leaf is to become: `value` is the array, number or `jax.ShapeDtypeStruct` that it is to be like."""

    leaf: Leaf
    value: Any
    place: Any

    def wanted(self, saved: Leaf, folder: Path) -> list[Wanted]:
        """What to read: one array per part of a `ChunkedArray`."""
        shape, dtype = self.leaf.shape, self.leaf.dtype
        if not isinstance(self.place, Parts):
            weak = abstract_leaf(self.value)[2]
            return [Wanted(saved.sources(folder, None), shape, dtype, self.place, weak)]
        rows = zip(bounds(self.place.lengths), self.place.shardings, strict=True)
        return [Wanted(saved.sources(folder, (a, b)), (b - a, *shape[1:]), dtype, s) for (a, b), s in rows]

    def made(self, arrays: Sequence[Any]) -> Any:
        """The leaf, from what was read."""
        if isinstance(self.place, Parts):
            return ChunkedArray(arrays)
        if not hasattr(self.value, "shape"):
            return type(self.value)(arrays[0].item())
        return arrays[0][()] if isinstance(self.value, np.generic) else arrays[0]


def _aims(like: Any, manifest: Manifest) -> tuple[Any, list[_Aim]]:
    """The tree of the state that is wanted, and its leaves."""
    if not isinstance(like, ParallelFunction | Executable):
        flat, tree = tree_flatten_with_path(like)
        return tree, [_Aim(described(keystr(p), x), x, _place(x)) for p, x in flat]
    states = _states(_traced(like))
    names = {leaf.path for leaf in manifest.leaves}
    state = max(states, key=lambda s: len(names & {keystr(p) for p, _ in tree_flatten_with_path(s)[0]}))
    flat, tree = tree_flatten_with_path(state)
    arguments = state if state is states[-1] and len(states) > 1 else (state,)
    places = [p for a in arguments for p in jax.tree.structure(a).flatten_up_to(like.state_shardings(a))]
    return tree, [_Aim(described(keystr(p), x), x, s) for (p, x), s in zip(flat, places, strict=True)]


def _place(value: Any) -> Any:
    """Where a leaf like this one is to live; None for NumPy arrays and numbers, which stay as they are."""
    if getattr(value, "lost", False) and session.current().remote is None:
        raise CheckpointError(
            "like has arrays of workers that have ended, and now there are none; give the step, or jax.eval_shape of "
            "what makes the state"
        )
    place = place_of(value)
    return (
        SingleDeviceSharding(jax.devices()[0]) if place is None and isinstance(value, jax.ShapeDtypeStruct) else place
    )


def _traced(like: ParallelFunction | Executable) -> Trace:
    """The step that was planned."""
    if isinstance(like, Executable):
        return like.traced
    if like.last_trace is None:
        raise PlanError(
            f"{like.__name__} has no plan yet, so where the state is to live is open; "
            f"call {like.__name__}.compile(state, batch) first, with arrays or with shapes such as jax.eval_shape gives"
        )
    return like.last_trace


def _states(traced: Trace) -> list[Any]:
    """What may have been saved: any argument without the batch, and, if there are several, all of them in a tuple."""
    numbers = iter(range(len(traced.arguments)))
    found: list[Any] = []
    for argument in traced.abstract_arguments():
        mine = {next(numbers) for _ in jax.tree.leaves(argument)}
        if mine and not mine & set(traced.batch):
            found.append(argument)
    if not found:
        raise PlanError(f"{traced.name} takes nothing but the batch; expected an argument that holds the state")
    return found if len(found) == 1 else [*found, tuple(found)]


def _check_alike(folder: Path, manifest: Manifest, aims: Sequence[_Aim]) -> None:
    """Raise `CheckpointError` where the checkpoint has other leaves than are wanted."""
    found = differences(manifest.leaves, [aim.leaf for aim in aims])
    if not found:
        return
    more = (
        ""
        if len(found) == 1
        else f", and {len(found) - 1} other {'leaf differs' if len(found) == 2 else 'leaves differ'}"
    )
    raise CheckpointError(
        f"{folder} holds the state of another model: {found[0]}{more}; restore it with the model that it was saved from"
    )
