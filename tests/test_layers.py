"""The order of the rooms, executed: imports go one way, heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "probe"
ORDER = [
    "errors",
    "jsontext",
    "tools",
    "tasks",
    "bfcl",
    "calls",
    "bfcl_score",
    "prompts",
    "reads",
    "distribution",
    "model",
    "toolbox",
    "capture",
    "agent",
    "scoring",
    "store",
    "analyzers",
    "report",
    "plan",
    "sizes",
    "schedule",
    "estimate",
    "runner",
    "interventions",
    "output",
    "finetune",
    "lora",
    "dryrun",
    "doctor",
    "show",
    "api",
    "cli",
]
ONLY_IN = {
    "transformers": {"model"},
    "transformer_lens": {"model"},
    "tokenizers": {"model"},
    "peft": {"model"},
    "matplotlib": {"finetune", "lora", "output"},
    "safetensors": {"store", "lora", "model"},
    "pyarrow": {"store", "analyzers", "report", "interventions", "lora"},
    "jinja2": {"report"},
    "click": {"cli"},
    "simpleeval": {"toolbox"},
    "pydantic_monty": {"toolbox"},
}
BANNED = {"pickle", "dill", "joblib", "shelve", "marshal"}


def imports(source: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


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


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_way_of_the_data(path):
    if path.name in ("__init__.py", "__main__.py") and path.parent == ROOT:
        return
    assert violations(room(path), path.read_text()) == []


def test_every_room_has_its_place():
    rooms = {room(path) for path in ROOT.rglob("*.py")} - {"__init__", "__main__"}
    assert rooms == set(ORDER)


def test_the_guard_can_fail():
    assert violations("tasks", "from probe.runner import run")
    assert violations("capture", "import transformers")
    assert violations("store", "import pickle")
    assert violations("runner", "from probe.tasks import read_tasks") == []


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
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "__import__"), path
            if isinstance(node, ast.keyword) and node.arg == "shell":
                raise AssertionError(path)
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path
