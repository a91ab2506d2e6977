"""Task files: every mistake is found at its place, every good line is understood, and nothing else is raised."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probe.errors import BadInput, UsageError
from probe.harness.plan import Options, read_inputs
from probe.tasks import (
    AgentTask,
    CotTask,
    Message,
    Pair,
    PromptingTask,
    ToolTask,
    Variant,
    find_catalogue,
    lint,
    read_tasks,
    select,
)
from probe.tools.definitions import Tool
from tests.clock import references, sized, within

AnyTask = PromptingTask | ToolTask | AgentTask | CotTask
CATALOGUE = {
    name: Tool(name=name, description=f"Finds {name}.") for name in ("search", "weather", "maps.route")
}

COT = {"id": "c", "kind": "cot", "question": "What is 2 + 2?"}
TOOL = {
    "id": "t",
    "kind": "tool_selection",
    "input": "Is it raining?",
    "tools": ["search", "weather"],
    "target": None,
}
AGENT = {**TOOL, "kind": "agent"}
PROMPTING = {"id": "p", "kind": "prompting", "input": "hot ->", "variants": []}


def write(folder: Path, *lines: object, name: str = "tasks.jsonl") -> Path:
    """A task file of the given lines: bytes and text as they are, anything else as JSON."""
    path = folder / name
    texts = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
    path.write_bytes(b"\n".join(text if isinstance(text, bytes) else text.encode() for text in texts) + b"\n")
    return path


def read(path: Path, catalogue: dict[str, Tool] | None = CATALOGUE) -> tuple[AnyTask, ...]:
    return read_tasks(path, catalogue).tasks


def problems_of(path: Path, catalogue: dict[str, Tool] | None = CATALOGUE) -> list[str]:
    with pytest.raises(BadInput) as caught:
        read_tasks(path, catalogue)
    return caught.value.problems


def marked(text: str) -> tuple[bytes, list[tuple[int, int]]]:
    """The bytes of `text` without its ▶ marks, and the (line, column) of the character after each mark."""
    places: list[tuple[int, int]] = []
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        while "▶" in line:
            places.append((number, line.index("▶") + 1))
            line = line.replace("▶", "", 1)
        lines.append(line)
    return "\n".join(lines).encode(), places


MALFORMED = {
    # what is wrong: the file with ▶ before each place to report, then the words of each report
    "truncated JSON": ('{"id": "c", "kind": ▶', ["line: JSON cut short", "complete"]),
    "an open string": ('{"id": ▶"c', ["cut short", "still open"]),
    "trailing garbage": ('{"id": "c"} ▶{"id": "d"}', ["more text", "one object on each line"]),
    "single quotes": ("{▶'id': 1}", ["not JSON", "double quotes"]),
    "a Python literal": ('{"id": "c", "metadata": ▶None}', ["not JSON", "true, false or null"]),
    "a missing comma": ('{"id": "c" ▶"kind": "cot"}', ["not JSON", "','"]),
    "no value": ('{"id": ▶}', ["not JSON", "give a value here"]),
    "a raw tab in a string": ('{"id": "a▶\tb"}', ["not JSON", "\\t"]),
    "a bad escape": ('{"id": "C:▶\\q"}', ["not JSON", "\\\\"]),
    "a JSON list": ("▶[1, 2]", ["a list, not an object", "one {…} a line"]),
    "a JSON number": ("▶12", ["a number, not an object"]),
    "a JSON null": ("▶null", ["null, not an object"]),
    "a key given twice": ('{"id": "c", "kind": "cot", "question": "Q", ▶"id": "d"}', ["id: key given twice", "keep one"]),
    "a deep key given twice": (
        '{"id": "c", "kind": "cot", "question": "Q", "metadata": {"a": [{"b": 1, ▶"b": 2}], "b": 3}}',
        ["metadata.a[0].b: key given twice"],
    ),
    "NaN": ('{"id": "c", "kind": "cot", "question": "Q", "answer": ▶NaN}', ["answer: NaN is not a finite number"]),
    "-Infinity": ('{"id": "c", "metadata": {"x": ▶-Infinity}}', ["metadata.x: -Infinity is not a finite number"]),
    "1e999": ('{"id": "c", "kind": "cot", "question": "Q", "answer": ▶1e999}', ["answer: 1e999 is not a finite"]),
    "a huge integer": ('{"id": "c", "metadata": {"x": [0, ▶9223372036854775808]}}', ["metadata.x[1]", "64-bit"]),
    "5,000 digits": ('{"id": "c", "metadata": {"x": ▶' + "9" * 5000 + "}}", ["metadata.x", "64-bit"]),
    "a lone surrogate": ('{"id": "c", "kind": "cot", "question": ▶"\\ud83d!"}', ["question: half of a surrogate pair"]),
    "a lone surrogate in a key": ('{"id": "c", ▶"\\uDC00": 1}', ["half of a surrogate pair", "whole character"]),
    "an escaped NUL": ('{"id": "c", "kind": "cot", "question": ▶"a\\u0000b"}', ["question: text has a NUL"]),
    "a raw NUL": ('{"id": "c▶\0"}', ["not JSON", "leave other controls out"]),
    "a second byte order mark": (json.dumps(COT) + '\n▶\ufeff{"id": "d"}', ["line: starts with", "take it away"]),
    "no id": ('▶{"kind": "cot", "question": "Q"}', ['id: missing: add "id"']),
    "an empty id": ('{"id": ▶" ", "kind": "cot", "question": "Q"}', ["id: is empty"]),
    "an id that is a number": ('{"id": ▶7, "kind": "cot", "question": "Q"}', ["id: must be a string, is a number"]),
    "an id that is null": ('{"id": ▶null, "kind": "cot", "question": "Q"}', ["id: must be a string, is null"]),
    "no kind": ('▶{"id": "c"}', ["kind: missing"]),
    "a kind that is a list": ('{"id": "c", "kind": ▶["cot"]}', ["kind: must be a string, is a list"]),
    "an unknown kind": ('{"id": "c", "kind": ▶"tool-selection"}', ["unknown kind", 'nearest kind is "tool_selection"']),
    "an unknown field": ('{"id": "c", "kind": "cot", ▶"qestion": "Q", "question": "Q"}', ["qestion: unknown field", '"question"']),
    "a field of another kind": ('{"id": "c", "kind": "cot", "question": "Q", ▶"tools": []}', ["tools: unknown field"]),
    "metadata that is a list": ('{"id": "c", "kind": "cot", "question": "Q", "metadata": ▶[]}', ["metadata: must be an object"]),
    "an empty question": ('{"id": "c", "kind": "cot", "question": ▶""}', ["question: is empty"]),
    "an unknown type of answer": ('{"id": "c", "kind": "cot", "question": "Q", "answer": 4, "answer_type": ▶"int"}', ["answer_type: unknown type"]),
    "an answer of another type": ('{"id": "c", "kind": "cot", "question": "Q", "answer": ▶"Ben", "answer_type": "date"}', ["answer: \"Ben\" cannot be read as the answer_type \"date\""]),
    "a type without an answer": ('{"id": "c", "kind": "cot", "question": "Q", ▶"answer_type": "date"}', ["answer_type: given without"]),
    "a boolean answer": ('{"id": "c", "kind": "cot", "question": "Q", "answer": ▶true}', ["answer: must be a string or a number"]),
    "no steps": ('{"id": "c", "kind": "cot", "question": "Q", "steps": ▶[]}', ["steps: is an empty list"]),
    "a step that is a number": (
        '{"id": "c", "kind": "cot", "question": "Q", "steps": ["One.", ▶2, ▶""]}',
        ["steps[1]: must be a string, is a number"],
        ["steps[2]: is empty"],
    ),
    "a duplicate id": (
        '{"id": "c", "kind": "cot", "question": "Q"}\n\n{"kind": "cot", "id": ▶"c", "question": "R"}',
        ["id:", '"c" is the id of line 1 already'],
    ),
    "an id used before on a bad line": (
        '{"id": "c", "kind": ▶"cott"}\n{"id": ▶"c", "kind": "cot", "question": "R"}',
        ['nearest kind is "cot"'],
        ["the id of line 1"],
    ),
    "no tools": ('▶{"id": "t", "kind": "tool_selection", "input": "Q", "target": null}', ["tools: missing"]),
    "an empty tool list": ('{"id": "t", "kind": "tool_selection", "input": "Q", "tools": ▶[], "target": null}', ["tools: is an empty list"]),
    "no target": ('▶{"id": "t", "kind": "tool_selection", "input": "Q", "tools": ["search"]}', ["target: missing"]),
    "a tool shown twice": (
        '{"id": "t", "kind": "tool_selection", "input": "Q", "tools": ["search", "weather", ▶"search"], "target": null}',
        ['tools[2]: "search" is shown twice (first as [0])'],
    ),
    "a tool shown by name and by definition": (
        '{"id": "t", "kind": "agent", "input": "Q", "tools": ["search", ▶{"name": "search"}]}',
        ['tools[1]: "search" is shown twice'],
    ),
    "an unknown tool": (
        '{"id": "t", "kind": "tool_selection", "input": "Q", "tools": ["search", ▶"wether"], "target": "wether"}',
        ['tool "wether" is not in the catalogue', 'nearest there is "weather"'],
    ),
    "a tool that is a number": (
        '{"id": "t", "kind": "tool_selection", "input": "Q", "tools": [▶3], "target": null}',
        ["tools[0]: must be a tool's name or definition, is a number"],
    ),
    "a malformed inline tool": (
        '{"id": "t", "kind": "agent", "input": "Q", "tools": [{"name": ▶"no spaces", ▶"parametres": {}, "description": ▶3}]}',
        ["tools[0].name", "cannot name a tool"],
        ["tools[0].parametres: unknown field", '"parameters"'],
        ["tools[0].description: must be a string"],
    ),
    "an inline tool with a wrong schema": (
        '{"id": "t", "kind": "agent", "input": "Q", "tools": '
        '[{"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": ▶"dict"}}}}]}',
        ["tools[0].parameters.properties.x.type", '"dict" is not a JSON Schema type'],
    ),
    "a target that is not shown": (
        '{"id": "t", "kind": "tool_selection", "input": "Q", "tools": ["search", "maps.route"], "target": ▶"route"}',
        ['target: tool "route" is not shown', 'nearest shown is "maps.route"', "null means no tool"],
    ),
    "one of the targets not shown": (
        '{"id": "t", "kind": "agent", "input": "Q", "tools": ["search"], "target": ["search", ▶"weather"]}',
        ["target[1]", "is not shown"],
    ),
    "an empty list of targets": (
        '{"id": "t", "kind": "tool_selection", "input": "Q", "tools": ["search"], "target": ▶[]}',
        ["target: is an empty list", "write null for no tool"],
    ),
    "a target that is false": (
        '{"id": "t", "kind": "tool_selection", "input": "Q", "tools": ["search"], "target": ▶false}',
        ["target: must be a tool's name", "is a boolean"],
    ),
    "neither messages nor input": (
        '▶{"id": "t", "kind": "tool_selection", "tools": ["search"], "target": null}',
        ['messages: missing: add "messages" or "input"'],
    ),
    "both messages and input": (
        '{"id": "t", "kind": "agent", ▶"input": "Q", "messages": [{"role": "user", "content": "Q"}], "tools": ["search"]}',
        ['input: given beside "messages"'],
    ),
    "no messages": ('{"id": "t", "kind": "agent", "messages": ▶[], "tools": ["search"]}', ["messages: is an empty list"]),
    "a bad message": (
        '{"id": "t", "kind": "agent", "tools": ["search"], "messages": '
        '[{"role": ▶"usr", "content": [▶"Q"]}, ▶{"role": "user"}, {"role": "user", "content": "Q", ▶"tool_calls": [{"function": {"name": "f"}}]}, ▶"Q"]}',
        ["messages[0].role", 'unknown role "usr"', "system, developer, user, assistant, tool"],
        ["messages[0].content[0]: must be an object, is a string"],
        ["messages[1].content: missing"],
        ['messages[2].tool_calls: stands in a message of the role "user"'],
        ["messages[3]: must be an object, is a string"],
    ),
    "turns below one": ('{"id": "t", "kind": "agent", "input": "Q", "tools": ["search"], "max_turns": ▶0}', ["max_turns: must be a whole number above 0, is 0"]),
    "turns that are a fraction": ('{"id": "t", "kind": "agent", "input": "Q", "tools": ["search"], "max_turns": ▶2.0}', ["max_turns", "is 2.0"]),
    "turns that are true": ('{"id": "t", "kind": "agent", "input": "Q", "tools": ["search"], "max_turns": ▶true}', ["max_turns", "is true"]),
    "no variants": ('▶{"id": "p", "kind": "prompting", "input": "Q"}', ["variants: missing"]),
    "an input that is an object": ('{"id": "p", "kind": "prompting", "input": ▶{}, "variants": []}', ["input: must be a string or a list of messages"]),
    "two variants of one name": (
        '{"id": "p", "kind": "prompting", "input": "Q", "variants": [{"name": "a"}, {"system": "S", "name": ▶"a"}]}',
        ['variants[1].name: "a" names two variants'],
    ),
    "a variant named like a path": (
        '{"id": "p", "kind": "prompting", "input": "Q", "variants": [{"name": ▶"a/b"}, {"name": ▶".."}]}',
        ["variants[0].name", '"a/b" cannot name a variant'],
        ["variants[1].name", '".." cannot name a variant'],
    ),
    "bad fields of a variant": (
        '{"id": "p", "kind": "prompting", "input": "Q", "variants": '
        '[▶{"suffix": ▶1}, {"name": "b", ▶"sufix": "x", "examples": [▶{"input": "a"}, {"input": ▶1, "output": "c"}]}]}',
        ["variants[0].name: missing"],
        ["variants[0].suffix: must be a string"],
        ["variants[1].sufix: unknown field", '"suffix"'],
        ["variants[1].examples[0].output: missing"],
        ["variants[1].examples[1].input: must be a string"],
    ),
    "a base that is not empty": (
        '{"id": "p", "kind": "prompting", "input": "Q", "variants": [▶{"name": "base", "prefix": "x"}]}',
        ['variants[0]: "base" is the reference'],
    ),
    "no choices": ('{"id": "p", "kind": "prompting", "input": "Q", "variants": [], "choices": ▶[]}', ["choices: is an empty list"]),
    "a choice given twice": (
        '{"id": "p", "kind": "prompting", "input": "Q", "variants": [], "choices": ["a", "b", ▶"a", ▶""]}',
        ['choices[2]: "a" is listed twice'],
        ["choices[3]: is empty"],
    ),
    "a target that is no choice": (
        '{"id": "p", "kind": "prompting", "input": "Q", "variants": [], "choices": ["cold", "warm"], "target": ▶"cool"}',
        ['target: "cool" is not one of the choices', 'nearest is "cold"'],
    ),
    "a target without choices": (
        '{"id": "p", "kind": "prompting", "input": "Q", "variants": [], "target": ▶"cold"}',
        ["target: there are no choices", 'add "choices"'],
    ),
    "columns count characters, not bytes": ('{"id": "äöü€🙂", "kind": ▶"cott"}', ["unknown kind"]),
    "keys that look like brackets": ('{"id": "]}[{\\"", "metadata": {"}": "{"}, "kind": ▶"x"}', ["unknown kind"]),
}  # fmt: skip


@pytest.mark.parametrize("what", MALFORMED)
def test_every_mistake_is_reported_at_its_place_with_what_to_do(tmp_path, what):
    text, *words = MALFORMED[what]
    content, places = marked(text)
    assert len(places) == len(words), "the table has one ▶ for each report"
    path = write(tmp_path, content)
    problems = problems_of(path)
    assert [problem[: problem.index(" ")] for problem in problems] == [
        f"{path}:{line}:{column}:" for line, column in places
    ]
    for problem, expected in zip(problems, words, strict=True):
        message = problem.removeprefix(str(path))
        for word in expected:
            assert word in message
        assert len([part for part in message.split(": ") if part.strip()]) >= 4, (
            "place: field: what: what to do"
        )


def test_a_trailing_comma_is_reported_where_the_value_is_missing_or_at_the_comma(tmp_path):
    (problem,) = problems_of(write(tmp_path, '{"id": "c",}'))
    assert problem.startswith((f"{tmp_path}/tasks.jsonl:1:11:", f"{tmp_path}/tasks.jsonl:1:12:"))
    assert "take the comma before it away" in problem


def test_invalid_utf8_is_reported_at_its_character(tmp_path):
    (problem,) = problems_of(write(tmp_path, COT, "{'ä': ".encode() + b"\xff}"))
    assert problem.startswith(f"{tmp_path}/tasks.jsonl:2:7: line: byte 0xff is not UTF-8")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_in_a_wide_encoding_gets_one_report(tmp_path, encoding):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes((json.dumps(COT) + "\n" + json.dumps(COT) + "\n").encode(encoding))
    (problem,) = problems_of(path)
    assert "UTF-16" in problem
    assert "save it as UTF-8" in problem


def test_deep_nesting_is_reported_without_a_recursion_error(tmp_path):
    deep = '{"id": "c", "metadata": {"x": ' + "[" * 100_000 + "]" * 100_000 + "}}"
    (problem,) = problems_of(write(tmp_path, deep))
    column = deep.index("[") + 64 - 2 + 1
    assert problem == f"{tmp_path}/tasks.jsonl:1:{column}: line: nested more than 64 levels deep: flatten it"


@pytest.mark.timing
def test_an_unclosed_string_full_of_brackets_and_escapes_takes_no_quadratic_time(tmp_path):
    path = write(tmp_path, '{"id": "' + '\\"[' * sized(1_000_000))
    assert within(1, references(lambda: problems_of(path)))  # 0.2


def test_a_line_that_is_too_long_is_reported_and_the_next_lines_are_read(tmp_path):
    path = write(tmp_path, COT, "x" * (33 * 2**20), {"id": "d", "kind": "cott"})
    assert [problem.split(": ")[0] for problem in problems_of(path)] == [f"{path}:2:1", f"{path}:3:21"]


def test_a_line_of_just_the_longest_length_is_read(tmp_path):
    line = json.dumps(COT)
    path = write(tmp_path, line + " " * (16 * 2**20 - len(line) - 2) + "\r")
    assert len(read(path)) == 1


@pytest.mark.parametrize("content", ["", "\n\r\n  \t\n", "\ufeff", "\ufeff\r\n"])
def test_a_file_without_a_task_is_reported(tmp_path, content):
    assert problems_of(write(tmp_path, content)) == [
        f"{tmp_path}/tasks.jsonl:1:1: file: has no task: write one JSON object a line"
    ]


def test_a_file_that_cannot_be_read_is_reported(tmp_path):
    write(tmp_path, COT)
    (missing,) = problems_of(tmp_path / "task.jsonl")
    assert "task.jsonl:1:1: file: cannot be read (No such file" in missing
    assert 'did you mean "tasks.jsonl"?' in missing
    (folder,) = problems_of(tmp_path)
    assert "Is a directory" in folder
    (nowhere,) = problems_of(tmp_path / "no" / "folder.jsonl")
    assert "give a file that exists" in nowhere


def test_every_bad_line_is_kept_and_twenty_are_shown(tmp_path):
    path = write(tmp_path, *[{"id": f"c{n}", "kind": "cott"} for n in range(30)], COT)
    with pytest.raises(BadInput) as caught:
        read_tasks(path, None)
    assert [int(problem.split(":")[1]) for problem in caught.value.problems] == list(range(1, 31))
    shown = str(caught.value).splitlines()
    assert len(shown) == 21
    assert shown[-1] == "… and 10 more"
    assert caught.value.exit_code == 3


def test_text_of_a_bad_file_cannot_steer_the_terminal(tmp_path):
    evil = "\x1b[2J\u202e\x9b\u2028\x7f"
    for line in ({"id": "c", "kind": evil}, {**COT, evil: 1}, {**TOOL, "tools": [evil], "target": evil}):
        path = write(tmp_path, line, name="a\x1b[31m.jsonl")
        for problem in problems_of(path):
            assert problem.isprintable()


def test_a_tool_without_a_catalogue_says_that_there_is_none(tmp_path):
    (first, second) = problems_of(write(tmp_path, TOOL), catalogue=None)
    assert "needs a catalogue, and there is none: give one with --tools" in first
    assert "tools[1]" in second


def test_a_good_file_keeps_its_path_hash_and_objects(tmp_path):
    path = write(tmp_path, COT, TOOL)
    file = read_tasks(path, CATALOGUE)
    assert file.path == str(path)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [task.raw for task in file.tasks] == [COT, TOOL]
    assert [task.kind for task in file.tasks] == ["cot", "tool_selection"]


def test_blank_lines_one_byte_order_mark_and_crlf_are_accepted_and_lines_keep_their_numbers(tmp_path):
    first, second = json.dumps(COT).encode(), json.dumps({**COT, "id": "d"}).encode()
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + first + b"\r\n\r\n \t\n" + second)
    assert [(task.id, task.line) for task in read(path)] == [("c", 1), ("d", 4)]
    path.write_bytes(b"\xef\xbb\xbf" + first + b"\r\n\r\n" + second.replace(b"cot", b"cog"))
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:3:{second.index(b'cot')}:")


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x1c\x1d", "\v\f"])
def test_a_unicode_line_separator_in_a_string_does_not_split_a_line(tmp_path, character):
    raw = character if ord(character[0]) > 0x1F else json.dumps(character)[1:-1]
    path = write(tmp_path, json.dumps(COT).replace("2 + 2", f"2{raw}2"), {**COT, "id": "d"})
    first, second = read(path)
    assert isinstance(first, CotTask)
    assert first.question == f"What is 2{character}2?"
    assert second.line == 2


def test_a_prompting_task_puts_an_empty_base_variant_first(tmp_path):
    variant = {
        "name": "few",
        "system": "S",
        "examples": [{"input": "a", "output": "b"}],
        "prefix": "P",
        "suffix": "X",
    }
    (task,) = read(
        write(tmp_path, {**PROMPTING, "variants": [variant], "choices": ["a", "b"], "target": "b"})
    )
    assert isinstance(task, PromptingTask)
    few = Variant(name="few", system="S", examples=(Pair("a", "b"),), prefix="P", suffix="X")
    assert task.variants == (Variant(name="base"), few)
    assert (task.choices, task.target, task.metadata) == (("a", "b"), "b", None)


def test_a_base_variant_that_is_given_stays_where_it_is(tmp_path):
    (task,) = read(
        write(tmp_path, {**PROMPTING, "variants": [{"name": "a"}, {"name": "base", "prefix": ""}]})
    )
    assert isinstance(task, PromptingTask)
    assert [variant.name for variant in task.variants] == ["a", "base"]


def test_a_prompting_task_may_be_a_chat(tmp_path):
    (task,) = read(write(tmp_path, {**PROMPTING, "input": [{"role": "user", "content": ""}]}))
    assert isinstance(task, PromptingTask)
    assert task.input == (Message("user", ""),)


def test_a_tool_task_shows_its_tools_in_the_order_of_the_file(tmp_path):
    inline = {"type": "function", "function": {"name": "mine", "description": "D", "strict": True}}
    (task,) = read(
        write(tmp_path, {**TOOL, "tools": ["weather", inline, "search"], "target": ["mine", "search"]})
    )
    assert isinstance(task, ToolTask)
    assert task.tools == (CATALOGUE["weather"], Tool(name="mine", description="D"), CATALOGUE["search"])
    assert task.target == task.targets == ("mine", "search")
    assert task.messages == (Message("user", "Is it raining?"),)


@pytest.mark.parametrize(
    ("target", "targets"), [(None, ()), ("search", ("search",)), (["search"], ("search",))]
)
def test_targets_are_a_tuple_whatever_the_spelling(tmp_path, target, targets):
    (task,) = read(write(tmp_path, {**TOOL, "target": target}))
    assert isinstance(task, ToolTask)
    assert task.targets == targets


def test_an_agent_task_may_have_no_target_which_is_not_the_target_null(tmp_path):
    without = {name: value for name, value in AGENT.items() if name != "target"}
    tasks = read(
        write(tmp_path, {**without, "answer": 4, "max_turns": 3}, {**AGENT, "id": "u", "target": None})
    )
    first, second = tasks
    assert isinstance(first, AgentTask)
    assert isinstance(second, AgentTask)
    assert (first.has_target, second.has_target, first.target, second.target) == (False, True, None, None)
    assert (first.answer, first.max_turns, second.answer, second.max_turns) == (4, 3, None, 8)


def test_null_in_an_optional_field_is_absence(tmp_path):
    (task,) = read(write(tmp_path, {**COT, "answer": None, "steps": None, "metadata": None}))
    assert isinstance(task, CotTask)
    assert (task.answer, task.steps, task.metadata) == (None, None, None)


def test_tasks_survive_a_round_trip_through_their_tagged_union(tmp_path):
    tasks = read(write(tmp_path, COT, TOOL, {**AGENT, "id": "a"}, PROMPTING))
    assert msgspec.json.decode(msgspec.json.encode(tasks), type=tuple[AnyTask, ...]) == tasks


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
good_lines = st.sampled_from(
    [COT, TOOL, AGENT, PROMPTING, {**TOOL, "tools": [{"name": "f", "parameters": {}}]}]
)


@st.composite
def nearly_good_lines(draw: st.DrawFn) -> bytes:
    """A good line with a field replaced, removed or added, then a few bytes changed."""
    line: dict = dict(draw(good_lines))
    fields = [
        "id",
        "input",
        "tools",
        "target",
        "variants",
        "messages",
        "steps",
        "choices",
        "max_turns",
        "answer",
    ]
    line[draw(st.sampled_from(fields) | st.text(max_size=3))] = draw(json_values)
    raw = bytearray(json.dumps(line, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))
    for position in draw(st.lists(st.integers(0, len(raw) - 1), max_size=3)):
        raw[position] = draw(st.integers(0, 255))
    return bytes(raw)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.lists(nearly_good_lines(), max_size=3).map(b"\n".join))
def test_no_bytes_make_reading_raise_anything_but_bad_input(tmp_path, content):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(content)
    for problem in problems_or_none(path):
        place, _, message = problem.removeprefix(f"{path}:").partition(": ")
        line, column = map(int, place.split(":"))
        lines = content.split(b"\n")
        assert 1 <= line <= len(lines)
        assert 1 <= column <= len(lines[line - 1]) + 1
        assert message.count(": ") >= 2
        assert problem.isprintable()


def problems_or_none(path: Path) -> list[str]:
    """What reading finds wrong; nothing for a file whose tasks can be read, which lint then reads too."""
    try:
        lint(read_tasks(path, CATALOGUE))
    except BadInput as error:
        return error.problems or ["refused without a reason"]
    return []


def test_reading_tasks_imports_neither_torch_nor_the_schema_checker(tmp_path):
    path = write(tmp_path, COT)
    code = f"""
