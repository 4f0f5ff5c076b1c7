"""Simulated schedules against the papers' closed forms, longest paths, and a replay of memory; and traces of them."""

import dataclasses
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from alpa_like.errors import PlanError
from alpa_like.schedule import SCHEDULES, Schedule, Task, make_schedule
from alpa_like.simulate import Event, Simulation, Times, chrome_trace, simulate, write_trace

SHAPES = [(1, 1), (1, 5), (2, 1), (2, 8), (3, 2), (4, 4), (4, 9), (5, 3), (8, 8), (8, 33)]
CHUNKED = ("gpipe", "interleaved-1f1b", "inference")


def run(name: str, stages: int, micro_batches: int, times: Times, meshes: int | None = None) -> Simulation:
    return simulate(make_schedule(name, stages, micro_batches, meshes), times)


def split_times(stages: int, forward: float, inputs: float, weights: float) -> Times:
    return Times.of((forward,) * stages, (inputs + weights,) * stages, input_grad_s=(inputs,) * stages)


def random_times(rng: random.Random, stages: int, meshes: int) -> Times:
    def draw(count: int) -> tuple[float, ...]:
        return tuple(rng.uniform(0.1, 3) for _ in range(count))

    sends = tuple(rng.choice((0.0, rng.uniform(0, 4))) for _ in range(stages - 1))
    return Times(draw(stages), draw(stages), draw(stages), draw(stages), sends, rng.choice(((), draw(meshes))))


def random_case(seed: int) -> tuple[Schedule, Times]:
    rng = random.Random(seed)
    name, meshes = rng.choice(SCHEDULES), rng.randint(1, 4)
    stages = meshes * (rng.randint(1, 3) if name in CHUNKED else 1)
    return make_schedule(name, stages, rng.randint(1, 8), meshes), random_times(rng, stages, meshes)


def longest_path(schedule: Schedule, times: Times) -> dict[Any, float]:
    """When each task ends, from a graph of all that waits for each other: a link is a chain of the sends over it."""
    ends: dict[Any, float] = {}
    graph, seconds = waiting_graph(schedule, times)
    for node in nx.topological_sort(graph):
        ends[node] = max((ends[p] for p in graph.predecessors(node)), default=0.0) + seconds[node]
    return ends


def waiting_graph(schedule: Schedule, times: Times) -> tuple["nx.DiGraph[Any]", dict[Any, float]]:
    graph, seconds = nx.DiGraph(), {}
    tasks = [t for order in schedule.order for t in order]
    for order in schedule.order:
        graph.add_edges_from(itertools.pairwise(order))
    for task in tasks:
        graph.add_node(task)
        seconds[task] = getattr(times, f"{task.kind}_s")[task.stage]
    links: dict[tuple[int, int], list[Any]] = {}
    for task in tasks:
        step = {"forward": 1, "backward": -1, "input_grad": -1, "weight_grad": 0}[task.kind]
        there = task.stage + step
        if not step or not 0 <= there < schedule.num_stages:
            continue
        send = ("send", task)
        local = schedule.meshes[task.stage] == schedule.meshes[there]
        seconds[send] = 0.0 if local else times.send_s[min(task.stage, there)]
        links.setdefault((task.stage, there), []).append(send)
        kinds = ("forward",) if step == 1 else ("backward", "input_grad")
        users = [Task(k, there, task.micro_batch) for k in kinds]
        graph.add_edges_from([(task, send), *((send, u) for u in users if u in seconds)])
    for sends in links.values():
        graph.add_edges_from(itertools.pairwise(sends))
    return graph, seconds


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "eager-1f1b", "interleaved-1f1b"])
def test_bubble_of_equal_stages(name: str, stages: int, micro_batches: int) -> None:
    """(S - 1) / (M + S - 1): Huang et al. 2019 for GPipe, Narayanan et al. 2021 for 1F1B."""
    for forward, backward in ((1, 2), (3, 1)):
        found = run(name, stages, micro_batches, Times.uniform(stages, forward, backward))
        assert found.bubble_fraction == pytest.approx((stages - 1) / (micro_batches + stages - 1))
        assert found.makespan_s == pytest.approx((micro_batches + stages - 1) * (forward + backward))


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_bubble_of_inference(stages: int, micro_batches: int) -> None:
    found = run("inference", stages, micro_batches, Times.uniform(stages, 0.5))
    assert found.makespan_s == pytest.approx((micro_batches + stages - 1) * 0.5)


