"""Values out of files that nobody vouches for: JSON lines, JSON, Parquet and zip archives, with bounds on each.

What cannot be read is a `Skipped` with its place, and reading goes on behind it. A number that is not finite, as loggers
write for a score, is null here; what goes into a task has to be strict JSON (`probe.jsontext`) when its line is written.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from probe.errors import BadInput
from probe.jsontext import printable, quoted
from probe.tasks.imports.record import Item, Skipped

MAX_LINE = 64 * 2**20
MAX_DOCUMENT = 512 * 2**20
"""Bytes of one JSON text: a line, and a file or a member of an archive, unpacked."""
MOST_EXPANSION = 200
"""Times that a member of an archive may grow; text of agents grows 5 to 50 times."""
_ZSTANDARD = 93
_ROWS = 64


class Entry(NamedTuple):
    """One JSON value of a log."""

    place: str
    value: Any


def paths_of(paths: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """Files in order; a folder stands for its files with one of the suffixes, those of its folders included.

    Raises BadInput for a path that is not there and a folder without such a file.
    """
    files: list[Path] = []
    for path in paths:
        if not suffixes or not path.is_dir():
            if not path.exists():
                raise BadInput(
                    [f"{shown(path)}:1:1: file: cannot be read: give a file or folder that exists"]
                )
            files.append(path)
            continue
        inside = sorted(file for file in path.rglob("[!.]*") if file.suffix in suffixes and file.is_file())
        if not inside:
            kinds = " or ".join(suffixes)
            raise BadInput(
                [f"{shown(path)}:1:1: file: has no file that ends in {kinds}: give another folder"]
            )
        files += inside
    return files


def shown(path: Path | str) -> str:
    """A path as messages and places have it."""
    return printable(str(path), 4096)


def decode(text: str) -> Any:
    """JSON with null for numbers that are not finite. Raises ValueError with why it is none."""
    try:
        return json.loads(text, parse_constant=lambda _: None, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON ({error.msg} at character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError("is nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        first = set(members)
        twice = next(name for name, _ in pairs if name not in first or first.remove(name))
        raise ValueError(f"has the key {quoted(twice)} twice in one object")
    return members


def parsed(value: Any) -> Any:
    """A value that a log may hold as a text of JSON; a text that is none stays a text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return decode(value)
        except ValueError:
            return value
    return value


def members(value: Any) -> dict[str, Any]:
    """An object, also where the log has it as a text; empty for anything else."""
    value = parsed(value)
    return value if isinstance(value, dict) else {}


def why(error: ValueError) -> str:
    """The reason that a decoding failed for, on one line."""
    return printable(str(error), 200)


def items(entries: Iterable[Entry | Skipped], items_of: Callable[[Entry], Iterable[Item]]) -> Iterator[Item]:
    """What `items_of` reads in each entry; an entry for which it raises ValueError is skipped, with that reason."""
    for entry in entries:
        if isinstance(entry, Skipped):
            yield entry
            continue
        try:
            yield from items_of(entry)
        except ValueError as error:
            yield Skipped(entry.place, printable(str(error), 300))


def values(path: Path) -> Iterator[Entry | Skipped]:
    """Every value of a `.jsonl` file, row of a `.parquet` file, or member of the list that a `.json` file is."""
    if path.suffix == ".parquet":
        yield from rows(path)
    elif path.suffix == ".jsonl" or _is_lines(path):
        yield from lines(path)
    else:
        for entry in document(path):
            if isinstance(entry, Entry) and isinstance(entry.value, list):
                for index, value in enumerate(entry.value):
                    yield Entry(f"{entry.place}[{index}]", value)
            else:
                yield entry


def _is_lines(path: Path) -> bool:
    """Whether a file that is called `.json` has an object a line, as data sets often do."""
    with _open(path) as file:
        first = file.readline(MAX_LINE).strip()
        second = file.readline(1024).strip()
    return first[:1] == b"{" and first[-1:] == b"}" and second[:1] == b"{"


def _open(path: Path) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise BadInput(
            [f"{shown(path)}:1:1: file: cannot be read ({error.strerror}): give a file that may be read"]
        ) from None


def lines(path: Path) -> Iterator[Entry | Skipped]:
    """The JSON value of every line that is not blank."""
    with _open(path) as file:
        number = 0
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            place = f"{shown(path)}:{number}"
            if len(raw) > MAX_LINE:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE)
                yield Skipped(place, f"is longer than {MAX_LINE // 2**20} MiB")
            elif raw.strip():
                yield _entry(place, raw)


