"""Ray clusters of several nodes on this machine, for benchmarks and tests: their environment and their processes.

Imports neither JAX nor Ray, so that it can be imported before both, and in a process that forks.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

__all__ = ["STORE_BYTES", "parent", "processes", "ray_environment", "ray_folder", "runs"]

STORE_BYTES = 80 * 2**20
"""Ray's object store of a node; Ray asks for at least 75 MiB."""


def ray_environment(folder: str, *paths: Path) -> dict[str, str]:
    """What Ray's processes are started with: on this machine only, apart from others, quick to notice a lost node.

    Workers import what is in `paths`.
    """
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # read by Ray as: no other machines, so all is on 127.0.0.1
        "RAY_TMPDIR": folder,
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [*map(str, paths), os.environ.get("PYTHONPATH", "")])),
    }


@contextmanager
def ray_folder(*paths: Path) -> Generator[str]:
    """A folder for all that a cluster writes; in the context new processes of Ray have its environment.

    It must be entered before Ray is imported.
    """
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()  # where Ray's Cluster writes its address
        with mock.patch.dict(os.environ, ray_environment(folder, *paths)):
            os.environ.pop("RAY_ADDRESS", None)
            yield folder


def processes(folder: str) -> dict[int, str]:
    """The command lines of the processes of a cluster by id. They, or the files they write to, name its folder."""
    found: dict[int, str] = {}
    for place in Path("/proc").iterdir():
        if not place.name.isdecimal() or int(place.name) == os.getpid():
            continue
        with suppress(OSError):
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
            if folder in command or os.readlink(place / "fd" / "2").startswith(folder):
                found[int(place.name)] = command
    return found


def runs(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    return _status(pid)[:1] not in ((), ("Z",))


def parent(pid: int) -> int:
    """The process that started this one, 0 if it is gone."""
    status = _status(pid)
    return int(status[1]) if status else 0


def _status(pid: int) -> tuple[str, ...]:
    """State, parent, and so on; nothing where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    return tuple(text.rpartition(")")[2].split())
