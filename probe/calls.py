"""Calls in what a model wrote: found, read, and judged against the tools that were shown.

Pure text. Formats are told apart by their own marks, so no model has to be named:

- a JSON object of `name` and `arguments` (or `parameters`, Llama 3), alone, in a list or a fence, also as
  OpenAI writes it, `{"type": "function", "function": {…}}` with the arguments as an object or a string;
- `<tool_call>…</tool_call>` around one such object (Hermes, Qwen) or a list of them (SmolLM2), `<|python_tag|>`
  (Llama 3), `[TOOL_CALLS]` before a list or before `name[ARGS]{…}` (Mistral);
- Python call expressions: `[f(a=1), g(b="x")]` (Llama 4, BFCL) and those in a fence `tool_code` (Gemma);
- `<function=name><parameter=key>…</parameter></function>` (Qwen3-Coder), `<function=name>{…}</function>` (Llama 3.1).

What stands between `<think>` and `</think>` is no call. Reading takes time linear in the text, whatever it is.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from probe.jsontext import MAX_DEPTH, StrictJsonError, kind_of, loads, nearest, printable, quoted
from probe.tools import Tool

KINDS = {
    "no_call": "nothing is called",
    "several_calls": "more than one call where one was asked for",
    "not_json": "the call or its arguments are no JSON object, or not complete",
    "unknown_tool": "no tool has this name",
    "missing_argument": "a required argument is not there",
    "unexpected_argument": "an argument that the tool does not have",
    "mistyped_argument": "an argument of another JSON type",
    "invalid_argument": "an argument outside what its schema allows",
}
"""Every way in which a written call can be wrong."""

MAX_PYTHON = 2**16
"""Characters of one call written as a Python expression: a syntax tree takes hundreds of bytes a character."""


@dataclass(frozen=True)
class Call:
    """One call as a model wrote it."""

    name: str | None
    """None where the text gives none."""
    arguments: dict[str, Any] | None
    """Strict JSON; None where none are written or they cannot be read."""
    text: str
    """The call without the marks around it: characters start … end − 1 of what was read."""
    start: int
    end: int
    error: str | None = None
    """`not_json` or `unknown_tool` (a call without a name); None: it can be read."""
    message: str | None = None
    complete: bool = True
    """Whether it is written to its end, right or wrong."""


@dataclass(frozen=True)
class Verdict:
    """Whether what was written is one right call of a shown tool."""

    call: Call | None
    """The first call; None where there is none."""
    error: str | None
    """One of `KINDS`; None: name and arguments are as the tool's schema wants them."""
    message: str | None


def read_calls(text: str, *, tools: Sequence[Tool] = ()) -> list[Call]:
    """Every call in a text, in order; a call that is broken or half written is one with an error.

    JSON without a mark around it is a call only if it has a name, and either arguments or nothing else.
    `tools` gives the types of arguments in a format that does not write them (Qwen3-Coder's).
    """
    schemas = {tool.name: tool.parameters for tool in tools}
    calls: list[Call] = []
    position = 0
    while match := _START.search(text, position):
        assert match.lastgroup is not None
        found, position = _READERS[match.lastgroup](text, match, schemas)
        calls += found
    return calls


def judge(calls: Sequence[Call], tools: Iterable[Tool]) -> Verdict:
    """Whether the calls are one right call of one of the tools, and if not, in which of the ways of `KINDS`."""
    if not calls:
        return Verdict(None, "no_call", "there is no call in the text")
    call = calls[0]
    if len(calls) > 1:
        return Verdict(call, "several_calls", f"{len(calls)} calls, where one was asked for")
    known = {tool.name: tool for tool in tools}
    if call.name is not None and call.name not in known:
        near = nearest(call.name, tuple(known))
        hint = f": the nearest is {quoted(near)}" if near else ""
        return Verdict(call, "unknown_tool", f"{quoted(call.name)} is not a shown tool{hint}")
    if call.error is not None or call.name is None:
        return Verdict(call, call.error or "unknown_tool", call.message)
    return Verdict(call, *(check_arguments(known[call.name], call.arguments or {}) or (None, None)))


