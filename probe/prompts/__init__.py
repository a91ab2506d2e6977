"""From a task to token ids with labelled spans. The only room that tokenises.

A prompt is built from segments. Template markup may contain special tokens; the text of tasks and tools is
data and is encoded with every special token as plain text, so that it can neither end a turn nor start a
call. Each segment is encoded once, on its own, so its token span is known by construction.

Position 0 is always a token that carries no content (the attention sink): the template's first special
token, else the beginning-of-sequence token. Without one the first content token becomes the sink and what is
read from it is wrong (StreamingLLM, Xiao et al. 2023, section 3).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from probe.prompts.assemble import assemble
from probe.prompts.chat import chat
from probe.prompts.codec import Codec
from probe.prompts.labels import QUESTION, SYSTEM, USER, example_label, step_label
from probe.prompts.parts import Candidate, Prompt, ReplyForm, Segment, Span
from probe.prompts.replies import reply_ids
from probe.prompts.steps import announces_answer, label_completion, split_steps
from probe.prompts.tools import (
    AGENT_INSTRUCTION,
    NO_TOOL,
    TOOL_INSTRUCTION,
    candidates_at,
    continued,
    tools_prompt,
)
from probe.tasks.schema import AgentTask, CotTask, Message, PromptingTask, Task, ToolTask, Variant

__all__ = [
    "AGENT_INSTRUCTION",
    "ANSWER_CUE",
    "COT_INSTRUCTION",
    "NO_TOOL",
    "TOOL_INSTRUCTION",
    "Candidate",
    "Codec",
    "Prompt",
    "ReplyForm",
    "Segment",
    "Span",
    "announces_answer",
    "candidates_after",
    "candidates_at",
    "chat_prompt",
    "continued",
    "label_completion",
    "prompt_of",
    "render",
    "reply_ids",
    "split_steps",
    "words_of",
]

COT_INSTRUCTION = (
    "Solve the problem step by step. Write each step as one short sentence on its own line. "
    'When you are done, write a last line of the form "Answer: " followed by the answer alone.'
)
ANSWER_CUE = "Answer:"


def render(task: Task, codec: Codec, *, max_new_tokens: int, reference: bool = False) -> list[Prompt]:
    """The prompts of a task, one a passage. `reference` teacher-forces a cot task's own steps."""
    if isinstance(task, PromptingTask):
        return [_prompting(task, variant, codec, max_new_tokens) for variant in task.variants]
    if isinstance(task, CotTask):
        return [_cot(task, codec, max_new_tokens, reference)]
    assert isinstance(task, ToolTask | AgentTask)
    return [tools_prompt(task, codec, max_new_tokens)]


def _prompting(task: PromptingTask, variant: Variant, codec: Codec, max_new_tokens: int) -> Prompt:
    if isinstance(task.input, str):
        segments = []
        if variant.system:
            segments += [Segment(variant.system, SYSTEM), Segment("\n\n")]
        for number, pair in enumerate(variant.examples, 1):
            output = variant.labels.get(pair.output, pair.output)
            segments.append(Segment(f"{pair.input}{output}\n", example_label(number)))
        segments.append(Segment(f"{variant.prefix or ''}{task.input}{variant.suffix or ''}", USER))
        template = {"name": "raw", "fallback": None}
    else:
        segments, template = chat(codec, _variant_messages(task.input, variant))
    said = [variant.labels.get(choice, choice) for choice in task.choices or ()]
    choices = tuple(
        replace(candidate, name=choice)
        for choice, candidate in zip(task.choices or (), _choices(said, segments[-1], codec), strict=True)
    )
    return assemble(variant.name, segments, codec, max_new_tokens, template=template, candidates=choices)


def _variant_messages(messages: Sequence[Message], variant: Variant) -> list[tuple[str, list[Segment]]]:
    turns: list[tuple[str, list[Segment]]] = []
    given = [m for m in messages if m.role == "system"]
    system = variant.system or (given[0].content if given else None)
    if system:
        turns.append(("system", [Segment(system, SYSTEM)]))
    for number, pair in enumerate(variant.examples, 1):
        turns.append(("user", [Segment(pair.input, example_label(number))]))
        output = variant.labels.get(pair.output, pair.output)
        turns.append(("assistant", [Segment(output, example_label(number))]))
    rest = [m for m in messages if m.role != "system"]
    last_user = max((i for i, m in enumerate(rest) if m.role == "user"), default=-1)
    for index, message in enumerate(rest):
        text = message.content
        if index == last_user:
            text = f"{variant.prefix or ''}{text}{variant.suffix or ''}"
        turns.append((message.role, [Segment(text, USER)]))
    return turns


def _choices(choices: Sequence[str], last: Segment, codec: Codec) -> tuple[Candidate, ...]:
    """Each choice tokenised jointly with the segment before it; on its own where that would change it."""
    before = codec.encode(last.text, last.markup)
    found = []
    for choice in choices:
        joint = codec.encode(last.text + choice, last.markup)
        ids = joint[len(before) :] if joint[: len(before)] == before else codec.encode(choice)
        found.append(Candidate(choice, tuple(ids)))
    return tuple(found)


def _cot(task: CotTask, codec: Codec, max_new_tokens: int, reference: bool) -> Prompt:
    system = [("system", [Segment(COT_INSTRUCTION, SYSTEM)])]
    segments, template = chat(codec, [*system, ("user", [Segment(task.question, QUESTION)])])
    forced: list[Segment] = []
    if reference and task.steps:
        forced = [Segment(f"{step}\n", step_label(n)) for n, step in enumerate(task.steps, 1)]
        forced.append(Segment(ANSWER_CUE))
    return assemble("main", segments, codec, max_new_tokens, template=template, forced=forced)


def chat_prompt(text: str, codec: Codec, max_new_tokens: int) -> Prompt:
    """One message of a user through the model's chat template, outside of any task."""
    segments, template = chat(codec, [("user", [Segment(text, USER)])])
    return assemble("main", segments, codec, max_new_tokens, template=template)


def prompt_of(content: str | Sequence[Segment], codec: Codec, max_new_tokens: int) -> Prompt:
    """A prompt from plain text (label `user`) or labelled segments, outside of any task."""
    segments = [Segment(content, USER)] if isinstance(content, str) else list(content)
    return assemble("main", segments, codec, max_new_tokens, template={"name": "raw", "fallback": None})


def candidates_after(
    content: str | Sequence[Segment] | Prompt, continuations: Sequence[str], codec: Codec
) -> list[tuple[int, ...]]:
    """Token ids of texts that follow a prompt, tokenised jointly with its last segment where it is known."""
    if isinstance(content, Prompt):
        last = Segment("")
    else:
        last = Segment(content) if isinstance(content, str) else content[-1]
    return [tuple(candidate.token_ids) for candidate in _choices(continuations, last, codec)]


def words_of(prompt: Prompt, codec: Codec, span: Span, text: str) -> list[tuple[str, int, int]]:
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
