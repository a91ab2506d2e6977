"""Runs side by side as one page, differences first: the tables of `probe compare`, offline like a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.report import page
from probe.report.text import visible

if TYPE_CHECKING:
    from probe.analyzers.comparison import Comparison

_SCRIPTS = ("dom.js", "address.js", "charts.js", "plot.js", "drawing.js", "take.js", "compare.js")


def write_comparison(comparison: Comparison, output: Path) -> None:
    """Write the page. Raises DiskError."""
    from probe.runs.files import disk_errors, replace_file

    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, render_comparison(comparison).encode())


def render_comparison(comparison: Comparison) -> str:
    """The page's HTML; its differences are in the order of their corrected p-values, those beyond chance first."""
    document: dict[str, Any] = visible(comparison.document())
    document["differences"].sort(
        key=lambda row: (not row["clear"], _absent_last(row["p_corrected"]), _absent_last(row["p"]))
    )
    runs = list(dict.fromkeys(row["run"] for row in document["runs"]))
    title = " and ".join(runs) if len(runs) < 3 else f"{runs[0]} and {len(runs) - 1} others"
    data = {"run": {"title": title}, "runs": runs, "tools": [], "tasks": [], "compared": document}
    return page(
        "compare.html", _SCRIPTS, data, title=title, base=runs[0] if runs else "", notes=document["notes"]
    )


def _absent_last(value: float | None) -> float:
    return 2.0 if value is None else value
