"""How a prompt variant moves the output distribution, against the bare input (`base`).

Over the whole vocabulary at the first answer token, and over the choices as whole answers: their summed
log-probabilities, and those normalised to a distribution over the choices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from probe.analyzers.prompting.estimates import NAME
from probe.analyzers.rows import WHOLE_RUN, Grid, Row
from probe.maths.statistics import bootstrap_mean, entropy, js, kl, log_odds, log_softmax, tv, wilson
from probe.prompts.labels import BASE
from probe.runs.read import finished
from probe.runs.records import PromptingRecord, VariantPassage
from probe.runs.views.prompting import Item

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

UNITS = {
    "kl": "nats",
    "kl_reverse": "nats",
    "js": "nats",
    "tv": "probability",
    "entropy_change": "nats",
    "log_odds_shift": "nats",
    "choice_kl": "nats",
    "choice_tv": "probability",
    "answer_log_prob_shift": "nats",
}


def measures(run: Run) -> Iterator[Row | Grid]:
    """Shifts of every variant of every `prompting` task, then their means and the accuracy by variant."""
    shifts: dict[tuple[str, str], list[float]] = defaultdict(list)
    scores: dict[str, list[float]] = defaultdict(list)
    ranks: dict[str, list[int]] = defaultdict(list)
    guesses: list[float] = []
    for task in finished(run, "prompting"):
        for variant, found in _shifts(task).items():
            for name, value in found.items():
                shifts[variant, name].append(value)
                yield _of_task(task, name, value, UNITS[name], variant)
        for variant, rank in _target_ranks(task).items():
            ranks[variant].append(rank)
            yield _of_task(task, "target_rank", rank, "rank", variant)
        for variant, passage in task.typed(PromptingRecord).passages.items():
            if passage.score is not None:
                scores[variant].append(passage.score)
                if variant == BASE:
                    guesses.append(1 / len(passage.choice_probabilities or ()))
    for variant, values in scores.items():
        share = sum(values) / len(values)
        yield _estimate("accuracy", variant, share, "share of tasks", len(values), wilson(share, len(values)))
    if guesses:
        yield _estimate(
            "baseline_uniform", None, float(np.mean(guesses)), "share of tasks", len(guesses), None
        )
    for variant, found in ranks.items():
        inverse = [1 / rank for rank in found]
        interval = bootstrap_mean(inverse)
        yield _estimate(
            "target_reciprocal_rank", variant, float(np.mean(inverse)), "1/rank", len(found), interval
        )
    for (variant, name), values in shifts.items():
        finite = bootstrap_mean(values) if np.isfinite(values).all() else None
        yield _estimate(name, variant, float(np.mean(values)), UNITS[name], len(values), finite)


def _shifts(task: TaskRun) -> dict[str, dict[str, float]]:
    """By variant, what moved against `base`; a number whose tensors were not captured is left out."""
    record = task.typed(PromptingRecord)
    passages, target = record.passages, record.target
    logits = {
        v: log_softmax(task[f"{v}/logits"][0].double().numpy()) for v in passages if f"{v}/logits" in task
    }
    odds = {v: _target_log_odds(passage, target) for v, passage in passages.items()}
    answers = {v: _answers(passage) for v, passage in passages.items()}
    found: dict[str, dict[str, float]] = {}
    for variant in passages:
        if variant == BASE:
            continue
        shift = found[variant] = {}
        if variant in logits and BASE in logits:
            p, q = logits[variant], logits[BASE]
            shift |= {"kl": kl(p, q), "kl_reverse": kl(q, p), "js": js(p, q), "tv": tv(p, q)}
            shift["entropy_change"] = entropy(p) - entropy(q)
        after, before = odds[variant], odds.get(BASE)
        if after is not None and before is not None:
            shift["log_odds_shift"] = after - before
        said, bare = answers[variant], answers.get(BASE, {})
        if len(said) > 1 and said.keys() == bare.keys():
            p, q = (log_softmax(np.array([of[choice] for choice in bare])) for of in (said, bare))
            shift |= {"choice_kl": kl(p, q), "choice_tv": tv(p, q)}
        if target in said and target in bare:
            shift["answer_log_prob_shift"] = said[target] - bare[target]
    return found


def _answers(passage: VariantPassage) -> dict[str, float]:
    """Choice → summed log-probability of all its tokens, nats."""
    return {entry.choice: entry.log_prob for entry in passage.choice_probabilities or ()}


def _target_ranks(task: TaskRun) -> dict[str, int]:
    """By variant, the rank of the target's first token in the vocabulary, 1 the likeliest; where no other choice
    begins with that token."""
    found = {}
    item = Item(task)
    for variant in item.passages:
        token = item.target_token(variant)
        if token is not None and f"{variant}/logits" in task:
            logits = task[f"{variant}/logits"][0]
            found[variant] = int((logits > logits[token]).sum()) + 1
    return found


def _target_log_odds(passage: VariantPassage, target: str | None) -> float | None:
    """Log-odds of the target among the choices, nats."""
    log_probs = _answers(passage)
    if target not in log_probs or len(log_probs) < 2:
        return None
    return float(log_odds([*log_probs.values()], [choice == target for choice in log_probs]))


def _of_task(task: TaskRun, name: str, value: float, unit: str, variant: str) -> Row:
    return Row(task_id=task.id, analyzer=NAME, name=name, value=value, unit=unit, n=1, variant=variant)


def _estimate(
    name: str, variant: str | None, value: float, unit: str, n: int, interval: tuple[float, float] | None
) -> Row:
    low, high = interval or (None, None)
    return Row(
        task_id=WHOLE_RUN,
        analyzer=NAME,
        name=name,
        value=value,
        unit=unit,
        low=low,
        high=high,
        n=n,
        variant=variant,
    )
