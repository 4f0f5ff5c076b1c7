"""Layouts and the moves between them: cheapest paths by brute force, bytes by hand and in compiled programs."""

import itertools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alpa_like.cluster import Cluster, Device, Link
from alpa_like.cost import RingCost, ring_bytes
from alpa_like.passes.layouts import PARTIAL, WHOLE, TensorSpace, states_of
from alpa_like.runtime.hlo import read_collectives, traffic_by_kind

CHIP = Device("chip", (("float32", 1e12),), 2**30, 1e11, 1.0)
EIGHT = Cluster("eight", 1, 8, CHIP, Link(1e9, 1e-6), Link(1e9, 1e-6), ("made up",))
NAMES = ("x", "y", "z")


class Dice:
    """A cost model without any sense: every kind of collective on every set of axes has its own random price."""

    def __init__(self, mesh_shape):
        self.mesh_shape = mesh_shape

    def compute_s(self, flops, nbytes, dtype):
        return 1e-3 + nbytes / 1e6

    def copy_s(self, nbytes):
        return nbytes / 4e7

    def collective_s(self, kind, nbytes, axes, *, combined):
        return 1e-3 + nbytes * (zlib.crc32(repr((kind, axes)).encode()) % 97) / 1e6


def space(shape, mesh_shape, *, bits=32, combined=True):
    return TensorSpace(shape, bits, combined, RingCost(EIGHT, mesh_shape))


def neighbours(source, target, sizes, mesh_shape):
    """The kind of move that leads from one state to another, in words of the module's table; None if none does."""
    changed = [a for a in range(len(mesh_shape)) if source[a] != target[a]]
    if changed and all(source[a] == PARTIAL and target[a] == WHOLE for a in changed):
        return "all-reduce"
    held = [a for a in range(len(mesh_shape)) if source[a] == PARTIAL]
    if held and changed == held:
        return scatters(source, target, held, sizes, mesh_shape)
    if len(changed) > 1:
        return exchanges(source, target, changed, sizes, mesh_shape)
    if len(changed) != 1:
        return None
    (axis,) = changed
    old, new = source[axis], target[axis]
    later = source[axis + 1 :]
    parts = math.prod(n for n, place in zip(mesh_shape, target, strict=True) if place == new)
    if new == PARTIAL or (old >= 0 and old in later) or (new >= 0 and (new in later or parts > sizes[new])):
        return None
    if new == WHOLE:
        return "all-gather"
    return {PARTIAL: None, WHOLE: "slice"}.get(old, "all-to-all")


def exchanges(source, target, changed, sizes, mesh_shape):
    """Several axes leave the end of one dim for the end of another."""
    left, goals = {source[a] for a in changed}, {target[a] for a in changed}
    if len(left) != 1 or len(goals) != 1 or min(*left, *goals) < 0:
        return None
    (old,), (new,) = left, goals
    stay = [a for a, place in enumerate(source) if place == old and a not in changed]
    there = [a for a, place in enumerate(source) if place == new]
    parts = math.prod(n for n, place in zip(mesh_shape, target, strict=True) if place == new)
    fits = all(a < changed[0] for a in (*stay, *there)) and parts <= max(sizes[new], 1)
    return "all-to-all" if fits else None


def scatters(source, target, held, sizes, mesh_shape):
    """All partial axes end on one dim, behind the axes that are there."""
    dims = {target[a] for a in held}
    goal = min(dims)
    parts = math.prod(n for n, place in zip(mesh_shape, target, strict=True) if place == goal)
    behind = [place for a, place in enumerate(source) if a > held[0] and a not in held]
    fits = len(dims) == 1 and goal >= 0 and goal not in behind and parts <= sizes[goal]
    return "reduce-scatter" if fits else None


@pytest.mark.parametrize(
    ("shape", "mesh_shape"), [((16, 8), (8,)), ((4, 6), (2, 4)), ((2, 8, 3), (2, 2, 2)), ((5,), (4, 2))]
)
def test_moves_are_those_of_the_table(shape, mesh_shape):
    tensor = space(shape, mesh_shape)
    for source in filter(tensor.possible, tensor.states):
        expected = {t: neighbours(source, t, shape, mesh_shape) for t in tensor.states}
        assert {m.target: m.kind for m in tensor.moves(source)} == {t: kind for t, kind in expected.items() if kind}


