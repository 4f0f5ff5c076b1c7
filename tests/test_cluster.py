"""What clusters say of themselves: presets, links of mesh axes, errors, JSON, and the measured local one."""

import dataclasses
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from alpa_like import calibrate
from alpa_like.cluster import Cluster, Device, Link
from alpa_like.errors import ClusterError

PRESETS = Cluster.presets()
CHIP = Device("chip", (("float32", 1e12), ("bfloat16", 4e12), ("int8", 8e12)), 2**30, 1e11, 0.5)
INTRA, INTER = Link(100e9, 2e-6), Link(1e9, 20e-6)
PAIR = Cluster("pair", 2, 8, CHIP, INTRA, INTER, ("made up",))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_plausible_and_cites_its_sources(name):
    cluster = PRESETS[name](hosts=3)
    device = cluster.device
    assert cluster.name == name
    assert cluster.num_devices == 3 * cluster.devices_per_host
    assert len(cluster.sources) >= 3
    assert len(set(cluster.sources)) == len(cluster.sources)
    assert PRESETS[name]() == dataclasses.replace(cluster, hosts=1)
    assert 0.5 < device.flops_efficiency < 1
    # A matmul has to do dozens of FLOP per byte of memory, and no wire is as fast as the memory behind it.
    assert max(flops for _, flops in device.peak_flops) > 50 * device.memory_bandwidth_bytes_per_s
    inside, between = cluster.intra_host, cluster.inter_host
    assert between.bandwidth_bytes_per_s <= inside.bandwidth_bytes_per_s < device.memory_bandwidth_bytes_per_s
    assert 0 < inside.latency_s <= between.latency_s < 1e-4


def test_presets_are_ordered_as_their_generations_are():
    v100, a100, h100, h200 = (f() for f in (Cluster.p3_16xlarge, Cluster.dgx_a100, Cluster.dgx_h100, Cluster.dgx_h200))
    for older, newer in [(v100, a100), (a100, h100)]:
        assert older.device.flops_per_s("float16") < newer.device.flops_per_s("float16")
        assert older.intra_host.bandwidth_bytes_per_s < newer.intra_host.bandwidth_bytes_per_s
        assert older.inter_host.bandwidth_bytes_per_s < newer.inter_host.bandwidth_bytes_per_s
    assert h100.device.peak_flops == h200.device.peak_flops
    assert h100.device.memory_bytes < h200.device.memory_bytes
    assert h100.device.memory_bandwidth_bytes_per_s < h200.device.memory_bandwidth_bytes_per_s
    assert Cluster.tpu_v5e().device.memory_bytes < Cluster.tpu_v4().device.memory_bytes
    assert Cluster.tpu_v4().device.memory_bytes < Cluster.tpu_v5p().device.memory_bytes


@pytest.mark.parametrize(
    ("device", "dtype", "flops"),
    [
        (Cluster.p3_16xlarge().device, "float16", 125e12),
        (Cluster.p3_16xlarge().device, "bfloat16", 15.7e12),  # no such units: XLA computes in float32
        (Cluster.dgx_a100().device, "bf16", 312e12),
        (Cluster.dgx_a100().device, "float8_e5m2", 312e12),
        (Cluster.dgx_h100().device, "f8E5M2", 1979e12),
        (Cluster.dgx_h100().device, "tensorfloat32", 494.5e12),
        (CHIP, "f32", 1e12),
        (CHIP, "ui8", 8e12),
        (CHIP, "complex128", 0.5e12),
        (CHIP, "no such dtype", 1e12),
    ],
)
def test_a_dtype_without_units_runs_like_a_wider_one(device, dtype, flops):
    assert device.flops_per_s(dtype) == flops


