"""What rules leave of one distribution: number of tokens, mass, divergence. Sorted once for any number of rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probe.maths.truncation import TRUNCATIONS


@dataclass(frozen=True)
class Truncation:
    """What a rule leaves of a distribution P: P' = P/mass on the tokens that stay."""

    size: int
    mass: float
    """P of the tokens that stay."""
    kl: float
    """KL(P'‖P) = −log mass, nats."""
    entropy: float
    """Entropy of P', nats."""


class TokenRanking:
    """A distribution with its tokens in order of probability.

    Which tokens a rule of `TRUNCATIONS` keeps is decided in the dtype of the logits, so exactly as in sampling;
    their mass, KL and entropy are summed in float64. A logit of −inf is a token without probability.
    """

    def __init__(self, logits: Float[Tensor, " d_vocab"]):
        self.logits = logits.detach().cpu()
        # By numpy, and values alone: a third of the time of torch, which sorts indices too.
        self.ascending = torch.from_numpy(np.sort(self.logits.numpy()))

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        """Mass of the i + 1 least probable tokens, and Σ −p log p of the i + 1 most probable ones."""
        log_p = self.ascending.double().log_softmax(-1)
        p = log_p.exp()
        surprise = (p * -log_p.clamp_min(-1e300)).flip(-1)
        return p.cumsum(-1), surprise.cumsum(-1)

    @cached_property
    def _mass(self) -> Tensor:
        """Cumulative mass as `top_p` sums it, in the dtype of the logits."""
        return self.ascending.softmax(-1).cumsum(-1)

    def nucleus_size(self, p: float) -> int:
        """|V(p)|: how many tokens `top_p` keeps."""
        if not 0 < p <= 1:
            raise ValueError(f"top-p must be in (0, 1], not {p}")
        below = int(torch.searchsorted(self._mass, torch.tensor(1 - p, dtype=self._mass.dtype), right=True))
        # A token at −inf is cut by every rule before it is counted.
        possible = int((self.ascending > -math.inf).sum())
        return min(max(len(self._mass) - below, 1), possible)

    def kept(self, rule: str, number: float) -> Truncation:
        """What a rule of `TRUNCATIONS` leaves. Raises ValueError for a number that the rule does not take."""
        if rule == "top-p":
            return self._most_probable(self.nucleus_size(number))
        stays = TRUNCATIONS[rule](self.logits, number) > -math.inf
        if rule == "typical":
            return self._any(stays)
        return self._most_probable(int(stays.sum()))

    def _most_probable(self, n: int) -> Truncation:
        below, surprise = self._sums
        cut = float(below[-n - 1]) if n < len(below) else 0.0
        log_mass = math.log1p(-cut) if cut < 0.5 else math.log(self._share(n))
        mass = math.exp(log_mass)
        return Truncation(n, mass, -log_mass + 0.0, max(0.0, float(surprise[n - 1]) / mass + log_mass))

    def _share(self, n: int) -> float:
        """Mass of the n most probable tokens, where the rest is most of it."""
        top = self.ascending[-n:].double()
        return math.exp(float(top.logsumexp(-1) - self.ascending.double().logsumexp(-1)))

    def _any(self, stays: Tensor) -> Truncation:
        kept = self.logits[stays].double()
        log_mass = min(0.0, float(kept.logsumexp(-1) - self.logits.double().logsumexp(-1)))
        log_p = kept.log_softmax(-1)
        return Truncation(
            int(stays.sum()), math.exp(log_mass), -log_mass + 0.0, -float((log_p.exp() * log_p).sum())
        )
