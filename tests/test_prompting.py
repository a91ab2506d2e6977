"""Prompting as a bias: planted models whose prompts do what is known, and the patches redone with plain hooks."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.special import rel_entr, softmax
from scipy.stats import rankdata

import probe
from probe.analyzers import analyze
from probe.analyzers.prompting import bias, manifold, recovery, spread
from probe.analyzers.prompting.bias import explained
from probe.errors import BadInput
from probe.experiments import intervene, read_by
from probe.experiments.loaded_run import LoadedRun
from probe.experiments.prompting import functions
from probe.experiments.prompting.patches import PromptingTasks
from probe.harness.runner import SilentProgress
from probe.runs.records import PromptingRecord, VariantPassage
from probe.runs.views.prompting import Item, items_of
from probe.tasks import read_tasks
from tests import test_docs
from tests.circuit import Circuit
from tests.conftest import tiny
from tests.defined import check_defined

WORDS = tuple(["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"])
ANSWERS = tuple(["red", "tan", "sky", "jet"])
MARKS = tuple(f"mark{i}" for i in range(len(WORDS)))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """One head reads a mark in the prompt and copies what it holds; the answer's logits are those of the input word
    plus what was copied. `tone` holds the same for all inputs; MARKS are one for each input, and differ."""
    folder = tmp_path_factory.mktemp("prompting")
    draw = random.Random(0)
    embed = {word: {f"word:{word}": 1.0} for word in WORDS}
    embed |= {mark: {f"held:{mark}": 1.0, "is_mark": 1.0} for mark in (*MARKS, "tone")}
    embed |= {"<|bos|>": {"is_bos": 1.0}}
    held = [f"got:{mark}" for mark in (*MARKS, "tone")]
    texts = [" ".join((*WORDS, *ANSWERS, *MARKS, "tone")), "\n"]
    circuit = Circuit(embed, held, texts, n_heads=4, d_head=32)
    copies = [(f"held:{mark}", f"got:{mark}", 1.0) for mark in (*MARKS, "tone")]
    circuit.head(0, 0, {"1": {"is_mark": 80.0, "is_bos": 40.0}}, copies)
    for answer in ANSWERS:
        terms = {f"word:{word}": draw.uniform(-2, 2) for word in WORDS}
        terms |= {name: draw.uniform(-3, 3) for name in held}
        circuit.logit(f" {answer}", terms)
    circuit.save(folder / "model")
    lines = [
        {
            "id": word,
            "kind": "prompting",
            "input": word,
            "choices": [f" {answer}" for answer in ANSWERS],
            "target": f" {ANSWERS[index % 4]}",
            "variants": [{"name": "tone", "system": "tone"}, {"name": "odd", "system": MARKS[index]}],
            "metadata": {"family": "one"},
        }
        for index, word in enumerate(WORDS)
    ]
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = probe.load(str(folder / "model"))
    run = probe.run(path, model=model, out=folder / "run", analyze=False)
    intervene(run, ["lens", "patch", "task_vector", "tuned_lens"], model=model)
    analyze(run)
    return run, model


@pytest.fixture(scope="module")
def whole_run(planted):
    measures = planted[0].measures()
    return measures[(measures.analyzer == "prompting") & (measures.task_id == "")]


def of(measures, name: str, **where):
    rows = measures[measures.name == name]
    for column, value in where.items():
        rows = rows[rows[column].isna()] if value is None else rows[rows[column] == value]
    return rows


def test_one_logit_vector_explains_the_shift_where_the_prompt_adds_one(whole_run):
    (value,) = of(whole_run, "bias_r2", variant="tone", family=None).value
    assert value == pytest.approx(1.0, abs=1e-6)


def test_no_vector_explains_a_shift_that_is_each_inputs_own(whole_run):
    row = of(whole_run, "bias_r2", variant="odd", family=None).iloc[0]
    assert row.high < 0.5
    assert row.value < 0.2


def test_the_vector_says_the_tokens_whose_logits_the_prompt_raises(planted, whole_run):
    run, model = planted
    tone, base = (
        np.mean([run[word][f"{variant}/logits"][0].numpy() for word in WORDS], axis=0)
        for variant in ("tone", "base")
    )
    best = model.tokenizer.decode([int((tone - base).argmax())])
    first = of(whole_run, "bias_promoted", variant="tone", rank=1).iloc[0]
    assert first.token == best
    # Also of a run alone, without any experiment.
    rows = list(bias.measures(items_of(run), pd.DataFrame(), run.run["token_texts"]))
    listed = [defined.name for defined in bias.ENDS.values()]
    alone = {row.at("token") for row in rows if row.name in listed}
    assert alone == set(whole_run[whole_run.name.isin(listed)].token)


def test_the_mean_difference_recovers_the_whole_shift_where_the_prompt_adds_one_vector(whole_run):
    for layer in (0, 1):
        (value,) = of(
            whole_run, "patch_recovery", variant="tone", control=None, layer=layer, family=None
        ).value
        assert value == pytest.approx(1.0, abs=1e-4)
        (back,) = of(whole_run, "patch_removal", variant="tone", layer=layer, family=None).value
        assert back == pytest.approx(1.0, abs=1e-4)
        (wrong,) = of(
            whole_run, "patch_recovery", variant="tone", control="random", layer=layer, family=None
        ).value
        assert wrong < 0.7


def test_no_mean_difference_recovers_a_shift_that_is_each_inputs_own(whole_run):
    for layer in (0, 1):
        row = of(whole_run, "patch_recovery", variant="odd", control=None, layer=layer, family=None).iloc[0]
        assert row.value < 0.5


def test_differences_point_the_same_way_only_where_the_prompt_adds_one_vector(whole_run):
    (same,) = of(whole_run, "pattern_cosine", variant="tone", control=None, layer=1, family=None).value
    (other,) = of(whole_run, "pattern_cosine", variant="odd", control=None, layer=1, family=None).value
    assert same == pytest.approx(1.0, abs=1e-4)
    assert other < 0.9


def test_at_the_last_layer_the_lens_shows_the_shift_itself(whole_run):
    for variant in ("tone", "odd"):
        (lens,) = of(whole_run, "lens_kl", variant=variant, layer=1).value
        (shift,) = of(whole_run, "kl", variant=variant, layer=None).value
        assert lens == pytest.approx(shift, rel=1e-4)


# -- the patches redone --------------------------------------------------------------------------------------------


def test_patches_equal_plain_forwards_of_transformers_with_a_hook(mechanism, tmp_path):
    """Every architecture: the bare prompt run whole, the last position of one block's output replaced."""
    path = tmp_path / "tasks.jsonl"
    lines = [
        {
            "id": f"t{n}",
            "kind": "prompting",
            "input": f"{word} ->",
            "choices": [" one", " two"],
            "target": " two",
            "variants": [{"name": "said", "system": "Say the number."}],
        }
        for n, word in enumerate(("eins", "zwei", "drei", "vier"))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = probe.run(path, model=mechanism, out=tmp_path / "run", analyze=False)
    intervene(run, ["patch"], model=mechanism)
    table = run.table("prompting")
    blocks = mechanism.blocks
    for task in run:
        base, cue = (task.record["passages"][v] for v in ("base", "said"))
        goal = task["said/logits"][0].double().log_softmax(-1)
        others = [other for other in run if other.id != task.id]
        for layer in range(len(blocks)):
            steps = [
                o["said/resid_post"][layer, 0].float() - o["base/resid_post"][layer, 0].float()
                for o in others
            ]
            state = task["base/resid_post"][layer, 0].float() + torch.stack(steps).mean(0)
            log_p = plainly_patched(mechanism, blocks[layer], base["token_ids"][: base["n_prompt"]], state)
            expected = float((log_p.exp() * (log_p - goal)).sum())
            rows = table[(table.task_id == task.id) & (table.experiment == "add") & (table.layer == layer)]
            assert rows.kl.item() == pytest.approx(expected, rel=2e-3, abs=1e-5)
        assert cue["n_prompt"] > base["n_prompt"]


def plainly_patched(model, block, ids, state):
    def hook(_module, _inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        hidden[0, -1] = state.to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = block.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model.hf(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    finally:
        handle.remove()


# -- the manifold --------------------------------------------------------------------------------------------------


def test_a_family_that_lies_along_one_direction_does_so_under_every_wording():
    """Two families along two directions, under three wordings that each add a direction of their own."""
    rng = np.random.default_rng(3)
    along, of_wording = np.eye(200)[:2], np.eye(200)[2:5]
    items = {family: [SimpleNamespace(id=f"{family}{k}") for k in range(6)] for family in "ab"}
    states = {
        (item.id, f"template.{w}"): 10 * along["ab".index(family)]
        + of_wording[w]
        + 0.1 * rng.normal(size=200)
        for family, members in items.items()
        for item in members
        for w in range(3)
    }
    shares = manifold.across(manifold._States(states), items, [f"template.{w}" for w in range(3)])  # pyright: ignore[reportArgumentType]
    assert shares.keys() == {None, "other_family"} and len(shares[None]) == 12
    assert min(shares[None]) > 0.9 and max(shares["other_family"]) < 0.1


def test_the_dimension_of_a_planted_subspace_is_found():
    rng = np.random.default_rng(1)
    directions = np.linalg.qr(rng.standard_normal((200, 3)))[0].T
    states = rng.standard_normal((24, 3)) * 5 @ directions + 0.1 * rng.standard_normal((24, 200))
    assert manifold.dimension(states) == 3
    basis = manifold.basis(states)
    assert np.degrees(subspace_angles(basis.T, directions.T)).max() < 5
    assert manifold.share(directions[0], basis) == pytest.approx(1.0, abs=0.01)
    outside = rng.standard_normal(200)
    assert manifold.share(outside, basis) == pytest.approx(3 / 200, abs=0.05)


def test_principal_angles_are_scipys():
    rng = np.random.default_rng(2)
    narrow, other = (np.linalg.qr(rng.standard_normal((50, k)))[0].T for k in (3, 2))
    ours = np.degrees(np.arccos(np.clip(manifold._cosines(narrow, other), -1, 1)))
    assert sorted(ours) == pytest.approx(sorted(np.degrees(subspace_angles(narrow.T, other.T))), abs=1e-6)


def test_alignment_goes_with_accuracy_within_variants_by_exchanges_of_whole_families():
    """A plain loop over all exchanges; what differs between variants alone counts for nothing."""
    rng = np.random.default_rng(3)
    families, names = "abcde", ("told", "shown")
    points = {
        layer: {
            (f, v): np.array([rng.random() + 10 * (v == "shown"), place / 5 + (v == "shown")])
            for place, f in enumerate(families)
            for v in names
        }
        for layer in (2, 5)
    }
    for place, f in enumerate(families):
        points[5][f, "told"][0] = place  # as its accuracy
    rows = list(manifold.with_accuracy(points))

    def correlation(layer: int, order: Sequence[int]) -> float:
        ranks = [[spearmanr_ranks([points[layer][f, v][i] for f in families]) for v in names] for i in (0, 1)]
        x, y = np.array(ranks[0]), np.array(ranks[1])[:, list(order)]
        return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))

    every = [[abs(correlation(layer, order)) for layer in (2, 5)] for order in permutations(range(5))]
    for layer in (2, 5):
        value, p = (row for row in rows if row.place == {"layer": layer})
        assert (value.name, value.n, value.low) == ("manifold_accuracy", 10, None)
        assert value.value == pytest.approx(correlation(layer, range(5)))
        assert p.value == pytest.approx(np.mean(np.max(every, axis=1) >= abs(value.value) - 1e-9))
    few = {2: {key: value for key, value in points[2].items() if key[0] in "abc"}}
    assert list(manifold.with_accuracy(few)) == []


def spearmanr_ranks(values: list[float]) -> np.ndarray:
    """Ranks about their mean."""
    return rankdata(values) - (len(values) + 1) / 2


@pytest.mark.parametrize(
    ("name", "measured"), [("add", "patch_recovery"), ("function_vector", "function_vector_recovery")]
)
def test_a_layer_is_chosen_on_one_half_and_measured_on_the_other(name, measured):
    """Layer 1 is best on tasks a and c, layer 0 on b and d."""
    kl = {"a": (9.0, 2.0), "b": (1.0, 8.0), "c": (9.0, 4.0), "d": (3.0, 8.0)}
    table = pd.DataFrame(
        [
            {
                "task_id": task,
                "experiment": experiment,
                "variant": "told",
                "layer": layer,
                "kl": value + extra,
            }
            | {"kl_start": 10.0}
            for task, by_layer in kl.items()
            for layer, value in enumerate(by_layer)
            for experiment, extra in ((name, 0.0), (f"{name}_random", 1.0))
        ]
    )
    rows = list(
        recovery._held_out(
            table[table.experiment == name],
            table[table.experiment == f"{name}_random"],
            dict.fromkeys(kl, "one"),
            "told",
            *recovery.HELD_OUT[name][1:],
        )
    )
    at = {(row.name, row.place.get("half"), row.place.get("control")): row for row in rows}
    first = at[f"{measured}_heldout", 0, None]
    assert (first.place["layer"], first.value) == (1, pytest.approx(1 - 16 / 20))
    assert at[f"{measured}_heldout", 1, None].value == pytest.approx(1 - 18 / 20)
    whole = at[f"{measured}_heldout", None, None]
    assert (whole.value, whole.n) == (pytest.approx(1 - 34 / 40), 4)
    assert at[f"{measured}_heldout", None, "random"].value == pytest.approx(1 - 38 / 40)
    assert at[f"{measured}_minus_random", None, None].value == pytest.approx(0.1)


# -- the spread ----------------------------------------------------------------------------------------------------


def items_with(scores: dict[str, list[float]]) -> list[Item]:
    empty = {"prompt": "", "token_ids": [], "n_prompt": 0, "n_new": 0, "completion": "", "spans": []}

    def passage(score: float) -> VariantPassage:
        return VariantPassage(**empty, finish_reason="eos", score=score, chosen=str(score))

    def item(number: int) -> Item:
        passages = {"base": passage(0.0)} | {
            v: passage(own_scores[number]) for v, own_scores in scores.items()
        }
        record = PromptingRecord(id=f"t{number}", kind="prompting", status="ok", passages=passages)
        return Item(SimpleNamespace(typed=lambda _: record))  # type: ignore[arg-type]

    return [item(number) for number in range(len(next(iter(scores.values()))))]


def test_wordings_of_one_variant_have_a_spread_and_chance_has_one_too():
    scores = {"template.a": [1.0] * 18 + [0.0] * 2, "template.b": [1.0] * 6 + [0.0] * 14, "other": [1.0] * 20}
    rows = {row.name: row for row in spread.measures(items_with(scores))}
    assert rows["accuracy_spread"].value == pytest.approx(0.6)
    assert (rows["accuracy_worst"].value, rows["accuracy_best"].value) == pytest.approx((0.3, 0.9))
    assert rows["choice_agreement"].value == pytest.approx(8 / 20)
    assert 0 < rows["accuracy_spread_chance"].value < 0.3
    assert {row.place["wording"] for row in rows.values()} == {"template"}


def test_a_share_of_sums_has_an_interval_from_eight_tasks_on():
    errors, sizes = [1.0, 1.0, 4.0, 2.0, 1.0, 3.0, 0.5, 1.0], [2.0, 4.0, 4.0, 3.0, 3.0, 4.0, 2.0, 3.0]
    row = explained(bias.BIAS_R2, errors, sizes, variant="tone")
    assert row.value == pytest.approx(1 - 13.5 / 25)
    assert row.low is not None and row.high is not None
    assert row.low < row.value < row.high
    assert explained(bias.BIAS_R2, errors[1:], sizes[1:], variant="tone").low is None


def test_what_the_vectors_of_families_explain_is_unbiased_for_few_tasks():
    """Against the law: vectors of length 1 and 2 in two families, noise of length 1."""
    generator, within, between = np.random.default_rng(0), [], []
    means = np.zeros((2, 30))
    means[0, 0], means[1, 1] = 1, 2
    at = np.array([0] * 4 + [1] * 5)
    for _ in range(600):
        shifts = means[at] + generator.normal(size=(9, 30)) / np.sqrt(30)
        sums = np.stack([shifts[at == family].sum(0) for family in (0, 1)])
        products = bias.Products(shifts @ sums.T, (shifts**2).sum(1), at)
        within.append(products.within().value)
        between.append(products.between().value)
        loop = [  # leaving one out, less the noise of the mean of the others
            (n - 1) / n * ((shifts[i] - (sums[f] - shifts[i]) / (n - 1)) ** 2).sum()
            for i, f in enumerate(at)
            for n in [int((at == f).sum())]
        ]
        assert within[-1] == pytest.approx(1 - sum(loop) / (shifts**2).sum())
    sizes = 4 * 2 + 5 * 5
    assert np.mean(within) == pytest.approx((4 * 1 + 5 * 4) / sizes, abs=0.01)
    assert np.mean(between) == pytest.approx((4 * -4 + 5 * -1) / sizes, abs=0.01)


# -- label words, ranks and whole answers --------------------------------------------------------------------------


def line_of(n: int, family: str, word: str) -> dict:
    pairs = [{"input": f"{w} ->", "output": o} for w, o in (("one", "yes"), ("two", "maybe"))]
    return {
        "id": f"{family}{n}",
        "kind": "prompting",
        "input": f"{word} ->",
        "choices": ["yes", "no no"],
        "target": "yes",
        "variants": [
            {"name": "few.1", "examples": pairs},
            {"name": "few.2", "examples": pairs[::-1]},
            {"name": "label", "examples": pairs, "labels": {"yes": "true", "no no": "false then"}},
        ],
        "metadata": {"family": family},
    }


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """A tiny random model, two families, wordings and label words; all experiments."""
    folder = tmp_path_factory.mktemp("worded")
    names = {"sum": ["red", "green", "blue", "black"], "sea": ["crab", "whale", "shrimp", "seal"]}
    lines = [line_of(n, family, word) for family, words in names.items() for n, word in enumerate(words)]
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = tiny("tiny-llama")
    run = probe.run(path, model=model, out=folder / "run", analyze=False)
    intervene(run, [*read_by("prompting")], model=model)
    analyze(run)
    return run, model


def test_a_label_stands_for_its_choice_in_examples_and_where_it_is_scored(worded):
    run, model = worded
    passage = run["sum0"].record["passages"]["label"]
    assert passage["prompt"].endswith("one ->true\ntwo ->maybe\nred ->")
    scored = {entry["choice"]: entry for entry in passage["choice_probabilities"]}
    assert list(scored) == ["yes", "no no"]
    ids = passage["token_ids"][: passage["n_prompt"]]
    for choice, word in (("yes", "true"), ("no no", "false then")):
        label_ids = scored[choice]["token_ids"]
        assert model.tokenizer.decode(label_ids) == word
        with torch.no_grad():
            log_p = model.hf(torch.tensor([[*ids, *label_ids]])).logits[0].double().log_softmax(-1)
        log_prob = sum(float(log_p[len(ids) - 1 + k, token]) for k, token in enumerate(label_ids))
        assert scored[choice]["log_prob"] == pytest.approx(log_prob, abs=1e-4)


def test_ranks_and_shifts_over_whole_answers_are_scipys(worded):
    run, _ = worded
    measures = run.measures().query("task_id == 'sea2' and analyzer == 'prompting'")
    passages = run["sea2"].record["passages"]
    logs = {v: np.array([e["log_prob"] for e in p["choice_probabilities"]]) for v, p in passages.items()}
    base = softmax(logs["base"])
    for variant in ("few.1", "label"):
        values = measures[measures.variant == variant].set_index("name").value
        p = softmax(logs[variant])
        assert values["choice_kl"] == pytest.approx(rel_entr(p, base).sum(), rel=1e-9)
        assert values["choice_tv"] == pytest.approx(np.abs(p - base).sum() / 2, rel=1e-9)
        assert values["answer_log_prob_shift"] == pytest.approx(logs[variant][0] - logs["base"][0])
        logits = run["sea2"][f"{variant}/logits"][0].double().numpy()
        token = passages[variant]["choice_probabilities"][0]["token_ids"][0]
        assert values["target_rank"] == rankdata(-logits, method="min")[token]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"maybe": "perhaps"}, "is no choice"),
        ({"yes": "no no"}, "two choices with one text"),
        ({"yes": ""}, "is empty"),
        ({"yes": 1}, "must be a string"),
        (["yes"], "must be an object"),
    ],
)
def test_labels_that_stand_for_nothing_or_for_two_are_refused(tmp_path, labels, message):
    line = line_of(0, "a", "word")
    line["variants"][2]["labels"] = labels
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(BadInput, match=message):
        read_tasks(path, None)


