"""Read a compiled HLO module and say how many bytes each device sends per execution, by kind of collective.

    text = jax.jit(step).lower(*args).compile().as_text()
    traffic_by_kind(read_collectives(text))          # {"all-reduce": 7168, ...} bytes per device

The text must be the partitioned program (shapes are those of one device). What this file cannot read it refuses with
`HloError`: a guess about replica groups would give a plausible wrong number. It does not see communication hidden in
custom calls, nor the bytes that a send or receive to the host moves.

Printed forms: https://openxla.org/xla/operation_semantics for the operations; replica groups as printed by
xla/hlo/ir/replica_group.cc, meshes by xla/hlo/ir/mesh_and_axis.cc; tried with jaxlib 0.10.2.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

Groups = tuple[tuple[int, ...], ...]


class HloError(ValueError):
    """HLO text that this reader does not understand."""


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


_ARRAY = re.compile(r"(\w+)\[([^\]]*)\]")
_LAYOUT = re.compile(r"\{[^{}]*\}")
_DTYPE = re.compile(r"(?:bf|[sufc])(\d+)(?:e\d+m\d+\w*)?")


def _shape_bytes(instruction: "_Instruction", shape: str) -> int:
    """Bytes of an array shape, or of all arrays of a tuple shape; the instruction is named in errors."""
    arrays = _LAYOUT.sub("", shape)
    if "{" in arrays or not re.search(r"\[|\(\s*\)", arrays):
        raise _error(instruction, "a shape such as f32[8,16]{1,0}", shape)
    return sum(_array_bytes(instruction, dtype, dims) for dtype, dims in _ARRAY.findall(arrays))


def _array_bytes(instruction: "_Instruction", dtype: str, dims: str) -> int:
    """Bytes of one array; 4-bit elements take half a byte each, a dynamic dim counts with its bound."""
    sizes = [dim.strip().removeprefix("<=") for dim in dims.split(",") if dim.strip()]
    bits = _bits(dtype)
    if bits is None or not all(size.isdigit() for size in sizes):
        raise _error(instruction, "an array such as f32[8], bf16[] or f8e4m3fn[2,3]", f"{dtype}[{dims}]")
    return -(-bits * math.prod(map(int, sizes)) // 8)


def _bits(dtype: str) -> int | None:
    """Bits of an element; tokens and opaque values hold none, None is an unknown type."""
    if dtype in ("token", "opaque"):
        return 0
    if dtype == "pred":
        return 8
    match = _DTYPE.fullmatch(dtype)
    return int(match[1]) if match else None


# ---------------------------------------------------------------------------------------------------- text to module

_EVENT = re.compile(r'"(?:\\.|[^"\\])*"|[()\[\]{},]')
_HEADER = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*\)\s*->.*)?\{")
_INSTRUCTION = re.compile(r"(?:ROOT\s+)?%?([\w.\-]+) = (.*)")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_INDEX_COMMENT = re.compile(r"/\*index=\d+\*/")


@dataclass(frozen=True, slots=True)
class _Instruction:
    """`%name = shape opcode(inner)rest`, each part as it is printed; `line` is the whole for messages."""

    name: str
    shape: str
    opcode: str
    inner: str
    rest: str
    line: str

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands; printed operand shapes are dropped."""
        if self.opcode in ("constant", "parameter"):
            return ()
        return tuple(part.split()[-1].removeprefix("%") for part in _split(self.inner))

    @property
    def attributes(self) -> dict[str, str]:
        """Attribute texts by name, in printed order."""
        pairs = (part.partition("=") for part in _split(self.rest))
        return {key.strip(): value for key, _, value in pairs}


@dataclass(frozen=True, slots=True)
class _Computation:
    """Instructions by name in printed order, which instructions use each of them, and the root's name."""

    instructions: Mapping[str, _Instruction]
    users: Mapping[str, tuple[_Instruction, ...]]
    root: str

    def find(self, name: str, user: _Instruction) -> _Instruction:
        if name not in self.instructions:
            raise _error(user, "operands defined in the same computation", name)
        return self.instructions[name]

    def parameter(self, position: int) -> str:
        for instruction in self.instructions.values():
            if instruction.opcode == "parameter" and instruction.inner == str(position):
                return instruction.name
        raise HloError(f"expected parameter({position}) in the computation with root {self.root}, found none")


