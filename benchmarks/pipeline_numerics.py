"""Does a pipelined step return the numbers of `jax.jit`? Models, stages, schedules, micro-batches, rematerialization.

    python -m benchmarks.pipeline_numerics                              # 92 cases
    python -m benchmarks.pipeline_numerics --quick                      # the first 12 of them
    python -m benchmarks.pipeline_numerics --case gpt,1+1+2+4,zb-h2,5,layer,slow
    python -m benchmarks.pipeline_numerics --part 1/4                   # every fourth case

Each two choices that go together meet in at least one case (pairwise covering): a model, its stages, a schedule, a
number of micro-batches, rematerialization by layer or none, and a cluster to plan for. Stages are written as the
devices of each: `4` is four equal stages, `1+1+2+4` four unequal ones, `2x2+1x4` two with meshes (2, 2) and (1, 4).
Models have 8 layers for 8 stages, else 4; batches have 16 rows, or 15 for 3 and 5 micro-batches. Clusters: on `slow`
chips whatever can be split is worth splitting; on an `a100` such small models are mostly kept whole.

The reference is `jax.jit` of the same step on one device, fed with the same batches, for three steps. Errors are
relative to the largest element of a leaf; the largest over steps and leaves is shown, for what the step returns
besides the state (loss, logits, metrics) and for the last state.

1. SGD with momentum, also with gradient clipping by global norm: bound 1e-5 for both.
2. Adam, with clipping: it turns a gradient that is 0 but for rounding into a step of the size of the learning rate. So
   the error of the state is the root mean square of the difference of the parameters in learning rates: bound 0.05.
3. bfloat16 compute: rounding is 2^-8 an operation. Bounds: 2^-8 for the loss, and for the state 2 times what
   one-device bfloat16 differs from one-device float32.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import alpa_like as alpa
from alpa_like.models import (
    BertConfig,
    GPTConfig,
    MLPConfig,
    MoEConfig,
    ResNetConfig,
    Task,
    bert_task,
    cross_entropy,
    gpt_task,
    mlp_task,
    moe_task,
    resnet_task,
)
from benchmarks.common import parser

STEPS, DEVICES, QUICK = 3, 8, 12
BOUND, ADAM_RATE, ADAM_BOUND = 1e-5, 1e-3, 0.05
BF16_BOUND, BF16_FACTOR = 2.0**-8, 2.0
FAILURES = (alpa.AlpaError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a case may raise without ending the others; a bug raises anything."""

CHIP = alpa.Device("chip", (("float32", 1e9),), 2**30, 1e9, 1.0)
WIRE = alpa.Link(1e9, 0.0)
CLUSTERS = {
    "slow": alpa.Cluster("slow chips", 1, DEVICES, CHIP, WIRE, WIRE, ("made up",)),
    "a100": alpa.Cluster.dgx_a100(),
}
STAGES: tuple[str, ...] = ("2", "4", "8", "1+1+2+4", "2+4+1+1", "2x2+1x4", "3+4+1")
TRAINING: tuple[str, ...] = ("gpipe", "1f1b", "eager-1f1b", "interleaved-1f1b", "zb-h1", "zb-h2")
MICRO_BATCHES: tuple[int, ...] = (1, 2, 3, 4, 5, 8, 16)

Run = tuple[list[Any], Any]
"""What every step returned besides the state, and the last state, all on the host."""


@dataclass(frozen=True, slots=True)
class Case:
    """One step under one pipeline."""

    model: str
    stages: str
    schedule: str
    micro_batches: int
    remat: Literal["none", "layer"]
    cluster: str

    @property
    def layers(self) -> int:
        return 8 if self.stages == "8" else 4

    @property
    def batch_size(self) -> int:
        return 15 if self.micro_batches in (3, 5) else 16

    def __str__(self) -> str:
        return f"{self.model},{self.stages},{self.schedule},{self.micro_batches},{self.remat},{self.cluster}"


