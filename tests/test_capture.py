"""Captured numbers against transformers (eager), TransformerBridge, and slow plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from probe.capture import SITES, CaptureSpec, Generation, Job, NonFinite, run_batch
from probe.errors import BadInput, UsageError
from probe.maths.reads import LayerAttention, pattern, write_norm_factor
from probe.prompts import Candidate, Segment, ToolPart, prompt_of, tool_parts
from tests.conftest import tiny

TEXTS = (
    "List the tools, then choose. ",
    "A somewhat longer request <|im_end|> that is not as short as the first one was. " * 2,
    "Third. " * 9,
)


PARTS = (ToolPart("name", 0, 5), ToolPart("description", 6, 9), ToolPart("name", 9, 11))
"""Of a tool whose name stands in two places."""


def make_jobs(model, n_new: int = 12) -> list[Job]:
    jobs = []
    for index, text in enumerate(TEXTS):
        segments = [
            Segment("Rules of the game. ", "system"),
            Segment("First tool.\n", "tool:a", parts=PARTS),
            Segment(text, "user"),
            Segment("Call: "),
        ]
        prompt = prompt_of(segments, model.codec, n_new)
        names = ("abc,", "abd,", "x,", "abcd,") if index != 1 else ("q,", "zzz,")
        prompt.candidates = tuple(Candidate(name, tuple(model.codec.encode(name))) for name in names)
        jobs.append(Job(prompt, str(index)))
    return jobs


def capture_all(model, n_new: int = 12, **spec):
    jobs = make_jobs(model, n_new)
    return jobs, run_batch(model, model.codec, jobs, CaptureSpec(frozenset(SITES), **spec), Generation(n_new))


def eager(model, token_ids):
    """Plain transformers, one sequence, eager attention: hidden states, attentions, logits, cache."""
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model.hf(
                torch.tensor([token_ids]), output_hidden_states=True, output_attentions=True, use_cache=False
            )
    finally:
        model.hf.set_attn_implementation(before)
    assert len(out.attentions) == model.facts.n_layers
    return out


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest deviation over the largest value; 0 where both are the same, as where a window leaves nothing to be read."""
    deviation = (actual.double() - expected.double()).abs().max()
    return float(deviation and deviation / expected.double().abs().max())


PARITY = 5e-5


def test_residual_stream_equals_transformers_hidden_states(tiny_model):
    _, outcomes = capture_all(tiny_model)
    for outcome in outcomes:
        out = eager(tiny_model, outcome.token_ids[:-1])
        rows = outcome.tensors["rows"]
        assert rows.tolist() == list(range(outcome.n_prompt - 1, outcome.n_prompt + outcome.n_new - 1))
        for layer in range(tiny_model.facts.n_layers - 1):  # the last hidden state is already normed
            assert (
                relative(outcome.tensors["resid_post"][layer], out.hidden_states[layer + 1][0, rows]) < PARITY
            )


def test_logits_and_log_probs_equal_the_plain_model(tiny_model):
    _, outcomes = capture_all(tiny_model)
    for outcome in outcomes:
        logits = eager(tiny_model, outcome.token_ids[:-1]).logits[0].float()
        rows = outcome.tensors["rows"]
        assert relative(outcome.tensors["logits"][0], logits[outcome.n_prompt - 1]) < PARITY
        emitted = torch.tensor(outcome.token_ids[outcome.n_prompt :])
        expected = logits[rows].log_softmax(-1).gather(1, emitted[:, None])[:, 0]
        assert float((outcome.tensors["log_probs"] - expected).abs().max()) < 1e-4
        assert (emitted == logits[rows].argmax(-1)).all()


