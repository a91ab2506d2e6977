"""The model's final norm, written down so that an analyzer can apply it without the model."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NormForm:
    """What a norm computes: its input over its own size, `weight` times that, plus `bias`; float32 [d_model]."""

    kind: str
    """`rms`, or `layer`: less the mean of its entries first."""
    eps: float
    weight: Tensor
    """For Gemma 1 + w; ones for a norm without weights."""
    bias: Tensor | None

    def scale(self, x: Tensor) -> Tensor:
        """What the norm divides x [..., d_model] by, inverted: [..., 1]."""
        return torch.rsqrt(self.centred(x).square().mean(-1, keepdim=True) + self.eps)

    def centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.kind == "layer" else x

    def __call__(self, x: Tensor) -> Tensor:
        normed = self.centred(x) * self.scale(x) * self.weight
        return normed if self.bias is None else normed + self.bias


def norm_form(module: nn.Module, d_model: int) -> NormForm | None:
    """The form that a norm has by trial, whatever its type says; None where none of these computes what it computes.

    Every form is tried on vectors of three sizes, the smallest of which is all but eps.
    """
    like = next(module.parameters(), torch.zeros(()))
    learned, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    weight = learned.detach().float() if isinstance(learned, Tensor) else torch.ones(d_model)
    bias = bias.detach().float() if isinstance(bias, Tensor) else None
    loose = 1e-5 if like.dtype == torch.float32 else 2e-2
    for eps in _eps(module):
        x = torch.randn(3, d_model, generator=torch.Generator().manual_seed(0)) + 0.5
        x = (x * torch.tensor([[1.0], [30.0], [eps**0.5]])).to(like)
        try:
            with torch.inference_mode():
                expected = module(x).float()
        except (TypeError, ValueError, RuntimeError, AttributeError):  # it takes something else
            return None
        for kind in ("rms", "layer") if expected.shape == x.shape else ():
            for effective in (weight, 1 + weight):
                form = NormForm(kind, eps, effective, bias)
                if (form(x.float()) - expected).abs().max() / expected.abs().max() < loose:
                    return form
    return None


class Normed(Protocol):
    """What a model's final norm is found in."""

    @property
    def decoder(self) -> nn.Module: ...
    @property
    def facts(self) -> Any: ...


def final_norm(model: Normed) -> dict[str, Any] | None:
    """`{kind, eps, weight, bias}` of the norm between the last block and the unembedding.

    `kind` is `rms` or `layer`. `weight` [d_model] is what the normalised vector is multiplied with (for Gemma
    1 + w), `bias` [d_model] or null; both float32, little-endian, base64: 4 kB for d_model = 768, and exact.
    None where there is no such module, or it does not compute what this says.
    """
    module = final_norm_module(model)
    form = None if module is None else norm_form(module, model.facts.d_model)
    if form is None:
        return None
    return {"kind": form.kind, "eps": form.eps, "weight": _text(form.weight), "bias": _text(form.bias)}


def final_norm_module(model: Normed) -> Any:
    """The norm between the last block and the unembedding; None where the base model has none of its own."""
    inner = [m for m in model.decoder.children() if _is_norm(m, model.facts.d_model)]
    return inner[-1] if inner else None


def frozen_scale(module: nn.Module, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor] | None:
    """The norm at x [row, d_model] as a linear map, its scale frozen: (v [row, d_model], constant [row]).

    For every row, direction · module(x) = v · x + constant, and v · c is what a summand c of x adds: RMS norm and
    LayerNorm are diagonal up to the subtraction of the mean. float32, or float64 as x. None where `norm_form` is.
    """
    form = norm_form(module, x.shape[-1])
    if form is None:
        return None
    x = x if x.dtype == torch.float64 else x.float()
    direction = direction.to(x.dtype)
    v = form.centred(direction * form.scale(x) * form.weight.to(x))
    bias = torch.zeros_like(x[0]) if form.bias is None else form.bias.to(x)
    return v, direction @ bias


def _eps(module: nn.Module) -> Sequence[float]:
    """What a norm adds to the square of the size; where it does not say so, what norms usually add."""
    values = (getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name))
    eps = next(values, None)
    return (eps,) if isinstance(eps, float) else (1e-5, 1e-6, 1e-8, 1e-12)


def _is_norm(module: nn.Module, d_model: int) -> bool:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return tuple(weight.shape) == (d_model,)
    # OLMo's norm has no weights.
    return next(module.parameters(), None) is None and norm_form(module, d_model) is not None


def _text(vector: Tensor | None) -> str | None:
    return None if vector is None else base64.b64encode(vector.cpu().numpy().astype("<f4").tobytes()).decode()
