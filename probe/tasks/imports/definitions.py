"""Definitions of tools as logs and data sets spell them, in the one spelling `{name, description, parameters}`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from probe.jsontext import MAX_DEPTH, JsonFault, Spot, kind_of, printable, quoted
from probe.tasks.imports.files import parsed
from probe.tools.definitions import check_tool

WORDS = ("string", "integer", "number", "boolean", "array", "object", "null")
TYPES = {
    **dict.fromkeys(("String", "str", "char"), "string"),
    **dict.fromkeys(("byte", "short", "int", "long", "Integer", "Long", "Bigint", "BigInt"), "integer"),
    **dict.fromkeys(("float", "double", "Float", "Double", "Number"), "number"),
    **dict.fromkeys(("bool", "Boolean"), "boolean"),
    **dict.fromkeys(("list", "tuple", "Array", "ArrayList", "Set", "Queue", "Stack"), "array"),
    **dict.fromkeys(("dict", "HashMap", "Hashtable", "Object"), "object"),
}
"""JSON Schema's word for a type as Python, Java and JavaScript call it."""
_ALSO = {
    **dict.fromkeys(("List", "set", "Tuple", "frozenset", "sequence", "iterable"), "array"),
    **dict.fromkeys(("Dict", "mapping", "json", "map"), "object"),
    **dict.fromkeys(("text", "date", "datetime", "enum"), "string"),
    **dict.fromkeys(("none", "None", "NoneType"), "null"),
}
_SCHEMA_WORDS = {"type", "properties", "required", "$schema", "$defs", "definitions", "additionalProperties"}
"""By one of these an object is a schema and no list of parameters."""


@dataclass
class Shown:
    """The tools of a decision."""

    tools: list[dict[str, Any]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    """Logged name → shown name, of all tools."""
    left_out: list[str] = field(default_factory=list)
    """Tools of the server's own, whose definition no log has."""


def shown_tools(given: Any) -> Shown:
    """The tools of a request. Raises ValueError with why a definition cannot be shown."""
    given = parsed(given)
    if isinstance(given, dict):  # one tool, or tools by name as τ²-bench has them
        given = [given] if "name" in given or "function" in given else list(given.values())
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"has {kind_of(given)} where its tools should be")
    shown = Shown()
    for value in given:
        value = parsed(value)
        if isinstance(value, dict) and _is_of_server(value):
            shown.left_out.append(printable(str(value.get("name") or value.get("type")), 128))
            continue
        add_tool(shown, definition(value))
    return shown


def _is_of_server(value: Mapping[str, Any]) -> bool:
    """Whether a tool is run by the server and defined nowhere: OpenAI's and Anthropic's own."""
    kind = value.get("type")
    inside = ("function", "parameters", "input_schema", "inputSchema", "custom")
    return (
        isinstance(kind, str)
        and kind not in ("function", "custom", "object")
        and not set(inside) & set(value)
    )


def add_tool(shown: Shown, tool: dict[str, Any]) -> None:
    """Show one more tool; one that is there already, and alike, is shown once. Raises ValueError."""
    name = tool["name"]
    if name in shown.names:
        if any(other == {**tool, "name": shown.names[name]} for other in shown.tools):
            return
        raise ValueError(f"defines the tool {quoted(name)} twice, and not alike")
    free = unique(shown_name(name), {other["name"] for other in shown.tools})
    tool = {**tool, "name": free}
    faults: list[JsonFault] = []
    if check_tool(tool, Spot(faults)) is None:
        raise ValueError(f"the tool {quoted(name)} cannot be shown: {faults[0]}")
    shown.tools.append(tool)
    shown.names[name] = free


def shown_name(name: str) -> str:
    """A tool's name with underscores for what no name may have."""
    return re.sub(r"[^A-Za-z0-9_.:/-]", "_", name)[:120] or "_"


