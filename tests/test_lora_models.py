"""Adapters as models: merged they compute what peft computes attached."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel

import probe
from probe.errors import ModelUnavailable
from probe.model.shapes import random_model
from tests.test_lora import SETTINGS, adapted, save


def saved(settings, path, base="random:tiny-llama", shape="tiny-llama"):
    save(adapted(settings, shape, size=0.2), path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return path


@pytest.mark.parametrize("name", ["patterns", "dora", "embedding", "saved", "blocks"])
def test_a_model_name_may_be_an_adapter_and_computes_what_peft_does(name, tmp_path):
    path = saved(SETTINGS[name], tmp_path)
    model = probe.load(str(path))
    ids = torch.arange(5, 25)[None]
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
