"""Kills, broken disks and inputs that are not what they say: what is complete stays, and a sentence says what to do."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import probe
from probe.capture.model import CapturingModel
from probe.cli import main
from probe.errors import DiskError, ModelUnavailable
from probe.experiments import EXPERIMENTS, loaded_run
from probe.harness import runner
from probe.model.names import Source
from probe.model.shapes import byte_tokenizer, random_config
from probe.model.weights import load_outline
from probe.runs import write as write_module
from probe.runs.files import encode_json, encode_signed, entry_of
from probe.runs.manifest import encode_checksums, listed_files, listing, read_checksums, read_manifest
from tests.conftest import tiny
from tests.test_cli import PROMPTING, TOOL, TOOLS, lose, result_bytes, write

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

VALUES = [None, -1, 10**9, 1.5, 1e308, "", "x", True, [], {}, [None], ["x"], {"x": 1}, [[1]]]


def places(value: object, at: tuple = ()) -> Iterator[tuple]:
    if at:
        yield at
    parts = (
        value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    )
    for key, part in parts:
        yield from places(part, (*at, key))


def mutated(document: dict, draw: random.Random) -> tuple[dict, str]:
    """A document with one value deleted, repeated or of another type, at any depth; and what was done."""
    document = copy.deepcopy(document)
    every = list(places(document))
    depth = draw.choice(sorted({len(place) for place in every}))
    *way, last = draw.choice([place for place in every if len(place) == depth])
    parent: Any = document
    for key in way:
        parent = parent[key]
    how = draw.randrange(5)
    if how == 0:
        del parent[last]
    elif how == 1 and isinstance(parent, list):
        parent.append(parent[last])
    else:
        parent[last] = draw.choice(VALUES)
    return document, f"{[*way, last]} → {parent[last] if how > 1 else how}"


def sign_anew(run: Path, name: str, document: dict) -> None:
    """Put a document into a run as somebody would who can write there: all checksums are right."""
    data = {name: encode_signed(document) if name == "run.json" else encode_json(document)}
    if name != "run.json":
        folder = Path(name).parent
        entries = read_checksums(run / folder) | {"record.json": entry_of(data[name])}
        data[str(folder / "checksums.json")] = encode_checksums(entries)
    manifest = read_manifest(run)
    assert manifest is not None
    files = listed_files(run, manifest) | {key: entry_of(value) for key, value in data.items()}
    data["manifest.json"] = encode_signed(manifest | {"files": listing(files)})
    for key, value in data.items():
        (run / key).write_bytes(value)


def test_signed_content_of_the_wrong_type_is_exit_5_with_the_path_or_does_not_matter(mixed, tmp_path):
    """Mutations of run.json and of the records, and every command that only reads."""
    run, draw = tmp_path / "run", random.Random(0)
    shutil.copytree(mixed, run)
    names = ["run.json", *(f"tasks/{path.name}/record.json" for path in (run / "tasks").iterdir())]
    originals = {name: json.loads((run / name).read_text()) for name in names}
    offenders = []
    for number in range(40):
        name = draw.choice(names if number % 4 else names[:1])
        document, what = mutated(originals[name], draw)
        sign_anew(run, name, document)
        task = str(originals[name]["id"])
        commands = [
            ["show", run],
            ["report", run],
            ["export", run, "--format", "csv", "-o", tmp_path / "out"],
        ]
        commands += [["show", run, task]] if name != "run.json" else []
        commands += [["analyze", run, "--no-model"]] if number % 10 == 0 else []
        for command in commands:
            result = CliRunner().invoke(main, list(map(str, command)))
            raised = result.exception is not None and not isinstance(result.exception, SystemExit)
            if raised or (result.exit_code not in (0, 1) and str(run) not in result.stderr):
                offenders.append(f"{command[0]}, {name}: {what}: {result.exception!r} {result.stderr[-200:]}")
        sign_anew(run, name, originals[name])
    assert not offenders, "\n".join(offenders)


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
