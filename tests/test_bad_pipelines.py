"""Every mistake with a pipeline is one sentence of the right class, when the step is planned and not later."""

import json
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import alpa_like as alpa
from alpa_like.models.resnet import ResNetConfig
from alpa_like.models.tasks import resnet_task

CHIP, WIRE = alpa.Device("chip", (("float32", 1e9),), 2**30, 1e9, 1.0), alpa.Link(1e9, 0.0)
ROWS, WIDTH = 16, 16

Args = dict[str, Any]
Step = Callable[[Any, Any], Any]


def cluster(hosts: int, devices: int, memory: int = 2**30) -> alpa.Cluster:
    return alpa.Cluster("chips", hosts, devices, replace(CHIP, memory_bytes=memory), WIRE, WIRE, ("made up",))


def array(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


STATE = [array(WIDTH, WIDTH)] * 4
BATCH = {"x": array(ROWS, WIDTH), "y": array(ROWS, WIDTH)}


@contextmanager
def refuses(error: type[Exception], *words: str) -> Generator[None]:
    """Expects `error` with a message of one line that has all `words`, from nobody else's code."""
    with pytest.raises(alpa.AlpaError) as info:
        yield
    message = str(info.value)
    assert type(info.value) is error, message
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
    assert 20 < len(message) < 600
    assert info.value.__cause__ is None
    assert info.value.__context__ is None or info.value.__suppress_context__
    assert str(info.traceback[-1].path).startswith(str(Path(alpa.__file__).parents[1]))


# ------------------------------------------------------------------------------------------------ steps


def training(loss: Callable[[Any, Any], Any]) -> Step:
    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        value, grads = jax.value_and_grad(loss)(state, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), value

    return step


def chain(params: Any, x: Any, mark: Sequence[int] = ()) -> Any:
    for number, kernel in enumerate(params):
        x = jnp.tanh(x @ kernel)
        x = alpa.mark_pipeline_boundary(x) if number in mark else x
    return x


def error(out: Any, batch: Any) -> Any:
    return jnp.mean((out - batch["y"]) ** 2)


chain_step = training(lambda params, batch: error(chain(params, batch["x"]), batch))
marked_step = training(lambda params, batch: error(chain(params, batch["x"], (1,)), batch))


def forward_step(state: Any, batch: Any) -> Any:
    return state, error(chain(state, batch["x"]), batch)


def marked_in_scan(params: Any, batch: Any) -> Any:
    def body(x: Any, kernel: Any) -> tuple[Any, None]:
        return alpa.mark_pipeline_boundary(jnp.tanh(x @ kernel)), None

    return error(lax.scan(body, batch["x"], jnp.stack(params))[0], batch)


def marked_in_cond(params: Any, batch: Any) -> Any:
    x = chain(params[:2], batch["x"])
    x = lax.cond(jnp.sum(params[3]) > 0, lambda x: alpa.mark_pipeline_boundary(jnp.tanh(x)), jnp.sin, x)
    return error(x @ params[2], batch)


def contrastive(params: Any, batch: Any) -> Any:
    left, right = (chain(params, batch[name]) for name in "xy")
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(left @ right.T)))


def normalized(params: Any, batch: Any) -> Any:
    x = chain(params, batch["x"])
    return error((x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5), batch)


def sorted_by_batch(params: Any, batch: Any) -> Any:
    return error(jnp.sort(chain(params, batch["x"]), 0), batch)


# ------------------------------------------------------------------------------------------------ options

