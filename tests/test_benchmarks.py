"""The benchmarks measure what they say: every section appears, disagreement is found, counts match an outside counter."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import (
    agreement,
    counts,
    device,
    generation,
    inputs,
    memory,
    nnsight_pair,
    others,
    roofline,
    table,
)
from benchmarks import ours as engine
from tests.conftest import tiny

SMOKE = ["--rounds", "1", "--threads", "1", "--batch", "2", "--new", "4", "--tasks", "2", "--tools", "5"]


@pytest.fixture(scope="module")
def ours():
    return engine.Ours(tiny("tiny-llama"), "random:tiny-llama", "float32", "cpu")


@pytest.fixture(scope="module")
def batch(ours):
    return inputs.batch(ours, 2, 4)


@pytest.fixture(scope="module")
def outcomes(ours, batch):
    return engine.generate(ours, batch.plans, batch.n_new, capture="default", out=None)


@pytest.fixture(scope="module")
def eager(ours, batch):
    return agreement.from_eager(others.eager(ours.hf, batch), batch)


@pytest.mark.slow
def test_the_smoke_gives_a_table_with_every_section(ours, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "load", lambda *_: ours)
    monkeypatch.setattr(memory, "_ask", memory.answer)  # in this process: a fresh one takes seconds to import
    monkeypatch.setattr(inputs, "LONG_PROMPT", 1200)
    monkeypatch.setattr(nnsight_pair, "PYTHON", tmp_path / "python")
    threads = torch.get_num_threads()
    file = tmp_path / "smoke.json"
    result = CliRunner().invoke(command.main, ["--model", ours.name, *SMOKE, "--json", str(file)])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, (result.output, result.exception)
    content = json.loads(file.read_text())
    assert list(content["sections"]) == [
        "generation",
        "roofline",
        "nnsight",
        "candidates",
        "prefix",
        "reasoning",
        "memory",
    ]
    for name, section in content["sections"].items():
        assert section["title"] in result.output
        assert name == "nnsight" or (section["ratios"] and all(r["rounds"] for r in section["ratios"]))
    assert "its environment is missing" in content["sections"]["nnsight"]["notes"][0]
    judged = [check for section in content["sections"].values() for check in section["checks"]]
    assert len(judged) > 15 and all(check["passed"] for check in judged)
    assert "Targets" in result.output and ("met" in result.output or "missed" in result.output)
    written = file.read_text() + file.with_suffix(".md").read_text()
    assert str(tmp_path) not in written and str(engine.ROOT) not in written


def test_attention_of_layers_that_drop_keys_behind_their_window_agrees():
    ours = engine.Ours(tiny("tiny-gemma2"), "random:tiny-gemma2", "float32", "cpu")
    batch = inputs.batch(ours, 2, 4)
    outcomes = engine.generate(ours, batch.plans, batch.n_new, capture="default", out=None)
    observed = agreement.from_eager(others.eager(ours.hf, batch), batch)
    assert all(check.passed for check in agreement.check_captures("eager", outcomes, observed, True))


def test_results_of_transformers_agree(outcomes, eager):
    checks = agreement.check_captures("eager", outcomes, eager, True)
    assert len(checks) == 4 and all(check.passed for check in checks)


@pytest.mark.parametrize(
    ("site", "limit", "failing"),
    [
        ("resid_post", agreement.RESID, "resid_post"),
        ("attn_to_spans", agreement.MASS, "attn_to_spans"),
        ("log_probs", agreement.LOG_PROB, "log_probs"),
    ],
)
def test_a_perturbed_tensor_fails_its_check_alone(outcomes, eager, site, limit, failing):
    tensor = outcomes[1].tensors[site].clone()
    tensor.view(-1)[0] += 3 * limit * max(1.0, float(tensor.abs().max()))
    perturbed = [outcomes[0], replace(outcomes[1], tensors={**outcomes[1].tensors, site: tensor})]
    checks = agreement.check_captures("eager", perturbed, eager, True)
    assert [check.what.split(",")[0].split(":")[0] for check in checks if not check.passed] == [failing]
    again = agreement.check_outcomes("again", outcomes, perturbed, True)
    assert [check.what.split(":")[0] for check in again if not check.passed] == [failing]


def test_not_a_number_never_agrees(outcomes, eager):
    tensor = torch.full_like(outcomes[0].tensors["resid_post"], float("nan"))
    broken = [replace(outcomes[0], tensors={**outcomes[0].tensors, "resid_post": tensor}), outcomes[1]]
    checks = agreement.check_captures("eager", broken, eager, True)
    assert any(check.passed is False and check.what.startswith("resid_post") for check in checks)


def test_another_token_is_found_and_named_by_its_step(outcomes):
    theirs = [agreement.new_tokens(outcome) for outcome in outcomes]
    theirs[1][2] += 1
    check = agreement.check_tokens("other", outcomes, theirs, True)
    assert check.passed is False and check.finding == "1 of 2 sequences identical, first fork at step 2"
    assert agreement.check_tokens("other", outcomes, theirs, False).passed is None


def test_rows_after_a_fork_are_not_compared(outcomes, eager):
    forked = replace(
        eager[1], tokens=[eager[1].tokens[0], -1, *eager[1].tokens[2:]], resid=eager[1].resid.clone()
    )
    forked.resid[:, 2:] += 100.0
    checks = agreement.check_captures("eager", outcomes, [eager[0], forked], True)
    assert {check.what.split(",")[0]: check.passed for check in checks}["resid_post"] is True


def test_a_candidate_scored_otherwise_is_found():
    assert agreement.check_log_probs("x", [-1.0, -2.0], [-1.0, -2.00005], True).passed
    assert agreement.check_log_probs("x", [-1.0, -2.0], [-1.0, -2.0002], True).passed is False


def test_one_forward_a_candidate_gives_the_same_alone_and_in_batches(ours):
    prompt = inputs.few_tools(ours)
    candidates = [list(candidate.token_ids) for candidate in prompt.candidates]
    alone = others.forward_per_candidate(ours.hf, prompt.token_ids, candidates, 1)
    packed = others.forward_per_candidate(ours.hf, prompt.token_ids, candidates, 3)
    assert len(candidates) == 4 and alone == pytest.approx(packed, abs=1e-4)
    assert alone == pytest.approx(engine.score(ours, prompt), abs=1e-4)


def test_counted_operations_are_those_that_torch_counts(ours, batch):
    from torch.utils.flop_counter import FlopCounterMode

    n, facts = batch.lengths[0], ours.model.facts
    counts = roofline.count(ours.hf, facts, [n], 4, 0)
    with FlopCounterMode(display=False) as counter, others.attention(ours.hf, "eager"):
        ours.hf(input_ids=torch.tensor([batch.prompts[0].token_ids]), logits_to_keep=1)
    # torch counts the whole square of the pattern, of which a causal model needs the lower half.
    upper = 4 * facts.n_layers * facts.n_heads * facts.d_head * (n * n - n * (n + 1) // 2)
    rotary = sum(
        flops
        for module, operations in counter.get_flop_counts().items()
        if module.endswith("rotary_emb")
        for flops in operations.values()
    )
    assert counter.get_total_flops() == counts.prefill.flops + upper + rotary


def test_decode_bytes_are_weights_cache_and_capture(ours):
    facts = ours.model.facts
    counts = roofline.count(ours.hf, facts, [100, 200], 10, 5000)
    weights = 4 * sum(m.weight.numel() for m in ours.hf.modules() if isinstance(m, torch.nn.Linear))
    token = 4 * 2 * facts.n_layers * facts.n_kv_heads * facts.d_head
    # Middle step: 5 of 10 tokens are there in both sequences; each reads its cache and writes one more token.
    assert counts.decode.bytes == weights + token * (105 + 205 + 2)
    assert counts.decode_captured.bytes - counts.decode.bytes == 500


def test_prefill_and_decode_steps_are_told_apart_from_the_end():
    pace = roofline.Pace(0.0, 10.0, [0.1, 1.0, 4.0, 5.0, 6.5, 7.5])  # two forwards of the prompt, four steps
    assert pace.split(5) == (4.0, 1.0)
    assert pace.split(8) is None


def test_a_ratio_is_the_median_of_its_rounds_and_is_held_against_its_target():
    ratio = table.Ratio("a / b", [1.0, 9.0, 1.04], table.Target("at most", 1.05))
    assert (ratio.median, ratio.verdict) == (1.04, "met")
    assert table.Ratio("a / b", [3.9], table.Target("at least", 4)).verdict == "missed"
    assert table.Ratio("a / b", [], table.Target("at least", 4)).verdict == ""


def test_contestants_take_turns_and_slow_ones_leave_early(monkeypatch):
    from benchmarks import timing

    order: list[str] = []
    ticks = iter(range(100))
    monkeypatch.setattr(timing, "now", lambda device: float(next(ticks)))
    contestants = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "slow")}
    timings = timing.run_rounds(contestants, {"a": 2, "b": 2, "slow": 1}, "cpu")
    assert order == ["a", "b", "slow", "a", "b"]
    assert timings.ratios("slow", "a") == [1.0] and timings.ratios("a", "b") == [1.0, 1.0]


def test_a_failed_check_ends_with_exit_code_1(tmp_path, monkeypatch):
    wrong = table.Section("generation", "T", checks=[table.Check("tokens", False, "0 of 8")])
    monkeypatch.setattr(command, "measure", lambda settings, wanted: iter([wrong]))
    result = CliRunner().invoke(command.main, ["--json", str(tmp_path / "r.json"), "--threads", "1"])
    assert result.exit_code == 1 and "DIFFERS" in result.output


def test_a_contestant_that_cannot_run_is_named_and_left_out(ours, batch, tmp_path):
    contest = generation.Contest(ours, batch, tmp_path)

    def refuse(given):
        raise NotImplementedError("not for this architecture")

    contestants = {generation.PLAIN: lambda given: None, generation.BRIDGE: refuse}
    contest.warm_up(contestants)
    assert list(contestants) == [generation.PLAIN]
    assert contest.unavailable == [
        "bridge generate: not measured: NotImplementedError: not for this architecture"
    ]


def test_what_is_measured_has_no_path_in_its_name():
    assert command._slug("/home/somebody/My Model") == "my-model"
    assert command._slug("random:tiny-llama") == "random-tiny-llama"


def test_padding_is_on_the_left():
    prompts = [SimpleNamespace(prompts=[SimpleNamespace(token_ids=ids)]) for ids in ([7, 8, 9], [5])]
    tokens, mask = inputs.Inputs(cast(Any, prompts), 1).padded()
    assert tokens.tolist() == [[7, 8, 9], [0, 0, 5]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_devices_script_compares_every_site_and_says_what_the_time_did_not_reach(
    ours, monkeypatch, tmp_path
):
    monkeypatch.setattr(engine, "load", lambda *_: ours)
    monkeypatch.setattr(device, "DTYPES", ("float32",))
    file = tmp_path / "device.json"
    asked = ["--shape", "tiny-llama", "--batch", "2", "--new", "3", "--rounds", "1", "--steps", "1"]
    result = CliRunner().invoke(device.main, [*asked, "--json", str(file)])
    assert result.exit_code == 0, (result.output, result.exception)
    content = json.loads(file.read_text())["sections"]
    checks = {check["what"]: check["passed"] for check in content["tiny-llama, float32"]["checks"]}
    assert len(checks) >= 6 and all(checks.values()), checks
    assert any("log P(tool)" in what for what in checks) and any("attn_to_spans" in what for what in checks)
    assert len(content["training"]["ratios"]) == 1 and 0.9 < content["training"]["ratios"][0]["median"] < 1.1
    late = list(device.measure("cpu", ("tiny-llama",), (1,), 2, 1, 2, lambda: False))
    assert [bool(section.notes) for section in late] == [True, True]


def test_the_devices_script_fails_where_a_site_differs(ours, monkeypatch):
    """Attention to spans is exchanged between two heads."""
    generate = engine.generate

    def broken(*given: Any, **named: Any) -> Any:
        outcomes = generate(*given, **named)
        for outcome in outcomes:
            outcome.tensors["attn_to_spans"] = outcome.tensors["attn_to_spans"].flip(1)
        return outcomes

    monkeypatch.setattr(engine, "generate", broken)
    failed = [check.what for check in device.parity(ours, 2) if check.passed is False]
    assert failed == ["attn_to_spans: against eager transformers"]


def test_a_run_costs_no_more_passes_tokens_operations_or_bytes_than_recorded():
    """What needs no quiet machine: renewed by `python -m benchmarks.counts --record`, with a reason."""
    counted, bounds = counts.count(), counts.recorded()
    assert counts.grown(counted, bounds) == []
    assert all(figures["flops"] > 1e7 and figures["tokens"] > 100 for figures in counted.values())
    worse = {"tools": counted["tools"] | {"tokens": bounds["tools"]["tokens"] + 1}}
    assert len(counts.grown(worse, bounds)) == 1
