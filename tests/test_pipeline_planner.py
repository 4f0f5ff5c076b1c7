"""The automatic choice of stages: as good as everything that can be written by hand, and right where that is known."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import alpa_like as alpa
from alpa_like.passes.compose import GraphReader
from alpa_like.passes.layers import form_layers
from alpa_like.passes.mesh_plan import SolverOptions
from alpa_like.passes.microbatch import split_batch
from alpa_like.passes.stage_costs import LayerCosts, Tag
from alpa_like.passes.stage_search import Submesh, search
from alpa_like.pipeshard import StageOption
from alpa_like.plan import Pipeline
from alpa_like.tracer import trace

CHIP = alpa.Device("chip", (("float32", 1e12),), 2**34, 1e12, 1.0)
FAST, MIDDLE, SLOW = alpa.Link(1e13, 0.0), alpa.Link(2e10, 1e-6), alpa.Link(1e8, 1e-5)
ROWS, WIDTH = 256, 256

Step = Callable[[Any, Any], tuple[Any, Any]]


def cluster(hosts: int, devices: int, inside: alpa.Link = MIDDLE, between: alpa.Link = MIDDLE) -> alpa.Cluster:
    return alpa.Cluster("chips", hosts, devices, CHIP, inside, between, ("made up",))


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def momentum(state: Any, grads: Any) -> Any:
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, state["velocity"], grads)
    return {"params": jax.tree.map(lambda p, v: p - 0.1 * v, state["params"], velocity), "velocity": velocity}


def chain_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """Per layer a matmul up, tanh, a matmul down."""

    def loss(params: Any) -> Any:
        x = batch["x"]
        for up, down in params:
            x = x + jnp.tanh(x @ up) @ down
        return jnp.mean((x - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(state["params"])
    return momentum(state, grads), value


def scan_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """The same as one loop over stacked layers."""

    def loss(params: Any) -> Any:
        out, _ = lax.scan(lambda x, p: (x + jnp.tanh(x @ p[0]) @ p[1], None), batch["x"], params)
        return jnp.mean((out - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(state["params"])
    return momentum(state, grads), value


def layers(*hidden: int) -> Any:
    """The state of layers with these hidden widths."""
    params = [(array(WIDTH, n), array(n, WIDTH)) for n in hidden]
    return {"params": params, "velocity": params}


def stacked(count: int) -> Any:
    params = array(count, WIDTH, WIDTH), array(count, WIDTH, WIDTH)
    return {"params": params, "velocity": params}


def batch(rows: int = ROWS) -> Any:
    return {"x": array(rows, WIDTH), "y": array(rows, WIDTH)}


def made(
    method: alpa.PipeshardParallel, state: Any, on: alpa.Cluster, step: Step = chain_step, rows: int = ROWS
) -> alpa.Plan:
    return alpa.parallelize(step, method=method).plan(state, batch(rows), cluster=on)


def method(count: Any = 8, num_layers: Any = 4, **options: Any) -> alpa.PipeshardParallel:
    option = alpa.AutoLayerOption(num_layers, options.pop("remat", "none"))
    return alpa.PipeshardParallel(num_micro_batches=count, layer_option=option, **options)


def pipeline_of(plan: alpa.Plan) -> Pipeline:
    assert plan.pipeline is not None
    return plan.pipeline


# ------------------------------------------------------------------------------------------------ by hand


def by_hand(num_layers: int, devices: int) -> Iterator[alpa.ManualStageOption]:
    """Every way to cut the layers into stages on 1, 2, 4 … devices each."""
    sizes = [2**k for k in range(devices.bit_length()) if 2**k <= devices]
    for count in range(1, num_layers + 1):
        for cuts in itertools.combinations(range(1, num_layers), count - 1):
            ids = [range(a, b) for a, b in itertools.pairwise((0, *cuts, num_layers))]
            for taken in itertools.product(sizes, repeat=count):
                if sum(taken) == devices and lies_on_blocks(taken):
                    yield alpa.ManualStageOption(ids, [(1, n) for n in taken])


def lies_on_blocks(taken: Sequence[int]) -> bool:
    starts = itertools.accumulate(taken[:-1], initial=0)
    return all(start % size == 0 for start, size in zip(starts, taken, strict=True))


MODELS: dict[str, tuple[Any, int, alpa.Link]] = {  # the state, micro-batches, links
    "equal": (layers(256, 256, 256, 256), 2, MIDDLE),
    "the first is large": (layers(1024, 128, 128, 256), 8, MIDDLE),
    "the last is large": (layers(128, 128, 128, 2048), 8, MIDDLE),
    "fast links": (layers(256, 256, 256, 256), 8, FAST),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_choice_is_as_good_as_all_that_can_be_written_by_hand(name: str) -> None:
    """Within 2 %, as the search prices layers and neighbours, and not every stage as a whole."""
    state, count, link = MODELS[name]
    on = cluster(1, 4, link)
    found = made(method(count, schedule="1f1b"), state, on)
    others = [made(method(count, schedule="1f1b", stage_option=o), state, on) for o in by_hand(4, 4)]
    assert len(others) == 11
    times = [p.predicted.step_time_s for p in others]
    assert found.predicted.step_time_s <= 1.02 * min(times)
    assert max(times) > 1.5 * min(times)


# ------------------------------------------------------------------------------------------------ where it is known

EQUAL = layers(256, 256, 256, 256)


def test_a_slow_network_is_crossed_by_activations_only() -> None:
    """Two hosts with fast links inside: a stage per host, though a mesh over both would have no bubble."""
    large = layers(2048, 2048, 2048, 2048)
    on = cluster(2, 2, FAST, alpa.Link(1e9, 1e-6))
    found = made(method(8, schedule="1f1b"), large, on)
    assert {s.devices for s in found.stages} == {(0, 2), (2, 2)}
    whole = made(method(8, stage_option=alpa.UniformStageOption(1)), large, on)
    assert found.predicted.step_time_s < 0.8 * whole.predicted.step_time_s


def test_without_a_cost_of_communication_no_pipeline_is_faster() -> None:
    """Neither with a fixed number of micro-batches, as one stage, nor with a free one, as no pipeline at all."""
    on = cluster(1, 4, alpa.Link(1e15, 0.0))
    assert len(pipeline_of(made(method(8), EQUAL, on)).stages) == 1
    assert made(method("auto"), EQUAL, on).pipeline is None


def test_p3_16xlarge_with_two_hosts() -> None:
    """NVLink inside, 25 Gb/s between the hosts: no stage lies on both, and all devices are used."""
    found = made(method(8), layers(*[4096] * 4), alpa.Cluster.p3_16xlarge(2))
    hosts = [{n // 8 for n in range(first, first + count)} for first, count in {s.devices for s in found.stages}]
    assert len(hosts) > 1
    assert all(len(h) == 1 for h in hosts)
    assert sum(count for _, count in {s.devices for s in found.stages}) == 16


# ------------------------------------------------------------------------------------------------ memory


def with_budget(budget: float | None, remat: str = "auto") -> alpa.Plan:
    """One device per stage, so that nothing can be sharded; activations are most of the memory."""
    options = {"stage_option": alpa.AutoStageOption(4), "schedule": "1f1b", "memory_budget_bytes": budget}
    return made(method(8, remat=remat, **options), EQUAL, cluster(1, 4), rows=16 * ROWS)


@pytest.fixture(scope="module")
def without_limit() -> alpa.Plan:
    return with_budget(None)


def test_tight_memory_turns_rematerialization_on(without_limit: alpa.Plan) -> None:
    """The first stage holds most micro-batches; what is saved of each is what its matmul makes."""
    assert not any(s.remat for s in pipeline_of(without_limit).stages)
    tight = 0.9 * max(pipeline_of(without_limit).memory_bytes)
    found = with_budget(tight)
    assert pipeline_of(found).stages[0].remat
    assert not pipeline_of(found).stages[-1].remat
    assert max(pipeline_of(found).memory_bytes) == found.predicted.peak_memory_bytes <= tight
    assert found.predicted.step_time_s > without_limit.predicted.step_time_s


def test_rematerialization_that_is_forbidden_is_not_used(without_limit: alpa.Plan) -> None:
    with pytest.raises(alpa.InfeasibleError):
        with_budget(0.9 * max(pipeline_of(without_limit).memory_bytes), "none")


@pytest.mark.parametrize("share", [0.8, 0.5, 0.35])
def test_the_predicted_memory_stays_below_the_budget(share: float) -> None:
    """Down to little more than the state: then it is sharded over all devices."""
    state = layers(1024, 1024, 1024, 1024)
    bytes_of_state = sum(np.prod(x.shape) * 4 for x in jax.tree.leaves(state))
    budget = share * bytes_of_state * 1.5  # parameters, velocities and gradients
    found = made(method(4, remat="auto", memory_budget_bytes=budget), state, cluster(1, 4))
    assert found.predicted.peak_memory_bytes <= budget
    assert all(m <= budget for m in pipeline_of(found).memory_bytes)


@pytest.mark.parametrize(("rows", "hidden", "share"), [(1024, 256, 0.8), (1024, 1024, 0.7), (4096, 256, 0.98)])
def test_memory_is_saved_in_the_way_that_costs_least(rows: int, hidden: int, share: float) -> None:
    """No slower than the faster of the two stages by hand: with state and activations spread, or computed again."""
    state, on = layers(*[hidden] * 4), cluster(1, 4)
    whole = alpa.ManualStageOption([range(4)], [(1, 4)])

    def plan(option: StageOption, remat: str, budget: float | None) -> alpa.Plan:
        options = method(4, remat=remat, schedule="1f1b", stage_option=option, memory_budget_bytes=budget)
        return made(options, state, on, rows=rows)

    budget = share * plan(whole, "none", None).predicted.peak_memory_bytes
    found = plan(alpa.AutoStageOption(1), "auto", budget)
    by_hand = [plan(whole, remat, budget).predicted.step_time_s for remat in ("none", "layer")]
    assert found.predicted.peak_memory_bytes <= budget
    assert found.predicted.step_time_s <= 1.02 * min(by_hand)
    assert by_hand[0] < 0.9 * by_hand[1]


def test_small_memory_asks_for_more_micro_batches() -> None:
    """Neither the number that is tried first fits, nor its neighbours."""
    state, on, option = layers(*[64] * 4), cluster(1, 4), alpa.UniformStageOption(4)
    budget = made(method(256, stage_option=option), state, on, rows=4096).predicted.peak_memory_bytes
    tight = {"stage_option": option, "memory_budget_bytes": 1.2 * budget}
    with pytest.raises(alpa.InfeasibleError):
        made(method(32, **tight), state, on, rows=4096)
    assert pipeline_of(made(method("auto", **tight), state, on, rows=4096)).num_micro_batches >= 64


# ------------------------------------------------------------------------------------------------ micro-batches


@pytest.mark.parametrize("link", [MIDDLE, SLOW], ids=["middle", "slow"])
def test_the_number_of_micro_batches_is_as_good_as_each_power_of_two(link: alpa.Link) -> None:
    on, option = cluster(1, 4, link), alpa.UniformStageOption(4)
    found = made(method("auto", schedule="1f1b", stage_option=option), EQUAL, on)
    times = {
        n: made(method(n, schedule="1f1b", stage_option=option), EQUAL, on).predicted.step_time_s
        for n in (1, 2, 4, 8, 16, 32, 64)
    }
    assert found.predicted.step_time_s <= 1.02 * min(times.values())
    assert found.predicted.step_time_s == times[pipeline_of(found).num_micro_batches]


# ------------------------------------------------------------------------------------------------ effort


def solves(count: int) -> int:
    """How many sharding problems are solved for so many equal layers, all ranges and submeshes included."""
    on = cluster(1, 4)
    traced = trace(chain_step, (layers(*[256] * count), batch()))
    cut = form_layers(split_batch(traced, 8), count)
    costs = LayerCosts(traced, cut, on, 2.0**34, "none", SolverOptions(), GraphReader())
    search(count, on, 8, costs, costs.budget, in_flight=min)
    return costs.solves


def test_equal_layers_are_priced_once() -> None:
    """The first, one in the middle, the last; and each two of them that can be neighbours."""
    four = solves(4)
    assert solves(8) == four > 0


@cache
def automatic() -> alpa.Plan:
    return made(method("auto"), layers(512, 256, 256, 1024), cluster(2, 2, MIDDLE, SLOW))


def plain(plan: alpa.Plan) -> alpa.Plan:
    return replace(plan, solver=replace(plan.solver, seconds=0.0))


def test_the_same_plan_twice() -> None:
    again = made(method("auto"), layers(512, 256, 256, 1024), cluster(2, 2, MIDDLE, SLOW))
    assert plain(again) == plain(automatic())
    assert again.diff(automatic()) == ""


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    for name, plan in (("auto", automatic()), ("fixed", made(method(8, schedule="zb-h1"), EQUAL, cluster(1, 4)))):
        plan.save(tmp_path / name)
        loaded = alpa.Plan.load(tmp_path / name)
        assert loaded == plan
        assert str(loaded) == str(plan)


# ------------------------------------------------------------------------------------------------ loops over layers


@pytest.mark.parametrize("stages", [2, 4])
def test_a_loop_over_layers_is_cut_into_one_loop_per_stage(stages: int) -> None:
    option = alpa.AutoStageOption(stages)
    found = made(method(4, "auto", stage_option=option), stacked(8), cluster(1, 4), scan_step)
    pipeline = pipeline_of(found)
    assert pipeline.scan is not None
    length, parts = pipeline.scan
    assert (length, sum(parts), len(parts), len(pipeline.stages)) == (8, 8, stages, stages)
    assert [(s.first, s.last) for s in pipeline.stages] == [(n, n) for n in range(stages)]
    forward = [s for s in found.stages if s.name.startswith("forward")]
    kernels = [[p.shape for p in s.inputs if p.path.startswith("state")] for s in forward]
    assert kernels == [[(n, WIDTH, WIDTH)] * 2 for n in parts]


def test_a_loop_costs_what_its_layers_cost_one_by_one() -> None:
    """Of the same width; within 15 %, as a loop can't fuse across its turns."""
    options = {"stage_option": alpa.UniformStageOption(4), "schedule": "1f1b"}
    loop = made(method(4, 4, **options), stacked(4), cluster(1, 4), scan_step)
    chain = made(method(4, 4, **options), EQUAL, cluster(1, 4))
    assert loop.predicted.step_time_s == pytest.approx(chain.predicted.step_time_s, rel=0.15)


