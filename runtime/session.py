"""The devices of this process and the cluster that describes them."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import jax

from alpa_like.cluster import Cluster
from alpa_like.errors import ClusterError

__all__ = ["Session", "current", "start", "stop"]

logger = logging.getLogger("alpa_like")

EMULATED_DEVICES = 8
_THREADS_PER_DEVICE = 4
"""XLA's CPU backend starves at a rendezvous when it has fewer threads than programs in flight need."""


@dataclass(frozen=True, slots=True)
class Session:
    """`devices` are those that steps run on; `cluster` is what plans are made for unless a call names another."""

    devices: tuple[Any, ...]
    cluster: Cluster | None

    def described(self) -> Cluster:
        """The cluster to plan for: the one given to `start`, or a calibrated description of the devices here."""
        return self.cluster or Cluster.local(len(self.devices))


_sessions: list[Session] = []


def start(cluster: Cluster | None = None, num_devices: int | None = None) -> Session:
    """Begin a session; see `alpa_like.init`."""
    if num_devices is not None and (type(num_devices) is not int or num_devices < 1):
        raise ClusterError(f"num_devices must be a whole number of at least 1, found {num_devices!r}")
    if cluster is not None and type(cluster) is not Cluster:
        raise ClusterError(f"cluster must be an alpa_like.Cluster or None, found {cluster!r}")
    if cluster is not None and num_devices not in (None, cluster.num_devices):
        raise ClusterError(
            f"num_devices is {num_devices}, but cluster {cluster.name} has {cluster.num_devices} devices"
        )
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
    _sessions.append(Session(tuple(devices[:wanted]), cluster))
    return _sessions[0]


def _asked_elsewhere() -> bool:
    """Whether the environment says how many CPU devices there are to be."""
    flags = os.environ.get("XLA_FLAGS", "")
    return "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in flags


def emulate(count: int) -> None:
    """Ask for `count` CPU devices, if JAX has not started. Touches no device; without effect on GPUs and TPUs."""
    os.environ.setdefault("NPROC", str(_THREADS_PER_DEVICE * max(count, EMULATED_DEVICES)))
    if _asked_elsewhere():
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        logger.debug("JAX has started already; the number of devices stays %d", len(jax.devices()))


def current() -> Session:
    """The session, started with defaults if there is none."""
    return _sessions[0] if _sessions else start()


def stop() -> None:
    """Forget the session."""
    _sessions.clear()
