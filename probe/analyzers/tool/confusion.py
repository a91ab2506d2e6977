"""Which tool is taken for which: rows are right choices, columns what was chosen, no-tool on both sides.

value · n of `confusion` is the number of tasks. Pairs of different candidates come first, those that are confused most
often first. No-tool is `NO_TOOL` in `other_tool`, and as the right choice in `span`, with `tool` null. A task with several right
candidates counts for the most probable of them, which is the one chosen where the choice is right; the others are
no confusion.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.registry import SHARE, WILSON, Figure, measure
from probe.analyzers.rows import Row
from probe.maths.statistics import softmax
from probe.prompts.labels import NO_TOOL
from probe.runs.views.choice import Choice, choices

if TYPE_CHECKING:
    from probe.runs import Run

_MATRIX = Figure(kind="matrix", x="other_tool", by="tool", card="choices")
CONFUSION = measure(
    "tool",
    "confusion",
    unit="share of tasks",
    of="run",
    axes="tool? span? other_tool",
    means="How often `other_tool` (`no_tool` for none) was chosen in the n tasks whose right choice is `tool`; only pairs "
    "that some task shows together, the right choice itself included.",
    interval=WILSON,
    figure=_MATRIX,
)
CONFUSION_MASS = measure(
    "tool",
    "confusion_mass",
    unit="probability",
    of="run",
    axes="tool? span? other_tool",
    means="Mean probability of the wrong candidate `other_tool` in the tasks with right choice `tool` that show both.",
    interval=SHARE,
    figure=_MATRIX,
)
_Pair = tuple[str | None, str | None]


def measures(run: Run) -> Iterator[Row]:
    """The matrix of choices, then that of probabilities, most confused pairs first."""
    hits, masses = confusions(choices(run))
    yield from (CONFUSION.share(hits[pair], **_place(pair)) for pair in _ranked(hits))
    yield from (CONFUSION_MASS.share(masses[pair], **_place(pair)) for pair in _ranked(masses))


def confusions(known: Sequence[Choice]) -> tuple[dict[_Pair, list[float]], dict[_Pair, list[float]]]:
    """Entries by (right, other): whether the other was chosen, one a task of the right choice; and its probability,
    one entry a task that shows it."""
    hits: dict[_Pair, list[float]] = {}
    masses: dict[_Pair, list[float]] = defaultdict(list)
    by_right: dict[str | None, list[Choice]] = defaultdict(list)
    for case in known:
        best = max((i for i, right in enumerate(case.is_right) if right), key=case.log_probs.__getitem__)
        by_right[case.names[best]].append(case)
    for right, group in by_right.items():
        chosen = [case.names[int(case.log_probs.argmax())] for case in group]
        wrong = {name for case in group for name in case.names if name not in case.right}
        for other in (right, *sorted(wrong, key=lambda name: (name is None, name or ""))):
            hits[right, other] = [float(name == other) for name in chosen]
        for case in group:
            for name, p in zip(case.names, softmax(case.log_probs), strict=True):
                if name not in case.right:
                    masses[right, name].append(float(p))
    return hits, masses


def _ranked(table: dict[_Pair, list[float]]) -> list[_Pair]:
    """Pairs of different candidates before others; by sum, then by mean; in the order of the tasks where equal."""
    return sorted(
        table, key=lambda pair: (pair[0] == pair[1], -sum(table[pair]), -float(np.mean(table[pair])))
    )


def _place(pair: _Pair) -> dict[str, Any]:
    right, other = pair
    return {"tool": right, "span": NO_TOOL if right is None else None, "other_tool": other or NO_TOOL}
