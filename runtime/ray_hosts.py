"""Chooses hosts in a Ray cluster and reserves their devices."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from alpa_like.cluster import Cluster, Link
from alpa_like.errors import ClusterError
from alpa_like.runtime.emulation import EMULATED_DEVICES
from alpa_like.runtime.ray_connection import (
    PlacementGroup,
    PlacementGroupSchedulingStrategy,
    inside_ray,
    nodes_alive,
    on_node,
    placement_group,
    placement_group_table,
    ray,
    remove_placement_group,
)

__all__ = [
    "Choice",
    "Host",
    "Reservation",
    "Want",
    "choose",
    "fitted",
    "reserve",
    "with_network",
]

logger = logging.getLogger("alpa_like")

_TRY_S = 5.0
_WATCH_S = 1.0
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
    keeper: Any
    choice: Choice
    hosts: tuple[Host, ...]
    bundles: tuple[int, ...]
    accelerator: str

    def on(self, host: int) -> PlacementGroupSchedulingStrategy:
        """Runs a task or an actor in the reserved part of the host with this number."""
        return PlacementGroupSchedulingStrategy(self.group, self.bundles[host])

    def release(self) -> None:
        remove_placement_group(self.group)
        if self.keeper is not None:
            ray.kill(self.keeper)


class Keeper:
    """An actor that reserves for a driver that is a Ray task or actor, and that ends when the driver's process does.

    Ray would keep a group of that process until the whole job has ended, so that a training that was killed could not
    be started again. The group of a detached actor goes when the actor goes.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._self = ray.get_runtime_context().current_actor
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with suppress(ProcessLookupError):
            while True:
                with suppress(PermissionError):  # it is there, and somebody else's
                    os.kill(self._pid, 0)
                time.sleep(_WATCH_S)
        ray.kill(self._self)

    def reserve(self, bundles: list[dict[str, float]], strategy: str) -> PlacementGroup:
        return placement_group(bundles, strategy=strategy)


def _start_keeper() -> Any:
    """On this host, for this process; None if it is a driver, as those end with their job."""
    if not inside_ray():
        return None
    remote: Any = ray.remote  # its overloads don't know all options
    here = on_node(ray.get_runtime_context().get_node_id())
    names = {"name": f"keeper-{uuid.uuid4().hex}", "namespace": "alpa_like"}
    keeper = remote(num_cpus=0, lifetime="detached", scheduling_strategy=here, **names)(Keeper)
    return keeper.remote(os.getpid())


def _resource(platform: str) -> str:
    return next((resource for resource, name in _RESOURCES if name == platform), "CPU")


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
    choose(nodes_alive(), want)  # raises what can't be, before anything is started
    keeper = _start_keeper()
    try:
        return _reserve(want, wait_s, keeper, grows=grows)
    except BaseException:
        if keeper is not None:
            ray.kill(keeper)
        raise


def _reserve(want: Want, wait_s: float, keeper: Any, *, grows: bool) -> Reservation:
    deadline, log_s = time.monotonic() + wait_s, _TRY_S
    next_log = time.monotonic() + log_s
    while True:
        choice = choose(nodes_alive(), want)
        if choice.hosts <= choice.there:
            reservation = _try_to_reserve(choice, keeper, min(max(deadline - time.monotonic(), 0.1), _TRY_S))
            if reservation is not None:
                return reservation
        state = _state(choice)
        late = time.monotonic() > deadline
        if late or (choice.hosts > choice.there and not grows):
            raise ClusterError(
                f"expected {choice}, but {state}{f' after {wait_s:g} s' if late else ''}. Ask for fewer with num_hosts "
                "and num_devices, stop what else uses the cluster, or start more nodes"
            )
        if time.monotonic() > next_log:
            logger.warning("waiting for %s: %s", choice, state)
            log_s *= 2
            next_log = time.monotonic() + log_s
        time.sleep(min(0.2, wait_s))


def _state(choice: Choice) -> str:
    if choice.there < choice.hosts:
        return f"{choice.there} of {choice.hosts} are there"
    resource = _resource(choice.platform)
    free, total = (what.get(resource, 0) for what in (ray.available_resources(), ray.cluster_resources()))
    state = f"they are in use: {free:g} of the cluster's {total:g} {resource} are free"
    own = ray.get_runtime_context().get_assigned_resources().get(resource, 0) if inside_ray() else 0
    return f"{state}, and this Ray task itself holds {own:g}, which it does not need" if own else state


def _try_to_reserve(choice: Choice, keeper: Any, wait_s: float) -> Reservation | None:
    strategy, bundles = "STRICT_SPREAD" if choice.hosts > 1 else "PACK", [choice.bundle()] * choice.hosts
    group: PlacementGroup = (
        ray.get(keeper.reserve.remote(bundles, strategy)) if keeper else placement_group(bundles, strategy=strategy)
    )
    try:
        if group.wait(wait_s):
            return _reservation(group, keeper, choice)
    except BaseException:
        remove_placement_group(group)
        raise
    remove_placement_group(group)
    return None


def _reservation(group: PlacementGroup, keeper: Any, choice: Choice) -> Reservation:
    """Numbers the hosts by TPU slice and worker number, else by address, and not by how Ray placed them."""
    placed: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    nodes = {node["NodeID"]: node for node in ray.nodes()}
    order = sorted(placed, key=lambda bundle: _order(nodes[placed[bundle]]))
    hosts = tuple(_host(nodes[placed[bundle]]) for bundle in order)
    return Reservation(group, keeper, choice, hosts, tuple(order), _accelerator(nodes[hosts[0].node_id]))


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
