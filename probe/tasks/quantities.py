"""Numbers with their units as people and models write them: digits, words, fractions, percent, money, measures.

Values are exact fractions. Numbers are normalised by the rules of math-verify: thousands separators and decimal commas,
LaTeX, percent beside its number and its hundredth, units that one side leaves out. Measures in different units are
converted by pint, which is loaded only for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WORDS = {word: n for n, word in enumerate(_ONES)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
"""Words for the numbers below a hundred that are one word."""
_SIZES = {
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
_IRREGULAR = {"first": 1, "second": 2, "third": 3, "fifth": 5, "eighth": 8, "ninth": 9, "twelfth": 12}
_ORDINALS = (
    {f"{word}th": n for word, n in WORDS.items() if 3 < n < 20}
    | {f"{word[:-1]}ieth": n for word, n in WORDS.items() if n >= 20}
    | _IRREGULAR
)
_PARTS = {f"{word}{s}": n for word, n in _ORDINALS.items() if 2 < n <= 20 for s in ("", "s")} | {
    "half": 2,
    "halves": 2,
    "quarter": 4,
    "quarters": 4,
}


def _either(words: Any) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_DIGITS = r"(?:\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:[, ']\d{3})+(?!\d)(?:\.\d+)?|\d+,(?!\d{3}(?!\d))\d+|0,\d+|\d+(?:\.\d+)?|\.\d+)"
_TIMES_TEN = r"\s*[×x*·]\s*10\s*(?:\^|\*\*)\s*[({]?([-+]?\d+)[)}]?"
_SIGN = r"(?:(?<![\w.)\]%])[-+]|\b(?:minus|negative)\s+)"
_DIGITAL = re.compile(
    rf"(?<![\w.,:/^])(?<!\d[ -])(?P<sign>{_SIGN}?)\s?(?P<money>(?:US)?[$€£¥])?\s?(?P<sign2>-?)(?:(?P<whole>\d+)\s+(?=\d+\s?/\s?\d))?"
    rf"(?P<a>{_DIGITS})(?:[eE](?P<e>[-+]?\d+)|(?P<ten>{_TIMES_TEN})|\s?/\s?(?P<b>\d+)(?![/.,]?\d)|\^(?P<power>-?\d+))?"
    rf"(?!_|\d|(?:st|nd|rd|th)\b|[.,:/]\d)"
)
_MOST_SIGNS = 400
"""Longer rows of digits are no number that is compared."""
_WORD = rf"(?:{_either([*WORDS, *_SIZES])})"
_VERBAL = re.compile(
    rf"(?<![\w-])(?P<sign>(?:minus|negative)\s+)?(?:(?:an?|one)\s+)?(?P<words>{_WORD}(?:(?:\s+and\s+|[\s-]+){_WORD})*)(?:\s+point(?P<decimals>(?:\s+(?:{_either(_ONES[:10])}))+)|(?P<half>\s+and\s+a\s+half))?(?![\w-])",
    re.IGNORECASE,
)
_PART = re.compile(
    rf"(?<![\w-])(?:(?P<n>an?|{_WORD})[\s-]+)?(?P<part>{_either(_PARTS)})(?![\w-])", re.IGNORECASE
)
_ORDINAL = re.compile(
    rf"(?<![\w-])(?:(?P<digits>\d{{1,9}})(?:st|nd|rd|th)|(?:(?P<tens>{_either(_TENS)})[\s-])?(?P<word>{_either(_ORDINALS)}))(?![\w-])",
    re.IGNORECASE,
)
_MULTIPLE = re.compile(rf"\s?(?:({_either(_SIZES)})\b|(k|K)(?![\w/])|(m|mn|M|bn|B)(?![\w/]))")
_PERCENT = re.compile(r"\s?(?:%|per\s?cent\b|percent(?:age)?\b|pct\b)", re.IGNORECASE)
_RANGE = re.compile(r"\s?(?:-|–|—)\s?|\s+(?:to|through|until)\s+|\s+and\s+", re.IGNORECASE)

_MONEY = {
    "$": "$", "us$": "$", "dollar": "$", "usd": "$", "buck": "$", "€": "€", "euro": "€", "eur": "€", "£": "£",
    "gbp": "£", "¥": "¥", "yen": "¥", "jpy": "¥", "cent": "¢", "¢": "¢",
}  # fmt: skip
_WITHOUT_UNIT = frozenset([
    "a", "an", "and", "are", "as", "at", "be", "because", "but", "by", "each", "for", "from", "had",
    "has", "have", "he", "i", "if", "in", "into", "is", "it", "its", "left", "more", "not",
    "of", "off", "on", "or", "out", "over", "per", "she", "since", "so", "still", "than", "that", "the",
    "then", "there", "they", "this", "to", "total", "under", "until", "was", "were", "when", "which",
    "who", "will", "with", "would", "you", "x",
])  # fmt: skip
_PLAIN_WORD = re.compile(r"\s?-?\s?([A-Za-zµμ°Ω²³$€£¥¢][A-Za-zµμ°Ω²³'$-]*(?:\^?[23](?!\d))?)")
_OVER = re.compile(r"\s?/\s?([A-Za-z]+[²³]?)|\s+(?:per|an?|each)\s+([a-z]+)")
_COMPOUND = re.compile(r"\s*(?:,|and|,\s*and)?\s*", re.IGNORECASE)
_BELOW = (
    ["week", "day", "hour", "minute", "second"],
    ["mile", "yard", "foot", "inch"],
    ["kilometer", "meter", "centimeter", "millimeter"],
    ["stone", "pound", "ounce"],
    ["kilogram", "gram"],
    ["$", "¢"],
    ["€", "¢"],
)
"""Units that are said together, the larger first."""
_SPELLED = {
    "c": "degC", "f": "degF", "°c": "degC", "°f": "degF", "celsius": "degC", "fahrenheit": "degF", "°": "degree",
    "Mb": "megabit", "Gb": "gigabit", "kb": "kilobyte", "KB": "kilobyte", "Kb": "kilobit",
}  # fmt: skip
"""What people write, and pint's name for it."""


