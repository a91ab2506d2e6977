"""Runs of tokens of sequences: which slots they take, where they are, and what each token sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from probe.maths.reads import LayerAttention
from probe.model.edits import Edit, Knockout, StateKnockout


class PathStretch(NamedTuple):
    """Tokens begin … end − 1 of a run, of which each sees what the one before it sees and that one."""

    begin: int
    end: int
    parent: int
    """Slot of the last token that the first sees before itself, −1 for none."""
    parent_again: bool
    """Whether a later stretch goes on from the parent too."""
    continued: bool
    """Whether a later stretch goes on from the last token."""


@dataclass
class Piece:
    """A run of tokens of one sequence, appended to what its cache holds."""

    row: int
    """Which sequence of the cache."""
    start: int
    """Slot of the first token."""
    tokens: Sequence[int]
    positions: Tensor | None = None
    """Rotary positions [query] where they are not the slots (packed candidates)."""
    seen: Tensor | None = None
    """bool [query, key]; None: every earlier slot of the sequence."""
    edits: Sequence[Edit] = ()
    length: int = 0
    """Tokens of the whole sequence, of which this run may be a part: rotary frequencies may follow it. 0: n_keys."""
    beside: int = 0
    """How many of its last tokens are tried beside the sequence, and are overwritten by what follows in it."""
    by_slot: bool = False
    """Whether its edits name slots, which tell packed candidates apart, and not positions."""
    _additive: dict[tuple, Tensor] = field(default_factory=dict)

    @property
    def n_keys(self) -> int:
        return self.start + len(self.tokens)

    @property
    def slots(self) -> Tensor:
        """[query]"""
        return torch.arange(self.start, self.n_keys)

    @property
    def places(self) -> Tensor:
        """[query]: where its edits find each token."""
        return self.slots if self.positions is None or self.by_slot else self.positions.cpu()

    @cached_property
    def stretches(self) -> list[PathStretch]:
        """Its tokens path by path, as a recurrent layer runs them: cut behind tokens where another path begins or goes on from
        there, where the lasting ones end, and where the state is changed that it goes on from."""
        cuts, parents = self._cuts, self._parents
        begins = [0, *cuts[:-1]]
        after = [parents[begin] for begin in begins]
        return [
            PathStretch(begin, end, parent, parent in after[number:], self.start + end - 1 in after[number:])
            for number, (begin, end, parent) in enumerate(zip(begins, cuts, after, strict=True), 1)
        ]

    @cached_property
    def _parents(self) -> list[int]:
        """Of each token the slot of the last one that it sees before itself, −1 for none."""
        if self.seen is None:
            return list(range(self.start - 1, self.n_keys - 1))
        slots = torch.arange(1, self.n_keys + 1)
        before = torch.where(self.seen, slots, 0)
        before[torch.arange(len(self.tokens)), self.slots] = 0
        return (before.max(1).values - 1).tolist()

    @property
    def _cuts(self) -> list[int]:
        """Behind how many of its tokens a stretch ends."""
        n_tokens, start, parents = len(self.tokens), self.start, self._parents
        branch_starts = [i for i in range(n_tokens) if i == 0 or parents[i] != start + i - 1]
        forks = {parents[i] - start + 1 for i in branch_starts if parents[i] >= start}
        changes = {edit.rows_from - start for edit in self.edits if isinstance(edit, StateKnockout)}
        changes = {at for at in changes if 0 < at < n_tokens}
        return sorted({*branch_starts, *forks, *changes, n_tokens - self.beside, n_tokens} - {0})

    def mask(
        self, layer: int, facts: LayerAttention, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor | None, bool]:
        """(mask [query, key] or None, is_causal) in a layer; 0 where visible, else −inf.

        Additive and kept, because torch would turn a bool mask into this again in every layer.
        """
        limits = None if facts.sees_all(self.n_keys) else (facts.window, facts.chunk)
        n_queries = len(self.tokens)
        hidden = knockouts(self.edits, layer, self.n_keys)
        if limits is None and self.seen is None and not hidden and (self.start == 0 or n_queries == 1):
            return None, n_queries > 1
        key = (limits, hidden, dtype, device)
        if key not in self._additive:
            slots = torch.arange(self.n_keys)
            seen = slots <= slots[self.start :, None] if self.seen is None else self.seen
            if limits is not None:
                positions = slots[self.start :] if self.positions is None else self.positions
                slots = torch.cat([slots[: self.start], positions])
                seen = seen & (slots >= facts.first_seen(positions)[:, None])
            if hidden:
                seen = seen.clone()
                for edit in hidden:
                    seen[max(edit.rows_from - self.start, 0) :, edit.start : edit.end] = False
            self._additive[key] = additive(seen, dtype).to(device)
        return self._additive[key], False


def knockouts(edits: Sequence[Edit], layer: int, n_keys: int) -> tuple[Knockout, ...]:
    """The knock-outs that act in a layer on queries below position n_keys."""
    return tuple(e for e in edits if isinstance(e, Knockout) and e.acts(layer) and e.rows_from < n_keys)


def left_out(edits: Sequence[Edit], layer: int, length: int, slot: int) -> list[tuple[int, int]]:
    """(start, end) of the positions whose updates the state behind the first `length` tokens, from which a recurrent layer
    goes on at `slot`, must be without; empty where that state is so already."""
    acting = [e for e in edits if isinstance(e, StateKnockout) and e.acts(layer) and e.rows_from <= slot]
    changed = any(e.rows_from >= length for e in acting)
    return [(e.start, e.end) for e in acting] if changed else []


def lengths(pieces: Sequence[Piece]) -> list[int]:
    return [len(piece.tokens) for piece in pieces]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
