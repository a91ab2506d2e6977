"""The output distribution: temperature, truncation, and its Boltzmann form, as pure functions of logits.

Temperature and truncation take logits [..., d_vocab] and return logits of the same shape, truncated tokens at
−inf. The order of use is temperature, top-k, top-p, min-p, typical, epsilon, eta, as in transformers, and each
rule keeps what the logits processor of that name keeps, ties and the token at the border included: the
arithmetic is the same, in the dtype of the logits.

Boltzmann: a token's energy is E = −z, so that softmax(z/τ) = exp(−E/τ)/Z (Hinton et al. 2015, eq. 1). Energies
are in units of logits, entropies and log Z in nats. z → z + c moves E and F by −c and log Z by c/τ, and nothing
else: a *gauge*, `raw` (z as the model gave it) or `centred` (the mean of z over the vocabulary is 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Gauge = Literal["raw", "centred"]
GAUGES: tuple[Gauge, ...] = ("raw", "centred")
_REMOVED = float("-inf")


def temper(logits: Float[Tensor, "*batch d_vocab"], temperature: float) -> Float[Tensor, "*batch d_vocab"]:
    """Logits of softmax(z/τ) (Hinton et al. 2015, eq. 1); τ must be positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}; greedy choice is argmax")
    return logits / temperature


def top_k(logits: Float[Tensor, "*batch d_vocab"], k: int) -> Float[Tensor, "*batch d_vocab"]:
    """Keep the k most probable tokens; ties with the k-th are kept as well."""
    if k < 1:
        raise ValueError(f"top-k must be at least 1, not {k}")
    kth = torch.topk(logits, min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, _REMOVED)


def top_p(logits: Float[Tensor, "*batch d_vocab"], p: float) -> Float[Tensor, "*batch d_vocab"]:
    """Keep the nucleus V(p): the smallest set of most probable tokens whose mass reaches p.

    Holtzman et al. 2020, section 3.1. Among equally probable tokens at the border the highest ids stay, as in
    transformers' TopPLogitsWarper.
    """
    if not 0 < p <= 1:
        raise ValueError(f"top-p must be in (0, 1], not {p}")
    ascending, order = torch.sort(logits, descending=False, dim=-1)
    below = ascending.softmax(-1).cumsum(-1) <= 1 - p
    below[..., -1] = False
    return logits.masked_fill(below.scatter(-1, order, below), _REMOVED)


def min_p(logits: Float[Tensor, "*batch d_vocab"], p: float) -> Float[Tensor, "*batch d_vocab"]:
    """Keep tokens at least p times as probable as the most probable one (Nguyen et al. 2024, section 3)."""
    if not 0 <= p <= 1:
        raise ValueError(f"min-p must be in [0, 1], not {p}")
    probabilities = logits.softmax(-1)
    below = probabilities < p * probabilities.amax(-1, keepdim=True)
    # Rounding of p·max can remove even the most probable token.
    below.scatter_(-1, probabilities.topk(1, dim=-1).indices, False)
    return logits.masked_fill(below, _REMOVED)


def typical(logits: Float[Tensor, "*batch d_vocab"], mass: float) -> Float[Tensor, "*batch d_vocab"]:
    """Keep the tokens whose surprisal is nearest to the entropy, until their mass reaches `mass`.

    Locally typical sampling (Meister et al. 2023, section 4). Tokens as far away as the last one stay too.
    """
    if not 0 < mass < 1:
        raise ValueError(f"typical mass must be in (0, 1), not {mass}")
    log_p = logits.log_softmax(-1)
    entropy = -(log_p * log_p.exp()).nansum(-1, keepdim=True)
    distance, order = torch.sort((-log_p - entropy).abs(), descending=False, dim=-1)
    reached = logits.gather(-1, order).softmax(-1).cumsum(-1)
    last = (reached < mass).sum(-1, keepdim=True).clamp_(max=logits.shape[-1] - 1)
    beyond = distance > distance.gather(-1, last)
    beyond[..., 0] = False
    return logits.masked_fill(beyond.scatter(-1, order, beyond), _REMOVED)


def epsilon(logits: Float[Tensor, "*batch d_vocab"], cutoff: float) -> Float[Tensor, "*batch d_vocab"]:
    """Keep tokens of at least this probability, and always the most probable (Hewitt et al. 2022, section 4)."""
    if not 0 < cutoff < 1:
        raise ValueError(f"epsilon must be in (0, 1), not {cutoff}")
    below = logits.softmax(-1) < cutoff
    return logits.masked_fill(below & (logits < logits.amax(-1, keepdim=True)), _REMOVED)


def eta(logits: Float[Tensor, "*batch d_vocab"], cutoff: float) -> Float[Tensor, "*batch d_vocab"]:
    """Keep tokens of at least min(ε, √ε·exp(−entropy)), and always the most probable (Hewitt et al. 2022)."""
    if not 0 < cutoff < 1:
        raise ValueError(f"eta must be in (0, 1), not {cutoff}")
    largest = torch.tensor(cutoff, dtype=logits.dtype, device=logits.device)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    smallest = torch.min(largest, largest.sqrt() * torch.exp(-entropy))[..., None]
    below = logits.softmax(-1) < smallest
    return logits.masked_fill(below & (logits < logits.amax(-1, keepdim=True)), _REMOVED)


