"""Which tool is taken for which: rows are right choices, columns what was chosen, no-tool on both sides.

`confusion`: share of the tasks with right choice `tool` in which `variant` was chosen (Wilson interval); `n` is
how many such tasks there are, so value · n is the count. Only pairs shown together in some task have a row, the
right choice itself included; first the pairs of different candidates, those confused most often first.
`confusion_mass`: mean probability of a wrong candidate over the `n` tasks that show both (bootstrap interval).

No-tool is `NO_TOOL` in `variant`, and as the right choice in `span`, with `tool` null. A task with several right
candidates counts for the most probable of them, which is the one chosen where the choice is right; the others are
no confusion.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.rows import Row
from probe.analyzers.tool.cases import Case, cases, softmax
from probe.analyzers.tool.estimates import mean, share
from probe.prompts.labels import NO_TOOL

if TYPE_CHECKING:
    from probe.runs import Run

_Pair = tuple[str | None, str | None]


def measures(run: Run) -> Iterator[Row]:
    """The matrix of choices, then that of probabilities, most confused pairs first."""
    hits, masses = confusions(cases(run))
    yield from (share("confusion", hits[pair], **_place(pair)) for pair in _ranked(hits))
    yield from (
        mean("confusion_mass", masses[pair], "probability", **_place(pair)) for pair in _ranked(masses)
    )


def confusions(known: Sequence[Case]) -> tuple[dict[_Pair, list[float]], dict[_Pair, list[float]]]:
    """By (right, other): whether the other was chosen, one entry a task of the right choice; and its probability,
    one entry a task that shows it."""
    hits: dict[_Pair, list[float]] = {}
    masses: dict[_Pair, list[float]] = defaultdict(list)
    by_right: dict[str | None, list[Case]] = defaultdict(list)
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
    return {"tool": right, "span": NO_TOOL if right is None else None, "variant": other or NO_TOOL}
