"""Attention reads: what a query row takes from the key/value memory, recomputed from captured tensors.

Axes are those of the capture: head (query heads), kv_head, row (captured query positions), position (keys),
span (labels), d_head. Query head h reads kv_head h // (n_heads / n_kv_heads).

The read of row r in head h (Vaswani et al. 2017, eq. 1, restricted to the past) is
c = Σ_j α_j v_j with α = softmax(scale · q K^T) over the positions j ≤ position(r), inside the layer's window.
Everything here is a pure function of tensors: the capture calls it while the cache is still in memory, the
analyzers call it on a saved run, and both get the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Alibi:
    """A bias on attention scores that grows with the position of the key (Press et al. 2022): by head a slope."""

    slopes: tuple[float, ...]
    """[head]"""
    factor: float = 1.0
    """The bias is factor · slope · (position of the key − position of the query)."""
    rounded: bool = False
    """Whether slope · position of the key is rounded to bfloat16 (Falcon), which makes a difference from position 256 on."""

    def bias(
        self, queries: Int[Tensor, " row"], keys: Int[Tensor, " position"]
    ) -> Float[Tensor, "head row position"]:
        """What is added to the scores of queries and keys at these positions, up to a constant a row and head."""
        slopes = torch.tensor(self.slopes, device=keys.device)[:, None, None]
        if self.rounded:
            product = slopes.bfloat16() * keys.to(torch.bfloat16)
            return self.factor * product.float().expand(-1, len(queries), -1)
        return self.factor * slopes * (keys[None, :] - queries[:, None])


@dataclass(frozen=True)
class LayerAttention:
    """How one layer turns queries and keys into a pattern; recorded per layer in run.json."""

    scale: float
    """Factor on q·k before the softmax."""
    softcap: float | None = None
    """attn_scores become softcap · tanh(attn_scores / softcap) (Gemma 2)."""
    window: int | None = None
    """A row at position p sees keys p − window + 1 … p; None: all keys up to p."""
    alibi: Alibi | None = None
    """Bias on the scores, behind any softcap; None without one."""
    chunk: int | None = None
    """A row at position p sees no key before the chunk of so many positions that p is in (Llama 4); None: no chunks."""

    def first_seen(self, positions: Int[Tensor, "*row"]) -> Int[Tensor, "*row"]:
        """The first key that each row may read."""
        first = torch.zeros_like(positions)
        if self.window is not None:
            first = torch.maximum(first, positions - self.window + 1)
        if self.chunk is not None:
            first = torch.maximum(first, positions // self.chunk * self.chunk)
        return first

    def sees_all(self, n_keys: int) -> bool:
        """Whether rows at positions below n_keys see every key up to their own."""
        return all(limit is None or n_keys <= limit for limit in (self.window, self.chunk))

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> LayerAttention:
        """A layer as run.json has it; fields that this version does not know are left out."""
        known = {part.name: saved[part.name] for part in fields(cls) if part.name in saved}
        if (alibi := known.get("alibi")) is not None:
            known["alibi"] = Alibi(**{**alibi, "slopes": tuple(alibi["slopes"])})
        return cls(**known)


def visible(positions: Int[Tensor, " row"], n_keys: int, layer: LayerAttention) -> torch.Tensor:
    """Which keys each row may read: bool [row, position]."""
    keys = torch.arange(n_keys, device=positions.device)[None, :]
    return (keys <= positions[:, None]) & (keys >= layer.first_seen(positions)[:, None])


def pattern(
    queries: Float[Tensor, "head row d_head"],
    keys: Float[Tensor, "kv_head position d_head"],
    positions: Int[Tensor, " row"],
    layer: LayerAttention,
    sink: Float[Tensor, " head"] | None = None,
) -> Float[Tensor, "head row position"]:
    """Attention after the softmax, float32 (float64 for float64 inputs), for the given rows only.

    A learned sink (one logit a head that no key owns) takes part in the softmax and is dropped after it, so
    its rows sum to 1 − (mass of the sink).
    """
    n_heads, n_rows, d_head = queries.shape
    n_kv, n_keys, _ = keys.shape
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    grouped = (queries.to(dtype) * layer.scale).reshape(n_kv, (n_heads // n_kv) * n_rows, d_head)
    attn_scores = (grouped @ keys.to(dtype).transpose(1, 2)).view(n_heads, n_rows, n_keys)
    if layer.softcap is not None:
        attn_scores = layer.softcap * torch.tanh(attn_scores / layer.softcap)
    if layer.alibi is not None:
        bias = layer.alibi.bias(positions, torch.arange(n_keys)).to(attn_scores)
        attn_scores += bias.repeat(n_heads // len(bias), 1, 1)
    # Keys before the first row's own are seen by all: a pass over them is saved.
    unlimited = layer.window is None and layer.chunk is None
    first = min(int(positions.min()), n_keys) if unlimited and n_rows else 0
    seen = visible(positions, n_keys, layer)[:, first:].to(attn_scores.device)
    attn_scores[..., first:].masked_fill_(~seen, float("-inf"))
    if sink is None:
        return attn_scores.softmax(-1)
    column = sink.to(dtype).view(n_heads, 1, 1).expand(n_heads, n_rows, 1)
    return torch.cat([attn_scores, column], dim=-1).softmax(-1)[..., :-1]


def read(
    alpha: Float[Tensor, "head row position"], values: Float[Tensor, "kv_head position d_head"]
) -> Float[Tensor, "head row d_head"]:
    """c_t per head before W_O: Σ_j α_j v_j with each query head's own kv_head."""
    n_heads, n_rows, n_keys = alpha.shape
    n_kv = values.shape[0]
    grouped = alpha.reshape(n_kv, (n_heads // n_kv) * n_rows, n_keys) @ values.to(alpha.dtype)
    return grouped.view(n_heads, n_rows, values.shape[-1])


def written_along(
    alpha: Float[Tensor, "head row position"],
    values: Float[Tensor, "kv_head position d_head"],
    w_o: Float[Tensor, "head d_head d_model"],
    direction: Float[Tensor, "row d_model"],
) -> Float[Tensor, "head row position"]:
    """α_j v_j W_O · direction: how far each head's read of each position goes in a direction of the residual stream."""
    asked = torch.einsum("rm,hdm->hrd", direction, w_o)
    grouped = asked.reshape(len(values), -1, asked.shape[-1]) @ values.to(asked.dtype).transpose(1, 2)
    return alpha * grouped.view_as(alpha)


def values_written(
    values: Float[Tensor, "kv_head position d_head"], write_norm: Float[Tensor, "head d_head d_head"]
) -> Float[Tensor, "head position d_head"]:
    """R v_j of each query head: what its read of a position is as long as, behind W_O (`write_norm_factor`)."""
    return values.to(write_norm.dtype).repeat_interleave(
        len(write_norm) // len(values), 0
    ) @ write_norm.transpose(1, 2)


def read_by_span(
    alpha: Float[Tensor, "head row position"],
    values: Float[Tensor, "kv_head position d_head"] | None,
    runs: list[list[tuple[int, int]]],
    write_norm: Float[Tensor, "head d_head d_head"] | None = None,
    positions: Int[Tensor, " row"] | None = None,
    gate: Float[Tensor, "head row d_head"] | None = None,
) -> tuple[Float[Tensor, "head row span"], Float[Tensor, "head row span"] | None]:
    """Sum the pattern and the read over labelled spans.

    `runs[s]` holds the half-open position ranges of label s. Returns (mass, norm): mass is Σ_{j∈s} α_j
    (probability), norm is ‖Σ_{j∈s} α_j v_j W_O^h‖₂ in residual-stream units (Kobayashi et al. 2020, eq. 4,
    summed inside the norm over the span). `write_norm[h]` is the triangular factor R with
    ‖x W_O^h‖ = ‖R x‖, so that no [row, span, d_model] tensor is made; without it `values` are those that
    `values_written` gives. norm is None without values.
    `positions` of the rows, ascending, spare those before a span. What a row reads is multiplied by its `gate` before W_O.
    """
    n_heads, n_rows, n_keys = alpha.shape
    mass = alpha.new_zeros(n_heads, n_rows, len(runs))
    norm = None if values is None else torch.zeros_like(mass)
    read_values = None if values is None else values.to(alpha.dtype)
    if read_values is not None and len(read_values) < n_heads:
        read_values = read_values.repeat_interleave(n_heads // len(read_values), 0)
    factor = None if write_norm is None else write_norm.to(alpha.dtype).transpose(1, 2)
    for column, ranges in enumerate(runs):
        within = [(start, min(end, n_keys)) for start, end in ranges if start < n_keys]
        if not within:
            continue
        # Rows before a span's first key read nothing of it.
        first = 0 if positions is None else int(torch.searchsorted(positions, min(within)[0]))
        read_alpha = [alpha[:, first:, start:end] for start, end in within]
        # Sums of slices: a product with the spans' membership takes four times as long.
        mass[:, first:, column] = sum(part.sum(-1) for part in read_alpha)
        if norm is None or read_values is None:
            continue
        parts = [
            part @ read_values[:, start:end] for part, (start, end) in zip(read_alpha, within, strict=True)
        ]
        part = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        part = part if gate is None else part * gate[:, first:].to(part.dtype)
        part = part if factor is None else part @ factor
        norm[:, first:, column] = torch.linalg.vector_norm(part, dim=-1)
    return mass, norm


def write_norm_factor(w_o: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "head d_head d_head"]:
    """Triangular R_h with ‖x W_O^h‖₂ = ‖R_h x‖₂ for every x, from the QR decomposition of W_O^hᵀ.

    A QR, not a Gram matrix: squaring would lose half of the digits for reads that W_O nearly cancels.
    """
    _, d_head, d_model = w_o.shape
    tall = w_o.float().transpose(1, 2)
    if d_model < d_head:
        tall = torch.nn.functional.pad(tall, (0, 0, 0, d_head - d_model))
    return torch.linalg.qr(tall, mode="r").R
