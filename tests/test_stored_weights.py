"""Weights as people store them: in several files, quantised, dequantised with a word; what cannot be run here is a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from probe.errors import ModelUnavailable
from probe.model import load
from probe.model.shapes import byte_tokenizer, random_model
from probe.model.weights import _beside_adapter, packed
from tests.conftest import tiny

IDS = torch.tensor([[1, 72, 101, 108, 108, 111]])


def logits(hf) -> torch.Tensor:
    with torch.no_grad():
        return hf(IDS).logits


@pytest.fixture
def stored(tmp_path) -> Path:
    """The tiny Llama, saved in several files."""
    random_model("tiny-llama", torch.float32).save_pretrained(tmp_path, max_shard_size="100KB")
    byte_tokenizer(272).save_pretrained(tmp_path)
    return tmp_path


def test_a_model_in_several_files_is_the_model(stored):
    assert len(list(stored.glob("model-*.safetensors"))) > 1
    model = load(str(stored))
    assert torch.equal(logits(model.hf), logits(tiny("tiny-llama").hf))
    next(stored.glob("model-*.safetensors")).unlink()
    with pytest.raises(ModelUnavailable, match=str(stored)):
        load(str(stored))


def configure(path: Path, **quantisation: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantisation}))


def test_weights_in_fp8_are_dequantised_with_a_word_where_they_cannot_run(stored):
    expected = {}
    for file in stored.glob("model-*.safetensors"):
        weights = {}
        for key, weight in load_file(file).items():
            weights[key] = weight
            if key.endswith("proj.weight"):
                scale = weight.abs().max() / 448
                weights[key] = (weight / scale).to(torch.float8_e4m3fn)
                weights[f"{key}_scale_inv"] = scale.reshape(1, 1)
                expected[key] = weights[key].float() * scale
        save_file(weights, file, metadata={"format": "pt"})
    index = stored / "model.safetensors.index.json"
    places = {key: file.name for file in stored.glob("model-*.safetensors") for key in load_file(file)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    configure(stored, quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic")
    heard: list[str] = []
    model = load(str(stored), log=heard.append)
    assert any("its fp8 weights are dequantised to float32" in line for line in heard)
    assert model.origin["dequantised_from"] == "fp8"
    state = model.hf.state_dict()
    assert len(expected) > 4
    for key, weight in expected.items():
        torch.testing.assert_close(state[key], weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("quantisation", "says"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            r"quantised \(bitsandbytes\).*pip install.*bitsandbytes",
        ),
        ({"load_in_8bit": True}, r"quantised \(bitsandbytes\).*pip install.*bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, r"quantised \(gptq\).*pip install"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, r"quantised \(awq\).*pip install gptqmodel"),
        ({"quant_method": "compressed-tensors"}, r"quantised \(compressed-tensors\).*pip install"),
    ],
)
def test_quantised_weights_that_cannot_run_here_are_a_sentence(stored, quantisation, says):
    configure(stored, **quantisation)
    with pytest.raises(ModelUnavailable, match=says) as caught:
        load(str(stored))
    assert "or give the model with plain weights" in str(caught.value)


def test_weights_in_buffers_of_whole_numbers_are_packed_and_positions_are_not():
    model = torch.nn.Module()
    model.layer = torch.nn.Module()
    model.layer.register_parameter("scale", torch.nn.Parameter(torch.ones(2)))
    model.layer.register_buffer("position_ids", torch.arange(4).reshape(1, 4), persistent=False)
    assert not packed(model)
    model.layer.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    assert packed(model)
    assert not packed(tiny("tiny-gpt2").hf)


def test_how_weights_are_stored_is_recorded_beside_an_adapter_too(stored):
    """The adapter is left out, the weights are those of the folder."""
    configure(stored, quant_method="fp8", weight_block_size=None, activation_scheme="dynamic")
    plain = load(str(stored), log=lambda message: None).origin
    (stored / "adapter_config.json").write_text("{}")
    assert {"dequantised_from": "fp8"}.items() <= plain.items()
    beside = _beside_adapter(stored, torch.float32, "cpu", lambda message: None)[2]
    assert {"dequantised_from": "fp8"}.items() <= beside.items()
