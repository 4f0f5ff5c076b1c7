"""The tensors of a plan, those that are alike as one; nothing here draws."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from alpa_like.plan import Placed, Plan, Spec, StagePlan
from alpa_like.texts import common_path
from alpa_like.viz.data import forward_piece, local_bytes, ranges_text, shown_stages


@dataclass(frozen=True, slots=True)
class Tensor:
    """Tensors that are alike: `paths` differ in numbers, or in what stands before the keys (`heads`).

    `cuts` has, per dim, the axis and its size for every mesh axis that splits it. `shape` is empty and `rank` decides
    where the plan does not say the shape.
    """

    name: str
    heads: tuple[str, ...]
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    spec: Spec
    cuts: tuple[tuple[tuple[int, int], ...], ...]
    bytes_each: float
    count: int

    @property
    def total_bytes(self) -> float:
        return self.bytes_each * self.count


@dataclass(frozen=True, slots=True)
class Section:
    """The tensors of meshes that have the same: arguments, results, activations, the largest of each first.

    `inside` says that all of them are activations.
    """

    title: str
    mesh_shape: tuple[int, ...]
    axis_names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    inside: bool = False


def cuts_of(spec: Spec, mesh_shape: Sequence[int]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Axis and size of every mesh axis of more than one device, per dim."""
    return tuple(tuple((a, mesh_shape[a]) for a in axes if mesh_shape[a] > 1) for axes in spec)


def sections(plan: Plan) -> list[Section]:
    """Every argument and result, then the activations; equal meshes of a pipeline once.

    Activations of a pipeline are those that its stages keep or hand on.
    """
    found: dict[tuple[object, ...], tuple[list[str], Section]] = {}
    for stage in shown_stages(plan):
        kinds = (fold(stage.inputs, stage.mesh_shape), _results(stage), _activations(plan, stage))
        tensors = tuple(t for kind in kinds for t in sorted(kind, key=by_size))
        alike = tuple((starred(t.name), tuple(map(starred, t.heads)), t.shape, t.spec, t.count) for t in tensors)
        key = (stage.mesh_shape, stage.axis_names, alike)
        names, section = found.get(key, ([], Section("", stage.mesh_shape, stage.axis_names, tensors)))
        both = tuple(map(_of_another_mesh, section.tensors, tensors)) if names else tensors
        found[key] = ([*names, stage.name], replace(section, tensors=both))
    many = plan.pipeline is not None
    shown = [replace(s, title=_section_title(names) if many else "all devices") for names, s in found.values()]
    return [*shown, *([] if many else _inside(plan.stages[0]))]


def _inside(stage: StagePlan) -> list[Section]:
    """The activations of a step without a pipeline."""
    tensors = tuple(sorted(fold(stage.activations, stage.mesh_shape), key=by_size))
    return [Section("activations", stage.mesh_shape, stage.axis_names, tensors, inside=True)] if tensors else []


def _of_another_mesh(first: Tensor, other: Tensor) -> Tensor:
    """The same tensors of two meshes as one; `count` stays that of each mesh."""
    name = first.name if first.name == other.name else starred(first.name)
    return replace(first, name=name, paths=(*first.paths, *other.paths))


def _section_title(names: Sequence[str]) -> str:
    flat = [int(n) for name in names for n in name.split(", ")]
    text = ranges_text(flat)
    return f"{'stage' if len(flat) == 1 else 'stages'} {text if len(text) < 40 else f'{text[:36]}, …'}"


def by_size(tensor: Tensor) -> tuple[float, str]:
    """Sorts the largest first."""
    return -tensor.total_bytes, tensor.name


def starred(path: str) -> str:
    """The path with * for each of its numbers."""
    return re.sub(r"\d+", "*", path)


def fold(placed: Iterable[Placed], mesh_shape: Sequence[int]) -> list[Tensor]:
    """One tensor for all that differ in numbers of their path only, and for the state that an optimizer keeps of it."""
    alike: dict[tuple[str, tuple[int, ...], str, Spec], list[str]] = {}
    for p in placed:
        alike.setdefault((starred(p.path), p.shape, p.dtype, p.spec), []).append(p.path)
    merged: dict[tuple[str, ...], Tensor] = {}
    for (_, shape, dtype, spec), paths in alike.items():
        name = common_path(paths)
        head, tail = split_path(name)
        tail = tail if re.search(r"[.\[]", head) else ""  # batch['x'] keeps its name
        each = local_bytes(Placed(name, shape, dtype, spec), mesh_shape)
        mine = Tensor(
            tail or name,
            (head,) if tail else (),
            tuple(paths),
            shape,
            dtype,
            spec,
            cuts_of(spec, mesh_shape),
            each,
            len(paths),
        )
        key = (tail or name, str(shape), dtype, str(spec))
        merged[key] = _joined(merged[key], mine) if key in merged else mine
    return list(merged.values())


def _joined(first: Tensor, other: Tensor) -> Tensor:
    heads, paths = (*first.heads, *other.heads), (*first.paths, *other.paths)
    return replace(first, heads=heads, paths=paths, count=first.count + other.count)


def split_path(path: str) -> tuple[str, str]:
    """`state.params` and `['h0']['up']` of their concatenation; the second is empty where no text keys end the path."""
    found = re.fullmatch(r"(.*?)((?:\['[^']*'\])+)", path)
    return (found[1], found[2]) if found else (path, "")


def _results(stage: StagePlan) -> list[Tensor]:
    """What comes back and lies otherwise than every argument; most of the state that comes back does not."""
    given = {(p.shape, p.dtype, p.spec) for p in stage.inputs}
    return fold([p for p in stage.outputs if (p.shape, p.dtype, p.spec) not in given], stage.mesh_shape)


def _activations(plan: Plan, shown: StagePlan) -> list[Tensor]:
    """What the forward pass of a mesh's stages hands to its backward pass or to another stage, for one micro-batch."""
    found: list[Tensor] = []
    if plan.pipeline is None:
        return found
    for stage in (int(n) for n in shown.name.split(", ")):
        piece = forward_piece(plan, stage)
        following = {p.path for s in plan.stages if s.name == f"forward {stage + 1}" for p in s.inputs}
        inner = [p for p in piece.outputs if p.path.startswith("forward ") and p.shape]
        for what, chosen in (
            ("sent to the next stage", [p for p in inner if p.path in following]),
            ("kept for the backward pass", [p for p in inner if p.path not in following]),
        ):
            found.extend(replace(t, name=what, heads=()) for t in fold(chosen, piece.mesh_shape))
    return found
