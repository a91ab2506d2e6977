"""Labels are taken apart and put together in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from probe.prompts import labels
from probe.prompts.labels import Label

ROOT = Path(__file__).parent.parent / "probe"


@pytest.mark.parametrize(
    ("text", "kind", "key"),
    [("user", "user", None), ("step:3", "step", "3"), ("tool:a:b", "tool", "a:b"), ("tool:", "tool", "")],
)
def test_a_label_is_taken_apart_and_put_together(text: str, kind: str, key: str | None):
    assert Label.parse(text) == (kind, key)
    assert str(Label(kind, key)) == text


def test_keys_are_read_back():
    assert labels.tool_of(labels.tool_label("a:b")) == "a:b"
    assert labels.step_of(labels.step_label(12)) == 12
    assert labels.is_example(labels.example_label(1))
    others = ["step", "user", "tool", labels.result_label(2), "steps:3"]
    assert (
        {labels.step_of(label) for label in others} == {labels.tool_of(label) for label in others} == {None}
    )


def test_no_other_module_spells_the_kind_of_a_label():
    prefixes = tuple(f"{kind}:" for kind in (labels.TOOL, labels.STEP, labels.RESULT, labels.EXAMPLE))
    offenders = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in prefixes
    ]
    assert offenders == []
