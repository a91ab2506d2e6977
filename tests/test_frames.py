"""Runs in bulk and in notebooks: frames against plain loops over the tasks, HTML against hostile text."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import probe
from probe.analyzers.comparison import Comparison
from probe.analyzers.registry import REGISTRY
from probe.analyzers.rows import to_table
from probe.errors import UsageError
from probe.runs import Array, RunWriter
from probe.runs.export import export
from tests.conftest import tiny
from tests.golden import GOLDEN
from tests.made_up_runs import planted_task

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</pre></details></td></table></div><style>*{display:none}</style>",
    "$\\href{javascript:alert(1)}{x}$ \\(x\\)",
    "&lt;b&gt; &amp;",
    "\x1b[2J\u202eevil\u2066\x00",
    "{{7*7}} ${7*7} `x`",
    "javascript:alert(1)//'\"",
)


@pytest.fixture(scope="module")
def golden() -> Any:
    return probe.open(GOLDEN / "tiny-llama-states")


# -- frames --------------------------------------------------------------------------------------------------------


def test_states_of_a_layer_are_one_row_a_task(golden):
    for layer, step in ((0, 0), (1, -1)):
        frame = golden.states(layer, step=step)
        expected = {}
        for task in golden:
            prefix = "base/" if "base/rows" in task else ""
            passage = task.record["passages"]["base"] if prefix else task.record
            position = passage["n_prompt"] - 1 + (0 if step == 0 else passage["n_new"] - 1)
            at = task[f"{prefix}rows"].tolist()
            if position in at:
                expected[task.id] = task[f"{prefix}resid_post"][layer, at.index(position)].numpy()
        assert list(frame.index) == list(expected) and len(expected) > 1
        assert np.array_equal(frame.to_numpy(), np.stack(list(expected.values())))
        assert frame.to_numpy().dtype == np.float32


def test_states_of_a_span_are_its_mean_and_tasks_without_it_have_no_row(golden):
    task = next(task for task in golden if task.record["kind"] == "cot")
    label = next(label for label in task.labels() if label.startswith("step"))
    frame = golden.states(1, span=label)
    expected = task["resid_span_mean"][1, task.labels().index(label)].numpy()
    assert np.array_equal(frame.loc[task.id], expected)
    assert set(frame.index) < set(golden.task_ids)


def test_states_that_no_task_has_are_refused(golden):
    for where in (
        {"layer": 99},
        {"layer": 0, "span": "tool:none"},
        {"layer": 0, "step": 999},
        {"layer": 0, "site": "z"},
    ):
        with pytest.raises(UsageError, match="no task has"):
            golden.states(**where)
    with pytest.raises(UsageError, match="no state a row"):
        probe.open(GOLDEN / "tiny-llama-memory").states(0, site="z")


def test_a_run_that_keeps_every_position_has_the_same_states(tmp_path):
    tasks = [{"id": str(n), "kind": "cot", "question": f"{n} + 2?", "answer": n + 2} for n in range(2)]
    runs = [
        probe.run(
            tasks,
            model=tiny("tiny-llama"),
            out=tmp_path / str(n),
            capture=capture,
            max_new_tokens=3,
            analyze=False,
        )
        for n, capture in enumerate(("resid_post", "resid_post:all"))
    ]
    assert [run["0"]["rows"][0].item() == 0 for run in runs] == [False, True]
    for step in (0, 2, -1):
        few, every = (run.states(1, step=step).to_numpy() for run in runs)
        assert np.allclose(few, every, atol=1e-5)
    from probe.analyzers.comparison import _first_states

    first = [_first_states(run["0"])[1] for run in runs]
    assert np.allclose(*first, atol=1e-5)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Any:
    """Three made-up tasks: one number of each, several of each, and one of two of them; hostile in every text."""
    probe.measures()
    path = tmp_path_factory.mktemp("frames") / "run"
    ids = [f"t{n} {HOSTILE[n]}" for n in range(3)]
    with RunWriter.create(path, {"model": {"name": HOSTILE[3]}, "task_ids": ids, "options": {}}) as writer:
        for n, task_id in enumerate(ids):
            tools = {HOSTILE[4]: -1.0, HOSTILE[5]: -2.0, None: -3.0}
            record = planted_task(task_id, tools, target=HOSTILE[4]).record
            record |= {
                "prompt": HOSTILE[2],
                "completion": HOSTILE[n],
                "metadata": {"level": n, "odd": HOSTILE[6]} if n else None,
            }
            record |= {"seconds": 0.5, "score": float(n > 0)}
            writer.commit(record, {"x": Array(torch.zeros(3), ("position",))}, {})
        writer.finish("done")
    run = probe.open(path)
    rows = []
    for n, task_id in enumerate(ids):
        rows.append(REGISTRY["tool", "candidate_mass"].row(task_id, n / 10, n=1))
        rows += [
            REGISTRY["tool", "log_prob"].row(task_id, -n - k, n=1, tool=tool)
            for k, tool in enumerate(HOSTILE[4:6])
        ]
        if n:
            rows.append(REGISTRY["tool", "margin"].row(task_id, float(n), n=1))
    run.write_table("measures", to_table(rows))
    return run


def test_a_wide_frame_has_the_numbers_of_the_long_one(measured):
    long, wide = measured.measures(), measured.wide("log_prob", "tool.candidate_mass", "margin")
    assert list(wide.index) == measured.task_ids
    assert wide.notna().sum().sum() == len(long)
    for row in long.itertuples():
        column = f"log_prob tool={row.tool}" if row.name == "log_prob" else row.name
        assert wide.loc[row.task_id, column] == row.value
    assert np.isnan(wide.loc[measured.task_ids[0], "margin"])
    assert set(measured.wide().columns) == {"candidate_mass", "margin"}
    with pytest.raises(UsageError, match="did you mean margin"):
        measured.wide("margins")


def test_tasks_join_with_measures_and_with_what_a_user_has(measured, tmp_path):
    frame = measured.tasks()
    (path,) = [path for path in export(measured, "parquet", tmp_path / "out") if path.stem == "tasks"]
    exported = pd.read_parquet(path).set_index("id")
    for column in exported:
        assert [x if x == x else None for x in frame[column].to_numpy(object, na_value=None)] == [
            x if x == x else None for x in exported[column].to_numpy(object)
        ]
    assert frame["metadata.level"].tolist()[1:] == [1, 2] and frame["metadata.odd"].iloc[1] == HOSTILE[6]
    mine = pd.DataFrame({"id": measured.task_ids, "rater": ["a", "b", "c"]}).set_index("id")
    joined = frame.join(measured.wide()).join(mine)
    assert joined.groupby("rater")["candidate_mass"].mean().tolist() == pytest.approx([0, 0.1, 0.2])


# -- notebooks -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements, attributes and text of a fragment."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open.append(tag)
        self.attributes |= {name for name, _ in attrs}
        assert all("url" not in (value or "") and "expression" not in (value or "") for _, value in attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


ELEMENTS = {"div", "b", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre"}


def shown(value: Any) -> Page:
    page = Page(value._repr_html_())
    assert page.tags <= ELEMENTS and page.attributes <= {"style", "class", "open"} and page.open == []
    assert not set(page.text) & set("\x1b\x00\u202e\u2066")
    return page


def seen(text: str) -> str:
    return "".join("\ufffd" if c in "\x1b\x00\u202e\u2066" else c for c in text)


def test_a_run_and_a_task_show_hostile_text_as_text(measured):
    page = shown(measured)
    assert all(seen(text) in page.text for text in (*measured.task_ids, *HOSTILE[3:5]))
    assert "score 0.667" in page.text.replace("tool_selection: score", "score") or "0.667" in page.text
    for task in measured:
        page = shown(task)
        assert all(
            seen(text) in page.text
            for text in (task.id, *HOSTILE[4:6], HOSTILE[2], task.record["completion"])
        )
    assert "mathjax_ignore" in measured._repr_html_(), "a dollar sign of a model is no formula"


@pytest.mark.parametrize("name", ["tiny-llama-states", "tiny-llama-memory"])
def test_tasks_of_every_kind_show_themselves(name):
    run = probe.open(GOLDEN / name)
    assert run.task_ids[0] in shown(run).text
    for task in run:
        passages = task.record.get("passages", {"main": task.record})
        assert all(passage["prompt"][:200] in shown(task).text for passage in passages.values())


def test_a_comparison_shows_hostile_text_as_text():
    text = HOSTILE[0]
    number = {"value": 0.5, "low": 0.1, "high": 0.9, "n": 3, "unit": text}
    board = pd.DataFrame(
        [{"run": text, "model": text, "kind": text, "measure": text, "n_failed": 0, **number}]
    )
    difference = {
        "base": 0.1,
        "difference": 0.4,
        "p": 0.01,
        "p_corrected": 0.02,
        "clear": True,
        "left_out": 0,
        **number,
    }
    differences = pd.DataFrame(
        [{"run": text, "analyzer": text, "name": text, "at": None, "tools": None, **difference}]
    )
    flip = {"base_choice": text, "base_probability": 0.5, "choice": HOSTILE[5], "probability": None}
    flips = pd.DataFrame([{"run": text, "task_id": text, "turned": "right", **flip}])
    page = shown(Comparison(board, differences, flips, pd.DataFrame(), pd.DataFrame(), (text,)))
    assert page.text.count(text) >= 10 and "1 of 1 differences" in page.text
    nothing = pd.DataFrame()
    assert shown(Comparison(nothing, nothing, nothing, nothing, nothing, ())).text == ""


def test_a_run_with_a_failed_task_shows_itself(tmp_path):
    with RunWriter.create(
        tmp_path / "run", {"model": {"name": "m"}, "task_ids": ["a", "b"], "options": {}}
    ) as writer:
        whole = planted_task("a", {"clock": -1.0, None: -2.0}, target="clock").record
        writer.commit(whole | {"seconds": 0.5, "score": 1.0, "n_prompt": 12}, {}, {})
        failed = {"id": "b", "kind": "tool_selection", "status": "nonfinite", "error": "x", "seconds": 0.0}
        writer.commit(failed, {}, {})
        writer.finish("failed")
    page = probe.open(tmp_path / "run")._repr_html_()
    assert "nonfinite" in page and "<NA>" not in page and "nan" not in page
