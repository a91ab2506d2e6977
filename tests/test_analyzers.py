"""Analyzers: against closed forms, scipy, the plain model's eager attention, and bytes of stored tensors."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr

import probe
from probe.analyzers import Grid, Row, analyze, cot, prompting, tool
from probe.analyzers.rows import table_parts, to_table
from probe.errors import ProbeError, UsageError
from probe.maths import intervals, reads, statistics
from probe.prompts.labels import NO_TOOL
from probe.runs import MEASURE_FIELDS, Run, measure_schema
from probe.runs.tables import TABLES
from tests.clock import references, within
from tests.conftest import tiny
from tests.made_up_runs import PlantedTask, choice_of, planted_task

TOOLS = [
    {"name": "search", "description": "Look something up on the web.", "parameters": {"type": "object"}},
    {"name": "search_news", "description": "News only.", "parameters": {"type": "object"}},
    {"name": "sum", "description": "Add numbers, as many as you like.", "parameters": {"type": "object"}},
]
TASKS: dict[str, list[dict[str, Any]]] = {
    "tool": [
        {"id": "t1", "kind": "tool_selection", "input": "Add 2 and 3.", "tools": TOOLS, "target": "sum"},
        {"id": "t2", "kind": "tool_selection", "input": "Hello!", "tools": TOOLS[:2], "target": None},
        {
            "id": "t3",
            "kind": "tool_selection",
            "input": "Who won?",
            "tools": TOOLS[::-1],
            "target": ["search", "search_news"],
        },
    ],
    "prompting": [
        {
            "id": f"p{number}",
            "kind": "prompting",
            "input": f"{word} ->",
            "choices": [" a", " bc", " d"],
            "target": " bc",
            "variants": [{"name": "same"}, {"name": "told", "system": "Say the opposite of the word."}],
        }
        for number, word in enumerate(("hot", "big", "up"))
    ],
    "cot": [
        {
            "id": "c1",
            "kind": "cot",
            "question": "Tom has 3 apples and buys 4. How many?",
            "answer": 7,
            "steps": ["Tom has 3 apples.", "He buys 4, so 3 + 4 = 7.", "That is all."],
        },
        {"id": "c2", "kind": "cot", "question": "1 + 1?", "answer": 2, "steps": ["One and one is two."]},
    ],
}


def make(folder: Path, kind: str, name: str = "tiny-llama", **options: Any) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{kind}.jsonl"
    file.write_text("".join(json.dumps(task) + "\n" for task in TASKS[kind]))
    return probe.run(
        file,
        model=tiny(name),
        out=folder / "run",
        analyze=False,
        max_new_tokens=6,
        reasoning="reference",
        **options,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run a kind on tiny-llama (6 query heads on 2 kv heads), not analyzed."""
    return {kind: make(tmp_path_factory.mktemp(kind), kind) for kind in TASKS}


@pytest.fixture(scope="module")
def measured(runs):
    return {kind: to_table(module.measures(runs[kind])).to_pandas() for kind, module in MODULES.items()}


MODULES = {"tool": tool, "prompting": prompting, "cot": cot}


def of(frame: Any, **where: Any) -> Any:
    """Rows with these values; None asks for null."""
    for name, value in where.items():
        frame = frame[frame[name].isna() if value is None else frame[name] == value]
    return frame


def value_of(frame: Any, **where: Any) -> float:
    rows = of(frame, **where)
    assert len(rows) == 1, (where, len(rows))
    return float(rows.value.iloc[0])


def eager_pattern(record: dict[str, Any], name: str = "tiny-llama") -> torch.Tensor:
    """[layer, head, query position, key position] of the plain model, by transformers' eager attention."""
    plain = copy.deepcopy(tiny(name).hf)
    plain.set_attn_implementation("eager")
    with torch.inference_mode():
        out = plain(torch.tensor([record["token_ids"][:-1]]), output_attentions=True)
    return torch.stack([layer[0] for layer in out.attentions]).double()


# -- statistics ------------------------------------------------------------------------------------------------


def logs(*p: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(p))


def test_divergences_of_bernoullis_are_the_closed_forms():
    p, q = 0.3, 0.8
    a, b = logs(p, 1 - p), logs(q, 1 - q)
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert statistics.kl(a, b) == pytest.approx(expected, rel=1e-12)
    assert statistics.kl(b, a) != pytest.approx(expected, rel=1e-3)
    assert statistics.tv(a, b) == pytest.approx(abs(p - q), rel=1e-12)
    m = (p + q) / 2
    entropy = lambda x: -x * math.log(x) - (1 - x) * math.log(1 - x)  # noqa: E731
    assert statistics.js(a, b) == pytest.approx(entropy(m) - (entropy(p) + entropy(q)) / 2, rel=1e-12)


