"""An agent's transcript: what its turns are, where each decision lies, and what the other side says.

A transcript is one sequence. What a call is, whether it is right and what comes back is the conversation's part
(`Conversation`); `probe.capture.turns` scores the decisions and runs what comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from probe.capture.controller import Controller
from probe.prompts import Candidate, Codec, Prompt, Span, candidates_at
from probe.prompts.labels import ANSWER, OTHER, result_label, step_label

if TYPE_CHECKING:
    from torch import Tensor

TURN_TOKENS = 32
"""What a call and the result of it take at least, by estimate."""
SIDE_TOKENS = 1024
"""Tokens of decisions that are scored in one forward beside a sequence; one decision may have more."""
_NAME_MARGIN = 8
"""Tokens that a candidate may have beside one for each byte of its name."""


@dataclass(frozen=True)
class Reply:
    """What a conversation makes of the text of a turn."""

    content: str | None
    """What goes back to the model; None: the turn is the answer."""
    fields: dict[str, Any]
    """What the record gets of it."""
    call_start: int = 0
    """Character of the turn's text at which its (first) call begins."""
    name_start: int | None = None
    """Character at which the call names its tool; None: no call came as far as that."""
    tool: str | None = None
    """Name that was called; None: none was written."""
    spoken_from: int | None = 0
    """Character behind the thought that the turn begins in; None: it ends in it."""
    in_thought: bool = False
    """Whether that thought was opened for the model."""
    call_id: str | None = None
    """Id that the call was given; None: none was written."""
    further: tuple[tuple[str | None, int, int | None], ...] = ()
    """Of each call behind the first, where they are to be scored: name, where it begins, where it names its tool."""


class Conversation(Protocol):
    """Who a model talks to: one for each run of a task."""

    def over(self, text: str) -> bool:
        """Whether a turn that reads so far like this has ended, though the model has not said so."""
        ...

    def reply(self, text: str) -> Reply:
        """What comes back for a whole turn. Never raises for what the model wrote."""
        ...

    def close(self) -> None: ...


@dataclass
class Turn:
    """One turn: where it lies, and what its decision gave. Positions are those of the transcript."""

    start: int
    """Position of the first token that the model emitted in it."""
    end: int
    """Position behind its last token, without the one that ended the turn."""
    text: str
    fields: dict[str, Any]
    """What the conversation says of it, for the record."""
    called: bool
    """Whether something came back: without it the turn is the answer."""
    position: int = -1
    """Position of the decision: it emitted the first token of the name, or, without a call, of the turn."""
    reached: bool = False
    """Whether the turn's own call came to the slot; else the opener was attached at `position`, on the side."""
    forced: bool = False
    """Whether the opener was given to the model; its log-probability is the model's own all the same."""
    candidates: tuple[Candidate, ...] = ()
    candidate_token_log_probs: list[list[float]] = field(default_factory=list)
    """Log-probabilities by candidate and token, nats."""
    attached: tuple[int, ...] = ()
    """Tokens that are put behind the position, on the side, to score the decision: the opener, and before it what ends
    an open thought; none where the turn's own call came to the slot."""
    n_lead: int = 0
    """How many of them end a thought: these are given, and no part of the opener's probability."""
    opener_log_prob: float = 0.0
    result: tuple[int, int] | None = None
    """Positions of the result's text, where it was given back."""
    left_out: int = 0
    """Tokens by which the result was cut."""
    further: list[Turn] = field(default_factory=list)
    """The same turn with the decision of each further call; they have no rows among the decisions of the tensors."""

    @property
    def log_probs(self) -> list[float]:
        return [
            self.opener_log_prob,
            *(value for token_log_probs in self.candidate_token_log_probs for value in token_log_probs),
            *(value for turn in self.further for value in turn.log_probs),
        ]


