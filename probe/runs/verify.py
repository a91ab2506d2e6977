"""Is a run directory what was written? Every byte is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
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
    checksum_and_start,
    checksum_file,
    entry_of,
    names_in,
    read_file,
    read_run_json,
)
from probe.runs.layout import foreign_places, task_hash, temporaries
from probe.runs.manifest import (
    ABSENT,
    acceptable,
    check_derived,
    check_record_bytes,
    compare_entry,
    input_entries,
    listed_files,
    read_checksums,
    read_manifest,
    wanted_ids,
)
from probe.runs.packed import INDEX, INDEX_ROWS, PACK, RECORDS, TABLE, Pack, PackedTask, Standing, standing
from probe.runs.tensors import TensorInfo, header_in


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
    contents = _compare_files(path, expected, CHECKSUMS if unknown else MANIFEST, report)
    broken = contents.broken
    for name in sorted(_listed(path, stands, report) - set(expected) - _parents(expected) - allowed):
        report.add(FileFault(path / name, "extra"))
    ids, counts = _check_tasks(path, places, contents, report)
    for pack in packs:
        _check_pack(path, pack, broken, counts, report)
    report.counts = dict(sorted(counts.items()))
    if manifest is not None:
        _check_manifest(path, manifest, run, ids, report)
    elif unknown:
        report.notes.append(f"incomplete: no {MANIFEST}: `probe resume {path}` finishes the run")
    readable = [pack for pack in packs if f"{PACKS}/{pack.name}/{TABLE}" not in broken]
    packed = {name for pack in readable for name in _attempt(report, getattr, pack, "rows") or ()}
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


@dataclass
class _Contents:
    """What was seen of files while their bytes were read."""

    broken: set[str] = field(default_factory=set)
    """Names of the bad files."""
    folders: dict[str, FileFault | None] = field(default_factory=dict)
    """Folder on the way to a file → why it is none."""
    inside: dict[str, FileFault | tuple[str, str] | None] = field(default_factory=dict)
    """Record → its task's id and status, tensors → None; where the bytes are right but what they say is not, why."""


def _compare_files(
    path: Path, expected: dict[str, FileEntry], source: str, report: VerifyReport
) -> _Contents:
    """Check the listed files and the folders on their way, each read once, and look into records and headers of tensors."""
    contents = _Contents()
    for name, entry in sorted(expected.items()):
        file = path / name
        folder, _, last = name.rpartition("/")
        try:
            _check_folders(path, folder, contents.folders)
            actual, start = checksum_and_start(file)
            compare_entry(file, actual, entry, source)
        except FileFault as fault:
            contents.broken.add(name)
            report.add(fault)
            continue
        report.n_files += 1
        report.n_bytes += entry.bytes
        if folder.startswith(f"{TASKS}/") and last in (RECORD, TENSORS):
            contents.inside[name] = _look_into(file, last, entry, start)
    return contents


def _check_folders(path: Path, folder: str, seen: dict[str, FileFault | None]) -> None:
    """Raise a Fault unless a folder and those on the way to it are folders; each is looked at once."""
    if not folder:
        return
    if folder not in seen:
        _check_folders(path, folder.rpartition("/")[0], seen)
        try:
            check_directory(path / folder)
            seen[folder] = None
        except FileFault as fault:
            seen[folder] = fault
    if (fault := seen[folder]) is not None:
        raise fault


def _look_into(file: Path, name: str, entry: FileEntry, start: bytes) -> FileFault | tuple[str, str] | None:
    """What a record or a file of tensors says, whose bytes are right; `start` are the first of them."""
    try:
        if name == RECORD:
            data = start
            if len(start) < entry.bytes:
                data = read_file(file)
                compare_entry(file, entry_of(data), entry, "its first reading")
            return check_record_bytes(file, data, file.parent.name)
        header_in(file, entry.bytes, start)
    except FileFault as fault:
        return fault
    return None


