"""Read a compiled HLO module and say how many bytes each device sends per execution, by kind of collective.

    text = jax.jit(step).lower(*args).compile().as_text()
    traffic_by_kind(read_collectives(text))          # {"all-reduce": 7168, ...} bytes per device

The text must be the partitioned program (shapes are those of one device). What this file cannot read it refuses with
`HloError`: a guess about replica groups would give a plausible wrong number. It does not see communication hidden in
custom calls, nor the bytes that a send or receive to the host moves.

`runtime.hlo_text` reads the text itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from alpa_like.runtime.hlo_text import (
    LIST,
    Computation,
    Groups,
    HloError,
    Instruction,
    Module,
    error_at,
    list_groups,
    parse_module,
    parts_of,
    replica_groups,
    shape_bytes,
)  # fmt: skip

__all__ = ["KINDS", "Collective", "HloError", "priced_as", "read_collectives", "ring_bytes", "traffic_by_kind"]

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective of the program as one device sees it; async pairs are one collective.

    Example: `psum` of f32[1024] over 8 devices is kind all-reduce, operand_bytes 4096, result_bytes 4096,
    group_size 8, groups ((0, ..., 7),), count 1. A collective in a computation that is called twice appears twice, and
    so does an all-reduce of several operands of which only some scatter (XLA combines small all-reduces into one).
    """

    kind: str  # one of KINDS
    operand_bytes: int  # per device, all operands together
    result_bytes: int  # per device, all results together
    group_size: int  # devices per group; of a collective-permute 2, or 1 if no pair leaves its device
    groups: Groups  # the device groups; of a collective-permute the (source, target) pairs
    count: int  # executions per step: the trip counts of the enclosing loops multiplied
    trip_count_known: bool  # False: an enclosing loop has no readable trip count and was counted as one trip
    scatters: bool  # an all-reduce of which every use keeps only 1/group_size: a GPU build makes it a reduce-scatter
    name: str  # instruction name, without %
    source: str  # op_name and source_file:line of the metadata, "" if there is none


# ---------------------------------------------------------------------------------------------------- bytes


def ring_bytes(collective: Collective, *, reduce_scatter: bool = False) -> int:
    """Bytes that each device sends in all executions, by the ring algorithms.

    With n devices per group and S the bytes of the value that is not split over the group: all-reduce 2 S (n-1)/n,
    all-gather, reduce-scatter and all-to-all S (n-1)/n, permute S. Broadcast is a pipelined chain in which the last
    device sends nothing: S (n-1)/n on average. `reduce_scatter` prices an all-reduce that scatters as a
    reduce-scatter. Sources: Patarasuk, Yuan, "Bandwidth optimal all-reduce algorithms" (2009) for the rings;
    Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH" (2005), all-to-all.
    """
    size, kind = collective.group_size, priced_as(collective, reduce_scatter=reduce_scatter)
    full = collective.result_bytes if kind == "all-gather" else collective.operand_bytes
    if size == 1:
        return 0
    if kind == "collective-permute":
        return full * collective.count
    return (2 if kind == "all-reduce" else 1) * full * (size - 1) * collective.count // size


def priced_as(collective: Collective, *, reduce_scatter: bool) -> str:
    """The kind whose formula applies."""
    return "reduce-scatter" if reduce_scatter and collective.scatters else collective.kind


def traffic_by_kind(collectives: Iterable[Collective], *, reduce_scatter: bool = False) -> dict[str, int]:
    """Ring bytes sent per device for each kind that occurs, in the order of KINDS."""
    totals: dict[str, int] = {}
    for collective in collectives:
        kind = priced_as(collective, reduce_scatter=reduce_scatter)
        totals[kind] = totals.get(kind, 0) + ring_bytes(collective, reduce_scatter=reduce_scatter)
    return {kind: totals[kind] for kind in KINDS if kind in totals}


# ---------------------------------------------------------------------------------------------------- collectives

_TRANSPARENT = ("bitcast", "reshape", "copy", "convert", "transpose")
_CALLERS = ("fusion", "call", "async")
_UNREADABLE = ("ragged-all-to-all", "send")


