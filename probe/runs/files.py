"""Files of a run directory: durable writes, reads that never follow a link, and the lock.

A write is durable when it returns: every file is fsync'd before the rename that makes it visible, and the
folder after it. run.json and manifest.json carry a checksum of themselves, which every reading compares.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import json
import os
import re
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from blake3 import blake3

from probe.errors import ArtifactCorrupt, DiskError, RunDirectoryError, UsageError
from probe.runs.remote import Ranges, RunUrl

SCHEMA = 2
"""Version of the run directory's layout; a reader refuses a higher one. In 1 a task's folder lies in tasks/ itself."""

RUN, MANIFEST, MEASURES, REPORT = "run.json", "manifest.json", "measures.parquet", "report.html"
INTERVENTIONS, REASONING = "interventions.parquet", "reasoning.parquet"
PROMPTING, ATTRIBUTION, PATCHING = "prompting.parquet", "attribution.parquet", "patching.parquet"
STEERING, FEATURES = "steering.parquet", "features.parquet"
TASKS, PACKS, LOCK, WORKERS = "tasks", "packs", ".lock", ".workers"
RECORD, TENSORS, CHECKSUMS = "record.json", "tensors.safetensors", "checksums.json"
TASK_FILES = (CHECKSUMS, RECORD, TENSORS)
DERIVED = (INTERVENTIONS, ATTRIBUTION, PATCHING, STEERING, FEATURES, REASONING, PROMPTING, MEASURES, REPORT)
"""Files that are computed from the tasks again and again; all others are written once."""
TASK_FILE, CATALOGUE, EDITS = "task_file.jsonl", "catalogue.json", "edits.safetensors"
INPUTS = (TASK_FILE, CATALOGUE, EDITS)
"""What the run was given: the task file byte for byte, the tools of its catalogue, and the edits that it is under."""
CHECKSUM = "blake3"
"""Last key of a file that carries its own checksum: of the file without it."""
ENDED = ("done", "failed", "interrupted")
"""Statuses of a run that nobody writes to, all of whose files the manifest lists."""

TEMPORARY = re.compile(r"\.tmp-(.+-)?[0-9a-f]{32}")
"""What an interrupted write leaves behind; never read, removed by the next writer."""

_CHUNK = 1 << 20
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_PERMISSION = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_BROKEN_DISK = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO}
_ENDS_IN_CHECKSUM = re.compile(rb':"[^"]{64}"\}\n?\Z')
_LOCK_WAIT_S = 0.25


class FileEntry(NamedTuple):
    """Size and checksum of one file."""

    bytes: int
    blake3: str


class FileFault(ArtifactCorrupt):
    """One file is not what was saved. `kind`: missing, truncated, altered, extra or unreadable."""

    def __init__(self, path: Path, kind: str, detail: str = ""):
        self.path, self.kind, self.detail = path, kind, detail
        super().__init__(self.describe())

    def describe(self, root: Path | None = None) -> str:
        name = self.path.relative_to(root) if root is not None else self.path
        return f"{name}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


# --- writing ---


@contextmanager
def disk_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError into a DiskError that names `path`, the bytes needed and the way out."""
    try:
        yield
    except OSError as error:
        size = "" if needed is None else f" ({needed} bytes to write)"
        if error.errno in _NO_SPACE:
            goes_on = _resumable(path)
            elsewhere = "" if goes_on == _SAME_COMMAND else " or give another --out"
            advice = f"free some space{elsewhere}{goes_on}"
        elif error.errno in _NO_PERMISSION:
            advice = "make the folder writable or give another --out"
        else:
            advice = f"check the disk{_resumable(path)}"
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DiskError(f"{path}: cannot write{size}: {reason}: {advice}") from error


@contextmanager
def temporary_files() -> Iterator[None]:
    """Turn an OSError of a temporary file into a DiskError that names the folder of these: it may lie on another disk than
    what is written in the end."""
    try:
        yield
    except OSError as error:
        import tempfile

        reason = os.strerror(error.errno) if error.errno else str(error)
        folder = tempfile.tempdir or os.environ.get("TMPDIR") or "/tmp"
        raise DiskError(
            f"{folder}: cannot hold temporary files: {reason}: free some space there, or set TMPDIR to another folder"
        ) from error


_SAME_COMMAND = "; what was committed is intact, and the same command goes on"


def _resumable(path: Path) -> str:
    """How the run that a file belongs to goes on; empty where it belongs to none."""
    for folder in (path, *path.parents):
        if os.path.lexists(folder / RUN) and os.path.lexists(folder / LOCK):
            if os.path.lexists(folder / MANIFEST):  # it has ended: what failed is done with it, not its tasks
                return _SAME_COMMAND
            return f"; what was committed is intact, and `probe resume {folder}` continues the run"
    return ""