@dataclass(frozen=True, slots=True)
class Model:
    """`make(layers, batch_size)` is the task, `judge` says how its numbers are compared."""

    make: Callable[[int, int], Task]
    judge: Literal["sgd", "adam", "bfloat16"] = "sgd"
    trains: bool = True


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors of outputs and state and their bounds; `note` says why where there are none."""

    output: float = np.nan
    state: float = np.nan
    bounds: tuple[float, float] = (0.0, 0.0)
    note: str = ""

    @property
    def good(self) -> bool:
        return self.output <= self.bounds[0] and self.state <= self.bounds[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row per case and a summary; exit with 1 where a bound is broken."""
    cases = _options(arguments)
    alpa.init(num_devices=DEVICES)
    start, found, references = time.perf_counter(), dict[Case, Errors](), References()
    print(_row(HEADS), _row(tuple("-" * len(head) for head in HEADS)), sep="\n")
    for case in cases:
        began = time.perf_counter()
        found[case] = errors = _judged(case, references)
        cells = (f"{errors.output:.1e}", f"{errors.state:.1e}", f"{time.perf_counter() - began:.0f}")
        verdict = "" if errors.good else f"  FAILED {errors.note[:100]}"
        print(f"{_row((*str(case).split(','), *cells))}{verdict}", flush=True)
    bad = {case: errors for case, errors in found.items() if not errors.good}
    for case, errors in bad.items():
        print(f"\nFAILED {case}: {errors.note or errors}")
    print(f"\n{_summary(found, len(bad))}, {time.perf_counter() - start:.0f} s")
    raise SystemExit(1 if bad else 0)


HEADS = ("model     ", "stages ", "schedule        ", " M", "remat", "clus", "outputs", "  state", "  s")


def _row(cells: Sequence[str]) -> str:
    pairs = enumerate(zip(cells, HEADS, strict=True))
    return "  ".join(c.rjust(len(h)) if i in (3, 6, 7, 8) else c.ljust(len(h)) for i, (c, h) in pairs).rstrip()


def _summary(found: Mapping[Case, Errors], bad: int) -> str:
    exact = [e for c, e in found.items() if MODELS[c.model].judge == "sgd" and not e.note]
    worst = [max((getattr(e, what) for e in exact), default=0.0) for what in ("output", "state")]
    text = f"{len(found) - bad} of {len(found)} cases within the bounds; largest errors of float32 with SGD: outputs "
    return f"{text}{worst[0]:.1e}, state {worst[1]:.1e}"


# ------------------------------------------------------------------------------------------------ the models


def _sizes(layers: int) -> dict[str, Any]:
    return dict(vocab_size=64, seq_len=16, d_model=32, num_heads=4, num_layers=layers)


def _sgd() -> optax.GradientTransformation:
    return optax.sgd(0.1, momentum=0.9)


