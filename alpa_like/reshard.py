"""Moving a tensor between two meshes: every element crosses once, over as many links at a time as there are.

A transfer has at most three steps, of which the middle one is all that crosses between the meshes:

    reshard    inside the sending mesh, where the pieces that travel are not whole on its devices     (`sending`)
    sends      equal pieces, each from one device that holds it whole to one device that lacks it     (`sends`)
    gather     inside the receiving mesh, where several devices need the same tile                    (`gather`)

A *tile* is what one device holds. The tiles of the target are cut into pieces, one or a few per receiving device, so
that all devices of the smaller mesh send, or receive, equally much; this is the "local all-gather" of cross-mesh
resharding in L. Zheng et al., "Alpa" (OSDI 2022), section 6. Where dims don't divide, a tile is flattened and padded.

Meshes that share some of their devices keep in place what is there already. On the same devices nothing is sent.
Reading, pricing and planning need no device.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from alpa_like.cluster import Cluster
from alpa_like.cost import ring_bytes
from alpa_like.errors import PlanError
from alpa_like.plan import Spec

__all__ = ["Cut", "Layout", "Send", "Transfer", "lower_bound_bytes", "plan_transfer"]

Shape = tuple[int, ...]
Send = tuple[int, int, int]
"""The number of a piece, the device that sends it and the one that receives it, as the cluster numbers them."""
Gather = Literal["none", "replicas", "mesh"]

_MOST_PIECES = 16
"""A device receives at most so many pieces: balance beyond that is not worth the messages."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a tensor lives: how `spec` splits it over a mesh of the `devices` (first, count), row-major.

    Example: `Layout((2, 2), ("x", "y"), (4, 4), ((0,), ()))` splits rows in two, each half on two of devices 4 to 7.
    """

    mesh_shape: tuple[int, ...]
    axis_names: tuple[str, ...]
    devices: tuple[int, int]
    spec: Spec

    def __post_init__(self) -> None:
        first, count = self.devices
        if math.prod(self.mesh_shape) != count or min(self.mesh_shape, default=0) < 1 or first < 0:
            raise PlanError(
                "a layout needs a mesh of one axis or more with as many devices as it numbers from 0 on, "
                f"found {self.mesh_shape} and devices (first, count) {self.devices}"
            )
        if len(self.axis_names) != len(self.mesh_shape) or len(set(self.axis_names)) < len(self.axis_names):
            raise PlanError(f"mesh {self.mesh_shape} needs one name per axis, found {self.axis_names}")
        used = [axis for axes in self.spec for axis in axes]
        if len(set(used)) < len(used) or not set(used) <= set(range(len(self.mesh_shape))):
            raise PlanError(
                f"spec {self.spec} must use each of the axes 0 to {len(self.mesh_shape) - 1} at most once; "
                "correct the spec or the mesh"
            )

    @property
    def ids(self) -> range:
        """The devices in the cluster's numbering."""
        return range(self.devices[0], sum(self.devices))

    @property
    def parts(self) -> Shape:
        """Into how many parts each dim is split."""
        return tuple(math.prod(self.mesh_shape[a] for a in axes) for axes in self.spec)

    @property
    def free_axes(self) -> tuple[int, ...]:
        """The mesh axes along which devices hold the same tile."""
        used = {axis for axes in self.spec for axis in axes}
        return tuple(a for a in range(len(self.mesh_shape)) if a not in used)

    def tiles(self) -> list[int]:
        """The tile that each device holds; tiles are numbered row-major over `parts`."""
        return _tiles(self)

    def holders(self) -> list[list[int]]:
        """The devices that hold each tile, rising."""
        found: list[list[int]] = [[] for _ in range(math.prod(self.parts))]
        for device, tile in zip(self.ids, self.tiles(), strict=True):
            found[tile].append(device)
        return found

    def tile_shape(self, shape: Shape) -> Shape:
        """What one device holds of a tensor; `PlanError` where the spec has another rank or doesn't divide a dim."""
        if len(self.spec) != len(shape):
            raise PlanError(f"a tensor of shape {shape} needs a spec of {len(shape)} dims, found {self.spec}")
        for dim, (size, parts) in enumerate(zip(shape, self.parts, strict=True)):
            if size % parts:
                raise PlanError(
                    f"dim {dim} of shape {shape} has {size} elements, which {parts} devices do not divide; "
                    "choose another axis or none for this dim"
                )
        return _divided(shape, self.parts)


