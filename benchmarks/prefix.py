"""Section: tasks over one catalogue, their common prefix run once against run for every task."""

from __future__ import annotations

from typing import Any

from benchmarks import agreement, inputs
from benchmarks import ours as engine
from benchmarks.table import Figure, Ratio, Section, Target

SHARED, APART = "prefix shared", "every prompt in full"


def measure(ours: engine.Ours, *, n_tasks: int, rounds: int) -> Section:
    plans = inputs.one_catalogue(ours, n_tasks)
    seconds: dict[str, list[float]] = {SHARED: [], APART: []}
    outcomes: dict[str, Any] = {}
    for share in (True, False):
        engine.prefill_seconds(ours, plans[:2], share)  # first calls allocate and choose kernels
    for _ in range(rounds):
        for name in (SHARED, APART):
            took, outcomes[name] = engine.prefill_seconds(ours, plans, name == SHARED)
            seconds[name].append(took)
    ratios = [apart / shared for apart, shared in zip(seconds[APART], seconds[SHARED], strict=True)]
    title = f"Prefill of {n_tasks} tasks over one catalogue of {inputs.CATALOGUE} tools"
    section = Section("prefix", title, ratios=[Ratio(f"{APART} / {SHARED}", ratios, Target("at least", 3))])
    section.figures = [Figure(name, took, "s") for name, took in seconds.items()]
    judged = ours.dtype == "float32" and ours.device == "cpu"
    section.checks = agreement.check_outcomes(
        "shared against in full", outcomes[SHARED], outcomes[APART], judged
    )
    lengths = [inputs.length(plan) for plan in plans]
    section.notes = [
        f"Prompts of {min(lengths)} to {max(lengths)} tokens, of which all share the first "
        f"{_common([plan.prompts[0].token_ids for plan in plans])}. Default capture, one token emitted."
    ]
    return section


def _common(prompts: list[list[int]]) -> int:
    """Length of the token prefix that all prompts have."""
    first, last = min(prompts), max(prompts)
    pairs = zip(first, last, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))
