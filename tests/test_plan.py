"""A plan as people see it: printed, compared, saved, edited, loaded; made for machines that are not here."""

import json
import math
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import alpa_like as alpa
from alpa_like import models
from alpa_like.passes import planner
from alpa_like.plan import Candidate, PartialSum, Pin, Placed, Plan, Predicted, SolverReport, StagePlan

CHIP = alpa.Device("chip", (("float32", 1e9),), 2**30, 1e9, 1.0)
CLUSTER = alpa.Cluster("eight", 1, 8, CHIP, alpa.Link(1e9, 0.0), alpa.Link(1e9, 0.0), ("made up",))
TASKS = models.small_tasks()
MLP, GPT = TASKS["mlp"], TASKS["gpt"]

STAGE = StagePlan(
    name="0",
    mesh_shape=(2, 4),
    axis_names=("data", "model"),
    devices=(0, 8),
    inputs=(
        Placed("state.params['h0']['up']", (1024, 4096), "float32", ((), (1,))),
        Placed("state.params['h1']['up']", (1024, 4096), "float32", ((), (1,))),
        Placed("state.params['bias']", (4096,), "bfloat16", ((0, 1),)),
        Placed("batch['x']", (16, 1024), "float32", ((0,), ())),
    ),
    outputs=(Placed("result[1]", (), "float32", ()),),
    pins=(Pin(17, 0, False, (((0,), ()), ((), ()))), Pin(17, 0, True, (((0,), (1,)),))),
)
TRAFFIC = {"all-gather": 3 * 2**20, "all-reduce": 512.0}
TRIED = (Candidate("8", 3e-3, 6e8), Candidate("2x4", 2.5e-3, 5e8))
PLAN = Plan(
    function="train_step",
    program="0123456789abcdef",
    method="ShardParallel",
    cluster=CLUSTER,
    stages=(STAGE,),
    predicted=Predicted(2.5e-3, 2e-3, 0.5e-3, TRAFFIC, 1.5 * 2**30),
    solver=SolverReport("optimal", 0.0, 1.25, 321, "HiGHS", TRIED),
    warnings=("something to know",),
)
TEXT = """\
Plan of train_step by ShardParallel for eight: 1 host × 8 chip (1 GiB, 1 GFLOP/s float32), 1 GB/s per device in a host
step 2.5 ms = compute 2 ms + communication 500 us, peak memory 1.5 GiB per device
traffic per device 3.0 MiB (all-gather 3.0 MiB, all-reduce 512 B)
solver HiGHS optimal, gap 0, 321 variables, 1.25 s
meshes 8 3 ms, 2x4 2.5 ms
warning: something to know
stage 0 on 8 devices, mesh (data=2, model=4), 2 layouts pinned inside
  tensor                    count  shape               sharding     per device
  state.params['h*']['up']  2      float32[1024,4096]  [-, model]   4.0 MiB
  state.params['bias']      1      bfloat16[4096]      [datamodel]  1.0 KiB
  batch['x']                1      float32[16,1024]    [data, -]    32.0 KiB
  result[1]                 1      float32[]           []           4 B"""


@pytest.fixture(scope="module", autouse=True)
def session():
    alpa.init(CLUSTER)
    yield
    alpa.shutdown()


@pytest.fixture(scope="module")
def parallel():
    return alpa.parallelize(MLP.step, method=alpa.ShardParallel(mesh_shape=(2, 4)))


@pytest.fixture(scope="module")
def plan(parallel):
    return parallel.plan(jax.eval_shape(MLP.init), MLP.abstract_batch())


