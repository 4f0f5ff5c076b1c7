"""Programs of pipelines against playing the schedule in one line, with hashes for values."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from alpa_like.errors import PlanError, ProgramError
from alpa_like.passes.programs import Piece, Port, Scope, write_programs
from alpa_like.runtime.instructions import (
    Free,
    Instruction,
    Program,
    Recv,
    Ref,
    Route,
    Run,
    Send,
    donations,
    running_order,
    verify,
)
from alpa_like.schedule import SCHEDULES, Kind, Schedule, make_schedule

X, TIED, LOSS = 90, 91, 92
WEIGHT, ACTIVATION, GRADIENT, TOTAL, NEW = 10, 20, 30, 40, 50  # plus the stage
COUNTS: list[tuple[int, int | None]] = [*((S, None) for S in range(1, 5)), (4, 2), (4, 1), (6, 3)]


Pieces = dict[tuple[Kind, int], Piece]
Programs = tuple[Program, ...]


def micro(*values: int) -> tuple[Port, ...]:
    return tuple(Port(v, "micro") for v in values)


def step(*values: int) -> tuple[Port, ...]:
    return tuple(Port(v, "step") for v in values)


def total(s: int) -> Port:
    return Port(TOTAL + s, "accumulator", donatable=True)


@dataclass(frozen=True)
class Pipeline:
    """The arguments of `write_programs`."""

    pieces: Pieces
    before: tuple[Piece, ...]
    after: tuple[Piece, ...]
    schedule: Schedule
    homes: dict[int, int]
    batch: tuple[int, ...]
    returned: tuple[tuple[int, Scope], ...]

    def write(self) -> Programs:
        return write_programs(
            self.pieces, self.before, self.after, self.schedule, self.homes, self.batch, self.returned
        )


def forwards(pieces: Pieces, schedule: Schedule, returned: int, batch: tuple[int, ...] = (X,)) -> Pipeline:
    return Pipeline(pieces, (), (), schedule, {5: 0}, batch, ((returned, "micro"),))


def updates(*after: Piece, returned: int) -> Pipeline:
    return Pipeline({}, (), after, make_schedule("inference", 1, 1), {0: 0}, (), ((returned, "step"),))


def chain(schedule: Schedule, *, tied: bool = False) -> Pipeline:
    """A row of stages with state `WEIGHT + s`, batch `X` and the sum `LOSS`.

    `tied` is a value of the first mesh that the last stage reads too.
    """
    pieces: Pieces = {}
    before: list[Piece] = []
    after: list[Piece] = []
    S = schedule.num_stages
    for s, mesh in enumerate(schedule.meshes):
        source, last = ACTIVATION + s - 1 if s else X, s == S - 1
        weights = step(WEIGHT + s, *([TIED] if tied and s in (0, S - 1) else []))
        loss = (Port(LOSS, "accumulator", donatable=True),) if last else ()
        ends = micro(ACTIVATION + s, *([GRADIENT + s] if last else []))
        pieces["forward", s] = Piece(f"forward{s}", mesh, (*weights, *micro(source), *loss), (*ends, *loss))
        read = (*weights, *micro(source), Port(GRADIENT + s, "micro", donatable=True))
        back = micro(GRADIENT + s - 1) if s else ()
        if schedule.splits_backward:
            pieces["weight_grad", s] = Piece(f"weights{s}", mesh, (*read[-2:], total(s)), (total(s),))
            if s:
                pieces["input_grad", s] = Piece(f"inputs{s}", mesh, (*weights, *read[-1:]), back)
        elif schedule.trains:
            pieces["backward", s] = Piece(f"backward{s}", mesh, (*read, total(s)), (*back, total(s)))
        if schedule.trains:
            state = Port(WEIGHT + s, "step", donatable=True)
            after.append(Piece(f"update{s}", mesh, (state, *step(TOTAL + s)), step(NEW + s)))
        made = ((total(s),) if schedule.trains else ()) + loss
        if made:
            before.append(Piece(f"zeros{s}", mesh, (), made))
    homes = {WEIGHT + s: mesh for s, mesh in enumerate(schedule.meshes)} | ({TIED: 0} if tied else {})
    news: list[tuple[int, Scope]] = [(NEW + s, "step") for s in range(S)] if schedule.trains else []
    returned: list[tuple[int, Scope]] = [*news, (LOSS, "accumulator"), (ACTIVATION + S - 1, "micro")]
    return Pipeline(pieces, tuple(before), tuple(after), schedule, homes, (X,), tuple(returned))


def made_by(name: str, inputs: Iterable[int], count: int) -> list[int]:
    return [hash((name, k, *inputs)) for k in range(count)]


def in_one_line(p: Pipeline) -> list[tuple[int, int]]:
    """What each returned value is: one task after the other, on one memory without meshes."""
    M = p.schedule.num_micro_batches
    memory = {(v, "step", 0): hash(v) for v in p.homes}
    memory |= {(v, "micro", m): hash((v, m)) for v in p.batch for m in range(M)}

    def key(port: Port, m: int) -> tuple[int, str, int]:
        sums = (port.value, "accumulator", 0)
        return sums if sums in memory else (port.value, port.scope, m if port.scope == "micro" else 0)

    def run(piece: Piece, m: int) -> None:
        values = made_by(piece.name, [memory[key(port, m)] for port in piece.inputs], len(piece.outputs))
        made = [(port.value, port.scope, m if port.scope == "micro" else 0) for port in piece.outputs]
        memory.update(zip(made, values, strict=True))

    for piece in p.before:
        run(piece, 0)
    for task in p.schedule.sequence():
        if (task.kind, task.stage) in p.pieces:
            run(p.pieces[task.kind, task.stage], task.micro_batch)
    for piece in p.after:
        run(piece, 0)
    ports = [(Port(v, s), m) for v, s in p.returned for m in (range(M) if s == "micro" else (0,))]
    return sorted((port.value, memory[key(port, m)]) for port, m in ports)


def play(programs: Programs, rng: np.random.Generator) -> list[tuple[int, int]]:
    """What the programs return when meshes progress at random; a buffer that is gone is a KeyError."""
    memory = [{r: hash(r.value) if r.index < 0 else hash((r.value, r.index)) for r in p.given} for p in programs]
    mail: dict[tuple[Ref, int], int] = {}
    at = [0] * len(programs)
    while any(n < len(p.instructions) for n, p in zip(at, programs, strict=True)):
        mesh = int(rng.integers(len(programs)))
        rest = programs[mesh].instructions[at[mesh] :]
        if rest and perform(rest[0], mesh, memory[mesh], mail):
            at[mesh] += 1
    assert not mail
    assert all(set(here) == set(p.returned) for here, p in zip(memory, programs, strict=True))
    return sorted((r.value, here[r]) for here in memory for r in here)


def perform(instruction: Instruction, mesh: int, here: dict[Ref, int], mail: dict[tuple[Ref, int], int]) -> bool:
    """Whether the instruction could be done."""
    match instruction:
        case Run(piece, inputs, outputs, _, donated):
            values = made_by(piece, [here[r] for r in inputs], len(outputs))
            for i in donated:
                del here[inputs[i]]
            here.update(zip(outputs, values, strict=True))
        case Send(ref, target):
            mail[ref, target] = here[ref]
        case Recv(ref):
            if (ref, mesh) not in mail:
                return False
            here[ref] = mail.pop((ref, mesh))
        case Free(refs):
            for ref in refs:
                del here[ref]
    return True


def schedules(
    counts: Sequence[tuple[int, int | None]] = COUNTS, micro_batches: Sequence[int] = range(1, 7)
) -> Iterator[Schedule]:
    for name, (S, meshes), M in itertools.product(SCHEDULES, counts, micro_batches):
        if meshes is None or name in ("gpipe", "interleaved-1f1b", "inference"):
            yield make_schedule(name, S, M, meshes)


@pytest.mark.parametrize("name", SCHEDULES)
def test_programs_mean_what_the_schedule_means_in_every_order_of_progress(name: str) -> None:
    rng = np.random.default_rng(0)
    for schedule in schedules():
        if schedule.name == name:
            pipeline = chain(schedule, tied=schedule.num_micro_batches % 2 == 0)
            programs, wanted = pipeline.write(), in_one_line(pipeline)
            assert all(play(programs, rng) == wanted for _ in range(2)), schedule


GOLDEN = """\
mesh 0: given v10 v90.0 v90.1, returned v50
   0 run zeros0() -> v40.0
   1 run forward0(v10, v90.0) -> v20.0
   2 send v20.0 to 1
   3 free v20.0
   4 run forward0(v10, v90.1) -> v20.1
   5 send v20.1 to 1
   6 free v20.1
   7 recv v30.0 from 1
   8 run backward0(v10, v90.0, v30.0!, v40.0!) -> v40.1
   9 free v90.0
  10 recv v30.1 from 1
  11 run backward0(v10, v90.1, v30.1!, v40.1!) -> v40.2
  12 free v90.1
  13 run update0(v10!, v40.2) -> v50
  14 free v40.2
