"""Read this first: the whole way from a plain train step to a plan on disk that compiles without solving."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alpa_like as alpa
from alpa_like.passes import planner

CHIP = alpa.Device(
    "chip", (("float32", 1e9),), memory_bytes=2**30, memory_bandwidth_bytes_per_s=1e9, flops_efficiency=1
)
WIRE = alpa.Link(bandwidth_bytes_per_s=1e9, latency_s=0.0)
CLUSTER = alpa.Cluster("eight chips", 1, 8, CHIP, WIRE, WIRE, ("made up",))


def init():
    """Two layers: 32 → 64 → 8."""
    first, second = jax.random.split(jax.random.PRNGKey(0))
    return {"up": jax.random.normal(first, (32, 64)) / 6, "down": jax.random.normal(second, (64, 8)) / 8}


def train_step(params, batch):
    def loss(p):
        return jnp.mean((jax.nn.relu(batch["x"] @ p["up"]) @ p["down"] - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value


def batch(seed):
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((16, 32), np.float32), "y": rng.standard_normal((16, 8), np.float32)}


def three_steps(step, params):
    losses = []
    for seed in range(3):
        params, loss = step(params, batch(seed))
        losses.append(float(loss))
    return params, losses


@pytest.fixture(scope="module", autouse=True)
def session():
    alpa.init(CLUSTER)
    yield
    alpa.shutdown()


@pytest.fixture(scope="module")
def parallel():
    return alpa.parallelize(train_step)


def test_three_steps_equal_jit(parallel):
    expected, losses = three_steps(jax.jit(train_step), init())
    params, mine = three_steps(parallel, init())
    np.testing.assert_allclose(mine, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, expected)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(params))


def test_the_plan_is_made_without_arrays_and_printed(parallel):
    plan = parallel.plan(jax.eval_shape(init), batch(0), cluster=CLUSTER)
    assert f"Plan of train_step by ShardParallel for {CLUSTER}" in str(plan)
    for path, shape in [("params['up']", "[32,64]"), ("params['down']", "[64,8]"), ("batch['x']", "[16,32]")]:
        assert f"{path} " in str(plan)
        assert f"float32{shape}" in str(plan)
    assert set(plan.shardings) >= {"params['up']", "params['down']", "batch['x']", "batch['y']", "result[1]"}
    assert plan.predicted.step_time_s > 0
    assert plan.solver.gap <= 1e-6


def test_a_saved_plan_compiles_without_solving(parallel, tmp_path, monkeypatch):
    plan = parallel.plan(init(), batch(0))
    plan.save(tmp_path / "plan.json")

    def no_solver(*_args, **_kwargs):
        raise AssertionError("a loaded plan needs no solver")

    monkeypatch.setattr(planner, "solve", no_solver)
    loaded = alpa.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    again = alpa.parallelize(train_step)
    again.compile(init(), batch(0), plan=loaded)
    params, losses = three_steps(again, init())
    expected, reference = three_steps(jax.jit(train_step), init())
    np.testing.assert_allclose(losses, reference, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, expected)


def test_the_state_is_born_where_the_plan_wants_it(parallel):
    executable = parallel.compile(jax.eval_shape(init), batch(0))
    params = alpa.create_state(init, like=parallel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, init())
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == executable.input_shardings[0]
