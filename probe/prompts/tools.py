"""Prompts that show tools, and the tokens of each choice among them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any
from urllib.parse import unquote

from probe.prompts.assemble import assemble
from probe.prompts.calls import call_format
from probe.prompts.chat import chat
from probe.prompts.codec import Codec
from probe.prompts.labels import NO_TOOL, OTHER, SYSTEM, tool_label
from probe.prompts.native import shown_natively
from probe.prompts.parts import Candidate, Prompt, PromptFault, Segment, Span
from probe.prompts.places import parts_of_json
from probe.prompts.replies import reply_form
from probe.prompts.turns import INSTRUCTING, ChatTurn, Turns
from probe.tools.calls.thoughts import EMPTY_THOUGHT, closing_of, last_thought
from probe.tools.definitions import Tool

_NO_TOOL_DESCRIPTION = "Only when no other function is related to the request."
_CALL_OPENER = '<tool_call>[{"name": "'
_CALL_TAIL = '", "arguments": {"'


def tools_prompt(
    turns: Sequence[ChatTurn],
    tools: Sequence[Tool],
    codec: Codec,
    max_new_tokens: int,
    *,
    instruction: str,
    free: bool,
) -> Prompt:
    """A chat in which tools can be called.

    `instruction` is said where the chat template has no place for tools. The prompt ends in the slot for a tool's
    name; a `free` one leaves it to the model to open a call, and says how results go back.
    """
    written = call_format(codec) if codec.template else None
    segments, template = conversation(codec, turns, tools, instruction=instruction)
    if written is not None:
        opener = written.opener
        names: list[str | None] = [tool.name for tool in tools]
        no_tool = "complement"
        spoken = [tool.name for tool in tools]
        tails = [written.tail_of(tool) for tool in tools]
    else:
        spoken_no_tool = template["no_tool_name"]
        opener = _CALL_OPENER
        names, spoken = (
            [*(tool.name for tool in tools), None],
            [*(t.name for t in tools), spoken_no_tool],
        )
        tails = [_CALL_TAIL] * len(names)
        no_tool = "listed"
    candidates = tuple(
        Candidate(name, _candidate_ids(codec, opener, text, tail))
        for name, text, tail in zip(names, spoken, tails, strict=True)
    )
    lead = _before_call(segments, written.lead if written else "")
    slot = [] if free else [Segment(opener, OTHER, markup=True)]
    n_opener = len(codec.encode(opener, True))
    if lead and not free:  # in one piece with what the prompt ends in, so that they are tokenised together
        segments = [*segments[:-1], replace(segments[-1], text=segments[-1].text + lead)]
        template["closed_thought"] = lead
    # Where the model makes no call, the opener and a name are attached behind the prompt.
    attached = len(codec.encode(lead, True)) + n_opener + max(len(c.token_ids) for c in candidates)
    spare = max(max_new_tokens, 0 if slot else attached)
    prompt = assemble(
        "main",
        [*segments, *slot],
        codec,
        spare,
        template=template,
        candidates=candidates,
        n_apart=len(slot),
    )
    if written:
        prompt.dialect, prompt.readable = written.dialect, written.readable
    prompt.call_lead = lead if free else ""
    prompt.no_tool, prompt.call_prefix = no_tool, opener
    prompt.call_tails = dict(zip(names, tails, strict=True))
    prompt.n_opener = n_opener if slot else 0
    if free:
        prompt.reply = reply_form(codec, tools if written else ())
        template["reply"] = prompt.reply.name
    return prompt


def conversation(
    codec: Codec,
    turns: Sequence[ChatTurn],
    tools: Sequence[Tool],
    *,
    instruction: str,
    open_turn: bool = True,
) -> tuple[list[Segment], dict[str, Any]]:
    """Segments of a chat in which tools can be called, up to the assistant's turn with `open_turn`, and how they were
    rendered: by a template that shows tools, or with the tools listed in the system's message behind `instruction`."""
    written = call_format(codec) if codec.template else None
    if written is not None:
        segments, template = shown_natively(codec, list(turns), tools, open_turn=open_turn)
        return segments, template | {"name": "chat with tools"} | written.record()
    no_tool = _free_name(tools)
    segments, template = chat(codec, _listed_turns(turns, tools, no_tool, instruction), open_turn=open_turn)
    listed = {tool_label(tool.name): _tool_json(tool) for tool in tools}
    segments = [
        replace(shown, parts=parts_of_json(shown.text)) if shown.text == listed.get(shown.label) else shown
        for shown in segments
    ]
    reason = "the chat template does not show the tools" if codec.template else "no chat template"
    reasons = dict.fromkeys(filter(None, (template["fallback"], reason)))
    return segments, {**template, "fallback": "; ".join(reasons), "no_tool_name": no_tool}


