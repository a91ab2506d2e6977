"""What becomes of the choice without the heads that point at a tool, beside random heads of the same number.

Reads the experiments `base` and `heads` of the run's interventions: the heads were chosen on one half of the
tasks, each task belongs to the other half. Without the band of random heads an effect says nothing: taking any
ten heads away moves the choice.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probe.analyzers.registry import MEAN, WILSON, Figure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.intervals import LEAST, wilson
from probe.maths.statistics import log_odds
from probe.runs.views.choice import Choice
from probe.runs.views.conditions import read_conditions

if TYPE_CHECKING:
    from probe.runs import Run

_NEEDS = ("experiment:heads",)
TOGETHER, RANDOM, ALONE = "together", "random", "alone"
HEAD_ABLATION = measure(
    "tool",
    "head_ablation",
    unit="nats",
    of="run",
    axes="role heads replacement half? layer? head?",
    means="Change in the log-odds of the target against all other candidates when heads are ablated from the decision on: "
    "those that point best at it on one half of the tasks, in the other half, `together` or one `alone`; `random` is the "
    "mean over random sets of as many heads. With `half` only of the heads chosen on that half.",
    interval=MEAN,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="heads", card="heads"),
)
HEAD_ABLATION_NET = measure(
    "tool",
    "head_ablation_minus_random",
    unit="nats",
    of="run",
    axes="role replacement half?",
    means="`head_ablation` of the heads together less the task's own mean over random sets: paired by task, over the tasks "
    "that have both.",
    interval=MEAN,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="role", card="heads"),
)
HEAD_ABLATION_RANK = measure(
    "tool",
    "head_ablation_rank",
    unit="p-value",
    of="run",
    axes="role replacement half?",
    means="(1 + random sets whose mean change is as far down or farther) / (1 + sets); n are sets.",
    source="Phipson and Smyth 2010",
    interval="95 % Wilson, of the share of sets",
    needs=_NEEDS,
    figure=Figure(kind="text", card="heads"),
)
HEAD_ABLATION_ACCURACY = measure(
    "tool",
    "head_ablation_accuracy",
    unit="share of tasks",
    of="run",
    axes="role heads? replacement",
    means="Tasks whose most probable candidate is right under the ablation; without `heads` the same tasks unchanged.",
    interval=f"{WILSON}; of random heads by effective tasks, from {LEAST} on",
    needs=_NEEDS,
    figure=Figure(kind="text", card="heads"),
)


def measures(run: Run) -> Iterator[Row]:
    """`head_ablation`, its rank in the random band and the accuracy before and after, by what was ablated."""
    for group, trials in sorted(_trials(run).items()):
        sets = [trial for trial in trials if trial.alone is None]
        yield from _effects(group, sets)
        yield from _accuracies(group, sets)
        for head in sorted({trial.alone for trial in trials if trial.alone is not None}):
            changes = [trial.change for trial in trials if trial.alone == head]
            place = group._asdict() | {"heads": ALONE, "layer": head[0], "head": head[1]}
            yield HEAD_ABLATION.mean(changes, **place)


class _TrialGroup(NamedTuple):
    """Trials that are compared with each other."""

    role: str
    """`chosen` or `right`: the tool at which the chosen heads point."""
    replacement: str
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
    """Change of the log-odds of the target against all other candidates, nats."""
    right: bool
    right_before: bool
    alone: tuple[int, int] | None = None
    """The one head that was ablated, (layer, head), where it is one of the chosen ones by itself."""


def _trials(run: Run) -> dict[_TrialGroup, list[_Trial]]:
    trials: dict[_TrialGroup, list[_Trial]] = defaultdict(list)
    conditions = read_conditions(run, ["heads"])
    if conditions is None:
        return trials
    for number, detail, after in zip(
        conditions.task.tolist(), conditions.details, conditions.log_probs, strict=True
    ):
        choice = conditions.tasks[number]
        n = len(choice.names)
        trial = _trial(choice, detail, conditions.base[number, :n], after[:n])
        if trial is not None:
            trials[_TrialGroup(detail["target"], detail.get("replace", "zero"))].append(trial)
    return trials


def _trial(choice: Choice, detail: dict[str, Any], before: np.ndarray, after: np.ndarray) -> _Trial | None:
    """None where the target is no candidate, or every candidate is one."""
    target = np.array([name in choice.targets(detail["target"]) for name in choice.names])
    if not target.any() or target.all():
        return None
    return _Trial(
        choice.id,
        detail["half"],
        None if detail["set"] == "chosen" else json.dumps(sorted(detail["heads"])),
        float(log_odds(after, target) - log_odds(before, target)),
        choice.names[int(np.nanargmax(after))] in choice.right,
        choice.names[int(np.nanargmax(before))] in choice.right,
        tuple(detail["heads"][0]) if detail["set"] == "alone" else None,
    )


# -- rows ----------------------------------------------------------------------------------------------------------


def _effects(group: _TrialGroup, trials: list[_Trial]) -> Iterator[Row]:
    """Rows of the heads of each half, then of both together: every task is tested once."""
    for half in (0, 1, None):
        tested = [trial for trial in trials if half is None or trial.half == half]
        chosen = [trial.change for trial in tested if trial.heads is None]
        place, sets = group._asdict() | {"half": half}, _by_set(tested)
        at_random = _task_means(tested)
        together = {trial.task_id: trial.change for trial in tested if trial.heads is None}
        pairs = [change - at_random[task] for task, change in together.items() if task in at_random]
        if pairs:
            yield HEAD_ABLATION_NET.mean(pairs, **place)
        for heads, values in ((TOGETHER, chosen), (RANDOM, list(at_random.values()))):
            if values:
                yield HEAD_ABLATION.mean(values, heads=heads, **place)
        if chosen and sets:
            larger, n = sum(effect <= np.mean(chosen) for effect in sets), len(sets)
            # The chosen set counts as one of the draws, so that no p-value is 0 (Phipson & Smyth 2010).
            rank, interval = (1 + larger) / (1 + n), wilson(larger / n, n)
            yield HEAD_ABLATION_RANK.row(WHOLE_RUN, rank, n=n, interval=interval, **place)


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


def _task_means(trials: list[_Trial]) -> dict[str, float]:
    """Mean change of each task over the random sets."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for trial in trials:
        if trial.heads is not None:
            by_task[trial.task_id].append(trial.change)
    return {task: float(np.mean(changes)) for task, changes in by_task.items()}


def _accuracies(group: _TrialGroup, trials: list[_Trial]) -> Iterator[Row]:
    """Shares of right choices, no tool included, of the tasks under the chosen heads and under random ones."""
    place = group._asdict()
    chosen = [trial for trial in trials if trial.heads is None]
    if chosen:
        yield HEAD_ABLATION_ACCURACY.share([trial.right_before for trial in chosen], **place)
        yield HEAD_ABLATION_ACCURACY.share([trial.right for trial in chosen], heads=TOGETHER, **place)
    by_task: dict[str, list[bool]] = defaultdict(list)
    for trial in trials:
        if trial.heads is not None:
            by_task[trial.task_id].append(trial.right)
    if by_task:
        shares = [sum(hits) / len(hits) for hits in by_task.values()]
        yield HEAD_ABLATION_ACCURACY.share(shares, heads=RANDOM, **place)
