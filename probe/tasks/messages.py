"""Messages of a chat, and checks of fields that several kinds have."""

from __future__ import annotations

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
from probe.tasks.answers import ANSWER_TYPES, is_of_type, type_of

ROLES = ("system", "user", "assistant", "tool")


class Message(msgspec.Struct, frozen=True):
    """One turn of a chat."""

    role: str
    """One of `ROLES`."""
    content: str


def _check_role(value: Any, spot: Spot) -> Any:
    if value in _OTHER_ROLES:
        spot.fault(f"unknown role {quoted(value)}", f"write {quoted(_OTHER_ROLES[value])}")
    elif check_type(value, str, spot) and value not in ROLES:
        spot.fault(f"unknown role {quoted(value)}", f"write one of {', '.join(ROLES)}")
    return value


def _check_message(value: Any, spot: Spot) -> Message:
    fields = check_fields(value, spot, _MESSAGE, _MESSAGE, _ADVICE)
    return Message(fields.get("role", ""), fields.get("content", ""))


def check_messages(value: Any, spot: Spot) -> tuple[Message, ...]:
    """A list of at least one `{role, content}`."""
    return check_list(value, spot, _check_message)


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
    return "\n".join(f"{message.role} {message.content}" for message in content)


def _check_content(value: Any, spot: Spot) -> Any:
    if value is None:
        spot.fault(
            "must be a string, is null", 'write what was said; a call as the model writes it, "" for nothing'
        )
        return ""
    if isinstance(value, list):
        spot.fault("must be a string, is a list", "write the texts of its parts as one string")
        return ""
    return check_string(value, spot)


_OTHER_ROLES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function": "tool",
}
"""Roles of other formats."""
_CALL = 'write the call into "content" as the model writes it: a message has a role and a text, nothing else'
_ADVICE = {
    "tool_calls": _CALL,
    "function_call": _CALL,
    "tool_call_id": "take it out: a result follows its call",
    "name": "take it out",
    "reasoning_content": 'take it out, or write it into "content" as the model writes it',
    "reasoning": 'take it out, or write it into "content" as the model writes it',
    "thinking": 'take it out, or write it into "content" as the model writes it',
    "refusal": "take it out",
    "annotations": "take it out",
    "from": 'rename it to "role"',
    "value": 'rename it to "content"',
}
"""What to do with fields of messages in other formats."""
_MESSAGE: dict[str, Check] = {"role": _check_role, "content": _check_content}
