"""What another package adds by one entry: the examples of docs/extending.md, installed and run."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import probe
from probe.capture import SITES, CaptureSpec, Generation, run_batch
from probe.errors import BadInput, UsageError
from probe.runs import diff
from probe.tasks import KINDS, kind_named, kinds, read_tasks
from probe.tasks.gists import GISTS
from probe.tasks.kind import Kind
from tests.conftest import tiny
from tests.test_capture import make_jobs

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "extending.md").read_text()
LINE = {"id": "r1", "kind": "riddle", "riddle": "What has keys and opens no lock?", "solution": "piano"}


def example(heading: str) -> str:
    """The first block of code under a heading of docs/extending.md."""
    [code] = re.findall(rf"^## {heading}\n.*?^```python\n(.*?)^```", TEXT, re.M | re.S)[:1]
    return code


def package(folder: Path) -> Path:
    """A package `riddles` of the documentation's examples, installed in a folder as pip would."""
    code = "\n\n".join(example(heading) for heading in ("A kind of task", "A tool", "An analyzer"))
    (folder / "riddles.py").write_text(code)
    written = re.search(r"^```toml\n(.*?)^```", TEXT, re.M | re.S)
    assert written is not None
    points = re.sub(r'project\.entry-points\."(.*)"', r"\1", written[1]).replace('"', "")
    metadata = folder / "riddles-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: riddles\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(points)
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """`installed(*command)`: what probe says where the package is installed."""
    folder = package(tmp_path_factory.mktemp("site"))
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])

    def call(*command: object, code: int = 0) -> str:
        words = [sys.executable, "-m", "probe", *map(str, command)]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    return call


@pytest.fixture(scope="module")
def riddles(installed, tmp_path_factory):
    """A run of one riddle, through the command line."""
    folder = tmp_path_factory.mktemp("riddles")
    (folder / "tasks.jsonl").write_text(json.dumps(LINE) + "\n")
    installed("run", folder / "tasks.jsonl", "--model", "random:tiny-llama", "--out", folder / "run")
    return folder


def test_a_kind_of_another_package_runs_and_is_scored(installed, riddles):
    record = probe.open(riddles / "run")["r1"].record
    assert (record["kind"], record["status"], record["score"]) == ("riddle", "ok", 0.0)
    assert 1 <= record["n_new"] <= 16
    assert "riddle" in installed("show", riddles / "run", "r1")
    installed("verify", riddles / "run")
    predicted = json.loads(
        installed("run", riddles / "tasks.jsonl", "--model", "random:tiny-llama", "--dry-run", "--json")
    )
    written = (riddles / "run" / "tasks").rglob("*.*")
    assert predicted["disk_bytes"] >= 0.9 * sum(file.stat().st_size for file in written)


def test_a_mistake_in_a_line_of_such_a_kind_is_placed(installed, tmp_path):
    (tmp_path / "tasks.jsonl").write_text(json.dumps({**LINE, "solution": 7}) + "\n")
    assert "tasks.jsonl:1:" in installed("tasks", "lint", tmp_path / "tasks.jsonl", code=3)


def test_a_tool_and_an_analyzer_of_another_package_are_used(installed, riddles):
    assert installed("tools", "call", "reverse", '{"text": "abc"}').strip() == "cba"
    rows = probe.open(riddles / "run").measures()
    [row] = rows[rows.analyzer == "riddles"].to_dict("records")
    assert (row["task_id"], row["name"], row["unit"]) == ("r1", "tokens", "tokens")
    assert row["value"] == probe.open(riddles / "run")["r1"].record["n_new"]


