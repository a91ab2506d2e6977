"""What a notebook shows of a comparison: notes, the board of scores, the differences beyond chance, and the flips."""

from __future__ import annotations

from typing import Any

from probe.runs.html import block, escape, line, table


def comparison_html(document: dict[str, Any], clear: list[dict[str, Any]]) -> str:
    """HTML without scripts, all text escaped, of a comparison's document and of its differences beyond chance, in order."""
    n = len(document["differences"])
    return block(
        *(line(note, title="note") for note in document["notes"]),
        _board(document["runs"]),
        _titled(
            "Strata",
            ["run", "kind", "label", "score", "95 %", "n", "from the first", "p"],
            [
                [row["run"], row["kind"], row["label"], row["score"], _interval(row["low"], row["high"]), row["n"],
                 row["difference"], row["p"]]
                for row in document["strata"]
            ],
        ),
        line(f"{len(clear)} of {n} differences are beyond chance (corrected p at most .05)") if n else "",
        table(
            ["run", "measure", "base", "value", "difference", "95 %", "p", "n", "unit"],
            [
                [row["run"], _measure(row), row["base"], row["value"], row["difference"],
                 _interval(row["low"], row["high"]), row["p"], row["n"], row["unit"]]
                for row in clear
            ],
        ),
        _titled(
            "Tasks that turned",
            ["run", "task", "turned", "before", "P", "after", "P"],
            [
                [row[key] for key in ("run", "task_id", "turned", "base_choice", "base_probability", "choice", "probability")]
                for row in document["flips"]
            ],
        ),
    )  # fmt: skip


def _titled(title: str, titles: list[str], rows: list[list[Any]]) -> str:
    return f"<div><b>{escape(title)}</b></div>{table(titles, rows)}" if rows else ""


def _board(rows: list[dict[str, Any]]) -> str:
    units = {row["measure"]: row["unit"] for row in rows}
    of_run: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        cell = " ".join(
            filter(None, (f"{row['value']:.3g}", _interval(row["low"], row["high"]), f"n {row['n']}"))
        )
        of_run.setdefault((row["run"], row["model"], row["kind"]), {})[row["measure"]] = cell
    cells = [[*key, *(values.get(name) for name in units)] for key, values in of_run.items()]
    return table(["run", "model", "kind", *(f"{name}, {unit}" for name, unit in units.items())], cells)


def _measure(row: dict[str, Any]) -> str:
    parts = (row["analyzer"], row["name"], row["at"], row["tools"])
    return " ".join(str(part) for part in parts if part is not None and part == part)


def _interval(low: Any, high: Any) -> str:
    return "" if low is None or low != low else f"[{low:.3g}, {high:.3g}]"
