"""Dates, days of the week and times of the day as people and models write them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from probe.tasks.quantities import WORDS, Mention, ordinals, overlaps

_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_MONTH_NUMBERS = {name[:3]: number for number, name in enumerate(_MONTHS, 1)}
_DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
_MONTH = rf"(?P<month>{'|'.join(_MONTHS)}|{'|'.join(name[:3] for name in _MONTHS)}|sept)\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?:,?\s+(?P<year>\d{4})(?!\d))?"
_DATES = tuple(
    re.compile(rf"(?<![\w/.-]){pattern}(?:T\d{{2}}:\d{{2}}(?::\d{{2}})?)?(?![\w/]|[.:-]\d)", re.IGNORECASE)
    for pattern in (
        rf"{_MONTH}\s+(?:the\s+)?{_DAY}{_YEAR}",
        rf"{_DAY}\s+(?:of\s+)?{_MONTH}{_YEAR}",
        r"(?P<year>\d{4})[-/.](?P<month>\d{1,2})[-/.](?P<day>\d{1,2})",
        r"(?P<month>\d{1,2})(?P<mark>/)(?P<day>\d{1,2})/(?P<year>\d{4})",
        r"(?P<day>\d{1,2})(?P<mark>[.-])(?P<month>\d{1,2})[.-](?P<year>\d{4})",
    )
)
_WEEKDAY = re.compile(
    rf"(?<!\w)(?:(?P<full>{'|'.join(_DAYS)})|(?P<short>Mon|Tues?|Wed|Thu(?:rs?)?|Fri|Sat|Sun)\.?)(?!\w)",
    re.IGNORECASE,
)
_HALF = r"(?P<half>[ap]\.?\s?m\b\.?|in the (?:morning|afternoon|evening)|at night)"
_CLOCKS = tuple(
    re.compile(rf"(?:(?<![\w:.,/])|(?<=\dT)){pattern}", re.IGNORECASE)
    for pattern in (
        rf"(?P<hour>\d{{1,2}}):(?P<minute>\d{{2}})(?::(?P<second>\d{{2}}))?(?:\s?{_HALF}|(?:\s?h(?:ours|rs)?)?(?![\w:]))",
        rf"(?P<hour>\d{{1,2}})(?:\.(?P<minute>\d{{2}}))?\s?{_HALF}",
        r"(?P<hour>\d{1,2})\s?o'clock(?!\w)",
        r"(?P<name>noon|midday|midnight)(?!\w)",
    )
)
_HOURS = "|".join(word for word, n in WORDS.items() if 1 <= n <= 12)
_SPOKEN_MINUTES = "|".join(word for word, n in WORDS.items() if 10 <= n < 60)
_SPOKEN = tuple(
    re.compile(rf"(?<![\w-]){pattern}(?![\w-])(?:\s?{_HALF})?", re.IGNORECASE)
    for pattern in (
        rf"(?P<past>half|a\s+quarter|quarter)\s+(?P<way>past|to)\s+(?P<hour>{_HOURS}|\d{{1,2}})",
        rf"(?P<hour>{_HOURS})\s+o'clock",
        rf"(?P<hour>{_HOURS})[\s-](?P<minute>(?:{_SPOKEN_MINUTES})(?:-(?:one|two|three|four|five|six|seven|eight|nine))?)",
    )
)


@dataclass(frozen=True)
class Date:
    """A day of a year; the year None where it is not said."""

    month: int
    day: int
    year: int | None
    ambiguous: bool = False
    """Whether month and day may be exchanged ("03/05/2025")."""

    def same(self, other: Date) -> bool:
        """Whether both are one day. A year that one of them leaves out is no difference."""
        years = {self.year, other.year} - {None}
        if len(years) > 1:
            return False
        readings = [
            {(date.month, date.day), *([(date.day, date.month)] if date.ambiguous else [])}
            for date in (self, other)
        ]
        return bool(readings[0] & readings[1])


def dates(text: str) -> list[Mention]:
    """Dates with a month and a day, in order."""
    mentions: list[Mention] = []
    for pattern in _DATES:
        for match in pattern.finditer(text):
            if overlaps(mentions, *match.span()):
                continue
            named = match["month"].casefold()[:3]
            month = int(named) if named.isdigit() else _MONTH_NUMBERS[named]
            day, year = int(match["day"]), match["year"]
            mark = match.groupdict().get("mark")
            if month > 12 and day <= 12 and mark:
                month, day = day, month
            if 1 <= month <= 12 and 1 <= day <= 31:
                date = Date(
                    month, day, int(year) if year else None, bool(mark) and month != day and day <= 12
                )
                mentions.append(Mention(date, *match.span()))
    for match in re.finditer(rf"(?<!\w)(?:of\s+)?{_MONTH}(?!\w)", text, re.IGNORECASE):
        # "the fifth of March", "March the fifth"
        for ordinal in ordinals(text):
            gaps = text[ordinal.end : match.start()], text[match.end() : ordinal.start]
            near = (ordinal.end <= match.start() and not gaps[0].strip()) or (
                ordinal.start >= match.end() and gaps[1].strip() in ("", "the")
            )
            start, end = min(ordinal.start, match.start()), max(ordinal.end, match.end())
            if near and not overlaps(mentions, start, end):
                month = _MONTH_NUMBERS[match["month"].casefold()[:3]]
                if 1 <= ordinal.value <= 31:
                    mentions.append(Mention(Date(month, ordinal.value, None), start, end))
    return sorted(mentions, key=lambda mention: mention.start)


def weekdays(text: str) -> list[Mention]:
    """Days of the week as numbers, Monday 0, in order."""
    mentions = []
    for match in _WEEKDAY.finditer(text):
        short = match["short"]
        if short and not short[0].isupper():
            continue  # "sat", "sun" and "wed" are words as well
        name = (match["full"] or short).casefold()[:3]
        mentions.append(Mention([day[:3] for day in _DAYS].index(name), *match.span()))
    return mentions


def times(text: str) -> list[Mention]:
    """Times of the day as seconds after midnight, in order; without "am" or "pm" on a clock of 24 hours."""
    mentions: list[Mention] = []
    for pattern in (*_CLOCKS, *_SPOKEN):
        for match in pattern.finditer(text):
            if overlaps(mentions, *match.span()):
                continue
            seconds = _seconds({name: value for name, value in match.groupdict().items() if value})
            if seconds is not None:
                mentions.append(Mention(seconds, *match.span()))
    return sorted(mentions, key=lambda mention: mention.start)


def _seconds(parts: dict[str, str]) -> int | None:
    if "name" in parts:
        return 0 if parts["name"].casefold() == "midnight" else 12 * 3600
    hour, minute, second = (_count(parts.get(name, "0")) for name in ("hour", "minute", "second"))
    if "past" in parts:
        minute = 30 if parts["past"].casefold() == "half" else 15
        if parts["way"].casefold() == "to":
            hour, minute = hour - 1, 60 - minute
    half = parts.get("half", "").casefold()
    if half:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if half[0] == "p" or half.endswith(("noon", "evening", "night")) else 0)
    if hour == 24 and not minute and not second:
        hour = 0
    if not (0 <= hour < 24 and minute < 60 and second < 60):
        return None
    return 3600 * hour + 60 * minute + second


def _count(written: str) -> int:
    if written.isdigit():
        return int(written)
    return sum(WORDS[word] for word in written.casefold().split("-"))
