"""A format of calls that is learnt from a chat template: from a known call and what the template makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from probe.tools.calls.call import Call, Schemas, broken
from probe.tools.calls.objects import json_value
from probe.tools.calls.python import python_call
from probe.tools.calls.tags import typed_argument

_ANY = "\ue002"
"""Stands for the id of a call in a mark."""


@dataclass(frozen=True)
class Dialect:
    """How one template writes a call: what stands around the name, and around each argument."""

    before: str
    """The mark before the name."""
    behind: str
    """Between the name and the arguments."""
    end: str
    """What closes the call."""
    argument: tuple[str, str, str] | None = None
    """Before an argument's name, between it and the value, and behind the value; None: the arguments are JSON, or, where
    a bracket opens them, Python."""

    @property
    def mark(self) -> str:
        """The mark before the name, as it is shown."""
        return self.before.replace(_ANY, "…")

    def search(self, text: str, position: int, limit: int) -> re.Match[str] | None:
        """The first opening of a call that begins in characters position … limit."""
        opened = re.compile(f"{_loose(self.before)}\\s*(?P<name>[\\w.:/-]{{1,128}}){_loose(self.behind)}")
        match = opened.search(text, position)
        return match if match and match.start() <= limit else None

    def read(self, text: str, opened: re.Match[str], schemas: Schemas) -> tuple[Call, int]:
        """The call behind an opening, and where it ends."""
        start, name, position = opened.start("name"), opened["name"], opened.end()
        if self.behind.strip() == "(":
            call, end, _ = python_call(text, start, schemas)
            return call, end
        if self.argument is None:
            value, end, fault, complete = json_value(text, position)
            if fault is None and isinstance(value, dict):
                return Call(name, value, text[start:end], start, end), end
            message = f"the arguments are no complete JSON object: {fault}"
            return broken(text, start, end, message, name, complete), end
        arguments: dict[str, Any] = {}
        lead, middle, behind = self.argument
        end = self.end.strip()
        while text.startswith(lead, position) and not (end and self._ends(text, position)):
            key_end = text.find(middle, position + len(lead))
            value_end = text.find(behind, key_end + len(middle)) if key_end >= 0 else -1
            if value_end < 0:
                return broken(text, start, len(text), "an argument is not closed", name), len(text)
            key = text[position + len(lead) : key_end].strip()
            properties = schemas.get(name, {}).get("properties", {})
            known = properties.get(key) if isinstance(properties, dict) else None
            arguments[key] = typed_argument(
                text[key_end + len(middle) : value_end], known if isinstance(known, dict) else {}
            )
            position = value_end + len(behind)
        if end and not self._ends(text, position):
            complete = bool(text[position:].strip())
            return broken(text, start, position, f"{end} is missing", name, complete), position
        return Call(name, arguments, text[start:position], start, position), position

    def _ends(self, text: str, position: int) -> bool:
        """Whether what closes the call stands at a position, white space before it aside."""
        rest = text[position : position + 64 + len(self.end)]
        return rest.lstrip().startswith(self.end.strip())


_FIRST_MARK = re.compile(r"\s*(?:[<\[]?[^\s<>\[\]]*[>\]]|\S+)")


def _loose(mark: str) -> str:
    """A pattern for a mark: with more or less white space where it has some, any id, and any number where it counts."""

    def pattern(part: str) -> str:
        if part.isspace():
            return r"[ \t]*\n\s*" if "\n" in part else r"\s*"
        return r"[\w.:-]{1,64}" if part == _ANY else r"\d+"

    parts = re.split(rf"(\s+|{_ANY}|(?<=:)\d+)", mark)
    return "".join(pattern(part) if n % 2 else re.escape(part) for n, part in enumerate(parts))


def learn(rendered: str, name: str, arguments: Mapping[str, Any], call_id: str = _ANY) -> Dialect | None:
    """The format in which a text has the call of `name` with two arguments, all texts; None where it is none.

    `rendered` is what the template adds for the call, `call_id` the id that it was given. Names and values have to be
    words that stand nowhere else.
    """
    before, named, rest = rendered.replace(call_id, _ANY).partition(name)
    if not named or not before.strip():
        return None
    mark = before.strip().rsplit("\n", 1)[-1].strip()
    if rest.startswith("("):
        return Dialect(mark, "(", ")")
    for spelling in (
        json.dumps(dict(arguments)),
        json.dumps(dict(arguments), separators=(",", ":")),
        json.dumps(dict(arguments), indent=4),
        json.dumps(dict(arguments), indent=2),
    ):
        if spelling in rest:
            behind, _, end = rest.partition(spelling)
            return Dialect(mark, behind, end)
    (first, left), (second, right) = arguments.items()
    match = re.fullmatch(
        rf"(?P<behind>.*?){first}(?P<middle>.+?){left}(?P<between>.+?){second}(?P<again>.+?){right}(?P<end>.*)",
        rest,
        re.DOTALL,
    )
    if match is None or match["middle"] != match["again"]:
        return None
    between, end = match["between"], match["end"]
    # What stands between two arguments closes one and opens the next: what the call's end shares closes.
    size = next((n for n in range(len(between), -1, -1) if end.startswith(between[:n])), 0)
    size = len(between[:size].rstrip("<[/")) or size
    lead = between[size:]
    if not size or not match["behind"].endswith(lead):
        return None
    behind = match["behind"][: len(match["behind"]) - len(lead)]
    closing = _FIRST_MARK.match(end[size:])
    return Dialect(mark, behind, closing[0] if closing else "", (lead, match["middle"], between[:size]))
