"""The turns of an agent's transcript: decisions scored in the slot that a call reached, results given back.

A transcript is one sequence whose cache is never run again: what a turn emitted stays as it was emitted, and a
result is run as one piece on top of it. Where the slot lies is the transcript's part; this module scores it beside
the sequence, and appends what comes back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probe.capture import candidates
from probe.capture.candidates import Tree, log_probs_of
from probe.capture.prefill import Part, PartResult, prefill
from probe.capture.sequence import ActiveSequence
from probe.capture.transcript import SIDE_TOKENS, Reply, Transcript, Turn
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
            (sequence, _transcript(sequence).end_turns(sequence.new_ids, sequence.log_probs))
            for sequence in sequences
        ]
        self._score(
            [
                (row, sequence, decision, decision is turn)
                for row, (sequence, turns) in zip(rows, ended, strict=True)
                for turn, _ in turns
                for decision in (turn, *turn.further)
            ],
            cache,
        )
        parts: list[Part] = []
        given: list[int] = []
        for index, (sequence, turns) in enumerate(ended):
            transcript = _transcript(sequence)
            turn, reply = turns[-1]
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
        for index, (sequence, turns) in enumerate(ended):
            if not all(math.isfinite(value) for turn, _ in turns for value in turn.log_probs):
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

    def _score(self, ended: Sequence[tuple[int, ActiveSequence, Turn, bool]], cache: KVCache) -> None:
        """Log-probabilities of all candidates, and of attached openers; `ended` has the row of the cache with each turn, and
        whether its logits are kept.

        One packed forward for all sequences; of a sequence with many turns as many at a time as have `SIDE_TOKENS`, or as its
        cache has room for.
        """
        waiting = [
            _Slot(row, sequence, turn, Tree(turn.candidates), kept) for row, sequence, turn, kept in ended
        ]
        while waiting:
            sizes: dict[int, int] = {}
            now, later = list[_Slot](), list[_Slot]()
            for slot in waiting:
                size = sizes.get(slot.row, 0) + slot.n_tokens
                fits = slot.row not in sizes or size <= min(
                    SIDE_TOKENS, _transcript(slot.sequence).side_slots
                )
                sizes[slot.row] = size if fits else SIDE_TOKENS + 1
                (now if fits else later).append(slot)
            self._score_together(now, cache)
            waiting = later

    def _score_together(self, slots: Sequence[_Slot], cache: KVCache) -> None:
        by_row: dict[int, list[_Slot]] = {}
        for slot in slots:
            by_row.setdefault(slot.row, []).append(slot)
        run = [slot for of_row in by_row.values() for slot in of_row]
        # The token that was emitted last has not been run.
        pieces = [
            beside(of_row, of_row[0].sequence.length - 1)
            for of_row in by_row.values()
            if any(slot.n_tokens for slot in of_row)
        ]
        self.recorder.begin(torch.zeros(0, dtype=torch.long))
        sizes = [slot.n_tokens for slot in run]
        hidden = (
            self.model.forward(pieces, cache)[0][0].split(sizes) if pieces else [torch.empty(0)] * len(run)
        )
        at_slots, nodes = [], []
        for (_, sequence, turn, _, kept), states in zip(run, hidden, strict=True):
            opener = turn.attached
            at = _transcript(sequence).state_at(turn.position)
            logits = self.model.unembed(at)
            if kept:
                sequence.decide(turn.position, logits)
            nodes.append(states[len(opener) :])
            if opener:
                slot_states = torch.cat([at[None], states[: len(opener)]])
                scored = log_probs_of(slot_states[:-1], [[token] for token in opener], self.model.unembed)
                turn.opener_log_prob = sum(log_prob for (log_prob,) in scored[turn.n_lead :])
                logits = self.model.unembed(slot_states[-1])
            at_slots.append(logits)
        packed = torch.cat(nodes) if any(len(states) for states in nodes) else None
        trees = [slot.tree for slot in run]
        for slot, log_probs in zip(
            run, candidates.read(trees, at_slots, packed, self.model.unembed), strict=True
        ):
            slot.turn.candidate_token_log_probs = log_probs


class _Slot(NamedTuple):
    """A decision that is to be scored beside its sequence."""

    row: int
    """The sequence's row of the cache."""
    sequence: ActiveSequence
    turn: Turn
    tree: Tree
    kept: bool
    """Whether the logits at its position are kept: of a turn's first call."""

    @property
    def n_tokens(self) -> int:
        return len(self.turn.attached) + self.tree.n_nodes


def beside(slots: Sequence[_Slot], start: int) -> Piece:
    """Of each decision of a sequence the opener and the tree of what may follow it, on the side of what the cache holds, from its
    slot `start` on: they see its first positions up to the decision's, their ancestors and themselves, and count positions
    from there.
    """
    sequence = slots[0].sequence
    total = sum(slot.n_tokens for slot in slots)
    tokens: list[int] = []
    positions: list[int] = []
    seen = torch.zeros(total, start + total, dtype=torch.bool)
    for slot in slots:
        offset, opener, tree, context = len(tokens), slot.turn.attached, slot.tree, slot.turn.position + 1
        tokens += [*opener, *tree.tokens]
        parents = [*range(-1, len(opener) - 1), *(max(parent, -1) + len(opener) for parent in tree.parents)]
        positions += [context + depth for depth in range(len(opener))]
        positions += [context + len(opener) + depth for depth in tree.depths]
        seen[offset : len(tokens), :context] = True
        for node, parent in enumerate(parents, offset):
            if parent >= 0:
                seen[node, start:] = seen[offset + parent, start:]
            seen[node, start + node] = True
    at = torch.tensor(positions, dtype=torch.long)
    return Piece(slots[0].row, start, tokens, at, seen, sequence.job.edits, start + 1, total)


def beside_prompt(row: int, sequence: ActiveSequence, tree: Tree) -> Piece:
    """The candidates of a prompt behind which tokens were forced, when these have been run and none was emitted."""
    prompt = sequence.job.prompt
    turn = Turn(prompt.n_prompt, prompt.n_prompt, "", {}, called=False, position=prompt.n_prompt - 1)
    return beside([_Slot(row, sequence, turn, tree, False)], sequence.n_prefilled)


def _transcript(sequence: ActiveSequence) -> Transcript:
    assert isinstance(sequence.controller, Transcript)
    return sequence.controller
