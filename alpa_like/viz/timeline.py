"""The simulated step: what each mesh does when, and where it waits."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alpa_like.plan import Plan
from alpa_like.simulate import Event, Simulation
from alpa_like.viz.data import Mesh, meshes, own_events, simulation, waits
from alpa_like.viz.rows import LEGEND, TICKS, legend_above, names, row_height, time_rows
from alpa_like.viz.style import FAINT, GAP, IDLE, KIND_COLORS, KIND_NAMES, LABELS, Beside, Box, Panel, put, shade
from alpa_like.viz.style import text_width as width_of

_TASK, _SEND = 0.72, 0.16
_READABLE = 0.2
"""Inches of a bar that has room for a number."""

Span = tuple[float, float]


@dataclass(frozen=True)
class Timeline:
    """One row per mesh; bars carry the number of their micro-batch where there is room.

    `start_s` and `end_s` are the part of the step to show, all of it if not given.
    """

    plan: Plan
    title: str = "Schedule"
    start_s: float = 0.0
    end_s: float | None = None
    named: bool = True
    explained: bool = True

    @cached_property
    def played(self) -> Simulation:
        return simulation(self.plan)

    @cached_property
    def meshes(self) -> tuple[Mesh, ...]:
        return meshes(self.plan)

    @property
    def window(self) -> Span:
        return self.start_s, self.played.makespan_s if self.end_s is None else self.end_s

    @property
    def top(self) -> float:
        return LEGEND if self.explained else 0.0

    @property
    def row(self) -> float:
        return row_height(len(self.meshes))

    def height(self, width: float) -> float:
        return self.top + len(self.meshes) * self.row + TICKS

    def draw(self, figure: Figure, box: Box) -> None:
        rows = box.inside(top=self.top)
        left = LABELS if self.named else 0.0
        ax, inches_per_s = time_rows(figure, rows, len(self.meshes), self.window, left=left)
        every = own_events(self.played)
        for mesh in self.meshes:
            mine = every.get(mesh.number, [])
            self._waits(ax, mesh, waits(mine, self.played.makespan_s))
            events = [e for e in mine if self._shows(e.start_s, e.end_s)]
            self._bars(ax, mesh, events)
            if self.row > 0.2:
                for event in events:
                    self._number(ax, mesh, event, inches_per_s)
        self._sends(ax)
        if self.named:
            names(figure, rows, self.meshes, self.row)
        if self.explained:
            legend_above(figure, box, self._items())

    def _shows(self, start: float, end: float) -> bool:
        return end >= self.window[0] and start <= self.window[1]

    def _waits(self, ax: Axes, mesh: Mesh, found: list[Span]) -> None:
        spans = [(a, b - a) for a, b in found if self._shows(a, b)]
        _spans(ax, spans, (mesh.number + 0.06, _TASK), IDLE, f"waiting {mesh.number}", 0.0)

    def _bars(self, ax: Axes, mesh: Mesh, events: list[Event]) -> None:
        """The bars of one mesh; one collection for all of one kind and shade."""
        bars: dict[tuple[str, Any], list[Span]] = {}
        for e in events:
            group = f"{'task ' if e.task else ''}{e.kind} {mesh.number}"
            bars.setdefault((group, self._color(mesh, e)), []).append((e.start_s, e.end_s - e.start_s))
        edge = 0.4 if self.row > 0.2 and len(events) < 400 else 0.0
        for (group, color), spans in bars.items():
            _spans(ax, spans, (mesh.number + 0.06, _TASK), color, group, edge)

    def _color(self, mesh: Mesh, event: Event) -> Any:
        """Paler for later stages of the same mesh, and a little for every other micro-batch."""
        color = KIND_COLORS.get(event.kind, FAINT)
        if event.task is None:
            return color
        place = mesh.stages.index(event.task.stage) / len(mesh.stages)
        return shade(color, (1 - 0.6 * place) * (1.0 if event.task.micro_batch % 2 else 0.82))

    def _sends(self, ax: Axes) -> None:
        """Below the rows: activations in the upper half of the strip, gradients in the lower one."""
        found: dict[tuple[int, bool], list[Span]] = {}
        for e in self.played.events:
            if e.kind == "send" and self._shows(e.start_s, e.end_s):
                found.setdefault((e.mesh, not e.name.startswith("F")), []).append((e.start_s, e.end_s - e.start_s))
        for (mesh, back), spans in found.items():
            y = mesh + 0.08 + _TASK + back * _SEND / 2
            _spans(ax, spans, (y, _SEND / 2), KIND_COLORS["send"], f"send {mesh}", 0.0)

    def _number(self, ax: Axes, mesh: Mesh, event: Event, inches_per_s: float) -> None:
        """The micro-batch in a bar that is shown whole and has room for it."""
        start, end = self.window
        text = str(event.task.micro_batch) if event.task else event.kind
        size = 7 if self.row > 0.3 else 6
        fits = width_of(text, size) + 0.03 < (event.end_s - event.start_s) * inches_per_s
        if fits and start <= event.start_s and event.end_s <= end:
            put(ax, (event.start_s + event.end_s) / 2, mesh.number + 0.07 + _TASK / 2, text, size, ha="center")

    def _items(self) -> list[tuple[str, Any]]:
        kinds = {e.kind for e in self.played.events}
        items: list[tuple[str, Any]] = [(KIND_NAMES.get(k, k), c) for k, c in KIND_COLORS.items() if k in kinds]
        if any(len(m.stages) > 1 for m in self.meshes):
            items.append(("paler: later stages", shade(KIND_COLORS["forward"], 0.45)))
        if self.plan.pipeline is not None:
            share = f"bubble {100 * self.plan.pipeline.bubble_fraction():.1f} %"
            items.append((f"waiting ({share}{' before the update' if 'update' in kinds else ''})", IDLE))
        return items


def _spans(ax: Axes, spans: list[Span], rows: Span, color: Any, gid: str, edge: float) -> None:
    if spans:
        ax.broken_barh(spans, rows, facecolors=[color], edgecolor="white", linewidth=edge, gid=gid)


def zooms(plan: Plan, width: float) -> tuple[Timeline, Timeline] | None:
    """The start and the end of a schedule whose bars are too thin for numbers in the whole; None where they are not."""
    played = simulation(plan)
    seconds = [e.end_s - e.start_s for e in played.events if e.task]
    if not seconds or not played.makespan_s or row_height(len(meshes(plan))) < 0.2:
        return None
    usual = statistics.median(seconds)
    if usual / played.makespan_s * (width - LABELS) >= _READABLE:
        return None
    part = min(played.makespan_s / 2, usual * (width - LABELS) / 2 / (_READABLE + 0.06))
    return (
        Timeline(plan, "Its start", 0.0, part, explained=False),
        Timeline(plan, "Its end", played.makespan_s - part, None, named=False, explained=False),
    )


def schedule_panels(plan: Plan, width: float) -> list[Panel]:
    """The timeline and, where it is dense, its start and end enlarged."""
    found = zooms(plan, width)
    if found is None:
        return [Timeline(plan)]
    return [Timeline(plan), Beside(*found, LABELS + (width - LABELS - GAP) / 2)]
