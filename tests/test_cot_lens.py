"""Reads in logits and the logit lens: against plain hooks on transformers' own forward, and slow sums."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from probe.analyzers.cot import lens, reads
from probe.analyzers.rows import to_table
from probe.experiments import intervene
from probe.experiments.cot.lens import read_logits
from probe.model.hooked import Model
from probe.model.linear import logit_directions, post_norms
from tests.conftest import TINY, tiny
from tests.slow import slow_attention
from tests.test_analyzers import make

ATTENTION = ("self_attn", "attn", "attention")


@pytest.fixture(scope="module", params=TINY)
def named(request, tmp_path_factory):
    run = make(tmp_path_factory.mktemp("lens"), "cot", request.param)
    intervene(run, ["read_logit", "answer_lens"], model=tiny(request.param))
    return request.param, run


def written(hf, ids):
    """What each layer's attention adds to the residual stream, [position, d_model], by hooks: behind Gemma 2's
    second norm."""
    actual, hooks = [], []
    for block in hf.base_model.layers if hasattr(hf.base_model, "layers") else hf.base_model.h:
        module = next(getattr(block, name) for name in ATTENTION if hasattr(block, name))
        if hasattr(block, "pre_feedforward_layernorm"):
            module = block.post_attention_layernorm
        hooks.append(
            module.register_forward_hook(
                lambda m, i, out: actual.append((out[0] if isinstance(out, tuple) else out)[0])
            )
        )
    with torch.no_grad():
        out = hf(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return actual, out.logits[0].double()


def norm_of(hf):
    """weight, bias, eps, whether the mean is subtracted"""
    base = hf.base_model
    module = next(getattr(base, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(base, name))
    weight = module.weight.double()
    layer = isinstance(module, torch.nn.LayerNorm)
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    weight = 1 + weight if "Gemma" in type(module).__name__ else weight
    return weight, (module.bias.double() if layer else torch.zeros_like(weight)), eps, layer


def test_sources_and_all_that_is_no_read_add_up_to_the_logit(named):
    name, run = named
    hf, task = tiny(name).hf, run["c1"]
    ids = task.record["token_ids"]
    _, rows, _, actual = read_logits(task, tiny(name))
    attention, logits = written(hf, ids[:-1])
    final, states = task["resid_post"][-1].double(), torch.stack(attention).double()[:, rows]
    weight, bias, eps, centred = norm_of(hf)
    x = final - final.mean(-1, keepdim=True) if centred else final
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    unembed = hf.get_output_embeddings().weight.double()[[ids[p + 1] for p in rows]]
    rest = final - states.sum(0)
    for layer, block in enumerate(
        hf.base_model.layers if hasattr(hf.base_model, "layers") else hf.base_model.h
    ):
        module = next(getattr(block, part) for part in ATTENTION if hasattr(block, part))
        out = next(getattr(module, part) for part in ("o_proj", "c_proj", "dense") if hasattr(module, part))
        if out.bias is not None and post_norms(tiny(name))[layer] is None:
            rest = rest + out.bias.double()
    rest = rest - rest.mean(-1, keepdim=True) if centred else rest
    other = (unembed * (rest * scale * weight + bias)).sum(-1)
    expected = torch.stack([logits[p, ids[p + 1]] for p in rows])
    if cap := getattr(hf.config, "final_logit_softcapping", None):
        expected = cap * torch.atanh(expected / cap)
    total = actual.double().sum((0, 2)) + other
    assert float((total - expected).abs().max() / expected.abs().max()) < 1e-4
    assert float(actual.abs().max() / expected.abs().max()) > 1e-3


def test_only_a_norm_behind_the_attention_counts_as_one():
    assert all(post_norms(tiny("tiny-gemma2")))
    for name in ("tiny-llama", "tiny-gemma", "tiny-gpt2", "tiny-neox"):
        assert not any(post_norms(tiny(name)))


def test_a_read_in_logits_is_the_slow_sum_over_a_source(tmp_path):
    run, model = make(tmp_path, "cot"), tiny("tiny-llama")
    task, layer, head = run["c1"], 2, 4
    ids, spans = task.record["token_ids"], task.record["spans"]
    _, rows, labels, logits = read_logits(task, model, head)
    alpha = slow_attention(model.hf, ids[:-1])[layer, head].double()
    values = task["values"][layer].double()[head // 3]
    w_o = model.hf.model.layers[layer].self_attn.o_proj.weight.double()[:, 8 * head : 8 * head + 8]
    final = task["resid_post"][-1].double()
    scale = (final.square().mean(-1, keepdim=True) + model.hf.config.rms_norm_eps).rsqrt()
    for row in (0, len(rows) // 2, len(rows) - 1):
        u = (
            model.hf.lm_head.weight.double()[ids[rows[row] + 1]]
            * model.hf.model.norm.weight.double()
            * scale[row]
        )
        for column, label in enumerate(labels):
            places = [p for s in spans if s["label"] == label for p in range(s["start"], s["end"])]
            slow = sum(
                (float(alpha[rows[row], j] * (w_o @ values[j] @ u)) for j in places if j <= rows[row]), 0.0
            )
            assert float(logits[layer, row, column]) == pytest.approx(slow, abs=1e-6)


def test_read_logit_rows_are_means_over_the_readers_rows(named):
    name, run = named
    frame = to_table(lens.measures(run)).to_pandas()
    _, rows, labels, logits = read_logits(run["c1"], tiny(name))
    span = next(s for s in run["c1"].record["spans"] if s["label"] == "step:2")
    part = [rows.index(p - 1) for p in range(span["start"], span["end"])]
    expected = logits[:, part].double().mean(1)[:, labels.index("question")]
    table = frame[(frame.task_id == "c1") & (frame.name == "read_logit") & (frame.step == 2)]
    table = table[table.span == "question"]
    assert table[table.layer.notna()].sort_values("layer").value.tolist() == pytest.approx(
        expected.tolist(), abs=1e-6
    )
    whole = table[table.layer.isna()].iloc[0]
    assert whole.value == pytest.approx(float(expected.sum()), abs=1e-6)
    assert whole.n == len(part)
    assert frame[(frame.name == "read_logit") & (frame.step == 1) & (frame.span == "step:2")].empty


def test_the_lens_ends_in_the_models_own_log_probability(named):
    name, run = named
    model, task = tiny(name), run["c1"]
    frame = to_table(lens.measures(run)).to_pandas()
    rows = frame[(frame.name == "answer_lens") & (frame.task_id == "c1")]
    ids, spans = task.record["token_ids"], task.record["spans"]
    answer = next(s for s in spans if s["label"] == "answer")
    place = next(p for p in range(answer["start"], answer["end"]) if model.tokenizer.decode([ids[p]]).strip())
    with torch.no_grad():
        log_probs = model.hf(torch.tensor([ids[:-1]]), use_cache=False).logits[0].double().log_softmax(-1)
    last = rows[rows.layer == model.facts.n_layers - 1]
    at_answer = last[last.reader == "answer"].value.iloc[0]
    assert at_answer == pytest.approx(float(log_probs[place - 1, ids[place]]), abs=1e-4)
    for span in spans:
        if span["label"].startswith("step:"):
            value = last[last.step == int(span["label"][5:])].value.iloc[0]
            assert value == pytest.approx(float(log_probs[span["end"] - 1, ids[place]]), abs=1e-4)
    before = last[(last.step == 0)].value.iloc[0]
    assert before == pytest.approx(float(log_probs[task.record["n_prompt"] - 1, ids[place]]), abs=1e-4)
    assert len(rows) == model.facts.n_layers * (len(task.record["steps"]) + 2)


def test_one_layer_and_head_of_the_reads_is_had_alone(named):
    _, run = named
    whole = reads.step_reads(run["c1"])
    n_heads = run["c1"].shape("attn_to_spans")[1]
    alone = [reads.step_reads(run["c1"], layer=1, head=head) for head in range(n_heads)]
    assert alone[0].layers == [1]
    assert np.nanmax(abs(np.mean([a.values[0] for a in alone], 0) - whole.values[1])) < 1e-12
    with pytest.raises(IndexError, match="no head"):
        reads.step_reads(run["c1"], head=n_heads)
    with pytest.raises(IndexError, match="was not captured"):
        reads.step_reads(run["c1"], layer=99)


def test_without_the_memory_there_are_no_reads_in_logits(tmp_path):
    run = make(tmp_path, "cot", capture="attn_to_spans,resid_post")
    intervene(run, ["read_logit", "answer_lens"], model=tiny("tiny-llama"))
    assert set(run.table("reasoning").experiment) == {"answer_lens"}


FAMILIES = ("cohere", "cohere2", "olmo", "stablelm", "nemotron", "olmo2")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_logit_is_linear_behind_the_final_norm_whatever_its_type(family):
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3, "num_key_value_heads": 3}
    config = AutoConfig.for_model(family, vocab_size=64, num_hidden_layers=2, pad_token_id=0, **sizes)
    hf, generator = AutoModelForCausalLM.from_config(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model = Model(hf, None, SimpleNamespace(name=family), {})
    states: list[torch.Tensor] = []
    hook = model.blocks[-1].register_forward_hook(
        lambda _m, _i, out: states.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        logits = hf(torch.arange(5, 15)[None], use_cache=False).logits[0]
    hook.remove()
    tokens = list(range(20, 30))
    read = logit_directions(model, states[0][0], tokens)
    assert read is not None
    expected = logits[range(10), tokens]
    assert ((read[0] * states[0][0]).sum(-1) + read[1]).numpy() == pytest.approx(expected.numpy(), abs=1e-5)
