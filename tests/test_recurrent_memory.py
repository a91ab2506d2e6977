"""The memory of recurrent layers: knock-outs and states against transformers run token by token with its own cache."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

import probe
from probe.analyzers.registry import REGISTRY
from probe.capture import (
    Capturer,
    CaptureSpec,
    Continuation,
    Generation,
    Job,
    Outcome,
    Reference,
    plan_shared,
    run_batch,
    state_stretches,
)
from probe.capture.model import CapturingModel
from probe.capture.sites import STATES_PER_SEQUENCE, state_bytes
from probe.experiments import Effort, intervene
from probe.experiments.cost import cot_cost
from probe.experiments.cot.knockouts import chain_rows
from probe.experiments.cot.recurrent_memory import state_rows
from probe.harness.sizes import batch_bytes
from probe.model.attention import KVCache, Piece
from probe.model.edits import Knockout, StateKnockout
from probe.model.names import Source
from probe.model.recurrent import State
from probe.model.shapes import byte_tokenizer
from probe.prompts import prompt_of, prompt_of_tokens
from probe.runs import AXES
from probe.runs.views.chain import Chain
from tests.families import HALVES, LOOSE, loaded, relative, rounded
from tests.test_cot_docs import STATES
from tests.test_cot_knockouts import record

FAMILIES = ("qwen3_next", "mamba", "mamba2", "falcon_h1", "lfm2", "recurrent_gemma", "jamba")
IDS = [5 + (7 * i) % 90 for i in range(30)]
START, END, ROW = 9, 15, 22


class TokenByToken:
    """transformers' own model, one token a forward on its own cache; states of its recurrent layers can be put back."""

    def __init__(self, model: Any):
        self.hf, self.recurrent = model.hf, model.recurrent
        self.cache, self.length = DynamicCache(config=self.hf.config), 0
        self.named = "cache_params" if model.facts.model_type in ("mamba", "mamba2") else "past_key_values"
        self.logits: list[torch.Tensor] = []
        self.given: dict[int, list[tuple[tuple, dict]]] = {layer: [] for layer in self.recurrent}
        self.outputs: dict[int, list[torch.Tensor]] = {layer: [] for layer in self.recurrent}

    def run(self, ids: Sequence[int], hidden: Sequence[tuple[int, int]] = ()) -> None:
        """`hidden`: positions whose keys attention does not see."""
        hooks = [
            module.register_forward_hook(self._note(layer), with_kwargs=True)
            for layer, module in self.recurrent.items()
        ]
        for token in ids:
            mask = torch.ones(1, self.length + 1, dtype=torch.long)
            for start, end in hidden:
                mask[:, start:end] = 0
            asked = {self.named: self.cache, "use_cache": True, "attention_mask": mask if hidden else None}
            if self.named == "past_key_values":
                asked["position_ids"] = torch.tensor([[self.length]])
            with torch.inference_mode():
                self.logits.append(self.hf(input_ids=torch.tensor([[token]]), **asked).logits[0, -1])
            self.length += 1
        for hook in hooks:
            hook.remove()

    def _note(self, layer: int):
        def note(_module, args, named, output):
            self.given[layer].append((args, named))
            self.outputs[layer].append(output[0] if isinstance(output, tuple) else output)

        return note

    def states(self) -> dict[int, Any]:
        """A copy of what each recurrent layer keeps."""
        kept = {}
        for layer, module in self.recurrent.items():
            if hasattr(module, "conv1d_state"):
                kept[layer] = module.conv1d_state.clone(), module.rg_lru.recurrent_states.clone()
            else:
                held = self.cache.layers[layer]
                names = ("conv_states", "recurrent_states")
                kept[layer] = {name: copy.deepcopy(getattr(held, name)) for name in names}
        return kept

    def put(self, states: dict[int, Any]) -> None:
        for layer, module in self.recurrent.items():
            if hasattr(module, "conv1d_state"):
                module.conv1d_state, module.rg_lru.recurrent_states = (s.clone() for s in states[layer])
            else:
                for name, held in states[layer].items():
                    setattr(self.cache.layers[layer], name, copy.deepcopy(held))

    def again(self, first: int) -> None:
        """Each recurrent layer alone is given again what it was given from position `first` on."""
        with torch.inference_mode():
            for layer, module in self.recurrent.items():
                for args, named in self.given[layer][first:]:
                    module(*args, **named)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return loaded(request.param)


