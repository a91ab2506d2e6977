"""A run as a log of Inspect: what is read back, by another reader of that format, is what the records say."""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from weakref import WeakSet

import pytest

import probe
from probe.errors import UsageError
from probe.runs import Run, RunWriter
from probe.runs import eval_log as eval_log_module
from probe.runs.eval_log import NO_TOOL, eval_log
from probe.runs.export import export
from probe.runs.manifest import read_record
from probe.tasks.imports.inspect_log import read
from probe.tasks.imports.record import Record
from tests.golden import GOLDEN


@pytest.fixture(scope="module")
def run() -> Any:
    return probe.open(GOLDEN / "tiny-llama-states")


@pytest.fixture(scope="module")
def members(run) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(b"".join(eval_log(run)))) as archive:
        assert archive.testzip() is None
        return {name: json.loads(archive.read(name)) for name in archive.namelist()}


def test_a_log_has_the_members_and_fields_that_inspect_requires(run, members):
    header = members["header.json"]
    assert {"eval_id", "run_id", "created", "task", "task_id", "dataset", "model", "config"} <= header[
        "eval"
    ].keys()
    assert (header["version"], header["status"]) == (2, "success")
    assert members["_journal/start.json"]["eval"] == header["eval"]
    samples = [document for name, document in members.items() if name.startswith("samples/")]
    assert header["results"]["total_samples"] == len(samples) == len(members["summaries.json"])
    for sample in samples:
        assert {"id", "epoch", "input", "target", "messages", "output", "metadata"} <= sample.keys()
    assert list(eval_log(run)) == list(eval_log(run)), "the same run is the same bytes"


def test_samples_say_what_the_records_say(run, members):
    for task in run:
        passages = task.record.get("passages", {"main": task.record})
        for name, passage in passages.items():
            ident = task.id if len(passages) == 1 else f"{task.id}/{name}"
            sample = members[f"samples/{ident}_epoch_1.json"]
            assert (sample["id"], sample["input"]) == (ident, passage["prompt"])
            assert sample["output"]["completion"] == passage["completion"]
            end = {"eos": "stop", "stop": "stop", "length": "max_tokens"}[passage["finish_reason"]]
            assert sample["output"]["choices"][0]["stop_reason"] == end
            if "tool_probabilities" in task.record:
                shares = {e["tool"] or NO_TOOL: e["probability"] for e in task.record["tool_probabilities"]}
                assert sample["metadata"]["probe"]["tool_probabilities"] == shares
                assert sample["scores"]["probe"]["value"] == task.record["score"]


def test_the_reader_of_such_logs_reads_it(run, tmp_path):
    (path,) = export(run, None, tmp_path / "run.eval")
    records = list(read([path], None))
    assert all(isinstance(record, Record) for record in records)
    prompts = {
        passage["prompt"]
        for task in run
        for passage in task.record.get("passages", {"main": task.record}).values()
    }
    assert {record.messages[0]["content"] for record in records if isinstance(record, Record)} == prompts


def test_every_sample_lies_under_its_id_and_none_leads_out_of_the_folder(tmp_path):
    ids = ["a b/c", "ünï", "../../up", "a/../b", "/root", "c:\\x", "new\nline", "%2e", "a..b"]
    header = {"model": {"name": "m"}, "task_ids": ids, "created": "no time"}
    with RunWriter.create(tmp_path / "run", header) as writer:
        for ident in ids:
            writer.commit(
                {"id": ident, "kind": "cot", "status": "nonfinite", "error": "x", "seconds": 0.0}, {}, {}
            )
        writer.finish("failed")
    with zipfile.ZipFile(io.BytesIO(b"".join(eval_log(Run(tmp_path / "run"))))) as archive:
        members = {name: json.loads(archive.read(name)) for name in archive.namelist()}
    listed = members["header.json"]["eval"]["dataset"]["sample_ids"]
    # As Inspect looks a sample up (log/_recorders/eval.py, _sample_filename).
    assert all(members[f"samples/{ident}_epoch_1.json"]["id"] == ident for ident in listed)
    assert [unquote(ident) if ident not in ids else ident for ident in listed] == ids
    assert all(
        ".." not in Path(name).parts and not name.startswith("/") and "\n" not in name for name in members
    )
    assert listed[:2] == ids[:2] and listed[-2:] == ids[-2:]
    datetime.fromisoformat(members["header.json"]["eval"]["created"])


def test_each_record_is_read_once_and_one_sample_is_held(run, monkeypatch):
    held: list[int] = []
    reads: Counter[str] = Counter()
    samples, record = eval_log_module._samples, read_record

    def counted(task, model):
        for sample in samples(task, model):
            kept = Sample(sample)
            alive.add(kept)
            yield kept
            held.append(len(alive))

    class Sample(dict):
        def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
            return id(self)

    alive: WeakSet[Sample] = WeakSet()

    def noted(directory, expected=None):
        reads[directory.name] += 1
        return record(directory, expected)

    monkeypatch.setattr(eval_log_module, "_samples", counted)
    monkeypatch.setattr("probe.runs.folder.read_record", noted)
    for _ in eval_log(probe.open(run.path)):
        pass
    assert set(reads.values()) == {1} and len(reads) == len(run)
    assert max(held) <= 2 < len(held)


def test_a_log_is_one_file(run, tmp_path):
    with pytest.raises(UsageError, match="is one file"):
        export(run, "eval", tmp_path / "folder")
    with pytest.raises(UsageError, match="does not fit"):
        export(run, "eval", tmp_path / "run.csv")


@pytest.mark.parametrize(
    ("kind", "fields", "target"),
    [
        ("tool_selection", {"target": None}, NO_TOOL),
        ("tool_selection", {"target": ["a", None]}, ["a", NO_TOOL]),
        ("cot", {"target": None}, ""),
        ("replay", {}, ""),
    ],
)
def test_no_target_is_another_thing_than_no_tool(tmp_path, kind, fields, target):
    record = {"id": "t", "kind": kind, "status": "nonfinite", "error": "x", "seconds": 0.0} | fields
    with RunWriter.create(
        tmp_path / "run", {"model": {"name": "m"}, "task_ids": ["t"], "options": {}}
    ) as writer:
        writer.commit(record, {}, {})
        writer.finish("failed")
    with zipfile.ZipFile(io.BytesIO(b"".join(eval_log(Run(tmp_path / "run"))))) as archive:
        (sample,) = [json.loads(archive.read(n)) for n in archive.namelist() if n.startswith("samples/")]
    assert (sample["target"], sample["error"]["message"]) == (target, "x")
