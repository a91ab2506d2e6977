"""The report: inert, offline, honest about what is missing, and alive in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from probe.analyzers import analyze, tool
from probe.analyzers.rows import to_table
from probe.report import choices, data, details, render, tasklist, verdict, why, write_report
from probe.report.rows import MeasureRows
from probe.report.text import visible
from probe.runs import Array, Run, RunWriter, verify
from probe.runs.files import encode_signed
from probe.runs.records import PassageRecord, Span, ToolRecord, decode
from tests.browser import browser, dom_of, tab
from tests.made_up_runs import EMPTY_PASSAGE, PlantedTask, condition, made_up_interventions, put_interventions
from tests.test_analyzers import TASKS, make

PAYLOADS = [
    "<script>document.title='pwned'</script>",
    "</script><img src=x onerror=\"document.title='pwned'\">",
    "</style><svg onload=document.title='pwned'>",
    "<!--<script>]]>\"'`--><b onclick=document.title='pwned'>",
    "{{ 7 * 7 }}{% raw %}&lt;script&gt;javascript:alert(1)",
    "\u2028\u2029\x1b[31mred\x1b[0m\x07\u202eevil\u202c\x9b2J\x00",
]
PAYLOAD = "".join(PAYLOADS)
KEPT = {"kind", "status", "dtype", "kinds", "finish_reason", "no_tool"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One analyzed run a kind, on tiny-llama."""
    by_kind = {kind: make(tmp_path_factory.mktemp(kind), kind) for kind in TASKS}
    for run in by_kind.values():
        analyze(run)
    return by_kind


# -- a run in which every text is hostile --------------------------------------------------------------------------


