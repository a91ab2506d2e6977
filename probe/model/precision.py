"""Which dtype `auto` is: bfloat16 where the device multiplies in it and the model's probabilities stay what its bfloat16
weights give where all is computed in float32. What rounding the weights themselves changes is not in this difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from probe.errors import ModelUnavailable
from probe.maths.agreement import AGREEMENT
from probe.model.cache import KVCache
from probe.model.exact import in_float32
from probe.model.inspection import OutOfMemory, refuse_without_memory
from probe.model.pieces import Piece

if TYPE_CHECKING:
    from probe.model.hooked import Model

_ON_CPU = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Instructions that multiply in bfloat16; without them numbers are converted for every product, which is slower than float32."""
_TEXT = (
    "The harbour of a small town lies at the end of a long bay. Every morning at six the first boats leave, and by "
    "noon their catch is sold: 340 crates of herring, 25 of cod. What remains goes to the kitchen of the inn, where "
    'Ada writes the menu of the day. "Two soups," she says, "and the fish, of course."'
)


def chosen_precision(load: Callable[[str], Model], device: str, log: Callable[[str], object]) -> Model:
    """The model in bfloat16 if that serves, else in float32; `load` gives it in a dtype. Which and why is logged, and is
    `dtype_auto` of its origin.

    The machine and the weights decide, never a time that was measured, so that the same command chooses the same again.
    """
    model, why = None, _lacks_bfloat16(device)
    if not why:
        try:
            model = load("bfloat16")
        except OutOfMemory:  # float32 takes twice as much
            raise
        except ModelUnavailable as error:
            why = str(error).splitlines()[0]
    if model is not None:
        try:
            gap, n_tokens = computing_gap(model)
        except RuntimeError as error:
            refuse_without_memory(error, model, "bfloat16 was compared with float32")
            raise
        why = (
            f"log-probabilities of {n_tokens} tokens differ by {gap:.3f} nats in the mean from what the same bfloat16 weights "
            "give computed in float32"
        )
        if gap < AGREEMENT:
            return _told(model, f"bfloat16: {why}", log)
    model = None  # freed before the other one takes memory
    return _told(load("float32"), f"float32: {why}", log)


def computing_gap(model: Model) -> tuple[float, int]:
    """Mean |Δ log p| of the tokens of a short text between the recorded pass and the model's own weights, as they are rounded,
    computed in float32, nats; and of how many tokens."""
    tokens = model.tokenizer.encode(_TEXT)[: model.facts.n_ctx]
    with model.recording(None):
        hidden, _ = model.forward([Piece(0, 0, tokens)], KVCache(1, len(tokens)))
        logits = model.unembed(hidden[0])
    with in_float32(model.hf, model.decoder), torch.inference_mode():
        exact = model.hf(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0]
    following = torch.tensor(tokens[1:])[:, None]
    ours, expected = (
        states[:-1].float().cpu().log_softmax(-1).gather(1, following) for states in (logits, exact)
    )
    return float((ours - expected).abs().mean()), len(tokens) - 1


def _told(model: Model, why: str, log: Callable[[str], object]) -> Model:
    log(f"dtype auto is {why}")
    model.origin["dtype_auto"] = why
    return model


def _lacks_bfloat16(device: str) -> str:
    """Why a device is not for bfloat16; empty where it is."""
    if device == "cpu":
        known = torch.cpu.get_capabilities()
        return "" if any(known.get(name) for name in _ON_CPU) else "this processor has no bfloat16 products"
    used = range(torch.cuda.device_count()) if device == "auto" else [torch.device(device)]
    for each in used:
        with torch.cuda.device(each):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                return "this GPU has no bfloat16 products"
    return ""
