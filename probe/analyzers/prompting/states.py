"""What a run knows of its prompting tasks at the position that emits the answer's first token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.rows import Row, finished
from probe.maths.statistics import bootstrap_mean, bootstrap_ratio, log_softmax
from probe.prompts.labels import BASE

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

NAME = "prompting"
LEAST = 3
"""Tasks of a group, at least: a vector that leaves one out is a mean of two or more."""


@dataclass
class Item:
    """One prompting task."""

    task: TaskRun
    family: str | None
    """`metadata.family`; tasks without one are one group."""
    passages: Mapping[str, dict[str, Any]]
    target: str | None

    @property
    def id(self) -> str:
        return self.task.id

    @property
    def variants(self) -> list[str]:
        return [name for name in self.passages if name != BASE]

    def log_probs(self, variant: str) -> np.ndarray | None:
        """Log-probabilities [d_vocab] of the answer's first token, nats; None where not captured."""
        name = f"{variant}/logits"
        return log_softmax(self.task[name][0].double().numpy()) if name in self.task else None

    def states(self, variant: str) -> np.ndarray | None:
        """Residual stream [layer, d_model] at the last prompt position; None where not captured."""
        name = f"{variant}/resid_post"
        if name not in self.task:
            return None
        last = self.passages[variant]["n_prompt"] - 1
        rows = self.task[f"{variant}/rows"].tolist() if f"{variant}/rows" in self.task else [last]
        return self.task.slice(name)[:, rows.index(last)].float().numpy()

    @cached_property
    def layers(self) -> list[int] | None:
        """The captured layers where not all were."""
        return self.task.listed("layers", BASE)

    def target_token(self, variant: str = BASE) -> int | None:
        """First token of the target, as the variant says it, if no other choice begins with it."""
        entries = self.passages.get(variant, {}).get("choice_probabilities", [])
        first = {entry["choice"]: entry["token_ids"][0] for entry in entries}
        token = first.get(self.target) if self.target is not None else None
        return token if list(first.values()).count(token) == 1 else None


def items_of(run: Run) -> list[Item]:
    """The prompting tasks that ran to their end and have a `base`."""
    return [item_of(task) for task in finished(run, NAME) if BASE in task.record["passages"]]


def item_of(task: TaskRun) -> Item:
    family = (task.record.get("metadata") or {}).get("family")
    family = family if isinstance(family, str) else None
    return Item(task, family, task.record["passages"], task.record.get("target"))


def groups(items: Sequence[Item]) -> Iterator[tuple[str, str | None, list[Item]]]:
    """(variant, family, tasks): for every variant all tasks that have it (family None), then each family's.

    A family that is alone has no rows of its own.
    """
    by_variant: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        for variant in item.variants:
            by_variant[variant].append(item)
    for variant, own in by_variant.items():
        yield variant, None, own
        families = sorted({item.family for item in own if item.family is not None})
        if len(families) > 1 or any(item.family is None for item in own):
            for family in families:
                yield variant, family, [item for item in own if item.family == family]


def vector_groups(items: Sequence[Item]) -> dict[str | None, list[Item]]:
    """The tasks whose prompts ask the same: a vector is a mean within one of these. By family."""
    found: dict[str | None, list[Item]] = defaultdict(list)
    for item in items:
        found[item.family].append(item)
    return dict(found)


def ratio(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """1 − Σ parts / Σ wholes, and its 95 % interval: a percentile bootstrap over tasks of both sums."""
    part, whole = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)
    value = 1 - part.sum() / whole.sum()
    interval = bootstrap_ratio(whole - part, whole)
    return float(value), interval


def estimate(
    name: str,
    value: float,
    unit: str,
    n: int,
    interval: tuple[float, float] | None,
    **columns: Any,
) -> Row:
    """A measure over tasks of a run."""
    low, high = interval or (None, None)
    return Row(
        task_id="", analyzer=NAME, name=name, value=value, unit=unit, low=low, high=high, n=n, **columns
    )


def mean_of(name: str, values: Sequence[float], unit: str, **columns: Any) -> Row:
    """The mean over tasks with its bootstrap interval."""
    finite = bootstrap_mean(values) if np.isfinite(values).all() else None
    return estimate(name, float(np.mean(values)), unit, len(values), finite, **columns)
