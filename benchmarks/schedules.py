"""Pipeline schedules, simulated, beside the closed forms of their papers. Needs no device.

    python -m benchmarks.schedules                          # 4 and 8 meshes, 8 to 64 micro-batches
    python -m benchmarks.schedules --shapes 16x64 --send 0.5

Every mesh has the same share of the model: 1 s of forward, 1 s of gradients of inputs and 1 s of gradients of weights
per micro-batch; `interleaved-1f1b` cuts it into several stages per mesh.

- bubble: share of all meshes' time from the first task to the last in which they run none.
- idle: seconds that a mesh waits between its own first and last task, the most of any mesh. This is what the paper of
  the zero-bubble schedules (Qi et al. 2023) compares: what is lost per step when steps follow without a barrier.
- held: micro-batches whose activations a mesh holds at once, the most of any mesh; one stage of two counts as half.
- step: seconds of one step when sends are free, and when each takes `--send` seconds.

Closed forms hold where M >= 2 S - 1 (zero bubbles) and where the meshes divide M (interleaved); `-` elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from alpa_like.schedule import SCHEDULES, make_schedule
from alpa_like.simulate import Times, simulate
from benchmarks.common import parser, table

HEADS: tuple[str, ...] = (
    "schedule",
    "bubble %",
    "closed form",
    "idle s",
    "closed form",
    "held",
    "step s",
    "with sends",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one table per shape."""
    options = _options(arguments)
    for meshes, micro_batches in options.shapes:
        print(f"{meshes} meshes, {micro_batches} micro-batches, {options.chunks} stages per mesh where interleaved\n")
        rows = _rows(meshes, micro_batches, options.chunks, options.send)
        print(f"{table(HEADS, rows)}\n")


def _rows(meshes: int, micro_batches: int, chunks: int, send_s: float) -> Iterator[tuple[str, ...]]:
    for name in SCHEDULES:
        parts = chunks if name == "interleaved-1f1b" else 1
        stages = meshes * parts
        schedule = make_schedule(name, stages, micro_batches, meshes).verify()
        found, late = (
            simulate(
                schedule, Times.uniform(stages, 1 / parts, 2 / parts, send_s=s), activation_bytes=(1 / parts,) * stages
            )
            for s in (0, send_s)
        )
        step, idle = _closed_forms(name, meshes, micro_batches, parts)
        busy = micro_batches * (3 if schedule.trains else 1)
        yield (
            name,
            f"{100 * found.bubble_fraction:.2f}",
            "-" if step is None else f"{100 * (1 - busy / step):.2f}",
            f"{max(found.idle_s):.2f}",
            "-" if idle is None else f"{idle:.2f}",
            f"{max(found.peak_bytes):.4g}",
            f"{found.makespan_s:.2f}",
            f"{late.makespan_s:.2f}",
        )


def _closed_forms(name: str, meshes: int, micro_batches: int, parts: int) -> tuple[float | None, float | None]:
    """Seconds of a step and the most that a mesh is idle, or `None` where the papers give none."""
    ramp = meshes - 1
    if name == "inference":
        return micro_batches + ramp, 0
    if name.startswith("zb"):
        if micro_batches < 2 * meshes - 1:
            return None, None
        return 3 * micro_batches + ramp, ramp if name == "zb-h1" else 0
    if parts > 1 and micro_batches % meshes:
        return None, None
    return 3 * (micro_batches + ramp / parts), 3 * ramp / parts


def _shapes(text: str) -> list[tuple[int, int]]:
    """`4x8,8x32`: meshes × micro-batches."""
    pairs = [part.split("x") for part in text.split(",")]
    if not all(len(pair) == 2 and all(n.isdigit() and int(n) for n in pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"expected meshes x micro-batches such as 4x8 or 4x8,8x32, found {text!r}")
    return [(int(meshes), int(micro_batches)) for meshes, micro_batches in pairs]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--shapes", type=_shapes, default=_shapes("4x8,4x30,8x16,8x64"))
    p.add_argument("--chunks", type=int, default=2)
    p.add_argument("--send", type=float, default=0.25)
    return p.parse_args(arguments)


if __name__ == "__main__":
    main()
