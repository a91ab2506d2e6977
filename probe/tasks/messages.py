"""Messages of a chat, and checks of fields that several kinds have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from probe.jsontext import (
    Check,
    Spot,
    check_distinct,
    check_fields,
    check_list,
    check_string,
    check_text,
    check_type,
    kind_of,
    quoted,
)
from probe.prompts.turns import THOUGHTS, ChatTurn, chat_turn
from probe.tasks.answer_types import ANSWER_TYPES
from probe.tasks.answers import is_of_type, type_of

ROLES = ("system", "developer", "user", "assistant", "tool")


class Message(msgspec.Struct, frozen=True):
    """One turn of a chat."""

    role: str
    """One of `ROLES`."""
    content: str
    """Its text: of a list of parts their texts, a line each; empty where nothing is said."""
    fields: dict[str, Any] | None = None
    """The message in the format of chat completions, where it is more than a role and a text."""

    def turn(self, label: str = "") -> ChatTurn:
        """The message as prompts are made of it; `label` in place of that of its role."""
        return chat_turn(self.role, self.content, self.fields, label)


def check_messages(value: Any, spot: Spot) -> tuple[Message, ...]:
    """A list of at least one message in the format of chat completions."""
    return check_list(value, spot, _check_message)


def _check_message(value: Any, spot: Spot) -> Message:
    if isinstance(value, dict):  # what servers write where there is nothing
        value = {name: v for name, v in value.items() if name not in _EMPTY or v not in (None, [], "")}
    fields = check_fields(value, spot, _MESSAGE, ("role",), _ADVICE)
    if not isinstance(value, dict):
        return Message("", "")
    role = fields.get("role", "")
    for name in ("tool_calls", *THOUGHTS):
        if name in fields and role in ROLES and role != "assistant":
            spot[name].fault(f"stands in a message of the role {quoted(role)}", "take it out", at_key=True)
    says_more = bool(fields.get("tool_calls")) or any(fields.get(name) for name in THOUGHTS)
    if "content" not in fields and not (role == "assistant" and says_more):
        if "content" in value:
            fix = 'write what was said, "" for nothing'
            spot["content"].fault("must be a string or a list of text parts, is null", fix)
        elif "value" not in value:
            spot["content"].fault("missing", 'add "content"')
    content = fields.get("content", "")
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    plain = set(fields) <= {"role", "content"} and isinstance(content, str) and "content" in fields
    return Message(role, text, None if plain else {"role": role, "content": None, **fields})


def check_choices(value: Any, spot: Spot) -> tuple[str, ...]:
    """Texts, none of them twice."""
    choices = check_list(value, spot, check_text)
    check_distinct(choices, spot, "is listed twice", "keep one")
    return choices


def check_answer(value: Any, spot: Spot) -> Any:
    """A text or a number."""
    if isinstance(value, str):
        return check_text(value, spot)
    if isinstance(value, bool) or not isinstance(value, int | float):
        what = f"must be a string or a number, is {kind_of(value)}"
        spot.fault(what, "write the answer to reach, or leave the field out")
    return value


def check_answer_type(value: Any, spot: Spot) -> Any:
    """One of `ANSWER_TYPES`."""
    if check_type(value, str, spot) and value not in ANSWER_TYPES:
        spot.fault(f"unknown type of answer {quoted(value)}", f"write one of {', '.join(ANSWER_TYPES)}")
    return value


def compare_answer(fields: Mapping[str, Any], spot: Spot) -> None:
    """An answer can be read as the type that the task gives it."""
    answer, kind = fields.get("answer"), fields.get("answer_type")
    if kind not in ANSWER_TYPES:
        return
    if "answer" not in fields:
        spot["answer_type"].fault(
            'given without "answer"', 'add "answer", or leave the type out', at_key=True
        )
    elif isinstance(answer, str | int | float) and not is_of_type(answer, kind):
        fix = f"write the answer as such, or the answer_type {quoted(type_of(str(answer)))}"
        spot["answer"].fault(f"{quoted(answer)} cannot be read as the answer_type {quoted(kind)}", fix)


def text_of(content: str | Sequence[Message]) -> str:
    """The request as one text."""
    if isinstance(content, str):
        return content
    return "\n".join(f"{message.role} {_whole(message)}" for message in content)


def _whole(message: Message) -> str:
    """What a message says, its calls included."""
    if message.fields is None:
        return message.content
    return json.dumps(message.fields, ensure_ascii=False, sort_keys=True)


def _check_role(value: Any, spot: Spot) -> Any:
    if isinstance(value, str) and value in _OTHER_ROLES:
        spot.fault(f"unknown role {quoted(value)}", f"write {quoted(_OTHER_ROLES[value])}")
    elif check_type(value, str, spot) and value not in ROLES:
        spot.fault(f"unknown role {quoted(value)}", f"write one of {', '.join(ROLES)}")
    return value


def _check_content(value: Any, spot: Spot) -> Any:
    """A text, or a list of text parts, which get the type `text` by which templates know them."""
    if isinstance(value, list):
        return [_check_part(part, spot[index]) for index, part in enumerate(value)]
    if not isinstance(value, str):
        what = f"must be a string or a list of text parts, is {kind_of(value)}"
        spot.fault(what, 'write what was said, "" for nothing')
        return ""
    return value


def _check_part(value: Any, spot: Spot) -> dict[str, str]:
    fields: dict[str, Any] = {}
    if isinstance(value, dict) and value.get("type") not in _TEXTS:
        what = f"is a part of the type {quoted(value.get('type'))}: a model is shown texts alone"
        spot.fault(what, "write its text, or take it out")
    else:
        shown = {k: v for k, v in value.items() if k in _PART} if isinstance(value, dict) else value
        fields = check_fields(shown, spot, _PART, ("text",))
    text = fields.get("text")
    return {"type": "text", "text": text if isinstance(text, str) else ""}


def _check_calls(value: Any, spot: Spot) -> list[dict[str, Any]]:
    return list(check_list(value, spot, _check_call))


def _check_call(value: Any, spot: Spot) -> dict[str, Any]:
    fields = check_fields(value, spot, _CALL, ("function",), _ADVICE_ON_CALLS)
    return {"type": "function", "function": {"name": ""}, **fields}


def _check_function(value: Any, spot: Spot) -> dict[str, Any]:
    return {"name": "", **check_fields(value, spot, _FUNCTION, ("name",))}


def _check_arguments(value: Any, spot: Spot) -> Any:
    if not isinstance(value, str | dict):
        what = f"must be an object or a JSON text, is {kind_of(value)}"
        spot.fault(what, "write an object, {} for no arguments")
    return value


_TEXTS = ("text", "input_text", "output_text")
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "function": "tool"}
"""Roles of other formats."""
_EMPTY = (
    *("tool_calls", "function_call", "refusal", "annotations", "audio", "tool_call_id", "name"),
    *THOUGHTS,
)
"""Fields that servers write without anything in them."""
_ADVICE = {
    "function_call": 'write it as "tool_calls": [{"function": {"name": ..., "arguments": ...}}]',
    "refusal": 'write it as "content"',
    "annotations": "take it out",
    "from": 'rename it to "role"',
    "value": 'rename it to "content"',
}
"""What to do with fields of messages in other formats."""
_ADVICE_ON_CALLS: dict[str, str] = dict.fromkeys(
    ("name", "arguments"), 'write it into "function": {"name": ..., "arguments": ...}'
)
_PART: dict[str, Check] = {"type": check_string, "text": check_string}
_FUNCTION: dict[str, Check] = {"name": check_text, "arguments": _check_arguments}
_CALL: dict[str, Check] = {
    "id": check_string,
    "type": check_string,
    "index": lambda value, _spot: value,
    "function": _check_function,
}
_MESSAGE: dict[str, Check] = {
    "role": _check_role,
    "content": _check_content,
    "tool_calls": _check_calls,
    "tool_call_id": check_string,
    "name": check_string,
    **dict.fromkeys(THOUGHTS, check_string),
}