INTERLEAVED = "interleaved-1f1b"
OPTIONS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "no micro-batches": (lambda: alpa.PipeshardParallel(num_micro_batches=0), ["num_micro_batches", "found 0"]),
    "negative": (lambda: alpa.PipeshardParallel(num_micro_batches=-4), ["num_micro_batches", "-4"]),
    "half": (lambda: alpa.PipeshardParallel(num_micro_batches=2.5), ["num_micro_batches", "2.5"]),  # type: ignore
    "a truth": (lambda: alpa.PipeshardParallel(num_micro_batches=True), ["num_micro_batches", "True"]),
    "text": (lambda: alpa.PipeshardParallel(num_micro_batches="4"), ["num_micro_batches", "'4'"]),  # type: ignore
    "unknown schedule": (lambda: alpa.PipeshardParallel(schedule="2f2b"), ["'2f2b'", "1f1b", "gpipe", "zb-h1"]),
    "no layers": (lambda: alpa.AutoLayerOption(0), ["layer_num", "found 0"]),
    "1.5 layers": (lambda: alpa.AutoLayerOption(1.5), ["layer_num", "1.5"]),  # type: ignore
    "negative layers": (lambda: alpa.AutoLayerOption(-1), ["layer_num", "-1"]),
    "remat": (lambda: alpa.AutoLayerOption(remat_mode="full"), ["remat_mode", "'full'", "'layer'"]),  # type: ignore
    "manual remat": (lambda: alpa.ManualLayerOption(True), ["remat_mode", "True"]),  # type: ignore
    "no stages": (lambda: alpa.UniformStageOption(0), ["num_stages", "found 0"]),
    "negative stages": (lambda: alpa.AutoStageOption(-2), ["num_stages", "-2"]),
    "stages as text": (lambda: alpa.AutoStageOption("four"), ["num_stages", "'four'"]),  # type: ignore
    "a layer twice": (lambda: alpa.ManualStageOption([[0, 1], [1, 2]], [(1, 1)] * 2), ["once", "[[0, 1], [1, 2]]"]),
    "a layer left out": (lambda: alpa.ManualStageOption([[0], [2]], [(1, 1)] * 2), ["every layer once", "[[0], [2]]"]),
    "out of order": (lambda: alpa.ManualStageOption([[1], [0]], [(1, 1)] * 2), ["in order", "[[1], [0]]"]),
    "an empty stage": (lambda: alpa.ManualStageOption([[0], []], [(1, 1)] * 2), ["none empty", "[[0], []]"]),
    "nothing": (lambda: alpa.ManualStageOption([], []), ["one submesh per stage", "0 stages"]),
    "too few submeshes": (lambda: alpa.ManualStageOption([[0], [1]], [(1, 8)]), ["2 stages", "1 physical"]),
    "too few meshes": (
        lambda: alpa.ManualStageOption([[0], [1]], [(1, 4)] * 2, [(4,)]),
        ["2 stages", "1 logical"],
    ),
    "submesh of text": (lambda: alpa.ManualStageOption([[0]], ["ab"]), ["submesh_physical_shapes"]),  # type: ignore
    "submesh of one": (lambda: alpa.ManualStageOption([[0]], [(8,)]), ["submesh_physical_shapes"]),  # type: ignore
    "a number of layers": (
        lambda: alpa.ManualStageOption([4], [(1, 8)]),  # type: ignore
        ["forward_stage_layer_ids"],
    ),
    "layer option": (lambda: alpa.PipeshardParallel(layer_option=4), ["layer_option", "4"]),  # type: ignore
    "a class": (
        lambda: alpa.PipeshardParallel(stage_option=alpa.AutoStageOption),  # type: ignore
        ["stage_option", "UniformStageOption"],
    ),
    "statistics": (lambda: alpa.PipeshardParallel(batch_statistics="whole"), ["batch_statistics"]),  # type: ignore
    "one mesh for all": (lambda: alpa.PipeshardParallel(mesh_shape=(2, 4)), ["mesh_shape=(2, 4)", "mesh per stage"]),
    "logical shape of text": (lambda: alpa.UniformStageOption(2, "4"), ["submesh_logical_shape"]),  # type: ignore
    "a mesh of four axes": (
        lambda: alpa.ManualStageOption([[0], [1]], [(1, 4)] * 2, [(4,), (1, 1, 2, 2)]),
        ["submesh_logical_shapes", "1 to 3", "(1, 1, 2, 2)"],
    ),
    "logical shape of zero": (lambda: alpa.UniformStageOption(2, (0, 4)), ["submesh_logical_shape", "(0, 4)"]),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_an_option_is_refused_where_it_is_given(kind: str) -> None:
    make, words = OPTIONS[kind]
    with refuses(alpa.MethodError, *words):
        make()


