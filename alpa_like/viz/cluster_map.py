"""Where the stages lie: the cluster's devices, a table of the stages, and the layers with their work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from alpa_like.plan import Plan
from alpa_like.texts import bytes_text
from alpa_like.viz.data import Mesh, memory_limit, mesh_text, meshes
from alpa_like.viz.style import (
    ALARM,
    FAINT,
    INK,
    LABELS,
    MUTED,
    Beside,
    Box,
    Canvas,
    Panel,
    bare,
    put,
    shortened,
    stage_color,
    text_width,
)

_HOSTS_PER_COLUMN = 8
_LEAST = 0.13
_MOST_CELLS = 4096
_ROW = 0.24
_SHOWN = 16
_COLUMNS = (
    ("stage", 0.5), ("layers", 0.6), ("devices", 0.7), ("mesh", 0.95), ("memory per device", 1.8), ("remat", 0.45),
)  # fmt: skip


@dataclass(frozen=True)
class ClusterMap:
    """Hosts × devices, coloured by stage; the bar in a device is its memory against the limit."""

    plan: Plan
    title: str = "Devices, by stage"

    @cached_property
    def owners(self) -> dict[int, Mesh]:
        return {d: m for m in meshes(self.plan) for d in range(m.devices[0], sum(m.devices))}

    @property
    def hosts(self) -> int:
        """How many hosts are drawn."""
        return min(self.plan.cluster.hosts, max(1, _MOST_CELLS // self.plan.cluster.devices_per_host))

    @property
    def wide(self) -> bool:
        """Whether it needs the whole width of a sheet."""
        return self.hosts > _HOSTS_PER_COLUMN or self.plan.cluster.devices_per_host > 16

    def columns(self, width: float) -> int:
        """How many hosts stand side by side."""
        if self.hosts <= _HOSTS_PER_COLUMN:
            return 1
        return max(1, int(width / (self.margin + 0.08 + _LEAST * self.plan.cluster.devices_per_host)))

    def rows(self, width: float) -> int:
        return -(-self.hosts // self.columns(width))

    def cell(self, width: float) -> tuple[float, float]:
        """Width and height of one device."""
        room = width / self.columns(width) - self.margin - 0.08
        return min(0.85, room / self.plan.cluster.devices_per_host), 0.46 if not self.wide else 0.26

    @property
    def margin(self) -> float:
        return text_width(f"host {self.plan.cluster.hosts - 1}", 7.5) + 0.08

    def height(self, width: float) -> float:
        more = 0.2 if self.hosts < self.plan.cluster.hosts else 0.0
        return self.rows(width) * self.cell(width)[1] + more

    def draw(self, figure: Figure, box: Box) -> None:
        ax = box.canvas(figure)
        wide, high = self.cell(box.width)
        rows, column = self.rows(box.width), box.width / self.columns(box.width)
        for host in range(self.hosts):
            left, top = host // rows * column, host % rows * high
            put(ax, left, top + high / 2, f"host {host}", 7.5, color=MUTED)
            self._host(ax, host, Box(left + self.margin, top, wide, high))
        if self.hosts < self.plan.cluster.hosts:
            put(ax, 0, box.height - 0.08, f"… {self.plan.cluster.hosts - self.hosts} more hosts", 7.5, color=MUTED)

    def _host(self, ax: Canvas, host: int, cell: Box) -> None:
        """The devices of a host; where they are small, a mesh is named once."""
        each = self.plan.cluster.devices_per_host
        named: dict[int, list[float]] = {}
        for n, device in enumerate(range(host * each, (host + 1) * each)):
            gap = 0.0 if self.wide else 0.03
            box = Box(cell.left + n * cell.width, cell.top, cell.width - gap, cell.height - 0.04)
            self._device(ax, device, box)
            if device in self.owners and not self.wide:
                self._texts(ax, self.owners[device], device, box)
            elif device in self.owners:
                named.setdefault(self.owners[device].number, []).append(box.left)
        for number, lefts in named.items():
            mesh = meshes(self.plan)[number]
            name = "+".join(map(str, mesh.stages)) if mesh.layers else ""
            width = lefts[-1] - lefts[0] + cell.width
            if text_width(name, 7.5) < width:
                put(ax, lefts[0] + width / 2, cell.top + cell.height / 2 - 0.02, name, 7.5, ha="center")

    def _device(self, ax: Canvas, device: int, box: Box) -> None:
        mesh = self.owners.get(device)
        if mesh is None:
            _rectangle(ax, box, facecolor="white", edgecolor=FAINT, linewidth=0.7)
            return
        part = box.height / len(mesh.stages)
        for n, stage in enumerate(mesh.stages):
            band = Box(box.left, box.top + n * part, box.width, part)
            _rectangle(ax, band, facecolor=stage_color(stage), edgecolor="none", gid=f"device {device} stage {stage}")
        self._memory(ax, mesh, box)

    def _memory(self, ax: Canvas, mesh: Mesh, box: Box) -> None:
        if self.wide:
            return
        share = mesh.memory_bytes / memory_limit(self.plan)
        bar = Box(box.left + 0.03, box.top + box.height - 0.07, box.width - 0.06, 0.045)
        _rectangle(ax, bar, facecolor="white", edgecolor="none", alpha=0.75)
        full = Box(bar.left, bar.top, bar.width * min(1.0, share), bar.height)
        _rectangle(ax, full, facecolor=INK if share <= 1 else ALARM, edgecolor="none")

    def _texts(self, ax: Canvas, mesh: Mesh, device: int, box: Box) -> None:
        """The stages in the middle, the device's number in the corner, where there is room."""
        name = "+".join(map(str, mesh.stages)) if mesh.layers else _coordinates(mesh, device)
        middle, y = box.left + box.width / 2, box.top + box.height * 0.42
        if text_width(name, 10, "bold") + 0.3 < box.width:
            put(ax, box.left + 0.03, box.top + 0.07, str(device), 5.5, color=INK, alpha=0.65)
            put(ax, middle, y, name, 10, ha="center", weight="bold")
        elif text_width(name, 7.5) < box.width:
            put(ax, middle, y, name, 7.5, ha="center")


