"""One model on one cluster: the plan and what it predicts, or that beside what a run on the devices here takes.

    python -m benchmarks gpt --size 1.3B --cluster p3.16xlarge --remat --plan-only
    python -m benchmarks gpt --size 39B --cluster p3.16xlarge:8 --method PipeshardParallel --micro-batches 64 \\
        --batch-size 1024 --plan-only
    python -m benchmarks vit --size laptop --devices 4 --steps 20
    python -m benchmarks gpt --size auto --dtype bfloat16 --steps 20      # fills the GPUs or TPUs that are here

Without --plan-only the step runs here, on all GPUs or TPUs or on 8 emulated CPU devices. Its time is the median of
--steps steps, each until its loss is on the host, after two that are not counted. `jax.jit` of the same step on one
device with the same batch runs beside it, the two taking turns, or after it where memory holds only one of them; it is
left out where its predicted memory says that it does not fit.

TFLOP/s are model FLOPs: three times those of the matrix products and convolutions of the forward pass, counted in the
operator graph of the step, nothing that is computed twice (`benchmarks.flops` has formula and sources). MFU is their
share of the peak of the devices' data sheet. A Wide-ResNet in a pipeline takes its BatchNorm statistics per
micro-batch.

Written to DIR: MODEL-SIZE.json, MODEL-SIZE.plan.json, MODEL-SIZE.plan.png and, of a run, MODEL-SIZE.png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import jax

import alpa_like as alpa
from alpa_like.cli import read_cluster
from alpa_like.models import SIZES, Task, config, task
from alpa_like.texts import bytes_text, seconds_text
from benchmarks.charts import Panel, draw_bars, drawable
from benchmarks.common import METHODS, compare, measure_executable, table
from benchmarks.fill import fill
from benchmarks.flops import model_flops, peak_flops, peak_of_kind

ALL_METHODS: dict[str, Callable[..., Any]] = {**METHODS, "PipeshardParallel": alpa.PipeshardParallel}
WARM_UP = 2
SPARE = 0.9
"""The share of a device's memory that two train states and what they compute may take."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan, run if asked to, print and write; returns the exit code: 2 for bad input, with one sentence on stderr."""
    try:
        options = _options(arguments)
        _Benchmark(options).run()
    except (alpa.AlpaError, ValueError) as error:
        less = "; here: --remat, a smaller --batch-size, or --micro-batches" * isinstance(error, alpa.InfeasibleError)
        print(f"benchmarks: {error}{less}", file=sys.stderr)
        return 2
    return 0


