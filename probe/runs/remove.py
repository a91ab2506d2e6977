"""Removing a run, whole: nothing else that lies in a folder is lost by it."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from probe.errors import RunDirectoryError
from probe.runs.files import (
    CHECKSUMS,
    DERIVED,
    INPUTS,
    LOCK,
    MANIFEST,
    PACKS,
    RUN,
    TASKS,
    TEMPORARY,
    WORKERS,
    RunLock,
    check_directory,
    disk_errors,
    names_in,
)
from probe.runs.layout import foreign_places
from probe.runs.packed import pack_names

_NAMES = {RUN, MANIFEST, TASKS, PACKS, LOCK, WORKERS, CHECKSUMS, *DERIVED, *INPUTS}


def remove_run(path: str | Path) -> int:
    """Remove a run directory; returns the bytes of its files. It is renamed first, so that no half of a run is left.

    Raises RunDirectoryError where it is no run, where a process writes to it, and where it holds what no run does.
    """
    path = Path(path).absolute()  # `.` has no name to put another in place of
    check_directory(path)
    names = names_in(path)
    if RUN not in names:
        raise RunDirectoryError(f"{path}: is no run: it has no {RUN}")
    foreign = [name for name in names if name not in _NAMES and not TEMPORARY.fullmatch(name)]
    if TASKS in names:
        check_directory(path / TASKS)
        foreign += foreign_places(path)
    if PACKS in names:
        packs = pack_names(path)
        inside = [
            name for name in names_in(path / PACKS) if name not in packs and not TEMPORARY.fullmatch(name)
        ]
        foreign += [f"{PACKS}/{name}" for name in inside]
    if foreign:
        raise RunDirectoryError(
            f"{path}: holds {sorted(foreign)[0]!r}, which is no part of a run: move it away first"
        )
    with RunLock(path), disk_errors(path):
        size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
        gone = path.with_name(f".tmp-removed-{uuid.uuid4().hex}")
        os.rename(path, gone)
    with disk_errors(gone):
        shutil.rmtree(gone)
    return size
