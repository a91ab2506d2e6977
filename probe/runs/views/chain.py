"""A chain of thought as it was run: the question, the steps and the answer as runs of positions."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from functools import cached_property

from probe.prompts.labels import ANSWER, QUESTION, step_of
from probe.runs.records import CotRecord, Span

_SHARE = 4
"""Sources of one size that have one random run between them."""


class Chain:
    """A reasoning as it was run: its tokens, the question, the steps and the answer."""

    def __init__(self, record: CotRecord):
        self.record = record
        self.token_ids = record.passage.token_ids
        self.n_prompt = record.passage.n_prompt
        pieces: dict[str, list[Span]] = {}
        for span in record.passage.spans:
            pieces.setdefault(span.label, []).append(span)
        # A label in several pieces, as of a question that a truncated prompt cut, is no one run of positions.
        whole = {label: spans[0] for label, spans in pieces.items() if len(spans) == 1 and spans[0].start > 0}
        self.question = whole.get(QUESTION)
        self.answer = whole.get(ANSWER)
        self.steps = [span for label, span in whole.items() if step_of(label) is not None]

    @property
    def sources(self) -> list[Span]:
        return [*([self.question] if self.question else []), *self.steps]

    def readers(self, source: Span) -> list[Span]:
        """What comes behind a source and was emitted."""
        emitted = [*self.steps, *([self.answer] if self.answer else [])]
        return [span for span in emitted if span.start >= source.end]

    @property
    def limit(self) -> int:
        """Sources and random runs end here: at the first row that emits the answer, else at the last row."""
        return self.answer.start - 1 if self.answer else len(self.token_ids) - 1

    def elsewhere(self, source: Span) -> Span | None:
        """A random span of the same length that shares no position with the source; fixed by the task."""
        return self._controls.get(source.label)

    @cached_property
    def _controls(self) -> dict[str, Span]:
        """label → the random run beside it. Up to _SHARE sources of one size share a run that touches none of
        them: it is then run once for all."""
        controls: dict[str, Span] = {}
        by_size: dict[int, list[Span]] = {}
        for source in self.sources:
            by_size.setdefault(source.length, []).append(source)
        for alike in by_size.values():
            for start in range(0, len(alike), _SHARE):
                group = alike[start : start + _SHARE]
                run = self._draw(group)
                for source in group:
                    control = run or self._draw([source])
                    if control is not None:
                        controls[source.label] = control
        return controls

    def _draw(self, sources: Sequence[Span]) -> Span | None:
        size = sources[0].length
        starts = [
            start
            for start in range(1, self.limit - size + 1)
            if all(start + size <= source.start or source.end <= start for source in sources)
        ]
        if not starts:
            return None
        words = json.dumps([self.record.id, sources[0].label])
        draw = random.Random(hashlib.blake2b(words.encode(), digest_size=8).digest())
        start = draw.choice(starts)
        return Span(label="random", start=start, end=start + size)
