"""Programs of a pipeline: the pieces of a step, in the order of a schedule, become the instructions of every mesh.

Contract
  Input: pieces whose ports name the values that they read and make; a schedule; where the values lie at the start.
  Output: one `Program` per mesh that passes `verify`. A value goes to another mesh once, right after it is made, and is
    received right before it is first read; its buffer is freed, or donated, right after its last use on a mesh.
  Raises: `PlanError` where pieces, schedule and values do not fit each other; `ProgramError` where, in the order
    asked for, a piece would run before what it reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from alpa_like.errors import PlanError
from alpa_like.runtime.instructions import Free, Instruction, Program, Recv, Ref, Route, Run, Send, verify
from alpa_like.schedule import Kind, Schedule

__all__ = ["Piece", "Port", "Scope", "write_programs"]

Scope = Literal["step", "micro", "accumulator"]


@dataclass(frozen=True, slots=True)
class Port:
    """A value that a piece reads or makes: once per step, once per micro-batch, or by adding to what is there.

    A `donatable` input may give its buffer to an output, where nobody needs it afterwards.
    """

    value: int
    scope: Scope
    donatable: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the step that is compiled for one mesh. Ports are in the order of its arguments and results.

    A piece adds to an accumulator by reading and making it. Where nothing has been added yet a piece at the step's
    start makes it; after the last micro-batch pieces read the sum with scope "step".
    """

    name: str
    mesh: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def write_programs(
    pieces: Mapping[tuple[Kind, int], Piece],
    before: Sequence[Piece],
    after: Sequence[Piece],
    schedule: Schedule,
    homes: Mapping[int, int],
    batch_values: Collection[int],
    returned: Sequence[tuple[int, Scope]],
) -> tuple[Program, ...]:
    """The programs of one step, one per mesh of the schedule.

    - `pieces`: what each kind of task of a stage runs. Tasks without a piece are left out.
    - `before`, `after`: pieces that run once, in this order: what makes zeros and masks, and what updates the state.
    - `homes`: the mesh of each value that is given once per step. Other meshes that read it get it at the start.
    - `batch_values`: values given per micro-batch, on every mesh that reads them.
    - `returned`: values that come back, on the mesh that makes them; for scope "micro" every micro-batch's.

    An input is donated if its port allows it and in every run of its piece the run is the buffer's last use on the
    mesh: donation is part of what is compiled (see `runtime.instructions.donations`).
    """
    flow = _flow(_Step(pieces, tuple(before), tuple(after), schedule, homes, tuple(batch_values)))
    kept = _returned(flow, returned)
    programs = tuple(_program(flow, mesh, tuple(kept.get(mesh, ()))) for mesh in range(schedule.num_meshes))
    verify(programs)
    return programs


@dataclass(frozen=True, slots=True)
class _Step:
    """The arguments of `write_programs`."""

    pieces: Mapping[tuple[Kind, int], Piece]
    before: tuple[Piece, ...]
    after: tuple[Piece, ...]
    schedule: Schedule
    homes: Mapping[int, int]
    batch_values: tuple[int, ...]

    @property
    def all_pieces(self) -> tuple[Piece, ...]:
        return (*self.before, *self.pieces.values(), *self.after)


# ----------------------------------------------------------------------------------------------------- checking


def _scopes(step: _Step) -> dict[int, Scope]:
    """The scope of every value; `PlanError` for a value that has two origins, or an accumulator that has none."""
    scopes: dict[int, Scope] = {}
    origin: dict[int, str] = {}
    for port, name in _origins(step):
        if port.value in origin:
            raise PlanError(f"value {port.value} comes from {origin[port.value]} and {name}; give each its own number")
        origin[port.value], scopes[port.value] = name, port.scope
    for piece in step.pieces.values():
        for port in piece.outputs:
            if port.scope == "accumulator" and scopes.get(port.value) != "accumulator":
                raise PlanError(
                    f"{piece.name} adds to accumulator {port.value}, which has no start value: expected a piece of "
                    f'`before` that makes it with scope "accumulator", found {origin.get(port.value, "none")}'
                )
    return scopes


