"""Records of a log → lines of a task file, each read back by the reader of task files, and an account of the rest."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from probe.errors import BadInput, UsageError
from probe.jsontext import MAX_LINE_BYTES, StrictJsonError, loads, printable, quoted
from probe.tasks.file import line_faults
from probe.tasks.imports.chat import faults, text_of
from probe.tasks.imports.definitions import Shown, shown_tools
from probe.tasks.imports.files import parsed, paths_of, shown
from probe.tasks.imports.record import NO_CALL, Chat, Format, Item, LoggedTurn, Ready, Record, Skipped
from probe.tools.definitions import Tool

KINDS = ("tool_selection", "replay")
"""What a log may become: a task for each decision, or one for each conversation."""
_CUT = ("length", "max_tokens", "max_output_tokens", "model_length", "content_filter", "incomplete")
"""Ends of turns that were not of the model's own."""


class _Left(ValueError):
    """Why a decision or a record becomes no task."""


@dataclass
class Account:
    """What became of a log: records = `taken` + those of `skipped` without a turn; of the records taken,
    `decisions` = tasks + those of `skipped` with a turn."""

    format: str
    kind: str
    files: int = 0
    records: int = 0
    """Conversations, questions, or tools of a catalogue."""
    decisions: int = 0
    """What could have become a line: turns of the records taken; of replays, questions and tools the records themselves."""
    tasks: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def records_skipped(self) -> int:
        return sum(item.turn is None for item in self.skipped)

    @property
    def decisions_skipped(self) -> int:
        return sum(item.turn is not None for item in self.skipped)

    def table(self) -> list[str]:
        """The account as lines of a table: counts that add up, then how often each reason left something out."""
        taken = self.records - self.records_skipped
        rows: list[tuple[str, int]] = [("files", self.files), ("records", self.records), ("  taken", taken)]
        rows += [("  left out", self.records_skipped), ("decisions of these", self.decisions)]
        rows += [("  tasks", self.tasks), ("  left out", self.decisions_skipped)]
        reasons = Counter(item.reason for item in self.skipped)
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:{width}}  {count:>8,}" for name, count in rows]
        return lines + [f"{count:>8,}  {reason}" for reason, count in reasons.most_common(20)]

    def document(self) -> dict[str, Any]:
        """The account as JSON."""
        left_out = [
            {"place": item.place}
            | ({} if item.turn is None else {"turn": item.turn})
            | {"reason": item.reason}
            for item in self.skipped
        ]
        whole = {
            "format": self.format,
            "kind": self.kind,
            "files": self.files,
            "records": self.records,
            "records_left_out": self.records_skipped,
            "decisions": self.decisions,
            "decisions_left_out": self.decisions_skipped,
            "tasks": self.tasks,
            "left_out": left_out,
        }
        if self.format == "bfcl":  # as it was before there were other formats
            whole["refused"] = [{"id": item.place, "reason": item.reason} for item in self.skipped]
        return whole


class Imported(NamedTuple):
    """What a log gave."""

    tasks: list[dict[str, Any]]
    """The objects of a task file, as `probe.run` takes them; for a catalogue its tools."""
    account: Account


def encode(lines: Iterable[Mapping[str, Any]], output: Path, format: Format) -> Iterator[bytes]:
    """The bytes of a file of the lines: JSON lines, and a list where a catalogue goes into a `.json` file.

    Raises UsageError for a catalogue under a name that no catalogue has.
    """
    if format.catalogue and output.suffix not in (".json", ".jsonl"):
        raise UsageError(f"{output}: a catalogue ends in .json or .jsonl: name it {output.stem}.json")
    texts = (json.dumps(line, ensure_ascii=False) for line in lines)
    if not (format.catalogue and output.suffix == ".json"):
        yield from (f"{text}\n".encode() for text in texts)
        return
    for number, text in enumerate(texts):
        yield f"{',' if number else '['}\n  {text}".encode()
    yield b"\n]\n"