TRUNCATIONS: dict[str, Callable[..., Tensor]] = {
    "top-k": top_k,
    "top-p": top_p,
    "min-p": min_p,
    "typical": typical,
    "epsilon": epsilon,
    "eta": eta,
}
"""Every rule by name, in the order of use; each takes logits and its one number."""


def sampled(
    logits: Float[Tensor, "*batch d_vocab"], *, temperature: float, p: float | None, k: int | None
) -> Float[Tensor, "*batch d_vocab"]:
    """Logits of the distribution that `draw` draws from: tempered, then top-k, then top-p, in float32."""
    logits = temper(logits.float(), temperature)
    if k is not None:
        logits = top_k(logits, k)
    if p is not None:
        logits = top_p(logits, p)
    return logits


def draw(
    logits: Float[Tensor, " d_vocab"],
    *,
    temperature: float,
    p: float | None,
    k: int | None,
    generator: torch.Generator,
) -> int:
    """One token: argmax at temperature 0, else a draw from the tempered and truncated distribution."""
    if temperature == 0:
        return int(logits.argmax())
    shares = sampled(logits, temperature=temperature, p=p, k=k).softmax(-1)
    return int(torch.multinomial(shares.cpu(), 1, generator=generator))


@dataclass(frozen=True)
class Kept:
    """What a rule leaves of a distribution P: P' = P/mass on the tokens that stay."""

    size: int
    mass: float
    """P of the tokens that stay."""
    kl: float
    """KL(P'‖P) = −log mass, nats."""
    entropy: float
    """Of P', nats."""


def truncate(logits: Float[Tensor, " d_vocab"], rule: str, number: float) -> Kept:
    """Apply one rule of `TRUNCATIONS` to one distribution, in float64."""
    logits = logits.double()
    stays = TRUNCATIONS[rule](logits, number) > _REMOVED
    log_mass = float(logits[stays].logsumexp(-1) - logits.logsumexp(-1))
    kept = boltzmann(logits[stays])
    # Where all stays, rounding may leave a mass a little above 1.
    return Kept(int(stays.sum()), math.exp(min(log_mass, 0.0)), max(-log_mass, 0.0), float(kept.entropy))


def nucleus_sizes(ascending: Float[Tensor, " d_vocab"], ps: tuple[float, ...]) -> list[int]:
    """Tokens in V(p) for each p, of logits that are sorted already: the sizes of `top_p` in their dtype."""
    mass = ascending.softmax(-1).cumsum(-1)
    thresholds = torch.tensor([1 - p for p in ps], dtype=mass.dtype)
    below = torch.searchsorted(mass, thresholds, right=True)
    return [max(len(mass) - int(n), 1) for n in below]


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
    found = boltzmann(logits, temperature)
    energy = -float(logits[token])
    return (energy - float(found.free_energy)) / temperature, energy


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
    the spread of z. Between them it is searched on 200 points, then refined; there may be several peaks.
    """
    from scipy.optimize import minimize_scalar

    logits = logits.double()
    logits = logits[torch.isfinite(logits)]
    above = logits.max() - logits
    if not bool((above > 0).any()):
        return None
    low, high = math.log(float(above[above > 0].min()) / 20), math.log(2 * float(above.max()))

    def negative(log_tau: float) -> float:
        return -float(boltzmann(logits, math.exp(log_tau)).heat_capacity)

    grid = torch.linspace(low, high, 200, dtype=torch.float64).tolist()
    best = min(range(len(grid)), key=lambda i: negative(grid[i]))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    found = minimize_scalar(negative, bounds=around, method="bounded", options={"xatol": 1e-9})
    return math.exp(float(found.x)), -float(found.fun)


@dataclass(frozen=True)
class Distillation:
    """A student's soft cross-entropy with a teacher's softened distribution, and its gradient."""

    loss: float
    """−Σ p log q, nats, both at τ."""
    kl: float
    """KL(p‖q), nats."""
    gradient: Tensor
    """∂loss/∂(student logits) = (q − p)/τ, float64 [d_vocab]; times τ² it keeps its size as τ grows."""


def distill(
    student: Float[Tensor, " d_vocab"], teacher: Float[Tensor, " d_vocab"], temperature: float
) -> Distillation:
    """Soft targets p = softmax(v/τ) against q = softmax(z/τ) (Hinton et al. 2015, section 2), in float64."""
    if student.shape != teacher.shape:
        raise ValueError(f"vocabularies differ: {student.shape[-1]} and {teacher.shape[-1]} tokens")
    log_q = temper(student.double(), temperature).log_softmax(-1)
    log_p = temper(teacher.double(), temperature).log_softmax(-1)
    p = log_p.exp()
    there = p > 0
    loss = -float((p[there] * log_q[there]).sum())
    kl = max(0.0, float((p[there] * (log_p[there] - log_q[there])).sum()))
    return Distillation(loss, kl, (log_q.exp() - p) / temperature)
