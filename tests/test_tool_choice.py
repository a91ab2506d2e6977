"""The choice of a tool: against sklearn, scipy, closed forms, planted biases and plain loops."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, confusion_matrix
from sklearn.metrics import log_loss as sklearn_log_loss

from probe.analyzers import tool
from probe.analyzers.rows import to_table
from probe.analyzers.tool import calibration, confusion, orders, scorers
from probe.maths.folds import folds
from probe.maths.intervals import wilson
from probe.maths.statistics import softmax
from probe.prompts.labels import NO_TOOL
from probe.runs import INTERVENTION_FIELDS, Run, RunWriter
from probe.runs.views import conditions
from tests.clock import references, sized, within
from tests.made_up_runs import EMPTY_PASSAGE, choice_of, put_interventions

Scores = dict[str | None, float]


def record(
    task_id: str,
    log_probs: Scores,
    target: Any,
    *,
    tokens: dict[str | None, list[float]] | None = None,
    opener: float | None = None,
) -> dict[str, Any]:
    """A record.json of hand-made scores; with `tokens` the scores are their sums, plus the opener's."""
    if tokens is not None:
        log_probs = {name: math.fsum(by_token) + (opener or 0) for name, by_token in tokens.items()}
        if opener is not None:
            log_probs[None] = math.log1p(-math.exp(opener))
    entries = [{"tool": name, "token_ids": [1], "log_prob": value} for name, value in log_probs.items()]
    for group in (entries, [entry for entry in entries if entry["tool"]]):
        key = "probability" if group is entries else "choice_probability"
        for entry, p in zip(group, scipy.special.softmax([e["log_prob"] for e in group]), strict=True):
            entry[key] = float(p)
    if tokens is not None:
        for entry in entries:
            entry["token_log_probs"] = tokens.get(entry["tool"], [])
    chosen = max(entries, key=lambda entry: entry["log_prob"])["tool"]
    out: dict[str, Any] = EMPTY_PASSAGE | {
        "id": task_id,
        "kind": "tool_selection",
        "status": "ok",
        "seconds": 0.1,
        "target": target,
        "no_tool": "listed" if opener is None else "complement",
        "template": {"no_tool_name": "no_tool"} if opener is None else {},
        "tool_probabilities": entries,
        "chosen": chosen,
        "chosen_tool": max(entries[:-1], key=lambda entry: entry["log_prob"])["tool"],
        "candidate_mass": 0.5,
    }
    if opener is not None:
        out["opener_log_prob"] = opener
    return out


def written(path: Path, records: list[dict[str, Any]]) -> Run:
    with RunWriter.create(path / "run", {"kinds": ["tool_selection"]}) as writer:
        for record in records:
            writer.commit(record, {}, {})
        writer.finish("done")
    return Run(path / "run")


def rows(task_id: str, experiment: str, detail: Any, scored: list[Scores]) -> list[dict[str, Any]]:
    """Rows of the interventions table; `detail` and `scored` have one entry a condition."""
    return [
        dict.fromkeys(INTERVENTION_FIELDS)
        | {"task_id": task_id, "experiment": experiment, "condition": number}
        | {"detail": json.dumps(what), "tool": name, "log_prob": value}
        for number, (what, scores) in enumerate(zip(detail, scored, strict=True))
        for name, value in scores.items()
    ]


def all_orders(task_id: str, names: list[str], score: Any) -> list[dict[str, Any]]:
    """Every order of the tools; `score(order)` gives the scores of its candidates."""
    orders = [list(order) for order in itertools.permutations(names)]
    return rows(task_id, "order", orders, [score(order) for order in orders])


@pytest.fixture
def given(monkeypatch):
    """Puts a made-up interventions table in place of the run's."""

    def put(entries: list[dict[str, Any]]) -> None:
        frame = pd.DataFrame(entries, columns=list(INTERVENTION_FIELDS))
        put_interventions(monkeypatch, frame)

    put([])
    return put


def table(part: Any, run: Run) -> pd.DataFrame:
    return to_table(part.measures(run)).to_pandas()


def of(frame: pd.DataFrame, **where: Any) -> pd.DataFrame:
    for name, value in where.items():
        frame = frame[frame[name].isna() if value is None else frame[name] == value]
    return frame


def row_of(frame: pd.DataFrame, **where: Any) -> Any:
    rows = of(frame, **where)
    assert len(rows) == 1, (where, len(rows))
    return rows.iloc[0]


