"""Every notebook runs from top to bottom in a new process, and holds the outputs of such a run."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
AT_ONCE = 2
"""Planning and compiling take one core most of the time."""


def run(notebook, folder, measured):
    # 01 plans for this machine: what was measured here once must not decide what is tested.
    figures = shutil.copytree(measured, folder / "figures")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    left_out = ("NPROC", "JAX_NUM_CPU_DEVICES")  # a user has not set them
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    environment |= {"PYTHONPATH": paths, "ALPA_LIKE_CACHE_DIR": str(figures)}
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(ROOT / "tests" / "notebook_worker.py")]
    return subprocess.run(
        [*command, str(notebook)], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=500
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, measured_here):
    """By name, what running a notebook in a folder of its own gives; two run at a time, after what they plan for."""
    pool = ThreadPoolExecutor(AT_ONCE)
    yield {path.stem: pool.submit(run, path, tmp_path_factory.mktemp(path.stem), measured_here) for path in NOTEBOOKS}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_top_to_bottom(name, runs):
    done = runs[name].result()
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_notebook_is_stored_as_it_ran(path):
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert [o["text"] for o in outputs if o.get("name") == "stderr"] == []
    assert path.stat().st_size < 2**20
    assert "/home/" not in path.read_text(encoding="utf-8")


def test_the_notebooks_are_there():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05"]
