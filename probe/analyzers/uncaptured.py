"""Which measures a run cannot have for what was not captured, and why: they are absent, never zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from probe.analyzers.registry import ROWS, Measure

if TYPE_CHECKING:
    from probe.runs import Run

_SHOWN = 6
"""Measures that a line names."""


def uncaptured(run: Run, analyzers: Mapping[str, set[str]], known: Sequence[Measure]) -> dict[str, list[str]]:
    """What of captures (`Measure.needs`) no kind of task of the run has → names of the measures that need it.

    `analyzers` are those that were run, with the kinds that each reads (none: every kind). A run that does not say what was
    captured lacks nothing.
    """
    capture: Mapping[str, Mapping[str, Any]] = run.run.get("capture") or {}
    lacking: dict[str, list[str]] = {}
    for defined in known:
        if defined.analyzer not in analyzers:
            continue
        read = analyzers[defined.analyzer] or capture.keys()
        kept = [entry for kind, entry in capture.items() if kind in read]
        for need in defined.needs if kept else ():
            if not any(_has(entry, need) for entry in kept):
                lacking.setdefault(need, []).append(defined.name)
    return lacking


def _has(kept: Mapping[str, Any], need: str) -> bool:
    """Whether an entry of `capture` in run.json has what a measure needs; what is not captured is had in other ways."""
    from probe.capture.sites import SITES

    if not need.startswith(ROWS):
        return need not in SITES or need in kept["sites"]
    word = need.removeprefix(ROWS)
    rows = {"all"} if kept.get("all_rows") else set(kept.get("rows") or {"generated"})
    # Every choice has the decisions, and a step is a span of what was generated.
    within = {"decision": rows, "steps": {"generated", "spans"}}.get(word, set())
    return bool(rows & {word, "all", *within})


def lines(lacking: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What to say of it, a line a capture that is lacking."""
    for need, names in lacking.items():
        some = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        what = f"--rows {need.removeprefix(ROWS)}" if need.startswith(ROWS) else need
        yield f"not captured: {what}: no {some}"
