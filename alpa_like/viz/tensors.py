"""The sharding of every argument, result and activation of a plan, as cards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from matplotlib.figure import Figure

from alpa_like.plan import Plan
from alpa_like.texts import bytes_text
from alpa_like.viz.data import mesh_text
from alpa_like.viz.folded import Section, Tensor, by_size, sections
from alpa_like.viz.glyphs import MINE, dims_text, glyph
from alpa_like.viz.style import INK, MUTED, Box, Canvas, axis_color, legend, put, shortened, text_width

_PICTURE = 0.85
_CARD = 0.66
_COLUMN = 3.3
_HEAD = 0.3
_MOST = 400


def short_path(path: str) -> str:
    """`h0.attn.out` for `['h0']['attn']['out']`; other paths as they are."""
    return re.sub(r"\['([^']*)'\]", r".\1", path).removeprefix(".")


@dataclass(frozen=True)
class Cards:
    """The tensors of one section; the first `most` of them, and how many more there are."""

    section: Section
    heading: str
    most: int = _MOST
    title: str = ""

    @cached_property
    def shown(self) -> tuple[Tensor, ...]:
        return self.section.tensors[: self.most]

    def columns(self, width: float) -> int:
        return max(1, int(width / _COLUMN))

    def height(self, width: float) -> float:
        more = 0.2 if len(self.shown) < len(self.section.tensors) else 0.0
        return _HEAD + -(-len(self.shown) // self.columns(width)) * _CARD + more

    def draw(self, figure: Figure, box: Box) -> None:
        ax = box.canvas(figure)
        self._head(ax, box.width)
        columns = self.columns(box.width)
        wide = box.width / columns
        for n, tensor in enumerate(self.shown):
            place = Box(n % columns * wide, _HEAD + n // columns * _CARD, wide - 0.12, _CARD)
            card(ax, place, tensor, self.section.axis_names)
        left = self.section.tensors[len(self.shown) :]
        if left:
            text = f"… {len(left)} more, {bytes_text(sum(t.total_bytes for t in left))} per device together"
            put(ax, 0, box.height - 0.1, text, 7.5, color=MUTED)

    def _head(self, ax: Canvas, width: float) -> None:
        put(ax, 0, 0.09, self.heading, 8.5, weight="bold")
        s = self.section
        sizes = enumerate(zip(s.axis_names, s.mesh_shape, strict=True))
        axes = [(f"axis {name}: {size}", axis_color(a)) for a, (name, size) in sizes if size > 1]
        items = [*axes, ("what one device has", MINE)]
        left = text_width(self.heading, 8.5, "bold") + 0.25
        legend(ax, left, 0.09, items, width - left)


def card(ax: Canvas, box: Box, tensor: Tensor, names: Sequence[str]) -> None:
    """The picture of a tensor, its name, its dims, and what a device has of it."""
    glyph(ax, Box(box.left, box.top + 0.05, _PICTURE - 0.1, box.height - 0.12), tensor)
    x, width = box.left + _PICTURE, box.width - _PICTURE
    put(ax, x, box.top + 0.13, shortened(short_path(tensor.name), width, 7.5, "bold"), 7.5, weight="bold", color=INK)
    dims_text(ax, x, box.top + 0.31, width, tensor, names)
    put(ax, x, box.top + 0.48, _details(tensor, width), 6.5, color=MUTED)


def _details(tensor: Tensor, width: float) -> str:
    """Bytes per device, type, and where the tensors stand; without the less important where there is no room."""
    if not tensor.dtype:
        return ""
    count = f"{tensor.count} × " if tensor.count > 1 else ""
    size, heads = f"{count}{bytes_text(tensor.bytes_each)}", ", ".join(head_text(h) for h in tensor.heads)
    forms = ((f"{size} per device", tensor.dtype, heads), (size, tensor.dtype, heads), (size, heads))
    texts = [" · ".join(p for p in form if p) for form in forms]
    return next((t for t in texts if text_width(t, 6.5) <= width), shortened(texts[-1], width, 6.5))


def head_text(head: str) -> str:
    """The last name of what stands before the keys: `mu` of `state.opt_state[*].mu`."""
    return head.split(".")[-1]


def cards_of(plan: Plan) -> list[Cards]:
    """All of a plan: per section its tensors."""
    return [Cards(s, _heading(s)) for s in sections(plan)]


def largest(plan: Plan, most: int) -> list[Cards]:
    """The section with the largest tensors, cut short; without a pipeline the largest activations besides."""
    found = sections(plan)
    best = max((s for s in found if not s.inside), key=lambda s: max((t.total_bytes for t in s.tensors), default=0.0))
    best = replace(best, tensors=tuple(sorted(best.tensors, key=by_size)))
    cards = [Cards(best, _heading(best), most, title="Sharding of the largest tensors")]
    return [*cards, *(Cards(s, _heading(s), most) for s in found if s.inside)]


def _heading(section: Section) -> str:
    return f"{section.title}, mesh {mesh_text(section.mesh_shape, section.axis_names)}"
