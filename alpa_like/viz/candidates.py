"""Time against memory of the plans that were considered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alpa_like.plan import Plan
from alpa_like.texts import bytes_text, counted, seconds_text
from alpa_like.viz.rows import TICKS
from alpa_like.viz.style import ALARM, FAINT, INK, KIND_COLORS, MUTED, Box, bare, put, shortened, text_width, time_axis

_MOST = 32
_ROW = 0.24


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that was considered: what it was, its step, and its memory per device; inf where nothing fits."""

    name: str
    step_s: float
    memory_bytes: float
    chosen: bool


def candidates(plan: Plan, others: Sequence[Plan] = ()) -> list[Candidate]:
    """The plan, the meshes that were tried for it, and other plans."""
    mine = Candidate(_label(plan), plan.predicted.step_time_s, plan.predicted.peak_memory_bytes, True)
    tried = [
        Candidate(_tried(c.name, plan), c.step_time_s, c.peak_memory_bytes, False)
        for c in plan.solver.considered
        if (c.step_time_s, c.peak_memory_bytes) != (mine.step_s, mine.memory_bytes) or not _is_it(c.name, plan)
    ]
    more = [Candidate(_label(p), p.predicted.step_time_s, p.predicted.peak_memory_bytes, False) for p in others]
    return [mine, *tried, *more]


def _is_it(name: str, plan: Plan) -> bool:
    """Whether a candidate of that name and with the figures of the plan is the plan."""
    return plan.pipeline is not None or name == "x".join(map(str, plan.mesh_shape))


def _tried(name: str, plan: Plan) -> str:
    return name if plan.pipeline is not None else f"mesh {name.replace('x', '×')}"


def _label(plan: Plan) -> str:
    if plan.pipeline is None:
        return f"{plan.method}, mesh {'×'.join(map(str, plan.mesh_shape))}"
    p = plan.pipeline
    return f"{p.schedule}, {counted(len(p.stages), 'stage')}, {counted(p.num_micro_batches, 'micro-batch')}"


def ranked(found: Sequence[Candidate]) -> list[Candidate]:
    """The fastest first."""
    return sorted(found, key=lambda c: c.step_s)


@dataclass(frozen=True)
class Ranking:
    """The time of all that were considered, the fastest first; those that do not fit have no bar."""

    found: tuple[Candidate, ...]
    title: str = "Time of a step"

    @property
    def shown(self) -> list[Candidate]:
        return ranked(self.found)[:_MOST]

    @property
    def labels(self) -> list[str]:
        return [f"{c.name}   {n}" for n, c in enumerate(self.shown, 1)]

    def height(self, width: float) -> float:
        return _ROW * len(self.shown) + TICKS + (0.2 if len(self.found) > len(self.shown) else 0)

    def draw(self, figure: Figure, box: Box) -> None:
        left = min(max(text_width(name, 7.5, "bold") for name in self.labels) + 0.1, box.width / 2)
        ax = Box(box.left + left, box.top, box.width - left - 0.8, _ROW * len(self.shown)).axes(figure)
        most = max((c.step_s for c in self.shown if math.isfinite(c.step_s)), default=1.0)
        ax.set_xlim(0, most or 1.0)
        ax.set_ylim(len(self.shown), 0)
        ax.set_yticks([])
        bare(ax, "bottom")
        time_axis(ax, most)
        canvas = box.canvas(figure)
        for n, c in enumerate(self.shown):
            _ranked(ax, n, c)
            weight = "bold" if c.chosen else "normal"
            name = shortened(self.labels[n], left - 0.06, 7.5, weight)
            put(canvas, left - 0.06, (n + 0.5) * _ROW, name, 7.5, ha="right", weight=weight)
        if len(self.found) > len(self.shown):
            put(canvas, 0, box.height - 0.08, f"… {len(self.found) - len(self.shown)} slower ones", 7.5, color=MUTED)


def _ranked(ax: Axes, n: int, c: Candidate) -> None:
    fits = math.isfinite(c.step_s)
    seconds = c.step_s if fits else 0.0
    color = KIND_COLORS["compute"] if c.chosen else FAINT
    ax.barh(n + 0.5, seconds, height=0.7, color=color, gid=f"candidate {c.name}")
    put(
        ax,
        seconds,
        n + 0.5,
        f" {seconds_text(seconds)}" if fits else " does not fit",
        7,
        color=INK if fits else ALARM,
    )


@dataclass(frozen=True)
class Scatter:
    """Time against memory of the candidates that fit, numbered as in `Ranking`."""

    found: tuple[Candidate, ...]
    limit_bytes: float
    title: str = "Time against memory"

    @property
    def known(self) -> list[tuple[float, float, Candidate]]:
        """GiB, seconds, and whose they are."""
        return [(c.memory_bytes / 2**30, c.step_s, c) for c in self.found if c.step_s < math.inf]

    def height(self, width: float) -> float:
        return 3.0

    def draw(self, figure: Figure, box: Box) -> None:
        ax = box.inside(left=0.55, top=0.1, right=0.15, bottom=0.42).axes(figure)
        limit, most = self.limit_bytes / 2**30, max((m for m, _, _ in self.known), default=1.0)
        near = most > 0.3 * limit
        ax.set_xlim(0, 1.1 * max(most, limit) if near else 1.5 * most)
        ax.set_ylim(0, 1.25 * max((s for _, s, _ in self.known), default=1.0))
        for memory, seconds, c in self.known:
            color, size = (KIND_COLORS["compute"], 9) if c.chosen else (MUTED, 6)
            ax.plot(memory, seconds, "o", color=color, markersize=size, gid=f"point {c.name}")
        if near:
            ax.axvline(limit, color=ALARM, linewidth=1.0, linestyle=(0, (4, 2)), gid="limit")
        self._numbers(ax, box.width - 0.7, box.height - 0.52)
        self._axes(ax)

    def _numbers(self, ax: Axes, width: float, height: float) -> None:
        """The places in the ranking beside the points; one text for points that lie on each other."""
        near: list[tuple[float, float, list[int]]] = []
        for memory, seconds, c in self.known:
            x, y = memory / ax.get_xlim()[1] * width, seconds / ax.get_ylim()[1] * height
            place = 1 + ranked(self.found).index(c)
            group = next((g for a, b, g in near if abs(a - x) < 0.4 and abs(b - y) < 0.16), None)
            if group is None:
                near.append((x, y, [place]))
            else:
                group.append(place)
        for x, y, group in near:
            put(ax, (x + 0.1) / width, y / height, ", ".join(map(str, sorted(group))), 7.5, transform=ax.transAxes)

    def _axes(self, ax: Axes) -> None:
        most = ax.get_ylim()[1]
        unit, factor = next(((u, f) for u, f in (("s", 1.0), ("ms", 1e3)) if most * f >= 1), ("us", 1e6))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value * factor:g}")
        ax.tick_params(labelsize=7, length=2.5, colors=MUTED)
        ax.set_ylabel(f"step, {unit}", fontsize=7.5, color=MUTED)
        ax.set_xlabel(f"GiB per device (limit {bytes_text(self.limit_bytes)})", fontsize=7.5, color=MUTED)
        ax.grid(color="#EEEEEE")
        ax.set_axisbelow(True)
        bare(ax, "left", "bottom")
