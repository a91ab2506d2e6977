"""Linear probes: is the chosen tool, or the right one, linearly readable from h_context, and from which layer on?

Tools differ from task to task, so the probe matches: from a state of the task q (the decision's row, or the mean
over the request) and a tool's state t it takes q∘t and t − q, less their means over the tools of the task, and
says how well the tool fits; the tool that fits best is its answer. Where the same tools recur, a second probe
(`class`) names the tool from q alone.

The classifier is ridge regression onto the labels on standardized features, with a penalty as large as the number
of features: widths exceed the number of tasks, and one factorization serves the labels and all control tasks. Folds
are of tasks; standardization and fit happen inside them.

A probe that is good for its own sake says little about the states (Hewitt & Liang 2019, "Designing and interpreting
probes with control tasks"), so each is trained as well on labels drawn at random: `selectivity` is its accuracy less
theirs. A control's target is drawn for each task among its tools, with the popularity that tools and shown slots
have as targets: a probe that knows popular tools and slots alone has no selectivity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from probe.analyzers.registry import MEAN, SHARE, WILSON, Figure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.analyzers.tool.context import Context, FinalNorm, h_context
from probe.maths.auroc import pair_wins
from probe.maths.folds import FOLDS, folds
from probe.maths.intervals import Interval, mean_interval, percentiles, share_interval, wilson
from probe.maths.ridge import CrossValidation, cross_validated
from probe.runs.read import finished
from probe.runs.records import ToolRecord
from probe.runs.views.choice import Choice, Target
from probe.runs.views.layer_file import LayerFile

if TYPE_CHECKING:
    from probe.runs import Run

MIN_TASKS = 20
"""Fewer are not probed: a fold of fewer than four tasks says nothing."""
MIN_PER_CLASS = 5
CONTROLS = 99
_GOALS = 1 << 22
"""Goals of a regression that are held at a time: a label set of a thousand tasks over a hundred tools has 10⁵."""
_LEVEL = 0.05
MATCHING, NAMING = "matching", "naming"
"""Rules: which tool's state fits the state, and which of the tools that recur is named from the state alone."""
LABELS = "labels"
"""The control: labels drawn at random."""

_NEEDS = ("resid_span_mean", f"{MIN_TASKS} tasks")
_CURVE = Figure(kind="curve", x="layer", by="control", card="layers")
_TEXT = Figure(kind="text", card="layers")
PROBE_CHANCE = measure(
    "tool",
    "probe_chance",
    unit="share of tasks",
    of="run",
    axes="state role rule",
    means="Accuracy of a guess among the tools of a task; with rule `naming` of always naming the most frequent tool.",
    needs=_NEEDS,
    figure=_TEXT,
)
PROBE_ACCURACY = measure(
    "tool",
    "probe_accuracy",
    unit="share of tasks",
    of="run",
    axes="state role rule layer control?",
    means="Held-out tasks in which the linear probe's answer is the target; with control `labels` the mean over 99 probes "
    "that were trained on labels drawn at random.",
    source="Hewitt and Liang 2019",
    interval=f"{WILSON}; of the control the middle 95 % of its probes",
    needs=_NEEDS,
    figure=_CURVE,
)
PROBE_SELECTIVITY = measure(
    "tool",
    "probe_selectivity",
    unit="share of tasks",
    of="run",
    axes="state role rule layer",
    means="`probe_accuracy` minus that of its control.",
    source="Hewitt and Liang 2019",
    interval=MEAN,
    needs=_NEEDS,
    figure=_CURVE,
)
PROBE_AUROC = measure(
    "tool",
    "probe_auroc",
    unit="probability",
    of="run",
    axes="state role rule layer",
    means="P(the target outranks another tool of its task), ties ½, by the probe's scores on held-out tasks.",
    interval=SHARE,
    needs=_NEEDS,
    figure=_CURVE,
)
DECODABLE_LAYER = measure(
    "tool",
    "decodable_layer",
    unit="layer",
    of="run",
    axes="state role rule",
    means="The first layer whose `probe_accuracy` beats the control's probes (p < 0.05), `probe_chance` (Wilson) and, where "
    "tools are matched, the choice of the tool and slot that are most popular in the other folds (Hall's t over tasks, "
    "paired), all corrected for the number of layers; no row where there is none.",
    needs=_NEEDS,
    figure=_TEXT,
)