@pytest.fixture
def no_solver(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the solver was called")

    monkeypatch.setattr(planner, "solve", refuse)


def assert_same(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)


# ------------------------------------------------------------------------------------------------ text


def test_the_text_of_a_plan():
    assert str(PLAN.verify()) == TEXT


def test_the_table_of_a_notebook_says_the_same():
    page = replace(PLAN, function="<step>")._repr_html_()
    assert "Plan of &lt;step&gt; by" in page
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    lines = [re.split(r"  +", line.strip()) for line in TEXT.splitlines()[7:]]
    assert [[cell.replace("&#x27;", "'") for cell in row] for row in rows] == lines


def test_shardings_by_path():
    assert PLAN.shardings == {
        "state.params['h0']['up']": P(None, "model"),
        "state.params['h1']['up']": P(None, "model"),
        "state.params['bias']": P(("data", "model")),
        "batch['x']": P("data"),
        "result[1]": P(),
    }
    assert PLAN.mesh_shape == (2, 4)
    assert PLAN.predicted.total_traffic_bytes == 3 * 2**20 + 512


def with_spec(plan, spec, *paths):
    """The plan with another spec for some arguments and results."""
    stage = plan.stages[0]
    inputs, outputs = (
        tuple(replace(p, spec=spec) if p.path in paths else p for p in side) for side in (stage.inputs, stage.outputs)
    )
    return replace(plan, stages=(replace(stage, inputs=inputs, outputs=outputs),))


def test_the_difference_of_two_plans():
    assert PLAN.diff(PLAN) == ""
    assert PLAN.diff(replace(PLAN, solver=replace(PLAN.solver, seconds=9.0))) == ""
    assert PLAN.diff(with_spec(PLAN, ((), (1,)), "batch['x']")) == "batch['x']: P('data',) -> P(None, 'model')"
    other = replace(PLAN, method="DataParallel", predicted=replace(PLAN.predicted, step_time_s=3e-3))
    assert PLAN.diff(other) == "method: ShardParallel -> DataParallel\nstep time: 2.5 ms -> 3 ms"
    held = replace(STAGE, sums=(PartialSum(18, (0,), ((), ()), ((17, (2,)),)),))
    assert PLAN.diff(replace(PLAN, stages=(held,))) != ""
    fewer = replace(PLAN, stages=(replace(STAGE, pins=STAGE.pins[:1]),))
    assert PLAN.diff(fewer) == "layouts inside the step: 1 pins differ"
    renamed = replace(PLAN, program="fedcba9876543210", cluster=replace(CLUSTER, name="ate"))
    assert [line.split(":")[0] for line in PLAN.diff(renamed).splitlines()] == ["program", "cluster"]


# ------------------------------------------------------------------------------------------------ files


def test_a_file_gives_the_same_plan_back(plan, tmp_path):
    sums = replace(PLAN, stages=(replace(STAGE, sums=(PartialSum(18, (0,), ((), ()), ((17, (2,)),)),)),))
    for number, each in enumerate((PLAN, plan, sums, replace(PLAN, cluster=alpa.Cluster.p3_16xlarge(hosts=2)))):
        path = tmp_path / f"{number}.json"
        each.save(path)
        loaded = Plan.load(str(path))
        assert loaded == each
        assert hash(loaded.stages) == hash(each.stages)  # tuples again, not lists
        assert str(loaded) == str(each)
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"{n}.json" for n in range(4)]


def test_a_file_is_json_that_others_can_read(tmp_path):
    """`Infinity`, the time of a mesh on which nothing fits, is no JSON."""
    tried = replace(
        PLAN,
        solver=replace(PLAN.solver, considered=(Candidate("8", math.inf, math.inf), Candidate("2x4", 2.5e-3, 1e9))),
    )
    tried.save(tmp_path / "plan.json")

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    json.loads((tmp_path / "plan.json").read_text(), parse_constant=refuse)
    assert Plan.load(tmp_path / "plan.json") == tried


def test_saving_replaces_the_file_as_any_program_does(tmp_path):
    path, plain = tmp_path / "plan.json", tmp_path / "plain"
    plain.write_text("")
    PLAN.save(path)
    replace(PLAN, method="DataParallel").save(path)
    assert Plan.load(path).method == "DataParallel"
    assert path.stat().st_mode == plain.stat().st_mode  # others may read it as they may read any file of mine


def test_a_loaded_plan_compiles_to_the_same_program(plan, tmp_path, no_solver):
    plan.save(tmp_path / "plan.json")
    arguments, plans = (jax.eval_shape(MLP.init), MLP.abstract_batch()), (plan, Plan.load(tmp_path / "plan.json"))
    # one line for both, since its number is written into the program
    first, again = (alpa.parallelize(MLP.step).compile(*arguments, plan=p) for p in plans)
    assert first.hlo_text() == again.hlo_text()
    assert first.input_shardings == again.input_shardings
    assert again.plan == plan
    assert_same(again(MLP.init(), MLP.batch(0)), jax.jit(MLP.step)(MLP.init(), MLP.batch(0)))


# ------------------------------------------------------------------------------------------------ rules


def broken(**changes):
    return replace(PLAN, stages=(replace(STAGE, **changes),))


def predicted(**changes):
    return replace(PLAN, predicted=replace(PLAN.predicted, **changes))