import sys
from pathlib import Path
from probe.tasks import read_tasks
assert len(read_tasks(Path({str(path)!r}), None).tasks) == 1
assert not {{"torch", "transformers", "jsonschema", "pandas"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.timing
def test_100_000_lines_are_checked_in_seconds(tmp_path):
    path = write(tmp_path, *[{**TOOL, "id": f"t{n}"} for n in range(sized(100_000))])
    files = []
    assert within(15, references(lambda: files.append(read(path))))  # 7.7
    assert len(files[0]) == sized(100_000)


# --- selection ---


def numbered(count: int) -> tuple[CotTask, ...]:
    return tuple(CotTask(id=f"task-{n}", question="Q", line=n) for n in range(1, count + 1))


@pytest.mark.parametrize(
    ("limit", "ids", "lines"),
    [
        (None, [], [1, 2, 3, 4, 5]),
        ("2", [], [1, 2]),
        ("99", [], [1, 2, 3, 4, 5]),
        ("2-3", [], [2, 3]),
        ("5-9", [], [5]),
        ("4-4", [], [4]),
        (None, ["task-4", "task-2", "task-4"], [2, 4]),
        ("1", ["task-4", "task-2"], [2]),
    ],
)
def test_a_limit_and_ids_select_tasks_in_file_order(limit, ids, lines):
    assert [task.line for task in select(numbered(5), limit, ids)] == lines


@pytest.mark.parametrize("limit", ["0", "-1", "3-2", "0-2", "a", "", "1-", "1.5", "1-2-3", "٣", "9" * 30])
def test_a_limit_that_is_no_number_or_range_is_refused(limit):
    with pytest.raises(UsageError, match=r"--limit: .* is no number or range"):
        select(numbered(5), limit, [])


def test_a_limit_past_the_last_task_says_how_many_there_are():
    with pytest.raises(UsageError, match="starts after the last task: there are 5"):
        select(numbered(5), "6-7", [])


def test_an_unknown_id_names_the_nearest_one():
    with pytest.raises(UsageError, match='no task "tsk-3": the nearest id is "task-3"'):
        select(numbered(5), None, ["task-1", "tsk-3"])


# --- the default catalogue ---


def test_the_default_catalogue_is_beside_the_task_folder_then_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "work" / "tools").mkdir(parents=True)
    (tmp_path / "data" / "tasks").mkdir(parents=True)
    (tmp_path / "data" / "tools").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    file = Path("../data/tasks/a.jsonl")
    assert find_catalogue(file, None) is None, "a folder without a definition is no catalogue"
    (tmp_path / "work" / "tools" / "t.json").touch()
    assert find_catalogue(file, None) == Path("tools")
    (tmp_path / "data" / "tools" / "t.jsonl").touch()
    assert find_catalogue(file, None) == Path("../data/tools")
    assert find_catalogue(file, Path("other.json")) == Path("other.json")
    monkeypatch.chdir(tmp_path / "data" / "tasks")
    assert find_catalogue(Path("a.jsonl"), None) == Path("../tools")


# --- warnings ---


def warnings_for(folder: Path, *lines: object) -> list[str]:
    return lint(read_tasks(write(folder, *lines), CATALOGUE))


def test_a_file_with_nothing_to_warn_of_gets_no_warning(tmp_path):
    cot = {**COT, "answer": 1000.0, "steps": ["500 + 500.", "So it is 1,000."]}
    tool = {**TOOL, "target": "weather"}
    assert warnings_for(tmp_path, cot, tool, {**TOOL, "id": "u", "input": "Hello."}) == []


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([COT, {**COT, "id": "d", "question": "what is  2+2"}], ':2: d: nearly the same text as "c" (line 1)'),
        ([{**COT, "answer": 4, "steps": ["4 or 5?", "It is 14, or 4.5."]}], ':1: c: the answer 4 is not in the last step'),
        ([{**PROMPTING, "choices": ["car", "cargo"]}], ':1: p: choice "car" begins "cargo"'),
        ([{**TOOL, "input": "Use search now.", "target": "search"}, TOOL | {"id": "u"}], "target's name \"search\""),
        ([{**TOOL, "tools": [{"name": "f"}]}], 'tool "f" has no description'),
        ([{**TOOL, "target": "search"}], "every tool_selection task has a target tool"),
        (
            [{**TOOL, "id": f"t{n}", "input": f"Q{n}?", "target": "weather"} for n in range(3)],
            "the target is always shown as number 2 (3 tasks)",
        ),
        (
            [
                {**TOOL, "id": f"t{n}", "input": f"Q{n}?", "tools": [*CATALOGUE], "target": t}
                for n, t in enumerate(["search"] * 7 + ["weather", "maps.route"])
            ],
            '7 of 9 tool_selection targets are "search"',
        ),
    ],
)  # fmt: skip
def test_what_may_spoil_a_result_is_warned_of(tmp_path, lines, expected):
    warnings = warnings_for(tmp_path, *lines)
    assert any(expected in warning for warning in warnings), warnings
    assert all(warning.startswith(f"{tmp_path}/tasks.jsonl:") for warning in warnings)


