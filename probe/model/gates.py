"""Gates between an attention's reads and W_O: each number of a read is multiplied by one that the query's token gives.

What W_O is given of a part of a read (of one span, say) is then that part times the gate. Gated attention: Qiu et al. 2025,
"Gated attention for large language models"; Qwen3-Next, Qwen3.5, OLMo hybrids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from probe.model.attention import current_pass


def gate_gaps(
    attentions: Mapping[int, nn.Module], projections: Mapping[int, nn.Module], run: Callable[[], Any]
) -> dict[int, float]:
    """Layer → how far what W_O is given lies from being the read times something that the read has no part in.

    While `run` makes a flat pass, each of these attentions is called once more with every number of its reads multiplied by
    one of its own: what W_O is given must be multiplied alike. Relative to the largest number that W_O is given.
    """
    given: dict[int, list[Tensor]] = {layer: [] for layer in attentions}
    gaps: dict[int, float] = {}

    def again(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple, named: dict[str, Any], _output: Any) -> None:
            current = current_pass()
            first = given[layer][0]
            factor = 0.5 + torch.rand(first.shape, generator=torch.Generator().manual_seed(layer)).to(first)
            current.read_factor = factor
            try:
                module.forward(*inputs, **named)
            finally:
                current.read_factor = None
            second = given[layer][1]
            gaps[layer] = float((second - first * factor).abs().max() / first.abs().max())

        return hook

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple) -> None:
            given[layer].append(inputs[0])

        return hook

    hooks = [projections[layer].register_forward_pre_hook(keep(layer)) for layer in attentions]
    hooks += [
        module.register_forward_hook(again(layer), with_kwargs=True) for layer, module in attentions.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return gaps
