"""A folder of one's own on the command line: what is shipped, what is set, and runs that are listed and removed."""

from __future__ import annotations

import json
import os
import re
import sysconfig
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from probe.cli import console, main
from probe.errors import UsageError
from probe.runs import Array, RunWriter, list_runs
from probe.tasks.shipped import shipped_path
from tests.each import each


def call(*args: str, code: int = 0, **extra):
    result = CliRunner().invoke(main, list(map(str, args)), **extra)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def runs(tmp_path) -> Path:
    """Three runs: one of another model, one that was stopped."""
    import torch

    folder = tmp_path / "runs"
    for name, model, score, status in (
        ("b", "llama", 1.0, "done"),
        ("a", "gemma", 0.0, "done"),
        ("c", "llama", None, "interrupted"),
    ):
        header = {"model": {"name": model}, "task_ids": ["t1"], "options": {}}
        with RunWriter.create(folder / name, header) as writer:
            if score is not None:
                record = {"id": "t1", "kind": "prompting", "status": "ok", "score": score, "passages": {}}
                writer.commit(record, {"x": Array(torch.zeros(3), ("position",))}, {})
            writer.finish(status)
    return folder


def names(result) -> list[str]:
    return [line.split()[0] for line in result.stdout.splitlines()[1:]]


def test_runs_are_sorted_and_chosen(runs):
    assert set(names(call("ls", runs))) == {"a", "b", "c"}
    assert names(call("ls", runs, "--sort", "id")) == ["a", "b", "c"]
    assert names(call("ls", runs, "--sort", "id", "--reverse")) == ["c", "b", "a"]
    assert names(call("ls", runs, "--sort", "model"))[0] == "a"
    assert names(call("ls", runs, "--sort", "tasks"))[0] == "c"
    assert set(names(call("ls", runs, "--model", "LLAMA"))) == {"b", "c"}
    assert names(call("ls", runs, "--status", "interrupted")) == ["c"]
    header = call("ls", runs).stdout.splitlines()[0].split()
    assert header == ["id", "status", "model", "tasks", "bytes"]


def test_scores_are_those_of_the_records(runs):
    rows = {row["id"]: row["scores"] for row in json.loads(call("ls", runs, "--scores", "--json").stdout)}
    assert rows["b"]["prompting"]["mean"] == 1.0 and rows["a"]["prompting"]["mean"] == 0.0
    assert rows["c"] == {}
    assert "prompting 1.000 [0.207, 1.000] 95 %, n = 1" in call("ls", runs, "--scores").stdout


def test_a_run_is_removed_whole_and_nothing_else(runs, tmp_path):
    call("rm", runs / "a", code=1, input="n\n")
    assert (runs / "a" / "run.json").exists()
    assert call("rm", runs / "a", input="y\n").stdout.startswith(str(runs / "a"))
    assert sorted(os.listdir(runs)) == ["b", "c"]

    (runs / "b" / "notes.txt").write_text("mine")
    kept = call("rm", "--yes", runs / "b", runs / "c", "--json", code=4)
    document = json.loads(kept.stdout)
    assert list(document["removed"]) == [str(runs / "c")] and document["removed"][str(runs / "c")] > 0
    assert "notes.txt" in document["kept"][0]
    assert sorted(os.listdir(runs)) == ["b"] and (runs / "b" / "notes.txt").read_text() == "mine"


def test_what_is_no_run_is_not_removed(runs):
    (runs / "link").symlink_to(runs / "b")
    for path in (runs, runs / "nowhere", runs / "link"):
        assert call("rm", "--yes", path, code=4).stdout == ""
    assert len(list_runs(runs)) == 4


def test_the_folder_that_one_is_in_is_removed_by_its_name(runs, monkeypatch):
    monkeypatch.chdir(runs / "a")
    call("rm", "--yes", ".")
    assert sorted(os.listdir(runs)) == ["b", "c"]


def test_a_run_that_is_written_to_is_not_removed(runs):
    with RunWriter.resume(runs / "c"):
        assert "busy" in call("rm", "--yes", runs / "c", code=4).stderr
    assert (runs / "c" / "run.json").exists()


def test_a_new_folder_holds_tasks_that_check(tmp_path):
    written = call("init", tmp_path / "new").stdout.split()
    assert [Path(name).name for name in written] == ["first.jsonl", "catalogue.json"]
    assert "4 tasks, 0 warnings" in call("tasks", "lint", written[0]).stderr
    call("init", tmp_path / "new", code=4)


