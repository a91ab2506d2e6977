"""Runs that were never run: made-up choices and made-up interventions, for analyzers that need no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from probe.runs import Run
from probe.runs.records import T, ToolRecord, decode
from probe.runs.tables import INTERVENTION_FIELDS
from probe.runs.views.choice import Choice

EMPTY_PASSAGE = {
    "prompt": "",
    "token_ids": [],
    "n_prompt": 0,
    "n_new": 0,
    "completion": "",
    "finish_reason": "stop",
    "spans": [],
}
COLUMNS = [*INTERVENTION_FIELDS]


class PlantedTask:
    """What analyzers ask of a TaskRun."""

    def __init__(self, record: dict[str, Any], tensors: Mapping[str, Any], labels: list[str]):
        self.id, self.record, self._tensors, self._labels = record["id"], record, tensors, labels

    def typed(self, struct: type[T]) -> T:
        return decode(self.record, struct, Path(self.id))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Any:
        return self._tensors[name]

    slice = __getitem__

    def labels(self) -> list[str]:
        return self._labels

    def layers(self, name: str) -> list[int]:
        return list(range(len(self[name])))

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

    def table(self, name: str) -> pd.DataFrame:
        assert name == "interventions"
        return self._rows.copy()


def put_interventions(patch: pytest.MonkeyPatch, frame: pd.DataFrame) -> None:
    """Make every run read `frame` as its table of interventions."""
    part = Run.table

    def table(run: Run, name: Any, arrow: bool = False) -> Any:
        return frame.copy() if name == "interventions" else part(run, name, arrow)

    patch.setattr(Run, "table", table)


def choice_of(record: dict[str, Any]) -> Choice:
    """The choice that a record.json holds."""
    return Choice.of(decode(record, ToolRecord, Path(record["id"])))


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
    record = EMPTY_PASSAGE | {
        "id": task_id,
        "kind": "tool_selection",
        "status": "ok",
        "target": target,
        "tool_probabilities": [
            {"tool": name, "log_prob": value, "probability": 1 / len(log_probs), "token_ids": [1]}
            for name, value in log_probs.items()
        ],
        "candidate_mass": 1.0,
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


def made_up_interventions(run: Any, seed: int = 0) -> pd.DataFrame:
    """Every experiment on every tool of a real run, with made-up scores: for whatever reads or draws them."""
    generator = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for task in run:
        if "tool_probabilities" not in task.record:
            continue
        base = {entry["tool"]: entry["log_prob"] for entry in task.record["tool_probabilities"]}
        tools = [name for name in base if name is not None]
        top = task.record["chosen_tool"]
        rows += condition(task.id, "base", 0, base)

        def moved(tool: str, mean: float, size: float, base: dict = base) -> dict[str | None, float]:
            noise = dict(zip(base, generator.normal(scale=0.1, size=len(base)), strict=True))
            shift = generator.normal(mean, size)
            return {name: value + noise[name] + shift * (name == tool) for name, value in base.items()}

        for place, tool in enumerate(tools):
            for experiment, mean in (("mask_all", -1.0), ("mask_decision", -0.4), ("scramble", -0.7)):
                rows += condition(task.id, experiment, place, moved(tool, mean, 0.5), subject=tool)
            for at, part in enumerate(("name", "description")):
                facts = {"subject": tool, "part": part}
                shown = moved(tool, -0.9 + 0.6 * at, 0.2)
                rows += condition(task.id, "mask_part", 2 * place + at, shown, **facts)
                facts["detail"] = {"start": at}
                rows += condition(task.id, "mask_part_random", 2 * place + at, moved(tool, 0, 0.1), **facts)
            for experiment in ("mask_all_random", "mask_decision_random"):
                for draw in range(3):
                    facts = {"subject": tool, "detail": {"start": draw}}
                    rows += condition(task.id, experiment, 3 * place + draw, moved(tool, 0, 0.1), **facts)
            for first in (0, 2):
                facts = {"subject": tool, "layer_from": first, "layer_to": first + 1}
                rows += condition(
                    task.id, "mask_window", 2 * place + first // 2, moved(tool, -0.2, 0.2), **facts
                )
            for index, word in enumerate(("look", "up", "<b>numbers</b>", "anything")):
                facts = {"subject": tool, "detail": {"text": word, "index": index}}
                rows += condition(task.id, "word", 4 * place + index, moved(tool, -0.1, 0.2), **facts)
            rest = {name: value for name, value in moved(tool, 0, 0).items() if name != tool}
            rows += condition(task.id, "remove", place, rest, subject=tool)
        for place, tool in enumerate(name for name in tools if name != top):
            rows += condition(task.id, "swap", place, moved(tool, 0.5, 1.0), subject=top, other=tool)
        for number in range(8):
            detail = {"text": f"plan {number % 5}", "kind": "drawn"}
            actual = moved(tools[number % len(tools)], 1.0, 0.5)
            rows += condition(task.id, "intention", number, actual, detail=detail, weight=-1.5 - number % 5)
    return pd.DataFrame(rows, columns=COLUMNS)
