"""From function to plan, stages and shardings included, for the models and clusters of the papers.

    python -m benchmarks.pipeline_plan_time                        # all four
    python -m benchmarks.pipeline_plan_time --cases gpt-39b        # one of them
    python -m benchmarks.pipeline_plan_time --show                 # also the plans

    gpt-39b            on 8 × p3.16xlarge, 64 V100       Alpa: 2393 s on that cluster (OSDI'22, table 5)
    gpt-13b            on 4 × p3.16xlarge, 32 V100       Alpa: 12,821 s, Aceso: about 200 s (EuroSys'24 artifact)
    gpt-1024-layers    on 8 × p3.16xlarge, scanned       Alpa: none, Aceso: 246 s (same)
    wresnet-13b        on 4 × p3.16xlarge                Alpa: 44,743 s, Aceso: 225 s (same)

The step is forward, backward and Adam, float16 compute and float32 state for the GPTs, batch 1024 in 64 micro-batches
(Wide-ResNet: float32, 1536 images in 48). Nothing is allocated and no device of the cluster is needed. What took how
long is shown: `trace` calls the user's code (twice), `cut` makes micro-batches and layers, `price` shards single
layers and pairs of them, `search` is the dynamic program, `write` shards the chosen stages and writes the plan.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax

import alpa_like as alpa
from alpa_like import api
from alpa_like.models import GPTConfig, gpt_task
from alpa_like.models.paper import paper_gpt, paper_wide_resnet
from alpa_like.models.tasks import Task
from alpa_like.passes import microbatch, pipeline, pipeline_planner, stage_costs
from alpa_like.plan import Plan
from benchmarks.common import parser, table

COLUMNS = ("init", "trace", "cut", "price", "search", "write", "other", "total")


@dataclass(frozen=True, slots=True)
class Case:
    """A model, hosts of 8 V100 and options of the method."""

    task: Callable[[], Task]
    hosts: int
    options: dict[str, Any]


CASES: dict[str, Case] = {
    "gpt-39b": Case(lambda: paper_gpt("39B"), 8, {"num_micro_batches": 64}),
    "gpt-13b": Case(lambda: paper_gpt("13B"), 4, {"num_micro_batches": 64}),
    "gpt-1024-layers": Case(lambda: paper_gpt("1024 layers", scan_layers=True), 8, {"num_micro_batches": 64}),
    "wresnet-13b": Case(
        lambda: paper_wide_resnet("13B"), 4, {"num_micro_batches": 48, "batch_statistics": "micro_batch"}
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row per model."""
    options = _options(arguments)
    alpa.init(num_devices=1)
    _warm_up()
    rows: list[tuple[str, ...]] = []
    for name in options.cases:
        plan, seconds = _plan(CASES[name])
        rows.append(_row(name, plan, seconds))
        print(f"{plan if options.show else _stages(plan)}\n", flush=True)
    print(table(("model", *(f"{c} s" for c in COLUMNS), "stages", "schedule", "step s", "GiB"), rows))


def _plan(case: Case) -> tuple[Plan, dict[str, float]]:
    """The plan, and the seconds that each part took; `total` is from the step function to the plan."""
    task = case.task()
    clock = _Clock()
    with clock.timed("init"):
        state = jax.eval_shape(task.init)
    step = alpa.parallelize(task.step, method=alpa.PipeshardParallel(**case.options))
    with contextlib.ExitStack() as patches:
        for owner, name, column in (
            (api, "trace", "trace"),
            (microbatch, "_retraced", "trace"),
            (pipeline_planner._Planner, "layers", "cut"),  # pyright: ignore[reportPrivateUsage]
            (pipeline_planner, "cut_trace", "cut"),
            (stage_costs.LayerCosts, "solve", "price"),
            (pipeline_planner, "search", "search"),
            (pipeline.PipelineWriter, "plan", "write"),
        ):
            patches.enter_context(mock.patch.object(owner, name, clock.counted(column, getattr(owner, name))))
        with clock.timed("total"):
            plan = step.plan(state, task.abstract_batch(), cluster=alpa.Cluster.p3_16xlarge(hosts=case.hosts))
    seconds = {c: clock.seconds.get(c, 0.0) for c in COLUMNS}
    seconds["other"] = seconds.pop("total")
    return plan, seconds | {"total": sum(v for c, v in seconds.items() if c != "init")}


class _Clock:
    """Seconds by column; what is timed inside something else is taken from that."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextlib.contextmanager
    def timed(self, column: str) -> Generator[None]:
        """Add the time of a block to a column."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            whole, inner = time.perf_counter() - start, self._inner.pop()
            self.seconds[column] = self.seconds.get(column, 0.0) + whole - inner
            self._inner[-1] += whole

    def counted(self, column: str, fun: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls count for a column."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.timed(column):
                return fun(*args, **kwargs)

        return call


def _warm_up() -> None:
    """Plan something tiny, so that imports, MLIR and the solver have started."""
    task = gpt_task(GPTConfig(64, 16, 32, 4, 2), 8)
    step = alpa.parallelize(task.step, method=alpa.PipeshardParallel(num_micro_batches=2))
    step.plan(jax.eval_shape(task.init), task.abstract_batch(), cluster=alpa.Cluster.p3_16xlarge())


def _stages(plan: Plan) -> str:
    """The first lines of a plan: all but the tensors."""
    lines = str(plan).splitlines()
    return "\n".join(lines[: next((i for i, line in enumerate(lines) if line.startswith("stage ")), None)])


def _row(name: str, plan: Plan, seconds: dict[str, float]) -> tuple[str, ...]:
    pipe = plan.pipeline
    how = (str(len(pipe.stages)), pipe.schedule) if pipe else ("1", "none")
    figures = (f"{plan.predicted.step_time_s:.2f}", f"{plan.predicted.peak_memory_bytes / 2**30:.1f}")
    return name, *(f"{seconds[c]:.1f}" for c in COLUMNS), *how, *figures


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    p.add_argument("--show", action="store_true", help="print the whole plans")
    return p.parse_args(arguments)


if __name__ == "__main__":
    main()