@dataclass(frozen=True)
class Quantity:
    """A number with its unit, or several that are said together ("1 hour and 30 minutes")."""

    parts: tuple[tuple[Fraction, str], ...]
    """Values and units, as written; the unit is "" for none, "%" for percent, a sign for money."""

    @property
    def value(self) -> Fraction:
        return self.parts[0][0]

    @property
    def unit(self) -> str:
        return self.parts[0][1]

    def same(self, other: Quantity) -> bool:
        """Whether both are one quantity. A unit that one of them leaves out is no difference."""
        if len(self.parts) == len(other.parts) == 1:
            return _same_single(self.value, self.unit, other.value, other.unit)
        if any(not unit for _, unit in (*self.parts, *other.parts)):
            return False
        return _same_measure(self.parts, other.parts)


@dataclass(frozen=True)
class Mention:
    """A value and where in a text it is said."""

    value: Any
    start: int
    end: int


def overlaps(mentions: Iterable[Mention], start: int, end: int) -> bool:
    """Whether one of the mentions shares a character with text[start:end]."""
    return any(start < mention.end and mention.start < end for mention in mentions)


def numbers(text: str) -> list[Mention]:
    """Quantities in a text, in order; numbers that are part of a word, a time, a date or an ordinal are none."""
    mentions = [mention for match in _DIGITAL.finditer(text) if (mention := _digital(text, match))]
    verbal = list(_VERBAL.finditer(text))
    mixed = [match for match in verbal if match["half"] or match["decimals"]]
    for matches, read in ((mixed, _verbal), (_PART.finditer(text), _part), (verbal, _verbal)):
        for match in matches:
            if overlaps(mentions, *match.span()):
                continue
            value = read(match)
            if value is None or (match[0].casefold() == "one" and mentions):
                continue
            mentions.append(_with_unit(text, match.start(), match.end(), value))
    mentions.sort(key=lambda mention: mention.start)
    return _joined(text, mentions)


def ordinals(text: str) -> list[Mention]:
    """Ordinals in a text as whole numbers, in order: 3 for "3rd" and "third"."""
    mentions = []
    for match in _ORDINAL.finditer(text):
        tens = WORDS[match["tens"].casefold()] if match["tens"] else 0
        value = int(match["digits"]) if match["digits"] else tens + _ORDINALS[match["word"].casefold()]
        mentions.append(Mention(value, *match.span()))
    return mentions


