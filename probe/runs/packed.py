"""Packs: finished tasks of a run sealed together, read as if each lay in its own folder.

    RUN/packs/<name>/tensors.safetensors   the tensors of all its tasks, HASH/NAME, those of one site behind each other
                     records.jsonl.zst     their records, a line a task, in zstd frames that are read on their own
                     tasks.parquet         a row a task: where its record lies, what its files were
                     index.parquet         a row a tensor: task, tensor, dtype, shape, pack, offset, bytes, blake3
                     pack.json             tasks by status, bytes and blake3 of the four; with its own checksum

A pack is committed by one rename, as a task's folder is, and never changed. Its name follows from what it holds. Where a run has a
manifest, this says which packs and folders count; what else lies there was left by a packing that was cut, and is a copy.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from probe.runs.files import (
    CHECKSUM,
    PACKS,
    RECORD,
    TENSORS,
    FileEntry,
    FileFault,
    check_directory,
    decode_json,
    decode_signed,
    entry_of,
    names_in,
    opened,
    read_file,
    read_into,
)
from probe.runs.layout import task_places
from probe.runs.manifest import check_record, compare_entry
from probe.runs.tensors import Header, TensorInfo, encode_header, mapped_tensor, tensor_of

if TYPE_CHECKING:
    import pyarrow
    import torch

PACK = "pack.json"
TABLE, INDEX, RECORDS = "tasks.parquet", "index.parquet", "records.jsonl.zst"
PACK_FILES = (INDEX, RECORDS, TABLE, TENSORS)
"""Files of a pack beside pack.json, which has their checksums."""
INDEX_ROWS = 4096
"""Rows of a row group of the index: what is read to find the tensors of one task."""

_NAME = re.compile(r"[0-9a-f]{16}")


class PackedRange(NamedTuple):
    """Where the bytes of a tensor lie."""

    path: Path
    offset: int
    info: TensorInfo


class Pack:
    """One pack. Its tables are read when a task of it is asked for, and compared with their checksums then."""

    def __init__(self, run: Path, name: str, entry: FileEntry | None = None):
        """`entry` is what the manifest says of pack.json. Raises a Fault."""
        self.name, self.path = name, run / PACKS / name
        check_directory(run / PACKS)
        check_directory(self.path)
        path = self.path / PACK
        data = read_file(path)
        if entry is not None:
            compare_entry(path, entry_of(data), entry, "manifest.json")
        content = decode_signed(path, data)
        try:
            if CHECKSUM not in content:
                raise ValueError("its own checksum is missing")
            self.n_tasks = int(content["n_tasks"])
            self.counts: dict[str, int] = dict(content["counts"])
            self.files = {file: FileEntry(**content["files"][file]) for file in PACK_FILES}
        except (KeyError, TypeError, ValueError) as error:
            raise FileFault(path, "altered", f"{type(error).__name__} {error}") from error
        self._frames: dict[int, bytes] = {}
        self._groups: dict[int, Any] = {}

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    def entries(self) -> dict[str, FileEntry]:
        """Size and checksum of every file of it, by its place in the run."""
        place = f"{PACKS}/{self.name}"
        files = {**self.files, PACK: entry_of(read_file(self.path / PACK))}
        return {f"{place}/{file}": entry for file, entry in files.items()}

    def _checked(self, name: str) -> bytes:
        data = read_file(self.path / name)
        compare_entry(self.path / name, entry_of(data), self.files[name], PACK)
        return data

    @cached_property
    def table(self) -> pyarrow.Table:
        """tasks.parquet."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        data = self._checked(TABLE)
        try:
            return pq.read_table(io.BytesIO(data), read_dictionary=["metadata"]).combine_chunks()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise FileFault(self.path / TABLE, "altered", f"no table: {error}"[:200]) from error

    @cached_property
    def index(self) -> Any:
        """index.parquet, opened."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        data = self._checked(INDEX)
        try:
            return pq.ParquetFile(io.BytesIO(data))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise FileFault(self.path / INDEX, "altered", f"no table: {error}"[:200]) from error

    @property
    def tensor_column(self) -> str:
        """The column of the index with the names of tensors: `site` in packs of earlier versions."""
        return "tensor" if "tensor" in self.index.schema_arrow.names else "site"

    @cached_property
    def task_ids(self) -> list[str]:
        return self.table["task"].to_pylist()

    def statuses(self) -> dict[str, str]:
        """Task id → status."""
        return dict(zip(self.task_ids, self.table["status"].to_pylist(), strict=True))

    @cached_property
    def rows(self) -> dict[str, int]:
        """Hash → row of the table."""
        rows = {name: number for number, name in enumerate(self.table["hash"].to_pylist())}
        if len(rows) != self.table.num_rows:
            raise FileFault(self.path / TABLE, "altered", "names a task twice")
        return rows

    def row(self, number: int) -> dict[str, Any]:
        return self.table.slice(number, 1).to_pylist()[0]

    def index_rows(self, first: int, count: int) -> list[dict[str, Any]]:
        """Rows of the index, from one on."""
        rows: list[dict[str, Any]] = []
        while count > 0:
            group, within = divmod(first, INDEX_ROWS)
            if group not in self._groups:
                if len(self._groups) >= 4:
                    self._groups.pop(next(iter(self._groups)))
                self._groups[group] = self.index.read_row_group(group)
            part = self._groups[group].slice(within, count).to_pylist()
            if not part:
                raise FileFault(self.path / INDEX, "altered", f"has no row {first}")
            rows += part
            first, count = first + len(part), count - len(part)
        return rows

    def record_bytes(self, row: Mapping[str, Any]) -> bytes:
        """The bytes of one record, as its record.json had them."""
        import pyarrow as pa

        offset = row["frame_offset"]
        if offset not in self._frames:
            path = self.path / RECORDS
            with opened(path) as (descriptor, _):
                packed = os.pread(descriptor, row["frame_bytes"], offset)
            try:
                data = pa.Codec("zstd").decompress(
                    packed, decompressed_size=row["frame_length"], asbytes=True
                )
            except (pa.ArrowException, OSError, ValueError) as error:
                raise FileFault(path, "altered", f"at {offset}: {error}"[:200]) from error
            if len(self._frames) >= 2:
                self._frames.pop(next(iter(self._frames)))
            self._frames[offset] = data
        start = row["record_start"]
        return self._frames[offset][start : start + row["record_bytes"]]


class PackedTask:
    """One task of a pack, as `TaskFolder` is one in a folder."""

    def __init__(self, pack: Pack, name: str):
        """`name` is the task's hash."""
        self.path = pack.path
        self._pack, self.hash = pack, name
        self._row = pack.row(pack.rows[name])
        self._sound: set[str] = set()

    @cached_property
    def files(self) -> dict[str, FileEntry]:
        """What the files of the task's folder were."""
        row = self._row
        return {
            RECORD: FileEntry(row["record_bytes"], row["record_blake3"]),
            TENSORS: FileEntry(row["tensors_bytes"], row["tensors_blake3"]),
        }

    def record_data(self) -> bytes:
        """record.json as it was, compared with its checksum."""
        path = self.path / RECORDS
        data = self._pack.record_bytes(self._row)
        compare_entry(path, entry_of(data), self.files[RECORD], TABLE)
        return data

    def record(self) -> dict[str, Any]:
        path = self.path / RECORDS
        return check_record(path, decode_json(path, self.record_data()), self.hash)

    @cached_property
    def _rows(self) -> dict[str, dict[str, Any]]:
        rows = self._pack.index_rows(self._row["first_tensor"], self._row["n_tensors"])
        if any(row["task"] != self._row["task"] for row in rows):
            raise FileFault(
                self.path / INDEX, "altered", f"rows of {self._row['task']!r} are of another task"
            )
        column = self._pack.tensor_column
        return {row[column]: row for row in rows}

    @cached_property
    def header(self) -> Header:
        """What the header of its tensors.safetensors was."""
        tensors: dict[str, TensorInfo] = {}
        end = 0
        for name, row in self._rows.items():
            end += row["bytes"]
            tensors[name] = TensorInfo(row["dtype"], tuple(row["shape"]), end)
        try:
            metadata = json.loads(self._row["metadata"])
            axes = {name: tuple(names) for name, names in json.loads(metadata["axes"]).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFault(self.path / TABLE, "altered", f"metadata: {error}"[:200]) from error
        size = self._row["tensors_bytes"]
        return Header(tensors, metadata, axes, size, size - end)

    @property
    def unchecked_header(self) -> Header:
        return self.header

    def chunks(self, name: str) -> Iterator[bytes | bytearray]:
        """The bytes that its record.json or its tensors.safetensors had, each part compared with its checksum."""
        if name == RECORD:
            yield self.record_data()
            return
        header = self.header
        yield encode_header(header.tensors, header.metadata)
        for tensor in header.tensors:
            yield self.tensor_data(tensor)

    def place(self, name: str) -> PackedRange:
        """Where the bytes of a tensor lie; nothing is compared."""
        row = self._rows[name]
        return PackedRange(self.path / TENSORS, row["offset"], self.header.tensors[name])

    def tensor_data(self, name: str) -> bytearray:
        """The bytes of a tensor, compared with its checksum."""
        path, offset, _ = self.place(name)
        row = self._rows[name]
        data = bytearray(row["bytes"])
        with opened(path) as (descriptor, size):
            if size != (expected := self._pack.files[TENSORS].bytes):
                raise FileFault(path, "truncated" if size < expected else "altered", f"{size} bytes")
            count = read_into(descriptor, data, offset)
        entry = entry_of(memoryview(data)[:count])
        compare_entry(path, entry, FileEntry(row["bytes"], row["blake3"]), INDEX)
        self._sound.add(name)
        return data

    def tensor(self, name: str) -> torch.Tensor:
        return tensor_of(self.tensor_data(name), self.header.tensors[name])

    def slice(self, name: str) -> Any:
        if name not in self._sound:
            self.tensor_data(name)
        return mapped_tensor(*self.place(name))


class Standing(NamedTuple):
    """What counts of the tasks of a run."""

    packs: list[Pack]
    places: dict[str, str]
    """Hash → place of the folders that count."""
    left: list[str]
    """Packs and folders that a packing left which was cut: copies of what counts."""


def pack_names(run: Path) -> list[str]:
    """Names of the committed packs, sorted. Raises a Fault where there is a link in their folder's place."""
    if not os.path.lexists(run / PACKS):
        return []
    check_directory(run / PACKS)
    return [name for name in names_in(run / PACKS) if _NAME.fullmatch(name)]


def open_packs(run: Path, listed: Mapping[str, FileEntry] | None) -> list[Pack]:
    """The packs that count: those that the manifest lists, without one all. Raises a Fault where one is missing."""
    if listed is None:
        return [Pack(run, name) for name in pack_names(run)]
    names = sorted({name.split("/")[1] for name in listed if name.startswith(f"{PACKS}/")})
    return [Pack(run, name, listed.get(f"{PACKS}/{name}/{PACK}")) for name in names]


def standing(run: Path, listed: Mapping[str, FileEntry] | None) -> Standing:
    """The packs and folders of a run that count, and what is left of a packing that was cut. Raises a Fault."""
    packs, places = open_packs(run, listed), task_places(run)
    counted = {pack.name for pack in packs}
    others = [name for name in pack_names(run) if name not in counted]
    left: list[str] = []
    if packs and places:
        for pack in packs:
            left += [places.pop(name) for name in pack.rows if name in places]
    for name in others:
        if all(task in places for task in Pack(run, name).rows):
            left.append(f"{PACKS}/{name}")
    return Standing(packs, places, left)
