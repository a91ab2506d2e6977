"""Heads that point at tools: against sklearn, a slow loop, planted heads and pure noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from probe.analyzers.rows import to_table
from probe.analyzers.tool import ablation, attention, heads
from probe.errors import UsageError
from probe.maths.auroc import pair_wins, pooled_auroc
from probe.maths.statistics import log_odds
from probe.runs import INTERVENTION_FIELDS, Array, Run, RunWriter
from probe.runs.views import heads as views
from probe.runs.views.attention import decision_attention
from tests.clock import references, within
from tests.made_up_runs import EMPTY_PASSAGE, put_interventions
from tests.test_analyzers import of, value_of

LAYERS, HEADS = 3, 4
CATALOGUE = [f"tool_{letter}" for letter in "abcdefgh"]


def random_task(task: int, n_tools: int, rng: np.random.Generator, **more: Any) -> dict[str, Any]:
    """A task: shown tools, target, chosen tool, tokens of each description, attention and norm by head."""
    tools = [str(name) for name in rng.permutation(CATALOGUE)[:n_tools]]
    labels = ["bos", *(f"tool:{name}" for name in tools), "user", "other"]
    mass = rng.dirichlet(np.ones(len(labels)), size=(LAYERS, HEADS)).astype(np.float32)
    return {
        "id": f"task {task}",
        "tools": tools,
        "labels": labels,
        "target": str(rng.choice(tools)),
        "chosen": str(rng.choice(tools)),
        "lengths": [1, *rng.integers(3, 20, n_tools).tolist(), 6, 4],
        "mass": mass,
        "norm": mass * 2,
    } | more


def write(path: Path, tasks: list[dict[str, Any]], model: dict[str, Any] | None = None) -> Run:
    """A run of made-up tensors, as a capture would leave it."""
    run = {"task_ids": [task["id"] for task in tasks], "kinds": ["tool_selection"], "model": model or {}}
    with RunWriter.create(path, run) as writer:
        for task in tasks:
            ends = np.cumsum(task["lengths"]).tolist()
            spans = [
                {"label": label, "start": end - length, "end": end}
                for label, length, end in zip(task["labels"], task["lengths"], ends, strict=True)
            ]
            names = [*task["tools"], None]
            probability = {name: 0.1 / (len(names) - 1) for name in names} | {task["chosen"]: 0.9}
            record = EMPTY_PASSAGE | {
                "id": task["id"], "kind": "tool_selection", "status": "ok", "seconds": 0.1,
                "target": task["target"], "chosen": task["chosen"], "chosen_tool": task["chosen"],
                "candidate_mass": 1.0, "spans": spans, "n_prompt": ends[-1],
                "tool_probabilities": [
                    {"tool": n, "probability": probability[n], "log_prob": float(np.log(probability[n])), "token_ids": [1]}
                    for n in names
                ],
            }  # fmt: skip
            row = torch.tensor([ends[-1] - 1])
            tensors = {"rows": Array(row, ("row",)), "decisions": Array(row, ("decision",))}
            reads = ("layer", "head", "row", "span")
            for name, site in (("mass", "attn_to_spans"), ("norm", "value_to_spans")):
                if name in task:
                    tensors[site] = Array(torch.tensor(task[name][:, :, None], dtype=torch.float32), reads)
            tensors |= task.get("tensors", {})
            writer.commit(record, tensors, {"labels": json.dumps(task["labels"])})
        writer.finish("done")
    return Run(path)


def noise(n: int, seed: int, n_tools: int = 4) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [random_task(number, n_tools, rng) for number in range(n)]


def plant(tasks: list[dict[str, Any]], name: str, layer: int, head: int, share: float = 0.8) -> None:
    """Let one head point at the task's `name` (`target` or `chosen`) in this share of tasks."""
    rng = np.random.default_rng(7)
    for task in tasks:
        if rng.random() < share:
            column = task["labels"].index(f"tool:{task[name]}")
            row = rng.uniform(0.05, 0.1, len(task["labels"])) * task["lengths"]
            row[column] = task["lengths"][column]
            task["mass"][layer, head] = row / row.sum()


# -- attention ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    rng = np.random.default_rng(0)
    tasks = [random_task(number, 3 if number < 4 else 2, rng) for number in range(6)]
    tasks[0]["labels"][-1] = "sink"
    tasks[0]["lengths"][-1] = 1
    run = write(tmp_path_factory.mktemp("small") / "run", tasks)
    return tasks, run, to_table(attention.measures(run)).to_pandas()


