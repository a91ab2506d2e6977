"""`probe view`, a server that shows its runs and gives nothing else to anybody; and the page of `probe compare`."""

from __future__ import annotations

import http.client
import json
import shutil
import stat
import threading
import webbrowser
from collections import Counter
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pyarrow as pa
import pytest
from click.testing import CliRunner

import probe
from probe.analyzers import analyze
from probe.analyzers.comparison import compare
from probe.cli import main
from probe.errors import ArtifactCorrupt, RunDirectoryError
from probe.report import data
from probe.report.comparison import render_comparison
from probe.report.reader import TaskReader
from probe.report.server import LOOPBACK, Server
from probe.report.text import visible
from probe.runs import Run
from tests.browser import browser, tab
from tests.test_analyzers import make
from tests.test_report import Page, hostile_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    plain = make(tmp_path_factory.mktemp("tool"), "tool")
    analyze(plain)
    return hostile_run(plain, tmp_path_factory.mktemp("hostile") / "run")


_HEAD = "new Promise((done) => { const look = () => document.querySelector('#detail figure') && document.querySelector('.detailhead h2').textContent === ID ? done(true) : setTimeout(look, 20); look(); })"
_NOTICE = "new Promise((done) => { const look = () => document.querySelector('#detail .notice') ? done(document.getElementById('detail').innerText) : setTimeout(look, 20); look(); })"


@pytest.fixture(scope="module")
def server(run):
    with Server([run, run]) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def ask(
    server: Server, path: str, method: str = "GET", **headers: str
) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(LOOPBACK, server.server_address[1], timeout=30)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def test_a_task_is_read_when_it_is_asked_for_and_is_what_the_report_embeds(server, run):
    status, page, headers = ask(server, f"/{server.token}/1/")
    assert status == 200
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert Page(page).policy["connect-src"] == ["'self'"] and Page(page).data["details"] == {}
    embedded = data.collect(run)["details"]
    for place, task_id in enumerate(embedded):
        _, text, _ = ask(server, f"/{server.token}/1/task/{run.version()}/{place}")
        assert json.loads(text) == json.loads(json.dumps(embedded[task_id]))
    assert "<script" not in ask(server, f"/{server.token}/")[1], "the list of runs has no script"


def test_no_other_host_token_place_or_method_gets_an_answer_and_nothing_is_written(server, run):
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    known = f"/{server.token}"
    assert len(server.token) > 30 and server.server_address[0] == LOOPBACK
    assert ask(server, f"{known}/0/")[0] == 200
    for path in (
        *("/", "/0/", f"/{server.token[:-1]}/0/", f"{known}/2/", f"{known}/-1/", f"{known}/0/task/{run.version()}/99", f"{known}/0/task/1"),
        *(f"{known}/0/task/{run.version()}/%D9%A3", f"{known}/0/../../etc/passwd", f"{known}/0/%2e%2e/run.json", f"{known}/0/run.json", "//"),
    ):  # fmt: skip
        assert ask(server, path)[0] == 404, path
    assert ask(server, f"{known}/0/task/earlier/0")[0] == 500
    assert ask(server, f"{known}/0/", Host="example.org")[0] == 404
    assert ask(server, f"{known}/0/", "POST")[0] == 501
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_the_measures_of_neighbouring_tasks_are_read_once(run, monkeypatch):
    reads: Counter[str] = Counter()
    parts = Run.table_parts

    def counted(self, name, where=None):
        reads[name] += 1
        return parts(self, name, where)

    monkeypatch.setattr(Run, "table_parts", counted)
    reader = TaskReader(run)
    texts = [reader.read(place) for place in range(len(run))]
    assert all(texts) and len(texts) > 2 and reads["measures"] == 1


