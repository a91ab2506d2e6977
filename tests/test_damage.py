"""Kills, broken disks and inputs that are not what they say: what is complete stays, and a sentence says what to do."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import probe
from benchmarks.damages import DAMAGED, HARMLESS, Damage, damages, trial
from probe.capture.model import CapturingModel
from probe.cli import main
from probe.errors import DiskError, ModelUnavailable
from probe.experiments import EXPERIMENTS, loaded_run
from probe.harness import runner
from probe.model.names import Source
from probe.model.shapes import byte_tokenizer, random_config
from probe.model.weights import load_outline
from probe.runs import write as write_module
from tests.conftest import tiny
from tests.test_cli import PROMPTING, TOOL, TOOLS, call, lose, result_bytes, write

MODEL = "tiny-llama"


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """Runs are taken up with the model that made them."""
    monkeypatch.setattr(
        runner, "load_model", lambda model, *_: tiny(MODEL) if isinstance(model, str) else model
    )
    # Imported above: imported here it would take the stand-in for the original, and keep it.
    monkeypatch.setattr(loaded_run, "load_model", lambda *_: tiny(MODEL))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Tool tasks that share their tools, in batches of three, with prompting tasks among them."""
    folder = tmp_path_factory.mktemp("mixed")
    words = ["two", "a rather long sum of many numbers", "7", "page", "nothing at all, thank you"]
    shared = [TOOL | {"id": f"s{n}", "input": f"What is {word}?"} for n, word in enumerate(words * 2)]
    other = [TOOL | {"id": f"o{n}", "input": word, "tools": TOOLS[::-1]} for n, word in enumerate(words)]
    tasks = write(
        folder / "t.jsonl", [*shared, PROMPTING, *other, PROMPTING | {"id": "p2", "input": "wet ->"}]
    )
    probe.run(tasks, model=tiny(MODEL), out=folder / "run", batch_size=3, max_new_tokens=3, analyze=False)
    return folder / "run"


def test_a_resumed_run_is_that_of_an_undisturbed_one_to_the_bit(mixed, tmp_path):
    """Whatever is missing: batches and prefixes are those of the whole file."""
    whole, ids = result_bytes(mixed), probe.open(mixed).task_ids
    draw = random.Random(0)
    for number, missing in enumerate([ids[-1:], ids[8:], ["s3", "o2", "p2"], draw.sample(ids, 6)]):
        out = tmp_path / str(number)
        shutil.copytree(mixed, out)
        probe.resume(lose(out, *missing), analyze=False)
        assert result_bytes(out) == whole, missing


# -- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_an_analysis_keeps_what_is_complete_and_says_how_to_go_on(
    number, code, mixed, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    shutil.copytree(mixed, run)

    def stop(*_args):
        os.kill(os.getpid(), number)
        return []

    with monkeypatch.context() as patch:
        patch.setitem(EXPERIMENTS, "patch", replace(EXPERIMENTS["patch"], make=stop))
        result = CliRunner().invoke(main, ["analyze", str(run), "lens", "patch", "mask_all", "--json"])
    assert result.exit_code == code
    name = signal.Signals(number).name
    sentence = f"stopped by {name}: what was made is kept: `probe analyze {run}` goes on"
    assert sentence in result.stderr
    assert json.loads(result.stdout) == {"error": sentence, "exit_code": code}
    assert {"lens"} <= set(probe.open(run).table("prompting").experiment) <= {"lens", "text"}
    assert set(probe.open(run).table("interventions").experiment) == {"mask_all"}

    # Measures alone: those of the analyzers that have ended are there.
    from probe.analyzers import prompting

    with monkeypatch.context() as patch:
        patch.setattr(prompting, "measures", stop)
        result = CliRunner().invoke(main, ["analyze", str(run), "--no-model"])
    assert (result.exit_code, sentence in result.stderr) == (code, True)
    assert set(probe.open(run).measures().analyzer) == {"tool", "foresight"}
    result = CliRunner().invoke(main, ["verify", str(run)])
    assert result.stdout.startswith("complete: 0 problems")


