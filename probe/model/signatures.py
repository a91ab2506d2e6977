"""A tool's definition from a typed Python function. It lives here because transformers reads the docstring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def definition_of(function: Callable[..., Any]) -> dict[str, Any]:
    """`{name, description, parameters}` of a function with type hints and a Google-style docstring.

    `X | None` becomes JSON Schema's two types. Raises ValueError where a hint or a description is missing, or
    the function takes `*args`, `**kwargs` or positional-only arguments, which no object of arguments can name.
    """
    import inspect

    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    if inspect.iscoroutinefunction(function):
        raise ValueError("is asynchronous: write a plain function")
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in named:
            raise ValueError(f"argument {parameter} cannot be given by name: give it a plain one")
    try:
        declared = get_json_schema(function)["function"]
    except (DocstringParsingException, TypeHintParsingException, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error
    parameters = declared["parameters"]
    for schema in parameters.get("properties", {}).values():
        _spell_null(schema)
    return {"name": declared["name"], "description": declared["description"], "parameters": parameters}


def _spell_null(schema: Any) -> None:
    """Replace OpenAPI's `nullable`, which JSON Schema does not know, by the type null."""
    if isinstance(schema, dict):
        if schema.pop("nullable", False) and "type" in schema:
            kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            schema["type"] = [*kinds, "null"]
            if "enum" in schema and None not in schema["enum"]:
                schema["enum"] = [*schema["enum"], None]
        for part in schema.values():
            _spell_null(part)
    elif isinstance(schema, list):
        for part in schema:
            _spell_null(part)
