"""Text becomes token ids with labelled spans. The only room that tokenises.

A prompt is built from segments. Template markup may contain special tokens; the text of tasks and tools is
data and is encoded with every special token as plain text, so that it can neither end a turn nor start a
call. Each segment is encoded on its own, so its token span is known by construction; what a chat template rendered is one text
where that gives other tokens, as transformers tokenises it.

Position 0 is always a token that carries no content (the attention sink): the template's first special
token, else the beginning-of-sequence token. Without one the first content token becomes the sink and what is
read from it is wrong (StreamingLLM, Xiao et al. 2023, section 3).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from probe.errors import BadInput
from probe.prompts.assemble import assemble
from probe.prompts.chat import chat
from probe.prompts.codec import Codec
from probe.prompts.labels import BOS, USER
from probe.prompts.parts import (
    Candidate,
    Given,
    Prompt,
    PromptFault,
    ReplyForm,
    Segment,
    Span,
    ToolPart,
    tool_parts,
)
from probe.prompts.replies import reply_ids
from probe.prompts.steps import ANSWER_CUE, announces_answer, label_completion, split_steps, thought
from probe.prompts.tools import NO_TOOL, candidates_at, continued, tools_prompt
from probe.prompts.transcripts import results_of, transcript_prompt
from probe.prompts.turns import ChatTurn, chat_turn

__all__ = [
    "ANSWER_CUE",
    "NO_TOOL",
    "Candidate",
    "ChatTurn",
    "Codec",
    "Given",
    "Prompt",
    "PromptFault",
    "ReplyForm",
    "Segment",
    "Span",
    "ToolPart",
    "announces_answer",
    "assemble",
    "candidates_after",
    "candidates_at",
    "chat",
    "chat_prompt",
    "choice_candidates",
    "continued",
    "label_completion",
    "prompt_of",
    "prompt_of_tokens",
    "reply_ids",
    "results_of",
    "special_token_in",
    "split_steps",
    "thought",
    "tool_parts",
    "tools_prompt",
    "transcript_prompt",
    "words_of",
]


def choice_candidates(choices: Sequence[str], last: Segment, codec: Codec) -> tuple[Candidate, ...]:
    """Each choice tokenised jointly with the segment before it; on its own where that would change it."""
    before = codec.encode(last.text, last.markup)
    candidates = []
    for choice in choices:
        joint = codec.encode(last.text + choice, last.markup)
        ids = joint[len(before) :] if joint[: len(before)] == before else codec.encode(choice)
        candidates.append(Candidate(choice, tuple(ids)))
    return tuple(candidates)


def chat_prompt(text: str, codec: Codec, max_new_tokens: int) -> Prompt:
    """One message of a user through the model's chat template, outside of any task."""
    segments, template = chat(codec, [chat_turn("user", text)])
    return assemble("main", segments, codec, max_new_tokens, template=template)


def prompt_of(
    content: str | Sequence[Segment],
    codec: Codec,
    max_new_tokens: int,
    candidates: tuple[Candidate, ...] = (),
) -> Prompt:
    """A prompt from plain text (label `user`) or labelled segments, outside of any task.

    Raises PromptFault where it does not fit the context with the longest candidate behind it.
    """
    segments = [Segment(content, USER)] if isinstance(content, str) else list(content)
    template = {"name": "raw", "fallback": None}
    return assemble("main", segments, codec, max_new_tokens, template=template, candidates=candidates)


def prompt_of_tokens(token_ids: Sequence[int], codec: Codec) -> Prompt:
    """A prompt of tokens as they are: none is added, none is read anew. Raises BadInput for no token or an unknown one."""
    ids = [int(token) for token in token_ids]
    if not ids or not all(0 <= token < len(codec.tokenizer) for token in ids):
        raise BadInput(["token ids are numbers of the model's vocabulary, at least one"])
    if len(ids) >= codec.n_ctx:
        raise BadInput([f"{len(ids)} token ids leave no room in the context of {codec.n_ctx}: give fewer"])
    spans = [Span(BOS, 0, 1), *([Span(USER, 1, len(ids))] if len(ids) > 1 else [])]
    template: dict[str, Any] = {"name": "tokens", "fallback": None}
    text = codec.decode(ids)
    return Prompt("main", text, ids, len(ids), spans, template, stop_ids=codec.eos_ids)


def special_token_in(text: str, codec: Codec) -> str | None:
    """A token of the template's that the text spells out; as data it would be read as plain characters."""
    return next((token for token in codec.markup_tokens if token and token in text), None)


def candidates_after(
    content: str | Sequence[Segment] | Prompt, continuations: Sequence[str], codec: Codec
) -> list[tuple[int, ...]]:
    """Token ids of texts that follow a prompt, tokenised jointly with its last segment where it is known."""
    if isinstance(content, Prompt):
        last = Segment("")
    else:
        last = Segment(content) if isinstance(content, str) else content[-1]
    return [tuple(candidate.token_ids) for candidate in choice_candidates(continuations, last, codec)]


def words_of(prompt: Prompt, codec: Codec, span: Span | ToolPart, text: str) -> list[tuple[str, int, int]]:
    """(word, start, end) of each word of a text that stands in a span, with the positions that carry it.

    The text may be spelled as in JSON. Empty where it does not stand there as a whole. A token that carries the
    end of one word and the beginning of the next belongs to both.
    """
    ids = prompt.token_ids[span.start : span.end]
    shown, ends = codec.decode(ids), codec.token_ends(ids)
    spellings = [text, *(json.dumps(text, ensure_ascii=a)[1:-1] for a in (False, True))]
    first = next((at for at in map(shown.find, spellings) if at >= 0), None)
    length = next((len(spelling) for spelling in spellings if spelling in shown), 0)
    if first is None:
        return []
    words = []
    for word in re.finditer(r"\S+", shown[first : first + length]):
        low, high = first + word.start(), first + word.end()
        carriers = [
            index
            for index, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
            if begin < high and end > low
        ]
        if carriers:
            words.append((word.group(), span.start + carriers[0], span.start + carriers[-1] + 1))
    return words
