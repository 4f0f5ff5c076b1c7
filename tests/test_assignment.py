"""The solvers of `AssignmentProblem` against trying every combination."""

import itertools
from dataclasses import replace

import numpy as np
import pulp
import pytest

from alpa_like.errors import InfeasibleError, SolverError
from alpa_like.passes import ilp
from alpa_like.passes.assignment import AssignmentProblem, Usage, brute_force
from alpa_like.passes.eliminate import eliminate
from alpa_like.passes.fold import fold
from alpa_like.passes.solve import solve

INF = np.inf
FINDERS = {"highs": (ilp.solve, "HiGHS"), "cbc": (ilp.solve, "CBC"), "whole way": (solve, "HiGHS")}


def random_problem(seed, *, memory):
    """2 to 6 nodes of 1 to 4 choices, some isolated; odd seeds have ties; a tenth of the costs forbid.

    With `memory` a limit that excludes at least one allowed combination, where there are two different ones.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, rng.integers(2, 7))

    def costs(*shape):
        values = rng.integers(0, 5, shape).astype(float) if seed % 2 else rng.random(shape)
        return np.where(rng.random(shape) < 0.1, INF, values)

    unary = [costs(n) for n in sizes]
    for c in unary:
        c[0] = min(c[0], 7.0)
    edges = itertools.combinations(range(len(sizes)), 2)
    pairs = {(i, j): costs(sizes[i], sizes[j]) for i, j in edges if rng.random() < 0.5}
    nodes = [int(i) for i in rng.integers(0, len(sizes), 8 if memory else 0)]
    starts = [int(s) for s in rng.integers(0, 6, len(nodes))]
    usages = [Usage(i, s, s + 2, rng.integers(-2, 9, sizes[i]) * 1e6) for i, s in zip(nodes, starts, strict=True)]
    problem = AssignmentProblem(tuple(unary), pairs, tuple(usages))
    return replace(problem, limit=tight_limit(problem)) if memory else problem


def tight_limit(problem):
    """Half way between the least peak and that of the optimum without a limit."""
    choices = itertools.product(*(range(len(c)) for c in problem.unary))
    peaks = [problem.memory(c)[0] for c in choices if np.isfinite(problem.cost(c))]
    best = brute_force(problem)
    return (min(peaks) + problem.memory(best[1])[0]) / 2 if peaks else INF


def chain(parts, inside, between):
    """Equal nodes in a row; one array object for each kind, as the planner makes them."""
    pairs = {(i, i + 1): between for i in range(parts - 1)}
    return AssignmentProblem((inside,) * parts, pairs)


def hub(parts, *, usages=()):
    """A hub of 3 choices and equal parts of two nodes each, joined to it."""
    rng = np.random.default_rng(7)
    inner, outer, first, second = rng.random(3), rng.random(2), rng.random((3, 3)), rng.random((3, 2))
    pairs = {}
    for k in range(parts):
        pairs |= {(0, 1 + 2 * k): first, (1 + 2 * k, 2 + 2 * k): second}
    return AssignmentProblem((rng.random(3), *(inner, outer) * parts), pairs, usages)


def check(problem, solution):
    """The solution is what it says, keeps the limit, and costs what the best combination costs."""
    cost, _ = brute_force(problem)
    assert solution.cost == pytest.approx(problem.cost(solution.choice), abs=1e-12)
    assert problem.memory(solution.choice)[0] <= problem.limit * (1 + 1e-9)
    assert solution.status == "optimal"
    assert solution.cost == pytest.approx(cost, rel=1e-6, abs=1e-9)
    assert solution.bound <= solution.cost
    assert solution.gap <= 2e-6


@pytest.mark.parametrize("memory", [False, True], ids=["free", "limited"])
@pytest.mark.parametrize("finder", FINDERS)
def test_solvers_equal_brute_force(finder, memory):
    find, solver = FINDERS[finder]
    feasible = 0
    for seed in range(70):
        problem = random_problem(seed, memory=memory)
        if np.isfinite(brute_force(problem)[0]):
            check(problem, find(problem, solver=solver))
            feasible += 1
        else:
            with pytest.raises(InfeasibleError):
                find(problem, solver=solver)
    assert feasible >= (40 if memory else 60)


@pytest.mark.parametrize(("max_entries", "at_least"), [(1, 20), (6, 150), (600_000, 200)])
def test_elimination_changes_nothing(max_entries, at_least):
    eliminated = 0
    for seed in range(70):
        problem = random_problem(seed, memory=False)
        keep = frozenset(range(0, len(problem.unary), 3)) if seed % 2 else frozenset[int]()
        reduced = eliminate(problem, keep, max_entries)
        cost, choice = brute_force(reduced.problem)
        assert keep <= set(reduced.kept)
        eliminated += len(problem.unary) - len(reduced.kept)
        assert cost + reduced.offset == pytest.approx(brute_force(problem)[0])
        if np.isfinite(cost):
            assert problem.cost(reduced.expand(choice)) == pytest.approx(cost + reduced.offset)
    assert eliminated >= at_least


@pytest.mark.parametrize("memory", [False, True], ids=["free", "limited"])
def test_narrowing_changes_nothing(monkeypatch, memory):
    """Every problem counts as large, and nothing is eliminated first."""
    monkeypatch.setattr("alpa_like.passes.solve._NARROW_ABOVE", 4)
    monkeypatch.setattr(
        "alpa_like.passes.solve.eliminate", lambda problem, keep=frozenset(), **_: eliminate(problem, keep, 0)
    )
    for seed in range(70):
        problem = random_problem(seed, memory=memory)
        if np.isfinite(brute_force(problem)[0]):
            check(problem, solve(problem))


def test_folding_random_problems_changes_nothing():
    for seed in range(70):
        problem = random_problem(seed, memory=False)
        twice = AssignmentProblem(
            problem.unary * 2,
            problem.pairs
            | {(i + len(problem.unary), j + len(problem.unary)): c for (i, j), c in problem.pairs.items()},
        )
        folded = fold(twice)
        cost, choice = brute_force(folded.problem)
        assert len(folded.problem.unary) <= len(problem.unary)
        assert cost == pytest.approx(2 * brute_force(problem)[0])
        if np.isfinite(cost):
            assert twice.cost(folded.expand(choice)) == pytest.approx(cost)


def test_equal_parts_at_a_hub_fold_into_one():
    problem = hub(5)
    folded = fold(problem)
    assert len(folded.problem.unary) == 3
    cost, choice = brute_force(folded.problem)
    assert cost == pytest.approx(problem.cost(folded.expand(choice)))
    check(problem, solve(problem))
    check(problem, replace(solve(folded.problem), choice=folded.expand(choice)))
    assert len(fold(hub(50)).problem.unary) == 3


def test_equal_parts_in_a_chain_stay_free_to_alternate():
    inside, between = np.zeros(2), np.array([[1.0, 0.0], [0.0, 1.0]])
    problem = chain(7, inside, between)
    assert solve(problem).choice in [(0, 1) * 3 + (0,), (1, 0) * 3 + (1,)]
    folded = fold(problem)
    cost, choice = brute_force(folded.problem)
    assert cost == 0.0 == problem.cost(folded.expand(choice))


@pytest.mark.parametrize("split", range(7))
def test_under_a_limit_any_number_of_equal_parts_can_give_way(split):
    """Six parts would take 2 MB each; the limit lets `6 - split` of them do so."""
    fast, pair = np.array([1.0, 2.0]), np.zeros((1, 2))
    usages = tuple(Usage(1 + k, 0, 1, np.array([2e6, 1e6])) for k in range(6))
    problem = AssignmentProblem((np.zeros(1), *(fast,) * 6), {(0, 1 + k): pair for k in range(6)}, usages)
    solution = solve(replace(problem, limit=12e6 - split * 1e6))
    assert solution.cost == pytest.approx(6.0 + split)
    assert sum(solution.choice) == split


def test_a_deep_chain_is_solved_without_an_integer_program():
    rng = np.random.default_rng(0)
    problem = chain(300, rng.random(6), rng.random((6, 6)))
    best = problem.unary[0]
    for _ in range(299):
        best = (best[:, None] + problem.pairs[(0, 1)]).min(0) + problem.unary[0]
    solution = solve(problem)
    assert solution.variables == 0
    assert solution.cost == pytest.approx(best.min())
    assert solution.cost == pytest.approx(problem.cost(solution.choice))


@pytest.mark.parametrize("finder", FINDERS)
def test_a_limit_that_nothing_fits_is_an_error(finder):
    find, solver = FINDERS[finder]
    usages = tuple(Usage(i, 0, 2, np.array([3e6, 2e6])) for i in range(3))
    problem = AssignmentProblem((np.zeros(2),) * 3, {}, usages, limit=6e6)
    assert find(problem, solver=solver).choice == (1, 1, 1)
    with pytest.raises(InfeasibleError, match="limit"):
        find(replace(problem, limit=5.9e6), solver=solver)


@pytest.mark.parametrize("finder", FINDERS)
def test_choices_that_exclude_each_other_are_an_error(finder):
    find, solver = FINDERS[finder]
    second, first = np.array([[INF, INF], [INF, 1.0]]), np.array([[0.0, 0.0], [INF, INF]])  # choices of node 1
    with pytest.raises(InfeasibleError):
        find(AssignmentProblem((np.zeros(2),) * 3, {(0, 1): second, (1, 2): first}), solver=solver)


def test_malformed_problems_are_refused():
    with pytest.raises(SolverError, match="node 0 has no allowed choice"):
        solve(AssignmentProblem((np.array([INF, INF]),), {}))
    with pytest.raises(SolverError, match=r"pair \(0, 1\) has costs of shape \(1, 2\)"):
        solve(AssignmentProblem((np.zeros(2), np.zeros(2)), {(0, 1): np.zeros((1, 2))}))
    with pytest.raises(SolverError, match="'glpk' is not available"):
        ilp.solve(AssignmentProblem((np.zeros(2),), {}), solver="glpk")


@pytest.mark.parametrize("solver", ["HiGHS", "CBC"])
def test_when_time_runs_out_the_gap_is_stated(solver):
    """15 nodes, each paired with all others: more than a second for either solver."""
    rng = np.random.default_rng(0)
    pairs = {edge: rng.random((5, 5)) for edge in itertools.combinations(range(15), 2)}
    problem = AssignmentProblem(tuple(rng.random(5) for _ in range(15)), pairs)
    solution = solve(problem, solver=solver, time_limit_s=0.1)
    assert solution.status == "feasible"
    assert solution.cost == pytest.approx(problem.cost(solution.choice))
    assert solution.gap == pytest.approx((solution.cost - solution.bound) / solution.cost)
    assert 0.05 < solution.gap <= 1.0
    assert solution.seconds < 5.0


def test_a_solver_that_finds_nothing_in_time_is_an_error(monkeypatch):
    class Silent(pulp.LpSolver):
        def actualSolve(self, lp):  # noqa: N802 - PuLP's name
            return lp.assignStatus(pulp.LpStatusNotSolved)

    monkeypatch.setattr(ilp, "_engine", lambda *_: (Silent(), "HiGHS"))
    with pytest.raises(SolverError, match="HiGHS found no plan in 3 s"):
        ilp.solve(AssignmentProblem((np.zeros(2),), {}), time_limit_s=3.0)


def test_memory_by_hand():
    """Node 0 holds 5 or 1 in [0, 4), node 1 holds 2 in [2, 3) and 7 in [4, 5), 10 are always in use."""
    usages = (Usage(0, 0, 4, np.array([5.0, 1.0])), Usage(1, 2, 3, np.array([2.0])), Usage(1, 4, 5, np.array([7.0])))
    problem = AssignmentProblem((np.zeros(2), np.zeros(1)), {}, usages, fixed_bytes=10.0)
    assert problem.memory((0, 0)) == (17.0, 2)
    assert problem.memory((1, 0)) == (17.0, 4)
    assert [u.start for u in problem.alive(2)] == [0, 2]
    assert AssignmentProblem((np.zeros(2),), {}).memory((0,)) == (0.0, 0)


def test_equal_problems_get_equal_choices():
    for seed in range(1, 40, 2):  # those with ties
        problem = random_problem(seed, memory=True)
        if np.isfinite(brute_force(problem)[0]):
            first, second = (solve(random_problem(seed, memory=True), solver="HiGHS") for _ in range(2))
            assert first.choice == second.choice
