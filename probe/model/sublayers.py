"""The modules whose outputs a block adds to the residual stream: its attention's and its MLP's.

Where a norm stands between a part of the block and the residual stream (Gemma 2, OLMo 2), it is the norm's output that is
added. What writes is seen in one short forward, by what the modules are given and give back and not by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Writers:
    """What writes to the residual stream in a block: resid_post = resid_pre + factor · (attention + MLP)."""

    attention: nn.Module | None
    """In a layer without attention its recurrent module; None where it has neither."""
    mlp: nn.Module | None
    """None where no single module is the rest of the block."""
    attention_norm: nn.Module | None
    """`attention`, where it is a norm of what the attention gives."""

    def at(self, site: str) -> nn.Module | None:
        return {"attn_out": self.attention, "mlp_out": self.mlp}[site]


def states_of(output: Any) -> Tensor:
    """The states among what a block or a part of it gives back."""
    return output[0] if isinstance(output, tuple | list) else output


@dataclass(eq=False)
class _Exchange:
    """What a module was given and gave back."""

    module: nn.Module
    given: Tensor
    gave: Tensor


def see_writers(
    blocks: Sequence[nn.Module],
    projections: Sequence[nn.Module | None],
    run: Callable[[], Any],
    *,
    factor: float,
    loose: float,
) -> list[Writers]:
    """The writers of each block, seen while `run` makes a forward pass; `projections` are those of the attention's output,
    by layer, or a recurrent module in its place, and `factor` is what the model multiplies with what a part adds. `mlp` is None unless the two add up to what the block adds, within `loose` of it."""
    inside: list[list[_Exchange]] = [[] for _ in blocks]
    whole: list[_Exchange | None] = [None] * len(blocks)
    hooks = []

    def watch(layer: int, block: nn.Module) -> None:
        def note(module, inputs, named, output):
            given = inputs[0] if inputs else next(iter(named.values()), None)
            if not isinstance(given, Tensor) or not isinstance(states_of(output), Tensor):
                return
            exchange = _Exchange(module, given.clone(), states_of(output).clone())
            if module is block:
                whole[layer] = exchange
            else:
                inside[layer].append(exchange)

        for module in filter(None, (*block.children(), projections[layer], block)):
            hooks.append(module.register_forward_hook(note, with_kwargs=True))

    for layer, block in enumerate(blocks):
        watch(layer, block)
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [_writers(*seen, factor, loose) for seen in zip(projections, inside, whole, strict=True)]


def _writers(
    projection: nn.Module | None,
    inside: list[_Exchange],
    block: _Exchange | None,
    factor: float,
    loose: float,
) -> Writers:
    if projection is None:
        return Writers(None, None, None)
    attention = next(part for part in inside if part.module is projection)
    norms = [part for part in inside if _is_norm(part.module)]
    rest = [
        part
        for part in inside
        if part not in norms
        and any(True for _ in part.module.parameters())
        and not any(module is projection for module in part.module.modules())
    ]
    normed = next((norm for norm in norms if norm.given.equal(attention.gave)), None)
    writes = normed or attention
    mlp = None
    if len(rest) == 1:
        mlp = next((norm for norm in norms if norm.given.equal(rest[0].gave)), rest[0])
    if mlp is None or block is None or not _adds_up(block, writes, mlp, factor, loose):
        mlp = None
    return Writers(writes.module, mlp.module if mlp else None, normed.module if normed else None)


def _adds_up(block: _Exchange, attention: _Exchange, mlp: _Exchange, factor: float, loose: float) -> bool:
    if attention.gave.shape != mlp.gave.shape:
        return False
    added = block.gave.float() - block.given.float()
    gap = (added - factor * (attention.gave.float() + mlp.gave.float())).abs().max()
    return bool(gap <= loose * added.abs().max())


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1
