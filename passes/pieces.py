"""Layers and stages → the pieces of a step that are compiled one by one.

For every stage a forward and a backward piece (or two: gradients of the stage's input, gradients of its weights),
both run for every micro-batch; for every mesh the pieces of the update, which run once. A value of the step is a
variable; what a piece reads and does not make is its input, what others read of it is its output.

The forward piece hands on what `passes.residuals` keeps; element-wise work is done again in the backward piece. With
rematerialization it hands on only what enters its layers, and the backward piece computes each layer again right
before it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from jax.extend import core
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var
from jax.extend.core import Literal as Constant

from alpa_like.passes.avals import size_of
from alpa_like.passes.flat import reads, sub_jaxpr
from alpa_like.passes.layers import Layers

__all__ = ["PieceKind", "Pieces", "StagePiece", "StageRange", "form_pieces"]

PieceKind = Literal["forward", "backward", "input_grad", "weight_grad", "before", "update"]


@dataclass(frozen=True, slots=True)
class StageRange:
    """Layers `first` to `last` (inclusive) on one mesh; `remat` computes them again in the backward pass."""

    first: int
    last: int
    mesh: int
    remat: bool = False


@dataclass(frozen=True)
class StagePiece:
    """Equations that are compiled together. `stage` is -1 for pieces of the update, which run once."""

    name: str
    kind: PieceKind
    stage: int
    mesh: int
    equations: tuple[JaxprEqn, ...]
    inputs: tuple[Var, ...] = ()
    outputs: tuple[Var, ...] = ()

    @property
    def is_micro(self) -> bool:
        return self.kind not in ("before", "update")


@dataclass(frozen=True)
class Pieces:
    """All pieces of a step in an order in which each could run, and the mesh of every argument."""

    layers: Layers
    stages: tuple[StageRange, ...]
    pieces: tuple[StagePiece, ...]
    homes: dict[Var, int]

    @property
    def num_meshes(self) -> int:
        return max(s.mesh for s in self.stages) + 1

    def jaxpr(self, piece: StagePiece) -> ClosedJaxpr:
        return sub_jaxpr(piece.equations, piece.inputs, piece.outputs, self.layers.program.constants)

    @cached_property
    def results(self) -> tuple[Var, ...]:
        """What the step returns, without arguments that it passes through."""
        program = self.layers.program
        given = set(program.inputs)
        return tuple(dict.fromkeys(v for v in program.outputs if isinstance(v, Var) and v not in given))

    @cached_property
    def makers(self) -> dict[Var, StagePiece]:
        return {v: piece for piece in self.pieces for v in piece.outputs}


def form_pieces(layers: Layers, stages: Sequence[StageRange], *, split_backward: bool = False) -> Pieces:
    """The pieces of a pipeline whose stages are `stages`, in the order of the layers."""
    return _Former(layers, tuple(stages), split_backward).form()


@dataclass
class _Former:
    layers: Layers
    stages: tuple[StageRange, ...]
    split_backward: bool
    stage_of: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stage_of = {n: i for i, s in enumerate(self.stages) for n in range(s.first, s.last + 1)}
        self.program = self.layers.program
        self.new = core.gensym()
        self.derived = {v: e for e in self.layers.derived for v in e.outvars}

    def form(self) -> Pieces:
        forward = [self.forward(i) for i in range(len(self.stages))]
        backward = [p for i in reversed(range(len(self.stages))) for p in self.backward(i)]
        drafts = [*self.before(), *forward, *backward, *self.updates()]
        return Pieces(self.layers, self.stages, tuple(self.connect(drafts)), self.homes())

    # ------------------------------------------------------------------------------------------------ micro pieces

    def forward(self, stage: int) -> StagePiece:
        s = self.stages[stage]
        eqns = [e for n in range(s.first, s.last + 1) for e in self.layers.forward[n]]
        return StagePiece(f"forward {stage}", "forward", stage, s.mesh, self.complete(eqns))

    def backward(self, stage: int) -> list[StagePiece]:
        s = self.stages[stage]
        eqns: list[JaxprEqn] = []
        for number in range(s.last, s.first - 1, -1):
            mine = list(self.layers.backward[number])
            eqns.extend(self.again(number, mine) if s.remat else mine)
        if not eqns:
            return []
        again = {} if s.remat else self.cheap(s)
        if not self.split_backward:
            return [StagePiece(f"backward {stage}", "backward", stage, s.mesh, self.complete(eqns, again))]
        passed = self.passed_down(stage)
        first = _cone(eqns, passed)
        rest = [e for e in eqns if id(e) not in {id(f) for f in first}]
        return [
            StagePiece(f"input_grad {stage}", "input_grad", stage, s.mesh, self.complete(first, again)),
            StagePiece(f"weight_grad {stage}", "weight_grad", stage, s.mesh, self.complete(rest, again)),
        ]

    def passed_down(self, stage: int) -> set[Var]:
        """What the backward passes of earlier stages read."""
        layers = [n for n, s in self.stage_of.items() if s < stage]
        return {v for n in layers for e in self.layers.backward[n] for v in reads(e)}

    def again(self, layer: int, backward: list[JaxprEqn]) -> list[JaxprEqn]:
        """The layer's forward equations as far as its backward pass reads them, with new variables, then that pass."""
        forward = list(self.layers.forward[layer])
        made = {v for e in forward for v in e.outvars}
        wanted = {v for e in backward for v in reads(e)} & made
        needed = _cone(forward, wanted)
        names = {v: self.new(v.aval) for e in needed for v in e.outvars}
        return [_renamed(e, names) for e in needed] + [_renamed(e, names, results=False) for e in backward]

    def cheap(self, stage: StageRange) -> dict[Var, JaxprEqn]:
        """What the stage's backward pass computes again for itself."""
        return {v: e for n in range(stage.first, stage.last + 1) for v, e in self.layers.cheap_again[n].items()}

    def complete(self, eqns: Sequence[JaxprEqn], again: Mapping[Var, JaxprEqn] | None = None) -> tuple[JaxprEqn, ...]:
        """The equations, and right before its first reader each equation that is derived or done again for them."""
        makers = {**self.derived, **(again or {})}
        own = {v for e in eqns for v in e.outvars}
        found: dict[int, JaxprEqn] = {}

        def emit(eqn: JaxprEqn) -> None:
            stack = [(eqn, False)]
            while stack:
                one, ready = stack.pop()
                if id(one) in found:
                    continue
                if ready:
                    found[id(one)] = one
                    continue
                stack.append((one, True))
                needed = (makers[v] for v in reversed(reads(one)) if v in makers and v not in own)
                stack.extend((e, False) for e in needed if id(e) not in found)

        for eqn in eqns:
            emit(eqn)
        return tuple(found.values())

    # ----------------------------------------------------------------------------------------------------- update

    def before(self) -> list[StagePiece]:
        program = self.program
        if not program.prepared:
            return []
        made = {v for v, _ in program.prepared}
        readers = [
            self.stage_of[n] for n, e in self.all_micro() if made & {v for x in self.complete([e]) for v in reads(x)}
        ]
        mesh = self.stages[readers[-1] if readers else -1].mesh
        names = {whole: var for var, whole in program.prepared}
        eqns = tuple(_renamed(e, names) for e in program.before)
        return [StagePiece("prepare", "before", -1, mesh, eqns)]

    def all_micro(self) -> list[tuple[int, JaxprEqn]]:
        both = (self.layers.forward, self.layers.backward)
        return [(n, e) for parts in both for n, eqns in enumerate(parts) for e in eqns]

    def homes(self) -> dict[Var, int]:
        return {v: self.mesh_of(v, 0) for v in self.program.inputs}

    def mesh_of(self, var: Var, default: int) -> int:
        layer = self.layers.owners.get(var)
        return default if layer is None else self.stages[self.stage_of[layer]].mesh

    def updates(self) -> list[StagePiece]:
        """What runs once, by mesh; a new piece where a mesh waits for what another mesh has computed."""
        results = {v for v in self.program.outputs if isinstance(v, Var)}
        own: dict[Var, tuple[int, int]] = {}
        drafts: dict[tuple[int, int], list[JaxprEqn]] = {}
        shares = set(self.layers.accumulated)
        local: dict[Var, JaxprEqn] = {}
        order = {id(e): i for i, e in enumerate(self.layers.after)}
        for eqn in self.layers.after:
            read = reads(eqn)
            cheap = not any(v in own or v in shares for v in read)
            cone = _with_local(eqn, local)
            if cheap and not any(v in self.layers.owners for v in eqn.outvars):
                local.update((v, eqn) for v in eqn.outvars)
                if results & set(eqn.outvars):
                    drafts.setdefault((0, self.stages[0].mesh), []).extend(cone)
                continue
            mesh = self.update_mesh(eqn, own)
            waits = [own[v] for e in cone for v in reads(e) if v in own]
            level = max((n + (m != mesh) for n, m in waits), default=0)
            drafts.setdefault((level, mesh), []).extend(cone)
            own.update((v, (level, mesh)) for v in eqn.outvars)
        return [
            StagePiece(
                f"update {mesh}.{level}", "update", -1, mesh, tuple(sorted(_unique(eqns), key=lambda e: order[id(e)]))
            )
            for (level, mesh), eqns in sorted(drafts.items())
        ]

    def update_mesh(self, eqn: JaxprEqn, own: dict[Var, tuple[int, int]]) -> int:
        """That of the parameter; for numbers that come from one mesh that one, else the first."""
        for var in (*eqn.outvars, *reads(eqn)):
            if var in self.layers.owners and size_of(var) > 1:
                return self.mesh_of(var, 0)
        meshes = {own[v][1] for v in reads(eqn) if v in own}
        meshes |= {self.mesh_of(v, 0) for v in reads(eqn) if v in self.layers.accumulated}
        return meshes.pop() if len(meshes) == 1 else self.stages[0].mesh

    # ------------------------------------------------------------------------------------------------------- ports

    def connect(self, drafts: list[StagePiece]) -> list[StagePiece]:
        """Give every piece its inputs and outputs."""
        made = [{v for e in p.equations for v in e.outvars} for p in drafts]
        first_maker: dict[Var, int] = {}
        for number, vars_ in enumerate(made):
            for var in vars_:
                if var not in self.derived or drafts[number].kind in ("update", "before"):
                    first_maker.setdefault(var, number)
        inputs: list[list[Var]] = []
        for number, piece in enumerate(drafts):
            read = dict.fromkeys(v for e in piece.equations for v in reads(e))
            held = set(self.program.constants)
            inputs.append([v for v in read if v not in made[number] and v not in held])
        wanted = {v for read in inputs for v in read} | {v for v in self.program.outputs if isinstance(v, Var)}
        wanted |= set(self.layers.accumulated)
        return [
            replace(
                piece,
                inputs=tuple(inputs[number]),
                outputs=tuple(
                    v for e in piece.equations for v in e.outvars if v in wanted and first_maker.get(v) == number
                ),
            )
            for number, piece in enumerate(drafts)
        ]


