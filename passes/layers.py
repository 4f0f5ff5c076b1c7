"""Cuts the forward pass into layers and finds the layer of everything else, by names and data flow alone.

    forward   equations in program order, cut by `cluster_layers` (balanced FLOPs, few bytes across the cuts)
    backward  those that `jax.grad` made by transposition. An equation goes with the layer whose values or parameters it
              reads, never above the layers that its cotangents come from
    derived   what follows from the batch or from the parameters without heavy work (masks, one-hot labels, casts): it
              belongs to no layer, and is computed wherever it is read
    update    what runs once, when all gradients are there; it goes with the layer of the parameter that it updates

Sums of gradients of several layers (tied weights) are added in the update, so that each layer accumulates its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from jax.extend.core import JaxprEqn, Var

from alpa_like.errors import MethodError, PlanError, TraceError
from alpa_like.passes.avals import shape_of, size_of
from alpa_like.passes.batch_rules import Reduced, Same, Split
from alpa_like.passes.cluster_layers import auto_num_layers, cluster
from alpa_like.passes.flat import equation_flops, inner_jaxprs, nbytes, reads
from alpa_like.passes.microbatch import MicroProgram
from alpa_like.passes.residuals import cheap_again

__all__ = ["BOUNDARY", "Layers", "form_layers"]

BOUNDARY = "alpa_pipeline_boundary"
"""The name that `mark_pipeline_boundary` gives to an equation."""

_HEAVY = frozenset(("dot_general", "conv_general_dilated", "scan", "while", "random_bits", "remat2", "checkpoint"))


@dataclass(frozen=True)
class Layers:
    """Invariant: the values that a layer reads are made in it, in earlier layers, or by what belongs to no layer.

    `ends` count the forward equations up to the end of each layer; `forward[l]` and `backward[l]` are the equations of
    layer l in program order; `derived` belong to no layer.
    `after` run once; `owners` gives the layer of arguments, of accumulated values and of what `after` makes of them.
    """

    program: MicroProgram
    ends: tuple[int, ...]
    forward: tuple[tuple[JaxprEqn, ...], ...]
    backward: tuple[tuple[JaxprEqn, ...], ...]
    derived: tuple[JaxprEqn, ...]
    after: tuple[JaxprEqn, ...]
    accumulated: dict[Var, str]
    owners: dict[Var, int]

    @property
    def count(self) -> int:
        return len(self.forward)

    @cached_property
    def flops(self) -> tuple[float, ...]:
        """Of the forward pass of one micro-batch, by layer."""
        return tuple(sum(map(equation_flops, eqns)) for eqns in self.forward)

    @cached_property
    def makers(self) -> dict[Var, tuple[str, int]]:
        """What makes each value: ("forward" or "backward", layer)."""
        found: dict[Var, tuple[str, int]] = {}
        for kind, parts in (("forward", self.forward), ("backward", self.backward)):
            for layer, eqns in enumerate(parts):
                found.update((v, (kind, layer)) for e in eqns for v in e.outvars)
        return found

    @cached_property
    def cheap_again(self) -> tuple[dict[Var, JaxprEqn], ...]:
        """Per layer the forward equations that its backward pass does again (`passes.residuals`)."""
        backward = {v for eqns in self.backward for e in eqns for v in reads(e)}
        anyway = {v for e in self.derived for v in e.outvars} | set(self.program.inputs)
        anyway |= {v for v, _ in self.program.prepared} | set(self.program.constants)
        if self.program.index is not None:
            anyway.add(self.program.index)
        needed = [v for e in self.derived for v in reads(e)]
        return tuple(self._cheap(n, backward | set(needed), anyway) for n in range(self.count))

    def _cheap(self, layer: int, backward: set[Var], anyway: set[Var]) -> dict[Var, JaxprEqn]:
        forward = self.forward[layer]
        made = {v for e in forward for v in e.outvars}
        entering = {v for e in forward for v in reads(e)} & backward
        return cheap_again(
            forward, [v for e in forward for v in e.outvars if v in backward], anyway | (entering - made)
        )

    def crossing(self, layer: int) -> tuple[Var, ...]:
        """What the forward pass hands from the layers up to `layer` to those behind it."""
        later = [e for eqns in self.forward[layer + 1 :] for e in eqns]
        read = dict.fromkeys(v for e in later for v in reads(e))
        return tuple(v for v in read if v in self.makers and self.makers[v][1] <= layer)


def form_layers(
    program: MicroProgram,
    num_layers: int | None = None,
    *,
    boundaries: bool = False,
    ends: tuple[int, ...] | None = None,
) -> Layers:
    """Cut a program into `num_layers` layers, or as many as seem natural (None).

    With `boundaries` layers end at the user's marks, with `ends` where an earlier cut had them. Raises `MethodError`
    for more layers than there are heavy operations, or for marks that are missing; `TraceError` for a mark in a loop.
    """
    return _Former(program).form(num_layers, boundaries, ends)


def is_backward(eqn: JaxprEqn) -> bool:
    """Whether `jax.grad` made the equation by transposition."""
    return any(part.startswith("transpose(") for part in str(eqn.source_info.name_stack).split("/"))


@dataclass
class _Former:
    program: MicroProgram
    kinds: dict[int, str] = field(default_factory=dict)
    layer: dict[Var, int] = field(default_factory=dict)
    evidence: dict[Var, set[int]] = field(default_factory=dict)

    def form(self, num_layers: int | None, boundaries: bool, given: tuple[int, ...] | None) -> Layers:
        self.classify()
        forward = [e for e in self.program.micro if self.kinds[id(e)] == "forward"]
        if not forward:
            raise MethodError(
                "the step computes nothing of its batch that could be cut into layers; use ShardParallel() for it, or "
                "return what it computes"
            )
        ends = given or self.cut_forward(forward, num_layers, boundaries)
        if ends[-1] != len(forward):
            raise PlanError(f"the layers end at equation {ends[-1]}, but the program has {len(forward)}; plan it again")
        cut = [forward[a:b] for a, b in zip((0, *ends[:-1]), ends, strict=True)]
        for number, eqns in enumerate(cut):
            self.layer.update((v, number) for e in eqns for v in e.outvars)
        self.trace_readers(cut)
        backward, demoted = self.cut_backward(len(cut))
        late = {id(e) for e in demoted}
        cut = [[e for e in eqns if id(e) not in late] for eqns in cut]
        after = self.with_derived([*demoted, *self.program.after])
        accumulated = self.accumulated([e for eqns in (*cut, *backward) for e in eqns], after)
        derived = tuple(e for e in self.program.micro if self.kinds[id(e)] == "derived")
        owners = self.owners(after, accumulated)
        return Layers(
            self.program,
            ends,
            tuple(map(tuple, cut)),
            tuple(map(tuple, backward)),
            derived,
            tuple(after),
            accumulated,
            owners,
        )

    # -------------------------------------------------------------------------------------------------- kinds

    def classify(self) -> None:
        parameters = set(self.parameters())
        reached: set[Var] = set(parameters)
        backward: set[Var] = set()
        statuses = self.program.statuses
        wanted = {v for v in self.program.outputs if isinstance(v, Var) and isinstance(statuses[v], Split)}
        wanted |= set(self.program.accumulated)
        for eqn in self.program.micro:
            read = set(reads(eqn))
            from_parameters = bool(read & reached)
            same = all(isinstance(self.program.statuses[v], Same) for v in eqn.outvars)
            heavy = eqn.primitive.name in _HEAVY
            own = heavy or is_boundary(eqn) or any(v in wanted for v in eqn.outvars)
            if not own and not read & backward and (same or not from_parameters):
                self.kinds[id(eqn)] = "derived"
            elif read & backward or is_backward(eqn):
                self.kinds[id(eqn)] = "backward"
                backward.update(eqn.outvars)
            else:
                self.kinds[id(eqn)] = "forward"
            if from_parameters or heavy:
                reached.update(eqn.outvars)

    def parameters(self) -> list[Var]:
        statuses = self.program.statuses
        return [v for v in self.program.inputs if isinstance(statuses[v], Same) and shape_of(v)]

    # ------------------------------------------------------------------------------------------------ forward

    def cut_forward(self, forward: list[JaxprEqn], num_layers: int | None, boundaries: bool) -> tuple[int, ...]:
        """Where each layer ends."""
        flops = [equation_flops(e) if e.primitive.name in _HEAVY else 0.0 for e in forward]
        if not any(flops):
            flops = [equation_flops(e) for e in forward]
        if boundaries:
            return self.marked(forward)
        cuts = self.cut_bytes(forward)
        ends = cluster(flops, cuts, auto_num_layers(flops, cuts) if num_layers is None else num_layers)
        return tuple(_latest(end, flops, cuts) for end in ends)

    def marked(self, forward: list[JaxprEqn]) -> tuple[int, ...]:
        """Where the user's marks end a layer."""
        for eqn in forward:
            inside = [e for body in inner_jaxprs(eqn) for e in body.jaxpr.eqns if is_boundary(e)]
            if inside:
                raise TraceError(
                    f"alpa.mark_pipeline_boundary() stands inside a {eqn.primitive.name} "
                    f"({eqn.source_info.name_stack}), where no stage can end; expected it between the layers of the "
                    "step itself: unroll the loop, or leave the mark out"
                )
        found = [i + 1 for i, e in enumerate(forward) if is_boundary(e)]
        last = [i for i in found if i < len(forward)]
        if not last:
            raise MethodError(
                "ManualLayerOption() cuts at alpa.mark_pipeline_boundary(x), but the step has no such mark between two "
                "layers; put x = alpa.mark_pipeline_boundary(x) into the forward pass, or use AutoLayerOption()"
            )
        return (*last, len(forward))

    def cut_bytes(self, forward: list[JaxprEqn]) -> list[float]:
        """Bytes that later forward equations read across each cut."""
        made = {v: i for i, e in enumerate(forward) for v in e.outvars}
        last: dict[Var, int] = {}
        for i, eqn in enumerate(forward):
            last.update((v, i) for v in reads(eqn) if v in made)
        change = [0.0] * (len(forward) + 1)
        for var, end in last.items():
            change[made[var]] += nbytes(var)
            change[end] -= nbytes(var)
        total, found = 0.0, list[float]()
        for delta in change[: max(0, len(forward) - 1)]:
            total += delta
            found.append(max(total, 0.0))
        return found

    # ----------------------------------------------------------------------------------------------- backward

    def trace_readers(self, cut: list[list[JaxprEqn]]) -> None:
        """For each value the layers that make it or read it in the forward pass, also through what is derived."""
        for number, eqns in enumerate(cut):
            for eqn in eqns:
                for var in (*reads(eqn), *eqn.outvars):
                    self.evidence.setdefault(var, set()).add(number)
        derived = [e for e in self.program.micro if self.kinds[id(e)] == "derived"]
        self.trace_derived(derived)

    def trace_derived(self, derived: list[JaxprEqn]) -> None:
        for eqn in reversed(derived):
            readers = set[int]().union(*(self.evidence.get(v, set()) for v in eqn.outvars))
            for var in reads(eqn):
                self.evidence.setdefault(var, set()).update(readers)
        for var in self.rootless():
            self.evidence.pop(var, None)
        for eqn in derived:  # a backward pass casts and transposes parameters for itself
            if not any(v in self.evidence for v in eqn.outvars):
                arrays = [self.evidence[v] for v in reads(eqn) if self.evidence.get(v)]
                if arrays:
                    self.evidence.update((v, set(arrays[0])) for v in eqn.outvars)

    def rootless(self) -> list[Var]:
        """What is derived from constants alone: any layer may have made it for itself."""
        rooted = set(self.program.inputs)
        found: list[Var] = []
        for eqn in self.program.micro:
            if self.kinds[id(eqn)] != "derived" or rooted & set(reads(eqn)):
                rooted.update(eqn.outvars)
            else:
                found.extend(eqn.outvars)
        return found

    def cut_backward(self, count: int) -> tuple[list[list[JaxprEqn]], list[JaxprEqn]]:
        """The backward equations by layer, and those that add what several layers accumulate."""
        found: list[list[JaxprEqn]] = [[] for _ in range(count)]
        demoted: list[JaxprEqn] = []
        late: set[Var] = set()
        for eqn in self.program.micro:
            kind, read = self.kinds[id(eqn)], reads(eqn)
            if kind == "derived":
                continue
            shares = {self.layer[v] for v in read if v in self.layer and isinstance(self.program.statuses[v], Reduced)}
            whole = all(isinstance(self.program.statuses[v], Reduced) for v in eqn.outvars)
            here = {self.layer[v] for v in eqn.outvars} if kind == "forward" else shares
            if late & set(read) or (whole and shares and (len(shares) > 1 or shares != here)):
                demoted.append(eqn)
                late.update(eqn.outvars)
            elif kind == "backward":
                number = self.backward_layer(read, count)
                found[number].append(eqn)
                self.layer.update((v, number) for v in eqn.outvars)
        return found, demoted

    def backward_layer(self, read: list[Var], count: int) -> int:
        forward = [self.evidence[v] for v in read if self.evidence.get(v)]
        above = [self.layer[v] for v in read if v in self.layer and v not in self.evidence]
        limit = min(above, default=count - 1)
        common = set.intersection(*forward) if forward else set[int]()
        for layers in (common, set[int]().union(*forward)):
            fits = [n for n in layers if n <= limit]
            if fits:
                return max(fits)
        return limit

    # ------------------------------------------------------------------------------------------------- update

    def with_derived(self, after: list[JaxprEqn]) -> list[JaxprEqn]:
        """Equations that run once, and what is derived for them."""
        known = {id(e) for e in after}
        makers = {v: e for e in self.program.micro if self.kinds[id(e)] == "derived" for v in e.outvars}
        pending, extra = [v for e in after for v in reads(e)], list[JaxprEqn]()
        while pending:
            maker = makers.get(pending.pop())
            if maker is not None and id(maker) not in known:
                known.add(id(maker))
                extra.append(maker)
                pending.extend(reads(maker))
        order = {id(e): i for i, e in enumerate((*self.program.micro, *self.program.after))}
        return sorted((*extra, *after), key=lambda e: order[id(e)])

    def accumulated(self, micro: list[JaxprEqn], after: list[JaxprEqn]) -> dict[Var, str]:
        """The shares that something reads when they are complete."""
        made = {v for e in micro for v in e.outvars}
        wanted = dict.fromkeys(
            [v for e in after for v in reads(e)] + [v for v in self.program.outputs if isinstance(v, Var)]
        )
        statuses = self.program.statuses
        return {v: s.op for v in wanted if v in made and isinstance(s := statuses[v], Reduced)}

    def owners(self, after: list[JaxprEqn], accumulated: Iterable[Var]) -> dict[Var, int]:
        """Values of one shape that the update combines belong to one layer: that of the parameter among them."""
        parents: dict[Var, Var] = {}

        def root(var: Var) -> Var:
            while parents.setdefault(var, var) is not var:
                parents[var] = parents[parents[var]]
                var = parents[var]
            return var

        for eqn in after:
            wide = [v for v in (*reads(eqn), *eqn.outvars) if shape_of(v) and size_of(v) > 1]
            for var in wide[1:]:
                if shape_of(var) == shape_of(wide[0]):
                    parents[root(var)] = root(wide[0])
        known: dict[Var, int] = {}
        for var in (*accumulated, *self.parameters()):
            layers = {self.layer[var]} if var in self.layer else self.evidence.get(var)
            if layers and (var not in self.layer or root(var) not in known):
                known[root(var)] = min(layers)
        everyone = dict.fromkeys(
            [*self.program.inputs, *accumulated, *(v for e in after for v in e.outvars), *list(parents)]
        )
        return {v: known[root(v)] for v in everyone if root(v) in known}


