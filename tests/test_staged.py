"""Staged pieces: lowered without devices, they compile to the same programs wherever the devices are."""

import pickle
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import alpa_like as alpa
from alpa_like.errors import PlanError, ProgramError
from alpa_like.methods import Method
from alpa_like.passes.lower import lower, lower_single
from alpa_like.passes.lower_pipeline import lower_pipeline
from alpa_like.placement import AbstractDevices, LoweredPipeline, check_count, device_mesh
from alpa_like.reshard import Layout
from alpa_like.runtime.executable import Executable
from alpa_like.runtime.hlo import read_collectives, traffic_by_kind
from alpa_like.runtime.instructions import Free, Run
from alpa_like.runtime.interpreter import interpret
from alpa_like.runtime.pipeline import Cutting, PipelineExecutable
from alpa_like.runtime.staged import Staged, stage_function
from alpa_like.runtime.transport import sharding_of
from alpa_like.tracer import Trace, trace

ELSEWHERE = AbstractDevices(8, "cpu")


def layout(mesh: tuple[int, ...], first: int, *dims: str) -> Layout:
    """`layout((2, 2), 4, "x", "")`: rows split over the first axis of a mesh of devices 4 to 7."""
    names = "xyz"[: len(mesh)]
    spec = tuple(tuple(names.index(a) for a in dim) for dim in dims)
    return Layout(mesh, tuple(names), (first, int(np.prod(mesh))), spec)


def struct(value: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype, weak_type=getattr(value, "weak_type", False))


def travelled(staged: Staged) -> Staged:
    again = pickle.loads(pickle.dumps(staged))
    assert again == staged
    return again


def bits(value: Any) -> bytes:
    plain = jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value
    return np.asarray(plain).tobytes()


# ------------------------------------------------------------------------------------------------ one piece


def weak_results(x: Any) -> Any:
    return x * 2, lax.full((3,), 1.5), lax.full((2, 2), 7), jnp.sum(x)


def rbg() -> Any:
    return jax.random.split(jax.random.key(5, impl="rbg"), 4)


ROWS, COLUMNS, WHOLE = layout((2, 2), 4, "x", ""), layout((2, 2), 4, "", "y"), layout((2, 2), 4, "", "")
ONE, NOTHING = layout((2, 2), 4, "xy"), layout((2, 2), 4)
CASES: dict[str, tuple[Callable[..., Any], list[Any], list[Layout], list[Layout]]] = {
    "matmul": (lambda a, b: [a @ b], [np.ones((6, 10), np.float32), np.ones((10, 14), np.float32)], [ROWS, COLUMNS],
               [layout((2, 2), 4, "x", "y")]),
    "keys": (lambda key: (jax.random.normal(key, (8, 3)), jax.random.fold_in(key, 1)), [jax.random.key(3)], [NOTHING],
             [layout((2, 2), 4, "x", ""), NOTHING]),
    "rbg keys": (lambda keys: (keys[::-1], jax.vmap(jax.random.bits)(keys)), [rbg()], [ONE], [ONE, ONE]),
    "weak types": (weak_results, [jnp.asarray(2.5)], [NOTHING], [NOTHING, layout((2, 2), 4, ""), WHOLE, NOTHING]),
    "bfloat16": (lambda x: [x + 1], [jnp.arange(12, dtype=jnp.bfloat16)], [ONE], [ONE]),
    # JAX runs no compiled program, staged or not, on 4-bit arguments: it takes their layout for another one.
    "int4": (lambda x: [x.astype(jnp.int4) + 1], [np.arange(4, dtype=np.int8)], [ONE], [ONE]),
    "bool": (lambda x: [~x], [np.array([True, False] * 4)], [ONE], [layout((2, 2), 4, "y")]),
    "empty": (lambda x: [x * 2, x.sum(0)], [np.zeros((0, 3), np.float32)], [WHOLE], [WHOLE, layout((2, 2), 4, "")]),
    "no inputs": (lambda: [jnp.arange(8.0), jax.random.key(1)], [], [], [ONE, NOTHING]),
    "nothing at all": (tuple, [], [], []),
    "no outputs": (lambda _: [], [np.float32(1)], [NOTHING], []),
    "unused, constant, as it is": (lambda a, b: [b, np.arange(3)], [np.float32(1), np.int32(2)], [NOTHING, NOTHING],
                                   [NOTHING, layout((2, 2), 4, "")]),
    "one device": (lambda x: [jnp.sort(x)], [np.int32([3, 1, 2])], [layout((1,), 7, "")], [layout((1,), 7, "x")]),
    "two meshes of the same devices": (lambda x: [x + 1], [np.ones((8, 4), np.float32)], [layout((2, 2), 4, "y", "x")],
                                       [layout((4,), 4, "", "x")]),
    "a loop": (lambda x: [lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ y), x)], [np.eye(4, dtype=np.float32)], [ROWS],
               [COLUMNS]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_piece_gives_what_jit_gives_where_its_layouts_say(case: str) -> None:
    fun, values, inputs, outputs = CASES[case]
    staged = travelled(stage_function(case, fun, [struct(v) for v in values], inputs, outputs, ELSEWHERE))
    piece = staged.compile(jax.devices())
    placed = [jax.device_put(v, sharding_of(p, jax.devices())) for v, p in zip(values, inputs, strict=True)]
    for made, wanted, place in zip(piece(*placed), jax.jit(fun)(*values), outputs, strict=True):
        assert struct(made) == struct(wanted)
        assert bits(made) == bits(wanted)
        assert made.sharding == sharding_of(place, jax.devices())
    assert [(b.shape, b.dtype) for b in staged.inputs] == [(v.shape, str(v.dtype)) for v in values]
    assert [b.layout for b in staged.outputs] == outputs
    assert [b.struct for b in staged.inputs] == [struct(v) for v in values]


