"""What reads and residual streams say in logits, from the experiments `read_logit` and `answer_lens`.

`read_logit` is the part of the logit of the token that a row emits which the values of the source bring straight to
the unembedding, the mean over the reader's rows, summed over heads; by layer, and summed over layers. `answer_lens`
is log P of the answer's first token, had the model stopped at `layer`, in the last row of `step` (0: the row before
the first step; null with variant `answer`: the row that emits the token).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.cot.reads import ANSWER, NAME, number
from probe.analyzers.rows import WHOLE_RUN, Grid, Row
from probe.maths.statistics import bootstrap_mean

if TYPE_CHECKING:
    from probe.runs import Run


def measures(run: Run) -> Iterator[Row | Grid]:
    """Nothing where the experiments were not made."""
    frame: Any = run.reasoning()
    for (task_id, name), rows in frame[frame["experiment"].isin(("read_logit", "answer_lens"))].groupby(
        ["task_id", "experiment"], sort=False
    ):
        if name == "read_logit":
            yield from _read_logit(task_id, rows)
        else:
            yield _answer_lens(task_id, rows)
    yield from _mean_lens(frame[frame["experiment"] == "answer_lens"])


def _read_logit(task_id: str, rows: Any) -> Iterator[Grid]:
    common: dict[str, Any] = {"task_id": task_id, "analyzer": NAME, "name": "read_logit", "unit": "nats"}
    readers, sources = list(dict.fromkeys(rows["reader"])), list(dict.fromkeys(rows["source"]))
    n_of = dict(zip(rows["reader"], rows["n_rows"], strict=True))
    axes = [_reader(readers), {"span": sources}]
    n = np.array([[n_of[reader]] for reader in readers])
    whole, by_layer = rows[rows["layer"].isna()], rows[rows["layer"].notna()]
    layers = sorted({int(layer) for layer in by_layer["layer"]})
    values = np.full((len(layers), len(readers), len(sources)), np.nan)
    place = [_places(by_layer[name], order) for name, order in (("reader", readers), ("source", sources))]
    values[_places(by_layer["layer"].astype(int), layers), place[0], place[1]] = by_layer["value"]
    yield Grid(**common, values=values, axes=[{"layer": layers}, *axes], n=n)
    summed = np.full((len(readers), len(sources)), np.nan)
    summed[_places(whole["reader"], readers), _places(whole["source"], sources)] = whole["value"]
    yield Grid(**common, values=summed, axes=axes, n=n)


def _answer_lens(task_id: str, rows: Any) -> Grid:
    readers, layers = list(dict.fromkeys(rows["reader"])), sorted({int(layer) for layer in rows["layer"]})
    values = np.full((len(layers), len(readers)), np.nan)
    values[_places(rows["layer"].astype(int), layers), _places(rows["reader"], readers)] = rows["log_prob"]
    return Grid(
        task_id=task_id,
        analyzer=NAME,
        name="answer_lens",
        unit="nats",
        values=values,
        axes=[{"layer": layers}, _reader(readers)],
    )


def _mean_lens(frame: Any) -> Iterator[Row]:
    """Over tasks, by layer: in the row before the first step, and in the row that emits the answer."""
    ends = frame[frame["reader"].isin(("question", ANSWER))]
    for (layer, reader), rows in ends.groupby(["layer", "reader"], sort=True):
        values = rows["log_prob"].tolist()
        low, high = bootstrap_mean(values) or (None, None)
        yield Row(
            task_id=WHOLE_RUN,
            analyzer=NAME,
            name="answer_lens",
            value=sum(values) / len(values),
            unit="nats",
            n=len(values),
            low=low,
            high=high,
            layer=int(layer),
            step=0 if reader == "question" else None,
            variant=ANSWER if reader == ANSWER else None,
        )


def _reader(readers: list[str]) -> dict[str, list[Any]]:
    return {
        "step": [0 if label == "question" else number(label) for label in readers],
        "variant": [ANSWER if label == ANSWER else None for label in readers],
    }


def _places(found: Any, order: list[Any]) -> np.ndarray:
    place = {label: index for index, label in enumerate(order)}
    return np.array([place[label] for label in found], dtype=int)
