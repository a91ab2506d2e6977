"""Interventions of a run as matrices: one row a condition, one column a candidate of its task.

A condition is one changed prompt, mask or set of heads under which every candidate of a tool task was scored
again. Log-probabilities are in nats; a candidate that a condition does not have (the tool that was removed)
is NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.rows import finished
from probe.prompts.labels import UNCHANGED, tool_label
from probe.runs import INTERVENTION_FIELDS

if TYPE_CHECKING:
    from probe.runs import Run

Frame = Any
"""A pandas DataFrame. By its own annotations a column may be a number, so type checkers can say nothing of it."""
_NONE = ""  # stands for no tool where names are compared; a tool's name is never empty


@dataclass(frozen=True)
class Choice:
    """What the record says of one tool task."""

    id: str
    names: list[str | None]
    """Candidates: the shown tools in shown order, then None for no tool."""
    chosen: str | None
    chosen_tool: str
    """The most probable tool, also where no tool at all is more probable."""
    right: tuple[str | None, ...]
    tokens: dict[str, int]
    """Tokens of each tool's description."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> Choice:
        target = record["target"] or None
        names = [entry["tool"] for entry in record["tool_probabilities"]]
        tokens = {
            name: sum(s["end"] - s["start"] for s in record["spans"] if s["label"] == tool_label(name))
            for name in names
            if name is not None
        }
        return cls(
            record["id"],
            names,
            record["chosen"],
            record["chosen_tool"],
            tuple(target) if isinstance(target, list) else (target,),
            tokens,
        )

    def role(self, tool: str) -> set[str]:
        """`chosen` (the most probable tool), `right` (acceptable), both, or else `other`."""
        found = {"chosen"} if tool == self.chosen_tool else set()
        found |= {"right"} if tool in self.right else set()
        return found or {"other"}


@dataclass(frozen=True, eq=False)
class Conditions:
    """The conditions of some experiments, and the unchanged prompt beside them."""

    tasks: list[Choice]
    base: np.ndarray
    """[task, candidate]: log-probabilities under the unchanged prompt: experiment `base`, else the record's."""
    facts: Frame
    """One row a condition: `task` (index into `tasks`), `experiment`, `subject`, `other`, `detail`,
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

    def column(self, name: str) -> np.ndarray:
        """[condition]: the candidate that `subject` or `other` names. Raises ValueError where it is none."""
        places = [{tool: place for place, tool in enumerate(task.names) if tool} for task in self.tasks]
        found = [places[task].get(tool, -1) for task, tool in zip(self.task, self.facts[name], strict=True)]
        if -1 in found:
            row = self.facts.iloc[found.index(-1)]
            raise ValueError(
                f"interventions of task {self.tasks[row['task']].id!r}: {name} {row[name]!r} of the experiment "
                f"{row['experiment']!r} is not among the tools shown: repeat the interventions"
            )
        return np.array(found, dtype=np.int64)


def read_conditions(run: Run, experiments: Sequence[str]) -> Conditions | None:
    """The conditions of these experiments on tool tasks that ran to their end; None where there are none."""

    table: Frame = run.interventions()
    table = table[table["experiment"].isin([UNCHANGED, *experiments])]
    if not (table["experiment"] != UNCHANGED).any():
        return None
    tasks, recorded = [], []
    for task in finished(run, "tool_selection"):
        tasks.append(Choice.of(task.record))
        recorded.append([entry["log_prob"] for entry in task.record["tool_probabilities"]])
    table = table.assign(
        task=table["task_id"].map({task.id: number for number, task in enumerate(tasks)}),
        key=table["tool"].astype(object).where(table["tool"].notna(), _NONE),
    ).dropna(subset=["task"])
    table["task"] = table["task"].astype(np.int64)
    table["column"] = _columns(table, tasks)
    facts, log_probs = _pivot(table, max((len(task.names) for task in tasks), default=0))
    base = np.full((len(tasks), log_probs.shape[1]), np.nan)
    for number, values in enumerate(recorded):
        base[number, : len(values)] = values
    is_base = (facts["experiment"] == UNCHANGED).to_numpy()
    base[facts["task"].to_numpy()[is_base]] = log_probs[is_base]
    facts = facts[~is_base].reset_index(drop=True)
    for name in ("subject", "other", "detail"):
        facts[name] = facts[name].astype(object).where(facts[name].notna(), None)
    if not len(facts):
        return None
    return Conditions(
        tasks,
        base,
        facts.loc[:, [c for c in facts if c in {"task", *INTERVENTION_FIELDS}]],
        log_probs[~is_base],
    )


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
    found = places.reindex(pd.MultiIndex.from_frame(table[["task", "key"]])).to_numpy()
    if np.isnan(found).any():
        row = table.iloc[int(np.isnan(found).argmax())]
        raise ValueError(
            f"interventions of task {row['task_id']!r}: {row['tool']!r} is scored in the experiment "
            f"{row['experiment']!r} but is no candidate of the task: repeat the interventions"
        )
    return found.astype(np.int64)


def _pivot(table: Frame, n_candidates: int) -> tuple[Frame, np.ndarray]:
    """One row a condition, in the table's order of tasks, and its log-probabilities by candidate."""
    keys = ["task", "experiment", "condition"]
    table = table.sort_values("task", kind="stable")
    number = table.groupby(keys, sort=False).ngroup().to_numpy()
    log_probs = np.full((number.max(initial=-1) + 1, n_candidates), np.nan)
    log_probs[number, table["column"].to_numpy()] = table["log_prob"].to_numpy(dtype=np.float64)
    return table.drop_duplicates(keys).reset_index(drop=True), log_probs


def renormalized(log_probs: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """[condition, candidate]: log-softmax over the candidates that are kept; −∞ for the others."""
    scores = np.where(kept & ~np.isnan(log_probs), log_probs, -np.inf)
    return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
