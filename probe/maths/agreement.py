"""How far the model at hand agrees with the program that chose the tokens: a log, or the generator of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

AGREEMENT = 0.05
"""Nats of mean |Δ log p| beyond which the model at hand is not the one of the log, for the numbers' purposes: twice and more what
bfloat16 in place of float32 makes of the default model, half of what an edit of 10 % of its attention weights does
(tasks/README.md)."""
SHARE = 0.5
"""Share of emitted tokens that are the argmax below which, without logged log-probabilities, the same is said."""


def replay_agreement(emitted: Sequence[tuple[float, bool]], logged: Sequence[float | None]) -> dict[str, Any]:
    """How far a model agrees with what was logged: `emitted` has of each token its log-probability, nats, and whether it is
    the argmax; `logged` the log's own.

    `n_tokens`, `argmax_share`, and where the log has log-probabilities `n_log_probs`, `mean_delta_log_prob` and
    `largest_delta_log_prob` of |Δ|; `disagrees` beyond `AGREEMENT` nats in the mean, without them below `SHARE`.
    """
    share = sum(best for _, best in emitted) / len(emitted)
    out: dict[str, Any] = {"n_tokens": len(emitted), "argmax_share": share}
    if len(logged) not in (0, len(emitted)):
        out["logprobs_left_out"] = f"{len(logged)} for {len(emitted)} tokens"
        logged = ()
    gaps = [
        abs(log_prob - was) for (log_prob, _), was in zip(emitted, logged, strict=False) if was is not None
    ]
    if not gaps:
        return out | {"disagrees": share < SHARE}
    mean = math.fsum(gaps) / len(gaps)
    return out | {
        "n_log_probs": len(gaps),
        "mean_delta_log_prob": mean,
        "largest_delta_log_prob": max(gaps),
        "disagrees": mean > AGREEMENT,
    }
