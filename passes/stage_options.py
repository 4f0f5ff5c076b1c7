"""What the search of stages chooses from: submeshes of a cluster, and options for layers on them.

Which submeshes fit into a cluster together is a question of numbers alone, see `Rooms`; where each lies is found last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from alpa_like.cluster import Cluster
from alpa_like.errors import PlanError

__all__ = ["Costs", "Flags", "Ints", "Option", "Rooms", "Submesh", "place", "submeshes"]

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Submesh:
    """`hosts` × `devices_per_host` devices: whole hosts, or a power of two of devices inside one."""

    hosts: int
    devices_per_host: int

    @property
    def num_devices(self) -> int:
        return self.hosts * self.devices_per_host

    def __str__(self) -> str:
        return f"{self.hosts}×{self.devices_per_host}"


def submeshes(cluster: Cluster) -> tuple[Submesh, ...]:
    """(1, 1), (1, 2), (1, 4), … up to a host, the host, and (n, all its devices) for 2 to all hosts."""
    whole = cluster.devices_per_host
    inside = [2**k for k in range(whole.bit_length()) if 2**k < whole]
    return (*(Submesh(1, n) for n in inside), *(Submesh(n, whole) for n in range(1, cluster.hosts + 1)))


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a range of layers on a submesh; bytes are those of the fullest device.

    `forward_s` and `backward_s` are of one micro-batch, `update_s` of the update once per step. `fixed_bytes` are held
    all step, `micro_bytes` for each micro-batch in flight, `peak_bytes` at times on top. `tag` is the caller's own.
    """

    forward_s: float
    backward_s: float
    update_s: float
    fixed_bytes: float
    micro_bytes: float
    peak_bytes: float
    tag: object = None

    def __post_init__(self) -> None:
        numbers = (self.forward_s, self.backward_s, self.update_s, self.fixed_bytes, self.micro_bytes, self.peak_bytes)
        if not all(0 <= n < math.inf for n in numbers):
            raise PlanError(f"seconds and bytes of an option must be finite and at least 0, found {numbers}")

    @property
    def seconds(self) -> float:
        """Of one micro-batch, forward and backward."""
        return self.forward_s + self.backward_s

    def bytes(self, in_flight: int) -> float:
        """Bytes of the fullest device with that many micro-batches in flight."""
        return self.fixed_bytes + self.peak_bytes + in_flight * self.micro_bytes


class Costs(Protocol):
    """What the search asks for. Layers are numbered from 0, `last` is inclusive."""

    def options(self, first: int, last: int, submesh: Submesh) -> Sequence[Option]:
        """The ways that none of the others beats; empty if nothing fits at all. Asked at most once per argument."""
        ...

    def lower_bound_s(self, first: int, last: int, submesh: Submesh) -> float:
        """At most the least forward_s + backward_s of the options, and cheap; 0 is allowed. Asked for all arguments."""
        ...

    def send_s(self, boundary: int) -> float:
        """Seconds to move one micro-batch's activations, one way, across the cut after layer `boundary`."""
        ...


# ------------------------------------------------------------------------------------------------ devices


@dataclass(frozen=True)
class Rooms:
    """The devices that may be left, numbered; 0 is all of them, the last number stands for "impossible".

    Powers of two that are placed from large to small never leave a hole, so they fit into hosts of D devices exactly if
    for each power p the stages of at least p devices take no more blocks of p than the hosts have, floor(D / p) each.
    Where p divides D that follows from the number of devices (Alpa's packing theorem); what is left is therefore a
    vector: the devices, and the blocks of each power of two below D that does not divide it.
    """

    after: Ints
    """(submeshes, rests + 1): what is left after a submesh is taken."""
    before: Ints
    """Its inverse."""
    done: Flags
    """(rests + 1,): no device is left."""

    @classmethod
    def of(cls, cluster: Cluster, shapes: Sequence[Submesh]) -> Rooms:
        host = cluster.devices_per_host
        powers = [2**k for k in range(host.bit_length()) if 2**k < host]
        blocks = [1, *(p for p in powers if host % p)]
        needs = [np.array([_blocks(shape, host, p) for p in blocks]) for shape in shapes]
        rests = _reachable(np.array([cluster.hosts * (host // p) for p in blocks]), needs)
        number = {rest: i for i, rest in enumerate(rests)}
        table = np.array(rests)

        def look_up(sign: int, need: Ints) -> list[int]:
            return [number.get(tuple(row), len(rests)) for row in (table + sign * need).tolist()] + [len(rests)]

        after, before = (np.array([look_up(sign, need) for need in needs]) for sign in (-1, 1))
        return cls(after, before, np.append(table[:, 0] == 0, False))

    def counts(self, most: int) -> tuple[int, ...]:
        """The numbers of submeshes, up to `most`, that take all devices."""
        now, found = np.arange(len(self.done)) == 0, list[int]()
        for count in range(1, most + 1):
            after = self.after[:, now].ravel()
            now = np.zeros_like(self.done)
            now[after] = True
            now[-1] = False
            found += [count] if (now & self.done).any() else []
        return tuple(found)


def _blocks(shape: Submesh, host: int, power: int) -> int:
    """How many aligned blocks of `power` devices a submesh takes."""
    if shape.devices_per_host == host:
        return shape.hosts * (host // power)
    return shape.num_devices // power


def _reachable(everything: Ints, needs: Sequence[Ints]) -> list[tuple[int, ...]]:
    """All that can be left, most first."""
    start: tuple[int, ...] = tuple(everything.tolist())
    found, new = {start}, [start]
    while new:
        left = np.concatenate([np.array(new) - need for need in needs])
        left = left[(left >= 0).all(1)].tolist()
        new = sorted({tuple(rest) for rest in left} - found)
        found.update(new)
    return sorted(found, reverse=True)


def place(cluster: Cluster, shapes: Sequence[Submesh]) -> list[int]:
    """The first device of each submesh. From large to small each goes to the first host with room; see `Rooms`."""
    host = cluster.devices_per_host
    used = [0] * cluster.hosts
    first = [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -shapes[i].num_devices):
        shape = shapes[i]
        at = next(h for h in range(cluster.hosts) if used[h] + shape.devices_per_host <= host)
        first[i] = at * host + used[at]
        for h in range(at, at + shape.hosts):
            used[h] += shape.devices_per_host
    return first
