"""Causes of a choice: made-up interventions whose effects are known, scipy, and plain loops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.special import logsumexp

from probe.analyzers.rows import to_table
from probe.analyzers.tool import causal, correlates
from probe.maths.intervals import RESAMPLES, wilson
from probe.maths.rank_correlation import spearman, spearman_within
from probe.maths.statistics import log_odds
from probe.runs.views.conditions import read_conditions
from tests.clock import references, sized, within
from tests.made_up_runs import PlantedRun, PlantedTask, condition, planted_task, world

NAMES = ("search", "sum", "mail", "clock")


def table(run: Any) -> Any:
    return to_table(causal.measures(run)).to_pandas()


def of(frame: Any, **where: Any) -> Any:
    for name, value in where.items():
        frame = frame[frame[name].isna() if value is None else frame[name] == value]
    return frame


def row_of(frame: Any, **where: Any) -> Any:
    rows = of(frame, **where)
    assert len(rows) == 1, (where, len(rows))
    return rows.iloc[0]


def odds(log_probs: dict, tool: str | None) -> float:
    return log_probs[tool] - float(logsumexp([value for name, value in log_probs.items() if name != tool]))


def scores(generator: Any, names: Any = NAMES) -> dict[str | None, float]:
    values = np.log(generator.dirichlet(np.ones(len(names) + 1)) * 0.7)
    return dict(zip((*names, None), values.tolist(), strict=True))


# -- log-odds ----------------------------------------------------------------------------------------------------------


def test_log_odds_are_those_of_a_plain_loop_with_absent_candidates_left_out():
    generator = np.random.default_rng(0)
    log_probs = generator.normal(scale=8, size=(50, 6))
    log_probs[generator.random(log_probs.shape) < 0.3] = np.nan
    odds = log_odds(log_probs[:, None], np.eye(log_probs.shape[1]))
    for row, row_odds in zip(log_probs, odds, strict=True):
        for place in range(6):
            others = [x for other, x in enumerate(row) if other != place and not np.isnan(x)]
            if np.isnan(row[place]) or not others:
                assert np.isnan(row_odds[place])
            else:
                assert row_odds[place] == pytest.approx(row[place] - logsumexp(others), abs=1e-12)


def test_log_odds_stay_exact_where_one_candidate_has_nearly_all_of_the_probability():
    actual = log_odds(np.array([[[0.0, -60.0, -61.0]]]), np.eye(3))
    assert actual[0, 0] == pytest.approx(-np.logaddexp(-60, -61), abs=1e-12)


# -- one task ----------------------------------------------------------------------------------------------------------


def every_experiment() -> Iterator[tuple[str, str, Any, Sequence[str], dict[str, Any]]]:
    """Experiment, subject, a key that tells its conditions apart, the tools that stay, and the other columns."""
    for tool in NAMES:
        for experiment in ("mask_all", "mask_decision", "scramble"):
            yield experiment, tool, None, NAMES, {}
        for draw in range(3):
            yield "mask_all_random", tool, draw, NAMES, {"detail": {"start": draw}}
        yield "mask_decision_random", tool, 0, NAMES, {}
        for first in (0, 2):
            yield "mask_window", tool, first, NAMES, {"layer_from": first, "layer_to": first + 1}
        for index, word in enumerate(("add", "numbers")):
            yield "word", tool, index, NAMES, {"detail": {"text": word, "index": index}}
        yield "remove", tool, None, [name for name in NAMES if name != tool], {}
    for partner in NAMES[1:]:
        yield "swap", NAMES[0], partner, NAMES, {"other": partner}


@pytest.fixture(scope="module")
def small():
    """Two tasks with every experiment on every tool, and the log-probabilities behind each."""
    generator = np.random.default_rng(1)
    tasks, rows, behind = [], [], {}
    for task_id in ("a", "b"):
        base = behind[task_id, "base"] = scores(generator)
        tasks.append(planted_task(task_id, base, target=["sum", "mail"]))
        rows += condition(task_id, "base", 0, base)
        for number, (experiment, tool, key, names, facts) in enumerate(every_experiment()):
            log_probs = behind[task_id, experiment, tool, key] = scores(generator, names)
            rows += condition(task_id, experiment, number, log_probs, subject=tool, **facts)
    return table(PlantedRun(tasks, rows)), behind


@pytest.mark.parametrize(
    ("name", "experiment"),
    [("knockout", "mask_all"), ("knockout_decision", "mask_decision"), ("scramble", "scramble")],
)
def test_an_effect_is_the_change_of_the_tools_log_odds(small, name, experiment):
    frame, behind = small
    for task_id in ("a", "b"):
        for tool in NAMES:
            expected = odds(behind[task_id, experiment, tool, None], tool) - odds(
                behind[task_id, "base"], tool
            )
            row = row_of(frame, task_id=task_id, name=name, tool=tool)
            assert row.value == pytest.approx(expected, abs=1e-12)
            assert (row.unit, row.n) == ("nats", 1)
            assert np.isnan(row.low)


def test_random_controls_are_averaged_and_taken_off(small):
    frame, behind = small
    for tool in NAMES:
        base = odds(behind["a", "base"], tool)
        draws = [odds(behind["a", "mask_all_random", tool, k], tool) - base for k in range(3)]
        row = row_of(frame, task_id="a", name="knockout_random", tool=tool)
        assert (row.value, row.n) == (pytest.approx(np.mean(draws)), 3)
        assert np.isnan(row.low), "three draws have no interval"
        net = row_of(frame, task_id="a", name="knockout_minus_random", tool=tool)
        effect = row_of(frame, task_id="a", name="knockout", tool=tool).value
        assert net.value == pytest.approx(effect - row.value) and np.isnan(net.low)
        single = row_of(frame, task_id="a", name="knockout_decision_random", tool=tool)
        assert single.n == 1
        assert np.isnan(single.low)


def test_a_part_has_its_own_effect_and_three_controls():
    generator = np.random.default_rng(5)
    rows, behind, parts = [], {}, (None, "name", "description")
    tasks = [planted_task(task_id, scores(generator), target="sum") for task_id in ("a", "b")]
    for task in tasks:
        base = {e["tool"]: e["log_prob"] for e in task.record["tool_probabilities"]}
        for number, (tool, part) in enumerate((tool, part) for tool in NAMES for part in parts):
            for control in ("", "_random"):
                experiment = ("mask_all" if part is None else "mask_part") + control
                after = scores(generator)
                rows += condition(task.id, experiment, number, after, subject=tool, part=part)
                for name in NAMES:
                    change = odds(after, name) - odds(base, name)
                    behind[task.id, tool, part, control, name] = change
    frame, run_means = table(PlantedRun(tasks, rows)), {}
    for task_id, tool, part in ((t.id, tool, part) for t in tasks for tool in NAMES for part in parts):
        effect = behind[task_id, tool, part, "", tool]
        random = behind[task_id, tool, part, "_random", tool]
        others = [behind[task_id, other, part, "", tool] for other in NAMES if other != tool]
        expected = {
            "knockout": effect,
            "knockout_random": random,
            "knockout_other": np.mean(others),
            "knockout_minus_random": effect - random,
            "knockout_minus_other": effect - np.mean(others),
        }
        for name, value in expected.items():
            row = row_of(frame, task_id=task_id, name=name, tool=tool, part=part)
            assert row.value == pytest.approx(value, abs=1e-12)
            if tool == "sum":
                run_means.setdefault((name, part), []).append(value)
        assert row_of(frame, task_id=task_id, name="knockout_other", tool=tool, part=part).n == len(others)
    for (name, part), values in run_means.items():
        row = row_of(frame, task_id="", name=name, role="right", part=part)
        assert (row.value, row.n) == (pytest.approx(np.mean(values)), 2)
    apart = row_of(frame, task_id="", name="knockout_name_minus_description", role="right")
    expected = np.subtract(run_means["knockout", "name"], run_means["knockout", "description"])
    assert apart.value == pytest.approx(expected.mean())


def test_windows_and_words_say_which_and_the_largest_word_comes_first(small):
    frame, behind = small
    for tool in NAMES:
        base = odds(behind["b", "base"], tool)
        for first in (0, 2):
            expected = odds(behind["b", "mask_window", tool, first], tool) - base
            row = row_of(frame, task_id="b", name="knockout_window", tool=tool, layer=first)
            assert row.value == pytest.approx(expected)
            assert row.layer_to == first + 1
        for index, text in enumerate(("add", "numbers")):
            row = row_of(frame, task_id="b", name="word", tool=tool, word=text, word_index=index)
            assert row.value == pytest.approx(odds(behind["b", "word", tool, index], tool) - base)
    words = of(frame, task_id="b", name="word").value.abs().tolist()
    assert words == sorted(words, reverse=True)


def test_a_removed_tool_moves_only_what_remains_and_both_numbers_are_those_of_a_loop(small):
    frame, behind = small
    for tool in NAMES:
        after = behind["a", "remove", tool, None]
        before = {name: value for name, value in behind["a", "base"].items() if name != tool}
        p, q = (
            {name: math.exp(value - float(logsumexp(list(those.values())))) for name, value in those.items()}
            for those in (before, after)
        )
        tv = sum(abs(p[name] - q[name]) for name in p) / 2
        assert row_of(frame, task_id="a", name="remove_tv", tool=tool).value == pytest.approx(tv)
        first = max(before, key=lambda name: before[name])
        expected = odds(after, first) - odds(before, first)
        assert row_of(frame, task_id="a", name="remove", tool=tool).value == pytest.approx(expected)


def test_a_choice_that_weighs_each_tool_on_its_own_is_not_moved_by_a_removal():
    base = {"search": -1.0, "sum": -2.0, None: -0.7}
    rows = condition("a", "remove", 0, {"search": -0.9, None: -0.6}, subject="sum")
    frame = table(PlantedRun([planted_task("a", base)], rows))
    assert of(frame, task_id="a").set_index("name").value.to_dict() == pytest.approx(
        {"remove": 0.0, "remove_tv": 0.0}, abs=1e-12
    )


def test_with_one_tool_nothing_remains_to_have_log_odds():
    rows = condition("a", "remove", 0, {None: -0.6}, subject="sum")
    frame = table(PlantedRun([planted_task("a", {"sum": -1.0, None: -2.0})], rows))
    assert of(frame, task_id="a").name.tolist() == ["remove_tv"]


def test_without_a_base_experiment_the_record_is_the_base():
    base = {"search": -1.0, "sum": -2.0, None: -0.7}
    after = {"search": -1.5, "sum": -1.0, None: -0.9}
    rows = condition("a", "mask_all", 0, after, subject="sum")
    frame = table(PlantedRun([planted_task("a", base)], rows))
    assert row_of(frame, task_id="a", name="knockout").value == pytest.approx(
        odds(after, "sum") - odds(base, "sum")
    )


def test_a_run_without_interventions_and_a_task_that_failed_have_no_rows():
    task = planted_task("a", {"sum": -1.0, None: -2.0})
    assert list(causal.measures(PlantedRun([task], []))) == []
    assert (
        list(causal.measures(PlantedRun([task], condition("a", "base", 0, {"sum": -1.0, None: -2.0})))) == []
    )
    task.record["status"] = "error"
    rows = condition("a", "mask_all", 0, {"sum": -1.0, None: -2.0}, subject="sum")
    assert list(causal.measures(PlantedRun([task], rows))) == []


@pytest.mark.parametrize("facts", [{"subject": "nobody"}, {"subject": None}])
def test_an_intervention_on_a_tool_that_was_not_shown_is_refused_by_name(facts):
    base = {"sum": -1.0, None: -2.0}
    with pytest.raises(ValueError, match="task 'a'.*mask_all.*not among the tools shown"):
        list(
            causal.measures(
                PlantedRun([planted_task("a", base)], condition("a", "mask_all", 0, base, **facts))
            )
        )
    rows = condition("a", "mask_all", 0, {"other": -1.0}, subject="sum")
    with pytest.raises(ValueError, match="'other' is scored.*no candidate"):
        list(causal.measures(PlantedRun([planted_task("a", base)], rows)))


# -- exchange ----------------------------------------------------------------------------------------------------------


def swapped(by_name: float, by_description: float, n_tasks: int = 60) -> Any:
    """Every pair with the most probable tool exchanged, in a world where both parts are known."""
    tasks, parts = world(n_tasks, NAMES, by_name, by_description)
    rows = []
    for number, task in enumerate(tasks):
        name, description = parts(number)
        top = int((name + description).argmax())
        for count, partner in enumerate(k for k in range(len(NAMES)) if k != top):
            moved = description.copy()
            moved[[top, partner]] = description[[partner, top]]
            after = dict(zip(NAMES, (name + moved).tolist(), strict=True)) | {None: -3.0}
            rows += condition(task.id, "swap", count, after, subject=NAMES[top], other=NAMES[partner])
    return tasks, rows


def test_a_choice_by_description_flips_with_the_exchange_and_a_choice_by_name_does_not():
    follower = table(PlantedRun(*swapped(0, 1)))
    assert of(follower, name="swap_share").value.to_numpy() == pytest.approx(1)
    assert row_of(follower, name="swap_slope").value == pytest.approx(1)
    share = row_of(follower, name="swap_follow_description", role=None)
    assert (share.value, share.n, share.unit) == (1, 180, "share of pairs")
    tasks = of(follower, name="swap").task_id.nunique()
    assert (share.low, share.high) == pytest.approx(wilson(1, tasks)), "the task is the unit"
    deaf = table(PlantedRun(*swapped(1, 0)))
    for name in ("swap", "swap_share", "swap_slope", "swap_follow_description"):
        assert of(deaf, name=name).value.to_numpy() == pytest.approx(0, abs=1e-12)


def test_the_slope_of_a_mixed_choice_is_the_least_squares_fit_within_its_interval():
    tasks, rows = swapped(1, 1, n_tasks=200)
    frame = table(PlantedRun(tasks, rows))
    slope = row_of(frame, name="swap_slope")
    x, y = [], []
    for row in of(frame, name="swap").itertuples():
        base = {e["tool"]: e["log_prob"] for e in tasks[int(row.task_id[1:])].record["tool_probabilities"]}
        x.append(-2 * (base[row.tool] - base[row.other_tool]))
        y.append(row.value)
    expected = np.linalg.lstsq(np.array(x)[:, None], np.array(y), rcond=None)[0][0]
    assert slope.value == pytest.approx(expected)
    assert slope.low < 0.5 < slope.high
    assert 0 < slope.high - slope.low < 0.2


def test_one_pair_a_task_is_the_two_most_probable_tools():
    tasks, rows = swapped(1, 1)
    frame = table(PlantedRun(tasks, rows))
    flips = []
    for task in tasks:
        base = {e["tool"]: e["log_prob"] for e in task.record["tool_probabilities"] if e["tool"] is not None}
        first, second = sorted(base, key=lambda name: -base[name])[:2]
        change = row_of(frame, task_id=task.id, name="swap", tool=first, other_tool=second).value
        flips.append((base[first] - base[second]) * (base[first] - base[second] + change) < 0)
    row = row_of(frame, name="swap_follow_description", role="first_two")
    assert (row.value, row.n) == (pytest.approx(np.mean(flips)), len(tasks))


def test_a_pair_without_a_preference_has_no_share():
    base = {"sum": -1.0, "mail": -1.001, None: -3.0}
    rows = condition("a", "swap", 0, {"sum": -1.5, "mail": -1.0, None: -3.0}, subject="sum", other="mail")
    frame = table(PlantedRun([planted_task("a", base)], rows))
    assert of(frame, task_id="a").name.tolist() == ["swap"]


# -- the run -----------------------------------------------------------------------------------------------------------


def test_means_are_over_tasks_and_by_role(small):
    frame, behind = small
    right = []
    for task_id in ("a", "b"):
        base = behind[task_id, "base"]
        chosen = max(NAMES, key=lambda name: base[name])
        rows = of(frame, task_id=task_id, name="knockout").set_index("tool").value
        right.append(rows[["sum", "mail"]].mean())
        others = rows[[name for name in NAMES if name not in ("sum", "mail", chosen)]]
        assert len(others) in (1, 2)
    row = row_of(frame, task_id="", name="knockout", role="right")
    assert (row.value, row.n) == (pytest.approx(np.mean(right)), 2)
    assert np.isnan(row.low), "two tasks have no interval"
    windows = of(frame, task_id="", name="knockout_window")
    places = set(zip(windows.role, windows.layer, windows.layer_to, strict=True))
    assert places == {(role, *window) for role in causal.ROLES for window in ((0, 1), (2, 3))}


def test_the_random_control_of_a_made_up_reader_is_nothing_and_the_net_effect_is_the_description():
    tasks, rows, sizes = [], [], []
    generator = np.random.default_rng(5)
    for number in range(40):
        base = scores(generator)
        task = planted_task(f"t{number}", base, target="sum")
        tasks.append(task)
        rows += condition(task.id, "mask_all_random", 0, base, subject="sum")
        size = float(generator.gamma(2))
        sizes.append(size)
        rows += condition(task.id, "mask_all", 0, base | {"sum": base["sum"] - size}, subject="sum")
    frame = table(PlantedRun(tasks, rows))
    assert row_of(frame, task_id="", name="knockout_random", role="right").value == pytest.approx(
        0, abs=1e-12
    )
    net = row_of(frame, task_id="", name="knockout_minus_random", role="right")
    assert net.value == pytest.approx(-np.mean(sizes))
    assert net.low < net.value < net.high < 0


# -- correlation against cause -------------------------------------------------------------------------------------------


def grouped(seed: int, n_groups: int = 25, ties: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), generator.integers(1, 5, n_groups))
    x = generator.normal(size=len(groups)) + generator.normal(size=n_groups)[groups]
    y = x + generator.normal(size=len(groups))
    return (np.round(x), np.round(y), groups) if ties else (x, y, groups)


@pytest.mark.parametrize("ties", [False, True])
def test_the_pooled_correlation_is_scipys(ties):
    x, y, groups = grouped(0, ties=ties)
    assert spearman(x, y, groups).value == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_the_interval_is_that_of_a_plain_loop_that_ranks_every_resample_anew(ties):
    x, y, groups = grouped(1, ties=ties)
    n_groups = groups.max() + 1
    drawn = np.random.default_rng(0).integers(n_groups, size=(RESAMPLES, n_groups))
    slow = []
    for resample in drawn:
        rows = np.concatenate([np.flatnonzero(groups == group) for group in resample])
        slow.append(scipy.stats.spearmanr(x[rows], y[rows]).statistic)
    assert spearman(x, y, groups).interval == pytest.approx(
        tuple(np.quantile(slow, [0.025, 0.975])), abs=1e-9
    )


def test_within_a_task_only_the_order_inside_it_counts():
    x, y, groups = grouped(2)
    expected = []
    ranks = [np.empty(len(x)), np.empty(len(x))]
    for group in np.unique(groups):
        rows = groups == group
        for values, out in zip((x, y), ranks, strict=True):
            part = scipy.stats.rankdata(values[rows])
            out[rows] = part - part.mean()
    expected = float(np.sum(ranks[0] * ranks[1]) / np.sqrt(np.sum(ranks[0] ** 2) * np.sum(ranks[1] ** 2)))
    value, (low, high) = spearman_within(x, y, groups)
    assert value == pytest.approx(expected)
    assert low < value < high
    shifted = x + 100.0 * np.random.default_rng(0).normal(size=groups.max() + 1)[groups]
    assert spearman_within(shifted, y, groups).value == pytest.approx(value)
    assert abs(spearman(shifted, y, groups).value) < value


def test_clustered_intervals_cover_where_independent_ones_would_not():
    """Four equal values a task carry the information of one: the interval is as wide as with one a task."""
    generator = np.random.default_rng(3)
    x, y = generator.normal(size=(2, 60))
    groups = np.arange(60)
    once, fourfold = spearman(x, y, groups), spearman(x.repeat(4), y.repeat(4), groups.repeat(4))
    assert fourfold.interval == pytest.approx(once.interval, abs=0.03)


def test_a_constant_has_no_correlation_and_one_task_no_interval():
    ones, line = np.ones(4), np.arange(4.0)
    assert spearman(ones, line, np.arange(4)) is None
    assert spearman_within(line, line, np.arange(4)) is None
    assert spearman(line, line, np.zeros(4, dtype=int)) == (pytest.approx(1), None)


def reading_run(n_tasks: int = 30, seed: int = 0) -> tuple[PlantedRun, list[dict[str, Any]]]:
    """A run whose knock-out follows the norm of what is read and not the attention mass."""
    generator = np.random.default_rng(seed)
    tasks, rows, truth = [], [], []
    for number in range(n_tasks):
        base = scores(generator)
        tokens = dict(zip(NAMES, generator.integers(5, 60, len(NAMES)).tolist(), strict=True))
        n_labels = len(NAMES) + 2
        mass = generator.dirichlet(np.ones(n_labels), size=(2, 3, 1)).astype(np.float32)
        norms = generator.gamma(2, size=(2, 3, 1, n_labels)).astype(np.float32)
        position = 1 + sum(tokens.values()) + 4
        tensors = {
            "attn_to_spans": torch.from_numpy(mass),
            "value_to_spans": torch.from_numpy(norms),
            "decisions": torch.tensor([position]),
            "rows": torch.tensor([position]),
        }
        task = planted_task(f"t{number}", base, "sum", tokens, tensors)
        tasks.append(task)
        for place, tool in enumerate(NAMES):
            effect = float(norms[:, :, 0, 1 + place].mean())
            truth.append(
                {"mass": float(mass[:, :, 0, 1 + place].mean()), "tokens": tokens[tool], "norm": effect}
            )
            after = base | {tool: base[tool] - effect}
            rows += condition(task.id, "mask_all", place, after, subject=tool)
            rows += condition(
                task.id, "mask_decision", place, base | {tool: base[tool] + effect}, subject=tool
            )
    return PlantedRun(tasks, rows), truth


def test_what_causes_the_choice_correlates_and_what_does_not_does_not():
    run, truth = reading_run()
    frame = table(run)
    rows = of(frame, task_id="", name="causal_spearman").set_index(["correlate", "cause"])
    assert rows.loc["attention_norm", "knockout"].value == pytest.approx(1)
    assert rows.loc["attention_norm", "knockout_decision"].value == pytest.approx(-1)
    effect = [row["norm"] for row in truth]
    for name, values in {
        "attention": [row["mass"] for row in truth],
        "description_tokens": [row["tokens"] for row in truth],
        "attention_rate": [row["mass"] / row["tokens"] for row in truth],
    }.items():
        row = rows.loc[name, "knockout"]
        assert row.value == pytest.approx(scipy.stats.spearmanr(values, effect).statistic, abs=1e-6)
        assert row.low < row.value < row.high
        assert row.n == len(truth)
    expected = {
        "attention",
        "attention_rate",
        "attention_restricted",
        "attention_without_sink",
        "attention_norm",
    }
    expected |= {"description_tokens", "shown_position", "log_prob"}
    assert set(rows.index) == {(name, cause) for name in expected for cause in correlates.CAUSES}
    within = of(frame, name="causal_spearman_within")
    assert set(zip(within.correlate, within.cause, strict=True)) == set(rows.index)
    assert frame.part.isna().all(), "a run that does not tell parts apart has no numbers of them"


def test_a_part_is_correlated_with_the_mask_of_that_part():
    """Masking a name costs what is read of the name; masking a description costs the opposite of what is read of it."""
    run, _ = reading_run(12)
    generator, rows, tasks = np.random.default_rng(3), [], []
    for task in run:
        record = task.record
        for span in record["spans"]:
            if span["label"].startswith("tool:"):
                start, end = span["start"], span["end"]
                span["parts"] = [
                    {"part": "name", "start": start, "end": start + 1},
                    {"part": "description", "start": start + 1, "end": end},
                ]
        columns = [[f"tool:{name}", part] for name in NAMES for part in ("name", "description")]
        mass = generator.dirichlet(np.ones(len(columns)), size=(2, 3, 1)).astype(np.float32)
        tasks.append(
            PlantedTask(record, task._tensors | {"attn_to_parts": torch.from_numpy(mass)}, task._labels)
        )
        tasks[-1].parts = lambda columns=columns: [tuple(column) for column in columns]
        base = {entry["tool"]: entry["log_prob"] for entry in record["tool_probabilities"]}
        for place, (label, part) in enumerate(columns):
            tool = label.removeprefix("tool:")
            cost = float(mass[:, :, 0, place].mean()) * (1 if part == "name" else -1)
            after = base | {tool: base[tool] - cost}
            rows += condition(task.id, "mask_part", place, after, subject=tool, part=part)
    frame = of(table(PlantedRun(tasks, rows)), task_id="")
    for name in ("causal_spearman", "causal_spearman_within"):
        for part, sign in (("name", 1), ("description", -1)):
            row = row_of(frame, name=name, correlate="attention", cause="knockout", part=part)
            assert (row.value, row.n) == (pytest.approx(sign, abs=0.02), 12 * len(NAMES))
    lengths = row_of(frame, name="causal_spearman", correlate="description_tokens", part="description")
    assert lengths.n == 12 * len(NAMES)


def test_attention_without_the_sink_is_the_share_of_what_the_sink_leaves():
    run, _ = reading_run(2)
    conditions = read_conditions(run, ["mask_all"])
    numbers = correlates.correlates(run, conditions)[None]
    mass = run["t0"]["attn_to_spans"][:, :, 0].double().numpy()
    for place, tool in enumerate(NAMES):
        row = numbers.loc[(0, tool)]
        assert row["attention_without_sink"] == pytest.approx(
            np.mean(mass[..., 1 + place] / (1 - mass[..., 0]))
        )
        restricted = mass[..., 1 + place] / mass[..., 1 : 1 + len(NAMES)].sum(-1)
        assert row["attention_restricted"] == pytest.approx(np.mean(restricted))
        assert row["shown_position"] == place


def test_a_run_without_captures_still_has_length_position_and_log_prob():
    generator = np.random.default_rng(0)
    tasks = [planted_task(f"t{k}", scores(generator), tokens={"sum": k + 3}) for k in range(5)]
    rows = [
        row
        for task in tasks
        for place, tool in enumerate(NAMES)
        for row in condition(task.id, "mask_all", place, scores(generator), subject=tool)
    ]
    selected = of(table(PlantedRun(tasks, rows)), name="causal_spearman")
    assert set(selected.correlate) == {"description_tokens", "shown_position", "log_prob"}
    assert set(selected.cause) == {"knockout"}


def test_a_sink_that_takes_all_but_the_last_digits_leaves_the_shares_of_the_rest_exact():
    """1 − float32(1 − 4e-8) has no digit left: dividing by it would give .503 and .168."""
    mass = np.array([1 - 4e-8, 3e-8, 1e-8], dtype=np.float32)[None, None, None]
    tensors = {
        "attn_to_spans": torch.from_numpy(mass),
        "decisions": torch.tensor([10]),
        "rows": torch.tensor([10]),
    }
    base = {"sum": -1.0, "mail": -2.0, None: -3.0}
    task = planted_task("t", base, "sum", {"sum": 4, "mail": 4}, tensors)
    task._labels = ["bos", "tool:sum", "tool:mail"]
    run = PlantedRun([task], condition("t", "mask_all", 0, base, subject="sum"))
    numbers = correlates.correlates(run, read_conditions(run, ["mask_all"]))[None]
    assert numbers.attention_without_sink.tolist() == pytest.approx([0.75, 0.25], abs=1e-6)


# -- size --------------------------------------------------------------------------------------------------------------


@pytest.mark.timing
def test_250_tasks_take_seconds():
    run, _ = reading_run(sized(250))
    rows = [run.table("interventions")]
    more = []
    generator = np.random.default_rng(0)
    for task in run:
        base = {e["tool"]: e["log_prob"] for e in task.record["tool_probabilities"]}
        for place, tool in enumerate(NAMES):
            for experiment in ("mask_all_random", "mask_decision_random", "scramble"):
                more += condition(task.id, experiment, place, base, subject=tool)
            for word in range(12):
                facts = {"subject": tool, "detail": {"text": "w", "index": word}}
                more += condition(task.id, "word", 12 * place + word, base, **facts)
        for count, (first, second) in enumerate(combinations(NAMES, 2)):
            after = dict(zip(base, generator.normal(size=len(base)).tolist(), strict=True))
            more += condition(task.id, "swap", count, after, subject=first, other=second)
    import pandas as pd

    run._rows = pd.concat([*rows, pd.DataFrame(more)], ignore_index=True)
    frames = []
    assert within(12, references(lambda: frames.append(table(run))))  # 5
    (frame,) = frames
    assert len(of(frame, name="word")) == sized(250) * 4 * 12
