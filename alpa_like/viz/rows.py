"""What the panels with one row per mesh have in common: the names at the left, an axis below, a legend above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from alpa_like.viz.data import Mesh, ranges_text
from alpa_like.viz.style import LABELS, Box, Canvas, bare, legend, put, shortened, stage_color, text_width, time_axis

LEGEND, TICKS = 0.24, 0.36
_EDGE = 0.05


def row_height(count: int) -> float:
    """How high rows are, if there are so many."""
    return 0.36 if count <= 8 else 0.24 if count <= 24 else 0.14


def mesh_name(mesh: Mesh) -> str:
    """`stages 0, 4`; without a pipeline `4 devices`."""
    if mesh.layers:
        return f"stage{'s' * (len(mesh.stages) > 1)} {ranges_text(mesh.stages)}"
    return f"{mesh.devices[1]} device{'s' * (mesh.devices[1] > 1)}"


def row_axes(figure: Figure, box: Box, rows: float, *, left: float = LABELS) -> tuple[Axes, float]:
    """Axes for rows 0, 1, … from the top between legend and ticks, with no frame but the axis below; their width."""
    inner = box.inside(left=left, right=_EDGE, bottom=TICKS)
    ax = inner.axes(figure)
    ax.set_ylim(rows, 0)
    ax.set_yticks([])
    bare(ax, "bottom")
    return ax, inner.width


def time_rows(figure: Figure, box: Box, rows: float, window: tuple[float, float], **options: Any) -> tuple[Axes, float]:
    """`row_axes` over some seconds; the second is inches per second."""
    ax, width = row_axes(figure, box, rows, **options)
    start, end = window
    end = end if end > start else start + 1.0
    ax.set_xlim(start, end)
    time_axis(ax, end)
    return ax, width / (end - start)


def names(figure: Figure, box: Box, meshes: Sequence[Mesh], row: float) -> None:
    """The meshes' names left of their rows; `box` is that of the rows. Low rows are named now and then only."""
    side = Box(box.left, box.top, LABELS - 0.08, len(meshes) * row)
    ax = side.canvas(figure)
    step = max(1, round(0.16 / row + 0.49))
    for n, mesh in enumerate(meshes[::step]):
        swatches(ax, mesh, side.width, (n * step + 0.47) * row)


def swatches(ax: Canvas, mesh: Mesh, width: float, y: float) -> None:
    """The name of a mesh, set to the right, behind the colours of its stages."""
    name = shortened(mesh_name(mesh), width - 0.3, 7.5)
    put(ax, width, y, name, 7.5, ha="right")
    left, each = width - text_width(name, 7.5) - 0.18, 0.14 / len(mesh.stages)
    for n, stage in enumerate(mesh.stages):
        ax.add_patch(
            Rectangle((left + n * each, y - 0.055), each, 0.11, facecolor=stage_color(stage), edgecolor="none")
        )


def legend_above(figure: Figure, box: Box, items: Sequence[tuple[str, Any]]) -> None:
    """A legend in the first line of a box, above its rows."""
    legend(Box(box.left, box.top, box.width, LEGEND).canvas(figure), LABELS, 0.08, items, box.width - LABELS)
