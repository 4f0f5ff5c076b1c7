"""The driver of worker processes: loads programs on them, starts steps, and keeps handles of what they hold.

A step is one message to each worker, and nothing comes back but the news that it has begun. Arrays stay where they are;
host data is cut here, so that each process gets only what its devices hold.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from alpa_like.cluster import Cluster
from alpa_like.errors import AlpaError, ProgramError, WorkerError
from alpa_like.placement import AbstractDevices, LoweredPipeline, Returned
from alpa_like.reshard import Layout
from alpa_like.runtime.instructions import Ref, Route, Send, verify
from alpa_like.runtime.interpreter import Event
from alpa_like.runtime.remote_arrays import RemoteArray, RemotePlace, joined
from alpa_like.runtime.remote_programs import (
    Input,
    MeshPart,
    Span,
    host_tiles,
    merged,
    mesh_part,
    mesh_program,
    moving,
    on_host,
    routes_of,
    span_of,
)
from alpa_like.runtime.remote_transport import ProcessMap, uuids_needed
from alpa_like.runtime.staged import BufferType
from alpa_like.runtime.worker import Order, Partner, Shards

__all__ = ["Remote", "RemoteProgram", "Span", "Workers"]

_STEPS_AHEAD = 4
"""So many steps may be ordered before the first of them has begun everywhere."""
_LOOK_BACK_S = 0.25
_GRACE_S = 2.0
_PROGRESS_S = 0.5
_BAR_AFTER_S = 2.0

_numbers = itertools.count(1)


class Workers(Protocol):
    """Who starts processes and calls them: `runtime.ray_cluster.RayCluster`. `roles` say what runs where, to people."""

    roles: dict[Span, str]
    devices_per_host: int
    platform: str

    @property
    def cluster(self) -> Cluster: ...

    @property
    def num_devices(self) -> int: ...

    def bring_up(self, ranges: Sequence[Span]) -> tuple[tuple[Any, ...], ...]: ...

    def call(self, workers: Sequence[Any], method: str, per_worker_args: Sequence[tuple[Any, ...]]) -> list[Any]: ...

    def ask(self, workers: Sequence[Any], method: str) -> list[Any]: ...

    def ready(self, refs: Sequence[Any], timeout_s: float) -> bool: ...

    def wait(self, refs: Sequence[Any], timeout_s: float | None = None) -> list[Any]: ...

    def poll_failure(self) -> WorkerError | None: ...

    def restart(self, wait_s: float = 300.0) -> Workers: ...

    def stop(self, *, force: bool = False) -> None: ...


class Remote:
    """All workers of a session. `alive` is false when one of them has ended or failed: then all that they held is lost,
    and `why` tells what happened.
    """

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.number = next(_numbers)
        self.alive, self.why = True, ""
        self.devices = AbstractDevices(workers.num_devices, workers.platform)
        self._meshes: dict[Span, tuple[Any, ...]] = {}
        self._processes: dict[Span, ProcessMap] = {}
        self._arrays = itertools.count()
        self._programs = itertools.count()
        self._next_uuid = 1
        self._dead: dict[Span, list[int]] = {}
        self._dropped: deque[tuple[Span, int]] = deque()
        self._unfinished: list[threading.Event] = []
        self._begun: deque[list[Any]] = deque()
        self._moves: dict[tuple[BufferType, Layout], RemoteProgram] = {}

    # ---------------------------------------------------------------------------------------------------- workers

    def bring_up(self, spans: Sequence[Span]) -> None:
        """Start the workers of these devices, if they don't run."""
        self.check()
        fresh = [s for s in dict.fromkeys(spans) if s not in self._meshes]
        if not fresh:
            return
        for span, group in zip(fresh, self.workers.bring_up(fresh), strict=True):
            wide = jax.dtypes.canonicalize_dtype("int64") == np.int64
            addresses = tuple(self.result(self.workers.call(group, "begin", [(wide,)] * len(group))))
            self._meshes[span] = group
            self._processes[span] = ProcessMap(span[0], span[1] // len(group), addresses)

    def group(self, span: Span) -> tuple[Any, ...]:
        """The workers of these devices, which must run."""
        return self._meshes[span]

    def processes(self, span: Span) -> ProcessMap:
        """Which process has which of these devices."""
        self.bring_up([span])
        return self._processes[span]

    def call(self, span: Span, method: str, *args: Any) -> list[Any]:
        """Let all workers of a mesh do the same; what comes back is to be waited for."""
        group = self._meshes[span]
        return self.each(span, method, [args] * len(group))

    def each(self, span: Span, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Let the workers of a mesh do something, each with its own arguments."""
        self.check()
        return self.workers.call(self._meshes[span], method, args)

    def result(self, refs: Sequence[Any]) -> list[Any]:
        """What calls return. Raises what they raise, and what went wrong in a step that was ordered before.

        Where a worker has died, or others may wait for one that failed, nothing can be asked of any after it. Ctrl-C
        ends the session, as workers may be in the midst of what they do together.
        """
        with self._ended_by_interrupt():
            try:
                while not self.ready(refs, _LOOK_BACK_S):
                    self._look_back()
                return self.workers.wait(refs)
            except AlpaError:
                self._check_deaths(0.0)
                self._look_back()
                raise

    def ready(self, refs: Sequence[Any], timeout_s: float) -> bool:
        """Whether all calls have returned; waits for that up to `timeout_s` seconds. Raises what they raise."""
        with self._ended_by_interrupt():
            try:
                return self.workers.ready(refs, timeout_s)
            except TimeoutError:  # large results take longer to come than to be made
                return False

    @contextmanager
    def _ended_by_interrupt(self) -> Generator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self._fail("Ctrl-C ended it")
            self.workers.stop(force=True)
            raise

    def unfinished(self) -> threading.Event:
        """Something is being done that `stop` is to wait for, until this is set."""
        self._unfinished = [event for event in self._unfinished if not event.is_set()]
        self._unfinished.append(threading.Event())
        return self._unfinished[-1]

    def stop(self) -> None:
        """End all workers, when the checkpoint is complete that they may be writing."""
        for event in self._unfinished:
            event.wait()
        self._fail("the session has ended")
        self.workers.stop()

    def stop_asking(self) -> None:
        """Treat all workers as lost, whatever they are doing."""
        self._fail("they were ended to begin again")

    def _fail(self, why: str) -> None:
        if self.alive:
            self.alive, self.why = False, why
            for refs in self._begun:
                with suppress(AlpaError):
                    self.ready(refs, 0.0)  # Ray would print all errors that nobody has looked at
            self._begun.clear()

    def check(self) -> None:
        """Raise `WorkerError` if nothing can be asked of the workers any more."""
        if not self.alive:
            raise WorkerError(
                f"the workers of this session are lost: {self.why}. Call alpa.init again and restore the last "
                "checkpoint"
            )

    def place(self, layout: Layout) -> RemotePlace:
        """A layout on the devices of this session."""
        return RemotePlace(layout, self.number)

    def uuids(self, count: int) -> int:
        """The first of `count` numbers for transfers that nobody else has."""
        first = self._next_uuid
        self._next_uuid += count
        return first

    def program_number(self) -> int:
        """A number for a new program."""
        return next(self._programs)

    def ids(self, count: int) -> tuple[int, ...]:
        """Numbers for new arrays."""
        return tuple(itertools.islice(self._arrays, count))

    # ----------------------------------------------------------------------------------------------------- arrays

    def put(self, value: Any, kind: BufferType) -> RemoteArray:
        """An array on the workers from host data; does not wait for it to arrive."""
        span = kind.layout.devices
        processes, number = self.processes(span), self.ids(1)[0]
        data = on_host(value, kind.struct.dtype)
        tiles = [host_tiles(data, kind, processes, p) for p in range(len(processes.addresses))]
        self.ordered(self.each(span, "put", [(number, t) for t in tiles]))
        return RemoteArray(self, kind, self.place(kind.layout), ((span, number),))

    def moved(self, array: RemoteArray, layout: Layout) -> RemoteArray:
        """The same values in another layout, from worker to worker."""
        array.check()
        if array.sharding is None:
            return self.put(array.value(), BufferType.of(array, layout))
        kind = BufferType.of(array, array.sharding.layout)
        if (kind, layout) not in self._moves:
            self._moves[kind, layout] = RemoteProgram(
                self, moving(kind, layout, self.devices), [kind.struct], [kind.struct]
            )
        program = self._moves[kind, layout]
        (moved,) = program.run([array])
        return moved

    def fetch(self, array: RemoteArray) -> Any:
        """The values of an array."""
        parts = [self._fetch(span, number, array) for span, number in array.stored]
        impl = BufferType.of(array, _NOWHERE).key_impl
        return joined(parts, array.dim, lambda x: x if impl is None else jax.random.wrap_key_data(x, impl=impl))

    def _fetch(self, span: Span, number: int, array: RemoteArray) -> np.ndarray[Any, Any]:
        group = self._meshes[span]
        whole = array.sharding is not None and not any(array.sharding.layout.spec)
        asked = 1 if whole else len(group)  # the first process has all of it
        # The others only wait: where one of them failed, the first may never be done.
        refs = self.workers.call(group[:asked], "fetch", [(number,)] * asked)
        refs += self.workers.call(group[asked:], "wait", [(number,)] * (len(group) - asked))
        found: list[Shards] = self.result(refs)[:asked]
        shards = [s for shards in found for s in shards.shards]
        if len(shards) == 1:
            return shards[0][1]
        values = np.empty(found[0].shape, shards[0][1].dtype if shards else np.float32)
        for index, tile in shards:
            values[index] = tile
        return values

    def wait(self, array: RemoteArray) -> None:
        """Return when an array is computed."""
        for span, number in array.stored:
            self.result(self.call(span, "wait", number))

    def duplicate(self, array: RemoteArray) -> RemoteArray:
        """A copy of an array."""
        stored = tuple((span, self.ids(1)[0]) for span, _ in array.stored)
        for (span, old), (_, new) in zip(array.stored, stored, strict=True):
            self.ordered(self.call(span, "copy", old, new))
        kind = jax.ShapeDtypeStruct(array.shape, array.dtype, weak_type=array.weak_type)
        return RemoteArray(self, kind, array.sharding, stored, array.dim)

    def release(self, stored: Sequence[tuple[Span, int]]) -> None:
        """Let the workers free arrays with the next step. May be called from any thread, as garbage is collected."""
        for span, number in stored:
            self._dead.setdefault(span, []).append(number)

    def take_dead(self, span: Span) -> tuple[int, ...]:
        """The arrays of a mesh to be freed."""
        found = self._dead.get(span)
        if not found:
            return ()
        count = len(found)  # others may append meanwhile
        dead = tuple(found[:count])
        del found[:count]
        return dead

    def drop(self, program: int, spans: Sequence[Span]) -> None:
        """Let the workers forget a program with the next step. May be called from any thread."""
        self._dropped.extend((span, program) for span in spans)

    def sweep(self) -> None:
        """Free what is dead on meshes that no step frees it on, and programs that nobody can run any more."""
        for span in list(self._dead):
            if dead := self.take_dead(span):
                self.ordered(self.call(span, "free", dead))
        while self._dropped:
            span, program = self._dropped.popleft()
            self.ordered(self.call(span, "unload", program))

    # ------------------------------------------------------------------------------------------------------ orders

    def ordered(self, refs: list[Any]) -> None:
        """Remember what was ordered; wait for the oldest order if there are many. Raises what went wrong in one."""
        self._begun.append(refs)
        self.settle(_STEPS_AHEAD)

    def settle(self, ahead: int = 0) -> None:
        """Wait until all but the last orders have begun."""
        while len(self._begun) > ahead:
            self.result(self._begun[0])
            self._begun.popleft()

    def _look_back(self) -> None:
        """Raise what went wrong in an order. Others may wait for what a worker that failed would have sent."""
        for refs in list(self._begun):
            try:
                self.ready(refs, 0.0)
            except AlpaError as error:
                self._begun.remove(refs)
                if len(refs) == 1:
                    raise
                self._check_deaths(_GRACE_S)
                self._fail(str(error))
                raise ProgramError(
                    f"{error}. What the workers held is lost: call alpa.init again and restore the last checkpoint"
                ) from error

    def _check_deaths(self, grace_s: float) -> None:
        """Raise `WorkerError` if a worker has died, or is found dead in so many seconds: others may fail before."""
        deadline = time.monotonic() + grace_s
        while (death := self.workers.poll_failure()) is None and time.monotonic() < deadline:
            time.sleep(_LOOK_BACK_S)
        if death is not None:
            self._fail(str(death))
            raise death from None


_NOWHERE = Layout((1,), ("x",), (0, 1), ())


@dataclass(frozen=True, slots=True)
class _Result:
    """A flat result: what workers hold of it, as (devices, place among the numbers of a step), or a constant."""

    parts: tuple[tuple[Span, int], ...]
    constant: Any
    kind: jax.ShapeDtypeStruct
    place: RemotePlace | None
    dim: int


class RemoteProgram:
    """A program that the workers have compiled. Made once, run at every step."""

    def __init__(
        self, remote: Remote, lowered: LoweredPipeline, arguments: Sequence[Any], results: Sequence[Any]
    ) -> None:
        """`arguments` and `results` have the shapes and dtypes of the flat arguments and results."""
        verify(lowered.programs)
        self._remote, self.lowered = remote, lowered
        self._arguments = tuple(arguments)
        self.number = remote.program_number()
        self.spans = {p.mesh: span_of(p, lowered) for p in lowered.programs}
        remote.bring_up(list(self.spans.values()))
        self._count = 1 + max((g.micro_batch for g in lowered.given.values()), default=0)
        offsets, self._uuids = self._offsets()
        self._meshes = [mesh_part(p, self.spans[p.mesh], lowered) for p in lowered.programs]
        self._results = self._flat_results(results)
        self._load(offsets)

    def _flat_results(self, results: Sequence[Any]) -> tuple[_Result, ...]:
        """All that is known of the results before a step: a state may have thousands of leaves."""
        made = [(p.mesh, ref) for p, m in zip(self.lowered.programs, self._meshes, strict=True) for ref in m.returned]
        places = {key: i for i, key in enumerate(made)}

        def result(r: Returned, layout: Layout | None, aval: Any) -> _Result:
            parts = tuple((self.spans[mesh], places[mesh, ref]) for mesh, ref in r.buffers)
            kind = jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
            place = self._remote.place(layout) if layout is not None else None
            return _Result(parts, r.constant, kind, place, max(r.dim, 0))

        return tuple(map(result, self.lowered.returned, self.lowered.results, results))

    def _offsets(self) -> tuple[dict[tuple[Ref, Route], int], int]:
        """The first number of each buffer that travels, and how many numbers a step takes."""
        found: dict[tuple[Ref, Route], int] = {}
        total = 0
        for program in self.lowered.programs:
            for i in program.instructions:
                if isinstance(i, Send):
                    found[i.ref, i.transfer] = total
                    ends = (self._remote.processes(self.spans[m]) for m in (i.transfer.source, i.transfer.target))
                    total += uuids_needed(self.lowered.transfers[i.transfer][0], *ends)
        return found, total

    def _load(self, offsets: Mapping[tuple[Ref, Route], int]) -> None:
        refs: list[Any] = []
        for program in self.lowered.programs:
            partners = {r: self._partner(r, program.mesh, offsets) for r in routes_of(program)}
            mesh = mesh_program(program, self.lowered, partners)
            refs += self._remote.call(self.spans[program.mesh], "load", self.number, mesh)
        self._watch(refs)

    def _partner(self, route: Route, mesh: int, offsets: Mapping[tuple[Ref, Route], int]) -> Partner:
        transfer, dtype = self.lowered.transfers[route]
        other = route.target if route.source == mesh else route.source
        numbers = {ref: offset for (ref, r), offset in offsets.items() if r == route}
        kind = BufferType.of(jax.ShapeDtypeStruct(transfer.shape, dtype), transfer.source)
        return Partner(transfer, kind, self._remote.processes(self.spans[other]), numbers)

    def _watch(self, refs: list[Any]) -> None:
        """Wait until all have compiled; a bar shows how far they are, if it takes long."""
        firsts = [self._remote.group(span)[0] for span in self.spans.values()]
        total, before = len(self.lowered.pieces), self._compiled(firsts)
        with tqdm(total=total, desc="compiling", unit="piece", delay=_BAR_AFTER_S, leave=False, disable=None) as bar:
            while not self._remote.ready(refs, _PROGRESS_S):
                bar.update(self._compiled(firsts) - before - bar.n)
        self._remote.result(refs)

    def _compiled(self, workers: Sequence[Any]) -> int:
        """Pieces compiled so far, by the first process of each mesh."""
        return sum(self._remote.result(self._remote.workers.ask(workers, "compiled")))

    def run(self, leaves: Sequence[Any]) -> list[Any]:
        """Start a step on flat arguments: arrays on the workers where they are to lie, or host data. Never waits."""
        leaves = list(leaves)
        refs, results = self._order("run", leaves)
        self._remote.ordered(refs)
        return self._outputs(results, leaves)

    def __del__(self) -> None:
        spans = list(getattr(self, "spans", {}).values())
        if spans and self._remote.alive:
            self._remote.drop(self.number, spans)

    def trace(self, leaves: Sequence[Any]) -> tuple[list[Any], tuple[Event, ...]]:
        """A step, and when each piece ran, in seconds since the first worker began."""
        leaves = list(leaves)
        self._remote.settle()
        refs, results = self._order("trace", leaves)
        self._remote.ordered(refs)
        found: list[tuple[float, tuple[Event, ...]]] = self._remote.result(refs)
        begun_s = min(began for began, _ in found)
        events = merged([(began - begun_s, events) for began, events in found])
        return self._outputs(results, leaves), events

    def _order(self, method: str, leaves: list[Any]) -> tuple[list[Any], list[int]]:
        """What is to be waited for, and the numbers of all that the meshes return, one mesh after the other."""
        base = self._remote.uuids(self._uuids)
        results: list[int] = []
        refs: list[Any] = []
        orders = [(mesh, self._values(mesh, leaves)) for mesh in self._meshes]
        for mesh, values in orders:
            numbers = self._numbers(mesh, leaves)
            results += numbers
            dead = self._remote.take_dead(mesh.span)
            refs += self._remote.each(
                mesh.span, method, [(Order(self.number, base, v, numbers, dead),) for v in values]
            )
        for leaf in (leaves[a] for a in {a for mesh in self._meshes for a in mesh.donated}):
            if isinstance(leaf, RemoteArray):
                leaf.donate()
        self._remote.sweep()
        return refs, results

    def _numbers(self, mesh: MeshPart, leaves: Sequence[Any]) -> tuple[int, ...]:
        """The numbers of what a mesh returns: new ones, and those of arguments that come back as they are."""
        kept = {ref: leaves[need.argument] for ref, need in mesh.passed.items() if need.has(leaves[need.argument])}
        fresh = iter(self._remote.ids(len(mesh.returned) - len(kept)))
        return tuple(kept[ref].stored[0][1] if ref in kept else next(fresh) for ref in mesh.returned)

    def _values(self, mesh: MeshPart, leaves: list[Any]) -> list[tuple[Any, ...]]:
        """The given buffers for each process of a mesh."""
        processes = self._remote.processes(mesh.span)
        columns = [self._column(i, leaves, processes) for i in mesh.inputs]
        return [tuple(c[p] for c in columns) for p in range(len(processes.addresses))]

    def _column(self, need: Input, leaves: list[Any], processes: ProcessMap) -> Sequence[Any]:
        """One given buffer, for each process. Puts host data in place of leaves that are not where they are needed."""
        count, value, aval = len(processes.addresses), leaves[need.argument], self._arguments[need.argument]
        if need.has(value):
            return [value.stored[0][1]] * count
        leaves[need.argument] = value = on_host(value, aval.dtype)  # once, not for each micro-batch and process
        rows = need.rows(value, self._count)
        shape = rows.shape[: len(aval.shape)]  # the data of random keys has one dim more
        kind = BufferType.of(jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=aval.weak_type), need.layout)
        return [host_tiles(rows, kind, processes, p) for p in range(count)]

    def _outputs(self, numbers: Sequence[int], leaves: Sequence[Any]) -> list[Any]:
        """The results. What workers hold once has one handle: the second to go would free what the first still has."""
        known: dict[Any, RemoteArray] = {}
        if any(mesh.passed for mesh in self._meshes):
            known = {a.stored: a for a in leaves if isinstance(a, RemoteArray) and not a.is_deleted()}
        return [self._output(r, numbers, known) for r in self._results]

    def _output(self, r: _Result, numbers: Sequence[int], known: dict[Any, RemoteArray]) -> Any:
        if not r.parts:
            return jnp.asarray(r.constant)
        stored = tuple([(span, numbers[place]) for span, place in r.parts])
        found = known.get(stored)
        if found is None:
            found = known[stored] = RemoteArray(self._remote, r.kind, r.place, stored, r.dim)
        return found
