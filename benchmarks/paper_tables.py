"""The rows of `benchmarks.paper` as tables and as a chart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import alpa_like as alpa
from benchmarks.charts import COLORS, Panel, draw_bars
from benchmarks.common import table
from benchmarks.published import SOURCE

__all__ = ["Row", "chart", "line", "measured", "predicted", "tables"]

NAMES = {"gpt": "GPT", "moe": "Mixture of experts", "wide_resnet": "Wide-ResNet"}
RIVALS = {"gpt": "Megatron-LM", "moe": "DeepSpeed", "wide_resnet": "PP-DP"}
NEAR = 0.15

NOTE = (
    "\n* published, measured. ratio: our plan over the column before it; predicted/measured: of Alpa's plan; if meshes "
    "wait: the same where they do nothing else while they send or receive, as in Alpa's runtime at the time"
)

Row = dict[str, Any]
"""What one model gave, as it stands in paper.json."""


def pflops(row: Row, step_s: float | None) -> float | None:
    """PFLOP/s of the whole cluster."""
    return None if step_s is None else row["flops"] / step_s / 1e15


def _seconds(row: Row, name: str) -> float | None:
    if name in ("ours", "alpas"):
        return row[name]["step_s"] if row[name] else None
    if name == "waiting":
        return row["alpas"]["waiting_step_s"] if row["alpas"] else None
    best = row["rivals"].get(name, {}).get("best")
    return best["step_s"] if best else None


def predicted(row: Row, name: str) -> float | None:
    """Predicted PFLOP/s of "ours", "alpas", that if its meshes wait, or a rival; None where nothing fits in memory."""
    return pflops(row, _seconds(row, name))


def measured(row: Row, name: str) -> float | None:
    """Published PFLOP/s of "alpa" or "rival"."""
    value = row["published"][name]
    return None if value is None else value * row["gpus"] / 1e3


def best_rival(row: Row) -> float | None:
    """The best of Megatron's kind."""
    return max((v for n in ("Megatron", "experts") if (v := predicted(row, n)) is not None), default=None)


def tables(rows: Sequence[Row]) -> str:
    """One table of figures and one of plans per family."""
    parts: list[str] = []
    for family, name in NAMES.items():
        mine = [row for row in rows if row["family"] == family]
        if mine:
            parts += [f"{name}, PFLOP/s of the cluster", _figures(family, mine), _plans(mine)]
    notes = [note for row in rows if (note := far_from_published(row))]
    if notes:
        parts.append("\n".join([f"More than {NEAR:.0%} from Alpa's own measurement:", *notes]))
    return "\n\n".join([*parts, f"published: {SOURCE}; predicted: {_constants()}"])


def _constants() -> str:
    device = alpa.Cluster.p3_16xlarge().device
    return f"{device.name}, {device.flops_efficiency:g} of its peak, {device.memory_bandwidth_bytes_per_s / 1e9:g} GB/s"


def _figures(family: str, rows: Sequence[Row]) -> str:
    heads = ["size", "GPUs", "ours", "Megatron", "ratio", "data parallel", "ratio", "Alpa's plan", "ratio"]
    heads += ["Alpa*", "predicted/measured", "if meshes wait", f"{RIVALS[family]}*", "Alpa's ratio*"]
    lines: list[tuple[str, ...]] = []
    for row in rows:
        ours, megatron, data = predicted(row, "ours"), best_rival(row), predicted(row, "data parallel")
        alpas, alpa_, rival = predicted(row, "alpas"), measured(row, "alpa"), measured(row, "rival")
        mega = "-" if family == "wide_resnet" else _number(megatron)
        lines.append(
            (
                row["size"], str(row["gpus"]), _number(ours), mega, _ratio(ours, megatron), _number(data),
                _ratio(ours, data), _number(alpas), _ratio(ours, alpas), _number(alpa_), _ratio(alpas, alpa_),
                _ratio(predicted(row, "waiting"), alpa_), _number(rival), _ratio(alpa_, rival),
            )
        )  # fmt: skip
    return table(heads, lines) + NOTE


def _number(value: float | None) -> str:
    return "out of memory" if value is None else f"{value:.3f}"


def _ratio(value: float | None, other: float | None) -> str:
    return f"{value / other:.2f}" if value and other else "-"


def _plans(rows: Sequence[Row]) -> str:
    heads = ("size", "planned in s", "step s", "GiB", "micro-batches", "schedule", "stages", "the best rival's plan")
    return table(heads, [_plan_cells(row) for row in rows])


