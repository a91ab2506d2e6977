"""P(action | state) over intentions: a world small enough to enumerate, scipy, scikit-learn and plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import mutual_info_score

from probe.analyzers.rows import to_table
from probe.analyzers.tool import intention
from probe.experiments import Effort
from probe.experiments.tool.intentions import FIRST_DRAWS, is_closed, more_draws
from probe.maths.intervals import Estimate, share_interval, wilson
from tests.made_up_runs import PlantedRun, condition, planted_task

REPEATS = 2000


class World:
    """K intentions and A actions: P(I | state), P(A | I), and the exact sum over all intentions."""

    def __init__(self, k: int = 12, a: int = 4, seed: int = 0):
        self.generator = np.random.default_rng(seed)
        self.intentions = self.generator.dirichlet(np.ones(k))
        self.actions = self.generator.dirichlet(np.full(a, 0.5), size=k)
        self.exact = self.intentions @ self.actions

    def draw(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Drawn intentions and their conditional vectors."""
        drawn = self.generator.choice(len(self.intentions), size=n, p=self.intentions)
        return drawn, self.actions[drawn]

    @property
    def information(self) -> float:
        return sum(
            float(p * scipy.stats.entropy(law, self.exact))
            for p, law in zip(self.intentions, self.actions, strict=True)
        )


def table(run: Any) -> Any:
    return to_table(intention.measures(run)).to_pandas()


def of(frame: Any, **where: Any) -> Any:
    for name, value in where.items():
        frame = frame[frame[name].isna() if value is None else frame[name] == value]
    return frame


def row_of(frame: Any, **where: Any) -> Any:
    rows = of(frame, **where)
    assert len(rows) == 1, (where, len(rows))
    return rows.iloc[0]


def flat(estimate: Estimate) -> tuple[float, float, float]:
    assert estimate.interval is not None
    return estimate.value, *estimate.interval


# -- estimators, against the exact sum ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repeats():
    """2,000 times 100 drawn intentions: the estimates, and those of counting one drawn action for each."""
    world = World()
    estimates, counts = [], []
    for _ in range(REPEATS):
        _, conditional = world.draw(100)
        estimates.append([flat(estimate) for estimate in intention.average(conditional)])
        actions = (world.generator.random(100)[:, None] > conditional.cumsum(1)[:, :-1]).sum(1)
        counts.append(np.bincount(actions, minlength=4) / 100)
    return world, np.array(estimates), np.array(counts)


def test_the_mean_over_repeats_is_the_exact_sum_within_its_standard_error(repeats):
    world, estimates, _ = repeats
    values = estimates[:, :, 0]
    error = values.std(0, ddof=1) / math.sqrt(REPEATS)
    assert (np.abs(values.mean(0) - world.exact) < 3 * error).all()


def test_the_interval_covers_the_exact_sum_as_often_as_it_says(repeats):
    world, estimates, _ = repeats
    covered = (estimates[:, :, 1] <= world.exact) & (world.exact <= estimates[:, :, 2])
    assert 0.93 <= covered.mean() <= 0.97
    assert (covered.mean(0) > 0.92).all()


def test_averaging_vectors_has_a_smaller_variance_than_counting_drawn_actions(repeats):
    world, estimates, counts = repeats
    assert (np.abs(counts.mean(0) - world.exact) < 3 * counts.std(0, ddof=1) / math.sqrt(REPEATS)).all()
    assert (estimates[:, :, 0].var(0) < counts.var(0)).all()


def test_few_draws_have_a_mean_and_no_interval():
    _, conditional = World(seed=1).draw(8)
    for action, actual in enumerate(intention.average(conditional)):
        assert actual.interval == share_interval(conditional[:, action])
        fewer = intention.average(conditional[:7])[action]
        assert fewer == (pytest.approx(conditional[:7, action].mean()), None)


def test_plain_mutual_information_of_counts_is_scikit_learns(monkeypatch):
    """Each draw's distribution in quarters is four counted actions; without the correction both count the same."""
    counts = np.array([[4, 0, 0], [3, 1, 0], [1, 1, 2], [0, 0, 4], [0, 4, 0]])
    labels = [
        (draw, action) for draw, row in enumerate(counts) for action, k in enumerate(row) for _ in range(k)
    ]
    monkeypatch.setattr(intention, "jackknife", lambda statistic, n: float(statistic(np.full(n, 1 / n))))
    expected = mutual_info_score(*zip(*labels, strict=True))
    assert intention.mutual_information(counts / 4) == pytest.approx(expected)


