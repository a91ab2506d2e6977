"""Arithmetic on text: exact where arithmetic is, and never `eval`."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from simpleeval import InvalidExpression, SimpleEval

from probe.tools.execution.failure import Failure

MAX_CHARACTERS = 1000
MAX_BITS = 4096
"""Bits of a numerator or denominator: 1,233 digits, and no operation on such numbers takes noticeable time."""
MAX_DECIMALS = 1000

_PERCENT = object()
"""Right operand of the power that a percent sign becomes: it binds as a postfix sign does."""

Number = Fraction | float


def evaluate(expression: str, decimals: int | None = None) -> str:
    """The value of an expression of numbers, + - * / // % ** ^, parentheses, percentages and functions.

    Exact for rational arithmetic; `decimals` rounds half away from zero, else at most 15 significant digits of
    a fraction are shown and a whole number in full. `15%` and `15% of 80` are percentages; `7 % 3`, with an
    operand after it that starts with a digit, a letter or a parenthesis, is the remainder.
    """
    if decimals is not None and not 0 <= decimals <= MAX_DECIMALS:
        raise Failure(f"decimals must be 0 to {MAX_DECIMALS}, is {decimals}")
    if len(expression) > MAX_CHARACTERS:
        raise Failure(f"the expression is longer than {MAX_CHARACTERS} characters: shorten it")
    try:
        text = _python(expression)
        tree = ast.parse(text, mode="eval")
        value = _Arithmetic(text).eval(text, previously_parsed=tree.body)
        return _written(_number(value), decimals)
    except ZeroDivisionError:
        raise Failure("division by zero") from None
    except OverflowError:
        raise Failure("the result is too large") from None
    except SyntaxError as error:
        what = error.msg.removeprefix("invalid syntax. ")
        raise Failure(f"not an arithmetic expression ({what}): write it like (3 + 4) * 2") from None
    except InvalidExpression as error:
        raise Failure(f"not arithmetic ({error}): write it like (3 + 4) * 2") from None
    except (TypeError, ValueError, RecursionError, MemoryError) as error:
        raise Failure(f"cannot be worked out ({error})") from None


def _python(expression: str) -> str:
    """The expression in Python's spelling."""
    text = " ".join(expression.split()).translate(str.maketrans("×·÷−–", "**/--"))
    text = text.replace("^", "**")
    # A sign that no operand follows is a percentage.
    sign = r"(?<=[0-9.)])\s*(?:%|percent\b)"
    text = re.sub(rf"{sign}\s*of\b", "**percent*", text)
    return re.sub(rf"{sign}(?=\s*(?:$|[-+*/%),]))", "**percent", text)


class _Arithmetic(SimpleEval):
    """simpleeval's walk with numbers alone: no strings, comparisons, attributes, items or assignments."""

    def __init__(self, text: str) -> None:
        self.text = text
        names = {"pi": math.pi, "e": math.e, "percent": _PERCENT}
        super().__init__(operators=dict(_OPERATORS), functions=dict(_FUNCTIONS), names=names)
        kept = ast.BinOp, ast.UnaryOp, ast.Call, ast.Constant, ast.Name
        self.nodes = {kind: self.nodes[kind] for kind in kept}
        self.nodes[ast.Constant] = self._literal

    def _literal(self, node: ast.Constant) -> Number:
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            raise ValueError(f"{str(node.value)[:40]!r} is no number")
        if isinstance(node.value, int):
            return _sized(node.value)
        # From its digits, since a float would change those past the fifteenth.
        digits = ast.get_source_segment(self.text, node) or ""
        exponent = re.search(r"[eE]([-+]?[0-9_]+)", digits)
        if exponent and abs(int(exponent[1])) > MAX_DECIMALS:
            raise OverflowError
        return _sized(Fraction(digits))


def _number(value: Any) -> Number:
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
        raise TypeError("an operand is no number")
    if isinstance(value, float) and not math.isfinite(value):
        raise OverflowError
    return Fraction(value) if isinstance(value, int) else value


