"""The search for pipeline stages, against trying every plan: divisions × submeshes × options."""

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from alpa_like.cluster import Cluster, Device, Link
from alpa_like.errors import InfeasibleError, MethodError, PlanError
from alpa_like.passes.stage_search import Option, Search, Submesh, search, submeshes

Key = tuple[int, int, Submesh]
InFlight = Callable[[int, int], int]


def gpipe(stages: int, micro_batches: int) -> int:
    return micro_batches


def odd(stages: int, micro_batches: int) -> int:
    """No schedule that anybody uses: neither rising nor falling."""
    return 3 * stages % 5


def machine(hosts: int, devices_per_host: int) -> Cluster:
    device = Device("d", (("float32", 1e12),), 2**30, 1e11, 0.5)
    return Cluster("m", hosts, devices_per_host, device, Link(1e11, 1e-6), Link(1e10, 1e-5), ())


@dataclass
class Table:
    """Costs from a table; lower bounds are `tightness` times the least seconds. Notes what was asked for."""

    options_of: dict[Key, list[Option]]
    sends: Sequence[float]
    tightness: float = 1.0
    asked: list[Key] = field(default_factory=list[Key])

    def options(self, first: int, last: int, submesh: Submesh) -> Sequence[Option]:
        self.asked.append((first, last, submesh))
        return self.options_of.get((first, last, submesh), [])

    def lower_bound_s(self, first: int, last: int, submesh: Submesh) -> float:
        options = self.options_of.get((first, last, submesh), [])
        return self.tightness * min((o.forward_s + o.backward_s for o in options), default=0.0)

    def send_s(self, boundary: int) -> float:
        return self.sends[boundary]


def keys(layers: int, cluster: Cluster) -> Iterator[Key]:
    for first, last in itertools.combinations_with_replacement(range(layers), 2):
        for submesh in submeshes(cluster):
            yield first, last, submesh


def even(layers: int, cluster: Cluster, *, fixed: float = 1.0, micro: float = 1.0) -> Table:
    """Each layer takes 1 s on a device and less in proportion; bytes are per layer, divided among devices."""
    table: dict[Key, list[Option]] = {}
    for first, last, submesh in keys(layers, cluster):
        share = (last - first + 1) / submesh.num_devices
        table[first, last, submesh] = [Option(share / 3, share * 2 / 3, 0.0, fixed * share, micro * share, 0.0)]
    return Table(table, [0.0] * (layers - 1))


# ------------------------------------------------------------------------------------------------ exhaustive search


def packs(shapes: Sequence[Submesh], room: list[int], whole: int) -> bool:
    """Whether submeshes fit into hosts with `room` devices each, by trying every host for each."""
    if not shapes:
        return not any(room)
    one, rest = shapes[0], shapes[1:]
    if one.devices_per_host == whole:
        full = [h for h, free in enumerate(room) if free == whole][: one.hosts]
        places = [full] if len(full) == one.hosts else []
    else:
        places = [[h] for h, free in enumerate(room) if free >= one.num_devices]
    return any(packs(rest, [r - one.devices_per_host * (h in at) for h, r in enumerate(room)], whole) for at in places)


def exhaustive(
    layers: int, cluster: Cluster, micro_batches: int, costs: Table, memory: float, fly: InFlight, counts: range
) -> float:
    """The least latency of all plans with a number of stages in `counts`; inf where nothing fits."""
    best = math.inf
    for count in counts:
        held = [fly(count - i, micro_batches) for i in range(count)]
        for shapes in itertools.product(submeshes(cluster), repeat=count):
            if sum(s.num_devices for s in shapes) != cluster.num_devices:
                continue
            if not packs(shapes, [cluster.devices_per_host] * cluster.hosts, cluster.devices_per_host):
                continue
            for cuts in itertools.combinations(range(1, layers), count - 1):
                best = min(best, least(costs, (0, *cuts, layers), shapes, held, memory, micro_batches))
    return best


def least(
    costs: Table, edges: Sequence[int], shapes: Sequence[Submesh], held: Sequence[int], memory: float, micro: int
) -> float:
    """The least latency of all options of given stages."""
    stages = zip(edges, edges[1:], shapes, held, strict=False)
    fitting = [
        [
            o
            for o in costs.options_of[first, end - 1, shape]
            if o.fixed_bytes + o.peak_bytes + h * o.micro_bytes <= memory
        ]
        for first, end, shape, h in stages
    ]
    sends = 2 * sum(costs.sends[e - 1] for e in edges[1:-1])
    found = math.inf
    for options in itertools.product(*fitting):
        seconds = [o.forward_s + o.backward_s for o in options]
        found = min(found, sum(seconds) + sends + (micro - 1) * max(seconds) + max(o.update_s for o in options))
    return found


