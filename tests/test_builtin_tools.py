"""The tools that probe ships: each against an oracle that is not its own code."""

from __future__ import annotations

import calendar
import csv
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from datetime import date
from decimal import ROUND_HALF_UP, Decimal, localcontext
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from probe.tools.execution import Workspace
from probe.tools.execution.builtin import dates, documents, facts, files, money, table, units, words
from probe.tools.execution.failure import Failure

ROOT = str(Workspace().given("root"))
HERE = Path(files.__file__).parent


# --- calculator ---

if HAS_SIMPLEEVAL := find_spec("simpleeval") is not None:
    from probe.tools.execution.builtin import calculator
needs_simpleeval = pytest.mark.skipif(not HAS_SIMPLEEVAL, reason="simpleeval is not installed")

Pair = tuple[str, str]
"""An expression, and the same one for Python with its numbers as fractions."""

numbers = st.one_of(
    st.integers(0, 999).map(str),
    st.tuples(st.integers(0, 99), st.integers(0, 999)).map(lambda pair: f"{pair[0]}.{pair[1]:03}"),
).map(lambda text: (text, f'F("{text}")'))


def extended(part: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    def infix(actual: tuple[Pair, str, Pair]) -> Pair:
        (left, left_exact), sign, (right, right_exact) = actual
        return left + sign + right, left_exact + sign + right_exact

    def power(actual: tuple[Pair, int]) -> Pair:
        (base, exact), exponent = actual
        # F again: // of fractions is an int, and Python's int ** -1 a float.
        return f"({base})**{exponent}", f"F({exact})**{exponent}"

    return st.one_of(
        st.tuples(part, st.sampled_from(["+", " - ", "*", " / ", "//", "-"]), part).map(infix),
        st.tuples(part, part).map(
            lambda two: (f"({two[0][0]}) % ({two[1][0]})", f"F({two[0][1]}) % ({two[1][1]})")
        ),
        st.tuples(part, st.integers(-4, 4)).map(power),
        part.map(lambda pair: (f"({pair[0]})", f"F({pair[1]})")),
        part.map(lambda pair: (f"-{pair[0]}", f"-{pair[1]}")),
    )


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


@needs_simpleeval
@given(st.recursive(numbers, extended, max_leaves=8))
@settings(max_examples=300, deadline=None)
def test_an_expression_has_the_value_that_python_gives_it_in_fractions(pair):
    text, exact = pair
    try:
        expected = eval(exact, {"__builtins__": {}, "F": Fraction})  # noqa: S307 our own text: Python is the oracle
    except ZeroDivisionError:
        with pytest.raises(Failure, match="division by zero|too large"):
            calculator.evaluate(text)
        return
    expected = Fraction(expected)
    assume(_bits(expected) < 900)
    try:
        value = calculator.evaluate(text)
    except Failure as error:  # a step on the way may be larger than what comes out
        assert "too large" in str(error)
        assume(False)
    if expected.denominator == 1:
        assert value == str(expected)
    else:
        assert math.isclose(float(value), float(expected), rel_tol=1e-14)


@needs_simpleeval
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(3 + 4) * 2", "14"), ("0.1 + 0.2", "0.3"), ("2^10", "1024"), ("2**-1", "0.5"), ("-3**2", "-9"),
        ("15% of 80", "12"), ("80 * 15%", "12"), ("80 + 15%", "80.15"), ("10 / (5)%", "200"), ("200% ", "2"),
        ("15 percent of 80", "12"), ("(5 + 10)% of 80", "12"), ("-50%", "-0.5"), ("7 % 3", "1"), ("7 % (-3)", "-2"),
        ("7 × 6", "42"), ("1 ÷ 4", "0.25"), ("8 − 10", "-2"), ("sqrt(16)", "4"), ("sqrt(2)", "1.4142135623731"),
        ("max(1, 5, 3)", "5"), ("round(2.675, 2)", "2.68"), ("round(-0.5)", "-1"), ("floor(-1.5)", "-2"),
        ("factorial(20)", "2432902008176640000"), ("log10(1000)", "3"), ("ln(e)", "1"), ("1e3", "1000"),
        ("2**1000", str(2**1000)), ("1/3", "0.333333333333333"), ("16**0.5", "4"), ("1_000", "1000"),
    ],
)  # fmt: skip
def test_the_calculator_reads_what_people_write(text, value):
    assert calculator.evaluate(text) == value


