"""Edits of states against plain forward hooks on transformers' own modules: one full forward, no cache, no batch."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack, contextmanager

import pytest
import torch
from click.testing import CliRunner, Result

import probe
from probe.capture import CaptureSpec, Generation, Job, Outcome, plan_shared, run_batch
from probe.capture.batch import Capturer
from probe.capture.edits import Steering, on_prompt
from probe.cli import main
from probe.errors import BadInput, UsageError
from probe.harness.runner import RunStopped, SilentProgress
from probe.model.edits import Knockout, StateEdit
from probe.runs.edits import decode_edits, encode_edits
from tests.conftest import TINY, tiny
from tests.test_capture import make_jobs

SITES = ("resid_post", "attn_out", "mlp_out", "z")
WRITERS = {"tiny-gpt2": ("attn", "mlp"), "tiny-neox": ("attention", "mlp")} | {
    "tiny-gemma2": ("post_attention_layernorm", "post_feedforward_layernorm")
}
"""Modules of a block that write to the residual stream; the others have `self_attn` and `mlp`."""
PROJECTIONS = ("o_proj", "c_proj", "dense")


def blocks(hf):
    base = hf.base_model
    return base.h if hasattr(base, "h") else base.layers


def moved(states: torch.Tensor, edit: StateEdit) -> torch.Tensor:
    """The definition, written out."""
    out = states.clone()
    for row in range(states.shape[0]):
        if row >= edit.start and (edit.end is None or row < edit.end):
            new = edit.values if edit.values.ndim == 1 else edit.values[row - edit.start]
            if edit.how == "add":
                out[row] += edit.dose * new
            else:
                out[row] = (1 - edit.dose) * states[row] + edit.dose * new
    return out


@contextmanager
def hooked(model, name: str, edits):
    """transformers' modules changed by plain hooks, in the order of the edits."""
    with ExitStack() as stack:
        for edit in edits:
            if not isinstance(edit, StateEdit):
                continue
            block = blocks(model.hf)[edit.layer]
            attention, mlp = WRITERS.get(name, ("self_attn", "mlp"))

            def output(_module, _inputs, out, edit=edit):
                states = out[0] if isinstance(out, tuple) else out
                states = moved(states[0], edit)[None]
                return (states, *out[1:]) if isinstance(out, tuple) else states

            def read(_module, inputs, edit=edit):
                d_head = model.facts.d_head
                assert edit.head is not None
                columns = slice(edit.head * d_head, (edit.head + 1) * d_head)
                states = inputs[0].clone()
                states[0, :, columns] = moved(states[0, :, columns], edit)
                return (states, *inputs[1:])

            if edit.site == "z":
                part = getattr(block, WRITERS[name][0] if name in ("tiny-gpt2", "tiny-neox") else "self_attn")
                projection = next(getattr(part, p) for p in PROJECTIONS if hasattr(part, p))
                hook = projection.register_forward_pre_hook(read)
            else:
                part = {"attn_out": attention, "mlp_out": mlp}.get(edit.site)
                module = block if part is None else getattr(block, part)
                hook = module.register_forward_hook(output)
            stack.callback(hook.remove)
        yield


def plain(model, name: str, ids, edits) -> torch.Tensor:
    with hooked(model, name, edits), torch.no_grad():
        return model.hf(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)


