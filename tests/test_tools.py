"""Tool definitions in three spellings, catalogues, and strict JSON."""

import contextlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import BadInput
from probe.jsontext import MAX_DEPTH, JsonFault, StrictJsonError, loads, nearest, printable
from probe.tools.calls import check_arguments
from probe.tools.definitions import Tool, parse_tool, read_catalogue

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool(name="get_weather", description="The weather now.", parameters=SCHEMA)
PLAIN = {"name": "get_weather", "description": "The weather now.", "parameters": SCHEMA}
OPENAI = {"type": "function", "function": {**PLAIN, "strict": True}}
MCP = {
    "name": "get_weather",
    "title": "Weather",
    "description": "The weather now.",
    "inputSchema": SCHEMA,
    "outputSchema": {"type": "object"},
    "annotations": {"readOnlyHint": True},
}


def problems_of(path: Path) -> list[str]:
    with pytest.raises(BadInput) as caught:
        read_catalogue(path)
    return [problem.removeprefix(f"{path}") for problem in caught.value.problems]


# --- one definition ---


@pytest.mark.parametrize("spelling", [PLAIN, OPENAI, MCP], ids=["plain", "openai", "mcp"])
def test_the_three_spellings_give_one_tool(spelling):
    assert parse_tool(spelling) == WEATHER


def test_a_description_and_parameters_may_be_missing_or_null():
    bare = Tool(name="now", description="", parameters={"type": "object", "properties": {}})
    assert (
        parse_tool({"name": "now"})
        == parse_tool({"name": "now", "description": None, "parameters": None})
        == bare
    )
    assert parse_tool({"type": "function", "function": {"name": "now"}}) == bare


@pytest.mark.parametrize("name", ["a", "maps.route", "Text2Sql", "ns::f", "a/b-c_d", "x" * 128])
def test_names_that_catalogues_use_are_accepted(name):
    assert parse_tool({"name": name}).name == name


@pytest.mark.parametrize("name", ["", " ", "a b", "a\n", "naïve", "x" * 129, 'a"', "<|im_end|>"])
def test_a_name_that_could_end_a_call_is_refused(name):
    with pytest.raises(ValueError, match=r"^name: .* cannot name a tool: use 1 to 128"):
        parse_tool({"name": name})


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ([], "line: must be an object, is a list: write an object"),
        ({}, 'name: missing: add "name"'),
        ({"name": 3}, "name: must be a string, is a number"),
        ({"name": "f", "description": ["x"]}, "description: must be a string, is a list"),
        ({"name": "f", "parameter": {}}, 'parameter: unknown field: the nearest known field is "parameters"'),
        ({"name": "f", "parameters": []}, "parameters: must be an object, is a list"),
        ({"name": "f", "parameters": {"type": "dict"}}, 'parameters.type: must be "object", is "dict"'),
        ({"name": "f", "parameters": {"type": ["object"]}}, 'parameters.type: must be "object"'),
        ({"name": "f", "parameters": {"required": "x"}}, "parameters.required: not valid JSON Schema"),
        ({"name": "f", "parameters": {"properties": {"x": {"type": "float"}}}}, 'x.type: "float" is not a JSON'),
        ({"name": "f", "parameters": {"properties": {"x": {"pattern": "("}}}}, "x.pattern: not valid JSON Schema"),
        ({"name": "f", "parameters": {"$ref": "https://a.b/c"}}, "parameters.$ref: refers outside this schema"),
        ({"name": "f", "parameters": SCHEMA, "inputSchema": SCHEMA}, "parameters: unknown field"),
        ({"name": "f", "inputSchema": None}, "inputSchema: must be an object, is null"),
        ({"inputSchema": {}}, "name: missing"),
        ({"type": "function"}, "function: missing"),
        ({"type": "function", "name": "f"}, 'type: a tool as the Responses API has it'),
        ({"functionDeclarations": [{"name": "f"}]}, "give each of its entries as a tool of its own"),
        ({"toolSpec": {"name": "f"}}, 'toolSpec: unknown field: take its "name"'),
        ({"name": "f", "input_schema": {}}, 'input_schema: unknown field: rename it to "parameters"'),
        ({"name": "f", "parameters": {"city": {"type": "string"}}}, 'parameters.city: a parameter where JSON Schema has its keywords: write {"type": "object"'),
        ({"name": "f", "parameters": {"type": "object", "city": {"type": "str, optional"}}}, "parameters.city: a parameter where"),
        ({"name": "f", "parameters": {"items": {"type": "string"}}}, "parameters.items: a parameter where"),
        ({"type": "tool", "function": {"name": "f"}}, 'type: must be "function", is "tool"'),
        ({"function": {"name": "f"}}, "type: missing"),
        ({"type": "function", "function": "f"}, "function: must be an object, is a string"),
        ({"type": "function", "function": {"name": "f", "strickt": 1}}, 'function.strickt: unknown field: the nearest known field is "strict"'),
    ],
)  # fmt: skip
def test_a_malformed_definition_says_which_field_what_is_wrong_and_what_to_do(definition, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_tool(definition)
    for line in str(caught.value).splitlines():
        assert line.count(": ") >= 2


@pytest.mark.parametrize(
    "parameters",
    [
        {"$schema": 3},
        {"$schema": ["x"]},
        {"$schema": "http://["},
        {"properties": {"x": {"pattern": "a{99999999999999999999}"}}},
        {"properties": {"x": {"pattern": "(" * 5000 + ")" * 5000}}},
        {"properties": {1: {"const": {1, 2}}}},
    ],
)
def test_a_schema_that_breaks_the_schema_checker_is_a_malformed_definition(parameters):
    with pytest.raises(ValueError, match=r"^parameters.*JSON Schema"):
        parse_tool({"name": "f", "parameters": parameters})


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        (r"^\p{L}+$", "é", "1"),
        (r"^(?<year>[0-9]{4})-\k<year>$", "2026-2026", "2026-2025"),
        (r"^\u{1F642}$", "🙂", "x"),
        (r"^[^]$", "\n", ""),
        (r"^\cA$", "\x01", "A"),
        (r"^\/[a-z]+$", "/a", "a"),
        (r"^(a+)+$", "aaa", "a" * 40 + "!"),
    ],
)
def test_patterns_are_read_as_json_schema_means_them(pattern, right, wrong):
    tool = parse_tool({"name": "f", "parameters": {"properties": {"x": {"pattern": pattern}}}})
    assert check_arguments(tool, {"x": right}) is None
    assert (check_arguments(tool, {"x": wrong}) or ("",))[0] == "invalid_argument"


