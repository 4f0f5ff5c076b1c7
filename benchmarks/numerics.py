"""Does a parallelized step return the numbers of `jax.jit`? Every model, method and mesh, three steps.

    python -m benchmarks.numerics                     # everything
    python -m benchmarks.numerics --quick             # three models, two meshes
    python -m benchmarks.numerics --models mlp,gpt --meshes 8,2x2x2 --methods ShardParallel

The reference is `jax.jit` of the same step on one device, fed with the same batches. Errors are relative: of the loss
to its value, of a leaf of the state to the largest element of that leaf; the largest over steps or leaves is shown.

1. float32, SGD with momentum: the update is linear in the gradients, so only the order of sums differs. Bound 1e-5.
2. float32, Adam: it divides by sqrt(v), which makes a gradient that is 0 but for rounding into a step of the size of
   the learning rate. So the loss is compared as above with bound 1e-5, and the parameters in units of the learning
   rate: the root mean square of the difference over all parameters, bound 0.05. (One element may differ by 2 per step.)
3. bfloat16 compute, SGD: rounding is 2^-8 an operation, so two correct programs differ by about that much.
   Bounds: 2^-8 for the loss, and for the parameters 2 times what one-device bfloat16 differs from one-device float32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import alpa_like as alpa
from alpa_like.errors import AlpaError
from alpa_like.models import GPTConfig, gpt_task, small_tasks
from alpa_like.models.tasks import Task
from benchmarks.common import METHODS, Mesh, mesh_option, mesh_text, parser, table

STEPS = 3
SGD_BOUND = 1e-5
ADAM_RATE, ADAM_LOSS_BOUND, ADAM_BOUND = 1e-3, 1e-5, 0.05
BF16_LOSS_BOUND, BF16_FACTOR = 2.0**-8, 2.0
MESHES: tuple[Mesh, ...] = ((8,), (2, 4), (4, 2), (2, 2, 2))
AXES = ("x", "y", "z")

Run = tuple[list[float], Any]
"""The loss of every step, and the last state, all on the host."""


@dataclass(frozen=True, slots=True)
class Case:
    """One model under one method on one mesh."""

    model: str
    method: str
    mesh: Mesh


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors of loss and state and their bounds; `note` says why where there are none."""

    loss: float = np.nan
    state: float = np.nan
    bounds: tuple[float, float] = (0.0, 0.0)
    note: str = ""

    @property
    def good(self) -> bool:
        return self.loss <= self.bounds[0] and self.state <= self.bounds[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the three tables; exit with 1 where a bound is broken."""
    options = _options(arguments)
    alpa.init()
    bad = [*_sgd(options), *_adam(options), *_bfloat16(options)]
    for case, errors in bad:
        print(f"\nFAILED {case.model}, {case.method}, mesh {mesh_text(case.mesh)}: {errors.note or errors}")
    raise SystemExit(1 if bad else 0)


# ------------------------------------------------------------------------------------------------ the sections


def _sgd(options: argparse.Namespace) -> list[tuple[Case, Errors]]:
    tasks = {name: task for name, task in small_tasks().items() if name in options.models}
    cases = [Case(n, m, s) for n in tasks for s in options.meshes for m in options.methods]

    def judge(expected: Run, found: Run, _: Case) -> Errors:
        return replace(_relative(expected, found), bounds=(SGD_BOUND, SGD_BOUND))

    title = f"float32, SGD with momentum, {STEPS} steps, relative errors, bound {SGD_BOUND:g}"
    return _section(title, tasks, cases, judge)


def _adam(options: argparse.Namespace) -> list[tuple[Case, Errors]]:
    tasks = {n: t for n, t in small_tasks(optax.adam(ADAM_RATE)).items() if n in ("gpt", "conv", "moe")}
    tasks = {n: t for n, t in tasks.items() if n in options.models}

    def judge(expected: Run, found: Run, _: Case) -> Errors:
        pairs = zip(jax.tree.leaves(expected[1].params), jax.tree.leaves(found[1].params), strict=True)
        squares = [np.square((a - b) / ADAM_RATE).ravel() for a, b in pairs]
        rms = float(np.sqrt(np.mean(np.concatenate(squares))))
        return Errors(_relative(expected, found).loss, rms, (ADAM_LOSS_BOUND, ADAM_BOUND))

    title = f"float32, Adam: relative error of the loss (bound {ADAM_LOSS_BOUND:g}), rms error of the parameters"
    title += f" in learning rates (bound {ADAM_BOUND:g})"
    return _section(title, tasks, _few(tasks, options), judge)


def _bfloat16(options: argparse.Namespace) -> list[tuple[Case, Errors]]:
    sizes: dict[str, Any] = dict(vocab_size=64, seq_len=16, d_model=32, num_heads=8, num_layers=2)
    tx = optax.sgd(0.1, momentum=0.9)
    tasks = {"gpt": gpt_task(GPTConfig(**sizes, dtype=jnp.bfloat16), 16, tx)}
    exact = _reference(gpt_task(GPTConfig(**sizes), 16, tx))
    rounding = _relative(exact, _reference(tasks["gpt"])).state

    def judge(expected: Run, found: Run, _: Case) -> Errors:
        return replace(_relative(expected, found), bounds=(BF16_LOSS_BOUND, BF16_FACTOR * rounding))

    title = f"bfloat16 compute, SGD, relative errors (bounds {BF16_LOSS_BOUND:g} and {BF16_FACTOR * rounding:.2g};"
    title += f" bfloat16 itself differs from float32 by {rounding:.2g})"
    return _section(title, tasks, _few(tasks, options), judge)


def _few(tasks: dict[str, Task], options: argparse.Namespace) -> list[Case]:
    """A few cases: two meshes at most, three methods at most."""
    methods = [m for m in options.methods if m in ("ShardParallel", "Zero2Parallel", "Zero3Parallel")]
    return [Case(n, m, s) for n in tasks for s in options.meshes[:2] for m in methods]


def _section(
    title: str, tasks: dict[str, Task], cases: Sequence[Case], judge: Callable[[Run, Run, Case], Errors]
) -> list[tuple[Case, Errors]]:
    """Run the cases and print a row per model and mesh, a column per method; the cases that broke a bound."""
    if not cases:
        return []
    start, found = time.perf_counter(), dict[Case, Errors]()
    expected = {name: _reference(task) for name, task in tasks.items()}
    for case in tqdm(cases, desc=title.split(":")[0][:24], leave=False):
        try:
            found[case] = judge(expected[case.model], _parallel(tasks[case.model], case), case)
        except AlpaError as error:
            found[case] = Errors(note=f"{type(error).__name__}: {error}")
    print(f"\n{title}; loss / state\n\n{_grid(found)}")
    good = sum(e.good for e in found.values())
    worst = [max((getattr(e, what) for e in found.values()), default=0.0) for what in ("loss", "state")]
    print(
        f"\n{good} of {len(found)} cases within the bounds, largest errors {worst[0]:.1e} and {worst[1]:.1e}, ", end=""
    )
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    return [(case, errors) for case, errors in found.items() if not errors.good]


def _grid(found: dict[Case, Errors]) -> str:
    methods = list(dict.fromkeys(c.method for c in found))
    rows = list(dict.fromkeys((c.model, c.mesh) for c in found))
    cells = [(model, mesh_text(mesh), *(_cell(found[Case(model, m, mesh)]) for m in methods)) for model, mesh in rows]
    return table(("model", "mesh", *methods), cells)


def _cell(errors: Errors) -> str:
    if errors.note:
        return errors.note.split(":")[0]
    return f"{errors.loss:.1e} / {errors.state:.1e}{'' if errors.good else ' !'}"


# ------------------------------------------------------------------------------------------------ running


def _reference(task: Task) -> Run:
    return _steps(jax.jit(task.step), task.init(), task)


def _parallel(task: Task, case: Case) -> Run:
    train_step = alpa.parallelize(task.step, method=_method(case, task))
    train_step.compile(jax.eval_shape(task.init), task.abstract_batch())
    return _steps(train_step, alpa.create_state(task.init, like=train_step), task)


def _steps(step: Callable[..., Any], state: Any, task: Task) -> Run:
    losses: list[float] = []
    for seed in range(STEPS):
        state, loss = step(state, task.batch(seed))
        losses.append(float(loss))
    return losses, jax.device_get(state)


def _method(case: Case, task: Task) -> Any:
    if case.method != "ManualParallel":
        return METHODS[case.method](mesh_shape=case.mesh)
    last = AXES[len(case.mesh) - 1]
    specs = jax.tree.map(lambda leaf: _by_hand(leaf, last, case.mesh[-1]), jax.eval_shape(task.init))
    return alpa.ManualParallel(in_specs=(specs, P("x")), mesh_shape=case.mesh)


def _by_hand(leaf: jax.ShapeDtypeStruct, axis: str, size: int) -> P | None:
    """Matrices are split in their last dim over the last axis; the solver decides about the rest."""
    if len(leaf.shape) < 2 or leaf.shape[-1] % size:
        return None
    return P(*(None,) * (len(leaf.shape) - 1), axis)


def _relative(expected: Run, found: Run) -> Errors:
    """Relative errors of the losses and of every float leaf of the state; integers must be equal."""
    loss = max(abs(a - b) / abs(a) for a, b in zip(expected[0], found[0], strict=True))
    pairs = zip(jax.tree.leaves(expected[1]), jax.tree.leaves(found[1]), strict=True)
    return Errors(loss, max(_leaf_errors(pairs)))


def _leaf_errors(pairs: Iterator[tuple[Any, Any]]) -> Iterator[float]:
    for a, b in pairs:
        if not np.issubdtype(a.dtype, np.floating):
            yield 0.0 if np.array_equal(a, b) else np.inf
        elif a.size:
            scale = float(np.abs(a).max())
            difference = float(np.abs(np.subtract(a, b)).max())
            yield difference / scale if scale else difference


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p, every = parser(__doc__), (*METHODS, "ManualParallel")
    p.add_argument("--quick", action="store_true", help="models mlp, gpt, moe on meshes 8 and 2x4")
    p.add_argument("--models", type=lambda t: t.split(","), help="comma-separated names of small_tasks()")
    p.add_argument("--meshes", type=lambda t: [mesh_option(m) for m in t.split(",")], help="such as 8,2x4,4x2,2x2x2")
    p.add_argument("--methods", type=lambda t: t.split(","), default=every)
    options = p.parse_args(arguments)
    options.models = options.models or (["mlp", "gpt", "moe"] if options.quick else list(small_tasks()))
    options.meshes = options.meshes or (MESHES[:2] if options.quick else MESHES)
    unknown = [*set(options.models) - set(small_tasks()), *set(options.methods) - set(every)]
    if unknown or "auto" in options.meshes:
        p.error(f"unknown {unknown}: models are {[*small_tasks()]}, methods {every}, meshes such as 8,2x4")
    return options


if __name__ == "__main__":
    main()
