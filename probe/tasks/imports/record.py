"""What a reader of a log yields: a conversation with its decisions, a finished line, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Chat = Mapping[str, Any]
"""A message as task lines have it; one that cannot be taken is `{"role": …, "unreadable": why}`."""


NO_CALL = "no call"
"""The end of a turn that is empty and means that nothing is to be called."""


class Skipped(NamedTuple):
    """A record, or one turn of it, that becomes no task."""

    place: str
    """File, and line, entry or row in it."""
    reason: str
    turn: int | None = None
    """Number of the turn among the assistant's, from 1; None: the whole record."""


class Ready(NamedTuple):
    """A line that needs nothing more: a task of another benchmark, or a tool of a catalogue."""

    place: str
    line: dict[str, Any]


@dataclass(frozen=True)
class Decision:
    """One turn of the assistant that could call a tool, and what stood before it."""

    context: Sequence[Chat]
    turn: Chat
    tools: Sequence[Any] | None
    """Definitions as the log spells them; None where it has none."""
    choice: Any = None
    """The request's `tool_choice`, in the spelling of any server."""
    end: str | None = None
    """Why the turn ended, in the server's word."""


@dataclass(frozen=True)
class Record:
    """A conversation of a log."""

    place: str
    id: str | None
    """The log's own name for it."""
    decisions: Sequence[Decision]
    messages: Sequence[Chat]
    """The whole conversation, the last turn included."""
    tools: Sequence[Any] | None
    model: str | None = None
    tokens: Mapping[str, Any] = field(default_factory=dict)
    """`token_ids`, `emitted` and `logprobs` of a replay, where the log has them."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the log says of it, for `metadata.log`."""


Item = Record | Ready | Skipped


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of logs; its name is FORMAT of `probe tasks import`."""

    name: str
    about: str
    """What is read, in a few words."""
    read: Callable[[Sequence[Path], str | None], Iterator[Item]]
    """Items of files in order; the second argument is a category of the format. Raises BadInput and UsageError."""
    suffixes: tuple[str, ...] = (".jsonl", ".json")
    """Files of a folder that are read; empty: a folder is given to the reader as it is."""
    replay: bool = False
    """Whether a log is one replay where the user does not say."""
    catalogue: bool = False
    """Whether lines are tools of a catalogue."""
    continues: bool = False
    """Whether a conversation may be logged again, longer, with each request."""


def turns(messages: Sequence[Chat], tools: Sequence[Any] | None) -> list[Decision]:
    """A decision for each turn of the assistant in a conversation."""
    return [
        Decision(messages[:index], message, tools)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
