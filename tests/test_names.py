"""Names say what a thing holds: no placeholders, no participles as types, one class a name."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted(path for room in ("probe", "tests", "benchmarks") for path in (ROOT / room).rglob("*.py"))
PLACEHOLDERS = {"found", "own", "made", "one", "there", "said"}
"""Words that fit every value and so tell nothing of it."""
PARTICIPLES = {
    *("Committed", "Counted", "Faithful", "Forbidden", "Forced", "Found", "Given", "Hooked", "Kept", "Made"),
    *("Opened", "Prompted", "Ran", "Reopened", "Rewritten", "Running", "Said", "Seen", "Stating"),
}
RECORDS = "probe/runs/records.py"
"""A record may have the name of what it stores, if it says so."""


@cache
def tree_of(path: Path) -> ast.AST:
    return ast.parse(path.read_text())


def bound(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every variable, parameter, attribute and function that is bound."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name


def placeholders(tree: ast.AST) -> list[tuple[int, str]]:
    return [(line, name) for line, name in bound(tree) if name.strip("_") in PLACEHOLDERS]


@cache
def classes() -> dict[str, dict[str, str]]:
    """Name without its underscore → file → docstring."""
    by_name: dict[str, dict[str, str]] = defaultdict(dict)
    for path in FILES:
        if path.is_relative_to(ROOT / "probe"):
            for node in ast.walk(tree_of(path)):
                if isinstance(node, ast.ClassDef):
                    file = str(path.relative_to(ROOT))
                    by_name[node.name.lstrip("_")][file] = ast.get_docstring(node) or ""
    return by_name


def test_no_name_is_a_placeholder():
    lines = {str(path.relative_to(ROOT)): placeholders(tree_of(path)) for path in FILES}
    assert {file: names for file, names in lines.items() if names} == {}


def test_no_name_of_the_reports_scripts_is_a_placeholder():
    words = "|".join(sorted(PLACEHOLDERS))
    binding = re.compile(rf"\b(?:const|let|function)\s+({words})\b|[(,]\s*({words})\s*[,)]|\b({words})\s*=>")
    lines = {path.name: binding.findall(path.read_text()) for path in (ROOT / "probe/report").glob("*.js")}
    assert len(lines) > 10
    assert {file: names for file, names in lines.items() if names} == {}
    assert binding.search("const one = 1") and binding.search("(row, own) =>")


def test_no_type_is_a_participle():
    assert PARTICIPLES & classes().keys() == set()


def test_a_class_name_is_defined_once_or_is_that_of_a_stored_record():
    several = {name: files for name, files in classes().items() if len(files) > 1}
    stored = {
        name for name, files in several.items() if "stored" in files.get(RECORDS, "") and len(files) == 2
    }
    assert several.keys() - stored == {"Job"}, "that of a capture and that of the writer's queue"


def test_the_guard_can_fail():
    tree = ast.parse("def made(own):\n    _found, x = own\n    self.there = [one for one in x]\n")
    assert sorted(name for _, name in placeholders(tree)) == ["_found", "made", "one", "own", "there"]