@pytest.mark.parametrize(("meshes", "chunks"), [(1, 3), (2, 2), (3, 3), (4, 2), (4, 4), (8, 2)])
def test_bubble_of_interleaving(meshes: int, chunks: int) -> None:
    """(p - 1) / (v M + p - 1) where the meshes divide the micro-batches (Narayanan et al. 2021, section 2.2)."""
    times = Times.uniform(meshes * chunks)
    for rounds in (1, 2, 5):
        found = run("interleaved-1f1b", meshes * chunks, rounds * meshes, times, meshes)
        assert found.bubble_fraction == pytest.approx((meshes - 1) / (chunks * rounds * meshes + meshes - 1))


@pytest.mark.parametrize(("meshes", "chunks"), [(2, 2), (2, 4), (3, 3), (4, 2), (4, 4), (8, 2)])
def test_interleaving_other_numbers_of_micro_batches_stays_near_the_bounds(meshes: int, chunks: int) -> None:
    """The busiest mesh and the longest chain bound it below; up to as many micro-batches as meshes it is optimal."""
    pair = 3  # seconds of one stage, forward and backward
    for micro_batches in range(1, 6 * meshes):
        found = run("interleaved-1f1b", meshes * chunks, micro_batches, Times.uniform(meshes * chunks), meshes)
        busiest = (micro_batches * chunks + meshes - 1) * pair
        chain = (meshes * chunks + micro_batches - 1) * pair
        missing = -micro_batches % meshes
        assert found.makespan_s >= max(busiest, chain)
        assert found.makespan_s <= busiest + missing * (chunks - 1) * pair
        if micro_batches <= meshes:
            assert found.makespan_s == chain
        if micro_batches > 5 * meshes:
            assert found.makespan_s <= 1.03 * busiest


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 3), (2, 9), (4, 7), (4, 12), (8, 15), (8, 40)])
@pytest.mark.parametrize(("f", "b", "w"), [(1, 1, 1), (2, 2, 1), (4, 5, 3), (4, 6, 4), (3, 2, 1), (4, 8, 3)])
def test_zero_bubbles(stages: int, micro_batches: int, f: int, b: int, w: int) -> None:
    """Qi et al. 2023, table 2, where M >= 2p - 1 and no part of a stage takes less than T_W.

    What they compare is the longest time over all stages from the first task of the stage to its last, less its
    M (T_F + T_B + T_W) of work: a stage that starts later because the pipeline fills does not count as idle.
    """
    times = split_times(stages, f, b, w)
    idle = {name: max(run(name, stages, micro_batches, times).idle_s) for name in ("1f1b", "zb-h1", "zb-h2")}
    assert idle["1f1b"] == pytest.approx((stages - 1) * (f + b + w))
    assert idle["zb-h1"] == pytest.approx((stages - 1) * (f + b - w))
    assert idle["zb-h2"] == pytest.approx((stages - 1) * (f + b - 2 * w))


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 8])
def test_zero_bubble_schedules_are_optimal_for_equal_parts(stages: int) -> None:
    """No schedule is faster. The last stage has 3 M seconds of work, S - 1 after the start. And it runs all forwards
    and gradients, 2 M, before the last gradient goes back through S - 1 stages, where one W follows it.
    """
    for micro_batches in range(1, 3 * stages + 2):
        bound = max(3 * micro_batches + stages - 1, 2 * (micro_batches + stages) - 1)
        for name in ("zb-h1", "zb-h2"):
            assert run(name, stages, micro_batches, split_times(stages, 1, 1, 1)).makespan_s == bound


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_peak_memory_of_zero_bubbles(stages: int, micro_batches: int) -> None:
    def peak(name: str) -> float:
        schedule, times = make_schedule(name, stages, micro_batches), Times.uniform(stages)
        return max(simulate(schedule, times, activation_bytes=(2.0,) * stages).peak_bytes)

    assert peak("zb-h1") == peak("1f1b") == 2 * min(micro_batches, stages)
    assert peak("zb-h2") == 2 * min(micro_batches, 2 * stages - 1)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 8), (4, 16), (8, 32)])
def test_eager_hides_sends(stages: int, micro_batches: int) -> None:
    times = Times.uniform(stages, send_s=0.5)
    plain, eager = (run(name, stages, micro_batches, times) for name in ("1f1b", "eager-1f1b"))
    assert eager.makespan_s < plain.makespan_s
    # Only the way in and out of the pipeline is left: the steady state never waits for a send.
    assert eager.makespan_s == pytest.approx(3 * (micro_batches + stages - 1) + 2 * 0.5 * (stages - 1))