def _clipped(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Gradients are clipped to a norm that they exceed in every step."""
    return optax.chain(optax.clip_by_global_norm(0.5), optimizer)


def _gpt(layers: int, batch: int, **options: Any) -> Task:
    return gpt_task(GPTConfig(**_sizes(layers), **options), batch, _sgd())


def _gpt_with(optimizer: optax.GradientTransformation) -> Callable[[int, int], Task]:
    return lambda layers, batch: gpt_task(GPTConfig(**_sizes(layers)), batch, optimizer)


def _bert(layers: int, batch: int) -> Task:
    return bert_task(BertConfig(**_sizes(layers)), batch, _sgd())


def _moe(layers: int, batch: int) -> Task:
    return moe_task(MoEConfig(**_sizes(layers), num_experts=4, capacity_factor=2.0), batch, _sgd())


def _mlp(layers: int, batch: int) -> Task:
    return mlp_task(MLPConfig((32, *(48,) * (layers - 1), 8)), batch, _sgd())


def _conv(layers: int, batch: int) -> Task:
    config = ResNetConfig(widths=(8, 16), blocks=layers // 4, num_classes=8, image_size=8, norm="layer")
    return resnet_task(config, batch, _sgd())


def _loss(state: Any, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    logits = state.apply_fn({"params": params}, batch["tokens"])
    return cross_entropy(logits, batch["targets"]), logits


def _gpt_outputs(layers: int, batch: int) -> Task:
    """Returns logits per example, a mean, a count, a maximum and the norm of the gradient besides the loss."""
    task = _gpt(layers, batch, tied=True)

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        (loss, logits), grads = jax.value_and_grad(lambda p: _loss(state, p, batch), has_aux=True)(state.params)
        right = jnp.argmax(logits, -1) == batch["targets"]
        metrics = {"loss": loss, "accuracy": jnp.mean(right), "right": jnp.sum(right), "highest": jnp.max(logits)}
        metrics |= {"norm": optax.tree.norm(grads), "logits": logits[:, -1], "per_example": jnp.mean(right, 1)}
        return state.apply_gradients(grads=grads), metrics

    return Task("gpt_outputs", task.init, step, task.batch, task.abstract_batch)  # pyright: ignore[reportArgumentType]


def _gpt_forward(layers: int, batch: int) -> Task:
    """A step without gradient: the state comes back as it was."""
    task = _gpt(layers, batch)

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        return state, _loss(state, state.params, batch)

    return Task("gpt_forward", task.init, step, task.batch, task.abstract_batch)  # pyright: ignore[reportArgumentType]


MODELS: dict[str, Model] = {
    "mlp": Model(_mlp),
    "gpt": Model(_gpt),
    "gpt_tied": Model(lambda layers, batch: _gpt(layers, batch, tied=True)),
    "gpt_scan": Model(lambda layers, batch: _gpt(layers, batch, scan_layers=True)),
    "gpt_remat": Model(lambda layers, batch: _gpt(layers, batch, remat=True)),
    "gpt_outputs": Model(_gpt_outputs),
    "gpt_clip": Model(_gpt_with(_clipped(_sgd()))),
    "gpt_adam": Model(_gpt_with(_clipped(optax.adam(ADAM_RATE))), "adam"),
    "gpt_bf16": Model(lambda layers, batch: _gpt(layers, batch, dtype=jnp.bfloat16), "bfloat16"),
    "gpt_forward": Model(_gpt_forward, trains=False),
    "bert": Model(_bert),
    "moe": Model(_moe),
    "conv": Model(_conv),
}


# ------------------------------------------------------------------------------------------------ the cases


def _possible() -> Iterator[Case]:
    """Every case that makes sense."""
    remats: tuple[Literal["none", "layer"], ...] = ("none", "layer")
    for model, stages, micro_batches, remat, cluster in itertools.product(
        MODELS, STAGES, MICRO_BATCHES, remats, CLUSTERS
    ):
        trains = MODELS[model].trains
        for schedule in TRAINING if trains else ("inference",):
            several = schedule == "interleaved-1f1b"
            if (several and not stages.isdigit()) or (remat == "layer" and not trains):
                continue
            yield Case(model, stages, schedule, micro_batches, remat, cluster)


def _refused(case: Case) -> bool:
    """Two stages can't be interleaved: each of two meshes or more has several."""
    return case.schedule == "interleaved-1f1b" and case.stages == "2"


def covering(cases: Sequence[Case]) -> list[Case]:
    """Cases in which each two choices of any of `cases` meet, by greed: next is what adds most pairs."""
    order = random.Random(0).sample(cases, len(cases))  # so that ties are not all decided for the first choices
    pairs = [_pairs(case) for case in order]
    missing, chosen = set[object]().union(*pairs), list[Case]()
    promises = [(-len(p), i) for i, p in enumerate(pairs)]
    heapq.heapify(promises)
    while missing:
        promised, i = heapq.heappop(promises)
        if (gain := len(pairs[i] & missing)) < -promised:
            heapq.heappush(promises, (-gain, i))
            continue
        chosen.append(order[i])
        missing -= pairs[i]
    return chosen


def _pairs(case: Case) -> set[object]:
    values = [(name, getattr(case, name)) for name in case.__slots__]
    return set(itertools.combinations(values, 2))


# ------------------------------------------------------------------------------------------------ running


@dataclass(frozen=True, slots=True)
class References:
    """What `jax.jit` returns, and the tasks: each is made once, as two of a kind have states of different treedefs."""

    known: dict[tuple[str, int, int], Run] = field(default_factory=dict[tuple[str, int, int], Run])
    tasks: dict[tuple[str, int, int], Task] = field(default_factory=dict[tuple[str, int, int], Task])

    def task(self, model: str, layers: int, batch_size: int) -> Task:
        key = model, layers, batch_size
        if key not in self.tasks:
            self.tasks[key] = MODELS[model].make(layers, batch_size)
        return self.tasks[key]

    def of(self, model: str, layers: int, batch_size: int) -> Run:
        key = model, layers, batch_size
        if key not in self.known:
            task = self.task(*key)
            self.known[key] = _steps(jax.jit(task.step), task)
            jax.clear_caches()
        return self.known[key]

    def rounding(self, layers: int, batch_size: int) -> float:
        """What bfloat16 itself does to the state."""
        exact, rounded = (self.of(name, layers, batch_size)[1] for name in ("gpt", "gpt_bf16"))
        return max(map(_leaf_error, jax.tree.leaves(exact), jax.tree.leaves(rounded)))


def _judged(case: Case, references: References) -> Errors:
    expected = references.of(case.model, case.layers, case.batch_size)
    try:
        found = _pipelined(case, references.task(case.model, case.layers, case.batch_size))
    except FAILURES as error:
        return Errors(note=f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}")
    finally:
        jax.clear_caches()
    output = max(_largest(a, b) for a, b in zip(expected[0], found[0], strict=True))
    match MODELS[case.model].judge:
        case "sgd":
            return Errors(output, _largest(expected[1], found[1]), (BOUND, BOUND))
        case "adam":
            return Errors(output, _in_rates(expected[1].params, found[1].params), (BOUND, ADAM_BOUND))
        case "bfloat16":
            bound = BF16_FACTOR * references.rounding(case.layers, case.batch_size)
            return Errors(output, _largest(expected[1], found[1]), (BF16_BOUND, bound))


def _pipelined(case: Case, task: Task) -> Run:
    step = alpa.parallelize(task.step, method=_method(case))
    step.compile(jax.eval_shape(task.init), task.abstract_batch(), cluster=CLUSTERS[case.cluster])
    return _steps(step, task)


def _steps(step: Callable[..., Any], task: Task) -> Run:
    outputs, state = list[Any](), task.init()
    for seed in range(STEPS):
        state, output = step(state, task.batch(seed))
        outputs.append(jax.device_get(output))
    return outputs, jax.device_get(state)


def _method(case: Case) -> alpa.PipeshardParallel:
    return alpa.PipeshardParallel(
        num_micro_batches=case.micro_batches,
        schedule=case.schedule,
        layer_option=alpa.AutoLayerOption(case.layers, case.remat),
        stage_option=_stage_option(case.stages, case.layers),
    )


def _stage_option(text: str, layers: int) -> alpa.UniformStageOption | alpa.ManualStageOption:
    if text.isdigit():
        return alpa.UniformStageOption(int(text))
    meshes = [tuple(map(int, part.split("x"))) for part in text.split("+")]
    cuts = [round(i * layers / len(meshes)) for i in range(len(meshes) + 1)]
    return alpa.ManualStageOption(
        [range(a, b) for a, b in itertools.pairwise(cuts)],
        [(1, int(np.prod(mesh))) for mesh in meshes],
        [mesh if len(mesh) > 1 else None for mesh in meshes],
    )


# ------------------------------------------------------------------------------------------------ comparing


def _largest(expected: Any, found: Any) -> float:
    """The largest relative error of a float leaf; other leaves must be equal, and forms the same."""
    if jax.tree.structure(expected) != jax.tree.structure(found):
        return np.inf
    return max(map(_leaf_error, jax.tree.leaves(expected), jax.tree.leaves(found)))


def _leaf_error(expected: Any, found: Any) -> float:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return np.inf
    if not jnp.issubdtype(expected.dtype, jnp.floating):
        return 0.0 if np.array_equal(expected, found) else np.inf
    a, b = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    scale = np.abs(a).max(initial=0.0)
    return float(np.abs(a - b).max(initial=0.0) / (scale or 1.0))


def _in_rates(expected: Any, found: Any) -> float:
    """Root mean square of the difference, in learning rates."""
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True)
    squares = [np.square((a - b) / ADAM_RATE).ravel() for a, b in pairs]
    return float(np.sqrt(np.mean(np.concatenate(squares))))


