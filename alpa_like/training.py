"""`train`: the loop around a train step, with checkpoints, that goes on when workers die."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alpa_like.api import ParallelFunction
from alpa_like.batches import Batches, prefetch
from alpa_like.checkpoint import (
    Saving,
    check_directory,
    check_keep,
    restoring,
    save_checkpoint,
    set_aside,
    survey,
)
from alpa_like.chunked import ChunkedArray
from alpa_like.errors import AlpaError, CheckpointError, ClusterError, ProgramError, TraceError, WorkerError
from alpa_like.manifest import folder_of
from alpa_like.runtime import session
from alpa_like.runtime.remote_arrays import RemoteArray
from alpa_like.tracer import abstract_leaf

__all__ = ["prefetch", "train"]

logger = logging.getLogger("alpa_like")

_POLL_S = 0.1
_GRACE_S = 3.0
_NEWS_S = 40.0
"""Ray takes up to half a minute to notice that a host is gone, while its workers already do not answer."""


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

    batches: an iterable, of all batches from the first step of all on, or a function of the number of the step to
        begin with. They are read ahead by a thread.
    num_steps: the number of steps in all, those before a checkpoint that is there included, if not all batches.
    checkpoint_directory, checkpoint_every: write the state after every so many steps, in the background, and at the
        end, and `keep` so many checkpoints. If the directory holds checkpoints, the newest that can be read is where
        training goes on from, with the batch that comes then; newer ones that are damaged are renamed. One that can't
        be written is told in the log, the last one by `CheckpointError`. If batches or `on_step` raise, the newest
        state is saved first.

    With `alpa.init("ray", max_restarts=n)` and a checkpoint directory it goes on after the death of workers, up to n
    times: on the hosts that are left, planned again if there are fewer, from the last complete checkpoint. Batches
    since then are run again; `on_step` hears of them again.
    """
    _check(train_step, num_steps, checkpoint_directory, checkpoint_every, keep, on_step)
    source = Batches(batches)
    loop = _Loop(train_step, source, num_steps, checkpoint_directory, checkpoint_every, keep, on_step or _ignore)
    return loop.run(state)


def _check(train_step: Any, num_steps: Any, directory: Any, every: Any, keep: Any, on_step: Any) -> None:
    """Raise what is wrong with the arguments, before anything runs."""
    if not isinstance(train_step, ParallelFunction):
        raise TraceError(f"train needs a function made by alpa.parallelize, found {train_step!r}")
    for name, value in (("num_steps", num_steps), ("checkpoint_every", every)):
        if value is not None and (type(value) is not int or value < 1):
            raise TraceError(f"{name} must be a whole number of at least 1, or None, found {value!r}")
    if on_step is not None and not callable(on_step):
        raise TraceError(f"on_step must be a function of a step's number and what else it returns, found {on_step!r}")
    check_keep(keep)
    if directory is None:
        _check_undirected(every)
        return
    if not isinstance(directory, str | os.PathLike):
        raise TraceError(f"checkpoint_directory must be the path of a folder, found {directory!r}")
    check_directory(directory)
    if every is None and session.current().max_restarts:
        logger.warning(
            "train was given no checkpoint_every: only the state before the first step and the last one are saved, so "
            "after the death of a worker all steps are run again"
        )


def _check_undirected(every: int | None) -> None:
    if every is not None:
        raise TraceError("checkpoint_every needs a checkpoint_directory to write to")
    if session.current().max_restarts:
        raise ClusterError(
            "alpa.init was given max_restarts, but there is no checkpoint to go on from: give train a "
            "checkpoint_directory"
        )


def _ignore(step: int, rest: Any) -> None:
    del step, rest


