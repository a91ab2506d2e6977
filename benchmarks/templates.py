"""Chat templates held against transformers, a line of a table each: `python -m benchmarks.templates FILE.jinja…`.

Of each template: is a conversation given to the model token for token as transformers renders it, is the call that it writes read
back, do the tokens of a call follow the scored prompt, is the token that ends a turn known, is there one beginning of text. The
tokenizer is that of the default model with the marks of the template added; no weights are loaded.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from probe.prompts import Codec, PromptFault
from probe.prompts.assemble import assemble
from probe.prompts.calls import CallFormat, assistant_calls, call_format
from probe.prompts.chat import chat, with_system
from probe.prompts.forms import given
from probe.prompts.places import schema_of
from probe.prompts.turns import chat_turn, messages_of
from probe.tasks import Message, ToolTask, render
from probe.tools.definitions import Tool

HEAD = (
    "| template | tools | a call opens with | not read back | said in another way | other than transformers |\n"
    "|---|---|---|---|---|---|\n"
)
DATE = "2026-02-03T04:05:06"
_MARKS = re.compile(
    r"\[\|[a-z]+\|\]|<[a-z]+:[a-z_]+>|<SPECIAL_\d+>|<sep>|<escape>|\]~!?b\[?|\[e~\[|"
    r"<\|[^|<>'\"\s]{1,40}\|?>|<\|[^|<>\"\s]{1,40}\|>|<\uff5c[^\uff5c<>]{1,40}\uff5c>|<(?:start|end)_[a-z_]{1,30}>|\[/?[A-Z_]{3,30}\]"
    r"|</?(?:think|tool_call|tool_response|tools|s)>|<(?:bos|eos|turn\||\|turn)>"
)
_BEGINNINGS = (
    "<|begin_of_text|>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<bos>",
    "<s>",
    "<|startoftext|>",
)

TOOLS = (
    Tool(
        name="get_heat",
        description='Tells "how warm" a city is.',
        parameters={
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "A city."},
                "unit": {"type": "string", "enum": ["C", "F"], "description": "A unit."},
            },
            "required": ["city"],
        },
    ),
    Tool(
        name="get_hotel",
        description="Looks for a room.",
        parameters={
            "type": "object",
            "properties": {"place": {"type": "string", "description": "A place."}},
            "required": [],
        },
    ),
)
ARGUMENTS = {"city": "Rome", "unit": "C"}
ASKED = {"role": "user", "content": "How warm is it in Rome?"}
CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "get_heat", "arguments": ARGUMENTS},
}
TALK = [
    {"role": "system", "content": "Be brief."},
    ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdef123", "name": "get_heat", "content": '{"warm": 31}'},
    {"role": "assistant", "content": "It is 31 degrees."},
    {"role": "user", "content": "And a room?"},
]
PLAIN = [ASKED, {"role": "assistant", "content": "It is warm."}, {"role": "user", "content": "And a room?"}]


@dataclass
class Findings:
    """What was seen of one template."""

    shows_tools: bool = False
    writes_calls: bool = False
    call: str = ""
    """What opens a call, up to the name."""
    lost: tuple[str, ...] = ()
    """Trials whose calls are not read back."""
    adapted: list[str] = field(default_factory=list)
    """What is said in another way than it was given, or refused as transformers refuses it, in words."""
    faults: list[str] = field(default_factory=list)
    """What is not as transformers has it."""


def tokenizer_of(base: Any, template: str) -> Any:
    """A copy of a tokenizer with the marks of a template as special tokens, that begins every text with `<s>` or the like."""
    tokenizer = copy.deepcopy(base)
    tokenizer.chat_template = template
    marks = sorted({mark for mark in _MARKS.findall(template) if " " not in mark})
    plain = {
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<tool_response>",
        "</tool_response>",
        "<tools>",
        "</tools>",
    }
    tokenizer.add_special_tokens({"additional_special_tokens": [mark for mark in marks if mark not in plain]})
    tokenizer.add_tokens([mark for mark in marks if mark in plain])
    begin = next(
        (mark for mark in _BEGINNINGS if mark in template), "<s>" if "bos_token" in template else None
    )
    if begin:
        tokenizer.add_special_tokens({"bos_token": begin})
    if "eos_token" in template:
        tokenizer.add_special_tokens(
            {"eos_token": next((m for m in ("</s>", "<|eot_id|>") if m in template), "</s>")}
        )
    return tokenizer


def findings(codec: Codec) -> Findings:
    """What is seen of a codec's template."""
    out = Findings()
    written = call_format(codec)
    out.shows_tools = written is not None
    out.writes_calls = written is not None and written.message is not None
    if written is not None:
        out.call, out.lost = written.opener, written.lost
        if not written.readable:
            out.faults.append("a plain call is not read back")
    for what, talk, tools in (("plain", PLAIN, ()), ("tools", [ASKED], TOOLS), ("a call", TALK, TOOLS)):
        if tools and written is None:
            continue
        out.faults += [f"{what}: {fault}" for fault in _rendering(codec, talk, tools, out)]
    if written is not None and written.message is not None:
        out.faults += list(_slot(codec, written))
    out.faults += list(_ends(codec))
    return out


