"""What is asked of a capture and what it gives: sites, axes, generation settings, jobs and outcomes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from probe.capture.controller import Controller
from probe.capture.sites import SITES, default_sites
from probe.errors import ProbeError, UsageError
from probe.prompts.labels import OTHER, step_of

if TYPE_CHECKING:
    from torch import Tensor

    from probe.model.edits import Edit
    from probe.prompts import Prompt, Span


class NonFinite(ProbeError):
    """NaN or infinity in what the model computed; the message names the layer and position."""


GENERATED, EVERY, DECISION, SPANS, STEPS = "generated", "all", "decision", "spans", "steps"
ROWS = {
    GENERATED: "the position that emitted each token of the completion",
    EVERY: "every position",
    DECISION: "the positions of `decisions`, which every choice has",
    SPANS: "the last position of each labelled span, `other` left out",
    STEPS: "the last position of each step of a reasoning or turn of an agent",
}
"""What `--rows` takes: which positions have a row."""


@dataclass(frozen=True)
class CaptureSpec:
    """Which sites are kept, of which layers (None: all), and which positions have a row (of `ROWS`)."""

    sites: frozenset[str]
    layers: tuple[int, ...] | None = None
    rows: frozenset[str] = frozenset({GENERATED})

    @classmethod
    def parse(
        cls, text: str | None, layers: str | None, n_layers: int, *, memory: bool, rows: str | None = None
    ) -> CaptureSpec:
        """`--capture`, `--layers` and `--rows`: site names, `default`, `all`, `none`, `SITE:all`; `0,4-7,-1`; words of `ROWS`.

        `memory`: whether `default` has keys, values, queries and head outputs as well.
        """
        default = default_sites(memory)
        chosen: set[str] = set()
        every = False
        for word in (text or "default").split(","):
            name, _, where = word.strip().partition(":")
            if where not in ("", EVERY):
                raise UsageError(f"--capture {word}: after the colon only `all` (every position) is known")
            every |= where == EVERY
            if name == "default":
                chosen |= default
            elif name == "all":
                chosen |= set(SITES)
            elif name in SITES:
                chosen.add(name)
            elif name != "none":
                raise UsageError(
                    f"--capture {name}: unknown site; known are {', '.join(SITES)}, default, all, none"
                )
        if every and rows is not None:
            raise UsageError(
                f"--capture {text} with --rows {rows}: both say which positions have a row: give one"
            )
        kept = frozenset({EVERY}) if every else parse_rows(rows)
        return cls(frozenset(chosen), _parse_layers(layers, n_layers), kept)

    def layer_list(self, n_layers: int) -> list[int]:
        return list(range(n_layers)) if self.layers is None else list(self.layers)

    @property
    def all_rows(self) -> bool:
        """Whether every position has a row."""
        return EVERY in self.rows

    @property
    def within_prompt(self) -> bool:
        """Whether positions before the last of the prompt have rows: a shared prefix keeps none, so nothing comes from one then."""
        return not self.rows.isdisjoint({EVERY, SPANS})

    def before_completion(self, prompt: Prompt) -> list[int]:
        """Positions with a row that lie before the last of the prompt, ascending."""
        last = prompt.n_prompt - 1
        if self.all_rows:
            return list(range(last))
        return [position for position in self._ends(prompt.spans) if position < last]

    def positions(
        self, spans: Sequence[Span], decisions: Sequence[int], first_generated: int, n_run: int
    ) -> list[int]:
        """The positions with a row, ascending, of a passage whose first `n_run` tokens were run."""
        if self.all_rows:
            return list(range(n_run))
        chosen = {*decisions, *(min(end, n_run - 1) for end in self._ends(spans, n_run))}
        if GENERATED in self.rows:
            chosen.update(range(first_generated, n_run))
        return sorted(chosen)

    def n_rows(self, prompt: Prompt, spans: Sequence[Span] | None, n_new: int, n_decisions: int) -> int:
        """How many rows a passage has at most, with `spans` beside a last one of what it emits; None where these are not known."""
        before = self.before_completion(prompt)
        if self.all_rows or GENERATED in self.rows or (spans is None and self.rows & {SPANS, STEPS}):
            return len(before) + n_new
        ends = [end for end in self._ends(spans or ()) if end >= prompt.n_prompt - 1]
        return len(before) + min(n_new, n_decisions + len(ends) + 1)

    def _ends(self, spans: Iterable[Span], n_run: int | None = None) -> list[int]:
        """The last positions of the spans that have a row there, ascending."""
        chosen = (span for span in spans if self._ends_in(span.label))
        return sorted({span.end - 1 for span in chosen if n_run is None or span.start < n_run})

    def _ends_in(self, label: str) -> bool:
        """Whether a span's last position has a row for its label."""
        return (SPANS in self.rows and label != OTHER) or (STEPS in self.rows and step_of(label) is not None)