def test_the_jackknife_is_a_loop_that_leaves_each_draw_out():
    _, conditional = World(seed=2).draw(9)

    def plain(rows: np.ndarray) -> float:
        return float(scipy.stats.entropy(rows.mean(0)) - scipy.stats.entropy(rows, axis=1).mean())

    left_out = [plain(np.delete(conditional, k, axis=0)) for k in range(9)]
    pseudo = 9 * plain(conditional) - 8 * np.array(left_out)
    expected = scipy.stats.ttest_1samp(pseudo, 0).confidence_interval(0.95)
    actual = intention.mutual_information(conditional)
    assert flat(actual) == pytest.approx((pseudo.mean(), expected.low, expected.high))


@pytest.mark.parametrize("n", [8, 20])
def test_the_correction_takes_the_bias_of_few_draws_off(n):
    world = World(seed=3)
    drawn = [world.draw(n)[1] for _ in range(600)]
    plain = np.array([scipy.stats.entropy(p.mean(0)) - scipy.stats.entropy(p, axis=1).mean() for p in drawn])
    actual = np.array([flat(intention.mutual_information(p)) for p in drawn])
    bias = plain.mean() - world.information
    error = actual[:, 0].std(ddof=1) / math.sqrt(len(actual))
    assert bias < -4 * error
    assert abs(actual[:, 0].mean() - world.information) < max(3 * error, 0.2 * abs(bias))
    assert ((actual[:, 1] <= world.information) & (world.information <= actual[:, 2])).mean() > 0.85


def test_the_gap_to_the_direct_choice_is_the_squared_distance_of_scipy_without_its_bias():
    world = World(seed=4)
    direct = np.array([0.1, 0.2, 0.3, 0.4])
    expected = jensenshannon(world.exact, direct) ** 2
    actual = np.array([flat(intention.gap(world.draw(20)[1], direct)) for _ in range(600)])
    assert abs(actual[:, 0].mean() - expected) < 3 * actual[:, 0].std(ddof=1) / math.sqrt(600)
    single = world.draw(1)[1]
    assert intention.gap(single, direct) == (pytest.approx(jensenshannon(single[0], direct) ** 2), None)


def test_intentions_that_say_nothing_have_no_information():
    conditional = np.tile([0.2, 0.3, 0.5], (10, 1))
    information = intention.mutual_information(conditional)
    assert information.value == pytest.approx(0, abs=1e-12)
    assert information.interval is None, "values that are all alike"


# -- one task ----------------------------------------------------------------------------------------------------------

BASE = {"search": -1.0, "sum": -2.0, None: -3.0}


def stated(
    task_id: str, number: int, log_probs: list[float], text: str, kind: str, weight: float | None
) -> list[dict[str, Any]]:
    candidates = dict(zip(BASE, log_probs, strict=True))
    detail = {"text": text, "kind": kind}
    return condition(task_id, "intention", number, candidates, detail=detail, weight=weight)


def softmax(values: Any) -> np.ndarray:
    weights = np.exp(np.array(values) - np.max(values))
    return weights / weights.sum()


def test_drawn_intentions_are_averaged_after_the_softmax_over_candidates():
    drawn = [([-1.0, -5.0, -4.0], "look it up", -1.2), ([-6.0, -2.5, -4.0], "add", -2.0), ([-1.0, -5.0, -4.0], "look it up", -1.2)]  # fmt: skip
    rows = [r for k, (p, text, weight) in enumerate(drawn) for r in stated("a", k, p, text, "drawn", weight)]
    frame = table(PlantedRun([planted_task("a", BASE, "sum")], rows))
    conditional = np.array([softmax(p) for p, _, _ in drawn])
    for place, tool in enumerate(BASE):
        row = row_of(frame, task_id="a", name="p_action_given_state", tool=tool)
        assert row.value == pytest.approx(conditional[:, place].mean())
        assert (row.n, row.intentions) == (3, "drawn")
        assert np.isnan(row.low), "three draws have no interval"
        assert (row.span == "no_tool") == (tool is None)
    assert row_of(frame, task_id="a", name="intention_distinct").value == 2
    entropy = row_of(frame, task_id="a", name="intention_entropy")
    assert entropy.value == pytest.approx(4.4 / 3) and np.isnan(entropy.low)
    assert set(of(frame, task_id="a").name) == {
        "p_action_given_state", "p_action_gap", "intention_information", "intention_distinct", "intention_entropy",
        "intention_empty", "intention_degenerate", "intention_cut",
    }  # fmt: skip


