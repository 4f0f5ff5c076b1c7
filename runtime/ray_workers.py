"""Worker processes on reserved hosts: where they go, how they start, how we hear of their deaths."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from alpa_like.errors import ClusterError, WorkerError
from alpa_like.runtime.ray_actor import Located, WorkerProcess, WorkerSetup, environment
from alpa_like.runtime.ray_connection import GetTimeoutError, RayError, first_and_last_line, ray
from alpa_like.runtime.ray_hosts import Host, Reservation

__all__ = [
    "Deaths",
    "Launch",
    "Part",
    "Silence",
    "Span",
    "WorkerActor",
    "WorkerHandle",
    "kill",
    "new_process",
    "parts_of",
]

Span = tuple[int, int]
"""First device and number of devices."""

logger = logging.getLogger("alpa_like")

_LOCATE_S = 180.0
_SILENT_S = 20.0
_ANSWER_S = 10.0


class WorkerActor:
    """The actor. `main` is one thread, so that calls keep their order; `control` answers while a call runs."""

    def __init__(self) -> None:
        self._process = WorkerProcess()

    @ray.method(concurrency_group="main")
    def locate(self) -> Located:
        return self._process.locate()

    @ray.method(concurrency_group="main")
    def begin(self, name: str, setup: WorkerSetup, variables: dict[str, str], body: str) -> None:
        self._process.begin(name, setup, variables, body)

    @ray.method(concurrency_group="main")
    def call(self, method: str, *args: Any) -> Any:
        return self._process.call(method, *args)

    @ray.method(concurrency_group="control")
    def ask(self, method: str, *args: Any) -> Any:
        return self._process.call(method, *args)

    @ray.method(concurrency_group="control")
    def answer(self) -> None:
        """Nothing but the news that this process runs."""

    @ray.method(concurrency_group="control")
    def watch(self) -> None:
        """Never returns, so that the caller's reference to the result becomes ready when this process ends."""
        threading.Event().wait()


@dataclass(frozen=True, slots=True, eq=False)
class WorkerHandle:
    """Process `process_id` of the workers for devices `first` to `first + count - 1`; `log` is its standard error."""

    first: int
    count: int
    process_id: int
    num_processes: int
    host: Host
    pid: int
    log: str
    actor: Any

    def __str__(self) -> str:
        devices = f"devices {self.first} to {self.first + self.count - 1}" if self.count > 1 else f"device {self.first}"
        number = f"worker {self.process_id + 1} of {self.num_processes}"
        return f"{number} for {devices} on host {self.host}, process {self.pid}"


@dataclass(frozen=True, slots=True)
class Part:
    """Devices `first` to `first + count - 1` of a host."""

    host: int
    first: int
    count: int


