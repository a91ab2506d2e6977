"""An adapter against its base weights: relative size, shared directions, intruder dimensions.

Sides: W is taken as the base stores it, as PEFT's own routine does. For a Linear that is [out, in], so that left
singular vectors lie in the output space; GPT-2's Conv1D and embeddings store [in, out].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from probe.errors import BadInput
from probe.training.lora.files import Delta
from probe.training.lora.spectrum import EPSILON, singular_vectors

if TYPE_CHECKING:
    from torch import Tensor

TOP_K, THRESHOLD = 10, 0.5
"""Shuttleworth et al. 2024 (*LoRA vs full fine-tuning*): the 10 first directions, cosines below 0.5."""


@dataclass(frozen=True)
class BaseComparison:
    """ΔW beside W; sides are those of the stored W."""

    share_of_base: float
    """‖ΔW‖_F / ‖W‖_F."""
    overlap: tuple[float, float] | None
    """Left, right: ‖U_ΔWᵀ U_W‖_F² / r over the r directions of ΔW and the r first of W (Hu et al. 2021, §7.2)."""
    overlap_chance: tuple[float, float] | None
    """What r random directions would have: r / dimension."""
    intruders: tuple[int, int]
    """Left, right: how many of the 10 first singular vectors of W + ΔW are like none of W."""
    magnitude_intruders: tuple[int, int] | None = None
    """DoRA: the same number for the weights with their magnitude, which the model uses."""
    magnitude_share: float | None = None
    """DoRA: ‖W' − W‖_F / ‖W‖_F of those weights."""


@dataclass(frozen=True)
class BaseVectors:
    """Singular vectors of a base weight, float64: left [rows, m], right [columns, m]."""

    weight: Tensor
    transposed: bool
    """Whether what is stored is W.T: [in, out]."""
    left: Tensor
    right: Tensor


def decompose(weight: Tensor, transposed: bool = False) -> BaseVectors:
    """The dense SVD of a base weight, once a matrix; a convolution's kernel is unfolded to [out, in · size]."""
    import torch

    weight = weight.detach().flatten(1).double()
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    return BaseVectors(weight, transposed, u, vh.T)


def against(
    delta: Delta, base: BaseVectors, top_k: int = TOP_K, threshold: float = THRESHOLD
) -> BaseComparison:
    """Compare one ΔW with its base weight. Raises BadInput where their shapes differ."""
    dense = delta.scale * (delta.b @ delta.a)
    dense = dense.T if base.transposed else dense
    if dense.shape != base.weight.shape:
        raise BadInput(
            [
                f"{delta.module}: ΔW is {tuple(dense.shape)}, the base's weight {tuple(base.weight.shape)}: "
                "the adapter was made for another base"
            ]
        )
    left, sigma, right = singular_vectors(delta.a, delta.b)
    if base.transposed:
        left, right = right, left
    r = int((sigma > sigma[0] * max(dense.shape) * EPSILON).sum()) if sigma[0] > 0 else 0
    overlap = chance = None
    if r:
        overlap = _overlap(left[:, :r], base.left[:, :r]), _overlap(right[:, :r], base.right[:, :r])
        chance = min(1.0, r / dense.shape[0]), min(1.0, r / dense.shape[1])
    norm = float(base.weight.norm())
    tuned = base.weight + dense
    whole = None if delta.magnitude is None else with_magnitude(delta.magnitude, tuned, base.transposed)
    return BaseComparison(
        float(dense.norm()) / norm,
        overlap,
        chance,
        intruders(tuned, base, top_k, threshold),
        None if whole is None else intruders(whole, base, top_k, threshold),
        None if whole is None else float((whole - base.weight).norm()) / norm,
    )


def with_magnitude(magnitude: Tensor, tuned: Tensor, transposed: bool) -> Tensor:
    """DoRA's weights: W + ΔW with every output's row brought to its learned norm (Liu et al. 2024)."""
    if transposed:
        return tuned * (magnitude / tuned.norm(dim=0))
    return tuned * (magnitude / tuned.norm(dim=1))[:, None]


def intruders(tuned: Tensor, base: BaseVectors, top_k: int, threshold: float) -> tuple[int, int]:
    """Left and right intruder dimensions of tuned weights: of their `top_k` first singular vectors, those whose
    largest absolute cosine with any singular vector of the base is below `threshold`."""
    left, right = _first(tuned, top_k)
    return tuple(
        int(((of_base.T @ of_tuned).abs().amax(0) < threshold).sum())
        for of_tuned, of_base in ((left, base.left), (right, base.right))
    )  # type: ignore[return-value]


def _first(matrix: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The first left and right singular vectors. From the smaller Gram matrix: the first directions lose no digit
    that a threshold of 0.5 could see, and it takes a third of the time of the whole SVD."""
    import torch

    if matrix.shape[0] < matrix.shape[1]:
        right, left = _first(matrix.T, top_k)
        return left, right
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    right = vectors.flip(1)[:, :top_k]
    left = matrix @ right
    kept = values.flip(0)[:top_k] > values[-1] * 1e-12
    if not bool(kept.all()):  # rank below top_k: the Gram matrix cannot tell its last directions
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :top_k], vh.T[:, :top_k]
    return left / left.norm(dim=0), right


def _overlap(first: Tensor, second: Tensor) -> float:
    return float((first.T @ second).square().sum()) / min(first.shape[1], second.shape[1])
