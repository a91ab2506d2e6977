"""Calls that are JSON objects, in all their spellings."""

from __future__ import annotations

import json
import re
from typing import Any

from probe.jsontext import MAX_DEPTH, StrictJsonError, kind_of, loads
from probe.tools.calls.call import Call, broken

# Syntax alone: `len` stands for conversions that could fail.
_SYNTAX = json.JSONDecoder(parse_float=len, parse_int=len, parse_constant=len)
_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_HALF = re.compile(
    r"""\{\s*(?:"(?:type|id)"\s*:\s*"[^"\n]*"\s*,\s*)*(?:"function"\s*:\s*\{\s*)?"name"\s*:\s*"(?P<name>[^"\n]*)
    (?P<closed>")?(?P<more>\s*,\s*"(?:arguments|parameters)"\s*:|\s*(?:,\s*(?:"\w*)?)?\Z)?""",
    re.VERBOSE,
)


def json_call(text: str, start: int, *, marked: bool) -> tuple[Call | None, int]:
    """The call that the JSON object at `start` is, and where it ends; None: it is none."""
    value, end, fault, complete = json_value(text, start)
    if fault is None:
        read = _spelled(value, marked)
        return (None if read is None else Call(read[0], read[1], text[start:end], start, end, *read[2:])), end
    half = _HALF.match(text, start)
    if half and half["closed"] is None:
        end = max(end, half.end())
        return broken(text, start, end, "the name was not closed"), end
    if not marked and (half is None or half["more"] is None):
        return None, end
    message = f"the call is not complete JSON: {fault}"
    return broken(text, start, end, message, half["name"] if half else None, complete), end


def json_value(text: str, start: int) -> tuple[Any, int, str | None, bool]:
    """(value, end, what is wrong, whether it is closed) of the strict JSON value at `start`.

    A value that is not closed ends at its first mistake.
    """
    length = 256
    while True:
        # Windows, because an error of the decoder takes time in proportion to the text before it.
        window = text[start : start + length]
        whole = start + length >= len(text)
        try:
            _, size = _SYNTAX.raw_decode(window)
            break
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated") or error.pos > len(window) - 16
            if cut and not whole:
                length *= 4
                continue
            end = len(text) if cut else start + max(error.pos, 1)
            return None, end, f"{error.msg} at character {error.pos}", False
        except RecursionError:
            return None, _balanced(text, start), f"nested more than {MAX_DEPTH} levels deep", False
    try:
        return loads(window[:size]), start + size, None, True
    except StrictJsonError as error:
        return None, start + size, str(error), True


def _balanced(text: str, start: int) -> int:
    """Where the bracket at `start` is closed, or the end of the text."""
    depth = 0
    for match in _BRACKET.finditer(text, start):
        depth += (match[0] in "[{") - (match[0] in "]}")
        if depth == 0:
            return match.end()
    return len(text)


def _spelled(
    value: dict[str, Any], marked: bool
) -> tuple[str | None, dict | None, str | None, str | None] | None:
    """(name, arguments, error, message) of a decoded object; None if it is no call."""
    inner = value.get("function")
    inner = inner if isinstance(inner, dict) else value
    named = next((key for key in ("name", "tool_name") if key in inner), "name")
    if marked and inner is value and named not in value and len(value) == 1:
        ((only, given),) = value.items()  # Apertus: the name is the key
        if isinstance(given, dict):
            return only, given, None, None
    name = inner.get(named)
    key = next((key for key in ("arguments", "parameters", "input") if key in inner), None)
    given = inner.get(key) if key else None
    if not isinstance(name, str):
        return (None, None, "unknown_tool", "the call names no tool") if marked else None
    # A model may repeat the definition of a tool, whose `parameters` are a schema.
    schema = key == "parameters" and isinstance(given, dict) and "properties" in given and "type" in given
    if not marked and (
        schema or "description" in inner or not (key or inner is not value or len(inner) == 1)
    ):
        return None
    if isinstance(given, str):
        try:
            given = loads(given)
        except StrictJsonError as error:
            return name, None, "not_json", f"the arguments are no JSON object: {error}"
    if given is not None and not isinstance(given, dict):
        return name, None, "not_json", f"the arguments are no JSON object but {kind_of(given)}"
    return name, given, None, None
