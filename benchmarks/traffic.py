"""Compiled traffic and memory of our plans against plans by hand, and against what we predicted.

    python -m benchmarks.traffic                              # 4 models, 4 meshes and "auto", all plans by hand
    python -m benchmarks.traffic --quick                      # the GPT on two meshes
    python -m benchmarks.traffic --models moe --meshes 8,2x4 --no-experts

Plans are made for a DGX A100 (8 GPUs) and compiled on 8 emulated CPU devices. All figures are MiB per device and step.
Traffic is read from the compiled program, ours and the experts' by the same reader, and counted as rings move it:
"raw" as XLA's CPU backend compiled it, "GPU" with every all-reduce of which each device keeps only its part counted as
the reduce-scatter that GPU compilers make of it (the CPU backend has none). Memory is XLA's: arguments, results that
take no argument's place, temporaries. Plans by hand are in `benchmarks/experts.py`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import optax
from tqdm import tqdm

import alpa_like as alpa
from alpa_like.errors import AlpaError
from alpa_like.models import BertConfig, MoEConfig, Task, bert_task, facts_gpt, moe_task
from alpa_like.plan import Plan
from benchmarks.common import (
    METHODS,
    MIB,
    Measured,
    Mesh,
    MeshOption,
    measure,
    measure_executable,
    mesh_option,
    mesh_text,
    mib,
    parser,
    ratio,
    table,
)
from benchmarks.experts import Expert, experts

DEVICES = 8
MESHES: tuple[MeshOption, ...] = ((8,), (2, 4), (4, 2), (2, 2, 2), "auto")

MODELS: dict[str, Callable[[], Task]] = {
    "gpt": facts_gpt,
    "gpt tied": lambda: facts_gpt(tied=True),
    "bert": lambda: bert_task(BertConfig(4096, 256, 512, 8, 2), 16, optax.adam(1e-3)),
    "moe": lambda: moe_task(MoEConfig(4096, 256, 512, 8, 2, 8), 16, optax.adam(1e-3)),
}

LIMITS: dict[tuple[str, MeshOption], float] = {
    ("gpt", (8,)): 58.7,
    ("gpt", (2, 4)): 45.8,
    ("gpt", (4, 2)): 45.8,
    ("gpt tied", (8,)): 57.0,
}
"""MiB that our plans must not exceed."""


@dataclass(frozen=True, slots=True)
class Ours:
    """A plan of ours and what became of it; `mesh` is what was asked for."""

    model: str
    method: str
    mesh: MeshOption
    plan: Plan
    measured: Measured

    @property
    def traffic_ratio(self) -> float:
        return ratio(self.plan.predicted.total_traffic_bytes, self.measured.gpu_total)

    @property
    def memory_ratio(self) -> float:
        return self.plan.predicted.peak_memory_bytes / self.measured.memory

    @property
    def label(self) -> str:
        chosen = f" ({mesh_text(self.plan.mesh_shape)})" if self.mesh == "auto" else ""
        return f"{self.model}, {self.method} {mesh_text(self.mesh)}{chosen}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table per model, then how good the predictions were, then the limits."""
    options = _options(arguments)
    alpa.init(num_devices=DEVICES)
    cluster, found = alpa.Cluster.dgx_a100(), list[Ours]()
    for model in options.models:
        start, task = time.perf_counter(), MODELS[model]()
        mine = _plans(model, task, cluster, options)
        by_hand = [] if options.no_experts else _by_hand(task, model)
        print(f"\n{model}, {time.perf_counter() - start:.0f} s\n\n{_overview(mine, by_hand)}", flush=True)
        print(_verdicts([o for o in mine if o.method == "ShardParallel"], by_hand), flush=True)
        found += mine
    print(f"\n{_fidelity(found)}\n\n{_limits(found)}")


def _plans(model: str, task: Task, cluster: alpa.Cluster, options: argparse.Namespace) -> list[Ours]:
    """Our plans: the full search on every mesh, the other methods on the first mesh."""
    wanted = [("ShardParallel", mesh) for mesh in options.meshes]
    wanted += [(m, (DEVICES,)) for m in METHODS if m != "ShardParallel"]
    found: list[Ours] = []
    for method, mesh in tqdm(wanted, desc=f"{model}: our plans", leave=False):
        step = alpa.parallelize(task.step, method=METHODS[method](mesh_shape=mesh))
        try:
            executable = step.compile(jax.eval_shape(task.init), task.abstract_batch(), cluster=cluster)
        except AlpaError as error:
            print(f"FAILED {model}, {method} {mesh_text(mesh)}: {type(error).__name__}: {error}")
            continue
        found.append(Ours(model, method, mesh, executable.plan, measure_executable(executable)))
    return found


def _by_hand(task: Task, model: str) -> list[tuple[Expert, Measured]]:
    every = experts(DEVICES, model)
    return [(e, measure(e.compile(task))) for e in tqdm(every, desc=f"{model}: plans by hand", leave=False)]


# ------------------------------------------------------------------------------------------------ tables