# -- disks ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_loads(tmp_path, monkeypatch):
    def refuse(*_args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(write_module.os, "mkdir", refuse)
    monkeypatch.setattr(runner, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(DiskError, match=r"new: cannot write: Read-only file system: .*another --out"):
        probe.run(write(tmp_path / "t.jsonl", [TOOL]), out=tmp_path / "new")


# -- content that is signed and wrong -------------------------------------------------------------------------------


def test_damage_is_refused_with_the_path_or_does_not_matter(mixed, tmp_path):
    """Of `benchmarks.damages` a few: bytes and values altered, files gone or exchanged, some with all checksums right."""
    shutil.copytree(mixed, tmp_path / "whole")
    read = [
        ("show", DAMAGED),
        ("show", DAMAGED, "TASK"),
        ("verify", DAMAGED),
    ]
    read += [("export", DAMAGED, "--format", "csv", "-o", "out")]
    offenders, wholes = [], {}
    for number, damage in enumerate(damages(tmp_path / "whole", 16, seed=1)):
        commands = read + ([("report", DAMAGED, "-o", "out.html")] if number % 8 == 0 else [])
        for command, what, result in trial(tmp_path, damage, commands, wholes):
            if what not in HARMLESS:
                offenders.append(
                    f"{command}: {what}: {damage.sentence}: {result.escaped} {result.stderr[-200:]}"
                )
    assert not offenders, "\n".join(offenders)


def test_what_is_lost_of_an_analysis_is_missed_and_made_again(mixed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(mixed, run)
    call("analyze", run, "--no-model")
    call("report", run)
    table = probe.open(run).measures()
    (run / "measures.parquet").unlink()
    for command in (
        ["report"],
        ["export", "-o", tmp_path / "x.csv"],
        ["analyze", "tool", "--no-model"],
    ):
        result = call(command[0], run, *command[1:], code=5)
        assert f"{run / 'measures.parquet'}: missing (`probe analyze {run}` makes it again)" in result.stderr
    (run / "report.html").unlink()
    call("analyze", run, "--no-model")
    assert probe.open(run).measures().equals(table) and (run / "report.html").exists()
    call("verify", run)


def test_a_number_that_changes_without_a_word_is_found(mixed, tmp_path, monkeypatch):
    """What a reader without checks would give."""
    shutil.copytree(mixed, tmp_path / "whole")
    name = f"{probe.open(mixed)['s1'].path.relative_to(mixed)}/record.json"
    altered = (mixed / name).read_bytes().replace(b'"log_prob":-', b'"log_prob":', 1)
    assert altered != (mixed / name).read_bytes()
    monkeypatch.setattr("probe.runs.manifest.compare_entry", lambda *_: None)
    damage = Damage("a sign is gone", {name: altered})
    (verdict,) = [what for _, what, _ in trial(tmp_path, damage, [("show", DAMAGED, "TASK", "--json")], {})]
    assert verdict == "silent"


# -- models --------------------------------------------------------------------------------------------------------


def short(n_ctx: int, broken: bool = False) -> CapturingModel:
    config = random_config("tiny-gpt2")
    config.n_positions = n_ctx
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config)
    if broken:
        hf.transformer.h[1].mlp.c_fc.weight.data[0, 0] = torch.nan
    return CapturingModel(hf, byte_tokenizer(272), Source("short", "random", "short"), {"resolved": "short"})


def test_weights_that_are_no_numbers_are_called_that():
    with pytest.raises(
        ModelUnavailable, match=r"short: its weights are not finite: transformer.h.1.mlp.c_fc.weight"
    ):
        short(64, broken=True)


def test_a_context_too_short_for_anything_is_a_sentence(tmp_path):
    with pytest.raises(ModelUnavailable, match="its context has 4 positions"):
        short(4)
    tasks = write(tmp_path / "t.jsonl", [TOOL, PROMPTING])
    run = probe.run(tasks, model=short(16), out=tmp_path / "run", analyze=False)
    assert all("tokens, the context has 16" in task.record["error"] for task in run)


def test_a_configuration_of_endless_layers_is_refused_before_it_is_built(tmp_path):
    from probe.training.outline import training_config

    tiny(MODEL).tokenizer.save_pretrained(tmp_path)
    tiny(MODEL).hf.save_pretrained(tmp_path)
    config = tiny(MODEL).hf.config.to_dict() | {"num_hidden_layers": 10**7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = Source(str(tmp_path), "directory", str(tmp_path))
    for build in (
        lambda: probe.load(tmp_path),
        lambda: load_outline(source, True),
        lambda: training_config(str(tmp_path)),
    ):
        with pytest.raises(ModelUnavailable, match=r"10,000,000 layers \(num_hidden_layers\)"):
            build()
