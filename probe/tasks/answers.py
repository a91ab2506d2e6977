"""Whether what a model says is the answer that was expected, compared by the type of the answer.

A type is given (a task's `answer_type`) or read off the expected answer. Of an answer in a sentence the value that it
states is compared: what stands behind the last equals sign, behind "so" or "the answer is", or behind "is"; else the
first. What is negated ("not Ben"), only compared with ("taller than Kim") or left open ("Ben or Kim") is not stated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from probe.tasks.answer_types import AnswerType
from probe.tasks.dates import Date, dates, times, weekdays
from probe.tasks.markup import plain
from probe.tasks.quantities import Mention, Quantity, close, numbers, ordinals, overlaps, ranges
from probe.tasks.statements import (
    ARTICLES,
    CONCLUDES,
    NEAR,
    OUTER_MARKS,
    affirmed,
    bare,
    is_sentence,
    names,
    occurrences,
    stated,
)

_READERS: dict[str, Callable[[str], list[Mention]]] = {
    "date": dates,
    "weekday": weekdays,
    "time": times,
    "range": ranges,
    "ordinal": ordinals,
    "number": numbers,
}
"""Types whose values can be found in a text, in the order in which they are tried."""
_HIDES = {
    "number": ("date", "time", "range"),
    "ordinal": ("date",),
    "range": ("date",),
    "time": ("date",),
}
"""Type → types whose mentions are none of it: the 5 of "March 5" is no number."""


def same_answer(answer: str, expected: str | float | int, answer_type: AnswerType | None = None) -> bool:
    """Whether an answer states what is expected. An empty answer is never the same.

    >>> same_answer("Ben is the tallest.", "Ben"), same_answer("10:9.", "10:30"), same_answer("2500 m", "2.5 km")
    (True, False, True)
    """
    if not answer.strip():
        return False
    want = str(expected)
    if answer.split() == want.split():
        return True
    answer, want = plain(answer), plain(want)
    kind = answer_type or type_of(want)
    if kind == "text" and is_sentence(want):
        return _same_statement(answer, want)
    return _COMPARERS[kind](answer, want)


def says_answer(text: str, expected: str | float | int, answer_type: AnswerType | None = None) -> bool:
    """Whether a text states the expected answer, or mentions it anywhere without denying it, as an agent's prose may."""
    if same_answer(text, expected, answer_type):
        return True
    text, want = plain(text), plain(str(expected))
    kind = answer_type or type_of(want)
    if kind in _READERS:
        value = _whole(kind, want)
        return value is not None and any(
            _same_value(mention.value, value)
            for mention in _mentions(kind, text)
            if not _DENIED.search(_before(text, mention))
        )
    return kind == "text" and bool(occurrences(text, want)) and stated(text, want) is not False


def type_of(expected: str) -> AnswerType:
    """The type that an expected answer has by its form: `text` for a name, words or a sentence."""
    text = plain(expected)
    if text.strip(OUTER_MARKS).casefold() in _POLARITY:
        return "yes_no"
    if re.fullmatch(r"(?:[Oo]ption\s+)?[([]?\s*[A-Ja-j]\s*[)\].:]?", text):
        return "option"
    for kind in _READERS:
        if _whole(kind, text) is not None:
            return kind  # pyright: ignore[reportReturnType]
    items = _items(text)
    if len(items) > 1 and not is_sentence(text):
        pair = len(items) == 2 and not re.search(r"[,;\[(]", text)
        return "set" if pair or text.startswith("{") else "list"
    return "text"


def is_of_type(expected: str | float | int, answer_type: AnswerType) -> bool:
    """Whether an expected answer can be read as one of a type."""
    text = plain(str(expected))
    if answer_type in _READERS:
        return _whole(answer_type, text) is not None
    if answer_type == "yes_no":
        return _polarity(text) is not None
    if answer_type == "option":
        return _option(text) is not None
    return bool(text)


# -- values in a sentence ----------------------------------------------------------------------------------------------

_RESULT = re.compile(
    r"(?:\b(?:is|are|was|were|be|makes?|gives?|leaves?|equals?|(?:ends|finishes|arrives|closes) at|comes to)|'s|[=:≈→]|->)"
    r"\s+(?:(?:then|only|about|exactly|just|on|at|in|a|an|the|of|now|therefore|really)\s+)*\Z|[=:≈]\Z",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"(?:\b(?:not|never|no|neither|nor|except|unlike|rather than|instead of|than|at least|at most|up to)|n't)\s+"
    r"(?:(?:on|at|in|to|by|for|of|from|about|exactly|be|is|are|a|an|the)\s+)*\Z|[<>≤≥±]\s*\Z",
    re.IGNORECASE,
)
_FROM_WHERE = re.compile(
    r"(?:\b(?:of|after|before|from|since|until|till|by|plus|minus|times|at)\s+(?:an?\s+|the\s+)?|[-+*/×]\s*)\Z",
    re.IGNORECASE,
)
_OPERATOR = re.compile(r"\s*[-+*/×]\s*\d|\s+(?:plus|minus|times)\s")
_OR = re.compile(r"\s*,?\s*(?:or|nor)\s+(?:(?:on|at|in|to|a|an|the)\s+)*", re.IGNORECASE)
_AND = re.compile(r"\s*(?:,|and|,\s*and|&)\s*", re.IGNORECASE)


