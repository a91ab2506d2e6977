"""Full-text search over the text files of one directory."""

from __future__ import annotations

import re
import sqlite3

from probe.tools.execution.builtin.files import file_text, list_files
from probe.tools.execution.failure import Failure

MAX_PASSAGES = 20
MAX_TOTAL = 16 * 2**20
_SUFFIXES = (".md", ".txt", ".rst")


def search(query: str, limit: int = 3, *, root: str) -> list[dict[str, str]]:
    """The passages (paragraphs) under `root` that fit best, `{title, path, passage}`, best first.

    Ranked by SQLite's bm25 on word stems, a title's words counting double; equals in order of path and place.
    No passage is an empty list. Words are searched for as such: nothing in the query is an operator.
    """
    words = re.findall(r"\w+", query)[:64]
    if not words:
        raise Failure("the query has no word: say what the passages should be about")
    if not 1 <= limit <= MAX_PASSAGES:
        raise Failure(f"limit must be 1 to {MAX_PASSAGES}, is {limit}")
    base = sqlite3.connect(":memory:")
    base.execute(
        "CREATE VIRTUAL TABLE passages USING fts5(title, passage, path UNINDEXED, tokenize='porter unicode61')"
    )
    base.executemany("INSERT INTO passages VALUES (?, ?, ?)", _passages(root))
    rows = base.execute(
        "SELECT title, path, passage FROM passages WHERE passages MATCH ? "
        "ORDER BY bm25(passages, 2.0, 1.0), rowid LIMIT ?",
        (" OR ".join(f'"{word}"' for word in words), limit),
    )
    return [{"title": title, "path": path, "passage": passage} for title, path, passage in rows]


def _passages(root: str) -> list[tuple[str, str, str]]:
    passages, total = [], 0
    for path in list_files(root, _SUFFIXES):
        try:
            text = file_text(path, root)
        except Failure:  # a file that is no text is no document
            continue
        total += len(text)
        if total > MAX_TOTAL:
            raise Failure(f"the archive has more than {MAX_TOTAL // 2**20} MiB of text")
        parts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
        title = path
        if parts and (heading := re.fullmatch(r"#+\s*(.+)", parts[0])):
            title, parts = heading[1], parts[1:]
        passages += [(title, part, path) for part in parts]
    return passages
