"""Repair: what a readout of the same forward would choose, told apart from what the model says, and from what prompting gives.

A readout picks a tool by a score of each: the decision's attention to its description, the cosine between the decision's
state and the tool's, or a linear probe of the two. The layer (for attention the layer and head) is chosen, and the probe
fitted, on other folds of tasks than it is tested on. `prompted` is the model's own choice in another run of the same
tasks, under another prompt. All are choices among the tools, in tasks in which some and not all of them are right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.foresight.measures import ANALYZER
from probe.analyzers.registry import MEAN, SHARE, Figure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.analyzers.tool.context import FinalNorm, h_context
from probe.analyzers.tool.linear import first_is_right, within
from probe.errors import UsageError
from probe.maths.folds import FOLDS, folds
from probe.maths.ridge import FoldRidge
from probe.maths.statistics import picks
from probe.runs.read import finished
from probe.runs.records import ToolRecord
from probe.runs.views.attention import decision_attention
from probe.runs.views.choice import Choice
from probe.runs.views.layer_file import LayerFile

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

LEAST = 20
"""Tasks below which no readout is chosen."""
GUESS, PROMPTED = "guess", "prompted"
"""Readouts that read nothing: an even guess among the tools, and the model's choice under another prompt."""

_TABLE = Figure(kind="table", by="scorer", card="foresight")
_NEEDS = (f"{LEAST} tasks",)


def _of_run(name: str, unit: str, axes: str, means: str, interval: str | None = SHARE, **more: Any):
    return measure(
        ANALYZER, name, unit=unit, of="run", axes=axes, means=means, interval=interval, figure=_TABLE, **more
    )


READOUT_ACCURACY = _of_run(
    "readout_accuracy",
    "share of tasks",
    "scorer?",
    "Tasks in which the tool of the readout is right, of those that it can read, which n counts; without a scorer the model's "
    "most probable tool, of all tasks in which some of the tools, and not all, are right. `guess` is an even guess.",
    needs=_NEEDS,
)
READOUT_GAIN = _of_run(
    "readout_gain",
    "share of tasks",
    "scorer",
    "`readout_accuracy` of the readout minus that of the model, paired by task.",
    MEAN,
    needs=_NEEDS,
)
REPAIRED = _of_run(
    "repaired",
    "share of tasks",
    "scorer",
    "Tasks that the readout has right, of those in which the model's most probable tool is wrong; compare with `guess`.",
    source="arXiv 2606.16364",
    needs=_NEEDS,
)
BROKEN = _of_run(
    "broken",
    "share of tasks",
    "scorer",
    "Tasks that the readout has wrong, of those in which the model's most probable tool is right.",
    needs=_NEEDS,
)
REPAIR_OVERLAP = _of_run(
    "repair_overlap",
    "share of tasks",
    "scorer",
    "Jaccard index of the failures that the readout repairs and those that `prompted` repairs: tasks that both repair, of "
    "those that either does.",
    source="arXiv 2606.16364",
    needs=_NEEDS,
)
READOUT_LAYER = _of_run(
    "readout_layer",
    "layer",
    "scorer fold",
    "The layer that is chosen without the tasks of a fold; of attention that of the chosen head.",
    None,
    needs=_NEEDS,
)


def is_readable(choice: Choice) -> bool:
    """Whether some of the tools, and not all, are right: else there is nothing to choose."""
    right = choice.is_right[: choice.n_tools]
    return bool(right.any() and not right.all())


def measures(run: Run, prompted: Run | None = None) -> Iterator[Row]:
    """Readouts of a run's tool tasks beside the model's own choice; `prompted` is a run of the same tasks."""
    yield from rows(Readable.of(run), prompted)


