"""Rows of a table file by the value of a column."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from probe.tools.execution.builtin.files import file_text
from probe.tools.execution.failure import Failure

MAX_ROWS = 50


def look_up(path: str, column: str, value: str, wanted: str | None = None, *, root: str) -> list[Any]:
    """The rows of a CSV file with a header, or of a JSON list of objects, whose `column` holds `value`.

    Text is compared without case and outer spaces; a number in JSON as JSON writes it. With `wanted` only that
    column of them. No row is an empty list.
    """
    rows = _rows(path, root)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in (column, wanted):
        if name is not None and name not in columns:
            raise Failure(f"{path!r} has no column {name[:60]!r}; it has {', '.join(columns[:50]) or 'none'}")
    matches = [row for row in rows if column in row and _text(row[column]) == _text(value)]
    if len(matches) > MAX_ROWS:
        raise Failure(f"{len(matches)} rows have that value, more than {MAX_ROWS}: compare another column")
    return [row.get(wanted) for row in matches] if wanted is not None else matches


def _rows(path: str, root: str) -> list[dict[str, Any]]:
    text = file_text(path, root)
    if path.casefold().endswith(".json"):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError):
            raise Failure(f"{path!r} is no JSON") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise Failure(f"{path!r} is no list of objects")
        return rows
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True, restkey="", restval=""))
    except csv.Error as error:
        raise Failure(f"{path!r} is no CSV table ({error})") from None
    return [{name: cell for name, cell in row.items() if name} for row in rows]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.strip().casefold()
