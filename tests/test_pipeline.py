"""Pipelined steps return what `jax.jit` of the same function returns; their plans, state, traces and failures."""

import itertools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alpa_like as alpa

CHIP, WIRE = alpa.Device("chip", (("float32", 1e9),), 2**30, 1e9, 1.0), alpa.Link(1e9, 0.0)
FAST: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}  # compile the references quickly
WIDTH = 16

Array = np.ndarray[Any, Any]
Meshes = Sequence[tuple[int, ...]]
Step = Callable[[Any, Any], tuple[Any, Any]]


def cluster(devices: int) -> alpa.Cluster:
    """Slow chips on fast wires: whatever can be split is worth splitting."""
    return alpa.Cluster("slow chips", 1, devices, CHIP, WIRE, WIRE, ("made up",))


@pytest.fixture(scope="module", autouse=True)
def eight_devices() -> Iterator[None]:
    alpa.init(cluster(8))
    yield
    alpa.shutdown()


@pytest.fixture
def devices(request: pytest.FixtureRequest) -> Iterator[int]:
    """Another number of devices for one test."""
    alpa.init(cluster(request.param))
    yield request.param
    alpa.init(cluster(8))


# ------------------------------------------------------------------------------------------------ models


def kernels(layers: int, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5 for _ in range(layers)]


def batch_of(rows: int, seed: int = 0) -> dict[str, Array]:
    x, y = np.random.default_rng(seed).standard_normal((2, rows, WIDTH)).astype(np.float32)
    return {"x": x, "y": y}


TABLE = np.arange(6, dtype=np.int16).reshape(2, 3)


def constant_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """Results that depend on nothing: the same one twice and in a product, a random key, a number."""
    state, value = chain_step(state, batch)
    key = jax.random.key_data(jax.random.key(3))
    return state, {"loss": value, "table": TABLE, "again": TABLE, "product": value * TABLE, "key": key, "number": 3}


def momentum(state: Any, grads: Any) -> Any:
    """SGD with momentum, by hand."""
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, state["velocity"], grads)
    return {"params": jax.tree.map(lambda p, v: p - 0.1 * v, state["params"], velocity), "velocity": velocity}


def with_velocity(params: Any) -> Any:
    return {"params": params, "velocity": jax.tree.map(np.zeros_like, params)}


def chain(params: Any, x: Any) -> Any:
    for kernel in params:
        x = jnp.tanh(x @ kernel)
    return x


