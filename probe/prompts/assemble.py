"""From labelled segments to one sequence of tokens that fits the context."""

from __future__ import annotations

import bisect
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from probe.errors import BadInput
from probe.prompts.codec import Codec, carriers
from probe.prompts.labels import BOS, OTHER, USER, step_of, tool_of
from probe.prompts.parts import Candidate, Prompt, PromptFault, Segment, Span, ToolPart


def assemble(
    passage: str,
    segments: list[Segment],
    codec: Codec,
    max_new_tokens: int,
    *,
    template: dict[str, Any],
    candidates: tuple[Candidate, ...] = (),
    forced: Sequence[Segment] = (),
    n_apart: int = 0,
) -> Prompt:
    """The prompt of a passage. Raises PromptFault where the context has no room for it.

    What a chat template rendered is tokenised as transformers tokenises it, as one text, but for the last `n_apart` segments.
    """
    token_ids: list[int] = []
    spans: list[Span] = []
    first = codec.encode(segments[0].text, segments[0].markup)
    begins, n_prompt = 0, 0
    if codec.sink is not None and (not first or first[0] not in codec.special_ids):
        segments, begins = [Segment(codec.decode([codec.sink]), BOS, markup=True), *segments], 1
    joint = len(segments) - n_apart if str(template.get("name", "")).startswith("chat") else 0
    for index, segment in enumerate([*segments, *forced, Segment("")]):
        if index == joint > begins:
            token_ids, spans = _as_one(codec, segments[begins:joint], token_ids, spans, begins)
        if index == len(segments):
            n_prompt = len(token_ids)
        if index == begins:
            ids = codec.encode_first(segment.text, segment.markup)
        else:
            ids = codec.encode(segment.text, segment.markup, token_ids[-1] if token_ids else None)
        if ids:
            at = len(token_ids)
            parts = codec.covering(segment.text, segment.markup, ids, segment.parts)
            extend(spans, segment.label, at, at + len(ids), [part.moved(at) for part in parts])
            token_ids += ids
    n_prompt = n_prompt or len(token_ids)
    if not token_ids:
        raise BadInput(
            ["a prompt has no token: its text is empty, and the model's tokenizer puts none in front"]
        )
    _refuse_lost_text(codec, "".join(segment.text for segment in [*segments, *forced]), token_ids)
    spans = _sink_first(spans, BOS if token_ids[0] in codec.special_ids else spans[0].label)
    prompt = Prompt(
        passage=passage,
        text="".join(segment.text for segment in segments),
        token_ids=token_ids,
        n_prompt=n_prompt,
        spans=spans,
        template=template,
        candidates=candidates,
        stop_ids=codec.eos_ids,
        forced_steps=sum(step_of(segment.label) is not None for segment in forced),
    )
    _fit(prompt, codec, max_new_tokens)
    return prompt


def _as_one(
    codec: Codec, segments: Sequence[Segment], token_ids: list[int], spans: list[Span], begins: int
) -> tuple[list[int], list[Span]]:
    """(token ids, spans) of segments tokenised as one text, behind the first `begins` tokens; `token_ids` and `spans` as they
    are where that is the same, or where a text of data has a token of the template. A token on a border belongs to the
    segment of which it has most characters, of two alike to data: so a blank between marks is somebody's."""
    text = "".join(segment.text for segment in segments)
    data = "\n".join(segment.text for segment in segments if not segment.markup)
    ids = codec.encode_first(text, True)
    if ids == token_ids[begins:] or any(token and token in data for token in codec.markup_tokens):
        return token_ids, spans
    ends = codec.ends_of(text, ids)
    # Past the middle of its characters a token is the next segment's.
    middles = [(start + end) / 2 for start, end in zip([0, *ends], ends, strict=False)]
    out = spans[:begins]
    at = first = 0
    for segment, following in zip(segments, [*segments[1:], None], strict=True):
        stop = at + len(segment.text)
        to_next = segment.markup and following is not None and not following.markup
        side = bisect.bisect_left if to_next else bisect.bisect_right
        last = len(ids) if stop == len(text) else max(first, side(middles, stop))
        parts = carriers([part.moved(at) for part in segment.parts], ends, first, last)
        if last > first:
            extend(out, segment.label, begins + first, begins + last, [part.moved(begins) for part in parts])
        at, first = stop, last
    return [*token_ids[:begins], *ids], out


