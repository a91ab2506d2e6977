"""Schemas that never end, lead nowhere or break their checker: refused at their place, or an error of their task."""

from __future__ import annotations

import json
import time
from functools import reduce
from typing import Any

import pytest

import probe
from probe.errors import BadInput
from probe.prompts import PromptFault
from probe.prompts.tools import tools_prompt
from probe.prompts.turns import chat_turn
from probe.tasks import read_tasks
from probe.tools.calls import UncheckedArguments, check_arguments, validation
from probe.tools.definitions import parse_tool
from probe.tools.execution import Executable, call
from tests.conftest import tiny
from tests.each import each


def schema(definitions: dict[str, Any] | None = None, /, **words: Any) -> dict[str, Any]:
    return {"type": "object", **words} | ({"$defs": definitions} if definitions else {})


def of_a(**words: Any) -> dict[str, Any]:
    return schema(properties={"a": words})


def doubled(word: str, last: dict[str, Any]) -> dict[str, Any]:
    """Forty definitions, each twice the next one."""
    levels = {f"d{n}": {word: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}
    return schema(levels | {"d40": last}, properties={"a": {"$ref": "#/$defs/d0"}})


def nested(word: str, depth: int, last: dict[str, Any]) -> dict[str, Any]:
    return of_a(**reduce(lambda part, _: {word: [part, part]}, range(depth), last))


CHAIN = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(2000)} | {"d2000": {}}
SEVENTH = "http://json-schema.org/draft-07/schema#"
LEFT_OVER = {"a": "a" * 40 + "!"}

REFUSED = {
    "nowhere": (of_a(**{"$ref": "#/$defs/x"}), "properties.a.$ref"),
    "near": (schema({"City": {}}, properties={"a": {"$ref": "#/$defs/Citi"}}), "properties.a.$ref"),
    "no anchor": (of_a(**{"$ref": "#City"}), "properties.a.$ref"),
    "into a text": (of_a(**{"$ref": "#/type/x"}), "properties.a.$ref"),
    "to a list": (schema(properties={"a": {"$ref": "#/required"}}, required=["a"]), "properties.a.$ref"),
    "half an escape": (of_a(**{"$ref": "#/%zz"}), "properties.a.$ref"),
    "of a parameter called default": (
        schema(properties={"default": {"$ref": "#/x"}}),
        "properties.default.$ref",
    ),
    "in a branch": (schema(allOf=[{"$ref": "#/$defs/x"}]), "allOf[0].$ref"),
    "dynamic, nowhere": (of_a(**{"$dynamicRef": "#x"}), "properties.a.$dynamicRef"),
    "outside": (of_a(**{"$ref": "http://127.0.0.1:9/x"}), "properties.a.$ref"),
    "outside by its own id": (of_a(**{"$id": "http://127.0.0.1:9/x", "$ref": "#/y"}), "properties.a.$ref"),
    "an id that is none": (schema(**{"$id": "http://[x", "allOf": [{"$ref": "#/y"}]}), "allOf[0].$ref"),
    "itself": (schema(**{"$ref": "#"}), "$ref"),
    "itself in a branch": (schema(allOf=[{"$ref": "#"}]), "allOf[0].$ref"),
    "itself, denied": (schema(**{"not": {"$ref": "#"}}), "not.$ref"),
    "itself, if": (schema(**{"if": {"required": ["a"]}, "then": {"$ref": "#"}}), "then.$ref"),
    "itself, if there is another": (schema(dependentSchemas={"a": {"$ref": "#"}}), "dependentSchemas.a.$ref"),
    "a parameter itself": (of_a(**{"$ref": "#/properties/a"}), "properties.a.$ref"),
    "each other": (schema({"x": {"$ref": "#/$defs/y"}, "y": {"$ref": "#/$defs/x"}}), "$defs.x.$ref"),
    "itself, dynamic": (schema(**{"$dynamicAnchor": "x", "$dynamicRef": "#x"}), "$dynamicRef"),
    "itself, recursive": (
        schema(**{"$schema": "https://json-schema.org/draft/2019-09/schema", "$recursiveRef": "#"}),
        "$recursiveRef",
    ),
    "too many parts": (nested("anyOf", 14, {"type": "integer"}), ""),
    "nested too deep": (of_a(**reduce(lambda part, _: {"items": part}, range(400), {})), ""),
}
"""Name → parameters, and where the mistake is."""


