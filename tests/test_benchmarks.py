"""The entry to the benchmarks, its counts of FLOPs, and the rivals that plans are compared with."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

import alpa_like as alpa
from alpa_like.cost import RingCost, ring_bytes
from alpa_like.models import SIZES, GPTConfig, MoEConfig, config, gpt_task, paper_gpt_config, paper_moe_config, task
from alpa_like.plan import Pipeline, PipelineStage
from benchmarks import __main__ as entry
from benchmarks import megatron, model, paper
from benchmarks.charts import Lines, draw_lines
from benchmarks.fill import fill
from benchmarks.flops import model_flops, peak_of_kind
from benchmarks.paper_tables import far_from_published
from benchmarks.published import PUBLISHED, gpt_flops, moe_flops
from benchmarks.share import one_device, parameters, share_task, shares

SMALL = GPTConfig(vocab_size=512, seq_len=128, d_model=256, num_heads=4, num_layers=4)
ONE = alpa.Cluster.p3_16xlarge().part(1, 1)


@pytest.fixture(autouse=True)
def session() -> Iterator[None]:
    assert len(jax.devices()) == 8  # started before a script asks for fewer
    yield
    alpa.shutdown()


def test_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*SIZES, "paper", "plan_time", "demo", "traffic"))
    assert not {"charts", "ray_nodes"} & set(entry.scripts())
    assert "gpt" in entry.scripts()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gptt"], "choose a model (mlp, gpt, "),
        (["gpt", "--size", "3T"], "choose one of tiny, laptop"),
        (["gpt", "--cluster", "moon", "--plan-only"], "choose p3.16xlarge, dgx-a100"),
        (["gpt", "--cluster", "dgx-a100:x", "--plan-only"], "`:4` behind the name"),
        (["gpt", "--cluster", "local:2", "--plan-only"], "local with --devices"),
        (["gpt", "--out", "/dev/null/out"], "Not a directory: '/dev/null/out'"),
        (["v100_fidelity", "--data", "/dev/null"], "Not a directory: '/dev/null/ops.csv'"),
        (["mlp", "--size", "laptop", "--batch-size", "9999999", "--cluster", "p3.16xlarge", "--plan-only"], "--remat"),
        (["gpt", "--cluster", "dgx-a100"], "add --plan-only"),
        (["gpt", "--size", "tiny", "--dtype", "int8", "--plan-only"], "floating"),
        (["gpt", "--method", "data", "--micro-batches", "2"], "PipeshardParallel, not with DataParallel"),
        (["gpt", "--size", "tiny", "--cluster", "dgx-a100:2", "--devices", "9", "--plan-only"], "whole hosts of 8"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_reader_that_closes_early_is_no_error() -> None:
    program = f"set -o pipefail; {sys.executable} -m benchmarks | true"
    ended = subprocess.run(["bash", "-c", program], cwd=entry.FOLDER.parent, stderr=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpt", "--method", "Magic"], "choose from"),
        (["gpt", "--steps", "0"], "at least 1"),
        (["paper", "--rows", "x"], "choose among gpt, moe, wide_resnet"),
        (["plan_time", "--sweeps", "hidden", "--hidden", "1000"], "multiples of 1024"),
    ],
)
def test_bad_options_end_with_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        entry.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_plan_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(alpa.Cluster.p3_16xlarge().to_json()))
    arguments = ["gpt", "--size", "tiny", "--cluster", str(file), "--devices", "2", "--plan-only"]
    assert entry.main([*arguments, "--batch-size", "16", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpt-tiny.json").read_text())
    plan = alpa.Plan.load(tmp_path / "gpt-tiny.plan.json")
    assert found["predicted"]["step_s"] == plan.predicted.step_time_s
    assert plan.cluster.num_devices == 2
    peak = 15.7e12  # float32 of a V100
    assert found["predicted"]["mfu"] == pytest.approx(found["model_flops"] / plan.predicted.step_time_s / 2 / peak)
    assert found["predicted"]["per_s"] == pytest.approx(16 * 16 / plan.predicted.step_time_s)
    assert (tmp_path / "gpt-tiny.plan.png").stat().st_size > 10_000
    assert "tokens/s" in capsys.readouterr().out


def test_runs_beside_jit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(model, "cluster_of", lambda _: _cluster(1e9, 2))  # pyright: ignore[reportUnknownLambdaType]
    assert entry.main(["mlp", "--size", "tiny", "--devices", "2", "--steps", "3", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "mlp-tiny.json").read_text())
    assert len(found["measured"]["steps_s"]) == len(found["jit"]["steps_s"]) == 3
    assert found["unit"] == "rows"
    assert found["batch_size"] == 16
    assert "jax.jit on one device" in capsys.readouterr().out
    assert (tmp_path / "mlp-tiny.png").exists()


@pytest.mark.parametrize("looped", [False, True])
def test_model_flops_by_hand(looped: bool) -> None:
    c, batch = config("gpt", "tiny"), 4
    matrices = c.num_layers * 12 * c.d_model**2 + c.d_model * c.vocab_size
    attention = 12 * c.num_layers * c.seq_len**2 * c.d_model * batch
    found = model_flops(task("gpt", "tiny", batch_size=batch, scan_layers=looped))
    assert found == 6 * matrices * batch * c.seq_len + attention


def test_peaks() -> None:
    assert peak_of_kind("NVIDIA H200", "bfloat16") == 989e12
    assert peak_of_kind("cpu", "float32") is None
    assert peak_of_kind("NVIDIA A100-SXM4-80GB", "float32") == 156e12
    assert peak_of_kind("TPU v5 lite", "bfloat16") == 197e12


@pytest.mark.parametrize(
    ("size", "gpus", "seconds", "tflops"),
    [("350M", 1, 71.1109, 46.2003), ("6.7B", 16, 74.3634, 48.423), ("15B", 32, 117.7197, 35.074)],
)
def test_flops_as_alpa_counts_gpt(size: str, gpus: int, seconds: float, tflops: float) -> None:
    """Seconds and TFLOP/s per GPU of Alpa's own file."""
    assert gpt_flops(paper_gpt_config(size), 1024) / seconds / gpus / 1e12 == pytest.approx(tflops, rel=4e-3)


