"""Is the planner's optimum the optimum? Against brute force, between solvers, and against the whole integer program.

    python -m benchmarks.exactness                        # 300 random problems, and those of nine train steps
    python -m benchmarks.exactness --problems 500 --no-models
    python -m benchmarks.exactness --quick

1. Small random problems (`passes.assignment`): chains, trees and graphs with cycles, equal parts around a hub, costs
   that tie, forbidden choices, memory limits that bind. `passes.solve` (eliminate, fold, narrow, then the integer
   program) and `passes.ilp` (the integer program alone), each with HiGHS and CBC, against trying every combination.
2. The problems of real train steps, for a DGX A100: `passes.solve` against `passes.ilp`, which gets the whole problem:
   nothing eliminated, no equal layers folded. A row says "open" where the integer program ran out of time; then ours
   must lie between its bound and the best that it found. "memory" is the limit, as a share of what the optimum without
   a limit takes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import jax
import numpy as np
import optax

import alpa_like as alpa
from alpa_like.errors import InfeasibleError
from alpa_like.models import GPTConfig, MLPConfig, Task, gpt_task, mlp_task
from alpa_like.passes import ilp, planner
from alpa_like.passes.assignment import AssignmentProblem, Costs, Solution, Usage, brute_force
from alpa_like.passes.solve import solve
from benchmarks.common import Mesh, mesh_text, parser, table

TOLERANCE = 1e-6
"""Relative; what the solvers call optimal."""

MAX_COMBINATIONS = 5000

Solver = Callable[[AssignmentProblem], Solution]

SOLVERS: dict[str, Solver] = {
    "solve, HiGHS": lambda p: solve(p, solver="HiGHS"),
    "solve, CBC": lambda p: solve(p, solver="CBC"),
    "ilp, HiGHS": lambda p: ilp.solve(p, solver="HiGHS"),
    "ilp, CBC": lambda p: ilp.solve(p, solver="CBC"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables; exit with 1 where an optimum is missed."""
    options = _options(arguments)
    wrong = _random_problems(options.problems)
    if options.models:
        alpa.init(num_devices=1)
        wrong += _train_steps(_steps()[:2] if options.quick else _steps(), options.time_limit)
    raise SystemExit(1 if wrong else 0)


# ------------------------------------------------------------------------------------------------ random problems


@dataclass
class Tally:
    """What became of the problems under one solver. `error` is the largest relative distance to the optimum."""

    equal: int = 0
    infeasible: int = 0
    wrong: int = 0
    error: float = 0.0
    seconds: float = 0.0

    def add(self, best: float, found: float, seconds: float) -> bool:
        """Count one problem; inf means that nothing fits. True if brute force agrees."""
        error = 0.0 if found == best else abs(found - best) / max(abs(best), 1e-12)
        good = error <= TOLERANCE
        self.equal += good and np.isfinite(best)
        self.infeasible += good and not np.isfinite(best)
        self.wrong += not good
        self.error, self.seconds = max(self.error, error), self.seconds + seconds
        return good


def _random_problems(count: int) -> int:
    """Print the table of part 1; the number of wrong answers."""
    tallies, binding = {name: Tally() for name in SOLVERS}, 0
    for seed in range(count):
        problem = random_problem(np.random.default_rng(seed))
        best = brute_force(problem)[0]
        binding += best > brute_force(replace(problem, limit=np.inf))[0] if np.isfinite(problem.limit) else 0
        for name, solver in SOLVERS.items():
            start = time.perf_counter()
            found = _optimum(solver, problem)
            if not tallies[name].add(best, found, time.perf_counter() - start):
                print(f"WRONG: seed {seed}, {name}: {found}, brute force: {best}")
    rows = [
        (name, str(count), str(t.equal), str(t.infeasible), str(t.wrong), f"{t.error:.0e}", f"{t.seconds:.1f}")
        for name, t in tallies.items()
    ]
    heads = ("random problems", "problems", "same optimum", "same: nothing fits", "wrong", "largest error", "s")
    print(f"{table(heads, rows)}\nThe memory limit changes the optimum of {binding} of them.\n", flush=True)
    return sum(t.wrong for t in tallies.values())


