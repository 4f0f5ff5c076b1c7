"""What our cost model predicts for V100s against measured times of GPT layers, of collectives and of messages.

    python -m benchmarks.v100_fidelity --data FOLDER            # errors by kind of row
    python -m benchmarks.v100_fidelity --data FOLDER --rows     # every layer and collective too

FOLDER holds `ops.csv` (model, micro_batch, tensor_parallel, op, forward_us, backward_us, input_MB, output_MB, ...) and
`collectives.csv` (kind, gpus, size_MB, time_ms, ...): the profiles that the artifact of Aceso (Z. Liu et al.,
EuroSys'24, MIT licence) published for 8 V100 SXM2 with NVLink; Megatron's GPT in PyTorch, fp16. It is not part of this
repository. The rates between two GPUs, of the same source, are few enough to stand here.

A layer's time is the sum of its operators' times. Arithmetic, traffic and all-reduces are priced by `RingCost` for
`Cluster.p3_16xlarge()`, as in planning. Constants of this file say what that way of measuring adds, which no plan
pays for: the host's time per operator, waiting after all-reduces, copies to and from lists of tensors. Constants were
fitted to the layers of GPT-1.3B and to collectives of 1, 2, 4, ... MB; all other rows test them. Of messages only the
rate of the network is fitted, to the largest one: another network than that of the preset was measured.

A second table adds the measured times up to a whole model: what these kernels reach where no stage waits and nothing is
sent but their own all-reduces, with the layers' forward passes done twice. Beside it stands what Alpa measured for the
model of that size, its tensors at a sequence of 1024: how far that is above what any cost model of these kernels says.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from alpa_like.cluster import Cluster
from alpa_like.cost import RingCost
from alpa_like.models import paper_gpt_config
from benchmarks.common import MIB, parser, table
from benchmarks.published import PUBLISHED, gpt_flops

SEQUENCE = 2048
DTYPE = "float16"
BYTES = 2

FITTED_MODEL = "gpt_1_3B"

MINOR_RATE = 0.85
"""cuBLAS's rate where both operands contract their minor dim, as `x @ W.T` does, against its rate elsewhere. Such are
one third of a layer's matmuls, nearly all of them forward: PyTorch keeps weights as [out, in], JAX as [in, out]."""
OTHER_SHARE = (1 / MINOR_RATE + 2) / 3
"""The rate of the other matmuls against the mean rate, which is the cost model's."""

FORWARD_HOST_S, BACKWARD_HOST_S = 60e-6, 150e-6
"""PyTorch's time to start one operator: small operators take this long, whatever the device does."""
WAIT_S = 250e-6
"""The profiler waits for the device behind each all-reduce in an operator, and so for all processes and the host."""
CALL_S, LIST_CALL_S = 35e-6, 70e-6
"""From call to return of a lone collective: of an all-reduce, and of those that take lists of tensors."""
COPY_SHARE = 0.67
"""Share of the memory's bandwidth that copies between a list of tensors and one buffer reach."""

LAUNCH_S = 10e-6
"""The host's time to start one copy. A reduce-scatter's list is copied before it starts, one tensor per GPU; the copies
behind an all-gather are started while it runs, so nothing is seen of it there."""
PAIR_SHARE = 0.85
"""Share of the links between a pair that an all-gather or a reduce-scatter reaches: its ring has a single step, so that
nothing is sent on while something is received. All-reduces of pairs have two steps, and reach all of it."""

UNALIGNED_MB = frozenset((14, 20, 23, 28, 46, 50, 56, 92, 100, 112, 176, 184, 200, 224, 400, 800, 1600, 3200))
"""Sizes at which an all-gather, on 2, 4 and 8 GPUs alike, is slower by a third than at the sizes next to it, chosen by
that. 50, 100, ..., 3200 stand for tensors like the loss head's 50.025 MB, whose shards don't begin at whole 16 bytes;
of the others we don't know the cause, so all lists but the all-reduce's show them apart, and nothing is fitted to them.
"""

FAILED = 1e6
"""Times of at least this (ms or µs) stand for runs that ran out of memory."""

MESSAGE_GB_PER_S = {
    "in a host": (17.2, 24.8, 31.3, 35.9, 39.0, 40.7, 41.7, 42.1, 42.4, 42.5, 42.5),
    "across hosts": (3.9, 4.5, 4.5, 5.1, 5.3, 5.3, 5.4, 5.4, 5.4, 5.4, 5.4),
}
"""Rates between two GPUs for messages of 1, 2, 4, ... 1024 MB."""
NETWORK_RATE = 5.4e9
"""Bytes/s of one message between the measured hosts, which no other one shares; they had another network than EC2's."""

