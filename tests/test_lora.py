"""Adapters made by peft with odd settings, against dense singular values, peft's own ΔW and its intruder routine."""

from __future__ import annotations

import json
import math
import time
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from probe.errors import BadInput, UsageError
from probe.model.shapes import random_model
from probe.training.lora.command import examine, lines, write_measures
from probe.training.lora.files import read_adapters
from probe.training.lora.spectrum import of_factors, singular_values
from tests.clock import within

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "plain": dict(target_modules=ALL, r=4, lora_alpha=8),
    "rslora": dict(target_modules=ALL, r=8, lora_alpha=3, use_rslora=True),
    "patterns": dict(
        target_modules=ALL,
        r=4,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"q_proj": 2, r"model.layers.1.mlp.(up|down)_proj": 7, "layers.2.self_attn.o_proj": 1},
        alpha_pattern={"q_proj": 5, "up_proj": 1.5},
    ),
    "dora": dict(target_modules=ALL, r=4, lora_alpha=8, use_dora=True),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"], r=3, lora_alpha=9),
    "dora_embedding": dict(target_modules=["embed_tokens", "v_proj"], r=3, lora_alpha=9, use_dora=True),
    "saved": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"], r=2, lora_alpha=2),
    "some_layers": dict(target_modules=ALL, layers_to_transform=[1, 3], exclude_modules=["up_proj"], r=2),
    "rank_above_width": dict(target_modules=["k_proj", "q_proj"], r=64, lora_alpha=16),
    "lm_head": dict(target_modules=["lm_head", "v_proj"], r=4, lora_alpha=3),
    "bias": dict(target_modules=["q_proj"], r=4, bias="all"),
    "pissa": dict(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights="pissa"),
    "orthogonal": dict(target_modules=["q_proj"], r=4, init_lora_weights="orthogonal"),
    "rsdora": dict(target_modules=["q_proj"], r=4, use_rslora=True, use_dora=True),
    "olora": dict(target_modules=["q_proj"], r=4, init_lora_weights="olora"),
    "blocks": dict(
        target_modules=["q_proj", "o_proj"],
        r=4,
        use_bdlora={"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2},
    ),
}


