"""docs/cot.md is held to the code: measures with units and columns, experiments, commands."""

from __future__ import annotations

import pytest

from probe.analyzers import analyze
from probe.experiments import Effort, intervene, read_by
from probe.runs import Run
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
def documented():
    found = {}
    for cells in test_docs.rows_of(PAGE.read_text()):
        if len(cells) == 5 and cells[1] in ("task", "run"):
            used = frozenset(test_docs.names_in(cells[3]))
            brackets = frozenset(test_docs.re.findall(r"\(`(\w+)`\)", cells[3]))
            for name in test_docs.names_in(cells[0]):
                assert (name, cells[1]) not in found, f"{name} stands twice"
                found[name, cells[1]] = (set(cells[2].split(", ")), used - brackets, brackets)
    return found


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


def test_every_measure_stands_in_the_page_with_its_unit_and_columns(measures, documented):
    for (name, of), rows in measures.groupby(["name", "of"]):
        assert (name, of) in documented, f"{name} of a {of} is missing in {PAGE.name}"
        units, always, sometimes = documented[name, of]
        assert set(rows.unit) <= units, name
        filled = {column for column in test_docs.COLUMNS if rows[column].notna().any()}
        assert always <= filled <= always | sometimes, (name, of, filled)
        assert rows[[*always]].notna().all(axis=None), name
        assert rows.n.min() >= 1


def test_every_measure_of_the_page_is_made(measures, documented):
    made = set(zip(measures.name, measures.of, strict=True))
    # A random model's draws may all be without an answer to compare.
    assert set(documented) - made <= {("resampling", "task"), ("resampling", "run")}


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
