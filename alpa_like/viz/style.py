"""Colours, texts that fit, and the sheet on which panels are put one below the other. All lengths are inches."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from matplotlib import style as mpl_style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.transforms import Affine2D

WIDTH = 11.0
MARGIN = 0.3
GAP = 0.22
TITLE = 0.3
LABELS = 1.35
"""Left of everything with a time axis, so that the axes of panels lie above each other."""

INK, MUTED, FAINT, IDLE, ALARM = "#222222", "#666666", "#D5D5D5", "#E9E9E9", "#BB0000"

# P. Tol, "Colour schemes" (2021), scheme "light", made to be told apart by colour-blind people under black text.
STAGE_COLORS = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#DDDDDD", "#AAAA00")

# M. Okabe and K. Ito, "Color Universal Design" (2008).
AXIS_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
KIND_COLORS = {
    "forward": "#56B4E9",
    "backward": "#E69F00",
    "input_grad": "#E69F00",
    "weight_grad": "#3BAF87",
    "update": "#CC79A7",
    "send": "#7A7A7A",
    "waiting": IDLE,
    "compute": "#56B4E9",
    "communication": "#D55E00",
    "all-gather": "#D55E00",
    "all-reduce": "#F0A884",
    "reduce-scatter": "#9A4A1C",
    "all-to-all": "#F0E442",
    "collective-permute": "#BBBBBB",
    "slice": "#9FB6CB",
}
KIND_NAMES = {
    "input_grad": "backward: inputs",
    "weight_grad": "backward: weights",
    "send": "send to another mesh",
    "slice": "copies of parts",
}


def stage_color(stage: int) -> str:
    """The colour of a stage; colours come again after nine stages, so the number stands beside them."""
    return STAGE_COLORS[stage % len(STAGE_COLORS)]


def axis_color(axis: int) -> str:
    return AXIS_COLORS[axis % len(AXIS_COLORS)]


def shade(color: str, share: float) -> tuple[float, float, float]:
    """A colour, mixed with white where `share` is below 1."""
    red, green, blue = (1 - (1 - c) * share for c in to_rgb(color))
    return red, green, blue


# ------------------------------------------------------------------------------------------------- text


@lru_cache(maxsize=20000)
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """How wide a text gets, rounded up: hinting makes small letters up to 7 % wider than their outlines."""
    font = FontProperties(size=size, weight=weight)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return 1.08 * width / 72 + 0.01


def shortened(text: str, width: float, size: float, weight: str = "normal") -> str:
    """The text, or as much of its start and its end as fits."""
    if text_width(text, size, weight) <= width:
        return text
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        kept = (fits + too_long) // 2
        short = text_width(_ends(text, kept), size, weight) <= width
        fits, too_long = (kept, too_long) if short else (fits, kept)
    return _ends(text, fits) if fits else ""


def _ends(text: str, kept: int) -> str:
    """So many characters, a third of them from the start, the others from the end."""
    start = kept // 3
    return f"{text[:start]}…{text[len(text) - (kept - start) :]}"


def wrapped(text: str, width: float, size: float) -> list[str]:
    """Lines of whole words that fit; a word that is too long is shortened."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(shortened(word, width, size))
    return lines


def put(ax: Axes | Canvas, x: float, y: float, text: str, size: float = 8, **options: Any) -> Text:
    """A text as it stands, without TeX; by default its left end and its middle are at (x, y)."""
    options = {"color": INK, "va": "center", "ha": "left", "parse_math": False} | options
    return ax.text(x, y, text, fontsize=size, **options)


# ------------------------------------------------------------------------------------------------ sheets


class Picture(Figure):
    """A figure that notebooks show although it knows nothing of pyplot."""

    def _repr_png_(self) -> bytes:
        return png(self, dpi=110)


