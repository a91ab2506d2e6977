"""What is committed in a run directory, and the manifest that lists it.

The manifest names every file with its size and checksum and carries a checksum of itself, so that a damaged
manifest is told from a damaged file.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from probe.runs.files import (
    CHECKSUM,
    CHECKSUMS,
    DERIVED,
    ENDED,
    INPUTS,
    MANIFEST,
    RECORD,
    RUN,
    SCHEMA,
    TENSORS,
    FileEntry,
    FileFault,
    check_directory,
    checksum_file,
    decode_json,
    decode_signed,
    encode_json,
    encode_signed,
    entry_of,
    is_signed,
    names_in,
    printable,
    read_file,
    read_run_json,
    replace_file,
    sync_directory,
)
from probe.runs.layout import PLACE, task_hash, task_place

_LISTABLE = rf"(?:(?:{PLACE}|packs/[0-9a-f]{{16}})/)?[a-z0-9][a-z0-9_.-]*"
_ALL_LISTABLE = re.compile(rf"(?:{_LISTABLE}\n)*")


ABSENT = FileEntry(0, "")
"""Stands for a file that is not there yet."""


class TaskDirectory(NamedTuple):
    """One task directory."""

    id: str
    status: str
    files: dict[str, FileEntry]
    """By file name, checksums.json included."""
    place: str
    """From the run directory on."""


class PackedTasks(Protocol):
    """What the manifest says of a pack."""

    name: str
    n_tasks: int
    counts: dict[str, int]

    def statuses(self) -> dict[str, str]: ...
    def entries(self) -> dict[str, FileEntry]: ...


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
    compare_entry(path, checksum_file(path), expected, source)


def compare_entry(path: Path, actual: FileEntry, expected: FileEntry, source: str) -> None:
    """Raise a Fault unless the two are equal; `path` is the file whose size and checksum `actual` is."""
    if actual.bytes < expected.bytes:
        raise FileFault(path, "truncated", f"{actual.bytes} of the {expected.bytes} bytes in {source}")
    if actual.bytes > expected.bytes:
        raise FileFault(path, "altered", f"{actual.bytes} bytes, {expected.bytes} in {source}")
    if actual != expected:
        raise FileFault(path, "altered", f"its checksum is not the one in {source}")


def read_record(directory: Path, expected: FileEntry | None = None) -> dict[str, Any]:
    """record.json of a task directory, its id checked against the directory's name, its bytes against `expected`."""
    path = directory / RECORD
    data = read_file(path)
    if expected is not None:
        compare_entry(path, entry_of(data), expected, CHECKSUMS)
    return check_record(path, decode_json(path, data), directory.name)


_DIGITS = re.compile(rb"[0-9]{33}")
"""In every 128th byte of a record: a number of more than 4,300 digits leaves so many behind each other."""


class _RecordHead(msgspec.Struct):
    id: Any = None
    status: Any = None
    kind: Any = ""


def check_record_bytes(path: Path, data: bytes, expected: str) -> tuple[str, str]:
    """Id and status of the record in `data`; the rest is looked through, and no object is made of it. Raises as `check_record`."""
    try:
        data.decode()  # texts that are passed over are not looked at
        if _DIGITS.search(
            data[::128]
        ):  # maybe an integer of so many digits that readers refuse it: above 4,300
            record = check_record(path, decode_json(path, data), expected)
        else:
            head = msgspec.json.decode(data, type=_RecordHead)
            record = check_record(path, {"id": head.id, "status": head.status, "kind": head.kind}, expected)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        record = check_record(path, decode_json(path, data), expected)
    return record["id"], record["status"]


def check_record(path: Path, record: dict[str, Any], expected: str) -> dict[str, Any]:
    """A record that has an id, a status and a kind and is of the task whose hash is `expected`. Raises a Fault."""
    task_id, status = record.get("id"), record.get("status")
    if not (isinstance(task_id, str) and isinstance(status, str) and isinstance(record.get("kind", ""), str)):
        raise FileFault(path, "altered", "no id, no status or no kind")
    if (name := task_hash(task_id)) != expected:
        raise FileFault(path, "altered", f"is of task {task_id!r}, which belongs in {task_place(name)}")
    return record


def committed_task(run: Path, place: str) -> TaskDirectory:
    """Check every byte of a task directory. Raises a Fault that names the first damaged file."""
    directory = run / place
    check_directory(directory)
    for name in names_in(directory):
        if name not in (RECORD, TENSORS, CHECKSUMS):
            raise FileFault(directory / name, "extra")
    entries = read_checksums(directory)
    for name, entry in entries.items():
        compare(directory / name, entry, CHECKSUMS)
    record = read_record(directory)
    return TaskDirectory(
        record["id"],
        record["status"],
        entries | {CHECKSUMS: checksum_file(directory / CHECKSUMS)},
        place,
    )


