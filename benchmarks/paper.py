"""Every model of Alpa's weak scaling (OSDI'22, figure 8) on its p3.16xlarge hosts: our plan beside what was published.

    python -m benchmarks paper                                # all rows; minutes each for the largest
    python -m benchmarks paper --rows gpt:350M gpt:1.3B       # or whole families: --rows gpt moe
    python -m benchmarks paper --resume                       # keeps the rows that are there
    python -m benchmarks paper --quick                        # one number of micro-batches per row, Alpa's

Nothing runs on a GPU: our figures and those of the rivals are predicted, all by one cost model, that of `Cluster`'s
preset. Published ones were measured by Alpa's authors (`benchmarks.published` names the file).

- Alpa's plan: the stages, meshes and micro-batches that Alpa had found, layers computed again (but for a Wide-ResNet
  with memory enough), sharded inside by our solver. How near this comes to what Alpa measured says how good the cost
  model is.
- ours: what `PipeshardParallel` finds, the faster of two numbers of micro-batches: that of Alpa's own plan and that of
  the best rival; twice and four times as many where memory does not suffice. The faster one is planned once more with
  twice as many layers.
- Megatron: the best of a grid over stages, replicas, tensor parts, micro-batches and recomputation
  (`benchmarks.megatron`); for a mixture of experts its experts are cut too, or spread over the replicas with ZeRO-2
  ("experts"), as DeepSpeed does it. A Wide-ResNet has no Megatron.
- data parallel: the best of data parallel, ZeRO-2 and ZeRO-3, with micro-batches, with and without recomputation.

PFLOP/s are those of the whole cluster, with Alpa's count of the FLOPs of a step (`benchmarks.published`) for everybody:
they say how fast a step is, whatever is computed twice in it. Our mixture of experts routes tokens in groups of 1024,
not of 2048 as Alpa's, which takes less to dispatch; so its predicted figures count those fewer FLOPs.

Rows are written one by one to DIR/paper.json, the chart to DIR/paper.png. A row is kept by `--resume` if neither the
cluster's constants nor the options changed; leave it out after a change of the planner.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import jax
import optax

import alpa_like as alpa
from alpa_like.models import (
    Task,
    paper_gpt,
    paper_gpt_config,
    paper_moe,
    paper_moe_config,
    paper_wide_resnet,
)
from alpa_like.plan import Pipeline, Plan
from alpa_like.simulate import Times, simulate
from benchmarks.common import parser
from benchmarks.megatron import DATA_PARALLEL, EXPERT_PARALLEL, MEGATRON, Search, search
from benchmarks.paper_tables import Row, chart, line, tables
from benchmarks.published import PUBLISHED, WIDE_RESNET_FLOPS, Result, gpt_flops, moe_flops
from benchmarks.replicas import search_replicas

FORMAT = 3
"""Raise it when a row gets another meaning, or prices change."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the rows that are asked for, one by one, and print tables and the chart."""
    options = _options(arguments)
    alpa.init(num_devices=1)
    path = Path(options.out) / "paper.json"
    rows = _kept(path) if options.resume else {}
    for family, size in options.rows:
        key, mark = f"{family}:{size}", _mark(family, size, options.quick)
        if rows.get(key, {}).get("mark") != mark:
            rows[key] = {"mark": mark, **_row(family, size, options.quick)}
            _write(path, rows)
        print(line(rows[key]), flush=True)
    marks = {f"{f}:{s}": _mark(f, s, options.quick) for f, s in _all_rows()}
    shown = [rows[key] for key, mark in marks.items() if rows.get(key, {}).get("mark") == mark]
    print(f"\n{tables(shown)}\n\nwrote {path}\n{chart(path.with_suffix('.png'), shown)}")