# -- arguments against a schema ------------------------------------------------------------------------------------

_BY_VALIDATOR = {
    "required": "missing_argument",
    "dependentRequired": "missing_argument",
    "additionalProperties": "unexpected_argument",
    "unevaluatedProperties": "unexpected_argument",
    "type": "mistyped_argument",
}
_ORDER = ("unexpected_argument", "missing_argument", "mistyped_argument", "invalid_argument")


def check_arguments(tool: Tool, arguments: Mapping[str, Any]) -> tuple[str, str] | None:
    """(kind, message) of what is wrong with the arguments of a call; None if nothing is.

    They are checked against the tool's JSON Schema. An argument that the schema does not name is wrong unless
    the schema says what other arguments look like.
    """
    from jsonschema import Draft202012Validator, validators

    schema = tool.parameters
    open_ended = (
        "additionalProperties",
        "patternProperties",
        "unevaluatedProperties",
        "$ref",
        "allOf",
        "anyOf",
    )
    if not any(word in schema for word in (*open_ended, "oneOf", "if")):
        schema = schema | {"additionalProperties": False}
    named = schema if isinstance(schema.get("$schema"), str) else {}
    validator = validators.validator_for(named, default=Draft202012Validator)(schema)
    found: list[tuple[str, str]] = []
    for error in validator.iter_errors(dict(arguments)):
        kind = _BY_VALIDATOR.get(str(error.validator), "invalid_argument")
        at = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        where = printable(at.removeprefix("."))
        found.append((kind, f"{where}: {error.message}" if where else error.message))
    if not found:
        return None
    # jsonschema's own order differs between processes.
    found.sort(key=lambda pair: (_ORDER.index(pair[0]), pair[1]))
    return found[0][0], "; ".join(printable(message, 200) for _, message in found[:5])


# -- where calls begin ---------------------------------------------------------------------------------------------

_PYTHON_NAME = r"[A-Za-z_][\w.]{0,127}"
_START = re.compile(
    rf"""
    (?P<thought><think>)
    |(?P<marked><tool_call>|<\|tool_call\|>|<\|python_tag\|>|<\|python_start\|>|```tool_(?:code|calls?)\b)
    |(?P<mistral>\[TOOL_CALLS\])
    |(?P<tagged><function=)
    |(?P<bare>\{{\s*")
    |(?P<listed>^[ \t]*\[\s*(?={_PYTHON_NAME}\s*\())
    |(?P<alone>\A\s*(?={_PYTHON_NAME}\s*\())
    """,
    re.VERBOSE | re.MULTILINE,
)
_BETWEEN = re.compile(r"[\s\[,;]*")
_CLOSE = re.compile(
    r"</?tool_call>|<\|/?tool_call\|>|<\|python_(?:tag|start|end)\|>|<\|e(?:om|ot)_id\|>|\[TOOL_CALLS\]|```"
)

_Schemas = Mapping[str, Mapping[str, Any]]
_Found = tuple[list[Call], int]
"""Calls, and where to read on."""


def _thought(text: str, match: re.Match[str], schemas: _Schemas) -> _Found:
    end = text.find("</think>", match.end())
    return [], len(text) if end < 0 else end


def _marked(text: str, match: re.Match[str], schemas: _Schemas) -> _Found:
    return _items(text, match.end(), schemas)