def build_manifest(
    run: dict[str, Any],
    tasks: list[TaskDirectory],
    beside: dict[str, FileEntry],
    closed: bool,
    packs: Sequence[PackedTasks] = (),
) -> dict[str, Any]:
    """List a run: the tasks in folders, its packs, and the files `beside` them; `closed` says that nobody is writing to it any more.

    Only what was written or checked by the caller is listed. `complete` is true when it is closed and every task
    of run.json's `task_ids` is committed.
    """
    ids = [task.id for task in tasks]
    wanted = wanted_ids(run)
    counts = Counter(task.status for task in tasks)
    packed: set[str] = set()
    for pack in packs:
        counts.update(pack.counts)
        packed.update(pack.statuses())
        beside = beside | pack.entries()
    directories = {task.id: task.place for task in tasks}
    files = {f"{directories[task.id]}/{name}": entry for task in tasks for name, entry in task.files.items()}
    files |= beside
    return {
        "schema": SCHEMA,
        "run": run.get("id"),
        "status": run.get("status"),
        "complete": closed and set(wanted) <= packed.union(ids),
        "n_tasks": len(tasks) + sum(pack.n_tasks for pack in packs),
        "counts": dict(sorted(counts.items())),
        **({"packs": {pack.name: pack.n_tasks for pack in packs}} if packs else {}),
        "tasks": {task_id: directories[task_id] for task_id in in_order(ids, wanted)},
        "files": listing(files),
    }


def in_order(ids: list[str], wanted: list[str]) -> list[str]:
    """`ids` in the order of the task file, those it does not name last and sorted."""
    place = {task_id: number for number, task_id in enumerate(wanted)}
    return sorted(ids, key=lambda task_id: (place.get(task_id, len(place)), task_id))


def read_manifest(path: Path) -> dict[str, Any] | None:
    """manifest.json of the run directory `path`, None where there is none; a Fault when it is damaged."""
    if (data := _manifest_bytes(path)) is None:
        return None
    name = path / MANIFEST
    manifest = decode_signed(name, data, counts=True)
    if CHECKSUM not in manifest:
        raise FileFault(name, "altered", "its own checksum is missing")
    return manifest


def _manifest_bytes(path: Path) -> bytes | None:
    try:
        return read_file(path / MANIFEST)
    except FileFault as fault:
        if fault.kind == "missing":
            return None
        raise


class _ListedSize(msgspec.Struct):
    path: str
    bytes: int


class _Listing(msgspec.Struct):
    n_tasks: int
    files: list[_ListedSize]


def listed_sizes(path: Path) -> tuple[int, int] | None:
    """Number of tasks, and bytes of all files in folders, as manifest.json of the run `path` has them; None where there is
    none or it does not say. Raises a Fault where its checksum differs. Of ten thousand tasks nothing else is made of it."""
    if (data := _manifest_bytes(path)) is None:
        return None
    if not is_signed(data):
        manifest = read_manifest(path) or {}
        data = encode_json(manifest)
    try:
        told = msgspec.json.decode(data, type=_Listing)
    except msgspec.MsgspecError:
        return None
    return told.n_tasks, sum(entry.bytes for entry in told.files if "/" in entry.path)


def listed_files(path: Path, manifest: dict[str, Any]) -> dict[str, FileEntry]:
    """The files that the manifest of run `path` lists. A name that would leave the directory is a Fault."""
    try:
        files = {entry["path"]: FileEntry(entry["bytes"], entry["blake3"]) for entry in manifest["files"]}
        lines = "".join([f"{name}\n" for name in files])
        bad: list[str] = []
        if not _ALL_LISTABLE.fullmatch(lines) or lines.count("\n") != len(files):
            bad = [name for name in files if not re.fullmatch(_LISTABLE, name) or "\n" in name]
    except (KeyError, TypeError) as error:
        raise FileFault(path / MANIFEST, "altered", f"files: {type(error).__name__} {error}") from error
    if bad:
        raise FileFault(path / MANIFEST, "altered", f"lists {bad[0]!r}")
    return files


def listed_file(path: Path, manifest: dict[str, Any], name: str) -> FileEntry | None:
    """What the manifest of run `path` says of one file; None where it does not list it. Raises a Fault."""
    try:
        entries = [entry for entry in manifest["files"] if entry["path"] == name]
        return FileEntry(entries[-1]["bytes"], entries[-1]["blake3"]) if entries else None
    except (KeyError, TypeError) as error:
        raise FileFault(path / MANIFEST, "altered", f"files: {type(error).__name__} {error}") from error


