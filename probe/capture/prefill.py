"""Running prompts in flat passes of bounded length.

Tokens of several prompts lie one behind the other without padding, and a long prompt is cut over passes, so
that what a layer holds at a time depends on neither the batch nor the prompt's length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from probe.capture.candidates import Tree, piece
from probe.model.attention import RECORDED, KVCache, Piece, Recorder
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
    """First position from which on residual row, query and z are kept."""
    first_hidden: int
    """First position whose final hidden state is kept."""
    labels: Sequence[str]
    spans: Sequence[Span]
    """Spans to sum the residual stream over; empty where that is not wanted."""
    edits: Sequence[Edit] = ()
    after: int | None = None
    """The earlier part whose positions before `start` these tokens continue; None: the cache's row holds them."""
    tree: Tree | None = None
    """Candidates behind the last token, run in the pass in which the part ends."""
    unrun: int = 0
    """Tokens that follow and are run by somebody else."""
    rows_before: Sequence[int] = ()
    """Positions before `first_row` that are kept as well, ascending."""

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return len(self.token_ids) + self.unrun


@dataclass
class PartResult:
    """What a part left, in the pieces in which it was run."""

    states: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)
    """recorded state → layer → [row, …]"""
    span_sums: dict[int, Tensor] = field(default_factory=dict)
    """layer → [label, d_model], float32"""
    hidden: list[Tensor] = field(default_factory=list)
    """[position, d_model], final-normed, from first_hidden on"""
    nodes: Tensor | None = None
    """[node, d_model], final-normed, of the candidates; None where there are none to run"""


def prefill(model: Model, recorder: Recorder, cache: KVCache, parts: Sequence[Part]) -> list[PartResult]:
    """Run all parts; only inside `model.recording`. A part comes behind the one that it continues."""
    ran = [PartResult() for _ in parts]
    ended: set[int] = set()
    for cuts in _passes(parts):
        pieces, owners, rows, spans, copies, lengths, offset = [], [], [], [], [], [], 0
        for index, start, end in cuts:
            part = parts[index]
            if part.after is not None and start == part.start:
                link = (parts[part.after].row, part.row, start)
                if part.after in ended:
                    cache.copy(*link)
                else:
                    copies.append(link)
            part_pieces, n_nodes = _pieces(part, start, end)
            pieces += part_pieces
            owners.append((index, max(part.first_hidden - start, 0)))
            early = [position for position in part.rows_before if start <= position < end]
            late = range(max(part.first_row, start), max(part.first_row, end))
            rows.append(torch.tensor([*early, *late], dtype=torch.long) + (offset - start))
            if part.spans:
                spans.append((offset, membership(part.labels, part.spans, start, end)))
            lengths += [end - start, n_nodes]
            offset += end - start + n_nodes
        recorder.begin(torch.cat(rows), spans)
        hidden = iter(model.forward(pieces, cache, recorder, copies=copies)[0][0].split(lengths))
        for index, first in owners:
            part_pieces, nodes = next(hidden), next(hidden)
            if first < len(part_pieces):
                ran[index].hidden.append(
                    part_pieces[first:].clone()
                )  # the rest of the pass need not live as long
            if len(nodes):
                ran[index].nodes = nodes.clone()
        ended |= {index for index, _, end in cuts if end == len(parts[index].token_ids)}
        summed = [index for index, *_ in cuts if parts[index].spans]
        _distribute(recorder, [ran[index] for index, *_ in cuts], [len(part) for part in rows])
        _add_sums(recorder, [ran[index] for index in summed])
    return ran


def _pieces(part: Part, start: int, end: int) -> tuple[list[Piece], int]:
    """A part's positions start … end − 1, its candidates behind them where it ends there, and how many nodes
    these have. Both are one piece, one attention call, unless that would cost a prompt its unmasked call."""
    tokens, tree = part.token_ids[start:end], part.tree
    if tree is None or not tree.n_nodes or end < len(part.token_ids):
        return [Piece(part.row, start, tokens, edits=part.edits, length=part.length)], 0
    if start > 0:
        return [piece(tree, part.row, tokens, start, part.edits)], tree.n_nodes
    prompt_piece = Piece(part.row, start, tokens, edits=part.edits, length=part.length)
    return [prompt_piece, piece(tree, part.row, (), end, part.edits)], tree.n_nodes


def _distribute(recorder: Recorder, owners: list[PartResult], n_rows: list[int]) -> None:
    for name, by_layer in recorder.states.items():
        for layer, recorded in by_layer.items():
            rows = recorded[0].movedim(RECORDED[name] - 1, 0)
            for owner, states in zip(owners, rows.split(n_rows), strict=True):
                owner.states.setdefault(name, {}).setdefault(layer, []).append(states)


def _add_sums(recorder: Recorder, owners: list[PartResult]) -> None:
    for layer, sums in recorder.span_sums.items():
        for owner, part_sums in zip(owners, sums, strict=True):
            owner.span_sums[layer] = (
                owner.span_sums[layer] + part_sums if layer in owner.span_sums else part_sums
            )


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
                if start == end and part.tree is not None:
                    room = max(room - part.tree.n_nodes, 0)
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
