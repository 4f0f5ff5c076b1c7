"""Transfers between processes: what one mesh range sends arrives bit-equal on another, over real sockets."""

import math
import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alpa_like
from alpa_like.errors import ProgramError
from alpa_like.reshard import Layout, Transfer, plan_transfer
from alpa_like.runtime.remote_transport import ProcessMap, RemoteReceiver, RemoteSender, TransferServer, uuids_needed
from alpa_like.runtime.transport import sharding_of

ANSWER_S = 60
# name of a mesh range: processes, devices in each
RANGES = {"one": (1, 4), "other": (1, 4), "two": (2, 2), "pair": (2, 2)}


def layout(text: str) -> Layout:
    """`2x2@4:x,-` is a mesh of axes x and y on devices 4 to 7 that splits dim 0 over x."""
    mesh, first, spec = text.replace("@", ":").split(":")
    sizes = tuple(map(int, mesh.split("x")))
    names = tuple("xyz"[: len(sizes)])
    axes = tuple(tuple(names.index(n) for n in dim if n != "-") for dim in spec.split(",") if dim)
    return Layout(sizes, names, (int(first), math.prod(sizes)), axes)


# (from, to, shape, dtype, source, target)
TABLE = [
    # one process to one
    ("one", "other", (8, 6), "float32", "4@0:x,-", "4@4:x,-"),
    ("one", "other", (8, 6), "float32", "4@0:x,-", "2@4:-,x"),
    ("one", "other", (12, 5), "float32", "3@0:x,-", "2@4:x,-"),
    ("one", "other", (7, 5), "float32", "3@0:-,-", "2@4:-,-"),
    ("one", "other", (6, 5), "float32", "2@0:x,-", "3@4:x,-"),
    ("one", "other", (7, 3), "bfloat16", "1@0:-,-", "4@4:-,-"),
    ("one", "other", (4, 4), "float32", "2x2@0:x,y", "1@4:-,-"),
    ("one", "other", (), "float32", "4@0:", "3@4:"),
    ("one", "other", (4, 0), "float32", "4@0:x,-", "2x2@4:x,-"),
    ("one", "other", (0, 8), "int4", "4@0:-,-", "4@4:-,x"),
    ("one", "other", (5, 7), "int4", "1@0:-,-", "1@4:-,-"),
    ("one", "other", (3, 7), "uint4", "3@0:x,-", "2@4:-,-"),
    ("one", "other", (7,), "float4_e2m1fn", "2@0:-", "2@4:-"),
    ("one", "other", (9,), "bool", "3@0:x", "4@4:-"),
    ("one", "other", (3, 5), "complex64", "3@0:x,-", "2@4:-,-"),
    ("one", "other", (3,), "key<fry>", "3@0:x", "2@4:-"),
    ("one", "other", (), "key<fry>", "1@0:", "1@4:"),
    # one process to two, and back
    ("one", "two", (8, 6), "float32", "2@0:x,-", "2x2@4:x,y"),
    ("one", "two", (8, 6), "float32", "4@0:x,-", "4@4:x,-"),
    ("one", "two", (7, 5), "int8", "2@0:-,-", "4@4:-,-"),
    ("one", "two", (12, 7), "bfloat16", "3@0:x,-", "2x2@4:y,-"),
    ("one", "two", (), "int32", "1@0:", "4@4:"),
    ("one", "two", (4, 3), "int4", "2@0:x,-", "4@4:x,-"),
    ("one", "two", (4,), "key<fry>", "2@0:x", "2x2@4:x"),
    ("one", "two", (0, 8), "float32", "1@0:-,-", "4@4:-,x"),
    ("two", "one", (8, 6), "float32", "2x2@0:x,y", "2@4:x,-"),
    ("two", "one", (8, 6), "float32", "4@0:x,-", "2@4:-,x"),
    ("two", "one", (7, 5), "float32", "4@0:-,-", "3@4:-,-"),
    ("two", "one", (8, 3), "bool", "4@0:x,-", "1@4:-,-"),
    ("two", "one", (4, 3), "key<fry>", "4@0:x,-", "3@4:-,x"),
    # two processes to two
    ("two", "pair", (8, 6), "float32", "4@0:x,-", "4@4:x,-"),
    ("two", "pair", (8, 8), "bfloat16", "2x2@0:x,y", "2x2@4:y,x"),
    ("two", "pair", (8, 6), "float32", "2x2@0:yx,-", "2x2@4:-,x"),
    ("two", "pair", (7, 5), "float32", "4@0:-,-", "4@4:-,-"),
    ("two", "pair", (8, 5), "float16", "2x2@0:y,-", "4@4:x,-"),
    ("two", "pair", (4, 4), "uint4", "2x2@0:x,y", "4@4:x,-"),
    ("two", "pair", (), "float32", "4@0:", "2x2@4:"),
    # device numbers that both ranges have, in other processes
    ("one", "two", (8, 12), "float32", "4@0:x,-", "4@2:x,-"),
    ("one", "two", (8, 12), "float32", "4@0:-,-", "4@3:x,-"),
    ("two", "one", (8, 12), "float32", "4@0:x,-", "3@1:-,x"),
    ("two", "pair", (8, 12), "float32", "4@0:x,-", "4@2:-,x"),
]