def test_keywords_of_any_draft_and_notes_are_no_parameters():
    for extra in ({"definitions": {}}, {"x-note": {}}, {"example": {}}, {"if": {}}, {"dependencies": {}}):
        parameters = {"type": "object", "properties": {"x": {}}, **extra}
        assert parse_tool({"name": "f", "parameters": parameters}).parameters == parameters


def test_a_reference_inside_the_schema_is_accepted():
    parameters = {"$defs": {"n": {"type": "number"}}, "properties": {"x": {"$ref": "#/$defs/n"}, "$ref": {}}}
    assert parse_tool({"name": "f", "parameters": parameters}).parameters == parameters


def test_every_mistake_of_a_definition_is_reported():
    with pytest.raises(ValueError, match=r"name: .* cannot name a tool") as caught:
        parse_tool(
            {"name": "a b", "description": 1, "parameters": {"properties": {"x": 1, "y": {"type": "int"}}}}
        )
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [
        "name",
        "description",
        "parameters.properties.x",
        "parameters.properties.y.type",
    ]


keywords = ("$schema", "$ref", "$id", "$defs", "type", "properties", "required", "items", "enum", "pattern")
schema_words = (
    "object",
    "string",
    "dict",
    "#",
    "#/$defs/x",
    "http://json-schema.org/draft-04/schema#",
    "(",
    "[",
)
schemas = st.recursive(
    st.sampled_from(schema_words) | st.none() | st.integers(-1, 1) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(keywords), inner, max_size=4),
)


@settings(deadline=None)
@given(parameters=schemas, spelling=st.sampled_from(["parameters", "inputSchema"]))
def test_a_definition_gives_a_tool_or_a_value_error_whatever_its_schema(parameters, spelling):
    with contextlib.suppress(ValueError):
        assert isinstance(parse_tool({"name": "f", spelling: parameters}), Tool)


# --- catalogues ---