def test_a_step_that_is_left_out_of_the_state_is_transformers_state_put_back_behind_it(model):
    slow = TokenByToken(model)
    slow.run(IDS[:START])
    before = slow.states()
    slow.run(IDS[START:END])
    slow.put(before)
    slow.run(IDS[END:])
    (hidden,) = Reference(model, IDS, 0).run([Continuation(IDS, END, END, (StateKnockout(START, END, END),))])
    assert relative(model.unembed(hidden), torch.stack(slow.logits[END:])) < LOOSE
    (unchanged,) = Reference(model, IDS, 0).run([Continuation(IDS, END, END)])
    assert relative(model.unembed(unchanged), torch.stack(slow.logits[END:])) > 10 * LOOSE


def test_a_step_left_out_for_the_last_rows_alone_leaves_what_later_steps_wrote(model):
    slow = TokenByToken(model)
    slow.run(IDS[:START])
    before = slow.states()
    slow.run(IDS[START:ROW])
    slow.put(before)
    slow.again(END)
    slow.run(IDS[ROW:])
    edits = (StateKnockout(START, END, ROW),)
    (hidden,) = Reference(model, IDS, 0).run([Continuation(IDS, ROW, ROW, edits)])
    assert relative(model.unembed(hidden), torch.stack(slow.logits[ROW:])) < LOOSE
    (crossed,) = Reference(model, IDS, 0).run([Continuation(IDS, 3, 3, edits)])
    assert relative(model.unembed(crossed), torch.stack(slow.logits[3:])) < LOOSE


def test_both_kinds_of_memory_are_without_the_step(model):
    if not model.facts.attending(range(model.facts.n_layers)):
        pytest.skip("no layer with attention")
    slow = TokenByToken(model)
    slow.run(IDS[:START])
    before = slow.states()
    slow.run(IDS[START:END])
    slow.put(before)
    slow.run(IDS[END:], hidden=[(START, END)])
    edits = (Knockout(START, END, END), StateKnockout(START, END, END))
    (hidden,) = Reference(model, IDS, 0).run([Continuation(IDS, END, END, edits)])
    assert relative(model.unembed(hidden), torch.stack(slow.logits[END:])) < LOOSE
    for alone in edits:
        (seen,) = Reference(model, IDS, 0).run([Continuation(IDS, END, END, (alone,))])
        assert relative(seen, hidden) > 10 * LOOSE


@pytest.mark.parametrize("family", ["qwen3_next", "mamba", "recurrent_gemma"])
def test_a_state_knockout_acts_on_tokens_that_are_generated_from_the_row_on_that_it_names(family):
    model = loaded(family)
    n_prompt = len(prompt_of_tokens(IDS[:12], model.codec).token_ids)
    for rows_from in (n_prompt - 2, n_prompt + 3):
        prompt = prompt_of_tokens(IDS[:12], model.codec)
        job = Job(prompt, "t", edits=(StateKnockout(3, 7, rows_from),))
        spec = CaptureSpec(frozenset({"log_probs"}))
        (outcome,) = run_batch(model, model.codec, [job], spec, Generation(8))
        assert isinstance(outcome, Outcome) and outcome.n_new > 4
        ids, slow = outcome.token_ids, TokenByToken(model)
        slow.run(ids[:3])
        before = slow.states()
        slow.run(ids[3:rows_from])
        slow.put(before)
        slow.again(7)
        slow.run(ids[rows_from:-1])
        log_p = torch.stack(slow.logits).float().log_softmax(-1)
        at = torch.arange(prompt.n_prompt - 1, len(ids) - 1)
        expected = log_p[at, torch.tensor(ids)[at + 1]]
        assert relative(outcome.tensors["log_probs"], expected) < LOOSE