def vector(model, site: str, seed: int, rows: int | None = None) -> torch.Tensor:
    size = model.facts.d_head if site == "z" else model.facts.d_model
    shape = (size,) if rows is None else (rows, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(outcome) -> Outcome:
    assert isinstance(outcome, Outcome)
    return outcome


def edits_of(model, prompt) -> list[tuple]:
    """Sets of edits: each site, adding and replacing, at one run of positions, from one on, everywhere, several at once."""
    slot, last = prompt.n_prompt - 1, model.facts.n_layers - 1
    sets: list[tuple] = [()]
    for number, site in enumerate(SITES):
        head = 1 if site == "z" else None
        v = vector(model, site, number)
        sets.append((StateEdit(site, 0, v, "add", head, 20, 27, 1.5),))
        sets.append((StateEdit(site, last, v, "replace", head, slot, None, 0.5),))
        sets.append((StateEdit(site, 1, 0 * v, "replace", head),))
    sets.append((StateEdit("resid_post", 1, vector(model, "resid_post", 9, 4), "replace", None, 11, 15),))
    first, second = (StateEdit("mlp_out", 0, vector(model, "mlp_out", n), start=slot) for n in (4, 5))
    sets.append((first, second, StateEdit("z", 1, vector(model, "z", 6), head=0, start=9)))
    return sets


@pytest.mark.parametrize("name", TINY)
def test_scores_and_generated_tokens_equal_plain_hooks(name):
    """All in one batch, with an unedited one among them, prefixes shared; then one by one, nothing shared."""
    model = tiny(name)
    prompt = make_jobs(model, 1)[0].prompt
    sets = edits_of(model, prompt)
    jobs = [Job(make_jobs(model, 1)[0].prompt, str(n), edits=edits) for n, edits in enumerate(sets)]
    order = plan_shared(jobs)
    assert max(job.shared for job in jobs) > 0
    spec = CaptureSpec(frozenset({"log_probs", "resid_post"}))
    together: dict[int, Outcome] = {}
    capturer = Capturer(model, model.codec, spec, Generation(5))
    capturer.run([jobs[i] for i in order], lambda n, outcome: together.update({order[n]: whole(outcome)}))
    unedited = together[0]
    differing = 0
    for index, edits in enumerate(sets):
        outcome = together[index]
        log_probs = plain(model, name, outcome.token_ids[:-1], edits)
        rows = log_probs[outcome.n_prompt - 1 :]
        expected = [float(rows[t, token]) for t, token in enumerate(outcome.token_ids[outcome.n_prompt :])]
        assert outcome.tensors["log_probs"].tolist() == pytest.approx(expected, rel=1e-5, abs=2e-5), edits
        for candidate, log_prob in zip(prompt.candidates, outcome.candidate_log_probs, strict=True):
            ids = [*prompt.token_ids, *candidate.token_ids]
            rows = plain(model, name, ids[:-1], edits)[prompt.n_prompt - 1 :]
            total = sum(float(rows[t, token]) for t, token in enumerate(candidate.token_ids))
            assert log_prob == pytest.approx(total, rel=1e-5, abs=2e-5), edits
        differing += outcome.candidate_log_probs != pytest.approx(unedited.candidate_log_probs, abs=1e-3)
        if index % 4 == 1:
            alone = Job(make_jobs(model, 1)[0].prompt, "alone", edits=edits)
            single = whole(run_batch(model, model.codec, [alone], spec, Generation(5))[0])
            assert alone.shared == 0
            assert single.token_ids == outcome.token_ids
            torch.testing.assert_close(
                single.tensors["resid_post"], outcome.tensors["resid_post"], rtol=1e-4, atol=1e-5
            )
    assert differing >= len(sets) - 3, "an edit changes something"


def test_what_is_captured_is_the_state_after_the_edit():
    model = tiny("tiny-llama")
    v = vector(model, "resid_post", 3)
    put = Steering(site="resid_post", layer=1, values=v, how="replace")
    states = model.capture("The cat sat", sites="resid_post", max_new_tokens=3, edits=[put]).tensors[
        "resid_post"
    ]
    torch.testing.assert_close(states[1], v.expand(3, -1))
    before = model.capture("The cat sat", sites="resid_post", max_new_tokens=1).tensors["resid_post"]
    torch.testing.assert_close(states[0, 0], before[0, 0])


def test_places_are_those_of_the_prompt():
    model = tiny("tiny-llama")
    prompt = make_jobs(model, 1)[0].prompt
    span = next(span for span in prompt.spans if span.label == "tool:a")

    def runs(at) -> list[tuple[int, int | None]]:
        edits = on_prompt(
            [Steering(site="resid_post", layer=0, values=torch.ones(model.facts.d_model), at=at)], prompt
        )
        return [(edit.start, edit.end) for edit in edits if isinstance(edit, StateEdit)]

    n = prompt.n_prompt
    assert (runs("all"), runs("prompt")) == ([(0, None)], [(0, n)])
    assert (runs("decision"), runs("generated"), runs((3, 5))) == ([(n - 1, None)], [(n, None)], [(3, 5)])
    assert (runs("tool:a"), runs("tool:nobody")) == ([(span.start, span.end)], [])
    assert len(runs("tool:*")) == sum(span.label.startswith("tool:") for span in prompt.spans) > 0
    knockout = Knockout(2, 4, 6)
    assert on_prompt([knockout], prompt) == (knockout,)


def test_a_file_keeps_edits_and_refuses_what_is_none():
    edits = [
        Steering(site="resid_post", layer=2, values=torch.arange(4.0), dose=-3.0, at="tool:a"),
        Steering(site="z", layer=0, head=1, values=torch.ones(2), how="replace", at=(3, 9)),
    ]
    data = encode_edits(edits)
    back = decode_edits(data, "f")
    assert [edit.document() for edit in back] == [edit.document() for edit in edits]
    assert all(torch.equal(a.values, b.values) for a, b in zip(back, edits, strict=True))
    with pytest.raises(BadInput, match="no safetensors file"):
        decode_edits(data[:-3], "f")
    from safetensors.torch import save

    for rules, why in (
        ("[]", "empty"),
        ("[3]", "no object"),
        (json.dumps([{"site": "resid_post", "layer": 0, "run": "rm"}]), "unknown field run"),
        (json.dumps([{"site": "logits", "layer": 0}]), "one of resid_post"),
        (json.dumps([{"site": "z", "layer": 0}]), "names its head"),
        (json.dumps([{"site": "resid_post", "layer": 0, "at": [5, 2]}]), "start < end"),
    ):
        with pytest.raises(BadInput, match=why):
            decode_edits(save({"0": torch.ones(4)}, {"edits": rules}), "f")


def test_an_edit_that_a_model_cannot_have_is_refused_in_a_sentence():
    model = tiny("tiny-llama")
    with pytest.raises(UsageError, match="layers 0 to"):
        model.score(
            "a", ["b"], edits=[Steering(site="resid_post", layer=99, values=torch.ones(model.facts.d_model))]
        )
    with pytest.raises(UsageError, match="finite"):
        Steering(site="resid_post", layer=0, values=torch.tensor([float("nan")]))
    with pytest.raises(UsageError, match="values of 3 numbers"):
        model.score("a", ["b"], edits=[Steering(site="resid_post", layer=0, values=torch.ones(3))])
    with pytest.raises(UsageError, match="head 77"):
        model.score(
            "a", ["b"], edits=[Steering(site="z", layer=0, head=77, values=torch.ones(model.facts.d_head))]
        )


# -- runs under edits ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    tools = [{"name": name, "description": f"Does {name}.", "parameters": {}} for name in ("add", "find")]
    lines = [
        {"id": f"t{n}", "kind": "tool_selection", "input": f"Please {n}", "tools": tools, "target": "add"}
        for n in range(4)
    ] + [{"id": "p", "kind": "prompting", "input": "Hot or cold?", "variants": [{"name": "base"}]}]
    path = tmp_path_factory.mktemp("edits") / "tasks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_two_runs_steer_a_third(task_file, tmp_path):
    """As a user does it: the mean difference of two runs, added at the decision of a third."""
    options = {"model": "random:tiny-llama", "max_new_tokens": 3, "analyze": False}
    a = probe.run(task_file, out=tmp_path / "a", **options)
    b = probe.run(task_file, out=tmp_path / "b", seed=1, **options)
    v = torch.stack(
        [a[f"t{n}"]["resid_post"][2, 0] + 0.1 * n - b["t1"]["resid_post"][2, 0] for n in range(3)]
    ).mean(0)
    edits = [probe.Steering(site="resid_post", layer=2, values=v, dose=40.0)]
    steered = probe.run(task_file, out=tmp_path / "c", edits=edits, **options)
    assert steered.run["edits"]["states"] == [edit.document() for edit in edits]
    model = tiny("tiny-llama")
    for task in steered:
        if task.id != "p":
            record = task.record
            n = record["n_prompt"]
            log_probs = plain(
                model,
                "tiny-llama",
                record["token_ids"][:-1],
                [StateEdit("resid_post", 2, v, start=n - 1, dose=40.0)],
            )
            rows = log_probs[n - 1 :]
            expected = [float(rows[t, token]) for t, token in enumerate(record["token_ids"][n:])]
            assert task["log_probs"].tolist() == pytest.approx(expected, abs=1e-4)
            assert task["resid_post"][2, 0].numpy() == pytest.approx(
                (a[task.id]["resid_post"][2, 0] + 40 * v).numpy(), rel=1e-3, abs=1e-2
            )


class Stops(SilentProgress):
    """A signal after the first task."""

    def done(self, n_tokens: int, count: int = 1) -> None:
        raise RunStopped(signal.SIGTERM)


def test_a_run_under_edits_is_resumed_verified_and_told_apart(task_file, tmp_path):
    file = probe.write_edits(
        tmp_path / "steer.safetensors",
        [Steering(site="attn_out", layer=1, values=torch.ones(48), how="replace", at="tool:*", dose=0.5)],
    )
    base = ["run", str(task_file), "--model", "random:tiny-llama", "--max-new-tokens", "2", "--no-analyze"]

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(main, list(arguments))

    assert invoke(*base, "--out", str(tmp_path / "plain")).exit_code == 0
    assert invoke(*base, "--edit", str(file), "--out", str(tmp_path / "a")).exit_code == 0
    with pytest.raises(RunStopped):
        probe.run(
            task_file,
            model="random:tiny-llama",
            max_new_tokens=2,
            out=tmp_path / "b",
            edits=file,
            progress=Stops(),
        )
    file.unlink()  # a run keeps its own copy
    assert invoke("verify", str(tmp_path / "a")).exit_code == 0
    assert invoke("resume", str(tmp_path / "b"), "--no-analyze").exit_code == 0
    assert len(list((tmp_path / "b/tasks").glob("*/*"))) == 5
    assert invoke("diff", str(tmp_path / "a"), str(tmp_path / "b")).exit_code == 0
    told = invoke("diff", str(tmp_path / "plain"), str(tmp_path / "a"))
    assert told.exit_code == 1
    words = "site attn_out layer 1 how replace at tool:* dose 0.5"
    assert f"under other edits: none / {words}" in told.output
    assert f"edits    {words}" in invoke("show", str(tmp_path / "a")).stdout
    assert "edits  " not in invoke("show", str(tmp_path / "plain")).stdout
    assert invoke("report", str(tmp_path / "a")).exit_code == 0
    assert words in (tmp_path / "a/report.html").read_text()
    refused = invoke("analyze", str(tmp_path / "a"), "mask_all")
    assert refused.exit_code == 4 and "under edits" in refused.output
    copy = tmp_path / "a/edits.safetensors"
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    assert invoke("verify", str(tmp_path / "a")).exit_code == 5


def test_an_edit_that_does_not_fit_is_refused_before_anything_runs(task_file, tmp_path):
    with pytest.raises(UsageError, match="layers 0 to"):
        probe.run(
            task_file,
            model="random:tiny-llama",
            out=tmp_path / "r",
            edits=[Steering(site="mlp_out", layer=50, values=torch.ones(48))],
        )
    assert not (tmp_path / "r/run.json").exists()
    command = ["run", str(task_file), "--dry-run", "--model", "random:tiny-llama", "--edit"]
    deep = probe.write_edits(tmp_path / "deep", [Steering(site="mlp_out", layer=50, values=torch.ones(48))])
    dry = CliRunner().invoke(main, [*command, str(deep)])
    assert dry.exit_code == 2 and "layers 0 to" in dry.output
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    result = CliRunner().invoke(main, [*command, str(bad)])
    assert result.exit_code == 3 and "write_edits" in result.output


def test_an_edit_whose_place_no_prompt_has_is_refused_with_the_places_there_are(task_file, tmp_path):
    edit = Steering(site="mlp_out", layer=1, values=torch.ones(48), at="tool:weather")
    with pytest.raises(
        UsageError, match="at tool:weather: no prompt has such a place; write .*decision.*tool:add"
    ):
        probe.run(task_file, model="random:tiny-llama", out=tmp_path / "r", edits=[edit])
    assert not (tmp_path / "r/run.json").exists()
    file = probe.write_edits(tmp_path / "steer", [edit])
    dry = CliRunner().invoke(
        main, ["run", str(task_file), "--dry-run", "--model", "random:tiny-llama", "--edit", str(file)]
    )
    assert dry.exit_code == 2 and "no prompt has such a place" in dry.output