def cluster_of(gpus: int) -> alpa.Cluster:
    """So many V100 of p3.16xlarge hosts."""
    return alpa.Cluster.p3_16xlarge(hosts=gpus // 8) if gpus >= 8 else alpa.Cluster.p3_16xlarge().part(1, gpus)


def task_of(family: str, size: str, batch_size: int) -> Task:
    """What Alpa trained: Adam for text, momentum for images."""
    match family:
        case "gpt":
            return paper_gpt(size, batch_size)
        case "moe":
            return paper_moe(size, batch_size)
        case _:
            return paper_wide_resnet(size, batch_size, optax.sgd(0.1, momentum=0.9, nesterov=True))


def step_flops(family: str, size: str, batch_size: int) -> float:
    """FLOPs of a step of our model, as Alpa counts them."""
    match family:
        case "gpt":
            return gpt_flops(paper_gpt_config(size), batch_size)
        case "moe":
            return moe_flops(paper_moe_config(size), batch_size, group=paper_moe_config(size).seq_len)
        case _:
            return WIDE_RESNET_FLOPS[size]


# ------------------------------------------------------------------------------------------------------- a row


def _row(family: str, size: str, quick: bool) -> Row:
    published = PUBLISHED[family][size]
    cluster, flops = cluster_of(published.gpus), step_flops(family, size, published.batch_size)
    row: Row = {"family": family, "size": size, "gpus": published.gpus, "flops": flops, "published": asdict(published)}
    start = time.perf_counter()
    rivals = {name: _found(s) for name, s in _rivals(family, size, published, cluster)}
    row |= {"rivals": rivals, "rivals_s": time.perf_counter() - start}
    counts = [published.micro_batches]
    if not quick:
        best = min((r["best"] for r in rivals.values() if r["best"]), key=lambda b: b["step_s"], default=None)
        counts += [best["micro_batches"]] if best else []
    ours = _ours(family, size, published.batch_size, cluster, counts)
    return row | {"ours": ours, "alpas": _alpas(family, size, published, cluster)}


def _alpas(family: str, size: str, published: Result, cluster: alpa.Cluster) -> dict[str, Any] | None:
    """Alpa's own plan, None where our account of memory says that it does not fit.

    The FLOPs that Alpa counted for a Wide-ResNet are those of three forward passes, so nothing was computed again, as
    far as memory allows that.
    """
    plan, start = published.plan, time.perf_counter()
    ends = list(itertools.accumulate(plan.layers))
    stages = alpa.ManualStageOption(
        [list(range(a, b)) for a, b in itertools.pairwise((0, *ends))], plan.submeshes, plan.meshes
    )
    modes: tuple[Literal["none", "layer"], ...] = ("none", "layer") if family == "wide_resnet" else ("layer",)
    for mode in modes:
        method = alpa.PipeshardParallel(
            num_micro_batches=published.micro_batches,
            layer_option=alpa.AutoLayerOption(ends[-1], mode),
            stage_option=stages,
            schedule="1f1b",
            batch_statistics="micro_batch",
        )
        found = _plan(task_of(family, size, published.batch_size), method, cluster)
        if found is not None and found.pipeline is not None:
            seconds = {"waiting_step_s": waiting_s(found.pipeline), "seconds": time.perf_counter() - start}
            return _facts(found) | seconds
    return None


def waiting_s(pipeline: Pipeline) -> float:
    """Seconds of a step whose meshes do nothing else while they send or receive.

    So did Alpa's at the time of the paper: its pull request 773 (November 2022) lets the two overlap.
    """
    sends = (0.0, *pipeline.send_s, 0.0)
    held = [before + after for before, after in itertools.pairwise(sends)]
    forward, backward = (
        [getattr(stage, name) + s for stage, s in zip(pipeline.stages, held, strict=True)]
        for name in ("forward_s", "backward_s")
    )
    return simulate(pipeline.ordered(), Times.of(forward, backward, update_s=pipeline.update_s)).makespan_s


def _ours(
    family: str, size: str, batch_size: int, cluster: alpa.Cluster, counts: Sequence[int]
) -> dict[str, Any] | None:
    """The fastest plan over the numbers of micro-batches; None where nothing fits.

    The best one is made once more with twice as many layers, between which stages are cut more evenly.
    """
    start = time.perf_counter()

    def plan(count: int, layers: int | Literal["auto"] = "auto") -> Plan | None:
        option = alpa.AutoLayerOption(layers)
        method = alpa.PipeshardParallel(num_micro_batches=count, layer_option=option, batch_statistics="micro_batch")
        return None if batch_size % count else _plan(task_of(family, size, batch_size), method, cluster)

    plans = [p for c in dict.fromkeys(counts) if (p := plan(c)) is not None]
    more = 2 * max(counts)
    while not plans and more <= batch_size:  # less memory for each
        plans = [p for p in (plan(more),) if p is not None]
        more *= 2
    if not plans:
        return None
    best = min(plans, key=_step_s)
    pipe = best.pipeline
    finer = plan(pipe.num_micro_batches, 2 * len(pipe.layer_ends)) if pipe and len(pipe.stages) > 1 else None
    return _facts(min(best, finer or best, key=_step_s)) | {"seconds": time.perf_counter() - start}


def _step_s(plan: Plan) -> float:
    return plan.predicted.step_time_s


def _plan(task: Task, method: alpa.PipeshardParallel, cluster: alpa.Cluster) -> Plan | None:
    """The plan, None where nothing fits in memory."""
    step = alpa.parallelize(task.step, method=method)
    try:
        return step.plan(jax.eval_shape(task.init), task.abstract_batch(), cluster=cluster)
    except alpa.InfeasibleError:
        return None


def _facts(plan: Plan) -> dict[str, Any]:
    pipe = plan.pipeline
    assert pipe is not None
    meshes = [next(p.mesh_shape for p in plan.stages if p.name == f"forward {n}") for n in range(len(pipe.stages))]
    return {
        "step_s": plan.predicted.step_time_s,
        "memory_bytes": plan.predicted.peak_memory_bytes,
        "micro_batches": pipe.num_micro_batches,
        "schedule": pipe.schedule,
        "bubble": pipe.bubble_fraction(),
        "stages": [
            {"layers": [s.first, s.last], "mesh": list(mesh), "remat": s.remat}
            for s, mesh in zip(pipe.stages, meshes, strict=True)
        ],
    }


def _rivals(family: str, size: str, published: Result, cluster: alpa.Cluster) -> Iterator[tuple[str, Search]]:
    rows = published.batch_size
    if family == "wide_resnet":
        yield "data parallel", search_replicas(lambda batch: task_of(family, size, batch), rows, cluster)
        return
    config = paper_gpt_config(size) if family == "gpt" else paper_moe_config(size)
    yield "Megatron", search(config, rows, cluster, MEGATRON)
    if family == "moe":
        yield "experts", search(config, rows, cluster, EXPERT_PARALLEL)
    yield "data parallel", search(config, rows, cluster, DATA_PARALLEL)


def _found(found: Search) -> dict[str, Any]:
    best = found.best
    plan = None if best is None else {**asdict(best), "text": str(best)}
    return {"tried": found.tried, "fitted": found.fitted, "best": plan}


# ---------------------------------------------------------------------------------------------- keeping the rows


def _mark(family: str, size: str, quick: bool) -> str:
    """Another one where a kept row would not be what a new one is."""
    published = PUBLISHED[family][size]
    what = [FORMAT, cluster_of(published.gpus).to_json(), asdict(published), quick, jax.__version__]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def _kept(path: Path) -> dict[str, Row]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SystemExit(
            f"{path} is no file that this script wrote ({error}); delete it or leave out --resume"
        ) from None


def _write(path: Path, rows: Mapping[str, Row]) -> None:
    """All rows or the old file: a run may be stopped at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(rows, indent=1))
    beside.replace(path)


# -------------------------------------------------------------------------------------------------------- options


def _all_rows() -> list[tuple[str, str]]:
    return [(family, size) for family, sizes in PUBLISHED.items() for size in sizes]


def _row_option(text: str) -> list[tuple[str, str]]:
    family, _, size = text.replace("-", "_").partition(":")
    found = [(f, s) for f, s in _all_rows() if f == family and size in ("", s)]
    if not found:
        names = ", ".join(f"{f}:{s}" for f, s in _all_rows())
        raise argparse.ArgumentTypeError(f"no row is named {text!r}; choose among gpt, moe, wide_resnet, {names}")
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.prog = "python -m benchmarks paper"
    p.add_argument("--rows", nargs="+", type=_row_option, metavar="ROW", help="such as gpt or moe:1.3B; default: all")
    p.add_argument("--quick", action="store_true", help="no other numbers of micro-batches than Alpa's")
    p.add_argument("--resume", action="store_true", help="keep the rows of DIR/paper.json that are still right")
    p.add_argument("--out", default="out/benchmarks", metavar="DIR", help="default: out/benchmarks")
    options = p.parse_args(arguments)
    options.rows = [row for rows in options.rows for row in rows] if options.rows else _all_rows()
    return options


if __name__ == "__main__":
    main()
