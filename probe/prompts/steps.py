"""What was said after a prompt: reasoning steps, the cue of an answer, the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from probe.prompts.assemble import extend
from probe.prompts.codec import Codec
from probe.prompts.labels import ANSWER, OTHER, step_label, step_of
from probe.prompts.parts import Prompt, Span

ANSWER_CUE = "Answer:"
# What leads up to it ("So the", "**") belongs to the cue: alone it would be counted as a step.
_CUE = re.compile(
    r"(?i)(?:\b(?:so|thus|hence|therefore),? )?[*#]*\s*(?:\bthe )?\b(?:final )?answer(?: is)?\s*(?::|=| is\b)\s*\**\s*"
)
# Behind it: a capital, a figure, a quote or bracket, an amount, markup, or "x = ".
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[A-Z0-9\"'(*\\]|\$|[a-z] ?[=+*/-])")
# The full stop after the number of a list ("1. Do this"), a title, a month or a letter in front ends no sentence.
_NO_END = re.compile(
    r"(?:^\s*\d+\.|^\s*[A-Z]\.|(?<!\w)(?:Mr|Mrs|Ms|Dr|Prof|St|Fig|Eq|vs|approx|e\.g|i\.e|cf"
    r"|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.)\s*$"
)


def announces_answer(text: str) -> bool:
    """Whether generated reasoning has said that the answer follows ("Answer:", "the answer is")."""
    return _CUE.search(text) is not None


def split_steps(text: str) -> list[tuple[int, int]]:
    """Character ranges of the reasoning steps: lines, and within a line its sentences.

    A range reaches up to the next step, white space included, so the ranges cover the text.
    """
    starts: list[int] = []
    offset = 0
    for line in text.splitlines(keepends=True):
        if line.strip():
            starts.append(offset)
            for cut in (m.end() for m in _SENTENCE_END.finditer(line.rstrip())):
                if not _NO_END.search(line[starts[-1] - offset : cut]):
                    starts.append(offset + cut)
        offset += len(line)
    if not starts:
        return []
    starts[0] = 0
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


def label_completion(
    prompt: Prompt, codec: Codec, new_ids: Sequence[int], *, cot: bool, answer_at: int | None
) -> tuple[list[Span], dict[str, Any]]:
    """Spans of everything after the prompt, and the steps and answer read from it.

    `answer_at` is the index in new_ids of the first answer token of a cot task. A token that straddles a
    border belongs to the span in which it begins.
    """
    start, total = prompt.n_prompt, prompt.n_prompt + len(new_ids)
    if not cot:
        return ([Span(ANSWER, start, total)] if new_ids else []), {}
    spans = [span for span in prompt.spans if span.start >= start and step_of(span.label) is not None]
    if spans:
        steps = [codec.decode(new_ids[span.start - start : span.end - start]) for span in spans]
        reasoning_end = spans[-1].end - start
    else:
        text = codec.decode(new_ids)
        cue = _CUE.search(text)
        ranges = split_steps(text[: cue.start() if cue else len(text)])
        steps = [text[a:b] for a, b in ranges]
        begins = [0, *codec.token_ends(new_ids)][: len(new_ids)]
        limit = cue.start() if cue else len(text)
        reasoning_end = next((i for i, begin in enumerate(begins) if begin >= limit), len(new_ids))
        number = 0
        for index in range(reasoning_end):
            while number + 1 < len(ranges) and begins[index] >= ranges[number + 1][0]:
                number += 1
            extend(spans, step_label(number + 1) if ranges else OTHER, start + index, start + index + 1)
    answer_from = len(new_ids) if answer_at is None else answer_at
    if answer_from > reasoning_end:
        extend(spans, OTHER, start + reasoning_end, start + answer_from)
    found: dict[str, Any] = {"steps": [step.strip() for step in steps], "answer": None}
    if answer_from < len(new_ids):
        extend(spans, ANSWER, start + max(answer_from, reasoning_end), total)
        found["answer"] = codec.completion(new_ids[answer_from:]).strip().partition("\n")[0].strip()
    return spans, found