@dataclass(frozen=True, slots=True)
class _Scope:
    """A computation being read: how often it runs per step, and the computations reached so far (shared, grows)."""

    module: Module
    computation: Computation
    count: int
    trip_count_known: bool
    reached: set[str]

    def inside(self, caller: Instruction, name: str, trips: int | None = 1) -> tuple[Collective, ...]:
        """Collectives of a called computation that runs `trips` times per run of this one (None: not known)."""
        self.reached.add(name)
        callee = self.module.callee(caller, name)
        count = self.count * (1 if trips is None else trips)
        known = self.trip_count_known and trips is not None
        return _read_computation(_Scope(self.module, callee, count, known, self.reached))


def read_collectives(text: str) -> tuple[Collective, ...]:
    """The collectives that one execution of the entry computation runs, in printed order.

    A collective in a while body counts once per trip. Of a conditional only the branch with the most ring bytes counts.
    Raises HloError on what it cannot read, and if a collective stands in a computation that no known caller reaches.
    """
    module = parse_module(text)
    scope = _Scope(module, module.computations[module.entry], 1, True, {module.entry})
    collectives = _read_computation(scope)
    for name in module.computations.keys() - scope.reached:
        for instruction in module.computations[name].instructions.values():
            if _base(instruction) in (*KINDS, *_UNREADABLE):
                raise error_at(instruction, "a caller that is a while, conditional, call, fusion or async-start", name)
    return collectives


def _base(instruction: Instruction) -> str:
    """The opcode; that of the first half of an async pair without -start."""
    return instruction.opcode.removesuffix("-start")


def _read_computation(scope: _Scope) -> tuple[Collective, ...]:
    return tuple(found for each in scope.computation.instructions.values() for found in _read_instruction(scope, each))


def _read_instruction(scope: _Scope, instruction: Instruction) -> tuple[Collective, ...]:
    opcode = _base(instruction)
    if opcode in KINDS:
        return _read_collective(scope, instruction)
    if opcode == "while":
        return _read_while(scope, instruction)
    if opcode == "conditional":
        return max((scope.inside(instruction, name) for name in _branches(instruction)), key=_total_bytes)
    if opcode in _CALLERS:
        return scope.inside(instruction, _callee_name(instruction))
    if opcode in _UNREADABLE and instruction.attributes.get("is_host_transfer") != "true":
        raise error_at(instruction, f"one of {', '.join(KINDS)}", instruction.opcode)
    return ()


def _total_bytes(collectives: Iterable[Collective]) -> int:
    return sum(map(ring_bytes, collectives))


def _callee_name(caller: Instruction) -> str:
    attributes = caller.attributes
    return _reference(caller, "to_apply" if "to_apply" in attributes else "calls")


def _reference(caller: Instruction, attribute: str) -> str:
    """Name of the computation that an attribute refers to."""
    if attribute not in caller.attributes:
        raise error_at(caller, f"an attribute {attribute}=%computation", caller.rest)
    return caller.attributes[attribute].removeprefix("%")


def _branches(instruction: Instruction) -> list[str]:
    if "branch_computations" in instruction.attributes:
        names = instruction.attributes["branch_computations"].strip("{}")
        return [name.removeprefix("%") for name in parts_of(names)]
    return [_reference(instruction, "true_computation"), _reference(instruction, "false_computation")]


def _read_collective(scope: _Scope, instruction: Instruction) -> tuple[Collective, ...]:
    kind, computation = _base(instruction), scope.computation
    operands = [shape_bytes(instruction, computation.find(name, instruction).shape) for name in instruction.operands]
    permutes = kind == "collective-permute"
    groups = _pairs(instruction) if permutes else replica_groups(instruction, scope.module.devices)
    collective = Collective(
        kind=kind,
        operand_bytes=sum(operands),
        result_bytes=shape_bytes(instruction, _result_shape(instruction)),
        group_size=1 + any(source != target for source, target in groups) if permutes else len(groups[0]),
        groups=groups,
        count=scope.count,
        trip_count_known=scope.trip_count_known,
        scatters=False,
        name=instruction.name,
        source=_source(instruction),
    )
    if kind != "all-reduce" or collective.group_size == 1:
        return (collective,)
    return _mark_scatters(scope, instruction, collective, operands)


