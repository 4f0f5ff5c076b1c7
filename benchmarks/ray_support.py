"""What the Ray benchmarks share: a cluster of emulated nodes on this machine, and what its processes are and take."""

from __future__ import annotations

import functools
import itertools
import json
import operator
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import alpa_like as alpa
from alpa_like.runtime import session
from benchmarks.ray_local import parent, processes, ray_folder

_ROOT = Path(__file__).parent.parent
_ACTOR = "ray::WorkerActor"
"""What Ray names the processes of our workers."""


class Nodes:
    """A Ray cluster on 127.0.0.1: where to join it, the folder that names its processes, and its nodes with CPUs.

    `raylets` are the main processes of nodes n1, n2, ... by name.
    """

    def __init__(self, folder: str, count: int) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        command = [sys.executable, "-m", "benchmarks.ray_nodes", folder, str(count)]
        # Its output is the only one that we read. Ray's messages go to standard error.
        self._server = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        found = self._answer()
        self.address: str = found["address"]
        self.raylets: dict[str, int] = found["raylets"]

    def _answer(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        while not (line := self._server.stdout.readline()).startswith("{"):
            if not line:
                raise SystemExit("the Ray cluster ended; its messages are above")
        return json.loads(line)

    def _ask(self, verb: str, name: str) -> dict[str, Any]:
        assert self._server.stdin is not None
        with self._lock:
            self._server.stdin.write(f"{verb} {name}\n")
            self._server.stdin.flush()
            return self._answer()

    def add(self, name: str) -> None:
        """One more node, with one CPU."""
        self.raylets |= self._ask("add", name)

    def crash(self, name: str) -> None:
        """End a node as if its machine had lost power: all its processes at once, and none says goodbye."""
        raylet = self.raylets.pop(name)
        for pid in [raylet, *(pid for pid in processes(self.folder) if parent(pid) == raylet)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._ask("remove", name)

    def end(self) -> None:
        """End all nodes."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


@contextmanager
def local_nodes(count: int) -> Generator[Nodes]:
    """A Ray cluster of nodes n1, n2, ... with a CPU each; it, and our session on it, end with the context.

    Ray's environment is set in the context, so enter it before anything imports Ray.
    """
    with ray_folder(_ROOT) as folder:
        nodes = Nodes(folder, count)
        try:
            yield nodes
        finally:
            alpa.shutdown()
            nodes.end()


def described(hosts: int) -> alpa.Cluster:
    """What plans are made for: hosts with one device each, known beforehand, so that plans are the same at each run."""
    return alpa.Cluster.p3_16xlarge(hosts).part(hosts, 1)


def workers() -> tuple[Any, ...]:
    """The workers of this session, as `runtime.ray_workers.WorkerHandle`s, in the order of their devices."""
    remote: Any = session.current().remote
    return tuple(sorted(remote.workers.running, key=lambda w: (w.first, w.count, w.process_id)))


# ------------------------------------------------------------------------------------------------------- processes


def actors(folder: str) -> set[int]:
    """The processes of workers, whichever session they belong to."""
    return {pid for pid, command in processes(folder).items() if command.startswith(_ACTOR)}


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM, what it shares with others included."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in text.splitlines() if line.startswith("VmRSS:")).split()[1])


def pin(pid: int, core: int) -> None:
    """Let all threads of a process, and those that they start, run on one core only."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), {core})


# ----------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Halves:
    """Two equal halves of a model, the stages of a pipeline, trained by gradient descent on random rows.

    A half multiplies [rows, width] by its matrix `products` times, with a tanh after each. Its matrix is the sum of its
    leaves, so that the number of leaves of the state changes neither what is computed nor, much, what is planned.
    """

    width: int
    rows: int
    products: int
    leaves: int = 2

    def init(self) -> list[jax.Array]:
        """The state: matrices, those of the first half first."""
        keys = jax.random.split(jax.random.key(0), self.leaves)
        size = (self.width * self.leaves / 2) ** 0.5
        return [jax.random.normal(key, (self.width, self.width)) / size for key in keys]

    def batch(self, seed: int) -> dict[str, np.ndarray[Any, Any]]:
        """The same rows for the same seed."""
        rng = np.random.default_rng(seed)
        return {name: rng.standard_normal((self.rows, self.width)).astype(np.float32) for name in ("x", "y")}

    def batches(self, first: int) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """The batch of each step from `first` on, without end."""
        return map(self.batch, itertools.count(first))

    def step(self, state: list[jax.Array], batch: Any) -> tuple[list[jax.Array], jax.Array]:
        """The next state, and the loss."""

        def loss(state: list[jax.Array]) -> jax.Array:
            h = alpa.mark_pipeline_boundary(self._half(state[: self.leaves // 2], batch["x"]))
            return jnp.mean((self._half(state[self.leaves // 2 :], h) - batch["y"]) ** 2)

        value, gradient = jax.value_and_grad(loss)(state)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, gradient), value

    def _half(self, leaves: list[jax.Array], h: jax.Array) -> jax.Array:
        matrix = functools.reduce(operator.add, leaves)
        for _ in range(self.products):
            h = jnp.tanh(h @ matrix)
        return h


def pipelined(micro_batches: int, stages: int = 2) -> alpa.PipeshardParallel:
    """The halves as stages on equal meshes, or both as one stage; nothing is computed twice."""
    return alpa.PipeshardParallel(
        num_micro_batches=micro_batches,
        schedule="1f1b",
        layer_option=alpa.ManualLayerOption(remat_mode="none"),
        stage_option=alpa.UniformStageOption(num_stages=stages),
    )


def parallelized(model: Halves, method: Any) -> tuple[Callable[..., Any], Any]:
    """The step, compiled, and a state on the workers."""
    step = alpa.parallelize(model.step, method=method)
    step.compile(jax.eval_shape(model.init), model.batch(0))
    return step, alpa.create_state(model.init, like=step)


def wait_for(results: Sequence[Any]) -> None:
    """Return when all results are computed, to which arrays of all meshes must belong."""
    for result in results:
        result.block_until_ready()
