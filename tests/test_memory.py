"""Fine-tuning memory: arithmetic against published figures, and against torch's own tracker."""

from __future__ import annotations

import json
import math

import pytest
from click.testing import CliRunner

from benchmarks.finetune_memory import GRID, QUICK, compare
from probe.cli import main
from probe.errors import UsageError
from probe.finetune.advice import verdict
from probe.finetune.command import architecture
from probe.finetune.gpus import gpu
from probe.finetune.memory import Plan, estimate, four_bit_bytes, states, with_targets
from probe.finetune.rule import rule_of_thumb


def ask(*arguments: str) -> dict:
    result = CliRunner().invoke(main, ["memory", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def gemma():
    return architecture("random:gemma-2b")


def test_two_billion_parameters_take_22_gb_by_the_rule_and_fit_a_24_gb_card():
    found = ask("2B", "--rule-of-thumb", "--gpu", "rtx-4090")["rule_of_thumb"]
    parts = [
        found[f"{name}_bytes"] / 1e9 for name in ("weights", "gradients", "optimizer", "activations", "total")
    ]
    assert parts == [4, 4, 8, 6, 22]
    assert found["fits"] is True


def test_the_true_gemma_2b_takes_27_6_gb_by_the_same_rule_and_does_not_fit(gemma):
    assert gemma[0].n_params == 2_506_172_416
    found = rule_of_thumb(gemma[0].n_params, gpu("rtx-4090").usable_bytes)
    assert round(found["total_bytes"] / 1e9, 1) == 27.6
    assert found["fits"] is False


def test_model_states_are_zero_s_sixteen_bytes_a_parameter_and_anatomy_s_eighteen(gemma):
    arch, _ = gemma
    held = states(arch, Plan(precision="mixed"))
    assert held["weights"] + held["gradients"] + held["optimizer"] == 16 * arch.n_params
    held = states(arch, Plan(precision="autocast"))
    vectors = sum(math.prod(s) for _, s in arch.parameters if len(s) < 2)  # norms are not cast
    assert held["weights"] + held["gradients"] + held["optimizer"] == 18 * arch.n_params - 2 * vectors


def test_the_sum_is_given_where_accelerate_prints_the_largest_component(gemma):
    """accelerate 1.15's table for float16 shows max(model, gradients, optimizer step) of its own parts."""
    estimate_training_usage = pytest.importorskip("accelerate.utils").calculate_maximum_sizes
    assert estimate_training_usage is not None
    from accelerate.commands.estimate import estimate_training_usage as parts_of

    arch, _ = gemma
    parts = parts_of(4 * arch.n_params, "float16")
    printed = max(parts.values()) / 2**30
    together = (parts["model"] + parts["gradients"] + parts["step"]) / 2**30
    assert printed == pytest.approx(18.67, abs=0.01)
    assert together == pytest.approx(42.0, abs=0.1)
    ours = estimate(arch, Plan(precision="mixed"))
    peak = ours.peak.bytes
    assert ours.peak.total == sum(peak.values())
    assert ours.total_bytes > together * 2**30 * 0.9
    assert printed < 23.64 < ours.total_bytes / 2**30


def test_four_bit_constants_are_those_of_the_paper():
    assert 8 * four_bit_bytes(False) == 4.5
    assert 8 * four_bit_bytes(True) - 4 == pytest.approx(0.127, abs=5e-4)


def test_zero_divides_what_its_stage_shards(gemma):
    arch, _ = gemma
    one = states(arch, Plan())
    shares = {stage: states(arch, Plan(zero=stage, n_gpus=8)) for stage in (1, 2, 3)}
    for stage, sharded in enumerate((("optimizer",), ("optimizer", "gradients"), tuple(COMPONENT)), start=1):
        for name in COMPONENT:
            assert shares[stage][name] == one[name] / (8 if name in sharded else 1)


COMPONENT = ("weights", "gradients", "optimizer")


def test_every_change_that_is_proposed_fits_and_the_largest_is_the_largest(gemma):
    arch, known = gemma
    usable = gpu("rtx-4090").usable_bytes
    found = verdict(arch, Plan(), usable, known)
    assert not found["fits"] and found["margin_bytes"] < 0 and found["changes"]
    assert all(change["margin_bytes"] >= 0 for change in found["changes"])
    plan = with_targets(Plan(method="lora"), known)
    found = verdict(arch, plan, usable, known)
    for value, fits in ((found["largest_batch"], True), (found["largest_batch"] + 1, False)):
        total = estimate(arch, with_targets(Plan(method="lora", batch=value), known)).total_bytes
        assert (total <= usable) is fits


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_the_estimate_is_within_five_percent_of_the_tracked_peak(case):
    estimated, tracked = compare(case)
    assert estimated == pytest.approx(tracked, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=str)
def test_the_estimate_is_within_five_percent_over_the_whole_grid(case):
    estimated, tracked = compare(case)
    assert estimated == pytest.approx(tracked, rel=0.05)


def test_what_does_not_fit_together_is_a_usage_error():
    for arguments in (
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
    found = ask("random:tiny-llama", "--gpu", "24GiB", "--measure")
    names = ("weights", "gradients", "optimizer", "activations", "total")
    assert set(found["measures"]) == {f"{name}_bytes" for name in names} | {"fits"}
    assert abs(found["measured"]["error"]) < 0.05
