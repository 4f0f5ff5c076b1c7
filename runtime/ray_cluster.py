"""`RayCluster`: worker processes on the hosts of a Ray cluster, and the news of their deaths.

One placement group owns the devices of all hosts. A worker is an actor that owns nothing itself: it runs in the part
of the group on its host and sees the devices of its mesh only, so that meshes may overlap. An actor is known to be
dead as soon as the result of its `watch`, which never returns otherwise, becomes ready.
"""

from __future__ import annotations

import atexit
import logging
import time
from collections import defaultdict
from collections.abc import Generator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from alpa_like.cluster import Cluster
from alpa_like.errors import AlpaError, ClusterError, WorkerError
from alpa_like.runtime import ray_hosts, ray_probes
from alpa_like.runtime.ray_actor import NOTE, WorkerSetup, measure
from alpa_like.runtime.ray_connection import (
    GetTimeoutError,
    RayError,
    check_given,
    connect,
    first_and_last_line,
    nodes_alive,
    ray,
)
from alpa_like.runtime.ray_hosts import Host, Reservation, Want
from alpa_like.runtime.ray_workers import Deaths, Launch, Part, Silence, Span, WorkerHandle, kill, new_process, parts_of

__all__ = ["Host", "RayCluster", "WorkerHandle", "WorkerSetup"]

logger = logging.getLogger("alpa_like")

BODY = "alpa_like.runtime.worker:Worker"

_BEGIN_S = 180.0
_POLL_S = 0.25
_GRACE_S = 2.0
_EXIT_S = 10.0


