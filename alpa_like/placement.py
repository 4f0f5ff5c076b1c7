"""Where a plan puts arguments and results on real devices: meshes and `NamedSharding`s, for passes and runtime."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.tree_util import tree_unflatten

from alpa_like.errors import PlanError
from alpa_like.plan import Placed, Plan, StagePlan, partition_spec
from alpa_like.reshard import Transfer
from alpa_like.runtime.instructions import Program, Ref, Route
from alpa_like.tracer import Trace

__all__ = [
    "Given",
    "Lowered",
    "LoweredPipeline",
    "Returned",
    "check_count",
    "device_mesh",
    "matching",
    "pipeline_shardings",
    "place",
    "state_shardings",
]


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
    sharding: NamedSharding


@dataclass(frozen=True, slots=True)
class Returned:
    """A flat result: buffers, to be joined along `dim` if there is one per micro-batch; a constant if there is none."""

    buffers: tuple[tuple[int, Ref], ...]
    dim: int = -1
    constant: Any = None


@dataclass(frozen=True)
class LoweredPipeline:
    """Everything that runs a step. `arguments` are the shardings of the flat arguments, None for those of the batch."""

    programs: tuple[Program, ...]
    pieces: dict[str, Any]
    transfers: dict[Route, tuple[Transfer, Any]]
    given: dict[tuple[int, Ref], Given]
    returned: tuple[Returned, ...]
    arguments: tuple[NamedSharding | None, ...]
    results: tuple[NamedSharding | None, ...]
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
) -> Mesh:
    """A mesh of the devices (first, count) of all `devices`, row-major."""
    first, count = numbers
    grid = np.array(devices[first : first + count]).reshape(shape)
    return Mesh(grid, axis_names, axis_types=(AxisType.Auto,) * len(axis_names))


def place(trace: Trace, stage: StagePlan, devices: Sequence[Any]) -> tuple[Mesh, tuple[Any, ...], Any]:
    """The stage's mesh, and the shardings of arguments and results in the trees of the step."""
    mesh = device_mesh(stage.mesh_shape, stage.axis_names, stage.devices, devices)
    inputs = tree_unflatten(trace.in_tree, [_sharding(mesh, p) for p in stage.inputs])
    return mesh, inputs, tree_unflatten(trace.out_tree, [_sharding(mesh, p) for p in stage.outputs])


def _sharding(mesh: Mesh, placed: Placed) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(placed.spec, mesh.axis_names))


def state_shardings(trace: Trace, plan: Plan, devices: Iterable[Any], state: Any) -> Any:
    """Where the plan places the argument with the tree and shapes of `state`; `PlanError` where there is none."""
    here = list(devices)
    check_count(plan.stages[0].devices[1], here)
    return matching(trace, place(trace, plan.stages[0], here)[1], state)


def pipeline_shardings(trace: Trace, plan: Plan, devices: Sequence[Any]) -> list[NamedSharding]:
    """Where a plan with a pipeline places each flat argument: on the mesh of its stage."""
    check_count(max(stage.devices[0] + stage.devices[1] for stage in plan.stages), devices)
    known: dict[str, NamedSharding] = {}
    for stage in sorted(plan.stages, key=lambda s: not s.name.startswith("update")):
        mesh = device_mesh(stage.mesh_shape, stage.axis_names, stage.devices, devices)
        for placed in stage.inputs:
            known.setdefault(placed.path, _sharding(mesh, placed))
    anywhere = next(iter(known.values()))
    nowhere = NamedSharding(anywhere.mesh, partition_spec((), ()))
    return [known.get(leaf.path, nowhere) for leaf in trace.arguments]


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
