"""Analyzers read a run and yield measures. They need no model: what was not captured is not measured.

An analyzer is a callable `Run -> iterable of Row` (or of `Grid`, for many numbers at once) that sets
`analyzer` to its own name. Other packages add theirs through the entry points group `probe.analyzers`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import walk_packages
from typing import TYPE_CHECKING

from probe.errors import ArtifactCorrupt, ProbeError, UsageError

if TYPE_CHECKING:
    import pyarrow

    from probe.analyzers.registry import Figure, Measure, measure
    from probe.analyzers.rows import WHOLE_RUN, Grid, Row
    from probe.runs import Run

    Analyzer = Callable[[Run], Iterable[Row | Grid]]

_LAZY = ("WHOLE_RUN", "Figure", "Grid", "Measure", "Row", "measure")
__all__ = ["WHOLE_RUN", "Figure", "Grid", "Measure", "Row", "all_measures", "analyze", "analyzers", "measure"]

_OWN = {
    "tool": {"tool_selection", "agent", "replay"},
    "foresight": {"tool_selection"},
    "features": {"tool_selection"},
    "prompting": {"prompting"},
    "cot": {"cot", "agent", "replay"},
    "distribution": set(),
}
"""Analyzers of this package, and the kinds of task that each reads; none: every kind."""


def __getattr__(name: str):
    if name in _LAZY:  # numpy is loaded only when somebody measures
        return getattr(import_module("probe.analyzers.registry"), name)
    raise AttributeError(f"module 'probe.analyzers' has no attribute {name!r}")


def analyzers() -> dict[str, Callable[[], Analyzer]]:
    """Every analyzer that is installed, by name, with what loads it. Raises UsageError when two share a name."""
    loaders: dict[str, Callable[[], Analyzer]] = {
        name: lambda name=name: import_module(f"probe.analyzers.{name}").measures for name in _OWN
    }
    for point in entry_points(group="probe.analyzers"):
        if point.name in loaders:
            raise UsageError(
                f"two installed analyzers are called {point.name!r}; the second is {point.value}"
            )
        loaders[point.name] = point.load
    return loaders


def all_measures(further: Iterable[str] = ()) -> list[Measure]:
    """Every measure of the analyzers of this package, of installed ones, and of `further` modules, by analyzer."""
    from probe.analyzers.registry import REGISTRY

    for module in walk_packages(__path__, "probe.analyzers."):
        import_module(module.name)
    for load in analyzers().values():
        load()
    for name in further:
        import_module(name)
    return sorted(REGISTRY.values(), key=lambda defined: defined.analyzer)


def analyze(run: Run, names: Sequence[str] = (), **others: Run) -> None:
    """Run the analyzers that apply, or those named, and renew measures.parquet.

    `others` are runs beside it that `foresight` reads: `train`, `prompted`.

    Rows are written as they come, so that memory does not grow with their number. Rows of analyzers that are not run
    again are kept. When an analyzer fails, the measures of the others are written before ProbeError says which; when a
    signal stops it, those of the analyzers that have ended, and what the others had before stays. Raises
    UsageError for an unknown name.
    """
    import pyarrow.compute as pc

    known = analyzers()
    chosen = _chosen(names, known, run)
    try:
        measured = run.has_measures
    except ArtifactCorrupt:
        if names:  # what the other analyzers had measured is lost, and all of them make it again
            raise
        measured = False
    failures: dict[str, str] = {}
    stopped: list[tuple[BaseException, str, int]] = []

    def parts() -> Iterator[pyarrow.Table]:
        if measured:
            yield from filter(len, run.table_parts("measures", ~pc.field("analyzer").isin(chosen)))
        for number, name in enumerate(chosen):
            n_rows = 0
            try:
                for part in _parts(name, known[name]()(run, **(others if name == "foresight" else {}))):
                    n_rows += len(part)
                    yield part
            except (ProbeError, GeneratorExit):
                raise
            except Exception as error:  # of whatever a package that we do not know raises
                failures[name] = f"analyzer {name!r} failed: {type(error).__name__}: {error}"
            except BaseException as signal:
                stopped.append((signal, name, n_rows))
                if measured:
                    yield from run.table_parts("measures", pc.field("analyzer").isin(chosen[number:]))
                return

    run.write_table("measures", parts())
    for signal, name, n_rows in stopped:
        run.write_table("measures", _without_first(run.table_parts("measures"), name, n_rows))
        raise signal
    if failures:
        run.write_table("measures", run.table_parts("measures", ~pc.field("analyzer").isin([*failures])))
        raise ProbeError("; ".join(failures.values()))


def not_captured(run: Run, names: Sequence[str] = ()) -> list[str]:
    """What the analyzers that apply, or those named, cannot measure for what the run did not capture, a line each."""
    from probe.analyzers.registry import REGISTRY
    from probe.analyzers.uncaptured import lines, uncaptured

    known = analyzers()
    chosen = {name: _OWN.get(name, set()) for name in _chosen(names, known, run) if name in _OWN}
    for name in chosen:
        known[name]()
    return list(lines(uncaptured(run, chosen, list(REGISTRY.values()))))


def _parts(name: str, items: Iterable[Row | Grid]) -> Iterator[pyarrow.Table]:
    """The table of an analyzer's rows, in parts. Raises ValueError where rows are signed by another one."""
    from probe.analyzers.rows import table_parts

    for part in table_parts(items):
        if strange := {*part["analyzer"].unique().to_pylist()} - {name}:
            raise ValueError(f"its rows are signed {', '.join(sorted(strange))}")
        yield part


def _without_first(parts: Iterable[pyarrow.Table], analyzer: str, n_rows: int) -> Iterator[pyarrow.Table]:
    """The table without the first rows of an analyzer, which it had not ended."""
    import numpy as np

    for part in parts:
        its_own = np.flatnonzero(np.array([name == analyzer for name in part["analyzer"].to_pylist()], bool))
        dropped = its_own[:n_rows]
        n_rows -= len(dropped)
        yield part.take(np.setdiff1d(np.arange(len(part)), dropped)) if len(dropped) else part


def _chosen(names: Sequence[str], known: dict[str, Callable[[], Analyzer]], run: Run) -> list[str]:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UsageError(f"no analyzer {name!r}: {hint}")
    if names:
        return list(dict.fromkeys(names))
    kinds = run.run.get("kinds", set().union(*_OWN.values()))
    return [name for name in known if not _OWN.get(name) or _OWN[name].intersection(kinds)]
