"""What is released: one version, and a wheel that holds every file of the package."""

from __future__ import annotations

import email
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import probe

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def test_the_version_to_cite_is_that_of_the_package():
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M) == [probe.__version__]


def test_a_wheel_holds_every_file_of_the_package_and_the_license(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "probe", source / "probe", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = set(wheel.namelist())
        [metadata] = [name for name in packed if name.endswith("/METADATA")]
        about = email.message_from_bytes(wheel.read(metadata))
    files = {path.relative_to(source).as_posix() for path in (source / "probe").rglob("*") if path.is_file()}
    assert "probe/py.typed" in files
    assert {name for name in packed if ".dist-info/" not in name} == files
    assert any(name.endswith("/licenses/LICENSE") for name in packed)
    assert (about["Version"], about["License-Expression"]) == (probe.__version__, "MIT")


def test_the_modules_whose_names_the_package_exports_are_checked_strictly():
    strict = {ROOT / name for name in json.loads((ROOT / "pyrightconfig.json").read_text())["strict"]}
    exported = {Path(inspect.getfile(getattr(probe, name))) for name in probe.__all__}
    assert exported <= strict
    assert all(path.is_file() for path in strict)