# ------------------------------------------------------------------------------------------------ plans


def uniform(stages: int, shape: tuple[int, ...] | None = None, **options: Any) -> alpa.PipeshardParallel:
    return pipeline(stage_option=alpa.UniformStageOption(stages, shape), **options)


def manual(ids: Sequence[Sequence[int]], submeshes: Any, meshes: Any = None, **options: Any) -> alpa.PipeshardParallel:
    return pipeline(stage_option=alpa.ManualStageOption(ids, submeshes, meshes), **options)


def pipeline(**options: Any) -> alpa.PipeshardParallel:
    layers = alpa.AutoLayerOption(4, "none")
    given: dict[str, Any] = {"num_micro_batches": 4, "layer_option": layers, **options}
    return alpa.PipeshardParallel(**given)


@dataclass(frozen=True)
class Bad:
    """What is planned; a chain of four layers on two hosts of four chips where nothing else is said."""

    error: type[Exception]
    words: list[str]
    method: alpa.PipeshardParallel = field(default_factory=partial(uniform, 4))
    step: Step = chain_step
    state: Any = field(default_factory=lambda: STATE)
    batch: Any = field(default_factory=lambda: BATCH)
    cluster: alpa.Cluster = field(default_factory=partial(cluster, 2, 4))


HALVES = [[0, 1], [2, 3]]
BAD: dict[str, Bad] = {
    "more stages than layers": Bad(alpa.MethodError, ["8 stages", "4 layers", "layer_num=8"], uniform(8)),
    "more stages, searched": Bad(
        alpa.MethodError, ["6 stages", "4 layers", "layer_num=6"], pipeline(stage_option=alpa.AutoStageOption(6))
    ),
    "more stages, interleaved": Bad(
        alpa.MethodError, ["8 stages", "4 layers", "layer_num=8"], uniform(8, schedule=INTERLEAVED)
    ),
    "more stages than devices": Bad(
        alpa.MethodError,
        ["num_stages=4", "2 devices"],
        pipeline(stage_option=alpa.AutoStageOption(4)),
        cluster=cluster(1, 2),
    ),
    "more stages than devices, equal": Bad(alpa.MethodError, ["4", "2 devices"], cluster=cluster(1, 2)),
    "more layers than matmuls": Bad(
        alpa.MethodError, ["9", "4"], alpa.PipeshardParallel(num_micro_batches=4, layer_option=alpa.AutoLayerOption(9))
    ),
    "unequal shares": Bad(alpa.MethodError, ["3 equal stages", "8 devices"], uniform(3)),
    "no whole hosts": Bad(alpa.MethodError, ["6 devices each", "whole hosts of 4"], uniform(2), cluster=cluster(3, 4)),
    "the batch does not divide": Bad(
        alpa.MethodError, ["num_micro_batches is 3", "16 examples", "1, 2, 4, 8, 16"], uniform(4, num_micro_batches=3)
    ),
    "more micro-batches than examples": Bad(
        alpa.MethodError, ["num_micro_batches is 32", "16 examples"], uniform(4, num_micro_batches=32)
    ),
    "an empty batch": Bad(alpa.MethodError, ["0 examples"], batch={k: array(0, WIDTH) for k in BATCH}),
    "stages leave layers out": Bad(
        alpa.MethodError, ["layers 0 to 2", "the model has 4"], manual([[0], [1, 2]], [(1, 4)] * 2)
    ),
    "stages name more layers": Bad(
        alpa.MethodError, ["layers 0 to 4", "the model has 4"], manual([[0, 1], [2, 3, 4]], [(1, 4)] * 2)
    ),
    "too few devices": Bad(alpa.MethodError, ["6 devices in all", "chips has 8"], manual(HALVES, [(1, 4), (1, 2)])),
    "too many devices": Bad(alpa.MethodError, ["stage 1", "3 hosts of 4", "2 of 4"], manual(HALVES, [(1, 4), (3, 4)])),
    "more devices in all": Bad(
        alpa.MethodError, ["12 devices in all", "chips has 8"], manual([[0], [1], [2, 3]], [(1, 4)] * 3)
    ),
    "a host has fewer": Bad(alpa.MethodError, ["stage 0", "1 hosts of 8", "2 of 4"], manual(HALVES, [(1, 8), (1, 4)])),
    "no device": Bad(alpa.MethodError, ["stage 0", "1 hosts of 0"], manual(HALVES, [(1, 0), (2, 4)])),
    "across two hosts": Bad(
        alpa.MethodError,
        ["stage 1", "from device 3", "whole hosts or inside one"],
        manual([[0], [1], [2, 3]], [(1, 3), (1, 2), (1, 3)]),
    ),
    "parts of two hosts": Bad(alpa.MethodError, ["stage 0", "2 × 2", "whole hosts"], manual(HALVES, [(2, 2), (2, 2)])),
    "hosts from the middle on": Bad(
        alpa.MethodError,
        ["stage 1", "1 × 4", "device 2", "whole hosts"],
        manual([[0], [1], [2, 3]], [(1, 2), (1, 4), (1, 2)]),
    ),
    "a mesh of other size": Bad(
        alpa.MethodError, ["stage 1", "(2, 4)", "4 devices"], manual(HALVES, [(1, 4)] * 2, [(4,), (2, 4)])
    ),
    "a mesh for other submeshes": Bad(alpa.MethodError, ["(2, 2)", "2 devices"], uniform(4, (2, 2))),
    "too many axis names": Bad(alpa.MethodError, ["axis_names", "'c'"], uniform(4, (2,), axis_names=("a", "b", "c"))),
    "no gradient": Bad(
        alpa.TraceError, ["'1f1b'", "no gradient", '"inference"'], uniform(4, schedule="1f1b"), forward_step
    ),
    "no gradient, searched": Bad(
        alpa.TraceError, ["'zb-h1'", "no gradient", '"inference"'], pipeline(schedule="zb-h1"), forward_step
    ),
    "a gradient at inference": Bad(
        alpa.TraceError, ['"inference"', "computes a gradient", '"1f1b"'], uniform(4, schedule="inference")
    ),
    "marks are missing": Bad(
        alpa.MethodError,
        ["mark_pipeline_boundary", "no such mark", "AutoLayerOption"],
        uniform(2, layer_option=alpa.ManualLayerOption()),
    ),
    "more stages than marks": Bad(
        alpa.MethodError, ["4 stages", "2 layers"], uniform(4, layer_option=alpa.ManualLayerOption()), marked_step
    ),
    "a mark in a scan": Bad(
        alpa.TraceError,
        ["mark_pipeline_boundary", "inside a scan", "unroll"],
        uniform(2, layer_option=alpa.ManualLayerOption()),
        training(marked_in_scan),
    ),
    "a mark in a cond": Bad(
        alpa.TraceError,
        ["mark_pipeline_boundary", "inside a cond"],
        uniform(2, layer_option=alpa.ManualLayerOption()),
        training(marked_in_cond),
    ),
    "batch statistics": Bad(alpa.TraceError, ["batch_statistics", "micro"], step=training(normalized)),
    "a contrastive loss": Bad(
        alpa.TraceError, ["4 micro-batches", "every example meets every other"], step=training(contrastive)
    ),
    "sorted along the batch": Bad(alpa.TraceError, ["sort", "along the batch"], step=training(sorted_by_batch)),
    "batch without a dim": Bad(
        alpa.MethodError,
        ["one common dim 0", "none", "batch_argnums"],
        step=training(lambda params, batch: jnp.mean(chain(params, jnp.ones((4, WIDTH)) * batch))),
        batch=array(),
    ),
    "two batch sizes": Bad(
        alpa.MethodError,
        ["one common dim 0", "batch['x'] (16, 16)", "batch['y'] (8, 16)"],
        step=training(lambda params, batch: jnp.mean(chain(params, batch["x"])) + jnp.mean(batch["y"])),
        batch={"x": array(16, WIDTH), "y": array(8, WIDTH)},
    ),
    "no batch": Bad(
        alpa.MethodError,
        ["one common dim 0", "none"],
        step=training(lambda params, batch: jnp.mean(chain(params, jnp.ones((4, WIDTH))))),
        batch=None,
    ),
}


