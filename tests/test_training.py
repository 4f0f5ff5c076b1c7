"""`train` runs every batch once, saves and goes on where it was; `prefetch` reads ahead and hides nothing."""

import itertools
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alpa_like as alpa
from alpa_like import checkpoint as alpa_checkpoint
from alpa_like import training
from alpa_like.batches import Batches
from alpa_like.runtime import session
from alpa_like.runtime.remote_arrays import RemoteArray

CHIP, WIRE = alpa.Device("chip", (("float32", 1e9),), 2**30, 1e9, 1.0), alpa.Link(1e9, 0.0)
WIDTH, ROWS = 8, 4


def loss_of(params: Any, batch: Any) -> Any:
    return jnp.mean((jnp.tanh(batch @ params["in"]) @ params["out"]) ** 2)


def sgd(state: Any, batch: Any) -> Any:
    value, grads = jax.value_and_grad(loss_of)(state["params"], batch)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], grads)
    return {"params": params, "step": state["step"] + 1, "seen": state["seen"] + batch.shape[0]}, value


def state_of() -> Any:
    """Arrays, a number of Python's kind, and 64 bits of NumPy."""
    left, right = np.float32(np.random.default_rng(0).standard_normal((2, WIDTH, WIDTH)) / 4)
    return {"params": {"in": left, "out": right}, "step": 0, "seen": np.int64(0)}


def batches(count: int = 6, start: int = 0) -> Iterator[Any]:
    """Can be read once only."""
    for seed in range(start, count):
        yield np.float32(np.random.default_rng(seed).standard_normal((ROWS, WIDTH)))


def by_hand(count: int = 6) -> Any:
    """What training by `jax.jit` gives: the state, and the loss of each step."""
    state, losses = state_of(), []
    for batch in batches(count):
        state, value = jax.jit(sgd)(state, batch)
        losses.append(float(value))
    return state, losses


@pytest.fixture(autouse=True, scope="module")
def devices() -> Iterator[None]:
    alpa.init(alpa.Cluster("two chips", 1, 2, CHIP, WIRE, WIRE, ("made up",)))
    yield
    alpa.shutdown()


@pytest.fixture(scope="module")
def step() -> alpa.ParallelFunction:
    return alpa.parallelize(sgd)


def assert_close(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


class Notes:
    """What `on_step` was told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []

    def __call__(self, step: int, rest: Any) -> None:
        self.steps.append(step)
        self.losses.append(float(rest))


# ------------------------------------------------------------------------------------------------------------- train


@pytest.mark.parametrize("source", [batches(), list(batches()), lambda start: batches(start=start)])
def test_every_batch_is_one_step(step: alpa.ParallelFunction, source: Any) -> None:
    notes, (expected, losses) = Notes(), by_hand()
    assert_close(alpa.train(step, state_of(), source, on_step=notes), expected)
    assert notes.steps == list(range(6))
    np.testing.assert_allclose(notes.losses, losses, rtol=1e-5)


def test_endless_batches_end_with_num_steps(step: alpa.ParallelFunction) -> None:
    endless = itertools.chain.from_iterable(batches() for _ in itertools.count())
    notes = Notes()
    assert_close(alpa.train(step, state_of(), endless, num_steps=4, on_step=notes), by_hand(4)[0])
    assert notes.steps == [0, 1, 2, 3]


def test_few_batches_end_before_num_steps(step: alpa.ParallelFunction, tmp_path: Path) -> None:
    found = alpa.train(step, state_of(), batches(3), num_steps=9, checkpoint_directory=tmp_path)
    assert_close(found, by_hand(3)[0])
    assert alpa.latest_step(tmp_path) == 3


def test_a_step_may_return_the_state_only_or_much_more() -> None:
    def only(state: Any, batch: Any) -> Any:
        return sgd(state, batch)[0]

    def more(state: Any, batch: Any) -> Any:
        new, value = sgd(state, batch)
        return new, value, {"twice": 2 * value}

    told: list[Any] = []
    for function in (only, more):
        found = alpa.train(
            alpa.parallelize(function), state_of(), batches(2), on_step=lambda _, rest: told.append(rest)
        )
        assert_close(found, by_hand(2)[0])
    assert told[:2] == [(), ()]
    assert [(len(rest), *rest[1]) for rest in told[2:]] == [(2, "twice")] * 2


SOURCES: dict[str, Callable[[], Any]] = {
    "iterator": lambda: batches(),
    "function": lambda: lambda start: batches(start=start),
}


@pytest.mark.parametrize("name", SOURCES)
def test_it_goes_on_where_it_was(
    step: alpa.ParallelFunction, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit by bit, in a new session, whatever state is given, without compiling twice or reading a batch twice."""
    whole = jax.tree.map(np.asarray, alpa.train(step, state_of(), batches()))
    alpa.train(step, state_of(), SOURCES[name](), num_steps=4, checkpoint_directory=tmp_path, checkpoint_every=3)
    assert alpa.latest_step(tmp_path) == 4
    alpa.init(alpa.Cluster("two chips", 1, 2, CHIP, WIRE, WIRE, ("made up",)))
    wrong = jax.tree.map(lambda x: x * 0, state_of())
    notes = Notes()
    with caplog.at_level(logging.INFO, "alpa_like"):
        found = alpa.train(step, wrong, SOURCES[name](), checkpoint_directory=tmp_path, on_step=notes)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, whole))
    assert notes.steps == [4, 5]
    assert [r.message.partition(" for mesh")[0] for r in caplog.records if "compiling" in r.message] == [
        "sgd: compiling"
    ]
    assert "going on with step 4" in caplog.text


