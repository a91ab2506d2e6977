"""Python and the terminal as a new user finds them: options in any form, sentences instead of internal errors."""

from __future__ import annotations

import datetime
import io
import json

import pandas as pd  # pyright: ignore[reportMissingTypeStubs]
import pytest
import torch
from click.testing import CliRunner

import probe
from probe.cli import main
from probe.errors import BadInput, UsageError
from probe.harness.plan import Options, make_options
from probe.runs.export import FORMATS, file_format
from tests.conftest import tiny
from tests.each import each

TASKS = [
    {
        "id": f"my-{number}",
        "kind": "tool_selection",
        "input": text,
        "tools": [
            {"name": "weather", "description": "Says the weather of a city. " * 20, "parameters": {}},
            {"name": "clock", "description": "Says what time it is.", "parameters": {}},
        ],
        "target": target,
    }
    for number, (text, target) in enumerate(
        [("Will it rain in Rome?", "weather"), ("What time is it?", "clock"), ("Thank you.", None)], 1
    )
]


def call(*args: str):
    return CliRunner().invoke(main, list(map(str, args)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return probe.run(TASKS, model=tiny("tiny-llama"), out=out, max_new_tokens=2)


def test_tasks_in_place_of_a_path_are_a_run_that_can_be_resumed_and_analyzed(run):
    assert run.task_ids == ["my-1", "my-2", "my-3"]
    assert probe.resume(run.path, analyze=False).task_ids == run.task_ids
    analyzed = probe.analyze(run, quick=True, model=tiny("tiny-llama"))
    experiments = {"mask_all", "mask_all_random", "mask_part", "mask_part_random", "swap"}
    assert set(analyzed.table("interventions")["experiment"]) == experiments
    whole = analyzed.measures().query("task_id == '' and role == 'chosen' and part.isna()")
    assert len(whole[whole.name == "knockout_minus_random"]) == 1


def test_a_list_that_is_no_task_file_leaves_nothing(tmp_path):
    with pytest.raises(BadInput, match="kind"):
        probe.run([{"id": "a"}], model=tiny("tiny-llama"), out=tmp_path / "run")
    with pytest.raises(UsageError, match="a list of objects"):
        probe.run([{"id": object()}], model=tiny("tiny-llama"), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@each(
    [
        ({"limit": 2}, {"limit": "2"}),
        ({"limit": "2-3"}, {"limit": "2-3"}),
        ({"layers": [0, 2]}, {"layers": "0,2"}),
        ({"layers": 1}, {"layers": "1"}),
        ({"layers": range(2)}, {"layers": "0,1"}),
        ({"layers": torch.tensor([0, 1])}, {"layers": "0,1"}),
        ({"layers": "0,4-7"}, {"layers": "0,4-7"}),
        ({"capture": ["resid_post", "logits"]}, {"capture": "resid_post,logits"}),
        ({"task_ids": "my-1"}, {"task_ids": ("my-1",)}),
        ({"task_ids": ["my-1", "my-2"]}, {"task_ids": ("my-1", "my-2")}),
        ({"task_ids": pd.Series(["my-1"])}, {"task_ids": ("my-1",)}),
        ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
        ({"device": torch.device("cpu")}, {"device": "cpu"}),
        ({"batch_size": "auto"}, {"batch_size": None}),
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"seed": None}, {"seed": 0}),
        (
            {"template_args": {"enable_thinking": False, "effort": "low"}},
            {"template_args": ("enable_thinking=false", 'effort="low"')},
        ),
        ({"template_args": "a=1"}, {"template_args": ("a=1",)}),
        ({"date": datetime.date(2026, 1, 31)}, {"date": "2026-01-31T00:00:00"}),
    ]
)
def test_an_option_takes_what_a_user_of_python_would_give(pair):
    given, meant = pair
    choices = make_options("m", given)
    assert choices == Options(model="m", **{"date": choices.date} | meant)
    json.dumps(choices.__dict__)


@each(
    [
        ({"limit": 2.5}, "--limit 2.5: give a number"),
        ({"limit": True}, "--limit True: give"),
        ({"layers": []}, r"--layers \[\]: give layers"),
        ({"layers": [0.5]}, "--layers"),
        ({"capture": 1.5}, "--capture 1.5: give site names"),
        ({"task_ids": 3}, "--task-ids 3: give an id"),
        ({"batch_size": "many"}, "--batch-size 'many': give a whole number"),
        ({"batch_size": 0}, "--batch-size 0: a positive number"),
        ({"max_new_tokens": "8"}, "--max-new-tokens '8': give a whole number"),
        ({"dtype": "float64"}, "--dtype float64: one of float32"),
        ({"limt": 2}, "no option 'limt': did you mean limit?"),
    ]
)
def test_an_option_that_is_none_is_one_sentence(pair):
    given, message = pair
    with pytest.raises(UsageError, match=message):
        make_options("m", given)


def test_python_shows_what_there_is():
    assert set(dir(probe)) >= {"analyze", "load", "measures", "open", "resume", "run"}
    assert "random:tiny-llama" in repr(tiny("tiny-llama")) and "0x" not in repr(tiny("tiny-llama"))


def test_analyze_ends_with_findings_and_a_path(run):
    result = call("analyze", run.path, "--no-model")
    *_, finding, path = result.stdout.strip().splitlines()
    assert path == str(run.path)
    assert "n = " in finding
    document = json.loads(call("analyze", run.path, "--no-model", "--json").stdout)
    assert any("tool" in sentence for sentence in document["findings"])
    assert document["report"] == str(run.path / "report.html")


def test_show_marks_target_and_choice_and_leaves_nothing_out_in_silence(run):
    shown = call("show", run.path, "my-1").stdout
    assert any("weather" in line and "target" in line for line in shown.splitlines() if "nats" in line)
    assert sum("chosen" in line for line in shown.splitlines() if "nats" in line) == 1
    prompt = run["my-1"].record["prompt"]
    assert prompt not in shown and f"{len(prompt) - 800:,} characters left out: --full" in shown
    assert prompt in call("show", run.path, "my-1", "--full").stdout
    none = call("show", run.path).stdout
    assert "None" not in none and "target no tool" in none


@each(
    [
        ("show", "{run}", "my-9"),
        ("tasks", "lint", "{bad}"),
        ("verify", "{bad}"),
        ("analyze", "{run}", "nothing"),
    ]
)
def test_an_error_is_a_document_where_one_is_asked_for(args, run, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a"}\n{"id": 1}\n')
    result = call(*(arg.format(run=run.path, bad=bad) for arg in args), "--json")
    document = json.loads(result.stdout)
    assert document["exit_code"] == result.exit_code != 0
    assert document["error"] in result.stderr
    if "lint" in args:
        assert len(document["problems"]) > 1


def test_a_file_that_is_one_value_is_one_sentence(tmp_path):
    for text, what in (
        (json.dumps(TASKS, indent=2), "is one JSON array"),
        (json.dumps(TASKS), "is one JSON array"),
        ("\n".join(json.dumps(task, indent=1) for task in TASKS), "over several lines"),
    ):
        path = tmp_path / "tasks.json"
        path.write_text(text)
        result = call("tasks", "lint", path)
        assert result.exit_code == 3
        (line,) = result.stderr.strip().splitlines()
        assert (what in line and "one a line" in line) or "a line of its own" in line


def test_an_extension_decides_the_format_or_is_refused(run, tmp_path):
    for name in FORMATS:
        assert call("export", run.path, "-o", tmp_path / f"m.{name.upper()}").exit_code == 0
        printed = call("export", run.path, "-o", "-", "--format", name)
        assert printed.stdout_bytes == (tmp_path / f"m.{name.upper()}").read_bytes()
    assert pd.read_csv(io.BytesIO(printed.stdout_bytes)).shape[0] == len(run.measures())
    for args in (
        ("export", run.path, "-o", tmp_path / "m.xlsx"),
        ("export", run.path, "-o", tmp_path / "folder"),
        ("export", run.path, "-o", "-"),
        ("export", run.path, "--format", "csv", "-o", tmp_path / "m.jsonl"),
        ("report", run.path, "-o", tmp_path / "r.pdf"),
        ("report", run.path, "-o", "-"),
    ):
        assert call(*args).exit_code == 2, args
    assert {path.name for path in tmp_path.iterdir()} == {f"m.{name.upper()}" for name in FORMATS}


def test_a_name_without_a_known_extension_is_told_which_there_are(tmp_path):
    with pytest.raises(UsageError, match=r"name it lora\.parquet or lora\.jsonl or lora\.csv"):
        file_format(tmp_path / "lora.xml", FORMATS)


def test_a_dry_run_of_an_analysis_says_what_is_run(tmp_path):
    copy = tmp_path / "run"
    probe.run(TASKS, model=tiny("tiny-llama"), out=copy, max_new_tokens=2)
    told = json.loads(call("analyze", copy, "--quick", "--dry-run", "--json").stdout)["experiments"]["tool"]
    seen = Conditions()
    copied = probe.analyze(copy, quick=True, model=tiny("tiny-llama"), progress=seen)
    rows = copied.table("interventions")
    assert told["conditions"] == len(rows[["task_id", "experiment", "condition"]].drop_duplicates()) == seen.n
    assert seen.total == seen.n and seen.unit == "conditions"
    assert 0.9 * seen.tokens <= told["tokens"] <= 1.1 * seen.tokens
    assert call("analyze", copy, "--quick", "--dry-run").stdout.strip() == "nothing is missing"


class Conditions:
    """Counts what an analysis tells whoever watches."""

    def __init__(self):
        self.n = self.tokens = self.total = 0
        self.unit = ""

    def start(self, total, unit="tasks"):
        self.total, self.unit = total, unit

    def expect(self, total):
        self.total = total

    def log(self, message):
        pass

    def done(self, n_tokens, count=1):
        self.n, self.tokens = self.n + count, self.tokens + n_tokens

    def end(self):
        pass