def _overview(mine: Sequence[Ours], by_hand: Sequence[tuple[Expert, Measured]]) -> str:
    rows = [_row(o) for o in mine]
    rows += [(f"by hand: {e.name} {mesh_text(e.mesh)}", "", *_cells(m), "", "") for e, m in by_hand]
    return table(("plan", "predicted", "GPU", "raw", "memory", "predicted", "step ms"), rows)


def _row(ours: Ours) -> tuple[str, ...]:
    label, p = ours.label.split(", ", 1)[1], ours.plan.predicted
    memory, step = mib(p.peak_memory_bytes), f"{p.step_time_s * 1e3:.3f}"
    return label, mib(p.total_traffic_bytes), *_cells(ours.measured), memory, step


def _cells(m: Measured) -> tuple[str, str, str]:
    return mib(m.gpu_total), mib(m.raw_total), mib(m.memory)


def _verdicts(mine: Sequence[Ours], by_hand: Sequence[tuple[Expert, Measured]]) -> str:
    """Per mesh, ours against the plan by hand that moves least, overall and among those that need no more memory."""
    lines = [_verdict(o, by_hand) for o in mine] if by_hand else []
    heads = ("ours on mesh", "GPU", "best by hand", "GPU", "memory", "ours/best", "raw", "at our memory", "ours/best")
    return f"\n{table(heads, lines)}" if lines else ""


def _verdict(ours: Ours, by_hand: Sequence[tuple[Expert, Measured]]) -> tuple[str, ...]:
    possible = [(e, m) for e, m in by_hand if e.mesh in expressible(ours.plan.mesh_shape)]
    name, best = _least(possible)
    frugal_name, frugal = _least([(e, m) for e, m in possible if m.memory <= ours.measured.memory * 1.001])
    mine, raw = ours.measured.gpu_total, min(m.raw_total for _, m in possible)
    return (
        mesh_text(ours.mesh),
        mib(mine),
        name,
        mib(best.gpu_total) if best else "",
        mib(best.memory) if best else "",
        f"{ratio(mine, best.gpu_total):.3f}" if best else "",
        f"{ratio(ours.measured.raw_total, raw):.3f}",
        frugal_name,
        f"{ratio(mine, frugal.gpu_total):.3f}" if frugal else "",
    )


def _least(plans: Sequence[tuple[Expert, Measured]]) -> tuple[str, Measured | None]:
    if not plans:
        return "none", None
    expert, measured = min(plans, key=lambda p: p[1].gpu_total)
    return f"{expert.name} {mesh_text(expert.mesh)}", measured


def expressible(mesh: Mesh) -> set[Mesh]:
    """Sizes of the two axes of a plan by hand that a mesh allows: each of its axes serves one of the two."""
    found: set[Mesh] = set()
    for takes in itertools.product((True, False), repeat=len(mesh)):
        first = math.prod(n for n, take in zip(mesh, takes, strict=True) if take)
        found.add((first, math.prod(mesh) // first))
    return found


def _fidelity(found: Sequence[Ours]) -> str:
    rows = [
        (what, *_quality([(get(o), o) for o in found]))
        for what, get in (
            ("traffic", lambda o: o.traffic_ratio),
            ("memory", lambda o: o.memory_ratio),
        )
    ]
    heads = ("predicted / compiled", "cases", "within 10 %", "least", "greatest", "worst case")
    return table(heads, rows)


def _quality(cases: Sequence[tuple[float, Ours]]) -> tuple[str, ...]:
    values = [v for v, _ in cases]
    near = sum(abs(v - 1) <= 0.1 for v in values)
    worst = max(cases, key=lambda c: abs(math.log(c[0])) if 0 < c[0] < math.inf else math.inf)
    share = f"{near} ({near / len(values):.0%})"
    return str(len(values)), share, f"{min(values):.3f}", f"{max(values):.3f}", f"{worst[1].label}: {worst[0]:.3f}"


def _limits(found: Sequence[Ours]) -> str:
    """The limits of `LIMITS`, to the digit that they are given with."""
    rows: list[tuple[str, ...]] = []
    for o in found:
        limit, value = LIMITS.get((o.model, o.mesh)), round(o.measured.gpu_total / MIB, 1)
        if limit is not None and o.method == "ShardParallel":
            rows.append((o.label, str(limit), str(value), "yes" if value <= limit else "NO"))
    return table(("limit, MiB as on a GPU", "at most", "found", "holds"), rows) if rows else ""


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--quick", action="store_true", help="gpt on meshes 8 and 2x4")
    p.add_argument("--models", type=lambda t: t.split(","), help=f"of {', '.join(MODELS)}")
    p.add_argument("--meshes", type=lambda t: [mesh_option(m) for m in t.split(",")], help="such as 8,2x4,2x2x2,auto")
    p.add_argument("--no-experts", action="store_true", help="leave out the plans by hand")
    options = p.parse_args(arguments)
    options.models = options.models or (["gpt"] if options.quick else list(MODELS))
    options.meshes = options.meshes or (MESHES[:2] if options.quick else MESHES)
    if set(options.models) - set(MODELS):
        p.error(f"--models must be some of {', '.join(MODELS)}, found {options.models}")
    return options


if __name__ == "__main__":
    main()
