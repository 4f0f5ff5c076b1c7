"""What tests/test_checkpoint.py runs in processes of its own: saves that are cut short, and groups of processes."""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import jax


def state(step: int) -> dict[str, Any]:
    """Some 16 MiB that take a moment to write, and tell which step they are of."""
    import jax.numpy as jnp

    return {"w": jnp.arange(1 << 22, dtype=jnp.float32) + step, "step": step}


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def save(moment: str, directory: Path) -> None:
    """Save step 1, then begin step 2 and come to an end at the moment that is asked for."""
    import alpa_like as alpa
    from alpa_like.manifest import Manifest

    alpa.save_checkpoint(directory, state(1), 1).wait()
    patched: Any = Manifest
    write = patched.write
    if moment == "before the manifest":
        patched.write = die
    if moment == "after the manifest":
        patched.write = lambda *args: die(write(*args))
    if moment == "while the older one goes":
        shutil.rmtree = die
    if moment == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    saving = alpa.save_checkpoint(directory, state(2), 2, keep=1)
    if moment == "while writing":
        die()
    if moment not in ("end of the program", "full disk"):
        saving.wait()


def group(address: str, number: int, half: int, before: Path, part: Path, arrays: dict[str, str]) -> None:
    """One of two processes with two devices each: reads half the rows, then writes its shards of a part.

    arrays: their names, and what they are: the rows plus one, the keys, or what the keys draw.
    """
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from alpa_like.manifest import read_manifest
    from alpa_like.runtime.checkpoints import PartWriter, Wanted, read_leaves

    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, 2, number)
    mesh = Mesh(np.array(sorted(jax.devices(), key=lambda d: (d.process_index, d.id))), ("x",))
    split, across, copies = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), (None, "x"), ()))
    saved = {leaf.path: leaf for leaf in read_manifest(before).leaves}
    wanted = [
        Wanted(saved["['rows']"].sources(before, (4 * half, 4 * half + 4)), (4, 8), "float32", across),
        Wanted(saved["['keys']"].sources(before, None), (4,), "key<fry>", split),
        Wanted(saved["['count']"].sources(before, None), (), "int32", copies, weak=True),
    ]
    rows, keys, count = read_leaves(wanted)
    assert not rows.is_fully_addressable
    assert {s.data.shape for s in rows.addressable_shards} == {(4, 2)}
    assert count.weak_type
    assert int(count.addressable_shards[0].data) == 3
    draws = jax.jit(jax.vmap(jax.random.bits), out_shardings=split)(keys)
    made = {"rows": rows + 1, "keys": keys, "draws": draws}
    writer = PartWriter()
    writer.start(str(part), {name: made[what] for name, what in arrays.items()})
    writer.wait()


if __name__ == "__main__":
    _, task, *given = sys.argv
    if task == "save":
        save(given[0], Path(given[1]))
    else:
        group(given[0], int(given[1]), int(given[2]), Path(given[3]), Path(given[4]), json.loads(given[5]))
