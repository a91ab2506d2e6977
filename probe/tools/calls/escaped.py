"""Arguments as FunctionGemma and Gemma 4 write them: `{city:<escape>Oslo<escape>,days:2}`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from probe.jsontext import MAX_DEPTH
from probe.tools.calls.call import Call, broken

ESCAPES = ("<escape>", '<|"|>')
_PART = re.compile(r'(?P<mark><escape>|<\|"\|>)|(?P<open>[{\[])|(?P<close>[}\]])|(?P<sign>[:,])')


_WORDS = {"null": None, "true": True, "false": False}
_PYTHON_WORDS = {"None": None, "True": True, "False": False}


def escaped_arguments(text: str, words: Mapping[str, Any] = _WORDS) -> dict[str, Any]:
    """The arguments of a call, as forgiving as BFCL's walk: what cannot be placed is left out.

    `words` are those that stand for a value without marks around them.

    Raises ValueError where they are nested too deeply.
    """
    root: list[Any] = []
    stack: list[Any] = [root]
    keys: list[str | None] = [None]
    pending: Any = None
    written, position = "", 0

    def put(value: Any) -> Any:
        nonlocal pending
        if isinstance(stack[-1], list):
            stack[-1].append(value)
        elif keys[-1] is not None:
            stack[-1][keys[-1]] = value
            keys[-1] = None
        else:
            pending = value

    def commit() -> None:
        nonlocal written
        if written.strip():
            put(_bare(written.strip(), words))
        written = ""

    while position < len(text):
        match = _PART.search(text, position)
        written += text[position : match.start() if match else len(text)]
        if match is None:
            break
        position = match.end()
        if match["mark"]:
            end = text.find(match["mark"], position)
            value = text[match.start() :] if end < 0 else text[position:end]
            position = len(text) if end < 0 else end + len(match["mark"])
            commit()
            put(value)
        elif match["open"]:
            commit()
            if len(stack) > MAX_DEPTH:
                raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
            value = {} if match["open"] == "{" else []
            put(value)
            stack.append(value)
            keys.append(None)
            pending = None
        elif match["close"]:
            commit()
            if len(stack) > 1:
                stack.pop()
                keys.pop()
            pending = None
        elif match["sign"] == ":" and (written.strip() or pending is not None):
            if isinstance(stack[-1], dict):
                keys[-1] = written.strip() or str(pending)
            written, pending = "", None
        else:
            commit()
            pending = None
    return root[0] if root and isinstance(root[0], dict) else {}


def _bare(text: str, words: Mapping[str, Any]) -> Any:
    if text in words:
        return words[text]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


_NAME = re.compile(r"call:\s*(?P<name>[^\s{}<>]{1,128})\s*(?P<open>\{)?")


def escaped_call(text: str, start: int) -> tuple[Call, int]:
    """The call `call:name{…}` at `start`, and where it ends."""
    named = _NAME.match(text, start)
    if named is None:
        return broken(text, start, start + len("call:"), "the call names no tool"), start + len("call:")
    name, end = named["name"], named.end()
    if named["open"] is None:
        behind = text.startswith(("<end_function_call>", "<tool_call|>"), named.end())
        call = Call(name, {}, text[start:end], start, end)
        return (call if behind else broken(text, start, end, "the call has no arguments")), end
    position, depth = named.end() - 1, 0
    while part := _PART.search(text, position):
        position = part.end()
        if part["mark"]:
            close = text.find(part["mark"], position)
            if close < 0:
                break
            position = close + len(part["mark"])
        depth += bool(part["open"]) - bool(part["close"])
        if depth == 0 and part["close"]:
            try:
                arguments = escaped_arguments(text[named.end() - 1 : position], _WORDS | _PYTHON_WORDS)
            except ValueError as error:
                return broken(text, start, position, str(error), name, True), position
            return Call(name, arguments, text[start:position], start, position), position
    return broken(text, start, len(text), "the call is not complete: its brackets are not closed", name), len(
        text
    )