def hostile(value: Any, key: str = "") -> Any:
    """The same JSON tree with the payload at the end of every text that is not structure."""
    if isinstance(value, dict):
        return {name: hostile(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [hostile(item, key) for item in value]
    if not isinstance(value, str) or key in KEPT:
        return value
    if key == "label" and not value.startswith("tool:"):
        return value
    return value + PAYLOAD


def hostile_run(run: Run, path: Path) -> Run:
    header = {name: item for name, item in run.run.items() if name not in ("id", "status")}
    with RunWriter.create(path, hostile(header)) as writer:
        for task in run:
            arrays = {name: Array(task[name], task.axes(name)) for name in task}
            metadata = {
                name: json.dumps(hostile(json.loads(text), "label"))
                for name, text in task.metadata.items()
                if name.endswith(("labels", "layers"))
            }
            writer.commit(hostile(task.record), arrays, metadata)
        error = {"id": "broken" + PAYLOAD, "kind": "cot", "status": "error", "error": PAYLOAD, "seconds": 0.1}
        writer.commit(error, {}, {})
        writer.finish("failed")
    run = Run(path)
    analyze(run)
    return run


class Page(HTMLParser):
    """Tags, attributes and the text of each element of a page."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open:
            self.texts[self._open][-1] += data

    @property
    def policy(self) -> dict[str, list[str]]:
        content = next(a["content"] for t, a in self.tags if a.get("http-equiv") == "Content-Security-Policy")
        return {name: sources for name, *sources in (part.split() for part in str(content).split(";"))}

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.texts["script"][0])


@pytest.mark.parametrize("kind", list(TASKS))
def test_hostile_text_in_every_field_stays_text(runs, tmp_path, kind):
    html = render(hostile_run(runs[kind], tmp_path / "hostile"))
    page = Page(html)
    allowed = {
        "html", "head", "meta", "title", "style", "body", "header", "p", "span", "h1", "h2", "dl", "div", "dt", "dd",
        "details", "summary", "main", "section", "article", "b", "code", "input", "select", "option", "output",
        "kbd", "noscript", "footer", "script", "figure", "figcaption", "h3", "small", "table", "thead", "tbody",
        "tr", "th", "td",
    }  # fmt: skip
    assert {tag for tag, _ in page.tags} <= allowed
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [
        {"id": "data", "type": "application/json"},
        {},
    ]
    assert not [
        name for _, attrs in page.tags for name in attrs if name.startswith("on") or name in ("src", "href")
    ]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", html)
    assert "document.title='pwned'" in page.data["tasks"][0]["id"]
    assert "⟨U+202E⟩" in page.texts["title"][0]
    assert page.data["details"][page.data["tasks"][-1]["id"]]["error"].startswith("<script>")


def test_control_and_direction_characters_are_spelled_out_and_text_is_else_untouched():
    assert visible({"a": ["x\x1b[1m", "é 漢字\n\t✓"], "b": float("inf"), "c": float("nan")}) == {
        "a": ["x⟨U+001B⟩[1m", "é 漢字\n\t✓"], "b": "∞", "c": None,
    }  # fmt: skip


# -- offline -----------------------------------------------------------------------------------------------------------


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else(runs):
    page = Page(render(runs["tool"]))
    script, style = page.texts["script"][1], page.texts["style"][0]
    expected = {
        f"{name}-src": ["'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"]
        for name, text in (("script", script), ("style", style))
    }
    none = {name: ["'none'"] for name in ("default-src", "base-uri", "form-action")}
    assert page.policy == expected | none


def test_nothing_in_the_page_names_another_place():
    folder = resources.files("probe.report")
    for name in (f.name for f in folder.iterdir() if f.name.endswith((".html", ".css", ".js"))):
        text = folder.joinpath(name).read_text(encoding="utf-8")
        text = text.replace(
            'const SVG = "http://www.w3.org/2000/svg";', ""
        )  # a name of the format, not a place
        if name == "served.js":  # alone in pages of `probe view`, which ask their own server
            text = text.replace("await fetch(`task/${PAGE.version}/${PAGE.tasks.indexOf(task)}`)", "")
            text = text.replace('await fetch("version")', "")
        matches = re.findall(
            r"https?:|//[a-z]+\.|url\(|@import|\bfetch\(|XMLHttp|WebSocket|innerHTML|eval\(|\|\s*safe", text
        )
        assert not matches, (name, matches)


def test_the_page_around_the_data_is_small(runs, measured):
    for run in (measured, *runs.values()):
        html = render(run)
        assert len(html) - len(Page(html).texts["script"][0]) < 170_000


def test_no_text_of_a_script_goes_over_a_line_so_that_its_indentation_can_be_left_out():
    scripts = [path for path in resources.files("probe.report").iterdir() if path.name.endswith(".js")]
    lines = [(path.name, line) for path in scripts for line in path.read_text().splitlines()]
    assert scripts
    assert [line for line in lines if line[1].count("`") % 2 or line[1].endswith("\\")] == []


# -- what it says ---------------------------------------------------------------------------------------------------------


def test_the_report_of_a_run_is_stored_and_verifies(runs, tmp_path):
    run = Run(shutil.copytree(runs["tool"].path, tmp_path / "run"))
    assert write_report(run) == run.path / "report.html"
    assert write_report(run, run.path / "report.html") == run.path / "report.html"
    assert verify(run.path).complete
    assert not verify(run.path).problems
    elsewhere = write_report(run, tmp_path / "new" / "page.html")
    assert elsewhere.read_text() == (run.path / "report.html").read_text()


def test_the_headline_has_the_interval_and_the_baselines_in_one_sentence(runs):
    collected = data.collect(runs["tool"])
    sentence = collected["headlines"][0]["sentence"].replace("\u00a0", " ")
    assert re.search(r"in [0-3] of 3 tasks: \d+ % \(95 % interval \d+ % to \d+ %\)", sentence)
    assert "always the first tool" in sentence
    assert "a uniform choice" in sentence
    rows = {row[0]: row[1:] for row in collected["headlines"][0]["dots"]}
    measures = runs["tool"].measures()
    expected = measures[(measures.name == "accuracy")].iloc[0]
    assert rows["scored choice"] == [expected.value, expected.low, expected.high]


def test_the_generated_call_and_the_candidates_mass_stand_beside_the_scored_choice(runs):
    collected = data.collect(runs["tool"])
    records = [task.typed(ToolRecord) for task in runs["tool"]]
    dots = {row[0]: row[1] for row in collected["headlines"][0]["dots"]}
    assert dots["generated call"] == np.mean([record.calls_right for record in records])
    assert dots["candidate mass, median"] == np.median([record.decision.candidate_mass for record in records])
    sentence = collected["headlines"][0]["sentence"]
    assert "The call that the model writes is right in" in sentence
    assert "names that it would seldom write" in sentence, "a random model has next to no mass on them"
    for row, record in zip(collected["tasks"], records, strict=True):
        assert (row["mass"], row["call_right"]) == (record.decision.candidate_mass, record.calls_right)
        assert row["called"] == (record.decision.called or ("no tool" if record.decision.call else "nothing"))


def _row(
    right: str, chosen: str, error: str | None = None, status: str = "ok", cut: bool = False
) -> dict[str, Any]:
    row = {"right": right, "chosen": chosen, "score": float(right == chosen), "status": status, "cut": cut}
    return row | {"call_right": error is None, "call_error": error}


def test_the_verdict_says_what_most_errors_have_in_common():
    rows = [
        _row("a", "no tool", "not_json"),
        _row("b", "no tool", "not_json"),
        _row("a", "b"),
        _row("no tool", "a"),
    ]
    told = tasklist.dominant_errors([*rows, _row("a", "a")])
    assert told == "Of 4 wrong choices, 2 name no tool where one was wanted. Of 2 wrong calls, 2: not json."
    assert tasklist.dominant_errors([_row("a", "a")]) == ""


def test_a_wrong_call_of_right_form_is_told_by_what_was_wanted():
    for target, called, told in (
        ("a", "nothing", "no call where one was wanted"),
        ("a", "no tool", "no call where one was wanted"),
        ("no tool", "a", "a call where none was wanted"),
        ("a or b", "c", "another tool than the wanted one"),
        ("a or b", "b", "more calls than the wanted one, or an opener less likely than not"),
    ):
        row = _row("a", "a") | {"call_right": False, "target": target, "called": called}
        assert tasklist.dominant_errors([row]) == f"Of 1 wrong call, 1: {told}."


def test_the_first_lines_say_how_a_run_ended_and_with_which_command_it_goes_on():
    rows = [_row("a", "a", status="truncated", cut=True), _row("a", "a", status="error"), _row("a", "a")]
    told = verdict.notices("runs/x", {"status": "started"}, rows, 5)
    assert [(line["text"].split(":")[0], line["command"], line["grave"]) for line in told] == [
        ("Not ended", "probe resume runs/x", True),
        ("1 of 3 tasks failed with “error”", None, True),
        ("Truncated", None, True),
        ("The texts of 1 of 3 tasks were cut at the limit of new tokens.", None, False),
    ]
    assert verdict.notices("runs/x", {"status": "done"}, [_row("a", "a")], 1) == []


def test_what_was_not_measured_stands_in_the_verdict_with_its_command(runs):
    for kind, commands in (
        ("tool", ["--quick"]),
        ("cot", ["knockouts"]),
        ("prompting", ["patch"]),
    ):
        collected = data.collect(runs[kind])
        (part,) = collected["causes"]
        assert [line["command"] for line in part["missing"]] == [
            f"probe analyze {collected['command']} {name}" for name in commands
        ]


def _record(target: Any, **decision: Any) -> ToolRecord:
    names = (*("chosen", "chosen_tool"), "candidate_mass")
    scores = [
        {"tool": tool, "log_prob": -1.0, "probability": 0.5, "token_ids": [1]} for tool in ("search", None)
    ]
    facts = {"tool_probabilities": scores} | dict(zip(names, ("search", "search", 1.0), strict=True))
    record = EMPTY_PASSAGE | facts | {"id": "t", "kind": "tool_selection", "status": "ok", "target": target}
    return decode(record | decision, ToolRecord, Path("t"))


@pytest.mark.parametrize(
    ("target", "decision", "right"),
    [
        ("search", {"called": "search", "call": {"name": "search"}}, True),
        ("search", {"called": "search", "call": {"name": "search"}, "call_error": "no such argument"}, False),
        ("search", {"called": None, "call": {"name": None}}, False),
        (None, {"called": None, "call": {"name": None}}, True),
        (None, {"called": None, "call": None, "call_error": "there is no call in the text"}, False),
        (None, {"called": "search", "call": {"name": "search"}}, False),
        (None, {"called": "search", "no_tool": "complement", "opener_log_prob": -0.7}, True),
        (None, {"called": "search", "no_tool": "complement", "opener_log_prob": -0.69}, False),
        ("search", {"called": "search", "no_tool": "complement", "opener_log_prob": -0.7}, False),
        ("search", {"called": "search", "no_tool": "listed", "opener_log_prob": -100.0}, True),
    ],
)
def test_a_generated_call_is_right_if_the_model_would_have_made_it_and_its_arguments_fit(
    target, decision, right
):
    assert _record(target, **decision).calls_right is right


def test_embedded_attention_is_the_captured_row(runs):
    task = runs["tool"]["t1"]
    attention = data.collect(runs["tool"])["details"]["t1"]["attention"]
    labels = task.labels()
    columns = [labels.index(f"tool:{name}") for name in attention["tools"]] + [
        labels.index(x) for x in attention["beside"]
    ]
    row = (task["rows"] == task["decisions"][0]).nonzero()[0, 0]
    captured = task["attn_to_spans"][:, :, row, columns].numpy()
    assert attention["beside"] == ["bos", "user"]
    assert np.array(attention["ppm"]) / 1e6 == pytest.approx(captured, abs=1e-6)


@pytest.mark.parametrize("kind", list(TASKS))
def test_each_generated_token_has_its_text_and_its_log_probability(runs, kind):
    run = runs[kind]
    for task in run:
        shown = data.collect(run)["details"][task.id]
        for prefix, part in [(f"{v['variant']}/", v) for v in shown.get("variants", ())] or [("", shown)]:
            captured = task[f"{prefix}log_probs"].tolist()
            assert part["log_probs"] == pytest.approx(captured, rel=1e-3)
            assert len(part["token_lengths"]) == len(captured) == part["n_new"]
            assert sum(part["token_lengths"]) == len(visible(part["completion"]))


def test_a_token_is_as_long_as_a_script_sees_it_on_the_page():
    passage = decode(
        EMPTY_PASSAGE
        | {
            "id": "t",
            "kind": "cot",
            "status": "ok",
            "completion": "a😀\x1b.",
            "token_characters": [1, 0, 1, 2, 0],
        },
        PassageRecord,
        Path("t"),
    ).passage
    kept = PlantedTask({"id": "t"}, {"log_probs": np.array([-0.5, -1.0, -2.0, -3.0, -0.1])}, [])
    shown = details._tokens(kept, passage)
    assert shown["token_lengths"] == [1, 0, 2, len("⟨U+001B⟩."), 0]
    older = msgspec.structs.replace(passage, token_characters=None)
    assert details._tokens(kept, older) == {}
    assert details._tokens(PlantedTask({"id": "t"}, {}, []), passage) == {}
    altered = msgspec.structs.replace(passage, completion="another text")
    assert details._tokens(kept, altered) == {}


@browser
def test_a_token_says_its_probability_to_pointer_and_keyboard(runs, tmp_path):
    task = next(iter(runs["tool"]))
    logs = task["log_probs"].tolist()
    with tab(write_report(runs["tool"], tmp_path / "page.html"), f"#task={task.id}") as opened:
        readout = "document.querySelector('.tokens').previousElementSibling.textContent"
        opened.evaluate(
            "document.querySelector('.tokens .token').dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
        )
        assert opened.evaluate(f"{readout}.includes('token ')")
        opened.evaluate("document.querySelector('.tokens').focus()")
        opened.press("Home")
        shown = re.fullmatch(
            r"token 1 of (\d+) · “.*” · P (\S+) · log P (\S+) nats", opened.evaluate(readout)
        )
        assert shown is not None and int(shown[1]) == len(logs)
        assert float(shown[3].replace("−", "-")) == pytest.approx(logs[0], rel=5e-3)
        opened.press("ArrowRight")
        assert opened.evaluate(f"{readout}.startsWith('token 2 of')")
        assert opened.evaluate("document.querySelector('.token.current.rare3') !== null") == (
            np.exp(logs[1]) < 0.01
        )
        assert opened.console == []


@browser
def test_a_token_of_probability_zero_says_so(runs, tmp_path, monkeypatch):
    task, tokens = next(iter(runs["tool"])), details._tokens

    def impossible(*args):
        shown = tokens(*args)
        return shown and shown | {"log_probs": ["−∞", *shown["log_probs"][1:]]}

    monkeypatch.setattr(details, "_tokens", impossible)
    with tab(write_report(runs["tool"], tmp_path / "page.html"), f"#task={task.id}") as opened:
        opened.evaluate("document.querySelector('.tokens').focus()")
        opened.press("Home")
        told = opened.evaluate("document.querySelector('.tokens').previousElementSibling.textContent")
        assert told.endswith("P 0.0000 · log P −∞ nats")
        assert opened.evaluate("document.querySelector('.token.current.rare3') !== null")


def test_a_figure_too_large_to_embed_is_embedded_as_its_mean(runs, monkeypatch):
    monkeypatch.setattr(details, "NUMBERS", 10)
    tool = data.collect(runs["tool"])["details"]["t1"]["attention"]
    assert tool["averaged"]
    assert np.array(tool["ppm"]).shape[:2] == (4, 1)


def test_details_end_at_the_limit_and_the_table_does_not(runs, monkeypatch):
    monkeypatch.setattr(data, "DETAILS", 1)
    collected = data.collect(runs["tool"])
    assert [name for name, task in collected["details"].items() if "texts_only" not in task] == ["t1"]
    assert len(collected["tasks"]) == 3
    assert all(row["margin"] is not None for row in collected["tasks"])
    assert "figures are embedded for the first 1" in render(runs["tool"])
    (passage,) = collected["details"]["t3"]["passages"]
    assert "".join(text for _, text in passage["pieces"]) == runs["tool"]["t3"].record["prompt"]
    monkeypatch.setattr(data, "TEXT_BYTES", 1)
    assert list(data.collect(runs["tool"])["details"]) == ["t1", "t2"], "the texts of a long run have a limit"


def test_a_run_that_did_not_end_says_how_many_tasks_it_lacks(runs, tmp_path):
    run = Run(shutil.copytree(runs["tool"].path, tmp_path / "run"))
    header = json.loads((run.path / "run.json").read_text())
    longer = header | {"task_ids": [*header["task_ids"], "t4", "t5"], "status": "started"}
    (run.path / "run.json").write_bytes(encode_signed(longer))
    for ended in ("manifest.json", "measures.parquet", "report.html"):
        (run.path / ended).unlink(missing_ok=True)
    assert "3 of 5 tasks are here" in render(Run(run.path))
    assert "probe resume" in render(Run(run.path))
    assert "Not ended" not in render(runs["tool"])


def test_the_table_of_an_agent_says_what_was_called_and_what_was_expected(runs, tmp_path):
    (row,) = data.collect(agent_run(runs["tool"], tmp_path / "run"))["tasks"]
    assert (row["called"], row["turns"], row["chosen"]) == ("sum → sum", 3, "It is 5.")
    assert row["target"].endswith(" · answer 5")


def test_measures_of_other_analyzers_are_listed_with_their_task(runs, tmp_path):
    run = Run(shutil.copytree(runs["tool"].path, tmp_path / "run"))
    old = run.measures(arrow=True)
    row = old.slice(0, 1).to_pylist()[0] | {
        "analyzer": "other",
        "name": "surprise",
        "tool": "sum",
        "task_id": "t2",
    }
    run.write_table("measures", pa.concat_tables([old, pa.Table.from_pylist([row], schema=old.schema)]))
    more = data.collect(run)["details"]["t2"]["more"]
    others = [entry for entry in more if entry["analyzer"] == "other"]
    assert [(entry["name"], entry["where"]) for entry in others] == [("surprise", "tool sum")]
    figures = {"probability", "log_prob", "attention", "margin", "entropy"}
    assert not figures & {entry["name"] for entry in more}, "they have figures of their own"


@pytest.mark.parametrize("kind", list(TASKS))
def test_a_run_without_captures_or_measures_has_a_report_that_says_so(tmp_path, kind):
    run = make(tmp_path, kind, capture="none")
    page = Page(render(run))
    assert "not analyzed" in page.texts["article"][0] + "".join(page.texts["p"])
    shown = next(iter(page.data["details"].values()))
    if kind == "tool":
        assert shown["attention"] is None
    elif kind == "cot":
        assert shown["cycle"]["reads"] == {}
    else:
        assert shown["variants"][1]["kl"] is None


def test_tools_are_found_in_the_prompt_and_spans_with_text_are_taken_as_they_are(runs):
    passage = runs["tool"]["t1"].typed(PassageRecord).passage
    without = [msgspec.structs.replace(span, text=None) for span in passage.spans]
    pieces = details.pieces(msgspec.structs.replace(passage, spans=without))
    assert "".join(str(text) for _, text in pieces) == passage.prompt
    named = {label: json.loads(str(text)) for label, text in pieces if label}
    assert {label: value["name"] for label, value in named.items()} == {
        f"tool:{name}": name for name in ("search", "search_news", "sum")
    }
    bos, user = Span(label="bos", start=0, end=1, text="<s>"), Span(label="user", start=1, end=3, text="hi")
    passage = msgspec.structs.replace(passage, prompt="<s>hi", n_prompt=3, spans=[bos, user])
    assert details.pieces(passage) == [["bos", "<s>"], ["user", "hi"]]


# -- why this tool ---------------------------------------------------------------------------------------------------------


def intervened(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run with measures of made-up interventions on every tool."""
    rows = made_up_interventions(run)
    put_interventions(monkeypatch, rows)
    run.write_table("measures", to_table(tool.measures(run)))
    return run


@pytest.fixture
def with_causes(runs, tmp_path, monkeypatch):
    return intervened(Run(shutil.copytree(runs["tool"].path, tmp_path / "run")), monkeypatch)


def test_the_card_of_causes_holds_the_measures_of_the_run(with_causes):
    why = data.collect(with_causes)["cards"]["why"]
    frame = with_causes.measures()
    whole = frame[frame.task_id == ""]
    description, name_alone, masked, at_decision = why["causes"]
    names = [cause["name"] for cause in why["causes"]]
    assert names == ["knockout description", "knockout name", "knockout", "knockout_decision"]
    for part, cause in (("description", description), ("name", name_alone), (None, masked)):
        of_part = whole[whole.part.isna() if part is None else whole.part == part]
        for row in cause["effects"]:
            for key, name in (
                ("effect", "knockout"),
                ("control", "knockout_random"),
                ("net", "knockout_minus_random"),
                ("other", "knockout_other"),
                ("beyond_other", "knockout_minus_other"),
            ):
                expected = of_part[(of_part.name == name) & (of_part.role == row["role"])].iloc[0]
                assert row[key]["value"] == expected.value
                assert row[key]["n"] == expected.n
    (verdict,) = data.collect(with_causes)["causes"]
    net = whole[(whole.name == "knockout_minus_random") & (whole.role == "chosen")].set_index("part").value
    shown = {line["what"]: line["value"] for line in verdict["lines"]}
    assert shown["description hidden"] == net["description"]
    assert (
        shown["descriptions exchanged: slope of the shares, near 1 where they go along"]
        == why["swap"]["slope"]["value"]
    )
    assert "whichever tool is wanted; the description alone is worth" in verdict["together"]
    assert verdict["missing"] == []
    correlates = {row["label"]: row for row in at_decision["correlates"]}
    expected = whole[
        (whole.name == "causal_spearman_within")
        & (whole.correlate == "attention_norm")
        & (whole.cause == "knockout_decision")
    ].iloc[0]
    within = correlates["norm of what is read"]["within"]
    assert within["value"] == expected.value
    assert within["low"] is within["high"] is None and np.isnan(expected.low), "too few tasks for an interval"
    assert [row["layers"] for row in why["windows"]] == [[0, 1], [2, 3]]
    assert why["swap"]["slope"]["value"] == frame[frame.name == "swap_slope"].value.item()


def test_a_task_has_its_tools_side_by_side_and_an_exchange_is_told_from_the_tools_own_side(with_causes):
    frame = with_causes.measures()
    collected = data.collect(with_causes)["details"]["t1"]
    record = with_causes["t1"].record
    of_task = frame[frame.task_id == "t1"]
    for entry, shown in zip(collected["entries"], collected["why"]["entries"], strict=True):
        name = entry["tool"]
        rows = of_task[of_task.tool.isna() if name is None else of_task.tool == name]
        parts = rows[rows.name == "knockout"].set_index("part").value
        rows = rows[rows.part.isna()].set_index("name")
        drawn = rows.loc["p_action_given_state"]
        drawn = (
            drawn
            if name is not None
            else of_task[(of_task.name == "p_action_given_state") & of_task.tool.isna()].iloc[0]
        )
        assert shown["p_action"] == [
            {"value": drawn.value, "low": drawn.low, "high": drawn.high, "n": drawn.n}
        ]
        if name is None:
            assert shown["knockout"] is None
            assert shown["words"] == []
            continue
        assert shown["knockout"]["value"] == rows.loc["knockout"].value
        assert [part["value"] for part in shown["parts"]] == [parts["description"], parts["name"]]
        words = rows.loc["word"].sort_values("value", key=abs, ascending=False).head(3)
        assert shown["words"] == [list(pair) for pair in zip(words.word, words.value, strict=True)]
        swap = of_task[(of_task.name == "swap") & (of_task.other_tool == name)]
        assert shown["swap"] == (None if name == record["chosen_tool"] else -swap.value.item())
    shown_above = {"knockout", "knockout_decision", "swap", "scramble", "remove", "p_action_given_state"}
    assert not shown_above & {entry["name"] for entry in collected["more"]}


def test_without_interventions_there_is_no_card_and_no_figure(runs):
    collected = data.collect(runs["tool"])
    assert collected["cards"]["why"] is None
    assert collected["details"]["t1"]["why"] is None
    assert why.overview([]) is None


@browser
def test_a_browser_draws_the_causes_and_runs_nothing_that_a_tool_is_called(runs, tmp_path, monkeypatch):
    run = intervened(hostile_run(runs["tool"], tmp_path / "hostile"), monkeypatch)
    dom, console = dom_of(write_report(run), "#tab=tasks")
    assert console == []
    page = Page(dom)
    assert page.texts["title"][0].endswith("· probe")
    assert not {"img", "svg", "iframe", "link", "object"} & {tag for tag, _ in page.tags}
    assert dom.count("<h3>Why this tool?</h3>") == 2
    assert "over all tools" in dom
    assert "P over intentions" in dom
    assert page.texts["q"]
    assert not any("NaN" in str(value) for _, attrs in page.tags for value in attrs.values())


# -- the cards of tool choice ------------------------------------------------------------------------------------------------


def repeated(run: Run, path: Path, times: int = 12) -> Run:
    """The run with each of its tasks several times, so that there is enough to calibrate, rank and probe."""
    header = {name: item for name, item in run.run.items() if name not in ("id", "status")}
    with RunWriter.create(path, header) as writer:
        for number in range(times):
            for task in run:
                arrays = {name: Array(task[name], task.axes(name)) for name in task}
                metadata = {
                    name: text for name, text in task.metadata.items() if name.endswith(("labels", "layers"))
                }
                writer.commit(task.record | {"id": f"{task.id}-{number}"}, arrays, metadata)
        writer.finish("done")
    return Run(path)


def made_up_orders_and_heads(run: Run) -> list[dict[str, Any]]:
    generator = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for index, task in enumerate(run):
        base = {entry["tool"]: entry["log_prob"] for entry in task.record["tool_probabilities"]}
        tools = [name for name in base if name is not None]

        def moved(base: dict = base) -> dict[str | None, float]:
            return {name: value + generator.normal() for name, value in base.items()}

        for number, order in enumerate(permutations(tools)):
            rows += condition(task.id, "order", number, moved(), detail=list(order))
        for number, text in enumerate(("N/A", "", "[MASK]")):
            rows += condition(task.id, "content_free", number, moved(), detail={"text": text})
        sets = [("chosen", [[0, 1], [2, 3]]), ("random", [[0, 2], [2, 1]]), ("random", [[0, 0], [2, 5]])]
        sets += [("alone", [[0, 1]]), ("alone", [[2, 3]])]
        for number, (kind, heads) in enumerate(sets):
            detail = {"heads": heads, "set": kind, "half": index % 2, "target": "chosen", "replace": "zero"}
            rows += condition(task.id, "heads", number, moved(), detail=detail)
    return rows


@pytest.fixture(scope="module")
def measured(runs, tmp_path_factory):
    """A run with every experiment, all of them made up."""
    run = repeated(runs["tool"], tmp_path_factory.mktemp("many") / "run")
    rows = pd.concat([made_up_interventions(run), pd.DataFrame(made_up_orders_and_heads(run))])
    with pytest.MonkeyPatch.context() as patch:
        put_interventions(patch, rows.reset_index(drop=True))
        run.write_table("measures", to_table(tool.measures(run)))
    return run


@pytest.fixture(scope="module")
def cards(measured):
    return data.collect(measured)["cards"]


def whole_run(run: Run) -> pd.DataFrame:
    frame = run.measures()
    return frame[frame.task_id == ""]


def assert_is(entry: dict[str, Any], row: pd.Series) -> None:
    assert entry["value"] == row.value
    assert entry["n"] == row.n
    assert (entry["low"] is None) == bool(pd.isna(row.low))
    if entry["low"] is not None:
        assert (entry["low"], entry["high"]) == (row.low, row.high)


def test_the_reliability_curve_holds_every_task_once_and_the_measured_scores(measured, cards):
    certainty, frame = cards["certainty"], whole_run(measured)
    for binning, by_rule in certainty["bins"].items():
        for rule, bins in by_rule.items():
            assert sum(entry["n"] for entry in bins) == len(measured), (binning, rule)
            rows = frame[(frame.name == "reliability_accuracy") & (frame.rule == rule)]
            assert [entry["value"] for entry in bins] == rows[rows.binning == binning].value.tolist()
    for row in certainty["scores"]:
        for which in ("raw", "fitted"):
            rows = frame[(frame.name == row["name"]) & (frame.rule == which)]
            rows = rows[rows.binning.isna() if row["bins"] is None else rows.binning == row["bins"]]
            assert_is(row[which], rows.iloc[0])
    assert_is(certainty["fitted"], frame[frame.name == "tau_fitted"].iloc[0])
    taus = [point[0] for point in certainty["sweep"]["tau_entropy"]]
    assert taus == sorted(taus)
    entropies = [point[1] for point in certainty["sweep"]["tau_entropy"]]
    assert entropies == sorted(entropies), "a higher temperature spreads the choice"


def test_every_scorer_has_its_row_and_the_default_agrees_with_nobody(measured, cards):
    frame = whole_run(measured)
    rows = {row["scorer"]: row for row in cards["scorers"]["rows"]}
    assert set(rows) == {"sum", "first_token", "mean_token", "mean_byte", "pmi", "contextual_calibration", "orders", "pmi_orders"}  # fmt: skip
    for scorer, row in rows.items():
        for key, name in (("accuracy", "accuracy_scorer"), ("tool_bias", "tool_bias_scorer")):
            assert_is(row[key], frame[(frame.name == name) & (frame.scorer == scorer)].iloc[0])
    assert rows["sum"]["agreement"] is None


def test_the_confusion_matrix_counts_what_the_records_chose(measured, cards):
    confusion = cards["confusion"]
    names = confusion["names"]
    counted = {(names[right], names[chosen]): hits for right, chosen, hits, *_ in confusion["cells"] if hits}
    expected: Counter[tuple[str | None, str | None]] = Counter()
    for task in measured:
        target = task.record["target"]
        right = target if isinstance(target, list) else [target]
        log_prob = {entry["tool"]: entry["log_prob"] for entry in task.record["tool_probabilities"]}
        expected[max(right, key=log_prob.__getitem__), task.record["chosen"]] += 1
    assert counted == expected
    assert confusion["n_wrong"] == sum(n for (right, chosen), n in expected.items() if right != chosen)
    hits = [round(pair["share"]["value"] * pair["share"]["n"]) for pair in confusion["pairs"]]
    assert hits == sorted(hits, reverse=True)


def test_a_large_catalogue_keeps_only_what_is_confused(monkeypatch):
    def row(right: int, chosen: int, hits: int) -> dict[str, Any]:
        names = {"tool": f"tool{right}", "span": None, "other_tool": f"tool{chosen}"}
        return names | {
            "analyzer": "tool",
            "name": "confusion",
            "value": hits / 4,
            "n": 4,
            "low": 0.0,
            "high": 1.0,
        }

    rows = [row(i, i, 4) for i in range(2, 60)] + [row(0, 1, 3), row(0, 0, 1), row(1, 0, 0), row(1, 1, 4)]
    confusion = choices.confusion(MeasureRows(rows))
    assert confusion is not None
    assert confusion["names"] == ["tool0", "tool1"]
    assert confusion["left_out"] == 58
    assert sorted(cell[:3] for cell in confusion["cells"]) == [[0, 0, 1], [0, 1, 3], [1, 0, 0], [1, 1, 4]]
    assert (confusion["n_wrong"], confusion["n"]) == (3, 240)


def test_order_is_shown_beside_orders_and_slots_share_the_choices(measured, cards):
    orders, frame = cards["orders"], whole_run(measured)
    rows = {row["name"]: row for row in orders["rows"]}
    for source in ("shown", "orders"):
        expected = frame[(frame.name == "position_bias") & frame.n_tools.isna()]
        averaged = expected.experiment.notna()
        assert_is(
            rows["position_bias"][source], expected[averaged if source == "orders" else ~averaged].iloc[0]
        )
    assert_is(rows["flip_rate"]["orders"], frame[frame.name == "flip_rate"].iloc[0])
    assert [group["n_tools"] for group in orders["slots"]] == [2, 3]
    for group in orders["slots"]:
        for source in ("shown", "orders"):
            assert sum(slot[source]["value"] for slot in group["slots"]) == pytest.approx(1)


def test_heads_are_where_they_were_measured_and_their_ablation_has_its_control(measured, cards):
    heads, frame = cards["heads"], whole_run(measured)
    target = heads["targets"][0]
    assert target["target"] == "chosen"
    for name, key in (("head_auroc", "auroc"), ("head_p_corrected", "p")):
        rows = frame[(frame.name == name) & (frame.role == "chosen")]
        assert np.shape(target[key]) == (4, 6)
        for row in rows.itertuples():
            assert target[key][int(row.layer)][int(row.head)] == pytest.approx(row.value, rel=1e-3)
    assert_is(target["held_out"], frame[(frame.name == "head_auroc_heldout") & frame.half.isna()].iloc[0])
    ablation = heads["ablation"][0]
    effects = frame[(frame.name == "head_ablation") & (frame.role == "chosen") & frame.half.isna()]
    for which, label in (("chosen", "together"), ("random", "random")):
        assert_is(ablation[which], effects[effects.heads == label].iloc[0])
    alone = {(row["layer"], row["head"]): row["effect"] for row in ablation["alone"]}
    assert set(alone) == {(0, 1), (2, 3)}
    assert_is(alone[0, 1], effects[(effects.heads == "alone") & (effects.layer == 0)].iloc[0])


def test_probes_by_layer_stand_beside_their_controls(measured, cards):
    layers, frame = cards["layers"], whole_run(measured)
    assert layers["missing"] is None
    for probe in layers["probes"]:
        probed = frame[(frame.state == probe["state"]) & (frame.role == probe["target"])]
        probed = probed[probed.rule == ("naming" if probe["names_tools"] else "matching")]
        accuracy = probed[probed.name == "probe_accuracy"]
        for key, is_control in (("accuracy", False), ("control", True)):
            rows = accuracy[accuracy.control.notna() == is_control].sort_values("layer")
            assert [point[0] for point in probe[key]] == rows.layer.tolist() == [0, 1, 2, 3]
            assert [point[1] for point in probe[key]] == pytest.approx(rows.value.tolist(), rel=1e-3)
        first = probed[probed.name == "decodable_layer"]
        assert probe["decodable"] == (int(first.value.iloc[0]) if len(first) else None)


def test_the_choice_over_intentions_stands_beside_the_direct_one(measured, cards):
    (action,), frame = cards["actions"], whole_run(measured)
    assert action["kind"] == "drawn"
    for name in ("p_action_accuracy", "p_action_accuracy_direct", "intention_information"):
        assert_is(action[name], frame[frame.name == name].iloc[0])


def test_what_only_experiments_fill_is_named_in_one_line_and_nothing_else_is(runs, measured, cards):
    assert cards["missing"] == []
    assert data.collect(runs["cot"])["cards"]["missing"] == []
    bare = data.collect(runs["tool"])["cards"]
    assert bare["why"] is bare["actions"] is bare["heads"] is None, "absent is absent"
    assert bare["missing"] == [
        "Why this tool?",
        "P(action | state)",
        "other orders",
        "scorers pmi, contextual_calibration, orders, pmi_orders",
    ]
    assert bare["certainty"]["fitted"] is None, "three tasks are not calibrated"


def test_a_run_without_states_says_why_nothing_is_read_from_them(tmp_path):
    run = make(tmp_path, "tool", capture="attn_to_spans")
    analyze(run)
    layers = data.collect(run)["cards"]["layers"]
    assert layers["probes"] == []
    assert layers["missing"].startswith("resid_span_mean was not captured")


def test_measures_with_a_figure_are_not_listed_again(measured):
    collected = data.collect(measured)
    assert collected["details"]["t1-0"]["more"] == []
    frame = whole_run(measured)
    kept = {row["name"] for row in collected["measures"]}
    kept |= {measure["name"] for group in collected["more"] for measure in group["measures"]}
    assert "accuracy" in kept
    assert not kept & {
        "tau_entropy",
        "confusion",
        "slot_rate",
        "head_auroc",
        "probe_accuracy",
        "causal_spearman",
    }
    assert kept <= set(frame.name)


def test_a_task_has_its_probabilities_under_every_scorer_and_over_orders(measured):
    shown = data.collect(measured)["details"]["t1-0"]
    of_task = measured.measures().query("task_id == 't1-0'")
    for index, entry in enumerate(shown["entries"]):
        name = entry["tool"]
        rows = of_task[of_task.tool.isna() if name is None else of_task.tool == name]
        averaged = rows[rows.name == "probability_orders"].iloc[0]
        assert_is(shown["orders"]["entries"][index], averaged)
        scored = rows[rows.name == "probability_scorer"].set_index("scorer").value
        for scorer, values in shown["scorers"].items():
            assert values[index] == pytest.approx(scored[scorer], rel=1e-3)
    assert len(shown["orders"]["slots"]) == 3


def test_the_leaderboards_score_is_among_the_headlines(runs, tmp_path):
    run = Run(shutil.copytree(runs["tool"].path, tmp_path / "run"))
    old = run.measures(arrow=True)
    row = old.filter(pc.field("name") == "accuracy").to_pylist()[0] | {"name": "bfcl_accuracy"}
    run.write_table("measures", pa.concat_tables([old, pa.Table.from_pylist([row], schema=old.schema)]))
    by_title = {headline["title"]: headline for headline in data.collect(run)["headlines"]}
    assert "of 3 tasks" in by_title["Leaderboard"]["sentence"]
    assert by_title["Leaderboard"]["dots"][0][1] == row["value"]


def test_five_hundred_tasks_stay_a_small_page(measured):
    shown = data.collect(measured)["details"]["t1-0"]
    assert len(json.dumps(shown)) < 12_000, "400 of them are embedded"


CARDS = [
    "How sure, how right", "Which scorer", "What is confused", "Order", "Why this tool?", "P(action | state)",
    "Heads", "Where it becomes readable",
]  # fmt: skip


@browser
def test_a_browser_draws_every_card(measured, tmp_path):
    dom, console = dom_of(write_report(measured, tmp_path / "page.html"))
    assert console == []
    overview = dom[: dom.index('id="data"')]
    drawn = [title for title in re.findall("<h3>(.*?)</h3>", overview) if title in CARDS]
    assert sorted(drawn) == sorted(CARDS), "each in one tab"
    for title, place in (
        ("What is confused", "overview"),
        ("Heads", "inside"),
        ("Which scorer", "calibration"),
    ):
        section = dom[dom.index(f'<section id="{place}"') :]
        assert f"<h3>{title}</h3>" in section[: section.index("</section>")]
    assert not any("NaN" in str(value) for _, attrs in Page(dom).tags for value in attrs.values())
    assert "undefined" not in overview
    assert len(re.findall('class="point', overview)) > 4 * 17
    assert "lack of experiments" not in overview


@browser
def test_a_browser_names_the_experiments_that_are_missing(runs, tmp_path):
    dom, console = dom_of(write_report(runs["tool"], tmp_path / "page.html"))
    assert console == []
    page = dom[: dom.index('id="data"')]
    assert page.count("lack of experiments") == 1
    assert f"probe analyze {data.collect(runs['tool'])['command']} --quick" in page
    assert "<h3>Heads</h3>" not in dom


# -- agents ------------------------------------------------------------------------------------------------------------------


def agent_run(run: Run, path: Path) -> Run:
    """A tool task told as an agent's: a call with its result, a wrong call, then an answer."""
    header = {name: item for name, item in run.run.items() if name not in ("id", "status")}
    task = next(iter(run))
    names = ("tool_probabilities", "chosen", "chosen_tool", "candidate_mass", "opener_log_prob")
    decision = {name: task.record.get(name) for name in names} | {
        "slot": "reached",
        "start": 0,
        "end": 1,
        "position": 0,
    }
    call = {"name": "sum", "arguments": {"numbers": [2, "<b>3</b>"]}, "text": "sum(2, 3)"}
    turns = [
        decision | {"turn": 1, "text": "I add.", "called": "sum", "call": call, "result": {"content": "5", "shown": True}},
        decision | {"turn": 2, "text": "sum(", "called": "sum", "call": call | {"arguments": None}, "call_error": "json",
                    "result": {"content": "{}", "error": "json", "message": "no", "shown": False}},
        decision | {"turn": 3, "text": "It is 5.", "called": None, "call": None, "slot": "attached"},
    ]  # fmt: skip
    record = task.record | {
        "kind": "agent",
        "turns": turns,
        "n_turns": 3,
        "ended_by": "answer",
        "answer": "It is 5.",
    }
    arrays = {name: Array(task[name], task.axes(name)) for name in task}
    arrays["decisions"] = Array(task["decisions"].repeat(3), task.axes("decisions"))
    arrays["logits"] = Array(task["logits"].repeat(3, 1), task.axes("logits"))
    for name in ("attn_to_parts", "value_to_parts"):
        arrays[name] = Array(task[name].repeat(1, 1, 3, 1), task.axes(name))
    listed = ("labels", "layers", "parts")
    metadata = {name: text for name, text in task.metadata.items() if name.endswith(listed)}
    with RunWriter.create(path, header | {"kinds": ["agent"]}) as writer:
        writer.commit(record | {"expected_answer": 5, "score": 1.0}, arrays, metadata)
        writer.finish("done")
    run = Run(path)
    analyze(run)
    return run


def test_an_agents_turns_say_what_was_called_with_what_and_what_came_back(runs, tmp_path):
    run = agent_run(runs["tool"], tmp_path / "run")
    collected = data.collect(run)
    assert [headline["title"] for headline in collected["headlines"]] == ["Agent"]
    shown = collected["details"]["t1"]
    first, wrong, last = shown["turns"]
    assert (first["called"], first["call"]["arguments"]) == ("sum", {"numbers": [2, "<b>3</b>"]})
    assert first["result"]["content"] == "5"
    assert wrong["call_error"] == "json"
    assert not wrong["result"]["shown"]
    assert (last["called"], last["result"], last["slot"]) == (None, None, "attached")
    assert sum(entry["probability"] for entry in first["entries"]) == pytest.approx(1)
    assert [entry["tool"] for entry in first["entries"] if entry["chosen"]] == [run["t1"].record["chosen"]]
    assert (shown["ended_by"], shown["expected"]) == ("answer", "5")


@browser
def test_a_browser_draws_an_agents_turns_and_runs_nothing_that_they_say(runs, tmp_path):
    plain = agent_run(runs["tool"], tmp_path / "plain")
    dom, console = dom_of(write_report(plain), "#tab=tasks")
    assert console == []
    assert re.findall("<h4>(Turn \\d)</h4>", dom) == ["Turn 1", "Turn 2", "Turn 3"]
    assert "not given back" in dom
    assert "&lt;b&gt;3&lt;/b&gt;" in dom
    page = Page(dom_of(write_report(hostile_run(plain, tmp_path / "hostile")))[0])
    assert page.texts["title"][0].endswith("· probe")
    assert not {"img", "svg", "iframe", "link", "object"} & {tag for tag, _ in page.tags}


# -- in a browser ------------------------------------------------------------------------------------------------------------


@browser
@pytest.mark.parametrize("kind", list(TASKS))
def test_a_browser_runs_no_hostile_text_and_complains_of_nothing(runs, tmp_path, kind):
    run = hostile_run(runs[kind], tmp_path / "hostile")
    dom, console = dom_of(write_report(run), "#tab=tasks")
    assert console == []
    page = Page(dom)
    assert page.texts["title"][0].endswith("· probe")
    assert not {"img", "svg", "iframe", "link", "object"} & {tag for tag, _ in page.tags}
    assert 'class="detailhead"' in dom
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]


@browser
@pytest.mark.parametrize(
    ("kind", "task_id", "figures"),
    [
        ("tool", "t3", ["P(tool | context)", "Attention to the tools’ definitions"]),
        ("prompting", "p2", ["Shift of the first answer token’s distribution", "Probability of each choice"]),
        ("cot", "c2", ["Reasoning", "What each step reads"]),
    ],
)
def test_an_address_opens_its_task_with_its_figures(runs, tmp_path, kind, task_id, figures):
    page = write_report(runs[kind], tmp_path / "page.html")
    dom, console = dom_of(page, f"#task={task_id}")
    assert console == []
    assert f"<h2>{task_id}</h2>" in dom
    for title in figures:
        assert f"<h3>{title}</h3>" in dom
    assert 'class="absent"' not in dom


_USE = """
(() => {
const result = {};
const title = () => document.querySelector(".detailhead h2").textContent;
const ids = () => [...document.querySelectorAll(".items li")].map((item) => item.dataset.id);
const choose = (box, value) => { box.value = value; box.dispatchEvent(new Event("change")); };
const press = (key, target = document.body) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
result.first = title();
press("j"); result.next = title(); result.address = location.hash;
press("k"); result.back = title();
document.querySelectorAll(".items li")[2].click(); result.clicked = title();
const filter = document.getElementById("filter");
press("/"); result.focused = document.activeElement === filter;
const find = (text) => { filter.value = text; filter.dispatchEvent(new Event("input")); return ids(); };
result.filtered = find("id=t2"); result.below = find("margin<" + MIDDLE); result.question = find("QUESTION"); result.nothing = find("right=nowhere");
find("");
const [only, sort] = document.querySelectorAll(".tools-of-list select");
choose(only, "wrong"); result.wrong = ids(); choose(only, "");
choose(sort, "margin"); result.ascending = ids();
document.querySelector(".tools-of-list button").click(); result.descending = ids();
result.sorted = location.hash;
const cells = () => [...document.querySelectorAll("#detail table.heat tr.heat td.cell")].map((cell) => cell.textContent);
const before = cells();
choose(document.querySelector("#detail .dropdown select"), "2"); result.headChanged = String(cells()) !== String(before);
result.head = new URLSearchParams(location.hash.slice(1)).get("head");
[...document.querySelectorAll(".segmented button")].find((button) => button.textContent === "share of tools").click();
result.unit = document.querySelector("#detail .legend .unit").textContent;
const heat = document.querySelector("#detail table.heat");
press("ArrowRight", heat); result.readout = heat.closest("figure").querySelector(".readout").textContent;
press("Enter", heat); result.layer = new URLSearchParams(location.hash.slice(1)).get("layer");
const marks = document.querySelectorAll("#detail mark.tool"), mark = marks[marks.length - 1];
mark.click();
const tool = new URLSearchParams(location.hash.slice(1)).get("tool");
result.tool = mark.dataset.tool === tool;
return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {
  result.linked = new Set([...document.querySelectorAll(".picked[data-tool]")].map((node) => node.dataset.tool)).size === 1 && document.querySelectorAll("#detail .picked[data-tool]").length > 2;
  done(result);
})));
})()
"""


@browser
def test_keys_search_sorting_and_figure_controls_work_and_stay_in_the_address(runs, tmp_path):
    rows = {row["id"]: row for row in data.collect(runs["tool"])["tasks"]}
    margins = {name: row["margin"] for name, row in rows.items()}
    by_margin = sorted(margins, key=lambda name: margins[name])
    word = rows["t3"]["question"].split()[-1]
    script = _USE.replace("MIDDLE", f'"{margins[by_margin[1]]}"').replace("QUESTION", word)
    with tab(write_report(runs["tool"], tmp_path / "page.html"), "#tab=tasks") as opened:
        shown = opened.evaluate(script)
        assert opened.console == []
    assert (shown["first"], shown["next"], shown["back"], shown["clicked"]) == ("t1", "t2", "t1", "t3")
    assert shown["address"] == "#task=t2"
    assert shown["focused"]
    assert (shown["filtered"], shown["below"], shown["nothing"]) == (["t2"], [by_margin[0]], [])
    assert shown["question"] == [
        name for name, row in rows.items() if word.lower() in row["question"].lower()
    ]
    assert shown["wrong"] == [name for name, row in rows.items() if row["score"] < 1]
    assert shown["ascending"] == by_margin
    assert shown["descending"] == shown["ascending"][::-1]
    assert shown["sorted"] == "#task=t3&sort=margin&down=1"
    assert shown["headChanged"] and shown["head"] == "2"
    assert shown["unit"].startswith("share among tools, head 2")
    assert re.match(r"layer 1, head 2 · \w+: ", shown["readout"])
    assert shown["layer"] == "1"
    assert shown["tool"] and shown["linked"], "span, bar and row of a tool are one"


_TAKE = """
(async () => {
const saved = [];
URL.createObjectURL = (blob) => { saved.push(blob); return "blob:x"; };
HTMLAnchorElement.prototype.click = () => {};
const figure = [...document.querySelectorAll("#overview figure")].find((one) => one.querySelector("h3").textContent === "What is confused");
const [numbers, svg, png] = figure.querySelectorAll(":scope > .figtools button");
numbers.click();
figure.querySelectorAll(".taken .figtools button")[1].click();
svg.click();
const size = await new Promise((done) => { const old = HTMLCanvasElement.prototype.toBlob; HTMLCanvasElement.prototype.toBlob = function (give) { done([this.width, this.height, new Set(this.getContext("2d").getImageData(0, 0, this.width, this.height).data).size]); old.call(this, give); }; png.click(); });
const cell = figure.querySelector("td.cell.leads");
const said = cell.say;
cell.click();
const texts = await Promise.all(saved.filter((blob) => blob.type !== "image/png").map((blob) => blob.text()));
return { texts, size, said, hash: location.hash, shown: document.querySelectorAll(".items li").length, tasks: !document.getElementById("tasks").hidden };
})()
"""


@browser
def test_a_figure_gives_away_its_numbers_and_its_picture_and_a_cell_leads_to_its_tasks(
    measured, cards, tmp_path
):
    with tab(write_report(measured, tmp_path / "page.html")) as opened:
        taken = opened.evaluate(_TAKE)
        assert opened.console == []
    csv, svg = taken["texts"]
    confusion = cards["confusion"]
    assert csv.startswith('"Most confused pairs"') or csv.startswith("Most confused pairs")
    for name in confusion["names"]:
        assert (name or "no tool") in csv
    picture = ElementTree.fromstring(svg)
    assert {part.tag.rpartition("}")[2] for part in picture} == {"rect", "text"}
    texts = " ".join(part.text or "" for part in picture if part.tag.endswith("text"))
    assert all(str(hits) in texts for _, _, hits, *_ in confusion["cells"] if hits)
    wide, high, colors = taken["size"]
    assert wide > 800 and high > 400 and colors > 8
    hits = int(re.search(r": (\d+) of", taken["said"])[1])  # pyright: ignore[reportOptionalSubscript]
    assert taken["tasks"] and taken["shown"] == hits > 0
    assert "right%3D" in taken["hash"] and "chosen%3D" in taken["hash"]


_OF_PLOTS = """
(() => {
document.querySelector(".tabs a[data-tab=calibration]").click();
return Object.fromEntries([...document.querySelectorAll("#calibration figure")].map((figure) => {
  figure.querySelector(":scope > .figtools button").click();
  const tables = [...figure.querySelectorAll(":scope > .taken table")].map((table) => [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent)));
  return [figure.querySelector("h3").textContent, tables];
}));
})()
"""


@browser
def test_the_numbers_of_a_figure_that_is_a_plot_alone_are_its_points(measured, tmp_path):
    with tab(write_report(measured, tmp_path / "page.html")) as opened:
        taken = opened.evaluate(_OF_PLOTS)
        assert opened.console == []
    (glance,) = taken["Every task at a glance"]
    assert glance[0] == ["P of the scored choice", "candidate mass", "said"]
    shown = {line[-1].partition(":")[0]: (float(line[0]), float(line[1])) for line in glance[1:]}
    wanted = {
        task.id: (max(e.probability for e in decision.tool_probabilities if e.tool == decision.chosen), decision.candidate_mass)
        for task in measured
        for decision in [task.typed(ToolRecord).decision]
    }  # fmt: skip
    assert shown == wanted
    assert all(any(len(table) > 1 for table in tables) for tables in taken.values()), (
        "no figure gives nothing"
    )
    curves = taken["How sure, how right"]
    assert len(curves) == len({json.dumps(table) for table in curves}), (
        "what is folded away is not said twice"
    )


@browser
def test_a_group_of_the_first_screen_opens_its_first_task_whatever_was_open(measured, tmp_path):
    last = measured.task_ids[-1]
    with tab(write_report(measured, tmp_path / "page.html"), f"#task={last}&tab=overview") as opened:
        opened.evaluate(
            "[...document.querySelectorAll('.groups a')].find((link) => / wrong$/.test(link.textContent)).click()"
        )
        first = opened.evaluate("document.querySelector('.items li').dataset.id")
        assert opened.evaluate("document.querySelector('.detailhead h2').textContent") == first != last
        facts = opened.evaluate("document.querySelector('.items .facts-line').textContent")
        assert re.search(r"margin \S+ nats", facts)


_HOLLOW = """
(async () => {
let saved = null;
URL.createObjectURL = (blob) => { saved = blob; return "blob:x"; };
HTMLAnchorElement.prototype.click = () => {};
document.querySelector(".tabs a[data-tab=calibration]").dispatchEvent(new MouseEvent("click", { bubbles: true, cancelable: true }));
const figure = [...document.querySelectorAll("#calibration figure")].find((place) => place.querySelector("h3").textContent === "Every task at a glance");
figure.querySelectorAll(":scope > .figtools button")[1].click();
const hollow = figure.querySelectorAll(".point.control");
const style = getComputedStyle(hollow[0]);
return { svg: await saved.text(), hollow: hollow.length, border: style.borderTopColor, paper: style.backgroundColor };
})()
"""


@browser
def test_a_picture_keeps_the_hollow_points_which_are_the_wrong_tasks(measured, tmp_path):
    with tab(write_report(measured, tmp_path / "page.html")) as opened:
        taken = opened.evaluate(_HOLLOW)
        assert opened.console == []
    rounds = [part.attrib for part in ElementTree.fromstring(taken["svg"]) if "rx" in part.attrib]
    rings = [
        (outer, inner)
        for outer, inner in pairwise(rounds)
        if outer["fill"] == taken["border"].replace(" ", "")
        and inner["fill"] == taken["paper"].replace(" ", "")
    ]
    assert len(rings) == taken["hollow"] > 0
    assert all(float(inner["width"]) < float(outer["width"]) for outer, inner in rings)


# -- what a page must be for everybody ----------------------------------------------------------------------------------------

_LOOK = """
(() => {
const texts = (nodes) => [...nodes].map((node) => node.textContent.trim());
const page = document.scrollingElement;
const seen = { wide: page.scrollWidth - page.clientWidth, empty: texts(document.querySelectorAll("th")).filter((text) => !text).length };
seen.levels = [...document.querySelectorAll("h1, h2, h3, h4, h5")].filter((head) => head.offsetParent).map((head) => Number(head.tagName[1]));
const named = (node) => node.textContent.trim() || node.getAttribute("aria-label") || node.labels?.length;
seen.nameless = [...document.querySelectorAll("a, button, select, input, [role=img], [role=listbox]")].filter((node) => !named(node)).length;
seen.ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
seen.unreachable = [...document.querySelectorAll("*")].filter((node) => { const flow = getComputedStyle(node); return /auto|scroll/.test(flow.overflowX + flow.overflowY) && (node.scrollWidth > node.clientWidth + 1 || node.scrollHeight > node.clientHeight + 1) && node.tabIndex < 0 && node.clientWidth; }).map((node) => node.className);
seen.links = [...document.querySelectorAll(".items a")].map((link) => link.getAttribute("href"));
return seen;
})()
"""


@browser
@pytest.mark.parametrize("width", [320, 400, 1280])
def test_every_tab_fits_its_window_and_its_heads_and_controls_can_be_read_out(measured, tmp_path, width):
    """320 pixels are a window of 1,280 at 400 %."""
    with tab(write_report(measured, tmp_path / "page.html"), width=width) as opened:
        names = opened.evaluate("[...document.querySelectorAll('.tabs a')].map((link) => link.dataset.tab)")
        assert names == ["overview", "tasks", "why", "inside", "calibration", "output", "provenance"]
        for name in names:
            opened.evaluate(f"document.querySelector('.tabs a[data-tab={name}]').click()")
            seen = opened.evaluate(_LOOK)
            assert seen["wide"] <= 0, name
            assert seen["empty"] == seen["nameless"] == 0, name
            assert seen["unreachable"] == [], name
            assert all(after <= before + 1 for before, after in pairwise(seen["levels"])), name
            assert len(seen["ids"]) == len(set(seen["ids"])), name
            assert seen["links"][0].startswith("#task=t1-0")


@browser
def test_the_page_works_with_the_keyboard_alone(measured, tmp_path):
    with tab(write_report(measured, tmp_path / "page.html")) as opened:
        for _ in range(2):
            opened.press("Tab")
        assert opened.evaluate("document.activeElement.dataset.tab") == "tasks"
        opened.press("Enter")
        assert not opened.evaluate("document.getElementById('tasks').hidden")
        opened.press("/")
        assert opened.evaluate("document.activeElement.id") == "filter"
        opened.press("Escape")
        opened.press("ArrowDown")
        assert opened.evaluate("document.querySelector('.detailhead h2').textContent") == measured.task_ids[1]
        opened.press("Enter")
        assert opened.evaluate("document.activeElement.id") == "detail"


@browser
def test_a_shortened_prompt_is_said_above_its_figures(runs, tmp_path):
    run = Run(shutil.copytree(runs["tool"].path, tmp_path / "run"))
    kept = data.collect
    cut = {"rule": "the oldest messages", "tokens_dropped": 1}

    def shortened(run: Run, details_of: int | None = None) -> dict[str, Any]:
        collected = kept(run, details_of)
        collected["details"]["t1"]["truncation"] = cut
        return collected

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "collect", shortened)
        dom, console = dom_of(write_report(run, tmp_path / "page.html"), "#tab=tasks")
    assert console == []
    assert dom.index("The prompt was shortened: the oldest messages (1 token dropped).") < dom.index(
        "P(tool | context)</h3>"
    )


