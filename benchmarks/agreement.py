"""Whether the contestants computed the same: tokens, log-probabilities, residual stream, attention to spans.

Judged for float32 on the CPU with the tolerances of docs/contract.md, section 5; other dtypes and
devices are reported, up to the token where a sequence forks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.inputs import Inputs
from benchmarks.table import Check

if TYPE_CHECKING:
    from probe.capture import Outcome

RESID = 5e-5
"""max |a − b| / max |b| of a layer's residual stream."""
MASS = 1e-5
LOG_PROB = 1e-4


@dataclass
class Observed:
    """What another contestant found for one sequence. Row t emitted new token t."""

    tokens: list[int]
    """The new ones."""
    log_probs: Tensor | None = None
    """[step], nats."""
    resid: Tensor | None = None
    """[layer, row, d_model] after each block; layers from 0 on, perhaps not all."""
    pattern: Tensor | None = None
    """[layer, head, row, position], positions of the sequence without padding."""


def from_eager(out: Any, inputs: Inputs) -> list[Observed]:
    """What transformers' `generate` gave: its last hidden state is normed already and left out."""
    width = max(inputs.lengths)
    new = out.sequences[:, width:].cpu()
    logits = torch.stack([step.float() for step in out.logits], 1).cpu()
    log_probs = logits.log_softmax(-1).gather(2, new[..., None])[..., 0]
    resid = torch.stack(
        [torch.stack([layer[:, -1] for layer in step[1:-1]], 1) for step in out.hidden_states], 2
    ).cpu()
    observed = []
    for row, length in enumerate(inputs.lengths):
        pattern = _patterns(out.attentions, row, width, length)
        observed.append(Observed(new[row].tolist(), log_probs[row], resid[row], pattern))
    return observed


def _patterns(attentions: Any, row: int, width: int, length: int) -> Tensor:
    """[layer, head, step, position]; keys that a step did not have yet, or no longer, are 0."""
    n_steps, n_keys = len(attentions), length + len(attentions) - 1
    patterns = torch.zeros(len(attentions[0]), attentions[0][0].shape[1], n_steps, n_keys)
    for step, layers in enumerate(attentions):
        seen = length + step
        for layer, weights in enumerate(layers):
            # Padding is in front; a layer with a window may have dropped keys there as well.
            kept = min(seen, weights.shape[-1])
            patterns[layer, :, step, seen - kept : seen] = weights[row, :, -1, -kept:].cpu().float()
    return patterns


def from_bridge(tokens: list[int], cache: Any, length: int, n_layers: int) -> Observed:
    """What one sequence's ActivationCache over prompt and completion gave."""
    rows = slice(length - 1, length - 1 + len(tokens))
    n_keys = length + len(tokens) - 1
    resid = torch.stack([cache[f"blocks.{i}.hook_resid_post"][0, rows] for i in range(n_layers)])
    pattern = [cache[f"blocks.{i}.attn.hook_pattern"][0, :, rows, :n_keys] for i in range(n_layers)]
    return Observed(tokens, None, resid.cpu(), torch.stack(pattern).float().cpu())


def new_tokens(outcome: Outcome) -> list[int]:
    return list(outcome.token_ids[outcome.n_prompt :])


def check_tokens(what: str, outcomes: Sequence[Outcome], emitted: Sequence[list[int]], judged: bool) -> Check:
    """Whether the generated ids are identical in every sequence."""
    forks = [_fork(new_tokens(outcome), tokens) for outcome, tokens in zip(outcomes, emitted, strict=True)]
    same = sum(fork is None for fork in forks)
    text = f"{same} of {len(forks)} sequences identical"
    if same < len(forks):
        text += f", first fork at step {min(fork for fork in forks if fork is not None)}"
    return Check(f"tokens: {what}", same == len(forks) if judged else None, text)