@needs_simpleeval
@given(st.decimals(-(10**12), 10**12, places=6), st.integers(0, 8))
@settings(deadline=None)
def test_decimals_round_halves_away_from_zero_as_decimal_does(value, decimals):
    with localcontext() as context:
        context.prec = 60
        expected = value.quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_HALF_UP)
    # Decimal keeps the sign of a negative zero.
    expected = abs(expected) if expected == 0 else expected
    assert calculator.evaluate(f"({value:f})", decimals=decimals) == f"{expected:f}"


@needs_simpleeval
@pytest.mark.parametrize(
    "text",
    [
        "", " ", "x", "1 +", "2 3", "1; 2", "a = 1", "'a' * 3", "[1] * 9", "(1, 2)", "1 if 1 else 2", "1 < 2", "True",
        "None", "1j", "1e9999", "1e-99999", "__import__('os')", "().__class__", "sqrt.__self__", "(lambda: 1)()", "f'{1}'", "not 1",
        "1 << 9", "1 | 2", "~1", "sqrt", "sqrt()", "sqrt(x=4)", "sqrt(*[4])", "sqrt(-1)", "(-8)**0.5", "log(0)",
        "9**9**9", "10**2000", "9**999999999", "factorial(5000)", "factorial(2.5)", "1.5**-99999999999", "exp(9999)",
        "1/0", "0**-1", "7 % 0", "5%%", "percent", "1 + percent", "percent**2", "round(1, 9999999)", "1\n2", "\0",
        "(" * 400 + "1" + ")" * 400, "1+" * 490 + "1+", "9" * 1001,
    ],
)  # fmt: skip
def test_what_is_no_arithmetic_or_too_large_is_refused_in_words(text):
    with pytest.raises(Failure) as caught:
        calculator.evaluate(text)
    assert str(caught.value)
    assert caught.value.kind == "refused"


@needs_simpleeval
def test_decimals_out_of_range_are_refused():
    with pytest.raises(Failure, match="decimals must be 0 to"):
        calculator.evaluate("1", decimals=-1)


# --- units ---

UNITS = {
    "liter": "liter", "gallon": "US_liquid_gallon", "quart": "US_liquid_quart", "pint": "US_pint", "cup": "cup",
    "fluid_ounce": "US_fluid_ounce", "imperial_fluid_ounce": "imperial_fluid_ounce", "celsius": "degC",
    "fahrenheit": "degF", "kelvin": "kelvin", "rankine": "degR", "tonne": "metric_ton", "short_ton": "US_ton",
    "long_ton": "UK_ton", "cubic_meter": "meter**3", "cubic_centimeter": "centimeter**3", "cubic_foot": "foot**3",
    "cubic_inch": "inch**3", "meter_per_second": "meter/second", "kilometer_per_hour": "kilometer/hour",
    "mile_per_hour": "mile/hour", "foot_per_second": "foot/second",
}  # fmt: skip


