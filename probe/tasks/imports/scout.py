"""Transcript databases of Inspect Scout: Parquet files, a transcript a row, its `messages` and `events` as JSON texts.

Source: inspect_scout, _transcript/database/schema.py. Other columns of a row stay with the log.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from probe.tasks.imports.files import Entry, decode, items, rows
from probe.tasks.imports.inspect_log import of_sample
from probe.tasks.imports.record import Format, Item

_JSON = ("messages", "events", "events_data", "attachments")
_FACTS = ("transcript_id", "task_set", "task_id", "task_repeat", "agent", "source_uri")


def read(paths: Sequence[Path], _category: str | None) -> Iterator[Item]:
    """Records of files in order, one a transcript."""
    return items((entry for path in paths for entry in rows(path)), _transcript)


def _transcript(entry: Entry) -> Iterator[Item]:
    row = entry.value
    if "transcript_id" not in row:
        raise ValueError("has no transcript_id: is it a transcript of Scout?")
    content = {
        name: decode(row[name]) if isinstance(row[name], str) else row[name]
        for name in _JSON
        if row.get(name)
    }
    facts = {name: row.get(name) for name in _FACTS}
    yield of_sample(entry.place, str(row["transcript_id"]), content, facts, row.get("model"))


SCOUT = Format(
    name="scout",
    about="transcript databases of Inspect Scout, `.parquet`",
    read=read,
    suffixes=(".parquet",),
)