@pytest.mark.parametrize(
    ("size", "gpus", "seconds", "tflops"), [("690M", 2, 19.6852, 42.1687), ("10B", 16, 28.7854, 22.9137)]
)
def test_flops_as_alpa_counts_moe(size: str, gpus: int, seconds: float, tflops: float) -> None:
    assert moe_flops(paper_moe_config(size), 1024) / seconds / gpus / 1e12 == pytest.approx(tflops, rel=0.05)


# ------------------------------------------------------------------------------------------------------- rivals


def test_a_share_is_the_model() -> None:
    """One of one device costs what the model itself costs; layers and rows add up."""
    whole, _ = one_device(ONE, gpt_task(replace(SMALL, num_layers=3), 2 * 4))
    found = shares(SMALL, ONE, 1, 1)
    built = found.unit.at(4).plus(found.unit.at(4)).plus(found.unit.at(4)).plus(found.rest.at(4))
    assert built.forward_s == pytest.approx(whole.forward_s, rel=0.01)
    assert built.backward_s == pytest.approx(whole.backward_s, rel=0.01)
    assert built.held_bytes == pytest.approx(whole.held_bytes, rel=0.01)
    count = parameters(jax.eval_shape(share_task(SMALL, 1, 1).init).params)
    assert found.unit_params + found.rest_params == count == replace(SMALL, num_layers=1).num_params()


