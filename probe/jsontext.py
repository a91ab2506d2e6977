"""Strict JSON, with the place of every mistake.

JSON here is RFC 8259 without its gray areas: an object has a key once, numbers are finite, whole ones fit 64
bits, text has neither NUL nor lone surrogates, nesting stops at `MAX_DEPTH`. A mistake is a `JsonFault` at a path
inside one JSON text; `JsonFile` turns paths into lines and columns, so that one reading reports them all.
"""

from __future__ import annotations

import codecs
import difflib
import errno
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from unicodedata import category

if TYPE_CHECKING:
    import jsonlines


MAX_LINE_BYTES = 16 * 2**20
MAX_DEPTH = 64
"""Levels of nesting: the decoder and the JSON Schema check recurse, and both manage this on Python 3.11."""

At = tuple[str | int, ...]
"""Where a value sits inside one JSON text: keys and 0-based indices from the outside in."""


class JsonFault(NamedTuple):
    """One mistake in a JSON text, placed by its path, or by `offset` (in characters) where it has none."""

    at: At
    what: str
    fix: str
    at_key: bool = False
    offset: int | None = None

    def __str__(self) -> str:
        return f"{self.field}: {self.what}: {self.fix}"

    @property
    def field(self) -> str:
        """The path as written in messages, `messages[0].role`; the whole text is `line`."""
        names = "".join(f"[{part}]" if isinstance(part, int) else f".{printable(part)}" for part in self.at)
        return names.removeprefix(".") or "line"


class StrictJsonError(ValueError):
    """A text is not strict JSON; `faults` has every reason found."""

    def __init__(self, faults: list[JsonFault]):
        self.faults = faults
        super().__init__("; ".join(map(str, faults)))


# --- words for messages ---


def inert(text: str) -> str:
    """`text` with a mark for each character that could move a cursor, hide or reorder a line.

    Line breaks, tabs and the spaces of other scripts stay.
    """
    return "".join(c if c.isprintable() or c in "\n\t" or category(c) == "Zs" else "\ufffd" for c in text)


def printable(text: str, limit: int = 60) -> str:
    """`text` cut to `limit` characters, with what could move a cursor or reorder a line escaped."""
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def quoted(value: object) -> str:
    """A value as a message shows it: short, on one line, inert in a terminal."""
    return f'"{printable(value)}"' if isinstance(value, str) else printable(json.dumps(value, default=repr))


def kind_of(value: object) -> str:
    """The JSON type of a decoded value, in words."""
    if value is None:
        return "null"
    names = {str: "a string", bool: "a boolean", dict: "an object", list: "a list"}
    return names.get(type(value), "a number")


@functools.lru_cache(maxsize=4096)
def nearest(word: str, known: tuple[str, ...]) -> str | None:
    """The member of `known` most like `word`; None only if there are none to choose from."""
    word = word[:128]
    close = difflib.get_close_matches(word, known, n=1)
    # A full ratio against thousands of names would take seconds a word; the letters in common will do.
    return close[0] if close else max(known, key=lambda name: _letters_in_common(word, name), default=None)


def _letters_in_common(word: str, name: str) -> float:
    return difflib.SequenceMatcher(None, word, name).quick_ratio()


# --- strict JSON ---

_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{},:]|[^\s\[\]{},:"]++', re.DOTALL)
_SUSPICIOUS = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)|[0-9]{19}")
_SURROGATE = re.compile("[\ud800-\udfff]")


class _NotStrict(ValueError):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _NotStrict
    return members


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _NotStrict
    return value


# The second decoder checks syntax alone: `len` stands for conversions that could fail.
_STRICT = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=_number, parse_constant=_number)
_SYNTAX = json.JSONDecoder(parse_float=len, parse_int=len, parse_constant=len)


def loads(text: str) -> Any:
    """Decode strict JSON. Raises StrictJsonError, with the offset of each mistake; never RecursionError."""
    _check_depth(text)
    try:
        value = _STRICT.decode(text)
        if not _SUSPICIOUS.search(text):
            return value
    except json.JSONDecodeError as error:
        raise StrictJsonError([_syntax_fault(text, error)]) from None
    except ValueError:  # a key given twice, a number out of range, or more digits than int() takes
        value = None
    try:
        _SYNTAX.decode(text)
    except json.JSONDecodeError as error:
        raise StrictJsonError([_syntax_fault(text, error)]) from None
    if faults := [fault for event in walk(text) if (fault := _strictness_fault(event))]:
        raise StrictJsonError(faults)
    return value


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _TOKEN.finditer(text):
        depth += (match[0] in "[{") - (match[0] in "]}")
        if depth > MAX_DEPTH:
            what = f"nested more than {MAX_DEPTH} levels deep"
            raise StrictJsonError([JsonFault((), what, "flatten it", offset=match.start())])


