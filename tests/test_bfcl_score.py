"""Verdicts of the Berkeley leaderboard: every case below has the verdict of bfcl-eval 2026.3.23's own checker."""

from __future__ import annotations

import json
import math
import time

import pytest

from probe.analyzers.tool.bfcl import measures as bfcl_accuracy
from probe.tasks import Message, ToolTask, record
from probe.tools.calls import Call, read_calls
from probe.tools.calls.bfcl import KINDS, bfcl_verdict
from probe.tools.definitions import Tool
from tests.made_up_runs import PlantedTask, planted_task
from tests.test_scoring import outcome_for, prompt_for

TYPES = {
    "text": "string",
    "whole": "integer",
    "real": "float",
    "flag": "boolean",
    "free": "any",
    "words": ["array", "string"],
    "reals": ["array", "float"],
    "pair": ["tuple", "float"],
    "given": ["array", "float"],
    "entry": "dict",
    "entries": ["array", "dict"],
    "where": "integer",
}
ANSWER = {
    "text": ["New York, NY", "NYC"],
    "whole": [5, ""],
    "real": [1.5, 2.0, ""],
    "flag": [True, ""],
    "free": ["x", ""],
    "words": [["a b", "C"], ["d"], ""],
    "reals": [[1.0, 2.5], ""],
    "pair": [[1.0, 2.0], ""],
    "given": [[1.0, 2.0]],
    "entry": [{"k": ["v", "w"], "n": [1, ""]}, ""],
    "entries": [[{"k": ["v"]}, {"k": ["w"], "n": [1, ""]}], ""],
    "where": ["here", ""],
}
OK = {"text": "NYC", "given": [1.0, 2.0]}

