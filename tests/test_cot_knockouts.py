"""Chains of thought with parts hidden or deleted: against one slow eager forward each, and a planted chain."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from click.testing import CliRunner

import probe
from probe.analyzers.cot import causal, faithfulness, reads
from probe.analyzers.rows import to_table
from probe.cli import main
from probe.errors import UsageError
from probe.experiments import EXPERIMENTS, intervene, predict
from probe.experiments.cot.faithfulness import mistaken
from probe.experiments.cot.knockouts import _changes, chain_rows, forwards
from probe.experiments.cot.reasoning import AFFORDABLE
from probe.runs import Run, verify
from probe.runs.records import CotRecord, decode
from probe.runs.views.chain import Chain
from tests.circuit import Circuit
from tests.conftest import tiny
from tests.made_up_runs import EMPTY_PASSAGE, PlantedTask
from tests.slow import intervened
from tests.test_analyzers import make
from tests.test_cot_docs import without_states
from tests.test_shell import Conditions

BOTH = ("knockouts", "deletions")


def record(token_ids, bounds, task_id="t"):
    """`bounds`: label → (start, end); what lies between is `other`."""
    spans = [{"label": "bos", "start": 0, "end": 1}]
    spans += [{"label": label, "start": start, "end": end} for label, (start, end) in bounds.items()]
    ids, n_prompt = list(token_ids), bounds["step:1"][0]
    facts = {
        "id": task_id,
        "kind": "cot",
        "status": "ok",
        "prompt": "",
        "completion": "",
        "finish_reason": "eos",
    }
    counts = {"token_ids": ids, "n_prompt": n_prompt, "n_new": len(ids) - n_prompt, "spans": spans}
    return decode(facts | counts, CotRecord, Path())


def random_chain(model, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.facts.d_vocab, (70,), generator=draw).tolist()
    bounds = {"question": (4, 15), "step:1": (20, 31), "step:2": (31, 40), "step:3": (40, 52)}
    return Chain(record(ids, bounds | {"answer": (56, 70)}))


def slow_log_probs(model, ids, **edit):
    with intervened(model.hf, **edit), torch.no_grad():
        return model.hf(torch.tensor([ids[:-1]]), use_cache=False).logits[0].double().log_softmax(-1)


def test_every_knockout_and_deletion_equals_a_slow_forward(tiny_model):
    chain = random_chain(tiny_model)
    ids, places = chain.token_ids, {part.label: part for part in [*chain.sources, chain.answer]}
    base = slow_log_probs(tiny_model, ids)
    actual, _ = chain_rows(chain, BOTH, tiny_model)
    assert {row["experiment"] for row in actual} == {
        "base",
        *EXPERIMENTS["knockouts"].rows,
        *EXPERIMENTS["deletions"].rows,
    }
    slow: dict = {}
    for row in actual:
        reader, kind = places[row["reader"]], row["experiment"].removeprefix("random_")
        start, end = row.get("start", 0), row.get("start", 0) + row.get("n_tokens", 0)
        if (kind, start, end) not in slow:
            if kind == "deleted":
                short = slow_log_probs(tiny_model, ids[:start] + ids[end:])
                slow[kind, start, end] = torch.cat([base[: end - 1], short[start - 1 :]])
            else:
                rows_from = end if kind == "total" else max(chain.answer.start - 1, end)
                edit = {} if kind == "base" else {"masked": [range(start, end)], "rows_from": rows_from}
                slow[kind, start, end] = slow_log_probs(tiny_model, ids, **edit)
        values = slow[kind, start, end]
        log_prob = sum(float(values[p - 1, ids[p]]) for p in range(reader.start, reader.end))
        assert row["log_prob"] == pytest.approx(log_prob, abs=1e-3), row
        if kind != "base":
            rows = [p - 1 for p in range(reader.start, reader.end) if p - 1 >= end]
            kl = (base[rows].exp() * (base[rows] - values[rows])).sum(-1).mean()
            assert row["n_rows"] == len(rows)
            assert row["kl"] == pytest.approx(float(kl), rel=1e-3, abs=1e-6), row
    assert max(row["kl"] for row in actual if row["experiment"] == "total") > 1e-3


def long_chain(sizes):
    bounds, at = {"question": (20, 100)}, 110
    for k, size in enumerate(sizes, 1):
        bounds[f"step:{k}"] = (at, at + size)
        at += size
    return Chain(record(range(3, at + 23), bounds | {"answer": (at + 3, at + 23)}))


def test_forty_steps_of_a_thousand_tokens_are_run_at_most_forty_times():
    even = long_chain([21] * 40)
    uneven = long_chain([13 + (7 * k) % 18 for k in range(40)])
    for chain in (even, uneven):
        assert 950 < len(chain.token_ids) < 1050
        changes = list(_changes(chain, ["knockouts"]))
        for kind in EXPERIMENTS["knockouts"].rows:
            part = {source for change in changes if change.experiment == kind for source in change.readers}
            assert part >= {f"step:{k}" for k in range(1, 36)}, kind
        assert forwards(chain, ["knockouts"]) < 36
        # Deletions are left to be named.
        assert forwards(chain, BOTH) > AFFORDABLE
    assert forwards(random_chain(tiny("tiny-llama")), BOTH) < AFFORDABLE


def test_sources_that_share_a_random_run_lie_apart_from_it_and_are_few():
    chain = long_chain([21] * 40)
    shared = {}
    for source in chain.sources:
        run = chain.elsewhere(source)
        assert run.length == source.length
        assert run.end <= source.start or run.start >= source.end
        shared.setdefault(run, []).append(source.label)
    assert max(map(len, shared.values())) == 4
    assert len(shared) == 11  # the question has its own


@pytest.fixture(scope="module")
def two_hops(tmp_path_factory):
    """Step 2 copies the value of step 1, the cue copies what step 2 holds: attention alone, set by hand."""
    values = {"alpha": "a", "beta": "b"}
    embed = {word: {f"val:{x}": 1.0, "is_value": 1.0} for word, x in values.items()}
    embed |= {"copy": {"is_copy": 1.0}, "cue": {"is_cue": 1.0}, "<|bos|>": {"is_bos": 1.0}}
    features = [f"{group}:{x}" for group in ("held", "out") for x in values.values()]
    circuit = Circuit(embed, features, ["what is it so then and done"])
    rest = {"1": {"is_bos": 40.0}}  # who looks for nothing reads the sink, which holds nothing
    circuit.head(
        0, 0, {"is_copy": {"is_value": 80.0}, **rest}, [(f"val:{x}", f"held:{x}", 1.0) for x in "ab"]
    )
    circuit.head(1, 0, {"is_cue": {"is_copy": 80.0}, **rest}, [(f"held:{x}", f"out:{x}", 1.0) for x in "ab"])
    for word, x in values.items():
        circuit.logit(word, {f"out:{x}": 8.0})
    path = tmp_path_factory.mktemp("two_hops")
    d_vocab = circuit.save(path)
    words = ["<|bos|>", "what", "is", "it", "so", "alpha", "then", "copy", "and", "done", "cue", "alpha"]
    bounds = {"question": (1, 4), "step:1": (4, 6), "step:2": (6, 8), "step:3": (8, 10), "answer": (11, 12)}
    chain = Chain(record([circuit.tokens[word] for word in words], bounds))
    rows, _ = chain_rows(chain, BOTH, probe.load(str(path)))
    return d_vocab, {(r["experiment"], r.get("source"), r["reader"]): r for r in rows}


def test_what_was_copied_on_acts_in_total_and_not_directly(two_hops):
    d_vocab, rows = two_hops
    sure = 8.0 - math.log(math.exp(8.0) + d_vocab - 1)
    rest = -math.log(math.exp(8.0) + d_vocab - 1)
    gone = -math.log(d_vocab)
    kl = math.exp(sure) * (sure - gone) + (d_vocab - 1) * math.exp(rest) * (rest - gone)
    assert rows["base", None, "answer"]["log_prob"] == pytest.approx(sure, abs=1e-4)
    # Without the value nothing is copied, and the answer is drawn evenly.
    for ablation, source in (("total", "step:1"), ("total", "step:2"), ("direct", "step:2")):
        row = rows[ablation, source, "answer"]
        assert row["log_prob"] == pytest.approx(gone, abs=1e-3)
        assert row["kl"] == pytest.approx(kl, abs=1e-3)
    for ablation, source in (("direct", "step:1"), ("total", "step:3"), ("direct", "step:3")):
        row = rows[ablation, source, "answer"]
        assert row["log_prob"] == pytest.approx(sure, abs=1e-4)
        assert row["kl"] == pytest.approx(0, abs=1e-5)
    assert rows["total", "question", "answer"]["kl"] == pytest.approx(0, abs=1e-5)
    assert rows["deleted", "step:1", "answer"]["log_prob"] == pytest.approx(gone, abs=1e-3)
    assert rows["deleted", "step:3", "answer"]["log_prob"] == pytest.approx(sure, abs=1e-4)


def test_a_random_run_is_as_long_lies_elsewhere_and_is_drawn_alike_each_time():
    chain = random_chain(tiny("tiny-llama"))
    for source in chain.sources:
        other = chain.elsewhere(source)
        assert other == chain.elsewhere(source)
        assert other.length == source.length
        assert other.start >= 1
        assert other.end <= chain.answer.start - 1
        assert other.end <= source.start or other.start >= source.end
    short = Chain(record(range(9), {"step:1": (1, 7), "answer": (8, 9)}))
    assert short.elsewhere(short.steps[0]) is None


def test_a_reasoning_without_an_answer_has_steps_as_readers_alone():
    bounds = {"question": (4, 15), "step:1": (20, 31), "step:2": (31, 40)}
    chain = Chain(record(range(3, 43), bounds))
    rows, _ = chain_rows(chain, BOTH, tiny("tiny-llama"))
    assert {row["reader"] for row in rows} == {"step:1", "step:2"}
    assert not {row["experiment"] for row in rows} & {"direct", "random_direct"}


# -- in a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    fresh = make(tmp_path_factory.mktemp("cot"), "cot")
    intervene(fresh, without_states(), model=tiny("tiny-llama"))
    return fresh


@pytest.fixture(scope="module")
def measured(run):
    return to_table([*causal.measures(run), *faithfulness.measures(run)]).to_pandas()


def test_the_unchanged_answer_has_the_probability_that_was_recorded(run):
    frame = run.table("reasoning")
    for task in run:
        rows = frame[(frame.task_id == task.id) & (frame.experiment == "base")]
        n_prompt = task.record["n_prompt"]
        for row in rows.itertuples():
            span = next(s for s in task.record["spans"] if s["label"] == row.reader)
            part = task["log_probs"][span["start"] - n_prompt : span["end"] - n_prompt].double().sum()
            assert row.log_prob == pytest.approx(float(part), abs=1e-3)
    assert verify(run.path).problems == []


def test_what_is_there_is_not_made_again_and_unknown_names_are_refused(run):
    assert intervene(run, model=tiny("tiny-llama")) == []
    before = run.table("reasoning", arrow=True).num_rows
    cost, seen = predict(run, ["deletions"])["cot"], Conditions()
    assert intervene(run, ["deletions"], model=tiny("tiny-llama"), progress=seen) == ["deletions"]
    assert run.table("reasoning", arrow=True).num_rows == before
    assert (seen.unit, seen.total, seen.n) == ("conditions", cost["conditions"], cost["conditions"])
    assert cost["conditions"] > cost["tasks"] and cost["tokens"] == pytest.approx(seen.tokens, rel=0.1)
    with pytest.raises(UsageError, match="did you mean knockouts"):
        intervene(run, ["knockout"])


def test_the_command_makes_knockouts_and_their_measures(tmp_path):
    path = make(tmp_path, "cot").path
    bare = CliRunner().invoke(main, ["analyze", str(path), "cot"], catch_exceptions=False)
    assert bare.exit_code == 0, bare.output
    assert "knockout_kl" not in set(Run(path).measures().name)
    refused = CliRunner().invoke(main, ["analyze", str(path), "knockouts", "--no-model"])
    assert refused.exit_code == 2
    done = CliRunner().invoke(main, ["analyze", str(path), "knockouts"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert {"knockout_kl", "answer_change", "causal_spearman"} <= set(Run(path).measures().name)
    assert verify(path).problems == []


def test_measures_are_the_rows_of_the_table_and_their_differences(run, measured):
    frame = run.table("reasoning")
    row = frame[
        (frame.task_id == "c1")
        & (frame.experiment == "total")
        & (frame.source == "step:1")
        & (frame.reader == "step:3")
    ].iloc[0]
    rows = measured[
        (measured.name == "knockout_kl") & (measured.task_id == "c1") & (measured.experiment == "total")
    ]
    rows = rows[rows.control.isna()]
    assert rows[(rows.step == 3) & (rows.span == "step:1")].value.tolist() == [row.kl]
    answers = (
        frame[(frame.task_id == "c1") & (frame.reader == "answer")]
        .set_index(["experiment", "source"])
        .log_prob
    )
    was = answers["base"].iloc[0]
    change = measured[
        (measured.task_id == "c1") & (measured.span == "step:2") & (measured.experiment == "direct")
    ]
    change = change[change.control.isna()]
    now = answers["direct", "step:2"]
    assert change[change.name == "answer_change"].value.tolist() == pytest.approx([now - was])


def test_reads_against_proof_is_scipys_rank_correlation(run, measured):
    frame = run.table("reasoning")
    frame = frame[frame.experiment == "total"]
    x, y = [], []
    for row in frame.itertuples():
        actual = reads.step_reads(run[row.task_id], "attn_to_spans")
        mean = actual.values.mean(0)
        x.append(mean[actual.readers.index(row.reader), actual.labels.index(row.source)])
        y.append(row.kl)
    rows = measured[
        (measured.name == "causal_spearman")
        & (measured.correlate == "read_mass")
        & (measured.cause == "knockout_kl")
        & (measured.experiment == "total")
    ].iloc[0]
    assert rows.value == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    assert rows.n == len(x)
    assert np.isnan(rows.low), "few tasks have no interval"


def test_a_steps_change_less_its_random_spans_is_paired_step_by_step(run, measured):
    frame = run.table("reasoning")
    answers = frame[frame.reader == "answer"].set_index(["task_id", "experiment", "source"]).log_prob
    gaps: dict[str, list[float]] = {}
    for task, experiment, source in answers.index:
        pair = (task, "random_total", source)
        if experiment == "total" and source.startswith("step:") and pair in answers:
            gap = answers[task, "total", source] - answers[pair]
            if np.isfinite(gap):
                gaps.setdefault(task, []).append(gap)
    rows = measured[(measured.name == "answer_change_minus_random") & (measured.experiment == "total")]
    (row,) = rows.itertuples()
    assert row.value == pytest.approx(np.mean([np.mean(of_task) for of_task in gaps.values()]))
    assert row.n == len(gaps)


def test_what_is_passed_on_is_the_part_of_the_total_that_is_not_direct(run, measured):
    frame = run.table("reasoning")
    rows = frame[(frame.reader == "answer") & frame.source.str.startswith("step:", na=False)]
    kl = rows.set_index(["experiment", "task_id", "source"]).kl.dropna()
    pairs = [place for place in kl["direct"].index if place in kl["total"].index]
    direct, total = (sum(kl[name][place] for place in pairs) for name in ("direct", "total"))
    (row,) = measured[measured.name == "passed_on"].itertuples()
    assert row.value == pytest.approx(1 - direct / total)
    assert row.n == len({task for task, _ in pairs})


# -- faithfulness ------------------------------------------------------------------------------------------------------


def test_all_steps_kept_give_the_runs_own_answer(run, measured):
    frame = run.table("reasoning")
    for task in run:
        rows = frame[(frame.task_id == task.id) & (frame.experiment == "early_answer")].sort_values("kept")
        n_steps = len(task.record["steps"])
        assert rows.kept.tolist() == list(range(n_steps + 1))
        base = frame[(frame.task_id == task.id) & (frame.experiment == "base") & (frame.reader == "answer")]
        assert rows.log_prob.iloc[-1] == pytest.approx(base.log_prob.iloc[0], abs=1e-3)
        assert rows.said.iloc[-1] == task.record["answer"]
    model = tiny("tiny-llama")
    task = run["c1"]
    steps = [s for s in task.record["spans"] if s["label"].startswith("step:")]
    answer = next(s for s in task.record["spans"] if s["label"] == "answer")
    ids = task.record["token_ids"]
    short = [*ids[: steps[1]["end"]], *ids[steps[-1]["end"] : answer["end"]]]
    log_probs = slow_log_probs(model, short)[-(answer["end"] - answer["start"]) :]
    expected = sum(float(log_probs[i, t]) for i, t in enumerate(ids[answer["start"] : answer["end"]]))
    rows = frame[(frame.task_id == "c1") & (frame.experiment == "early_answer") & (frame.kept == 2)]
    assert rows.log_prob.iloc[0] == pytest.approx(expected, abs=1e-3)


def test_filler_and_mistakes_have_rows_where_they_apply(run):
    frame = run.table("reasoning")
    assert (frame.experiment == "filler").sum() == 2
    mistakes = frame[frame.experiment == "mistake"]
    assert mistakes.source[mistakes.task_id == "c1"].tolist() == ["step:1", "step:2"]  # step 3 has no number
    assert not (mistakes.task_id == "c2").any()


def test_the_gain_of_a_chain_is_what_the_same_tasks_lose_without_it(run, measured):
    frame = run.table("reasoning")
    first = (
        frame[(frame.experiment == "early_answer") & (frame.kept == 0)].set_index("task_id").score.dropna()
    )
    gains = [run[task].record["score"] - score for task, score in first.items()]
    (row,) = measured[measured.name == "chain_gain"].itertuples()
    assert (row.value, row.n) == (pytest.approx(np.mean(gains)), len(gains))
    assert row.low <= row.value <= row.high


def test_the_area_over_the_curve_has_its_closed_forms():
    assert faithfulness.area_over((0, 1, 2, 3), (1, 1, 1, 1)) == 0
    assert faithfulness.area_over((0, 1, 2, 3), (0, 0, 0, 1)) == pytest.approx(1 - 1 / 6)
    assert faithfulness.area_over((0, 2), (0, 1)) == pytest.approx(0.5)


def test_a_mistake_changes_the_last_number_alone():
    wrong = mistaken("He buys 4, so 3 + 4 = 17.\n", "t")
    assert wrong.startswith("He buys 4, so 3 + 4 = ")
    assert wrong.endswith(".\n")
    assert wrong != "He buys 4, so 3 + 4 = 17.\n"
    assert wrong == mistaken("He buys 4, so 3 + 4 = 17.\n", "t")
    assert mistaken("Nothing to count.", "t") is None


# -- from the run alone ------------------------------------------------------------------------------------------------


def _long_reasoning(n_steps: int) -> PlantedTask:
    draw = np.random.default_rng(0)
    spans = [{"label": "bos", "start": 0, "end": 1}]
    spans += [{"label": f"step:{k}", "start": 3 * k, "end": 3 * k + 1 + k % 3} for k in range(1, n_steps + 1)]
    n_rows = 3 * n_steps + 4
    record = EMPTY_PASSAGE | {"id": "made up", "kind": "cot", "status": "ok", "spans": spans}
    reads = torch.tensor(draw.random((2, 3, n_rows, n_steps + 1)))
    labels = [span["label"] for span in spans]
    return PlantedTask(record, {"attn_to_spans": reads, "rows": torch.arange(n_rows)}, labels)


def test_receiver_heads_are_scored_as_a_plain_loop_scores_them():
    task = _long_reasoning(12)
    blocks = reads.step_blocks(task)
    assert blocks is not None
    kurtosis = reads.receiver_scores(blocks)
    for layer in range(2):
        for head in range(3):
            vertical = []
            for i in range(1, 13):
                column = []
                for reader in range(i + 4, 13):
                    rows = [p - 1 for p in range(3 * reader, 3 * reader + 1 + reader % 3)]
                    part = [float(task["attn_to_spans"][layer, head, row, i]) for row in rows]
                    column.append(np.mean(part) / (1 + i % 3))
                vertical.append(np.mean(column) if column else np.nan)
            expected = scipy.stats.kurtosis(vertical, fisher=True, bias=True, nan_policy="omit")
            assert kurtosis[layer, head] == pytest.approx(expected)
    assert reads.step_blocks(_long_reasoning(9)) is None


def test_in_noise_a_receiver_is_found_in_one_of_twenty_runs_at_most():
    """Attention of 10 heads of a skewed law, 3 tasks of 11 steps, 40 runs."""
    draw = np.random.default_rng(1)
    runs = [[draw.gamma(0.5, size=(2, 5, 11, 11)) for _ in range(3)] for _ in range(40)]
    runs_with = sum(bool((reads.receiver_p(run, 39) <= 0.05).any()) for run in runs)
    # 2 expected at most; more than 5 would have a probability of 1.4 %.
    assert runs_with <= 5


def test_a_step_that_all_later_ones_read_makes_its_head_a_receiver():
    draw = np.random.default_rng(2)
    tasks = [draw.random((2, 5, 12, 12)) for _ in range(4)]
    for blocks in tasks:
        blocks[1, 3, :, 2] += 5
    p = reads.receiver_p(tasks)
    assert p[1, 3] == 1 / 200
    assert (p <= 0.05).sum() == 1


def test_distances_and_lifetimes_of_a_matrix_that_can_be_read_off():
    nan = np.nan
    values = np.array(
        [[[0.5, 0.3, nan, nan], [0.4, 0.2, 0.1, nan], [0.6, 0.01, 0.05, 0.2], [0.9, 0.03, 0.0, 0.0]]]
    )
    labels = ["question", "step:1", "step:2", "step:3"]
    matrix = reads.Reads(["step:1", "step:2", "step:3", "answer"], np.ones(4), [0], labels, values, 1)
    distance = to_table(reads.distances("t", matrix)).to_pandas().set_index("distance").value
    assert distance.to_dict() == pytest.approx({0: 0.2, 1: 0.125, 2: 0.01})
    lifetime = to_table(reads.lifetimes("t", matrix)).to_pandas().set_index("step")
    assert lifetime.value.to_dict() == {1: 3.0, 2: 1.0, 3: 0.0}
    assert lifetime.n.to_dict() == {1: 3, 2: 2, 3: 1}


def test_norms_are_those_of_the_stored_keys_and_values(run):
    from probe.analyzers.cot.memory import norms

    frame = to_table(norms(run["c1"])).to_pandas()
    span = next(s for s in run["c1"].record["spans"] if s["label"] == "step:2")
    for name, site in (("key_norm", "keys"), ("value_norm", "values")):
        part = run["c1"][site][1, :, span["start"] : span["end"]].double()
        rows = frame[(frame.name == name) & (frame.layer == 1) & (frame.step == 2)]
        assert rows.value.tolist() == pytest.approx([float(part.norm(dim=-1).mean())], rel=1e-5)
        assert rows.n.tolist() == [part.shape[0] * part.shape[1]]
