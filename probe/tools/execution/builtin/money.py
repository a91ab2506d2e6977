"""Conversion of money by a table of reference rates."""

from __future__ import annotations

import csv
from fractions import Fraction
from pathlib import Path

from probe.tools.execution.builtin.dates import _day
from probe.tools.execution.failure import Failure

_RATES = Path(__file__).with_name("rates.csv")
"""European Central Bank, euro foreign exchange reference rates: units of a currency for one euro, on the last
day of each month that has any. Free to use with the source named."""


def exchange(amount: float, from_currency: str, to_currency: str, on: str | None = None) -> dict[str, object]:
    """`{amount, currency, rate, rate_day}`: rounded to cents half away from zero, by the rates of the last day
    in the table that is not after `on`."""
    table = _table()
    day = max(table) if on is None else _rate_day(table, on)
    rates = {"EUR": Fraction(1)} | table[day]
    rate = _rate(rates, to_currency) / _rate(rates, from_currency)
    exact = Fraction(repr(amount)) * rate
    cents = int(abs(exact) * 100 + Fraction(1, 2))
    try:
        converted = float(Fraction(cents if exact >= 0 else -cents, 100))
    except OverflowError:
        raise Failure("the result is too large") from None
    return {
        "amount": converted,
        "currency": to_currency.strip().upper(),
        "rate": float(f"{float(rate):.6g}"),
        "rate_day": day,
    }


def _table() -> dict[str, dict[str, Fraction]]:
    with open(_RATES, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(line for line in file if not line.startswith("#"))]
    return {
        row["day"]: {code: Fraction(rate) for code, rate in row.items() if code != "day" and rate}
        for row in rows
    }


def _rate_day(table: dict[str, dict[str, Fraction]], on: str) -> str:
    wanted = _day(on).isoformat()
    known = [day for day in table if day <= wanted]
    if not known:
        raise Failure(f"there is no rate for {wanted}: the first is of {min(table)}")
    return max(known)


def _rate(rates: dict[str, Fraction], code: str) -> Fraction:
    rate = rates.get(code.strip().upper())
    if rate is None:
        raise Failure(f"there is no currency {code[:20]!r}: known are {', '.join(sorted(rates))}")
    return rate
