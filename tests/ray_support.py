"""A Ray cluster of several nodes on this machine, for tests, and a small body for its workers."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ray_local import STORE_BYTES, ray_folder

SHARED = (Path(__file__).parent, Path(__file__).parents[1])
"""Where processes of Ray find this module, and what it imports."""


@dataclass
class LocalRay:
    """`address` to join, `nodes` by name as Ray's `Cluster` returned them, and the variables that were set."""

    address: str
    nodes: dict[str, Any]
    cluster: Any

    def add(self, name: str, cpus: int, gpus: int = 0) -> None:
        has = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": STORE_BYTES}
        with forks_allowed():
            self.nodes[name] = self.cluster.add_node(node_name=name, **has)

    def crash(self, name: str) -> None:
        """What the end of a machine looks like to the others: nothing says goodbye."""
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)


@contextmanager
def forks_allowed() -> Generator[None]:
    """JAX warns of forks once it has started, but what Ray forks turns into another program at once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        yield


@contextmanager
def local_ray_cluster(nodes: int, cpus: int = 1) -> Generator[LocalRay]:
    """`nodes` nodes `n0`, `n1`, ... on 127.0.0.1, with `cpus` CPUs each to Ray, that end with the context.

    Ray's environment is set in the context. It must be entered before Ray is imported.
    """
    with ray_folder(*SHARED):
        local = _started(nodes, cpus)
        try:
            yield local
        finally:
            _end(local.cluster)


def _started(nodes: int, cpus: int) -> LocalRay:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": cpus, "node_name": "n0", "include_dashboard": False, "object_store_memory": STORE_BYTES}
    with forks_allowed():
        cluster = Cluster(initialize_head=True, head_node_args=head)
    local = LocalRay(cluster.address, {"n0": cluster.head_node}, cluster)
    try:
        for i in range(1, nodes):
            local.add(f"n{i}", cpus)
    except BaseException:
        _end(cluster)
        raise
    return local


def _end(cluster: Any) -> None:
    import ray

    if ray.is_initialized():
        ray.shutdown()
    cluster.shutdown()


def wait_until(happened: Any, seconds: float = 10.0) -> bool:
    """Whether `happened()` became true in time."""
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(happened())


class Body:
    """What workers do in the tests of `RayCluster`."""

    def __init__(self, setup: Any) -> None:
        self._setup = setup
        self._seen: list[Any] = []

    def setup(self) -> Any:
        return self._setup

    def total(self) -> float:
        """The sum of the devices' numbers in the cluster, by an all-reduce over all devices of the mesh."""
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        mesh, spec = Mesh(np.array(devices), ("x",)), PartitionSpec("x")
        numbers = np.arange(self._setup.first, self._setup.first + self._setup.count, dtype=np.float32)
        split = jax.make_array_from_callback(numbers.shape, NamedSharding(mesh, spec), lambda index: numbers[index])
        add = jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
        return float(jax.jit(add)(split)[0])

    def note(self, value: Any, seconds: float = 0.0) -> list[Any]:
        time.sleep(seconds)
        self._seen.append(value)
        return list(self._seen)

    def seen(self) -> list[Any]:
        return list(self._seen)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def fail(self, error: Exception) -> None:
        raise error
