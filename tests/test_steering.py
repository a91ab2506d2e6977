"""Steering: against plain hooks on transformers, a planted model with a closed form, and slow loops over the table."""

from __future__ import annotations

import math
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

import probe
from probe.analyzers.foresight import measures as foresight
from probe.analyzers.rows import to_table
from probe.analyzers.tool.steering import claims, measures
from probe.errors import UsageError
from probe.experiments import Effort, intervene, predict
from probe.experiments.tool.directions import TEXTS, Directions, Named, UnrelatedText
from probe.experiments.tool.steering import best_settings
from probe.maths.intervals import share_interval
from probe.maths.ridge import ridge_weights
from probe.model.edits import StateEdit
from probe.prompts import Codec, prompt_of
from probe.report.data import collect
from probe.runs import Run
from probe.runs.records import ToolRecord
from tests.conftest import stopped_after, tiny
from tests.planted import SLOT, first_slot
from tests.planted_tasks import NAMES
from tests.test_steering_edits import plain

GAIN = 12.0
FIRST = NAMES[:4]
"""Tools that are shown first: few, so that each is named often."""
WEAK, STRONG = 1e-4, 4e-4
"""Doses: the state is about 14,142 long, so these vectors are 1.4 and 5.7 long."""


def steered(run: Run) -> Any:
    return run.table("steering")


@pytest.fixture(scope="module")
def planted(tmp_path_factory, two_calls):
    """A model that chooses the tool shown first: behind layer 0 nothing says which that is, behind layer 1 all does."""
    path = tmp_path_factory.mktemp("steered")
    plant = first_slot(path / "model", gain=GAIN)
    plant = replace(plant, tasks=tuple(t for t in plant.tasks if t["tools"][0]["name"] in FIRST))
    run = probe.run(
        plant.write(path / "tasks.jsonl"),
        model=str(plant.path),
        out=path / "run",
        analyze=False,
        max_new_tokens=4,
    )
    effort = Effort(steer_layers=(0, 1), doses=(WEAK, STRONG), most_kl=1e9)
    with stopped_after(2) as two_calls.scored, pytest.raises(KeyboardInterrupt):
        intervene(run, ["steering"], effort=effort)
    two_calls.first = steered(Run(run.path))
    with stopped_after(None) as two_calls.scored_then:
        assert intervene(Run(run.path), ["steering"], effort=effort) == ["steering"]
    return plant, Run(run.path)


def switch(table: Any, direction: str, layer: int, dose: float) -> np.ndarray:
    """Of the pairs towards a tool: "no tool" has no row of its own in this model."""
    rows = table[(table.part == "switch") & (table.direction == direction) & table.other.notna()]
    return rows[(rows.layer == layer) & (rows.dose == dose)]["value"].to_numpy()


def test_the_unembedding_row_alone_switches_as_its_closed_form_says(planted):
    """It adds |W| d to its own logit and d · SLOT² / 2|W| to every name's, in every layer; the chosen name is GAIN ahead."""
    plant, run = planted
    table = steered(run)
    rows = table[(table.part == "switch") & (table.direction == "unembedding") & table.other.notna()]
    assert len(rows[rows.role == "drawn"]) > len(plant.tasks)
    length = math.sqrt((SLOT**2 + GAIN**2) / 2)
    states = {task.id: task["resid_post"][:, 0].double() for task in run}
    for layer in (0, 1):
        train = set(table[(table.part == "switch") & (table.half == 0)].task_id)
        mean = float(torch.stack([states[i][layer].norm() for i in train]).mean())
        for dose in (WEAK, STRONG):
            d = dose * mean
            others = d * SLOT**2 / (2 * length)
            names = len(plant.names) + 2
            logits = [SLOT + d * length, SLOT + others + GAIN] + [SLOT + others] * (names - 2)
            total = np.logaddexp.reduce([*logits, math.log(plant.d_vocab - names)])
            scored = rows[(rows.layer == layer) & (rows.dose == dose)]
            assert scored.log_prob.to_numpy() == pytest.approx(logits[0] - total, abs=1e-3)
            assert set(scored["value"]) == {float(logits[0] > logits[1])} == {float(dose == STRONG)}