KINDS = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """FLOPs and bytes of one kernel on one device; `minor`: a matmul at `MINOR_RATE`."""

    flops: float
    nbytes: float
    minor: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What an operator does in one direction; `reduced` are the bytes of the all-reduce at its end."""

    kernels: tuple[Kernel, ...]
    reduced: float = 0.0


@dataclass(frozen=True, slots=True)
class Layer:
    """The share that one of `parts` devices has of a GPT layer."""

    hidden: int
    heads: int
    batch: int
    parts: int

    @property
    def state(self) -> float:
        """Bytes of a hidden state."""
        return BYTES * SEQUENCE * self.batch * self.hidden

    def works(self, op: str) -> tuple[Work, Work]:
        """Forward and backward work of an operator of Megatron's layer. Raises `KeyError` for any other operator."""
        part, wide = self.state / self.parts, self.hidden // self.parts
        split = 0.0 if self.parts == 1 else self.state
        match op:
            case "enc-attention-qkv":
                return self.linear(self.hidden, 3 * wide, moved=6 * part, backward=split)
            case "enc-attention-score":
                return self.attend(forward_minor=True)
            case "enc-attention-context":
                return self.attend(forward_minor=False, moved=2 * part)
            case "enc-attention-dense":
                return self.linear(wide, self.hidden, forward=split)
            case "enc-MLP-GEMM-1":
                return self.linear(self.hidden, 4 * wide, backward=split)
            case "enc-MLP-GEMM-2":
                return self.linear(4 * wide, self.hidden, forward=split)
            case _:
                forward, backward = self.streams()[op]
                return _moves(forward), _moves(backward)

    def streams(self) -> dict[str, tuple[float, float]]:
        """Bytes that the operators without matmuls move, forward and backward."""
        state, part = self.state, self.state / self.parts
        scores = BYTES * self.batch * (self.heads // self.parts) * SEQUENCE * SEQUENCE
        norm = 2 * state, 7 * state  # backward reads both tensors once for the weights and twice for the input
        dropout = 7.5 * state, 3.5 * state  # bias, dropout and residual are 3 kernels; a mask has a byte per element
        return {
            "enc-1st-layernorm": norm,
            "enc-attention-softmax": (1.5 * scores, 2 * scores),  # only the lower triangle is read
            "enc-attention-dropout": (2.5 * scores, 2.5 * scores),
            "enc-post-attention-dropout": dropout,
            "enc-2nd-layernorm": norm,
            "enc-MLP-gelu": (8 * part, 16 * part),  # backward sums the bias's gradient too
            "enc-post-MLP-dropout": dropout,
        }

    def linear(
        self, inputs: int, outputs: int, *, moved: float = 0.0, forward: float = 0.0, backward: float = 0.0
    ) -> tuple[Work, Work]:
        """`y = x @ W.T`; `moved` bytes of copies each way, `forward` and `backward` bytes are all-reduced."""
        tokens, copies = SEQUENCE * self.batch, _moves(moved).kernels
        first = Work((_matmul(tokens, inputs, outputs, minor=True), *copies), forward)
        gradients = _matmul(tokens, outputs, inputs), _matmul(inputs, tokens, outputs)
        return first, Work((*gradients, *copies), backward)

    def attend(self, *, forward_minor: bool, moved: float = 0.0) -> tuple[Work, Work]:
        """Scores from queries and keys, or the context from scores and values; all have one tensor of scores."""
        count, depth = self.batch * self.heads // self.parts, self.hidden // self.heads

        def one(minor: bool) -> Kernel:
            return _matmul(SEQUENCE, depth, SEQUENCE, count=count, minor=minor)

        copies = _moves(moved).kernels
        return Work((one(forward_minor), *copies)), Work((one(not forward_minor), one(False), *copies))


def _moves(nbytes: float) -> Work:
    return Work((Kernel(0.0, nbytes),) if nbytes else ())


def _matmul(m: int, k: int, n: int, *, count: int = 1, minor: bool = False) -> Kernel:
    return Kernel(2.0 * count * m * k * n, float(BYTES * count * (m * k + k * n + m * n)), minor)


def cost_of(members: int) -> RingCost:
    """The cost model of a mesh of one axis in one p3.16xlarge."""
    return RingCost(Cluster.p3_16xlarge().part(1, members), (members,))


def kernel_s(cost: RingCost, kernel: Kernel) -> float:
    rate = OTHER_SHARE * (MINOR_RATE if kernel.minor else 1.0)
    return cost.compute_s(kernel.flops / rate, kernel.nbytes, DTYPE)


def device_s(cost: RingCost, work: Work) -> float:
    """Seconds that a device needs, with nothing of what measuring adds."""
    reduce_s = cost.collective_s("all-reduce", work.reduced, (0,), combined=False) if work.reduced else 0.0
    return sum(kernel_s(cost, kernel) for kernel in work.kernels) + reduce_s


def operator_s(cost: RingCost, work: Work, host_s: float) -> float:
    """Seconds as they were measured: not less than the host needs, and it waits behind an all-reduce."""
    if work.reduced:
        return device_s(cost, work) + WAIT_S
    return max(device_s(cost, work), host_s)


@dataclass(frozen=True, slots=True)
class Compared:
    """A row or a sum of rows: predicted and measured seconds."""

    kind: str
    fitted: bool
    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


Row = dict[str, str]


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def measured_models(rows: Iterable[Row]) -> Iterator[tuple[str, int, int, dict[str, Row]]]:
    """Model, micro-batch, tensor-parallel degree and operators of each measured GPT."""
    found: defaultdict[tuple[str, int, int], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["algorithm"] == "0" and "gpt" in row["model"]:
            found[row["model"], int(row["micro_batch"]), int(row["tensor_parallel"])][row["op"]] = row
    yield from ((*key, ops) for key, ops in found.items())


def ran(ops: dict[str, Row]) -> bool:
    return all(float(r["forward_us"]) < FAILED and float(r["backward_us"]) < FAILED for r in ops.values())


def in_layer(op: str) -> bool:
    """Whether an operator belongs to a layer; the others are the embedding and the head."""
    return op.startswith("enc-")


def layers(rows: Iterable[Row]) -> Iterator[Compared]:
    """Forward, backward and both of each measured GPT layer; other operators and failed runs are left out."""
    for model, batch, parts, ops in measured_models(rows):
        mine = {op: row for op, row in ops.items() if in_layer(op)}
        if ran(mine):
            yield from layer(model, batch, parts, mine)


def reached(rows: Iterable[Row]) -> Iterator[tuple[str, int, int, float]]:
    """Model, micro-batch, GPUs, and the FLOP/s per GPU, as Alpa counts them, that the measured operators add up to."""
    for model, batch, parts, ops in measured_models(rows):
        size = model.removeprefix("gpt_").replace("_", ".")
        if size in PUBLISHED["gpt"] and ran(ops):
            config = replace(paper_gpt_config(size), seq_len=SEQUENCE)
            repeats = {op: config.num_layers if in_layer(op) else 1 for op in ops}
            seconds = 1e-6 * sum(
                repeats[op] * ((1 + in_layer(op)) * float(r["forward_us"]) + float(r["backward_us"]))
                for op, r in ops.items()
            )
            yield size, batch, parts, gpt_flops(config, batch) / seconds / parts


def reached_table(rows: Iterable[Row]) -> str:
    """The best micro-batch of every model and number of GPUs, beside Alpa's result for the model."""
    best: dict[tuple[str, int], tuple[float, int]] = {}
    for size, batch, parts, rate in reached(rows):
        best[size, parts] = max(best.get((size, parts), (0.0, 0)), (rate, batch))
    order = list(PUBLISHED["gpt"])
    lines = [
        (f"GPT-{size}", str(parts), str(batch), f"{1e-12 * rate:.1f}", f"{PUBLISHED['gpt'][size].alpa:.1f}",
         f"{PUBLISHED['gpt'][size].alpa / (1e-12 * rate) - 1:+.0%}")
        for (size, parts), (rate, batch) in sorted(best.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    ]  # fmt: skip
    heads = ("model", "tensor parallel", "best micro-batch", "kernels alone, TFLOP/s", "Alpa, TFLOP/s", "Alpa above")
    return table(heads, lines)


def layer(model: str, batch: int, parts: int, ops: dict[str, Row]) -> Iterator[Compared]:
    whole = shape(batch, parts, ops)
    cost, works = cost_of(parts), [whole.works(op) for op in ops]
    predicted = [
        sum(operator_s(cost, work[way], host) for work in works)
        for way, host in enumerate((FORWARD_HOST_S, BACKWARD_HOST_S))
    ]
    measured = [1e-6 * sum(float(row[way]) for row in ops.values()) for way in ("forward_us", "backward_us")]
    busy = sum(device_s(cost, w) for work in works for w in work) / sum(predicted)
    bound = "" if busy > 0.75 else ", host-bound"
    name = f"{model}, {batch} samples, {parts} GPUs"
    ways = zip(("forward", "backward", "both"), (*predicted, sum(predicted)), (*measured, sum(measured)), strict=True)
    for way, guess, truth in ways:
        yield Compared(f"layer, {way}{bound}", model == FITTED_MODEL, name, guess, truth)


def shape(batch: int, parts: int, ops: dict[str, Row]) -> Layer:
    """Hidden size and heads, from the megabytes that the rows give."""
    hidden = float(ops["enc-1st-layernorm"]["input_MB"]) * MIB / (BYTES * SEQUENCE * batch)
    heads = float(ops["enc-attention-score"]["activations_MB"]) * MIB * parts / (BYTES * SEQUENCE**2 * batch)
    return Layer(round(hidden), round(heads), batch, parts)


def collective_s(kind: str, gpus: int, nbytes: float) -> float:
    """Seconds of a lone collective of PyTorch; `nbytes` is the tensor that each process gives."""
    cost = cost_of(gpus)
    whole = nbytes * gpus if kind == "all-gather" else nbytes
    seconds = cost.collective_s(kind, whole, (0,), combined=False)
    if kind == "all-reduce":
        return CALL_S + seconds
    if kind == "all-to-all":
        return LIST_CALL_S + seconds
    ring_s = seconds / PAIR_SHARE if gpus == 2 else seconds
    copy_s = 2 * whole / (cost.cluster.device.memory_bandwidth_bytes_per_s * COPY_SHARE)
    launch_s = LAUNCH_S * gpus if kind == "reduce-scatter" else 0.0
    return LIST_CALL_S + launch_s + ring_s + copy_s


def collectives(rows: Iterable[Row]) -> Iterator[Compared]:
    for row in rows:
        kind, gpus, size = KINDS[row["kind"]], int(row["gpus"]), int(row["size_MB"])
        if float(row["time_ms"]) < FAILED:
            label = f"{kind}, unaligned" if size in UNALIGNED_MB and kind != "all-reduce" else kind
            predicted = collective_s(kind, gpus, size * MIB)
            fitted = size & (size - 1) == 0
            yield Compared(label, fitted, f"{gpus} GPUs, {size} MB", predicted, 1e-3 * float(row["time_ms"]))


def messages() -> Iterator[Compared]:
    """Messages between two GPUs: in a host over NVLink, across hosts over the network that was measured."""
    cluster = Cluster.p3_16xlarge(hosts=2)
    nodes = replace(cluster, inter_host=replace(cluster.inter_host, bandwidth_bytes_per_s=NETWORK_RATE))
    for where, peer in (("in a host", 1), ("across hosts", nodes.devices_per_host)):
        link = nodes.peer_link(0, peer)
        for power, rate in enumerate(MESSAGE_GB_PER_S[where]):
            nbytes = MIB * 2**power
            predicted = CALL_S + link.latency_s + nbytes / link.bandwidth_bytes_per_s
            last = where == "across hosts" and power + 1 == len(MESSAGE_GB_PER_S[where])
            yield Compared(f"message {where}", last, f"{2**power} MB", predicted, nbytes / (1e9 * rate))


PARTS = {True: "fit", False: "test", None: "all"}


def group_of(kind: str) -> str:
    return next((f"{name}s" for name in ("layer", "message") if kind.startswith(name)), "collectives")


def report(compared: Iterable[Compared]) -> str:
    """Mean and worst absolute error by kind, of the rows that constants were fitted to and of all others."""
    parts: defaultdict[tuple[str, bool | None], list[float]] = defaultdict(list)
    for row in compared:
        parts[row.kind, row.fitted].append(row.error)
        parts[f"all {group_of(row.kind)}", row.fitted].append(row.error)
        parts[f"all {group_of(row.kind)}", None].append(row.error)
    lines: list[tuple[str, ...]] = []
    for (kind, fitted), errors in sorted(parts.items(), key=lambda item: (item[0][0], PARTS[item[0][1]])):
        sizes = [abs(e) for e in errors]
        lines.append(
            (kind, PARTS[fitted], str(len(errors)), f"{statistics.mean(sizes):.1%}",
             f"{statistics.median(sizes):.1%}", f"{max(sizes):.0%}", f"{statistics.mean(errors):+.1%}")
        )  # fmt: skip
    return table(("kind", "part", "rows", "mean error", "median", "worst", "mean of signed"), lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder with ops.csv and collectives.csv")
    options.add_argument("--rows", action="store_true", help="print every row")
    chosen = options.parse_args(arguments)
    folder: Path = chosen.data
    ops = read(folder / "ops.csv")
    compared = [*layers(ops), *collectives(read(folder / "collectives.csv")), *messages()]
    if chosen.rows:
        each = [
            (r.kind, r.name, f"{1e3 * r.predicted:.3f}", f"{1e3 * r.measured:.3f}", f"{r.error:+.1%}") for r in compared
        ]
        print(table(("kind", "row", "predicted ms", "measured ms", "error"), each), end="\n\n")
    print(f"{report(compared)}\n\n{reached_table(ops)}")


if __name__ == "__main__":
    main()
