"""HLO text → modules, computations and instructions, with the sizes of shapes and the device groups of collectives.

What this file cannot read it refuses with `HloError`. Printed forms: https://openxla.org/xla/operation_semantics for
the operations; replica groups as printed by xla/hlo/ir/replica_group.cc, meshes by xla/hlo/ir/mesh_and_axis.cc; tried
with jaxlib 0.10.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

__all__ = [
    "LIST", "Computation", "Groups", "HloError", "Instruction", "Module",
    "error_at", "list_groups", "parse_module", "parts_of", "replica_groups", "shape_bytes",
]  # fmt: skip

Groups = tuple[tuple[int, ...], ...]


class HloError(ValueError):
    """HLO text that this reader does not understand."""


_EVENT = re.compile(r'"(?:\\.|[^"\\])*"|[()\[\]{},]')
_HEADER = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*\)\s*->.*)?\{")
_INSTRUCTION = re.compile(r"(?:ROOT\s+)?%?([\w.\-]+) = (.*)")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_INDEX_COMMENT = re.compile(r"/\*index=\d+\*/")


@dataclass(frozen=True, slots=True)
class Instruction:
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
        return tuple(part.split()[-1].removeprefix("%") for part in parts_of(self.inner))

    @property
    def attributes(self) -> dict[str, str]:
        """Attribute texts by name, in printed order."""
        pairs = (part.partition("=") for part in parts_of(self.rest))
        return {key.strip(): value for key, _, value in pairs}


@dataclass(frozen=True, slots=True)
class Computation:
    """Instructions by name in printed order, which instructions use each of them, and the root's name."""

    instructions: Mapping[str, Instruction]
    users: Mapping[str, tuple[Instruction, ...]]
    root: str

    def find(self, name: str, user: Instruction) -> Instruction:
        if name not in self.instructions:
            raise error_at(user, "operands defined in the same computation", name)
        return self.instructions[name]

    def parameter(self, position: int) -> str:
        for instruction in self.instructions.values():
            if instruction.opcode == "parameter" and instruction.inner == str(position):
                return instruction.name
        raise HloError(f"expected parameter({position}) in the computation with root {self.root}, found none")


@dataclass(frozen=True, slots=True)
class Module:
    """Computations by name, the entry's name, and the number of devices (0 if the header gives none)."""

    computations: Mapping[str, Computation]
    entry: str
    devices: int

    def callee(self, caller: Instruction, name: str) -> Computation:
        if name not in self.computations:
            raise error_at(caller, "a computation of this module", name)
        return self.computations[name]


def error_at(instruction: Instruction, expected: str, found: str) -> HloError:
    return HloError(f"instruction {instruction.name}: expected {expected}, found {found!r}, in: {instruction.line}")


def parts_of(text: str) -> list[str]:
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


def parse_module(text: str) -> Module:
    """Raises HloError on a line inside a computation that is no instruction, and if there is not exactly one ENTRY."""
    computations: dict[str, Computation] = {}
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
    return Module(computations, entries[0], _devices(text))


def _devices(text: str) -> int:
    """num_partitions times replica_count of the HloModule line; the printer leaves out a count of 1."""
    header = re.search(r"^\s*HloModule.*", text, re.MULTILINE)
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header[0]) if header else []
    return math.prod(map(int, counts)) if counts else 0


def _parse_computation(lines: Iterable[str], name: str) -> Computation:
    """Takes lines up to and including the closing brace."""
    instructions: dict[str, Instruction] = {}
    users: dict[str, list[Instruction]] = {}
    root = ""
    for line in lines:
        line = line.strip()
        if line.startswith("}"):
            return Computation(instructions, {key: tuple(value) for key, value in users.items()}, root)
        if not line:
            continue
        instruction = _parse_instruction(line)
        instructions[instruction.name] = instruction
        root = instruction.name if line.startswith("ROOT ") or not root else root
        for operand in dict.fromkeys(instruction.operands):
            users.setdefault(operand, []).append(instruction)
    raise HloError(f"expected a closing brace of computation {name}, found the end of the text")


