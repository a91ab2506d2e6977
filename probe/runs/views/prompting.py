"""Prompting tasks under their variants, at the position that emits the answer's first token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from probe.maths.statistics import log_softmax
from probe.prompts.labels import BASE, is_example
from probe.runs.read import finished
from probe.runs.records import PromptingRecord, VariantPassage
from probe.runs.views.layer_file import LayerFile

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

LEAST = 3
"""Tasks of a group, at least: a vector that leaves one out is a mean of two or more."""


class VariantOutcome(NamedTuple):
    """What of a variant's passage is kept while all tasks are gone through."""

    n_prompt: int
    n_examples: int
    """Worked examples in its prompt."""
    score: float | None
    chosen: str | None
    first_tokens: dict[str, int]
    """Choice → first token."""


class Item:
    """A prompting task: its variants, their output distributions and hidden states.

    Of the record little is kept: with prompts and tokens ten thousand tasks would be gigabytes.
    """

    def __init__(self, task: TaskRun, again: Callable[[], TaskRun] | None = None):
        """`again` opens the task anew, when more of it is asked for."""
        record = task.typed(PromptingRecord)
        self.id = record.id
        self.family = record.family
        """Tasks without a family are one group."""
        self.target = record.target
        self.outcomes = {name: _outcome(passage) for name, passage in record.passages.items()}
        self._again = again or (lambda: task)

    @property
    def task(self) -> TaskRun:
        return self._again()

    @property
    def passages(self) -> Mapping[str, VariantPassage]:
        """The passages by variant, read again."""
        return self.task.typed(PromptingRecord).passages

    @property
    def variants(self) -> list[str]:
        """Names of the variants, the reference left out."""
        return [name for name in self.outcomes if name != BASE]

    def log_probs(self, variant: str) -> np.ndarray | None:
        """Log-probabilities [d_vocab] of the answer's first token, nats; None where not captured."""
        name, task = f"{variant}/logits", self.task
        return log_softmax(task[name][0].double().numpy()) if name in task else None

    def states(self, variant: str) -> np.ndarray | None:
        """Residual stream [layer, d_model] at the last prompt position; None where not captured."""
        name, task = f"{variant}/resid_post", self.task
        if name not in task:
            return None
        last = self.outcomes[variant].n_prompt - 1
        rows = task[f"{variant}/rows"].tolist() if f"{variant}/rows" in task else [last]
        return task.slice(name)[:, rows.index(last)].float().numpy()

    @cached_property
    def layers(self) -> list[int] | None:
        """Captured layers, None where all were."""
        return self.task.listed("layers", BASE)

    def target_token(self, variant: str = BASE) -> int | None:
        """First token of the target, as the variant says it, if no other choice begins with it."""
        first = self.outcomes[variant].first_tokens if variant in self.outcomes else {}
        if self.target is None or self.target not in first:
            return None
        token = first[self.target]
        return token if list(first.values()).count(token) == 1 else None


def _outcome(passage: VariantPassage) -> VariantOutcome:
    first = {entry.choice: entry.token_ids[0] for entry in passage.choice_probabilities or ()}
    n_examples = len({span.label for span in passage.spans if is_example(span.label)})
    return VariantOutcome(passage.n_prompt, n_examples, passage.score, passage.chosen, first)


def items_of(run: Run) -> list[Item]:
    """The prompting tasks that ran to their end and have the reference variant."""
    reading = _LastRead(run)
    items = (Item(task, partial(reading, task.id)) for task in finished(run, "prompting"))
    return [item for item in items if BASE in item.outcomes]


class _LastRead:
    """The task that was asked for last: a file is compared with its checksum once for all that is read of it in a row."""

    def __init__(self, run: Run):
        self._run = run
        self._task: TaskRun | None = None

    def __call__(self, task_id: str) -> TaskRun:
        if self._task is None or self._task.id != task_id:
            self._task = self._run[task_id]
        return self._task


class PromptStates:
    """Residual streams at the last prompt position of every task and variant that has them, read a layer at a time."""

    def __init__(self, items: Sequence[Item]):
        self._file = LayerFile()
        self.rows: dict[tuple[str, str], int] = {}
        """(task, variant) → row of a layer."""
        self.layers: Sequence[int] = []
        for item in items:
            for variant in item.outcomes:
                states = item.states(variant)
                if states is None or (self.rows and states.shape != self._file.shape):
                    continue
                self.layers = self.layers or item.layers or range(len(states))
                self.rows[item.id, variant] = self._file.n
                self._file.add(states[None])

    def layer(self, index: int) -> np.ndarray:
        """[row, d_model], float32, of the layer at a place in `layers`."""
        return self._file.layer(index)


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
    examples: dict[str, list[int]] = defaultdict(list)
    scores: dict[str, list[float]] = defaultdict(list)
    for item in items:
        for variant in item.variants:
            examples[variant].append(item.outcomes[variant].n_examples)
            scores[variant].append(item.outcomes[variant].score or 0.0)
    ranked = sorted(examples, key=lambda name: (-np.mean(examples[name]), -np.mean(scores[name]), name))
    return ranked[0] if ranked and max(examples[ranked[0]]) > 0 else None