@dataclass
class _Benchmark:
    options: argparse.Namespace
    record: dict[str, Any] = field(default_factory=dict[str, Any])

    def run(self) -> None:
        """Everything in order."""
        options = self.options
        self.method = method_of(options)
        _check_names(options)
        config(options.model, "tiny", **self._changes())  # the options, before anything takes time
        Path(options.out).mkdir(parents=True, exist_ok=True)
        if options.cluster == "local":
            alpa.init(num_devices=options.devices)
        self.cluster = cluster_of(options)
        if options.size == "auto":
            self._fill()
        self.batch = options.batch_size or 8 * self.cluster.num_devices
        self.config = config(options.model, options.size, **self._changes())
        self.task = self._task(options.size, self.batch)
        step = alpa.parallelize(self.task.step, method=self.method)
        start = time.perf_counter()
        self.plan = step.plan(jax.eval_shape(self.task.init), self.task.abstract_batch(), cluster=self.cluster)
        self.planned_s = time.perf_counter() - start
        print(f"{self.plan}\n")
        self._describe()
        if options.plan_only:
            print(self._predicted())
        else:
            self._measure(step)
        self._write()

    def _fill(self) -> None:
        """Take the size and the batch that fill the memory."""

        def predict(size: str, batch: int) -> float:
            part = self._task(size, batch)
            try:
                plan = alpa.parallelize(part.step, method=self.method).plan(
                    jax.eval_shape(part.init), part.abstract_batch(), cluster=self.cluster
                )
            except alpa.InfeasibleError:
                return math.inf
            return plan.predicted.peak_memory_bytes

        found = fill(SIZES[self.options.model], self.cluster, predict)
        if found is None:
            raise ValueError(f"no size of {self.options.model} fits into {self.cluster}; give --size")
        self.options.size, self.options.batch_size = found.size, self.options.batch_size or found.batch_size
        memory = f"{bytes_text(found.peak_bytes)} of {bytes_text(self.cluster.device.memory_bytes)}"
        print(f"size {found.size} with batch {found.batch_size} fills the devices: predicted {memory}\n")

    def _task(self, size: str, batch: int, **more: Any) -> Task:
        return task(self.options.model, size, batch_size=batch, **(self._changes() | more))

    def _changes(self) -> dict[str, Any]:
        given = {"dtype": self.options.dtype, "seq_len": self.options.seq_len, "remat": self.options.remat or None}
        return {name: value for name, value in given.items() if value is not None}

    # --------------------------------------------------------------------------------------------------- predicted

    def _describe(self) -> None:
        """What is known before anything runs."""
        plan, devices = self.plan, self.cluster.num_devices
        known = {f.name for f in fields(self.config)}
        whole = self._task(self.options.size, self.batch, **({"remat": False} if "remat" in known else {}))
        flops, step_s = model_flops(whole), plan.predicted.step_time_s
        self.amount, self.unit = items(self.task)
        self.peak = self._peak()
        self.record |= {
            "model": self.options.model,
            "size": self.options.size,
            "parameters": self.config.num_params() if hasattr(self.config, "num_params") else None,
            "batch_size": self.batch,
            "cluster": str(self.cluster),
            "method": plan.method,
            "planned_s": self.planned_s,
            "model_flops": flops,
            "unit": self.unit,
            "predicted": self._speed(step_s, flops, devices) | {"memory_bytes": plan.predicted.peak_memory_bytes},
        }

    def _peak(self) -> float | None:
        dtype = getattr(self.config, "dtype", "float32")
        if self.options.cluster != "local":
            return peak_flops(self.cluster.device, dtype)
        return peak_of_kind(jax.devices()[0].device_kind, dtype)

    def _speed(self, step_s: float, flops: float, devices: int) -> dict[str, float | None]:
        each = flops / step_s / devices
        return {
            "step_s": step_s,
            "per_s": self.amount / step_s,
            "flops_per_device": each,
            "mfu": None if self.peak is None else each / self.peak,
        }

    def _predicted(self) -> str:
        p, r = self.record["predicted"], self.record
        rows = [
            ("step time", seconds_text(p["step_s"])),
            (f"{self.unit}/s", f"{p['per_s']:,.0f}"),
            ("model TFLOP/s per device", f"{p['flops_per_device'] / 1e12:.4g}"),
            ("model FLOP utilization", _share(p["mfu"])),
            ("memory per device", bytes_text(p["memory_bytes"])),
            ("planned in", f"{self.planned_s:.1f} s"),
        ]
        title = f"{r['model']} {r['size']}, batch {self.batch}, {r['model_flops'] / 1e12:.4g} TFLOP a step"
        return table((title, "predicted"), rows)

    # ---------------------------------------------------------------------------------------------------- measured

    def _measure(self, step: alpa.ParallelFunction) -> None:
        executable = step.compile(jax.eval_shape(self.task.init), self.task.abstract_batch(), plan=self.plan)
        ours, rival = self._times(step)
        flops, devices = self.record["model_flops"], len(jax.devices()[: self.cluster.num_devices])
        found = measure_executable(executable)
        self.record["measured"] = self._speed(statistics.median(ours), flops, devices) | {
            "memory_bytes": found.memory,
            "traffic_bytes": found.gpu_total,
            "steps_s": ours,
        }
        if rival:
            self.record["jit"] = self._speed(statistics.median(rival), flops, 1) | {"steps_s": rival}
        print(f"{self._measured()}\n\n{compare(self.plan, executable)}")

    def _times(self, step: alpa.ParallelFunction) -> tuple[list[float], list[float]]:
        """Seconds of our steps and of `jax.jit` on one device, the latter empty where that does not fit."""
        batch, count = self.task.batch(0), self.options.steps
        ours = _Side(step, lambda: alpa.create_state(self.task.init, like=step))
        alone, memory = self._alone_bytes(), SPARE * self.cluster.device.memory_bytes
        if alone > memory:
            return list(ours.times(batch, count)), []
        rival = _Side(jax.jit(self.task.step, donate_argnums=0), self.task.init)
        try:
            if alone + self.plan.predicted.peak_memory_bytes <= memory:
                return _in_turns(ours, rival, batch, count)
            mine = list(ours.times(batch, count))
            ours.forget()
            return mine, list(rival.times(batch, count))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print("\njax.jit on one device ran out of memory")
            return list(ours.times(batch, count)), []

    def _alone_bytes(self) -> float:
        """Predicted memory of the whole step on one device."""
        one = self.cluster.part(1, 1)
        plan = alpa.parallelize(self.task.step, method=alpa.ShardParallel(memory_budget_bytes=2.0**60)).plan(
            jax.eval_shape(self.task.init), self.task.abstract_batch(), cluster=one
        )
        return plan.predicted.peak_memory_bytes

    def _measured(self) -> str:
        columns = [c for c in ("predicted", "measured", "jit") if c in self.record]
        names = {"predicted": "predicted", "measured": "measured", "jit": "jax.jit on one device"}
        rows = [
            ("step time, median", *(seconds_text(self.record[c]["step_s"]) for c in columns)),
            (f"{self.unit}/s", *(f"{self.record[c]['per_s']:,.0f}" for c in columns)),
            (
                "model TFLOP/s per device",
                *(f"{self.record[c]['flops_per_device'] / 1e12:.4g}" for c in columns),
            ),
            ("model FLOP utilization", *(_share(self.record[c]["mfu"]) for c in columns)),
        ]
        text = table(("", *(names[c] for c in columns)), rows)
        if "jit" not in self.record:
            return f"{text}\njax.jit on one device: does not fit into its memory"
        speedup = self.record["jit"]["step_s"] / self.record["measured"]["step_s"]
        return f"{text}\n{speedup:.2f} times as fast as jax.jit on one device"

    # ----------------------------------------------------------------------------------------------------- written

    def _write(self) -> None:
        out = Path(self.options.out)
        name = f"{self.options.model}-{self.options.size}".replace("/", "_").replace(" ", "_")
        (out / f"{name}.json").write_text(json.dumps(self.record, indent=1))
        self.plan.save(out / f"{name}.plan.json")
        print(f"\nwrote {out / name}.json and {out / name}.plan.json")
        if drawable():
            alpa.viz.overview(self.plan).savefig(out / f"{name}.plan.png", dpi=110)
            print(f"wrote {out / name}.plan.png")
        if "measured" in self.record or not drawable():
            print(draw_bars(out / f"{name}.png", f"{self.options.model} {self.options.size}", self._panels()))

    def _panels(self) -> list[Panel]:
        r = self.record
        jit = {"jax.jit on one device": [r["jit"]["step_s"] * 1e3 if "jit" in r else None]}
        known = [name for name in ("predicted", "measured") if name in r]
        both = {name: [r[name]["step_s"] * 1e3] for name in known}
        memory = {name: [r[name]["memory_bytes"] / 2**20] for name in known}
        return [
            Panel("Step time", [r["method"]], {**both, **jit}, "ms", missing="does not fit"),
            Panel("Peak memory per device", [r["method"]], memory, "MiB"),
        ]