def test_the_norm_of_a_read_stands_beside_its_mass(small):
    tasks, _, frame = small
    for task in tasks:
        for slot, name in enumerate(task["tools"], 1):
            rows = of(frame, task_id=task["id"], name="attention_norm", tool=name)
            assert value_of(rows, layer=1) == pytest.approx(task["norm"][1, :, slot].mean(), rel=1e-6)
            assert value_of(rows, layer=None) == pytest.approx(task["norm"][:, :, slot].mean(), rel=1e-6)
            assert of(rows, layer=None).n.item() == LAYERS * HEADS


def test_mass_on_tools_sinks_and_elsewhere_is_all_mass(small):
    _, _, frame = small
    for _, rows in frame[frame["head"].isna() & frame["layer"].notna()].groupby(["task_id", "layer"]):
        parts = rows[rows.name.isin(["attention", "sink_mass", "attention_elsewhere"])]
        assert parts.value.sum() == pytest.approx(1, abs=1e-6)


def test_sinks_are_the_first_token_and_a_learned_sink_and_are_left_out_where_it_says_so(small):
    tasks, _, frame = small
    assert set(of(frame, task_id="task 0", name="sink_mass").span) == {"bos", "sink"}
    assert set(of(frame, task_id="task 1", name="sink_mass").span) == {"bos"}
    assert set(of(frame, task_id="task 0", name="attention_elsewhere").span) == {"user"}
    mass = tasks[0]["mass"][2]
    shares = mass[:, 1] / (1 - mass[:, 0] - mass[:, -1])
    rows = of(frame, task_id="task 0", name="attention_without_sink", tool=tasks[0]["tools"][0])
    assert value_of(rows, layer=2) == pytest.approx(shares.mean(), rel=1e-5)


def test_attention_by_shown_position_is_the_mean_rate_over_tasks_with_as_many_tools(small):
    tasks, _, frame = small
    rows = of(frame, task_id="", name="attention_by_position")
    assert rows.groupby("n_tools").size().to_dict() == {2: 2, 3: 3}
    rates = [t["mass"][:, :, 2].mean() / t["lengths"][2] for t in tasks[:4]]
    row = of(rows, n_tools=3, slot=2).iloc[0]
    assert row.value == pytest.approx(np.mean(rates), rel=1e-6)
    assert row.n == 4
    assert np.isnan(row.low) and np.isnan(row.high), "four tasks are too few for an interval"


def test_without_read_norms_there_is_no_norm_row(tmp_path):
    tasks = noise(2, 0)
    for task in tasks:
        del task["norm"]
    frame = to_table(attention.measures(write(tmp_path / "run", tasks))).to_pandas()
    assert of(frame, name="attention_norm").empty
    assert not of(frame, name="sink_mass").empty


def ranked(run: Run, *options: Any, **more: Any) -> views.Ranking:
    ranking = views.rank(run, *options, **more)
    assert ranking is not None
    return ranking


# -- ranking -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    tasks = noise(40, 2)
    plant(tasks, "target", 1, 2)
    plant(tasks, "chosen", 2, 0)
    return tasks, write(tmp_path_factory.mktemp("planted") / "run", tasks)


def slow_auroc(tasks: list[dict[str, Any]], name: str, layer: int, head: int) -> float:
    won = pairs = 0.0
    for task in tasks:
        wanted = task[name] if isinstance(task[name], list) else [task[name]]
        rates = {
            tool: task["mass"][layer, head, slot] / task["lengths"][slot]
            for slot, tool in enumerate(task["tools"], 1)
        }
        for wanted_tool in wanted:
            for other in set(task["tools"]) - set(wanted):
                won += (
                    1.0
                    if rates[wanted_tool] > rates[other]
                    else 0.5
                    if rates[wanted_tool] == rates[other]
                    else 0.0
                )
                pairs += 1
    return won / pairs


def test_the_auroc_is_that_of_a_slow_loop_over_all_pairs(planted):
    tasks, run = planted
    for target, name in (("chosen", "chosen"), ("right", "target")):
        ranking = ranked(run, target, "rate")
        slow = [[slow_auroc(tasks, name, layer, head) for head in range(HEADS)] for layer in range(LAYERS)]
        assert ranking.auroc == pytest.approx(np.array(slow), abs=1e-12)
        assert ranking.n_tasks == 40
        held = [
            interval and interval[0] <= value <= interval[1]
            for interval, value in zip(ranking.intervals, ranking.auroc.ravel(), strict=True)
        ]
        assert len(held) == LAYERS * HEADS and all(held)