def test_donated_buffers_are_taken() -> None:
    def add(a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
        return a + b, b * 2

    type_ = jax.ShapeDtypeStruct((8, 2), np.float32)
    piece = travelled(stage_function("add", add, (type_, type_), (ROWS, ROWS), (ROWS, WHOLE), ELSEWHERE, (0,)))
    assert piece.donated == (0,)
    a, b = (jax.device_put(np.full((8, 2), n, np.float32), sharding_of(ROWS, jax.devices())) for n in (1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result, _ = piece.compile(jax.devices())(a, b)
    assert (a.is_deleted(), b.is_deleted()) == (True, False)
    assert np.asarray(result).tolist() == [[3.0, 3.0]] * 8


def test_only_the_devices_of_the_piece_are_looked_up() -> None:
    """A worker has its own devices only, under their global numbers; their order is that of the layouts' meshes."""
    one = layout((2, 2), 20, "yx")
    staged = stage_function("number", lambda x: [x * 2], [jax.ShapeDtypeStruct((4,), np.int32)], [one], [one],
                            AbstractDevices(24, "cpu"))  # fmt: skip
    chosen = {20: 6, 21: 1, 22: 7, 23: 0}
    piece = staged.compile({n: jax.devices()[i] for n, i in chosen.items()})  # pyright: ignore[reportArgumentType]
    (sharding,) = piece.input_shardings[0]
    result = piece(jax.device_put(np.arange(4), sharding))[0]
    assert {s.device.id: int(s.data[0]) for s in result.addressable_shards} == {6: 0, 7: 2, 1: 4, 0: 6}


SUBPROCESS = """
    import pickle, sys
    import jax, numpy as np
    jax.config.update("jax_num_cpu_devices", 4)
    staged = pickle.load(sys.stdin.buffer)
    piece = staged.compile(dict(zip(staged.ids, jax.devices())))
    (x, key), _ = piece.input_shardings
    made, key = piece(jax.device_put(np.arange(12.0, dtype=np.float32), x), jax.device_put(jax.random.key(7), key))
    print(np.asarray(made).tobytes().hex(), made.sharding.spec, jax.random.key_data(key).tolist())
"""


def test_a_piece_runs_in_another_process() -> None:
    def fun(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.cumsum(x) + jax.random.normal(key, (12,)), jax.random.fold_in(key, 1)

    x, key = np.arange(12.0, dtype=np.float32), jax.random.key(7)
    staged = stage_function("sum", fun, [struct(x), struct(key)], [ONE, NOTHING], [ONE, NOTHING], ELSEWHERE)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", textwrap.dedent(SUBPROCESS)]
    done = subprocess.run(command, input=pickle.dumps(staged), capture_output=True, cwd=root, check=False, timeout=120)
    wanted, other = jax.jit(fun)(x, key)
    shown = f"{np.asarray(wanted).tobytes().hex()} {sharding_of(ONE, jax.devices()).spec} "
    assert done.stdout.decode().strip() == shown + str(jax.random.key_data(other).tolist()), done.stderr.decode()


def test_lowering_is_for_the_platform_of_the_devices() -> None:
    one = layout((8,), 0, "x")
    gpus, type_ = AbstractDevices(8, "gpu"), jax.ShapeDtypeStruct((8,), np.float32)
    staged = stage_function("add", lambda x: [x + 1], [type_], [one], [one], gpus)
    assert (staged.platform, len(gpus), gpus[3]) == ("cuda", 8, 3)
    assert isinstance(device_mesh((8,), ("x",), (0, 8), gpus), jax.sharding.AbstractMesh)
    with pytest.raises(ProgramError, match="add was staged for platform cuda, but found cpu"):
        staged.compile(jax.devices())
    with pytest.raises(PlanError, match=r"expected a platform of cpu, gpu, .* found 'abacus'"):
        AbstractDevices(8, "abacus")
    with pytest.raises(PlanError, match="1 or more devices, found 0"):
        AbstractDevices(0, "cpu")
    with pytest.raises(PlanError, match="the plan is for 4 devices, but 8"):
        check_count(4, gpus)


def test_pieces_for_other_surroundings_are_refused() -> None:
    type_ = jax.ShapeDtypeStruct((8,), np.float32)
    staged = stage_function("add", lambda x: [x + 1], [type_], [ONE], [ONE], ELSEWHERE)
    with pytest.raises(ProgramError, match="add was staged for devices 4 to 7, but 6 are here"):
        staged.compile(jax.devices()[:6])
    with pytest.raises(ProgramError, match=r"staged for JAX 0\.1, but JAX .* is here; use the same everywhere"):
        replace(staged, made_with="JAX 0.1").compile(jax.devices())
    with jax.enable_x64(True):
        wide = stage_function("wide", lambda x: [x], [jax.ShapeDtypeStruct((8,), float)], [ONE], [ONE], ELSEWHERE)
        assert wide.inputs[0].dtype == "float64"
    with pytest.raises(ProgramError, match=r"wide was staged for JAX [\d.]*, 64 bits, but JAX [\d.]*, 32 bits is here"):
        wide.compile(jax.devices())
    with pytest.raises(ProgramError, match="on the same devices, found devices 0 to 7 and 4 to 7"):
        stage_function("both", lambda x: [x], [type_], [ONE], [layout((8,), 0, "x")], ELSEWHERE)


def printed(x: jax.Array) -> list[jax.Array]:
    jax.debug.print("{x}", x=x)
    return [x]


def called(x: jax.Array) -> list[jax.Array]:
    return [lax.fori_loop(0, 2, lambda _, y: jax.pure_callback(np.sin, y, y), x)]


def told(x: jax.Array) -> list[jax.Array]:
    return [jax.experimental.io_callback(np.sin, x, x)]  # pyright: ignore


def branched(x: jax.Array) -> list[jax.Array]:
    return [lax.cond(x[0] > 0, lambda y: jax.jit(lambda z: called(z)[0])(y), lambda y: y, x)]


@pytest.mark.parametrize("fun", [printed, called, told, branched])
def test_callbacks_stay_at_home(fun: Callable[..., Any]) -> None:
    type_ = jax.ShapeDtypeStruct((8,), np.float32)
    with pytest.raises(ProgramError, match=r"piece back calls back into Python .* can't; take jax.debug.print, .* out"):
        stage_function("back", fun, [type_], [ONE], [ONE], ELSEWHERE)


# ------------------------------------------------------------------------------------------------ steps


def step(state: Any, batch: Any) -> tuple[Any, Any]:
    """Two layers and momentum; a constant, a value as it is, and numbers of the state come back too."""

    def loss(params: Any) -> Any:
        x = jnp.tanh(batch["x"] @ params["up"]) @ params["down"]
        return jnp.mean((jnp.tanh(x) - batch["y"]) ** 2)

    value, grads = jax.value_and_grad(loss)(state["params"])
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, state["velocity"], grads)
    params = jax.tree.map(lambda p, v: p - 0.1 * v, state["params"], velocity)
    key = jax.random.fold_in(state["key"], 1)
    return {"params": params, "velocity": velocity, "key": key}, {"loss": value, "y": batch["y"], "two": np.float32(2)}


def arguments(rows: int = 16) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    params = {"up": rng.standard_normal((8, 32)), "down": rng.standard_normal((32, 8))}
    params = jax.tree.map(lambda x: (x / 4).astype(np.float32), params)
    x, y = rng.standard_normal((2, rows, 8)).astype(np.float32)
    state = {"params": params, "velocity": jax.tree.map(np.zeros_like, params), "key": jax.random.key(0)}
    return state, {"x": x, "y": y}


def slow(devices: int) -> alpa.Cluster:
    """Slow chips on fast wires: whatever can be split is worth splitting."""
    chip, wire = alpa.Device("chip", (("float32", 1e9),), 2**30, 1e9, 1.0), alpa.Link(1e9, 0.0)
    return alpa.Cluster("slow chips", 1, devices, chip, wire, wire, ("made up",))


@pytest.fixture(autouse=True, scope="module")
def eight_devices() -> Iterator[None]:
    alpa.init(slow(8))
    yield
    alpa.shutdown()


def traced(method: Method, donate: Any = "auto") -> tuple[Trace, alpa.Plan]:
    args = arguments()
    return trace(step, args, donate_argnums=donate), alpa.parallelize(step, method=method, donate_argnums=donate).plan(
        *args
    )


def travelled_pieces(lowered: LoweredPipeline) -> LoweredPipeline:
    """As if every piece had been sent to where its devices are."""
    return replace(lowered, pieces={n: travelled(p).compile(jax.devices()) for n, p in lowered.pieces.items()})


def instructions(text: str) -> list[str]:
    """What a program does, without the lines of source that it came from."""
    return [re.sub(r", metadata=\{[^}]*\}", "", line) for line in text.splitlines() if " = " in line]


def assert_equal(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (struct(a), bits(a)) == (struct(b), bits(b))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_pipeline_of_staged_pieces_is_the_pipeline(schedule: Any) -> None:
    method = alpa.PipeshardParallel(
        schedule=schedule, num_micro_batches=2, layer_option=alpa.AutoLayerOption(2),
        stage_option=alpa.ManualStageOption([range(0, 1), range(1, 2)], [(1, 2)] * 2, [(2,), (2,)]),
    )  # fmt: skip
    args = arguments()
    one = trace(step, args)
    plan = alpa.parallelize(step, method=method).plan(*args, cluster=slow(4))
    assert plan.pipeline is not None
    assert plan.pipeline.num_meshes == 2
    devices = jax.devices()[:4]
    direct = lower_pipeline(one, plan, devices)
    staged = lower_pipeline(one, plan, AbstractDevices(4, "cpu"))
    assert all(isinstance(piece, Staged) for piece in staged.pieces.values())
    assert replace(direct, pieces={}) == replace(staged, pieces={})
    cuts = Cutting((None,) * len(one.arguments), (None,) * len(one.results))
    here, there = (PipelineExecutable(one, plan, p, devices, cuts) for p in (direct, travelled_pieces(staged)))
    assert instructions(there.hlo_text()) == instructions(here.hlo_text())
    assert there.memory_bytes() == here.memory_bytes()
    assert_equal(there(*arguments()), here(*arguments()))


METHODS = {
    "data": alpa.DataParallel(),
    "mesh": alpa.ShardParallel(mesh_shape=(2, 4)),
    "zero": alpa.Zero3Parallel(),
}


@pytest.mark.parametrize("donate", ["auto", ()])
@pytest.mark.parametrize("method", METHODS)
def test_one_mesh_is_a_pipeline_of_one_run(method: str, donate: Any) -> None:
    one, plan = traced(METHODS[method], donate)
    devices = jax.devices()[: plan.stages[0].devices[1]]
    lowered = lower_single(one, plan, AbstractDevices(len(devices), "cpu"))
    (program,) = lowered.programs
    here = Executable(one, plan, lower(one, plan, devices))
    staged = travelled_pieces(lowered)
    assert traffic_by_kind(read_collectives(staged.pieces["step"].as_text())) == here.traffic()
    given = place_all(lowered, jax.tree.leaves(arguments()), devices)
    found = interpret(
        lowered.programs, staged.pieces, {}, {(0, ref): v for ref, v in zip(program.given, given, strict=True)}
    )
    placed = here.place(*arguments())
    wanted = here.run(*placed)
    flat = [found[r.buffers[0]] for r in lowered.returned]
    assert_equal(jax.tree.unflatten(one.out_tree, flat), wanted)
    assert [x.sharding for x in flat] == [sharding_of(p, devices) for p in lowered.results if p]
    assert [x.is_deleted() for x in given] == [x.is_deleted() for x in jax.tree.leaves(placed)]
    run, *rest = program.instructions
    assert isinstance(run, Run)
    assert len(run.donated) == (5 if donate == "auto" else 0)
    assert rest == [Free(tuple(ref for ref in program.given if ref.value not in run.donated))]
    assert {g.micro_batch for g in lowered.given.values()} == {-1}
    assert lowered.names[0] == one.arguments[0].path


def place_all(lowered: LoweredPipeline, leaves: Sequence[Any], devices: Sequence[Any]) -> list[jax.Array]:
    """The flat arguments where the program wants them."""
    return [jax.device_put(x, sharding_of(p, devices)) for x, p in zip(leaves, lowered.arguments, strict=True) if p]


def test_plans_of_other_programs_are_not_staged() -> None:
    one, plan = traced(alpa.DataParallel())
    with pytest.raises(PlanError, match="the plan is for 8 devices, but 4 are here"):
        lower_single(one, plan, AbstractDevices(4, "cpu"))
    other = trace(lambda state, batch: (state, batch["x"] * 2), arguments())
    with pytest.raises(PlanError, match="the plan is of another program"):
        lower_single(other, plan, ELSEWHERE)


SPLIT, OTHER, ALL = ((0,), ()), ((), (0,)), ((), ())


@pytest.mark.parametrize(
    ("specs", "donated"),  # of two arguments and of the results that take their place
    [
        ((SPLIT, SPLIT, SPLIT, ALL), (0,)),
        ((SPLIT, ALL, ALL, SPLIT), (0, 1)),
        ((SPLIT, SPLIT, OTHER, ALL), (0,)),
        ((SPLIT, ALL, OTHER, OTHER), (0,)),
    ],
)
def test_donated_is_what_results_have_room_for(specs: Any, donated: tuple[int, ...]) -> None:
    def double(state: Any, x: Any) -> tuple[Any, Any]:
        return [state[0] + x.sum(), state[1] * 2], x.sum()

    args = [np.ones((8, 8), np.float32)] * 2, np.ones(8, np.float32)
    one = trace(double, args)
    plan = alpa.parallelize(double, method=alpa.DataParallel()).plan(*args)
    stage = plan.stages[0]
    before, after = (tuple(replace(p, spec=s) for p, s in zip(*pair, strict=False)) for pair in (
        (stage.inputs, specs[:2]), (stage.outputs, specs[2:])
    ))  # fmt: skip
    stage = replace(stage, inputs=(*before, stage.inputs[2]), outputs=(*after, stage.outputs[2]), pins=())
    run = lower_single(one, replace(plan, stages=(stage,)), ELSEWHERE).programs[0].instructions[0]
    assert isinstance(run, Run)
    assert run.donated == donated
    with warnings.catch_warnings(action="ignore"):  # JAX warns where it can't donate, which a staged piece doesn't try
        here = Executable(one, plan, lower(one, replace(plan, stages=(stage,)), jax.devices()))
    placed = here.place(*args)
    here.run(*placed)
    assert tuple(i for i, x in enumerate(jax.tree.leaves(placed)) if x.is_deleted()) == donated
