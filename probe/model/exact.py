"""Logits of a model in float32 whatever its own dtype is: what rounding is measured against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def float32_logits(hf: Any, **inputs: Any) -> Tensor:
    """Logits [batch, position, d_vocab] of a causal LM whose weights are taken as float32, exactly.

    One part of the model at a time is copied and computed: memory is that of the largest block or the unembedding.
    """
    head, base = hf.get_output_embeddings(), hf.base_model
    parts: list[nn.Module] = [] if head is None else [head]
    for child in base.children():
        parts += child if isinstance(child, nn.ModuleList) else [child]
    hooks = []
    patched: list[nn.Module] = []
    try:
        for part in parts:
            if isinstance(part, nn.Embedding):
                hooks.append(part.register_forward_hook(lambda _module, _inputs, out: out.float()))
            else:
                part.forward = _in_float32(part)
                patched.append(part)
        with torch.inference_mode():
            return hf(**inputs, use_cache=False).logits.float()
    finally:
        for part in patched:
            part.__dict__.pop("forward", None)
        for hook in hooks:
            hook.remove()


def _in_float32(part: nn.Module) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        twin = copy.deepcopy(part)
        twin.__dict__.pop("forward", None)
        return twin.float()(*map(_floats, args), **{key: _floats(value) for key, value in kwargs.items()})

    return forward


def _floats(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    return type(value)(map(_floats, value)) if type(value) in (tuple, list) else value