_BACK = """
(async () => {
const back = async () => { const gone = new Promise((done) => addEventListener("popstate", done, { once: true })); history.back(); await gone; };
const section = () => document.querySelector("main > section:not([hidden])").id;
const seen = {};
const before = history.length;
document.querySelector(".tabs a[data-tab=tasks]").click();
seen.task = location.hash;
const entries = history.length;
for (const key of ["/", "Escape", "Escape", "Escape"]) document.querySelector(".items").dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
seen.pushed = [entries - before, history.length - entries];
await back();
seen.overview = [section(), location.hash];
document.querySelector("td.cell.leads").click();
seen.cell = [section(), location.hash.startsWith("#task=")];
await back();
seen.again = [section(), location.hash];
document.querySelector(".plot .point.leads").click();
seen.dot = section();
await back();
document.querySelector(".tabs a[data-tab=tasks]").click();
document.querySelectorAll(".items a")[1].click();
seen.link = [section(), document.querySelector(".detailhead h2").textContent];
return seen;
})()
"""


AXE = Path(__file__).parent.parent / "node_modules" / "axe-core" / "axe.min.js"
_AXE = """axe.run(document, { resultTypes: ["violations"] }).then((found) => found.violations.flatMap((rule) =>
  rule.nodes.map((node) => `${rule.id}: ${node.html.slice(0, 200)}: ${node.failureSummary}`)))"""