MACHINES = [
    (1, 1),
    (1, 2),
    (1, 3),
    (1, 4),
    (1, 5),
    (1, 6),
    (1, 7),
    (2, 2),
    (2, 3),
    (3, 1),
    (3, 2),
    (5, 1),
    (2, 4),
    (2, 6),
]


def random_table(rng: np.random.Generator, layers: int, cluster: Cluster) -> Table:
    """0 to 3 options each; faster ones take more bytes, mostly. Half of the tables have costs that tie."""

    def number(scale: float) -> float:
        return float(rng.integers(0, 6)) if ties else float(rng.random() * scale)

    ties = bool(rng.integers(2))
    table: dict[Key, list[Option]] = {}
    for first, last, submesh in keys(layers, cluster):
        work = (last - first + 1) / submesh.num_devices**0.8
        table[first, last, submesh] = [
            Option(work * number(2), work * number(2), number(3), work * number(1), work * number(1), number(0.3))
            for _ in range(int(rng.choice(4, p=[0.05, 0.3, 0.4, 0.25])))
        ]
    return Table(table, [number(0.5) for _ in range(layers - 1)], float(rng.choice([0.0, 0.5, 0.9, 1.0])))


def check_plan(found: Search, cluster: Cluster, micro_batches: int, costs: Table, memory: float, fly: InFlight) -> None:
    """Stages cover all layers and all devices, keep hosts and memory, and have the latency that was promised."""
    assert [s.first for s in found.stages] == [0, *(s.last + 1 for s in found.stages[:-1])]
    devices = sorted(d for s in found.stages for d in range(s.devices[0], s.devices[0] + s.devices[1]))
    assert devices == list(range(cluster.num_devices))
    for i, s in enumerate(found.stages):
        at, whole = s.devices[0] % cluster.devices_per_host, cluster.devices_per_host
        assert at == 0 if s.submesh.devices_per_host == whole else at + s.devices[1] <= whole
        assert s.devices[1] == s.submesh.num_devices
        o = s.option
        held = fly(len(found.stages) - i, micro_batches)
        assert o.fixed_bytes + o.peak_bytes + held * o.micro_bytes <= memory
    seconds = [s.option.forward_s + s.option.backward_s for s in found.stages]
    total = sum(seconds) + 2 * sum(costs.sends[s.last] for s in found.stages[:-1])
    update = max(s.option.update_s for s in found.stages)
    assert found.latency_s == pytest.approx(total + (micro_batches - 1) * max(seconds) + update)


def instance(seed: int) -> tuple[int, Cluster, int, Table, float, InFlight]:
    rng = np.random.default_rng(seed)
    cluster = machine(*MACHINES[seed % len(MACHINES)])
    layers, micro = int(rng.integers(1, 6)), int(rng.choice([1, 2, 4, 16]))
    memory = float(rng.choice([1.0, 2.0, 4.0, 8.0, 1e9]))
    return layers, cluster, micro, random_table(rng, layers, cluster), memory, (min, gpipe, odd)[int(rng.integers(3))]


@pytest.mark.parametrize("part", range(4))
def test_search_equals_exhaustive_search(part: int) -> None:
    outcomes = {"found": 0, "nothing fits": 0, "limit matters": 0}
    for seed in range(150 * part, 150 * (part + 1)):
        layers, cluster, micro, costs, memory, fly = instance(seed)
        counts = range(1, min(layers, cluster.num_devices) + 1)
        best = exhaustive(layers, cluster, micro, costs, memory, fly, counts)
        if math.isinf(best):
            with pytest.raises(InfeasibleError):
                search(layers, cluster, micro, costs, memory, in_flight=fly)
            outcomes["nothing fits"] += 1
            continue
        found = search(layers, cluster, micro, costs, memory, in_flight=fly)
        assert found.latency_s == pytest.approx(best, rel=1e-12), seed
        check_plan(found, cluster, micro, costs, memory, fly)
        assert len(costs.asked) == len(set(costs.asked)) == found.statistics.asked
        outcomes["found"] += 1
        outcomes["limit matters"] += best > exhaustive(layers, cluster, micro, costs, math.inf, fly, counts) + 1e-9
    assert min(outcomes.values()) >= 10, outcomes