def ranges(text: str) -> list[Mention]:
    """Pairs of quantities that a text gives as bounds ("5-7", "5 to 7", "between 5 and 7")."""
    mentions: list[Mention] = []
    if not re.search(r"\d\s?/\s?\d", text):
        text = re.sub(r"(?<=\d)[-–—](?=\d)", " to ", text)
    bounds = numbers(text)
    for low, high in zip(bounds, bounds[1:], strict=False):
        gap = text[low.end : high.start]
        if not _RANGE.fullmatch(gap):
            continue
        between = re.search(r"\bbetween\s+\Z", text[: low.start], re.IGNORECASE)
        if (gap.strip().casefold() == "and") != bool(between):
            continue
        if gap in (" - ", " – ") and text.strip(" .") != text[low.start : high.end]:
            continue  # a difference
        before = re.search(r"\b(?:between|from)\s+\Z", text[: low.start], re.IGNORECASE)
        mentions.append(Mention((low.value, high.value), before.start() if before else low.start, high.end))
    return mentions


# -- reading -------------------------------------------------------------------------------------------------------


def _digital(text: str, match: re.Match[str]) -> Mention | None:
    if len(match[0]) > _MOST_SIGNS:
        return None
    value = _decimal(match["a"])
    if match["b"]:
        if not int(match["b"]):
            return None
        value = value / int(match["b"]) + int(match["whole"] or 0)
    exponent = match["e"] or (re.sub(r".*?([-+]?\d+)[)}]?\Z", r"\1", match["ten"]) if match["ten"] else None)
    if exponent is not None:
        if abs(int(exponent)) > 400:
            return None
        value *= Fraction(10) ** int(exponent)
    if match["power"]:
        if abs(int(match["power"])) > 400 or len(match["a"]) > 20 or not value:
            return None
        value = value ** int(match["power"])
    if match["sign"].strip().casefold() in ("-", "minus", "negative") or match["sign2"]:
        value = -value
    start, money = match.start(), match["money"]
    while start < match.end() and text[start].isspace():
        start += 1
    if code := re.search(r"\b(USD|EUR|GBP|JPY)\s?\Z", text[:start]):
        start, money = code.start(), code[1]
    mention = _with_unit(text, start, match.end(), value, money=bool(money))
    if not money:
        return mention
    return Mention(Quantity(((mention.value.value, _MONEY[money.casefold()]),)), start, mention.end)


def _decimal(written: str) -> Fraction:
    if re.fullmatch(r"\d+,\d+", written) and (len(written.rpartition(",")[2]) != 3 or written[0] == "0"):
        return Fraction(written.replace(",", "."))
    if "." in written and "," in written.rpartition(".")[2]:  # 1.234,50
        written = written.replace(".", "").replace(",", ".")
    bare = re.sub(r"[, ']", "", written)
    return Fraction(bare if bare[0] != "." else f"0{bare}")


def _verbal(match: re.Match[str]) -> Fraction | None:
    total = current = 0
    words = [word for word in re.split(r"[\s-]+", match["words"].casefold()) if word != "and"]
    last = None
    for word in words:
        if word in _SIZES:
            size = _SIZES[word]
            if size >= 1000:
                total, current = total + (current or 1) * size, 0
            else:
                current = (current or 1) * size
        else:
            n = WORDS[word]
            if last is not None and last in WORDS and not (WORDS[last] >= 20 and n < 10):
                return None  # two numbers side by side, as in "ten thirty"
            current += n
        last = word
    value = Fraction(total + current) + (Fraction(1, 2) if match["half"] else 0)
    if match["decimals"]:
        value += Fraction("0." + "".join(str(WORDS[word]) for word in match["decimals"].casefold().split()))
    return -value if match["sign"] else value


def _part(match: re.Match[str]) -> Fraction | None:
    n, part = match["n"], match["part"].casefold()
    if n is None and part != "half":
        return None  # "third" alone is an ordinal
    whole = 1 if n is None or n.casefold() in ("a", "an") else WORDS.get(n.casefold())
    return None if whole is None else Fraction(whole, _PARTS[part])


