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


# "what the answer is" asks for one, and "the answer is." ends a sentence about one.
_ASKED = re.compile(r"(?i)\b(?:what|whether|if|how|that|until|once|when|where|why)\s+$")
_THOUGHT = re.compile(r"(?i)[<\[](/?)(?:think|thinking|thought|reasoning|seed:think)[>\]]")
"""What opens a thought (`<think>`, `[THINK]`) and, with a slash, closes it."""


def thought(text: str) -> tuple[int, str | None]:
    """Where in a text the last thought ends, 0 without any, and what closes the one that is still open."""
    end, closing = 0, None
    for mark in _THOUGHT.finditer(text):
        end = mark.end()
        name = mark.group()
        closing = None if mark.group(1) else f"{name[0]}/{name[1:]}"
    return (len(text) if closing else end), closing


def _cue(text: str) -> re.Match[str] | None:
    """What announces the answer, outside of thoughts."""
    for match in _CUE.finditer(text, thought(text)[0]):
        stated = not match.group().rstrip(" *").lower().endswith("is")
        if stated or not (
            _ASKED.search(text[: match.start()]) or re.match(r"\s*[.,;!?]", text[match.end() :])
        ):
            return match
    return None


def announces_answer(text: str) -> bool:
    """Whether generated reasoning has said that the answer follows ("Answer:", "the answer is"), and not in a
    thought that is still open."""
    return _cue(text) is not None


def split_steps(text: str) -> list[tuple[int, int]]:
    """Character ranges of the reasoning steps: lines, and within a line its sentences.

    A range reaches up to the next step, white space included, so the ranges cover the text.
    """
    starts: list[int] = []
    offset = 0
    for line in text.splitlines(keepends=True):
        if _THOUGHT.sub("", line).strip():
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
        # A thought that the template opened is one here as well.
        lead = (thought(prompt.text)[1] or "").replace("/", "", 1)
        text = codec.decode(new_ids)
        cue = _cue(lead + text)
        cue_at = len(text) if cue is None else cue.start() - len(lead)
        ranges = split_steps(text[:cue_at])
        steps = [_THOUGHT.sub("", text[a:b]) for a, b in ranges]
        begins = [0, *codec.token_ends(new_ids)][: len(new_ids)]
        reasoning_end = next((i for i, begin in enumerate(begins) if begin >= cue_at), len(new_ids))
        number = 0
        for index in range(reasoning_end):
            while number + 1 < len(ranges) and begins[index] >= ranges[number + 1][0]:
                number += 1
            extend(spans, step_label(number + 1) if ranges else OTHER, start + index, start + index + 1)
    answer_from = len(new_ids) if answer_at is None else answer_at
    if answer_from > reasoning_end:
        extend(spans, OTHER, start + reasoning_end, start + answer_from)
    fields: dict[str, Any] = {"steps": [step.strip() for step in steps], "answer": None}
    if answer_from < len(new_ids):
        extend(spans, ANSWER, start + max(answer_from, reasoning_end), total)
        fields["answer"] = codec.completion(new_ids[answer_from:]).strip().partition("\n")[0].strip()
    return spans, fields