def test_a_fixed_or_limited_number_of_stages_equals_exhaustive_search() -> None:
    compared = 0
    for seed in range(1000, 1150):
        layers, cluster, micro, costs, memory, fly = instance(seed)
        most = min(layers, cluster.num_devices)
        for low, high in ((1, max(1, most - 1)), (most, most)):
            best = exhaustive(layers, cluster, micro, costs, memory, fly, range(low, high + 1))
            if math.isinf(best):
                continue
            limits = {"max_stages": high} if low < high else {"num_stages": high}
            found = search(layers, cluster, micro, costs, memory, in_flight=fly, **limits)
            assert found.latency_s == pytest.approx(best, rel=1e-12), seed
            assert low <= len(found.stages) <= high
            compared += 1
    assert compared > 100


def test_a_gap_is_kept() -> None:
    for seed in range(2000, 2060):
        layers, cluster, micro, costs, _, fly = instance(seed)
        try:
            best = search(layers, cluster, micro, costs, 1e9, in_flight=fly).latency_s
        except InfeasibleError:
            continue
        assert search(layers, cluster, micro, costs, 1e9, in_flight=fly, gap=0.3).latency_s <= 1.3 * best


# ------------------------------------------------------------------------------------------------ known answers


@pytest.mark.parametrize(
    ("hosts", "devices_per_host", "shapes"),
    [(2, 4, "1×1 1×2 1×4 2×4"), (1, 6, "1×1 1×2 1×4 1×6"), (3, 3, "1×1 1×2 1×3 2×3 3×3"), (3, 1, "1×1 2×1 3×1")],
)
def test_submeshes_are_powers_of_two_and_whole_hosts(hosts: int, devices_per_host: int, shapes: str) -> None:
    assert " ".join(map(str, submeshes(machine(hosts, devices_per_host)))) == shapes


def test_memory_moves_layers_to_the_later_stages() -> None:
    """A stage of n layers with h micro-batches in flight takes n · h + 3 bytes: 7 bytes allow 1, 1, 2 and 4 layers."""
    cluster = machine(1, 4)
    table = {
        (a, b, s): [Option(b - a + 1.0, 0.0, 0.0, 2.0, b - a + 1.0, 1.0)] * (s.num_devices == 1)
        for a, b, s in keys(8, cluster)
    }
    found = search(8, cluster, 16, Table(table, [0.0] * 7), 7.0, in_flight=min)
    assert [s.last for s in found.stages] == [0, 1, 3, 7]
    assert found.latency_s == 8 + 15 * 4
    with pytest.raises(InfeasibleError, match=r"need at least 7 B per device with \d micro-batches in flight"):
        search(8, cluster, 16, Table(table, [0.0] * 7), 6.0, in_flight=min)


def test_sizes_follow_the_work_of_the_layers() -> None:
    cluster, costs = machine(1, 4), even(3, machine(1, 4))
    for first, last, submesh in costs.options_of:
        work = sum((1, 2, 1)[first : last + 1]) / submesh.num_devices * (3 if submesh.num_devices == 4 else 1)
        costs.options_of[first, last, submesh] = [Option(work / 3, work * 2 / 3, 0.0, 0.0, 0.0, 0.0, tag=work)]
    found = search(3, cluster, 64, costs, 1e9, in_flight=min)
    assert [str(s.submesh) for s in found.stages] == ["1×1", "1×2", "1×1"]
    assert sorted(s.devices for s in found.stages) == [(0, 2), (2, 1), (3, 1)]
    assert [s.option.tag for s in found.stages] == [1.0, 1.0, 1.0]
    assert (found.sum_s, found.slowest_s, found.latency_s) == (3.0, 1.0, 66.0)


def test_three_stages_of_four_devices_do_not_fit_into_two_hosts_of_six() -> None:
    cluster = machine(2, 6)
    slow = {Submesh(1, 4): 1.0, Submesh(1, 6): 5.0}
    table = {
        (a, b, s): [Option(slow.get(s, 9.0) + 4 * (b - a), 0.0, 0.0, 0.0, 0.0, 0.0)] for a, b, s in keys(3, cluster)
    }
    found = search(3, cluster, 8, Table(table, [0.0, 0.0]), 1e9, in_flight=min)
    assert sorted(s.devices[1] for s in found.stages) == [6, 6]


