"""Train a byte-level GPT on the source code of Python's standard library, on 8 devices; show the plan and its figures.

    python -m benchmarks.gpt                                   # or: make demo
    python -m benchmarks.gpt --method DataParallel --mesh 8 --steps 50
    python -m benchmarks.gpt --cluster dgx-a100 --mesh 2x4     # plan for a machine that is not here
    python -m benchmarks.gpt --stages 4 --layers 4             # a pipeline of 4 stages (or: make demo-pipeline)

Where there is only a CPU, the 8 devices are emulated. The step is what one would write for one device.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import optax
from tqdm import tqdm

import alpa_like as alpa
from alpa_like.models import GPTConfig, gpt_task
from alpa_like.models.tasks import Task
from alpa_like.schedule import SCHEDULES
from benchmarks.common import METHODS, compare, mesh_option, parser

VOCABULARY = 256  # one token per byte
MAX_BYTES = 4 * 2**20
HEADS = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan, train, and print."""
    options = _options(arguments)
    alpa.init(None if options.cluster == "local" else alpa.Cluster.presets()[options.cluster]())
    task, text = _task(options), standard_library(MAX_BYTES)
    train_step = alpa.parallelize(task.step, method=_method(options))

    start = time.perf_counter()
    executable = train_step.compile(jax.eval_shape(task.init), task.abstract_batch())
    print(f"{executable.plan}\n\nplanned and compiled in {time.perf_counter() - start:.1f} s")
    state = alpa.create_state(task.init, like=train_step)
    print(f"training on {len(text) / 2**20:.1f} MiB of Python source, {options.batch} x {options.seq} bytes a step")
    state, losses, seconds = _train(train_step, state, text, options)
    _report(losses, seconds, options.batch * options.seq)
    if options.cluster == "local":
        print(
            f"      predicted: {executable.plan.predicted.step_time_s * 1e3:.0f} ms a step, if nothing else runs here"
        )
    print(f"\n{compare(executable.plan, executable)}")
    if options.trace:
        _write_traces(
            executable, state, windows(text, options.batch, options.seq, np.random.default_rng(1)), options.trace
        )


def _method(options: argparse.Namespace) -> Any:
    if not options.stages:
        return METHODS[options.method](mesh_shape=options.mesh)
    return alpa.PipeshardParallel(
        num_micro_batches=options.micro_batches,
        schedule=options.schedule,
        stage_option=alpa.UniformStageOption(num_stages=options.stages),
    )


def _write_traces(executable: alpa.Executable, state: Any, batch: Any, name: str) -> None:
    """One real step and the simulated one, for https://ui.perfetto.dev."""
    if not isinstance(executable, alpa.PipelineExecutable):
        raise SystemExit("--trace draws the schedule of a pipeline; give --stages too")
    executable.trace(f"{name}.measured.json", state, batch)
    executable.plan.trace(f"{name}.simulated.json")
    print(f"\nwrote {name}.measured.json and {name}.simulated.json, for https://ui.perfetto.dev")


def standard_library(max_bytes: int) -> npt.NDArray[np.uint8]:
    """The first `max_bytes` of the source files of Python's standard library, in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not files:
        raise SystemExit(f"no .py files in {sysconfig.get_paths()['stdlib']}: this Python has no source to train on")
    return np.frombuffer(b"".join(f.read_bytes() for f in files)[:max_bytes], np.uint8)


def windows(text: npt.NDArray[np.uint8], batch: int, seq: int, rng: np.random.Generator) -> dict[str, Any]:
    """A batch of random places in the text: {tokens, targets} int32 [batch, seq], targets one byte further."""
    starts = rng.integers(0, len(text) - seq, batch)
    found = text[starts[:, None] + np.arange(seq + 1)].astype(np.int32)
    return {"tokens": np.ascontiguousarray(found[:, :-1]), "targets": np.ascontiguousarray(found[:, 1:])}


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """The values, which are above 0, as a line of bars on a log scale, averaged to at most `width` columns."""
    columns = [float(np.mean(part)) for part in np.array_split(np.log(values), min(width, len(values)))]
    low, span = min(columns), (max(columns) - min(columns)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[int(7.999 * (v - low) / span)] for v in columns)


def _task(options: argparse.Namespace) -> Task:
    """A GPT with what people train one with: warm-up, cosine decay, clipped gradients, AdamW."""
    config = GPTConfig(VOCABULARY, options.seq, options.d_model, HEADS, options.layers)
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, min(20, options.steps), options.steps + 1, 3e-4)
    return gpt_task(config, options.batch, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate)))


def _train(
    train_step: alpa.ParallelFunction, state: Any, text: npt.NDArray[np.uint8], options: argparse.Namespace
) -> tuple[Any, list[float], list[float]]:
    """The state at the end, and the loss and the seconds of every step."""
    rng, losses, seconds = np.random.default_rng(0), list[float](), list[float]()
    with tqdm(range(options.steps), unit="step") as progress:
        for _ in progress:
            start = time.perf_counter()
            state, loss = train_step(state, windows(text, options.batch, options.seq, rng))
            losses.append(float(loss))
            seconds.append(time.perf_counter() - start)
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return state, losses, seconds


def _report(losses: list[float], seconds: list[float], tokens: int) -> None:
    points = sorted({0, *(round(len(losses) * k / 6) for k in range(1, 6)), len(losses) - 1} & set(range(len(losses))))
    print("\nloss  " + "   ".join(f"step {k + 1}: {losses[k]:.2f}" for k in points))
    print(f"      {sparkline(losses)}")
    step = float(np.median(seconds))
    print(f"speed {tokens / step:,.0f} tokens/s ({step * 1e3:.0f} ms a step, the median)")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--d-model", type=int, default=128)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--seq", type=int, default=128)
    p.add_argument("--method", choices=METHODS, default="ShardParallel")
    p.add_argument("--mesh", type=mesh_option, default="auto", help="auto (the default), or such as 8 or 2x4")
    p.add_argument("--cluster", choices=("local", *alpa.Cluster.presets()), default="local")
    p.add_argument("--stages", type=int, default=0, help="make a pipeline of so many equal stages")
    p.add_argument("--micro-batches", type=int, default=8)
    p.add_argument("--schedule", choices=("auto", *SCHEDULES), default="1f1b")
    p.add_argument("--trace", default="", metavar="NAME", help="write NAME.measured.json and NAME.simulated.json")
    options = p.parse_args(arguments)
    if options.steps < 1 or options.d_model % HEADS:
        p.error(f"--steps must be at least 1, and --d-model a multiple of {HEADS}, the number of heads")
    return options


if __name__ == "__main__":
    main()
