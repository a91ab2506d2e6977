"""P(action | state) = Σ_I P(action | I) P(I | state): the choice of a tool after an intention was stated.

The intention is written inside the same context and the action scored after it, so the sum over all intentions
is the law of total probability. Drawn intentions, I ~ P(I | state), give an unbiased mean of the conditional
vectors P(· | I) (not of drawn actions: Rao–Blackwell, whose variance is never larger). Enumerated intentions
give the exact sum over a set that holds `intention_mass` of the probability. `intentions` says which: "drawn" or
"enumerated". Both answer another prompt than the direct choice does; `p_action_gap` says how far apart they are.

An interval from draws knows nothing of an intention that was never drawn: `intention_distinct` belongs beside it.

A draw without a word, or of no words of language, is no intention. They are counted (`intention_empty`, `intention_degenerate`);
all draws stay in the mean, which is over everything that the model may say, but where they are more than half of a task's draws it
has no P(action | state). `random` and `other_task` are controls of what is drawn: texts that say nothing of the task.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probe.analyzers.registry import OVER_TASKS, WILSON, Figure, Measure, measure
from probe.analyzers.rows import Row
from probe.experiments.tool.intentions import DRAWN, ENUMERATED, OTHER_TASK, RANDOM
from probe.maths.intervals import LEAST, Estimate, jackknife, mean_interval, share_interval
from probe.maths.statistics import js, log_softmax
from probe.prompts.labels import NO_TOOL
from probe.runs.views.choice import Choice
from probe.runs.views.conditions import read_conditions

if TYPE_CHECKING:
    from probe.runs import Run

CONTROLS = (RANDOM, OTHER_TASK)
MOST_DEGENERATE = 0.5
"""Share of a task's draws that are no intentions, above which nothing is made of them."""


_WORD = re.compile(r"[^\W\d_]+")
_T = f"95 % Student's t over draws, from {LEAST} on; none where enumerated"
_WILSON = f"95 % Wilson by effective draws, from {LEAST} on; none where enumerated"
_JACKKNIFE = (
    f"of a task 95 % Student's t over jackknife pseudo-values (Tukey 1958), from {LEAST} draws on, none where enumerated; "
    f"{OVER_TASKS}"
)


def _intention(name: str, unit: str, means: str, **more: Any) -> Measure:
    definition = {
        "axes": "intentions",
        "needs": ("experiment:intention",),
        "figure": Figure(kind="text", card="why"),
    }
    return measure("tool", name, unit=unit, means=means, **definition | more)


_SHARE = {"of": "task run", "interval": OVER_TASKS}
INTENTION_EMPTY = _intention(
    "intention_empty",
    "share of draws",
    "Drawn intentions without a word. Of the run: mean over tasks.",
    **_SHARE,
)
INTENTION_DEGENERATE = _intention(
    "intention_degenerate",
    "share of draws",
    "Drawn intentions with words that are no language: less than half of their signs are letters or blanks, or one word is more than half "
    "of four and more. Where these and the empty ones are more than half of a task's draws, the task has none of the other measures. Of the "
    "run: mean over tasks.",
    **_SHARE,
)
INTENTION_CUT = _intention(
    "intention_cut",
    "share of draws",
    "Drawn intentions that were not over at the most tokens that they may have. Of the run: mean over tasks.",
    **_SHARE,
)
P_ACTION_GIVEN_STATE = _intention(
    "p_action_given_state",
    "probability",
    "P(candidate | state) = Σ_I P(candidate | I) P(I | state) over stated intentions I: the mean over those that were "
    "`drawn`, the sum over those that were `enumerated`.",
    axes="intentions tool? span?",
    interval=_WILSON,
    figure=Figure(kind="table", by="tool", card="why"),
)
P_ACTION_GAP = _intention(
    "p_action_gap",
    "nats",
    "Jensen–Shannon divergence of `p_action_given_state` from the direct choice, jackknifed where drawn.",
    of="task run",
    interval=_JACKKNIFE,
    source="Quenouille 1956",
)
INTENTION_INFORMATION = _intention(
    "intention_information",
    "nats",
    "I(I; A) = H(mean) − mean H: what the intention says about the action, jackknifed where drawn.",
    of="task run",
    interval=_JACKKNIFE,
    source="Quenouille 1956",
)
INFORMATION_MINUS_CONTROL = _intention(
    "intention_information_minus_control",
    "nats",
    "`intention_information` of what is drawn minus that of a control in its place, paired by task: `random` tokens, as many, or what "
    "was drawn for an `other_task`. Near 0 the action hangs on there being a text, not on what it says.",
    of="run",
    axes="control",
    interval=OVER_TASKS,
    figure=Figure(kind="estimates", by="control", card="why"),
)
INTENTION_ENTROPY = _intention(
    "intention_entropy",
    "nats",
    "H(I): the mean of −log P(I | state) of the draws, or the entropy of the enumerated set.",
    interval=_T,
)
INTENTION_MASS = _intention(
    "intention_mass",
    "probability",
    "Σ P(I | state) of the set that a task lists: how much of the probability the sum covers.",
)
INTENTION_DISTINCT = _intention(
    "intention_distinct", "intentions", "How many different texts there are among the intentions."
)
_RUN = {"of": "run", "figure": Figure(kind="estimates", by="intentions", card="why")}
P_ACTION_ACCURACY = _intention(
    "p_action_accuracy",
    "share of tasks",
    "Tasks whose choice after an intention is right.",
    interval=WILSON,
    **_RUN,
)
P_ACTION_ACCURACY_DIRECT = _intention(
    "p_action_accuracy_direct",
    "share of tasks",
    "The same tasks' direct choice is right.",
    interval=WILSON,
    **_RUN,
)
P_ACTION_AGREEMENT = _intention(
    "p_action_agreement",
    "share of tasks",
    "Tasks whose choice after an intention is the direct choice.",
    interval=WILSON,
    **_RUN,
)


