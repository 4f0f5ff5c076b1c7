"""What each JAX primitive does with the batch dim.

`rule(eqn, statuses, full)` gives the statuses (`batch_status`) of an equation's results for those of its operands, or
a `Mixed` that says why the result of one micro-batch would depend on the others. `full` are the shapes with the whole
batch, so a dim is the batch where an equation's shape differs from that. What primitives make of the batch itself
stands in `batch_split`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Var

from alpa_like.passes.avals import dtype_of
from alpa_like.passes.batch_split import SCATTER_SUMS, own_row, split
from alpa_like.passes.batch_status import (
    After,
    Found,
    Full,
    Mixed,
    Own,
    Reduced,
    Same,
    Split,
    Status,
    batch_dim,
    is_ordered,
    is_zero,
)
from alpa_like.passes.flat import inner_jaxprs, scan_counts, split_dims

__all__ = [
    "BODIES", "REMAT", "After", "Mixed", "Own", "Reduced", "Same", "Split", "Status",
    "entered", "is_drawn", "is_ordered", "own_row", "rule", "split_dims", "touches",
]  # fmt: skip

_MOVES = ("transpose", "reshape", "squeeze", "expand_dims", "copy", "copy_p", "name")
_UNIFORM = ("broadcast_in_dim", "iota")
"""What makes a batch dim along which nothing changes (an iota does if it counts along another dim)."""
REMAT = ("remat2", "remat", "checkpoint")


def rule(eqn: JaxprEqn, statuses: Sequence[Status], full: Full, *, inside: bool = False) -> Found:
    """The statuses of the results of an equation; `inside` of a body nothing can wait for the other shares."""
    if eqn.primitive.name == "optimization_barrier":
        return list(statuses)
    if eqn.primitive.name in BODIES:
        return _with_bodies(eqn, statuses, full)
    own = any(isinstance(s, Own) for s in statuses)
    shared = [Same() if isinstance(s, Own) else s for s in statuses] if own else list(statuses)
    if any(isinstance(s, After | Reduced) for s in shared):
        found = _combined(eqn, shared, full, inside)
    elif any(isinstance(s, Split) for s in shared):
        found = split(eqn, shared, full)
    elif own and is_drawn(eqn, shared, full):
        return Mixed(f"{eqn.primitive.name} makes something for every example from the micro-batch's own numbers")
    else:
        found = _all_same(eqn, shared, full)
    return found if isinstance(found, Mixed) or not own else [Own() if isinstance(s, Same) else s for s in found]


def is_drawn(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> bool:
    """Whether an equation is to be run for the whole batch, and its results cut.

    It reads nothing of the batch and yet depends on its size: random bits, positions, keys by example.
    """
    if not all(isinstance(s, Same) for s in statuses) or not touches(eqn, full):
        return False
    if eqn.primitive.name in BODIES:
        return isinstance(_through_bodies(eqn, statuses, full), Mixed)
    return not _is_uniform(eqn, full)


def _all_same(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    zero = eqn.primitive.name in ("broadcast_in_dim", "convert_element_type", "neg", *_MOVES)
    zero = zero and all(is_zero(v, s) for v, s in zip(eqn.invars, statuses, strict=True))
    found: list[Status] = []
    for out in eqn.outvars:
        born = split_dims(out, full)
        if len(born) > 1:
            return Mixed("a result has the batch in two dims")
        found.append(_born(eqn, born[0], full, zero) if born else Same(zero))
    return found


def _born(eqn: JaxprEqn, dim: int, full: Full, zero: bool) -> Split:
    if _is_uniform(eqn, full):
        return Split(dim, None, "never" if zero else None)
    return Split(dim, 1, "place" if eqn.primitive.name == "iota" else None)


def _is_uniform(eqn: JaxprEqn, full: Full) -> bool:
    return eqn.primitive.name in _UNIFORM and eqn.params.get("dimension") not in split_dims(eqn.outvars[0], full)


def touches(eqn: JaxprEqn, full: Full) -> bool:
    """Whether the batch is a dim of anything in an equation."""
    if any(split_dims(v, full) for v in (*eqn.invars, *eqn.outvars)):
        return True
    if eqn.primitive.name not in BODIES:
        return False
    return any(touches(inner, full) for body in inner_jaxprs(eqn) for inner in body.jaxpr.eqns)


# --------------------------------------------------------------------------------------------- shares and totals


def _combined(eqn: JaxprEqn, statuses: Sequence[Status], full: Full, inside: bool) -> Found:
    """Linear equations hand a sum of shares on as one; others wait until all shares are there."""
    if any(isinstance(s, Split) for s in statuses):
        return Mixed("a sum (or another result) of the whole batch meets the examples")
    if any(split_dims(v, full) for v in eqn.outvars):
        return Mixed("a sum (or another result) of the whole batch is repeated for every example")
    ops = {s.op for s in statuses if isinstance(s, Reduced)}
    if len(ops) == 1 and not any(isinstance(s, After) for s in statuses):
        op = ops.pop()
        linear = eqn.primitive.name in _MOVES or (op == "add" and _hands_on(eqn, statuses))
        if linear or (op == "add" and inside and _could_hand_on(eqn, statuses)):
            return [Reduced(op)] * len(eqn.outvars)
    return [After()] * len(eqn.outvars)


def _hands_on(eqn: JaxprEqn, statuses: Sequence[Status]) -> bool:
    """Whether f(Σ share) = Σ f(share)."""
    name = eqn.primitive.name
    shares = [isinstance(s, Reduced) for s in statuses]
    rest = [is_zero(v, s) for v, s, share in zip(eqn.invars, statuses, shares, strict=True) if not share]
    if name == "convert_element_type":
        return _widens(dtype_of(eqn.invars[0]), dtype_of(eqn.outvars[0]))
    if name in ("add", "add_any", "sub", "concatenate"):
        return all(rest)
    if name in ("neg", "reduce_sum", "slice"):
        return all(shares)
    if name == "mul":
        return sum(shares) == 1
    # whole numbers are rounded when they are divided
    return name == "div" and shares == [True, False] and jnp.issubdtype(dtype_of(eqn.outvars[0]), jnp.inexact)


def _could_hand_on(eqn: JaxprEqn, statuses: Sequence[Status]) -> bool:
    """The same for equations that had better run once, on the whole sum, but in a loop must run now."""
    shares = [isinstance(s, Reduced) for s in statuses]
    linear = [a or is_zero(v, s) for a, v, s in zip(shares, eqn.invars, statuses, strict=True)]
    match eqn.primitive.name:
        case "broadcast_in_dim" | "rev" | "pad":
            return all(linear)
        case "dot_general":
            return sum(shares) == 1
        case "dynamic_slice":
            return sum(shares) == 1 == shares[0]
        case "dynamic_update_slice":
            return all(linear[:2]) and not any(shares[2:])
        case "select_n":
            return not shares[0] and all(linear[1:])
        case name if name in SCATTER_SUMS:
            return linear[0] and not shares[1] and linear[2]
        case _:
            return False


def _widens(source: Any, target: Any) -> bool:
    """Whether a conversion loses nothing, so that the sum may be taken after it. Whole numbers may wrap around."""
    if source == target:
        return True
    floats = all(jnp.issubdtype(t, jnp.floating) for t in (source, target))
    return floats and target.itemsize > source.itemsize


# ------------------------------------------------------------------------------------------- loops and conditions


def entered(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[list[Status]] | Mixed:
    """The statuses with which the bodies of an equation begin in any turn, in the order of `inner_jaxprs`."""
    return BODIES[eqn.primitive.name](eqn, statuses, full)


def _with_bodies(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    found = _through_bodies(eqn, statuses, full)
    if not isinstance(found, Mixed):
        return found
    if any(isinstance(s, Split | Own) for s in statuses):
        return found
    if all(isinstance(s, Same) for s in statuses):
        return _all_same(eqn, statuses, full)
    return found if touches(eqn, full) else [After() for _ in eqn.outvars]


def _through_bodies(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> Found:
    entries = entered(eqn, statuses, full)
    if isinstance(entries, Mixed):
        return entries
    outs: list[list[Status]] = []
    for body, entry in zip(inner_jaxprs(eqn), entries, strict=True):
        found = _results(body.jaxpr, entry, full)
        if isinstance(found, Mixed):
            return found
        outs.append(list(found))
    return _ENDS[eqn.primitive.name](eqn, entries, outs)


def _results(body: Jaxpr, entry: Sequence[Status], full: Full) -> Found:
    """The statuses of a body's results."""
    env: dict[Any, Status] = dict(zip(body.invars, entry, strict=True))
    env.update((v, Same()) for v in body.constvars)
    for eqn in body.eqns:
        found = rule(eqn, [_status(env, v) for v in eqn.invars], full, inside=True)
        if isinstance(found, Mixed):
            return found
        if any(isinstance(s, After) for s in found):
            return Mixed(f"inside a loop or condition {eqn.primitive.name} needs a sum over the whole batch")
        env.update(zip(eqn.outvars, found, strict=True))
    return [_status(env, v) for v in body.outvars]