def placed(spec, shape=(16, 1024)):
    return (Placed("batch['x']", shape, "float32", spec),)


BROKEN = {
    "no stage": (lambda: replace(PLAN, stages=()), "needs at least one stage"),
    "time": (lambda: predicted(step_time_s=-5.0), "step_time_s must be at least 0 and finite, found -5"),
    "memory": (lambda: predicted(peak_memory_bytes=-1.0), "peak_memory_bytes must be at least 0"),
    "names": (lambda: broken(axis_names=("data",)), "needs one name per axis"),
    "equal names": (lambda: broken(axis_names=("data", "data")), "needs one name per axis"),
    "devices": (lambda: broken(devices=(0, 4)), "does not have 4 devices"),
    "negative sizes": (lambda: broken(mesh_shape=(-2, -4)), "does not have 8 devices"),
    "two stages": (lambda: replace(PLAN, stages=(STAGE, STAGE)), "without a pipeline has one stage, found 2"),
    "beyond the cluster": (lambda: broken(devices=(4, 8)), r"devices 4 to 11, but eight has 8"),
    "rank": (lambda: broken(inputs=placed(((0,),))), "has a spec of 1 dims, expected 2"),
    "unknown axis": (lambda: broken(inputs=placed(((2,), ()))), r"batch\['x'\].* must use each of the axes 0 to 1"),
    "axis twice": (lambda: broken(outputs=placed(((0,), (0,)))), r"batch\['x'\].* at most once"),
    "does not divide": (lambda: broken(inputs=placed(((), (1,)), (16, 1026))), "which 4 devices do not divide"),
    "pin": (lambda: broken(pins=(Pin(3, 1, False, (((0,), (0,)),)),)), "op 3, operand 1 must use"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_plan_that_breaks_a_rule_is_refused(kind, tmp_path):
    make, message = BROKEN[kind]
    with pytest.raises(alpa.PlanError, match=message):
        make().verify()
    make().save(tmp_path / "plan.json")
    with pytest.raises(alpa.PlanError, match=message):
        Plan.load(tmp_path / "plan.json")


def edited_file(plan, path, keys, value):
    plan.save(path)
    data = json.loads(path.read_text())
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(data))
    return path


MISTYPED = {
    "predicted.peak_memory_bytes": (("predicted", "peak_memory_bytes"), "big", "must be a number, found 'big'"),
    "nan": (("predicted", "step_time_s"), math.nan, "predicted.step_time_s must be a number, found nan"),
    "predicted.traffic_bytes": (("predicted", "traffic_bytes"), [1], r"must be a mapping, found \[1\]"),
    r"predicted.traffic_bytes\['x'\]": (("predicted", "traffic_bytes"), {"x": None}, "must be a number"),
    "solver.variables": (("solver", "variables"), 1.5, "must be a whole number, found 1.5"),
    r"stages\[0\].mesh_shape\[1\]": (("stages", 0, "mesh_shape"), [2, 4.0], "must be a whole number, found 4.0"),
    r"stages\[0\].axis_names\[0\]": (("stages", 0, "axis_names"), [1, 2], "must be a text, found 1"),
    r"stages\[0\].pins\[0\].op": (("stages", 0, "pins", 0, 0), "a", "must be a whole number, found 'a'"),
    "warnings": (("warnings",), [3], r"\[0\] must be a text, found 3"),
}  # fmt: skip


@pytest.mark.parametrize("field", MISTYPED)
def test_a_value_of_another_type_is_named_with_its_place(field, tmp_path):
    keys, value, message = MISTYPED[field]
    with pytest.raises(alpa.PlanError, match=message) as error:
        Plan.load(edited_file(PLAN, tmp_path / "plan.json", keys, value))
    assert field == "nan" or re.search(f"plan.json, {field}", str(error.value))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("inputs",), [], "the step has .* arguments, but the plan places 0"),
        (("outputs",), [], "the step has .* results, but the plan places 0"),
        (("inputs", 0, "dtype"), "bfloat16", r"the argument state.step int32.* is state.step bfloat16"),
    ],
    ids=["inputs", "outputs", "dtype"],
)
def test_a_plan_with_tensors_that_the_step_has_not_is_refused(plan, keys, value, message, tmp_path):
    edited = Plan.load(edited_file(plan, tmp_path / "plan.json", ("stages", 0, *keys), value))
    with pytest.raises(alpa.PlanError, match=message):
        alpa.parallelize(MLP.step).compile(jax.eval_shape(MLP.init), MLP.abstract_batch(), plan=edited)


