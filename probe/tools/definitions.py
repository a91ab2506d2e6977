"""Tool definitions in three spellings, and catalogues of them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import regex

from probe.errors import BadInput
from probe.jsontext import (
    At,
    Check,
    JsonFault,
    JsonFile,
    Spot,
    check_fields,
    check_object,
    check_string,
    check_type,
    kind_of,
    nearest,
    printable,
    quoted,
)
from probe.tools.references import reference_faults

# --- one definition ---


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as a model sees it."""

    name: str
    """1 to 128 of the characters A-Z a-z 0-9 _ . : / -"""
    description: str = ""
    parameters: dict[str, Any] = msgspec.field(default_factory=lambda: {"type": "object", "properties": {}})
    """JSON Schema of the object of arguments."""

    def document(self) -> dict[str, Any]:
        """As a task file gives it."""
        return msgspec.to_builtins(self)


def parse_tool(obj: Any) -> Tool:
    """One tool from `{name, description, parameters}`, or as OpenAI or MCP spell it.

    Raises ValueError, one line `field: what is wrong: what to do` for every mistake.
    """
    faults: list[JsonFault] = []
    tool = check_tool(obj, Spot(faults))
    if tool is None:
        raise ValueError("\n".join(map(str, faults)))
    return tool


def check_tool(value: Any, spot: Spot) -> Tool | None:
    """The tool that an object defines in any of the three spellings; None beside at least one fault."""
    before = len(spot.faults)
    if not check_type(value, dict, spot):
        return None
    fields: dict[str, Any] = {}
    if "function" not in value and value.get("type") == "function" and "name" in value:
        what = 'a tool as the Responses API has it, without its level "function"'
        spot["type"].fault(what, 'take "type" and "strict" out', at_key=True)
    elif "function" in value or value.get("type") == "function":
        inner = check_fields(value, spot, _OPENAI, _OPENAI).get("function")
        fields = check_fields(inner, spot["function"], _FUNCTION, ["name"]) if isinstance(inner, dict) else {}
    elif "inputSchema" in value:
        fields = check_fields(value, spot, _MCP, ["name", "inputSchema"])
        fields["parameters"] = fields.get("inputSchema")
    else:
        fields = check_fields(value, spot, _PLAIN, ["name"], _ADVICE)
    if len(spot.faults) > before:
        return None
    return Tool(**{name: fields[name] for name in Tool.__struct_fields__ if name in fields})


def _check_name(value: Any, spot: Spot) -> Any:
    if check_type(value, str, spot) and not re.fullmatch(r"[A-Za-z0-9_.:/-]{1,128}", value):
        fix = "use 1 to 128 of the characters A-Z a-z 0-9 _ . : / -"
        spot.fault(f"{quoted(value)} cannot name a tool", fix)
    return value


def _check_openai_type(value: Any, spot: Spot) -> None:
    if value != "function":
        spot.fault(f'must be "function", is {quoted(value)}', 'write "function"')


def _check_schema(value: Any, spot: Spot) -> Any:
    if not check_type(value, dict, spot):
        return value
    if value.get("type", "object") != "object":
        fix = 'write "object": the arguments of a call are one object'
        spot["type"].fault(f'must be "object", is {quoted(value["type"])}', fix)
        return value
    if flat := _flat_field(value):
        fix = f'write {{"type": "object", "properties": {{{quoted(flat)}: …}}}}'
        spot[flat].fault("a parameter where JSON Schema has its keywords", fix, at_key=True)
        return value
    try:
        faults = _schema_faults(json.dumps(value))
    except Exception as error:  # the checker lets through what somebody else's schema makes it raise
        why = f"{type(error).__name__}: {printable(str(error), 120)}"
        why = "nested too deep" if isinstance(error, RecursionError) else why
        what = f"cannot be checked as JSON Schema ({why})"
        faults = (JsonFault((), what, "simplify it"),)
    spot.faults.extend(fault._replace(at=spot.at + fault.at) for fault in faults)
    return value


_MOST_OBJECTS = 10_000
"""Of a schema: more take seconds to check."""


