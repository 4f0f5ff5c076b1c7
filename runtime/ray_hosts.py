"""Finds a Ray cluster, chooses hosts in it and reserves their devices. Of our modules, only this and
`ray_cluster` import Ray."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alpa_like.cluster import Cluster, Link
from alpa_like.errors import ClusterError

try:
    # The other modules take these from here, so that there is one sentence if they are missing.
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.placement_group import (
        PlacementGroup,
        placement_group,
        placement_group_table,
        remove_placement_group,
    )
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
except ImportError as missing:
    raise ClusterError(
        "a Ray cluster needs Ray, which is not installed here: pip install 'alpa-like[ray]'"
    ) from missing

__all__ = [
    "Choice",
    "GetTimeoutError",
    "Host",
    "NodeAffinitySchedulingStrategy",
    "PlacementGroupSchedulingStrategy",
    "RayError",
    "Reservation",
    "Want",
    "check_address",
    "choose",
    "connect",
    "first_and_last_line",
    "fitted",
    "nodes_alive",
    "ray",
    "reserve",
    "with_network",
]

logger = logging.getLogger("alpa_like")

EMULATED_DEVICES = 8
_CONNECT_S = 10.0
_LOG_EVERY_S = 5.0
_CLIENT_PORT = 10001
_RESOURCES = (("TPU", "tpu"), ("GPU", "cuda"))

_PRESETS: dict[str, Callable[[int], Cluster]] = {
    "V100": Cluster.p3_16xlarge,
    "A100": Cluster.dgx_a100,
    "H100": Cluster.dgx_h100,
    "H200": Cluster.dgx_h200,
    "TPU-V4": Cluster.tpu_v4,
    "TPU-V5LITEPOD": Cluster.tpu_v5e,
    "TPU-V5P": Cluster.tpu_v5p,
}


@dataclass(frozen=True, slots=True)
class Host:
    """A Ray node with devices of ours."""

    node_id: str
    ip: str
    name: str

    def __str__(self) -> str:
        return self.ip if self.name == self.ip else f"{self.name} ({self.ip})"


@dataclass(frozen=True, slots=True)
class Want:
    """What the user asked for; None is: whatever is there."""

    num_devices: int | None = None
    num_hosts: int | None = None

    def __post_init__(self) -> None:
        for what, value in (("num_devices", self.num_devices), ("num_hosts", self.num_hosts)):
            if value is not None and (type(value) is not int or value < 1):
                raise ClusterError(f"{what} must be a whole number of at least 1, found {value!r}")
        if self.num_devices and self.num_hosts and self.num_devices % self.num_hosts:
            raise ClusterError(
                f"{self.num_devices} devices can't be spread evenly over {self.num_hosts} hosts; ask for a multiple of "
                f"{self.num_hosts}"
            )


@dataclass(frozen=True, slots=True)
class Choice:
    """`hosts` hosts with `devices_per_host` devices each, of which `there` hosts exist now."""

    platform: str
    devices_per_host: int
    hosts: int
    there: int

    def bundle(self) -> dict[str, float]:
        resource = _resource(self.platform)
        return {resource: 1.0 if resource == "CPU" else float(self.devices_per_host)}

    def __str__(self) -> str:
        resource = _resource(self.platform)
        kind = "emulated device(s)" if resource == "CPU" else resource
        return f"{self.hosts} host(s) with {self.devices_per_host} {kind} each"


@dataclass(frozen=True, slots=True)
class Reservation:
    """The devices of `hosts`, kept for us until `release`; `bundles[i]` is the part of `group` on host i."""

    group: PlacementGroup
    choice: Choice
    hosts: tuple[Host, ...]
    bundles: tuple[int, ...]
    accelerator: str

    def release(self) -> None:
        remove_placement_group(self.group)


def _resource(platform: str) -> str:
    return next((resource for resource, name in _RESOURCES if name == platform), "CPU")


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
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=forward, **options)
    except (ConnectionError, OSError, RuntimeError, ValueError, SystemExit) as error:
        # Where nothing answers, Ray tries for two minutes and then ends the process by a signal, hence SystemExit.
        reason = first_and_last_line(str(error)) or "no answer"
        what = "start Ray on this machine" if address == "local" else f"join the Ray cluster at {address}"
        raise ClusterError(f"can't {what}: {reason}. `ray status` on its head node says whether it is up") from error


def check_address(address: str) -> None:
    """Raises `ClusterError` within seconds if `address` is not `host:port` of something that may be a Ray head."""
    if address.startswith("ray://"):
        raise ClusterError(
            f"address {address!r} is Ray Client's, which can't run this; start the driver on a machine of the cluster "
            "(or with `ray job submit`) and give the head's host:port, such as 10.0.0.1:6379"
        )
    host, colon, port = address.rpartition(":")
    if address == "auto" or not (colon and host and port.isdecimal()):
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


def nodes_alive() -> list[dict[str, Any]]:
    """The records of `ray.nodes()` whose nodes are alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def choose(nodes: Sequence[Mapping[str, Any]], want: Want) -> Choice:
    """Which kind of hosts to take, and how many. Raises `ClusterError` if no number of such hosts would do.

    Accelerators go before CPUs. Hosts have equally many devices: where nodes differ, the largest group is taken.
    """
    for resource, platform in _RESOURCES:
        counts = Counter(int(node["Resources"].get(resource, 0)) for node in nodes)
        del counts[0]
        if counts:
            return _choose_accelerators(platform, counts, want)
    return _choose_emulated(sum(node["Resources"].get("CPU", 0) >= 1 for node in nodes), want)


