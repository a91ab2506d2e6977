"""How a chat template writes a call: found out by rendering known calls, and held to be read back."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from probe.prompts.codec import Codec
from probe.prompts.parts import PromptFault
from probe.prompts.places import schema_of
from probe.tools.calls import UNREADABLE, Dialect, learn, read_calls
from probe.tools.calls.thoughts import EMPTY_THOUGHT, closing_of, last_thought
from probe.tools.definitions import Tool

NAME = "\ue000name\ue001"
"""Stands for the name of a tool in what is rendered once for all tools."""
ARGUMENT = "\ue000argument\ue001"
"""Stands for the name of its first argument."""
# Mistral's templates want nine characters; Kimi's calls have the name in the id alone.
CALL_ID, NAMED_ID = "callid000", f"functions.{NAME}:0"
_IDS = (CALL_ID, NAMED_ID)

_REQUEST = "a request"
_ASKED = {"role": "user", "content": _REQUEST}
_SAMPLE = Tool(
    name="find_zephyr",
    description="A sample.",
    parameters={
        "type": "object",
        "properties": {
            "mooring": {"type": "string", "description": "A mooring."},
            "rigging": {"type": "string", "description": "A rigging."},
            "places": {
                "type": "object",
                "description": "Places.",
                "properties": {},
                "additionalProperties": {"type": "string"},
            },
        },
    },
)
_HYPHENS = Tool(name="find-zephyr-2", description="A sample.", parameters=_SAMPLE.parameters)
_VALUE = "Steinadler"
_WORDS = {"mooring": "Quellwasser", "rigging": "Sandelholz"}
_NESTED = {"places": {"near": [{"city": "Oslo", "days": [1, 2.5, True]}], "far": {}}, "mooring": "x"}
_TRIALS: dict[str, tuple[tuple[str, Mapping[str, Any]], ...]] = {
    "a plain call": ((_SAMPLE.name, _WORDS),),
    "a name with hyphens": ((_HYPHENS.name, _WORDS),),
    "nested arguments": ((_SAMPLE.name, _NESTED),),
    "null": ((_SAMPLE.name, {"places": {"far": None}}),),
    "quotes and brackets in a text": (
        (_SAMPLE.name, {"mooring": 'a "b", it\'s {c} [d]\n<e>\\f ü', "rigging": "x"}),
    ),
    "a text that looks like a number": ((_SAMPLE.name, {"mooring": "5", "rigging": "true"}),),
    "no arguments": ((_SAMPLE.name, {}),),
    "several calls": ((_SAMPLE.name, _WORDS), (_HYPHENS.name, {"rigging": "x"})),
}
"""Calls that a template is given, by what is tried with them; the first is the one that a format is learnt from."""

_HALF_TAG = re.compile(r"(?:[<\[][^<>\[\]\s]*)?\Z")

_JSON_TAIL = '", "arguments": {'
_KNOWN_CALLS = (
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_begin|><|tool_call_begin|>functions.", ":0"),
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


@dataclass(frozen=True)
class CallFormat:
    """How a template that shows tools writes a call."""

    lead: str
    """What ends the thought that the prompt opens, or an empty thought that the template puts before a call."""
    opener: str
    """Between the lead and the name of the tool."""
    tail: str
    """From the name on, of a call without arguments."""
    argued: str = ""
    """From the name on up to the first argument's value, `ARGUMENT` for its name; empty where no call is written."""
    message: dict[str, Any] | None = None
    """The assistant's message of a call of `NAME`; None where the template writes no calls and this one is assumed."""
    dialect: Dialect | None = None
    """The format as it was learnt from the template, where its calls are in none that is known."""
    readable: bool = True
    """Whether a plain call that the template writes is read back as it was."""
    lost: tuple[str, ...] = ()
    """What is not read back as it was, in the words of the trials."""

    def tail_of(self, tool: Tool) -> str:
        """What follows the name in a call of a tool: a bracket in one token with what it holds is another token than an empty one.

        With the first argument that has to be given, or else the first; without any where the tool has none.
        """
        properties = tool.parameters.get("properties")
        if not self.argued or not isinstance(properties, dict) or not properties:
            return self.tail
        required = tool.parameters.get("required")
        wanted = [name for name in required if name in properties] if isinstance(required, list) else []
        return self.argued.replace(ARGUMENT, [*wanted, *properties][0])

    def record(self) -> dict[str, Any]:
        """What a prompt's record says of it."""
        if self.message is None:
            return {"assumed_call": self.opener}
        if not self.readable:
            return {"calls_unread": UNREADABLE}
        how = "by its marks" if self.dialect is None else f"as learnt, behind {self.dialect.mark}"
        return {"calls_read": how} | ({"calls_lost": ", ".join(self.lost)} if self.lost else {})


@lru_cache(maxsize=8)
def call_format(codec: Codec) -> CallFormat | None:
    """How calls are written where the template shows tools; None where it does not.

    That depends on the template alone: all tasks of a run are rendered by one rule.
    """
    asked = [[_ASKED], [{"role": "system", "content": "an instruction"}, _ASKED]]
    shown = [text for text in (_rendered(codec, messages) for messages in asked) if _SAMPLE.name in text]
    if not shown:
        return None
    turn = _WrittenTurn(codec, _rendered(codec, [_ASKED]) or shown[0])
    formats = []
    for write in _spellings():
        message = write([(NAME, {})])
        lead, written = turn.of(message)
        opener, named, tail = written.partition(NAME)
        if named and opener.strip() and tail:
            trials = {what: (calls, turn.of(write(calls))[1]) for what, calls in _TRIALS.items()}
            _, _, behind = turn.of(write([(NAME, {ARGUMENT: _VALUE})]))[1].partition(NAME)
            argued = behind.partition(_VALUE)[0] if ARGUMENT in behind.partition(_VALUE)[0] else ""
            formats.append(CallFormat(lead, opener, tail, argued, message, *_reader_of(trials)))
            if formats[-1].readable:  # else a template may print in Python's way what it wants as JSON
                return formats[-1]
    if formats:
        return formats[0]
    vocabulary = codec.tokenizer.get_added_vocab()
    known = (entry for entry in _KNOWN_CALLS if entry[0] in vocabulary or entry[0] in codec.template.source)
    _, opener, tail = next(known)
    return CallFormat(closing_of(turn.thought), opener, tail)


