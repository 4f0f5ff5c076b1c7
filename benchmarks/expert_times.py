"""Step time and compiled traffic of our automatic plan against plans by hand: `python -m benchmarks.experts`.

All plans of a model run in turns in one process, on 8 emulated devices. The figure is the median over the rounds of
the ratio of two steps of one round, a plan by hand over ours, with its quartiles: above 1 our plan is faster. A plan by
hand is called faster where three of four rounds say so. Ours is planned for what is measured of the devices before.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import alpa_like as alpa
from alpa_like.calibrate import measure
from benchmarks.candidates import DEVICES, MODELS, Candidate, by_hand, chosen
from benchmarks.common import mesh_text, mib, parser, ratio, table
from benchmarks.paired import Clock, Quartiles, Seconds, keep_freed_memory, quartiles, time_in_turns

__all__ = ["Compared", "main"]


@dataclass(frozen=True, slots=True)
class Compared:
    """A plan by hand against ours: seconds of its step, and the ratio of its step to ours."""

    candidate: Candidate
    seconds: float
    ratio: Quartiles

    @property
    def faster(self) -> bool:
        return self.ratio.high < 1


def main(arguments: Sequence[str] | None = None) -> None:
    """A table per model, then one line per model."""
    options = _options(arguments)
    keep_freed_memory()
    alpa.init(num_devices=DEVICES)
    cluster, lines, records = measure(jax.devices()), list[tuple[str, ...]](), dict[str, Any]()
    for model in options.models:
        start, task = time.perf_counter(), MODELS[model]()
        ours = chosen(task, cluster)
        plans = [ours, *by_hand(task, model, options.few)]
        seconds = time_in_turns([p.runner(task) for p in plans], options.rounds, model)[options.clock]
        rows = compare(plans, seconds)
        print(f"\n{model}, {time.perf_counter() - start:.0f} s\n\n{_table(ours, rows, seconds)}", flush=True)
        lines.append(summary(model, ours, rows, seconds))
        records[model] = _record(ours, rows, seconds)
    heads = ("model", "our mesh", "step ms", "best by hand", "its step / ours", "traffic", "faster by hand")
    print(f"\n{options.clock} time, {options.rounds} rounds\n\n{table(heads, lines)}")
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def compare(plans: Sequence[Candidate], seconds: Seconds) -> list[Compared]:
    """Every plan but the first against the first, the fastest first."""
    found = [
        Compared(plan, float(np.median(seconds[:, i])), quartiles(seconds[:, i] / seconds[:, 0]))
        for i, plan in enumerate(plans)
        if i
    ]
    return sorted(found, key=lambda c: c.ratio.median)


def summary(model: str, ours: Candidate, rows: Sequence[Compared], seconds: Seconds) -> tuple[str, ...]:
    """Our plan against the fastest plan by hand, and how many of these are faster beyond noise."""
    best, mesh = rows[0], ours.plan.mesh_shape if ours.plan else ()
    faster = sum(r.faster for r in rows)
    step = f"{1e3 * float(np.median(seconds[:, 0])):.1f}"
    name, traffic = best.candidate.name.removeprefix("by hand: "), ratio(best.candidate.traffic, ours.traffic)
    return model, mesh_text(mesh), step, name, str(best.ratio), f"{traffic:.2f}", f"{faster} of {len(rows)}"


def _table(ours: Candidate, rows: Sequence[Compared], seconds: Seconds) -> str:
    mesh = mesh_text(ours.plan.mesh_shape) if ours.plan else ""
    first = (f"automatic, {mesh}", f"{1e3 * float(np.median(seconds[:, 0])):.1f}", "1", *_sizes(ours))
    rest = [(r.candidate.name, f"{1e3 * r.seconds:.1f}", str(r.ratio), *_sizes(r.candidate)) for r in rows]
    return table(("plan", "step ms", "step / ours", "traffic MiB", "memory MiB"), [first, *rest])


def _sizes(candidate: Candidate) -> tuple[str, str]:
    return mib(candidate.traffic), mib(candidate.memory)


def _record(ours: Candidate, rows: Sequence[Compared], seconds: Seconds) -> dict[str, Any]:
    plans = {
        r.candidate.name: {
            "seconds": r.seconds,
            "ratio": [r.ratio.low, r.ratio.median, r.ratio.high],
            "traffic_bytes": r.candidate.traffic,
        }
        for r in rows
    }
    return {"seconds": float(np.median(seconds[:, 0])), "traffic_bytes": ours.traffic, "plans": plans}


def add_options(p: argparse.ArgumentParser, rounds: int) -> None:
    """What both scripts take."""
    clocks: tuple[Clock, ...] = ("wall", "cpu")
    p.add_argument("--models", type=lambda t: t.split(","), default=list(MODELS), help=f"of {', '.join(MODELS)}")
    p.add_argument("--rounds", type=int, default=rounds, help=f"steps of each plan, {rounds} if not given")
    p.add_argument("--clock", choices=clocks, default="wall", help="cpu: work of all cores; see benchmarks/paired.py")
    p.add_argument("--json", type=Path, help="file for all figures")


def check_options(p: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if unknown := set(options.models) - set(MODELS):
        p.error(f"--models must be some of {', '.join(MODELS)}, found {', '.join(sorted(unknown))}")
    if options.rounds < 1:
        p.error(f"--rounds must be at least 1, found {options.rounds}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    add_options(p, rounds=25)
    p.add_argument("--few", action="store_true", help="plans by hand on one mesh each")
    options = p.parse_args(arguments)
    check_options(p, options)
    return options
