"""An experiment is one entry: whatever lists or makes experiments reads it from the registry."""

from __future__ import annotations

import json

import pytest

import probe
from probe.experiments import EXPERIMENTS, experiment, intervene, read_by
from probe.experiments.registry import each
from probe.experiments.tool.conditions import Condition
from tests import test_docs
from tests.conftest import tiny


@pytest.fixture
def shouting():
    """A toy experiment in one entry: the request in capital letters."""

    @experiment("tool", "shouting", changes="the request is written in capitals", cost="1")
    @each
    def conditions(subject):
        messages = [type(message)(message.role, message.content.upper()) for message in subject.task.messages]
        fields = {name: getattr(subject.task, name) for name in subject.task.__struct_fields__}
        task = type(subject.task)(**fields | {"messages": tuple(messages)})
        yield Condition("shouting", subject.render(task))

    yield
    del EXPERIMENTS["shouting"]


def test_one_entry_adds_an_experiment_to_the_loop_the_table_and_the_help(shouting, tmp_path):
    line = {
        "id": "one",
        "kind": "tool_selection",
        "input": "what is two plus two?",
        "tools": [
            {"name": name, "description": name, "parameters": {"type": "object"}} for name in ("add", "mail")
        ],
        "target": "add",
    }
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps(line) + "\n")
    model = tiny("tiny-llama")
    run = probe.run(tasks, model=model, out=tmp_path / "run", analyze=False)
    assert intervene(run, ["shouting"], model=model) == ["shouting"]
    table = run.table("interventions")
    assert set(table.experiment) == {"shouting"} and len(table) == 3
    assert set(read_by("tool")) >= {"shouting", "swap"}
    assert "shouting" in test_docs.help_of("analyze")


def test_a_name_can_be_taken_once():
    with pytest.raises(ValueError, match="swap"):
        experiment("tool", "swap", changes="again", cost="1")(lambda subjects, bench: [])
