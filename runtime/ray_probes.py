"""Small Ray tasks that look at a host: what is installed there, what a worker wrote last, which processes are left.

Their functions are made inside other functions, because Ray then sends their code along: they also run on a host that
lacks this package. So they import what they use, and use nothing of this module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from alpa_like.errors import ClusterError, WorkerError
from alpa_like.runtime.ray_connection import (
    GetTimeoutError,
    RayError,
    first_and_last_line,
    nodes_alive,
    on_node,
    ray,
)
from alpa_like.runtime.ray_hosts import Host, Reservation

__all__ = ["device_ids", "log_tail", "wait_for_nodes"]

_PACKAGE = "alpa_like"
_INSPECT_S = 120
_TAIL_S = 5
_EXIT_S = 10
_PING_S = 1.0

Versions = dict[str, str]


def inspector() -> Callable[[str], tuple[Versions, dict[str, list[str]]]]:
    """A function that returns the versions installed where it runs, "" for none, and the ids of its task's devices."""

    def inspect(package: str) -> tuple[dict[str, str], dict[str, list[str]]]:
        import hashlib
        import importlib.metadata
        import importlib.util
        import platform
        from pathlib import Path

        import ray

        found = {"Python": ".".join(platform.python_version_tuple()[:2]), package: ""}
        for name in ("jax", "jaxlib"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = ""
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            # The sources decide: checkouts of different states have the same version number.
            root, digest = Path(spec.origin).parent, hashlib.sha256()
            for file in sorted([*root.glob("*.py"), *root.glob("runtime/*.py")]):
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
            found[package] = f"sources {digest.hexdigest()[:12]}"
        return found, ray.get_runtime_context().get_accelerator_ids()

    return inspect


def driver_versions() -> Versions:
    return inspector()(_PACKAGE)[0]


def device_ids(reservation: Reservation) -> tuple[tuple[str, ...], ...]:
    """The ids of our devices on each host. Raises `ClusterError` if a host has not the versions that the driver has."""
    choice = reservation.choice
    devices: dict[str, Any] = {}
    if choice.platform != "cpu":
        resource, count = next(iter(choice.bundle().items()))
        devices = {"num_gpus": count} if resource == "GPU" else {"resources": {resource: count}}
    inspect = ray.remote(num_cpus=0, max_retries=0, **devices)(inspector())
    refs = [inspect.options(scheduling_strategy=reservation.on(host)).remote(_PACKAGE) for host in range(choice.hosts)]
    found = _answers(refs, reservation.hosts)
    for host, (versions, _) in zip(reservation.hosts, found, strict=True):
        check_versions(host, versions, driver_versions())
    return tuple(tuple(next(iter(ids.values()), ())) if devices else () for _, ids in found)


def _answers(refs: Sequence[Any], hosts: Sequence[Host]) -> list[Any]:
    deadline, answers = time.monotonic() + _INSPECT_S, []
    for ref, host in zip(refs, hosts, strict=True):
        while not ray.wait([ref], timeout=_PING_S)[0]:
            if host.node_id not in {node["NodeID"] for node in nodes_alive()}:
                raise WorkerError(f"host {host} died as it was reserved")
            if time.monotonic() > deadline:
                raise ClusterError(f"host {host} started no process in {_INSPECT_S} s; see Ray's logs there")
        try:
            answers.append(ray.get(ref))
        except RayError as error:
            raise WorkerError(f"host {host} can't run a task: {first_and_last_line(str(error))}") from error
    return answers


def check_versions(host: Host, found: Versions, expected: Versions) -> None:
    """Raises `ClusterError` at the first package that differs."""
    for name, version in expected.items():
        if found.get(name) == version:
            continue
        state = f"has {name} {found[name]}" if found.get(name) else f"has no {name}"
        what = name.replace("_", "-")
        raise ClusterError(
            f"host {host} {state}, but the driver has {version}: install the same {what} in the environment of each "
            "node's `ray start`, or ship it with Ray's runtime_env"
        )


def log_tail(host: Host, path: str, lines: int = 15) -> list[str]:
    """The last lines of a file on a host, or one line in parentheses that says why there are none."""
    if not path:
        return ["(its log is not a file)"]
    read = ray.remote(num_cpus=0, max_retries=0)(_tail_reader())
    ref = read.options(scheduling_strategy=on_node(host.node_id)).remote(path, lines)
    try:
        return ray.get(ref, timeout=_TAIL_S) or ["(its log is empty)"]
    except GetTimeoutError:
        return [f"(its host did not send {path} in {_TAIL_S} s)"]
    except RayError:
        return [f"(its log was {path}, but that host is gone)"]


def _tail_reader() -> Callable[[str, int], list[str]]:
    def tail(path: str, lines: int) -> list[str]:
        with open(path, "rb") as file:
            file.seek(max(file.seek(0, 2) - 16384, 0))
            text = file.read().decode("utf-8", "replace")
        kept = [line for line in text.splitlines() if line.strip() and not line.startswith(":")]  # ":" is for Ray
        return kept[-lines:]

    return tail


def wait_for_nodes(processes: dict[str, list[int]], wait_s: float) -> None:
    """Return when each node is marked dead, or answers and has none of our old `processes` (by node id) any more.

    Ray takes up to half a minute to notice that a node is gone, and would place workers on it until then. Raises
    `ClusterError` after `wait_s`.
    """
    ask = ray.remote(num_cpus=0, max_retries=0)(_exit_waiter())
    deadline = time.monotonic() + wait_s
    refs: dict[str, Any] = {}
    while True:
        alive = {node["NodeID"] for node in nodes_alive()}
        open_nodes = [node for node in processes if node in alive and not _answered(refs.get(node))]
        if not open_nodes:
            return
        if time.monotonic() > deadline:
            raise ClusterError(f"{len(open_nodes)} node(s) neither answer nor are marked dead after {wait_s:g} s")
        for node in open_nodes:
            if node not in refs:
                refs[node] = ask.options(scheduling_strategy=on_node(node)).remote(processes[node], _EXIT_S)
        ray.wait(list(refs.values()), num_returns=len(refs), timeout=_PING_S)


def _answered(ref: Any) -> bool:
    """Whether the task has returned; one that failed has not, as its node is about to be marked dead."""
    if ref is None or not ray.wait([ref], timeout=0)[0]:
        return False
    try:
        ray.get(ref)
    except RayError:
        return False
    return True


def _exit_waiter() -> Callable[[list[int], float], bool]:
    def wait_for_exit(pids: list[int], timeout_s: float) -> bool:
        import time
        from pathlib import Path

        def runs(pid: int) -> bool:
            try:
                status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                return False
            return status.rpartition(")")[2].split()[0] != "Z"  # a zombie has nothing any more

        deadline = time.monotonic() + timeout_s
        while any(map(runs, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return not any(map(runs, pids))

    return wait_for_exit