def _cone(eqns: Sequence[JaxprEqn], goals: Iterable[Var]) -> list[JaxprEqn]:
    """Those of the equations that lead to the goals, in their order."""
    wanted = set(goals)
    found: list[JaxprEqn] = []
    for eqn in reversed(eqns):
        if wanted & set(eqn.outvars):
            found.append(eqn)
            wanted.update(reads(eqn))
    return found[::-1]


def _renamed(eqn: JaxprEqn, names: dict[Var, Var], *, results: bool = True) -> JaxprEqn:
    operands = [v if isinstance(v, Constant) else names.get(v, v) for v in eqn.invars]
    outs = [names.get(v, v) for v in eqn.outvars] if results else eqn.outvars
    return eqn.replace(invars=operands, outvars=outs)


def _with_local(eqn: JaxprEqn, local: dict[Var, JaxprEqn]) -> list[JaxprEqn]:
    """An equation behind what every mesh computes for itself."""
    found: list[JaxprEqn] = []
    pending = [eqn]
    while pending:
        one = pending.pop()
        found.append(one)
        pending.extend(local[v] for v in dict.fromkeys(reads(one)) if v in local)
    return _unique(found)


def _unique(eqns: Iterable[JaxprEqn]) -> list[JaxprEqn]:
    """Each equation once, where it first stands."""
    return list({id(e): e for e in eqns}.values())