def _mentions(kind: str, text: str) -> list[Mention]:
    hidden = [mention for other in _HIDES.get(kind, ()) for mention in _READERS[other](text)]
    return [mention for mention in _READERS[kind](text) if not overlaps(hidden, mention.start, mention.end)]


def _whole(kind: str, text: str) -> Any:
    """The value that the whole of a text is; None where it says more, or something else."""
    text = re.sub(r"\A(?:on|at)\s+", "", text.strip(" .!"), flags=re.IGNORECASE)
    if kind == "date":
        text = text.replace(",", " ")
        text = re.sub(r"\s+", " ", "".join(_left_out(text, weekdays(text)))).strip()
    mentions = _mentions(kind, text)
    if len(mentions) != 1:
        return None
    rest = "".join(_left_out(text, mentions)).strip(" .,()").casefold()
    if kind == "number" and len(text[mentions[0].start : mentions[0].end].split()) > 4:
        return None
    if kind == "number" and mentions[0].value.unit:
        rest = re.sub(r"\Aof\s+[a-z]+(?:\s[a-z]+)?\Z", "", rest)
    return (
        mentions[0].value if rest in ("", "place", *ARTICLES) or (kind == "time" and rest == "at") else None
    )


def _left_out(text: str, mentions: Sequence[Mention]) -> list[str]:
    pieces, at = [], 0
    for mention in mentions:
        pieces.append(text[at : mention.start])
        at = mention.end
    return [*pieces, text[at:]]


def _before(text: str, mention: Mention, start: int = 0) -> str:
    return text[max(start, mention.start - NEAR) : mention.start]


def _stated_value(kind: str, text: str) -> Any:
    """The value of a type that a text states; None where it states none, or more than one."""
    mentions = _mentions(kind, text)
    start = 0
    for match in CONCLUDES.finditer(text):
        if any(mention.start >= match.end() for mention in mentions):
            start = match.end()
    if kind == "number":
        equals = [match.end() for match in re.finditer("[=≈]", text) if match.end() > start]
        start = max([at for at in equals if any(mention.start >= at for mention in mentions)], default=start)
    mentions = [mention for mention in mentions if mention.start >= start]
    if (
        kind == "number"
        and start == 0
        and "=" in text
        and not any(m.start > text.rindex("=") for m in mentions)
    ):
        return None  # an equation without a result
    claims = [mention for mention in mentions if not _DENIED.search(_before(text, mention, start))]
    for left, right in zip(mentions, mentions[1:], strict=False):
        if _OR.fullmatch(text[left.end : right.start]):
            claims = [mention for mention in claims if mention not in (left, right)]
    free = [
        mention
        for mention in claims
        if _RESULT.search(_before(text, mention, start))
        or not (_FROM_WHERE.search(_before(text, mention, start)) or _OPERATOR.match(text, mention.end))
    ]
    claims = free or claims
    results = [mention for mention in claims if _RESULT.search(_before(text, mention, start))]
    chosen = results[-1] if results else claims[0] if claims else None
    if chosen is None:
        return None
    neighbours = claims[claims.index(chosen) + 1 :][:1]
    if kind != "weekday" and any(_AND.fullmatch(text[chosen.end : other.start]) for other in neighbours):
        return None  # a list
    return chosen.value


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, Quantity | Date):
        return a.same(b)
    if isinstance(a, tuple):
        # A unit behind the second bound is that of both.
        return a[1].same(b[1]) and close(a[0].value, b[0].value)
    return a == b


def _compare_values(kind: str) -> Callable[[str, str], bool]:
    def compare(answer: str, want: str) -> bool:
        value, claim = _whole(kind, want), _stated_value(kind, answer)
        value = _stated_value(kind, want) if value is None else value
        if value is None:
            return bare(answer) == bare(want)
        if claim is None and kind == "ordinal":
            quantity = _whole("number", answer)
            return quantity is not None and quantity.unit == "" and quantity.value == value
        return claim is not None and _same_value(claim, value)

    return compare


# -- yes or no, options ----------------------------------------------------------------------------------------------

_POLARITY = {"yes": True, "yeah": True, "yep": True, "true": True, "no": False, "nope": False, "false": False}


