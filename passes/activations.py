"""The activations of a step and how a decision lays them out, for people to see."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from alpa_like.graph import Op, OpGraph, batch_dims
from alpa_like.passes.groups import Groups, Member
from alpa_like.passes.pins import PinWriter
from alpa_like.plan import Placed

__all__ = ["activations"]

_DTYPES = {"f": "float", "i": "int", "ui": "uint", "bf": "bfloat"}
_LEAST = 0.01
"""Activations below this share of the largest one are left out: statistics of a normalization, masks."""


def activations(groups: Groups, batch: Sequence[int], writer: PinWriter) -> tuple[Placed, ...]:
    """One activation for every group of tensors of the forward pass that must lie alike, in program order.

    Each is the largest tensor of its group that follows from the batch (argument numbers `batch`), named by the name
    stack of the op that makes it. What the backward pass and the update make is left out.
    """
    graph = groups.graph
    marked = batch_dims(graph, frozenset(graph.arguments[i] for i in batch))
    found = sorted(t for t in (_largest(graph, members, marked) for members in groups.by_group) if t >= 0)
    most = max((graph.tensors[t].bytes for t in found), default=0)
    return tuple(_placed(graph, t, writer) for t in found if graph.tensors[t].bytes >= _LEAST * most)


def _largest(graph: OpGraph, members: Sequence[Member], marked: dict[int, frozenset[int]]) -> int:
    """The largest activation of a group, the first of equal ones; -1 where there is none."""
    mine = [m.tensor for m in members if m.version == "home" and m.tensor in marked and _is_forward(graph, m.tensor)]
    return max(mine, key=lambda t: (graph.tensors[t].bytes, _is_named(graph, t), -t), default=-1)


def _is_forward(graph: OpGraph, tensor: int) -> bool:
    maker = _maker(graph, tensor)
    return maker is not None and "transpose(" not in maker.source


def _is_named(graph: OpGraph, tensor: int) -> bool:
    """Whether a module made it, which says more to people than where no name is."""
    maker = _maker(graph, tensor)
    return maker is not None and "/" in _label(maker)


def _maker(graph: OpGraph, tensor: int) -> Op | None:
    op = graph.tensors[tensor].op
    return graph.ops[op] if op >= 0 else None


def _placed(graph: OpGraph, tensor: int, writer: PinWriter) -> Placed:
    maker = graph.ops[graph.tensors[tensor].op]
    t = graph.tensors[tensor]
    return Placed(_label(maker), t.shape, _dtype(t.dtype), writer.spec(tensor, "home"))


def _label(op: Op) -> str:
    """`GPT/h0/attn/qkv` for the source `jvp(GPT)/h0/attn/qkv/dot_general`; the op's name where no module has one."""
    parts = [p for p in _unwrapped(op.source) if p]
    return "/".join(parts[:-1] if len(parts) > 1 else parts) or op.name.partition(".")[2] or op.name


def _unwrapped(source: str) -> Iterator[str]:
    """The parts of a name stack without the transformations around them: `jvp(GPT)` is `GPT`, `jit(relu)` nothing."""
    for part in source.split("/"):
        name = part
        while found := re.fullmatch(r"(\w+)\((.*)\)", name):
            name = "" if found[1] in ("jit", "pjit") else found[2]
        yield name


def _dtype(name: str) -> str:
    """NumPy's name of an MLIR element type: `bfloat16` for `bf16`, `bool` for `i1`."""
    if name == "i1":
        return "bool"
    found = re.fullmatch(r"(f|i|ui|bf)(\d+)", name)
    return f"{_DTYPES[found[1]]}{found[2]}" if found else name
