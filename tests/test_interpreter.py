"""The interpreter on rows of affine stages with a backward pass by hand, against `jax.grad` of the whole batch."""

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alpa_like.errors import ProgramError
from alpa_like.passes.programs import Piece, Port, Scope, write_programs
from alpa_like.reshard import Layout, plan_transfer
from alpa_like.runtime.instructions import Free, Instruction, Program, Recv, Ref, Route, Run, Send, donations, verify
from alpa_like.runtime.interpreter import Event, Interpreter, interpret
from alpa_like.runtime.local import LocalTransport
from alpa_like.schedule import SCHEDULES, Kind, Schedule, make_schedule

Array = Any
Call = Callable[..., Sequence[Any]]

WIDTH, ROWS, RATE = 3, 60, 0.01
X, Y, SCALE, NEW_SCALE, LOSS, STAGE_VALUES = 0, 1, 2, 3, 4, 10


@dataclass(frozen=True)
class Values:
    """The numbers of one stage's values."""

    stage: int

    def __getattr__(self, name: str) -> int:
        names = ("w", "b", "y", "dy", "dw", "db", "dscale", "new_w", "new_b")
        return STAGE_VALUES * (self.stage + 1) + names.index(name)


# -------------------------------------------------------------------------------- one stage: y = (x w + b) · scale


def forward(x: Array, w: Array, b: Array, scale: Array = 1.0) -> tuple[Array]:
    return ((x @ w + b) * scale,)


def last_forward(target: Array, loss: Array, x: Array, w: Array, b: Array, scale: Array = 1.0) -> tuple[Array, ...]:
    (y,) = forward(x, w, b, scale)
    return y, 2 * (y - target), loss + ((y - target) ** 2).sum()


def input_grad(dy: Array, w: Array, scale: Array = 1.0) -> tuple[Array]:
    return (dy @ w.T * scale,)


def weight_grad(x: Array, dy: Array, w: Array, b: Array, dw: Array, db: Array, *tied: Array) -> tuple[Array, ...]:
    """`tied` is the scale and the sum of its gradients, where the stage has them."""
    if not tied:
        return dw + x.T @ dy, db + dy.sum(0)
    scale, dscale = tied
    return dw + x.T @ dy * scale, db + dy.sum(0) * scale, dscale + (dy * (x @ w + b)).sum()


def backward(x: Array, dy: Array, w: Array, b: Array, dw: Array, db: Array, *tied: Array) -> tuple[Array, ...]:
    return *input_grad(dy, w, *tied[:1]), *weight_grad(x, dy, w, b, dw, db, *tied)


def update(*values: Array) -> tuple[Array, ...]:
    """Parameters and as many gradients."""
    half = len(values) // 2
    return tuple(value - RATE * grad for value, grad in zip(values[:half], values[half:], strict=True))


def update_scale(scale: Array, *grads: Array) -> tuple[Array]:
    return (scale - RATE * sum(grads),)


def zeros(*shapes: tuple[int, ...]) -> list[Array]:
    return [np.zeros(shape) for shape in shapes]


# ----------------------------------------------------------------------------------------------- a row of stages


@dataclass(frozen=True)
class Pipeline:
    """Programs, what runs in them, and what they are given."""

    programs: tuple[Program, ...]
    pieces: dict[str, Call]
    state: dict[int, Array]

    def given(self, x: Array, y: Array, M: int) -> dict[tuple[int, Ref], Array]:
        batch = {X: np.split(x, M), Y: np.split(y, M)}
        refs = [(p.mesh, ref) for p in self.programs for ref in p.given]
        return {(mesh, r): self.state[r.value] if r.index < 0 else batch[r.value][r.index] for mesh, r in refs}

    def routes(self) -> set[Route]:
        return {i.transfer for p in self.programs for i in p.instructions if isinstance(i, Send)}