def rows(seen: Readable, prompted: Run | None) -> Iterator[Row]:
    """The same of tasks that were read."""
    if len(seen.right) < LEAST:
        return
    outcomes = {GUESS: np.array([right.mean() for right in seen.right])}
    for name, readout in readouts(seen):
        outcomes[name] = readout.hits
        for fold, layer in enumerate(readout.layers):
            yield READOUT_LAYER.row(WHOLE_RUN, layer, n=len(seen.right), scorer=name, fold=fold)
    if prompted is not None:
        outcomes[PROMPTED] = _prompted(seen, prompted)
    yield READOUT_ACCURACY.share(seen.model)
    for name, hits in outcomes.items():
        has = ~np.isnan(hits)
        if has.any():
            yield from _outcome(name, hits[has], seen.model[has])
        if PROMPTED in outcomes and name not in (PROMPTED, GUESS):
            failed = has & ~np.isnan(outcomes[PROMPTED]) & (seen.model < 1)
            mine, prompts = hits[failed] > 0.5, outcomes[PROMPTED][failed] > 0.5
            if (mine | prompts).any():
                yield REPAIR_OVERLAP.share((mine & prompts)[mine | prompts], scorer=name)


def _outcome(name: str, hits: np.ndarray, model: np.ndarray) -> Iterator[Row]:
    yield READOUT_ACCURACY.share(hits, scorer=name)
    yield READOUT_GAIN.mean(hits - model, scorer=name)
    for measured, share, of in ((REPAIRED, hits, model < 1), (BROKEN, 1 - hits, model > 0)):
        if of.any():
            yield measured.share(share[of], scorer=name)


@dataclass
class Readable:
    """Tool tasks as readouts see them."""

    ids: list[str] = field(default_factory=list)
    tools: list[list[str]] = field(default_factory=list)
    right: list[np.ndarray] = field(default_factory=list)
    """[task][tool], bool"""
    choices: list[str] = field(default_factory=list)
    """The model's most probable tool."""
    layers: list[int] = field(default_factory=list)
    attention: dict[int, np.ndarray] = field(default_factory=dict)
    """Task → [layer, head]: 1 where the tool with the most of the decision's attention per token is right, shared where tools tie."""
    cosine: dict[int, np.ndarray] = field(default_factory=dict)
    """Task → [layer]: the same of the cosine between the normed state of the decision and the tool's."""
    states: LayerFile = field(default_factory=LayerFile)
    """[1 + tool, layer, d_model] of each task of `cosine`: the decision, then the tools."""

    @classmethod
    def of(cls, run: Run) -> Readable:
        """The tasks in which some of the tools, and not all, are right."""
        norm, out = FinalNorm.of(run), cls()
        for task in finished(run, "tool_selection"):
            choice = Choice.of(task.typed(ToolRecord))
            if is_readable(choice):
                out._add(task, choice, choice.is_right[: choice.n_tools], norm)
        return out

    def _add(self, task: TaskRun, choice: Choice, right: np.ndarray, norm: FinalNorm | None) -> None:
        number = len(self.ids)
        self.ids.append(task.id)
        self.tools.append(choice.tools)
        self.right.append(right)
        self.choices.append(choice.chosen_tool)
        attention = decision_attention(task)
        if attention is not None and list(attention.tools) == choice.tools:
            columns = list(attention.tools.values())
            if self._fits(attention.layers):
                rates = attention.mass[:, :, columns] / attention.tokens[columns]
                self.attention[number] = picks(rates) @ right
        context = None if norm is None else h_context(task, norm)
        if context is None or context.decision is None or context.tools != choice.tools:
            return
        if not self._fits(context.layers):
            return
        states = np.concatenate([context.decision[:, None], context.h_tools], axis=1)
        sizes = np.linalg.norm(states, axis=-1)
        products = np.einsum("ltd,ld->lt", states[:, 1:], states[:, 0])
        self.cosine[number] = picks(products / np.maximum(sizes[:, 1:] * sizes[:, :1], 1e-12)) @ right
        self.states.add(states.swapaxes(0, 1))

    def _fits(self, layers: list[int]) -> bool:
        self.layers = self.layers or layers
        return layers == self.layers

    @property
    def model(self) -> np.ndarray:
        """[task]: 1 where the model's most probable tool is right."""
        cases = zip(self.choices, self.tools, self.right, strict=True)
        return np.array([float(right[tools.index(tool)]) for tool, tools, right in cases])


