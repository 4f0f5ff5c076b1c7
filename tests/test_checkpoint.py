"""A state comes back bit by bit: on other devices, by other plans, and whatever happened while it was saved."""

import asyncio
import json
import logging
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import alpa_like as alpa
from alpa_like.chunked import ChunkedArray
from alpa_like.manifest import plan_parts

CHIP, WIRE = alpa.Device("chip", (("float32", 1e9),), 2**30, 1e9, 1.0), alpa.Link(1e9, 0.0)
WORKER = Path(__file__).parent / "checkpoint_worker.py"
WIDTH, LAYERS = 16, 4


# ------------------------------------------------------------------------------------------------ a model, five plans


def train_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """A loop over layers, an output layer, momentum, a counter of Python's kind, and dropout by raw random keys."""

    def loss(params: Any) -> Any:
        kept = jax.random.bernoulli(jax.random.wrap_key_data(state["key"]), 0.9, batch["x"].shape)
        out, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch["x"] * kept, params["layers"])
        return jnp.mean((out @ params["head"] - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(state["params"])
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, state["velocity"], grads)
    params = jax.tree.map(lambda p, v: p - 0.1 * v, state["params"], velocity)
    return {"params": params, "velocity": velocity, "key": state["key"], "step": state["step"] + 1}, value


def initial() -> Any:
    rng = np.random.default_rng(0)
    params = {
        "layers": np.float32(rng.standard_normal((LAYERS, WIDTH, WIDTH)) / 4),
        "head": np.float32(rng.standard_normal((WIDTH, 4))),
    }
    velocity = jax.tree.map(np.zeros_like, params)
    return {"params": params, "velocity": velocity, "key": np.array([3, 4], np.uint32), "step": 0}


def batch(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return {"x": np.float32(rng.standard_normal((16, WIDTH))), "y": np.float32(rng.standard_normal((16, 4)))}


def pipeline(stages: list[range]) -> alpa.PipeshardParallel:
    meshes = [(8 // len(stages),)] * len(stages)
    option = alpa.ManualStageOption(stages, [(1, m[0]) for m in meshes], meshes)
    return alpa.PipeshardParallel(num_micro_batches=2, layer_option=alpa.AutoLayerOption(LAYERS), stage_option=option)


PLANS = {
    "eight": (8, alpa.Zero3Parallel()),
    "four": (4, alpa.ShardParallel()),
    "one": (1, alpa.ShardParallel()),
    "halves": (8, pipeline([range(2), range(2, 4)])),
    "uneven": (8, pipeline([range(1), range(1, 4)])),
}


@pytest.fixture(scope="module")
def plans() -> Iterator[dict[str, alpa.Executable]]:
    """The step compiled for 8 devices, 4, 1, and as two pipelines."""
    found: dict[str, alpa.Executable] = {}
    for name, (count, method) in PLANS.items():
        alpa.init(alpa.Cluster(f"{count} chips", 1, count, CHIP, WIRE, WIRE, ("made up",)))
        found[name] = alpa.parallelize(train_step, method=method).compile(initial(), batch(0))
    yield found
    alpa.shutdown()


def plain(leaf: Any) -> Any:
    keys = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if keys else leaf)


def assert_equal(actual: Any, expected: Any) -> None:
    """The same tree, shapes, dtypes and bits."""
    flat, tree = jax.tree_util.tree_flatten_with_path(actual)
    assert tree == jax.tree.structure(expected)
    for (path, a), b in zip(flat, jax.tree.leaves(expected), strict=True):
        x, y = plain(a), plain(b)
        assert (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes()), jax.tree_util.keystr(path)


def host(state: Any) -> Any:
    """A copy that no donation takes."""
    return jax.tree.map(lambda x: np.array(x), state)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("eight", "four"), ("four", "one"), ("one", "eight"),
        ("halves", "uneven"), ("uneven", "one"), ("eight", "halves"),
    ],
)  # fmt: skip
def test_a_state_goes_from_plan_to_plan(
    plans: dict[str, alpa.Executable], source: str, target: str, tmp_path: Path
) -> None:
    """It is equal, it lies where the new plan wants it, the next step takes it as it is and computes the same."""
    state, _ = plans[source](initial(), batch(1))
    expected = host(state)
    alpa.save_checkpoint(tmp_path, state, 1).wait()
    restored = alpa.restore_checkpoint(tmp_path, plans[target])
    assert_equal(host(restored), expected)
    assert plans[target].takes((restored, batch(2)))
    shardings = jax.tree.leaves(plans[target].state_shardings(jax.eval_shape(lambda x: x, expected)))
    for leaf, place in zip(jax.tree.leaves(restored), shardings, strict=True):
        assert (leaf.places if isinstance(leaf, ChunkedArray) else leaf.sharding) == place
    assert isinstance(restored["params"]["layers"], ChunkedArray) == (target in ("halves", "uneven"))
    found, expected = plans[target](restored, batch(2)), jax.jit(train_step)(expected, batch(2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), host(found), host(expected))


def test_the_step_without_a_plan_says_how_to_get_one(tmp_path: Path) -> None:
    alpa.save_checkpoint(tmp_path, {"w": np.ones(2)}, 1).wait()
    with pytest.raises(alpa.PlanError, match=r"train_step has no plan yet.* call train_step\.compile\("):
        alpa.restore_checkpoint(tmp_path, alpa.parallelize(train_step))


def test_create_state_names_what_is_to_be_compiled_first() -> None:
    def made(key: Any, width: int = 2) -> Any:
        return {"w": jax.random.normal(key, (width,))}

    with pytest.raises(alpa.PlanError, match=r"call train_step\.compile\(jax\.eval_shape\(made, key\), batch\) first"):
        alpa.create_state(made, jax.random.key(0), like=alpa.parallelize(train_step))


def test_a_state_of_two_arguments_is_saved_as_a_tuple_or_one_by_one(tmp_path: Path) -> None:
    alpa.init(alpa.Cluster("two chips", 1, 2, CHIP, WIRE, WIRE, ("made up",)))
    step = alpa.parallelize(lambda w, v, x: (w - v, v * 2, x.sum()), batch_argnums=2)
    w, v, _ = step(np.ones((4, 4), np.float32), {"v": np.float32(3)}["v"], np.ones(4, np.float32))
    alpa.save_checkpoint(tmp_path, (w, v), 1).wait()
    assert_equal(alpa.restore_checkpoint(tmp_path, step), (w, v))
    alpa.save_checkpoint(tmp_path, w, 2).wait()
    assert_equal(alpa.restore_checkpoint(tmp_path, step), w)


def test_the_next_step_may_take_the_state_at_once(plans: dict[str, alpa.Executable], tmp_path: Path) -> None:
    """Ten steps, each with a save in between whose arrays the next step reuses."""
    state, expected = initial(), []
    for n in range(10):
        state, _ = plans["eight"](state, batch(n))
        expected.append(host(state))
        alpa.save_checkpoint(tmp_path, state, n)
    plans["eight"](state, batch(0))
    for n in range(10):
        assert_equal(host(alpa.restore_checkpoint(tmp_path, plans["four"], n)), expected[n])


# ------------------------------------------------------------------------------------------------ leaves


def sharded(value: Any, *axes: Any) -> jax.Array:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*axes)))


