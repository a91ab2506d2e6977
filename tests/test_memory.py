"""Fine-tuning memory: arithmetic against published figures, and against torch's own tracker."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
from click.testing import CliRunner

from benchmarks.finetune_memory import GRID, HELD_OUT, LAYERS_ALONE, QUICK, case, compare
from benchmarks.published_memory import LADDER, MINIMA, README
from probe.cli import main
from probe.errors import ModelUnavailable, UsageError
from probe.training.memory.advice import verdict
from probe.training.memory.command import architecture
from probe.training.memory.counter import ActivationCounter
from probe.training.memory.estimate import estimate, four_bit_bytes, states, with_targets
from probe.training.memory.gpus import gpu
from probe.training.memory.plan import FineTuningPlan
from probe.training.memory.rule import rule_of_thumb
from probe.training.memory.tape import Tape


def ask(*arguments: str) -> dict:
    result = CliRunner().invoke(main, ["memory", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def gemma():
    return architecture("random:gemma-2b")


def test_two_billion_parameters_take_22_gb_by_the_rule_and_fit_a_24_gb_card():
    document = ask("2B", "--rule-of-thumb", "--gpu", "rtx-4090")["rule_of_thumb"]
    parts = [
        document[f"{name}_bytes"] / 1e9
        for name in ("weights", "gradients", "optimizer", "activations", "total")
    ]
    assert parts == [4, 4, 8, 6, 22]
    assert document["fits"] is True


def test_the_true_gemma_2b_takes_27_6_gb_by_the_same_rule_and_does_not_fit(gemma):
    assert gemma[0].n_params == 2_506_172_416
    actual = rule_of_thumb(gemma[0].n_params, gpu("rtx-4090").usable_bytes)
    assert round(actual["total_bytes"] / 1e9, 1) == 27.6
    assert actual["fits"] is False


def test_model_states_are_zero_s_sixteen_bytes_a_parameter_and_anatomy_s_eighteen(gemma):
    arch, _ = gemma
    held = states(arch, FineTuningPlan(precision="mixed"))
    assert held["weights"] + held["gradients"] + held["optimizer"] == 16 * arch.n_params
    held = states(arch, FineTuningPlan(precision="autocast"))
    vectors = sum(math.prod(s) for _, s in arch.parameters if len(s) < 2)  # norms are not cast
    assert held["weights"] + held["gradients"] + held["optimizer"] == 18 * arch.n_params - 2 * vectors


def test_the_right_answer_is_the_sum_of_the_parts_and_not_the_largest(gemma):
    """accelerate's estimate-memory shows 18.67 GiB for gemma-2b in float16; its own parts add up to 42.0 GiB.

    Float16 with float32 masters: weights 4 and gradients 4 bytes a parameter in its count, Adam 8 and a copy of 2.
    """
    arch, _ = gemma
    largest, together = 8 * arch.n_params / 2**30, (4 + 4 + 2 + 8) * arch.n_params / 2**30
    assert largest == pytest.approx(18.67, abs=0.01)
    assert together == pytest.approx(42.0, abs=0.1)
    ours = estimate(arch, FineTuningPlan(precision="autocast"))
    assert ours.peak.total == sum(ours.peak.bytes.values())
    assert 0.95 * together < ours.peak.total / 2**30 < 1.1 * together
    usable = gpu("rtx-4090").usable_bytes / 2**30
    assert largest < usable < ours.total_bytes / 2**30, "the largest part fits a card that the step does not"


def test_accelerate_prints_the_largest_of_the_parts(gemma):
    parts_of = pytest.importorskip("accelerate.commands.estimate").estimate_training_usage
    parts = parts_of(4 * gemma[0].n_params, "float16")
    assert max(parts.values()) / 2**30 == pytest.approx(18.67, abs=0.01)
    assert (parts["model"] + parts["gradients"] + parts["step"]) / 2**30 == pytest.approx(42.0, abs=0.1)


@pytest.mark.parametrize(
    ("name", "n_params"),
    [
        ("gemma-2b", 2_506_172_416),
        ("google/gemma-2b-it", 2_506_172_416),
        ("gpt2", 124_439_808),
        ("EleutherAI/pythia-70m-deduped", 70_426_624),
        ("smollm2-135m", 134_515_008),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384),
    ],
)
def test_shapes_that_are_shipped_need_no_file_and_have_their_published_size(name, n_params):
    assert architecture(name, offline=True)[0].n_params == n_params


def test_a_model_that_cannot_be_had_is_answered_with_the_shapes_that_can():
    result = CliRunner().invoke(main, ["memory", "no-such-model-9b", "--offline"])
    assert result.exit_code == 6
    assert "gemma-2b" in result.output and "pythia-1.4b" in result.output


def test_four_bit_constants_are_those_of_the_paper():
    assert 8 * four_bit_bytes(False) == 4.5
    assert 8 * four_bit_bytes(True) - 4 == pytest.approx(0.127, abs=5e-4)


def test_zero_divides_what_its_stage_shards(gemma):
    arch, _ = gemma
    unsharded = states(arch, FineTuningPlan())
    shares = {stage: states(arch, FineTuningPlan(zero=stage, n_gpus=8)) for stage in (1, 2, 3)}
    for stage, sharded in enumerate((("optimizer",), ("optimizer", "gradients"), tuple(COMPONENT)), start=1):
        for name in COMPONENT:
            assert shares[stage][name] == unsharded[name] / (8 if name in sharded else 1)


COMPONENT = ("weights", "gradients", "optimizer")


def test_every_change_that_is_proposed_fits_and_the_largest_is_the_largest(gemma):
    arch, known = gemma
    usable = gpu("rtx-4090").usable_bytes
    for plan in (
        FineTuningPlan(),
        FineTuningPlan(batch=2, length=256, optimizer_in_backward=True),
        with_targets(FineTuningPlan(method="lora", batch=4, length=1024), known),
    ):
        verdicts = verdict(arch, plan, usable, known)
        assert not verdicts["fits"] and verdicts["margin_bytes"] < 0 and verdicts["changes"]
        for change in verdicts["changes"]:
            again = estimate(arch, replace(plan, **change["options"])).total_bytes
            assert again == change["total_bytes"] and usable - again == change["margin_bytes"] >= 0
    plan = with_targets(FineTuningPlan(method="lora"), known)
    verdicts = verdict(arch, plan, usable, known)
    for value, fits in ((verdicts["largest_batch"], True), (verdicts["largest_batch"] + 1, False)):
        total = estimate(arch, with_targets(FineTuningPlan(method="lora", batch=value), known)).total_bytes
        assert (total <= usable) is fits


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_the_estimate_is_within_five_percent_of_the_tracked_peak(case):
    estimated, tracked = compare(case)
    assert estimated == pytest.approx(tracked, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID + HELD_OUT + LAYERS_ALONE, ids=str)
def test_the_estimate_is_within_five_percent_over_the_whole_grid(case):
    estimated, tracked = compare(case)
    assert estimated == pytest.approx(tracked, rel=0.05)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma", "tiny-gpt2", "tiny-neox"])
def test_a_tape_keeps_what_autograd_saves_in_a_layer(name, attention):
    arch, _ = architecture("random:" + name)
    plan = FineTuningPlan(precision="float32", attention=attention, batch=2, length=96)
    counted = ActivationCounter("random:" + name, None)(plan)
    assert counted and Tape(arch, plan).kept == pytest.approx(counted.layer, rel=0.01)


def test_the_estimate_is_what_the_profiler_sees_of_a_real_step():
    """Allocations and releases of the CPU allocator in a step that is run, without the tracker."""
    import torch

    from probe.training.outline import training_model

    plan = FineTuningPlan(precision="float32", optimizer="adamw-single", batch=4, length=256)
    arch, _ = architecture("random:tiny-llama")
    model = training_model("random:tiny-llama", dtype="float32", attention="sdpa", checkpointing=False)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ids = torch.zeros(plan.batch, plan.length, dtype=torch.long)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = 3 * 4 * sum(p.numel() for p in model.parameters())
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    todo, sizes = list(profile.profiler.kineto_results.experimental_event_tree()), []
    while todo:
        event = todo.pop()
        todo += event.children
        if event.typed[0].name == "Allocation":
            sizes.append((event.start_time_ns, event.typed[1].alloc_size))
    alive = peak = 0
    for _, size in sorted(sizes):
        alive += size
        peak = max(peak, alive)
    assert estimate(arch, plan).peak.total == pytest.approx(held + peak, rel=0.02)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_written_in_the_format_of_its_name(tmp_path, ending):
    target = tmp_path / f"memory.{ending}"
    ask("random:tiny-llama", "--gpu", "24GiB", "--plot", str(target))
    assert target.read_bytes().lstrip()[:5] in (b"\x89PNG\r", b"<?xml")
    refused = CliRunner().invoke(main, ["memory", "random:tiny-llama", "--plot", str(tmp_path / "a.pdf")])
    assert refused.exit_code == 2 and ".png or .svg" in refused.output


def test_what_does_not_fit_together_is_a_usage_error():
    for arguments in (
        ["random:tiny-llama", "--offload-activations"],
        ["random:tiny-llama", "--optimizer-in-backward", "--accumulation", "2"],
        ["random:tiny-llama", "--compile", "--measure"],
        ["random:tiny-qwen3", "--compile"],
        ["2B"],
        ["random:tiny-llama", "--method", "full-ish"],
        ["random:tiny-llama", "--gpu", "rtx-4091"],
        ["random:tiny-llama", "--zero", "2"],
        ["random:tiny-llama", "--length", "100000"],
        ["random:tiny-llama", "--method", "lora", "--targets", "c_attn"],
    ):
        assert CliRunner().invoke(main, ["memory", *arguments]).exit_code == 2, arguments
    with pytest.raises(UsageError, match="did you mean rtx-4090"):
        gpu("rtx-4091")


def test_a_model_that_does_not_fit_is_no_failure_and_the_bar_has_its_width():
    result = CliRunner().invoke(main, ["memory", "random:gemma-2b", "--gpu", "rtx-4090"])
    assert result.exit_code == 0
    assert "does not fit" in result.stdout and "would fit" in result.stdout
    bars = [line[line.index("|") :] for line in result.stdout.splitlines() if "|W" in line]
    assert bars and {line.rindex("|") for line in bars} == {61}


def test_the_document_holds_the_measures_of_the_analyzer():
    document = ask("random:tiny-llama", "--gpu", "24GiB", "--measure")
    measures, peak = document["measures"], document["peak"]
    sizes = {f"{component}_bytes": size for component, size in peak.items() if component != "phase"}
    assert measures == sizes | {"total_bytes": measures["total_bytes"], "fits": True}
    assert sizes["activations_bytes"] and sizes["logits_bytes"], "apart, where both are there"
    assert abs(document["measured"]["error"]) < 0.05


def _gated(model_type, tmp_path, **more):
    from transformers import AutoConfig

    values = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=5)
    heads = dict(num_attention_heads=8, num_key_value_heads=4, vocab_size=2000)
    AutoConfig.for_model(model_type, **(values | heads | more)).save_pretrained(tmp_path)
    return str(tmp_path)


def _error(name, plan):
    from probe.training.memory.tracker import tracked_step

    arch, known = architecture(name)
    plan = with_targets(plan, known)
    return estimate(arch, plan).peak.total / tracked_step(name, plan)["peak_bytes"] - 1


@pytest.mark.slow
def test_activations_as_wide_as_a_key_projection_are_not_taken_for_autocasts_copies(tmp_path):
    name = _gated("stablelm", tmp_path)  # no tape of its own, and k_proj is [256, 512]
    assert abs(_error(name, FineTuningPlan(precision="autocast", batch=3, length=200))) < 0.05


@pytest.mark.slow
def test_copies_of_frozen_weights_do_not_outlive_a_checkpointed_layer(tmp_path):
    name = _gated("llama", tmp_path, num_hidden_layers=4)
    plan = FineTuningPlan(
        method="lora", precision="autocast", checkpointing=True, batch=1, length=100, rank=8
    )
    assert abs(_error(name, plan)) < 0.05


def test_a_step_that_torch_cannot_follow_without_memory_is_said_and_no_traceback(tmp_path):
    from probe.training.memory.tracker import tracked_step

    name = _gated("mixtral", tmp_path, num_local_experts=4, num_hidden_layers=2)
    with pytest.raises(UsageError, match="without memory.*--measure real"):
        tracked_step(name, FineTuningPlan(precision="float32", length=32))


@pytest.mark.parametrize("rows", [LADDER, README], ids=["ladder", "table"])
def test_peaks_that_torchtune_published_come_out_within_ten_percent(rows):
    for row in rows:
        assert row.estimate().peak.total == pytest.approx(row.published, rel=0.1), row.name


def test_the_least_that_a_fine_tuning_takes_is_not_above_unsloth_s_minimum():
    for row in MINIMA:
        assert row.estimate().peak.total <= row.published, (row.model, row.name)


def test_each_of_torchtune_s_savings_changes_the_estimate_in_its_direction():
    published = [row.published for row in LADDER]
    estimated = [row.estimate().peak.total for row in LADDER]
    signs = [
        [(after > before) - (after < before) for before, after in itertools.pairwise(sizes)]
        for sizes in (published, estimated)
    ]
    assert signs[0] == signs[1]
    assert sorted(range(10), key=published.__getitem__) == sorted(range(10), key=estimated.__getitem__)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bfloat16", "loss": "chunked"},
        {"precision": "mixed", "optimizer_in_backward": True},
        pytest.param({"method": "lora", "adapter_precision": "base"}, marks=pytest.mark.slow),
        pytest.param({"method": "lora", "adapter_dropout": True}, marks=pytest.mark.slow),
    ],
    ids=lambda options: " ".join(options),
)
def test_an_option_that_transformers_can_follow_is_within_five_percent_of_the_tracked_peak(options):
    estimated, tracked = compare(case("llama-untied", length=200, **options))
    assert estimated == pytest.approx(tracked, rel=0.05)


def test_a_fused_loss_needs_less_than_chunks_and_chunks_less_than_the_whole():
    row = next(row for row in LADDER if row.name == "packed to 4,096 tokens")
    peaks = [
        replace(row, options=row.options | {"compile": True, "checkpointing": True, "loss": loss}).estimate()
        for loss in ("fused", "chunked", "whole")
    ]
    totals = [peak.peak.bytes["logits"] for peak in peaks]
    assert totals == sorted(totals)


@pytest.mark.slow
def test_a_compiled_layer_keeps_what_torch_s_partitioner_saves():
    """Two layers and one, each compiled down to the partitioner alone; what autograd is given is counted."""
    import torch

    from probe.training.outline import training_model

    def kept(count: int) -> int:
        model = training_model("random:tiny-llama", dtype="bfloat16", attention="sdpa", checkpointing=False)
        model.model.layers = model.model.layers[:count]
        # Of the layers that are left: what is saved may lie where a storage was that is gone.
        held = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        for layer in model.model.layers:
            layer.compile(backend="aot_eager_decomp_partition")
        saved: dict[int, int] = {}

        def pack(tensor):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.zeros(2, 96, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids).loss
        size = sum(size for key, size in saved.items() if key not in held)
        del loss
        return size

    arch, _ = architecture("random:tiny-llama")
    tape = Tape(arch, FineTuningPlan(precision="bfloat16", batch=2, length=96, compile=True))
    assert tape.kept == pytest.approx(kept(2) - kept(1), rel=0.01)


_LINEAR = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 64}
_HYBRIDS = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "qwen3_next": _LINEAR
    | _EXPERTS
    | {"linear_value_head_dim": 32, "num_hidden_layers": 4, "shared_expert_intermediate_size": 128},
    "mamba2": {"num_hidden_layers": 3, "head_dim": 64, "num_heads": 16, "state_size": 32, "chunk_size": 64},
}


@pytest.mark.parametrize(
    ("family", "length"),
    [
        ("lfm2", 200),
        pytest.param("qwen3_next", 100, marks=pytest.mark.slow),
        pytest.param("mamba2", 100, marks=pytest.mark.slow),
    ],
)
def test_a_family_of_several_kinds_of_layers_is_within_five_percent_of_the_tracked_peak(
    tmp_path, family, length
):
    name = _gated(family, tmp_path, **_HYBRIDS[family])
    assert abs(_error(name, FineTuningPlan(precision="bfloat16", batch=2, length=length))) < 0.05


def test_masks_that_a_model_holds_are_counted(tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model(
        "gpt_neo", hidden_size=64, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    ).save_pretrained(tmp_path)
    arch, _ = architecture(str(tmp_path))
    assert arch.buffers == 2 * arch.n_ctx**2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "llama4_text", "num_hidden_layers": 2}, None),
        pytest.param({"model_type": "mamba", "num_hidden_layers": 2}, None, marks=pytest.mark.slow),
        pytest.param({"model_type": "gemma3n_text"}, None, marks=pytest.mark.slow),
        pytest.param({"model_type": "gemma4_text"}, None, marks=pytest.mark.slow),
        ({"model_type": "bart", "decoder_layers": 2}, None),
        ({"model_type": "musicgen"}, "does not say enough"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "0 layers"),
        ({"model_type": "llama", "num_hidden_layers": 10**7}, "10,000,000 layers"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_a_configuration_gives_an_estimate_or_a_sentence(tmp_path, values, words):
    (tmp_path / "config.json").write_text(json.dumps(values))
    result = CliRunner().invoke(main, ["memory", str(tmp_path), "--length", "32"])
    assert result.exit_code in ((0,) if words is None else (6,)), result.output
    assert words is None or words in result.output


@pytest.mark.slow
def test_every_class_of_configuration_is_outlined_or_refused_with_a_sentence(tmp_path):
    """Whatever else a family's code raises is caught where its layers are counted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    outlined = 0
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "num_hidden_layers": 2}))
        try:
            outlined += architecture(str(tmp_path))[0].n_layers > 0
        except ModelUnavailable as error:
            assert str(tmp_path) in str(error)
    assert outlined > 150


def test_a_gguf_file_that_does_not_say_its_sizes_is_refused(tmp_path):
    from gguf import GGUFWriter

    path = tmp_path / "m.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    result = CliRunner().invoke(main, ["memory", str(path)])
    assert result.exit_code == 6
    assert "lacks embedding_length, vocab_size, attention.head_count, feed_forward_length" in result.output


def test_the_same_in_python():
    import probe

    document = probe.memory("random:tiny-llama", loss="chunked", method="lora", targets=["q_proj"], rank=4)
    assert document["plan"]["loss"] == "chunked" and document["plan"]["targets"] == ("q_proj",)
    with pytest.raises(UsageError, match="no option lss"):
        probe.memory("random:tiny-llama", lss="chunked")
