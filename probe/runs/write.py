"""Writing a run: one immutable directory a task, committed by one rename."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from probe.errors import DiskError, RunDirectoryError
from probe.runs.claims import remove_claims
from probe.runs.files import (
    CHECKSUMS,
    DERIVED,
    ENDED,
    LOCK,
    MANIFEST,
    MEASURES,
    PACKS,
    RECORD,
    REPORT,
    RUN,
    SCHEMA,
    TASKS,
    TEMPORARY,
    TENSORS,
    WORKERS,
    FileEntry,
    FileFault,
    RunLock,
    check_directory,
    checksum_file,
    disk_errors,
    encode_json,
    encode_signed,
    entry_of,
    is_locked,
    names_in,
    nothing_committed,
    printable,
    read_run_json,
    replace_file,
    sync_directory,
    write_new,
)
from probe.runs.folder import TaskFolder
from probe.runs.layout import find_task, prefixes, task_hash, task_place
from probe.runs.manifest import (
    ABSENT,
    TaskDirectory,
    acceptable,
    build_manifest,
    check_derived,
    checked_inputs,
    committed_task,
    compare,
    compare_entry,
    encode_checksums,
    input_entries,
    listed_files,
    read_checked_run,
    read_manifest,
    write_pending,
)
from probe.runs.packed import PACK, Pack, PackedTask, open_packs, standing
from probe.runs.tensors import Array, Encoded, encode

QUEUE_TASKS = 16
QUEUE_BYTES = 256 * 2**20
"""Bounds of what waits to be written; one larger task is let through when nothing else waits."""


def default_path(runs_dir: Path = Path("runs"), hint: str = "") -> Path:
    """`runs_dir`/<run id>: UTC time, the hint's letters and digits, random hex digits; [a-z0-9-]{1,64}."""
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    word = re.sub(r"[^a-z0-9]+", "-", hint.lower()).strip("-")[:32].strip("-")
    return Path(runs_dir) / "-".join(filter(None, (now, word, secrets.token_hex(3))))


class _Job(NamedTuple):
    id: str
    status: str
    record: bytes
    tensors: Encoded

    @property
    def size(self) -> int:
        return len(self.record) + self.tensors.size