def measures(run: Run) -> Iterator[Row]:
    """Measures of every probe; nothing where states were not captured (`context.missing` says why) or tasks are few."""
    norm = FinalNorm.of(run)
    if norm is None:
        return
    states, shown = ProbeStates(), []
    for task in finished(run, "tool_selection"):
        context = h_context(task, norm)
        if context is not None and len(context.tools) > 1:
            shown.append((Choice.of(task.typed(ToolRecord)), states.add(context)))
    for state in ("decision", "request"):
        for target in get_args(Target):
            examples = [_Example.of(choice, places, state, target) for choice, places in shown]
            kept = [example for example in examples if example is not None]
            if len(kept) >= MIN_TASKS:
                yield from _rows(matching(kept, states), state=state, role=target, rule=MATCHING)
            named = _nameable(kept)
            if len(named) >= MIN_TASKS:
                yield from _rows(naming(named, states), state=state, role=target, rule=NAMING)


class _Places(NamedTuple):
    """Rows of one task in `ProbeStates`."""

    tools: list[str]
    decision: int | None
    request: int | None
    first_tool: int


class ProbeStates:
    """What probes read of all tasks, a layer at a time: decisions, requests and tools as rows."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self._file = LayerFile()

    def add(self, context: Context) -> _Places:
        """The rows that a task's states become."""
        self.layers = self.layers or context.layers
        first = self._file.n
        rows = [state for state in (context.decision, context.h_task) if state is not None]
        self._file.add(
            np.concatenate([np.stack(rows, 1), context.h_tools] if rows else [context.h_tools], 1).swapaxes(
                0, 1
            )
        )
        request = first + (context.decision is not None)
        return _Places(
            context.tools,
            None if context.decision is None else first,
            None if context.h_task is None else request,
            first + len(rows),
        )

    def layer(self, index: int) -> np.ndarray:
        """[row, d_model] of the layer at a place in `layers`."""
        return self._file.layer(index)


@dataclass(frozen=True)
class _Example:
    """One task as a probe sees it."""

    tools: list[str]
    state: int
    """Row of q."""
    first_tool: int
    """Row of the first t; the others follow."""
    right: list[int]
    """Indices of the target tools."""

    @classmethod
    def of(cls, choice: Choice, places: _Places, name: str, target: Target) -> _Example | None:
        state = places.decision if name == "decision" else places.request
        right = choice.places(target, places.tools)
        if state is None or not 0 < len(right) < len(places.tools):
            return None
        return cls(places.tools, state, places.first_tool, right)


@dataclass(frozen=True)
class LinearProbeResult:
    """What a probe says of held-out tasks."""

    layers: list[int]
    hits: np.ndarray
    """[layer, task]: 1 where the answer is a target."""
    control_hits: np.ndarray
    """[layer, task, control]: the same for each control task."""
    chance: float
    """Mean accuracy of a guess."""
    auroc: np.ndarray | None = None
    """[layer]: probability that a target outranks another tool of its task."""
    auroc_intervals: Sequence[Interval | None] = ()
    popular: np.ndarray | None = None
    """[task]: 1 where the tool and slot that are most popular in the other folds are the target. Labels that are popular
    by chance are more so than those that are drawn by their popularity."""

    @property
    def accuracy(self) -> np.ndarray:
        """[layer]"""
        return self.hits.mean(1)

    @property
    def p_corrected(self) -> np.ndarray:
        """[layer]: share of control tasks that reach the accuracy in some layer: corrected for the layers."""
        best = self.control_hits.mean(1).max(0)
        reached = (best[None] >= self.accuracy[:, None]).sum(1)
        return (1 + reached) / (1 + len(best))

    @property
    def decodable_layer(self) -> int | None:
        """The first layer that beats the control tasks, and chance with its interval; both for all layers at once."""
        from scipy.stats import norm

        z = float(norm.ppf(1 - _LEVEL / len(self.layers)))
        n = self.hits.shape[1]
        for layer, accuracy, p in zip(self.layers, self.accuracy, self.p_corrected, strict=True):
            if (
                p < _LEVEL
                and wilson(float(accuracy), n, z)[0] > self.chance
                and self._beats_popularity(layer)
            ):
                return layer
        return None

    def _beats_popularity(self, layer: int) -> bool:
        if self.popular is None:
            return True
        gain = self.hits[self.layers.index(layer)] - self.popular
        interval = mean_interval(gain, family=len(self.layers))
        return gain.min() > 0 if interval is None else interval[0] > 0


