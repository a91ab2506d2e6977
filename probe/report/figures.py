"""Figures for papers: the measures of a run as data, as matplotlib axes and as Vega-Lite specifications.

What a measure looks like is in its definition (`probe.analyzers.registry.Figure`): points with intervals, curves, bars or a
matrix. Axes that the definition does not place, and that differ, make panels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probe.analyzers import all_measures
from probe.analyzers.registry import WHOLE_RUN, Figure, Measure
from probe.errors import UsageError
from probe.jsontext import nearest
from probe.runs import AXES
from probe.runs.export import encode, write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from probe.runs import Run

Frame = Any
"""A pandas DataFrame, whose types say less than its columns do."""
PICTURES = ("estimates", "curve", "bars", "matrix")
"""Kinds of figure that are drawn unasked; those of texts and tables are drawn where they are named."""
MOST_PANELS, MOST_LINES = 12, 8
"""Panels of one figure, and lines or bars a place that get a colour of their own; the page of a paper holds no more."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#8C8C8C", "#56B4E9")
"""Told apart by those who see red and green alike (Okabe and Ito 2008), without its yellow, which is weak on paper."""
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.2,
    "svg.hashsalt": "probe",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}
_PANEL_INCHES = (2.7, 2.1)
_SCREEN_DPI = 96
"""Pixels of a page to an inch of a figure."""
_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
_NONE = "–"
"""The label of a row that has none on an axis."""


class Layout(NamedTuple):
    """Where the axes of a picture go."""

    kind: str
    """What the definition says; of rows that have no place on its axes, `estimates`."""
    x: str | None
    by: str | None
    """Axis of lines, rows or colours."""
    free: list[str]
    """Axes that make panels."""

    @classmethod
    def of(cls, measure: Measure, frame: Frame) -> Layout:
        figure = measure.figure if isinstance(measure.figure, Figure) else Figure(kind="estimates")
        axes = [axis for axis in AXES if axis in frame]
        x, by = (axis if axis in axes else None for axis in (figure.x, figure.by))
        needed = {"curve": (x,), "matrix": (x, by), "bars": (by,)}.get(figure.kind, ())
        kind = figure.kind if figure.kind in PICTURES and None not in needed else "estimates"
        if kind in ("estimates", "bars"):
            x, by = None, by or (axes or [None])[0]
        return cls(kind, x, by, [axis for axis in axes if axis not in (x, by)])


