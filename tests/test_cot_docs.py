"""Measures of `cot` are those that are defined; docs/cot.md is held to the code: experiments, commands."""

from __future__ import annotations

import pytest

from probe.analyzers import analyze
from probe.analyzers.registry import REGISTRY
from probe.experiments import Effort, intervene, read_by
from probe.runs import AXES, Run
from tests import test_docs
from tests.conftest import tiny
from tests.defined import check_defined
from tests.test_analyzers import TASKS, make

PAGE = test_docs.ROOT / "docs" / "cot.md"
LONG = {
    "id": "c3",
    "kind": "cot",
    "question": "Go on?",
    "answer": 5,
    "steps": [f"Now {k}." for k in range(12)],
}


STATES = ("state_bytes", "state_norm", "state_change", "state_reconstruction_error")
"""Measures of recurrent layers, which tests/test_recurrent_memory.py makes."""


def without_states() -> list[str]:
    """Experiments on chains that a model of attention alone can have."""
    return [name for name, entry in read_by("cot").items() if entry.requires not in ("state", "hybrid")]


@pytest.fixture(scope="module")
def measures(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "cot", [*TASKS["cot"], LONG, LONG | {"id": "c4"}])
        run = make(tmp_path_factory.mktemp("docs"), "cot")
    intervene(run, without_states(), model=tiny("tiny-llama"), effort=Effort(draws=2))
    analyze(run)
    return Run(run.path).measures().query("analyzer == 'cot'")


def test_every_measure_is_made_with_its_unit_and_columns(measures):
    registered = {
        (name, of) for (analyzer, name), defined in REGISTRY.items() if analyzer == "cot" for of in defined.of
    }
    yielded = {
        (name, "run" if whole else "task")
        for name, whole in zip(measures.name, measures.task_id == "", strict=True)
    }
    # A random model's draws may all be without an answer to compare.
    drawn = {key: "no draw has an answer" for key in registered - yielded if key[0].startswith("resampling")}
    of_states = {key: "no layer is recurrent" for key in registered if key[0] in STATES}
    check_defined(measures, "cot", drawn | of_states)
    for name in set(measures.name):
        rows = measures[measures.name == name]
        assert {axis for axis in AXES if rows[axis].notna().any()} == {*REGISTRY["cot", name].columns}, name


def test_commands_of_the_page_exist():
    test_docs.test_commands_in_the_documentation_exist_with_their_options("docs/cot.md")
    words = test_docs.help_of("analyze")
    assert all(name in words for name in read_by("cot"))