# -- probes ----------------------------------------------------------------------------------------------------------


def matching(examples: Sequence[_Example], states: ProbeStates) -> LinearProbeResult:
    """The probe that matches a state with a tool's, cross-validated in every layer."""
    counts = np.array([len(example.tools) for example in examples])
    task = np.repeat(np.arange(len(examples)), counts)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    right = np.concatenate([np.isin(np.arange(n), e.right) for n, e in zip(counts, examples, strict=True)])
    weight = _popular_weights(examples, right, task)
    labels = np.column_stack([right, _controls(weight, right, task)])
    goal = within(labels.astype(np.float32), starts, counts)
    fold_of = folds(len(examples))
    hits, wins = [], []
    asked = np.array([example.state for example in examples])[task]
    shown = np.array([example.first_tool for example in examples])[task] + np.arange(len(task)) - starts[task]
    for index in range(len(states.layers)):
        rows = states.layer(index)
        q, t = rows[asked], rows[shown]
        features = within(np.concatenate([q * t, t - q], axis=1), starts, counts)
        scores = cross_validated(features, goal, fold_of[task])
        hits.append(first_is_right(scores, labels, starts, counts))
        wins.append(np.add.reduceat(pair_wins(counts, scores[:, :1])[:, 0] * right, starts))
    hit, n_right = np.stack(hits), np.add.reduceat(right.astype(int), starts)
    # Two targets of one task share a win between them, which is no pair.
    won = np.stack(wins, 1) - (n_right * (n_right - 1) / 2)[:, None]
    pairs = n_right * (counts - n_right)
    auroc = won.sum(0) / pairs.sum()
    intervals = [share_interval(of_layer, pairs) for of_layer in won.T]
    chance = float(np.mean(n_right / counts))
    popular = first_is_right(weight[:, None], right[:, None], starts, counts)[:, 0]
    return LinearProbeResult(states.layers, hit[:, :, 0], hit[:, :, 1:], chance, auroc, intervals, popular)


