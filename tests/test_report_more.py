"""A measure with a definition and nothing else is in the report, drawn as its definition says."""

from __future__ import annotations

import json
import re

import pytest

from probe.analyzers import analyze
from probe.analyzers.registry import REGISTRY, Figure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.report import render, write_report
from probe.report.more import MOST, more
from probe.runs import Run
from tests.browser import browser, dom_of
from tests.test_analyzers import copied, make, plug
from tests.test_report import PAYLOAD, Page
from tests.test_report_cot import used

KINDS = {
    "toy_estimates": Figure(kind="estimates", by="rule"),
    "toy_curve": Figure(kind="curve", x="layer", by="rule"),
    "toy_bars": Figure(kind="bars", by="rule"),
    "toy_matrix": Figure(kind="matrix", x="head", by="layer"),
    "toy_table": Figure(kind="table"),
}


@pytest.fixture
def toy():
    """Definitions of one measure a kind of figure, one with a card, and one that is not to be drawn."""
    definitions = {
        name: measure(
            "toy", name, unit="toys", of="task run", axes="layer? head? rule?", means=f"What {name} is.",
            figure=figure, interval="none of meaning",
        )
        for name, figure in (KINDS | {"toy_carded": Figure(kind="bars", card="tool"), "toy_bare": "a reason"}).items()
    }  # fmt: skip
    yield definitions
    for name in definitions:
        del REGISTRY["toy", name]


@pytest.fixture
def run(toy, tmp_path, monkeypatch):
    def measures(run: Run):
        for name, defined in toy.items():
            for layer in range(3) if name in ("toy_curve", "toy_matrix") else (None,):
                for head in range(2) if name == "toy_matrix" else (None,):
                    rule = f"odd{PAYLOAD}" if head is None else None
                    value = 0.125 * ((layer or 0) + 1) * (-1 if head else 1)
                    place = {"layer": layer, "head": head, "rule": rule}
                    yield defined.row(WHOLE_RUN, value, n=7, interval=(value - 0.5, value + 0.5), **place)
            yield defined.row(run.task_ids[0], 0.75)
        yield Row(task_id=WHOLE_RUN, analyzer="toy", name="undefined", value=0.5, unit="toys", n=1)

    fresh = copied(make(tmp_path / "made", "cot"), tmp_path)
    plug(monkeypatch, toy=measures)
    analyze(fresh, ["toy"])
    return Run(fresh.path)


def test_the_page_holds_every_defined_measure_that_no_card_draws(run):
    html = render(run)
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', html, re.DOTALL)[1])
    [group] = data["more"]
    assert group["analyzer"] == "toy"
    assert {entry["name"]: entry["kind"] for entry in group["measures"]} == {
        name: figure.kind for name, figure in KINDS.items()
    }
    for entry in group["measures"]:
        assert (entry["unit"], entry["means"]) == ("toys", f"What {entry['name']} is.")
    assert len(next(e for e in group["measures"] if e["name"] == "toy_matrix")["rows"]) == 6
    assert {row["name"] for row in data["measures"] if row["analyzer"] == "toy"} >= {"toy_bare", "undefined"}
    of_task = data["details"][run.task_ids[0]]["pictures"]
    assert {entry["name"] for entry in of_task[0]["measures"]} == set(KINDS)


def test_of_many_rows_the_page_says_how_many_are_left_out(toy):
    defined = toy["toy_bars"]
    row = dict.fromkeys(defined.columns) | {"analyzer": "toy", "name": "toy_bars", "n": 1}
    rows = [row | {"value": 1.0, "low": None, "high": None, "layer": layer} for layer in range(MOST + 5)]
    [entry] = more(rows, {defined.key: defined})[0]["measures"]
    assert entry["left_out"] == 5 and len(entry["rows"]) == MOST


_OPENED = """
const result = {};
document.querySelectorAll(".more-measures").forEach((folded) => folded.dispatchEvent(new Event("toggle")));
"""


@browser
def test_a_browser_draws_each_by_its_kind_folded_away_and_runs_no_text(run, tmp_path):
    dom, console = dom_of(write_report(run), "#tab=tasks")
    assert console == []
    assert "more-measures" in dom and 'class="measure"' not in dom, "drawn before it is opened"
    _, dom = used(run, tmp_path, _OPENED)
    page = Page(dom)
    assert not any(name in ("img", "svg") for name, _ in page.tags)
    block = next(attrs for tag, attrs in page.tags if "more-measures" in (attrs.get("class") or ""))
    assert "open" not in block
    start = dom.rindex('class="more-measures"')
    shown = dom[start : dom.index('id="data"')]
    for name in KINDS:
        assert f"What {name} is." in shown
    parts = {name: shown[shown.index(f"What {name} is.") :] for name in KINDS}
    marks = {"toy_estimates": "range", "toy_curve": "plotbox", "toy_bars": "bar ", "toy_matrix": "heat"}
    for name, mark in marks.items():
        assert f'class="{mark}' in parts[name].split("</article>")[0], name
    assert "numbers (1 row)" in parts["toy_table"]
    assert "−0.25" in parts["toy_matrix"] and "n 7" in parts["toy_estimates"]