def _polarity(text: str) -> bool | None:
    """Yes or no, where a text begins with it or ends a clause with it."""
    if text.strip(OUTER_MARKS).casefold() in ("y", "n"):
        return text.strip(OUTER_MARKS).casefold() == "y"
    pattern = rf"\b({'|'.join(_POLARITY)})\b"
    matches = list(re.finditer(pattern, text, re.IGNORECASE))
    if not matches:
        return None
    first = matches[0]
    if re.fullmatch(r"\W*", text[: first.start()]):
        if re.match(r"\s*,?\s*(?:or|and)\s+(?:yes|no|true|false)\b", text[first.end() :], re.IGNORECASE) or (
            re.match(r"\s+\w", text[first.end() :]) and first[0].casefold() == "no"
        ):
            return None
        return _POLARITY[first[0].casefold()]
    for match in reversed(matches):
        ends = re.match(r"\s*(?:[.,;:!]|\Z)", text[match.end() :])
        if (
            ends
            and not _DENIED.search(text[: match.start()])
            and not re.search(r"\bor\s+\Z", text[: match.start()])
        ):
            return _POLARITY[match[0].casefold()]
    return None


def _compare_polarity(answer: str, want: str) -> bool:
    value = _polarity(answer)
    return value is not None and value == _polarity(want)


def _option(text: str) -> str | None:
    """The letter of the option that a text states, as a capital; None where it states none, or several."""
    alone = re.match(
        r"\W*(?:(?:option|choice|answer)\s*:?\s*)?[([]?([A-Za-z])(?:\s*[)\].:]|\s+-\s|\s*\Z)",
        text,
        re.IGNORECASE,
    )
    if alone:
        return alone[1].upper()
    letters = [
        match
        for match in re.finditer(r"(?<![\w'])[A-Z](?![\w'])", text)
        if match[0] not in "AI"
        or re.search(r"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s\Z|\(\Z", text[: match.start()])
        or not re.match(r"\s+(?!is\b|was\b|because\b|since\b|as\b)[a-z]", text[match.end() :])
    ]
    claims = {match[0] for match in letters if affirmed(text, match.start(), match.end())}
    return claims.pop() if len(claims) == 1 else None


def _compare_options(answer: str, want: str) -> bool:
    value = _option(answer)
    return value is not None and value == _option(want)


# -- names and words ----------------------------------------------------------------------------------------------


def _compare_texts(answer: str, want: str) -> bool:
    if bare(answer) == bare(want):
        return True
    return stated(answer, want) is True


def _same_statement(answer: str, want: str) -> bool:
    """Whether two texts, one of which is a sentence, state the same."""
    if bare(answer) == bare(want):
        return True
    kind = type_of(answer)
    if kind != "text":
        return _COMPARERS[kind](want, answer)
    if not is_sentence(answer):
        return stated(want, answer) is True
    named = [
        {name for name in {match[0] for match in names(text)} if stated(text, name)}
        for text in (answer, want)
    ]
    if any(named):
        return named[0] == named[1]
    for kind in _READERS:
        values = [_stated_value(kind, text) for text in (answer, want)]
        if any(value is not None for value in values):
            return all(value is not None for value in values) and _same_value(*values)
    return False


# -- lists ----------------------------------------------------------------------------------------------


def _items(text: str) -> list[str]:
    text = re.sub(r"(?m)^\s*(?:[-•*]|\d+[.)])\s+", "", text.strip()).rstrip(".")
    bracketed = re.fullmatch(r"\s*[\[({](.*)[\])}]\s*", text, re.DOTALL)
    pieces = re.split(
        r"\s*[;\n]\s*|\s*,\s*(?:and\s+)?|\s+and\s+|\s*[&<>]\s*", bracketed[1] if bracketed else text
    )
    return [piece for piece in pieces if piece.strip()]


def _compare_lists(answer: str, want: str, *, ordered: bool = True) -> bool:
    wanted = _items(want)
    starts = [0, *(match.end() for match in re.finditer(r"\b(?:is|are|be)\s+|[:=]\s*", answer))]
    for start in starts:
        items = _items(answer[start:])
        if len(items) != len(wanted):
            continue
        left = list(items)
        for item in wanted:
            options = left[:1] if ordered else left
            match = next((other for other in options if same_answer(other, item)), None)
            if match is None:
                break
            left.remove(match)
        if not left:
            return True
    return ordered and _compare_texts(answer, want)


_COMPARERS: dict[str, Callable[[str, str], bool]] = {
    **{kind: _compare_values(kind) for kind in _READERS},
    "yes_no": _compare_polarity,
    "option": _compare_options,
    "text": _compare_texts,
    "list": _compare_lists,
    "set": lambda answer, want: _compare_lists(answer, want, ordered=False),
}
