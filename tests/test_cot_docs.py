"""Measures of `cot` are those that are defined; docs/cot.md is held to the code: experiments, commands."""

from __future__ import annotations

import pytest

from probe.analyzers import analyze
from probe.analyzers.registry import REGISTRY
from probe.experiments import Effort, intervene, read_by
from probe.runs import AXES, Run
from tests import test_docs
from tests.conftest import tiny
from tests.test_analyzers import TASKS, make

PAGE = test_docs.ROOT / "docs" / "cot.md"
LONG = {
    "id": "c3",
    "kind": "cot",
    "question": "Go on?",
    "answer": 5,
    "steps": [f"Now {k}." for k in range(12)],
}


@pytest.fixture(scope="module")
def measures(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "cot", [*TASKS["cot"], LONG])
        run = make(tmp_path_factory.mktemp("docs"), "cot")
    intervene(run, [*read_by("cot")], model=tiny("tiny-llama"), effort=Effort(draws=2))
    analyze(run)
    frame = Run(run.path).measures().query("analyzer == 'cot'").copy()
    frame["of"] = ["task" if task_id else "run" for task_id in frame.task_id]
    return frame


def test_every_measure_has_its_unit_and_fills_its_columns(measures):
    for (name, of), rows in measures.groupby(["name", "of"]):
        defined = REGISTRY["cot", name]
        assert of in defined.of, name
        assert set(rows.unit) == {defined.unit}, name
        filled = {axis for axis in AXES if rows[axis].notna().any()}
        assert filled <= {*defined.columns}, name
        assert rows[[axis for axis in defined.axes if axis in AXES]].notna().all(axis=None), name
        assert rows.n.min() >= 1


def test_every_defined_measure_is_made_with_every_column(measures):
    defined = {name: measure for (analyzer, name), measure in REGISTRY.items() if analyzer == "cot"}
    yielded = {(name, of) for name, of in zip(measures.name, measures.of, strict=True)}
    # A random model's draws may all be without an answer to compare.
    absent = {(name, of) for name, measure in defined.items() for of in measure.of} - yielded
    assert {name for name, _ in absent} <= {"resampling", "resampling_score"}
    for name, measure in defined.items():
        rows = measures[measures.name == name]
        if len(rows):
            assert {axis for axis in AXES if rows[axis].notna().any()} == {*measure.columns}, name


def test_every_experiment_is_described_and_named_where_it_writes():
    table = [cells for cells in test_docs.rows_of(PAGE.read_text()) if len(cells) == 3]
    names = [name for cells in table for name in test_docs.names_in(cells[0])]
    assert sorted(names) == sorted(read_by("cot"))
    line = next(i for i, cells in enumerate(table) if not any(cells))
    assert {name for cells in table[line:] for name in test_docs.names_in(cells[0])} == {
        name for name, entry in read_by("cot").items() if entry.by_name
    }


def test_commands_of_the_page_exist():
    test_docs.test_commands_in_the_documentation_exist_with_their_options("docs/cot.md")
    words = test_docs.help_of("analyze")
    assert all(name in words for name in read_by("cot"))
