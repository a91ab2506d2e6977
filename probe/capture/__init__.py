"""Running prompts and keeping what the model computes on the way.

spec → candidates, prefixes, passage → turns → batch: what is asked and given, candidates packed into one
forward, prefixes run once, the tensors of a finished sequence, the turns of an agent, and the batch that ties
them together.
"""

from probe.capture.batch import Capturer, run_batch
from probe.capture.forced import Forced, Variant, token_log_probs
from probe.capture.prefixes import plan_shared
from probe.capture.spec import (
    ANSWER_TOKENS,
    AXES,
    CUE_TOKENS,
    SITES,
    CaptureSpec,
    Generation,
    Job,
    NonFinite,
    Outcome,
)
from probe.capture.turns import Conversation, Reply, Turn

__all__ = [
    "ANSWER_TOKENS",
    "AXES",
    "CUE_TOKENS",
    "SITES",
    "CaptureSpec",
    "Capturer",
    "Conversation",
    "Forced",
    "Generation",
    "Job",
    "NonFinite",
    "Outcome",
    "Reply",
    "Turn",
    "Variant",
    "plan_shared",
    "run_batch",
    "token_log_probs",
]