def _choose_accelerators(platform: str, counts: Counter[int], want: Want) -> Choice:
    size, there = max(counts.items(), key=lambda item: (item[0] * item[1], item[0]))
    if len(counts) > 1:
        found = ", ".join(f"{hosts} with {count}" for count, hosts in sorted(counts.items()))
        logger.warning("the nodes have different numbers of devices (%s): those with %d are used", found, size)
    devices = want.num_devices
    if devices is None:
        return Choice(platform, size, want.num_hosts or there, there)
    if devices < size and want.num_hosts in (None, 1):
        return Choice(platform, devices, 1, there)
    hosts = want.num_hosts or max(devices // size, 1)
    if devices % hosts or devices // hosts > size or (want.num_hosts is None and devices % size):
        raise ClusterError(
            f"{devices} {_resource(platform)} were asked for, on hosts that have {size} each"
            f"{f', with {hosts} hosts' if want.num_hosts else ''}; ask for fewer than {size}, or a multiple of {size}"
        )
    return Choice(platform, devices // hosts, hosts, there)


def _choose_emulated(there: int, want: Want) -> Choice:
    hosts = want.num_hosts or max(min(there, want.num_devices or there), 1)
    devices = want.num_devices or hosts * -(-EMULATED_DEVICES // hosts)
    if devices % hosts:
        raise ClusterError(
            f"{devices} emulated devices can't be spread evenly over {hosts} hosts; ask for a multiple of {hosts}, or "
            "give num_hosts"
        )
    return Choice("cpu", devices // hosts, hosts, there)


def reserve(want: Want, wait_s: float, *, grows: bool = True) -> Reservation:
    """Hosts as wanted, reserved by one placement group. Waits up to `wait_s` for nodes to join and to become free.

    Raises `ClusterError` that says what was expected and found; at once if the cluster can't grow and is too small.
    """
    deadline, next_log = time.monotonic() + wait_s, time.monotonic() + _LOG_EVERY_S
    while True:
        choice = choose(nodes_alive(), want)
        if choice.hosts <= choice.there:
            reservation = _try_to_reserve(choice, min(max(deadline - time.monotonic(), 0.1), _LOG_EVERY_S))
            if reservation is not None:
                return reservation
        state = _state(choice)
        if time.monotonic() > deadline or (choice.hosts > choice.there and not grows):
            raise ClusterError(
                f"expected {choice}, but {state} after {wait_s:g} s. Ask for fewer with num_hosts and num_devices, "
                "stop what else uses the cluster, or start more nodes"
            )
        if time.monotonic() > next_log:
            logger.warning("waiting for %s: %s", choice, state)
            next_log = time.monotonic() + _LOG_EVERY_S
        time.sleep(min(0.2, wait_s))


def _state(choice: Choice) -> str:
    if choice.there < choice.hosts:
        return f"{choice.there} of {choice.hosts} are there"
    resource = _resource(choice.platform)
    free, total = (what.get(resource, 0) for what in (ray.available_resources(), ray.cluster_resources()))
    return f"they are in use: {free:g} of the cluster's {total:g} {resource} are free"


def _try_to_reserve(choice: Choice, wait_s: float) -> Reservation | None:
    strategy = "STRICT_SPREAD" if choice.hosts > 1 else "PACK"
    group = placement_group([choice.bundle()] * choice.hosts, strategy=strategy)
    try:
        if group.wait(wait_s):
            return _reservation(group, choice)
    except BaseException:
        remove_placement_group(group)
        raise
    remove_placement_group(group)
    return None


def _reservation(group: PlacementGroup, choice: Choice) -> Reservation:
    """Numbers the hosts by TPU slice and worker number, else by address, and not by how Ray placed them."""
    placed: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    nodes = {node["NodeID"]: node for node in ray.nodes()}
    order = sorted(placed, key=lambda bundle: _order(nodes[placed[bundle]]))
    hosts = tuple(_host(nodes[placed[bundle]]) for bundle in order)
    return Reservation(group, choice, hosts, tuple(order), _accelerator(nodes[hosts[0].node_id]))


def _order(node: Mapping[str, Any]) -> tuple[Any, ...]:
    labels, ip = node.get("Labels", {}), node["NodeManagerAddress"]
    with suppress(ValueError):
        ip = ipaddress.ip_address(ip).packed.hex()
    digits = re.split(r"(\d+)", node.get("NodeName") or "")
    name = tuple(int(part) if part.isdecimal() else part for part in digits)
    worker = int(labels.get("ray.io/tpu-worker-id", 0))
    return labels.get("ray.io/tpu-slice-name", ""), worker, ip, name, node["NodeID"]


def _host(node: Mapping[str, Any]) -> Host:
    ip, name = node["NodeManagerAddress"], node.get("NodeName", "")
    return Host(node["NodeID"], ip, name if name and name != ip else node.get("NodeManagerHostname") or ip)


def _accelerator(node: Mapping[str, Any]) -> str:
    """Ray's name of the kind of accelerator, such as `H100`; empty if it has none."""
    found = (key.partition(":")[2] for key in node["Resources"] if key.startswith("accelerator_type:"))
    return next((name for name in sorted(found) if name in _PRESETS), "")


def fitted(accelerator: str, choice: Choice) -> Cluster | None:
    """The preset of these hosts, with as many devices as they have; None if the accelerator is not known."""
    if accelerator not in _PRESETS:
        return None
    cluster = _PRESETS[accelerator](choice.hosts)
    if choice.devices_per_host <= cluster.devices_per_host:
        return cluster.part(choice.hosts, choice.devices_per_host)
    return replace(cluster, devices_per_host=choice.devices_per_host)


def with_network(host: Cluster, hosts: int) -> Cluster:
    """`hosts` hosts like the measured one, with a network that nobody measured."""
    if hosts == 1:
        return host
    network = Link(10e9 / 8 / host.devices_per_host, 30e-6)
    sources = (*host.sources, "the network is a guess: 10 Gbit/s per host and 30 µs, as of Ethernet with TCP")
    return replace(host, hosts=hosts, inter_host=network, sources=sources)
