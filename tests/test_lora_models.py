"""Adapters as models: merged they compute what peft computes attached."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import probe
from probe.errors import ModelUnavailable
from probe.model.shapes import byte_tokenizer, random_model
from tests.test_lora import SETTINGS, adapted, save


def saved(settings, path, base="random:tiny-llama", shape="tiny-llama"):
    save(adapted(settings, shape, size=0.2), path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return path


TIED = {
    "tied": dict(target_modules=["embed_tokens", "q_proj"], r=3, lora_alpha=9, ensure_weight_tying=True),
    "tied_head": dict(target_modules=["lm_head", "embed_tokens"], r=3, ensure_weight_tying=True),
    "tied_saved": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "tokens": dict(target_modules=["q_proj"], trainable_token_indices=[7, 200]),
}


@pytest.mark.parametrize("name", ["patterns", "dora", "embedding", "saved", "blocks", *TIED])
def test_a_model_name_may_be_an_adapter_and_computes_what_peft_does(name, tmp_path):
    path = saved((SETTINGS | TIED)[name], tmp_path)
    model = probe.load(str(path))
    ids = torch.tensor([[*range(5, 25), 200]])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        reference = PeftModel.from_pretrained(random_model("tiny-llama", torch.float32), str(path)).eval()
        expected, actual = reference(input_ids=ids).logits, model.hf(input_ids=ids).logits
        base = random_model("tiny-llama", torch.float32).eval()(input_ids=ids).logits
    assert (actual - expected).abs().max() < 1e-4
    assert (actual - base).abs().max() > 1e-2


def test_a_run_on_an_adapter_names_it_and_its_weights_hash_covers_it(tmp_path):
    path = saved(SETTINGS["plain"], tmp_path / "adapter")
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(
        '{"id": "a", "kind": "prompting", "input": "one two", "variants": [{"name": "p", "prefix": "x "}]}\n'
    )
    fresh = probe.run(tasks, model=str(path), out=tmp_path / "run", max_new_tokens=2)
    plain = probe.run(tasks, model="random:tiny-llama", out=tmp_path / "plain", max_new_tokens=2)
    described = fresh.run["model"]
    assert described["adapter"]["r"] == 4 and len(described["adapter"]["blake3"]) == 64
    assert described["weights_hash"] != plain.run["model"]["weights_hash"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda key, tensor: {key.replace(".layers.", ".language_model.layers."): tensor},
            "not used .*missing",
        ),
        (lambda key, tensor: {} if "lora_A" in key else {key: tensor}, "28 missing .*lora_A"),
        (lambda key, tensor: {} if "2.mlp.up_proj.lora_B" in key else {key: tensor}, "1 missing .*lora_B"),
        (
            lambda key, tensor: {key: tensor, key.replace("q_proj", "q_norm"): tensor.clone()},
            "8 not used .*q_norm",
        ),
    ],
)
def test_an_adapter_whose_weights_do_not_all_act_is_refused_by_name(change, says, tmp_path):
    """peft leaves an unknown key out and a missing factor as it was made: zero, so that the base is run."""
    path = saved(SETTINGS["plain"], tmp_path)
    file = path / "adapter_model.safetensors"
    stored = load_file(file)
    altered = {new: kept for key, tensor in stored.items() for new, kept in change(key, tensor).items()}
    save_file(altered, file, metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match=says):
        probe.load(str(path))


@pytest.fixture
def both(tmp_path):
    """A directory that holds a model and an adapter on it."""
    path = saved(SETTINGS["plain"], tmp_path / "both")
    random_model("tiny-llama", torch.float32).save_pretrained(path)
    byte_tokenizer(272).save_pretrained(path)
    return path


def test_a_directory_with_both_configurations_is_the_model_with_the_adapter_merged(both):
    model = probe.load(str(both))
    assert model.source.kind == "adapter" and model.origin["adapter"]["r"] == 4
    reference = AutoModelForCausalLM.from_pretrained(both)  # attaches the adapter by itself
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        assert (model.hf(ids).logits - reference(ids).logits).abs().max() < 1e-4
    alone = probe.load(f"random:tiny-llama+{both}")
    actual, expected = (m.capture("hello", sites="value_to_spans").tensors for m in (model, alone))
    assert torch.equal(actual["value_to_spans"], expected["value_to_spans"])


def test_a_hub_model_with_an_adapter_in_it_says_so(both, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--org--both"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("1" * 40)
    (repository / "snapshots").mkdir()
    both.rename(repository / "snapshots" / ("1" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = probe.load("org/both", offline=True)
    assert model.origin["adapter"]["r"] == 4
    assert not getattr(model.hf, "_hf_peft_config_loaded", False)


def test_another_base_is_written_before_the_adapter(tmp_path):
    path = saved(SETTINGS["plain"], tmp_path, base="org/never-there")
    with pytest.raises(ModelUnavailable, match=r"BASE\+"):
        probe.load(str(path), offline=True)
    assert probe.load(f"random:tiny-llama+{path}").facts.n_layers == 4


def test_adapters_that_do_not_fit_are_refused_with_advice(tmp_path):
    path = saved(SETTINGS["plain"], tmp_path, base="random:tiny-gpt2")
    with pytest.raises(ModelUnavailable, match="could not put this adapter"):
        probe.load(str(path))
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(ModelUnavailable, match="pickled"):
        probe.load(str(path))


def test_a_bias_that_no_weight_can_hold_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = saved(dict(target_modules=["q_proj"], r=2, lora_bias=True), tmp_path)
    with pytest.raises(ModelUnavailable):
        probe.load(str(path))
    assert LoraConfig.from_pretrained(str(path)).lora_bias


@pytest.mark.parametrize(
    "settings, reason",
    [
        (dict(init_lora_weights="pissa_niter_4"), "draws random numbers"),
        (dict(layer_replication=[[0, 3], [1, 4]]), "layer_replication"),
    ],
)
def test_what_cannot_be_made_again_is_refused_with_the_reason(settings, reason, tmp_path):
    path = saved(dict(target_modules=["q_proj"], r=4, **settings), tmp_path)
    with pytest.raises(ModelUnavailable, match=reason):
        probe.load(str(path))
