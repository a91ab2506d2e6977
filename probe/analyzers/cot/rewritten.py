"""What comes out where the rest of a reasoning is written again: from `resampling` and `regenerated`.

`resampling` of a step is the share of draws that give the run's answer where the step stands, less the share where
the step was drawn anew and came out otherwise (variant `score`: of right answers). Draws with the step are those from
behind it, so that both sides draw all that follows. The interval is Newcombe's; n counts draws of both sides.
`regenerated` is 1 where step `step` (null with variant `answer`: the answer) comes out as it would have with nothing
hidden, though `span` could not be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from probe.analyzers.cot.reads import ANSWER, NAME, number
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.statistics import bootstrap_mean, share_difference

if TYPE_CHECKING:
    from probe.runs import Run


def measures(run: Run) -> Iterator[Row]:
    """Nothing where the experiments were not made."""
    frame: Any = run.reasoning()
    yield from _resampling(frame[frame["experiment"] == "resampling"])
    yield from _regenerated(frame[frame["experiment"] == "regenerated"])


def _resampling(frame: Any) -> Iterator[Row]:
    by_task: dict[str | None, list[float]] = {}
    for task_id, rows in frame.groupby("task_id", sort=False):
        own: dict[str | None, list[float]] = {}
        for column, variant in (("same", None), ("score", "score")):
            for step in range(1, int(rows["kept"].max()) + 1):
                kept = rows[rows["kept"] == step][column].dropna()
                drawn = rows[(rows["kept"] == step - 1) & (rows["value"] == 1)][column].dropna()
                if len(kept) and len(drawn):
                    value = float(kept.mean() - drawn.mean())
                    low, high = share_difference(kept.mean(), len(kept), drawn.mean(), len(drawn))
                    own.setdefault(variant, []).append(value)
                    yield Row(
                        task_id=str(task_id),
                        analyzer=NAME,
                        name="resampling",
                        value=value,
                        unit="share of draws",
                        n=len(kept) + len(drawn),
                        low=low,
                        high=high,
                        step=step,
                        variant=variant,
                    )
        for variant, values in own.items():
            by_task.setdefault(variant, []).append(sum(values) / len(values))
    for variant, values in by_task.items():
        yield _mean("resampling", values, "share of draws", variant)


def _regenerated(frame: Any) -> Iterator[Row]:
    shares: dict[str | None, list[float]] = {}
    for task_id, rows in frame.groupby("task_id", sort=False):
        own: dict[str | None, list[float]] = {}
        for row in rows.to_dict("records"):
            variant = ANSWER if row["reader"] == ANSWER else None
            if math.isnan(row["same"]):
                continue
            own.setdefault(variant, []).append(row["same"])
            yield Row(
                task_id=str(task_id),
                analyzer=NAME,
                name="regenerated",
                value=row["same"],
                unit="0 or 1",
                n=1,
                step=number(row["reader"]),
                span=row["source"],
                variant=variant,
            )
        for variant, values in own.items():
            shares.setdefault(variant, []).append(sum(values) / len(values))
    for variant, values in shares.items():
        yield _mean("regenerated", values, "share", variant)


def _mean(name: str, values: list[float], unit: str, variant: str | None) -> Row:
    low, high = bootstrap_mean(values) or (None, None)
    return Row(
        task_id=WHOLE_RUN,
        analyzer=NAME,
        name=name,
        value=sum(values) / len(values),
        unit=unit,
        n=len(values),
        low=low,
        high=high,
        variant=variant,
    )
