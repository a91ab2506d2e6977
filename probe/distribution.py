"""The output distribution: temperature and truncation, as pure functions of logits.

All take logits [..., d_vocab] and return logits of the same shape, truncated tokens at −inf. The order of use
is temperature, top-k, top-p, as in transformers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


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
    return logits.masked_fill(logits < kth, float("-inf"))


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
    return logits.masked_fill(below.scatter(-1, order, below), float("-inf"))


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
    logits = temper(logits.float(), temperature)
    if k is not None:
        logits = top_k(logits, k)
    if p is not None:
        logits = top_p(logits, p)
    return int(torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator))