def test_an_error_of_any_kind_is_an_answer_and_the_server_goes_on(run, monkeypatch, capsys):
    with Server([run]) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        answer = serving.answer
        monkeypatch.setattr(serving, "answer", lambda parts: 1 // 0)
        status, text, _ = ask(serving, f"/{serving.token}/0/")
        monkeypatch.setattr(serving, "answer", answer)
        after, _, _ = ask(serving, f"/{serving.token}/0/")
        serving.shutdown()
        thread.join()
    assert (status, after) == (500, 200)
    assert text == "probe failed here (ZeroDivisionError): the terminal of `probe view` says where\n"
    assert "1 // 0" in capsys.readouterr().err


def test_the_command_line_of_the_browser_names_a_file_of_this_user_and_no_token(run, monkeypatch):
    seen: list[tuple[str, str, int]] = []

    def look(address: str) -> None:
        path = Path(url2pathname(urlsplit(address).path))
        seen.append((address, path.read_text(), stat.S_IMODE(path.stat().st_mode)))

    monkeypatch.setattr(webbrowser, "open", look)
    monkeypatch.setattr(Server, "serve_forever", lambda self: None)
    result = CliRunner().invoke(main, ["view", str(run.path)])
    assert result.exit_code == 0, result.output
    ((address, text, mode),) = seen
    printed = result.stdout.strip()
    assert urlsplit(address).scheme == "file" and printed.split("/")[3] not in address
    assert f"url={printed}" in text and mode == 0o600
    assert not Path(url2pathname(urlsplit(address).path)).exists()


@browser
def test_a_browser_reads_each_task_from_the_server_and_runs_none_of_its_text(server, run):
    with tab(server.address + "0/", "#tab=tasks") as opened:
        ready = "new Promise((done) => { const look = () => document.querySelector('#detail figure') ? done(document.querySelector('.detailhead h2').textContent) : setTimeout(look, 20); look(); })"
        assert opened.evaluate(ready).startswith(run.task_ids[0].split("<")[0])
        opened.press("j")
        assert opened.evaluate(_HEAD.replace("ID", json.dumps(visible(run.task_ids[1]))))
        assert opened.evaluate("document.title").endswith("· probe")
        assert opened.evaluate("document.querySelectorAll('img, iframe, svg').length") == 0
        assert opened.console == []


@browser
def test_a_task_that_cannot_be_read_says_why_and_is_asked_for_again(run, monkeypatch):
    with Server([run]) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        answer = serving.answer

        def damaged(parts):
            if "task" in parts:
                raise ArtifactCorrupt("measures.parquet: <b>damaged</b>")
            return answer(parts)

        monkeypatch.setattr(serving, "answer", damaged)
        with tab(serving.address, "#tab=tasks") as opened:
            told = opened.evaluate(_NOTICE)
            assert "Could not be read: measures.parquet: <b>damaged</b>" in told and "long" not in told
            monkeypatch.setattr(serving, "answer", answer)
            opened.press("j")
            assert opened.evaluate(_HEAD.replace("ID", json.dumps(visible(run.task_ids[1]))))
            opened.press("k")
            assert opened.evaluate(_HEAD.replace("ID", json.dumps(visible(run.task_ids[0]))))
            serving.shutdown()
            thread.join()
            serving.server_close()
            opened.press("j")
            opened.press("j")
            assert "the server does not answer" in opened.evaluate(_NOTICE)


def test_a_page_of_a_run_that_has_changed_is_told_so_and_the_next_one_shows_the_change(run, tmp_path):
    copy = Run(shutil.copytree(run.path, tmp_path / "run"))
    with Server([copy]) as serving:
        before = Page(serving.answer(["0", ""])[1]).data
        assert serving.answer(["0", "version"]) == ("text/plain", before["version"])
        assert serving.answer(["0", ""])[1] is serving.answer(["0", ""])[1], "rendered once"
        row = copy.measures(arrow=True).slice(0, 1).to_pylist()[0] | {"task_id": "", "name": "surprise"}
        copy.write_table("measures", pa.Table.from_pylist([row], schema=copy.measures(arrow=True).schema))
        assert serving.answer(["0", "version"])[1] != before["version"]
        assert serving.answer(["0", "task", before["version"], "0"])[0] == "application/json", (
            "still as shown"
        )
        after = Page(serving.answer(["0", ""])[1]).data
        assert len(after["measures"]) == 1 != len(before["measures"])
        assert after["version"] != before["version"]
        with pytest.raises(RunDirectoryError, match="reload"):
            serving.answer(["0", "task", before["version"], "0"])


@pytest.mark.parametrize("change", ["a task", "a table", "a pack"])
def test_the_version_of_a_run_is_another_after_each_change_and_the_same_without(run, tmp_path, change):
    copy = Run(shutil.copytree(run.path, tmp_path / "run"))
    before = copy.version()
    assert before == Run(copy.path).version()
    for path in copy.path.rglob("*.json"):
        path.read_bytes()
    assert copy.version() == before
    if change == "a task":
        (copy.path / copy[copy.task_ids[0]].path).rename(tmp_path / "elsewhere")
    elif change == "a table":
        copy.write_table("measures", copy.measures(arrow=True))
    else:
        probe.pack(copy.path)
    assert copy.version() != before


@browser
def test_an_open_page_says_that_its_run_has_changed(run, tmp_path, monkeypatch):
    copy = Run(shutil.copytree(run.path, tmp_path / "run"))
    monkeypatch.setattr(Server, "poll_ms", 100)
    told = "new Promise((done) => { const look = () => document.querySelector('.changed') ? done(document.querySelector('.changed').innerText) : setTimeout(look, 20); look(); })"
    with Server([copy]) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        with tab(serving.address, "#tab=why") as opened:
            assert not opened.evaluate("!!document.querySelector('.changed')")
            copy.write_table("measures", copy.measures(arrow=True))
            assert opened.evaluate(told) == "The run has changed since this page was read. reload"
            assert opened.evaluate("location.hash") == "#tab=why", "and there it is loaded again"
            assert opened.console == []
        serving.shutdown()
        thread.join()


def test_a_comparison_is_one_page_with_the_clear_differences_first_and_no_text_of_a_run_as_markup(run):
    comparison = compare([run, run])
    rows = comparison.differences.copy()
    last = rows.index[-1]
    rows.loc[last, ["clear", "p", "p_corrected", "at"]] = [True, 0.001, 0.01, "<img src=x>"]
    html = render_comparison(replace(comparison, differences=rows))
    shown = Page(html)
    assert "<img" not in html
    assert shown.policy["script-src"] != shown.policy["default-src"] == ["'none'"]
    rows = shown.data["compared"]["differences"]
    assert [row["clear"] for row in rows] == [True] + [False] * (len(rows) - 1)
    assert rows[0]["at"] == "<img src=x>"
    assert len(rows) == len(comparison.differences) > 0


@browser
def test_a_browser_draws_a_comparison(run, tmp_path):
    result = CliRunner().invoke(
        main, ["compare", str(run.path), str(run.path), "-o", str(tmp_path / "page.html")]
    )
    assert result.exit_code == 0, result.output
    with tab(tmp_path / "page.html", width=400) as opened:
        assert opened.console == []
        titles = opened.evaluate("[...document.querySelectorAll('h3')].map((head) => head.textContent)")
        assert opened.evaluate("document.scrollingElement.scrollWidth") == 400
        assert "No difference found beyond chance." in opened.evaluate("document.body.innerText")
        opened.evaluate("document.querySelector('.more').click()")
        assert opened.evaluate("document.querySelectorAll('.plain tbody tr').length") > 10
        assert opened.evaluate("document.querySelectorAll('img, iframe, svg').length") == 0
    assert "−" in titles[0] and titles[-1].startswith("Layer by layer")


_LAYERS = """[...document.querySelectorAll("figure")].filter((place) => place.querySelector("h3").textContent.startsWith("Layer by layer"))
  .flatMap((place) => [...place.querySelectorAll(".plot")].map((drawn) => [drawn.querySelector("h4").textContent, drawn.numbers()]))"""


@browser
def test_each_curve_of_a_comparison_has_its_unit_and_its_own_number_of_tasks(run, tmp_path):
    comparison = compare([run, run])
    layers = comparison.layers.copy()
    first = layers["name"] == layers["name"].iloc[0]
    layers.loc[first, "n"] = 2
    layers.loc[~first, "n"] = 3
    page = tmp_path / "page.html"
    page.write_text(render_comparison(replace(comparison, layers=layers)))
    key = ["name", "at", "tools"]
    wanted = {
        " ".join(part for part in labels if isinstance(part, str)): rows
        for labels, rows in layers.groupby(key, dropna=False)
        if len(rows) > 1
    }
    with tab(page) as opened:
        drawn = opened.evaluate(_LAYERS)
    assert len(drawn) == len(wanted) > 3
    for title, numbers in drawn:
        rows = next(
            rows for label, rows in wanted.items() if title.startswith(f"{label} {rows['unit'].iloc[0]} · n ")
        )
        assert title.endswith(f" · n {rows['n'].iloc[0]}")
        assert len(numbers) == 1 + len(rows)
        assert all(f"n {rows['n'].iloc[0]}" in line[-1] for line in numbers[1:])