def _origins(step: _Step) -> Iterator[tuple[Port, str]]:
    """Every value where it first appears, and what brings it; adding to an accumulator is no origin."""
    yield from ((Port(value, "step"), "the start") for value in step.homes)
    yield from ((Port(value, "micro"), "the start") for value in step.batch_values)
    yield from ((port, piece.name) for piece in (*step.before, *step.after) for port in piece.outputs)
    for piece in step.pieces.values():
        yield from ((port, piece.name) for port in piece.outputs if port.scope != "accumulator")


def _check(step: _Step, scopes: Mapping[int, Scope]) -> None:
    _check_pieces(step)
    _check_accumulators(step)
    for piece in step.before:
        _check_ports(piece, scopes, {"step"}, {"step", "accumulator"})
    for piece in step.pieces.values():
        _check_ports(piece, scopes, {"step", "micro", "accumulator"}, {"micro", "accumulator"})
    for piece in step.after:
        _check_ports(piece, scopes, {"step"}, {"step"}, sums=True)


def _check_pieces(step: _Step) -> None:
    seen: set[str] = set()
    for piece in step.all_pieces:
        if piece.name in seen:
            raise PlanError(f"two pieces are named {piece.name}; give each a name of its own")
        seen.add(piece.name)
    meshes = {piece.name: piece.mesh for piece in step.all_pieces} | {f"value {v}": m for v, m in step.homes.items()}
    for name, mesh in meshes.items():
        if not 0 <= mesh < step.schedule.num_meshes:
            raise PlanError(f"{name} is on mesh {mesh}, but the schedule has {step.schedule.num_meshes} meshes")
    tasks = {(task.kind, task.stage) for order in step.schedule.order for task in order}
    for (kind, stage), piece in step.pieces.items():
        if (kind, stage) not in tasks:
            raise PlanError(f"{piece.name} never runs: schedule {step.schedule.name} has no {kind} of stage {stage}")
        if piece.mesh != step.schedule.meshes[stage]:
            wanted = step.schedule.meshes[stage]
            raise PlanError(
                f"{piece.name} is on mesh {piece.mesh}, but the schedule has stage {stage} on mesh {wanted}"
            )


def _check_accumulators(step: _Step) -> None:
    """Each accumulator is read where it is made, and all that add to it are on one mesh."""
    adder: dict[int, Piece] = {}
    for piece in step.pieces.values():
        read, made = (sorted(p.value for p in ps if p.scope == "accumulator") for ps in (piece.inputs, piece.outputs))
        if read != made or len(set(made)) < len(made):
            raise PlanError(
                f"{piece.name} must read and make each of its accumulators once: reads {read}, makes {made}"
            )
        for value in made:
            other = adder.setdefault(value, piece)
            if other.mesh != piece.mesh:
                raise PlanError(
                    f"{other.name} on mesh {other.mesh} and {piece.name} on mesh {piece.mesh} add to accumulator "
                    f"{value}; use one per mesh and add the sums at the end"
                )


def _check_ports(
    piece: Piece, scopes: Mapping[int, Scope], reads: set[Scope], makes: set[Scope], *, sums: bool = False
) -> None:
    for port in piece.inputs:
        scope = scopes.get(port.value)
        if scope is None:
            raise PlanError(f"{piece.name} reads value {port.value}, which no piece makes and which is not given")
        fits = port.scope == scope or (sums and (port.scope, scope) == ("step", "accumulator"))
        if not fits or port.scope not in reads:
            raise PlanError(
                f'{piece.name} reads value {port.value} with scope "{port.scope}", but it has scope "{scope}"; '
                f"this piece can read {', '.join(sorted(reads))}{' and sums of accumulators' if sums else ''}"
            )
    for port in piece.outputs:
        if port.scope not in makes:
            raise PlanError(
                f'{piece.name} makes value {port.value} with scope "{port.scope}"; '
                f"expected {' or '.join(sorted(makes))}"
            )