@dataclass(frozen=True, slots=True)
class _Module:
    """Computations by name, the entry's name, and the number of devices (0 if the header gives none)."""

    computations: Mapping[str, _Computation]
    entry: str
    devices: int

    def callee(self, caller: _Instruction, name: str) -> _Computation:
        if name not in self.computations:
            raise _error(caller, "a computation of this module", name)
        return self.computations[name]


def _error(instruction: _Instruction, expected: str, found: str) -> HloError:
    return HloError(f"instruction {instruction.name}: expected {expected}, found {found!r}, in: {instruction.line}")


def _split(text: str) -> list[str]:
    """The parts of a text between commas that are not inside brackets or strings; empty parts are dropped."""
    parts, start, depth = [], 0, 0
    for event in _EVENT.finditer(text):
        depth += (event[0] in "([{") - (event[0] in ")]}")
        if event[0] == "," and depth == 0:
            parts.append(text[start : event.start()])
            start = event.end()
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _closing(text: str, start: int) -> int:
    """Index after the bracket that closes the one at `start`."""
    depth = 0
    for event in _EVENT.finditer(text, start):
        depth += (event[0] in "([{") - (event[0] in ")]}")
        if depth == 0:
            return event.end()
    raise HloError(f"expected a closing bracket, found none, in: {text}")


def _parse_module(text: str) -> _Module:
    """Raises HloError on a line inside a computation that is no instruction, and if there is not exactly one ENTRY."""
    computations: dict[str, _Computation] = {}
    entries: list[str] = []
    lines = iter(_INDEX_COMMENT.sub("", text).splitlines())
    for line in lines:
        header = _HEADER.fullmatch(line.strip())
        if header is None:  # the HloModule line, or the tables of source locations
            continue
        computations[header[2]] = _parse_computation(lines, header[2])
        entries += [header[2]] if header[1] else []
    if len(entries) != 1:
        raise HloError(f"expected HLO text with one ENTRY computation, found {len(entries)}; text starts {text[:80]!r}")
    return _Module(computations, entries[0], _devices(text))


def _devices(text: str) -> int:
    """num_partitions times replica_count of the HloModule line; the printer leaves out a count of 1."""
    header = re.search(r"^\s*HloModule.*", text, re.MULTILINE)
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header[0]) if header else []
    return math.prod(map(int, counts)) if counts else 0


def _parse_computation(lines: Iterable[str], name: str) -> _Computation:
    """Takes lines up to and including the closing brace."""
    instructions: dict[str, _Instruction] = {}
    users: dict[str, list[_Instruction]] = {}
    root = ""
    for line in lines:
        line = line.strip()
        if line.startswith("}"):
            return _Computation(instructions, {key: tuple(value) for key, value in users.items()}, root)
        if not line:
            continue
        instruction = _parse_instruction(line)
        instructions[instruction.name] = instruction
        root = instruction.name if line.startswith("ROOT ") or not root else root
        for operand in dict.fromkeys(instruction.operands):
            users.setdefault(operand, []).append(instruction)
    raise HloError(f"expected a closing brace of computation {name}, found the end of the text")


def _parse_instruction(line: str) -> _Instruction:
    match = _INSTRUCTION.fullmatch(line)
    if match is None:
        raise HloError(f"expected an instruction `%name = shape opcode(...)`, found: {line}")
    name, text = match[1], match[2]
    end = _closing(text, 0) if text.startswith("(") else len(text.partition(" ")[0])
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        raise HloError(f"expected an opcode and operands after the shape of {name}, found: {line}")
    close = _closing(text, opcode.end() - 1)
    return _Instruction(name, text[:end], opcode[1], text[opcode.end() : close - 1], text[close:], line)


# ---------------------------------------------------------------------------------------------------- device groups