def _items(text: str, position: int, schemas: _Schemas) -> _Found:
    """The calls behind a mark: objects or Python calls, one after the other. None at all is a broken call."""
    calls: list[Call] = []
    while True:
        begin = _match(_BETWEEN, text, position).end()
        if text.startswith("{", begin):
            call, position = _object(text, begin, marked=True)
        elif text.startswith("<function=", begin):
            call, position = _tag(text, begin, schemas)
        elif _PYTHON_CALL.match(text, begin):
            call, position, _ = _python(text, begin)
        elif calls:
            return calls, position
        else:
            call, position = (
                _broken(text, begin, begin, "there is no call behind the mark that opens one"),
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


def _match(pattern: re.Pattern[str], text: str, position: int) -> re.Match[str]:
    found = pattern.match(text, position)
    assert found is not None  # the pattern matches the empty text
    return found


def _broken(
    text: str, start: int, end: int, message: str, name: str | None = None, complete: bool = False
) -> Call:
    return Call(name, None, text[start:end], start, end, "not_json", message, complete)


# -- JSON ----------------------------------------------------------------------------------------------------------

# Syntax alone: `len` stands for conversions that could fail.
_SYNTAX = json.JSONDecoder(parse_float=len, parse_int=len, parse_constant=len)
_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_HALF = re.compile(
    r"""\{\s*(?:"(?:type|id)"\s*:\s*"[^"\n]*"\s*,\s*)*(?:"function"\s*:\s*\{\s*)?"name"\s*:\s*"(?P<name>[^"\n]*)
    (?P<closed>")?(?P<more>\s*,\s*"(?:arguments|parameters)"\s*:|\s*(?:,\s*(?:"\w*)?)?\Z)?""",
    re.VERBOSE,
)


def _bare(text: str, match: re.Match[str], schemas: _Schemas) -> _Found:
    call, end = _object(text, match.start(), marked=False)
    return ([call] if call else []), end


def _object(text: str, start: int, *, marked: bool) -> tuple[Call | None, int]:
    """The call that the JSON object at `start` is, and where it ends; None: it is none."""
    value, end, fault, complete = _value(text, start)
    if fault is None:
        read = _spelled(value, marked)
        return (None if read is None else Call(read[0], read[1], text[start:end], start, end, *read[2:])), end
    half = _HALF.match(text, start)
    if half and half["closed"] is None:
        end = max(end, half.end())
        return _broken(text, start, end, "the name was not closed"), end
    if not marked and (half is None or half["more"] is None):
        return None, end
    message = f"the call is not complete JSON: {fault}"
    return _broken(text, start, end, message, half["name"] if half else None, complete), end


def _value(text: str, start: int) -> tuple[Any, int, str | None, bool]:
    """(value, end, what is wrong, whether it is closed) of the strict JSON value at `start`.

    A value that is not closed ends at its first mistake.
    """
    length = 256
    while True:
        # Windows, because an error of the decoder takes time in proportion to the text before it.
        window = text[start : start + length]
        whole = start + length >= len(text)
        try:
            _, size = _SYNTAX.raw_decode(window)
            break
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated") or error.pos > len(window) - 16
            if cut and not whole:
                length *= 4
                continue
            end = len(text) if cut else start + max(error.pos, 1)
            return None, end, f"{error.msg} at character {error.pos}", False
        except RecursionError:
            return None, _balanced(text, start), f"nested more than {MAX_DEPTH} levels deep", False
    try:
        return loads(window[:size]), start + size, None, True
    except StrictJsonError as error:
        return None, start + size, str(error), True


def _balanced(text: str, start: int) -> int:
    """Where the bracket at `start` is closed, or the end of the text."""
    depth = 0
    for match in _BRACKET.finditer(text, start):
        depth += (match[0] in "[{") - (match[0] in "]}")
        if depth == 0:
            return match.end()
    return len(text)


def _spelled(
    value: dict[str, Any], marked: bool
) -> tuple[str | None, dict | None, str | None, str | None] | None:
    """(name, arguments, error, message) of a decoded object; None if it is no call."""
    inner = value.get("function")
    inner = inner if isinstance(inner, dict) else value
    name = inner.get("name")
    key = next((key for key in ("arguments", "parameters") if key in inner), None)
    given = inner.get(key) if key else None
    if not isinstance(name, str):
        return (None, None, "unknown_tool", "the call names no tool") if marked else None
    # A model may repeat the definition of a tool, whose `parameters` are a schema.
    schema = key == "parameters" and isinstance(given, dict) and "properties" in given and "type" in given
    if not marked and (
        schema or "description" in inner or not (key or inner is not value or len(inner) == 1)
    ):
        return None
    if isinstance(given, str):
        try:
            given = loads(given)
        except StrictJsonError as error:
            return name, None, "not_json", f"the arguments are no JSON object: {error}"
    if given is not None and not isinstance(given, dict):
        return name, None, "not_json", f"the arguments are no JSON object but {kind_of(given)}"
    return name, given, None, None


# -- Mistral, and tags ---------------------------------------------------------------------------------------------

_MISTRAL_NAME = re.compile(
    r"\s*(?P<name>[^\s\[\]{}]{1,128})(?:\[CALL_ID\][^\s\[\]{}]{0,64})?(?:\[ARGS\])?\s*(?=\{)"
)


def _mistral(text: str, match: re.Match[str], schemas: _Schemas) -> _Found:
    named = _MISTRAL_NAME.match(text, match.end())
    if named is None:
        return _items(text, match.end(), schemas)
    start, name = named.start("name"), named["name"]
    value, end, fault, complete = _value(text, named.end())
    if fault is None:
        return [Call(name, value, text[start:end], start, end)], end
    return [_broken(text, start, end, f"the arguments are not complete JSON: {fault}", name, complete)], end


_TAG = re.compile(r"<function=(?P<name>[^>\n<]{0,128})(?P<closed>>)?")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]{1,128})>(.*)", re.DOTALL)