def test_nothing_is_left_to_do(step: alpa.ParallelFunction, tmp_path: Path) -> None:
    """Neither steps nor checkpoints are made up."""
    expected = jax.tree.map(np.asarray, alpa.train(step, state_of(), batches(), checkpoint_directory=tmp_path))
    cases: list[tuple[Any, dict[str, Any]]] = [
        (lambda start: batches(start=start), {}),
        (batches(), {"num_steps": 6}),
        (list(batches()), {"num_steps": 3}),
    ]
    for source, options in cases:
        notes = Notes()
        found = alpa.train(step, state_of(), source, checkpoint_directory=tmp_path, on_step=notes, **options)
        assert notes.steps == []
        assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
        assert [p.name for p in tmp_path.iterdir()] == ["step_00000006"]
    assert_close(alpa.train(step, state_of(), []), state_of())


def test_checkpoints_are_written_and_pruned(step: alpa.ParallelFunction, tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint_every": 2, "keep": 2}
    for directory, keep in ((tmp_path / "two", 2), (tmp_path / "all", None)):
        alpa.train(step, state_of(), batches(7), checkpoint_directory=directory, **(options | {"keep": keep}))
        steps = sorted(int(p.name.removeprefix("step_")) for p in directory.iterdir())
        assert steps == ([6, 7] if keep else [2, 4, 6, 7])
        assert_close(alpa.restore_checkpoint(directory, state_of()), by_hand(7)[0])


def test_what_the_batches_raise_is_raised(step: alpa.ParallelFunction, tmp_path: Path) -> None:
    def broken() -> Iterator[Any]:
        yield from batches(3)
        raise OSError("the disk with the data is gone")

    notes = Notes()
    with pytest.raises(OSError, match="the disk with the data is gone"):
        alpa.train(
            step, state_of(), broken(), checkpoint_directory=tmp_path, checkpoint_every=2, on_step=notes
        )  # fmt: skip
    assert notes.steps == [0, 1, 2]
    found = alpa.train(step, state_of(), batches(), checkpoint_directory=tmp_path, on_step=notes)
    assert notes.steps == [0, 1, 2, 3, 4, 5]
    assert_close(found, by_hand()[0])


def test_what_on_step_raises_is_raised(step: alpa.ParallelFunction) -> None:
    def on_step(number: int, rest: Any) -> None:
        raise KeyError(number)

    with pytest.raises(KeyError, match="0"):
        alpa.train(step, state_of(), batches(), on_step=on_step)
    assert no_reader()


def wrong_tree(state: Any, batch: Any) -> Any:
    return sgd(state, batch)[1], state


BAD: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "function": (lambda f: alpa.train(sgd, state_of(), []), alpa.TraceError, "made by alpa.parallelize"),
    "num_steps": (lambda f: alpa.train(f, state_of(), [], num_steps=0), alpa.TraceError, "num_steps .* found 0"),
    "every": (lambda f: alpa.train(f, state_of(), [], checkpoint_every=2), alpa.TraceError, "checkpoint_directory"),
    "none": (lambda f: alpa.train(f, state_of(), None), alpa.TraceError, "batches must .* found None"),  # type: ignore
    "number": (lambda f: alpa.train(f, state_of(), 5), alpa.TraceError, "batches must .* found 5"),  # type: ignore
    "function of none": (
        lambda f: alpa.train(f, state_of(), lambda start: None),  # type: ignore
        alpa.TraceError,
        "batches, called with 0, must return an iterable .* found None",
    ),
    "on_step": (
        lambda f: alpa.train(f, state_of(), [], on_step=3),  # type: ignore
        alpa.TraceError,
        "on_step .* found 3",
    ),
    "directory": (
        lambda f: alpa.train(f, state_of(), [], checkpoint_directory=5),  # type: ignore
        alpa.TraceError,
        "checkpoint_directory .* found 5",
    ),
    "leaf": (lambda f: alpa.train(f, {"w": "text"}, []), alpa.TraceError, "no array"),
    "depth": (lambda f: alpa.prefetch([], 0), alpa.TraceError, "depth .* found 0"),
    "tree": (
        lambda f: alpa.train(alpa.parallelize(wrong_tree), state_of(), batches()),
        alpa.TraceError,
        "wrong_tree must return the new state",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_mistake_is_one_sentence(step: alpa.ParallelFunction, kind: str) -> None:
    use, error, words = BAD[kind]
    with pytest.raises(error, match=words) as info:
        use(step)
    assert "\n" not in str(info.value)


def unread() -> Iterator[Any]:
    pytest.fail("batches were read")
    yield


DIRECTORIES: dict[str, tuple[dict[str, Any], str]] = {
    "file": ({"checkpoint_directory": "file"}, "/file is a file; a directory is needed"),
    "in a file": ({"checkpoint_directory": "file/inside"}, "/file is a file; a directory is needed"),
    "not to be made": ({"checkpoint_directory": "/proc/run"}, "no checkpoint can be written to /proc/run"),
    "empty": ({"checkpoint_directory": ""}, "must be the path of a folder, found ''"),
    "keep": ({"checkpoint_directory": "new", "keep": 0}, "keep must be a whole number of at least 1"),
}


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_bad_directories_are_found_before_the_first_step(
    step: alpa.ParallelFunction, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no folder")
    options, words = DIRECTORIES[kind]
    with pytest.raises(alpa.CheckpointError, match=words) as info:
        alpa.train(step, state_of(), unread(), **options)
    assert "\n" not in str(info.value)


# ------------------------------------------------------------------------------------- when a directory has checkpoints


def trained(step: alpa.ParallelFunction, directory: Path, count: int = 4) -> None:
    """Checkpoints after steps 2 and 4."""
    alpa.train(step, state_of(), batches(count), checkpoint_directory=directory, checkpoint_every=2, keep=None)


@pytest.mark.parametrize("source", [lambda: list(batches(4)), lambda: batches(3), list[Any]])
def test_batches_that_end_before_the_checkpoint(
    step: alpa.ParallelFunction, source: Callable[[], Any], tmp_path: Path
) -> None:
    """A second epoch with the same batches and directory is no epoch that is silently skipped."""
    trained(step, tmp_path)
    with pytest.raises(alpa.TraceError, match=f"batches end before step 4, where {tmp_path} goes on; give more"):
        alpa.train(step, state_of(), source(), checkpoint_directory=tmp_path)
    assert no_reader()


def flip(folder: Path) -> None:
    """A byte of each file of data, as bad disks do; their sizes stay."""
    for path in (p for p in folder.rglob("d/*") if p.is_file()):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)


def unlist(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [flip, unlist])
@pytest.mark.parametrize("name", SOURCES)
def test_a_damaged_checkpoint_is_passed_over_and_kept(
    step: alpa.ParallelFunction,
    name: str,
    damage: Callable[[Path], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trained(step, tmp_path)
    damage(tmp_path / "step_00000004")
    alpa.init(alpa.Cluster("two chips", 1, 2, CHIP, WIRE, WIRE, ("made up",)))  # so that the step is compiled again
    notes = Notes()
    options: dict[str, Any] = {"checkpoint_directory": tmp_path, "checkpoint_every": 2, "keep": 1, "on_step": notes}
    assert_close(alpa.train(step, state_of(), SOURCES[name](), **options), by_hand()[0])
    assert notes.steps == [2, 3, 4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000004.damaged", "step_00000006"]
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert any("step_00000004" in m and "kept as" in m for m in warnings)
    assert any("going on with step 2" in m for m in warnings)


@pytest.mark.parametrize(
    ("damage", "words"), [(flip, "no checkpoint in .* can be read"), (unlist, "holds no complete checkpoint: .*00004")]
)
def test_nothing_but_damaged_checkpoints(
    step: alpa.ParallelFunction, damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    """Training does not silently begin anew beside them."""
    trained(step, tmp_path)
    for folder in tmp_path.iterdir():
        damage(folder)
    with pytest.raises(alpa.CheckpointError, match=words):
        alpa.train(step, state_of(), batches(), checkpoint_directory=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000004"]


def test_the_newest_state_is_saved_where_on_step_raises(step: alpa.ParallelFunction, tmp_path: Path) -> None:
    def stop_at_three(number: int, rest: Any) -> None:
        if number == 3:
            raise KeyError(number)

    options: dict[str, Any] = {"checkpoint_directory": tmp_path, "checkpoint_every": 3, "on_step": stop_at_three}
    with pytest.raises(KeyError, match="3") as info:
        alpa.train(step, state_of(), batches(), **options)
    assert info.value.__notes__ == [f"The state after 4 steps is in {tmp_path}."]
    assert_close(alpa.restore_checkpoint(tmp_path, state_of()), by_hand(4)[0])


def test_what_could_not_be_saved_is_tried_again(
    step: alpa.ParallelFunction, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A directory that is gone for a while, as network file systems are; then for good."""
    place, away = tmp_path / "run", tmp_path / "away"

    def lose(number: int, rest: Any) -> None:
        if number == 1:
            place.rename(away)
            place.write_text("no folder")
        if number == 2:
            place.unlink()
            away.rename(place)

    alpa.train(step, state_of(), batches(5), checkpoint_directory=place, checkpoint_every=2, on_step=lose)
    assert sorted(p.name for p in place.iterdir()) == ["step_00000004", "step_00000005"]
    assert "step_00000002 failed" in caplog.text

    def lose_for_good(number: int, rest: Any) -> None:
        shutil.rmtree(place)
        place.write_text("no folder")
        raise KeyError(number)

    with pytest.raises(KeyError) as info:
        alpa.train(step, state_of(), batches(), checkpoint_directory=place, on_step=lose_for_good)
    assert "could not be saved: saving" in info.value.__notes__[0]


class DeadRemote:
    """A session whose worker has died."""

    max_restarts, number = 0, 1

    def __init__(self) -> None:
        self.remote = self.workers = self

    def poll_failure(self) -> alpa.WorkerError:
        return alpa.WorkerError("worker 1 of 2 died\n  | its log")

    def stop(self) -> None: ...


def test_a_death_behind_a_failed_save_is_a_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: Future[None] = Future()
    done.set_exception(alpa.WorkerError("worker 1 of 2 died\n  | its log"))
    with pytest.raises(alpa.WorkerError, match=r"step_00000001 failed: worker 1 of 2 died\n  \| its log"):
        alpa_checkpoint.Saving(tmp_path / "step_00000001", done).wait()
    monkeypatch.setattr(session, "current", DeadRemote)
    with pytest.raises(alpa.WorkerError, match="its log"):
        training._missed(alpa.CheckpointError("a barrier was not reached"))  # pyright: ignore[reportPrivateUsage]


def test_after_a_session_on_ray_the_next_step_says_where_it_runs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote: Any = DeadRemote()
    monkeypatch.setattr(session, "_sessions", [session.Session((), None, remote)])
    alpa.shutdown()
    for _ in range(2):
        assert session.current().remote is None
    assert [record.message for record in caplog.records] == [
        f"the Ray session has ended, so from here on steps run on {len(jax.devices())} cpu device(s) of this process; "
        "call alpa.init to choose others"
    ]


def test_restarts_without_checkpoints_between(step: alpa.ParallelFunction, tmp_path: Path, caplog: Any) -> None:
    here = session.current()
    restarting = session.Session(here.devices, here.cluster, max_restarts=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_sessions", [restarting])
        alpa.train(step, state_of(), batches(2), checkpoint_directory=tmp_path)
    assert "no checkpoint_every" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000000", "step_00000002"]


def test_another_model_takes_nothing(step: alpa.ParallelFunction, tmp_path: Path) -> None:
    """The state that was given is still there after the error."""
    trained(step, tmp_path, 2)
    given: Any = {**state_of(), "params": {"in": RemoteArray(KEPT, SHAPE, None, ())}}
    with pytest.raises(alpa.CheckpointError, match="another model"):
        alpa.train(step, given, batches(), checkpoint_directory=tmp_path)
    whole: Any = {**state_of(), "params": {n: RemoteArray(KEPT, SHAPE, None, ()) for n in ("in", "out")}}
    with pytest.raises(alpa.TraceError, match="end before step 2"):
        alpa.train(step, whole, [], checkpoint_directory=tmp_path)
    assert not any(x.is_deleted() for x in [given["params"]["in"], *whole["params"].values()])


SHAPE = jax.ShapeDtypeStruct((WIDTH, WIDTH), np.float32)


class Kept:
    """Holds arrays of workers that never existed."""

    alive = True

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


KEPT: Any = Kept()


# ---------------------------------------------------------------------------------------------------------- prefetch


def no_reader() -> bool:
    """Whether all threads that read ahead have ended, or soon have."""
    for thread in threading.enumerate():
        if thread.name == "alpa-prefetch":
            thread.join(5)
    return not any(t.name == "alpa-prefetch" for t in threading.enumerate())


def test_prefetch_keeps_the_order_and_ends() -> None:
    assert list(alpa.prefetch(range(100), 3)) == list(range(100))
    assert list(alpa.prefetch([None, (), 0])) == [None, (), 0]
    assert list(alpa.prefetch([])) == []
    assert no_reader()


def test_prefetch_reads_so_far_and_no_further() -> None:
    read: list[int] = []
    beyond = threading.Event()

    def source() -> Iterator[int]:
        for n in range(100):
            read.append(n)
            if len(read) > 5:
                beyond.set()
            yield n

    ahead = alpa.prefetch(source(), 2)
    assert next(ahead) == 0
    assert not beyond.wait(0.5)  # one is taken, two wait, one is in the reader's hands
    assert 3 <= len(read) <= 4
    ahead.close()  # type: ignore
    assert no_reader()


@pytest.mark.parametrize("error", [ValueError("bad record"), SystemExit(3)])
def test_prefetch_raises_in_its_place(error: BaseException) -> None:
    def source() -> Iterator[int]:
        yield 1
        raise error

    ahead = alpa.prefetch(source())
    assert next(ahead) == 1
    with pytest.raises(type(error)) as info:
        next(ahead)
    assert info.value is error
    assert no_reader()


def test_batches_are_kept_until_nobody_needs_them() -> None:
    """After a death those since the last checkpoint are read again, each once from the source."""
    kept = Batches(iter(range(10)))
    assert list(itertools.islice(kept.start(0), 5)) == [(n, n) for n in range(5)]
    kept.forget(3)
    assert list(itertools.islice(kept.start(3), 4)) == [(n, n) for n in range(3, 7)]
    kept.forget(7)
    assert list(kept.start(7)) == [(7, 7), (8, 8), (9, 9)]
    assert no_reader()