@pytest.mark.parametrize("cost", [Dice, lambda mesh: RingCost(EIGHT, mesh)], ids=["dice", "ring"])
@pytest.mark.parametrize(
    ("shape", "mesh_shape"), [((16, 8), (8,)), ((16, 4), (2, 4)), ((2, 8), (2, 2, 2)), ((5, 3), (4, 2))]
)
def test_seconds_are_shortest_paths(shape, mesh_shape, cost):
    """Bellman and Ford: relax all moves until nothing gets shorter."""
    tensor = TensorSpace(shape, 32, True, cost(mesh_shape))
    states = [s for s in tensor.states if tensor.possible(s)]
    moves = [m for s in states for m in tensor.moves(s)]
    for goal in states:
        best = dict.fromkeys(states, math.inf) | {goal: 0.0}
        while any(m.seconds + best[m.target] < best[m.source] * (1 - 1e-12) for m in moves):
            for m in moves:
                best[m.source] = min(best[m.source], m.seconds + best[m.target])
        mine = tensor.seconds[:, tensor.index[goal]]
        np.testing.assert_allclose([mine[tensor.index[s]] for s in states], [best[s] for s in states], rtol=1e-9)


@pytest.mark.parametrize(("shape", "mesh_shape"), [((16, 8), (8,)), ((16, 4), (2, 4)), ((8, 8), (2, 2, 2))])
def test_a_path_costs_what_seconds_says(shape, mesh_shape):
    tensor = TensorSpace(shape, 32, True, Dice(mesh_shape))
    for source, target in itertools.product(tensor.states, repeat=2):
        expected = tensor.seconds[tensor.index[source], tensor.index[target]]
        if not math.isfinite(expected):
            assert PARTIAL in target or not (tensor.possible(source) and tensor.possible(target))
            continue
        path = tensor.path(source, target)
        assert sum(m.seconds for m in path) == pytest.approx(expected)
        stations = [source, *(m.target for m in path)]
        assert [m.source for m in path] == stations[:-1]
        assert stations[-1] == target


@pytest.mark.parametrize(
    ("shape", "mesh_shape", "state", "shards", "elements"),
    [
        ((16, 8), (8,), (0,), [8, 1], 2 * 8),
        ((16, 8), (2, 4), (0, 0), [8, 1], 2 * 8),
        ((16, 8), (2, 4), (1, WHOLE), [1, 2], 16 * 4),
        ((16, 8), (2, 4), (PARTIAL, 1), [1, 4], 16 * 2),
        ((10, 7), (2, 4), (0, 1), [2, 4], 5 * 2),  # 7 elements in 4 parts: the largest has 2
        ((10, 7), (2, 4), (1, 0), [4, 2], 3 * 4),
        ((9,), (8,), (0,), [8], 2),  # padded up to 16
        ((13, 5, 3), (2, 2, 2), (0, 2, 0), [4, 1, 2], 4 * 5 * 2),
        ((), (8,), (WHOLE,), [], 1),
    ],
)
def test_elements_per_device_by_hand(shape, mesh_shape, state, shards, elements):
    tensor = space(shape, mesh_shape, bits=16)
    assert tensor.shards(state) == shards
    assert tensor.local_elements(state) == elements
    assert tensor.local_bytes(state) == 2 * elements
    assert tensor.elements[tensor.index[state]] == elements


def test_no_dim_is_cut_finer_than_its_elements():
    assert not space((4, 16), (8,)).possible((0,))
    assert space((4, 16), (2, 4)).possible((1, 0))
    assert not space((4, 16), (2, 4)).possible((0, 0))
    tensor = space((4, 16), (8,))
    assert math.isinf(tensor.seconds[tensor.index[(1,)], tensor.index[(0,)]])


@pytest.mark.parametrize(
    ("rank", "mesh_shape", "count"), [(2, (8,), 4), (2, (2, 4), 16), (3, (2, 2, 2), 125), (2, (1, 8), 4)]
)
def test_states_are_all_places_of_every_axis(rank, mesh_shape, count):
    states = states_of(rank, mesh_shape)
    assert len(states) == len(set(states)) == count
    assert states == sorted(states)
    assert {p for s in states for p, n in zip(s, mesh_shape, strict=True) if n == 1} <= {WHOLE}
    assert set(states_of(rank, mesh_shape, partial=False)) == {s for s in states if PARTIAL not in s}