def drawn(n: int, seed: int = 1, *, temperature: float = 1.0, k: int = 4) -> list[dict[str, Any]]:
    """Tasks whose right choice is drawn from softmax(z); what the model says is z times `temperature`."""
    generator = np.random.default_rng(seed)
    names: list[str | None] = [*"abcdefgh"[:k], None]
    records = []
    for number in range(n):
        z = generator.normal(scale=1.5, size=k + 1)
        right = names[generator.choice(k + 1, p=scipy.special.softmax(z))]
        stated = scipy.special.log_softmax(temperature * z)
        records.append(record(f"t{number:03}", dict(zip(names, stated.tolist(), strict=True)), right))
    return records


# -- temperature -----------------------------------------------------------------------------------------------


def test_the_sweep_divides_summed_log_probabilities_and_keeps_the_choice(tmp_path, given):
    records = drawn(12)
    frame = table(calibration, written(tmp_path, records))
    for tau in (0.125, 0.5, 1.0, 2**0.5, 8.0):
        p = [scipy.special.softmax([e["log_prob"] / tau for e in r["tool_probabilities"]]) for r in records]
        names = [[e["tool"] for e in r["tool_probabilities"]] for r in records]
        right = [q[n.index(r["target"])] for q, n, r in zip(p, names, records, strict=True)]
        row = {"temperature": tau, "task_id": ""}
        entropy = np.mean([scipy.stats.entropy(q) for q in p])
        assert row_of(frame, name="tau_entropy", **row).value == pytest.approx(entropy, abs=1e-12)
        assert row_of(frame, name="tau_top1", **row).value == pytest.approx(np.mean([q.max() for q in p]))
        assert row_of(frame, name="tau_accuracy", **row).value == pytest.approx(np.mean(right))
        assert row_of(frame, name="tau_log_loss", **row).value == pytest.approx(-np.mean(np.log(right)))
    rising = of(frame, name="tau_entropy").value
    assert len(rising) == len(calibration.TAUS)
    assert (rising.diff().dropna() > 0).all()


def test_the_fitted_temperature_is_the_minimum_that_scipy_finds_and_recovers_the_true_one(tmp_path, given):
    records = drawn(400, temperature=2.5)
    frame = table(calibration, written(tmp_path, records))
    known = [choice_of(r) for r in records]

    def loss(log_tau):
        return -np.mean(
            [
                scipy.special.log_softmax(case.log_probs / np.exp(log_tau[0]))[case.is_right][0]
                for case in known
            ]
        )

    row = row_of(frame, name="tau_fitted")
    best = scipy.optimize.minimize(loss, [0.0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12})
    assert row.value == pytest.approx(np.exp(best.x[0]), rel=1e-4)
    assert row.low < 2.5 < row.high
    assert pd.isna(row.rule)
    assert 0.3 < row.high - row.low < 1.5
    assert of(frame, name="tau_fold").value.between(2, 3.2).all()
    assert (of(frame, name="tau_fold").n == 320).all()


def test_a_model_that_is_always_right_has_no_best_temperature(tmp_path, given):
    records = [record(f"t{i}", {"a": -0.5, "b": -2.0 - i, None: -3.0}, "a") for i in range(20)]
    assert row_of(table(calibration, written(tmp_path, records)), name="tau_fitted").rule == "bound"


def test_with_several_right_candidates_their_probabilities_are_added():
    case = choice_of(record("t", {"a": -1.0, "b": -2.0, "c": -0.5, None: -3.0}, ["a", "b"]))
    scores, right = calibration.stacked([case])
    p = scipy.special.softmax(case.log_probs / 3)
    assert calibration.log_loss(scores, right, 3.0)[0] == pytest.approx(-np.log(p[0] + p[1]), abs=1e-12)


