"""Running prompts in flat passes of bounded length.

Tokens of several prompts lie one behind the other without padding, and a long prompt is cut over passes, so
that what a layer holds at a time depends on neither the batch nor the prompt's length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from probe.model.attention import KVCache, Piece, Recorder
from probe.model.edits import Edit
from probe.model.hooked import Model
from probe.prompts import Span

PASS_TOKENS = 1024
"""Long enough for products at full speed, short enough for intermediates that stay near the processor."""


@dataclass
class Part:
    """What of a prompt is run, and what is kept of it."""

    row: int
    """Which sequence of the cache."""
    token_ids: Sequence[int]
    start: int
    """First position to run; the cache holds those before it."""
    first_row: int
    """From this position on residual rows, queries and reads are kept."""
    first_hidden: int
    """From this position on final hidden states are kept."""
    labels: Sequence[str]
    spans: Sequence[Span]
    """Spans to sum the residual stream over; empty where that is not wanted."""
    edits: Sequence[Edit] = ()


@dataclass
class Ran:
    """What a part left, in the pieces in which it was run."""

    resid: dict[int, list[Tensor]] = field(default_factory=dict)
    """layer → [row, d_model]"""
    queries: dict[int, list[Tensor]] = field(default_factory=dict)
    """layer → [row, head, d_head]"""
    z: dict[int, list[Tensor]] = field(default_factory=dict)
    span_sums: dict[int, Tensor] = field(default_factory=dict)
    """layer → [label, d_model], float32"""
    hidden: list[Tensor] = field(default_factory=list)
    """[position, d_model], final-normed, from first_hidden on"""


def prefill(model: Model, recorder: Recorder, cache: KVCache, parts: Sequence[Part]) -> list[Ran]:
    """Run all parts; only inside `model.recording`."""
    ran = [Ran() for _ in parts]
    for cuts in _passes(parts):
        pieces, rows, spans, offset = [], [], [], 0
        for index, start, end in cuts:
            part = parts[index]
            pieces.append(Piece(part.row, start, part.token_ids[start:end], edits=part.edits))
            rows.append(torch.arange(max(part.first_row, start), max(part.first_row, end)) + (offset - start))
            if part.spans:
                spans.append((offset, membership(part.labels, part.spans, start, end)))
            offset += end - start
        recorder.begin(torch.cat(rows), spans)
        hidden = model.forward(pieces, cache, recorder)[0][0]
        for (index, start, end), own in zip(cuts, hidden.split([b - a for _, a, b in cuts]), strict=True):
            kept = own[max(parts[index].first_hidden - start, 0) :]
            if end > parts[index].first_hidden:
                ran[index].hidden.append(kept.clone())  # the rest of the pass need not live as long
        _distribute(recorder, [ran[index] for index, *_ in cuts], [len(part) for part in rows])
    return ran


def _distribute(recorder: Recorder, owners: list[Ran], n_rows: list[int]) -> None:
    for layer, sums in recorder.span_sums.items():
        for owner, own in zip(owners, sums, strict=True):
            owner.span_sums[layer] = owner.span_sums[layer] + own if layer in owner.span_sums else own
    for site in ("resid", "queries", "z"):
        for layer, states in getattr(recorder, site).items():
            rows = states[0] if site == "resid" else states[0].transpose(0, 1)
            for owner, own in zip(owners, rows.split(n_rows), strict=True):
                getattr(owner, site).setdefault(layer, []).append(own)


def _passes(parts: Sequence[Part]) -> Iterator[list[tuple[int, int, int]]]:
    """(part, start, end) of each pass; a part goes to the next pass whole if it fits there."""
    cuts: list[tuple[int, int, int]] = []
    room = PASS_TOKENS
    for index, part in enumerate(parts):
        start, end = part.start, len(part.token_ids)
        while start < end:
            length = min(room, end - start)
            if length < end - start <= PASS_TOKENS and cuts:
                length = 0
            if length:
                cuts.append((index, start, start + length))
                start, room = start + length, room - length
            if start < end:
                yield cuts
                cuts, room = [], PASS_TOKENS
    if cuts:
        yield cuts


def membership(labels: Sequence[str], spans: Sequence[Span], start: int, end: int) -> Tensor:
    """0/1 membership [label, position] of the positions start … end − 1 in the spans of each label."""
    member = torch.zeros(len(labels), end - start)
    for span in spans:
        member[labels.index(span.label), max(span.start - start, 0) : max(span.end - start, 0)] = 1
    return member
