"""Sweeps: one training against transformers, peft and dense numpy; cells on disk; findings of planted trainings."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.stats
import torch
from click.testing import CliRunner

from probe.cli import main
from probe.errors import ArtifactCorrupt, BadInput, RunDirectoryError, UsageError
from probe.model.weights import weights_hash
from probe.training.lora.data import read_texts
from probe.training.lora.findings import findings, interval, read_at
from probe.training.lora.sweep import Cell, Laboratory, Sweep, SweepSetting, encoded, run_sweep, spaced
from probe.training.trainee import Trainee, batches, rows_of

TINY = SweepSetting(
    model="random:tiny-llama",
    ranks=(1, 4),
    seeds=2,
    rates=(1e-3, 1e-2),
    full_rates=(1e-3,),
    steps=6,
    points=4,
    train_lines=12,
    held_out_lines=6,
    text_lines=4,
    text_tokens=40,
    layers=2,
)


@contextmanager
def unwatched(total):
    yield lambda message: None


def laboratory(shape="tiny-llama", setting=TINY):
    from probe.model.shapes import byte_tokenizer, random_model

    hf = random_model(shape, torch.float32)
    texts = read_texts().first(setting.train_lines, setting.held_out_lines, setting.text_lines)
    return Laboratory(
        Trainee(hf), encoded(texts, byte_tokenizer(hf.config.vocab_size), setting.text_tokens), setting
    )


# --- one training


def test_losses_are_those_of_transformers_and_kl_that_of_torch():
    room = laboratory()
    hf, rows = room.model.hf, room.rows["validation"]
    labels = torch.full_like(rows.ids, -100)
    labels[:, 1:][rows.wanted] = rows.ids[:, 1:][rows.wanted]
    with torch.no_grad():
        assert room.model.loss(rows) == pytest.approx(
            float(hf(input_ids=rows.ids, labels=labels).loss), rel=1e-5
        )
    text = room.rows["text"]
    with room.model.opened(4, 8, 0) as parameters:
        assert room.model.divergence(text, room.reference)[0] == 0  # B = 0: the base exactly
        room.model.train(
            room.rows["train"], parameters, rate=1e-2, steps=3, batch=4, seed=0, at=lambda step: True
        )
        actual, loss = room.model.divergence(text, room.reference)
        adapted = torch.cat(room.model.log_probs(text))
    base = torch.cat(room.reference)
    expected = torch.nn.functional.kl_div(adapted, base, reduction="batchmean", log_target=True)
    assert actual == pytest.approx(float(expected), rel=1e-4) and actual > 1e-3
    chosen = adapted.gather(-1, text.ids[:, 1:][text.wanted][:, None])
    assert loss == pytest.approx(-float(chosen.mean()), rel=1e-5)


def test_padding_changes_no_loss():
    room = laboratory()
    sequences = [(list(range(5, 5 + length)), 3) for length in (6, 9, 20)]
    together = room.model.loss(rows_of(sequences))
    alone = [(room.model.loss(rows_of([sequence])), len(sequence[0]) - 3) for sequence in sequences]
    assert together == pytest.approx(sum(loss * n for loss, n in alone) / sum(n for _, n in alone), rel=1e-5)


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-gpt2"])
@pytest.mark.parametrize("method", ["r4", "full"])
def test_a_training_is_measured_as_dense_numpy_does_and_leaves_no_trace(shape, method):
    room = laboratory(shape)
    before = {name: value.clone() for name, value in room.model.hf.state_dict().items()}
    dense, original = {}, room._spectra

    def spectra():
        for name in room.model.targets:
            if method == "full":
                delta = room.model.hf.get_submodule(name).weight.double() - before[f"{name}.weight"].double()
            else:
                layer = room.model._adapted[name]
                delta = layer.get_delta_weight("default").double()
            dense[name] = delta.detach().numpy()
        return original()

    room._spectra = spectra
    record = room.run(Cell(method, 1e-2 if method == "r4" else 1e-3, 1))
    after = room.model.hf.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    last = record["points"][-1]
    assert last["step"] == TINY.steps and record["points"][0]["base_kl"] == 0
    norm = math.sqrt(sum((delta**2).sum() for delta in dense.values()))
    assert last["frobenius_norm"] == pytest.approx(norm, rel=1e-5)
    effective = []
    for name, values in record["spectra"]["singular_values"].items():
        sigma = np.linalg.svd(dense[name], compute_uv=False)
        assert np.abs(np.array(values) - sigma[: len(values)]).max() < 1e-5 * sigma[0]
        share = sigma[sigma > 1e-5 * sigma[0]] / sigma.sum()
        effective.append(np.exp(-(share * np.log(share)).sum()))
    assert record["spectra"]["effective_rank"] == pytest.approx(np.mean(effective), rel=1e-2)
    expected = (
        sum(d.size for d in dense.values())
        if method == "full"
        else sum(4 * sum(d.shape) for d in dense.values())
    )
    assert record["parameters"] == expected
    assert last["train_loss"] < record["points"][0]["train_loss"]


def test_a_seed_gives_the_same_training_and_another_a_different_one():
    room = laboratory()
    runs = [room.run(Cell("r4", 1e-2, seed))["points"] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_every_line_comes_once_an_epoch():
    taken = batches(10, 4, 0)
    order = torch.cat([next(taken) for _ in range(5)]).tolist()
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]


def test_a_training_whose_loss_is_no_number_is_marked():
    record = laboratory().run(Cell("full", 1e30, 0))
    assert record["diverged"] and json.dumps(record, allow_nan=False)


def test_layers_are_spread_evenly():
    names = [f"model.layers.{layer}.mlp.up" for layer in range(30)]
    assert [name.split(".")[2] for name in spaced(names, 3)] == ["4", "14", "24"]
    assert spaced(names[:2], 6) == names[:2]


# --- the sweep on disk


@pytest.mark.slow
def test_a_stopped_sweep_continues_and_ends_as_one_that_was_not(tmp_path):
    setting = SweepSetting(**{**vars(TINY), "ranks": (1,), "steps": 3, "points": 2})
    total = (2 + 1) + (1 + 1)  # rates, and the second seed of the best one: with adapters, and of all weights
    whole = run_sweep(tmp_path / "whole", setting, watch=unwatched)
    stopped_after = 3

    @contextmanager
    def stopping(n_cells):
        count = iter(range(1, n_cells + 1))

        def done(message):
            if next(count) == stopped_after:
                raise KeyboardInterrupt

        yield done

    with pytest.raises(KeyboardInterrupt):
        run_sweep(tmp_path / "parts", setting, watch=stopping)
    cells = tmp_path / "parts" / "cells"
    kept = {path: path.stat().st_mtime_ns for path in cells.iterdir()}
    assert len(kept) == stopped_after
    parts = run_sweep(tmp_path / "parts", setting, watch=unwatched)
    assert len(list(cells.iterdir())) == total == whole.total()
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    first, second = findings(whole), findings(parts)
    for document in (first, second):
        for entry in document["methods"]:
            del entry["seconds"]
    assert first == second
    assert len(list(whole.cells())) == whole.total()


def test_another_setting_and_what_is_no_sweep_are_refused(tmp_path):
    sweep = Sweep(tmp_path, TINY)
    sweep.begin({"texts": "a"})
    Sweep(tmp_path, SweepSetting(**{**vars(TINY), "ranks": (2,), "seeds": 5})).begin({"texts": "a"})
    with pytest.raises(RunDirectoryError, match="steps was 6, is 7"):
        Sweep(tmp_path, SweepSetting(**{**vars(TINY), "steps": 7})).begin({"texts": "a"})
    with pytest.raises(RunDirectoryError, match="texts"):
        Sweep(tmp_path, TINY).begin({"texts": "b"})
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "r1-lr0.001-seed0.json").write_text("{")
    with pytest.raises(ArtifactCorrupt, match="remove it"):
        Sweep(tmp_path, TINY).begin({"texts": "a"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(RunDirectoryError, match="holds no sweep"), Sweep(tmp_path / "other", TINY).locked():
        pass


def test_a_changed_digit_of_a_sweep_is_found_and_two_sweeps_of_a_folder_are_one_too_many(tmp_path):
    sweep = Sweep(tmp_path, TINY)
    with sweep.locked():
        sweep.begin({"texts": "a"})
        sweep.keep(
            Cell("r1", 1e-3, 0),
            {"cell": vars(Cell("r1", 1e-3, 0)), "points": [{"validation_loss": 2.5}], "spectra": {}},
        )
        (tmp_path / "cells" / f".tmp-x-{'0' * 32}").touch()
        with pytest.raises(RunDirectoryError, match="busy"), Sweep(tmp_path, TINY).locked():
            pass
    again = Sweep(tmp_path, TINY)
    with again.locked():
        again.begin({"texts": "a"})
    assert again.trainings == sweep.trainings
    (cell,) = (tmp_path / "cells").iterdir()
    advice = {cell: "remove it", tmp_path / "sweep.json": "begin in another directory"}
    for file, old, new in ((cell, "2.5", "1.5"), (tmp_path / "sweep.json", '"texts":"a"', '"texts":"b"')):
        text = file.read_text()
        file.write_text(text.replace(old, new))
        with pytest.raises(ArtifactCorrupt, match=f"{file.name}: altered .*{advice[file]}"):
            Sweep(tmp_path, TINY).begin({"texts": "a"})
        file.write_text(text)


@pytest.mark.parametrize(
    "change", [{"ranks": ()}, {"ranks": (0,)}, {"ranks": (4, 4)}, {"rates": (-1.0,)}, {"rates": (math.nan,)}]
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(UsageError):
        SweepSetting(**change).checked()


# --- texts


def test_the_shipped_texts_are_disjoint_and_unrelated():
    texts = read_texts()
    assert (len(texts.train), len(texts.selection), len(texts.validation)) == (256, 48, 96)
    parts = [texts.train, texts.selection, texts.validation]
    prompts = [prompt for part in parts for prompt, _ in part]
    answers = [{answer for _, answer in part} for part in parts]
    assert len(set(prompts)) == len(prompts)
    assert not answers[0] & answers[2] and not answers[0] & answers[1]
    words = {word for part in parts for _, answer in part for word in answer.split()}
    assert len(set(texts.text)) == len(texts.text) >= 36
    assert not [word for word in words if "-" in word and any(word in text for text in texts.text)]


def test_own_texts_may_not_leak_and_wrong_lines_are_named(tmp_path):
    line = '{"prompt": "a", "completion": " b"}\n'
    for part in ("train", "selection", "validation"):
        (tmp_path / f"{part}.jsonl").write_text(line.replace('"a"', f'"{part}"'))
    with pytest.raises(UsageError, match="text.jsonl"):
        read_texts(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "one two"}\n')
    assert read_texts(tmp_path).train == [("train", " b")]
    (tmp_path / "validation.jsonl").write_text(line.replace('"a"', '"train"') + '{"prompt": 3}\n')
    with pytest.raises(BadInput, match="validation.jsonl:2") as caught:
        read_texts(tmp_path)
    assert "is in train.jsonl too" in str(caught.value)


# --- findings


def planted(tmp_path, curves, seeds=3, ranks=(4, 64)):
    """A sweep whose trainings follow (validation, training, kl, norm) as functions of progress 0 … 1 and seed."""
    setting = SweepSetting(**{**vars(TINY), "ranks": ranks, "seeds": seeds, "rates": (1e-3,), "full": False})
    sweep = Sweep(tmp_path, setting)
    for method, curve in curves.items():
        for seed in range(seeds):
            points = []
            for step in range(5):
                validation, train, kl, norm = curve(step / 4, seed)
                named = {
                    "train_loss": train,
                    "validation_loss": validation,
                    "selection_loss": validation,
                    "base_kl": kl,
                }
                points.append({"step": step, **named, "log_perplexity_ratio": kl, "frobenius_norm": norm})
            spectra = {"effective_rank": 3.0, "n_matrices": 1, "singular_values": {"w": [1.0]}}
            cell = Cell(method, 1e-3, seed)
            entry = {"cell": vars(cell), "points": points, "diverged": False, "spectra": spectra}
            sweep.trainings[cell] = {**entry, "parameters": 1, "seconds": 0.0}
    return sweep


def says(actual, part):
    return next(entry["says"] for entry in actual["verdict"] if part in entry["part"])


def test_intervals_are_those_of_scipy_and_few_seeds_have_none():
    values = [0.3, 0.7, 0.4, 0.9]
    ours = interval(values, "nats")
    theirs = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    assert interval([1.0], "nats")["low"] is None and interval([], "nats") is None


def test_reading_at_a_matched_place_is_linear_and_absent_where_never_reached():
    points = [{"loss": 4.0, "base_kl": 0.0}, {"loss": 2.0, "base_kl": 1.0}, {"loss": 3.0, "base_kl": 5.0}]
    assert read_at(points, "base_kl", "loss", 2.5) == pytest.approx(0.75)
    assert read_at(points, "base_kl", "loss", 1.9) is None


def test_a_rank_that_only_went_further_is_not_called_forgetful(tmp_path):
    """One curve of KL over loss for both ranks, of which the high one goes twice as far: rank itself does nothing."""

    def along(reach):
        return lambda t, seed: (4 - reach * t, 4 - reach * t, (reach * t + 0.01 * seed * t) * 0.5, reach * t)

    summary = findings(planted(tmp_path, {"r4": along(1), "r64": along(2)}))
    places = {entry["place"]: entry for entry in summary["comparisons"] if entry["quantity"] == "base_kl"}
    assert places["end"]["says"] == "supported"
    assert places["end"]["difference"]["value"] == pytest.approx(0.5)
    for place in ("train_loss", "validation_loss", "frobenius_norm"):
        assert places[place]["says"] != "supported"
        assert places[place]["difference"]["value"] == pytest.approx(0, abs=0.02)
    assert says(summary, "forgets more") != "supported"


def test_the_claim_is_supported_where_it_was_planted_and_contradicted_where_its_opposite_was(tmp_path):
    def kept(t, seed):
        return 4 - 2 * t, 4 - 2.02 * t, 0.001 * t * (1 + 0.1 * seed), t

    def forgets(t, seed):
        return 4 - 2.5 * t, 4 - 3.2 * t, 2 * t * (1 + 0.1 * seed), 1.5 * t

    summary = findings(planted(tmp_path, {"r4": kept, "r64": forgets}))
    for part in ("preserves", "hardly", "forgets more", "overfits more", "learns more"):
        assert says(summary, part) == "supported", part
    turned = findings(planted(tmp_path, {"r4": forgets, "r64": kept}))
    for part in ("preserves", "hardly", "forgets more", "overfits more", "learns more"):
        assert says(turned, part) == "contradicted", part
    assert turned["says"] == "contradicted"


def test_two_seeds_decide_nothing_and_it_is_said(tmp_path):
    summary = findings(
        planted(
            tmp_path,
            {"r4": lambda t, s: (4 - t, 4 - t, 0, t), "r64": lambda t, s: (4 - t, 4 - 2 * t, t, t)},
            seeds=2,
        )
    )
    assert {entry["says"] for entry in summary["verdict"]} == {"not decided"} and summary[
        "says"
    ] == "not decided"
    assert any("fewer than 3" in note for note in summary["notes"])


def test_the_gap_is_counted_from_before_training(tmp_path):
    hard = planted(
        tmp_path, {"r4": lambda t, s: (5 - t, 4 - t, 0, t), "r64": lambda t, s: (5 - t, 4 - 2 * t, t, t)}
    )
    summary = findings(hard)
    gaps = {entry["method"]: entry["end"]["gap"]["value"] for entry in summary["methods"]}
    assert gaps == pytest.approx({"r4": 0, "r64": 1})


def test_the_rate_is_that_of_the_lowest_selection_loss_of_the_first_seed(tmp_path):
    sweep = Sweep(tmp_path, SweepSetting(**{**vars(TINY), "ranks": (4,), "full": False}))
    for rate, losses in ((1e-3, [3.0, 2.0, 2.5]), (1e-2, [3.0, 2.2, 2.1])):
        assert sweep.chosen("r4") is None
        sweep.trainings[Cell("r4", rate, 0)] = {"points": [{"selection_loss": loss} for loss in losses]}
    assert sweep.chosen("r4") == 1e-3


# --- the command


@pytest.mark.slow
def test_the_command_prints_tables_json_and_draws(tmp_path):
    out, options = (
        tmp_path / "out",
        ["--model", "random:tiny-llama", "--quick", "--seeds", "2", "--steps", "4", "--ranks", "1,4"],
    )
    shown = CliRunner().invoke(
        main, ["lora", "sweep", *options, "-o", str(out), "--plot", str(tmp_path / "a.png")]
    )
    assert shown.exit_code == 0, shown.output
    assert "fewer than 3" in shown.stdout and "quick" in shown.stdout and "not decided" in shown.stdout
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    again = CliRunner().invoke(
        main, ["lora", "sweep", *options, "-o", str(out), "--json", "--plot", str(tmp_path / "a.svg")]
    )
    document = json.loads(again.stdout)
    assert [entry["method"] for entry in document["methods"]] == ["r1", "r4", "full"]
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
    for wrong in (["--ranks", "x"], ["--ranks", "0"], ["--low", "9"], ["--plot", "a.pdf"], ["--steps", "5"]):
        refused = CliRunner().invoke(main, ["lora", "sweep", *options, *wrong, "-o", str(out)])
        assert refused.exit_code in (2, 4) and "Traceback" not in refused.output, wrong


def test_the_base_is_the_same_whatever_is_trained():
    room = laboratory()
    before = weights_hash(room.model.hf)
    room.run(Cell("r1", 1e-2, 0))
    room.run(Cell("full", 1e-3, 0))
    assert weights_hash(room.model.hf) == before
