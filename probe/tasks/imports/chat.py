"""Messages of logs in one spelling, that of OpenAI's chat completions, which task lines have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from probe.jsontext import kind_of, printable, quoted
from probe.prompts.turns import THOUGHTS
from probe.tasks.imports.files import members, parsed
from probe.tasks.imports.record import Chat

_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    **dict.fromkeys(("gpt", "model", "bot", "ai", "chatbot"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("tool_result", "environment", "function response"), "tool"),
}
"""Roles of logs and data sets, and the role that each is."""
_TEXT = ("text", "input_text", "output_text", "summary_text", "reasoning_text")


class Unreadable(ValueError):
    """A message that has no place in a task; the text says why."""


def chat(value: Any) -> Chat:
    """A message of any server's chat format, or `{"role", "unreadable"}` where a task cannot hold it."""
    role = value.get("role", value.get("from")) if isinstance(value, dict) else None
    known = _ROLES.get(role.lower(), "") if isinstance(role, str) else ""
    try:
        if not isinstance(value, dict):
            raise Unreadable(f"is {kind_of(value)}, not a message")
        if not known:
            raise Unreadable(f"has the role {quoted(role)}")
        return _message(value, known)
    except Unreadable as error:
        return unreadable(known or "user", str(error))


def unreadable(role: str, reason: str) -> Chat:
    """A message in place of one that a task cannot hold."""
    return {"role": role, "unreadable": reason}


def _message(value: Mapping[str, Any], role: str) -> dict[str, Any]:
    if value.get("audio"):
        raise Unreadable("has sound")
    given = value.get("content", value.get("value"))
    text, thought = content_of(_result(given) if role == "tool" else given)
    message: dict[str, Any] = {"role": role, "content": text}
    if role == "assistant":
        if not text and isinstance(value.get("refusal"), str) and value["refusal"]:
            message["content"] = value["refusal"]
        thought = next((value[key] for key in THOUGHTS if isinstance(value.get(key), str)), None) or thought
        if thought:
            message["reasoning_content"] = thought
        if calls := calls_of(value):
            message["tool_calls"] = calls
    elif text is None:
        message["content"] = ""
    if role == "tool":
        for key, others in (("tool_call_id", ("id",)), ("name", ("function",))):
            name = next((value[k] for k in (key, *others) if isinstance(value.get(k), str)), None)
            if name:
                message[key] = name
    return message


def _result(value: Any) -> Any:
    """A tool's result as a content: what a log holds as it came, an object, a number or a list that is none of parts, as a text
    of JSON."""
    parts = value if isinstance(value, list) else [value]
    if isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] in _TEXT:
        return parts
    if value is None or isinstance(value, str):
        return value
    told = all(isinstance(part, str) or isinstance(members(part).get("type"), str) for part in parts)
    if isinstance(value, list) and (told or all("text" in members(part) for part in parts)):
        return value
    return json.dumps(value, ensure_ascii=False)


def content_of(value: Any) -> tuple[str | list[dict[str, str]] | None, str | None]:
    """(content, reasoning) of a content: a text, or the list of its texts where there are several.

    Raises Unreadable for images, sound, files and what a server's own tools wrote.
    """
    if value is None or isinstance(value, str):
        return value, None
    if not isinstance(value, list):
        raise Unreadable(f"has {kind_of(value)} as its content")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in value:
        part = {"text": part} if isinstance(part, str) else members(part)
        kind, text = part.get("type", "text"), part.get("text")
        if kind == "refusal":
            text = part.get("refusal")
        elif kind in ("thinking", "reasoning"):
            text = part.get("thinking") or part.get("reasoning") or part.get("summary") or text
            thoughts += [text] if isinstance(text, str) else []
            continue
        elif kind == "redacted_thinking":
            continue
        elif kind not in _TEXT:
            raise Unreadable(f"has a part of the type {quoted(kind)}, and a task holds text alone")
        if not isinstance(text, str):
            raise Unreadable("has a part without its text")
        texts.append(text)
    content = None if not texts else texts[0]
    if len(texts) > 1:
        return [{"type": "text", "text": text} for text in texts], "\n".join(thoughts) or None
    return content, "\n".join(thoughts) or None


def string_of(value: Any) -> str | None:
    """A value that is a text with something in it; None for any other."""
    return value if isinstance(value, str) and value else None


def text_of(content: Any) -> str:
    """A content as one text."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


def calls_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls of a message: OpenAI's, its earlier `function_call`, and the flat ones of Inspect and τ²-bench."""
    given = parsed(message.get("tool_calls"))
    if not given and message.get("function_call"):
        given = [{"function": parsed(message["function_call"])}]
    if not given:
        return []
    if not isinstance(given, list):
        raise Unreadable(f"has {kind_of(given)} as its tool_calls")
    calls = []
    for item in given:
        if not isinstance(item, dict):
            raise Unreadable("has a call that is no object")
        inner = members(item.get("function")) or members(item.get("custom")) or item
        name = inner.get("name", item.get("function"))
        arguments = inner.get("arguments", inner.get("parameters"))
        if arguments is None and "input" in inner:
            arguments = {"input": inner["input"]} if isinstance(inner["input"], str) else inner["input"]
        if not isinstance(name, str) or not name:
            raise Unreadable("has a call without a name")
        calls.append(call(name, arguments, item.get("id") or item.get("call_id")))
    return calls


def call(name: str, arguments: Any, call_id: Any = None) -> dict[str, Any]:
    """A call as a message has it; `arguments` are an object or a text, as they were logged."""
    if not isinstance(arguments, dict | str):
        arguments = {} if arguments is None else json.dumps(arguments, ensure_ascii=False)
    identity = {"id": call_id} if isinstance(call_id, str) and call_id else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def numbered(messages: Sequence[Chat]) -> list[Chat]:
    """The messages with an id for every call, and each result beside its call, where the log gives none.

    A result without an id is taken for that of the first call that has none yet, of its own name where it has one.
    """
    count = 0
    waiting: list[tuple[str, str]] = []
    out: list[Chat] = []
    for message in messages:
        calls = message.get("tool_calls")
        if calls:
            named = []
            for item in calls:
                count += 1
                # Nine letters and digits: templates that check an id ask for just these.
                identity = item.get("id") or f"call{count:05d}"
                waiting.append((identity, item["function"]["name"]))
                named.append({"id": identity, **item})
            message = {**message, "tool_calls": named}
        elif message["role"] == "tool" and waiting:
            given, name = message.get("tool_call_id"), message.get("name")
            index = next(
                (
                    index
                    for index, (identity, called) in enumerate(waiting)
                    if identity == given or (given is None and name in (None, called))
                ),
                None,
            )
            if index is not None:
                identity, _ = waiting.pop(index)
                message = {**message, "tool_call_id": identity}
        out.append(message)
    return out


def chats(values: Any) -> list[Chat]:
    """The messages of a list. Raises ValueError where it is none."""
    values = parsed(values)
    if not isinstance(values, list):
        raise ValueError(f"has {kind_of(values)} where its messages should be")
    return numbered([chat(value) for value in values])


def faults(messages: Sequence[Chat]) -> Iterator[str]:
    """Why messages cannot be in a task, the first of them first."""
    for index, message in enumerate(messages):
        if "unreadable" in message:
            yield f"message {index + 1} ({message['role']}) {printable(message['unreadable'], 160)}"
