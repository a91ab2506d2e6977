"""The turns of an agent's transcript: decisions scored in the slot that a call reached, results given back.

A transcript is one sequence whose cache is never run again: what a turn emitted stays as it was emitted, and a
result is run as one piece on top of it. Where the slot lies is the transcript's part; this module scores it beside
the sequence, and appends what comes back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from probe.capture import candidates
from probe.capture.candidates import Tree, log_probs_of
from probe.capture.prefill import Part, PartResult, prefill
from probe.capture.sequence import ActiveSequence
from probe.capture.transcript import Reply, Transcript, Turn
from probe.model.attention import KVCache, Piece, Recorder
from probe.model.hooked import Model
from probe.prompts import Codec, reply_ids

RESULT_TOKENS = 256
"""Most tokens of one result; a longer one is cut, which the record says."""


class ResumedTurn(NamedTuple):
    """A sequence that goes on behind a result."""

    ran: PartResult
    """What running the result left."""
    hidden: Tensor
    """Final-normed state [d_model] that emits the first token of the next turn."""


class Turns:
    """Ends turns and begins the next ones, for all sequences of a batch that are due at a time."""

    def __init__(self, model: Model, codec: Codec, recorder: Recorder):
        self.model, self.codec, self.recorder = model, codec, recorder

    def end(
        self, sequences: Sequence[ActiveSequence], rows: Sequence[int], cache: KVCache
    ) -> list[ResumedTurn | None]:
        """Score the decisions of turns that ended and give results back; `rows` are the sequences' in the cache.

        None for a sequence that has ended (`finish_reason`).
        """
        ended = [
            (sequence, *_transcript(sequence).end_turn(sequence.new_ids, sequence.log_probs))
            for sequence in sequences
        ]
        self._score([(sequence, turn) for sequence, turn, _ in ended], rows, cache)
        parts: list[Part] = []
        given: list[int] = []
        for index, (sequence, turn, reply) in enumerate(ended):
            transcript = _transcript(sequence)
            ids = self._given_back(sequence, turn, reply)
            if ids:
                start = sequence.length - 1  # the token emitted last has not been run
                sequence.new_ids += ids
                whole = [*transcript.prompt.token_ids, *sequence.new_ids]
                parts.append(Part(rows[index], whole, start, start, start, (), (), sequence.job.edits))
                given.append(index)
        out: list[ResumedTurn | None] = [None] * len(sequences)
        for index, ran in zip(given, prefill(self.model, self.recorder, cache, parts), strict=True):
            out[index] = ResumedTurn(ran, self._begin(sequences[index], torch.cat(ran.hidden)))
        for index, (sequence, turn, _) in enumerate(ended):
            if not all(map(math.isfinite, turn.log_probs)):
                sequence.fail()
                out[index] = None
            elif out[index] is None:
                sequence.finish_reason = _transcript(sequence).finish_reason
        return out

    def _given_back(self, sequence: ActiveSequence, turn: Turn, reply: Reply) -> list[int]:
        """Tokens of the result's turn; empty where the transcript ends, and then why is noted."""
        transcript = _transcript(sequence)
        if reply.content is None:
            transcript.ended_by = "length" if transcript.turn_end == "length" else "answer"
            return []
        if len(transcript.turns) >= transcript.max_turns:
            transcript.ended_by = "max_turns"
            return []
        assert transcript.prompt.reply is not None
        last = sequence.new_ids[-1] if transcript.turn_end == "eos" else None
        ids, (start, end), left_out = reply_ids(
            transcript.prompt.reply,
            self.codec,
            reply.content,
            tool=reply.tool or "",
            call_id=reply.call_id,
            number=len(transcript.turns) - 1,
            ended_by=last,
            limit=RESULT_TOKENS,
        )
        if len(sequence.new_ids) + len(ids) >= transcript.room:
            transcript.ended_by = "length"
            return []
        turn.result, turn.left_out = (sequence.length + start, sequence.length + end), left_out
        return ids

    def _begin(self, sequence: ActiveSequence, hidden: Tensor) -> Tensor:
        """The next turn, behind given tokens; `hidden` [position, d_model] from the token before them on.

        Returns the state that emits its first token.
        """
        targets = [[token] for token in sequence.new_ids[1 - len(hidden) :]]
        scored = log_probs_of(hidden[:-1], targets, self.model.unembed)
        sequence.log_probs += [log_prob for (log_prob,) in scored]
        _transcript(sequence).begin_turn(len(sequence.new_ids))
        _transcript(sequence).see(hidden[-1])
        return hidden[-1]

    # -- decisions -----------------------------------------------------------------------------------------

    def _score(
        self, ended: Sequence[tuple[ActiveSequence, Turn]], rows: Sequence[int], cache: KVCache
    ) -> None:
        """Log-probabilities of all candidates, and of attached openers, in one packed forward."""
        trees = [Tree(turn.candidates) for _, turn in ended]
        openers = [turn.attached for _, turn in ended]
        pieces = [
            replace(
                beside(tree, opener, row, sequence.length - 1, turn.position + 1), edits=sequence.job.edits
            )
            for (sequence, turn), tree, opener, row in zip(ended, trees, openers, rows, strict=True)
        ]
        sizes = [len(piece.tokens) for piece in pieces]
        self.recorder.begin(torch.zeros(0, dtype=torch.long))
        run = [piece for piece in pieces if piece.tokens]
        hidden = self.model.forward(run, cache)[0][0].split(sizes) if run else [torch.empty(0)] * len(ended)
        slots, nodes = [], []
        for (sequence, turn), opener, states in zip(ended, openers, hidden, strict=True):
            transcript = _transcript(sequence)
            at = transcript.hidden[turn.position + 1 - sequence.n_prompt - transcript.start]
            logits = self.model.unembed(at)
            sequence.decide(turn.position, logits)
            nodes.append(states[len(opener) :])
            if opener:
                slot_states = torch.cat([at[None], states[: len(opener)]])
                scored = log_probs_of(slot_states[:-1], [[token] for token in opener], self.model.unembed)
                turn.opener_log_prob = sum(log_prob for (log_prob,) in scored[turn.n_lead :])
                logits = self.model.unembed(slot_states[-1])
            slots.append(logits)
        packed = torch.cat(nodes) if any(len(states) for states in nodes) else None
        by_candidate = candidates.read(trees, slots, packed, self.model.unembed)
        for (_, turn), log_probs in zip(ended, by_candidate, strict=True):
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
    return Piece(row, start, tokens, context + torch.tensor(depths, dtype=torch.long), seen, length=start + 1)


def _transcript(sequence: ActiveSequence) -> Transcript:
    assert isinstance(sequence.controller, Transcript)
    return sequence.controller