def png(figure: Figure, dpi: float = 110) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a sheet; `top` is measured from the upper edge."""

    left: float
    top: float
    width: float
    height: float

    def inside(self, left: float = 0, top: float = 0, right: float = 0, bottom: float = 0) -> Box:
        """The box without its edges."""
        return Box(self.left + left, self.top + top, self.width - left - right, self.height - top - bottom)

    def axes(self, figure: Figure) -> Axes:
        """Axes that fill the box."""
        width, height = figure.get_size_inches()
        bottom = height - self.top - self.height
        return figure.add_axes((self.left / width, bottom / height, self.width / width, self.height / height))

    def canvas(self, figure: Figure) -> Canvas:
        """The box to draw into without axes."""
        return Canvas(figure, self)


class Canvas:
    """Draws onto a figure in inches, (0, 0) being the upper left corner of a box. Axes would take 30 ms each."""

    def __init__(self, figure: Figure, box: Box) -> None:
        self.figure = figure
        shift = Affine2D().scale(1, -1).translate(box.left, figure.get_size_inches()[1] - box.top)
        self.transform = shift + figure.dpi_scale_trans

    def text(self, x: float, y: float, s: str, **options: Any) -> Text:
        return self.figure.text(x, y, s, transform=self.transform, **options)

    def add_patch(self, patch: Patch) -> None:
        self._add(patch)

    def line(self, x: Sequence[float], y: Sequence[float], **options: Any) -> None:
        self._add(Line2D(x, y, **options))

    def _add(self, artist: Artist) -> None:
        artist.set_transform(self.transform)
        self.figure.add_artist(artist)


class Panel(Protocol):
    """Something with a title that can be drawn into a box as high as it asks for."""

    @property
    def title(self) -> str: ...

    def height(self, width: float) -> float: ...

    def draw(self, figure: Figure, box: Box) -> None: ...


def titled_height(panel: Panel, width: float) -> float:
    """How much a panel takes together with its title."""
    return panel.height(width) + (TITLE if panel.title else 0.0)


def draw_titled(panel: Panel, figure: Figure, left: float, top: float, width: float) -> None:
    """Draw a panel below its title."""
    if panel.title:
        title = shortened(panel.title, width, 9.5, "bold")
        put(Box(left, top, width, TITLE).canvas(figure), 0, 0.1, title, 9.5, weight="bold")
        top += TITLE
    panel.draw(figure, Box(left, top, width, panel.height(width)))


@dataclass(frozen=True)
class Beside:
    """Two panels side by side; the first is `left_width` wide, the second takes the rest."""

    left: Panel
    right: Panel
    left_width: float
    title: str = ""

    def height(self, width: float) -> float:
        return max(titled_height(self.left, self.left_width), titled_height(self.right, self._rest(width)))

    def draw(self, figure: Figure, box: Box) -> None:
        draw_titled(self.left, figure, box.left, box.top, self.left_width)
        draw_titled(self.right, figure, box.left + self.left_width + GAP, box.top, self._rest(box.width))

    def _rest(self, width: float) -> float:
        return width - self.left_width - GAP


def sheet(title: str, lines: Sequence[str], panels: Sequence[Panel], width: float = WIDTH) -> Picture:
    """A figure with a heading, lines of text below it, and the panels one below the other."""
    inner = width - 2 * MARGIN
    text = [part for line in lines for part in wrapped(line, inner, 8.5)]
    head = 0.34 + 0.19 * len(text)
    total = 2 * MARGIN + head + sum(titled_height(p, inner) + GAP for p in panels)
    with mpl_style.context("default"):
        figure = Picture(figsize=(width, total), facecolor="white")
        _head(figure, Box(MARGIN, MARGIN, inner, head), title, text)
        top = MARGIN + head
        for panel in panels:
            draw_titled(panel, figure, MARGIN, top + GAP, inner)
            top += titled_height(panel, inner) + GAP
    return figure


def _head(figure: Figure, box: Box, title: str, lines: Sequence[str]) -> None:
    ax = box.canvas(figure)
    put(ax, 0, 0.1, shortened(title, box.width, 12, "bold"), 12, weight="bold")
    for number, line in enumerate(lines):
        put(ax, 0, 0.38 + 0.19 * number, line, 8.5, color=MUTED)


def legend(ax: Canvas, x: float, y: float, items: Sequence[tuple[str, Any]], width: float, size: float = 7.5) -> None:
    """Coloured squares with their names in one line of a canvas; smaller, then shortened, where it is longer than
    `width`."""
    while size > 5.5 and sum(_item_width(name, size) for name, _ in items) > width:
        size -= 0.5
    end = x + width
    for name, color in items:
        name = shortened(name, end - x - 0.16, size)
        ax.add_patch(Rectangle((x, y - 0.055), 0.11, 0.11, facecolor=color, edgecolor="none"))
        put(ax, x + 0.16, y, name, size)
        x += _item_width(name, size)


def _item_width(name: str, size: float) -> float:
    return 0.16 + text_width(name, size) + 0.16


def time_axis(ax: Axes, seconds: float, label: str = "") -> None:
    """Ticks of a horizontal axis that counts seconds, in a unit that suits `seconds`."""
    unit, factor = next(((u, f) for u, f in (("s", 1.0), ("ms", 1e3)) if seconds * f >= 1), ("us", 1e6))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value * factor:g}")
    ax.tick_params(labelsize=7, length=2.5, colors=MUTED)
    ax.set_xlabel(f"{label}{unit}", fontsize=7.5, color=MUTED, labelpad=1)


def bare(ax: Axes, *keep: str) -> None:
    """Hide the frame but for the sides to keep."""
    for side, spine in ax.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(FAINT)
