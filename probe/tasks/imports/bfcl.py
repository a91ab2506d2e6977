"""Task lines from the data of the Berkeley Function Calling Leaderboard (package `bfcl-eval`, its folder `data`).

A line there is `{id, question: [[message, …]], function: [{name, description, parameters}, …]}`; the answers lie
in `possible_answer/`, a file of the same name, `{id, ground_truth: [{name: {argument: [accepted, …]}}]}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from probe.errors import BadInput, UsageError
from probe.jsontext import (
    JsonFile,
    Spot,
    check_fields,
    check_list,
    check_object,
    check_text,
    check_type,
    nearest,
    printable,
    quoted,
)
from probe.tasks.imports.definitions import TYPES, WORDS, shown_name, unique
from probe.tasks.imports.record import Format, Item, Ready, Skipped
from probe.tasks.messages import check_messages
from probe.tools.definitions import check_tool

_ANSWER, _ANY, _NONE = "the function that the answer calls", "any function shown", "no function"
CATEGORIES = {
    **dict.fromkeys(("simple_python", "simple_java", "simple_javascript", "multiple"), _ANSWER),
    **dict.fromkeys(("live_simple", "live_multiple"), _ANSWER),
    "live_relevance": _ANY,
    **dict.fromkeys(("irrelevance", "live_irrelevance"), _NONE),
}
"""Categories whose questions are one choice among the functions shown and none, and what their target is."""

_LANGUAGES = {"simple_java": "Java", "simple_javascript": "JavaScript"}

_SEVERAL = "asks for several calls at once, and a tool_selection task for one"
_STATE = "is a conversation with functions that keep state, which no tool_selection task can hold"
_REFUSED = {
    **dict.fromkeys(("parallel", "parallel_multiple", "live_parallel", "live_parallel_multiple"), _SEVERAL),
    **dict.fromkeys(
        (f"multi_turn_{what}" for what in ("base", "long_context", "miss_func", "miss_param")), _STATE
    ),
    "memory": _STATE,
    "web_search": "is answered from pages of the web, not by one call",
    "format_sensitivity": "lists ids of other categories and has no question of its own",
}

_UNTYPED = ("any", "Any", "")


class ImportResult(NamedTuple):
    """What a category gives."""

    tasks: list[dict[str, Any]]
    """Objects of task lines, in the order of the file."""
    refused: list[tuple[str, str]]
    """(id, why) of the questions that cannot be tasks."""


def read_bfcl(directory: Path, category: str) -> ImportResult:
    """The `tool_selection` tasks of a category; `metadata.bfcl` keeps the answer as BFCL gives it.

    Types become JSON Schema's, names that no tool may have get underscores, a function defined twice alike is
    shown once and one defined twice differently under two names, either of which is right. What was renamed
    stands in `metadata.bfcl.names`, the types of the answer's function in BFCL's words in `metadata.bfcl.types`.
    Arguments of Java and JavaScript functions are texts of source code.
    Raises UsageError for a category that is unknown or not of this kind, BadInput with every mistake of the data.
    """
    rule = _rule(category)
    path = _find(Path(directory), category)
    questions = JsonFile(path)
    answers, problems = _answers(path) if rule == _ANSWER else ({}, [])
    result = ImportResult([], [])
    first_lines: dict[str, int] = {}
    for line, value in questions.objects():
        spot = Spot([])
        _read_line(value, spot, category, rule, answers, result)
        name = value.get("id")
        if isinstance(name, str) and first_lines.setdefault(name, line) != line:
            spot["id"].fault(
                f"{quoted(name)} is the id of line {first_lines[name]} already", "keep one of the two"
            )
        questions.report(spot.faults)
    problems += questions.problems
    if not result.tasks and not problems:
        problems.append(
            f"{printable(str(path), 4096)}:1:1: file: has no question that can be a task: see --category"
        )
    if problems:
        raise BadInput(problems)
    return result


def _rule(category: str) -> str:
    can = f"can be imported: {', '.join(CATEGORIES)}"
    if category in _REFUSED:
        raise UsageError(f"--category {category}: {_REFUSED[category]}; {can}")
    if category not in CATEGORIES:
        near = nearest(category, (*CATEGORIES, *_REFUSED))
        raise UsageError(f"--category {printable(category)}: unknown: the nearest is {near}; {can}")
    return CATEGORIES[category]


def _find(directory: Path, category: str) -> Path:
    """The file of a category in the folder `data`, or in that of an unpacked or installed package."""
    pattern = f"BFCL_v*_{category}.json"
    version = re.compile(rf"BFCL_v[0-9]+_{category}\.json")
    for folder in (directory, directory / "data", directory / "bfcl_eval" / "data"):
        files = sorted(path for path in folder.glob(pattern) if version.fullmatch(path.name))
        if len(files) > 1:
            names = ", ".join(path.name for path in files)
            raise UsageError(f"{folder}: has {names}: keep one version in the folder")
        if files:
            return files[0]
    raise BadInput(
        [
            f"{printable(str(directory), 4096)}:1:1: file: there is no {pattern} in it: "
            "give the folder data of the package bfcl-eval (pip download --no-deps bfcl-eval, and unzip)"
        ]
    )


def _answers(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(answer by id, problems): the one call that BFCL accepts, `{name: {argument: [accepted, …]}}`."""
    file = JsonFile(path.parent / "possible_answer" / path.name)
    answers: dict[str, dict[str, Any]] = {}
    for _, value in file.objects():
        spot = Spot([])
        fields = check_fields(
            value, spot, {"id": check_text, "ground_truth": _check_calls}, ("id", "ground_truth")
        )
        if not spot.faults:
            answers[fields["id"]] = fields["ground_truth"]
        file.report(spot.faults)
    return answers, file.problems


