"""What becomes of the choice without the heads that point at a tool, beside random heads of the same number.

Reads the experiments `base` and `heads` of the run's interventions: the heads were chosen on one half of the
tasks, each task belongs to the other half. Without the band of random heads an effect says nothing: taking any
ten heads away moves the choice.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probe.analyzers.rows import WHOLE_RUN, Row, finished
from probe.maths.statistics import bootstrap_mean, log_odds, wilson
from probe.prompts.labels import UNCHANGED

if TYPE_CHECKING:
    from probe.runs import Run

_NAME = "tool"
Scores = dict[str | None, float]
"""Log-probability of each candidate, no tool as None, nats."""


def measures(run: Run) -> Iterator[Row]:
    """`head_ablation`, its rank in the random band and the accuracy before and after, by what was ablated."""
    for group, trials in sorted(_trials(run).items()):
        sets = [trial for trial in trials if trial.alone is None]
        yield from _effects(group, sets)
        yield from _accuracies(group, sets)
        for head in sorted({trial.alone for trial in trials if trial.alone is not None}):
            changes = [trial.change for trial in trials if trial.alone == head]
            row = _row("head_ablation", group, "alone", changes, "nats", None)
            yield replace(row, layer=head[0], head=head[1])


class _Group(NamedTuple):
    """Trials that are compared with each other."""

    target: str
    """`chosen` or `right`: what the chosen heads point at."""
    replace: str
    """`zero` or `mean`: what took the place of their reads."""


@dataclass(frozen=True)
class _Trial:
    """One task under one set of heads."""

    task_id: str
    half: int
    """The half of the tasks on which the heads were chosen."""
    heads: str | None
    """The set of random heads, None for the chosen ones."""
    change: float
    """Of the log-odds of the target against all other candidates, nats."""
    right: bool
    right_before: bool
    alone: tuple[int, int] | None = None
    """The one head that was ablated, (layer, head), where it is one of the chosen ones by itself."""


def _trials(run: Run) -> dict[_Group, list[_Trial]]:
    frame = run.interventions()
    found: dict[_Group, list[_Trial]] = defaultdict(list)
    if frame.empty:
        return found
    scores: dict[tuple[str, str, int], Scores] = defaultdict(dict)
    details: dict[str, dict[int, Any]] = defaultdict(dict)
    kept = frame[frame["experiment"].isin([UNCHANGED, "heads"])]
    columns = ("task_id", "experiment", "condition", "detail", "tool", "log_prob")
    for task_id, experiment, condition, detail, tool, log_prob in zip(
        *(kept[column].tolist() for column in columns), strict=True
    ):
        scores[task_id, experiment, condition][tool if isinstance(tool, str) else None] = log_prob
        if experiment == "heads":
            details[task_id][condition] = detail
    for task in finished(run, "tool_selection"):
        base = scores.get((task.id, UNCHANGED, 0))
        for condition, text in details[task.id].items() if base else ():
            detail = json.loads(text)
            trial = _trial(task.id, task.record, detail, base or {}, scores[task.id, "heads", condition])
            if trial is not None:
                found[_Group(detail["target"], detail.get("replace", "zero"))].append(trial)
    return found


def _trial(
    task_id: str, record: dict[str, Any], detail: dict[str, Any], before: Scores, after: Scores
) -> _Trial | None:
    """None where the target is no candidate, or every candidate is one."""
    target, right = _target(record, detail["target"]) & set(before), _target(record, "right")
    if not target or not set(before) - target:
        return None
    return _Trial(
        task_id,
        detail["half"],
        None if detail["set"] == "chosen" else json.dumps(sorted(detail["heads"])),
        _log_odds(after, target) - _log_odds(before, target),
        max(after, key=after.__getitem__) in right,
        max(before, key=before.__getitem__) in right,
        tuple(detail["heads"][0]) if detail["set"] == "alone" else None,
    )


def _target(record: dict[str, Any], kind: str) -> set[str | None]:
    if kind == "chosen":
        return {record["chosen_tool"]}
    target = record["target"] or None
    return set(target) if isinstance(target, list) else {target}


def _log_odds(log_probs: Scores, target: set[str | None]) -> float:
    return float(log_odds([*log_probs.values()], [name in target for name in log_probs]))


# -- rows ----------------------------------------------------------------------------------------------------------


def _effects(group: _Group, trials: list[_Trial]) -> Iterator[Row]:
    """Of the heads of each half, then of both together: every task is tested once."""
    for half in (0, 1, None):
        own = [trial for trial in trials if half is None or trial.half == half]
        chosen = [trial.change for trial in own if trial.heads is None]
        sets = _by_set(own)
        for variant, values in (("chosen", chosen), ("random", _task_means(own))):
            if values:
                yield _row("head_ablation", group, variant, values, "nats", half)
        if chosen and sets:
            larger = sum(mean <= np.mean(chosen) for mean in sets)
            low, high = wilson(larger / len(sets), len(sets))
            # The chosen set counts as one of the draws, so that no p-value is 0 (Phipson & Smyth 2010).
            yield Row(
                **_place("head_ablation_rank", group, "chosen", half),
                value=(1 + larger) / (1 + len(sets)),
                unit="p-value",
                low=low,
                high=high,
                n=len(sets),
            )


def _by_set(trials: list[_Trial]) -> list[float]:
    """Mean change of each random set; the i-th sets of the two halves are one, as their tasks are one run."""
    sets: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        if trial.heads is not None:
            sets[trial.half][trial.heads].append(trial.change)
    return [
        float(np.mean([change for part in parts for change in part]))
        for parts in zip(*(by_heads.values() for by_heads in sets.values()), strict=False)
    ]


def _task_means(trials: list[_Trial]) -> list[float]:
    """Mean change of each task over the random sets."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for trial in trials:
        if trial.heads is not None:
            by_task[trial.task_id].append(trial.change)
    return [float(np.mean(changes)) for changes in by_task.values()]