# (arguments beside a right `text`, or the whole arguments where they have it; kind of error)
PYTHON = [
    ({}, None),
    ({"text": "new york ny"}, None),
    ({"text": "NEW-YORK/n.y_*^"}, None),
    ({"text": "New York\n, NY"}, "value_error"),
    ({"text": "Boston"}, "value_error"),
    ({"text": ""}, "value_error"),
    ({"text": 5}, "type_error"),
    ({"text": None}, "type_error"),
    ({"whole": 5}, None),
    ({"whole": 6}, "value_error"),
    ({"whole": 5.0}, "type_error"),
    ({"whole": "5"}, "type_error"),
    ({"whole": True}, "type_error"),
    ({"real": 1.5}, None),
    ({"real": 2}, None),
    ({"real": 3}, "value_error"),
    ({"real": "1.5"}, "type_error"),
    ({"real": True}, "type_error"),
    ({"flag": True}, None),
    ({"flag": False}, "value_error"),
    ({"flag": 1}, "type_error"),
    ({"free": "X"}, None),
    ({"free": 3}, "type_error"),
    ({"words": ["A-B", "c"]}, None),
    ({"words": ["d"]}, None),
    ({"words": ["C", "a b"]}, "value_error"),
    ({"words": ["a b"]}, "value_error"),
    ({"words": []}, None),
    ({"words": "d"}, "type_error"),
    ({"words": ["a b", 3]}, "value_error"),
    ({"reals": [1.0, 2.5]}, None),
    ({"reals": [1, 2.5]}, None),
    ({"reals": ["1.0", 2.5]}, "value_error"),
    ({"given": [1.0, 2.0]}, None),
    ({"given": [1, 2]}, "type_error"),
    ({"given": ["1.0"]}, "type_error"),
    ({"pair": [1.0, 2.0]}, None),
    ({"pair": (1.0, 2.0)}, None),
    ({"reals": (1.0, 2.5)}, "type_error"),
    ({"entry": {"k": "V"}}, None),
    ({"entry": {"k": "w", "n": 1}}, None),
    ({"entry": {"k": "w", "n": 2}}, "value_error"),
    ({"entry": {"n": 1}}, "value_error"),
    ({"entry": {"k": "v", "z": 1}}, "value_error"),
    ({"entry": {}}, "value_error"),
    ({"entry": "v"}, "type_error"),
    ({"entries": [{"k": "v"}, {"k": "w"}]}, None),
    ({"entries": [{"k": "w"}, {"k": "v"}]}, "value_error"),
    ({"entries": [{"k": "v"}]}, "value_error"),
    ({"entries": []}, None),
    ({"entries": ["v"]}, "value_error"),
    ({"where": "here"}, None),
    ({"where": "Here"}, "value_error"),
    ({"where": 3}, "value_error"),
    ({"other": 1}, "unexpected_param"),
]
JAVA_TYPES = {
    "s": "String",
    "i": "integer",
    "l": "long",
    "d": "double",
    "f": "float",
    "b": "boolean",
    "c": "char",
    "any": "any",
    "a": ["Array", "integer"],
    "al": ["ArrayList", "String"],
    "h": "HashMap",
}
JAVA_ANSWER = {
    "s": ["x", ""],
    "i": [5, ""],
    "l": [5, ""],
    "d": [2.5, ""],
    "f": [2.5, ""],
    "b": [True, ""],
    "c": ["q", ""],
    "any": ["obj", ""],
    "a": [[1, 2], ""],
    "al": [["p", "q"], ""],
    "h": [{"k": ["v"], "n": [3, ""]}, ""],
}
JAVA = [
    ({}, None),
    ({"s": "X"}, None),
    ({"s": '"x"'}, "value_error"),
    ({"i": "5"}, None),
    ({"i": 5}, "type_error"),
    ({"i": "5L"}, "type_error"),
    ({"i": "6"}, "value_error"),
    ({"l": "5L"}, None),
    ({"l": "5"}, "type_error"),
    ({"d": "2.5"}, None),
    ({"d": "25e-1"}, None),
    ({"f": "2.5f"}, None),
    ({"f": "2.5"}, "type_error"),
    ({"b": "true"}, None),
    ({"b": True}, "type_error"),
    ({"b": "false"}, "value_error"),
    ({"c": "q"}, None),
    ({"any": "OBJ"}, None),
    ({"a": "new int[]{1, 2}"}, None),
    ({"a": "new int[]{2, 1}"}, "value_error"),
    ({"a": "{1, 2}"}, "type_error"),
    ({"al": 'new ArrayList<>(Arrays.asList("p", "q"))'}, None),
    ({"al": 'new ArrayList<String>() {{ add("p"); add("q"); }}'}, None),
    ({"al": "new ArrayList<>()"}, None),
    ({"h": 'new HashMap<String, Object>() {{ put("k", "v"); put("n", 3); }}'}, None),
    ({"h": 'new HashMap<String, Object>() {{ put("k", "w"); }}'}, "value_error"),
    ({"h": "new HashMap<>()"}, "value_error"),
]
SCRIPT_TYPES = {
    "s": "String",
    "i": "integer",
    "f": "float",
    "g": "Bigint",
    "b": "Boolean",
    "any": "any",
    "a": ["array", "String"],
    "m": ["array", "array"],
    "d": "dict",
}
SCRIPT_ANSWER = {
    "s": ["x", ""],
    "i": [5, ""],
    "f": [2.5, 3.0, ""],
    "g": [7, ""],
    "b": [False, ""],
    "any": ["callback", ""],
    "a": [["p", "q"], ""],
    "m": [[[1, 2], [3]], ""],
    "d": [{"k": ["v"], "l": [[1, 2], ""]}, ""],
}
SCRIPT = [
    ({}, None),
    ({"s": "'x'"}, None),
    ({"s": '"X"'}, None),
    ({"s": "x"}, None),
    ({"i": "5"}, None),
    ({"i": 5}, "type_error"),
    ({"f": "2.5"}, None),
    ({"f": "3"}, None),
    ({"g": "7n"}, None),
    ({"g": "7"}, "type_error"),
    ({"b": "false"}, None),
    ({"b": "False"}, "type_error"),
    ({"any": "Callback"}, None),
    ({"a": "['p', 'q']"}, None),
    ({"a": 'new Array("p", "q")'}, None),
    ({"a": "p, q"}, "type_error"),
    ({"m": "[[1, 2], [3]]"}, None),
    ({"m": "[[1, 2], [4]]"}, "value_error"),
    ({"m": "[[1, 2], [3]"}, "value_error"),
    ({"d": '{"k": "v"}'}, None),
    ({"d": "{'k': 'v', 'l': [1, 2]}"}, None),
    ({"d": "{'k': 'w'}"}, "value_error"),
    ({"d": "{}"}, "value_error"),
    ({"d": "k: v"}, "type_error"),
]


