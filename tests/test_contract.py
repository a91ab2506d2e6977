"""docs/contract.md is true: what it lists is what the code has, no more and no less."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import msgspec
import pytest

import probe
from probe import analyzers, errors
from probe.capture.sites import ALWAYS, SITES
from probe.cli import main
from probe.model.names import DEFAULT
from probe.runs import Run, files, packed, tables
from probe.runs.diff import TOLERANCES
from probe.tasks import KINDS
from tests import test_agent
from tests.conftest import tiny
from tests.golden import GOLDEN
from tests.test_agent import dictate  # noqa: F401 - a fixture

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "contract.md").read_text()
TASK = {
    "id": "sum",
    "kind": "agent",
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What is 3 + 4?"},
    ],
    "tools": ["calculator"],
    "target": "calculator",
    "answer": 7,
    "max_turns": 2,
}


def table(heading: str, column: str) -> list[list[str]]:
    """The rows of the table under a heading whose first column is called `column`."""
    [section] = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", TEXT, re.M | re.S)
    rows = [
        [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    start = next(number for number, cells in enumerate(rows) if cells[0] == column)
    rest = rows[start + 2 :]
    end = next((number for number, cells in enumerate(rest) if set(cells[0]) == {"-"}), len(rest) + 1)
    return rest[: end - 1]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for name, part in command.commands.items():
            yield from commands(part, f"{path} {name}")
    else:
        yield path, command


def test_every_command_is_listed_with_its_arguments_and_options():
    listed = {names(call)[0]: names(options) for call, options in table("3. Commands", "command")}
    known = {}
    for path, command in commands(main, "probe"):
        context = click.Context(command)
        arguments = [p.make_metavar(context) for p in command.params if isinstance(p, click.Argument)]
        options = [max(p.opts, key=len) for p in command.params if isinstance(p, click.Option)]
        assert "--json" in options, path
        known[" ".join([path, *arguments])] = options
    assert {call: sorted([*options, "--json"]) for call, options in listed.items()} == {
        call: sorted(options) for call, options in known.items()
    }


def test_every_exit_code_is_that_of_its_error():
    listed = {names(error)[0]: int(code) for code, error, _ in table("3. Commands", "exit code") if error}
    classes = [
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == "probe.errors"
    ]
    assert listed == {kind.__name__: kind.exit_code for kind in classes}


def test_the_default_model_is_the_one_that_is_named():
    assert [row[0] for row in table("2. Models: `--model NAME`", "NAME") if "default" in row[0]] == [
        f"`{DEFAULT}`, the default"
    ]


def test_the_files_of_a_run_are_those_that_are_listed():
    listed = {names(row[0])[0] for row in table("5. Run directory", "file")}
    tasks = {f"{files.TASKS}/ab/<hash>/{name}" for name in files.TASK_FILES}
    tasks |= {f"{files.PACKS}/<name>/{name}" for name in (*packed.PACK_FILES, packed.PACK)}
    assert listed == {files.RUN, files.MANIFEST, *files.INPUTS, *files.DERIVED, *tasks}


@pytest.fixture(scope="module")
def agent(tmp_path_factory) -> Run:
    """An agent that is made to call; what it calls comes back to it."""
    folder = tmp_path_factory.mktemp("agent")
    path = folder / "tasks.jsonl"
    path.write_text(json.dumps(TASK) + "\n")
    options = {"tools": str(ROOT / "tools"), "tool_choice": "required", "max_new_tokens": 200}
    return probe.run(path, model="random:tiny-llama", out=folder / "run", analyze=False, **options)


@pytest.fixture(scope="module")
def replay(tmp_path_factory) -> Run:
    """A conversation that is replayed."""
    folder = tmp_path_factory.mktemp("replay")
    path = folder / "tasks.jsonl"
    line = {"id": "told", "kind": "replay", "messages": TASK["messages"][:2], "tools": TASK["tools"]}
    path.write_text(json.dumps(line) + "\n")
    return probe.run(
        path, model="random:tiny-llama", out=folder / "run", tools=str(ROOT / "tools"), analyze=False
    )


@pytest.fixture(scope="module")
def runs(agent, replay) -> list[Run]:
    """One of every kind of task."""
    several = [agent, replay, *map(probe.open, sorted(GOLDEN.iterdir()))]
    assert {task.record["kind"] for run in several for task in run} == set(kinds())
    return several


def kinds() -> list[str]:
    return [names(row[0])[0] for row in table("4. Task files", "kind")]


def test_the_fields_of_a_task_are_those_of_its_kind():
    listed = {names(row[0])[0]: row[1] for row in table("4. Task files", "kind")}
    for struct in (kind.task for kind in KINDS.values()):
        known = {field.name for field in msgspec.structs.fields(struct)} - {"id", "metadata", "raw", "line"}
        cell = listed[struct.__struct_config__.tag].replace("as `tool_selection`", listed["tool_selection"])
        # A tool task's `input` is short for one message; what stands in brackets is a value.
        assert set(names(re.sub(r"\([^()]*\)", "", cell))) - {"input"} == known - {"input"}


def keys(cells: list[str]) -> tuple[set[str], set[str]]:
    """Keys that are always there and keys that may be there (`key`?)."""
    optional = set(re.findall(r"`(\w+)`\?", cells[1]))
    return set(names(cells[1])) - optional, optional


def test_the_keys_of_run_json_are_those_that_are_listed(runs):
    rows = table("`run.json`", "key")
    optional = set(re.findall(r"`(\w+)`\?", "".join(row[0] for row in rows)))
    needed = {name for row in rows for name in names(row[0])} - optional
    [model] = [set(names(row[1])) for row in rows if names(row[0]) == ["model"]]
    for run in runs:
        assert needed <= set(run.run) <= needed | optional
        assert model <= set(run.run["model"])


def test_the_keys_of_a_record_are_those_that_are_listed(runs):
    rows = table("`record.json`", "kind")
    always, sometimes = keys(rows[0])
    passage = keys(rows[1])
    by_kind = {names(row[0])[0]: keys(row) for row in rows[2:]}
    # "those of the first turn as in `tool_selection`"
    tool = (by_kind["tool_selection"][0] - {"score", "target"}, by_kind["tool_selection"][1])
    by_kind["agent"] = ((by_kind["agent"][0] - {"tool_selection"}) | tool[0], by_kind["agent"][1] | tool[1])
    by_kind["replay"] = (by_kind["agent"][0] | {"replay_agreement"}, by_kind["agent"][1])
    by_kind["prompting"] = ({"passages"}, {"target", "score"})
    for run in runs:
        for task in run:
            record = task.record
            needed, allowed = by_kind[record["kind"]]
            if record["kind"] != "prompting":
                needed, allowed = needed | passage[0], allowed | passage[1]
            assert always | needed <= set(record), record["kind"]
            assert set(record) <= always | sometimes | needed | allowed, record["kind"]
            for part in record.get("passages", {}).values():
                choices = {"choice_probabilities", "chosen", "candidate_mass", "score"}
                assert passage[0] <= set(part) <= passage[0] | passage[1] | choices


def kinds_of(labels: Iterable[str]) -> set[str]:
    return {label.split(":")[0] for label in labels}


def test_the_labels_of_spans_are_those_that_are_listed(runs, dictate):  # noqa: F811
    listed = kinds_of(name for row in table("Spans", "label") for name in names(row[0]))
    seen = kinds_of(tiny("tiny-gptoss").capture("This model has learned sinks.").labels)
    dictate(tiny("tiny-llama"), {"a": [test_agent.CALL + test_agent.END]})
    ((outcome, _),) = test_agent.run(tiny("tiny-llama"), test_agent.task())
    seen |= kinds_of(outcome.labels)
    for run in runs:
        for task in run:
            for part in task.record.get("passages", {"main": task.record}).values():
                seen |= kinds_of(span["label"] for span in part["spans"])
    assert seen == listed


def test_tensors_and_their_axes_are_those_of_a_capture():
    listed = {names(row[0])[0]: tuple(row[1].split(", ")) for row in table("Tensors", "name")}
    assert listed == {site.name: site.axes for site in (*ALWAYS, *SITES.values())}


def test_the_tolerances_are_those_of_diff():
    listed = {
        dtype: tuple(map(float, row[1:]))
        for row in table("Tolerance", "dtype")
        for dtype in row[0].split(", ")
    }
    assert listed == {dtype: tuple(tolerance) for dtype, tolerance in TOLERANCES.items()}


def test_the_columns_of_measures_are_those_of_the_table():
    listed = [name for row in table("7. Measures", "column") for name in names(row[0])]
    assert listed == [name for name in tables.MEASURE_FIELDS if name not in tables.AXES]
    places = {names(row[0])[0]: tuple(row[1:]) for row in table("7. Measures", "place")}
    assert places == tables.AXES


def test_the_analyzers_are_those_that_are_installed_with_the_kinds_they_read():
    listed = {names(row[0])[0]: set(names(row[1])) for row in table("7. Measures", "analyzer")}
    assert listed == analyzers._OWN


def test_what_the_package_exports_is_listed():
    listed = {names(row[0])[0].removeprefix("probe.") for row in table("6. Python", "name")}
    assert listed == set(probe.__all__)


def test_the_groups_of_entry_points_are_those_that_the_code_reads():
    code = "".join(path.read_text() for path in (ROOT / "probe").rglob("*.py"))
    groups = set(re.findall(r"entry_points\(group=\"([\w.]+)\"\)", code))
    assert {names(row[0])[0] for row in table("8. Entry points", "group")} == groups
