"""Finds a Ray cluster and joins it, or starts one. Our other modules take Ray from here, so that there is one sentence
if it is missing."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from pathlib import Path
from typing import Any

from alpa_like.errors import ClusterError

try:
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
except ImportError as missing:
    raise ClusterError(
        "a Ray cluster needs Ray, which is not installed here: pip install 'alpa-like[ray]'"
    ) from missing

__all__ = [
    "GetTimeoutError",
    "PlacementGroup",
    "PlacementGroupSchedulingStrategy",
    "RayError",
    "check_address",
    "check_given",
    "connect",
    "first_and_last_line",
    "inside_ray",
    "nodes_alive",
    "on_node",
    "placement_group",
    "placement_group_table",
    "ray",
    "remove_placement_group",
]

logger = logging.getLogger("alpa_like")

_CONNECT_S = 10.0
_CLIENT_PORT = 10001


def first_and_last_line(text: str) -> str:
    """They mostly say what was done and why it failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ... ".join([*lines[:1], *lines[1:][-1:]])


def connect(address: str | None) -> tuple[bool, bool]:
    """Be connected to a Ray cluster, and say whether we made the connection, and whether we started the cluster.

    `address` is `host:port`, "auto" (whatever runs here), "local" (start one here), or None: $RAY_ADDRESS, else what
    runs here, else a new one. A process that is connected already, such as a Ray task, stays so.
    """
    if ray.is_initialized():
        return False, False
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address in (None, "auto"):
        running = _running_here()
        address = running or address or "local"
    if address != "local":
        check_address(address)
    _ray_init(address)
    return True, address == "local"


def _running_here() -> str | None:
    """The address that `ray start` left on this machine, if a cluster still answers there."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        address = (Path(folder) / "ray" / "ray_current_cluster").read_text(encoding="utf-8").strip()
        check_address(address)
    except (OSError, ClusterError) as error:
        logger.debug("no running Ray cluster on this machine: %s", error)
        return None
    return address


def _ray_init(address: str) -> None:
    forward = os.environ.get("RAY_LOG_TO_DRIVER") == "1"
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        with warnings.catch_warnings():
            # JAX warns of forks as they stop its threads, but what Ray forks turns into another program at once.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=forward, **options)
    except (ConnectionError, OSError, RuntimeError, ValueError, SystemExit) as error:
        # Where nothing answers, Ray tries for two minutes and then ends the process by a signal, hence SystemExit.
        reason = first_and_last_line(str(error)) or "no answer"
        if address == "local":
            raise ClusterError(f"can't start Ray on this machine: {reason}") from error
        raise ClusterError(
            f"can't join the Ray cluster at {address}: {reason}. `ray status` on its head node says whether it is up; "
            "if it wants a token, set RAY_AUTH_MODE=token here and give the one that `ray get-auth-token` prints there"
        ) from error


def check_given(address: str | None) -> None:
    """Raises `ClusterError` for an address that nobody can join; what "auto" and None mean is found out later."""
    if address is not None and (not isinstance(address, str) or not address):
        raise ClusterError(f'address must be host:port of a Ray head node, "auto", "local" or None, found {address!r}')
    if address not in (None, "auto", "local"):
        check_address(address)


def check_address(address: str) -> None:
    """Raises `ClusterError` within seconds if `address` is not `host:port` of something that may be a Ray head."""
    if isinstance(address, str) and address.startswith("ray://"):
        raise ClusterError(
            f"address {address!r} is Ray Client's, which can't run this; start the driver on a machine of the cluster "
            "(or with `ray job submit`) and give the head's host:port, such as 10.0.0.1:6379"
        )
    host, colon, port = str(address).rpartition(":")
    if address == "auto" or "/" in host or not (colon and host and port.isdecimal()):
        raise ClusterError(
            "no Ray cluster runs on this machine: start one with `ray start --head`, or give its address"
            if address == "auto"
            else f"address must be host:port of a Ray head node, such as 10.0.0.1:6379, found {address!r}"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S) as connection:
            answers = "RAY_USE_TLS" in os.environ or _speaks_http2(connection)
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}); `ray start --head` prints the address on the head node"
        ) from error
    if not answers or int(port) == _CLIENT_PORT:
        raise ClusterError(
            f"what answers at {address} is not the head of a Ray cluster; `ray start --head` prints its address, whose "
            "port is 6379 unless another was chosen (8265 is the dashboard, 10001 Ray Client)"
        )


def _speaks_http2(connection: socket.socket) -> bool:
    """Whether the other side sends SETTINGS, as a gRPC server does. `ray.init` would try for minutes to find out."""
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    frame = connection.recv(9)
    return len(frame) >= 4 and frame[3] == 4


def inside_ray() -> bool:
    """Whether this process is a Ray task or actor, and not a driver."""
    return ray.get_runtime_context().worker.mode == ray.WORKER_MODE


def on_node(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Runs a task or an actor on this node and nowhere else."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def nodes_alive() -> list[dict[str, Any]]:
    """The records of `ray.nodes()` whose nodes are alive."""
    return [node for node in ray.nodes() if node["Alive"]]
