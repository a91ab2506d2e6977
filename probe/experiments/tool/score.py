"""Scoring conditions: jobs without generation, prefixes shared, one row a candidate."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from probe.capture.sites import sequence_bytes
from probe.experiments.tool.conditions import Condition

if TYPE_CHECKING:
    from probe.capture import Job, NonFinite, Outcome
    from probe.capture.prefixes import Prefixes
    from probe.model.hooked import Model
    from probe.prompts import Codec

_BYTES = 1 << 29
"""Bytes of keys and values that one batch may take, those of its prefixes too: large batches fill their passes."""
_PREFIX_BYTES = 1 << 27
"""Memory of shared prefixes that are kept from call to call."""
_MOST = 96

Row = dict[str, Any]


class Scorer:
    """Scores the candidates of changed prompts with one model; keeps shared prefixes from call to call."""

    def __init__(self, model: Model, codec: Codec):
        from probe.capture import Capturer, CaptureSpec, Generation
        from probe.capture.prefixes import Prefixes

        self.model, self.codec = model, codec
        prefixes = Prefixes(_PREFIX_BYTES)
        self._capturer = Capturer(model, codec, CaptureSpec(frozenset()), Generation(1), prefixes)
        self._unshared_tokens = 0

    @property
    def prefixes(self) -> Prefixes:
        return self._capturer.prefixes

    @property
    def tokens(self) -> int:
        """Prompt tokens run so far, those of shared prefixes once."""
        return self._unshared_tokens + self.prefixes.tokens_run

    def rows(
        self,
        conditions: Sequence[tuple[str, Condition]],
        ran: Callable[[int, int], None] = lambda _conditions, _tokens: None,
    ) -> Iterator[Row]:
        """One row a candidate of each (task id, condition); one whose numbers are not finite has none.

        `ran(conditions, tokens)` is called for each batch.
        """
        from probe.capture import NonFinite

        counts: dict[tuple[str, str], int] = {}
        for (task_id, condition), outcome in zip(conditions, self.outcomes(conditions, ran), strict=True):
            key = (task_id, condition.experiment)
            counts[key] = counts.get(key, -1) + 1
            if not isinstance(outcome, NonFinite):
                yield from candidate_rows(task_id, counts[key], condition, outcome)

    def outcomes(
        self,
        conditions: Sequence[tuple[str, Condition]],
        ran: Callable[[int, int], None] = lambda _conditions, _tokens: None,
    ) -> list[Outcome | NonFinite]:
        """What the candidates of each (task id, condition) score; those whose outcome is known are not run again."""
        unknown = [pair for pair in conditions if pair[1].outcome is None]
        if known := len(conditions) - len(unknown):
            ran(known, 0)
        new = iter(self._run(unknown, ran))
        return [next(new) if c.outcome is None else c.outcome for _, c in conditions]

    def _run(
        self, conditions: Sequence[tuple[str, Condition]], ran: Callable[[int, int], None]
    ) -> list[Outcome | NonFinite]:
        from probe.capture import Job, plan_shared

        jobs = [Job(condition.prompt, task_id, edits=condition.edits) for task_id, condition in conditions]
        order = plan_shared(jobs)
        self.prefixes.expect(jobs)
        outcomes: dict[int, Outcome | NonFinite] = {}
        for batch in batches(self.model, jobs, order):
            before = self.tokens
            self._capturer.run(
                [jobs[index] for index in batch],
                lambda number, outcome, batch=batch: outcomes.__setitem__(batch[number], outcome),
            )
            self._unshared_tokens += sum(
                len(jobs[index].prompt.token_ids) - jobs[index].shared for index in batch
            )
            ran(len(batch), self.tokens - before)
        return [outcomes[index] for index in range(len(jobs))]


def batches(model: Model, jobs: Sequence[Job], order: Sequence[int]) -> Iterator[list[int]]:
    """Indices of jobs that run together, in this order (`plan_shared` gives one): as many as _MOST and _BYTES allow."""
    batch: list[int] = []
    earlier: set[tuple[int, ...]] = set()  # prefixes that earlier batches ran
    new: set[tuple[int, ...]] = set()
    longest = 0
    for index in order:
        ids = jobs[index].prompt.token_ids
        prefixes = {tuple(ids[:end]) for end in jobs[index].prefix_ends} - earlier
        rows = len(batch) + 1 + len(new | prefixes)
        each = sequence_bytes(model.facts, model.dtype.itemsize, max(longest, len(ids)))
        if batch and (len(batch) == _MOST or rows * each > _BYTES):
            yield batch
            earlier |= new
            batch, new, longest = [], set(), 0
        batch.append(index)
        new |= prefixes - earlier
        longest = max(longest, len(ids))
    if batch:
        yield batch


def candidate_rows(task_id: str, number: int, condition: Condition, outcome: Outcome) -> Iterator[Row]:
    """The rows of one condition, as INTERVENTION_FIELDS."""
    from probe.tasks.choice import tool_probabilities

    first, last = condition.layers
    common = {
        "task_id": task_id,
        "experiment": condition.experiment,
        "condition": number,
        "subject": condition.subject,
        "other": condition.other,
        "detail": None if condition.detail is None else json.dumps(condition.detail, ensure_ascii=False),
        "layer_from": first,
        "layer_to": last,
        "n_tokens": condition.n_tokens,
        "weight": condition.weight,
        "part": condition.part,
    }
    entries = tool_probabilities(condition.prompt, outcome.candidate_token_log_probs, outcome.opener_log_prob)
    for entry in entries:
        name = entry["tool"]
        yield common | {
            "tool": name if name is None else condition.renamed.get(name, name),
            "log_prob": entry["log_prob"],
        }