def test_an_edited_plan_is_obeyed(plan, no_solver):
    """Parameters of the first layer whole, the batch split over both axes."""
    kernel = ".params['dense0']['kernel']"
    edited = with_spec(plan, ((), ()), f"state{kernel}", f"result[0]{kernel}")
    edited = with_spec(edited, ((0, 1), ()), "batch['inputs']")
    executable = alpa.parallelize(MLP.step).compile(jax.eval_shape(MLP.init), MLP.abstract_batch(), plan=edited)
    state_shardings, batch_shardings = executable.input_shardings
    assert state_shardings.params["dense0"]["kernel"].spec == P()
    assert batch_shardings["inputs"].spec == P(("x", "y"))
    state, expected = MLP.init(), MLP.init()
    for seed in range(2):
        state, _ = executable(state, MLP.batch(seed))
        expected, _ = jax.jit(MLP.step)(expected, MLP.batch(seed))
    assert_same(state, expected)


@pytest.mark.parametrize("change", [{"op": 10_000}, {"port": 9}, {"path": (((0,),),)}], ids=["op", "port", "rank"])
def test_an_edited_pin_that_fits_nothing_is_named(plan, change):
    stage = plan.stages[0]
    pins = (replace(stage.pins[0], **change), *stage.pins[1:])
    edited = replace(plan, stages=(replace(stage, pins=pins),))
    with pytest.raises(alpa.PlanError, match=f"op {pins[0].op}"):
        alpa.parallelize(MLP.step).compile(jax.eval_shape(MLP.init), MLP.abstract_batch(), plan=edited)


@pytest.mark.parametrize("order", ["vd", "dv"])
def test_a_result_that_is_moved_is_computed_where_the_plan_says(order):
    """Split by its long dim, then moved to the other: the partitioner would gather the long operand for the latter."""
    x, y = (jax.ShapeDtypeStruct((32, 16, width), np.float32) for width in (2048, 256))
    specs = (P("x"), P("x")), P(*("x" if dim == "d" else None for dim in order))
    method = alpa.ManualParallel(specs[0], out_specs=specs[1], mesh_shape=(8,))
    step = alpa.parallelize(lambda x, y: jnp.einsum(f"bsv,bsd->{order}", x + 1, y * 2), method=method)
    executable = step.compile(x, y, cluster=CLUSTER)
    part = 32 * 16 * 4 * 7 / 8
    expected = {"all-gather": part * 256, "all-to-all": (part * 2048 + 2048 * 256 * 4 * 7 / 8) / 8}
    assert executable.plan.predicted.traffic_bytes == pytest.approx(expected)
    assert executable.traffic() == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ the same everywhere


def plain(plan):
    return replace(plan, solver=replace(plan.solver, seconds=0.0))


def test_equal_questions_get_equal_plans(parallel, plan):
    again = alpa.parallelize(MLP.step, method=parallel.method)
    assert plain(again.plan(MLP.init(), MLP.batch(5))) == plain(plan)
    assert parallel.plan(jax.eval_shape(MLP.init), MLP.abstract_batch()) is plan  # remembered


def test_every_process_makes_the_same_plan(tmp_path):
    program = f"""
        import sys, jax, alpa_like as alpa
        from alpa_like import models
        task = models.small_tasks()["gpt"]
        parallel = alpa.parallelize(task.step, method=alpa.ShardParallel(mesh_shape=(2, 4)))
        cluster = alpa.Cluster.from_json({CLUSTER.to_json()!r})
        parallel.plan(jax.eval_shape(task.init), task.abstract_batch(), cluster=cluster).save(sys.argv[1])
    """
    for seed in ("1", "271828"):
        command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / seed)]
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, timeout=100)
    first, second = (Plan.load(tmp_path / seed) for seed in ("1", "271828"))
    assert first.diff(second) == ""
    assert plain(first) == plain(second)
    assert first.stages[0].pins  # there was something to decide


# ------------------------------------------------------------------------------------------------ other machines


def test_a_plan_for_more_devices_than_are_here(parallel):
    cluster = alpa.Cluster.dgx_h100(hosts=4)
    larger = alpa.parallelize(MLP.step).plan(jax.eval_shape(MLP.init), MLP.abstract_batch(), cluster=cluster)
    assert len(jax.devices()) == 8
    assert larger.cluster == cluster
    assert np.prod(larger.mesh_shape) == 32 == larger.stages[0].devices[1]
    with pytest.raises(alpa.PlanError, match="the plan is for 32 devices, but 8 are here"):
        parallel.compile(MLP.init(), MLP.batch(0), plan=larger)