def test_states_where_steps_end_and_outputs_rebuilt_from_them_are_those_of_transformers(model):
    slow = TokenByToken(model)
    slow.run(IDS[:START])
    states = [slow.states()]
    slow.run(IDS[START:END])
    states.append(slow.states())
    slow.run(IDS[END:])
    outputs = {layer: torch.cat(rows, 1)[0] for layer, rows in slow.outputs.items()}
    stretches = {(s.layer, s.start): s for s in state_stretches(model, IDS, [0, START, END, len(IDS)])}
    assert {layer for layer, _ in stretches} == set(model.recurrent)
    for layer in model.recurrent:
        before, behind = (_recurrence(of[layer]) for of in states)
        stretch = stretches[layer, START]
        assert stretch.norm == pytest.approx(float(behind.norm()), rel=LOOSE)
        assert stretch.change == pytest.approx(float((behind - before).norm()), rel=10 * LOOSE)
        assert stretch.largest == pytest.approx(float(outputs[layer].abs().max()), rel=LOOSE)
        for start in (0, START, END):
            assert stretches[layer, start].error / stretch.largest < 1e-5


def _recurrence(state: Any) -> torch.Tensor:
    if isinstance(state, tuple):
        return state[1].flatten()
    kept = [tensor for tensor in state["recurrent_states"].values() if tensor is not None]
    kept = kept or [tensor for tensor in state["conv_states"].values() if tensor is not None]
    return torch.cat([tensor.flatten() for tensor in kept])


def test_a_batch_is_counted_with_the_states_that_its_cache_holds(model):
    texts = ["A prompt of some length, and then " + end for end in ("one.", "two more.", "it.")]
    jobs = [Job(prompt_of(text, model.codec, 8), str(n)) for n, text in enumerate(texts)]
    spec, itemsize = CaptureSpec(frozenset({"resid_post"})), model.dtype.itemsize
    plan_shared(jobs)
    capturer = Capturer(model, model.codec, spec, Generation(4))
    _, cache = capturer.prefill(jobs)
    with model.recording(None):
        lengths = [len(job.prompt.token_ids) for job in jobs]
        model.step([5, 6, 7], cache, lengths)
    states = {
        id(point.state): point.state.nbytes
        for by_row in cache.points.values()
        for points in by_row.values()
        for point in points.values()
    }
    of_all = state_bytes(model.facts)
    assert of_all == sum(layer.state_bytes for layer in model.facts.layers) > 0
    prefixes = len({end for job in jobs for end in job.prefix_ends})
    assert sum(states.values()) <= (STATES_PER_SEQUENCE * len(jobs) + prefixes) * of_all
    without = replace(
        model.facts,
        layers=tuple(replace(layer, state_bytes=min(layer.state_bytes, 1)) for layer in model.facts.layers),
    )
    counted = batch_bytes(jobs, model.facts, spec, itemsize, 4) - batch_bytes(
        jobs, without, spec, itemsize, 4
    )
    assert counted >= sum(states.values()) - 100


def test_a_step_takes_the_state_that_the_step_before_left_and_none_is_kept_of_a_state_made_again(
    model, monkeypatch
):
    cache = KVCache(1, 40)
    with model.recording(None):
        model.forward([Piece(0, 0, IDS)], cache)
        model.step([5], cache, [30])
        forks: list[State] = []
        monkeypatch.setattr(State, "fork", lambda state, fork=State.fork: forks.append(state) or fork(state))
        model.step([6], cache, [31])
        assert not forks
        monkeypatch.undo()
        model.forward([Piece(0, 20, IDS[20:30])], cache)
    lasting = {tuple(points) for by_row in cache.points.values() for points in by_row.values()}
    assert lasting == {(30,)}


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_a_model_whose_residual_stream_stays_in_float32_is_captured_in_16_bits(family):
    for dtype in HALVES:
        assert rounded(family, dtype) in ("", "(resid_post)")


PLAIN, FACT, ASKED, ANSWER = 5, 6, 7, 8
N_VOCABULARY, WIDTH = 300, 16
GAIN, GATE, STEP, LOUD, CONSTANT = 2.0, 3.0, 0.5, 6.0, 3.0


