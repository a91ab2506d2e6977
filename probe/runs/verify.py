"""Is a run directory what was written? Every byte is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from probe.runs.files import (
    CHECKSUM,
    CHECKSUMS,
    DERIVED,
    ENDED,
    MANIFEST,
    PACKS,
    RECORD,
    RUN,
    TASK_FILES,
    TASKS,
    TEMPORARY,
    TENSORS,
    FileEntry,
    FileFault,
    check_directory,
    checksum_file,
    names_in,
    read_run_json,
)
from probe.runs.layout import foreign_places, task_hash, temporaries
from probe.runs.manifest import (
    ABSENT,
    acceptable,
    check_derived,
    compare,
    input_entries,
    listed_files,
    read_checksums,
    read_manifest,
    read_record,
    wanted_ids,
)
from probe.runs.packed import INDEX, PACK, TABLE, Pack, PackedTask, Standing, standing
from probe.runs.tensors import read_header


@dataclass
class VerifyReport:
    """What `verify` found. A run without `problems` is sound, complete or not."""

    path: Path
    status: str = "unknown"
    """Status as in run.json: started, done, failed or interrupted."""
    complete: bool = False
    """There is a manifest and no task of run.json's `task_ids` is missing."""
    problems: list[str] = field(default_factory=list)
    """`FILE: missing | truncated | altered | extra | unreadable (detail)`, paths relative to the run."""
    notes: list[str] = field(default_factory=list)
    """What is not damage: tasks still to run, traces of an interrupted write, files not yet listed."""
    counts: dict[str, int] = field(default_factory=dict)
    """Readable committed tasks by status."""
    n_tasks: int = 0
    """Committed tasks, in folders and in packs."""
    n_files: int = 0
    """Files that were read and agree with their checksum."""
    n_bytes: int = 0

    def add(self, fault: FileFault) -> None:
        line = fault.describe(self.path)
        if line not in self.problems:
            self.problems.append(line)


def verify(path: Path) -> VerifyReport:
    """Compare every file of a run with its recorded size and checksum; a damaged run is reported, not raised.

    With a manifest all files are checked against it and the directory may hold nothing else. Without one (the
    run was killed or still goes on) each committed task is checked against its own checksums.json, and what lies
    beside the tasks against run.json and checksums.json. Raises RunDirectoryError when `path` is no run directory.
    """
    path = Path(path)
    report = VerifyReport(path)
    run = _attempt(report, read_run_json, path, True) or {}
    manifest = _attempt(report, read_manifest, path)
    expected = None if manifest is None else _attempt(report, listed_files, path, manifest)
    known = _attempt(report, acceptable, path, expected)
    signed = CHECKSUM in run
    if signed and run.get("status") in ENDED:
        if manifest is None and not (path / MANIFEST).exists():
            report.add(FileFault(path / MANIFEST, "missing"))
    elif signed:
        manifest = expected = None  # of an end that was not reached, or of before the run was taken up again
    stands = _attempt(report, standing, path, expected) or Standing([], {}, [])
    places, packs = stands.places, stands.packs
    report.status = str(run.get("status", "unknown"))
    report.n_tasks = len(places) + sum(pack.n_tasks for pack in packs)
    allowed = {RUN, MANIFEST, CHECKSUMS, *DERIVED}
    unknown = expected is None
    if expected is None:
        expected = _committed_files(path, places, report) | (_attempt(report, input_entries, path, run) or {})
        for pack in packs:
            expected |= pack.entries()
        for place in places.values():
            allowed |= {place, *(f"{place}/{file}" for file in TASK_FILES)}
    _check_derived(path, known, report)
    expected = {name: entry for name, entry in expected.items() if name not in DERIVED}
    broken = _compare_files(path, expected, CHECKSUMS if unknown else MANIFEST, report)
    for name in sorted(_listed(path, stands, report) - set(expected) - _parents(expected) - allowed):
        report.add(FileFault(path / name, "extra"))
    ids, counts = _check_tasks(path, places, broken, report)
    for pack in packs:
        _check_pack(path, pack, broken, counts, report)
    report.counts = dict(sorted(counts.items()))
    if manifest is not None:
        _check_manifest(path, manifest, run, ids, report)
    elif unknown:
        report.notes.append(f"incomplete: no {MANIFEST}: `probe resume {path}` finishes the run")
    readable = [pack for pack in packs if f"{PACKS}/{pack.name}/{TABLE}" not in broken]
    packed = {name for pack in readable for name in pack.rows}
    missing = [
        task for task in wanted_ids(run) if (name := task_hash(task)) not in places and name not in packed
    ]
    if missing:
        report.notes.append(f"incomplete: {len(missing)} tasks have not run, first {missing[0]!r}")
    report.complete = manifest is not None and not missing
    return report


def _check_derived(path: Path, known: dict[str, list[FileEntry]] | None, report: VerifyReport) -> None:
    """The files that are derived from the tasks: as the manifest or checksums.json have them."""
    for name in DERIVED:
        try:
            if (path / name).is_symlink() or (path / name).exists():
                entry = checksum_file(path / name)
                if known is not None and not known.get(name):
                    report.notes.append(f"{name}: no checksum of it is kept, so not checked")
                    continue
                check_derived(path / name, entry, known or {})
                report.n_files, report.n_bytes = report.n_files + 1, report.n_bytes + entry.bytes
            elif known and known.get(name) and ABSENT not in known[name]:
                raise FileFault(path / name, "missing")
        except FileFault as fault:
            report.add(fault)