# -- function vectors ----------------------------------------------------------------------------------------------


def reads_of(model, ids) -> list[torch.Tensor]:
    """What W_O is given at the last position, by layer: [head · d_head], caught in a plain forward."""
    caught = {}
    hooks = [
        model.out_projection(layer).register_forward_pre_hook(
            lambda _module, inputs, layer=layer: caught.update({layer: inputs[0][0, -1].clone()})
        )
        for layer in range(model.facts.n_layers)
    ]
    try:
        with torch.no_grad():
            model.hf(torch.tensor([ids]))
    finally:
        for hook in hooks:
            hook.remove()
    return [caught[layer] for layer in sorted(caught)]


def test_a_heads_effect_is_that_of_a_hook_which_replaces_its_read(worded):
    run, model = worded
    prompted = PromptingTasks(LoadedRun(run, model, SilentProgress()))
    item = next(item for item in prompted.items if item.id == "sum1")
    ids = functions.exchanged_ids(prompted, item, "few.1", 0)
    others = [run[f"sum{n}"].record["passages"]["few.1"] for n in (0, 2, 3)]
    reads = [reads_of(model, each["token_ids"][: each["n_prompt"]]) for each in others]
    token, d_head = item.target_token("few.1"), model.facts.d_head
    table = run.table("prompting").query("experiment == 'head_effect' and task_id == 'sum1'")
    assert len(table) == 1 + model.facts.n_layers * model.facts.n_heads
    for row in table.itertuples():
        hook = None
        if not pd.isna(row.head):
            layer, columns = int(row.layer), slice(int(row.head) * d_head, (int(row.head) + 1) * d_head)
            mean = torch.stack([read[layer][columns] for read in reads]).mean(0)

            def replace(_module, inputs, columns=columns, mean=mean):
                states = inputs[0].clone()
                states[0, -1, columns] = mean
                return (states,)

            hook = model.out_projection(layer).register_forward_pre_hook(replace)
        with torch.no_grad():
            log_p = model.hf(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token]
        if hook is not None:
            hook.remove()
        assert row.target_log_prob == pytest.approx(float(log_p), abs=1e-4)