def _optimum(solver: Solver, problem: AssignmentProblem) -> float:
    """The cost of the solution, inf where nothing fits. The limit is checked here, not believed."""
    try:
        choice = solver(problem).choice
    except InfeasibleError:
        return np.inf
    fits = problem.memory(choice)[0] <= problem.limit * (1 + TOLERANCE)
    return problem.cost(choice) if fits else -np.inf


def random_problem(rng: np.random.Generator) -> AssignmentProblem:
    """A problem of at most `MAX_COMBINATIONS` combinations, of any of the kinds named above."""
    part = int(rng.integers(1, 4))
    hub, copies = bool(rng.integers(2)), int(rng.integers(1, 4))
    sizes = [int(n) for n in rng.integers(2, 4, part)] * copies + [int(rng.integers(2, 5))] * hub
    while np.prod(sizes) > MAX_COMBINATIONS:
        sizes, copies = sizes[part:], copies - 1
    draw = _Costs(rng, ties=bool(rng.integers(2)))
    shared = [draw(n) for n in sizes[:part]]
    unary = tuple(shared[i % part] if i < part * copies else draw(n) for i, n in enumerate(sizes))
    problem = AssignmentProblem(unary, _pairs(rng, draw, sizes, part, copies, hub))
    return _with_memory(rng, problem, part * copies, part) if rng.integers(2) else problem


@dataclass
class _Costs:
    """Draws tables of costs: whole numbers that tie, or any; some of the pairs are forbidden."""

    rng: np.random.Generator
    ties: bool

    def __call__(self, *shape: int) -> Costs:
        costs = self.rng.integers(0, 4, shape).astype(float) if self.ties else self.rng.random(shape)
        if len(shape) == 2 and self.rng.random() < 0.3:
            costs[self.rng.random(shape) < 0.25] = np.inf
        return costs


def _pairs(
    rng: np.random.Generator, draw: _Costs, sizes: list[int], part: int, copies: int, hub: bool
) -> dict[tuple[int, int], Costs]:
    """Equal edges inside equal parts and from them to the hub, which is the last node; the parts may form a chain."""
    pairs: dict[tuple[int, int], Costs] = {}
    inside = [(i, j) for i in range(part) for j in range(i + 1, part) if rng.random() < 0.8]
    tables = {e: draw(sizes[e[0]], sizes[e[1]]) for e in inside}
    to_hub = {i: draw(sizes[i], sizes[-1]) for i in range(part) if hub and rng.random() < 0.7}
    link = draw(sizes[part - 1], sizes[0]) if rng.random() < 0.5 else None
    for first in range(0, part * copies, part):
        pairs |= {(first + i, first + j): tables[(i, j)] for i, j in inside}
        pairs |= {(first + i, len(sizes) - 1): costs for i, costs in to_hub.items()}
        if link is not None and first:
            pairs[(first - 1, first)] = link
    return pairs


def _with_memory(rng: np.random.Generator, problem: AssignmentProblem, repeated: int, part: int) -> AssignmentProblem:
    """Bytes for every node at some times, equal for equal nodes, and a limit that some choices break."""
    tables = [rng.integers(0, 2**20, len(c)).astype(float) for c in problem.unary]
    spans = [sorted(int(t) for t in rng.choice(6, 2, replace=False)) for _ in problem.unary]
    alike = [i % part if i < repeated else i for i in range(len(tables))]
    usages = tuple(Usage(i, spans[k][0], spans[k][1], tables[k]) for i, k in enumerate(alike))
    peaks = [
        replace(problem, usages=usages).memory([int(rng.integers(len(c))) for c in problem.unary])[0] for _ in range(40)
    ]
    limit = float(np.quantile(peaks, rng.choice([0.0, 0.05, 0.3])))
    return replace(problem, usages=usages, limit=limit)


