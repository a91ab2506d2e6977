"""Foresight: areas and curves against scikit-learn and plain loops; planted errors that are there to be seen, or are not."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from probe.analyzers import foresight
from probe.analyzers.foresight import repair
from probe.analyzers.foresight.fits import Split, fit_probe
from probe.analyzers.foresight.repair import Readable, readouts
from probe.analyzers.foresight.signals import SIGNALS, DecisionStates, Observed, SignalInputs
from probe.analyzers.rows import to_table
from probe.errors import UsageError
from probe.maths.auroc import auroc, auroc_interval, mann_whitney
from probe.maths.folds import FOLDS
from probe.maths.ridge import FoldRidge
from probe.maths.risk import area_gain, area_intervals, lowest_area, risk_area, risk_curve
from probe.maths.statistics import picks
from probe.report.foresight import card
from probe.runs.views.attention import Attention
from probe.runs.views.conditions import Scores
from tests.defined import check_defined
from tests.made_up_runs import PlantedRun, choice_of, condition, planted_task

# -- areas -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 1000])
def test_the_auroc_is_scikit_learns_with_and_without_ties(levels):
    generator = np.random.default_rng(levels)
    scores, wrong = generator.integers(levels, size=(60, 4)).astype(float), generator.random((60, 4)) < 0.3
    pairs = wrong.sum(0) * (~wrong).sum(0)
    expected = [roc_auc_score(wrong[:, k], scores[:, k]) for k in range(4)]
    assert mann_whitney(scores, wrong) / pairs == pytest.approx(expected)


def test_the_interval_of_an_auroc_has_the_standard_errors_of_its_ends():
    """Where nothing is told the variance is (m + n + 1) / 12mn, the Mann–Whitney test's; ends keep their distance."""
    m, n = 31, 41
    error = np.sqrt((m + n + 1) / (12 * m * n))
    low, _ = auroc_interval(0.5 + 1.959964 * error, m, n) or (0, 0)
    assert low == pytest.approx(0.5, abs=1e-6)
    wide, _ = auroc_interval(0.5 + 1.959964 * error * 2, m, n, widening=4) or (0, 0)
    assert wide == pytest.approx(0.5, abs=1e-6)
    assert auroc_interval(1.0, 20, 20) == (pytest.approx(0.87, abs=0.05), 1.0), "1 is no certainty"
    assert auroc_interval(0.8, 4, 40) is None


def test_a_kind_that_is_spread_more_widens_the_interval():
    """By DeLong's variance, the placements redone in a loop over pairs."""
    generator = np.random.default_rng(3)
    wrong, other = 3 * generator.normal(size=8), generator.normal(size=60)
    wins = np.array([[(a > b) + (a == b) / 2 for b in other] for a in wrong])
    variance = wins.mean(1).var(ddof=1) / 8 + wins.mean(0).var(ddof=1) / 60
    area = auroc(np.concatenate([wrong, other]), np.arange(68) < 8)
    assert area is not None and area.value == pytest.approx(wins.mean())
    plain = auroc_interval(area.value, 8, 60) or (0, 0)
    wide = area.interval or (0, 0)
    half = (8 + 60) / 2 - 1
    a = area.value
    assumed = a * (1 - a) * (1 + half * (1 - a) / (2 - a) + half * a / (1 + a)) / 480
    assert variance > assumed and wide[0] < plain[0] and wide[1] > plain[1]
    assert wide == pytest.approx(auroc_interval(a, 8, 60, variance / assumed))


def slow_curve(wrong: list[bool]) -> list[float]:
    return [sum(wrong[:k]) / k for k in range(1, len(wrong) + 1)]


def test_risk_and_its_area_are_those_of_a_plain_loop():
    generator = np.random.default_rng(1)
    confidence, wrong = generator.normal(size=30), generator.random(30) < 0.4
    ranked = [bool(wrong[i]) for i in sorted(range(30), key=lambda i: -confidence[i])]
    assert risk_curve(confidence, wrong) == pytest.approx(slow_curve(ranked))
    assert risk_area(confidence, wrong) == pytest.approx(np.mean(slow_curve(ranked)))
    assert lowest_area(wrong) == pytest.approx(np.mean(slow_curve(sorted(ranked))))
    assert area_gain(-wrong.astype(float), wrong) == pytest.approx(1)