class Import:
    """Reads a log as lines; `account` is whole once they have all been read.

    Raises BadInput for a path that is not there and UsageError for options that do not fit the format.
    """

    def __init__(
        self,
        format: Format,
        paths: Sequence[Path],
        *,
        kind: str | None = None,
        category: str | None = None,
        tools: Sequence[Tool] = (),
    ):
        default = "replay" if format.replay else "tool_selection"
        if kind is not None and (kind not in KINDS or format.catalogue):
            raise UsageError(f"--as {printable(kind)}: {format.name} has no such kind of task")
        if category is not None and format.name != "bfcl":
            raise UsageError(f"--category is for bfcl, and not for {format.name}")
        self.format = format
        self.category = category
        self.given = [tool.document() for tool in tools]
        self.files = paths_of(paths, format.suffixes)
        self.account = Account(format.name, "tool" if format.catalogue else kind or default, len(self.files))
        self._ids: dict[str, int] = {}
        self._shown: dict[int, tuple[Any, Shown]] = {}

    def lines(self) -> Iterator[dict[str, Any]]:
        """Lines in the order of the log. Raises BadInput where there is none, with the first reasons."""
        continued = self._continued() if self.account.kind == "replay" and self.format.continues else set()
        for item in self._items():
            self.account.records += 1
            if isinstance(item, Skipped):
                self.account.skipped.append(item)
            elif isinstance(item, Ready):
                yield from self._taken(item.place, 1, [(None, lambda item=item: item.line)])
            elif self.account.kind == "replay":
                if _digests(item.messages)[-1:] and _digests(item.messages)[-1] in continued:
                    self.account.skipped.append(
                        Skipped(item.place, "goes on in a longer record, which has all of it")
                    )
                else:
                    yield from self._taken(item.place, 1, [(None, lambda item=item: self._replay(item))])
            elif not item.decisions:
                self.account.skipped.append(Skipped(item.place, "has no turn of the assistant"))
            else:
                steps: list[tuple[int | None, Callable[[], dict[str, Any]]]] = [
                    (number, lambda item=item, number=number: self._selection(item, number))
                    for number in range(1, len(item.decisions) + 1)
                ]
                yield from self._taken(item.place, len(steps), steps)
        if not self.account.tasks:
            raise BadInput(self._nothing())

    def _items(self) -> Iterator[Item]:
        return self.format.read(self.files, self.category)

    def _taken(
        self, place: str, count: int, steps: Sequence[tuple[int | None, Callable[[], dict[str, Any]]]]
    ) -> Iterator[dict[str, Any]]:
        """The lines of a record; a step of a conversation that gives none is left out by its number."""
        whole = steps[0][0] is None
        self.account.decisions += 0 if whole else count
        for number, make in steps:
            try:
                line = self._checked(make())
            except _Left as left:
                self.account.skipped.append(Skipped(place, str(left), number))
            except RecursionError:
                self.account.skipped.append(Skipped(place, "is nested too deep", number))
            else:
                if not self.format.catalogue:
                    line["id"] = self._unique(line["id"])
                self.account.tasks += 1
                self.account.decisions += whole
                yield line

    def _checked(self, line: dict[str, Any]) -> dict[str, Any]:
        """The line, as the reader of task files takes it. Raises _Left with what it would say."""
        text = json.dumps(line)  # ASCII: half of a surrogate pair shows as such
        if len(text) >= MAX_LINE_BYTES:
            raise _Left(f"would be a line of more than {MAX_LINE_BYTES // 2**20} MiB")
        try:
            loads(text)
        except StrictJsonError as error:
            raise _Left(f"would be no task: {error.faults[0]}") from None
        if not self.format.catalogue and (faults_here := line_faults(line)):
            raise _Left(f"would be no task: {faults_here[0]}")
        return line

    def _nothing(self) -> list[str]:
        """Problems of a log of which nothing could be taken."""
        problems = [
            f"{item.place}{'' if item.turn is None else f' turn {item.turn}'}: {item.reason}"
            for item in self.account.skipped
        ]
        return problems or [f"{shown(self.files[0])}:1:1: file: has no record: give a log of the format"]

    # --- one line ---

    def _selection(self, record: Record, number: int) -> dict[str, Any]:
        decision = record.decisions[number - 1]
        if faults_here := next(faults([*decision.context, decision.turn]), None):
            raise _Left(faults_here)
        if not decision.context:
            raise _Left("is the first message: nothing was asked")
        _refuse_forced(decision.choice)
        tools = self._tools(decision.tools)
        calls = decision.turn.get("tool_calls", ())
        called = list(dict.fromkeys(call["function"]["name"] for call in calls))
        if not called:
            if decision.end in _CUT:
                raise _Left(f"calls nothing and was cut ({printable(decision.end)})")
            if decision.end != NO_CALL and not text_of(decision.turn.get("content")).strip():
                raise _Left("says nothing and calls nothing")
        for name in called:
            if name not in tools.names:
                origin = "a tool of the server's own" if name in tools.left_out else "which is not shown"
                raise _Left(f"calls {quoted(name)}, {origin}")
        targets = [tools.names[name] for name in called]
        whole = len(record.decisions) == 1 and record.id
        return {
            "id": self._id(record, None if whole else number),
            "kind": "tool_selection",
            "messages": _renamed(decision.context, tools),
            "tools": tools.tools,
            "target": None if not targets else targets[0] if len(targets) == 1 else targets,
            **({"parallel_calls": True} if len(calls) > 1 else {}),
            "metadata": self._metadata(record, tools, number, decision),
        }

    def _replay(self, record: Record) -> dict[str, Any]:
        if faults_here := next(faults(record.messages), None):
            raise _Left(faults_here)
        if not any(message["role"] == "assistant" for message in record.messages):
            raise _Left("has no turn of the assistant")
        for number, message in enumerate(record.messages, 1):
            if (
                message["role"] == "assistant"
                and message.get("content") is None
                and not message.get("tool_calls")
            ):
                raise _Left(f"message {number} (assistant) says nothing and calls nothing")
        tools = self._tools(record.tools)
        return {
            "id": self._id(record, None),
            "kind": "replay",
            "messages": _renamed(record.messages, tools),
            "tools": tools.tools,
            **record.tokens,
            "metadata": self._metadata(record, tools),
        }

    def _tools(self, given: Sequence[Any] | None) -> Shown:
        """The tools that were shown; those of `--tools` where the log does not say."""
        given = parsed(given) or self.given
        kept = self._shown.get(id(given))
        if kept is None or kept[0] is not given:
            try:
                kept = (given, shown_tools(given))
            except ValueError as error:
                raise _Left(printable(str(error), 300)) from None
            if len(self._shown) > 64:
                self._shown.clear()
            self._shown[id(given)] = kept
        if not kept[1].tools:
            raise _Left("shows no tools: give their definitions with --tools")
        return kept[1]

    def _id(self, record: Record, number: int | None) -> str:
        name = re.sub(r"[^\w.:/@+-]", "_", record.id or record.place.rpartition("/")[2])[:120]
        return name if number is None else f"{name}.{number}"

    def _unique(self, name: str) -> str:
        """The id, with a number behind it where an earlier line has it."""
        count = self._ids.get(name, 0) + 1
        while (free := name if count == 1 else f"{name}_{count}") in self._ids:
            count += 1
        self._ids[name] = count
        self._ids.setdefault(free, 1)
        return free

    def _metadata(
        self, record: Record, tools: Shown, number: int | None = None, decision: LoggedTurn | None = None
    ) -> dict[str, Any]:
        log: dict[str, Any] = {"format": self.format.name, "place": record.place, **record.facts}
        if decision is not None:
            log |= {"turn": number, "said": dict(decision.turn)}
            if decision.choice is not None:
                log["tool_choice"] = decision.choice
        renamed = {shown: name for name, shown in tools.names.items() if name != shown}
        if renamed:
            log["names"] = renamed
        if tools.left_out:
            log["tools_without_definition"] = tools.left_out
        return ({"model": record.model} if record.model else {}) | {"log": log}

    def _continued(self) -> set[bytes]:
        """Digests of the conversations that a longer record begins with."""
        begun: set[bytes] = set()
        for item in self._items():
            if isinstance(item, Record):
                begun.update(_digests(item.messages)[:-1])
        return begun


