"""Measures of the heads that point at the chosen tool or at the right one (see `probe.runs.views.heads`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

from probe.analyzers.rows import WHOLE_RUN, Row
from probe.runs.views.choice import Target
from probe.runs.views.heads import Ranking, rank

if TYPE_CHECKING:
    from probe.runs import Run

_NAME = "tool"


def measures(run: Run) -> Iterator[Row]:
    """Measures of the ranking for both targets; nothing where attention was not captured or tasks are few."""
    for target in get_args(Target):
        ranking = rank(run, target)
        if ranking is not None:
            yield from _rows(ranking)


def _rows(ranking: Ranking) -> Iterator[Row]:
    common: dict[str, Any] = {"task_id": WHOLE_RUN, "analyzer": _NAME, "variant": ranking.target}
    counted: dict[str, Any] = common | {"n": ranking.n_tasks}
    for row, layer in enumerate(ranking.layers):
        for head in range(ranking.auroc.shape[1]):
            place: dict[str, Any] = counted | {"layer": layer, "head": head}
            value, low, high = (float(x[row, head]) for x in (ranking.auroc, ranking.low, ranking.high))
            yield Row(**place, name="head_auroc", value=value, unit="probability", low=low, high=high)
            for name, found in (("head_p", ranking.p), ("head_p_corrected", ranking.p_corrected)):
                yield Row(**place, name=name, value=float(found[row, head]), unit="p-value")
    survivors = int((ranking.p_corrected < 0.05).sum())
    yield Row(**counted, name="heads_found", value=survivors, unit="heads")
    for half in (None, 0, 1):
        tested = ranking.held_out(half=half)
        yield Row(
            **common,
            name="head_auroc_heldout",
            value=tested.value,
            unit="probability",
            low=tested.low,
            high=tested.high,
            n=tested.n,
            span=None if half is None else f"chosen on half {half}",
        )
