"""Drivers that are Ray tasks and actors, several sessions in one process, and what is left when one is interrupted."""

import _thread
import os
import signal
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ray_support import LocalRay, local_ray_cluster, wait_until

import alpa_like as alpa
from alpa_like.errors import ClusterError
from alpa_like.runtime import ray_hosts, session
from alpa_like.runtime.ray_cluster import RayCluster
from alpa_like.runtime.ray_connection import placement_group_table, ray
from benchmarks.ray_local import runs

BODY = "ray_support:Body"


@pytest.fixture(scope="module")
def local() -> Generator[LocalRay]:
    with local_ray_cluster(2, cpus=2) as local:
        yield local


@pytest.fixture
def joined(local: LocalRay) -> Generator[None]:
    """This process is a driver of the cluster, before and after any session."""
    ray.init(local.address, logging_level="WARNING", log_to_driver=False)
    yield
    ray.shutdown()


def groups() -> list[Any]:
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def state() -> list[jax.Array]:
    return [jnp.full((4, 4), 0.1 * i) for i in range(1, 3)]


def step(params: Any, batch: Any) -> Any:
    def loss(params: Any) -> Any:
        return ((jnp.tanh(jnp.tanh(batch @ params[0]) @ params[1]) - 1) ** 2).mean()

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value


def losses(parallel: Any) -> list[float]:
    now, batch, found = state(), np.ones((4, 4), np.float32), []
    for _ in range(3):
        now, loss = parallel(now, batch)
        found.append(float(loss))
    return found


def two_meshes() -> Any:
    stages = alpa.ManualStageOption([[0], [1]], [(1, 1), (1, 1)])
    return alpa.PipeshardParallel(num_micro_batches=2, stage_option=stages, layer_option=alpa.AutoLayerOption(2))


def pids() -> list[int]:
    remote = session.current().remote
    assert isinstance(remote, session.Remote)
    assert isinstance(remote.workers, RayCluster)
    return [worker.pid for mesh in remote.workers.bring_up([(0, 1), (1, 1)]) for worker in mesh]


# ------------------------------------------------------------------------------------------------- inside Ray


def test_a_driver_in_a_task_whose_placement_group_captures_children(joined: None):
    @ray.remote
    def driver() -> Any:
        alpa.init(cluster="ray", num_devices=2)
        found = losses(alpa.parallelize(step, method=two_meshes(), donate_argnums=())), pids()
        alpa.shutdown()
        return *found, ray.get(ray.put("still there"))

    group = ray.util.placement_group([{"CPU": 1}])
    inside = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
        group, placement_group_capture_child_tasks=True
    )
    found, workers, said = ray.get(driver.options(scheduling_strategy=inside).remote())
    np.testing.assert_allclose(found, losses(jax.jit(step)), rtol=1e-5)
    assert said == "still there"
    assert not any(map(runs, workers))
    ray.util.remove_placement_group(group)
    assert wait_until(lambda: not groups())


def test_workers_do_not_take_processes_in_which_jax_runs(local: LocalRay, joined: None):
    @ray.remote(scheduling_strategy="SPREAD")
    def use_jax() -> int:
        time.sleep(1)
        return len(jax.devices()) and os.getpid()

    used = set(ray.get([use_jax.remote() for _ in range(4)]))
    cluster = RayCluster.start(num_devices=4, num_hosts=2, body=BODY)
    assert cluster.cluster.num_devices == 4
    mesh = cluster.workers(0, 4)
    assert cluster.wait(cluster.call(mesh, "total", [(), ()])) == [6.0, 6.0]
    assert not used & {worker.pid for worker in mesh}
    cluster.stop()
    assert ray.is_initialized()


