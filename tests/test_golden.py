"""Saved activations as regression tests, and proof that the regression would be caught where it is."""

from __future__ import annotations

import pytest
import torch

import probe
from probe.runs import diff, verify
from tests.conftest import tiny
from tests.golden import GOLDEN, MODELS, RUNS, make


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("model", MODELS)
def test_a_run_today_equals_the_golden_run(model, kind, tmp_path, assert_same_run):
    golden = probe.open(GOLDEN / f"{model}-{kind}")
    assert verify(golden.path).problems == []
    assert len(golden) > 0
    assert_same_run(make(tiny(model), kind, tmp_path / "run"), golden.path)


@pytest.mark.parametrize(("layer", "site"), [(2, "resid_post"), (1, "attn_to_spans")])
@pytest.mark.parametrize("model", MODELS)
def test_a_perturbed_layer_is_named(model, layer, site, tmp_path):
    """A change in layer k's MLP shows first in resid_post k; in its queries, in what layer k attends to."""
    loaded = probe.load(f"random:{model}")
    names = [n for n, _ in loaded.blocks[layer].named_parameters()]
    part = (
        ("mlp.down_proj", "mlp.c_proj", "dense_4h_to_h")
        if site == "resid_post"
        else ("q_proj", "c_attn", "query_key_value")
    )
    name = next(n for n in names if any(p in n for p in part) and n.endswith("weight"))
    with torch.no_grad():
        loaded.blocks[layer].get_parameter(name).mul_(1.01)
    differences = diff(probe.open(GOLDEN / f"{model}-states"), make(loaded, "states", tmp_path / "run"))
    assert differences
    assert differences[0].task_id == "choose"
    assert differences[0].layer == layer
    assert differences[0].site == site
    assert differences[0].row is not None
