"""Where a plan puts arguments and results: meshes, layouts and `NamedSharding`s, for passes and runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.tree_util import tree_unflatten

from alpa_like.errors import PlanError
from alpa_like.plan import Placed, Plan, Spec, StagePlan, partition_spec
from alpa_like.reshard import Layout, Transfer
from alpa_like.runtime.instructions import Program, Ref, Route
from alpa_like.tracer import Leaf, Trace

__all__ = [
    "AbstractDevices",
    "Given",
    "Lowered",
    "LoweredPipeline",
    "Returned",
    "argument_layouts",
    "check_count",
    "device_mesh",
    "layout_in",
    "matching",
    "place",
]


@dataclass(frozen=True, slots=True)
class AbstractDevices(Sequence[int]):
    """Devices that are elsewhere, known by number only: what a step is lowered for that other processes run.

    There are `total` of them. `platform` is that of `jax.Device.platform` there; "gpu" means NVIDIA's, "rocm" AMD's.
    """

    total: int
    platform: str

    def __post_init__(self) -> None:
        if self.platform not in _LOWERED_FOR:
            raise PlanError(f"expected a platform of {', '.join(_LOWERED_FOR)}, found {self.platform!r}")
        if self.total < 1:
            raise PlanError(f"expected 1 or more devices, found {self.total}")

    @property
    def lowering_platform(self) -> str:
        """JAX's name of the platform that programs are lowered for."""
        return _LOWERED_FOR[self.platform]

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> range: ...
    def __getitem__(self, index: int | slice) -> int | range:
        return range(self.total)[index]


_LOWERED_FOR = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "rocm": "rocm", "tpu": "tpu"}


@dataclass(frozen=True, slots=True)
class Lowered:
    """A compiled stage and where its arguments and results belong, in the trees of the step."""

    compiled: Any
    mesh: Mesh
    input_shardings: tuple[Any, ...]
    output_shardings: Any


@dataclass(frozen=True, slots=True)
class Given:
    """What a buffer holds at the start: a flat argument, all of it or one micro-batch, or a micro-batch's number."""

    argument: int
    micro_batch: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class Returned:
    """A flat result: buffers, to be joined along `dim` if there is one per micro-batch; a constant if there is none."""

    buffers: tuple[tuple[int, Ref], ...]
    dim: int = -1
    constant: Any = None


@dataclass(frozen=True)
class LoweredPipeline:
    """Everything that runs a step, and where: as layouts, which need no device.

    `pieces` are compiled, or for `AbstractDevices` `runtime.staged.Staged`. `arguments` are the layouts of the flat
    arguments, None for those of a batch that is cut up; `results` those of the flat results, None where parts of
    micro-batches are joined and for constants.
    """

    programs: tuple[Program, ...]
    pieces: dict[str, Any]
    transfers: dict[Route, tuple[Transfer, Any]]
    given: dict[tuple[int, Ref], Given]
    returned: tuple[Returned, ...]
    arguments: tuple[Layout | None, ...]
    results: tuple[Layout | None, ...]
    names: dict[int, str]


def check_count(count: int, devices: Sequence[Any]) -> None:
    """Raise `PlanError` where a plan is for another number of devices."""
    if count != len(devices):
        raise PlanError(
            f"the plan is for {count} devices, but {len(devices)} are here; "
            f"call alpa.init(num_devices={count}), or plan again for the devices here"
        )


def device_mesh(
    shape: tuple[int, ...], axis_names: tuple[str, ...], numbers: tuple[int, int], devices: Sequence[Any]
) -> Any:
    """A mesh of the devices (first, count) of all `devices`, row-major; an `AbstractMesh` of `AbstractDevices`.

    An `AbstractMesh` does not know which devices it stands for: keep the `Layout` where that matters.
    """
    types = (AxisType.Auto,) * len(axis_names)
    if isinstance(devices, AbstractDevices):
        return AbstractMesh(shape, axis_names, axis_types=types)
    first, count = numbers
    grid = np.array([devices[n] for n in range(first, first + count)]).reshape(shape)
    return Mesh(grid, axis_names, axis_types=types)


def layout_in(stage: StagePlan, spec: Spec) -> Layout:
    """A spec on the mesh of a stage."""
    return Layout(stage.mesh_shape, stage.axis_names, stage.devices, spec)


def place(trace: Trace, stage: StagePlan, devices: Sequence[Any]) -> tuple[Mesh, tuple[Any, ...], Any]:
    """The stage's mesh, and the shardings of arguments and results in the trees of the step.

    `PlanError` where the plan's tensors are not those of the step.
    """
    _check_tensors("argument", stage.inputs, trace.arguments)
    _check_tensors("result", stage.outputs, trace.results)
    mesh = device_mesh(stage.mesh_shape, stage.axis_names, stage.devices, devices)
    inputs = tree_unflatten(trace.in_tree, [_sharding(mesh, p) for p in stage.inputs])
    return mesh, inputs, tree_unflatten(trace.out_tree, [_sharding(mesh, p) for p in stage.outputs])


def _check_tensors(what: str, placed: Sequence[Placed], leaves: Sequence[Leaf]) -> None:
    mine = [Leaf(p.path, p.shape, p.dtype) for p in placed]
    if len(mine) != len(leaves):
        raise PlanError(f"the step has {len(leaves)} {what}s, but the plan places {len(mine)}; plan it again")
    for found, leaf in zip(mine, leaves, strict=True):  # paths may differ: names can change, the program stays
        if (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            raise PlanError(f"the {what} {leaf} of the step is {found} in the plan; plan it again")


def _sharding(mesh: Mesh, placed: Placed) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(placed.spec, mesh.axis_names))


def argument_layouts(trace: Trace, plan: Plan, devices: Sequence[Any]) -> list[Layout]:
    """Where the plan places each flat argument; with a pipeline on the mesh of its stage. `PlanError` for too few."""
    check_count(max(stage.devices[0] + stage.devices[1] for stage in plan.stages), devices)
    known: dict[str, Layout] = {}
    for stage in sorted(plan.stages, key=lambda s: not s.name.startswith("update")):
        for placed in stage.inputs:
            known.setdefault(placed.path, layout_in(stage, placed.spec))
    anywhere = plan.stages[0]
    unread = (layout_in(anywhere, ((),) * len(leaf.shape)) for leaf in trace.arguments)
    return [known.get(leaf.path, place) for leaf, place in zip(trace.arguments, unread, strict=True)]


def matching(trace: Trace, inputs: Sequence[Any], state: Any) -> Any:
    """Of the shardings of all arguments, those of the argument that has the tree and shapes of `state`."""
    wanted = _shapes(state)
    for shardings, abstract in zip(inputs, trace.abstract_arguments(), strict=True):
        if _shapes(abstract) == wanted:
            return shardings
    raise PlanError(
        f"{trace.name} takes no argument like this state: expected one argument with the tree, shapes and dtypes of "
        f"what the initializer returns, {jax.tree.structure(state)}"
    )


def _shapes(tree: Any) -> Any:
    flat, structure = jax.tree.flatten(tree)
    return structure, [(tuple(x.shape), str(x.dtype)) for x in flat]
