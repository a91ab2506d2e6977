"""Short facts under keys, in one SQLite file."""

from __future__ import annotations

import sqlite3
from contextlib import closing

from probe.tools.execution.failure import Failure

MAX_KEY, MAX_VALUE, MAX_FACTS = 200, 4000, 1000


def keep(action: str, key: str, value: str | None = None, *, state: str | None) -> dict[str, object]:
    """`get` gives `{key, value}`, `set` `{key, kept}`, `delete` `{key, deleted}`.

    Without `state` nothing outlives the call.
    """
    if not 0 < len(key) <= MAX_KEY:
        raise Failure(f"a key has 1 to {MAX_KEY} characters")
    if action == "set" and (value is None or len(value) > MAX_VALUE):
        raise Failure(f"give a value of at most {MAX_VALUE} characters to keep")
    try:
        with closing(sqlite3.connect(state or ":memory:", timeout=2)) as base, base:
            base.execute("CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            return _apply(base, action, key, value)
    except sqlite3.Error as error:
        raise Failure(f"the store cannot be used ({error})") from None


def _apply(base: sqlite3.Connection, action: str, key: str, value: str | None) -> dict[str, object]:
    if action == "set":
        if base.execute("SELECT count(*) FROM facts WHERE key != ?", (key,)).fetchone()[0] >= MAX_FACTS:
            raise Failure(f"{MAX_FACTS} facts are kept already: delete one")
        base.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))
        return {"key": key, "kept": True}
    if action == "delete":
        return {"key": key, "deleted": base.execute("DELETE FROM facts WHERE key = ?", (key,)).rowcount > 0}
    row = base.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
    if row is None:
        raise Failure(f"nothing is kept under {key!r}")
    return {"key": key, "value": row[0]}
