"""Answers of MCP servers to `tools/list` as a catalogue: the result, the JSON-RPC answer, or a log of them, a page a line.

https://modelcontextprotocol.io/specification (server/tools)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from probe.jsontext import quoted
from probe.tasks.imports.definitions import Shown, add_tool, definition
from probe.tasks.imports.files import Entry, items, values
from probe.tasks.imports.record import Format, Item, Ready, Skipped


def read(paths: Sequence[Path], _category: str | None) -> Iterator[Item]:
    """A line for each tool, in the order of the answers; a name that is taken is given once."""
    shown = Shown()
    for path in paths:
        for entry in values(path):
            if isinstance(entry, Skipped):
                yield entry
                continue
            tools = _listed(entry.value)
            if tools is None:
                yield Skipped(entry.place, "is no answer to tools/list")
                continue
            given = (Entry(f"{entry.place} tools[{index}]", tool) for index, tool in enumerate(tools))
            yield from items(given, lambda part: [_tool(part, shown)])


def _listed(value: Any) -> list[Any] | None:
    """The tools of an answer, or of one tool of a list of them."""
    if not isinstance(value, dict):
        return None
    for part in (value, value.get("result")):
        if isinstance(part, dict) and isinstance(part.get("tools"), list):
            return part["tools"]
    return [value] if "name" in value and ("inputSchema" in value or "input_schema" in value) else None


def _tool(entry: Entry, shown: Shown) -> Item:
    before = len(shown.tools)
    tool = definition(entry.value)
    add_tool(shown, tool)
    if len(shown.tools) == before:
        return Skipped(entry.place, f"{quoted(tool['name'])} is in the catalogue already, and alike")
    return Ready(entry.place, shown.tools[-1])


MCP = Format(
    name="mcp",
    about="answers of MCP servers to tools/list; makes a catalogue of tools",
    read=read,
    catalogue=True,
)