@browser
@pytest.mark.slow
@pytest.mark.skipif(not AXE.exists(), reason="there is no axe-core here (npm ci)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["measured", "prompting", "cot", "agent"])
def test_no_page_breaks_a_rule_of_axe(runs, measured, tmp_path, kind, scheme):
    run = measured if kind == "measured" else runs.get(kind) or agent_run(runs["tool"], tmp_path / "run")
    with tab(write_report(run, tmp_path / "page.html"), scheme=scheme) as opened:
        opened.evaluate(f"{AXE.read_text()}; 0")
        names = opened.evaluate("[...document.querySelectorAll('.tabs a')].map((link) => link.dataset.tab)")
        for name in names:
            opened.evaluate(f"document.querySelector('.tabs a[data-tab={name}]').click()")
            opened.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
            opened.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
            assert opened.evaluate(_AXE) == [], name


@browser
def test_a_print_is_light_holds_every_part_with_its_title_and_cuts_no_table_off(measured, tmp_path):
    with tab(write_report(measured, tmp_path / "page.html"), width=720, scheme="dark") as opened:
        features = [{"name": "prefers-color-scheme", "value": "dark"}]
        opened.call("Emulation.setEmulatedMedia", media="print", features=features)
        assert opened.evaluate("getComputedStyle(document.body).color") == "rgb(29, 35, 41)"
        titles = opened.evaluate(
            "[...document.querySelectorAll('h2')].filter((head) => head.offsetWidth > 1).map((head) => head.textContent)"
        )
        assert {"Overview", "Why", "Inside", "Calibration", "Output", "Provenance"} <= set(titles)
        assert opened.evaluate("document.scrollingElement.scrollWidth") == 720


@browser
def test_back_returns_from_the_tasks_to_where_the_reader_was(measured, tmp_path):
    with tab(write_report(measured, tmp_path / "page.html")) as opened:
        seen = opened.evaluate(_BACK)
        assert opened.console == []
    first, second = measured.task_ids[:2]
    assert seen["task"] == f"#task={first}"
    assert seen["pushed"] == [1, 0], "a key that changes nothing adds nothing"
    assert seen["overview"] == seen["again"] == ["overview", ""]
    assert seen["cell"] == ["tasks", True]
    assert seen["dot"] == "tasks"
    assert seen["link"] == ["tasks", second]
