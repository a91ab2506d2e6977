"""The turns of an agent's transcript: decisions scored in the slot that a call reached, results given back.

A transcript is one sequence whose cache is never run again: what a turn emitted stays as it was emitted, and a
result is run as one piece on top of it. Where the slot lies is the transcript's part; this module scores it beside
the sequence, and appends what comes back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from probe.capture import candidates
from probe.capture.candidates import Tree, log_probs_of
from probe.capture.controller import Controller
from probe.capture.prefill import Part, Ran, prefill
from probe.capture.transcript import Reply, Transcript, Turn
from probe.model.attention import KVCache, Piece, Recorder
from probe.model.hooked import Model
from probe.prompts import Codec, reply_ids

RESULT_TOKENS = 256
"""Of one result, at most; a longer one is cut, which the record says."""


class Strand(Protocol):
    """What is needed of a sequence in flight."""

    new_ids: list[int]
    log_probs: list[float]
    finish_reason: str | None

    @property
    def controller(self) -> Controller: ...
    @property
    def length(self) -> int: ...
    @property
    def n_prompt(self) -> int: ...
    def decide(self, position: int, logits: Tensor) -> None: ...
    def fail(self) -> None: ...


class Resumed(NamedTuple):
    """A sequence that goes on behind a result."""

    ran: Ran
    """What running the result left."""
    hidden: Tensor
    """Final-normed state [d_model] that emits the first token of the next turn."""


class Turns:
    """Ends turns and begins the next ones, for all sequences of a batch that are due at a time."""

    def __init__(self, model: Model, codec: Codec, recorder: Recorder):
        self.model, self.codec, self.recorder = model, codec, recorder

    def end(self, strands: Sequence[Strand], rows: Sequence[int], cache: KVCache) -> list[Resumed | None]:
        """Score the decisions of turns that ended and give results back; `rows` are the sequences' in the cache.

        None for a sequence that has ended (`finish_reason`).
        """
        ended = [
            (strand, *_transcript(strand).end_turn(strand.new_ids, strand.log_probs)) for strand in strands
        ]
        self._score([(strand, turn) for strand, turn, _ in ended], rows, cache)
        parts: list[Part] = []
        given: list[int] = []
        for index, (strand, turn, reply) in enumerate(ended):
            transcript = _transcript(strand)
            ids = self._given_back(strand, turn, reply)
            if ids:
                start = strand.length - 1  # the token emitted last has not been run
                strand.new_ids += ids
                whole = [*transcript.prompt.token_ids, *strand.new_ids]
                parts.append(Part(rows[index], whole, start, start, start, (), ()))
                given.append(index)
        out: list[Resumed | None] = [None] * len(strands)
        for index, ran in zip(given, prefill(self.model, self.recorder, cache, parts), strict=True):
            out[index] = Resumed(ran, self._begin(strands[index], torch.cat(ran.hidden)))
        for index, (strand, turn, _) in enumerate(ended):
            if not all(map(math.isfinite, turn.log_probs)):
                strand.fail()
                out[index] = None
            elif out[index] is None:
                strand.finish_reason = _transcript(strand).finish_reason
        return out

    def _given_back(self, strand: Strand, turn: Turn, reply: Reply) -> list[int]:
        """Tokens of the result's turn; empty where the transcript ends, and then why is noted."""
        transcript = _transcript(strand)
        if reply.content is None:
            transcript.ended_by = "length" if transcript.turn_end == "length" else "answer"
            return []
        if len(transcript.turns) >= transcript.max_turns:
            transcript.ended_by = "max_turns"
            return []
        assert transcript.prompt.reply is not None
        last = strand.new_ids[-1] if transcript.turn_end == "eos" else None
        ids, (start, end), left_out = reply_ids(
            transcript.prompt.reply, self.codec, reply.content, ended_by=last, limit=RESULT_TOKENS
        )
        if len(strand.new_ids) + len(ids) >= transcript.room:
            transcript.ended_by = "length"
            return []
        turn.result, turn.left_out = (strand.length + start, strand.length + end), left_out
        return ids

    def _begin(self, strand: Strand, hidden: Tensor) -> Tensor:
        """The next turn, behind given tokens; `hidden` [position, d_model] from the token before them on.

        Returns the state that emits its first token.
        """
        targets = [[token] for token in strand.new_ids[1 - len(hidden) :]]
        found = log_probs_of(hidden[:-1], targets, self.model.unembed)
        strand.log_probs += [log_prob for (log_prob,) in found]
        _transcript(strand).begin_turn(len(strand.new_ids))
        _transcript(strand).see(hidden[-1])
        return hidden[-1]

    # -- decisions -----------------------------------------------------------------------------------------

    def _score(self, ended: Sequence[tuple[Strand, Turn]], rows: Sequence[int], cache: KVCache) -> None:
        """Log-probabilities of all candidates, and of attached openers, in one packed forward."""
        trees = [Tree(turn.candidates) for _, turn in ended]
        openers = [[] if turn.reached else _transcript(strand).opener for strand, turn in ended]
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
            transcript = _transcript(strand)
            at = transcript.hidden[turn.position + 1 - strand.n_prompt - transcript.start]
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


def _transcript(strand: Strand) -> Transcript:
    assert isinstance(strand.controller, Transcript)
    return strand.controller