def _tagged(text: str, match: re.Match[str], schemas: _Schemas) -> _Found:
    call, end = _tag(text, match.start(), schemas)
    return [call], end


def _tag(text: str, start: int, schemas: _Schemas) -> tuple[Call, int]:
    opened = _match(_TAG, text, start)
    if opened["closed"] is None:
        return _broken(text, start, opened.end(), "the name was not closed"), opened.end()
    name, end = opened["name"], text.find("</function>", opened.end())
    if end < 0:
        message = "the call is not complete: </function> is missing"
        return _broken(text, start, len(text), message, name), len(text)
    body, end = text[opened.end() : end], end + len("</function>")
    try:
        arguments = loads(body) if body.lstrip().startswith("{") else _parameters(body, schemas.get(name, {}))
    except StrictJsonError as error:
        return _broken(text, start, end, f"the arguments are no JSON object: {error}", name, True), end
    except ValueError as error:
        return _broken(text, start, end, str(error), name, True), end
    return Call(name, arguments, text[start:end], start, end), end


def _parameters(body: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `<parameter=key>…</parameter>` one after the other. Raises ValueError."""
    *parts, rest = body.split("</parameter>")
    if rest.strip():
        raise ValueError(f"{quoted(rest.strip())} stands outside of a parameter")
    arguments: dict[str, Any] = {}
    for part in parts:
        match = _PARAMETER.fullmatch(part)
        if match is None or match[1] in arguments:
            raise ValueError("an argument is written twice" if match else "</parameter> closes nothing")
        known = schema.get("properties", {}).get(match[1])
        arguments[match[1]] = _typed(match[2], known if isinstance(known, dict) else {})
    return arguments


def _typed(text: str, schema: Mapping[str, Any]) -> Any:
    """A value that is written without quotes: JSON, unless it is none or the schema wants a string."""
    text = text.removeprefix("\n").removesuffix("\n")
    if schema.get("type") == "string":
        return text
    try:
        return loads(text)
    except StrictJsonError:
        return text


# -- Python expressions --------------------------------------------------------------------------------------------

_PYTHON_CALL = re.compile(rf"{_PYTHON_NAME}\s*\(")
_PYTHON_TOKEN = re.compile(
    r'''(?P<space>\s+)
    |(?P<string>[rRuU]?(?:"""(?:[^"\\]++|\\.|"(?!""))*+"""|\'\'\'(?:[^'\\]++|\\.|'(?!''))*+\'\'\'
        |"(?!"")(?:[^"\\\n]++|\\.)*+"|'(?!'')(?:[^'\\\n]++|\\.)*+'))
    |(?P<number>-?\s*(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d+)?)
    |(?P<name>[A-Za-z_][\w.]*)
    |(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<mark>[,:=])|(?P<half>"[^"\n]*\Z|'[^'\n]*\Z)''',
    re.VERBOSE | re.DOTALL,
)
_ATOMS = ("string", "number", "name", "close")
_JSON_NAMES = {"true": True, "false": False, "null": None}


def _listed(text: str, match: re.Match[str], schemas: _Schemas) -> _Found:
    """A list of Python calls at the start of a line; other text in brackets is none."""
    calls: list[Call] = []
    position = match.end()
    while _PYTHON_CALL.match(text, position):
        call, position, cut = _python(text, position)
        if call.error and not cut and not calls:
            return [], position
        calls.append(call)
        position = _match(_COMMA, text, position).end()
    return calls, position


_COMMA = re.compile(r"\s*,?\s*")


def _alone(text: str, match: re.Match[str], schemas: _Schemas) -> _Found:
    """A text that is one Python call and nothing else."""
    call, end, _ = _python(text, match.end())
    whole = call.error is None and not text[end:].strip()
    return ([call] if whole else []), end if whole else match.end() + 1


def _python(text: str, start: int) -> tuple[Call, int, bool]:
    """The Python call at `start`, where to read on, and whether the text ends inside of it."""
    name = _match(_PYTHON_CALL, text, start)[0].rstrip("( \t\r\n")
    end, closed = _python_end(text, start)
    if not closed:
        cut = end >= len(text.rstrip())
        why = "its bracket is not closed" if cut else f"{quoted(text[end : end + 20])} is no literal"
        return _broken(text, start, end, f"the call is not complete: {why}", name), end, cut
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings
            node = ast.parse(text[start:end], mode="eval").body
        name, arguments = _literals(node)
    # What the parser raises for text that is no Python, NUL, half a character, too long a number, too deep.
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        why = printable(error.msg if isinstance(error, SyntaxError) else str(error), 200)
        return _broken(text, start, end, f"the call cannot be read: {why}", name, True), end, False
    return Call(name, arguments, text[start:end], start, end), end, False


def _python_end(text: str, start: int) -> tuple[int, bool]:
    """(end, whether it is closed) of a call whose arguments may be literals, by its tokens alone.

    What passes is nested by its brackets only, `MAX_DEPTH` levels at most: Python's parser can crash on others.
    """
    depth, before, position = 0, "", start
    while position < min(len(text), start + MAX_PYTHON) and (match := _PYTHON_TOKEN.match(text, position)):
        kind = match.lastgroup or ""
        if kind != "space":
            called = before == "name" and match[0] == "("
            chained = before in _ATOMS and kind in ("string", "number", "name", "open") and not called
            if chained and not (before == kind == "string"):
                return position, False
            depth += (kind == "open") - (kind == "close")
            if depth > MAX_DEPTH:
                return position, False
            before = kind
        position = match.end()
        if kind == "close" and depth == 0:
            return position, True
    return position, False


def _literals(node: ast.expr) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a call with literals by keyword. Raises ValueError or TypeError."""
    assert isinstance(node, ast.Call)
    name = ast.unparse(node.func)
    if name == "print" and len(node.args) == 1 and isinstance(node.args[0], ast.Call):
        return _literals(node.args[0])  # Gemma prints what a tool returns
    if node.args:
        raise ValueError("an argument has no name: write name=value")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        assert keyword.arg is not None  # no token for stars gets here
        if keyword.arg in arguments:
            raise ValueError(f"{keyword.arg} is given twice")
        arguments[keyword.arg] = ast.literal_eval(_JsonNames().visit(keyword.value))
    return name, loads(json.dumps(arguments, allow_nan=False))


class _JsonNames(ast.NodeTransformer):
    """JSON's true, false and null for Python's: models mix the two."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node


_READERS: dict[str, Callable[[str, re.Match[str], _Schemas], _Found]] = {
    "thought": _thought,
    "marked": _marked,
    "mistral": _mistral,
    "tagged": _tagged,
    "bare": _bare,
    "listed": _listed,
    "alone": _alone,
}
