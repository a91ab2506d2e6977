"""Families of decoders: captured numbers are the plain model's, or the family is refused and never crashes."""

from __future__ import annotations

import pytest

from tests.families import LOOSE, TABLE, differences, loaded, table

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
    "Gemma 3n: layers that read another layer's keys": ("gemma3n_text", {}),
    "MiMo: layers with other key heads": ("mimo_v2_flash", {}),
    "Gemma 3: the text part of a multimodal model": ("gemma3", {}),
}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_captured_numbers_are_those_of_the_plain_model(mechanism):
    family, more = MECHANISMS[mechanism]
    gaps = differences(loaded(family, **more))
    assert {name: gap for name, gap in gaps.items() if not gap < LOOSE} == {}


@pytest.mark.slow
def test_the_table_of_families_is_what_a_run_of_all_of_them_says():
    written = table()
    assert "| differs |" not in written
    assert TABLE.read_text() == written