@pytest.mark.parametrize("measure", list(units._TABLE))
def test_every_pair_of_units_of_a_measure_agrees_with_pint(measure):
    registry = pytest.importorskip("pint").UnitRegistry(non_int_type=Fraction)
    for source in units._TABLE[measure]:
        for wanted in units._TABLE[measure]:
            for value in (1, 36.6, 1234.5):
                start = registry.Quantity(Fraction(repr(value)), UNITS.get(source, source))
                expected = float(start.to(UNITS.get(wanted, wanted)).magnitude)
                assert units.convert(value, source, wanted)["value"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "source", "wanted", "expected"),
    [
        (1, "inch", "cm", 2.54), (1, "mile", "ft", 5280), (26.2, "miles", "km", 42.1648128), (1, "lb", "g", 453.59237),
        (100, "°C", "°F", 212), (-40, "degrees Celsius", "F", -40), (0, "K", "celsius", -273.15), (98.6, "F", "C", 37),
        (1, "gallon", "l", 3.785411784), (1, "cup", "tablespoons", 16), (3, "tsp", "tbsp", 1), (1, "stone", "pounds", 14),
        (36, "km/h", "m/s", 10), (1, "knot", "kilometers per hour", 1.852), (60, "miles per hour", "mph", 60),
        (1, "nautical mile", "m", 1852), (1, "imperial gallon", "litre", 4.54609), (5, "fluid ounces", "fl oz", 5),
    ],
)  # fmt: skip
def test_units_are_found_under_the_names_that_people_use(value, source, wanted, expected):
    assert units.convert(value, source, wanted)["value"] == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((1, "km", "kg"), "km measures length and kg mass"),
        ((1, "parsec", "km"), "no unit 'parsec': known are meter"),
        ((-1, "K", "C"), "below absolute zero"),
        ((1e308, "km", "nm"), "too large"),
    ],
)
def test_a_conversion_that_makes_no_sense_is_refused_in_words(args, message):
    with pytest.raises(Failure, match=re.escape(message)):
        units.convert(*args)


# --- money ---


def test_money_is_exchanged_at_the_reference_rates_of_the_day():
    """European Central Bank, 31 December 2024: 1 EUR = 1.0389 USD = 163.06 JPY = 0.82918 GBP."""
    assert money.exchange(100, "EUR", "USD", "2024-12-31")["amount"] == 103.89
    assert money.exchange(1, "gbp", "eur", "2024-12-31")["amount"] == round(1 / 0.82918, 2)
    cross = money.exchange(1000, "USD", "JPY", "2025-01-15")
    assert cross == {"amount": 156954.47, "currency": "JPY", "rate": 156.954, "rate_day": "2024-12-31"}


def test_without_a_day_the_last_rates_count():
    with open(HERE / "rates.csv", encoding="utf-8") as file:
        last = list(csv.reader(file))[-1][0]
    assert money.exchange(1, "EUR", "EUR") == {
        "amount": 1.0,
        "currency": "EUR",
        "rate": 1.0,
        "rate_day": last,
    }


def test_every_rate_of_the_table_is_that_of_the_central_bank():
    other = pytest.importorskip("currency_converter").CurrencyConverter()
    for day, rates in money._table().items():
        for code, rate in rates.items():
            expected = other.convert(1, "EUR", code, date=date.fromisoformat(day))
            assert float(rate) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((1, "EUR", "XXX"), "no currency 'XXX': known are AUD"),
        ((1, "EUR", "USD", "1999-01-04"), "no rate for 1999-01-04: the first is of 2023-01-31"),
        ((1, "EUR", "USD", "today"), "'today' is no day: write YYYY-MM-DD"),
    ],
)
def test_money_that_cannot_be_exchanged_is_refused_in_words(args, message):
    with pytest.raises(Failure, match=re.escape(message)):
        money.exchange(*args)


# --- dates ---

days = st.dates(date(1, 1, 1), date(9999, 12, 31))


@given(days, days, st.integers(-4_000_000, 4_000_000))
def test_days_are_counted_as_the_calendar_module_and_ordinals_count_them(start, end, move):
    result = dates.calculate(start.isoformat(), end.isoformat())
    assert result["days"] == end.toordinal() - start.toordinal()
    assert result["weekday"] == calendar.day_name[calendar.weekday(start.year, start.month, start.day)]
    if 1 <= start.toordinal() + move <= date.max.toordinal():
        moved = dates.calculate(start.isoformat(), add_days=move)["result"]
        assert date.fromisoformat(str(moved)).toordinal() == start.toordinal() + move
    else:
        with pytest.raises(Failure, match="outside the years"):
            dates.calculate(start.isoformat(), add_days=move)


