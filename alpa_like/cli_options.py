"""The options of the command `alpa-like`, and the texts of its help."""

from __future__ import annotations

import argparse
import inspect
import math
import re
from collections.abc import Sequence
from typing import Any

from alpa_like.cli_target import DEFAULT_ARGS, DEFAULT_STEP
from alpa_like.methods import DataParallel, Method, ShardParallel, Zero2Parallel, Zero3Parallel
from alpa_like.pipeshard import PipeshardParallel
from alpa_like.schedule import SCHEDULES

__all__ = ["METHODS", "parse"]

METHODS: dict[str, type[Method]] = {
    "shard": ShardParallel,
    "data": DataParallel,
    "zero2": Zero2Parallel,
    "zero3": Zero3Parallel,
    "pipeshard": PipeshardParallel,
}
VIEWS = ("overview", "stages", "shardings", "timeline", "memory", "breakdown", "tradeoff")
_PREFIXES = {f"{p}{b}": k**n for b, k in (("B", 1000), ("iB", 1024)) for n, p in enumerate("KMGT", 1)}
_UNITS = {"": 1, "B": 1, **_PREFIXES}


def parse(argv: Sequence[str] | None, docstring: str | None) -> argparse.Namespace:
    """The options of one command, whose name is `command`; ends the process for help and for wrong options."""
    parser = argparse.ArgumentParser(
        prog="alpa-like", description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, summary, text, fill in (
        ("plan", "plan a train step for a cluster", _PLAN_TEXT, _plan_options),
        ("show", "print and draw a plan", _SHOW_TEXT, _show_options),
        ("diff", "say what two plans decide differently", _DIFF_TEXT, _diff_options),
        ("clusters", "list the clusters known by name", _CLUSTERS_TEXT, _cluster_options),
    ):
        text = inspect.cleandoc(text)
        fill(commands.add_parser(name, help=summary, description=text, formatter_class=parser.formatter_class))
    return parser.parse_args(argv)


def _mesh(text: str) -> Any:
    """`auto`, `8`, `2x4`, …"""
    if text == "auto":
        return "auto"
    sizes = text.split("x")
    if not (1 <= len(sizes) <= 3 and all(s.isdecimal() and int(s) for s in sizes)):
        raise argparse.ArgumentTypeError(f"expected auto or 1 to 3 sizes such as 8, 2x4 or 2x2x2, found {text!r}")
    return tuple(map(int, sizes))


def _count(text: str) -> int:
    """A whole number from 1 on."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _bytes(text: str) -> float:
    """A number of bytes with a unit or without: `12GiB`, `500 MB`, `1e9`."""
    match = re.fullmatch(r"([\d.]+(?:[eE]\+?\d+)?) ?([KMGT]?(?:iB|B)|)", text)
    try:
        value = float(match[1]) * _UNITS[match[2]] if match else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected bytes such as 12GiB, 500MB or 1e9, found {text!r}")
    return value


_PLAN_TEXT = f"""
    Plan a train step for a cluster that need not be here. Nothing is allocated, and no step runs on a device; only
    `--cluster local` measures the devices here, the first time.

    The file is imported, so keep what is to run below `if __name__ == "__main__":`. It holds the step, decorated with
    @alpa.parallelize or not, and a function that says what it is called with:

        def train_step(state, batch): ...

        def {DEFAULT_ARGS}():              # only traced, for its shapes: jax.eval_shape
            return init_state(jax.random.key(0)), {{"x": jnp.zeros((128, 512)), "y": jnp.zeros(128, int)}}

    Instead of a function, NAME may be an `alpa_like.models.Task`, which knows its arguments.

    examples
        alpa-like plan train.py --cluster dgx-a100
        alpa-like plan train.py:train_step --cluster p3.16xlarge:8 --micro-batches 64 -o plan.json --figure plan.png
        alpa-like plan my.package.train:step --args small --cluster dgx-h100:1x4 --method zero3 --memory-budget 40GiB
"""


def _plan_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "target",
        metavar="FILE.py[:NAME]",
        help=f"the step: a file or a dotted module, and the name in it ({DEFAULT_STEP} if not given)",
    )
    p.add_argument(
        "--args",
        metavar="NAME",
        help=f"what returns the step's arguments, arrays or shapes, or is a tuple of them ({DEFAULT_ARGS})",
    )
    p.add_argument(
        "--cluster",
        default="local",
        metavar="CLUSTER",
        help="NAME, NAME:HOSTS or NAME:HOSTSxDEVICES, with the name of a preset (see `alpa-like clusters`), a JSON "
        "file of a cluster, or local: the devices here, 8 emulated ones if there is only a CPU (the default)",
    )
    p.add_argument(
        "--method",
        metavar="METHOD",
        help=f"{', '.join(METHODS)}, or the name of a method in the file; by default that of the decorator",
    )
    p.add_argument(
        "--mesh",
        type=_mesh,
        metavar="SIZES",
        help="auto, or such as 8 or 2x4; with a pipeline the mesh of every one of equal stages",
    )
    p.add_argument("--micro-batches", type=_count, metavar="N", help="cut the batch into N parts: a pipeline")
    p.add_argument("--stages", type=_count, metavar="N", help="how many stages the pipeline has")
    p.add_argument("--schedule", choices=("auto", *SCHEDULES), help="in which order its micro-batches run")
    p.add_argument(
        "--memory-budget", type=_bytes, metavar="BYTES", help="per device, such as 12GiB; by default all that it has"
    )
    p.add_argument("-o", "--output", metavar="PLAN.json", help="save the plan, for alpa.Plan.load and the commands")
    _picture_options(p)


_SHOW_TEXT = """
    Print a saved plan as text, or the sharding of every tensor in it; draw it.

    examples
        alpa-like show plan.json
        alpa-like show plan.json --figure step.png --view timeline
        alpa-like show plan.json --shardings                       # every argument, result and activation
        alpa-like show plan.json --shardings kernel                # those with "kernel" in their path
        alpa-like show plan.json --shardings "state.params*bias']" # those that are like it
"""


def _show_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("plan", metavar="PLAN.json")
    p.add_argument(
        "--shardings", nargs="?", const="", metavar="PATTERN", help="list tensors instead; * and ? stand for anything"
    )
    _picture_options(p)


_DIFF_TEXT = """
    Say what the second plan decides differently, one line each. The exit code is 0 where both decide the same, else 1.

    example
        alpa-like diff dgx-a100.json p3.json --figure difference.png
"""


def _diff_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("left", metavar="A.json")
    p.add_argument("right", metavar="B.json")
    p.add_argument("--figure", metavar="FILE.png", help="draw both beside each other")


_CLUSTERS_TEXT = """
    List the clusters known by name, or say all about one. A cluster is a small JSON file: write one out, change its
    figures to those of your machines, and plan for it.

    examples
        alpa-like clusters
        alpa-like clusters dgx-h100
        alpa-like clusters dgx-h100:4 --json > mine.json && alpa-like plan train.py --cluster mine.json
"""


def _cluster_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", nargs="?", metavar="NAME[:HOSTS]")
    p.add_argument("--json", action="store_true", help="as a file to edit and to plan with")


def _picture_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--figure", metavar="FILE.png", help="draw the plan; .svg and .pdf are fine too")
    p.add_argument("--view", choices=VIEWS, help="what to draw (overview)")
    p.add_argument("--trace", metavar="FILE.json", help="the simulated pipeline, for https://ui.perfetto.dev")
