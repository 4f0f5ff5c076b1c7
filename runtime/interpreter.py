"""Runs programs: those of all meshes in one process, or that of one mesh whose partners are in other processes.

One thread hands everything out and waits for nothing. The order, and the place of every buffer in one flat list, are
worked out once; a step then is a loop over calls. In one process a `Send` hands its buffer over at once and a `Recv`
finds it there: the devices wait for each other, not the driver.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, Protocol, assert_never, runtime_checkable

import jax

from alpa_like.errors import ProgramError
from alpa_like.runtime.instructions import Free, Program, Recv, Ref, Route, Run, Send, running_order, verify

__all__ = ["Event", "Interpreter", "Move", "RemoteHalf", "TwoHalves", "interpret"]

Calls = Callable[..., Sequence[Any]]


@runtime_checkable
class TwoHalves(Protocol):
    """A `Transport` (`runtime.transport`): `send` runs at the `Send`, `receive`, on what that gave, at the `Recv`.

    So work on the target's side does not stand in its mesh's queue before the mesh needs the buffer.
    """

    def send(self, value: Any, /) -> Any: ...

    def receive(self, ticket: Any, /) -> Any: ...


Move = Callable[[Any], Any] | TwoHalves
"""How a buffer gets to another mesh: a call at the `Send` that returns the buffer there, or two halves."""


class RemoteHalf(Protocol):
    """This process's half of the transfers of one route. Neither method waits for data."""

    def send(self, ref: Ref, value: Any, /) -> None: ...

    def receive(self, ref: Ref, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Event:
    """One run of a piece in a traced step, in seconds since the step's start."""

    mesh: int
    label: str
    start_s: float
    end_s: float


@dataclass(slots=True)
class _Op:
    """A call with buffers by slot. `dead` are dropped after it, `awaits` were sent by other meshes."""

    call: Calls
    mesh: int
    label: str
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    donated: tuple[int, ...] = ()
    awaits: tuple[int, ...] = ()
    is_run: bool = False
    dead: list[int] = field(default_factory=list[int])


def _nothing() -> tuple[()]:
    return ()


class Interpreter:
    """A step, ready to run: `given` and `returned` say which buffers it takes and returns, as (mesh, buffer).

    `pieces` are the compiled pieces by name, which return one value per output, and donate what their runs say
    (`runtime.instructions.donations`); `transfers` move one buffer to another mesh (see `Move`). Both should return at
    once and let the devices work. `names` are those of values in messages.

    Raises `ProgramError` for programs that do not verify, and for missing pieces and transfers.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        pieces: Mapping[str, Calls],
        transfers: Mapping[Route, Move],
        names: Mapping[int, str] | None = None,
    ) -> None:
        verify(programs)
        self._begin(programs, running_order(programs), pieces, transfers, {}, names)

    @classmethod
    def of_mesh(
        cls,
        program: Program,
        pieces: Mapping[str, Calls],
        halves: Mapping[Route, RemoteHalf],
        names: Mapping[int, str] | None = None,
    ) -> Interpreter:
        """The step of one mesh, whose partners run in other processes. Verify the programs of all meshes before."""
        self = cls.__new__(cls)
        order = [(0, number) for number in range(len(program.instructions))]
        self._begin((program,), order, pieces, {}, halves, names)
        return self

    def _begin(
        self,
        programs: Sequence[Program],
        order: Iterable[tuple[int, int]],
        pieces: Mapping[str, Calls],
        transfers: Mapping[Route, Move],
        halves: Mapping[Route, RemoteHalf],
        names: Mapping[int, str] | None,
    ) -> None:
        self.given = tuple((p.mesh, ref) for p in programs for ref in p.given)
        self.returned = tuple((p.mesh, ref) for p in programs for ref in p.returned)
        self._names = names or {}
        compiler = _Compiler(self.given, pieces, transfers, halves)
        self._ops = compiler.ops(programs, order)
        self._empty = len(compiler.slots) - len(self.given)
        self._results = tuple(compiler.slots[key] for key in self.returned)
        self._calls = tuple((op.call, op.inputs, op.outputs, tuple(op.dead)) for op in self._ops)

    def __call__(self, given: Iterable[Any]) -> list[Any]:
        """The buffers named by `returned`, for those named by `given`.

        Pass an iterator where buffers should be gone once they are freed: then nobody else holds them.

        Raises `ProgramError` where a piece or a transfer fails, with what failed and what was lost.
        """
        buffers = self._buffers(given)
        done = 0
        made: Any = None
        try:
            for call, inputs, outputs, dead in self._calls:
                made = call(*[buffers[slot] for slot in inputs])
                if len(made) != len(outputs):
                    raise _miscounted(made, outputs)
                for slot, buffer in zip(outputs, made, strict=False):
                    buffers[slot] = buffer
                made = buffer = None  # a freed buffer must not live on in these
                for slot in dead:
                    buffers[slot] = None
                done += 1
        except Exception as error:  # pieces may raise anything; what they leave behind is to be said
            failure = self._failed(error, done, range(done), buffers)
            buffers.clear()  # the traceback must not keep the memory of the step
            raise failure from error
        return [buffers[slot] for slot in self._results]

    def _buffers(self, given: Iterable[Any]) -> list[Any]:
        buffers = list(given)
        if len(buffers) != len(self.given):
            raise ProgramError(
                f"the programs take {len(self.given)} buffers, in the order of Interpreter.given; found {len(buffers)}"
            )
        return buffers + [None] * self._empty

    def trace(self, given: Iterable[Any]) -> tuple[list[Any], tuple[Event, ...]]:
        """A step as `__call__` runs it, and when each piece really ran, in the order of their starts.

        Every mesh has a driver thread here, which lets a piece begin when its inputs are there and waits until its
        outputs are. So meshes overlap as they do in a step, and times are true; between two pieces of a mesh stands
        the time that it takes to hand one out, which a step that is not traced hides.
        """
        step = _TracedStep(self._buffers(given), {slot: threading.Event() for op in self._ops for slot in op.awaits})
        meshes = sorted({op.mesh for op in self._ops})
        with ThreadPoolExecutor(max(1, len(meshes)), "alpa_like mesh") as pool:
            list(pool.map(lambda mesh: self._drive(mesh, step), meshes))
        if step.failures:
            step.buffers.clear()  # the traceback must not keep the memory of the step
            raise step.failures[0]
        return [step.buffers[slot] for slot in self._results], tuple(sorted(step.events, key=lambda e: e.start_s))

    def _drive(self, mesh: int, step: _TracedStep) -> None:
        try:
            for number, op in enumerate(self._ops):
                if op.mesh == mesh and step.wait(op):
                    self._perform(number, op, step)
        except ProgramError as error:
            step.stop(error)

    def _perform(self, number: int, op: _Op, step: _TracedStep) -> None:
        try:
            step.perform(op)
        except Exception as error:  # as in `__call__`
            raise self._failed(error, number, step.done, step.buffers) from error
        step.done.append(number)

    def _failed(self, error: Exception, number: int, done: Collection[int], buffers: list[Any]) -> ProgramError:
        op, given = self._ops[number], range(len(self.given))
        gone = {slot for n in done for slot in self._ops[n].donated if slot in given}
        gone |= {slot for slot in op.donated if slot in given and _deleted(buffers[slot])}
        failed = f"{op.label} failed on mesh {op.mesh}: {_reason(error)}"
        if not gone:
            return ProgramError(f"{failed}. No given buffer was lost; the state is as it was")
        first, *more = (self._name(slot) for slot in sorted(gone))
        lost = f"{first} and {len(more)} more" if more else first
        return ProgramError(
            f"{failed}. The donated buffers are gone ({lost}): "
            "go on from the last checkpoint, or compile without donation to keep them"
        )

    def _name(self, slot: int) -> str:
        mesh, ref = self.given[slot]
        return self._names.get(ref.value, f"{ref} of mesh {mesh}")


def _reason(error: Exception) -> str:
    """The type of an error, and the first and the last line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = [line.partition(": Traceback")[0] for line in lines[:1]]
    return ": ".join((type(error).__name__, *first, *lines[1:][-1:]))


def _deleted(buffer: Any) -> bool:
    return isinstance(buffer, jax.Array) and buffer.is_deleted()


def _miscounted(made: Sequence[Any], outputs: tuple[int, ...]) -> ValueError:
    return ValueError(f"expected {len(outputs)} outputs, found {len(made)}")


class _TracedStep:
    """What the driver threads of one traced step share."""

    def __init__(self, buffers: list[Any], sent: dict[int, threading.Event]) -> None:
        self.buffers = buffers
        self.events: list[Event] = []
        self.done: list[int] = []
        self._sent = sent
        self.failures: list[ProgramError] = []
        self._began_s = perf_counter()

    def wait(self, op: _Op) -> bool:
        """Waits until other meshes have sent what `op` reads; False where a mesh has failed."""
        for slot in op.awaits:
            self._sent[slot].wait()
        return not self.failures

    def stop(self, failure: ProgramError) -> None:
        self.failures.append(failure)
        for event in self._sent.values():
            event.set()

    def perform(self, op: _Op) -> None:
        inputs = [self.buffers[slot] for slot in op.inputs]
        if op.is_run:
            jax.block_until_ready(inputs)
        start_s = perf_counter()
        made = op.call(*inputs)
        if len(made) != len(op.outputs):
            raise _miscounted(made, op.outputs)
        if op.is_run:
            jax.block_until_ready(made)
            self.events.append(Event(op.mesh, op.label, start_s - self._began_s, perf_counter() - self._began_s))
        for slot, buffer in zip(op.outputs, made, strict=True):
            self.buffers[slot] = buffer
            if slot in self._sent:
                self._sent[slot].set()
        for slot in op.dead:
            self.buffers[slot] = None


class _Compiler:
    """Gives every buffer of every mesh a slot, the given ones first, and turns instructions into calls."""

    def __init__(
        self,
        given: Iterable[tuple[int, Ref]],
        pieces: Mapping[str, Calls],
        transfers: Mapping[Route, Move],
        halves: Mapping[Route, RemoteHalf],
    ) -> None:
        self._halves = halves
        self.slots = {key: slot for slot, key in enumerate(given)}
        self._pieces = pieces
        self._transfers = transfers
        self._made: list[_Op] = []
        self._awaited: dict[int, list[int]] = {}

    def ops(self, programs: Sequence[Program], order: Iterable[tuple[int, int]]) -> tuple[_Op, ...]:
        for i, number in order:
            self._add(programs[i].mesh, programs[i], number)
        return tuple(self._made)

    def _add(self, mesh: int, program: Program, number: int) -> None:
        instruction = program.instructions[number]
        match instruction:
            case Run(piece, inputs, outputs, label, donated):
                call = self._piece(piece)
                reads, writes = self._all(mesh, inputs), self._all(mesh, outputs)
                op = _Op(call, mesh, label, reads, writes, tuple(reads[i] for i in donated), is_run=True)
                op.dead.extend(op.donated)
                self._append(op)
            case Send(ref, target, route):
                label, slot = f"sending {ref} to mesh {target}", self._slot(mesh, ref)
                if route in self._halves:
                    self._append(_Op(_no_output(partial(self._halves[route].send, ref)), mesh, label, (slot,)))
                    return
                move = self._move(route)
                call = _one_output(move.send if isinstance(move, TwoHalves) else move)
                self._append(_Op(call, mesh, label, (slot,), (self._slot(target, ref),)))
            case Recv(ref, source, route):
                self._receive(mesh, ref, route, f"receiving {ref} from mesh {source}")
            case Free(refs):
                if not self._made or self._made[-1].mesh != mesh:
                    self._append(_Op(_nothing, mesh, "freeing"))
                self._made[-1].dead.extend(self._all(mesh, refs))
            case _:
                assert_never(instruction)

    def _receive(self, mesh: int, ref: Ref, route: Route, label: str) -> None:
        slot = self._slot(mesh, ref)
        if route in self._halves:
            self._append(_Op(_one_output(partial(self._halves[route].receive, ref)), mesh, label, (), (slot,)))
            return
        self._awaited.setdefault(mesh, []).append(slot)
        move = self._move(route)
        if isinstance(move, TwoHalves):
            self._append(_Op(_one_output(move.receive), mesh, label, (slot,), (slot,)))

    def _append(self, op: _Op) -> None:
        op.awaits = tuple(self._awaited.pop(op.mesh, ()))
        self._made.append(op)

    def _piece(self, name: str) -> Calls:
        if name not in self._pieces:
            raise ProgramError(
                f"the programs run piece {name}, found pieces {', '.join(self._pieces) or 'none'}; add it"
            )
        return self._pieces[name]

    def _move(self, route: Route) -> Move:
        if route not in self._transfers:
            raise ProgramError(f"the programs need a transfer for {route}, found {len(self._transfers)} others; add it")
        return self._transfers[route]

    def _all(self, mesh: int, refs: Iterable[Ref]) -> tuple[int, ...]:
        return tuple(self._slot(mesh, ref) for ref in refs)

    def _slot(self, mesh: int, ref: Ref) -> int:
        return self.slots.setdefault((mesh, ref), len(self.slots))


def _one_output(move: Callable[..., Any]) -> Calls:
    return lambda *buffers: (move(*buffers),)


def _no_output(move: Callable[..., None]) -> Calls:
    def call(buffer: Any) -> tuple[()]:
        move(buffer)
        return ()

    return call


def interpret(
    programs: Sequence[Program],
    pieces: Mapping[str, Calls],
    transfers: Mapping[Route, Move],
    given: Mapping[tuple[int, Ref], Any],
    *,
    record: Callable[[Event], None] | None = None,
) -> dict[tuple[int, Ref], Any]:
    """One step by `Interpreter`, from (mesh, buffer) to (mesh, buffer); with `record` a traced one, told its events."""
    interpreter = Interpreter(programs, pieces, transfers)
    missing = [key for key in interpreter.given if key not in given]
    if missing:
        raise ProgramError(f"the programs need {missing[0][1]} on mesh {missing[0][0]}, but it is not given")
    values = [given[key] for key in interpreter.given]
    if record is None:
        return dict(zip(interpreter.returned, interpreter(values), strict=True))
    results, events = interpreter.trace(values)
    for event in events:
        record(event)
    return dict(zip(interpreter.returned, results, strict=True))
