"""`RayCluster` on three nodes of this machine: groups of processes, their errors, their deaths, what they leave."""

import _thread
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
from ray_support import SHARED, LocalRay, local_ray_cluster, wait_until

import alpa_like as alpa
from alpa_like.cluster import Cluster
from alpa_like.errors import ClusterError, PlanError, WorkerError
from alpa_like.runtime import ray_hosts, ray_probes, ray_workers
from alpa_like.runtime import session as sessions
from alpa_like.runtime.ray_actor import environment
from alpa_like.runtime.ray_cluster import RayCluster
from alpa_like.runtime.ray_connection import check_address
from alpa_like.runtime.ray_hosts import Choice, Want, choose
from alpa_like.runtime.ray_workers import Part, parts_of
from benchmarks.ray_local import processes, ray_environment, runs

BODY = "ray_support:Body"


@pytest.fixture(scope="module")
def local() -> Generator[LocalRay]:
    with local_ray_cluster(3, cpus=2) as local:
        yield local


@pytest.fixture(scope="module")
def session(local: LocalRay) -> Generator[RayCluster]:
    """Two hosts with two devices each; a mesh over all of them, and two over one device each of the same."""
    session = RayCluster.start(address=local.address, num_devices=4, num_hosts=2, body=BODY)
    session.bring_up([(0, 4), (0, 1), (3, 1)])
    yield session
    session.stop()


def start(local: LocalRay, **options: Any) -> RayCluster:
    return RayCluster.start(address=local.address, **({"body": BODY} | options))


@contextmanager
def started(local: LocalRay, **options: Any) -> Generator[RayCluster]:
    session = start(local, **options)
    try:
        yield session
    finally:
        session.stop()


# ------------------------------------------------------------------------------------------------ one running session


def test_hosts_are_numbered_by_name_and_described(session: RayCluster):
    first, second = (host.name for host in session.hosts)
    assert first < second
    assert (session.platform, session.devices_per_host, session.num_devices) == ("cpu", 2, 4)
    assert (session.cluster.hosts, session.cluster.devices_per_host) == (2, 2)
    assert "guess" in session.cluster.sources[-1]


def test_meshes_compute_side_by_side_on_the_same_devices(session: RayCluster):
    meshes = session.bring_up([(0, 4), (0, 1), (3, 1)])
    assert [len(mesh) for mesh in meshes] == [2, 1, 1]
    for _ in range(3):
        refs = [session.call(mesh, "total", [()] * len(mesh)) for mesh in meshes]
        assert [session.wait(each) for each in refs] == [[6.0, 6.0], [0.0], [3.0]]
    assert session.workers(0, 4) is meshes[0]


def test_each_worker_knows_its_place(session: RayCluster):
    first, second = session.wait(session.call(session.workers(0, 4), "setup", [(), ()]))
    assert (first.first, first.count, first.devices_per_process) == (0, 4, 2)
    assert (first.process_id, first.num_processes) == (0, 2)
    assert second.process_id == 1
    assert second.coordinator == first.coordinator
    assert first.coordinator.startswith(f"{first.host_ip}:")
    (alone,) = session.wait(session.call(session.workers(3, 1), "setup", [()]))
    assert (alone.first, alone.num_processes, alone.coordinator) == (3, 1, None)


def test_calls_keep_their_order_and_asking_does_not_wait_for_them(session: RayCluster):
    worker = session.workers(3, 1)
    refs = [session.call(worker, "note", [args])[0] for args in (("first", 2.0), ("second",), ("third",))]
    start = time.monotonic()
    assert session.wait(session.ask(worker, "seen")) == [[]]
    assert time.monotonic() - start < 1.5
    assert session.wait(refs)[-1] == ["first", "second", "third"]
    (slow,) = session.call(session.workers(0, 1), "note", [("late", 0.3)])
    refs = [session.call(worker, "note", [(value,)])[0] for value in (slow, "last")]
    assert session.wait(refs)[-1][3:] == [["late"], "last"]


