"""Steps on a Ray cluster of four nodes with two devices each return what `jax.jit` returns; the state stays there."""

import copy
import gc
import json
import operator
import os
import pickle
import signal
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ray_support import LocalRay, local_ray_cluster, wait_until

import alpa_like as alpa
from alpa_like.chunked import ChunkedArray
from alpa_like.runtime import session
from alpa_like.runtime.remote_arrays import RemoteArray
from benchmarks.ray_local import runs

CHIP, WIRE = alpa.Device("chip", (("float32", 1e9),), 2**62, 1e9, 1.0), alpa.Link(1e9, 0.0)
FAST: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}  # compile the references quickly
WIDTH, ROWS = 8, 16

Step = Callable[[Any, Any], Any]


def cluster(hosts: int) -> alpa.Cluster:
    """Slow chips on fast wires: whatever can be split is worth splitting."""
    return alpa.Cluster("slow chips", hosts, 2, CHIP, WIRE, WIRE, ("made up",))


def pids() -> list[int]:
    """The worker processes of the session."""
    remote = session.current().remote
    if remote is None:
        return []
    found = [worker.pid for worker in remote.workers.running]
    STARTED.update(found)
    return found


STARTED: set[int] = set()


@pytest.fixture(scope="module")
def local() -> Generator[LocalRay]:
    with local_ray_cluster(4) as local:
        yield local
        alpa.shutdown()
        assert STARTED
        assert wait_until(lambda: not any(map(runs, STARTED)))


def start(local: LocalRay, wanted: alpa.Cluster) -> None:
    """Begin a session, unless it is there from an earlier test."""
    here = session.current()
    if here.remote is None or not here.remote.alive or here.cluster != wanted:
        alpa.init(wanted, address=local.address)


@pytest.fixture
def eight(local: LocalRay) -> None:
    """A session on all devices."""
    start(local, cluster(4))


# ------------------------------------------------------------------------------------------------------------ models


def kernels(layers: int = 4, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [np.float32(rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5) for _ in range(layers)]


def batch_of(seed: int = 0, rows: int = ROWS) -> Any:
    x, y = np.float32(np.random.default_rng(seed).standard_normal((2, rows, WIDTH)))
    return {"x": x, "y": y}


def chain(params: Any, x: Any) -> Any:
    for kernel in params:
        x = jnp.tanh(x @ kernel)
    return x


def descend(params: Any, grads: Any) -> Any:
    return jax.tree.map(lambda p, g: (p - 0.1 * g.astype(jnp.float32)).astype(p.dtype), params, grads)


def chain_step(params: Any, batch: Any) -> Any:
    value, grads = jax.value_and_grad(lambda p: jnp.mean((chain(p, batch["x"]) - batch["y"]) ** 2))(params)
    return descend(params, grads), value


def forward_step(params: Any, batch: Any) -> Any:
    """An evaluation that hands the state on: outputs per example, a metric twice, a constant."""
    out = chain(params, batch["x"])
    error = jnp.mean((out - batch["y"]) ** 2)
    return params, {"out": out, "error": error, "again": error, "table": np.arange(3)}


def evaluate(params: Any, batch: Any) -> Any:
    return forward_step(params, batch)[1]


ADAM = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2, eps=1e-3))  # a large eps keeps Adam smooth


