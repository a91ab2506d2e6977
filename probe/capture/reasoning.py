"""The controller of a chain of thought: steps, the cue of an answer, a short answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from probe.capture.controller import Controller
from probe.prompts import ANSWER_CUE, Prompt, Span, announces_answer, label_completion, thought
from probe.prompts.labels import ANSWER, OTHER, step_label

ANSWER_TOKENS = 24
CUE_TOKENS = 8
"""Most tokens of the forced answer cue: its bytes, where every byte is a token."""


class Reasoning(Controller):
    """Lets the model reason until it announces an answer, and forces a cue where it stops without; the answer ends
    with its line. The first token of the answer is a decision."""

    def __init__(
        self,
        cue: str | None = ANSWER_CUE,
        *,
        announces: Callable[[str], bool] = announces_answer,
        answer_tokens: int = ANSWER_TOKENS,
    ):
        """`cue` None: none is forced. `answer_tokens`: what an answer may take on top of max_new_tokens."""
        super().__init__()
        self.answer_cue, self.announces, self.answer_tokens = cue, announces, answer_tokens
        self.answer_at: int | None = None
        """Index in the new tokens of the first one of the answer."""
        self.forced = False
        """Whether the cue was forced."""

    def most_new(self, prompt: Prompt, max_new_tokens: int) -> int:
        forced, answer = len(prompt.token_ids) - prompt.n_prompt, CUE_TOKENS + self.answer_tokens
        # Where the reasoning is given only the answer is left.
        return forced + answer + (0 if forced else max_new_tokens)

    def n_decisions(self, n_new: int) -> int:
        return 2

    def labels(self, prompt: Prompt, n_new: int) -> list[str]:
        """How many steps a free reasoning takes is a guess."""
        steps = [OTHER] if prompt.forced_steps else [step_label(number) for number in range(1, 6)]
        return list(dict.fromkeys([*prompt.labels, *steps, ANSWER]))

    def span_ends(self, prompt: Prompt) -> Sequence[Span] | None:
        return prompt.spans if prompt.forced_steps else None

    def cue(self, new_ids: Sequence[int], token: int) -> list[int]:
        if self.answer_cue is None or self.forced or self.answer_at is not None:
            return []
        if token not in self.stop_ids and len(new_ids) < self.max_new_tokens:
            return []
        text = self._text(new_ids)
        if self.announces(text):
            return []
        self.forced = True
        closing = thought(text)[1]
        cue = self.answer_cue if text.endswith("\n") or not text else "\n" + self.answer_cue
        return [*(self.codec.encode(closing, True) if closing else []), *self.codec.encode(cue)]

    def _text(self, new_ids: Sequence[int]) -> str:
        """What was said so far; a thought that the template opened is said here."""
        opened = (thought(self.prompt.text)[1] or "").replace("/", "", 1)
        return opened + self.codec.decode(new_ids)

    def decides(self, new_ids: Sequence[int], token: int) -> bool:
        if self.answer_at is not None or not any(map(str.isalnum, self.codec.decode([token]))):
            return False
        if self.announces(self._text(new_ids)):
            self.answer_at = len(new_ids)
        return self.answer_at is not None

    def over(self, new_ids: Sequence[int]) -> str | None:
        if self.answer_at is None:
            return None
        if "\n" in self.codec.decode(new_ids[self.answer_at :]):
            return "stop"
        return "length" if len(new_ids) - self.answer_at >= self.answer_tokens else None

    def parse(self, new_ids: Sequence[int]) -> tuple[list[Span], dict[str, Any]]:
        """`parsed` has `steps`, `answer` (None: none was given) and `answer_forced`."""
        spans, read = label_completion(self.prompt, self.codec, new_ids, cot=True, answer_at=self.answer_at)
        return spans, read | {"answer_forced": self.forced}