def _status(env: Mapping[Any, Status], atom: Any) -> Status:
    return env[atom] if isinstance(atom, Var) else Same(is_zero(atom, Same()))


def _join(left: Sequence[Status], right: Sequence[Status]) -> Found:
    """What holds for values that may be one or the other."""
    joined = [_either(a, b) or _either(b, a) for a, b in zip(left, right, strict=True)]
    return Mixed("values that may take each other's place are of different kinds") if None in joined else joined  # pyright: ignore[reportReturnType]


def _either(left: Status, right: Status) -> Status | None:
    match left, right:
        case Same(), Same():
            return Same(left.zero and right.zero)
        case Same(zero=True), Reduced(op="add"):
            return right
        case Split(), Split() if left.dim == right.dim and (left.outer == right.outer or left.outer is None):
            return replace(right, fact=left.fact if left.fact == right.fact else None)
        case _:
            return left if left == right else None


def _fixed(turn: Callable[[list[Status]], Found], carry: list[Status]) -> Found:
    """The statuses of what a loop carries that one more turn does not change."""
    while True:
        found = turn(carry)
        joined = found if isinstance(found, Mixed) else _join(carry, found)
        if isinstance(joined, Mixed) or list(joined) == carry:
            return joined
        carry = list(joined)


def _enter_scan(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[list[Status]] | Mixed:
    consts, carries = scan_counts(eqn)
    rows = statuses[consts + carries :]
    if any(batch_dim(s) == 0 for s in rows):
        return Mixed("the loop runs over the examples")
    xs = [replace(s, dim=s.dim - 1) if isinstance(s, Split) else s for s in rows]
    fixed = list(statuses[:consts])

    def turn(carry: list[Status]) -> Found:
        found = _results(eqn.params["jaxpr"].jaxpr, [*fixed, *carry, *xs], full)
        return found if isinstance(found, Mixed) else found[:carries]

    carry = _fixed(turn, list(statuses[consts : consts + carries]))
    return carry if isinstance(carry, Mixed) else [[*fixed, *carry, *xs]]


def _leave_scan(eqn: JaxprEqn, entries: list[list[Status]], outs: list[list[Status]]) -> Found:
    consts, carries = scan_counts(eqn)
    ys = [replace(s, dim=s.dim + 1) if isinstance(s, Split) else s for s in outs[0][carries:]]
    return [*entries[0][consts : consts + carries], *ys]


def _enter_while(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[list[Status]] | Mixed:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    fixed = list(statuses[first : first + second])
    begin = list(statuses[first + second :])
    carry = _fixed(lambda carry: _results(eqn.params["body_jaxpr"].jaxpr, [*fixed, *carry], full), begin)
    if isinstance(carry, Mixed):
        return carry
    condition = [*statuses[:first], *carry]
    again = _results(eqn.params["cond_jaxpr"].jaxpr, condition, full)
    if isinstance(again, Mixed) or not all(isinstance(s, Same) for s in again):
        return Mixed("how long a loop runs depends on the examples")
    return [condition, [*fixed, *carry]]


def _leave_while(eqn: JaxprEqn, entries: list[list[Status]], outs: list[list[Status]]) -> Found:
    return entries[1][eqn.params["body_nconsts"] :]


def _enter_cond(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[list[Status]] | Mixed:
    if not isinstance(statuses[0], Same):
        return Mixed("a condition depends on the examples")
    return [list(statuses[1:]) for _ in eqn.params["branches"]]


def _leave_cond(eqn: JaxprEqn, entries: list[list[Status]], outs: list[list[Status]]) -> Found:
    joined: Found = outs[0]
    for other in outs[1:]:
        joined = joined if isinstance(joined, Mixed) else _join(joined, other)
    return joined


def _enter_once(eqn: JaxprEqn, statuses: Sequence[Status], full: Full) -> list[list[Status]] | Mixed:
    return [list(statuses)]


def _leave_once(eqn: JaxprEqn, entries: list[list[Status]], outs: list[list[Status]]) -> Found:
    return outs[0]


BODIES: dict[str, Callable[..., list[list[Status]] | Mixed]] = {
    "scan": _enter_scan,
    "while": _enter_while,
    "cond": _enter_cond,
    **dict.fromkeys(REMAT, _enter_once),
}
"""The primitives that run bodies, after all calls have been stepped into."""

_ENDS: dict[str, Callable[..., Found]] = {
    "scan": _leave_scan,
    "while": _leave_while,
    "cond": _leave_cond,
    **dict.fromkeys(REMAT, _leave_once),
}
