"""Logs of OpenAI's interfaces: chat completions and Responses, each request with its response, and chats as they are.

A line is `{request, response}` (also `kwargs`, `body`, `completion`, …), a request with the response's fields in it, the
Batch API's lines (input and output files are put together by `custom_id`), or a chat: `{messages, tools}`, of which every
turn of the assistant is a decision. https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from probe.jsontext import kind_of, printable, quoted
from probe.tasks.imports.chat import (
    Unreadable,
    call,
    chat,
    chats,
    content_of,
    numbered,
    string_of,
    unreadable,
)
from probe.tasks.imports.files import Entry, Half, items, joined, members, parsed, values
from probe.tasks.imports.record import Chat, Format, Item, LoggedTurn, Record, turns
from probe.tasks.imports.streams import is_stream, whole

_REQUESTS = ("request", "req", "kwargs", "params", "input")
_RESPONSES = ("response", "resp", "completion", "output", "result")


def exchange(value: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(request, response) of a line; the response is None where it has none. Raises ValueError for an error of the server."""
    value = {
        key: whole(part) if key in _RESPONSES and is_stream(part) else part for key, part in value.items()
    }
    request = next((_body(value[key]) for key in _REQUESTS if _has_body(value.get(key))), None)
    response = next((_body(value[key]) for key in _RESPONSES if _has_body(value.get(key))), None)
    if request is None:
        request = _body(value)
    if response is None and _is_response(value):
        response = dict(value)
    for part in (value, response or {}):
        status = part.get("status_code")
        if isinstance(status, int) and status >= 400:
            raise ValueError(f"the server answered with the error {status}")
        if part.get("error"):
            raise ValueError(f"the server answered with an error: {printable(_reason(part['error']), 120)}")
    return request, response


def _reason(error: Any) -> str:
    return str(error.get("message") or error.get("type")) if isinstance(error, dict) else str(error)


def _has_body(value: Any) -> bool:
    return isinstance(parsed(value), dict)


def _body(value: Any) -> dict[str, Any]:
    value = parsed(value)
    for key in ("body", "json"):
        if isinstance(inner := parsed(value.get(key)), dict):
            kept = {name: value[name] for name in ("status_code", "error") if value.get(name)}
            return {**inner, **kept}
    return value


def _is_response(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get("choices"), list) or value.get("object") == "response"


def _half(value: Any) -> Half | None:
    """A line of the Batch API, which has requests in one file and responses in another."""
    name = value.get("custom_id") if isinstance(value, dict) else None
    if not isinstance(name, str) or _has_body(value.get("request")):
        return None
    if value.get("response") is not None or value.get("error") is not None:
        return Half(name, "response", {**members(value.get("response")), "error": value.get("error")})
    return Half(name, "request", value) if _has_body(value.get("body")) else None


def read(paths: Sequence[Path], _category: str | None) -> Iterator[Item]:
    """Records of files in order; a response that continues another of these files has its turns before it."""
    known: dict[str, list[Chat]] = {}
    entries = joined((entry for path in paths for entry in values(path)), _half)
    return items(entries, lambda entry: records(entry, known))


def records(entry: Entry, known: dict[str, list[Chat]]) -> Iterator[Record]:
    """The records of one line: one, or one for each choice of a response. Raises ValueError with why there is none.

    `known` has the conversation that each response of the Responses API ended, and is added to.
    """
    value = entry.value
    if not isinstance(value, dict):
        raise ValueError(f"is {kind_of(value)}, not an object")
    if value.get("object") == "chat.completion.chunk":
        raise ValueError("is a piece of a streamed answer: log the answer whole")
    request, response = exchange(value)
    name = value.get("custom_id") or (response or {}).get("id") or value.get("id")
    identity = name if isinstance(name, str) else str(name) if isinstance(name, int) else None
    if response is not None and (
        response.get("object") == "response" or isinstance(response.get("output"), list)
    ):
        yield _of_responses(entry.place, identity, request, response, known)
        return
    tools = parsed(request.get("tools")) or parsed(request.get("functions"))
    model = string_of((response or {}).get("model")) or string_of(request.get("model"))
    given = next(
        (g for g in (request.get("messages"), value.get("input")) if isinstance(parsed(g), list)), None
    )
    if given is None:
        if isinstance(request.get("prompt"), str | list) and response is not None:
            raise ValueError("is a completion of a text, which has no messages")
        raise ValueError("has no messages")
    messages = chats(given)
    if response is None:
        yield Record(entry.place, identity, turns(messages, tools), messages, tools, model)
        return
    choices = [{"message": response}] if response.get("role") == "assistant" else response.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ValueError("its response has no choices")
    wanted = request.get("tool_choice", request.get("function_call"))
    for index, given in enumerate(choices):
        if not isinstance(given, dict) or not isinstance(given.get("message"), dict):
            raise ValueError("its response has a choice without a message")
        turn = numbered([*messages, chat({"role": "assistant", **given["message"]})])[-1]
        several = len(choices) > 1
        yield Record(
            f"{entry.place} choice {index + 1}" if several else entry.place,
            f"{identity}.{index + 1}" if several and identity else identity,
            [LoggedTurn(messages, turn, tools, _plain(wanted), string_of(given.get("finish_reason")))],
            [*messages, turn],
            tools,
            model,
        )


