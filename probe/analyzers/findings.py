"""What a run's measures say, in a few sentences: the measures to read first, each with its interval and n."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from probe.analyzers.rows import WHOLE_RUN
from probe.prompts.labels import DESCRIPTION, NAME

if TYPE_CHECKING:
    from probe.runs import Run

_FIRST: Sequence[tuple[str, str, Mapping[str, Any], str]] = (
    ("tool", "accuracy", {"kind": None}, "an acceptable tool, or none where none fits, was chosen"),
    ("tool", "accuracy", {"kind": "agent"}, "agents did all that was asked"),
    (
        "tool",
        "knockout_minus_random",
        {"role": "chosen", "part": DESCRIPTION},
        "masking the description alone of the most probable tool",
    ),
    (
        "tool",
        "knockout_minus_random",
        {"role": "chosen", "part": NAME},
        "masking its name alone, which the call has to copy",
    ),
    ("tool", "knockout_minus_random", {"role": "chosen", "part": None}, "masking its whole definition"),
    ("tool", "swap_follow_description", {"role": None}, "exchanged descriptions reverse the preference"),
    (
        "tool",
        "causal_spearman_within",
        {"correlate": "attention", "cause": "knockout", "part": DESCRIPTION},
        "attention to a description against what masking it costs, within tasks",
    ),
    (
        "foresight",
        "auroc",
        {"signal": "best", "rule": "held_out", "layer": None},
        "a wrong choice is less sure than a right one, by the signal that is best on other tasks",
    ),
    (
        "foresight",
        "auroc",
        {"signal": "best", "rule": "transfer", "layer": None},
        "the same by the signal that is best on the other run, fitted there",
    ),
    ("cot", "accuracy", {}, "the answer is right"),
    (
        "cot",
        "causal_spearman_within",
        {"correlate": "read_mass"},
        "reads of a step against what masking it changes, within a task",
    ),
    ("prompting", "accuracy", {}, "the choice is right"),
    ("prompting", "kl", {"layer": None}, "the prompt moves the output distribution"),
)
"""(analyzer, measure, places, what it is) in the order in which they are to be read."""
_RECONCILED = KNOCKOUT, SWAP_SLOPE = "knockout", "swap_slope"


def findings(run: Run) -> list[str]:
    """Sentences about a run, from its measures; none where nothing decisive was measured."""
    import pyarrow.compute as pc

    names = pc.field("name").isin([*(name for _, name, _, _ in _FIRST), *_RECONCILED])
    parts = run.table_parts("measures", names & (pc.field("task_id") == WHOLE_RUN))
    rows = [row for part in parts for row in part.to_pylist()]
    together = reconciliation(rows)
    return [*_sentences(rows), *([f"tool: {together}"] if together else [])]


def reconciliation(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """What knock-out and exchange say together, from rows of the whole run; None where one of them is missing."""
    rows = [row for row in rows if row["analyzer"] == "tool" and row["name"] in _RECONCILED]
    costs = {row["part"]: row["value"] for row in rows if row["name"] == KNOCKOUT and row["role"] == "chosen"}
    n = max((row["n"] for row in rows if row["name"] == KNOCKOUT and row["role"] == "chosen"), default=0)
    slope = next((row["value"] for row in rows if row["name"] == SWAP_SLOPE), None)
    if slope is None or not {None, NAME, DESCRIPTION} <= costs.keys():
        return None
    return (
        f"masking a whole definition ({costs[None]:+.2f} nats) hides the name as well ({costs[NAME]:+.2f} alone), which "
        f"the call has to copy whichever tool is wanted; the description alone is worth {costs[DESCRIPTION]:+.2f}, and "
        f"two tools that exchange descriptions move their preference by {slope:.2f} of what a choice by description "
        f"would: these two say whether the description is used (n = {n})"
    ).replace("-", "−")


def _sentences(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for analyzer, name, place, what in _FIRST:
        for row in rows:
            if (row["analyzer"], row["name"]) == (analyzer, name) and all(
                row[axis] == label for axis, label in place.items()
            ):
                yield f"{_where(row)}{what}: {_number(row)} ({name}){_verdict(row)}"


def _where(row: Mapping[str, Any]) -> str:
    named = [row[axis] for axis in ("variant", "experiment") if row[axis]]
    return f"{row['analyzer']}, {', '.join(named)}: " if named else f"{row['analyzer']}: "


def _number(row: Mapping[str, Any]) -> str:
    interval = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['value']:.2f} {row['unit']}{interval}, n = {row['n']}"


def _verdict(row: Mapping[str, Any]) -> str:
    """What follows for the measure that says whether there is a cause at all."""
    if row["name"] != "knockout_minus_random" or row["low"] is None:
        return ""
    if row["low"] <= 0 <= row["high"]:
        return ": beyond a random mask of that size no effect was found"
    moved = "raises" if row["value"] > 0 else "lowers"
    return f": it {moved} the tool's log-odds beyond what a random mask of that size does"