def _mark_scatters(
    scope: _Scope, instruction: Instruction, collective: Collective, operands: list[int]
) -> tuple[Collective, ...]:
    """The operands that do not scatter, and those that do; `operands` are their bytes."""
    results = _results(scope.computation, instruction, len(operands))
    flags = [_only_sliced(scope.module, values, collective.group_size) for values in results]
    sizes = {flag: sum(size for size, each in zip(operands, flags, strict=True) if each == flag) for flag in flags}
    parts = sorted(sizes.items())
    return tuple(replace(collective, scatters=flag, operand_bytes=size, result_bytes=size) for flag, size in parts)


def _result_shape(instruction: Instruction) -> str:
    """The shape of the result alone; most async starts print (operands, results, context...)."""
    if not instruction.opcode.endswith("-start"):
        return instruction.shape
    parts = parts_of(instruction.shape[1:-1]) if instruction.shape.startswith("(") else []
    if instruction.opcode == "all-reduce-start" and not (parts and parts[0].startswith("(")):
        return instruction.shape
    if len(parts) < 2:
        raise error_at(instruction, "a shape (operands, results, ...)", instruction.shape)
    return parts[1]


def _pairs(instruction: Instruction) -> Groups:
    """source_target_pairs of a collective-permute that sends its whole operand."""
    text = instruction.attributes.get("source_target_pairs", "")
    match = LIST.fullmatch(text)
    pairs = list_groups(match) if match else ()
    if match is None or any(len(pair) != 2 for pair in pairs) or "slice_sizes" in instruction.attributes:
        raise error_at(instruction, "source_target_pairs={{0,1},...} and no slice_sizes", text)
    return pairs


def _source(instruction: Instruction) -> str:
    """`op_name file:line`, as far as the metadata has them."""
    metadata = instruction.attributes.get("metadata", "")
    name, file = (re.search(rf'\b{key}="((?:\\.|[^"\\])*)"', metadata) for key in ("op_name", "source_file"))
    line = re.search(r"\bsource_line=(\d+)", metadata)
    place = file[1] + (f":{line[1]}" if line else "") if file else ""
    return " ".join(part for part in (name[1] if name else "", place) if part)


@dataclass(frozen=True, slots=True)
class _Value:
    """The result of an instruction; `caller` is the value that it becomes if it is the root (None: do not follow)."""

    computation: Computation
    name: str
    caller: _Value | None = None

    @property
    def uses(self) -> tuple[Instruction, ...]:
        return self.computation.users.get(self.name, ())


def _results(computation: Computation, reduction: Instruction, operands: int) -> list[tuple[_Value, ...]]:
    """For each operand of an all-reduce, the values that hold its result."""
    value = _Value(computation, reduction.name)
    if reduction.opcode.endswith("-start"):
        done = [use.name for use in value.uses if use.opcode == "all-reduce-done"]
        value = _Value(computation, done[0]) if done else value
    if operands == 1 and not computation.instructions[value.name].shape.startswith("("):
        return [(value,)]
    if any(use.opcode != "get-tuple-element" for use in value.uses) or value.name == computation.root:
        return [()] * operands
    elements = [(int(use.attributes["index"]), _Value(computation, use.name)) for use in value.uses]
    return [tuple(element for at, element in elements if at == index) for index in range(operands)]


def _only_sliced(module: Module, values: tuple[_Value, ...], parts: int) -> bool:
    """Whether every use of the values is a dynamic-slice that keeps one of `parts` equal parts, and there is one."""
    return bool(values) and all(_is_only_sliced(module, value, parts) for value in values)


def _is_only_sliced(module: Module, value: _Value, parts: int) -> bool:
    returned = value.name == value.computation.root
    if returned and (value.caller is None or not _is_only_sliced(module, value.caller, parts)):
        return False
    return (returned or bool(value.uses)) and all(_slices(module, value, use, parts) for use in value.uses)


