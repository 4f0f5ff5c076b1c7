"""What the scripts share: options that name meshes and methods, text tables, and compiled traffic and memory."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import alpa_like as alpa
from alpa_like.plan import Plan
from alpa_like.runtime.hlo import KINDS, read_collectives, traffic_by_kind

MIB = 2.0**20

Mesh = tuple[int, ...]
MeshOption = Literal["auto"] | Mesh
Traffic = Mapping[str, float]

METHODS: dict[str, Callable[..., Any]] = {
    "ShardParallel": alpa.ShardParallel,
    "DataParallel": alpa.DataParallel,
    "Zero2Parallel": alpa.Zero2Parallel,
    "Zero3Parallel": alpa.Zero3Parallel,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """What XLA made of a step, in bytes per device: ring traffic by kind, as it is and as on a GPU, and peak memory."""

    raw: Traffic
    gpu: Traffic
    memory: float

    @property
    def raw_total(self) -> float:
        return sum(self.raw.values())

    @property
    def gpu_total(self) -> float:
        return sum(self.gpu.values())


def measure(compiled: Any) -> Measured:
    """Read a `jax.stages.Compiled`. Memory is counted as `Executable.memory_bytes` counts it."""
    found, m = read_collectives(compiled.as_text()), compiled.memory_analysis()
    memory = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return Measured(traffic_by_kind(found), traffic_by_kind(found, reduce_scatter=True), memory)


def measure_executable(executable: alpa.Executable) -> Measured:
    """The same of one of our executables."""
    both = (executable.traffic(), executable.traffic(reduce_scatter=True))
    raw, gpu = ({k: n for k, n in t.items() if k in KINDS} for t in both)  # not what a pipeline sends between meshes
    return Measured(raw, gpu, executable.memory_bytes())


def compare(plan: Plan, executable: alpa.Executable) -> str:
    """A table of what the plan predicts against what was compiled, MiB per device."""
    measured = measure_executable(executable)
    columns = (plan.predicted.traffic_bytes, measured.raw, measured.gpu)
    rows = [(kind, *(mib(c.get(kind, 0.0)) for c in columns)) for kind in KINDS if any(c.get(kind) for c in columns)]
    rows.append(("all traffic", *(mib(sum(c.values())) for c in columns)))
    rows.append(("peak memory", mib(plan.predicted.peak_memory_bytes), mib(measured.memory), mib(measured.memory)))
    heads = ("MiB per device", "predicted", "compiled", "with reduce-scatter*")
    note = "* an all-reduce of which each device keeps its part counts as the reduce-scatter that GPUs and TPUs do"
    return f"{table(heads, rows)}\n{note}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns; the first is text, the others are set to the right."""
    lines = [tuple(heads), *(tuple(r) for r in rows)]
    widths = [max(len(line[c]) for line in lines) for c in range(len(heads))]
    lines.insert(1, tuple("-" * w for w in widths))
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    return "  ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]).rstrip()


def mib(nbytes: float) -> str:
    """Bytes in MiB, with more digits where they are few."""
    value = nbytes / MIB
    return f"{value:.1f}" if value >= 10 or value == 0 else f"{value:.3g}"


def ratio(value: float, reference: float) -> float:
    """value / reference, 1 where both are 0."""
    if reference:
        return value / reference
    return math.inf if value else 1.0


def mesh_text(mesh: MeshOption) -> str:
    """`2x4`, as options take it."""
    return mesh if isinstance(mesh, str) else "x".join(map(str, mesh))


def mesh_option(text: str) -> MeshOption:
    """`auto`, `8`, `2x4`, … of the command line."""
    if text == "auto":
        return "auto"
    parts = text.split("x")
    if not all(p.isdigit() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(f"expected auto or a mesh such as 8, 2x4 or 2x2x2, found {text!r}")
    return tuple(int(p) for p in parts)


def parser(docstring: str | None) -> argparse.ArgumentParser:
    """A parser that explains itself with the docstring of its script."""
    return argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
