"""`train`: the loop around a train step, with checkpoints, that goes on when workers die; `prefetch`: batches ahead."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alpa_like.api import ParallelFunction
from alpa_like.checkpoint import Saving, latest_step, restore_checkpoint, save_checkpoint
from alpa_like.chunked import ChunkedArray
from alpa_like.errors import AlpaError, ClusterError, TraceError, WorkerError
from alpa_like.runtime import session
from alpa_like.runtime.remote_arrays import RemoteArray
from alpa_like.tracer import abstract_leaf

__all__ = ["prefetch", "train"]

logger = logging.getLogger("alpa_like")

_AHEAD = 2
_POLL_S = 0.1
_GRACE_S = 3.0
_NEWS_S = 40.0
"""Ray takes up to half a minute to notice that a host is gone, while its workers already do not answer."""


def prefetch(batches: Iterable[Any], depth: int = _AHEAD) -> Iterator[Any]:
    """The same batches, read by a thread that is up to `depth` of them ahead.

    What the iterator raises is raised here, in its place. The thread ends with the iterator, or when this is closed.
    """
    if type(depth) is not int or depth < 1:
        raise TraceError(f"depth must be a whole number of at least 1, found {depth!r}")
    return _prefetched(iter(batches), depth)


def _prefetched(batches: Iterator[Any], depth: int) -> Generator[Any]:
    reader = _Reader(batches, depth)
    try:
        while (found := reader.ready.get()) is not None:
            if isinstance(found, _Failure):
                raise found.error
            yield found[0]
    finally:
        reader.closed.set()


@dataclass(frozen=True, slots=True)
class _Failure:
    """What an iterator raised."""

    error: BaseException


class _Reader:
    """A thread that reads ahead: `ready` has batches in tuples of one, then None or what the iterator raised."""

    def __init__(self, batches: Iterator[Any], depth: int) -> None:
        self.ready: queue.Queue[tuple[Any] | _Failure | None] = queue.Queue(depth)
        self.closed = threading.Event()
        self._batches = batches
        threading.Thread(target=self._read, daemon=True, name="alpa-prefetch").start()

    def _read(self) -> None:
        try:
            for batch in self._batches:
                self._offer((batch,))
                if self.closed.is_set():
                    return
            self._offer(None)
        except BaseException as error:  # noqa: BLE001 - whatever the iterator raises is raised where it is read
            self._offer(_Failure(error))

    def _offer(self, found: tuple[Any] | _Failure | None) -> None:
        """Put it where it is read, unless nobody reads any more."""
        while not self.closed.is_set():
            with contextlib.suppress(queue.Full):
                self.ready.put(found, timeout=_POLL_S)
                return


def train(
    train_step: ParallelFunction,
    state: Any,
    batches: Iterable[Any] | Callable[[int], Iterable[Any]],
    *,
    num_steps: int | None = None,
    checkpoint_directory: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    keep: int | None = 2,
    on_step: Callable[[int, Any], Any] | None = None,
) -> Any:
    """Run `train_step(state, batch)` for every batch; returns the last state. `state` is donated, if the step does so.

    The step returns the new state, or a tuple with the new state first; `on_step(step, rest)` is given what else it
    returns, the first step being 0. Reading a metric there waits for the step, so read it now and then only.

    batches: an iterable, or a function of the number of the step to begin with. They are read ahead by a thread.
    num_steps: the number of steps in all, those before a checkpoint that is there included, if not all batches.
    checkpoint_directory, checkpoint_every: write the state after every so many steps, in the background, and at the
        end, and `keep` so many checkpoints. If the directory holds checkpoints, the newest is where training goes on
        from, with the batch that comes then.

    With `alpa.init("ray", max_restarts=n)` and a checkpoint directory it goes on after the death of workers, up to n
    times: on the hosts that are left, planned again if there are fewer, from the last complete checkpoint. Batches
    since then are run again; `on_step` hears of them again.
    """
    if not isinstance(train_step, ParallelFunction):
        raise TraceError(f"train needs a function made by alpa.parallelize, found {train_step!r}")
    for name, value in (("num_steps", num_steps), ("checkpoint_every", checkpoint_every)):
        if value is not None and (type(value) is not int or value < 1):
            raise TraceError(f"{name} must be a whole number of at least 1, or None, found {value!r}")
    if checkpoint_every is not None and checkpoint_directory is None:
        raise TraceError("checkpoint_every needs a checkpoint_directory to write to")
    if session.current().max_restarts and checkpoint_directory is None:
        raise ClusterError(
            "alpa.init was given max_restarts, but there is no checkpoint to go on from: give train a "
            "checkpoint_directory"
        )
    loop = _Loop(train_step, batches, num_steps, checkpoint_directory, checkpoint_every, keep, on_step or _ignore)
    return loop.run(state)


def _ignore(step: int, rest: Any) -> None:
    del step, rest


@dataclass
class _Batches:
    """Batches by number. Those since the last complete checkpoint are kept, if they can't be read again."""

    source: Iterable[Any] | Callable[[int], Iterable[Any]]
    kept: deque[tuple[int, Any]] = field(default_factory=deque[tuple[int, Any]])
    reader: Generator[Any] | None = None
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def start(self, step: int) -> Iterator[tuple[int, Any]]:
        """(number, batch) from `step` on."""
        if callable(self.source):
            self.close()
            self.reader = _prefetched(iter(self.source(step)), _AHEAD)
            return zip(itertools.count(step), self.reader, strict=False)
        if self.reader is None:
            self.numbers = itertools.count(step)
            self.reader = _prefetched(itertools.islice(self.source, step, None), _AHEAD)
        again = [(n, batch) for n, batch in self.kept if n >= step]
        return itertools.chain(again, self._fresh(self.reader))

    def _fresh(self, reader: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        for batch in reader:
            self.kept.append((next(self.numbers), batch))
            yield self.kept[-1]

    def close(self) -> None:
        """Read no more."""
        if self.reader is not None:
            self.reader.close()

    def forget(self, step: int) -> None:
        """No batch before `step` will be asked for again."""
        while self.kept and self.kept[0][0] < step:
            self.kept.popleft()


@dataclass
class _Loop:
    train_step: ParallelFunction
    source: Iterable[Any] | Callable[[int], Iterable[Any]]
    num_steps: int | None
    directory: str | os.PathLike[str] | None
    every: int | None
    keep: int | None
    on_step: Callable[[int, Any], Any]

    def __post_init__(self) -> None:
        self.batches = _Batches(self.source)
        self.saving: Saving | None = None
        self.saved = -1
        self.shapes: Any = None

    def run(self, state: Any) -> Any:
        """The last state. However it ends, nothing reads batches or writes a checkpoint after it."""
        self.shapes = jax.tree.map(_shape, state)
        try:
            return self.attempts(state)
        finally:
            self.batches.close()
            self.abandon()

    def attempts(self, state: Any) -> Any:
        """The last state. Begins again after a death, as often as the session allows."""
        restarts = session.current().max_restarts
        while True:
            try:
                return self.steps(*self.begin(state))
            except AlpaError as error:
                if not restarts or not _workers_died(error):
                    raise
                restarts, state = restarts - 1, None
                logger.warning("%s; going on with what is left, %d restarts left", error, restarts)
            self.abandon()
            session.restart()

    def abandon(self) -> None:
        """Wait for a checkpoint that is being written, whatever becomes of it."""
        if self.saving is not None:
            with contextlib.suppress(AlpaError):
                self.saving.wait()
            self.saving = None

    def begin(self, state: Any) -> tuple[int, Any, Iterator[tuple[int, Any]]]:
        """The first step, its state and batches: from the last complete checkpoint, else the state that was given."""
        step = None if self.directory is None else latest_step(self.directory)
        if step is None:
            return 0, self.begin_fresh(state), self.batches.start(0)
        assert self.directory is not None
        batches = self.batches.start(step)
        first = next(batches, None)
        if first is not None and not self.is_compiled():
            self.train_step.compile(self.shapes, first[1])
        logger.info("going on with step %d from %s", step, self.directory)
        self.saved = step
        self.let_go(state)
        restored = restore_checkpoint(self.directory, self.train_step if self.is_compiled() else self.shapes, step)
        return step, restored, batches if first is None else itertools.chain([first], batches)

    def is_compiled(self) -> bool:
        """Whether the step has a plan for the devices of this session."""
        step = self.train_step
        return step.last_executable is not None and step._session is session.current()  # pyright: ignore[reportPrivateUsage]

    def let_go(self, state: Any) -> None:
        """Free what workers have of a state that is not needed, as it would be there twice."""
        if self.train_step.donate_argnums == "auto" or 0 in self.train_step.donate_argnums:
            for leaf in jax.tree.leaves(state):
                for part in leaf.parts if isinstance(leaf, ChunkedArray) else (leaf,):
                    if isinstance(part, RemoteArray):
                        part.delete()

    def begin_fresh(self, state: Any) -> Any:
        if state is None:
            raise ClusterError(
                "the workers were lost before there was a complete checkpoint to go on from; start training again"
            )
        if self.directory is not None and session.current().max_restarts:
            save_checkpoint(self.directory, state, 0, keep=self.keep).wait()
            self.saved = 0
        return state

    def steps(self, done: int, state: Any, batches: Iterator[tuple[int, Any]]) -> Any:
        """All steps but those that are done."""
        tree = jax.tree.structure(self.shapes)
        if self.num_steps is not None and done >= self.num_steps:
            return state
        for number, batch in batches:
            state, rest = _split(self.train_step(state, batch), tree, self.train_step)
            self.on_step(number, rest)
            done = number + 1
            self.checkpoint(state, done)
            if done == self.num_steps:
                break
        jax.block_until_ready(state)
        self.finish(state, done)
        return state

    def checkpoint(self, state: Any, step: int) -> None:
        """Begin to write one if it is time; let go of batches that will not be needed again."""
        if self.saving is not None and self.saving.done():
            self.settle()
        if self.directory is not None and self.every is not None and step % self.every == 0:
            self.settle()
            self.saving, self.saved = save_checkpoint(self.directory, state, step, keep=self.keep), step
        if not session.current().max_restarts:
            self.batches.forget(step)

    def settle(self) -> None:
        if self.saving is not None:
            self.saving.wait()
            self.batches.forget(self.saved)
            self.saving = None

    def finish(self, state: Any, step: int) -> None:
        """The last state, on disk."""
        self.settle()
        if self.directory is not None and self.saved != step:
            save_checkpoint(self.directory, state, step, keep=self.keep).wait()
            self.saved = step


def _workers_died(error: AlpaError) -> bool:
    """Whether the death of a worker is behind an error. The news of it may come later than what it has caused."""
    remote = session.current().remote
    if remote is None:
        return False
    deadline = time.monotonic() + (_NEWS_S if isinstance(error, WorkerError) else _GRACE_S)
    while remote.workers.poll_failure() is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _shape(leaf: Any) -> Any:
    """Shape and dtype of a leaf, as JAX takes it and a step returns it."""
    shape, _, weak = abstract_leaf(leaf)
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if not jnp.issubdtype(dtype, jax.dtypes.extended):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(shape, dtype, weak_type=weak)


def _split(out: Any, tree: Any, train_step: ParallelFunction) -> tuple[Any, Any]:
    """The new state, and what else a step returns."""
    if jax.tree.structure(out) == tree:
        return out, ()
    if isinstance(out, tuple) and out and jax.tree.structure(out[0]) == tree:
        return out[0], out[1] if len(out) == 2 else out[1:]
    raise TraceError(
        f"{train_step.__name__} must return the new state, or a tuple with the new state first, with the tree of the "
        f"state that it takes: expected {tree}, found {jax.tree.structure(out)}"
    )