def unique(name: str, taken: Mapping[str, Any] | set[str]) -> str:
    """The name, with a number behind it where it is taken."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def definition(value: Any) -> dict[str, Any]:
    """One tool as OpenAI (both of its interfaces), Anthropic, MCP, Inspect, τ²-bench or a data set spells it.

    Raises ValueError for what is no tool.
    """
    if not isinstance(value, dict):
        raise ValueError(f"has {kind_of(value)} among its tools")
    inner = next((value[key] for key in ("function", "custom") if isinstance(value.get(key), dict)), value)
    name = inner.get("name", inner.get("tool_name"))
    if not isinstance(name, str) or not name.strip():
        raise ValueError("has a tool without a name")
    if value.get("type") == "custom":
        schema: Any = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    else:
        keys = ("parameters", "input_schema", "inputSchema", "params", "arguments")
        schema = next((parsed(inner[key]) for key in keys if inner.get(key) is not None), None)
    text = next((inner[key] for key in ("description", "doc") if isinstance(inner.get(key), str)), "")
    required = inner.get("required")
    if (
        isinstance(schema, dict)
        and isinstance(required, list)
        and "properties" in schema
        and "required" not in schema
    ):
        schema = {**schema, "required": required}  # ToolACE has the list beside the parameters
    return {"name": name, "description": text, "parameters": parameters(schema, name)}


def parameters(schema: Any, name: str) -> dict[str, Any]:
    """The schema of a tool's arguments: empty where there are none, with `properties` where these stand alone."""
    if schema is None or schema == {} or schema == []:
        return {"type": "object", "properties": {}}
    if not isinstance(schema, dict):
        raise ValueError(f"the tool {quoted(name)} has {kind_of(schema)} as its parameters")
    fields: dict[str, Any] = schema
    flat = not _SCHEMA_WORDS & set(schema) or (
        isinstance(schema.get("type"), dict) and "properties" not in schema
    )
    if not flat:
        return {"type": "object", **_schema(schema)}
    properties, required = {}, []
    for key, part in fields.items():
        if not isinstance(part, dict):
            part = {"type": part} if isinstance(part, str) else {}
        words = str(part.get("type", ""))
        if not re.search(r"\boptional\b", words, re.I) and "default" not in part:
            required.append(key)
        properties[key] = _schema(part)
    return {"type": "object", "properties": properties} | ({"required": required} if required else {})


def _schema(value: Any, depth: int = 0) -> Any:
    """A schema with JSON Schema's words for types, without `null` members and a `required` that is no list."""
    if depth > MAX_DEPTH:
        raise ValueError("is nested too deep")
    if not isinstance(value, dict):
        return value
    schema = {key: part for key, part in value.items() if part is not None or key in ("default", "const")}
    kind = schema.get("type")
    if isinstance(kind, str):
        del schema["type"]
        schema = typed(kind) | schema
    elif isinstance(kind, list):
        words = [typed(str(word)).get("type") for word in kind]
        schema["type"] = words
        if None in words or not words:
            del schema["type"]
    if not isinstance(schema.get("required", []), list):
        del schema["required"]
    for word in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(inner := schema.get(word), dict):
            # A table's column of schemas has every property of any row: null where it is another row's.
            schema[word] = {
                name: _schema(part, depth + 1) for name, part in inner.items() if part is not None
            }
    for word in ("items", "additionalProperties", "not", "anyOf", "oneOf", "allOf", "prefixItems"):
        part = schema.get(word)
        if isinstance(part, list):
            schema[word] = [_schema(item, depth + 1) for item in part]
        elif isinstance(part, dict):
            schema[word] = _schema(part, depth + 1)
    if isinstance(items := schema.get("items"), str):
        schema["items"] = typed(items)
    if "enum" in schema and not isinstance(schema["enum"], list):
        del schema["enum"]
    return schema


def typed(words: str) -> dict[str, Any]:
    """A type in the words of a data set as a schema: `str, optional`, `List[int]`, `Union[int, str]`, `int | None`.

    Words that are no type are no restriction: the empty schema.
    """
    text = re.sub(r",?\s*\b(?:optional|required)\b|,\s*default.*", "", words, flags=re.I).strip()
    if inner := re.fullmatch(r"Optional\[(.*)\]", words.strip()):
        text = inner[1].strip()
    word = TYPES.get(text, _ALSO.get(text, text))
    if word in WORDS:
        return {"type": word}
    if inner := re.fullmatch(r"(?:List|list|Set|set|Sequence|Iterable|Tuple|tuple)\[(.*)\]", text):
        item = typed(inner[1]) if "," not in re.sub(r"\[.*\]", "", inner[1]) else {}
        return {"type": "array"} | ({"items": item} if item else {})
    if re.fullmatch(r"(?:Dict|dict|Mapping)\[.*\]", text):
        return {"type": "object"}
    if inner := re.fullmatch(r"Union\[([^\[\]]*)\]", text):
        text = inner[1].replace(",", "|")
    if re.fullmatch(r"[\w ]+(?:\|[\w ]+)+", text):
        options = [typed(part.strip()).get("type") for part in text.split("|")]
        return {} if None in options else {"type": list(dict.fromkeys(options))}
    return {}