def test_an_error_of_ours_is_raised_as_it_is(session: RayCluster):
    with pytest.raises(PlanError, match=r"^no plan") as caught:
        session.wait(session.call(session.workers(0, 1), "fail", [(PlanError("no plan"),)]))
    assert f"for device 0 on host {session.hosts[0]}" in caught.value.__notes__[0]
    assert session.wait(session.call(session.workers(0, 1), "seen", [()])) == [["late"]]


def test_another_error_names_the_worker_and_what_it_said_while_others_still_run(session: RayCluster):
    error = ValueError("dots differ\nmany\nlines\nin dim 3")
    busy = session.call(session.workers(3, 1), "sleep", [(4.5,)])
    failing = session.call(session.workers(0, 4)[1:], "fail", [(error,)])
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"^worker 2 of 2 .*: ValueError: dots differ ... in dim 3$") as caught:
        session.wait([*busy, *failing])
    assert time.monotonic() - start < 4
    assert str(session.hosts[1]) in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)
    assert session.poll_failure() is None


def test_no_answer_in_time(session: RayCluster):
    refs = session.call(session.workers(0, 1), "sleep", [(1.0,)])
    with pytest.raises(WorkerError, match=r"^1 of 1 answers did not come within 0.3 s"):
        session.wait(refs, timeout_s=0.3)
    assert session.wait(refs) == [None]


