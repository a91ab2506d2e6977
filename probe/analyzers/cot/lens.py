"""What reads and residual streams say in logits, from the experiments `read_logit` and `answer_lens`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.cot.reads import NAME, reader_axis
from probe.analyzers.registry import EMITTING, OVER_TASKS, Figure, measure
from probe.prompts.labels import ANSWER, QUESTION

if TYPE_CHECKING:
    from probe.analyzers.rows import Grid, Row
    from probe.runs import Run

READ_LOGIT = measure(
    NAME,
    "read_logit",
    unit="logits",
    axes="layer? step? reader? span",
    means="Direct logit attribution of a read: the part of the logit of the token that a row emits which the values of "
    "the source bring straight to the unembedding, with the scales of norms held at their value in the row; mean over "
    "the reader's rows, summed over heads; by layer, and without one summed over layers.",
    needs=("queries", "keys", "values", "resid_post", EMITTING, "experiment:read_logit"),
    figure=Figure(kind="matrix", x="span", by="step", card="cycle"),
)
ANSWER_LENS = measure(
    NAME,
    "answer_lens",
    unit="nats",
    of="task run",
    axes="layer step? reader?",
    means="log P of the answer's first token that is not blank, had the model stopped at `layer`, in the last row of "
    "`step` (0: the row before the first step; reader `answer`: the row that emits the token). Of the run: mean over "
    "tasks, before the first step and at the answer.",
    interval=OVER_TASKS,
    needs=("resid_post", "rows:decision", "experiment:answer_lens"),
    figure=Figure(kind="matrix", x="step", by="layer", card="cycle"),
)


def measures(run: Run) -> Iterator[Row | Grid]:
    """Nothing where the experiments were not made."""
    frame: Any = run.table("reasoning")
    for (task_id, name), rows in frame[frame["experiment"].isin(("read_logit", "answer_lens"))].groupby(
        ["task_id", "experiment"], sort=False
    ):
        if name == "read_logit":
            yield from _read_logit(task_id, rows)
        else:
            yield _answer_lens(task_id, rows)
    yield from _mean_lens(frame[frame["experiment"] == "answer_lens"])


def _read_logit(task_id: str, rows: Any) -> Iterator[Grid]:
    readers, sources = list(dict.fromkeys(rows["reader"])), list(dict.fromkeys(rows["source"]))
    n_of = dict(zip(rows["reader"], rows["n_rows"], strict=True))
    axes = [_reader(readers), {"span": sources}]
    n = np.array([[n_of[reader]] for reader in readers])
    whole, by_layer = rows[rows["layer"].isna()], rows[rows["layer"].notna()]
    layers = sorted({int(layer) for layer in by_layer["layer"]})
    values = np.full((len(layers), len(readers), len(sources)), np.nan)
    place = [_places(by_layer[name], order) for name, order in (("reader", readers), ("source", sources))]
    values[_places(by_layer["layer"].astype(int), layers), place[0], place[1]] = by_layer["value"]
    yield READ_LOGIT.grid(task_id, values, {"layer": layers}, *axes, n=n)
    summed = np.full((len(readers), len(sources)), np.nan)
    summed[_places(whole["reader"], readers), _places(whole["source"], sources)] = whole["value"]
    yield READ_LOGIT.grid(task_id, summed, *axes, n=n)


def _answer_lens(task_id: str, rows: Any) -> Grid:
    readers, layers = list(dict.fromkeys(rows["reader"])), sorted({int(layer) for layer in rows["layer"]})
    values = np.full((len(layers), len(readers)), np.nan)
    values[_places(rows["layer"].astype(int), layers), _places(rows["reader"], readers)] = rows["log_prob"]
    return ANSWER_LENS.grid(task_id, values, {"layer": layers}, _reader(readers))


def _mean_lens(frame: Any) -> Iterator[Row]:
    """Over tasks, by layer: in the row before the first step, and in the row that emits the answer."""
    ends = frame[frame["reader"].isin((QUESTION, ANSWER))]
    for (layer, reader), rows in ends.groupby(["layer", "reader"], sort=True):
        place = {"reader": ANSWER} if reader == ANSWER else {"step": 0}
        yield ANSWER_LENS.mean(rows["log_prob"].tolist(), layer=int(layer), **place)


def _reader(readers: list[str]) -> dict[str, list[Any]]:
    axis = reader_axis(readers)
    return axis | {
        "step": [0 if label == QUESTION else k for label, k in zip(readers, axis["step"], strict=True)]
    }


def _places(labels: Any, order: list[Any]) -> np.ndarray:
    place = {label: index for index, label in enumerate(order)}
    return np.array([place[label] for label in labels], dtype=int)
