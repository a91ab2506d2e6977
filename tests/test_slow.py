"""The slow oracle against probe's own scores, against shorter prompts and against weights set to zero."""

from __future__ import annotations

import pytest
import torch

import probe
from tests.slow import slow_attention, slow_reads, slow_scores

PROMPT = "Two tools: mix, sort. Which one?\n"
CANDIDATES = ("mix,", "sort,", "s,")
CLOSE = 1e-4


def encoded(model):
    prompt = [model.codec.sink, *model.codec.encode(PROMPT)]
    return prompt, [model.codec.encode(text) for text in CANDIDATES]


def test_without_an_intervention_the_slow_scores_are_those_of_the_packed_forward(tiny_model):
    prompt, candidates = encoded(tiny_model)
    log_probs = slow_scores(tiny_model.hf, prompt, candidates)
    expected = [score.log_prob for score in tiny_model.score(PROMPT, CANDIDATES)]
    assert log_probs == pytest.approx(expected, abs=CLOSE)


def test_hiding_all_earlier_keys_leaves_the_score_of_the_last_token_alone(tiny_model):
    """One hidden layer of context: rows that see only themselves score as a prompt of one token does, rotary
    position apart, which a query and its own key share."""
    if tiny_model.facts.model_type == "gpt2":
        pytest.skip("learned positions tell a lone token where it stands")
    prompt, candidates = encoded(tiny_model)
    single = [[candidate[0]] for candidate in candidates]
    log_probs = slow_scores(
        tiny_model.hf, prompt, single, masked=[range(len(prompt) - 1)], rows_from=len(prompt) - 1
    )
    assert log_probs == pytest.approx(slow_scores(tiny_model.hf, prompt[-1:], single), abs=CLOSE)


def test_hidden_keys_get_no_attention_in_the_given_rows_and_layers_alone(tiny_model):
    prompt, _ = encoded(tiny_model)
    plain = slow_attention(tiny_model.hf, prompt)
    pattern = slow_attention(
        tiny_model.hf, prompt, masked=[range(3, 6)], rows_from=10, rows_to=20, layers=[1, 2]
    )
    assert pattern[1:3, :, 10:20, 3:6].abs().max() == 0
    assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-5)
    untouched = [(slice(0, 1), slice(None)), (slice(1, 4), slice(0, 10))]
    for layers, rows in untouched:
        assert torch.equal(pattern[layers, :, rows], plain[layers, :, rows])
    assert not torch.allclose(pattern[3, :, 12:20], plain[3, :, 12:20], atol=1e-4)


def test_a_head_read_as_zero_is_a_head_without_output_weights(tiny_model):
    prompt, candidates = encoded(tiny_model)
    layer, head, d_head = 2, 1, tiny_model.facts.d_head
    log_probs = slow_scores(tiny_model.hf, prompt, candidates, zero_heads=[(layer, head)])
    twin = probe.load(
        tiny_model.source.name
    )  # no copy: a bridge that another test asked for cannot be copied
    twin.w_o(layer)[head] = 0
    expected = slow_scores(twin.hf, prompt, candidates)
    assert twin.w_o(layer)[head].shape == (d_head, twin.facts.d_model)
    assert log_probs == pytest.approx(expected, abs=CLOSE)
    assert log_probs != pytest.approx(slow_scores(tiny_model.hf, prompt, candidates), abs=1e-3)


def test_a_head_replaced_by_its_own_read_changes_nothing(tiny_model):
    prompt, candidates = encoded(tiny_model)
    row = len(prompt) - 1
    reads = slow_reads(tiny_model.hf, prompt, row)
    part = {(1, 0): reads[1, 0], (3, 2): reads[3, 2]}
    log_probs = slow_scores(tiny_model.hf, prompt, candidates, reads=part, rows_from=row, rows_to=row + 1)
    assert log_probs == pytest.approx(slow_scores(tiny_model.hf, prompt, candidates), abs=1e-6)
    swapped = {(1, 0): reads[1, 1], (3, 2): reads[3, 1]}
    other = slow_scores(tiny_model.hf, prompt, candidates, reads=swapped, rows_from=row, rows_to=row + 1)
    assert log_probs != pytest.approx(other, abs=1e-4)


def test_an_intervention_leaves_no_trace(tiny_model):
    prompt, candidates = encoded(tiny_model)
    before = slow_scores(tiny_model.hf, prompt, candidates)
    attention = tiny_model.hf.config._attn_implementation
    slow_scores(tiny_model.hf, prompt, candidates, masked=[range(1, 9)], rows_from=9, zero_heads=[(0, 0)])
    assert slow_scores(tiny_model.hf, prompt, candidates) == before
    assert tiny_model.hf.config._attn_implementation == attention


def test_a_row_without_any_key_is_an_error(tiny_model):
    prompt, candidates = encoded(tiny_model)
    with pytest.raises(AssertionError, match="would see no key"):
        slow_scores(tiny_model.hf, prompt, candidates, masked=[range(len(prompt) + 9)])