def document(path: Path) -> Iterator[Entry | Skipped]:
    """The one JSON value of a file."""
    with _open(path) as file:
        raw = file.read(MAX_DOCUMENT + 1)
    if len(raw) > MAX_DOCUMENT:
        yield Skipped(shown(path), f"is longer than {MAX_DOCUMENT // 2**20} MiB")
    else:
        yield _entry(shown(path), raw)


def _entry(place: str, raw: bytes) -> Entry | Skipped:
    try:
        return Entry(place, decode(raw.decode("utf-8-sig")))
    except UnicodeDecodeError:
        return Skipped(place, "is not UTF-8")
    except ValueError as error:
        return Skipped(place, why(error))


# --- Parquet ---


def rows(path: Path) -> Iterator[Entry | Skipped]:
    """The rows of a Parquet file as objects, some at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=_ROWS):
            if batch.nbytes > MAX_DOCUMENT:
                yield Skipped(shown(path), f"{_ROWS} rows of it are longer than {MAX_DOCUMENT // 2**20} MiB")
                return
            for row in batch.to_pylist():
                number += 1
                yield Entry(f"{shown(path)} row {number}", row)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield Skipped(shown(path), f"cannot be read as Parquet ({printable(str(error), 120)})")


# --- zip archives ---


class Archive:
    """A zip archive that is read by name and never unpacked to disk."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise BadInput(
                [
                    f"{shown(path)}:1:1: file: is no zip archive ({printable(str(error), 120)}): give a whole one"
                ]
            ) from None
        self.names = self._zip.namelist()

    def json(self, name: str) -> Any:
        """The JSON value of a member. Raises ValueError with why there is none."""
        try:
            return decode(self._bytes(name).decode())
        except UnicodeDecodeError:
            raise ValueError("is not UTF-8") from None

    def _bytes(self, name: str) -> bytes:
        info = self._zip.getinfo(name)
        if info.file_size > MAX_DOCUMENT:
            raise ValueError(f"unpacks to more than {MAX_DOCUMENT // 2**20} MiB")
        if info.file_size > MOST_EXPANSION * info.compress_size + 2**20:
            raise ValueError(f"unpacks to more than {MOST_EXPANSION} times its size")
        try:
            if info.compress_type == _ZSTANDARD:
                return self._zstandard(info)
            with self._zip.open(info) as member:
                raw = member.read(info.file_size + 1)
        except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"cannot be unpacked ({printable(str(error), 120)})") from None
        except Exception as error:  # zlib.error, lzma.LZMAError: each codec has its own
            raise ValueError(f"cannot be unpacked ({printable(str(error), 120)})") from None
        return raw

    def _zstandard(self, info: zipfile.ZipInfo) -> bytes:
        """A member that is compressed by Zstandard, which Python's own zipfile reads from 3.14 on."""
        import zlib

        import pyarrow

        with open(self.path, "rb") as file:
            file.seek(info.header_offset)
            header = file.read(30)
            if header[:4] != b"PK\x03\x04":
                raise ValueError("has no local header")
            skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            file.seek(skip, io.SEEK_CUR)
            packed = file.read(info.compress_size)
        with pyarrow.CompressedInputStream(pyarrow.BufferReader(packed), "zstd") as stream:
            raw = stream.read(info.file_size + 1)
        if len(raw) != info.file_size or zlib.crc32(raw) != info.CRC:
            raise ValueError("does not unpack to what its checksum says")
        return raw


class Half(NamedTuple):
    """One half of a pair of lines that stand in two files."""

    name: str
    """What both halves are called."""
    side: str
    """`request` or `response`."""
    value: Any


def joined(
    entries: Iterator[Entry | Skipped], half_of: Callable[[Any], Half | None]
) -> Iterator[Entry | Skipped]:
    """Entries, those that are halves of a pair put together as `{"request": …, "response": …}`.

    `half_of` gives None for an entry that is whole. A half whose other half does not come is skipped.
    """
    waiting: dict[str, tuple[str, Half]] = {}
    for entry in entries:
        half = half_of(entry.value) if isinstance(entry, Entry) else None
        if half is None:
            yield entry
        elif half.name not in waiting:
            waiting[half.name] = (entry.place, half)
        elif waiting[half.name][1].side == half.side:
            yield Skipped(entry.place, f"{quoted(half.name)} has a {half.side} already")
        else:
            other = waiting.pop(half.name)[1]
            pair = {half.side: half.value, other.side: other.value, "custom_id": half.name}
            yield Entry(entry.place, pair)
    for place, half in waiting.values():
        lacking = "response" if half.side == "request" else "request"
        yield Skipped(place, f"has no {lacking}: give the file of the {lacking}s beside it")
