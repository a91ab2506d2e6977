"""The registry of measures: one frozen record a measure, next to the function that yields it.

A record says what a number is called, what it means, in what unit, and where it may be taken. Rows are made
through it, so that name, unit and columns cannot be mistyped; documentation, labels and pictures are made from
it. `measure(…)` makes a record and enters it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from probe.analyzers.rows import WHOLE_RUN, Grid, Row
from probe.maths.intervals import LEAST, LEAST_FOLDED, LEAST_RANKS, mean_interval, share_interval
from probe.runs import AXES

Of = Literal["task", "run"]

NORM_OF_READ = (
    "‖Σ_j α_j v_j W_O‖, the length of what a head's read of a span writes into the residual stream: attention to small "
    "values weighs little."
)
"""The numbers of the tensor `value_to_spans`, of which measures are means."""
ROWS = "rows:"
"""What of a need precedes the word of `--rows` that it stands for."""
EMITTING = f"{ROWS}generated"
WILSON = "95 % Wilson, over tasks"
SHARE = f"95 % Wilson by effective tasks, from {LEAST} on"
MEAN = f"95 % Hall's t over tasks, from {LEAST} on"
RANKS = f"95 % bootstrap over tasks, from {LEAST_RANKS} on"
FOLDED = f"95 % inverted test over tasks, from {LEAST_FOLDED} on"
OVER_TASKS = f"of the run: {MEAN}"
SHARE_OVER_TASKS = f"of the run: {SHARE}"
"""Estimators of intervals that many measures have: docs/intervals.md."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """How the report draws a measure."""

    kind: Literal["estimates", "curve", "bars", "matrix", "table", "text"]
    """estimates: points with intervals, one a label of `by`; curve: over `x`, one line a label of `by`; bars: one a
    label of `by`; matrix: `by` × `x`; table: one line a row; text: a number in a sentence or a cell."""
    x: str | None = None
    by: str | None = None
    card: str | None = None
    """The card of the report that draws it in a picture of its own; None: the generic card of its kind."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The definition of a measure."""

    analyzer: str
    name: str
    unit: str
    of: tuple[Of, ...]
    """Whether it is a number of a task, of the run, or there is one of each."""
    axes: tuple[str, ...]
    """Columns that every row fills, and with `?` those that some rows leave null; keys of `probe.runs.AXES`."""
    means: str
    """The definition, in a sentence of plain English with its formula."""
    figure: Figure | str
    """What the report draws, or the reason why it draws nothing."""
    source: str | None = None
    """Paper and section or equation, where it is from one."""
    interval: str | None = None
    """How `low` and `high` are had; None: an exact number without an interval."""
    needs: tuple[str, ...] = ()
    """Capture sites, rows (as `rows:generated`), experiments (as `experiment:NAME`) and least numbers of tasks (`8 tasks`)."""
    module: str = field(default="", compare=False)
    """Where it is defined: tables of the documentation are grouped by it."""

    @property
    def key(self) -> tuple[str, str]:
        return self.analyzer, self.name

    @property
    def card(self) -> str | None:
        """The card of the report that draws it in a picture of its own."""
        return self.figure.card if isinstance(self.figure, Figure) else None

    @property
    def columns(self) -> tuple[str, ...]:
        """Axes without their question marks."""
        return tuple(axis.rstrip("?") for axis in self.axes)

    def document(self) -> dict[str, str | None]:
        """The definition in words: what `probe measures` prints."""
        return {
            "analyzer": self.analyzer,
            "name": self.name,
            "unit": self.unit,
            "of": " ".join(self.of),
            "axes": " ".join(self.axes),
            "means": self.means,
            "source": self.source,
            "interval": self.interval,
            "needs": ", ".join(self.needs),
            "figure": self.figure if isinstance(self.figure, str) else self.figure.kind,
        }

    def row(
        self,
        task_id: str,
        value: float,
        *,
        n: int = 1,
        interval: tuple[float, float] | None = None,
        **place: Any,
    ) -> Row:
        """One row; `place` maps axes to labels, None where an axis does not apply here.

        `task_id` is WHOLE_RUN for a number of the run. Raises ValueError for an axis that the measure does not
        have, for one that is missing, and for a number of a task where only runs have one.
        """
        place = {axis: label for axis, label in place.items() if label is not None}
        self._check(task_id, set(place))
        low, high = interval or (None, None)
        return Row(
            task_id=task_id,
            analyzer=self.analyzer,
            name=self.name,
            value=float(value),
            unit=self.unit,
            n=n,
            low=low,
            high=high,
            place=place,
        )

    def grid(
        self,
        task_id: str,
        values: np.ndarray,
        *axes: Mapping[str, Sequence[Any]],
        n: int | np.ndarray = 1,
    ) -> Grid:
        """Rows for every entry of `values` that is not NaN; axes as in `Grid`. Raises as `row`."""
        self._check(task_id, {axis for mapping in axes for axis in mapping})
        return Grid(
            task_id=task_id,
            analyzer=self.analyzer,
            name=self.name,
            unit=self.unit,
            values=values,
            axes=axes,
            n=n,
        )

    def mean(self, values: Sequence[float] | np.ndarray, **place: Any) -> Row:
        """The row of a run that is a mean over tasks, with its interval (`mean_interval`); n counts tasks."""
        return self.row(
            WHOLE_RUN, float(np.mean(values)), n=len(values), interval=mean_interval(values), **place
        )

    def share(self, hits: ArrayLike, **place: Any) -> Row:
        """The row of a run that is a mean over tasks of hits, or of numbers between 0 and 1, with its interval
        (`share_interval`)."""
        data = np.asarray(hits, dtype=np.float64)
        return self.row(WHOLE_RUN, float(data.mean()), n=len(data), interval=share_interval(data), **place)

    def _check(self, task_id: str, places: set[str]) -> None:
        of = "run" if task_id == WHOLE_RUN else "task"
        if of not in self.of:
            raise ValueError(f"{self.name} is no measure of a {of}")
        if unknown := places - {*self.columns}:
            raise ValueError(f"{self.name} has no axis {', '.join(sorted(unknown))}; it has {self.axes}")
        if missing := {axis for axis in self.axes if not axis.endswith("?")} - places:
            raise ValueError(f"{self.name} needs {', '.join(sorted(missing))}")


REGISTRY: dict[tuple[str, str], Measure] = {}
"""(analyzer, name) → definition, of every module that was imported; `probe.analyzers.all_measures` imports those of this package."""


def measure(analyzer: str, name: str, *, of: str = "task", axes: str = "", **definition: Any) -> Measure:
    """Define a measure and enter it; `of` and `axes` are words: "task run", "layer head span?".

    Raises ValueError for a name that is taken by another definition, an unknown axis, and a missing definition.
    """
    definition.setdefault("module", sys._getframe(1).f_globals.get("__name__", ""))
    owners: tuple[Of, ...] = tuple(word for word in get_args(Of) if word in of.split())
    defined = Measure(analyzer=analyzer, name=name, of=owners, axes=tuple(axes.split()), **definition)
    if unknown := {*defined.columns} - AXES.keys():
        raise ValueError(f"{name}: no axis {', '.join(sorted(unknown))}; known are {', '.join(AXES)}")
    if not (defined.unit and defined.means and defined.of):
        raise ValueError(f"{name}: a measure has a unit, a meaning, and is of a task or of the run")
    if REGISTRY.setdefault(defined.key, defined) != defined:
        raise ValueError(f"{analyzer} has two measures called {name}")
    return defined
