"""The attention call through which everything is captured.

transformers looks its attention up by name at every call (`AttentionInterface`), after rotary embedding, query
and key norms and the cache update. `attend` is registered under one name and, while a `Forward` is active,
computes what the model's own attention computes (torch's scaled_dot_product_attention; the same formula in
row blocks where a layer has a softcap or learned sinks) and hands queries and reads to the recorder.

Slot j of a sequence's cache holds its position j, so that neither rotary positions nor windows can shift. Runs
of tokens of several sequences go through the model as one flat sequence without padding, and attention is
computed run by run; a decode step has one token a sequence and masks the slots beyond each one's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from probe.maths.reads import Alibi, LayerAttention
from probe.model.cache import KVCache
from probe.model.edits import Edit, HeadAblation, StateEdit
from probe.model.pieces import Piece, additive, knockouts, lengths

NAME = "probe"
_ROW_BLOCK = 256


def edit_z(read: Tensor, edits: Sequence[Edit], layer: int, first: int, positions: Tensor) -> None:
    """Change the reads [head, query, d_head] of edited heads in place; query 0 is in slot `first`, and the queries
    are at `positions` [query]."""
    for edit in edits:
        if isinstance(edit, StateEdit) and edit.site == "z" and edit.layer == layer:
            read[edit.head] = edit.change(read[edit.head], positions)
        elif isinstance(edit, HeadAblation) and layer in edit.heads:
            rows = slice(max(edit.rows_from - first, 0), None)
            heads = list(edit.heads[layer])
            given = None if edit.reads is None else edit.reads[layer].to(read)
            read[heads, rows] = 0.0 if given is None else given[:, None]


def edited(site: str, layer: int, states: Tensor) -> Tensor:
    """States [sequence, query, d_model] of the pass that runs, after its edits at this site."""
    current = _active[-1]
    if current.pieces is None:
        if not current.edits:
            return states
        runs = list(zip(states.split(1), current.positions, current.edits, strict=True))
    else:
        parts = states[0].split(lengths(current.pieces))
        runs = [
            (part[None], piece.places, piece.edits) for part, piece in zip(parts, current.pieces, strict=True)
        ]
    changed = [
        _changed(part[0], positions.cpu(), [e for e in edits if _is_at(e, site, layer)])
        for part, positions, edits in runs
    ]
    return torch.stack(changed) if current.pieces is None else torch.cat(changed)[None]


def _is_at(edit: Edit, site: str, layer: int) -> bool:
    return isinstance(edit, StateEdit) and (edit.site, edit.layer) == (site, layer)


def _changed(states: Tensor, positions: Tensor, edits: Sequence[Edit]) -> Tensor:
    for edit in edits:
        assert isinstance(edit, StateEdit)
        states = edit.change(states, positions)
    return states


RECORDED = {"embedding": 1, "resid": 1, "attn_out": 1, "mlp_out": 1, "queries": 2, "z": 2, "gate": 2}
"""What a recorder can keep → the axis of its query rows: the residual stream before the first block (as of layer 0) and
behind a block, and what a block's attention or MLP adds to it [batch, query, d_model]; queries, head outputs and
their gates [batch, head, query, d_head]."""


class Recorder:
    """Collects, layer by layer, the tensors one forward computes anyway.

    `rows` [row] names the queries of a flat forward to keep (None: all). `spans` are (first query, 0/1
    membership [label, query]) of each run; the product with the residual stream gives span sums, run by run,
    without keeping positions.
    """

    def __init__(self, *, layers: frozenset[int], **wanted: bool):
        """`wanted`: names of `RECORDED`; others are for somebody else to keep."""
        self.wanted = frozenset(name for name in RECORDED if wanted.get(name))
        self.layers = layers
        self.rows: Tensor | None = None
        self.spans: Sequence[tuple[int, Tensor]] = ()
        self.states: dict[str, dict[int, Tensor]] = {name: {} for name in self.wanted}
        """name → layer → what was kept of one forward"""
        self.span_sums: dict[int, list[Tensor]] = {}
        self._read: Tensor | None = None
        """What heads read in the attention that runs, until its gate is kept."""

    def begin(self, rows: Tensor | None = None, spans: Sequence[tuple[int, Tensor]] = ()) -> None:
        self.rows, self.spans = rows, spans
        self.states = {name: {} for name in self.wanted}
        self.span_sums = {}

    def _keep(self, name: str, layer: int, states: Tensor) -> None:
        """The wanted rows of states along the query axis. Whole tensors are kept by reference."""
        if name in self.wanted:
            rows = self.rows
            states = states if rows is None else states.index_select(RECORDED[name], rows.to(states.device))
            self.states[name][layer] = states

    def on_attention(self, layer: int, query: Tensor, read: Tensor) -> None:
        if layer not in self.layers:
            return
        self._keep("queries", layer, query)
        self._keep("z", layer, read)
        if "gate" in self.wanted:
            self._read = read

    def on_gated(self, layer: int, given: Tensor) -> None:
        """What W_O of a gated layer is given of the reads that were recorded last; nothing of a pass whose reads were not."""
        read, self._read = self._read, None
        if read is not None:
            self._keep("gate", layer, gate_of(given, read))

    def on_embedding(self, hidden: Tensor) -> None:
        self._keep("embedding", 0, hidden)

    def on_written(self, site: str, layer: int, states: Tensor) -> None:
        if layer in self.layers:
            self._keep(site, layer, states)

    def on_resid(self, layer: int, hidden: Tensor) -> None:
        if layer not in self.layers:
            return
        self._keep("resid", layer, hidden)
        if self.spans:
            self.span_sums[layer] = [
                member.to(hidden.device) @ hidden[0, first : first + member.shape[1]].float()
                for first, member in self.spans
            ]


def gate_of(given: Tensor, read: Tensor) -> Tensor:
    """The gate [sequence, head, query, d_head] that makes of a read what W_O is given, [sequence, query, head · d_head]."""
    batch, n_heads, n_queries, d_head = read.shape
    by_head = given.reshape(batch, n_queries, n_heads, d_head).transpose(1, 2)
    return torch.where(read == 0, 0, by_head / torch.where(read == 0, 1, read))


@dataclass
class Forward:
    """One pass through the model: whose tokens they are, which keys each may see, and who records."""

    positions: Tensor
    """[1, query] of a flat pass, [sequence, 1] of a step."""
    cache: KVCache
    pieces: Sequence[Piece] | None = None
    """The runs of a flat pass; None for a step."""
    n_keys: int = 0
    """Keys of a step, up to the longest sequence."""
    uneven: bool = False
    """Whether the sequences of a step differ in length."""
    edits: Sequence[Sequence[Edit]] = ()
    """Of each sequence of a step; empty: none has any."""
    recorder: Recorder | None = None
    calls: dict[int, dict] | None = None
    """Filled by layer when not None: what each attention call was given."""
    read_factor: Tensor | None = None
    """What the reads of a flat pass are multiplied with, laid out as W_O is given them (`probe.model.gates`)."""
    _additive: dict[tuple, Tensor] = field(default_factory=dict)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each token's sequence, [1, query] of a flat pass, [sequence, 1] of a step."""
        if self.pieces is None:
            return self.positions + 1
        runs = [torch.full((1, len(piece.tokens)), piece.length or piece.n_keys) for piece in self.pieces]
        return torch.cat(runs, 1)

    def step_mask(
        self, layer: int, facts: LayerAttention, dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        """[sequence, 1, 1, key] or [1, 1, 1, key], 0 where visible, else −inf; None if all is."""
        limits = None if facts.sees_all(self.n_keys) else (facts.window, facts.chunk)
        hidden = tuple(knockouts(edits, layer, self.n_keys) for edits in self.edits)
        apart = self.uneven or any(hidden)
        if limits is None and not apart:
            return None
        key = (limits, hidden, dtype, device)
        if key not in self._additive:
            positions = self.positions if apart else self.positions[:1]
            slots = torch.arange(self.n_keys, device=positions.device)
            seen = slots <= positions
            if limits is not None:
                seen &= slots >= facts.first_seen(positions)
            for row, edits in enumerate(hidden):
                for edit in edits:
                    seen[row, edit.start : edit.end] = False
            self._additive[key] = additive(seen, dtype).to(device)[:, None, None]
        return self._additive[key]


_active: list[Forward] = []


class UnnumberedLayer(LookupError):
    """An attention does not say of which layer it is: its keys and values cannot be kept."""


def attend(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    alibi: Alibi | None = None,
    layer: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention call. query [sequence, head, query, d_head]; key, value [sequence, kv_head, …].

    `alibi` and `layer` are given by `probe.model.unregistered` alone. Returns the read, axes [sequence, query, head,
    d_head], as transformers expects it.
    """
    current = _active[-1]
    registered = layer is None
    layer = getattr(module, "layer_idx", None) if layer is None else layer
    if layer is None:
        raise UnnumberedLayer(f"the attention module {type(module).__name__} has no layer number")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    facts = LayerAttention(scale, softcap, sliding_window, alibi, _chunk(module, layer))
    if current.calls is not None:
        current.calls[layer] = {
            "facts": facts,
            "sink": s_aux,
            "module": module,
            "registered": registered,
            "times": current.calls.get(layer, {"times": 0})["times"] + 1,
            "shape": (query.shape[1], key.shape[1], key.shape[3], value.shape[3]),
        }
    query, key = query.to(value.dtype), key.to(value.dtype)
    keys, values = current.cache.store(layer, key, value)

    def attend_to(query, key, value, mask, causal, positions: Tensor, start: int) -> Tensor:
        """Keys before `start` are at their slots, those of the queries, and the queries, at `positions`."""
        if softcap is None and s_aux is None and alibi is None:
            return _sdpa(query, key, value, mask, causal, scale)
        bias = None
        if alibi is not None:
            bias = alibi.bias(positions, torch.cat([torch.arange(start), positions])).to(query.device)
        return _plain(query, key, value, mask, causal, scale, softcap, s_aux, bias)

    if current.pieces is None:
        mask = current.step_mask(layer, facts, query.dtype, query.device)
        last = current.n_keys - 1
        read = attend_to(query, keys, values, mask, False, torch.tensor([last]), last)
        for row, edits in enumerate(current.edits):
            at = current.positions[row].cpu()
            edit_z(read[row], edits, layer, int(at), at)
    else:
        reads = []
        for piece, query_of_piece in zip(
            current.pieces, query.split(lengths(current.pieces), 2), strict=True
        ):
            row, n_keys = slice(piece.row, piece.row + 1), piece.n_keys
            mask, causal = piece.mask(layer, facts, query.dtype, query.device)
            at = piece.slots if piece.positions is None else piece.positions.cpu()
            memory = keys[row, :, :n_keys], values[row, :, :n_keys]
            reads.append(attend_to(query_of_piece, *memory, mask, causal, at, piece.start))
            if piece.edits:
                edit_z(reads[-1][0], piece.edits, layer, piece.start, piece.places)
        read = reads[0] if len(reads) == 1 else torch.cat(reads, 2)
    if current.recorder is not None:
        current.recorder.on_attention(layer, query, read)
    read = read.transpose(1, 2).contiguous()
    return read if current.read_factor is None else read * current.read_factor.view_as(read), None


def _chunk(module: Any, layer: int) -> int | None:
    """Positions of a chunk beyond which a layer sees nothing: such a layer says it in its mask alone, which is not made here."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    chunked = kinds is not None and kinds[layer] == "chunked_attention"
    return int(config.attention_chunk_size) if chunked and config is not None else None


def _sdpa(query, key, value, mask, causal: bool, scale: float) -> Tensor:
    batch, n_heads, n_queries, d_head = query.shape
    n_kv = key.shape[1]
    call = torch.nn.functional.scaled_dot_product_attention
    if n_queries == 1 and n_kv != n_heads:
        # The query heads of one kv_head become rows of it: no key is repeated.
        packed = query.reshape(batch, n_kv, n_heads // n_kv, d_head)
        return call(packed, key, value, attn_mask=mask, scale=scale).reshape(
            batch, n_heads, 1, value.shape[-1]
        )
    grouped = n_kv != n_heads
    return call(query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def _plain(query, key, value, mask, causal: bool, scale: float, softcap, sink, bias) -> Tensor:
    """The same by the book, in blocks of query rows, for what torch's kernel lacks: softcap, sinks, and a bias
    [head, query, key]."""
    batch, n_heads, n_queries, _ = query.shape
    group = n_heads // key.shape[1]
    keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    past = torch.arange(keys.shape[2], device=query.device)
    blocks = []
    for start in range(0, n_queries, _ROW_BLOCK):
        rows = slice(start, min(start + _ROW_BLOCK, n_queries))
        attn_scores = (query[:, :, rows] @ keys.transpose(2, 3)) * scale
        if softcap is not None:
            attn_scores = softcap * torch.tanh(attn_scores / softcap)
        if bias is not None:
            attn_scores = attn_scores.float() + bias[:, rows]
        if mask is not None:
            attn_scores = attn_scores + mask[..., rows, :]
        elif causal:
            seen = past[None, :] <= torch.arange(start, rows.stop, device=query.device)[:, None]
            attn_scores = attn_scores.masked_fill(~seen, float("-inf"))
        if sink is not None:
            column = sink.to(attn_scores.dtype).view(1, -1, 1, 1).expand(batch, -1, attn_scores.shape[2], 1)
            pattern = torch.cat([attn_scores, column], -1).softmax(-1, dtype=torch.float32)[..., :-1]
        else:
            pattern = attn_scores.softmax(-1, dtype=torch.float32)
        blocks.append(pattern.to(values.dtype) @ values)
    return torch.cat(blocks, dim=2)


# Only the attention is registered, no mask function: transformers then builds no mask of its own.
AttentionInterface.register(NAME, attend)


def current_pass() -> Forward:
    """The pass that runs."""
    return _active[-1]


def current_lengths() -> Tensor:
    """`Forward.lengths` of the pass that runs."""
    return _active[-1].lengths


@contextmanager
def active(current: Forward):
    """Make `current` the pass that `attend` serves."""
    _active.append(current)
    try:
        yield current
    finally:
        _active.pop()
