"""Who drives a sequence: when it stops, what is forced upon it, what is read from what was said.

A job carries a controller as a template; `begin` gives the one that drives a run of it. The batch knows nothing else
of how a passage goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, Self

from probe.prompts import Codec, Prompt, Span, label_completion
from probe.prompts.labels import ANSWER

if TYPE_CHECKING:
    from torch import Tensor


class Controller:
    """Lets the model speak until it ends its turn, `finished` says so of the text so far, or the budget is spent."""

    continued = False
    """Whether other sequences may have its tokens and go on, those behind the prompt included."""
    at_prompt = True
    """Whether the first decision lies at the end of the prompt and the prompt's candidates are scored there."""
    prompt: Prompt
    codec: Codec
    max_new_tokens: int
    stop_ids: frozenset[int]
    """Tokens that end a turn."""
    queue: list[int]
    """Tokens that are forced next, whatever the model would say."""
    decided: Sequence[int] = ()
    """Positions of decisions among what is forced behind the prompt, whose logits are kept."""
    most_probable: list[int] | None = None
    """The most probable token in place of each new one, where that is wanted of forced tokens too."""

    def __init__(self, finished: Callable[[str], bool] | None = None):
        self.finished = finished

    def begin(self, prompt: Prompt, codec: Codec, max_new_tokens: int) -> Self:
        """The controller of one run of a prompt."""
        run = copy(self)
        run.prompt, run.codec, run.max_new_tokens = prompt, codec, max_new_tokens
        run.queue = []
        # Those of the prompt are the tokenizer's and the template's; without any nothing ends it.
        run.stop_ids = prompt.stop_ids | codec.stop_ids if prompt.stop_ids else prompt.stop_ids
        return run

    # -- what sizes are estimated from -------------------------------------------------------------------------

    def most_new(self, prompt: Prompt, max_new_tokens: int) -> int:
        """Bound of the tokens after the prompt: forced and generated."""
        return len(prompt.token_ids) - prompt.n_prompt + max_new_tokens

    def n_decisions(self, n_new: int) -> int:
        """How many decisions `n_new` tokens may have, by estimate."""
        return 1

    def labels(self, prompt: Prompt, n_new: int) -> list[str]:
        """Labels of a finished passage, by estimate."""
        return [*prompt.labels, ANSWER]

    def span_ends(self, prompt: Prompt) -> Sequence[Span] | None:
        """The spans of a finished passage, but for a last one of what it emits; None where it is known only then how many they are."""
        return prompt.spans

    def example(self, prompt: Prompt, n_new: int, text: str, scores: list[list[float]]) -> dict[str, Any]:
        """What `parsed` may be for a completion `text` of `n_new` tokens whose decisions score like `scores`."""
        return {}

    # -- asked while the sequence runs -------------------------------------------------------------------------

    @property
    def paused(self) -> bool:
        """Whether a turn has ended and something may come back (`probe.capture.turns`)."""
        return False

    @property
    def side_slots(self) -> int:
        """Slots of the cache that scoring decisions on the side may take behind the sequence."""
        return 0

    def see_all(self, hidden: Tensor) -> None:
        """Final-normed states [new token, d_model]: those that emit what is forced behind the prompt, and the next token."""
        self.see(hidden[-1])

    def see(self, hidden: Tensor) -> None:
        """The final-normed state [d_model] that emits the next token."""

    def cue(self, new_ids: Sequence[int], token: int) -> list[int]:
        """Tokens that are forced in place of `token`, which the model chose; empty: it stands."""
        return []

    def decides(self, new_ids: Sequence[int], token: int) -> bool:
        """Whether `token`, which the model chose, is a decision whose logits are kept."""
        return False

    def stop(self, new_ids: Sequence[int]) -> str | None:
        """Why the sequence ends behind the token emitted last (`eos`, `stop`, `length`); None: it goes on."""
        if new_ids[-1] in self.stop_ids and not self.queue:
            return "eos"
        if reason := self.over(new_ids):
            return reason
        # The token emitted last is run next, at position length − 1, which the model must have.
        full = self.prompt.n_prompt + len(new_ids) > self.codec.room(len(self.prompt.token_ids))
        spent = len(new_ids) >= self.most_new(self.prompt, self.max_new_tokens)
        return "length" if full or spent else None

    def over(self, new_ids: Sequence[int]) -> str | None:
        """Why nothing more is wanted (`stop`, `length`), though the model has not ended its turn."""
        if self.finished is not None and self.finished(self.codec.decode(new_ids)):
            return "stop"
        return None

    # -- asked at its end --------------------------------------------------------------------------------------

    def parse(self, new_ids: Sequence[int]) -> tuple[list[Span], dict[str, Any]]:
        """Spans of everything after the prompt, and what is read from it (`Outcome.parsed`)."""
        return label_completion(self.prompt, self.codec, new_ids, cot=False, answer_at=None)

    def close(self) -> None:
        """Give back what the run held; it may have failed."""
