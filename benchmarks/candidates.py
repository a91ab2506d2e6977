"""Section: log P of every candidate tool, all at once against one forward a candidate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import agreement, inputs, others
from benchmarks import ours as engine
from benchmarks.table import Figure, Ratio, Section, Target
from benchmarks.timing import run_rounds

OURS = "ours, prompt and all candidates"
FORWARD = "one plain forward of the prompt"
SINGLE = "one forward a candidate, one by one"
BATCHED = "one forward a candidate, batches of 8"
BATCH = 8
TIMED = 6
"""With more candidates than this, so many are timed one by one, evenly spread, and the time is scaled."""


def measure(ours: engine.Ours, *, n_tools: int, rounds: int) -> Section:
    section = Section("candidates", "Scoring: the same log-probabilities of every candidate tool")
    for prompt, target in ((inputs.few_tools(ours), 4), (inputs.many_tools(ours, n_tools), 30)):
        _contest(section, ours, prompt, rounds, Target("at least", target))
    section.notes.append(
        "One forward a candidate as in lm-evaluation-harness: prompt and candidate together, logits and "
        "log_softmax of all positions. 'No tool' is left out, so that both sides score the tools alone."
    )
    return section


def _contest(section: Section, ours: engine.Ours, prompt: Any, rounds: int, target: Target) -> None:
    hf, ids = ours.hf, prompt.token_ids
    candidates = [list(candidate.token_ids) for candidate in prompt.candidates]
    n = len(candidates)
    alone = _spread(n, TIMED)
    together = sorted(range(n), key=lambda index: -len(candidates[index]))[
        : max(BATCH, n if n <= TIMED else 0)
    ]
    results: dict[str, Any] = {}

    def lone() -> Any:
        return others.forward_per_candidate(hf, ids, [candidates[i] for i in alone], 1)

    def packed() -> Any:
        return others.forward_per_candidate(hf, ids, [candidates[i] for i in together], BATCH)

    contestants: dict[str, Callable[[], Any]] = {
        OURS: lambda: engine.score(ours, prompt),
        FORWARD: lambda: others.prompt_forward(hf, ids),
        SINGLE: lone,
        BATCHED: packed,
    }
    for name in (OURS, FORWARD):
        contestants[name]()
    few = max(1, rounds // 3)
    timings = run_rounds(
        contestants,
        {OURS: rounds, FORWARD: rounds, SINGLE: rounds if n <= TIMED else few, BATCHED: few},
        ours.device,
        seen=lambda name, number, result: results.setdefault(name, result),
    )
    scale = {SINGLE: n / len(alone), BATCHED: n / len(together)}
    for name, factor in scale.items():
        timings.seconds[name] = [seconds * factor for seconds in timings.seconds[name]]
    words = f"{n} tools, {len(ids)} tokens"
    section.ratios += [
        Ratio(f"{words}: {SINGLE} / ours", timings.ratios(SINGLE, OURS), target),
        Ratio(f"{words}: {BATCHED} / ours", timings.ratios(BATCHED, OURS)),
        Ratio(f"{words}: ours / {FORWARD}", timings.ratios(OURS, FORWARD), Target("at most", 1.15)),
    ]
    section.figures += [Figure(f"{n} tools: {name}", took, "s") for name, took in timings.seconds.items()]
    judged = ours.dtype == "float32" and ours.device == "cpu"
    scores = results[OURS]
    oracles: tuple[tuple[str, Sequence[int], list[float]], ...] = (
        (SINGLE, alone, results[SINGLE]),
        (BATCHED, together, results[BATCHED]),
        (
            "transformers on a copy of the prompt's cache",
            range(n),
            others.on_the_prompts_cache(hf, ids, candidates),
        ),
    )
    for name, which, theirs in oracles:
        what = f"{n} tools, {len(which)} of them: {name}"
        section.checks.append(agreement.check_log_probs(what, [scores[i] for i in which], theirs, judged))
    if n > TIMED:
        section.notes.append(
            f"{n} tools: {len(alone)} candidates were timed one by one and {len(together)} in a batch, scaled to "
            f"{n}; every forward costs the same. All {n} log-probabilities were compared."
        )


def _spread(n: int, limit: int) -> list[int]:
    """Indices of at most `limit` of n candidates, evenly spread."""
    return list(range(n)) if n <= limit else [i * n // limit for i in range(limit)]
