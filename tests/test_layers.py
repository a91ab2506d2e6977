"""The order of the rooms, executed: imports go one way, heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "probe"
ORDER = [
    "errors",
    "jsontext",
    "maths",
    "model",
    "tools",
    "prompts",
    "capture",
    "tasks",
    "runs",
    "harness",
    "experiments",
    "analyzers",
    "report",
    "distribution",
    "training",
    "api",
    "cli",
]
LOOSE = {"errors", "jsontext", "api"}
"""Modules without a folder; every other room is one."""
ONLY_IN = {
    "transformers": {"model", "training"},
    "transformer_lens": {"model"},
    "tokenizers": {"model"},
    "peft": {"model", "training"},
    "matplotlib": {"report", "distribution", "training"},
    "safetensors": {"model", "runs", "training"},
    "pyarrow": {"tasks", "runs", "analyzers", "report", "experiments", "training"},
    "jinja2": {"prompts", "report"},
    "click": {"cli"},
    "simpleeval": {"tools"},
    "pydantic_monty": {"tools"},
}
BANNED = {"pickle", "dill", "joblib", "shelve", "marshal"}


@cache
def tree_of(source: str) -> ast.AST:
    return ast.parse(source)


def imports(source: str) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def violations(path_room: str, source: str) -> list[str]:
    wrong = []
    for name in imports(source):
        head = name.split(".")[0]
        if head in BANNED:
            wrong.append(f"{path_room} imports {name}")
        if head in ONLY_IN and path_room not in ONLY_IN[head]:
            wrong.append(f"{path_room} imports {name}")
        parts = name.split(".")
        known = parts[0] == "probe" and len(parts) > 1 and parts[1] in ORDER and path_room in ORDER
        if known and ORDER.index(parts[1]) > ORDER.index(path_room):
            wrong.append(f"{path_room} imports {parts[1]}, which comes after it")
    return wrong


def modules(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module → the modules of the package that it imports, wherever in the file."""
    edges: dict[str, set[str]] = {}
    for name, source in sources.items():
        edges[name] = set()
        for node in ast.walk(tree_of(source)):
            if isinstance(node, ast.Import):
                edges[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                places = [f"{node.module}.{alias.name}" for alias in node.names]
                edges[name] |= {place if place in sources else node.module for place in places}
        edges[name] = edges[name] & sources.keys() - {name}
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Modules that are left when those without an import among the rest are taken away, again and again."""
    left = dict(edges)
    while free := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in free:
            del left[name]
    return [sorted(left)] if left else []


def files() -> dict[str, str]:
    """Dotted module name → source."""
    return {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path.read_text()
        for path in ROOT.rglob("*.py")
    }


def test_imports_follow_the_way_of_the_data():
    paths = [path for path in sorted(ROOT.rglob("*.py")) if room(path) not in ("__init__", "__main__")]
    wrong = {str(path.relative_to(ROOT)): violations(room(path), path.read_text()) for path in paths}
    assert {path: upward for path, upward in wrong.items() if upward} == {}


def test_no_circle_among_files():
    assert circles(modules(files())) == []


def test_every_room_has_its_place_and_the_folders_are_few():
    rooms = {room(path) for path in ROOT.rglob("*.py")} - {"__init__", "__main__"}
    assert rooms == set(ORDER)
    assert len(rooms - LOOSE) <= 14
    assert len(LOOSE) <= 3


def test_the_guards_can_fail():
    assert violations("tasks", "from probe.harness.runner import run")
    assert violations("capture", "import transformers")
    assert violations("runs", "import pickle")
    assert violations("harness", "from probe.tasks import read_tasks") == []
    assert circles(modules({"probe.a": "from probe import b", "probe.b": "import probe.a", "probe.c": ""}))
    assert circles(modules({"probe.a": "from probe.b import x", "probe.b": ""})) == []


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["ls"],
        ["run", "--help"],
        ["distribution", "--help"],
        ["tools", "list"],
        ["tools", "call", "date_calculator", '{"start": "2024-02-29"}'],
    ],
    ids=" ".join,
)
def test_light_commands_load_no_heavy_library(command):
    heavy = "torch", "transformers", "transformer_lens", "pyarrow", "pandas"
    code = (
        "import sys\nfrom probe.cli import main\n"
        f"try:\n    main({command!r})\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        f"assert not set({heavy!r}) & set(sys.modules), set({heavy!r}) & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_no_dangerous_call_in_the_package():
    """No eval, exec, os.system or shell: text of tasks and models can never run."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(tree_of(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "__import__"), path
            if isinstance(node, ast.keyword) and node.arg == "shell":
                raise AssertionError(path)
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path
