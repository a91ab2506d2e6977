"""Sweeps: the grid, cells that are runs like any other, and folders that are continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import probe
from probe.analyzers import analyze
from probe.cli import main
from probe.errors import ArtifactCorrupt, RunDirectoryError, UsageError
from probe.harness import runner
from probe.harness.sweep import GridCell, RunGrid, grid, sweep
from probe.report import write_report
from probe.runs import Run, diff
from probe.runs.files import encode_signed
from probe.tasks.choice import ToolChoice, under_system
from probe.tasks.messages import Message

MODEL = "random:tiny-llama"
TEXT = "Be brief."
TOOL = {"name": "clock", "description": "Tells the time.", "parameters": {"type": "object", "properties": {}}}
TASKS: list[dict[str, Any]] = [
    {"id": "a", "kind": "tool_selection", "input": "What time is it?", "tools": [TOOL], "target": "clock"},
    {
        "id": "b",
        "kind": "tool_selection",
        "messages": [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Bye."}],
        "tools": [TOOL],
        "target": None,
    },
    {"id": "c", "kind": "cot", "question": "2 + 2?", "answer": 4},
]
OPTIONS: dict[str, Any] = {"max_new_tokens": 2}


def write(path: Path, tasks: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("given") / "tasks.jsonl", TASKS)


CELLS = grid([MODEL, "random:nothing"], ["float32"], [0], {"none": None, "brief": TEXT})


@pytest.fixture(scope="module")
def swept(tasks, tmp_path_factory) -> tuple[RunGrid, int]:
    """Two cells of a model, two of one that there is none of, and how often a model was asked for."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        load = runner.load_model

        def counted(model: Any, *given: Any) -> Any:
            asked.extend([model] if isinstance(model, str) else [])
            return load(model, *given)

        patch.setattr(runner, "load_model", counted)
        done = sweep(tasks, tmp_path_factory.mktemp("sweep") / "s", CELLS, OPTIONS)
    return done, len(asked)


@pytest.fixture
def folder(swept, tmp_path) -> Path:
    """A copy, to be continued."""
    return Path(shutil.copytree(swept[0].path, tmp_path / "s"))


def no_model(*_: Any) -> Any:
    raise AssertionError("a model was loaded")


def test_a_grid_is_every_model_dtype_message_and_seed_the_last_fastest():
    cells = grid(["a/b", "c"], ["float32", "bfloat16"], [0, 1], {"none": None, "brief": TEXT})
    assert len(cells) == len({cell.name for cell in cells}) == 16
    assert cells[0] == GridCell("a/b", "float32", 0) and cells[1] == GridCell("a/b", "float32", 1)
    assert cells[2] == GridCell("a/b", "float32", 0, "brief", TEXT)
    assert [cell.name for cell in cells[:3]] == [
        "b_float32_seed0",
        "b_float32_seed1",
        "b_float32_brief_seed0",
    ]
    assert grid(["a", "a"], ["float32"], [0], {}) == [GridCell("a", "float32", 0)]
    assert "/" not in GridCell("../..", "float32", 0, "../x").name and GridCell("..", "x", 0).name[0] != "."


def test_cells_that_would_share_a_directory_are_refused():
    with pytest.raises(UsageError, match="two cells would be"):
        grid(["x/m", "y/m"], ["float32"], [0], {})
    with pytest.raises(UsageError, match="at least one"):
        grid([], ["float32"], [0], {})


def test_a_cell_that_fails_does_not_end_the_others_and_a_model_is_loaded_once(swept):
    done, n_loads = swept
    assert [entry.status for entry in done.cells] == ["done", "done", "missing", "missing"]
    assert n_loads == 2, "one for the cells of a model, one that failed"
    assert set(done.problems) == {cell.name for cell in CELLS[2:]}
    assert all("unknown shape" in problem for problem in done.problems.values())
    assert [run.path.name for run in done.runs] == [cell.name for cell in CELLS[:2]]


def test_a_cell_is_the_run_of_tasks_that_have_its_message(swept, tmp_path):
    """Against a file in which the message is written: in front, in place of the first, in front of the instruction."""
    message = {"role": "system", "content": TEXT}
    first = {key: value for key, value in TASKS[0].items() if key != "input"}
    written = [
        first | {"messages": [message, {"role": "user", "content": TASKS[0]["input"]}]},
        TASKS[1] | {"messages": [message, TASKS[1]["messages"][1]]},
        TASKS[2] | {"system": TEXT},
    ]
    path = write(tmp_path / "written.jsonl", written)
    run = probe.run(path, model=MODEL, out=tmp_path / "run", analyze=False, **OPTIONS)
    plain, brief = swept[0].runs
    assert diff(run, brief) == [] and diff(run, plain) != []
    assert TEXT in brief["c"].record["prompt"] and TEXT not in plain["c"].record["prompt"]
    options = brief.run["options"]
    assert (options["system"], options["dtype"], options["seed"], options["model"]) == (
        TEXT,
        "float32",
        0,
        MODEL,
    )
    assert plain.run["options"]["system"] is None and plain.run["options"]["date"] == options["date"]


