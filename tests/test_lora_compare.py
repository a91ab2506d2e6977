"""Before and after: paired by task, against a plain loop."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

import probe
from probe.cli import main
from probe.errors import UsageError
from probe.maths.intervals import mean_interval
from probe.runs import Run
from probe.runs.files import encode_signed
from probe.training.lora.compare import compare, measures
from tests.test_lora import SETTINGS
from tests.test_lora_models import saved


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("compare")
    path = saved(SETTINGS["plain"], place / "adapter")
    options = dict(limit="6", max_new_tokens=2)
    before = probe.run("tasks/tools.jsonl", model="random:tiny-llama", out=place / "before", **options)
    after = probe.run("tasks/tools.jsonl", model=str(path), out=place / "after", **options)
    return before, after


def test_differences_are_those_of_a_plain_loop(runs):
    before, after = runs
    comparison = compare(before, after)
    [entry] = [e for e in comparison["measures"] if e["name"] == "log_prob" and e["tools"] == "right tool"]
    differences = []
    for task in before:
        target = task.record["target"]
        if target is None:
            continue
        target = target if isinstance(target, list) else [target]
        pair = [
            np.mean(
                [
                    e["log_prob"]
                    for e in run[task.record["id"]].record["tool_probabilities"]
                    if e["tool"] in target
                ]
            )
            for run in (before, after)
        ]
        differences.append(pair[1] - pair[0])
    assert entry["n"] == len(differences)
    assert entry["difference"] == pytest.approx(np.mean(differences), abs=1e-9)
    interval = mean_interval(differences)
    assert (entry["low"], entry["high"]) == (interval or (None, None))
    assert any(e["name"] == "score" for e in comparison["measures"])


def test_a_run_against_itself_differs_nowhere(runs):
    comparison = compare(runs[0], runs[0])
    assert all(e["difference"] == 0 for e in comparison["measures"]) and comparison["rows_unpaired"] == [0, 0]
    assert all(m.value == 0 for m in measures(comparison))


def test_the_command_prints_json_and_refuses_runs_without_measures(runs, tmp_path):
    paths = [str(run.path) for run in runs]
    result = CliRunner().invoke(
        main, ["lora", "compare", *paths, "--json", "-o", str(tmp_path / "change.parquet")]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["adapted"]["adapter"]["r"] == 4
    assert (tmp_path / "change.parquet").stat().st_size
    bare = tmp_path / "bare"
    shutil.copytree(paths[0], bare)
    (bare / "measures.parquet").unlink()
    (bare / "manifest.json").unlink()
    header = json.loads((bare / "run.json").read_text())
    (bare / "run.json").write_bytes(encode_signed(header | {"status": "started"}))
    with pytest.raises(UsageError, match="probe analyze"):
        compare(Run(bare), runs[1])
