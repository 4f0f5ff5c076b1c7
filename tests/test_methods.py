"""What each parallel method promises: in the plan, in the compiled program, and where the arrays lie."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import alpa_like as alpa
from alpa_like import models
from alpa_like.errors import MethodError
from alpa_like.passes import planner
from alpa_like.tracer import trace

CHIP = alpa.Device("chip", (("float32", 1e9),), 2**30, 1e9, 1.0)
CLUSTER = alpa.Cluster("eight", 1, 8, CHIP, alpa.Link(1e9, 0.0), alpa.Link(1e9, 0.0), ("made up",))
# Compute is cheap and wires are slow, so without a limit the planner keeps whole what it can.
GREEDY = alpa.Cluster(
    "greedy", 1, 8, alpa.Device("chip", (("float32", 1e15),), 2**30, 1e13, 1.0), *[alpa.Link(1e8, 1e-6)] * 2, ()
)
MLP = models.mlp_task(models.MLPConfig((32, 64, 8)), 16, optax.adam(1e-3))
GPT = models.small_tasks()["gpt"]


@pytest.fixture(scope="module", autouse=True)
def session():
    alpa.init(CLUSTER)
    yield
    alpa.shutdown()


@pytest.mark.parametrize("specs", [(P("x"),), P("x"), [P("x")]])
@pytest.mark.parametrize("nested", [False, True])
def test_specs_of_a_single_argument(specs, nested):
    """Also where it is a tuple of one, as the states of optimizers can be."""
    method = alpa.ManualParallel(specs, mesh_shape=(8,))
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32)
    step = alpa.parallelize((lambda x: x[0] * 2) if nested else (lambda x: x * 2), method=method)
    plan = step.plan((x,) if nested else x, cluster=CLUSTER)
    assert list(plan.shardings.values()) == [P("x"), P("x")]  # of the argument and of the result


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((P(),), "in_specs has 1 entry for 2 arguments; give one for each"),
        ((P(), P(), P()), "in_specs has 3 entries for 2 arguments"),
        ("x", r"found the text 'x'; write P\('x'\)"),
        (({"a": P()}, None), "in_specs must be a tree of PartitionSpecs and None"),
        ((P("x", None, None), None), "has 3 entries, but the tensor has shape .16, 4.; give at most one per dim"),
        ((P(None, "x"), None), "does not divide it; arguments and results are split evenly or not at all"),
    ],
)
def test_specs_that_do_not_fit_are_named(specs, message):
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32)
    step = alpa.parallelize(lambda w, x: (w, x), method=alpa.ManualParallel(specs, mesh_shape=(8,)))
    with pytest.raises(MethodError, match=message):
        step.plan(x, x, cluster=CLUSTER)


def test_specs_of_too_few_results_are_named():
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32)
    step = alpa.parallelize(lambda x: (x, 2 * x), method=alpa.ManualParallel(out_specs=(P(),), mesh_shape=(8,)))
    with pytest.raises(MethodError, match="out_specs has 1 entry for 2 results; give one for each"):
        step.plan(x, cluster=CLUSTER)


@pytest.mark.parametrize(("function", "arguments"), [(lambda s: s, ({},)), (lambda s: s, ((),)), (lambda: (), ())])
def test_functions_without_arrays_return_what_they_return(function, arguments):
    step = alpa.parallelize(function)
    assert step(*arguments) == jax.jit(function)(*arguments)


def plan_of(task, method, cluster=None):
    return alpa.parallelize(task.step, method=method).plan(
        jax.eval_shape(task.init), task.abstract_batch(), cluster=cluster
    )


def parts(plan, of):
    """Into how many parts each argument with `of` in its path is cut."""
    stage = plan.stages[0]
    return {
        p.path: math.prod(stage.mesh_shape[a] for axes in p.spec for a in axes) for p in stage.inputs if of in p.path
    }


def divisible(plan, of, by=8):
    """The arguments with a dim, or a product of dims, that so many devices can share evenly."""
    found = {p.path for p in plan.stages[0].inputs if of in p.path and any(n % by == 0 for n in p.shape)}
    assert found
    return found


# ------------------------------------------------------------------------------------------------ batch parallel


@pytest.mark.parametrize("mesh_shape", ["auto", (2, 4)])
@pytest.mark.parametrize("task", [MLP, GPT], ids=["mlp", "gpt"])
def test_data_parallel_keeps_the_state_whole_and_splits_the_batch(task, mesh_shape):
    plan = plan_of(task, alpa.DataParallel(mesh_shape=mesh_shape))
    assert set(parts(plan, "state").values()) == {1}
    assert set(parts(plan, "batch").values()) == {8}
    axes = ("x",) if mesh_shape == "auto" else (("x", "y"),)
    assert plan.shardings["batch['" + ("inputs" if task is MLP else "tokens") + "']"] == P(*axes)
    assert plan.mesh_shape == ((8,) if mesh_shape == "auto" else mesh_shape)


@pytest.mark.parametrize("task", [MLP, GPT], ids=["mlp", "gpt"])
def test_zero2_splits_the_optimizer_state_only(task):
    plan = plan_of(task, alpa.Zero2Parallel())
    assert set(parts(plan, "state.params").values()) == {1}
    assert set(parts(plan, "batch").values()) == {8}
    state = parts(plan, "state.opt_state")
    assert {path: state[path] for path in divisible(plan, "state.opt_state")} == dict.fromkeys(
        divisible(plan, "state.opt_state"), 8
    )


@pytest.mark.parametrize("task", [MLP, GPT], ids=["mlp", "gpt"])
def test_zero3_splits_the_parameters_too(task):
    plan = plan_of(task, alpa.Zero3Parallel())
    assert set(parts(plan, "batch").values()) == {8}
    for of in ("state.params", "state.opt_state"):
        assert {parts(plan, of)[path] for path in divisible(plan, of)} == {8}


def test_what_does_not_divide_is_split_as_far_as_it_does():
    """[12] over 8 devices: by the axis of 4 of a 2 × 4 mesh; [7] not at all."""

    def step(state, batch):
        return jax.tree.map(lambda w: w - batch.mean(), state), batch.sum()

    state = {"twelve": jnp.ones(12), "seven": jnp.ones(7), "count": jnp.int32(0), "matrix": jnp.ones((3, 16))}
    method = alpa.Zero3Parallel(mesh_shape=(2, 4))
    found = parts(alpa.parallelize(step, method=method).plan(state, jnp.ones((16, 2))), "state")
    assert found == {"state['twelve']": 4, "state['seven']": 1, "state['count']": 1, "state['matrix']": 8}


@pytest.mark.parametrize("method", [alpa.DataParallel, alpa.Zero2Parallel, alpa.Zero3Parallel])
@pytest.mark.parametrize("mesh_shape", [(8, 1), (1, 8)])
def test_an_axis_of_one_device_splits_nothing(method, mesh_shape):
    plan = plan_of(MLP, method(mesh_shape=mesh_shape))
    assert set(parts(plan, "batch").values()) == {8}
    assert max(parts(plan, "state.params").values()) == (8 if method is alpa.Zero3Parallel else 1)


def test_traffic_of_the_batch_parallel_methods_by_hand():
    """One layer of [256, 256] float32: S (n-1)/n to scatter gradients, as much to gather parameters."""

    def step(state, batch):
        grad = jax.grad(lambda w: jnp.mean(jnp.tanh(batch @ w) ** 2))(state["w"])
        moment = 0.9 * state["m"] + grad
        return {"w": state["w"] - 0.1 * moment, "m": moment}, batch.mean()

    state = {name: jax.ShapeDtypeStruct((256, 256), np.float32) for name in "wm"}
    arguments = state, jax.ShapeDtypeStruct((4096, 256), np.float32)
    half = 256 * 256 * 4 * 7 / 8
    kinds = {
        alpa.DataParallel(): {"all-reduce": 2 * half},
        alpa.Zero2Parallel(): {"reduce-scatter": half, "all-gather": half},
        alpa.Zero3Parallel(): {"reduce-scatter": half, "all-gather": half},
    }
    for method, expected in kinds.items():
        executable = alpa.parallelize(step, method=method).compile(*arguments, cluster=GREEDY)
        predicted, measured = executable.plan.predicted.traffic_bytes, executable.traffic(reduce_scatter=True)
        for found in (predicted, measured):  # besides a few scalars
            assert {kind: n for kind, n in found.items() if n > 256} == pytest.approx(expected, abs=256), method.name


def test_a_parameter_that_only_some_of_the_forward_pass_reads_is_a_parameter():
    """Both are read by something that computes on the batch, one of them after ops of its own."""

    def step(state, batch):
        def loss(p):
            return jnp.mean((batch @ jnp.tanh(p["w"]).T + p["b"]) ** 2)

        grads = jax.grad(loss)(state["params"])
        moment = jax.tree.map(lambda m, g: 0.9 * m + g, state["moment"], grads)
        params = jax.tree.map(lambda p, m: p - 0.1 * m, state["params"], moment)
        return {"params": params, "moment": moment}, batch.sum()

    leaves = {"w": jnp.ones((16, 8)), "b": jnp.ones(16)}
    plan = alpa.parallelize(step, method=alpa.Zero2Parallel()).plan(
        {"params": leaves, "moment": leaves}, jnp.ones((16, 8))
    )
    assert set(parts(plan, "params").values()) == {1}
    assert set(parts(plan, "moment").values()) == {8}


# ------------------------------------------------------------------------------------------------ manual

KERNELS = [f"state.params['dense{i}']['kernel']" for i in range(2)]


def manual(**options):
    return alpa.ManualParallel(mesh_shape=(2, 4), **options)


def test_given_specs_are_honoured_and_the_rest_is_solved():
    specs = jax.tree.map(lambda _: None, jax.eval_shape(MLP.init))
    specs.params["dense0"]["kernel"] = P(None, "y")
    method = manual(in_specs=(specs, {"inputs": P("x"), "labels": None}), out_specs=(None, P()))
    plan = plan_of(MLP, method)
    assert plan.shardings[KERNELS[0]] == P(None, "y") == plan.shardings["result[0].params['dense0']['kernel']"]
    assert plan.shardings["batch['inputs']"] == P("x")
    assert any(spec != P() for path, spec in plan.shardings.items() if path not in (KERNELS[0], "batch['inputs']"))
    assert plan.predicted.step_time_s >= plan_of(MLP, alpa.ShardParallel(mesh_shape=(2, 4))).predicted.step_time_s


def test_a_spec_stands_for_all_leaves_below_it():
    method = manual(in_specs=(P(), P(("x", "y"))), axis_names=("x", "y"))
    plan = plan_of(MLP, method)
    assert set(parts(plan, "state").values()) == {1}
    assert set(parts(plan, "batch").values()) == {8}


def test_names_of_axes_are_those_that_were_given():
    method = manual(in_specs=(None, P("data")), axis_names=("data", "model"))
    plan = plan_of(MLP, method)
    assert plan.stages[0].axis_names == ("data", "model")
    assert plan.shardings["batch['inputs']"] == P("data")
    executable = alpa.parallelize(MLP.step).compile(jax.eval_shape(MLP.init), MLP.abstract_batch(), plan=plan)
    assert executable.mesh.axis_names == ("data", "model")
    assert executable.input_shardings[1]["inputs"].spec == P("data")


@pytest.mark.parametrize(
    ("spec", "layout"),
    [(P("x"), ((0,), ())), (P(None, "y"), ((), (1,))), (P(("x", "y")), ((0, 1), ())), (P(), ((), ()))],
)
def test_a_constraint_pins_what_matching_ops_make(spec, layout):
    """The forward product of the first layer, found by its name."""
    arguments = jax.eval_shape(MLP.init), MLP.abstract_batch()
    ops = trace(MLP.step, arguments).graph.ops
    (product,) = [op.id for op in ops if op.source == "jvp(MLP)/dense0/dot_general" and "dot_general" in op.name]
    parallel = alpa.parallelize(MLP.step, method=manual(constraints={"jvp(MLP)/dense0/dot_*": spec}))
    (pin,) = [pin for pin in parallel.plan(*arguments).stages[0].pins if pin.op == product and pin.result]
    assert pin.path[-1] == layout
    state, loss = parallel(MLP.init(), MLP.batch(0))
    expected, value = jax.jit(MLP.step)(MLP.init(), MLP.batch(0))
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state, expected)


# ------------------------------------------------------------------------------------------------ choice of the mesh


def shapes_of(devices):
    """All ordered factorizations into at most three factors above 1, or the one number itself."""
    sizes = range(2, devices + 1)
    found = {(devices,)}
    found |= {(a, b) for a in sizes for b in sizes if a * b == devices}
    return found | {(a, b, c) for a in sizes for b in sizes for c in sizes if a * b * c == devices}


@pytest.mark.parametrize("devices", [8, 12, 7])
def test_auto_finds_the_best_of_all_meshes(devices):
    """On hosts of 4 with a slow network between them, where the order of axes matters."""
    hosts = (devices // 4, 4) if devices % 4 == 0 else (1, devices)
    cluster = alpa.Cluster("hosts", *hosts, CHIP, alpa.Link(1e9, 0.0), alpa.Link(2e7, 1e-5), ())
    task = models.mlp_task(models.MLPConfig((24, 48, 12)), 24, optax.sgd(0.1))
    best = plan_of(task, alpa.ShardParallel(), cluster)
    alone = {
        s: plan_of(task, alpa.ShardParallel(mesh_shape=s), cluster).predicted.step_time_s for s in shapes_of(devices)
    }
    near = [s for s, seconds in alone.items() if seconds <= min(alone.values()) * 1.005]
    assert best.mesh_shape in near
    assert len(best.mesh_shape) == min(map(len, near))
    assert best.predicted.step_time_s <= min(t for s, t in alone.items() if len(s) <= len(best.mesh_shape)) * (1 + 1e-6)
    assert alone[best.mesh_shape] == pytest.approx(best.predicted.step_time_s, rel=1e-6)
    tried = {tuple(map(int, c.name.split("x"))): c.step_time_s for c in best.solver.considered}
    assert tried == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(
    ("times", "kept"),
    [
        ({(8,): 1.0, (2, 4): 0.99, (4, 2): 0.985}, (8,)),
        ({(8,): 1.0, (2, 4): 0.97, (4, 2): 0.969, (2, 2, 2): 0.955}, (4, 2)),
        ({(8,): 1.0, (2, 4): 0.97, (4, 2): 1.1, (2, 2, 2): 0.94}, (2, 2, 2)),
    ],
)
def test_a_mesh_of_more_axes_must_be_clearly_faster(times, kept):
    best = None
    for mesh, seconds in times.items():
        found = planner._Solved(SimpleNamespace(mesh_shape=mesh), None, SimpleNamespace(cost=seconds))
        best = found if best is None or found.is_better(best) else best
    assert best.cost.mesh_shape == kept


def test_axis_names_limit_the_meshes():
    plan = plan_of(MLP, alpa.ShardParallel(axis_names=("a", "b")))
    assert {c.name for c in plan.solver.considered} == {"2x4", "4x2"}


def test_every_restriction_costs_time():
    """What a method forbids can't make the predicted step faster than the free optimum on the same mesh."""
    free = plan_of(MLP, alpa.ShardParallel(mesh_shape=(8,))).predicted.step_time_s
    times = [
        plan_of(MLP, m()).predicted.step_time_s for m in (alpa.DataParallel, alpa.Zero2Parallel, alpa.Zero3Parallel)
    ]
    assert min(times) >= free * (1 - 1e-6)