def check_captures(
    what: str, outcomes: Sequence[Outcome], captured: Sequence[Observed], judged: bool
) -> list[Check]:
    """Tokens, and whatever else the other contestant observed, over the rows before a fork."""
    checks = [check_tokens(what, outcomes, [observed.tokens for observed in captured], judged)]
    kinds: tuple[tuple[str, float, Callable[[Outcome, Observed, int], float | None]], ...] = (
        ("resid_post, relative", RESID, _resid_gap),
        ("attn_to_spans", MASS, _mass_gap),
        ("log_probs, nats", LOG_PROB, _log_prob_gap),
    )
    for name, limit, gap in kinds:
        gaps = []
        for outcome, observed in zip(outcomes, captured, strict=True):
            fork = _fork(new_tokens(outcome), observed.tokens)
            # The row of the fork has seen the same tokens: it belongs to what is compared.
            value = gap(outcome, observed, len(observed.tokens) if fork is None else fork + 1)
            if value is not None:
                gaps.append(value)
        if gaps:
            worst = float(torch.tensor(gaps).max())  # NaN stays NaN, and is not below the limit
            passed = worst <= limit if judged else None
            checks.append(Check(f"{name}: {what}", passed, f"max |Δ| {worst:.1e} (limit {limit:.0e})"))
    return checks


def check_log_probs(what: str, ours: Sequence[float], theirs: Sequence[float], judged: bool) -> Check:
    """Log-probabilities of candidates, nats."""
    worst = float((torch.tensor(ours).double() - torch.tensor(theirs).double()).abs().max())
    passed = worst <= LOG_PROB if judged else None
    return Check(f"log-probs: {what}", passed, f"max |Δ| {worst:.1e} nats (limit {LOG_PROB:.0e})")


def check_outcomes(what: str, ours: Sequence[Outcome], again: Sequence[Outcome], judged: bool) -> list[Check]:
    """Two ways of ours to run the same prompts: tokens, resid_post, attn_to_spans and log_probs."""
    checks = [check_tokens(what, ours, [new_tokens(outcome) for outcome in again], judged)]
    for name, limit in (("resid_post", RESID), ("attn_to_spans", MASS), ("log_probs", LOG_PROB)):
        gaps = []
        for first, second in zip(ours, again, strict=True):
            a, b = first.tensors[name].double(), second.tensors[name].double()
            gaps.append(_relative(a, b) if name == "resid_post" else float((a - b).abs().max()))
        worst = float(torch.tensor(gaps).max())
        passed = worst <= limit if judged else None
        checks.append(Check(f"{name}: {what}", passed, f"max |Δ| {worst:.1e} (limit {limit:.0e})"))
    return checks


def _fork(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """First step whose tokens differ."""
    if list(ours) == list(theirs):
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((step for step, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def _resid_gap(outcome: Outcome, observed: Observed, n_rows: int) -> float | None:
    if observed.resid is None:
        return None
    theirs = observed.resid[:, :n_rows].double()
    return _relative(outcome.tensors["resid_post"][: len(theirs), :n_rows].double(), theirs)


def _relative(actual: Tensor, expected: Tensor) -> float:
    """Largest over the layers of max |a − b| / max |b|."""
    gaps = (actual - expected).abs().flatten(1).max(1).values / expected.abs().flatten(1).max(1).values
    return float(gaps.max())


def _mass_gap(outcome: Outcome, observed: Observed, n_rows: int) -> float | None:
    if observed.pattern is None:
        return None
    gaps = []
    for column, label in enumerate(outcome.labels):
        if label == "sink":
            continue
        mass = sum(
            observed.pattern[:, :, :n_rows, span.start : span.end].sum(-1)
            for span in outcome.spans
            if span.label == label
        )
        gaps.append(float((outcome.tensors["attn_to_spans"][:, :, :n_rows, column] - mass).abs().max()))
    return float(torch.tensor(gaps).max())


def _log_prob_gap(outcome: Outcome, observed: Observed, n_rows: int) -> float | None:
    if observed.log_probs is None:
        return None
    # At a fork the two log-probabilities are of different tokens.
    same = [a == b for a, b in zip(new_tokens(outcome), observed.tokens, strict=True)][:n_rows]
    gaps = (outcome.tensors["log_probs"][:n_rows] - observed.log_probs[:n_rows]).abs()[torch.tensor(same)]
    return float(gaps.max()) if len(gaps) else None
