"""Transfers between meshes: values arrive bit-equal, every element crosses once, and nothing waits."""

import json
import math
import random
import threading
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from alpa_like.cluster import Cluster, Device, Link
from alpa_like.cost import RingCost
from alpa_like.errors import PlanError, ProgramError
from alpa_like.reshard import Layout, Transfer, lower_bound_bytes, plan_transfer
from alpa_like.runtime.local import LocalTransport
from alpa_like.runtime.transport import sharding_of

CHIP = Device("chip", (("float32", 1e12),), 2**30, 1e11, 1.0)
TWO_HOSTS = Cluster("two", 2, 4, CHIP, Link(100e9, 1e-6), Link(1e9, 20e-6), ("made up",))

# (shape, source, target); `2x2@4:x,-` is a mesh of axes x and y on devices 4 to 7 that splits dim 0 over x.
EVEN = [
    ((8, 16), source, target)
    for source in ("1@0:-,-", "4@0:x,-", "4@0:-,-", "2x2@0:x,y", "2x2@0:y,-")
    for target in ("1@4:-,-", "2@5:-,x", "4@4:x,-", "4@4:-,-", "2x2@4:x,y", "2x2@4:-,x")
]
ODD = [
    ((12, 12), "3@0:x,-", "4@4:x,-"),
    ((12, 12), "3@0:x,-", "4@4:-,-"),
    ((12, 12), "3@0:-,x", "4@3:x,-"),
    ((6, 5), "3@0:x,-", "5@3:-,x"),
    ((6, 5), "5@0:-,x", "3@5:x,-"),
    ((7, 5), "3@0:-,-", "4@3:-,-"),
    ((7, 6), "7@0:x,-", "1@7:-,-"),
    ((7, 6), "1@7:-,-", "7@0:x,-"),
    ((10,), "5@0:x", "2@6:x"),
    ((24, 5), "2x3@0:yx,-", "2@6:-,-"),
    ((8, 8), "2x2@0:-,-", "2x2@4:yx,-"),
    ((4, 3, 6), "2x2@0:x,-,y", "2@5:-,-,x"),
    ((), "4@0:", "4@4:"),
    ((), "1@0:", "3@4:"),
    ((1, 3), "2@0:-,-", "6@2:-,-"),
    ((4, 0), "4@0:x,-", "2x2@4:x,-"),
    ((0, 8), "4@0:-,-", "4@0:-,x"),
]
SHARED = [
    ((8, 12), "4@0:x,-", "4@0:x,-"),
    ((8, 12), "4@0:x,-", "2x2@0:-,xy"),
    ((8, 12), "4@0:x,-", "4@2:x,-"),
    ((8, 12), "4@0:x,-", "4@2:-,x"),
    ((8, 12), "4@0:-,-", "4@3:x,-"),
    ((8, 12), "4@0:x,-", "6@0:-,-"),
    ((8, 12), "6@0:-,x", "2@1:x,-"),
    ((8, 12), "2x2@0:x,y", "1@3:-,-"),
]
TABLE = EVEN + ODD + SHARED


def layout(text: str) -> Layout:
    mesh, first, spec = text.replace("@", ":").split(":")
    sizes = tuple(map(int, mesh.split("x")))
    names = tuple("xyz"[: len(sizes)])
    axes = tuple(tuple(names.index(n) for n in dim if n != "-") for dim in spec.split(",") if dim)
    return Layout(sizes, names, (int(first), math.prod(sizes)), axes)


def dice(seed: int, most: int = 7, of: int = 8) -> tuple[tuple[int, ...], Layout, Layout]:
    """A random shape and layouts that fit it."""
    r = random.Random(seed)
    shape = tuple(r.choice((1, 2, 3, 4, 6, 7, 12, 24)) for _ in range(r.randint(0, 3)))
    return shape, _random_layout(r, shape, most, of), _random_layout(r, shape, most, of)


