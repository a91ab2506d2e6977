"""The turns of an agent's transcript: decisions scored in the slot that a call reached, results given back.

A transcript is one sequence whose cache is never run again: what a turn emitted stays as it was emitted, and a
result is run as one piece on top of it. What a call is, whether it is right and what comes back is the
conversation's part (`Conversation`); this module finds the slot, scores it beside the transcript, and appends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from probe.capture import candidates
from probe.capture.candidates import Tree, log_probs_of
from probe.capture.prefill import Part, Ran, prefill
from probe.model.attention import KVCache, Piece, Recorder
from probe.model.hooked import Model
from probe.prompts import Candidate, Codec, Prompt, Span, candidates_at, reply_ids
from probe.prompts.labels import ANSWER, OTHER, result_label, step_label

RESULT_TOKENS = 256
"""Of one result, at most; a longer one is cut, which the record says."""
_NAME_MARGIN = 8
"""Tokens that a candidate may have beside one for each byte of its name."""


@dataclass(frozen=True)
class Reply:
    """What a conversation makes of the text of a turn."""

    content: str | None
    """What goes back to the model; None: the turn is the answer."""
    found: dict[str, Any]
    """For the record."""
    call_start: int = 0
    """Character of the turn's text at which its (first) call begins."""
    name_start: int | None = None
    """Character at which the call names its tool; None: no call came as far as that."""


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
    """Behind the last one, the token that ended the turn left out."""
    text: str
    found: dict[str, Any]
    """What the conversation says of it, for the record."""
    called: bool
    """Whether something came back: without it the turn is the answer."""
    position: int = -1
    """Of the decision: it emitted the first token of the name, or, without a call, of the turn."""
    reached: bool = False
    """Whether the turn's own call came to the slot; else the opener was attached at `position`, on the side."""
    forced: bool = False
    """Whether the opener was given to the model; its log-probability is the model's own all the same."""
    candidates: tuple[Candidate, ...] = ()
    candidate_token_log_probs: list[list[float]] = field(default_factory=list)
    """By candidate and token, nats."""
    opener_log_prob: float = 0.0
    result: tuple[int, int] | None = None
    """Positions of the result's text, where it was given back."""
    left_out: int = 0
    """Tokens by which the result was cut."""

    @property
    def log_probs(self) -> list[float]:
        return [self.opener_log_prob, *(value for own in self.candidate_token_log_probs for value in own)]