def random_work(layers: int, cluster: Cluster, tightness: float) -> Table:
    """Three options each, faster ones with more memory, and losses in large submeshes."""
    rng, table = np.random.default_rng(0), dict[Key, list[Option]]()
    work = rng.uniform(0.5, 1.5, layers)
    for first, last, submesh in keys(layers, cluster):
        share = float(work[first : last + 1].sum()) / submesh.num_devices
        loss = submesh.num_devices**0.15 * float(rng.uniform(1.0, 1.1))
        table[first, last, submesh] = [
            Option(share * loss * slow, 2 * share * loss * slow, 0.1 * share, share * fixed, share * 2 / slow, share)
            for slow, fixed in ((1.0, 10.0), (1.2, 8.0), (1.3, 5.0))
        ]
    return Table(table, rng.uniform(0.0, 0.05, layers - 1).tolist(), tightness)


@pytest.mark.parametrize(
    ("layers", "hosts", "tightness", "memory", "share"),
    [(64, 8, 0.0, 1e9, 1.0), (32, 4, 0.9, 22.0, 0.5), (32, 4, 1.0, 1e9, 0.02)],
)
def test_many_layers_and_devices_take_seconds_and_few_questions(
    layers: int, hosts: int, tightness: float, memory: float, share: float
) -> None:
    cluster = machine(hosts, 8)
    costs = random_work(layers, cluster, tightness)
    start = time.process_time()
    found = search(layers, cluster, 64, costs, memory, in_flight=min)
    assert time.process_time() - start < 5
    check_plan(found, cluster, 64, costs, memory, min)
    assert found.statistics.asked == len(costs.asked) <= share * found.statistics.ranges


# ------------------------------------------------------------------------------------------------ errors


def test_the_error_names_the_stage_that_blocks() -> None:
    cluster = machine(1, 2)
    words = "layers 0 to 3 on 1×2 devices need at least 14 B per device with 1 micro-batches in flight, there are 10 B"
    with pytest.raises(InfeasibleError, match=f"{words}; use more devices, rematerialization, more micro-batches"):
        search(4, cluster, 8, even(4, cluster, fixed=6.0), 10.0, in_flight=min)


def test_the_error_names_a_layer_that_nothing_can_run() -> None:
    costs = even(4, machine(2, 2))
    for first, last, submesh in costs.options_of:
        if first <= 2 <= last:
            costs.options_of[first, last, submesh] = []
    with pytest.raises(InfeasibleError, match=r"layer 2 on [12]×[12] devices have no option at all"):
        search(4, machine(2, 2), 8, costs, 1e9, in_flight=min)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"num_micro_batches": 0}, "num_micro_batches must be at least 1"),
        ({"memory_bytes": 0.0}, "memory_bytes must be above 0"),
        ({"gap": -0.1}, "gap at least 0"),
        ({"num_stages": 5}, "4 layers on 1 host of 7 devices can form 1, 3, 4 stages with submeshes of 1, 2, 4, … "),
        ({"num_stages": 2}, "not num_stages=2; ask for one of these, or give other submeshes with ManualStageOption"),
        ({"max_stages": 0}, "not max_stages=0; ask for one of these"),
        ({"in_flight": lambda stages, micro: -1}, "in_flight must return 0 or more"),  # pyright: ignore
    ],
)
def test_wrong_options_are_refused(changes: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {"num_layers": 4, "cluster": machine(1, 7), "num_micro_batches": 2}
    arguments |= {"costs": even(4, machine(1, 7)), "memory_bytes": 1e9, "in_flight": min} | changes
    with pytest.raises(MethodError, match=re.escape(words)):
        search(**arguments)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("tightness", "send_s", "words"),
    [
        (1.5, 0.0, "lower_bound_s of layers 0–1 on 1×2 is 1.5, above"),
        (math.nan, 0.0, "found nan"),
        (1.0, -1.0, "send_s"),
    ],
)
def test_costs_that_break_their_contract_are_refused(tightness: float, send_s: float, words: str) -> None:
    costs = Table(even(2, machine(1, 2)).options_of, [send_s], tightness)
    with pytest.raises(PlanError, match=words):
        search(2, machine(1, 2), 4, costs, 1e9, in_flight=min)


def test_an_option_that_takes_no_finite_time_is_refused() -> None:
    with pytest.raises(PlanError, match="finite and at least 0"):
        Option(math.inf, 0.0, 0.0, 0.0, 0.0, 0.0)