@pytest.mark.parametrize(
    "text", ["", "today", "2024-2-1", "20240201", "2023-02-29", "2024-13-01", "0000-01-01", "2024-W05-4"]
)
def test_what_is_no_day_is_refused_in_words(text):
    with pytest.raises(Failure, match="no day"):
        dates.calculate(text)


# --- words ---


@given(st.text(alphabet="abcABC éß\n'-x", max_size=40), st.sampled_from(["a", "B", "ab", "é", "ss"]))
def test_letters_and_parts_are_counted_as_strings_count_them(text, part):
    import unicodedata

    text = unicodedata.normalize("NFC", text)
    assert words.count(text, part)["occurrences"] == text.casefold().count(part.casefold())
    actual = words.count(text)
    assert actual["letters"] == sum(n for c, n in Counter(text).items() if unicodedata.category(c)[0] == "L")
    assert actual["characters"] == len(text)


def test_words_and_lines_of_a_known_text():
    assert words.count("It's a well-known fact.\nIs it? Yes.") == {
        "characters": 35,
        "letters": 24,
        "words": 7,
        "lines": 2,
    }
    assert words.count("strawberry", "R") == {"occurrences": 3}
    assert words.count("e\u0301", "\u00e9") == {"occurrences": 1}
    with pytest.raises(Failure, match="nothing to count"):
        words.count("a", "")


# --- files ---


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("one\ntwo\nthree")
    (root / "sub" / "b.txt").write_text("inside\n")
    (root / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "secret.txt").write_text("secret")
    (root / "out").symlink_to(tmp_path / "secret.txt")
    (root / "up").symlink_to(tmp_path)
    (root / "in").symlink_to(root / "sub" / "b.txt")
    (root / "loop").symlink_to(root / "loop")
    (tmp_path / "rootless").mkdir()
    (tmp_path / "rootless" / "c.txt").write_text("beside")
    os.mkfifo(root / "pipe")
    return root


def test_a_file_under_the_root_is_read_whole_or_by_lines(tree):
    root = str(tree)
    assert files.read("a.txt", root=root) == "one\ntwo\nthree"
    assert files.read("sub/../sub/b.txt", root=root) == files.read("in", root=root) == "inside\n"
    assert files.read("a.txt", first_line=2, root=root) == "two\nthree"
    assert files.read("a.txt", first_line=2, last_line=2, root=root) == "two\n"
    assert files.read("a.txt", last_line=99, root=root) == "one\ntwo\nthree"


@pytest.mark.parametrize(
    "path",
    ["../secret.txt", "out", "up/secret.txt", "/etc/passwd", "../rootless/c.txt", "sub/../../secret.txt"],
)
def test_nothing_outside_the_root_is_read_by_any_path_or_link(tree, path):
    os.link(tree.parent / "secret.txt", tree / "hard.txt")
    with pytest.raises(Failure, match="hard link"):
        files.read("hard.txt", root=str(tree))
    with pytest.raises(Failure, match="outside the workspace") as caught:
        files.read(path, root=str(tree))
    assert "secret" not in str(caught.value).replace(path, "").replace("secret.txt", "")


@pytest.mark.parametrize(
    "path", ["nothing", "sub", "pipe", "loop", "binary", "", ".", "a.txt/x", "\0", "x" * 5000]
)
def test_what_is_no_text_file_is_refused_in_words_and_at_once(tree, path):
    with pytest.raises(Failure):
        files.read(path, root=str(tree))


@pytest.mark.parametrize(("first", "last"), [(0, 1), (-1, None), (3, 2), (4, None), (9, 12)])
def test_lines_that_do_not_exist_are_refused(tree, first, last):
    with pytest.raises(Failure, match="line"):
        files.read("a.txt", first_line=first, last_line=last, root=str(tree))


# --- documents ---


def passages() -> list[str]:
    collected = []
    for path in sorted(Path(ROOT).rglob("*.md")):
        collected += path.read_text().strip().split("\n\n")[1:]
    return collected