def _check_calls(value: Any, spot: Spot) -> Any:
    calls = check_list(value, spot, check_object)
    if len(calls) > 1:
        spot.fault(f"has {len(calls)} calls", "give the one call that answers the question")
    elif calls and isinstance(calls[0], dict) and len(calls[0]) != 1:
        spot[0].fault(f"names {len(calls[0])} functions", "write {name: arguments}")
    return calls[0] if calls else None


# --- one question ---


def _read_line(
    value: dict[str, Any],
    spot: Spot,
    category: str,
    rule: str,
    answers: Mapping[str, dict[str, Any]],
    result: ImportResult,
) -> None:
    check_functions = partial(_check_functions, language=_LANGUAGES.get(category))
    known = {"id": check_text, "question": _check_question, "function": check_functions}
    fields = check_fields({name: value[name] for name in known if name in value}, spot, known, known)
    if spot.faults:
        return
    task_id, functions = fields["id"], fields["function"]
    if not functions:
        result.refused.append((task_id, "it shows no function, so there is nothing to choose from"))
        return
    if len(value["question"]) > 1:
        result.refused.append((task_id, "it has more than one turn, and a tool_selection task has one"))
        return
    kept: dict[str, Any] = {"category": category}
    right = list(functions)
    if rule == _ANSWER:
        answer = answers.get(task_id)
        if answer is None:
            spot["id"].fault(
                f"{quoted(task_id)} has no answer in possible_answer", "give the answers of this version"
            )
            return
        kept["answer"] = answer
        called = next(iter(answer))
        kept["types"] = next((_types(item) for item in value["function"] if item["name"] == called), {})
        right = [name for name, function in functions.items() if function["name"] == called]
        if not right:
            result.refused.append((task_id, f"its answer calls {quoted(called)}, which is not shown"))
            return
    if names := {name: function["name"] for name, function in functions.items() if function["name"] != name}:
        kept["names"] = names
    target = None if rule == _NONE else right if len(right) > 1 else right[0]
    result.tasks.append(
        {
            "id": task_id,
            "kind": "tool_selection",
            "messages": value["question"][0],
            "tools": [function | {"name": name} for name, function in functions.items()],
            "target": target,
            "metadata": {"bfcl": kept},
        }
    )


def _check_question(value: Any, spot: Spot) -> Any:
    if check_type(value, list, spot):
        # BFCL leaves a turn empty where a function is missing: such a question has more turns than one.
        for index, turn in enumerate(value if len(value) == 1 else ()):
            check_messages(turn, spot[index])
        if not value:
            spot.fault("is an empty list", "give at least one turn")
    return value


def _check_functions(value: Any, spot: Spot, language: str | None) -> dict[str, dict[str, Any]]:
    """Definitions by the name under which each is shown; each keeps its own name."""
    shown: dict[str, dict[str, Any]] = {}
    for index, function in enumerate(value if check_type(value, list, spot) else ()):
        place = spot[index]
        if not check_type(function, dict, place):
            continue
        given, text = function.get("name"), function.get("description")
        if not isinstance(given, str) or not given.strip():
            place["name"].fault("must be a string with a name in it", "write the function's name")
            continue
        parameters = _schema(function.get("parameters", {}), place["parameters"])
        if language and not place.faults:
            parameters = _as_source(parameters, _types(function), language)
        tool = {"name": given, "description": text or "", "parameters": parameters}
        if any(
            json.dumps(tool, sort_keys=True) == json.dumps(other, sort_keys=True) for other in shown.values()
        ):
            continue
        name = unique(shown_name(given), shown)
        check_tool(tool | {"name": name}, place)
        shown[name] = tool
    return shown


