"""A loaded model with the two verbs `capture` and `score`, for Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from probe.capture.batch import run_batch
from probe.capture.edits import Steering, on_prompt
from probe.capture.spec import CaptureSpec, Generation, Job, NonFinite, Outcome
from probe.model.edits import Edit
from probe.model.hooked import Model
from probe.prompts import Candidate, Codec, Prompt, Segment, candidates_after, prompt_of


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
        prompt: str | Sequence[Segment] | Prompt,
        *,
        sites: str = "all",
        layers: str | None = None,
        max_new_tokens: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        edits: Iterable[Steering | Edit] = (),
    ) -> Outcome:
        """Run a prompt, generate, and return everything captured; tensors are named and laid out as in a run.

        `prompt` is text (a sink token is put in front), labelled segments, or a rendered Prompt. Row t of the
        row axes emitted step t; `sites="all:all"` takes every position. `edits` hold in the prompt and in every generated
        token: `Steering`, or those of `probe.model.edits` by position. Raises NonFinite, and UsageError for an edit that
        the model cannot have.
        """
        ready = prompt if isinstance(prompt, Prompt) else prompt_of(prompt, self.codec, max_new_tokens)
        spec = CaptureSpec.parse(sites, layers, self.facts.n_layers, memory=True)
        generation = Generation(max_new_tokens, temperature, seed=seed)
        return self._outcome(ready, spec, generation, edits)

    def score(
        self,
        prompt: str | Sequence[Segment] | Prompt,
        continuations: Sequence[str],
        *,
        edits: Iterable[Steering | Edit] = (),
    ) -> list[Score]:
        """log P of each continuation after the prompt, all in one short forward on top of the prompt's own.

        Continuations are tokenised jointly with the last segment of a text prompt. `edits` hold in the prompt and in the
        continuations, as in `capture`.
        """
        tokens = candidates_after(prompt, continuations, self.codec)
        candidates = tuple(Candidate(text, ids) for text, ids in zip(continuations, tokens, strict=True))
        if isinstance(prompt, Prompt):
            ready = replace(prompt, candidates=candidates)
        else:
            ready = prompt_of(prompt, self.codec, 1, candidates)
        outcome = self._outcome(ready, CaptureSpec(frozenset()), Generation(1), edits)
        return [
            Score(text, ids, log_prob)
            for text, ids, log_prob in zip(continuations, tokens, outcome.candidate_log_probs, strict=True)
        ]

    def _outcome(
        self, prompt: Prompt, spec: CaptureSpec, generation: Generation, edits: Iterable[Steering | Edit]
    ) -> Outcome:
        job = Job(prompt, "", edits=on_prompt(edits, prompt))
        outcome = run_batch(self, self.codec, [job], spec, generation)[0]
        if isinstance(outcome, NonFinite):
            raise outcome
        return outcome
