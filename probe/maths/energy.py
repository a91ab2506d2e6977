"""An output distribution as a Boltzmann distribution: a token's energy is E = −z, softmax(z/τ) = exp(−E/τ)/Z.

Energies are in units of logits, entropies and log Z in nats. z → z + c moves E and F by −c and log Z by c/τ, and
nothing else: a *gauge*, `raw` (z as the model gave it) or `centred` (the mean of z over the vocabulary is 0). All in
float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Gauge = Literal["raw", "centred"]
GAUGES: tuple[Gauge, ...] = ("raw", "centred")


@dataclass(frozen=True)
class Boltzmann:
    """The distribution exp(−E/τ)/Z of a temperature and a gauge; each field has the shape of the batch."""

    log_partition: Tensor
    """log Z, nats; of the gauge."""
    energy_mean: Tensor
    """⟨E⟩, logits; of the gauge."""
    free_energy: Tensor
    """F = −τ log Z = ⟨E⟩ − τS, logits; of the gauge."""
    entropy: Tensor
    """S = −Σ p log p, nats."""
    heat_capacity: Tensor
    """C = Var(E)/τ² = d⟨E⟩/dτ = τ dS/dτ, nats."""


def boltzmann(
    logits: Float[Tensor, "*batch d_vocab"], temperature: float = 1.0, gauge: Gauge = "raw"
) -> Boltzmann:
    """Partition function and its moments, in float64. A token at −inf has no probability and no energy.

    Sums run over energies above the lowest one, so they neither overflow nor cancel.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    logits = logits.double()
    highest = logits.amax(-1, keepdim=True)
    weights = ((logits - highest) / temperature).exp_()
    above = highest - logits
    if not bool(torch.isfinite(above.sum())):
        above = above.masked_fill(torch.isinf(above), 0.0)
    total = weights.sum(-1, keepdim=True)
    excess = (weights * above).sum(-1, keepdim=True) / total
    variance = (weights * (above - excess).square_()).sum(-1) / total[..., 0]
    log_total, excess = total.log()[..., 0], excess[..., 0]
    lowest = -(highest[..., 0] - gauge_shift(logits, gauge))
    log_partition = log_total - lowest / temperature
    return Boltzmann(
        log_partition=log_partition,
        energy_mean=excess + lowest,
        free_energy=lowest - temperature * log_total,
        entropy=log_total + excess / temperature,
        heat_capacity=variance / temperature**2,
    )


def gauge_shift(logits: Float[Tensor, "*batch d_vocab"], gauge: Gauge) -> Float[Tensor, "*batch"]:
    """What the gauge subtracts from every logit: 0, or their mean (tokens at −inf left out)."""
    if gauge == "raw":
        return torch.zeros_like(logits[..., 0])
    if gauge != "centred":
        raise ValueError(f"no gauge {gauge!r}: raw or centred")
    if bool(torch.isfinite(logits.sum())):
        return logits.mean(-1)
    finite = torch.isfinite(logits)
    return logits.masked_fill(~finite, 0.0).sum(-1) / finite.sum(-1)


def cross_entropy(
    logits: Float[Tensor, " d_vocab"], token: int, temperature: float = 1.0
) -> tuple[float, float]:
    """−log p of a token at τ in nats, as (E − F)/τ, and the token's raw energy in logits."""
    law = boltzmann(logits, temperature)
    energy = -float(logits[token])
    return (energy - float(law.free_energy)) / temperature, energy


