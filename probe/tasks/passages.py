"""What every record says of a passage, and the softmax over what could be said in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from probe.maths.agreement import replay_agreement

if TYPE_CHECKING:
    from probe.capture import Outcome
    from probe.prompts import Prompt, Span


def passage_record(prompt: Prompt, outcome: Outcome) -> dict[str, Any]:
    """What a record says of a passage."""
    out = {
        "prompt": prompt.text,
        "token_ids": outcome.token_ids,
        "n_prompt": outcome.n_prompt,
        "n_new": outcome.n_new,
        "completion": outcome.completion,
        "finish_reason": outcome.finish_reason,
        "spans": [
            {"label": span.label, "start": span.start, "end": span.end, "text": text, **_parts(span)}
            for span, text in zip(outcome.spans, outcome.span_texts, strict=True)
        ],
        "template": prompt.template,
    }
    if outcome.token_characters is not None:
        out["token_characters"] = outcome.token_characters
    if prompt.truncation:
        out["truncation"] = prompt.truncation
    if chosen := outcome.parsed.get("given"):
        emitted = [(outcome.log_probs[index], best) for index, best, _ in chosen]
        out["replay_agreement"] = replay_agreement(emitted, [logged for *_, logged in chosen])
    return out


def _parts(span: Span) -> dict[str, Any]:
    return {"parts": [asdict(part) for part in span.parts]} if span.parts else {}


def softmax(log_probs: Sequence[float]) -> list[float]:
    """Probabilities of log-probabilities in nats, which need not sum to one."""
    top = max(log_probs)
    weights = [math.exp(value - top) for value in log_probs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