def test_a_plan_for_another_machine_of_as_many_devices_runs_here():
    there = alpa.Cluster.p3_16xlarge()
    parallel = alpa.parallelize(MLP.step)
    executable = parallel.compile(MLP.init(), MLP.batch(0), cluster=there)
    assert executable.plan.cluster == there
    assert_same(parallel(MLP.init(), MLP.batch(0)), jax.jit(MLP.step)(MLP.init(), MLP.batch(0)))
    assert parallel.last_executable is executable


def test_the_plan_tells_what_the_compiled_program_does():
    """On large matrices, so that what XLA adds for itself does not count; the first product is reduced."""

    def step(w, x):
        return w - 0.1 * jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w), x.mean()

    shapes = jax.ShapeDtypeStruct((256, 512), np.float32), jax.ShapeDtypeStruct((1024, 256), np.float32)
    for method in (alpa.DataParallel(), alpa.Zero3Parallel(), alpa.ShardParallel(mesh_shape=(2, 4))):
        executable = alpa.parallelize(step, method=method).compile(*shapes)
        predicted, measured = executable.plan.predicted, executable.traffic(reduce_scatter=True)
        assert sum(measured.values()) == pytest.approx(predicted.total_traffic_bytes, rel=0.02, abs=64)
        assert predicted.step_time_s == pytest.approx(predicted.compute_time_s + predicted.communication_time_s)


@pytest.mark.parametrize("mesh", [(8,), (2, 4)])
def test_seconds_of_collectives_are_the_predicted_communication(mesh):
    task = models.small_tasks()["moe"]
    step = alpa.parallelize(task.step, method=alpa.ShardParallel(mesh_shape=mesh))
    plan = step.plan(jax.eval_shape(task.init), task.abstract_batch(), cluster=alpa.Cluster.dgx_a100())
    (stage,) = plan.stages
    total = sum(seconds for _, seconds in stage.collective_s)
    assert total == pytest.approx(plan.predicted.communication_time_s, rel=1e-6)
    assert {k for k, _ in stage.collective_s} - {"slice"} == {k for k, n in plan.predicted.traffic_bytes.items() if n}


def test_activations_are_those_of_the_forward_pass_in_its_layouts():
    """Data parallel: every activation is split in the batch; a model of two matmuls has these three that are large."""

    def step(w, x):
        def loss(w):
            hidden = jnp.tanh(jnp.einsum("bi,ij->bj", x, w["up"]))
            return jnp.mean(jnp.einsum("bj,jk->bk", hidden, w["down"]) ** 2)

        return jax.tree.map(lambda p, g: p - g, w, jax.grad(loss)(w))

    w = {"up": jnp.zeros((16, 128)), "down": jnp.zeros((128, 64), jnp.float32)}
    method = alpa.DataParallel(mesh_shape=(8,))
    plan = alpa.parallelize(step, method=method).plan(w, jnp.zeros((32, 16)), cluster=alpa.Cluster.dgx_a100())
    found = plan.stages[0].activations
    assert [(p.shape, p.dtype, p.spec) for p in found] == [
        ((32, 128), "float32", ((0,), ())),
        ((32, 64), "float32", ((0,), ())),
    ]
    assert plan.solver.budget_bytes == plan.cluster.device.memory_bytes
    assert [c.peak_memory_bytes for c in plan.solver.considered] == [plan.predicted.peak_memory_bytes]


def test_seconds_of_collectives_of_a_pipeline_are_those_of_its_busiest_mesh():
    method = alpa.PipeshardParallel(num_micro_batches=4, stage_option=alpa.UniformStageOption(2), schedule="1f1b")
    plan = alpa.parallelize(GPT.step, method=method).plan(
        jax.eval_shape(GPT.init), GPT.abstract_batch(), cluster=alpa.Cluster.dgx_a100()
    )
    total = {s.devices: 0.0 for s in plan.stages}
    for stage in plan.stages:
        runs = 4 if stage.name.startswith(("forward", "backward")) else 1
        total[stage.devices] += runs * sum(seconds for _, seconds in stage.collective_s)
    assert len(total) == 2
    assert min(abs(t - plan.predicted.communication_time_s) for t in total.values()) < 1e-12