def test_equal_confidences_stand_in_their_mean_order():
    confidence, wrong = np.array([2.0, 2, 1, 1, 1]), np.array([True, False, False, True, False])
    curves = [
        slow_curve([bool(wrong[i]) for i in (*first, *last)])
        for first in itertools.permutations((0, 1))
        for last in itertools.permutations((2, 3, 4))
    ]
    assert risk_curve(confidence, wrong) == pytest.approx(np.mean(curves, 0))
    assert risk_area(confidence, wrong) == pytest.approx(np.mean(curves))
    assert risk_area(np.zeros(5), wrong) == pytest.approx(wrong.mean()), "a random order has the base rate"


def test_a_resampled_area_is_that_of_the_tasks_drawn():
    generator = np.random.default_rng(2)
    confidence, wrong = generator.integers(4, size=24).astype(float), generator.random(24) < 0.5
    drawn = generator.integers(24, size=24)
    weights = np.bincount(drawn, minlength=24)[None].astype(float)
    from probe.maths.risk import _areas, _gains

    assert _areas(confidence, wrong, weights)[0] == pytest.approx(risk_area(confidence[drawn], wrong[drawn]))
    assert _gains(confidence, wrong, weights)[0] == pytest.approx(area_gain(confidence[drawn], wrong[drawn]))
    of_area, _ = area_intervals(confidence, wrong)
    assert of_area is not None and of_area[0] < risk_area(confidence, wrong) < of_area[1]
    assert area_intervals(confidence[:10], wrong[:10]) == (None, None)


# -- signals -----------------------------------------------------------------------------------------------------------


def test_signals_of_a_task_are_those_of_their_definitions():
    log_probs = {"a": math.log(0.4), "b": math.log(0.2), None: math.log(0.1)}
    task = planted_task("t", log_probs, target="a", tokens={"a": 10, "b": 20})
    mass = np.array([[[0.5, 0.2, 0.2, 0.1]]])
    attention = Attention([0], ["bos", "tool:a", "tool:b", "user"], np.array([1, 10, 20, 5]), mass)
    orders = [Scores(None, np.log(p)) for p in ([0.4, 0.2, 0.1], [0.1, 0.2, 0.1], [0.3, 0.3, 0.1])]
    seen = SignalInputs(choice_of(task.record), attention, orders)
    odds = np.log([4 / 3, 2 / 5, 1 / 6])
    p = np.array([4, 2, 1]) / 7
    expected = {
        "margin": np.log(2),
        "entropy": (p * np.log(p)).sum(),
        "log_odds_gap": odds[0] - odds[:2].mean(),
        "attention_margin": 2 / 3 - 1 / 3,
        "order_agreement": (1 + 0 + 1 / 2) / 3,
        "candidate_mass": np.log(0.7),
        "log_prob": np.log(0.4),
    }
    assert {name: signal(seen) for name, signal in SIGNALS.items()} == pytest.approx(expected)
    unseen = seen._replace(attention=None, orders=orders[:1])
    assert np.isnan([SIGNALS[name](unseen) for name in ("attention_margin", "order_agreement")]).all()


# -- planted runs ------------------------------------------------------------------------------------------------------


def run_of(tasks: Any, rows: Any = (), weights: str = "same") -> Any:
    """A run that was never run, as analyzers ask of it."""
    run: Any = PlantedRun(list(tasks), list(rows))
    run.run, run.path = {"model": {"weights_hash": weights}}, Path("made up")
    return run


def planted(
    n: int = 50,
    *,
    n_wrong: int = 20,
    margin: bool = False,
    direction: float = 0.0,
    seed: int = 0,
    weights: str = "same",
) -> Any:
    """A run in which a wrong choice has a smaller margin than any right one, and whose state of layer 1 says so much of
    whether the choice is wrong."""
    generator = np.random.default_rng(seed)
    wrong = generator.permutation(np.arange(n) < n_wrong)
    tasks = []
    for number in range(n):
        sure = float(0.1 + generator.random() + 2 * (margin and not wrong[number]))
        scores = {"a": -1.0, "b": -1.0 - sure, None: -9.0 - float(generator.random())}
        states = generator.normal(size=(2, 2, 12))
        states[1, 1, 0] += direction * wrong[number]
        tensors = {
            "resid_post": torch.from_numpy(states).float(),
            "rows": torch.tensor([3, 4]),
            "decisions": torch.tensor([4]),
        }
        task = planted_task(f"t{number}", scores, "b" if wrong[number] else "a", tensors=tensors)
        task.record["prompt"] = f"{seed} {number}"
        tasks.append(task)
    return run_of(tasks, weights=weights)


