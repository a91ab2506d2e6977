"""Section: a reasoning of 40 steps and 1,000 tokens: what its reads and its knock-outs cost, in forwards."""

from __future__ import annotations

from typing import Any

from benchmarks import others
from benchmarks import ours as engine
from benchmarks.table import Figure, Ratio, Section, Target
from benchmarks.timing import run_rounds

STEPS, TOKENS = 40, 1000
FORWARD = "one plain forward"
BARE, READS = "prefill, nothing captured", "prefill with reads"
KNOCKOUTS = "all knock-outs with random controls"


def measure(ours: engine.Ours, *, rounds: int, n_tokens: int = TOKENS) -> Section:
    reasoning = engine.Reasoning(ours, STEPS, n_tokens)
    contestants = {
        FORWARD: lambda: others.prompt_forward(ours.hf, reasoning.token_ids),
        BARE: lambda: reasoning.prefill(reads=False),
        READS: lambda: reasoning.prefill(reads=True),
        KNOCKOUTS: reasoning.knockouts,
    }
    for name in (FORWARD, BARE, READS):
        contestants[name]()  # first calls allocate and choose kernels
    few = max(1, rounds // 3)
    counts = {FORWARD: rounds, BARE: rounds, READS: rounds, KNOCKOUTS: few}
    timings = run_rounds(contestants, counts, ours.device)
    seconds: dict[str, Any] = timings.seconds
    plain = seconds[FORWARD]
    reads = [(b - a) / f for a, b, f in zip(seconds[BARE], seconds[READS], plain, strict=True)]
    section = Section("reasoning", f"A reasoning of {STEPS} steps and {n_tokens:,} tokens")
    section.ratios = [
        Ratio("reads, mass and norm / one forward", reads, Target("at most", 0.2)),
        Ratio("knock-outs / one forward", timings.ratios(KNOCKOUTS, FORWARD), Target("at most", 50)),
    ]
    section.figures = [Figure(name, took, "s") for name, took in seconds.items()]
    section.notes = [
        f"Random tokens; the forward is transformers' own, with logits of the last position alone. Knock-outs are total and "
        f"direct of the question and every step, each beside a random run: {reasoning.forwards:.1f} times the tokens, "
        "and KL over the whole vocabulary at every row behind the change."
    ]
    return section
