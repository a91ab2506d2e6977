"""Sequences whose tokens come from elsewhere: a generator chooses them, and one prefill gives states, memory and decisions.

The controller of a job is asked about every token as it would be while the model speaks (`continued`): it may force tokens, and it
says when the sequence ends. Then all tokens are known, and the job is run again with them given (`GivenTokens`): those behind
the prompt are run with it, the last one is emitted and never run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

from probe.capture.controller import Controller
from probe.capture.spec import Job
from probe.prompts import Codec, Prompt, Span

PREFILLED = "prefill"
"""`finish_reason` of a passage of which nothing was to be generated."""


class GeneratedToken(NamedTuple):
    """A token that a generator chose."""

    token_id: int
    log_prob: float | None = None
    """Its own, nats, before temperature; None: it does not say."""


Ask = Callable[[Sequence[int], int, frozenset[int]], Sequence[GeneratedToken]]
"""(token ids so far, most new ones, tokens that end a turn) → the tokens that follow, the one that ends the turn among them."""


@dataclass
class GivenContinuation:
    """What followed a prompt."""

    new_ids: list[int]
    logged: list[float | None]
    """Log-probability of each by its generator, nats; None of what was forced, and where it is not known."""
    emitted: list[bool]
    """Whether the generator chose it."""
    decided: list[int] = field(default_factory=list)
    """Positions of the decisions behind the prompt."""
    finish_reason: str = ""


class GivenTokens(Controller):
    """Drives a sequence whose tokens are all known, which `driven` has been asked about."""

    def __init__(self, driven: Controller, tokens: GivenContinuation):
        super().__init__()
        self.driven, self.tokens = driven, tokens
        self.at_prompt = driven.at_prompt
        self.decided = tuple(tokens.decided)

    def begin(self, prompt: Prompt, codec: Codec, max_new_tokens: int) -> Self:
        run = super().begin(prompt, codec, max_new_tokens)
        run.queue = self.tokens.new_ids[-1:]
        run.most_probable = []
        return run

    def most_new(self, prompt: Prompt, max_new_tokens: int) -> int:
        return len(self.tokens.new_ids)

    def n_decisions(self, n_new: int) -> int:
        return self.driven.n_decisions(n_new)

    def labels(self, prompt: Prompt, n_new: int) -> list[str]:
        return self.driven.labels(prompt, n_new)

    def stop(self, new_ids: Sequence[int]) -> str | None:
        return self.tokens.finish_reason

    def parse(self, new_ids: Sequence[int]) -> tuple[list[Span], dict[str, Any]]:
        """`parsed` also has `given`: of each token that the generator chose (index, whether it is the argmax, its logged
        log-probability)."""
        spans, read = self.driven.parse(new_ids)
        best = self.most_probable or []
        chosen = [
            (index, best[index] == token, self.tokens.logged[index])
            for index, token in enumerate(new_ids)
            if self.tokens.emitted[index]
        ]
        return spans, read | {"given": chosen}


class PrefillOnly(Controller):
    """Runs the prompt and what is forced behind it alone; the most probable next token is noted and never run."""

    def __init__(self, driven: Controller):
        super().__init__()
        self.driven = driven
        self.at_prompt = driven.at_prompt

    def begin(self, prompt: Prompt, codec: Codec, max_new_tokens: int) -> Self:
        run = super().begin(prompt, codec, max_new_tokens)
        run.driven = self.driven.begin(prompt, codec, max_new_tokens)
        return run

    def most_new(self, prompt: Prompt, max_new_tokens: int) -> int:
        return len(prompt.token_ids) - prompt.n_prompt + 1

    def n_decisions(self, n_new: int) -> int:
        return self.driven.n_decisions(n_new)

    def labels(self, prompt: Prompt, n_new: int) -> list[str]:
        return self.driven.labels(prompt, n_new)

    def decides(self, new_ids: Sequence[int], token: int) -> bool:
        return self.driven.decides(new_ids, token)

    def stop(self, new_ids: Sequence[int]) -> str | None:
        return PREFILLED

    def parse(self, new_ids: Sequence[int]) -> tuple[list[Span], dict[str, Any]]:
        return self.driven.parse(new_ids)


def prefill_only(job: Job) -> Job:
    """The job with nothing to generate."""
    return replace(job, controller=PrefillOnly(job.controller))


def given(job: Job, codec: Codec, max_new_tokens: int, ask: Ask, *, within: bool = False) -> Job:
    """The job with its tokens given by a generator. Raises what `ask` raises, and ValueError where it gives none.

    `within`: the generator has no token behind the context's last position, which a run of its own emits and never runs.
    """
    driven = job.controller.begin(job.prompt, codec, max_new_tokens)
    tokens = continued(driven, job, max_new_tokens, ask, within=within)
    prompt, ids = job.prompt, [*job.prompt.token_ids[: job.prompt.n_prompt], *tokens.new_ids]
    behind, _ = driven.parse(tokens.new_ids)
    n_run = len(ids) - 1
    spans = [span for span in prompt.spans if span.end <= prompt.n_prompt]
    spans += [replace(span, end=min(span.end, n_run), parts=()) for span in behind if span.start < n_run]
    whole = replace(prompt, token_ids=ids[:n_run], spans=spans)
    return replace(job, prompt=whole, controller=GivenTokens(driven, tokens))


def continued(
    driven: Controller, job: Job, max_new_tokens: int, ask: Ask, *, within: bool = False
) -> GivenContinuation:
    """What follows a prompt when a generator speaks and `driven`, which has begun, says what is forced and when it ends."""
    prompt = job.prompt
    new_ids = list(prompt.token_ids[prompt.n_prompt :])
    out = GivenContinuation(new_ids, [None] * len(new_ids), [False] * len(new_ids))
    # The last token is never run, so it may lie one position behind the context.
    end = driven.codec.room(len(prompt.token_ids))
    room = end + (end < driven.codec.n_ctx or not within) - prompt.n_prompt
    most = min(job.most_new(max_new_tokens), room)
    spoken: list[GeneratedToken] = []
    while True:
        if driven.queue:
            token, log_prob, emitted = driven.queue.pop(0), None, False
        else:
            if not spoken:
                ids = [*prompt.token_ids[: prompt.n_prompt], *new_ids]
                spoken = list(ask(ids, max(most - len(new_ids), 1), driven.stop_ids))
            if not spoken:
                raise ValueError("the generator gave no token")
            (token, log_prob), emitted = spoken.pop(0), True
            if cue := driven.cue(new_ids, token):
                token, log_prob, emitted = cue[0], None, False
                # What it would have said behind another token is not what it says behind the cue.
                driven.queue, spoken = cue[1:], []
            elif driven.decides(new_ids, token):
                out.decided.append(prompt.n_prompt + len(new_ids) - 1)
        new_ids.append(token)
        out.logged.append(log_prob)
        out.emitted.append(emitted)
        if reason := driven.stop(new_ids) or ("length" if len(new_ids) >= room else None):
            out.finish_reason = reason
            return out
