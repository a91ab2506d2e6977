"""The model's final norm, written down so that an analyzer can apply it without the model."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from probe.model.hooked import Model


def final_norm(model: Model) -> dict[str, Any] | None:
    """`{kind, eps, weight, bias}` of the norm between the last block and the unembedding.

    `kind` is `rms` or `layer`. `weight` [d_model] is what the normalised vector is multiplied with (for Gemma
    1 + w), `bias` [d_model] or null; both float32, little-endian, base64: 4 kB for d_model = 768, and exact.
    None where there is no such module, or it does not compute what this says: every form is tried on vectors of
    three sizes, the smallest of which is all but eps.
    """
    module = final_norm_module(model)
    if module is None:
        return None
    eps = _eps(module)
    if eps is None:
        return None
    weight, bias = module.weight.detach().float(), getattr(module, "bias", None)
    bias = bias.detach().float() if isinstance(bias, Tensor) else None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, model.facts.d_model, generator=generator) + 0.5
    x = (x * torch.tensor([[1.0], [30.0], [eps**0.5]])).to(module.weight.device, model.dtype)
    with torch.inference_mode():
        expected = module(x).float()
    loose = 1e-5 if model.dtype == torch.float32 else 2e-2
    for kind in ("rms", "layer"):
        for effective in (weight, 1 + weight):
            gap = (
                _apply(x.float(), kind, eps, effective, bias) - expected
            ).abs().max() / expected.abs().max()
            if gap < loose:
                return {"kind": kind, "eps": eps, "weight": _text(effective), "bias": _text(bias)}
    return None


def final_norm_module(model: Model) -> Any:
    """The norm between the last block and the unembedding; None where the base model has none of its own."""
    inner = [m for m in model.hf.base_model.children() if _is_norm(m, model.facts.d_model)]
    return inner[-1] if inner else None


def frozen_scale(module: Any, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The norm at x [row, d_model] as a linear map, its scale frozen: (v [row, d_model], constant [row]).

    For every row, direction · module(x) = v · x + constant, and v · c is what a summand c of x adds. RMS norm and
    LayerNorm are diagonal up to the subtraction of the mean; the scale is taken from module(x) itself, so that
    weights stored as 1 + w need no case. float32.
    """
    x, direction = x.float(), direction.float()
    learned = getattr(module, "bias", None)
    bias = torch.zeros_like(x[0]) if learned is None else learned.detach().float()
    centred = x - x.mean(-1, keepdim=True) if isinstance(module, nn.LayerNorm) else x
    weight, eps = module.weight.detach().float(), _eps(module)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + (eps or 0.0))
    out = module(x.to(module.weight.dtype)).float() - bias
    gaps = [(centred * scale * w - out).abs().max() for w in (weight, 1 + weight)]
    v = direction * scale * (weight if gaps[0] <= gaps[1] else 1 + weight)
    if isinstance(module, nn.LayerNorm):
        v = v - v.mean(-1, keepdim=True)
    return v, direction @ bias


def _eps(module: nn.Module) -> float | None:
    values = (getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name))
    eps = next(values, None)
    return eps if isinstance(eps, float) else None


def _is_norm(module: nn.Module, d_model: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and tuple(weight.shape) == (d_model,)


def _apply(x: Tensor, kind: str, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return normed if bias is None else normed + bias


def _text(vector: Tensor | None) -> str | None:
    return None if vector is None else base64.b64encode(vector.cpu().numpy().astype("<f4").tobytes()).decode()