def extend(spans: list[Span], label: str, start: int, end: int, parts: Sequence[ToolPart] = ()) -> None:
    if spans and spans[-1].label == label and spans[-1].end == start:
        spans[-1] = Span(label, spans[-1].start, end, (*spans[-1].parts, *parts))
    else:
        spans.append(Span(label, start, end, tuple(parts)))


def _sink_first(spans: list[Span], label: str) -> list[Span]:
    head = spans[0]
    rest = [replace(head, start=1)] if head.end > 1 else []
    return [Span(label, 0, 1), *rest, *spans[1:]]


def _refuse_lost_text(codec: Codec, text: str, token_ids: Sequence[int]) -> None:
    """Raise BadInput where the tokens say another text than the prompt has.

    Blanks, the form of letters and words that the tokenizer itself marks as unknown are aside, and capitals and accents where
    it makes all of these alike.
    """
    wanted, read = (codec.folded(_letters(each)) for each in (text, codec.decode(token_ids)))
    if wanted == read:
        return
    at, unknown = 0, codec.tokenizer.unk_token
    parts = read.split(unknown) if unknown else [read]
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        place = (wanted.rfind if last and number else wanted.find)(part, at)
        if place < 0 or (number == 0 and place) or (last and place + len(part) != len(wanted)):
            raise BadInput(
                [
                    f"the model's tokenizer cannot write the text of a prompt: {wanted[at : at + 40]!r} becomes "
                    f"{part[:40]!r}; change that text or use another model"
                ]
            )
        at = place + len(part)


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).replace("\u2581", " ").split())


def _fit(prompt: Prompt, codec: Codec, max_new_tokens: int) -> None:
    """Shorten a prompt that does not fit: position 0 and the end are kept, what follows position 0 goes.

    Only earlier messages of a chat may go, with the template's words before them. Where that is not enough, room for
    all new tokens is given up: generation ends with the context. Raises PromptFault where the prompt and what is scored
    behind it do not fit: nothing is measured of what the model is not shown.
    """
    scored = max([0, *(len(candidate.token_ids) for candidate in prompt.candidates)])
    excess = len(prompt.token_ids) + max(scored, 1, min(max_new_tokens, codec.n_ctx // 2)) - codec.n_ctx
    if excess <= 0:
        return
    cut = 1 + excess
    asked = max((index for index, span in enumerate(prompt.spans) if span.label == USER), default=-1)
    dropped = {index: span.label for index, span in enumerate(prompt.spans) if 1 <= span.start < cut}
    if USER not in dropped.values() or asked in dropped or {*dropped.values()} - {USER, OTHER}:
        if len(prompt.token_ids) + scored <= codec.n_ctx:
            return
        raise PromptFault(_too_long(prompt, codec.n_ctx, scored))
    spans = [prompt.spans[0]]
    for span in prompt.spans[1:]:
        if span.end > cut:
            spans.append(replace(span, start=max(span.start, cut)).moved(-excess))
    prompt.token_ids = [prompt.token_ids[0], *prompt.token_ids[cut:]]
    prompt.spans = spans
    prompt.n_prompt -= excess
    prompt.text = codec.decode(prompt.token_ids[: prompt.n_prompt])
    rule = "the tokens after position 0 were dropped, the end of the prompt is kept"
    prompt.truncation = {"rule": rule, "tokens_dropped": excess, "n_ctx": codec.n_ctx}


def _too_long(prompt: Prompt, n_ctx: int, spare: int) -> str:
    needed = len(prompt.token_ids) + spare
    sizes: dict[str, int] = {}
    for span in prompt.spans:
        if tool_of(span.label) is not None:
            sizes[span.label] = sizes.get(span.label, 0) + span.end - span.start
    what = f"the prompt needs {needed} tokens, the context has {n_ctx}"
    left = n_ctx - (needed - sum(sizes.values()))
    fit = sum(total <= left for total in accumulate(sizes.values()))
    if fit:
        return f"{what}: {fit} of {len(sizes)} tools fit: show fewer tools, or take a model with a longer context"
    return f"{what}: shorten it, generate fewer tokens, or take a model with a longer context"