# ------------------------------------------------------------------------------------------------ memory and loops


@pytest.mark.parametrize(
    ("schedule", "waiting"),
    [("1f1b", (0, 0, 0, 0)), ("zb-h1", (0, 2, 3, 4)), ("zb-h2", (0, 3, 5, 7))],  # micro-batches whose weights wait
)
def test_memory_of_split_backward_passes_by_hand(schedule: str, waiting: tuple[int, ...]) -> None:
    """A stage holds its input and the tanh; from then on what the weights wait for: two gradients, of the same sizes.

    The first stage computes nothing for an earlier one. A 1f1b stage holds fewer the later it is.
    """
    weights, rows = 4 * 2 * WIDTH * 256, 4 * ROWS // 8
    plan = made(method(8, 4, schedule=schedule, stage_option=alpa.UniformStageOption(4)), EQUAL, cluster(1, 4))
    pipeline = pipeline_of(plan)
    one, state = rows * (WIDTH + 256), 3 * weights  # parameters, momentum, gradients
    for n, (stage, count) in enumerate(zip(pipeline.stages, waiting, strict=True)):
        held = stage.in_flight * stage.micro_bytes
        error = rows * WIDTH if n == 3 else 0  # of the outputs: one micro-batch at a time
        assert held == pytest.approx((stage.in_flight + count) * one + error, abs=0.05 * one)
        assert 0 <= pipeline.memory_bytes[n] - state - held < weights + 2.5 * one  # its own of one micro-batch