def read_fault(path: Path, error: OSError) -> ArtifactCorrupt | DiskError:
    """What an OSError of a reading says: a disk that fails is a DiskError, anything else a Fault of the file."""
    reason = os.strerror(error.errno or errno.EIO)
    if (error.errno or errno.EIO) in _BROKEN_DISK:
        return DiskError(f"{path}: cannot be read: {reason}: check the disk")
    return FileFault(path, "unreadable", "a symbolic link" if error.errno == errno.ELOOP else reason)


def encode_json(value: Any) -> bytes:
    """UTF-8 JSON with one trailing newline. A lone surrogate becomes U+FFFD.

    Raises ValueError on NaN and infinities, which JSON has no word for, naming where they are.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise ValueError(f"{_nonfinite(value) or 'value'}: {error}") from error
    return printable(text).encode() + b"\n"


def encode_signed(value: dict[str, Any]) -> bytes:
    """One JSON line that ends with the checksum of the line without it."""
    content = {key: part for key, part in value.items() if key != CHECKSUM}
    return encode_json(content | {CHECKSUM: blake3(encode_json(content)).hexdigest()})


def decode_signed(path: Path, data: bytes, counts: bool = False) -> dict[str, Any]:
    """The JSON object in `data`; a Fault where it carries a checksum that is not its own.

    One without a checksum was written by an earlier version, or by hand: it has no key `CHECKSUM`. `counts`: its numbers
    are all counts, so that it may be read at a third of the time by what rounds integers beyond 64 bits.
    """
    signed = is_signed(data)
    value = _counted(data) if counts and signed else None
    if value is None:
        value = decode_json(path, data)
    # By its look too: the damage may be in the key.
    if signed or (CHECKSUM not in value and not _ENDS_IN_CHECKSUM.search(data)):
        return value
    if encode_signed(value) != data:  # else a file of this key alone
        raise FileFault(path, "altered", "its own checksum differs")
    return value


def _counted(data: bytes) -> dict[str, Any] | None:
    try:
        value: Any = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_signed(data: bytes) -> bool:
    """Whether JSON ends with the checksum of what stands before, as `encode_signed` writes it: then it is as it was written."""
    end = data[-len(_SIGNATURE) :]
    given = end[len(CHECKSUM) + 5 : -3]
    if end[:-67] != _SIGNATURE[:-67] or end[-3:] != _SIGNATURE[-3:]:
        return False
    return blake3(data[: -len(end)] + b"}\n").hexdigest().encode() == given


_SIGNATURE = f',"{CHECKSUM}":"{64 * "0"}"}}\n'.encode()


def entry_of(data: bytes | memoryview) -> FileEntry:
    """Size and checksum of a file with these bytes."""
    return FileEntry(len(data), blake3(data).hexdigest())


def printable(text: str) -> str:
    """`text` with each lone surrogate, which UTF-8 cannot hold, as U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _nonfinite(value: Any, where: str = "") -> str | None:
    """Path of the first NaN or infinity in a JSON tree."""
    if isinstance(value, float):
        return where if value != value or value in (float("inf"), float("-inf")) else None
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value if isinstance(value, (list, tuple)) else ())
    )
    return next(
        filter(None, (_nonfinite(child, f"{where}.{key}".lstrip(".")) for key, child in children)), None
    )


def write_new(path: Path, chunks: Iterable[Any]) -> FileEntry:
    """Create `path` (which must not exist), write the buffers, fsync. The mode follows the umask."""
    checksum, size = blake3(), 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            checksum.update(view)
            size += view.nbytes
            while view.nbytes:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileEntry(size, checksum.hexdigest())


