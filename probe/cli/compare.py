"""`probe compare`: runs side by side, as tables in the terminal, JSON or a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from probe.cli import console

_MOST = 40
"""Differences, and flips, that are printed unless all are asked for."""
APART = 1e-3
"""Distance of states, of their norm, from which a layer's are said to part."""


@console.main.command()
@click.argument("runs", nargs=-1, required=True, type=console.RunPath(readable=True), metavar="RUN|URL...")
@click.option(
    "--by",
    metavar="variant|metadata.KEY",
    help="Also compare parts of each run: the variants of its prompting tasks, or the values of a key of their metadata.",
)
@click.option("--all", "every", is_flag=True, help="Every difference and flip, not only the clearest.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write all differences to this .parquet, .jsonl or .csv file, or all of it as a page to this .html file.",
)
@console.pager_option
@console.json_option
def compare(
    runs: tuple[Path, ...], by: str | None, every: bool, output: Path | None, no_pager: bool, as_json: bool
) -> None:
    """Compare runs of the same tasks with the first one, paired task by task: what changed, and is it more than chance?

    Runs may be of other models, adapters, prompts, edits, seeds or versions. No model is used. docs/compare.md says how the
    intervals and tests are made.
    """
    print_comparison(runs, by, every, output, no_pager, as_json)


def print_comparison(
    paths: tuple[Path, ...], by: str | None, every: bool, output: Path | None, no_pager: bool, as_json: bool
) -> None:
    """Compare, write and print."""
    from probe.analyzers.comparison import compare
    from probe.runs import Run

    comparison = compare([Run(path) for path in paths], by)
    if output and output.suffix.lower() in (".html", ".htm"):
        from probe.report.comparison import write_comparison

        write_comparison(comparison, output)
    elif output:
        comparison.write(output)
    document = comparison.document()
    if as_json:
        console.dump(document)
        return
    console.echo_lines(comparison_lines(document, every), no_pager)


def comparison_lines(document: dict[str, Any], every: bool = False) -> Iterator[str]:
    """The tables of a comparison's document as lines of text."""
    yield from (f"note: {note}" for note in document["notes"])
    for kind, rows in _by("kind", document["runs"]):
        yield kind
        yield from _board(rows)
    if document["strata"]:
        yield ""
        yield from _strata(document["strata"])
    base = document["runs"][0]["run"] if document["runs"] else ""
    for run, rows in _by("run", document["differences"]):
        yield ""
        yield from _differences(base, run, rows, every)
    for run, rows in _by("run", document["flips"]):
        turned = Counter(row["turned"] for row in rows)
        yield ""
        yield f"{run}: {turned['right']} tasks turned right, {turned['wrong']} turned wrong"
        shown = rows if every else rows[:_MOST]
        yield from _table(["task", "turned", "before", "P", "after", "P"], [_flip(row) for row in shown])
        yield from _more(len(rows) - len(shown))
    states = [row for row in document["layers"] if row["name"] == "state_distance"]
    for run, rows in _by("run", states):
        parting = [row["layer"] for row in rows if row["value"] > APART]
        furthest = max(rows, key=lambda row: row["value"])
        yield ""
        yield (
            f"{run}: states at the first emitted token part {f'from layer {min(parting)} on' if parting else 'nowhere'}, "
            f"the furthest at layer {furthest['layer']}: {furthest['value']:.3g} of the state's norm, n = {furthest['n']}"
        )


def _by(key: str, rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows by what they have at `key`, in order of first appearance."""
    labels = dict.fromkeys(row[key] for row in rows)
    return [(label, [row for row in rows if row[key] == label]) for label in labels]


def _board(rows: list[dict[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(row["measure"] for row in rows))
    cells = []
    for run, of_run in _by("run", rows):
        values = {row["measure"]: row for row in of_run}
        failed = f", {of_run[0]['n_failed']} failed" if of_run[0]["n_failed"] else ""
        n = max(row["n"] for row in of_run)
        cells.append(
            [run, str(of_run[0]["model"]), f"{n}{failed}", *(_estimate(values.get(name)) for name in names)]
        )
    yield from _table(["run", "model", "n", *names], cells)


def _strata(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield from _table(
        ["run", "kind", "label", "score", "n", "from the first", "95 %", "p"],
        [
            [
                row["run"], row["kind"], row["label"], _estimate(row | {"value": row["score"]}), str(row["n"]),
                _number(row["difference"], "+"), _interval(row["difference_low"], row["difference_high"], "+"), _number(row["p"]),
            ]
            for row in rows
        ],
    )  # fmt: skip


def _differences(base: str, run: str, rows: list[dict[str, Any]], every: bool) -> Iterator[str]:
    clear = sorted((row for row in rows if row["clear"]), key=lambda row: (row["p_corrected"], row["p"]))
    shown = rows if every else clear[:_MOST]
    yield (
        f"{run} − {base}: {len(clear)} of {len(rows)} measures differ beyond chance "
        "(corrected p at most .05, Benjamini and Hochberg)"
    )
    yield from _table(
        ["measure", base, run, "difference", "95 %", "p", "n", "unit"], [_cells(row) for row in shown]
    )
    if not every:
        yield from _more(len(clear) - len(shown))


def _flip(row: dict[str, Any]) -> list[str]:
    before = [_short(row["base_choice"]), _number(row["base_probability"])]
    return [row["task_id"], row["turned"], *before, _short(row["choice"]), _number(row["probability"])]


def _more(count: int) -> Iterator[str]:
    if count:
        yield f"  and {count} more: --all"


def _cells(row: dict[str, Any]) -> list[str]:
    named = " ".join(
        str(part) for part in (row["analyzer"], row["name"], row["at"], row["tools"]) if part is not None
    )
    return [
        named, _number(row["base"]), _number(row["value"]), _number(row["difference"], "+"),
        _interval(row["low"], row["high"], "+"), _number(row["p"]), str(row["n"]), row["unit"],
    ]  # fmt: skip


def _number(value: Any, sign: str = "") -> str:
    return format(value, f"{sign}.3g") if value is not None else ""


def _interval(low: Any, high: Any, sign: str = "") -> str:
    return f"[{_number(low, sign)}, {_number(high, sign)}]" if low is not None else ""


def _estimate(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{_number(row['value'])} {_interval(row['low'], row['high'])}".strip()


def _short(text: Any) -> str:
    words = " ".join(str(text).split()) if text is not None else ""
    return words if len(words) <= 40 else words[:39] + "…"


def _table(titles: list[str], rows: list[list[str]]) -> Iterator[str]:
    if not rows:
        return
    widths = [max(len(row[column]) for row in [titles, *rows]) for column in range(len(titles))]
    for row in (titles, *rows):
        yield "  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
