"""Regret, rank correlation and paired times by hand, rules for plans by hand, and `tune`."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import alpa_like as alpa
from alpa_like.errors import MethodError
from alpa_like.models import tiny_tasks
from benchmarks import candidates, expert_times, regret
from benchmarks.candidates import Candidate
from benchmarks.expert_rules import FAMILIES
from benchmarks.experts import FSDP, MEGATRON, _find, _sharding, experts
from benchmarks.paired import Quartiles, quartiles


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 1 - 6 * 4 / (5 * 24)),  # the formula with squared differences of ranks
        ([1, 1, 2], [1, 2, 3], np.sqrt(3) / 2),  # ties share a rank
        ([1, 1], [1, 2], 1.0),
    ],
)
def test_rank_correlation(a, b, expected):
    assert regret.spearman(a, b) == pytest.approx(expected)


def row(name: str, predicted: float | None, seconds: float) -> regret.Row:
    return regret.Row(name, predicted, seconds, Quartiles(1, 1, 1), predicted and 90.0, 100.0)


def test_verdict_by_hand():
    times = np.array([[10.0, 9.0, 20.0, 8.0], [20.0, 18.0, 40.0, 16.0]] * 4)  # the machine is half as fast at times
    rows = [row("chosen", 5.0, 15.0), row("second", 6.0, 13.5), row("third", 8.0, 30.0), row("by hand", None, 12.0)]
    found = regret.judge(rows, times)
    assert (found.candidates, found.best) == (4, "by hand")
    assert found.regret.median == pytest.approx(10 / 8 - 1)
    assert found.by_hand is not None
    assert found.by_hand.median == pytest.approx(0.8)
    assert found.measured_regret == pytest.approx(9 / 8 - 1)  # among those with predictions, the second is fastest
    assert found.rank == pytest.approx(0.5)
    assert found.time_error == pytest.approx(np.mean([10 / 15, 7.5 / 13.5, 22 / 30]))
    assert found.memory_error == pytest.approx(0.1)
    assert found.reachable == pytest.approx(1)


def test_noise_limits_the_rank_that_can_be_reached():
    """The halves of the rounds agree on three plans of four: 1 - 6·2/(4·15) = 0.8."""
    times = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]])
    rows = [row(n, 1.0, 1.0) for n in "abcd"]
    assert regret.judge(rows, times).reachable == pytest.approx((2 * 0.8 / 1.8) ** 0.5)
    assert regret.judge(rows, np.array([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])).reachable == 0
    assert np.isnan(regret.judge(rows, times[:1]).reachable)


def test_luck_in_half_of_the_rounds_is_no_regret():
    """Of equal plans each is fast in its own rounds; those say nothing of the others."""
    times = np.ones((8, 3))
    times[::2, 1] = times[1::2, 2] = 0.5
    found = regret.judge([row(n, 1.0, 1.0) for n in ("chosen", "lucky", "lucky too")], times)
    assert found.regret == Quartiles(0.0, 0.0, 0.0)
    assert found.by_hand is None


def test_plans_are_compared_within_rounds():
    plans = [Candidate(n, None, 1.0, 1.0, lambda s, b: (s, b), (None, None)) for n in ("ours", "slow", "fast")]
    seconds = np.array([[1.0, 2.0, 0.9], [5.0, 10.0, 4.5], [3.0, 6.0, 2.7]])
    best, worst = expert_times.compare(plans, seconds)
    assert (best.candidate.name, best.ratio.median, best.faster) == ("fast", pytest.approx(0.9), True)
    assert (worst.candidate.name, worst.ratio.median, worst.faster) == ("slow", 2.0, False)
    assert quartiles(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == Quartiles(2.0, 3.0, 4.0)


def paths(model: str) -> list[tuple[str, tuple[int, ...]]]:
    params = jax.eval_shape(tiny_tasks()[model].init).params
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [("/".join(re.findall(r"\w+", jax.tree_util.keystr(p))), leaf.shape) for p, leaf in leaves]


@pytest.mark.parametrize("model", ["gpt", "bert", "moe", "llama", "vit", "mlp", "wide_resnet", "unet"])
def test_rules_split_the_weights_of_every_model(model):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("f", "t"))
    rules = (FAMILIES[model].fsdp, FAMILIES[model].tensor) if model in FAMILIES else (FSDP, MEGATRON)
    split = [0, 0]
    for path, shape in paths(model):
        for i, found in enumerate(rules):
            spec = _sharding(mesh, _find(found, path), shape).spec
            split[i] += np.prod(shape) * any(e is not None for e in spec)
    total = sum(np.prod(shape) for _, shape in paths(model))
    assert split[0] > 0.85 * total
    assert split[1] > (0.25 if model in FAMILIES else 0.75) * total


def test_a_spec_can_be_aligned_with_the_last_dims():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("f", "t"))
    assert _sharding(mesh, ">ft", (3, 8, 8)).spec == P(None, ("f",), ("t",))
    assert _sharding(mesh, ">f", (3, 6)).spec == P(None, None)


def test_every_family_has_plans_of_each_kind():
    for kind in FAMILIES:
        found = experts(8, kind)
        assert [e.name for e in found[:3]] == ["DP", "ZeRO-2", "FSDP"]
        assert {e.mesh for e in found} == {(8, 1), (4, 2), (2, 4), (1, 8)}


def toy():
    def step(state, x):
        grads = jax.grad(lambda w: jnp.mean((x @ w) ** 2))(state)
        return state - 0.1 * grads, jnp.sum(x)

    return step, jax.random.normal(jax.random.key(0), (16, 16)), jax.random.normal(jax.random.key(1), (32, 16))


def test_tune_takes_the_plan_that_was_fastest(monkeypatch):
    step, state, x = toy()
    parallel = alpa.parallelize(step)
    seen = []

    def times(step, args, dynamic, plans, rounds):
        seen.extend(plans)
        return [3.0, 1.0, 2.0][: len(plans)]

    monkeypatch.setattr(sys.modules["alpa_like.tune"], "_times", times)
    best = alpa.tune(parallel, state, x, candidates=3, cluster=alpa.Cluster.dgx_a100())
    assert len(seen) == 3
    assert len({plan.stages for plan in seen}) == 3
    assert [p.predicted.step_time_s for p in seen] == sorted(p.predicted.step_time_s for p in seen)
    assert best is seen[1]
    assert parallel.last_executable is not None
    assert parallel.last_executable.plan is best


def test_tune_runs_the_step_and_leaves_its_arguments_alone():
    step, state, x = toy()
    parallel = alpa.parallelize(step)
    methods = [alpa.DataParallel(), alpa.Zero3Parallel()]
    plan = alpa.tune(parallel, state, x, methods=methods, rounds=1, cluster=alpa.Cluster.dgx_a100())
    expected = jax.jit(step)(state, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), parallel(state, x), expected)
    assert parallel.last_executable is not None
    assert parallel.last_executable.plan == plan


def test_tune_says_what_it_needs():
    step, state, x = toy()
    with pytest.raises(MethodError, match="at least 1 candidate and 1 round, found 0 and 7"):
        alpa.tune(alpa.parallelize(step), state, x, candidates=0)
    with pytest.raises(MethodError, match="found '3' and 7"):
        alpa.tune(alpa.parallelize(step), state, x, candidates="3")
    with pytest.raises(MethodError, match=r"needs a step that alpa\.parallelize made, found <function"):
        alpa.tune(step, state, x)
    with pytest.raises(MethodError, match=r"needs methods=\.\.\. for a step with the method PipeshardParallel"):
        sys.modules["alpa_like.tune"]._methods(alpa.PipeshardParallel(num_micro_batches=2), 8)


def test_random_layouts_divide_what_they_split():
    rng = candidates.random.Random(1)
    for mesh in candidates.MESHES:
        sizes = dict(zip("xyz", mesh, strict=False))
        for _ in range(50):
            spec = candidates._random_spec((16, 6, 8), mesh, 1 / 3, rng)
            for dim, name in zip((16, 6, 8), spec or (), strict=False):
                assert name is None or dim % sizes[name] == 0
