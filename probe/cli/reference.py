"""Tables of the documentation, made from the registries: `python -m probe.cli.reference docs/*.md`.

A table of measures stands between `<!-- measures: ANALYZER MODULE… -->` and `<!-- end -->`. It has the measures of the analyzer
that are defined in these modules, named by the last part of their path; without a module, all of the analyzer.
Between `<!-- experiments: ANALYZER -->` and `<!-- end -->` stand the experiments that the analyzer reads; between
`<!-- places -->` and `<!-- end -->` stand the columns that say where a measure was taken.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from probe.analyzers.registry import Measure
from probe.experiments import read_by
from probe.runs import AXES

_TABLE = re.compile(r"(<!-- measures: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_EXPERIMENTS = re.compile(r"(<!-- experiments: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_PLACES = re.compile(r"(<!-- places -->\n).*?(<!-- end -->)", re.DOTALL)
_HEAD = "| measure | of | what it is | unit | columns | interval | needs |\n|---|---|---|---|---|---|---|\n"


def renewed(page: str, definitions: Iterable[Measure]) -> str:
    """A page with its tables made again. Raises ValueError for a table without a measure."""
    known = list(definitions)

    def table(marked: re.Match[str]) -> str:
        rows = [_line(defined) for defined in selected(marked[2], known)]
        if not rows:
            raise ValueError(f"no measure is defined in {marked[2]!r}")
        return marked[1] + _HEAD + "".join(rows) + marked[3]

    rows = "".join(f"| `{name}` | {kind} | {meaning} |\n" for name, (kind, meaning) in AXES.items())
    page = _PLACES.sub(
        lambda marked: f"{marked[1]}| place | type | meaning |\n|---|---|---|\n{rows}{marked[2]}", page
    )
    page = _EXPERIMENTS.sub(lambda marked: marked[1] + _experiments(marked[2]) + marked[3], page)
    return _TABLE.sub(table, page)


def documented(page: str, definitions: Iterable[Measure]) -> list[Measure]:
    """The measures that stand in the tables of a page."""
    known = list(definitions)
    return [defined for marked in _TABLE.finditer(page) for defined in selected(marked[2], known)]


def selected(words: str, definitions: Iterable[Measure]) -> list[Measure]:
    """The measures of an analyzer and modules, `words` as in the marker; in the order of the modules."""
    analyzer, *modules = words.split()
    of_it = [defined for defined in definitions if defined.analyzer == analyzer]
    if not modules:
        return of_it
    return [defined for module in modules for defined in of_it if defined.module.rpartition(".")[2] == module]


def _experiments(analyzer: str) -> str:
    rows = ["| experiment | what is changed | cost of a task |", "|---|---|---|"]
    for name, entry in sorted(read_by(analyzer).items(), key=lambda item: item[1].by_name):
        cells = ". ".join(filter(None, (entry.changes, entry.asks))), entry.cost
        when = "; **runs only if named**" if entry.by_name else ""
        rows.append(" | ".join((f"| `{name}`", *(cell.replace("|", "\\|") for cell in cells))) + f"{when} |")
    return "\n".join(rows) + "\n"


def _line(defined: Measure) -> str:
    axes = [f"(`{axis[:-1]}`)" if axis.endswith("?") else f"`{axis}`" for axis in defined.axes]
    cells = [
        f"`{defined.name}`",
        ", ".join(defined.of),
        defined.means + (f" [{defined.source}]" if defined.source else ""),
        defined.unit,
        ", ".join(axes),
        defined.interval or "none",
        ", ".join(
            f"`{need.removeprefix('experiment:')}`" if need[0].isalpha() else need for need in defined.needs
        ),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def main(paths: Sequence[str]) -> None:
    """Renew these pages."""
    from probe.api import definitions

    known = definitions()
    for path in map(Path, paths):
        page = path.read_text(encoding="utf-8")
        new = renewed(page, known)
        if new != page:
            path.write_text(new, encoding="utf-8")
            sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
