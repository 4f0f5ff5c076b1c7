"""The V100 preset against measured times, and the formulas of the cost model by hand and at their limits.

The measurements are rows of the profiles that the artifact of Aceso (Z. Liu et al., EuroSys'24, MIT licence) published:
PyTorch with Megatron's GPT in fp16 on 8 V100 SXM2.
"""

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from alpa_like.cluster import Cluster, Device, Link
from alpa_like.cost import COLLECTIVES, RingCost
from alpa_like.errors import ClusterError
from benchmarks import v100_fidelity as fidelity

MB = 2**20
CHIP = Device("chip", (("float32", 1e12),), 2**30, 1e9, 0.5, memory_efficiency=0.8, exposed=0.25)
FAST, SLOW = Link(8e9, 1e-6), Link(1e9, 5e-6)
WIRED = Cluster("wired", 2, 4, CHIP, FAST, SLOW, ("made up",), exchange_groups=((2, 6e9), (4, 3e9)))


def v100(members: int = 1) -> RingCost:
    return fidelity.cost_of(members)


@pytest.mark.parametrize(
    ("exposed", "flops", "nbytes", "seconds"),
    [(0.0, 1e12, 8e8, 2.0), (0.25, 1e12, 8e8, 2.25), (1.0, 1e12, 8e8, 3.0), (0.25, 0, 8e8, 1.0), (0.25, 1e12, 0, 2.0)],
)
def test_compute_by_hand(exposed: float, flops: float, nbytes: float, seconds: float) -> None:
    cluster = dataclasses.replace(WIRED, device=dataclasses.replace(CHIP, exposed=exposed))
    assert RingCost(cluster, (8,)).compute_s(flops, nbytes, "f32") == pytest.approx(seconds)


def test_without_the_new_shares_compute_is_the_roofline() -> None:
    plain = Device("chip", (("float32", 1e12),), 2**30, 1e9, 0.5)
    cost = RingCost(dataclasses.replace(WIRED, device=plain), (8,))
    for flops, nbytes in [(1e12, 1.0), (1.0, 1e9), (5e11, 1e9)]:
        assert cost.compute_s(flops, nbytes, "f32") == max(flops / 5e11, nbytes / 1e9)


@pytest.mark.parametrize("name", sorted(Cluster.presets()))
def test_time_grows_with_work_and_bytes_alone_cost_in_proportion(name: str) -> None:
    cost = RingCost(Cluster.presets()[name](), (Cluster.presets()[name]().devices_per_host,))
    sizes = np.geomspace(1e3, 1e13, 41)
    for fixed in (0.0, 1e6, 1e10):
        assert (np.diff([cost.compute_s(f, fixed, "bf16") for f in sizes]) >= 0).all()
        assert (np.diff([cost.compute_s(fixed, b, "bf16") for b in sizes]) >= 0).all()
    assert cost.compute_s(0.0, 1e9, "f32") == pytest.approx(1e9 * cost.compute_s(0.0, 1.0, "f32"))
    for kind in COLLECTIVES:
        assert (np.diff([cost.collective_s(kind, b, (0,), combined=False) for b in sizes]) > 0).all()


@pytest.mark.parametrize(
    ("mesh_shape", "axes", "bandwidth"),
    [
        ((4, 2), (1,), 6e9),
        ((2, 4), (1,), 3e9),
        ((8,), (0,), 3e9),  # the network gives 4e9, the wires inside a host less
        ((2, 4), (0,), 1e9),  # one member in each host: the network alone
        ((8, 1), (1,), 8e9),
    ],
)
def test_exchanges_are_slower_than_rings(mesh_shape: tuple[int, ...], axes: tuple[int, ...], bandwidth: float) -> None:
    ring = WIRED.group_link(mesh_shape, axes)
    assert WIRED.exchange_link(mesh_shape, axes) == Link(bandwidth, ring.latency_s)
    assert dataclasses.replace(WIRED, exchange_groups=()).exchange_link(mesh_shape, axes) == ring
    cost, members = RingCost(WIRED, mesh_shape), math.prod(mesh_shape[a] for a in axes)
    sent = 1e9 * (members - 1) / members
    assert cost.collective_s("all-to-all", 1e9, axes, combined=True) == pytest.approx(sent / bandwidth)
    gathered = cost.collective_s("all-gather", 1e9, axes, combined=True)
    assert gathered == pytest.approx(sent / ring.bandwidth_bytes_per_s)


