"""Logs of Inspect (inspect_ai): `.eval` archives, of whole and of chunked samples, and `.json`.

A sample is `{id, epoch, messages, events, attachments, …}`. A model event has the messages, the tools and the output of one
generation, so that each is a decision; `input_refs` are ranges of a pool of messages (`events_data`, `message_pool`), and a
text may stand in `attachments` under the name `attachment://HASH`. A chunked sample has the same in several members:
`samples/ID_epoch_N/sample.json`, `…/messages/START.json`, `…/events/START.json`, `…/attachments/START.json`.
Source: inspect_ai, log/_log.py, log/_recorders/eval.py, log/_recorders/chunked/format.py, event/_pool.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from probe.jsontext import kind_of, printable
from probe.tasks.imports.chat import chat, numbered
from probe.tasks.imports.files import Archive, Entry, document, items, members, shown
from probe.tasks.imports.record import Chat, Format, Item, LoggedTurn, Record, Skipped, turns

_ATTACHED = ("attachment://", "tc://")
_DEEPEST = 100
_WHOLE = re.compile(r"samples/(?:[^/]+|.+_epoch_[0-9]+)\.json", re.DOTALL)
_CHUNKED = re.compile(r"samples/.+/sample\.json", re.DOTALL)


def read(paths: Sequence[Path], _category: str | None) -> Iterator[Item]:
    """Records of logs in order, one a sample."""
    for path in paths:
        yield from _of_archive(path) if path.suffix == ".eval" else _of_document(path)


def _of_document(path: Path) -> Iterator[Item]:
    for entry in document(path):
        if isinstance(entry, Skipped):
            yield entry
        elif not isinstance(entry.value, dict) or not isinstance(entry.value.get("samples"), list):
            yield Skipped(entry.place, "has no samples: is it a log of Inspect, and not its header alone?")
        else:
            spec = entry.value.get("eval")
            samples = (
                Entry(f"{entry.place} samples[{index}]", sample)
                for index, sample in enumerate(entry.value["samples"])
            )
            yield from items(samples, lambda part, spec=spec: [_record(part.place, part.value, spec)])


def _of_archive(path: Path) -> Iterator[Item]:
    archive = Archive(path)
    spec: Any = None
    for name in ("header.json", "_journal/start.json"):
        if name in archive.names:
            try:
                spec = archive.json(name)["eval"]
                break
            except (ValueError, KeyError, TypeError):
                continue
    # An id stands in a name as it is, slashes too.
    whole = [name for name in archive.names if _WHOLE.fullmatch(name)]
    parts = [name for name in archive.names if _CHUNKED.fullmatch(name)]
    members_of = (
        Entry(f"{shown(path)}#{printable(name, 256)}", name) for name in dict.fromkeys(whole + parts)
    )

    def of_member(member: Entry) -> list[Record]:
        name = member.value
        sample = archive.json(name) if name in whole else _joined(archive, name.removesuffix("/sample.json"))
        return [_record(member.place, sample, spec)]

    yield from items(members_of, of_member)
    if not whole and not parts:
        yield Skipped(shown(path), "has no samples")


def _joined(archive: Archive, prefix: str) -> dict[str, Any]:
    """A chunked sample as one object; chunks are named by the index of their first item."""
    sample = archive.json(f"{prefix}/sample.json")
    if not isinstance(sample, dict):
        raise ValueError(f"is {kind_of(sample)}, not a sample")
    sequences: dict[str, list[Any]] = {}
    for kind in ("messages", "events", "attachments"):
        pattern = re.compile(rf"{re.escape(prefix)}/{kind}/([0-9]{{1,12}})\.json")
        starts = sorted(
            (int(match[1]), match[0]) for name in archive.names if (match := pattern.fullmatch(name))
        )
        items = sequences[kind] = []
        for start, name in starts:
            chunk = archive.json(name)
            if start != len(items) or not isinstance(chunk, list):
                raise ValueError(f"has a gap before {printable(name, 128)}")
            items += chunk
    pool = sequences["messages"]
    return sample | {
        "messages": _ranges(sample.get("message_refs") or [], pool),
        "events": sequences["events"],
        "events_data": {"messages": pool},
        "attachments": {str(index): text for index, text in enumerate(sequences["attachments"])},
    }


def _ranges(refs: Any, pool: Sequence[Any]) -> list[Any]:
    """The messages of a pool at ranges [start, end). Raises ValueError for a range that is none of it."""
    out: list[Any] = []
    for ref in refs if isinstance(refs, list) else [None]:
        if not isinstance(ref, list) or len(ref) != 2 or not all(isinstance(n, int) for n in ref):
            raise ValueError("has a reference that is no range")
        start, end = ref
        if not 0 <= start <= end <= len(pool):
            raise ValueError(f"refers to the messages {start} to {end} of a pool of {len(pool)}")
        out += pool[start:end]
    return out


def _record(place: str, sample: Any, spec: Any) -> Record:
    if not isinstance(sample, dict):
        raise ValueError(f"is {kind_of(sample)}, not a sample")
    spec = spec if isinstance(spec, dict) else {}
    name, epoch = sample.get("id"), sample.get("epoch")
    facts = {"sample": name, "epoch": epoch, "task": spec.get("task")}
    identity = f"{name}.{epoch}" if isinstance(epoch, int) and epoch > 1 else str(name)
    return of_sample(place, identity, sample, facts, spec.get("model"))


def of_sample(
    place: str, identity: str | None, sample: Mapping[str, Any], facts: Mapping[str, Any], model: Any
) -> Record:
    """The record of an object with `messages`, `events`, `attachments` and `events_data`. Raises ValueError."""
    attachments = sample.get("attachments")
    texts = attachments if isinstance(attachments, dict) else {}
    messages = _messages(sample.get("messages") or [], texts)
    pool = (sample.get("events_data") or {}).get("messages") or sample.get("message_pool") or []
    events = sample.get("events") or []
    decisions: list[LoggedTurn] = []
    tools: dict[str, Any] = {}
    for event in events if isinstance(events, list) else []:
        if not isinstance(event, dict) or event.get("event") != "model":
            continue
        shown_tools = resolved(event.get("tools") or [], texts)
        decisions.append(_decision(event, shown_tools, pool, texts))
        for tool in shown_tools if isinstance(shown_tools, list) else []:
            if isinstance(tool, dict) and isinstance(tool.get("name"), str):
                tools.setdefault(tool["name"], tool)
        model = model or event.get("model")
    if not messages and decisions:
        messages = numbered([*decisions[-1].context, decisions[-1].turn])
    return Record(
        place,
        identity,
        decisions or turns(messages, None),
        messages,
        list(tools.values()) or None,
        model if isinstance(model, str) else None,
        facts={key: value for key, value in facts.items() if value is not None},
    )


def _decision(
    event: Mapping[str, Any], tools: Any, pool: Sequence[Any], texts: Mapping[str, Any]
) -> LoggedTurn:
    given = event.get("input") or []
    if event.get("input_refs"):
        given = _ranges(event["input_refs"], pool)
    output = members(event.get("output"))
    error = event.get("error") or output.get("error")
    choices = output.get("choices")
    first = members(choices[0]) if isinstance(choices, list) and choices else {}
    context = _messages(given, texts)
    if error or not isinstance(first.get("message"), dict):
        why = f"failed ({printable(str(error), 120)})" if error else "has no output"
        turn: Chat = {"role": "assistant", "unreadable": why}
    else:
        turn = numbered([*context, *_messages([first["message"]], texts)])[-1]
    choice = event.get("tool_choice")
    choice = (
        {"type": "function", "name": choice["name"]}
        if isinstance(choice, dict) and "name" in choice
        else choice
    )
    end = first.get("stop_reason")
    return LoggedTurn(context, turn, tools, choice if tools else None, end if isinstance(end, str) else None)


def _messages(values: Any, texts: Mapping[str, Any]) -> list[Chat]:
    if not isinstance(values, list):
        raise ValueError(f"has {kind_of(values)} where its messages should be")
    return numbered([_of_message(resolved(value, texts)) for value in values])


def _of_message(value: Any) -> Chat:
    """A message; the result of a tool that failed is its error, in the words in which Inspect gives it to a model."""
    error = value.get("error") if isinstance(value, dict) and value.get("role") == "tool" else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return chat({**value, "content": f"Error: {error['message']}"})
    return chat(value)


def resolved(value: Any, texts: Mapping[str, Any], depth: int = 0) -> Any:
    """A value with the texts of its attachments. Raises ValueError for one that is missing."""
    if depth > _DEEPEST:
        raise ValueError("is nested too deep")
    if isinstance(value, dict):
        return {key: resolved(part, texts, depth + 1) for key, part in value.items()}
    if isinstance(value, list):
        return [resolved(part, texts, depth + 1) for part in value]
    if isinstance(value, str) and value.startswith(_ATTACHED):
        name = value.partition("://")[2]
        if isinstance(texts.get(name), str):
            return texts[name]
        if re.fullmatch(r"[0-9a-f]{32}|[0-9]{1,12}", name):
            raise ValueError(f"refers to the attachment {name}, which it does not have")
    return value


INSPECT = Format(
    name="inspect",
    about="logs of Inspect, `.eval` and `.json`",
    read=read,
    suffixes=(".eval", ".json"),
)
