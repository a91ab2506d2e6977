"""Runs side by side: paired by task, against plain loops, scipy and planted laws."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from click.testing import CliRunner

import probe
from probe.analyzers.comparison import compare
from probe.cli import main
from probe.errors import UsageError
from probe.maths.intervals import mean_interval
from probe.maths.paired import difference_interval, difference_p
from probe.runs import Run
from probe.runs.files import encode_signed
from tests.test_lora import SETTINGS
from tests.test_lora_models import saved

# -- two numbers of each task ----------------------------------------------------------------------------------------


def test_right_and_wrong_are_tested_as_mcnemar_does():
    before = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 1.0])
    after = np.array([1, 1, 0, 1, 1, 1, 1, 1, 0, 1.0])
    assert difference_p(before, after) == pytest.approx(scipy.stats.binomtest(5, 6).pvalue)
    assert difference_p(before, before) == 1


@pytest.mark.parametrize("n", [5, 12])
def test_all_exchanges_are_those_of_scipy(n):
    first, second = np.random.default_rng(n).normal(size=(2, n))
    exact = scipy.stats.permutation_test(
        (second, first), lambda a, b, axis: (a - b).mean(axis), permutation_type="samples", vectorized=True, n_resamples=10**6,
    )  # fmt: skip
    assert difference_p(first, second) == pytest.approx(exact.pvalue)


def test_a_test_of_no_difference_errs_in_one_of_twenty_and_its_interval_holds_the_truth():
    generator = np.random.default_rng(0)
    for law in ("normal", "exponential", "right or wrong"):
        errors, holds, repeats = 0, 0, 500
        for _ in range(repeats):
            if law == "right or wrong":
                of_task = generator.beta(2, 2, 30)
                first, second = (generator.random((2, 30)) < of_task).astype(float)
            else:
                first, second = getattr(generator, law)(size=(2, 30)) + generator.normal(size=30)
            errors += difference_p(first, second) <= 0.05
            low, high = difference_interval(first, second) or (0, 0)
            holds += low <= 0 <= high
        assert errors / repeats <= 0.07, law
        assert 0.93 <= holds / repeats <= 0.99, law


def test_the_interval_of_paired_shares_holds_a_difference():
    generator = np.random.default_rng(1)
    for n in (12, 40):
        holds = []
        for _ in range(1000):
            first = (generator.random(n) < 0.4).astype(float)
            # A wrong task turns right with .5, a right one wrong with .1: the share rises by .26.
            second = np.where(first == 1, generator.random(n) >= 0.1, generator.random(n) < 0.5).astype(float)
            low, high = difference_interval(first, second) or (0, 0)
            holds.append(low <= 0.6 * 0.5 - 0.4 * 0.1 <= high)
        assert 0.93 <= np.mean(holds) <= 0.98


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("compare")
    path = saved(SETTINGS["plain"], place / "adapter")
    options: dict[str, Any] = dict(limit="9", max_new_tokens=2)
    before = probe.run("tasks/tools.jsonl", model="random:tiny-llama", out=place / "before", **options)
    after = probe.run("tasks/tools.jsonl", model=str(path), out=place / "after", **options)
    return before, after


def only(frame: Any, **where: Any) -> Any:
    for column, value in where.items():
        frame = frame[frame[column].isna()] if value is None else frame[frame[column] == value]
    assert len(frame) == 1, (where, len(frame))
    return frame.iloc[0]


def test_differences_are_those_of_a_plain_loop(runs):
    before = runs[0]
    comparison: Any = probe.compare(runs)
    entry = only(comparison.differences, name="log_prob", tools="right")
    pairs = []
    for task in before:
        target = task.record["target"]
        right = target if isinstance(target, list) else [target]
        if target is not None:
            pairs.append(
                [
                    np.mean(
                        [
                            e["log_prob"]
                            for e in run[task.id].record["tool_probabilities"]
                            if e["tool"] in right
                        ]
                    )
                    for run in runs
                ]
            )
    first, second = np.array(pairs).T
    assert (entry.n, entry.unit, entry.left_out) == (len(pairs), "nats", 0)
    assert (entry.base, entry.value) == pytest.approx((first.mean(), second.mean()), abs=1e-9)
    assert entry.difference == pytest.approx((second - first).mean(), abs=1e-9)
    interval = mean_interval(second - first)
    assert (entry.low, entry.high) == pytest.approx(interval or (np.nan, np.nan), nan_ok=True)
    p = comparison.differences.p.to_numpy()
    assert comparison.differences.p_corrected.to_numpy() == pytest.approx(
        scipy.stats.false_discovery_control(p)
    )


def test_the_board_gives_each_run_its_scores_choices_and_cost(runs):
    board = probe.compare(runs).runs
    for run in runs:
        scores = [task.record["score"] for task in run]
        row = only(board, run=run.path.name, measure="score")
        assert (row.value, row.n, row.n_failed) == (pytest.approx(np.mean(scores)), len(scores), 0)
        p_right = []
        for task in run:
            target = task.record["target"]
            right = target if isinstance(target, list) else [target]
            p_right.append(
                sum(e["probability"] for e in task.record["tool_probabilities"] if e["tool"] in right)
            )
        assert only(board, run=run.path.name, measure="p_right").value == pytest.approx(np.mean(p_right))
        entropies = [
            scipy.stats.entropy([e["probability"] for e in task.record["tool_probabilities"]]) for task in run
        ]
        assert only(board, run=run.path.name, measure="entropy").value == pytest.approx(np.mean(entropies))


def test_flips_are_the_tasks_whose_score_changed_with_both_choices(runs):
    flips: Any = probe.compare(runs).flips
    changed = [task.id for task in runs[0] if task.record["score"] != runs[1][task.id].record["score"]]
    assert sorted(flips.task_id if len(flips) else []) == sorted(changed)
    for row in flips.itertuples():
        assert row.base_choice == (runs[0][row.task_id].record["chosen"] or "no_tool")
        assert row.choice == (runs[1][row.task_id].record["chosen"] or "no_tool")
        assert (row.turned == "right") == (runs[1][row.task_id].record["score"] == 1)


def test_states_part_where_the_weights_do(runs):
    layers: Any = probe.compare(runs).layers
    rows = layers[layers.name == "state_distance"]
    distances = [
        [
            float((b[layer, 0] - a[layer, 0]).double().norm() / a[layer, 0].double().norm())
            for task in runs[0]
            for a, b in [[run[task.id]["resid_post"] for run in runs]]
        ]
        for layer in range(len(rows))
    ]
    assert rows.value.tolist() == pytest.approx(np.mean(distances, 1).tolist(), rel=1e-5)
    assert (rows.n == len(runs[0])).all()


def test_a_run_against_itself_differs_nowhere(runs):
    comparison: Any = compare([runs[0], Run(runs[0].path)])
    assert (comparison.differences.difference == 0).all() and (comparison.differences.p == 1).all()
    assert (comparison.differences.left_out == 0).all() and comparison.flips.empty
    assert comparison.clear().empty
    assert comparison.runs.run.nunique() == 2, "told apart though it is one directory"
    assert (comparison.layers.difference == 0).all()


@pytest.mark.slow
def test_layers_of_another_model_are_averaged_and_not_paired(runs, tmp_path):
    other = probe.run(
        "tasks/tools.jsonl", model="random:tiny-gpt2", out=tmp_path / "gpt2", limit="9", max_new_tokens=2
    )
    comparison: Any = compare([runs[0], other])
    assert any("averaged over its layers" in note for note in comparison.notes)
    assert comparison.layers.empty
    row = only(comparison.differences, name="sink_mass")
    means = []
    for run in (runs[0], other):
        frame: Any = run.measures()
        frame = frame[(frame.task_id != "") & (frame.name == "sink_mass")]
        means.append(frame.groupby("task_id").value.mean().mean())
    assert (row.base, row.value) == pytest.approx(tuple(means))


# -- strata ------------------------------------------------------------------------------------------------------------


def test_variants_of_one_run_are_paired_and_strata_of_metadata_are_not(tmp_path):
    lines = [
        {
            "id": f"p{n}", "kind": "prompting", "input": f"Is {n} even?", "choices": [" yes", " no"], "target": [" yes", " no"][n % 2],
            "variants": [{"name": "base"}, {"name": "polite", "prefix": "Please answer. "}], "metadata": {"half": "ab"[n % 2]},
        }
        for n in range(10)
    ]  # fmt: skip
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = probe.run(file, model="random:tiny-llama", out=tmp_path / "run", max_new_tokens=1)
    variants: Any = compare([run], by="variant").strata
    scores = {
        name: np.array([task.record["passages"][name]["score"] for task in run])
        for name in ("base", "polite")
    }
    assert variants.label.tolist() == ["base", "polite"]
    assert variants.score.tolist() == pytest.approx([scores[name].mean() for name in variants.label])
    polite = only(variants, label="polite")
    assert polite.paired == 10
    assert polite.p == pytest.approx(difference_p(scores["base"], scores["polite"]))
    assert compare([run], by="variant").clear().empty
    strata: Any = compare([run], by="metadata.half").strata
    assert strata.n.tolist() == [5, 5] and only(strata, label="b").paired == 0
    for by in ("metadata.nothing", "half"):
        with pytest.raises(UsageError, match=f"no task has '{by}'"):
            compare([run], by=by)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_tables_json_and_a_file(runs, tmp_path):
    paths = [str(run.path) for run in runs]
    output = tmp_path / "change.parquet"
    result = CliRunner().invoke(main, ["compare", *paths, "--json", "-o", str(output)])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert set(document) == {"runs", "differences", "flips", "layers", "strata", "notes"}
    assert len(pd.read_parquet(output)) == len(document["differences"])
    text = CliRunner().invoke(main, ["compare", *paths, "--all"])
    assert text.exit_code == 0, text.output
    for word in (
        "tool_selection",
        "before",
        "after",
        "score",
        "differ beyond chance",
        "log_prob right",
        "states at the first",
    ):
        assert word in text.stdout
    assert CliRunner().invoke(main, ["lora", "compare", *paths, "--all"]).stdout == text.stdout


def test_what_cannot_be_compared_is_refused_in_a_sentence(runs, tmp_path):
    with pytest.raises(UsageError, match="two runs or more"):
        compare(runs[:1])
    with pytest.raises(UsageError, match="at most 20"):
        compare([runs[0]] * 21)
    bare = tmp_path / "bare"
    shutil.copytree(runs[0].path, bare)
    (bare / "measures.parquet").unlink()
    (bare / "manifest.json").unlink()
    header = json.loads((bare / "run.json").read_text())
    (bare / "run.json").write_bytes(encode_signed(header | {"status": "started"}))
    with pytest.raises(UsageError, match="probe analyze"):
        compare([Run(bare), runs[1]])