def _syntax_fault(text: str, error: json.JSONDecodeError) -> JsonFault:
    rest = text[error.pos : error.pos + 8]
    if not rest.strip() or error.msg.startswith("Unterminated"):
        what, fix = f"JSON cut short ({error.msg})", "complete it: a string, list or object is still open"
    elif error.msg == "Extra data":
        what, fix = "more text after the JSON value", "put one object on each line and nothing after it"
    else:
        what, fix = f"not JSON ({error.msg})", "correct the JSON here"
        if error.msg.startswith("Invalid control"):
            fix = "write line breaks and tabs inside a string as \\n and \\t, and leave other controls out"
        elif error.msg.startswith("Invalid \\"):
            fix = "write a backslash as \\\\"
        elif rest.startswith("'"):
            fix = "quote strings with double quotes"
        elif rest.startswith(("True", "False", "None")):
            fix = "write true, false or null"
        elif rest[0] in "}]" or "trailing comma" in error.msg:
            fix = "give a value here, or take the comma before it away"
    return JsonFault((), what, fix, offset=error.pos)


class _Event(NamedTuple):
    """A key or a value met on a walk through a valid JSON text; `again`: its object had the key before."""

    at: At
    offset: int
    token: str
    is_key: bool
    again: bool


class _Container:
    """A list or object that a walk is inside; `name` is the index, or the key whose value comes next."""

    __slots__ = ("at", "keys", "name")

    def __init__(self, at: At, token: str):
        self.at = at
        self.keys: set[str] | None = set() if token == "{" else None
        self.name: str | int | None = None if token == "{" else 0

    def comma(self) -> None:
        self.name = self.name + 1 if isinstance(self.name, int) else None


def walk(text: str) -> Iterator[_Event]:
    """Every key and value of a JSON text whose syntax is right, in order, without recursion."""
    stack: list[_Container] = []
    for match in _TOKEN.finditer(text):
        token, inside = match[0], stack[-1] if stack else None
        if token == ":":
            continue
        if token in ("]", "}"):
            stack.pop()
        elif inside and token == ",":
            inside.comma()
        elif inside and inside.keys is not None and inside.name is None:
            name = inside.name = json.loads(token)
            yield _Event((*inside.at, name), match.start(), token, True, name in inside.keys)
            inside.keys.add(name)
        else:
            at = () if inside is None or inside.name is None else (*inside.at, inside.name)
            yield _Event(at, match.start(), token, False, False)
            if token in ("[", "{"):
                stack.append(_Container(at, token))


def _strictness_fault(event: _Event) -> JsonFault | None:
    token = event.token
    if event.again:
        what, fix = "key given twice in one object", "keep one of the two"
    elif token[0] == '"' and "\\u" in token:
        text = json.loads(token)
        if _SURROGATE.search(text):
            what, fix = "half of a surrogate pair, which is no character", "write the whole character"
        elif "\0" in text:
            what, fix = "text has a NUL character", "leave it out"
        else:
            return None
    elif token[0] in '"[{tfn':
        return None
    elif token.lstrip("-").isdigit():
        if len(token) < 21 and -(2**63) <= int(token) < 2**63:
            return None
        what, fix = f"{printable(token, 24)} does not fit a 64-bit integer", "write it as a string"
    elif math.isfinite(float(token)):
        return None
    else:
        what, fix = f"{printable(token, 24)} is not a finite number", "write a finite one, a string or null"
    return JsonFault(event.at, what, fix, offset=event.offset)


def _locate(text: str, faults: Iterable[JsonFault]) -> dict[tuple[At, bool], int]:
    """Offsets of the keys (True) and values (False) that faults point at, and of what encloses them."""
    wanted = {fault.at[:n] for fault in faults for n in range(len(fault.at) + 1)}
    places: dict[tuple[At, bool], int] = {}
    for event in walk(text):
        if event.at in wanted:
            places[event.at, event.is_key] = event.offset
    return places