def _with_unit(text: str, start: int, end: int, value: Fraction, *, money: bool = False) -> Mention:
    multiple = _MULTIPLE.match(text, end)
    if multiple and (multiple[1] or (multiple[2] and text[end] in "kK") or (multiple[3] and money)):
        word = multiple[1] or multiple[2] or multiple[3]
        size = _SIZES.get(word) or {"k": 1000, "K": 1000, "m": 10**6, "mn": 10**6, "M": 10**6}.get(
            word, 10**9
        )
        value, end = value * size, multiple.end()
    percent = _PERCENT.match(text, end)
    if percent:
        return Mention(Quantity(((value, "%"),)), start, percent.end())
    words, at = [], end
    while len(words) < 3 and (match := _PLAIN_WORD.match(text, at)):
        word = match[1].rstrip("-'")
        following = text[match.end() :]
        if word.casefold() in _WITHOUT_UNIT and not (
            word == "in" and not words and re.match(r"\W*\Z", following)
        ):
            break
        words.append(word)
        at = match.end()
        over = _OVER.match(text, at)
        if over and (over[1] or over[2]):
            words[-1] += f"/{over[1] or over[2]}"
            at = over.end()
            break
        if word in ("$", "€", "£", "¥") or word.casefold().rstrip("s") in _MONEY:
            break
    unit = " ".join(words)
    if len(words) > 1 and _singular(words[0]) in {name for names in _BELOW for name in names} | {*_MONEY}:
        unit, at = words[0], end + len(text[end:].partition(words[0])[0]) + len(words[0])
    if _singular(unit) in _MONEY:
        unit = _MONEY[_singular(unit)]
    return Mention(Quantity(((value, unit),)), start, at if words else end)


def _joined(text: str, mentions: list[Mention]) -> list[Mention]:
    """The mentions, those that are said together as one ("5 feet 3 inches")."""
    joined: list[Mention] = []
    for mention in mentions:
        last = joined[-1] if joined else None
        if last and _COMPOUND.fullmatch(text[last.end : mention.start]) and _below(last.value, mention.value):
            parts = last.value.parts + mention.value.parts
            joined[-1] = Mention(Quantity(parts), last.start, mention.end)
        else:
            joined.append(mention)
    return joined


def _below(large: Quantity, small: Quantity) -> bool:
    a, b = _singular(large.parts[-1][1]), _singular(small.unit)
    return any(a in units and b in units[units.index(a) + 1 :] for units in _BELOW)


def _singular(unit: str) -> str:
    """A unit's name in the singular and in full, as far as `_BELOW` and `_MONEY` have it."""
    short = {
        "h": "hour", "hr": "hour", "hrs": "hour", "min": "minute", "mins": "minute", "s": "second", "sec": "second",
        "secs": "second", "ft": "foot", "feet": "foot", "inches": "inch", "in": "inch", "lb": "pound", "lbs": "pound",
        "oz": "ounce", "kg": "kilogram", "g": "gram", "km": "kilometer", "m": "meter", "cm": "centimeter",
        "mm": "millimeter",
    }  # fmt: skip
    word = unit.casefold()
    return short.get(word) or (word[:-1] if word.endswith("s") and len(word) > 2 else word).replace(
        "metre", "meter"
    )


# -- comparing -----------------------------------------------------------------------------------------------------


def close(a: Fraction, b: Fraction) -> bool:
    """Whether two numbers are one: exactly, or as a fraction and its decimal with six digits and more."""
    if a == b:
        return True
    ending, endless = sorted((a, b), key=lambda value: _digits(value) is None)
    digits = _digits(ending)
    return (
        _digits(endless) is None
        and digits is not None
        and digits >= 6
        and abs(a - b) < Fraction(1, 10**digits)
    )


