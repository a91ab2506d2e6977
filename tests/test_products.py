"""Products of few rows: the numbers of the usual order, in the shapes in which another order is taken."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from probe.model import load, products
from probe.model.attention import KVCache, Piece
from probe.model.products import FEW_ROWS_UNEMBEDDED, few_rows, stand_ins


def layer_of(width: int, d_out: int, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(width + d_out)
    return nn.Linear(width, d_out, bias=bias).requires_grad_(False)


TAKEN = {576: {1, 2, 3, 4, 5}, 1024: {1, 2, 3}, 2048: {2, 3}}
"""Width → numbers of rows with which the weights come first in a layer inside of a block."""


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", TAKEN)
@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 5, 8])
def test_few_rows_give_what_a_linear_layer_gives(n_rows, width, bias):
    layer = layer_of(width, 320, bias=bias)
    states = torch.randn(n_rows, 1, width)
    exact = nn.functional.linear(
        states.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )
    inside, unembedded = few_rows(layer, states), few_rows(layer, states, FEW_ROWS_UNEMBEDDED, None)
    assert (inside is not None) == (n_rows in TAKEN[width])
    assert (unembedded is not None) == (n_rows > 1 or 1 in TAKEN[width])
    for product in (inside, unembedded):
        if product is not None:
            assert product.shape == (n_rows, 1, 320)
            assert product.is_contiguous()
            torch.testing.assert_close(product.double(), exact, rtol=1e-5, atol=1e-5)


def test_other_orders_are_left_to_torch():
    assert few_rows(layer_of(576, 320), torch.randn(6, 576)) is None
    assert few_rows(layer_of(1024, 320), torch.randn(4, 1024)) is None
    assert few_rows(layer_of(2048, 320), torch.randn(1, 2048)) is None
    assert few_rows(layer_of(2048, 320), torch.randn(3, 2048)) is not None
    assert few_rows(layer_of(576, 320), torch.zeros(0, 576)) is None


def test_only_plain_layers_in_float32_with_weights_worth_reading_have_a_stand_in():
    class Scaled(nn.Linear):
        """A layer that computes another thing."""

    layers = nn.ModuleDict(
        {
            "plain": nn.Linear(512, 512),
            "small": nn.Linear(8, 8),
            "rounded": nn.Linear(512, 512, dtype=torch.bfloat16),
            "other": Scaled(512, 512),
            "taken": nn.Linear(512, 512),
        }
    )
    layers["taken"].forward = lambda states: states
    assert [module for module, _ in stand_ins(layers)] == [layers["plain"]]


def test_a_copy_of_a_layer_multiplies_with_its_own_weights():
    """`in_float32` copies blocks whose layers have stand-ins."""
    block = nn.ModuleDict({"layer": nn.Linear(512, 512, bias=False).requires_grad_(False)})
    [(module, (name, method))] = stand_ins(block)
    module.__dict__[name] = method
    twin = copy.deepcopy(block)
    twin["layer"].load_state_dict({"weight": torch.zeros(512, 512)})
    states = torch.ones(2, 512)
    assert float(twin["layer"](states).abs().max()) == 0
    assert float(block["layer"](states).abs().max()) > 0


def test_steps_run_in_the_other_order_and_prompts_in_the_usual(monkeypatch):
    """Every weight of a tiny model counts as worth it: the logits of steps stay those of one pass over the tokens."""
    monkeypatch.setattr(products, "_SMALL", 0)
    model = load("random:tiny-llama")
    taken: list[int] = []

    def counted(layer, states, *limits):
        product = few_rows(layer, states, *limits)
        taken.extend([states.numel() // states.shape[-1]] * (product is not None))
        return product

    monkeypatch.setattr(products, "few_rows", counted)
    tokens = list(range(5, 17))
    expected = model.hf(input_ids=torch.tensor([tokens])).logits[0]
    with model.recording(None):
        cache = KVCache(1, len(tokens))
        model.forward([Piece(0, 0, tokens[:-1])], cache)
        assert taken == []
        hidden, _ = model.step(tokens[-1:], cache, [len(tokens) - 1])
        logits = model.unembed(hidden[:, 0])
    assert set(taken) == {1}
    torch.testing.assert_close(logits, expected[-1:], rtol=1e-5, atol=1e-5)
    assert not any("forward" in module.__dict__ for module in model.hf.modules())


def test_gradients_go_through_the_layers_themselves(monkeypatch):
    monkeypatch.setattr(products, "_SMALL", 0)
    model = load("random:tiny-llama")
    with model.recording(None, gradients=True):
        assert not any(
            "forward" in module.__dict__ for module in model.decoder.modules() if type(module) is nn.Linear
        )
