"""Tools through a chat template that knows of them: where each is shown, and how a call is written."""

from __future__ import annotations

import json
from collections.abc import Sequence

from probe.prompts.chat import through_template
from probe.prompts.codec import Codec
from probe.prompts.labels import OTHER, tool_label
from probe.prompts.parts import Segment
from probe.tools.definitions import Tool


def aware(codec: Codec, turns, tools: Sequence[Tool]) -> tuple[list[Segment], str, str] | None:
    """Segments, call opener and call tail through a template that shows every tool; None if it does not."""
    schemas = [
        {
            "type": "function",
            "function": {"name": t.name, "description": t.description, "parameters": t.parameters},
        }
        for t in tools
    ]
    segments = through_template(codec, turns, schemas)
    if segments is None:
        return None
    text = "".join(segment.text for segment in segments if segment.markup)
    if not all(tool.name in text for tool in tools):
        return None
    call = _call_format(codec, turns, schemas)
    split = _split_tools(segments, tools, schemas)
    if call is None or split is None or _leaks(codec, turns, tools, schemas, split):
        return None
    return split, *call


def _leaks(codec: Codec, turns, tools: Sequence[Tool], schemas, split: list[Segment]) -> bool:
    """Whether a special token in a tool's text stands outside of the tool's JSON, where it would be one."""
    text = json.dumps(schemas, ensure_ascii=False)
    for token in codec.markup_tokens:
        text = text.replace(token, "x")
    harmless = json.loads(text)
    if harmless == schemas:
        return False
    segments = through_template(codec, turns, harmless)
    again = None if segments is None else _split_tools(segments, tools, harmless)
    return again is None or [s.text for s in again if s.markup] != [s.text for s in split if s.markup]


def _call_format(codec: Codec, turns, schemas) -> tuple[str, str] | None:
    """What the template writes before and after the name when the assistant calls a function."""
    name = "\ue000name\ue001"
    call = {"type": "function", "function": {"name": name, "arguments": {}}}
    user = [{"role": "user", "content": "x"}]
    asked = [*user, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        head = codec.tokenizer.apply_chat_template(
            user, tools=schemas, tokenize=False, add_generation_prompt=True
        )
        full = codec.tokenizer.apply_chat_template(asked, tools=schemas, tokenize=False)
    except Exception:  # the template has no way to write a call
        return None
    if not full.startswith(head):
        return None
    opener, found, tail = full[len(head) :].partition(name)
    return (opener, tail) if found and opener and tail else None


def _split_tools(segments: list[Segment], tools: Sequence[Tool], schemas) -> list[Segment] | None:
    """Cut each tool's JSON out of the template's text as a labelled data segment."""
    out: list[Segment] = []
    pending = list(zip(tools, schemas, strict=True))
    for segment in segments:
        if not segment.markup:
            out.append(segment)
            continue
        rest = segment.text
        while pending:
            tool, schema = pending[0]
            shown = next((text for text in _spellings(schema) if text in rest), None)
            if shown is None:
                break
            before, _, rest = rest.partition(shown)
            out += [Segment(before, OTHER, markup=True), Segment(shown, tool_label(tool.name))]
            pending.pop(0)
        out.append(Segment(rest, OTHER, markup=True))
    return None if pending else [segment for segment in out if segment.text]


def _spellings(schema: dict) -> list[str]:
    forms = [schema, schema["function"]]
    return [
        json.dumps(form, ensure_ascii=a, indent=i)
        for form in forms
        for i in (None, 4, 2)
        for a in (False, True)
    ]
