"""A model in float32 whatever its own dtype is: what rounding is measured against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from probe.model.unregistered import adapted


@contextmanager
def in_float32(hf: Any, decoder: nn.Module) -> Iterator[None]:
    """A causal LM computes in float32, with its own weights taken exactly; undone on leaving.

    One part of the model at a time is copied: memory is that of the largest block or the unembedding.
    """
    head = hf.get_output_embeddings()
    parts: list[nn.Module] = [] if head is None else [head]
    for child in decoder.children():
        parts += child if isinstance(child, nn.ModuleList) else [child]
    lookups = [part for part in parts if type(part) is nn.Embedding]  # others scale what they look up
    methods = [(part, ("forward", _in_float32(part))) for part in parts if type(part) is not nn.Embedding]
    hooks = [part.register_forward_hook(lambda _module, _inputs, out: out.float()) for part in lookups]
    try:
        with adapted(methods):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_float32(part: nn.Module) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        # Configurations are shared: they say which attention is used.
        twin = copy.deepcopy(part, {id(m.config): m.config for m in part.modules() if hasattr(m, "config")})
        twin.__dict__.pop("forward", None)
        return twin.float().forward(
            *map(_floats, args), **{key: _floats(value) for key, value in kwargs.items()}
        )

    return forward


def _floats(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    return type(value)(map(_floats, value)) if type(value) in (tuple, list) else value
