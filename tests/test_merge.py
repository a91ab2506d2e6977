"""Shards of a task file, run apart and put together, are the run of the whole file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import probe
from probe.errors import ArtifactCorrupt, UsageError
from probe.harness.merge import merge
from probe.runs import Run, diff, verify
from probe.tasks import in_shard
from tests.test_cli import ALL, PROMPTING, call, write

TASKS = ALL + [PROMPTING | {"id": f"p{n}", "input": f"word {n} ->"} for n in range(2, 8)]
OPTIONS = ("--model", "random:tiny-llama", "--no-analyze", "--max-new-tokens", 4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with the task file, its whole run and its two shards."""
    folder = tmp_path_factory.mktemp("shards")
    write(folder / "t.jsonl", TASKS)
    call("run", folder / "t.jsonl", *OPTIONS, "--out", folder / "whole")
    for number in (1, 2):
        call("run", folder / "t.jsonl", *OPTIONS, "--shard", f"{number}/2", "--out", folder / f"s{number}")
    return folder


def test_every_task_is_in_one_shard_whatever_the_file_and_shards_are_of_like_size():
    tasks: list[Any] = [SimpleNamespace(id=f"task {n}") for n in range(3000)]
    parts = [in_shard(tasks, f"{number}/3") for number in (1, 2, 3)]
    assert sorted(task.id for part in parts for task in part) == sorted(task.id for task in tasks)
    assert all(900 < len(part) < 1100 for part in parts)
    assert in_shard(tasks[::-1], "2/3")[::-1] == parts[1]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_what_is_no_shard_is_refused(shard, tmp_path):
    call("run", write(tmp_path / "t.jsonl", ALL), *OPTIONS, "--shard", shard, "--out", tmp_path / "r", code=2)
    assert not (tmp_path / "r").exists()


def test_a_shard_is_a_whole_run_of_its_tasks_and_says_that_there_are_others(shards):
    header = Run(shards / "s1").run
    assert verify(shards / "s1").complete
    n = len(header["task_ids"])
    assert header["shard"] == {"number": 1, "of": 2, "n_tasks_elsewhere": len(TASKS) - n}
    assert header["task_file"]["n_tasks"] == n


def test_merged_shards_are_the_whole_run_and_are_analyzed_and_verified_as_one(shards, tmp_path):
    call("merge", shards / "s2", shards / "s1", "--out", tmp_path / "m")
    merged, whole = Run(tmp_path / "m"), Run(shards / "whole")
    assert diff(whole, merged) == []
    assert merged.task_ids == whole.task_ids
    report = verify(merged.path)
    assert (report.complete, report.problems, report.status) == (True, [], "done")
    same = set(whole.run) - {"id", "created", "argv", "options", "blake3"}
    assert {key: merged.run[key] for key in same} == {key: whole.run[key] for key in same}
    assert [(part["shard"]["number"], part["n_tasks"]) for part in merged.run["merged"]] == [
        (2, len(Run(shards / "s2"))),
        (1, len(Run(shards / "s1"))),
    ]
    assert merged.has_measures and merged.report_path is not None


def test_a_shard_that_is_missing_is_run_by_resume(shards, tmp_path):
    shutil.copytree(shards / "s1", tmp_path / "s1")
    run = Run(tmp_path / "s1")
    shutil.rmtree(run[run.task_ids[0]].path)
    (run.path / "manifest.json").unlink()
    header = json.loads((run.path / "run.json").read_text()) | {"status": "started"}
    header.pop("blake3")
    (run.path / "run.json").write_text(json.dumps(header))
    result = call("merge", tmp_path / "s1", shards / "s2", "--out", tmp_path / "m", "--no-analyze")
    assert "1 tasks are in none of these runs" in result.stderr
    assert verify(tmp_path / "m").status == "interrupted"
    call("resume", tmp_path / "m", "--no-analyze")
    assert verify(tmp_path / "m").complete
    assert diff(Run(shards / "whole"), Run(tmp_path / "m")) == []


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--model", "random:tiny-gpt2"), "weights"),
        (("--max-new-tokens", 3), "--max-new-tokens: 4 and 3"),
        (("--layers", "0"), "--layers"),
    ],
)
def test_runs_that_differ_are_refused_by_what_differs(options, what, shards, tmp_path):
    call("run", shards / "t.jsonl", *OPTIONS, *options, "--shard", "2/2", "--out", tmp_path / "s")
    result = call("merge", shards / "s1", tmp_path / "s", "--out", tmp_path / "m", code=2)
    assert what in result.stderr and str(tmp_path / "s") in result.stderr
    assert not (tmp_path / "m").exists()


def test_other_task_files_and_tasks_that_two_runs_have_are_refused(shards, tmp_path):
    write(tmp_path / "t.jsonl", TASKS[1:])
    call("run", tmp_path / "t.jsonl", *OPTIONS, "--shard", "2/2", "--out", tmp_path / "s")
    with pytest.raises(UsageError, match="differ in task file"):
        merge([shards / "s1", tmp_path / "s"], tmp_path / "m")
    with pytest.raises(UsageError, match="task '.*' is in .*s1 and in .*whole"):
        merge([shards / "s1", shards / "whole"], tmp_path / "m")
    with pytest.raises(UsageError, match="two runs"):
        merge([shards / "s1", shards / "s1"], tmp_path / "m")


def test_a_damaged_task_is_named_and_not_copied(shards, tmp_path):
    shutil.copytree(shards / "s1", tmp_path / "s1")
    task = next(iter(Run(tmp_path / "s1")))
    file = task.path / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactCorrupt, match=r"tensors.safetensors: altered"):
        merge([tmp_path / "s1", shards / "s2"], tmp_path / "m")
    assert task.id not in probe.open(tmp_path / "m").task_ids