def test_data_parallel_by_hand() -> None:
    """Replicas compute alone, then reduce float32 gradients in a ring."""
    cluster = alpa.Cluster.p3_16xlarge().part(1, 2)
    every = megatron.candidates(SMALL, 32, cluster, replace(megatron.DATA_PARALLEL, zero=(0,)))
    found = next(c for c in every if c.rows == 4 and not c.remat)
    s, params = shares(SMALL, ONE, 1, 1), SMALL.num_params()
    each = [4 * s.unit.at(4).forward_s + s.rest.at(4).forward_s, 4 * s.unit.at(4).backward_s + s.rest.at(4).backward_s]
    reduced = ring_bytes("all-reduce", 4 * params, 2) / 40e9
    adam = RingCost(ONE, (1,)).compute_s(0.0, 28.0 * params, "f32")
    assert found.micro_batches == 4
    assert found.step_s == pytest.approx(4 * sum(each) + reduced + adam, rel=1e-6)
    held = 4 * s.unit.at(4).held_bytes + s.rest.at(4).held_bytes + s.rest.at(4).peak_bytes
    assert found.memory_bytes == pytest.approx(16 * params + held)


def test_zero_spreads_over_copies_only() -> None:
    """Experts of which each device has its own are not spread further; Adam updates them all there."""
    cluster, sparse = alpa.Cluster.p3_16xlarge().part(1, 2), MoEConfig(512, 64, 64, 4, 4, num_experts=4)
    s = shares(sparse, ONE, 1, 2)
    every = list(megatron.candidates(sparse, 2, cluster, replace(megatron.EXPERT_PARALLEL, tensor=(1,))))
    plain, spread = (
        next(c for c in every if (c.expert, c.tensor, c.rows, c.remat, c.zero) == (2, 1, 1, False, zero))
        for zero in (0, 2)
    )
    units = sparse.num_layers // 2
    dense = units * (s.unit_params - s.unit_experts) + s.rest_params
    assert plain.memory_bytes - spread.memory_bytes == pytest.approx(12 * dense / 2)


def test_the_best_of_the_grid_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = alpa.Cluster.p3_16xlarge().part(1, 4)
    roomy = megatron.search(SMALL, 64, cluster, replace(megatron.MEGATRON, tensor=(1,)))
    assert roomy.best is not None
    assert roomy.fitted == roomy.tried
    assert roomy.best.step_s > 0
    least = min(
        c.memory_bytes for c in megatron.candidates(SMALL, 64, cluster, replace(megatron.MEGATRON, tensor=(1,)))
    )
    small = replace(cluster, device=replace(cluster.device, memory_bytes=int(least) + 1))
    tight = megatron.search(SMALL, 64, small, replace(megatron.MEGATRON, tensor=(1,)))
    assert tight.best is not None
    assert tight.fitted < tight.tried
    assert tight.best.step_s > roomy.best.step_s
    assert tight.best.memory_bytes <= small.device.memory_bytes
    assert tight.best.stages == 4
    none = replace(cluster, device=replace(cluster.device, memory_bytes=1))
    assert megatron.search(SMALL, 64, none, replace(megatron.MEGATRON, tensor=(1,))).best is None


# --------------------------------------------------------------------------------------------- sizes that fill


def _cluster(memory_bytes: float, devices: int = 1) -> alpa.Cluster:
    part = alpa.Cluster.dgx_a100().part(1, devices)
    return replace(part, device=replace(part.device, memory_bytes=int(memory_bytes)))


def test_fill_takes_the_largest_that_fits() -> None:
    def predict(size: str, batch: int) -> float:
        return 16 * SIZES["gpt"][size].num_params() + batch * 0.9e9  # pyright: ignore[reportAttributeAccessIssue]

    found = fill(SIZES["gpt"], _cluster(80e9), predict)
    assert found is not None
    assert found.size == "2.6B"
    assert (found.batch_size, found.peak_bytes <= 0.85 * 80e9) == (24, True)
    assert fill(SIZES["gpt"], _cluster(1e6), predict) is None