class Worker:
    """A process of tests/transfer_worker.py. Every answer has a time limit; a process that exceeds it is ended."""

    def __init__(self, devices: int, processes: int, me: int, coordinator: str) -> None:
        script = Path(__file__).with_name("transfer_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), *map(str, (devices, processes, me)), coordinator],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(alpa_like.__file__).parents[1]), "NPROC": "32"},
        )
        self._answers: queue.Queue[tuple[bool, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self._answers.put(pickle.load(self.process.stdout))
            except EOFError:
                return self._answers.put((False, "the process is gone"))

    def ask(self, name: str, arguments: dict[str, Any]) -> None:
        pickle.dump((name, arguments), self.process.stdin)
        self.process.stdin.flush()

    def answer(self) -> tuple[bool, Any]:
        try:
            return self._answers.get(timeout=ANSWER_S)
        except queue.Empty:
            self.process.kill()
            return False, f"no answer in {ANSWER_S} s"

    def end(self) -> None:
        self.process.wait(ANSWER_S)
        self._reader.join(ANSWER_S)
        self.process.stdin.close()
        self.process.stdout.close()


class Range:
    """The processes of a mesh range, which are all told the same."""

    def __init__(self, processes: int, devices: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        self.devices = devices
        self.addresses: tuple[str, ...] = ()
        self.workers = [Worker(devices, processes, me, coordinator) for me in range(processes)]

    def __call__(self, name: str, **arguments: Any) -> list[Any]:
        for worker in self.workers:
            worker.ask(name, arguments)
        return self.answers()

    def answers(self) -> list[Any]:
        answers = [worker.answer() for worker in self.workers]
        for fine, result in answers:
            if not fine:
                raise WorkerError(result)
        return [result for _, result in answers]

    def processes(self, layout: Layout) -> ProcessMap:
        return ProcessMap(layout.devices[0], self.devices, self.addresses)


class WorkerError(Exception):
    """What went wrong in a worker."""


@pytest.fixture(scope="module")
def ranges() -> Iterator[dict[str, Range]]:
    started = {name: Range(*sizes) for name, sizes in RANGES.items()}
    try:
        for each in started.values():
            each.addresses = tuple(each.answers())
        yield started
    finally:
        workers = [worker for each in started.values() for worker in each.workers]
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.end()


unused = count(2**62)
"""uuids that no transfer had yet, almost as high as they get."""


def fresh(needed: int) -> int:
    first, *_ = islice(unused, max(1, needed))
    return first


def connect(source: Range, target: Range, transfer: Transfer, dtype: str) -> int:
    """Make both halves of a transfer; how many uuids each use needs."""
    here, there = source.processes(transfer.source), target.processes(transfer.target)
    with ThreadPoolExecutor(2) as pool:
        halves = [
            pool.submit(source, "sender", transfer=transfer, dtype=dtype, targets=there),
            pool.submit(target, "receiver", transfer=transfer, dtype=dtype, sources=here),
        ]
    for half in halves:
        half.result()
    return uuids_needed(transfer, here, there)


def planned(shape: tuple[int, ...], source: str, target: str) -> Transfer:
    return plan_transfer(shape, 4, layout(source), layout(target))


def truth(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Values that differ from place to place, as far as the dtype can tell them apart."""
    if dtype.startswith("key"):
        return np.asarray(jax.random.key_data(jax.random.split(jax.random.key(7), shape)))
    numbers = np.arange(math.prod(shape)).reshape(shape) * 7 % 13
    return (numbers % 2 == 0) if dtype == "bool" else numbers.astype(jnp.dtype(dtype))


def check(answers: list[Any], value: np.ndarray, dtype: str, goal: Layout) -> None:
    """Every process has the right tiles, and there are as many as the target has devices."""
    tiles = [tile for _, shards in answers for tile in shards]
    assert len(tiles) == goal.devices[1]
    for found, shards in answers:
        assert found == dtype
        for index, tile in shards:
            expected = value[index]
            assert tile.dtype == expected.dtype
            assert tile.shape == expected.shape
            assert tile.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("names", "shape", "dtype", "source", "target"),
    [pytest.param((a, b), *rest, id=f"{a}-{b}-{rest[1]}-{rest[2]}-{rest[3]}") for a, b, *rest in TABLE],
)
def test_arrives(
    ranges: dict[str, Range],
    names: tuple[str, str],
    shape: tuple[int, ...],
    dtype: str,
    source: str,
    target: str,
) -> None:
    """The sender's value is overwritten before the receiver asks for it: what travels must be a copy."""
    here, there = (ranges[name] for name in names)
    transfer, value = planned(shape, source, target), truth(shape, dtype)
    base = fresh(connect(here, there, transfer, dtype))
    here("send", value=value, layout=transfer.source, dtype=dtype, base=base)
    check(there("receive", base=base), value, dtype, transfer.target)


def test_the_table_has_all_kinds_of_transfers() -> None:
    """Between two processes and two: messages of every pair, and programs on both sides with collectives or without."""
    moves = [planned(shape, a, b) for here, there, shape, _, a, b in TABLE if (here, there) == ("two", "pair")]
    pairs = {(s // 2, t // 2) for move in moves if not move.target.devices[0] % 4 for _, s, t in move.sends}
    assert pairs == {(0, 2), (0, 3), (1, 2), (1, 3)}
    assert {move.gather for move in moves} == {"none", "replicas", "mesh"}
    assert {move.sending == move.source for move in moves} == {True, False}


def test_many_steps_arrive_in_any_order(ranges: dict[str, Range]) -> None:
    transfer = planned((8, 6), "4@0:x,-", "2x2@4:x,-")
    needed = connect(ranges["two"], ranges["pair"], transfer, "float32")
    bases = [fresh(needed) for _ in range(100)]
    seconds = ranges["two"]("send_steps", layout=transfer.source, bases=bases)
    sums = ranges["pair"]("receive_steps", bases=bases[::-1])
    assert sums == [[48.0 * step for step in reversed(range(100))]] * 2
    assert max(seconds) < ANSWER_S / 3, "sends must not wait for the receiver"


def test_a_receive_does_not_wait(ranges: dict[str, Range]) -> None:
    transfer, value = planned((8, 6), "2@0:x,-", "2@4:-,x"), truth((8, 6), "float32")
    base = fresh(connect(ranges["one"], ranges["other"], transfer, "float32"))
    assert ranges["other"]("expect", base=base)[0] < ANSWER_S / 3
    assert ranges["other"]("expected", wait=False) == [(False, [])]
    ranges["one"]("send", value=value, layout=transfer.source, dtype="float32", base=base)
    shards = ranges["other"]("expected", wait=True)[0][1]
    check([("float32", shards)], value, "float32", transfer.target)


def test_an_unusual_memory_layout_is_refused(ranges: dict[str, Range]) -> None:
    """Its bytes would be taken for those of another matrix."""
    transfer, value = planned((8, 6), "2@0:x,-", "2@4:x,-"), truth((8, 6), "float32")
    base = fresh(connect(ranges["one"], ranges["other"], transfer, "float32"))
    with pytest.raises(WorkerError, match="layout"):
        ranges["one"]("send_transposed", value=value, layout=transfer.source, base=base)


@pytest.mark.parametrize(
    ("dtype", "before", "after"),
    [
        ("float32", "4@0:x,-", "2x2@0:-,y"),
        ("int4", "4@0:x,-", "4@0:-,-"),
        ("key<fry>", "4@0:x,-", "4@0:-,x"),
    ],
)
def test_layouts_change_inside_a_range(ranges: dict[str, Range], dtype: str, before: str, after: str) -> None:
    transfer, value = planned((4, 8), before, after), truth((4, 8), dtype)
    answers = ranges["two"]("reshard", value=value, transfer=transfer, dtype=dtype)
    check(answers, value, dtype, transfer.target)


@pytest.fixture(scope="module")
def server() -> TransferServer:
    return TransferServer("127.0.0.1")


def test_every_pair_of_processes_has_its_own_number() -> None:
    transfer, addresses = planned((8, 6), "2@0:x,-", "4@4:x,-"), ("127.0.0.1:1", "127.0.0.1:2")
    here, there = ProcessMap(0, 2, addresses[:1]), ProcessMap(4, 2, addresses)
    server = mock.Mock(spec=TransferServer)
    send = RemoteSender(server, transfer, jax.devices(), jnp.float32, there)
    send(jax.device_put(np.zeros((8, 6), np.float32), sharding_of(transfer.source, jax.devices())), 70)
    assert [(uuid, len(pieces)) for uuid, pieces in (call.args for call in server.offer.mock_calls)] == [
        (70, 2),
        (71, 2),
    ]
    assert uuids_needed(transfer, here, there) == 2
    assert uuids_needed(transfer, replace(here, devices_per_process=1, addresses=addresses), there) == 4
    assert uuids_needed(planned((0, 6), "2@0:x,-", "4@4:x,-"), here, there) == 0


class TestErrors:
    """In this process alone: nothing is sent."""

    transfer = planned((8, 6), "2@0:x,-", "2@4:-,x")
    there = ProcessMap(4, 2, ("127.0.0.1:1",))

    def test_wrong_values(self, server: TransferServer) -> None:
        send = RemoteSender(server, self.transfer, jax.devices(), jnp.float32, self.there)
        lies = sharding_of(self.transfer.source, jax.devices())
        for value, found in [
            (jax.device_put(np.zeros((8, 6), np.int32), lies), "int32"),
            (jax.device_put(np.zeros((8, 4), np.float32), lies), "8, 4"),
            (jnp.zeros((8, 6), jnp.float32), "SingleDeviceSharding"),
        ]:
            with pytest.raises(ProgramError, match=found):
                send(value, 0)

    def test_wrong_keys(self, server: TransferServer) -> None:
        transfer = planned((2,), "2@0:x", "2@4:-")
        send = RemoteSender(server, transfer, jax.devices(), jax.random.key(0).dtype, self.there)
        keys = jax.device_put(
            jax.random.split(jax.random.key(0, impl="rbg"), 2), sharding_of(transfer.source, jax.devices())
        )
        with pytest.raises(ProgramError, match="rbg"):
            send(keys, 0)

    def test_the_same_devices(self, server: TransferServer) -> None:
        same = replace(self.transfer, target=self.transfer.source, sends=())
        with pytest.raises(ProgramError, match="compile_reshard"):
            RemoteSender(server, same, jax.devices(), jnp.float32, replace(self.there, first=0))

    def test_processes_of_another_mesh(self, server: TransferServer) -> None:
        with pytest.raises(ProgramError, match="4 to 5, but the processes to exchange with have 2 to 3"):
            RemoteSender(server, self.transfer, jax.devices(), jnp.float32, replace(self.there, first=2))
        with pytest.raises(ProgramError, match="0 to 1, but"):
            RemoteReceiver(server, self.transfer, jax.devices(), jnp.float32, self.there)

    def test_a_dead_process_does_not_matter_before_the_first_pull(self, server: TransferServer) -> None:
        RemoteReceiver(server, self.transfer, jax.devices(), jnp.float32, replace(self.there, first=0))
        assert server.connect("127.0.0.1:1") is server.connect("127.0.0.1:1")