def _reader_of(
    trials: Mapping[str, tuple[Sequence[tuple[str, Any]], str]],
) -> tuple[Dialect | None, bool, tuple[str, ...]]:
    """(format that was learnt, whether a plain call is read, trials whose calls are not read back).

    The known formats are taken unless the learnt one reads more. What the template does not write is no trial.
    """
    plain = next(iter(trials))
    ((name, arguments),) = trials[plain][0]
    options = []
    for dialect in dict.fromkeys([None, learn(trials[plain][1], name, arguments, CALL_ID)]):
        lost = tuple(
            what
            for what, (calls, text) in trials.items()
            if all(name in text for name, _ in calls) and not _reads(calls, text, dialect)
        )
        options.append((plain in lost, len(lost), dialect, lost))
    unreadable, _, dialect, lost = min(options, key=lambda option: option[:2])
    return dialect, not unreadable, lost


def _reads(calls: Sequence[tuple[str, Any]], text: str, dialect: Dialect | None) -> bool:
    read = read_calls(text, tools=(_SAMPLE, _HYPHENS), dialect=dialect)
    return [(call.name, call.arguments or {}) for call in read if call.error is None] == [
        (name, dict(arguments)) for name, arguments in calls
    ]


def _spellings() -> Iterator[Any]:
    """Ways to give calls to a template, as functions of [(name, arguments)]: the commonest first."""
    for as_text, call_id, content in itertools.product((False, True), _IDS, ("", None)):

        def write(calls: Sequence[tuple[str, Any]], as_text=as_text, call_id=call_id, content=content):
            return assistant_calls(calls, as_text=as_text, call_id=call_id, content=content)

        yield write


def assistant_calls(
    calls: Sequence[tuple[str, Any]],
    *,
    as_text: bool = False,
    call_id: str = CALL_ID,
    content: str | None = "",
) -> dict[str, Any]:
    """The assistant's message of calls, each (name, arguments), as templates are given it."""
    written = []
    for number, (name, arguments) in enumerate(calls):
        given = json.dumps(arguments, ensure_ascii=False) if as_text else dict(arguments)
        numbered = call_id.replace(NAME, name)[:-1] + str(number)
        written.append({"type": "function", "id": numbered, "function": {"name": name, "arguments": given}})
    return {"role": "assistant", "content": content, "tool_calls": written}


class _WrittenTurn:
    """What a template puts behind the prompt for the assistant's message of a call."""

    def __init__(self, codec: Codec, head: str):
        """`head` is the prompt: the request, up to the assistant's turn."""
        self._codec = codec
        self.thought = last_thought(head[head.rfind(_REQUEST) + len(_REQUEST) :])
        self._bare = head[: len(head) - len(self.thought)]
        spoken = _rendered(codec, [_ASKED, {"role": "assistant", "content": NAME}], open_turn=False)
        self._before_said, _, self._behind_said = spoken.partition(NAME)

    def of(self, message: Mapping[str, Any]) -> tuple[str, str]:
        """(what stands before the call, the call up to the end of the turn); empty where it is not written.

        What stands before it ends the thought that the prompt opens, or is a thought without words.
        """
        body = self._body(_rendered(self._codec, [_ASKED, message], open_turn=False))
        closing = closing_of(self.thought)
        thought = EMPTY_THOUGHT.match(body)
        if thought is None:
            return (closing, body.lstrip()) if closing else ("", body)
        written = body[thought.end() :]
        if not self.thought:
            return thought[0], written
        space = self.thought[len(self.thought.rstrip()) :]
        if not closing:  # the prompt has closed it, and has white space behind it
            return "", thought["behind"].removeprefix(space) + written
        inside = thought["inside"].removeprefix(space) if thought["opening"] else thought["inside"]
        return inside + thought["closing"] + thought["behind"], written

    def _body(self, full: str) -> str:
        """The assistant's turn without its header: what stands behind the prompt's own, or else behind that of a plain
        message; empty where it cannot be told."""
        if full.startswith(self._bare):
            return full[len(self._bare) :]
        if self._bare.strip() and full.startswith(self._bare.rstrip()):
            return full[len(self._bare.rstrip()) :].lstrip()
        shared = _shared(self._before_said, full)
        shared = shared[: len(shared) - len(_HALF_TAG.search(shared)[0])]  # type: ignore[index]
        if _REQUEST not in shared:
            return ""
        behind = _shared(self._behind_said[::-1], full[len(shared) :][::-1])
        return full[len(shared) : len(full) - len(behind)]


def _rendered(codec: Codec, messages: Sequence[Mapping[str, Any]], *, open_turn: bool = True) -> str:
    try:
        return codec.template.render(messages, [schema_of(_SAMPLE), schema_of(_HYPHENS)], open_turn=open_turn)
    except PromptFault:
        return ""


def _shared(first: str, second: str) -> str:
    """What two texts both begin with."""
    size = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return first[: min(len(first), len(second)) if size is None else size]