def test_a_worker_that_is_stopped_is_named(
    session: RayCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """And no other one, though all are busy."""
    monkeypatch.setattr(ray_workers, "_SILENT_S", 0.1)
    monkeypatch.setattr(ray_workers, "_ANSWER_S", 1.0)
    first, second = session.workers(0, 1)[0], session.workers(3, 1)[0]
    os.kill(first.pid, signal.SIGSTOP)
    try:
        refs = session.call([first, second], "note", [(0,), (0, 2.0)])
        assert wait_until(lambda: session.ready(refs, 0.05) or caplog.records)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert [r.message for r in caplog.records] == [
        f"waiting for {first}, which does not answer; is the process stopped?"
    ]
    session.wait(refs)


def test_a_mesh_is_some_devices_of_a_host_or_whole_hosts(session: RayCluster):
    with pytest.raises(ClusterError, match="which have 2 each; asked for 2 from 1 on"):
        session.workers(1, 2)
    with pytest.raises(ClusterError, match="devices are 0 to 3, asked for 4 from 2 on"):
        session.workers(2, 4)


def test_a_body_that_fails(local: LocalRay, monkeypatch: pytest.MonkeyPatch):
    """A new session waits until the process that failed has let go of its devices."""
    waited: dict[str, list[int]] = {}
    monkeypatch.setattr(ray_probes, "wait_for_nodes", lambda processes, _: waited.update(processes))
    with started(local, num_hosts=1, num_devices=1, body="no_such_module:Body") as other:
        with pytest.raises(WorkerError, match=r"^worker 1 of 1 for device 0 .*: ModuleNotFoundError: .*no_such_module"):
            other.workers(0, 1)
        assert other.poll_failure() is None
        assert other.running == []
        other.restart(20.0).stop()
        assert [len(pids) for pids in waited.values()] == [1]


# -------------------------------------------------------------------------------------------- what can't be started


def test_too_few_hosts(session: RayCluster, local: LocalRay):
    with pytest.raises(
        ClusterError, match=r"expected 4 host\(s\) with 2 emulated .*, but 3 of 4 are there after 0.5 s"
    ):
        start(local, num_hosts=4, wait_s=0.5)


def test_hosts_in_use(session: RayCluster, local: LocalRay):
    hog = ray_hosts.reserve(Want(num_hosts=3), 5.0)
    try:
        with pytest.raises(ClusterError, match=r"they are in use: 1 of the cluster's 6 CPU are free after 0.5 s"):
            start(local, num_hosts=3, wait_s=0.5)
    finally:
        hog.release()


def test_another_version_on_a_host(session: RayCluster, local: LocalRay, monkeypatch: pytest.MonkeyPatch):
    here = ray_probes.driver_versions()
    monkeypatch.setattr(ray_probes, "driver_versions", lambda: here | {"jaxlib": "0.9.1"})
    with pytest.raises(ClusterError, match=r"^host n\d .* has jaxlib .*, but the driver has 0.9.1: install"):
        start(local, num_hosts=1)


def test_no_package_on_a_host(session: RayCluster, local: LocalRay, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_probes, "_PACKAGE", "another_package")
    monkeypatch.setattr(ray_probes, "driver_versions", lambda: {"another_package": "1.0"})
    with pytest.raises(
        ClusterError, match=r"^host n\d .* has no another_package, but the driver has 1.0: install the same"
    ):
        start(local, num_hosts=1)


def test_ray_is_missing():
    script = """
        import sys
        sys.modules["ray"] = None
        import alpa_like
        try:
            import alpa_like.runtime.ray_cluster
        except alpa_like.ClusterError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert "pip install 'alpa-like[ray]'" in done.stdout


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://10.0.0.1:10001", "Ray Client's"),
        ("10.0.0.1", "must be host:port"),
        ("10.0.0.1:many", "must be host:port"),
        ("http://10.0.0.1:8265", "must be host:port"),
        ("127.0.0.1:1", r"no Ray cluster answers at 127.0.0.1:1 \(.*refused\)"),
        ("no-such-host.invalid:6379", "no Ray cluster answers at no-such-host.invalid:6379"),
    ],
)
def test_a_wrong_address_is_one_sentence(address: str, message: str):
    with pytest.raises(ClusterError, match=message):
        check_address(address)


class Running:
    """The workers of a session that runs."""

    number, stopped = 1, False

    def stop(self) -> None:
        self.stopped = True


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("ray",), {"address": "127.0.0.1:1"}, "no Ray cluster answers"),
        (("ray",), {"address": ""}, "address must be host:port .* found ''"),
        ((), {"address": ""}, "address must be host:port .* found ''"),
        (("ray",), {"address": 6379}, "address must be host:port .* found 6379"),
        (("ray",), {"num_devices": 0}, "num_devices must be a whole number"),
        (("ray",), {"num_devices": 3, "num_hosts": 2}, "3 devices can't be spread evenly"),
        (("ray",), {"max_restarts": -1}, "max_restarts must be a whole number"),
        ((Cluster.dgx_a100(),), {"address": "local", "num_devices": 4}, "num_devices is 4, but cluster dgx-a100 has 8"),
    ],
)
def test_bad_arguments_leave_the_session_alone(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    running: Any = Running()
    monkeypatch.setattr(sessions, "_sessions", [sessions.Session((), None, running)])
    with pytest.raises(ClusterError, match=message) as info:
        alpa.init(*arguments, **options)
    assert "\n" not in str(info.value)
    assert not running.stopped
    assert sessions.current().remote is running


def test_the_address_of_another_server():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ClusterError, match="is not the head of a Ray cluster"):
            check_address(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()


# -------------------------------------------------------------------------------------------- without a cluster


def node(name: str = "n", **resources: float) -> dict[str, Any]:
    return {"NodeName": name, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "want", "choice"),
    [
        ([node(CPU=4)], Want(), Choice("cpu", 8, 1, 1)),
        ([node(CPU=4)] * 3, Want(), Choice("cpu", 3, 3, 3)),
        ([node(CPU=4)] * 16, Want(), Choice("cpu", 1, 16, 16)),
        ([node(CPU=4)] * 2, Want(num_devices=8), Choice("cpu", 4, 2, 2)),
        ([node(CPU=4)] * 2, Want(8, 1), Choice("cpu", 8, 1, 2)),
        ([node(CPU=4)] * 2, Want(num_hosts=4), Choice("cpu", 2, 4, 2)),
        ([node(CPU=4), node(memory=1)], Want(), Choice("cpu", 8, 1, 1)),
        ([node(CPU=4)] + [node(CPU=4, GPU=8)] * 2, Want(), Choice("cuda", 8, 2, 2)),
        ([node(GPU=8)] * 2 + [node(GPU=4)] * 3, Want(), Choice("cuda", 8, 2, 2)),
        ([node(GPU=8)] * 2, Want(num_devices=2), Choice("cuda", 2, 1, 2)),
        ([node(GPU=8)] * 2, Want(4, 2), Choice("cuda", 2, 2, 2)),
        ([node(GPU=8)] * 2, Want(num_devices=32), Choice("cuda", 8, 4, 2)),
        ([node(TPU=4)] * 4, Want(), Choice("tpu", 4, 4, 4)),
        ([], Want(num_hosts=2), Choice("cpu", 4, 2, 0)),
    ],
)
def test_which_hosts_are_chosen(nodes: list[dict[str, Any]], want: Want, choice: Choice):
    assert choose(nodes, want) == choice


@pytest.mark.parametrize(
    ("nodes", "devices", "hosts", "message"),
    [
        ([node(CPU=1)] * 2, 3, None, "can't be spread evenly over 2 hosts"),
        ([node(GPU=8)] * 2, 12, None, "a multiple of 8"),
        ([node(GPU=8)] * 2, 32, 2, "with 2 hosts; ask for"),
        ([], 0, None, "num_devices must be a whole number of at least 1, found 0"),
        ([], 8, 3, "8 devices can't be spread evenly over 3 hosts"),
    ],
)
def test_devices_that_no_hosts_have(nodes: list[dict[str, Any]], devices: int, hosts: int | None, message: str):
    with pytest.raises(ClusterError, match=message):
        choose(nodes, Want(devices, hosts))


@pytest.mark.parametrize(
    ("span", "parts"),
    [
        ((0, 8), (Part(0, 0, 4), Part(1, 0, 4))),
        ((4, 8), (Part(1, 0, 4), Part(2, 0, 4))),
        ((6, 2), (Part(1, 2, 2),)),
        ((4, 4), (Part(1, 0, 4),)),
    ],
)
def test_parts_of_hosts(span: tuple[int, int], parts: tuple[Part, ...]):
    assert parts_of(span, hosts=3, size=4) == parts


def test_a_process_sees_its_part_of_a_host():
    assert environment("cpu", 2, (), whole_host=False)["NPROC"] == "16"
    assert environment("cpu", 16, (), whole_host=True)["NPROC"] == "32"
    cuda = environment("cuda", 2, ("4", "5"), whole_host=False)
    assert (cuda["CUDA_VISIBLE_DEVICES"], cuda["JAX_PLATFORMS"]) == ("4,5", "cuda,cpu")
    assert cuda["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert environment("tpu", 4, ("0", "1", "2", "3"), whole_host=True) == {"JAX_PLATFORMS": "tpu,cpu"}
    tpu = environment("tpu", 2, ("2", "3"), whole_host=False)
    assert (tpu["TPU_VISIBLE_CHIPS"], tpu["TPU_CHIPS_PER_HOST_BOUNDS"]) == ("2,3", "1,2,1")
    with pytest.raises(ClusterError, match="1, 2, 4 or all chips"):
        environment("tpu", 3, ("0", "1", "2"), whole_host=False)


def test_flags_of_the_driver_do_not_set_the_number_of_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=4 --xla_b=2")
    assert environment("cpu", 2, (), whole_host=True)["XLA_FLAGS"] == "--xla_a=1 --xla_b=2"


def test_known_accelerators_have_their_preset():
    assert ray_hosts.fitted("H100", Choice("cuda", 8, 2, 2)) == Cluster.dgx_h100(2)
    assert ray_hosts.fitted("A100", Choice("cuda", 4, 1, 1)) == Cluster.dgx_a100().part(1, 4)
    many = ray_hosts.fitted("V100", Choice("cuda", 16, 1, 1))
    assert many is not None
    assert many.devices_per_host == 16
    assert ray_hosts.fitted("L4", Choice("cuda", 8, 1, 1)) is None


# -------------------------------------------------------------------------------------------- deaths, and what is left


@pytest.mark.parametrize(
    "wait", [RayCluster.wait, lambda session, refs: session.ready(refs, 60.0)], ids=["wait", "ready"]
)
def test_ctrl_c_releases_everything(local: LocalRay, wait: Callable[[RayCluster, list[Any]], Any]):
    session = start(local, num_hosts=1, num_devices=1)
    (worker,) = session.workers(0, 1)
    refs = session.call([worker], "sleep", [(60.0,)])
    threading.Timer(0.5, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        wait(session, refs)
    assert wait_until(lambda: not runs(worker.pid))
    with pytest.raises(ClusterError, match="was stopped by Ctrl-C"):
        session.workers(0, 1)


def test_a_driver_that_is_killed_leaves_no_worker(local: LocalRay):
    """One process waits in a collective for the other, which sleeps."""
    script = f"""
        from alpa_like.runtime.ray_cluster import RayCluster
        session = RayCluster.start(address="{local.address}", num_devices=4, num_hosts=2, body="{BODY}")
        mesh = session.workers(0, 4)
        session.call(mesh[1:], "sleep", [(60.0,)])
        refs = session.call(mesh, "total", [(), ()])
        print(*(worker.pid for worker in mesh), flush=True)
        session.wait(refs)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        pids = [int(word) for word in driver.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(0.5)
        driver.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not any(map(runs, pids)), 20)


def test_a_cluster_of_its_own_ends_with_the_driver(tmp_path_factory: pytest.TempPathFactory):
    script = f"""
        from alpa_like.runtime.ray_cluster import RayCluster
        session = RayCluster.start(address="local", num_devices=2, body="{BODY}")
        print(*session.wait(session.call(session.workers(0, 2), "total", [()])))
    """
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = os.environ | ray_environment(folder, *SHARED)
        command = [sys.executable, "-c", textwrap.dedent(script)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        assert (done.returncode, done.stdout) == (0, "1.0\n"), done.stderr
        assert wait_until(lambda: not processes(folder))


def test_a_dead_process_and_a_lost_host(local: LocalRay):
    session = start(local, num_devices=6, num_hosts=3)
    mesh, other = session.bring_up([(0, 4), (4, 2)])
    session.wait(session.call(mesh, "say", [("I feel fine",), ("I feel sick",)]))
    refs = session.call(other, "sleep", [(60.0,)])
    os.kill(mesh[1].pid, signal.SIGKILL)
    start_s = time.monotonic()
    with pytest.raises(WorkerError, match=r"(?s)^worker 2 of 2 for devices 0 to 3 on host n1.*killed.*\| I feel sick$"):
        session.wait(refs)
    assert time.monotonic() - start_s < 10
    assert isinstance(session.poll_failure(), WorkerError)

    again = session.restart(30)
    assert [host.name for host in again.hosts] == ["n0", "n1", "n2"]
    assert not any(runs(worker.pid) for worker in [*mesh, *other])
    mesh = again.workers(0, 6)
    assert again.wait(again.call(mesh, "total", [()] * 3)) == [15.0] * 3
    refs = again.call(mesh[:1], "sleep", [(60.0,)])
    local.crash("n2")
    with pytest.raises(WorkerError, match=r"worker 3 of 3 for devices 0 to 5 on host n2.*host is gone"):
        again.wait(refs)

    last = again.restart(30)
    assert [host.name for host in last.hosts] == ["n0", "n1"] == [host.name for host in again.survivors()]
    mesh = last.workers(0, 4)
    assert last.wait(last.call(mesh, "total", [(), ()])) == [6.0, 6.0]
    last.stop()
    last.stop()
    assert wait_until(lambda: not any(runs(worker.pid) for worker in mesh))
    with pytest.raises(ClusterError, match="was stopped"):
        last.workers(0, 4)
