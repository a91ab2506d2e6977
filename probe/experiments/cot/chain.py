"""A chain of thought as it was run: the question, the steps and the answer as runs of positions."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from probe.prompts.labels import ANSWER, QUESTION, step_of

_SHARE = 4
"""Sources of one size that have one random run between them."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A labelled run of positions start … end − 1."""

    label: str
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


class Chain:
    """A reasoning as it was run: its tokens, the question, the steps and the answer."""

    def __init__(self, record: Mapping[str, Any]):
        self.record = record
        self.token_ids: list[int] = list(record["token_ids"])
        self.n_prompt: int = record["n_prompt"]
        found: dict[str, list[Part]] = {}
        for span in record["spans"]:
            found.setdefault(span["label"], []).append(Part(span["label"], span["start"], span["end"]))
        # A label in several pieces, as of a question that a truncated prompt cut, is no one run of positions.
        whole = {label: parts[0] for label, parts in found.items() if len(parts) == 1 and parts[0].start > 0}
        self.question = whole.get(QUESTION)
        self.answer = whole.get(ANSWER)
        self.steps = [part for label, part in whole.items() if step_of(label) is not None]

    @property
    def sources(self) -> list[Part]:
        return [*([self.question] if self.question else []), *self.steps]

    def readers(self, source: Part) -> list[Part]:
        """What comes behind a source and was emitted."""
        emitted = [*self.steps, *([self.answer] if self.answer else [])]
        return [part for part in emitted if part.start >= source.end]

    @property
    def limit(self) -> int:
        """Sources and random runs end here: at the first row that emits the answer, else at the last row."""
        return self.answer.start - 1 if self.answer else len(self.token_ids) - 1

    def elsewhere(self, source: Part) -> Part | None:
        """A random run of as many positions that shares none with the source; fixed by the task."""
        return self._controls.get(source.label)

    @cached_property
    def _controls(self) -> dict[str, Part]:
        """label → the random run beside it. Up to _SHARE sources of one size share a run that touches none of
        them: it is then run once for all."""
        found: dict[str, Part] = {}
        by_size: dict[int, list[Part]] = {}
        for source in self.sources:
            by_size.setdefault(source.size, []).append(source)
        for alike in by_size.values():
            for start in range(0, len(alike), _SHARE):
                group = alike[start : start + _SHARE]
                run = self._draw(group)
                for source in group:
                    own = run or self._draw([source])
                    if own is not None:
                        found[source.label] = own
        return found

    def _draw(self, sources: Sequence[Part]) -> Part | None:
        size = sources[0].size
        starts = [
            start
            for start in range(1, self.limit - size + 1)
            if all(start + size <= source.start or source.end <= start for source in sources)
        ]
        if not starts:
            return None
        words = json.dumps([self.record["id"], sources[0].label])
        draw = random.Random(hashlib.blake2b(words.encode(), digest_size=8).digest())
        start = draw.choice(starts)
        return Part("random", start, start + size)
