"""Runs that were never run: made-up choices and made-up interventions, for analyzers that need no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

COLUMNS = [
    "task_id",
    "experiment",
    "condition",
    "subject",
    "other",
    "detail",
    "layer_from",
    "layer_to",
    "n_tokens",
    "weight",
    "tool",
    "log_prob",
]


class PlantedTask:
    """What analyzers ask of a TaskRun."""

    def __init__(self, record: dict[str, Any], tensors: Mapping[str, Any], labels: list[str]):
        self.id, self.record, self._tensors, self._labels = record["id"], record, tensors, labels

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Any:
        return self._tensors[name]

    slice = __getitem__

    def labels(self) -> list[str]:
        return self._labels

    def listed(self, key: str) -> None:
        return None


class PlantedRun:
    """What analyzers ask of a Run."""

    def __init__(self, tasks: Sequence[PlantedTask], rows: Sequence[dict[str, Any]]):
        self._tasks = {task.id: task for task in tasks}
        self._rows = pd.DataFrame(list(rows), columns=COLUMNS)

    def __iter__(self) -> Iterator[PlantedTask]:
        return iter(self._tasks.values())

    def __getitem__(self, task_id: str) -> PlantedTask:
        return self._tasks[task_id]

    def interventions(self) -> pd.DataFrame:
        return self._rows.copy()


def planted_task(
    task_id: str,
    log_probs: Mapping[str | None, float],
    target: Any = None,
    tokens: Mapping[str, int] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> PlantedTask:
    """A tool task with these candidates (null last), each description `tokens` long."""
    tools = [name for name in log_probs if name is not None]
    at, spans = 1, [{"label": "bos", "start": 0, "end": 1}]
    for name in tools:
        length = (tokens or {}).get(name, 10)
        spans.append({"label": f"tool:{name}", "start": at, "end": at + length})
        at += length
    spans.append({"label": "user", "start": at, "end": at + 5})
    record = {
        "id": task_id,
        "kind": "tool_selection",
        "status": "ok",
        "target": target,
        "tool_probabilities": [{"tool": name, "log_prob": value} for name, value in log_probs.items()],
        "chosen": max(log_probs, key=lambda name: log_probs[name]),
        "chosen_tool": max(tools, key=lambda name: log_probs[name]),
        "spans": spans,
    }
    return PlantedTask(record, tensors or {}, [span["label"] for span in spans])


def condition(
    task_id: str, experiment: str, number: int, log_probs: Mapping[str | None, float], **facts: Any
) -> list[dict[str, Any]]:
    """The rows of one condition; `detail` may be a value, which becomes JSON."""
    if facts.get("detail") is not None:
        facts["detail"] = json.dumps(facts["detail"])
    return [
        {"task_id": task_id, "experiment": experiment, "condition": number, "tool": tool, "log_prob": value}
        | facts
        for tool, value in log_probs.items()
    ]


def world(
    n_tasks: int, names: Sequence[str], by_name: float, by_description: float, seed: int = 0
) -> tuple[list[PlantedTask], Callable[[int], tuple[np.ndarray, np.ndarray]]]:
    """Tasks whose log P of a tool is a part of its name plus a part of its description, with these sizes."""
    generator = np.random.default_rng(seed)
    parts = [
        (by_name * generator.normal(size=len(names)), by_description * generator.normal(size=len(names)))
        for _ in range(n_tasks)
    ]
    tasks = []
    for number, (name, description) in enumerate(parts):
        scores = dict(zip(names, (name + description).tolist(), strict=True))
        tasks.append(planted_task(f"t{number}", scores | {None: -3.0}, target=names[0]))
    return tasks, lambda number: parts[number]
