"""What runs inside a worker process: its environment, JAX's start, and the actor's methods. Imports no Ray."""

from __future__ import annotations

import importlib
import os
import re
import socket
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from alpa_like.cluster import Cluster
from alpa_like.errors import ClusterError
from alpa_like.runtime.emulation import threads_for

__all__ = ["Located", "WorkerProcess", "WorkerSetup", "environment", "measure"]

_START_S = 120
_HEARTBEAT_S = 15
"""A process that is silent for so long ends its whole group. JAX's default of 100 s would leave the others hanging."""

NOTE = "in "
"""What the note starts with that names the worker in which an error was raised."""

_EMULATED = r"\s*--xla_force_host_platform_device_count=\S*"
_TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """Devices `first` to `first + count - 1` of the cluster are a group of `num_processes` worker processes.

    This one is number `process_id` and has `devices_per_process` of them. `coordinator` is the `ip:port` where the
    group meets, None if there is one process only. `host_ip` is the address at which other hosts reach this one.
    """

    first: int
    count: int
    process_id: int
    num_processes: int
    coordinator: str | None
    platform: str
    devices_per_process: int
    host_ip: str


@dataclass(frozen=True, slots=True)
class Located:
    """Where an actor's process is: `log` is the file that its standard error goes to, `port` was free just now.

    `used`: JAX runs there already, as Ray gives actors the processes of earlier tasks.
    """

    pid: int
    log: str
    port: int
    used: bool


def environment(platform: str, devices: int, visible: Sequence[str], *, whole_host: bool) -> dict[str, str]:
    """What has to be in the environment before JAX starts on `devices` devices of a host; `visible` are their ids.

    Ray sets CUDA_VISIBLE_DEVICES and TPU_VISIBLE_CHIPS itself for actors that own devices. Ours own none, as the
    placement group does, so that workers of different meshes can share the devices of a host.
    """
    if platform == "cpu":
        flags = re.sub(_EMULATED, "", os.environ.get("XLA_FLAGS", ""))
        return {"JAX_PLATFORMS": "cpu", "NPROC": threads_for(devices), "XLA_FLAGS": flags}
    result = {"JAX_PLATFORMS": f"{platform},cpu"}
    if platform == "cuda":
        # Each process would else take three quarters of the memory of a device that several meshes use.
        preallocate = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        result |= {"CUDA_VISIBLE_DEVICES": ",".join(visible), "XLA_PYTHON_CLIENT_PREALLOCATE": preallocate}
    elif not whole_host:
        if devices not in _TPU_BOUNDS:
            raise ClusterError(f"a process can have 1, 2, 4 or all chips of a TPU host, asked for {devices}")
        result |= {"TPU_VISIBLE_CHIPS": ",".join(visible), "TPU_HOST_BOUNDS": "1,1,1"}
        result |= {"TPU_CHIPS_PER_HOST_BOUNDS": _TPU_BOUNDS[devices]}
    return result


def configure(platform: str, devices: int, variables: dict[str, str]) -> None:
    """Prepare JAX, which is imported but has not started yet, for `devices` devices of `platform`."""
    os.environ.update(variables)
    jax.config.update("jax_platforms", variables["JAX_PLATFORMS"])
    # With it, the processes that a dead one leaves behind inside a collective hang; without it they end.
    jax.config.update("jax_enable_recoverability", False)
    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", devices)


def _jax_runs() -> bool:
    """Whether JAX has started in this process, so that its devices can't be chosen any more."""
    count: int = jax.config.values["jax_num_cpu_devices"]
    try:
        jax.config.update("jax_num_cpu_devices", count + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", count)
    return False


def measure(platform: str, devices: int, variables: dict[str, str]) -> dict[str, Any] | None:
    """This host's devices as `Cluster.to_json` writes them; None if another process has to do it."""
    if _jax_runs():
        return None
    configure(platform, devices, variables)
    return Cluster.local(devices).to_json()


class WorkerProcess:
    """What a worker actor does. The class named by `begin` does the work."""

    def __init__(self) -> None:
        self._body: Any = None
        self._name = ""

    def locate(self) -> Located:
        with socket.create_server(("", 0)) as server:
            port: int = server.getsockname()[1]
        return Located(os.getpid(), _log_file(), port, _jax_runs())

    def begin(self, name: str, setup: WorkerSetup, variables: dict[str, str], body: str) -> None:
        """Start JAX, meet the other processes of the group, and make the body, `module:Class`."""
        self._name = name
        with self._named():
            configure(setup.platform, setup.devices_per_process, variables)
            if setup.coordinator is not None:
                _join(setup, setup.coordinator)
            _check_devices(setup)
            module, _, class_name = body.partition(":")
            self._body = getattr(importlib.import_module(module), class_name)(setup)

    def call(self, method: str, *args: Any) -> Any:
        with self._named():
            return getattr(self._body, method)(*args)

    @contextmanager
    def _named(self) -> Generator[None]:
        """Adds this worker's name to what is raised."""
        try:
            yield
        except Exception as error:
            error.add_note(f"{NOTE}{self._name}")
            raise


def _log_file() -> str:
    """The file behind standard error, empty if that is none that others can read."""
    try:
        path = os.readlink("/proc/self/fd/2")
    except OSError:
        return ""
    return path if os.path.isfile(path) else ""


def _join(setup: WorkerSetup, coordinator: str) -> None:
    jax.distributed.initialize(
        coordinator_address=coordinator,
        num_processes=setup.num_processes,
        process_id=setup.process_id,
        coordinator_bind_address=coordinator if setup.process_id == 0 else None,
        cluster_detection_method="deactivate",  # everything is given; MPI's or Slurm's variables must not matter
        initialization_timeout=_START_S,
        heartbeat_timeout_seconds=_HEARTBEAT_S,
        shutdown_timeout_seconds=_HEARTBEAT_S,
    )


def _check_devices(setup: WorkerSetup) -> None:
    """Raises `ClusterError` unless the group has the devices that it should have, in the order of its processes."""
    try:
        here, total = jax.local_device_count(), jax.device_count()
    except RuntimeError as error:
        install = f"; install jax[{setup.platform}] on every host" if setup.platform != "cpu" else ""
        raise ClusterError(f"JAX can't start on {setup.platform}: {error}{install}") from error
    if (here, total) != (setup.devices_per_process, setup.count):
        raise ClusterError(
            f"{setup.devices_per_process} of {setup.count} {setup.platform} devices were expected in process "
            f"{setup.process_id} of {setup.num_processes}, but JAX sees {here} of {total}. Let no other process use "
            "the devices, and give Ray as many as the host has"
        )
    if jax.process_index() != setup.process_id:
        raise ClusterError(
            f"process {setup.process_id} of {setup.num_processes} is number {jax.process_index()} to JAX: the hosts "
            "are numbered in another order than the devices"
        )
