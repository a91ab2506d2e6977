"""A call as it was written, right or wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Schemas = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Call:
    """One call as a model wrote it."""

    name: str | None
    """None where the text gives none."""
    arguments: dict[str, Any] | None
    """Strict JSON; None where none are written or they cannot be read."""
    text: str
    """The call without the marks around it: characters start … end − 1 of what was read."""
    start: int
    end: int
    error: str | None = None
    """`not_json` or `unknown_tool` (a call without a name); None: it can be read."""
    message: str | None = None
    complete: bool = True
    """Whether it is written to its end, right or wrong."""


Found = tuple[list[Call], int]
"""Calls, and where to read on."""


def broken(
    text: str, start: int, end: int, message: str, name: str | None = None, complete: bool = False
) -> Call:
    return Call(name, None, text[start:end], start, end, "not_json", message, complete)


def at(pattern: re.Pattern[str], text: str, position: int) -> re.Match[str]:
    match = pattern.match(text, position)
    assert match is not None  # the pattern matches the empty text
    return match