def _plan_cells(row: Row) -> tuple[str, ...]:
    ours = row["ours"]
    rivals = [r["best"] for r in row["rivals"].values() if r["best"]]
    rival = min(rivals, key=lambda b: b["step_s"])["text"] if rivals else "out of memory"
    if ours is None:
        return (row["size"], *("-",) * 6, rival)
    return (
        row["size"],
        f"{ours['seconds']:.0f}",
        f"{ours['step_s']:.1f}",
        f"{ours['memory_bytes'] / 2**30:.1f}",
        str(ours["micro_batches"]),
        ours["schedule"],
        stages_text(ours["stages"]),
        rival,
    )


def stages_text(stages: Sequence[Mapping[str, Any]]) -> str:
    """Equal neighbours counted: `7 of 2x4 remat + 8`."""
    parts: list[tuple[str, int]] = []
    for stage in stages:
        text = "x".join(map(str, stage["mesh"])) + " remat" * stage["remat"]
        if parts and parts[-1][0] == text:
            parts[-1] = (text, parts[-1][1] + 1)
        else:
            parts.append((text, 1))
    return " + ".join(f"{n} of {text}" if n > 1 else text for text, n in parts)


def far_from_published(row: Row) -> str:
    """One sentence on a row where Alpa's own plan is not predicted near what Alpa measured; empty where it is."""
    found, alpa_ = predicted(row, "alpas"), measured(row, "alpa")
    name = f"- {NAMES[row['family']]} {row['size']}"
    if found is None:
        return f"{name}: Alpa's plan does not fit by our account of memory, which keeps float32 state and gradients"
    if alpa_ is None or abs(found / alpa_ - 1) <= NEAR:
        return ""
    if found < alpa_:
        return f"{name}: {found / alpa_:.2f} of it; {SLOWER}"
    held = f"{_ratio(predicted(row, 'waiting'), alpa_)} if meshes wait while they send, as Alpa's did"
    return f"{name}: {found / alpa_:.2f} of it, {held}; {FASTER[row['family']]}"


SLOWER = "the preset's shares of the peaks are those of PyTorch's kernels on other V100 hosts; XLA fuses more of them"

FASTER = {
    "gpt": "kernel launches, small matrix products and the driver's work are not priced",
    "moe": "gating and dispatch are priced as if they were large matrix products, kernel launches not at all",
    "wide_resnet": "convolutions are priced as matrix products, whatever algorithm cuDNN takes",
}
"""What the cost model leaves out, by family."""


def line(row: Row) -> str:
    """What is printed as soon as a row is there."""
    ours, alpas = predicted(row, "ours"), measured(row, "alpa")
    seconds = f"{row['ours']['seconds']:.0f} s" if row["ours"] else "-"
    text = f"{row['family']}:{row['size']} on {row['gpus']}: {_number(ours)} PFLOP/s"
    return f"{text}, Alpa measured {_number(alpas)} (planned in {seconds}, rivals in {row['rivals_s']:.0f} s)"


def chart(path: Path, rows: Sequence[Row]) -> str:
    """A panel per family, a group of bars per row; predicted bars are filled, published ones outlined."""
    panels = [_panel(f, [r for r in rows if r["family"] == f]) for f in NAMES if any(r["family"] == f for r in rows)]
    return draw_bars(
        path, "Weak scaling on p3.16xlarge, V100: predicted (filled), published measurements (outlined)", panels
    )


def _panel(family: str, rows: Sequence[Row]) -> Panel:
    rival = f"{RIVALS[family]}, published"
    columns: dict[str, Callable[[Row], float | None]] = {"our plan": lambda r: predicted(r, "ours")}
    if family != "wide_resnet":
        columns["Megatron's kind, best of grid"] = best_rival
    columns["data parallel, best of ZeRO 0, 2, 3"] = lambda r: predicted(r, "data parallel")
    columns["Alpa's plan, predicted"] = lambda r: predicted(r, "alpas")
    columns |= {"Alpa, published": lambda r: measured(r, "alpa"), rival: lambda r: measured(r, "rival")}
    mine = (COLORS[0], COLORS[1], COLORS[2], COLORS[3], COLORS[3], COLORS[4])
    colors = mine if family != "wide_resnet" else (mine[0], *mine[2:])
    return Panel(
        title=NAMES[family],
        groups=[f"{r['size']}, {r['gpus']} GPU{'s' * (r['gpus'] > 1)}" for r in rows],
        series={name: [per_gpu(r, value(r)) for r in rows] for name, value in columns.items()},
        unit="TFLOP/s per GPU",
        hollow=("Alpa, published", rival),
        missing="out of memory",
        colors=colors,
    )


def per_gpu(row: Row, value: float | None) -> float | None:
    """TFLOP/s of one GPU."""
    return None if value is None else value * 1e3 / row["gpus"]