@pytest.mark.parametrize(
    ("mesh_shape", "axes", "bandwidth", "latency"),
    [
        ((2, 8), (0,), 1e9, 20e-6),  # 8 rings share each host's network: one device's share
        ((2, 8), (1,), 100e9, 2e-6),
        ((2, 8), (0, 1), 8e9, (20 + 14 * 2) / 15 * 1e-6),  # one ring has all of it, and crosses once in 15 steps
        ((16,), (0,), 8e9, (20 + 14 * 2) / 15 * 1e-6),
        ((4, 4), (0,), 2e9, (20 + 2 * 2) / 3 * 1e-6),  # devices 0 4 | 8 12: 4 rings, two members per host
        ((4, 4), (1,), 100e9, 2e-6),
        ((2, 2, 4), (0,), 1e9, 20e-6),
        ((2, 2, 4), (1,), 100e9, 2e-6),  # devices 0 and 4
        ((2, 2, 4), (0, 2), 4e9, (20 + 6 * 2) / 7 * 1e-6),
        ((8, 2), (0,), 4e9, (20 + 6 * 2) / 7 * 1e-6),
        ((8,), (0,), 100e9, 2e-6),  # a mesh of one host
        ((2, 8), (), 100e9, 2e-6),  # groups of one device
    ],
)
def test_group_link_by_hand(mesh_shape, axes, bandwidth, latency):
    link = PAIR.group_link(mesh_shape, axes)
    assert link.bandwidth_bytes_per_s == bandwidth
    assert link.latency_s == pytest.approx(latency)
    if len(axes) == 1:
        assert PAIR.axis_link(mesh_shape, axes[0]) == link


def test_groups_that_end_inside_a_host():
    odd = dataclasses.replace(PAIR, hosts=3, devices_per_host=4)  # hosts 0-3, 4-7, 8-11; groups 0-5 and 6-11
    assert odd.axis_link((2, 6), 1).bandwidth_bytes_per_s == 2e9  # both cross host 1
    assert odd.axis_link((2, 6), 0).bandwidth_bytes_per_s == pytest.approx(1e9)  # pairs 0 6, 1 7, 2 8, 3 9, 4 10, 5 11


def test_a_ring_is_no_faster_than_the_wires_inside_its_hosts():
    fast_network = dataclasses.replace(PAIR, inter_host=Link(50e9, 20e-6))
    assert fast_network.axis_link((16,), 0).bandwidth_bytes_per_s == 100e9
    assert fast_network.axis_link((2, 8), 0).bandwidth_bytes_per_s == 50e9


