"""The lessons in examples/ run from top to bottom, here on a tiny model and two tasks, and show what they say they do."""

from __future__ import annotations

import ast
import json
import runpy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from probe.harness import runner
from probe.harness.plan import make_options

TOOLS = [
    {"name": name, "description": f"Tells the {name}.", "parameters": {"type": "object", "properties": {}}}
    for name in ("time", "weather")
]
TASKS = {
    "tool_selection": [
        {"input": f"Ask {name}.", "tools": TOOLS, "target": name, "metadata": {"topic": name}}
        for name in ("time", "weather")
    ],
    "cot": [
        {
            "question": f"{n} + 2?",
            "answer": n + 3,
            "steps": [f"{n} + 2 is {n + 2}.", f"One more is {n + 3}.", "So."],
        }
        for n in range(2)
    ],
}
LESSONS = {
    "why_that_tool.ipynb": "tool_selection",
    "does_it_read_its_reasoning.ipynb": "cot",
    "what_did_my_prompt_do.ipynb": "tool_selection",
}
EXAMPLES = Path(__file__).parent.parent / "examples"


def cells(name: str) -> list[dict[str, Any]]:
    return json.loads((EXAMPLES / name).read_text(encoding="utf-8"))["cells"]


def execute(name: str, parameters: dict[str, Any]) -> list[Any]:
    """Run the code cells as one program; what each one's last expression or `display` shows."""
    program = ast.Module([], [])
    for cell in cells(name):
        if cell["cell_type"] != "code":
            continue
        body = ast.parse("".join(cell["source"])).body
        if isinstance(last := body[-1], ast.Expr):
            body[-1] = ast.Expr(ast.Call(ast.Name("display"), [last.value], []))
        program.body += body
        if "parameters" in cell["metadata"].get("tags", ()):
            names = {
                target.id
                for line in body
                if isinstance(line, ast.Assign)
                for target in line.targets
                if isinstance(target, ast.Name)
            }
            assert parameters.keys() <= names
            program.body += ast.parse(
                "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
            ).body
    Path("lesson.py").write_text(ast.unparse(ast.fix_missing_locations(program)))
    shown: list[Any] = []
    runpy.run_path("lesson.py", {"display": shown.append})
    return [value for value in shown if value is not None]


def test_every_notebook_is_a_lesson_that_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.ipynb")} == set(LESSONS)
    for name in LESSONS:
        kinds = [cell["cell_type"] for cell in cells(name)]
        assert kinds[0] == "markdown" and kinds.count("markdown") >= 5, "a lesson says what it does"
        assert len({cell["id"] for cell in cells(name)}) == len(kinds)


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        runner, "make_options", lambda model, given: make_options(model, {"max_new_tokens": 8} | given)
    )
    tasks = [{"id": f"t{n}", "kind": LESSONS[name]} | task for n, task in enumerate(TASKS[LESSONS[name]])]
    Path("tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    shown = execute(name, {"MODEL": "random:tiny-llama", "TASKS": "tasks.jsonl", "LIMIT": "2"})
    assert hasattr(shown[0], "_repr_html_") and len(shown) >= 4
    assert sum(isinstance(value, pd.DataFrame) and not value.empty for value in shown) >= 2