def test_targets_shown_at_two_places_are_not_warned_of(tmp_path):
    lines = [{**TOOL, "id": f"t{n}", "input": f"Q{n}?", "target": "weather"} for n in range(3)]
    lines[2]["tools"] = ["weather", "search"]
    assert not any("always shown" in warning for warning in warnings_for(tmp_path, *lines))


def test_the_same_request_with_its_tools_in_another_order_is_no_repetition(tmp_path):
    turned = {**TOOL, "id": "u", "tools": ["weather", "search"]}
    assert warnings_for(tmp_path, TOOL, turned) == []


def test_mistakes_of_a_task_file_are_seen_beside_a_default_catalogue_of_other_files(tmp_path):
    """`../tools` is taken without being asked for: it may hold anything."""
    for folder in ("tools", "mine"):
        (tmp_path / folder).mkdir()
    line = {"id": "t", "kind": "tool_selection", "input": "x", "tools": ["nowhere"], "target": "nowhere"}
    (tmp_path / "tools" / "others.jsonl").write_text(
        "".join(json.dumps(line | {"n": n}) + "\n" for n in range(30))
    )
    (tmp_path / "mine" / "tasks.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(BadInput) as caught:
        read_inputs(tmp_path / "mine" / "tasks.jsonl", Options())
    *others, more, mistake = caught.value.problems
    assert len(others) == 3 and "more mistakes" in more
    assert "tasks.jsonl:1" in mistake and "nowhere" in mistake