class JsonFile:
    """One input file, read once. `problems` collects `FILE:LINE:COLUMN: field: what: what to do` lines."""

    def __init__(self, path: Path):
        self.path = path
        self.problems: list[str] = []
        self._digest = hashlib.sha256()
        self._line = 1
        self._text = ""

    @property
    def sha256(self) -> str:
        """Hash of the bytes read so far: of the whole file after `objects` or `document`."""
        return self._digest.hexdigest()

    def objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line number, object) of every line that is a strict JSON object; the others become problems."""
        try:
            with open(self.path, "rb") as file:
                if self._is_one_value(file):
                    return
                import jsonlines

                lines = jsonlines.Reader(self._lines(file), loads=loads)  # pyright: ignore[reportCallIssue]
                while True:
                    value = self._next(lines)
                    if value is not None:
                        yield self._line, value
        except EOFError:
            pass
        except OSError as error:
            self._unreadable(error)

    def _is_one_value(self, file: BinaryIO) -> bool:
        """Report a file that is one array, or one object over several lines: each line would be a mistake."""
        head = file.read(1 << 16).removeprefix(codecs.BOM_UTF8)
        file.seek(0)
        if re.match(rb"\s*\[\s*(\{|\]\s*$)", head):
            fix = (
                "write its objects one a line, without the brackets and commas around them (jq -c '.[]' FILE)"
            )
            self.add(1, 1, f"file: is one JSON array: {fix}")
        elif re.match(rb"\s*\{[ \t]*\r?\n", head):
            fix = "write every object on a line of its own (jq -c . FILE)"
            self.add(1, 1, f"file: its objects go over several lines: {fix}")
        return bool(self.problems)

    def _next(self, lines: jsonlines.Reader) -> dict[str, Any] | None:
        import jsonlines

        try:
            value = lines.read(skip_empty=True, allow_none=True)
        except jsonlines.InvalidLineError as error:
            cause = error.__cause__
            known = cause.faults if isinstance(cause, StrictJsonError) else None
            self.report(known or [JsonFault((), printable(str(error)), "correct the line")])
            return None
        if isinstance(value, dict):
            return value
        self.report([JsonFault((), f"{kind_of(value)}, not an object", "write one {…} a line")])

    def document(self) -> Any:
        """The whole file as one JSON value; None where that failed, which is then a problem."""
        try:
            with open(self.path, "rb") as file:
                raw = file.read(MAX_LINE_BYTES + 1)
        except OSError as error:
            return self._unreadable(error)
        self._digest.update(raw)
        if len(raw) > MAX_LINE_BYTES:
            self.add(1, 1, f"file: longer than {MAX_LINE_BYTES // 2**20} MiB: write it as JSON lines")
        elif self._decode(raw):
            try:
                return loads(self._text)
            except StrictJsonError as error:
                self.report(error.faults)
        return None

    def _unreadable(self, error: OSError) -> None:
        fix = "give a file that exists and may be read"
        if error.errno == errno.ENOENT:
            with suppress(OSError):
                beside = tuple(path.name for path in self.path.parent.iterdir())
                if close := difflib.get_close_matches(self.path.name, beside, n=1):
                    fix = f"did you mean {quoted(close[0])}?"
        self.add(1, 1, f"file: cannot be read ({error.strerror}): {fix}")

    def report(self, faults: Iterable[JsonFault]) -> None:
        """Add faults of the object read last as problems, in the order of their places."""
        faults = list(faults)
        places = _locate(self._text, faults) if any(fault.offset is None for fault in faults) else {}
        placed = sorted(((self._offset(fault, places), fault) for fault in faults), key=lambda pair: pair[0])
        for offset, fault in placed:
            line = self._line + self._text.count("\n", 0, offset)
            self.add(line, offset - self._text.rfind("\n", 0, offset), str(fault))

    def add(self, line: int, column: int, message: str) -> None:
        self.problems.append(f"{printable(str(self.path), 4096)}:{line}:{column}: {message}")

    @staticmethod
    def _offset(fault: JsonFault, places: Mapping[tuple[At, bool], int]) -> int:
        if fault.offset is not None:
            return fault.offset
        for n in range(len(fault.at), -1, -1):  # a missing field is reported at the object that lacks it
            offset = places.get((fault.at[:n], fault.at_key and n == len(fault.at)))
            if offset is not None:
                return offset
        return 0

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        """The file's lines; one that is no text is reported, and is a blank here, which keeps the count."""
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            self._line, self._text = number, ""
            self._digest.update(raw)
            if len(raw) <= MAX_LINE_BYTES:
                self._decode(raw)
                if number == 1 and _is_wide(raw):
                    return
            else:
                self.add(number, 1, f"line: longer than {MAX_LINE_BYTES // 2**20} MiB: shorten its text")
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES)
                    self._digest.update(raw)
            yield self._text

    def _decode(self, raw: bytes) -> bool:
        """Set `_text` to the text of `raw` without byte order mark and line end; False if it is no text."""
        self._text = ""
        if self._line == 1 and _is_wide(raw):
            self.add(1, 1, "file: is UTF-16 or UTF-32: save it as UTF-8")
            return False
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            before = raw[: error.start].decode("utf-8")
            line, column = self._line + before.count("\n"), len(before) - before.rfind("\n")
            what = f"byte 0x{raw[error.start]:02x} is not UTF-8"
            self.add(line, column, f"line: {what}: save the file as UTF-8")
            return False
        if self._line == 1:
            text = text.removeprefix("\ufeff")
        if text[:1] in ("\ufeff", "\x1e"):  # jsonlines would drop one of either on any line
            self.add(self._line, 1, f"line: starts with {text[:1]!a}, which is no JSON: take it away")
            return False
        self._text = text.rstrip("\r\n")
        return True


