"""The key/value cache and the attention call through which everything is captured.

transformers looks its attention up by name at every call (`AttentionInterface`), after rotary embedding, query
and key norms and the cache update. `attend` is registered under one name and, while a `Forward` is active,
computes what the model's own attention computes (torch's scaled_dot_product_attention; the same formula in
row blocks where a layer has a softcap or learned sinks) and hands queries and reads to the recorder.

Sequences of a batch are padded on the right: slot j of the cache holds position j of its own sequence, so a
causal mask alone keeps padding out of every real row, and neither rotary positions nor windows can shift.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache

from probe.reads import LayerAttention

NAME = "probe"
_ROW_BLOCK = 256


class KVCache(Cache):
    """Keys and values of a batch in buffers of fixed capacity, axes [sequence, kv_head, position, d_head].

    Preallocated because growing by concatenation copies the whole memory at each step; zeroed because a
    masked key with weight 0 still multiplies its value, and 0 · NaN is NaN. Layers keep every position, also
    where the layer's window is smaller.
    """

    def __init__(self, batch: int, capacity: int):
        super().__init__(layers=[])
        self.batch, self.capacity = batch, capacity
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._slots: Tensor | int = 0
        self._n_keys = 0

    def aim(self, slots: Tensor | int, n_keys: int) -> None:
        """Where the next forward writes: first slot (all sequences alike) or slots [sequence, query]."""
        self._slots, self._n_keys = slots, n_keys

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        batch, n_kv, n_new, _ = key_states.shape
        if layer_idx not in self.keys:
            for store, states in ((self.keys, key_states), (self.values, value_states)):
                store[layer_idx] = states.new_zeros(self.batch, n_kv, self.capacity, states.shape[-1])
        found = []
        for store, states in ((self.keys, key_states), (self.values, value_states)):
            buffer = store[layer_idx]
            if isinstance(self._slots, int):
                buffer[:batch, :, self._slots : self._slots + n_new] = states
            else:
                slots = self._slots.to(buffer.device)
                buffer[torch.arange(batch, device=buffer.device)[:, None], :, slots] = states.transpose(1, 2)
            found.append(buffer[:batch, :, : self._n_keys])
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._n_keys

    def move(self, source: int, target: int) -> None:
        """Copy one sequence's memory over another's (used when a finished sequence leaves the batch)."""
        for store in (self.keys, self.values):
            for buffer in store.values():
                buffer[target].copy_(buffer[source])

    def broadcast_first(self, n_positions: int) -> None:
        """Give every sequence the first one's memory up to n_positions (a shared prefix)."""
        for store in (self.keys, self.values):
            for buffer in store.values():
                buffer[1:, :, :n_positions] = buffer[:1, :, :n_positions]


class Recorder:
    """Collects, layer by layer, the tensors one forward computes anyway.

    `rows` [sequence, row] names the query indices to keep (None: all of them). `spans` [sequence, span, query]
    is a 0/1 membership; its product with the residual stream gives span sums without keeping positions.
    """

    def __init__(self, *, resid: bool, queries: bool, z: bool, layers: frozenset[int]):
        self.want_resid, self.want_queries, self.want_z, self.layers = resid, queries, z, layers
        self.rows: Tensor | None = None
        self.spans: Tensor | None = None
        self.resid: dict[int, Tensor] = {}
        self.queries: dict[int, Tensor] = {}
        self.z: dict[int, Tensor] = {}
        self.span_sums: dict[int, Tensor] = {}

    def begin(self, rows: Tensor | None, spans: Tensor | None) -> None:
        self.rows, self.spans = rows, spans
        self.resid, self.queries, self.z, self.span_sums = {}, {}, {}, {}

    def _keep(self, states: Tensor, axis: int) -> Tensor:
        """The wanted rows of states; `axis` is the query axis. Whole tensors are kept by reference."""
        if self.rows is None:
            return states
        states = states.movedim(axis, 1)
        rows = self.rows.to(states.device)
        kept = states[torch.arange(states.shape[0], device=states.device)[:, None], rows]
        return kept.movedim(1, axis)

    def on_attention(self, layer: int, query: Tensor, read: Tensor) -> None:
        if layer not in self.layers:
            return
        if self.want_queries:
            self.queries[layer] = self._keep(query, 2)
        if self.want_z:
            self.z[layer] = self._keep(read, 2)

    def on_resid(self, layer: int, hidden: Tensor) -> None:
        if layer not in self.layers:
            return
        if self.want_resid:
            self.resid[layer] = self._keep(hidden, 1)
        if self.spans is not None:
            self.span_sums[layer] = self.spans.to(hidden.device) @ hidden.float()


@dataclass
class Forward:
    """One pass through the model: which keys each query may see, and who records.

    `mask` bool [sequence or 1, query, key] says what is visible; None means plain causal over a prompt that
    starts at slot 0, or, for a single query, all keys. `positions` [sequence, query] are rotary positions.
    """

    positions: Tensor
    n_keys: int
    mask: Tensor | None
    key_positions: Tensor | None = None
    recorder: Recorder | None = None
    calls: dict[int, dict] = field(default_factory=dict)
    trace: bool = False
    _windowed: dict[int, Tensor] = field(default_factory=dict)

    def mask_for(self, window: int | None, n_queries: int) -> tuple[Tensor | None, bool]:
        """(mask [sequence, 1, query, key] or None, is_causal) of a layer."""
        if window is None or self.n_keys <= window:
            if self.mask is None:
                return None, n_queries > 1
            return self.mask[:, None], False
        if window not in self._windowed:
            device = self.positions.device
            keys = self.key_positions
            if keys is None:
                keys = torch.arange(self.n_keys, device=device)[None]
            near = keys[:, None, :] > self.positions[:, :, None] - window
            past = keys[:, None, :] <= self.positions[:, :, None] if self.mask is None else self.mask
            self._windowed[window] = (near & past)[:, None]
        return self._windowed[window], False


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
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention call. query [sequence, head, query, d_head]; key, value [sequence, kv_head, …].

    Returns the read, axes [sequence, query, head, d_head], as transformers expects it.
    """
    current = _active[-1]
    layer = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if current.trace:
        facts = LayerAttention(scale, softcap, sliding_window)
        current.calls[layer] = {"facts": facts, "sink": s_aux, "module": module, "shape": key.shape}
    mask, causal = current.mask_for(sliding_window, query.shape[2])
    if mask is not None:
        mask = mask.to(query.device)
    if softcap is None and s_aux is None:
        read = _sdpa(query, key, value, mask, causal, scale)
    else:
        read = _plain(query, key, value, mask, causal, scale, softcap, s_aux)
    if current.recorder is not None:
        current.recorder.on_attention(layer, query, read)
    return read.transpose(1, 2), None


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


def _plain(query, key, value, mask, causal: bool, scale: float, softcap, sink) -> Tensor:
    """The same by the book, in blocks of query rows, for what torch's kernel lacks: softcap and sinks."""
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
        seen = mask[:, :, rows] if mask is not None else None
        if seen is None and causal:
            seen = past[None, :] <= torch.arange(start, rows.stop, device=query.device)[:, None]
        if seen is not None:
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


@contextmanager
def active(current: Forward):
    """Make `current` the pass that `attend` serves."""
    _active.append(current)
    try:
        yield current
    finally:
        _active.pop()
