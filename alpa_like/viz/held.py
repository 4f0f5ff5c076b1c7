"""Memory per device: over the simulated step of a pipeline, else its parts, as nothing is known of their order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alpa_like.plan import Plan
from alpa_like.texts import bytes_text
from alpa_like.viz.bars import Bar, stack
from alpa_like.viz.data import MemoryCurve, Mesh, memory_curves, memory_limit, meshes
from alpa_like.viz.rows import LEGEND, TICKS, legend_above, row_axes, swatches
from alpa_like.viz.style import ALARM, INK, LABELS, MUTED, Box, bare, put, time_axis

_MOST = 8
_STATE = ("parameters, optimizer state, other arguments", "#88A0B8")
_OTHER = ("gradients, temporaries", "#C3CFDA")
_HELD = ("micro-batches in flight", "#E69F00")
_NEAR = 0.3
"""The limit is drawn where at least this share of it is used; otherwise the curves would lie flat on the ground."""


@dataclass(frozen=True)
class Memory:
    """Memory per device of each mesh over the step, against what a device has; of many meshes the fullest."""

    plan: Plan
    title: str = "Memory per device during the step"

    @cached_property
    def meshes(self) -> tuple[Mesh, ...]:
        return meshes(self.plan)

    @cached_property
    def curves(self) -> list[MemoryCurve]:
        """Those that are drawn, in the order of the meshes."""
        fullest = sorted(memory_curves(self.plan), key=lambda c: -c.peak_bytes)[:_MOST]
        return sorted(fullest, key=lambda c: c.mesh)

    @property
    def limit(self) -> float:
        return memory_limit(self.plan)

    @property
    def most(self) -> float:
        return max(c.peak_bytes for c in self.curves)

    @property
    def near(self) -> bool:
        return self.most >= _NEAR * self.limit

    @property
    def row(self) -> float:
        return 0.8 if len(self.curves) <= 2 else 0.58

    def height(self, width: float) -> float:
        return LEGEND + len(self.curves) * self.row + TICKS

    def draw(self, figure: Figure, box: Box) -> None:
        for n, curve in enumerate(self.curves):
            place = Box(box.left, box.top + LEGEND + n * self.row, box.width, self.row)
            ax = place.inside(left=LABELS, right=0.05, bottom=0.1).axes(figure)
            self._curve(ax, curve)
            bare(ax, "bottom")
            ax.set_yticks([])
            if n == len(self.curves) - 1:
                time_axis(ax, curve.times_s[-1])
            else:
                ax.set_xticks([])
            self._name(figure, place, curve)
        legend_above(figure, box, self._items())

    def _curve(self, ax: Axes, curve: MemoryCurve) -> None:
        end = curve.times_s[-1]
        fixed = curve.state_bytes + curve.other_bytes
        total = [fixed + held for held in curve.held_bytes]
        ax.set_xlim(0, end or 1.0)
        ax.set_ylim(0, 1.08 * max(self.limit, self.most) if self.near else 1.1 * self.most or 1.0)
        ax.fill_between([0, end], 0, curve.state_bytes, color=_STATE[1], linewidth=0)
        ax.fill_between([0, end], curve.state_bytes, fixed, color=_OTHER[1], linewidth=0)
        ax.fill_between(curve.times_s, fixed, total, step="post", color=_HELD[1], linewidth=0)
        ax.step(curve.times_s, total, where="post", color=INK, linewidth=0.6, gid=f"memory {curve.mesh}")
        if self.near:
            ax.axhline(self.limit, color=ALARM, linewidth=1.0, linestyle=(0, (4, 2)), gid="limit")

    def _name(self, figure: Figure, place: Box, curve: MemoryCurve) -> None:
        side = Box(place.left, place.top, LABELS - 0.08, place.height - 0.1)
        ax = side.canvas(figure)
        swatches(ax, self.meshes[curve.mesh], side.width, side.height / 2 - 0.08)
        put(ax, side.width, side.height / 2 + 0.1, f"peak {bytes_text(curve.peak_bytes)}", 7, ha="right", color=MUTED)

    def _items(self) -> list[tuple[str, Any]]:
        held = [_HELD] if any(max(c.held_bytes) for c in self.curves) else []
        limit = limit_text(self.most, self.limit), ALARM if self.near else "white"
        items: list[tuple[str, Any]] = [_STATE, _OTHER, *held, limit]
        left = len(self.meshes) - len(self.curves)
        return [*items, (f"{left} emptier meshes are not drawn", "white")] if left else items


@dataclass(frozen=True)
class MemoryBar:
    """Peak memory per device of a plan without a pipeline, as one bar of arguments and all the rest."""

    plan: Plan
    title: str = "Peak memory per device"

    def height(self, width: float) -> float:
        return LEGEND + 0.36 + TICKS

    def draw(self, figure: Figure, box: Box) -> None:
        (curve,) = memory_curves(self.plan)
        limit, most = memory_limit(self.plan), curve.peak_bytes
        rows = box.inside(top=LEGEND)
        ax, width = row_axes(figure, rows, 1)
        end = 1.02 * (max(limit, most) if most >= _NEAR * limit else most or 1.0)
        ax.set_xlim(0, end)
        parts = ((_STATE[1], curve.state_bytes), (_OTHER[1], curve.other_bytes))
        stack(ax, 0, [Bar(n, (bytes_text(n),), color, "memory") for color, n in parts], width / end)
        if limit <= end:
            ax.axvline(limit, color=ALARM, linewidth=1.2, linestyle=(0, (4, 2)), gid="limit")
        _bytes_axis(ax, end)
        side = Box(rows.left, rows.top, LABELS - 0.08, 0.36)
        swatches(side.canvas(figure), meshes(self.plan)[0], side.width, 0.15)
        legend_above(figure, box, [_STATE, _OTHER, (limit_text(most, limit), ALARM if limit <= end else "white")])


def limit_text(most: float, limit: float) -> str:
    """The limit of a device, and how much of it is used."""
    used = 100 * most / limit
    return f"limit {bytes_text(limit)}, {f'{used:.3g}' if used >= 0.01 else 'under 0.01'} % used at most"


def _bytes_axis(ax: Axes, end: float) -> None:
    unit, size = next(((u, s) for u, s in (("GiB", 2.0**30), ("MiB", 2.0**20)) if end >= s), ("KiB", 1024.0))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value / size:.3g}")
    ax.set_xticks([end * k / 5 for k in range(5)] if end < size else _round_ticks(end, size))
    ax.tick_params(labelsize=7, length=2.5, colors=MUTED)
    ax.set_xlabel(unit, fontsize=7.5, color=MUTED, labelpad=1)


def _round_ticks(end: float, unit: float) -> list[float]:
    """Whole multiples of 1, 2 or 5 times a power of ten, four to nine of them."""
    step = next(s * 10**e for e in range(6) for s in (1, 2, 5) if end / unit / (s * 10**e) < 9)
    return [unit * step * k for k in range(int(end / unit / step) + 1)]