class _Side:
    """A step with its state, made when first needed."""

    def __init__(self, step: Callable[..., Any], init: Callable[[], Any]) -> None:
        self.step, self.init = step, init
        self.state: Any = None

    def forget(self) -> None:
        """Give the memory back."""
        self.state = None

    def seconds(self, batch: Any) -> float:
        """Of one step, until its loss has arrived."""
        if self.state is None:
            self.state = self.init()
        start = time.perf_counter()
        self.state, loss = self.step(self.state, batch)
        float(loss)
        return time.perf_counter() - start

    def times(self, batch: Any, count: int) -> Iterator[float]:
        """Of `count` steps after the first ones, which compile."""
        for number in range(WARM_UP + count):
            seconds = self.seconds(batch)
            if number >= WARM_UP:
                yield seconds


def _in_turns(ours: _Side, rival: _Side, batch: Any, count: int) -> tuple[list[float], list[float]]:
    pairs = list(zip(ours.times(batch, count), rival.times(batch, count), strict=True))
    return [a for a, _ in pairs], [b for _, b in pairs]


def items(made: Task) -> tuple[int, str]:
    """What a step goes through: tokens, images or rows of the batch."""
    batch = made.abstract_batch()
    if "tokens" in batch:
        return math.prod(batch["tokens"].shape), "tokens"
    first = next(iter(batch.values()))
    pictures = any(len(x.shape) == 4 for x in batch.values())
    return first.shape[0], "images" if pictures else "rows"