# ------------------------------------------------------------------------------------------------ memory


def large_step(state, batch):
    """Two layers of [512, 512], whose state is most of the memory."""

    def loss(p):
        return jnp.mean(jnp.tanh(jnp.tanh(batch @ p["a"]) @ p["b"]) ** 2)

    grads = jax.grad(loss)(state["params"])
    moment = jax.tree.map(lambda m, g: 0.9 * m + g, state["moment"], grads)
    return {"params": jax.tree.map(lambda p, m: p - m, state["params"], moment), "moment": moment}, batch.mean()


MATRICES = {name: jax.ShapeDtypeStruct((512, 512), np.float32) for name in "ab"}
LARGE = {"params": MATRICES, "moment": MATRICES}, jax.ShapeDtypeStruct((64, 512), np.float32)
STATE_BYTES = 4 * 512 * 512 * 4


def large_plan(budget):
    method = alpa.ShardParallel(mesh_shape=(8,), memory_budget_bytes=budget, gap=0.0)
    return alpa.parallelize(large_step, method=method).plan(*LARGE, cluster=GREEDY)


def test_both_solvers_find_the_same_optimum():
    """With memory limited, elimination alone is not enough."""
    budget = 0.7 * large_plan(None).predicted.peak_memory_bytes
    found = {}
    for solver in ("HiGHS", "CBC"):
        method = alpa.ShardParallel(mesh_shape=(2, 4), solver=solver, memory_budget_bytes=budget, gap=0.0)
        found[solver] = alpa.parallelize(large_step, method=method).plan(*LARGE, cluster=GREEDY)
    assert {name: plan.solver.solver for name, plan in found.items()} == {"HiGHS": "HiGHS", "CBC": "CBC"}
    assert found["HiGHS"].predicted.step_time_s == pytest.approx(found["CBC"].predicted.step_time_s, rel=1e-5)
    assert max(plan.predicted.peak_memory_bytes for plan in found.values()) <= budget


