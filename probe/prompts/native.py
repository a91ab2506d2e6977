"""How a chat template shows tools and writes calls, found out by rendering."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from probe.prompts.codec import Codec
from probe.prompts.labels import tool_of
from probe.prompts.parts import PromptFault, Segment
from probe.prompts.places import Turns, placed, schema_of
from probe.tools.definitions import Tool

NAME = "\ue000name\ue001"
"""Stands for the name of a tool in what is rendered once for all tools."""
_SAMPLE = Tool(
    name="sample_tool",
    description="A sample.",
    parameters={"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}},
)
# Mistral's templates want nine characters; Kimi's calls have the name in the id alone.
CALL_ID = "callid000"
_IDS = (CALL_ID, f"functions.{NAME}:0")

_JSON_TAIL = '", "arguments": {'
_KNOWN_CALLS = (
    ("<|tool_call_start|>", "<|tool_call_start|>[", "("),
    ("<TOOLCALL>", '<TOOLCALL>[{"name": "', _JSON_TAIL),
    ("<|tool_call|>", '<|tool_call|>[{"name": "', _JSON_TAIL),
    ("[TOOL_CALLS]", '[TOOL_CALLS] [{"name": "', _JSON_TAIL),
    ("<tool_call>", '<tool_call>\n{"name": "', _JSON_TAIL),
    ("<start_function_call>", "<start_function_call>call:", "{"),
    ("<|python_tag|>", '<|python_tag|>{"name": "', '", "parameters": {'),
    ("", '{"name": "', _JSON_TAIL),
)
"""Mark that a template or a vocabulary has → opener and tail of a call, for templates that write none."""

_OPEN_THOUGHT = re.compile(r"<think>\s*\Z")


@dataclass(frozen=True)
class CallFormat:
    """How a template that shows tools writes a call."""

    opener: str
    """Between the prompt and the name of the tool."""
    tail: str
    """From the name on."""
    message: dict[str, Any] | None
    """The assistant's message of a call of `NAME`; None where the template writes no calls and this one is assumed."""


@lru_cache(maxsize=8)
def call_format(codec: Codec) -> CallFormat | None:
    """How calls are written where the template shows tools; None where it does not.

    That depends on the template alone: all tasks of a run are rendered by one rule.
    """
    user = {"role": "user", "content": "a request"}
    tools = [schema_of(_SAMPLE)]
    asked = [[user], [{"role": "system", "content": "an instruction"}, user]]
    shown = [
        text for text in (_rendered(codec, messages, tools) for messages in asked) if _SAMPLE.name in text
    ]
    if not shown:
        return None
    head = _rendered(codec, [user], tools) or shown[0]
    for message in _calls(NAME, "{}", {}):
        full = _rendered(codec, [user, message], tools, open_turn=False)
        opener, named, tail = _behind(head, full).partition(NAME)
        if named and opener.strip() and tail:
            return CallFormat(opener, tail, message)
    vocabulary = codec.tokenizer.get_added_vocab()
    known = (entry for entry in _KNOWN_CALLS if entry[0] in vocabulary or entry[0] in codec.template.source)
    _, opener, tail = next(known)
    return CallFormat(_closing(head) + opener, tail, None)


def _calls(name: str, as_text: str, as_object: dict[str, Any]):
    """The assistant's message of a call, in the spellings that templates accept, the commonest first."""
    for arguments, call_id, content in itertools.product((as_object, as_text), _IDS, ("", None)):
        function = {"name": name, "arguments": arguments}
        call = {"type": "function", "id": call_id, "function": function}
        yield {"role": "assistant", "content": content, "tool_calls": [call]}


def _behind(head: str, full: str) -> str:
    """What the model writes behind `head` to come to `full`; empty where the two part before the turn."""
    if full.startswith(head):
        return full[len(head) :]
    if (thought := _OPEN_THOUGHT.search(head)) and full.startswith(head[: thought.start()]):
        return _closing(head) + full[thought.start() :].lstrip()  # the history leaves the opened thought out
    bare = head.rstrip()  # an opened turn and one that was said may differ in white space
    return full[len(bare) :].lstrip() if full.startswith(bare) else ""


def _closing(head: str) -> str:
    """What ends the thought that a prompt leaves open."""
    return "\n</think>\n\n" if head.rfind("<think>") > head.rfind("</think>") else ""


def _rendered(codec: Codec, messages, tools, *, open_turn: bool = True) -> str:
    try:
        return codec.template.render(messages, tools, open_turn=open_turn)
    except PromptFault:
        return ""


def shown_natively(codec: Codec, turns: Turns, tools: Sequence[Tool]) -> list[Segment]:
    """Segments of a conversation through a template that shows tools.

    Raises PromptFault where the template does not show all of them, and as `placed`.
    """
    segments = placed(codec, turns, tools)
    labels = {tool_of(segment.label) for segment in segments}
    if hidden := [tool.name for tool in tools if tool.name not in labels]:
        names = ", ".join(hidden[:3]) + (", …" if len(hidden) > 3 else "")
        what = f"the chat template leaves out {len(hidden)} of {len(tools)} tools ({names})"
        raise PromptFault(f"{what}: show fewer, or rename them")
    return segments