# -------------------------------------------------------------------------------------------------- flow of data


@dataclass(frozen=True, slots=True)
class _Call:
    """One run of a piece, with its buffers."""

    piece: Piece
    label: str
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]


@dataclass(frozen=True, slots=True)
class _Flow:
    """The runs of every mesh in order, where each buffer is made, and which meshes read it."""

    step: _Step
    scopes: Mapping[int, Scope]
    calls: tuple[tuple[_Call, ...], ...]
    sums: Mapping[int, int]
    makers: dict[Ref, int] = field(default_factory=dict[Ref, int])
    readers: dict[Ref, dict[int, None]] = field(default_factory=dict[Ref, dict[int, None]])

    def targets(self, ref: Ref) -> list[int]:
        """The other meshes that read a buffer; none for what is given on all of them."""
        if ref not in self.makers:
            return []
        return sorted(mesh for mesh in self.readers.get(ref, ()) if mesh != self.makers[ref])


def _flow(step: _Step) -> _Flow:
    scopes = _scopes(step)
    _check(step, scopes)
    versions = {value: 0 for value, scope in scopes.items() if scope == "accumulator"}
    meshes = range(step.schedule.num_meshes)
    first = [[_once(p, versions) for p in step.before if p.mesh == mesh] for mesh in meshes]
    micro = [list(_tasks(step, mesh, versions)) for mesh in meshes]
    last = [[_once(p, versions) for p in step.after if p.mesh == mesh] for mesh in meshes]
    flow = _Flow(step, scopes, tuple((*first[m], *micro[m], *last[m]) for m in meshes), versions)
    flow.makers.update((Ref(value), mesh) for value, mesh in step.homes.items())
    for mesh, calls in enumerate(flow.calls):
        for call in calls:
            flow.makers.update(dict.fromkeys(call.outputs, mesh))
            for ref in call.inputs:
                flow.readers.setdefault(ref, {})[mesh] = None
    return flow


def _once(piece: Piece, versions: Mapping[int, int]) -> _Call:
    """The run of a piece of `before` or `after`; what adds to an accumulator has counted up its version."""
    inputs, outputs = (
        tuple(Ref(p.value, versions.get(p.value, -1)) for p in ps) for ps in (piece.inputs, piece.outputs)
    )
    return _Call(piece, piece.name, inputs, outputs)


def _tasks(step: _Step, mesh: int, versions: dict[int, int]) -> Iterator[_Call]:
    for task in step.schedule.order[mesh]:
        piece = step.pieces.get((task.kind, task.stage))
        if piece is None:
            continue
        inputs = tuple(_micro(port, task.micro_batch, versions) for port in piece.inputs)
        for port in piece.outputs:
            if port.scope == "accumulator":
                versions[port.value] += 1
        outputs = tuple(_micro(port, task.micro_batch, versions) for port in piece.outputs)
        yield _Call(piece, f"{piece.name} of micro-batch {task.micro_batch}", inputs, outputs)


def _micro(port: Port, micro_batch: int, versions: Mapping[int, int]) -> Ref:
    return Ref(port.value, {"step": -1, "micro": micro_batch, "accumulator": versions.get(port.value, -1)}[port.scope])


def _returned(flow: _Flow, returned: Iterable[tuple[int, Scope]]) -> dict[int, dict[Ref, None]]:
    """Per mesh the buffers that come back, in the order asked for and each once."""
    kept: dict[int, dict[Ref, None]] = {}
    for value, scope in returned:
        found = flow.scopes.get(value)
        if found is None:
            raise PlanError(f"value {value} is returned, but no piece makes it and it is not given")
        if scope != found and (scope, found) != ("step", "accumulator"):
            raise PlanError(f'value {value} is returned with scope "{scope}", but it has scope "{found}"')
        for ref in _buffers(flow, value):
            mesh = flow.makers.get(ref, min(flow.readers.get(ref, (0,))))
            kept.setdefault(mesh, {})[ref] = None
    return kept