def facts(category: str, types, answer, **more) -> dict:
    return {"category": category, "answer": {"f": answer}, "types": types, **more}


def called(name: str, arguments) -> Call:
    return Call(name, arguments, "", 0, 0)


def error(calls, given, required=()) -> str | None:
    verdict = bfcl_verdict(calls, given, required)
    assert verdict is not None
    assert verdict.valid == (verdict.error is None) == (verdict.message is None)
    assert verdict.error is None or verdict.error in KINDS
    return verdict.error


@pytest.mark.parametrize(("arguments", "expected"), PYTHON, ids=str)
def test_python_arguments_are_judged_as_the_leaderboard_does(arguments, expected):
    given = facts("multiple", TYPES, ANSWER)
    assert error([called("f", OK | arguments)], given, ["text"]) == expected


@pytest.mark.parametrize(("arguments", "expected"), JAVA, ids=str)
def test_java_arguments_are_read_from_their_source(arguments, expected):
    assert error([called("f", arguments)], facts("simple_java", JAVA_TYPES, JAVA_ANSWER)) == expected


@pytest.mark.parametrize(("arguments", "expected"), SCRIPT, ids=str)
def test_javascript_arguments_are_read_from_their_source(arguments, expected):
    assert (
        error([called("f", arguments)], facts("simple_javascript", SCRIPT_TYPES, SCRIPT_ANSWER)) == expected
    )


@pytest.mark.parametrize(
    ("calls", "required", "expected"),
    [
        ([called("f", OK)], ["text"], None),
        ([called("g", OK)], ["text"], "wrong_func_name"),
        ([called("F", OK)], ["text"], "wrong_func_name"),
        ([called("f", {"whole": 5})], ["text"], "missing_required"),
        ([called("f", {"text": "NYC"})], ["text"], "missing_optional"),
        ([called("f", None)], ["text"], "missing_required"),
        ([called("f", OK)] * 2, ["text"], "wrong_count"),
    ],
)
def test_calls_are_judged_before_their_values(calls, required, expected):
    assert error(calls, facts("simple_python", TYPES, ANSWER), required) == expected


def test_text_without_a_readable_call_cannot_be_decoded():
    given = facts("simple_python", TYPES, ANSWER)
    for text in ("It is five.", '{"name": "f", "arguments": {"text": ', "[f(text=name)]"):
        assert error(read_calls(text), given) == "decoder_failed"
    assert error(read_calls('[f(text="NYC", given=(1.0, 2.0))]'), given) is None


def test_irrelevance_is_right_without_a_readable_call_and_relevance_with_one():
    for category, none, some in (
        ("irrelevance", None, "decoder_success"),
        ("live_irrelevance", None, "decoder_success"),
        ("live_relevance", "decoder_failed", None),
    ):
        assert error([], {"category": category}) == none
        assert error(read_calls('{"name": "f", "arguments": {'), {"category": category}) == none
        assert error([called("anything", {"x": 1})], {"category": category}) == some


def test_a_function_shown_under_another_name_is_the_answers():
    given = facts("live_simple", TYPES, ANSWER, names={"f_2": "f"})
    assert error([called("f_2", OK)], given) is None
    assert error([called("f_3", OK)], given) == "wrong_func_name"


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        "multiple",
        {},
        {"category": 3},
        {"category": "multiple", "answer": {"f": {"x": [1]}}},
        {"category": "multiple", "answer": {"f": {"x": 1}}, "types": {"x": "integer"}},
        {"category": "multiple", "answer": {"f": {}, "g": {}}, "types": {}},
    ],
)
def test_metadata_of_another_shape_gives_no_verdict(metadata):
    assert bfcl_verdict([called("f", {"x": 1})], metadata, []) is None