def test_kinds_without_a_system_message_refuse_one(tmp_path):
    for task in (
        {"id": "p", "kind": "prompting", "input": "x", "variants": []},
        {"id": "r", "kind": "replay", "tools": [TOOL], "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ):  # fmt: skip
        path = write(tmp_path / "tasks.jsonl", [task])
        with pytest.raises(UsageError, match="takes none"):
            probe.run(path, model=MODEL, out=tmp_path / "run", system=TEXT)


def test_what_is_finished_is_not_run_again_and_what_is_interrupted_is_resumed(folder, tasks, monkeypatch):
    first, second = (folder / cell.name for cell in CELLS[:2])
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    whole = Path(shutil.copytree(second, folder.parent / "whole"))
    task = Run(second)["b"].path
    shutil.rmtree(task)
    (second / "manifest.json").unlink()
    (second / "run.json").write_bytes(encode_signed(Run(whole).run | {"status": "started"}))
    done = sweep(tasks, folder, CELLS[:2], OPTIONS)
    assert [entry.status for entry in done.cells] == ["done", "done"] and done.problems == {}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert diff(Run(whole), Run(second)) == [] and task.is_dir()
    monkeypatch.setattr(runner, "load_model", no_model)
    assert sweep(tasks, folder, CELLS[:2], OPTIONS).problems == {}


def test_another_setting_another_message_and_another_process_are_refused(folder, tasks):
    with pytest.raises(RunDirectoryError, match="max_new_tokens was 2, is 3"):
        sweep(tasks, folder, CELLS, {"max_new_tokens": 3})
    with pytest.raises(RunDirectoryError, match="system 'Be brief.'"):
        sweep(tasks, folder, grid([MODEL], ["float32"], [0], {"brief": "Be long."}), OPTIONS)
    from probe.runs.files import RunLock

    with RunLock(folder), pytest.raises(RunDirectoryError, match="busy"):
        sweep(tasks, folder, CELLS, OPTIONS)


def test_a_damaged_cell_is_a_problem_of_its_own(folder, tasks, monkeypatch):
    monkeypatch.setattr(runner, "load_model", no_model)
    (folder / CELLS[0].name / "run.json").write_text("{")
    done = sweep(tasks, folder, CELLS[:2], OPTIONS)
    assert [entry.status for entry in done.cells] == ["broken", "done"]
    assert list(done.problems) == [CELLS[0].name]
    with pytest.raises(ArtifactCorrupt, match="begin in another directory"):
        (folder / "sweep.json").write_text("{")
        sweep(tasks, folder, CELLS[:2], OPTIONS)


def test_damaged_measures_are_a_problem_of_their_cell_and_a_lost_report_is_written_again(
    folder, tasks, monkeypatch
):
    first, second = (folder / cell.name for cell in CELLS[:2])
    sweep(tasks, folder, CELLS[:2], OPTIONS, finish=analyze_and_report)
    monkeypatch.setattr(runner, "load_model", no_model)
    (first / "measures.parquet").write_bytes(b"no table")
    (second / "report.html").unlink()
    done = sweep(tasks, folder, CELLS[:2], OPTIONS, finish=write_report_alone)
    assert [entry.status for entry in done.cells] == ["broken", "done"]
    assert [run.path for run in done.runs] == [second] and (second / "report.html").is_file()


def write_report_alone(run: Run) -> None:
    write_report(run)


def analyze_and_report(run: Run) -> None:
    analyze(run)
    write_report(run)


def test_instructions_of_every_role_give_way_to_the_message():
    turns = (Message("developer", "Be long."), Message("user", "Hi."), Message("system", "Later."))
    task = ToolChoice(id="a", messages=turns, tools=(), line=1)
    assert under_system(task, TEXT).messages == (Message("system", TEXT), turns[1])


def test_the_command_ends_in_the_comparison_and_the_code_of_what_failed(folder, tasks, tmp_path):
    (tmp_path / "brief.txt").write_text(f"\ufeff{TEXT}\n")
    systems = ("--system", "none", "--system", str(tmp_path / "brief.txt"))
    call = ["sweep", str(tasks), "--out", str(folder), "--max-new-tokens", "2", *systems]

    def invoke(code: int, *more: str) -> Any:
        result = CliRunner().invoke(main, [*call, *more, "--json"])
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)

    predicted = invoke(0, "--dry-run", "--model", f"{MODEL},random:tiny-gpt2")["cells"]
    assert [cell["status"] for cell in predicted] == ["done", "done", "missing", "missing"]
    assert ["disk_bytes" in cell for cell in predicted] == [False, False, True, True]
    assert "max_new_tokens" in invoke(4, "--dry-run", "--max-new-tokens", "3")["error"]
    assert predicted[2]["n_tasks"] == 3 and predicted[2]["prompt_tokens"] > 300
    document = invoke(1, "--model", f"{MODEL},random:nothing")
    assert [cell["system"] for cell in document["cells"]] == [None, "brief"] * 2
    assert [row["run"] for row in document["comparison"]["runs"][:1]] == [CELLS[0].name]
    assert f"{CELLS[1].name}: another system message" in document["comparison"]["notes"]
    assert all(Run(folder / cell.name).has_report for cell in CELLS[:2])
    assert invoke(2, "--system", str(tmp_path / "missing.txt"))["exit_code"] == 2
