"""Rotary frequencies that follow the length of a sequence, against the plain model run on each sequence alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from probe.capture import CaptureSpec, Generation, Job, NonFinite, run_batch
from probe.capture.model import CapturingModel
from probe.capture.reference import Continuation, Reference
from probe.model.names import Source
from probe.model.shapes import byte_tokenizer
from probe.prompts import Candidate, prompt_of

SWITCH = 64
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 8.0, 16.0, 32.0],
    "original_max_position_embeddings": SWITCH,
}
KINDS = {
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": SWITCH, "sliding_window": None},
    "llama": {"rope_parameters": LONGROPE},
    "phimoe": {
        "rope_parameters": LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.3},
        "original_max_position_embeddings": SWITCH,
        "num_local_experts": 2,
        "sliding_window": None,
    },
}


def model_of(kind: str, **more) -> CapturingModel:
    sizes = dict(
        vocab_size=272,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more)).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) * 1.3 * parameter.shape[-1] ** -0.5)
    return CapturingModel(hf, byte_tokenizer(272), Source(kind, "random", kind), {"resolved": kind})


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    model = model_of(request.param, **KINDS[request.param])
    model.codec.eos_ids = frozenset()
    return model


def plain(model, ids) -> tuple[torch.Tensor, list[torch.Tensor]]:
    with torch.inference_mode():
        out = model.hf(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return out.logits[0].log_softmax(-1), [states[0] for states in out.hidden_states]


def prompt(model, length: int, new: int = 4):
    prompt = prompt_of("The cat sat on the mat and " * 12, model.codec, new)
    prompt.token_ids = [*prompt.token_ids[: length - 1], prompt.token_ids[length]]
    prompt.n_prompt = length
    prompt.spans = [type(s)(s.label, s.start, min(s.end, length)) for s in prompt.spans]
    prompt.stop_ids = frozenset()
    return prompt


def test_the_switch_is_where_the_configuration_says(model):
    assert model.switches == (SWITCH,)
    assert [model.switched(length) for length in (1, SWITCH, SWITCH + 1)] == [0, 0, 1]


def test_sequences_on_both_sides_share_a_pass_and_each_is_what_it_is_alone(model, monkeypatch):
    """Passes of 50 tokens: prompts are cut over passes as well; and all begin alike, so that prefixes are shared."""
    monkeypatch.setattr("probe.capture.prefill.PASS_TOKENS", 50)
    lengths = [20, 150, 50, SWITCH - 4, SWITCH, SWITCH + 1, 300]
    jobs = [Job(prompt(model, length), str(length)) for length in lengths]
    for job in jobs:
        job.prompt.candidates = (Candidate("x", (50,)), Candidate("yz", (60, 61)))
    spec = CaptureSpec(frozenset({"resid_post", "log_probs", "logits"}))
    outcomes = run_batch(model, model.codec, jobs, spec, Generation(4))
    alone = [run_batch(model, model.codec, [job], spec, Generation(4))[0] for job in jobs]
    for length, outcome, single in zip(lengths, outcomes, alone, strict=True):
        assert not isinstance(outcome, NonFinite) and not isinstance(single, NonFinite)
        assert outcome.token_ids == single.token_ids
        log_probs, hidden = plain(model, outcome.token_ids[:-1])
        expected = torch.stack(hidden[1:-1])[:, length - 1 :]
        torch.testing.assert_close(outcome.tensors["resid_post"][:-1], expected, atol=2e-4, rtol=1e-4)
        emitted = log_probs[length - 1 :].gather(1, torch.tensor(outcome.token_ids[length:])[:, None])[:, 0]
        torch.testing.assert_close(outcome.tensors["log_probs"], emitted, atol=2e-4, rtol=1e-4)
        if length != SWITCH:  # where a candidate crosses it keeps the prompt's frequencies
            scored = plain(model, [*outcome.token_ids[:length], 60])[0]
            assert outcome.candidate_log_probs[1] == pytest.approx(
                float(scored[-2, 60] + scored[-1, 61]), abs=5e-4
            )


def test_generation_ends_before_it_crosses(model):
    for length, total in ((SWITCH - 10, SWITCH), (SWITCH, SWITCH + 1), (SWITCH + 1, SWITCH + 31)):
        (outcome,) = run_batch(
            model, model.codec, [Job(prompt(model, length), "t")], CaptureSpec(frozenset()), Generation(30)
        )
        assert not isinstance(outcome, NonFinite)
        assert (len(outcome.token_ids), outcome.finish_reason) == (total, "length")


def test_a_variant_across_the_switch_is_run_whole(model):
    ids = prompt(model, 80).token_ids
    reference = Reference(model, ids, 40)
    shorter = [*ids[:40], *ids[65:]]
    longer = [*ids[:45], 70, 71, *ids[45:]]
    variants = [Continuation(shorter, 30, 39), Continuation(longer, 40, 44)]
    for variant, hidden in zip(variants, reference.run(variants), strict=True):
        expected = plain(model, variant.token_ids)[0][variant.first :]
        torch.testing.assert_close(model.unembed(hidden).log_softmax(-1), expected, atol=2e-4, rtol=1e-4)


def test_dynamic_frequencies_do_not_depend_on_what_ran_before():
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = model_of("llama", rope_parameters=parameters)
    assert model.switches == ()  # only beyond the positions that it has
    plain(model, prompt(model, 300).token_ids * 3)  # leaves the frequencies of 900 positions behind
    ids = prompt(model, 100).token_ids
    captured = model.capture(prompt(model, 100)).tensors["logits"][0].log_softmax(-1)
    torch.testing.assert_close(captured, plain(model, ids)[0][-1], atol=2e-4, rtol=1e-4)
