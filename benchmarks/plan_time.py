"""From function to plan: LLaMA 3 8B on hosts of 8 H100, its layers, the devices and its width varied in turn.

    python -m benchmarks plan_time                             # three sweeps from 8 layers, 32 hosts, width 4096
    python -m benchmarks plan_time --sweeps layers             # one of them; 32 layers are the real model
    python -m benchmarks plan_time --sweeps layers --layers 2 --hosts 4    # something small
    python -m benchmarks plan_time --no-remat

A step is forward, backward and Adam in mixed precision (bfloat16 compute, float32 state), 64 sequences of 1024 tokens,
with rematerialization, on a mesh of hosts × 8. Nothing is allocated and no device of the cluster is needed. Each size
is planned once in this process, smallest first; imports and JAX's start are not counted (`init` shapes the state and is
shown). Rows and a chart are written to DIR/plan_time.json and DIR/plan_time.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import optax

import alpa_like as alpa
from alpa_like import api, tracer
from alpa_like.models import LlamaConfig, llama_task
from alpa_like.passes import planner
from alpa_like.plan import Plan
from benchmarks.charts import Lines, draw_lines
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


HEADS = 128  # the width of a head
LABELS = {"layers": "layers", "devices": "devices", "hidden": "width of the model"}
CURVES: dict[str, tuple[str, ...]] = {
    "total": ("total",),
    "trace and read": ("trace", "graph"),
    "group and price": ("group", "build"),
    "solve": ("solve",),
}
"""What the chart shows, and the columns that it adds up."""


@dataclass(frozen=True, slots=True)
class Case:
    """One size: layers of the model, hosts of 8 H100, the width of the model."""

    layers: int
    hosts: int
    hidden: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table per sweep, one row per size, and draw them."""
    options = _options(arguments)
    alpa.init(num_devices=1)
    _warm_up()
    print(f"LLaMA 3 8B, batch {BATCH}, sequence {SEQ}, remat {options.remat}, on {alpa.Cluster.dgx_h100()}")
    found = {name: _sweep(name, options) for name in options.sweeps}
    path = Path(options.out) / "plan_time.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1))
    panels = [_curves(name, rows) for name, rows in found.items()]
    chart = draw_lines(path.with_suffix(".png"), "From function to plan, LLaMA 3 8B", panels)
    print(f"\nwrote {path}\n{chart}")


def _sweep(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one sweep, which are printed as they come."""
    rows: list[dict[str, Any]] = []
    for case in _cases(name, options):
        plan, seconds = _plan(case, options.remat)
        rows.append({**asdict(case), "devices": 8 * case.hosts, "seconds": seconds, **_facts(plan)})
    heads = ("layers", "mesh", "width", *(f"{c} s" for c in COLUMNS), "variables", "gap", "step s", "memory GiB")
    print(f"\nagainst {LABELS[name]}\n{table(heads, [_row(row) for row in rows])}", flush=True)
    return rows


def _cases(name: str, options: argparse.Namespace) -> list[Case]:
    base = Case(options.layers[0] if len(options.layers) == 1 else 8, options.hosts[-1], 4096)
    match name:
        case "layers":
            return [replace(base, layers=n) for n in options.layers]
        case "devices":
            return [replace(base, hosts=n) for n in (options.hosts if len(options.hosts) > 1 else (1, 4, 32, 128))]
        case _:
            return [replace(base, hidden=n) for n in options.hidden]


def _plan(case: Case, remat: bool) -> tuple[Plan, dict[str, float]]:
    """The plan and the seconds that each part took; `total` is from the step function to the plan."""
    task = llama_task(_config(case, remat), BATCH, optax.adam(1e-4))
    cluster = alpa.Cluster.dgx_h100(hosts=case.hosts)
    seconds: dict[str, float] = dict.fromkeys(COLUMNS, 0.0)
    with _timed(seconds, "init"):
        state = jax.eval_shape(task.init)
    step = alpa.parallelize(task.step, method=alpa.ShardParallel(mesh_shape=_mesh(case.hosts)))
    with contextlib.ExitStack() as patches:
        patches.enter_context(_patched(api, "trace", _trace(seconds)))
        for name, column in PARTS.items():
            if hasattr(planner, name):
                patches.enter_context(_patched(planner, name, _counted(seconds, column, getattr(planner, name))))
        with _timed(seconds, "total"):
            plan = step.plan(state, task.abstract_batch(), cluster=cluster)
    seconds["other"] = seconds["total"] - sum(seconds[c] for c in COLUMNS[1:-2])
    return plan, seconds


def _config(case: Case, remat: bool) -> LlamaConfig:
    """LLaMA 3 8B with other layers and another width; heads stay 128 wide, the MLP 3.5 times the model."""
    whole = LlamaConfig.llama_8b(num_layers=case.layers, seq_len=SEQ, remat=remat)
    if case.hidden == whole.d_model:
        return whole
    heads = case.hidden // HEADS
    return replace(
        whole, d_model=case.hidden, num_heads=heads, num_kv_heads=min(8, heads), ffn_dim=case.hidden * 7 // 2
    )


def _mesh(hosts: int) -> tuple[int, ...]:
    return (hosts, 8) if hosts > 1 else (2, 4)


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


def _facts(plan: Plan) -> dict[str, float]:
    return {
        "variables": plan.solver.variables,
        "gap": plan.solver.gap,
        "step_s": plan.predicted.step_time_s,
        "memory_bytes": plan.predicted.peak_memory_bytes,
    }


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    size = (str(row["layers"]), mesh_text(_mesh(row["hosts"])), str(row["hidden"]))
    figures = (str(row["variables"]), f"{row['gap']:.1g}", f"{row['step_s']:.3f}", f"{row['memory_bytes'] / 2**30:.1f}")
    return *size, *(f"{row['seconds'][c]:.2f}" for c in COLUMNS), *figures


def _curves(name: str, rows: Sequence[Mapping[str, Any]]) -> Lines:
    label = LABELS[name]
    curves = {curve: [sum(r["seconds"][c] for c in columns) for r in rows] for curve, columns in CURVES.items()}
    return Lines(f"against {label}", label, "seconds", [r[name] for r in rows], curves, grow=name == "layers")


def _counts(text: str) -> list[int]:
    """Whole numbers with commas between them, rising."""
    parts = text.split(",")
    if not all(p.isdigit() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 8,32,128, found {text!r}")
    return sorted({int(p) for p in parts})


def _widths(text: str) -> list[int]:
    found = _counts(text)
    if any(n % (8 * HEADS) and n not in (HEADS, 2 * HEADS, 4 * HEADS) for n in found):
        raise argparse.ArgumentTypeError(f"widths must be multiples of {8 * HEADS}, found {text!r}")
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.prog = "python -m benchmarks plan_time"
    p.add_argument("--sweeps", nargs="+", choices=LABELS, default=list(LABELS), help="default: all three")
    p.add_argument("--layers", type=_counts, default=[2, 8, 32, 128], help="default: 2,8,32,128")
    p.add_argument("--hosts", type=_counts, default=[32], help="one for all sweeps, or those of the sweep over devices")
    p.add_argument("--hidden", type=_widths, default=[1024, 2048, 4096, 8192], help="default: 1024,2048,4096,8192")
    p.add_argument("--remat", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--out", default="out/benchmarks", metavar="DIR", help="default: out/benchmarks")
    return p.parse_args(arguments)


if __name__ == "__main__":
    main()
