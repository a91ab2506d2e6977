"""One task in its own folder, read from there; `PackedTask` is one in a pack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.runs.files import (
    CHECKSUMS,
    MANIFEST,
    RECORD,
    TASKS,
    TENSORS,
    FileEntry,
    FileFault,
    check_directory,
    checksum_file,
    read_pieces,
)
from probe.runs.manifest import TaskDirectory, compare, compare_entry, read_checksums, read_record
from probe.runs.packed import PackedRange
from probe.runs.remote import RunUrl
from probe.runs.tensors import Header, open_tensors, read_header

if TYPE_CHECKING:
    import torch


class TaskFolder:
    """The folder of one task. Raises a Fault where it, or one on the way to it, is none."""

    def __init__(self, run: Path, place: str, listed: Mapping[str, FileEntry] | None = None):
        """`listed` is what the run's manifest says of its files; without it the task's own checksums count."""
        self.path = run / place
        self._place, self._listed = place, listed
        check_directory(run / TASKS)
        check_directory(self.path.parent)
        check_directory(self.path)

    @cached_property
    def files(self) -> dict[str, FileEntry]:
        """Size and checksum of its record and its tensors, by the names of their files."""
        if self._listed is None:
            return read_checksums(self.path)
        try:
            return {name: self._listed[f"{self._place}/{name}"] for name in (RECORD, TENSORS)}
        except KeyError:
            raise FileFault(self.path, "extra", f"{MANIFEST} does not list it") from None

    def record(self) -> dict[str, Any]:
        """record.json, compared with its checksum."""
        return read_record(self.path, self.files[RECORD])

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of one of its files, piece by piece; nothing is compared."""
        return read_pieces(self.path / name)

    def entry(self, task_id: str, status: str) -> TaskDirectory:
        """What a manifest says of it."""
        files = read_checksums(self.path) | {CHECKSUMS: checksum_file(self.path / CHECKSUMS)}
        return TaskDirectory(task_id, status, files, self._place)

    @cached_property
    def header(self) -> Header:
        """The header of its tensors, which are compared with their checksum first."""
        path, entry = self.path / TENSORS, self.files[TENSORS]
        header = read_header(path)
        if isinstance(path, RunUrl):  # read in parts, of which nothing says the checksums
            compare_entry(path, FileEntry(header.size, entry.blake3), entry, MANIFEST)
        else:
            compare(path, entry, CHECKSUMS)
        return header

    @cached_property
    def unchecked_header(self) -> Header:
        """The header, after which the length of the file is right; no other byte is read."""
        return self.__dict__.get("header") or read_header(self.path / TENSORS)

    def place(self, name: str) -> PackedRange:
        """Where the bytes of a tensor lie; nothing is compared."""
        header = self.unchecked_header
        return PackedRange(self.path / TENSORS, header.offset(name), header.tensors[name])

    @cached_property
    def _reader(self) -> Any:
        return open_tensors(self.path / TENSORS, self.header)

    def tensor(self, name: str) -> torch.Tensor:
        return self._reader.get_tensor(name)

    def slice(self, name: str) -> Any:
        return self._reader.get_slice(name)
