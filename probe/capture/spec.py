"""What is asked of a capture and what it gives: sites, axes, generation settings, jobs and outcomes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from probe.capture.controller import Controller
from probe.capture.sites import SITES, default_sites
from probe.errors import ProbeError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from probe.model.edits import Edit
    from probe.prompts import Prompt, Span


class NonFinite(ProbeError):
    """NaN or infinity in what the model computed; the message names the layer and position."""


@dataclass(frozen=True)
class CaptureSpec:
    """Which sites are kept, of which layers (None: all), for generated rows or for every position."""

    sites: frozenset[str]
    layers: tuple[int, ...] | None = None
    all_rows: bool = False

    @classmethod
    def parse(cls, text: str | None, layers: str | None, n_layers: int, *, memory: bool) -> CaptureSpec:
        """`--capture` and `--layers`: site names, `default`, `all`, `none`, `SITE:all`; `0,4-7,-1`.

        `memory`: whether `default` has keys, values, queries and head outputs as well.
        """
        default = default_sites(memory)
        chosen: set[str] = set()
        every = False
        for word in (text or "default").split(","):
            name, _, rows = word.strip().partition(":")
            if rows not in ("", "all"):
                raise UsageError(f"--capture {word}: after the colon only `all` (every position) is known")
            every |= rows == "all"
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
        return cls(frozenset(chosen), _parse_layers(layers, n_layers), every)

    def layer_list(self, n_layers: int) -> list[int]:
        return list(range(n_layers)) if self.layers is None else list(self.layers)


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