@functools.lru_cache(maxsize=4096)
def _schema_faults(schema_json: str) -> tuple[JsonFault, ...]:
    """Why a JSON text is no JSON Schema that works offline. Cached: files repeat schemas."""
    from jsonschema import Draft202012Validator, validators  # 0.1 s to import: not without a tool to check

    schema = json.loads(schema_json)
    named = schema if isinstance(schema.get("$schema"), str) else {}
    draft = validators.validator_for(named, default=Draft202012Validator)
    if schema_json.count("{") > _MOST_OBJECTS:
        return (JsonFault((), f"has more than {_MOST_OBJECTS:,} objects", "simplify it"),)
    metaschema = draft(_flat(draft.META_SCHEMA), format_checker=draft.FORMAT_CHECKER)
    faults: dict[At, JsonFault] = {}
    # jsonschema's own order differs between processes.
    errors = sorted(metaschema.iter_errors(schema), key=lambda error: (error.json_path, error.message))
    for error in errors:
        at = tuple(error.absolute_path)
        if error.validator == "format" and at[-1:] == ("pattern",) and _is_pattern(str(error.instance)):
            continue
        faults.setdefault(at, _schema_fault(at, error.instance, error.message))
    for fault in () if faults else reference_faults(schema, draft):
        faults[fault.at] = fault
    return tuple(faults.values())


def _flat(metaschema: dict[str, Any]) -> dict[str, Any]:
    """A metaschema as one schema: the dynamic references between its vocabularies take seven times as long."""
    from jsonschema_specifications import REGISTRY

    vocabularies = [part.get("$ref", "") for part in metaschema.get("allOf", ())]
    if not vocabularies or not all(name.startswith("meta/") for name in vocabularies):
        return metaschema
    base = metaschema["$id"].rpartition("/")[0]
    parts = [metaschema, *(REGISTRY.contents(f"{base}/{name}") for name in vocabularies)]
    flat = {"type": metaschema["type"]}
    for word in ("properties", "$defs"):
        flat[word] = {name: value for part in parts for name, value in part.get(word, {}).items()}
    text = json.dumps(flat)
    for word in ("$dynamicRef", "$recursiveRef"):
        text = re.sub(rf'"\{word}": "#\w*"', '"$ref": "#"', text)
    return json.loads(text)


@functools.cache
def _keywords() -> frozenset[str]:
    """Keywords of all drafts, and those of OpenAPI whose values are objects."""
    from jsonschema import Draft4Validator, Draft7Validator, Draft202012Validator

    drafts = (Draft4Validator, Draft7Validator, Draft202012Validator)
    return frozenset(
        {"definitions", "$defs", "if", "then", "else", "example", "examples", "default", "title"}
    ).union(*(draft.VALIDATORS for draft in drafts)) | {
        "discriminator",
        "externalDocs",
        "xml",
        "const",
        "description",
        "metadata",
        "annotations",
    }


def _flat_field(schema: Mapping[str, Any]) -> str | None:
    """The first field of a schema that must be meant as a parameter: an object that is no value of a keyword."""
    known = _keywords() - ({"items", "contains"} if "properties" not in schema else set())
    for name, value in schema.items():
        other = isinstance(name, str) and name not in known and not name.startswith(("x-", "$"))
        if other and isinstance(value, dict):
            return name
    return None


def _is_pattern(text: str) -> bool:
    """Whether a text is a regular expression of a wider dialect than Python's, as JSON Schema's (ECMAScript) is."""
    try:
        compile_pattern(text)
    except (regex.error, OverflowError, RecursionError):
        return False
    return True


@functools.lru_cache(maxsize=4096)
def compile_pattern(text: str) -> regex.Pattern[str]:
    r"""A pattern of a schema, in Python's dialect or ECMAScript's: `\p{L}`, `\u{1F600}`, `\cA`, `[^]`, `(?<name>…)` and `\k<name>`.

    Raises regex.error.
    """
    text = re.sub(r"\\u\{([0-9A-Fa-f]{1,6})\}", lambda m: f"\\U{int(m[1], 16):08x}", text)
    text = re.sub(r"\\c([A-Za-z])", lambda m: f"\\x{ord(m[1]) % 32:02x}", text)
    text = re.sub(r"\\k<(\w+)>", r"(?P=\1)", text)
    return regex.compile(text.replace("[^]", r"[\s\S]").replace("[]", r"(?!)"))


