"""The command line from outside: exit codes, streams, options, interruption, and what a terminal is shown."""

from __future__ import annotations

import copy
import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

import probe
from probe.api import run as run_tasks
from probe.cli import console, main
from tests.clock import within
from tests.conftest import tiny
from tests.test_prompts import HERMES

ROOT = Path(__file__).parent.parent
MODEL = ("--model", "random:tiny-llama")
TOOLS = [
    {
        "name": "calc",
        "description": "Adds numbers.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
    },
    {"name": "search", "description": "Finds pages.", "parameters": {"type": "object", "properties": {}}},
]
PROMPTING = {
    "id": "p1",
    "kind": "prompting",
    "input": "hot ->",
    "variants": [{"name": "few", "examples": [{"input": "up ->", "output": " down"}]}],
    "choices": [" cold", " warm"],
    "target": " cold",
}
TOOL = {"id": "t1", "kind": "tool_selection", "input": "What is 2 + 2?", "tools": TOOLS, "target": "calc"}
NO_TOOL = {"id": "t2", "kind": "tool_selection", "input": "Hello!", "tools": TOOLS[:1], "target": None}
COT = {"id": "c1", "kind": "cot", "question": "2 + 2?", "answer": 4, "steps": ["2 + 2 = 4.", "So four."]}
ALL = [PROMPTING, TOOL, NO_TOOL, COT]


def write(path: Path, tasks) -> Path:
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return path


