"""Families of decoders: captured numbers are the plain model's, or the family is refused and never crashes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import probe
from probe.capture import CaptureSpec, Continuation, Generation, Job, NonFinite, Reference, run_batch
from probe.errors import ModelUnavailable
from probe.harness.sizes import passage_bytes
from probe.model import outline
from probe.model.attention import KVCache, Piece
from probe.model.exact import in_float32
from probe.model.hooked import Model
from probe.model.names import Source
from probe.model.shapes import byte_tokenizer
from probe.model.sublayers import states_of
from probe.prompts import Candidate, candidates_after, prompt_of
from tests.families import (
    CONTINUATIONS,
    LOOSE,
    N_LAYERS,
    TABLE,
    TEXT,
    VOCABULARY,
    differences,
    families,
    line,
    loaded,
    relative,
    table,
    tiny_config,
    tiny_model,
    written,
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
    "DeepSeek V3.2: an indexer selects keys": ("deepseek_v32", {}),
    "GLM-5: layers that take another's selection": ("glm_moe_dsa", {}),
    "A.X K2: a gate behind latent attention": ("axk2", {}),
    "MiniMax M3: blocks of keys are selected": (
        "minimax_m3_vl_text",
        {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    ),
    "BitNet: a norm between heads and W_O": ("bitnet", {}),
    "Llama 4: chunks": ("llama4_text", {}),
    "MiMo: layers with other key heads, sinks in some": ("mimo_v2_flash", {}),
    "Qwen3-Next: linear attention, gates behind the reads of the others": ("qwen3_next", {}),
    "Falcon-H1: a state-space model beside attention in each layer": ("falcon_h1", {}),
    "Nemotron-H: layers of one thing, MLPs alone among them": ("nemotron_h", {}),
    "LFM2: short convolutions": ("lfm2", {}),
    "Kimi Linear: latent attention among linear": ("kimi_linear", {}),
    "Mamba: no attention at all": ("mamba", {}),
    "RecurrentGemma: states that its modules keep themselves": ("recurrent_gemma", {}),
    "HyperCLOVA X: logits times a factor": ("hyperclovax", {"logits_scaling": 0.125}),
    "MiniCPM3: states over a number before the unembedding": ("minicpm3", {"mlp_bias": False}),
    "Gemma 4: heads of other sizes in some layers, keys shared": ("gemma4_text", {}),
    "Gemma 3: the text part of a multimodal model": ("gemma3", {}),
}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_captured_numbers_are_those_of_the_plain_model(mechanism):
    family, more = MECHANISMS[mechanism]
    gaps = differences(loaded(family, **more))
    assert {name: gap for name, gap in gaps.items() if not gap < LOOSE} == {}


def test_what_a_gated_head_writes_of_the_only_token_that_it_sees_is_what_the_plain_w_o_makes_of_its_input():
    """A row at position 0 reads position 0 alone, so that span's norm is that of the head's whole part of the output."""
    model = loaded("qwen3_next")
    outcome = model.capture("a b", sites="value_to_spans:all", max_new_tokens=1)
    assert outcome.attention_layers == [1, 3] and outcome.tensors["value_to_spans"].shape[0] == 2
    column = next(
        c
        for c, label in enumerate(outcome.labels)
        if label in [s.label for s in outcome.spans if s.start == 0]
    )
    given: list[torch.Tensor] = []
    hooks = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda _m, inputs: given.append(inputs[0]))
        for block in model.blocks
        if hasattr(block, "self_attn")
    ]
    with torch.inference_mode():
        model.hf(input_ids=torch.tensor([outcome.token_ids[:1]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    for index, layer in enumerate((1, 3)):
        by_head = given[index][0, 0].view(4, -1)
        expected = torch.einsum("hd,hdm->hm", by_head, model.w_o(layer)).norm(dim=-1)
        assert relative(outcome.tensors["value_to_spans"][index, :, 0, column], expected) < LOOSE


@pytest.mark.parametrize("family", ["qwen3_next", "mamba", "falcon_h1"])
def test_a_recurrent_model_in_a_batch_with_shared_prefixes_gives_what_each_prompt_alone_gives_and_transformers_generates(
    family,
):
    model = loaded(family)
    texts = [TEXT + end for end in (" One.", " Two words and more.", " One.", "")]
    prompts = [prompt_of(text, model.codec, 8, _candidates(model, text)) for text in texts]
    jobs = [Job(prompt, str(number)) for number, prompt in enumerate(prompts)]
    spec = CaptureSpec(frozenset({"resid_post", "logits", "log_probs"}))
    together = run_batch(model, model.codec, jobs, spec, Generation(6))
    assert max(job.shared for job in jobs) > 16
    for prompt, outcome in zip(prompts, together, strict=True):
        assert not isinstance(outcome, NonFinite)
        alone = run_batch(model, model.codec, [Job(prompt, "alone")], spec, Generation(6))[0]
        assert not isinstance(alone, NonFinite)
        for name, tensor in alone.tensors.items():
            assert relative(outcome.tensors[name], tensor) < LOOSE
        assert outcome.candidate_log_probs == pytest.approx(alone.candidate_log_probs, abs=1e-4)
        ids = torch.tensor([prompt.token_ids[: prompt.n_prompt]])
        plain = model.hf.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()
        assert outcome.token_ids == plain[: len(outcome.token_ids)]


def _candidates(model: Any, text: str) -> tuple[Candidate, ...]:
    tokens = candidates_after(text, CONTINUATIONS, model.codec)
    return tuple(Candidate(word, ids) for word, ids in zip(CONTINUATIONS, tokens, strict=True))


def test_an_agent_of_a_hybrid_decides_on_the_side_and_goes_on_as_the_plain_model_does(tmp_path):
    """Decisions are scored behind the transcript in passes that record nothing, on states that must come back."""
    model = loaded("qwen3_next", max_position_embeddings=4096)
    task = {"id": "a", "kind": "agent", "input": "What is 2 + 3?", "tools": ["calculator", "text_counter"]}
    run = probe.run([task], model=model, out=tmp_path / "run", analyze=False, max_new_tokens=6)
    record = run["a"].record
    assert record["status"] == "ok" and len(record["turns"]) == 1
    ids, log_probs = run["a"]["token_ids"].long(), run["a"]["log_probs"]
    with torch.inference_mode():
        logits = model.hf(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
    first = record["n_prompt"]
    expected = logits[first - 1 : -1].gather(1, ids[first:, None])[:, 0]
    assert relative(log_probs, expected) < LOOSE
    opener = model.codec.encode(record["call_prefix"])
    for entry in (entry for entry in record["turns"][0]["tool_probabilities"] if entry["tool"]):
        whole = [*ids[:first].tolist(), *opener, *entry["token_ids"]]
        with torch.inference_mode():
            logits = (
                model.hf(input_ids=torch.tensor([whole]), use_cache=False).logits[0].float().log_softmax(-1)
            )
        at = torch.arange(first + len(opener) - 1, len(whole) - 1)
        assert float(logits[at, torch.tensor(whole)[at + 1]].sum()) == pytest.approx(
            entry["log_prob"], abs=1e-3
        )


def test_a_w_o_that_is_stored_packed_is_refused():
    class Packed(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(input, self.weight.float() / 100)

    hf = tiny_model(tiny_config("llama"))
    for layer in hf.model.layers:
        plain = layer.self_attn.o_proj
        packed = Packed(plain.in_features, plain.out_features, bias=False).requires_grad_(False)
        packed.weight.data = (100 * plain.weight).round().to(torch.int8)
        layer.self_attn.o_proj = packed
    with pytest.raises(ModelUnavailable, match="W_O is stored as int8"):
        Model(hf, byte_tokenizer(VOCABULARY), Source("llama", "random", "llama"), {"resolved": "llama"})


def test_a_w_o_that_quantises_its_weights_as_it_runs_is_refused():
    """As BitNet checkpoints that are trained on (online quantisation): heads do not write what the stored weights say."""
    from transformers.integrations.bitnet import AutoBitLinear

    hf = tiny_model(tiny_config("bitnet"))
    for layer in hf.model.layers:
        plain = layer.self_attn.o_proj
        ternary = AutoBitLinear(plain.in_features, plain.out_features, bias=False, online_quant=True)
        ternary.weight = plain.weight
        layer.self_attn.o_proj = ternary
    with pytest.raises(
        ModelUnavailable, match=r"layer 0: W_O \(AutoBitLinear\) gives something else than its weights"
    ):
        Model(hf, byte_tokenizer(VOCABULARY), Source("bitnet", "random", "bitnet"), {"resolved": "bitnet"})


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("deepseek_v32", {"index_topk": 20}),
        (
            "minimax_m3_vl_text",
            {"layer_types": ["minimax_m3_sparse"] * 4, "index_block_size": 5, "index_topk_blocks": 4},
        ),
    ],
)
def test_the_context_ends_where_an_indexer_begins_to_leave_keys_out(family, more, tmp_path):
    tiny_config(family, **more).save_pretrained(tmp_path)
    byte_tokenizer(VOCABULARY).save_pretrained(tmp_path)
    model = loaded(family, **more)
    assert model.facts.n_ctx == outline(str(tmp_path))["shape"]["n_ctx"] == 20
    outcome = model.capture("x" * 15, max_new_tokens=8)
    assert len(outcome.token_ids) == 21  # the last is never run
    with torch.inference_mode():
        plain = model.hf(input_ids=torch.tensor([outcome.token_ids[:-1]]), use_cache=False).logits[0]
    expected = plain.log_softmax(-1)[outcome.n_prompt - 1 :].max(-1)
    assert expected.indices.tolist() == outcome.token_ids[outcome.n_prompt :]
    assert relative(outcome.tensors["log_probs"], expected.values) < LOOSE


def test_the_sizes_of_mambas_residual_stream_in_16_bits_are_those_that_are_saved():
    model = loaded("mamba", dtype=torch.bfloat16)
    outcome = model.capture(TEXT, sites="resid_post,resid_span_mean", max_new_tokens=4)
    spec = CaptureSpec(frozenset({"resid_post", "resid_span_mean"}))
    n_new = len(outcome.token_ids) - outcome.n_prompt
    counted = passage_bytes(model.facts, spec, 2, outcome.n_prompt, n_new, len(outcome.labels), 0)
    assert outcome.tensors["resid_post"].dtype == torch.float32
    for name in spec.sites:
        assert counted[name] == outcome.tensors[name].nbytes


@pytest.mark.parametrize("family", ["mamba", "nemotron_h", "bamba"])
def test_a_float32_residual_stream_is_what_blocks_hand_on_not_what_a_configuration_says(family, tmp_path):
    given = {"residual_in_fp32": True}
    model = loaded(family, torch.bfloat16, **given)
    seen = []
    hook = model.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(states_of(out).dtype))
    with torch.inference_mode():
        model.hf(input_ids=torch.arange(2, 9)[None], use_cache=False)
    hook.remove()
    assert model.facts.float32_residual == (seen == [torch.float32]) == (family == "mamba")
    tiny_config(family, **given).save_pretrained(tmp_path)
    byte_tokenizer(VOCABULARY).save_pretrained(tmp_path)
    assert outline(str(tmp_path))["shape"]["float32_residual"] == (family == "mamba")


def test_a_variant_of_a_reference_goes_on_from_a_state_that_was_not_kept():
    """The reference keeps the state behind its last token alone; one in between is made again from the layer's inputs."""
    model, ids = loaded("qwen3_next"), list(range(5, 45))
    reference = Reference(model, ids, 10)
    other = [*ids[:20], 7, 8, 9]
    (hidden,) = reference.run([Continuation(other, 20, 20)])
    with torch.inference_mode():
        expected = model.hf(input_ids=torch.tensor([other]), use_cache=False).logits[0, 20:]
    assert relative(model.unembed(hidden), expected) < LOOSE


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("gemma3n_text", "layer 0 hands on several residual streams"),
        ("mllama", "layer 3 is not run on text alone"),
        ("bart", "it is the decoder of a model that has an encoder as well"),
        (
            "zaya",
            r"layer 0: ZayaAttention cannot run on several sequences in one pass.* \(RuntimeError: The size of",
        ),
        ("zamba", "the attention module ZambaAttention has no layer number"),
        ("hy_v4", "layer 0 hands on several residual streams"),
        ("xlstm", "xLSTMModel keeps a memory that is neither keys and values nor a state"),
        ("inkling_text", "layer 0: InklingShortConvolution keeps a memory"),
        ("rwkv", "the attention of layer 0 does not go through"),
        (
            "diffllama",
            "layer 0 calls its attention 2 times",
        ),
        ("doge", "layer 0 computes something that probe does not see: logits differ from the plain model's"),
        ("modernbert-decoder", "more than one matrix stands between the last states and the logits"),
    ],
)
def test_a_family_that_cannot_be_captured_is_refused_with_the_layer_and_the_reason(family, says):
    with pytest.raises(
        ModelUnavailable, match=f"architecture {family}.* cannot be captured faithfully: .*{says}"
    ):
        loaded(family)


@pytest.mark.slow
def test_the_table_of_families_is_what_a_run_of_all_of_them_says():
    lines = {family: line(family) for family in families()}
    told = written()
    assert {family: entry[:2] for family, entry in lines.items()} == {
        f: entry[:2] for f, entry in told.items()
    }
    assert not any(entry[0] == "differs" for entry in lines.values())
    # Which numbers rounding parts depends on the processor; whether a family runs in 16 bits does not.
    for family, entry in lines.items():
        for now, before in zip(entry[2:], told[family][2:], strict=True):
            for fault in ("refused", "not computed"):
                assert now.startswith(fault) == before.startswith(fault), family
    assert TABLE.read_text() == table(told)


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


def test_the_outline_of_a_family_has_the_sizes_of_its_heads_and_the_layers_without_any(tmp_path):
    for family in (
        "deepseek_v3", "falcon", "qwen3_next", "lfm2", "nemotron_h", "falcon_h1", "mamba", "gemma4_text"
    ):  # fmt: skip
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
