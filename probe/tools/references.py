"""References within a JSON Schema: where each leads, and which lead nowhere, outside, or back to themselves."""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

from probe.jsontext import At, JsonFault, nearest, quoted

_WORDS = ("$ref", "$dynamicRef", "$recursiveRef")
_VALUES = ("const", "enum", "default", "example", "examples")
"""Keywords whose values are no schemas."""
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
"""Keywords whose values are schemas by name."""
_SAME_VALUE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "dependencies")
"""Keywords whose schemas are about the value that the schema with them is about."""
_MOST = 20


class _SchemaReference(NamedTuple):
    at: At
    text: str
    owner: int
    """Identity of the schema that has it."""
    resolver: Any


def reference_faults(schema: dict[str, Any], draft: Any) -> Iterator[JsonFault]:
    """A fault for each reference that cannot be followed when a call is checked; `draft` is a jsonschema validator."""
    import referencing
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import specification_with

    specification = specification_with(draft.META_SCHEMA.get("$schema", "").rstrip("#"))
    resource = referencing.Resource(contents=schema, specification=specification)
    graph: dict[int, set[int]] = {}
    references: list[_SchemaReference] = []
    waiting: list[tuple[At, Any, Any]] = [((), schema, referencing.Registry().resolver_with_root(resource))]
    while waiting:
        at, part, resolver = waiting.pop()
        if at and "$id" in part:
            inner = referencing.Resource(contents=part, specification=specification)
            resolver = resolver.in_subresource(inner)
        references += [
            _SchemaReference((*at, word), part[word], id(part), resolver)
            for word in _WORDS
            if isinstance(part.get(word), str)
        ]
        edges = graph.setdefault(id(part), set())
        for place, inner in _parts(part):
            waiting.append(((*at, *place), inner, resolver))
            if place[0] in _SAME_VALUE:
                edges.add(id(inner))
    known = tuple(_definitions(schema))
    followed: dict[tuple[int, int], _SchemaReference] = {}
    for reference in sorted(references, key=lambda each: len(each.at)):
        if not reference.text.startswith("#"):
            # A validator would fetch what it names, from wherever a task file says.
            fix = 'copy it to "$defs" and refer to "#/$defs/…"'
            yield JsonFault(reference.at, "refers outside this schema", fix)
            continue
        try:
            target = reference.resolver.lookup(reference.text).contents
        except (Unresolvable, ValueError, TypeError, LookupError, AttributeError):
            near = nearest(reference.text, known) if known else None
            fix = (
                f"the nearest definition is {quoted(near)}"
                if near
                else 'define it in "$defs", or take it out'
            )
            yield JsonFault(reference.at, f"{quoted(reference.text)} leads nowhere", fix)
            continue
        if not isinstance(target, dict | bool):
            yield JsonFault(
                reference.at, f"{quoted(reference.text)} is no schema", 'refer to an entry of "$defs"'
            )
        elif isinstance(target, dict):
            graph.setdefault(reference.owner, set()).add(id(target))
            graph.setdefault(id(target), set())
            followed[reference.owner, id(target)] = reference
    yield from _circles(graph, followed)


def _parts(schema: dict[str, Any]) -> Iterator[tuple[At, dict[str, Any]]]:
    """The schemas right below one, each with its path."""
    for word, value in schema.items():
        if word in _VALUES:
            continue
        if word in _BY_NAME and isinstance(value, dict):
            yield from (((word, name), part) for name, part in value.items() if isinstance(part, dict))
        elif isinstance(value, dict):
            yield (word,), value
        elif isinstance(value, list):
            yield from (((word, index), part) for index, part in enumerate(value) if isinstance(part, dict))


def _definitions(schema: dict[str, Any]) -> list[str]:
    return [
        f"#/{word}/{name}"
        for word in ("$defs", "definitions")
        if isinstance(schema.get(word), dict)
        for name in schema[word]
    ]


def _circles(
    graph: dict[int, set[int]], followed: dict[tuple[int, int], _SchemaReference]
) -> Iterator[JsonFault]:
    """A fault for a reference of each circle that never goes on to another value: checking would not end."""
    for _ in range(_MOST):
        try:
            TopologicalSorter(graph).prepare()
            return
        except CycleError as error:
            circle = error.args[1]
        # Given from each to the one that has it, so backwards.
        edges = [(owner, target) for target, owner in zip(circle, circle[1:], strict=False)]
        owner, target = next(edge for edge in edges if edge in followed)
        graph[owner].discard(target)
        reference = followed[owner, target]
        what = f"{quoted(reference.text)} leads back to itself without an argument in between"
        yield JsonFault(reference.at, what, 'refer to it from "properties" or "items", or take it out')