def test_several_right_tools_and_ties_count_as_in_the_slow_loop(tmp_path):
    tasks = noise(12, 3, n_tools=5)
    for task in tasks[:6]:
        task["target"] = task["tools"][1:3]
    for task in tasks[3:9]:
        task["mass"][:, :, 2], task["lengths"][2] = task["mass"][:, :, 3], task["lengths"][3]
    tasks[11]["target"] = tasks[10]["target"] = None
    run = write(tmp_path / "run", tasks)
    slow = slow_auroc(tasks[:10], "target", 0, 1)
    ranking = ranked(run, "right", "rate")
    assert ranking.auroc[0, 1] == pytest.approx(slow, abs=1e-12)
    assert ranking.n_tasks == 10


def test_within_one_task_the_auroc_is_sklearns(tmp_path):
    """Eight copies of one task, whose pairs are those of a plain binary classification."""
    task = noise(1, 5, n_tools=8)[0]
    task["target"] = task["tools"][2:5]
    run = write(tmp_path / "run", [task | {"id": f"copy {n}"} for n in range(8)])
    labels = [tool in task["target"] for tool in task["tools"]]
    auroc = ranked(run, "right", "mass").auroc
    for layer in range(LAYERS):
        for head in range(HEADS):
            expected = roc_auc_score(labels, task["mass"][layer, head, 1:9])
            assert auroc[layer, head] == pytest.approx(expected, abs=1e-6)


def test_a_planted_head_is_found_and_holds_on_the_other_half(planted):
    _, run = planted
    for target, place in (("right", (1, 2)), ("chosen", (2, 0))):
        ranking = ranked(run, target)
        assert ranking.p_corrected[place] < 0.05
        assert (ranking.p_corrected < 0.05).sum() == 1
        assert ranking.best(1, 0) == ranking.best(1, 1) == [place]
        held_out = ranking.held_out(1)
        assert held_out.interval is not None
        assert 0.65 < held_out.interval[0] < held_out.value < held_out.interval[1]
        assert held_out.n == 40
        assert (ranking.p <= ranking.p_corrected).all()


@pytest.mark.parametrize("score", ["rate", "mass", "norm", "adjusted"])
def test_pure_noise_leaves_no_head_in_95_of_100_seeds(tmp_path_factory, score, monkeypatch):
    """The tasks are made once; the targets are drawn anew for every seed."""
    tasks = noise(24, 11)
    shown = views._collect(write(tmp_path_factory.mktemp("noise") / "run", tasks), "right", score)
    assert shown is not None
    scores = shown.residuals(None) if score == "adjusted" else shown.scores
    wins, hits = pair_wins(shown.n_tools, scores), 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        target = np.zeros(len(shown.task), dtype=bool)
        target[4 * np.arange(24) + rng.integers(4, size=24)] = True
        drawn = views._ListedTools(**{**vars_of(shown), "target": target})
        raw, corrected = views._permutation_test(drawn, wins, 200, seed)
        hits += bool((corrected < 0.05).any())
        assert (raw <= corrected).all()
    # 5 expected; more than 11 would have a probability of 0.4 %.
    assert hits <= 11


def vars_of(shown: Any) -> dict[str, Any]:
    return {name: getattr(shown, name) for name in views._ListedTools.__dataclass_fields__}


def test_uncorrected_p_values_would_find_heads_in_noise(tmp_path):
    count = 0
    for seed in range(5):
        ranking = ranked(write(tmp_path / str(seed), noise(24, seed)), "right")
        count += int((ranking.p < 0.05).sum())
        assert ranking.p_corrected.min() > 0.05 or seed
    assert count > 0


def test_raw_p_values_are_the_share_of_slow_permutations(planted):
    tasks, run = planted
    ranking = ranked(run, "right", "rate", draws=2000)
    rng = np.random.default_rng(99)
    observed = slow_auroc(tasks, "target", 0, 0)
    null = []
    for _ in range(400):
        shuffled = [task | {"target": str(rng.choice(task["tools"]))} for task in tasks]
        null.append(slow_auroc(shuffled, "target", 0, 0))
    slow = np.mean(np.array(null) >= observed - 1e-12)
    assert ranking.p[0, 0] == pytest.approx(slow, abs=0.08)


def test_a_head_that_reads_the_first_description_points_only_before_adjustment(tmp_path):
    tasks = noise(60, 21)
    rng = np.random.default_rng(22)
    for task in tasks:
        if rng.random() < 0.6:
            task["target"] = task["tools"][0]
        row = np.array(task["lengths"]) * rng.uniform(0.5, 1, len(task["lengths"]))
        row[1] *= 5
        task["mass"][0, 3] = row / row.sum()
    run = write(tmp_path / "run", tasks)
    assert ranked(run, "right", "rate").p_corrected[0, 3] < 0.01
    adjusted = ranked(run, "right", "adjusted")
    assert adjusted.p_corrected[0, 3] > 0.2
    assert adjusted.auroc[0, 3] == pytest.approx(0.5, abs=0.12)


