"""Activations of a sparse autoencoder's features at the decisions of a run, by the tool that was chosen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from probe.maths.selectivity import standardized_wins
from probe.prompts.labels import NO_TOOL

Frame = Any
"""A pandas DataFrame."""
LEAST = 2
"""Tasks that must choose a tool, and as many that choose another, for it to have features."""


@dataclass(frozen=True, eq=False)
class FeatureActivity:
    """What the rows of the part `activity` say of one layer."""

    task_ids: list[str]
    chosen: np.ndarray
    """[task]: the most probable name, `no_tool` for none."""
    features: np.ndarray
    """[feature]: number of each that is active in a task at least."""
    activity: np.ndarray
    """[task, feature], 0 where it is not active."""

    @classmethod
    def of(cls, table: Frame, layer: int) -> FeatureActivity:
        """From a run's table `features`, in which a task without active features has a row without a feature."""
        rows = table[(table["part"] == "activity") & (table["layer"] == layer)]
        task_ids = list(dict.fromkeys(rows["task_id"]))
        active = rows[rows["feature"].notna()]
        features, columns = np.unique(active["feature"].to_numpy(np.int64), return_inverse=True)
        number = {task_id: index for index, task_id in enumerate(task_ids)}
        activity = np.zeros((len(task_ids), len(features)))
        activity[[number[task_id] for task_id in active["task_id"]], columns] = active["value"]
        first = rows.drop_duplicates("task_id")["tool"]
        chosen = np.array([NO_TOOL if tool is None or tool != tool else tool for tool in first], dtype=object)
        return cls(task_ids, chosen, features, activity)

    def tools(self, kept: np.ndarray | None = None) -> list[str]:
        """The tools that enough of these tasks choose, and enough do not."""
        chosen = self.chosen if kept is None else self.chosen[kept]
        names, counts = np.unique(chosen.astype(str), return_counts=True)
        enough = (counts >= LEAST) & (len(chosen) - counts >= LEAST)
        return [str(name) for name in names[enough]]

    def member(self, tools: Iterable[str], kept: np.ndarray | None = None) -> np.ndarray:
        """[task, tool]: whether it chose it."""
        chosen = self.chosen if kept is None else self.chosen[kept]
        return chosen[:, None] == np.array([*tools], dtype=object)[None]

    def top(self, kept: np.ndarray, most: int) -> dict[str, np.ndarray]:
        """Tool → features that are more active where it is chosen, the clearest first, at most so many, by the tasks `kept`
        [task]."""
        tools = self.tools(kept)
        if not tools or not len(self.features):
            return {}
        _, z = standardized_wins(self.activity[kept], self.member(tools, kept))
        best = np.argsort(-z, axis=1, kind="stable")[:, :most]
        return {
            tool: self.features[order[row[order] > 0]]
            for tool, order, row in zip(tools, best, z, strict=True)
        }
