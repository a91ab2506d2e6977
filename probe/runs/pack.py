"""Sealing finished tasks into packs, and taking them out again. Killed at any instant, either loses nothing.

A pack is written beside the folders, fsynced, read back whole and compared with the checksums of the folders, renamed; then the
manifest names it in their place, and only then do the folders go. `unpack_run` is the same the other way round.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from blake3 import blake3

from probe.runs.files import (
    CHECKSUMS,
    MANIFEST,
    PACKS,
    RECORD,
    SCHEMA,
    TASKS,
    TENSORS,
    FileEntry,
    FileFault,
    RunLock,
    check_directory,
    checksum_file,
    disk_errors,
    encode_signed,
    entry_of,
    read_file,
    replace_file,
    sync_directory,
    write_new,
)
from probe.runs.folder import TaskFolder
from probe.runs.layout import task_hash, task_place
from probe.runs.manifest import (
    compare_entry,
    encode_checksums,
    in_order,
    listed_files,
    listing,
    read_checked_run,
    wanted_ids,
)
from probe.runs.packed import (
    INDEX,
    INDEX_ROWS,
    PACK,
    RECORDS,
    TABLE,
    Pack,
    PackedTask,
    Standing,
    standing,
)
from probe.runs.tensors import Header, TensorInfo, encode_header, read_header
from probe.runs.write import remove_folder, remove_temporaries

if TYPE_CHECKING:
    import pyarrow

PACK_BYTES = 2 * 2**30
"""Bytes of tensors at which a pack is full."""
PACK_TENSORS = 200_000
"""Tensors at which one is full: its header, which whoever opens it reads whole, stays below 30 MB."""
FRAME_BYTES = 256 * 2**10
"""Bytes of records that are compressed together: what is read for one of them."""

Told = Callable[[int], None]
"""Called with the number of tasks that one step has done."""


@dataclass
class Packing:
    """What `pack_run` or `unpack_run` did, or would do."""

    n_tasks: int = 0
    n_packs: int = 0
    n_bytes: int = 0
    """Bytes of the tasks before."""
    n_files: int = 0
    """Files of the tasks before."""
    n_left: int = 0
    """Traces of a packing that was cut, which were removed."""

    def document(self) -> dict[str, int]:
        return asdict(self)


class _FolderToPack(NamedTuple):
    """A task that is to be packed."""

    name: str
    place: str
    header: Header
    n_bytes: int


def pack_run(
    path: str | Path,
    pack_bytes: int = PACK_BYTES,
    *,
    dry_run: bool = False,
    begins: Told | None = None,
    told: Told | None = None,
) -> Packing:
    """Seal the tasks of a run that lie in folders into packs of about `pack_bytes` bytes of tensors.

    The run reads as before, finished or not; space for one more pack is needed meanwhile. `dry_run` changes nothing; `begins` is called with
    the number of tasks before the first one. Raises
    RunDirectoryError (busy, or no run), ArtifactCorrupt where a task is not what was saved (it stays as it is) and DiskError.
    """
    path, done = Path(path), Packing()
    read_checked_run(path)  # before a lock is left in what is no run
    if dry_run:
        _, stands = _stand(path)
        done.n_left = len(stands.left)
        for group in _groups(path, _order(path, stands), stands, pack_bytes):
            _count(done, group)
        return done
    with RunLock(path):
        remove_temporaries(path)
        listed, stands = _stand(path)
        done.n_left = _clear(path, stands.left)
        if begins:
            begins(len(stands.places))
        for group in _groups(path, _order(path, stands), stands, pack_bytes):
            new = _seal(path, group, listed, told)
            _switch(path, [source.place for source in group], new.entries(), {})
            _remove_folders(path, [source.place for source in group])
            _count(done, group)
    return done


def unpack_run(
    path: str | Path, *, dry_run: bool = False, begins: Told | None = None, told: Told | None = None
) -> Packing:
    """Put every packed task back into a folder of its own, byte for byte as it was. Raises as `pack_run`."""
    path, done = Path(path), Packing()
    read_checked_run(path)
    if dry_run:
        stands = _stand(path)[1]
        done.n_left = len(stands.left)
        for entry in stands.packs:
            done.n_tasks, done.n_packs = done.n_tasks + entry.n_tasks, done.n_packs + 1
            done.n_bytes, done.n_files = done.n_bytes + entry.bytes, done.n_files + 5
        return done
    with RunLock(path):
        remove_temporaries(path)
        stands = _stand(path)[1]
        done.n_left = _clear(path, stands.left)
        if begins:
            begins(sum(entry.n_tasks for entry in stands.packs))
        for entry in stands.packs:
            files: dict[str, FileEntry] = {}
            for name in entry.rows:
                files |= _unseal(path, PackedTask(entry, name))
                if told:
                    told(1)
            back = dict(zip(entry.task_ids, map(task_place, entry.rows), strict=True))
            _switch(path, [f"{PACKS}/{entry.name}"], files, back)
            remove_folder(path / PACKS / entry.name)
            done.n_tasks, done.n_packs = done.n_tasks + entry.n_tasks, done.n_packs + 1
            done.n_bytes, done.n_files = done.n_bytes + entry.bytes, done.n_files + 5
        if stands.packs:
            with suppress(OSError):
                os.rmdir(path / PACKS)
    return done


def _stand(path: Path) -> tuple[dict[str, FileEntry] | None, Standing]:
    _, manifest = read_checked_run(path)
    listed = None if manifest is None else listed_files(path, manifest)
    return listed, standing(path, listed)


def _clear(path: Path, left: Sequence[str]) -> int:
    for place in left:
        remove_folder(path / place)
    return len(left)


def _order(path: Path, stands: Standing) -> list[str]:
    """Hashes of the tasks in folders, in the order of the task file."""
    run, _ = read_checked_run(path)
    wanted = [name for name in map(task_hash, wanted_ids(run)) if name in stands.places]
    return [*dict.fromkeys(wanted), *sorted(set(stands.places) - set(wanted))]


def _groups(
    path: Path, order: Sequence[str], stands: Standing, pack_bytes: int
) -> Iterator[list[_FolderToPack]]:
    group: list[_FolderToPack] = []
    n_bytes = n_tensors = 0
    for name in order:
        place = stands.places[name]
        header = read_header(path / place / TENSORS)
        size, count = header.size - header.data_start, len(header.tensors)
        if group and (n_bytes + size > pack_bytes or n_tensors + count > PACK_TENSORS):
            yield group
            group, n_bytes, n_tensors = [], 0, 0
        record = os.stat(path / place / RECORD).st_size
        group.append(_FolderToPack(name, place, header, header.size + record))
        n_bytes, n_tensors = n_bytes + size, n_tensors + count
    if group:
        yield group


def _count(done: Packing, group: Sequence[_FolderToPack]) -> None:
    done.n_tasks += len(group)
    done.n_packs += 1
    done.n_bytes += sum(source.n_bytes for source in group)
    done.n_files += 3 * len(group)


# --- writing a pack ---


def _seal(
    path: Path, group: Sequence[_FolderToPack], listed: dict[str, FileEntry] | None, told: Told | None
) -> Pack:
    """Write a pack under a temporary name, make it durable, read all of it back, and rename it."""
    temporary = path / PACKS / f".tmp-{uuid.uuid4().hex}"
    with disk_errors(temporary, sum(source.n_bytes for source in group)):
        if not (path / PACKS).exists():
            os.mkdir(path / PACKS)
            sync_directory(path)
        check_directory(path / PACKS)
        try:
            os.mkdir(temporary)
            name, sources = _fill(path, temporary, group, listed, told)
            _read_back(Pack(path, temporary.name), sources)
            os.rename(temporary, path / PACKS / name)
            sync_directory(path / PACKS)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return Pack(path, name)


def _fill(
    path: Path,
    temporary: Path,
    group: Sequence[_FolderToPack],
    listed: dict[str, FileEntry] | None,
    told: Told | None,
) -> tuple[str, dict[str, dict[str, FileEntry]]]:
    """The files of a pack; returns its name, and what the files of each task were."""
    offsets, header = _layout(group)
    rows: list[dict[str, Any]] = []
    index: list[dict[str, Any]] = []
    records = _RecordFrames()
    counts: Counter[str] = Counter()
    sources: dict[str, dict[str, FileEntry]] = {}
    tensors = temporary / TENSORS
    descriptor = os.open(tensors, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        _write_at(descriptor, header, 0)
        for source in group:
            folder = TaskFolder(path, source.place, listed)
            sources[source.name] = folder.files
            data = read_file(path / source.place / TENSORS)
            compare_entry(path / source.place / TENSORS, entry_of(data), folder.files[TENSORS], CHECKSUMS)
            record = folder.record()
            counts[record["status"]] += 1
            first = len(index)
            for name, info in source.header.tensors.items():
                part = memoryview(data)[source.header.offset(name) :][: info.n_bytes]
                offset = offsets[source.name, name]
                _write_at(descriptor, part, offset)
                index.append(
                    {
                        "task": record["id"], "tensor": name, "dtype": info.dtype, "shape": list(info.shape), "pack": "",
                        "offset": offset, "bytes": info.n_bytes, "blake3": entry_of(part).blake3,
                    }
                )  # fmt: skip
            line = read_file(path / source.place / RECORD)
            rows.append(
                {
                    "task": record["id"], "hash": source.name, "status": record["status"],
                    "metadata": json.dumps(source.header.metadata, ensure_ascii=False),
                    "first_tensor": first, "n_tensors": len(index) - first,
                    "tensors_bytes": len(data), "tensors_blake3": folder.files[TENSORS].blake3,
                    "record_bytes": len(line), "record_blake3": folder.files[RECORD].blake3,
                    "record_start": records.add(line),
                }
            )  # fmt: skip
            if told:
                told(1)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for row, frame in zip(rows, records.frames(), strict=True):
        row |= frame
    name = _name(sources)
    for row in index:
        row["pack"] = name
    files = {
        TENSORS: checksum_file(tensors),
        RECORDS: write_new(temporary / RECORDS, records.chunks),
        TABLE: write_new(temporary / TABLE, [_parquet(rows, _table_schema(), 1 << 20)]),
        INDEX: write_new(temporary / INDEX, [_parquet(index, _index_schema(), INDEX_ROWS)]),
    }
    content = {
        "schema": SCHEMA,
        "n_tasks": len(rows),
        "counts": dict(sorted(counts.items())),
        "files": {file: files[file]._asdict() for file in sorted(files)},
    }
    write_new(temporary / PACK, [encode_signed(content)])
    sync_directory(temporary)
    return name, sources


def _layout(group: Sequence[_FolderToPack]) -> tuple[dict[tuple[str, str], int], bytes]:
    """Where each tensor lies, and the bytes before the data. Widest items first, which aligns all; then name by name, so that one
    site of all tasks is one stretch of the file."""
    order = sorted(
        (-info.item_bytes, name.rpartition("/")[2], name, number)
        for number, source in enumerate(group)
        for name, info in source.header.tensors.items()
    )
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for _, _, name, number in order:
        info = group[number].header.tensors[name]
        end += info.n_bytes
        tensors[f"{group[number].name}/{name}"] = info._replace(end=end)
    header = encode_header(tensors, {"schema": str(SCHEMA), "format": "probe pack"})
    offsets = {
        (group[number].name, name): len(header) + info.end - info.n_bytes
        for (_, _, name, number), info in zip(order, tensors.values(), strict=True)
    }
    return offsets, header


def _name(sources: dict[str, dict[str, FileEntry]]) -> str:
    """The name of a pack follows from what it holds."""
    checksum = blake3()
    for name, files in sources.items():
        checksum.update(f"{name} {files[RECORD].blake3} {files[TENSORS].blake3}\n".encode())
    return checksum.hexdigest()[:16]


def _write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view.nbytes:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


class _RecordFrames:
    """Records in frames of zstd, each of some of them."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self._frames: list[dict[str, int]] = []
        self._waiting: list[bytes] = []
        self._length = self._offset = 0

    def add(self, line: bytes) -> int:
        """Where the line starts in its frame."""
        start = self._length
        self._waiting.append(line)
        self._length += len(line)
        if self._length >= FRAME_BYTES:
            self._close()
        return start

    def frames(self) -> list[dict[str, int]]:
        """The frame of each line."""
        self._close()
        return self._frames

    def _close(self) -> None:
        import pyarrow as pa

        if not self._waiting:
            return
        packed: bytes = pa.Codec("zstd").compress(b"".join(self._waiting), asbytes=True)
        frame = {"frame_offset": self._offset, "frame_bytes": len(packed), "frame_length": self._length}
        self._frames += [frame] * len(self._waiting)
        self.chunks.append(packed)
        self._offset += len(packed)
        self._waiting, self._length = [], 0


