"""Narrowing and pricing against brute force: what is dropped was never needed, what is claimed is true."""

import itertools
import math

import numpy as np
import pytest

from alpa_like.errors import InfeasibleError
from alpa_like.passes import ilp
from alpa_like.passes.assignment import AssignmentProblem, Costs, Usage, brute_force
from alpa_like.passes.eliminate import Memo, eliminate
from alpa_like.passes.narrow import _Bound, charged, flow_entries, narrow, priced
from alpa_like.passes.solve import estimate, least_memory, solve


def random_problem(seed: int, *, memory: bool = False, nodes: int = 6) -> AssignmentProblem:
    rng = np.random.default_rng(seed)
    sizes = [int(rng.integers(1, 5)) for _ in range(nodes)]
    unary = tuple(rng.integers(0, 30, n).astype(float) for n in sizes)
    pairs = {
        (i, j): np.where(rng.random((sizes[i], sizes[j])) < 0.1, np.inf, rng.integers(0, 30, (sizes[i], sizes[j])))
        for i in range(nodes)
        for j in range(i + 1, nodes)
        if rng.random() < 0.6
    }
    if not memory:
        return AssignmentProblem(unary, pairs)
    starts = rng.integers(0, 5, 2 * nodes)
    usages = tuple(
        Usage(k % nodes, int(s), int(s + rng.integers(1, 4)), rng.integers(0, 10, sizes[k % nodes]).astype(float))
        for k, s in enumerate(starts)
    )
    return AssignmentProblem(unary, pairs, usages, limit=float(rng.integers(8, 30)))


@pytest.mark.parametrize("seed", range(25))
def test_bound_never_exceeds_the_optimum_and_never_falls(seed: int) -> None:
    problem = random_problem(seed)
    optimum, _ = brute_force(problem)
    bound = _Bound.of(problem, {})
    values = [bound.value()]
    for _ in range(10):
        bound.sweep()
        values.append(bound.value())
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(values))
    assert values[-1] <= optimum + 1e-9


@pytest.mark.parametrize("seed", range(25))
def test_narrowing_keeps_the_optimum(seed: int) -> None:
    problem = random_problem(seed)
    optimum, _ = brute_force(problem)
    if not np.isfinite(optimum):
        return
    narrowed = narrow(problem, ilp.solve, target=12)
    choice = narrowed.expand(ilp.solve(narrowed.problem).choice)
    assert problem.cost(choice) == pytest.approx(optimum)
    assert flow_entries(narrowed.problem) <= flow_entries(problem)


def test_narrowing_of_a_chain_leaves_one_choice_per_node() -> None:
    """On a tree the dual bound is tight, so everything but the optimum can be dropped."""
    rng = np.random.default_rng(1)
    unary = tuple(rng.random(40) for _ in range(12))
    problem = AssignmentProblem(unary, {(i, i + 1): rng.random((40, 40)) for i in range(11)})
    narrowed = narrow(problem, ilp.solve, target=1)
    assert max(len(c) for c in narrowed.choices) == 1


@pytest.mark.parametrize("seed", range(2))
def test_elimination_and_narrowing_take_turns_to_the_optimum(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid that is too wide for elimination alone, and too large for the integer program as it is."""
    rng = np.random.default_rng(seed)
    nodes = [(row, column) for row in range(5) for column in range(5)]
    edges = [(i, j) for i, a in enumerate(nodes) for j, b in enumerate(nodes) if i < j and math.dist(a, b) == 1]
    problem = AssignmentProblem(tuple(rng.random(6) for _ in nodes), {e: rng.random((6, 6)) for e in edges})
    optimum = ilp.solve(problem).cost
    monkeypatch.setattr("alpa_like.passes.solve._NARROW_ABOVE", 150)
    monkeypatch.setattr(
        "alpa_like.passes.solve.eliminate",
        lambda problem, memo=None, **_: eliminate(problem, max_entries=300, memo=memo),
    )
    assert solve(problem).cost == pytest.approx(optimum, rel=1e-9)
    assert estimate(problem).cost >= optimum * (1 - 1e-9)


def test_what_eliminations_made_serves_problems_with_the_same_arrays() -> None:
    """Nodes whose costs have not changed meet what was made of them before; the others do not."""
    rng = np.random.default_rng(2)
    unary = tuple(rng.random(5) for _ in range(8))
    pairs = {(i, i + 1): rng.random((5, 5)) for i in range(7)}
    memo = Memo()
    first = eliminate(AssignmentProblem(unary, pairs), memo=memo)
    made = len(memo.made)
    changed = AssignmentProblem((*unary[:-1], unary[-1] + rng.random(5)), pairs)
    second = eliminate(changed, memo=memo)
    assert first.expand(()) == eliminate(AssignmentProblem(unary, pairs)).expand(())
    assert second.expand(()) == eliminate(changed).expand(())
    assert made < len(memo.made) < 2 * made


def test_a_price_on_bytes_makes_equal_costs_equal_objects() -> None:
    costs, used = np.arange(3.0), np.array([4.0, 2.0, 1.0])
    usages, made = [Usage(0, 0, 1, used), Usage(1, 0, 2, used)], dict[object, tuple[Costs, Costs, Costs]]()
    left, right, other = charged((costs, costs, costs), usages, 0.5, made)
    assert left.tolist() == [2.0, 2.0, 2.5]
    assert left is right
    assert other is costs
    assert charged((costs, costs, costs), usages, 0.5, made)[0] is left


@pytest.mark.parametrize("seed", range(40))
def test_memory_limited_optimum_equals_brute_force(seed: int) -> None:
    problem = random_problem(seed, memory=True)
    optimum, _ = brute_force(problem)
    if np.isfinite(optimum):
        solution = solve(problem)
        assert solution.cost == pytest.approx(optimum)
        assert solution.bound <= optimum + 1e-6
        assert problem.memory(solution.choice)[0] <= problem.limit
    else:
        with pytest.raises(InfeasibleError):
            solve(problem)


@pytest.mark.parametrize("seed", range(20))
def test_prices_give_a_lower_bound(seed: int) -> None:
    problem = random_problem(seed, memory=True)
    optimum, _ = brute_force(problem)
    weighed, room = priced(problem, {1: 0.7, 3: 2.0})
    free, _ = brute_force(weighed)
    assert free - room <= optimum + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_least_memory_is_a_lower_bound_that_is_met_at_one_time(seed: int) -> None:
    problem = random_problem(seed, memory=True, nodes=4)
    shape = [range(len(c)) for c in problem.unary]
    choices = [tuple(c) for c in np.stack(np.meshgrid(*shape, indexing="ij"), -1).reshape(-1, len(shape)).tolist()]
    peaks = [problem.memory(c)[0] for c in choices if np.isfinite(problem.cost(c))]
    if peaks:
        assert least_memory(problem) <= min(peaks) + 1e-9


@pytest.mark.parametrize("seed", range(30))
def test_a_gap_is_stated_and_kept(seed: int) -> None:
    problem = random_problem(seed, memory=True)
    optimum, _ = brute_force(problem)
    if np.isfinite(optimum):
        loose = solve(problem, gap=0.5)
        assert loose.bound <= optimum + 1e-6 <= loose.cost + 2e-6
        assert loose.gap <= 0.5