def every_kind() -> dict[str, Any]:
    floats = jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)), jnp.float32)
    return {
        "f32": sharded(floats, "x", "y"),
        "copies": sharded(floats),
        "bf16": sharded(floats.astype(jnp.bfloat16), ("y", "x")),
        "f8": floats.astype(jnp.float8_e4m3fn),
        "int8": sharded(jnp.arange(-4, 4, dtype=jnp.int8), "y"),
        "int4": jnp.arange(-8, 8).astype(jnp.int4),
        "uint32": jnp.asarray([2**32 - 1], jnp.uint32),
        "bool": sharded(floats > 0, None, "x"),
        "complex": (floats + 1j * floats)[0],
        "special": jnp.asarray([np.nan, -np.inf, -0.0], jnp.float32),
        "zero dims": jnp.float32(0.1),
        "weak": jnp.asarray(3),
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "key": jax.random.key(1),
        "keys": sharded(jax.random.split(jax.random.key(2, impl="rbg"), 8), "x"),
        "no keys": jax.random.split(jax.random.key(1), 0),
        "numpy": np.arange(3.0),
        "numpy scalar": np.int64(2**40),
        "python": [3, 0.1, True, 2j, -(2**60)],
        "none": None,
        "nothing": ((), {}),
    }


def test_every_kind_of_leaf_comes_back_where_it_was(tmp_path: Path) -> None:
    state = every_kind()
    alpa.save_checkpoint(tmp_path, state, 1).wait()
    restored = alpa.restore_checkpoint(tmp_path, state)
    assert_equal(restored, state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert type(a) is type(b)
        assert getattr(a, "sharding", None) == getattr(b, "sharding", None)
        assert getattr(a, "weak_type", None) == getattr(b, "weak_type", None)
    assert jax.random.key_impl(restored["keys"]) == "rbg"


@pytest.mark.parametrize("state", [{}, (), None, {"a": [], "b": None}, 7, np.ones(2)])
def test_small_trees_and_odd_names(state: Any, tmp_path: Path) -> None:
    directory = tmp_path / "a b%20#?" / "é"
    assert alpa.save_checkpoint(directory, state, 0).wait() == directory / "step_00000000"
    assert_equal(alpa.restore_checkpoint(str(directory), state), state)


def test_shapes_say_where_leaves_go(tmp_path: Path) -> None:
    """Split the other way round, joined, and on one device."""
    whole = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    alpa.save_checkpoint(tmp_path, [sharded(whole, "x", "y")] * 3, 1).wait()
    places = [sharded(whole, None, "x").sharding, sharded(whole).sharding, None]
    like = [jax.ShapeDtypeStruct((8, 8), np.float32, sharding=s) for s in places]
    restored = alpa.restore_checkpoint(tmp_path, like)
    for leaf, place in zip(restored, places, strict=True):
        np.testing.assert_array_equal(leaf, whole)
        assert leaf.sharding == (place or jax.device_put(0.0, jax.devices()[0]).sharding)


def test_parts_are_cut_anew(tmp_path: Path) -> None:
    """Rows 0-2, 3 and 4-5 become 0-1, none, and 2-5."""
    rows = np.arange(24.0, dtype=np.float32).reshape(6, 4)
    saved = ChunkedArray([sharded(rows[a:b], None, "y") for a, b in ((0, 3), (3, 4), (4, 6))])
    like = ChunkedArray([sharded(rows[a:b], None, "x") for a, b in ((0, 2), (2, 2), (2, 6))])
    alpa.save_checkpoint(tmp_path, saved, 1).wait()
    restored = alpa.restore_checkpoint(tmp_path, like)
    assert restored.places == like.places
    np.testing.assert_array_equal(restored, rows)


def test_numpy_arrays_may_change_after_saving(tmp_path: Path) -> None:
    array = np.zeros(1 << 20, np.float32)
    saving = alpa.save_checkpoint(tmp_path, array, 1)
    array[:] = 1
    saving.wait()
    assert not np.any(alpa.restore_checkpoint(tmp_path, array))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ("text", r"leaf \['a'\] of the state must be an array or a number, but a str is no array"),
        (2**70, r"leaf \['a'\] must hold numbers of at most 64 bits, found object 1180591620717411303424"),
        (np.array("text"), r"leaf \['a'\] must hold numbers of at most 64 bits, found <U4"),
        (jax.ShapeDtypeStruct((2,), np.float32), r"leaf \['a'\] is a ShapeDtypeStruct, which has no data"),
    ],
)
def test_a_leaf_that_is_no_array(leaf: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(alpa.CheckpointError, match=message):
        alpa.save_checkpoint(tmp_path, {"a": leaf}, 1)
    assert not list(tmp_path.iterdir())


def test_a_donated_leaf(tmp_path: Path) -> None:
    gone = jnp.ones(4)
    gone.delete()
    with pytest.raises(
        alpa.CheckpointError, match=r"leaf \['w'\] was donated .* save the state that the step returned"
    ):
        alpa.save_checkpoint(tmp_path, {"w": gone}, 1)


# ------------------------------------------------------------------------------------------------ other models


W, EXPECTED = np.ones((3, 2), np.float32), r"is expected to be"
OTHERS = {
    "shape": ({"w": W.T, "b": 1}, rf"leaf \['w'\] {EXPECTED} float32\[2, 3\], but is float32\[3, 2\]"),
    "dtype": ({"w": W.astype(jnp.bfloat16), "b": 1}, rf"leaf \['w'\] {EXPECTED} bfloat16\[3, 2\], but is float32"),
    "number": ({"w": W, "b": 1.0}, rf"leaf \['b'\] {EXPECTED} float\[\], but is int\[\]"),
    "more": ({"w": W, "b": 1, "c": 2}, rf"leaf \['c'\] {EXPECTED} int\[\], but is not in the checkpoint"),
    "fewer": ({"b": 1}, r"leaf \['w'\] is float32\[3, 2\] in the checkpoint, but is not expected; restore"),
    "several": ({"x": 1, "y": 2}, rf"leaf \['x'\] {EXPECTED} .*, and 3 other leaves differ; restore it with the model"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_model_is_named_by_its_first_leaf(case: str, tmp_path: Path) -> None:
    alpa.save_checkpoint(tmp_path, {"w": W, "b": 1}, 5).wait()
    like, message = OTHERS[case]
    with pytest.raises(alpa.CheckpointError, match=rf"step_00000005 holds the state of another model: {message}"):
        alpa.restore_checkpoint(tmp_path, like)


def test_another_model_by_its_plan(plans: dict[str, alpa.Executable], tmp_path: Path) -> None:
    alpa.save_checkpoint(tmp_path, {**initial(), "step": np.ones(2)}, 5).wait()
    with pytest.raises(alpa.CheckpointError, match=r"leaf \['step'\] is expected to be int32\[\], but is float64\[2\]"):
        alpa.restore_checkpoint(tmp_path, plans["halves"])


# ------------------------------------------------------------------------------------------------ steps


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert alpa.latest_step(tmp_path / "nowhere") is None
    for n in (1, 2, 30, 100_000_000):
        alpa.save_checkpoint(tmp_path, n, n, keep=3).wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000030", "step_100000000"]
    assert alpa.latest_step(tmp_path) == 100_000_000
    alpa.save_checkpoint(tmp_path, 7, 7, keep=1).wait()  # an old number, but it was saved last
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000007", "step_100000000"]
    assert alpa.restore_checkpoint(tmp_path, 0, step=7) == 7


def test_a_complete_step_is_not_replaced(tmp_path: Path) -> None:
    path = alpa.save_checkpoint(tmp_path, 1, 4).wait()
    with pytest.raises(alpa.CheckpointError, match="step_00000004 is there already"):
        alpa.save_checkpoint(tmp_path, 2, 4)
    (path / "manifest.json").unlink()
    alpa.save_checkpoint(tmp_path, 2, 4).wait()
    assert alpa.restore_checkpoint(tmp_path, 0) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000004", "step_00000004.damaged"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": -1}, "step must be a whole number from 0 on, found -1"),
        ({"step": 1.5}, "step must be a whole number from 0 on, found 1.5"),
        ({"keep": 0}, "keep must be a whole number of at least 1"),
        ({"directory": "gs://bucket/run"}, "found the address gs://bucket/run; mount it"),
        ({"directory": ""}, "must be the path of a folder, found ''"),
        ({"directory": 5}, "must be the path of a folder, found 5"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    defaults: dict[str, Any] = {"directory": tmp_path, "state": 1, "step": 1}
    with pytest.raises(alpa.CheckpointError, match=message):
        alpa.save_checkpoint(**{**defaults, **options})


# ------------------------------------------------------------------------------------------------ broken files


def largest(folder: Path) -> Path:
    return max((p for p in (folder / "part_0").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def garbled(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    path.write_bytes(data)


BREAKS = {
    "manifest": (lambda p: (p / "manifest.json").unlink(), "is incomplete: manifest.json is missing"),
    "half a manifest": (lambda p: os.truncate(p / "manifest.json", 100), "is damaged: manifest.json can't be read"),
    "no manifest": (lambda p: (p / "manifest.json").write_text("[]"), "has format version None"),
    "version": (lambda p: (p / "manifest.json").write_text('{"version": 9}'), "has format version 9, .* version 1"),
    "fields": (lambda p: (p / "manifest.json").write_text('{"version": 1}'), "is damaged: manifest.json can't be read"),
    "part": (lambda p: shutil.rmtree(p / "part_0"), "is incomplete: part_0/.* is missing"),
    "file": (lambda p: largest(p).unlink(), "is incomplete: part_0/.* is missing"),
    "half a file": (lambda p: os.truncate(largest(p), 10), "is damaged: part_0/.* has 10 bytes instead of"),
    "garbled": (lambda p: garbled(largest(p)), "are missing or broken"),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_checkpoint_names_the_earlier_one(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    break_it, message = BREAKS[case]
    state = np.random.default_rng(0).standard_normal(10_000)
    for n in (3, 4):
        path = alpa.save_checkpoint(tmp_path, state + n, n).wait()
    break_it(path)
    with pytest.raises(alpa.CheckpointError, match=rf"step_00000004.* {message}.*; the last complete .* of step 3$"):
        alpa.restore_checkpoint(tmp_path, state, 4)
    if case != "garbled":
        assert alpa.latest_step(tmp_path) == 3
        np.testing.assert_array_equal(alpa.restore_checkpoint(tmp_path, state), state + 3)
        assert "restoring step 3" in caplog.text


def test_nothing_to_restore(tmp_path: Path) -> None:
    with pytest.raises(alpa.CheckpointError, match=f"{tmp_path} holds no complete checkpoint$"):
        alpa.restore_checkpoint(tmp_path, 0)
    with pytest.raises(alpa.CheckpointError, match="has no checkpoint of step 3; no earlier checkpoint is complete"):
        alpa.restore_checkpoint(tmp_path, 0, 3)


# ------------------------------------------------------------------------------------------------ failing saves


@contextmanager
def small_files(nbytes: int) -> Generator[None]:
    """No file of this process may become larger: the operating system refuses, as it does when a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_save_is_told_once_and_leaves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    big = np.random.default_rng(0).standard_normal(1 << 16)
    alpa.save_checkpoint(tmp_path, big, 1).wait()
    failed = r"saving .*step_00000002 failed: a file would be larger than is allowed; the last complete .* of step 1$"
    with small_files(1 << 17):
        saving = alpa.save_checkpoint(tmp_path, big, 2)
        with pytest.raises(alpa.CheckpointError, match=failed):
            saving.wait()
        unheard = alpa.save_checkpoint(tmp_path, big, 2)
        alpa.restore_checkpoint(tmp_path, big)  # waits for it, and has no reason to fail
    assert unheard.done()
    with pytest.raises(alpa.CheckpointError, match=failed):
        alpa.save_checkpoint(tmp_path, big, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    alpa.save_checkpoint(tmp_path, big + 1, 3).wait()
    np.testing.assert_array_equal(alpa.restore_checkpoint(tmp_path, big), big + 1)
    assert not [record for record in caplog.records if record.name == "absl"]


def test_a_directory_that_can_t_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(alpa.CheckpointError, match=r"step_00000001 failed: (File exists|Not a directory)"):
        alpa.save_checkpoint(tmp_path / "file", 1, 1)


def test_logging_and_event_loops_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also inside a running loop, as in a notebook; a program that set up no logging can still do so afterwards."""
    monkeypatch.setattr(logging.root, "handlers", [])
    filters = list(logging.getLogger("absl").filters)

    async def save() -> Path:
        return alpa.save_checkpoint(tmp_path, jnp.ones(3), 1).wait()

    asyncio.run(save())
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    alpa.save_checkpoint(tmp_path, jnp.ones(3), 2).wait()
    assert asyncio.get_event_loop() is loop
    loop.close()
    asyncio.set_event_loop(None)
    assert logging.root.handlers == []
    assert logging.getLogger("absl").filters == filters


# ------------------------------------------------------------------------------------------------ processes


@dataclass
class Ended:
    code: int
    output: str


def start(*arguments: object, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "NPROC": "16", **env}
    )


def ended(process: subprocess.Popen[str]) -> Ended:
    output, _ = process.communicate(timeout=100)
    return Ended(process.returncode, output)


MOMENTS = {  # what ends a program that has saved step 1 and begins step 2, and what is there afterwards
    "while writing": ({1}, -9),
    "before the manifest": ({1}, -9),
    "after the manifest": ({1}, -9),
    "while the older one goes": ({2}, -9),
    "end of the program": ({2}, 0),
    "full disk": ({1}, 0),
}


@pytest.fixture(scope="module")
def cut_short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Ended]]:
    """All moments at once: a directory each."""
    places = {moment: tmp_path_factory.mktemp("saves") for moment in MOMENTS}
    running = {moment: start("save", moment, place, JAX_NUM_CPU_DEVICES="1") for moment, place in places.items()}
    return {moment: (places[moment], ended(process)) for moment, process in running.items()}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_save_is_there_or_not(moment: str, cut_short: dict[str, tuple[Path, Ended]]) -> None:
    """Never half; the next save works and cleans up."""
    directory, process = cut_short[moment]
    left, code = MOMENTS[moment]
    assert process.code == code, process.output
    assert alpa.latest_step(directory) == max(left)
    like = {"w": jax.ShapeDtypeStruct((1 << 22,), np.float32), "step": 0}
    restored = alpa.restore_checkpoint(directory, like)
    assert restored["step"] == max(left)
    np.testing.assert_array_equal(restored["w"], np.arange(1 << 22, dtype=np.float32) + max(left))
    alpa.save_checkpoint(directory, 3, 3).wait()
    assert {p.name for p in directory.iterdir()} == {f"step_0000000{n}" for n in left | {3}}
    message = "step_00000002 failed: a file would be larger than is allowed"
    assert (message in process.output) == (moment == "full disk"), process.output
    assert "orbax" not in process.output


@dataclass(frozen=True)
class Handle:
    """An array that a group of processes holds."""

    shape: tuple[int, ...]
    dtype: str
    group: int
    what: str

    def is_deleted(self) -> bool:
        return False


def test_groups_of_processes_write_and_read(tmp_path: Path) -> None:
    """Two groups of two processes read what one process saved, each other rows, and write a part each at once.

    The manifest is made by a process that has none of the data.
    """
    rows, keys = np.arange(64.0, dtype=np.float32).reshape(8, 8), jax.random.split(jax.random.key(5), 4)
    before = alpa.save_checkpoint(tmp_path / "before", {"rows": rows, "keys": keys, "count": 3}, 1).wait()
    halves: list[Any] = [Handle((4, 8), "float32", group, "rows") for group in range(2)]
    draws, same = Handle((4,), "uint32", 0, "draws"), Handle((4,), "key<fry>", 1, "keys")
    state = {"rows": ChunkedArray(halves), "draws": draws, "keys": same}
    manifest, parts = plan_parts(state, 2, lambda handle: handle.group)
    folder = tmp_path / "after" / "step_00000002"
    folder.mkdir(parents=True)
    running: list[subprocess.Popen[str]] = []
    for part in parts:
        address = f"127.0.0.1:{free_port()}"
        arrays = json.dumps({name: handle.what for name, handle in part.arrays.items()})
        running += [start("group", address, n, part.holder, before, folder / part.name, arrays) for n in range(2)]
    for process in [ended(p) for p in running]:
        assert process.code == 0, process.output
    manifest.write(folder)
    wanted = sharded(rows + 1, "y", "x")
    like = {"rows": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=wanted.sharding), "draws": np.zeros(4, np.uint32)}
    restored = alpa.restore_checkpoint(tmp_path / "after", {**like, "keys": keys})
    assert_equal(restored, {"rows": wanted, "draws": np.asarray(jax.vmap(jax.random.bits)(keys)), "keys": keys})


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
