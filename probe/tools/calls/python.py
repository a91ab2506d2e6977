"""Calls that are Python expressions with literals by keyword."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from probe.jsontext import MAX_DEPTH, loads, printable, quoted
from probe.tools.calls.call import Call, at, broken

MAX_PYTHON = 2**16
"""Characters of one call written as a Python expression: a syntax tree takes hundreds of bytes a character."""

PYTHON_NAME = r"[A-Za-z_][\w.]{0,127}"
PYTHON_CALL = re.compile(rf"{PYTHON_NAME}\s*\(")
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


def python_call(text: str, start: int) -> tuple[Call, int, bool]:
    """The Python call at `start`, where to read on, and whether the text ends inside of it."""
    name = at(PYTHON_CALL, text, start)[0].rstrip("( \t\r\n")
    end, closed = _python_end(text, start)
    if not closed:
        cut = end >= len(text.rstrip())
        why = "its bracket is not closed" if cut else f"{quoted(text[end : end + 20])} is no literal"
        return broken(text, start, end, f"the call is not complete: {why}", name), end, cut
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings
            node = ast.parse(text[start:end], mode="eval").body
        name, arguments = _literals(node)
    # What the parser raises for text that is no Python, NUL, half a character, too long a number, too deep.
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        why = printable(error.msg if isinstance(error, SyntaxError) else str(error), 200)
        return broken(text, start, end, f"the call cannot be read: {why}", name, True), end, False
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
