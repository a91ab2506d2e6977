"""The report's card of prompting as a bias: the measured numbers, beside their controls, and what is missing."""

from __future__ import annotations

import json
import math
import re
import shutil

import pyarrow as pa
import pytest

from probe import report
from probe.analyzers import analyze
from probe.report import bias, data, render, write_report
from probe.runs import AXES, Run
from tests.browser import browser, dom_of
from tests.test_analyzers import make
from tests.test_report import PAYLOAD, Page

LAYERS, N = 4, 12
VARIANTS = {"few_shot": 2.5, "persona": 1.25}
LEVELS = {
    ("patch_recovery", None): 0.75,
    ("patch_recovery", "random"): -1.5,
    ("patch_recovery", "other_family"): -0.25,
    ("patch_removal", None): 0.5,
    ("lens_kl", None): 2.0,
    ("manifold_alignment", None): 0.875,
    ("manifold_alignment", "random"): 0.125,
    ("manifold_alignment", "other_family"): 0.25,
}
"""(measure, control) → its highest value."""
HOSTILE = "</script><b>" + PAYLOAD


def row(name, value, variant, interval: float | None = 0.125, **where):
    low, high = (None, None) if interval is None else (value - interval, value + interval)
    assert {"variant", *where} <= {*AXES}
    return dict.fromkeys(AXES) | {"task_id": "", "analyzer": "prompting", "name": name, "value": value,
        "unit": "nats", "low": low, "high": high, "n": N, "variant": variant} | where  # fmt: skip


def planted(without: tuple[str, ...] = ()) -> list[dict]:
    """Measures of a run: values that no other place holds, by layer highest at layer 2."""
    rows = [row("accuracy", 0.25, "base"), row("accuracy_spread", 0.5, None, wording="template")]
    for variant, kl in VARIANTS.items():
        rows += [row("accuracy", 0.75, variant), row("kl", kl, variant), row("log_odds_shift", -kl, variant)]
        rows += [row("bias_r2_family", 0.6, variant), row("bias_r2", 0.2, variant)]
        rows += [row("bias_r2_family", -0.4, variant, control="other_family")]
        rows += [row("bias_r2", 0.55, variant, family="colors")]
        rows += [row("patch_recovery_heldout", 0.45, variant)]
        rows += [row("patch_recovery_heldout", 0.95, variant, half=0, layer=2)]
        for end, sign in (("demoted", -1), ("promoted", 1)):
            for rank in (2, 1):
                token = f" {end}{rank}\n{HOSTILE}"
                place = {"family": "colors", "rank": rank, "token": token}
                rows.append(row(f"bias_{end}", sign * (9.0 - rank), variant, None, **place))
        for (name, control), level in LEVELS.items():
            for layer in reversed(range(LAYERS)):
                value, place = level * (1 if layer == 2 else 0.5), {"control": control, "layer": layer}
                rows.append(row(name, value, variant, **place))
                rows.append(row(name, value / 3, variant, family="colors", **place))
    rows += [row("manifold_alignment", 0.0625, "base", layer=layer) for layer in range(LAYERS)]
    return [row for row in rows if not row["name"].startswith(without or ("no such",))]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run = make(tmp_path_factory.mktemp("plain"), "prompting")
    analyze(run)
    return run


def measured(plain: Run, path, rows) -> Run:
    run = Run(shutil.copytree(plain.path, path))
    old = run.measures(arrow=True)
    run.write_table("measures", pa.Table.from_pylist(rows, schema=old.schema))
    return run


def test_the_table_has_a_line_a_variant_and_needs_no_script(plain, tmp_path):
    page = Page(render(measured(plain, tmp_path / "run", planted())))
    heads = page.texts["th"]
    assert [name for name in heads if name in ("base", *VARIANTS)] == ["base", *VARIANTS]
    cells = [text for text in page.texts["td"] if text.strip()]
    assert cells[:8] == ["25\u00a0%", "–", "–", "–", "–", "–", "–", str(N)]
    assert cells[8:16] == ["75\u00a0%", "2.50", "−2.50", "0.60", "0.20", "−0.40", "0.45", str(N)]
    assert "0.08 to 0.33" in page.texts["small"], "the interval of the R² of all tasks"


def test_curves_are_the_measured_ones_in_order_of_layers_and_of_all_families_together(plain, tmp_path):
    card = data.collect(measured(plain, tmp_path / "run", planted()))["cards"]["bias"]
    assert card["first"] == "few_shot", "the strongest shift is open first"
    assert list(card["curves"]) == list(VARIANTS)
    curves = {(curve["measure"], curve["control"]): curve["points"] for curve in card["curves"]["persona"]}
    assert curves.keys() == LEVELS.keys()
    for key, level in LEVELS.items():
        curve = curves[key]
        assert [point[0] for point in curve] == list(range(LAYERS))
        assert curve[2][1:] == pytest.approx([level, level - 0.125, level + 0.125])
        assert curve[1][1] == pytest.approx(level / 2)
    assert [point[1] for point in card["bare"]] == [0.0625] * LAYERS
    assert card["n"] == {name: N for name, _ in LEVELS}
    assert card["missing"] == []