def _digits(value: Fraction) -> int | None:
    """Decimal places; None for a fraction whose decimals do not end."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    return max(twos, fives) if rest == 1 else None


def _same_single(a: Fraction, unit: str, b: Fraction, other: str) -> bool:
    if "%" in (unit, other):
        if unit == other or not (unit and other):
            hundredth = unit != other and close(*((a / 100, b) if unit == "%" else (a, b / 100)))
            return close(a, b) or hundredth
        return False
    if not unit or not other or unit == other or (_singular(unit) == _singular(other) and len(unit) > 3):
        return close(a, b)
    if unit in _MONEY.values() or other in _MONEY.values():
        return _same_money(a, unit, b, other)
    first, second = _measure(unit), _measure(other)
    if first is not None and second is not None:
        if {unit, other} & {"degree", "degrees", "°"} and any(
            "[temperature]" in m.dimensionality for m in (first, second)
        ):
            return close(a, b)  # the scale is left out
        return _same_measure(((a, unit),), ((b, other),))
    return close(a, b) and not _other_things(unit, other)


def _same_money(a: Fraction, unit: str, b: Fraction, other: str) -> bool:
    units = {unit, other}
    if units == {"£", "pounds"} or units == {"£", "pound"}:
        return close(a, b)
    if "¢" in units and units <= {"¢", "$", "€"}:
        return close(a / 100 if unit == "¢" else a, b / 100 if other == "¢" else b)
    # What follows money may be no unit at all ("$2.65 back").
    return close(a, b) and not {*units} <= {*_MONEY.values()} and not _is_unit(unit) and not _is_unit(other)


def _is_unit(unit: str) -> bool:
    return unit not in _MONEY.values() and (_measure(unit) is not None or unit.endswith("s"))


def _other_things(unit: str, other: str) -> bool:
    """Whether two phrases behind a number name different things; what is no plural may be no thing ("12 left")."""
    these, those = ([_singular(word) for word in phrase.split()] for phrase in (unit, other))
    if these[-1] in those or those[-1] in these:
        return False
    return all(phrase.endswith("s") or _measure(phrase) is not None for phrase in (unit, other))


def _same_measure(these: tuple[tuple[Fraction, str], ...], those: tuple[tuple[Fraction, str], ...]) -> bool:
    import pint

    try:
        a, b = _sum(these), _sum(those)
        if a is None or b is None:
            return False
        return math.isclose(a.m, b.m, rel_tol=1e-9) and a.dimensionality == b.dimensionality
    except pint.PintError:
        return False


def _sum(parts: tuple[tuple[Fraction, str], ...]) -> Any:
    """The sum of measures in base units; money counts in units of its own."""
    total = None
    for value, unit in parts:
        measure = _measure(unit)
        if measure is None:
            money = {"$": 1, "€": 1, "£": 1, "¥": 1, "¢": Fraction(1, 100)}.get(unit)
            if money is None:
                return None
            measure, value = _registry().Unit("dimensionless"), value * money
        quantity = _registry().Quantity(float(value), measure).to_base_units()
        total = quantity if total is None else total + quantity
    return total


@cache
def _measure(unit: str) -> Any:
    """pint's unit for what stands behind a number, by its first words; None where that is no unit."""
    import pint

    words = unit.replace("²", "^2").replace("³", "^3").split()
    if not words or unit in ("%", *_MONEY.values()):
        return None
    power = {"square": 2, "sq": 2, "cubic": 3}.get(words[0].casefold())
    if power and len(words) > 1:
        words = [f"{words[1]}^{power}"]
    name = words[0]
    if name.casefold() in ("degrees", "degree", "°") and len(words) > 1:
        name = words[1]
    name = (
        _SPELLED.get(name)
        or (_SPELLED.get(name.casefold()) if len(name) < 3 or name[0] != "M" else None)
        or name
    )
    name = re.sub(r"(?<=[A-Za-z])([23])(?!\d)", r"^\1", name)
    if not re.fullmatch(r"[A-Za-zµμ°Ω]+(?:\^[23])?(?:/[A-Za-z]+(?:\^[23])?)?", name):
        return None
    for spelled in (name, name.casefold(), name.removesuffix("s")):
        try:
            return _registry().parse_units(spelled)
        except (pint.PintError, ValueError, AttributeError, TypeError):
            continue
    return None


@cache
def _registry() -> Any:
    import pint

    return pint.UnitRegistry(autoconvert_offset_to_baseunit=True)