def chain_step(state: Any, batch: Any) -> tuple[Any, Any]:
    def loss(params: Any) -> Any:
        return jnp.mean((chain(params, batch["x"]) - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(state["params"])
    return momentum(state, grads), value


def marked_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """The chain with its layers marked by hand; the first has most of the work."""

    def loss(params: Any) -> Any:
        middle = alpa.mark_pipeline_boundary(chain(params[:3], batch["x"]))
        return jnp.mean((chain(params[3:], middle) - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(state["params"])
    return momentum(state, grads), value


def masked_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """A mean over the examples that count, by a number of the whole batch, and a scale that is part of the state."""

    def loss(params: Any) -> Any:
        errors = jnp.mean((chain(params, batch["x"]) - batch["y"]) ** 2, 1)
        counts = (batch["y"][:, 0] > 0).astype(np.float32)
        return jnp.sum(errors * counts) / jnp.sum(counts) * state["scale"]

    value, grads = jax.value_and_grad(loss)(state["params"])
    return {**momentum(state, grads), "scale": state["scale"] * 1.5}, value


def forward_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """No gradient: per-example outputs and a metric; the state comes back as it was."""
    out = chain(state["params"], batch["x"])
    return state, {"out": out, "error": jnp.mean((out - batch["y"]) ** 2)}


def tied_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """One matrix at both ends, and dropout whose key changes with the step."""

    def loss(params: Any) -> Any:
        x = batch["x"] @ params["tied"]
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        for n, kernel in enumerate(params["inner"]):
            kept = jax.random.bernoulli(jax.random.fold_in(key, n), 0.7, x.shape)
            x = x + jnp.where(kept, jnp.tanh(x @ kernel), 0.0) / 0.7
        return jnp.mean((x @ params["tied"].T - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(state["params"])
    return {**momentum(state, grads), "key": state["key"], "step": state["step"] + 1}, value


def tied_state() -> Any:
    tied, *inner = kernels(3)
    key = np.array([3, 4], np.uint32)
    return {**with_velocity({"tied": tied, "inner": inner}), "key": key, "step": np.int32(0)}


def scan_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """The chain as one loop over stacked kernels."""

    def loss(stacked: Any) -> Any:
        out, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), batch["x"], stacked)
        return jnp.mean((out - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(state["params"])
    return momentum(state, grads), value


ADAM = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2, eps=1e-3))  # a large eps keeps Adam smooth


def adam_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """Clipping by the norm of all stages' gradients; the norm, logits per example, a count and a maximum come back."""

    def loss(params: Any) -> Any:
        out = chain(params, batch["x"])
        return jnp.mean((out - batch["y"]) ** 2), out

    params, moments = state
    (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, moments = ADAM.update(grads, moments, params)
    right = jnp.argmax(out, -1) == jnp.argmax(batch["y"], -1)
    metrics = {"loss": value, "norm": optax.tree.norm(grads), "out": out, "right": right.sum(), "most": out.max()}
    return (optax.apply_updates(params, updates), moments), metrics


def adam_state() -> Any:
    params = kernels(4)
    return params, jax.tree.map(np.asarray, ADAM.init(params))


# ------------------------------------------------------------------------------------------------ numbers


def executable_of(parallel: alpa.ParallelFunction) -> alpa.PipelineExecutable:
    executable = parallel.last_executable
    assert isinstance(executable, alpa.PipelineExecutable)
    return executable


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    def same(path: Any, a: Any, b: Any) -> None:
        where = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), where
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance / 10, err_msg=where)

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree_util.tree_map_with_path(same, actual, expected)


def run_steps(step: Step, state: Any, rows: int) -> tuple[Any, list[Any]]:
    outputs = []
    for seed in range(3):
        state, output = step(state, batch_of(rows, seed))
        outputs.append(output)
    return state, outputs


def pipeline(
    schedule: str = "1f1b",
    count: int = 4,
    stages: int | Meshes = 4,
    layers: int = 4,
    remat: Literal["auto", "none", "layer"] = "none",
) -> alpa.PipeshardParallel:
    """A method; `stages` is a number, or the mesh of each stage."""
    option = alpa.UniformStageOption(stages) if isinstance(stages, int) else by_hand(stages, layers)
    layered = alpa.AutoLayerOption(layers, remat)
    return alpa.PipeshardParallel(schedule=schedule, num_micro_batches=count, layer_option=layered, stage_option=option)


def by_hand(meshes: Meshes, layers: int) -> alpa.ManualStageOption:
    cuts = [round(i * layers / len(meshes)) for i in range(len(meshes) + 1)]
    ids = [range(a, b) for a, b in itertools.pairwise(cuts)]
    return alpa.ManualStageOption(ids, [(1, int(np.prod(m))) for m in meshes], meshes)


def chain_state() -> Any:
    return with_velocity(kernels(4))


CASES: dict[
    str, tuple[Step, Callable[[], Any], int, alpa.PipeshardParallel]
] = {  # step, state, rows of the batch, method
    "gpipe": (chain_step, chain_state, 16, pipeline("gpipe", 4, [(2,), (4,), (1,), (1,)])),
    "1f1b, remat": (chain_step, chain_state, 16, pipeline("1f1b", 8, [(1,), (1,), (2,), (2, 2)], remat="layer")),
    "eager-1f1b": (chain_step, chain_state, 16, pipeline("eager-1f1b", 16, [(2, 2), (4,)])),
    "interleaved-1f1b": (chain_step, chain_state, 16, pipeline("interleaved-1f1b", 4, 4)),
    "zb-h1": (chain_step, chain_state, 15, pipeline("zb-h1", 5, [(3,), (4,), (1,)])),
    "zb-h2, remat": (chain_step, chain_state, 16, pipeline("zb-h2", 8, [(2, 2), (1, 4)], remat="layer")),
    "inference": (forward_step, chain_state, 16, pipeline("inference", 4, 4)),
    "one micro-batch": (chain_step, chain_state, 16, pipeline("1f1b", 1, [(5,), (3,)])),
    "tied, dropout": (tied_step, tied_state, 16, pipeline("1f1b", 4, [(7,), (1,)])),
    "masked mean": (
        masked_step,
        lambda: {**chain_state(), "scale": np.float32(2)},
        16,
        pipeline("1f1b", 4, [(3,), (1,), (4,)]),
    ),
    "scan": (scan_step, lambda: with_velocity(np.stack(kernels(4))), 16, pipeline("1f1b", 4, 2)),
    "clipping, Adam, outputs": (adam_step, adam_state, 16, pipeline("zb-h1", 4, 4)),
    "constants": (constant_step, chain_state, 16, pipeline("1f1b", 2, 2)),
    "layers by hand": (
        marked_step,
        chain_state,
        16,
        alpa.PipeshardParallel(
            num_micro_batches=2, layer_option=alpa.ManualLayerOption("none"), stage_option=alpa.UniformStageOption(2)
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_returns_what_jit_returns(name: str) -> None:
    step, make, rows, method = CASES[name]
    parallel = alpa.parallelize(step, method=method)
    found = run_steps(parallel, make(), rows)
    assert_same(found, run_steps(jax.jit(step, compiler_options=FAST), make(), rows))
    executable = executable_of(parallel)
    planned = executable.plan.pipeline
    assert planned is not None
    assert planned.num_micro_batches == method.num_micro_batches
    assert executable.traffic()["send"] > 0


@pytest.mark.parametrize("devices", [3], indirect=True)
def test_three_devices(devices: int) -> None:
    method = pipeline("1f1b", 5, [(1,), (2,)])
    found = run_steps(alpa.parallelize(chain_step, method=method), chain_state(), 15)
    assert_same(found, run_steps(jax.jit(chain_step), chain_state(), 15))
    state = found[0]
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} <= {1, 2}  # each on its stage's devices
    assert len({d for x in jax.tree.leaves(state) for d in x.sharding.device_set}) == 3


# ------------------------------------------------------------------------------------------------ plans


@pytest.fixture(scope="module")
def parallel() -> alpa.ParallelFunction:
    """The chain on unequal stages, compiled, donating nothing."""
    method = pipeline("1f1b", 4, [(1,), (1,), (2,), (2, 2)])
    made = alpa.parallelize(chain_step, method=method, donate_argnums=())
    made.compile(jax.eval_shape(chain_state), batch_of(16))
    return made


@pytest.fixture(scope="module")
def expected() -> Any:
    return jax.tree.map(np.asarray, jax.jit(chain_step)(chain_state(), batch_of(16)))


def test_a_saved_plan_makes_the_same_executable(parallel: alpa.ParallelFunction, expected: Any, tmp_path: Path) -> None:
    plan = executable_of(parallel).plan
    plan.save(tmp_path / "plan.json")
    loaded = alpa.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert str(loaded) == str(plan)
    again = alpa.parallelize(chain_step, donate_argnums=()).compile(
        jax.eval_shape(chain_state), batch_of(16), plan=loaded
    )
    assert isinstance(again, alpa.PipelineExecutable)
    assert again.programs == executable_of(parallel).programs
    assert_same(again(chain_state(), batch_of(16)), expected)


def plain(plan: alpa.Plan) -> alpa.Plan:
    return replace(plan, solver=replace(plan.solver, seconds=0.0))


def test_another_process_makes_the_same_plan(tmp_path: Path) -> None:
    program = f"""
        import sys, runpy, alpa_like as alpa
        alpa.init(num_devices=8)
        here = runpy.run_path({__file__!r})
        parallel = alpa.parallelize(here["adam_step"], method=here["pipeline"]("zb-h1", 4, [(2,), (4,), (1,), (1,)]))
        parallel.plan(here["adam_state"](), here["batch_of"](16), cluster=here["cluster"](8)).save(sys.argv[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "there.json")]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "271828"}, check=True, timeout=100)
    there = alpa.Plan.load(tmp_path / "there.json")
    method = pipeline("zb-h1", 4, [(2,), (4,), (1,), (1,)])
    here = alpa.parallelize(adam_step, method=method).plan(adam_state(), batch_of(16))
    assert here.diff(there) == ""
    assert plain(here) == plain(there)


# ------------------------------------------------------------------------------------------------ arguments


def test_arguments_may_be_numpy_or_jax_arrays(parallel: alpa.ParallelFunction, expected: Any) -> None:
    state, batch = chain_state(), batch_of(16)
    assert_same(parallel(state, batch), expected)
    on_device = jax.tree.map(jnp.asarray, (state, batch))
    assert_same(parallel(*on_device), expected)
    assert_same(parallel(on_device[0], batch), expected)


def test_state_is_kept_where_nothing_is_donated(parallel: alpa.ParallelFunction, expected: Any) -> None:
    state, _ = parallel(chain_state(), batch_of(16))
    first = parallel(state, batch_of(16, 1))
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))
    assert_same(parallel(state, batch_of(16, 1)), first, tolerance=0)


def test_state_is_donated_by_default() -> None:
    donating = alpa.parallelize(chain_step, method=pipeline(stages=2))
    state, _ = donating(chain_state(), batch_of(16))
    new, _ = donating(state, batch_of(16))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    with pytest.raises(alpa.ProgramError, match=r"state\['params'\]\[0\] was donated to an earlier step"):
        donating(state, batch_of(16))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_state_is_born_on_its_stages(parallel: alpa.ParallelFunction, expected: Any) -> None:
    """Every leaf is created where the step wants it, none moves."""

    def init(scale: float) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(x) * scale, chain_state())

    state = alpa.create_state(init, 1.0, like=parallel)
    wanted = executable_of(parallel).input_shardings[0]
    assert jax.tree.map(lambda x: x.sharding, state) == wanted
    assert len({d for x in jax.tree.leaves(state) for d in x.sharding.device_set}) == 8
    assert_same(parallel(state, batch_of(16)), expected)


WRONG_ARGUMENTS = {
    "rows": (lambda state, batch: (state, batch_of(12)), r"batch\['x'\] has shape \(12, 16\)"),
    "dtype": (lambda state, batch: (state, {**batch, "y": batch["y"].astype(int)}), r"batch\['y'\] has .* dtype int"),
    "tree": (lambda state, batch: (state["params"], batch), "another tree"),
    "no array": (lambda state, batch: (state, {**batch, "x": "text"}), r"batch\['x'\] must be an array"),
}


@pytest.mark.parametrize("kind", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(parallel: alpa.ParallelFunction, kind: str) -> None:
    change, words = WRONG_ARGUMENTS[kind]
    with pytest.raises(alpa.ProgramError, match=words):
        executable_of(parallel)(*change(chain_state(), batch_of(16)))


def mean_removed_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """Examples depend on each other, as under BatchNorm."""
    whitened = batch["x"] - jnp.tanh(batch["x"] @ state["params"][0]).mean(0)
    return chain_step(state, {**batch, "x": whitened})


WRONG_METHODS = {  # step, method, error, words
    "rows": (chain_step, pipeline(count=3), alpa.AlpaError, "16.*3|3.*16"),
    "stages": (chain_step, pipeline(stages=8), alpa.MethodError, "8 stages .* 4 layers"),
    "devices": (chain_step, pipeline(stages=[(2,), (4,)]), alpa.MethodError, "6 devices in all.* has 8"),
    "layers": (chain_step, pipeline(stages=3), alpa.MethodError, "3 equal stages can't share 8 devices"),
    "no gradient": (forward_step, pipeline(stages=2), alpa.AlpaError, "gradient|inference"),
    "gradient": (chain_step, pipeline("inference", stages=2), alpa.AlpaError, "gradient|inference"),
    "statistics": (mean_removed_step, pipeline(stages=2), alpa.TraceError, "batch_statistics|examples"),
}


@pytest.mark.parametrize("kind", WRONG_METHODS)
def test_a_method_that_does_not_fit_is_refused(kind: str) -> None:
    step, method, error, words = WRONG_METHODS[kind]
    with pytest.raises(error, match=words) as info:
        alpa.parallelize(step, method=method).plan(chain_state(), batch_of(16))
    assert "\n" not in str(info.value)


def printing_step(state: Any, batch: Any) -> tuple[Any, Any]:
    jax.debug.print("rows {}", batch["x"].shape)
    return chain_step(state, batch)


def test_what_a_pipeline_does_not_print_is_told(caplog: pytest.LogCaptureFixture) -> None:
    alpa.parallelize(printing_step, method=pipeline(stages=2)).compile(chain_state(), batch_of(16))
    assert "printing_step: a pipeline leaves jax.debug.print" in caplog.text


# ------------------------------------------------------------------------------------------------ failures


def broken_sensor(x: Any) -> np.float32:
    if x > 100:
        raise OSError("the sensor is broken")
    return np.float32(0)


def sensing_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """Reads a sensor when all gradients are there, while other stages may be updated already."""
    state, value = chain_step(state, batch)
    reading = jax.pure_callback(broken_sensor, jax.ShapeDtypeStruct((), np.float32), value)
    return jax.tree.map(lambda x: x + reading, state), value


@pytest.mark.parametrize("devices", [2], indirect=True)
@pytest.mark.parametrize("donate", ["auto", ()], ids=["donated", "kept"])
def test_after_a_step_that_fails_state_is_valid_or_known_to_be_gone(donate: Any, devices: int) -> None:
    """Stages of one device: where several wait for each other, XLA's CPU backend ends the process.

    The failure comes from the step where the driver meets it, else from JAX when somebody waits for the results.
    """
    method = pipeline("1f1b", 2, [(1,), (1,)])
    parallel = alpa.parallelize(sensing_step, method=method, donate_argnums=donate)
    state, _ = parallel(chain_state(), batch_of(16))
    before = jax.tree.map(np.array, state)
    wild = {**batch_of(16), "y": np.full((16, WIDTH), 1e3, np.float32)}
    with pytest.raises((alpa.ProgramError, jax.errors.JaxRuntimeError), match="the sensor is broken"):
        jax.block_until_ready(parallel(state, wild))
    if donate == ():
        assert_same(parallel(state, batch_of(16)), jax.jit(chain_step)(before, batch_of(16)))
        return
    with pytest.raises(alpa.ProgramError, match="donated to an earlier step and is gone"):
        parallel(state, batch_of(16))


# ------------------------------------------------------------------------------------------------ traces


def slices(path: Path) -> list[tuple[str, str, str, dict[str, int]]]:
    """Lane, kind, stage and micro-batch of every slice; the lanes by name."""
    events = json.loads(path.read_text())["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return [(lanes[e["tid"]], e["cat"], e["name"], e["args"]) for e in events if e["ph"] == "X"]


def test_measured_and_simulated_traces_lie_over_each_other(
    parallel: alpa.ParallelFunction, expected: Any, tmp_path: Path
) -> None:
    executable = executable_of(parallel)
    assert_same(executable.trace(tmp_path / "run.json", chain_state(), batch_of(16)), expected)
    executable.plan.trace(tmp_path / "plan.json")
    measured, simulated = slices(tmp_path / "run.json"), slices(tmp_path / "plan.json")
    tasks = ("forward", "backward")
    both = [[s[:3] for s in found if s[1] in tasks] for found in (measured, simulated)]
    assert len(both[0]) == 2 * 4 * 4
    assert sorted(both[0]) == sorted(both[1])
    assert {s[1] for s in measured} >= {"update", *tasks}