def test_disjoint_distributions_are_ln_2_and_infinity_apart():
    a, b = logs(1, 0), logs(0, 1)
    assert statistics.js(a, b) == pytest.approx(math.log(2), rel=1e-12)
    assert statistics.tv(a, b) == 1
    assert statistics.kl(a, b) == math.inf
    assert statistics.kl(a, a) == 0
    assert statistics.entropy(a) == 0


@pytest.mark.parametrize("scale", [0.1, 1, 30])
def test_divergences_agree_with_scipy(scale):
    generator = np.random.default_rng(0)
    for _ in range(5):
        a, b = (statistics.log_softmax(generator.normal(size=500) * scale) for _ in "ab")
        p, q = np.exp(a), np.exp(b)
        assert statistics.kl(a, b) == pytest.approx(rel_entr(p, q).sum(), rel=1e-9)
        assert statistics.js(a, b) == pytest.approx(jensenshannon(p, q) ** 2, rel=1e-9)
        assert statistics.entropy(a) == pytest.approx(scipy.stats.entropy(p), rel=1e-9)


def test_log_softmax_ignores_a_shift_of_all_logits():
    logits = np.random.default_rng(1).normal(size=50)
    assert statistics.log_softmax(logits + 700) == pytest.approx(statistics.log_softmax(logits), abs=1e-10)


# -- rows ---------------------------------------------------------------------------------------------------------


def test_a_grid_becomes_one_row_a_number_and_nothing_where_there_is_none():
    values = np.array([[1.0, np.nan, 3.0], [4.0, 5.0, 6.0]])
    reader = {"step": [1, None], "variant": [None, "answer"]}
    grid = Grid(
        task_id="a", analyzer="cot", name="read_mass", unit="probability", values=values,
        axes=[reader, {"span": ["x", "y", "z"]}], n=np.array([[2], [7]]),
    )  # fmt: skip
    table = to_table([grid])
    assert table.schema == measure_schema()
    frame = table.to_pandas()
    assert len(frame) == 5
    assert value_of(frame, step=1, span="z") == 3
    assert value_of(frame, step=None, variant="answer", span="y") == 5
    assert set(of(frame, variant="answer").n) == {7}
    assert frame["layer"].isna().all()


def test_a_measure_that_is_not_a_number_or_has_no_unit_is_refused():
    row = {"task_id": "a", "analyzer": "x", "name": "y", "n": 1}
    with pytest.raises(ValueError, match="leave the row out"):
        to_table([Row(**row, value=math.nan, unit="nats")])
    with pytest.raises(ValueError, match="unit"):
        to_table([Row(**row, value=1.0, unit="")])
    with pytest.raises(ValueError, match="axes"):
        to_table(
            [
                Grid(
                    task_id="a",
                    analyzer="x",
                    name="y",
                    unit="nats",
                    values=np.ones((2, 3)),
                    axes=[{"layer": [0, 1]}],
                )
            ]
        )


@pytest.mark.timing
def test_the_heads_of_72_tasks_become_a_table_in_under_three_seconds():
    values = np.random.default_rng(0).random((30, 9, 5))
    axes = [{"layer": list(range(30))}, {"head": list(range(9))}, {"tool": list("abcde")}]
    grids = [
        Grid(
            task_id=str(task), analyzer="tool", name="attention", unit="probability", values=values, axes=axes
        )
        for task in range(72)
    ]
    assert to_table(grids).num_rows == 72 * 30 * 9 * 5
    assert within(1, references(lambda: to_table(grids)))  # 0.1


# -- analyze ---------------------------------------------------------------------------------------------------------


def copied(run: Run, folder: Path) -> Run:
    import shutil

    return Run(shutil.copytree(run.path, folder / "copy"))


def analyzed(run: Run, names: Iterable[str] = ()) -> Any:
    """The run's measures, made again."""
    analyze(run, list(names))
    return run.measures(arrow=True)


def test_analyze_writes_the_contracts_columns_and_says_the_same_twice(runs, tmp_path):
    run = copied(runs["tool"], tmp_path)
    first = analyzed(run)
    assert first.column_names == list(MEASURE_FIELDS)
    assert analyzed(run).equals(first)


