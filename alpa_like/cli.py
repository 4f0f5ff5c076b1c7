"""The command `alpa-like`: plans a step that stands in a file, shows and compares plans, lists the known clusters.

    alpa-like plan train.py:train_step --cluster dgx-a100:4 -o plan.json
    alpa-like show plan.json --figure plan.png
    alpa-like diff plan.json other.json
    alpa-like clusters

Exit codes: 0, 1 where `diff` finds a difference, 2 for bad input with one sentence on stderr.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpa_like.api import ParallelFunction, parallelize
from alpa_like.cli_options import METHODS, parse
from alpa_like.cli_target import Target, TheirCode, load_target
from alpa_like.cluster import Cluster
from alpa_like.errors import AlpaError, ClusterError, CommandError
from alpa_like.methods import Method, ShardParallel
from alpa_like.pipeshard import AutoStageOption, PipeshardParallel, UniformStageOption
from alpa_like.plan import Plan, StagePlan, itemsize, partition_spec
from alpa_like.runtime import session
from alpa_like.texts import bytes_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["main", "read_cluster"]

_CLOSED_PIPE, _INTERRUPTED = 128 + 13, 128 + 2  # as shells count a process that SIGPIPE or SIGINT ends

_MOST_DEVICES = 2**16
"""More than any machine has."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Writes to stdout and stderr."""
    options = parse(argv, __doc__)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # plans have a × in them, which not every terminal can show
    try:
        code = _COMMANDS[options.command](options)
        print(end="", flush=True)  # which is fine where there is no stdout at all
    except AlpaError as error:
        print(f"alpa-like: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # who reads has enough, as `head` has
        _forget_output()
        return _CLOSED_PIPE
    except OSError as error:
        if error.filename is None:
            _forget_output()
        print(f"alpa-like: {error.filename or 'the output'} can't be written: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code


def _forget_output() -> None:
    """What stdout still holds goes nowhere, so that the end of the process does not fail over it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---------------------------------------------------------------------------------------------- commands


def _plan(options: argparse.Namespace) -> int:
    _check_targets(options)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU that is here may be busy: leave it alone
    session.emulate(session.EMULATED_DEVICES)
    cluster = None if options.cluster.split(":")[0] == "local" else read_cluster(options.cluster)
    target = load_target(options.target, options.args)
    cluster = cluster or read_cluster(options.cluster)  # JAX starts here at the earliest
    step = _with_method(target.step, _method(options, target, cluster))
    with TheirCode(f"{step.__name__} of {target.where}"):
        plan = step.plan(*target.args, cluster=cluster)
    try:
        print(plan, flush=True)
    finally:  # a plan that took minutes is kept, whoever stopped reading
        if options.output:
            plan.save(options.output)
    _write_pictures(plan, options)
    return 0


def _show(options: argparse.Namespace) -> int:
    _check_targets(options)
    plan = Plan.load(options.plan)
    if options.shardings is None:
        print(plan)
    else:
        print(_table(_sharding_rows(plan, options.shardings)))
    _write_pictures(plan, options)
    return 0


def _diff(options: argparse.Namespace) -> int:
    if options.figure:
        _check_figure(options.figure)
    left, right = Plan.load(options.left), Plan.load(options.right)
    found = left.diff(right)
    if found:
        print(found)
    if options.figure:
        _write_figure(_viz().difference(left, right), options.figure)
    return 1 if found else 0


def _clusters(options: argparse.Namespace) -> int:
    if options.name is None and options.json:
        raise CommandError("--json writes one cluster: name it, as in `alpa-like clusters dgx-a100:4 --json`")
    if options.name is None:
        print(_table(_cluster_rows(make() for make in Cluster.presets().values())))
        print(
            "\nOne host each; B/s as one device sees them. `alpa-like clusters NAME` says where the figures are from."
        )
        return 0
    cluster = read_cluster(options.name)
    data = json.dumps(cluster.to_json(), indent=1, ensure_ascii=False)
    print(data if options.json else "\n".join(_cluster_lines(cluster)))
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "plan": _plan,
    "show": _show,
    "diff": _diff,
    "clusters": _clusters,
}


# ------------------------------------------------------------------------------------- what options mean


def read_cluster(text: str) -> Cluster:
    """The cluster of `NAME[:HOSTS[xDEVICES]]`, NAME being a preset, a JSON file or `local`.

    `p3.16xlarge:8` has 8 hosts, `dgx-a100:1x4` four devices of one. `CommandError` or `ClusterError` otherwise.
    """
    match = re.fullmatch(r"(.+?)(?::(\d+)(?:x(\d+))?)?", text)
    name, hosts, devices = match.groups() if match else (text, None, None)
    count = None if hosts is None else int(hosts)
    cluster = _named_cluster(name, count)
    if cluster.num_devices > _MOST_DEVICES:
        raise CommandError(f"{text} has {cluster.num_devices:.4g} devices; plans are made for at most {_MOST_DEVICES}")
    return cluster if devices is None else cluster.part(cluster.hosts, int(devices))


def _named_cluster(name: str, hosts: int | None) -> Cluster:
    presets = Cluster.presets()
    if name in presets:
        return presets[name](hosts=1 if hosts is None else hosts)
    if name == "local":
        session.emulate(session.EMULATED_DEVICES)
        found = Cluster.local()
        return found if hosts is None else found.part(hosts, found.devices_per_host)
    if not (name.endswith(".json") or Path(name).is_file()):
        raise CommandError(
            f"no cluster is named {name!r}; choose {', '.join(presets)}, local, or a JSON file that "
            "`alpa-like clusters NAME --json` wrote; `:4` behind the name makes it 4 hosts"
        )
    found = _cluster_of_file(name)
    return found if hosts is None else replace(found, hosts=hosts)


def _cluster_of_file(name: str) -> Cluster:
    try:
        return Cluster.from_json(json.loads(Path(name).read_text(encoding="utf-8")))
    except ClusterError as error:
        raise CommandError(f"the cluster file {name}: {error}") from None
    except OSError as error:
        raise CommandError(f"the cluster file {name} can't be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise CommandError(f"{name} is no JSON file ({error}); see `alpa-like clusters NAME --json`") from None
    except UnicodeDecodeError:
        raise CommandError(f"{name} is no text file; see `alpa-like clusters NAME --json`") from None


def _method(options: argparse.Namespace, target: Target, cluster: Cluster) -> Method:
    """The method that the options ask for; what they leave open is as the user's decorator says."""
    method = _named_method(options, target)
    changes: dict[str, Any] = {}
    if options.memory_budget is not None:
        changes["memory_budget_bytes"] = options.memory_budget
    if isinstance(method, PipeshardParallel):
        changes |= _pipeline_changes(options, cluster)
    elif options.mesh is not None:
        changes["mesh_shape"] = options.mesh
    return replace(method, **changes)


def _named_method(options: argparse.Namespace, target: Target) -> Method:
    name, pipeline = options.method, options.micro_batches or options.stages or options.schedule
    if name is None:
        method = target.step.method
        return PipeshardParallel() if pipeline and type(method) is ShardParallel else _checked(method, pipeline)
    known = METHODS.get(name.lower().removesuffix("parallel"))
    if known is not None:
        same = type(target.step.method) is known
        return _checked(target.step.method if same else known(), pipeline)
    found = getattr(target.module, name, None)
    if not isinstance(found, Method):
        raise CommandError(
            f"no method is named {name!r}; choose {', '.join(METHODS)}, or give the name of a method such as "
            f"`{name} = alpa.ManualParallel(…)` in {target.where}"
        )
    return _checked(found, pipeline)


def _checked(method: Method, pipeline: object) -> Method:
    if pipeline and not isinstance(method, PipeshardParallel):
        raise CommandError(
            f"--micro-batches, --stages and --schedule are for pipelines, but the method is {method.name}; use "
            "--method pipeshard"
        )
    return method


def _pipeline_changes(options: argparse.Namespace, cluster: Cluster) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if options.micro_batches is not None:
        changes["num_micro_batches"] = options.micro_batches
    if options.schedule is not None:
        changes["schedule"] = options.schedule
    if options.mesh is not None and options.mesh != "auto":
        stages = options.stages or max(1, cluster.num_devices // math.prod(options.mesh))
        changes["stage_option"] = UniformStageOption(stages, options.mesh)
    elif options.stages is not None:
        changes["stage_option"] = AutoStageOption(num_stages=options.stages)
    return changes


def _with_method(step: ParallelFunction, method: Method) -> ParallelFunction:
    """The same step by another method."""
    return parallelize(
        step.fun,
        method=method,
        donate_argnums=step.donate_argnums,
        batch_argnums=step.batch_argnums,
        static_argnums=step.static_argnums,
    )


# ---------------------------------------------------------------------------------------------- pictures


def _check_targets(options: argparse.Namespace) -> None:
    """`CommandError` for files that could not be written in the end, before any time is spent."""
    for path in (getattr(options, "output", None), options.trace):
        if path is not None:
            _check_folder(path)
    if options.figure is not None:
        _check_figure(options.figure)
    elif options.view is not None:
        raise CommandError(f"--view {options.view} says what --figure draws; name a file, as in --figure plan.png")


def _check_folder(path: str) -> None:
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise CommandError(f"{path} can't be written: there is no folder {Path(path).parent}")
    if Path(path).is_dir():
        raise CommandError(f"{path or repr(path)} can't be written: it is a folder; name a file")
    if not os.access(folder, os.W_OK):
        raise CommandError(f"{path} can't be written: you may not write into {folder}")


def _check_figure(path: str) -> None:
    _check_folder(path)
    _viz()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in kinds:
        raise CommandError(f"{path} must end in a kind of picture: {', '.join(f'.{k}' for k in sorted(kinds))}")


def _viz() -> Any:
    try:
        from alpa_like import viz
    except ModuleNotFoundError as error:
        raise CommandError(str(error)) from None
    return viz


def _write_pictures(plan: Plan, options: argparse.Namespace) -> None:
    if options.figure:
        _write_figure(getattr(_viz(), options.view or "overview")(plan), options.figure)
    if options.trace:
        plan.trace(options.trace)


def _write_figure(figure: Figure, path: str) -> None:
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise CommandError(f"the picture can't be written to {path}: {error.strerror}") from None


# ------------------------------------------------------------------------------------------------- text


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _sharding_rows(plan: Plan, pattern: str) -> list[tuple[str, ...]]:
    """Every argument, result and activation whose path the pattern finds, each once per stage that places it alike."""
    placed = [(p.path, p, s) for s in plan.stages for p in (*s.inputs, *s.outputs, *s.activations)]
    wanted = _finder(pattern)
    rows = [_sharding_row(p.shape, p.dtype, p.spec, path, s) for path, p, s in placed if wanted(path)]
    if not rows:
        names = ", ".join(dict.fromkeys(path for path, _, _ in placed[:3]))
        raise CommandError(f"none of {len(placed)} tensors is named like {pattern!r}; names are such as {names}")
    return [("tensor", "shape", "sharding", "mesh", "per device"), *dict.fromkeys(rows)]


def _sharding_row(shape: tuple[int, ...], dtype: str, spec: Any, path: str, stage: StagePlan) -> tuple[str, ...]:
    parts = math.prod(stage.mesh_shape[a] for axes in spec for a in axes)
    axes = ", ".join(f"{n}={k}" for n, k in zip(stage.axis_names, stage.mesh_shape, strict=True))
    return (
        path,
        f"{dtype}[{','.join(map(str, shape))}]",
        str(partition_spec(spec, stage.axis_names)).replace("PartitionSpec", "P"),
        f"{axes} from device {stage.devices[0]}",
        bytes_text(math.prod(shape) * itemsize(dtype) / parts),
    )


def _finder(pattern: str) -> Callable[[str], bool]:
    """Whether a path has the pattern in it; with `*` or `?`, which stand for any text or letter, whether it is like it.

    Brackets mean themselves, as paths are full of them.
    """
    if not set("*?") & set(pattern):
        return lambda path: pattern in path
    like = "".join({"*": ".*", "?": "."}.get(c) or re.escape(c) for c in pattern)
    return lambda path: re.fullmatch(like, path) is not None


def _cluster_rows(clusters: Iterable[Cluster]) -> list[tuple[str, ...]]:
    rows = [("name", "devices", "memory", "16 bit", "float32", "in a host", "between hosts")]
    for c in clusters:
        peaks = dict(c.device.peak_flops)
        short = "bfloat16" if "bfloat16" in peaks else "float16"
        rows.append(
            (
                c.name,
                f"{c.devices_per_host} {c.device.name}",
                bytes_text(c.device.memory_bytes),
                f"{peaks.get(short, 0.0) / 1e12:g} TFLOP/s",
                f"{peaks['float32'] / 1e12:g} TFLOP/s",
                f"{c.intra_host.bandwidth_bytes_per_s / 1e9:.3g} GB/s",
                f"{c.inter_host.bandwidth_bytes_per_s / 1e9:.3g} GB/s",
            )
        )
    return rows


def _cluster_lines(c: Cluster) -> list[str]:
    """Every figure of a cluster, and where it is from."""
    peaks = ", ".join(f"{dtype} {flops / 1e12:g}" for dtype, flops in c.device.peak_flops)
    links = (("in a host", c.intra_host), ("between hosts", c.inter_host))
    lines = [str(c), f"  peak TFLOP/s: {peaks}; large matmuls reach {100 * c.device.flops_efficiency:g} %"]
    lines.append(f"  memory: {bytes_text(c.device.memory_bytes)}, {c.device.memory_bandwidth_bytes_per_s / 1e9:g} GB/s")
    for where, link in links:
        speed = f"{link.bandwidth_bytes_per_s / 1e9:.4g} GB/s per device, {link.latency_s * 1e6:.3g} us per step"
        lines.append(f"  {where}: {speed}")
    lines += [f"  groups of {n} in a host: {speed / 1e9:.4g} GB/s per device" for n, speed in c.small_groups]
    return [*lines, "sources", *(f"  - {source}" for source in c.sources)]
