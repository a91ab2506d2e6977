"""Patching between two prompts: against plain forward hooks, finite differences, and a planted circuit."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

import probe
from probe.analyzers.rows import to_table
from probe.analyzers.tool.patching import measures
from probe.capture.trials import Bench, PatchTrial
from probe.experiments import Effort, intervene
from probe.experiments.loaded_run import LoadedRun
from probe.experiments.tool import patching
from probe.experiments.tool.conditions import Subject, with_request
from probe.experiments.tool.pairs import NoPair, PromptPair, last_request, tasks_pair
from probe.experiments.tool.sides import Side
from probe.harness.runner import SilentProgress
from probe.model.edits import StateEdit
from probe.prompts import Candidate, Segment, Span, prompt_of
from probe.report.data import collect
from probe.runs import Run
from probe.runs.records import ToolRecord
from probe.runs.tables import TABLES
from tests.conftest import TINY, tiny
from tests.planted import copier
from tests.test_steering_edits import SITES, plain, vector


def prompts(model):
    """Two prompts with one beginning, and two names whose tokens part behind a common one."""
    first, second = (Candidate(name, tuple(model.codec.encode(name))) for name in ("abc,", "abdx,"))
    built_prompts = []
    for request in ("send a letter now", "what is two and three?"):
        segments = [
            Segment("Rules. ", "system"),
            Segment("A tool.\n", "tool:a"),
            Segment(request, "user"),
            Segment("Call: "),
        ]
        built_prompts.append(prompt_of(segments, model.codec, 8))
    return built_prompts, (first, second)


def first_difference(a, b):
    return next(n for n, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y)


def hooked_log_prob(model, name, prompt, candidate, edits):
    """By plain hooks on one full forward of transformers; a node's slot is its position where one candidate is run."""
    ids = [*prompt.token_ids, *candidate.token_ids]
    rows = plain(model, name, ids[:-1], edits)[prompt.n_prompt - 1 :]
    return sum(float(rows[t, token]) for t, token in enumerate(candidate.token_ids))


@pytest.mark.parametrize("name", TINY)
def test_trials_equal_plain_hooks_on_whole_forwards(name):
    model = tiny(name)
    (clean, corrupt), names = prompts(model)
    first = first_difference(clean, corrupt)
    bench = Bench(model, 80)
    bench.run(clean, names, first)
    unchanged = bench.run(corrupt, names, first)
    slot, last = corrupt.n_prompt - 1, model.facts.n_layers - 1
    sets = []
    for number, site in enumerate(SITES):
        head = 1 if site == "z" else None
        sets.append([StateEdit(site, 0, vector(model, site, number, 5), "replace", head, first, first + 5)])
        sets.append([StateEdit(site, last, vector(model, site, number + 9), "replace", head, slot, slot + 1)])
    sets.append([StateEdit("z", layer, vector(model, "z", layer), "replace", 0, slot) for layer in (0, last)])
    together = bench.trials(unchanged, [PatchTrial.of(edits) for edits in sets])
    again = bench.trials(unchanged, [PatchTrial.of(edits) for edits in reversed(sets)])[::-1]
    for edits, ours, twice in zip(sets, together, again, strict=True):
        expected = [hooked_log_prob(model, name, corrupt, candidate, edits) for candidate in names]
        assert ours == pytest.approx(expected, rel=1e-5, abs=2e-5), edits
        assert twice == pytest.approx(ours, rel=1e-6, abs=1e-6)
    plainly = [hooked_log_prob(model, name, corrupt, candidate, []) for candidate in names]
    assert unchanged.log_probs == pytest.approx(plainly, rel=1e-5, abs=2e-5)
    assert sum(ours != pytest.approx(plainly, abs=1e-3) for ours in together) >= 5
    with pytest.raises(ValueError, match="run this one again"):
        bench.run(clean, names, first)
        bench.trials(unchanged, [])


@pytest.mark.parametrize("name", TINY)
def test_gradients_are_what_small_changes_do(name):
    """Central differences of the log-odds along a direction in every state, at all slots that are kept, extrapolated to no step."""
    model = tiny(name)
    (clean, corrupt), names = prompts(model)
    bench = Bench(model, 80)
    unchanged = bench.run(corrupt, names, first_difference(clean, corrupt))
    gradients = bench.gradients(unchanged)
    steps = (0.02, 0.01)
    for number, site in enumerate(SITES):
        for layer in range(model.facts.n_layers):
            kept = "resid" if site == "resid_post" else site
            head = 1 if site == "z" else None
            states, gradient = (
                of[kept][layer] if head is None else of[kept][layer][:, head]
                for of in (unchanged.states, gradients)
            )
            direction = vector(model, site, number, len(states))
            direction *= float(states.norm() / direction.norm())
            place = (head, unchanged.first, unchanged.n_slots)
            sides = [
                PatchTrial.of([StateEdit(site, layer, states + sign * step * direction, "replace", *place)])
                for step in steps
                for sign in (1, -1)
            ]
            odds = [a - b for a, b in bench.trials(unchanged, sides)]
            wide, narrow = ((odds[2 * n] - odds[2 * n + 1]) / (2 * step) for n, step in enumerate(steps))
            slope = float((gradient * direction).sum())
            assert (4 * narrow - wide) / 3 == pytest.approx(slope, rel=0.02, abs=5e-3), (site, layer)
            assert not torch.equal(gradient, torch.zeros_like(gradient))