def _coordinates(mesh: Mesh, device: int) -> str:
    """Where a device stands in its mesh, such as `1,0`."""
    rest, found = device - mesh.devices[0], list[int]()
    for size in reversed(mesh.shape):
        found.insert(0, rest % size)
        rest //= size
    return ",".join(map(str, found))


def _rectangle(ax: Canvas, box: Box, **options: object) -> None:
    ax.add_patch(Rectangle((box.left, box.top), box.width, box.height, **options))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class StageTable:
    """One row per stage: layers, devices, mesh, memory. Of many the middle is left out."""

    plan: Plan
    title: str = "Stages"

    @cached_property
    def rows(self) -> list[tuple[int, Mesh]]:
        return sorted((stage, m) for m in meshes(self.plan) for stage in m.stages)

    @property
    def shown(self) -> list[tuple[int, Mesh] | None]:
        """None stands for what is left out."""
        if len(self.rows) <= _SHOWN:
            return [*self.rows]
        return [*self.rows[: _SHOWN // 2], None, *self.rows[-(_SHOWN // 2) :]]

    @property
    def remat(self) -> bool:
        """Whether any stage computes layers again."""
        return self.plan.pipeline is not None and any(s.remat for s in self.plan.pipeline.stages)

    def height(self, width: float) -> float:
        return _ROW * (len(self.shown) + 1)

    def draw(self, figure: Figure, box: Box) -> None:
        ax = box.canvas(figure)
        scale = min(1.15, box.width / sum(w for _, w in _COLUMNS))
        edges = [scale * sum(w for _, w in _COLUMNS[:n]) for n in range(len(_COLUMNS) + 1)]
        for (name, _), x in zip(_COLUMNS if self.remat else _COLUMNS[:-1], edges, strict=False):
            put(ax, x, _ROW / 2, name, 7.5, color=MUTED)
        for number, row in enumerate(self.shown, 1):
            y = (number + 0.5) * _ROW
            if row is None:
                put(ax, 0.2, y, f"… {len(self.rows) - _SHOWN} more stages", 7.5, color=MUTED)
            else:
                self._row(ax, row, y, edges)

    def _row(self, ax: Canvas, row: tuple[int, Mesh], y: float, edges: Sequence[float]) -> None:
        stage, mesh = row
        first, count = mesh.devices
        _rectangle(ax, Box(0, y - 0.07, 0.14, 0.14), facecolor=stage_color(stage), edgecolor="none")
        layers = "all" if self.plan.pipeline is None else _span(*mesh.layers[mesh.stages.index(stage)])
        cells = (str(stage), layers, _span(first, first + count - 1), mesh_text(mesh.shape, mesh.axis_names))
        for n, (cell, x) in enumerate(zip(cells, (0.2, *edges[1:]), strict=False)):
            put(ax, x, y, shortened(cell, edges[n + 1] - x - 0.03, 7.5), 7.5)
        if self.plan.pipeline is not None and self.plan.pipeline.stages[stage].remat:
            put(ax, edges[5], y, "yes", 7.5)
        self._memory(ax, mesh, Box(edges[4], y - 0.06, edges[5] - edges[4], 0.12))

    def _memory(self, ax: Canvas, mesh: Mesh, box: Box) -> None:
        limit = memory_limit(self.plan)
        share, wide = mesh.memory_bytes / limit, 0.45
        _rectangle(ax, Box(box.left, box.top, wide, box.height), facecolor="white", edgecolor=MUTED, linewidth=0.6)
        fill = Box(box.left, box.top, wide * min(1.0, share), box.height)
        _rectangle(ax, fill, facecolor=INK if share <= 1 else ALARM, edgecolor="none")
        text = f"{bytes_text(mesh.memory_bytes)} of {bytes_text(limit)}"
        put(ax, box.left + wide + 0.06, box.top + box.height / 2, shortened(text, box.width - wide - 0.06, 7.5), 7.5)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


@dataclass(frozen=True)
class LayerStrip:
    """The work of every layer, coloured by the stage that has it."""

    plan: Plan
    title: str = "Forward work of every layer, by stage"

    def height(self, width: float) -> float:
        return 1.35

    def draw(self, figure: Figure, box: Box) -> None:
        pipeline = self.plan.pipeline
        assert pipeline is not None
        ax = box.inside(left=LABELS / 2, top=0.18, bottom=0.34).axes(figure)
        stages = [i for i, s in enumerate(pipeline.stages) for _ in range(s.first, s.last + 1)]
        flops = [f / 1e9 for f in pipeline.layer_flops]
        count = len(flops)
        gap = 0.06 if count <= 40 else 0.0
        ax.bar(range(count), flops, width=1 - gap, color=[stage_color(s) for s in stages])
        ax.set_xlim(-0.5, count - 0.5)
        ax.set_ylim(0, 1.05 * max(flops) or 1.0)
        ax.set_ylabel("GFLOP", fontsize=7.5, color=MUTED)
        ax.set_xlabel("layer", fontsize=7.5, color=MUTED, labelpad=1)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=3))
        ax.tick_params(labelsize=7, length=2.5, colors=MUTED)
        bare(ax, "left", "bottom")
        self._names(ax, box.width - LABELS / 2, count)

    def _names(self, ax: Axes, width: float, count: int) -> None:
        """The stages above their layers; numbers alone, and nothing, where there is less room."""
        pipeline = self.plan.pipeline
        assert pipeline is not None
        least = min((s.last - s.first + 1) * width / count for s in pipeline.stages)
        last = str(len(pipeline.stages) - 1)
        forms: tuple[Callable[[int], str], ...] = (lambda n: f"stage {n}", str)
        name = next((f for f in forms if text_width(f(int(last)), 7.5) < least), None)
        for number, s in enumerate(pipeline.stages):
            at = ((s.first + s.last + 1) / 2 / count, 1.09)
            if name is not None:
                put(ax, *at, name(number), 7.5, ha="center", transform=ax.transAxes)
            if s.first and len(pipeline.stages) <= _SHOWN:
                ax.axvline(s.first - 0.5, color=INK, linewidth=0.6)


def stage_panels(plan: Plan, inner: float) -> list[Panel]:
    """The map of the cluster and the table of the stages, side by side where the cluster is not too large."""
    pipeline = plan.pipeline is not None
    alone = "Device" if plan.cluster.num_devices == 1 else "Devices, with their places in the mesh"
    where = ClusterMap(plan, "Devices, by stage" if pipeline else alone)
    table = StageTable(plan, "Stages" if pipeline else "Mesh")
    if where.wide:
        return [where, table]
    width = min(inner / 2, max(3.0, 0.6 + 0.72 * plan.cluster.devices_per_host))
    return [Beside(where, table, width)]
