"""Singular values of ΔW = scale · B A from its factors, and the numbers made of them. All in float64.

With B = Q_B R_B and Aᵀ = Q_A R_A (QR), B A = Q_B (R_B R_Aᵀ) Q_Aᵀ: the singular values of the d_out × d_in
matrix are those of the r × r core, in O((d_out + d_in) r²) instead of O(d_out d_in min(d_out, d_in)).
Subtracting a base from merged weights instead would measure rounding: it has full rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 2.0**-52


@dataclass(frozen=True)
class Spectrum:
    """Numbers of one ΔW; those that divide by its norm are None where ΔW = 0."""

    singular_values: Tensor
    """Descending; min(r, d_out, d_in) of them, the others are 0."""
    rank: int
    """Rank r of the factors."""
    nuclear_norm: float
    """Σ σ."""
    frobenius_norm: float
    """√Σ σ²."""
    spectral_norm: float
    """σ₁."""
    numerical_rank: int
    """How many σ exceed σ₁ · max(d_out, d_in) · 2⁻⁵² (numpy's matrix_rank)."""
    stable_rank: float | None
    """‖·‖_F² / ‖·‖₂² (Rudelson & Vershynin 2007)."""
    effective_rank: float | None
    """exp of the entropy of σ / Σ σ (Roy & Vetterli 2007)."""
    cauchy_schwarz_ratio: float | None
    """‖·‖_* / (√r ‖·‖_F) with r the rank of the factors: 1 where all r singular values are equal."""


def singular_values(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Singular values of scale · b @ a, descending, float64; a is [r, d_in], b is [d_out, r]."""
    import torch

    left = torch.linalg.qr(b.double(), mode="r").R
    right = torch.linalg.qr(a.double().T, mode="r").R
    return torch.linalg.svdvals(left @ right.T) * abs(scale)


def singular_vectors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [d_out, m], σ [m] and V [d_in, m] of b @ a with m = min(r, d_out, d_in), float64."""
    import torch

    left, core_left = torch.linalg.qr(b.double())
    right, core_right = torch.linalg.qr(a.double().T)
    u, sigma, vh = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    return left @ u, sigma, right @ vh.T


def of_factors(a: Tensor, b: Tensor, scale: float = 1.0) -> Spectrum:
    """The spectrum of scale · b @ a; the dense matrix is never made."""
    return of_values(singular_values(a, b, scale), a.shape[0], (b.shape[0], a.shape[1]))


def of_values(sigma: Tensor, rank: int, shape: tuple[int, int]) -> Spectrum:
    """The numbers of a matrix of this shape with these singular values (descending, float64)."""
    nuclear, frobenius, spectral = float(sigma.sum()), float(sigma.norm()), float(sigma[0])
    if spectral == 0:
        return Spectrum(sigma, rank, 0.0, 0.0, 0.0, 0, None, None, None)
    shares = sigma[sigma > 0] / nuclear
    return Spectrum(
        sigma,
        rank,
        nuclear,
        frobenius,
        spectral,
        int((sigma > spectral * max(shape) * EPSILON).sum()),
        (frobenius / spectral) ** 2,
        math.exp(-float((shares * shares.log()).sum())),
        nuclear / (math.sqrt(rank) * frobenius),
    )
