"""What two plans decide differently: predictions, stages, and the tensors that lie otherwise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from alpa_like.plan import (
    Plan,
    bytes_text,
    common_path,
    seconds_text,
    shown_stages,
)
from alpa_like.viz.data import mesh_text, meshes
from alpa_like.viz.folded import Tensor, fold, split_path, starred
from alpa_like.viz.glyphs import dims_text, glyph
from alpa_like.viz.style import (
    INK,
    LABELS,
    MUTED,
    Box,
    Canvas,
    legend,
    put,
    shortened,
    stage_color,
    text_width,
)  # fmt: skip
from alpa_like.viz.tensors import head_text, short_path

LEFT, RIGHT = "#4477AA", "#EE6677"
_PAIR, _COLUMN, _PICTURE = 0.8, 5.2, 0.8
_MOST = 80

_PIECE = re.compile(r"(forward|backward|input_grad|weight_grad|before|update) [\d.]+\[")
_INNER = re.compile(r"\(whole batch\)$|^micro-batch$")


@dataclass(frozen=True, slots=True)
class Side:
    """A tensor in one of the plans, and the names of the mesh axes there."""

    tensor: Tensor
    names: tuple[str, ...]

    @property
    def cuts(self) -> list[list[tuple[str, int]]]:
        """The names and sizes of the axes that split each dim."""
        return [[(self.names[a], size) for a, size in cut] for cut in self.tensor.cuts]


@dataclass(frozen=True, slots=True)
class Change:
    """Tensors that two plans have otherwise; a side is None where that plan has no such tensor.

    Their paths differ in numbers only, or in what stands before the keys (`heads`).
    """

    name: str
    heads: tuple[str, ...]
    paths: tuple[str, ...]
    left: Side | None
    right: Side | None

    @property
    def nbytes(self) -> float:
        """Of the side that has more on a device, for all of them."""
        return len(self.paths) * max(s.tensor.bytes_each for s in (self.left, self.right) if s)


def changes(left: Plan, right: Plan) -> list[Change]:
    """The arguments and results whose sharding differs, the largest first; results that repeat an argument left out."""
    mine, theirs = _sides(left), _sides(right)
    found: dict[object, list[str]] = {}
    for path in dict.fromkeys((*mine, *theirs)):
        a, b = mine.get(path), theirs.get(path)
        if a is None or b is None or a.cuts != b.cuts:
            tail = split_path(starred(path))[1] or starred(path)
            found.setdefault((tail, _key(a), _key(b)), []).append(path)
    rows = [_change(paths, mine.get(paths[0]), theirs.get(paths[0])) for paths in found.values()]
    return sorted(rows, key=lambda c: (-c.nbytes, c.name))


def _sides(plan: Plan) -> dict[str, Side]:
    """Arguments, where the state lies between steps; results that repeat no argument."""
    made = {p.path for s in plan.stages for p in s.outputs}
    found: dict[str, Side] = {}
    for stage in (*shown_stages(plan), *plan.stages):
        for p in (p for p in stage.inputs if p.path not in made and not _INNER.search(p.path)):
            found.setdefault(p.path, Side(fold([p], stage.mesh_shape)[0], stage.axis_names))
    given = {split_path(path)[1] or path.partition(".")[2] for path in found}
    for stage in plan.stages:
        for p in (p for p in stage.outputs if not _PIECE.match(p.path)):
            if (split_path(p.path)[1] or p.path.partition(".")[2]) not in given:
                found.setdefault(p.path, Side(fold([p], stage.mesh_shape)[0], stage.axis_names))
    return found


def _key(side: Side | None) -> object:
    return side and (side.tensor.shape, side.tensor.dtype, str(side.cuts))


def _change(paths: Sequence[str], left: Side | None, right: Side | None) -> Change:
    alike: dict[str, list[str]] = {}
    for path in paths:
        alike.setdefault(starred(path), []).append(path)
    names = [common_path(each) for each in alike.values()]
    parts = [split_path(n) for n in names]
    if len(names) == 1:
        return Change(names[0], (), tuple(paths), left, right)
    return Change(parts[0][1], tuple(head for head, _ in parts), tuple(paths), left, right)


@dataclass(frozen=True)
class Predictions:
    """Predicted figures of both plans, one pair of bars each, in shares of the larger one."""

    left: Plan
    right: Plan
    title: str = "Predicted"

    @cached_property
    def rows(self) -> list[tuple[str, float, float, bool]]:
        a, b = self.left.predicted, self.right.predicted
        return [
            ("step", a.step_time_s, b.step_time_s, True),
            ("compute", a.compute_time_s, b.compute_time_s, True),
            ("communication", a.communication_time_s, b.communication_time_s, True),
            ("peak memory", a.peak_memory_bytes, b.peak_memory_bytes, False),
            ("traffic", a.total_traffic_bytes, b.total_traffic_bytes, False),
        ]

    def height(self, width: float) -> float:
        return 0.24 + 0.42 * len(self.rows)

    def draw(self, figure: Figure, box: Box) -> None:
        ax = box.canvas(figure)
        legend(ax, LABELS, 0.08, [("left", LEFT), ("right", RIGHT)], box.width - LABELS)
        room = box.width - LABELS - 2.0
        for n, (name, a, b, is_time) in enumerate(self.rows):
            y, most = 0.24 + 0.42 * n, max(a, b) or 1.0
            put(ax, LABELS - 0.1, y + 0.17, name, 8, ha="right")
            for value, color, dy in ((a, LEFT, 0.02), (b, RIGHT, 0.18)):
                wide = room * value / most
                ax.add_patch(Rectangle((LABELS, y + dy), wide, 0.15, facecolor=color, edgecolor="none", gid=name))
                text = seconds_text(value) if is_time else bytes_text(value)
                put(ax, LABELS + wide + 0.06, y + dy + 0.075, text, 7)
            put(ax, box.width, y + 0.17, _ratio(a, b), 8, ha="right", color=MUTED)


def _ratio(left: float, right: float) -> str:
    if left == right:
        return "the same"
    if not left or not right:
        return ""
    return f"{right / left:.2f} ×" if 0.01 < right / left < 100 else f"{right / left:.0e} ×"


@dataclass(frozen=True)
class Strips:
    """Both plans as strips of devices and, for pipelines, of layers, coloured by stage."""

    left: Plan
    right: Plan
    title: str = "Stages"

    @cached_property
    def rows(self) -> list[tuple[str, list[tuple[int, float]], str]]:
        """A label, the share of the strip for each stage, and what stands behind it."""
        found: list[tuple[str, list[tuple[int, float]], str]] = []
        for side, plan in (("left", self.left), ("right", self.right)):
            parts = [(m.stages[0], m.devices[1] / plan.cluster.num_devices) for m in meshes(plan)]
            first = meshes(plan)[0]
            mesh = f", mesh {mesh_text(first.shape, first.axis_names)}" if plan.pipeline is None else ""
            found.append((f"{side}, devices", parts, f"{plan.cluster.num_devices} devices{mesh}"))
            if plan.pipeline is not None:
                count = len(plan.pipeline.layer_ends)
                layers = [(i, (s.last - s.first + 1) / count) for i, s in enumerate(plan.pipeline.stages)]
                found.append((f"{side}, layers", layers, f"{count} layers, {plan.pipeline.schedule}"))
        return found

    def height(self, width: float) -> float:
        return 0.3 * len(self.rows)

    def draw(self, figure: Figure, box: Box) -> None:
        ax = box.canvas(figure)
        room = box.width - LABELS - 2.2
        for n, (name, parts, after) in enumerate(self.rows):
            y, x = 0.3 * n + 0.03, LABELS
            put(ax, LABELS - 0.1, y + 0.11, name, 8, ha="right")
            for stage, share in parts:
                wide = share * room
                strip = Rectangle((x, y), wide, 0.22, facecolor=stage_color(stage), edgecolor="white", linewidth=0.7)
                ax.add_patch(strip)
                text = next((t for t in (f"stage {stage}", str(stage)) if text_width(t, 7) < wide), "")
                put(ax, x + wide / 2, y + 0.11, text, 7, ha="center")
                x += wide
            put(ax, x + 0.08, y + 0.11, shortened(after, 2.1, 7.5), 7.5, color=MUTED)


@dataclass(frozen=True)
class Changes:
    """Pairs of pictures, left and right, of the tensors whose sharding differs."""

    found: tuple[Change, ...]
    title: str

    @property
    def shown(self) -> tuple[Change, ...]:
        return self.found[:_MOST]

    def height(self, width: float) -> float:
        rows = -(-len(self.shown) // max(1, int(width / _COLUMN)))
        return max(0.2, rows * _PAIR) + (0.2 if len(self.found) > len(self.shown) else 0)

    def draw(self, figure: Figure, box: Box) -> None:
        ax = box.canvas(figure)
        columns = max(1, int(box.width / _COLUMN))
        wide = box.width / columns
        for n, change in enumerate(self.shown):
            self._pair(ax, change, Box(n % columns * wide, n // columns * _PAIR, wide - 0.15, _PAIR))
        if not self.found:
            put(ax, 0, 0.1, "Every argument and result lies the same in both plans.", 8)
        if len(self.found) > len(self.shown):
            put(ax, 0, box.height - 0.1, f"… {len(self.found) - len(self.shown)} more", 7.5, color=MUTED)

    def _pair(self, ax: Canvas, change: Change, box: Box) -> None:
        count = f"{len(change.paths)} × " if len(change.paths) > 1 else ""
        heads = f" ({', '.join(map(head_text, change.heads))})" if change.heads else ""
        name = shortened(f"{count}{short_path(change.name)}{heads}", box.width, 7.5, "bold")
        put(ax, box.left, box.top + 0.08, name, 7.5, weight="bold")
        half = box.width / 2
        for side, x in ((change.left, box.left), (change.right, box.left + half)):
            self._side(ax, side, Box(x, box.top + 0.18, half - 0.15, box.height - 0.24))
        y = box.top + 0.48
        arrow = FancyArrowPatch(
            (box.left + half - 0.24, y), (box.left + half - 0.08, y), color=INK, arrowstyle="->", mutation_scale=7
        )
        ax.add_patch(arrow)

    def _side(self, ax: Canvas, side: Side | None, box: Box) -> None:
        if side is None:
            put(ax, box.left + 0.1, box.top + box.height / 2, "not there", 7.5, color=MUTED)
            return
        glyph(ax, Box(box.left, box.top, _PICTURE - 0.12, box.height), side.tensor)
        x, width = box.left + _PICTURE, box.width - _PICTURE
        dims_text(ax, x, box.top + box.height / 2 - 0.09, width, side.tensor, side.names)
        text = f"{bytes_text(side.tensor.bytes_each)} per device"
        put(ax, x, box.top + box.height / 2 + 0.1, shortened(text, width, 6.5), 6.5, color=MUTED)
