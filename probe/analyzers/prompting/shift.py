"""How a prompt variant moves the output distribution, against the bare input (`base`).

Over the whole vocabulary at the first answer token, and over the choices as whole answers: their summed
log-probabilities, and those normalised to a distribution over the choices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from probe.analyzers.registry import OVER_TASKS, SHARE, WILSON, Figure, Measure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.statistics import entropy, js, kl, log_odds, log_softmax, tv
from probe.prompts.labels import BASE
from probe.runs.read import finished
from probe.runs.records import PromptingRecord, VariantPassage
from probe.runs.views.prompting import Item

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

NAME = "prompting"


def _shift(name: str, unit: str, means: str, needs: Sequence[str] = (), card: str | None = None) -> Measure:
    """What a variant changes against `base`, and its mean over tasks."""
    return measure(
        NAME,
        name,
        unit=unit,
        of="task run",
        axes="variant",
        means=means,
        interval=OVER_TASKS,
        needs=tuple(needs),
        figure=Figure(kind="estimates", by="variant", card=card),
    )


_FIRST = "over the whole vocabulary, of the answer's first token"
_LOGITS = ("logits",)
KL = _shift("kl", "nats", f"KL(variant‖base) {_FIRST}.", _LOGITS, "prompting")
KL_REVERSE = _shift("kl_reverse", "nats", f"KL(base‖variant) {_FIRST}.", _LOGITS)
JS = _shift(
    *("js", "nats", f"Jensen–Shannon divergence of variant and base {_FIRST}: 0 to ln 2."),
    *(_LOGITS, "prompting"),
)
TV = _shift(
    *("tv", "probability", f"Total variation ½ Σ |p − q| of variant and base {_FIRST}: 0 to 1."),
    *(_LOGITS, "prompting"),
)
ENTROPY_CHANGE = _shift(
    "entropy_change",
    "nats",
    f"Entropy under the variant less that under base, {_FIRST}.",
    _LOGITS,
    "prompting",
)
LOG_ODDS_SHIFT = _shift(
    "log_odds_shift",
    "nats",
    "Change of the target's log-odds among the choices, as whole answers.",
    card="prompting",
)
CHOICE_KL = _shift("choice_kl", "nats", "KL(variant‖base) over the choices, as whole answers.")
CHOICE_TV = _shift("choice_tv", "probability", "Total variation over the choices, as whole answers.")
ANSWER_LOG_PROB_SHIFT = _shift(
    "answer_log_prob_shift", "nats", "Change of the whole target's log-probability, summed over its tokens."
)
TARGET_RANK = measure(
    NAME,
    "target_rank",
    unit="rank",
    axes="variant",
    means="Rank of the target's first token in the vocabulary, 1 the likeliest, where no other choice begins with that "
    "token; under `base` too.",
    needs=_LOGITS,
    figure=Figure(kind="estimates", by="variant"),
)
TARGET_RECIPROCAL_RANK = measure(
    NAME,
    "target_reciprocal_rank",
    unit="1/rank",
    of="run",
    axes="variant",
    means="Mean of 1/`target_rank` over tasks.",
    interval=SHARE,
    needs=_LOGITS,
    figure=Figure(kind="estimates", by="variant"),
)
ACCURACY = measure(
    NAME,
    "accuracy",
    unit="share of tasks",
    of="run",
    axes="variant",
    means="Share of tasks whose target is the likeliest choice.",
    interval=WILSON,
    figure=Figure(kind="estimates", by="variant", card="bias"),
)
BASELINE_UNIFORM = measure(
    NAME,
    "baseline_uniform",
    unit="share of tasks",
    of="run",
    means="`accuracy` of an even guess: the mean of 1 by the number of choices.",
    figure=Figure(kind="text"),
)


def measures(run: Run) -> Iterator[Row]:
    """Shifts of every variant of every `prompting` task, then their means and the accuracy by variant."""
    shifts: dict[tuple[str, Measure], list[float]] = defaultdict(list)
    scores: dict[str, list[float]] = defaultdict(list)
    ranks: dict[str, list[int]] = defaultdict(list)
    guesses: list[float] = []
    for task in finished(run, "prompting"):
        for variant, values in _shifts(task).items():
            for defined, value in values.items():
                shifts[variant, defined].append(value)
                yield defined.row(task.id, value, variant=variant)
        for variant, rank in _target_ranks(task).items():
            ranks[variant].append(rank)
            yield TARGET_RANK.row(task.id, rank, variant=variant)
        for variant, passage in task.typed(PromptingRecord).passages.items():
            if passage.score is not None:
                scores[variant].append(passage.score)
                if variant == BASE:
                    guesses.append(1 / len(passage.choice_probabilities or ()))
    for variant, values in scores.items():
        yield ACCURACY.share(values, variant=variant)
    if guesses:
        yield BASELINE_UNIFORM.row(WHOLE_RUN, float(np.mean(guesses)), n=len(guesses))
    for variant, values in ranks.items():
        yield TARGET_RECIPROCAL_RANK.share([1 / rank for rank in values], variant=variant)
    for (variant, defined), values in shifts.items():
        yield defined.mean(values, variant=variant)


def _shifts(task: TaskRun) -> dict[str, dict[Measure, float]]:
    """By variant, what moved against `base`; a number whose tensors were not captured is left out."""
    record = task.typed(PromptingRecord)
    passages, target = record.passages, record.target
    logits = {
        v: log_softmax(task[f"{v}/logits"][0].double().numpy()) for v in passages if f"{v}/logits" in task
    }
    odds = {v: _target_log_odds(passage, target) for v, passage in passages.items()}
    answers = {v: _answers(passage) for v, passage in passages.items()}
    shifts: dict[str, dict[Measure, float]] = {}
    for variant in passages:
        if variant == BASE:
            continue
        shift = shifts[variant] = {}
        if variant in logits and BASE in logits:
            p, q = logits[variant], logits[BASE]
            shift |= {KL: kl(p, q), KL_REVERSE: kl(q, p), JS: js(p, q), TV: tv(p, q)}
            shift[ENTROPY_CHANGE] = entropy(p) - entropy(q)
        after, before = odds[variant], odds.get(BASE)
        if after is not None and before is not None:
            shift[LOG_ODDS_SHIFT] = after - before
        prompted, bare = answers[variant], answers.get(BASE, {})
        if len(prompted) > 1 and prompted.keys() == bare.keys():
            p, q = (log_softmax(np.array([of[choice] for choice in bare])) for of in (prompted, bare))
            shift |= {CHOICE_KL: kl(p, q), CHOICE_TV: tv(p, q)}
        if target in prompted and target in bare:
            shift[ANSWER_LOG_PROB_SHIFT] = prompted[target] - bare[target]
    return shifts


def _answers(passage: VariantPassage) -> dict[str, float]:
    """Choice → summed log-probability of all its tokens, nats."""
    return {entry.choice: entry.log_prob for entry in passage.choice_probabilities or ()}


def _target_ranks(task: TaskRun) -> dict[str, int]:
    """By variant, the rank of the target's first token in the vocabulary, 1 the likeliest; where no other choice
    begins with that token."""
    ranks = {}
    item = Item(task)
    for variant in item.outcomes:
        token = item.target_token(variant)
        if token is not None and f"{variant}/logits" in task:
            logits = task[f"{variant}/logits"][0]
            ranks[variant] = int((logits > logits[token]).sum()) + 1
    return ranks


def _target_log_odds(passage: VariantPassage, target: str | None) -> float | None:
    """Log-odds of the target among the choices, nats."""
    log_probs = _answers(passage)
    if target not in log_probs or len(log_probs) < 2:
        return None
    return float(log_odds([*log_probs.values()], [choice == target for choice in log_probs]))
