"""Where the predicted time goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alpa_like.plan import Plan, seconds_text
from alpa_like.viz.data import Mesh, collectives, meshes, seconds_by_mesh, sends_by_mesh
from alpa_like.viz.rows import LEGEND, TICKS, legend_above, names, row_height, time_rows
from alpa_like.viz.style import FAINT, INK, KIND_COLORS, KIND_NAMES, LABELS, Box, put, text_width

_MOST = 24
Part = tuple[str, float]


@dataclass(frozen=True)
class Breakdown:
    """One stacked bar per mesh that is as long as the step: kinds of work, and waiting. Sends are thin bars below."""

    plan: Plan

    @property
    def title(self) -> str:
        left = len(meshes(self.plan)) - _MOST
        return f"Where the predicted time goes{f', {left} more meshes left out' if left > 0 else ''}"

    @cached_property
    def meshes(self) -> tuple[Mesh, ...]:
        """Those that are drawn: all, unless they are very many."""
        return meshes(self.plan)[:_MOST]

    @cached_property
    def rows(self) -> list[list[Part]]:
        if self.plan.pipeline is None:
            return [busiest(self.plan)]
        return [[(k, row[k]) for k in KIND_COLORS if row.get(k)] for row in seconds_by_mesh(self.plan)[:_MOST]]

    @cached_property
    def sends(self) -> list[float]:
        return sends_by_mesh(self.plan)

    @property
    def row(self) -> float:
        return max(0.2, row_height(len(self.rows)))

    def height(self, width: float) -> float:
        return LEGEND + len(self.rows) * self.row + TICKS

    def draw(self, figure: Figure, box: Box) -> None:
        rows = box.inside(top=LEGEND)
        total = max(sum(s for _, s in row) for row in self.rows)
        ax, inches_per_s = time_rows(figure, rows, len(self.rows), (0.0, total))
        for n, row in enumerate(self.rows):
            stacked(ax, n, row, inches_per_s)
            if self.sends[n]:
                ax.barh(n + 0.86, self.sends[n], height=0.1, color=KIND_COLORS["send"], gid=f"send {n}")
        names(figure, rows, self.meshes, self.row)
        legend_above(figure, box, self._items())

    def _items(self) -> list[tuple[str, Any]]:
        kinds = {kind for row in self.rows for kind, _ in row}
        items: list[tuple[str, Any]] = [(KIND_NAMES.get(k, k), c) for k, c in KIND_COLORS.items() if k in kinds]
        if any(self.sends):
            items.append(("sends, beside other work", KIND_COLORS["send"]))
        return items


@dataclass(frozen=True)
class Busiest:
    """Compute and each kind of collective of the busiest mesh of a pipeline."""

    plan: Plan
    title: str = "Work of the busiest mesh (communication shared out by the bytes that each kind sends)"

    def height(self, width: float) -> float:
        return LEGEND + 0.36 + TICKS

    def draw(self, figure: Figure, box: Box) -> None:
        parts = busiest(self.plan)
        ax, inches_per_s = time_rows(figure, box.inside(top=LEGEND), 1, (0.0, sum(s for _, s in parts)))
        stacked(ax, 0, parts, inches_per_s)
        put(box.inside(top=LEGEND, bottom=TICKS).canvas(figure), LABELS - 0.08, 0.15, "busiest mesh", 7.5, ha="right")
        legend_above(figure, box, [(k, KIND_COLORS.get(k, FAINT)) for k, _ in parts])


def busiest(plan: Plan) -> list[Part]:
    """Seconds of compute and of each kind of collective; all of a step without a pipeline."""
    parts = [("compute", plan.predicted.compute_time_s), *collectives(plan)]
    return [(kind, seconds) for kind, seconds in parts if seconds]


def stacked(ax: Axes, row: int, parts: Sequence[Part], inches_per_s: float) -> None:
    """Bars one behind the other; their seconds, or shares where there is less room, stand in them."""
    left, total = 0.0, sum(s for _, s in parts)
    for kind, seconds in parts:
        ax.barh(
            row + 0.42,
            seconds,
            height=0.68,
            left=left,
            color=KIND_COLORS.get(kind, FAINT),
            edgecolor="white",
            linewidth=0.6,
            gid=f"{kind} {row}",
        )
        share = f"{100 * seconds / total:.0f} %"
        texts = (f"{seconds_text(seconds)} · {share}", seconds_text(seconds), share)
        text = next((t for t in texts if text_width(t, 7) + 0.04 < seconds * inches_per_s), "")
        if text:
            dark = kind in ("all-gather", "reduce-scatter", "communication")
            put(ax, left + seconds / 2, row + 0.42, text, 7, ha="center", color="white" if dark else INK)
        left += seconds