def _slices(module: Module, value: _Value, use: Instruction, parts: int) -> bool:
    computation, name = value.computation, value.name
    if use.opcode == "dynamic-slice":
        whole = shape_bytes(use, computation.instructions[name].shape)
        return use.operands.index(name) == 0 and whole == parts * shape_bytes(use, use.shape)
    result = _Value(computation, use.name, value.caller)
    if use.opcode in _TRANSPARENT:
        return _is_only_sliced(module, result, parts)
    if use.opcode not in ("fusion", "call"):
        return False
    callee = module.callee(use, _callee_name(use))
    positions = [at for at, operand in enumerate(use.operands) if operand == name]
    return _only_sliced(module, tuple(_Value(callee, callee.parameter(at), result) for at in positions), parts)


# ---------------------------------------------------------------------------------------------------- loops

_KNOWN_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')


def _read_while(scope: _Scope, loop: Instruction) -> tuple[Collective, ...]:
    """Body collectives once per trip; those of the condition once more, for the test that ends the loop."""
    trips = _trip_count(scope, loop)
    tests = None if trips is None else trips + 1
    body, condition = _reference(loop, "body"), _reference(loop, "condition")
    return scope.inside(loop, condition, tests) + scope.inside(loop, body, trips)


def _trip_count(scope: _Scope, loop: Instruction) -> int | None:
    """Trips of a while loop: XLA's own analysis if printed, else of a loop `for (i = 0; i < constant; i += 1)`."""
    known = _KNOWN_TRIPS.search(loop.rest.replace("\\", ""))
    if known:
        return int(known[1])
    module = scope.module
    test = _root_value(module, module.callee(loop, _reference(loop, "condition")), (("state",),))
    match test:
        case ("compare", ("state", int(index)), int(bound)):
            start = _value(module, scope.computation, loop.operands[0], ())
            after = _root_value(module, module.callee(loop, _reference(loop, "body")), (("state",),))
            counts = _element(start, index) == 0 and _element(after, index) == ("add", ("state", index), 1)
            return max(bound, 0) if counts else None
        case _:
            return None


def _root_value(module: Module, computation: Computation, arguments: tuple[object, ...]) -> object:
    return _value(module, computation, computation.root, arguments)


def _value(module: Module, computation: Computation, name: str, arguments: tuple[object, ...]) -> object:
    """What a loop counter's arithmetic says: an integer, ("state", i) for element i of the loop state, or a term.

    Terms are ("tuple", ...), ("add", a, b) and ("compare", a, b) for a < b; all else is None.
    """
    each = computation.instructions[name]
    if each.opcode == "parameter":
        return arguments[int(each.inner)] if int(each.inner) < len(arguments) else None
    if each.opcode == "constant":
        return int(each.inner) if re.fullmatch(r"-?\d+", each.inner) else None
    scalar = each.shape.endswith("[]") and each.opcode in ("copy", "bitcast", "add", "compare", "fusion", "call")
    if not scalar and each.opcode not in ("tuple", "get-tuple-element"):  # arrays would lead through the whole program
        return None
    operands = tuple(_value(module, computation, operand, arguments) for operand in each.operands)
    return _term(module, each, operands)


def _term(module: Module, each: Instruction, operands: tuple[object, ...]) -> object:
    match each.opcode:
        case "copy" | "bitcast":
            return operands[0]
        case "get-tuple-element":
            return _element(operands[0], int(each.attributes["index"]))
        case "fusion" | "call":
            return _root_value(module, module.callee(each, _callee_name(each)), operands)
        case "add":
            return ("add", *sorted(operands, key=lambda value: isinstance(value, int)))
        case "compare" if each.attributes.get("direction") != "LT":
            return None
        case opcode:
            return (opcode, *operands)


def _element(value: object, index: int) -> object:
    """Element of a tuple term; of the loop state the term ("state", index)."""
    match value:
        case ("state",):
            return ("state", index)
        case ("tuple", *elements):
            return elements[index]
        case _:
            return None