def test_small_groups_reach_fewer_wires():
    cube = Cluster.p3_16xlarge(hosts=2)
    reached = {n: cube.axis_link((n,), 0).bandwidth_bytes_per_s for n in range(2, 9)}
    assert reached == {2: 40e9, 3: 40e9, 4: 80e9, 5: 80e9, 6: 80e9, 7: 80e9, 8: 120e9}
    assert cube.peer_link(0, 7) == Link(40e9, cube.intra_host.latency_s)
    assert cube.peer_link(7, 8) == cube.inter_host
    assert cube.axis_link((16,), 0).bandwidth_bytes_per_s == 25e9 / 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Link(0.0, 1e-6), "bandwidth_bytes_per_s must be a finite number above 0, found 0.0"),
        (lambda: Link(math.inf, 1e-6), "found inf"),
        (lambda: Link(1e9, -1e-6), "latency_s must be a finite number of at least 0"),
        (lambda: dataclasses.replace(CHIP, name=""), "name must be a text"),
        (lambda: dataclasses.replace(CHIP, peak_flops=(("bfloat16", 1e12),)), "must list float32"),
        (lambda: dataclasses.replace(CHIP, peak_flops=(("float32", 1.0), ("float32", 2.0))), "each dtype once"),
        (lambda: dataclasses.replace(CHIP, peak_flops=(("float32", math.nan),)), "peak_flops of float32"),
        (lambda: dataclasses.replace(CHIP, memory_bytes=1.5), "memory_bytes must be a whole number"),
        (lambda: dataclasses.replace(CHIP, flops_efficiency=1.5), "a share, at most 1, found 1.5"),
        (lambda: Cluster.dgx_a100(hosts=0), "cluster 'dgx-a100': hosts must be a whole number of at least 1, found 0"),
        (lambda: Cluster.dgx_a100(hosts=True), "found True"),
        (lambda: dataclasses.replace(PAIR, devices_per_host=-8), "devices_per_host"),
        (lambda: dataclasses.replace(PAIR, small_groups=((4, 1e9), (2, 1e9))), "rising, found [4, 2]"),
        (lambda: dataclasses.replace(PAIR, small_groups=((8, 1e9),)), "2 to 7 members"),
        (lambda: PAIR.axis_link((4, 8), 0), "mesh (4, 8) has 32 devices, the cluster only 16"),
        (lambda: PAIR.axis_link((2, 0), 0), "each size must be a whole number of at least 1, found 0"),
        (lambda: PAIR.axis_link((2, 8), 2), "has axes 0 to 1, each usable once, asked for (2,)"),
        (lambda: PAIR.group_link((2, 8), (1, 1)), "asked for (1, 1)"),
        (lambda: PAIR.peer_link(0, 16), "devices 0 to 15, asked for 16"),
    ],
)
def test_impossible_values_are_named(make, message):
    with pytest.raises(ClusterError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize("cluster", [PAIR, *(make(hosts=2) for make in PRESETS.values())], ids=lambda c: c.name)
def test_json_gives_the_same_cluster_back(cluster):
    text = json.dumps(cluster.to_json())
    assert json.loads(text) == cluster.to_json()
    assert Cluster.from_json(json.loads(text)) == cluster


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("device"),
        lambda data: data["device"].pop("peak_flops"),
        lambda data: data["device"].update(peak_flops=[1, 2]),
        lambda data: data["device"].update(colour="red"),
        lambda data: data.update(hosts="two"),
        lambda data: data.update(host=2),
        lambda data: data.update(sources=None),
        lambda data: data.update(small_groups=[[2]]),
        lambda data: data["intra_host"].update(bandwidth_bytes_per_s=None),
    ],
)
def test_damaged_json_is_a_cluster_error(change):
    data = PAIR.to_json()
    change(data)
    with pytest.raises(ClusterError, match=r"no cluster as|must be|no 'host'"):
        Cluster.from_json(data)


def test_text_is_short():
    assert str(Cluster.p3_16xlarge()) == (
        "p3.16xlarge: 1 host × 8 V100-SXM2-16GB (16 GiB, 125 TFLOP/s float16), 120 GB/s per device in a host"
    )
    assert str(PAIR) == (
        "pair: 2 hosts × 8 chip (1 GiB, 4 TFLOP/s bfloat16), 100 GB/s per device in a host, 1 GB/s between hosts"
    )


def test_cluster_imports_no_jax():
    package = Path(calibrate.__file__).parent  # stands in for alpa_like/__init__.py, which may import JAX
    code = (
        "import sys, types; package = types.ModuleType('alpa_like'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['alpa_like'] = package; import alpa_like.cluster; sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(package)], check=False).returncode == 0


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALPA_LIKE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(calibrate, "_unwritten", {})
    return tmp_path


@pytest.fixture
def measured(monkeypatch):
    """Counts measurements, and replaces them by a quick one that gives another figure each time."""
    calls = []

    def measure(devices):
        calls.append(len(devices))
        return dataclasses.replace(PAIR, hosts=1, devices_per_host=len(devices), name=f"measured-{len(calls)}")

    monkeypatch.setattr(calibrate, "measure", measure)
    return calls


def test_local_measures_the_devices_here(measured_here):
    cluster = Cluster.local()
    assert (cluster.hosts, cluster.devices_per_host) == (1, len(jax.devices()))
    assert 0 < cluster.device.flops_efficiency <= 1
    assert 1e8 < cluster.device.flops_per_s("float32") < 1e13
    assert 1e7 < cluster.device.memory_bandwidth_bytes_per_s < 1e13
    assert cluster.device.memory_bytes > 2**20
    assert 1e6 < cluster.intra_host.bandwidth_bytes_per_s < 1e13
    assert cluster.intra_host.latency_s < 0.1
    assert Cluster.local() == cluster  # read from the file: a second measurement would differ
    assert [path.suffix for path in measured_here.glob("cluster-cpu-cpu-8-*")] == [".json"]
    assert {path.suffix for path in measured_here.iterdir()} == {".json"}  # other tests measure fewer devices


def test_a_lone_device_has_its_memorys_bandwidth(cache):
    cluster = Cluster.local(1)
    assert cluster.num_devices == 1
    assert cluster.intra_host.bandwidth_bytes_per_s == cluster.device.memory_bandwidth_bytes_per_s


def test_local_is_measured_once_per_number_of_devices(cache, measured):
    assert [Cluster.local(n).name for n in (8, 8, 4, 8)] == ["measured-1", "measured-1", "measured-2", "measured-1"]
    assert Cluster.local(8, recalibrate=True).name == "measured-3"
    assert Cluster.local(8).name == "measured-3"
    assert measured == [8, 4, 8]
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 0, "key": {}, "cluster": {}}', "\udcff"])
def test_a_damaged_cache_is_measured_anew(cache, measured, caplog, text):
    Cluster.local(4)
    (path,) = cache.iterdir()
    path.write_bytes(text.encode(errors="surrogateescape"))
    with caplog.at_level(logging.WARNING):
        assert Cluster.local(4).name == "measured-2"
    assert "measuring the devices anew" in caplog.text
    assert Cluster.local(4).name == "measured-2"