def test_a_head_that_reads_long_descriptions_points_only_before_adjustment(tmp_path):
    tasks = noise(60, 23)
    rng = np.random.default_rng(24)
    for task in tasks:
        lengths = np.array(task["lengths"])
        task["target"] = task["tools"][int(lengths[1:5].argmax())]
        row = lengths * (1 + np.log(lengths)) * rng.uniform(0.9, 1.1, len(lengths))
        task["mass"][1, 1] = row / row.sum()
    run = write(tmp_path / "run", tasks)
    assert ranked(run, "right", "rate").auroc[1, 1] > 0.9
    assert ranked(run, "right", "adjusted").auroc[1, 1] < 0.65


def test_halves_depend_on_ids_alone_and_are_even_in_each_number_of_tools():
    ids = [f"id {n}" for n in range(31)]
    strata = [2 + n % 3 for n in range(31)]
    half = views.halves(ids, strata)
    order = np.random.default_rng(0).permutation(31)
    again = views.halves([ids[i] for i in order], [strata[i] for i in order])
    assert (half[order] == again).all()
    for stratum in (2, 3, 4):
        of_stratum = half[np.array(strata) == stratum]
        assert abs(of_stratum.sum() * 2 - len(of_stratum)) <= 1


def test_the_random_band_has_as_many_heads_a_layer_and_none_of_the_chosen(planted):
    ranking = ranked(planted[1], "right")
    chosen = ranking.best(3, 1)
    sets = ranking.random_band(3, draws=3, seed=4, half=1)
    assert sets == ranking.random_band(3, draws=3, seed=4, half=1)
    assert len({tuple(s) for s in sets}) == 3
    for drawn in sets:
        assert not set(drawn) & set(chosen)
        assert sorted(layer for layer, _ in drawn) == sorted(layer for layer, _ in chosen)
    whole_layer = [(0, 0), (0, 1), (0, 2)]
    free = [(0, 3), (1, 0), (1, 1), (2, 2)]
    drawn = views.same_layers(whole_layer, free, np.random.default_rng(0))
    assert len(set(drawn)) == 3
    assert (0, 3) in drawn
    with pytest.raises(UsageError, match="smaller k"):
        ranking.random_band(7)


def test_few_tasks_or_no_captured_reads_are_not_ranked(tmp_path):
    assert views.rank(write(tmp_path / "few", noise(7, 0))) is None
    tasks = noise(10, 0)
    for task in tasks:
        del task["norm"]
    run = write(tmp_path / "no-norm", tasks)
    assert views.rank(run, score="norm") is None
    assert ranked(run).n_tasks == 10
    with pytest.raises(UsageError, match="'attention' is none of"):
        ranked(run, score="attention")


def test_the_rows_of_a_ranking_say_what_it_says(planted):
    _, run = planted
    frame = to_table(heads.measures(run)).to_pandas()
    ranking = ranked(run, "right")
    rows = of(frame, role="right")
    assert value_of(rows, name="head_auroc", layer=1, head=2) == ranking.auroc[1, 2]
    assert value_of(rows, name="head_p_corrected", layer=1, head=2) == ranking.p_corrected[1, 2]
    assert value_of(rows, name="heads_found") == 1
    held = of(rows, name="head_auroc_heldout", half=None).iloc[0]
    assert held.value == ranking.held_out().value
    assert held.low < held.value < held.high
    assert len(frame) == 2 * (3 * LAYERS * HEADS + 1 + 3)


@pytest.mark.timing
def test_270_heads_on_500_tasks_are_ranked_in_seconds():
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(500), 5)
    target = np.zeros(2500, dtype=bool)
    target[5 * np.arange(500) + rng.integers(5, size=500)] = True
    shown = views._ListedTools(
        [str(n) for n in range(500)], list(range(30)), rng.random((2500, 270)), task, np.tile(np.arange(5), 500),
        rng.integers(5, 60, 2500), target, np.arange(500) % 2,
    )  # fmt: skip

    def rank():
        wins = pair_wins(shown.n_tools, shown.residuals(None))
        pooled_auroc(views._target_wins(shown, wins), shown.n_pairs)
        return views._permutation_test(shown, wins, 1000)

    assert within(6, references(rank))  # 0.7
    _, corrected = rank()
    assert (corrected > 0.05).all()


# -- ablation ----------------------------------------------------------------------------------------------------


