"""Calls in tags: `<function=name>…`, `<invoke name="…">…`, `name<arg_key>…`, whose arguments have one tag each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from probe.jsontext import StrictJsonError, loads, quoted
from probe.tools.calls.call import Call, Schemas, at, broken
from probe.tools.calls.python import python_literal

_TAG = re.compile(r"<function=(?P<name>[^>\n<]{0,128})(?P<closed>>)?")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]{1,128})>(.*)", re.DOTALL)

INVOKE = re.compile(r"<(?P<prefix>antml:|\uff5cDSML\uff5c)?invoke(?=[\s>])")
_INVOKED = re.compile(
    r'\s+name="(?P<name>[^"\n]{0,128})"?(?P<closed>\s*>)?|\s*>\s*<tool_name>(?P<old>[^<\n]{0,128})'
)
_GIVEN = re.compile(
    r'\s*<(?:antml:|\uff5cDSML\uff5c)?parameter\s+name="(?P<key>[^"\n]{1,128})"(?P<more>[^>\n]{0,64})>(?P<value>.*)',
    re.DOTALL,
)
_ELEMENT = re.compile(r"\s*<(?P<key>[\w.-]{1,128})>(?P<value>.*?)</(?P=key)>", re.DOTALL)

# Templates that print a list or an object do it in Python's way.
_LITERAL = re.compile(r"\s*(?:[\[{]|(?:True|False|None)\s*\Z)")

KEYED = re.compile(r"(?P<name>[\w.:/-]{1,128})\s*(?=<arg_key>|</tool_call>)")
_PAIR = re.compile(r"\s*<arg_key>(?P<key>[^<\n]{1,128})</arg_key>\s*<arg_value>")


def tagged_call(text: str, start: int, schemas: Schemas) -> tuple[Call, int]:
    """The call `<function=name>…</function>` at `start`, and where it ends."""
    opened = at(_TAG, text, start)
    if opened["closed"] is None:
        return broken(text, start, opened.end(), "the name was not closed"), opened.end()
    name, end = opened["name"], text.find("</function>", opened.end())
    if end < 0:
        message = "the call is not complete: </function> is missing"
        return broken(text, start, len(text), message, name), len(text)
    body, end = text[opened.end() : end], end + len("</function>")
    return _read(text, start, end, name, lambda: _body(body, schemas.get(name, {}))), end


def invoked_call(text: str, start: int, schemas: Schemas) -> tuple[Call, int]:
    """The call `<invoke name="…">…</invoke>` at `start`, as Anthropic, MiniMax and DeepSeek write it."""
    opened = at(INVOKE, text, start)
    named = _INVOKED.match(text, opened.end())
    closing = f"</{opened['prefix'] or ''}invoke>"
    end = text.find(closing, opened.end())
    name = (named["name"] or named["old"]) if named else None
    if named is None or not (named["closed"] or named["old"]) or end < 0:
        whole = named is not None and (named["closed"] or text.startswith("<", named.end()))
        stop = len(text) if end < 0 else end + len(closing)
        return broken(
            text, start, stop, f"the call is not complete: {closing} is missing", name if whole else None
        ), stop
    body, end = text[named.end() : end], end + len(closing)
    schema = schemas.get(name or "", {})
    read = _old_parameters if named["old"] else _named_parameters
    return _read(text, start, end, name, lambda: read(body, schema)), end


def keyed_call(text: str, start: int, schemas: Schemas) -> tuple[Call, int]:
    """The call `name<arg_key>key</arg_key><arg_value>value</arg_value>…` at `start`, as GLM writes it."""
    named = at(KEYED, text, start)
    name, position = named["name"], named.end()
    arguments: dict[str, Any] = {}
    while pair := _PAIR.match(text, position):
        end = text.find("</arg_value>", pair.end())
        if end < 0:
            return broken(text, start, len(text), "</arg_value> is missing", name), len(text)
        arguments[pair["key"]] = typed_argument(
            text[pair.end() : end], _property(schemas.get(name, {}), pair["key"])
        )
        position = end + len("</arg_value>")
    rest = text[position:].lstrip()
    if not rest.startswith("</tool_call>"):
        cut = "</tool_call>".startswith(rest) or rest.startswith("<arg_key>"[: len(rest)])
        stop = len(text) if cut or rest.startswith("<arg_key>") else position
        return broken(text, start, stop, "the call is not complete: </tool_call> is missing", name), stop
    return Call(name, arguments, text[start:position], start, position), position


def _read(text: str, start: int, end: int, name: str | None, read: Any) -> Call:
    try:
        return Call(name, read(), text[start:end], start, end)
    except StrictJsonError as error:
        return broken(text, start, end, f"the arguments are no JSON object: {error}", name, True)
    except ValueError as error:
        return broken(text, start, end, str(error), name, True)


def _body(body: str, schema: Mapping[str, Any]) -> Any:
    return loads(body) if body.lstrip().startswith("{") else _parameters(body, schema)


def _parameters(body: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `<parameter=key>…</parameter>` one after the other. Raises ValueError."""
    arguments: dict[str, Any] = {}
    for part in _parts(body, "</parameter>"):
        match = _PARAMETER.fullmatch(part)
        if match is None or match[1] in arguments:
            raise ValueError("an argument is written twice" if match else "</parameter> closes nothing")
        arguments[match[1]] = typed_argument(match[2], _property(schema, match[1]))
    return arguments


def _named_parameters(body: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `<parameter name="key">…</parameter>` one after the other. Raises ValueError."""
    arguments: dict[str, Any] = {}
    for part in _parts(
        re.sub(r"</(?:antml:|\uff5cDSML\uff5c)parameter>", "</parameter>", body), "</parameter>"
    ):
        match = _GIVEN.fullmatch(part)
        if match is None or match["key"] in arguments:
            raise ValueError("an argument is written twice" if match else "</parameter> closes nothing")
        known = {"type": "string"} if 'string="true"' in match["more"] else _property(schema, match["key"])
        arguments[match["key"]] = typed_argument(match["value"], known)
    return arguments


def _old_parameters(body: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `<parameters><key>value</key>…</parameters>`."""
    inside = body.partition("<parameters>")[2].rpartition("</parameters>")[0]
    return {
        m["key"]: typed_argument(m["value"], _property(schema, m["key"])) for m in _ELEMENT.finditer(inside)
    }


def _parts(body: str, closing: str) -> list[str]:
    *parts, rest = body.split(closing)
    if rest.strip():
        raise ValueError(f"{quoted(rest.strip())} stands outside of a parameter")
    return parts


def _property(schema: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    known = schema.get("properties", {})
    known = known.get(name) if isinstance(known, dict) else None
    return known if isinstance(known, dict) else {}


def typed_argument(text: str, schema: Mapping[str, Any]) -> Any:
    """A value that is written without quotes: JSON or a Python literal, unless it is neither or the schema wants a
    string."""
    text = text.removeprefix("\n").removesuffix("\n")
    if schema.get("type") == "string":
        return text
    try:
        return loads(text)
    except StrictJsonError:
        return python_literal(text) if _LITERAL.match(text) else text