@each(REFUSED)
def test_what_cannot_be_checked_is_refused_at_its_place(name):
    parameters, place = REFUSED[name]
    with pytest.raises(ValueError, match=r": .*: ") as caught:
        parse_tool({"name": "f", "parameters": parameters})
    assert str(caught.value).split(": ")[0] == f"parameters{'.' if place else ''}{place}"


def test_a_reference_that_leads_nowhere_has_line_and_column_and_the_nearest(tmp_path):
    tool = {"name": "f", "parameters": REFUSED["near"][0]}
    task = {"id": "t", "kind": "tool_selection", "input": "x", "tools": [tool], "target": "f"}
    good = task | {"id": "g", "tools": [{"name": "f"}]}
    text = json.dumps(good) + "\n" + json.dumps(task)
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(BadInput) as caught:
        read_tasks(tmp_path / "t.jsonl", None)
    column = text.splitlines()[1].index('"#/$defs/Citi"') + 1
    assert caught.value.problems == [
        f'{tmp_path}/t.jsonl:2:{column}: tools[0].parameters.properties.a.$ref: "#/$defs/Citi" leads nowhere: '
        'the nearest definition is "#/$defs/City"'
    ]


UNCHECKED = {
    "pattern": (of_a(pattern="^(a|a)*$"), LEFT_OVER),
    "pattern, of its own draft": (of_a(**{"$schema": SEVENTH, "pattern": "^(a|a)*$"}), LEFT_OVER),
    "pattern, around a root": (
        schema(**{"$schema": SEVENTH, "properties": {"a": {"pattern": "^(a|a)*$"}, "b": {"$ref": "#"}}}),
        {"b": {"b": LEFT_OVER}},
    ),
    "pattern of names": (schema(propertyNames={"pattern": "^(a|a)*$"}), {"a" * 40 + "!": 1}),
    "pattern properties": (
        schema(patternProperties={"^(a|aa)+$": {}}, additionalProperties=False),
        {"a" * 60 + "!": 1},
    ),
    "unevaluated": (
        schema(patternProperties={"^(a|aa)+$": {}}, unevaluatedProperties=False),
        {"a" * 60 + "!": 1},
    ),
    "anyOf, doubled": (doubled("anyOf", {"type": "string"}), {"a": 1}),
    "oneOf, doubled": (doubled("oneOf", {"type": "integer"}), {"a": 1}),
    "allOf, doubled": (doubled("allOf", {"type": "integer"}), {"a": 1}),
    "evaluated, doubled": (
        schema(
            {
                f"d{n}": {"dependentSchemas": {key: {"$ref": f"#/$defs/d{n + 1}"} for key in "ab"}}
                for n in range(40)
            }
            | {"d40": {}},
            **{"unevaluatedProperties": False, "$ref": "#/$defs/d0"},
        ),
        {"a": 1, "b": 1},
    ),
    "a chain": (schema(CHAIN, properties={"a": {"$ref": "#/$defs/d0"}}), {"a": 1}),
}
"""Name → parameters and arguments."""


@each(UNCHECKED)
def test_a_schema_that_never_ends_is_given_up(name, monkeypatch):
    monkeypatch.setattr(validation, "PATTERN_SECONDS", 0.05)
    monkeypatch.setattr(validation, "STEPS", 2000)
    parameters, arguments = UNCHECKED[name]
    tool = parse_tool({"name": "f", "parameters": parameters})
    started = time.process_time()
    with pytest.raises(UncheckedArguments, match="arguments of f cannot be checked against its schema: "):
        check_arguments(tool, arguments)
    assert time.process_time() - started < 5
    result = call("f", json.dumps(arguments), tools={"f": Executable(tool=tool, module="m", attribute="f")})
    assert result.error == "unavailable"