class RayCluster:
    """`hosts` equal hosts of a Ray cluster, reserved for this process, with `devices_per_host` devices each.

    Device `d` is number `d % devices_per_host` of host `d // devices_per_host`. `platform` is JAX's name of the
    platform that workers run on: "cpu", whose devices are emulated, "cuda" or "tpu".
    """

    def __init__(
        self, reservation: Reservation, ids: tuple[tuple[str, ...], ...], body: str, *, connected: bool, grows: bool
    ) -> None:
        self.hosts = reservation.hosts
        self.devices_per_host = reservation.choice.devices_per_host
        self.platform = reservation.choice.platform
        self._reservation = reservation
        self._ids = ids
        self._body = body
        self._connected = connected
        self._grows = grows
        self._cluster: Cluster | None = None
        self._meshes: dict[Span, tuple[WorkerHandle, ...]] = {}
        self._killed: list[WorkerHandle] = []
        self._deaths = Deaths()
        self._silence = Silence()
        self.roles: dict[tuple[int, int], str] = {}
        """What runs on which devices, for messages."""
        self._failure = ""
        self._stopped = ""
        atexit.register(self.stop)

    @classmethod
    def start(
        cls,
        *,
        address: str | None = None,
        num_devices: int | None = None,
        num_hosts: int | None = None,
        wait_s: float = 300.0,
        body: str = BODY,
    ) -> RayCluster:
        """Join a Ray cluster, or start one on this machine, and reserve hosts in it.

        `address` is `host:port`, "auto", "local" or None, see `connect`. Without `num_hosts` and
        `num_devices` all nodes are taken that are there now, each with all devices; on nodes without accelerators 8
        devices are emulated in total. Waits up to `wait_s` seconds for nodes to join and to become free, then raises
        `ClusterError`.
        """
        want = Want(num_devices, num_hosts)
        connected, alone = connect(address)
        try:
            return cls._reserved(want, wait_s, body, connected=connected, grows=not alone)
        except BaseException:
            if connected:
                ray.shutdown()
            raise

    @staticmethod
    def check(*, address: str | None, num_devices: int | None, num_hosts: int | None) -> None:
        """Raise `ClusterError` for arguments of `start` that are wrong wherever it runs; touches no session."""
        Want(num_devices, num_hosts)
        check_given(address)

    @classmethod
    def _reserved(cls, want: Want, wait_s: float, body: str, *, connected: bool, grows: bool) -> RayCluster:
        reservation = ray_hosts.reserve(want, wait_s, grows=grows)
        try:
            ids = ray_probes.device_ids(reservation)
        except BaseException:
            reservation.release()
            raise
        logger.info("reserved %s: %s", reservation.choice, ", ".join(map(str, reservation.hosts)))
        return cls(reservation, ids, body, connected=connected, grows=grows)

    @property
    def num_devices(self) -> int:
        return len(self.hosts) * self.devices_per_host

    @property
    def cluster(self) -> Cluster:
        """What to plan for: the preset of Ray's accelerator type, else the first host, measured when first asked."""
        if self._cluster is None:
            self._cluster = ray_hosts.fitted(self._reservation.accelerator, self._reservation.choice)
        if self._cluster is None:
            self._check_running()
            found = self._measured({}) or self._measured(new_process())
            measured = replace(Cluster.from_json(found), name=f"ray-{self.platform}")
            self._cluster = ray_hosts.with_network(measured, len(self.hosts))
        return self._cluster

    def _measured(self, options: dict[str, Any]) -> Any:
        size = self.devices_per_host
        variables = Launch(self._reservation, self._ids, self._body).variables(Part(0, 0, size))
        # The process ends with the task, as it would keep the devices.
        task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(measure)
        strategy = self._reservation.on(0)
        ref = task.options(scheduling_strategy=strategy, **options).remote(self.platform, size, variables)
        return self.wait([ref])[0]

    def workers(self, first: int, count: int) -> tuple[WorkerHandle, ...]:
        """The workers of `count` devices from number `first` on, in host order; started now if they don't run yet."""
        return self.bring_up([(first, count)])[0]

    def bring_up(self, ranges: Sequence[Span]) -> tuple[tuple[WorkerHandle, ...], ...]:
        """`workers` of several ranges; those that don't run yet are started all at the same time."""
        self._check_running()
        size = self.devices_per_host
        fresh = {span: parts_of(span, len(self.hosts), size) for span in ranges if span not in self._meshes}
        if self.platform == "tpu":
            _check_disjoint([*self._meshes, *fresh])
        if fresh:
            with self._released_on_interrupt():
                self._launch(fresh)
        return tuple(self._meshes[span] for span in ranges)

    def _launch(self, fresh: dict[Span, tuple[Part, ...]]) -> None:
        launch = Launch(self._reservation, self._ids, self._body)
        try:
            launch.run(fresh, self._deaths)
            self.wait(launch.begun, _BEGIN_S)
        except BaseException as error:
            self._deaths.forget(launch.workers)
            kill(launch.actors)
            self._killed.extend(launch.workers)
            if isinstance(error, WorkerError) and isinstance(error.__cause__, RayError):
                # It died before anybody watched it.
                self._failure = self._failure or str(error)
            raise
        for span in fresh:
            self._meshes[span] = tuple(worker for worker in launch.workers if (worker.first, worker.count) == span)

    @property
    def running(self) -> list[WorkerHandle]:
        """All workers that have been started, mesh by mesh."""
        return [worker for mesh in self._meshes.values() for worker in mesh]

    def call(
        self, workers: Sequence[WorkerHandle], method: str, per_worker_args: Sequence[tuple[Any, ...]]
    ) -> list[Any]:
        """Ask each worker to run a method of its body; returns references to the results without waiting.

        A worker runs what it was asked in order, one after the other. References among the arguments are waited for.
        """
        self._check_running()
        pairs = zip(workers, per_worker_args, strict=True)
        return [worker.actor.call.remote(method, *args) for worker, args in pairs]

    def ask(self, workers: Sequence[WorkerHandle], method: str) -> list[Any]:
        """Like `call`, but each worker runs it at once in a thread of its own, also while a call is running.

        It does wait behind calls that wait for references among their arguments.
        """
        self._check_running()
        return [worker.actor.ask.remote(method) for worker in workers]

    def ready(self, refs: Sequence[Any], timeout_s: float) -> bool:
        """Whether all results are there; waits for that up to `timeout_s` seconds. Raises as `wait`."""
        with self._released_on_interrupt():
            self._check_running()  # asked for anything after its end, Ray would start a new cluster
            done, pending = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
            self._results(done, max(timeout_s, _POLL_S))
            self._raise_if_dead()
            if timeout_s > 0:  # else somebody only looks, and waits for something else
                self._silence.waited(self.running) if pending else self._silence.over()
            return not pending

    def wait(self, refs: Sequence[Any], timeout_s: float | None = None) -> list[Any]:
        """The results. Raises `WorkerError` as soon as any worker of the cluster dies, or after `timeout_s`.

        What a method raises is raised here: an error of this package as it is, another one as `WorkerError`. The
        session can be used on after that, but not after a death. Ctrl-C stops the session.
        """
        with self._released_on_interrupt():
            self._check_running()
            deadline = time.monotonic() + timeout_s if timeout_s is not None else None
            while True:
                try:
                    return self._results(refs, _POLL_S)
                except GetTimeoutError:
                    self._raise_if_dead()
                    done, pending = ray.wait(list(dict.fromkeys(refs)), num_returns=len(set(refs)), timeout=0)
                    self._results(done, _POLL_S)  # raises what a worker raised, while others still wait for it
                    if deadline is not None and time.monotonic() > deadline:
                        text = f"{len(pending)} of {len(refs)} answers did not come within {timeout_s:g} s"
                        raise WorkerError(text) from None

    def _results(self, refs: Sequence[Any], timeout_s: float) -> list[Any]:
        try:
            return ray.get(list(refs), timeout=timeout_s)
        except GetTimeoutError:
            raise
        except RayError as error:
            cause = getattr(error, "cause", None)
            _take_all(refs)
            if isinstance(cause, AlpaError):
                raise cause from None
            raise self._explained(error, cause) from cause

    def _explained(self, error: RayError, cause: BaseException | None) -> WorkerError:
        """What to raise for it. If a worker died, that is the reason, also where another one then saw an error."""
        if self._deaths.within(_GRACE_S):
            return self.poll_failure() or WorkerError("a worker died")
        if cause is None:
            return WorkerError(f"a worker did not answer: {first_and_last_line(str(error))}")
        notes = [note.removeprefix(NOTE) for note in getattr(cause, "__notes__", ()) if note.startswith(NOTE)]
        where = notes[0] if notes else "a worker"
        what = first_and_last_line(str(cause))
        return WorkerError(f"{where}: {type(cause).__name__}: {what}")

    def poll_failure(self) -> WorkerError | None:
        """The first death of a worker, with its last log lines; None, at once, if all are alive."""
        if not self._failure:
            if not self._deaths.heard:
                return None
            worker, reason = self._deaths.heard[0]
            lines = "".join(f"\n  | {line}" for line in ray_probes.log_tail(worker.host, worker.log))
            role = self.roles.get((worker.first, worker.count), "")
            who = f"{worker}, with {role}, died" if role else f"{worker}, died"
            self._failure = f"{who}: {_reason(reason)}. The last lines of its log are:{lines}"
        return WorkerError(self._failure)

    def _raise_if_dead(self) -> None:
        failure = self.poll_failure()
        if failure is not None:
            raise failure

    def _check_running(self) -> None:
        if self._stopped:
            raise ClusterError(f"this Ray session was stopped {self._stopped}; begin a new one with alpa.init")

    @contextmanager
    def _released_on_interrupt(self) -> Generator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self._stop("by Ctrl-C", force=True)
            raise

    def survivors(self) -> tuple[Host, ...]:
        """The hosts that Ray sees alive. Ray takes up to half a minute to notice that a node is gone."""
        alive = {node["NodeID"] for node in nodes_alive()}
        return tuple(host for host in self.hosts if host.node_id in alive)

    def restart(self, wait_s: float = 300.0) -> RayCluster:
        """End all workers and reserve again what is left, at most as many hosts as before, each with as many devices.

        This one can't be used any more. Raises `ClusterError` if no host is left after `wait_s` seconds.
        """
        self._check_running()
        deadline = time.monotonic() + wait_s
        processes: defaultdict[str, list[int]] = defaultdict(list)
        for worker in (*self.running, *self._killed):
            processes[worker.host.node_id].append(worker.pid)
        nodes = {host.node_id: processes[host.node_id] for host in self.hosts}
        connected, self._connected = self._connected, False
        self._stop("by restart", force=False)
        try:
            ray_probes.wait_for_nodes(nodes, wait_s)
            return self._reserved_again(deadline, connected)
        except BaseException:
            if connected:
                ray.shutdown()
            raise

    def _reserved_again(self, deadline: float, connected: bool) -> RayCluster:
        while True:
            left = max(deadline - time.monotonic(), 1.0)
            try:
                return self._reserved(self._want_again(), left, self._body, connected=connected, grows=self._grows)
            except WorkerError as error:  # one more host has died
                if time.monotonic() > deadline:
                    raise
                logger.warning("%s; reserving again", error)

    def _want_again(self) -> Want:
        size = self.devices_per_host
        everything = ray_hosts.choose(nodes_alive(), Want(size, 1))
        hosts = max(min(everything.there, len(self.hosts)), 1)
        return Want(hosts * size, hosts)

    def stop(self, *, force: bool = False) -> None:
        """End all workers and give the hosts back; may be called twice. `force` does not wait until they have ended.

        A Ray cluster that `start` started ends too; if `start` only joined one, this process leaves it.
        """
        self._stop("by alpa.shutdown", force=force)

    def _stop(self, how: str, *, force: bool) -> None:
        if self._stopped:
            return
        self._stopped = how
        atexit.unregister(self.stop)
        ends = self._deaths.forget(self.running)
        if not ray.is_initialized():  # somebody else shut it down; asked for anything, Ray would start a new cluster
            return
        with suppress(RayError, OSError, RuntimeError):  # the cluster itself may be gone
            kill([worker.actor for worker in self.running])
            if not force:
                wait(ends, timeout=_EXIT_S)
            self._reservation.release()
        if self._connected:
            ray.shutdown()


def _take_all(refs: Sequence[Any]) -> None:
    """Look at all results that are there: Ray would print the errors among them that nobody looked at."""
    for ref in ray.wait(list(dict.fromkeys(refs)), num_returns=len(set(refs)), timeout=0)[0]:
        with suppress(Exception):
            ray.get(ref)


def _check_disjoint(spans: Sequence[Span]) -> None:
    ends = 0
    for first, count in sorted(spans):
        if first < ends:
            raise ClusterError(f"device {first} is in two meshes, but one process only can use a TPU chip")
        ends = first + count


def _reason(text: str) -> str:
    """Ray's account of a death in a few words."""
    if "node has died" in text or "unavailable" in text:
        return "its host is gone or does not answer"
    if "running low on memory" in text:
        return "Ray ended it because the host ran low on memory"
    if "intended" in text.lower() or "ray.kill" in text:
        return "it was ended from outside"
    return "it was killed or crashed (the kernel kills processes when memory runs out)"
