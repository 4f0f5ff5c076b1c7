"""What a parallelized step costs over plain `jax.jit`: paired runs in one process, one process per number of devices.

    python -m benchmarks.overhead                         # 1 and 8 devices
    python -m benchmarks.overhead --devices 1 --pairs 200
    python -m benchmarks.overhead --quick

On one device the rival is `jax.jit(step, donate_argnums=0)`. On eight (emulated, where there is only a CPU) it is
`jax.jit` with the plan's own `in_shardings` and `out_shardings` and the same donation, which leaves the layouts inside
to the partitioner; so there the ratio is the cost of our driver and the effect of the layouts that the plan pins.

Both sides have their own state and take the same numpy batch. A pair is one step of each, in an order that alternates;
a step ends when its loss is on the host. The median of the pairs' ratios is the figure; quartiles say how noisy it is.
The tiny MLP computes next to nothing: its row is the cost of a call.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import alpa_like as alpa
from alpa_like.models import GPTConfig, MLPConfig, Task, gpt_task, mlp_task
from benchmarks.common import parser, table

WARM_UP = 3


@dataclass
class Side:
    """One of the two: a step, and the state that it has come to."""

    step: Callable[..., Any]
    state: Any

    def seconds(self, batch: Any) -> float:
        """The time of one step, until its loss has arrived."""
        start = time.perf_counter()
        self.state, loss = self.step(self.state, batch)
        float(loss)
        return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Run each number of devices in a process of its own, or the one that was asked for in this process."""
    options = _options(arguments)
    if options.devices is not None:
        print(_measure(options.devices, options.pairs))
        return
    for devices in (1, 8):
        environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
        command = [
            sys.executable,
            "-m",
            "benchmarks.overhead",
            "--devices",
            str(devices),
            "--pairs",
            str(options.pairs),
        ]
        subprocess.run(command, check=True, env=environment)


def _measure(devices: int, pairs: int) -> str:
    alpa.init(num_devices=devices)
    rows = [_row(task, devices, count) for task, count in ((_gpt(), pairs), (_mlp(), 10 * pairs))]
    rival = "jax.jit" if devices == 1 else "jax.jit, same shardings"
    heads = (f"{devices} device{'s' * (devices > 1)}", "pairs", "parallelize ms", f"{rival} ms", "ratio", "quartiles")
    return "\n" + table(heads, rows)


def _gpt() -> Task:
    return gpt_task(GPTConfig(vocab_size=256, seq_len=64, d_model=128, num_heads=8, num_layers=2), 16)


def _mlp() -> Task:
    return mlp_task(MLPConfig((16, 16, 8)), 8, name="tiny mlp")


def _row(task: Task, devices: int, pairs: int) -> tuple[str, ...]:
    ours, rival = _sides(task, devices)
    times = _pairs(ours, rival, task.batch(0), pairs)
    ratios = times[:, 0] / times[:, 1]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    mine, theirs = np.median(times, axis=0) * 1e3
    return task.name, str(pairs), f"{mine:.3f}", f"{theirs:.3f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"


def _sides(task: Task, devices: int) -> tuple[Side, Side]:
    """The parallelized step and the plain one, each with its state."""
    train_step = alpa.parallelize(task.step, method=alpa.ShardParallel(mesh_shape=(devices,)))
    executable = train_step.compile(jax.eval_shape(task.init), task.abstract_batch())
    ours = Side(train_step, alpa.create_state(task.init, like=train_step))
    if devices == 1:
        return ours, Side(jax.jit(task.step, donate_argnums=0), task.init())
    states = executable.input_shardings[0]
    step = jax.jit(
        task.step,
        in_shardings=executable.input_shardings,
        out_shardings=executable.output_shardings,
        donate_argnums=0,
    )
    return ours, Side(step, jax.jit(task.init, out_shardings=states)())


def _pairs(ours: Side, rival: Side, batch: Any, pairs: int) -> Any:
    """Seconds [pairs, 2] of ours and the rival."""
    for side in (ours, rival) * WARM_UP:
        side.seconds(batch)
    times = np.empty((pairs, 2))
    for k in range(pairs):
        for which in (0, 1) if k % 2 else (1, 0):
            times[k, which] = (ours, rival)[which].seconds(batch)
    return times


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--devices", type=int, help="measure here with so many devices; default: 1 and 8, each in a process")
    p.add_argument("--pairs", type=int, default=100, help="of the GPT; the tiny MLP has ten times as many")
    p.add_argument("--quick", action="store_true", help="20 pairs")
    options = p.parse_args(arguments)
    options.pairs = min(options.pairs, 20) if options.quick else options.pairs
    return options


if __name__ == "__main__":
    main()
