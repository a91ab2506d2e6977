"""The weights of a base model by the paths that an adapter names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from probe.errors import BadInput


def base_weights(
    name: str, *, offline: bool = False, log: Callable[[str], None] = lambda message: None
) -> Callable[[str, Any], tuple[Any, bool] | None]:
    """A function from a module's path to its stored weight and whether that is [in, out].

    Its second argument is the adapter's `layer_replication`. Raises ModelUnavailable, and BadInput for a path
    that the base has not.
    """
    import torch

    from probe.model import _collector_paused, _quiet_transformers
    from probe.model.names import resolve
    from probe.model.weights import load_weights

    with _collector_paused():
        _quiet_transformers()
        hf, _, _ = load_weights(resolve(name), torch.float32, "cpu", offline, log)

    def weight_of(module: str, replication: Any = None) -> tuple[Any, bool] | None:
        if module.endswith("]") or ".base_layer" in module:
            return None  # a stacked parameter: its path does not say which
        try:
            layer = hf.get_submodule(_before_replication(module, replication))
            embedding = isinstance(layer, torch.nn.Embedding)
            return layer.weight, embedding or type(layer).__name__ == "Conv1D"
        except AttributeError as error:
            raise BadInput(
                [f"{name} has no weight {module}: the adapter was made for another base"]
            ) from error

    return weight_of


def _before_replication(module: str, replication: Any) -> str:
    """The path in the base of a module in layers that PEFT's `layer_replication` repeated."""
    if not replication:
        return module
    order = [layer for start, end in replication for layer in range(start, end)]
    parts = module.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal() and int(part) < len(order):
            parts[index] = str(order[int(part)])
            break
    return ".".join(parts)