def parts_of(span: Span, hosts: int, size: int) -> tuple[Part, ...]:
    """What of each host belongs to a mesh, on `hosts` hosts of `size` devices. Raises `ClusterError`."""
    first, count = span
    if not (0 <= first < first + count <= hosts * size):
        raise ClusterError(f"the devices are 0 to {hosts * size - 1}, asked for {count} from {first} on")
    host, offset = divmod(first, size)
    if offset + count <= size:
        return (Part(host, offset, count),)
    if offset or count % size:
        raise ClusterError(
            f"a mesh is some devices of a host or all devices of some hosts, which have {size} each; asked for "
            f"{count} from {first} on"
        )
    return tuple(Part(host + i, 0, size) for i in range(count // size))


class Deaths:
    """Which of the watched workers died, in the order in which it became known."""

    def __init__(self) -> None:
        self.heard: list[tuple[WorkerHandle, str]] = []
        self._watches: dict[WorkerHandle, tuple[Any, Future[None]]] = {}

    def watch(self, worker: WorkerHandle) -> None:
        ref = worker.actor.watch.remote()
        future: Future[None] = ref.future()
        self._watches[worker] = (ref, future)
        future.add_done_callback(partial(self._ended, worker))

    def _ended(self, worker: WorkerHandle, future: Future[None]) -> None:
        if worker in self._watches:
            self.heard.append((worker, str(future.exception())))

    def forget(self, workers: Sequence[WorkerHandle]) -> list[Future[None]]:
        """These may die from now on; the result is what to wait for until they have."""
        return [self._watches.pop(worker)[1] for worker in workers if worker in self._watches]

    def within(self, seconds: float) -> bool:
        """Whether one is known now or in so many seconds."""
        deadline = time.monotonic() + seconds
        while not self.heard and time.monotonic() < deadline:
            time.sleep(0.02)
        return bool(self.heard)


@dataclass(slots=True)
class Silence:
    """Which workers do not even answer, while the driver waits for all. A stopped process or a lost network look so."""

    since: float | None = None
    asked: dict[WorkerHandle, Any] = field(default_factory=dict[WorkerHandle, Any])

    def waited(self, workers: Sequence[WorkerHandle]) -> None:
        """To be called again and again while the driver waits. Logs a warning after half a minute, and later again."""
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        if not self.asked:
            if now > self.since + _SILENT_S:
                self.asked = {worker: worker.actor.answer.remote() for worker in workers}
            return
        if now > self.since + _SILENT_S + _ANSWER_S:
            answered, _ = ray.wait(list(self.asked.values()), num_returns=len(self.asked), timeout=0)
            for worker, ref in self.asked.items():
                if ref not in answered:
                    logger.warning("waiting for %s, which does not answer; is the process stopped?", worker)
            self.over()

    def over(self) -> None:
        """The driver waits no more."""
        self.since = None
        self.asked.clear()


@dataclass(slots=True)
class Launch:
    """The start of the workers of some meshes, all at the same time.

    `begun` are references that become ready when they are up.
    """

    reservation: Reservation
    ids: tuple[tuple[str, ...], ...]
    body: str
    actors: list[Any] = field(default_factory=list[Any])
    workers: list[WorkerHandle] = field(default_factory=list[WorkerHandle])
    begun: list[Any] = field(default_factory=list[Any])

    def run(self, meshes: Mapping[Span, tuple[Part, ...]], deaths: Deaths) -> None:
        """Start the actors, ask where they are, then let each start JAX. What was started is in `actors` in any case.

        Raises `ClusterError` if Ray can't start one.
        """
        everywhere = [part for parts in meshes.values() for part in parts]
        places = self._place(everywhere, {})
        used = [i for i, (_, at) in enumerate(places) if at.used]
        kill([places[i][0] for i in used])
        for i, place in zip(used, self._place([everywhere[i] for i in used], new_process()), strict=True):
            places[i] = place
        located = iter(places)
        for span, parts in meshes.items():
            self._begin(span, parts, [next(located) for _ in parts], deaths)

    def _place(self, parts: Sequence[Part], options: Mapping[str, Any]) -> list[tuple[Any, Located]]:
        remote: Any = ray.remote  # its overloads don't know all options
        actor = remote(
            num_cpus=0,
            num_gpus=0,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"main": 1, "control": 4},
        )(WorkerActor)
        begin = len(self.actors)
        for part in parts:
            strategy = self.reservation.on(part.host)
            self.actors.append(actor.options(scheduling_strategy=strategy, **options).remote())
        return list(zip(self.actors[begin:], _located(self.actors[begin:]), strict=True))

    def _begin(self, span: Span, parts: Sequence[Part], places: Sequence[tuple[Any, Located]], deaths: Deaths) -> None:
        hosts, platform = self.reservation.hosts, self.reservation.choice.platform
        meet = f"{hosts[parts[0].host].ip}:{places[0][1].port}" if len(parts) > 1 else None
        for i, (part, (actor, at)) in enumerate(zip(parts, places, strict=True)):
            host = hosts[part.host]
            worker = WorkerHandle(*span, i, len(parts), host, at.pid, at.log, actor)
            setup = WorkerSetup(*span, i, len(parts), meet, platform, part.count, host.ip)
            deaths.watch(worker)
            self.workers.append(worker)
            self.begun.append(actor.begin.remote(str(worker), setup, self.variables(part), self.body))

    def variables(self, part: Part) -> dict[str, str]:
        """The environment for a process that works on this part of a host."""
        choice = self.reservation.choice
        visible = self.ids[part.host][part.first : part.first + part.count]
        return environment(choice.platform, part.count, visible, whole_host=part.count == choice.devices_per_host)


def new_process() -> dict[str, Any]:
    """Options for a task or actor whose process has run nothing before, as no other has the same environment."""
    return {"runtime_env": {"env_vars": {"ALPA_LIKE_PROCESS": uuid.uuid4().hex}}}


def _located(actors: Sequence[Any]) -> list[Located]:
    try:
        return ray.get([actor.locate.remote() for actor in actors], timeout=_LOCATE_S)
    except GetTimeoutError as error:
        raise ClusterError(f"{len(actors)} worker processes did not start within {_LOCATE_S:g} s") from error
    except RayError as error:
        raise WorkerError(f"a worker process died as it started: {first_and_last_line(str(error))}") from error


def kill(actors: Sequence[Any]) -> None:
    """End their processes now, whatever they do."""
    for actor in actors:
        ray.kill(actor, no_restart=True)
