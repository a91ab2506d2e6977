"""h_context and linear probes: against torch's norms and the models' own, on planted states, on noise."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from probe.analyzers import tool
from probe.analyzers.rows import to_table
from probe.analyzers.tool import linear
from probe.analyzers.tool.context import Context, FinalNorm, h_context, missing
from probe.maths.ridge import cross_validated, ridge
from probe.model.norms import final_norm
from probe.runs import Array, Run
from tests.clock import references, within
from tests.conftest import tiny
from tests.test_analyzers import make, of, value_of
from tests.test_tool_heads import CATALOGUE, random_task, write

LAYERS, WIDTH = 6, 24


def text(vector: Any) -> str:
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()


PLAIN = {"name": "tiny", "norm": {"kind": "rms", "eps": 1e-5, "weight": text(np.ones(WIDTH)), "bias": None}}


# -- the norm ----------------------------------------------------------------------------------------------------


def test_the_norm_in_run_json_is_the_models_own(tiny_model):
    saved = json.loads(json.dumps(final_norm(tiny_model)))
    run: Any = type("Stub", (), {"run": {"model": {"norm": saved}}})
    norm = FinalNorm.of(run)
    assert norm is not None
    inner = tiny_model.hf.base_model
    module = next(
        getattr(inner, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(inner, name)
    )
    x = torch.randn(5, tiny_model.facts.d_model, generator=torch.Generator().manual_seed(3)) * 4 + 1
    for scale in (1, 1e-3):
        assert norm((x * scale).numpy()) == pytest.approx(module(x * scale).numpy(), abs=2e-5)
    assert norm.kind == ("layer" if tiny_model.facts.model_type in ("gpt2", "gpt_neox") else "rms")
    assert (norm.bias is None) == (norm.kind == "rms")


def test_normed_last_layer_and_unembedding_give_the_captured_logits(tmp_path):
    run = make(tmp_path, "tool", "tiny-gemma2")
    norm = FinalNorm.of(run)
    assert norm is not None
    for task in run:
        context = h_context(task, norm)
        assert context is not None
        assert context.decision is not None
        logits = tiny("tiny-gemma2").unembed(torch.from_numpy(context.decision[-1])[None])[0]
        assert logits.numpy() == pytest.approx(task["logits"][0].numpy(), abs=1e-4)


def test_a_norm_of_another_form_is_left_out(monkeypatch):
    model = tiny("tiny-llama")
    module = model.hf.base_model.norm
    monkeypatch.setattr(type(module), "forward", lambda self, x: x.abs() * self.weight)
    assert final_norm(model) is None


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_norm_of_a_concatenation_is_the_concatenation_of_the_norms(kind):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(1, 32, generator=generator) * 9, torch.randn(4, 32, generator=generator)
    weight, bias = torch.randn(32, generator=generator), torch.randn(32, generator=generator)
    if kind == "layer":
        module = torch.nn.LayerNorm(32, eps=1e-5)
        module.bias.data = bias
    else:
        module = torch.nn.RMSNorm(32, eps=1e-5)
    module.weight.data = weight
    ours = FinalNorm(kind, 1e-5, weight.numpy(), bias.numpy() if kind == "layer" else None)
    whole = module(torch.cat([a, b])).detach().numpy()
    assert ours(torch.cat([a, b]).numpy()) == pytest.approx(whole, abs=1e-5)
    assert np.concatenate([ours(a.numpy()), ours(b.numpy())]) == pytest.approx(whole, abs=1e-5)
    # Along the features it would be another model.
    wide = torch.nn.functional.layer_norm(torch.cat([a, b[:1]], 1), (64,))
    assert not np.allclose(wide[:, :32].numpy(), ours(a.numpy()), atol=0.1)


def test_the_context_is_the_normed_sequence_of_request_and_tools(tmp_path):
    run = make(tmp_path, "tool")
    norm, module = FinalNorm.of(run), tiny("tiny-llama").hf.base_model.norm
    assert norm is not None
    for task in run:
        context = h_context(task, norm)
        assert context is not None
        assert context.tools == [e["tool"] for e in task.record["tool_probabilities"] if e["tool"]]
        columns = [task.labels().index(name) for name in ("user", *(f"tool:{t}" for t in context.tools))]
        expected = module(task["resid_span_mean"][:, columns]).numpy()
        assert context.h_task == pytest.approx(expected[:, 0], abs=1e-5)
        assert context.h_tools == pytest.approx(expected[:, 1:], abs=1e-5)


# -- planted states ----------------------------------------------------------------------------------------------


def planted(
    path: Path, n: int, first: int | None, seed: int = 0, model: Any = PLAIN, n_tools: int = 4
) -> Run:
    """Requests and decisions that equal, from layer `first` on, half of the right tool's own direction."""
    rng = np.random.default_rng(seed)
    directions = {name: rng.normal(size=WIDTH) for name in CATALOGUE}
    tasks = []
    for number in range(n):
        task = random_task(number, n_tools, rng)
        states = rng.normal(size=(LAYERS, len(task["labels"]), WIDTH))
        decision = rng.normal(size=(LAYERS, 1, WIDTH))
        for slot, name in enumerate(task["tools"], 1):
            states[:, slot] += 2 * directions[name]
        if first is not None:
            states[first:, -2] += 2 * directions[task["target"]]
            decision[first:, 0] += 2 * directions[task["target"]]
        float32 = {"mean": torch.tensor(states).float(), "decision": torch.tensor(decision).float()}
        task["tensors"] = {
            "resid_span_mean": Array(float32["mean"], ("layer", "span", "d_model")),
            "resid_post": Array(float32["decision"], ("layer", "row", "d_model")),
        }
        tasks.append(task)
    return write(path, tasks, model)