def test_attention_to_spans_is_the_sum_over_an_eager_pattern(tiny_model):
    _, outcomes = capture_all(tiny_model)
    for outcome in outcomes:
        attentions = eager(tiny_model, outcome.token_ids[:-1]).attentions
        rows = outcome.tensors["rows"]
        for layer, alpha in enumerate(attentions):
            for column, label in enumerate(outcome.labels):
                expected = torch.zeros(alpha.shape[1], len(rows))
                for span in outcome.spans:
                    if span.label == label:
                        expected += alpha[0][:, rows, span.start : span.end].sum(-1)
                actual = outcome.tensors["attn_to_spans"][layer, :, :, column]
                assert float((actual - expected).abs().max()) < 1e-5
            for column, (_, places) in enumerate(tool_parts(outcome.spans).items()):
                keys = [at for place in places for at in range(place.start, place.end)]
                expected = alpha[0][:, outcome.tensors["decisions"]][:, :, keys].sum(-1)
                actual = outcome.tensors["attn_to_parts"][layer, :, :, column]
                assert float((actual - expected).abs().max()) < 1e-5
        assert outcome.parts == [("tool:a", "name"), ("tool:a", "description")]
        assert torch.allclose(outcome.tensors["attn_to_spans"].sum(-1), torch.ones(()), atol=1e-5)


def test_bridge_hooks_agree_at_every_site(tiny_model):
    """TransformerBridge re-implements attention eagerly: names and numbers of its hooks are the oracle."""
    _, outcomes = capture_all(tiny_model)
    outcome = outcomes[1]
    rows = outcome.tensors["rows"]
    with torch.no_grad():
        _, cache = tiny_model.bridge.run_with_cache(torch.tensor([outcome.token_ids[:-1]]))
    facts = tiny_model.facts
    for layer in range(facts.n_layers):
        block = f"blocks.{layer}"
        resid = cache[
            f"{block}.hook_resid_post" if f"{block}.hook_resid_post" in cache else f"{block}.hook_out"
        ]
        assert relative(outcome.tensors["resid_post"][layer], resid[0, rows]) < PARITY
        heads = (len(outcome.token_ids) - 1, -1, facts.d_head)
        name = "hook_rot_k" if f"{block}.attn.hook_rot_k" in cache else "hook_k"
        if facts.model_type != "gpt_neox":  # its bridge exposes no key after rotary; the cache test covers it
            keys = cache[f"{block}.attn.{name}"][0].reshape(-1)
            keys = _as_heads(keys, cache[f"{block}.attn.{name}"][0], facts.n_kv_heads, heads)
            assert relative(outcome.tensors["keys"][layer][:, 1:], keys[:, 1:]) < PARITY
        values = cache[f"{block}.attn.hook_v"][0]
        values = _as_heads(values.reshape(-1), values, facts.n_kv_heads, heads)
        assert relative(outcome.tensors["values"][layer][:, 1:], values[:, 1:]) < PARITY
        z = cache[f"{block}.attn.hook_z"][0].reshape(len(outcome.token_ids) - 1, facts.n_heads, facts.d_head)
        assert relative(outcome.tensors["z"][layer], z[rows].transpose(0, 1)) < PARITY


def _as_heads(flat, states, n_kv, heads):
    """[kv_head, position, d_head], whether the hook keeps heads first, last or fused."""
    if states.ndim == 3 and states.shape[0] == n_kv and states.shape[1] == heads[0]:
        return states
    return flat.reshape(heads[0], n_kv, heads[2]).transpose(0, 1)


def test_keys_and_values_equal_transformers_own_cache(tiny_model):
    from transformers import DynamicCache

    _, outcomes = capture_all(tiny_model)
    for outcome in outcomes:
        cache = DynamicCache()  # without a configuration every layer keeps every position
        with torch.no_grad():
            tiny_model.hf(torch.tensor([outcome.token_ids[:-1]]), past_key_values=cache, use_cache=True)
        assert outcome.tensors["keys"].shape[2] == outcome.n_prompt + outcome.n_new - 1
        for layer in range(tiny_model.facts.n_layers):
            assert (
                relative(outcome.tensors["keys"][layer][:, 1:], cache.layers[layer].keys[0][:, 1:]) < PARITY
            )
            assert (
                relative(outcome.tensors["values"][layer][:, 1:], cache.layers[layer].values[0][:, 1:])
                < PARITY
            )