def _accuracies(group: _Group, trials: list[_Trial]) -> Iterator[Row]:
    """Shares of right choices, no tool included, of the tasks under the chosen heads and under random ones."""
    chosen = [trial for trial in trials if trial.heads is None]
    for variant, hits in (
        ("base", [trial.right_before for trial in chosen]),
        ("chosen", [trial.right for trial in chosen]),
    ):
        if hits:
            share = sum(hits) / len(hits)
            low, high = wilson(share, len(hits))
            yield Row(
                **_place("head_ablation_accuracy", group, variant, None),
                value=share,
                unit="share of tasks",
                low=low,
                high=high,
                n=len(hits),
            )
    by_task: dict[str, list[bool]] = defaultdict(list)
    for trial in trials:
        if trial.heads is not None:
            by_task[trial.task_id].append(trial.right)
    if by_task:
        shares = [sum(hits) / len(hits) for hits in by_task.values()]
        yield _row("head_ablation_accuracy", group, "random", shares, "share of tasks", None)


def _row(name: str, group: _Group, variant: str, values: list[float], unit: str, half: int | None) -> Row:
    low, high = bootstrap_mean(values) or (None, None)
    return Row(
        **_place(name, group, variant, half),
        value=float(np.mean(values)),
        unit=unit,
        low=low,
        high=high,
        n=len(values),
    )


def _place(name: str, group: _Group, variant: str, half: int | None) -> dict[str, Any]:
    """`variant` says which heads were ablated, `span` at what the chosen ones point and where they were chosen."""
    where = group.target if half is None else f"{group.target}, chosen on half {half}"
    return {
        "task_id": WHOLE_RUN,
        "analyzer": _NAME,
        "name": name,
        "variant": variant if group.replace == "zero" else f"{variant}/{group.replace}",
        "span": where,
    }
