"""One step over the whole batch → the same step over micro-batches, with the meaning of the whole batch.

The step is traced for the whole batch and for one twice as large. The two programs have the same equations; sizes
that differ follow the batch, and are read off for the size of a micro-batch. Numbers (the divisor of a mean) are those
of the whole batch, so that what each micro-batch computes is its share of the whole. Every equation then belongs to
one of

    micro   runs for every micro-batch; sums over the batch are accumulated share by share
    after   runs once, when all shares are there: the optimizer's update
    before  runs once on the whole batch: numbers that the examples need of all others, such as the count of
            unmasked tokens, as long as they follow from the batch without any parameter

Random bits are drawn for the whole batch and cut, so that dropout masks are those of `jax.jit`.

Contract
    Input: a `Trace` and the number of micro-batches. Output: `MicroProgram`.
    Raises: `MethodError` where the batch does not divide; `TraceError` where one example's result depends on others
    in a way that micro-batches can't keep (batch statistics), unless the option for it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from alpa_like.errors import MethodError, TraceError
from alpa_like.passes.batch_rules import After, Mixed, Own, Reduced, Same, Split, Status, rule, split_dims
from alpa_like.passes.flat import Flat, flatten, inner_jaxprs, reads
from alpa_like.tracer import Trace

__all__ = ["MicroProgram", "split_batch"]

_PLACED = ("random_bits", "rng_uniform", "iota")
"""What makes numbers that depend on the place in the batch, by a parameter `shape`."""


@dataclass(frozen=True)
class MicroProgram:
    """A step in micro-batches. A variable of `accumulated` is a share in `micro` and the whole in `after`.

    `inputs` and `outputs` stand for the flat arguments and results of the step, batch arguments as one micro-batch.
    `index` is the number of the micro-batch, an int32, None where nothing reads it. `before` reads `whole_batch`, the
    batch arguments as they are given, and makes `prepared`.
    """

    num_micro_batches: int
    micro: tuple[JaxprEqn, ...]
    after: tuple[JaxprEqn, ...]
    before: tuple[JaxprEqn, ...]
    inputs: tuple[Var, ...]
    outputs: tuple[Any, ...]
    whole_batch: dict[Var, Var]
    prepared: tuple[tuple[Var, Var], ...]
    constants: dict[Var, Any]
    statuses: dict[Var, Status]
    accumulated: dict[Var, str]
    index: Var | None


def split_batch(trace: Trace, num_micro_batches: int, *, statistics: str = "error") -> MicroProgram:
    """Cut a step into micro-batches. `statistics`: "error", or "micro_batch" to take batch statistics per micro-batch."""
    size = batch_size(trace)
    if num_micro_batches < 1 or size % num_micro_batches:
        raise MethodError(
            f"num_micro_batches is {num_micro_batches}, which does not divide the batch of {size} examples; "
            f"choose one of {', '.join(str(n) for n in range(1, size + 1) if size % n == 0)}"
        )
    whole = flatten(trace.jaxpr)
    resizer = _Resizer(size, size // num_micro_batches)
    flat = resizer.flat(whole, flatten(_retraced(trace, 2 * size)))
    statistics = "micro_batch" if num_micro_batches == 1 else statistics  # one micro-batch has those of the batch
    return _Analysis(trace, flat, resizer, whole, num_micro_batches, statistics).program()


def batch_size(trace: Trace) -> int:
    """How many examples a step takes. `MethodError` where its batch arguments have none, or different counts."""
    shapes = {trace.arguments[i].path: trace.arguments[i].shape for i in trace.batch if trace.arguments[i].shape}
    sizes = {shape[0] for shape in shapes.values()}
    if len(sizes) != 1:
        found = ", ".join(f"{path} {shape}" for path, shape in list(shapes.items())[:4]) or "none"
        raise MethodError(
            f"micro-batches need batch arguments with one common dim 0, but {trace.name} has {found}; name the batch in "
            "batch_argnums"
        )
    return sizes.pop()


def _retraced(trace: Trace, size: int) -> ClosedJaxpr:
    try:
        return trace.at_batch_size(size)
    except Exception as error:  # whatever the user's function raises for another batch size
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TraceError(
            f"{trace.name} can't be traced for a batch of {size} examples: {line}. Micro-batches need a step that takes "
            "its batch size from the arguments' shapes instead of a constant"
        ) from error


# --------------------------------------------------------------------------------- two traces become one program


@dataclass
class _Resizer:
    """Turns a program for `size` examples, and its twin for twice as many, into one for `part` examples.

    `full` are the shapes for the whole batch (for twice the batch, if the part is the whole); `twins` the variables of
    the program for `size` examples.
    """

    size: int
    part: int
    full: dict[Var, tuple[int, ...]] = field(default_factory=dict)
    twins: dict[Var, Var] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.new = core.gensym()

    def flat(self, whole: Flat, twice: Flat) -> Flat:
        self.same(len(whole.equations) == len(twice.equations), None)
        env: dict[Any, Any] = {}
        inputs = self.made(env, whole.inputs, twice.inputs)
        for mine, other in zip(whole.constants, twice.constants, strict=True):
            self.same(mine.aval.shape == other.aval.shape, None)
            self.made(env, [mine], [mine])
        merged = [self.equation(env, *pair) for pair in zip(whole.equations, twice.equations, strict=True)]
        outputs = tuple(v if isinstance(v, Literal) else env[v] for v in whole.outputs)
        return Flat(tuple(merged), inputs, outputs, {env[v]: value for v, value in whole.constants.items()})

    def same(self, holds: bool, eqn: JaxprEqn | None) -> None:
        if not holds:
            where = f" at {eqn.primitive.name} ({eqn.source_info.name_stack})" if eqn is not None else ""
            raise TraceError(
                f"for a batch twice as large the step is another program{where}; micro-batches need the same operations "
                "for every batch size: no loop over the batch, and no choice that depends on its size"
            )

    def made(self, env: dict[Any, Any], whole: Sequence[Any], twice: Sequence[Any]) -> tuple[Var, ...]:
        """New variables with the shapes of the part."""
        found: list[Var] = []
        for mine, other in zip(whole, twice, strict=True):
            aval, large = mine.aval, tuple(getattr(other.aval, "shape", ()))
            if large != tuple(getattr(aval, "shape", ())):
                aval = aval.update(shape=self.sized(tuple(aval.shape), large))
            var = self.new(aval)
            self.full[var] = large if self.part == self.size else tuple(getattr(mine.aval, "shape", ()))
            self.twins[var] = mine
            env[mine] = var
            found.append(var)
        return tuple(found)

    def sized(self, whole: Any, twice: Any) -> Any:
        """A parameter for the part: whole numbers that grow with the batch do so linearly."""
        if type(whole) in (tuple, list) and type(twice) is type(whole) and len(whole) == len(twice):
            return type(whole)(self.sized(a, b) for a, b in zip(whole, twice, strict=True))
        if type(whole) is int and type(twice) is int and whole != twice:
            grown = (twice - whole) * (self.part - self.size)
            self.same(grown % self.size == 0, None)
            return whole + grown // self.size
        return whole

    def equation(self, env: dict[Any, Any], whole: JaxprEqn, twice: JaxprEqn) -> JaxprEqn:
        self.same(whole.primitive is twice.primitive and len(whole.invars) == len(twice.invars), whole)
        self.same(whole.params.get("length") == twice.params.get("length"), whole)
        operands = [v if isinstance(v, Literal) else env[v] for v in whole.invars]
        bodies = [self.body(a, b) for a, b in zip(inner_jaxprs(whole), inner_jaxprs(twice), strict=True)]
        params = {name: self.sized(value, twice.params[name]) for name, value in whole.params.items()}
        outs = self.made(env, whole.outvars, twice.outvars)
        return whole.replace(invars=operands, outvars=list(outs), params=replace_bodies(params, bodies))

    def body(self, whole: ClosedJaxpr, twice: ClosedJaxpr) -> ClosedJaxpr:
        flat = self.flat(flatten(whole), flatten(twice))
        return body_of(flat.equations, flat.inputs, flat.outputs, flat.constants)


def body_of(
    equations: Sequence[JaxprEqn], inputs: Sequence[Var], outputs: Sequence[Any], constants: dict[Var, Any]
) -> ClosedJaxpr:
    """The body of a loop or condition."""
    effects = frozenset().union(*(e.effects for e in equations)) if equations else frozenset()
    names = core.DebugInfo("body", "body", tuple(f"a{i}" for i in range(len(inputs))), ("",) * len(outputs))
    jaxpr = Jaxpr(list(constants), list(inputs), list(outputs), list(equations), effects, debug_info=names)
    return ClosedJaxpr(jaxpr, list(constants.values()))


def replace_bodies(params: dict[str, Any], bodies: Sequence[ClosedJaxpr]) -> dict[str, Any]:
    """An equation's parameters with other bodies, in the order of `inner_jaxprs`."""
    left = iter(bodies)

    def swap(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(swap(v) for v in value)
        if isinstance(value, ClosedJaxpr):
            return next(left)
        return next(left).jaxpr if isinstance(value, Jaxpr) else value

    return {name: swap(value) for name, value in params.items()}


# ------------------------------------------------------------------------------------------ what is shared, split, summed


class _Analysis:
    def __init__(
        self, trace: Trace, flat: Flat, resizer: _Resizer, whole: Flat, num_micro_batches: int, statistics: str
    ) -> None:
        self.trace, self.flat, self.whole, self.full, self.twins = trace, flat, whole, resizer.full, resizer.twins
        self.count, self.statistics = num_micro_batches, statistics
        self.new = resizer.new
        self.index: Var | None = None
        self.prepared: dict[Var, Var] = {}
        self.whole_makers = {v: e for e in whole.equations for v in e.outvars}
        self.begin()

    def begin(self) -> None:
        self.statuses: dict[Any, Status] = {}
        self.equations: list[JaxprEqn] = []
        self.local: dict[Var, Var] = {}
        self.makers: dict[Var, JaxprEqn] = {}

    def program(self) -> MicroProgram:
        while not self.walk():
            self.begin()  # something more is prepared on the whole batch: look again
        return self.finish()

    def walk(self) -> bool:
        for var in self.flat.inputs:
            dims = split_dims(var, self.full)
            self.statuses[var] = Split(dims[0]) if dims else Same()
        for var, value in self.flat.constants.items():
            self.statuses[var] = Same(bool(np.size(value)) and not np.any(np.asarray(value)) if _plain(value) else False)
        return all(self.visit(eqn) for eqn in self.flat.equations)

    def visit(self, eqn: JaxprEqn) -> bool:
        """Give the results of an equation their statuses; False where the walk must begin again."""
        return all(self.step(e) for e in self.placed(eqn))

    def step(self, eqn: JaxprEqn) -> bool:
        self.makers.update((v, eqn) for v in eqn.outvars)
        found = self.outcome(eqn)
        if isinstance(found, Mixed):
            crossing = [v for v in reads(eqn) if isinstance(self.statuses[v], Reduced | After)]
            if crossing and self.prepare(crossing):
                return False
            eqn = self.taken_locally(eqn, crossing, found)
            found = self.outcome(eqn)
            if isinstance(found, Mixed):
                raise self.mixed(eqn, found)
        for var, status in zip(eqn.outvars, found, strict=True):
            self.statuses[var] = Same() if var in self.prepared else status
        self.equations.append(eqn)
        return True

    def outcome(self, eqn: JaxprEqn) -> list[Status] | Mixed:
        given = [self.status(v) for v in eqn.invars]
        if inner_jaxprs(eqn) and eqn.primitive.name in _BODIES:
            return _BODIES[eqn.primitive.name](self, eqn, given)
        return rule(eqn, given, self.full)

    def status(self, atom: Any) -> Status:
        return Same() if isinstance(atom, Literal) else self.statuses[atom]

    def mixed(self, eqn: JaxprEqn, found: Mixed) -> TraceError:
        where = f"{eqn.primitive.name} ({eqn.source_info.name_stack})"
        return TraceError(
            f"{self.trace.name} can't run in {self.count} micro-batches: at {where} {found.reason}, so the result would "
            "differ from that of the whole batch. Use num_micro_batches=1, or, for batch statistics such as BatchNorm's, "
            'say PipeshardParallel(batch_statistics="micro_batch") to take them per micro-batch'
        )

    # ------------------------------------------------------------------------------------ numbers of the whole batch

    def prepare(self, crossing: list[Var]) -> bool:
        """Whether these values follow from the batch without any parameter: then they are computed beforehand."""
        fresh = [v for v in crossing if v not in self.prepared]
        if not fresh or not all(self.cheap(self.twins[v]) for v in fresh if v in self.twins):
            return False
        if any(v not in self.twins for v in fresh):
            return False
        self.prepared.update((v, self.twins[v]) for v in fresh)
        return True

    def cheap(self, twin: Var) -> bool:
        cone, read = cone_of(self.whole_makers, [twin])
        places = {v: i for i, v in enumerate(self.whole.inputs)}
        batch = set(self.trace.batch)
        parameters = [v for v in read if v in places and places[v] not in batch and v.aval.shape]
        heavy = [e for e in cone if e.primitive.name in ("dot_general", "conv_general_dilated", "while", "scan")]
        return not parameters and not heavy

    # -------------------------------------------------------------------------------- statistics of one micro-batch

    def taken_locally(self, eqn: JaxprEqn, crossing: list[Var], found: Mixed) -> JaxprEqn:
        """The equation with statistics of the micro-batch in place of those of the batch: `count` times its share."""
        if self.statistics != "micro_batch" or not crossing:
            raise self.mixed(eqn, found)
        atoms = [self.localized(v) if v in crossing else v for v in eqn.invars]
        return eqn.replace(invars=atoms)

    def localized(self, atom: Any) -> Any:
        if isinstance(atom, Literal) or isinstance(self.statuses[atom], Same | Own | Split):
            return atom
        if atom in self.local:
            return self.local[atom]
        status = self.statuses[atom]
        if isinstance(status, Reduced):
            self.local[atom] = self.scaled(atom) if status.op == "add" else atom
        else:
            self.copy_locally(self.makers[atom])
        return self.local[atom]

    def copy_locally(self, eqn: JaxprEqn) -> None:
        outs = [self.new(v.aval) for v in eqn.outvars]
        self.full.update((new, self.full[old]) for new, old in zip(outs, eqn.outvars, strict=True))
        copied = eqn.replace(invars=[self.localized(v) for v in eqn.invars], outvars=outs)
        self.local.update(zip(eqn.outvars, outs, strict=True))
        self.own([copied])

    def scaled(self, var: Var) -> Var:
        factor, out = np.asarray(self.count, var.aval.dtype), self.new(var.aval)
        self.own(traced(lambda x: x * factor, [var], [out], self.makers[var], self.full, self.new))
        return out

    def own(self, equations: list[JaxprEqn]) -> None:
        """More equations, with results that are the micro-batch's own."""
        for eqn in equations:
            self.equations.append(eqn)
            for var in eqn.outvars:
                self.full.setdefault(var, tuple(var.aval.shape))
                dims = split_dims(var, self.full)
                self.statuses[var] = Split(dims[0]) if dims else Own()
                self.makers[var] = eqn

    def placed(self, eqn: JaxprEqn) -> list[JaxprEqn]:
        """The equation, its random numbers and positions being those of this micro-batch's part of the batch."""
        if self.count == 1 or not draws(eqn, self.full):
            return [eqn]
        if self.index is None:
            self.index = self.new(jax.typeof(np.int32(0)))
            self.full[self.index] = ()
        self.statuses[self.index] = Same()
        return _drawn(eqn, self.index, self.full, self.new)

    # ------------------------------------------------------------------------------------------------- the result

    def finish(self) -> MicroProgram:
        makers = {v: e for e in self.equations for v in e.outvars}
        kinds = {id(e): self.kind(e) for e in self.equations}
        after = [e for e in self.equations if kinds[id(e)] == "after"]
        results = [v for v in self.flat.outputs if isinstance(v, Var)]
        wanted = [v for v in results if isinstance(self.statuses[v], Same)]
        late = self.with_cone(makers, kinds, after, wanted, "after")
        read = [v for e in late for v in reads(e)] + results
        accumulated = {v: s.op for v in read if isinstance(s := self.statuses[v], Reduced)}
        goals = [*accumulated, *(v for v in results if isinstance(self.statuses[v], Split))]
        micro = self.with_cone(makers, kinds, [], goals, "micro")
        before, _ = cone_of(self.whole_makers, list(self.prepared.values()))
        whole = dict(zip(self.flat.inputs, self.whole.inputs, strict=True))
        return MicroProgram(
            self.count, tuple(micro), tuple(late), tuple(before), self.flat.inputs, self.flat.outputs, whole,
            tuple(self.prepared.items()), {**self.flat.constants, **self.whole.constants}, self.statuses, accumulated,
            self.index,
        )  # fmt: skip

    def kind(self, eqn: JaxprEqn) -> str:
        found = [self.statuses[v] for v in eqn.outvars]
        if any(isinstance(s, After) for s in found):
            return "after"
        return "same" if all(isinstance(s, Same) for s in found) else "micro"

    def with_cone(
        self, makers: dict[Var, JaxprEqn], kinds: dict[int, str], eqns: list[JaxprEqn], goals: list[Var], kind: str
    ) -> list[JaxprEqn]:
        """Equations of one kind that lead to the goals, and what they need that is the same for all micro-batches."""
        chosen = {id(e) for e in eqns}
        pending = [v for e in eqns for v in reads(e)] + goals
        while pending:
            var = pending.pop()
            maker = makers.get(var)
            if maker is None or id(maker) in chosen or var in self.prepared:
                continue
            if kinds[id(maker)] in ("same", kind):
                chosen.add(id(maker))
                pending.extend(reads(maker))
        return [e for e in self.equations if id(e) in chosen]


def _plain(value: Any) -> bool:
    return hasattr(value, "dtype") and not jnp.issubdtype(value.dtype, jax.dtypes.extended)


def cone_of(makers: dict[Var, JaxprEqn], goals: Iterable[Var]) -> tuple[list[JaxprEqn], set[Var]]:
    """All equations that lead to the goals, in program order, and all variables that they read."""
    found: dict[int, JaxprEqn] = {}
    read: set[Var] = set()
    pending = list(goals)
    while pending:
        var = pending.pop()
        read.add(var)
        maker = makers.get(var)
        if maker is not None and id(maker) not in found:
            found[id(maker)] = maker
            pending.extend(reads(maker))
    places = {id(e): i for i, e in enumerate(makers.values())}
    return sorted(found.values(), key=lambda e: places[id(e)]), read


# ------------------------------------------------------------------------------------------------- bodies


def _scan(analysis: _Analysis, eqn: JaxprEqn, given: list[Status]) -> list[Status] | Mixed:
    """A loop: the carry's statuses are those that one more turn does not change."""
    consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    body = eqn.params["jaxpr"].jaxpr
    xs = [_inner(s) for s in given[consts + carries :]]
    if any(isinstance(s, Split) and s.dim == 0 for s in given[consts + carries :]):
        return Mixed("the loop runs over the examples")
    carry = given[consts : consts + carries]
    for _ in range(carries + 2):
        outs = _body(analysis, body, [*given[:consts], *carry, *xs])
        if isinstance(outs, Mixed):
            return outs
        joined = [_join(a, b) for a, b in zip(carry, outs[:carries], strict=True)]
        if any(s is None for s in joined):
            return Mixed("the loop carries what differs from turn to turn")
        if joined == carry:
            break
        carry = [s for s in joined if s is not None]
    return [*carry, *(_outer(s) for s in outs[carries:])]


def _inner(status: Status) -> Status:
    return Split(status.dim - 1, status.pure) if isinstance(status, Split) else status


def _outer(status: Status) -> Status:
    return Split(status.dim + 1, status.pure) if isinstance(status, Split) else status


def _join(left: Status, right: Status) -> Status | None:
    if left == right:
        return left
    if isinstance(left, Same) and isinstance(right, Same):
        return Same()
    if isinstance(left, Same) and left.zero and isinstance(right, Reduced) and right.op == "add":
        return right
    if isinstance(right, Same) and right.zero and isinstance(left, Reduced) and left.op == "add":
        return left
    if isinstance(left, Split) and isinstance(right, Split) and left.dim == right.dim:
        return Split(left.dim, left.pure and right.pure)
    return None


def _body(analysis: _Analysis, body: Jaxpr, given: Sequence[Status]) -> list[Status] | Mixed:
    """The statuses of a body's results."""
    env: dict[Any, Status] = dict(zip(body.invars, given, strict=True))
    env.update((v, Same()) for v in body.constvars)
    outer, analysis.statuses = analysis.statuses, env
    try:
        for eqn in body.eqns:
            found = analysis.outcome(eqn)
            if isinstance(found, Mixed):
                return found
            if any(isinstance(s, After) for s in found):
                return Mixed(f"inside the loop {eqn.primitive.name} needs a sum over the whole batch")
            env.update(zip(eqn.outvars, found, strict=True))
        return [analysis.status(v) if isinstance(v, Var) else Same(_is_zero(v)) for v in body.outvars]
    finally:
        analysis.statuses = outer


def _is_zero(literal: Any) -> bool:
    return getattr(literal.aval, "shape", None) == () and bool(literal.val == 0)


def _once(analysis: _Analysis, eqn: JaxprEqn, given: list[Status]) -> list[Status] | Mixed:
    """Rematerialization: the body runs once."""
    return _body(analysis, inner_jaxprs(eqn)[0].jaxpr, given)


def _cond(analysis: _Analysis, eqn: JaxprEqn, given: list[Status]) -> list[Status] | Mixed:
    if not isinstance(given[0], Same):
        return Mixed("a condition depends on the examples")
    branches = [_body(analysis, branch.jaxpr, given[1:]) for branch in eqn.params["branches"]]
    joined: list[Status | None] = []
    for found in branches:
        if isinstance(found, Mixed):
            return found
        joined = [_join(a, b) if a is not None else None for a, b in zip(joined, found, strict=True)] if joined else [*found]
    return [s for s in joined if s is not None] if all(joined) else Mixed("the branches of a condition differ")


def _while(analysis: _Analysis, eqn: JaxprEqn, given: list[Status]) -> list[Status] | Mixed:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    condition, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
    carry = given[first + second :]
    for _ in range(len(carry) + 2):
        outs = _body(analysis, body, [*given[first : first + second], *carry])
        if isinstance(outs, Mixed):
            return outs
        joined = [_join(a, b) for a, b in zip(carry, outs, strict=True)]
        if any(s is None or isinstance(s, Reduced) for s in joined):
            return Mixed("the loop carries what differs from turn to turn")
        carry = [s for s in joined if s is not None]
    again = _body(analysis, condition, [*given[:first], *carry])
    if isinstance(again, Mixed) or not all(isinstance(s, Same) for s in again):
        return Mixed("how long a loop runs depends on the examples")
    return carry


_BODIES = {
    "scan": _scan,
    "cond": _cond,
    "while": _while,
    "remat2": _once,
    "remat": _once,
    "checkpoint": _once,
    "custom_jvp_call": _once,
    "custom_vjp_call": _once,
    "jit": _once,
    "closed_call": _once,
}


# ------------------------------------------------------------------------------------------------- random bits


def _drawn(eqn: JaxprEqn, index: Var, full: dict[Var, tuple[int, ...]], new: Any) -> list[JaxprEqn]:
    """Equations that draw for the whole batch and keep the part of micro-batch number `index`."""
    if inner_jaxprs(eqn):
        return [_with_index(eqn, index, full, new)]
    out = eqn.outvars[0]
    dim, shape = split_dims(out, full)[0], full[out]
    whole = new(out.aval.update(shape=shape))
    full[whole] = shape
    draw = eqn.replace(outvars=[whole], params={**eqn.params, "shape": shape})
    size = out.aval.shape[dim]

    def cut(x: Any, i: Any) -> Any:
        return jax.lax.dynamic_slice_in_dim(x, i * size, size, dim)

    return [draw, *traced(cut, [whole, index], [out], eqn, full, new)]


def traced(
    fun: Any, inputs: list[Any], outs: list[Var] | None, near: JaxprEqn, full: dict[Var, tuple[int, ...]], new: Any
) -> list[JaxprEqn]:
    """The equations of `fun(*inputs)`, which make `outs`, with the name stack of `near`."""
    closed = jax.make_jaxpr(fun)(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in inputs))
    flat = flatten(closed)
    env: dict[Any, Any] = dict(zip(flat.inputs, inputs, strict=True))
    env.update(zip(flat.outputs, outs or [], strict=False))
    made: list[JaxprEqn] = []
    for eqn in flat.equations:
        for var in eqn.outvars:
            env.setdefault(var, new(var.aval))
            full.setdefault(env[var], tuple(var.aval.shape))
        operands = [v if isinstance(v, Literal) else env[v] for v in eqn.invars]
        results = [env[v] for v in eqn.outvars]
        made.append(eqn.replace(invars=operands, outvars=results, source_info=near.source_info))
    return made


