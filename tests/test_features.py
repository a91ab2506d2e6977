"""Sparse autoencoders: equations as plain loops, files that are refused, a planted model whose features are known, plain hooks."""

from __future__ import annotations

import json
import math
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import probe
from probe.analyzers.features import measures, sentences
from probe.analyzers.rows import to_table
from probe.cli import main
from probe.errors import BadInput, ModelUnavailable, UsageError
from probe.experiments import EXPERIMENTS, Effort, encode, intervene, predict
from probe.experiments.loaded_run import LoadedRun
from probe.experiments.tool.features import Ablations
from probe.experiments.tool.score import Scorer
from probe.harness.runner import SilentProgress
from probe.maths.selectivity import max_p, standardized_wins
from probe.model.autoencoders import read_autoencoder
from probe.model.edits import StateEdit
from probe.runs import Run
from probe.runs.records import ToolRecord
from tests.conftest import stopped_after, tiny
from tests.defined import check_defined
from tests.planted import copier
from tests.test_steering_edits import plain

LAYER = 1


def write_sae(path: Path, tensors: dict[str, torch.Tensor], layer: int = LAYER, **config: Any) -> Path:
    """An autoencoder as SAELens 6 saves it."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / "sae_weights.safetensors")
    metadata = {"hook_name": f"blocks.{layer}.hook_resid_post", "sae_lens_version": "6.21.0"}
    facts = {"architecture": "standard", "apply_b_dec_to_input": False, "metadata": metadata} | config
    (path / "cfg.json").write_text(json.dumps(facts))
    return path


def weights(d_in: int, width: int, *more: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (d_in, width), "W_dec": (width, d_in), "b_dec": (d_in,)}
    shapes |= dict.fromkeys(("b_enc", *more), (width,))
    return {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}


def whole_basis(d_model: int) -> dict[str, torch.Tensor]:
    """Two features for each of d_model orthogonal directions, (e_2k ± e_2k+1) / √2: x̂ = x. A planted model keeps a property in
    such a difference."""
    basis = torch.kron(torch.eye(d_model // 2), torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2))
    both = torch.cat([basis, -basis])
    return {"W_enc": both.T, "W_dec": both, "b_enc": torch.zeros(2 * d_model), "b_dec": torch.zeros(d_model)}


# -- equations -----------------------------------------------------------------------------------------------------


def loops(tensors: dict[str, Any], x: list[float], architecture: str, k: int, centred: bool, norm: str):
    """f(x) and x̂ as the papers write them, number by number."""
    t = {key: tensor.double().tolist() for key, tensor in tensors.items()}
    d, width = len(x), len(t["W_dec"])
    mean, into, back = 0.0, 1.0, 1.0
    if norm == "constant_norm_rescale":
        into = back = math.sqrt(sum(v * v for v in x)) / math.sqrt(d)
    elif norm == "layer_norm":
        mean = sum(x) / d
        back = math.sqrt(sum((v - mean) ** 2 for v in x) / (d - 1))
        into = back + 1e-5
    inside = [(x[i] - mean) / into - (t["b_dec"][i] if centred else 0.0) for i in range(d)]
    before = [sum(inside[i] * t["W_enc"][i][j] for i in range(d)) + t["b_enc"][j] for j in range(width)]
    kept = sorted(range(width), key=lambda j: -before[j])[:k]
    activations = []
    for j in range(width):
        value = max(before[j], 0.0)
        if architecture == "jumprelu":  # Rajamanoharan et al. 2024b
            value = value if before[j] > t["threshold"][j] else 0.0
        elif architecture == "topk":  # Gao et al. 2024
            value = value if j in kept else 0.0
        elif architecture == "gated":  # Rajamanoharan et al. 2024a
            gate = before[j] - t["b_enc"][j] + t["b_gate"][j]
            scaled = (before[j] - t["b_enc"][j]) * math.exp(t["r_mag"][j]) + t["b_mag"][j]
            value = max(scaled, 0.0) if gate > 0 else 0.0
        activations.append(value)
    out = [sum(activations[j] * t["W_dec"][j][i] for j in range(width)) + t["b_dec"][i] for i in range(d)]
    return activations, [v * back + mean for v in out]


def test_the_worked_example_trains_one_that_rebuilds_states_of_a_few_planted_directions(tmp_path):
    draw = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(24, 24, generator=draw))[0][:12]
    which = torch.rand(2000, 12, generator=draw).topk(2).indices
    strength = torch.zeros(2000, 12).scatter(1, which, 1 + torch.rand(2000, 2, generator=draw))
    states = 5 * strength @ directions + 3
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "train_an_autoencoder.py"))
    tensors = example["train"](states[:1500], wider=2, k=2, steps=800, batch=64)
    example["write_autoencoder"](tensors, tmp_path / "sae", LAYER, k=2)
    coder = read_autoencoder(str(tmp_path / "sae"))
    left = states[1500:]
    rebuilt = coder.decode(coder.encode(left), left)
    assert coder.layer == LAYER and int((coder.encode(left) > 0).sum(1).max()) <= 2
    assert (left - rebuilt).square().sum() < 0.1 * (left - left.mean(0)).square().sum()


@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_what_an_autoencoder_makes_of_a_state_is_what_the_papers_write(architecture, norm, tmp_path):
    more = {"jumprelu": ("threshold",), "gated": ("b_gate", "r_mag", "b_mag")}.get(architecture, ())
    tensors, centred = weights(6, 20, *more), norm != "none"
    facts = {"architecture": architecture, "apply_b_dec_to_input": centred, "normalize_activations": norm}
    coder = read_autoencoder(str(write_sae(tmp_path / "sae", tensors, **facts, k=3)))
    states = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)) * 3 + 1
    activations = coder.encode(states)
    for row, state in enumerate(states):
        expected, back = loops(tensors, state.tolist(), architecture, 3, centred, norm)
        assert activations[row].tolist() == pytest.approx(expected, abs=1e-4)
        assert coder.decode(activations[row][None], state[None])[0].tolist() == pytest.approx(
            back, rel=1e-5, abs=1e-4
        )
    assert 0 < int((activations > 0).sum()) < activations.numel()
    assert coder.layer == LAYER and coder.width == 20


def test_a_topk_by_decoder_length_writes_what_it_did_in_training(tmp_path):
    """Activations are chosen times ‖W_dec‖ and divided by it behind (SAELens, `rescale_acts_by_decoder_norm`)."""
    tensors, states = weights(6, 20), torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    facts: dict[str, Any] = {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True}
    coder = read_autoencoder(str(write_sae(tmp_path / "sae", tensors, **facts)))
    lengths = tensors["W_dec"].norm(dim=1)
    before = (states @ tensors["W_enc"] + tensors["b_enc"]) * lengths
    kept = before >= before.topk(4, dim=1).values[:, -1:]
    expected = before.relu() * kept
    assert torch.allclose(coder.encode(states), expected, atol=1e-4)
    back = (expected / lengths) @ tensors["W_dec"] + tensors["b_dec"]
    assert torch.allclose(coder.decode(coder.encode(states), states), back, atol=1e-4)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_gemma_scope_is_read_as_it_is_published(suffix, tmp_path):
    """JumpReLU, b_dec not subtracted before; the layer stands in the path, and names are W_enc or w_enc."""
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k"
    folder.mkdir(parents=True)
    tensors = weights(6, 20, "threshold")
    if suffix == "npz":
        np.savez(folder / "params.npz", **{key: tensor.numpy() for key, tensor in tensors.items()})
    else:
        lower = {key.replace("W_", "w_"): tensor for key, tensor in tensors.items()}
        save_file(lower, folder / "params.safetensors")
    coder = read_autoencoder(str(folder))
    assert coder.layer == 20 and coder.architecture == "jumprelu"
    state = torch.randn(6, generator=torch.Generator().manual_seed(1))
    expected, back = loops(tensors, state.tolist(), "jumprelu", 0, False, "none")
    assert coder.encode(state[None])[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert coder.decode(coder.encode(state[None]), state[None])[0].tolist() == pytest.approx(back, abs=1e-4)


def test_older_files_of_saelens_say_the_same_by_other_keys(tmp_path):
    old = {"metadata": None, "hook_point": "blocks.4.hook_resid_pre", "apply_b_dec_to_input": True}
    path = write_sae(
        tmp_path / "old", weights(6, 8), **old, activation_fn_str="topk", activation_fn_kwargs={"k": 2}
    )
    coder = read_autoencoder(str(path))
    assert (coder.layer, coder.architecture, coder.k, coder.centred) == (3, "topk", 2, True)
    log = weights(6, 8, "log_threshold")
    coder = read_autoencoder(str(write_sae(tmp_path / "log", log, architecture="jumprelu")))
    assert coder.threshold is not None and torch.allclose(coder.threshold, log["log_threshold"].exp())


# -- files that are refused ----------------------------------------------------------------------------------------


def test_files_that_are_no_autoencoder_are_refused_with_what_to_do(tmp_path):
    def refusal(path: Path) -> str:
        with pytest.raises(BadInput) as told:
            read_autoencoder(str(path))
        return str(told.value)

    unknown = write_sae(tmp_path / "unknown", weights(6, 8), architecture="transcoder")
    assert "architecture: transcoder is not known here: known are standard" in refusal(unknown)
    site = {"hook_name": "blocks.3.hook_mlp_out"}
    assert "give an autoencoder of blocks.N.hook_resid_post" in refusal(
        write_sae(tmp_path / "mlp", weights(6, 8), metadata=site)
    )
    assert "threshold: is missing" in refusal(
        write_sae(tmp_path / "bare", weights(6, 8), architecture="jumprelu")
    )
    torn = weights(6, 8) | {"W_dec": torch.zeros(8, 5)}
    assert "W_enc asks for (8, 6)" in refusal(write_sae(tmp_path / "torn", torn))
    pickled = tmp_path / "layer_3"
    pickled.mkdir()
    np.savez(
        pickled / "params.npz", **{k: v.numpy() for k, v in weights(6, 8).items()}, threshold=np.array([{}])
    )
    assert "pickled objects, which could run code: write plain arrays" in refusal(pickled)
    (tmp_path / "pt").mkdir()
    (tmp_path / "pt" / "ae.pt").write_bytes(b"")
    assert "ae.pt is pickled" in refusal(tmp_path / "pt")
    (tmp_path / "cut" / "inner").mkdir(parents=True)
    (tmp_path / "cut" / "inner" / "params.npz").write_bytes(b"PK")
    assert "give one of its folders" in refusal(tmp_path / "cut")
    assert "is no npz" in refusal(tmp_path / "cut" / "inner")
    assert "is no directory" in refusal(tmp_path / "nowhere")
    with pytest.raises(ModelUnavailable, match=r'hf download an/sae --include "layer_3/\*"'):
        read_autoencoder("an/sae/layer_3", offline=True)


# -- selectivity ---------------------------------------------------------------------------------------------------


def test_selectivity_is_the_statistic_of_mann_and_whitney():
    draw = np.random.default_rng(0)
    activity = np.maximum(draw.standard_normal((30, 5)), 0)
    member = draw.integers(3, size=30)[:, None] == np.arange(3)
    area, z = standardized_wins(activity, member)
    for label in range(3):
        for feature in range(5):
            sides = (activity[side, feature] for side in (member[:, label], ~member[:, label]))
            test = scipy.stats.mannwhitneyu(*sides, method="asymptotic", use_continuity=False)
            pairs = member[:, label].sum() * (~member[:, label]).sum()
            assert area[label, feature] == pytest.approx(test.statistic / pairs)
            assert 2 * scipy.stats.norm.sf(abs(z[label, feature])) == pytest.approx(test.pvalue)


def test_the_corrected_p_value_finds_what_is_planted_and_keeps_its_level():
    draw, label = np.random.default_rng(1), np.arange(24) % 3
    member = label[:, None] == np.arange(3)
    noise = np.maximum(draw.standard_normal((40, 24, 6)), 0)
    planted = np.column_stack([noise[0], label == 1])
    p = max_p(planted, member, draws=199)
    assert p[1, 6] == 1 / 200 and p.min() == p[1, 6] and (np.delete(p, 6, 1) > 0.02).all()
    least = [max_p(activity, member, seed=number, draws=99).min() for number, activity in enumerate(noise)]
    assert np.mean(np.array(least) <= 0.2) == pytest.approx(0.2, abs=3 * math.sqrt(0.2 * 0.8 / 40))


# -- a planted model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory, two_calls):
    """A model that copies the right tool's name into the state behind layer 1, and with three times the strength what nothing
    reads; an autoencoder that has both among its features and explains everything."""
    path = tmp_path_factory.mktemp("features")
    plant = copier(path / "model")
    run = probe.run(
        plant.write(path / "tasks.jsonl"),
        model=str(plant.path),
        out=path / "run",
        analyze=False,
        max_new_tokens=2,
    )
    sae = write_sae(path / "sae", whole_basis(run.run["model"]["d_model"]))
    effort = Effort(sae=str(sae), top=3)
    with stopped_after(2) as two_calls.scored, pytest.raises(KeyboardInterrupt):
        intervene(run, ["feature_ablation"], effort=effort)
    two_calls.first = Run(run.path).table("features")
    with stopped_after(None) as two_calls.scored_then:
        assert intervene(Run(run.path), ["feature_ablation"], effort=effort) == ["feature_ablation"]
    opened = Run(run.path)
    opened.write_table("measures", to_table(measures(opened)))
    return plant, sae, Run(run.path)


def of_run(run: Run, name: str) -> Any:
    rows = run.measures()
    return rows[(rows.name == name) & (rows.task_id == "")]


def test_a_feature_that_carries_the_choice_flips_it_and_its_controls_do_not(planted):
    """Without it all names are alike, and the first of them is said: the choice stays only where it was the first."""
    run = planted[2]
    table = run.table("features")
    table = table[table.part == "ablation"]
    records = {task.id: task.typed(ToolRecord) for task in run}
    assert len(table) == 5 * len(records)
    for row in table.to_dict("records"):
        chosen = records[row["task_id"]].decision.chosen
        if row["features"] == "top":
            assert row["n"] and row["log_prob"] < row["before"] - 1
            assert row["value"] == (chosen != records[row["task_id"]].decision.tools[0])
        else:
            assert row["value"] == 0 and bool(row["n"]) == (row["features"] == "random")
    flips = of_run(run, "feature_flip_rate").set_index(["features", "replacement"])["value"]
    assert flips["top", "reconstruction"] == flips["top", "state"] > 0.4
    assert (
        flips["random", "state"] == flips["random", "reconstruction"] == flips["none", "reconstruction"] == 0
    )
    beyond = of_run(run, "feature_flip_difference")
    assert (beyond["low"] > 0).all() and len(beyond) == 3
    assert (of_run(run, "feature_log_prob_difference")["value"] < -2).all()  # all alike has no interval


def test_every_tool_has_its_feature_beyond_shuffled_labels(planted):
    plant, _, run = planted
    best = of_run(run, "feature_auroc")
    best = best[best["rank"] == 1]
    assert {*best.tool} == {task["target"] for task in plant.tasks} and (best.value == 1).all()
    assert best.feature.nunique() == len(best)
    assert of_run(run, "feature_tools")["value"].item() > 0.5


def test_every_measure_of_features_is_made_with_its_unit_and_columns(planted):
    check_defined(planted[2].measures(), "features", {})


def test_a_dry_run_counts_what_an_ablation_makes(planted):
    table = planted[2].table("features")
    n_made = len(table[table.part == "ablation"])
    (told,) = predict(planted[2], ["feature_ablation"]).values()
    assert (told["conditions"], told["tasks"]) == (n_made, n_made // 5)
    assert 0 < told["ratio"] < 5


def test_the_command_reads_what_the_run_holds_without_a_model(planted):
    """And what was ablated with this autoencoder before stays."""
    told = CliRunner().invoke(
        main, ["features", str(planted[2].path), "--sae", str(planted[1]), "--no-model", "--json"]
    )
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["findings"] == sentences(planted[2])


def test_the_reconstruction_comes_first_and_is_whole_here(planted):
    run = planted[2]
    whole = of_run(run, "sae_unexplained").set_index("state")
    assert whole.loc["decision", "value"] == pytest.approx(0, abs=1e-9)
    told = sentences(run)
    assert "not explained" in told[0] and any("flipped, top beyond random" in line for line in told)


def test_error_sparsity_and_dead_features_are_those_of_a_slow_loop(planted, tmp_path):
    run = Run(shutil.copytree(planted[2].path, tmp_path / "run"))
    d_model = run.run["model"]["d_model"]
    sae = write_sae(tmp_path / "sae", weights(d_model, 40), architecture="topk", k=3)
    encode(run, Effort(sae=str(sae)))
    coder = read_autoencoder(str(sae))
    run = Run(run.path)
    assert set(run.table("features")["part"]) == {"width", "error", "active", "rows", "activity"}
    rows = to_table(measures(run)).to_pandas()
    states = [task["resid_post"][LAYER].float() for task in run]
    every = torch.cat(states).double()
    wrong = {task.id: 0.0 for task in run}
    seen: set[int] = set()
    for task, of_task in zip(run, states, strict=True):
        for x in of_task:
            f = coder.encode(x[None])
            seen |= set(f[0].nonzero()[:, 0].tolist())
            wrong[task.id] += float((x - coder.decode(f, x[None])[0]).double().square().sum())
    around = float((every - every.mean(0)).square().sum())
    at_rows = rows[(rows.name == "sae_unexplained") & (rows.state == "rows")].set_index("task_id")["value"]
    assert at_rows[""] == pytest.approx(sum(wrong.values()) / around, rel=1e-5)
    about_mean = float((states[0].double() - every.mean(0)).square().sum())
    assert at_rows[next(iter(wrong))] == pytest.approx(next(iter(wrong.values())) / about_mean, rel=1e-5)
    assert rows[rows.name == "sae_dead"]["value"].item() == pytest.approx(1 - len(seen) / 40)
    assert rows[(rows.name == "sae_l0") & (rows.task_id == "")]["value"].max() <= 3


def test_a_stopped_ablation_keeps_its_tasks_and_the_next_call_makes_the_rest(planted, two_calls):
    first = two_calls.first[two_calls.first.part == "ablation"]
    assert {*first.task_id} == {*two_calls.scored} and len(first) == len(two_calls.scored) > 0
    assert not {*two_calls.scored} & {*two_calls.scored_then}
    table = planted[2].table("features")
    assert len(table[table.part == "ablation"]) == 5 * len(planted[0].tasks)
    with stopped_after(0):
        intervene(planted[2], ["feature_ablation"], effort=Effort(sae=str(planted[1]), top=3))


def test_an_autoencoder_that_does_not_fit_the_run_is_refused(planted, tmp_path):
    run = planted[2]
    d_model = run.run["model"]["d_model"]
    deep = write_sae(tmp_path / "deep", whole_basis(d_model), layer=7)
    narrow = write_sae(tmp_path / "narrow", whole_basis(8))
    unsaid = write_sae(tmp_path / "unsaid", whole_basis(d_model), metadata={})
    for sae, layer, answer in (
        (deep, None, "the run has resid_post of layers 0, 1; run the tasks again with --layers 7"),
        (narrow, None, f"reads states of 8 numbers, the run's have {d_model}"),
        (unsaid, None, "give --layer"),
        (planted[1], 0, "--layer 0: .* is of layer 1"),
    ):
        with pytest.raises(UsageError, match=answer):
            encode(run, Effort(sae=str(sae), sae_layer=layer))
    with pytest.raises(UsageError, match="probe features RUN --sae"):
        intervene(run, ["feature_ablation"])


# -- plain hooks ---------------------------------------------------------------------------------------------------


def test_scores_without_features_are_those_of_plain_hooks(tmp_path):
    """The state is made here from the file's own tensors, number by number; the model is transformers' with one hook."""
    name = "tiny-gemma2"
    model = tiny(name)
    tools = [{"name": n, "description": f"Does {n}."} for n in ("mailer", "mail_box", "calc")]
    lines = [{"id": "t", "kind": "tool_selection", "input": "Please", "tools": tools, "target": "calc"}]
    run = probe.run(lines, model=model, out=tmp_path / "run", analyze=False, max_new_tokens=2)
    tensors = weights(model.facts.d_model, 60)
    encoded = encode(run, Effort(sae=str(write_sae(tmp_path / "sae", tensors))))
    task = run["t"]
    record, x = task.typed(ToolRecord), task["resid_post"][LAYER, 0].float()
    activations, back = loops(tensors, x.tolist(), "standard", 0, False, "none")
    active = [feature for feature, value in enumerate(activations) if value > 0][:4]
    ablations = Ablations(encoded, {"t": 0}, {"t": active}, 0)
    opened = LoadedRun(run, model, SilentProgress())
    scorer = Scorer(model, opened.codec)
    tables = EXPERIMENTS["feature_ablation"].make(opened, ablations, ["t"], scorer, SilentProgress())
    ((_, rows),) = tables
    written = sum(activations[f] * tensors["W_dec"][f] for f in active)
    states = {
        ("none", "reconstruction"): torch.tensor(back),
        ("top", "reconstruction"): torch.tensor(back) - written,
        ("top", "state"): x - written,
    }
    chosen = max(record.decision.tool_probabilities, key=lambda entry: entry.log_prob)
    ids, prompt = chosen.token_ids, record.passage.token_ids[: record.passage.n_prompt]
    at, law = len(prompt) - 1, {}
    for place, state in states.items():
        edit = StateEdit("resid_post", LAYER, state, "replace", start=at, end=at + 1)
        steps = plain(model, name, [*prompt, *ids[:-1]], [edit])[at:]
        law[place] = float(steps[range(len(ids)), list(ids)].sum())
    opener = (record.decision.opener_log_prob or 0.0) if record.no_tool == "complement" else 0.0
    by_place = {(row["features"], row["replacement"]): row["log_prob"] for row in rows}
    assert len(by_place) == 5 and [row["n"] for row in rows] == [0, 4, 4, 4, 4]
    for place, expected in law.items():
        assert by_place[place] == pytest.approx(expected + opener, rel=1e-5, abs=1e-4)
    assert len({round(value, 3) for value in by_place.values()}) == 5