def test_only_the_analyzers_of_the_runs_kinds_run(runs, tmp_path):
    assert set(analyzed(copied(runs["cot"], tmp_path)).to_pandas().analyzer) == {"cot", "distribution"}


def test_an_unknown_analyzer_is_refused_with_the_nearest_name(runs, tmp_path):
    with pytest.raises(UsageError, match="did you mean prompting"):
        analyze(copied(runs["tool"], tmp_path), ["promting"])


def plug(monkeypatch, **loaded: Any) -> None:
    points = [
        SimpleNamespace(name=name, value=f"other:{name}", load=lambda f=f: f) for name, f in loaded.items()
    ]
    monkeypatch.setattr(
        "probe.analyzers.entry_points", lambda group: points if group == "probe.analyzers" else []
    )


def test_an_analyzer_of_another_package_runs_and_the_rows_of_the_others_stay(runs, tmp_path, monkeypatch):
    def length(run: Run) -> Iterable[Row]:
        for task in run:
            yield Row(
                task_id=task.id,
                analyzer="length",
                name="tokens",
                value=len(task["token_ids"]),
                unit="tokens",
                n=1,
            )

    run = copied(runs["tool"], tmp_path)
    table = analyzed(run)
    plug(monkeypatch, length=length)
    both = analyzed(run, ["length"]).to_pandas()
    assert set(both.analyzer) == {"tool", "distribution", "foresight", "length"}
    assert len(both) == table.num_rows + 3
    assert len(analyzed(run, ["length"])) == len(both)


def many_rows(analyzer: str, n: int) -> Grid:
    axes = [{"step": [*range(n)]}]
    return Grid(task_id="t1", analyzer=analyzer, name="x", unit="1", values=np.zeros(n), axes=axes)


def test_memory_does_not_grow_with_the_rows_that_are_written():
    def peak(n_grids: int) -> int:
        held = []

        def grids() -> Iterable[Grid]:
            for _ in range(n_grids):
                yield many_rows("tool", 1 << 14)
                held.append(pa.total_allocated_bytes())

        TABLES["measures"].encode(table_parts(grids()))
        return max(held) - held[0]

    assert peak(32) < 1.5 * peak(8)


def test_an_analyzer_that_fails_is_named_and_costs_the_others_nothing(runs, tmp_path, monkeypatch):
    def broken(run: Run) -> Iterable[Grid]:
        yield many_rows("broken", 1 << 17)  # enough to be written before the failure
        raise KeyError("oops")

    run = copied(runs["tool"], tmp_path)
    plug(monkeypatch, broken=broken)
    with pytest.raises(ProbeError, match="'broken' failed: KeyError"):
        analyze(run)
    assert set(run.measures().analyzer) == {"tool", "distribution", "foresight"}


def test_rows_signed_with_another_name_are_refused(runs, tmp_path, monkeypatch):
    row = Row(task_id="t1", analyzer="tool", name="margin", value=1.0, unit="nats", n=1)
    plug(monkeypatch, forger=lambda run: [row])
    with pytest.raises(ProbeError, match="signed tool"):
        analyze(copied(runs["tool"], tmp_path), ["forger"])


def test_two_analyzers_of_one_name_are_refused(runs, tmp_path, monkeypatch):
    plug(monkeypatch, tool=lambda run: [])
    with pytest.raises(UsageError, match="called 'tool'"):
        analyze(copied(runs["tool"], tmp_path))


def test_a_failed_task_and_what_was_not_captured_leave_no_rows(tmp_path):
    run = make(tmp_path, "tool", capture="none")
    frame = to_table(tool.measures(run)).to_pandas()
    assert set(frame.task_id) == {"t1", "t2", "t3", ""}
    assert not frame.name.str.startswith("attention").any()
    record = {"id": "t9", "kind": "tool_selection", "status": "nonfinite", "error": "x", "seconds": 0.0}
    broken = PlantedTask(record, {}, [])
    stub: Any = type("Stub", (list,), {"table": run.table, "run": run.run})([broken])
    assert list(tool.measures(stub)) == []


