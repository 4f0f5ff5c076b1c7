"""Batches for the loop around a step: read ahead by a thread, numbered, and had again where training begins again."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from alpa_like.errors import TraceError

__all__ = ["Batches", "prefetch"]

_AHEAD = 2
_POLL_S = 0.1


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


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) or hasattr(value, "__getitem__")


@dataclass
class Batches:
    """Batches by number. Those that `forget` was not told of are kept, if they can't be read again.

    source: an iterable, or a function of the number to begin with. Raises `TraceError` for anything else.
    """

    source: Iterable[Any] | Callable[[int], Iterable[Any]]
    kept: deque[tuple[int, Any]] = field(default_factory=deque[tuple[int, Any]])
    reader: Generator[Any] | None = None
    number: int = 0
    """Of what `reader` gives next."""

    def __post_init__(self) -> None:
        if not callable(self.source) and not _is_iterable(self.source):
            raise TraceError(
                "batches must be an iterable of batches, or a function of the number of the step to begin with, found "
                f"{self.source!r}"
            )

    def sample(self, step: int) -> Any:
        """A batch such as that of `step`, None if there is none; `start` gives it again where it is asked for."""
        if callable(self.source) or self.reader is None:
            self._open(step)
        if not self.kept:
            self.kept.extend(itertools.islice(self._read(), 1))
        return self.kept[0][1] if self.kept else None

    def start(self, step: int) -> Iterator[tuple[int, Any]]:
        """(number, batch) from `step` on. Others come where those are gone: an iterator can't be read twice."""
        if callable(self.source):
            if self.reader is None or step != (self.kept[0][0] if self.kept else self.number):
                self._open(step)
            again = list(self.kept)
            self.kept.clear()
            return itertools.chain(again, self._read())
        if self.reader is None:
            self._open(step)
        return itertools.chain([item for item in self.kept if item[0] >= step], self._keep(step))

    def ends_before(self, step: int) -> bool:
        """Whether a list has no batch `step`. Other sources are read to find out."""
        return not callable(self.source) and isinstance(self.source, Sequence) and len(self.source) <= step

    def _open(self, step: int) -> None:
        self.close()
        self.kept.clear()
        found = self.source(step) if callable(self.source) else self.source
        if not _is_iterable(found):
            raise TraceError(f"batches, called with {step}, must return an iterable of batches, found {found!r}")
        self.number = step if callable(self.source) else 0
        self.reader = _prefetched(iter(found), _AHEAD)

    def _read(self) -> Iterator[tuple[int, Any]]:
        assert self.reader is not None
        for batch in self.reader:
            self.number += 1
            yield self.number - 1, batch

    def _keep(self, step: int) -> Iterator[tuple[int, Any]]:
        for item in self._read():
            if item[0] >= step:
                self.kept.append(item)
                yield item

    def close(self) -> None:
        """Read no more."""
        if self.reader is not None:
            self.reader.close()

    def forget(self, step: int) -> None:
        """No batch before `step` will be asked for again."""
        while self.kept and self.kept[0][0] < step:
            self.kept.popleft()