@pytest.fixture(scope="module")
def present(tmp_path_factory):
    run = planted(tmp_path_factory.mktemp("present") / "run", 60, 3)
    return run, to_table(linear.measures(run)).to_pandas()


@pytest.mark.parametrize("source", ["decision", "request"])
def test_what_is_there_from_layer_3_on_is_decodable_from_layer_3_on(present, source):
    _, frame = present
    rows = of(frame, state=source, rule="matching")
    assert value_of(rows, name="decodable_layer", role="right") == 3
    assert of(rows, name="decodable_layer", role="chosen").empty
    for layer in range(LAYERS):
        accuracy = of(rows, name="probe_accuracy", role="right", control=None, layer=layer).iloc[0]
        control = of(rows, name="probe_accuracy", role="right", control="labels", layer=layer).iloc[0]
        excess = of(rows, name="probe_selectivity", role="right", layer=layer).iloc[0]
        assert control.value == pytest.approx(0.25, abs=0.05)
        assert excess.value == pytest.approx(accuracy.value - control.value, abs=1e-9)
        assert excess.low < excess.value < excess.high
        assert accuracy.n == 60
        auroc = of(rows, name="probe_auroc", role="right", layer=layer).iloc[0]
        assert (auroc.low > 0.5) == (layer >= 3)
        assert (accuracy.low > control.high) == (layer >= 3)
    assert value_of(rows, name="probe_chance", role="right") == 0.25


def test_a_tool_is_named_where_the_same_tools_recur(present):
    _, frame = present
    rows = of(frame, state="decision", rule="naming", role="right")
    assert value_of(rows, name="decodable_layer") == 3
    late = of(rows, name="probe_accuracy", layer=5)
    assert value_of(late, control=None) > value_of(late, control="labels") + 0.3
    assert value_of(late, control="labels") < 0.25


Example = tuple[np.ndarray, list[str], np.ndarray, list[int]]
"""q [layer, d_model], tools, t [layer, tool, d_model] and the places of the right tools."""


def stored(examples: list[Example]) -> tuple[list[linear._Example], linear.ProbeStates]:
    """Examples as the probes take them."""
    states, out = linear.ProbeStates(), []
    for state, tools, tool_states, right in examples:
        places = states.add(Context(list(range(len(state))), tools, tool_states, None, state))
        out.append(linear._Example(tools, places.decision, places.first_tool, right))
    return out, states


