"""Prompting as a bias: planted models whose prompts do what is known, and the patches redone with plain hooks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

import probe
from probe.analyzers import analyze
from probe.analyzers.prompting import manifold, spread
from probe.analyzers.prompting.states import Item, ratio
from probe.interventions import intervene
from tests.circuit import Circuit

WORDS = tuple("ant bee cat dog elk fox gnu hen".split())
ANSWERS = tuple("red tan sky jet".split())
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
def found(planted):
    measures = planted[0].measures()
    return measures[(measures.analyzer == "prompting") & (measures.task_id == "")]


def of(found, name: str, **where):
    rows = found[found.name == name]
    for column, value in where.items():
        rows = rows[rows[column].isna()] if value is None else rows[rows[column] == value]
    return rows


def test_one_logit_vector_explains_the_shift_where_the_prompt_adds_one(found):
    (value,) = of(found, "bias_r2", variant="tone", span=None).value
    assert value == pytest.approx(1.0, abs=1e-6)


def test_no_vector_explains_a_shift_that_is_each_inputs_own(found):
    row = of(found, "bias_r2", variant="odd", span=None).iloc[0]
    assert row.high < 0.5
    assert row.value < 0.2


def test_the_vector_says_the_tokens_whose_logits_the_prompt_raises(planted, found):
    run, model = planted
    tone, base = (
        np.mean([run[word][f"{variant}/logits"][0].numpy() for word in WORDS], axis=0)
        for variant in ("tone", "base")
    )
    best = model.tokenizer.decode([int((tone - base).argmax())])
    first = of(found, "bias_promoted", variant="tone", step=1).iloc[0]
    assert first.tool == best


def test_the_mean_difference_recovers_the_whole_shift_where_the_prompt_adds_one_vector(found):
    for layer in (0, 1):
        (value,) = of(found, "patch_recovery", variant="tone", layer=layer, span=None).value
        assert value == pytest.approx(1.0, abs=1e-4)
        (back,) = of(found, "patch_removal", variant="tone", layer=layer, span=None).value
        assert back == pytest.approx(1.0, abs=1e-4)
        (wrong,) = of(found, "patch_recovery_random", variant="tone", layer=layer, span=None).value
        assert wrong < 0.7


def test_no_mean_difference_recovers_a_shift_that_is_each_inputs_own(found):
    for layer in (0, 1):
        row = of(found, "patch_recovery", variant="odd", layer=layer, span=None).iloc[0]
        assert row.value < 0.5


def test_differences_point_the_same_way_only_where_the_prompt_adds_one_vector(found):
    (same,) = of(found, "pattern_cosine", variant="tone", layer=1, span=None).value
    (other,) = of(found, "pattern_cosine", variant="odd", layer=1, span=None).value
    assert same == pytest.approx(1.0, abs=1e-4)
    assert other < 0.9


def test_at_the_last_layer_the_lens_shows_the_shift_itself(found):
    for variant in ("tone", "odd"):
        (lens,) = of(found, "lens_kl", variant=variant, layer=1).value
        (shift,) = of(found, "kl", variant=variant, layer=None).value
        assert lens == pytest.approx(shift, rel=1e-4)


# -- the patches redone --------------------------------------------------------------------------------------------


def test_patches_equal_plain_forwards_of_transformers_with_a_hook(tiny_model, tmp_path):
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
    run = probe.run(path, model=tiny_model, out=tmp_path / "run", analyze=False)
    intervene(run, ["patch"], model=tiny_model)
    table = run.prompting()
    blocks = tiny_model.blocks
    for task in run:
        base, said = (task.record["passages"][v] for v in ("base", "said"))
        goal = task["said/logits"][0].double().log_softmax(-1)
        others = [other for other in run if other.id != task.id]
        for layer in range(len(blocks)):
            steps = [
                o["said/resid_post"][layer, 0].float() - o["base/resid_post"][layer, 0].float()
                for o in others
            ]
            state = task["base/resid_post"][layer, 0].float() + torch.stack(steps).mean(0)
            log_p = plainly_patched(tiny_model, blocks[layer], base["token_ids"][: base["n_prompt"]], state)
            expected = float((log_p.exp() * (log_p - goal)).sum())
            rows = table[(table.task_id == task.id) & (table.experiment == "add") & (table.layer == layer)]
            assert rows.kl.item() == pytest.approx(expected, rel=2e-3, abs=1e-5)
        assert said["n_prompt"] > base["n_prompt"]


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


def test_the_dimension_of_a_planted_subspace_is_found():
    rng = np.random.default_rng(1)
    directions = np.linalg.qr(rng.standard_normal((200, 3)))[0].T
    states = rng.standard_normal((24, 3)) * 5 @ directions + 0.1 * rng.standard_normal((24, 200))
    assert manifold.dimension(states) == 3
    found = manifold.basis(states)
    assert np.degrees(subspace_angles(found.T, directions.T)).max() < 5
    assert manifold.share(directions[0], found) == pytest.approx(1.0, abs=0.01)
    outside = rng.standard_normal(200)
    assert manifold.share(outside, found) == pytest.approx(3 / 200, abs=0.05)


def test_principal_angles_are_scipys():
    rng = np.random.default_rng(2)
    one, other = (np.linalg.qr(rng.standard_normal((50, k)))[0].T for k in (3, 2))
    ours = np.degrees(np.arccos(np.clip(manifold._cosines(one, other), -1, 1)))
    assert sorted(ours) == pytest.approx(sorted(np.degrees(subspace_angles(one.T, other.T))), abs=1e-6)


# -- the spread ----------------------------------------------------------------------------------------------------


def items_with(scores: dict[str, list[float]]) -> list[Item]:
    n = len(next(iter(scores.values())))
    return [
        Item(
            None,
            None,
            {"base": {}} | {v: {"score": own[i], "chosen": own[i]} for v, own in scores.items()},
            None,
        )  # type: ignore[arg-type]
        for i in range(n)
    ]


def test_wordings_of_one_variant_have_a_spread_and_chance_has_one_too():
    scores = {"template.a": [1.0] * 18 + [0.0] * 2, "template.b": [1.0] * 6 + [0.0] * 14, "other": [1.0] * 20}
    found = {row.name: row for row in spread.measures(items_with(scores))}
    assert found["accuracy_spread"].value == pytest.approx(0.6)
    assert (found["accuracy_worst"].value, found["accuracy_best"].value) == pytest.approx((0.3, 0.9))
    assert found["choice_agreement"].value == pytest.approx(8 / 20)
    assert 0 < found["accuracy_spread_chance"].value < 0.3
    assert {row.variant for row in found.values()} == {"template"}


def test_a_share_of_sums_resamples_tasks():
    value, interval = ratio([1.0, 1.0, 4.0], [2.0, 4.0, 4.0])
    assert value == pytest.approx(1 - 6 / 10)
    assert interval is not None
    assert interval[0] <= value <= interval[1]


# -- the page ------------------------------------------------------------------------------------------------------


def test_every_measure_stands_in_the_page(found):
    page = Path(__file__).parent.parent.joinpath("docs", "prompting.md").read_text()
    missing = sorted({name for name in found.name.unique() if f"`{name}`" not in page})
    assert not missing