def sync_directory(path: Path) -> None:
    """Make the names inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes | Iterable[bytes]) -> FileEntry:
    """Write `path` atomically, at once or piece by piece: readers see the old bytes or the new ones, also after a power
    cut, and the old ones where a piece cannot be had."""
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
    whole = isinstance(data, bytes)
    with disk_errors(path, len(data) if whole else None):
        try:
            entry = write_new(temporary, [data] if whole else data)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_directory(path.parent)
    return entry


# --- reading ---


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, int]]:
    """Descriptor and size of a regular file, for `read_at`; a link, a pipe or a missing file is a Fault. The one place where a
    file at a URL is told from one of this machine."""
    if isinstance(path, RunUrl):
        try:
            ranges = Ranges(path)
        except FileNotFoundError:
            raise FileFault(path, "missing") from None
        yield ranges, ranges.size
        return
    try:
        # O_NONBLOCK: a pipe planted under a known name must not hang the reader.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FileFault(path, "missing") from None
    except OSError as error:
        raise read_fault(path, error) from error
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise FileFault(path, "unreadable", "not a regular file")
        yield descriptor, info.st_size
    except OSError as error:
        raise read_fault(path, error) from error
    finally:
        os.close(descriptor)


def check_directory(path: Path) -> None:
    """Raise a Fault unless `path` is a directory itself, not a link to one. At a URL there are files alone."""
    if isinstance(path, RunUrl):
        return
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        raise FileFault(path, "missing") from None
    except OSError as error:
        raise read_fault(path, error) from error
    if not stat.S_ISDIR(mode):
        raise FileFault(path, "unreadable", "a symbolic link" if stat.S_ISLNK(mode) else "not a directory")


def names_in(path: Path) -> list[str]:
    """Sorted names in a directory."""
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        raise FileFault(path, "missing") from None
    except OSError as error:
        raise read_fault(path, error) from error


def read_at(descriptor: Any, size: int) -> bytes:
    """The next `size` bytes of what was `opened`, fewer at the end of the file."""
    if isinstance(descriptor, Ranges):
        return descriptor.read(size)
    parts = []
    while size > 0 and (part := os.read(descriptor, min(size, 64 * _CHUNK))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_into(descriptor: int, data: bytearray, offset: int) -> int:
    """Fill a buffer from the bytes at an offset; returns how many there were."""
    view, done = memoryview(data), 0
    while done < len(view) and (count := os.preadv(descriptor, [view[done:]], offset + done)):
        done += count
    return done


def read_file(path: Path) -> bytes:
    with opened(path) as (descriptor, size):
        return read_at(descriptor, size)


def read_pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a piece at a time."""
    with opened(path) as (descriptor, _):
        while part := read_at(descriptor, _CHUNK):
            yield part


def checksum_file(path: Path) -> FileEntry:
    """Size and checksum by plain reads: a map of a file that shrinks meanwhile would kill the process."""
    return checksum_and_start(path)[0]


def checksum_and_start(path: Path) -> tuple[FileEntry, bytes]:
    """Size and checksum, and the first megabyte, of a file that is read once."""
    with opened(path) as (descriptor, expected):
        start = read_at(descriptor, min(_CHUNK, expected))
        checksum, size = blake3(start), len(start)
        if size < expected or size == _CHUNK:
            view = memoryview(bytearray(_CHUNK))
            while part := _next(descriptor, view):
                checksum.update(part)
                size += len(part)
    return FileEntry(size, checksum.hexdigest()), start


def _next(descriptor: Any, view: memoryview) -> memoryview | bytes:
    """The next bytes of what was `opened`, in a buffer where it is a file: a new one for each piece takes as long as its checksum."""
    if isinstance(descriptor, Ranges):
        return descriptor.read(len(view))
    return view[: os.readv(descriptor, [view])]