class Builder:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.S = schedule, schedule.num_stages
        self.calls: dict[str, Call] = {}
        self.pieces: dict[tuple[Kind, int], Piece] = {}
        self.before: list[Piece] = []
        self.after: list[Piece] = []

    def piece(self, name: str, mesh: int, call: Call, inputs: Iterable[Port], outputs: Iterable[Port]) -> Piece:
        self.calls[name] = call
        return Piece(name, mesh, tuple(inputs), tuple(outputs))

    def stage(self, s: int) -> None:
        v, mesh, last = Values(s), self.schedule.meshes[s], s == self.S - 1
        tied = (Port(SCALE, "step"),) if s in (0, self.S - 1) else ()
        x, weights = Port(Values(s - 1).y if s else X, "micro"), (Port(v.w, "step"), Port(v.b, "step"))
        outs, loss = [Port(v.y, "micro")], Port(LOSS, "accumulator", donatable=True)
        if last:
            ends = (*outs, Port(v.dy, "micro"), loss)
            read = (Port(Y, "micro"), loss, x, *weights, *tied)
            self.pieces["forward", s] = self.piece(f"forward{s}", mesh, last_forward, read, ends)
            self.before.append(self.piece("loss0", mesh, partial(zeros, ()), (), [Port(LOSS, "accumulator")]))
        else:
            self.pieces["forward", s] = self.piece(f"forward{s}", mesh, forward, (x, *weights, *tied), outs)
        if self.schedule.trains:
            self.train(s, mesh, x, weights, tied)

    def train(self, s: int, mesh: int, x: Port, weights: tuple[Port, ...], tied: tuple[Port, ...]) -> None:
        v = Values(s)
        numbers = (v.dw, v.db, *([v.dscale] if tied else []))
        sums = [Port(n, "accumulator", donatable=True) for n in numbers]
        shapes = ((WIDTH, WIDTH), (WIDTH,), ())[: len(sums)]
        self.before.append(self.piece(f"zeros{s}", mesh, partial(zeros, *shapes), (), sums))
        dy, dx = Port(v.dy, "micro", donatable=s > 0), [Port(Values(s - 1).dy, "micro")] if s else []
        reads = (x, dy, *weights, *sums[:2], *tied, *sums[2:])
        if self.schedule.splits_backward or not s:
            kind: Kind = "weight_grad" if self.schedule.splits_backward else "backward"
            self.pieces[kind, s] = self.piece(f"{kind}{s}", mesh, weight_grad, reads, sums)
            if s:
                self.pieces["input_grad", s] = self.piece(f"input{s}", mesh, input_grad, (dy, weights[0], *tied), dx)
        else:
            self.pieces["backward", s] = self.piece(f"backward{s}", mesh, backward, reads, (*dx, *sums))
        old = [replace(port, donatable=True) for port in weights]
        new = [Port(v.new_w, "step"), Port(v.new_b, "step")]
        self.after.append(self.piece(f"update{s}", mesh, update, (*old, Port(v.dw, "step"), Port(v.db, "step")), new))

    def finish(self) -> Pipeline:
        for s in range(self.S):
            self.stage(s)
        ends = sorted({0, self.S - 1})
        if self.schedule.trains:
            read = (Port(SCALE, "step", donatable=True), *(Port(Values(s).dscale, "step") for s in ends))
            self.after.append(self.piece("scale", 0, update_scale, read, [Port(NEW_SCALE, "step")]))
        homes = {getattr(Values(s), n): m for s, m in enumerate(self.schedule.meshes) for n in "wb"} | {SCALE: 0}
        programs = write_programs(self.pieces, self.before, self.after, self.schedule, homes, [X, Y], self.returned())
        return Pipeline(programs, self.calls, state(self.S))

    def returned(self) -> list[tuple[int, Scope]]:
        news: list[tuple[int, Scope]] = [
            (getattr(Values(s), n), "step") for s in range(self.S) for n in ("new_w", "new_b")
        ]
        end: list[tuple[int, Scope]] = [(LOSS, "accumulator"), (Values(self.S - 1).y, "micro")]
        return [*news, (NEW_SCALE, "step"), *end] if self.schedule.trains else end


@cache
def batch() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(ROWS, WIDTH)) / 3, rng.normal(size=(ROWS, WIDTH)) / 3


