"""Are the optima of pipeline planning optima? Both dynamic programs against trying everything, and their time.

    python -m benchmarks.stage_exactness                  # 300 random instances of each, then large ones
    python -m benchmarks.stage_exactness --instances 1000 --no-large

1. `passes.cluster_layers.cluster`: programs of up to 12 operators, a third of them without flops, some huge, against
   every division into layers.
2. `passes.stage_search.search`: up to 5 layers on up to 12 devices, hosts of 1 to 7 devices, up to 3 options each, of
   different speed and memory, against every division × every choice of submeshes that can be placed × every option.
   "asked" is the share of the ranges of layers and submeshes for which the search asked for options.
3. The time of large instances, options at no cost. "bound" is the lower bound that the search was given, as a share of
   the time that a range takes with the fastest option when nothing is lost; the options lose up to 40 %.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from alpa_like.cluster import Cluster, Device, Link
from alpa_like.errors import InfeasibleError
from alpa_like.passes.cluster_layers import cluster
from alpa_like.passes.stage_search import Option, Submesh, search, submeshes
from benchmarks.common import parser, table

TOLERANCE = 1e-9
"""Relative; the sums are added in different orders."""

HOSTS = ((1, 1), (1, 3), (1, 4), (1, 6), (1, 7), (2, 2), (2, 3), (2, 4), (2, 6), (3, 1), (3, 2), (5, 1), (5, 2))

InFlight = Callable[[int, int], int]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables; exit with 1 where an optimum is missed."""
    options = _options(arguments)
    tallies = [_clusterings(options.instances), _searches(options.instances)]
    heads = ("random instances", "instances", "same optimum", "same: nothing fits", "wrong", "asked", "s")
    print(f"{table(heads, [t.row() for t in tallies])}\n", flush=True)
    if options.large:
        print(f"{_large_clusterings()}\n", flush=True)
        print(_large_searches())
    raise SystemExit(1 if any(t.wrong for t in tallies) else 0)


@dataclass
class Tally:
    """What became of the random instances of one program."""

    name: str
    equal: int = 0
    infeasible: int = 0
    wrong: int = 0
    seconds: float = 0.0
    shares: list[float] = field(default_factory=list[float])

    def add(self, seed: int, best: float, found: float, seconds: float) -> None:
        """Count one instance; inf means that nothing fits."""
        good = found == best or abs(found - best) <= TOLERANCE * abs(best)
        self.equal += good and math.isfinite(best)
        self.infeasible += good and math.isinf(best)
        self.wrong += not good
        self.seconds += seconds
        if not good:
            print(f"WRONG: {self.name}, seed {seed}: {found}, exhaustive search: {best}")

    def row(self) -> tuple[str, ...]:
        """A line of the table."""
        counts = (self.equal + self.infeasible + self.wrong, self.equal, self.infeasible, self.wrong)
        asked = f"{np.mean(self.shares):.0%}" if self.shares else ""
        return self.name, *map(str, counts), asked, f"{self.seconds:.2f}"


# ------------------------------------------------------------------------------------------------ layers


def _clusterings(count: int) -> Tally:
    """Part 1."""
    tally = Tally("operators into layers")
    for seed in range(count):
        rng = np.random.default_rng(seed)
        flops, cut_bytes, balance = *_program(rng), float(rng.choice([0.0, 0.2, 0.5, 1.0]))
        layers = int(rng.integers(1, min(6, int((flops > 0).sum())) + 1))
        start = time.perf_counter()
        ends = cluster(flops.tolist(), cut_bytes.tolist(), layers, balance=balance)
        seconds = time.perf_counter() - start
        best, found = _best_division(flops, cut_bytes, layers, balance), _score(flops, cut_bytes, ends)
        tally.add(seed, best[0] * 1e6 + best[1], found[0] * 1e6 + found[1], seconds)
    return tally


