"""The devices of this process and the cluster that describes them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding

from alpa_like.cluster import Cluster
from alpa_like.errors import ClusterError
from alpa_like.reshard import Layout
from alpa_like.runtime.emulation import EMULATED_DEVICES, threads_for
from alpa_like.runtime.remote import Remote
from alpa_like.runtime.remote_arrays import RemotePlace
from alpa_like.runtime.transport import sharding_of

__all__ = ["Session", "current", "restart", "start", "start_on_ray", "stop"]

logger = logging.getLogger("alpa_like")


@dataclass(frozen=True, slots=True)
class Session:
    """`devices` are those that steps run on; `cluster` is what plans are made for unless a call names another.

    `remote` are the worker processes that have the devices, None where they are this process's own.
    """

    devices: Sequence[Any]
    cluster: Cluster | None
    remote: Remote | None = None
    max_restarts: int = 0
    wait_s: float = 300.0

    def described(self) -> Cluster:
        """The cluster to plan for: the one given to `start`, or a calibrated description of the devices."""
        if self.cluster is not None:
            return self.cluster
        return self.remote.workers.cluster if self.remote else Cluster.local(len(self.devices))

    @property
    def platform(self) -> str | None:
        """What steps are lowered for, None for the platform of this process."""
        return self.remote.devices.lowering_platform if self.remote else None

    def place(self, layout: Layout) -> NamedSharding | RemotePlace:
        """Where an array lives that lies so."""
        return self.remote.place(layout) if self.remote else sharding_of(layout, self.devices)


_sessions: list[Session] = []
_ended: list[int] = []
"""The number of the last session, if it was on Ray and nobody began another one."""


def start_on_ray(
    cluster: Cluster | None,
    address: str | None,
    num_devices: int | None,
    num_hosts: int | None,
    max_restarts: int,
    wait_s: float,
) -> Session:
    """Begin a session on the hosts of a Ray cluster; see `alpa_like.init`."""
    from alpa_like.runtime.ray_cluster import RayCluster  # Ray is an extra, and takes long to import

    _check_size(cluster, num_devices)
    if cluster is not None:
        num_devices, num_hosts = cluster.num_devices, cluster.hosts if num_hosts is None else num_hosts
    RayCluster.check(address=address, num_devices=num_devices, num_hosts=num_hosts)  # before the old session ends
    _leave_accelerators()
    stop()
    workers = RayCluster.start(address=address, num_devices=num_devices, num_hosts=num_hosts, wait_s=wait_s)
    remote = Remote(workers)
    _sessions.append(Session(remote.devices, cluster, remote, max_restarts, wait_s))
    return _sessions[0]


def restart() -> Session:
    """Begin again on the hosts that are left, after workers of the session have died."""
    old = current()
    assert old.remote is not None
    old.remote.stop_asking()
    workers = old.remote.workers.restart(old.wait_s)
    _sessions.clear()
    remote = Remote(workers)
    cluster = old.cluster
    if cluster is not None and cluster.num_devices != workers.num_devices:
        size = workers.devices_per_host
        cluster = cluster.part(workers.num_devices // size, size)
    _sessions.append(Session(remote.devices, cluster, remote, old.max_restarts, old.wait_s))
    return _sessions[0]


def _leave_accelerators() -> None:
    """The driver needs a CPU only, and must not take memory of the devices that its workers are to have."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
    if jax.devices()[0].platform != "cpu":
        logger.warning(
            "JAX has started on %s in this process, which keeps the memory there from the workers; call alpa.init "
            "before anything else uses JAX",
            jax.devices()[0].platform,
        )


def start(cluster: Cluster | None = None, num_devices: int | None = None) -> Session:
    """Begin a session in this process; see `alpa_like.init`."""
    _check_size(cluster, num_devices)
    wanted = num_devices or (cluster.num_devices if cluster else None)
    emulate(wanted or EMULATED_DEVICES)
    devices = jax.devices()
    if wanted and len(devices) < wanted:
        raise ClusterError(
            f"{wanted} devices were asked for, but JAX has {len(devices)} ({devices[0].platform}). If they are "
            "emulated CPU devices, call alpa.init() before anything else uses JAX, or set "
            f"JAX_NUM_CPU_DEVICES={wanted} in the environment; else ask for at most {len(devices)}"
        )
    if not wanted and devices[0].platform == "cpu" and len(devices) < EMULATED_DEVICES and not _asked_elsewhere():
        logger.warning(
            "alpa.init() found JAX started with %d CPU device(s), so %d can't be emulated any more; call it before "
            "anything else uses JAX",
            len(devices),
            EMULATED_DEVICES,
        )
    stop()
    _ended.clear()
    _sessions.append(Session(tuple(devices[:wanted]), cluster))
    return _sessions[0]


def _check_size(cluster: Cluster | None, num_devices: int | None) -> None:
    """Raise `ClusterError` unless `num_devices` is a count that the description has, too."""
    if num_devices is not None and (type(num_devices) is not int or num_devices < 1):
        raise ClusterError(f"num_devices must be a whole number of at least 1, found {num_devices!r}")
    if cluster is not None and type(cluster) is not Cluster:
        raise ClusterError(f'cluster must be an alpa_like.Cluster, "ray" or None, found {cluster!r}')
    if cluster is not None and num_devices not in (None, cluster.num_devices):
        raise ClusterError(
            f"num_devices is {num_devices}, but cluster {cluster.name} has {cluster.num_devices} devices"
        )


def _asked_elsewhere() -> bool:
    """Whether the environment says how many CPU devices there are to be."""
    flags = os.environ.get("XLA_FLAGS", "")
    return "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in flags


def emulate(count: int) -> None:
    """Ask for `count` CPU devices, if JAX has not started. Touches no device; without effect on GPUs and TPUs."""
    os.environ.setdefault("NPROC", threads_for(count))
    if _asked_elsewhere():
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        logger.debug("JAX has started already; the number of devices stays %d", len(jax.devices()))


def current() -> Session:
    """The session, started with defaults if there is none; after one on Ray, on what this process has."""
    if _sessions:
        return _sessions[0]
    if not _ended:
        return start()
    found = jax.devices()
    logger.warning(
        "the Ray session has ended, so from here on steps run on %d %s device(s) of this process; call alpa.init to "
        "choose others",
        len(found),
        found[0].platform,
    )
    return start(num_devices=len(found))


def stop() -> None:
    """End the session, and its workers if there are some."""
    for session in _sessions:
        _ended.clear()
        if session.remote is not None:
            session.remote.stop()
            _ended.append(session.remote.number)
    _sessions.clear()
