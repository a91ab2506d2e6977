"""Definitions of measures: one record each, printed by `probe measures`, tabulated in docs/, kept by old runs."""

from __future__ import annotations

import ast
import json

import pyarrow as pa
import pytest
from click.testing import CliRunner

import probe
from probe.analyzers.registry import REGISTRY
from probe.api import definitions
from probe.cli import main, reference
from probe.runs.migrate import migrated
from probe.runs.tables import MEASURE_FIELDS, measure_schema
from probe.training.memory.rule import rule_of_thumb
from tests.test_docs import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
PRINTED = {"memory"}
"""Analyzers whose pages explain their measures in words or in tables of their own."""


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_tables_of_measures_are_those_of_the_definitions(page):
    text = page.read_text(encoding="utf-8")
    assert reference.renewed(text, definitions()) == text, "stale: `make docs`"


def test_every_measure_stands_in_one_table_of_the_documentation():
    known = definitions()
    documented = [defined.key for page in PAGES for defined in reference.documented(page.read_text(), known)]
    assert len(documented) == len(set(documented))
    assert {defined.key for defined in known if defined.analyzer not in PRINTED} == set(documented)


def test_a_stale_table_and_one_of_nothing_are_noticed():
    page = "Before.\n<!-- measures: distribution -->\n| old |\n<!-- end -->\nAfter.\n"
    new = reference.renewed(page, definitions())
    assert "| old |" not in new and "`heat_capacity`" in new
    assert new.startswith("Before.") and new.endswith("After.\n")
    assert reference.renewed(new, definitions()) == new
    with pytest.raises(ValueError, match="no measure"):
        reference.renewed(page.replace("distribution", "distribution nowhere"), definitions())


def test_rows_are_made_through_a_definition_alone():
    made_in = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "probe").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Row", "Grid")
    }
    assert made_in == {"probe/analyzers/registry.py"}


def test_the_data_frame_holds_every_definition():
    frame = probe.measures()
    assert len(frame) == len(definitions())
    assert set(zip(frame.analyzer, frame.name, strict=True)) <= REGISTRY.keys()
    assert frame[["analyzer", "name", "unit", "of", "means", "figure"]].notna().all(axis=None)
    peak = frame[frame.name == "heat_capacity_peak"].iloc[0]
    assert (peak.unit, peak.of, peak["axes"], peak.figure) == ("temperature", "run", "", "text")


def test_the_command_prints_all_or_one_and_suggests_the_nearest():
    everything = CliRunner().invoke(main, ["measures", "--json"])
    assert len(json.loads(everything.stdout)) == len(definitions())
    lines = CliRunner().invoke(main, ["measures"]).stdout.splitlines()
    assert len(lines) == len(definitions())
    shown = CliRunner().invoke(main, ["measures", "heat_capacity"])
    assert "Var(E)/τ²" in shown.stdout and "nats" in shown.stdout
    unknown = CliRunner().invoke(main, ["measures", "heat_capcity"])
    assert unknown.exit_code == 2 and "did you mean heat_capacity" in unknown.stderr


def test_the_memory_of_a_step_has_the_defined_names():
    names = {name for analyzer, name in REGISTRY if analyzer == "memory"}
    rule = set(rule_of_thumb(10, 100)) - {"n_params"}
    assert rule < names
    assert names - rule == {"logits_bytes", "temporary_bytes"}, "which the rule counts among activations"


@pytest.mark.parametrize(
    ("name", "variant", "columns"),
    [
        ("entropy", None, {}),
        ("entropy", "few/sampled", {"variant": "few", "rule": "sampled"}),
        ("nucleus_size", "base/p=0.95", {"variant": "base", "p": 0.95}),
        ("temperature", "entropy=3", {"wanted_entropy": 3.0}),
        ("free_energy", "base/raw", {"variant": "base", "gauge": "raw"}),
        ("k_too_small", "k=40/p=0.9", {"k": 40, "p": 0.9}),
        ("mass_kept", "sampled", {}),
    ],
)
def test_rows_of_earlier_versions_get_their_columns(name, variant, columns):
    row = dict.fromkeys(MEASURE_FIELDS)
    row |= {"task_id": "a", "analyzer": "distribution", "name": name, "value": 1.0, "unit": "nats", "n": 1}
    table = pa.Table.from_pylist([row | {"variant": variant}], schema=measure_schema())
    assert migrated(table).to_pylist() == [row | {"variant": None} | columns]