def _parse_instruction(line: str) -> Instruction:
    match = _INSTRUCTION.fullmatch(line)
    if match is None:
        raise HloError(f"expected an instruction `%name = shape opcode(...)`, found: {line}")
    name, text = match[1], match[2]
    end = _closing(text, 0) if text.startswith("(") else len(text.partition(" ")[0])
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        raise HloError(f"expected an opcode and operands after the shape of {name}, found: {line}")
    close = _closing(text, opcode.end() - 1)
    return Instruction(name, text[:end], opcode[1], text[opcode.end() : close - 1], text[close:], line)


# ---------------------------------------------------------------------------------------------------- bytes

_ARRAY = re.compile(r"(\w+)\[([^\]]*)\]")
_LAYOUT = re.compile(r"\{[^{}]*\}")
_DTYPE = re.compile(r"(?:bf|[sufc])(\d+)(?:e\d+m\d+\w*)?")


def shape_bytes(instruction: Instruction, shape: str) -> int:
    """Bytes of an array shape, or of all arrays of a tuple shape; the instruction is named in errors."""
    arrays = _LAYOUT.sub("", shape)
    if "{" in arrays or not re.search(r"\[|\(\s*\)", arrays):
        raise error_at(instruction, "a shape such as f32[8,16]{1,0}", shape)
    return sum(_array_bytes(instruction, dtype, dims) for dtype, dims in _ARRAY.findall(arrays))


def _array_bytes(instruction: Instruction, dtype: str, dims: str) -> int:
    """Bytes of one array; 4-bit elements take half a byte each, a dynamic dim counts with its bound."""
    sizes = [dim.strip().removeprefix("<=") for dim in dims.split(",") if dim.strip()]
    bits = _bits(dtype)
    if bits is None or not all(size.isdigit() for size in sizes):
        raise error_at(instruction, "an array such as f32[8], bf16[] or f8e4m3fn[2,3]", f"{dtype}[{dims}]")
    return -(-bits * math.prod(map(int, sizes)) // 8)


def _bits(dtype: str) -> int | None:
    """Bits of an element; tokens and opaque values hold none, None is an unknown type."""
    if dtype in ("token", "opaque"):
        return 0
    if dtype == "pred":
        return 8
    match = _DTYPE.fullmatch(dtype)
    return int(match[1]) if match else None


# ---------------------------------------------------------------------------------------------------- device groups

LIST = re.compile(r"\{((?:\{[\d, ]+\},? ?)*)\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]+)\](?:, device_ids=\((?:\[([\d,]+)\]T\(([\d,]+)\)|([\d,]+))\))? \{([^}]+)\}")
_AXIS_SIZE = re.compile(r"'?([^',=]+)'?=(\d+)")
_AXIS = re.compile(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?")


def replica_groups(instruction: Instruction, devices: int) -> Groups:
    """The device groups in any printed form; each of the module's devices is in exactly one, all are equally large."""
    attributes = instruction.attributes
    text = attributes.get("replica_groups", "")
    if "device_ids" in attributes:  # the mesh form prints a comma of its own
        text += f", device_ids={attributes['device_ids']}"
    groups = _read_groups(instruction, text, devices)
    members = sorted(device for group in groups for device in group)
    if len({len(group) for group in groups}) != 1:
        raise error_at(instruction, "groups of one size", text)
    if members != list(range(devices or len(members))):
        raise error_at(instruction, f"each of {devices or len(members)} devices in exactly one group", text)
    return groups


def _read_groups(instruction: Instruction, text: str, devices: int) -> Groups:
    if text == "{}":
        if not devices:
            raise error_at(instruction, "num_partitions or replica_count in the HloModule line for", text)
        return (tuple(range(devices)),)
    forms: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Groups]], ...] = (
        (LIST, list_groups),
        (_IOTA, _iota_groups),
        (_MESH, _mesh_groups),
    )
    for pattern, read in forms:
        if match := pattern.fullmatch(text):
            try:
                return read(match)
            except ValueError as error:
                raise error_at(instruction, f"consistent replica groups ({error})", text) from error
    raise error_at(instruction, "replica groups {{0,1},{2,3}}, [2,4]<=[8] or mesh['a'=2,'b'=4] {'a'}", text)


def list_groups(match: re.Match[str]) -> Groups:
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
    spans = [_span(axis, sizes) for axis in parts_of(match[5])]
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