def _plain(choice: Any) -> Any:
    """The earlier `function_call` of a request as a `tool_choice`."""
    return {"type": "function", **choice} if isinstance(choice, dict) and set(choice) == {"name"} else choice


# --- Responses ---


def _of_responses(
    place: str,
    identity: str | None,
    request: Mapping[str, Any],
    response: Mapping[str, Any],
    known: dict[str, list[Chat]],
) -> Record:
    def either(key: str) -> Any:
        return request[key] if request.get(key) is not None else response.get(key)

    if isinstance(response.get("status"), str) and response["status"] in (
        "failed",
        "cancelled",
        "queued",
        "in_progress",
    ):
        raise ValueError(f"its response is {response['status']}")
    if either("conversation"):
        raise ValueError("goes on in a conversation that the server keeps, and the log does not have")
    earlier: list[Chat] = []
    if before := either("previous_response_id"):
        if before not in known:
            raise ValueError(f"goes on from the response {quoted(before)}, which is not before it in the log")
        earlier = known[before]
    given = parsed(request.get("input")) if "input" in request else None
    if given is None:
        raise ValueError("has the response and no request: its input is not known")
    asked = [{"role": "user", "content": given}] if isinstance(given, str) else list(of_items(given))
    (turn, *more) = list(of_items(response.get("output"))) or [{"role": "assistant", "content": None}]
    if more:
        turn = unreadable("assistant", "is more than one turn")
    instructions = either("instructions")
    start = (
        [{"role": "system", "content": instructions}]
        if isinstance(instructions, str) and instructions
        else []
    )
    messages = numbered([*start, *earlier, *asked, turn])
    if isinstance(response.get("id"), str):
        known[response["id"]] = messages[len(start) :]
    tools = parsed(either("tools"))
    end = (response.get("incomplete_details") or {}).get("reason")
    return Record(
        place,
        identity,
        [LoggedTurn(messages[:-1], messages[-1], tools, either("tool_choice"), string_of(end))],
        messages,
        tools,
        string_of(either("model")),
    )


def of_items(items: Any) -> Iterator[Chat]:
    """Messages of the items of the Responses API: what the assistant writes up to the next item of another is one turn."""
    if not isinstance(items, list):
        raise ValueError(f"has {kind_of(items)} where its items should be")
    turn: dict[str, Any] | None = None
    for item in items:
        if not isinstance(item, dict):
            raise ValueError("has an item that is no object")
        kind = item.get("type", "message")
        if kind in ("function_call", "custom_tool_call", "reasoning") or item.get("role") == "assistant":
            turn = turn or {"role": "assistant", "content": None}
            _add(turn, item, kind)
            continue
        if turn is not None:
            yield turn
            turn = None
        if kind in ("function_call_output", "custom_tool_call_output"):
            yield chat({"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")})
        elif kind == "message":
            yield chat(item)
        else:
            yield unreadable(
                "assistant", f"is an item of the type {quoted(kind)}, for which a chat has no place"
            )
    if turn is not None:
        yield turn


def _add(turn: dict[str, Any], item: Mapping[str, Any], kind: str) -> None:
    """Put an item of the assistant into its turn."""
    try:
        if kind == "reasoning":
            _, thought = content_of(
                [{**part, "type": "reasoning", "reasoning": part.get("text")} for part in _parts(item)]
            )
            if thought:
                turn["reasoning_content"] = "\n".join(filter(None, (turn.get("reasoning_content"), thought)))
        elif kind == "message":
            spoken, _ = content_of(item.get("content"))
            both = [*_texts(turn["content"]), *_texts(spoken)]
            turn["content"] = (
                both[0] if len(both) == 1 else [{"type": "text", "text": text} for text in both] or None
            )
        else:
            arguments = item.get("arguments") if kind == "function_call" else {"input": item.get("input")}
            if not isinstance(item.get("name"), str):
                raise Unreadable("has a call without a name")
            turn.setdefault("tool_calls", []).append(call(item["name"], arguments, item.get("call_id")))
    except Unreadable as error:
        turn["unreadable"] = str(error)


def _parts(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    parts = item.get("content") or item.get("summary") or []
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def _texts(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content or ()]


OPENAI = Format(
    name="openai",
    about="chat completions and Responses, requests with their responses, Batch files, and chats",
    read=read,
    suffixes=(".jsonl", ".json", ".parquet"),
    continues=True,
)
