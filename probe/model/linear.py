"""A logit as a sum over what was added to the residual stream: the norms on the way at their frozen scale.

With the scale of every norm held at the value that it has in a row, the logit of a token is linear in the residual
stream (direct logit attribution: Elhage et al. 2021, "A mathematical framework for transformer circuits"; Wang et
al. 2023, section 3.1). What changes the scale itself, and what later layers make of a read, is left out: the paths
counted are those that go from a head straight to the unembedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from probe.model.norms import final_norm_module, frozen_scale

if TYPE_CHECKING:
    from probe.model.hooked import Model


def logit_directions(model: Model, resid: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """v [row, d_model] and constant [row] with logit(tokens[row]) = v · resid[row] + constant, before any softcap.

    `resid` [row, d_model] is the residual stream behind the last block. None for a model whose final norm is not
    in its base model, or no norm that `probe.model.norms` knows.
    """
    norm = final_norm_module(model)
    if norm is None:
        return None
    head, config = model.hf.get_output_embeddings(), model.hf.config
    with torch.inference_mode():
        device = model.device
        at = torch.tensor(list(tokens), device=head.weight.device)
        factor = getattr(config, "logit_scale", None) or 1.0
        factor /= getattr(config, "logits_scaling", None) or 1.0
        frozen = frozen_scale(norm, resid.to(device), head.weight[at].to(device).float() * factor)
        if frozen is None:
            return None
        v, constant = frozen
        if head.bias is not None:
            constant = constant + head.bias[at].to(device).float() * factor
        return v, constant


def through_post_norm(model: Model, layer: int, z: Tensor, direction: Tensor) -> Tensor | None:
    """`direction` [row, d_model] on the residual stream as one on what W_O of a layer writes.

    The same, but where a norm or a factor stands between the attention's output and the residual stream (Gemma 2,
    OLMo 2). `z` [head, row, d_head] are the reads of the layer: they set the norm's scale. None for a norm that
    `probe.model.norms` does not know.
    """
    norm = post_norms(model)[layer]
    factor = getattr(model.hf.config, "residual_multiplier", None) or 1.0
    if norm is None:
        return direction * factor
    with torch.inference_mode():
        written = torch.einsum("hrd,hdm->rm", z.to(model.w_o(layer)), model.w_o(layer))
        bias = getattr(model.out_projection(layer), "bias", None)
        written = written if bias is None else written + bias
        frozen = frozen_scale(norm, written, direction * factor)
        return None if frozen is None else frozen[0]


def post_norms(model: Model) -> list[nn.Module | None]:
    """Each layer's norm that takes the attention's output and nothing else, None without one."""
    return [block.attention_norm for block in model.writers]
