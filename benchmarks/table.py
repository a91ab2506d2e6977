"""What was measured, and how it is shown: plain text, Markdown, JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Target:
    """A bound on a ratio: `at most` or `at least`."""

    sense: str
    value: float

    def met(self, value: float) -> bool:
        return value <= self.value if self.sense == "at most" else value >= self.value

    def __str__(self) -> str:
        return f"{'≤' if self.sense == 'at most' else '≥'} {self.value:g}"


@dataclass
class Ratio:
    """Ratios of one pair of contestants, one a round; the figure is their median."""

    what: str
    values: list[float]
    target: Target | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values) if self.values else math.nan

    @property
    def verdict(self) -> str:
        if self.target is None or not self.values:
            return ""
        return "met" if self.target.met(self.median) else "missed"


@dataclass
class Figure:
    """An absolute figure, one value a round."""

    what: str
    values: list[float]
    unit: str


@dataclass
class Check:
    """Whether results agree; `passed` None where numbers are reported and not judged."""

    what: str
    passed: bool | None
    finding: str


@dataclass
class Section:
    """One part of the table."""

    name: str
    title: str
    ratios: list[Ratio] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.passed is False]

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "ratios": [
                {
                    "what": ratio.what,
                    "median": _finite(ratio.median),
                    "rounds": ratio.values,
                    "target": str(ratio.target) if ratio.target else None,
                    "verdict": ratio.verdict or None,
                }
                for ratio in self.ratios
            ],
            "figures": [vars(figure) for figure in self.figures],
            "checks": [vars(check) for check in self.checks],
            "notes": self.notes,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float) -> str:
    """Three significant digits, without an exponent where it reads well."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size == 0 or 1e-3 <= size < 1e5:
        digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def _spread(values: Sequence[float]) -> str:
    """Smallest to largest, empty for one value."""
    return f"{_number(min(values))}–{_number(max(values))}" if len(values) > 1 else ""


Rows = list[tuple[str, ...]]


def _tables(section: Section) -> Iterator[tuple[tuple[str, ...], Rows]]:
    if section.ratios:
        head = ("ratio", "median", "min–max", "rounds", "target", "")
        rows = [
            (
                ratio.what,
                f"{_number(ratio.median)} ×" if ratio.values else "not measured",
                _spread(ratio.values),
                str(len(ratio.values)),
                str(ratio.target) if ratio.target else "",
                ratio.verdict,
            )
            for ratio in section.ratios
        ]
        yield head, rows
    if section.figures:
        head = ("figure", "median", "unit", "min–max", "rounds")
        yield (
            head,
            [
                (f.what, _number(statistics.median(f.values)), f.unit, _spread(f.values), str(len(f.values)))
                for f in section.figures
            ],
        )
    if section.checks:
        words = {True: "agrees", False: "DIFFERS", None: "reported"}
        yield ("agreement", "", "found"), [(c.what, words[c.passed], c.finding) for c in section.checks]


def as_text(section: Section) -> str:
    """Columns aligned with spaces."""
    parts = [f"== {section.title}"]
    for head, rows in _tables(section):
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [head, *rows]
        ]
        parts.append("\n".join(lines))
    parts += [f"- {note}" for note in section.notes]
    return "\n".join(parts) + "\n"


def as_markdown(section: Section) -> str:
    parts = [f"## {section.title}"]
    for head, rows in _tables(section):
        lines = ["| " + " | ".join(row) + " |" for row in [head, tuple("---" for _ in head), *rows]]
        parts.append("\n".join(lines))
    if section.notes:
        parts.append("\n".join(f"- {note}" for note in section.notes))
    return "\n\n".join(parts) + "\n"


def summary(sections: Sequence[Section]) -> str:
    """The ratios that have a target, all sections together."""
    ratios = [r for s in sections for r in s.ratios if r.target is not None]
    failed = [c for s in sections for c in s.failed]
    total = Section("targets", "Targets", ratios=ratios, checks=failed)
    if not failed:
        total.notes.append("All agreement checks passed.")
    return as_text(total)