@dataclass(frozen=True, slots=True)
class Cut:
    """The equal pieces that travel: the tensor is cut into `tiles` parts per dim, each tile into `inner` parts per dim.

    If `chunk` is not 0, each tile is flattened instead and cut every `chunk` elements, the last piece padded.
    Pieces are numbered tile by tile, row-major in both. Example: `Cut((2, 1), (1, 4))` makes 8 pieces of a matrix.
    """

    tiles: Shape
    inner: Shape
    chunk: int = 0

    def tile_shape(self, shape: Shape) -> Shape:
        return _divided(shape, self.tiles)

    def piece_shape(self, shape: Shape) -> Shape:
        return (self.chunk,) if self.chunk else _divided(self.tile_shape(shape), self.inner)

    def per_tile(self, shape: Shape) -> int:
        """The number of pieces of each tile."""
        if self.chunk:
            return -(-math.prod(self.tile_shape(shape)) // self.chunk)
        return math.prod(self.inner)

    @property
    def grid(self) -> Shape:
        """Parts per dim of the coarsest grid whose cells are needed whole to cut a piece out."""
        return self.tiles if self.chunk else tuple(t * i for t, i in zip(self.tiles, self.inner, strict=True))

    def cell(self, piece: int, shape: Shape) -> Shape:
        """Where in `grid` a piece lies."""
        tile, within = divmod(piece, self.per_tile(shape))
        outer = _unravel(tile, self.tiles)
        if self.chunk:
            return outer
        return tuple(o * n + i for o, n, i in zip(outer, self.inner, _unravel(within, self.inner), strict=True))


@dataclass(frozen=True, slots=True)
class Transfer:
    """How a tensor of `shape`, with elements of `itemsize_bytes`, gets from `source` to `target`.

    `sending` is a layout on the source mesh (mostly `source` itself) in which every piece is whole on the device that
    sends it. `gather` says what the receivers do with their pieces: put them together, gather first among the devices
    of one tile (`replicas`), or among all (`mesh`, the rare transfers between meshes that overlap). A device receives
    its pieces in the order of `sends`. Without `sends`, source and target are the same devices or the tensor is empty.
    """

    shape: Shape
    itemsize_bytes: int
    source: Layout
    target: Layout
    sending: Layout
    cut: Cut
    sends: tuple[Send, ...]
    gather: Gather

    @property
    def same_devices(self) -> bool:
        return self.source.devices == self.target.devices

    @property
    def piece_bytes(self) -> int:
        return math.prod(self.cut.piece_shape(self.shape)) * self.itemsize_bytes

    @property
    def crossing_bytes(self) -> int:
        """Bytes, padding included, that devices outside the target mesh send into it."""
        return self.piece_bytes * sum(source not in self.target.ids for _, source, _ in self.sends)

    @property
    def busiest_sender_bytes(self) -> int:
        """The most bytes that one device sends to others before the gather."""
        return self.piece_bytes * max(Counter(s for _, s, t in self.sends if s != t).values(), default=0)

    @property
    def busiest_receiver_bytes(self) -> int:
        """The most bytes that one device receives from others before the gather."""
        return self.piece_bytes * max(Counter(t for _, s, t in self.sends if s != t).values(), default=0)

    @property
    def resharding_bytes(self) -> int:
        """The most bytes that one device receives from its own mesh before anything crosses."""
        after = self.target if self.same_devices else self.sending
        return _arriving(self.shape, self.source, after) * self.itemsize_bytes

    @property
    def gathering_bytes(self) -> float:
        """Bytes that each device of the target mesh sends in the gather, with idle devices' padding."""
        nbytes, members = self._gathered()
        return ring_bytes("all-gather", nbytes, members)

    def seconds(self, cluster: Cluster) -> float:
        """Predicted seconds on `cluster`, one step after the other.

        A device sends its pieces one after the other, and receives them likewise; devices work at the same time.
        `Cluster.peer_link` gives a device its share of the host's network as if all devices of the host sent, so a
        transfer with few senders may be faster than predicted. The gather costs what `RingCost` says, and the reshard
        like a ring all-gather that brings a device as many bytes; both take the target's (source's) mesh to begin
        with the first device of a host, as `Cluster.group_link` does.
        """
        return self._reshard_s(cluster) + self._send_s(cluster) + self._gather_s(cluster)

    def to_json(self) -> dict[str, Any]:
        """A value of plain dicts, tuples, texts and numbers; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Transfer:
        """The transfer that `to_json` wrote, before or after `json`. `PlanError` if it has another form."""
        try:
            fields = _tupled(data)
            fields.update({name: Layout(**_tupled(data[name])) for name in ("source", "target", "sending")})
            fields["cut"] = Cut(**_tupled(data["cut"]))
            return cls(**fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise PlanError(f"this is no transfer as Transfer.to_json writes it ({error}); plan it again") from error

    def _gathered(self) -> tuple[int, int]:
        """Bytes of the gathered buffer, and over how many devices."""
        if self.gather == "none":
            return 0, 1
        members = self.target.devices[1]
        if self.gather == "replicas":
            members //= math.prod(self.target.parts)
        slots = max(Counter(t for _, _, t in self.sends).values())
        return members * slots * self.piece_bytes, members

    def _reshard_s(self, cluster: Cluster) -> float:
        nbytes, mesh = self.resharding_bytes, self.source.mesh_shape
        if not nbytes:
            return 0.0
        link = cluster.group_link(mesh, tuple(range(len(mesh))))
        return (math.prod(mesh) - 1) * link.latency_s + nbytes / link.bandwidth_bytes_per_s

    def _send_s(self, cluster: Cluster) -> float:
        busy: defaultdict[tuple[str, int], float] = defaultdict(float)
        for _, source, target in self.sends:
            if source != target:
                link = cluster.peer_link(source, target)
                seconds = link.latency_s + self.piece_bytes / link.bandwidth_bytes_per_s
                busy["out", source] += seconds
                busy["in", target] += seconds
        return max(busy.values(), default=0.0)

    def _gather_s(self, cluster: Cluster) -> float:
        nbytes, members = self._gathered()
        if members == 1:
            return 0.0
        mesh = self.target.mesh_shape
        axes = self.target.free_axes if self.gather == "replicas" else tuple(range(len(mesh)))
        link = cluster.group_link(mesh, axes)
        sent = ring_bytes("all-gather", nbytes, members)
        return (members - 1) * link.latency_s + sent / link.bandwidth_bytes_per_s


@lru_cache(maxsize=4096)
def plan_transfer(
    shape: Shape, itemsize_bytes: int, source: Layout, target: Layout, cluster: Cluster | None = None
) -> Transfer:
    """The cheapest transfer. Elements smaller than a byte count as one byte.

    Without `cluster`: the least bytes through the busiest device; then the fewest bytes that cross, that the source
    mesh reshards, and the fewest messages. Each element then crosses once. With `cluster`: the fewest seconds there,
    for which a tile may be sent to each of its receivers where that beats gathering it, as inside a host.
    Raises `PlanError` where a layout does not fit the shape.
    """
    if itemsize_bytes < 1 or min(shape, default=0) < 0:
        raise PlanError(f"sizes must be 0 or more, elements have 1 byte or more, found {shape} and {itemsize_bytes}")
    source.tile_shape(shape)
    target.tile_shape(shape)
    if source.devices == target.devices or not math.prod(shape):
        cut = Cut(target.parts, (1,) * len(shape))
        return Transfer(shape, itemsize_bytes, source, target, source, cut, (), "none")
    found = list(_candidates(shape, itemsize_bytes, source, target))
    if cluster is None:
        return min(found, key=_effort)
    return min(found, key=lambda t: (t.seconds(cluster), *_effort(t)))


def lower_bound_bytes(shape: Shape, itemsize_bytes: int, source: Layout, target: Layout) -> int:
    """Bytes that must come into the target mesh at least: the elements that none of its devices holds already."""
    here = {tile for device, tile in zip(source.ids, source.tiles(), strict=True) if device in target.ids}
    tiles = math.prod(source.parts)
    return math.prod(source.tile_shape(shape)) * (tiles - len(here)) * itemsize_bytes


def _effort(transfer: Transfer) -> tuple[int, int, int, int]:
    """What is least where no cluster says what bytes cost."""
    busiest = max(transfer.busiest_sender_bytes, transfer.busiest_receiver_bytes)
    return busiest, transfer.crossing_bytes, transfer.resharding_bytes, len(transfer.sends)


# ------------------------------------------------------------------------------------------------ candidates


def _candidates(shape: Shape, itemsize: int, source: Layout, target: Layout) -> Iterator[Transfer]:
    """At least one: a tile is cut into as many pieces as devices need it, or a few more or less for balance."""
    overlap = bool(set(source.ids) & set(target.ids))
    # What a reshard brings into devices of the target would cross unseen.
    sendings = _sendings(shape, source)[: 1 if overlap else None]
    found = False
    for pieces in _piece_counts(source, target):
        choice = _choose_cut(shape, target, pieces, sendings)
        if choice:
            found = True
            yield _by_target(Transfer(shape, itemsize, source, target, choice[1], choice[0], (), "none"), pieces)
    if not found:
        yield _by_source(shape, itemsize, source, target)
    whole = Cut(target.parts, (1,) * len(shape))
    if target.free_axes and _serves(source, whole):
        yield _copies(Transfer(shape, itemsize, source, target, source, whole, (), "none"))


def _piece_counts(source: Layout, target: Layout) -> list[int]:
    """Into how many pieces to cut each tile of the target, so that senders and receivers are evenly busy."""
    senders, receivers = source.devices[1], target.devices[1]
    tiles = math.prod(target.parts)
    replicas = receivers // tiles
    even = senders // math.gcd(senders, tiles)
    counts = {replicas * m for m in range(1, min(senders // math.gcd(senders, receivers), _MOST_PIECES) + 1)}
    return sorted(counts | ({replicas // even * even} if even <= replicas else set()))


def _choose_cut(
    shape: Shape, target: Layout, pieces: int, sendings: list[tuple[int, Layout]]
) -> tuple[Cut, Layout] | None:
    """The cut of each target tile into so many pieces that needs the least reshard on the source, and for which."""
    tile = target.tile_shape(shape)
    grids = [Cut(target.parts, inner) for inner in _factorings(pieces, tile)]
    cuts = grids or [Cut(target.parts, (1,) * len(shape), -(-math.prod(tile) // pieces))]
    served = ((cut, next((s for s in sendings if _serves(s[1], cut)), None)) for cut in cuts)
    found = [(lacking[0], cut, lacking[1]) for cut, lacking in served if lacking]
    return min(found, key=lambda f: f[0])[1:] if found else None


def _sendings(shape: Shape, source: Layout) -> list[tuple[int, Layout]]:
    """Every layout on the source mesh, by the elements that a device must receive for it; `source` comes first."""
    found = [(0, source)]
    names, mesh = source.axis_names, source.mesh_shape
    for places in itertools.product(range(-1, len(shape)), repeat=len(mesh)):
        spec = tuple(tuple(a for a, place in enumerate(places) if place == dim) for dim in range(len(shape)))
        layout = Layout(mesh, names, source.devices, spec)
        if not any(size % parts for size, parts in zip(shape, layout.parts, strict=True)):
            found.append((_arriving(shape, source, layout), layout))
    return sorted(found, key=lambda f: f[0])


def _serves(layout: Layout, cut: Cut) -> bool:
    """Whether every piece is whole on some device."""
    return all(cells % parts == 0 for cells, parts in zip(cut.grid, layout.parts, strict=True))


def _factorings(number: int, shape: Shape) -> Iterator[Shape]:
    """`number` as a product of divisors of the dims, the leading dim's largest first."""
    if not shape:
        if number == 1:
            yield ()
        return
    for first in range(number, 0, -1):
        if number % first == 0 and shape[0] % first == 0:
            yield from ((first, *rest) for rest in _factorings(number // first, shape[1:]))


# ------------------------------------------------------------------------------------------------ who sends what


def _by_target(plan: Transfer, pieces: int) -> Transfer:
    """Each device of a tile receives its share of the tile's `pieces`."""
    holders = plan.target.holders()
    real, each = plan.cut.per_tile(plan.shape), max(1, pieces // len(holders[0]))
    wanted = [(tile * real + k, ids[k // each]) for tile, ids in enumerate(holders) for k in range(real)]
    gather: Gather = "replicas" if len(holders[0]) > 1 else "none"
    return _with_sends(plan, wanted, gather)


def _copies(plan: Transfer) -> Transfer:
    """Each device receives its whole tile."""
    return _with_sends(plan, [(t, device) for t, ids in enumerate(plan.target.holders()) for device in ids], "none")


def _by_source(shape: Shape, itemsize: int, source: Layout, target: Layout) -> Transfer:
    """The source's tiles travel as they are, those that the target mesh has already stay where they are."""
    wanted: list[tuple[int, int]] = []
    load: Counter[int] = Counter()
    for tile, ids in enumerate(source.holders()):
        device = min([d for d in ids if d in target.ids] or target.ids, key=lambda d: (load[d], d))
        load[device] += 1
        wanted.append((tile, device))
    cut = Cut(source.parts, (1,) * len(shape))
    return _with_sends(Transfer(shape, itemsize, source, target, source, cut, (), "none"), wanted, "mesh")


def _with_sends(plan: Transfer, wanted: list[tuple[int, int]], gather: Gather) -> Transfer:
    """Finds a sender for each piece and receiver: one inside the target mesh if there is one, else the least busy."""
    holders, tile_of = plan.sending.holders(), _tile_of(plan)
    load: Counter[int] = Counter()
    sends: list[Send] = []
    for piece, target in wanted:
        shift = target - plan.target.devices[0] + plan.source.devices[0]
        sender = min(
            holders[tile_of(piece)],
            key=lambda d: (d != target, d not in plan.target.ids, load[d], d != shift, d),
        )
        load[sender] += sender != target
        sends.append((piece, sender, target))
    return Transfer(
        plan.shape, plan.itemsize_bytes, plan.source, plan.target, plan.sending, plan.cut, tuple(sends), gather
    )


def _tile_of(plan: Transfer) -> Callable[[int], int]:
    """The tile of the sending layout that holds a piece."""
    parts = plan.sending.parts
    ratio = _divided(plan.cut.grid, parts)
    return lambda piece: _ravel(_divided(plan.cut.cell(piece, plan.shape), ratio), parts)


# ------------------------------------------------------------------------------------------------ numbers


@lru_cache(maxsize=4096)
def _tiles(layout: Layout) -> list[int]:
    mesh, found = layout.mesh_shape, list[int]()
    for number in range(layout.devices[1]):
        at = _unravel(number, mesh)
        cell = tuple(_ravel(tuple(at[a] for a in axes), tuple(mesh[a] for a in axes)) for axes in layout.spec)
        found.append(_ravel(cell, layout.parts))
    return found


@lru_cache(maxsize=4096)
def _arriving(shape: Shape, before: Layout, after: Layout) -> int:
    """The most elements that one device lacks of its tile after, both layouts on the same devices."""
    if before.spec == after.spec and before.mesh_shape == after.mesh_shape:
        return 0
    old, new = _divided(shape, before.parts), _divided(shape, after.parts)
    pairs = set(zip(before.tiles(), after.tiles(), strict=True))
    kept = min(
        math.prod(
            max(0, min((i + 1) * a, (j + 1) * b) - max(i * a, j * b))
            for i, a, j, b in zip(_unravel(had, before.parts), old, _unravel(gets, after.parts), new, strict=True)
        )
        for had, gets in pairs
    )
    return math.prod(new) - kept


def _divided(numbers: Shape, by: Shape) -> Shape:
    return tuple(n // d for n, d in zip(numbers, by, strict=True))


def _unravel(number: int, shape: Shape) -> Shape:
    at: list[int] = []
    for size in reversed(shape):
        number, place = divmod(number, size)
        at.append(place)
    return tuple(reversed(at))


def _ravel(at: Shape, shape: Shape) -> int:
    number = 0
    for place, size in zip(at, shape, strict=True):
        number = number * size + place
    return number


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _tupled(data: dict[str, Any]) -> dict[str, Any]:
    return {name: _tuples(value) for name, value in data.items()}
