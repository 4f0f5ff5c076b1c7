"""How good the plan that is chosen is among many that are measured, and how well steps are predicted.

    python -m benchmarks.regret                             # 8 models on 8 emulated devices
    python -m benchmarks.regret --models gpt,mlp --rounds 10
    python -m benchmarks.regret --json regret.json --chart regret.png
    python -m benchmarks.regret --clock cpu                 # work instead of time, where the machine is not idle

The candidates are the best plans on every mesh, those of the methods that split the batch alone, plans by hand, and
plans with random layouts for parameters. All run in turns in one process. The devices are measured anew for every
model, as a shared machine is not equally fast all the time. Per model:

    regret       median over the rounds of the step of the chosen plan over that of the fastest candidate, minus 1.
                 Half of the rounds say which one that is, the other half gives the ratio, and the other way round, as
                 the least of many noisy medians is too low
    by hand      the step of the fastest plan by hand over that of the chosen plan, told likewise
    measured     the regret of that plan which is fastest in the first half of the rounds, of the three candidates with
                 the best predictions and the chosen one; judged by the other half (what `alpa.tune` would choose)
    rank         Spearman's rank correlation of predicted and measured step times
    reachable    the rank correlation that exact predictions would reach in spite of noise: √(2r / (1 + r)) for a
                 correlation r of the times in one half of the rounds and in the other (Spearman-Brown)
    time, memory mean absolute error of predictions, over the candidates that have one; memory is XLA's own figure
    level        predicted over measured step time, in the geometric mean
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

import alpa_like as alpa
from alpa_like.calibrate import measure
from benchmarks.candidates import DEVICES, MODELS, Candidate, by_hand, chosen, ours, random_plans
from benchmarks.common import mib, parser, table
from benchmarks.expert_times import add_options, check_options
from benchmarks.paired import Quartiles, Seconds, keep_freed_memory, quartiles, time_in_turns

__all__ = ["Row", "Verdict", "judge", "main", "spearman"]

TUNED = 4
"""How many plans are timed where the choice is measured."""


@dataclass(frozen=True, slots=True)
class Row:
    """A candidate: seconds and bytes, predicted (None for plans by hand) and measured; `ratio` is to the chosen one."""

    name: str
    predicted_s: float | None
    seconds: float
    ratio: Quartiles
    predicted_bytes: float | None
    nbytes: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the module's docstring lists."""

    candidates: int
    best: str
    regret: Quartiles
    by_hand: Quartiles | None
    measured_regret: float
    rank: float
    reachable: float
    time_error: float
    memory_error: float
    level: float


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. 1 where a side does not vary."""
    x, y = _ranks(np.asarray(a, float)), _ranks(np.asarray(b, float))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 1.0
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: Seconds) -> Seconds:
    less = (values[:, None] > values[None, :]).sum(1)
    equal = (values[:, None] == values[None, :]).sum(1)
    return less + (equal - 1) / 2


def judge(rows: Sequence[Row], seconds: Seconds) -> Verdict:
    """`seconds` is [rounds, candidates] in the order of `rows`, of which the first is the chosen plan."""
    best = int(np.argmin(np.median(seconds, axis=0)))
    hand = [i for i, r in enumerate(rows) if r.predicted_s is None]
    known = [r for r in rows if r.predicted_s is not None]
    predicted = np.array([r.predicted_s for r in known], float)
    measured = np.array([r.seconds for r in known])
    memory = np.array([(r.predicted_bytes or 0.0) / r.nbytes for r in known])
    return Verdict(
        len(rows),
        rows[best].name,
        _minus_one(quartiles(_to_fastest(seconds, range(len(rows))))),
        quartiles(1 / _to_fastest(seconds, hand)) if hand else None,
        _measured_regret(rows, seconds),
        spearman(predicted, measured),
        _reachable(seconds[:, [i for i, r in enumerate(rows) if r.predicted_s is not None]]),
        float(np.abs(predicted / measured - 1).mean()),
        float(np.abs(memory - 1).mean()),
        float(np.exp(np.log(predicted / measured).mean())),
    )


def _reachable(seconds: Seconds) -> float:
    """Rank correlation of exact predictions and the noisy medians of all rounds; not a number for a single round."""
    if len(seconds) < 2:
        return float("nan")
    repeated = max(0.0, spearman(*(np.median(half, axis=0) for half in _halves(seconds))))
    return (2 * repeated / (1 + repeated)) ** 0.5


def _halves(seconds: Seconds) -> tuple[Seconds, Seconds]:
    return (seconds[::2], seconds[1::2]) if len(seconds) > 1 else (seconds, seconds)


def _to_fastest(seconds: Seconds, among: Sequence[int]) -> Seconds:
    """The chosen plan's step over that of the candidate of `among` that is fastest in the other half of the rounds."""
    halves = _halves(seconds)
    fastest = [among[int(np.argmin(np.median(half[:, among], axis=0)))] for half in halves]
    return np.concatenate([half[:, 0] / half[:, i] for half, i in zip(halves, reversed(fastest), strict=True)])


def _minus_one(q: Quartiles) -> Quartiles:
    return Quartiles(q.low - 1, q.median - 1, q.high - 1)