def test_figures_of_other_devices_are_not_used(cache, measured):
    Cluster.local(4)
    (path,) = cache.iterdir()
    path.write_text(path.read_text().replace('"device_kind": "cpu"', '"device_kind": "abacus"'))
    assert Cluster.local(4).name == "measured-2"


def test_without_a_place_for_the_cache_figures_last_as_long_as_the_process(cache, measured, monkeypatch, caplog):
    (cache / "file").write_text("in the way")
    monkeypatch.setenv("ALPA_LIKE_CACHE_DIR", str(cache / "file"))
    assert [Cluster.local(4).name, Cluster.local(4).name] == ["measured-1", "measured-1"]
    assert "not kept for other processes" in caplog.text


def test_without_a_home_nothing_is_kept(measured, monkeypatch, caplog):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(calibrate, "_unwritten", {})
    monkeypatch.setattr(calibrate, "cache_dir", no_home)
    assert [Cluster.local(4).name, Cluster.local(4).name] == ["measured-1", "measured-1"]
    assert "Could not determine home directory" in caplog.text


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("ALPA_LIKE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert calibrate.cache_dir() == tmp_path / "xdg" / "alpa_like"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert calibrate.cache_dir() == tmp_path / ".cache" / "alpa_like"


@pytest.mark.parametrize("wanted", [0, 1000])
def test_local_says_how_many_devices_there_are(cache, wanted):
    with pytest.raises(ClusterError, match=f"asked for {wanted} devices, JAX sees {len(jax.devices())}"):
        Cluster.local(wanted)


@pytest.mark.parametrize(("latency", "bandwidth"), [(3e-6, 1e9), (0.0, 5e9)])
def test_fit_finds_latency_and_bandwidth(monkeypatch, latency, bandwidth):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("devices",))
    monkeypatch.setattr(
        calibrate, "_all_reduce_seconds", lambda mesh, sizes, size: 6 * latency + 1.5 * size / bandwidth
    )
    link = calibrate._all_reduce_link(mesh, calibrate._sizes("cpu", 4))
    assert link.bandwidth_bytes_per_s == pytest.approx(bandwidth, rel=0.05)
    assert link.latency_s == pytest.approx(latency, rel=0.01, abs=3e-7)


def test_gpus_are_measured_in_the_dtypes_that_presets_list():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("devices",))
    small = calibrate._Sizes(8, 16, 2**10, (2**10,), calls=2, reduces=2, runs=2)
    rates = dict(calibrate._matmul_flops(mesh, small, "gpu"))
    assert set(rates) == {"float32", "tensorfloat32", "bfloat16", "float16"}
    assert all(rate > 0 for rate in rates.values())
