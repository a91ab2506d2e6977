"""Prompting tasks under their variants, at the position that emits the answer's first token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from probe.maths.statistics import log_softmax
from probe.prompts.labels import BASE, is_example
from probe.runs.read import finished
from probe.runs.records import PromptingRecord

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

LEAST = 3
"""Tasks of a group, at least: a vector that leaves one out is a mean of two or more."""


class Item:
    """A prompting task: its variants, their output distributions and hidden states."""

    def __init__(self, task: TaskRun):
        self.task = task
        record = task.typed(PromptingRecord)
        self.id = record.id
        self.family = record.family
        """Tasks without a family are one group."""
        self.passages = record.passages
        self.target = record.target

    @property
    def variants(self) -> list[str]:
        """Names of the variants, the reference left out."""
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
        last = self.passages[variant].n_prompt - 1
        rows = self.task[f"{variant}/rows"].tolist() if f"{variant}/rows" in self.task else [last]
        return self.task.slice(name)[:, rows.index(last)].float().numpy()

    @cached_property
    def layers(self) -> list[int] | None:
        """Captured layers, None where all were."""
        return self.task.listed("layers", BASE)

    def target_token(self, variant: str = BASE) -> int | None:
        """First token of the target, as the variant says it, if no other choice begins with it."""
        if variant not in self.passages:
            return None
        first = {
            entry.choice: entry.token_ids[0] for entry in self.passages[variant].choice_probabilities or ()
        }
        if self.target is None or self.target not in first:
            return None
        token = first[self.target]
        return token if list(first.values()).count(token) == 1 else None


def items_of(run: Run) -> list[Item]:
    """The prompting tasks that ran to their end and have the reference variant."""
    items = map(Item, finished(run, "prompting"))
    return [item for item in items if BASE in item.passages]


def groups(items: Sequence[Item]) -> Iterator[tuple[str, str | None, list[Item]]]:
    """(variant, family, tasks): for every variant all tasks that have it (family None), then each family's.

    A family that is alone has no rows of its own.
    """
    by_variant: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        for variant in item.variants:
            by_variant[variant].append(item)
    for variant, members in by_variant.items():
        yield variant, None, members
        families = sorted({item.family for item in members if item.family is not None})
        if len(families) > 1 or any(item.family is None for item in members):
            for family in families:
                yield variant, family, [item for item in members if item.family == family]


def vector_groups(items: Sequence[Item]) -> dict[str | None, list[Item]]:
    """The tasks whose prompts ask the same: a vector is a mean within one of these. By family."""
    by_family: dict[str | None, list[Item]] = defaultdict(list)
    for item in items:
        by_family[item.family].append(item)
    return dict(by_family)


def reference_variant(items: Sequence[Item]) -> str | None:
    """The variant with the most examples; of several the most accurate one, then the first by name."""
    examples: dict[str, list[float]] = defaultdict(list)
    scores: dict[str, list[float]] = defaultdict(list)
    for item in items:
        for variant in item.variants:
            passage = item.passages[variant]
            examples[variant].append(len({span.label for span in passage.spans if is_example(span.label)}))
            scores[variant].append(passage.score or 0.0)
    ranked = sorted(examples, key=lambda name: (-np.mean(examples[name]), -np.mean(scores[name]), name))
    return ranked[0] if ranked and max(examples[ranked[0]]) > 0 else None