def _types(function: Mapping[str, Any]) -> dict[str, Any]:
    """Each argument's type in BFCL's word; of a list with a type for its items, [word, word of an item]."""
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    types: dict[str, Any] = {}
    for name, schema in (properties if isinstance(properties, dict) else {}).items():
        word = schema.get("type", "any") if isinstance(schema, dict) else "any"
        items = schema.get("items") if isinstance(schema, dict) else None
        inner = items.get("type") if isinstance(items, dict) else None
        types[name] = word if inner is None else [word, inner]
    return types


def _as_source(parameters: Any, types: Mapping[str, Any], language: str) -> Any:
    """Every argument as a text of source code, which is what BFCL asks for and compares in these languages."""
    if not isinstance(parameters, dict) or not isinstance(parameters.get("properties"), dict):
        return parameters
    properties = {}
    for name, schema in parameters["properties"].items():
        word, inner = types[name] if isinstance(types[name], list) else (types[name], None)
        hint = f"Source code of a {language} value of type {word}{f' of {inner}' if inner else ''}."
        if isinstance(schema, dict) and isinstance(schema.get("properties"), dict):
            hint += f" Its entries: {json.dumps(schema['properties'], ensure_ascii=False)}"
        kept = {key: schema[key] for key in ("default", "enum") if isinstance(schema, dict) and key in schema}
        description = schema.get("description") if isinstance(schema, dict) else None
        properties[name] = {
            "type": "string",
            "description": f"{description} {hint}" if description else hint,
        } | kept
    return parameters | {"properties": properties}


def _schema(value: Any, spot: Spot) -> Any:
    """A schema with JSON Schema's types, and without `required` where that is no list."""
    if not isinstance(value, dict):
        return value
    schema = dict(value)
    if "type" in value:
        kinds = value["type"] if isinstance(value["type"], list) else [value["type"]]
        words = [_type(kind, spot["type"]) for kind in kinds]
        if None in words:
            del schema["type"]  # a schema without a type takes anything
        else:
            schema["type"] = words if isinstance(value["type"], list) else words[0]
    # Beside a parameter, `required` says that this one is: its place is the list of the object around it.
    if not isinstance(value.get("required", []), list):
        del schema["required"]
    for word in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(value.get(word), dict):
            schema[word] = {name: _schema(part, spot[word][name]) for name, part in value[word].items()}
    for word in ("items", "additionalProperties", "not", "anyOf", "oneOf", "allOf", "prefixItems"):
        part = value.get(word)
        if isinstance(part, list):
            schema[word] = [_schema(item, spot[word][index]) for index, item in enumerate(part)]
        elif isinstance(part, dict):
            schema[word] = _schema(part, spot[word])
    items, options = schema.get("items"), schema.get("enum")
    # BFCL lists the values of an array's items beside the array, which no array could then be one of.
    lists_items = isinstance(options, list) and not any(isinstance(option, list) for option in options)
    if schema.get("type") == "array" and isinstance(items, dict) and lists_items:
        schema["items"] = {"enum": schema.pop("enum"), **items}
    return schema


def _type(value: Any, spot: Spot) -> str | None:
    """JSON Schema's word for a type; None: any type."""
    if value in _UNTYPED:
        return None
    if isinstance(value, str) and value in (*WORDS, *TYPES):
        return TYPES.get(value, value)
    near = nearest(value, (*WORDS, *TYPES)) if isinstance(value, str) else "string"
    spot.fault(f"{quoted(value)} is no type that BFCL uses", f"write {quoted(near)}")
    return None


def _read(paths: Sequence[Path], category: str | None) -> Iterator[Item]:
    if category is None:
        raise UsageError(f"--category is needed: {', '.join(CATEGORIES)}")
    for path in paths:
        result = read_bfcl(path, category)
        yield from (Ready(task["id"], task) for task in result.tasks)
        yield from (Skipped(task_id, reason) for task_id, reason in result.refused)


BFCL = Format(
    name="bfcl",
    about="a category of the Berkeley Function Calling Leaderboard: the unpacked package bfcl-eval or its folder data",
    read=_read,
    suffixes=(),
)
