"""Where the predicted time goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alpa_like.plan import Plan
from alpa_like.texts import seconds_text
from alpa_like.viz.data import Mesh, meshes, seconds_by_mesh, sends_by_mesh, work_by_mesh
from alpa_like.viz.rows import LEGEND, TICKS, legend_above, names, row_height, time_rows
from alpa_like.viz.style import FAINT, INK, KIND_COLORS, KIND_NAMES, Box, put, text_width

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
            return [list(work_by_mesh(self.plan)[0].items())]
        return [[(k, row[k]) for k in KIND_COLORS if row.get(k)] for row in seconds_by_mesh(self.plan)[:_MOST]]

    @cached_property
    def sends(self) -> list[float]:
        return sends_by_mesh(self.plan)

    @property
    def end_s(self) -> float:
        """Where the axis ends: with the longest row."""
        return max(sum(s for _, s in row) for row in self.rows)

    @property
    def row(self) -> float:
        return max(0.2, row_height(len(self.rows)))

    def height(self, width: float) -> float:
        return LEGEND + len(self.rows) * self.row + TICKS

    def draw(self, figure: Figure, box: Box) -> None:
        rows = box.inside(top=LEGEND)
        ax, inches_per_s = time_rows(figure, rows, len(self.rows), (0.0, self.end_s))
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
class Work(Breakdown):
    """Of the meshes of a pipeline the same work as compute and kinds of collectives."""

    @property
    def title(self) -> str:
        return "Compute and communication in this work"

    @cached_property
    def rows(self) -> list[list[Part]]:
        return [[(k, row[k]) for k in KIND_COLORS if row.get(k)] for row in work_by_mesh(self.plan)[:_MOST]]

    @cached_property
    def sends(self) -> list[float]:
        return [0.0] * len(self.rows)

    @property
    def end_s(self) -> float:
        """Where that of the step ends, so that both can be compared."""
        return Breakdown(self.plan).end_s


@dataclass(frozen=True, slots=True)
class Bar:
    """`size` is along the axis; of `texts` the first that fits stands in it."""

    size: float
    texts: tuple[str, ...]
    color: str
    name: str
    ink: str = INK


def stacked(ax: Axes, row: int, parts: Sequence[Part], inches_per_s: float) -> None:
    """Bars one behind the other; their seconds, or shares where there is less room, stand in them."""
    total = sum(s for _, s in parts)
    stack(
        ax, row, [_bar(kind, seconds, f"{100 * seconds / total:.0f} %", row) for kind, seconds in parts], inches_per_s
    )


def _bar(kind: str, seconds: float, share: str, row: int) -> Bar:
    dark = kind in ("all-gather", "reduce-scatter", "communication")
    texts = (f"{seconds_text(seconds)} · {share}", seconds_text(seconds), share)
    return Bar(seconds, texts, KIND_COLORS.get(kind, FAINT), f"{kind} {row}", "white" if dark else INK)


def stack(ax: Axes, row: int, bars: Sequence[Bar], inches_per_unit: float) -> None:
    """Bars one behind the other in a row; `inches_per_unit` is the scale of the axis."""
    left, at = 0.0, row + 0.42
    for bar in bars:
        ax.barh(at, bar.size, 0.68, left, color=bar.color, edgecolor="white", linewidth=0.6, gid=bar.name)
        text = next((t for t in bar.texts if text_width(t, 7) + 0.04 < bar.size * inches_per_unit), "")
        if text:
            put(ax, left + bar.size / 2, at, text, 7, ha="center", color=bar.ink)
        left += bar.size