def test_auto_size_with_real_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "cluster_of", lambda _: _cluster(2e5))  # pyright: ignore[reportUnknownLambdaType]
    assert entry.main(["mlp", "--size", "auto", "--plan-only", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "mlp-tiny.json").read_text())
    assert 0.85e5 / 2 < found["predicted"]["memory_bytes"] <= 0.85 * 2e5
    assert found["batch_size"] >= 8


# ----------------------------------------------------------------------------------------------------- the paper


def _fake_row(family: str, size: str, quick: bool) -> dict[str, Any]:
    published = PUBLISHED[family][size]
    ours = {
        "step_s": 10.0,
        "memory_bytes": 2**33,
        "micro_batches": 8,
        "schedule": "1f1b",
        "bubble": 0.1,
        "seconds": 1.0,
    }
    stages = [{"layers": [0, 3], "mesh": [2, 4], "remat": True}] * 2
    best = {"step_s": 12.0, "text": "dp2 tp1 pp1, 8×2 rows"}
    return {
        "family": family, "size": size, "gpus": published.gpus, "flops": 1e15, "rivals_s": 1.0,
        "published": {"alpa": published.alpa, "rival": published.rival}, "alpas": None,
        "ours": {**ours, "stages": stages},
        "rivals": {"Megatron": {"best": best}, "data parallel": {"best": None}},
    }  # fmt: skip


def test_paper_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[str] = []

    def row(family: str, size: str, quick: bool) -> dict[str, Any]:
        if size == "15B":
            raise KeyboardInterrupt
        made.append(size)
        return _fake_row(family, size, quick)

    monkeypatch.setattr(paper, "_row", row)
    with pytest.raises(KeyboardInterrupt):
        paper.main(["--rows", "gpt:350M", "gpt:15B", "--out", str(tmp_path)])
    paper.main(["--rows", "gpt:350M", "moe:70B", "--resume", "--out", str(tmp_path)])
    assert made == ["350M", "70B"]
    assert (tmp_path / "paper.png").stat().st_size > 10_000
    text = capsys.readouterr().out
    assert "2 of 2x4 remat" in text
    assert "out of memory" in text
    assert "1.20" in text
    paper.main(["--rows", "gpt:350M", "--resume", "--quick", "--out", str(tmp_path)])
    assert made == ["350M", "70B", "350M"]  # another question


def test_meshes_that_wait_while_they_send_take_longer() -> None:
    """GPipe on two meshes by hand: 4 micro-batches, forward 1 s, backward 2 s, half a second to send."""
    stages = tuple(PipelineStage(n, n, n, False, 4, 0.0, 1.0, 2.0, 1.0, 1.0) for n in range(2))
    pipeline = Pipeline(4, "gpipe", (1, 2), (1.0, 1.0), stages, (0.5,), (0.0, 0.0), (0.0, 0.0))
    assert pipeline.simulate().makespan_s == pytest.approx(5 * 1 + 5 * 2 + 2 * 0.5)
    assert paper.waiting_s(pipeline) == pytest.approx(5 * 1.5 + 5 * 2.5)


def test_rows_far_from_published_ones_are_explained() -> None:
    row = _fake_row("wide_resnet", "13B", quick=False)
    seconds = row["flops"] / (row["published"]["alpa"] * row["gpus"] * 1e12)
    assert far_from_published(row | {"alpas": {"step_s": seconds * 1.1}}) == ""
    fast = {"step_s": seconds / 1.25, "waiting_step_s": seconds * 1.25}
    text = far_from_published(row | {"alpas": fast})
    assert "1.25 of it, 0.80 if meshes wait while they send" in text
    assert "1.25 of it; the preset's shares" not in text
    assert "0.80 of it; the preset's shares" in far_from_published(row | {"alpas": {"step_s": seconds * 1.25}})


def test_lines_are_drawn(tmp_path: Path) -> None:
    draw_lines(tmp_path / "a.png", "title", [Lines("t", "layers", "s", [2, 8], {"total": [1.0, 2.0]})])
    assert (tmp_path / "a.png").stat().st_size > 5_000