def noisy(n: int, rng: np.random.Generator, popularity: tuple[float, ...] | None = None) -> list[Example]:
    """Examples whose states know nothing of the target; where targets are popular the tools' states say which is which."""
    known = 3 * rng.normal(size=(1, 4, WIDTH)) if popularity else 0
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return [
        (
            normal(LAYERS, WIDTH),
            CATALOGUE[:4],
            normal(LAYERS, 4, WIDTH) + known,
            [int(rng.choice(4, p=popularity))],
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize(
    ("n", "popularity"),
    [(24, None), pytest.param(40, (0.55, 0.25, 0.15, 0.05), marks=pytest.mark.slow, id="uneven")],
)
def test_in_noise_no_layer_is_decodable_in_95_of_100_runs(n, popularity):
    count = 0
    for seed in range(100):
        examples = noisy(n, np.random.default_rng(seed), popularity)
        count += linear.matching(*stored(examples)).decodable_layer is not None
    # 5 expected at most; more than 11 would have a probability of 0.4 %.
    assert count <= 11


def test_the_ridge_is_scikit_learns():
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    for n, width in ((30, 80), (90, 20)):
        x, y, z = rng.normal(size=(n, width)) * 3 + 1, rng.normal(size=(n, 4)), rng.normal(size=(7, width))
        x[:, 3] = z[:, 3] = 2.0
        expected = make_pipeline(StandardScaler(), Ridge(alpha=width)).fit(x, y).predict(z)
        assert ridge(x, y, z) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("n", "width"), [(30, 80), (90, 20)])
def test_folds_that_share_products_are_fitted_as_each_alone(n, width):
    rng = np.random.default_rng(1)
    x, y, folds = rng.normal(size=(n, width)) * 3 + 1, rng.normal(size=(n, 4)), rng.permutation(n) % 5
    x[:, 3], x[folds > 0, 4] = 2.0, 1.0  # the same in all rows; the same wherever fold 0 is left out
    expected = np.empty_like(y)
    for fold in range(5):
        expected[folds == fold] = ridge(x[folds != fold], y[folds != fold], x[folds == fold])
    assert cross_validated(x, y, folds) == pytest.approx(expected, abs=1e-9)
    single = cross_validated(x.astype(np.float32), y.astype(np.float32), folds)
    assert single == pytest.approx(expected, abs=1e-4)


def test_a_probe_that_knows_a_popular_tool_alone_has_no_selectivity(tmp_path):
    """One tool is right wherever it is shown: its state says so, whatever was asked."""
    rng = np.random.default_rng(5)
    directions = rng.normal(size=(len(CATALOGUE), WIDTH)) * 3
    examples = []
    for _ in range(80):
        tools = rng.choice(8, 4, replace=False)
        right = int(np.flatnonzero(tools == 0)[0]) if 0 in tools else int(rng.integers(4))
        states = (directions[tools] + rng.normal(size=(4, WIDTH)))[None].astype(np.float32)
        state = rng.normal(size=(1, WIDTH)).astype(np.float32)
        examples.append((state, [CATALOGUE[i] for i in tools], states, [right]))
    result = linear.matching(*stored(examples))
    assert result.accuracy[0] > 0.45
    assert abs(result.accuracy[0] - result.control_hits[0].mean()) < 0.12, result.control_hits.mean()
    assert result.decodable_layer is None


def test_control_targets_are_as_many_and_as_often_in_each_slot():
    rng = np.random.default_rng(6)
    examples = []
    for number in range(200):
        right = [0] if rng.random() < 0.7 else [1, 2] if number % 2 else [int(rng.integers(4))]
        tools = [str(name) for name in rng.permutation(CATALOGUE)[:4]]
        examples.append(linear._Example(tools, 0, 0, right))
    task = np.repeat(np.arange(200), 4)
    labels = np.concatenate([np.isin(np.arange(4), e.right) for e in examples])
    drawn = linear._controls(linear._popular_weights(examples, labels, task), labels, task)
    assert (np.bincount(task, labels) == drawn.reshape(200, 4, -1).sum(1).T).all()
    by_slot = drawn.reshape(200, 4, -1).mean((0, 2))
    assert by_slot == pytest.approx(labels.reshape(200, 4).mean(0), abs=0.06)
    assert len({column.tobytes() for column in drawn.T}) == linear.CONTROLS


def test_folds_are_of_tasks_and_no_fold_sees_its_own_rows(monkeypatch):
    """A feature that holds the label of its own task alone helps no held-out task."""
    rng = np.random.default_rng(8)
    examples = []
    for _ in range(60):
        right = int(rng.integers(3))
        states = rng.normal(size=(1, 3, 60)).astype(np.float32)
        states[0, right, :30] = rng.normal(size=30) * 50
        examples.append((np.ones((1, 60), np.float32), list("abc"), states, [right]))
    seen = []
    right_way = linear.cross_validated

    def watched(features, goal, folds):
        assert (folds.reshape(60, 3) == folds.reshape(60, 3)[:, :1]).all()
        seen.append(np.bincount(folds))
        return right_way(features, goal, folds)

    monkeypatch.setattr(linear, "cross_validated", watched)
    assert linear.matching(*stored(examples)).accuracy[0] < 0.6
    assert seen[0].tolist() == [36] * 5


def test_the_auroc_of_a_probe_is_a_slow_count_of_pairs(monkeypatch):
    examples = noisy(30, np.random.default_rng(1))
    examples = [(*seen, [0, 2] if n % 3 else right) for n, (*seen, right) in enumerate(examples)]
    scores = np.random.default_rng(2).normal(size=(120, 1 + linear.CONTROLS)).round(1)
    monkeypatch.setattr(linear, "cross_validated", lambda features, goal, folds: scores)
    won = pairs = 0.0
    for number, example in enumerate(examples):
        task_scores = scores[4 * number : 4 * number + 4, 0]
        for i in example[3]:
            for j in set(range(4)) - set(example[3]):
                won += float(task_scores[i] > task_scores[j]) + (task_scores[i] == task_scores[j]) / 2
                pairs += 1
    result = linear.matching(*stored(examples))
    assert result.auroc == pytest.approx(np.full(LAYERS, won / pairs), abs=1e-12)
    assert len(result.auroc_intervals) == LAYERS
    for auroc, interval in zip(result.auroc, result.auroc_intervals, strict=True):
        assert interval is not None and interval[0] < auroc < interval[1]


def test_ties_share_a_hit():
    starts, counts = np.array([0, 3]), np.array([3, 2])
    scores = np.array([[1.0], [1.0], [0.0], [0.2], [0.3]])
    labels = np.array([[True], [False], [False], [False], [True]])
    assert linear.first_is_right(scores, labels, starts, counts).ravel().tolist() == [0.5, 1.0]


# -- what is not there -------------------------------------------------------------------------------------------


def test_a_run_without_the_norm_or_the_states_has_no_probe_and_says_why(tmp_path):
    old = planted(tmp_path / "old", 24, 3, model={"name": "tiny"})
    assert list(linear.measures(old)) == []
    assert "before the model's final norm" in str(missing(old))
    odd = planted(tmp_path / "odd", 24, 3, model={"name": "tiny", "norm": None})
    assert "no RMSNorm or LayerNorm" in str(missing(odd))
    damaged = {"name": "tiny", "norm": {"kind": "rms", "eps": 1e-5, "weight": "né", "bias": None}}
    assert list(linear.measures(planted(tmp_path / "damaged", 24, 3, model=damaged))) == []
    bare = make(tmp_path, "tool", capture="attn_to_spans")
    assert list(linear.measures(bare)) == []
    assert "resid_span_mean was not captured" in str(missing(bare))
    assert missing(planted(tmp_path / "new", 3, 3)) is None


def test_without_the_decisions_row_the_request_is_probed(tmp_path):
    rng = np.random.default_rng(0)
    tasks = []
    for number in range(20):
        states = torch.tensor(rng.normal(size=(LAYERS, 6, WIDTH))).float()
        tensors = {"resid_span_mean": Array(states, ("layer", "span", "d_model"))}
        tasks.append(random_task(number, 3, rng, tensors=tensors))
    frame = to_table(linear.measures(write(tmp_path / "run", tasks, PLAIN))).to_pandas()
    assert set(frame.state) == {"request"}


def test_few_tasks_have_no_probe(tmp_path):
    assert list(linear.measures(planted(tmp_path / "run", 19, 3))) == []


def test_the_tool_analyzer_has_every_part(present):
    run, _ = present
    names = set(to_table(tool.measures(run)).to_pandas().name)
    assert {"log_prob", "attention", "sink_mass", "head_auroc", "heads_found", "probe_accuracy"} <= names


@pytest.mark.timing
def test_60_tasks_of_30_layers_are_probed_in_twenty_seconds():
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(60):
        state = rng.normal(size=(30, 576)).astype(np.float32)
        states = rng.normal(size=(30, 4, 576)).astype(np.float32)
        examples.append((state, list("abcd"), states, [int(rng.integers(4))]))
    # Each runs four times: two targets, two states.
    assert within(
        60, 4 * references(lambda: (linear.matching(*stored(examples)), linear.naming(*stored(examples))))
    )  # 10