mesh 1: given v11, returned v51 v92.2 v21.0 v21.1
   0 run zeros1() -> v41.0 v92.0
   1 recv v20.0 from 0
   2 run forward1(v11, v20.0, v92.0!) -> v21.0 v31.0 v92.1
   3 run backward1(v11, v20.0, v31.0!, v41.0!) -> v30.0 v41.1
   4 send v30.0 to 0
   5 free v20.0 v30.0
   6 recv v20.1 from 0
   7 run forward1(v11, v20.1, v92.1!) -> v21.1 v31.1 v92.2
   8 run backward1(v11, v20.1, v31.1!, v41.1!) -> v30.1 v41.2
   9 send v30.1 to 0
  10 free v20.1 v30.1
  11 run update1(v11!, v41.2) -> v51
  12 free v41.2"""


def test_the_text_of_small_programs_and_their_peaks_by_hand() -> None:
    programs = chain(make_schedule("1f1b", 2, 2)).write()
    assert "\n".join(map(str, programs)) == GOLDEN
    sizes = {20: 10, 21: 10, 30: 10, 31: 10, 90: 5, 92: 1} | dict.fromkeys((10, 11, 40, 41, 50, 51), 1000)
    # mesh 0, instructions 1 and 4: weight, total, two batches, one activation: 2020
    # mesh 1, instruction 8: weight, total, loss, v21.0, v21.1, v20.1, v30.1: 2041; v31.1 is gone
    # the updates, in place of the weights and next to the totals, need less
    assert verify(programs, sizes) == (2020, 2041)
    labels = [i.label for i in programs[1].instructions if isinstance(i, Run)]
    assert labels[:2] == ["zeros1", "forward1 of micro-batch 0"]


def test_one_mesh_needs_no_transfer_and_a_pipeline_only_its_boundaries() -> None:
    alone = chain(make_schedule("interleaved-1f1b", 4, 3, 1), tied=True).write()
    assert not [i for p in alone for i in p.instructions if isinstance(i, Send | Recv)]
    row = chain(make_schedule("zb-h2", 4, 5)).write()
    sent = [(p.mesh, i.target) for p in row for i in p.instructions if isinstance(i, Send)]
    assert sorted(sent) == sorted([(m, m + d) for m in range(4) for d in (1, -1) if 0 <= m + d < 4] * 5)


def test_a_tied_value_travels_once_at_the_start() -> None:
    first, _, last = chain(make_schedule("1f1b", 3, 4), tied=True).write()
    texts = [[str(i) for i in p.instructions] for p in (first, last)]
    assert texts[0][0] == f"send v{TIED} to 2"
    assert texts[1].count(f"recv v{TIED} from 0") == 1
    assert texts[1].index(f"recv v{TIED} from 0") == 1  # zeros are made before, the first forward follows
    assert Ref(TIED) in first.given
    assert Ref(TIED) not in last.given


def test_what_is_read_elsewhere_goes_there_once_even_where_two_pieces_read_it() -> None:
    pieces: Pieces = {
        ("forward", s): Piece(f"f{s}", s % 2, micro(*([s - 1] if s else []), X), micro(s)) for s in range(4)
    }
    # stage 3 reads what stage 1 read already, on mesh 1
    pieces["forward", 3] = replace(pieces["forward", 3], inputs=micro(0, 2))
    programs = forwards(pieces, make_schedule("inference", 4, 2, 2), returned=3).write()
    moved = [str(i) for i in programs[0].instructions if isinstance(i, Send) and i.ref.value == 0]
    assert moved == ["send v0.0 to 1", "send v0.1 to 1"]
    assert sum(isinstance(i, Recv) and i.ref.value == 0 for i in programs[1].instructions) == 2


def test_a_port_is_donated_always_or_never() -> None:
    p = chain(make_schedule("1f1b", 2, 3))
    eager: Pieces = {
        k: replace(piece, inputs=tuple(replace(port, donatable=True) for port in piece.inputs))
        for k, piece in p.pieces.items()
    }
    donated = donations(replace(p, pieces=eager).write())
    assert donated["forward0"] == ()  # the backward reads weights and batch again
    assert donated["backward0"] == (1, 2, 3)  # batch, gradient, accumulator; weights are read by the update
    assert donated["update0"] == (0,)
    watch = Piece("norm", 0, step(WEIGHT), step(99))
    watched = replace(p, returned=(*p.returned, (99, "step")))
    assert donations(replace(watched, after=(*p.after, watch)).write())["update0"] == ()
    assert donations(replace(watched, after=(watch, *p.after)).write())["update0"] == (0,)
    back = replace(p, returned=(*p.returned, (WEIGHT, "step"))).write()
    assert donations(back)["update0"] == ()
    assert Ref(WEIGHT) in back[0].returned


def test_a_buffer_that_a_piece_reads_twice_is_not_donated() -> None:
    port = Port(0, "step", donatable=True)
    (program,) = updates(Piece("add", 0, (port, port), step(1)), returned=1).write()
    assert [str(i) for i in program.instructions] == ["run add(v0, v0) -> v1", "free v0"]


def test_sums_travel_after_the_last_micro_batch_and_batches_can_come_back() -> None:
    p = chain(make_schedule("gpipe", 2, 3))
    norm = Piece("norm", 1, step(TOTAL, TOTAL + 1), step(99))
    first, last = replace(p, after=(norm, *p.after), returned=(*p.returned, (99, "step"), (X, "micro"))).write()
    assert "send v40.3 to 1" in [str(i) for i in first.instructions]
    assert last.returned == (Ref(NEW + 1), Ref(LOSS, 3), *(Ref(ACTIVATION + 1, m) for m in range(3)), Ref(99))
    assert first.returned == (Ref(NEW), *(Ref(X, m) for m in range(3)))


def test_values_that_nobody_needs_are_not_given_and_unread_results_are_freed_at_once() -> None:
    p = forwards({("forward", 0): Piece("f", 0, micro(X), micro(1, 2))}, make_schedule("inference", 1, 2), 1, (X, 6))
    (program,) = replace(p, returned=p.returned * 2).write()
    assert str(program).splitlines() == [
        "mesh 0: given v90.0 v90.1, returned v1.0 v1.1",
        "  0 run f(v90.0) -> v1.0 v2.0",
        "  1 free v90.0 v2.0",
        "  2 run f(v90.1) -> v1.1 v2.1",
        "  3 free v90.1 v2.1",
    ]


def test_state_that_only_another_mesh_reads_leaves_at_once_and_unread_batches_come_back() -> None:
    pieces: Pieces = {("forward", 1): Piece("f", 1, (*step(5), *micro(X)), micro(1))}
    p = forwards(pieces, make_schedule("inference", 2, 1), returned=1, batch=(X, 6))
    first, last = replace(p, returned=(*p.returned, (6, "micro"))).write()
    assert str(first).splitlines() == [
        "mesh 0: given v5 v6.0, returned v6.0",
        "  0 send v5 to 1",
        "  1 free v5",
    ]
    assert str(last).splitlines()[1:] == ["  0 recv v5 from 0", "  1 run f(v5, v90.0) -> v1.0", "  2 free v5 v90.0"]


def test_one_driver_lets_the_meshes_take_turns() -> None:
    programs = chain(make_schedule("1f1b", 3, 3)).write()
    line = [programs[i].instructions[n] for i, n in running_order(programs)]
    assert [i.label.replace(" of micro-batch", "") for i in line if isinstance(i, Run)] == [
        *("zeros0", "zeros1", "zeros2", "forward0 0", "forward1 0", "forward2 0", "forward0 1", "forward1 1"),
        *("backward2 0", "forward0 2", "backward1 0", "forward2 1", "backward0 0", "forward1 2", "backward2 1"),
        *("backward1 1", "forward2 2", "backward0 1", "backward2 2", "backward1 2", "update2", "backward0 2"),
        *("update1", "update0"),
    ]
    order = [i for i, _ in running_order(programs)]
    assert all(order[k] == order[k + 1] for k, i in enumerate(line) if isinstance(i, Recv))  # right before it is read
    for mesh, program in enumerate(programs):
        assert [n for i, n in running_order(programs) if i == mesh] == list(range(len(program.instructions)))


# ------------------------------------------------------------------------------------------------- broken programs


def changed(programs: Programs, mesh: int, instructions: Iterable[Instruction]) -> Programs:
    return tuple(replace(p, instructions=tuple(instructions)) if p.mesh == mesh else p for p in programs)


def mutations(programs: Programs, rng: np.random.Generator) -> Iterator[tuple[str, Programs]]:
    """(kind, mutated programs): one change each, at a random place."""
    mesh = int(rng.integers(len(programs)))
    program = programs[mesh]
    old = list(program.instructions)
    i, j = (int(k) for k in rng.integers(len(old), size=2))
    rest = old[:i] + old[i + 1 :]
    yield "drop", changed(programs, mesh, rest)
    yield "twice", changed(programs, mesh, [*old[:j], old[i], *old[j:]])
    swapped = list(old)
    swapped[i], swapped[j] = old[j], old[i]
    yield "swap", changed(programs, mesh, swapped)
    yield "move", changed(programs, mesh, [*rest[:j], old[i], *rest[j:]])
    yield "ungiven", tuple(replace(p, given=p.given[1:]) if p.mesh == mesh else p for p in programs)
    yield "kept", tuple(replace(p, returned=p.returned[:-1]) if p.mesh == mesh else p for p in programs)
    other = programs[mesh - 1]
    if other.mesh != mesh:
        elsewhere = list(other.instructions)
        elsewhere.insert(int(rng.integers(len(elsewhere))), old[i])
        yield "elsewhere", changed(changed(programs, mesh, rest), other.mesh, elsewhere)
    edited = edit(old[i])
    if edited:
        yield edited[0], changed(programs, mesh, [*old[:i], edited[1], *old[i + 1 :]])


def edit(old: Instruction) -> tuple[str, Instruction] | None:
    match old:
        case Run():
            free = tuple(k for k in range(len(old.inputs)) if k not in old.donated)
            return ("donate", replace(old, donated=free[:1])) if free else None
        case Send() | Recv():
            return "other", replace(old, ref=Ref(old.ref.value, old.ref.index + 1))
        case Free(refs):
            return "less", Free(refs[1:])


@pytest.mark.parametrize("seed", range(40))
def test_every_mutation_that_changes_the_meaning_is_caught(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool = list(schedules([(2, None), (3, None), (4, 2)], range(1, 5)))
    pipeline = chain(pool[int(rng.integers(len(pool)))], tied=seed % 2 == 0)
    programs, wanted = pipeline.write(), in_one_line(pipeline)
    for kind, mutated in itertools.chain.from_iterable(mutations(programs, rng) for _ in range(10)):
        if mutated == programs:
            continue
        try:
            verify(mutated)
        except ProgramError:
            continue
        assert kind in ("swap", "move")  # the rest is always wrong
        assert play(mutated, rng) == wanted


A, B, C = Ref(0), Ref(1), Ref(2)
TO_1, TO_0 = Route(0, 0, 1), Route(1, 1, 0)


Part = tuple[tuple[Ref, ...], list[Instruction], tuple[Ref, ...]]


def run(inputs: tuple[Ref, ...], outputs: tuple[Ref, ...], donated: tuple[int, ...] = (), piece: str = "f") -> Run:
    return Run(piece, inputs, outputs, piece, donated)


BROKEN: dict[str, tuple[list[Part], str]] = {
    "early": ([((A,), [run((B,), (C,))], (A, C))], r"mesh 0, instruction 0 \(run f\(v1\) -> v2\): v1 is needed"),
    "freed": ([((A,), [Free((A,)), run((A,), (B,))], (B,))], "1 .*v0 is needed, but it was freed by instruction 0"),
    "donated": ([((A,), [run((A,), (B,), (0,)), Free((A,))], (B,))], "v0 is needed, but it was donated by"),
    "lost": ([((A,), [run((A,), (B,), (0,))], (A, B))], "at the end: v0 is needed, but it was donated"),
    "overwritten": ([((A, B), [run((A,), (B,))], (A, B))], "v1 is made a second time"),
    "leak": ([((A,), [run((A,), (B,))], (B,))], "at the end: v0 is neither freed nor returned"),
    "never made": ([((A,), [], (A, B))], "at the end: v1 is needed, but it is not made"),
    "returned twice": ([((A,), [], (A, A))], "v0 is returned more than once"),
    "two places": ([((A,), [run((A, A), (B,), (0,))], (B,))], "v0 is donated, but it is also another input"),
    "no such input": ([((A,), [run((A,), (B,), (1,))], (A, B))], "donates input 1, but the piece has 1 inputs"),
    "two signatures": (
        [((A, B), [run((A,), (C,), (0,)), run((B,), (Ref(3),))], (B, C, Ref(3)))],
        r"instruction 1 .*inputs \(\) are donated, but another run of f donates \(0,\)",
    ),
    "two makers": ([((), [run((), (A,))], (A,)), ((), [run((), (A,))], (A,))], "mesh 1, .*v0 is there already"),
    "unreceived": ([((A,), [Send(A, 1, TO_1)], (A,)), ((), [], ())], "mesh 0, .*mesh 1 never receives v0"),
    "unsent": ([((A,), [], (A,)), ((), [Recv(A, 0, TO_1)], (A,))], "mesh 1, instruction 0 .*mesh 0 never sends v0"),
    "sent twice": (
        [((A,), [Send(A, 1, TO_1)] * 2, (A,)), ((), [Recv(A, 0, TO_1)], (A,))],
        "instruction 1 .*v0 goes to mesh 1 a second time",
    ),
    "wrong route": ([((A,), [Send(A, 1, TO_0)], (A,)), ((), [Recv(A, 0, TO_1)], (A,))], "v0 must travel by Route"),
    "deadlock": (
        [((A,), [Recv(B, 1, TO_0), Send(A, 1, TO_1)], (A, B)), ((B,), [Recv(A, 0, TO_1), Send(B, 0, TO_0)], (A, B))],
        r"mesh 0, instruction 0 \(recv v1 from 1\): waits for ever, and so does mesh 1 at instruction 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_program_is_refused_by_name(problem: str) -> None:
    parts, message = BROKEN[problem]
    programs = [Program(mesh, given, tuple(body), returned) for mesh, (given, body, returned) in enumerate(parts)]
    with pytest.raises(ProgramError, match=message):
        verify(programs)


def test_two_programs_of_one_mesh_and_unknown_sizes_are_refused() -> None:
    with pytest.raises(ProgramError, match="each mesh needs one program"):
        verify([Program(0, (), (), ())] * 2)
    with pytest.raises(ProgramError, match="the bytes of value 0 are not among the sizes"):
        verify([Program(0, (A,), (), (A,))], {1: 4})


def test_exchange_in_the_right_order_is_no_deadlock_and_peaks_count_donation() -> None:
    programs = [
        Program(0, (A,), (Send(A, 1, TO_1), Recv(B, 1, TO_0), run((A, B), (C,), (0,)), Free((B,))), (C,)),
        Program(1, (B,), (Send(B, 0, TO_0), Recv(A, 0, TO_1), run((A,), (Ref(3),), piece="g")), (A, B, Ref(3))),
    ]
    assert verify(programs, {0: 100, 1: 10, 2: 100, 3: 1}) == (110, 111)


# ----------------------------------------------------------------------------------------------- pieces that do not fit


Change = Callable[[Pipeline], Pipeline]


def with_piece(kind: Kind, stage: int, **changes: Any) -> Change:
    def change(p: Pipeline) -> Pipeline:
        key = kind, stage
        return replace(p, pieces={**p.pieces, key: replace(p.pieces[key], **changes)})

    return change


def never_runs(p: Pipeline) -> Pipeline:
    return replace(p, pieces={**p.pieces, ("weight_grad", 0): replace(p.pieces["backward", 0], name="w")})


def returning(value: int, scope: Scope) -> Change:
    return lambda p: replace(p, returned=((value, scope),))


def peeking(p: Pipeline) -> Pipeline:
    return replace(p, before=(*p.before, Piece("peek", 0, step(TOTAL), ())))


def without_zeros(p: Pipeline) -> Pipeline:
    return replace(p, before=p.before[1:])


MISFITS: dict[str, tuple[Change, str]] = {
    "no reader's value": (with_piece("forward", 0, inputs=micro(77)), "forward0 reads value 77, which no piece"),
    "other mesh": (with_piece("forward", 0, mesh=1), "forward0 is on mesh 1, but the schedule has stage 0 on mesh 0"),
    "no such mesh": (with_piece("forward", 0, mesh=9), "forward0 is on mesh 9, but the schedule has 2 meshes"),
    "same name": (with_piece("forward", 0, name="forward1"), "two pieces are named forward1"),
    "scope": (with_piece("forward", 0, inputs=step(X)), 'value 90 with scope "step", but it has scope "micro"'),
    "step output": (with_piece("forward", 0, outputs=step(20)), 'forward0 makes value 20 with scope "step"'),
    "made twice": (with_piece("forward", 0, outputs=micro(21)), "value 21 comes from forward0 and forward1"),
    "made and given": (with_piece("forward", 0, outputs=micro(X)), "value 90 comes from the start and forward0"),
    "half an accumulator": (with_piece("backward", 0, outputs=()), r"backward0 must read and make .* reads \[40\]"),
    "no zero": (without_zeros, "adds to accumulator 40, which has no start value"),
    "never runs": (never_runs, "w never runs"),
    "returned": (returning(77, "step"), "value 77 is returned, but no piece makes it"),
    "returned scope": (returning(X, "step"), 'returned with scope "step", but it has scope "micro"'),
    "sum too early": (peeking, "this piece can read step"),
    "two adders": (
        with_piece("backward", 1, inputs=(total(0),), outputs=(*micro(GRADIENT), total(0))),
        "backward0 on mesh 0 and backward1 on mesh 1 add to accumulator 40",
    ),
}  # fmt: skip


@pytest.mark.parametrize("problem", MISFITS)
def test_pieces_that_do_not_fit_are_refused_by_name(problem: str) -> None:
    change, message = MISFITS[problem]
    with pytest.raises(PlanError, match=message):
        change(chain(make_schedule("1f1b", 2, 2))).write()


def test_updates_in_the_wrong_order_do_not_verify() -> None:
    first, second = Piece("a", 0, step(1), step(2)), Piece("b", 0, step(0), step(1))
    with pytest.raises(ProgramError, match=r"mesh 0, instruction 0 \(run a.*v1 is needed"):
        updates(first, second, returned=2).write()
