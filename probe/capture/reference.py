"""Tokens that are given, run again with something changed: final hidden states of the rows behind the change.

One sequence is the reference; a variant of it shares its first tokens (their keys and values are copied, never
computed again) and may differ in the tokens that follow and in what they see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.capture.prefill import PASS_TOKENS, Part, prefill
from probe.capture.sites import sequence_bytes
from probe.model.attention import KVCache, Recorder
from probe.model.edits import Edit
from probe.model.hooked import Model

_ROWS = 128
"""Vocabulary-wide rows held at a time, of each of two distributions: fewer leave the unembedding at half speed."""
_CACHE_BYTES = 1 << 29
_REFERENCE_BYTES = 1 << 29


@dataclass(frozen=True)
class Continuation:
    """A sequence whose first `shared` tokens are the reference's."""

    token_ids: Sequence[int]
    shared: int
    first: int
    """The position from which final hidden states are handed back; not below `shared`."""
    edits: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        # Rows that an edit changes must be run.
        limit = min([self.first, len(self.token_ids) - 1, *(edit.rows_from for edit in self.edits)])
        if not 0 <= self.shared <= limit:
            raise ValueError(
                f"{self.shared} tokens cannot be shared: at most {limit} are unread and unchanged"
            )


class Reference:
    """A reference sequence in a model's cache, and what its variants make of it."""

    def __init__(self, model: Model, token_ids: Sequence[int], first: int):
        """Run the reference; `hidden` [row, d_model] are its final-normed states from position `first` on."""
        self.model, self.token_ids, self.first = model, list(token_ids), first
        self.tokens_run = len(self.token_ids)
        """Tokens computed so far, the reference's included."""
        each = sequence_bytes(model.facts, model.dtype.itemsize, len(self.token_ids))
        self._most = max(1, _CACHE_BYTES // each - 1)
        self._most = min(self._most, PASS_TOKENS // 8)
        self._recorder = Recorder(layers=frozenset())
        self._cache = KVCache(2, len(self.token_ids))
        with model.recording(self._recorder):
            part = Part(0, self.token_ids, 0, len(self.token_ids), first, (), ())
            self.hidden = torch.cat(prefill(model, self._recorder, self._cache, [part])[0].hidden)
        self._log_probs: dict[int, Tensor] = {}

    def run(self, variants: Sequence[Continuation]) -> Iterator[Tensor]:
        """Final-normed states [row, d_model] of each variant from its position `first` on, in order."""
        for group in self._groups(variants):
            yield from self._run(group)

    def log_probs(self, start: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """Log-probabilities of the reference at positions start … end − 1: (position, [row, d_vocab]) in blocks.

        float32, nats. Blocks are kept from call to call while they fit.
        """
        for block in range(start // _ROWS, -(-end // _ROWS)):
            low, high = max(block * _ROWS, self.first), min((block + 1) * _ROWS, len(self.token_ids))
            held = self._log_probs.get(block)
            if held is None:
                hidden = self.hidden[low - self.first : high - self.first]
                held = self.model.unembed(hidden).log_softmax(-1)
                if (len(self._log_probs) + 1) * _ROWS * held[0].nbytes <= _REFERENCE_BYTES:
                    self._log_probs[block] = held
            yield max(low, start), held[max(start - low, 0) : end - low]

    def emitted(self, start: int, tokens: Sequence[int]) -> Tensor:
        """log P in nats of `tokens` [row], each emitted by the reference from position `start` on; float64."""
        log_probs = [torch.zeros(0, dtype=torch.float64)]
        with torch.inference_mode():
            for position, log_p in self.log_probs(start, start + len(tokens)):
                targets = tokens[position - start : position - start + len(log_p)]
                log_probs.append(_of(log_p, targets))
        return torch.cat(log_probs)

    def compare(self, hidden: Tensor, start: int, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(KL(reference‖variant) over the whole vocabulary, the variant's log P of `tokens`), nats [row], float64.

        Row 0 of `hidden` [row, d_model] is set against the reference's position `start`. Each row is unembedded
        once.
        """
        blocks = [torch.zeros(2, 0, dtype=torch.float64)]
        with torch.inference_mode():
            for first in range(0, len(hidden), _ROWS):
                log_q = self.model.unembed(hidden[first : first + _ROWS])
                log_q -= log_q.logsumexp(-1, keepdim=True)
                emitted = _of(log_q, tokens[first : first + len(log_q)])
                kl = [
                    (log_p.exp() * (log_p - log_q[position - start - first :][: len(log_p)])).sum(
                        -1, dtype=torch.float64
                    )
                    for position, log_p in self.log_probs(start + first, start + first + len(log_q))
                ]
                blocks.append(torch.stack([torch.cat(kl).clamp_min(0).cpu(), emitted]))
        kl, emitted = torch.cat(blocks, 1)
        return kl, emitted

    def _groups(self, variants: Sequence[Continuation]) -> Iterator[list[Continuation]]:
        """Neighbors that fill one pass together."""
        group: list[Continuation] = []
        tokens = 0
        for variant in variants:
            n_tokens = len(variant.token_ids) - variant.shared
            if group and (len(group) == self._most or tokens + n_tokens > PASS_TOKENS):
                yield group
                group, tokens = [], 0
            group.append(variant)
            tokens += n_tokens
        if group:
            yield group

    def _run(self, group: Sequence[Continuation]) -> list[Tensor]:
        capacity = max(len(ids) for ids in (self.token_ids, *(variant.token_ids for variant in group)))
        edits = [edit for variant in group for edit in variant.edits]
        with self.model.recording(self._recorder, edits):
            if self._cache.batch < len(group) + 1 or self._cache.capacity < capacity:
                self._grow(len(group) + 1, capacity)
            parts = []
            for row, variant in enumerate(group, 1):
                ids, shared = list(variant.token_ids), variant.shared
                if self.model.switched(len(ids)) != self.model.switched(len(self.token_ids)):
                    shared = 0
                self._cache.copy(0, row, shared)
                parts.append(Part(row, ids, shared, len(ids), variant.first, (), (), variant.edits))
                self.tokens_run += len(ids) - shared
            return [torch.cat(ran.hidden) for ran in prefill(self.model, self._recorder, self._cache, parts)]

    def _grow(self, batch: int, capacity: int) -> None:
        """A larger cache with the reference in it."""
        old, n_keys = self._cache, len(self.token_ids)
        self._cache = KVCache(batch, capacity)
        self._cache.put(0, old.take(0, n_keys))


def _of(log_probs: Tensor, tokens: Sequence[int]) -> Tensor:
    """log P of one token a row, [row], float64."""
    targets = torch.tensor(tokens, device=log_probs.device)[:, None]
    return log_probs.gather(1, targets)[:, 0].double().cpu()


def token_log_probs(model: Model, hidden: Tensor, tokens: Sequence[int]) -> tuple[list[float], bool]:
    """(log P of each token in nats, whether each is the likeliest) at rows `hidden` [row, d_model].

    The second says whether greedy decoding would say exactly these tokens.
    """
    log_probs: list[float] = []
    greedy = True
    with torch.inference_mode():
        for start in range(0, len(tokens), _ROWS):
            targets = torch.tensor(tokens[start : start + _ROWS], device=hidden.device)[:, None]
            logits = model.unembed(hidden[start : start + len(targets)])
            targets = targets.to(logits.device)
            log_probs += logits.log_softmax(-1).gather(1, targets)[:, 0].tolist()
            greedy &= bool((logits.argmax(-1) == targets[:, 0]).all())
    return log_probs, greedy
