"""A transcript that is given: one prefill runs it, and all its decisions are scored behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from probe.capture.transcript import SIDE_TOKENS, Conversation, Reply, Transcript, Turn
from probe.prompts import Codec, KnownTranscript, Prompt, Span
from probe.prompts.labels import result_label

if TYPE_CHECKING:
    from torch import Tensor


class Replay(Transcript):
    """Drives a transcript whose tokens are all given: the last one is emitted, and nothing is chosen."""

    continued = True

    def __init__(self, converse: Callable[[], Conversation], given: KnownTranscript):
        super().__init__(converse, len(given.turns))
        self.given = given

    def begin(self, prompt: Prompt, codec: Codec, max_new_tokens: int) -> Self:
        run = super().begin(prompt, codec, max_new_tokens)
        run.queue = [self.given.last]
        run.most_probable = []
        return run

    states: Tensor
    """Final-normed states [new token, d_model]: the one that emits it."""
    log_probs: Sequence[float]

    def most_new(self, prompt: Prompt, max_new_tokens: int) -> int:
        return len(prompt.token_ids) - prompt.n_prompt + 1

    def n_decisions(self, n_new: int) -> int:
        return len(self.given.turns)

    def labels(self, prompt: Prompt, n_new: int) -> list[str]:
        return list(dict.fromkeys(span.label for span in self.given.spans))

    def example(self, prompt: Prompt, n_new: int, text: str, scores: list[list[float]]) -> dict[str, Any]:
        n_emitted = sum(turn.end + turn.ended - turn.start for turn in self.given.turns)
        return super().example(prompt, n_new, text, scores) | {"emitted": [(-12.3, True)] * n_emitted}

    def span_ends(self, prompt: Prompt) -> Sequence[Span]:
        return self.given.spans

    @property
    def side_slots(self) -> int:
        return self.nodes * min(len(self.given.turns), 1 + SIDE_TOKENS // max(self.nodes, 1))

    def see_all(self, hidden: Tensor) -> None:
        self.states = hidden

    def see(self, hidden: Tensor) -> None:
        """Nothing: all states are seen at once."""

    def stop(self, new_ids: Sequence[int]) -> str | None:
        self.turn_end = "eos" if self.given.turns[-1].ended else "length"
        return None

    def state_at(self, position: int) -> Tensor:
        return self.states[position + 1 - self.prompt.n_prompt]

    def end_turns(self, new_ids: Sequence[int], log_probs: Sequence[float]) -> list[tuple[Turn, Reply]]:
        self.log_probs = list(log_probs)
        ended = []
        for given in self.given.turns:
            start, end = (at - self.prompt.n_prompt for at in (given.start, given.end + given.ended))
            self.begin_turn(start)
            self.hidden = list(self.states[start:end])
            self.turn_end = "eos" if given.ended else "length"
            ended += super().end_turns(new_ids[:end], log_probs)
            label = result_label(len(self.turns))
            places = [span for span in self.given.spans if span.label == label]
            if places:
                self.turns[-1].result = (places[0].start, places[-1].end)
        return ended

    def parse(self, new_ids: Sequence[int]) -> tuple[list[Span], dict[str, Any]]:
        """`parsed` also has `emitted`: of each token that was emitted (log-probability, whether it is the most probable)."""
        first, best = self.prompt.n_prompt, self.most_probable or []
        emitted = [
            (self.log_probs[at - first], best[at - first] == new_ids[at - first])
            for turn in self.given.turns
            for at in range(turn.start, turn.end + turn.ended)
        ]
        spans = [span for span in self.given.spans if span.start >= first]
        return spans, {"turns": self.turns, "ended_by": self.ended_by, "emitted": emitted}