def test_a_part_keeps_the_exchanges_that_it_can_have() -> None:
    assert WIRED.part(1, 2).exchange_groups == ((2, 6e9),)
    assert Cluster.from_json({k: v for k, v in WIRED.to_json().items() if k != "exchange_groups"}) == (
        dataclasses.replace(WIRED, exchange_groups=())
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_efficiency": 1.5}, "memory_efficiency is a share, at most 1, found 1.5"),
        ({"memory_efficiency": 0.0}, "memory_efficiency must be a finite number above 0"),
        ({"exposed": -0.1}, "exposed must be a finite number of at least 0"),
    ],
)
def test_impossible_shares_are_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        dataclasses.replace(CHIP, **change)


@pytest.mark.parametrize("groups", [((2, 1e9), (5, 1e9)), ((4, 1e9), (2, 1e9))])
def test_impossible_exchange_groups_are_named(groups: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ClusterError, match="exchange_groups must count 2 to 4 members, rising"):
        dataclasses.replace(WIRED, exchange_groups=groups)


@pytest.mark.parametrize(
    ("m", "k", "n", "forward_us", "backward_us"),
    [  # tokens, inputs, outputs of a layer's second matmul of the MLP: GPT-350M, 1.3B and 2.6B, 1 and 4 samples
        (2048, 4096, 1024, 225.4, 428.7),
        (2048, 8192, 2048, 852.1, 1598.2),
        (8192, 8192, 2048, 3233.5, 5590.5),
        (2048, 10240, 2560, 1271.2, 2377.8),
        (8192, 10240, 2560, 5294.6, 8774.9),
    ],
)
def test_matmuls_of_a_step_cost_what_they_took(m: int, k: int, n: int, forward_us: float, backward_us: float) -> None:
    flops, nbytes = 2.0 * m * k * n, 2.0 * (m * k + k * n + m * n)
    assert 3 * v100().compute_s(flops, nbytes, "f16") == pytest.approx(1e-6 * (forward_us + backward_us), rel=0.08)


@pytest.mark.parametrize(
    ("nbytes", "microseconds"),
    [  # dropout of the scores, reading, writing, masking; GELU; GPT-1.3B with 1 and 8 samples
        (2.5 * 256 * MB, 957.3),
        (2.5 * 2048 * MB, 7760.0),
        (2 * 32 * MB, 94.1),
        (2 * 256 * MB, 716.5),
    ],
)
def test_moving_data_costs_what_it_took(nbytes: float, microseconds: float) -> None:
    assert v100().compute_s(0.0, nbytes, "f16") == pytest.approx(1e-6 * microseconds, rel=0.12)


@pytest.mark.parametrize(
    ("kind", "gpus", "megabytes", "milliseconds"),
    [
        ("all-reduce", 2, 32, 0.921),
        ("all-reduce", 4, 32, 0.714),
        ("all-reduce", 8, 32, 0.539),
        ("all-reduce", 2, 1024, 25.805),
        ("all-reduce", 4, 1024, 20.702),
        ("all-reduce", 8, 1024, 14.567),
        ("all-to-all", 2, 256, 4.022),
        ("all-to-all", 4, 256, 4.081),
        ("all-to-all", 8, 256, 5.342),
    ],
)
def test_collectives_cost_what_they_took(kind: str, gpus: int, megabytes: int, milliseconds: float) -> None:
    seconds = v100(gpus).collective_s(kind, megabytes * MB, (0,), combined=False)
    assert seconds == pytest.approx(1e-3 * milliseconds, rel=0.1)


def test_a_layer_of_the_benchmark_has_the_flops_of_a_transformer() -> None:
    layer = fidelity.Layer(hidden=2048, heads=32, batch=4, parts=1)
    ops = ["qkv", "score", "softmax", "dropout", "context", "dense"]
    works = [layer.works(f"enc-attention-{op}") for op in ops]
    works += [layer.works(f"enc-MLP-{op}") for op in ("GEMM-1", "gelu", "GEMM-2")]
    forward, backward = (sum(k.flops for w in works for k in w[way].kernels) for way in (0, 1))
    tokens = 4 * 2048
    assert forward == 24 * tokens * 2048**2 + 4 * tokens * 2048 * 2048
    assert backward == 2 * forward
    halved = dataclasses.replace(layer, parts=2)
    assert sum(k.flops for op in ops for k in halved.works(f"enc-attention-{op}")[0].kernels) == (
        sum(k.flops for w in works[:6] for k in w[0].kernels) / 2
    )
    assert halved.works("enc-MLP-GEMM-2")[0].reduced == halved.works("enc-MLP-GEMM-1")[1].reduced == 2 * tokens * 2048
    with pytest.raises(KeyError, match="conv"):
        layer.works("conv")