def _random_layout(r: random.Random, shape: tuple[int, ...], most: int, of: int) -> Layout:
    devices = r.randint(1, most)
    sizes = r.choice([(a, devices // a) for a in range(1, devices + 1) if devices % a == 0])
    spec, rest = [list[int]() for _ in shape], list(shape)
    for axis in r.sample((0, 1), 2):
        dims = [d for d, size in enumerate(rest) if size % sizes[axis] == 0]
        if dims and r.random() < 0.8:
            dim = r.choice(dims)
            spec[dim].append(axis)
            rest[dim] //= sizes[axis]
    return Layout(sizes, ("x", "y"), (r.randint(0, of - devices), devices), tuple(map(tuple, spec)))


def numbered(shape: tuple[int, ...], source: Layout) -> tuple[Any, jax.Array]:
    """An array on the source mesh whose elements are 1, 2, 3, …"""
    host = np.arange(1, math.prod(shape) + 1, dtype=np.int32).reshape(shape)
    return host, jax.device_put(host, sharding_of(source, jax.devices()))


def held(array: jax.Array) -> dict[Any, set[int]]:
    """The numbers that each device has of `numbered`."""
    return {s.device: set(np.asarray(s.data).ravel().tolist()) for s in array.addressable_shards}


def landed(ticket: list[jax.Array]) -> Counter[int]:
    """The numbers that arrived on the target mesh, padding left out, and how often."""
    shards = [s.data for array in ticket for s in array.addressable_shards]
    return Counter(n for data in shards for n in np.asarray(data).ravel().tolist() if n)


def same(got: Any, want: Any) -> bool:
    return got.shape == want.shape and got.dtype == want.dtype and bool((np.asarray(got) == want).all())


def check_arrival(shape: tuple[int, ...], source: Layout, target: Layout) -> Transfer:
    """Values, sharding, and the bytes of what landed, counted element by element, for one transfer."""
    transfer = plan_transfer(shape, 4, source, target)
    host, array = numbered(shape, source)
    transport = LocalTransport(transfer, jax.devices(), np.int32)
    before = held(array)
    ticket = transport.send(array)
    counted = landed(ticket)
    array.delete()
    result = transport.receive(ticket)
    assert result.sharding == sharding_of(target, jax.devices())
    assert same(result, host)
    assert all(same(s.data, host[s.index]) for s in result.addressable_shards)

    here = {n for device, numbers in before.items() if device.id in target.ids for n in numbers}
    bound = lower_bound_bytes(shape, 4, source, target)
    assert bound == 4 * (host.size - len(here))
    assert bound <= transfer.crossing_bytes < bound + 4 * target.devices[1]
    if not transfer.same_devices:
        assert set(counted.values()) <= {1}
        assert 4 * sum(n not in here for n in counted) == bound
    return transfer


@pytest.mark.parametrize(("shape", "source", "target"), TABLE)
def test_every_pair_of_the_table_moves_the_least(shape: tuple[int, ...], source: str, target: str) -> None:
    transfer = check_arrival(shape, layout(source), layout(target))
    if (shape, source, target) in EVEN + SHARED:
        assert transfer.crossing_bytes == lower_bound_bytes(shape, 4, layout(source), layout(target))


@pytest.mark.parametrize("seed", range(12))
def test_random_layouts_move_the_least(seed: int) -> None:
    check_arrival(*dice(seed))


# ------------------------------------------------------------------------------------------------ without devices


def cells(layout: Layout, shape: tuple[int, ...]) -> dict[int, Any]:
    """Per device, which elements it holds: a mask, by NumPy alone."""
    masks: list[Any] = []
    for at in np.ndindex(*layout.mesh_shape):
        mask = np.ones(shape, bool)
        for dim, axes in enumerate(layout.spec):
            sizes = [layout.mesh_shape[a] for a in axes]
            part = np.ravel_multi_index([at[a] for a in axes], sizes) if axes else 0
            block = np.arange(shape[dim]) * math.prod(sizes) // shape[dim] == part
            mask &= block.reshape([-1 if d == dim else 1 for d in range(len(shape))])
        masks.append(mask)
    return dict(zip(layout.ids, masks, strict=True))


def piece_mask(transfer: Transfer, piece: int) -> Any:
    """Which elements a piece has, by NumPy alone."""
    cut, shape = transfer.cut, transfer.shape
    tile, within = divmod(piece, cut.per_tile(shape))
    box = [n // p for n, p in zip(shape, cut.tiles, strict=True)]
    start = [i * b for i, b in zip(np.unravel_index(tile, cut.tiles), box, strict=True)]
    inside = np.zeros(box, bool)
    if cut.chunk:
        inside.reshape(-1)[within * cut.chunk : (within + 1) * cut.chunk] = True
    else:
        size = [b // p for b, p in zip(box, cut.inner, strict=True)]
        where = np.unravel_index(within, cut.inner)
        inside[tuple(slice(i * s, (i + 1) * s) for i, s in zip(where, size, strict=True))] = True
    mask = np.zeros(shape, bool)
    mask[tuple(slice(s, s + b) for s, b in zip(start, box, strict=True))] = inside
    return mask


@pytest.mark.parametrize("seed", range(0, 300, 10))
def test_each_piece_is_whole_on_its_sender_and_every_element_crosses_once(seed: int) -> None:
    for k in range(seed, seed + 10):
        shape, source, target = dice(k, most=12, of=16)
        transfer = plan_transfer(shape, 4, source, target)
        if transfer.same_devices:
            continue
        masks, senders = [piece_mask(transfer, p) for p, _, _ in transfer.sends], cells(transfer.sending, shape)
        assert all(not (mask & ~senders[s]).any() for mask, (_, s, _) in zip(masks, transfer.sends, strict=True))
        assert (np.sum(masks, axis=0) == 1).all()
        here = np.any(
            [mask for d, mask in cells(source, shape).items() if d in target.ids] or [np.zeros(shape)], axis=0
        )
        assert lower_bound_bytes(shape, 4, source, target) == 4 * np.sum(here == 0)
        assert 0 <= transfer.crossing_bytes - 4 * np.sum(here == 0) < 4 * target.devices[1]
        if transfer.gather == "replicas":
            mine = cells(target, shape)
            assert all(not (m & ~mine[t]).any() for m, (_, _, t) in zip(masks, transfer.sends, strict=True))
        assert Transfer.from_json(json.loads(json.dumps(transfer.to_json()))) == transfer


@pytest.mark.parametrize(("senders", "receivers"), [(a, b) for a in range(1, 9) for b in range(1, 9)])
@pytest.mark.parametrize(("before", "after"), [("x,-", "x,-"), ("-,-", "x,-"), ("x,-", "-,-"), ("-,x", "x,-")])
def test_all_devices_of_the_smaller_mesh_are_equally_busy(
    senders: int, receivers: int, before: str, after: str
) -> None:
    shape = (840, 840)
    source, target = layout(f"{senders}@0:{before}"), layout(f"{receivers}@8:{after}")
    transfer = plan_transfer(shape, 2, source, target)
    ideal = 2 * 840 * 840 // min(senders, receivers)
    assert max(transfer.busiest_sender_bytes, transfer.busiest_receiver_bytes) == ideal
    assert transfer.crossing_bytes == 2 * 840 * 840
    assert (transfer.gather == "none") == (after == "x,-" or receivers == 1)
    assert before != after or transfer.resharding_bytes == 0


def test_the_steps_around_the_crossing_are_as_small_as_they_can_be() -> None:
    rows, columns, whole = layout("8@0:x,-"), layout("8@8:-,x"), layout("8@8:-,-")
    across = plan_transfer((16, 16), 4, rows, columns)
    assert across.sending.spec == ((), (0,))
    assert (across.resharding_bytes, across.gathering_bytes, len(across.sends)) == (7 * 16, 0, 8)
    spread = plan_transfer((16, 16), 4, rows, whole)
    assert (spread.resharding_bytes, spread.gathering_bytes, spread.busiest_sender_bytes) == (0, 7 * 128, 128)
    within = plan_transfer((16, 16), 4, rows, layout("8@0:-,x"))
    assert (within.sends, within.crossing_bytes, within.resharding_bytes) == ((), 0, 7 * 16)


def test_seconds_are_those_of_the_links_and_of_ring_collectives() -> None:
    nbytes = 4 * 1024 * 1024
    tile = nbytes / 4
    split = plan_transfer((1024, 1024), 4, layout("4@0:x,-"), layout("4@4:x,-"))
    assert split.seconds(TWO_HOSTS) == pytest.approx(20e-6 + tile / 1e9)
    gathered = plan_transfer((1024, 1024), 4, layout("4@0:x,-"), layout("4@4:-,-"))
    ring = RingCost(replace(TWO_HOSTS, hosts=1), (4,)).collective_s("all-gather", nbytes, (0,), combined=False)
    assert gathered.seconds(TWO_HOSTS) == pytest.approx(20e-6 + tile / 1e9 + ring)
    across = plan_transfer((1024, 1024), 4, layout("4@0:x,-"), layout("4@4:-,x"))
    assert across.seconds(TWO_HOSTS) == pytest.approx(20e-6 + tile / 1e9 + 3e-6 + 0.75 * tile / 100e9)
    one = plan_transfer((1024, 1024), 4, layout("1@0:-,-"), layout("4@4:x,-"))
    assert one.seconds(TWO_HOSTS) == pytest.approx(4 * (20e-6 + tile / 1e9))


def test_a_cluster_decides_between_copies_and_a_gather() -> None:
    between = plan_transfer((512, 512), 4, layout("4@0:-,-"), layout("4@4:-,-"), TWO_HOSTS)
    assert (between.gather, between.crossing_bytes) == ("replicas", 2**20)
    inside = plan_transfer((512, 512), 4, layout("2@0:-,-"), layout("2@2:-,-"), TWO_HOSTS)
    assert (inside.gather, inside.crossing_bytes) == ("none", 2 * 2**20)
    assert inside.seconds(TWO_HOSTS) <= plan_transfer((512, 512), 4, inside.source, inside.target).seconds(TWO_HOSTS)
    assert {s for _, s, _ in inside.sends} == {0, 1}


def test_a_layout_says_what_is_wrong_with_it() -> None:
    with pytest.raises(PlanError, match="as many devices"):
        Layout((2, 2), ("x", "y"), (0, 3), ())
    with pytest.raises(PlanError, match="one name per axis"):
        Layout((2, 2), ("x", "x"), (0, 4), ())
    with pytest.raises(PlanError, match="at most once"):
        layout("2x2@0:x,x")
    with pytest.raises(PlanError, match="has 7 elements, which 2 devices do not divide"):
        plan_transfer((7, 2), 4, layout("2@0:-,x"), layout("2@2:x,-"))
    with pytest.raises(PlanError, match="needs a spec of 2 dims"):
        plan_transfer((8, 2), 4, layout("2@0:x"), layout("2@2:x,-"))
    with pytest.raises(PlanError, match="1 byte or more"):
        plan_transfer((8,), 0, layout("2@0:x"), layout("2@2:x"))
    with pytest.raises(PlanError, match="no transfer as"):
        Transfer.from_json({"shape": [4]})


# ------------------------------------------------------------------------------------------------ on devices


DTYPES = ("bool", "int8", "uint4", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_arrives_bit_equal(dtype: str) -> None:
    source, target = layout("3@0:-,x"), layout("2x2@4:y,-")
    array = jax.device_put(jnp.arange(42).reshape(14, 3) % 7, sharding_of(source, jax.devices())).astype(dtype)
    transfer = plan_transfer((14, 3), array.dtype.itemsize, source, target)
    result = LocalTransport(transfer, jax.devices(), array.dtype)(array)
    assert result.dtype == array.dtype
    assert np.asarray(result).tobytes() == np.asarray(array).tobytes()


def test_not_a_number_keeps_its_bits() -> None:
    source, target = layout("2@0:x"), layout("3@2:-")
    bits = np.array([0x7FC00001, 0xFF800001, 0x80000000, 0x00000001], np.uint32)
    array = jax.device_put(bits.view(np.float32), sharding_of(source, jax.devices()))
    result = LocalTransport(plan_transfer((4,), 4, source, target), jax.devices(), np.float32)(array)
    assert np.asarray(result).view(np.uint32).tolist() == bits.tolist()


@pytest.mark.parametrize(
    ("impl", "source", "target"),
    [("rbg", "2@0:x", "3@2:-"), ("threefry2x32", "2@0:x", "2@2:x"), ("threefry2x32", "2@0:x", "2@0:-")],
)
def test_typed_keys_travel(impl: str, source: str, target: str) -> None:
    before, after = layout(source), layout(target)
    keys = jax.device_put(jax.random.split(jax.random.key(7, impl=impl), 4), sharding_of(before, jax.devices()))
    transport = LocalTransport(plan_transfer((4,), 8, before, after), jax.devices(), keys.dtype)
    result = transport(keys)
    assert (result.dtype, {d.id for d in result.devices()}) == (keys.dtype, set(after.ids))
    assert (jax.random.key_data(result) == np.asarray(jax.random.key_data(keys))).all()
    with pytest.raises(ProgramError, match="made for key<"):
        transport(jax.random.key_data(keys))


def test_weak_types_travel() -> None:
    weak = jax.device_put(jnp.asarray(1.5), jax.devices()[0])
    assert weak.weak_type
    for target in ("1@1:", "3@1:"):
        transport = LocalTransport(plan_transfer((), 4, layout("1@0:"), layout(target)), jax.devices(), weak.dtype)
        assert float(transport(weak)) == 1.5


@pytest.mark.parametrize(
    ("source", "target"),
    [("1@0:-,-", "1@5:-,-"), ("4@0:x,-", "4@4:x,-"), ("2x2@0:x,y", "2x2@4:x,y"), ("4@0:x,-", "4@2:x,-")],
)
def test_equal_layouts_take_one_device_put(source: str, target: str) -> None:
    before, after = layout(source), layout(target)
    host, array = numbered((4, 4), before)
    with (
        mock.patch("jax.device_put", wraps=jax.device_put) as put,
        mock.patch("jax.make_array_from_single_device_arrays") as made,
    ):
        result = LocalTransport(plan_transfer((4, 4), 4, before, after), jax.devices(), np.int32)(array)
    assert put.call_count == 1
    assert not made.called
    assert same(result, host)


def test_a_chain_is_dispatched_before_its_data_exists() -> None:
    """The source waits on the host for an event that is set only after every transfer of the chain was dispatched."""
    stops = [layout(t) for t in ("2@0:x,-", "2@2:-,x", "3@4:-,-", "2@6:-,-", "2@4:-,x", "2@0:-,x", "1@7:-,-")]
    transports = [LocalTransport(plan_transfer((4, 6), 4, a, b), jax.devices(), np.int32) for a, b in pairwise(stops)]
    dispatched, in_time = threading.Event(), list[bool]()

    def wait(data: Any) -> Any:
        in_time.append(dispatched.wait(20))
        return np.asarray(data)

    def waiting(data: jax.Array) -> Any:
        return jax.pure_callback(wait, jax.ShapeDtypeStruct(data.shape, data.dtype), data)

    host, array = numbered((4, 6), stops[0])
    rows = PartitionSpec("x")
    mesh = sharding_of(stops[0], jax.devices()).mesh
    value = jax.jit(jax.shard_map(waiting, mesh=mesh, in_specs=rows, out_specs=rows))(array)
    for transport in transports:
        value = transport(value)
    dispatched.set()
    assert same(value, host)
    assert in_time == [True, True]


def test_an_array_of_another_kind_is_refused() -> None:
    source, target = layout("2@0:x,-"), layout("2@2:-,x")
    transport = LocalTransport(plan_transfer((4, 4), 4, source, target), jax.devices(), np.int32)
    _, array = numbered((4, 4), source)
    with pytest.raises(ProgramError, match=r"made for int32\[4, 4\], found float32\[4, 4\]"):
        transport(array.astype(np.float32))
    with pytest.raises(ProgramError, match=r"found int32\[2, 4\]"):
        transport(array[:2])
    with pytest.raises(ProgramError, match="plan the transfer from where the array is"):
        transport(numbered((4, 4), layout("2@0:-,x"))[1])
    with pytest.raises(ProgramError, match="needs devices 2 to 3, but 2 are here"):
        LocalTransport(plan_transfer((4, 4), 4, source, target), jax.devices()[:2], np.int32)
