"""Logs of Anthropic's Messages interface: a request with its response, Message Batches, and chats as they are.

https://docs.anthropic.com/en/api/messages and …/api/creating-message-batches
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from probe.jsontext import kind_of, quoted
from probe.tasks.imports.chat import Unreadable, call, chat, content_of, numbered, string_of, unreadable
from probe.tasks.imports.files import Entry, Half, items, joined, parsed, values
from probe.tasks.imports.openai import exchange
from probe.tasks.imports.record import Chat, Format, Item, LoggedTurn, Record, turns


def _half(value: Any) -> Half | None:
    """A line of a batch, which has requests in one file and results in another."""
    name = value.get("custom_id") if isinstance(value, dict) else None
    if not isinstance(name, str):
        return None
    halves = {"request": value.get("params"), "response": value.get("result")}
    given = [Half(name, side, part) for side, part in halves.items() if part is not None]
    return given[0] if len(given) == 1 else None


def _requests(entry: Entry) -> Iterator[Entry]:
    """The requests of a file as it was sent to the batch interface, `{"requests": […]}`, one by one."""
    inside = entry.value.get("requests") if isinstance(entry.value, dict) else None
    if isinstance(inside, list):
        yield from (Entry(f"{entry.place} request {index + 1}", value) for index, value in enumerate(inside))
    else:
        yield entry


def read(paths: Sequence[Path], _category: str | None) -> Iterator[Item]:
    """Records of files in order."""
    entries = (
        part
        for path in paths
        for entry in values(path)
        for part in (_requests(entry) if isinstance(entry, Entry) else (entry,))
    )
    return items(joined(entries, _half), lambda entry: [_record(entry)])


def _record(entry: Entry) -> Record:
    value = entry.value
    if not isinstance(value, dict):
        raise ValueError(f"is {kind_of(value)}, not an object")
    if str(value.get("type", "")).startswith(("message_", "content_block")):
        raise ValueError("is a piece of a streamed answer: log the answer whole")
    value = {key: _of_batch(part) for key, part in value.items()}
    request, response = exchange(value)
    if response is None and value.get("type") == "message":
        raise ValueError("has the response and no request: its messages are not known")
    given = parsed(request.get("messages"))
    if not isinstance(given, list):
        raise ValueError("has no messages")
    messages = [
        *_system(request.get("system")),
        *(part for message in given for part in _of_message(message)),
    ]
    tools, model = parsed(request.get("tools")), request.get("model")
    name = value.get("custom_id") or (response or {}).get("id") or value.get("id")
    identity = name if isinstance(name, str) else None
    if response is None:
        messages = numbered(messages)
        return Record(entry.place, identity, turns(messages, tools), messages, tools, string_of(model))
    if not isinstance(response.get("content"), list | str):
        raise ValueError("its response has no content")
    answer = _of_message({"role": "assistant", "content": response["content"]})
    if len(answer) != 1:
        answer = [unreadable("assistant", "is more than one turn")]
    messages = numbered([*messages, *answer])
    choice, end = request.get("tool_choice"), response.get("stop_reason")
    decision = LoggedTurn(messages[:-1], messages[-1], tools, choice, string_of(end))
    return Record(
        entry.place,
        identity,
        [decision],
        messages,
        tools,
        string_of(response.get("model")) or string_of(model),
    )


def _of_batch(part: Any) -> Any:
    """The message of a batch's result. Raises ValueError for one that did not succeed."""
    if isinstance(part, dict) and part.get("type") in ("succeeded", "errored", "canceled", "expired"):
        if part["type"] != "succeeded":
            raise ValueError(f"the request was {part['type']}")
        return part.get("message")
    return part


def _system(value: Any) -> list[Chat]:
    return [] if value in (None, "", []) else [chat({"role": "system", "content": value})]


def _of_message(value: Any) -> list[Chat]:
    """A message: results of tools are turns of their own, in their order among the user's texts."""
    if not isinstance(value, dict) or not isinstance(value.get("content"), list):
        return [chat(value)]
    role = value.get("role")
    if role == "assistant":
        return [_of_assistant(value["content"])]
    out: list[Chat] = []
    texts: list[Any] = []
    for block in value["content"]:
        if isinstance(block, dict) and block.get("type") == "tool_result":
            if texts:
                out.append(chat({"role": role, "content": texts}))
                texts = []
            out.append(
                chat(
                    {
                        "role": "tool",
                        "content": block.get("content"),
                        "tool_call_id": block.get("tool_use_id"),
                    }
                )
            )
        else:
            texts.append(block)
    return [*out, chat({"role": role, "content": texts})] if texts or not out else out


def _of_assistant(blocks: Sequence[Any]) -> Chat:
    """A turn: its texts, its thoughts and its calls."""
    calls: list[dict[str, Any]] = []
    try:
        for block in blocks:
            if isinstance(block, dict) and block.get("type") == "tool_use":
                if not isinstance(block.get("name"), str):
                    raise Unreadable("has a call without a name")
                calls.append(call(block["name"], block.get("input"), block.get("id")))
            elif calls and isinstance(block, dict) and block.get("type") == "text" and block.get("text"):
                raise Unreadable(f"says something behind its call of {quoted(calls[-1]['function']['name'])}")
        text, thought = content_of(
            [b for b in blocks if not (isinstance(b, dict) and b.get("type") == "tool_use")]
        )
    except Unreadable as error:
        return unreadable("assistant", str(error))
    turn: dict[str, Any] = {"role": "assistant", "content": text}
    if thought:
        turn["reasoning_content"] = thought
    return turn | ({"tool_calls": calls} if calls else {})


ANTHROPIC = Format(
    name="anthropic",
    about="Messages, requests with their responses, Message Batches, and chats",
    read=read,
    suffixes=(".jsonl", ".json", ".parquet"),
    continues=True,
)