@each(["bash", "zsh", "fish"])
def test_a_shell_learns_the_commands(shell):
    assert "_PROBE_COMPLETE" in call("completion", shell).stdout


def test_shipped_tasks_have_names(monkeypatch, tmp_path):
    assert shipped_path("probe:tools").samefile("tasks/tools.jsonl")
    assert shipped_path("mine.jsonl") == Path("mine.jsonl")
    with pytest.raises(UsageError, match=r"did you mean probe:tools\?"):
        shipped_path("probe:tolls")
    assert "0 warnings" in call("tasks", "lint", "probe:tools").stderr
    # What a wheel installs lies under the data folder; there is no checkout beside the package then.
    (tmp_path / "share" / "probe" / "tasks").mkdir(parents=True)
    (tmp_path / "share" / "probe" / "tasks" / "tools.jsonl").write_text("")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("probe.tasks.shipped.__file__", str(tmp_path / "site" / "probe" / "tasks" / "x.py"))
    assert shipped_path("probe:tools") == tmp_path / "share" / "probe" / "tasks" / "tools.jsonl"


@each([("2e9", 2_000_000_000), ("1.5e3", 1500), ("2_000", 2000), ("7", 7)])
def test_a_whole_number_is_written_as_people_write_it(pair):
    text, value = pair
    assert console.Count(1).convert(text, None, None) == value


@each(["1.5", "1e-3", "1.55e1", "0e0", "1e400", "x"])
def test_what_is_no_whole_number_in_range_is_refused(text):
    with pytest.raises(click.BadParameter):
        console.Count(1).convert(text, None, None)


def test_an_option_comes_from_the_command_then_the_environment_then_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr("probe.runs.list_runs", lambda directory: [])

    def sort_of(*args: str, env: dict[str, str] | None = None) -> str:
        monkeypatch.setattr(main.commands["ls"], "callback", lambda **options: seen.append(options["sort"]))
        call("ls", *args, env=env or {})
        return seen[-1]

    assert sort_of() == "created"
    (tmp_path / "probe.toml").write_text('[ls]\nsort = "model"\n[run]\nmax-new-tokens = 4\n')
    assert sort_of() == "model"
    assert sort_of(env={"PROBE_LS_SORT": "id"}) == "id"
    assert sort_of("--sort", "bytes", env={"PROBE_LS_SORT": "id"}) == "bytes"


@each(
    [
        ("sort = ", "Invalid value"),
        ("[lss]\nsort = 1", "probe has no 'lss'"),
        ("[ls]\nsorted = true", "ls has no 'sorted': its options are"),
        ("[tasks.lint]\nnothing = 1", "lint has no 'nothing'"),
    ]
)
def test_settings_that_mean_nothing_are_refused(pair, tmp_path, monkeypatch):
    text, message = pair
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probe.toml").write_text(text)
    assert re.search(message, call("ls", code=3).stderr)


def test_long_output_goes_through_a_pager_on_a_terminal_alone(monkeypatch, capsys):
    paged: list[str] = []
    monkeypatch.setattr(click, "echo_via_pager", paged.append)
    monkeypatch.setenv("LESS", "")
    monkeypatch.delenv("LESS")
    lines = [f"line {n}\x1b[2J" for n in range(30)]
    text = "".join(f"line {n}\ufffd[2J\n" for n in range(30))
    console.echo_lines(lines, no_pager=False)
    assert capsys.readouterr().out == text and paged == []
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("LINES", "31")
    console.echo_lines(lines, no_pager=False)
    assert capsys.readouterr().out == text and paged == []
    monkeypatch.setenv("LINES", "30")
    console.echo_lines(lines, no_pager=True)
    assert capsys.readouterr().out == text and paged == []
    console.echo_lines(lines, no_pager=False)
    assert capsys.readouterr().out == "" and paged == [text]
    assert os.environ["LESS"] == "-RS", "a wide row stays a row"


def test_a_run_that_there_is_none_of_is_answered_with_the_nearest_name(runs):
    (runs / "smollm").mkdir()
    assert f"did you mean {runs / 'smollm'}?" in call("show", runs / "smolm", code=4).stderr
    assert "`probe ls` lists runs" in call("show", runs / "xyz", code=4).stderr
