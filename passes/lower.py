"""`Plan` → compiled executable: writes the plan's layouts into the program and compiles it.

Every pin becomes `sdy.sharding_constraint` ops, one per layout of its path, so that the partitioner has nothing
left to choose where it matters and does one native step at a time. Operands that want the same tensor along the
same path share it.

Contract
    Input: a `Trace`, a verified `Plan` of it, the devices. Output: `Lowered`, with a `jax.stages.Compiled`, or for
    `AbstractDevices` a `LoweredPipeline` of one mesh, with a `Staged`.
    Raises: `PlanError` where the plan belongs to another program or another number of devices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy

from alpa_like import stablehlo
from alpa_like.errors import PlanError
from alpa_like.graph import OpGraph, skeleton
from alpa_like.passes.sums import hold_back, hold_share
from alpa_like.placement import (
    AbstractDevices,
    Given,
    Lowered,
    LoweredPipeline,
    Returned,
    check_count,
    layout_in,
    place,
)
from alpa_like.plan import Pin, Placed, Plan, Spec, StagePlan
from alpa_like.runtime.instructions import Free, Program, Ref, Run, verify
from alpa_like.runtime.staged import make_piece
from alpa_like.tracer import Trace

__all__ = ["enforce", "enforce_piece", "lower", "lower_single"]


def lower(trace: Trace, plan: Plan, devices: Sequence[Any]) -> Lowered:
    """Compile a plan of one stage for `devices`."""
    stage = _only_stage(trace, plan, devices)
    mesh, inputs, outputs = place(trace, stage, devices)
    step = jax.jit(
        trace.function(),
        in_shardings=inputs,
        out_shardings=outputs,
        donate_argnums=trace.donated,
        keep_unused=True,
    )
    lowered = step.lower(*trace.abstract_arguments())
    if len(devices) > 1:
        enforce(lowered.compiler_ir("stablehlo"), plan, stage)
    return Lowered(lowered.compile(), mesh, inputs, outputs)


def lower_single(trace: Trace, plan: Plan, devices: AbstractDevices) -> LoweredPipeline:
    """The same plan for devices elsewhere: a pipeline of one mesh, which runs one piece, "step", on flat leaves.

    The piece takes all arguments, the batch as a whole, and makes all results, those that are constants or arguments
    as they are too. Donated are the leaves that `lower` would donate and whose memory a result can take.
    """
    stage = _only_stage(trace, plan, devices)
    inputs, outputs = ([layout_in(stage, p.spec) for p in places] for places in (stage.inputs, stage.outputs))
    donated = _reused(trace, stage)
    edit = partial(enforce, plan=plan, stage=stage) if len(devices) > 1 else None
    step = make_piece(trace.name, jaxpr_as_fun(trace.jaxpr), trace.avals, inputs, outputs, devices, donated, edit)
    given, made = _refs(0, len(inputs)), _refs(len(inputs), len(outputs))
    freed = tuple(ref for ref in given if ref.value not in donated)
    run = Run("step", given, made, "step", donated)
    program = Program(0, given, (run, Free(freed)) if freed else (run,), made)
    verify((program,))
    return LoweredPipeline(
        (program,),
        {"step": step},
        {},
        {(0, ref): Given(i, -1, inputs[i]) for i, ref in enumerate(given)},
        tuple(Returned(((0, ref),)) for ref in made),
        tuple(inputs),
        tuple(outputs),
        {i: leaf.path for i, leaf in enumerate((*trace.arguments, *trace.results))},
    )


def _refs(first: int, count: int) -> tuple[Ref, ...]:
    return tuple(Ref(n) for n in range(first, first + count))


def _reused(trace: Trace, stage: StagePlan) -> tuple[int, ...]:
    """The donated leaves whose memory results take, as JAX and XLA pair them: equal tiles first, then equal sizes."""
    tiles = {i: _tile(stage, stage.inputs[i]) for i in trace.donated_leaves}
    room = Counter(_tile(stage, p) for p in stage.outputs)
    found = _taken(tiles, room)
    sizes = {i: _size(tile) for i, tile in tiles.items() if i not in found}
    left = Counter(_size(tile) for tile in room.elements())
    return tuple(sorted((*found, *_taken(sizes, left))))


def _taken(wanted: Mapping[int, Any], room: Counter[Any]) -> list[int]:
    """The leaves that find room, which they take away."""
    found: list[int] = []
    for i, kind in wanted.items():
        if room[kind] > 0:
            room[kind] -= 1
            found.append(i)
    return found


def _size(tile: tuple[tuple[int, ...], str]) -> tuple[int, str]:
    return math.prod(tile[0]), tile[1]


def _tile(stage: StagePlan, placed: Placed) -> tuple[tuple[int, ...], str]:
    """What one device holds of an argument or result: shape and dtype."""
    return layout_in(stage, placed.spec).tile_shape(placed.shape), placed.dtype


def _only_stage(trace: Trace, plan: Plan, devices: Sequence[Any]) -> StagePlan:
    """The stage of a plan without a pipeline; `PlanError` for other devices or another program."""
    check_count(plan.stages[0].devices[1], devices)
    if trace.graph.digest != plan.program:
        raise PlanError(
            f"the plan is of another program: it was made for {plan.function} with digest {plan.program}, but "
            f"{trace.name} with these arguments has {trace.graph.digest}; plan it again"
        )
    return plan.stages[0]


def enforce(module: Any, plan: Plan, stage: StagePlan) -> None:
    """Insert the stage's pins into a freshly lowered module, in place."""
    stablehlo.annotate(module)
    reading = stablehlo.read(module)
    if reading.graph.digest != plan.program:
        raise PlanError(f"{plan.function} lowers to another program for these devices; plan it again on this platform")
    _insert(module, reading, stage)