def test_spans_of_one_length_are_exchanged_by_position_and_others_moved_by_their_means():
    model = tiny("tiny-llama")
    (clean, corrupt), names = prompts(model)
    pair = PromptPair("t", "request", None, names, clean, corrupt)
    assert list(pair.spans) == ["user", "other", "decision"]
    bench = Bench(model, 80)
    donor, base = (bench.run(prompt, names, pair.first) for prompt in (clean, corrupt))
    side = Side(pair, "denoise", base, {"pair": donor}, {"base": 1, "pair": 0})
    for span, how in (("user", "mean"), ("other", "position"), ("decision", "position")):
        (run,) = pair.spans[span]
        assert side.aligned("pair", pair.spans[span]) == how
        ((start, states),) = side.moved("pair", pair.spans[span], "resid_post", 1)
        here, theirs = (
            of.states["resid"][1][slice(place[0] - of.first, place[1] - of.first)]
            for of, place in ((base, run[1]), (donor, run[0]))
        )
        assert start == run[1][0] and len(states) == len(here)
        torch.testing.assert_close(states.mean(0), theirs.mean(0))
        if how == "position":
            torch.testing.assert_close(states, theirs)
        else:  # all by the same vector
            torch.testing.assert_close(states - here, (states - here)[:1].expand(len(here), -1))


def test_prompts_whose_spans_follow_each_other_otherwise_are_no_pair():
    model = tiny("tiny-llama")
    (clean, corrupt), names = prompts(model)
    corrupt.spans = [*corrupt.spans[:-1], Span("user", corrupt.spans[-1].start, corrupt.spans[-1].end)]
    with pytest.raises(NoPair, match="unaligned"):
        _ = PromptPair("t", "request", None, names, clean, corrupt).spans


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    path = tmp_path_factory.mktemp("patched")
    planted = copier(path / "model")
    tasks = planted.write(path / "tasks.jsonl")
    run = probe.run(
        tasks, model=str(planted.path), out=path / "run", analyze=False, limit=16, max_new_tokens=1
    )
    assert intervene(run, ["patching", "patch_sets"]) == ["patching", "patch_parts", "patch_sets"]
    run = Run(run.path)
    return planted, run, to_table(measures(run))


def test_pairs_differ_in_what_was_asked_for_and_in_nothing_else(copied):
    _, run, _ = copied
    opened = LoadedRun(run, None, SilentProgress())

    def pairs(task_id, **effort):
        bench = patching.PatchingBench(run, opened.tasks, opened.codec, 2, 1, Effort(**effort))
        return bench.pairs([task_id])[task_id]

    first, second = run.task_ids[:2]
    texts = "Follow rule A.", "Follow rule B."
    pair = pairs(first, systems=texts)
    assert texts[0] in pair.clean.text
    assert pair.corrupt.text == pair.clean.text.replace(*texts)

    assert pairs(first, between=(first, second)) == "not_scored", "neither shows the other's right tool"
    task, record = opened.tasks[first], run[first].typed(ToolRecord)
    asked = Subject(task, record, opened.codec, 2, 1, Effort())
    again = SimpleNamespace(task=task, prompt=asked.render(with_request(task, "Hello.")))
    wanted = next(name for name in asked.ranked if name not in record.right)
    pair = tasks_pair(asked, record, again, msgspec.structs.replace(record, target=wanted))
    assert [name.name for name in pair.names] == [record.target, wanted]
    assert pair.corrupt.text == pair.clean.text.replace(last_request(task), "Hello.")

    pair = pairs(first, pairs="description")
    tool, other = (name.name for name in pair.names)
    shown = {entry.name: entry.description for entry in opened.tasks[first].tools}
    assert tool == run[first].record["target"] and other == pair.partner
    exchanged = pair.clean.text.replace(shown[tool], "\0").replace(shown[other], shown[tool])
    assert pair.corrupt.text == exchanged.replace("\0", shown[other])


def rows_of(table, name, **where):
    frame = table.to_pandas()
    frame = frame[(frame.name == name) & (frame.role == "request")]
    for axis, label in where.items():
        frame = frame[frame[axis] == label]
    return frame


def test_the_copying_head_carries_all_of_the_recovery_and_its_decoys_none(copied):
    planted, _, table = copied
    for mode in ("denoise", "noise"):
        heads = rows_of(table, "patch_recovery_head", mode=mode).set_index(["layer", "head"]).value
        assert heads[planted.real_head] == pytest.approx(1, abs=1e-3)
        for decoy in planted.decoys:
            assert heads[decoy] == pytest.approx(0, abs=1e-3)
        last = heads[heads.index.get_level_values("layer") == 1]
        assert last.drop(planted.real_head).abs().max() < 1e-3