def test_the_mean_difference_carries_nothing_before_the_choice_is_written_and_all_behind(planted):
    table = steered(planted[1])
    assert len(switch(table, "mean_difference", 0, STRONG)) > 8
    assert not switch(table, "mean_difference", 0, STRONG).any()
    assert switch(table, "mean_difference", 1, STRONG).all()
    for layer in (0, 1):
        assert not switch(table, "random", layer, STRONG).any()


def test_the_setting_is_chosen_on_one_half_and_tested_on_the_other(planted):
    rows = to_table(measures(planted[1])).to_pandas()
    chosen = rows[rows.name == "steer_setting"].set_index("direction")
    assert chosen.loc["mean_difference", "layer"] == 1 and chosen.loc["mean_difference", "value"] == 1
    turned = rows[(rows.name == "steer_turned") & (rows.role == "drawn")].set_index("direction")["value"]
    assert turned["unembedding"] > 0.8 and turned["random"] == 0
    beyond = rows[(rows.name == "steer_turned_minus_random") & (rows.role == "drawn")].set_index("direction")
    assert (
        beyond.loc["unembedding", "value"] == turned["unembedding"] and beyond.loc["unembedding", "low"] > 0.4
    )
    assert chosen.loc["unembedding", "n"] + beyond.loc["unembedding", "n"] == len(planted[0].tasks)


def test_no_setting_is_chosen_beyond_the_price(planted):
    rows = [row for row in steered(planted[1]).to_dict("records") if row["part"] in ("switch", "kl")]
    assert {"unembedding", "mean_difference", "random"} <= best_settings(rows, 1e9).keys()
    assert best_settings(rows, 0.0) == {}


def test_measures_are_slow_loops_over_the_table(planted):
    table = steered(planted[1]).to_dict("records")
    rows = to_table(measures(planted[1])).to_pylist()
    grid = [row for row in rows if row["name"] == "steer_switch_rate"]
    assert grid
    for row in grid:
        hits = []
        for entry in table:
            place = ("role", "direction", "layer", "dose")
            if entry["part"] == "switch" and entry["half"] == 1 and all(entry[k] == row[k] for k in place):
                hits.append(entry["value"])
        assert row["value"] == pytest.approx(sum(hits) / len(hits)) and row["n"] == len(hits)
        assert (row["low"], row["high"]) == pytest.approx(share_interval(hits))
    calls = [row for row in rows if row["name"] == "steer_valid_call" and row["direction"] == "unembedding"]
    assert calls
    for row in calls:
        of_role = [e for e in table if e["part"] == "call" and e["role"] == row["role"]]
        valid = [e["value"] for e in of_role if e["direction"] == "unembedding"]
        assert row["value"] == pytest.approx(sum(valid) / len(valid)) and row["n"] == len(valid)


def test_a_stopped_grid_keeps_its_tasks_and_the_next_call_makes_the_rest(planted, two_calls):
    plant, run = planted
    assert {*two_calls.first.task_id} == {*two_calls.scored} and set(two_calls.first.part) == {"switch"}
    table = steered(run)
    grid = table[table.part == "switch"]
    tested = {*table[table.part == "elsewhere"].task_id}
    assert {*grid.task_id} == {task["id"] for task in plant.tasks} > {*two_calls.scored} and tested
    assert not grid.duplicated(["task_id", "role", "direction", "layer", "dose"]).any()
    n_elsewhere = len(table[table.part == "elsewhere"])
    assert len(two_calls.scored) + len(two_calls.scored_then) == len(grid) + n_elsewhere
    with pytest.raises(KeyboardInterrupt), stopped_after(0):  # whole: named, it is made again
        intervene(run, ["steering"], effort=Effort(steer_layers=(0, 1), doses=(WEAK, STRONG), most_kl=1e9))
    assert len(steered(Run(run.path))) == len(table)


def test_published_figures_stand_beside_the_runs_own_and_nulls_are_said(planted):
    run = planted[1]
    run.write_table("measures", to_table(measures(run)))
    sentences = claims(Run(run.path))
    assert len(sentences) == 4 and all("published" in sentence for sentence in sentences)
    assert "here 0.00" in sentences[1] and ", never" in sentences[1]
    assert "here not measured (error_ratio)" in sentences[3]