def _attempt(report: VerifyReport, read: Any, *args: Any) -> Any:
    try:
        return read(*args)
    except FileFault as fault:
        report.add(fault)
        return None


def _committed_files(path: Path, places: dict[str, str], report: VerifyReport) -> dict[str, FileEntry]:
    """Without a manifest: what each task's own checksums.json lists."""
    expected = {}
    for place in places.values():
        try:
            check_directory(path / place)
            entries = read_checksums(path / place)
        except FileFault as fault:
            report.add(fault)
        else:
            expected.update({f"{place}/{file}": entry for file, entry in entries.items()})
    return expected


def _compare_files(path: Path, expected: dict[str, FileEntry], source: str, report: VerifyReport) -> set[str]:
    """Check the listed files and the folders on their way; returns the names of the bad files."""
    broken = set()
    for name, entry in sorted(expected.items()):
        try:
            for parent in sorted(_parents([name])):
                check_directory(path / parent)
            compare(path / name, entry, source)
        except FileFault as fault:
            broken.add(name)
            report.add(fault)
        else:
            report.n_files += 1
            report.n_bytes += entry.bytes
    return broken


def _parents(names: Any) -> set[str]:
    return {str(parent) for name in names for parent in PurePosixPath(name).parents} - {"."}


def _listed(path: Path, stands: Standing, report: VerifyReport) -> set[str]:
    """Names of what lies there: files, and any folder that is no task; hidden files are left out."""
    files = {name for name in names_in(path) if not name.startswith(".") and name not in (TASKS, PACKS)}
    left = [name for name in names_in(path) if TEMPORARY.fullmatch(name)]
    try:
        check_directory(path / TASKS)
        left += temporaries(path)
        files.update(foreign_places(path))
        for place in stands.places.values():
            files |= _files_of_task(path, place)
    except FileFault:
        pass  # reported with the task directories
    for name in names_in(path / PACKS) if (path / PACKS).is_dir() else ():
        if TEMPORARY.fullmatch(name):
            left.append(f"{PACKS}/{name}")
        elif f"{PACKS}/{name}" not in stands.left:
            files |= _files_of_task(path, f"{PACKS}/{name}")
    report.notes += [f"{name}: left by an interrupted write; the next writer removes it" for name in left]
    if stands.left:
        report.notes.append(
            f"{stands.left[0]}: left by an interrupted packing, {len(stands.left)} in all: `probe pack {path}` removes them"
        )
    return files


def _files_of_task(path: Path, place: str) -> set[str]:
    try:
        check_directory(path / place)
        files = names_in(path / place)
    except FileFault:
        files = []
    return {f"{place}/{file}" for file in files} or {place}


def _check_tasks(
    path: Path, places: dict[str, str], broken: set[str], report: VerifyReport
) -> tuple[dict[str, str], Counter[str]]:
    """Look into the files whose bytes are right; returns id → directory and how many have each status."""
    ids, counts = {}, Counter()
    for place in places.values():
        directory = path / place
        try:
            check_directory(directory)
            if f"{place}/{RECORD}" not in broken:
                record = read_record(directory)
                ids[record["id"]] = place
                counts[record["status"]] += 1
            if f"{place}/{TENSORS}" not in broken:
                read_header(directory / TENSORS)
        except FileFault as fault:
            report.add(fault)
    return ids, counts


def _check_pack(path: Path, pack: Pack, broken: set[str], counts: Counter[str], report: VerifyReport) -> None:
    """Look into a pack whose bytes are right: every record is of its task, and every tensor lies within its file."""
    if broken.intersection(pack.entries()):
        return
    try:
        statuses = Counter[str]()
        for name in pack.rows:
            task = PackedTask(pack, name)
            statuses[task.record()["status"]] += 1
            for tensor in task.header.tensors:
                where = task.place(tensor)
                if where.offset + where.info.n_bytes > pack.files[TENSORS].bytes:
                    raise FileFault(
                        pack.path / INDEX, "altered", f"{name}/{tensor} would end behind the file"
                    )
        if dict(statuses) != pack.counts or statuses.total() != pack.n_tasks:
            raise FileFault(pack.path / PACK, "altered", "its counts are not those of its records")
        counts.update(statuses)
    except FileFault as fault:
        report.add(fault)


def _check_manifest(
    path: Path, manifest: dict[str, Any], run: dict[str, Any], ids: dict[str, str], report: VerifyReport
) -> None:
    """The manifest's summary against the files, in a run that is sound so far: else it tells nothing new."""
    if report.problems:
        return
    facts = {
        **{"run": run.get("id"), "status": run.get("status"), "tasks": ids, "counts": report.counts},
        **{"n_tasks": report.n_tasks},
    }
    for key, value in facts.items():
        if manifest.get(key) != value:
            report.add(FileFault(path / MANIFEST, "altered", f"its {key} are not those of the files"))