def _buffers(flow: _Flow, value: int) -> tuple[Ref, ...]:
    if flow.scopes[value] == "micro":
        return tuple(Ref(value, k) for k in range(flow.step.schedule.num_micro_batches))
    return (Ref(value, flow.sums.get(value, -1)),)


# ------------------------------------------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class _Mesh:
    """What is known of one mesh before its instructions are written."""

    number: int
    given: tuple[Ref, ...]
    kept: frozenset[Ref]
    last_use: Mapping[Ref, int]
    donated: Mapping[str, tuple[int, ...]]


def _program(flow: _Flow, number: int, returned: tuple[Ref, ...]) -> Program:
    calls = flow.calls[number]
    last_use = {ref: n for n, call in enumerate(calls) for ref in call.inputs}
    kept = frozenset(returned)
    mesh = _Mesh(number, tuple(_given(flow, number, kept)), kept, last_use, _donated(calls, last_use, kept))
    return Program(number, mesh.given, tuple(_instructions(flow, mesh)), returned)


def _donated(calls: Sequence[_Call], last_use: Mapping[Ref, int], kept: frozenset[Ref]) -> dict[str, tuple[int, ...]]:
    """Per piece the inputs that nobody needs after any of its runs."""
    donated = {c.piece.name: [i for i, port in enumerate(c.piece.inputs) if port.donatable] for c in calls}
    for n, call in enumerate(calls):
        donated[call.piece.name] = [
            i
            for i in donated[call.piece.name]
            if last_use[ref := call.inputs[i]] == n and ref not in kept and call.inputs.count(ref) == 1
        ]
    return {name: tuple(positions) for name, positions in donated.items()}


def _given(flow: _Flow, mesh: int, kept: frozenset[Ref]) -> Iterator[Ref]:
    """The given buffers that this mesh reads, sends on or returns."""
    for value, home in flow.step.homes.items():
        if home == mesh and (Ref(value) in flow.readers or Ref(value) in kept):
            yield Ref(value)
    for value in flow.step.batch_values:
        for ref in _buffers(flow, value):
            if mesh in flow.readers.get(ref, ()) or ref in kept:
                yield ref


def _instructions(flow: _Flow, mesh: _Mesh) -> Iterator[Instruction]:
    for ref in mesh.given:
        yield from _sends(flow, mesh, ref)
    yield from _free(mesh, mesh.given, -1)
    here = set(mesh.given)
    for n, call in enumerate(flow.calls[mesh.number]):
        for ref in call.inputs:
            # what this mesh makes too late is left to `verify`
            if ref not in here and flow.makers.get(ref, mesh.number) != mesh.number:
                yield Recv(ref, flow.makers[ref], Route(ref.value, flow.makers[ref], mesh.number))
                here.add(ref)
        donated = mesh.donated[call.piece.name]
        yield Run(call.piece.name, call.inputs, call.outputs, call.label, donated)
        here.update(call.outputs)
        for ref in call.outputs:
            yield from _sends(flow, mesh, ref)
        gone = {call.inputs[i] for i in donated}
        yield from _free(mesh, (r for r in (*call.inputs, *call.outputs) if r not in gone), n)


def _sends(flow: _Flow, mesh: _Mesh, ref: Ref) -> Iterator[Send]:
    for target in flow.targets(ref):
        yield Send(ref, target, Route(ref.value, mesh.number, target))


def _free(mesh: _Mesh, refs: Iterable[Ref], n: int) -> Iterator[Free]:
    """Lets go of those of `refs` that are needed neither after run `n` nor at the end."""
    dead = tuple(ref for ref in dict.fromkeys(refs) if mesh.last_use.get(ref, -1) <= n and ref not in mesh.kept)
    if dead:
        yield Free(dead)