# ------------------------------------------------------------------------------------------------ the command line


def _options(arguments: Sequence[str] | None) -> list[Case]:
    p = parser(__doc__)
    p.add_argument("--quick", action="store_true", help=f"the first {QUICK} cases")
    p.add_argument("--case", type=_case, action="append", help="one case as in a failure's line; may be repeated")
    p.add_argument("--models", type=lambda t: t.split(","), default=[*MODELS], help="comma-separated")
    p.add_argument("--part", default="0/1", help="i/n: every n-th case, from the i-th on")
    options = p.parse_args(arguments)
    if options.case:
        return options.case
    if not set(options.models) <= set(MODELS):
        p.error(f"models are {', '.join(MODELS)}, found {options.models}")
    first, every = map(int, options.part.split("/"))
    cases = [case for case in covering([*_possible()]) if case.model in options.models and not _refused(case)]
    return cases[: QUICK if options.quick else None][first::every]


def _case(text: str) -> Case:
    parts = text.split(",")
    try:
        model, stages, schedule, micro_batches, remat, cluster = parts
        return next(
            c
            for c in _possible()
            if (c.model, c.stages, c.schedule, str(c.micro_batches), c.remat, c.cluster)
            == (model, stages, schedule, micro_batches, remat, cluster)
        )
    except (ValueError, StopIteration):
        raise argparse.ArgumentTypeError(
            f"expected a case such as gpt,1+1+2+4,zb-h2,5,layer,slow, found {text!r}"
        ) from None


if __name__ == "__main__":
    main()