def measures(run: Run) -> Iterator[Row]:
    """Marginalised choices of every task that has intentions, then those of the run."""
    conditions = read_conditions(run, ["intention"])
    if conditions is None:
        return
    details = [json.loads(text) for text in conditions.facts["detail"]]
    texts = np.array([detail["text"] for detail in details], dtype=object)
    kinds = np.array([detail["kind"] for detail in details])
    cut = np.array([detail.get("cut", False) for detail in details])
    weights = conditions.facts["weight"].to_numpy(dtype=np.float64, na_value=np.nan)
    verdicts: dict[str, dict[str, _TaskIntention]] = defaultdict(dict)
    counted: dict[str, list[float]] = defaultdict(list)
    for number, task in enumerate(conditions.tasks):
        n = len(task.names)
        direct = log_softmax(conditions.base[number, :n])
        usable = True
        for kind in (DRAWN, ENUMERATED, *CONTROLS):
            rows = np.flatnonzero((conditions.task == number) & (kinds == kind))
            rows = rows[~np.isnan(conditions.log_probs[rows, :n]).any(1)]
            if kind == ENUMERATED:
                rows = rows[np.unique(texts[rows].astype(str), return_index=True)[1]]
            if not len(rows) or (kind == ENUMERATED and np.isnan(weights[rows]).any()):
                continue
            if kind == DRAWN:
                shares = _shares(texts[rows], cut[rows])
                for defined, share in shares.items():
                    counted[defined.name].append(share)
                    yield defined.row(task.id, share, n=len(rows), intentions=kind)
                usable = shares[INTENTION_EMPTY] + shares[INTENTION_DEGENERATE] <= MOST_DEGENERATE
            if kind != ENUMERATED and not usable:
                continue
            conditional = np.exp(log_softmax(conditions.log_probs[rows, :n]))
            if kind in CONTROLS:
                information, apart = mutual_information(conditional), gap(conditional, np.exp(direct))
                place: dict[str, Any] = {"n": len(rows), "intentions": kind}
                yield P_ACTION_GAP.row(task.id, apart.value, interval=apart.interval, **place)
                yield INTENTION_INFORMATION.row(
                    task.id, information.value, interval=information.interval, **place
                )
                verdict = _verdict(task, direct, conditional.mean(0), apart.value, information.value)
            else:
                measured = _drawn if kind == DRAWN else _enumerated
                rest, verdict = measured(task, direct, conditional, weights[rows], texts[rows])
                yield from rest
            verdicts[kind][task.id] = verdict
    for defined in (INTENTION_EMPTY, INTENTION_DEGENERATE, INTENTION_CUT):
        if counted[defined.name]:
            yield defined.mean(counted[defined.name], intentions=DRAWN)
    for kind, those in verdicts.items():
        yield from _whole_run(kind, list(those.values()))
    for control in CONTROLS:
        pairs = [
            (verdicts[DRAWN][task_id].information, verdict.information)
            for task_id, verdict in verdicts[control].items()
            if task_id in verdicts[DRAWN]
        ]
        if pairs:
            yield INFORMATION_MINUS_CONTROL.mean([a - b for a, b in pairs], control=control)


def is_empty(text: str) -> bool:
    """Whether an intention has no word."""
    return not _WORD.search(text)


def is_degenerate(text: str) -> bool:
    """Whether an intention has words that are no language: mostly other signs, or mostly one word."""
    words = _WORD.findall(text.casefold())
    if not words:
        return False
    letters = sum(sign.isalpha() or sign.isspace() for sign in text)
    repeated = len(words) >= 4 and max(Counter(words).values()) > len(words) / 2
    return repeated or letters < len(text) / 2


def _shares(texts: np.ndarray, cut: np.ndarray) -> dict[Measure, float]:
    return {
        INTENTION_EMPTY: float(np.mean([is_empty(text) for text in texts])),
        INTENTION_DEGENERATE: float(np.mean([is_degenerate(text) for text in texts])),
        INTENTION_CUT: float(np.mean(cut)),
    }


# -- estimators ----------------------------------------------------------------------------------------------------


def average(conditional: np.ndarray) -> list[Estimate]:
    """[intention, action] → by action, the mean over drawn intentions with its interval, none below LEAST draws.

    Few draws know nothing of an intention that was not drawn, and no interval does.
    """
    enough = len(conditional) >= LEAST
    return [Estimate(float(p.mean()), share_interval(p) if enough else None) for p in conditional.T]