def test_a_vectors_tokens_stand_by_rank_with_the_r2_of_their_family(plain, tmp_path):
    card = data.collect(measured(plain, tmp_path / "run", planted()))["cards"]["bias"]
    [vector] = card["vectors"]["few_shot"]
    assert (vector["family"], vector["n"], vector["r2"]["value"]) == ("colors", N, 0.55)
    assert [value for _, value in vector["promoted"]] == [8.0, 7.0]
    assert [value for _, value in vector["demoted"]] == [-8.0, -7.0]
    assert vector["promoted"][0][0].startswith(" promoted1\n")
    assert "\u202e" not in vector["promoted"][0][0]


@pytest.mark.parametrize(
    ("without", "command"),
    [
        (("patch_",), "probe analyze RUN patch"),
        (("lens_",), "probe analyze RUN lens"),
        (("manifold_",), "probe analyze RUN prompting --no-model"),
        (("bias_",), "probe analyze RUN prompting --no-model"),
    ],
)
def test_what_was_not_measured_is_left_out_and_its_command_is_named(plain, tmp_path, without, command):
    page = Page(render(measured(plain, tmp_path / "run", planted(without))))
    assert command in {re.sub(r"analyze \S+", "analyze RUN", text) for text in page.texts["code"]}
    heads = [head for head in page.texts["th"] if head == "recovered"]
    assert len(heads) == (without != ("patch_",))
    curves = page.data["cards"]["bias"]["curves"]["few_shot"]
    assert not [curve for curve in curves if curve["measure"].startswith(without)]


def test_the_commands_that_are_named_exist():
    from probe.analyzers import analyzers
    from probe.experiments import EXPERIMENTS

    for _, command in bias._MAKES.values():
        assert command.split()[3] in {*EXPERIMENTS, *analyzers()}


def test_without_a_shift_there_is_no_card(plain, tmp_path):
    collected = data.collect(measured(plain, tmp_path / "run", [row("accuracy", 0.5, "base")]))
    assert collected["cards"]["bias"] is None
    assert 'id="bias"' not in render(Run(tmp_path / "run"))


def test_measures_with_a_place_in_the_card_are_not_listed_again_and_groups_are_no_variants(plain, tmp_path):
    collected = data.collect(measured(plain, tmp_path / "run", planted()))
    assert collected["measures"] == []
    (more,) = collected["more"]
    assert [measure["name"] for measure in more["measures"]] == ["accuracy_spread"]
    assert [variant["variant"] for variant in collected["variants"]] == ["base", *VARIANTS]


def test_an_infinite_shift_is_a_word(plain, tmp_path):
    rows = [*planted(("kl",)), row("kl", math.inf, "persona", None)]
    page = Page(render(measured(plain, tmp_path / "run", rows)))
    assert "∞" in page.texts["td"]


_USE = """
const whole = document.getElementById("bias"), result = {};
const seen = () => ({ titles: [...whole.querySelectorAll("h4")].map((title) => title.firstChild.textContent),
  ends: [...whole.querySelectorAll(".end")].map((end) => end.textContent), strokes: whole.querySelectorAll(".stroke").length,
  bands: whole.querySelectorAll(".band").length, tokens: [...whole.querySelectorAll(".tokens code")].map((token) => token.firstChild.textContent) });
result.first = seen();
const buttons = [...whole.querySelectorAll(".segmented button")];
result.pressed = buttons.map((button) => [button.textContent, button.getAttribute("aria-pressed")]);
buttons[1].focus(); result.focused = document.activeElement === buttons[1];
buttons[1].click(); result.second = seen();
result.heads = [...document.querySelectorAll("#why figure h3")].map((title) => title.textContent);
const done = document.createElement("pre"); done.id = "result"; done.textContent = JSON.stringify(result); document.body.append(done);
"""


@browser
def test_a_browser_draws_every_curve_with_its_name_and_tokens_stay_text(plain, tmp_path, monkeypatch):
    asset = report.asset
    monkeypatch.setattr(report, "asset", lambda name: asset(name) + (_USE if name == "view.js" else ""))
    run = measured(plain, tmp_path / "run", planted())
    dom, console = dom_of(write_report(run, tmp_path / "page.html"), "#tab=why")
    assert console == []
    page = Page(dom)
    result = json.loads(page.texts["pre"][-1])
    assert result["heads"][0] == "Prompting as a bias"
    assert result["pressed"] == [["few_shot", "true"], ["persona", "false"]]
    assert result["focused"]
    for card in (result["first"], result["second"]):
        assert len(card["titles"]) == 4
        assert sorted(card["ends"]) == sorted(
            ["added", "taken out", "other family’s", "random", "this variant", "bare input",
             "other family’s", "random", "this variant"]
        )  # fmt: skip
        assert (card["strokes"], card["bands"]) == (9, 9)
        assert len(card["tokens"]) == 4
        assert all(re.match("␣(promot|demot)ed[12]↵</script><b>", token) for token in card["tokens"])
    assert page.texts["title"][0].endswith("· probe")
    assert not any("NaN" in str(value) for _, attrs in page.tags for value in attrs.values())
    assert not {"img", "svg", "iframe", "link", "object"} & {tag for tag, _ in page.tags}