def test_one_wire_carries_one_send_at_a_time() -> None:
    found = run("inference", 2, 4, Times.uniform(2, forward_s=1, send_s=3))
    sends = [(e.start_s, e.end_s) for e in found.events if e.kind == "send"]
    assert sends == [(1, 4), (4, 7), (7, 10), (10, 13)]
    assert found.makespan_s == 14
    assert found.bubble_fraction == pytest.approx(1 - 8 / 28)


def test_both_directions_and_other_boundaries_send_at_once() -> None:
    times = dataclasses.replace(Times.uniform(3, 1, 1), send_s=(2.0, 5.0))
    found = run("1f1b", 3, 1, times)
    assert [(e.name, e.start_s, e.end_s) for e in found.events] == [
        ("F0.0", 0, 1),
        ("F0.0 → 1", 1, 3),
        ("F1.0", 3, 4),
        ("F1.0 → 2", 4, 9),
        ("F2.0", 9, 10),
        ("B2.0", 10, 11),
        ("B2.0 → 1", 11, 16),
        ("B1.0", 16, 17),
        ("B1.0 → 0", 17, 19),
        ("B0.0", 19, 20),
    ]
    both = run("1f1b", 2, 3, Times.uniform(2, 1, 1, send_s=4))
    lanes = {e.lane: [(o.start_s, o.end_s) for o in both.events if o.lane == e.lane] for e in both.events if e.lane}
    forth, back = lanes.values()
    assert any(a < d and c < b for (a, b), (c, d) in itertools.product(forth, back))


def test_stages_of_one_mesh_send_nothing() -> None:
    found = run("gpipe", 3, 2, Times.uniform(3, send_s=9), meshes=1)
    assert found.makespan_s == 18
    assert found.bubble_fraction == 0
    assert {e.kind for e in found.events} == {"forward", "backward"}


def test_updates_follow_the_last_task_of_their_mesh() -> None:
    found = run("1f1b", 2, 2, Times.uniform(2, 1, 2, update_s=5))
    updates = {e.mesh: (e.start_s, e.end_s) for e in found.events if e.kind == "update"}
    assert updates == {0: (9, 14), 1: (7, 12)}
    assert found.makespan_s == 14
    assert found.bubble_fraction == pytest.approx(1 - 12 / 28)
    assert found.idle_s == (3, 0)


@pytest.mark.parametrize("seed", range(200))
def test_random_pipelines_equal_the_longest_path(seed: int) -> None:
    schedule, times = random_case(seed)
    expected, found = longest_path(schedule, times), simulate(schedule, times)
    assert {e.task: e.end_s for e in found.events if e.task} == pytest.approx(
        {t: end for t, end in expected.items() if isinstance(t, Task)}
    )
    updates = times.update_s or (0.0,) * schedule.num_meshes
    ends = [expected[tasks[-1]] + u for tasks, u in zip(schedule.order, updates, strict=True)]
    assert found.makespan_s == pytest.approx(max(ends))
    work = [sum(getattr(times, f"{t.kind}_s")[t.stage] for t in tasks) for tasks in schedule.order]
    assert found.makespan_s >= max(work)
    assert found.bubble_fraction == pytest.approx(1 - sum(work) / (len(work) * max(ends)))


@pytest.mark.parametrize("seed", range(40))
def test_peak_memory_equals_a_replay_of_the_events(seed: int) -> None:
    schedule, times = random_case(seed)
    rng = random.Random(seed)
    activation, fixed = ([rng.uniform(1, 9) for _ in range(schedule.num_stages)] for _ in range(2))
    found = simulate(schedule, times, activation_bytes=activation, fixed_bytes=fixed)
    for mesh, peak in enumerate(found.peak_bytes):
        always = sum(b for b, m in zip(fixed, schedule.meshes, strict=True) if m == mesh)
        assert peak == pytest.approx(always + replay([e for e in found.events if e.mesh == mesh], activation))


def replay(events: list[Event], activation: list[float]) -> float:
    """The most bytes held at the start of any task: of what has begun and is not yet past its last task."""
    spans: dict[tuple[int, int], list[float]] = {}
    for e in events:
        if e.task:
            span = spans.setdefault((e.task.stage, e.task.micro_batch), [e.start_s, e.end_s])
            span[:] = min(span[0], e.start_s), max(span[1], e.end_s)
    begins = [first for first, _ in spans.values()]
    return max(sum(activation[s] for (s, _), (a, b) in spans.items() if a <= t < b) for t in begins)


@pytest.mark.parametrize(("slow", "makespan"), [(0, 300), (1, 303), (2, 306)])
def test_the_slowest_stage_never_waits_and_the_others_do(slow: int, makespan: float) -> None:
    forward = tuple(5.0 if s == slow else 1.0 for s in range(3))
    found = run("1f1b", 3, 20, Times.of(forward, tuple(2 * f for f in forward)))
    assert found.makespan_s == pytest.approx(makespan)  # 20 × 15, and the way to the slow stage and back
    assert found.idle_s[slow] == 0
    assert all(idle > 20 * 10 for s, idle in enumerate(found.idle_s) if s != slow)