_LIST = re.compile(r"\{((?:\{[\d, ]+\},? ?)*)\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]+)\](?:, device_ids=\((?:\[([\d,]+)\]T\(([\d,]+)\)|([\d,]+))\))? \{([^}]+)\}")
_AXIS_SIZE = re.compile(r"'?([^',=]+)'?=(\d+)")
_AXIS = re.compile(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?")


def _replica_groups(instruction: _Instruction, devices: int) -> Groups:
    """The device groups in any printed form; each of the module's devices is in exactly one, all are equally large."""
    attributes = instruction.attributes
    text = attributes.get("replica_groups", "")
    if "device_ids" in attributes:  # the mesh form prints a comma of its own
        text += f", device_ids={attributes['device_ids']}"
    groups = _read_groups(instruction, text, devices)
    members = sorted(device for group in groups for device in group)
    if len({len(group) for group in groups}) != 1:
        raise _error(instruction, "groups of one size", text)
    if members != list(range(devices or len(members))):
        raise _error(instruction, f"each of {devices or len(members)} devices in exactly one group", text)
    return groups


def _read_groups(instruction: _Instruction, text: str, devices: int) -> Groups:
    if text == "{}":
        if not devices:
            raise _error(instruction, "num_partitions or replica_count in the HloModule line for", text)
        return (tuple(range(devices)),)
    forms: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Groups]], ...] = (
        (_LIST, _list_groups),
        (_IOTA, _iota_groups),
        (_MESH, _mesh_groups),
    )
    for pattern, read in forms:
        if match := pattern.fullmatch(text):
            try:
                return read(match)
            except ValueError as error:
                raise _error(instruction, f"consistent replica groups ({error})", text) from error
    raise _error(instruction, "replica groups {{0,1},{2,3}}, [2,4]<=[8] or mesh['a'=2,'b'=4] {'a'}", text)


def _list_groups(match: re.Match[str]) -> Groups:
    """{{0,1},{2,3}}"""
    return tuple(tuple(_ints(group)) for group in re.findall(r"\{([^{}]+)\}", match[1]))


def _iota_groups(match: re.Match[str]) -> Groups:
    """[groups,size]<=[dims]T(permutation): count up, shape as dims, transpose, and cut into groups."""
    count, size = _ints(match[1])
    return _rows(_iota(_ints(match[2]), match[3]).reshape(count, size))


def _mesh_groups(match: re.Match[str]) -> Groups:
    """mesh['a'=2,'b'=4] {'a','b':(2)2}: devices that differ only along the axes in braces form a group.

    The sub-axis 'b':(2)2 goes from stride 2 to stride 4 of b: the dim of size 2 after a dim of size 2. Each axis is
    cut into dims at all strides named, then the dims in braces are moved to the end.
    """
    sizes = {name: int(size) for name, size in _AXIS_SIZE.findall(match[1])}
    spans = [_span(axis, sizes) for axis in _split(match[5])]
    cuts = {axis: sorted({1, size} | _ends(axis, spans)) for axis, size in sizes.items()}
    steps = [(axis, begin, end) for axis in sizes for begin, end in pairwise(cuts[axis])]
    moved = [steps.index(step) for span in spans for step in steps if _covers(span, step)]
    still = [at for at in range(len(steps)) if at not in moved]
    dims = [end // begin for _, begin, end in steps]
    devices = _mesh_devices(match, math.prod(sizes.values())).reshape(dims).transpose(still + moved)
    return _rows(devices.reshape(-1, math.prod(dims[at] for at in moved)))


def _span(text: str, sizes: Mapping[str, int]) -> tuple[str, int, int]:
    """An axis or sub-axis as its name and the strides, counted from the outside, between which it lies."""
    match = _AXIS.fullmatch(text)
    if match is None or match[1] not in sizes:
        raise ValueError(f"{text} is no axis of the mesh")
    first = int(match[2] or 1)
    return match[1], first, first * int(match[3] or sizes[match[1]])


def _covers(span: tuple[str, int, int], step: tuple[str, int, int]) -> bool:
    return span[0] == step[0] and span[1] <= step[1] < span[2]


def _ends(axis: str, spans: Iterable[tuple[str, int, int]]) -> set[int]:
    return {end for name, first, last in spans if name == axis for end in (first, last)}


def _mesh_devices(match: re.Match[str], size: int) -> np.ndarray:
    """Devices in the mesh's row-major order: 0, 1, ... unless device_ids=(...) lists them."""
    if match[4]:
        return np.array(_ints(match[4]))
    return _iota(_ints(match[2] or str(size)), match[3])


def _iota(dims: list[int], permutation: str | None) -> np.ndarray:
    """[dims]T(permutation), flattened."""
    counted = np.arange(math.prod(dims)).reshape(dims)
    return (counted.transpose(_ints(permutation)) if permutation else counted).ravel()


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number.strip()]


