"""Conversion of measures by exact factors."""

from __future__ import annotations

import re
from fractions import Fraction

from probe.tools.execution.failure import Failure

_INCH, _POUND = Fraction("0.0254"), Fraction("0.45359237")
_GALLON, _UK_GALLON = 231 * _INCH**3, Fraction("0.00454609")
_HOUR = 3600
_MILE = 63360 * _INCH

_TABLE: dict[str, dict[str, tuple[Fraction | int | str, str]]] = {
    "length": {
        "meter": (1, "m metre"),
        "kilometer": (1000, "km kilometre"),
        "centimeter": ("0.01", "cm centimetre"),
        "millimeter": ("0.001", "mm millimetre"),
        "micrometer": ("1e-6", "um µm μm micrometre micron"),
        "nanometer": ("1e-9", "nm nanometre"),
        "inch": (_INCH, "in inches"),
        "foot": (12 * _INCH, "ft feet"),
        "yard": (36 * _INCH, "yd"),
        "mile": (_MILE, "mi"),
        "nautical_mile": (1852, "nmi"),
    },
    "mass": {
        "kilogram": (1, "kg kilo kilogramme"),
        "gram": ("0.001", "g gramme"),
        "milligram": ("1e-6", "mg"),
        "microgram": ("1e-9", "ug µg μg mcg"),
        "tonne": (1000, "t metric_ton"),
        "pound": (_POUND, "lb"),
        "ounce": (_POUND / 16, "oz"),
        "stone": (14 * _POUND, "st stone"),
        "short_ton": (2000 * _POUND, "us_ton"),
        "long_ton": (2240 * _POUND, "imperial_ton"),
    },
    "volume": {
        "cubic_meter": (1, "m3 m^3 m³ cubic_metre"),
        "cubic_centimeter": ("1e-6", "cm3 cm^3 cm³ cc cubic_centimetre"),
        "cubic_foot": (1728 * _INCH**3, "ft3 ft^3 ft³ cubic_feet"),
        "cubic_inch": (_INCH**3, "in3 in^3 in³ cubic_inches"),
        "liter": ("0.001", "l litre"),
        "milliliter": ("1e-6", "ml millilitre"),
        "centiliter": ("1e-5", "cl centilitre"),
        "deciliter": ("1e-4", "dl decilitre"),
        "gallon": (_GALLON, "gal us_gallon"),
        "quart": (_GALLON / 4, "qt us_quart"),
        "pint": (_GALLON / 8, "pt us_pint"),
        "cup": (_GALLON / 16, "us_cup"),
        "fluid_ounce": (_GALLON / 128, "fl_oz floz us_fluid_ounce"),
        "tablespoon": (_GALLON / 256, "tbsp"),
        "teaspoon": (_GALLON / 768, "tsp"),
        "imperial_gallon": (_UK_GALLON, "uk_gallon"),
        "imperial_pint": (_UK_GALLON / 8, "uk_pint"),
        "imperial_fluid_ounce": (_UK_GALLON / 160, "uk_fluid_ounce"),
    },
    "speed": {
        "meter_per_second": (1, "m/s mps metre_per_second"),
        "kilometer_per_hour": (Fraction(1000, _HOUR), "km/h kmh kph kilometre_per_hour km_per_hour"),
        "mile_per_hour": (_MILE / _HOUR, "mph mi/h miles_per_hour"),
        "foot_per_second": (12 * _INCH, "ft/s fps feet_per_second"),
        "knot": (Fraction(1852, _HOUR), "kn kt"),
    },
    "temperature": {
        "kelvin": (1, "k"),
        "celsius": (1, "c centigrade"),
        "fahrenheit": (Fraction(5, 9), "f"),
        "rankine": (Fraction(5, 9), "r"),
    },
}
"""Units by quantity: each one's size in the first unit of the quantity, and other names. US units where they differ."""

_ZERO = {"celsius": Fraction("273.15"), "fahrenheit": Fraction("459.67") * Fraction(5, 9)}
"""Kelvins at the zero of a scale."""


def _names() -> dict[str, tuple[str, str]]:
    names = {}
    for measure, units in _TABLE.items():
        for unit, (_, others) in units.items():
            for name in (unit, *others.split()):
                names[name] = (measure, unit)
    return names


_NAMES = _names()


def convert(value: float, from_unit: str, to_unit: str) -> dict[str, object]:
    """A measure on another scale: `{value, unit}`, the nearest float of the exact result."""
    measure, unit = _find(from_unit)
    other, wanted = _find(to_unit)
    if measure != other:
        raise Failure(f"{from_unit} measures {measure} and {to_unit} {other}: give two units of one measure")
    base = Fraction(repr(value)) * _size(measure, unit) + _ZERO.get(unit, 0)
    if measure == "temperature" and base < 0:
        raise Failure(f"{value} {from_unit} is below absolute zero")
    result = (base - _ZERO.get(wanted, 0)) / _size(measure, wanted)
    try:
        number = float(result)
    except OverflowError:
        raise Failure("the result is too large") from None
    return {
        "value": int(number) if result.denominator == 1 and abs(number) < 2**53 else number,
        "unit": wanted,
    }


def _size(measure: str, unit: str) -> Fraction:
    return Fraction(_TABLE[measure][unit][0])


def _find(name: str) -> tuple[str, str]:
    text = re.sub(r"\s+per\s+", "_per_", name.strip().casefold().replace("°", "").removeprefix("degrees "))
    text = re.sub(r"[\s-]+", "_", text.strip())
    for spelled in (text, text.removesuffix("s"), text.removesuffix("es"), text.replace("s_per_", "_per_")):
        if spelled in _NAMES:
            return _NAMES[spelled]
    units = ", ".join(unit for units in _TABLE.values() for unit in units)
    raise Failure(f"there is no unit {name[:60]!r}: known are {units}")