class RunWriter:
    """The one process that may change a run directory, or one of several that add tasks to it; a context manager.

    Tasks are handed to one writer thread. `flush` returns when all of them are durable: each is then found
    again after a crash or a power cut, and a task that was not flushed is there whole or not at all.
    """

    run: dict[str, Any]
    """What run.json holds."""
    committed: dict[str, str]
    """Task id → status of what is committed, in folders and in packs."""

    @classmethod
    def create(cls, path: Path, run: dict[str, Any], inputs: Mapping[str, bytes] = {}) -> RunWriter:
        """Start a run in `path`, which must be new or empty, and write run.json with the status `started`.

        `schema`, `id` and `created` are filled in where `run` has none; `inputs` are what the run was given, by the
        names of `INPUTS`. Raises RunDirectoryError (busy or not empty) and DiskError.
        """
        path = Path(path)
        content = {"schema": SCHEMA, "id": _run_id(path), "created": _now()} | run | {"status": "started"}
        content.pop("inputs", None)  # of the run that a header was copied from
        if inputs:
            content["inputs"] = {name: entry_of(data)._asdict() for name, data in inputs.items()}
        encode_json(content)
        with disk_errors(path):
            try:
                path.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise RunDirectoryError(f"{path}: is not a directory: give another --out") from None
            refuse_content(path, but=RUN)  # before the lock, to leave nothing in a folder that is not ours
            sync_directory(path.parent)
        lock = RunLock(path)
        try:
            refuse_content(path)
            remove_temporaries(path)
            with disk_errors(path):
                (path / TASKS).mkdir(exist_ok=True)
            for name, data in inputs.items():
                replace_file(path / name, data)
            replace_file(path / RUN, encode_signed(content))
        except BaseException:
            lock.release()
            raise
        return cls(path, lock, content, [], [], input_entries(path, content))

    @classmethod
    def resume(cls, path: Path) -> RunWriter:
        """Take up a run again: check every byte of every file, remove what was left half-written.

        Nothing else is changed until the first `commit` or `finish`. Raises RunDirectoryError (busy or not a
        run), ArtifactCorrupt and DiskError.
        """
        path = Path(path)
        read_run_json(path)
        lock = RunLock(path)
        try:
            with disk_errors(path):
                (path / TASKS).mkdir(exist_ok=True)
            remove_temporaries(path)
            run, tasks, packs, beside = _checked(path)
        except BaseException:
            lock.release()
            raise
        return cls(path, lock, run, tasks, packs, beside)

    @classmethod
    def join(cls, path: Path, patience_s: float = 600.0) -> RunWriter:
        """Add tasks to a run beside other processes that do; there is no `finish`, and a task that another one commits
        first stays theirs.

        The first one takes the run up as `resume` does; while another process has it alone this waits for `patience_s`.
        Raises as `resume`.
        """
        path = Path(path)
        until = time.monotonic() + patience_s
        while True:
            with suppress(RunDirectoryError):
                run = read_run_json(path)
                if run.get("status") not in ENDED and (path / WORKERS).is_dir():
                    lock = RunLock(path, shared=True)
                    run = read_run_json(path)
                    if run.get("status") not in ENDED and (path / WORKERS).is_dir():
                        return cls(path, lock, run, [], open_packs(path, None), {}, shared=True)
                    lock.release()
            try:
                cls._open_to_workers(path)
            except RunDirectoryError:
                if not is_locked(path) or time.monotonic() > until:
                    raise
                time.sleep(0.2)

    @classmethod
    def _open_to_workers(cls, path: Path) -> None:
        with cls.resume(path) as writer:
            writer._touch()
            with disk_errors(path):
                (path / WORKERS).mkdir(exist_ok=True)

    def __init__(
        self,
        path: Path,
        lock: RunLock,
        run: dict[str, Any],
        tasks: list[TaskDirectory],
        packs: list[Pack],
        beside: dict[str, FileEntry],
        shared: bool = False,
    ):
        """Use `create`, `resume` or `join`; `beside` are the checked files beside the tasks, without run.json."""
        self.shared = shared
        self.path, self.run = path, run
        self.committed = {task.id: task.status for task in tasks}
        for pack in packs:
            self.committed |= pack.statuses()
        self._packs = packs
        self._tasks, self._lock, self._beside = tasks, lock, beside
        self._touched = (
            run.get("status") == "started"
            and run.get("schema") == SCHEMA  # else a new task would lie where an earlier reader does not look
            and not (path / MANIFEST).exists()
        )
        self._queue: deque[_Job] = deque()
        self._waiting: set[str] = set()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._told = False
        self._thread = threading.Thread(target=self._write_queue, name="run-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._told |= kind is not None  # an error already on its way is not hidden by the writer's
        self.close()

    def commit(self, record: dict[str, Any], tensors: dict[str, Array], metadata: dict[str, str]) -> None:
        """Hand over one task; blocks while too much waits. The tensors must not be changed afterwards.

        `record` needs `id` and `status`. Raises ValueError (NaN in the record, an id twice, axes that do not
        fit) and, for this task or an earlier one, DiskError; after a DiskError nothing more is written.
        """
        task_id, status = record.get("id"), record.get("status")
        if not isinstance(task_id, str) or not isinstance(status, str):
            raise ValueError(f"a record needs a text id and status, not {task_id!r} and {status!r}")
        task_id = printable(task_id)
        try:
            job = _Job(task_id, status, encode_json(record), encode(tensors, metadata))
        except ValueError as error:
            raise ValueError(f"task {task_id!r}: {error}") from error
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._has_room(job.size))
            self._raise_error()
            if self._closing:
                raise ValueError("the run is closed")
            if task_id in self._waiting or task_id in self.committed:
                raise ValueError(f"task {task_id!r} is already committed")
            self._queue.append(job)
            self._waiting.add(task_id)
            self._waiting_bytes += job.size
            self._changed.notify_all()

    def take(self, source: TaskFolder | PackedTask) -> None:
        """Copy a task of another run, every byte compared with its checksum; durable when it returns.

        Raises a Fault of that run's file, ValueError for a task that is here already, and DiskError.
        """
        record = source.record()
        with self._changed:
            if record["id"] in self.committed or record["id"] in self._waiting:
                raise ValueError(f"task {record['id']!r} is already committed")
        self._touch()
        copied = _copy_task(self.path, record["id"], record["status"], source)
        with self._changed:
            self._tasks.append(copied)
            self.committed[copied.id] = copied.status

    def has(self, task_id: str) -> bool:
        """Whether a task is committed, by this process or another one."""
        name = printable(task_id)
        return name in self.committed or (
            self.shared and os.path.lexists(self.path / find_task(self.path, name))
        )

    def record(self, task_id: str) -> dict[str, Any] | None:
        """The record of a committed task, compared with its checksum; None where it has none."""
        if not self.has(task_id):
            return None
        task = printable(task_id)
        place = find_task(self.path, task)
        if os.path.lexists(self.path / place):
            return TaskFolder(self.path, place).record()
        pack = next(pack for pack in self._packs if task_hash(task) in pack.rows)
        return PackedTask(pack, task_hash(task)).record()

    def leave(self) -> None:
        """In a forked child: forget this writer, whose lock stays with the parent."""
        self._lock.leave()

    def flush(self) -> None:
        """Return when all that was handed over is durable. Raises DiskError when some of it is not."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queue)
            self._raise_error()

    def finish(self, status: str, **extra: Any) -> None:
        """Flush, rewrite run.json with `status` (done, failed, interrupted) and `extra`, write manifest.json.

        After an error that was already raised `failed` and `interrupted` can still be written, `done` cannot.
        """
        if self.shared:
            raise ValueError("a run that others write to is not ended by one of them")
        with self._changed:
            self._changed.wait_for(lambda: not self._queue)
            if status == "done" or not self._told:
                self._raise_error()
        content = self.run | extra | {"status": status}
        data = encode_signed(content)
        self._touch()
        # The manifest first: a run whose run.json says that it has ended has one, or has lost it.
        beside = {**self._beside, RUN: entry_of(data)}
        manifest = build_manifest(content, self._tasks, beside, closed=True, packs=self._packs)
        replace_file(self.path / MANIFEST, encode_signed(manifest))
        replace_file(self.path / RUN, data)
        with disk_errors(self.path):
            write_pending(self.path, {})
        self.run.update(content)
        self._touched = False
        remove_claims(self.path)

    def close(self) -> None:
        """Write what waits, stop the thread, free the lock. Raises a DiskError that nobody has seen yet."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._lock.release()
        with self._changed:
            if not self._told:
                self._raise_error()

    def _has_room(self, size: int) -> bool:
        fits = self._waiting_bytes + size <= QUEUE_BYTES and len(self._queue) < QUEUE_TASKS
        return fits or not self._queue

    def _raise_error(self) -> None:
        if self._error is not None:
            self._told = True
            raise self._error

    def _write_queue(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                job = self._queue[0]
            try:
                self._touch()
                task = _write_task(self.path, job, self.shared)
            except BaseException as error:  # handed to the caller: a thread has nobody to raise to
                with self._changed:
                    self._error = error
                    self._queue.clear()
                    self._changed.notify_all()
                continue
            with self._changed:
                if task is not None:
                    self._tasks.append(task)
                self.committed[job.id] = job.status
                self._queue.popleft()
                self._waiting.discard(job.id)
                self._waiting_bytes -= job.size
                self._changed.notify_all()

    def _touch(self) -> None:
        """Before the first change to a closed run: it is no longer what its manifest says."""
        if not self._touched:
            derived = {name: [entry] for name, entry in self._beside.items() if name in DERIVED}
            with disk_errors(self.path):
                write_pending(self.path, derived)
            self.run |= {"schema": SCHEMA, "status": "started"}
            replace_file(self.path / RUN, encode_signed(self.run))
            self._drop_manifest()
            self._touched = True

    def _drop_manifest(self) -> None:
        with disk_errors(self.path / MANIFEST):
            try:
                os.unlink(self.path / MANIFEST)
            except FileNotFoundError:
                return
            sync_directory(self.path)


def _write_task(path: Path, job: _Job, shared: bool) -> TaskDirectory | None:
    """Commit a task; None where it is `shared` and another process has committed it."""
    files = {TENSORS: job.tensors.chunks, RECORD: lambda: [job.record]}
    try:
        return _place_task(path, job.id, job.status, files, job.size)
    except DiskError:
        # A rename onto a folder with files fails; and who ended the run meanwhile removed what was half-written.
        if shared and os.path.lexists(path / find_task(path, job.id) / CHECKSUMS):
            return None
        raise


def _copy_task(path: Path, task_id: str, status: str, source: TaskFolder | PackedTask) -> TaskDirectory:
    """A task of another run as it is there."""
    size = sum(entry.bytes for entry in source.files.values())
    content = {name: partial(source.chunks, name) for name in (TENSORS, RECORD)}
    return _place_task(path, task_id, status, content, size, source)


def _place_task(
    path: Path,
    task_id: str,
    status: str,
    content: Mapping[str, Callable[[], Iterable[Any]]],
    size: int,
    source: TaskFolder | PackedTask | None = None,
) -> TaskDirectory:
    """Build the task's directory under a temporary name, make it durable, rename it into place.

    What is not as `source` has it is a Fault of that run, and not placed.
    """
    place, renamed = task_place(task_hash(task_id)), False
    final = path / place
    temporary = final.with_name(f".tmp-{uuid.uuid4().hex}")
    with disk_errors(final, size):
        try:
            if not final.parent.exists():
                with suppress(FileExistsError):  # another worker's
                    os.mkdir(final.parent)
                sync_directory(path / TASKS)
            os.mkdir(temporary)
            files = {name: write_new(temporary / name, chunks()) for name, chunks in content.items()}
            if source is not None:
                for name, entry in files.items():
                    compare_entry(source.path / name, entry, source.files[name], CHECKSUMS)
            files[CHECKSUMS] = write_new(temporary / CHECKSUMS, [encode_checksums(files)])
            sync_directory(temporary)
            os.rename(temporary, final)
            renamed = True
            sync_directory(final.parent)
        except BaseException:
            if renamed:  # a task that is not durable is not committed: no manifest will list it
                with suppress(OSError):
                    os.rename(final, temporary)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return TaskDirectory(task_id, status, files, place)


def _checked(path: Path) -> tuple[dict[str, Any], list[TaskDirectory], list[Pack], dict[str, FileEntry]]:
    """run.json, the tasks in folders and in packs and the files beside them, every byte compared with the last manifest or own checksums."""
    if read_run_json(path).get("status") in ENDED and read_manifest(path) is None:
        # Killed or lost: tasks, inputs and run.json carry checksums of their own, derived files are not signed anew.
        run, manifest = read_run_json(path), None
    else:
        run, manifest = read_checked_run(path)
    listed = None if manifest is None else listed_files(path, manifest)
    tasks = []
    stands = standing(path, listed)
    for place in stands.left:
        remove_folder(path / place)
    for pack in stands.packs:
        for name, entry in pack.files.items():
            compare(pack.path / name, entry, PACK)
    for place in stands.places.values():
        task = committed_task(path, place)
        tasks.append(task)
        for file, entry in task.files.items():
            if listed and listed.get(name := f"{place}/{file}", entry) != entry:
                raise FileFault(path / name, "altered", f"its checksum is not the one in {MANIFEST}")
    for name in sorted(listed or ()):
        if name.startswith((f"{TASKS}/", f"{PACKS}/")) and not os.path.lexists(path / name):
            raise FileFault(path / name, "missing")
    beside = input_entries(path, run)
    checked_inputs(path, run)
    manifest = read_manifest(path)  # one that was written just before a process was killed counts here
    known = acceptable(path, None if manifest is None else listed_files(path, manifest))
    for name in DERIVED:
        if name in (MEASURES, REPORT) and name not in known and os.path.lexists(path / name):
            os.unlink(path / name)  # nothing can tell whether it is right, and it is soon made again
        elif os.path.lexists(path / name):
            beside[name] = checksum_file(path / name)
            check_derived(path / name, beside[name], known)
        elif name in known and ABSENT not in known[name]:
            raise FileFault(path / name, "missing", f"`probe analyze {path}` makes it again")
    return run, tasks, stands.packs, beside


def prepare(path: Path) -> None:
    """Before the model loads: raise what `RunWriter.create` would. The directory must be new or empty, and writable."""
    path = Path(path)
    if path.exists():
        if not path.is_dir():
            raise RunDirectoryError(f"{path}: is not a directory: give another --out")
        refuse_content(path)
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    trial = existing / f".tmp-{uuid.uuid4().hex}"
    with disk_errors(path):
        os.mkdir(trial)
        os.rmdir(trial)


def copy_run(run: Path, path: Path) -> None:
    """Copy a run's directory to `path`, in place of the run that is there.

    Raises RunDirectoryError where `path` is something else, and DiskError.
    """
    if os.path.lexists(path) and not (path / RUN).is_file():
        raise RunDirectoryError(f"{path}: holds no run and is not replaced: give another directory")
    if path.exists() and path.samefile(run):
        return
    new = path.parent / f".tmp-{uuid.uuid4().hex}"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(run, new, symlinks=True, ignore=shutil.ignore_patterns(LOCK, WORKERS))
        if path.exists():
            shutil.rmtree(path)
        os.rename(new, path)


def remove_temporaries(path: Path, inner: str = TASKS) -> None:
    """Remove what interrupted writes left in a directory, in one within it and in its folders of tasks; only under the lock."""
    if os.path.lexists(path / inner):
        check_directory(path / inner)
    packs = [path / PACKS] if os.path.lexists(path / PACKS) else []
    for directory in packs:
        check_directory(directory)
    for directory in (path, *packs, *prefixes(path / inner)):
        with disk_errors(directory):
            for name in names_in(directory):
                if not TEMPORARY.fullmatch(name):
                    continue
                if (directory / name).is_dir() and not (directory / name).is_symlink():
                    shutil.rmtree(directory / name)
                else:
                    os.unlink(directory / name)


def remove_folder(folder: Path) -> None:
    """Rename a folder, then remove it: no half of one is ever seen under its name."""
    gone = folder.with_name(f".tmp-{uuid.uuid4().hex}")
    with disk_errors(folder):
        os.rename(folder, gone)
        shutil.rmtree(gone)


def refuse_content(path: Path, but: str = "") -> None:
    """Raise RunDirectoryError when the directory holds more than the traces of a start that failed."""
    content = [name for name in os.listdir(path) if name != LOCK and not TEMPORARY.fullmatch(name)]
    if but in content or nothing_committed(path):
        return
    if RUN in content:
        raise RunDirectoryError(
            f"{path}: holds a run already: `probe resume {path}` continues it, or give another --out"
        )
    raise RunDirectoryError(f"{path}: is not empty (it holds {sorted(content)[0]!r}): give another --out")


def _run_id(path: Path) -> str:
    return path.name if re.fullmatch(r"[a-z0-9-]{1,64}", path.name) else default_path().name


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