def _table_schema() -> pyarrow.Schema:
    import pyarrow as pa

    texts = ("task", "hash", "status", "metadata", "tensors_blake3", "record_blake3")
    numbers = ("first_tensor", "n_tensors", "tensors_bytes", "record_bytes", "record_start")
    frames = ("frame_offset", "frame_bytes", "frame_length")
    fields = [pa.field(name, pa.string(), False) for name in texts]
    return pa.schema([*fields, *(pa.field(name, pa.int64(), False) for name in (*numbers, *frames))])


def _index_schema() -> pyarrow.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            *(pa.field(name, pa.string(), False) for name in ("task", "tensor", "dtype")),
            pa.field("shape", pa.list_(pa.field("item", pa.int64(), False)), False),
            pa.field("pack", pa.string(), False),
            pa.field("offset", pa.int64(), False),
            pa.field("bytes", pa.int64(), False),
            pa.field("blake3", pa.string(), False),
        ]
    )


def _parquet(rows: list[dict[str, Any]], schema: pyarrow.Schema, group: int) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, sink, compression="zstd", row_group_size=group)
    return sink.getvalue()


def _read_back(new: Pack, sources: dict[str, dict[str, FileEntry]]) -> None:
    """Raise a Fault unless every byte of a pack is what the folders held."""
    if list(new.rows) != list(sources):
        raise FileFault(new.path / TABLE, "altered", "not the tasks that were written")
    for name, files in sources.items():
        task = PackedTask(new, name)
        if task.files != files:
            raise FileFault(new.path / TABLE, "altered", f"not the checksums of {name}")
        task.record()
        compare_entry(new.path / TENSORS, entry_of_chunks(task.chunks(TENSORS)), files[TENSORS], CHECKSUMS)


