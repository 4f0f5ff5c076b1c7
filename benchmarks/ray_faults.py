"""Kills workers at random moments of a training run on Ray, and checks that it comes to the same end.

    python -m benchmarks.ray_faults                                  # 60 cases, all kinds
    python -m benchmarks.ray_faults --cases 12 --kind node --seed 1

`alpa.train` runs a pipeline of 2 stages on 2 workers each, with a checkpoint every few steps, on emulated nodes of this
machine, two more than it needs. A case is one run in which something is ended without a warning:

- kind: `actor` (through Ray), `process` (SIGKILL), or `node` (all processes of a Ray node at once; another one joins
  later).
- moment: while workers compile, in a step, while a checkpoint is being written, or, a second time, while the run
  recovers from a first kill in a step. A random delay follows, so that each case meets another moment.

It has recovered if the run ends by itself. Then its last state must be equal to that of an undisturbed run, bit for
bit, each restart must have gone on with the step of the newest checkpoint that was complete, and no worker of an
earlier attempt may be left. seconds: from the last kill until the loss of the first step after it is read. A run that
takes more than a minute for it counts as hung. A kill that came when the run was over is tried again.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np

import alpa_like as alpa
from alpa_like.runtime import session
from benchmarks.common import parser, table
from benchmarks.ray_local import runs
from benchmarks.ray_support import Halves, Nodes, actors, described, local_nodes, pipelined, workers

WORKERS = 4
SPARE = 2
"""A case ends up to two nodes, and is to go on with as many workers as before."""
MODEL = Halves(width=64, rows=32, products=8, leaves=4)
STEPS = 60
CHECKPOINT_EVERY = 10
PACE_S = 0.03
"""The least time between steps, so that kills come in different steps."""
RESTARTS = 4
HUNG_S = 60.0
LEAVE_S = 10.0
KINDS = ("actor", "process", "node")
MOMENTS: dict[str, tuple[str, float]] = {
    "compile": ("load", 1.0),
    "step": ("run", 0.1),
    "checkpoint": ("save", 0.5),
    "recovery": ("run", 0.1),
}
"""What workers are told when a moment begins, and up to how many seconds after that they are killed."""
RECOVERY_S = 6.0
"""How long a recovery takes until one has been seen: the second kill comes within this time after the first one."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per case while they run, then a table."""
    options = _options(arguments)
    kinds = KINDS if options.kind == "all" else (options.kind,)
    plan = itertools.islice(itertools.cycle(itertools.product(options.moments, kinds)), options.cases)
    outcomes: list[Outcome] = []
    with local_nodes(WORKERS + SPARE) as nodes, tempfile.TemporaryDirectory() as folder:
        bench = Bench(nodes, Path(folder), random.Random(options.seed))
        bench.expect()
        for number, (moment, kind) in enumerate(plan):
            outcomes.append(bench.case(number, moment, kind))
            print(f"{number + 1:3} {outcomes[-1]}", flush=True)
        alpa.shutdown()
        left = _left_behind(nodes.folder, set())
    print(f"\n{_table(outcomes)}\n\nworkers left after the end of the session: {len(left)}")
    sys.exit(any(not o.right for o in outcomes) or bool(left))


@dataclass
class Outcome:
    """How a case ended. `wrong` says what was not as it should be."""

    moment: str
    kind: str
    seconds: float = 0.0
    restarts: int = 0
    recovered: bool = False
    equal: bool = False
    resumed: list[tuple[int | None, int]] = field(default_factory=list[tuple[int | None, int]])
    wrong: list[str] = field(default_factory=list[str])

    @property
    def right(self) -> bool:
        return not self.wrong

    def __str__(self) -> str:
        text = "; ".join(self.wrong) or f"recovered in {self.seconds:.1f} s, {self.restarts} restart(s)"
        steps = ", ".join(str(first) for _, first in self.resumed)
        return f"{self.kind:8} in {self.moment:10}: {text}; went on with step {steps or '-'}"