def test_a_large_pipeline_takes_about_a_second() -> None:
    start = time.perf_counter()
    found = run("1f1b", 64, 512, Times.uniform(64, send_s=1e-3))
    assert time.perf_counter() - start < 10  # a quadratic walk takes minutes
    assert len(found.events) == 2 * 512 * (64 + 63)
    assert found.bubble_fraction == pytest.approx(63 / 575, rel=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Times.uniform(2, forward_s=-1), "forward_s must be finite seconds of at least 0"),
        (lambda: Times.of((1, 1), (1, float("nan"))), "backward_s must be finite seconds"),
        (lambda: Times.of((1, 1), (2, 2), input_grad_s=(3, 1)), "weight_grad_s must be .* at least 0"),
        (lambda: Times.of((1, 1), (2, 2), input_grad_s=(1,)), "input_grad_s needs 2 entries"),
        (lambda: Times.of((1, 1), (2, 2, 2)), "backward_s needs 2 entries for this pipeline, found 3"),
        (lambda: Times.of((1, 1), (2, 2), send_s=(1, 1)), "send_s needs 1 entries"),
        (lambda: run("1f1b", 3, 2, Times.uniform(2)), "forward_s needs 3 entries for this pipeline, found 2"),
        (lambda: run("gpipe", 4, 2, Times.uniform(4, update_s=1), 2), "update_s needs 2 entries"),
        (lambda: simulate(make_schedule("1f1b", 2, 2), Times.uniform(2), fixed_bytes=(1,)), "fixed_bytes needs 2"),
        (lambda: simulate(make_schedule("1f1b", 1, 1), Times.uniform(1), activation_bytes=(1, 2)), "activation_bytes"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        call()


def test_an_order_that_deadlocks_is_refused() -> None:
    schedule = make_schedule("1f1b", 2, 2)
    backwards = dataclasses.replace(schedule, order=(schedule.order[0][::-1], schedule.order[1]))
    with pytest.raises(PlanError, match="waits for ever"):
        simulate(backwards, Times.uniform(2))


def test_trace_has_every_event_on_the_thread_of_its_mesh_or_link() -> None:
    found = run("zb-h1", 3, 4, Times.uniform(3, 1, 2, send_s=0.25, update_s=0.5))
    trace = json.loads(json.dumps(chrome_trace(found.events, process_name="plan")))
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(slices) == len(found.events) == 3 * 3 * 4 + 2 * 2 * 4 + 3
    assert sorted(names.values())[:2] == ["mesh 0", "mesh 0 → 1, stage 0 → 1"]
    assert len(names) == 3 + 4
    assert {e["cat"] for e in slices} == {"forward", "input_grad", "weight_grad", "send", "update"}
    assert sum(e["dur"] for e in slices if names[e["tid"]] == "mesh 1") == pytest.approx(1e6 * (4 * 3 + 0.5))
    weight = next(e for e in slices if e["name"] == "W2.1")
    assert weight["args"] == {"mesh": 2, "stage": 2, "micro_batch": 1}
    for thread in names:
        times = sorted((e["ts"], e["ts"] + e["dur"]) for e in slices if e["tid"] == thread)
        assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(times))


def test_a_measured_run_is_traced_the_same_way(tmp_path: Path) -> None:
    events = [Event(1, None, "copy", "weights", 0.5, 0.75, "disk"), Event(0, Task("forward", 0, 2), "run", "f", 1, 2)]
    path = tmp_path / "trace.json"
    write_trace(path, iter(events), process_name="measured")
    trace = json.loads(path.read_text())["traceEvents"]
    assert [e["args"]["name"] for e in trace if e["name"] == "process_name"] == ["measured"]
    assert [e["args"]["name"] for e in trace if e["name"] == "thread_name"] == ["mesh 0", "disk"]
    assert [(e["name"], e["cat"], e["ts"], e["dur"]) for e in trace if e["ph"] == "X"] == [
        ("weights", "copy", 500000, 250000),
        ("f", "run", 1000000, 1000000),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_a_trace_that_cannot_be_written_leaves_all_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"the trace can't be written to .*nowhere"):
        write_trace(tmp_path / "nowhere" / "trace.json", [])
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(PlanError, match="choose another path"):
        write_trace(target, [])
    assert list(tmp_path.iterdir()) == [target]
