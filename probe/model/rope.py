"""Rotary embeddings whose frequencies follow the length of the sequence (LongRoPE, dynamic NTK).

transformers derives such frequencies from the largest position of a forward pass, which there is the length of one
sequence. Here a pass holds runs of several sequences and a long prompt takes several passes, so the frequencies of a
token are derived from the length of its own sequence, whatever else is in the pass and whatever ran before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from probe.model.unregistered import adapted


@contextmanager
def watched(model: nn.Module, calls: dict[nn.Module, tuple]):
    """Note, for each module with rotary frequencies that is called, its input and its other arguments."""

    def note(module, args, kwargs):
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if positions is not None:
            more = {key: value for key, value in kwargs.items() if key not in ("x", "position_ids")}
            calls[module] = (kwargs.get("x", args[0] if args else None), positions, args[2:], more)

    rotary = [
        m for m in model.modules() if any("inv_freq" in name for name, _ in m.named_buffers(recurse=False))
    ]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in rotary]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def switches(calls: dict[nn.Module, tuple], n_ctx: int) -> tuple[dict[nn.Module, int], tuple[int, ...]]:
    """By module whose frequencies depend on the length, and in order: the longest length that has those of a short
    sequence; found by trial."""
    switched: dict[nn.Module, int] = {}
    for module, (x, positions, args, kwargs) in calls.items():

        def turned(length: int, module=module, x=x, positions=positions, args=args, kwargs=kwargs) -> Tensor:
            first = positions[..., :1] * 0 + 1
            return torch.stack(_at_length(module.forward, x, first, length, args, kwargs))

        short = turned(2)
        if turned(n_ctx).equal(short):
            continue
        low, high = 2, n_ctx
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if turned(middle).equal(short) else (low, middle)
        switched[module] = low
    return switched, tuple(sorted(set(switched.values())))


@contextmanager
def by_sequence(modules: Sequence[nn.Module], lengths: Callable[[], Tensor]):
    """Each token's frequencies from `lengths()` [sequence, query] of the pass that runs; undone on leaving."""
    with adapted([(module, ("forward", _forward(module.forward, lengths))) for module in modules]):
        yield


def _forward(forward: Callable[..., Any], lengths: Callable[[], Tensor]):
    def apply(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        flat = position_ids.flatten(-2)[..., None, :]
        wanted = torch.maximum(lengths().flatten().to(flat.device), flat.reshape(-1, flat.shape[-1])[0] + 1)
        out: list[Tensor] = []  # cos and sin, or complex turns
        for length in wanted.unique().tolist():
            mask = wanted == length
            parts = _at_length(forward, x, flat[..., mask], length, args, kwargs)
            out = out or [part.new_empty(*part.shape[:-2], len(mask), part.shape[-1]) for part in parts]
            for whole, part in zip(out, parts, strict=True):
                whole[..., mask, :] = part
        size = position_ids.shape[-2:]
        shaped = tuple(whole.reshape(*whole.shape[:-3], *size, whole.shape[-1]) for whole in out)
        return shaped[0] if len(out) == 1 else shaped

    return apply


def _at_length(
    forward: Callable[..., Any],
    x: Tensor,
    positions: Tensor,
    length: int,
    args: Any,
    kwargs: Any,
) -> tuple[Tensor, ...]:
    """cos and sin, or complex turns (Llama 4), [..., position, d] at positions of a sequence of that length, whatever was
    computed before."""
    last = positions[..., :1] * 0 + length - 1
    forward(
        x, last * 0, *args, **kwargs
    )  # dynamic frequencies keep the longest length until a short one comes
    given = forward(x, torch.cat([positions, last], -1), *args, **kwargs)
    return tuple(part[..., :-1, :] for part in (given if isinstance(given, tuple) else (given,)))
