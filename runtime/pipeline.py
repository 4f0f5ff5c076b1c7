"""`PipelineExecutable`: a compiled pipeline that takes and returns what the function did."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, assert_never, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_leaves, tree_unflatten

from alpa_like.chunked import ChunkedArray, Parts, bounds
from alpa_like.errors import PlanError
from alpa_like.placement import Given, LoweredPipeline, Returned
from alpa_like.plan import Plan
from alpa_like.reshard import Layout
from alpa_like.runtime import hlo
from alpa_like.runtime.executable import Executable, place_of, same_kind
from alpa_like.runtime.instructions import Free, Program, Recv, Ref, Run, Send
from alpa_like.runtime.interpreter import Event, Interpreter
from alpa_like.runtime.local import LocalTransport
from alpa_like.runtime.staged import Staged
from alpa_like.runtime.transport import sharding_of
from alpa_like.schedule import Kind, Task
from alpa_like.simulate import Event as TraceEvent
from alpa_like.simulate import write_trace
from alpa_like.tracer import Trace

__all__ = ["Cutting", "PipelineExecutable"]

Lengths = tuple[int, ...] | None


class PipelineExecutable(Executable):
    """A step compiled as a pipeline. State leaves live on the mesh of their stage, as the step returns them."""

    def __init__(
        self, trace: Trace, plan: Plan, lowered: LoweredPipeline, devices: Sequence[Any], cuts: Cutting
    ) -> None:
        self._begin(trace, plan, (type(jax.device_put(0.0, devices[0])), ChunkedArray))
        # Many leaves share few layouts, and to make a sharding takes long.
        place = cache(lambda layout: sharding_of(layout, devices))
        homes = self._prepare(lowered, cuts, place)
        transfers = {r: LocalTransport(t, devices, dtype) for r, (t, dtype) in lowered.transfers.items()}
        self._interpreter = Interpreter(lowered.programs, lowered.pieces, transfers, lowered.names)
        given = [lowered.given[key] for key in self._interpreter.given]
        self._feed = _Feed(homes, given, [place(g.layout) for g in given])
        places = {key: i for i, key in enumerate(self._interpreter.returned)}
        self._collect = _Collect(lowered.returned, places)

    def _prepare(self, lowered: LoweredPipeline, cuts: Cutting, place: Callable[[Layout], Any]) -> list[Any]:
        """What pipelines have in common wherever they run; `place` makes of a layout where an array lives."""
        self._cuts, self._lowered_pipeline = cuts, lowered
        homes, self._results = (_shardings(layouts, place) for layouts in (lowered.arguments, lowered.results))
        self._wanted = cuts.places(homes, cuts.inputs)
        return homes

    @property
    def input_shardings(self) -> tuple[Any, ...]:
        """One pytree per dynamic argument: `NamedSharding`s of the state, None for the batch, which is cut up."""
        return tree_unflatten(self._trace.in_tree, self._wanted)

    @property
    def output_shardings(self) -> Any:
        """A pytree of `NamedSharding`s like the result, None where the parts of micro-batches are joined."""
        return tree_unflatten(self._trace.out_tree, self._cuts.places(self._results, self._cuts.outputs))

    @property
    def mesh(self) -> jax.sharding.Mesh:
        raise PlanError("a pipeline has a mesh per stage; see input_shardings for where each argument lives")

    @property
    def wanted(self) -> Sequence[Any]:
        return self._wanted

    def moved(self, value: Any, wanted: Any) -> Any:
        """A leaf where the stages want it; stacked layers in parts."""
        if not isinstance(wanted, Parts):
            return jax.device_put(value, wanted)
        whole = np.asarray(value) if isinstance(value, ChunkedArray) else value
        rows = [whole[a:b] for a, b in bounds(wanted.lengths)]
        return ChunkedArray(jax.device_put(rows, list(wanted.shardings)))

    def takes(self, args: tuple[Any, ...]) -> bool:
        """Whether all arguments are as compiled for, and the state where the stages want it."""
        if not super().takes(args):
            return False
        leaves = tree_leaves(args)
        placed = zip(leaves, self._wanted, self._trace.avals, strict=True)
        return jax.tree.structure(args) == self._trace.in_tree and all(
            getattr(x, "shape", None) == a.shape
            and (getattr(x, "dtype", None) == a.dtype if w is not None else _fits(x, a))
            and (w is None or place_of(x) == w)
            for x, w, a in placed
        )

    def run(self, *args: Any) -> Any:
        """The step on arguments that are placed; `ProgramError` where it fails."""
        leaves = self._cuts.parts(tree_leaves(args))
        returned = self._interpreter(iter(self._feed(leaves)))
        return tree_unflatten(self._trace.out_tree, self._cuts.joined(self._collect(returned)))

    def trace(self, path: str | os.PathLike[str], *args: Any) -> Any:
        """Run a step on `args` and write when each piece ran as a Chrome trace, which https://ui.perfetto.dev opens.

        Returns what the step returns. Pieces are timed by waiting for them, so the step is a little slower.
        """
        result, events = self.timed(*args)
        shown = [_shown(e) for e in events]
        write_trace(path, shown, process_name=f"{self._trace.name} (measured)")
        return result

    def timed(self, *args: Any) -> tuple[Any, tuple[Event, ...]]:
        """A step's result, and when each piece ran, in seconds since the step's start."""
        placed = self.place(*args)
        returned, events = self._interpreter.trace(self._feed(self._cuts.parts(tree_leaves(placed))))
        return tree_unflatten(self._trace.out_tree, self._cuts.joined(self._collect(returned))), events

    @property
    def programs(self) -> str:
        """What each mesh does in a step, instruction by instruction."""
        return "\n".join(str(p) for p in self._lowered_pipeline.programs)

    def hlo_text(self) -> str:
        """The optimized HLO of every piece, one after the other."""
        return "\n\n".join(f"// {name}\n{text}" for name, text in self._texts().items())

    def _texts(self) -> dict[str, str]:
        return {name: piece.as_text() for name, piece in self._lowered_pipeline.pieces.items()}

    def _temporaries(self) -> dict[str, int]:
        """Bytes on a device that each piece needs beside its arguments and results."""
        pieces = self._lowered_pipeline.pieces
        return {name: piece.memory_analysis().temp_size_in_bytes for name, piece in pieces.items()}

    def traffic(self, *, reduce_scatter: bool = False) -> dict[str, int]:
        """Bytes that a device of the busiest mesh sends in collectives of a step, by kind; transfers are "send"."""
        runs = self._runs()
        totals: dict[int, dict[str, int]] = {}
        for name, text in self._texts().items():
            mesh, count = runs[name]
            found = hlo.traffic_by_kind(hlo.read_collectives(text), reduce_scatter=reduce_scatter)
            mine = totals.setdefault(mesh, {})
            for kind, nbytes in found.items():
                mine[kind] = mine.get(kind, 0) + nbytes * count
        busiest = max(totals.values(), key=lambda t: sum(t.values()), default={})
        return {**busiest, "send": self.crossing_bytes()}

    def crossing_bytes(self) -> int:
        """Bytes that cross between meshes in a step, over all links."""
        every = (i for p in self._lowered_pipeline.programs for i in p.instructions)
        counts = Counter(i.transfer for i in every if isinstance(i, Send))
        return sum(self._lowered_pipeline.transfers[r][0].crossing_bytes * n for r, n in counts.items())

    def memory_bytes(self) -> int:
        """Peak memory of a step on one device of the fullest mesh: buffers in flight, and temporaries by XLA."""
        return max(_peaks(self._lowered_pipeline, self._temporaries()).values())

    def _runs(self) -> dict[str, tuple[int, int]]:
        """The mesh of each piece and how often it runs."""
        found: dict[str, tuple[int, int]] = {}
        for program in self._lowered_pipeline.programs:
            for instruction in program.instructions:
                if isinstance(instruction, Run):
                    count = found.get(instruction.piece, (0, 0))[1]
                    found[instruction.piece] = (program.mesh, count + 1)
        return found

    def __repr__(self) -> str:
        pipeline = self.plan.pipeline
        stages = len(pipeline.stages) if pipeline else 1
        return f"{type(self).__name__}({self._trace.name}, {stages} stages, {self.plan.method})"


def _fits(value: Any, aval: Any) -> bool:
    """Whether a batch leaf is of the dtype that a step was compiled for, as far as JAX tells dtypes apart."""
    return hasattr(value, "dtype") and same_kind(str(value.dtype), str(aval.dtype))


_TASK = re.compile(r"(forward|backward|input_grad|weight_grad) (\d+) of micro-batch (\d+)")


def _shown(event: Event) -> TraceEvent:
    """A measured event under the name that the simulated one has."""
    found = _TASK.fullmatch(event.label)
    if found is None:
        kind = event.label.split(" ")[0]
        return TraceEvent(event.mesh, None, kind, event.label, event.start_s, event.end_s)
    kind, stage, micro_batch = found.groups()
    task = Task(cast("Kind", kind), int(stage), int(micro_batch))
    return TraceEvent(event.mesh, task, kind, str(task), event.start_s, event.end_s)


class Cutting:
    """How flat arguments and results that stack all layers are cut; None for those that are whole."""

    def __init__(self, inputs: Sequence[Lengths], outputs: Sequence[Lengths]) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._any = any(c is not None for c in (*self.inputs, *self.outputs))

    def parts(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """The leaves, those that are cut part by part."""
        if not self._any:
            return leaves
        pairs = zip(leaves, self.inputs, strict=True)
        return [part for leaf, cuts in pairs for part in (leaf.parts if cuts is not None else (leaf,))]

    def joined(self, leaves: Iterator[Any]) -> list[Any]:
        """The inverse, for results."""
        if not self._any:
            return list(leaves)
        return [ChunkedArray(g) if isinstance(g, tuple) else g for g in self.grouped(leaves, self.outputs)]

    def places(self, shardings: Sequence[Any], cuts: Sequence[Lengths]) -> tuple[Any, ...]:
        """Where whole leaves live: a sharding each, or those of its parts."""
        grouped = zip(self.grouped(shardings, cuts), cuts, strict=True)
        return tuple(g if lengths is None else Parts(lengths, g) for g, lengths in grouped)

    def grouped(self, leaves: Iterable[Any], cuts: Sequence[Lengths]) -> Iterator[Any]:
        """A tuple in place of the parts of each leaf that is cut."""
        left = iter(leaves)
        for lengths in cuts:
            yield next(left) if lengths is None else tuple(next(left) for _ in lengths)


def _shardings(layouts: Sequence[Layout | None], place: Callable[[Layout], Any]) -> list[Any]:
    """The shardings of leaves, None for those that have no layout of their own."""
    return [None if layout is None else place(layout) for layout in layouts]


class _Feed:
    """From the flat arguments of a step to its first buffers."""

    def __init__(self, homes: Sequence[Any], given: Sequence[Given], places: Sequence[Any]) -> None:
        self._given, self._places = given, places
        self._count = 1 + max((g.micro_batch for g in given), default=0)
        self._numbers = {
            i: jax.device_put(np.int32(g.micro_batch), places[i]) for i, g in enumerate(given) if g.argument < 0
        }
        self._batch = sorted({g.argument for g in given if g.argument >= 0 and g.micro_batch >= 0})
        self._moved = [i for i, g in enumerate(given) if g.argument >= 0 and homes[g.argument] != places[i]]

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        parts = {i: self._parts(leaves[i]) for i in self._batch}
        buffers: list[Any] = [None] * len(self._given)
        for i, g in enumerate(self._given):
            if g.argument < 0:
                buffers[i] = self._numbers[i]
            elif g.micro_batch >= 0:
                buffers[i] = parts[g.argument][g.micro_batch]
            else:
                buffers[i] = leaves[g.argument]
        moved = jax.device_put([buffers[i] for i in self._moved], [self._places[i] for i in self._moved])
        for i, value in zip(self._moved, moved, strict=True):
            buffers[i] = value
        return buffers

    def _parts(self, value: Any) -> Sequence[Any]:
        """The micro-batches of a batch argument: rows, in order."""
        size = value.shape[0] // self._count
        if isinstance(value, jax.Array):
            return _cut(value, self._count)
        return [value[m * size : (m + 1) * size] for m in range(self._count)]


def _split_rows(value: jax.Array, count: int) -> list[jax.Array]:
    return jnp.split(value, count)


_cut = jax.jit(_split_rows, static_argnums=1)


class _Collect:
    """From the last buffers of a step to its flat results."""

    def __init__(self, returned: Sequence[Returned], places: Mapping[tuple[int, Any], int]) -> None:
        self._returned = [(tuple(places[b] for b in r.buffers), r.dim, r.constant) for r in returned]

    def __call__(self, buffers: Sequence[Any]) -> Iterator[Any]:
        for places, dim, constant in self._returned:
            if not places:
                yield jnp.asarray(constant)
            elif len(places) == 1:
                yield buffers[places[0]]
            else:
                yield _join([buffers[p] for p in places], dim)


def _join_rows(parts: list[jax.Array], dim: int) -> jax.Array:
    return jnp.concatenate(parts, dim)


_join = jax.jit(_join_rows, static_argnums=1)


def _peaks(lowered: LoweredPipeline, temporary: Mapping[str, int]) -> dict[int, int]:
    """Bytes per device at the fullest moment of each mesh; `temporary` are those that pieces need beside."""
    sizes = _sizes(lowered)
    return {program.mesh: _peak(program, sizes, temporary) for program in lowered.programs}


def _peak(program: Program, sizes: Mapping[tuple[int, int], int], temporary: Mapping[str, int]) -> int:
    def size(ref: Ref) -> int:
        return sizes.get((program.mesh, ref.value), 0)

    held = {ref: size(ref) for ref in program.given}
    peak = sum(held.values())
    for instruction in program.instructions:
        extra = 0
        match instruction:
            case Run():
                extra = temporary[instruction.piece]
                for position in instruction.donated:
                    held.pop(instruction.inputs[position], None)
                held.update((ref, size(ref)) for ref in instruction.outputs)
            case Recv():
                held[instruction.ref] = size(instruction.ref)
            case Free():
                for ref in instruction.refs:
                    held.pop(ref, None)
            case Send():
                pass
            case _:
                assert_never(instruction)
        peak = max(peak, sum(held.values()) + extra)
    return peak


def _sizes(lowered: LoweredPipeline) -> dict[tuple[int, int], int]:
    """Bytes per device of each value on each mesh."""
    found: dict[tuple[int, int], int] = {}
    for program in lowered.programs:
        for instruction in program.instructions:
            if not isinstance(instruction, Run):
                continue
            taken, made = _tile_bytes(lowered.pieces[instruction.piece])
            both = (*zip(instruction.inputs, taken, strict=True), *zip(instruction.outputs, made, strict=True))
            found.update(((program.mesh, ref.value), nbytes) for ref, nbytes in both)
    return found


def _tile_bytes(piece: Any) -> tuple[list[int], list[int]]:
    """Bytes per device of the arguments and of the results of a piece."""
    if isinstance(piece, Staged):
        taken, made = (
            [(b.layout.tile_shape(b.shape), b.struct.dtype) for b in x] for x in (piece.inputs, piece.outputs)
        )
    else:
        both = ((piece.in_avals, piece.input_shardings), (piece.out_info, piece.output_shardings))
        pairs = (zip(tree_leaves(avals), tree_leaves(places), strict=True) for avals, places in both)
        taken, made = ([(place.shard_shape(a.shape), a.dtype) for a, place in p] for p in pairs)
    taken, made = ([int(np.prod(shape)) * max(1, dtype.itemsize) for shape, dtype in x] for x in (taken, made))
    return taken, made