def plan(bad: Bad) -> alpa.Plan:
    return alpa.parallelize(bad.step, method=bad.method).plan(bad.state, bad.batch, cluster=bad.cluster)


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_the_step_or_the_cluster_is_refused(kind: str) -> None:
    bad = BAD[kind]
    with refuses(bad.error, *bad.words):
        plan(bad)


def test_the_same_step_is_planned_where_nothing_is_wrong() -> None:
    """So that the table above fails for its own reasons."""
    found = plan(Bad(alpa.AlpaError, []))
    assert found.pipeline is not None
    assert len(found.pipeline.stages) == 4


def test_batch_norm_is_refused_unless_its_statistics_may_be_those_of_a_micro_batch() -> None:
    batched = resnet_task(ResNetConfig(widths=(8,), blocks=1, num_classes=8, image_size=8, norm="batch"), ROWS)
    args = jax.eval_shape(batched.init), batched.abstract_batch()
    method = alpa.PipeshardParallel(num_micro_batches=2, stage_option=alpa.UniformStageOption(2))
    step: Step = batched.step
    parallel = alpa.parallelize(step, method=method)
    with refuses(alpa.TraceError, "batch_statistics", "micro"):
        parallel.plan(*args, cluster=cluster(1, 2))
    allowed = alpa.parallelize(step, method=replace(method, batch_statistics="micro_batch"))
    found = allowed.plan(*args, cluster=cluster(1, 2))
    assert found.pipeline is not None
    assert found.pipeline.batch_statistics == "micro_batch"