def test_analyzing_needs_no_model_library(runs, tmp_path):
    run = copied(runs["cot"], tmp_path)
    code = (
        "import sys; from probe.runs import Run; from probe.analyzers import analyze\n"
        f"analyze(Run({str(run.path)!r}))\n"
        "assert not {'transformers', 'transformer_lens'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# -- tool ---------------------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_record_and_no_tool_has_its_own_row(runs, measured):
    frame = measured["tool"]
    for task in runs["tool"]:
        entries = task.record["tool_probabilities"]
        for entry in entries:
            where = {"tool": entry["tool"], "span": None if entry["tool"] else NO_TOOL}
            rows = of(frame, task_id=task.id, layer=None, **where)
            for name in ("log_prob", "probability"):
                assert value_of(rows, name=name) == entry[name]
            if entry["tool"]:
                assert value_of(rows, name="choice_probability") == entry["choice_probability"]
            else:
                assert of(rows, name="choice_probability").empty
        p = np.array([entry["probability"] for entry in entries])
        ranked = np.sort([entry["log_prob"] for entry in entries])
        of_task = of(frame, task_id=task.id)
        assert value_of(of_task, name="entropy") == pytest.approx(scipy.stats.entropy(p), abs=1e-12)
        assert value_of(of_task, name="margin") == pytest.approx(ranked[-1] - ranked[-2], abs=1e-12)
        assert value_of(of_task, name="candidate_mass") == pytest.approx(
            sum(math.exp(e["log_prob"]) for e in entries)
        )


def test_attention_to_a_tool_is_the_eager_pattern_summed_over_its_description(runs, measured):
    frame = of(measured["tool"], task_id="t1")
    record = runs["tool"]["t1"].record
    row = eager_pattern(record)[:, :, record["n_prompt"] - 1]
    span = {s["label"]: slice(s["start"], s["end"]) for s in record["spans"]}
    inside = torch.cat([row[..., span[f"tool:{t['name']}"]] for t in TOOLS], -1).sum(-1)
    for definition in TOOLS:
        where = span[f"tool:{definition['name']}"]
        mass, length = row[..., where].sum(-1), where.stop - where.start
        rows = of(frame, tool=definition["name"], part=None)
        for layer in range(4):
            by_head = of(rows, name="attention", layer=layer)
            for head in range(6):
                assert value_of(by_head, head=head) == pytest.approx(float(mass[layer, head]), abs=1e-5)
            assert value_of(by_head, head=None) == pytest.approx(float(mass[layer].mean()), abs=1e-5)
            rate = value_of(rows, name="attention_rate", layer=layer, head=None)
            assert rate == pytest.approx(float(mass[layer].mean()) / length, abs=1e-6)
            share = float((mass[layer] / inside[layer]).mean())
            assert value_of(rows, name="attention_restricted", layer=layer, head=None) == pytest.approx(
                share, abs=1e-4
            )
        overall = value_of(rows, name="attention", layer=None)
        assert overall == pytest.approx(float(mass.mean()), abs=1e-5)


def attended(right: list, chosen: str | None, chosen_tool: str, most: str | None = None) -> Any:
    task = planted_task("t", dict.fromkeys(["a", "b", "c", None], -1.0), right)
    record = task.record | {"chosen": chosen, "chosen_tool": chosen_tool}
    return tool.choice._AttentionToTools(choice_of(record), most)


def test_shares_and_baselines_of_hand_made_choices():
    tasks = [
        attended(["a"], "a", "a", "b"),
        attended(["b", "c"], None, "c", "c"),
        attended([None], None, "a", None),
        attended(["c"], "b", "b", "b"),
    ]
    by_name = {row.name: row for row in tool.choice._whole_run(tasks)}
    expected = {
        "accuracy": (2 / 4, 4), "baseline_first": (1 / 4, 4), "baseline_no_tool": (1 / 4, 4),
        "baseline_uniform": ((1 + 2 + 1 + 1) / 4 / 4, 4), "accuracy_chosen_tool": (2 / 3, 3),
        "baseline_first_tool": (1 / 3, 3), "baseline_uniform_tool": ((1 + 2 + 1) / 3 / 3, 3),
        "attention_agreement": (2 / 3, 3), "baseline_agreement": (1 / 3, 3),
    }  # fmt: skip
    assert {name: (row.value, row.n) for name, row in by_name.items()} == {
        name: (pytest.approx(value), n) for name, (value, n) in expected.items()
    }
    assert (by_name["accuracy"].low, by_name["accuracy"].high) == intervals.wilson(0.5, 4)
    assert by_name["baseline_uniform"].low is None


def test_the_runs_accuracy_is_the_mean_score(runs, measured):
    scores = [task.record["score"] for task in runs["tool"]]
    assert value_of(measured["tool"], task_id="", name="accuracy") == pytest.approx(np.mean(scores))


# -- prompting ----------------------------------------------------------------------------------------------------------


def test_shifts_of_the_first_answer_token_agree_with_scipy(runs, measured):
    frame = measured["prompting"]
    for task in runs["prompting"]:
        p, q = (scipy.special.softmax(task[f"{v}/logits"][0].double().numpy()) for v in ("told", "base"))
        rows = of(frame, task_id=task.id, variant="told")
        assert value_of(rows, name="kl") == pytest.approx(rel_entr(p, q).sum(), abs=1e-9)
        assert value_of(rows, name="kl_reverse") == pytest.approx(rel_entr(q, p).sum(), abs=1e-9)
        assert value_of(rows, name="js") == pytest.approx(jensenshannon(p, q) ** 2, abs=1e-9)
        assert value_of(rows, name="tv") == pytest.approx(np.abs(p - q).sum() / 2, abs=1e-9)
        change = scipy.stats.entropy(p) - scipy.stats.entropy(q)
        assert value_of(rows, name="entropy_change") == pytest.approx(change, abs=1e-9)
        odds = []
        for variant in ("told", "base"):
            entries = task.record["passages"][variant]["choice_probabilities"]
            share = next(e["probability"] for e in entries if e["choice"] == " bc")
            odds.append(math.log(share / (1 - share)))
        assert value_of(rows, name="log_odds_shift") == pytest.approx(odds[0] - odds[1], abs=1e-6)


def test_a_variant_that_adds_nothing_shifts_nothing(measured):
    rows = of(measured["prompting"], variant="same")
    shifts = rows[rows.name.isin(rows.name[rows.task_id != ""]) & (rows.name != "target_rank")]
    assert len(shifts) == 4 * 9
    assert shifts.value.abs().max() < 1e-6
    assert of(measured["prompting"], variant="base", name="kl").empty


def test_means_of_few_tasks_have_their_n_and_no_interval(measured):
    values = of(measured["prompting"], variant="told", name="kl")
    mean = of(values, task_id="").iloc[0]
    per_task = values[values.task_id != ""].value
    assert mean.value == pytest.approx(per_task.mean())
    assert mean.n == 3 and np.isnan(mean.low) and np.isnan(mean.high)
    accuracy = of(measured["prompting"], variant="told", name="accuracy").iloc[0]
    assert (accuracy.low, accuracy.high) == pytest.approx(intervals.wilson(accuracy.value, 3))
    assert value_of(measured["prompting"], name="baseline_uniform") == pytest.approx(1 / 3)


def test_without_logits_only_the_choices_shift(tmp_path):
    frame = to_table(prompting.measures(make(tmp_path, "prompting", capture="none"))).to_pandas()
    of_choices = {"log_odds_shift", "choice_kl", "choice_tv", "answer_log_prob_shift"}
    assert set(frame.name) == of_choices | {"accuracy", "baseline_uniform"}


# -- cot ------------------------------------------------------------------------------------------------------------------


def positions(record: dict[str, Any], label: str) -> list[int]:
    return [p for s in record["spans"] if s["label"] == label for p in range(s["start"], s["end"])]


def reader(label: str) -> dict[str, Any]:
    step = int(label[5:]) if label != "answer" else None
    return {"step": step, "reader": None if step else "answer"}


@pytest.mark.parametrize("task_id", ["c1", "c2"])
def test_read_mass_is_the_slow_sum_over_the_eager_pattern(runs, measured, task_id):
    record = runs["cot"][task_id].record
    frame = of(measured["cot"], task_id=task_id, name="read_mass")
    alpha = eager_pattern(record)
    labels = list(dict.fromkeys(span["label"] for span in record["spans"]))
    steps = [label for label in labels if label.startswith("step:")]
    assert len(steps) == len(record["steps"])
    for label in [*steps, *(["answer"] if record["answer"] is not None else [])]:
        # The row before a token emitted it.
        emitting = [p - 1 for p in positions(record, label)]
        rows = of(frame, **reader(label))
        total = 0.0
        for source in labels:
            seen = [j for j in positions(record, source) if j <= max(emitting)]
            of_source = of(rows, span=source)
            if not seen:
                assert of_source.empty
                continue
            for layer in range(4):
                slow = [
                    sum(float(alpha[layer, head, row, j]) for j in seen if j <= row)
                    for head in range(6)
                    for row in emitting
                ]
                assert value_of(of_source, layer=layer) == pytest.approx(np.mean(slow), abs=1e-5)
            overall = of(of_source, layer=None).iloc[0]
            assert overall.n == 4 * 6 * len(emitting)
            total += overall.value
        assert total == pytest.approx(1, abs=1e-4)


def test_read_norm_is_the_norm_of_the_written_read_of_each_source(runs, measured):
    task = runs["cot"]["c1"]
    record, layer, label, source = task.record, 2, "step:2", "question"
    alpha = eager_pattern(record)[layer]
    values = task["values"][layer].double().repeat_interleave(3, 0)
    w_o = tiny("tiny-llama").hf.model.layers[layer].self_attn.o_proj.weight.detach().double()
    sizes = []
    for head in range(6):
        for row in (p - 1 for p in positions(record, label)):
            written = sum(
                (alpha[head, row, j] * values[head, j] for j in positions(record, source)),
                torch.zeros(8).double(),
            )
            sizes.append(float((w_o[:, 8 * head : 8 * head + 8] @ written).norm()))
    norm = value_of(
        of(measured["cot"], task_id="c1", name="read_norm", layer=layer, span=source), **reader(label)
    )
    assert norm == pytest.approx(np.mean(sizes), rel=1e-4)


def test_memory_bytes_are_the_bytes_of_the_stored_keys_and_values(runs, measured):
    for task in runs["cot"]:
        rows = of(measured["cot"], task_id=task.id, name="memory_bytes")
        keys, values = task["keys"], task["values"]
        assert rows.value.sum() == keys.nbytes + values.nbytes
        where = positions(task.record, "step:1")
        assert value_of(rows, step=1) == keys[:, :, where].nbytes + values[:, :, where].nbytes


def test_the_reads_are_rebuilt_from_the_saved_memory(runs, measured):
    errors = of(measured["cot"], name="reconstruction_error")
    assert len(errors) == 2 * 4
    assert 0 < errors.value.max() < 1e-5


@pytest.mark.parametrize("name", ["tiny-gemma2", "tiny-mistral", "tiny-neox"])
def test_the_reads_are_rebuilt_with_a_softcap_a_window_or_rotary_parts(tmp_path, name):
    frame = to_table(cot.measures(make(tmp_path, "cot", name))).to_pandas()
    assert of(frame, name="reconstruction_error").value.max() < 1e-5


def test_the_rebuilding_fails_for_heads_grouped_the_wrong_way_round(runs, monkeypatch):
    """`repeat` gives query head h the kv_head h % n, where the model uses h // (heads / n)."""

    right = reads.pattern

    def wrong(queries, keys, positions, layer):
        return right(queries, keys.repeat(3, 1, 1), positions, layer)

    layer = reads.LayerAttention(**runs["cot"].run["model"]["attention"][0])
    task = runs["cot"]["c1"]
    assert cot.reconstruction_error(task, 0, layer) < 1e-5
    monkeypatch.setattr("probe.maths.reads.pattern", wrong)
    assert cot.reconstruction_error(task, 0, layer) > 1e-2


def test_the_rebuilding_fails_for_a_wrong_scale(runs):
    layer = reads.LayerAttention(scale=2 * runs["cot"].run["model"]["attention"][0]["scale"])
    assert cot.reconstruction_error(runs["cot"]["c1"], 0, layer) > 1e-2


def test_without_the_memory_there_is_no_reconstruction_and_without_reads_no_matrix(tmp_path):
    frame = to_table(cot.measures(make(tmp_path, "cot", capture="attn_to_spans"))).to_pandas()
    assert set(frame.name) == {
        "read_mass",
        "read_origin",
        "read_distance",
        "memory_lifetime",
        "span_tokens",
        "memory_bytes",
        "accuracy",
    }


def test_layers_keep_their_numbers_when_only_some_are_captured(tmp_path, runs, measured):
    run = make(tmp_path, "cot", layers="1,3")
    frame = to_table(cot.measures(run)).to_pandas()
    rows = of(frame, task_id="c1", name="read_mass", step=1, span="question")
    full = of(measured["cot"], task_id="c1", name="read_mass", step=1, span="question")
    assert sorted(rows.layer.dropna()) == [1, 3]
    assert value_of(rows, layer=3) == pytest.approx(value_of(full, layer=3), abs=1e-6)
    assert of(frame, name="reconstruction_error").value.max() < 1e-5