def trial(task: dict[str, Any], experiment: str, condition: int, target_logit: float, detail: Any) -> list:
    names = [*task["tools"], None]
    logits = np.array([target_logit if name == task["target"] else 0.0 for name in names])
    logs = logits - np.logaddexp.reduce(logits)
    return [
        {
            "task_id": task["id"], "experiment": experiment, "condition": condition,
            "detail": None if detail is None else json.dumps(detail), "tool": name, "log_prob": float(value),
        }
        for name, value in zip(names, logs, strict=True)
    ]  # fmt: skip


@pytest.fixture
def ablated(tmp_path, monkeypatch):
    """20 tasks: the chosen heads take 1 nat off the target's log-odds, random set r takes r / 20."""
    tasks, rows = noise(20, 0), []
    run = write(tmp_path / "run", tasks)
    for number, task in enumerate(tasks):
        common = {"half": number % 2, "target": "right", "replace": "zero"}
        rows += trial(task, "base", 0, 0.7, None)
        rows += trial(task, "heads", 0, -0.3, common | {"set": "chosen", "heads": [[1, 2]]})
        for draw in range(10):
            logit = 0.7 - draw / 20
            detail = common | {"set": "random", "heads": [[0, draw], [number % 2, 3]]}
            rows += trial(task, "heads", 1 + draw, logit, detail)
    put_interventions(monkeypatch, pd.DataFrame(rows, columns=list(INTERVENTION_FIELDS)))
    return run, to_table(ablation.measures(run)).to_pandas()


def test_the_effect_of_chosen_heads_stands_beside_the_random_band(ablated):
    _, frame = ablated
    assert set(frame.role) == {"right"} and set(frame.replacement) == {"zero"}
    for half in (None, 0, 1):
        rows = of(frame, half=half)
        assert value_of(rows, name="head_ablation", heads="together") == pytest.approx(-1, abs=1e-9)
        assert value_of(rows, name="head_ablation", heads="random") == pytest.approx(-0.225, abs=1e-9)
        rank = of(rows, name="head_ablation_rank").iloc[0]
        assert rank.value == pytest.approx(1 / 11)
        assert rank.n == 10
        assert rank.low == 0
        net = of(rows, name="head_ablation_minus_random").iloc[0]
        assert (net.value, net.n) == (pytest.approx(-0.775, abs=1e-9), 20 if half is None else 10)
    assert of(frame, name="head_ablation", half=None, heads="together").n.item() == 20
    assert of(frame, name="head_ablation", half=1, heads="together").n.item() == 10


def test_accuracy_before_and_after_an_ablation(ablated):
    _, frame = ablated
    rows = of(frame, name="head_ablation_accuracy")
    assert value_of(rows, heads=None) == 1
    assert value_of(rows, heads="together") == 0
    assert value_of(rows, heads="random") == 1
    assert of(rows, heads="together").n.item() == 20


def test_a_chosen_set_inside_the_band_has_its_rank(tmp_path, monkeypatch):
    tasks, rows = noise(8, 0), []
    run = write(tmp_path / "run", tasks)
    for task in tasks:
        common = {"half": 0, "target": "right", "replace": "mean"}
        rows += trial(task, "base", 0, 0.0, None)
        rows += trial(task, "heads", 0, -0.5, common | {"set": "chosen", "heads": [[1, 2]]})
        for draw in range(4):
            detail = common | {"set": "random", "heads": [[0, draw]]}
            rows += trial(task, "heads", 1 + draw, -0.2 - 0.2 * draw, detail)
    put_interventions(monkeypatch, pd.DataFrame(rows, columns=list(INTERVENTION_FIELDS)))
    frame = to_table(ablation.measures(run)).to_pandas()
    assert set(frame.replacement) == {"mean"}
    assert value_of(frame, name="head_ablation_rank", half=None) == pytest.approx(3 / 5)


def test_a_run_without_interventions_has_no_ablation_rows(planted):
    assert list(ablation.measures(planted[1])) == []


def test_log_odds_are_those_of_the_targets_against_all_others():
    p = {"a": 0.2, "b": 0.3, "c": 0.1, None: 0.4}
    logs = np.log(list(p.values()))
    assert log_odds(logs, [name in ("a", "b") for name in p]) == pytest.approx(0)
    assert log_odds(logs, [name is None for name in p]) == pytest.approx(np.log(0.4 / 0.6))


def test_decision_attention_still_serves_the_report(planted):
    tasks, run = planted
    attention = decision_attention(run["task 0"])
    assert attention is not None
    assert list(attention.tools) == tasks[0]["tools"]
    assert attention.norm == pytest.approx(tasks[0]["norm"], abs=1e-6)