def _is_wide(raw: bytes) -> bool:
    return raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:4]


# --- checking decoded objects ---


class Spot:
    """The place of one decoded value, and the list that its faults go to."""

    __slots__ = ("at", "faults")

    def __init__(self, faults: list[JsonFault], at: At = ()):
        self.faults = faults
        self.at = at

    def __getitem__(self, name: str | int) -> Spot:
        return Spot(self.faults, (*self.at, name))

    def fault(self, what: str, fix: str, *, at_key: bool = False) -> None:
        self.faults.append(JsonFault(self.at, what, fix, at_key))


Check = Callable[[Any, Spot], Any]
"""Checks a decoded value at its spot; returns what it stands for, or anything at all beside a fault."""


def check_type(value: Any, expected: type, spot: Spot) -> bool:
    """Whether a value has a JSON type (str, dict or list); a fault if not."""
    if isinstance(value, expected):
        return True
    word = kind_of(expected())
    spot.fault(f"must be {word}, is {kind_of(value)}", f"write {word}")
    return False


def check_string(value: Any, spot: Spot) -> Any:
    check_type(value, str, spot)
    return value


def check_text(value: Any, spot: Spot) -> Any:
    """A string that is not blank."""
    if check_type(value, str, spot) and not value.strip():
        spot.fault("is empty", "write its text")
    return value


def check_object(value: Any, spot: Spot) -> Any:
    check_type(value, dict, spot)
    return value


def check_list(value: Any, spot: Spot, check: Check, at_least: int = 1) -> tuple[Any, ...]:
    """Check a list of at least `at_least` values, each by `check`."""
    if not check_type(value, list, spot):
        return ()
    if len(value) < at_least:
        spot.fault("is an empty list", "give at least one entry")
    return tuple(check(item, spot[index]) for index, item in enumerate(value))


def check_fields(
    value: Any,
    spot: Spot,
    known: Mapping[str, Check],
    required: Iterable[str],
    advice: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The fields of an object: all `required`, none but `known`. Null in an optional field is absence.

    `advice` says what to do with fields that other formats have.
    """
    if not check_type(value, dict, spot):
        return {}
    for name in value:
        if name not in known:
            fix = f"the nearest known field is {quoted(nearest(name, tuple(known)))}"
            spot[name].fault("unknown field", (advice or {}).get(name, fix), at_key=True)
    renamed = {fix for name, fix in (advice or {}).items() if name in value}
    for name in required:
        # What an advice says to rename is not missing as well.
        if name not in value and f"rename it to {quoted(name)}" not in renamed:
            spot[name].fault("missing", f"add {quoted(name)}")
    return {
        name: check(value[name], spot[name])
        for name, check in known.items()
        if name in value and (value[name] is not None or name in required)
    }


def check_distinct(values: Iterable[str | None], spot: Spot, what: str, fix: str, *, under: str = "") -> None:
    """A fault for every string that came before in a list, at its entry or at the field `under` of that."""
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        if isinstance(value, str) and first.setdefault(value, index) != index:
            entry = spot[index][under] if under else spot[index]
            entry.fault(f"{quoted(value)} {what} (first as [{first[value]}])", fix)