def temperature_for_entropy(logits: Float[Tensor, " d_vocab"], entropy: float) -> float | None:
    """τ at which softmax(z/τ) has this entropy (nats): unique, because dS/dτ = C/τ > 0; to 1e-10 relative.

    None where no τ has it: entropies lie between log of the number of equal maxima (τ → 0) and log of the
    number of tokens (τ → ∞), both left out.
    """
    logits = logits.double()
    logits = logits[torch.isfinite(logits)]
    above = logits.max() - logits
    if not math.log(int((above == 0).sum())) < entropy < math.log(len(above)):
        return None
    log_tau, low, high = 0.0, -math.inf, math.inf
    # Newton's method in log τ, where dS/d(log τ) = C, kept in the bracket: half of brentq's evaluations, each of
    # which goes through the whole vocabulary.
    for _ in range(200):
        tau = math.exp(log_tau)
        weights = (above / -tau).exp_()
        total = float(weights.sum())
        mean = float(torch.dot(weights, above)) / total
        missing = math.log(total) + mean / tau - entropy
        slope = (float(torch.dot(weights.mul_(above), above)) / total - mean**2) / tau**2
        low, high = (log_tau, high) if missing < 0 else (low, log_tau)
        step = max(-2.0, min(2.0, -missing / slope)) if slope > 0 else math.copysign(2.0, -missing)
        if abs(step) < 1e-11:
            return math.exp(log_tau + step)
        following = log_tau + step if low < log_tau + step < high else (low + high) / 2
        if abs(following) > 600:
            return None  # nearer to a bound than float64 tells apart
        log_tau = following
    return math.exp(log_tau)


def heat_capacity_peak(logits: Float[Tensor, " d_vocab"]) -> tuple[float, float] | None:
    """(τ, C) of the highest peak of C(τ); None where all logits are equal, as C is 0 then.

    C vanishes on both sides: as exp(−gap/τ) below the smallest gap from the maximum, and as Var(z)/τ² above
    the spread of z. Between them it is searched on a grid of τ over a histogram of the energies, and every peak
    within 5 % of the highest one is refined on the energies themselves.
    """
    from scipy.optimize import minimize_scalar

    logits = logits.double()
    above = logits.max() - logits[torch.isfinite(logits)]
    if not bool((above > 0).any()):
        return None
    low, high = math.log(float(above[above > 0].min()) / 20), math.log(2 * float(above.max()))
    levels, counts = _levels(above)
    grid = torch.linspace(low, high, 400, dtype=torch.float64)
    rough = torch.cat([_heat(levels, counts, tau) for tau in grid.exp().split(50)])
    inner = rough.new_full((len(rough) + 2,), -math.inf)
    inner[1:-1] = rough
    peaks = (rough >= inner[:-2]) & (rough >= inner[2:]) & (rough >= 0.95 * rough.max())

    def negative(log_tau: float) -> float:
        return -float(boltzmann(-above, math.exp(log_tau)).heat_capacity)

    refined = []
    for at in peaks.nonzero()[:, 0].tolist():
        around = (float(grid[max(at - 2, 0)]), float(grid[min(at + 2, len(grid) - 1)]))
        best: Any = minimize_scalar(negative, bounds=around, method="bounded", options={"xatol": 1e-7})
        refined.append((-float(best.fun), math.exp(float(best.x))))
    return max(refined)[::-1]


def _levels(above: Float[Tensor, " d_vocab"], lowest: int = 64, bins: int = 2048) -> tuple[Tensor, Tensor]:
    """(energies above the lowest, how many tokens each stands for): the lowest ones exactly, the others in bins."""
    ordered = above.sort().values
    rest = ordered[lowest:]
    if len(rest) <= bins:
        return ordered, torch.ones_like(ordered)
    start, end = float(rest[0]), float(rest[-1])
    width = (end - start) / bins or 1.0
    at = ((rest - start) / width).long().clamp_(max=bins - 1)
    counts = torch.bincount(at, minlength=bins).double()
    sums = torch.zeros(bins, dtype=torch.float64).scatter_add_(0, at, rest)
    occupied = counts > 0
    exact = ordered[:lowest]
    levels = torch.cat([exact, sums[occupied] / counts[occupied]])
    return levels, torch.cat([torch.ones_like(exact), counts[occupied]])


def _heat(levels: Tensor, counts: Tensor, taus: Tensor) -> Tensor:
    """C [τ] of levels that stand for several tokens each."""
    weights = (levels / -taus[:, None]).exp_() * counts
    weights /= weights.sum(-1, keepdim=True)
    mean = weights @ levels
    return (weights * (levels - mean[:, None]).square_()).sum(-1) / taus**2