def test_the_examples_of_the_exchanged_prompt_have_each_others_answers(worded):
    run, model = worded
    prompted = PromptingTasks(LoadedRun(run, model, SilentProgress()))
    ids = functions.exchanged_ids(prompted, prompted.items[0], "few.1", 0)
    assert model.tokenizer.decode(ids).endswith("one ->maybe\ntwo ->yes\nred ->")


def test_a_function_vector_is_what_w_o_makes_of_the_heads_reads(worded):
    run, model = worded
    prompted = PromptingTasks(LoadedRun(run, model, SilentProgress()))
    heads = [(0, 1), (1, 0), (1, 2)]
    reads = torch.randn(model.facts.n_layers, model.facts.n_heads, model.facts.d_head)
    expected = torch.zeros(model.facts.d_model)
    for layer in (0, 1):
        kept = torch.zeros_like(reads[layer])
        for at, head in heads:
            if at == layer:
                kept[head] = reads[layer, head]
        with torch.no_grad():
            expected += model.out_projection(layer)(kept.flatten())
    written = functions.written(prompted, reads, heads)
    assert np.allclose(written, expected.numpy(), atol=1e-5)


def test_heads_are_chosen_by_their_mean_effect():
    effects = [{(0, 0): 0.1, (0, 1): 0.3, (1, 0): -0.9}, {(0, 0): 0.4, (0, 1): 0.1, (1, 0): 0.0}]
    assert functions.chosen(effects, 2) == [(0, 0), (0, 1)]


# -- the page ------------------------------------------------------------------------------------------------------


def test_every_measure_is_made_with_the_unit_and_columns_of_its_definition(worded):
    check_defined(
        worded[0].measures(),
        "prompting",
        {
            (name, "run"): "a random model is right equally often under every variant"
            for name in ("manifold_accuracy", "manifold_accuracy_p")
        },
    )


def test_the_page_and_the_commands_help_name_every_experiment():
    page = (test_docs.ROOT / "docs" / "prompting.md").read_text()
    words = test_docs.help_of("analyze")
    for name in read_by("prompting"):
        assert f"`{name}`" in page
        assert name in words