def entry_of_chunks(chunks: Iterable[bytes | bytearray]) -> FileEntry:
    checksum, size = blake3(), 0
    for chunk in chunks:
        checksum.update(chunk)
        size += len(chunk)
    return FileEntry(size, checksum.hexdigest())


# --- taking a task out of one ---


def _unseal(path: Path, task: PackedTask) -> dict[str, FileEntry]:
    """Write the folder of a packed task; returns its files by their place in the run."""
    name = task.hash
    final = path / task_place(name)
    temporary = final.with_name(f".tmp-{uuid.uuid4().hex}")
    with disk_errors(final):
        for parent in (path / TASKS, final.parent):
            if not parent.exists():
                os.mkdir(parent)
                sync_directory(parent.parent)
        try:
            os.mkdir(temporary)
            files = {
                TENSORS: write_new(temporary / TENSORS, task.chunks(TENSORS)),
                RECORD: write_new(temporary / RECORD, task.chunks(RECORD)),
            }
            for file, entry in files.items():
                compare_entry(task.path / file, entry, task.files[file], TABLE)
            files[CHECKSUMS] = write_new(temporary / CHECKSUMS, [encode_checksums(files)])
            sync_directory(temporary)
            os.rename(temporary, final)
            sync_directory(final.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return {f"{task_place(name)}/{file}": entry for file, entry in files.items()}


# --- what counts ---


def _switch(path: Path, gone: Sequence[str], new: dict[str, FileEntry], back: dict[str, str]) -> None:
    """Have the manifest name new files in place of all in the folders `gone`, in one rename; a run without one needs none.

    `back` has the tasks that lie in folders from now on: id → place.
    """
    run, manifest = read_checked_run(path)
    if manifest is None:
        return
    places = set(gone)
    listed = listed_files(path, manifest)
    kept = {name: entry for name, entry in listed.items() if name.rpartition("/")[0] not in places} | new
    tasks = {task_id: place for task_id, place in manifest["tasks"].items() if place not in places} | back
    packs = sorted({name.split("/")[1] for name in kept if name.startswith(f"{PACKS}/")})
    content = {key: value for key, value in manifest.items() if key not in ("packs", "files", "tasks")} | {
        "schema": SCHEMA,
        **({"packs": {name: Pack(path, name).n_tasks for name in packs}} if packs else {}),
        "tasks": {task_id: tasks[task_id] for task_id in in_order(list(tasks), wanted_ids(run))},
        "files": listing(kept),
    }
    replace_file(path / MANIFEST, encode_signed(content))


def _remove_folders(path: Path, places: Sequence[str]) -> None:
    for place in places:
        remove_folder(path / place)
    for prefix in {(path / place).parent for place in places} - {path / TASKS}:
        with suppress(OSError):  # holds others
            os.rmdir(prefix)