def test_a_loop_twice_as_long_takes_twice_the_time() -> None:
    """Slices of stacked parameters and residuals move what they take out, not the whole stack."""

    def seconds(length: int) -> float:
        step = alpa.parallelize(scan_step, method=alpa.ShardParallel())
        return step.plan(stacked(length), batch(), cluster=cluster(1, 1)).predicted.step_time_s

    few, more = seconds(8), seconds(64)
    assert more - few == pytest.approx(7 * few, rel=0.05)


def test_a_search_that_reckons_wrongly_learns_from_the_plans_it_leads_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers on a device of their own are made to look four times as fast as they are; stages of two are better."""
    right = made(method(8, 4, schedule="1f1b"), EQUAL, cluster(1, 4))
    assert {s.devices[1] for s in right.stages} == {2}
    honest = LayerCosts.range

    def flattering(costs: LayerCosts, first: int, last: int, submesh: Submesh, tag: Tag) -> Any:
        found = honest(costs, first, last, submesh, tag)
        share = 0.25 if submesh.num_devices == 1 else 1.0
        return replace(found, forward_s=share * found.forward_s, backward_s=share * found.backward_s)

    monkeypatch.setattr(LayerCosts, "range", flattering)
    monkeypatch.setattr(LayerCosts, "lower_bound_s", lambda *_: 0.0)
    misled = made(method(8, 4, schedule="1f1b"), EQUAL, cluster(1, 4))
    assert misled.predicted.step_time_s == pytest.approx(right.predicted.step_time_s)
    monkeypatch.setattr(LayerCosts, "learn", lambda *_: False)
    assert {s.devices[1] for s in made(method(8, 4, schedule="1f1b"), EQUAL, cluster(1, 4)).stages} == {1}