@pytest.mark.parametrize(
    ("mesh_shape", "source", "target", "traffic"),
    [  # f32[16, 8]: 512 bytes whole
        ((8,), (0,), (WHOLE,), {"all-gather": 512 * 7 / 8}),
        ((8,), (WHOLE,), (1,), {}),
        ((8,), (0,), (1,), {"all-to-all": 64 * 7 / 8}),
        ((8,), (PARTIAL,), (WHOLE,), {"all-reduce": 2 * 512 * 7 / 8}),
        ((8,), (PARTIAL,), (1,), {"reduce-scatter": 512 * 7 / 8}),
        ((2, 4), (0, 0), (WHOLE, WHOLE), {"all-gather": 256 * 3 / 4 + 512 / 2}),  # the minor axis first
        ((2, 4), (PARTIAL, 1), (WHOLE, 1), {"all-reduce": 2 * 128 / 2}),
        ((2, 4), (PARTIAL, PARTIAL), (WHOLE, WHOLE), {"all-reduce": 2 * 512 * 7 / 8}),  # one over both axes
        ((2, 4), (PARTIAL, 1), (0, 1), {"reduce-scatter": 128 / 2}),
        ((2, 4), (0, 1), (WHOLE, WHOLE), {"all-gather": 128 / 2 + 512 * 3 / 4}),
    ],
)
def test_traffic_of_a_path_by_hand(mesh_shape, source, target, traffic):
    tensor = space((16, 8), mesh_shape)
    assert tensor.traffic(tensor.path(source, target)) == pytest.approx(traffic)


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-to-all", "all-reduce"])
def test_collectives_that_travel_together_pay_no_latency(kind):
    cost, rounds = RingCost(EIGHT, (2, 4)), 2 if kind == "all-reduce" else 1
    sent = ring_bytes(kind, 1e6, 4)
    assert sent == rounds * 1e6 * 3 / 4
    assert cost.collective_s(kind, 1e6, (1,), combined=True) == pytest.approx(sent / 1e9)
    assert cost.collective_s(kind, 1e6, (1,), combined=False) == pytest.approx(sent / 1e9 + rounds * 3 * 1e-6)
    assert RingCost(EIGHT, (8, 1)).collective_s(kind, 1e6, (1,), combined=False) == 0.0


# ------------------------------------------------------------------------------------------------ compiled


def sharding(state, rank, mesh_shape):
    grid = np.array(jax.devices()).reshape(mesh_shape)
    mesh = Mesh(grid, NAMES[: len(mesh_shape)], axis_types=(AxisType.Auto,) * len(mesh_shape))
    dims = [tuple(NAMES[a] for a, place in enumerate(state) if place == d) for d in range(rank)]
    return NamedSharding(mesh, PartitionSpec(*(d or None for d in dims)))


def compiled_traffic(function, shapes, ins, **options):
    arguments = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    compiled = jax.jit(function, in_shardings=ins).lower(*arguments).compile()
    return traffic_by_kind(read_collectives(compiled.as_text()), **options)


@pytest.mark.parametrize(
    ("shape", "mesh_shape", "stride"),
    [((16, 8), (8,), 1), ((16, 8), (2, 4), 1), ((16, 16, 8), (2, 4), 3), ((16, 8), (2, 2, 2), 6)],
)
def test_every_move_compiles_to_the_predicted_bytes(shape, mesh_shape, stride):
    """XLA does each move natively, with one collective; `stride` takes a part of a large table."""
    tensor, seen = space(shape, mesh_shape), set()
    states = [s for s in states_of(len(shape), mesh_shape, partial=False) if tensor.possible(s)]
    for move in [m for s in states for m in tensor.moves(s)][::stride]:
        target = sharding(move.target, len(shape), mesh_shape)
        found = compiled_traffic(
            lambda x, to=target: jax.lax.with_sharding_constraint(x, to),
            [shape],
            [sharding(move.source, len(shape), mesh_shape)],
        )
        assert found == tensor.traffic((move,)), move
        seen.add(move.kind)
    assert seen == {"all-gather", "slice", "all-to-all"}


@pytest.mark.parametrize(
    ("mesh_shape", "source", "target"),
    [
        ((8,), (PARTIAL,), (WHOLE,)),
        ((8,), (PARTIAL,), (0,)),
        ((8,), (PARTIAL,), (1,)),
        ((2, 4), (PARTIAL, WHOLE), (WHOLE, WHOLE)),
        ((2, 4), (PARTIAL, PARTIAL), (WHOLE, WHOLE)),
        ((2, 4), (1, PARTIAL), (1, WHOLE)),
        ((2, 4), (0, PARTIAL), (0, 1)),
        ((2, 4), (PARTIAL, 1), (0, 1)),
    ],
)
def test_partial_sums_compile_to_the_predicted_bytes(mesh_shape, source, target):
    """A product whose contracted dim is split by the axes that are `PARTIAL`."""
    tensor = space((16, 8), mesh_shape)
    axes = tuple(NAMES[a] for a, place in enumerate(source) if place == PARTIAL)
    made, out = sharding(source, 2, mesh_shape), sharding(target, 2, mesh_shape)
    rows, columns = (*made.spec, None, None)[:2]
    ins = [NamedSharding(made.mesh, PartitionSpec(*s)) for s in ((rows, axes), (axes, columns))]
    found = compiled_traffic(
        lambda a, b: jax.lax.with_sharding_constraint(jnp.dot(a, b), out), [(16, 32), (32, 8)], ins, reduce_scatter=True
    )
    assert found == tensor.traffic(tensor.path(source, target))