def measured(run: Any, train: Any = None) -> pd.DataFrame:
    return to_table(foresight.measures(run, train)).to_pandas()


def row_of(frame: pd.DataFrame, name: str, signal: str, rule: str) -> pd.Series:
    rows = frame[
        (frame.name == name)
        & (frame.signal == signal)
        & (frame.rule == rule)
        & frame.layer.isna()
        & frame.fold.isna()
    ]
    assert len(rows) == 1, (name, signal, rule, len(rows))
    return rows.iloc[0]


@pytest.fixture(scope="module")
def telling() -> pd.DataFrame:
    return measured(planted(margin=True, direction=30), planted(margin=True, direction=30, seed=1))


def test_a_signal_that_decides_the_error_has_an_auroc_of_1(telling):
    assert row_of(telling, "auroc", "margin", "raw").value == 1
    assert row_of(telling, "aurc_gain", "margin", "raw").value == pytest.approx(1)
    assert row_of(telling, "auroc", "candidate_mass", "raw").value == 0, "here a narrow choice has more mass"
    assert row_of(telling, "auroc", "candidate_mass", "transfer").value == 1, (
        "the sign is learned with the fit"
    )
    for rule in ("held_out", "transfer"):
        area = row_of(telling, "auroc", "linear_probe", rule)
        assert area.value == 1 and area.low > 0.8 and area.high == 1
        lowest = telling[(telling.name == "aurc_lowest") & (telling.signal == "linear_probe")].value.iloc[0]
        assert row_of(telling, "aurc", "linear_probe", rule).value == pytest.approx(lowest, rel=0.1)
        assert row_of(telling, "brier_gain", "linear_probe", rule).low > 0.1
    assert row_of(telling, "auroc_p", "linear_probe", "held_out").value <= 0.01
    layers = telling[(telling.name == "chosen_layer") & (telling.signal == "linear_probe")]
    assert (
        set(layers.value) == {1} and set(layers.rule) == {"held_out", "transfer"} and len(layers) == FOLDS + 1
    )
    best = telling[(telling.name == "chosen_folds")]
    assert best.set_index("signal").value.to_dict() == {"margin": FOLDS}


def test_every_measure_of_foresight_is_made_with_its_unit_and_columns(telling):
    read = {name: "no attention and no states of tools" for name in ("readout_layer", "repair_overlap")}
    check_defined(telling, "foresight", {(name, "run"): why for name, why in read.items()})


def test_risks_and_quarters_add_up_to_the_error_rate(telling):
    for (signal, rule), rows in telling[telling.name == "error_rate_quarter"].groupby(["signal", "rule"]):
        assert (rows.value * rows.n).sum() / rows.n.sum() == pytest.approx(0.4), (signal, rule)
    whole = telling[(telling.name == "risk") & (telling.coverage == 1)]
    assert whole.value.to_list() == pytest.approx([0.4] * len(whole))


def test_what_is_fitted_where_the_sign_is_opposite_foretells_the_opposite():
    frame = measured(planted(direction=6), planted(direction=-6, seed=1))
    area = row_of(frame, "auroc", "linear_probe", "transfer")
    assert area.high < 0.5 and row_of(frame, "aurc_gain", "linear_probe", "transfer").value < 0
    assert row_of(frame, "brier_gain", "linear_probe", "transfer").high < 0


def test_the_probe_is_scikit_learns_within_the_folds():
    """Layer and scores redone by scikit-learn, a loop over folds, and scikit-learn's AUROC."""
    seen = Observed.of(planted(direction=1.5, n=50, n_wrong=20))
    split = Split.of(seen.wrong, permutations=3)
    assert split is not None
    probe = fit_probe(seen.states, split)

    def predicted(x, train, test):
        model = Ridge(alpha=x.shape[1]).fit(x[train], seen.wrong[train].astype(float))
        return model.predict(x[test])

    def wins(x, train, fold):
        test = split.folds == fold
        area = roc_auc_score(seen.wrong[test], predicted(x, train, test))
        return area * seen.wrong[test].sum() * (~seen.wrong[test]).sum()

    xs = {layer: StandardScaler().fit_transform(seen.states.layer(layer)) for layer in seen.states.layers}
    won = 0.0
    for fold in range(FOLDS):
        others = [k for k in range(FOLDS) if k != fold]
        inner = {
            layer: sum(wins(x, ~np.isin(split.folds, [fold, k]), k) for k in others)
            for layer, x in xs.items()
        }
        layer = max(inner, key=lambda layer: inner[layer])
        assert probe.nested.chosen[fold] == layer
        won += wins(xs[layer], split.folds != fold, fold)
    assert probe.nested.wins[:, 0].sum() == pytest.approx(won, abs=0.51), "float32 may turn a pair over"


