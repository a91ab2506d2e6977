"""Captures made smaller by choice hold what the whole ones hold, and what they lack is absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import probe
from probe.errors import UsageError
from probe.harness.dryrun import dry_run
from probe.prompts import prompt_of_tokens

COT = {
    "kind": "cot",
    "question": "A crate holds 3 rows of 4 jars. How many jars?",
    "steps": ["Each row has 4 jars.", "There are 3 rows.", "3 times 4 is 12."],
    "answer": 12,
}
TOOL = {
    "kind": "tool_selection",
    "input": "What is 3 times 4?",
    "tools": [
        {"name": name, "description": f"A {name}.", "parameters": {"type": "object", "properties": {}}}
        for name in ("calculator", "calendar", "weather")
    ],
    "target": "calculator",
}
TASKS = [COT | {"id": "chain"}, TOOL | {"id": "tool"}, TOOL | {"id": "again", "input": "And of 5 and 6?"}]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """A run of TASKS by its options, made once."""
    runs: dict[str, probe.runs.Run] = {}

    def make(tasks=TASKS, **options):
        key = json.dumps([tasks, options])
        if key not in runs:
            out = tmp_path_factory.mktemp("smaller") / "run"
            common = {
                "model": "random:tiny-llama",
                "capture": "all",
                "max_new_tokens": 6,
                "reasoning": "reference",
            }
            runs[key] = probe.run(tasks, out=out, **common | {"analyze": False} | options)
        return runs[key]

    return make


READS = ("read_mass", "read_norm", "read_origin", "read_distance", "memory_lifetime", "span_tokens")
ROW_SITES = ("resid_post", "queries", "z", "attn_to_spans", "value_to_spans")


@pytest.mark.parametrize("rows", ["generated", "decision", "spans", "steps", "decision,spans"])
def test_the_rows_of_each_choice_are_those_of_a_run_that_keeps_every_position(run_of, rows):
    whole, some = run_of(rows="all"), run_of(rows=rows)
    for task in whole:
        kept = some[task.id]
        record = kept.record
        spans, n_run = record["spans"], record["n_prompt"] + record["n_new"] - 1
        ends = {
            word: {
                min(s["end"], n_run) - 1
                for s in spans
                if s["label"].startswith(label) and s["label"] != "other"
            }
            for word, label in (("spans", ""), ("steps", "step:"))
        }
        wanted = set(task["decisions"].tolist())
        for word in rows.split(","):
            wanted |= ends.get(word, set())
        if rows == "generated":
            wanted = set(range(record["n_prompt"] - 1, n_run))
        assert kept["rows"].tolist() == sorted(wanted), task.id
        for site in ROW_SITES:
            axis = kept.axes(site).index("row")
            expected = task[site].index_select(axis, torch.tensor(sorted(wanted)))
            torch.testing.assert_close(kept[site], expected, rtol=1e-4, atol=1e-5)
        for site in ("keys", "resid_span_mean", "logits", "log_probs", "decisions"):
            torch.testing.assert_close(kept[site], task[site], rtol=1e-4, atol=1e-5)


def test_a_run_of_the_decisions_alone_has_every_measure_that_reads_them_and_says_which_it_lacks(run_of):
    from probe.analyzers import analyze, not_captured

    whole, some = run_of(rows="generated"), run_of(rows="decision")
    for run in (whole, some):
        analyze(run)
    assert not not_captured(whole)
    lacking = not_captured(some)
    assert len(lacking) == 1 and "--rows generated: no read_mass" in lacking[0], lacking
    place = ["task_id", "analyzer", "name", *probe.runs.AXES]
    full, small = (run.measures().set_index(place)["value"] for run in (whole, some))
    kept = full[~full.index.get_level_values("name").isin(READS)]
    assert not set(small.index.get_level_values("name")) & set(READS)
    # It is the largest over the rows that there are.
    kept, small = (rows.drop("reconstruction_error", level="name").sort_index() for rows in (kept, small))
    assert small.index.equals(kept.index), kept.index.symmetric_difference(small.index)
    assert small.to_numpy() == pytest.approx(kept.to_numpy(), rel=1e-3, abs=1e-4)


def test_a_dry_run_says_no_less_than_each_choice_of_rows_takes(run_of, tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    options = {"model": "random:tiny-llama", "capture": "all", "max_new_tokens": 6, "reasoning": "reference"}
    sizes = dry_run(file, None, options)["by_choice"]["rows"]
    for rows, size in sizes.items():
        taken = sum(f.stat().st_size for f in run_of(rows=rows).path.glob("tasks/*/*/*"))
        assert taken <= size <= 1.5 * taken, rows
    assert sizes["decision"] < sizes["steps"] < sizes["spans"] < sizes["generated"] < sizes["all"]


def test_rows_that_nobody_knows_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(UsageError, match="'desicion' is none of generated, all, decision, spans, steps"):
        probe.run(TASKS, model="random:tiny-llama", out=tmp_path / "run", rows="desicion")
    with pytest.raises(UsageError, match="both say which positions have a row"):
        probe.run(TASKS, model="random:tiny-llama", out=tmp_path / "two", rows="decision", capture="z:all")


CALL = {"name": "calculator", "arguments": "{}"}
PARALLEL = {
    "id": "log",
    "kind": "replay",
    "messages": [
        {"role": "user", "content": "What is 3 times 4, and 5 times 6, and 7 times 8, and 9 times 9?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": f"call{n:05}", "type": "function", "function": CALL} for n in range(4)],
        },
        *(
            {"role": "tool", "tool_call_id": f"call{n:05}", "name": "calculator", "content": str(n)}
            for n in range(4)
        ),
        {"role": "assistant", "content": "12, 30, 56 and 81."},
    ],
    "tools": TOOL["tools"],
}


@pytest.mark.parametrize("rows", ["spans", "steps"])
def test_rows_are_bounded_where_the_spans_of_what_is_emitted_are_not_known_or_share_labels(
    run_of, rows, tmp_path
):
    tasks = [PARALLEL, COT | {"id": "free"}]
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    options = {"model": "random:tiny-llama", "capture": "all", "max_new_tokens": 40, "rows": rows}
    predicted = dry_run(file, None, options)
    taken = run_of(tasks, max_new_tokens=40, rows=rows, reasoning="generate").path.glob("tasks/*/*/*")
    assert sum(path.stat().st_size for path in taken) <= predicted["disk_bytes"]


def test_every_shipped_task_file_has_a_dry_run():
    for file in sorted((Path(__file__).parent.parent / "tasks").glob("*.jsonl")):
        predicted = dry_run(file, None, {"model": "random:tiny-llama", "limit": "1"})
        assert predicted["disk_bytes"] > 0, file.name


def test_free_reasoning_may_have_a_step_in_every_token():
    from probe.capture import CaptureSpec, Reasoning
    from tests.conftest import tiny

    model = tiny("tiny-llama")
    prompt = prompt_of_tokens(list(range(5, 25)), model.codec)
    spec = CaptureSpec.parse("all", None, 2, memory=True, rows="steps")
    assert spec.n_rows(prompt, Reasoning().span_ends(prompt), 12, 2) == 12
    assert spec.n_rows(prompt, prompt.spans, 12, 2) == 3