def listed_in(path: Path, manifest: dict[str, Any], place: str) -> dict[str, FileEntry]:
    """The files of one folder that the manifest of run `path` lists, by their names from the run on. Raises a Fault."""
    try:
        entries = [entry for entry in manifest["files"] if entry["path"].startswith(f"{place}/")]
    except (KeyError, TypeError, AttributeError) as error:
        raise FileFault(path / MANIFEST, "altered", f"files: {type(error).__name__} {error}") from error
    return listed_files(path, {"files": entries})


def listing(files: dict[str, FileEntry]) -> list[dict[str, Any]]:
    """The manifest's `files`, sorted by path."""
    return [{"path": name, **files[name]._asdict()} for name in sorted(files)]


def wanted_ids(run: dict[str, Any]) -> list[str]:
    """The ids that run.json says belong to the run, in task-file order; empty where it does not say."""
    ids = run.get("task_ids")
    return (
        [printable(task_id) for task_id in ids if isinstance(task_id, str)] if isinstance(ids, list) else []
    )


# --- files beside the tasks ---


def read_pending(path: Path) -> dict[str, list[FileEntry]]:
    """checksums.json of a run directory: of files beside the tasks, those that the manifest does not list (yet).

    While a file is replaced it names the old bytes and the new ones, so that it is right whenever a process is
    killed. Empty where there is none; raises a Fault when it is damaged.
    """
    name = path / CHECKSUMS
    try:
        data = read_file(name)
    except FileFault as fault:
        if fault.kind == "missing":
            return {}
        raise
    content = decode_signed(name, data)
    try:
        pending = {
            file: [FileEntry(**entry) for entry in entries] for file, entries in content["files"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise FileFault(name, "altered", f"{type(error).__name__} {error}") from error
    if CHECKSUM not in content:
        raise FileFault(name, "altered", "its own checksum is missing")
    return pending


def write_pending(path: Path, pending: dict[str, list[FileEntry]]) -> None:
    """Replace checksums.json of a run directory; without entries it goes."""
    if pending:
        files = {name: [entry._asdict() for entry in pending[name]] for name in sorted(pending)}
        replace_file(path / CHECKSUMS, encode_signed({"files": files}))
    elif os.path.lexists(path / CHECKSUMS):
        os.unlink(path / CHECKSUMS)
        sync_directory(path)


def acceptable(path: Path, listed: dict[str, FileEntry] | None) -> dict[str, list[FileEntry]]:
    """What each file derived from the tasks may be: as the manifest has it (`listed`), or as checksums.json has."""
    known = read_pending(path)
    for name in DERIVED:
        if listed and name in listed:
            known[name] = [listed[name], *known.get(name, ())]
    return known


def check_derived(path: Path, actual: FileEntry, known: dict[str, list[FileEntry]]) -> None:
    """Raise a Fault unless a derived file is one of those that are known; the message says how to have it again."""
    entries = [entry for entry in known.get(path.name, []) if entry != ABSENT]
    again = f"remove it; `probe analyze {path.parent}` makes it again"
    if not entries:
        raise FileFault(path, "unlisted", f"no checksum of it is left: {again}")
    if actual not in entries:
        kind = "truncated" if actual.bytes < entries[0].bytes else "altered"
        raise FileFault(path, kind, f"its checksum is not the one that was saved: {again}")


def input_entries(path: Path, run: dict[str, Any]) -> dict[str, FileEntry]:
    """Size and checksum of what the run was given, from its run.json; empty in a run of an earlier version."""
    try:
        return {name: FileEntry(**entry) for name, entry in run.get("inputs", {}).items() if name in INPUTS}
    except (TypeError, AttributeError) as error:
        raise FileFault(path / RUN, "altered", f"inputs: {error}") from error


def checked_inputs(path: Path, run: dict[str, Any]) -> dict[str, Path]:
    """Where the run has what it was given, by the names of `INPUTS`, each compared with its checksum in run.json.

    Empty in a run of an earlier version. Raises a Fault.
    """
    entries = input_entries(path, run)
    for name, entry in entries.items():
        compare(path / name, entry, RUN)
    return {name: path / name for name in entries}


def read_checked_run(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """run.json and the manifest that belongs to it (None: the run has not ended), each checked.

    Raises RunDirectoryError, and a Fault where one is damaged or a run that has ended has no manifest.
    """
    run = read_run_json(path)
    manifest = read_manifest(path)
    if CHECKSUM in run and run.get("status") not in ENDED:
        return run, None
    if manifest is None and CHECKSUM in run:
        run = read_run_json(path)  # somebody may have taken the run up in this moment
        if run.get("status") in ENDED:
            raise FileFault(path / MANIFEST, "missing", f"`probe resume {path}` makes it from what checks")
        return run, None
    if manifest is not None:
        entry = listed_file(path, manifest, RUN)
        if entry is not None and entry != entry_of(read_file(path / RUN)):
            raise FileFault(path / RUN, "altered", f"its checksum is not the one in {MANIFEST}")
    return run, manifest