def _schema_fault(at: At, value: object, message: str) -> JsonFault:
    if at[-1:] == ("type",) and isinstance(value, str):
        types = ("object", "string", "number", "integer", "boolean", "array", "null")
        fix = f"write {quoted(nearest(value, types))}"
        return JsonFault(at, f"{quoted(value)} is not a JSON Schema type", fix)
    return JsonFault(at, f"not valid JSON Schema ({printable(message, 120)})", "correct it or take it out")


def _accept(value: Any, spot: Spot) -> Any:
    return value


_PLAIN: dict[str, Check] = {"name": _check_name, "description": check_string, "parameters": _check_schema}
_ADVICE = {
    "input_schema": 'rename it to "parameters"',
    "arguments": 'rename it to "parameters"',
    "args": 'rename it to "parameters"',
    "strict": "take it out",
    "type": "take it out",
    "cache_control": "take it out",
    **dict.fromkeys(
        ("functionDeclarations", "function_declarations"), "give each of its entries as a tool of its own"
    ),
    "toolSpec": 'take its "name" and "description" out of it, and "inputSchema"\'s "json" as "parameters"',
}
"""What to do with fields of tools in other formats."""
_FUNCTION: dict[str, Check] = {**_PLAIN, "strict": _accept}
_OPENAI: dict[str, Check] = {"type": _check_openai_type, "function": check_object}
_MCP: dict[str, Check] = {
    **{"name": _check_name, "description": check_string, "inputSchema": _check_schema},
    # For people and hosts, never for a model: accepted and dropped.
    **dict.fromkeys(("title", "outputSchema", "annotations", "icons", "execution", "_meta"), _accept),
}


# --- catalogues ---


def read_catalogue(path: Path) -> dict[str, Tool]:
    """The tools by name of a `.json` file (a list, or an object with a list `tools`) or a `.jsonl` file.

    A directory stands for its files of both suffixes in the order of their names, hidden ones left out.
    Raises BadInput with every mistake of every file.
    """
    path = Path(path)
    problems: list[str] = []
    tools: dict[str, Tool] = {}
    origin: dict[str, str] = {}
    for file in catalogue_files(path) if path.is_dir() else [path]:
        source = JsonFile(file)
        for line, at, value in _definitions(source):
            spot = Spot([], at)
            tool = check_tool(value, spot)
            if tool and tool.name in origin:
                entry = spot["function"]["name"] if "function" in value else spot["name"]
                what = f"{quoted(tool.name)} is defined already, in {origin[tool.name]}"
                entry.fault(what, "keep one of the two")
            elif tool:
                tools[tool.name] = tool
                origin[tool.name] = printable(file.name) + (f" line {line}" if line else "")
            source.report(spot.faults)
        problems += source.problems
    if not tools and not problems:
        fix = "add a .json or .jsonl file of definitions" if path.is_dir() else "add a definition"
        problems.append(f"{printable(str(path), 4096)}:1:1: file: has no tool: {fix}")
    if problems:
        raise BadInput(problems)
    return tools


def catalogue_files(directory: Path) -> list[Path]:
    """The files of a directory that are read as tool catalogues, in order; none where it is no directory."""
    paths = directory.glob("[!.]*") if directory.is_dir() else []
    return sorted(path for path in paths if path.suffix in (".json", ".jsonl") and path.is_file())


def _definitions(source: JsonFile) -> Iterator[tuple[int | None, At, Any]]:
    """(line of a `.jsonl` file or None, path, value) of every tool definition in one file."""
    if source.path.suffix == ".jsonl":
        for line, value in source.objects():
            yield line, (), value
        return
    if source.path.suffix != ".json" and source.path.exists():
        source.add(1, 1, "file: name ends neither in .json nor in .jsonl: rename it, or give a directory")
        return
    at: At = ()
    value = source.document()
    if isinstance(value, dict) and "tools" not in value and isinstance(value.get("result"), dict):
        at, value = ("result",), value["result"]  # the answer of an MCP server to `tools/list`
    if isinstance(value, dict) and "tools" in value:
        at, value = (*at, "tools"), value["tools"]
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield None, (*at, index), item
    elif not source.problems:
        fix = 'write a list of tools, or an object with a list "tools"'
        source.report([JsonFault(at, f"{kind_of(value)}, not a catalogue", fix)])
