"""Reading a run: nothing is loaded before it is asked for, and never a byte through a link."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from probe.errors import DiskError, RunDirectoryError, UsageError
from probe.runs.files import (
    CHECKSUM,
    ENDED,
    MANIFEST,
    MEASURES,
    PACKS,
    RECORD,
    REPORT,
    RUN,
    TASKS,
    FileEntry,
    FileFault,
    RunLock,
    checksum_file,
    disk_errors,
    encode_signed,
    entry_of,
    is_locked,
    printable,
    read_fault,
    read_file,
    read_run_json,
    replace_file,
)
from probe.runs.folder import TaskFolder
from probe.runs.frames import Frames
from probe.runs.html import run_html
from probe.runs.layout import find_task, task_hash, task_place, version_of
from probe.runs.manifest import (
    ABSENT,
    TaskDirectory,
    acceptable,
    build_manifest,
    check_derived,
    in_order,
    input_entries,
    listed_files,
    listed_in,
    listed_sizes,
    listing,
    read_checked_run,
    read_manifest,
    read_pending,
    read_record,
    wanted_ids,
    write_pending,
)
from probe.runs.packed import PackedTask, Standing, standing
from probe.runs.records import TaskRecord, check_header
from probe.runs.remote import RunUrl, located
from probe.runs.tables import TABLES, Table, TableName
from probe.runs.task import NotInRun, TaskRun
from probe.runs.write import remove_temporaries

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingTypeStubs]
    import pyarrow
    from pyarrow.compute import Expression  # pyright: ignore[reportUnknownVariableType]


class Run(Frames):
    """A run directory, opened for reading; it may still be growing.

    Raises RunDirectoryError when `path` is no run, and ArtifactCorrupt, naming the file, when one is damaged.
    Every file is compared with its checksum when it is first read; `verify` reads them all.

    `path` may be the URL of a run that has ended (https, http, file): records and tables are read whole and compared with
    their checksums, tensors by range, of which only the length of their file is. Raises DiskError where a server is not reached.
    """

    def __init__(self, path: str | Path):
        self.path = located(path)
        self.run: dict[str, Any]
        self.run, manifest = read_checked_run(self.path)
        check_header(self.run, self.path)
        self._manifest = manifest
        self._one_was_sought = False

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {len(self)} tasks, {self.run.get('status')})"

    def _repr_html_(self) -> str:
        return run_html(self)

    @cached_property
    def _listed(self) -> dict[str, FileEntry] | None:
        """What the manifest says of each file; None while the run has not ended."""
        return None if self._manifest is None else listed_files(self.path, self._manifest)

    @cached_property
    def task_ids(self) -> list[str]:
        """The committed tasks, in the order of the task file; those it does not name come last, sorted."""
        if (ids := self._ids_of_packed()) is not None:
            return ids
        places, packs = self._standing.places, self._standing.packs
        if self._listed is not None:
            listed = {name.rpartition("/")[0] for name in self._listed if name.startswith(f"{TASKS}/")}
            for place in sorted(listed ^ set(places.values())):
                raise FileFault(self.path / place, "missing" if place in listed else "extra")
        packed = {
            name: task_id for pack in packs for name, task_id in zip(pack.rows, pack.task_ids, strict=True)
        }
        hashes = {task_hash(task_id): task_id for task_id in wanted_ids(self.run)}
        ids = [task_id for name, task_id in hashes.items() if name in places or name in packed]
        ids += [task_id for name, task_id in packed.items() if name not in hashes]
        ids += [read_record(self.path / places[name])["id"] for name in places if name not in hashes]
        return in_order(ids, wanted_ids(self.run))

    def _ids_of_packed(self) -> list[str] | None:
        """The ids of a run all of whose tasks are packed, without a look into the tables of packs: its manifest says that none
        is missing. None of another run."""
        manifest, ids = self._manifest, wanted_ids(self.run)
        if (
            manifest is None
            or manifest.get("complete") is not True
            or manifest.get("n_tasks") != len(set(ids))
        ):
            return None
        if not manifest.get("packs") or manifest.get("tasks"):
            return None
        packs = self._standing.packs  # each pack is there and its head is what the manifest says
        whole = not self._standing.places and sum(pack.n_tasks for pack in packs) == len(set(ids))
        return list(dict.fromkeys(ids)) if whole else None

    @cached_property
    def _standing(self) -> Standing:
        if isinstance(self.path, RunUrl):
            listed = self._listed or {}
            if any(name.startswith(f"{PACKS}/") for name in listed):
                raise UsageError(
                    f"{self.path}: a packed run is not read at a URL: `probe pull` it, or copy it here"
                )
            places = {name.rpartition("/")[0] for name in listed if name.startswith(f"{TASKS}/")}
            return Standing([], {place.rpartition("/")[2]: place for place in sorted(places)}, [])
        return standing(self.path, self._listed)

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.task_ids)

    @property
    def manifest(self) -> dict[str, Any]:
        """manifest.json; without one, the same built from what is committed, with `complete` false."""
        manifest = read_manifest(self.path)
        if manifest is not None:
            return manifest
        tasks: list[TaskDirectory] = []
        for task in self:
            if isinstance(task.source, TaskFolder):
                tasks.append(task.source.entry(task.id, task.record["status"]))
        beside = {RUN: checksum_file(self.path / RUN), **input_entries(self.path, self.run)}
        beside |= {name: entries[-1] for name, entries in read_pending(self.path).items()}
        return build_manifest(self.run, tasks, beside, closed=False, packs=self._standing.packs)

    def __len__(self) -> int:
        return len(self.task_ids)

    def __iter__(self) -> Iterator[TaskRun]:
        return map(self._task, self.task_ids)

    def _task(self, task_id: str) -> TaskRun:
        name = task_hash(task_id)
        if place := self._standing.places.get(name):
            return TaskRun(task_id, TaskFolder(self.path, place, self._listed))
        pack = next((pack for pack in self._standing.packs if name in pack.rows), None)
        if pack is None:
            raise FileFault(self.path / task_place(name), "missing")
        return TaskRun(task_id, PackedTask(pack, name))

    def __contains__(self, task_id: object) -> bool:
        return isinstance(task_id, str) and printable(task_id) in self._known

    def _in_its_folder(self, task_id: str) -> TaskRun | None:
        """The first task that is asked for, where the manifest lists it in a folder of its own, without a look at the others; else None."""
        if self._manifest is None or isinstance(self.path, RunUrl) or "task_ids" in self.__dict__:
            return None
        if self._one_was_sought:  # looking through the manifest for each would take the square of the tasks
            return None
        self._one_was_sought = True
        place = find_task(self.path, task_id)
        listed = listed_in(self.path, self._manifest, place)
        return (
            TaskRun(task_id, TaskFolder(self.path, place, listed)) if f"{place}/{RECORD}" in listed else None
        )

    def __getitem__(self, task_id: str) -> TaskRun:
        if (alone := self._in_its_folder(printable(task_id))) is not None:
            return alone
        if task_id in self:
            return self._task(printable(task_id))
        if printable(task_id) in wanted_ids(self.run):
            raise NotInRun(f"{self.path}: task {task_id!r} has not run yet: `probe resume {self.path}`")
        near = difflib.get_close_matches(task_id, self.task_ids, n=3)
        hint = (
            f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else f"`probe show {self.path}` lists them"
        )
        raise NotInRun(f"{self.path}: no task {task_id!r} among {len(self)}: {hint}")

    @property
    def has_measures(self) -> bool:
        """Whether the run was measured. Raises ArtifactCorrupt where its measures are lost."""
        return self._is_there(MEASURES)

    @property
    def has_report(self) -> bool:
        """Whether a report was ever written; one that is lost is to be written again."""
        try:
            return self._is_there(REPORT)
        except FileFault:
            return True

    @property
    def report_path(self) -> Path | None:
        """Where the report lies; None where there is none, or none any more."""
        path = self.path / REPORT
        return path if path.exists() else None

    def version(self) -> str:
        """A word that changes when a task, a table or the report does, on the disk; a run at a URL has ended and keeps its own."""
        return "ended" if isinstance(self.path, RunUrl) else version_of(self.path)

    @overload
    def measures(self, arrow: Literal[False] = False) -> pandas.DataFrame: ...
    @overload
    def measures(self, arrow: Literal[True]) -> pyarrow.Table: ...
    def measures(self, arrow: bool = False) -> pandas.DataFrame | pyarrow.Table:
        """What the analyzers found, one row a number, columns as MEASURE_FIELDS; nulls stay null.

        Raises RunDirectoryError when the run was not analyzed.
        """
        if not self.has_measures:
            raise RunDirectoryError(f"{self.path}: no measures yet: `probe analyze {self.path}` makes them")
        return self.table("measures", arrow=arrow)

    @overload
    def table(self, name: TableName, arrow: Literal[False] = False) -> pandas.DataFrame: ...
    @overload
    def table(self, name: TableName, arrow: Literal[True]) -> pyarrow.Table: ...
    @overload
    def table(self, name: TableName, arrow: bool) -> pandas.DataFrame | pyarrow.Table: ...
    def table(self, name: TableName, arrow: bool = False) -> pandas.DataFrame | pyarrow.Table:
        """A table beside the tasks (see `probe.runs.tables.TABLES`), empty where none was made; nulls stay null.

        Raises UsageError for a name that is none.
        """
        import pyarrow as pa

        table = pa.concat_tables(self.table_parts(name))  # pyright: ignore[reportUnknownMemberType]
        return table if arrow else _to_pandas(table)

    def table_parts(
        self,
        name: TableName,
        where: Expression | None = None,  # pyright: ignore[reportUnknownParameterType]
    ) -> Iterator[pyarrow.Table]:
        """The same table some rows at a time, at least one part; of each part the rows that `where` keeps.

        Raises as `table`.
        """
        kind = _kind(name)
        path = self.path / kind.file
        parts: Iterable[pyarrow.Table] = [kind.schema().empty_table()]
        if self._is_there(kind.file):
            data = read_file(path)
            known = self._acceptable()
            if known is not None:
                check_derived(path, entry_of(data), known)
            parts = kind.decode(path, data)
        for part in parts:
            yield part if where is None else part.filter(where)

    def _is_there(self, name: str) -> bool:
        """Whether a file that is derived from the tasks was made. Raises a Fault where it was and is gone."""
        if isinstance(self.path, RunUrl):
            return name in (self._listed or ())
        if os.path.lexists(self.path / name):
            return True
        known = (self._acceptable() or {}).get(name)
        if known and ABSENT not in known:
            raise FileFault(self.path / name, "missing", f"`probe analyze {self.path}` makes it again")
        return False

    def _acceptable(self) -> dict[str, list[FileEntry]] | None:
        """What the files derived from the tasks may be; None in a run of an earlier version that has not ended."""
        if isinstance(self.path, RunUrl):
            return {name: [entry] for name, entry in (self._listed or {}).items()}
        manifest = read_manifest(self.path)
        if manifest is None and CHECKSUM not in self.run:
            return None
        return acceptable(self.path, None if manifest is None else listed_files(self.path, manifest))

    def write_table(self, name: TableName, table: pyarrow.Table | Iterable[pyarrow.Table]) -> None:
        """Replace a table's file and then the manifest, each atomically; `table` may come in parts.

        Raises ValueError (columns), RunDirectoryError (a writer is at work), DiskError and UsageError (name).
        """
        kind = _kind(name)
        self._replace(kind.file, kind.encode(table))

    def replace_report(self, html: str) -> None:
        """Replace report.html and then the manifest, each atomically. Raises as `write_table`."""
        self._replace(REPORT, printable(html).encode())

    def _replace(self, name: str, data: bytes) -> None:
        with RunLock(self.path):
            remove_temporaries(self.path)
            manifest = read_manifest(self.path)
            files = {} if manifest is None else listed_files(self.path, manifest)
            pending = read_pending(self.path)
            new = entry_of(data)
            before = pending.get(name) or [files.get(name, ABSENT)]
            # Both are named while one becomes the other: a crash in between must not look like a damaged file.
            write_pending(self.path, pending | {name: [*before, new]})
            replace_file(self.path / name, data)
            if manifest is None:
                write_pending(self.path, pending | {name: [new]})
                return
            files[name] = new
            replace_file(self.path / MANIFEST, encode_signed(manifest | {"files": listing(files)}))
            with disk_errors(self.path):
                write_pending(self.path, {})


def _kind(name: str) -> Table:
    if name not in TABLES:
        raise UsageError(f"no table {name!r}: a run has {', '.join(TABLES)}")
    return TABLES[name]


def _to_pandas(table: pyarrow.Table) -> pandas.DataFrame:
    import pandas as pd  # pyright: ignore[reportMissingTypeStubs]
    import pyarrow as pa

    return table.to_pandas(types_mapper={pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype()}.get)


def finished(run: Run, *kinds: str) -> Iterator[TaskRun]:
    """The tasks of these kinds, or of all, that ran to their end; a failed one has neither passages nor tensors."""
    for task in run:
        record = task.typed(TaskRecord)
        if record.kind in (kinds or (record.kind,)) and record.status in ("ok", "truncated"):
            yield task


def list_runs(directory: str | Path = Path("runs")) -> list[dict[str, Any]]:
    """The runs directly inside `directory`, oldest first; no tensor and no record is read.

    Each has `id`, `path`, `status`, `active` (somebody writes to it now), `model`, `tasks_done`,
    `tasks_total` (None where run.json does not say), `created`, `bytes` and `problem` (None, or why it cannot
    be read; then `status` is `broken`). A directory that does not exist holds no runs; a file raises
    RunDirectoryError.
    """
    directory = Path(directory)
    if not directory.exists():
        return []
    if not directory.is_dir():
        raise RunDirectoryError(f"{directory}: is not a directory")
    marks = (RUN, MANIFEST, TASKS)
    paths = [
        path
        for path in directory.iterdir()
        if path.is_dir() and any((path / mark).exists() for mark in marks)
    ]
    return sorted((_summary(path) for path in paths), key=lambda row: (row["created"] or "", row["id"]))


def _summary(path: Path) -> dict[str, Any]:
    # The directory's own name: a run may have been moved or copied since it got its id.
    row: dict[str, Any] = {"id": path.name, "path": str(path), "status": "broken", "active": is_locked(path)}
    row |= dict.fromkeys(("model", "tasks_done", "tasks_total", "created", "bytes", "problem"))
    try:
        run = read_run_json(path)
        if (told := _told(path, run)) is not None:
            row["tasks_done"], row["bytes"] = told
        else:
            stands = standing(path, None)
            row["tasks_done"] = len(stands.places) + sum(pack.n_tasks for pack in stands.packs)
            row["bytes"] = _size(path, stands.places) + sum(pack.bytes for pack in stands.packs)
    except (FileFault, RunDirectoryError, DiskError) as error:
        return row | {"problem": str(error)}
    except OSError as error:
        return row | {"problem": str(read_fault(path, error))}
    model: Any = run.get("model")
    model = cast("dict[str, Any]", model).get("name") if isinstance(model, dict) else model
    texts: dict[str, Any] = {
        "status": run.get("status"),
        "model": model,
        "created": run.get("created"),
    }
    row |= {key: value for key, value in texts.items() if isinstance(value, str)}
    return row | {"tasks_total": len(wanted_ids(run)) or None}


def _told(path: Path, run: dict[str, Any]) -> tuple[int, int] | None:
    """Number of tasks and bytes of a run that has ended, as its manifest says: no folder of a task is looked into."""
    told = listed_sizes(path) if run.get("status") in ENDED else None
    if told is None:
        return None
    beside = sum(
        name.stat(follow_symlinks=False).st_size
        for name in os.scandir(path)
        if name.is_file(follow_symlinks=False)
    )
    return told[0], beside + told[1]


def _size(path: Path, places: Mapping[str, str]) -> int:
    """Bytes of all files of a run."""
    total = 0
    for name in os.scandir(path):
        if name.name != TASKS:
            total += name.stat(follow_symlinks=False).st_size
    for place in places.values():
        if not (path / place).is_symlink():
            total += sum(file.stat(follow_symlinks=False).st_size for file in os.scandir(path / place))
    return total
