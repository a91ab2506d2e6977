"""The folder of a sweep: its cells, finished one by one, and `sweep.json`, which says what all of them share.

    FOLDER/sweep.json      what every cell is made of beside what the sweep varies; with its own checksum
    FOLDER/.lock           held by the one process that adds cells

What a cell is, a run directory or a file, is the sweep's own affair.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from probe.errors import ArtifactCorrupt, RunDirectoryError
from probe.runs.export import write_file
from probe.runs.files import (
    CHECKSUM,
    FileFault,
    RunLock,
    decode_signed,
    disk_errors,
    encode_signed,
    read_file,
)
from probe.runs.write import remove_temporaries

SHARED = "sweep.json"


@contextmanager
def cell_folder(path: Path, inner: str, option: str) -> Iterator[None]:
    """Only one process adds cells; `inner` is the folder of a sweep whose cells are files.

    Raises RunDirectoryError (another is at work, or this is no sweep: `option` gives another folder) and DiskError.
    """
    refuse_foreign(path, option)
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with RunLock(path):
        remove_temporaries(path, inner)
        yield


def refuse_foreign(path: Path, option: str) -> None:
    """Raises RunDirectoryError for what is there and is no sweep's folder; `option` gives another."""
    foreign = path.exists() and not (path / SHARED).is_file()
    if foreign and (not path.is_dir() or any(name[0] != "." for name in os.listdir(path))):
        raise RunDirectoryError(
            f"{path}: is not empty and holds no sweep; give another directory with {option}"
        )


def read_shared(path: Path) -> dict[str, Any]:
    """What the cells of a folder share; empty where there is no cell yet. Raises ArtifactCorrupt."""
    if not (path / SHARED).is_file():
        return {}
    try:
        return _read(path / SHARED)
    except FileFault as fault:
        raise ArtifactCorrupt(f"{fault}; put it back from a copy, or begin in another directory") from fault


def settle(path: Path, shared: dict[str, Any], option: str) -> None:
    """Write down what the cells of a folder share. Raises as `check_shared`."""
    if not check_shared(path, shared, option):
        write_signed(path / SHARED, shared)


def check_shared(path: Path, shared: dict[str, Any], option: str) -> bool:
    """Whether a folder says what its cells share. Raises RunDirectoryError where that is something else."""
    shared, before = json.loads(json.dumps(shared)), read_shared(path)
    if not before:
        return False
    changed = [key for key in {**before, **shared} if before.get(key) != shared.get(key)]
    if changed:
        what = "; ".join(f"{key} was {before.get(key)!r}, is {shared.get(key)!r}" for key in sorted(changed))
        raise RunDirectoryError(
            f"{path}: was made with another setting ({what}). "
            f"Give the same setting to continue it, or another directory with {option}."
        )
    return True


def write_signed(path: Path, document: dict[str, Any]) -> None:
    """A JSON object with its own checksum, in one rename."""
    write_file(path, encode_signed(document))


def read_signed(path: Path) -> dict[str, Any]:
    """A document without its checksum. One of an earlier version has none. Raises ArtifactCorrupt."""
    try:
        return _read(path)
    except FileFault as fault:
        raise ArtifactCorrupt(f"{fault}; remove it to run it again") from fault


def _read(path: Path) -> dict[str, Any]:
    document = decode_signed(path, read_file(path))
    return {key: value for key, value in document.items() if key != CHECKSUM}