@pytest.fixture(scope="module")
def least():
    """The smallest budget that some plan fits, within 2 %."""
    low, high = 0.0, 2.0 * STATE_BYTES
    while high > low * 1.02 + 1:
        middle = (low + high) / 2
        try:
            high = min(middle, large_plan(middle).predicted.peak_memory_bytes)
        except alpa.InfeasibleError:
            low = middle
    return high


def test_the_least_memory_is_about_the_split_state(least):
    assert STATE_BYTES / 8 < least < STATE_BYTES / 2


def test_a_lower_budget_is_kept_and_is_never_faster(least):
    free = large_plan(None)
    assert free.predicted.peak_memory_bytes > 2 * least  # there is something to save
    last = free.predicted.step_time_s
    for share in (0.8, 0.5, 0.2, 0.0):
        budget = least + share * (free.predicted.peak_memory_bytes - least)
        plan = large_plan(budget)
        assert plan.predicted.peak_memory_bytes <= budget * (1 + 1e-9)
        assert plan.predicted.step_time_s >= last * (1 - 1e-6)
        last = plan.predicted.step_time_s
    assert last > free.predicted.step_time_s


@pytest.mark.parametrize("share", [1.05, 1.5, 2.5])
def test_the_compiled_program_keeps_the_budget_too(least, share):
    plan = large_plan(share * least)
    executable = alpa.parallelize(large_step).compile(*LARGE, plan=plan)
    # XLA's CPU backend all-reduces a whole activation where others reduce-scatter it
    assert executable.memory_bytes() <= share * least + 1.01 * 64 * 512 * 4
    assert executable.memory_bytes() == pytest.approx(plan.predicted.peak_memory_bytes, rel=0.2)
