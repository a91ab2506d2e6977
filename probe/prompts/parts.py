"""What a prompt is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from probe.errors import ProbeError
from probe.prompts.labels import OTHER
from probe.tools.calls.template import Dialect


class PromptFault(ProbeError):
    """A prompt that cannot be shown to the model as its task means it; says what to do."""


@dataclass(frozen=True)
class ToolPart:
    """Where a part of a tool's definition stands: positions start … end − 1, or characters of a segment."""

    part: str
    """One of `labels.TOOL_PARTS`. A part may stand in several places."""
    start: int
    end: int

    def moved(self, by: int) -> ToolPart:
        return ToolPart(self.part, self.start + by, self.end + by)


@dataclass(frozen=True)
class Span:
    """Positions start … end − 1 of the token sequence carry this label."""

    label: str
    start: int
    end: int
    parts: tuple[ToolPart, ...] = ()
    """Of a tool: where its parts stand, disjoint and in order; what is left over is the template's."""

    def moved(self, by: int) -> Span:
        return Span(self.label, self.start + by, self.end + by, tuple(part.moved(by) for part in self.parts))


@dataclass(frozen=True)
class Segment:
    text: str
    label: str = OTHER
    markup: bool = False
    """Template text: its special tokens are special. Data is never markup."""
    parts: tuple[ToolPart, ...] = ()
    """Of a tool: the characters that its parts take, disjoint and in order."""


@dataclass(frozen=True)
class Candidate:
    """One thing that can be said in a slot. `name` None is the listed "no tool"."""

    name: str | None
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class ReplyForm:
    """How the result of a call goes back to the model: markup, the result as data, markup."""

    name: str
    """`tool role`, `user role` (the chat template has no role for tools) or `plain` (there is no template)."""
    before: str
    """From the end of the assistant's turn on, the mark that ends it included; `native.NAME` stands for the tool."""
    after: str
    """Up to where the assistant's next turn begins."""
    quoted: bool = False
    """Whether the template writes the result as a JSON string."""


@dataclass(frozen=True)
class ForcedTurn:
    """A turn of a transcript that is given: positions start … end − 1."""

    start: int
    end: int
    ended: bool
    """Whether the token behind it ended the turn, and was emitted as well."""


@dataclass(frozen=True)
class KnownTranscript:
    """A transcript that is given: what the model emitted in it."""

    turns: tuple[ForcedTurn, ...]
    last: int
    """The token emitted last, which is not run."""
    spans: tuple[Span, ...]
    """Of all its positions, the last one included."""


@dataclass
class Prompt:
    """What one passage feeds the model. Positions count from 0, special tokens included."""

    passage: str
    text: str
    token_ids: list[int]
    """Prompt and, for teacher-forced reasoning, what is forced after it."""
    n_prompt: int
    spans: list[Span]
    """Disjoint and in order; they cover every position of token_ids."""
    template: dict[str, Any]
    candidates: tuple[Candidate, ...] = ()
    no_tool: str | None = None
    """How "no tool" is scored: `listed` as a candidate, or `complement` of the opener's probability."""
    call_prefix: str | None = None
    call_lead: str = ""
    """What ends the thought that the prompt has opened, where a call is put behind it for the model; no part of the prompt."""
    call_tails: dict[str | None, str] = field(default_factory=dict)
    """Candidate → what follows its name in a rendered call."""
    n_opener: int = 0
    """Tokens of call_prefix at the end of the prompt."""
    reply: ReplyForm | None = None
    """For an agent: how results go back."""
    dialect: Dialect | None = None
    """The format of calls that only this model's template writes; None: it is one that is known."""
    readable: bool = True
    """Whether the calls that the model's template writes can be read; else what is no call that is read is `unread`."""
    decoder: str | None = None
    """Handler of the Berkeley leaderboard for this model and rendering; None: the text's marks choose it."""
    truncation: dict[str, Any] | None = None
    stop_ids: frozenset[int] = frozenset()
    forced_steps: int = 0
    given: KnownTranscript | None = None
    """Of a transcript that is given: all of it but its last token stands in `token_ids`."""

    @property
    def labels(self) -> list[str]:
        """Distinct labels in order of first appearance."""
        return list(dict.fromkeys(span.label for span in self.spans))

    @property
    def tool_parts(self) -> dict[tuple[str, str], list[ToolPart]]:
        """(label, part) → where it stands, in order of first appearance."""
        return tool_parts(self.spans)


def tool_parts(spans: Iterable[Span]) -> dict[tuple[str, str], list[ToolPart]]:
    """(label, part) → where it stands, in order of first appearance; what is not rendered is not there."""
    places: dict[tuple[str, str], list[ToolPart]] = {}
    for span in spans:
        for part in span.parts:
            places.setdefault((span.label, part.part), []).append(part)
    return places