class Talk:
    """The state of one transcript while it runs."""

    def __init__(self, conversation: Conversation, prompt: Prompt, codec: Codec, max_turns: int):
        assert prompt.call_prefix is not None and prompt.reply is not None
        self.conversation, self.prompt, self.codec, self.max_turns = conversation, prompt, codec, max_turns
        self.opener = codec.encode(prompt.call_prefix, True)
        names = [candidate.name or prompt.template.get("no_tool_name", "") for candidate in prompt.candidates]
        sizes = [len(name.encode()) + _NAME_MARGIN for name in names]
        self.depth = len(self.opener) + max(sizes)
        """Positions behind the last one that scoring a decision may take."""
        self.nodes = len(self.opener) + sum(sizes)
        """Slots of the cache that it may take."""
        self.turns: list[Turn] = []
        self.begin(0, None)
        self.ended_by: str | None = None
        """Why there is no further turn: `answer`, `max_turns` or `length`."""
        self.forced = False
        """Whether the first turn begins with the opener, whatever the model would have said."""

    def begin(self, start: int, hidden: Tensor | None) -> None:
        """A turn begins behind `start` new tokens; `hidden` [d_model] is the state that emits its first token."""
        self.start = start
        self.hidden: list[Tensor] = [] if hidden is None else [hidden]
        """Final-normed states, one for each token of the turn: the one that emitted it."""
        self.over: str | None = None
        """How the turn ended: `eos`, `stop`, `length`."""

    def see(self, new_ids: Sequence[int], limit: int) -> None:
        """Look at the token just emitted; `limit` is how many new tokens there may be."""
        if new_ids[-1] in self.prompt.stop_ids:
            self.over = "eos"
        elif self.conversation.over(self.codec.decode(new_ids[self.start :])):
            self.over = "stop"
        elif len(new_ids) >= self.room(limit):
            self.over = "length"

    def room(self, limit: int) -> int:
        """How many new tokens the transcript may have: the last decision must still fit into the context."""
        return min(limit, self.codec.n_ctx - self.depth - self.prompt.n_prompt)

    def end_turn(self, new_ids: Sequence[int], log_probs: Sequence[float]) -> tuple[Turn, Reply]:
        """Read the turn that ended and ask the conversation; the turn's candidates are still to be scored."""
        body = list(new_ids[self.start : -1] if self.over == "eos" else new_ids[self.start :])
        text = self.codec.decode(body)
        reply = self.conversation.reply(text)
        first = self.prompt.n_prompt + self.start
        turn = Turn(first, first + len(body), text, reply.found, called=reply.content is not None)
        turn.forced = self.forced and not self.turns
        slot = self._slot(body, reply)
        self.turns.append(turn)
        if slot is None:
            turn.position, turn.candidates = first - 1, self.prompt.candidates
        else:
            opener, name, turn.candidates = slot
            turn.reached, turn.position = True, first - 1 + name
            turn.opener_log_prob = sum(log_probs[self.start + opener : self.start + name])
        return turn, reply

    def _slot(self, body: list[int], reply: Reply) -> tuple[int, int, tuple[Candidate, ...]] | None:
        """(first token of the call, first token of the name, what could be said there).

        A token that reaches over a border belongs to what it ends in. A call whose name comes first has no
        opener of its own, and is none here.
        """
        if reply.name_start is None:
            if self.forced and not self.turns and len(body) > len(self.opener):
                return 0, len(self.opener), self.prompt.candidates
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


class Strand(Protocol):
    """What is needed of a sequence in flight."""

    new_ids: list[int]
    log_probs: list[float]
    talk: Talk | None

    @property
    def length(self) -> int: ...
    @property
    def n_prompt(self) -> int: ...
    def decide(self, position: int, logits: Tensor) -> None: ...


