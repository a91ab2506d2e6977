"""Products of few rows with the weights of a linear layer, on a CPU in float32.

A decode step multiplies as many rows as there are sequences, and takes as long as its weights take to be read. torch hands
such a product to a routine for matrices, or for a vector, that reads them at a fraction of the memory's speed: where the weights
are not the first factor it takes up to 4.5 times as long (below). A single row is faster as two.
Which order is chosen depends on shapes alone, so that the same run takes the same one again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

FEW_ROWS = 5
"""Above it, in a layer inside of a block, the usual order is as fast: of 576 × 576 weights, one thread, it took 2.1 times as long
for 2 rows, 1.5 for 4, 1.4 for 5, and the same for 8."""
FEW_ROWS_UNEMBEDDED = 16
"""The same of a vocabulary: 49,152 × 576 took 4.5 times as long for 2 rows, 1.5 for 8."""
_ALWAYS = 3
"""For two and three rows weights come first whatever the shape."""
_WIDE = 768
"""Wider rows gain for two and three alone: of 1,024 × 1,024 weights four took 1.4 times as long weights first."""
_WIDE_ALONE = 1536
"""A single row is doubled up to this width; at 2,048 doubling took 1.5 times as long."""
_SMALL = 1 << 16
"""Weights of fewer numbers take no time to be read."""


def few_rows(
    layer: nn.Linear, states: Tensor, most: int = FEW_ROWS, widest: int | None = _WIDE
) -> Tensor | None:
    """layer(states) with the weights as the first factor, states [..., d_in]; None where the usual order is as fast.

    `most`: with how many rows it is tried; `widest`: up to which width with more than three (None: with any).
    """
    weight = layer.weight
    n_rows, width = states.numel() // states.shape[-1], states.shape[-1]
    if not 1 <= n_rows <= most or states.dtype != torch.float32:
        return None
    if n_rows == 1 and (width > _WIDE_ALONE or weight.numel() < _SMALL):
        return None
    if n_rows > _ALWAYS and widest is not None and width > widest:
        return None
    rows = states.reshape(n_rows, width)
    product = weight @ (torch.cat([rows, rows]) if n_rows == 1 else rows).T
    product = product[:, :n_rows].T.contiguous()
    product = product if layer.bias is None else product + layer.bias
    return product.view(*states.shape[:-1], weight.shape[0])


def fits(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a plain linear layer whose weights lie in float32 on the CPU."""
    if type(module) is not nn.Linear:
        return False
    weight = module.weight
    return weight.dtype == torch.float32 and weight.device.type == "cpu"


def stand_ins(decoder: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, Any]]]:
    """Each linear layer that is worth it, with the method that stands in for its own (`probe.model.unregistered.adapted`)."""
    for module in decoder.modules():
        if "forward" not in module.__dict__ and fits(module) and module.weight.numel() >= _SMALL:
            yield module, ("forward", partial(_forward, module))


def _forward(layer: nn.Linear, states: Tensor) -> Tensor:
    product = few_rows(layer, states)
    return nn.functional.linear(states, layer.weight, layer.bias) if product is None else product