@cache
def state(S: int) -> dict[int, Array]:
    rng = np.random.default_rng(S)
    weights = {Values(s).w: rng.normal(size=(WIDTH, WIDTH)) / 2 for s in range(S)}
    return weights | {Values(s).b: rng.normal(size=WIDTH) / 2 for s in range(S)} | {SCALE: np.float64(1.2)}


@cache
def direct(S: int) -> tuple[dict[int, Array], Array]:
    """Every returned value of a step of S stages on the whole batch, by `jax.grad`; and the last activations."""

    def loss(state: dict[int, Array]) -> tuple[Array, Array]:
        h = batch()[0]
        for s in range(S):
            h = (h @ state[Values(s).w] + state[Values(s).b]) * (state[SCALE] if s in (0, S - 1) else 1.0)
        return ((h - batch()[1]) ** 2).sum(), h

    (value, h), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state(S))
    new = {v: state(S)[v] - RATE * np.asarray(g) for v, g in grads.items()}
    names = {Values(s).w: Values(s).new_w for s in range(S)} | {Values(s).b: Values(s).new_b for s in range(S)}
    return {(names | {SCALE: NEW_SCALE})[v]: g for v, g in new.items()} | {LOSS: np.asarray(value)}, np.asarray(h)


def build(name: str, S: int, M: int, meshes: int | None = None) -> Pipeline:
    return Builder(make_schedule(name, S, M, meshes)).finish()


def copied(buffer: Array) -> Array:
    return np.array(buffer)