@dataclass(frozen=True)
class MeasureFigure:
    """One measure of a run: its numbers, and two ways to draw them."""

    measure: Measure
    frame: Frame
    """One row a number: the axes on which rows differ, then `value`, `low`, `high`, `n`; labels that a row lacks are null."""
    model: str

    @property
    def name(self) -> str:
        return f"{self.measure.analyzer}.{self.measure.name}"

    @property
    def label(self) -> str:
        """Of the axis of values: the measure's name and its unit."""
        return f"{self.measure.name} ({self.measure.unit})"

    @property
    def panels(self) -> list[tuple[str, Frame]]:
        """Title and rows of each panel: of every combination of labels on the axes that the picture does not place."""
        free = self.layout.free
        if not free:
            return [("", self.frame)]
        groups = self.frame.groupby(free, sort=False, dropna=False)
        return [(_panel(free, labels), rows) for labels, rows in groups]

    def draw(self, axes: Axes | None = None) -> Axes:
        """The first panel on matplotlib axes, new ones where none are given."""
        import matplotlib
        from matplotlib.figure import Figure as Canvas

        with matplotlib.rc_context(STYLE):
            if axes is None:
                axes = Canvas(figsize=_PANEL_INCHES, layout="constrained").subplots()
            title, rows = self.panels[0]
            self._draw(axes, rows)
            axes.set_title(title)
        return axes

    def vega(self) -> dict[str, Any]:
        """A Vega-Lite specification with the numbers in it: altair takes it by `altair.Chart.from_dict`."""
        kind, x, by, columns = self.layout
        label = {"field": "value", "type": "quantitative", "title": self.label}
        panels = {"row": {"field": columns[0]}} if columns else {}
        panels |= {"column": {"field": "panel", "title": ", ".join(columns[1:])}} if columns[1:] else {}
        colour = {"color": {"field": by, "type": "nominal", "scale": {"range": list(COLOURS)}}} if by else {}
        layers: list[dict[str, Any]]
        if kind == "matrix":
            places = {"x": {"field": x, "type": "ordinal"}, "y": {"field": by, "type": "ordinal"}}
            layers = [{"mark": "rect", "encoding": places | {"color": label}}]
        elif kind == "curve":
            at = {"x": {"field": x, "type": "quantitative" if _is_number(x) else "ordinal"}} | colour
            band = {
                "y": {"field": "low", "type": "quantitative", "title": self.label},
                "y2": {"field": "high"},
            }
            layers = [
                {"mark": {"type": "area", "opacity": 0.2}, "encoding": at | band},
                {"mark": {"type": "line", "point": True}, "encoding": at | {"y": label}},
            ]
        else:
            at = {"y": {"field": by or "panel", "type": "nominal", "sort": None, "title": by or ""}}
            ends = {
                "x": {"field": "low", "type": "quantitative", "title": self.label},
                "x2": {"field": "high"},
            }
            mark = "bar" if kind == "bars" else {"type": "point", "filled": True}
            layers = [
                {"mark": mark, "encoding": at | {"x": label}},
                {"mark": "rule", "encoding": at | ends},
            ]
        labels = self.frame[columns[1:]].itertuples(index=False, name=None)
        frame = self.frame.assign(panel=[_panel(columns[1:], row) for row in labels])
        values = [
            {key: _plain(value) for key, value in row.items()} for row in frame.to_dict(orient="records")
        ]
        spec: dict[str, Any] = {"layer": layers}
        return {
            "$schema": _SCHEMA,
            "title": f"{self.measure.name}, {self.model}",
            "description": self.measure.means,
            "data": {"values": values},
            **({"facet": panels, "spec": spec} if panels else spec),
        }

    def save(self, path: Path) -> Path:
        """Write the figure as the file's extension says: .pdf, .svg, .png, .json (Vega-Lite) or .csv. Raises DiskError."""
        import json

        if path.suffix == ".json":
            return write_file(path, (json.dumps(self.vega(), ensure_ascii=False, indent=1) + "\n").encode())
        if path.suffix == ".csv":
            import pyarrow as pa

            columns = {name: pa.array(self.frame[name]) for name in self.frame}
            return write_file(path, encode(pa.table(columns), "csv"))
        return write_file(path, self._page(path.suffix[1:])[0])

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a notebook shows of it: a picture in its own size, and in words what it is of."""
        data, (width, height) = self._page("png")
        size = {"width": round(_SCREEN_DPI * width), "height": round(_SCREEN_DPI * height)}
        words = f"{self.name}: {len(self.frame)} numbers, {self.measure.unit}. {self.measure.means}"
        return {"image/png": data, "text/plain": words}, {"image/png": size}

    def _page(self, form: str) -> tuple[bytes, tuple[float, float]]:
        """The bytes of a file with all panels, and its width and height in inches."""
        import io

        import matplotlib
        from matplotlib.figure import Figure as Canvas

        panels = self.panels[:MOST_PANELS]
        columns = min(3, len(panels))
        lines = -(-len(panels) // columns)
        longest = max(len(rows) for _, rows in panels) if self.layout.kind not in ("curve", "matrix") else 0
        height = max(_PANEL_INCHES[1], 0.6 + 0.16 * longest)
        size = (_PANEL_INCHES[0] * max(columns, 1.3), height * lines + 0.4)
        with matplotlib.rc_context(STYLE):
            figure = Canvas(figsize=size, layout="constrained")
            grid = figure.subplots(lines, columns, squeeze=False).ravel()
            for axes, (title, rows) in zip(grid, panels, strict=False):
                self._draw(axes, rows)
                axes.set_title(title)
            for axes in grid[len(panels) :]:
                axes.remove()
            left = len(self.panels) - len(panels)
            more = f" ({left} panels left out)" if left else ""
            figure.suptitle(f"{self.measure.name}, {self.model}{more}", fontsize=9)
            # Without a date: the same run gives the same bytes.
            metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
            data = io.BytesIO()
            figure.savefig(data, format=form, dpi=200, metadata=metadata)
        return data.getvalue(), size

    def _draw(self, axes: Axes, rows: Frame) -> None:
        if self.layout.kind == "matrix":
            self._matrix(axes, rows)
        elif self.layout.kind == "curve":
            self._curves(axes, rows)
        else:
            self._points(axes, rows)

    def _points(self, axes: Axes, rows: Frame) -> None:
        labels = [_text(label) for label in rows[self.layout.by]] if self.layout.by else [""] * len(rows)
        values, place = rows["value"].to_numpy(float), np.arange(len(rows))
        ends = np.abs(rows[["low", "high"]].to_numpy(float).T - values)
        if self.layout.kind == "bars":
            axes.barh(place, values, color=COLOURS[0], height=0.6)
        known = ~np.isnan(ends).any(0)
        axes.errorbar(values[known], place[known], xerr=ends[:, known], fmt="none", ecolor="0.3", capsize=2)
        if self.layout.kind != "bars":
            axes.plot(values, place, "o", color=COLOURS[0], markersize=3.5)
        axes.set_yticks(place, labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(self.label)
        if (values < 0).any():
            axes.axvline(0, color="0.7", linewidth=0.6, zorder=0)

    def _curves(self, axes: Axes, rows: Frame) -> None:
        x, by = self.layout.x, self.layout.by
        groups = list(rows.groupby(by, sort=False, dropna=False)) if by else [("", rows)]
        for number, (_, line) in enumerate(groups):
            if _is_number(x):
                line = line.sort_values(x)
            colour = COLOURS[number % MOST_LINES]
            style = ("-", "--", ":", "-.")[number // MOST_LINES % 4]
            at = line[x].to_numpy() if _is_number(x) else line[x].map(_text).to_numpy()
            low, high = (line[name].to_numpy(float) for name in ("low", "high"))
            axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(at, line["value"], style, color=colour, label=str(number), marker=".", markersize=3)
        axes.set_xlabel(str(x))
        axes.set_ylabel(self.label)
        if by:
            legend = axes.legend(title=by, title_fontsize=7)
            # Set afterwards: a line whose own label begins with "_" has no place in a legend.
            for text, (label, _) in zip(legend.get_texts(), groups, strict=True):
                text.set_text(_text(label))

    def _matrix(self, axes: Axes, rows: Frame) -> None:
        from pandas import Index  # pyright: ignore[reportMissingTypeStubs]

        table: Frame = rows.pivot_table(
            index=self.layout.by, columns=self.layout.x, values="value", sort=False, dropna=False
        )
        for axis, name in ((0, self.layout.by), (1, self.layout.x)):
            if _is_number(name):
                table = table.sort_index(axis=axis)
        values = table.to_numpy(float)
        signed = bool((values < 0).any())
        most = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
        image = axes.imshow(
            values,
            aspect="auto",
            cmap="PuOr_r" if signed else "cividis",
            vmin=-most if signed else 0.0,
            vmax=most,
        )
        for labels, ticks in ((table.columns, axes.set_xticks), (table.index, axes.set_yticks)):
            kept = range(0, len(Index(labels)), max(1, len(labels) // 8))
            ticks(list(kept), [_text(labels[i])[:18] for i in kept])
        axes.set(xlabel=str(self.layout.x), ylabel=str(self.layout.by))
        figure = axes.get_figure()
        assert figure is not None
        figure.colorbar(image, ax=axes, label=self.label)

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(self.measure, self.frame)


def figures(run: Run, names: Iterable[str] = ()) -> list[MeasureFigure]:
    """Figures of the run's own measures (those over its tasks), or of those named: MEASURE or ANALYZER.MEASURE.

    Without names, measures that their definition draws as points, curves, bars or a matrix, of more than one number.
    Raises RunDirectoryError where the run was not analyzed, UsageError for a name of which it has no row.
    """
    frame: Frame = run.measures()
    whole: Frame = frame[frame["task_id"] == WHOLE_RUN]
    defined = {measure.key: measure for measure in all_measures()}
    model = _text((run.run.get("model") or {}).get("name") or run.path.name)
    by_name: dict[str, MeasureFigure] = {}
    for (analyzer, name), rows in whole.groupby(["analyzer", "name"], sort=False):
        measure = defined.get((str(analyzer), str(name)))
        if measure is not None:
            kept = rows[[*_varied(rows, measure), "value", "low", "high", "n"]].reset_index(drop=True)
            by_name[f"{analyzer}.{name}"] = MeasureFigure(measure, kept, model)
    wanted = list(names)
    if not wanted:
        return [f for f in by_name.values() if len(f.frame) > 1 and _is_drawn(f.measure)]
    chosen: list[MeasureFigure] = []
    for name in wanted:
        matching = [f for key, f in by_name.items() if name in (key, f.measure.name)]
        if not matching:
            near = nearest(name, tuple(by_name))
            raise UsageError(f"{run.path}: no measure {name!r}" + (f": did you mean {near}?" if near else ""))
        chosen += matching
    return chosen


def write_figures(
    run: Run, directory: Path, formats: Sequence[str] = ("pdf",), names: Iterable[str] = ()
) -> list[Path]:
    """Write each figure in each format of `FORMATS`; returns the files. Raises as `figures`, and DiskError."""
    paths: list[Path] = []
    for figure in figures(run, names):
        for form in formats:
            paths.append(figure.save(directory / f"{figure.name}.{'json' if form == 'vega' else form}"))
    return paths


def _varied(rows: Frame, measure: Measure) -> list[str]:
    """Axes on which rows differ, but those that only number the places on the picture's own axis (bins of energies)."""
    varied = [axis for axis in AXES if rows[axis].nunique(dropna=False) > 1]
    x = measure.figure.x if isinstance(measure.figure, Figure) else None
    if x not in varied:
        return varied
    places = rows[x].nunique(dropna=False)
    return [
        axis
        for axis in varied
        if axis == x or len(rows[[x, axis]].drop_duplicates()) > max(places, rows[axis].nunique(dropna=False))
    ]


def _panel(axes: Sequence[str], labels: Iterable[Any]) -> str:
    """The title of the panel of these labels."""
    return ", ".join(f"{axis} {_text(label)}" for axis, label in zip(axes, labels, strict=True))


def _is_number(axis: str | None) -> bool:
    return axis is not None and AXES[axis][0] != "string"


def _is_drawn(measure: Measure) -> bool:
    return isinstance(measure.figure, Figure) and measure.figure.kind in PICTURES


def _text(label: Any) -> str:
    """A label as it is printed. Text of models is data: what moves a cursor or breaks a line becomes a mark."""
    if label is None or label != label or str(label) == "<NA>":
        return _NONE
    text = f"{label:g}" if isinstance(label, float) else str(label)
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text.replace("$", r"\$")  # not a formula


def _plain(value: Any) -> Any:
    """For JSON: numpy numbers as Python's, what is absent as None."""
    if value is None or value != value or str(value) == "<NA>":
        return None
    return value.item() if isinstance(value, np.generic) else value
