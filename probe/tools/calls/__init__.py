"""Calls in what a model wrote: found, read, and judged against the tools that were shown.

Pure text. Formats are told apart by their own marks, so no model has to be named; `tasks/README.md` lists them, and
`tests/test_calls.py` has each. What stands in a thought (`<think>…</think>` and its like, closed or not) is no call.
A text in none of the formats that is plainly meant as a call is *unread*: see `unread`. Reading takes time linear in
the text, whatever it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from probe.tools.calls.call import Call, Found, Schemas, at, broken
from probe.tools.calls.escaped import escaped_call
from probe.tools.calls.judge import KINDS, Verdict, check_arguments, judge
from probe.tools.calls.objects import json_call, json_value
from probe.tools.calls.python import MAX_PYTHON, PYTHON_CALL, PYTHON_NAME, program_calls, python_call
from probe.tools.calls.tags import INVOKE, KEYED, invoked_call, keyed_call, tagged_call
from probe.tools.calls.template import Dialect, learn
from probe.tools.calls.thoughts import THOUGHTS, opened_thought, spoken_from, thought_end
from probe.tools.calls.validation import UncheckedArguments
from probe.tools.definitions import Tool

__all__ = [
    "KINDS",
    "MAX_PYTHON",
    "UNREADABLE",
    "Call",
    "Dialect",
    "UncheckedArguments",
    "Verdict",
    "check_arguments",
    "closed",
    "judge",
    "learn",
    "opened_thought",
    "read_calls",
    "spoken_from",
    "unread",
]

# Marks behind which nothing but calls stands: what they are in no model is told apart by what comes next.
_CALL_MARKS = (
    r"<tool_calls?>|<\|tool_calls?\|?>|<\|tool_calls?_(?:start|begin|section_begin)\|>|<\|python_(?:tag|start)\|>"
    r"|```tool_(?:code|calls?)\b|<\uff5ctool\u2581calls?\u2581begin\uff5c>|<start_function_call>|<\|START_ACTION\|>"
    r"|<(?:minimax|seed):tool_call>|<longcat_tool_call>|<\uff5cDSML\uff5cfunction_calls>|<function_calls?>|<TOOLCALL>"
    r"|<\|action_start\|>|<\|tools_prefix\|>|functools(?=\[)"
)
_NAMED = r"[\w.:/-]{1,128}"
_START = re.compile(
    rf"""
    (?P<thought>{"|".join(re.escape(mark).replace(" ", "[ ]").replace("#", "[#]") for mark in THOUGHTS)})
    |(?P<marked>{_CALL_MARKS})
    |(?P<mistral>\[TOOL_CALLS\])
    |(?P<tagged><function=)
    |(?P<invoked><(?:antml:|\uff5cDSML\uff5c)?invoke(?=[\s>]))
    |(?P<harmony>to=functions\.(?P<to>{_NAMED})(?:\s*<\|(?:channel|constrain)\|>\s*\w*|[ ]+\w+)*\s*(?:<\|message\|>)?\s*(?=\{{))
    |(?P<react>^[ \t]*(?:\*\*)?Action(?:\*\*)?:[ \t]*(?P<action>{_NAMED})[ \t]*\n\s*(?:\*\*)?(?:Action[ ])?Input(?:\*\*)?:\s*(?=\{{))
    |(?P<flower>\u273fFUNCTION\u273f:[ \t]*(?P<flowered>{_NAMED})\s*\u273fARGS\u273f:\s*(?=\{{))
    |(?P<action_list>^[ \t]*Action:\s*(?:```(?:json)?\s*)?(?=[\[{{]))
    |(?P<program><code>|^Code:\s*```(?:py(?:thon)?)?\b|^```py(?:thon)?[ \t]*\n)
    |(?P<bare>\{{\s*")
    |(?P<listed>^[ \t]*\[\s*(?={PYTHON_NAME}\s*\())
    |(?P<newline>\A\s*(?P<alone_name>{_NAMED})[ \t]*\n\s*(?=\{{))
    |(?P<router>^>>>(?P<routed>{_NAMED})[ \t]*\n\s*(?=\{{))
    |(?P<alone>\A\s*(?={PYTHON_NAME}\s*\())
    """,
    re.VERBOSE | re.MULTILINE,
)
_BETWEEN = re.compile(
    rf"(?:[\s\[,;]|```(?:json|python|py)?\b|```|<\|tool_call_(?:begin|end)\|>|function<\uff5ctool\u2581sep\uff5c>"
    rf"|<\uff5ctool\u2581call\u2581(?:begin|end)\uff5c>|<\|plugin\|>|{_CALL_MARKS})*+"
)
_WITH_JSON = re.compile(
    rf"(?:functions\.)?(?P<name>{_NAMED}?)(?::\d+)?\s*(?:<\uff5ctool\u2581sep\uff5c>|<\|tool_call_argument_begin\|>)?"
    r"\s*(?:```json\s*)?(?=\{)"
)
_CLOSE = re.compile(
    r"</?tool_calls?>|<\|/?tool_calls?\|>|<\|tool_calls?_\w+\|>|<\|python_(?:tag|start|end)\|>|<\|e(?:om|ot)_id\|>"
    r"|\[TOOL_CALLS\]|```|<\uff5ctool\u2581calls?\u2581end\uff5c>|</(?:minimax|seed):tool_call>|<\|END_ACTION\|>"
    r"|</TOOLCALL>|</?function_calls?>"
)


def read_calls(
    text: str, *, tools: Sequence[Tool] = (), dialect: Dialect | None = None, thinking: bool = False
) -> list[Call]:
    """Every call in a text, in order; a call that is broken or half written is one with an error.

    JSON without a mark around it is a call only if it has a name, and either arguments or nothing else.
    `tools` gives the types of arguments in a format that does not write them (Qwen3-Coder's), the names of
    positional ones, and which calls of a program are calls of tools. `dialect` is a format that the model's own
    template writes. With `thinking` the text begins in a thought that the prompt has opened.
    """
    schemas = {tool.name: tool.parameters for tool in tools}
    end = thought_end(text)
    if thinking:
        return _read(text, len(text) if end is None else end, schemas, dialect)
    calls = _read(text, 0, schemas, dialect)
    # What closes a thought that nothing has opened: the prompt did. In a call it is one of its characters.
    if end is not None and not any(call.complete and call.start < end <= call.end for call in calls):
        calls = _read(text, end, schemas, dialect)
    return calls


def _read(text: str, position: int, schemas: Schemas, dialect: Dialect | None) -> list[Call]:
    calls: list[Call] = []
    while match := _START.search(text, position):
        assert match.lastgroup is not None
        learned = dialect.search(text, position, match.start()) if dialect else None
        if dialect and learned is not None:
            call, position = dialect.read(text, learned, schemas)
            calls.append(call)
            continue
        kind = next(name for name in _READERS if match[name] is not None)
        read, position = _READERS[kind](text, match, schemas)
        calls += read
    while dialect and (learned := dialect.search(text, position, len(text))) is not None:
        call, position = dialect.read(text, learned, schemas)
        calls.append(call)
    return calls


def _thought(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    closing = THOUGHTS[match[0]]
    end = text.find(closing, match.end())
    return [], len(text) if end < 0 else end + len(closing)


def _marked(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    return _items(text, match.end(), schemas)


def _items(text: str, position: int, schemas: Schemas) -> Found:
    """The calls behind a mark, one after the other, in whatever way each is written. None at all is a broken call."""
    calls: list[Call] = []
    while True:
        begin = at(_BETWEEN, text, position).end()
        if text.startswith("{", begin):
            call, position = json_call(text, begin, marked=True)
        elif text.startswith("<function=", begin):
            call, position = tagged_call(text, begin, schemas)
        elif INVOKE.match(text, begin):
            call, position = invoked_call(text, begin, schemas)
        elif text.startswith("call:", begin):
            call, position = escaped_call(text, begin)
        elif named := _WITH_JSON.match(text, begin):
            call, position = _named_call(text, named, "name")
        elif KEYED.match(text, begin):
            call, position = keyed_call(text, begin, schemas)
        elif PYTHON_CALL.match(text, begin):
            call, position, _ = python_call(text, begin, schemas)
        elif calls:
            return calls, position
        else:
            call, position = (
                broken(text, begin, begin, "there is no call behind the mark that opens one"),
                begin,
            )
        assert call is not None
        if call.error == "not_json":
            close = _CLOSE.search(text, position)
            position = close.start() if close else len(text)
            whole = text[call.start : position].rstrip()
            call = replace(call, text=whole, end=call.start + len(whole))
            return [*calls, call], position
        calls.append(call)


def _bare(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    wrapped = _WRAPPED.match(text, match.start())
    if wrapped is not None:
        return _items(text, wrapped.end(), schemas)
    call, end = json_call(text, match.start(), marked=False)
    return ([call] if call else []), end


_WRAPPED = re.compile(r'\{\s*"tool_calls"\s*:\s*\[\s*(?=\{)')
_MISTRAL_NAME = re.compile(
    r"\s*(?P<name>[^\s\[\]{}]{1,128})(?:\[CALL_ID\][^\s\[\]{}]{0,64})?(?:\[ARGS\])?\s*(?=\{)"
)


def _mistral(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    named = _MISTRAL_NAME.match(text, match.end())
    if named is None:
        return _items(text, match.end(), schemas)
    call, end = _named_call(text, named, "name")
    return [call], end


def _named_call(text: str, match: re.Match[str], group: str) -> tuple[Call, int]:
    """The call of a name that is written before its arguments, a JSON object behind the match."""
    start, name = match.start(group), match[group]
    value, end, fault, complete = json_value(text, match.end())
    if fault is None:
        return Call(name, value, text[start:end], start, end), end
    return broken(text, start, end, f"the arguments are not complete JSON: {fault}", name, complete), end


def _by_name(group: str) -> Callable[[str, re.Match[str], Schemas], Found]:
    def read(text: str, match: re.Match[str], schemas: Schemas) -> Found:
        call, end = _named_call(text, match, group)
        return [call], end

    return read


def _tagged(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    call, end = tagged_call(text, match.start(), schemas)
    return [call], end


def _invoked(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    call, end = invoked_call(text, match.start(), schemas)
    return [call], end


def _program(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    """The calls in a block of code; code without a word before it that says so is read for shown tools alone."""
    close = "</code>" if match[0] == "<code>" else "```"
    end = text.find(close, match.end())
    end, behind = (len(text), len(text)) if end < 0 else (end, end + len(close))
    if not schemas and match[0].startswith("```"):
        return [], match.end()
    inner = at(_FENCE, text, match.end()).end()
    calls = list(program_calls(text, inner, end, schemas))
    return (calls, behind) if calls or not match[0].startswith("```") else ([], match.end())


_FENCE = re.compile(r"\s*(?:```(?:py(?:thon)?)?\b)?")


def _listed(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    """A list of Python calls at the start of a line; other text in brackets is none."""
    calls: list[Call] = []
    position = match.end()
    while PYTHON_CALL.match(text, position):
        call, position, cut = python_call(text, position, schemas)
        if call.error and not cut and not calls and call.name not in schemas:
            return [], position
        calls.append(call)
        position = at(_COMMA, text, position).end()
    return calls, position


_COMMA = re.compile(r"\s*,?\s*")


def _alone(text: str, match: re.Match[str], schemas: Schemas) -> Found:
    """A text that is Python calls and nothing else."""
    calls: list[Call] = []
    position = match.end()
    while PYTHON_CALL.match(text, position):
        call, position, _ = python_call(text, position, schemas)
        calls.append(call)
        position = at(_SEPARATED, text, position).end()
    whole = calls and all(call.error is None for call in calls) and position == len(text)
    return (calls, position) if whole else ([], match.end() + 1)


_SEPARATED = re.compile(r"[\s,;`]*")

_READERS: dict[str, Callable[[str, re.Match[str], Schemas], Found]] = {
    "thought": _thought,
    "marked": _marked,
    "mistral": _mistral,
    "tagged": _tagged,
    "invoked": _invoked,
    "harmony": _by_name("to"),
    "react": _by_name("action"),
    "flower": _by_name("flowered"),
    "action_list": _marked,
    "program": _program,
    "bare": _bare,
    "listed": _listed,
    "newline": _by_name("alone_name"),
    "router": _by_name("routed"),
    "alone": _alone,
}

# -- what is no call that can be read ---------------------------------------------------------------------------------

UNREADABLE = (
    "the chat template writes calls in a way that cannot be read back: whether one is made is not known"
)
"""Why a text of such a model is unread though nothing in it looks like a call."""
_MARK = re.compile(
    r"<[|\uff5c/]?[\w:\u2581-]{0,24}(?:tool|func|invoke|action|plugin|api)[\w:\u2581-]{0,24}[^<>\n]{0,64}>"
    r"|\[/?\w{0,16}(?:TOOL|FUNC|ACTION|API)\w{0,16}\]|^\W{0,4}(?:action|tool|function)(?:[ _](?:call|name|input))?\W{0,4}:",
    re.IGNORECASE | re.MULTILINE,
)


def unread(text: str, tools: Sequence[Tool] = (), *, thinking: bool = False) -> str | None:
    """In a sentence, what looks like a call in a text of which no call was read; None: nothing does."""
    end = thought_end(text)
    text = text[end:] if end is not None else "" if thinking else text
    for opening, closing in THOUGHTS.items():
        text = re.sub(
            re.escape(opening) + r"(?:(?!" + re.escape(closing) + r").)*+", "", text, flags=re.DOTALL
        )
    names = "|".join(re.escape(tool.name) for tool in tools)
    shown = re.compile(
        rf"^\W{{0,8}}(?:{names})\W{{0,3}}[({{<]|[=<>/](?:{names})\b|\b(?:{names})[\"'\s]*:?\s*\{{",
        re.MULTILINE,
    )
    mark = _MARK.search(text) or (shown.search(text) if names else None)
    if mark is None:
        return None
    return f"a call is written in a format that is not known here: {mark[0].strip()[:60]}"


_PAIRS = {
    "<tool_call>": "</tool_call>",
    "<|tool_call|>": "<|/tool_call|>",
    "<tool_calls>": "</tool_calls>",
    "<|tool_call_start|>": "<|tool_call_end|>",
    "<start_function_call>": "<end_function_call>",
    "<TOOLCALL>": "</TOOLCALL>",
}


def closed(text: str) -> str:
    """A text that ends with a call, with what closes the list and the mark around it where they are left open.

    Generation stops when a call is complete; whoever looks for the closing mark would find none.
    """
    mark = max(_PAIRS, key=text.rfind)
    begin = text.rfind(mark)
    if begin < 0 or _PAIRS[mark] in text[begin:]:
        return text
    inside = text[begin + len(mark) :]
    bracket = "]" if inside.lstrip().startswith("[") and not inside.rstrip().endswith("]") else ""
    line = "\n" if inside.startswith("\n") and not inside.endswith("\n") else ""
    return text + bracket + line + _PAIRS[mark]
