"""Tables for other tools: the measures, and one flat row a task."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import UsageError
from probe.runs.eval_log import eval_log
from probe.runs.files import disk_errors, replace_file
from probe.runs.frames import task_table
from probe.runs.read import Run

if TYPE_CHECKING:
    import pyarrow

FORMATS = ("parquet", "jsonl", "csv")
EVAL = "eval"
"""Format of a whole run as a log of Inspect: a file, no table."""


def file_format(path: Path, formats: Sequence[str], given: str | None = None) -> str:
    """The format of a file by its extension. Raises UsageError where it is none of `formats` or not the one `given`."""
    suffix = path.suffix[1:].lower()
    if path.name == "-" or suffix not in formats:
        named = " or ".join(f"{'NAME' if path.name == '-' else path.stem}.{name}" for name in formats)
        raise UsageError(f"{path}: is written as {', '.join(formats)}: name it {named}")
    if given not in (None, suffix):
        raise UsageError(f"{path.name} does not fit --format {given}: name it {path.stem}.{given}")
    return suffix


def measures_bytes(run: Run, format: str) -> bytes:
    """The measures of a run as the bytes of a file. Raises RunDirectoryError (no measures)."""
    return encode(run.measures(arrow=True), format)


def export(run: Run, format: str | None, output: str | Path) -> list[Path]:
    """Write tables of a run atomically and return their paths. Without a format a file's extension says it.

    An `output` whose name has a suffix is one file and gets the measures; any other is a directory (made if
    need be) that gets measures.FORMAT, where the run was analyzed, and tasks.FORMAT. For a `prompting` task
    the row is that of its `base` variant. A file that ends in `.eval` gets the tasks as a log of Inspect.
    Raises UsageError, RunDirectoryError (no measures), ArtifactCorrupt and DiskError.
    """
    if format not in (None, EVAL, *FORMATS):
        raise UsageError(f"unknown format {format!r}: give one of {', '.join((*FORMATS, EVAL))}")
    named = Path(output)
    output = Path(os.path.realpath(output))  # through a link, as any other program writes
    if named.name == "-" or (named.suffix and not output.is_dir()):
        form = file_format(named, (*FORMATS, EVAL), format)
        return [write_file(output, eval_log(run) if form == EVAL else measures_bytes(run, form))]
    if format == EVAL:
        raise UsageError(f"{named}: a log is one file: give a name that ends in .{EVAL}")
    if format is None:
        raise UsageError(f"{named}: a directory gets tables of one format: give --format {'|'.join(FORMATS)}")
    tables = {"measures": run.measures(arrow=True)} if run.has_measures else {}
    tables["tasks"] = task_table(list(run))
    with disk_errors(output):
        try:
            output.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UsageError(
                f"{output}: is a file: give a directory, or a name that ends in .{format}"
            ) from None
    return [write_file(output / f"{name}.{format}", encode(table, format)) for name, table in tables.items()]


def write_file(path: Path, data: bytes | Iterable[bytes]) -> Path:
    """Write a file atomically, at once or piece by piece, its folders with it. Raises UsageError for what is no file, and DiskError."""
    with disk_errors(path):
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(
                f"{path}: is not a regular file"
            )  # a rename would put a file in a device's place
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data)
    return path


def encode(table: pyarrow.Table, format: str) -> bytes:
    """A table as the bytes of a file of one of FORMATS."""
    if format == "parquet":
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue()
    text = io.StringIO(newline="")
    rows = table.to_pylist()
    if format == "jsonl":
        for row in rows:
            text.write(
                json.dumps({key: _finite(value) for key, value in row.items()}, ensure_ascii=False) + "\n"
            )
    else:
        writer = csv.writer(text, lineterminator="\n")
        quoting = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(table.column_names)
        for row in rows:
            cells = [_cell(value) for value in row.values()]
            # The module quotes the line ends that it writes itself; every reader ends a row at a bare \r as well.
            bare = any(isinstance(cell, str) and "\r" in cell for cell in cells)
            (quoting if bare else writer).writerow(cells)
    return text.getvalue().encode()


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula gets an apostrophe (OWASP, CSV injection)."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r\n") else value