class Orders:
    """Hears what workers are told, and of restarts."""

    def __init__(self) -> None:
        self._wanted, self._left = "", 0
        self.come = threading.Event()
        self.restarts: list[int | None] = []
        self.directory = Path()

    def expect(self, method: str, count: int) -> None:
        """`come` is set when workers are told the `count`-th time from now on to run this method."""
        self.come.clear()
        self._wanted, self._left = method, count

    def heard(self, method: str) -> None:
        if method == self._wanted:
            self._left -= 1
            if self._left <= 0:
                self.come.set()

    @contextmanager
    def listening(self) -> Generator[None]:
        from alpa_like.runtime.ray_cluster import RayCluster

        call, restart = RayCluster.call, RayCluster.restart

        def told(cluster: Any, handles: Any, method: str, arguments: Any) -> Any:
            self.heard(method)
            return call(cluster, handles, method, arguments)

        def restarted(cluster: Any, *arguments: Any) -> Any:
            self.restarts.append(alpa.latest_step(self.directory))
            return restart(cluster, *arguments)

        with mock.patch.object(RayCluster, "call", told), mock.patch.object(RayCluster, "restart", restarted):
            yield


class Bench:
    """A session on emulated nodes, which cases share as long as it is well."""

    def __init__(self, nodes: Nodes, folder: Path, rng: random.Random) -> None:
        self.nodes, self.folder, self.rng = nodes, folder, rng
        self._names = itertools.count(len(nodes.raylets) + 1)
        self._expected: list[Any] = []
        self.recovery_s = RECOVERY_S
        self.begin()

    def begin(self) -> None:
        alpa.init(described(WORKERS), address=self.nodes.address, max_restarts=RESTARTS, wait_s=HUNG_S)

    def train(self, folder: Path, on_step: Callable[[int, Any], Any] | None = None) -> Any:
        """The last state of a run, on the workers."""
        return alpa.train(
            alpa.parallelize(MODEL.step, method=pipelined(4)),
            MODEL.init(),
            MODEL.batches,
            num_steps=STEPS,
            checkpoint_directory=folder,
            checkpoint_every=CHECKPOINT_EVERY,
            on_step=on_step,
        )

    def expect(self) -> None:
        """Run undisturbed."""
        self._expected = [np.asarray(x) for x in self.train(self.folder / "undisturbed")]

    def case(self, number: int, moment: str, kind: str) -> Outcome:
        """Run until a kill meets the run."""
        for attempt in itertools.count():
            self.complete()
            run = Case(self, self.folder / f"{number}.{attempt}", Outcome(moment, kind))
            if run.run():
                return run.outcome
        raise AssertionError

    def equal(self, state: Any) -> bool:
        return all(np.array_equal(np.asarray(x), y) for x, y in zip(state, self._expected, strict=True))

    def again(self) -> None:
        """Begin a new session, after one that was lost."""
        alpa.shutdown()
        self.complete()
        self.begin()

    def kill(self, kind: str) -> None:
        """End something of the workers that run now; waits for a process if there is none."""
        handles = [w for w in workers() if runs(w.pid)]
        if kind == "node":
            self._crash(handles)
        elif kind == "actor" and handles:
            import ray

            ray.kill(self.rng.choice(handles).actor, no_restart=True)
        else:
            pids = self._processes()
            if pids:
                with suppress(ProcessLookupError):
                    os.kill(self.rng.choice(pids), signal.SIGKILL)

    def _processes(self) -> list[int]:
        deadline = time.monotonic() + LEAVE_S
        while not (pids := sorted(actors(self.nodes.folder))) and time.monotonic() < deadline:
            time.sleep(0.02)
        return pids

    def _crash(self, handles: Sequence[Any]) -> None:
        names = sorted({w.host.name for w in handles} & set(self.nodes.raylets)) or sorted(self.nodes.raylets)
        self.nodes.crash(self.rng.choice(names))

    def complete(self) -> None:
        """Let nodes join until there are as many as in the beginning."""
        while len(self.nodes.raylets) < WORKERS + SPARE:
            self.nodes.add(f"n{next(self._names)}")