def test_one_head_is_the_smallest_set_and_random_heads_recover_nothing(copied):
    planted, run, table = copied
    assert rows_of(table, "patch_set_size").value.tolist() == [1, 1]
    recovery = rows_of(table, "patch_set_recovery")
    whole = recovery[recovery.half.isna()].set_index("heads").value
    assert whole["together"] == pytest.approx(1, abs=1e-3) and abs(whole["random"]) < 1e-3
    net = rows_of(table, "patch_set_recovery_minus_random")
    assert net.value.tolist() == pytest.approx([1] * 3, abs=2e-3)
    sets = run.table("patching").heads.dropna()
    tested = [json.loads(text)["together"] for text in sets if "together" in text]
    assert tested and all(heads == [list(planted.real_head)] for heads in tested)


def test_the_request_carries_the_choice_early_and_the_decision_late(copied):
    _, _, table = copied
    recovery = rows_of(table, "patch_recovery", mode="denoise", site="resid_post")
    pair = recovery[recovery.control.isna()].set_index(["span", "layer"]).value
    assert pair["decision", 1] == pytest.approx(1, abs=1e-3)  # behind the last block nothing else is read
    assert pair["user", 1] == pytest.approx(0, abs=1e-3)
    # The third request has no word of the first: what it brings is no choice of the clean prompt's tool.
    control = recovery[recovery.control == "random"].set_index(["span", "layer"]).value
    assert control["decision", 1] < 0.7
    net = rows_of(table, "patch_recovery_minus_random", site="resid_post").set_index(["span", "layer"]).value
    assert net["decision", 1] > 0.3


def test_every_task_is_counted_and_no_gap_below_the_least_is_divided_by(copied):
    _, run, table = copied
    pairs = rows_of(table, "patch_pairs")
    assert pairs.value.sum() == 16 and set(pairs.status) <= {"ok", "small_gap", "no_partner", "unaligned"}
    stored = run.table("patching")
    ok = stored[stored.status == "ok"]
    assert ((ok.clean - ok.corrupt).abs() >= patching.LEAST_GAP).all() and len(ok)
    left_out = set(stored[stored.status.notna() & (stored.status != "ok")].task_id)
    assert not left_out & set(stored[stored.value.notna()].task_id)


def test_the_card_has_the_head_first_and_the_third_prompt_beside_the_pairs(copied):
    planted, run, table = copied
    run.write_table("measures", table)
    (card,) = collect(Run(run.path))["cards"]["patching"]
    side = card["modes"][0]
    assert (side["heads"][0]["layer"], side["heads"][0]["head"]) == planted.real_head
    assert {(line["span"], line["control"]) for line in side["spans"]} >= {
        ("decision", None),
        ("decision", "random"),
    }
    assert card["sets"]["together"]["value"] == pytest.approx(1, abs=1e-3)
    assert sum(row["n"] for row in card["pairs"]) == 16


# -- cost and older tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_layers", [2, 12, 30, 80])
def test_patching_runs_at_most_five_times_the_tokens_of_its_tasks_where_layers_are_to_choose(
    copied, n_layers
):
    _, run, _ = copied
    opened = LoadedRun(run, None, SilentProgress())
    bench = patching.PatchingBench(run, opened.tasks, opened.codec, n_layers, 1, Effort())
    by_task = {
        task_id: pair for task_id, pair in bench.pairs(run.task_ids).items() if not isinstance(pair, str)
    }
    passages = [run[task_id].record for task_id in by_task]
    asked = patching.MOST * sum(record["n_prompt"] + record["n_new"] for record in passages)
    grid = bench.layers(by_task)
    shape = {"n_layers": n_layers, "n_heads": 2}
    tokens = sum(patching.predicted("patching", pair, grid, shape)[1] for pair in by_task.values())
    assert tokens <= asked or len(grid) == min(patching.FEWEST, n_layers)
    if len(grid) < n_layers:
        wider = patching.spaced(n_layers, len(grid) + 1)
        assert sum(patching.predicted("patching", p, wider, shape)[1] for p in by_task.values()) > asked


def test_tables_in_which_a_patch_had_a_direction_are_read_with_its_mode(copied):
    _, run, measured = copied
    table = run.table("patching", arrow=True)
    older = table.rename_columns(["direction" if name == "mode" else name for name in table.column_names])
    sink = io.BytesIO()
    pq.write_table(older, sink)
    (again,) = TABLES["patching"].decode(Path("patching.parquet"), sink.getvalue())
    assert again.equals(table)
    direction = pc.coalesce(measured["mode"], measured["direction"])
    older = measured.drop_columns(["mode"])
    older = older.set_column(older.column_names.index("direction"), "direction", direction)
    sink = io.BytesIO()
    pq.write_table(older, sink)
    (again,) = TABLES["measures"].decode(Path("measures.parquet"), sink.getvalue())
    assert again.equals(measured)