def _program(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers, so that sums are exact and can tie; the first operator has flops."""
    count = int(rng.integers(1, 13))
    flops = rng.integers(1, 10, count) * np.where(rng.random(count) < 0.1, 20, 1) * (rng.random(count) < 0.7)
    flops[0] = 1
    return flops.astype(np.float64), rng.integers(0, rng.choice([2, 5, 100]), count - 1).astype(np.float64)


def _score(flops: np.ndarray, cut_bytes: np.ndarray, ends: Sequence[int]) -> tuple[float, float, float]:
    """Bytes, squares of the layers' flops and the largest; inf bytes where a layer has no flops."""
    sizes = np.add.reduceat(flops, [0, *ends[:-1]])
    traffic = sum(float(cut_bytes[end - 1]) for end in ends[:-1])
    return traffic if sizes.min() > 0 or len(ends) == 1 else math.inf, float(sizes @ sizes), float(sizes.max())


def _best_division(flops: np.ndarray, cut_bytes: np.ndarray, layers: int, balance: float) -> tuple[float, float]:
    """The least (bytes, squares) under the limit, or under the least limit that some division keeps."""
    cuts = itertools.combinations(range(1, len(flops)), layers - 1)
    scores = [s for c in cuts if math.isfinite((s := _score(flops, cut_bytes, (*c, len(flops))))[0])]
    limit = max((1 + balance) * flops.sum() / layers, min(s[2] for s in scores))
    return min(s[:2] for s in scores if s[2] <= limit)


def _large_clusterings() -> str:
    """The time of large programs."""
    rows: list[tuple[str, ...]] = []
    for operators, layers, heavy in itertools.product((2_000, 20_000), (8, 128), (0.1, 1.0)):
        rng = np.random.default_rng(0)
        flops = np.where(rng.random(operators) < heavy, rng.random(operators), 0.0).tolist()
        cut_bytes = rng.integers(0, 5, operators - 1).tolist()
        start = time.perf_counter()
        cluster(flops, cut_bytes, layers)
        rows.append((str(operators), f"{heavy:.0%}", str(layers), f"{time.perf_counter() - start:.3f}"))
    return table(("operators", "with flops", "layers", "s"), rows)


# ------------------------------------------------------------------------------------------------ stages


@dataclass
class Given:
    """Costs from tables."""

    table: dict[tuple[int, int, Submesh], list[Option]]
    bounds: dict[tuple[int, int, Submesh], float]
    sends: list[float]

    def options(self, first: int, last: int, submesh: Submesh) -> Sequence[Option]:
        return self.table[first, last, submesh]

    def lower_bound_s(self, first: int, last: int, submesh: Submesh) -> float:
        return self.bounds[first, last, submesh]

    def send_s(self, boundary: int) -> float:
        return self.sends[boundary]


def _searches(count: int) -> Tally:
    """Part 2."""
    tally = Tally("layers into stages")
    for seed in range(count):
        rng = np.random.default_rng(seed)
        machine, layers, micro = (
            _machine(*HOSTS[seed % len(HOSTS)]),
            int(rng.integers(1, 6)),
            int(rng.choice([1, 4, 16])),
        )
        costs, memory = _random_costs(rng, layers, machine), float(rng.choice([1.0, 2.0, 4.0, 1e9]))
        start, found = time.perf_counter(), math.inf
        try:
            result = search(layers, machine, micro, costs, memory, in_flight=min)
            found = result.latency_s
            tally.shares.append(result.statistics.asked / result.statistics.ranges)
        except InfeasibleError:
            pass
        seconds = time.perf_counter() - start
        tally.add(seed, _best_plan(layers, machine, micro, costs, memory, min), found, seconds)
    return tally


def _machine(hosts: int, devices_per_host: int) -> Cluster:
    device = Device("device", (("float32", 1e12),), 2**30, 1e11, 0.5)
    return Cluster("random", hosts, devices_per_host, device, Link(1e11, 1e-6), Link(1e10, 1e-5), ())


def _keys(layers: int, machine: Cluster) -> Iterator[tuple[int, int, Submesh]]:
    ranges = itertools.combinations_with_replacement(range(layers), 2)
    return ((first, last, submesh) for (first, last), submesh in itertools.product(ranges, submeshes(machine)))


def _random_costs(rng: np.random.Generator, layers: int, machine: Cluster) -> Given:
    options: dict[tuple[int, int, Submesh], list[Option]] = {}
    for first, last, submesh in _keys(layers, machine):
        work = (last - first + 1) / submesh.num_devices**0.8
        draws = rng.random((int(rng.integers(0, 4)), 6)) * work
        options[first, last, submesh] = [Option(*map(float, draw)) for draw in draws]
    share = float(rng.choice([0.0, 0.5, 1.0]))
    bounds = {k: share * min((o.seconds for o in found), default=0.0) for k, found in options.items()}
    return Given(options, bounds, rng.random(layers - 1).tolist())


def _best_plan(layers: int, machine: Cluster, micro: int, costs: Given, memory: float, in_flight: InFlight) -> float:
    """The latency of the best of all plans; inf where nothing fits."""
    best = math.inf
    for count in range(1, min(layers, machine.num_devices) + 1):
        held = [in_flight(count - stage, micro) for stage in range(count)]
        for shapes in itertools.product(submeshes(machine), repeat=count):
            if _can_be_placed(shapes, (machine.devices_per_host,) * machine.hosts, machine.devices_per_host):
                cuts = itertools.combinations(range(1, layers), count - 1)
                best = min(best, *(_best_options((0, *c, layers), shapes, held, micro, costs, memory) for c in cuts))
    return best


def _can_be_placed(shapes: Sequence[Submesh], free: tuple[int, ...], host: int) -> bool:
    """Whether submeshes take exactly the free devices of the hosts, by trying every host for each."""
    if not shapes:
        return not any(free)
    shape, rest = shapes[0], shapes[1:]
    ways = itertools.combinations([h for h, n in enumerate(free) if n >= shape.devices_per_host], shape.hosts)
    after = {tuple(n - shape.devices_per_host * (h in way) for h, n in enumerate(free)) for way in ways}
    return any(_can_be_placed(rest, left, host) for left in after)


def _best_options(
    edges: Sequence[int], shapes: Sequence[Submesh], held: Sequence[int], micro: int, costs: Given, memory: float
) -> float:
    """The latency of given stages with the best of their options."""
    ranges = zip(edges, edges[1:], shapes, held, strict=False)
    fitting = [[o for o in costs.table[a, b - 1, s] if o.bytes(n) <= memory] for a, b, s, n in ranges]
    sends, best = 2 * sum(costs.sends[e - 1] for e in edges[1:-1]), math.inf
    for chosen in itertools.product(*fitting):
        seconds = [o.seconds for o in chosen]
        best = min(best, sum(seconds) + sends + (micro - 1) * max(seconds) + max(o.update_s for o in chosen))
    return best


def _large_searches() -> str:
    """The time of large searches."""
    cases = [(32, 2, 32, 1e9, 0.9), (64, 8, 64, 1e9, 0.0), (64, 8, 64, 1e9, 0.5), (64, 8, 64, 1e9, 0.9)]
    cases += [(64, 8, 64, 16.0, 0.0), (64, 8, 64, 16.0, 0.9), (64, 8, 4, 1e9, 0.9), (64, 16, 64, 1e9, 0.9)]
    rows: list[tuple[str, ...]] = []
    for layers, hosts, micro, memory, bound in cases:
        machine = _machine(hosts, 8)
        costs, start = _large_costs(layers, machine, bound), time.perf_counter()
        found = search(layers, machine, micro, costs, memory, in_flight=min)
        seconds, s = time.perf_counter() - start, found.statistics
        about = (str(layers), f"{hosts}×8", str(micro), "tight" if memory < 1e9 else "ample", f"{bound:.0%}")
        counts = (str(len(found.stages)), str(s.ranges), str(s.asked), str(s.rounds), str(s.relaxed), str(s.layered))
        rows.append((*about, f"{found.latency_s:.3f}", *counts, f"{seconds:.2f}"))
    heads = ("layers", "devices", "micro-batches", "memory", "bound", "latency", "stages", "ranges", "asked", "rounds")
    return table((*heads, "step 1", "step 2", "s"), rows)


def _large_costs(layers: int, machine: Cluster, bound: float) -> Given:
    """Layers of unequal work; submeshes lose time as they grow; the slower options take less memory."""
    rng = np.random.default_rng(0)
    work, options = rng.uniform(0.5, 1.5, layers), dict[tuple[int, int, Submesh], list[Option]]()
    bounds: dict[tuple[int, int, Submesh], float] = {}
    for first, last, submesh in _keys(layers, machine):
        share = float(work[first : last + 1].sum()) / submesh.num_devices
        ideal = share * submesh.num_devices**0.1 * (1.3 if submesh.hosts > 1 else 1.0)
        bounds[first, last, submesh] = bound * ideal
        options[first, last, submesh] = [
            Option(ideal * lost / 3, ideal * lost * 2 / 3, 0.2 * share, share * kept * 5, share * kept, share)
            for lost, kept in zip(np.array([0.0, 0.1, 0.3]) + rng.uniform(1.0, 1.1, 3), (2.0, 1.5, 1.0), strict=True)
        ]
    return Given(options, bounds, rng.uniform(0.0, 0.02, layers - 1).tolist())


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--instances", type=int, default=300, help="random instances of each program")
    p.add_argument("--large", action=argparse.BooleanOptionalAction, default=True, help="the time of large instances")
    return p.parse_args(arguments)


if __name__ == "__main__":
    main()