def draws(eqn: JaxprEqn, full: dict[Var, tuple[int, ...]]) -> bool:
    """Whether an equation makes numbers that depend on the place in the batch."""
    if eqn.primitive.name in _PLACED:
        return any(split_dims(v, full) for v in eqn.outvars)
    return any(draws(inner, full) for body in inner_jaxprs(eqn) for inner in body.jaxpr.eqns)


def _with_index(eqn: JaxprEqn, index: Var, full: dict[Var, tuple[int, ...]], new: Any) -> JaxprEqn:
    """An equation with bodies that are told the number of the micro-batch."""
    name, params = eqn.primitive.name, dict(eqn.params)
    place = len(eqn.invars)
    skipped = 0
    if name == "scan":
        place = params["num_consts"]
        params["num_consts"] = place + 1
        if "linear" in params:  # until jax 0.9
            params["linear"] = (*params["linear"][:place], False, *params["linear"][place:])
    elif name == "while":
        place = params["cond_nconsts"] + params["body_nconsts"]
        params["body_nconsts"] += 1
    elif name == "cond":
        skipped = 1
    elif name not in _BODIES:
        raise TraceError(f"random numbers inside {name} can't be drawn for a micro-batch; take {name} off the step")
    bodies = [
        body if name == "while" and number == 0 else _body_with_index(body, place - skipped, full, new)
        for number, body in enumerate(inner_jaxprs(eqn))
    ]
    return eqn.replace(
        invars=[*eqn.invars[:place], index, *eqn.invars[place:]], params=replace_bodies(params, bodies)
    )


def _body_with_index(body: ClosedJaxpr, place: int, full: dict[Var, tuple[int, ...]], new: Any) -> ClosedJaxpr:
    inner = new(jax.typeof(np.int32(0)))
    full[inner] = ()
    equations = [
        e for eqn in body.jaxpr.eqns for e in (_drawn(eqn, inner, full, new) if draws(eqn, full) else [eqn])
    ]
    inputs = [*body.jaxpr.invars[:place], inner, *body.jaxpr.invars[place:]]
    constants = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
    return body_of(equations, inputs, body.jaxpr.outvars, constants)
