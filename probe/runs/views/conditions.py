"""Conditions of a run's interventions as matrices: one row a condition, one column a candidate of its task.

A condition is one changed prompt, mask or set of heads under which every candidate of a tool task was scored
again. Log-probabilities are in nats; a candidate that a condition does not have (the tool that was removed)
is NaN.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probe.prompts.labels import UNCHANGED
from probe.runs.tables import INTERVENTION_FIELDS
from probe.runs.views.choice import Choice, choices

if TYPE_CHECKING:
    from probe.runs import Run

Frame = Any
"""A pandas DataFrame. By its own annotations a column may be a number, so type checkers can say nothing of it."""
_NONE = ""  # stands for no tool where names are compared; a tool's name is never empty


class Scores(NamedTuple):
    """Scores of a task under one condition."""

    detail: Any
    """What was changed, as `probe.experiments` says; None where nothing more is to be said."""
    log_probs: np.ndarray
    """[candidate], in the order of the choice's names."""


@dataclass(frozen=True, eq=False)
class Conditions:
    """The conditions of some experiments, and the unchanged prompt beside them."""

    tasks: list[Choice]
    base: np.ndarray
    """[task, candidate]: log-probabilities under the unchanged prompt: experiment `base`, else the record's."""
    facts: Frame
    """One row a condition: `task` (index into `tasks`), `experiment`, `subject`, `other`, `part`, `detail`,
    `layer_from`, `layer_to`, `weight`; the index counts from 0."""
    log_probs: np.ndarray
    """[condition, candidate]"""

    def of(self, experiments: Iterable[str]) -> Conditions:
        """The conditions of these experiments."""
        rows = np.flatnonzero(self.facts["experiment"].isin(list(experiments)))
        return Conditions(
            self.tasks, self.base, self.facts.iloc[rows].reset_index(drop=True), self.log_probs[rows]
        )

    @property
    def task(self) -> np.ndarray:
        """[condition]: index of its task."""
        return self.facts["task"].to_numpy(dtype=np.int64)

    @property
    def details(self) -> list[Any]:
        """[condition]: what was changed, parsed from `detail`."""
        return [None if text is None else json.loads(text) for text in self.facts["detail"]]

    def by_task(self) -> dict[str, list[Scores]]:
        """Task id → scores under each condition, in the order in which the conditions were made.

        Raises ValueError where a condition lacks a candidate of its task.
        """
        by_task: dict[str, list[Scores]] = defaultdict(list)
        task, details = self.task, self.details
        for row in self.facts.sort_values(["task", "condition"], kind="stable").index:
            choice = self.tasks[task[row]]
            log_probs = self.log_probs[row, : len(choice.names)]
            if np.isnan(log_probs).any():
                fact = self.facts.iloc[row]
                raise ValueError(
                    f"interventions of task {choice.id!r}: {fact['experiment']} {fact['condition']}: "
                    "not the task's candidates: repeat the interventions"
                )
            by_task[choice.id].append(Scores(details[row], log_probs))
        return dict(by_task)

    def column(self, name: str) -> np.ndarray:
        """[condition]: the candidate that `subject` or `other` names. Raises ValueError where it is none."""
        places = [{tool: place for place, tool in enumerate(task.names) if tool} for task in self.tasks]
        columns = [places[task].get(tool, -1) for task, tool in zip(self.task, self.facts[name], strict=True)]
        if -1 in columns:
            row = self.facts.iloc[columns.index(-1)]
            raise ValueError(
                f"interventions of task {self.tasks[row['task']].id!r}: {name} {row[name]!r} of the experiment "
                f"{row['experiment']!r} is not among the tools shown: repeat the interventions"
            )
        return np.array(columns, dtype=np.int64)


def read_conditions(run: Run, experiments: Sequence[str]) -> Conditions | None:
    """The conditions of these experiments on tool tasks that ran to their end; None where there are none.

    Raises ValueError where a condition scores what is no candidate of its task, or one twice.
    """
    table: Frame = run.table("interventions")
    table = table[table["experiment"].isin([UNCHANGED, *experiments])]
    if not (table["experiment"] != UNCHANGED).any():
        return None
    tasks = choices(run)
    table = table.assign(
        task=table["task_id"].map({task.id: number for number, task in enumerate(tasks)}),
        key=table["tool"].astype(object).where(table["tool"].notna(), _NONE),
    ).dropna(subset=["task"])
    table["task"] = table["task"].astype(np.int64)
    table["column"] = _columns(table, tasks)
    facts, log_probs = _pivot(table, max((len(task.names) for task in tasks), default=0))
    base = np.full((len(tasks), log_probs.shape[1]), np.nan)
    for number, task in enumerate(tasks):
        base[number, : len(task.names)] = task.log_probs
    is_base = (facts["experiment"] == UNCHANGED).to_numpy()
    base[facts["task"].to_numpy()[is_base]] = log_probs[is_base]
    facts = facts[~is_base].reset_index(drop=True)
    for name in ("subject", "other", "detail", "part"):
        facts[name] = facts[name].astype(object).where(facts[name].notna(), None)
    if not len(facts):
        return None
    return Conditions(
        tasks,
        base,
        facts.loc[:, [c for c in facts if c in {"task", *INTERVENTION_FIELDS}]],
        log_probs[~is_base],
    )


def scores_by_task(run: Run, experiment: str) -> dict[str, list[Scores]]:
    """Task id → scores under each condition of an experiment that shows all candidates of the task.

    Raises ValueError as `read_conditions`, and where a condition lacks a candidate.
    """
    conditions = read_conditions(run, [experiment])
    return {} if conditions is None else conditions.by_task()


def _columns(table: Frame, tasks: list[Choice]) -> np.ndarray:
    """[row]: place of the row's candidate in its task."""
    import pandas as pd

    places = pd.Series(
        {
            (number, _NONE if name is None else name): place
            for number, task in enumerate(tasks)
            for place, name in enumerate(task.names)
        },
        dtype=np.int64,
    )
    columns = places.reindex(pd.MultiIndex.from_frame(table[["task", "key"]])).to_numpy()
    if np.isnan(columns).any():
        row = table.iloc[int(np.isnan(columns).argmax())]
        raise ValueError(
            f"interventions of task {row['task_id']!r}: {row['tool']!r} is scored in the experiment "
            f"{row['experiment']!r} but is no candidate of the task: repeat the interventions"
        )
    return columns.astype(np.int64)


def _pivot(table: Frame, n_candidates: int) -> tuple[Frame, np.ndarray]:
    """One row a condition, in the table's order of tasks, and its log-probabilities by candidate."""
    keys = ["task", "experiment", "condition"]
    table = table.sort_values("task", kind="stable")
    repeated = table.duplicated([*keys, "column"])
    if repeated.any():
        row = table[repeated].iloc[0]
        raise ValueError(
            f"interventions of task {row['task_id']!r}: {row['tool']!r} is scored twice in {row['experiment']} "
            f"{row['condition']}: repeat the interventions"
        )
    number = table.groupby(keys, sort=False).ngroup().to_numpy()
    log_probs = np.full((number.max(initial=-1) + 1, n_candidates), np.nan)
    log_probs[number, table["column"].to_numpy()] = table["log_prob"].to_numpy(dtype=np.float64)
    return table.drop_duplicates(keys).reset_index(drop=True), log_probs