def test_enumerated_intentions_are_the_exact_sum_and_say_how_much_they_hold():
    world = World(k=3, a=3, seed=6)
    share = 0.8 * world.intentions  # the set holds 80 % of the probability
    rows = [
        row
        for k in range(3)
        for row in stated(
            "a", k, np.log(world.actions[k] / 7).tolist(), f"plan {k}", "enumerated", math.log(share[k])
        )
    ]
    rows += stated("a", 3, np.log(world.actions[0]).tolist(), "plan 0", "enumerated", math.log(share[0]))
    frame = table(PlantedRun([planted_task("a", BASE)], rows))
    selected = of(frame, task_id="a", name="p_action_given_state")
    assert selected.value.to_numpy() == pytest.approx(world.exact)
    assert selected.low.isna().all()
    assert row_of(frame, task_id="a", name="intention_mass").value == pytest.approx(0.8)
    assert row_of(frame, task_id="a", name="intention_information").value == pytest.approx(world.information)
    assert row_of(frame, task_id="a", name="intention_entropy").value == pytest.approx(
        scipy.stats.entropy(world.intentions)
    )
    direct = softmax(list(BASE.values()))
    assert row_of(frame, task_id="a", name="p_action_gap").value == pytest.approx(
        jensenshannon(world.exact, direct) ** 2
    )


def test_an_enumeration_without_weights_is_left_out_and_draws_without_weights_have_no_entropy():
    rows = stated("a", 0, [-1.0, -2.0, -3.0], "x", "enumerated", None)
    assert list(intention.measures(PlantedRun([planted_task("a", BASE)], rows))) == []
    rows = stated("a", 0, [-1.0, -2.0, -3.0], "x", "drawn", None)
    frame = table(PlantedRun([planted_task("a", BASE)], rows))
    assert "intention_entropy" not in set(frame.name)
    assert of(frame, name="p_action_given_state").low.isna().all()


def test_both_kinds_of_one_task_stand_side_by_side():
    rows = stated("a", 0, [-1.0, -2.0, -3.0], "x", "drawn", -1.0)
    rows += stated("a", 1, [-1.0, -2.0, -3.0], "x", "enumerated", -1.0)
    frame = table(PlantedRun([planted_task("a", BASE)], rows))
    assert set(frame.intentions) == {"drawn", "enumerated"}


@pytest.mark.parametrize(
    ("text", "empty", "degenerate"),
    [
        ("find the weather in Paris", False, False),
        ("search", False, False),
        ("", True, False),
        ("-- 12 ...", True, False),
        ("the the the the of", False, True),
        ("a) [1] {2} (3) <4>", False, True),
        ("go and go and go", False, True),
        ("北京的天气", False, False),
    ],
)
def test_an_intention_has_words_of_a_language(text, empty, degenerate):
    assert (intention.is_empty(text), intention.is_degenerate(text)) == (empty, degenerate)


def test_a_task_whose_draws_are_mostly_no_intentions_has_no_probability_of_an_action():
    laws = [[-1.0, -2.0, -3.0], [-3.0, -1.0, -2.0], [-2.0, -3.0, -1.0]]
    texts = {"a": ["", "1 2 3", "look it up"], "b": ["", "add", "look it up"]}
    rows = [
        row
        for task_id, of_task in texts.items()
        for k, (law, text) in enumerate(zip(laws, of_task, strict=True))
        for row in stated(task_id, k, law, text, "drawn", -1.0)
    ]
    rows += [row for k in range(3) for row in stated("a", 3 + k, laws[k], "x y", "random", None)]
    frame = table(PlantedRun([planted_task("a", BASE, "sum"), planted_task("b", BASE, "sum")], rows))
    assert set(of(frame, task_id="a").name) == {"intention_empty", "intention_degenerate", "intention_cut"}
    assert row_of(frame, task_id="a", name="intention_empty").value == pytest.approx(2 / 3)
    assert row_of(frame, task_id="b", name="intention_empty").value == pytest.approx(1 / 3)
    assert row_of(frame, task_id="", name="intention_empty").value == pytest.approx(1 / 2)
    # What is empty stays in the mean: it is part of what the model may say.
    row = row_of(frame, task_id="b", name="p_action_given_state", tool="sum")
    assert (row.value, row.n) == (pytest.approx(np.mean([softmax(law)[1] for law in laws])), 3)
    assert row_of(frame, task_id="", name="p_action_accuracy").n == 1