@pytest.mark.parametrize("n", [30, 90])
def test_a_fit_without_folds_is_scikit_learns_in_rows_and_in_features(n):
    generator = np.random.default_rng(n)
    x, y, folds = generator.normal(size=(n, 50)) + 3, generator.normal(size=(n, 2)), np.arange(n) % 5
    x[:, 7] = 1.0
    scaled = StandardScaler().fit_transform(x)
    train = ~np.isin(folds, [1, 4])
    expected = Ridge(alpha=50).fit(scaled[train], y[train]).predict(scaled[folds == 4])
    assert FoldRidge(x, folds).predict(y, [4, 1])[4] == pytest.approx(expected, abs=1e-9)


def test_labels_exchanged_within_folds_keep_their_number():
    wrong = np.arange(43) % 3 == 0
    split = Split.of(wrong, permutations=5)
    assert split is not None and np.bincount(split.folds).tolist() == [9, 9, 9, 8, 8]
    for fold in range(FOLDS):
        counts = split.labels[split.folds == fold].sum(0)
        assert (counts == counts[0]).all() and counts[0] in (3, 2)
    assert (split.labels[:, 1:] != split.labels[:, :1]).any()
    assert Split.of(np.arange(40) < 9) is None


def false_alarms(samples: int, n: int, layers: int, width: int, seed: int = 0) -> tuple[float, float, float]:
    """Of runs of noise: the share whose interval leaves .5 out, whose p is at most .05, and the mean AUROC; the layer is
    chosen."""
    generator = np.random.default_rng(seed)
    alarms, ps, areas = [], [], []
    for _ in range(samples):
        wrong = generator.permutation(np.arange(n) < 0.4 * n)
        split = Split.of(wrong, permutations=39)
        assert split is not None
        noise = [generator.normal(size=(n, width)).astype(np.float32) for _ in range(layers)]
        states: Any = _Held(noise)
        held = fit_probe(states, split).nested
        area, interval, p = held.estimate(split)
        assert interval is not None
        alarms.append(not interval[0] <= 0.5 <= interval[1])
        ps.append(p <= 0.05)
        areas.append(area)
    return float(np.mean(alarms)), float(np.mean(ps)), float(np.mean(areas))


class _Held:
    def __init__(self, states: list[np.ndarray]):
        self.layers, self._states = list(range(len(states))), states

    def layer(self, layer: int) -> np.ndarray:
        return self._states[layer]


def test_noise_raises_few_alarms_whatever_layer_is_chosen():
    alarms, ps, area = false_alarms(40, n=40, layers=2, width=12)
    assert alarms <= 0.15 and ps <= 0.15, "of 40 a rate of 5 % gives more than 6 in one of 200"
    assert abs(area - 0.5) < 0.06


@pytest.mark.slow
def test_noise_raises_alarms_at_their_rate():
    alarms, ps, area = false_alarms(600, n=60, layers=6, width=64)
    assert 0.02 < alarms < 0.08 and 0.02 < ps < 0.08
    assert abs(area - 0.5) < 0.012


def test_fits_that_share_tasks_vary_twice_as_much_where_nothing_can_be_foretold():
    """Each pair of folds enters twice, with the same products of labels."""
    generator = np.random.default_rng(0)
    factors = []
    for _ in range(6):
        split = Split.of(generator.permutation(np.arange(60) < 24), permutations=199)
        assert split is not None
        noise: Any = _Held([generator.normal(size=(60, 64)).astype(np.float32)])
        factors.append(fit_probe(noise, split).nested.widening(split))
    assert 1.6 < np.mean(factors) < 2.5


# -- what is absent ----------------------------------------------------------------------------------------------------


def rates(run):
    return [row for row in to_table(foresight.measures(run)).to_pylist() if row["name"] == "error_rate"]


@pytest.mark.parametrize("n_wrong", [0, 30])
def test_where_all_are_right_or_all_wrong_there_is_the_rate_and_a_reason(n_wrong):
    run = planted(n=30, n_wrong=n_wrong)
    frame = measured(run)
    assert not {"auroc", "aurc", "risk", "brier"} & set(frame.name)
    assert frame[frame.name == "error_rate"].value.unique().tolist() == [n_wrong / 30]
    (reason,) = foresight.absences(rates(run))
    assert f"all of 30 choices are {'wrong' if n_wrong else 'right'}" in reason


