"""Answers that a server streamed and a log kept in pieces, put together: of chat completions, Responses and Messages.

A stream is a list of its events, or its text as it was sent (`data: {…}` lines).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from probe.jsontext import quoted
from probe.tasks.imports.files import members, parsed

_TEXTS = ("content", "refusal", "reasoning_content", "reasoning")
_ENDS = ("response.completed", "response.incomplete", "response.failed")


def is_stream(value: Any) -> bool:
    """Whether a response is a stream's events or text."""
    if isinstance(value, str):
        return value.lstrip().startswith(("data:", "event:"))
    return isinstance(value, list) and bool(value) and all(map(_is_event, value))


def whole(value: Sequence[Any] | str) -> dict[str, Any]:
    """The answer that a stream gave, as the server would have given it at once. Raises ValueError where it cannot be told."""
    events = _sent(value) if isinstance(value, str) else [members(event) for event in value]
    kinds = {event.get("type") for event in events}
    if any(isinstance(kind, str) and kind.startswith("response.") for kind in kinds):
        return _of_responses(events)
    if "message_start" in kinds:
        return _of_messages(events)
    return _of_chat(events)


def _is_event(value: Any) -> bool:
    event = members(value)
    kind = event.get("type")
    streamed = isinstance(kind, str) and kind.startswith(("response.", "message_", "content_block", "ping"))
    return streamed or event.get("object") == "chat.completion.chunk"


def _sent(text: str) -> list[dict[str, Any]]:
    sent = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
    return [event for event in map(members, sent) if event]


def _listed(value: Any) -> list[dict[str, Any]]:
    return [members(each) for each in value] if isinstance(value, list) else []


def _add_texts(into: dict[str, Any], delta: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if isinstance(delta.get(name), str):
            into[name] = (into.get(name) or "") + delta[name]


def _of_chat(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {"object": "chat.completion"}
    choices: dict[Any, dict[str, Any]] = {}
    for event in events:
        if event.get("error"):
            return {"error": event["error"]}
        out |= {name: event[name] for name in ("id", "model") if event.get(name)}
        for given in _listed(event.get("choices")):
            index = given.get("index", 0)
            message = {"role": "assistant", "content": None}
            choice = choices.setdefault(index, {"index": index, "message": message})
            _add_delta(choice["message"], members(given.get("delta")))
            if given.get("finish_reason"):
                choice["finish_reason"] = given["finish_reason"]
    if not choices or any("finish_reason" not in choice for choice in choices.values()):
        raise ValueError("its response is a stream that has no end")
    for choice in choices.values():
        if calls := choice["message"].pop("calls", None):
            choice["message"]["tool_calls"] = list(calls.values())
    return {**out, "choices": list(choices.values())}


def _add_delta(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    _add_texts(message, delta, _TEXTS)
    if earlier := members(delta.get("function_call")):
        _add_texts(message.setdefault("function_call", {}), earlier, ("name", "arguments"))
    for given in _listed(delta.get("tool_calls")):
        entry = message.setdefault("calls", {}).setdefault(given.get("index", 0), {})
        entry |= {name: given[name] for name in ("id", "type") if given.get(name)}
        for key in ("function", "custom"):
            if part := members(given.get(key)):
                _add_texts(entry.setdefault(key, {}), part, ("name", "arguments", "input"))


def _of_responses(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ends = [members(event.get("response")) for event in events if event.get("type") in _ENDS]
    if not ends:
        raise ValueError("its response is a stream that has no end")
    return ends[-1]


def _of_messages(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}
    for event in events:
        kind, delta = event.get("type"), members(event.get("delta"))
        if kind == "message_start":
            message = dict(members(event.get("message")))
        elif kind == "content_block_start":
            blocks[event.get("index")] = dict(members(event.get("content_block")))
        elif kind == "content_block_delta":
            block = blocks.get(event.get("index"))
            if block is None:
                raise ValueError(
                    f"its stream goes on with a block {quoted(str(event.get('index')))} that never began"
                )
            _add_texts(block, delta, ("text", "thinking", "partial_json"))
        elif kind == "message_delta":
            message |= delta
        elif kind == "error":
            return {"error": event.get("error") or "error"}
    if "message_stop" not in {event.get("type") for event in events}:
        raise ValueError("its response is a stream that has no end")
    for block in blocks.values():
        if "partial_json" in block:
            arguments = block.pop("partial_json")
            block["input"] = parsed(arguments) if arguments else {}
    return {**message, "content": list(blocks.values())}
