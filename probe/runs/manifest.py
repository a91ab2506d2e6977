"""What is committed in a run directory, and the manifest that lists it.

The manifest names every file with its size and checksum and carries a checksum of itself, so that a damaged
manifest is told from a damaged file.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from probe.runs.files import (
    CHECKSUMS,
    DERIVED,
    MANIFEST,
    RECORD,
    RUN,
    SCHEMA,
    TASKS,
    TENSORS,
    FileEntry,
    FileFault,
    check_directory,
    checksum_file,
    decode_json,
    encode_json,
    is_task_directory,
    names_in,
    printable,
    read_file,
    read_json,
    task_directory,
)

_LISTABLE = re.compile(r"(tasks/[0-9a-f]{16}/)?[a-z0-9][a-z0-9_.-]*")


class TaskDirectory(NamedTuple):
    """One task directory."""

    id: str
    status: str
    files: dict[str, FileEntry]
    """By file name, checksums.json included."""


def task_directories(run: Path) -> list[str]:
    """Names of the committed task directories, sorted."""
    check_directory(run / TASKS)
    return [name for name in names_in(run / TASKS) if is_task_directory(name)]


def read_checksums(directory: Path) -> dict[str, FileEntry]:
    """The sizes and checksums that checksums.json of a task directory holds."""
    path = directory / CHECKSUMS
    data = read_file(path)
    content = decode_json(path, data)
    try:
        entries = {name: FileEntry(**entry) for name, entry in content.items()}
    except TypeError as error:
        raise FileFault(path, "altered", str(error)) from error
    if sorted(entries) != [RECORD, TENSORS] or encode_checksums(entries) != data:
        raise FileFault(path, "altered", "not as it was written")
    return entries


def encode_checksums(entries: dict[str, FileEntry]) -> bytes:
    return encode_json({name: entries[name]._asdict() for name in sorted(entries)})


def compare(path: Path, expected: FileEntry, source: str) -> None:
    """Raise a Fault unless the file has the size and checksum that `source` gives."""
    actual = checksum_file(path)
    if actual.bytes < expected.bytes:
        raise FileFault(path, "truncated", f"{actual.bytes} of the {expected.bytes} bytes in {source}")
    if actual.bytes > expected.bytes:
        raise FileFault(path, "altered", f"{actual.bytes} bytes, {expected.bytes} in {source}")
    if actual != expected:
        raise FileFault(path, "altered", f"its checksum is not the one in {source}")


def read_record(directory: Path) -> dict[str, Any]:
    """record.json of a task directory, its id checked against the directory's name."""
    path = directory / RECORD
    record = read_json(path)
    task_id, status = record.get("id"), record.get("status")
    if not isinstance(task_id, str) or not isinstance(status, str):
        raise FileFault(path, "altered", "no id or no status")
    if task_directory(task_id) != directory.name:
        raise FileFault(
            path, "altered", f"is of task {task_id!r}, which belongs in {task_directory(task_id)}"
        )
    return record


def committed_task(directory: Path) -> TaskDirectory:
    """Check every byte of a task directory. Raises a Fault that names the first damaged file."""
    check_directory(directory)
    for name in names_in(directory):
        if name not in (RECORD, TENSORS, CHECKSUMS):
            raise FileFault(directory / name, "extra")
    entries = read_checksums(directory)
    for name, entry in entries.items():
        compare(directory / name, entry, CHECKSUMS)
    record = read_record(directory)
    return TaskDirectory(
        record["id"], record["status"], entries | {CHECKSUMS: checksum_file(directory / CHECKSUMS)}
    )


def build_manifest(
    path: Path, run: dict[str, Any], tasks: list[TaskDirectory], closed: bool
) -> dict[str, Any]:
    """List the run `path`; `closed` says that nobody is writing to it any more.

    `complete` is true when it is closed and every task of run.json's `task_ids` is committed.
    """
    ids = [task.id for task in tasks]
    wanted = wanted_ids(run)
    directories = {task.id: f"{TASKS}/{task_directory(task.id)}" for task in tasks}
    files = {f"{directories[task.id]}/{name}": entry for task in tasks for name, entry in task.files.items()}
    for name in (RUN, *DERIVED):
        if os.path.lexists(path / name):
            files[name] = checksum_file(path / name)
    return {
        "schema": SCHEMA,
        "run": run.get("id"),
        "status": run.get("status"),
        "complete": closed and set(wanted) <= set(ids),
        "n_tasks": len(tasks),
        "counts": dict(sorted(Counter(task.status for task in tasks).items())),
        "tasks": {task_id: directories[task_id] for task_id in in_order(ids, wanted)},
        "files": listing(files),
    }


def in_order(ids: list[str], wanted: list[str]) -> list[str]:
    """`ids` in the order of the task file, those it does not name last and sorted."""
    place = {task_id: number for number, task_id in enumerate(wanted)}
    return sorted(ids, key=lambda task_id: (place.get(task_id, len(place)), task_id))


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """One JSON line that ends with the checksum of the line without it."""
    content = {key: value for key, value in manifest.items() if key != "blake3"}
    return encode_json(content | {"blake3": blake3(encode_json(content)).hexdigest()})


def read_manifest(path: Path) -> dict[str, Any] | None:
    """manifest.json of the run directory `path`, None where there is none; a Fault when it is damaged."""
    name = path / MANIFEST
    try:
        data = read_file(name)
    except FileFault as fault:
        if fault.kind == "missing":
            return None
        raise
    manifest = decode_json(name, data)
    if encode_manifest(manifest) != data:
        raise FileFault(name, "altered", "its own checksum differs")
    return manifest


def listed_files(path: Path, manifest: dict[str, Any]) -> dict[str, FileEntry]:
    """The files that the manifest of run `path` lists. A name that would leave the directory is a Fault."""
    try:
        files = {entry["path"]: FileEntry(entry["bytes"], entry["blake3"]) for entry in manifest["files"]}
        bad = [name for name in files if not _LISTABLE.fullmatch(name)]
    except (KeyError, TypeError) as error:
        raise FileFault(path / MANIFEST, "altered", f"files: {type(error).__name__} {error}") from error
    if bad:
        raise FileFault(path / MANIFEST, "altered", f"lists {bad[0]!r}")
    return files


def listing(files: dict[str, FileEntry]) -> list[dict[str, Any]]:
    """The manifest's `files`, sorted by path."""
    return [{"path": name, **files[name]._asdict()} for name in sorted(files)]


def wanted_ids(run: dict[str, Any]) -> list[str]:
    """The ids that run.json says belong to the run, in task-file order; empty where it does not say."""
    ids = run.get("task_ids")
    return (
        [printable(task_id) for task_id in ids if isinstance(task_id, str)] if isinstance(ids, list) else []
    )