class Turns:
    """Ends turns and begins the next ones, for all sequences of a batch that are due at a time."""

    def __init__(self, model: Model, codec: Codec, recorder: Recorder, limit: int):
        self.model, self.codec, self.recorder, self.limit = model, codec, recorder, limit

    def end(self, strands: Sequence[Strand], rows: Sequence[int], cache: KVCache) -> list[Ran | None]:
        """Score the decisions of turns that ended and give results back; `rows` are the sequences' in the cache.

        Returns what running the result left, None for a transcript that has ended (`talk.ended_by`). The first
        hidden state of the next turn is in `talk.hidden`.
        """
        ended = [(strand, *_talk(strand).end_turn(strand.new_ids, strand.log_probs)) for strand in strands]
        self._score([(strand, turn) for strand, turn, _ in ended], rows, cache)
        parts: list[Part] = []
        given: list[int] = []
        for index, (strand, turn, reply) in enumerate(ended):
            talk = _talk(strand)
            ids = self._given_back(strand, turn, reply)
            if ids:
                start = strand.length - 1  # the token emitted last has not been run
                strand.new_ids += ids
                whole = [*talk.prompt.token_ids, *strand.new_ids]
                parts.append(Part(rows[index], whole, start, start, start, (), ()))
                given.append(index)
        out: list[Ran | None] = [None] * len(strands)
        for index, ran in zip(given, prefill(self.model, self.recorder, cache, parts), strict=True):
            self._begin(strands[index], torch.cat(ran.hidden))
            out[index] = ran
        return out

    def _given_back(self, strand: Strand, turn: Turn, reply: Reply) -> list[int]:
        """Tokens of the result's turn; empty where the transcript ends, and then why is noted."""
        talk = _talk(strand)
        if reply.content is None:
            talk.ended_by = "length" if talk.over == "length" else "answer"
            return []
        if len(talk.turns) >= talk.max_turns:
            talk.ended_by = "max_turns"
            return []
        assert talk.prompt.reply is not None
        last = strand.new_ids[-1] if talk.over == "eos" else None
        ids, (start, end), left_out = reply_ids(
            talk.prompt.reply, self.codec, reply.content, ended_by=last, limit=RESULT_TOKENS
        )
        if len(strand.new_ids) + len(ids) >= talk.room(self.limit):
            talk.ended_by = "length"
            return []
        turn.result, turn.left_out = (strand.length + start, strand.length + end), left_out
        return ids

    def _begin(self, strand: Strand, hidden: Tensor) -> None:
        """The next turn, behind given tokens; `hidden` [position, d_model] from the token before them on."""
        targets = [[token] for token in strand.new_ids[1 - len(hidden) :]]
        found = log_probs_of(hidden[:-1], targets, self.model.unembed)
        strand.log_probs += [log_prob for (log_prob,) in found]
        _talk(strand).begin(len(strand.new_ids), hidden[-1])

    # -- decisions -----------------------------------------------------------------------------------------

    def _score(self, ended: Sequence[tuple[Strand, Turn]], rows: Sequence[int], cache: KVCache) -> None:
        """Log-probabilities of all candidates, and of attached openers, in one packed forward."""
        trees = [Tree(turn.candidates) for _, turn in ended]
        openers = [[] if turn.reached else _talk(strand).opener for strand, turn in ended]
        pieces = [
            beside(tree, opener, row, strand.length - 1, turn.position + 1)
            for (strand, turn), tree, opener, row in zip(ended, trees, openers, rows, strict=True)
        ]
        sizes = [len(piece.tokens) for piece in pieces]
        self.recorder.begin(torch.zeros(0, dtype=torch.long))
        run = [piece for piece in pieces if piece.tokens]
        hidden = self.model.forward(run, cache)[0][0].split(sizes) if run else [torch.empty(0)] * len(ended)
        slots, nodes = [], []
        for (strand, turn), opener, own in zip(ended, openers, hidden, strict=True):
            talk = _talk(strand)
            at = talk.hidden[turn.position + 1 - strand.n_prompt - talk.start]
            logits = self.model.unembed(at)
            strand.decide(turn.position, logits)
            nodes.append(own[len(opener) :])
            if opener:
                states = torch.cat([at[None], own[: len(opener)]])
                found = log_probs_of(states[:-1], [[token] for token in opener], self.model.unembed)
                turn.opener_log_prob = sum(log_prob for (log_prob,) in found)
                logits = self.model.unembed(states[-1])
            slots.append(logits)
        packed = torch.cat(nodes) if any(len(own) for own in nodes) else None
        scored = candidates.read(trees, slots, packed, self.model.unembed)
        for (_, turn), log_probs in zip(ended, scored, strict=True):
            turn.candidate_token_log_probs = log_probs


def beside(tree: Tree, opener: Sequence[int], row: int, start: int, context: int) -> Piece:
    """An opener and the tree of what may follow it, on the side of a sequence that has `start` tokens in its
    cache: they see the first `context` of them, their ancestors and themselves, and count positions from there.
    """
    n_opener = len(opener)
    tokens = [*opener, *tree.tokens]
    parents = [*range(-1, n_opener - 1), *(max(parent, -1) + n_opener for parent in tree.parents)]
    depths = [*range(n_opener), *(n_opener + depth for depth in tree.depths)]
    seen = torch.zeros(len(tokens), start + len(tokens), dtype=torch.bool)
    seen[:, :context] = True
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node, start:] = seen[parent, start:]
        seen[node, start + node] = True
    return Piece(row, start, tokens, context + torch.tensor(depths, dtype=torch.long), seen)


def _talk(strand: Strand) -> Talk:
    assert strand.talk is not None
    return strand.talk
