"""Calls in what a model wrote: found, read, and judged against the tools that were shown.

Pure text. Formats are told apart by their own marks, so no model has to be named:

- a JSON object of `name` and `arguments` (or `parameters`, Llama 3), alone, in a list or a fence, also as
  OpenAI writes it, `{"type": "function", "function": {…}}` with the arguments as an object or a string;
- `<tool_call>…</tool_call>` around one such object (Hermes, Qwen) or a list of them (SmolLM2), `<|python_tag|>`
  (Llama 3), `[TOOL_CALLS]` before a list or before `name[ARGS]{…}` (Mistral);
- Python call expressions: `[f(a=1), g(b="x")]` (Llama 4, BFCL) and those in a fence `tool_code` (Gemma);
- `<function=name><parameter=key>…</parameter></function>` (Qwen3-Coder), `<function=name>{…}</function>` (Llama 3.1).

What stands between `<think>` and `</think>` is no call. Reading takes time linear in the text, whatever it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from probe.tools.calls.call import Call, Found, Schemas, at, broken
from probe.tools.calls.judge import KINDS, Verdict, check_arguments, judge
from probe.tools.calls.objects import json_call, json_value
from probe.tools.calls.python import MAX_PYTHON, PYTHON_CALL, PYTHON_NAME, python_call
from probe.tools.calls.tags import tagged_call
from probe.tools.definitions import Tool

__all__ = ["KINDS", "MAX_PYTHON", "Call", "Verdict", "check_arguments", "judge", "read_calls"]

_START = re.compile(
    rf"""
    (?P<thought><think>)
    |(?P<marked><tool_call>|<\|tool_call\|>|<\|python_tag\|>|<\|python_start\|>|```tool_(?:code|calls?)\b)
    |(?P<mistral>\[TOOL_CALLS\])
    |(?P<tagged><function=)
    |(?P<bare>\{{\s*")
    |(?P<listed>^[ \t]*\[\s*(?={PYTHON_NAME}\s*\())
    |(?P<alone>\A\s*(?={PYTHON_NAME}\s*\())
    """,
    re.VERBOSE | re.MULTILINE,
)
_BETWEEN = re.compile(r"[\s\[,;]*")
_CLOSE = re.compile(
    r"</?tool_call>|<\|/?tool_call\|>|<\|python_(?:tag|start|end)\|>|<\|e(?:om|ot)_id\|>|\[TOOL_CALLS\]|```"
)


def read_calls(text: str, *, tools: Sequence[Tool] = ()) -> list[Call]:
    """Every call in a text, in order; a call that is broken or half written is one with an error.

    JSON without a mark around it is a call only if it has a name, and either arguments or nothing else.
    `tools` gives the types of arguments in a format that does not write them (Qwen3-Coder's).
    """
    schemas = {tool.name: tool.parameters for tool in tools}
    calls: list[Call] = []
    position = 0
    while match := _START.search(text, position):
        assert match.lastgroup is not None
        several, position = _READERS[match.lastgroup](text, match, schemas)
        calls += several
    return calls


def _thought(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    end = text.find("</think>", match.end())
    return [], len(text) if end < 0 else end


def _marked(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    return _items(text, match.end(), schemas)


def _items(text: str, position: int, schemas: Schemas) -> Found:
    """The calls behind a mark: objects or Python calls, one after the other. None at all is a broken call."""
    calls: list[Call] = []
    while True:
        begin = at(_BETWEEN, text, position).end()
        if text.startswith("{", begin):
            call, position = json_call(text, begin, marked=True)
        elif text.startswith("<function=", begin):
            call, position = tagged_call(text, begin, schemas)
        elif PYTHON_CALL.match(text, begin):
            call, position, _ = python_call(text, begin)
        elif calls:
            return calls, position
        else:
            call, position = (
                broken(text, begin, begin, "there is no call behind the mark that opens one"),
                begin,
            )
        assert call is not None
        if call.error == "not_json":
            close = _CLOSE.search(text, position)
            position = close.start() if close else len(text)
            whole = text[call.start : position].rstrip()
            call = replace(call, text=whole, end=call.start + len(whole))
            return [*calls, call], position
        calls.append(call)


def _bare(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    call, end = json_call(text, match.start(), marked=False)
    return ([call] if call else []), end


_MISTRAL_NAME = re.compile(
    r"\s*(?P<name>[^\s\[\]{}]{1,128})(?:\[CALL_ID\][^\s\[\]{}]{0,64})?(?:\[ARGS\])?\s*(?=\{)"
)


def _mistral(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    named = _MISTRAL_NAME.match(text, match.end())
    if named is None:
        return _items(text, match.end(), schemas)
    start, name = named.start("name"), named["name"]
    value, end, fault, complete = json_value(text, named.end())
    if fault is None:
        return [Call(name, value, text[start:end], start, end)], end
    return [broken(text, start, end, f"the arguments are not complete JSON: {fault}", name, complete)], end


def _tagged(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    call, end = tagged_call(text, match.start(), schemas)
    return [call], end


def _listed(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    """A list of Python calls at the start of a line; other text in brackets is none."""
    calls: list[Call] = []
    position = match.end()
    while PYTHON_CALL.match(text, position):
        call, position, cut = python_call(text, position)
        if call.error and not cut and not calls:
            return [], position
        calls.append(call)
        position = at(_COMMA, text, position).end()
    return calls, position


_COMMA = re.compile(r"\s*,?\s*")


def _alone(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    """A text that is one Python call and nothing else."""
    call, end, _ = python_call(text, match.end())
    whole = call.error is None and not text[end:].strip()
    return ([call] if whole else []), end if whole else match.end() + 1


_READERS: dict[str, Callable[[str, re.Match[str], Schemas], Found]] = {
    "thought": _thought,
    "marked": _marked,
    "mistral": _mistral,
    "tagged": _tagged,
    "bare": _bare,
    "listed": _listed,
    "alone": _alone,
}