def _expected(
    codec: Codec, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], **options: Any
) -> str:
    """What transformers renders; the clock is the run's."""
    template = codec.template._dated(codec.tokenizer.get_chat_template(None, [1] if tools else None))
    if tools and "xml_tools" in template:
        options["xml_tools"] = [schema_of(tool) for tool in tools]
    return codec.tokenizer.apply_chat_template(
        list(messages),
        tools=[schema_of(tool) for tool in tools] or None,
        chat_template=template,
        tokenize=False,
        **({"add_generation_prompt": True} | options),
    )


def _rendering(
    codec: Codec, talk: list[dict[str, Any]], tools: Sequence[Tool], out: Findings
) -> Iterator[str]:
    turns = [chat_turn(m["role"], m.get("content") or "", m if len(m) > 2 else None) for m in talk]
    try:
        segments, record = chat(codec, turns, tools)
        prompt = assemble("main", segments, codec, 8, template=record)
    except PromptFault as fault:
        try:
            _expected(codec, talk, tools)
        except Exception:
            out.adapted.append(
                "without tools, refused in its own words" if not tools else f"refused: {fault}"
            )
        else:
            yield f"refused: {fault}"
        return
    notes = [str(record[key]) for key in ("adapted", "calls_as_text", "fallback") if record.get(key)]
    out.adapted += [words for words in notes if words not in out.adapted]
    taken, _ = given(codec, turns, native=bool(tools), calls_as_text=record.get("calls_as_text"))
    taken, _ = with_system(codec, taken)
    text = _expected(codec, messages_of(taken), tools)
    if not notes:
        try:
            if _expected(codec, talk, tools) != text:
                yield "what transformers renders of it is another text, and nothing is said of that"
        except Exception:  # the template refuses null
            out.adapted.append("null as an empty text")
    ids = codec.tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = prompt.token_ids
    if ids and shown[0] != ids[0]:
        shown = shown[1:]
    if shown != ids and "calls_as_text" not in record:  # marks in texts stay text
        yield (
            "other tokens than transformers'"
            if codec.decode(shown) == codec.decode(ids)
            else "another text than transformers'"
        )
    begin = codec.tokenizer.bos_token_id
    if begin is not None and ids and ids[0] == begin and prompt.token_ids[:2].count(begin) != 1:
        yield "not one beginning of text"


def _slot(codec: Codec, written: CallFormat) -> Iterator[str]:
    """Whether the tokens of each tool's call, as the template writes it, follow the scored prompt."""
    (prompt,) = render(
        ToolTask(id="t", messages=(Message("user", ASKED["content"]),), tools=TOOLS), codec, max_new_tokens=8
    )
    message = written.message or {}
    (call,) = message["tool_calls"]
    for tool in TOOLS:
        spelled = assistant_calls(
            [(tool.name, {"city": "Rome"} if tool is TOOLS[0] else {"place": "Rome"})],
            as_text=isinstance(call["function"]["arguments"], str),
            call_id=call["id"] if "\ue000" not in call["id"] else "functions.\ue000name\ue001:0",
            content=message["content"],
        )
        text = _expected(codec, [ASKED, spelled], TOOLS, add_generation_prompt=False)
        call_at = text.rfind(written.opener + tool.name)
        if call_at < 0:
            yield f"the call of {tool.name} is not where its opener says"
            continue
        # Behind the prompt the opener is tokenised apart, as what is generated is.
        ids = codec.encode(text[call_at:], True)
        candidate = next(c for c in prompt.candidates if c.name == tool.name)
        wanted = [*prompt.token_ids[prompt.n_prompt - prompt.n_opener :], *candidate.token_ids]
        if ids[: len(wanted)] != wanted:
            shown = [
                [codec.decode([token]) for token in tokens[-4:]] for tokens in (ids[: len(wanted)], wanted)
            ]
            yield f"the name {tool.name} is written in {shown[0]}, scored in {shown[1]}"


def _ends(codec: Codec) -> Iterator[str]:
    try:
        text = _expected(
            codec, [ASKED, {"role": "assistant", "content": "It is warm."}], (), add_generation_prompt=False
        )
    except Exception:
        return
    behind = text.partition("It is warm.")[2]
    after = codec.encode(behind.lstrip(), True)
    if after and not any(token in codec.eos_ids for token in after[:1]):
        yield f"a turn ends with {behind[:20]!r}, which ends no generation"


def line(name: str, seen: Findings) -> str:
    """A line of the table."""
    tools = "shown, calls written" if seen.writes_calls else "shown" if seen.shows_tools else "not shown"
    opener = seen.call.replace("\n", "\\n").replace("|", "\\|")
    quote = "``" if "`" in opener else "`"
    cells = (
        name,
        tools,
        f"{quote}{opener}{quote}" if opener else "",
        ", ".join(seen.lost),
        "; ".join(seen.adapted),
        "; ".join(seen.faults),
    )
    return "| " + " | ".join(cells) + " |"


def main(paths: Sequence[str]) -> None:
    from probe.model import outline

    base = outline("smollm2-135m")["tokenizer"]
    sys.stdout.write(HEAD)
    for path in map(Path, paths):
        codec = Codec(tokenizer_of(base, path.read_text()), 32768, date=DATE)
        sys.stdout.write(line(path.stem, findings(codec)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