def enforce_piece(module: Any, stage: StagePlan) -> None:
    """The same for a piece of a pipeline, whose accumulators come behind the ops that were planned."""
    stablehlo.annotate(module)
    reading = stablehlo.read(module)
    count = int(stage.program.partition(":")[0])
    if skeleton(reading.graph, 0, count) != stage.program:
        raise PlanError(f"{stage.name} lowers to another program for these devices; plan it again on this platform")
    _insert(module, reading, stage)


def _insert(module: Any, reading: stablehlo.Reading, stage: StagePlan) -> None:
    for pin in stage.pins:
        _check_pin(pin, reading.graph)
    if not (stage.pins or stage.sums or stage.accumulators):  # a program without arrays has no device mesh
        return stablehlo.strip(reading)
    with module.context, ir.Location.unknown():
        writer = _Writer(reading, stage.axis_names, _mesh_symbol(module))
        for pin in stage.pins:
            if pin.result:
                writer.pin_result(pin)
        for pin in stage.pins:
            if not pin.result:
                writer.pin_operand(pin)
        for total in stage.sums:
            hold_back(reading, total, stage, writer.attribute)
        for accumulator in stage.accumulators:
            if accumulator.axes:
                hold_share(reading, accumulator, stage, writer.attribute, _returned(module))
    stablehlo.strip(reading)


def _returned(module: Any) -> Any:
    """The op that returns from `main`."""
    main = next(op for op in module.body.operations if op.operation.name == "func.func")
    operations = main.regions[0].blocks[0].operations
    return operations[len(operations) - 1].operation


def _check_pin(pin: Pin, graph: OpGraph) -> None:
    """Raise `PlanError` for a pin of an op, operand or dim that the program does not have."""
    where = f"the plan pins {'result' if pin.result else 'operand'} {pin.port} of op {pin.op}"
    if not 0 <= pin.op < len(graph.ops):
        raise PlanError(f"{where}, but the program has ops 0 to {len(graph.ops) - 1}")
    op = graph.ops[pin.op]
    tensors = op.results if pin.result else op.operands
    if not 0 <= pin.port < len(tensors):
        raise PlanError(f"{where}, but {op.name} has {len(tensors)} of them")
    shape = graph.tensors[tensors[pin.port]].shape
    if any(len(spec) != len(shape) for spec in pin.path):
        raise PlanError(f"{where} to {pin.path[-1]}, but that tensor has shape {shape}: a spec needs an entry per dim")


def _mesh_symbol(module: Any) -> str:
    for op in module.body.operations:
        if op.operation.name == "sdy.mesh":
            return str(op.operation.attributes["sym_name"]).strip('"')
    raise PlanError("the lowered program has no device mesh; expected one for a plan of several devices")


@dataclass
class _Writer:
    reading: stablehlo.Reading
    axis_names: tuple[str, ...]
    mesh: str
    attributes: dict[Spec, Any] = field(default_factory=dict)
    moved: dict[tuple[Any, Spec], Any] = field(default_factory=dict)

    def attribute(self, spec: Spec) -> Any:
        if spec not in self.attributes:
            dims = ", ".join("{" + ", ".join(f'"{self.axis_names[a]}"' for a in axes) + "}" for axes in spec)
            self.attributes[spec] = ir.Attribute.parse(f"#sdy.sharding<@{self.mesh}, [{dims}]>")
        return self.attributes[spec]

    def pin_result(self, pin: Pin) -> None:
        """All readers of the result see it through the constraints."""
        value = _result(self.reading, pin)
        first, last = self.chain(value, pin.path)
        value.replace_all_uses_except(last, first)

    def pin_operand(self, pin: Pin) -> None:
        handle = self.reading.handles[pin.op]
        number = self.reading.ports[pin.op][pin.port]
        if self.reading.graph.ops[pin.op].name == "branch":
            block = handle.regions[pin.port].blocks[0]
            handle = block.operations[len(block.operations) - 1].operation
        value = handle.operands[number]
        for spec in pin.path:
            if (value, spec) not in self.moved:
                self.moved[(value, spec)] = self.chain(value, (spec,))[1]
            value = self.moved[(value, spec)]
        handle.operands[number] = value

    def chain(self, value: Any, path: tuple[Spec, ...]) -> tuple[Any, Any]:
        """Constrain a value to each layout of a path in turn, where it is made; the first op and the last value."""
        first = None
        with _after(value):
            for spec in path:
                op = sdy.ShardingConstraintOp(value, self.attribute(spec))
                first = first or op.operation
                value = op.result
        return first, value


def _after(value: Any) -> Any:
    owner = value.owner
    return ir.InsertionPoint.at_block_begin(owner) if isinstance(owner, ir.Block) else ir.InsertionPoint.after(owner)


def _result(reading: stablehlo.Reading, pin: Pin) -> Any:
    """The MLIR value of a result. A loop's `enter` makes the body's argument, its `yield` the loop's result."""
    handle, name = reading.handles[pin.op], reading.graph.ops[pin.op].name
    if name == "enter":
        return handle.regions[1].blocks[0].arguments[reading.ports[pin.op][0]]
    if name == "yield":
        return handle.parent.results[reading.ports[pin.op][0]]
    if name == "branch":
        return handle.results[reading.ports[pin.op][0]]
    return handle.results[pin.port]
