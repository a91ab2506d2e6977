"""The rule of thumb for fine-tuning in half precision, and what it leaves out."""

from __future__ import annotations

import re
from typing import Any

from probe.analyzers.registry import measure
from probe.errors import UsageError

ACTIVATIONS = 1.5
"""Activations as a multiple of the weights. It is one point on a line: what SmolLM2-135M keeps in float32 goes from
0.37 times its weights (128 tokens, sdpa) to 2.08 times (512 tokens, eager)."""
_COUNT = re.compile(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE]\+?[0-9]{1,2})?)([kKmMbBtT]?)")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}

for _name, _unit, _means in (
    ("weights_bytes", "bytes", "Weights on one GPU at the highest moment of the step."),
    ("gradients_bytes", "bytes", "Gradients on one GPU at the highest moment of the step."),
    (
        "optimizer_bytes",
        "bytes",
        "What the optimizer keeps on one GPU: for Adam mean and variance of every gradient.",
    ),
    (
        "activations_bytes",
        "bytes",
        "What autograd keeps from forward to backward at the highest moment, without logits and temporaries; of the rule "
        "of thumb all three.",
    ),
    ("logits_bytes", "bytes", "Tables of tokens × vocabulary in the loss, at the highest moment."),
    (
        "temporary_bytes",
        "bytes",
        "Gradients of activations and other scratch at the highest moment, the optimizer's while it steps.",
    ),
    ("total_bytes", "bytes", "What the GPU must have: the highest moment, CUDA context and fragmentation."),
    ("fits", "0 or 1", "1 where `total_bytes` is at most the memory of the named GPU."),
):
    measure("memory", _name, unit=_unit, of="run", means=_means, figure="`probe memory` prints and draws it")


def parameter_count(text: str) -> int | None:
    """`2B`, `135M`, `2e9` or `2506172416` as a number, None for anything else."""
    match = _COUNT.fullmatch(text.replace(",", "").replace("_", ""))
    return round(float(match[1]) * _UNITS[match[2].lower()]) if match else None


def rule_of_thumb(n_params: int, usable: int | None = None) -> dict[str, Any]:
    """Weights 2 bytes a parameter, gradients the same, Adam's mean and variance 4, activations 1.5 × the weights.

    `usable`: bytes of the GPU. Raises UsageError where there is no parameter.
    """
    if n_params < 1:
        raise UsageError("a model has at least one parameter")
    weights = 2 * n_params
    parts = {
        "weights_bytes": weights,
        "gradients_bytes": weights,
        "optimizer_bytes": 2 * weights,
        "activations_bytes": round(ACTIVATIONS * weights),
    }
    sizes: dict[str, Any] = {"n_params": n_params, **parts, "total_bytes": sum(parts.values())}
    return sizes if usable is None else sizes | {"fits": sizes["total_bytes"] <= usable}


HIDDEN = (
    "2 bytes for Adam's mean and variance: mixed precision keeps them and a copy of the weights in float32, "
    "16 bytes a parameter in all and not 8",
    "a size in a name is nominal: Gemma-2B has 2,506,172,416 parameters, and the rule gives 27.6 GB for it",
    "activations depend on batch, length, attention and checkpointing, not on the number of parameters alone",
    "logits: three float32 tables of tokens × vocabulary",
    "CUDA context and fragmentation",
)
