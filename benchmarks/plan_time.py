"""From function to plan: LLaMA 3 8B, its layers varied, sharded over 32 hosts of 8 H100 as a 32 x 8 mesh.

    python -m benchmarks.plan_time                        # 8, 32 and 128 layers, with rematerialization
    python -m benchmarks.plan_time --layers 8 --no-remat
    python -m benchmarks.plan_time --layers 2 --hosts 4   # something small

A step is forward, backward and Adam in mixed precision (bfloat16 compute, float32 state), 64 sequences of 1024 tokens.
Nothing is allocated and no device of the cluster is needed. Each size is planned once in this process, smallest first;
imports and JAX's start are not counted (`init` shapes the state and is shown). 32 layers are the real model.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any
from unittest import mock

import jax
import optax

import alpa_like as alpa
from alpa_like import api, tracer
from alpa_like.models import LlamaConfig, llama_task
from alpa_like.passes import planner
from alpa_like.plan import Plan
from benchmarks.common import mesh_text, parser, table

BATCH, SEQ = 64, 1024

PARTS: dict[str, str] = {
    "form_groups": "group",
    "Liveness": "group",
    "build": "build",
    "solve": "solve",
    "_write": "write",
}
"""Calls of `passes/planner.py` that are timed, and the column that each counts for."""

COLUMNS: tuple[str, ...] = ("init", "trace", "graph", "group", "build", "solve", "write", "other", "total")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row per number of layers."""
    options = _options(arguments)
    alpa.init(num_devices=1)
    _warm_up()
    cluster = alpa.Cluster.dgx_h100(hosts=options.hosts)
    mesh = (options.hosts, cluster.num_devices // options.hosts)
    print(f"LLaMA 3 8B, batch {BATCH}, sequence {SEQ}, remat {options.remat}, mesh {mesh_text(mesh)} of {cluster}\n")
    rows = [_row(layers, *_plan(layers, options.remat, cluster, mesh)) for layers in options.layers]
    print(table(("layers", *(f"{c} s" for c in COLUMNS), "variables", "gap", "step s", "memory GiB"), rows))


def _plan(layers: int, remat: bool, cluster: alpa.Cluster, mesh: tuple[int, ...]) -> tuple[Plan, dict[str, float]]:
    """The plan and the seconds that each part took; `total` is from the step function to the plan."""
    config = LlamaConfig.llama_8b(num_layers=layers, seq_len=SEQ, remat=remat)
    task = llama_task(config, BATCH, optax.adam(1e-4))
    seconds: dict[str, float] = dict.fromkeys(COLUMNS, 0.0)
    with _timed(seconds, "init"):
        state = jax.eval_shape(task.init)
    step = alpa.parallelize(task.step, method=alpa.ShardParallel(mesh_shape=mesh))
    with contextlib.ExitStack() as patches:
        patches.enter_context(_patched(api, "trace", _trace(seconds)))
        for name, column in PARTS.items():
            if hasattr(planner, name):
                patches.enter_context(_patched(planner, name, _counted(seconds, column, getattr(planner, name))))
        with _timed(seconds, "total"):
            plan = step.plan(state, task.abstract_batch(), cluster=cluster)
    seconds["other"] = seconds["total"] - sum(seconds[c] for c in COLUMNS[1:-2])
    return plan, seconds


def _trace(seconds: dict[str, float]) -> Callable[..., tracer.Trace]:
    """`tracer.trace`, which also reads the graph at once, each timed for itself."""

    def call(*args: Any, **kwargs: Any) -> tracer.Trace:
        with _timed(seconds, "trace"):
            traced = tracer.trace(*args, **kwargs)
        with _timed(seconds, "graph"):
            traced.graph.verify()
        return traced

    return call


def _counted(seconds: dict[str, float], column: str, fun: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _timed(seconds, column):
            return fun(*args, **kwargs)

    return call


def _patched(module: Any, name: str, replacement: Any) -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(module, name, replacement)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], column: str) -> Generator[None]:
    start = time.perf_counter()
    yield
    seconds[column] += time.perf_counter() - start


def _warm_up() -> None:
    """Plan something tiny, so that imports, MLIR and the solver have started."""
    small = LlamaConfig(64, 16, 32, 4, 2, 1, 64)
    task = llama_task(small, 8, optax.adam(1e-4))
    step = alpa.parallelize(task.step, method=alpa.ShardParallel(mesh_shape=(2, 4)))
    step.plan(jax.eval_shape(task.init), task.abstract_batch(), cluster=alpa.Cluster.dgx_h100())


def _row(layers: int, plan: Plan, seconds: dict[str, float]) -> tuple[str, ...]:
    memory = plan.predicted.peak_memory_bytes / 2**30
    figures = (f"{plan.solver.variables}", f"{plan.solver.gap:.1g}", f"{plan.predicted.step_time_s:.3f}")
    return str(layers), *(f"{seconds[c]:.2f}" for c in COLUMNS), *figures, f"{memory:.1f}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--layers", type=lambda t: [int(n) for n in t.split(",")], default=[8, 32, 128])
    p.add_argument("--hosts", type=int, default=32)
    p.add_argument("--remat", action=argparse.BooleanOptionalAction, default=True)
    return p.parse_args(arguments)


if __name__ == "__main__":
    main()