class Transcript(Controller):
    """Drives an agent's transcript turn by turn; each turn has a decision of its own."""

    at_prompt = False

    def __init__(self, converse: Callable[[], Conversation], max_turns: int, *, must_call: bool = False):
        """`converse` begins a conversation, anew for each run. With `must_call` the first turn begins with the
        opener of a call, whatever the model would have said."""
        super().__init__()
        self.converse, self.max_turns, self.must_call = converse, max_turns, must_call

    def begin(self, prompt: Prompt, codec: Codec, max_new_tokens: int) -> Self:
        assert prompt.call_prefix is not None and prompt.reply is not None
        run = super().begin(prompt, codec, max_new_tokens)
        run.conversation = self.converse()
        run.opener = codec.encode(prompt.call_prefix, True)
        run.lead = codec.encode(prompt.call_lead, True)
        run.queue = [*run.lead, *run.opener] if self.must_call else []
        names = [candidate.name or prompt.template.get("no_tool_name", "") for candidate in prompt.candidates]
        sizes = [len(name.encode()) + _NAME_MARGIN for name in names]
        run.depth = len(run.lead) + len(run.opener) + max(sizes)
        run.nodes = len(run.lead) + len(run.opener) + sum(sizes)
        run.turns = []
        run.ended_by = None
        run.begin_turn(0)
        return run

    conversation: Conversation
    opener: list[int]
    lead: list[int]
    """Tokens that end the thought which the prompt opens."""
    depth: int
    """Positions behind the last one that scoring a decision may take."""
    nodes: int
    """Slots of the cache that it may take."""
    turns: list[Turn]
    ended_by: str | None
    """Why there is no further turn: `answer`, `max_turns` or `length`."""

    def n_decisions(self, n_new: int) -> int:
        return min(self.max_turns, 1 + n_new // TURN_TOKENS)

    def labels(self, prompt: Prompt, n_new: int) -> list[str]:
        turns = range(1, self.n_decisions(n_new))
        between = [label for k in turns for label in (step_label(k), result_label(k))]
        return list(dict.fromkeys([*prompt.labels, *between, OTHER, ANSWER]))

    def span_ends(self, prompt: Prompt) -> Sequence[Span] | None:
        return None

    def example(self, prompt: Prompt, n_new: int, text: str, scores: list[list[float]]) -> dict[str, Any]:
        """A transcript with as many turns as there may be, whose results together have `text`."""
        n_turns = self.n_decisions(n_new)
        fields = {"called": None, "call": None, "result": {"content": text[: len(text) // n_turns]}}
        turn = Turn(prompt.n_prompt, prompt.n_prompt, "x" * 100, fields, called=True)
        turn.candidates, turn.candidate_token_log_probs = prompt.candidates, scores
        return {"turns": [turn] * n_turns, "ended_by": None}

    @property
    def paused(self) -> bool:
        return self.turn_end is not None

    @property
    def side_slots(self) -> int:
        return self.nodes

    def see(self, hidden: Tensor) -> None:
        self.hidden.append(hidden)

    def stop(self, new_ids: Sequence[int]) -> str | None:
        """None always: a turn that ends pauses the sequence, and what comes back decides whether it goes on."""
        if new_ids[-1] in self.stop_ids:
            self.turn_end = "eos"
        elif self.conversation.over(self.codec.decode(new_ids[self.start :])):
            self.turn_end = "stop"
        elif len(new_ids) >= self.room:
            self.turn_end = "length"
        return None

    def parse(self, new_ids: Sequence[int]) -> tuple[list[Span], dict[str, Any]]:
        """`parsed` has `turns` and `ended_by`."""
        total = self.prompt.n_prompt + len(new_ids)
        return self.spans(total), {"turns": self.turns, "ended_by": self.ended_by}

    def close(self) -> None:
        self.conversation.close()

    def begin_turn(self, start: int) -> None:
        """A turn begins behind `start` new tokens."""
        self.start = start
        self.hidden: list[Tensor] = []
        """Final-normed states, one for each token of the turn: the one that emitted it."""
        self.turn_end: str | None = None
        """How the turn ended: `eos`, `stop`, `length`."""

    @property
    def room(self) -> int:
        """How many new tokens the transcript may have: the last decision must still fit into the context."""
        limit = self.most_new(self.prompt, self.max_new_tokens)
        context = self.codec.room(self.prompt.n_prompt)
        return min(limit, context - self.depth - self.prompt.n_prompt)

    @property
    def finish_reason(self) -> str:
        """Why a transcript that has ended did so."""
        reasons = {"answer": self.turn_end, "max_turns": "stop"}
        return reasons.get(self.ended_by or "") or "length"

    def state_at(self, position: int) -> Tensor:
        """Final-normed state [d_model] at a position of the turns that ended last."""
        return self.hidden[position + 1 - self.prompt.n_prompt - self.start]

    def end_turns(self, new_ids: Sequence[int], log_probs: Sequence[float]) -> list[tuple[Turn, Reply]]:
        """The turns that have ended since the last time, and what the conversation makes of each."""
        return [self._end_turn(new_ids, log_probs)]

    def _end_turn(self, new_ids: Sequence[int], log_probs: Sequence[float]) -> tuple[Turn, Reply]:
        """Read the turn that ended and ask the conversation; the turn's candidates are still to be scored."""
        body = list(new_ids[self.start : -1] if self.turn_end == "eos" else new_ids[self.start :])
        text = self.codec.decode(body)
        reply = self.conversation.reply(text)
        first = self.prompt.n_prompt + self.start
        turn = Turn(first, first + len(body), text, reply.fields, called=reply.content is not None)
        turn.forced = self.must_call and not self.turns
        slot = self._slot(body, reply)
        self.turns.append(turn)
        if slot is None:
            behind = self._behind_thought(body, reply.spoken_from)
            lead = self.lead if behind is None and reply.in_thought else []
            turn.position, turn.candidates = first - 1 + (behind or 0), self.prompt.candidates
            turn.attached, turn.n_lead = (*lead, *self.opener), len(lead)
        else:
            opener, name, turn.candidates = slot
            turn.reached, turn.position = True, first - 1 + name
            turn.opener_log_prob = sum(log_probs[self.start + opener : self.start + name])
        for called, call_start, name_start in reply.further:
            slot = self._slot(body, replace(reply, call_start=call_start, name_start=name_start))
            if slot is not None:
                opener, name, choices = slot
                again = Turn(turn.start, turn.end, text, {"called": called}, called=True, reached=True)
                again.position, again.candidates = first - 1 + name, choices
                again.opener_log_prob = sum(log_probs[self.start + opener : self.start + name])
                turn.further.append(again)
        return turn, reply

    def _behind_thought(self, body: list[int], character: int | None) -> int | None:
        """Tokens of a turn up to where its thought has ended; None where that is not in it."""
        if character is None:
            return None
        begins = [0, *self.codec.token_ends(body)]
        index = next((i for i, begin in enumerate(begins) if begin >= character), len(begins))
        return index if index < len(self.hidden) else None

    def _slot(self, body: list[int], reply: Reply) -> tuple[int, int, tuple[Candidate, ...]] | None:
        """(first token of the call, first token of the name, what could be said there).

        A token that reaches over a border belongs to what it ends in. A call whose name comes first has no
        opener of its own, and is none here.
        """
        if reply.name_start is None:
            forced = len(self.lead) + len(self.opener)
            if self.must_call and not self.turns and len(body) > forced:
                return len(self.lead), forced, self.prompt.candidates
            return None
        ends = self.codec.token_ends(body)
        text = self.codec.decode(body)
        opener = next(i for i, end in enumerate(ends) if end > reply.call_start)
        name = next(i for i, end in enumerate(ends) if end > reply.name_start)
        if opener == name:
            return None
        begins = [0, *ends]
        before = text[max(begins[opener], reply.call_start) : begins[name]]
        lead = text[begins[name] : reply.name_start]
        return opener, name, candidates_at(self.prompt, self.codec, before, lead)

    def spans(self, total: int) -> list[Span]:
        """Spans of everything behind the prompt: step:K, result:K, answer, and the markup between as other."""
        marked: list[Span] = []
        for number, turn in enumerate(self.turns, 1):
            marked.append(Span(step_label(number) if turn.called else ANSWER, turn.start, turn.end))
            if turn.result is not None:
                marked.append(Span(result_label(number), *turn.result))
        spans: list[Span] = []
        at = self.prompt.n_prompt
        for span in [*(span for span in marked if span.end > span.start), Span("", total, total)]:
            if span.start > at:
                spans.append(Span(OTHER, at, span.start))
            if span.label:
                spans.append(span)
            at = span.end
        return spans