def _refuse_forced(choice: Any) -> None:
    """Raise _Left where the request left nothing to decide."""
    kind = choice if isinstance(choice, str) else choice.get("type") if isinstance(choice, dict) else None
    if kind == "none":
        raise _Left("could call no tool: tool_choice is none")
    if isinstance(choice, dict) and kind not in ("auto", "any", "required", "allowed_tools"):
        raise _Left("decides nothing: tool_choice names the tool")


def _renamed(messages: Sequence[Chat], tools: Shown) -> list[dict[str, Any]]:
    """The messages, calls and results under the names that the tools are shown by."""
    changed = {name: shown for name, shown in tools.names.items() if name != shown}
    if not changed:
        return [dict(message) for message in messages]
    out = []
    for message in messages:
        message = dict(message)
        if message.get("name") in changed:
            message["name"] = changed[message["name"]]
        if "tool_calls" in message:
            message["tool_calls"] = [
                {
                    **call,
                    "function": {
                        **call["function"],
                        "name": changed.get(name := call["function"]["name"], name),
                    },
                }
                for call in message["tool_calls"]
            ]
        out.append(message)
    return out


def _digests(messages: Sequence[Chat]) -> list[bytes]:
    """A digest of a conversation up to each of the assistant's turns; thoughts, which logs drop later, do not count."""
    state, out = hashlib.blake2b(digest_size=16), []
    for message in messages:
        calls = [
            [call["function"]["name"], parsed(call["function"]["arguments"])]
            for call in message.get("tool_calls", ())
        ]
        facts = [message["role"], text_of(message.get("content")), calls]
        state.update(json.dumps(facts, sort_keys=True, default=str).encode(errors="replace"))
        if message["role"] == "assistant":
            out.append(state.digest())
    return out