def _parents(names: Iterable[str]) -> set[str]:
    parents: set[str] = set()
    for name in names:
        while (name := name.rpartition("/")[0]) and name not in parents:
            parents.add(name)
    return parents


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
    path: Path, places: dict[str, str], contents: _Contents, report: VerifyReport
) -> tuple[dict[str, str], Counter[str]]:
    """What the files say whose bytes are right; returns id → directory and how many have each status."""
    ids, counts = {}, Counter()
    for place in places.values():
        record, tensors = f"{place}/{RECORD}", f"{place}/{TENSORS}"
        try:
            _check_folders(path, place, contents.folders)
            if record not in contents.broken:
                inside = contents.inside
                seen = inside[record] if record in inside else _unlisted(path / record)
                if isinstance(seen, FileFault):
                    raise seen
                if seen is not None:
                    ids[seen[0]] = place
                    counts[seen[1]] += 1
            if tensors not in contents.broken:
                seen = contents.inside[tensors] if tensors in contents.inside else _unlisted(path / tensors)
                if isinstance(seen, FileFault):
                    raise seen
        except FileFault as fault:
            report.add(fault)
    return ids, counts


def _unlisted(file: Path) -> FileFault | tuple[str, str] | None:
    """What a file says that no manifest lists, which is a problem of its own."""
    try:
        entry, start = checksum_and_start(file)
    except FileFault as fault:
        return fault
    return _look_into(file, file.name, entry, start)


def _check_pack(path: Path, pack: Pack, broken: set[str], counts: Counter[str], report: VerifyReport) -> None:
    """Look into a pack whose bytes are right: every record is of its task, and every tensor lies within its file."""
    if broken.intersection(pack.entries()):
        return
    try:
        statuses = Counter[str]()
        owners = _check_index(pack)
        sound_metadata: set[str] = set()
        records = pack.path / RECORDS
        for name, row in zip(pack.rows, pack.table.to_pylist(), strict=True):
            data = pack.record_bytes(row)
            compare_entry(
                records, entry_of(data), FileEntry(row["record_bytes"], row["record_blake3"]), TABLE
            )
            statuses[check_record_bytes(records, data, name)[1]] += 1
            first = row["first_tensor"]
            its_own = owners[first : first + row["n_tensors"]]
            if len(its_own) < row["n_tensors"]:
                raise FileFault(pack.path / INDEX, "altered", f"has no row {len(owners)}")
            if any(owner != row["task"] for owner in its_own):
                raise FileFault(pack.path / INDEX, "altered", f"rows of {row['task']!r} are of another task")
            if row["metadata"] not in sound_metadata:
                _ = PackedTask(pack, name).header  # raises where it says no axes
                sound_metadata.add(row["metadata"])
        if dict(statuses) != pack.counts or statuses.total() != pack.n_tasks:
            raise FileFault(pack.path / PACK, "altered", "its counts are not those of its records")
        counts.update(statuses)
    except FileFault as fault:
        report.add(fault)


def _check_index(pack: Pack) -> list[str]:
    """The task of each row of a pack's index. Raises a Fault where a tensor does not lie within the file, or where a row is not
    in the row group in which it is looked for."""
    owners: list[str] = []
    size = pack.files[TENSORS].bytes
    names = ("task", pack.tensor_column, "dtype", "shape", "offset")
    for number in range(pack.index.num_row_groups):
        rows = pack.index.read_row_group(number, columns=list(names))
        if rows.num_rows != INDEX_ROWS and number + 1 < pack.index.num_row_groups:
            raise FileFault(
                pack.path / INDEX, "altered", f"row group {number} has {rows.num_rows} rows, not {INDEX_ROWS}"
            )
        owners += rows["task"].to_pylist()
        columns = (rows[name].to_pylist() for name in names)
        for task, tensor, dtype, shape, offset in zip(*columns, strict=True):
            if offset + TensorInfo(dtype, shape, 0).n_bytes > size:
                raise FileFault(
                    pack.path / INDEX, "altered", f"{task_hash(task)}/{tensor} would end behind the file"
                )
    return owners


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