# ------------------------------------------------------------------------------------------------ memory

MEMORY: dict[str, tuple[alpa.PipeshardParallel, list[str]]] = {
    "equal": (uniform(4), ["stage 0 (layers 0 to 0)", "2 devices", "2.9 KiB", "micro-batches in flight", "remat"]),
    "by hand": (
        manual(HALVES, [(1, 4)] * 2),
        ["stage 0 (layers 0 to 1)", "4 devices", "2.9 KiB", "memory_budget_bytes"],
    ),
    "with remat": (
        uniform(4, layer_option=alpa.AutoLayerOption(4, "layer")),
        ["stage 0", "2.9 KiB", "more micro-batches, more devices"],
    ),
    "searched": (pipeline(), ["2.9 KiB"]),
    "all automatic": (alpa.PipeshardParallel(), ["2.9 KiB"]),
}


@pytest.mark.parametrize("kind", MEMORY)
def test_where_nothing_fits_in_memory_the_message_says_what_is_missing(kind: str) -> None:
    """Four chips of 3000 bytes can't hold four kernels of 1 KiB each with their gradients."""
    method, words = MEMORY[kind]
    small = cluster(1, 2, 3000) if kind in ("searched", "all automatic") else cluster(2, 4, 3000)
    batch = {k: array(ROWS, WIDTH * 8) for k in BATCH}
    with refuses(alpa.InfeasibleError, *words):
        plan(Bad(alpa.InfeasibleError, [], method, state=[array(WIDTH * 8, WIDTH * 8)] * 4, batch=batch, cluster=small))


