"""Charts of the benchmarks as PNG files, drawn without pyplot. Colours can be told apart by colour-blind people."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["COLORS", "Lines", "Panel", "draw_bars", "draw_lines", "drawable"]

# M. Okabe and K. Ito, "Color Universal Design" (2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, MUTED, FAINT = "#222222", "#666666", "#DDDDDD"


@dataclass(frozen=True, slots=True)
class Panel:
    """Groups of bars: `series` maps a name to one value per group, None for no bar; `hollow` names are outlined."""

    title: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    unit: str
    hollow: Sequence[str] = ()
    missing: str = ""
    colors: Sequence[str] = COLORS


@dataclass(frozen=True, slots=True)
class Lines:
    """Curves over one quantity: `curves` map a name to its values at `x`.

    Those that `grow` have a logarithmic scale, on which what is proportional to the quantity is a straight line.
    """

    title: str
    label: str
    unit: str
    x: Sequence[float]
    curves: Mapping[str, Sequence[float]]
    grow: bool = False


FEW = 3
"""So many bars can be named below the axis."""

MISSING = "no chart: matplotlib is not installed; run: pip install 'alpa-like[viz]'"


def drawable() -> bool:
    """Whether matplotlib, an extra, is there."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_bars(path: Path, title: str, panels: Sequence[Panel]) -> str:
    """Panels one below the other, those of one group of few bars side by side; returns what to say of it.

    Every bar has its value written on it; a missing one has the panel's word for it.
    """
    if not drawable():
        return MISSING
    from matplotlib.figure import Figure

    beside = all(len(panel.groups) == 1 and len(panel.series) <= FEW for panel in panels)
    shape = (1, len(panels)) if beside else (len(panels), 1)
    size = (4.2 * len(panels) + 0.4, 3.4) if beside else (10, 0.7 + 2.9 * len(panels))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    for axes, panel in zip(figure.subplots(*shape, squeeze=False).flat, panels, strict=True):
        if beside:
            _single(axes, panel)
        else:
            _bars(axes, panel)
    return _save(figure, path)


def _single(axes: Any, panel: Panel) -> None:
    """One bar per series, named below it."""
    tallest = max((v for (v,) in panel.series.values() if v is not None), default=1.0)
    for number, (value,) in enumerate(panel.series.values()):
        axes.bar([number], [value or 0.0], 0.6, color=panel.colors[number % len(panel.colors)])
        text = panel.missing if value is None else f"{value:.3g}"
        axes.text(number, (value or 0.0) + 0.02 * tallest, text, ha="center", va="bottom", fontsize=8, color=INK)
    axes.set_xticks(range(len(panel.series)), [name.replace(" ", "\n", 1) for name in panel.series], fontsize=8)
    axes.set_xlim(-0.6, len(panel.series) - 0.4)
    axes.set_ylim(0, 1.15 * tallest)
    _frame(axes, f"{panel.title}, {panel.groups[0]}", panel.unit)


def _bars(axes: Any, panel: Panel) -> None:
    width, count = 0.84, len(panel.series)
    tallest = max((v for values in panel.series.values() for v in values if v is not None), default=1.0)
    for number, (name, values) in enumerate(panel.series.items()):
        at = [g - width / 2 + (number + 0.5) * width / count for g in range(len(panel.groups))]
        color, hollow = panel.colors[number % len(panel.colors)], name in panel.hollow
        face = "white" if hollow else color
        heights = [v or 0.0 for v in values]
        axes.bar(at, heights, 0.9 * width / count, label=name, facecolor=face, edgecolor=color, linewidth=1.2)
        for x, value in zip(at, values, strict=True):
            text = panel.missing if value is None else f"{value:.3g}"
            place = (value or 0.0) + 0.015 * tallest
            axes.text(x, place, text, ha="center", va="bottom", rotation=90, fontsize=6.5, color=MUTED)
    axes.set_xticks(range(len(panel.groups)), panel.groups, fontsize=8)
    axes.set_ylim(0, 1.45 * tallest)
    _frame(axes, panel.title, panel.unit)
    axes.legend(fontsize=7, frameon=False, loc="upper left", ncols=min(count, 3))


def draw_lines(path: Path, title: str, panels: Sequence[Lines]) -> str:
    """Panels side by side, the quantity on a logarithmic scale; returns what to say of it."""
    if not drawable():
        return MISSING
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.9 * len(panels) + 0.4, 3.8), layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _lines(axes, panel)
    return _save(figure, path)


def _lines(axes: Any, panel: Lines) -> None:
    axes.set_xscale("log", base=2)
    for number, (name, values) in enumerate(panel.curves.items()):
        axes.plot(panel.x, values, "o-", color=COLORS[number % len(COLORS)], label=name, linewidth=1.6, markersize=4)
    axes.set_xticks(panel.x, [f"{x:g}" for x in panel.x], fontsize=8)
    values = [v for values in panel.curves.values() for v in values]
    if panel.grow and min(values) > 0:
        axes.set_yscale("log")
        axes.set_ylim(0.7 * min(values), 5 * max(values))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0, 1.25 * max(values))
    axes.minorticks_off()
    axes.set_xlabel(panel.label, fontsize=8.5, color=MUTED)
    _frame(axes, panel.title, panel.unit)
    axes.legend(fontsize=7, frameon=False, loc="upper left", ncols=2)


def _frame(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=9.5, loc="left", color=INK)
    axes.set_ylabel(unit, fontsize=8.5, color=MUTED)
    axes.tick_params(labelsize=8, colors=MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Any, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return f"wrote {path}"
