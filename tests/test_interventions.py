"""Experiments on planted models, where what a change does is known by construction, and on tiny random ones."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy.special import logsumexp

import probe
from probe.analyzers import analyze
from probe.cli import main
from probe.errors import ArtifactCorrupt, RunDirectoryError, UsageError
from probe.experiments import Effort, intervene, read_by
from probe.experiments.tool import score
from probe.experiments.tool.conditions import scrambled
from probe.experiments.tool.intentions import FIRST_DRAWS
from probe.runs import Run, verify
from tests.planted import copier, first_slot, intender, name_follower, slow_scores

MASKED = ("mask_all", "mask_decision", "mask_part", "mask_part_random", "swap")


def planted_run(tmp_path_factory, build, n_tasks: int, *experiments: str):
    path = tmp_path_factory.mktemp(build.__name__)
    planted = build(path / "model")
    tasks = planted.write(path / "tasks.jsonl")
    run = probe.run(tasks, model=str(planted.path), out=path / "run", analyze=False, limit=n_tasks)
    intervene(run, ["base", *experiments])
    analyze(run)
    return planted, Run(run.path)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    return planted_run(tmp_path_factory, copier, 24, *MASKED, "mask_window", "order", "heads")


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    return planted_run(tmp_path_factory, name_follower, 16, *MASKED, "scramble")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return planted_run(tmp_path_factory, first_slot, 12, "order")


def measure(run: Run, name: str, **where) -> pd.DataFrame:
    frame = run.measures()
    frame = frame[(frame.analyzer == "tool") & (frame.name == name)]
    for column, value in where.items():
        frame = frame[frame[column].isna() if value is None else frame[column] == value]
    return frame


def change(run: Run, experiment: str) -> pd.DataFrame:
    """Change in the log-odds of the subject, by condition, straight from the table."""
    frame = run.table("interventions")

    def odds(rows: pd.DataFrame, tool: str) -> float:
        part = rows.tool == tool
        return float(rows.log_prob[part].iloc[0] - logsumexp(rows.log_prob[~part.fillna(False)]))

    base = dict(list(frame[frame.experiment == "base"].groupby("task_id")))
    collected = []
    for (task_id, _), rows in frame[frame.experiment == experiment].groupby(["task_id", "condition"]):
        tool = rows.subject.iloc[0]
        collected.append((task_id, tool, odds(rows, tool) - odds(base[task_id], tool)))
    return pd.DataFrame(collected, columns=["task_id", "tool", "change"])


def test_the_unchanged_prompt_scores_as_recorded(copied, named, first):
    for _, run in (copied, named, first):
        base = run.table("interventions").query("experiment == 'base'")
        for task in run:
            part = base[base.task_id == task.id]
            expected = [entry["log_prob"] for entry in task.record["tool_probabilities"]]
            assert part.log_prob.tolist() == pytest.approx(expected, abs=1e-4)


def test_masking_the_description_that_is_read_breaks_the_choice_and_a_random_span_does_not(copied):
    _, run = copied
    right = {task.id: task.record["target"] for task in run}
    for experiment in ("mask_all", "mask_decision"):
        actual = change(run, experiment)
        is_right = actual.tool == actual.task_id.map(right)
        assert (actual.change[is_right] < -4).all()
        assert (actual.change[~is_right].abs() < 1e-3).all()
    chosen = measure(run, "knockout", task_id="", role="right", part=None)
    assert chosen.value.iloc[0] < -4 and chosen.high.iloc[0] < -4


def test_the_part_that_a_model_reads_is_the_part_whose_mask_costs(copied, named):
    for (_, run), read in ((copied, "description"), (named, "name")):
        for name in ("knockout", "knockout_minus_random", "knockout_minus_other"):
            effect = measure(run, name, task_id="", role="right", part=read).iloc[0]
            assert effect.value < -4 and effect.high < -4, (read, name)
    # The copier chooses by description and still has to copy the name: only the follower of names is told by it.
    for (_, run), part, least in ((copied, "name", -4), (named, "description", 0), (copied, "parameters", 0)):
        effect = measure(run, "knockout", task_id="", role="right", part=part).iloc[0]
        assert effect.value < least if least else abs(effect.value) < 1e-3, part


def test_exchanging_descriptions_flips_a_reader_of_descriptions_and_not_of_names(copied, named):
    slope = measure(copied[1], "swap_slope", task_id="").iloc[0]
    assert slope.value == pytest.approx(1, abs=0.02)
    slope = measure(named[1], "swap_slope", task_id="").iloc[0]
    assert slope.value == pytest.approx(0, abs=0.02)
    scrambles = change(named[1], "scramble")
    right = {task.id: task.record["target"] for task in named[1]}
    is_right = scrambles.tool == scrambles.task_id.map(right)
    assert (scrambles.change[is_right] < -4).all(), "without its name nothing points at the tool"


def test_a_choice_by_place_has_the_largest_position_bias_and_no_tool_bias(first, copied):
    _, run = first
    for task in run:
        n_tools = len(task.record["tools"])
        bias = measure(run, "position_bias", task_id=task.id, variant=None)
        spread = measure(run, "probability_orders", task_id=task.id)
        spread = spread[spread.tool.notna()]
        assert np.ptp(spread.value) < 1e-3, "each tool is first as often as the others"
        assert bias.empty or bias.value.iloc[0] == pytest.approx(1 - 1 / n_tools, abs=0.02)
    orders = copied[1].table("interventions").query("experiment == 'order'")
    for (_, tool), rows in orders.groupby(["task_id", orders.tool.fillna("")]):
        assert np.ptp(rows.log_prob) < 1e-3, f"the copier knows no order: {tool}"


def test_ablation_finds_the_real_head_and_clears_the_decoy(copied):
    planted, run = copied
    for target in ("chosen", "right"):
        alone = measure(run, "head_ablation", heads="alone", role=target)
        by_head = {(int(row.layer), int(row.head)): row for row in alone.itertuples()}
        assert planted.real_head in by_head and planted.decoys[0] in by_head, (
            "attention cannot tell them apart"
        )
        assert by_head[planted.real_head].high < -4
        assert abs(by_head[planted.decoys[0]].value) < 1e-3
    auroc = measure(run, "head_auroc", role="right")
    heads = {(int(row.layer), int(row.head)): row.value for row in auroc.itertuples()}
    assert heads[planted.real_head] == heads[planted.decoys[0]] == 1


def test_only_the_window_of_the_reading_layer_matters(copied):
    planted, run = copied
    frame = run.table("interventions")
    right = {task.id: task.record["target"] for task in run}
    base = frame[frame.experiment == "base"].set_index(["task_id", "tool"]).log_prob
    windows = frame[frame.experiment == "mask_window"]
    assert sorted(set(zip(windows.layer_from, windows.layer_to, strict=True))) == [(0, 0), (1, 1)]
    for row in windows[windows.tool == windows.task_id.map(right)].itertuples():
        if row.subject == row.tool:
            moved = row.log_prob - base[row.task_id, row.tool]
            assert (moved < -3) == (row.layer_from == planted.real_head[0])


def test_stated_intentions_sum_to_the_probability_of_the_action(tmp_path):
    world = intender(tmp_path / "model")
    lines = [task | {"intentions": list(world.intentions)} for task in world.tasks[:12]]
    assert len({task["metadata"]["state"] for task in lines}) == len(world.intention_given_state)
    (tmp_path / "listed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = probe.run(tmp_path / "listed.jsonl", model=str(world.path), out=tmp_path / "listed", analyze=False)
    intervene(run, ["base", "intention"])
    analyze(run)
    exact = {task["id"]: world.marginal(task["metadata"]["state"]) for task in lines}
    rows = measure(Run(run.path), "p_action_given_state", intentions="enumerated")
    assert len(rows)
    for row in rows.itertuples():
        expected = exact[row.task_id]
        name = row.tool if isinstance(row.tool, str) else None
        if name in expected:
            assert row.value == pytest.approx(expected[name], abs=1e-3)
    mass = measure(Run(run.path), "intention_mass")
    assert (mass.value > 0.99).all()


def test_drawn_intentions_agree_with_the_sum_over_all(tmp_path):
    world = intender(tmp_path / "model")
    tasks = world.write(tmp_path / "tasks.jsonl")
    run = probe.run(tasks, model=str(world.path), out=tmp_path / "run", analyze=False, limit=12)
    intervene(run, ["base", "intention"], effort=Effort(draws=40))
    analyze(run)
    exact = {task["id"]: world.marginal(task["metadata"]["state"]) for task in world.tasks}
    details = [json.loads(detail) for detail in run.table("interventions").detail.dropna()]
    kinds = Counter(detail["kind"] for detail in details)
    candidates = len(next(iter(exact.values())))
    assert kinds["drawn"] == 40 * len(run) * candidates
    assert kinds["random"] == kinds["other_task"] == FIRST_DRAWS * len(run) * candidates
    assert {detail["text"] for detail in details if detail["kind"] != "random"} == {*world.intentions}
    rows = measure(Run(run.path), "p_action_given_state", intentions="drawn")
    inside = []
    for row in rows.itertuples():
        name = row.tool if isinstance(row.tool, str) else None
        if name in exact[row.task_id]:
            inside.append(row.low - 0.05 <= exact[row.task_id][name] <= row.high + 0.05)
    assert len(inside) >= 3 and np.mean(inside) >= 0.8


def test_every_mask_equals_a_slow_forward(named):
    planted, run = named
    model = probe.load(str(planted.path))
    frame = run.table("interventions")
    task = run[run.task_ids[0]]
    spans = {span["label"]: span for span in task.record["spans"]}
    ids = task.record["token_ids"][: task.record["n_prompt"]]
    candidates = [entry["token_ids"] for entry in task.record["tool_probabilities"]]
    for experiment, rows_from in (("mask_all", None), ("mask_decision", len(ids) - 1)):
        rows = frame[(frame.task_id == task.id) & (frame.experiment == experiment)]
        for _, part in rows.groupby("condition"):
            span = spans[f"tool:{part.subject.iloc[0]}"]
            masked = [range(span["start"], span["end"])]
            start = span["end"] if rows_from is None else rows_from
            expected = slow_scores(model.hf, ids, candidates, masked=masked, rows_from=start)
            assert part.log_prob.tolist() == pytest.approx(expected, abs=1e-4)


def test_every_mask_of_a_part_equals_a_slow_forward_with_the_characters_of_that_part_masked(
    tiny_run, tmp_path
):
    """Each position of the tiny tokenizer is a byte, so that a part is found in the prompt without probe."""
    run = fresh(tiny_run, tmp_path)
    intervene(run, ["mask_part", "mask_part_random"])
    model, task = probe.load("random:tiny-llama"), run["t1"]
    rows = run.table("interventions").query("task_id == 't1'")
    ids = task.record["token_ids"][: task.record["n_prompt"]]
    tokens = [token if len(token) == 1 else "?" for token in model.tokenizer.convert_ids_to_tokens(ids[1:])]
    shown = "".join(tokens).replace("Ġ", " ").replace("Ċ", "\n")
    candidates = [entry["token_ids"] for entry in task.record["tool_probabilities"]]
    seen = set()
    for (experiment, _), part in rows.groupby(["experiment", "condition"]):
        row = part.iloc[0]
        texts = {
            "name": row.subject,
            "description": f"Use it for {row.subject} and the like.",
            "parameters": "{}",
        }
        entry = shown.index(f'{{"name": "{row.subject}"')
        first = 1 + shown.index(
            texts[row.part], entry + len('{"name": ' if row.part == "name" else '{"name": "alpha')
        )
        keys = range(first, first + len(texts[row.part]))
        assert row.n_tokens == len(keys)
        if experiment == "mask_part_random":
            first = json.loads(row.detail)["start"]
            end = 1 + shown.index("}\n", entry) + 1
            assert first + len(keys) <= 1 + entry or first >= end, (
                "a control shares nothing with the definition"
            )
            keys = range(first, first + len(keys))
        seen.add((experiment, row.subject, row.part))
        expected = slow_scores(model.hf, ids, candidates, masked=[keys], rows_from=keys.stop)
        assert part.log_prob.tolist() == pytest.approx(expected, abs=1e-5)
    assert {key[1:] for key in seen if key[0] == "mask_part"} == set(
        itertools.product(("alpha", "beta", "gamma"), ("name", "description", "parameters"))
    )
    assert {key[2] for key in seen if key[0] == "mask_part_random"} == {"name", "description", "parameters"}


def test_a_batch_takes_no_more_bytes_than_it_may_with_its_prefixes(monkeypatch):
    facts = SimpleNamespace(n_layers=2, n_kv_heads=1, d_head=4, d_value=4)
    model: Any = SimpleNamespace(facts=facts, dtype=SimpleNamespace(itemsize=4))
    position, most = 2 * 2 * 1 * 4 * 4, 400
    monkeypatch.setattr(score, "_BYTES", most * position)
    draw = random.Random(0)
    jobs: Any = []
    for _ in range(60):
        ids = [draw.randrange(3) for _ in range(draw.randrange(20, 120))]
        ends = tuple(sorted({draw.randrange(1, 6) for _ in range(2)}))
        jobs.append(SimpleNamespace(prompt=SimpleNamespace(token_ids=ids), prefix_ends=ends))
    split = list(score.batches(model, jobs, range(60)))
    assert [index for batch in split for index in batch] == list(range(60)) and len(split) > 5
    earlier: set[tuple[int, ...]] = set()
    for batch, following in itertools.zip_longest(split, split[1:], fillvalue=[]):
        new = {tuple(jobs[i].prompt.token_ids[:end]) for i in batch for end in jobs[i].prefix_ends} - earlier
        longest = max(len(jobs[i].prompt.token_ids) for i in batch)
        assert len(batch) == 1 or (len(batch) + len(new)) * longest <= most
        if following:
            ids = jobs[following[0]].prompt.token_ids
            more = new | {tuple(ids[:end]) for end in jobs[following[0]].prefix_ends} - earlier
            assert (len(batch) + 1 + len(more)) * max(longest, len(ids)) > most, "one more had fitted"
        earlier |= new


# -- the table, the command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tools = [
        {"name": name, "description": f"Use it for {name} and the like.", "parameters": {}}
        for name in ("alpha", "beta", "gamma", "delta", "epsilon")
    ]
    lines = [
        {"id": f"t{n}", "kind": "tool_selection", "input": f"Do {n}.", "tools": tools[:k], "target": "alpha"}
        for n, k in enumerate((2, 3, 5, 1))
    ]
    (path / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return probe.run(path / "tasks.jsonl", model="random:tiny-llama", out=path / "run", max_new_tokens=4)


def fresh(run: Run, tmp_path) -> Run:
    return Run(shutil.copytree(run.path, tmp_path / "run"))


@pytest.mark.slow
def test_the_command_makes_the_experiments_and_their_measures(tiny_run, tmp_path):
    run = fresh(tiny_run, tmp_path)
    done = CliRunner().invoke(main, ["analyze", str(run.path)], catch_exceptions=False)
    assert done.exit_code == 0
    actual = set(Run(run.path).table("interventions").experiment)
    scored = {name for name, entry in read_by("tool").items() if entry.loop == "tool"}
    assert actual == scored - {"word", "heads"}, "four tasks are too few to rank heads"
    names = set(Run(run.path).measures().name)
    # What a model with random weights draws is no language: no P(action | state) is made of it.
    assert {"knockout", "swap", "probability_orders", "intention_degenerate", "scramble", "remove"} <= names
    assert not verify(run.path).problems
    again = CliRunner().invoke(main, ["analyze", str(run.path)], catch_exceptions=False)
    assert "loading" not in again.stderr, "what was made is not made again"


def test_words_are_masked_where_they_are_asked_for(tiny_run, tmp_path):
    run = fresh(tiny_run, tmp_path)
    intervene(run, ["base", "word"])
    words = run.table("interventions").query("experiment == 'word' and task_id == 't0'")
    texts = {json.loads(detail)["text"] for detail in words.detail}
    assert {"Use", "it", "for", "and", "the"} <= texts


def test_orders_are_all_up_to_four_tools_and_distinct_draws_beyond(tiny_run, tmp_path):
    run = fresh(tiny_run, tmp_path)
    intervene(run, ["order"], effort=Effort(orders=5))
    frame = run.table("interventions")
    orders = {task: {json.loads(d)[0:] and d for d in rows.detail} for task, rows in frame.groupby("task_id")}
    names = ["alpha", "beta", "gamma"]
    assert {tuple(json.loads(d)) for d in orders["t1"]} == set(itertools.permutations(names))
    assert len(orders["t2"]) == 5 and len(orders["t3"]) == 1


@pytest.mark.slow
def test_what_has_no_condition_in_a_task_is_not_made_again(tiny_run, tmp_path, monkeypatch):
    run = fresh(tiny_run, tmp_path)
    assert intervene(run, ["base"]) == ["base"]
    assert intervene(run)[:2] == ["order", "content_free"]  # base is there
    rows = run.table("interventions")
    assert "swap" not in set(rows[rows.task_id == "t3"].experiment)  # one tool
    monkeypatch.setattr("probe.experiments.loaded_run.load_model", None)
    assert intervene(run) == []


@pytest.mark.slow
def test_a_result_does_not_depend_on_what_else_is_made(tiny_run, tmp_path):
    both = fresh(tiny_run, tmp_path)
    intervene(both, ["mask_all", "scramble", "mask_all_random", "order"])
    alone = Run(shutil.copytree(tiny_run.path, tmp_path / "alone"))
    intervene(alone, ["scramble"])
    intervene(alone, ["mask_all_random"])
    first, other = (
        run.table("interventions").query("experiment in ('scramble', 'mask_all_random')")
        for run in (both, alone)
    )
    keys = ["experiment", "task_id", "condition", "tool", "detail"]
    first, other = (frame.sort_values(keys).reset_index(drop=True) for frame in (first, other))
    assert first[keys].equals(other[keys])
    assert first.log_prob.tolist() == pytest.approx(other.log_prob.tolist(), abs=1e-4)


def test_a_changed_task_file_or_an_unknown_experiment_is_refused(tiny_run, tmp_path):
    with pytest.raises(UsageError, match="scramble"):
        intervene(tiny_run, ["scramled"])
    run = fresh(tiny_run, tmp_path)
    path = tmp_path / "tasks.jsonl"
    original = tiny_run.run["task_file"]["path"]
    text = Path(original).read_text()
    path.write_text(text.replace("Do 1", "Do 7"))
    (run.path / "task_file.jsonl").write_text(path.read_text())
    with pytest.raises(ArtifactCorrupt, match="task_file.jsonl: altered"):
        intervene(run, ["order"])
    # A run of an earlier version keeps no copy.
    del run.run["inputs"]
    run.run["task_file"] = run.run["task_file"] | {"path": str(path)}
    with pytest.raises(RunDirectoryError, match="changed"):
        intervene(run, ["order"])


def test_a_scrambled_name_is_another_word_of_the_same_letters():
    for name in ("weather_now", "ab", "a", "aaa", "math.sum"):
        new = scrambled(name, random.Random(0), {name})
        assert new != name
        if len(set(name)) > 2:
            assert sorted(new) == sorted(name)
            assert [c for c in new if not c.isalnum()] == [c for c in name if not c.isalnum()]
