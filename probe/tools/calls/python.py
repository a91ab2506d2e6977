"""Calls that are Python expressions with literals, alone or in a program."""

from __future__ import annotations

import ast
import builtins
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

from probe.jsontext import MAX_DEPTH, loads, printable, quoted
from probe.tools.calls.call import Call, Schemas, at, broken

MAX_PYTHON = 2**16
"""Characters of one call written as a Python expression: a syntax tree takes hundreds of bytes a character."""

PYTHON_NAME = r"[A-Za-z_](?:[\w.]|-(?=\w)){0,127}"
"""Name of what is called; tools have hyphens in theirs."""
PYTHON_CALL = re.compile(rf"(?P<name>{PYTHON_NAME})\s*\(")
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
_NO_TOOLS = {*dir(builtins), "final_answer"}
"""What a program may call without calling a tool, where nothing says which tools there are."""


def python_call(text: str, start: int, schemas: Schemas) -> tuple[Call, int, bool]:
    """The Python call at `start`, where to read on, and whether the text ends inside of it."""
    opened = at(PYTHON_CALL, text, start)
    name, bracket = opened["name"], opened.end() - 1
    end, closed = _python_end(text, bracket)
    inner = at(_SPACE, text, opened.end()).end()
    if closed and name == "print" and PYTHON_CALL.match(text, inner):
        call, call_end, _ = python_call(text, inner, schemas)  # Gemma prints what a tool returns
        if call.error is not None or not text[call_end : end - 1].strip():
            return call, end, False
    if not closed:
        cut = end >= len(text.rstrip())
        why = "its bracket is not closed" if cut else f"{quoted(text[end : end + 20])} is no literal"
        return broken(text, start, end, f"the call is not complete: {why}", name), end, cut
    try:
        arguments = _arguments(
            _parse("f" + text[bracket:end], "eval").body, schemas.get(name), bare=name in schemas
        )
    # What the parser raises for text that is no Python, NUL, half a character, too long a number, too deep.
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        return broken(text, start, end, f"the call cannot be read: {_why(error)}", name, True), end, False
    return Call(name, arguments, text[start:end], start, end), end, False


_SPACE = re.compile(r"\s*")


def program_calls(text: str, start: int, end: int, schemas: Schemas) -> Iterator[Call]:
    """The calls of tools in the program at characters start … end − 1, in the order in which they are made."""
    program = text[start:end]
    wanted = re.compile(rf"(?<![\w.-])(?P<name>{'|'.join(map(re.escape, schemas)) or PYTHON_NAME})\s*\(")
    called = [m for m in wanted.finditer(program) if schemas or m["name"] not in _NO_TOOLS]
    if not called:
        return
    try:
        if len(program) > MAX_PYTHON:
            raise ValueError(f"the program has more than {MAX_PYTHON} characters")
        tree = _parse(program, "exec")
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        yield broken(text, start, end, f"the program cannot be read: {_why(error)}", called[0]["name"])
        return
    lines = [0, *(match.end() for match in re.finditer("\n", program))]
    sources = program.encode("utf-8", "replace").split(b"\n")

    def place(line: int, column: int) -> int:
        return start + lines[line - 1] + len(sources[line - 1][:column].decode("utf-8", "replace"))

    names = {match["name"] for match in called}
    for node in sorted(
        (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names),
        key=lambda node: (node.end_lineno or 0, node.end_col_offset or 0),
    ):
        name = ast.unparse(node.func)
        first, last = (
            place(node.lineno, node.col_offset),
            place(node.end_lineno or 1, node.end_col_offset or 0),
        )
        try:
            yield Call(name, _arguments(node, schemas.get(name)), text[first:last], first, last)
        except (ValueError, TypeError, RecursionError) as error:
            yield broken(text, first, last, f"the call cannot be read: {_why(error)}", name, True)


def python_literal(text: str) -> Any:
    """The JSON value that a Python literal stands for; the text itself where it is none."""
    wrapped = f"f(x={text.strip()})"
    try:
        if _python_end(wrapped, 1) != (len(wrapped), True):
            return text
        return _arguments(_parse(wrapped, "eval").body, None)["x"]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


def _why(error: BaseException) -> str:
    return printable(error.msg if isinstance(error, SyntaxError) else str(error), 200)


def _parse(text: str, mode: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in strings
        return ast.parse(text, mode=mode)


def _python_end(text: str, start: int) -> tuple[int, bool]:
    """(end, whether it is closed) of the arguments of a call that may be literals, by their tokens alone.

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


def _arguments(node: ast.Call, schema: Any, *, bare: bool = False) -> dict[str, Any]:
    """Arguments of a call, literals all. Those without a name have the schema's names, in its order.

    With `bare` a word without quotes is a text: there is no program whose variable it could be. Raises ValueError or TypeError.
    """
    known = list(schema["properties"]) if schema and isinstance(schema.get("properties"), dict) else []
    if len(node.args) > len(known):
        raise ValueError("an argument has no name: write name=value")
    given = [*zip(known, node.args, strict=False), *((word.arg, word.value) for word in node.keywords)]
    arguments: dict[str, Any] = {}
    for name, value in given:
        if name is None:
            raise ValueError("arguments are unpacked with **")
        if name in arguments:
            raise ValueError(f"{name} is given twice")
        arguments[name] = ast.literal_eval(_JsonNames(bare).visit(value))
    return loads(json.dumps(arguments, allow_nan=False))


class _JsonNames(ast.NodeTransformer):
    """JSON's true, false and null for Python's: models mix the two. With `bare`, other words as texts."""

    def __init__(self, bare: bool):
        self._bare = bare

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in _JSON_NAMES:
            return ast.Constant(_JSON_NAMES[node.id])
        return ast.Constant(node.id) if self._bare else node