def call(*args: object, code: int = 0) -> Result:
    """Run probe in this process and check its exit code; no error may be a traceback."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    assert "Traceback" not in result.stderr
    return result


def run(tasks: Path, out: Path, *options: object, code: int = 0) -> Path:
    """A quick run without analyses; returns its directory."""
    call("run", tasks, *MODEL, "--out", out, "--no-analyze", "--max-new-tokens", 4, *options, code=code)
    return out


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("tasks") / "all.jsonl", ALL)


@pytest.fixture(scope="module")
def done(tasks, tmp_path_factory) -> Path:
    """One run of every kind, analyzed."""
    out = tmp_path_factory.mktemp("runs") / "done"
    call("run", tasks, *MODEL, "--out", out, "--max-new-tokens", 6)
    return out


# -- what run prints and leaves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ALL, ids=lambda task: task["id"])
def test_every_kind_runs_and_prints_one_json_document(task, tmp_path):
    path = write(tmp_path / "one.jsonl", [task])
    result = call("run", path, *MODEL, "--out", tmp_path / "run", "--max-new-tokens", 6, "--json")
    document = json.loads(result.stdout)
    assert document["run"] == str(tmp_path / "run")
    assert document["counts"] == {"ok": 1}
    record = probe.open(document["run"])[task["id"]].record
    assert (record["kind"], record["status"]) == (task["kind"], "ok")
    assert record["target"] == task.get("target", task.get("answer"))
    for passage in record.get("passages", {"main": record}).values():
        assert passage["n_prompt"] + passage["n_new"] == len(passage["token_ids"])
        assert passage["finish_reason"] in ("eos", "length", "stop")
        assert passage["spans"][0]["label"] == "bos"
    assert call("verify", document["run"]).stdout.startswith("complete")


def test_the_last_line_of_stdout_is_the_run_directory_and_progress_is_on_stderr(tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("run", tasks, *MODEL, "--no-analyze", "--max-new-tokens", 2)
    (line,) = result.stdout.splitlines()
    assert Path(line).parent == Path("runs")
    assert (tmp_path / line / "manifest.json").is_file()
    assert "4/4 tasks" in result.stderr
    assert "\x1b" not in result.stderr
    assert line in call("ls", "--json").stdout
    assert Path(line).name in call("ls").stdout


def test_a_wrong_answer_is_not_a_failure(done):
    records = [task.record for task in probe.open(done)]
    assert min(record["score"] for record in records) == 0.0
    assert probe.open(done).run["status"] == "done"


def test_run_json_says_what_was_run(done, tasks):
    header = probe.open(done).run
    assert header["task_file"]["path"] == str(tasks)
    assert header["model"]["name"] == "random:tiny-llama"
    assert header["model"]["n_params"] == tiny("tiny-llama").facts.n_params
    assert len(header["model"]["attention"]) == header["model"]["n_layers"] == 4
    for key in (
        "schema",
        "argv",
        "seed",
        "template",
        "call_prefix",
        "no_tool",
        "generation",
        "capture",
        "packages",
        "git_commit",
    ):
        assert key in header


@pytest.mark.parametrize(
    "args", [("ls", "{runs}"), ("show", "{run}"), ("show", "{run}", "t1"), ("verify", "{run}"), ("diff", "{run}", "{run}"),
             ("pack", "{run}", "--dry-run"), ("unpack", "{run}", "--dry-run"),
             ("analyze", "{run}"), ("report", "{run}"), ("models",), ("doctor",), ("tasks", "lint", "{tasks}"),
             ("tools", "list", "--tools", "{tools}"), ("export", "{run}", "--format", "jsonl", "-o", "{out}")],
    ids=lambda args: " ".join(args[:2]),
)  # fmt: skip
def test_json_on_every_command_is_one_document_and_the_plain_form_is_text(args, done, tasks, tmp_path):
    catalogue = tmp_path / "tools.json"
    catalogue.write_text(json.dumps(TOOLS))
    places = {"run": done, "runs": done.parent, "tasks": tasks, "tools": catalogue, "out": tmp_path / "out"}
    args = [arg.format(**places) for arg in args]
    json.loads(call(*args, "--json").stdout)
    assert call(*args).stdout.strip()


# -- exit codes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("--limit", "0"), ("--limit", "5-2"), ("--limit", "x"), ("--limit", "99-"), ("--limit", "9-9"),
        ("--task-id", "t"), ("--layers", "99"), ("--layers", "x"), ("--layers", "3-1"), ("--capture", "resid"),
        ("--capture", "resid_post:some"), ("--max-bytes", "0"), ("--max-bytes", "10"), ("--batch-size", "0"),
        ("--batch-size", "²"), ("--temperature", "-1"), ("--temperature", "nan"), ("--temperature", "inf"),
        ("--temperature", "1e-300"), ("--top-p", "0"), ("--top-p", "nan"), ("--top-p", "1.5"), ("--top-k", "0"),
        ("--max-new-tokens", "0"), ("--dtype", "int8"), ("--device", "tpu"), ("--device", "cuda:99"),
        ("--reasoning", "none"), ("--no-such-option",), ("extra",),
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry-run"])
def test_options_that_make_no_sense_are_exit_2_and_nothing_is_written(options, dry, tasks, tmp_path):
    if dry and options[0] == "--device":
        pytest.skip("a dry run uses no device")
    result = call("run", tasks, *MODEL, "--out", tmp_path / "run", *options, *dry, code=2)
    assert result.stderr.strip()
    assert not (tmp_path / "run").exists()


def test_a_bad_task_file_is_exit_3_with_every_place_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.jsonl"
    lines = [
        json.dumps(COT),
        "{",
        json.dumps(COT),
        json.dumps(TOOL | {"tools": ["nowhere"]}),
        json.dumps(TOOL | {"target": "mail"}),
    ]
    bad.write_text("\n".join(lines))
    for dry in ((), ("--dry-run",)):
        result = call("run", bad, *MODEL, *dry, code=3)
        for line in (2, 3, 4, 5):
            assert f"{bad}:{line}:" in result.stderr
        assert all(
            part.split(":")[2].isdigit() for part in result.stderr.splitlines() if part.startswith(str(bad))
        )
        assert result.stdout == ""
    call("run", tmp_path / "missing.jsonl", *MODEL, code=3)
    call("run", write(tmp_path / "ok.jsonl", ALL), *MODEL, "--tools", tmp_path / "none.json", code=3)
    (tmp_path / "empty.jsonl").write_text("\n")
    call("run", tmp_path / "empty.jsonl", *MODEL, code=3)
    call("tasks", "lint", bad, code=3)
    assert not (tmp_path / "runs").exists()


def test_a_run_directory_that_is_not_empty_is_exit_4_and_stays_as_it_was(tasks, done, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    for dry in ((), ("--dry-run",)):
        assert "holds a run already" in call("run", tasks, *MODEL, "--out", done, *dry, code=4).stderr
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before
    (tmp_path / "file").touch()
    call("run", tasks, *MODEL, "--out", tmp_path / "file", code=4)
    (tmp_path / "empty").mkdir()
    run(tasks, tmp_path / "empty", "--task-id", "p1")
    for command in ("show", "verify", "resume", "analyze", "report"):
        call(command, tmp_path / "nowhere", code=4)
    call("diff", done, tmp_path / "nowhere", code=4)


def test_a_damaged_artifact_is_exit_5_and_named(tasks, tmp_path):
    out = run(tasks, tmp_path / "run", "--task-id", "p1")
    (victim,) = out.glob("tasks/*/*/tensors.safetensors")
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    result = call("verify", out, code=5)
    assert "tensors.safetensors" in result.stdout
    assert json.loads(call("verify", out, "--json", code=5).stdout)["problems"]


@pytest.mark.timing
def test_a_model_that_cannot_be_had_is_exit_6_with_what_to_do_in_two_seconds(tasks, tmp_path):
    command = [sys.executable, "-m", "probe", "run", str(tasks), "--model", "gemma-2b", "--offline"]
    seconds = []
    for _ in range(3):  # the machine may be busy: the best of three
        began = time.monotonic()
        result = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True)
        seconds.append(time.monotonic() - began)
        assert result.returncode == 6
        assert not (tmp_path / "run").exists()
        if within(2, seconds[-1]):
            break
    assert within(2, min(seconds))
    for word in ("licence", "hf auth login", "--model PATH", "smollm2-135m", "random:gemma-2b"):
        assert word in result.stderr
    assert "\x1b" not in result.stderr
    call("run", tasks, "--model", "random:nothing", code=6)
    call("run", tasks, "--model", "gemma-2b", "--offline", "--dry-run", code=6)


def test_what_is_not_in_a_run_is_a_usage_error_that_names_what_is(done):
    assert "'t1'" in call("show", done, "tt1", code=2).stderr


# -- choosing tasks, layers, sites -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        (("--limit", "2"), ["p1", "t1"]),
        (("--limit", "2-3"), ["t1", "t2"]),
        (("--limit", "99"), ["p1", "t1", "t2", "c1"]),
        (("--task-id", "c1", "--task-id", "p1"), ["p1", "c1"]),
        (("--task-id", "c1", "--task-id", "p1", "--limit", "1"), ["p1"]),
    ],
)
def test_tasks_are_chosen_by_limit_and_id(options, ids, tasks, tmp_path):
    out = run(tasks, tmp_path / "run", "--capture", "none", *options)
    opened = probe.open(out)
    assert opened.task_ids == ids
    assert opened.manifest["complete"]


READS = ("attn_to_spans", "value_to_spans", "attn_to_parts", "value_to_parts")


@pytest.mark.parametrize(
    ("capture", "sites"),
    [
        ("none", set()),
        ("logits", {"logits"}),
        ("resid_post, keys", {"resid_post", "keys"}),
        (
            "default",
            {"resid_post", "resid_span_mean", *READS, "logits", "log_probs"},
        ),
        (
            "default,queries",
            {
                "resid_post",
                "resid_span_mean",
                *READS,
                "logits",
                "log_probs",
                "queries",
            },
        ),
        ("attn_to_spans", {"attn_to_spans"}),
    ],
)
def test_only_the_sites_asked_for_are_there(capture, sites, tasks, tmp_path):
    out = run(tasks, tmp_path / "run", "--capture", capture, "--task-id", "t1")
    assert set(probe.open(out)["t1"].keys()) == sites | {"token_ids", "rows", "decisions"}


def test_the_default_keeps_the_whole_memory_for_chains_of_thought_alone(done):
    opened = probe.open(done)
    memory = {"keys", "values", "queries", "z"}
    assert memory <= set(opened["c1"].keys())
    assert not memory & set(opened["t1"].keys())
    assert all("/" in name for name in opened["p1"])


def test_chosen_layers_hold_the_numbers_of_a_full_capture(tasks, tmp_path):
    few = probe.open(run(tasks, tmp_path / "few", "--layers", "0,-1", "--task-id", "t1"))
    every = probe.open(run(tasks, tmp_path / "every", "--task-id", "t1"))
    assert few.run["capture"]["tool_selection"]["layers"] == [0, 3]
    assert torch.equal(few["t1"]["resid_post"], every["t1"]["resid_post"][[0, 3]])
    call("verify", tmp_path / "few")


def test_every_position_is_captured_where_it_is_asked_for(tasks, tmp_path):
    task = probe.open(run(tasks, tmp_path / "run", "--capture", "resid_post:all", "--task-id", "t1"))["t1"]
    record = task.record
    assert task["rows"].tolist() == list(range(record["n_prompt"] + record["n_new"] - 1))
    assert task["resid_post"].shape[1] == len(task["rows"])


# -- sizes -------------------------------------------------------------------------------------------------------


def test_a_run_past_max_bytes_is_refused_with_the_sites_that_cost_most(tasks, tmp_path):
    for dry in ((), ("--dry-run",)):
        result = call("run", tasks, *MODEL, "--out", tmp_path / "run", "--max-bytes", 5000, *dry, code=2)
        assert "more than --max-bytes 5,000" in result.stderr
        for word in ("resid_post", "attn_to_spans", "--capture", "--layers", "--limit"):
            assert word in result.stderr
    assert not (tmp_path / "run").exists()


def bytes_of_tasks(path: Path) -> int:
    return sum(file.stat().st_size for file in (path / "tasks").rglob("*") if file.is_file())


@pytest.mark.parametrize("capture", ["default", "all", "all:all", "none"])
def test_the_predicted_bytes_are_an_upper_bound(capture, tasks, tmp_path):
    options = ("--capture", capture, "--max-new-tokens", 12)
    document = json.loads(call("run", tasks, *MODEL, *options, "--dry-run", "--json").stdout)
    run(tasks, tmp_path / "run", *options)
    assert bytes_of_tasks(tmp_path / "run") <= document["disk_bytes"]
    run(tasks, tmp_path / "fits", *options, "--max-bytes", document["disk_bytes"])
    assert document["prompt_tokens"] == sum(
        passage["n_prompt"]
        for task in probe.open(tmp_path / "run")
        for passage in task.record.get("passages", {"main": task.record}).values()
    )


@pytest.mark.parametrize(
    "capture", ["default", "all", pytest.param("log_probs,logits", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["tools", "prompting", "cot"])
def test_the_predicted_bytes_are_within_five_percent_where_nothing_ends_early(name, capture, tmp_path):
    """On the shipped tasks, those that generated as many tokens as they may."""
    path = ROOT / "tasks" / f"{name}.jsonl"
    options = ("--capture", capture, "--max-new-tokens", 16, "--limit", 8, "--reasoning", "reference")
    run(path, tmp_path / "run", *options)
    full = []
    for task in probe.open(tmp_path / "run"):
        passages = task.record.get("passages", {"main": task.record}).values()
        if {passage["finish_reason"] for passage in passages} == {"length"}:
            full.append(task.id)
    assert len(full) > 2
    chosen = [word for key in full for word in ("--task-id", key)]
    options = options[:4] + options[6:]
    size = bytes_of_tasks(Path(run(path, tmp_path / "full", *options, *chosen)))
    document = json.loads(call("run", path, *MODEL, *options, *chosen, "--dry-run", "--json").stdout)
    assert size <= document["disk_bytes"] <= 1.05 * size


def test_a_dry_run_loads_no_weights_and_shows_the_first_prompt_and_the_sizes(
    tasks, done, tmp_path, monkeypatch, smollm2
):
    def weights(*_, **__):
        raise AssertionError("a dry run loaded weights")

    monkeypatch.setattr("probe.model.shapes.random_model", weights)
    monkeypatch.setattr("probe.model.weights.load_weights", weights)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", weights)
    monkeypatch.chdir(tmp_path)
    result = call("run", tasks, *MODEL, "--task-id", "t1", "--dry-run")
    assert result.stdout.rstrip("\n") == probe.open(done)["t1"].record["prompt"]
    for word in ("tokens", "on disk", "in memory", "resid_post"):
        assert word in result.stderr
    assert list(tmp_path.iterdir()) == []
    for model in ("smollm2-135m", "random:gemma-2b", "random:gpt2"):
        document = json.loads(call("run", tasks, "--model", model, "--dry-run", "--json").stdout)
        assert document["n_tasks"] == 4
    assert document["memory_bytes"] > 4 * 124_439_808


# -- the same numbers --------------------------------------------------------------------------------------------


def completions(path: Path) -> list[list[int]]:
    texts = []
    for task in probe.open(path):
        for passage in task.record.get("passages", {"main": task.record}).values():
            texts.append(passage["token_ids"][passage["n_prompt"] :])
    return texts


def test_the_same_command_twice_is_equal_to_diff(tasks, done, tmp_path):
    call("run", tasks, *MODEL, "--out", tmp_path / "again", "--max-new-tokens", 6)
    assert "no difference" in call("diff", done, tmp_path / "again").stdout
    other = run(tasks, tmp_path / "gemma", "--model", "random:tiny-gemma")
    result = call("diff", done, other, code=1)
    assert "p1" in result.stdout
    assert json.loads(call("diff", done, other, "--json", code=1).stdout)["equal"] is False


def test_sampling_depends_on_seed_and_task_alone(tasks, tmp_path):
    sampled = ("--temperature", "0.8", "--max-new-tokens", 12)
    first = run(tasks, tmp_path / "a", *sampled, "--seed", 1)
    again = run(tasks, tmp_path / "b", *sampled, "--seed", 1)
    other = run(tasks, tmp_path / "c", *sampled, "--seed", 2)
    alone = run(tasks, tmp_path / "d", *sampled, "--seed", 1, "--batch-size", 1)
    four = run(tasks, tmp_path / "e", *sampled, "--seed", 1, "--batch-size", 4)
    assert completions(first) == completions(again) == completions(alone) == completions(four)
    for mine, others in zip(completions(first), completions(other), strict=True):
        assert mine != others
    call("diff", first, again)
    call("diff", alone, four)
    single = run(tasks, tmp_path / "f", *sampled, "--seed", 1, "--task-id", "c1")
    assert completions(single) == completions(first)[-1:]
    assert len({tuple(ids) for ids in completions(first)}) == len(completions(first))


def test_truncated_sampling_never_leaves_the_most_probable_tokens(tasks, tmp_path):
    greedy = run(tasks, tmp_path / "greedy", "--max-new-tokens", 8)
    top_1 = run(tasks, tmp_path / "top", "--max-new-tokens", 8, "--temperature", 2, "--top-k", 1)
    nucleus = run(tasks, tmp_path / "nucleus", "--max-new-tokens", 8, "--temperature", 2, "--top-p", 1e-9)
    assert completions(greedy) == completions(top_1) == completions(nucleus)


def test_log_probs_are_those_of_the_raw_model_also_when_sampling(tasks, tmp_path):
    out = run(tasks, tmp_path / "run", "--temperature", 1.7, "--top-k", 20, "--seed", 3, "--task-id", "t1")
    task, model = probe.open(out)["t1"], tiny("tiny-llama")
    ids, n_prompt = task.record["token_ids"], task.record["n_prompt"]
    with torch.no_grad():
        logits = model.hf(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[range(n_prompt - 1, len(ids) - 1), ids[n_prompt:]]
    assert torch.allclose(task["log_probs"], expected, atol=1e-4)


def test_reference_reasoning_is_forced_and_recorded(tasks, tmp_path):
    record = probe.open(run(tasks, tmp_path / "run", "--reasoning", "reference", "--task-id", "c1"))[
        "c1"
    ].record
    assert record["steps"] == COT["steps"]
    assert record["completion"].startswith("2 + 2 = 4.\nSo four.\nAnswer:")
    labels = [span["label"] for span in record["spans"]]
    assert labels.index("step:1") < labels.index("step:2")


def test_candidate_probabilities_of_a_real_model_stay_below_one(done):
    for task_id in ("t1", "t2"):
        record = probe.open(done)[task_id].record
        assert 0 < record["candidate_mass"] <= 1 + 1e-6
        assert sum(entry["probability"] for entry in record["tool_probabilities"]) == pytest.approx(1)


def test_through_a_template_that_shows_tools_the_numbers_are_those_of_plain_forwards(tmp_path):
    """A saved model whose template lists tools as Qwen's does: opener, candidates and no-tool by hand."""
    source = tiny("tiny-llama")
    source.hf.save_pretrained(tmp_path / "model")
    tokenizer = copy.deepcopy(source.tokenizer)
    tokenizer.chat_template = HERMES
    tokenizer.save_pretrained(tmp_path / "model")
    path = write(tmp_path / "t.jsonl", [TOOL, NO_TOOL | {"tools": TOOLS}])
    call("run", path, "--model", tmp_path / "model", "--out", tmp_path / "run", "--max-new-tokens", 6)
    opened = probe.open(tmp_path / "run")
    assert opened.run["no_tool"] == "complement"
    for task in opened:
        record = task.record
        ids, n_prompt = record["token_ids"], record["n_prompt"]
        opener = source.codec.encode(record["call_prefix"], markup=True)
        assert ids[n_prompt - len(opener) : n_prompt] == opener

        def log_prob(before: list[int], after: list[int]) -> float:
            with torch.no_grad():
                log_probs = source.hf(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
            return sum(float(log_probs[len(before) - 1 + i, token]) for i, token in enumerate(after))

        opener_log_prob = log_prob(ids[: n_prompt - len(opener)], opener)
        assert record["opener_log_prob"] == pytest.approx(opener_log_prob, abs=1e-4)
        *shown, nothing = record["tool_probabilities"]
        for entry, name in zip(shown, ("calc", "search"), strict=True):
            assert entry["tool"] == name
            assert source.codec.decode(entry["token_ids"]) == name + '"'
            expected = opener_log_prob + log_prob(ids[:n_prompt], entry["token_ids"])
            assert entry["log_prob"] == pytest.approx(expected, abs=1e-4)
        assert nothing["tool"] is None
        assert math.exp(nothing["log_prob"]) == pytest.approx(1 - math.exp(opener_log_prob), abs=1e-9)
        assert sum(entry["choice_probability"] for entry in shown) == pytest.approx(1)
        assert record["chosen"] is None  # a random model hardly ever opens a call
        assert record["chosen_tool"] in ("calc", "search")


# -- tasks that fail ---------------------------------------------------------------------------------------------


def test_a_task_that_turns_non_finite_names_its_layer_and_spares_the_others(tmp_path):
    model = probe.load("random:tiny-llama")
    marker = model.codec.encode("~")[0]
    path = write(tmp_path / "t.jsonl", [COT | {"id": "good"}, COT | {"id": "bad", "question": "~?"}, TOOL])
    poisoned: list[torch.Tensor] = []

    def watch(_module, inputs, _out):
        poisoned[:] = [inputs[0] == marker]

    def poison(_module, _inputs, out):
        hidden = out[0] if isinstance(out, tuple) else out
        hidden = hidden.masked_fill(poisoned[0][:, :, None], float("nan"))
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handles = [
        model.hf.get_input_embeddings().register_forward_hook(watch),
        model.blocks[2].register_forward_hook(poison),
    ]
    try:
        opened = run_tasks(path, model=model, out=tmp_path / "run", max_new_tokens=3)
    finally:
        for handle in handles:
            handle.remove()
    records = {task.id: task.record for task in opened}
    assert {key: record["status"] for key, record in records.items()} == {
        "good": "ok",
        "bad": "nonfinite",
        "t1": "ok",
    }
    assert "layer 2, in the prompt" in records["bad"]["error"]
    assert records["bad"]["target"] == 4
    assert opened.run["status"] == "failed"
    clean = run_tasks(path, model=model, out=tmp_path / "clean", max_new_tokens=3, analyze=False)
    assert clean["good"].record["token_ids"] == records["good"]["token_ids"]
    assert torch.allclose(clean["good"]["logits"], opened["good"]["logits"], atol=1e-5)
    assert "layer 2" in call("show", tmp_path / "run").stdout
    assert "layer 2" in call("show", tmp_path / "run", "bad").stdout
    call("verify", tmp_path / "run")
    call("diff", tmp_path / "clean", tmp_path / "run", code=1)
    # A resumed run whose tasks are all there is still one in which a task failed.
    (tmp_path / "run" / "manifest.json").unlink()
    call("resume", tmp_path / "run", code=1)
    assert probe.open(tmp_path / "run").run["status"] == "failed"


def test_a_prompt_that_cannot_show_its_task_fails_it_and_is_in_no_score(tmp_path):
    from probe.capture.model import CapturingModel
    from probe.model.names import Source
    from probe.model.shapes import byte_tokenizer, random_config

    config = random_config("tiny-gpt2")
    config.n_positions = 700
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config)
    model = CapturingModel(hf, byte_tokenizer(272), Source("short", "random", "short"), {"resolved": "short"})
    path = write(
        tmp_path / "t.jsonl", [TOOL | {"input": "long " * 300}, COT | {"question": "x" * 650}, PROMPTING]
    )
    opened = run_tasks(path, model=model, out=tmp_path / "run", analyze=False)
    statuses = {task.id: task.record["status"] for task in opened}
    assert statuses == {"t1": "error", "c1": "error", "p1": "ok"}
    for name in ("t1", "c1"):
        assert "tokens, the context has 700" in opened[name].record["error"]
        assert not {"score", "prompt", "chosen"} & opened[name].record.keys()
    assert opened.run["status"] == "failed"
    shown = call("show", tmp_path / "run").stdout
    assert "2 error" in shown


