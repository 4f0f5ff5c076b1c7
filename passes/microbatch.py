"""One step over the whole batch → the same step over micro-batches, with the meaning of the whole batch.

The step is traced for the whole batch and for one twice as large. The two programs have the same equations; sizes
that differ follow the batch, and are read off for the size of a micro-batch. Numbers (the divisor of a mean) are those
of the whole batch, so that what each micro-batch computes is its share of the whole. Every equation then belongs to
one of

    micro   runs for every micro-batch; sums over the batch are accumulated share by share
    after   runs once, when all shares are there: the optimizer's update
    before  runs once on the whole batch: numbers that the examples need of all others, such as the count of
            unmasked tokens, as long as they follow from the batch without any parameter

Random bits, keys by example and places in the batch are made for the whole batch and cut, so that dropout masks are
those of `jax.jit`. Where the examples look up their own rows by place, as in `logits[jnp.arange(batch), labels]`,
places are counted from the micro-batch's first row on.

With statistics="micro_batch" a statistic of the batch that the examples need (BatchNorm's mean) is that of the
micro-batch: the step then computes what it would for M batches that each repeat one micro-batch M times, averaged over
them; so the gradients are those of the mean of their losses, and running statistics take the mean of their statistics.

Contract
    Input: a `Trace` and the number of micro-batches. Output: `MicroProgram`.
    Raises: `MethodError` where the batch does not divide; `TraceError` where one example's result depends on others
    in a way that micro-batches can't keep (batch statistics), unless the option for it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from alpa_like.errors import MethodError, TraceError
from alpa_like.passes.batch_rules import (
    BODIES,
    After,
    Mixed,
    Own,
    Reduced,
    Same,
    Split,
    Status,
    entered,
    is_drawn,
    is_ordered,
    own_row,
    rule,
    split_dims,
    touches,
)
from alpa_like.passes.flat import (
    Flat,
    Resizer,
    body_of,
    cone_of,
    dtype_of,
    flatten,
    inner_jaxprs,
    reads,
    replace_bodies,
    scan_counts,
    shape_of,
)
from alpa_like.tracer import Trace

__all__ = ["MicroProgram", "split_batch"]


@dataclass(frozen=True)
class MicroProgram:
    """A step in micro-batches. A variable of `accumulated` is a share in `micro` and the whole in `after`.

    `inputs` and `outputs` stand for the flat arguments and results of the step, batch arguments as one micro-batch;
    results with the batch dim are the micro-batches' results one after the other. `index` is the number of the
    micro-batch, an int32, None where nothing reads it. `before` reads `whole_batch`, the batch arguments as they are
    given, and makes `prepared`.
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
    """Cut a step into micro-batches.

    With statistics="micro_batch" batch statistics are taken per micro-batch; otherwise they are a `TraceError`.
    """
    size = batch_size(trace)
    if not size:
        raise MethodError("the batch has 0 examples; a pipeline needs one for each micro-batch, at least")
    if num_micro_batches < 1 or size % num_micro_batches:
        raise MethodError(
            f"num_micro_batches is {num_micro_batches}, which does not divide the batch of {size} examples; "
            f"choose one of {', '.join(str(n) for n in range(1, size + 1) if size % n == 0)}"
        )
    twice = _retraced(trace, 2 * size)
    statistics = "micro_batch" if num_micro_batches == 1 else statistics  # one micro-batch has those of the batch
    opened: set[int] = set()
    while True:
        resizer = Resizer(size, size // num_micro_batches)
        whole = flatten(trace.jaxpr, opened)
        flat = resizer.flat(whole, flatten(twice, opened))
        try:
            return _Analysis(trace, flat, resizer, whole, num_micro_batches, statistics).program()
        except _OpenRemat as request:
            opened.add(request.number)


def batch_size(trace: Trace) -> int:
    """How many examples a step takes. `MethodError` where its batch arguments have none, or different counts."""
    shapes = {trace.arguments[i].path: trace.arguments[i].shape for i in trace.batch if trace.arguments[i].shape}
    sizes = {shape[0] for shape in shapes.values()}
    if len(sizes) != 1:
        found = ", ".join(f"{path} {shape}" for path, shape in list(shapes.items())[:4]) or "none"
        raise MethodError(
            f"micro-batches need batch arguments with one common dim 0, but {trace.name} has {found}; name the batch "
            "in batch_argnums"
        )
    return sizes.pop()


def _retraced(trace: Trace, size: int) -> ClosedJaxpr:
    try:
        return trace.at_batch_size(size)
    except Exception as error:  # whatever the user's function raises for another batch size
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TraceError(
            f"{trace.name} can't be traced for a batch of {size} examples: {line}. Micro-batches need a step that "
            "takes its batch size from the arguments' shapes instead of a constant"
        ) from error


class _OpenRemat(Exception):  # noqa: N818 - a request, not an error
    """Part of a rematerialization runs once: it is to be stepped into."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


# --------------------------------------------------------------------------------- what is shared, split, summed


class _Analysis:
    """Gives every variable its status, equation by equation.

    What the examples turn out to need, `prepared` on the whole batch or `taken` as a statistic of the micro-batch,
    changes the statuses of equations seen before: then the walk begins again.
    """

    def __init__(
        self, trace: Trace, flat: Flat, resizer: Resizer, whole: Flat, num_micro_batches: int, statistics: str
    ) -> None:
        self.trace, self.flat, self.whole = trace, flat, whole
        self.full, self.twins, self.new = resizer.full, resizer.twins, resizer.new
        self.count, self.statistics = num_micro_batches, statistics
        self.writer = _Writer(resizer)
        self.index = _Index(resizer)
        self.prepared: dict[Var, Var] = {}
        self.taken: set[Var] = set()
        self.whole_makers = {v: e for e in whole.equations for v in e.outvars}

    def program(self) -> MicroProgram:
        while not self.walk():
            pass
        self.check_results()
        return self.finish()

    def walk(self) -> bool:
        """Whether the walk came to the end, and found nothing new that the examples need."""
        self.begin()
        known = len(self.taken)
        return all(self.step(e) for eqn in self.flat.equations for e in _apart(eqn)) and known == len(self.taken)

    def begin(self) -> None:
        self.statuses: dict[Any, Status] = {}
        self.equations: list[JaxprEqn] = []
        self.local: dict[Var, Var] = {}
        self.makers: dict[Var, JaxprEqn] = {}
        for var in self.flat.inputs:
            dims = split_dims(var, self.full)
            self.statuses[var] = Split(dims[0]) if dims else Same()
        for var, value in self.flat.constants.items():
            self.statuses[var] = Same(_is_zero(value))

    def step(self, eqn: JaxprEqn) -> bool:
        """Give the results of an equation their statuses; False where the walk must begin again."""
        found = rule(eqn, self.given(eqn), self.full)
        if isinstance(found, Mixed):
            return self.resolve(eqn, found)
        if self.is_statistic(eqn, found):
            self.average(eqn)
        else:
            self.keep(eqn, found)
        return True

    def given(self, eqn: JaxprEqn) -> list[Status]:
        return [Same() if isinstance(v, Literal) else self.statuses[v] for v in eqn.invars]

    def keep(self, eqn: JaxprEqn, found: Sequence[Status]) -> None:
        written = [eqn] if self.count == 1 else self.writer.written(eqn, self.given(eqn), self.index)
        self.add(written, Same())
        for var, status in zip(eqn.outvars, found, strict=True):
            self.statuses[var] = Same() if var in self.prepared else status

    def add(self, equations: Sequence[JaxprEqn], otherwise: Status) -> None:
        """More equations. What has no batch dim is `otherwise`."""
        for eqn in equations:
            self.equations.append(eqn)
            for var in eqn.outvars:
                self.makers[var] = eqn
                dims = split_dims(var, self.full)
                self.statuses[var] = Split(dims[0]) if dims else otherwise

    # ------------------------------------------------------------------------- what the examples need of the others

    def resolve(self, eqn: JaxprEqn, found: Mixed) -> bool:
        """Get the examples what they need of the whole batch, or refuse; False where the walk must begin again."""
        crossing = [v for v in dict.fromkeys(reads(eqn)) if isinstance(self.statuses[v], Reduced | After)]
        if self.count > 1 and crossing and self.prepare(crossing):
            return False
        number = self.flat.remats.get(eqn.outvars[0]) if eqn.outvars else None
        if number is not None:
            raise _OpenRemat(number)
        if crossing and self.statistics == "micro_batch":
            self.take(crossing)
            eqn = eqn.replace(invars=[self.localized(v) for v in eqn.invars])
        outcome = rule(eqn, self.given(eqn), self.full)
        if isinstance(outcome, Mixed):
            outcome = self.alone(eqn, outcome)
        self.keep(eqn, outcome)
        return True

    def alone(self, eqn: JaxprEqn, found: Mixed) -> list[Status]:
        """With one micro-batch examples may be mixed: its shares are all there is."""
        if self.count > 1:
            line = source_info_util.summarize(eqn.source_info)
            where = f"{eqn.primitive.name} ({eqn.source_info.name_stack}, {line})"
            raise TraceError(
                f"{self.trace.name} can't run in {self.count} micro-batches: at {where} {found.reason}, so the result "
                "would differ from that of the whole batch. Use num_micro_batches=1, or, for batch statistics such as "
                'BatchNorm\'s, say PipeshardParallel(batch_statistics="micro_batch") to take them per micro-batch'
            )
        return [self.alone_status(v) for v in eqn.outvars]

    def alone_status(self, var: Var) -> Status:
        dims = split_dims(var, self.full)
        if dims or not _is_number(var):
            return Split(dims[0]) if dims else Own()
        return Reduced("or" if dtype_of(var) == jnp.bool_ else "add")

    def prepare(self, crossing: list[Var]) -> bool:
        """Whether these values follow from the batch without any parameter: then they are computed beforehand."""
        fresh = [v for v in crossing if v not in self.prepared]
        if not fresh or not all(v in self.twins and self.is_cheap(self.twins[v]) for v in fresh):
            return False
        self.prepared.update((v, self.twins[v]) for v in fresh)
        return True

    def is_cheap(self, twin: Var) -> bool:
        cone, read = cone_of(self.whole_makers, [twin])
        batch = set(self.trace.batch)
        given = [v for i, v in enumerate(self.whole.inputs) if i not in batch]
        parameters = [v for v in given if v in read and shape_of(v) and jnp.issubdtype(dtype_of(v), jnp.inexact)]
        heavy = ("dot_general", "conv_general_dilated", "while", "scan")
        return not parameters and not any(e.primitive.name in heavy for e in cone)

    # -------------------------------------------------------------------------------- statistics of one micro-batch

    def take(self, crossing: list[Var]) -> None:
        """Remember statistics that the examples read, and what they are made of."""
        pending = list(crossing)
        while pending:
            var = pending.pop()
            if var not in self.taken:
                self.taken.add(var)
                maker = self.makers.get(var)
                read = reads(maker) if maker is not None else []
                pending += [v for v in read if isinstance(self.statuses[v], Reduced | After)]

    def is_statistic(self, eqn: JaxprEqn, found: Sequence[Status]) -> bool:
        """Whether the loss and its gradient compute something nonlinear from statistics of the micro-batch.

        That stays the micro-batch's own too. The optimizer's update works with averages over the micro-batches.
        """
        if self.count == 1 or not self.taken or not any(isinstance(s, After) for s in found):
            return False
        floats = all(jnp.issubdtype(dtype_of(v), jnp.inexact) for v in eqn.outvars)
        return floats and _is_differentiated(eqn) and any(v in self.taken for v in (*reads(eqn), *eqn.outvars))

    def average(self, eqn: JaxprEqn) -> None:
        """The mean of what the equation makes of each micro-batch's statistics."""
        self.copy_locally(eqn)
        for var in eqn.outvars:
            self.add(self.scaled(self.local[var], var, self.share), Reduced("add"))

    def localized(self, atom: Any) -> Any:
        """The micro-batch's own version: of a sum, its share as often as there are micro-batches."""
        if isinstance(atom, Literal) or not isinstance(self.statuses[atom], Reduced | After):
            return atom
        if atom not in self.local:
            status = self.statuses[atom]
            if isinstance(status, Reduced):
                self.local[atom] = out = self.like(atom)
                sums = status.op == "add" and self.count > 1
                self.add(self.scaled(atom, out, self.times if sums else jnp.copy), Own())
            else:
                self.copy_locally(self.makers[atom])
        return self.local[atom]

    def share(self, local: Any) -> Any:
        return local / np.asarray(self.count, local.dtype)

    def times(self, share: Any) -> Any:
        return share * np.asarray(self.count, share.dtype)

    def scaled(self, var: Var, out: Var, fun: Callable[[Any], Any]) -> list[JaxprEqn]:
        return self.writer.traced(fun, [var], out, self.makers[var])

    def copy_locally(self, eqn: JaxprEqn) -> None:
        operands = [self.localized(v) for v in eqn.invars]
        outs = [self.like(v) for v in eqn.outvars]
        self.local.update(zip(eqn.outvars, outs, strict=True))
        self.add([eqn.replace(invars=operands, outvars=outs)], Own())

    def like(self, var: Var) -> Var:
        new = self.new(var.aval)
        self.full[new] = self.full[var]
        return new

    # ------------------------------------------------------------------------------------------------- the result

    def check_results(self) -> None:
        for leaf, var in zip(self.trace.results, self.flat.outputs, strict=True):
            if self.count > 1 and isinstance(var, Var) and not is_ordered(self.statuses[var]):
                raise TraceError(
                    f"{leaf.path} has the examples inside another dim, so the results of {self.count} micro-batches "
                    "can't be put one after the other; return it with the batch as a dim of its own"
                )

    def finish(self) -> MicroProgram:
        kinds = {id(e): self.kind(e) for e in self.equations}
        results = [v for v in self.flat.outputs if isinstance(v, Var)]
        late = self.with_cone(kinds, [v for v in results if isinstance(self.statuses[v], Same | After)], "after")
        read = [v for e in late for v in reads(e)] + results
        self.hand_over(kinds, read)
        accumulated = {v: s.op for v in read if isinstance(s := self.statuses[v], Reduced)}
        goals = [*accumulated, *(v for v in results if isinstance(self.statuses[v], Split))]
        micro = self.with_cone(kinds, goals, "micro")
        before, _ = cone_of(self.whole_makers, list(self.prepared.values()))
        whole = dict(zip(self.flat.inputs, self.whole.inputs, strict=True))
        outputs = tuple(map(self.result, self.flat.outputs))
        index = self.index.var if any(self.index.var in reads(e) for e in micro) else None
        return MicroProgram(
            self.count, tuple(micro), tuple(late), tuple(before), self.flat.inputs, outputs, whole,
            tuple(self.prepared.items()), {**self.flat.constants, **self.whole.constants}, self.statuses, accumulated,
            index,
        )  # fmt: skip

    def result(self, atom: Any) -> Any:
        """A result of the step; what no equation makes of arguments becomes a literal, which no piece has to return."""
        constants = self.flat.constants
        return Literal(constants[atom], atom.aval) if isinstance(atom, Var) and atom in constants else atom

    def hand_over(self, kinds: dict[int, str], read: list[Var]) -> None:
        """Equal values that equations on the examples make besides (a loop's counter): any maximum of them will do."""
        for var in read:
            maker, status = self.makers.get(var), self.statuses[var]
            if maker is None or var in self.prepared or kinds[id(maker)] != "micro":
                continue
            equal = isinstance(status, Same) or (isinstance(status, Own) and self.count == 1)
            if equal and _is_number(var):
                self.statuses[var] = Reduced("max")
            elif isinstance(status, Same | Own):
                raise TraceError(
                    f"{maker.primitive.name} ({maker.source_info.name_stack}) works on the examples and returns a "
                    f"{dtype_of(var)} besides, which the update can't be given; make that one outside of it"
                )

    def kind(self, eqn: JaxprEqn) -> str:
        found = [self.statuses[v] for v in eqn.outvars]
        if any(isinstance(s, After) for s in found):
            return "after"
        return "same" if all(isinstance(s, Same) for s in found) else "micro"

    def with_cone(self, kinds: dict[int, str], goals: list[Var], kind: str) -> list[JaxprEqn]:
        """Equations of one kind that lead to the goals, and what they need that is the same for all micro-batches."""
        chosen: set[int] = set()
        pending = list(goals)
        while pending:
            var = pending.pop()
            maker = self.makers.get(var)
            if maker is None or id(maker) in chosen or var in self.prepared:
                continue
            if kinds[id(maker)] in ("same", kind):
                chosen.add(id(maker))
                pending.extend(reads(maker))
        return [e for e in self.equations if id(e) in chosen]


def _apart(eqn: JaxprEqn) -> list[JaxprEqn]:
    """A barrier as one for each operand, as these may be known at different times."""
    if eqn.primitive.name != "optimization_barrier":
        return [eqn]
    pairs = zip(eqn.invars, eqn.outvars, strict=True)
    return [eqn.replace(invars=[v], outvars=[out]) for v, out in pairs]


def _is_zero(value: Any) -> bool:
    plain = hasattr(value, "dtype") and not jnp.issubdtype(value.dtype, jax.dtypes.extended)
    return plain and bool(np.size(value)) and not np.any(np.asarray(value))


def _is_number(var: Any) -> bool:
    return not jnp.issubdtype(dtype_of(var), jax.dtypes.extended)


def _is_differentiated(eqn: JaxprEqn) -> bool:
    """Whether an equation belongs to what `jax.grad` differentiates or to the gradient."""
    return any(part.startswith(("jvp(", "transpose(")) for part in str(eqn.source_info.name_stack).split("/"))


# ------------------------------------------------------------------------------------- what depends on the place


@dataclass
class _Index:
    """The number of the micro-batch, a variable as soon as it is read."""

    resizer: Resizer
    var: Var | None = None

    def __call__(self) -> Var:
        if self.var is None:
            self.var = self.resizer.new(jax.typeof(np.int32(0)))
            self.resizer.full[self.var] = ()
        return self.var


@dataclass
class _Writer:
    """Writes equations so that each micro-batch has its own part of what depends on the place in the batch."""

    resizer: Resizer

    def written(self, eqn: JaxprEqn, given: Sequence[Status], index: _Index) -> list[JaxprEqn]:
        full = self.resizer.full
        if is_drawn(eqn, given, full):
            return self.drawn(eqn, index)
        column = own_row(eqn, given, full)
        if column is not None:
            return self.counted_from_first(eqn, given, column, index)
        return [self.with_bodies(eqn, given, index)] if eqn.primitive.name in BODIES else [eqn]

    def drawn(self, eqn: JaxprEqn, index: _Index) -> list[JaxprEqn]:
        """Run the equation for the whole batch and keep the part of this micro-batch."""
        full = self.resizer.full
        original = self.resizer.originals[eqn.outvars[0]]
        outs = [self.whole(v) if split_dims(v, full) else v for v in eqn.outvars]
        made = [eqn.replace(outvars=outs, params=original.params)]
        for var, whole in zip(eqn.outvars, outs, strict=True):
            if var is not whole:
                made += self.cut(whole, var, eqn, index)
        return made

    def whole(self, var: Var) -> Var:
        new = self.resizer.new(var.aval.update(shape=self.resizer.full[var]))
        self.resizer.full[new] = self.resizer.full[var]
        return new

    def cut(self, whole: Var, out: Var, near: JaxprEqn, index: _Index) -> list[JaxprEqn]:
        dim = split_dims(out, self.resizer.full)[0]
        size = shape_of(out)[dim]
        return self.traced(
            lambda x, i: jax.lax.dynamic_slice_in_dim(x, i * size, size, dim), [whole, index()], out, near
        )

    def counted_from_first(self, eqn: JaxprEqn, given: Sequence[Status], column: int, index: _Index) -> list[JaxprEqn]:
        """A gather or scatter whose places in the batch count from the micro-batch's first row on."""
        row = given[0]
        assert isinstance(row, Split)
        part, old = shape_of(eqn.invars[0])[row.dim], reads(eqn)[1]
        new = self.resizer.new(old.aval)
        self.resizer.full[new] = self.resizer.full[old]

        def shift(places: Any, i: Any) -> Any:
            columns = jax.lax.broadcasted_iota(places.dtype, places.shape, places.ndim - 1)
            return places - jnp.where(columns == column, (i * part).astype(places.dtype), 0)

        shifted = self.traced(shift, [old, index()], new, eqn)
        return [*shifted, eqn.replace(invars=[eqn.invars[0], new, *eqn.invars[2:]])]

    def traced(self, fun: Callable[..., Any], inputs: list[Any], out: Var, near: JaxprEqn) -> list[JaxprEqn]:
        """The equations of `out = fun(*inputs)`, with the name stack of `near`."""
        closed = jax.make_jaxpr(fun)(*(jax.ShapeDtypeStruct(shape_of(v), dtype_of(v)) for v in inputs))
        flat = flatten(closed)
        env: dict[Any, Any] = {**dict(zip(flat.inputs, inputs, strict=True)), flat.outputs[0]: out}
        made: list[JaxprEqn] = []
        for eqn in flat.equations:
            for var in eqn.outvars:
                new = env.setdefault(var, self.resizer.new(var.aval))
                self.resizer.full.setdefault(new, shape_of(var))
            operands = [v if isinstance(v, Literal) else env[v] for v in eqn.invars]
            outs = [env[v] for v in eqn.outvars]
            made.append(eqn.replace(invars=operands, outvars=outs, source_info=near.source_info))
        return made

    # -------------------------------------------------------------------------------------------------- bodies

    def with_bodies(self, eqn: JaxprEqn, given: Sequence[Status], index: _Index) -> JaxprEqn:
        """An equation with bodies that know the number of the micro-batch, where they need it."""
        entries = entered(eqn, given, self.resizer.full) if touches(eqn, self.resizer.full) else Mixed("")
        if isinstance(entries, Mixed):
            return eqn
        inner = [_Index(self.resizer) for _ in entries]
        pairs = zip(inner_jaxprs(eqn), entries, inner, strict=True)
        bodies = [self.body(body, entry, own) for body, entry, own in pairs]
        if all(own.var is None for own in inner):
            return eqn.replace(params=replace_bodies(eqn.params, bodies))
        return _with_index(eqn, bodies, inner, index())

    def body(self, body: ClosedJaxpr, entry: Sequence[Status], index: _Index) -> ClosedJaxpr:
        """A body whose equations are written; the index is not among its inputs yet."""
        jaxpr: Jaxpr = body.jaxpr
        env: dict[Any, Status] = dict(zip(jaxpr.invars, entry, strict=True))
        env.update((v, Same()) for v in jaxpr.constvars)
        made: list[JaxprEqn] = []
        for eqn in jaxpr.eqns:
            given = [Same() if isinstance(v, Literal) else env[v] for v in eqn.invars]
            found = rule(eqn, given, self.resizer.full, inside=True)
            assert not isinstance(found, Mixed), found
            made += self.written(eqn, given, index)
            env.update(zip(eqn.outvars, found, strict=True))
        constants = dict(zip(jaxpr.constvars, body.consts, strict=True))
        return body_of(made, jaxpr.invars, jaxpr.outvars, constants)


def _with_index(eqn: JaxprEqn, bodies: list[ClosedJaxpr], inner: list[_Index], index: Var) -> JaxprEqn:
    """Hand the index to all bodies as a further constant."""
    params, count = dict(eqn.params), len(eqn.invars)
    match eqn.primitive.name:
        case "scan":
            consts, carries = scan_counts(eqn)
            places = inside = [consts]
            params |= _scan_operands(consts + 1, carries, count - consts - carries)
        case "while":
            inside = [params["cond_nconsts"], params["body_nconsts"]]
            places = [inside[0], inside[0] + 1 + inside[1]]
            params |= {"cond_nconsts": inside[0] + 1, "body_nconsts": inside[1] + 1}
        case "cond":
            places, inside = [count], [count - 1] * len(bodies)
        case _:
            places = inside = [count]
    operands = list(eqn.invars)
    for place in places:
        operands.insert(place, index)
    told = [_told(body, own(), place) for body, own, place in zip(bodies, inner, inside, strict=True)]
    return eqn.replace(invars=operands, params=replace_bodies(params, told))


def _scan_operands(consts: int, carries: int, rows: int) -> dict[str, Any]:
    """The parameters by which a scan counts its operands, as this JAX has them."""

    def scan(given: Any, carry: Any, xs: Any) -> Any:
        return jax.lax.scan(lambda c, x: ([a + 1 for a in c], sum([*given, *x])), carry, xs, length=1)

    (eqn,) = jax.make_jaxpr(scan)([0.0] * consts, [0.0] * carries, [np.zeros(1)] * rows).eqns
    return {name: eqn.params[name] for name in ("ft_in", "num_consts") if name in eqn.params}


def _told(body: ClosedJaxpr, index: Var, place: int) -> ClosedJaxpr:
    jaxpr = body.jaxpr
    inputs = [*jaxpr.invars[:place], index, *jaxpr.invars[place:]]
    return body_of(jaxpr.eqns, inputs, jaxpr.outvars, dict(zip(jaxpr.constvars, body.consts, strict=True)))