def naming(examples: Sequence[_Example], states: ProbeStates) -> LinearProbeResult:
    """The probe that names the tool from the state alone; controls are permutations of the labels."""
    from sklearn.model_selection import StratifiedKFold

    names = [example.tools[example.right[0]] for example in examples]
    classes, label = np.unique(names, return_inverse=True)
    generator = np.random.default_rng(0)
    labels = np.column_stack([label, *(generator.permutation(label) for _ in range(CONTROLS))])
    n_blocks = min(labels.shape[1], -(-labels.size * len(classes) // _GOALS))
    blocks = np.array_split(labels, n_blocks, axis=1)
    fold_of = np.zeros(len(label), dtype=int)
    for fold, (_, test) in enumerate(
        StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(label, label)
    ):
        fold_of[test] = fold
    hits = []
    asked = [example.state for example in examples]
    for index in range(len(states.layers)):
        fitted = CrossValidation(states.layer(index)[asked], fold_of)
        named = [_named(fitted, block, len(classes)) for block in blocks]
        hits.append(np.concatenate(named, axis=1) == labels)
    hit = np.stack(hits)
    chance = float(np.bincount(label).max() / len(label))
    return LinearProbeResult(states.layers, hit[:, :, 0], hit[:, :, 1:], chance)


def _named(fitted: CrossValidation, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """The class that each held-out row is given, by the probe of each label set; labels [row, label]."""
    goal = (labels[:, :, None] == np.arange(n_classes)).reshape(len(labels), -1).astype(np.float32)
    return fitted.predict(goal).reshape(*labels.shape, -1).argmax(-1)


def _nameable(examples: Sequence[_Example]) -> list[_Example]:
    """The tasks with one target that at least MIN_PER_CLASS tasks have; empty where only one tool is left."""
    single = [example for example in examples if len(example.right) == 1]
    counts = Counter(example.tools[example.right[0]] for example in single)
    kept = [e for e in single if counts[e.tools[e.right[0]]] >= MIN_PER_CLASS]
    return kept if len({e.tools[e.right[0]] for e in kept}) > 1 else []


def within(values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Values [row, …] less their mean over the rows of the task."""
    return values - np.repeat(np.add.reduceat(values, starts) / counts[:, None], counts, axis=0)


def first_is_right(
    scores: np.ndarray, labels: np.ndarray, starts: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """[task, label]: whether the row with the task's highest score is labelled."""
    best = np.repeat(np.maximum.reduceat(scores, starts), counts, axis=0)
    # Rows that share the highest score share the hit.
    leading = (scores == best).astype(float)
    return np.add.reduceat(leading * labels, starts) / np.add.reduceat(leading, starts)


def _popular_weights(examples: Sequence[_Example], right: np.ndarray, task: np.ndarray) -> np.ndarray:
    """Popularity [row] of the row's tool and slot as targets in the other folds: a task's own target must not show
    through."""
    _, tool = np.unique([name for example in examples for name in example.tools], return_inverse=True)
    slots = [(len(e.tools), slot) for e in examples for slot in range(len(e.tools))]
    _, slot = np.unique(slots, axis=0, return_inverse=True)
    fold_of, weight = folds(len(examples))[task], np.zeros(len(task))
    for fold in range(FOLDS):
        learned = _popularity((tool, slot.ravel()), right, task, fold_of != fold)
        weight[fold_of == fold] = learned[fold_of == fold]
    return weight


def _controls(weight: np.ndarray, right: np.ndarray, task: np.ndarray) -> np.ndarray:
    """Control labels [row, control]: as many targets a task as it has, drawn by weight."""
    n_right = np.bincount(task, right).astype(int)[task]
    generator = np.random.default_rng(0)
    first = np.searchsorted(task, task)
    drawn = np.zeros((len(task), CONTROLS), dtype=bool)
    for control in drawn.T:
        # The largest of log weights plus Gumbel noise is a draw by weight.
        order = np.lexsort((-(np.log(weight) + generator.gumbel(size=len(task))), task))
        control[order] = np.arange(len(task)) - first < n_right
    return drawn


def _popularity(
    kinds: Sequence[np.ndarray], right: np.ndarray, task: np.ndarray, known: np.ndarray, rounds: int = 50
) -> np.ndarray:
    """Weight [row]: product of one factor a kind, with which targets are as often of each kind as observed.

    Luce's choice model, fitted on the known rows by iterative scaling (Hunter 2004), half a target added to what is
    observed and half a one to what is expected: a kind that was never seen has the weight 1.
    """
    factors = [np.ones(kind.max() + 1) for kind in kinds]
    share = right / np.bincount(task, right)[task]
    for _ in range(rounds):
        for kind, factor in zip(kinds, factors, strict=True):
            weight = np.prod([f[k] for f, k in zip(factors, kinds, strict=True)], axis=0)
            exposure = weight / np.bincount(task, weight)[task] / factor[kind]
            observed, exposed = (
                np.bincount(kind[known], values[known], len(factor)) for values in (share, exposure)
            )
            factor[:] = (observed + 0.5) / (exposed + 0.5)
    return np.prod([f[k] for f, k in zip(factors, kinds, strict=True)], axis=0)


# -- rows ------------------------------------------------------------------------------------------------------------


def _rows(result: LinearProbeResult, **place: Any) -> Iterator[Row]:
    n = result.hits.shape[1]
    yield PROBE_CHANCE.row(WHOLE_RUN, result.chance, n=n, **place)
    for index, layer in enumerate(result.layers):
        hits, control = result.hits[index], result.control_hits[index]
        yield PROBE_ACCURACY.share(hits, layer=layer, **place)
        spread = percentiles(control.mean(0))
        yield PROBE_ACCURACY.row(
            WHOLE_RUN, control.mean(), n=n, interval=spread, layer=layer, control=LABELS, **place
        )
        yield PROBE_SELECTIVITY.mean(hits - control.mean(1), layer=layer, **place)
        if result.auroc is not None:
            interval = result.auroc_intervals[index]
            yield PROBE_AUROC.row(
                WHOLE_RUN, result.auroc[index], n=n, interval=interval, layer=layer, **place
            )
    if result.decodable_layer is not None:
        yield DECODABLE_LAYER.row(WHOLE_RUN, result.decodable_layer, n=n, **place)