def test_whatever_a_model_writes_as_arguments_the_run_goes_on(tmp_path):
    """A scripted model calls a tool with numbers that JSON does not have."""
    model = probe.load("random:tiny-llama")
    script = model.codec.encode('calc", "arguments": {"x": NaN, "y": 1e999}}]')
    position = {"next": 0}

    def scripted(_module, _inputs, logits):
        if logits.shape[0] == 1 and logits.ndim == 2:
            logits = torch.full_like(logits, -20.0)
            logits[..., script[min(position["next"], len(script) - 1)]] = 20
            position["next"] += 1
        return logits

    path = write(tmp_path / "t.jsonl", [TOOL])
    handle = model.hf.get_output_embeddings().register_forward_hook(scripted)
    try:
        opened = run_tasks(path, model=model, out=tmp_path / "run", analyze=False, max_new_tokens=len(script))
    finally:
        handle.remove()
    record = opened["t1"].record
    assert record["status"] == "ok"
    assert record["called"] == "calc"
    assert "NaN" in record["completion"]


# -- resume ------------------------------------------------------------------------------------------------------

MANY = [PROMPTING | {"id": f"task {n:03}", "input": f"the word number {n} ->"} for n in range(120)]
MANY_OPTIONS = (
    *MODEL,
    "--no-analyze",
    "--capture",
    "resid_post,logits",
    "--max-new-tokens",
    8,
    "--batch-size",
    4,
)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> tuple[Path, Path]:
    """A long task file, and an uninterrupted run of it."""
    path = tmp_path_factory.mktemp("many")
    call("run", write(path / "many.jsonl", MANY), *MANY_OPTIONS, "--out", path / "whole")
    return path / "many.jsonl", path / "whole"