def held_out(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Hits, and the probabilities [task, candidate] before and after fitting, from a plain loop."""
    known = [choice_of(r) for r in records]
    fold = folds(len(known))
    after = []
    for number, case in enumerate(known):
        others = [c for c, f in zip(known, fold, strict=True) if f != fold[number]]
        tau = calibration.fit_tau(*calibration.stacked(others))
        after.append(scipy.special.softmax(case.log_probs / tau))
    before = [scipy.special.softmax(case.log_probs) for case in known]
    hits = [case.is_right[case.log_probs.argmax()] for case in known]
    return {"hits": np.array(hits, dtype=int), "raw": np.array(before), "fitted": np.array(after)}


@pytest.fixture(scope="module")
def overconfident(tmp_path_factory):
    records = drawn(60, seed=3, temperature=3.0)
    return records, table(calibration, written(tmp_path_factory.mktemp("c"), records)), held_out(records)


@pytest.mark.parametrize("rule", ["raw", "fitted"])
def test_held_out_losses_agree_with_sklearn(overconfident, rule):
    records, frame, slow = overconfident
    confidence = slow[rule].max(1)
    brier = brier_score_loss(slow["hits"], confidence)
    assert row_of(frame, name="brier", rule=rule).value == pytest.approx(brier, abs=1e-12)
    labels = [str(r["target"]) for r in records]
    order = ["a", "b", "c", "d", "None"]
    one_hot = np.array([[label == name for name in order] for label in labels], dtype=float)
    whole = np.mean([np.sum((p - y) ** 2) for p, y in zip(slow[rule], one_hot, strict=True)])
    assert row_of(frame, name="brier_multiclass", rule=rule).value == pytest.approx(whole, abs=1e-12)
    p = slow[rule][:, np.argsort(order)]
    loss = sklearn_log_loss(labels, p, labels=sorted(order))
    assert row_of(frame, name="log_loss", rule=rule).value == pytest.approx(loss, abs=1e-9)


@pytest.mark.parametrize("rule", ["raw", "fitted"])
@pytest.mark.parametrize(("kind", "strategy", "bins"), [("width", "uniform", 10), ("mass", "quantile", 6)])
def test_the_reliability_curve_is_that_of_sklearn(overconfident, rule, kind, strategy, bins):
    _, frame, slow = overconfident
    confidence = slow[rule].max(1)
    accuracy, mean = calibration_curve(slow["hits"], confidence, n_bins=bins, strategy=strategy)
    rows = of(frame, rule=rule, binning=kind)
    assert of(rows, name="reliability_accuracy").value.to_numpy() == pytest.approx(accuracy)
    assert of(rows, name="reliability_confidence").value.to_numpy() == pytest.approx(mean)
    n = of(rows, name="reliability_accuracy").n.to_numpy()
    assert n.sum() == 60
    assert row_of(rows, name="ece").value == pytest.approx((n * abs(accuracy - mean)).sum() / 60, abs=1e-12)
    for row in of(rows, name="reliability_accuracy").itertuples():
        assert (row.low, row.high) == pytest.approx(wilson(row.value, row.n))


def test_fitting_repairs_an_overconfident_model_on_tasks_that_it_has_not_seen(overconfident):
    _, frame, _ = overconfident
    assert row_of(frame, name="log_loss_gain").low > 0
    for kind in ("width", "mass"):
        before, after = (row_of(frame, name="ece", rule=v, binning=kind).value for v in ("raw", "fitted"))
        assert after < before


def test_chance_alone_gives_a_calibrated_model_the_ece_of_the_closed_form():
    sure = np.array([0.9])
    drawn = calibration.calibrated_ece(sure, calibration.equal_width(sure), draws=20000)
    assert set(np.round(drawn, 9)) == {0.1, 0.9}
    assert drawn.mean() == pytest.approx(2 * 0.9 * 0.1, abs=0.01)  # P(right) (1 − c) + P(wrong) c
    together = np.full(400, 0.7)  # one bin: |mean of 400 draws − 0.7|, half-normal with sd √(0.7 · 0.3 / 400)
    drawn = calibration.calibrated_ece(together, calibration.equal_mass(together), draws=20000)
    assert drawn.mean() == pytest.approx(np.sqrt(0.21 / 400 * 2 / np.pi), rel=0.03)


def test_every_task_is_held_out_once_and_folds_differ_by_one_task_at_most():
    sizes = Counter(folds(23).tolist())
    assert set(sizes) == set(range(5))
    assert set(sizes.values()) == {4, 5}


def test_too_few_tasks_have_a_sweep_and_no_fit(tmp_path, given):
    frame = table(calibration, written(tmp_path, drawn(9)))
    assert set(frame.name) == {"tau_entropy", "tau_top1", "tau_accuracy", "tau_log_loss"}


# -- scorers ---------------------------------------------------------------------------------------------------

# Made so that the scorers disagree: `ab` has the best sum, `abcdefghij` the best mean per token (its last tokens are
# certain) and per byte, `abc` the best first token.
TOKENS: dict[str | None, list[float]] = {
    "ab": [-1.5, -0.1],
    "abc": [-0.5, -2.5],
    "abcdefghij": [-1.8, -0.01, -0.01, -0.01],
    None: [-4.0, -1.0],
}
FREE: list[Scores] = [
    {"ab": -0.4, "abc": -5.0, "abcdefghij": -2.0, None: -6.0},
    {"ab": -0.6, "abc": -4.0, "abcdefghij": -2.4, None: -7.0},
    {"ab": -0.5, "abc": -9.0, "abcdefghij": -2.2, None: -5.0},
]
ORDERED: list[Scores] = [
    {"ab": -1.6, "abc": -3.0, "abcdefghij": -1.9, None: -5.0},
    {"ab": -5.0, "abc": -3.0, "abcdefghij": -0.9, None: -5.0},
]


@pytest.fixture
def disagreeing(tmp_path, given):
    run = written(tmp_path, [record("t", {}, "abc", tokens=TOKENS)])
    details = [["ab", "abc", "abcdefghij"], ["abcdefghij", "abc", "ab"]]
    texts = [{"text": text} for text in ("N/A", "", "[MASK]")]
    given([*rows("t", "content_free", texts, FREE), *rows("t", "order", details, ORDERED)])
    return table(scorers, run)


def expected_scores() -> dict[str, list[float]]:
    """Scores by name, from a plain loop."""
    out: dict[str, list[float]] = {name: [] for name in scorers.SCORERS}

    def p(scores: Scores, name: str | None) -> float:
        return math.exp(scores[name]) / sum(math.exp(value) for value in scores.values())

    sums = {name: sum(tokens) for name, tokens in TOKENS.items()}
    for name, tokens in TOKENS.items():
        prior = sum(scores[name] for scores in FREE) / 3
        ordered = math.log(sum(p(scores, name) for scores in ORDERED) / 2)
        out["sum"].append(sums[name])
        out["first_token"].append(tokens[0])
        out["mean_token"].append(sums[name] / len(tokens))
        out["mean_byte"].append(sums[name] / len(name or "no_tool"))
        out["pmi"].append(sums[name] - prior)
        out["contextual_calibration"].append(
            math.log(p(sums, name) / (sum(p(scores, name) for scores in FREE) / 3))
        )
        out["orders"].append(ordered)
        out["pmi_orders"].append(ordered - prior)
    return out


def test_every_scorer_is_its_formula_and_they_rank_differently(disagreeing):
    choices = {}
    for scorer, expected in expected_scores().items():
        rows = of(disagreeing, name="probability_scorer", scorer=scorer)
        assert rows.tool.tolist()[:3] == ["ab", "abc", "abcdefghij"]
        assert rows.span.tolist()[3] == NO_TOOL
        assert rows.value.to_numpy() == pytest.approx(scipy.special.softmax(expected), abs=1e-12)
        choices[scorer] = list(TOKENS)[int(np.argmax(expected))]
        hit = row_of(disagreeing, name="accuracy_scorer", scorer=scorer)
        assert (hit.value, hit.n) == (float(choices[scorer] == "abc"), 1)
    assert choices["sum"] == "ab"
    assert choices["first_token"] == choices["pmi"] == "abc"
    assert choices["mean_token"] == choices["mean_byte"] == choices["orders"] == "abcdefghij"


def test_the_default_scorer_gives_the_probabilities_of_the_record(disagreeing):
    entries = record("t", {}, "abc", tokens=TOKENS)["tool_probabilities"]
    rows = of(disagreeing, name="probability_scorer", scorer="sum").value
    assert rows.to_numpy() == pytest.approx([entry["probability"] for entry in entries], abs=1e-12)


def test_contextual_calibration_of_the_content_free_prompt_itself_is_even():
    free = conditions.Scores({"text": ""}, np.array([-0.3, -2.0, -4.0]))
    case = choice_of(record("t", {"a": -0.3, "b": -2.0, None: -4.0}, "a"))
    for scorer in ("contextual_calibration", "pmi"):
        log_probs = scorers.scores(case, [free])[scorer]
        assert scipy.special.softmax(log_probs) == pytest.approx([1 / 3] * 3)


def test_a_complement_no_tool_has_no_length_and_is_left_out_of_length_normalization(tmp_path, given):
    opener = math.log(0.3)
    tools = {name: tokens for name, tokens in TOKENS.items() if name}
    run = written(tmp_path, [record("t", {}, None, tokens=tools, opener=opener)])
    frame = table(scorers, run)
    per_task = of(frame, name="probability_scorer")
    first = [opener + tokens[0] for tokens in tools.values()] + [math.log(0.7)]
    rows = of(per_task, scorer="first_token").value
    assert rows.to_numpy() == pytest.approx(scipy.special.softmax(first))
    for scorer in ("mean_token", "mean_byte"):
        assert of(per_task, scorer=scorer).tool.tolist() == list(tools)
        assert of(per_task, scorer=scorer).value.sum() == pytest.approx(1)
        assert of(frame, name="accuracy_scorer", scorer=scorer).empty
    assert row_of(frame, name="accuracy_scorer", scorer="sum").value == 1
    assert "accuracy_scorer_tools" not in set(frame.name), "its target is no tool"


def test_scorers_without_their_data_are_absent(tmp_path, given):
    run = written(tmp_path, [record("t", {"a": -1.0, "b": -2.0, None: -3.0}, "a")])
    assert set(table(scorers, run).scorer) == {"sum"}


def test_names_that_begin_alike_tie_by_their_first_token_and_share_the_choice(tmp_path, given):
    tokens: dict[str | None, list[float]] = {"w_now": [-1.0, -0.1], "w_soon": [-1.0, -3.0], None: [-5.0]}
    run = written(tmp_path, [record("t", {}, "w_soon", tokens=tokens)])
    frame = of(table(scorers, run), scorer="first_token")
    assert row_of(frame, name="accuracy_scorer").value == 0.5
    assert row_of(frame, name="scorer_agreement").value == 0.5
    assert row_of(frame, name="position_bias_scorer").value == 0


def test_accuracies_and_agreement_of_scorers_are_counts(tmp_path, given):
    records = []
    for number in range(30):
        generator = np.random.default_rng(number)
        tokens: dict[str | None, list[float]] = {
            name: (-generator.exponential(size=generator.integers(1, 5))).tolist()
            for name in ("long_name", "b", "cc", None)
        }
        records.append(record(f"t{number:02}", {}, ["b", "cc", None][number % 3], tokens=tokens))
    frame = table(scorers, written(tmp_path, records))
    by_mean, same, tools_right = 0, 0, 0
    for r in records:
        means = {e["tool"]: np.mean(e["token_log_probs"]) for e in r["tool_probabilities"]}
        by_mean += max(means, key=means.__getitem__) == r["target"]
        same += max(means, key=means.__getitem__) == r["chosen"]
        del means[None]
        tools_right += max(means, key=means.__getitem__) == r["target"]
    row = row_of(frame, name="accuracy_scorer", scorer="mean_token")
    assert (row.value, row.n) == (pytest.approx(by_mean / 30), 30)
    assert (row.low, row.high) == pytest.approx(wilson(by_mean / 30, 30))
    row = row_of(frame, name="accuracy_scorer_tools", scorer="mean_token")
    assert (row.value, row.n) == (pytest.approx(tools_right / 20), 20)
    assert row_of(frame, name="scorer_agreement", scorer="mean_token").value == pytest.approx(same / 30)
    assert of(frame, name="scorer_agreement", scorer="sum").empty


# -- orders ----------------------------------------------------------------------------------------------------

NAMES = ["a", "b", "c", "d"]


def first_slot(order: list[str]) -> Scores:
    """A model that takes what is shown first, whatever it is."""
    return {name: 0.0 if slot == 0 else -800.0 for slot, name in enumerate(order)} | {None: -800.0}


def even(order: list[str]) -> Scores:
    return dict.fromkeys(order, -2.0) | {None: -6.0}


def fond_of_b(order: list[str]) -> Scores:
    return {name: 0.0 if name == "b" else -800.0 for name in order} | {None: -800.0}


def reordered(tmp_path: Path, given: Any, score: Any, target: Any = "a") -> pd.DataFrame:
    shown = {"t1": NAMES, "t2": ["c", "a", "d", "b"]}
    run = written(tmp_path, [record(task_id, score(names), target) for task_id, names in shown.items()])
    given([row for task_id, names in shown.items() for row in all_orders(task_id, names, score)])
    return table(orders, run)


def test_a_model_that_takes_the_first_slot_has_the_largest_position_bias_and_no_tool_bias(tmp_path, given):
    frame = of(reordered(tmp_path, given, first_slot), experiment="order")
    for task_id, n in (("t1", 24), ("t2", 24), ("", 2)):
        row = row_of(frame, name="position_bias", task_id=task_id, n_tools=None)
        assert (row.value, row.n) == (pytest.approx(1 - 1 / 4), n)
        assert row_of(frame, name="tool_bias", task_id=task_id, n_tools=None).value == pytest.approx(
            0, abs=1e-12
        )
    assert row_of(frame, name="position_bias_choice", n_tools=None).value == pytest.approx(1 - 1 / 4)
    assert row_of(frame, name="first_slot_rate", n_tools=None).value == 1
    assert row_of(frame, name="baseline_first_slot", n_tools=None).value == 0.25


def test_its_probabilities_averaged_over_all_orders_are_even_and_exact(tmp_path, given):
    frame = reordered(tmp_path, given, first_slot)
    rows = of(frame, name="probability_orders", task_id="t2")
    assert rows.tool.tolist()[:4] == ["c", "a", "d", "b"]
    assert rows.value.to_numpy() == pytest.approx([0.25] * 4 + [0])
    assert (rows.n == 24).all()
    assert rows.low.isna().all()
    assert row_of(frame, name="flip_rate").value == 1
    assert row_of(frame, name="accuracy_mean_order").value == pytest.approx(0.25)


def test_a_model_without_preferences_has_no_bias_of_either_kind(tmp_path, given):
    frame = reordered(tmp_path, given, even)
    biases = frame[frame.name.str.contains("_bias")]
    assert len(biases) == 2 * 2 + 4 * 4, (
        "two tasks, then four rows for all and for 4 tools, by orders and as shown"
    )
    assert biases.value.abs().max() < 1e-12
    assert row_of(frame, name="flip_rate").value == 0, "all candidates tie, in every order"


def test_a_model_that_is_fond_of_one_tool_has_tool_bias_and_no_position_bias(tmp_path, given):
    frame = of(reordered(tmp_path, given, fond_of_b, "b"), experiment="order")
    assert row_of(frame, name="tool_bias", task_id="", n_tools=None).value == pytest.approx(3 / 4)
    assert row_of(frame, name="position_bias", task_id="", n_tools=None).value == pytest.approx(0, abs=1e-12)
    assert row_of(frame, name="first_slot_rate", n_tools=None).value == pytest.approx(0.25)
    # As shown it stands second and fourth: slots get 0, ½, 0, ½.
    shown = of(table(orders, Run(tmp_path / "run")), experiment=None)
    assert row_of(shown, name="position_bias", n_tools=None).value == pytest.approx((0.25 * 2 + 0.25 * 2) / 2)


def noisy(order: list[str]) -> Scores:
    generator = np.random.default_rng([ord(name[0]) for name in order])
    return {name: float(-generator.exponential(2)) for name in order} | {None: -2.0}


def test_averages_over_orders_agree_with_a_plain_enumeration(tmp_path, given):
    frame = reordered(tmp_path, given, noisy)
    slot_p, chosen, hits, tool_hits = Counter(), [], 0, 0
    total: Counter[str | None] = Counter()
    for order in itertools.permutations(NAMES):
        scores = noisy(list(order))
        mass = sum(math.exp(value) for value in scores.values())
        tools_mass = mass - math.exp(scores[None])
        for name, value in scores.items():
            total[name] += math.exp(value) / mass / 24
        for slot, name in enumerate(order):
            slot_p[slot] += math.exp(scores[name]) / tools_mass / 24
        chosen.append(max(scores, key=scores.__getitem__))
        hits += chosen[-1] == "a"
        tool_hits += max(order, key=scores.__getitem__) == "a"
    for row in of(frame, name="probability_orders", task_id="t1").itertuples():
        assert row.value == pytest.approx(total[row.tool if isinstance(row.tool, str) else None], abs=1e-12)
    delta = sum(abs(slot_p[slot] - 0.25) for slot in range(4)) / 2
    assert row_of(frame, name="position_bias", task_id="t1").value == pytest.approx(delta, abs=1e-12)
    for slot in range(4):
        row = row_of(frame, name="slot_probability", task_id="t1", n_tools=4, slot=slot + 1)
        assert row.value == pytest.approx(slot_p[slot])
    assert len(set(chosen)) > 1
    assert row_of(frame, name="flip_rate").value == 1
    assert row_of(frame, name="accuracy_mean_order").value == pytest.approx(hits / 24)
    assert row_of(frame, name="accuracy_mean_order_tools").value == pytest.approx(tool_hits / 24)
    right = max(total, key=total.__getitem__) == "a"
    assert row_of(frame, name="accuracy_orders").value == float(right)


def test_some_orders_give_an_interval_that_holds_the_mean_over_all_about_as_often_as_it_says():
    case = choice_of(record("t", noisy(NAMES), "a"))
    every = [
        conditions.Scores(list(o), np.array([noisy(list(o))[name] for name in case.names]))
        for o in itertools.permutations(NAMES)
    ]
    true = softmax(np.array([c.log_probs for c in every])).mean(0)[0]
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        some = [every[i] for i in generator.choice(24, 12, replace=False)]
        row = next(orders._probability(orders.Orders.of(case, some)))
        assert row.n == 12
        assert row.low is not None
        assert row.high is not None
        p = [softmax(condition.log_probs)[0] for condition in some]
        half = scipy.stats.t(11).ppf(0.975) * scipy.stats.sem(p) * math.sqrt(1 - 12 / 24)
        assert (row.low, row.high) == pytest.approx((max(0, np.mean(p) - half), np.mean(p) + half))
        held += row.low <= true <= row.high
    assert 0.9 < held / 300 < 0.99


def test_an_order_that_is_given_twice_counts_once():
    case = choice_of(record("t", {"a": -1.0, "b": -2.0, None: -3.0}, "a"))
    given = [conditions.Scores(o, case.log_probs) for o in (["a", "b"], ["b", "a"], ["b", "a"])]
    assert orders.Orders.of(case, given).is_complete


def test_conditions_that_are_not_those_of_the_task_are_refused(tmp_path, given):
    invented = record("t", {"a": -1.0, "b": -2.0, None: -3.0}, "a")
    case, run = choice_of(invented), written(tmp_path, [invented])
    short: Scores = {"a": -1.0, None: -2.0}
    given(rows("t", "order", [["a", "b"]], [short]))
    with pytest.raises(ValueError, match="'t': order 0: not the task's candidates"):
        conditions.scores_by_task(run, "order")
    given(2 * rows("t", "order", [["a", "b"]], [short]))
    with pytest.raises(ValueError, match="'t': 'a' is scored twice in order 0"):
        conditions.scores_by_task(run, "order")
    with pytest.raises(ValueError, match="no order of its tools"):
        orders.Orders.of(case, [conditions.Scores(["a", "x"], case.log_probs)])


def test_without_an_order_experiment_biases_are_those_of_the_run_as_shown_by_number_of_tools(tmp_path, given):
    records = [record(f"t{n}", first_slot(["a", "b"]), "b") for n in range(3)]
    records += [record("u", fond_of_b(["a", "c", "b"]), "b")]
    frame = table(orders, written(tmp_path, records))
    assert set(frame.name) & {"probability_orders", "flip_rate", "accuracy_orders"} == set()
    assert row_of(frame, name="position_bias", n_tools=2).value == pytest.approx(1 / 2)
    assert row_of(frame, name="position_bias", n_tools=3).value == pytest.approx(2 / 3)
    combined = row_of(frame, name="position_bias", n_tools=None)
    assert (combined.value, combined.n) == (pytest.approx((3 * 1 / 2 + 2 / 3) / 4), 4)
    assert row_of(frame, name="slot_rate", n_tools=2, slot=1).value == 1
    # a: 3 of 3 + 0 of 1; even shares 3/2 + 1/3. b: 0 + 1 against 3/2 + 1/3. c: 0 against 1/3.
    gaps = [3 - 3 / 2 - 1 / 3, 1 - 3 / 2 - 1 / 3, -1 / 3]
    assert row_of(frame, name="tool_bias", n_tools=None).value == pytest.approx(sum(map(abs, gaps)) / 4 / 2)


def test_a_bias_stands_beside_what_exchanged_places_give(tmp_path, given):
    records = [record(f"t{n}", noisy([*NAMES, str(n)]), "a") for n in range(24)]
    frame = table(orders, written(tmp_path, records))
    row = row_of(frame, name="position_bias", n_tools=None)
    p = np.array([[e["choice_probability"] for e in r["tool_probabilities"][:-1]] for r in records])
    assert row.value == pytest.approx(np.abs(p.mean(0) - 1 / 5).sum() / 2)
    generator = np.random.default_rng(7)
    slow = [
        np.abs(np.mean([generator.permutation(of_task) for of_task in p], axis=0) - 1 / 5).sum() / 2
        for _ in range(400)
    ]
    chance = row_of(frame, name="position_bias_chance", n_tools=None)
    assert chance.value == pytest.approx(np.mean(slow), rel=0.05)
    assert (chance.low, chance.high) == pytest.approx(np.quantile(slow, [0.025, 0.975]), rel=0.15)
    assert (row.low == 0) == (row.value <= chance.high), "noise alone gives as much"


# -- confusion -------------------------------------------------------------------------------------------------


def test_the_confusion_matrix_is_that_of_sklearn(tmp_path, given):
    records = drawn(60, seed=5)
    frame = of(table(confusion, written(tmp_path, records)), name="confusion")
    labels = [*NAMES, NO_TOOL]
    expected = confusion_matrix(
        [r["target"] or NO_TOOL for r in records],
        [r["chosen"] or NO_TOOL for r in records],
        labels=labels,
    )
    for (i, right), (j, chosen) in itertools.product(enumerate(labels), enumerate(labels)):
        where = {"tool": None, "span": right} if right == NO_TOOL else {"tool": right, "span": None}
        row = row_of(frame, other_tool=chosen, **where)
        assert row.n == expected[i].sum()
        assert row.value * row.n == pytest.approx(expected[i, j])
        assert (row.low, row.high) == pytest.approx(wilson(row.value, row.n))


def test_the_most_confused_pair_comes_first_and_right_choices_last(tmp_path, given):
    wrong = [record(f"t{n}", {"a": -3.0, "b": -1.0, "c": -4.0, None: -5.0}, "a") for n in range(4)]
    more = [record("u0", {"a": -3.0, "b": -4.0, "c": -1.0, None: -5.0}, "a")]
    right = [record(f"v{n}", {"a": -3.0, "b": -1.0, "c": -4.0, None: -5.0}, "b") for n in range(9)]
    frame = table(confusion, written(tmp_path, [*right, *more, *wrong]))
    counts = of(frame, name="confusion")
    pairs = list(zip(counts.tool, counts.other_tool, counts.value, counts.n, strict=True))
    assert pairs[:2] == [("a", "b", 0.8, 5), ("a", "c", 0.2, 5)]
    assert {pair[:2] for pair in pairs[-2:]} == {("a", "a"), ("b", "b")}
    mass = of(frame, name="confusion_mass")
    p = [e["probability"] for r in [*wrong, *more] for e in r["tool_probabilities"] if e["tool"] == "b"]
    first = mass.iloc[0]
    assert (first.tool, first.other_tool, first.n) == ("a", "b", 5)
    assert first.value == pytest.approx(np.mean(p))


def test_a_task_with_several_right_tools_counts_for_the_one_that_came_nearest(tmp_path, given):
    records = [
        record("t1", {"a": -1.0, "b": -2.0, "c": -3.0, None: -4.0}, ["a", "b"]),
        record("t2", {"a": -5.0, "b": -2.0, "c": -1.0, None: -4.0}, ["a", "b"]),
    ]
    frame = table(confusion, written(tmp_path, records))
    counts = of(frame, name="confusion")
    by_name = {(row.tool, row.other_tool): (row.value, row.n) for row in counts.itertuples()}
    assert by_name[("a", "a")] == (1, 1)
    assert by_name[("b", "c")] == (1, 1)
    assert ("a", "b") not in by_name
    assert of(frame, name="confusion_mass", other_tool="b").empty


# -- all together ----------------------------------------------------------------------------------------------


@pytest.mark.timing
def test_250_tasks_with_orders_take_seconds(tmp_path, given):
    records, entries = [], []
    for number in range(sized(250)):
        names = [f"tool_{(number + i) % 15}" for i in range(4)]
        tokens: dict[str | None, list[float]] = {
            n: [-1.0 - (number * 7 + i) % 5, -0.2] for i, n in enumerate([*names, None])
        }
        records.append(record(f"t{number:03}", {}, names[number % 4], tokens=tokens))
        entries += all_orders(f"t{number:03}", names, noisy)
        free = [{n: -1.0 - i for n in [*names, None]} for i in range(3)]
        entries += rows(f"t{number:03}", "content_free", [{"text": ""}] * 3, free)
    given(entries)
    run = written(tmp_path, records)
    frames = []
    assert within(10, references(lambda: frames.append(table(tool, run))))  # 4
    (frame,) = frames
    assert set(scorers.SCORERS) <= set(frame.scorer.dropna())
    assert set(frame.analyzer) == {"tool"}
    assert frame.value.notna().all()


def test_a_run_without_tool_tasks_has_no_rows(tmp_path, given):
    assert table(tool, written(tmp_path, [])).empty
