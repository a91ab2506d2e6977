"""A loaded model with the two verbs `capture` and `score`, for Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeGuard, cast

from probe.capture.batch import run_batch
from probe.capture.edits import Steering, on_prompt
from probe.capture.spec import CaptureSpec, Generation, Job, NonFinite, Outcome
from probe.errors import UsageError
from probe.model.edits import Edit
from probe.model.hooked import Model
from probe.prompts import (
    Candidate,
    Codec,
    Prompt,
    Segment,
    candidates_after,
    prompt_of,
    prompt_of_tokens,
    special_token_in,
)

Content = str | Sequence[Segment] | Sequence[int] | Mapping[str, Any] | Prompt
"""What a model is shown: text, labelled segments, token ids, a passage of a record, or a rendered prompt."""


@dataclass(frozen=True)
class Score:
    """One continuation: its tokens and log P(continuation | prompt) in nats, summed over the tokens."""

    text: str
    token_ids: tuple[int, ...]
    log_prob: float


class CapturingModel(Model):
    """A loaded model: `hf`, `tokenizer`, `bridge`, `facts`, and the two verbs `capture` and `score`."""

    @cached_property
    def codec(self) -> Codec:
        return Codec(self.tokenizer, self.facts.n_ctx, self.switches, self.stop_ids)

    def capture(
        self,
        prompt: Content,
        *,
        sites: str = "all",
        layers: str | None = None,
        max_new_tokens: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        edits: Iterable[Steering | Edit] = (),
    ) -> Outcome:
        """Run a prompt, generate, and return everything captured; tensors are named and laid out as in a run.

        `prompt` is text or labelled segments (a sink token is put in front), token ids, a record (`task.record`, or one
        of its `passages`: its prompt's own tokens), or a rendered Prompt. Row t of the row axes emitted step t;
        `sites="all:all"` takes every position. `edits` hold in the prompt and in every generated token: `Steering`, or
        those of `probe.model.edits` by position. Raises NonFinite, and UsageError for a text with special tokens and for
        an edit that the model cannot have.
        """
        ready = self._ready(prompt, max_new_tokens)
        spec = CaptureSpec.parse(sites, layers, self.facts.n_layers, memory=True)
        generation = Generation(max_new_tokens, temperature, seed=seed)
        return self._outcome(ready, spec, generation, edits)

    def score(
        self,
        prompt: Content,
        continuations: Sequence[str],
        *,
        edits: Iterable[Steering | Edit] = (),
    ) -> list[Score]:
        """log P of each continuation after the prompt, all in one short forward on top of the prompt's own.

        `prompt` as in `capture`; `edits` hold in it and in the continuations, which are tokenised jointly with the last
        segment of a text prompt, and on their own after tokens.
        """
        known = prompt if _is_text(prompt) else self._ready(prompt, 1)
        tokens = candidates_after(known, continuations, self.codec)
        candidates = tuple(Candidate(text, ids) for text, ids in zip(continuations, tokens, strict=True))
        ready = replace(self._ready(known, 1, candidates), candidates=candidates)
        outcome = self._outcome(ready, CaptureSpec(frozenset()), Generation(1), edits)
        return [
            Score(text, ids, log_prob)
            for text, ids, log_prob in zip(continuations, tokens, outcome.candidate_log_probs, strict=True)
        ]

    def _ready(self, prompt: Content, room: int, candidates: tuple[Candidate, ...] = ()) -> Prompt:
        """The prompt of a content, with `room` for new tokens."""
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, Mapping):
            if not {"token_ids", "n_prompt"} <= prompt.keys():
                raise UsageError("the record has no token_ids of its own: take one of its `passages`")
            return prompt_of_tokens(prompt["token_ids"][: prompt["n_prompt"]], self.codec)
        if not _is_text(prompt):
            return prompt_of_tokens(cast("Sequence[int]", prompt), self.codec)
        if isinstance(prompt, str) and (token := special_token_in(prompt, self.codec)):
            raise UsageError(
                f"the text has {token!r}, which would be read as plain characters: a rendered prompt goes in as a record "
                "or as token ids (`task.record`), and what shall be read as characters as [Segment(text)]"
            )
        return prompt_of(prompt, self.codec, room, candidates)

    def _outcome(
        self, prompt: Prompt, spec: CaptureSpec, generation: Generation, edits: Iterable[Steering | Edit]
    ) -> Outcome:
        job = Job(prompt, "", edits=on_prompt(edits, prompt))
        outcome = run_batch(self, self.codec, [job], spec, generation)[0]
        if isinstance(outcome, NonFinite):
            raise outcome
        return outcome


def _is_text(content: Content) -> TypeGuard[str | Sequence[Segment]]:
    """Whether a content is still to be tokenised."""
    if isinstance(content, str):
        return True
    return not isinstance(content, Prompt | Mapping) and all(isinstance(part, Segment) for part in content)
