"""Checkpoints of arrays on workers: each mesh writes and reads its own, and none of it passes through the driver."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from alpa_like.manifest import Part
from alpa_like.runtime.checkpoints import PRNG_KEYS, PartWriter, Wanted, read_leaves
from alpa_like.runtime.remote import Remote, Span
from alpa_like.runtime.remote_arrays import RemoteArray, RemotePlace
from alpa_like.runtime.staged import BufferType

__all__ = ["RemoteStore"]


class RemoteStore:
    """A `checkpoint.Store`. All hosts must see the folder under the same path. Host data is written by this process."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def holder(self, array: Any) -> Hashable:
        """The devices that hold an array, None for what this process writes."""
        return array.stored[0][0] if isinstance(array, RemoteArray) and len(array.stored) == 1 else None

    def start(self, folder: Path, parts: Sequence[Part]) -> Callable[[], None]:
        """As in `checkpoint.Store`. Workers do what they are told in order, so a later step may donate the arrays."""
        workers, writer = self._remote.workers, PartWriter()
        begun: list[tuple[Span, list[Any]]] = []
        for part in parts:
            path = str(folder / part.name)
            span = part.holder
            if not isinstance(span, tuple):
                writer.start(path, {name: _host(x) for name, x in part.arrays.items()})
                continue
            numbers = {name: array.stored[0][1] for name, array in part.arrays.items()}
            begun.append((span, self._remote.call(span, "save", path, numbers)))

        done = self._remote.unfinished()

        def wait() -> None:
            try:
                workers.wait([ref for _, refs in begun for ref in refs])
                # Beside the steps, which go on.
                workers.wait([ref for span, _ in begun for ref in workers.ask(self._remote.group(span), "saved")])
                writer.wait()
            finally:
                done.set()

        return wait

    def read(self, wanted: Sequence[Wanted]) -> list[Any]:
        """As in `checkpoint.Store`; `sharding` is a `RemotePlace`, or None for what this process is to have."""
        found: dict[int, Any] = {}
        here = [i for i, w in enumerate(wanted) if not isinstance(w.sharding, RemotePlace)]
        found.update(zip(here, read_leaves([wanted[i] for i in here]), strict=True))
        refs: list[Any] = []
        for span, mine in self._by_span(wanted).items():
            self._remote.bring_up([span])
            numbers = self._remote.ids(len(mine))
            refs += self._remote.call(span, "restore", [_laid(wanted[i]) for i in mine], numbers)
            found.update((i, self._handle(wanted[i], n)) for i, n in zip(mine, numbers, strict=True))
        self._remote.result(refs)
        return [found[i] for i in range(len(wanted))]

    def _by_span(self, wanted: Sequence[Wanted]) -> dict[Span, list[int]]:
        groups: dict[Span, list[int]] = {}
        for i, w in enumerate(wanted):
            if isinstance(w.sharding, RemotePlace):
                groups.setdefault(w.sharding.layout.devices, []).append(i)
        return groups

    def _handle(self, w: Wanted, number: int) -> RemoteArray:
        layout = w.sharding.layout
        kind = BufferType(w.shape, w.dtype, layout, w.weak, PRNG_KEYS.get(w.dtype))
        return RemoteArray(self._remote, kind, self._remote.place(layout), ((layout.devices, number),))


def _laid(w: Wanted) -> Wanted:
    return replace(w, sharding=w.sharding.layout)


def _host(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, RemoteArray) else value
