"""A transcript that is given as a prompt: all of it teacher-forced, with the place of every turn, call and result.

Tokens of a log are used as they are, and the texts of its messages are searched for in them; a conversation without tokens is
rendered as any other.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from probe.prompts.assemble import assemble
from probe.prompts.codec import Codec, carriers
from probe.prompts.labels import ANSWER, BOS, OTHER, result_label, step_label, step_of
from probe.prompts.parts import Given, GivenTurn, Prompt, PromptFault, Segment, Span
from probe.prompts.tools import conversation, tools_prompt
from probe.prompts.turns import ChatTurn, Turns
from probe.tools.calls.thoughts import last_thought
from probe.tools.definitions import Tool


def transcript_prompt(
    turns: Sequence[ChatTurn],
    tools: Sequence[Tool],
    codec: Codec,
    *,
    instruction: str,
    token_ids: Sequence[int] = (),
    emitted: Sequence[tuple[int, int]] = (),
) -> Prompt:
    """The prompt of a whole conversation, up to the last turn of the assistant.

    `token_ids`: its tokens where they are known, `emitted` the ranges of them that the model emitted; without them these are the
    turns between what opens a turn of the assistant and what ends it. Raises PromptFault where the conversation has no turn
    of the assistant, cannot be rendered, or does not fit the context.
    """
    spoken = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    if not spoken:
        raise PromptFault("the conversation has no turn of the assistant: there is nothing to replay")
    n_emitted = len(emitted) if emitted else len(spoken)
    first = spoken[-n_emitted] if n_emitted <= len(spoken) else spoken[0]
    base = tools_prompt(list(turns[:first]), tools, codec, 0, instruction=instruction, free=True)
    if base.truncation:
        raise PromptFault(_too_long(len(base.token_ids), codec.n_ctx))
    if token_ids and not emitted:
        emitted = _found(codec, base, token_ids)
        first = spoken[-min(len(emitted), len(spoken))]
    labelled = _labelled(turns[: spoken[-1] + 1], first)
    segments, template = conversation(codec, labelled, tools, instruction=instruction, open_turn=False)
    ids, spans, ranges = (
        _placed(codec, segments, token_ids, emitted) if token_ids else _rendered(codec, segments, template)
    )
    template = {**template, "reply": base.template.get("reply")}
    if behind := len(turns) - 1 - spoken[-1]:
        template["left_out"] = f"{behind} messages behind the last turn of the assistant"
    given = tuple(
        GivenTurn(start, end - ended, ended)
        for start, end in ranges
        for ended in [ids[end - 1] in codec.eos_ids]
    )
    total = given[-1].end + given[-1].ended
    n_prompt = given[0].start
    if n_prompt < 1:
        raise PromptFault("the first emitted token has none before it: a transcript begins with a prompt")
    spans = _whole_spans(spans, given, ids, codec, total)
    side = len(codec.encode((base.call_lead or "") + (base.call_prefix or ""), True))
    side += max(len(candidate.token_ids) for candidate in base.candidates)
    if total + side > codec.n_ctx:
        raise PromptFault(_too_long(total + side, codec.n_ctx))
    return replace(
        base,
        text=codec.decode(ids[:n_prompt]),
        token_ids=list(ids[: total - 1]),
        n_prompt=n_prompt,
        spans=[_until(span, total - 1) for span in spans if span.start < total - 1],
        template=template,
        given=Given(given, ids[total - 1], tuple(spans)),
    )


def _too_long(needed: int, n_ctx: int) -> str:
    return (
        f"the transcript and what is scored beside it need {needed} tokens, the context has {n_ctx}: give fewer turns, "
        "or take a model with a longer context"
    )


def _until(span: Span, end: int) -> Span:
    return span if span.end <= end else replace(span, end=end, parts=())


def _labelled(turns: Sequence[ChatTurn], first: int) -> Turns:
    """The turns from `first` on with the labels of a transcript: `step:K`, `result:K`, and `answer` of a last turn that calls
    nothing."""
    out: Turns = []
    number = 0
    for index, turn in enumerate(turns):
        label = turn.label
        if index >= first and turn.role == "assistant":
            number += 1
            last = index == len(turns) - 1 and not turn.calls
            label = ANSWER if last else step_label(number)
        elif turn.role == "tool" and number:
            label = result_label(number)
        parts = [
            replace(part, label=label if part.label == turn.label else part.label) for part in turn.parts
        ]
        out.append(turn._replace(parts=parts, label=label))
    return out


def _is_turn(label: str) -> bool:
    return label == ANSWER or step_of(label) is not None


def _rendered(
    codec: Codec, segments: list[Segment], template: dict[str, Any]
) -> tuple[list[int], list[Span], list[tuple[int, int]]]:
    """(token ids, spans, range of each turn with the mark that ends it) of a conversation that is rendered."""
    prompt = assemble("main", segments, codec, 1, template=template)
    if prompt.truncation:
        raise PromptFault(_too_long(prompt.truncation["tokens_dropped"] + codec.n_ctx, codec.n_ctx))
    ranges: dict[str, tuple[int, int]] = {}
    for span in prompt.spans:
        if _is_turn(span.label):
            start, _ = ranges.get(span.label, (span.start, 0))
            ranges[span.label] = start, span.end
    if not ranges:
        raise PromptFault(
            "the chat template leaves out the turns of the assistant: give the tokens of the log"
        )
    ids = prompt.token_ids
    ended = [(start, end + (end < len(ids) and ids[end] in codec.eos_ids)) for start, end in ranges.values()]
    return ids, prompt.spans, ended


# -- tokens of a log -------------------------------------------------------------------------------------------------


def _found(codec: Codec, base: Prompt, token_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of the turns of the assistant in a log's tokens: behind what opens a turn, up to the token that ends it.

    Raises PromptFault where none is there.
    """
    ids, found = list(token_ids), list[tuple[int, int]]()
    for opening in _openings(codec, base):
        at = 0
        while opening:
            at = next((n for n in range(at, len(ids)) if ids[n : n + len(opening)] == opening), len(ids))
            start = at + len(opening)
            if start >= len(ids):
                break
            end = next((n + 1 for n in range(start, len(ids)) if ids[n] in codec.eos_ids), len(ids))
            found.append((start, end))
            at = end
        if found:
            return found
    n = base.n_prompt
    if ids[:n] == base.token_ids[:n] and n < len(ids):
        return [(n, next((m + 1 for m in range(n, len(ids)) if ids[m] in codec.eos_ids), len(ids)))]
    what = "what opens a turn of the assistant is not among the token ids"
    raise PromptFault(f'{what}: give "emitted", the ranges [start, end] that the model emitted')


