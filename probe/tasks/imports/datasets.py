"""Function-calling data sets of the Hugging Face hub, from local JSON lines, JSON or Parquet, a row a conversation.

| spelling | a row |
|---|---|
| xLAM, APIGen | `query`, `tools` and `answers`, the last two as texts of JSON |
| Hermes, ToolACE, APIGen-MT and other ShareGPT | `conversations` of `{from, value}`, `tools` or a `system` that lists them |
| Glaive | `system` that lists the tools, and `chat`, one text with `USER:`, `ASSISTANT:` and `FUNCTION RESPONSE:` |
| OpenAI's | `messages` and `tools`, or texts of JSON of both |

Calls that stand in a turn's text are read as a model's are (`probe.tools.calls`). A system text that lists the tools is
left out of the messages, for a model shows the tools by its own template; it stands in `metadata.log.system`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from probe.jsontext import kind_of, printable
from probe.tasks.imports.chat import call, chat, numbered, text_of, unreadable
from probe.tasks.imports.definitions import shown_name
from probe.tasks.imports.files import Entry, items, parsed, values
from probe.tasks.imports.record import NO_CALL, Chat, Format, Item, Record, turns
from probe.tools.calls import read_calls

_TOOLS = ("tools", "tools_json", "functions", "function_description", "available_tools")
_TALKS = ("conversations", "conversation", "messages", "dialogue")
_CALLERS = ("function_call", "function-call", "tool_call", "tool_calls")
_GLAIVE = re.compile(r"(?:^|\n)\s*(SYSTEM|USER|ASSISTANT|FUNCTION RESPONSE):")
_GLAIVE_CALL = re.compile(r"<functioncall>\s*")
_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_THOUGHT = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
_RESULT = re.compile(r"\A\s*<tool_response>\s*(.*?)\s*</tool_response>\s*\Z", re.DOTALL)
_MEANT = re.compile(r"\s*\[[^\[\]()]+\(.*\)\s*\]\s*\Z", re.DOTALL)
"""A text that is plainly a list of calls, whether it can be read or not."""


def read(paths: Sequence[Path], _category: str | None) -> Iterator[Item]:
    """Records of files in order, one a row."""
    return items((entry for path in paths for entry in values(path)), lambda entry: [_record(entry)])


def _record(entry: Entry) -> Record:
    row = entry.value
    if not isinstance(row, dict):
        raise ValueError(f"is {kind_of(row)}, not an object")
    name = next(
        (row[key] for key in ("id", "uuid", "conversation_id") if row.get(key) not in (None, "")), None
    )
    identity = str(name) if isinstance(name, str | int) else None
    tools = next((given for key in _TOOLS if (given := parsed(row.get(key)))), None)
    if isinstance(tools, str):
        tools = listed(tools)
    facts: dict[str, Any] = {}
    if isinstance(row.get("query"), str) and "answers" in row:
        messages = _of_query(row)
    elif isinstance(row.get("chat"), str):
        messages = _of_glaive(row["chat"])
    elif isinstance(row.get("sample"), str):
        messages = _of_glaive(row["sample"])
    else:
        talk = next((given for key in _TALKS if isinstance(given := parsed(row.get(key)), list)), None)
        if talk is None:
            raise ValueError("has neither a conversation nor a query with answers")
        messages = [part for value in talk for part in _of_turn(value)]
    system = next(
        (row[key] for key in ("system", "system_message") if isinstance(row.get(key), str) and row[key]), None
    )
    if system is not None:
        messages = [{"role": "system", "content": re.sub(r"\ASYSTEM:\s*", "", system)}, *messages]
    first = messages[0] if messages else {}
    if first.get("role") == "system" and (spoken := listed(text_of(first.get("content")))):
        # A row that has them twice has them as `tools` in full.
        tools, messages = tools or spoken, messages[1:]
        facts["system"] = text_of(first["content"])
    messages = numbered([_with_calls(message, tools) for message in messages])
    decisions = turns(messages, tools)
    if parsed(row.get("answers")) == []:
        decisions = [replace(decision, end=NO_CALL) for decision in decisions]
    return Record(entry.place, identity, decisions, messages, tools, facts=facts)


def _of_query(row: Mapping[str, Any]) -> list[Chat]:
    answers = parsed(row["answers"])
    if isinstance(answers, dict):
        answers = [answers]
    if not isinstance(answers, list):
        turn: Chat = {"role": "assistant", "content": str(answers or "")}
    elif all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in answers):
        turn = {"role": "assistant", "content": None}
        if answers:
            turn = {**turn, "tool_calls": [call(item["name"], item.get("arguments")) for item in answers]}
    else:
        turn = unreadable("assistant", "has an answer that is no call")
    return [{"role": "user", "content": row["query"]}, turn]


def _of_turn(value: Any) -> list[Chat]:
    """A turn; one that is a call, or several results, in the spelling of its data set is that in the chat's."""
    role = value.get("from", value.get("role")) if isinstance(value, dict) else None
    if isinstance(role, str) and role.lower() in _CALLERS:
        spoken = value.get("value", value.get("content"))
        calls = parsed(spoken)
        calls = [calls] if isinstance(calls, dict) else calls
        if not isinstance(calls, list) or not all(
            isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls
        ):
            return [unreadable("assistant", f"has a call that is none: {printable(str(spoken), 60)}")]
        calls_here = [call(item["name"], item.get("arguments", item.get("parameters"))) for item in calls]
        return [{"role": "assistant", "content": None, "tool_calls": calls_here}]
    message = chat(value)
    if message["role"] == "tool" and isinstance(message.get("content"), str):
        parts = re.split(r"(?<=</tool_response>)\s*(?=<tool_response>)", message["content"])
        texts = [inner[1] if (inner := _RESULT.match(part)) else part for part in parts]
        return [{**message, "content": text} for text in texts]
    return [message]