def test_value_to_spans_and_z_equal_a_slow_plain_loop(tiny_model):
    _, outcomes = capture_all(tiny_model, n_new=3)
    outcome = outcomes[0]
    facts = tiny_model.facts
    attentions = eager(tiny_model, outcome.token_ids[:-1]).attentions
    group = facts.n_heads // facts.n_kv_heads
    for layer in (0, facts.n_layers - 1):
        w_o = tiny_model.w_o(layer)
        for head in range(facts.n_heads):
            values = outcome.tensors["values"][layer, head // group]
            for row, position in enumerate(outcome.tensors["rows"].tolist()):
                alpha = attentions[layer][0, head, position]
                read = sum(alpha[j] * values[j] for j in range(position + 1))
                actual = outcome.tensors["z"][layer, head, row]
                assert float((actual - read).abs().max()) < PARITY * float(values.abs().max())
                for column, label in enumerate(outcome.labels):
                    total = torch.zeros(facts.d_model)
                    for span in outcome.spans:
                        for j in range(span.start, min(span.end, position + 1)):
                            if span.label == label:
                                total += (alpha[j] * values[j]) @ w_o[head]
                    scale = float(outcome.tensors["value_to_spans"][layer].max())
                    actual = float(outcome.tensors["value_to_spans"][layer, head, row, column])
                    assert abs(actual - float(total.norm())) < PARITY * scale
            alpha = attentions[layer][0, head, outcome.n_prompt - 1]
            for column, places in enumerate(tool_parts(outcome.spans).values()):
                keys = [at for place in places for at in range(place.start, place.end)]
                total = sum(alpha[j] * values[j] for j in keys) @ w_o[head]
                actual = float(outcome.tensors["value_to_parts"][layer, head, 0, column])
                scale = float(outcome.tensors["value_to_parts"][layer].max())
                assert abs(actual - float(total.norm())) <= PARITY * scale


def rebuild(outcome, layer: int, attention: LayerAttention, *, group: str = "own") -> torch.Tensor:
    """c_t of every head from the saved tensors alone, in float64; `group` picks the kv head rule."""
    queries, keys, values = (outcome.tensors[name][layer].double() for name in ("queries", "keys", "values"))
    n_heads, n_kv = queries.shape[0], keys.shape[0]
    out = torch.zeros_like(queries)
    for head in range(n_heads):
        kv = head // (n_heads // n_kv) if group == "own" else head % n_kv
        for row, position in enumerate(outcome.tensors["rows"].tolist()):
            first = 0 if attention.window is None else max(0, position + 1 - attention.window)
            scores = keys[kv, first : position + 1] @ queries[head, row] * attention.scale
            if attention.softcap is not None:
                scores = attention.softcap * torch.tanh(scores / attention.softcap)
            out[head, row] = scores.softmax(0) @ values[kv, first : position + 1]
    return out


def test_every_head_read_is_rebuilt_from_saved_queries_keys_and_values(tiny_model):
    _, outcomes = capture_all(tiny_model)
    for layer, attention in enumerate(tiny_model.facts.attention):
        actual = rebuild(outcomes[2], layer, attention)
        assert relative(outcomes[2].tensors["z"][layer], actual) < 1e-5


def test_the_rebuild_notices_a_wrong_kv_head():
    from tests.conftest import tiny

    model = tiny("tiny-llama")
    _, outcomes = capture_all(model)
    wrong = rebuild(outcomes[0], 1, model.facts.attention[1], group="repeat")
    assert relative(outcomes[0].tensors["z"][1], wrong) > 0.05


def test_resid_span_mean_is_the_mean_over_the_spans_positions(tiny_model):
    _, outcomes = capture_all(tiny_model)
    for outcome in outcomes:
        hidden = eager(tiny_model, outcome.token_ids[:-1]).hidden_states
        for layer in range(tiny_model.facts.n_layers - 1):
            for column, label in enumerate(outcome.labels):
                positions = [
                    p
                    for s in outcome.spans
                    if s.label == label
                    for p in range(s.start, s.end)
                    if p < len(outcome.token_ids) - 1
                ]
                expected = hidden[layer + 1][0, positions].mean(0)
                assert relative(outcome.tensors["resid_span_mean"][layer, column], expected) < PARITY


def test_a_batch_gives_what_each_sequence_gives_alone(tiny_model):
    jobs, together = capture_all(tiny_model)
    spec = CaptureSpec(frozenset(SITES))
    for job, outcome in zip(jobs, together, strict=True):
        alone = run_batch(tiny_model, tiny_model.codec, [job], spec, Generation(12))[0]
        assert alone.token_ids == outcome.token_ids
        assert alone.spans == outcome.spans
        assert alone.candidate_log_probs == pytest.approx(outcome.candidate_log_probs, abs=1e-4)
        for name, tensor in alone.tensors.items():
            if tensor.is_floating_point() and name not in ("log_probs", "attn_to_spans"):
                assert relative(outcome.tensors[name], tensor) < PARITY, name


def test_every_candidate_equals_one_full_forward_each(tiny_model):
    jobs, outcomes = capture_all(tiny_model)
    for job, outcome in zip(jobs, outcomes, strict=True):
        prompt = job.prompt
        for candidate, candidate_log_prob in zip(prompt.candidates, outcome.candidate_log_probs, strict=True):
            ids = prompt.token_ids + list(candidate.token_ids)
            with torch.no_grad():
                log_probs = tiny_model.hf(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            expected = sum(
                float(log_probs[prompt.n_prompt - 1 + i, token])
                for i, token in enumerate(candidate.token_ids)
            )
            assert candidate_log_prob == pytest.approx(expected, abs=1e-4)


def test_two_hundred_candidates_score_in_the_forward_of_their_prompt(tiny_model):
    prompt = prompt_of("Choose: ", tiny_model.codec, 1)
    names = [f"tool_{a}{b}," for a in "abcdefghij" for b in range(20)]
    calls = []
    handle = tiny_model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        scores = tiny_model.score(prompt, names)
    finally:
        handle.remove()
    assert len(calls) == 1  # the prompt, and behind it all candidates
    alone = [tiny_model.score(prompt_of("Choose: ", tiny_model.codec, 1), [name])[0] for name in names[::50]]
    for score, packed in zip(alone, scores[::50], strict=True):
        assert score.log_prob == pytest.approx(packed.log_prob, abs=1e-4)


def test_packed_scores_of_all_strings_sum_to_one():
    from tests.conftest import tiny

    model = tiny("tiny-llama")
    prompt = prompt_of("Say: ", model.codec, 1)
    first = [(i,) for i in range(model.facts.d_vocab) if i != 70]
    second = [(70, i) for i in range(model.facts.d_vocab)]  # one first token spelled out by its second
    prompt.candidates = tuple(Candidate(str(ids), ids) for ids in [*first, *second])
    outcome = run_batch(model, model.codec, [Job(prompt, "")], CaptureSpec(frozenset()), Generation(1))[0]
    assert math.fsum(map(math.exp, outcome.candidate_log_probs)) == pytest.approx(1, abs=1e-5)


def test_a_shared_prefix_is_run_once_and_changes_nothing():
    from tests.conftest import tiny

    model = tiny("tiny-llama")
    head = Segment("A long instruction shared by all the tasks of this file. ", "system")
    jobs = [Job(prompt_of([head, Segment(text, "user")], model.codec, 8), text) for text in TEXTS]
    lengths = []
    handle = model.blocks[0].register_forward_hook(
        lambda _m, args, _o: lengths.append(tuple(args[0].shape[:2]))
    )
    spec = CaptureSpec(frozenset(SITES))
    try:
        together = run_batch(model, model.codec, jobs, spec, Generation(8))
    finally:
        handle.remove()
    assert lengths[0][0] == 1
    assert lengths[0][1] >= 50
    for job, outcome in zip(jobs, together, strict=True):
        alone = run_batch(model, model.codec, [job], spec, Generation(8))[0]
        assert alone.token_ids == outcome.token_ids
        for name, tensor in alone.tensors.items():
            if tensor.is_floating_point():
                assert relative(outcome.tensors[name], tensor) < PARITY, name


def test_every_position_can_be_captured():
    from tests.conftest import tiny

    model = tiny("tiny-gemma")
    _, outcomes = capture_all(model, rows=frozenset({"all"}))
    outcome = outcomes[0]
    n_run = len(outcome.token_ids) - 1
    assert outcome.tensors["rows"].tolist() == list(range(n_run))
    hidden = eager(model, outcome.token_ids[:-1]).hidden_states
    assert relative(outcome.tensors["resid_post"][1][1:], hidden[2][0][1:]) < PARITY
    assert outcome.tensors["queries"].shape[2] == n_run
    assert torch.allclose(outcome.tensors["attn_to_spans"].sum(-1), torch.ones(()), atol=1e-5)


def test_a_layer_subset_keeps_those_layers_only():
    from tests.conftest import tiny

    model = tiny("tiny-gpt2")
    _, full = capture_all(model)
    _, some = capture_all(model, layers=(1, 3))
    assert some[0].layers == [1, 3]
    for name in ("resid_post", "keys", "z", "attn_to_spans", "value_to_spans", "resid_span_mean"):
        assert torch.equal(some[0].tensors[name], full[0].tensors[name][[1, 3]])


def test_a_non_finite_layer_is_named_and_spares_the_others():
    from tests.conftest import tiny

    model = tiny("tiny-llama")

    def poison(_module, _inputs, output):
        if len(output) == 3:  # not the shared prefix, which runs alone
            output[1, -1] = float("nan")
        return output

    handle = model.blocks[2].register_forward_hook(poison)
    try:
        jobs = make_jobs(model)
        jobs = [jobs[1], jobs[1], jobs[1]]
        outcomes = run_batch(model, model.codec, jobs, CaptureSpec(frozenset(SITES)), Generation(4))
    finally:
        handle.remove()
    assert isinstance(outcomes[1], NonFinite)
    assert "layer 2" in str(outcomes[1])
    assert not isinstance(outcomes[0], NonFinite)


def test_capturing_leaves_the_plain_model_plain(tiny_model):
    ids = torch.arange(5, 40)[None]
    hooks = [len(block._forward_hooks) for block in tiny_model.blocks]
    with torch.no_grad():
        before = tiny_model.hf(ids).logits
    capture_all(tiny_model)
    with torch.no_grad():
        after = tiny_model.hf(ids).logits
    assert torch.equal(before, after)
    assert tiny_model.hf.config._attn_implementation != "probe"
    assert [len(block._forward_hooks) for block in tiny_model.blocks] == hooks


def test_no_square_pattern_is_ever_made(monkeypatch):
    """A long prompt: the largest pattern computed has one row a generated token, not one a position."""
    from probe.maths import reads
    from tests.conftest import tiny

    model = tiny("tiny-llama")
    shapes = []
    plain = reads.pattern
    monkeypatch.setattr(
        reads, "pattern", lambda q, *rest: (shapes.append(tuple(q.shape)), plain(q, *rest))[1]
    )
    outcome = model.capture("word " * 400, sites="default", max_new_tokens=3)
    assert len(outcome.token_ids) > 2000
    assert all(rows == 3 for _, rows, _ in shapes)


def test_write_norm_factor_keeps_norms_of_nearly_cancelled_reads():
    generator = torch.Generator().manual_seed(
        0
    )  # the bound is two roundings wide, so the numbers are always the same
    w_o = torch.randn(2, 6, 20, dtype=torch.float64, generator=generator).float()
    w_o[0, 5] = w_o[0, 4] + 1e-4 * w_o[0, 5]
    x = torch.zeros(2, 6)
    x[:, 4], x[:, 5] = 1, -1
    factor = write_norm_factor(w_o)
    for head in range(2):
        expected = (x[head].double() @ w_o[head].double()).norm()
        assert float((factor[head] @ x[head]).norm()) == pytest.approx(float(expected), rel=1e-3)


def test_a_learned_sink_has_a_column_of_its_own():
    """GPT-OSS: one logit a head that no key owns takes part in the softmax."""
    from tests.conftest import tiny

    model = tiny("tiny-gptoss")
    outcome = model.capture("Some text to read. " * 4, max_new_tokens=5)
    assert outcome.labels[-1] == "sink"
    attentions = eager(model, outcome.token_ids[:-1]).attentions
    rows = outcome.tensors["rows"]
    for layer, alpha in enumerate(attentions):
        actual = outcome.tensors["attn_to_spans"][layer]
        assert torch.allclose(actual.sum(-1), torch.ones(()), atol=1e-5)
        assert float((actual[..., -1] - (1 - alpha[0][:, rows].sum(-1))).abs().max()) < 1e-5
        assert float(actual[..., -1].min()) > 0
        for column, label in enumerate(outcome.labels[:-1]):
            spans = [span for span in outcome.spans if span.label == label]
            expected = sum(alpha[0][:, rows, span.start : span.end].sum(-1) for span in spans)
            assert float((actual[..., column] - expected).abs().max()) < 1e-5


def test_a_window_and_a_softcap_change_the_pattern():
    queries, keys = torch.randn(2, 3, 4), torch.randn(1, 9, 4)
    positions = torch.tensor([6, 7, 8])
    plain = pattern(queries, keys, positions, LayerAttention(0.5))
    windowed = pattern(queries, keys, positions, LayerAttention(0.5, window=2))
    capped = pattern(queries, keys, positions, LayerAttention(0.5, softcap=0.1))
    assert (windowed[:, 2, :7] == 0).all()
    assert torch.allclose(windowed.sum(-1), torch.ones(2, 3))
    assert not torch.allclose(plain, capped)
    assert (plain[:, 0, 7:] == 0).all()


def test_smollm2_agrees_with_transformers_and_bridge(smollm2):
    _, outcomes = capture_all(smollm2, n_new=6)
    outcome = outcomes[1]
    out = eager(smollm2, outcome.token_ids[:-1])
    rows = outcome.tensors["rows"]
    with torch.no_grad():
        _, cache = smollm2.bridge.run_with_cache(torch.tensor([outcome.token_ids[:-1]]))
    for layer in range(smollm2.facts.n_layers):
        if layer < smollm2.facts.n_layers - 1:
            assert (
                relative(outcome.tensors["resid_post"][layer], out.hidden_states[layer + 1][0, rows]) < PARITY
            )
        assert (
            relative(outcome.tensors["resid_post"][layer], cache[f"blocks.{layer}.hook_resid_post"][0, rows])
            < PARITY
        )
        keys = cache[f"blocks.{layer}.attn.hook_rot_k"][0]
        keys = keys if keys.shape[0] == 3 else keys.transpose(0, 1)
        assert relative(outcome.tensors["keys"][layer][:, 1:], keys[:, 1:]) < PARITY
        for column, label in enumerate(outcome.labels):
            expected = sum(
                out.attentions[layer][0][:, rows, s.start : s.end].sum(-1)
                for s in outcome.spans
                if s.label == label
            )
            assert (
                float((outcome.tensors["attn_to_spans"][layer, :, :, column] - expected).abs().max()) < 1e-5
            )
        actual = rebuild(outcome, layer, smollm2.facts.attention[layer])
        assert relative(outcome.tensors["z"][layer], actual) < 1e-5


def test_a_record_and_token_ids_are_run_as_they_are_and_a_rendered_text_is_refused():
    model, names = tiny("tiny-llama"), ["abc", "de"]
    segments = [Segment("<|im_start|>user\nHi<|im_end|>\n", markup=True), Segment("Go: ")]
    prompt = prompt_of(segments, model.codec, 4)
    expected = [score.log_prob for score in model.score(prompt, names)]
    record = {"token_ids": [*prompt.token_ids, 7, 8], "n_prompt": prompt.n_prompt, "prompt": prompt.text}
    for content in (record, prompt.token_ids, torch.tensor(prompt.token_ids)):
        assert [score.log_prob for score in model.score(content, names)] == pytest.approx(expected, abs=1e-5)
    assert model.capture(record).token_ids[:-1] == prompt.token_ids
    for verb in (lambda text: model.score(text, names), model.capture):
        with pytest.raises(UsageError, match="im_start.*task.record"):
            verb(prompt.text)
        with pytest.raises(UsageError, match="passages"):
            verb({"passages": {}})
        with pytest.raises(BadInput, match="vocabulary"):
            verb([10**6])
    as_text = model.score([Segment(prompt.text)], names)
    assert as_text[0].log_prob != pytest.approx(expected[0], abs=1e-3)