def _sized(value: Any) -> Number:
    value = _number(value)
    if isinstance(value, Fraction) and _bits(value) > MAX_BITS:
        raise OverflowError
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _checked(function: Callable[..., Any]) -> Callable[..., Number]:
    def apply(*operands: Any) -> Number:
        return _sized(function(*map(_number, operands)))

    return apply


def _power(base: Any, exponent: Any) -> Number:
    base = _number(base)
    if exponent is _PERCENT:
        return base / 100
    exponent = _number(exponent)
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if _bits(base) * abs(exponent) <= MAX_BITS or abs(base) in (0, 1):
            return _sized(base**exponent.numerator)
        if base.denominator == 1 and exponent > 0:
            raise OverflowError
    if base == 0 and exponent < 0:
        raise ZeroDivisionError
    power = float(base) ** float(exponent)
    if isinstance(power, complex):
        raise ValueError("a root of a negative number")
    if power == 0 and base != 0:
        raise ValueError("the result is too small")
    return _sized(power)


def _factorial(n: Number) -> int:
    if n != int(n) or not 0 <= n <= 500:
        raise ValueError("factorial takes a whole number from 0 to 500")
    return math.factorial(int(n))


def _root(x: Number) -> Number:
    if x < 0:
        raise ValueError("a root of a negative number")
    if isinstance(x, Fraction):
        top, bottom = math.isqrt(x.numerator), math.isqrt(x.denominator)
        if top * top == x.numerator and bottom * bottom == x.denominator:
            return Fraction(top, bottom)
    return math.sqrt(x)


def _round(x: Number, decimals: Number = 0) -> Number:
    if decimals != int(decimals) or abs(decimals) > MAX_DECIMALS:
        raise ValueError(f"round takes at most {MAX_DECIMALS} decimals")
    return _rounded(Fraction(x), int(decimals))


def _rounded(x: Fraction, decimals: int) -> Fraction:
    """A number rounded to some decimals, halves away from zero."""
    scale = Fraction(10) ** decimals
    whole = math.floor(abs(x) * scale + Fraction(1, 2))
    return Fraction(whole if x >= 0 else -whole) / scale


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: _checked(operator.add),
    ast.Sub: _checked(operator.sub),
    ast.Mult: _checked(operator.mul),
    ast.Div: _checked(operator.truediv),
    ast.FloorDiv: _checked(operator.floordiv),
    ast.Mod: _checked(operator.mod),
    ast.Pow: _power,
    ast.USub: _checked(operator.neg),
    ast.UAdd: _checked(operator.pos),
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: _checked(function)
    for name, function in {
        **{"abs": abs, "min": min, "max": max, "round": _round, "floor": math.floor, "ceil": math.ceil},
        **{"sqrt": _root, "exp": math.exp, "ln": math.log, "log": math.log, "log2": math.log2},
        **{"log10": math.log10, "sin": math.sin, "cos": math.cos, "tan": math.tan, "asin": math.asin},
        **{"acos": math.acos, "atan": math.atan, "degrees": math.degrees, "radians": math.radians},
        **{"factorial": _factorial},
    }.items()
}


def _written(value: Number, decimals: int | None) -> str:
    if decimals is not None:
        rounded = _rounded(Fraction(value), decimals)
        digits = str(abs(int(rounded * 10**decimals))).rjust(decimals + 1, "0")
        whole, part = digits[: len(digits) - decimals], digits[len(digits) - decimals :]
        return ("-" if rounded < 0 else "") + whole + ("." + part if part else "")
    if isinstance(value, Fraction) and value.denominator == 1:
        return str(value.numerator)
    # The nearest number of 15 digits: a float's last two are rounding.
    return _plain(f"{float(value):.15g}")


def _plain(text: str) -> str:
    return text.removesuffix(".0").replace("e+", "e")
