"""A call in the syntax of Java or JavaScript, whose values stay source text, as BFCL's own parsers give it.

bfcl-eval 2026.3.23 walks the syntax trees of tree-sitter 0.21 with it; here is one walk over tokens for the part of the
languages in which calls are written. Java's values come back without white space between their tokens, and without
the body of an anonymous class, because they do there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_TOKEN = re.compile(
    r"""(?P<space>(?:\s|//[^\n]*|/\*(?:[^*]|\*(?!/))*\*/)++)
    |(?P<string>"(?:[^"\\\n]++|\\.)*+"|'(?:[^'\\\n]++|\\.)*+'|`(?:[^`\\]++|\\.)*+`)
    |(?P<number>(?:0[xX][\da-fA-F_]+|\.?\d(?:[\d_]*\.?[\d_]*)(?:[eE][+-]?\d+)?)[A-Za-z]?)
    |(?P<name>[^\W\d]\w*(?:\$\w*)*|\$[\w$]*)
    |(?P<open>[(\[{])|(?P<close>[)\]}])
    |(?P<mark>->|=>|::|\.\.\.|&&|\|\||\?\?|\?\.|[=!]==?|[<>]=|[-+*/%&|^]=|\+\+|--|[-+*/%&|^<>=!?:,.;~@])""",
    re.VERBOSE,
)
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_MAX_DEPTH = 64
"""Levels of brackets that are read: what is deeper is no call."""
_RESERVED = frozenset(
    [
        "if",
        "for",
        "while",
        "return",
        "class",
        "function",
        "import",
        "package",
        "public",
        "private",
        "static",
        "void",
        "throw",
        "try",
        "switch",
    ]
)


class Token(NamedTuple):
    """A token: what it is, and characters start … end − 1."""

    kind: str
    text: str
    start: int
    end: int
    closes: int = -1
    """Of an opening bracket, the index of the token that closes it."""


class SourceError(ValueError):
    """The text is no call in this language."""


def java_call(text: str) -> list[dict] | None:
    """`[{name: {argument: source}}]` of the call that a text of Java is; None where it calls nothing.

    Raises SourceError for what is no Java.
    """
    tokens = _tokens(text)
    if not tokens or (len(tokens) == 1 and tokens[0].kind == "string"):
        return None
    name_end, closed = _called(tokens)
    for before, token in zip(tokens, tokens[1:], strict=False):
        listed = token.text == "[" and before.kind not in ("name", "close")
        if listed or (token.text == "{" and before.text in ("=", "(")) or token.text == "''":
            raise SourceError(f"{token.text} is no expression")
    if closed + 1 < len(tokens) and tokens[closed + 1].text != ";":
        raise SourceError("there is something else behind the call")
    source = _Java(text, tokens)
    arguments: dict[str | None, str] = {}
    for first, last in _split(tokens, name_end + 1, closed):
        at = _assignment(tokens, first, last)
        if at is not None:
            if at + 1 >= last:
                raise SourceError("an argument has no value")
            name = source.raw(first, at)
            _put(arguments, name, source.value(at + 1, last))
        elif last - first == 1 and tokens[first].kind == "name" and tokens[first].text not in _WORDS:
            _put(arguments, None, source.raw(first, last))
        else:
            source.value(first, last)
    return [{source.raw(0, name_end): arguments}]


def javascript_call(text: str) -> list[dict] | None:
    """As `java_call`, of JavaScript."""
    tokens = _tokens(text)
    if not tokens or tokens[0].kind == "string" or tokens[0].text in ("{", "("):
        _checked(tokens, 0, len(tokens))
        return None
    while len(tokens) > 1 and tokens[0].kind == "name" and "\n" in text[tokens[0].end : tokens[1].start]:
        if tokens[1].text == "{":
            return None
        text = text[tokens[1].start :]  # a name on a line is a statement
        tokens = _tokens(text)
    name_end, closed = _called(tokens)
    while closed + 1 < len(tokens) and tokens[closed + 1].text == "(":
        name_end, closed = closed + 1, tokens[closed + 1].closes
    rest = tokens[closed + 1 :]
    if rest and rest[0].text != ";":
        if rest[0].text in (",", ".", "&&", "||", "=", "+", "-", "?", "=>"):
            return None
        if "\n" not in text[tokens[closed].end : rest[0].start]:
            raise SourceError("there is something else behind the call")
    arguments: dict[str | None, str] = {}
    for first, last in _split(tokens, name_end + 1, closed):
        at = _assignment(tokens, first, last)
        written = text[tokens[first].start : tokens[last - 1].end]
        if at is not None and tokens[at].text == "=" and tokens[first].text not in ("(", "function"):
            if at + 1 >= last:
                raise SourceError("an argument has no value")
            value = text[tokens[at + 1].start : tokens[last - 1].end]
            _checked(tokens, at + 1, last)
            if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
                value = value[1:-1]
            _put(arguments, text[tokens[first].start : tokens[at - 1].end], value)
        elif last - first == 1 and tokens[first].kind == "name" and written not in ("false", "null"):
            _put(arguments, None, written)
        else:
            _checked(tokens, first, last)
    return [{text[: tokens[name_end - 1].end].strip(): arguments}]


_BEFORE_VALUE = ("new", "async", "await", "typeof", "function", "void", "delete", "return", "final", "super")
_WORDS = frozenset(("true", "false", "null", "this", "super"))


def _put(arguments: dict[str | None, str], name: str | None, value: str) -> None:
    if name in arguments:
        raise SourceError("an argument is given twice")
    arguments[name] = value


def _tokens(text: str) -> list[Token]:
    """Tokens without white space, brackets paired. Raises SourceError."""
    tokens: list[Token] = []
    opened: list[int] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise SourceError(f"{text[position : position + 20]!r} is no token")
        kind, position = match.lastgroup or "", match.end()
        if kind == "space":
            continue
        if kind == "open":
            opened.append(len(tokens))
            if len(opened) > _MAX_DEPTH:
                raise SourceError(f"nested more than {_MAX_DEPTH} levels deep")
        elif kind == "close":
            if not opened or _PAIRS[tokens[opened[-1]].text] != match[0]:
                raise SourceError("a bracket is not opened")
            begin = opened.pop()
            tokens[begin] = tokens[begin]._replace(closes=len(tokens))
        tokens.append(Token(kind, match[0], match.start(), match.end()))
    if opened:
        raise SourceError("a bracket is not closed")
    return tokens


def _called(tokens: list[Token]) -> tuple[int, int]:
    """Indices of the bracket that opens the arguments and of that which closes them."""
    index = 0
    while index < len(tokens) and tokens[index].kind == "name" and tokens[index].text not in _RESERVED:
        if index + 1 < len(tokens) and tokens[index + 1].text == "(":
            return index + 1, tokens[index + 1].closes
        if index + 1 >= len(tokens) or tokens[index + 1].text != ".":
            break
        index += 2
    raise SourceError("the text does not begin with a call")


def _split(tokens: list[Token], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Ranges of tokens between the commas of a list. Commas in brackets or `<…>` are no borders."""
    begin, index = first, first
    while index < last:
        if tokens[index].closes > 0:
            index = tokens[index].closes
        elif tokens[index].text == "<" and (behind := _generic(tokens, index, last)):
            index = behind - 1
        elif tokens[index].text == ",":
            if index == begin:
                raise SourceError("an argument is missing")
            yield begin, index
            begin = index + 1
        index += 1
    if begin < last:
        yield begin, last


def _generic(tokens: list[Token], index: int, last: int) -> int:
    """Index behind the type arguments `<…>` that begin at a token; 0 where they are none."""
    depth = 0
    while index < last and (tokens[index].kind == "name" or tokens[index].text in "<>,.?&[]"):
        depth += (tokens[index].text == "<") - (tokens[index].text == ">")
        index += 1
        if depth == 0:
            return index
    return 0


def _assignment(tokens: list[Token], first: int, last: int) -> int | None:
    """Index of the sign that gives an argument its value."""
    index = first
    while (index < last and tokens[index].kind in ("name", "open")) or tokens[index].text == ".":
        if tokens[index].text in ("(", "{"):
            return None
        index = tokens[index].closes + 1 if tokens[index].closes > 0 else index + 1
        if index >= last:
            return None
    sign = tokens[index].text
    return (
        index
        if index > first and sign.endswith("=") and sign not in ("==", "!=", "<=", ">=", "===")
        else None
    )


def _checked(tokens: list[Token], first: int, last: int) -> None:
    """Raises SourceError where two values stand side by side, or a colon divides them: no expression does."""
    values, between = ("string", "number", "name"), (*_BEFORE_VALUE, "in", "instanceof", "of", "extends")
    index, conditional = first, False
    if first < last and tokens[first].text in ("/", "<", "*", ">", "=", "."):
        raise SourceError(f"{tokens[first].text} begins no value")
    while index < last:
        token = tokens[index]
        after = tokens[index + 1] if index + 1 < last else None
        conditional = conditional or token.text == "?"
        if token.text == ":" and not conditional:
            raise SourceError("a colon is no operator")
        side_by_side = after is not None and token.kind in values and after.kind in values
        if side_by_side and after and not {token.text, after.text} & set(between):
            raise SourceError("there is no operator between two values")
        if token.text == "[" and (index == first or tokens[index - 1].kind not in ("name", "close")):
            for part in _split(tokens, index + 1, token.closes):
                _checked(tokens, *part)
        index = token.closes + 1 if token.closes > 0 else index + 1


class _Java:
    """The text of Java's expressions as the parser gives it."""

    def __init__(self, text: str, tokens: list[Token]):
        self._text, self._tokens = text, tokens
        # The parser counts bytes and cuts characters: behind é everything is one character off.
        self._ascii = text.isascii()

    def raw(self, first: int, last: int) -> str:
        """The text of tokens first … last − 1 as it stands."""
        start, end = self._tokens[first].start, self._tokens[last - 1].end
        if not self._ascii:
            start, end = (len(self._text[:at].encode("utf-8", "replace")) for at in (start, end))
        return self._text[start:end]

    def value(self, first: int, last: int) -> str:
        """An argument's value: a text or a character without its quotes, else source."""
        if last - first == 1 and self._tokens[first].kind == "string":
            return self.raw(first, last)[1:-1]
        return self._joined(first, last)

    def _joined(self, first: int, last: int) -> str:
        _checked(self._tokens, first, last)
        parts: list[str] = []
        index = first
        while index < last:
            end, text = self._operand(index, last)
            parts.append(text)
            index = end
        return "".join(parts)

    def _operand(self, index: int, last: int) -> tuple[int, str]:
        """(index behind, text) of a value with what is called on it, or of one other token."""
        tokens, first = self._tokens, index
        token = tokens[index]
        if token.text == "new":
            index, text = self._created(index, last)
        elif token.text == "{":
            inside = ",".join(self._joined(*part) for part in _split(tokens, index + 1, token.closes))
            return token.closes + 1, "{" + inside + "}"
        elif token.text in ("(", "["):
            inside = self._joined(index + 1, token.closes)
            index, text = token.closes + 1, token.text + inside + tokens[token.closes].text
        else:
            index, text = index + 1, self.raw(index, index + 1)
        if token.kind not in ("name", "string", "open"):
            return index, text
        if token.kind == "name" and index < last and tokens[index].text == "(":
            index = tokens[index].closes + 1
            text = self.raw(first, index)
        while index + 1 < last and tokens[index].text == "." and tokens[index + 1].kind == "name":
            index += 2
            text += "." + self.raw(index - 1, index)
            if index < last and tokens[index].text == "(":
                index = tokens[index].closes + 1
                text = self.raw(first, index)
        return index, text

    def _created(self, index: int, last: int) -> tuple[int, str]:
        """(index behind, text) of `new …`."""
        tokens = self._tokens
        at = index + 1
        while at < last and tokens[at].text not in ("(", "[", "{"):
            at += 1
        if at >= last:
            raise SourceError("new creates nothing")
        name = "".join(self.raw(part, part + 1) for part in range(index + 1, at))
        if tokens[at].text == "(":
            closed = tokens[at].closes
            given = ", ".join(self._joined(*part) for part in _split(tokens, at + 1, closed))
            behind = closed + 1
            if behind < last and tokens[behind].text == "{":
                behind = tokens[behind].closes + 1
            return behind, f"new {name}({given})"
        while at < last and tokens[at].text == "[":
            at = tokens[at].closes + 1
        if at >= last or tokens[at].text != "{":
            raise SourceError("an array is created without its values")
        return tokens[at].closes + 1, f"new {name}[]{self._joined(at, tokens[at].closes + 1)}"
