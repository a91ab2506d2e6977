"""Figures of README and docs are claims that a run answers: every interval has one, and a figure that differs is said."""

from __future__ import annotations

import pandas as pd
import pytest

from benchmarks import claims
from probe.runs import AXES

PAGES = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("index", "temperature", "top-p", "boltzmann", "prompting", "tool-use", "cot", "lora")
    ),
)
FIGURES = {"a": "tool/knockout role=chosen", "b": "max prompting/kl layer=0..3", "c": "tool/accuracy"}
SAYS = "Masked, {a:2i} nats\n(n = {a.n}); at most {b:.1}; right in {c:%} {c.interval:%}."


def rows() -> pd.DataFrame:
    numbers = [
        {"analyzer": "tool", "name": "knockout", "role": "chosen", "value": -9.8169, "low": -11.884, "high": -7.8126, "n": 20},
        {"analyzer": "tool", "name": "knockout", "role": "chosen", "part": "name", "value": -1.0, "n": 20},
        {"analyzer": "tool", "name": "accuracy", "value": 0.43, "low": 0.32, "high": 0.55, "n": 72},
        *({"analyzer": "prompting", "name": "kl", "layer": k, "value": k / 10, "n": 3} for k in range(6)),
    ]  # fmt: skip
    return pd.DataFrame(numbers, columns=["analyzer", "name", "value", "low", "high", "n", *AXES]).assign(
        task_id=""
    )


@pytest.fixture
def claim(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    page = "Masked, −9.82 [−11.88, −7.81] nats (n = 20); at\nmost .3; right in 43 % [32, 55].\n"
    (tmp_path / "page.md").write_text(page, encoding="utf-8")
    return claims.Claim("page.md", "parts", SAYS, FIGURES)


@pytest.mark.parametrize("page", PAGES)
def test_every_interval_of_a_page_is_claimed_of_a_run(page):
    table = claims.read()
    assert list(claims.without_claim(page, table)) == []
    assert {claim.run for claim in table.claims} == {*table.runs, *table.commands}


def test_a_page_that_says_what_the_run_gives_is_right(claim):
    assert claims.checked(claim, rows()) is None


def test_a_figure_that_differs_is_said_and_can_be_written(claim, tmp_path):
    changed = rows()
    changed.loc[0, ["value", "high"]] = -0.004, 0.25
    fault = claims.checked(claim, changed, write=True)
    assert fault is not None
    assert "page.md:1: in the run parts, −9.82 [−11.88, −7.81] is 0.00 [−11.88, 0.25]" in fault
    assert claims.checked(claim, changed) is None
    assert "right in 43 % [32, 55]." in (tmp_path / "page.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("wanted", "count"), [("tool/knockout", 0), ("tool/nothing", 0), ("prompting/kl layer=0..3", 4)]
)
def test_a_figure_is_one_number_of_the_run(wanted, count):
    with pytest.raises(ValueError, match=f"{count} measures are '{wanted}'"):
        claims.figure(rows(), wanted)


def test_what_a_command_prints_is_claimed_by_its_keys(claim):
    gap = {"value": 1.5, "low": 1.0, "high": 2.0, "n": 40}
    document = {"gap": {"loss": gap}, "peak": 0.25}
    assert claims.printed(document, "gap.loss").written(None, "1i") == "1.5 [1.0, 2.0]"
    assert claims.printed(document, "peak").written(None, ".2i") == ".25"
    with pytest.raises(ValueError, match="no energy"):
        claims.printed(document, "gap.energy")


def test_an_interval_without_a_claim_is_found(claim, tmp_path):
    table = claims.Table({}, {}, [claim], [])
    path = tmp_path / "page.md"
    path.write_text(path.read_text(encoding="utf-8") + "More: .5 [.1, .9].\n", encoding="utf-8")
    assert list(claims.without_claim("page.md", table)) == ["page.md:3: More: .5 [.1, .9]."]
