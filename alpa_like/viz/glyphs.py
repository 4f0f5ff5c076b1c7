"""A tensor as a picture: a bar, a rectangle or a cuboid, cut along its dims in the colours of the mesh axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.patches import Polygon

from alpa_like.viz.folded import Tensor
from alpa_like.viz.style import INK, MUTED, Box, Canvas, axis_color, put, text_width

_WHOLE, MINE, _EDGE = "#F3F3F3", "#9FB6CB", "#8A8A8A"
_THIN = 0.13
_DEPTH = 0.4
_MOST_CUTS = 16
_SPACE = 0.003
"""Inches between words per point of their size."""

Point = tuple[float, float]
Cut = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Side:
    """One drawn dim: the vector of its length on paper, and what cuts it."""

    vector: Point
    cut: Cut

    @property
    def parts(self) -> int:
        return min(_MOST_CUTS, math.prod(size for _, size in self.cut))

    def at(self, part: int) -> Point:
        return self.vector[0] * part / self.parts, self.vector[1] * part / self.parts

    def color(self, part: int) -> str:
        """That of the axis whose parts meet before part number `part`: the minor one but where the major one cuts."""
        inner = self.parts
        for axis, size in self.cut:
            inner = max(1, inner // size)
            if part % inner == 0:
                return axis_color(axis)
        return axis_color(self.cut[-1][0])


@dataclass(frozen=True, slots=True)
class _Face:
    """A parallelogram; `mine` says whether the first device's part shows on it."""

    a: _Side
    b: _Side
    start: Point
    mine: bool = True


def shown_dims(tensor: Tensor) -> list[int]:
    """The at most three dims that a picture shows: those that are cut, then the largest; none of one element."""
    sizes = tensor.shape or (2,) * len(tensor.spec)
    wanted = [d for d in range(len(sizes)) if sizes[d] > 1 or tensor.cuts[d]]
    return sorted(sorted(wanted, key=lambda d: (not tensor.cuts[d], -sizes[d]))[:3])


def glyph(ax: Canvas, box: Box, tensor: Tensor) -> None:
    """Draw a tensor into a box of a canvas; the dark part is what one device has."""
    faces = _faces(*_sides(box, tensor))
    for face in faces:
        _area(ax, face.start, face.a.vector, face.b.vector, facecolor=_WHOLE, edgecolor="none")
        if face.mine:
            _area(ax, face.start, face.a.at(1), face.b.at(1), facecolor=MINE, edgecolor="none")
        _area(ax, face.start, face.a.vector, face.b.vector, facecolor="none", edgecolor=_EDGE, linewidth=0.7)
        for side, other in ((face.a, face.b), (face.b, face.a)):
            _cuts(ax, face.start, side, other)


def _sides(box: Box, tensor: Tensor) -> tuple[tuple[_Side, _Side, _Side], Point]:
    """Depth, height and width, and the upper left corner of the front; the picture is in the middle of the box."""
    dims = shown_dims(tensor)
    lengths, cuts = _lengths(tensor, dims), [tensor.cuts[d] for d in dims]
    pad = 3 - len(dims)
    deep, high, wide = (*(0.0,) * pad, *lengths)
    cut_deep, cut_high, cut_wide = (*((),) * pad, *cuts)
    back = deep * _DEPTH * box.height
    room = _DEPTH * box.height if deep else 0.0
    height = high * (box.height - room) if high else _THIN
    width = wide * (box.width - room) if wide else _THIN
    corner = box.left + (box.width - width - back) / 2, box.top + (box.height - height + back) / 2
    return (_Side((back, -back), cut_deep), _Side((0.0, height), cut_high), _Side((width, 0.0), cut_wide)), corner


def _lengths(tensor: Tensor, dims: Sequence[int]) -> list[float]:
    """Shares of the room; a dim that is 100 times longer is drawn about 2 times longer."""
    sizes = [tensor.shape[d] if tensor.shape else 1 for d in dims]
    return [max(0.45, (n / max(sizes)) ** 0.3) for n in sizes]


def _faces(sides: tuple[_Side, _Side, _Side], corner: Point) -> list[_Face]:
    deep, high, wide = sides
    front = _Face(high, wide, corner)
    if not deep.vector[0]:
        return [front]
    right = corner[0] + wide.vector[0], corner[1]
    return [_Face(deep, wide, corner), _Face(high, deep, right, mine=wide.parts == 1), front]


def _area(ax: Canvas, start: Point, a: Point, b: Point, **options: object) -> None:
    x, y = start
    corners = [(x, y), (x + a[0], y + a[1]), (x + a[0] + b[0], y + a[1] + b[1]), (x + b[0], y + b[1])]
    ax.add_patch(Polygon(corners, closed=True, **options))  # pyright: ignore[reportArgumentType]


def _cuts(ax: Canvas, start: Point, side: _Side, other: _Side) -> None:
    apart = math.hypot(*side.at(1)) * 72
    width = min(1.5, max(0.4, apart / 3))
    for part in range(1, side.parts):
        dx, dy = side.at(part)
        x, y = start[0] + dx, start[1] + dy
        ax.line(
            [x, x + other.vector[0]],
            [y, y + other.vector[1]],
            color=side.color(part),
            linewidth=width,
            solid_capstyle="butt",
        )


def dims_text(ax: Canvas, x: float, y: float, width: float, tensor: Tensor, names: Sequence[str]) -> None:
    """`512 × 2048 ÷4y`: the sizes, and behind each what cuts it, in the colour of the axis; smaller where long."""
    parts = _dim_parts(tensor, names)
    size = 7.5
    while size > 4 and sum(text_width(t, size) + _SPACE * size for t, _ in parts) > width:
        size -= 0.5
    for text, color in parts:
        put(ax, x, y, text, size, color=color)
        x += text_width(text, size) + _SPACE * size


def _dim_parts(tensor: Tensor, names: Sequence[str]) -> list[tuple[str, str]]:
    if not tensor.spec:
        return [("a number", MUTED)]
    parts: list[tuple[str, str]] = []
    for dim, cut in enumerate(tensor.cuts):
        if dim:
            parts.append(("×", MUTED))
        parts.append((str(tensor.shape[dim]) if tensor.shape else "n", INK))
        parts.extend((f"÷{size}{names[axis]}", axis_color(axis)) for axis, size in cut)
    return parts
