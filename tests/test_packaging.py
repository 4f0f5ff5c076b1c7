"""passes/, runtime/ and models/ are installed as alpa_like.passes, … and never under their short names."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE_DIR: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]
SHORT_NAMES = sorted(folder for package, folder in PACKAGE_DIR.items() if package != folder)


def modules_on_disk():
    """Paths of all modules as a wheel should hold them, `alpa_like/passes/x.py`; links are not followed."""
    found = set()
    for package, folder in PACKAGE_DIR.items():
        for parent, _, files in os.walk(ROOT / folder):
            inside = Path(package.replace(".", "/"), Path(parent).relative_to(ROOT / folder))
            found |= {(inside / name).as_posix() for name in files if name.endswith(".py")}
    return found


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for folder in PACKAGE_DIR.values():
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, "out"], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "out").glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_every_package_folder_is_listed():
    folders = {str(Path(module).parent).replace(os.sep, ".") for module in modules_on_disk()}
    assert folders == set(PYPROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("package", PACKAGE_DIR)
def test_links_and_imports_lead_to_the_mapped_folder(package):
    folder = ROOT / PACKAGE_DIR[package]
    assert (ROOT / package.replace(".", "/")).resolve() == folder
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).resolve() == folder / "__init__.py"


def test_wheel_holds_every_module_under_alpa_like_only(wheel_files):
    tops = {name.split("/")[0] for name in wheel_files}
    assert tops == {"alpa_like", f"alpa_like-{PYPROJECT['project']['version']}.dist-info"}
    assert {name for name in wheel_files if name.endswith(".py")} == modules_on_disk()


def test_wheel_is_typed_and_licensed(wheel_files):
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"]["alpa_like"]
    assert "alpa_like/py.typed" in wheel_files
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in wheel_files)


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_short_name_is_not_importable(name, tmp_path):
    probe = f"import importlib.util; print(importlib.util.find_spec({name!r}))"
    done = subprocess.run([sys.executable, "-P", "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


def test_installed_version_is_the_one_in_pyproject():
    assert importlib.metadata.version("alpa-like") == PYPROJECT["project"]["version"]