def _openings(codec: Codec, base: Prompt) -> Iterator[list[int]]:
    """Tokens that open a turn of the assistant: with the thought that the template opens, and without it."""
    text = base.text
    thought = last_thought(text)
    for shown in dict.fromkeys((text, text[: len(text) - len(thought)])):
        ends = [codec.decode([token]) for token in codec.eos_ids]
        at = max((shown.rfind(end) + len(end) for end in ends if end and end in shown), default=-1)
        opening = shown[at:].lstrip("\n") if at >= 0 else shown[shown.rfind("\n", 0, -1) + 1 :]
        yield codec.encode(opening, True)


def _placed(
    codec: Codec, segments: list[Segment], token_ids: Sequence[int], emitted: Sequence[tuple[int, int]]
) -> tuple[list[int], list[Span], list[tuple[int, int]]]:
    """(token ids, spans, range of each turn with the mark that ends it) of a log: texts are where they are next read."""
    ids, ranges = list(token_ids), [(start, end) for start, end in emitted]
    text, ends = codec.decode(ids), codec.token_ends(ids)
    labels = list(dict.fromkeys(segment.label for segment in segments if _is_turn(segment.label)))
    labels = labels if len(labels) == len(ranges) else [step_label(n) for n in range(1, len(ranges) + 1)]
    spans = [Span(label, start, end) for label, (start, end) in zip(labels, ranges, strict=True)]
    at = 0
    for segment in segments:
        if segment.label == OTHER:
            continue
        if segment.label in labels:
            at = max(at, ends[ranges[labels.index(segment.label)][1] - 1])
            continue
        place = at if text.startswith(segment.text, at) else -1
        if place < 0 and segment.text.strip():
            place = text.find(segment.text, at)
        if place < 0:
            continue
        at = place + len(segment.text)
        start, end = bisect.bisect_right(ends, place), bisect.bisect_left(ends, at) + 1
        parts = carriers([part.moved(place) for part in segment.parts], ends, start, end)
        spans.append(Span(segment.label, start, end, tuple(parts)))
    return ids, sorted(spans, key=lambda span: span.start), ranges


def _whole_spans(
    spans: Sequence[Span], turns: Sequence[GivenTurn], ids: Sequence[int], codec: Codec, total: int
) -> list[Span]:
    """Spans that cover the transcript, in order and disjoint: a turn without the token that ends it, what has no label as
    `other`, position 0 apart."""
    ended = {turn.end for turn in turns if turn.ended}
    out: list[Span] = []
    at = 1
    first = spans[0].label if spans and spans[0].start == 0 and ids[0] not in codec.special_ids else BOS
    out.append(Span(first, 0, 1))
    for span in spans:
        end = min(span.end - (span.end - 1 in ended and _is_turn(span.label)), total)
        start = max(span.start, at)
        if start >= end or span.label == OTHER:
            continue
        if start > at:
            out.append(Span(OTHER, at, start))
        parts = tuple(part for part in span.parts if part.start >= start and part.end <= end)
        out.append(Span(span.label, start, end, parts))
        at = end
    return [*out, *([Span(OTHER, at, total)] if at < total else [])]


def results_of(turns: Sequence[ChatTurn], n_emitted: int) -> list[list[str]]:
    """What came back behind each of the last `n_emitted` turns of the assistant, by turn."""
    spoken = [index for index, turn in enumerate(turns) if turn.role == "assistant"][-n_emitted:]
    out: list[list[str]] = [[] for _ in range(n_emitted)]
    for index, turn in enumerate(turns):
        number = bisect.bisect_left(spoken, index) - 1 + n_emitted - len(spoken)
        if turn.role == "tool" and number >= 0:
            out[number].append("".join(part.text for part in turn.parts))
    return out