def _before_call(segments: Sequence[Segment], habit: str) -> str:
    """What has to stand between a prompt and a call, so that the call is in no thought: the end of the one that the prompt
    opens, or the empty one that the template itself puts there (`habit`)."""
    thought = last_thought(segments[-1].text) if segments[-1].markup else ""
    empty = EMPTY_THOUGHT.match(habit)
    if closing := closing_of(thought):
        return habit if empty and not empty["opening"] else closing
    return habit if empty and empty["opening"] and not thought else ""


def candidates_at(prompt: Prompt, codec: Codec, before: str, lead: str) -> tuple[Candidate, ...]:
    """The prompt's candidates in a slot of generated text: after `before`, beginning with `lead`.

    `lead` is not empty where a token reaches over the border to the name. Tokenised jointly with `before`; a
    name that no quotation mark opens is taken to be followed by a parenthesis.
    """
    if (before, lead) == (prompt.call_prefix, ""):
        return prompt.candidates
    alike = (before + lead).endswith((prompt.call_prefix or "")[-1:])
    spoken = prompt.template.get("no_tool_name")

    def tokens(name: str | None) -> tuple[int, ...]:
        tail = prompt.call_tails.get(name, '"') if alike else "("
        return _candidate_ids(codec, before, f"{lead}{spoken if name is None else name}", tail)

    return tuple(Candidate(candidate.name, tokens(candidate.name)) for candidate in prompt.candidates)


def _candidate_ids(codec: Codec, opener: str, name: str, tail: str) -> tuple[int, ...]:
    """Tokens of NAME in the call, tokenised jointly with the opener, up to the first that passes the name.

    With the closing token included no name is a prefix of another.
    """
    before = codec.encode(opener, True)
    ids, ends = codec.encode_with_offsets(opener + name + tail, True)
    limit = len(opener) + len(name)
    if ids[: len(before)] != before:  # the opener's last token would merge with the name: encode them apart
        ids, ends = codec.encode_with_offsets(name + tail, False)
        ids, ends, limit = [*before, *ids], [0] * len(before) + ends, len(name)
    stop = next(i for i in range(len(before), len(ids)) if ends[i] > limit)
    return tuple(ids[len(before) : stop + 1])


def _free_name(tools: Sequence[Tool]) -> str:
    name = NO_TOOL
    while any(tool.name == name for tool in tools):
        name += "_here"
    return name


def _listed_turns(turns: Sequence[ChatTurn], tools: Sequence[Tool], no_tool: str, instruction: str) -> Turns:
    """The plain fallback: the system message lists one JSON object a tool, "no tool" last."""
    listing = [Segment(instruction.format(no_tool=no_tool) + "\n<tools>\n", SYSTEM)]
    for tool in tools:
        listing += [Segment(_tool_json(tool), tool_label(tool.name)), Segment("\n", SYSTEM)]
    nothing = Tool(
        name=no_tool, description=_NO_TOOL_DESCRIPTION, parameters={"type": "object", "properties": {}}
    )
    listing += [Segment(_tool_json(nothing) + "\n</tools>", SYSTEM)]
    first = next((n for n, turn in enumerate(turns) if turn.role not in INSTRUCTING), len(turns))
    system = [segment for turn in turns[:first] for segment in turn.parts]
    if system:
        listing = [*system, Segment("\n\n", SYSTEM), *listing]
    return [ChatTurn("system", listing, None, SYSTEM), *turns[first:]]


def _tool_json(tool: Tool) -> str:
    """One line a tool: name, description, and what each parameter is."""
    try:
        parameters = _fields(tool.parameters, _References(tool.parameters))
    except RecursionError:
        raise PromptFault(f"the parameters of {tool.name} refer too deep to be listed") from None
    return json.dumps(
        {"name": tool.name, "description": tool.description, "parameters": parameters}, ensure_ascii=False
    )


