"""Arithmetic on calendar days. It knows no today, so that a call gives the same result on every day."""

from __future__ import annotations

import re
from datetime import date, timedelta

from probe.tools.execution.failure import Failure

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def calculate(start: str, end: str | None = None, add_days: int | None = None) -> dict[str, object]:
    """`{start, weekday}`, with `days` (negative backwards) to an `end`, and `result` after `add_days`."""
    first = _day(start)
    result: dict[str, object] = {"start": first.isoformat(), "weekday": _weekday(first)}
    if end is not None:
        last = _day(end)
        result |= {"end": last.isoformat(), "end_weekday": _weekday(last), "days": (last - first).days}
    if add_days is not None:
        try:
            moved = first + timedelta(days=add_days)
        except OverflowError:
            raise Failure("the result is outside the years 1 to 9999") from None
        result |= {"result": moved.isoformat(), "result_weekday": _weekday(moved)}
    return result


def _weekday(day: date) -> str:
    return _DAYS[day.weekday()]


def _day(text: str) -> date:
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text.strip()):
        try:
            return date.fromisoformat(text.strip())
        except ValueError as error:
            raise Failure(f"{text.strip()!r} is no day of the calendar ({error})") from None
    raise Failure(f"{text[:40]!r} is no day: write YYYY-MM-DD")