def test_the_worked_example_tells_a_wrong_choice_that_was_turned(planted):
    run = planted[1]
    run.write_table("measures", to_table([*measures(run), *foresight(run)]))
    path = Path(__file__).parent.parent / "examples" / "turn_a_choice.py"
    lines = runpy.run_path(str(path))["story"](Run(run.path))
    wrong = {
        task.id: record.right[0]
        for task in run
        if (record := task.typed(ToolRecord)).decision.chosen not in record.right
    }
    _, task_id, _, _, asked, *_ = lines[0].replace(",", "").replace("wrong tool:", "wrong").split()
    assert wrong[task_id] == asked
    assert "AUROC" in lines[1] and "share of tasks" in lines[3] and "0.00 share" in lines[3]
    assert not any("not measured" in line for line in lines)


def test_the_report_has_the_grid_that_the_slider_shows(planted):
    run = planted[1]
    run.write_table("measures", to_table(measures(run)))
    card = collect(Run(run.path))["cards"]["steering"]
    assert card["doses"] == [WEAK, STRONG] and card["layers"] == [0, 1]
    cells = {(c["role"], c["direction"], c["layer"], c["dose"]): c for c in card["grid"]}
    turned = [cells["drawn", "unembedding", 1, dose]["steer_switch_rate"]["value"] for dose in card["doses"]]
    assert turned[0] == 0 and turned[1] > 0.8
    assert all(cell["steer_kl"]["n"] > 0 for cell in card["grid"])
    settings = {entry["direction"]: entry for entry in card["settings"]}
    assert settings["mean_difference"]["steer_turned_random"]["drawn"]["value"] == 0


# -- plain hooks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2"])
def test_scores_under_a_vector_are_those_of_plain_hooks(name, tmp_path):
    model = tiny(name)
    tools = [{"name": n, "description": f"Does {n}."} for n in ("mailer", "mail_box", "calc")]
    lines = [
        {"id": f"t{n}", "kind": "tool_selection", "input": f"Please {n}", "tools": tools, "target": "calc"}
        for n in range(4)
    ]
    run = probe.run(lines, model=model, out=tmp_path / "run", analyze=False, max_new_tokens=2)
    intervene(run, ["steering"], model=model, effort=Effort(doses=(0.5,), steer_layers=(1,)))
    table = steered(Run(run.path))
    rows = table[table.part == "switch"].replace({np.nan: None}).to_dict("records")
    assert {row["direction"] for row in rows} >= {"unembedding", "random"}
    records = {task.id: task.typed(ToolRecord) for task in run}
    head = model.hf.get_output_embeddings().weight
    train = {row["task_id"] for row in rows if row["half"] == 0}
    length = np.mean([float(run[task_id]["resid_post"][1, 0].float().norm()) for task_id in train])
    shared = []
    for row in rows:
        if row["direction"] != "unembedding":
            continue
        record = records[row["task_id"]]
        names = {
            entry.tool: entry.token_ids for entry in record.decision.tool_probabilities if entry.token_ids
        }
        mine, other = names[row["tool"]], names[row["other"]]
        place = next(k for k in range(len(other)) if mine[k] != other[k])
        shared.append(place)
        at = record.passage.n_prompt - 1 + place
        unit = head[other[place]].double() / head[other[place]].double().norm()
        edit = StateEdit("resid_post", row["layer"], (unit * length).float(), start=at, end=at + 1, dose=0.5)
        scores = {}
        for tool, ids in names.items():
            prompt = record.passage.token_ids[: record.passage.n_prompt]
            law = plain(model, name, [*prompt, *ids[:-1]], [edit])[len(prompt) - 1 :]
            opener = record.decision.opener_log_prob if record.no_tool == "complement" else 0.0
            scores[tool] = float(law[range(len(ids)), list(ids)].sum()) + (opener or 0.0)
        assert row["log_prob"] == pytest.approx(scores[row["other"]], rel=1e-5, abs=2e-5)
        assert row["value"] == float(max(scores, key=scores.__getitem__) == row["other"])
    assert shared


