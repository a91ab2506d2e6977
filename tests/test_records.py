"""Records of every kind read as structs, and broken ones refused with the file and the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from probe.cli import main
from probe.errors import ArtifactCorrupt, UsageError
from probe.runs import INTERVENTION_FIELDS, Run, RunWriter, TaskRun
from probe.runs.records import (
    RECORDS,
    AgentRecord,
    CotRecord,
    FailedRecord,
    PromptingRecord,
    TaskRecord,
    ToolRecord,
    acceptable,
    decode,
    struct_of,
)
from probe.tasks import KINDS

GOLDEN = Path(__file__).parent.parent / "runs" / "golden"
PASSAGE = {
    "prompt": "Hi",
    "token_ids": [1, 2, 3],
    "n_prompt": 2,
    "n_new": 1,
    "completion": "x",
    "finish_reason": "eos",
    "spans": [{"label": "bos", "start": 0, "end": 1, "text": "<s>"}],
    "template": {"name": "raw", "fallback": None},
}
PROBABILITIES = [
    {"tool": "a", "token_ids": [3], "log_prob": -1, "probability": 0.5, "choice_probability": 1.0},
    {"tool": None, "token_ids": [4], "log_prob": -1.0, "probability": 0.5},
]
DECISION = {
    "tool_probabilities": PROBABILITIES,
    "chosen": None,
    "chosen_tool": "a",
    "candidate_mass": 0.7,
    "opener_log_prob": -2.5,
    "called": "a",
    "call": {"name": "a", "arguments": {"x": 1}},
}
TURN = DECISION | {"turn": 1, "start": 2, "end": 3, "text": "x", "position": 1, "slot": "reached"}
CHOICE = {"choice": "R", "token_ids": [3], "log_prob": -1.0, "probability": 1.0}
EACH: dict[str, dict[str, Any]] = {
    "tool_selection": PASSAGE | DECISION | {"target": ["a", "b"]},
    "agent": PASSAGE | DECISION | {"turns": [TURN | {"result": {"content": "7"}}], "ended_by": "answer"},
    "replay": PASSAGE
    | DECISION
    | {"turns": [TURN], "replay_agreement": {"n_tokens": 4, "argmax_share": 0.5, "disagrees": False}},
    "cot": PASSAGE | {"steps": ["One."], "answer": "3", "answer_forced": False, "target": 3},
    "prompting": {
        "passages": {"base": PASSAGE | {"choice_probabilities": [CHOICE], "chosen": "R"}},
        "target": "R",
    },
}
COMMON = {"id": "t", "status": "ok", "seconds": 1, "a field of a later version": []}


def record_of(kind: str, **fields: Any) -> dict[str, Any]:
    """A right record of a kind, with fields changed."""
    return json.loads(json.dumps(COMMON | {"kind": kind} | EACH[kind] | fields))


def read(record: dict[str, Any]) -> TaskRecord:
    return decode(record, struct_of(record), Path("runs/x/tasks/y"))


def test_a_record_of_each_kind_is_read_into_its_struct():
    assert {kind: type(read(record_of(kind))) for kind in EACH} == RECORDS
    assert RECORDS.keys() == KINDS.keys()


def test_parts_of_the_records_have_the_values_of_the_file():
    tool = decode(record_of("tool_selection"), ToolRecord, Path())
    assert (tool.passage.n_prompt, tool.passage.spans[0].length) == (2, 1)
    assert (tool.decision.names, tool.decision.tools) == (["a", None], ["a"])
    assert tool.decision.tool_probabilities[0].log_prob == -1.0
    assert tool.right == ("a", "b")
    agent = decode(record_of("agent"), AgentRecord, Path())
    assert agent.turns[0].result is not None
    assert agent.turns[0].result.content == "7"
    assert agent.target is msgspec.UNSET
    assert agent.right == ()
    assert decode(record_of("agent", target=None), AgentRecord, Path()).right == (None,)
    assert decode(record_of("cot"), CotRecord, Path()).target == 3
    prompting = decode(record_of("prompting", metadata={"family": "f"}), PromptingRecord, Path())
    assert (prompting.family, prompting.passages["base"].chosen) == ("f", "R")


def test_target_or_none_or_list_is_a_tuple():
    assert acceptable("a") == ("a",)
    assert acceptable(["a", "b"]) == ("a", "b")
    assert acceptable(None) == acceptable([]) == acceptable("") == (None,)


def test_a_failed_task_and_a_kind_of_another_package_have_the_common_fields():
    failed = {**COMMON, "kind": "cot", "status": "error", "error": "too long", "target": 3}
    assert read(failed) == FailedRecord(
        id="t", kind="cot", status="error", seconds=1, error="too long", target=3
    )
    assert read(COMMON | {"kind": "sums"}) == TaskRecord(id="t", kind="sums", status="ok", seconds=1)


@pytest.mark.parametrize(
    ("kind", "fields", "place"),
    [
        ("tool_selection", {"spans": 3}, "`$.spans`"),
        ("tool_selection", {"chosen": "nobody"}, "'nobody'"),
        ("tool_selection", {"tool_probabilities": []}, "`$.tool_probabilities`"),
        ("agent", {"turns": [{**TURN, "start": "here"}]}, "`$.turns[0].start`"),
        ("agent", {"turns": []}, "`$.turns`"),
        ("cot", {"steps": "One."}, "`$.steps`"),
        ("cot", {"spans": [{"label": "bos", "start": 4, "end": 1}]}, "`$.spans[0]`"),
        ("prompting", {"passages": {"base": None}}, "`$.passages[...]`"),
    ],
)
def test_wrong_content_names_the_file_and_the_field(kind: str, fields: dict[str, Any], place: str):
    with pytest.raises(ArtifactCorrupt) as fault:
        read(record_of(kind, **fields))
    assert fault.value.exit_code == 5
    assert str(fault.value).startswith("runs/x/tasks/y/record.json: altered (")
    assert place in str(fault.value)


@pytest.mark.parametrize("kind", EACH)
def test_a_missing_field_is_wrong_content(kind: str):
    field = "passages" if kind == "prompting" else "n_prompt"
    record = record_of(kind)
    del record[field]
    with pytest.raises(ArtifactCorrupt, match=f"missing required field `{field}`"):
        read(record)


def test_committed_runs_are_read_and_the_mapping_stays():
    tasks: list[TaskRun] = [task for run in sorted(GOLDEN.iterdir()) for task in Run(run)]
    assert tasks
    for task in tasks:
        record = task.typed(struct_of(task.record))
        assert (record.id, record.kind, record.status) == tuple(
            task.record[name] for name in ("id", "kind", "status")
        )
        assert task.typed(type(record)) is record
        assert isinstance(task.record, dict)
        prompts = {name: passage.prompt for name, passage in task.passages.items()}
        several = task.record.get("passages", {"main": task.record})
        assert prompts == {name: passage["prompt"] for name, passage in several.items()}


def test_a_table_that_was_not_made_is_empty_and_an_unknown_name_is_refused():
    run = Run(next(GOLDEN.iterdir()))
    assert len(run.table("interventions")) == 0
    assert run.table("interventions", arrow=True).column_names == list(INTERVENTION_FIELDS)
    with pytest.raises(UsageError, match="no table 'intervention': a run has measures, interventions"):
        run.table("intervention")  # type: ignore[call-overload]


@pytest.mark.parametrize("command", [["analyze", "--no-model"], ["report"]], ids=" ".join)
def test_a_record_that_is_none_ends_a_command_with_exit_code_5(tmp_path: Path, command: list[str]):
    with RunWriter.create(tmp_path / "run", {"kinds": ["tool_selection"], "model": {}}) as writer:
        writer.commit(record_of("tool_selection", spans=3), {}, {})
        writer.finish("done")
    result = CliRunner().invoke(main, [*command, str(tmp_path / "run")])
    assert result.exit_code == 5
    assert "record.json: altered (Expected `array`, got `int` - at `$.spans`)" in result.output