def check(results: dict[tuple[int, Ref], Array], S: int, M: int, *, trains: bool = True) -> None:
    wanted, activations = direct(S)
    found = {ref.value: value for (_, ref), value in results.items() if ref.value != Values(S - 1).y}
    outputs = {ref.index: value for (_, ref), value in results.items() if ref.value == Values(S - 1).y}
    assert found.keys() == (wanted.keys() if trains else {LOSS})
    for value in found:
        np.testing.assert_allclose(found[value], wanted[value], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([outputs[m] for m in range(M)]), activations, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_computes_the_step_of_the_whole_batch(name: str) -> None:
    shapes = [(S, None) for S in range(1, 5)]
    if name in ("gpipe", "interleaved-1f1b", "inference"):
        shapes += [(4, 2), (4, 1), (3, 1)]
    for (S, meshes), M in itertools.product(shapes, range(1, 7)):
        p = build(name, S, M, meshes)
        results = interpret(p.programs, p.pieces, dict.fromkeys(p.routes(), copied), p.given(*batch(), M))
        check(results, S, M, trains=name != "inference")


class Halves:
    """A transfer with a sender's and a receiver's part."""

    def send(self, value: Array, /) -> tuple[str, Array]:
        return "ticket", np.array(value)

    def receive(self, ticket: tuple[str, Array], /) -> Array:
        assert ticket[0] == "ticket"
        return ticket[1]


@pytest.mark.parametrize("name", ["1f1b", "interleaved-1f1b", "zb-h2"])
def test_transfers_in_two_halves_and_traced_steps_compute_the_same(name: str) -> None:
    p = build(name, 4, 5, 2 if name == "interleaved-1f1b" else None)
    events: list[Event] = []
    for transfer in (copied, Halves()):
        moves = dict.fromkeys(p.routes(), transfer)
        check(interpret(p.programs, p.pieces, moves, p.given(*batch(), 5)), 4, 5)
        check(interpret(p.programs, p.pieces, moves, p.given(*batch(), 5), record=events.append), 4, 5)
    runs = [(q.mesh, i.label) for q in p.programs for i in q.instructions if isinstance(i, Run)]
    assert sorted((e.mesh, e.label) for e in events) == sorted(runs * 2)


# ----------------------------------------------------------------------------------------------- memory


class Buffer:
    """A number of 8 bytes that knows its mesh, and must not be used once it was donated."""

    def __init__(self, mesh: int) -> None:
        self.mesh, self.gone = mesh, False

    def use(self, mesh: int) -> None:
        assert self.mesh == mesh
        assert not self.gone


class Memory:
    """Pieces and transfers that make `Buffer`s, and count how many there are on every mesh."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self.live, self.peak, self._meshes = [0] * len(programs), [0] * len(programs), {}
        self._donated = donations(programs)
        runs = [(p.mesh, i) for p in programs for i in p.instructions if isinstance(i, Run)]
        self.pieces = {i.piece: partial(self._run, mesh, i.piece, len(i.outputs)) for mesh, i in runs}
        sends = [i for p in programs for i in p.instructions if isinstance(i, Send)]
        self.transfers = {i.transfer: partial(self._move, i.transfer) for i in sends}

    def new(self, mesh: int) -> Buffer:
        buffer = Buffer(mesh)
        self.count(mesh, 1)
        weakref.finalize(buffer, self._dropped, buffer.__dict__)
        return buffer

    def count(self, mesh: int, change: int) -> None:
        self.live[mesh] += change
        self.peak[mesh] = max(self.peak[mesh], self.live[mesh])

    def _dropped(self, was: dict[str, Any]) -> None:
        if not was["gone"]:
            self.count(was["mesh"], -1)

    def _run(self, mesh: int, piece: str, outputs: int, *inputs: Buffer) -> list[Buffer]:
        for buffer in inputs:
            buffer.use(mesh)
        for i in self._donated[piece]:
            inputs[i].gone = True
            self.count(mesh, -1)
        return [self.new(mesh) for _ in range(outputs)]

    def _move(self, route: Route, buffer: Buffer) -> Buffer:
        buffer.use(route.source)
        return self.new(route.target)


@pytest.mark.parametrize("name", SCHEDULES)
def test_buffers_live_exactly_as_long_as_the_programs_say(name: str) -> None:
    several = name in ("gpipe", "interleaved-1f1b", "inference")
    for S, M, meshes in [(1, 4, 1), (4, 5, 1 if several else None), (3, 2, None)]:
        p = build(name, S, M, meshes)
        memory = Memory(p.programs)
        interpreter = Interpreter(p.programs, memory.pieces, memory.transfers)
        results = interpreter(memory.new(mesh) for mesh, _ in interpreter.given)
        assert memory.live == [len(q.returned) for q in p.programs]
        peaks = verify(p.programs, dict.fromkeys(range(STAGE_VALUES * 6), 1))
        if len(p.programs) == 1:
            assert memory.peak == list(peaks)
        else:  # what was sent arrives at once
            assert all(real >= said for real, said in zip(memory.peak, peaks, strict=True))
        assert len(results) == sum(memory.live)


def test_freed_and_donated_buffers_are_gone_when_the_next_piece_starts() -> None:
    a, b, c, d = (Ref(v) for v in range(4))
    body: list[Instruction] = [Run("f", (a,), (b, c), "f", (0,)), Free((b,)), Run("g", (c,), (d,), "g"), Free((c,))]
    made: list[weakref.ref[Buffer]] = []

    def new() -> Buffer:
        buffer = Buffer(0)
        made.append(weakref.ref(buffer))
        return buffer

    def last(_: Buffer) -> list[bool]:
        return [[ref() is None for ref in made] == [True, True, False]]

    interpreter = Interpreter([Program(0, (a,), tuple(body), (d,))], {"f": lambda _: [new(), new()], "g": last}, {})
    assert interpreter(new() for _ in range(1)) == [True]
    made.clear()
    assert interpreter.trace(new() for _ in range(1))[0] == [True]


def test_a_failed_step_keeps_no_buffer_alive() -> None:
    p = build("1f1b", 2, 3)
    memory = Memory(p.programs)
    interpreter = Interpreter(p.programs, memory.pieces | {"update1": failing}, memory.transfers)
    with pytest.raises(ProgramError) as caught:
        interpreter(memory.new(mesh) for mesh, _ in interpreter.given)
    assert sum(memory.live) <= len(interpreter.given) + 1
    assert "update1 failed on mesh 1" in str(caught.value)


def failing(*_: Any) -> list[Any]:
    raise ZeroDivisionError("no such luck\n  in the middle\nat the end\n")


# ----------------------------------------------------------------------------------------------- what goes wrong


def run_with(changes: dict[str, Call], *, trace: bool = False, names: dict[int, str] | None = None) -> Any:
    p = build("1f1b", 2, 3)
    interpreter = Interpreter(p.programs, p.pieces | changes, dict.fromkeys(p.routes(), copied), names)
    given = p.given(*batch(), 3)
    values = [given[key] for key in interpreter.given]
    return interpreter.trace(values) if trace else interpreter(values)


@pytest.mark.parametrize("trace", [False, True])
def test_a_failing_piece_is_named_with_its_mesh_and_micro_batch(trace: bool) -> None:
    calls = itertools.count()

    def second(*_: Any) -> Any:
        return failing() if next(calls) == 1 else backward(*_)

    with pytest.raises(ProgramError) as caught:
        run_with({"backward1": second}, trace=trace)
    assert str(caught.value) == (
        "backward1 of micro-batch 1 failed on mesh 1: ZeroDivisionError: no such luck: at the end. "
        "No given buffer was lost; the state is as it was"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_donated_state_is_reported_as_lost_under_its_name() -> None:
    names = {Values(0).w: "state['w0']", Values(0).b: "state['b0']"}
    with pytest.raises(
        ProgramError, match=r"scale failed .* are gone \(state\['w0'\] and 3 more\): go on from the last"
    ):
        run_with({"scale": failing}, names=names)
    with pytest.raises(ProgramError, match=r"scale failed .* are gone \(v10 of mesh 0 and \d more\)"):
        run_with({"scale": failing}, trace=True)


def test_a_piece_that_fails_after_it_took_its_input_is_no_piece_without_loss() -> None:
    take = jax.jit(lambda x: x + 1, donate_argnums=0)

    def takes(x: Array) -> Any:
        take(x)
        return failing()

    program = Program(0, (Ref(0),), (Run("f", (Ref(0),), (Ref(1),), "f", (0,)),), (Ref(1),))
    with pytest.raises(ProgramError, match=r"f failed on mesh 0: .*The donated buffers are gone \(v0 of mesh 0\)"):
        Interpreter([program], {"f": takes}, {})([jnp.ones(3)])
    with pytest.raises(ProgramError, match="No given buffer was lost"):
        Interpreter([program], {"f": failing}, {})([jnp.ones(3)])


def test_wrong_numbers_of_buffers_and_missing_parts_are_refused() -> None:
    with pytest.raises(ProgramError, match=r"forward0 of micro-batch 0 failed .*expected 1 outputs, found 2"):
        run_with({"forward0": lambda *x: x[:2]})
    p = build("1f1b", 2, 3)
    moves = dict.fromkeys(p.routes(), copied)
    interpreter = Interpreter(p.programs, p.pieces, moves)
    with pytest.raises(ProgramError, match=r"take 11 buffers, in the order of Interpreter\.given; found 1"):
        interpreter([0])
    with pytest.raises(ProgramError, match="run piece zeros0, found pieces a; add it"):
        Interpreter(p.programs, {"a": failing}, moves)
    with pytest.raises(ProgramError, match=r"need a transfer for Route\(value=2, source=0, target=1\), found 0 others"):
        Interpreter(p.programs, p.pieces, {})
    with pytest.raises(ProgramError, match="need v10 on mesh 0, but it is not given"):
        interpret(p.programs, p.pieces, moves, {})
    with pytest.raises(ProgramError, match="mesh 0, at the end: v0 is neither freed nor returned"):
        Interpreter([Program(0, (Ref(0),), (), ())], {}, {})


def test_a_failing_transfer_is_named() -> None:
    p = build("1f1b", 2, 3)
    with pytest.raises(ProgramError, match="sending v2 to mesh 1 failed on mesh 0: ZeroDivisionError"):
        interpret(p.programs, p.pieces, dict.fromkeys(p.routes(), failing), p.given(*batch(), 3))


def test_programs_that_only_pass_buffers_on() -> None:
    a, b, route, back = Ref(0), Ref(1), Route(0, 0, 1), Route(1, 1, 0)
    first: list[Instruction] = [Free((Ref(2),)), Send(a, 1, route), Recv(b, 1, back), Free((b,))]
    programs = [
        Program(0, (a, Ref(2)), tuple(first), (a,)),
        Program(1, (b,), (Send(b, 0, back), Recv(a, 0, route)), (a, b)),
    ]
    moves = {route: lambda x: x + 100, back: failing_never}
    interpreter = Interpreter(programs, {}, moves)
    assert interpreter.given == ((0, a), (0, Ref(2)), (1, b))
    assert interpreter([1, 2, 3]) == [1, 101, 3]
    assert interpreter.trace([1, 2, 3]) == ([1, 101, 3], ())


def failing_never(x: Any) -> Any:
    return x


# ----------------------------------------------------------------------------------------------- times


class Later:
    """A result that is there only after some time, which its device spends on nothing else."""

    def __init__(self, device: threading.Lock, seconds: float) -> None:
        self._seconds, self._device = seconds, device
        self._ready = False

    def block_until_ready(self) -> "Later":
        if not self._ready:
            with self._device:
                time.sleep(self._seconds)
            self._ready = True
        return self


def test_a_trace_tells_true_times_and_meshes_overlap() -> None:
    S, M, seconds = 2, 4, 0.01
    schedule = make_schedule("inference", S, M)
    ports = [Port(v, "micro") for v in range(3)]
    pieces: dict[tuple[Kind, int], Piece] = {
        ("forward", s): Piece(f"f{s}", s, (ports[s],), (ports[s + 1],)) for s in range(S)
    }
    programs = write_programs(pieces, [], [], schedule, {}, [0], [(2, "micro")])
    devices = [threading.Lock() for _ in range(S + 1)]
    calls: dict[str, Call] = {f"f{s}": lambda _, s=s: [Later(devices[s], seconds)] for s in range(S)}
    interpreter = Interpreter(programs, calls, {Route(1, 0, 1): lambda _: Later(devices[S], seconds)})
    _, events = interpreter.trace(range(M))
    assert [e.label for e in events if e.mesh == 1] == [f"f1 of micro-batch {m}" for m in range(M)]
    times = [[(e.start_s, e.end_s) for e in events if e.mesh == mesh] for mesh in range(S)]
    assert all(seconds <= end - start for row in times for start, end in row)
    assert all(end <= start for row in times for (_, end), (start, _) in itertools.pairwise(row))
    assert all(times[0][m][1] + seconds <= times[1][m][0] for m in range(M))  # the transfer takes as long
    assert any(a[0] < b[1] and b[0] < a[1] for a, b in itertools.product(*times))  # meshes work at the same time


# ----------------------------------------------------------------------------------------------- with JAX


def test_compiled_pieces_on_two_meshes_with_donation_equal_jax_grad() -> None:
    S, M = 2, 3
    p = build("1f1b", S, M)
    devices = jax.devices()
    donated = donations(p.programs)
    pieces: dict[str, Call] = {}
    for program in p.programs:
        for name in {i.piece for i in program.instructions if isinstance(i, Run)}:
            call = p.pieces[name]
            if name.startswith(("zeros", "loss")):
                pieces[name] = partial(placed, call, devices[program.mesh])
            else:
                pieces[name] = jax.jit(call, donate_argnums=donated[name])
    moves = {r: transport(r, () if r.value in (SCALE, Values(1).dscale) else (ROWS // M, WIDTH)) for r in p.routes()}
    given = {k: jax.device_put(jnp.float32(v), devices[k[0]]) for k, v in p.given(*batch(), M).items()}
    results = interpret(p.programs, pieces, moves, given)
    check(results, S, M)
    assert {key for key, value in given.items() if value.is_deleted()} == {
        (s, Ref(getattr(Values(s), n))) for s in range(S) for n in "wb"
    } | {(0, Ref(SCALE))}
    assert all(results[mesh, ref].devices() == {devices[mesh]} for mesh, ref in results)


def transport(route: Route, shape: tuple[int, ...]) -> LocalTransport:
    """Each mesh is one device."""
    source, target = (Layout((1,), ("x",), (mesh, 1), ((),) * len(shape)) for mesh in (route.source, route.target))
    return LocalTransport(plan_transfer(shape, 4, source, target), jax.devices(), "float32")


def placed(make: Call, device: Any) -> Any:
    return jax.device_put([jnp.float32(a) for a in make()], device)
