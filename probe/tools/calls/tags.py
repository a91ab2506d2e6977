"""Calls in tags, `<function=name>…</function>`, whose arguments are JSON or one tag each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from probe.jsontext import StrictJsonError, loads, quoted
from probe.tools.calls.call import Call, Schemas, at, broken

_TAG = re.compile(r"<function=(?P<name>[^>\n<]{0,128})(?P<closed>>)?")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]{1,128})>(.*)", re.DOTALL)


def tagged_call(text: str, start: int, schemas: Schemas) -> tuple[Call, int]:
    opened = at(_TAG, text, start)
    if opened["closed"] is None:
        return broken(text, start, opened.end(), "the name was not closed"), opened.end()
    name, end = opened["name"], text.find("</function>", opened.end())
    if end < 0:
        message = "the call is not complete: </function> is missing"
        return broken(text, start, len(text), message, name), len(text)
    body, end = text[opened.end() : end], end + len("</function>")
    try:
        arguments = loads(body) if body.lstrip().startswith("{") else _parameters(body, schemas.get(name, {}))
    except StrictJsonError as error:
        return broken(text, start, end, f"the arguments are no JSON object: {error}", name, True), end
    except ValueError as error:
        return broken(text, start, end, str(error), name, True), end
    return Call(name, arguments, text[start:end], start, end), end


def _parameters(body: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `<parameter=key>…</parameter>` one after the other. Raises ValueError."""
    *parts, rest = body.split("</parameter>")
    if rest.strip():
        raise ValueError(f"{quoted(rest.strip())} stands outside of a parameter")
    arguments: dict[str, Any] = {}
    for part in parts:
        match = _PARAMETER.fullmatch(part)
        if match is None or match[1] in arguments:
            raise ValueError("an argument is written twice" if match else "</parameter> closes nothing")
        known = schema.get("properties", {}).get(match[1])
        arguments[match[1]] = _typed(match[2], known if isinstance(known, dict) else {})
    return arguments


def _typed(text: str, schema: Mapping[str, Any]) -> Any:
    """A value that is written without quotes: JSON, unless it is none or the schema wants a string."""
    text = text.removeprefix("\n").removesuffix("\n")
    if schema.get("type") == "string":
        return text
    try:
        return loads(text)
    except StrictJsonError:
        return text
