"""A Ray cluster of several nodes on this machine, as a program of its own that `benchmarks.ray_support` starts.

    python -m benchmarks.ray_nodes /tmp/folder 3

Nodes are started by a fork, and a process that runs JAX must not fork. So they belong to this process, which imports no
JAX. It starts a head without CPUs and nodes n1, n2, ... with one CPU each, writes a line of JSON when they are up, and
then one for each line that it reads: `add NAME` starts a node, `remove NAME` cleans up after one. All nodes end when
the input ends, so also when the program that started this one is killed. The folder only names this process.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

from benchmarks.ray_local import STORE_BYTES


class Nodes:
    """The cluster, and its nodes with CPUs by name."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "node_name": "head", "include_dashboard": False, "object_store_memory": STORE_BYTES}
        self.cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: dict[str, Any] = {}

    def add(self, name: str) -> dict[str, int]:
        """Start a node; returns the process of its raylet, whose children are all others."""
        node = self.cluster.add_node(num_cpus=1, node_name=name, object_store_memory=STORE_BYTES)
        self._nodes[name] = node
        return {name: node.all_processes["raylet"][0].process.pid}

    def remove(self, name: str) -> dict[str, int]:
        """End what is left of a node."""
        self.cluster.remove_node(self._nodes.pop(name), allow_graceful=False)
        return {}


def main(count: int) -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the program that started this one
    nodes = Nodes()
    try:
        raylets: dict[str, int] = {}
        for number in range(1, count + 1):
            raylets |= nodes.add(f"n{number}")
        _say({"address": nodes.cluster.address, "raylets": raylets})
        for line in sys.stdin:
            verb, name = line.split()
            _say((nodes.add if verb == "add" else nodes.remove)(name))
    finally:
        nodes.cluster.shutdown()


def _say(what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[2]))