def mutual_information(conditional: np.ndarray) -> Estimate:
    """I(I; A) = H(mean) − mean H of N drawn intentions' [intention, action] distributions, nats.

    H(mean) of few draws is too small, by about Σ_a Var(p̄_a)/2p̄_a, so the plain value is too small as well; see
    `jackknife`.
    """
    entropies = _entropy(conditional)
    return jackknife(lambda weights: _entropy(weights @ conditional) - weights @ entropies, len(conditional))


def gap(conditional: np.ndarray, direct: np.ndarray) -> Estimate:
    """Jensen–Shannon divergence between the mean of drawn [intention, action] and the direct distribution, nats.

    Noise in the mean makes the plain value too large; see `jackknife`.
    """

    def divergence(weights: np.ndarray) -> np.ndarray:
        mean = weights @ conditional
        return _entropy((mean + direct) / 2) - (_entropy(mean) + _entropy(direct)) / 2

    return jackknife(divergence, len(conditional))


def _entropy(p: np.ndarray) -> np.ndarray:
    """Over the last axis, nats; 0 log 0 is 0."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)


# -- one task ------------------------------------------------------------------------------------------------------


class _TaskIntention(NamedTuple):
    """What one task says about the run."""

    right: bool
    direct_right: bool
    same: bool
    """The marginalised and the direct choice agree."""
    gap: float
    information: float


def _drawn(
    task: Choice, direct: np.ndarray, conditional: np.ndarray, weights: np.ndarray, texts: np.ndarray
) -> tuple[list[Row], _TaskIntention]:
    n, distinct = len(conditional), len(set(texts.tolist()))
    information, apart = mutual_information(conditional), gap(conditional, np.exp(direct))
    place: dict[str, Any] = {"n": n, "intentions": DRAWN}
    rows = [
        *_by_candidate(task, average(conditional), **place),
        P_ACTION_GAP.row(task.id, apart.value, interval=apart.interval, **place),
        INTENTION_INFORMATION.row(task.id, information.value, interval=information.interval, **place),
        INTENTION_DISTINCT.row(task.id, distinct, **place),
    ]
    if not np.isnan(weights).any():
        # −log P(I | state) of a draw has the entropy as its mean, whatever the number of possible intentions.
        entropy = INTENTION_ENTROPY.row(task.id, -weights.mean(), interval=mean_interval(-weights), **place)
        rows.append(entropy)
    return rows, _verdict(task, direct, conditional.mean(0), apart.value, information.value)


def _enumerated(
    task: Choice, direct: np.ndarray, conditional: np.ndarray, weights: np.ndarray, texts: np.ndarray
) -> tuple[list[Row], _TaskIntention]:
    """The sum over the enumerated set, exact within it: no interval. Each text counts once."""
    n = len(conditional)
    share_of = np.exp(log_softmax(weights))
    p = share_of @ conditional
    information = float(_entropy(p) - share_of @ _entropy(conditional))
    with np.errstate(divide="ignore"):
        apart = js(np.log(p), direct)
    numbers = {
        P_ACTION_GAP: apart,
        INTENTION_INFORMATION: information,
        INTENTION_ENTROPY: float(_entropy(share_of)),
        INTENTION_MASS: float(np.exp(weights).sum()),
        INTENTION_DISTINCT: n,
    }
    place: dict[str, Any] = {"n": n, "intentions": ENUMERATED}
    rows = _by_candidate(task, [Estimate(float(value)) for value in p], **place)
    rows += [defined.row(task.id, value, **place) for defined, value in numbers.items()]
    return rows, _verdict(task, direct, p, apart, information)


def _verdict(
    task: Choice, direct: np.ndarray, p: np.ndarray, apart: float, information: float
) -> _TaskIntention:
    chosen, before = task.names[int(p.argmax())], task.names[int(direct.argmax())]
    return _TaskIntention(chosen in task.right, before in task.right, chosen == before, apart, information)


def _by_candidate(task: Choice, estimates: list[Estimate], **place: Any) -> list[Row]:
    return [
        P_ACTION_GIVEN_STATE.row(
            task.id, value, interval=interval, tool=name, span=NO_TOOL if name is None else None, **place
        )
        for name, (value, interval) in zip(task.names, estimates, strict=True)
    ]


# -- the run -------------------------------------------------------------------------------------------------------


def _whole_run(kind: str, verdicts: list[_TaskIntention]) -> Iterator[Row]:
    """Shares of tasks: the marginalised choice is right, the direct one is on the same tasks, both agree."""
    yield P_ACTION_ACCURACY.share([v.right for v in verdicts], intentions=kind)
    yield P_ACTION_ACCURACY_DIRECT.share([v.direct_right for v in verdicts], intentions=kind)
    yield P_ACTION_AGREEMENT.share([v.same for v in verdicts], intentions=kind)
    yield P_ACTION_GAP.mean([v.gap for v in verdicts], intentions=kind)
    yield INTENTION_INFORMATION.mean([v.information for v in verdicts], intentions=kind)
