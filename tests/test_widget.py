"""The report as a widget of a notebook: its selection in Python, its tasks on demand, its texts as data."""

from __future__ import annotations

import base64
import json

import pytest

import probe
from probe.analyzers import analyze
from probe.errors import UsageError
from probe.report import data
from probe.report.text import visible
from probe.report.widget import ReportWidget
from tests.browser import browser, tab
from tests.test_analyzers import make
from tests.test_report import Page, hostile_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    plain = make(tmp_path_factory.mktemp("tool"), "tool")
    analyze(plain)
    return hostile_run(plain, tmp_path_factory.mktemp("hostile") / "run")


def hear(widget: ReportWidget, **message) -> None:
    """A message of the page, as a kernel hands it over."""
    widget._handle_msg({"content": {"data": message}, "buffers": []})


def test_a_widget_opens_what_it_is_told_and_says_what_its_reader_opened(run):
    name = run.task_ids[1]
    widget = probe.widget(run, task=name, height=300)
    assert (widget.task, widget.card, widget.height) == (name, "tasks", 300)
    assert widget.get_state("task")["task"] == visible(name) != name
    other = run.task_ids[0]
    hear(
        widget,
        method="update",
        state={"task": visible(other), "card": "why", "selection": {"tool": "sum", "x": 1}},
        buffer_paths=[],
    )
    assert (widget.task, widget.card, widget.selection) == (other, "why", {"tool": "sum"})
    widget.selection = {"tool": None, "layer": 3}
    assert widget.selection == {"layer": "3"}
    with pytest.raises(UsageError, match="no task"):
        probe.widget(run.path, task="nowhere")


def test_a_widget_gives_each_task_that_the_page_asks_for_and_nothing_else(run, monkeypatch):
    widget = probe.widget(run)
    sent = []
    monkeypatch.setattr(widget, "send", sent.append)
    embedded = data.collect(run)["details"]
    for place in (0, len(run) - 1, len(run), -1, "0", True, None):
        hear(widget, method="custom", content={"place": place})
    assert [message["place"] for message in sent] == [0, len(run) - 1]
    first = visible(run.task_ids[0])
    assert sent[0]["details"] == json.loads(json.dumps(embedded[first]))
    assert Page(widget._page).data["details"] == {}
    monkeypatch.setattr(widget._reader, "read", lambda place: 1 // 0)
    hear(widget, method="custom", content={"place": 0})
    assert sent[-1]["error"].startswith("ZeroDivisionError")


_MODEL = """
window.state = STATE; window.listeners = {}; window.sent = []; window.saves = 0;
window.model = {
  get: (name) => state[name], save_changes: () => { saves += 1; },
  set: (name, value) => {
    const before = JSON.stringify(state[name]);
    state[name] = value;
    if (JSON.stringify(value) !== before) for (const listen of listeners[`change:${name}`] ?? []) listen();
  },
  on: (name, listen) => { (listeners[name] ??= []).push(listen); }, off: () => {}, send: (message) => sent.push(message),
};
window.change = (name, value) => { model.set(name, value); };
import(SCRIPT).then((module) => { module.default.render({ model, el: document.body }); return true; })
"""
_REST = "new Promise((done) => setTimeout(done, 200))"
_UNTIL = "new Promise((done) => { const look = () => (WHAT) ? done(true) : setTimeout(look, 20); look(); })"


@browser
def test_a_browser_shows_a_widget_in_a_frame_that_reaches_nothing(run, tmp_path, monkeypatch):
    widget = probe.widget(run, task=run.task_ids[1])
    answers = []
    monkeypatch.setattr(widget, "send", answers.append)
    page = tmp_path / "notebook.html"
    page.write_text("<!doctype html><title>notebook</title><body>")
    state = json.dumps(widget.get_state(["_page", "height", "task", "card", "selection"]))
    script = "data:text/javascript;base64," + base64.b64encode(str(widget._esm).encode()).decode()
    with tab(page) as opened:
        opened.evaluate(_MODEL.replace("STATE", state).replace("SCRIPT", json.dumps(script)))
        opened.evaluate(_UNTIL.replace("WHAT", "sent.length"))
        hear(widget, method="custom", content=opened.evaluate("sent[0]"))
        opened.evaluate(f"for (const listen of listeners['msg:custom']) listen({json.dumps(answers[0])})")
        assert opened.evaluate("state.card") == "tasks"
        assert opened.evaluate("state.task") == visible(run.task_ids[1])
        opened.evaluate("change('task', 'nowhere')")
        assert opened.evaluate(
            _UNTIL.replace("WHAT", f"state.task === {json.dumps(visible(run.task_ids[0]))}")
        )
        for _ in range(2):
            opened.evaluate("change('card', 'overview'); document.querySelector('iframe').focus(); saves = 0")
            opened.evaluate(_REST)
            assert opened.evaluate("[state.card, saves]") == ["overview", 0]
            opened.press("j")
            opened.evaluate(_UNTIL.replace("WHAT", "state.card === 'tasks'"))
            opened.evaluate(_REST)
            assert opened.evaluate("saves") == 1, "each tells the other once"
        opened.evaluate("change('card', 'why')")
        frame = "document.querySelector('iframe')"
        assert opened.evaluate(f"{frame}.getAttribute('sandbox')") == "allow-scripts allow-downloads"
        assert opened.evaluate(f"{frame}.contentDocument") is None, "the frame has an origin of its own"
        assert opened.evaluate("document.title") == "notebook"
        assert opened.evaluate("state.card") == "why"
        assert opened.console == []


@browser
def test_a_page_says_that_the_kernel_does_not_answer(run, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(probe.widget(run)._page)
    soon = "window.setTimeout = ((later) => (act, wait, ...rest) => later(act, wait === 15000 ? 0 : wait, ...rest))(setTimeout)"
    with tab("about:blank") as opened:
        opened.call("Page.addScriptToEvaluateOnNewDocument", source=soon)
        opened.open(f"{page.as_uri()}#tab=tasks")
        told = (
            "document.querySelector('#detail [role=status]').textContent.includes('kernel does not answer')"
        )
        assert opened.evaluate(_UNTIL.replace("WHAT", told))