def adam_step(state: Any, batch: Any) -> Any:
    """Clipping by the norm of all stages' gradients; outputs per example, a maximum and a norm come back."""

    def loss(params: Any) -> Any:
        out = chain(params, batch["x"])
        return jnp.mean((out - batch["y"]) ** 2), out

    params, moments = state
    (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, moments = ADAM.update(grads, moments, params)
    metrics = {"loss": value, "norm": optax.tree.norm(grads), "out": out, "most": out.max()}
    return (optax.apply_updates(params, updates), moments), metrics


def adam_state() -> Any:
    return kernels(), jax.tree.map(np.asarray, ADAM.init(kernels()))


def mixed_step(state: Any, batch: Any) -> Any:
    """Dropout by a typed key, 16-bit kernels, a counter of Python's kind, whole numbers, a leaf that never changes."""

    def loss(params: Any) -> Any:
        x = batch["x"] + batch["n"][:, None] / 64
        for n, kernel in enumerate(params):
            kept = jax.random.bernoulli(jax.random.fold_in(key, n), 0.7, x.shape)
            x = x + jnp.where(kept, jnp.tanh(x @ kernel.astype(jnp.float32)), 0) / 0.7
        return jnp.mean((x * state["scale"] - batch["y"]) ** 2)

    key = jax.random.fold_in(state["key"], state["step"])
    value, grads = jax.value_and_grad(loss)(state["params"])
    changed = {"params": descend(state["params"], grads), "step": state["step"] + 1, "seen": state["seen"] + 1}
    return {**state, **changed}, value


def mixed_state() -> Any:
    params = [np.asarray(k, jnp.bfloat16) for k in kernels()]
    return {"params": params, "key": jax.random.key(7), "step": 0, "seen": np.arange(3), "scale": np.float32(1.5)}


def mixed_batch(seed: int) -> Any:
    return {**batch_of(seed), "n": np.arange(ROWS), "nothing": np.zeros((ROWS, 0), np.float32)}


def scan_step(state: Any, batch: Any) -> Any:
    def loss(stacked: Any) -> Any:
        out, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), batch["x"], stacked)
        return jnp.mean((out - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(state["w"])
    return {"w": descend(state["w"], grads), "step": state["step"] + 1}, value


def scan_state() -> Any:
    return {"w": np.stack(kernels()), "step": 0}


def pipeline(schedule: str = "1f1b", count: int = 4, stages: Any = 2) -> alpa.PipeshardParallel:
    option = alpa.UniformStageOption(stages) if isinstance(stages, int) else stages
    layers = alpa.AutoLayerOption(4, "none")
    return alpa.PipeshardParallel(schedule=schedule, num_micro_batches=count, layer_option=layers, stage_option=option)


UNEQUAL = alpa.ManualStageOption([[0], [1], [2], [3]], [(1, 1), (1, 1), (1, 2), (2, 2)])
"""Two meshes in the first host, one that is the second, one that is the other two."""
HOSTS = alpa.ManualStageOption([[0, 1], [2, 3]], [(1, 2), (1, 2)])
"""A mesh per host, of two hosts."""


# ------------------------------------------------------------------------------------------------------------ numbers


def plain(leaf: Any) -> Any:
    """The values, on this process; of random keys their data."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf.value() if isinstance(leaf, RemoteArray) else leaf))
    return np.asarray(leaf)


def host(tree: Any) -> Any:
    return jax.tree.map(plain, tree)


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """The same trees, shapes and dtypes, and nearly the same values."""

    def same(path: Any, a: Any, b: Any) -> None:
        where = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), where
        assert bool(getattr(a, "weak_type", False)) == bool(getattr(b, "weak_type", False)), where
        x, y = np.float64(plain(a)), np.float64(plain(b))
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance / 10, err_msg=where)

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree_util.tree_map_with_path(same, actual, expected)


def assert_equal(actual: Any, expected: Any) -> None:
    """The same, bit by bit."""
    for a, b in zip(jax.tree.leaves(host(actual)), jax.tree.leaves(host(expected)), strict=True):
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def run_steps(step: Step, state: Any, batches: Callable[[int], Any] = batch_of) -> Any:
    outputs = []
    for seed in range(3):
        state, output = step(state, batches(seed))
        outputs.append(output)
    return state, outputs


@dataclass(frozen=True)
class Case:
    step: Step
    state: Callable[[], Any]
    method: Any
    spans: tuple[tuple[int, int], ...]
    batches: Callable[[int], Any] = batch_of
    tolerance: float = 1e-5


HALVES = ((0, 4), (4, 4))
CASES = {
    "gpipe, arrays of any kind": Case(mixed_step, mixed_state, pipeline("gpipe"), HALVES, mixed_batch, 2e-2),
    "1f1b, stacked layers": Case(scan_step, scan_state, pipeline("1f1b"), HALVES),
    "eager-1f1b": Case(chain_step, kernels, pipeline("eager-1f1b"), HALVES),
    "interleaved-1f1b": Case(chain_step, kernels, pipeline("interleaved-1f1b", stages=4), HALVES),
    "zb-h1, Adam on unequal meshes": Case(
        adam_step, adam_state, pipeline("zb-h1", stages=UNEQUAL), ((0, 1), (1, 1), (2, 2), (4, 4))
    ),
    "zb-h2": Case(chain_step, kernels, pipeline("zb-h2"), HALVES),
    "inference": Case(forward_step, kernels, pipeline("inference"), HALVES),
    "one mesh, Adam": Case(adam_step, adam_state, alpa.ShardParallel(), ((0, 8),)),
    "one mesh, arrays of any kind": Case(mixed_step, mixed_state, alpa.ShardParallel(), ((0, 8),), mixed_batch, 2e-2),
}


def spans(parallel: alpa.ParallelFunction) -> tuple[tuple[int, int], ...]:
    """The devices of each mesh."""
    return tuple(parallel.last_executable._program.spans.values())  # type: ignore


@pytest.mark.parametrize("name", CASES)
def test_three_steps_equal_jit(eight: None, name: str) -> None:
    case = CASES[name]
    parallel = alpa.parallelize(case.step, method=case.method)
    found = run_steps(parallel, case.state(), case.batches)
    expected = run_steps(jax.jit(case.step, compiler_options=FAST), case.state(), case.batches)
    assert_same(found, expected, case.tolerance)
    assert spans(parallel) == case.spans
    assert len(pids()) == len(set(pids()))


# ------------------------------------------------------------------------------------------------------------ state


@dataclass(frozen=True)
class Steps:
    """Steps that several tests share; `keep` donates nothing."""

    pipe: alpa.ParallelFunction
    keep: alpa.ParallelFunction
    shard: alpa.ParallelFunction


@pytest.fixture(scope="module")
def steps() -> Steps:
    shard = alpa.parallelize(chain_step, method=alpa.ShardParallel())
    return Steps(
        alpa.parallelize(chain_step, method=pipeline()),
        alpa.parallelize(chain_step, method=pipeline(), donate_argnums=()),
        shard,
    )


@pytest.fixture(scope="module")
def expected() -> Any:
    """One step, by `jax.jit`."""
    return host(jax.jit(chain_step)(kernels(), batch_of()))


def test_the_state_moves_from_plan_to_plan(eight: None, steps: Steps) -> None:
    state, _ = steps.pipe(kernels(), batch_of(0))
    before = host(state)
    evaluation = alpa.parallelize(evaluate, method=alpa.ShardParallel())
    assert_same(host(evaluation(state, batch_of(1))), host(jax.jit(evaluate)(before, batch_of(1))))
    assert_equal(state, before)
    state, _ = steps.shard(state, batch_of(1))
    state, _ = steps.keep(state, batch_of(2))
    assert_same(host(state), host(run_steps(jax.jit(chain_step), kernels())[0]))


def test_arguments_of_all_kinds(eight: None, steps: Steps, expected: Any) -> None:
    """JAX's arrays, NumPy's 64-bit numbers, and results of other steps, as state and as batch."""
    state = [jnp.asarray(k) for k in kernels()]
    assert_same(host(steps.pipe(state, jax.tree.map(jnp.asarray, batch_of()))), expected)
    assert not any(x.is_deleted() for x in state)
    wide = jax.tree.map(np.float64, (kernels(), batch_of()))
    assert_same(host(steps.shard(*wide)), expected)
    remote = alpa.parallelize(lambda s, b: (s, jax.tree.map(lambda x: x * 1, b)), method=alpa.ShardParallel())
    _, batch = remote({}, batch_of())
    assert all(isinstance(x, RemoteArray) for x in batch.values())
    assert_same(host(steps.pipe(state, batch)), expected)
    assert_same(host(steps.shard(state, batch)), expected)


def test_one_array_twice_in_the_state(eight: None, steps: Steps) -> None:
    tied = kernels(1) * 4
    state, _ = steps.pipe(tied, batch_of())
    assert_same(host(state), host(jax.jit(chain_step)(tied, batch_of())[0]))
    again, _ = steps.pipe([state[0]] * 4, batch_of())
    assert_same(
        host(again), host(jax.jit(chain_step)([host(jax.jit(chain_step)(tied, batch_of())[0][0])] * 4, batch_of())[0])
    )


def test_what_comes_back_as_it_was_is_the_same_array(eight: None) -> None:
    """Workers hold it once: when one handle is gone, or donated, no other may be left that speaks of it."""
    evaluation = alpa.parallelize(forward_step, method=pipeline("inference"))
    state, metrics = evaluation(kernels(), batch_of())
    same, more = evaluation(state, batch_of())
    assert all(a is b for a, b in zip(state, same, strict=True))
    assert metrics["error"] is metrics["again"]
    first = float(metrics.pop("error"))
    gc.collect()
    evaluation(state, batch_of())
    assert float(metrics["again"]) == first == float(more["error"])


def test_donated_state_is_gone_and_kept_state_is_not(eight: None, steps: Steps, tmp_path: Path) -> None:
    state, _ = steps.keep(kernels(), batch_of())
    values = host(state)
    steps.keep(state, batch_of())
    assert_equal(state, values)
    steps.pipe(state, batch_of())
    assert all(x.is_deleted() for x in state)
    assert "deleted" in str(state[0])
    with pytest.raises(alpa.ProgramError, match="donated to a step, or deleted, and is gone"):
        np.asarray(state[0])
    with pytest.raises(alpa.ProgramError, match=r"params\[0\] was donated to an earlier step"):
        steps.pipe(state, batch_of())
    with pytest.raises(alpa.CheckpointError, match=r"leaf \[0\] was donated"):
        alpa.save_checkpoint(tmp_path, state, 0)


def test_another_batch_shape_compiles_again(eight: None, steps: Steps) -> None:
    small = batch_of(3, 8)
    assert_same(host(steps.keep(kernels(), small)), host(jax.jit(chain_step)(kernels(), small)))


def held() -> list[tuple[int, int]]:
    """Arrays and bytes that each process holds."""
    remote = session.current().remote
    assert remote is not None
    groups = list(remote._meshes.values())  # pyright: ignore
    return [x for group in groups for x in remote.result(remote.workers.call(group, "held", [()] * len(group)))]


def test_garbage_does_not_stay_on_workers(eight: None, steps: Steps) -> None:
    state, _ = steps.pipe(kernels(), batch_of())
    evaluation = alpa.parallelize(evaluate, method=pipeline("inference"))
    counts = []
    for seed in range(8):
        evaluation(state, batch_of(seed))
        state, _ = steps.pipe(state, batch_of(seed))
        state = [*state[:3], state[3].copy()]
        gc.collect()
        counts.append(held())
    assert counts[4] == counts[7]


# ------------------------------------------------------------------------------------------------------- one array


def test_a_remote_array_behaves_as_an_array(eight: None, steps: Steps, expected: Any) -> None:
    (x, *_), loss = state, _ = steps.keep(kernels(), batch_of())
    w = expected[0][0]
    assert isinstance(x, RemoteArray)
    assert (x.shape, x.dtype, x.ndim, x.size, x.nbytes, len(x)) == (w.shape, w.dtype, 2, 64, 256, 8)
    assert (round(float(loss), 4), int(loss), bool(loss)) == (round(float(expected[1]), 4), int(expected[1]), True)
    assert f"{loss:.4f} {loss}" == f"{float(expected[1]):.4f} {loss.item()}"
    assert str(x) == str(np.asarray(x))
    assert "devices 0 to 3" in repr(x)
    pairs = {
        "asarray": (jnp.asarray(x), w), "get": (jax.device_get(x), w), "index": (x[1:3, 2], w[1:3, 2]),
        "left": (x + 1, w + 1), "right": (1 - x, 1 - w), "matmul": (w @ x, w @ w), "jax": (jnp.asarray(w) * x, w * w),
        "number": (np.float32(2) * x, 2 * w), "both": (x @ x, w @ w), "rows": (np.stack(list(x)), w),
        "T": (x.T, w.T), "mean": (x.mean(), w.mean()), "sum": (np.sum(x), w.sum()), "abs": (abs(-x), abs(w)),
        "astype": (x.astype(jnp.bfloat16).astype(jnp.float32), w.astype(jnp.bfloat16).astype(jnp.float32)),
        "pickle": (pickle.loads(pickle.dumps(x)), w), "copy": (copy.deepcopy(x), w), "list": (x.tolist(), w),
        "compare": (x < loss, w < expected[1]), "at": (x.at[0].set(1.0), jnp.asarray(w).at[0].set(1.0)),
        "in place": (operator.iadd(x, 1), w + 1), "round": (round(x, 1), w.round(1)),
        "in": (x.tolist()[0][0] in x, True),
    }  # fmt: skip
    for name, (a, b) in pairs.items():
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-4, atol=1e-6, err_msg=name)
    with pytest.raises(TypeError, match="can't be written to"):
        np.add(w, w, out=x)  # type: ignore
    assert jax.block_until_ready(state)[0] is x
    assert x.block_until_ready() is x
    assert_same(jax.tree.map(np.asarray, state), expected[0])


def test_a_copy_may_be_deleted(eight: None, steps: Steps) -> None:
    (x, *_), _ = steps.keep(kernels(), batch_of())
    other = x.copy()
    assert_equal(other, x)
    assert_equal(jnp.zeros_like(x), np.zeros_like(x))
    other.delete()
    assert (other.is_deleted(), x.is_deleted()) == (True, False)
    with pytest.raises(AttributeError, match="RemoteArray"):
        _ = x.no_such_thing


def test_what_an_executable_tells(eight: None, steps: Steps, expected: Any, tmp_path: Path) -> None:
    for parallel, names in ((steps.keep, {"forward", "backward", "update"}), (steps.shard, {"step"})):
        parallel(kernels(), batch_of())
        executable: Any = parallel.last_executable
        assert_same(host(executable.trace(tmp_path / "t.json", kernels(), batch_of())), expected)
        events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
        assert names <= {e["cat"] for e in events if e["ph"] == "X"}
        assert executable.memory_bytes() > 4 * WIDTH * WIDTH
        assert executable.traffic()["send"] == (2 * ROWS * WIDTH * 4 if parallel is steps.keep else 0)
        assert executable.hlo_text().count("ENTRY") == len(executable._lowered_pipeline.pieces)
        assert "run " in executable.programs
        assert "Plan of chain_step" in str(executable.plan)
        assert "RemoteExecutable(chain_step" in repr(executable)
        with pytest.raises(alpa.PlanError, match="other processes"):
            _ = executable.mesh


# ------------------------------------------------------------------------------------------------------- bad input


def test_checkpoints_that_can_not_be(eight: None, steps: Steps, tmp_path: Path) -> None:
    state, _ = steps.keep(kernels(), batch_of())
    values = host(state)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(alpa.CheckpointError, match=r"saving .* failed") as info:
        alpa.save_checkpoint(tmp_path / "file", state, 0)
    assert "\n" not in str(info.value)
    alpa.save_checkpoint(tmp_path, kernels(5), 0).wait()
    with pytest.raises(alpa.CheckpointError, match="another model") as info:
        alpa.restore_checkpoint(tmp_path, steps.keep)
    assert "\n" not in str(info.value)
    assert_equal(state, values)


def printing_step(params: Any, batch: Any) -> Any:
    jax.debug.print("step {}", batch["x"].sum())
    return chain_step(params, batch)


def calling_step(params: Any, batch: Any) -> Any:
    y = jax.pure_callback(np.tanh, batch["y"], batch["y"], vmap_method="sequential")
    return chain_step(params, {**batch, "y": y})


@pytest.mark.parametrize(
    ("step", "method"),
    [
        (printing_step, alpa.ShardParallel()),
        (printing_step, pipeline()),
        (calling_step, alpa.ShardParallel()),
        (calling_step, pipeline(count=1)),
    ],
)
def test_a_step_may_not_call_back(eight: None, step: Step, method: Any) -> None:
    with pytest.raises(alpa.ProgramError, match=r"calls back into Python") as info:
        alpa.parallelize(step, method=method)(kernels(), batch_of())
    assert "\n" not in str(info.value)


def test_wrong_arguments_are_named(eight: None, steps: Steps) -> None:
    steps.keep(kernels(), batch_of())
    executable: Any = steps.keep.last_executable
    for args, words in (
        ((kernels(), batch_of(0, 12)), r"batch\['x'\] has shape \(12, 8\)"),
        ((kernels(3), batch_of()), "another tree"),
        ((kernels(), {**batch_of(), "y": "text"}), r"batch\['y'\] must be an array"),
    ):
        with pytest.raises(alpa.ProgramError, match=words):
            executable(*args)
    assert_same(host(steps.keep(kernels(), batch_of())), host(jax.jit(chain_step)(kernels(), batch_of())))


def test_a_plan_for_other_devices_is_refused(eight: None) -> None:
    for method in (alpa.ShardParallel(), pipeline()):
        parallel = alpa.parallelize(chain_step, method=method)
        plan = parallel.plan(kernels(), batch_of(), cluster=cluster(2))
        with pytest.raises(alpa.PlanError, match="plan is for 4 devices, but 8 are here"):
            parallel.compile(kernels(), batch_of(), plan=plan)


def test_not_a_number_is_no_error(eight: None, steps: Steps) -> None:
    state, loss = steps.keep(kernels(), jax.tree.map(lambda x: x * np.nan, batch_of()))
    assert np.isnan(float(loss))
    assert np.isnan(state[0]).all()


# ------------------------------------------------------------------------------------------- sessions that end


def init(key: Any, scale: float) -> Any:
    w = jax.random.normal(key, (4, WIDTH, WIDTH)) * scale
    return {"w": w, "step": jnp.zeros((), int)}


def test_a_state_is_born_and_saved_and_restored_anywhere(local: LocalRay, eight: None, tmp_path: Path) -> None:
    """From stages to one mesh, to this process, to stages on two hosts. Workers end when what they write is there."""
    pipe, shard = (alpa.parallelize(scan_step, method=m) for m in (pipeline(), alpa.ShardParallel()))
    here, hosts = alpa.parallelize(scan_step), alpa.parallelize(scan_step, method=pipeline(count=2, stages=HOSTS))
    made = jax.jit(init)(jax.random.key(1), 0.3)
    pipe.compile(jax.eval_shape(lambda: made), batch_of())
    state = alpa.create_state(init, jax.random.key(1), 0.3, like=pipe)
    assert isinstance(state["w"], ChunkedArray)
    assert_equal(state, made)
    saved, expected = made, made
    for number, step in enumerate((pipe, shard, here, hosts)):
        if step is here:
            assert pids()
            alpa.init(cluster(1))
        elif step is hosts:
            alpa.init(cluster(2), address=local.address)
        if number:
            executable = step.compile(jax.eval_shape(lambda: made), batch_of())
            state = alpa.restore_checkpoint(tmp_path, step)
            assert executable.takes((state, batch_of()))
            assert_equal(state, saved)
        state, _ = step(state, batch_of(number))
        saved = host(state)
        expected, _ = jax.jit(scan_step)(expected, batch_of(number))
        assert_same(saved, host(expected))
        alpa.save_checkpoint(tmp_path, state, number)
        step(state, batch_of())  # donates what is being saved
    assert pids()


def huge_step(state: Any, batch: Any) -> Any:
    """Sorts 4 TiB between the loss and the update."""
    state, value = scan_step(state, batch)
    waste = jax.lax.sort(jax.lax.iota(jnp.float32, 2**40) * value)[5]
    return {**state, "w": state["w"] + 0 * waste}, value


def test_a_step_that_fails_is_told_and_nothing_hangs(local: LocalRay, tmp_path: Path) -> None:
    """What was not donated stays. A step on what is lost ends the session, as its workers may wait for each other."""
    start(local, cluster(2))
    method = pipeline(count=2, stages=HOSTS)
    good, bad = (alpa.parallelize(step, method=method) for step in (scan_step, huge_step))
    kept, first = good(scan_state(), batch_of())
    state, loss = bad(scan_state(), batch_of())
    with pytest.raises(alpa.WorkerError, match=r"Out of memory allocating \d+ bytes") as info:
        float(loss)
    assert "\n" not in str(info.value)
    assert_equal(kept, host(kept))
    with pytest.raises(alpa.ProgramError, match=r"Out of memory .* is lost: call alpa\.init again"):
        steps_until_told(good, state)
    with pytest.raises(alpa.WorkerError, match=r"workers of this session are lost: .*Out of memory"):
        good(kept, batch_of())
    assert pids()
    alpa.init(cluster(1))
    assert_all_lost(kept, first, tmp_path)


def steps_until_told(step: Step, state: Any) -> None:
    """Steps are ordered ahead, so what went wrong in one is heard of some steps later."""
    for seed in range(9):
        state, _ = step(state, batch_of(seed))


def assert_all_lost(state: Any, loss: Any, folder: Path) -> None:
    """Whatever is done with arrays of workers that have ended, one sentence says that they have."""
    step = alpa.parallelize(scan_step)
    alpa.save_checkpoint(folder, scan_state(), 0).wait()
    for use, error in (
        (lambda: float(loss), alpa.ProgramError),
        (lambda: np.asarray(state["w"]), alpa.ProgramError),
        (lambda: jax.block_until_ready(state), alpa.ProgramError),
        (lambda: step(state, batch_of()), alpa.ProgramError),
        (lambda: alpa.save_checkpoint(folder, state, 1), alpa.CheckpointError),
        (lambda: alpa.restore_checkpoint(folder, state), alpa.CheckpointError),
    ):
        with pytest.raises(error, match="workers that have ended") as info:
            use()
        assert "\n" not in str(info.value)
    assert "deleted" in repr(loss)


def test_training_goes_on_after_a_death(local: LocalRay, tmp_path: Path) -> None:
    """Bit by bit as without one, from batches that can be read once only."""
    data = [mixed_batch(seed) for seed in range(8)]
    alpa.init(cluster(2), address=local.address, max_restarts=1)
    parallel = alpa.parallelize(mixed_step, method=pipeline(count=2, stages=HOSTS))
    state, losses = mixed_state(), []
    for batch in data:
        state, loss = parallel(state, batch)
        losses.append(float(loss))
    expected, first = host(state), pids()
    told: list[tuple[int, float]] = []

    def on_step(step: int, loss: Any) -> None:
        told.append((step, float(loss)))
        if step == 5 and all(map(runs, first)):
            os.kill(first[0], signal.SIGKILL)

    options: Any = {"checkpoint_directory": tmp_path, "checkpoint_every": 2, "on_step": on_step}
    found = alpa.train(parallel, mixed_state(), iter(data), **options)
    numbers = [step for step, _ in told]
    assert numbers[:6] == list(range(6))
    assert len(numbers) > 8
    assert numbers[numbers.index(5) + 1 :] == list(range(numbers[6], 8))
    assert all(loss == losses[step] for step, loss in told)
    assert_equal(found, expected)
    assert alpa.latest_step(tmp_path) == 8
    assert not any(map(runs, first))
    assert pids()


def test_sessions_that_can_not_begin(local: LocalRay) -> None:
    with pytest.raises(alpa.ClusterError, match='add cluster="ray"'):
        alpa.init(max_restarts=1)
    for options, words in (
        ({"num_hosts": 9, "wait_s": 2}, "9"),
        ({"num_devices": 0}, "num_devices"),
        ({"max_restarts": -1}, "max_restarts must be a whole number"),
        ({"address": "127.0.0.1:1"}, r"127\.0\.0\.1:1"),
    ):
        with pytest.raises(alpa.ClusterError, match=words) as info:
            alpa.init("ray", **({"address": local.address} | options))  # type: ignore
        assert "\n" not in str(info.value)