def _of_glaive(text: str) -> list[Chat]:
    """The turns of a chat that is one text."""
    roles = {"SYSTEM": "system", "USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
    marks = list(_GLAIVE.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    out: list[Chat] = []
    for mark, end in zip(marks, ends, strict=True):
        spoken = text[mark.end() : end].replace("<|endoftext|>", "").strip()
        out.append({"role": roles[mark[1]], "content": spoken})
    return out


# --- tools in a text ---


def listed(text: str) -> list[dict[str, Any]]:
    """The tools that a text lists as JSON: one list of them, or one object behind the other."""
    decoder = json.JSONDecoder()
    tools: list[dict[str, Any]] = []
    position = 0
    while match := re.compile(r"[\[{]\s*[{\"]").search(text, position):
        try:
            value, position = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            position = match.start() + 1
            continue
        tools += [item for item in (value if isinstance(value, list) else [value]) if _is_tool(item)]
    return tools


def _is_tool(value: Any) -> bool:
    inner = value.get("function", value) if isinstance(value, dict) else None
    described = ("description", "parameters", "input_schema", "inputSchema")
    return (
        isinstance(inner, dict)
        and isinstance(inner.get("name"), str)
        and any(key in inner for key in described)
    )


# --- calls in a text ---


def _with_calls(message: Chat, tools: Sequence[Any] | None) -> Chat:
    """A turn of the assistant whose text has calls, with these as calls and what stands before them as its text."""
    text = message.get("content")
    if message["role"] != "assistant" or "tool_calls" in message or not isinstance(text, str):
        return message
    thought = _THOUGHT.match(text)
    spoken = text[thought.end() :] if thought else text
    calls_read, before = _calls(spoken, tools or ())
    if not calls_read and not thought:
        return message
    out = dict(message)
    if thought:
        out["reasoning_content"] = thought[1].strip()
    if not calls_read:
        return {**out, "content": spoken}
    if None in calls_read:
        return unreadable(
            "assistant", f"has a call that cannot be read: {printable(spoken[len(before) :], 60)}"
        )
    return {**out, "content": before.strip() or None, "tool_calls": calls_read}


def _calls(text: str, tools: Sequence[Any]) -> tuple[list[Any], str]:
    """(calls, the text before them); None stands for a call that cannot be read."""
    for mark in (_GLAIVE_CALL, _TAGGED):
        if first := mark.search(text):
            bodies = [text[first.end() :]] if mark is _GLAIVE_CALL else [m[1] for m in _TAGGED.finditer(text)]
            items = [item for body in bodies for item in _objects(body)]
            return items, text[: first.start()]
    names = [inner["name"] for tool in tools if _is_tool(tool) and (inner := tool.get("function", tool))]
    for name in names:
        if name != shown_name(name):  # ToolACE's names have blanks, which no call of Python's has
            text = re.sub(rf"(?<=[\[,\s]){re.escape(name)}(?=\()", shown_name(name), text)
    logged = {shown_name(name): name for name in names}
    calls = read_calls(text)
    if not calls and _MEANT.match(text):
        return [None], ""
    calls_here = [
        None if item.name is None or item.error else call(logged.get(item.name, item.name), item.arguments)
        for item in calls
    ]
    return calls_here, text[: calls[0].start].rstrip("[ \n") if calls else text


def _objects(text: str) -> list[Any]:
    """The calls of a text of JSON, or of Python's literals, as Hermes and Glaive write them."""
    value = _literal(text.strip())
    items = value if isinstance(value, list) else [value]
    out: list[Any] = []
    for item in items:
        name = item.get("name") if isinstance(item, dict) else None
        arguments = item.get("arguments", item.get("parameters")) if isinstance(item, dict) else None
        out.append(call(name, arguments) if isinstance(name, str) and name else None)
    return out


def _literal(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        pass
    # Glaive quotes the arguments, a text of JSON, with single quotes: no JSON, and often no Python either.
    if match := re.fullmatch(r"""\{\s*"name":\s*"([^"]+)",\s*"arguments":\s*'(.*)'\s*\}""", text, re.DOTALL):
        return {"name": match[1], "arguments": match[2].replace("\\'", "'")}
    try:
        return ast.literal_eval(text) if len(text) < 2**16 else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


HF = Format(
    name="hf",
    about="function-calling data sets: xLAM and APIGen, Hermes, Glaive, ToolACE, and chats with tools",
    read=read,
    suffixes=(".jsonl", ".json", ".parquet"),
)
