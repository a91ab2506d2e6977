"""`--dtype auto`: what it chooses, what it says, and that a run keeps it."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from click.testing import CliRunner

import probe
from probe.cli import main
from probe.errors import ModelUnavailable, UsageError
from probe.harness.sweep import grid
from probe.model import load, precision
from probe.runs.diff import diff

TASK = {"id": "c", "kind": "cot", "question": "2 + 2?", "answer": 4, "steps": ["2 + 2 = 4.", "So four."]}


@pytest.fixture
def multiplying(monkeypatch):
    """A processor with bfloat16 products."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


def test_a_processor_without_bfloat16_products_gets_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    lines: list[str] = []
    model = load("random:tiny-llama", dtype="auto", log=lines.append)
    assert model.dtype == torch.float32
    assert lines[-1] == "dtype auto is float32: this processor has no bfloat16 products"
    assert model.origin["dtype_auto"] == lines[-1].removeprefix("dtype auto is ")


def test_a_model_whose_probabilities_stay_gets_bfloat16(multiplying):
    model = load("random:tiny-llama", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.origin["dtype_auto"].startswith("bfloat16: log-probabilities of ")


def test_a_model_that_rounds_too_much_or_is_refused_in_bfloat16_gets_float32(multiplying, monkeypatch):
    monkeypatch.setattr(precision, "computing_gap", lambda _model: (0.051, 9))
    assert load("random:tiny-llama", dtype="auto").dtype == torch.float32
    monkeypatch.setattr(precision, "computing_gap", lambda _model: (float("nan"), 9))
    assert load("random:tiny-llama", dtype="auto").dtype == torch.float32

    def refusing(dtype: str):
        if dtype == "bfloat16":
            raise ModelUnavailable("it gives NaN in bfloat16\ntry another")
        return load("random:tiny-llama", dtype=dtype)

    model = precision.chosen_precision(refusing, "cpu", lambda _line: None)
    assert model.origin["dtype_auto"] == "float32: it gives NaN in bfloat16"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: you tried")]
)
def test_a_device_without_memory_says_nothing_of_the_architecture_nor_of_bfloat16(
    multiplying, monkeypatch, error
):
    def full(*_args, **_given):
        raise error

    dtypes: list[str] = []

    def loaded(dtype: str):
        dtypes.append(dtype)
        return load("random:tiny-llama", dtype=dtype)

    for where in ("plain_pass", "traced_facts"):
        with monkeypatch.context() as patched:
            patched.setattr(f"probe.model.hooked.{where}", full)
            with pytest.raises(
                ModelUnavailable, match="out of memory while .*: take a smaller dtype"
            ) as refused:
                precision.chosen_precision(loaded, "cpu", lambda _line: None)
        assert "captured faithfully" not in str(refused.value)
    monkeypatch.setattr(precision, "computing_gap", full)
    with pytest.raises(ModelUnavailable, match="out of memory while bfloat16 was compared with float32"):
        precision.chosen_precision(loaded, "cpu", lambda _line: None)
    assert dtypes == ["bfloat16"] * 3


def test_the_gap_is_the_difference_from_the_same_rounded_weights_computed_in_float32():
    model = load("random:tiny-llama", dtype="bfloat16")
    twin = load("random:tiny-llama")
    twin.hf.load_state_dict({name: weight.float() for name, weight in model.hf.state_dict().items()})
    tokens = torch.tensor([model.tokenizer.encode(precision._TEXT)])[:, : model.facts.n_ctx]
    with torch.inference_mode():
        rounded, exact = (
            m.hf(input_ids=tokens).logits[0, :-1].float().log_softmax(-1) for m in (model, twin)
        )
    gap = (rounded - exact).gather(1, tokens[0, 1:, None]).abs().mean()
    measured, n_tokens = precision.computing_gap(model)
    assert measured == pytest.approx(float(gap), rel=0.5) and n_tokens == tokens.shape[1] - 1
    assert precision.computing_gap(twin)[0] < 1e-6


def test_a_gpu_that_emulates_bfloat16_gets_float32_and_the_one_asked_for_is_looked_at(monkeypatch):
    at: list[int] = []

    @contextlib.contextmanager
    def device(which):
        at.append(which.index if isinstance(which, torch.device) else which)
        yield
        at.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or at[-1] == 1
    )
    assert precision._lacks_bfloat16("cuda:1") == ""
    assert precision._lacks_bfloat16("cuda:0") == precision._lacks_bfloat16("auto") != ""


def test_a_run_records_what_auto_chose_and_is_resumed_in_it(multiplying, monkeypatch, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(TASK) + "\n" + json.dumps(TASK | {"id": "d"}) + "\n")
    command = ["run", str(path), "--model", "random:tiny-llama", "--dtype", "auto", "--max-new-tokens", "4"]
    result = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "r"), "--no-analyze"])
    assert result.exit_code == 0, result.output
    assert "dtype auto is bfloat16" in result.output
    run = probe.open(tmp_path / "r")
    assert run.run["options"]["dtype"] == run.run["model"]["dtype"] == "bfloat16"
    assert run.run["model"]["dtype_auto"].startswith("bfloat16")
    assert {str(task["resid_post"].dtype) for task in run} == {"torch.bfloat16"}
    probe.run(
        path, model="random:tiny-llama", dtype="auto", out=tmp_path / "p", prepare=True, max_new_tokens=4
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert probe.resume(tmp_path / "p", analyze=False).run["model"]["dtype"] == "bfloat16"
    assert not diff(probe.open(tmp_path / "r"), probe.open(tmp_path / "p"))


def test_a_sweep_takes_dtypes_by_name(tmp_path):
    with pytest.raises(UsageError, match="auto"):
        grid(["random:tiny-llama"], ["auto"], [0], {})
