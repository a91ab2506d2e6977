"""A message of a conversation, as templates are given it and with the labels of its texts.

The format is that of chat completions: a role, a content that is a text, a list of text parts or null, and of an
assistant its calls and thoughts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from probe.prompts.labels import ASSISTANT, RESULT, SYSTEM, USER
from probe.prompts.parts import Segment

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Fields of an assistant's message that hold its thought."""
INSTRUCTING = ("system", "developer")
"""Roles that instruct the model."""
_LABELS = {"assistant": ASSISTANT, "tool": RESULT, **dict.fromkeys(INSTRUCTING, SYSTEM)}


class ChatTurn(NamedTuple):
    """A message of a conversation."""

    role: str
    parts: Sequence[Segment]
    """Its content; where it is a list of parts, one segment each."""
    fields: Mapping[str, Any] | None = None
    """The whole message where it is more than a role and a text."""
    label: str = USER
    """Label of what has none in `parts`: calls, thoughts, and what a template writes around them."""

    @property
    def calls(self) -> list[Mapping[str, Any]]:
        """Calls of an assistant's message, each `{name, arguments}`."""
        return [call["function"] for call in (self.fields or {}).get("tool_calls") or ()]

    @property
    def thought(self) -> str:
        """What was thought before anything was said; empty for nothing."""
        return next((text for name in THOUGHTS if (text := (self.fields or {}).get(name))), "")


Turns = list[ChatTurn]


def label_of(role: str) -> str:
    """Label of a message of the history."""
    return _LABELS.get(role, USER)


def chat_turn(role: str, content: str, fields: Mapping[str, Any] | None = None, label: str = "") -> ChatTurn:
    """A message as a task gives it; `fields` where it is more than a role and a text. `label`: that of the role."""
    label = label or label_of(role)
    given = content if fields is None else fields.get("content")
    texts = [part["text"] for part in given] if isinstance(given, list) else [given or ""]
    return ChatTurn(role, [Segment(text, label) for text in texts], fields, label)


def message_of(
    turn: ChatTurn,
    content: Callable[[Sequence[Segment]], str] = lambda parts: "".join(part.text for part in parts),
    text: Callable[[str, str], str] = lambda text, _role: text,
) -> dict[str, Any]:
    """What a template is given. `content` writes what is said, `text` a `thought`, the `name` in a call or a text of its
    `arguments`."""
    if turn.fields is None:
        return {"role": turn.role, "content": content(turn.parts)}
    message = dict(turn.fields)
    given = message.get("content")
    if isinstance(given, list):
        shown = (content([segment]) for segment in turn.parts)
        message["content"] = [{**part, "text": new} for part, new in zip(given, shown, strict=True)]
    elif isinstance(given, str):
        message["content"] = content(turn.parts)
    for name in THOUGHTS:
        if isinstance(message.get(name), str):
            message[name] = text(message[name], "thought")
    if message.get("tool_calls"):
        message["tool_calls"] = [_call(call, text) for call in message["tool_calls"]]
    return message


def _call(call: Mapping[str, Any], text: Callable[[str, str], str]) -> dict[str, Any]:
    function = dict(call["function"])
    in_id = function["name"] in str(call.get("id", ""))  # where some templates read it
    function["name"] = text(function["name"], "arguments" if in_id else "name")
    if "arguments" in function:
        function["arguments"] = _texts(function["arguments"], lambda value: text(value, "arguments"))
    return {**call, "function": function}


def _texts(value: Any, write: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return write(value)
    if isinstance(value, list):
        return [_texts(item, write) for item in value]
    if isinstance(value, dict):
        return {key: _texts(item, write) for key, item in value.items()}
    return value


def messages_of(turns: Iterable[ChatTurn]) -> list[dict[str, Any]]:
    """What a template is given of a conversation."""
    return [message_of(turn) for turn in turns]


def arguments_of(call: Mapping[str, Any]) -> Any:
    """Arguments of a call as the object that they spell; as they are where they spell none."""
    given = call.get("arguments", {})
    if not isinstance(given, str):
        return given
    try:
        read = json.loads(given)
    except ValueError:
        return given
    return read if isinstance(read, dict) else given