@pytest.mark.parametrize("word", ["kWh", "Lisbon", "deposit", "pear", "sourdough", "projector", "euros"])
def test_a_search_for_one_word_finds_the_passages_that_have_it(word):
    result = documents.search(word, 20, root=ROOT)
    has_word = [text for text in passages() if re.search(rf"\b{word}\b", text, re.IGNORECASE)]
    assert has_word
    # A title that has the word brings its other passages too.
    kept = [row["passage"] for row in result if word.casefold() not in row["title"].casefold()]
    assert set(kept) <= set(map(str.strip, has_word))
    assert set(map(str.strip, has_word)) <= {row["passage"] for row in result}


def test_a_question_finds_its_passage_first():
    assert (
        "three months' notice"
        in documents.search("How do I end the lease with notice?", root=ROOT)[0]["passage"]
    )
    assert "6,210 kWh" in documents.search("solar panels", 1, root=ROOT)[0]["passage"]
    assert documents.search("xylophone", root=ROOT) == []


@pytest.mark.parametrize(
    "query", ['"', "a OR", "NEAR(", "title: lease", "*", "lease*", "^lease", "-- ; DROP", "AND NOT"]
)
def test_nothing_in_a_query_is_an_operator(query):
    try:
        documents.search(query, root=ROOT)
    except Failure as error:
        assert "no word" in str(error)


def test_a_search_is_limited(tmp_path):
    for limit in (0, 21):
        with pytest.raises(Failure, match="limit must be"):
            documents.search("lease", limit, root=ROOT)
    assert len(documents.search("the", 5, root=ROOT)) == 5
    assert documents.search("the", root=str(tmp_path)) == []


# --- facts ---


@given(
    st.lists(
        st.tuples(st.sampled_from(["get", "set", "delete"]), st.sampled_from("abc"), st.text(max_size=5)),
        max_size=12,
    )
)
@settings(max_examples=25, deadline=None)
def test_kept_facts_are_those_of_a_dict(tmp_path_factory, steps):
    state, model = str(tmp_path_factory.mktemp("facts") / "facts.sqlite"), {}
    for action, key, value in steps:
        assume("\0" not in value and not re.search("[\ud800-\udfff]", value))
        if action == "get" and key not in model:
            with pytest.raises(Failure, match="nothing is kept"):
                facts.keep("get", key, state=state)
            continue
        result = facts.keep(action, key, value, state=state)
        if action == "set":
            model[key] = value
        elif action == "delete":
            assert result["deleted"] is (model.pop(key, None) is not None)
        else:
            assert result["value"] == model[key]


def test_facts_have_limits_and_a_broken_store_is_a_failure(tmp_path):
    with pytest.raises(Failure, match="give a value"):
        facts.keep("set", "k", state=None)
    with pytest.raises(Failure, match="give a value"):
        facts.keep("set", "k", "x" * 4001, state=None)
    with pytest.raises(Failure, match="a key has"):
        facts.keep("get", "", state=None)
    (tmp_path / "broken").write_bytes(b"not a database, whatever its length may be" * 20)
    for place in ("broken", "no/folder"):
        with pytest.raises(Failure, match="cannot be used"):
            facts.keep("get", "k", state=str(tmp_path / place))


# --- tables ---


@pytest.mark.parametrize("column", ["item", "room", "quantity"])
def test_rows_are_those_that_pandas_finds(column):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(Path(ROOT, "tables", "inventory.csv"), dtype=str)
    for value in frame[column].unique():
        result = table.look_up("tables/inventory.csv", column, value, root=ROOT)
        assert result == frame[frame[column] == value].to_dict("records")
        prices = table.look_up("tables/inventory.csv", column, value.upper(), "price_eur", root=ROOT)
        assert prices == list(frame[frame[column] == value]["price_eur"])


