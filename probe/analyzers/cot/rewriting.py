"""What comes out where the rest of a reasoning is written again: from `resampling` and `regenerated`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from probe.analyzers.cot.reads import NAME
from probe.analyzers.registry import OVER_TASKS, SHARE, Figure, Measure, measure
from probe.maths.intervals import share_difference
from probe.prompts.labels import ANSWER, step_of

if TYPE_CHECKING:
    from probe.analyzers.rows import Row
    from probe.runs import Run

_DRAWN = f"of a task 95 % Newcombe, over draws; {OVER_TASKS}"
_BESIDE = (
    "where the step stands, less the share where it was drawn anew and came out otherwise. Draws with the step are "
    "those from behind it, so that both sides draw all that follows; n counts draws of both sides. Of the run: mean "
    "over steps, then over tasks."
)
RESAMPLING = measure(
    NAME,
    "resampling",
    unit="share of draws",
    of="task run",
    axes="step?",
    means=f"Share of draws that give the run's answer {_BESIDE}",
    source="Bogdan et al. 2025, Thought anchors, section 3",
    interval=_DRAWN,
    needs=("experiment:resampling",),
    figure=Figure(kind="estimates", by="step"),
)
RESAMPLING_SCORE = measure(
    NAME,
    "resampling_score",
    unit="share of draws",
    of="task run",
    axes="step?",
    means=f"Share of draws that give a right answer {_BESIDE}",
    source="Bogdan et al. 2025, Thought anchors, section 3",
    interval=_DRAWN,
    needs=("experiment:resampling",),
    figure=Figure(kind="estimates", by="step"),
)
REGENERATED = measure(
    NAME,
    "regenerated",
    unit="0 or 1",
    axes="step? reader? span",
    means="1 where step `step` (or the answer: reader `answer`) comes out as it would have with nothing masked, though "
    "the source could not be read while the model wrote.",
    needs=("experiment:regenerated",),
    figure=Figure(kind="matrix", x="span", by="step"),
)
REGENERATED_SHARE = measure(
    NAME,
    "regenerated_share",
    unit="share",
    of="run",
    axes="reader?",
    means="Mean of `regenerated` over the pairs of a task, then over tasks: of steps, and of answers (reader `answer`).",
    interval=SHARE,
    needs=("experiment:regenerated",),
    figure=Figure(kind="estimates", by="reader"),
)


def measures(run: Run) -> Iterator[Row]:
    """Nothing where the experiments were not made."""
    frame: Any = run.table("reasoning")
    yield from _resampling(frame[frame["experiment"] == "resampling"])
    yield from _regenerated(frame[frame["experiment"] == "regenerated"])


def _resampling(frame: Any) -> Iterator[Row]:
    by_task: dict[Measure, list[float]] = {}
    for task_id, rows in frame.groupby("task_id", sort=False):
        by_step: dict[Measure, list[float]] = {}
        for column, defined in (("same", RESAMPLING), ("score", RESAMPLING_SCORE)):
            for step in range(1, int(rows["kept"].max()) + 1):
                kept = rows[rows["kept"] == step][column].dropna()
                drawn = rows[(rows["kept"] == step - 1) & (rows["value"] == 1)][column].dropna()
                if len(kept) and len(drawn):
                    value = float(kept.mean() - drawn.mean())
                    interval = share_difference(kept.mean(), len(kept), drawn.mean(), len(drawn))
                    by_step.setdefault(defined, []).append(value)
                    yield defined.row(
                        str(task_id), value, n=len(kept) + len(drawn), interval=interval, step=step
                    )
        for defined, values in by_step.items():
            by_task.setdefault(defined, []).append(sum(values) / len(values))
    for defined, values in by_task.items():
        yield defined.mean(values)


def _regenerated(frame: Any) -> Iterator[Row]:
    shares: dict[str | None, list[float]] = {}
    for task_id, rows in frame.groupby("task_id", sort=False):
        by_reader: dict[str | None, list[float]] = {}
        for row in rows.to_dict("records"):
            if math.isnan(row["same"]):
                continue
            reader = ANSWER if row["reader"] == ANSWER else None
            by_reader.setdefault(reader, []).append(row["same"])
            place = {"step": step_of(row["reader"]), "reader": reader, "span": row["source"]}
            yield REGENERATED.row(str(task_id), row["same"], **place)
        for reader, values in by_reader.items():
            shares.setdefault(reader, []).append(sum(values) / len(values))
    for reader, values in shares.items():
        yield REGENERATED_SHARE.share(values, reader=reader)
