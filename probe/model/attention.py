"""The key/value cache and the attention call through which everything is captured.

transformers looks its attention up by name at every call (`AttentionInterface`), after rotary embedding, query
and key norms and the cache update. `attend` is registered under one name and, while a `Forward` is active,
computes what the model's own attention computes (torch's scaled_dot_product_attention; the same formula in
row blocks where a layer has a softcap or learned sinks) and hands queries and reads to the recorder.

Slot j of a sequence's cache holds its position j, so that neither rotary positions nor windows can shift. Runs
of tokens of several sequences go through the model as one flat sequence without padding, and attention is
computed run by run; a decode step has one token a sequence and masks the slots beyond each one's length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, Cache

from probe.maths.reads import Alibi, LayerAttention
from probe.model.edits import Edit, HeadAblation, Knockout, StateEdit

NAME = "probe"
_ROW_BLOCK = 256


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
            self._additive[key] = _additive(seen, dtype).to(device)
        return self._additive[key], False


def knockouts(edits: Sequence[Edit], layer: int, n_keys: int) -> tuple[Knockout, ...]:
    """The knock-outs that act in a layer on queries below position n_keys."""
    return tuple(e for e in edits if isinstance(e, Knockout) and e.acts(layer) and e.rows_from < n_keys)


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
        parts = states[0].split(_lengths(current.pieces))
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


def _lengths(pieces: Sequence[Piece]) -> list[int]:
    return [len(piece.tokens) for piece in pieces]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _zeros(size: Sequence[int], like: Tensor) -> Tensor:
    """Zeros with dtype and device of `like`. On a CPU pages take memory when they are first written: few sequences
    of a batch fill the whole capacity, and touching 1.5 GB took 1 to 6 s."""
    if like.device.type != "cpu":
        return like.new_zeros(size)
    return torch.from_numpy(np.zeros(math.prod(size) * like.itemsize, np.uint8)).view(like.dtype).view(size)


class KVCache(Cache):
    """Keys and values of a batch in buffers of fixed capacity, axes [sequence, kv_head, position, d_head].

    Preallocated because growing by concatenation copies the whole memory at each step, and kept for the next
    batch because fresh pages cost as much again; zeroed at first because a masked key with weight 0 still
    multiplies its value, and 0 · NaN is NaN. Layers keep every position, also where the layer's window is
    smaller.
    """

    def __init__(self, batch: int, capacity: int):
        super().__init__(layers=[])
        self._memory: dict[tuple[str, int], Tensor] = {}
        self.restart(batch, capacity)

    def restart(self, batch: int, capacity: int) -> None:
        """Begin another batch in the same memory, which grows where it is too small."""
        self.batch, self.capacity = batch, capacity
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.handed: dict[int, int] = {}
        """layer → numbers a position that the model hands over to be kept; absent where it keeps none of its own"""
        self._pieces: Sequence[Piece] | None = None
        self._copies: Sequence[tuple[int, int, int]] = ()
        self._slots: Tensor | int = 0
        self._n_keys = 0

    def aim_pieces(self, pieces: Sequence[Piece], copies: Sequence[tuple[int, int, int]] = ()) -> None:
        """The next forward writes flat runs of tokens, each into its sequence from its first slot on.

        Then, layer by layer and in order, `copies` (source, target, length) give the first positions of one
        sequence to another, so that a run may continue one of the same forward.
        """
        self._pieces, self._n_keys = pieces, max(piece.n_keys for piece in pieces)
        self._copies = copies

    def aim_step(self, slots: Tensor | int, n_keys: int) -> None:
        """The next forward writes one token a sequence, to one slot for all or to slots [sequence]."""
        self._pieces, self._slots, self._n_keys = None, slots, n_keys

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """What a model stores, handed back as it is: `attend` keeps what the attention reads (`store`), which for
        latent attention is made of what is stored."""
        self.handed[layer_idx] = sum(
            states.shape[1] * states.shape[3] for states in (key_states, value_states)
        )
        return key_states, value_states

    def store(self, layer: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values [sequence, kv_head, position, d_head] of the tokens that are run.

        Returns those of all positions of a step; of a flat pass the buffers are read run by run.
        """
        self._reserve(layer, key_states, value_states)
        both = ((self.keys[layer], key_states), (self.values[layer], value_states))
        if self._pieces is not None:
            for buffer, states in both:
                for piece, states_of_piece in zip(
                    self._pieces, states[0].split(_lengths(self._pieces), 1), strict=True
                ):
                    buffer[piece.row, :, piece.start : piece.n_keys] = states_of_piece
                for source, target, length in self._copies:
                    buffer[target, :, :length] = buffer[source, :, :length]
            return self.keys[layer], self.values[layer]
        batch = key_states.shape[0]
        for buffer, states in both:
            if isinstance(self._slots, int):
                buffer[:batch, :, self._slots] = states[:, :, 0]
            else:
                slots = self._slots.to(buffer.device)
                buffer[torch.arange(batch, device=buffer.device), :, slots] = states[:, :, 0]
        return both[0][0][:batch, :, : self._n_keys], both[1][0][:batch, :, : self._n_keys]

    def fill(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [kv_head, position, d_head] to the first positions of one sequence."""
        self._reserve(layer, keys[None], values[None])
        for store, states in ((self.keys, keys), (self.values, values)):
            store[layer][row, :, : states.shape[1]] = states

    def copy(self, source: int, target: int, length: int, start: int = 0) -> None:
        """Give the first positions of one sequence to another, or those from `start` to `length`, in all layers."""
        for store in (self.keys, self.values):
            for buffer in store.values():
                buffer[target, :, start:length] = buffer[source, :, start:length]

    def _reserve(self, layer: int, keys: Tensor, values: Tensor) -> None:
        if layer in self.keys:
            return
        for name, store, states in (("keys", self.keys, keys), ("values", self.values, values)):
            memory = self._memory.get((name, layer))
            if memory is None or memory.shape[0] < self.batch or memory.shape[2] < self.capacity:
                # It never shrinks, and is freed before its successor is made.
                rows, length = (self.batch, self.capacity) if memory is None else memory.shape[::2]
                memory = None
                self._memory.pop((name, layer), None)
                size = (max(rows, self.batch), states.shape[1], max(length, self.capacity), states.shape[3])
                memory = _zeros(size, states)
                self._memory[name, layer] = memory
            store[layer] = memory[: self.batch, :, : self.capacity]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before those of this forward; 0 in a flat pass, whose runs begin where they like."""
        return 0 if self._pieces is not None else self._n_keys - 1

    def move(self, source: int, target: int) -> None:
        """Copy one sequence's memory over another's (used when a finished sequence leaves the batch)."""
        for store in (self.keys, self.values):
            for buffer in store.values():
                buffer[target].copy_(buffer[source])


RECORDED = {"embedding": 1, "resid": 1, "attn_out": 1, "mlp_out": 1, "queries": 2, "z": 2}
"""What a recorder can keep → the axis of its query rows: the residual stream before the first block (as of layer 0) and
behind a block, and what a block's attention or MLP adds to it [batch, query, d_model]; queries and head outputs
[batch, head, query, d_head]."""


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
            self._additive[key] = _additive(seen, dtype).to(device)[:, None, None]
        return self._additive[key]


_active: list[Forward] = []


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
    layer = module.layer_idx if layer is None else layer
    assert layer is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    facts = LayerAttention(scale, softcap, sliding_window, alibi, _chunk(module, layer))
    if current.calls is not None:
        current.calls[layer] = {
            "facts": facts,
            "sink": s_aux,
            "module": module,
            "registered": registered,
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
            current.pieces, query.split(_lengths(current.pieces), 2), strict=True
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
    return read.transpose(1, 2).contiguous(), None


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