# ------------------------------------------------------------------------------------------------ train steps


@dataclass(frozen=True, slots=True)
class Step:
    """A train step on a mesh. `memory` is the limit as a share of what the optimum without a limit takes; 0: none."""

    name: str
    task: Task
    mesh: Mesh
    memory: float = 0.0


def _steps() -> list[Step]:
    def gpt(layers: int, mesh: Mesh, memory: float = 0.0) -> Step:
        task = gpt_task(GPTConfig(1024, 128, 256, 8, layers), 16, optax.adam(1e-3))
        return Step(f"GPT, {layers} layers", task, mesh, memory)

    def dense(layers: int, memory: float = 0.0) -> Step:
        task = mlp_task(MLPConfig((1024,) * (layers + 1)), 256, optax.sgd(0.1))
        return Step(f"Dense, {layers} equal layers", task, (2, 4), memory)

    free = [gpt(2, (8,)), dense(4), gpt(4, (8,)), dense(8), gpt(2, (2, 4))]
    return [*free, gpt(2, (8,), 0.8), dense(4, 0.9), gpt(4, (8,), 0.9), dense(8, 0.9)]


def _train_steps(steps: Sequence[Step], time_limit_s: float) -> int:
    """Print the table of part 2; the number of wrong answers."""
    rows = [_compare(step, time_limit_s) for step in steps]
    heads = ("train step", "mesh", "memory", "nodes", "ours ms", "variables", "s", "whole program ms", "variables", "s")
    print(table((*heads, "difference", "verdict"), rows))
    return sum(row[-1] == "WRONG" for row in rows)


def problem_of(task: Task, mesh: Mesh) -> AssignmentProblem:
    """The problem that the planner solves for a task on a mesh of a DGX A100."""
    found: list[AssignmentProblem] = []

    def record(problem: AssignmentProblem, **options: Any) -> Solution:
        found.append(problem)
        return solve(problem, **options)

    step = alpa.parallelize(task.step, method=alpa.ShardParallel(mesh_shape=mesh))
    with mock.patch.object(planner, "solve", record):
        step.plan(jax.eval_shape(task.init), task.abstract_batch(), cluster=alpa.Cluster.dgx_a100())
    return found[-1]


def _compare(step: Step, time_limit_s: float) -> tuple[str, ...]:
    problem = problem_of(step.task, step.mesh)
    if step.memory:
        free = replace(problem, limit=np.inf)
        problem = replace(problem, limit=step.memory * free.memory(solve(free).choice)[0])
    ours, whole = solve(problem), ilp.solve(problem, time_limit_s=time_limit_s)
    difference, low = (ours.cost - whole.cost) / whole.cost, whole.bound * (1 - TOLERANCE)
    good = low <= ours.cost <= whole.cost * (1 + TOLERANCE)
    verdict = ("same" if whole.status == "optimal" else "open") if good else "WRONG"
    about = (step.name, mesh_text(step.mesh), f"{step.memory:.0%}" if step.memory else "", str(len(problem.unary)))
    figures = [(f"{s.cost * 1e3:.9f}", str(s.variables), f"{s.seconds:.1f}") for s in (ours, whole)]
    return *about, *figures[0], *figures[1], f"{difference:+.0e}", verdict


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--problems", type=int, default=300, help="random problems")
    p.add_argument("--models", action=argparse.BooleanOptionalAction, default=True, help="the problems of train steps")
    p.add_argument("--time-limit", type=float, default=120.0, help="seconds for each whole integer program")
    p.add_argument("--quick", action="store_true", help="20 random problems, two train steps")
    options = p.parse_args(arguments)
    options.problems = min(options.problems, 20) if options.quick else options.problems
    return options


if __name__ == "__main__":
    main()