def test_kinds_that_share_a_name_or_cannot_be_loaded_are_refused(monkeypatch, tmp_path):
    from importlib.metadata import EntryPoint

    def install(**points: str) -> None:
        entries = [EntryPoint(name, value, "probe.tasks") for name, value in points.items()]
        monkeypatch.setattr("probe.tasks.kinds.entry_points", lambda group: entries)
        kinds._installed.cache_clear()

    try:
        install(lost="no_such_package:KIND", other="json:dumps")
        assert kind_named("cot") is KINDS["cot"]
        with pytest.raises(UsageError, match="no_such_package"):
            kind_named("lost")
        with pytest.raises(UsageError, match="no kind of task"):
            kind_named("other")
        (tmp_path / "tasks.jsonl").write_text(json.dumps({"id": "x", "kind": "lots"}))
        with pytest.raises(BadInput, match='the nearest kind is "lost"'):
            read_tasks(tmp_path / "tasks.jsonl", None)
        install(cot="json:dumps")
        with pytest.raises(UsageError, match="two installed kinds"):
            kind_named("riddle")
    finally:
        monkeypatch.undo()
        kinds._installed.cache_clear()


def test_one_entry_adds_a_site_to_the_capture_the_sizes_the_metadata_and_the_diff(monkeypatch, tmp_path):
    (tmp_path / "site.py").write_text(f"from probe.capture import Site\nSITE = {example('A capture site')}")
    site = runpy.run_path(str(tmp_path / "site.py"))["SITE"]
    monkeypatch.setitem(SITES, site.name, site)
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"id": "c", "kind": "cot", "question": "2 + 2?"}))
    model = tiny("tiny-llama")
    run = probe.run(
        tmp_path / "tasks.jsonl", model=model, out=tmp_path / "run", analyze=False, max_new_tokens=8
    )
    task = run["c"]
    assert task.axes("z_norm") == site.axes
    assert task["z_norm"].equal(task["z"].norm(dim=-1))

    spec = CaptureSpec.parse("z_norm", None, model.facts.n_layers, memory=False)
    (job, *_) = make_jobs(model, 4)
    (outcome,) = run_batch(model, model.codec, [job], spec, Generation(4))
    from probe.harness.sizes import job_bytes

    saved = {name: tensor.nbytes for name, tensor in outcome.tensors.items()}
    assert job_bytes(job, model.facts, spec, model.dtype.itemsize, outcome.n_new) == saved
    assert diff(run, run) == []
    with pytest.raises(UsageError, match="z_norm"):
        CaptureSpec.parse("no_such_site", None, model.facts.n_layers, memory=False)


def mentions(path: Path, *, text: str = "", name: str = "") -> bool:
    """Whether a source file has this whole text, or uses this name."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    return any(isinstance(node, ast.Constant) and text and node.value == text for node in nodes) or any(
        isinstance(node, ast.Name) and node.id == name for node in nodes
    )


ROOMS = ("model", "prompts", "capture", "tasks", "harness", "cli")
NOT_A_KIND = {"__init__.py", "lines.py", "bfcl.py", "scout.py", "folder.py", "artifacts.py", "gists.py"}
"""They export, write task lines, mean analyzers or columns of these names, or say a record in a line without what runs a task."""


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_named_in_its_own_file_alone(name):
    task = KINDS[name].task.__name__
    files = [path for room in ROOMS for path in sorted((ROOT / "probe" / room).rglob("*.py"))]
    mentioning = {
        str(path.relative_to(ROOT / "probe"))
        for path in files
        if mentions(path, text=name, name=task) and path.name not in NOT_A_KIND
    }
    assert mentioning <= {f"tasks/{name}.py", "tasks/kinds.py"}


def test_every_kind_of_this_package_has_one_line_for_show():
    assert GISTS.keys() == KINDS.keys()
    assert {kind.gist for kind in KINDS.values()} == {Kind.gist}


@pytest.mark.parametrize("name", SITES)
def test_a_site_is_named_in_the_list_of_sites_alone(name):
    files = [
        path for room in ("capture", "harness") for path in sorted((ROOT / "probe" / room).rglob("*.py"))
    ]
    mentioning = {path.name for path in files if mentions(path, text=name)}
    # What a passage reads and a recorder keeps may have the name of a site.
    assert mentioning - {"passage.py", "batch.py", "sizes.py", "trials.py"} <= {"sites.py"}