def _measured_regret(rows: Sequence[Row], seconds: Seconds) -> float:
    """Regret of the plan that is fastest of a few in the first half of the rounds, in the second half."""
    half = len(seconds) // 2
    order = sorted((i for i, r in enumerate(rows) if r.predicted_s is not None), key=lambda i: rows[i].predicted_s or 0)
    few = [0, *(i for i in order if i)][:TUNED]
    picked = min(few, key=lambda i: float(np.median(seconds[: half or 1, i])))
    rest = seconds[half:]
    best = int(np.argmin(np.median(rest, axis=0)))
    return float(np.median(rest[:, picked] / rest[:, best])) - 1


def main(arguments: Sequence[str] | None = None) -> None:
    """A table per model, one line per model, and the files that were asked for."""
    options = _options(arguments)
    keep_freed_memory()
    alpa.init(num_devices=DEVICES)
    clusters, found = dict[str, alpa.Cluster](), dict[str, tuple[list[Row], Verdict]]()
    for model in options.models:
        start = time.perf_counter()
        clusters[model] = measure(jax.devices())
        found[model] = _measure(model, clusters[model], options)
        print(f"\n{model}, {time.perf_counter() - start:.0f} s\n\n{_table(found[model][0])}", flush=True)
    print(f"\n{options.clock} time, {options.rounds} rounds\n\n{_summary({m: v for m, (_, v) in found.items()})}")
    if options.json:
        data = {
            m: {"verdict": asdict(v), "cluster": clusters[m].to_json(), "candidates": [asdict(r) for r in rows]}
            for m, (rows, v) in found.items()
        }
        options.json.write_text(json.dumps({"models": data}, indent=1) + "\n", "utf-8")
    if options.chart:
        draw(options.chart, {m: rows for m, (rows, _) in found.items()}, options.clock)


def _measure(model: str, cluster: alpa.Cluster, options: argparse.Namespace) -> tuple[list[Row], Verdict]:
    task = MODELS[model]()
    every = [chosen(task, cluster), *ours(task, cluster), *random_plans(task, cluster, options.random)]
    candidates = [*_different(every), *by_hand(task, model, few=True)]
    seconds = time_in_turns([c.runner(task) for c in candidates], options.rounds, model)[options.clock]
    rows = [_row(c, seconds[:, i], seconds[:, 0]) for i, c in enumerate(candidates)]
    return rows, judge(rows, seconds)


def _different(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Without plans that are the same as an earlier one."""
    found: dict[Any, Candidate] = {}
    for c in candidates:
        found.setdefault(c.plan.stages if c.plan else c.name, c)
    return list(found.values())


def _row(candidate: Candidate, seconds: Seconds, reference: Seconds) -> Row:
    p = candidate.plan.predicted if candidate.plan else None
    return Row(
        candidate.name,
        p.step_time_s if p else None,
        float(np.median(seconds)),
        quartiles(seconds / reference),
        p.peak_memory_bytes if p else None,
        candidate.memory,
    )


def _table(rows: Sequence[Row]) -> str:
    lines = [
        (
            r.name,
            "" if r.predicted_s is None else f"{1e3 * r.predicted_s:.1f}",
            f"{1e3 * r.seconds:.1f}",
            str(r.ratio),
            "" if r.predicted_bytes is None else mib(r.predicted_bytes),
            mib(r.nbytes),
        )
        for r in sorted(rows, key=lambda r: r.seconds)
    ]
    return table(("plan", "predicted ms", "step ms", "step / chosen", "predicted MiB", "memory MiB"), lines)


def _summary(verdicts: dict[str, Verdict]) -> str:
    lines = [
        (
            model,
            str(v.candidates),
            v.best,
            f"{v.regret.median:.1%} ({v.regret.low:.1%} to {v.regret.high:.1%})",
            str(v.by_hand or ""),
            f"{v.measured_regret:.1%}",
            f"{v.rank:.2f}",
            f"{v.reachable:.2f}",
            f"{v.time_error:.1%}",
            f"{v.level:.2f}",
            f"{v.memory_error:.1%}",
        )
        for model, v in verdicts.items()
    ]
    heads = (
        "model",
        "plans",
        "fastest",
        "regret",
        "by hand",
        "measured",
        "rank",
        "reachable",
        "time error",
        "level",
        "memory error",
    )
    return table(heads, lines)


def draw(path: Path, rows: dict[str, list[Row]], clock: str) -> None:
    """One panel per model: measured over predicted step time, both in ms."""
    from matplotlib.figure import Figure  # an extra, needed for charts only

    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.2 * lines), layout="constrained", facecolor="white")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (model, found) in zip(panels, rows.items(), strict=False):
        points = [(1e3 * r.predicted_s, 1e3 * r.seconds) for r in found if r.predicted_s is not None]
        x, y = zip(*points, strict=True)
        ends = (0.9 * min(*x, *y), 1.1 * max(*x, *y))
        axes.plot(ends, ends, color="#BBBBBB", linewidth=1, zorder=0)
        axes.scatter(x[1:], y[1:], s=18, color="#0072B2", label="candidates")
        axes.scatter(x[:1], y[:1], s=42, color="#D55E00", marker="D", label="chosen")
        axes.set(title=model, xlabel="predicted, ms", ylabel=f"measured ({clock}), ms", xlim=ends, ylim=ends)
    for axes in list(figure.axes)[len(rows) :]:
        axes.remove()
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    add_options(p, rounds=24)
    p.add_argument("--random", type=int, default=8, help="plans with random layouts")
    p.add_argument("--chart", type=Path, help="PNG of predicted against measured step times")
    options = p.parse_args(arguments)
    check_options(p, options)
    return options


if __name__ == "__main__":
    main()