@pytest.mark.parametrize(
    ("category", "word", "text"),
    [
        ("simple_java", "ArrayList", "new ArrayList<String>() {{" + " " * 4000),
        ("simple_java", "ArrayList", "new ArrayList<String>() {{ add(" * 130),
        ("simple_java", "HashMap", "new HashMap<String, Object>() {" + " " * 4000),
        ("simple_java", "HashMap", "new HashMap<>() {{" + 'put("' + '","' * 1300 + "}"),
        ("simple_javascript", "array", "[[" + "],[" * 1300),
        ("simple_javascript", "array", "[" * 4000),
        ("simple_javascript", "dict", "{" + "a:" * 1500 + "}"),
        ("simple_javascript", "dict", "{" + "a," * 1500 + "}"),
    ],
)
def test_no_source_text_takes_long(category, word, text):
    given = facts(category, {"x": [word, "String"]}, {"x": [[1]]})
    start = time.process_time()
    assert error([called("f", {"x": text})], given) in ("type_error", "value_error")
    assert time.process_time() - start < 2


# -- records and runs ------------------------------------------------------------------------------------------------

ADD = Tool(name="calc", parameters={"properties": {"x": {"type": "integer"}}, "required": ["x"]})
IMPORTED = {"bfcl": {"category": "multiple", "answer": {"calc": {"x": [1]}}, "types": {"x": "integer"}}}


def judged(completion: str, *, metadata=IMPORTED, no_tool="listed", opener=None) -> dict | None:
    task = ToolTask(
        id="t",
        messages=(Message("user", "?"),),
        tools=(ADD,),
        target="calc",
        raw={"target": "calc"},
        metadata=metadata,
    )
    prompt = prompt_for(no_tool, ("calc",))
    log_probs = [-1.0, -2.0] if no_tool == "listed" else [-1.0]
    out = record(task, [prompt], [outcome_for(log_probs, opener, completion)], 0.1)
    json.dumps(out, allow_nan=False)
    assert out["score"] in (0.0, 1.0)
    return out.get("bfcl")


def test_a_record_of_the_leaderboards_tasks_has_its_verdict():
    assert judged('calc", "arguments": {"x": 1}}') == {"valid": True, "error": None, "message": None}
    wrong = judged('calc", "arguments": {"x": 2}}')
    assert wrong is not None
    assert (wrong["valid"], wrong["error"]) == (False, "value_error")
    assert judged('calc", "arguments": {}}', metadata={"split": "dev"}) is None
    # "No tool" is listed: how probable the opener was says nothing.
    assert judged('calc", "arguments": {"x": 1}}', opener=-20.0) == {
        "valid": True,
        "error": None,
        "message": None,
    }
    refused = judged('no_tool", "arguments": {}}')
    assert refused is not None
    assert refused["error"] == "decoder_failed"


def test_refusing_is_right_where_no_function_fits():
    none = {"bfcl": {"category": "irrelevance"}}
    for completion, no_tool, opener, valid in (
        ('no_tool", "arguments": {}}', "listed", None, True),
        ('calc", "arguments": {"x": 1}}', "listed", None, False),
        ('calc", "arguments": {"x": 1}}', "complement", math.log(0.6), False),
        # The opener was forced, and the model would not have written it.
        ('calc", "arguments": {"x": 1}}', "complement", math.log(0.4), True),
    ):
        actual = judged(completion, metadata=none, no_tool=no_tool, opener=opener)
        assert actual is not None
        assert actual["valid"] is valid


def _judged(valid: bool | None, status: str = "ok") -> PlantedTask:
    task = planted_task("t", {"search": -1.0, None: -2.0})
    task.record["status"] = status
    if valid is not None:
        task.record["bfcl"] = {"valid": valid}
    return task


def test_the_accuracy_of_a_run_has_wilsons_interval():
    from scipy.stats import binomtest

    run = [_judged(True)] * 7 + [_judged(False)] * 3 + [_judged(None), _judged(True, "error")]
    (row,) = bfcl_accuracy(run)  # pyright: ignore[reportArgumentType]
    interval = binomtest(7, 10).proportion_ci(0.95, method="wilson")
    assert (row.task_id, row.analyzer, row.name, row.n) == ("", "tool", "bfcl_accuracy", 10)
    assert row.value == pytest.approx(0.7)
    assert (row.low, row.high) == pytest.approx((interval.low, interval.high))
    assert list(bfcl_accuracy([_judged(None)])) == []  # pyright: ignore[reportArgumentType]
