"""Running prompts and keeping what the model computes on the way.

sites, controller → spec → candidates, prefixes, passage → turns → batch: what can be kept, who drives a
sequence (`reasoning`, `transcript`), what is asked and given, candidates packed into one forward, prefixes run once,
the tensors of a finished sequence, the turns of an agent, and the batch that ties them together. Importing this package does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.capture.batch import Capturer, run_batch
    from probe.capture.controller import Controller
    from probe.capture.prefixes import Prefixes, plan_shared
    from probe.capture.reasoning import ANSWER_TOKENS, CUE_TOKENS, Reasoning
    from probe.capture.recurrence import state_stretches
    from probe.capture.reference import Continuation, Reference, token_log_probs
    from probe.capture.sites import SITES, Site
    from probe.capture.spec import CaptureSpec, Generation, Job, NonFinite, Outcome
    from probe.capture.transcript import Conversation, Reply, Transcript, Turn

__all__ = [
    "ANSWER_TOKENS",
    "CUE_TOKENS",
    "SITES",
    "CaptureSpec",
    "Capturer",
    "Continuation",
    "Controller",
    "Conversation",
    "Generation",
    "Job",
    "NonFinite",
    "Outcome",
    "Prefixes",
    "Reasoning",
    "Reference",
    "Reply",
    "Site",
    "Transcript",
    "Turn",
    "plan_shared",
    "run_batch",
    "state_stretches",
    "token_log_probs",
]

_MODULES = {
    "Controller": "controller",
    "ANSWER_TOKENS": "reasoning",
    "CUE_TOKENS": "reasoning",
    "Reasoning": "reasoning",
    "SITES": "sites",
    "Site": "sites",
    "CaptureSpec": "spec",
    "Generation": "spec",
    "Job": "spec",
    "NonFinite": "spec",
    "Outcome": "spec",
    "Conversation": "transcript",
    "Reply": "transcript",
    "Transcript": "transcript",
    "Turn": "transcript",
    "Capturer": "batch",
    "run_batch": "batch",
    "Reference": "reference",
    "Continuation": "reference",
    "token_log_probs": "reference",
    "state_stretches": "recurrence",
    "Prefixes": "prefixes",
    "plan_shared": "prefixes",
}
"""What is loaded when it is first asked for → its module; the captures themselves load torch."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"probe.capture.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'probe.capture' has no attribute {name!r}")
