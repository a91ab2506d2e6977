"""Families of decoders: captured numbers are the plain model's, or the family is refused and never crashes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import probe
from probe.errors import ModelUnavailable
from probe.model import outline
from probe.model.attention import KVCache, Piece
from probe.model.exact import in_float32
from probe.model.shapes import byte_tokenizer
from tests.families import (
    LOOSE,
    N_LAYERS,
    TABLE,
    VOCABULARY,
    differences,
    loaded,
    relative,
    table,
    tiny_config,
)

MECHANISMS = {
    "OPT: learned positions, a decoder inside another model": ("opt", {}),
    "GPT-J: rotary pairs, attention outside the registry": ("gptj", {}),
    "GPT-Neo: layers with a window, attention outside the registry": ("gpt_neo", {}),
    "CodeGen": ("codegen", {}),
    "BLOOM: ALiBi": ("bloom", {"n_head": 6, "hidden_size": 48}),
    "MPT: ALiBi": ("mpt", {"n_heads": 4}),
    "Falcon: one key head": ("falcon", {"multi_query": True, "alibi": False}),
    "Falcon: key heads of groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon: ALiBi": ("falcon", {"alibi": True, "multi_query": False, "num_kv_heads": 4}),
    "XGLM: sinusoidal positions": ("xglm", {}),
    "GPT: no cache": ("openai-gpt", {}),
    "DeepSeek: latent attention": ("deepseek_v3", {}),
    "Llama 4: chunks": ("llama4_text", {}),
    "MiMo: layers with other key heads, sinks in some": ("mimo_v2_flash", {}),
    "Gemma 3: the text part of a multimodal model": ("gemma3", {}),
}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_captured_numbers_are_those_of_the_plain_model(mechanism):
    family, more = MECHANISMS[mechanism]
    gaps = differences(loaded(family, **more))
    assert {name: gap for name, gap in gaps.items() if not gap < LOOSE} == {}


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("gemma3n_text", "layer 0 hands on several residual streams"),
        ("qwen3_next", "its forward pass fails in layer 0"),
        ("mamba", "the attention of layer 0 does not go through"),
        ("diffllama", "logits differ from the plain model's"),
        ("bitnet", "layer 0: W_O does not map the heads' reads"),
    ],
)
def test_a_family_that_cannot_be_captured_is_refused_with_the_layer_and_the_reason(family, says):
    with pytest.raises(
        ModelUnavailable, match=f"architecture {family} cannot be captured faithfully: .*{says}"
    ):
        loaded(family)


@pytest.mark.slow
def test_the_table_of_families_is_what_a_run_of_all_of_them_says():
    written = table()
    assert "| differs |" not in written
    assert TABLE.read_text() == written


def test_a_checkpoint_of_text_and_images_loads_its_text_part(tmp_path):
    """LLaVA is no causal language model of transformers' mapping."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8), text_config=tiny_config("llama")
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    byte_tokenizer(VOCABULARY).save_pretrained(tmp_path)
    model = probe.load(str(tmp_path))
    assert (model.facts.n_layers, model.facts.d_vocab) == (N_LAYERS, VOCABULARY)
    assert max(differences(model).values()) < LOOSE
    shape = outline(str(tmp_path))["shape"]
    assert shape == {name: getattr(model.facts, name) for name in shape}


def test_the_outline_of_latent_attention_and_of_falcon_has_the_sizes_of_their_heads(tmp_path):
    for family in ("deepseek_v3", "falcon"):
        tiny_config(family).save_pretrained(tmp_path)
        byte_tokenizer(VOCABULARY).save_pretrained(tmp_path)
        shape, facts = outline(str(tmp_path))["shape"], loaded(family).facts
        assert shape == {name: getattr(facts, name) for name in shape}


@pytest.mark.parametrize("family", ["bloom", "gptj", "falcon", "mpt", "xglm"])
def test_attention_outside_the_registry_is_measured_in_float32_with_the_modules_own_weights(family):
    """A model in 16 bits is judged by what it gives in float32: parts are copied, stand-ins with them."""
    model = loaded(family, dtype=torch.bfloat16)
    tokens = list(range(5, 25))
    with model.recording(None), in_float32(model.hf, model.decoder):
        recorded = model.unembed(model.forward([Piece(0, 0, tokens)], KVCache(1, 20))[0])
    with torch.inference_mode():
        expected = model.hf.float()(torch.tensor([tokens]), use_cache=False).logits
    assert relative(recorded, expected) < LOOSE