@dataclass
class _Loop:
    train_step: ParallelFunction
    batches: Batches
    num_steps: int | None
    directory: str | os.PathLike[str] | None
    every: int | None
    keep: int | None
    on_step: Callable[[int, Any], Any]

    def __post_init__(self) -> None:
        self.saving: tuple[Saving, int] | None = None
        self.saved = -1
        self.shapes: Any = None
        self.newest: tuple[int, Any] | None = None
        self.began = False

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
                if isinstance(error, WorkerError) and not restarts:
                    raise
                death = _death(error)
                if death is None:
                    raise
                if not restarts:
                    raise death from error
                restarts, state = restarts - 1, None
                logger.warning("%s; going on with what is left, %d restarts left", error, restarts)
            self.abandon()
            session.restart()

    def abandon(self) -> None:
        """Wait for a checkpoint that is being written, whatever becomes of it."""
        if self.saving is not None:
            with contextlib.suppress(AlpaError):
                self.saving[0].wait()
            self.saving = None

    # ------------------------------------------------------------------------------------------------------- begin

    def begin(self, state: Any) -> tuple[int, Any, Iterator[tuple[int, Any]]]:
        """The first step, its state and batches: from the last complete checkpoint, else the state that was given."""
        steps, broken = ([], {}) if self.directory is None else survey(self.directory)
        self.check_any(steps, broken)
        if not steps:
            step, found = 0, self.begin_fresh(state)
        else:
            step, found = self.restored(steps, broken, state)
        batches, self.began, self.newest = self.batches_from(step), True, None
        return step, found, batches

    def check_any(self, steps: list[int], broken: dict[int, str]) -> None:
        """Raise `CheckpointError` where there are checkpoints, but none that is complete."""
        if broken and not steps:
            raise CheckpointError(
                f"{self.directory} holds no complete checkpoint: {'; '.join(broken.values())}; move that away to begin "
                "with the state that is given, or give another checkpoint_directory"
            )

    def restored(self, steps: list[int], broken: dict[int, str], state: Any) -> tuple[int, Any]:
        """The newest checkpoint that can be read, and its step. `broken` says what is wrong with others.

        Nothing is let go of before the checkpoint is known to be of this model and the batches to go on so far.
        """
        assert self.directory is not None
        if not self.began and not self.reached(steps[0]) and self.batches.ends_before(steps[0]):
            raise self.too_few(steps[0])
        restoring(self.directory, self.shapes, steps[0])
        sample = None if self.train_step.is_compiled else self.batches.sample(steps[0])
        if sample is not None:
            self.train_step.compile(self.shapes, sample)
        self.let_go(state)
        like = self.train_step if self.train_step.is_compiled else self.shapes
        for step in steps:
            found = restoring(self.directory, like, step)
            try:
                read = found.read()
            except CheckpointError as error:
                broken[step] = str(error)
                continue
            self.saved = step
            self.tell(step, broken, given=state is not None)
            return step, read
        raise CheckpointError(f"no checkpoint in {self.directory} can be read: {'; '.join(broken.values())}")

    def tell(self, step: int, broken: dict[int, str], *, given: bool) -> None:
        """Log where training goes on. What is damaged is moved where no checkpoint will be written or removed."""
        assert self.directory is not None
        for number, why in broken.items():
            if number > step:
                logger.warning("%s; it is kept as %s", why, set_aside(folder_of(Path(self.directory), number)))
        where = "" if not given else ", not with the state that was given"
        logger.log(
            logging.WARNING if given else logging.INFO, "going on with step %d from %s%s", step, self.directory, where
        )

    def batches_from(self, step: int) -> Iterator[tuple[int, Any]]:
        """(number, batch) from `step` on; raises where they don't go so far."""
        batches = self.batches.start(step)
        if step == 0 or self.reached(step):
            return batches
        first = next(batches, None)
        if first is None and not self.began and not callable(self.batches.source):
            raise self.too_few(step)
        if first is not None and first[0] != step:
            raise CheckpointError(
                f"training would go on with step {step} from {self.directory}, but the batches before {first[0]} are "
                "used up; start it again with all batches"
            )
        return batches if first is None else itertools.chain([first], batches)

    def too_few(self, step: int) -> TraceError:
        """What to raise where the batches do not reach a step."""
        return TraceError(
            f"the batches end before step {step}, where {self.directory} goes on; give more batches (they count from "
            "the first step of all), a function of the step, or another checkpoint_directory"
        )

    def reached(self, done: int) -> bool:
        """Whether that is all that was asked for."""
        return self.num_steps is not None and done >= self.num_steps

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

    # ------------------------------------------------------------------------------------------------------- steps

    def steps(self, done: int, state: Any, batches: Iterator[tuple[int, Any]]) -> Any:
        """All steps but those that are done."""
        tree = jax.tree.structure(self.shapes)
        if self.reached(done):
            return state
        with contextlib.ExitStack() as ended:
            ended.push(self.rescue)
            for number, batch in batches:
                state, rest = _split(self.train_step(state, batch), tree, self.train_step)
                done = number + 1
                self.newest = done, state
                self.on_step(number, rest)
                self.checkpoint(state, done)
                if self.reached(done):
                    break
        jax.block_until_ready(state)
        self.finish(state, done)
        return state

    def checkpoint(self, state: Any, step: int) -> None:
        """Begin to write one if it is time; let go of batches that will not be needed again."""
        if self.saving is not None and self.saving[0].done():
            self.settle()
        if self.directory is not None and self.every is not None and step % self.every == 0:
            self.settle()
            try:
                self.saving = save_checkpoint(self.directory, state, step, keep=self.keep), step
            except CheckpointError as error:
                _missed(error)
        if not session.current().max_restarts:
            self.batches.forget(step)

    def settle(self) -> None:
        """Wait for what is being written. Where it fails, training goes on: another one will be due."""
        if self.saving is None:
            return
        (saving, step), self.saving = self.saving, None
        try:
            saving.wait()
        except CheckpointError as error:
            _missed(error)
            return
        self.saved = step
        self.batches.forget(step)

    def finish(self, state: Any, step: int) -> None:
        """The last state, on disk."""
        self.settle()
        if self.directory is not None and self.saved != step:
            save_checkpoint(self.directory, state, step, keep=self.keep).wait()
            self.saved = step

    def rescue(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Save the newest state if batches, `on_step` or a step raised, while the workers are well.

        No older checkpoint is removed: what was raised may mean that this state is no good.
        """
        del kind, trace
        if not isinstance(error, Exception) or isinstance(error, WorkerError | ProgramError):
            return
        if self.directory is None or self.newest is None:
            return
        done, state = self.newest
        try:
            self.settle()
            if self.saved != done:
                save_checkpoint(self.directory, state, done).wait()
                self.saved = done
        except AlpaError as failure:
            error.add_note(f"The state after {done} steps could not be saved: {failure}")
        else:
            error.add_note(f"The state after {done} steps is in {self.directory}.")


def _missed(error: CheckpointError) -> None:
    """Log that a checkpoint could not be written; raise `WorkerError` if a worker's death is behind it."""
    death = _death(error)
    if death is not None:
        raise death from error
    logger.warning("%s; training goes on, and the next checkpoint will be tried", error)


def _death(error: AlpaError) -> WorkerError | None:
    """The death of a worker that is behind an error. The news of it may come later than what it has caused."""
    remote = session.current().remote
    if remote is None or isinstance(error, TraceError):
        return None
    deadline = time.monotonic() + (_NEWS_S if isinstance(error, WorkerError) else _GRACE_S)
    while (death := remote.workers.poll_failure()) is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return death


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
