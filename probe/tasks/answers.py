"""Whether what was said is the answer that was expected: numbers by value, text by its words."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_ALONE = re.compile(rf"(?<![\w.,])(?:{_NUMBER.pattern})(?![\w]|[.,]\d)")
_ARTICLES = ("a", "an", "the")
_OUTER_MARKS = ".,;:!?\"'`()[]{}*_“”‘’«»…。！？、"


def same_answer(answer: str, expected: str | float | int) -> bool:
    """Numbers by value, text without case, articles and punctuation around words.

    The number that counts is the first one said, after the last equals sign where there is one ("14 * 12 = 168").
    """
    want = _number(str(expected))
    if want is not None:
        number = _NUMBER.search(answer.rpartition("=")[2])
        return number is not None and _number(number.group()) == want
    return _bare(answer) == _bare(str(expected))


def says_answer(text: str, expected: str | float | int) -> bool:
    """Whether an agent's last turn says the expected answer: alone, after "answer is", or as a part of its prose.

    A number must stand there by itself ("17 days", not "2017"); text must occur as whole words.
    """
    if same_answer(text, expected):
        return True
    want = _number(str(expected))
    if want is not None:
        return any(_number(match.group()) == want for match in _ALONE.finditer(text))
    return f" {_bare(str(expected))} " in f" {_bare(text)} "


def _number(text: str) -> float | None:
    bare = text.strip().rstrip(".").lstrip("$")
    return float(bare.replace(",", "")) if _NUMBER.fullmatch(bare) else None


def _bare(text: str) -> str:
    words = [bare for word in text.casefold().split() if (bare := word.strip(_OUTER_MARKS))]
    # An answer may be an article alone (option A) or a mark alone.
    return " ".join([word for word in words if word not in _ARTICLES] or words or text.split())