CHECKED = {
    "a tree": (of_a(**{"$ref": "#"}), {"a": {"a": {}}}, None),
    "a tree of more": (
        schema(
            {"n": {"properties": {"left": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}}},
            properties={"a": {"$ref": "#/$defs/n"}},
        ),
        {"a": {"left": {"left": None}}},
        None,
    ),
    "escaped": (
        schema({"x/y": {"type": "integer"}}, properties={"a": {"$ref": "#/$defs/x~1y"}}),
        {"a": 1},
        None,
    ),
    "no reference but a value": (of_a(const={"$ref": "http://x"}), {"a": {"$ref": "http://x"}}, None),
    "a parameter called $ref": (schema(properties={"$ref": {"type": "string"}}), {"$ref": "x"}, None),
    "twice as good": (nested("anyOf", 6, {"type": "integer"}), {"a": 1}, None),
    "twice as bad": (nested("anyOf", 6, {"type": "string"}), {"a": 1}, "invalid_argument"),
    "30,000 of two types": (
        of_a(uniqueItems=True),
        {"a": [n if n % 2 else str(n) for n in range(30_000)]},
        None,
    ),
    "the same number": (of_a(uniqueItems=True), {"a": [{"x": 2}, {"x": 2.0}]}, "invalid_argument"),
    "no numbers": (of_a(uniqueItems=True), {"a": [1, True, 0, False]}, None),
    "a tiny divisor": (of_a(multipleOf=1e-300), {"a": 1e308}, "invalid_argument"),
    "no value is right": (of_a(**{"not": {}}), {"a": 1}, "invalid_argument"),
    "pattern properties": (
        schema(patternProperties={"^x_": {"type": "integer"}}, additionalProperties=False),
        {"x_a": 1, "y": 2},
        "unexpected_argument",
    ),
    "a backtracking pattern": (of_a(pattern="^(a+)+$"), LEFT_OVER, "invalid_argument"),
}
"""Name → parameters, arguments and what is wrong with them."""


@each(CHECKED)
def test_what_only_looks_hostile_is_checked(name):
    parameters, arguments, expected = CHECKED[name]
    tool = parse_tool({"name": "f", "parameters": parameters})
    fault = check_arguments(tool, arguments)
    assert (fault and fault[0]) == expected


def test_a_listing_that_multiplies_is_given_up():
    levels = {
        f"d{n}": {"properties": {key: {"$ref": f"#/$defs/d{n + 1}"} for key in "xy"}} for n in range(40)
    } | {"d40": {"type": "string"}}
    tool = parse_tool({"name": "f", "parameters": schema(levels, properties={"a": {"$ref": "#/$defs/d0"}})})
    codec = tiny("tiny-llama").codec
    with pytest.raises(PromptFault, match="more than 20,000 parts"):
        tools_prompt([chat_turn("user", "x")], [tool], codec, 4, instruction="{no_tool}", free=False)


def test_what_a_task_raises_is_its_error_and_never_the_end_of_a_run_or_of_resume(tmp_path, monkeypatch):
    from probe.tasks import tool_selection

    def task(name: str) -> dict[str, Any]:
        return {"id": name, "kind": "tool_selection", "input": name, "tools": [{"name": "f"}], "target": "f"}

    def check(prompt: Any, *_args: Any, **_more: Any) -> Any:
        if "unchecked" in prompt.text:
            raise UncheckedArguments("the arguments of f cannot be checked")
        return {"called": None, "call": None}

    def choose(task: Any, *args: Any, **more: Any) -> Any:
        if task.id == "unrendered":
            raise RecursionError("too deep")
        return plain(task, *args, **more)

    plain = tool_selection.choice_prompt
    monkeypatch.setattr(tool_selection, "choice_prompt", choose)
    monkeypatch.setattr(tool_selection, "read_call", check)
    names = ["first", "unrendered", "unchecked", "last"]
    run = probe.run(
        list(map(task, names)),
        model=tiny("tiny-llama"),
        out=tmp_path / "run",
        analyze=False,
        max_new_tokens=2,
    )
    expected = dict(zip(names, ("ok", "error", "error", "ok"), strict=True))
    assert {item.id: item.record["status"] for item in run} == expected, run["first"].record.get("error")
    assert run["unchecked"].record["error"] == "UncheckedArguments: the arguments of f cannot be checked"
    assert run["unrendered"].record["error"] == "RecursionError: too deep"
    for name in names[1:]:
        for file in run[name].path.iterdir():
            file.unlink()
        run[name].path.rmdir()
    (tmp_path / "run" / "manifest.json").unlink()
    again = probe.resume(tmp_path / "run", analyze=False)
    assert {item.id: item.record["status"] for item in again} == expected
