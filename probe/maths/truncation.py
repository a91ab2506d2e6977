"""Temperature, truncation and drawing: logits [..., d_vocab] in, logits of the same shape out, cut tokens at −inf.

The order of use is temperature, top-k, top-p, min-p, typical, epsilon, eta, as in transformers, and each rule keeps
what the logits processor of that name keeps, ties and the token at the border included: the arithmetic is the same,
in the dtype of the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

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