def drive(path: str) -> None:
    """Writes the numbers of its process and its workers, and is busy then."""
    cluster = RayCluster.start(num_devices=2, num_hosts=2, body=BODY)
    mesh = cluster.workers(0, 2)
    Path(path).write_text(" ".join(str(pid) for pid in (os.getpid(), *(worker.pid for worker in mesh))))
    cluster.wait(cluster.call(mesh, "sleep", [(60.0,), (60.0,)]))


class Driver:
    def run(self, path: str) -> None:
        drive(path)


def test_drivers_inside_ray_that_are_killed_give_everything_back(joined: None, tmp_path: Path):
    paths = tmp_path / "task", tmp_path / "actor"
    actor = ray.remote(Driver).remote()  # the handle keeps it alive
    refs = [
        ray.remote(num_cpus=0, max_retries=0)(drive).remote(str(paths[0])),
        actor.run.remote(str(paths[1])),
    ]
    assert wait_until(lambda: all(path.exists() and path.read_text() for path in paths), 60)
    assert len(groups()) == 2
    workers: list[int] = []
    for path in paths:
        driver, *its_workers = map(int, path.read_text().split())
        workers += its_workers
        os.kill(driver, signal.SIGKILL)
    assert wait_until(lambda: not any(map(runs, workers)))
    assert wait_until(lambda: not groups())
    assert wait_until(lambda: ray.available_resources().get("CPU") == 4)
    for ref in refs:
        with pytest.raises(ray.exceptions.RayError):
            ray.get(ref)


def test_a_task_is_told_that_it_holds_what_is_missing(local: LocalRay, joined: None):
    """A task gives its CPUs away while it waits, but not its GPUs."""

    @ray.remote(num_gpus=1)
    def driver() -> str:
        with pytest.raises(ClusterError) as caught:
            RayCluster.start(wait_s=0.5)
        return str(caught.value)

    local.add("gpu", cpus=1, gpus=1)
    said = ray.get(driver.remote())
    assert "0 of the cluster's 1 GPU are free, and this Ray task itself holds 1, which it does not need" in said
    local.crash("gpu")
    assert wait_until(lambda: "GPU" not in ray.cluster_resources() and not groups())


# ------------------------------------------------------------------------------------- one process, many sessions


def test_one_session_after_the_other_of_either_kind(local: LocalRay):
    expected = losses(jax.jit(step))
    parallel = alpa.parallelize(step, method=two_meshes(), donate_argnums=())
    alpa.init(num_devices=2)
    np.testing.assert_allclose(losses(parallel), expected, rtol=1e-5)
    alpa.init(address=local.address, num_devices=2)
    np.testing.assert_allclose(losses(parallel), expected, rtol=1e-5)
    first = pids()
    alpa.init("ray", address=local.address, num_devices=2)
    assert not any(map(runs, first))
    np.testing.assert_allclose(losses(parallel), expected, rtol=1e-5)
    second = pids()
    alpa.shutdown()
    assert not any(map(runs, second))
    assert not ray.is_initialized()
    alpa.init(num_devices=2)
    np.testing.assert_allclose(losses(parallel), expected, rtol=1e-5)
    alpa.shutdown()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wait_s": -1}, "wait_s must be a number of seconds from 0 on, found -1"),
        ({"wait_s": "long"}, "wait_s must be a number of seconds from 0 on, found 'long'"),
        ({"address": 6379}, "address must be host:port .*, found 6379"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str):
    with pytest.raises(ClusterError, match=message):
        alpa.init("ray", **options)


def test_ctrl_c_while_init_waits_for_hosts(local: LocalRay, monkeypatch: pytest.MonkeyPatch):
    state_of = ray_hosts._state  # pyright: ignore[reportPrivateUsage]

    def interrupted(choice: Any) -> str:
        """Asked when hosts are missing, right before it waits."""
        threading.Timer(0.1, _thread.interrupt_main).start()
        return state_of(choice)

    monkeypatch.setattr(ray_hosts, "_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        RayCluster.start(address=local.address, num_hosts=9)
    assert not ray.is_initialized()
