"""What stands between an attention's reads and W_O and multiplies each number of a read: gates, and RMS norms.

A gate is given by the query's token; what W_O is given of a part of a read (of one span, say) is that part times the gate.
Gated attention: Qiu et al. 2025, "Gated attention for large language models"; Qwen3-Next, Qwen3.5, OLMo hybrids. An RMS
norm over the heads of a query (BitNet) multiplies by its weights and its scale; a part of a read is multiplied by the scale that
the whole has, so parts add up to what W_O is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from probe.model.attention import current_pass
from probe.model.norms import norm_form


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


def normed_reads(
    attention: nn.Module,
    projection: nn.Module,
    read: Tensor,
    exchanges: Mapping[nn.Module, tuple],
    takes: Callable[[Tensor | None, Tensor], bool],
) -> bool:
    """Whether W_O is given the reads [1, head, query, d_head] of an attention in an RMS norm over the heads of a query.

    `exchanges`: what each module was given and gave in a pass; `takes(given, read)`: whether that is the reads.
    """
    given = exchanges[projection][0]
    for module in attention.modules():
        before, after = exchanges.get(module, (None, None))
        if module is projection or not (isinstance(before, Tensor) and isinstance(after, Tensor)):
            continue
        if takes(before, read) and after.shape == given.shape and after.equal(given):
            form = norm_form(module, read.shape[1] * read.shape[3])
            return form is not None and form.kind == "rms"
    return False