def _rows(devices: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in devices.tolist())


# ---------------------------------------------------------------------------------------------------- collectives

_TRANSPARENT = ("bitcast", "reshape", "copy", "convert", "transpose")
_CALLERS = ("fusion", "call", "async")
_UNREADABLE = ("ragged-all-to-all", "send")


@dataclass(frozen=True, slots=True)
class _Scope:
    """A computation being read: how often it runs per step, and the computations reached so far (shared, grows)."""

    module: _Module
    computation: _Computation
    count: int
    trip_count_known: bool
    reached: set[str]

    def inside(self, caller: _Instruction, name: str, trips: int | None = 1) -> tuple[Collective, ...]:
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
    module = _parse_module(text)
    scope = _Scope(module, module.computations[module.entry], 1, True, {module.entry})
    collectives = _read_computation(scope)
    for name in module.computations.keys() - scope.reached:
        for instruction in module.computations[name].instructions.values():
            if _base(instruction) in (*KINDS, *_UNREADABLE):
                raise _error(instruction, "a caller that is a while, conditional, call, fusion or async-start", name)
    return collectives


def _base(instruction: _Instruction) -> str:
    """The opcode; that of the first half of an async pair without -start."""
    return instruction.opcode.removesuffix("-start")


def _read_computation(scope: _Scope) -> tuple[Collective, ...]:
    return tuple(found for each in scope.computation.instructions.values() for found in _read_instruction(scope, each))


def _read_instruction(scope: _Scope, instruction: _Instruction) -> tuple[Collective, ...]:
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
        raise _error(instruction, f"one of {', '.join(KINDS)}", instruction.opcode)
    return ()


def _total_bytes(collectives: Iterable[Collective]) -> int:
    return sum(map(ring_bytes, collectives))


def _callee_name(caller: _Instruction) -> str:
    attributes = caller.attributes
    return _reference(caller, "to_apply" if "to_apply" in attributes else "calls")


def _reference(caller: _Instruction, attribute: str) -> str:
    """Name of the computation that an attribute refers to."""
    if attribute not in caller.attributes:
        raise _error(caller, f"an attribute {attribute}=%computation", caller.rest)
    return caller.attributes[attribute].removeprefix("%")


def _branches(instruction: _Instruction) -> list[str]:
    if "branch_computations" in instruction.attributes:
        names = instruction.attributes["branch_computations"].strip("{}")
        return [name.removeprefix("%") for name in _split(names)]
    return [_reference(instruction, "true_computation"), _reference(instruction, "false_computation")]


def _read_collective(scope: _Scope, instruction: _Instruction) -> tuple[Collective, ...]:
    kind, computation = _base(instruction), scope.computation
    operands = [_shape_bytes(instruction, computation.find(name, instruction).shape) for name in instruction.operands]
    permutes = kind == "collective-permute"
    groups = _pairs(instruction) if permutes else _replica_groups(instruction, scope.module.devices)
    collective = Collective(
        kind=kind,
        operand_bytes=sum(operands),
        result_bytes=_shape_bytes(instruction, _result_shape(instruction)),
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
    scope: _Scope, instruction: _Instruction, collective: Collective, operands: list[int]
) -> tuple[Collective, ...]:
    """The operands that do not scatter, and those that do; `operands` are their bytes."""
    results = _results(scope.computation, instruction, len(operands))
    flags = [_only_sliced(scope.module, values, collective.group_size) for values in results]
    sizes = {flag: sum(size for size, each in zip(operands, flags, strict=True) if each == flag) for flag in flags}
    parts = sorted(sizes.items())
    return tuple(replace(collective, scatters=flag, operand_bytes=size, result_bytes=size) for flag, size in parts)


