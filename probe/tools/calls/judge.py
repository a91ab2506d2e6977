"""Whether what was written is one right call of a shown tool, and if not, in which way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probe.jsontext import nearest, printable, quoted
from probe.tools.calls.call import Call
from probe.tools.calls.validation import UncheckedArguments, schema_errors
from probe.tools.definitions import Tool

KINDS = {
    "no_call": "nothing is called",
    "unread": "a call in a format that is not known",
    "several_calls": "more than one call where one was asked for",
    "not_json": "the call or its arguments are no JSON object, or not complete",
    "unknown_tool": "no tool has this name",
    "missing_argument": "a required argument is not there",
    "unexpected_argument": "an argument that the tool does not have",
    "mistyped_argument": "an argument of another JSON type",
    "invalid_argument": "an argument outside what its schema allows",
}
"""Every way in which a written call can be wrong."""


@dataclass(frozen=True)
class Verdict:
    """Whether what was written is one right call of a shown tool."""

    call: Call | None
    """The first call; None where there is none."""
    error: str | None
    """One of `KINDS`; None: name and arguments are as the tool's schema wants them."""
    message: str | None


def judge(
    calls: Sequence[Call], tools: Iterable[Tool], *, unread: str | None = None, several: bool = False
) -> Verdict:
    """Whether the calls are one right call of one of the tools, and if not, in which of the ways of `KINDS`.

    With `several` more than one is right where each is; the verdict is that of the first wrong one. `unread` says what looks like a call where none was read: see `probe.tools.calls.unread`.
    """
    if not calls and unread is not None:
        return Verdict(None, "unread", unread)
    if not calls:
        return Verdict(None, "no_call", "there is no call in the text")
    call = calls[0]
    if several and len(calls) > 1:
        tools = tuple(tools)
        verdicts = [judge([each], tools) for each in calls]
        return next((verdict for verdict in verdicts if verdict.error), verdicts[0])
    if len(calls) > 1:
        return Verdict(call, "several_calls", f"{len(calls)} calls, where one was asked for")
    known = {tool.name: tool for tool in tools}
    if call.name is not None and call.name not in known:
        near = nearest(call.name, tuple(known))
        hint = f": the nearest is {quoted(near)}" if near else ""
        return Verdict(call, "unknown_tool", f"{quoted(call.name)} is not a shown tool{hint}")
    if call.error is not None or call.name is None:
        return Verdict(call, call.error or "unknown_tool", call.message)
    return Verdict(call, *(check_arguments(known[call.name], call.arguments or {}) or (None, None)))


_BY_VALIDATOR = {
    "required": "missing_argument",
    "dependentRequired": "missing_argument",
    "additionalProperties": "unexpected_argument",
    "unevaluatedProperties": "unexpected_argument",
    "type": "mistyped_argument",
}
_ORDER = ("unexpected_argument", "missing_argument", "mistyped_argument", "invalid_argument")


def check_arguments(tool: Tool, arguments: Mapping[str, Any]) -> tuple[str, str] | None:
    """(kind, message) of what is wrong with the arguments of a call; None if nothing is.

    They are checked against the tool's JSON Schema. An argument that the schema does not name is wrong unless
    the schema says what other arguments look like. Raises UncheckedArguments where that cannot be found out in
    bounded time.
    """
    schema = tool.parameters
    open_ended = (
        "additionalProperties",
        "patternProperties",
        "unevaluatedProperties",
        "$ref",
        "allOf",
        "anyOf",
    )
    if not any(word in schema for word in (*open_ended, "oneOf", "if")):
        schema = schema | {"additionalProperties": False}
    faults: list[tuple[str, str]] = []
    try:
        errors = schema_errors(schema, arguments)
    except UncheckedArguments as error:
        what = f"the arguments of {tool.name} cannot be checked against its schema: {error}"
        raise UncheckedArguments(what) from None
    for error in errors:
        kind = _BY_VALIDATOR.get(str(error.validator), "invalid_argument")
        at = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        where = printable(at.removeprefix("."))
        faults.append((kind, f"{where}: {error.message}" if where else error.message))
    if not faults:
        return None
    # jsonschema's own order differs between processes.
    faults.sort(key=lambda pair: (_ORDER.index(pair[0]), pair[1]))
    return faults[0][0], "; ".join(printable(message, 200) for _, message in faults[:5])
