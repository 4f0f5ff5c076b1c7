"""`Plan` of a pipeline → compiled pieces, transfers and programs.

Besides the pieces of the plan there are, per mesh, one that makes zeros for what is accumulated and one that reduces
the totals. A piece that makes a micro-batch's share takes what has been accumulated and returns it with the share
added; where each device keeps a summand of its own, the accumulator has a leading dim as large as the mesh axis.

Contract
    Input: a `Trace`, a verified `Plan` of it with a pipeline, the devices. Output: `LoweredPipeline`, whose pieces
    are staged where the devices are `AbstractDevices`.
    Raises: `PlanError` where the plan belongs to another program or another number of devices.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Var
from jax.stages import Compiled

from alpa_like.errors import PlanError
from alpa_like.passes.avals import dtype_of, type_of
from alpa_like.passes.batch_rules import Same
from alpa_like.passes.flat import function_of
from alpa_like.passes.layers import form_layers
from alpa_like.passes.lower import enforce_piece
from alpa_like.passes.microbatch import split_batch
from alpa_like.passes.pieces import Pieces, StagePiece, StageRange, form_pieces
from alpa_like.passes.pipeline import program_digest, value_names
from alpa_like.passes.programs import Piece, Port, Scope, write_programs
from alpa_like.placement import AbstractDevices, Given, LoweredPipeline, Returned, check_count, layout_in
from alpa_like.plan import Accumulator, Pipeline, Placed, Plan, Spec, StagePlan
from alpa_like.reshard import Layout, Transfer, plan_transfer
from alpa_like.runtime.instructions import Program, Ref, Route, Run, Send, donations
from alpa_like.runtime.staged import Staged, check_travels, make_piece
from alpa_like.tracer import Trace

__all__ = ["lower_pipeline"]

logger = logging.getLogger("alpa_like")


def lower_pipeline(trace: Trace, plan: Plan, devices: Sequence[Any]) -> LoweredPipeline:
    """Compile a plan with a pipeline for `devices`; for `AbstractDevices` the pieces are staged instead."""
    if plan.pipeline is None:
        raise PlanError("the plan has no pipeline; expected one made by PipeshardParallel")
    count = max(stage.devices[0] + stage.devices[1] for stage in plan.stages)
    check_count(count, devices)
    if program_digest(trace) != plan.program:
        raise PlanError(
            f"the plan is of another program: it was made for {plan.function} with digest {plan.program}, but "
            f"{trace.name} with these arguments has {program_digest(trace)}; plan it again"
        )
    _check_callbacks(trace, devices)
    pieces = rebuild(trace, plan.pipeline)
    names = [piece.name for piece in pieces.pieces]
    if names != [stage.name for stage in plan.stages]:
        raise PlanError(
            f"the plan has pieces {[s.name for s in plan.stages]}, the program needs {names}; plan it again"
        )
    return _Lowerer(trace, plan, plan.pipeline, pieces, devices).lower()


def _check_callbacks(trace: Trace, devices: Sequence[Any]) -> None:
    """What only prints is in no piece, as no result needs it: workers refuse it, and here a warning says so."""
    if isinstance(devices, AbstractDevices):
        check_travels(trace.name, trace.jaxpr)
    elif trace.jaxpr.effects:
        logger.warning(
            "%s: a pipeline leaves jax.debug.print and jax.debug.callback out, but for those in loops, which run for "
            "every micro-batch; return what you want to see",
            trace.name,
        )


def rebuild(trace: Trace, pipeline: Pipeline) -> Pieces:
    """The pieces that a plan speaks of."""
    program = split_batch(trace, pipeline.num_micro_batches, statistics=pipeline.batch_statistics)
    layers = form_layers(program, ends=pipeline.layer_ends)
    ranges = [StageRange(s.first, s.last, s.mesh, s.remat) for s in pipeline.stages]
    return form_pieces(layers, ranges, split_backward=pipeline.ordered().splits_backward)


@dataclass
class _Lowerer:
    trace: Trace
    plan: Plan
    pipeline: Pipeline
    pieces: Pieces
    devices: Sequence[Any]
    numbers: dict[Any, int] = field(default_factory=dict[Any, int])

    def __post_init__(self) -> None:
        self.program = self.pieces.layers.program
        self.plans = {stage.name: stage for stage in self.plan.stages}
        self.batch = {v for v in self.program.inputs if not isinstance(self.program.statuses.get(v, Same()), Same)}
        if self.program.index is not None:
            self.batch.add(self.program.index)

    def lower(self) -> LoweredPipeline:
        programs = self.programs()
        donated = donations(programs)
        ran = {i.piece for p in programs for i in p.instructions if isinstance(i, Run)}
        compiled = {
            **{p.name: self.compile(p, donated.get(p.name, ())) for p in self.pieces.pieces if p.name in ran},
            **{f"zeros {m}": self.zeros(m) for m in self.meshes if f"zeros {m}" in ran},
            **{
                f"finish {m}": self.finish(m, donated.get(f"finish {m}", ()))
                for m in self.meshes
                if f"finish {m}" in ran
            },
        }
        given = {(p.mesh, ref): self.given(p.mesh, ref) for p in programs for ref in p.given}
        held = {ref: p.mesh for p in programs for ref in p.returned}
        names = {n: self.name_of(key) for key, n in self.numbers.items()}
        returned = tuple(self.returned(v, held) for v in self.program.outputs)
        results = tuple(self.result_layout(v) for v in self.program.outputs)
        return LoweredPipeline(
            programs, compiled, self.transfers(programs), given, returned, self.argument_layouts(), results, names
        )

    # ------------------------------------------------------------------------------------------------- values

    def number(self, key: Any) -> int:
        """The number of a value: a variable, or ("total", variable) when all micro-batches have been added."""
        return self.numbers.setdefault(key, len(self.numbers))

    @cached_property
    def keys(self) -> dict[int, Any]:
        """What each number stands for, once the programs are written."""
        return {n: key for key, n in self.numbers.items()}

    @cached_property
    def places(self) -> dict[Var, int]:
        """The flat argument of each input."""
        return {v: i for i, v in enumerate(self.program.inputs)}

    @cached_property
    def value_names(self) -> dict[Var, str]:
        return value_names(self.trace, self.pieces)

    def name_of(self, key: Any) -> str:
        return f"total of {self.name_of(key[1])}" if isinstance(key, tuple) else self.value_names.get(key, "a value")

    @property
    def meshes(self) -> range:
        return range(self.pieces.num_meshes)

    @cached_property
    def accumulators(self) -> dict[Var, tuple[StagePiece, Accumulator]]:
        """What is accumulated, by the piece that adds to it."""
        return {
            piece.outputs[a.result]: (piece, a)
            for piece in self.pieces.pieces
            for a in self.plans[piece.name].accumulators
        }

    def needs_finish(self, var: Var) -> bool:
        """Whether the total is not simply what was accumulated."""
        _, a = self.accumulators[var]
        return bool(a.axes) or a.spec != a.total or accumulated_dtype(var) != dtype_of(var)

    # ----------------------------------------------------------------------------------------------- programs

    def programs(self) -> tuple[Program, ...]:
        schedule = self.pipeline.ordered()
        micro = {(p.kind, p.stage): self.piece(p) for p in self.pieces.pieces if p.is_micro}
        before = [self.piece(p) for p in self.pieces.pieces if p.kind == "before"]
        before += [p for p in (self.zeros_piece(m) for m in self.meshes) if p.outputs]
        after = [p for p in (self.finish_piece(m) for m in self.meshes) if p.outputs]
        after += [self.piece(p) for p in self.pieces.pieces if p.kind == "update"]
        homes = {self.number(v): m for v, m in self.pieces.homes.items() if v not in self.batch}
        homes |= {
            self.number(v): p.mesh for p in self.pieces.pieces if p.kind == "before" for v in self.whole_inputs(p)
        }
        batch = [self.number(v) for v in self.batch]
        returned = [(self.total_number(v), self.scope(v)) for v in self.program.outputs if isinstance(v, Var)]
        return write_programs(micro, before, after, schedule, homes, batch, returned)  # pyright: ignore

    def whole_inputs(self, piece: StagePiece) -> list[Var]:
        return [v for v in piece.inputs if v in self.whole]

    @cached_property
    def whole(self) -> dict[Var, int]:
        """The arguments with the whole batch: variable → flat argument."""
        return {self.program.whole_batch[v]: i for i, v in enumerate(self.program.inputs)}

    def total_number(self, var: Var) -> int:
        return self.number(("total", var)) if var in self.accumulators and self.needs_finish(var) else self.number(var)

    def scope(self, var: Var) -> Scope:
        if var in self.accumulators or (var in self.pieces.homes and var not in self.batch):
            return "step"
        maker = self.pieces.makers.get(var)
        return "micro" if var in self.batch or (maker is not None and maker.is_micro) else "step"

    def piece(self, piece: StagePiece) -> Piece:
        accumulators = [piece.outputs[a.result] for a in self.plans[piece.name].accumulators]
        donatable = self.donatable(piece)
        inputs = [self.input_port(piece, v, i in donatable) for i, v in enumerate(piece.inputs)]
        inputs += [Port(self.number(v), "accumulator", True) for v in accumulators]
        outputs = [
            Port(self.number(v), "accumulator" if v in accumulators else "micro" if piece.is_micro else "step")
            for v in piece.outputs
        ]
        return Piece(piece.name, piece.mesh, tuple(inputs), tuple(outputs))

    def input_port(self, piece: StagePiece, var: Var, donatable: bool) -> Port:
        if not piece.is_micro:
            return Port(self.total_number(var), "step", donatable)
        return Port(self.number(var), self.scope(var), donatable)

    def donatable(self, piece: StagePiece) -> set[int]:
        """Donated arguments that an update replaces by something of the same shape, dtype and layout."""
        if piece.kind != "update":
            return set()
        donated = {self.program.inputs[i] for i in self.trace.donated_leaves}
        stage = self.plans[piece.name]
        room = Counter(self.kind(p) for p in stage.outputs)
        found: set[int] = set()
        for i, (var, placed) in enumerate(zip(piece.inputs, stage.inputs, strict=True)):
            home = self.pieces.homes.get(var) == piece.mesh
            if var in donated and home and room[self.kind(placed)] > 0:
                room[self.kind(placed)] -= 1
                found.add(i)
        return found

    def kind(self, placed: Placed) -> object:
        return placed.shape, placed.dtype, placed.spec

    def mine(self, mesh: int) -> list[Var]:
        return [v for v, (piece, _) in self.accumulators.items() if piece.mesh == mesh]

    def zeros_piece(self, mesh: int) -> Piece:
        return Piece(f"zeros {mesh}", mesh, (), tuple(Port(self.number(v), "accumulator") for v in self.mine(mesh)))

    def finish_piece(self, mesh: int) -> Piece:
        reduced = [v for v in self.mine(mesh) if self.needs_finish(v)]
        inputs = tuple(Port(self.number(v), "step", False) for v in reduced)
        return Piece(f"finish {mesh}", mesh, inputs, tuple(Port(self.number(("total", v)), "step") for v in reduced))

    # ---------------------------------------------------------------------------------------------- compiling

    def stage_of(self, mesh: int) -> StagePlan:
        return next(self.plans[p.name] for p in self.pieces.pieces if p.mesh == mesh)

    def compile(self, piece: StagePiece, donated: tuple[int, ...]) -> Compiled | Staged:
        stage = self.plans[piece.name]
        accumulators = stage.accumulators
        fun = accumulating(function_of(self.pieces.jaxpr(piece), "piece"), stage, len(piece.inputs))
        inputs = [layout_in(stage, p.spec) for p in stage.inputs] + [accumulator_layout(stage, a) for a in accumulators]
        outputs = [layout_in(stage, p.spec) for p in stage.outputs]
        types = [type_of(v) for v in piece.inputs]
        for a in accumulators:
            outputs[a.result] = accumulator_layout(stage, a)
            types.append(accumulator_type(piece.outputs[a.result], a, stage))
        pins = stage.devices[1] > 1 and (stage.pins or accumulators)
        edit = partial(enforce_piece, stage=stage) if pins else None
        return make_piece(piece.name, fun, types, inputs, outputs, self.devices, donated, edit)

    def zeros(self, mesh: int) -> Compiled | Staged:
        stage = self.stage_of(mesh)
        made = [(v, self.accumulators[v][1]) for v in self.mine(mesh)]
        types = [(accumulator_type(v, a, stage), a.op) for v, a in made]
        layouts = [accumulator_layout(stage, a) for _, a in made]

        def zeros() -> list[jax.Array]:
            return [jnp.full(t.shape, start_of(op, t.dtype), t.dtype) for t, op in types]

        return make_piece(f"zeros {mesh}", zeros, (), (), layouts, self.devices)

    def finish(self, mesh: int, donated: tuple[int, ...]) -> Compiled | Staged:
        stage = self.stage_of(mesh)
        made = [(v, self.accumulators[v][1]) for v in self.mine(mesh) if self.needs_finish(v)]
        types = [accumulator_type(v, a, stage) for v, a in made]
        inputs, outputs = zip(
            *((accumulator_layout(stage, a), layout_in(stage, a.total)) for _, a in made), strict=True
        )

        def finish(*shares: jax.Array) -> list[jax.Array]:
            pairs = zip(shares, made, strict=True)
            return [x.sum(tuple(range(len(a.axes)))).astype(dtype_of(v)) for x, (v, a) in pairs]

        return make_piece(f"finish {mesh}", finish, types, inputs, outputs, self.devices, donated)

    # -------------------------------------------------------------------------------------- what goes in and out

    def transfers(self, programs: Sequence[Program]) -> dict[Route, tuple[Transfer, Any]]:
        """How each value gets from mesh to mesh."""
        routes = dict.fromkeys(i.transfer for p in programs for i in p.instructions if isinstance(i, Send))
        found: dict[Route, tuple[Transfer, Any]] = {}
        for route in routes:
            key = self.keys[route.value]
            var = key[1] if isinstance(key, tuple) else key
            source, target = self.layout(key, route.source), self.layout(key, route.target)
            size = max(1, getattr(var.aval.dtype, "itemsize", 1) or 1)
            transfer = plan_transfer(tuple(var.aval.shape), size, source, target, self.plan.cluster)
            found[route] = (transfer, var.aval.dtype)
        return found

    def layout(self, key: Any, mesh: int) -> Layout:
        """How a value lies on a mesh that makes or reads it."""
        return layout_in(self.stage_of(mesh), self.spec_on(key, mesh))

    def spec_on(self, key: Any, mesh: int) -> Spec:
        var = key[1] if isinstance(key, tuple) else key
        if var in self.accumulators and self.accumulators[var][0].mesh == mesh:
            return self.accumulators[var][1].total
        return self.specs.get((var, mesh), ((),) * len(var.aval.shape))

    @cached_property
    def specs(self) -> dict[tuple[Var, int], Spec]:
        """How the first piece of a mesh that makes or reads a value has it."""
        found: dict[tuple[Var, int], Spec] = {}
        for piece in self.pieces.pieces:
            stage = self.plans[piece.name]
            ports = zip((*piece.outputs, *piece.inputs), (*stage.outputs, *stage.inputs), strict=True)
            for var, placed in ports:
                found.setdefault((var, piece.mesh), placed.spec)
        return found

    def given(self, mesh: int, ref: Ref) -> Given:
        var = self.keys[ref.value]
        layout = self.layout(var, mesh)
        if var is self.program.index:
            return Given(-1, ref.index, layout)
        if var in self.whole:
            return Given(self.whole[var], -1, layout)
        return Given(self.places[var], ref.index, layout)

    def argument_layouts(self) -> tuple[Layout | None, ...]:
        return tuple(None if v in self.batch else self.layout(v, self.pieces.homes[v]) for v in self.program.inputs)

    def returned(self, atom: Any, held: Mapping[Ref, int]) -> Returned:
        if not isinstance(atom, Var):
            return Returned((), constant=atom.val)
        value = self.total_number(atom)
        refs = sorted((ref for ref in held if ref.value == value), key=lambda r: r.index)
        dim = getattr(self.program.statuses[atom], "dim", -1) if self.scope(atom) == "micro" else -1
        return Returned(tuple((held[r], r) for r in refs), dim)

    def result_layout(self, atom: Any) -> Layout | None:
        if not isinstance(atom, Var) or self.scope(atom) == "micro":
            return None
        mesh = self.pieces.makers[atom].mesh if atom in self.pieces.makers else self.pieces.homes[atom]
        return self.layout(atom, mesh)


def accumulator_layout(stage: StagePlan, a: Accumulator) -> Layout:
    """How what is accumulated lies: a leading dim per mesh axis over which it keeps partial sums."""
    return layout_in(stage, (*((x,) for x in a.axes), *a.spec))


def accumulated_dtype(var: Any) -> Any:
    """Sums of 16-bit numbers are kept in 32 bits, as matmuls do."""
    dtype = np.dtype(var.aval.dtype)
    return np.dtype(np.float32) if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 else dtype


def accumulator_type(var: Any, a: Accumulator, stage: StagePlan) -> jax.ShapeDtypeStruct:
    sizes = tuple(stage.mesh_shape[x] for x in a.axes)
    dtype = accumulated_dtype(var) if a.op == "add" else var.aval.dtype
    return jax.ShapeDtypeStruct((*sizes, *var.aval.shape), dtype)


def start_of(op: str, dtype: Any) -> Any:
    """What an accumulator holds before the first micro-batch."""
    match op:
        case "max":
            return -math.inf if jnp.issubdtype(dtype, jnp.floating) else _limits(dtype)[0]
        case "min":
            return math.inf if jnp.issubdtype(dtype, jnp.floating) else _limits(dtype)[1]
        case "and":
            return True if dtype == jnp.bool_ else -1
        case _:
            return 0


def _limits(dtype: Any) -> tuple[Any, Any]:
    if dtype == jnp.bool_:
        return False, True
    info = jnp.iinfo(dtype)
    return info.min, info.max


_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "add": lax.add,
    "max": lax.max,
    "min": lax.min,
    "and": lax.bitwise_and,
    "or": lax.bitwise_or,
}


def accumulating(fun: Callable[..., Any], stage: StagePlan, count: int) -> Callable[..., Any]:
    """The piece, with accumulators as further arguments and in place of the results that are added to them."""

    def piece(*args: Any) -> list[Any]:
        results = list(fun(*args[:count]))
        for a, held in zip(stage.accumulators, args[count:], strict=True):
            share = lead(results[a.result], tuple(stage.mesh_shape[x] for x in a.axes))
            results[a.result] = _COMBINE[a.op](held, lax.convert_element_type(share, held.dtype))
        return results

    return piece


def lead(share: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """The share with leading dims, first entry the share and the others zeros: it sums to the share.

    Where the plan keeps partial sums, the pad is replaced by the summands themselves (`passes.sums`).
    """
    if not sizes:
        return share
    wide = lax.reshape(share, (*(1,) * len(sizes), *share.shape))
    config = [*((0, n - 1, 0) for n in sizes), *((0, 0, 0) for _ in share.shape)]
    return lax.pad(wide, jnp.zeros((), share.dtype), config)