def decode_json(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, which came from `path`; anything else is a Fault."""
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FileFault(path, "unreadable", f"not JSON: {error}"[:200]) from error
    if not isinstance(value, dict):
        raise FileFault(path, "unreadable", "not a JSON object")
    return value


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _near(path: Path) -> str:
    """What to do about a directory that there is none of: the nearest name beside it, else where names are listed."""
    with suppress(OSError):
        names = [entry.name for entry in os.scandir(path.parent) if entry.is_dir()]
        if near := difflib.get_close_matches(path.name, names, n=1):
            return f"did you mean {path.parent / near[0]}?"
    return "`probe ls` lists runs"


def read_run_json(path: Path, any_schema: bool = False) -> dict[str, Any]:
    """run.json of the run directory `path`. Raises RunDirectoryError when it is no run or too new a one."""
    if isinstance(path, RunUrl):
        return _read_run_at(path, any_schema)
    if not path.is_dir():
        raise RunDirectoryError(f"{path}: no such run directory: {_near(path)}")
    if not any(os.path.lexists(path / name) for name in (RUN, MANIFEST, TASKS)):
        raise RunDirectoryError(
            f"{path}: not a run directory (no {RUN} in it): `probe ls {path}` lists the runs in it"
        )
    if not os.path.lexists(path / RUN) and nothing_committed(path):
        raise RunDirectoryError(
            f"{path}: the run was stopped before it began: `probe run TASKS --out {path}` begins it again"
        )
    return _known_schema(path, decode_signed(path / RUN, read_file(path / RUN)), any_schema)


def _read_run_at(path: Path, any_schema: bool) -> dict[str, Any]:
    """run.json of a run at a URL. Raises RunDirectoryError where there is none, or where it has not ended."""
    try:
        run = decode_signed(path / RUN, read_file(path / RUN))
    except FileFault as fault:
        if fault.kind != "missing":
            raise
        raise RunDirectoryError(
            f"{path}: no run lies there ({RUN} is not found): check the address"
        ) from None
    if run.get("status") not in ENDED:
        raise RunDirectoryError(f"{path}: has not ended: a run is read from a URL when it is whole")
    return _known_schema(path, run, any_schema)


def _known_schema(path: Path, run: dict[str, Any], any_schema: bool) -> dict[str, Any]:
    schema = run.get("schema")
    if isinstance(schema, int) and schema > SCHEMA and not any_schema:
        raise RunDirectoryError(
            f"{path}: written by a newer probe (schema {schema}, known {SCHEMA}): upgrade probe"
        )
    return run


@contextmanager
def header_faults(path: Path) -> Iterator[None]:
    """A key that run.json of the run `path` lacks is a Fault of it."""
    try:
        yield
    except KeyError as error:
        raise FileFault(path / RUN, "altered", f"has no {error}") from error


def nothing_committed(path: Path) -> bool:
    """Whether a directory holds no more than a run leaves that was stopped before its run.json was there."""
    names = {name for name in os.listdir(path) if not TEMPORARY.fullmatch(name)}
    # A task file of the user may have the name of an input: without the lock beside it it is none.
    traces = {LOCK, TASKS, *INPUTS} if {LOCK, TASKS} <= names else {LOCK, TASKS}
    if names - traces:
        return False
    return TASKS not in names or ((path / TASKS).is_dir() and not os.listdir(path / TASKS))


# --- the lock ---


class RunLock:
    """Right to change a run directory: alone, or `shared` with workers that only add tasks. The kernel frees it when the
    process dies, however it dies.

    Raises RunDirectoryError within a quarter of a second when another process (or another lock of this one)
    holds it. The short wait is there because `is_locked` holds the lock for an instant.
    """

    def __init__(self, path: Path, shared: bool = False):
        if isinstance(path, RunUrl):
            raise UsageError(f"{path}: a run at a URL is read alone: copy it here first, or name an output")
        name = path / LOCK
        with disk_errors(name):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(name, flags, 0o666)
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        deadline = time.monotonic() + _LOCK_WAIT_S
        while not _try_lock(self._descriptor, kind, name):
            if time.monotonic() >= deadline:
                who = self._holder(name, shared)
                os.close(self._descriptor)
                raise RunDirectoryError(f"{path}: busy: {who}: wait for it or give another directory")
            time.sleep(0.02)
        if shared:
            return
        if host := working_elsewhere(path):
            self.release()
            raise RunDirectoryError(f"{path}: busy: workers on {host} are at it: wait for them or stop them")
        with suppress(OSError):  # the number only makes the message above better
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def _holder(self, name: Path, shared: bool) -> str:
        if not shared and _try_lock(self._descriptor, fcntl.LOCK_SH, name):
            return "workers are at it"
        holder = os.pread(self._descriptor, 20, 0).decode("ascii", "replace").strip()
        return (
            f"process {holder} is writing to it" if holder.isdigit() else "another process is writing to it"
        )

    def release(self) -> None:
        if self._descriptor >= 0:
            # Closing alone would leave the lock with any child that was forked meanwhile.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self.leave()

    def leave(self) -> None:
        """Close this process's end, as a forked child does: its parent keeps the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_locked(path: Path) -> bool:
    """True while some process writes to the run directory, workers on other machines among them."""
    try:
        with opened(path / LOCK) as (descriptor, _):
            kinds = (fcntl.LOCK_SH, fcntl.LOCK_EX)
            if not all(_try_lock(descriptor, kind, path / LOCK) for kind in kinds):
                return True
    except (FileFault, DiskError):
        return False
    return working_elsewhere(path) is not None


def working_elsewhere(path: Path) -> str | None:
    """Name of another machine whose workers gave a sign of life within their lease: its locks may not be seen here."""
    try:
        names = os.listdir(path / WORKERS)
    except OSError:
        return None
    for name in names:
        try:
            info = os.stat(path / WORKERS / name, follow_symlinks=False)
            if not stat.S_ISREG(info.st_mode) or TEMPORARY.fullmatch(name):
                continue
            worker = json.loads(read_file(path / WORKERS / name))
            if worker["boot"] != boot_id() and time.time() - info.st_mtime < worker["lease_s"]:
                return printable(str(worker["host"]))
        except (OSError, ValueError, KeyError, TypeError, ArtifactCorrupt):
            continue
    return None


@cache
def boot_id() -> str:
    """What all processes under one running kernel have in common: they see each other's locks."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return os.uname().nodename


def _try_lock(descriptor: int, kind: int, path: Path) -> bool:
    try:
        with disk_errors(path):
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except DiskError as error:
        cause = error.__cause__
        if isinstance(cause, BlockingIOError):
            return False
        if isinstance(cause, OSError) and cause.errno in _NO_LOCKS:
            raise DiskError(
                f"{path}: this file system has no locks (flock: {cause.strerror}): give an --out on a local disk"
            ) from cause
        raise
    return True
