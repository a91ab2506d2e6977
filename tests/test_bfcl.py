"""Importing BFCL: planted files in its shape, and the real ones where they are."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner

from probe.cli import main
from probe.errors import BadInput, UsageError
from probe.tasks import ToolTask, lint, read_tasks
from probe.tasks.imports.bfcl import CATEGORIES, read_bfcl

REAL = Path(os.environ.get("BFCL_DATA", "nowhere"))
"""The folder `data` of an unpacked bfcl-eval 2026.3.23."""
COUNTS = {
    "simple_python": 400, "simple_java": 100, "simple_javascript": 50, "multiple": 200, "live_simple": 258,
    "live_multiple": 1053, "live_relevance": 16, "irrelevance": 240, "live_irrelevance": 884,
}  # fmt: skip

AREA = {
    "name": "triangle.area",
    "description": "Area of a triangle.",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "float", "description": "Length."},
            "height": {"type": "float", "default": 1.5},
            "type": {"type": "any", "description": "A parameter that is called type."},
            "points": {"type": "array", "items": {"type": "tuple", "items": {"type": "integer"}}},
            "options": {"type": "dict", "properties": {"deep": {"type": "dict"}}, "required": ["deep"]},
            "unit": {"type": "string", "enum": ["m", "ft"], "optional": True},
        },
        "required": ["base"],
    },
}
CIRCLE = {
    "name": "circle",
    "description": "Area of a circle.",
    "parameters": {"type": "dict", "properties": {}, "required": []},
}
ASK = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How large is it?"}]]


def question(task_id="multiple_0", functions=(AREA, CIRCLE), **changed):
    return {"id": task_id, "question": ASK, "function": list(functions)} | changed


def answer(task_id="multiple_0", name="triangle.area", **arguments):
    return {"id": task_id, "ground_truth": [{name: arguments or {"base": [10, 10.0], "unit": ["m", ""]}}]}


def plant(folder: Path, category: str, questions, answers=None) -> Path:
    (folder / "possible_answer").mkdir(exist_ok=True)
    name = f"BFCL_v4_{category}.json"
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in questions))
    if answers is not None:
        (folder / "possible_answer" / name).write_text("".join(json.dumps(line) + "\n" for line in answers))
    return folder


def test_a_question_becomes_a_task_with_its_answer(tmp_path):
    imported = read_bfcl(plant(tmp_path, "multiple", [question()], [answer()]), "multiple")
    assert imported.refused == []
    (task,) = imported.tasks
    assert {key: task[key] for key in ("id", "kind", "messages", "target", "metadata")} == {
        "id": "multiple_0",
        "kind": "tool_selection",
        "messages": ASK[0],
        "target": "triangle.area",
        "metadata": {
            "bfcl": {
                "category": "multiple",
                "answer": {"triangle.area": {"base": [10, 10.0], "unit": ["m", ""]}},
                "types": {
                    "base": "float",
                    "height": "float",
                    "type": "any",
                    "points": ["array", "tuple"],
                    "options": "dict",
                    "unit": "string",
                },
            }
        },
    }
    assert [tool["name"] for tool in task["tools"]] == ["triangle.area", "circle"]


def test_types_become_those_of_json_schema_and_nothing_else_changes(tmp_path):
    imported = read_bfcl(plant(tmp_path, "multiple", [question()], [answer()]), "multiple")
    expected = copy.deepcopy(AREA["parameters"])
    expected["type"] = "object"
    properties = expected["properties"]
    properties["base"]["type"] = properties["height"]["type"] = "number"
    del properties["type"]["type"]
    properties["points"]["items"]["type"] = "array"
    properties["options"]["type"] = properties["options"]["properties"]["deep"]["type"] = "object"
    assert imported.tasks[0]["tools"][0]["parameters"] == expected


@pytest.mark.parametrize(
    ("spelled", "value", "wrong"),
    [
        ("dict", {}, []), ("HashMap", {"a": 1}, 1), ("float", 1.5, "1"), ("float", 2, True), ("double", 0.5, None),
        ("tuple", [1], {}), ("ArrayList", [], ""), ("Array", [], 1), ("long", 3, 3.5), ("integer", 3, "3"),
        ("String", "x", 1), ("char", "x", 1), ("Boolean", True, 1), ("bool", False, 0), ("string", "x", None),
    ],
)  # fmt: skip
def test_a_spelled_type_takes_the_values_that_it_means(tmp_path, spelled, value, wrong):
    function = CIRCLE | {
        "parameters": {"type": "dict", "properties": {"x": {"type": spelled}}, "required": ["x"]}
    }
    plant(tmp_path, "irrelevance", [question("irrelevance_0", [function])])
    schema = read_bfcl(tmp_path, "irrelevance").tasks[0]["tools"][0]["parameters"]
    checker = jsonschema.Draft202012Validator(schema)
    assert checker.is_valid({"x": value})
    assert not checker.is_valid({"x": wrong})


def test_values_listed_beside_an_array_are_those_of_its_items(tmp_path):
    listed = {"type": "array", "items": {"type": "string"}, "enum": ["a", "b"]}
    function = CIRCLE | {"parameters": {"type": "dict", "properties": {"x": listed}}}
    plant(tmp_path, "irrelevance", [question("irrelevance_0", [function])])
    schema = read_bfcl(tmp_path, "irrelevance").tasks[0]["tools"][0]["parameters"]
    checker = jsonschema.Draft202012Validator(schema)
    assert checker.is_valid({"x": ["a", "b"]})
    assert not checker.is_valid({"x": ["c"]})


@pytest.mark.parametrize("spelled", ["any", "Any", ""])
def test_a_schema_of_any_does_not_refuse_a_value(tmp_path, spelled):
    function = CIRCLE | {"parameters": {"type": "dict", "properties": {"x": {"type": spelled}}}}
    plant(tmp_path, "irrelevance", [question("irrelevance_0", [function])])
    schema = read_bfcl(tmp_path, "irrelevance").tasks[0]["tools"][0]["parameters"]
    for value in (1, "x", None, [], {}):
        jsonschema.validate({"x": value}, schema)


def test_required_beside_a_parameter_is_dropped(tmp_path):
    function = CIRCLE | {
        "parameters": {"type": "dict", "properties": {"x": {"type": "string", "required": True}}}
    }
    plant(tmp_path, "irrelevance", [question("irrelevance_0", [function])])
    assert read_bfcl(tmp_path, "irrelevance").tasks[0]["tools"][0]["parameters"]["properties"] == {
        "x": {"type": "string"}
    }


def test_no_function_is_right_for_irrelevance_and_any_for_relevance(tmp_path):
    plant(tmp_path, "live_irrelevance", [question("a"), question("b", [])])
    plant(tmp_path, "live_relevance", [question("a"), question("b", [CIRCLE])])
    imported = read_bfcl(tmp_path, "live_irrelevance")
    assert [task["target"] for task in imported.tasks] == [None]
    assert imported.refused == [("b", "it shows no function, so there is nothing to choose from")]
    assert [task["target"] for task in read_bfcl(tmp_path, "live_relevance").tasks] == [
        ["triangle.area", "circle"],
        "circle",
    ]


def test_a_name_that_no_tool_may_have_is_spelled_with_underscores_and_kept(tmp_path):
    odd, long = CIRCLE | {"name": "kreis fläche()"}, CIRCLE | {"name": "x" * 200}
    plant(tmp_path, "multiple", [question(functions=[AREA, odd, long])], [answer(name="kreis fläche()")])
    (task,) = read_bfcl(tmp_path, "multiple").tasks
    assert task["target"] == "kreis_fl_che__"
    assert task["metadata"]["bfcl"]["names"] == {"kreis_fl_che__": "kreis fläche()", "x" * 120: "x" * 200}


def test_a_function_given_twice_is_shown_once_if_alike_and_under_two_names_if_not(tmp_path):
    other = CIRCLE | {"description": "Another."}
    plant(tmp_path, "multiple", [question(functions=[CIRCLE, AREA, CIRCLE, other])], [answer(name="circle")])
    (task,) = read_bfcl(tmp_path, "multiple").tasks
    assert [(tool["name"], tool["description"]) for tool in task["tools"]] == [
        ("circle", "Area of a circle."), ("triangle.area", "Area of a triangle."), ("circle_2", "Another."),
    ]  # fmt: skip
    assert task["target"] == ["circle", "circle_2"]
    assert task["metadata"]["bfcl"]["names"] == {"circle_2": "circle"}


def test_questions_that_cannot_be_tasks_are_left_out_with_a_reason(tmp_path):
    questions = [
        question("ok"),
        question("turns", question=[*ASK, []]),
        question("elsewhere"),
    ]
    plant(
        tmp_path, "multiple", questions, [answer("ok"), answer("turns"), answer("elsewhere", name="square")]
    )
    imported = read_bfcl(tmp_path, "multiple")
    assert [task["id"] for task in imported.tasks] == ["ok"]
    assert dict(imported.refused) == {
        "turns": "it has more than one turn, and a tool_selection task has one",
        "elsewhere": 'its answer calls "square", which is not shown',
    }


BAD = {
    "no id": ({"question": ASK, "function": [CIRCLE]}, "id: missing"),
    "no question": (question("bad", question=[]), "question: is an empty list"),
    "no message": (question("bad", question=[[]]), "question[0]: is an empty list"),
    "role": (
        question("bad", question=[[{"role": "usr", "content": "x"}]]),
        'question[0][0].role: unknown role "usr"',
    ),
    "functions": (question("bad", function={}), "function: must be a list"),
    "name": (question("bad", functions=[AREA | {"name": 3}]), "function[0].name: must be a string"),
    "type": (
        question(
            "bad",
            functions=[CIRCLE | {"parameters": {"type": "dict", "properties": {"x": {"type": "flaot"}}}}],
        ),
        'function[0].parameters.properties.x.type: "flaot" is no type that BFCL uses: write "float"',
    ),
    "schema": (
        question("bad", functions=[CIRCLE | {"parameters": {"type": "dict", "properties": []}}]),
        "not valid JSON Schema",
    ),
    "no answer": (question("multiple_9"), '"multiple_9" has no answer in possible_answer'),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_refused_whole_with_the_place_of_every_mistake(tmp_path, name):
    bad, message = BAD[name]
    plant(tmp_path, "multiple", [question(), bad], [answer()])
    with pytest.raises(BadInput) as caught:
        read_bfcl(tmp_path, "multiple")
    (problem,) = caught.value.problems
    assert "BFCL_v4_multiple.json:2:" in problem
    assert message in problem


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "multiple_0", "ground_truth": []}, "ground_truth: is an empty list"),
        ({"id": "multiple_0", "ground_truth": [{"f": {}}, {"g": {}}]}, "ground_truth: has 2 calls"),
        ({"id": "multiple_0", "ground_truth": [{"f": {}, "g": {}}]}, "ground_truth[0]: names 2 functions"),
        ({"id": "multiple_0"}, "ground_truth: missing"),
    ],
)
def test_bad_answers_are_refused_with_their_place(tmp_path, line, message):
    plant(tmp_path, "multiple", [question()], [line])
    with pytest.raises(BadInput) as caught:
        read_bfcl(tmp_path, "multiple")
    assert "possible_answer/BFCL_v4_multiple.json:1:" in caught.value.problems[0]
    assert message in caught.value.problems[0]


def test_a_missing_file_says_what_to_give(tmp_path):
    with pytest.raises(BadInput, match="give the folder data of the package bfcl-eval"):
        read_bfcl(tmp_path, "multiple")
    plant(tmp_path, "multiple", [question()])
    with pytest.raises(BadInput, match=r"possible_answer.*cannot be read"):
        read_bfcl(tmp_path, "multiple")


def test_the_data_is_found_in_the_unpacked_package_and_two_versions_are_refused(tmp_path):
    data = tmp_path / "bfcl_eval" / "data"
    data.mkdir(parents=True)
    plant(data, "irrelevance", [question("irrelevance_0")])
    for folder in (tmp_path, tmp_path / "bfcl_eval", data):
        assert len(read_bfcl(folder, "irrelevance").tasks) == 1
    (data / "BFCL_v5_irrelevance.json").write_text("")
    with pytest.raises(UsageError, match="keep one version"):
        read_bfcl(data, "irrelevance")


@pytest.mark.parametrize(
    ("category", "message"),
    [
        ("parallel", "several calls"), ("live_parallel_multiple", "several calls"), ("multi_turn_base", "keep state"),
        ("memory", "keep state"), ("web_search", "the web"), ("format_sensitivity", "other categories"),
        ("multipel", "the nearest is multiple"), ("../multiple", "unknown"), ("", "unknown"),
    ],
)  # fmt: skip
def test_a_category_that_does_not_map_is_refused_with_those_that_do(tmp_path, category, message):
    with pytest.raises(UsageError, match=message) as caught:
        read_bfcl(tmp_path, category)
    assert all(name in str(caught.value) for name in CATEGORIES)


# --- the command line ---


def probe(*args: object, code: int = 0):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code == code, result.output
    return result


def test_the_command_writes_a_file_that_lint_accepts(tmp_path):
    plant(tmp_path, "irrelevance", [question("a"), question("b", [])])
    out = tmp_path / "new" / "tasks.jsonl"
    result = probe("tasks", "import", "bfcl", tmp_path, "--category", "irrelevance", "-o", out)
    assert result.stdout == f"{out}\n"
    assert "left out b: it shows no function" in result.stderr
    probe("tasks", "lint", out)
    document = json.loads(
        probe("tasks", "import", "bfcl", tmp_path, "--category", "irrelevance", "-o", out, "--json").stdout
    )
    assert (document["file"], document["tasks"], document["refused"][0]["id"]) == (str(out), 1, "b")


def test_nothing_is_written_where_the_data_is_bad(tmp_path):
    plant(tmp_path, "multiple", [question(), BAD["type"][0]], [answer()])
    out = tmp_path / "tasks.jsonl"
    probe("tasks", "import", "bfcl", tmp_path, "--category", "multiple", "-o", out, code=3)
    probe("tasks", "import", "bfcl", tmp_path, "--category", "parallel", "-o", out, code=2)
    assert not out.exists()


# --- the real data ---


@pytest.mark.skipif(not REAL.is_dir(), reason="BFCL_DATA is not the folder data of bfcl-eval")
@pytest.mark.parametrize("category", CATEGORIES)
def test_every_real_question_is_imported_or_shows_no_function(tmp_path, category):
    imported = read_bfcl(REAL, category)
    raw = [json.loads(line) for line in (REAL / f"BFCL_v4_{category}.json").read_text().splitlines()]
    assert len(imported.tasks) + len(imported.refused) == len(raw) == COUNTS[category]
    assert [task_id for task_id, _ in imported.refused] == [
        line["id"] for line in raw if not line["function"]
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(task) + "\n" for task in imported.tasks))
    read = read_tasks(path, None)
    lint(read)
    answers = REAL / "possible_answer" / f"BFCL_v4_{category}.json"
    called = {}
    if answers.exists():
        lines = map(json.loads, answers.read_text().splitlines())
        called = {line["id"]: list(line["ground_truth"][0]) for line in lines}
    by_id = {line["id"]: line for line in raw}
    for task in read.tasks:
        assert isinstance(task, ToolTask)
        line = by_id[task.id]
        assert [tool.name for tool in task.tools] == [function["name"] for function in line["function"]]
        assert [tool.description for tool in task.tools] == [
            function["description"] for function in line["function"]
        ]
        assert [message.content for message in task.messages] == [
            part["content"] for part in line["question"][0]
        ]
        if "irrelevance" in category:
            assert task.targets == ()
        elif category == "live_relevance":
            assert list(task.targets) == [tool.name for tool in task.tools]
        else:
            assert list(task.targets) == called[task.id]


@pytest.mark.skipif(not REAL.is_dir(), reason="BFCL_DATA is not the folder data of bfcl-eval")
@pytest.mark.parametrize("category", ["simple_python", "multiple", "live_simple", "live_multiple"])
def test_real_answers_fit_the_schemas_that_the_import_wrote(category):
    """Each argument's first accepted value is of the type that the import wrote, those that BFCL nests aside.

    A few are not: BFCL accepts "dontcare" for a number, and numbers or booleans for strings. Values outside
    an `enum` are left out, since in the data a default often is ("N/A").
    """
    odd, checked = [], 0
    for task in read_bfcl(REAL, category).tasks:
        ((name, accepted),) = task["metadata"]["bfcl"]["answer"].items()
        properties = next(tool for tool in task["tools"] if tool["name"] == name)["parameters"]["properties"]
        for argument, values in accepted.items():
            value = next((value for value in values if value != ""), None)
            nested = isinstance(value, dict) or (
                isinstance(value, list) and any(isinstance(x, dict) for x in value)
            )
            if value is None or nested or argument not in properties:
                continue
            checked += 1
            schema = {word: part for word, part in properties[argument].items() if word != "enum"}
            if not jsonschema.Draft202012Validator(schema).is_valid(value):
                odd.append(value)
    assert checked > 500
    assert len(odd) <= checked * 0.01