def test_the_information_of_intentions_is_set_against_controls_task_by_task():
    says = [[0.0, -9.0, -9.0], [-9.0, 0.0, -9.0], [-9.0, -9.0, 0.0]]
    silent = [[-1.0, -2.0, -3.0]] * 3
    tasks = [planted_task(task_id, BASE, "sum") for task_id in "ab"]
    rows = []
    for task_id, control in (("a", silent), ("b", says)):
        for kind, laws in (("drawn", says), ("random", control), ("other_task", silent)):
            rows += [
                row
                for k, law in enumerate(laws)
                for row in stated(task_id, len(rows) + k, law, f"plan {k}", kind, None)
            ]
    frame = table(PlantedRun(tasks, rows))
    full = row_of(frame, task_id="a", name="intention_information", intentions="drawn").value
    assert full > 1
    minus = {r.control: r.value for r in of(frame, name="intention_information_minus_control").itertuples()}
    assert minus == pytest.approx({"random": full / 2, "other_task": full})
    assert set(of(frame, name="p_action_given_state").intentions) == {"drawn"}, (
        "a control has no P(action | state)"
    )
    assert set(of(frame, name="p_action_accuracy").intentions) == {"drawn", "random", "other_task"}


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("\n", False),
        ("\n\nsearch", False),
        ("search\n", True),
        (" find it. ", True),
        (" 3.5 km", False),
        ("use e.g.", False),
        (" find it.", True),
        ("in 3.", False),
    ],
)
def test_an_intention_ends_with_its_line_or_sentence_once_it_has_a_word(text, closed):
    assert is_closed(text) is closed


def test_so_many_intentions_are_drawn_as_the_standard_error_asks_for():
    effort = Effort(standard_error=0.05, most_draws=200)
    sure, torn = np.full((FIRST_DRAWS, 2), 0.5), np.tile([[0.9, 0.1], [0.1, 0.9]], (FIRST_DRAWS // 2, 1))
    assert more_draws(effort, sure) == 0
    variance = torn.var(0, ddof=1).max()
    assert more_draws(effort, torn) == math.ceil(variance / 0.05**2) - FIRST_DRAWS
    assert more_draws(Effort(standard_error=0.05, most_draws=32), torn) == 32 - FIRST_DRAWS
    assert more_draws(effort, torn[:1]) == 0
    world = World(seed=5)
    errors = []
    for _ in range(300):
        _, first = world.draw(FIRST_DRAWS)
        _, rest = world.draw(more_draws(effort, first))
        errors.append(np.concatenate([first, rest]).mean(0) - world.exact)
    # The variance of 8 draws is itself a guess, so now and then too few are drawn.
    assert np.sqrt(np.mean(np.square(errors), 0)).max() < 1.25 * 0.05


# -- the run -----------------------------------------------------------------------------------------------------------


def test_the_runs_accuracy_stands_beside_the_direct_one_on_the_same_tasks():
    targets = {"a": "sum", "b": ["sum", "search"], "c": None, "d": "search"}
    leaning = {
        "a": [-3.0, -1.0, -4.0],
        "b": [-3.0, -1.0, -4.0],
        "c": [-3.0, -2.0, -1.0],
        "d": [-3.0, -1.0, -4.0],
    }
    tasks = [planted_task(task_id, BASE, target) for task_id, target in targets.items()]
    tasks.append(planted_task("without intentions", BASE, "search"))
    rows = [
        row
        for task_id, log_probs in leaning.items()
        for k in range(3)
        for row in stated(
            task_id, k, [x - 0.1 * k * (j == 0) for j, x in enumerate(log_probs)], f"plan {k}", "drawn", -1.0
        )
    ]
    frame = table(PlantedRun(tasks, rows))
    for name, share in (
        ("p_action_accuracy", 0.75),
        ("p_action_accuracy_direct", 0.5),
        ("p_action_agreement", 0),
    ):
        row = row_of(frame, task_id="", name=name)
        assert (row.value, row.n, row.unit) == (share, 4, "share of tasks")
        assert (row.low, row.high) == pytest.approx(wilson(share, 4))
    for name in ("intention_information", "p_action_gap"):
        values = [row_of(frame, task_id=task_id, name=name).value for task_id in targets]
        row = row_of(frame, task_id="", name=name)
        assert row.value == pytest.approx(np.mean(values))
        assert np.isnan(row.low), "four tasks have no interval"


def test_a_run_without_intentions_has_no_rows():
    run = PlantedRun([planted_task("a", BASE)], condition("a", "mask_all", 0, BASE, subject="sum"))
    assert list(intention.measures(run)) == []
