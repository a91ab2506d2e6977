"""Direct logit attribution: against sums over plain hooks on transformers in float64, and a planted circuit."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import probe
from probe.analyzers.rows import to_table
from probe.analyzers.tool.attribution import measures
from probe.errors import ModelUnavailable
from probe.experiments import Effort, intervene
from probe.experiments.tool import attribution
from probe.experiments.tool.attribution import NameWriter, name_job, sources
from probe.harness.runner import SilentProgress
from probe.model.scores import Writes
from probe.prompts import Codec, Segment, Span, prompt_of
from probe.prompts.labels import BOS, USER, tool_label
from probe.report.data import collect
from probe.runs import Run
from tests.conftest import tiny
from tests.planted import copier
from tests.slow import slow_attention
from tests.test_cot_lens import ATTENTION, norm_of

NAMES = (" mailer", " mail box", "calc")
EXACT = 1e-4


def prompt(model, text="send it", names=NAMES):
    from probe.prompts import Candidate

    codec = Codec(model.tokenizer, model.facts.n_ctx)
    listed = [Segment(f"{name}: {'x' * 9}\n", tool_label(name)) for name in names]
    asked = prompt_of([Segment("You\n"), *listed, Segment(text, USER), Segment(" use")], codec, 16)
    asked.candidates = tuple(Candidate(name, tuple(codec.encode(name + '"'))) for name in names)
    return codec, asked


def parts_of(model, codec, jobs):
    ended = {}
    for batch, parts, _ in NameWriter(model, codec).parts(jobs):
        ended |= dict(zip(batch, parts, strict=True))
    return [ended[index] for index in range(len(jobs))]


class Plain:
    """One plain forward of a float64 copy, by hooks: what is added to the residual stream, and by which read."""

    def __init__(self, hf, ids):
        self.hf = hf
        self.blocks = list(hf.base_model.layers if hasattr(hf.base_model, "layers") else hf.base_model.h)
        self.attention, self.z, self.before, self.after = [], [], [], []
        hooks = []
        for block in self.blocks:
            module = next(getattr(block, name) for name in ATTENTION if hasattr(block, name))
            writer = block.post_attention_layernorm if self.sandwiched(block) else module
            hooks.append(writer.register_forward_hook(lambda m, i, out: self.attention.append(self.of(out))))
            hooks.append(
                self.out_projection(module).register_forward_pre_hook(lambda m, i: self.z.append(i[0][0]))
            )
            hooks.append(block.register_forward_hook(self.see, with_kwargs=True))
        with torch.no_grad():
            out = hf(torch.tensor([ids]), past_key_values=DynamicCache())
        for hook in hooks:
            hook.remove()
        self.logits = out.logits[0].double()
        self.values = [out.past_key_values.layers[layer].values[0] for layer in range(len(self.blocks))]

    def see(self, _module, inputs, named, out):
        self.before.append((inputs[0] if inputs else named["hidden_states"])[0])
        self.after.append(self.of(out))

    @staticmethod
    def of(out):
        return (out[0] if isinstance(out, tuple) else out)[0]

    @staticmethod
    def sandwiched(block):
        return hasattr(block, "pre_feedforward_layernorm")

    @staticmethod
    def out_projection(module):
        return next(getattr(module, name) for name in ("o_proj", "c_proj", "dense") if hasattr(module, name))

    def w_o(self, layer):
        """[head · d_head, d_model], and the bias"""
        block = self.blocks[layer]
        module = next(getattr(block, name) for name in ATTENTION if hasattr(block, name))
        projection = self.out_projection(module)
        weight = projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T
        return weight.double(), projection.bias

    def directions(self, rows, tokens):
        """[row, d_model] before the norm, and what the norm's and the unembedding's biases add: of log P + entropy."""
        logits = self.logits[rows]
        p = logits.softmax(-1)
        weights = torch.nn.functional.one_hot(torch.tensor(tokens), logits.shape[1]) - p
        if cap := getattr(self.hf.config, "final_logit_softcapping", None):
            weights = weights * logits / (cap * torch.atanh(logits / cap))
        head = self.hf.get_output_embeddings()
        asked = weights @ head.weight.double()
        weight, bias, eps, centred = norm_of(self.hf)
        x = self.after[-1][rows].double()
        x = x - x.mean(-1, keepdim=True) if centred else x
        direction = asked * weight * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        direction = direction - direction.mean(-1, keepdim=True) if centred else direction
        unembedding = weights @ head.bias.double() if head.bias is not None else torch.zeros(len(rows))
        return direction, asked @ bias, unembedding, -(p * p.log()).sum(-1)


@pytest.fixture(scope="module")
def compared(tiny_model):
    """The parts of a name, and the plain forward that they are compared with."""
    codec, asked = prompt(tiny_model)
    job = name_job(asked, 1, "t")
    (parts,) = parts_of(tiny_model, codec, [job])
    hf = copy.deepcopy(tiny_model.hf).double()
    return asked, job, parts, Plain(hf, job.prompt.token_ids)


def test_the_parts_are_those_of_plain_hooks_and_sum_to_the_log_probability(compared):
    asked, _, parts, plain = compared
    tokens = list(asked.candidates[1].token_ids)
    rows = list(range(asked.n_prompt - 1, asked.n_prompt - 1 + len(tokens)))
    direction, norm_bias, unembedding, entropy = plain.directions(rows, tokens)

    def along(written):
        return float((written[rows].double() * direction).sum())

    log_prob = float(plain.logits[rows].log_softmax(-1)[range(len(rows)), tokens].sum())
    assert parts.log_prob == pytest.approx(log_prob, abs=EXACT)
    assert abs(parts.remainder) < EXACT
    assert parts.scalars["embedding"] == pytest.approx(along(plain.before[0]), abs=EXACT)
    assert parts.scalars["final_norm_bias"] == pytest.approx(float(norm_bias.sum()), abs=EXACT)
    assert parts.scalars["unembedding_bias"] == pytest.approx(float(unembedding.sum()), abs=EXACT)
    assert parts.scalars["normalizer"] == pytest.approx(-float(entropy.sum()), abs=EXACT)
    for layer in range(len(plain.blocks)):
        attention = along(plain.attention[layer])
        assert parts.attention[layer].sum() + parts.attention_bias[layer] == pytest.approx(
            attention, abs=EXACT
        )
        added = along(plain.after[layer] - plain.before[layer])
        assert parts.mlp[layer] == pytest.approx(added - attention, abs=EXACT)
    assert np.abs(parts.mlp).max() > 10 * EXACT and np.abs(parts.attention).max() > 10 * EXACT


def test_a_heads_part_is_a_slow_sum_over_the_positions_that_it_reads(compared):
    asked, job, parts, plain = compared
    tokens = list(asked.candidates[1].token_ids)
    rows = list(range(asked.n_prompt - 1, asked.n_prompt - 1 + len(tokens)))
    direction = plain.directions(rows, tokens)[0]
    alpha = slow_attention(plain.hf, job.prompt.token_ids).double()
    by_position = torch.zeros(len(job.prompt.token_ids), dtype=torch.float64)
    spans = [*asked.spans, Span("name", asked.n_prompt, len(job.prompt.token_ids))]
    for layer in range(len(plain.blocks)):
        w_o, bias = plain.w_o(layer)
        written = plain.z[layer] @ w_o + (0 if bias is None else bias)
        block = plain.blocks[layer]
        n_heads, d_head = alpha.shape[1], plain.values[layer].shape[-1]
        for head in range(n_heads):
            value = plain.values[layer][head // (n_heads // len(plain.values[layer]))]
            vectors = value @ w_o[head * d_head : (head + 1) * d_head]
            for number, row in enumerate(rows):
                reads = alpha[layer, head, row][:, None] * vectors
                if plain.sandwiched(block):
                    norm = block.post_attention_layernorm
                    reads = reads * (written[row].square().mean() + norm.eps).rsqrt() * (1 + norm.weight)
                by_position += reads @ direction[number]
                spans_of_row = [float((reads[s.start : s.end] @ direction[number]).sum()) for s in spans]
                parts.attention[layer, head] -= spans_of_row
    assert np.abs(parts.attention).max() < EXACT
    assert np.abs(parts.positions - by_position[: asked.n_prompt].numpy()).max() < EXACT


def test_names_together_and_prefixes_shared_give_what_each_gives_alone():
    model = tiny("tiny-mistral")
    codec, asked = prompt(model)
    _, other = prompt(model, "call it a day")
    jobs = [name_job(p, n, "t") for p in (asked, other) for n in range(3)]
    together = parts_of(model, codec, jobs)
    assert any(job.shared for job in jobs)
    for job, parts in zip(jobs, together, strict=True):
        job.shared, job.prefix_ends = 0, ()
        (alone,) = parts_of(model, codec, [job])
        for name in ("attention", "mlp", "positions"):
            assert np.abs(getattr(parts, name) - getattr(alone, name)).max() < EXACT


def test_sources_are_what_a_span_is_to_the_pair():
    _, asked = prompt(tiny("tiny-llama"))
    of_span = dict(zip((s.label for s in asked.spans), sources(asked, " mailer", "calc"), strict=False))
    assert [of_span[tool_label(name)] for name in NAMES] == ["tool", "tools", "other_tool"]
    assert of_span[BOS] == BOS and of_span[USER] == USER
    asked.spans += [Span(USER, asked.n_prompt, asked.n_prompt + 1)]
    assert [source for source in sources(asked, None, None) if source in (USER, "earlier")] == [
        "earlier",
        USER,
    ]


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    path = tmp_path_factory.mktemp("attributed")
    planted = copier(path / "model")
    tasks = planted.write(path / "tasks.jsonl")
    run = probe.run(
        tasks, model=str(planted.path), out=path / "run", analyze=False, limit=8, max_new_tokens=1
    )
    assert intervene(run, ["attribution", "mask_decision"]) == ["mask_decision", "attribution"]
    run = Run(run.path)
    return planted, run, to_table(measures(run))


def rows_of(table, name, **where):
    frame = table.to_pandas()
    frame = frame[(frame.name == name) & (frame.task_id == "") & (frame.role == "first_two")]
    for axis, label in where.items():
        frame = frame[frame[axis] == label]
    return frame


def test_the_head_that_copies_carries_all_of_the_choice_and_its_decoys_none(copied):
    planted, _, run = copied
    log_odds = rows_of(run, "attribution_log_odds").value.item()
    assert log_odds == pytest.approx(planted.gain, abs=1e-2)
    heads = rows_of(run, "attribution_head").set_index(["layer", "head"]).value
    assert heads.idxmax() == planted.real_head
    assert heads[planted.real_head] == pytest.approx(log_odds, abs=1e-2)
    assert heads.drop(planted.real_head).abs().max() < 1e-2
    reads = rows_of(run, "attribution_span")
    reads = reads[reads.layer.isna()].set_index("span").value
    assert reads["tool"] == pytest.approx(log_odds, abs=1e-2)
    assert reads.drop("tool").abs().max() < 1e-2
    assert rows_of(run, "attribution_remainder").value.item() < EXACT


def test_what_a_mask_takes_away_stands_beside_what_the_description_writes(copied):
    planted, run, table = copied
    frame = table.to_pandas()
    falls = frame[
        (frame.name == "attribution_knockout") & (frame.span == "tool") & (frame.role == "first_two")
    ]
    lines = {line["id"]: line for line in planted.tasks}
    tested = 0
    for row in falls[falls.task_id != ""].itertuples():
        task = lines[row.task_id]
        pair = run.table("attribution").query("task_id == @row.task_id and part == 'log_odds'").iloc[0]
        shown = [tool["name"] for tool in task["tools"]]
        before, after = (
            planted.log_probs(planted.mass(task, masked=masked), shown) for masked in ((), (pair.tool,))
        )
        other = pair.other if isinstance(pair.other, str) else None
        expected = (before[pair.tool] - before[other]) - (after[pair.tool] - after[other])
        assert row.value == pytest.approx(expected, abs=1e-2)
        tested += 1
    assert tested == 8


def test_the_stored_summands_of_a_pair_give_its_log_odds_and_nothing_is_missing(copied):
    _, run, _ = copied
    table = run.table("attribution")
    assert attribution.missing(run, "attribution", again=False) == []
    sums = table[~table.part.isin(["log_odds", "span", "word"])].groupby(["task_id", "pair"]).value.sum()
    wholes = table[table.part == "log_odds"].set_index(["task_id", "pair"]).value
    assert (sums - wholes).abs().max() < 1e-9


def test_a_score_is_the_sum_of_what_query_and_key_read(tiny_model):
    _, asked = prompt(tiny_model)
    ids, layer = asked.token_ids[: asked.n_prompt], tiny_model.facts.n_layers - 1
    positions = [3, 9, len(ids) - 1]
    writes = Writes(tiny_model, ids, {layer})
    queries, keys = writes.read(layer, positions)
    with torch.no_grad():
        out = tiny_model.hf(torch.tensor([ids]), past_key_values=DynamicCache())
    expected = out.past_key_values.layers[layer].keys[0][:, positions]
    assert float((keys.sum(0) - expected).abs().max() / expected.abs().max()) < EXACT
    facts = tiny_model.facts.attention[layer]
    group = tiny_model.facts.n_heads // tiny_model.facts.n_kv_heads
    scores = (
        torch.einsum("hd,hjd->hj", queries.sum(0)[:, -1], keys.sum(0).repeat_interleave(group, 0))
        * facts.scale
    )
    if facts.softcap is not None:
        scores = facts.softcap * torch.tanh(scores / facts.softcap)
    alpha = slow_attention(tiny_model.hf, ids)[layer, :, -1, positions]
    if facts.window is None or facts.window > len(ids):
        ratio = alpha.log() - alpha[:, -1:].log()
        assert float((ratio - (scores - scores[:, -1:])).abs().max()) < 1e-3
    # A part alone, moved: what a query makes of it is linear with norms held.
    name = writes.names.index(("mlp", 0))
    assert float(queries[name].abs().max()) > 1e-4 and len(queries) == 2 * layer + 2


def test_the_scores_of_the_copying_head_are_split_on_both_sides(copied):
    planted, run, _ = copied
    intervene(run, ["head_scores"])
    stored = Run(run.path).table("attribution").query("experiment == 'head_scores'")
    assert planted.real_head in set(zip(stored.layer, stored["head"], strict=True))
    place = ["task_id", "layer", "head", "source"]
    wholes = stored[stored.part == "score"].set_index(place).value
    for side in ("query", "key"):
        sums = stored[stored.part == side].groupby(place).value.sum()
        assert (sums - wholes).abs().max() < 1e-6 * wholes.abs().max(), side
    rows = list(measures(Run(run.path)))
    names = {row.name for row in rows}
    assert {"attribution_score", "attribution_score_part"} <= names


def test_a_norm_that_is_not_known_costs_this_experiment_alone(copied, monkeypatch):
    _, run, _ = copied

    def unknown(*_args):
        raise ModelUnavailable("a norm that is not known")

    lines: list[str] = []
    progress = SilentProgress()
    monkeypatch.setattr(progress, "log", lines.append)
    monkeypatch.setattr(attribution, "_make", unknown)
    monkeypatch.setattr(attribution, "missing", lambda *_args, **_more: ["a task"])
    opened: Any = SimpleNamespace(run=run)
    options: dict[str, Any] = {"effort": Effort(), "progress": progress}
    assert attribution.make(opened, ["attribution"], again=False, **options) == []
    assert lines[-1] == "no attribution: a norm that is not known"
    with pytest.raises(ModelUnavailable):
        attribution.make(opened, ["attribution"], again=True, **options)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_heads_write_what_transformer_lens_says(name):
    """Names of one token share their only row, so that the difference is what TransformerLens calls a logit difference."""
    from probe.prompts import Candidate

    model = tiny(name)
    codec, asked = prompt(model)
    good, bad = 100, 37
    asked.candidates = (Candidate("good", (good,)), Candidate("bad", (bad,)))
    first, second = parts_of(model, codec, [name_job(asked, 0, "t"), name_job(asked, 1, "t")])
    parts = first.less(second)
    assert parts.scalars["normalizer"] == pytest.approx(0, abs=1e-6)
    _, cache = model.bridge.run_with_cache(torch.tensor([asked.token_ids]))
    heads: Any = cache.stack_head_results(layer=-1, pos_slice=-1)
    weight, *_ = norm_of(model.hf)  # which TransformerLens takes to be folded into the unembedding
    unembed = model.hf.get_output_embeddings().weight
    normed = cache.apply_ln_to_stack(heads, layer=-1, pos_slice=-1).flatten(0, -2)
    written = normed.double() * weight @ (unembed[good] - unembed[bad]).double()
    assert parts.attention.sum(2).ravel() == pytest.approx(written.tolist(), abs=EXACT)
    assert float(written.abs().max()) > 1e-2


def test_the_card_has_the_head_and_the_source_first_with_the_mask_beside_it(copied):
    planted, run, table = copied
    run.write_table("measures", table)
    (pair,) = (
        entry for entry in collect(Run(run.path))["cards"]["attribution"] if entry["pair"] == "first_two"
    )
    head, source = pair["heads"][0], pair["sources"][0]
    assert (head["layer"], head["head"]) == planted.real_head
    assert tuple(head["reads"][0]) == ("tool", pytest.approx(planted.gain, abs=1e-2))
    assert source["source"] == "tool" and source["knockout"]["value"] >= source["effect"]["value"] - 1e-2
    assert len(pair["layers"]) == 2 and {row["part"] for row in pair["parts"]} > {
        "attention",
        "mlp",
        "remainder",
    }
