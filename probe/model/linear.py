"""A logit as a sum over what was added to the residual stream: the norms on the way at their frozen scale.

With the scale of every norm held at the value that it has in a row, the logit of a token is linear in the residual
stream (direct logit attribution: Elhage et al. 2021, "A mathematical framework for transformer circuits"; Wang et
al. 2023, section 3.1). What changes the scale itself, and what later layers make of a read, is left out: the paths
counted are those that go from a head straight to the unembedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from probe.model.norms import final_norm_module, frozen_scale

if TYPE_CHECKING:
    from probe.model.hooked import Model

_ELEMENTS = 1 << 22
"""Elements of [row, d_vocab], and of the unembedding, that are held at a time in more than the model's own precision."""


def logit_directions(model: Model, resid: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """v [row, d_model] and constant [row] with logit(tokens[row]) = v · resid[row] + constant, before any softcap.

    `resid` [row, d_model] is the residual stream behind the last block. None for a model whose final norm is not
    in its base model, or no norm that `probe.model.norms` knows.
    """
    norm = final_norm_module(model)
    if norm is None:
        return None
    head, factor = model.hf.get_output_embeddings(), model.logit_factor
    with torch.inference_mode():
        device = model.device
        at = torch.tensor(list(tokens), device=head.weight.device)
        frozen = frozen_scale(norm, resid.to(device), head.weight[at].to(device).float() * factor)
        if frozen is None:
            return None
        v, constant = frozen
        if head.bias is not None:
            constant = constant + head.bias[at].to(device).float() * factor
        return v, constant


@dataclass(frozen=True)
class LinearLogProb:
    """log P of one token a row as a linear form of the residual stream behind the last block, float64.

    log P = direction · resid + norm_bias + unembedding_bias − entropy, exactly at this resid. For logits z and p =
    softmax(z), log P(t) = z_t − log Σ exp z = (z_t − Σ_i p_i z_i) − H(p): what is in brackets is linear in the logits with
    the weights p held. The final norm is held at its scale, and a softcap at the ratio z/u that it makes of each logit u.
    In a difference of two tokens of one row Σ p_i z_i and H(p) cancel, whatever p.
    """

    log_prob: Tensor
    """[row], nats, as the model computes it"""
    direction: Tensor
    """[row, d_model]"""
    norm_bias: Tensor
    """[row], nats: what the bias of the final norm adds"""
    unembedding_bias: Tensor
    """[row], nats"""
    entropy: Tensor
    """[row], nats: H(p), which no summand of the residual stream adds to"""


def linear_log_probs(
    model: Model, resid: Tensor, hidden: Tensor, tokens: Sequence[int]
) -> LinearLogProb | None:
    """The linear form of log P(tokens[row]).

    `resid` [row, d_model] is the residual stream behind the last block, `hidden` the same behind the final norm. None for a
    model whose final norm is not in its base model, or no norm that `probe.model.norms` knows.
    """
    norm = final_norm_module(model)
    if norm is None:
        return None
    head, factor = model.hf.get_output_embeddings(), model.logit_factor
    rows = max(1, _ELEMENTS // head.weight.shape[0])
    parts: list[tuple[Tensor, ...]] = []
    with torch.inference_mode():
        for start in range(0, len(resid), rows):
            at = slice(start, start + rows)
            raw = model.uncapped_logits(hidden[at]).double()
            logits = raw if model.softcap is None else model.softcap * torch.tanh(raw / model.softcap)
            log_p = logits.log_softmax(-1)
            weights = -log_p.exp()
            entropy = (weights * log_p).sum(-1)
            place = torch.arange(len(raw), device=raw.device), torch.tensor(tokens[at], device=raw.device)
            log_prob = log_p[place]
            weights[place] += 1
            if model.softcap is not None:
                weights *= torch.where(raw == 0, 1.0, logits / raw)
            weights *= factor
            bias = weights @ head.bias.double() if head.bias is not None else torch.zeros_like(log_prob)
            parts.append((log_prob, _product(weights, head.weight), bias, entropy))
        log_prob, direction, bias, entropy = (
            torch.cat(part).to(model.device) for part in zip(*parts, strict=True)
        )
        frozen = frozen_scale(norm, resid.to(model.device).double(), direction)
    return None if frozen is None else LinearLogProb(log_prob, frozen[0], frozen[1], bias, entropy)


def _product(weights: Tensor, matrix: Tensor) -> Tensor:
    """weights [row, d_vocab] times the unembedding [d_vocab, d_model], float32 products summed to float64 in blocks."""
    block = max(1, _ELEMENTS // matrix.shape[1])
    return torch.stack(
        [
            (weights[:, start : start + block].float() @ matrix[start : start + block].float()).double()
            for start in range(0, len(matrix), block)
        ]
    ).sum(0)


def through_post_norm(model: Model, layer: int, z: Tensor, direction: Tensor) -> tuple[Tensor, Tensor] | None:
    """`direction` [row, d_model] on the residual stream as one on what W_O of a layer writes, and what is added besides.

    (u [row, d_model], constant [row]): direction · (what the attention adds) = u · (z W_O) + constant. u is the direction,
    but where a norm or a factor stands between the attention's output and the residual stream (Gemma 2, OLMo 2); the
    constant comes from the biases of W_O and of that norm. `z` [head, row, d_head] are the reads of the layer: they set
    the norm's scale. None for a norm that `probe.model.norms` does not know.
    """
    norm = post_norms(model)[layer]
    direction = direction * (getattr(model.config, "residual_multiplier", None) or 1.0)
    constant = torch.zeros_like(direction[:, 0])
    bias = getattr(model.out_projection(layer), "bias", None)
    with torch.inference_mode():
        if norm is not None:
            written = torch.einsum("hrd,hdm->rm", z.to(model.w_o(layer)), model.w_o(layer))
            frozen = frozen_scale(
                norm, (written if bias is None else written + bias).to(direction), direction
            )
            if frozen is None:
                return None
            direction, constant = frozen
        if bias is not None:
            constant = constant + direction @ bias.to(direction)
    return direction, constant


def post_norms(model: Model) -> list[nn.Module | None]:
    """Each layer's norm that takes the attention's output and nothing else, None without one."""
    return [block.attention_norm for block in model.writers]