def test_with_few_errors_nothing_is_fitted_and_signals_stay():
    run = planted(n=40, n_wrong=6)
    frame = measured(run)
    assert set(frame[frame.name == "auroc"].rule) == {"raw"} and "brier" not in set(frame.name)
    assert any("6 of 40" in reason for reason in foresight.absences(rates(run)))


def test_signals_without_their_data_are_absent_and_named():
    run = planted(n=40, n_wrong=20)
    assert not {"attention_margin", "order_agreement"} & set(measured(run).signal.dropna())
    text = "; ".join(foresight.absences(rates(run)))
    assert "attn_to_spans" in text and "probe analyze RUN order" in text and "resid_post" not in text


def test_orders_are_read_from_the_runs_experiment():
    run = planted(n=30, n_wrong=12)
    rows = []
    for task in run:
        base = {entry["tool"]: entry["log_prob"] for entry in task.record["tool_probabilities"]}
        other = base | {"b": 0.0} if task.record["target"] == "b" else base
        rows += condition(task.id, "order", 0, base, detail=["a", "b"])
        rows += condition(task.id, "order", 1, other, detail=["b", "a"])
    assert row_of(measured(run_of(run, rows)), "auroc", "order_agreement", "raw").value == 1


def renamed(run: Any) -> list[Any]:
    """Its tasks under other ids."""
    for task in run:
        task.id = task.record["id"] = f"other {task.id}"
    return [*run]


def test_tasks_that_both_runs_have_are_not_fitted_on():
    run = planted(direction=30)
    with pytest.raises(UsageError, match="no tool task"):
        measured(run, planted(direction=30))
    both = run_of([*run, *renamed(planted(direction=30, n=40, n_wrong=16, seed=1))])
    fitted = measured(run, both)
    assert row_of(fitted, "auroc", "linear_probe", "transfer").value == 1
    layer = fitted[(fitted.name == "chosen_layer") & (fitted.rule == "transfer")]
    assert layer.n.to_list() == [40], "those of the other run alone"


def test_another_models_probe_is_not_transferred():
    frame = measured(planted(direction=30), planted(direction=30, seed=1, weights="another"))
    assert "linear_probe" not in set(frame[frame.rule == "transfer"].signal)
    assert "margin" in set(frame[frame.rule == "transfer"].signal)


# -- states ------------------------------------------------------------------------------------------------------------


def test_states_are_read_a_layer_at_a_time_and_in_parts():
    run = planted(n=5, n_wrong=2)
    states = DecisionStates()
    for number, task in enumerate(run):
        states.add(number, task)
    expected = np.stack([task["resid_post"][:, 1].numpy() for task in run])
    for layer in range(2):
        assert (states.layer(layer) == expected[:, layer]).all()
    kept = np.array([False, True, False, True, True])
    part = states.of(kept)
    assert part.tasks == [0, 1, 2] and (part.layer(1) == expected[kept, 1]).all()
    assert states.tasks == [0, 1, 2, 3, 4]


# -- repair ------------------------------------------------------------------------------------------------------------


def readable(n: int = 40, seed: int = 0, *, cosine: bool = True, attention: bool = True) -> Readable:
    """Tasks whose model takes the first of three tools. The right one, at random, is the one that head 1 of layer 2 attends
    to, and whose state in layer 1 is the decision's."""
    generator, seen = np.random.default_rng(seed), Readable(layers=[0, 1, 2])
    for number in range(n):
        target = int(generator.integers(3))
        seen.ids.append(f"t{number}")
        seen.tools.append(["a", "b", "c"])
        seen.right.append(np.arange(3) == target)
        seen.choices.append("a")
        rates = generator.random((3, 2, 3))
        rates[2, 1, target] += 2 * attention
        seen.attention[number] = picks(rates) @ seen.right[-1]
        states = generator.normal(size=(4, 3, 24))
        states[1 + target, 1] += 2 * states[0, 1] * cosine
        sizes = np.linalg.norm(states, axis=-1)
        cosine_of = np.einsum("tld,ld->lt", states[1:], states[0]) / (sizes[1:] * sizes[0]).T
        seen.cosine[number] = picks(cosine_of) @ seen.right[-1]
        seen.states.add(states)
    return seen