def _latest(end: int, flops: Sequence[float], cuts: Sequence[float]) -> int:
    """The last end before the next heavy equation where no more bytes cross.

    So biases, activation functions and norms stay with the matmul in front of them, as in the model.
    """
    light = itertools.takewhile(lambda k: not flops[k], range(end, len(cuts)))
    return max((k + 1 for k in light if cuts[k] <= cuts[end - 1]), default=end)


def is_boundary(eqn: JaxprEqn) -> bool:
    """Whether an equation is the user's mark."""
    return eqn.params.get("name") == BOUNDARY


def check_gradient(layers: Layers, schedule: str) -> None:
    """Raise `TraceError` where a training schedule meets a step without gradient."""
    if schedule != "inference" and not any(layers.backward):
        raise TraceError(
            f"the schedule {schedule!r} needs a backward pass, but the step computes no gradient; use "
            'PipeshardParallel(schedule="inference"), or take jax.grad inside the step'
        )
    if schedule == "inference" and any(layers.backward):
        raise TraceError(
            'the schedule "inference" runs forward only, but the step computes a gradient; use "1f1b" or "auto"'
        )


def loops_by_layer(layers: Layers, lengths: Sequence[int]) -> list[int]:
    """How many parts of the loop over layers each layer has; `lengths` are those of the parts."""
    return [sum(_is_part(e, lengths) for e in eqns) for eqns in layers.forward]


def ends_by_loop(program: MicroProgram, loops: Sequence[int], lengths: Sequence[int]) -> tuple[int, ...] | None:
    """Where layers end that have so many parts of the loop each: right behind the last of them.

    A layer in front of all parts ends right before the first. None where a cut would leave a layer empty.
    """
    former = _Former(program)
    former.classify()
    forward = [e for e in program.micro if former.kinds[id(e)] == "forward"]
    places = [i for i, e in enumerate(forward) if _is_part(e, lengths)]
    if len(places) != sum(loops):
        return None
    ends: list[int] = []
    done = 0
    for count in loops[:-1]:
        done += count
        ends.append(places[done - 1] + 1 if done else places[0])
    found = (*ends, len(forward))
    return found if all(a < b for a, b in itertools.pairwise((0, *found))) else None


def _is_part(eqn: JaxprEqn, lengths: Sequence[int]) -> bool:
    return eqn.primitive.name == "scan" and eqn.params["length"] in lengths