def parse_rows(text: str | None) -> frozenset[str]:
    """`--rows`: words of `ROWS` with commas between them. Raises UsageError."""
    words = [word.strip() for word in (text or GENERATED).split(",")]
    if unknown := [word for word in words if word not in ROWS]:
        raise UsageError(f"--rows {text}: {unknown[0]!r} is none of {', '.join(ROWS)}")
    return frozenset(words)


def _parse_layers(text: str | None, n_layers: int) -> tuple[int, ...] | None:
    if not text or text == "all":
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = (
            part.strip().rpartition("-") if part.strip().rfind("-") > 0 else ("", "", part.strip())
        )
        try:
            low, high = (int(first), int(last)) if dash else (int(last), int(last))
        except ValueError:
            raise UsageError(f"--layers {text}: write numbers and ranges such as 0,4-7,-1") from None
        low, high = (
            low % n_layers if -n_layers <= low < 0 else low,
            high % n_layers if -n_layers <= high < 0 else high,
        )
        if not 0 <= low <= high < n_layers:
            raise UsageError(f"--layers {text}: the model has layers 0 to {n_layers - 1}")
        chosen.update(range(low, high + 1))
    return tuple(sorted(chosen))


@dataclass(frozen=True)
class Generation:
    """How tokens are chosen. Temperature 0 is greedy; a draw depends on (seed, task id, passage) alone."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0


@dataclass
class Job:
    """One passage to run."""

    prompt: Prompt
    task_id: str
    controller: Controller = field(default_factory=Controller)
    """The template of what drives it, a new one each time the job is run."""
    shared: int = 0
    """Leading prompt tokens that other jobs have as well and that are run once (`plan_shared`)."""
    prefix_ends: tuple[int, ...] = ()
    """Where the prefixes end that it goes through, ascending: the last is `shared`, others are common to more jobs."""
    prefix_rows: tuple[int, ...] = ()
    """Of each of them the first position whose states are kept: some job reads them; its end where none does."""
    edits: tuple[Edit, ...] = ()
    """What is changed while this passage runs."""

    @property
    def first_read(self) -> int:
        """The first position whose states are read."""
        return self.prompt.n_prompt - 1 - max(self.prompt.n_opener, 1)

    @property
    def shareable(self) -> int:
        """Leading tokens that may come from a shared prefix: none that are changed, and none whose states are read unless a prefix
        keeps them, which transcripts that continue each other are worth."""
        most = len(self.prompt.token_ids) - 1 if self.controller.continued else self.first_read
        return min([most, *(edit.rows_from for edit in self.edits)])

    def most_new(self, max_new_tokens: int) -> int:
        """Bound of the tokens after the prompt."""
        return self.controller.most_new(self.prompt, max_new_tokens)


@dataclass
class Outcome:
    """What one passage gave. Tensors are on the CPU, named and laid out as `SITES` say."""

    token_ids: list[int]
    n_prompt: int
    n_new: int
    finish_reason: str
    completion: str
    spans: list[Span]
    span_texts: list[str]
    """What the tokens of each span decode to."""
    labels: list[str]
    layers: list[int]
    tensors: dict[str, Tensor]
    attention_layers: list[int] | None = None
    """Those of the layers that have attention, which are those of tensors with heads; None: all."""
    parsed: dict[str, Any] = field(default_factory=dict)
    """What the controller read from the completion: steps and an answer, or turns."""
    candidate_log_probs: list[float] = field(default_factory=list)
    candidate_token_log_probs: list[list[float]] = field(default_factory=list)
    """The same by token of each candidate, nats."""
    opener_log_prob: float | None = None
    log_probs: list[float] = field(default_factory=list)
    """Of each new token, nats."""
    token_characters: list[int] | None = None
    """Characters of the completion that each new token completes; None where its text does not come apart by token."""
    parts: list[tuple[str, str]] = field(default_factory=list)
    """(label, part) of each part of a tool: columns of `attn_to_parts` and `value_to_parts`."""