def interrupted(tasks: Path, out: Path, number: int) -> subprocess.CompletedProcess[str]:
    """Start a run in a process of its own and send it a signal when some of its tasks are committed."""
    command = [sys.executable, "-m", "probe", "run", tasks, *MANY_OPTIONS, "--out", out]
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("tasks/*/[!.]*"))) < 20:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def result_bytes(run: Path) -> dict[str, tuple[bytes, dict]]:
    """All that tasks left but for the time that they took."""
    opened = probe.open(run)
    return {
        task.id: (
            (task.path / "tensors.safetensors").read_bytes(),
            {key: value for key, value in task.record.items() if key != "seconds"},
        )
        for task in opened
    }


@pytest.mark.parametrize(
    ("number", "code", "status"),
    [
        pytest.param(signal.SIGKILL, -signal.SIGKILL, "started", id="kill -9"),
        pytest.param(signal.SIGINT, 130, "interrupted", id="interrupt", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_is_readable_at_once_and_resumes_to_the_same_result(
    number, code, status, many, tmp_path
):
    tasks, whole = many
    out = tmp_path / "run"
    ended = interrupted(tasks, out, number)
    assert ended.returncode == code
    assert "\x1b" not in ended.stderr
    assert "Traceback" not in ended.stderr
    opened = probe.open(out)
    assert opened.run["status"] == status
    assert 0 < len(opened) < len(MANY)
    assert opened.task_ids[0] in call("show", out).stdout
    document = json.loads(call("verify", out, "--json").stdout)
    assert (document["complete"], document["problems"]) == (False, [])
    call("diff", whole, out, code=1)
    left = len(MANY) - len(opened)
    resumed = call("resume", out, "--no-analyze")
    assert f"{left}/{left} tasks" in resumed.stderr
    assert resumed.stdout.splitlines()[-1] == str(out)
    assert call("verify", out).stdout.startswith("complete")
    assert result_bytes(out) == result_bytes(whole)
    assert probe.open(out).run["status"] == "done"
    # Again: nothing is left to do, and no model is loaded for it.
    assert "loading" not in call("resume", out, "--no-analyze").stderr


def lose(run: Path, *ids: str) -> Path:
    """A run as a kill leaves it: without its manifest and some of its tasks."""
    opened = probe.open(run)
    for path in [opened[name].path for name in ids]:
        shutil.rmtree(path)
    (run / "manifest.json").unlink()
    return run


def test_a_run_goes_on_wherever_it_is_from_what_it_keeps(tmp_path, monkeypatch):
    """Begun with relative paths, moved, renamed; the inputs are gone, and another folder has others."""
    begun, elsewhere = tmp_path / "begun", tmp_path / "elsewhere"
    (begun / "tasks").mkdir(parents=True)
    (begun / "tools").mkdir()
    (elsewhere / "tools").mkdir(parents=True)
    tiny("tiny-llama").hf.save_pretrained(begun / "model")
    tiny("tiny-llama").tokenizer.save_pretrained(begun / "model")
    (begun / "tools" / "a.json").write_text(json.dumps(TOOLS))
    (elsewhere / "tools" / "a.json").write_text(json.dumps([TOOLS[0] | {"description": "Multiplies."}]))
    write(begun / "tasks" / "t.jsonl", [TOOL | {"tools": ["calc", "search"]}, NO_TOOL])
    monkeypatch.chdir(begun)
    options = ("--no-analyze", "--max-new-tokens", 2, "--out", "run")
    call("run", "tasks/t.jsonl", "--model", "model", *options)
    shutil.copytree("run", tmp_path / "whole")
    (begun / "run").rename(elsewhere / "moved")
    for folder in ("tasks", "tools"):
        shutil.rmtree(begun / folder)
    write(elsewhere / "t.jsonl", [COT])
    monkeypatch.chdir(elsewhere)
    lose(Path("moved"), "t1")
    call("resume", "moved", "--no-analyze")
    assert result_bytes(Path("moved")) == result_bytes(tmp_path / "whole")
    call("analyze", "moved", "mask_all")
    assert set(probe.open("moved").table("interventions").experiment) == {"mask_all"}
    assert call("verify", "moved").stdout.startswith("complete: 0")
    (elsewhere / "moved" / "task_file.jsonl").write_text("")
    assert "task_file.jsonl: truncated" in call("verify", "moved", code=5).stdout
    for command in ("resume", "analyze"):
        assert "moved/task_file.jsonl: truncated" in call(command, "moved", code=5).stderr


def test_a_resume_refuses_what_a_run_does_not_keep_and_has_changed(tmp_path):
    file = tmp_path / "tools.py"
    file.write_text(
        'def half(x: float) -> float:\n    """Halves.\n\n    Args:\n        x: A number.\n    """\n    return x / 2\n'
    )
    agent = {"id": "a1", "kind": "agent", "input": "Halve 3.", "tools": ["half"]}
    out = run(write(tmp_path / "t.jsonl", [agent]), tmp_path / "run", "--tool-file", file)
    file.write_text(file.read_text() + "\n")
    assert "tools.py" in (error := call("resume", out, code=4).stderr)
    assert "have changed since" in error
    # A run of an earlier version, which keeps nothing.
    header = json.loads((out / "run.json").read_text())
    header = {key: value for key, value in header.items() if key not in ("inputs", "blake3")}
    header["status"] = "started"
    (out / "run.json").write_text(json.dumps(header))
    for name in ("task_file.jsonl", "catalogue.json", "manifest.json"):
        (out / name).unlink(missing_ok=True)
    (tmp_path / "t.jsonl").rename(tmp_path / "other.jsonl")
    assert "put it back" in call("resume", out, code=4).stderr
    write(tmp_path / "t.jsonl", [agent, COT])
    assert "the task file" in call("resume", out, code=4).stderr


def test_a_run_of_a_loaded_model_can_be_resumed_in_its_dtype(tasks, tmp_path):
    model = probe.load("random:tiny-llama", dtype="bfloat16")
    opened = run_tasks(tasks, model=model, out=tmp_path / "run", analyze=False, max_new_tokens=2)
    assert opened.run["options"]["dtype"] == opened.run["model"]["dtype"] == "bfloat16"
    call("resume", lose(tmp_path / "run", "t1"), "--no-analyze")
    assert probe.open(tmp_path / "run")["t1"].record["status"] == "ok"


# -- what a terminal is shown ------------------------------------------------------------------------------------

EVIL = "\x1b[2J\x1b]0;owned\x07 [bold red]markup[/x] [/] \u202ereversed\u202c \u200fmark \x9b31m \r overwritten \x00\x7f"


def test_hostile_text_of_tasks_and_models_is_inert_on_a_terminal(tmp_path):
    text = EVIL.replace("\x00", "")
    task = TOOL | {
        "id": text,
        "input": text,
        "tools": [TOOLS[0] | {"description": text}],
        "metadata": {text: text},
    }
    prompting = PROMPTING | {"id": "p", "input": text, "choices": [text, "b"], "target": text}
    path = write(tmp_path / "evil.jsonl", [task, prompting, COT | {"question": text}])
    results = [
        call("run", path, *MODEL, "--out", tmp_path / "run", "--max-new-tokens", 40, "--temperature", 1.5),
        call("show", tmp_path / "run"),
        call("show", tmp_path / "run", text),
        call("show", tmp_path / "run", "p"),
        call("show", tmp_path / "run", "c1"),
        call("show", tmp_path / "run", "c1", "--json"),
        call("run", path, *MODEL, "--dry-run"),
        call("tasks", "lint", path),
        call("ls", tmp_path),
        call("show", tmp_path / "run", text + "x", code=2),
        call("run", path, *MODEL, "--task-id", text + "x", code=2),
    ]
    for result in results:
        for stream in (result.stdout, result.stderr):
            assert all(c.isprintable() or c in "\n\t" for c in stream)
    assert "[bold red]markup[/x]" in results[2].stdout
    # One line a task: an id cannot fake another one.
    assert sum(line.startswith("\\x1b[2J") for line in results[1].stdout.splitlines()) == 1


def test_text_of_other_scripts_stays_readable():
    text = "Größe 日本語\u3000全角 naïve\u00a0café — “ok” 🙂\n\ttab"
    assert console.printable(text) == text


def test_tokens_before_the_first_task_give_no_time_left(monkeypatch, capsys):
    monkeypatch.setattr(console, "plain", lambda: True)
    with console.watched() as progress:
        progress.start(2)
        monkeypatch.setattr(progress, "_logged_at", float("-inf"))
        progress.done(100, 0)
        assert "left" not in capsys.readouterr().err
        progress.done(100)
    assert "1/2 tasks" in capsys.readouterr().err


def progress_on_a_terminal(monkeypatch, **environment: str) -> bytes:
    """What the progress of a run writes to a pseudo-terminal."""
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    master, slave = pty.openpty()
    with open(slave, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        with console.watched() as progress:
            progress.log("loading x")
            progress.start(2)
            for _ in range(2):
                progress.done(10)
            progress.log("analyzing")
    shown = b""
    with suppress(OSError), open(master, "rb", buffering=0) as reader:
        while piece := reader.read(1 << 12):
            shown += piece
    return shown


def test_progress_is_a_bar_on_a_terminal_and_plain_lines_elsewhere(monkeypatch):
    shown = progress_on_a_terminal(monkeypatch)
    assert b"\x1b" in shown
    assert b"2/2" in shown
    for plain in ({"NO_COLOR": "1"}, {"CI": "true"}):
        shown = progress_on_a_terminal(monkeypatch, **plain)
        assert b"\x1b" not in shown
        assert b"2/2 tasks" in shown


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True)


def test_data_that_a_reader_did_not_take_is_exit_7_without_a_word(done):
    result = shell(f"{sys.executable} -m probe show {done} | true; exit ${{PIPESTATUS[0]}}")
    assert (result.returncode, result.stderr) == (7, "")


@pytest.mark.parametrize(
    "command", ["show {done}", "show {done} --json", "ls {done}/..", "--help", "ls --help"]
)
def test_data_that_a_full_disk_does_not_take_is_exit_7_and_one_line(command, done):
    result = shell(f"{sys.executable} -m probe {command.format(done=done)} > /dev/full")
    assert result.returncode == 7
    assert result.stderr.splitlines() == [
        line for line in result.stderr.splitlines() if "No space left" in line
    ]
    assert len(result.stderr.splitlines()) == 1


def test_progress_that_cannot_be_written_is_dropped_and_the_run_goes_on(tasks, tmp_path):
    out = tmp_path / "run"
    run_it = f"{sys.executable} -m probe run {tasks} {' '.join(MODEL)} --max-new-tokens 2 --no-analyze --out"
    # The reader of both streams leaves after the first line: the run ends whole, its last line is not written.
    result = shell(f"{run_it} {out} 2>&1 | head -n 1; exit ${{PIPESTATUS[0]}}")
    assert result.returncode == 7
    assert probe.open(out).run["status"] == "done"
    out = tmp_path / "full"
    result = shell(f"{run_it} {out} 2> /dev/full")
    assert (result.returncode, result.stdout) == (0, f"{out}\n")
    assert shell(f"{sys.executable} -m probe ls {tmp_path} >&-").returncode == 7


@pytest.mark.slow
def test_a_run_goes_on_where_there_is_no_stderr(tasks, tmp_path):
    out = tmp_path / "run"
    command = (
        f"{sys.executable} -m probe run {tasks} {' '.join(MODEL)} --max-new-tokens 2 --no-analyze --out {out}"
    )
    result = shell(f"{command} 2>&-")
    assert (result.returncode, result.stdout) == (0, f"{out}\n")


def test_output_survives_a_stdout_that_knows_ascii_alone(done):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for extra in ((), ("--json",)):
        command = [sys.executable, "-m", "probe", "show", str(done), "t1", *extra]
        result = subprocess.run(command, capture_output=True, env=environment)
        assert result.returncode == 0, result.stderr
        assert b"random:" in result.stdout or b"calc" in result.stdout


# -- starting fast -----------------------------------------------------------------------------------------------


def test_help_and_ls_import_neither_torch_nor_transformers(done):
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom probe.cli import main\n"
        f"for args in (['--help'], ['run', '--help'], ['ls', {str(done.parent)!r}], ['ls', {str(done.parent)!r}, '--json']):\n"
        "    assert CliRunner().invoke(main, args).exit_code == 0, args\n"
        "    heavy = {'torch', 'transformers', 'transformer_lens', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "    assert not heavy, (args, heavy)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.timing
def test_help_takes_less_than_a_fifth_of_a_second():
    seconds = []
    for _ in range(8):  # the machine may be busy: the best of eight
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "probe", "--help"], check=True, capture_output=True)
        seconds.append(time.monotonic() - began)
        if within(0.2, seconds[-1]):
            break
    assert within(0.2, min(seconds))
