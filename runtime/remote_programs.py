"""What workers are told, as data: the part of a program that each mesh runs, host data in tiles, and small programs.

Nothing here talks to a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alpa_like.errors import ProgramError
from alpa_like.placement import AbstractDevices, Given, LoweredPipeline, Returned
from alpa_like.reshard import Layout, plan_transfer
from alpa_like.runtime.instructions import Free, Program, Recv, Ref, Route, Run, Send
from alpa_like.runtime.interpreter import Event
from alpa_like.runtime.remote_arrays import RemoteArray
from alpa_like.runtime.remote_transport import ProcessMap
from alpa_like.runtime.staged import BufferType, Staged, stage_function
from alpa_like.runtime.worker import MeshProgram, Partner, Tiles

__all__ = [
    "Input",
    "MeshPart",
    "Span",
    "host_tiles",
    "making",
    "merged",
    "mesh_part",
    "mesh_program",
    "moving",
    "on_host",
    "routes_of",
    "span_of",
]

Span = tuple[int, int]
"""Devices as (first, count)."""


@lru_cache(maxsize=4096)
def _cuts(
    layout: Layout, shape: tuple[int, ...], first: int, count: int
) -> tuple[tuple[tuple[slice, ...], ...], tuple[int, ...]]:
    """The different tiles of devices first to first + count - 1, and which of them each device holds."""
    tiles = layout.tiles()[first - layout.devices[0] : first - layout.devices[0] + count]
    different = list(dict.fromkeys(tiles))
    size = layout.tile_shape(shape)
    cells = [np.unravel_index(t, layout.parts) if layout.parts else () for t in different]
    slices = tuple(
        tuple(slice(int(c) * n, (int(c) + 1) * n) for c, n in zip(cell, size, strict=True)) for cell in cells
    )
    return slices, tuple(different.index(t) for t in tiles)


def on_host(value: Any, dtype: Any) -> np.ndarray[Any, Any]:
    """A leaf as a NumPy array of this dtype; the data of random keys. What it returns it takes as it is."""
    if isinstance(value, RemoteArray):
        value = value.value()
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return np.asarray(value).astype(dtype, copy=False)
    return value if isinstance(value, np.ndarray) else np.asarray(jax.random.key_data(value))


def host_tiles(data: np.ndarray[Any, Any], kind: BufferType, processes: ProcessMap, process: int) -> Tiles:
    """What one process holds of host data, which comes as `on_host` makes it."""
    count = processes.devices_per_process
    slices, places = _cuts(kind.layout, kind.shape, processes.first + process * count, count)
    # Without dims an index gives a scalar, of which `ascontiguousarray` would make an array with one.
    return Tiles(kind, tuple(np.ascontiguousarray(data[s]) if s else data for s in slices), places)


@dataclass(frozen=True, slots=True)
class Input:
    """One given buffer of a mesh: a flat argument, or rows of it for a micro-batch."""

    argument: int
    micro_batch: int
    layout: Layout

    def has(self, value: Any) -> bool:
        """Whether it is this array, which the workers hold where it is needed."""
        if not isinstance(value, RemoteArray) or self.micro_batch >= 0:
            return False
        return value.sharding is not None and value.sharding.layout == self.layout

    def rows(self, value: Any, count: int) -> Any:
        """The part of the argument that it is."""
        if self.micro_batch < 0:
            return value
        size = value.shape[0] // count
        return value[self.micro_batch * size : (self.micro_batch + 1) * size]


@dataclass(frozen=True, slots=True)
class MeshPart:
    """What the driver knows of a mesh of a program. `passed` are arguments that are returned as they are."""

    span: Span
    inputs: tuple[Input, ...]
    donated: frozenset[int]
    returned: tuple[Ref, ...]
    passed: Mapping[Ref, Input]


def span_of(program: Program, lowered: LoweredPipeline) -> Span:
    """The devices of a mesh."""
    for ref in program.given:
        return lowered.given[program.mesh, ref].layout.devices
    for i in program.instructions:
        match i:
            case Run(piece) if len(lowered.pieces[piece].ids):
                ids: range = lowered.pieces[piece].ids
                return ids.start, len(ids)
            case Send(_, _, route):
                return lowered.transfers[route][0].source.devices
            case Recv(_, _, route):
                return lowered.transfers[route][0].target.devices
            case _:
                pass
    raise ProgramError(f"mesh {program.mesh} does nothing; leave it out of the plan")


def mesh_part(program: Program, span: Span, lowered: LoweredPipeline) -> MeshPart:
    given = [lowered.given[program.mesh, ref] for ref in program.given]
    taken = {i.inputs[n] for i in program.instructions if isinstance(i, Run) for n in i.donated}
    donated = {g.argument for ref, g in zip(program.given, given, strict=True) if ref in taken and g.micro_batch < 0}
    inputs = {
        ref: Input(g.argument, g.micro_batch, g.layout)
        for ref, g in zip(program.given, given, strict=True)
        if g.argument >= 0
    }
    passed = {ref: inputs[ref] for ref in program.returned if ref in inputs}
    return MeshPart(span, tuple(inputs.values()), frozenset(donated), program.returned, passed)


def routes_of(program: Program) -> list[Route]:
    """The routes that a mesh sends or receives by."""
    return list(dict.fromkeys(i.transfer for i in program.instructions if isinstance(i, Send | Recv)))


def mesh_program(program: Program, lowered: LoweredPipeline, partners: Mapping[Route, Partner]) -> MeshProgram:
    """What the workers of a mesh get to know."""
    ran = dict.fromkeys(i.piece for i in program.instructions if isinstance(i, Run))
    pieces: dict[str, Staged] = {name: lowered.pieces[name] for name in ran}
    given = [lowered.given[program.mesh, ref] for ref in program.given]
    numbers = {place: (g.micro_batch, g.layout) for place, g in enumerate(given) if g.argument < 0}
    return MeshProgram(program, pieces, partners, numbers, lowered.names)


def merged(parts: Sequence[tuple[float, tuple[Event, ...]]]) -> tuple[Event, ...]:
    """The events of all workers by one clock. Processes of a mesh do the same: the longest of each event is kept."""
    found: dict[tuple[int, str], Event] = {}
    for offset_s, events in parts:
        for e in events:
            moved = replace(e, start_s=e.start_s + offset_s, end_s=e.end_s + offset_s)
            known = found.get((e.mesh, e.label), moved)
            start_s, end_s = min(known.start_s, moved.start_s), max(known.end_s, moved.end_s)
            found[e.mesh, e.label] = replace(moved, start_s=start_s, end_s=end_s)
    return tuple(sorted(found.values(), key=lambda e: e.start_s))


# -------------------------------------------------------------------------------------------------- small programs


def moving(kind: BufferType, layout: Layout, devices: AbstractDevices) -> LoweredPipeline:
    """A program that brings an array to another layout."""
    source, ref = kind.layout, Ref(0)
    given = {(0, ref): Given(0, -1, source)}
    if source.devices == layout.devices:
        moved = Ref(1)
        piece = stage_function("reshard", lambda x: (jnp.copy(x),), [kind.struct], [source], [layout], devices)
        run = Run("reshard", (ref,), (moved,), "reshard")
        programs = (Program(0, (ref,), (run, Free((ref,))), (moved,)),)
        return LoweredPipeline(
            programs, {"reshard": piece}, {}, given, (Returned(((0, moved),)),), (source,), (layout,), {}
        )
    route = Route(0, 0, 1)
    sending = Program(0, (ref,), (Send(ref, 1, route), Free((ref,))), ())
    receiving = Program(1, (), (Recv(ref, 0, route),), (ref,))
    size = 1 if kind.key_impl else jnp.dtype(kind.dtype).itemsize
    transfer = plan_transfer(kind.shape, size, source, layout)
    return LoweredPipeline(
        (sending, receiving),
        {},
        {route: (transfer, kind.struct.dtype)},
        given,
        (Returned(((1, ref),)),),
        (source,),
        (layout,),
        {},
    )


def making(
    name: str,
    fun: Callable[..., Sequence[Any]],
    types: Sequence[Any],
    wanted: Sequence[Layout],
    devices: AbstractDevices,
) -> LoweredPipeline:
    """A program that makes arrays in their layouts of host data: each mesh computes those that live there."""
    spans = list(dict.fromkeys(layout.devices for layout in wanted))
    arguments, results = range(len(types)), range(len(types), len(types) + len(wanted))
    programs: list[Program] = []
    pieces: dict[str, Staged] = {}
    given: dict[tuple[int, Ref], Given] = {}
    homes = {n: spans.index(layout.devices) for n, layout in zip(results, wanted, strict=True)}
    for mesh, span in enumerate(spans):
        mine = [n - len(types) for n in results if homes[n] == mesh]
        whole = [Layout((span[1],), ("x",), span, ((),) * len(t.shape)) for t in types]

        def part(*values: Any, mine: Sequence[int] = mine) -> list[Any]:
            made = fun(*values)
            return [made[n] for n in mine]

        pieces[f"{name} {mesh}"] = stage_function(
            f"{name} {mesh}", part, types, whole, [wanted[n] for n in mine], devices
        )
        # Every buffer has one maker: each mesh has its own numbers for the same arguments.
        inputs = tuple(Ref(len(types) + len(wanted) + mesh * len(types) + a) for a in arguments)
        outputs = tuple(Ref(len(types) + n) for n in mine)
        run = Run(f"{name} {mesh}", inputs, outputs, name)
        programs.append(Program(mesh, inputs, (run, Free(inputs)) if inputs else (run,), outputs))
        given.update(((mesh, ref), Given(a, -1, whole[a])) for a, ref in enumerate(inputs))
    returned = tuple(Returned(((homes[n], Ref(n)),)) for n in results)
    return LoweredPipeline(tuple(programs), pieces, {}, given, returned, (None,) * len(types), tuple(wanted), {})