def test_rows_of_json_keep_their_types():
    staff = json.loads(Path(ROOT, "tables", "staff.json").read_text())
    assert table.look_up("tables/staff.json", "extension", "114", root=ROOT) == [staff[1]]
    assert table.look_up("tables/staff.json", "name", "luis ferro", "languages", root=ROOT) == [
        ["Portuguese", "English"]
    ]
    assert table.look_up("tables/staff.json", "name", "Nobody", root=ROOT) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "a,b\n1,2\n", "has no column 'c'; it has a, b"),
        ("t.csv", "", "has no column 'c'; it has none"),
        ("t.json", "{}", "is no list of objects"),
        ("t.json", "[", "is no JSON"),
        ("t.json", "[" * 100_000, "is no JSON"),
        ("t.csv", 'c\n"x', "is no CSV table"),
        ("t.csv", "c\n" + "x\n" * 51, "51 rows have that value"),
    ],
)
def test_a_table_that_cannot_be_looked_up_is_refused_in_words(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(Failure, match=re.escape(message)):
        table.look_up(name, "c", "x", root=str(tmp_path))


# --- snippets ---

PROGRAMS = [
    "print('hi')",
    "for i in range(3):\n    print(i, end=' ')",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\nprint(fib(15))",
    "words = 'to be or not to be'.split()\nprint(sorted({w: words.count(w) for w in words}.items()))",
    "import math, json, re\nprint(math.comb(10, 3), json.dumps([1, None]), re.findall(r'[0-9]+', 'a1b22'))",
    "class A:\n    def f(self): return 3\nprint(A().f())",
]


@pytest.fixture
def snippet():
    return pytest.importorskip("probe.tools.execution.builtin.snippet")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_prints_what_cpython_prints(snippet, program):
    expected = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True
    )
    assert snippet.execute(program) == expected.stdout


def test_a_program_prints_the_same_every_time(snippet):
    program = "import random, datetime, time\nprint(random.random(), datetime.datetime.now(), time.time())"
    assert snippet.execute(program) == snippet.execute(program)


def test_the_last_expression_is_shown_where_nothing_is_printed(snippet):
    assert snippet.execute("x = 6\nx * 7") == "42"


@pytest.mark.parametrize(
    ("program", "kind", "message"),
    [
        ("1/0", "refused", "ZeroDivisionError"),
        ("def f(:", "refused", "SyntaxError"),
        ("print('a')\nraise ValueError('b')", "refused", "it printed 'a\\n' and then raised ValueError: b"),
        ("while True: pass", "timeout", "TimeoutError"),
        ("import time\ntime.sleep(1e9)\nwhile True: pass", "timeout", "Timeout"),
        ("x = [0] * 10**9", "memory_limit", "MemoryError"),
        ("x = 'a'\nwhile True: x += x", "memory_limit", "MemoryError"),
        ("print('x' * 10**7)", "output_limit", "MemoryError"),
        ("while True: print('x' * 1000)", "output_limit", "it printed 'xxx"),
        ("def f(n): return f(n + 1)\nf(0)", "refused", "RecursionError"),
        ("open('/etc/passwd').read()", "refused", "PermissionError"),
        ("open('x', 'w').write('x')", "refused", "PermissionError"),
        ("import os\nos.fork()", "refused", "fork"),
        ("import os\nprint(os.environ['PATH'])", "refused", "environ"),
        ("import socket", "refused", "socket"),
        ("import subprocess", "refused", "subprocess"),
        ("import ctypes", "refused", "ctypes"),
        ("().__class__.__bases__[0].__subclasses__()", "refused", "AttributeError"),
    ],
)
def test_a_program_that_does_harm_is_a_typed_failure(snippet, program, kind, message):
    with pytest.raises(Failure, match=re.escape(message)) as caught:
        snippet.execute(program, 1)
    assert caught.value.kind == kind


@pytest.mark.parametrize("seconds", [0, -1, 11, float("inf")])
def test_the_time_of_a_program_has_limits(snippet, seconds):
    with pytest.raises(Failure, match="timeout_s must be"):
        snippet.execute("1", seconds)
