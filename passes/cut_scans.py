"""A traced step whose model scans over its layers → the same step with the loop cut, as a trace of its own.

Arguments that stack all layers become one argument per part; `CutTrace` says which, so that the runtime can hand the
user whole values.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from alpa_like.chunked import bounds
from alpa_like.passes.scans import Cuts, split_scans, stacked_scan_lengths
from alpa_like.tracer import Leaf, Trace

__all__ = ["CutTrace", "cut_trace", "equal_parts", "layer_loop"]


@dataclass(frozen=True)
class CutTrace:
    """`trace` is the step with its loop cut; `inputs` and `outputs` give, per flat argument and result of the step
    itself, the lengths of its parts along dim 0, None for those that stay whole."""

    trace: Trace
    inputs: tuple[Cuts, ...]
    outputs: tuple[Cuts, ...]


def layer_loop(trace: Trace) -> int | None:
    """The length of the loop over layers, None where there is none."""
    lengths = [n for n in stacked_scan_lengths(trace.jaxpr) if n > 1]
    return lengths[0] if lengths else None


def equal_parts(length: int, count: int) -> tuple[int, ...]:
    """`count` lengths that differ by at most one."""
    cuts = [i * length // count for i in range(count + 1)]
    return tuple(b - a for a, b in itertools.pairwise(cuts))


def cut_trace(trace: Trace, length: int, lengths: Sequence[int]) -> CutTrace:
    """Cut the loop of `length` layers into parts."""
    split = split_scans(trace.jaxpr, lengths, scan_length=length, pairs=trace.stored)
    arguments, starts = _leaves(trace.arguments, split.inputs)
    results, ends = _leaves(trace.results, split.outputs)
    avals = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in split.jaxpr.jaxpr.invars)
    stored = tuple((starts[a] + k, ends[r] + k) for a, r in trace.stored for k in range(len(split.inputs[a] or (0,))))
    donated = tuple(starts[i] + k for i in trace.donated_leaves for k in range(len(split.inputs[i] or (0,))))
    batch = tuple(starts[i] for i in trace.batch)

    def again(*leaves: Any) -> Any:
        whole = [leaves[starts[i]] if cuts is None else trace.avals[i] for i, cuts in enumerate(split.inputs)]
        assert trace.again is not None
        return split_scans(trace.again(*whole), lengths, scan_length=length, pairs=trace.stored).jaxpr

    cut = Trace(
        trace.name,
        split.jaxpr,
        jax.tree.structure(tuple(range(len(arguments)))),
        jax.tree.structure(list(range(len(results)))),
        arguments,
        results,
        avals,
        stored,
        donated,
        batch,
        again,
        trace.platform,
    )
    return CutTrace(cut, split.inputs, split.outputs)


def _leaves(leaves: Sequence[Leaf], cuts: Sequence[Cuts]) -> tuple[tuple[Leaf, ...], list[int]]:
    """The leaves with parts in place, and the number of the first part of each."""
    found: list[Leaf] = []
    starts: list[int] = []
    for leaf, lengths in zip(leaves, cuts, strict=True):
        starts.append(len(found))
        if lengths is None:
            found.append(leaf)
        else:
            rows = bounds(lengths)
            found.extend(Leaf(f"{leaf.path}[{a}:{b}]", (b - a, *leaf.shape[1:]), leaf.dtype) for a, b in rows)
    return tuple(found), starts
