"""Instructions: what each mesh does in one step, as data.

`passes.programs` writes programs, `verify` checks them before anything runs, `runtime.interpreter` runs them. Every
buffer is written once, so that all orders in which no buffer is read before it is written mean the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from alpa_like.errors import ProgramError

__all__ = [
    "Free",
    "Instruction",
    "Program",
    "Recv",
    "Ref",
    "Route",
    "Run",
    "Send",
    "donations",
    "running_order",
    "verify",
]


@dataclass(frozen=True, slots=True)
class Ref:
    """One buffer: the number of its value, and the micro-batch, or for an accumulator how often it was added to.

    The index is -1 for a value that exists once per step.

    >>> str(Ref(3)), str(Ref(3, 0))
    ('v3', 'v3.0')
    """

    value: int
    index: int = -1

    def __str__(self) -> str:
        return f"v{self.value}" if self.index < 0 else f"v{self.value}.{self.index}"


@dataclass(frozen=True, slots=True)
class Route:
    """How a value travels between two meshes: one transfer, used for all its micro-batches."""

    value: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Run:
    """Call a compiled piece. `donated` are the positions of the inputs whose buffers it takes for its outputs."""

    piece: str
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]
    label: str
    donated: tuple[int, ...] = ()

    def __str__(self) -> str:
        given = ", ".join(f"{r}!" if i in self.donated else str(r) for i, r in enumerate(self.inputs))
        return f"run {self.piece}({given}) -> {_shown(self.outputs)}".rstrip()


@dataclass(frozen=True, slots=True)
class Send:
    """Hand a buffer to another mesh and keep it. A send never waits."""

    ref: Ref
    target: int
    transfer: Route

    def __str__(self) -> str:
        return f"send {self.ref} to {self.target}"


@dataclass(frozen=True, slots=True)
class Recv:
    """Wait for a buffer from another mesh."""

    ref: Ref
    source: int
    transfer: Route

    def __str__(self) -> str:
        return f"recv {self.ref} from {self.source}"


@dataclass(frozen=True, slots=True)
class Free:
    """Let go of buffers."""

    refs: tuple[Ref, ...]

    def __str__(self) -> str:
        return f"free {_shown(self.refs)}"


Instruction = Run | Send | Recv | Free


@dataclass(frozen=True, slots=True)
class Program:
    """What one mesh does in a step. `given` is there at the start, `returned` at the end, and nothing else is.

    >>> print(Program(0, (Ref(0), Ref(1)), (Run("add", (Ref(0), Ref(1)), (Ref(2),), "add", (0,)),), (Ref(1), Ref(2))))
    mesh 0: given v0 v1, returned v1 v2
      0 run add(v0!, v1) -> v2
    """

    mesh: int
    given: tuple[Ref, ...]
    instructions: tuple[Instruction, ...]
    returned: tuple[Ref, ...]

    def __str__(self) -> str:
        head = (
            f"mesh {self.mesh}: given {_shown(self.given) or 'nothing'}, returned {_shown(self.returned) or 'nothing'}"
        )
        width = len(str(len(self.instructions))) + 2
        return "\n".join((head, *(f"{n:>{width}} {instruction}" for n, instruction in enumerate(self.instructions))))


def _shown(refs: Iterable[Ref]) -> str:
    return " ".join(map(str, refs))


# ------------------------------------------------------------------------------------------------- verification


def verify(programs: Sequence[Program], sizes: Mapping[int, int] | None = None) -> tuple[int, ...]:
    """The peak of the bytes in buffers per device, of each mesh; `sizes` has the bytes of each value's buffers.

    While a piece runs there are its inputs and its outputs, less the donated inputs, in whose place outputs lie. A
    received buffer counts from its `Recv` on; what pieces need inside is not counted. Without `sizes` all peaks are 0.

    Raises `ProgramError`, with mesh, instruction and buffer, where
    - a buffer is read or returned before it is made, or after it was freed or donated,
    - a buffer is made twice, on one mesh or on two, or is left behind at the end,
    - a `Send` has no `Recv`, or a `Recv` no `Send`, or either has the wrong `Route`,
    - meshes wait for each other for ever, in whatever order they progress (as sends never wait, one order decides),
    - two runs of one piece donate differently: donation is part of what is compiled.
    """
    peaks = tuple(_Buffers(program, sizes).peak() for program in programs)
    _check_makers(programs)
    _check_transfers(programs)
    running_order(programs)
    donations(programs)
    return peaks


def _error(program: Program, number: int, problem: str) -> ProgramError:
    if not 0 <= number < len(program.instructions):
        return ProgramError(f"mesh {program.mesh}, at the {'start' if number < 0 else 'end'}: {problem}")
    return ProgramError(f"mesh {program.mesh}, instruction {number} ({program.instructions[number]}): {problem}")


class _Buffers:
    """The buffers of one mesh, while its program is walked through."""

    def __init__(self, program: Program, sizes: Mapping[int, int] | None) -> None:
        self._program = program
        self._sizes = sizes
        self._number = -1
        self._live: dict[Ref, None] = {}
        self._gone: dict[Ref, str] = {}
        self._bytes = self._most = 0

    def peak(self) -> int:
        for ref in self._program.given:
            self._make(ref)
        for number, instruction in enumerate(self._program.instructions):
            self._number = number
            self._step(instruction)
        self._number = len(self._program.instructions)
        self._end()
        return self._most

    def _step(self, instruction: Instruction) -> None:
        match instruction:
            case Run():
                self._run(instruction)
            case Send(ref):
                self._read(ref)
            case Recv(ref):
                self._make(ref)
            case Free(refs):
                for ref in refs:
                    self._drop(ref, "freed")
            case _:
                assert_never(instruction)

    def _run(self, run: Run) -> None:
        for ref in run.inputs:
            self._read(ref)
        for position in run.donated:
            self._donate(run, position)
        for ref in run.outputs:
            self._make(ref)

    def _donate(self, run: Run, position: int) -> None:
        if not 0 <= position < len(run.inputs):
            raise self._error(f"donates input {position}, but the piece has {len(run.inputs)} inputs")
        ref = run.inputs[position]
        if run.inputs.count(ref) > 1:
            raise self._error(f"{ref} is donated, but it is also another input of the piece; donate neither")
        self._drop(ref, "donated")

    def _end(self) -> None:
        for ref in self._program.returned:
            self._read(ref)
        returned = Counter(self._program.returned)
        left = [ref for ref in self._live if ref not in returned]
        if left:
            raise self._error(f"{_shown(left)} is neither freed nor returned; free it after its last use")
        twice = [ref for ref, count in returned.items() if count > 1]
        if twice:
            raise self._error(f"{_shown(twice)} is returned more than once; return it once")

    def _read(self, ref: Ref) -> None:
        if ref not in self._live:
            how = f"was {self._gone[ref]}" if ref in self._gone else "is not made before"
            raise self._error(f"{ref} is needed, but it {how}")

    def _make(self, ref: Ref) -> None:
        if ref in self._live or ref in self._gone:
            raise self._error(f"{ref} is made a second time; every buffer is written once")
        self._live[ref] = None
        self._bytes += self._size(ref)
        self._most = max(self._most, self._bytes)

    def _drop(self, ref: Ref, how: str) -> None:
        self._read(ref)
        del self._live[ref]
        self._gone[ref] = f"{how} by instruction {self._number}"
        self._bytes -= self._size(ref)

    def _size(self, ref: Ref) -> int:
        if self._sizes is None:
            return 0
        if ref.value not in self._sizes:
            raise self._error(f"the bytes of value {ref.value} are not among the sizes given to verify; add them")
        return self._sizes[ref.value]

    def _error(self, problem: str) -> ProgramError:
        return _error(self._program, self._number, problem)


def _check_makers(programs: Sequence[Program]) -> None:
    """No two meshes bear the same number, and none makes a buffer that another makes or is given."""
    origin: dict[Ref, int] = {ref: p.mesh for p in programs for ref in p.given}
    if len({p.mesh for p in programs}) < len(programs):
        raise ProgramError(f"each mesh needs one program, found programs of meshes {[p.mesh for p in programs]}")
    for program in programs:
        for number, instruction in enumerate(program.instructions):
            for ref in instruction.outputs if isinstance(instruction, Run) else ():
                if ref in origin:
                    raise _error(program, number, f"{ref} is there already, on mesh {origin[ref]}; send it instead")
                origin[ref] = program.mesh


def _check_transfers(programs: Sequence[Program]) -> None:
    """Sends and receives of one buffer pair up, whatever their order."""
    sends: dict[tuple[Ref, Route], tuple[Program, int]] = {}
    recvs: dict[tuple[Ref, Route], tuple[Program, int]] = {}
    for program in programs:
        for number, instruction in enumerate(program.instructions):
            match instruction:
                case Send(ref, other, transfer):
                    found, wanted = sends, Route(ref.value, program.mesh, other)
                case Recv(ref, other, transfer):
                    found, wanted = recvs, Route(ref.value, other, program.mesh)
                case _:
                    continue
            if transfer != wanted:
                raise _error(program, number, f"{ref} must travel by {wanted}, found {transfer}")
            if (ref, transfer) in found:
                raise _error(program, number, f"{ref} goes to mesh {transfer.target} a second time; send it once")
            found[ref, transfer] = program, number
    _check_pairs(sends, recvs)


def _check_pairs(
    sends: dict[tuple[Ref, Route], tuple[Program, int]], recvs: dict[tuple[Ref, Route], tuple[Program, int]]
) -> None:
    for key in (k for k in sends if k not in recvs):
        raise _error(*sends[key], f"mesh {key[1].target} never receives {key[0]}; add a recv there or drop the send")
    for key in (k for k in recvs if k not in sends):
        raise _error(*recvs[key], f"mesh {key[1].source} never sends {key[0]}; add a send there")


def running_order(programs: Sequence[Program]) -> tuple[tuple[int, int], ...]:
    """All instructions in one line, as (position of the program, number of the instruction).

    The order of every program is kept, and no `Recv` stands before its `Send`. The meshes take turns of one `Run`, so
    that a driver that dispatches in this order feeds all of them evenly. `ProgramError` where meshes wait for ever.
    """
    line: list[tuple[int, int]] = []
    position = [0] * len(programs)
    sent: set[tuple[Ref, Route]] = set()
    waiting = set(range(len(programs)))
    while waiting:
        before = len(line)
        for i in sorted(waiting):
            end = _turn(programs[i], position[i], sent)
            line.extend((i, number) for number in range(position[i], end))
            position[i] = end
        waiting = {i for i in waiting if position[i] < len(programs[i].instructions)}
        if waiting and len(line) == before:
            first, *others = sorted(waiting)
            stuck = ", ".join(f"mesh {programs[i].mesh} at instruction {position[i]}" for i in others)
            also = f", and so does {stuck}" if others else ""
            raise _error(programs[first], position[first], f"waits for ever{also}; send earlier or receive later")
    return tuple(line)


def _turn(program: Program, start: int, sent: set[tuple[Ref, Route]]) -> int:
    """The number at which a mesh stops that runs on from `start`: after one `Run` and what follows, or at a wait."""
    ran = False
    for number in range(start, len(program.instructions)):
        match program.instructions[number]:
            case Run():
                if ran:
                    return number
                ran = True
            case Recv(ref, _, transfer):
                if ran or (ref, transfer) not in sent:
                    return number
            case Send(ref, _, transfer):
                sent.add((ref, transfer))
            case Free():
                pass
    return len(program.instructions)


def donations(programs: Iterable[Program]) -> dict[str, tuple[int, ...]]:
    """The donated input positions of every piece, with which it is to be compiled; `ProgramError` if runs differ."""
    found: dict[str, tuple[int, ...]] = {}
    for program in programs:
        for number, instruction in enumerate(program.instructions):
            if not isinstance(instruction, Run):
                continue
            donated = tuple(sorted(instruction.donated))
            if found.setdefault(instruction.piece, donated) != donated:
                raise _error(
                    program,
                    number,
                    f"inputs {donated} are donated, but another run of {instruction.piece} donates "
                    f"{found[instruction.piece]}; all runs of a piece donate the same",
                )
    return found