_MOST_PARTS = 20_000
"""Of a schema whose references are resolved: two to the same, level by level, make exponentially many."""


class _References:
    """What the references of a schema stand for; none leads around in a circle."""

    def __init__(
        self, root: dict[str, Any], followed: tuple[str, ...] = (), counter: Iterator[int] | None = None
    ):
        self._root, self._followed, self._counter = root, followed, counter or count()

    def resolve(self, schema: Any) -> tuple[dict[str, Any], _References]:
        """A schema without a reference at its top, and the references as they are within it."""
        if not isinstance(schema, dict):
            return {}, self
        if next(self._counter) > _MOST_PARTS:
            what = f"with their references, the parameters of a tool have more than {_MOST_PARTS:,} parts"
            raise PromptFault(what)
        target = schema.get("$ref")
        if not isinstance(target, str):
            return schema, self
        siblings = {key: value for key, value in schema.items() if key != "$ref"}
        if target in self._followed:
            return {"description": target.rpartition("/")[2]} | siblings, self
        value: Any = self._root
        for part in unquote(target).removeprefix("#").split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, dict):
            return {"description": target.rpartition("/")[2]} | siblings, self
        followed = (*self._followed, target)
        inner, references = _References(self._root, followed, self._counter).resolve(value)
        return inner | siblings, references


_BRANCHES = ("anyOf", "oneOf", "allOf")


def _fields(schema: Any, references: _References) -> dict[str, Any]:
    """What each parameter of an object is, and of each way to give them where there are several."""
    schema, references = references.resolve(schema)
    fields = schema.get("properties")
    out = (
        {name: _gist(value, references) for name, value in fields.items()} if isinstance(fields, dict) else {}
    )
    for word in _BRANCHES:
        if isinstance(branches := schema.get(word), list):
            ways = [way for way in (_fields(branch, references) for branch in branches) if way]
            if word == "allOf":
                for way in ways:
                    out |= way
            elif ways:
                out[word] = ways
    return out


def _gist(schema: Any, references: _References) -> Any:
    """A parameter in a few words: its description or else its type, and its options. Objects without a description are
    shown by their fields."""
    schema, references = references.resolve(schema)
    words = schema.get("description") or _type(schema, references)
    options = schema.get("enum")
    if isinstance(options, list) and options and isinstance(words, str):
        return f"{words} (one of: {', '.join(map(_text, options))})".lstrip()
    return words


def _type(schema: dict[str, Any], references: _References) -> Any:
    if "const" in schema:
        return f"always {_text(schema['const'])}"
    kind = schema.get("type", "")
    if isinstance(kind, list):
        return " or ".join(map(str, kind))
    if fields := _fields(schema, references):
        return fields
    for word in _BRANCHES:
        if isinstance(branches := schema.get(word), list):
            ways = list(dict.fromkeys(_text(_gist(branch, references)) for branch in branches))
            return (" and " if word == "allOf" else " or ").join(filter(None, ways))
    items = schema.get("items")
    if kind == "array" and isinstance(items, dict):
        inner, below = references.resolve(items)
        if fields := _fields(inner, below):
            return [fields]
    return f"{kind} or null" if kind and schema.get("nullable") is True else kind


def _text(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def continued(
    prompt: Prompt, codec: Codec, preface: Sequence[str | Sequence[int]], *, opener: bool
) -> Prompt | None:
    """The prompt of a tool task with something said before the call; None where that passes the context.

    `said` are texts (data) and token ids as they were generated; `opener` puts the call opener behind them.
    """
    token_ids = prompt.token_ids[: prompt.n_prompt - prompt.n_opener]
    for part in preface:
        token_ids = [*token_ids, *(codec.encode(part) if isinstance(part, str) else part)]
    spans = [span for span in prompt.spans if span.end <= prompt.n_prompt - prompt.n_opener]
    behind = codec.encode(prompt.call_prefix or "", True) if opener else []
    start = spans[-1].end if spans else 0
    token_ids = [*token_ids, *behind]
    room = max([1, *(len(candidate.token_ids) for candidate in prompt.candidates)])
    if len(token_ids) + room > codec.n_ctx:
        return None
    return replace(
        prompt,
        text=codec.decode(token_ids),
        token_ids=token_ids,
        n_prompt=len(token_ids),
        n_opener=len(behind),
        spans=[*spans, Span(OTHER, start, len(token_ids))],
    )
