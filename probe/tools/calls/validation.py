"""Arguments of a call against the JSON Schema of a tool, within limits: files bring schemas that never end."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from probe.jsontext import printable
from probe.tools.definitions import compile_pattern

if TYPE_CHECKING:
    from jsonschema import ValidationError

STEPS, STEPS_FOR_EACH = 20_000, 20
"""Keywords and types looked at for one call, and more for each character of its arguments: alternatives nested in
each other take exponentially many."""
PATTERN_SECONDS = 2.0
"""Time that all patterns of one call have: some patterns take exponential time."""


class UncheckedArguments(ValueError):
    """Arguments that cannot be compared with their schema within the limits, or at all; the message says why."""


class _Budget(threading.local):
    """What is left of the limits of the call that a thread is checking."""

    def __init__(self) -> None:
        self.begin()

    def begin(self, n_characters: int = 0, patterned: bool = False) -> None:
        """For arguments of so many characters; `patterned`: whether the schema has patternProperties."""
        self.most = self.steps = STEPS + STEPS_FOR_EACH * n_characters
        self.seconds, self.patterned = PATTERN_SECONDS, patterned

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise UncheckedArguments(f"more than {self.most:,} steps: the alternatives in it multiply")

    def matches(self, pattern: str, text: str) -> bool:
        """Whether a pattern stands in a text."""
        self.step()
        started = time.perf_counter()
        try:
            return compile_pattern(pattern).search(text, timeout=max(self.seconds, 1e-3)) is not None
        except TimeoutError:
            what = f"the pattern {printable(pattern, 80)} takes more than {PATTERN_SECONDS:g} s"
            raise UncheckedArguments(what) from None
        finally:
            self.seconds -= time.perf_counter() - started


_budget = _Budget()


def schema_errors(schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[ValidationError]:
    """Every error of the arguments against a schema. Raises UncheckedArguments."""
    import referencing
    from jsonschema import Draft202012Validator, validators

    named = schema if isinstance(schema.get("$schema"), str) else {}
    draft = validators.validator_for(named, default=Draft202012Validator)
    try:
        _budget.begin(len(json.dumps(arguments)), '"patternProperties"' in json.dumps(schema))
        # A registry without a way to fetch anything.
        validator = _limited(draft)(_undated(schema), registry=referencing.Registry())
        return list(validator.iter_errors(dict(arguments)))
    except UncheckedArguments:
        raise
    except RecursionError:
        raise UncheckedArguments("its references lead too deep") from None
    except Exception as error:  # whatever somebody else's schema makes the checker raise
        raise UncheckedArguments(f"{type(error).__name__}: {printable(str(error), 200)}") from error


def _undated(schema: Any) -> Any:
    """A schema without `$schema`, which would call jsonschema's own validator of that draft to its parts."""
    if isinstance(schema, list):
        return [_undated(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: part if key in ("const", "enum") else _undated(part)
        for key, part in schema.items()
        if key != "$schema" or not isinstance(part, str)
    }


@functools.cache
def _limited(draft: Any) -> Any:
    """A draft of JSON Schema whose keywords count their steps and whose patterns end on time."""
    from jsonschema import validators

    functions = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "uniqueItems": _unique_items,
    }
    keywords = {
        word: _counted(functions.get(word, check), unevaluated=word.startswith("unevaluated"))
        for word, check in draft.VALIDATORS.items()
    }
    types = draft.TYPE_CHECKER.redefine_many(
        {name: _counted_type(draft, name) for name in ("array", "boolean", "object")}
    )
    return validators.extend(draft, keywords, type_checker=types)


def _counted(check: Callable[..., Any], *, unevaluated: bool) -> Callable[..., Iterator[Any]]:
    def keyword(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        _budget.step()
        if unevaluated and _budget.patterned:
            raise UncheckedArguments("it has unevaluated and pattern properties: write additionalProperties")
        yield from check(validator, value, instance, schema) or ()

    return keyword


def _counted_type(draft: Any, name: str) -> Callable[[Any, Any], bool]:
    # Beside keywords: what looks for evaluated properties goes from schema to schema by itself.
    def is_type(_checker: Any, instance: Any) -> bool:
        _budget.step()
        return draft.TYPE_CHECKER.is_type(instance, name)

    return is_type


# -- keywords whose own functions have no limit -------------------------------------------------------------------


def _pattern(_validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if isinstance(instance, str) and not _budget.matches(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(
    validator: Any, patterns: Mapping[str, Any], instance: Any, _schema: Any
) -> Iterator[Any]:
    if isinstance(instance, dict):
        for pattern, part in patterns.items():
            for name, value in instance.items():
                if _budget.matches(pattern, name):
                    yield from validator.descend(value, part, path=name, schema_path=pattern)


def _additional_properties(validator: Any, allowed: Any, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if not isinstance(instance, dict):
        return
    patterns = schema.get("patternProperties", {})
    others = [
        name
        for name in instance
        if name not in schema.get("properties", {})
        and not any(_budget.matches(pattern, name) for pattern in patterns)
    ]
    if isinstance(allowed, dict):
        for name in others:
            yield from validator.descend(instance[name], allowed, path=name)
    elif not allowed and others:
        listed, verb = ", ".join(map(repr, others)), "was" if len(others) == 1 else "were"
        yield ValidationError(f"Additional properties are not allowed ({listed} {verb} unexpected)")


def _unique_items(_validator: Any, unique: Any, instance: Any, _schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if unique and isinstance(instance, list):
        texts = [json.dumps(_whole(item), sort_keys=True) for item in instance]
        if len(set(texts)) < len(texts):
            yield ValidationError(f"{instance!r} has non-unique elements")


def _whole(value: Any) -> Any:
    """A value with 2 for 2.0, which JSON Schema takes for the same number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole(part) for key, part in value.items()}
    return [_whole(part) for part in value] if isinstance(value, list) else value