class Case:
    """One run, and who disturbs it."""

    def __init__(self, bench: Bench, directory: Path, outcome: Outcome) -> None:
        self._bench, self._directory, self.outcome = bench, directory, outcome
        self._orders = Orders()
        self._orders.directory = directory
        self._killed_s = 0.0
        self._over, self._hung, self._late = threading.Event(), False, False
        self._main = threading.get_ident()

    def run(self) -> bool:
        """Whether the kill met the run; `outcome` tells how it ended then."""
        o = self.outcome
        method, self._within_s = MOMENTS[o.moment]
        # Two meshes are told to run a step, so this is in its first half. Workers do not write checkpoint 0.
        latest = {"run": STEPS, "save": STEPS // CHECKPOINT_EVERY}.get(method, 2)
        self._orders.expect(method, self._bench.rng.randint(1, latest))
        killer = threading.Thread(target=self._disturb)
        killer.start()
        with self._orders.listening():
            failure, equal = self._result()
        self._over.set()
        killer.join()
        o.restarts = len(self._orders.restarts)
        if not failure and (self._late or not o.restarts or not o.seconds):
            self._bench.again()
            return False
        self._judge(failure, equal)
        if o.restarts == 1 and o.recovered:
            self._bench.recovery_s = o.seconds
        return True

    def _result(self) -> tuple[str, bool]:
        """What went wrong, and whether the last state is right."""
        state = None
        try:
            state = self._bench.train(self._directory, self._on_step)
            return "", self._bench.equal(state)
        except alpa.AlpaError as error:
            self._late = state is not None
            if self._late:
                return "", False
            return f"{type(error).__name__}: {' '.join(str(error).splitlines()[:1])}", False
        except KeyboardInterrupt:
            if not self._hung:
                raise
            return f"hung for {HUNG_S:g} s", False

    def _judge(self, failure: str, equal: bool) -> None:
        o, here = self.outcome, session.current().remote
        o.recovered, o.equal = not failure, equal
        checks = (
            (bool(failure), failure),
            (not failure and not equal, "the last state differs"),
            (any(a != b for a, b in o.resumed), f"went on with the wrong step: {o.resumed}"),
            (o.seconds > HUNG_S, f"took {o.seconds:.0f} s"),
        )
        o.wrong = [text for wrong, text in checks if wrong]
        if failure or here is None or here.workers.poll_failure() is not None:
            self._bench.again()
        if left := _left_behind(self._bench.nodes.folder, {w.pid for w in workers()}):
            o.wrong.append(f"{len(left)} processes left")

    def _on_step(self, step: int, loss: Any) -> None:
        """Read the first loss after each restart."""
        time.sleep(PACE_S)
        if len(self.outcome.resumed) == len(self._orders.restarts):
            return
        float(loss)
        seen = len(self._orders.restarts)
        self.outcome.resumed += [(self._orders.restarts[-1], step)] * (seen - len(self.outcome.resumed))
        self.outcome.seconds = time.monotonic() - self._killed_s

    def _disturb(self) -> None:
        """Kill at the right moment, then see that the run does not hang."""
        rng, o = self._bench.rng, self.outcome
        while not self._orders.come.wait(0.1):
            if self._over.is_set():
                return
        self._strike(rng.uniform(0, self._within_s))
        if o.moment == "recovery":
            self._strike(rng.uniform(0, self._bench.recovery_s))
        while not self._over.wait(0.5):
            if not o.seconds and time.monotonic() - self._killed_s > HUNG_S:
                self._hung = True
                faulthandler.dump_traceback(all_threads=True)
                signal.pthread_kill(self._main, signal.SIGINT)
                self._over.wait(HUNG_S)

    def _strike(self, delay_s: float) -> None:
        if not self._over.wait(delay_s):
            self._killed_s, self.outcome.seconds = time.monotonic(), 0.0
            self._bench.kill(self.outcome.kind)


def _left_behind(folder: str, known: set[int]) -> set[int]:
    """The workers beside the known ones, after they have had time to end."""
    deadline = time.monotonic() + LEAVE_S
    while (left := actors(folder) - known) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _table(outcomes: Sequence[Outcome]) -> str:
    heads = ("moment", "kind", "cases", "recovered", "seconds", "most", "restarts", "equal", "from the last checkpoint")
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.moment, outcome.kind), []).append(outcome)
    rows = [_row(moment, kind, found) for (moment, kind), found in groups.items()]
    return table(heads, [*rows, _row("all", "", outcomes)])


def _row(moment: str, kind: str, found: Sequence[Outcome]) -> tuple[str, ...]:
    seconds = [o.seconds for o in found if o.recovered] or [0.0]
    counts = Counter(o.restarts for o in found)
    steps = [pair for o in found for pair in o.resumed]
    return (
        moment,
        kind,
        str(len(found)),
        str(sum(o.recovered for o in found)),
        f"{median(seconds):.1f}",
        f"{max(seconds):.1f}",
        ", ".join(f"{restarts}: {n}×" for restarts, n in sorted(counts.items())),
        str(sum(o.equal for o in found)),
        f"{sum(a == b for a, b in steps)} of {len(steps)}",
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--cases", type=int, default=60)
    p.add_argument("--kind", choices=(*KINDS, "all"), default="all")
    p.add_argument("--moments", type=lambda text: text.split(","), default=list(MOMENTS))
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args(arguments)


if __name__ == "__main__":
    main()
