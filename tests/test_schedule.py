"""Pipeline schedules: closed forms of what they hold, deadlock against graph search, and every rule of `verify`."""

import dataclasses
import itertools
import random
from collections import Counter

import networkx as nx
import pytest

from alpa_like.errors import MethodError, PlanError
from alpa_like.schedule import SCHEDULES, Order, Schedule, Task, make_schedule

SHAPES = [*itertools.product(range(1, 7), (1, 2, 3, 4, 5, 7, 12, 13)), (16, 5), (16, 40)]
CHUNKED = [(p, v, m) for p in (1, 2, 3, 4) for v in (2, 3, 4) for m in (*range(1, 10), 13)]


def needs(schedule: Schedule, task: Task) -> list[Task]:
    """What a task waits for, by the rules of backpropagation."""
    stage, m = task.stage, task.micro_batch
    if task.kind == "forward":
        return [Task("forward", stage - 1, m)] if stage else []
    if task.kind == "weight_grad":
        return [Task("input_grad", stage, m)]
    everything = {t for tasks in schedule.order for t in tasks}
    above = {Task("backward", stage + 1, m), Task("input_grad", stage + 1, m)} & everything
    return [Task("forward", stage, m), *above]


def dependencies(schedule: Schedule) -> "nx.DiGraph[Task]":
    """Data dependencies and the order of every mesh, as one graph."""
    graph = nx.DiGraph()
    for tasks in schedule.order:
        graph.add_nodes_from(tasks)
        graph.add_edges_from(itertools.pairwise(tasks))
    graph.add_edges_from((n, t) for tasks in schedule.order for t in tasks for n in needs(schedule, t))
    return graph


def replaced(schedule: Schedule, mesh: int, tasks: Order) -> Schedule:
    return dataclasses.replace(schedule, order=(*schedule.order[:mesh], tasks, *schedule.order[mesh + 1 :]))