def test_readouts_find_what_the_head_and_the_layer_hold():
    picked = dict(readouts(readable(n=100)))
    assert set(picked) == {"attention", "cosine", "linear_probe"}
    assert picked["attention"].hits.mean() == 1 and picked["attention"].layers == [2] * FOLDS
    assert picked["cosine"].hits.mean() > 0.9 and picked["cosine"].layers == [1] * FOLDS
    assert picked["linear_probe"].hits.mean() > 0.7 and picked["linear_probe"].layers == [1] * FOLDS


def test_readouts_of_noise_are_no_better_than_a_guess():
    hits = [
        readout.hits.mean()
        for seed in range(6)
        for _, readout in readouts(readable(seed=seed, cosine=False, attention=False))
    ]
    assert abs(np.mean(hits) - 1 / 3) < 4 * np.sqrt(2 / 9 / (6 * 40)), "the layer is chosen on other tasks"


def test_a_repair_counts_failures_and_what_it_breaks():
    seen = readable(n=60)
    rows = to_table(repair.rows(seen, None)).to_pandas().set_index(["name", "scorer"])
    model = seen.model
    assert rows.loc[("repaired", "attention")].value == 1
    assert rows.loc[("repaired", "attention")].n == (model == 0).sum()
    assert rows.loc[("broken", "attention")].n == (model == 1).sum()
    assert rows.loc[("readout_gain", "attention")].value == pytest.approx(1 - model.mean())
    assert rows.loc[("readout_accuracy", "guess")].value == pytest.approx(1 / 3)


def test_what_prompting_gives_is_told_apart():
    """The other run chooses `b` throughout: it repairs the failures whose right tool is `b`, and no others."""
    seen = readable(n=60)
    other = run_of(
        planted_task(name, {"a": -2.0, "b": -1.0, "c": -3.0, None: -9.0}, "a") for name in seen.ids
    )
    rows = to_table(repair.rows(seen, other)).to_pandas().set_index(["name", "scorer"])
    failed = seen.model == 0
    wanted = np.array([right[1] for right in seen.right])
    assert rows.loc[("repaired", "prompted")].value == pytest.approx(wanted[failed].mean())
    assert rows.loc[("broken", "prompted")].value == 1
    assert rows.loc[("repair_overlap", "attention")].value == pytest.approx(wanted[failed].mean())
    strange = run_of([planted_task("other", {"a": -2.0, None: -9.0}, target="a")])
    with pytest.raises(UsageError, match="none of the tasks"):
        list(repair.rows(seen, strange))


def test_another_prompt_that_too_few_tasks_can_tell_of_is_refused():
    tasks = [planted_task(str(k), {"a": -2.0, "b": -1.0, None: -9.0}, "a") for k in range(19)]
    run = run_of([*tasks, planted_task("none", {"a": -2.0, "b": -1.0, None: -9.0}, None)])
    with pytest.raises(UsageError, match="19 tasks in which some"):
        foresight.refuse_misfits(run, None, run)


# -- shown -------------------------------------------------------------------------------------------------------------


def rows_for_report(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {key: None if value is None or value != value else value for key, value in row.items()}
        for row in frame.to_dict("records")
    ]


def test_the_card_has_every_signal_and_its_curve(telling):
    shown = card(rows_for_report(telling))
    assert shown is not None
    signals, readouts_shown = shown["tables"]
    aurocs = telling[(telling.name == "auroc") & telling.layer.isna()]
    assert len(signals["rows"]) == len(aurocs[["signal", "rule"]].drop_duplicates())
    assert all(len(row) == len(signals["head"]) + 1 for row in signals["rows"])
    transferred = next(row for row in signals["rows"] if row[0] == "linear probe" and "other run" in row[1])
    assert transferred[2]["value"] == 1
    *risks, layers = shown["curves"]
    for curve in risks:
        assert [point[0] for point in curve["points"]] == list(foresight.COVERAGES)
        assert curve["points"][-1][1] == pytest.approx(curve["level"]["y"])
    assert [point[0] for point in layers["points"]] == [0, 1]
    assert [row[0] for row in readouts_shown["rows"]] == ["the model", "guess"]
    assert {sentence.split(": ")[1] for sentence in shown["missing"]} == {
        "no attention_margin",
        "no order_agreement",
    }


def test_the_card_of_a_run_without_errors_says_why_it_is_empty():
    shown = card(rows_for_report(measured(planted(n=30, n_wrong=0))))
    assert shown is not None and not shown["curves"]
    assert shown["missing"] == ["Not measured: all of 30 choices are right: there is nothing to foretell."]
    assert card([]) is None