def disturbed(model, seed=0, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = size * torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + (noise.abs() if "magnitude" in name else noise)
    return model


def adapted(settings, shape="tiny-llama", seed=0, size=0.3):
    config = LoraConfig(**settings)
    if isinstance(config.use_bdlora, dict):
        from peft.tuners.lora.config import BdLoraConfig

        config.use_bdlora = BdLoraConfig(**config.use_bdlora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return disturbed(get_peft_model(random_model(shape, torch.float32), config), seed, size)


def save(model, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path, save_embedding_layers=False)
    return path


def peft_delta(layer):
    """ΔW in float64 as peft makes it, stored as the base's weight is."""
    for part in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
        part.double()
    if (variant := layer.lora_variant.get("default")) and type(variant).__name__ == "BdLoraLinearVariant":
        layer.get_base_layer().double()
        return variant._get_bdlora_delta_weight(layer, "default")
    return layer.get_delta_weight("default")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_number_is_that_of_the_dense_matrix_peft_makes(name, tmp_path):
    model = adapted(SETTINGS[name])
    [document], _ = examine(save(model, tmp_path))
    layers = {
        key.removeprefix("base_model.model."): layer
        for key, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert {entry["module"] for entry in document["modules"]} == set(layers)
    for entry in document["modules"]:
        dense = peft_delta(layers[entry["module"]]).detach().numpy().astype(np.float64)
        sigma = np.linalg.svd(dense, compute_uv=False)
        ours = np.array(entry["singular_values"])
        assert np.abs(ours - sigma[: len(ours)]).max() <= 1e-8 * sigma[0]
        assert sigma[len(ours) :].sum() <= 1e-8 * sigma[0]
        r = layers[entry["module"]].r["default"]
        share = sigma / sigma.sum()
        share = share[share > 1e-14]
        expected = {
            "rank": r,
            "nuclear_norm": np.linalg.norm(dense, "nuc"),
            "frobenius_norm": np.linalg.norm(dense),
            "spectral_norm": np.linalg.norm(dense, 2),
            "numerical_rank": np.linalg.matrix_rank(dense, tol=1e-9 * sigma[0]),
            "stable_rank": np.linalg.norm(dense) ** 2 / np.linalg.norm(dense, 2) ** 2,
            "effective_rank": np.exp(-(share * np.log(share)).sum()),
            "cauchy_schwarz_ratio": sigma.sum() / np.sqrt(r) / np.linalg.norm(dense),
        }
        for key, value in expected.items():
            assert entry[key] == pytest.approx(value, rel=1e-8), (key, entry["module"])
        assert entry["cauchy_schwarz_ratio"] <= 1 + 1e-12


@pytest.mark.parametrize("shape", ["tiny-gpt2", "tiny-neox", "tiny-gemma"])
def test_other_architectures_and_transposed_weights(shape, tmp_path):
    model = adapted(
        dict(target_modules="all-linear", r=3, lora_alpha=6, lora_bias=shape == "tiny-neox"), shape
    )
    [document], _ = examine(save(model, tmp_path))
    for key, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            entry = next(
                e for e in document["modules"] if e["module"] == key.removeprefix("base_model.model.")
            )
            sigma = torch.linalg.svdvals(peft_delta(layer))[:3]
            assert entry["singular_values"] == pytest.approx(sigma.tolist(), rel=1e-8)
    assert any("bias of lora_B" in other["what"] for other in document["not_low_rank"]) == (
        shape == "tiny-neox"
    )


def test_a_planted_spectrum_comes_out():
    generator = torch.Generator().manual_seed(3)
    u = torch.linalg.qr(torch.randn(40, 4, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(30, 4, generator=generator, dtype=torch.float64)).Q
    planted = torch.tensor([5.0, 3.0, 2.0, 1e-3], dtype=torch.float64)
    actual = of_factors(v.T, u * planted, 2.0)
    assert actual.singular_values.tolist() == pytest.approx((2 * planted).tolist(), rel=1e-10)
    assert actual.nuclear_norm == pytest.approx(20.002)
    equal = of_factors(v.T, u * 7, 0.5)
    assert equal.cauchy_schwarz_ratio == pytest.approx(1) and equal.effective_rank == pytest.approx(4)
    assert of_factors(v.T[:1], u[:, :1]).cauchy_schwarz_ratio == pytest.approx(1)


def test_a_fresh_adapter_has_norm_zero_and_no_ranks(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(target_modules=["q_proj"], r=4)
        model = get_peft_model(random_model("tiny-llama", torch.float32), config)
    [document], measures = examine(save(model, tmp_path))
    assert document["total"]["frobenius_norm"] == 0
    assert not any(m.name in ("stable_rank", "effective_rank", "cauchy_schwarz_ratio") for m in measures)


@pytest.mark.parametrize(
    "name, shape", [("plain", "tiny-llama"), ("dora", "tiny-llama"), ("conv1d", "tiny-gpt2")]
)
def test_intruders_are_those_of_pefts_own_routine(name, shape, tmp_path):
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    settings = SETTINGS.get(name) or dict(target_modules=["c_attn", "c_proj", "c_fc"], r=4, lora_alpha=8)
    model = adapted(settings, shape, size=0.4)
    save(model, tmp_path)
    text: list[str] = []
    reduce_intruder_dimension(model, logging_sink=text.append)
    theirs = {}
    for line in text[:-1]:
        module, _, verdict = line.partition(": ")
        theirs[module.removeprefix("base_model.model.")] = (
            int(verdict.rpartition(" ")[2]) if "Intruders" in verdict else 0
        )
    [document], _ = examine(tmp_path, f"random:{shape}")
    ours = {entry["module"]: entry["intruder_dimensions"] for entry in document["modules"]}
    assert ours == theirs and sum(ours.values()) > 0
    assert document["total"]["intruder_dimensions"] == sum(theirs.values())


def test_the_weights_with_doras_magnitude_are_those_peft_merges(tmp_path):
    for name in ("dora", "dora_embedding"):
        model = adapted(SETTINGS[name])
        [document], _ = examine(save(model, tmp_path / name), "random:tiny-llama")
        before = random_model("tiny-llama", torch.float32)
        merged = model.merge_and_unload()
        for entry in document["modules"]:
            w, tuned = (m.get_submodule(entry["module"]).weight.double() for m in (before, merged))
            share = float((tuned - w).norm() / w.norm())
            assert entry["share_of_base_with_magnitude"] == pytest.approx(share, rel=1e-4)
        assert any("full rank" in note for note in document["notes"])


def test_overlap_is_one_within_the_bases_top_directions_and_chance_is_said(tmp_path):
    model = adapted(dict(target_modules=["q_proj"], r=2, lora_alpha=2))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            u, _, vh = torch.linalg.svd(layer.get_base_layer().weight.double(), full_matrices=False)
            layer.lora_B["default"].weight.data = u[:, :2].float()
            layer.lora_A["default"].weight.data = vh[:2].float()
    [document], _ = examine(save(model, tmp_path), "random:tiny-llama")
    for entry in document["modules"]:
        assert entry["base_overlap_left"] == pytest.approx(1, abs=1e-5)
        assert entry["base_overlap_right"] == pytest.approx(1, abs=1e-5)
        assert entry["base_overlap_chance_left"] == pytest.approx(2 / 48)
        assert entry["intruder_dimensions"] == 0


@pytest.mark.parametrize(
    "patterns",
    [
        dict(
            alpha_pattern={"experts": 7, "gate_up_proj": 3}
        ),  # a pattern is matched with the parameter's path
        dict(rank_pattern={"down_proj": 2, "q_proj": 1}, alpha_pattern={"down_proj": 11}),
    ],
)
def test_patterns_of_a_targeted_parameter_are_matched_with_its_own_path(patterns, tmp_path):
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = dict(target_modules=["q_proj"], target_parameters=names, r=4, lora_alpha=5, **patterns)
    model = adapted(settings, "tiny-gptoss").double()
    [document], _ = examine(save(model, tmp_path))
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules()}
    for entry in document["modules"]:
        module, _, expert = entry["module"].rstrip("]").partition("[")
        dense = peft_delta(layers[module])
        sigma = torch.linalg.svdvals(dense[int(expert)] if expert else dense)[: int(entry["rank"])]
        assert entry["singular_values"] == pytest.approx(sigma.tolist(), rel=1e-8), entry["module"]


def test_parameters_that_patterns_tell_apart_and_the_file_does_not_are_refused(tmp_path):
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = dict(target_modules=[], target_parameters=names, r=4, alpha_pattern={"down_proj": 11})
    save(adapted(settings, "tiny-gptoss"), tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(
        text.replace("down_proj", "second").replace("gate_up_proj", "first")
    )
    with pytest.raises(BadInput, match="which of its parameters first, second"):
        read_adapters(tmp_path)


@pytest.mark.parametrize(
    "key, value",
    [("rank_pattern", [1]), ("use_bdlora", True), ("target_parameters", 5), ("lora_alpha", math.nan)],
)
def test_settings_of_the_wrong_kind_are_named_and_not_a_traceback(key, value, tmp_path):
    save(adapted(dict(target_modules=["q_proj"], r=4)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(BadInput, match=key.removeprefix("lora_")):
        examine(tmp_path)


def test_empty_factors_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save(adapted(dict(target_modules=["q_proj"], r=4)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    cut = {k: v[:, :0].contiguous() if "lora_A" in k else v for k, v in load_file(file).items()}
    save_file(cut, file)
    with pytest.raises(BadInput, match="are empty"):
        examine(tmp_path)


def test_an_alpha_that_is_not_used_is_said_and_one_that_is_no_number_refused(tmp_path):
    save(adapted(dict(target_modules=["q_proj"], r=4, lora_alpha=8)), tmp_path)
    [plain], _ = examine(tmp_path)
    [document], _ = examine(tmp_path, alpha=99)
    assert document["total"] == plain["total"] and any(
        "--alpha 99 is not used" in n for n in document["notes"]
    )
    with pytest.raises(UsageError, match="--alpha nan"):
        examine(tmp_path, alpha=math.nan)


def test_experts_of_a_stacked_parameter_are_measured_one_by_one(tmp_path):
    from torch import nn

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 10, 6))

        def forward(self, x):
            return torch.einsum("bi,eio->bo", x, self.stack)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()

    model = get_peft_model(
        Net(), LoraConfig(target_parameters=["experts.stack"], target_modules=[], r=2, lora_alpha=6)
    )
    disturbed(model)
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    [document], _ = examine(save(model, tmp_path))
    layer.double()
    dense = layer.get_delta_weight("default")
    assert [entry["module"] for entry in document["modules"]] == [f"experts[{e}]" for e in range(3)]
    for expert, entry in enumerate(document["modules"]):
        sigma = torch.linalg.svdvals(dense[expert])[:2]
        assert entry["singular_values"] == pytest.approx(sigma.tolist(), rel=1e-8)


def test_convolutions_are_measured_as_unfolded_matrices(tmp_path):
    from torch import nn

    net = nn.Sequential(nn.Conv1d(6, 10, 3), nn.Conv1d(10, 8, 1))
    model = disturbed(get_peft_model(net, LoraConfig(target_modules=["0", "1"], r=2, lora_alpha=6)))
    [document], _ = examine(save(model, tmp_path))
    for entry in document["modules"]:
        layer = model.get_submodule("base_model.model." + entry["module"]).double()
        sigma = torch.linalg.svdvals(layer.get_delta_weight("default").flatten(1))[:2]
        assert entry["singular_values"] == pytest.approx(sigma.tolist(), rel=1e-8)


def test_a_tree_holds_several_adapters_and_a_file_can_stand_alone(tmp_path):
    model = adapted(SETTINGS["plain"])
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"], r=2, lora_alpha=1))
    save(model, tmp_path)
    assert [(a.name, len(a.deltas)) for a in read_adapters(tmp_path)] == [("default", 28), ("second", 4)]
    alone = tmp_path / "alone.safetensors"
    other = tmp_path.parent / (tmp_path.name + "-alone")
    other.mkdir()
    alone = other / "alone.safetensors"
    alone.write_bytes((tmp_path / "adapter_model.safetensors").read_bytes())
    with pytest.raises(UsageError, match="--alpha"):
        read_adapters(alone)
    [by_alpha] = read_adapters(alone, alpha=8)
    assert by_alpha.deltas[0].scale == 2
    [beside] = read_adapters(tmp_path / "adapter_model.safetensors")
    assert beside.deltas[0].scale == 2


def test_pickles_and_files_that_do_not_fit_are_refused(tmp_path):
    save(adapted(SETTINGS["saved"]), tmp_path)
    [document], _ = examine(tmp_path)
    whole = {other["tensor"] for other in document["not_low_rank"]}
    assert any("lm_head" in name for name in whole) and any("norm" in name for name in whole)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    with pytest.raises(BadInput, match="rank 2, adapter_config.json says 5"):
        examine(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(BadInput, match="IA3"):
        examine(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UsageError, match="never opened"):
        examine(tmp_path)


def test_measures_go_to_parquet_and_lines(tmp_path):
    import pyarrow.parquet as pq

    from probe.runs import measure_schema

    documents, measures = examine(save(adapted(SETTINGS["plain"]), tmp_path), "random:tiny-llama")
    write_measures(measures, tmp_path / "lora.parquet")
    table = pq.read_table(tmp_path / "lora.parquet")
    assert table.schema.names == measure_schema().names and table.num_rows == len(measures)
    names = set(table.column("name").to_pylist())
    assert {"nuclear_norm", "cauchy_schwarz_ratio", "intruder_dimensions", "share_of_base"} <= names
    text = "\n".join(lines(documents[0], False))
    assert "q_proj (4×)" in text and "intruder dimensions:" in text


@pytest.mark.timing
def test_the_factors_take_a_thousandth_of_the_dense_time():
    """At 1/4 of the width and over an eighth of the columns; the whole ratio at 4096 is in docs/lora.md."""
    a, b = torch.randn(16, 1024, dtype=torch.float64), torch.randn(1024, 16, dtype=torch.float64)
    singular_values(a, b)

    def took(call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    dense = took(lambda: torch.linalg.svdvals(b @ a))
    assert within(dense / 50, min(took(lambda: singular_values(a, b)) for _ in range(5)))


@pytest.mark.slow
def test_at_width_4096_and_rank_16_the_factors_take_a_thousandth_of_the_dense_time():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, 4096, dtype=torch.float64, generator=generator)
    b = torch.randn(4096, 16, dtype=torch.float64, generator=generator)
    ours = singular_values(a, b, 0.5)
    start = time.perf_counter()
    dense = torch.linalg.svdvals(0.5 * b @ a)
    middle = time.perf_counter()
    for _ in range(5):
        singular_values(a, b, 0.5)
    ratio = (middle - start) / ((time.perf_counter() - middle) / 5)
    assert (ours - dense[:16]).abs().max() <= 1e-8 * dense[0] and dense[16:].max() <= 1e-8 * dense[0]
    assert ratio >= 1000


def test_a_base_that_the_initialization_changed_is_not_compared(tmp_path):
    [document], _ = examine(save(adapted(SETTINGS["pissa"]), tmp_path), "random:tiny-llama")
    assert "intruder_dimensions" not in document["total"]
    assert any("path_initial_model_for_weight_conversion" in note for note in document["notes"])


def test_a_parameter_of_a_transposed_module_is_compared_as_it_is_stored(tmp_path):
    model = adapted(
        dict(target_modules=[], target_parameters=["c_attn.weight", "attn.c_proj.weight"], r=3), "tiny-gpt2"
    )
    [document], _ = examine(save(model, tmp_path), "random:tiny-gpt2")
    plain = random_model("tiny-gpt2", torch.float32)
    for entry in document["modules"]:
        before = plain.get_submodule(entry["module"]).weight.detach().double().numpy()
        layer = model.base_model.model.get_submodule(entry["module"])
        delta = layer.get_delta_weight("default").detach().double().numpy()
        assert delta.shape == before.shape
        u, _, _ = np.linalg.svd(before, full_matrices=False)
        v, _, _ = np.linalg.svd(before + delta, full_matrices=False)
        assert entry["intruder_dimensions"] == (np.abs(u.T @ v[:, :10]).max(0) < 0.5).sum()