def counts(schedule: Schedule) -> list[int]:
    return [schedule.in_flight(s) for s in range(schedule.num_stages)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_complete_and_free_of_deadlock(name: str) -> None:
    for stages, micro_batches in SHAPES:
        schedule = make_schedule(name, stages, micro_batches).verify()
        found = Counter(t for tasks in schedule.order for t in tasks)
        parts = {"zb-h1": 3, "zb-h2": 3, "inference": 1}.get(name, 2)
        assert len(found) == found.total() == parts * stages * micro_batches
        assert schedule.splits_backward == (parts == 3)
        assert schedule.trains == (parts > 1)
        assert schedule.meshes == tuple(range(stages))


@pytest.mark.parametrize("name", ["gpipe", "interleaved-1f1b", "inference"])
def test_several_stages_per_mesh_for_any_number_of_micro_batches(name: str) -> None:
    for meshes, chunks, micro_batches in CHUNKED:
        schedule = make_schedule(name, meshes * chunks, micro_batches, meshes).verify()
        assert schedule.num_meshes == meshes
        assert schedule.meshes == tuple(range(meshes)) * chunks
        assert nx.is_directed_acyclic_graph(dependencies(schedule))


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_activations_held_equal_the_closed_forms(stages: int, micro_batches: int) -> None:
    def found(name: str) -> list[int]:
        return counts(make_schedule(name, stages, micro_batches))

    assert found("gpipe") == [micro_batches] * stages
    assert found("inference") == [1] * stages
    assert found("1f1b") == [min(micro_batches, stages - s) for s in range(stages)]
    assert found("eager-1f1b") == [min(micro_batches, 2 * (stages - s) - 1) for s in range(stages)]
    assert found("interleaved-1f1b") == found("1f1b")
    # Qi et al. 2023, table 2: p micro-batches for ZB-H1, as 1F1B holds on its first stage, 2p - 1 for ZB-H2.
    assert found("zb-h1") == [min(micro_batches, stages)] * stages
    assert found("zb-h2") == [min(micro_batches, 2 * stages - 1)] * stages


@pytest.mark.parametrize(("meshes", "chunks"), [(2, 2), (4, 2), (4, 3), (8, 2)])
def test_interleaving_warms_up_as_megatron_does(meshes: int, chunks: int) -> None:
    schedule = make_schedule("interleaved-1f1b", meshes * chunks, 3 * meshes, meshes)
    for mesh, tasks in enumerate(schedule.order):
        kinds = [t.kind for t in tasks]
        assert kinds.index("backward") == 2 * (meshes - mesh - 1) + (chunks - 1) * meshes + 1
        first = [(t.stage, t.micro_batch) for t in tasks if t.kind == "forward"][: 2 * meshes]
        assert first == [(c * meshes + mesh, m) for c in (0, 1) for m in range(meshes)]


@pytest.mark.parametrize(("meshes", "chunks"), [(2, 3), (4, 2), (3, 4)])
def test_micro_batches_that_do_not_fill_the_meshes_hold_no_more(meshes: int, chunks: int) -> None:
    for micro_batches in range(1, 4 * meshes):
        ragged, full = (
            make_schedule("interleaved-1f1b", meshes * chunks, m, meshes)
            for m in (micro_batches, micro_batches + -micro_batches % meshes)
        )
        assert all(a <= b for a, b in zip(counts(ragged), counts(full), strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_sequence_runs_everything_after_its_inputs(name: str) -> None:
    meshes = 2 if name in ("gpipe", "interleaved-1f1b", "inference") else 4
    schedule = make_schedule(name, 4, 7, meshes)
    line = schedule.sequence()
    at = {task: k for k, task in enumerate(line)}
    assert len(at) == len(line) == sum(map(len, schedule.order))
    assert all(at[a] < at[b] for a, b in dependencies(schedule).edges)


@pytest.mark.parametrize("seed", range(60))
def test_deadlocks_are_found_where_the_graph_has_a_cycle(seed: int) -> None:
    rng = random.Random(seed)
    schedule = make_schedule(rng.choice(SCHEDULES), rng.randint(1, 4), rng.randint(1, 5))
    for _ in range(rng.randint(1, 3)):
        mesh = rng.randrange(schedule.num_meshes)
        tasks = list(schedule.order[mesh])
        a = rng.randrange(len(tasks))
        b = min(len(tasks) - 1, a + rng.randint(1, 3))
        tasks[a], tasks[b] = tasks[b], tasks[a]
        schedule = replaced(schedule, mesh, tuple(tasks))
    if nx.is_directed_acyclic_graph(dependencies(schedule)):
        assert schedule.verify() is schedule
    else:
        with pytest.raises(PlanError, match="waits for ever at"):
            schedule.verify()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_missing_or_doubled_task_is_found(name: str) -> None:
    schedule = make_schedule(name, 2, 3)
    for mesh, tasks in enumerate(schedule.order):
        for k, task in enumerate(tasks):
            with pytest.raises(PlanError, match=f"stage {mesh} needs forward and .* {task.micro_batch}, found"):
                replaced(schedule, mesh, (*tasks[:k], *tasks[k + 1 :])).verify()
            with pytest.raises(PlanError, match=f"runs {task} twice"):
                replaced(schedule, mesh, (*tasks, task)).verify()


def test_a_task_elsewhere_or_of_another_pipeline_is_found() -> None:
    schedule = make_schedule("1f1b", 2, 3)
    with pytest.raises(PlanError, match=r"F1\.0 is on mesh 0, but its stage is on mesh 1"):
        replaced(schedule, 0, (*schedule.order[0], Task("forward", 1, 0))).verify()
    for stray in (Task("forward", 2, 0), Task("forward", 0, 3), Task("forward", -1, 0)):
        with pytest.raises(PlanError, match="none of 2 stages × 3 micro-batches"):
            replaced(schedule, 0, (*schedule.order[0], stray)).verify()
    for meshes in ((0,), (0, 2), (0, 0)):
        with pytest.raises(PlanError, match="mesh"):
            dataclasses.replace(schedule, meshes=meshes).verify()


def test_a_backward_pass_is_whole_or_in_two_parts() -> None:
    whole, split = make_schedule("1f1b", 1, 1), make_schedule("zb-h1", 1, 1)
    backward, (forward, inputs, weights) = whole.order[0][1], split.order[0]
    for tasks in ((forward, backward, inputs, weights), (forward, backward, weights), (forward, inputs)):
        with pytest.raises(PlanError, match="either backward or input_grad and weight_grad"):
            replaced(whole, 0, tasks).verify()
    with pytest.raises(PlanError, match=r"waits for ever at W0\.0 on mesh 0"):
        replaced(split, 0, (forward, weights, inputs)).verify()


def test_stages_may_choose_for_themselves_whether_to_split() -> None:
    split, whole = make_schedule("zb-h1", 2, 3), make_schedule("1f1b", 2, 3)
    mixed = replaced(split, 1, whole.order[1]).verify()
    assert mixed.splits_backward
    assert counts(mixed) == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pipedream", 2, 2), f"unknown schedule 'pipedream'; choose one of {', '.join(SCHEDULES)}"),
        (("1f1b", 0, 2), "at least one stage, as an int; found 0"),
        (("1f1b", 2, -1), "at least one micro-batch, as an int; found -1"),
        (("1f1b", 2, 2.0), r"at least one micro-batch, as an int; found 2\.0"),
        (("interleaved-1f1b", 2, 2, 0), "at least one mesh, as an int; found 0"),
        (("interleaved-1f1b", 6, 2, 4), "4 meshes must divide 6 stages"),
        (("1f1b", 2, 2, 4), "4 meshes must divide 2 stages"),
        (("zb-h1", 4, 2, 2), "zb-h1 runs one stage per mesh, found 4 stages for 2 meshes; use one of gpipe"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make_schedule(*arguments)


def test_a_schedule_reads_as_one_line_per_mesh() -> None:
    assert str(make_schedule("zb-h1", 2, 3)) == (
        "zb-h1: 2 stages on 2 meshes, 3 micro-batches\n"
        "mesh 0: F0.0 F0.1 I0.0 W0.0 F0.2 I0.1 W0.1 I0.2 W0.2\n"
        "mesh 1: F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 W1.2"
    )
    assert str(make_schedule("interleaved-1f1b", 4, 2, 2)) == (
        "interleaved-1f1b: 4 stages on 2 meshes, 2 micro-batches\n"
        "mesh 0: F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1\n"
        "mesh 1: F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 B1.0 B1.1"
    )
    head, line = str(make_schedule("gpipe", 1, 500)).splitlines()
    assert head == "gpipe: 1 stage on 1 mesh, 500 micro-batches"
    assert "F0.31 … 936 more … B0.31" in line