def _share(value: float | None) -> str:
    return "no known peak" if value is None else f"{100 * value:.1f} %"


# ---------------------------------------------------------------------------------------------------------- options


def cluster_of(options: argparse.Namespace) -> alpa.Cluster:
    """The devices here, or a cluster as `alpa-like plan` takes it, as far as --devices goes."""
    if options.cluster == "local":
        return alpa.Cluster.local(options.devices)
    whole = read_cluster(options.cluster)
    wanted = options.devices or whole.num_devices
    if wanted < whole.devices_per_host:
        return whole.part(1, wanted)
    if wanted % whole.devices_per_host:
        raise ValueError(f"--devices {wanted} are no whole hosts of {whole.devices_per_host}, as {whole.name} has them")
    return replace(whole, hosts=wanted // whole.devices_per_host)


def method_of(options: argparse.Namespace) -> Any:
    """The method with its options; --micro-batches alone asks for a pipeline."""
    name = options.method or ("PipeshardParallel" if options.micro_batches else "ShardParallel")
    if name != "PipeshardParallel":
        if options.micro_batches:
            raise ValueError(f"--micro-batches goes with --method PipeshardParallel, not with {name}")
        return ALL_METHODS[name]()
    return alpa.PipeshardParallel(num_micro_batches=options.micro_batches or "auto", batch_statistics="micro_batch")


def _check_names(options: argparse.Namespace) -> None:
    """One sentence with the choices for a size or cluster that there is not."""
    if options.size not in ("auto", *SIZES[options.model]):
        sizes = ", ".join((*SIZES[options.model], "auto"))
        raise ValueError(f"no size of {options.model} is named {options.size!r}; choose one of {sizes}")
    if options.cluster == "local":
        return
    if options.cluster.startswith("local:"):
        raise ValueError(f"expected local with --devices, or another cluster, found {options.cluster!r}")
    name = read_cluster(options.cluster).name
    if not options.plan_only:
        raise ValueError(f"{name} is not here to run on; add --plan-only, or leave out --cluster")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"benchmarks: {message}\n")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _method_name(text: str) -> str:
    """`Zero3Parallel` for zero3, as `alpa-like plan` takes it; what is unknown as it is."""
    short = text.lower().removesuffix("parallel")
    return next((name for name in ALL_METHODS if name.lower() == f"{short}parallel"), text)


def _family(text: str) -> str:
    name = text.replace("-", "_")
    if name not in SIZES:
        raise argparse.ArgumentTypeError(f"no model is named {text!r}; choose one of {', '.join(SIZES)}")
    return name


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = _Parser("python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=_family, help=", ".join(SIZES))
    p.add_argument("--size", default="laptop", help="one of the family's, or auto; default: laptop")
    p.add_argument("--cluster", default="local", help="local, such as p3.16xlarge:8, or a JSON file; default: local")
    p.add_argument("--devices", type=_count, help="use so many; default: all")
    p.add_argument("--plan-only", action="store_true", help="run nothing")
    p.add_argument("--method", type=_method_name, choices=ALL_METHODS, help="default: ShardParallel")
    p.add_argument("--batch-size", type=_count, help="default: 8 per device")
    p.add_argument("--micro-batches", type=_count, help="of a pipeline; default: what is fastest")
    p.add_argument("--dtype", help="to compute in, such as bfloat16; default: the size's own")
    p.add_argument("--seq-len", type=_count, help="default: the size's own")
    p.add_argument("--remat", action="store_true", help="the model computes its layers again in the backward pass")
    p.add_argument("--steps", type=_count, default=10, help="that are measured; default: 10")
    p.add_argument("--out", default="out/benchmarks", metavar="DIR", help="default: out/benchmarks")
    return p.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