LAYER_US = {  # one layer of GPT-2.6B, 8 samples, not split
    "enc-1st-layernorm": (275.5, 1127.7),
    "enc-attention-qkv": (9175.0, 14219.4),
    "enc-attention-score": (5702.9, 8546.6),
    "enc-attention-softmax": (4841.6, 6477.4),
    "enc-attention-dropout": (7873.1, 6584.6),
    "enc-attention-context": (4983.4, 9238.9),
    "enc-attention-dense": (2837.6, 4282.6),
    "enc-post-attention-dropout": (904.2, 472.7),
    "enc-2nd-layernorm": (274.5, 1120.5),
    "enc-MLP-GEMM-1": (10554.2, 16597.9),
    "enc-MLP-gelu": (894.0, 1681.2),
    "enc-MLP-GEMM-2": (10601.9, 16755.6),
    "enc-post-MLP-dropout": (890.3, 472.4),
}

TIMES = ("forward_us", "backward_us")


def test_a_layer_of_another_size_than_the_fitted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = ("model", "micro_batch", "tensor_parallel", "algorithm", "op", *TIMES, "input_MB", "activations_MB")
    rows = [("gpt_2_6B", 8, 1, 0, op, *times, 80, 2048) for op, times in LAYER_US.items()]
    sums = [("all_reduce", 8, 32, 0.539), ("all_gather", 4, 200, 16.567), ("all_reduce", 8, 4096, 1e9)]
    write(tmp_path / "ops.csv", head, [*rows, ("gpt_2_6B", 8, 1, 0, "encoder-embedding", 1, 1, 1, 1)])
    write(tmp_path / "collectives.csv", ("kind", "gpus", "size_MB", "time_ms"), sums)
    found = {row.kind: row for row in fidelity.layers(fidelity.read(tmp_path / "ops.csv"))}
    assert set(found) == {"layer, forward", "layer, backward", "layer, both"}
    assert all(abs(row.error) < 0.05 and not row.fitted for row in found.values())
    assert found["layer, both"].measured == pytest.approx(1e-6 * sum(map(sum, LAYER_US.values())))
    monkeypatch.setattr("sys.argv", ["v100_fidelity", "--data", str(tmp_path)])
    fidelity.main()
    kinds = [line.split("  ")[0] for line in capsys.readouterr().out.split("\n\n")[0].splitlines()[2:]]
    groups = ["all collectives", "all layers", "all messages", "message across hosts", "message in a host"]
    assert sorted(set(kinds)) == sorted([*groups, "all-gather, unaligned", "all-reduce", *found])


def test_messages_and_scattered_sums_take_what_was_measured() -> None:
    rows = list(fidelity.messages())
    assert len(rows) == 22
    assert np.mean([abs(row.error) for row in rows]) < 0.05
    for gpus, megabytes, milliseconds in [(2, 64, 1.452), (4, 16, 0.329), (8, 256, 2.803), (2, 1024, 19.182)]:
        seconds = fidelity.collective_s("reduce-scatter", gpus, megabytes * MB)
        assert seconds == pytest.approx(1e-3 * milliseconds, rel=0.12)


def write(path: Path, head: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


def test_kernels_of_a_whole_model_add_up_to_a_rate():
    row = {"model": "gpt_350M", "micro_batch": "2", "tensor_parallel": "1", "algorithm": "0"}
    ops = (("enc-a", 1e3, 2e3), ("enc-b", 3e3, 4e3), ("head", 5e3, 6e3))
    rows = [row | {"op": op, "forward_us": str(f), "backward_us": str(b)} for op, f, b in ops]
    flops = 96 * 4096 * 24 * 1024**2 * (1 + 2048 / (6 * 1024)) + 6 * 4096 * 1024 * 51200
    seconds = 24 * (2 * 4e-3 + 6e-3) + 11e-3  # 24 layers, their forward passes twice, and the head
    assert list(fidelity.reached(rows)) == [("350M", 2, 1, pytest.approx(flops / seconds))]
    assert "45.1" in fidelity.reached_table(rows)
    failed = rows[2] | {"forward_us": "1e9"}  # a head that ran out of memory
    assert not list(fidelity.reached([*rows[:2], failed]))