def test_the_bytes_that_are_needed_would_do() -> None:
    """The message's number as the budget gives a plan."""
    with pytest.raises(alpa.InfeasibleError) as info:
        plan(Bad(alpa.InfeasibleError, [], replace(uniform(4), memory_budget_bytes=1000)))
    match = re.search(r"at least ([\d.]+) (B|KiB|MiB) per device", str(info.value))
    assert match, str(info.value)
    needed = float(match[1]) * {"B": 1, "KiB": 2**10, "MiB": 2**20}[match[2]]
    assert needed > 1000
    found = plan(Bad(alpa.InfeasibleError, [], replace(uniform(4), memory_budget_bytes=needed * 1.5)))
    assert found.predicted.peak_memory_bytes <= needed * 1.5


# ------------------------------------------------------------------------------------------------ plan files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    alpa.init(num_devices=8)
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan(Bad(alpa.AlpaError, [], cluster=cluster(1, 8))).save(path)
    yield path
    alpa.shutdown()


OTHERS: dict[str, tuple[Step, Any, Any]] = {
    "step": (marked_step, STATE, BATCH),
    "batch": (chain_step, STATE, {k: array(8, WIDTH) for k in BATCH}),
    "state": (chain_step, STATE[:3], BATCH),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_plan_of_another_program(saved: Path, what: str) -> None:
    step, state, batch = OTHERS[what]
    with refuses(alpa.PlanError, "another program", "step"):
        alpa.parallelize(step).compile(state, batch, plan=alpa.Plan.load(saved))


def test_a_plan_for_other_devices(saved: Path) -> None:
    found = plan(Bad(alpa.AlpaError, [], cluster=cluster(4, 4)))
    with refuses(alpa.PlanError, "16 devices", "8"):
        alpa.parallelize(chain_step).compile(STATE, BATCH, plan=found)


def damaged(change: Callable[[Any], Any]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return edit


FILES: dict[str, tuple[Callable[[str], str], list[str]]] = {
    "cut short": (lambda text: text[: len(text) // 2], ["no complete plan file"]),
    "pipeline of text": (damaged(lambda d: d.update(pipeline="1f1b")), ["plan"]),
    "no stages": (damaged(lambda d: d["pipeline"].update(stages=[])), ["stage"]),
    "a key is missing": (damaged(lambda d: d["pipeline"].pop("schedule")), ["plan"]),
    "unknown schedule": (damaged(lambda d: d["pipeline"].update(schedule="2f2b")), ["2f2b"]),
    "no micro-batches": (damaged(lambda d: d["pipeline"].update(num_micro_batches=0)), ["micro"]),
    "a stage is missing": (damaged(lambda d: d["pipeline"]["stages"].pop()), ["stage"]),
    "layers overlap": (damaged(lambda d: d["pipeline"]["stages"][1].update(first=0)), ["layers"]),
    "layers of text": (damaged(lambda d: d["pipeline"].update(layer_ends="abc")), ["layers"]),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file(saved: Path, kind: str, tmp_path: Path) -> None:
    damage, words = FILES[kind]
    path = tmp_path / "plan.json"
    path.write_text(damage(saved.read_text()))
    with pytest.raises(alpa.PlanError) as info:
        alpa.Plan.load(path)
    message = str(info.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("ends", "words"), [((3, 5), "layers end at"), ((0, 1, 2, 30), "layer")], ids=["too early", "an empty layer"]
)
def test_layer_ends_of_another_program(saved: Path, ends: tuple[int, ...], words: str) -> None:
    loaded = alpa.Plan.load(saved)
    assert loaded.pipeline is not None
    wrong = replace(loaded, pipeline=replace(loaded.pipeline, layer_ends=ends))
    with pytest.raises(alpa.PlanError, match=words):
        alpa.parallelize(chain_step).compile(STATE, BATCH, plan=wrong)