@dataclass(frozen=True)
class Readout:
    """What a readout picks, chosen and fitted on other folds."""

    hits: np.ndarray
    """[task]: 1 where the tool is right, shared where tools tie; NaN where it cannot read."""
    layers: list[int]
    """[fold]: the layer that was chosen on the others."""


def readouts(seen: Readable) -> Iterator[tuple[str, Readout]]:
    """The readouts that at least LEAST tasks allow, by name."""
    if len(seen.attention) >= LEAST:
        n_heads = next(iter(seen.attention.values())).shape[1]
        yield (
            "attention",
            _chosen(seen, seen.attention, [layer for layer in seen.layers for _ in range(n_heads)]),
        )
    if len(seen.cosine) >= LEAST:
        yield "cosine", _chosen(seen, seen.cosine, seen.layers)
        yield "linear_probe", _probe(seen)


def _chosen(seen: Readable, right: Mapping[int, np.ndarray], layers: Sequence[int]) -> Readout:
    """The column of `right` [task] that is right most often on the other folds."""
    tasks = list(right)
    table = np.stack([right[task].ravel() for task in tasks], axis=1)
    fold_of, hits, chosen = folds(len(tasks)), np.full(len(seen.ids), np.nan), []
    for fold in range(FOLDS):
        held = fold_of == fold
        column = int(table[:, ~held].mean(1).argmax())
        hits[np.array(tasks)[held]] = table[column, held]
        chosen.append(layers[column])
    return Readout(hits, chosen)


def _probe(seen: Readable) -> Readout:
    """A ridge regression that matches the decision's state q with a tool's t by q∘t and t − q, less their means over the
    tools of the task; the layer is chosen by an inner cross-validation."""
    tasks = list(seen.cosine)
    counts = np.array([len(seen.tools[task]) for task in tasks])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    task = np.repeat(np.arange(len(tasks)), counts)
    decisions = starts + np.arange(len(tasks))
    right = np.concatenate([seen.right[number] for number in tasks])[:, None]
    goal = within(right.astype(np.float32), starts, counts)
    fold_of = folds(len(tasks))
    best, hits, chosen = np.full(FOLDS, -1.0), np.zeros(len(tasks)), [seen.layers[0]] * FOLDS
    for place, layer in enumerate(seen.layers):
        states = seen.states.layer(place)
        q, t = states[decisions][task], np.delete(states, decisions, axis=0)
        regression = FoldRidge(within(np.concatenate([q * t, t - q], axis=1), starts, counts), fold_of[task])

        def tested(scores: np.ndarray, fold: int) -> np.ndarray:
            """[task of the fold]: hits by the scores of its tools."""
            sizes = counts[fold_of == fold]
            first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
            return first_is_right(scores, right[(fold_of == fold)[task]], first, sizes)[:, 0]

        inner: list[list[np.ndarray]] = [[] for _ in range(FOLDS)]
        for pair in combinations(range(FOLDS), 2):
            for asked, scores in regression.predict(goal, pair).items():
                inner[sum(pair) - asked].append(tested(scores, asked))
        for fold in range(FOLDS):
            accuracy = float(np.concatenate(inner[fold]).mean())
            if accuracy > best[fold]:
                best[fold], chosen[fold] = accuracy, layer
                hits[fold_of == fold] = tested(regression.predict(goal, [fold])[fold], fold)
    out = np.full(len(seen.ids), np.nan)
    out[tasks] = hits
    return Readout(out, chosen)


def _prompted(seen: Readable, other: Run) -> np.ndarray:
    """[task]: 1 where the model's most probable tool in the other run is right; NaN where that has not the task, or shows
    it other tools. Raises UsageError where it has none of the tasks."""
    prompted = {task.id: Choice.of(task.typed(ToolRecord)) for task in finished(other, "tool_selection")}
    hits = np.full(len(seen.ids), np.nan)
    for number, (name, tools) in enumerate(zip(seen.ids, seen.tools, strict=True)):
        if name in prompted and sorted(prompted[name].tools) == sorted(tools):
            hits[number] = seen.right[number][tools.index(prompted[name].chosen_tool)]
    if np.isnan(hits).all():
        raise UsageError(f"--prompted {other.path}: has none of the tasks with the same ids and tools")
    return hits