def _result_shape(instruction: _Instruction) -> str:
    """The shape of the result alone; most async starts print (operands, results, context...)."""
    if not instruction.opcode.endswith("-start"):
        return instruction.shape
    parts = _split(instruction.shape[1:-1]) if instruction.shape.startswith("(") else []
    if instruction.opcode == "all-reduce-start" and not (parts and parts[0].startswith("(")):
        return instruction.shape
    if len(parts) < 2:
        raise _error(instruction, "a shape (operands, results, ...)", instruction.shape)
    return parts[1]


def _pairs(instruction: _Instruction) -> Groups:
    """source_target_pairs of a collective-permute that sends its whole operand."""
    text = instruction.attributes.get("source_target_pairs", "")
    match = _LIST.fullmatch(text)
    pairs = _list_groups(match) if match else ()
    if match is None or any(len(pair) != 2 for pair in pairs) or "slice_sizes" in instruction.attributes:
        raise _error(instruction, "source_target_pairs={{0,1},...} and no slice_sizes", text)
    return pairs


def _source(instruction: _Instruction) -> str:
    """`op_name file:line`, as far as the metadata has them."""
    metadata = instruction.attributes.get("metadata", "")
    name, file = (re.search(rf'\b{key}="((?:\\.|[^"\\])*)"', metadata) for key in ("op_name", "source_file"))
    line = re.search(r"\bsource_line=(\d+)", metadata)
    place = file[1] + (f":{line[1]}" if line else "") if file else ""
    return " ".join(part for part in (name[1] if name else "", place) if part)


@dataclass(frozen=True, slots=True)
class _Value:
    """The result of an instruction; `caller` is the value that it becomes if it is the root (None: do not follow)."""

    computation: _Computation
    name: str
    caller: "_Value | None" = None

    @property
    def uses(self) -> tuple[_Instruction, ...]:
        return self.computation.users.get(self.name, ())


def _results(computation: _Computation, reduction: _Instruction, operands: int) -> list[tuple[_Value, ...]]:
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


def _only_sliced(module: _Module, values: tuple[_Value, ...], parts: int) -> bool:
    """Whether every use of the values is a dynamic-slice that keeps one of `parts` equal parts, and there is one."""
    return bool(values) and all(_is_only_sliced(module, value, parts) for value in values)


def _is_only_sliced(module: _Module, value: _Value, parts: int) -> bool:
    returned = value.name == value.computation.root
    if returned and (value.caller is None or not _is_only_sliced(module, value.caller, parts)):
        return False
    return (returned or bool(value.uses)) and all(_slices(module, value, use, parts) for use in value.uses)


def _slices(module: _Module, value: _Value, use: _Instruction, parts: int) -> bool:
    computation, name = value.computation, value.name
    if use.opcode == "dynamic-slice":
        whole = _shape_bytes(use, computation.instructions[name].shape)
        return use.operands.index(name) == 0 and whole == parts * _shape_bytes(use, use.shape)
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


def _read_while(scope: _Scope, loop: _Instruction) -> tuple[Collective, ...]:
    """Body collectives once per trip; those of the condition once more, for the test that ends the loop."""
    trips = _trip_count(scope, loop)
    tests = None if trips is None else trips + 1
    body, condition = _reference(loop, "body"), _reference(loop, "condition")
    return scope.inside(loop, condition, tests) + scope.inside(loop, body, trips)


def _trip_count(scope: _Scope, loop: _Instruction) -> int | None:
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


def _root_value(module: _Module, computation: _Computation, arguments: tuple[object, ...]) -> object:
    return _value(module, computation, computation.root, arguments)


def _value(module: _Module, computation: _Computation, name: str, arguments: tuple[object, ...]) -> object:
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


def _term(module: _Module, each: _Instruction, operands: tuple[object, ...]) -> object:
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