def test_a_catalogue_is_a_list_an_object_with_tools_or_lines(tmp_path):
    other = {"name": "other"}
    contents = {
        "list.json": json.dumps([PLAIN, other], indent=2),
        "object.json": json.dumps({"tools": [MCP, other], "nextCursor": None}),
        "answer.json": json.dumps({"jsonrpc": "2.0", "id": 1, "result": {"tools": [MCP, other]}}),
        "lines.jsonl": "\ufeff" + json.dumps(OPENAI) + "\r\n\r\n" + json.dumps(other),
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        actual = read_catalogue(tmp_path / name)
        assert actual == {"get_weather": WEATHER, "other": Tool(name="other")}
        assert list(actual) == ["get_weather", "other"]


def test_a_directory_is_read_in_the_order_of_its_file_names(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"name": "second"}')
    (tmp_path / "a.json").write_text('[{"name": "first"}]')
    (tmp_path / ".draft.json").write_text("not JSON")
    (tmp_path / "README.md").write_text("not JSON")
    (tmp_path / "deeper.json").mkdir()
    assert list(read_catalogue(tmp_path)) == ["first", "second"]


def test_a_mistake_in_a_document_is_placed_by_line_and_column(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(
        '{\r\n  "tools": [\r\n    {"name": "f"},\r\n    {"name": "ö", "names": 1}\r\n  ]\r\n}', newline=""
    )
    assert problems_of(path) == [
        ':4:14: tools[1].name: "ö" cannot name a tool: use 1 to 128 of the characters A-Z a-z 0-9 _ . : / -',
        ':4:19: tools[1].names: unknown field: the nearest known field is "name"',
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[\n{]", ":2:2: line: not JSON"),
        ('[\n\n{"name": "f"}', ":3:14: line: JSON cut short"),
        ('{"tool": []}', ':1:1: line: an object, not a catalogue: write a list of tools, or an object with a list "tools"'),
        ('{"tools": {"name": "f"}}', ":1:11: tools: an object, not a catalogue"),
        ("3", ":1:1: line: a number, not a catalogue"),
        ('["f"]', ":1:2: [0]: must be an object, is a string"),
        ('[{"name": "f"},\n {"name": "f"}]', ':2:11: [1].name: "f" is defined already, in tools.json: keep one'),
        ('[{"name": "f",\n "name": "g"}]', ":2:2: [0].name: key given twice"),
        ("[]", ":1:1: file: has no tool: add a definition"),
        ("", ":1:1: line: JSON cut short"),
    ],
)  # fmt: skip
def test_a_bad_document_is_reported_at_its_place(tmp_path, text, problem):
    path = tmp_path / "tools.json"
    path.write_text(text)
    (actual,) = problems_of(path)
    assert actual.startswith(problem)


def test_bad_lines_of_all_files_of_a_directory_are_reported_together(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"name": "f"}\n{"name": ""}\nx')
    (tmp_path / "b.jsonl").write_text('{"type": "function", "function": {"name": "f"}}\n{"name": "g"}')
    actual = problems_of(tmp_path)
    assert [problem.split(": ")[0] for problem in actual] == [
        "/a.jsonl:2:10",
        "/a.jsonl:3:1",
        "/b.jsonl:1:43",
    ]
    assert '"f" is defined already, in a.jsonl line 1' in actual[2]


def test_a_catalogue_that_cannot_be_read_says_so(tmp_path):
    assert problems_of(tmp_path) == [
        ":1:1: file: has no tool: add a .json or .jsonl file of definitions",
    ]
    assert "cannot be read (No such file" in problems_of(tmp_path / "no.json")[0]
    assert "cannot be read (No such file" in problems_of(tmp_path / "no")[0]
    (tmp_path / "tools.yaml").write_text("a: 1")
    assert "ends neither in .json nor in .jsonl" in problems_of(tmp_path / "tools.yaml")[0]
    (tmp_path / "latin.json").write_bytes(b"[\n\xe9]")
    assert problems_of(tmp_path / "latin.json")[0].startswith(":2:1: line: byte 0xe9 is not UTF-8")


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=80) | st.text(alphabet='[]{}",:\\ntrue1e9-.name u\u2028', max_size=60))
def test_no_bytes_make_a_catalogue_raise_anything_but_bad_input(tmp_path_factory, content):
    for suffix in (".json", ".jsonl"):
        path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with contextlib.suppress(BadInput):
            assert read_catalogue(path)


# --- strict JSON ---

plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | plain_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(plain_text, inner, max_size=4),
)  # fmt: skip


@given(value=json_values, ascii_only=st.booleans(), indent=st.none() | st.integers(0, 2))
def test_loads_agrees_with_the_standard_decoder_on_strict_json(value, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert loads(text) == json.loads(text) == value


@given(text=st.text(alphabet='[]{}",:\\u0dDtrue1e9-. \n', max_size=40))
def test_loads_accepts_nothing_that_the_standard_decoder_refuses(text):
    with contextlib.suppress(StrictJsonError):
        assert loads(text) == json.loads(text)


@given(text=st.text(alphabet='[]{}",:\\u0dDtrue1e9-. \n', max_size=40))
def test_every_fault_of_a_text_is_placed_inside_it(text):
    for fault in faults_of(text):
        assert fault.offset is not None
        assert 0 <= fault.offset <= len(text)


def faults_of(text: str) -> list[JsonFault]:
    try:
        loads(text)
    except StrictJsonError as error:
        return error.faults
    return []


def test_nesting_is_counted_in_levels_and_not_in_brackets():
    loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    loads("[" + "[]," * 1000 + "[]]")
    loads(json.dumps("[" * 1000))
    with pytest.raises(StrictJsonError, match="nested more than 64 levels"):
        loads("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


def test_a_surrogate_pair_is_a_character():
    assert loads('"\\ud83d\\ude42 \\\\ud83d"') == "🙂 \\ud83d"


def test_a_schema_of_the_deepest_nesting_is_checked():
    schema: dict = {"type": "object"}
    for _ in range(MAX_DEPTH // 2 - 2):
        schema = {"type": "object", "properties": {"a": schema}}
    assert parse_tool({"name": "f", "parameters": schema}).parameters == schema


def test_the_nearest_name_is_found_even_where_nothing_is_close():
    assert nearest("qestion", ("question", "answer")) == "question"
    assert nearest("zzz", ("question", "answer")) in ("question", "answer")
    assert nearest("a", ()) is None
    assert nearest("x" * 10**6, ("question",)) == "question"


@given(st.text())
def test_printable_text_is_short_and_inert(text):
    shown = printable(text)
    assert shown.isprintable()
    assert text == shown or not text.isprintable() or len(text) > 60