def rememberer() -> CapturingModel:
    """A Mamba of one layer that never forgets: token FACT adds to its state, token ASKED reads it and says ANSWER. Token and
    channel 0 are a constant; each token's embedding is as long as any other's."""
    config = MambaConfig(
        vocab_size=N_VOCABULARY, hidden_size=WIDTH, state_size=1, num_hidden_layers=1, expand=1, conv_kernel=2,
        time_step_rank=1, use_conv_bias=False, tie_word_embeddings=False, residual_in_fp32=False, layer_norm_epsilon=0.0,
    )  # fmt: skip
    hf = MambaForCausalLM(config).eval()
    mixer = hf.backbone.layers[0].mixer
    scale = WIDTH**0.5 / (CONSTANT**2 + 1) ** 0.5
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
        for norm in (hf.backbone.layers[0].norm, hf.backbone.norm_f):
            norm.weight.fill_(1)
        embedding = hf.backbone.embeddings.weight
        embedding[:, 0], embedding[:, 4] = CONSTANT, 1
        for token, feature in ((FACT, 1), (ASKED, 3)):
            embedding[token, 4], embedding[token, feature] = 0, 1
        mixer.in_proj.weight[0, 0] = 1 / (CONSTANT * scale)  # silu(1) in channel 0
        mixer.in_proj.weight[1, 1] = GAIN / scale
        mixer.in_proj.weight[WIDTH + 1, 3] = GATE / scale
        mixer.conv1d.weight[:, 0, -1] = 1
        silu_1 = torch.nn.functional.silu(torch.ones(()))
        mixer.x_proj.weight[1:, 0] = 1 / silu_1  # B = C = 1
        mixer.dt_proj.bias.fill_(math.log(math.expm1(STEP)))
        mixer.A_log.fill_(-40)
        mixer.out_proj.weight[5, 1] = 1
        hf.lm_head.weight[ANSWER, 5] = LOUD
    source = Source("rememberer", "random", "rememberer")
    return CapturingModel(hf, byte_tokenizer(N_VOCABULARY), source, {"resolved": "rememberer"})


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def test_the_step_that_wrote_the_answer_into_a_state_that_never_forgets_is_the_one_whose_knockout_takes_it_away():
    model = rememberer()
    ids = [PLAIN] * 40
    ids[24], ids[36], ids[37] = FACT, ASKED, ANSWER
    bounds = {"question": (2, 8), "step:1": (12, 20), "step:2": (20, 27), "step:3": (27, 33)}
    chain = Chain(record(ids, bounds | {"answer": (37, 39)}))
    rows, _ = chain_rows(chain, ["state_knockouts"], model)
    written = STEP * silu(GAIN) * silu(GATE)
    length = ((CONSTANT**2 + 1 + written**2) / WIDTH) ** 0.5
    logit = LOUD * written / length
    uniform = -math.log(N_VOCABULARY)
    known = logit - math.log(math.exp(logit) + N_VOCABULARY - 1)
    p = math.exp(known)
    kl = p * (known - uniform) + (1 - p) * (math.log((1 - p) / (N_VOCABULARY - 1)) - uniform)
    of_answer = {(row["experiment"], row["source"]): row for row in rows if row["reader"] == "answer"}
    assert of_answer["base", None]["log_prob"] == pytest.approx(known + uniform, abs=1e-5)
    for kind in ("state_total", "state_direct"):
        row = of_answer[kind, "step:2"]
        assert row["log_prob"] == pytest.approx(2 * uniform, abs=1e-5)
        assert row["kl"] * row["n_rows"] == pytest.approx(kl, abs=1e-5)
        for source in ("question", "step:1", "step:3"):
            assert of_answer[kind, source]["kl"] < 1e-9
            assert of_answer[kind, source]["log_prob"] == pytest.approx(known + uniform, abs=1e-5)
    # Spans of the sources' lengths: the control that covers the fact takes the answer away as well, others do not.
    for (kind, source), row in of_answer.items():
        if kind.startswith("random_"):
            hit = row["start"] <= 24 < row["start"] + row["n_tokens"]
            expected = 2 * uniform if hit else known + uniform
            assert row["log_prob"] == pytest.approx(expected, abs=1e-5), (kind, source)