def test_the_price_on_unrelated_text_is_that_of_plain_hooks(tiny_model):
    codec = Codec(tiny_model.tokenizer, tiny_model.facts.n_ctx)
    layers = [0, tiny_model.facts.n_layers - 1]
    texts = UnrelatedText(tiny_model, codec, layers)
    vectors = np.random.default_rng(0).standard_normal((3, tiny_model.facts.d_model)).astype(np.float32)
    name = tiny_model.source.name.removeprefix("random:")
    for layer in layers:
        scored = texts.divergence(layer, vectors)
        for vector, value in zip(vectors[:1], scored[:1], strict=True):
            kl = []
            for text in TEXTS:
                ids = prompt_of(text, codec, 1).token_ids
                edit = StateEdit("resid_post", layer, torch.from_numpy(vector), start=len(ids) - 1)
                p, q = (plain(tiny_model, name, ids, edits)[-1] for edits in ((), (edit,)))
                kl.append(float((p.exp() * (p - q)).sum()))
            assert value == pytest.approx(np.mean(kl), rel=1e-4, abs=1e-6)


# -- directions ----------------------------------------------------------------------------------------------------


def directions_of(names: str, half: int = 0) -> tuple[Directions, list[Named]]:
    rng = np.random.default_rng(1)
    named = [
        Named(f"t{n}", name, half, rng.standard_normal((1, 6)).astype(np.float32))
        for n, name in enumerate(names)
    ]
    model = SimpleNamespace(facts=SimpleNamespace(d_model=6))
    return Directions(model, [4], named, 0), named  # pyright: ignore[reportArgumentType]


def test_a_mean_difference_leaves_the_steered_task_out():
    directions, named = directions_of("aaabbbc")
    for without in (None, "t1"):
        kept = [task for task in named if task.task_id != without]
        means = [np.mean([t.states[0] for t in kept if t.name == name], axis=0) for name in ("b", "a")]
        assert directions.difference(4, "a", "b", without) == pytest.approx(means[0] - means[1], abs=1e-6)
    assert directions.difference(4, "a", "c") is None
    assert directions.vector("mean_difference", 4, "a", "c", 0) is None


def test_states_of_tested_tasks_are_in_no_direction():
    directions, _ = directions_of("aabb", half=1)
    assert directions.difference(4, "a", "b") is None and directions.lengths[4] == 0.0


def test_random_vectors_differ_by_task_and_are_the_same_again():
    directions, _ = directions_of("aabb")
    first, again, other = (
        directions.vector("random", 4, "a", "b", 0, draw=draw) for draw in ("t0", "t0", "t1")
    )
    assert first is not None and again is not None and other is not None
    assert np.array_equal(first, again) and abs(float(first @ other)) < 0.99
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("n", [5, 40])
def test_the_weights_of_a_ridge_are_those_of_scikit_learn(n):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((n, 12)), rng.standard_normal((n, 2))
    scaler = StandardScaler().fit(x)
    fit = Ridge(alpha=12).fit(scaler.transform(x), y)
    assert ridge_weights(x, y)[0] == pytest.approx((fit.coef_ / scaler.scale_).T, abs=1e-9)


def test_what_a_grid_would_cost_is_said_before_it_runs(planted):
    told = predict(planted[1], ["steering"], effort=Effort(steer_layers=(0, 1), doses=(WEAK, STRONG)))
    n = len(planted[0].tasks)
    assert told["steering"]["tasks"] == n and n * 16 < told["steering"]["conditions"] <= 2 * n * 16
    assert told["steering"]["tokens"] > 0


@pytest.mark.parametrize(
    "effort, answer",
    [
        (Effort(steer_layers=(7,)), "--layers 7"),
        (Effort(doses=(0.0,)), "--doses 0.0"),
        (Effort(doses=()), "--doses"),
    ],
)
def test_layers_and_doses_that_are_none_are_refused(planted, effort, answer):
    with pytest.raises(UsageError, match=answer):
        predict(planted[1], ["steering"], effort=effort)


def test_a_table_without_rows_gives_no_measure(tmp_path):
    empty = SimpleNamespace(table=lambda _name: pa.table({"part": pa.array([], pa.string())}).to_pandas())
    assert not list(measures(empty))  # pyright: ignore[reportArgumentType]
