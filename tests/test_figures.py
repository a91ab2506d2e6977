"""Figures for papers: what is drawn are the run's numbers, and what leaves is what others read."""

from __future__ import annotations

import json
from dataclasses import replace

import altair
import matplotlib
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import probe
from probe.analyzers.registry import REGISTRY, WHOLE_RUN
from probe.analyzers.rows import to_table
from probe.cli import main
from probe.report.figures import COLOURS, MeasureFigure, figures, write_figures
from probe.runs import RunWriter

LAYERS = 6


def row(name: str, value: float, interval=None, n: int = 12, analyzer: str = "tool", **place):
    return REGISTRY[analyzer, name].row(WHOLE_RUN, value, n=n, interval=interval, **place)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose measures are of every kind of picture, with a hostile label."""
    probe.measures()  # all definitions
    rows = []
    for layer in range(LAYERS):
        at = {"state": "decision", "role": "right", "rule": "matching", "layer": layer}
        rows += [
            row("probe_accuracy", layer / 10, (layer / 20, layer / 5), **at),
            row("probe_accuracy", 0.2, (0.1, 0.3), control="labels", **at),
        ]
        rows += [row("head_auroc", 0.1 * layer + 0.01 * head, **at_head(layer, head)) for head in range(3)]
        energy = {"bin": layer, "energy": layer - 10.5}
        rows.append(row("energy_density", 2.0**-layer, analyzer="distribution", **energy))
    for role in ("chosen", "right"):
        rows.append(row("knockout", -4.0, (-5.0, -3.0), role=role))
        rows.append(row("knockout", -1.0, role=role, part="name"))
    rows.append(row("temperature_fitted", 2.0, scorer="model")) if (
        "tool",
        "temperature_fitted",
    ) in REGISTRY else None
    path = tmp_path_factory.mktemp("figures") / "run"
    with RunWriter.create(path, {"model": {"name": "llama$x_{\x1b[2J}"}, "task_ids": []}) as writer:
        writer.finish("done")
    opened = probe.open(path)
    opened.write_table("measures", to_table(rows))
    return opened


def at_head(layer: int, head: int) -> dict:
    return {"role": "right", "layer": layer, "head": head}


def by_name(run) -> dict:
    return {figure.measure.name: figure for figure in probe.figures(run.path)}


def test_the_data_are_the_measures_on_the_axes_that_differ(run):
    frame = by_name(run)["knockout"].frame
    assert list(frame.columns) == ["role", "part", "value", "low", "high", "n"]
    assert frame.value.tolist() == [-4, -1, -4, -1] and frame.low.isna().tolist() == [False, True] * 2
    # A bin numbers its energy: it makes no panel.
    assert list(by_name(run)["energy_density"].frame.columns) == ["energy", "value", "low", "high", "n"]


def test_a_curve_has_a_line_and_a_band_of_each_label(run):
    axes = by_name(run)["probe_accuracy"].draw()
    model, labels = axes.get_lines()
    assert model.get_xdata().tolist() == list(range(LAYERS))
    assert model.get_ydata().tolist() == pytest.approx([layer / 10 for layer in range(LAYERS)])
    assert labels.get_ydata().tolist() == [0.2] * LAYERS
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx((LAYERS - 1) / 5)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["–", "labels"]
    assert axes.get_ylabel() == "probe_accuracy (share of tasks)"


def test_a_curve_of_one_place_is_points_in_one_panel_and_no_label_is_lost():
    ends = {"value": [0.1, 0.2], "low": np.nan, "high": np.nan, "n": 9}
    measure = REGISTRY["tool", "probe_accuracy"]
    (panel,) = (
        single := MeasureFigure(measure, pd.DataFrame({"control": [None, "labels"], **ends}), "m")
    ).panels
    assert len(panel[1]) == 2 and single.vega()["layer"][0]["mark"]["type"] == "point"
    assert [label.get_text() for label in single.draw().get_yticklabels()] == ["–", "labels"]
    frame = pd.DataFrame({"layer": [0, 1], "control": ["_hidden", "shown"], **ends})
    legend = MeasureFigure(measure, frame, "m").draw().get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["_hidden", "shown"]


def test_a_matrix_has_its_layers_as_rows(run):
    image = by_name(run)["head_auroc"].draw().images[0]
    expected = np.add.outer(0.1 * np.arange(LAYERS), 0.01 * np.arange(3))
    assert image.get_array().data == pytest.approx(expected)


def test_points_have_the_intervals_that_there_are(run):
    figure = by_name(run)["knockout"]
    assert [title for title, _ in figure.panels] == ["part –", "part name"]
    axes = figure.draw()
    (dots,) = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert dots.get_xdata().tolist() == [-4, -4]
    (bars,) = axes.containers
    assert [segment[:, 0].tolist() for segment in bars.lines[2][0].get_segments()] == [[-5, -3]] * 2


def test_a_specification_is_valid_and_holds_the_numbers(run):
    for figure in figures(run):
        spec = figure.vega()
        json.dumps(spec, allow_nan=False)
        chart = altair.Chart.from_dict(spec)  # raises where the schema does not allow it
        values = pd.DataFrame(
            chart.to_dict()["datasets"].popitem()[1]
            if "datasets" in chart.to_dict()
            else spec["data"]["values"]
        )
        assert values.value.tolist() == pytest.approx(figure.frame.value.tolist()), figure.name


def test_every_format_is_written_and_the_same_run_gives_the_same_bytes(run, tmp_path):
    formats = ("pdf", "svg", "png", "vega", "csv")
    files = write_figures(run, tmp_path / "a", formats, ["knockout", "head_auroc"])
    again = write_figures(run, tmp_path / "b", formats, ["knockout", "head_auroc"])
    assert [file.suffix for file in files[:5]] == [".pdf", ".svg", ".png", ".json", ".csv"]
    assert [a.read_bytes() for a in files] == [b.read_bytes() for b in again]
    assert pd.read_csv(files[4]).value.tolist() == [-4, -1, -4, -1]
    svg = files[1].read_text()
    assert "\x1b" not in svg and "llama$x_{" in svg


def test_the_command_names_what_it_wrote_and_what_comes_near(run, tmp_path):
    ended = CliRunner().invoke(
        main, ["figures", str(run.path), "tool.knockout", "-o", str(tmp_path), "--format", "csv"]
    )
    assert ended.stdout.split() == [str(tmp_path / "tool.knockout.csv")]
    ended = CliRunner().invoke(main, ["figures", str(run.path), "knokout", "-o", str(tmp_path)])
    assert ended.exit_code == 2 and "did you mean tool.knockout?" in ended.stderr


def test_colours_can_be_told_apart_in_grey():
    """Of two neighbours in the list, as lightness: what a copier leaves."""
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in COLOURS])
    assert len({tuple(colour) for colour in rgb}) == 8
    light = rgb @ [0.2126, 0.7152, 0.0722]
    assert (np.abs(np.diff(light)) > 0.02).all()


def test_a_label_that_a_spreadsheet_would_run_is_text_in_a_figures_csv(run, tmp_path):
    (figure,) = figures(run, ("tool.knockout",))
    frame = figure.frame.head(2).assign(role=["=1+2", "plain"])
    path = replace(figure, frame=frame).save(tmp_path / "x.csv")
    assert pd.read_csv(path).role.tolist() == ["'=1+2", "plain"]


def test_a_notebook_shows_a_figure_in_its_own_size_and_says_what_it_is_of(run):
    (figure,) = figures(run, ("tool.knockout",))
    shown, facts = figure._repr_mimebundle_()
    assert shown["image/png"].startswith(b"\x89PNG")
    assert shown["text/plain"].startswith("tool.knockout: 4 numbers, nats. ")
    pixels = [int.from_bytes(shown["image/png"][at : at + 4], "big") for at in (16, 20)]
    size = facts["image/png"]
    assert [size["width"], size["height"]] == pytest.approx([p * 96 / 200 for p in pixels], abs=1)