def test_what_a_step_changes_in_the_planted_state_is_what_its_tokens_add_to_it():
    model = rememberer()
    ids = [PLAIN] * 40
    ids[24], ids[36], ids[37] = FACT, ASKED, ANSWER
    chain = Chain(record(ids, {"step:1": (12, 20), "step:2": (20, 27), "answer": (37, 39)}))
    values = {(row["experiment"], row["reader"]): row["value"] for row in state_rows(chain, model)}
    assert values["state_norm", "question"] == pytest.approx(12 * STEP * silu(1.0), rel=1e-5)
    assert values["state_change", "step:1"] == pytest.approx(8 / 12, rel=1e-5)
    added = math.hypot(7 * silu(1.0), silu(GAIN))
    assert values["state_change", "step:2"] == pytest.approx(added / (20 * silu(1.0)), rel=1e-5)
    assert values["state_error", "step:2"] < 1e-6


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measures of two chains of a hybrid, with all that `analyze` makes of itself."""
    model = loaded("qwen3_next", max_position_embeddings=4096)
    steps = ["Two and two is 4.", "4 and 1 is 5.", "So it is 5."]
    tasks = [
        {"id": name, "kind": "cot", "question": f"{name}: 2 + 2 + 1?", "answer": "5", "steps": steps}
        for name in "ab"
    ]
    run = probe.run(
        tasks, model=model, out=tmp_path_factory.mktemp("hybrid") / "run", reasoning="reference", max_new_tokens=8,
        analyze=False,
    )  # fmt: skip
    probe.analyze(run, model=model)
    return run, run.table("measures"), model


def test_states_that_are_measured_once_more_leave_the_rows_of_the_unchanged_reasoning(measured):
    run, _, model = measured
    before = run.table("reasoning")
    intervene(run, ["recurrent_memory"], model=model)
    after = probe.open(run.path).table("reasoning")
    assert (after.experiment == "base").sum() == (before.experiment == "base").sum() > 0
    assert len(after) == len(before)


@pytest.mark.parametrize("name", ["knockouts", "state_knockouts", "joint_knockouts", "recurrent_memory"])
def test_a_dry_run_counts_the_tokens_of_every_experiment_with_states(measured, name):
    told = cot_cost(SimpleNamespace(run=measured[0]), [name], again=True, effort=Effort())
    assert told["tokens"] > 0


def test_a_hybrid_has_measures_of_both_memories_each_apart(measured):
    run, frame, _ = measured
    rows = {name: of_name for name, of_name in frame.groupby("name")}
    layers = run.run["model"]["layers"]
    states = {number: layer["state_bytes"] for number, layer in enumerate(layers) if layer["state_bytes"]}
    assert list(states) == [0, 2]
    sizes = rows["state_bytes"]
    assert dict(zip(sizes.layer.dropna().astype(int), sizes.value, strict=False)) == states
    assert sizes[sizes.layer.isna()].value.tolist() == [sum(states.values())]
    assert set(rows["state_reconstruction_error"].layer) == {0, 2}
    assert set(rows["reconstruction_error"].layer) == {1, 3}
    assert rows["state_reconstruction_error"].value.max() < 1e-5
    changed = rows["state_change"]
    assert set(changed[changed.task_id == "a"].step.dropna()) == {1, 2, 3}
    for name in STATES:
        assert {axis for axis in AXES if rows[name][axis].notna().any()} == {*REGISTRY["cot", name].columns}
    kinds = {"total", "direct", "state_total", "state_direct", "both_total", "both_direct", "deleted"}
    assert set(rows["knockout_kl"].experiment) == kinds
    assert set(rows["answer_change"].control.dropna()) == {"random"}
    assert set(rows["passed_on"].experiment) == {"total", "state_total", "both_total"}
    assert probe.experiments.intervene(run, model=None) == []
