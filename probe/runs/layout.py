"""Where a task lies in a run directory: the only way from an id to a path.

tasks/ab/<hash>/    of the hash ab…: a million tasks are 256 folders of about 3,906
tasks/<hash>/       as runs of schema 1 have it: read, verified and resumed as they are
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from probe.runs.files import (
    DERIVED,
    MANIFEST,
    PACKS,
    RUN,
    TASKS,
    TEMPORARY,
    FileFault,
    check_directory,
    names_in,
    printable,
)

PLACE = r"tasks/(?:[0-9a-f]{2}/)?[0-9a-f]{16}"
"""Pattern of the place of a task's folder."""

_HASH = re.compile(r"[0-9a-f]{16}")
_PREFIX = re.compile(r"[0-9a-f]{2}")


def task_hash(task_id: str) -> str:
    """Name of a task's folder: 16 hexadecimal digits."""
    return hashlib.sha256(printable(task_id).encode()).hexdigest()[:16]


def task_place(task_hash: str) -> str:
    """Where the folder of a task is written, from the run directory on."""
    return f"{TASKS}/{task_hash[:2]}/{task_hash}"


def prefixes(tasks: Path) -> list[Path]:
    """The folder of the tasks and those in it that are named by the first digits of a hash; none where there is none."""
    if not tasks.exists():
        return []
    inside = [tasks / name for name in names_in(tasks) if _PREFIX.fullmatch(name)]
    return [tasks, *(folder for folder in inside if folder.is_dir() and not folder.is_symlink())]


def version_of(run: Path) -> str:
    """A word that changes when a task, a table or the report of a run does; read from the times of its files alone."""
    watched = [*(run / name for name in (RUN, MANIFEST, PACKS, *DERIVED)), *prefixes(run / TASKS)]
    facts: list[tuple[str, int, int]] = []
    for path in watched:
        with suppress(OSError):
            info = os.stat(path)
            facts.append((path.name, info.st_mtime_ns, info.st_size))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def temporaries(run: Path) -> list[str]:
    """What interrupted writes left among the tasks of a run."""
    return [
        (folder / name).relative_to(run).as_posix()
        for folder in prefixes(run / TASKS)
        for name in names_in(folder)
        if TEMPORARY.fullmatch(name)
    ]


def task_places(run: Path) -> dict[str, str]:
    """Hash → place of every committed folder, sorted by hash. Raises a Fault where one task has two."""
    if not os.path.lexists(run / TASKS) and os.path.lexists(run / PACKS):
        return {}  # all are packed, and what carried the run elsewhere took no empty folder
    check_directory(run / TASKS)
    places: dict[str, str] = {}
    for name in names_in(run / TASKS):
        if _PREFIX.fullmatch(name):
            check_directory(run / TASKS / name)
            inside = [
                (inner, f"{TASKS}/{name}/{inner}")
                for inner in names_in(run / TASKS / name)
                if _HASH.fullmatch(inner) and inner.startswith(name)
            ]
        else:
            inside = [(name, f"{TASKS}/{name}")] if _HASH.fullmatch(name) else []
        for task, place in inside:
            if task in places:
                raise FileFault(run / place, "extra", f"the task lies in {places[task]} too")
            places[task] = place
    return dict(sorted(places.items()))


def foreign_places(run: Path) -> list[str]:
    """What lies among the tasks of a run and is neither a task's folder nor left by an interrupted write."""
    foreign: list[str] = []
    for name in names_in(run / TASKS) if os.path.lexists(run / TASKS) else ():
        folder = run / TASKS / name
        if TEMPORARY.fullmatch(name):
            continue
        if _PREFIX.fullmatch(name) and folder.is_dir() and not folder.is_symlink():
            foreign += [
                f"{TASKS}/{name}/{inner}"
                for inner in names_in(folder)
                if not (_HASH.fullmatch(inner) and inner.startswith(name)) and not TEMPORARY.fullmatch(inner)
            ]
        elif not _HASH.fullmatch(name):
            foreign.append(f"{TASKS}/{name}")
    return foreign


def find_task(run: Path, task_id: str) -> str:
    """Place of a task's folder, whichever layout the run has; where it is written when there is none yet. It may be in a pack instead."""
    name = task_hash(task_id)
    flat = f"{TASKS}/{name}"
    return flat if not (run / task_place(name)).exists() and (run / flat).exists() else task_place(name)
