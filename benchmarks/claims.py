"""`python -m benchmarks.claims`: the figures of README and docs against the runs that they name.

claims.toml has for each claim the page, the sentence with places for its figures, the run, and the measure of each figure. A run
is given as NAME=PATH or made by its commands; the sentence is printed anew from its measures and must stand in the page.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    import pandas

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).parent / "claims.toml"
_PLACE = re.compile(r"\{(\w+)(?:\.(n|low|high|interval))?:?([^}]*)\}")
_NUMBER = r"[+−-]?(?:\d[\d,]*)?\.?\d+(?:\s%)?"
_INTERVAL = rf"\[{_NUMBER},\s+{_NUMBER}\]"


class Figure(NamedTuple):
    """A number of a run's measures with its interval and n."""

    value: float
    low: float | None
    high: float | None
    n: int

    def written(self, part: str | None, style: str) -> str:
        """As pages write it: `part` alone (n, low, high, interval), else the value. A style is the decimals, or % for a
        share; `.` in front leaves out the 0 before the point, `+` gives the sign, `i` behind adds the interval if there is one."""
        if part == "n":
            return str(self.n)
        if part in ("low", "high"):
            return _written(getattr(self, part), style)
        interval = ""
        if self.low is not None and self.high is not None:
            ends = style.lstrip("+").rstrip("i")
            bare = [_written(end, ends).removesuffix(" %") for end in (self.low, self.high)]
            interval = f"[{', '.join(bare)}]"
        if part == "interval":
            return interval
        return " ".join(filter(None, (_written(self.value, style), interval if style.endswith("i") else "")))


def _written(value: float, style: str) -> str:
    plain, sign = style.strip("+i"), "+" if "+" in style else ""
    if plain == "%":
        return f"{100 * value:{sign}.0f} %".replace("-", "−")
    text = f"{value:{sign},.{int(plain.lstrip('.'))}f}".replace("-", "−")
    if not text.strip("+−0.,"):
        text = text.lstrip("+−")
    return re.sub(r"^([+−]?)0\.", r"\1.", text) if plain.startswith(".") else text


@dataclass(frozen=True)
class Claim:
    """A sentence of a page whose figures a run gives."""

    page: str
    run: str
    says: str
    """With a place for each figure: `{name:style}`, or of a part `{name.low:style}`."""
    figures: Mapping[str, str]
    """Place → analyzer/measure AXIS=LABEL…, axes that are not named being null; behind `max` or `min`, of all rows whose axes
    lie in ranges (`layer=0..13`). Of a command, the keys that lead to the number: gap.energy."""

    def pattern(self) -> re.Pattern[str]:
        """What the sentence looks like in the page, whatever its figures are: a group for each."""
        out, end = "", 0
        for match in _PLACE.finditer(self.says):
            out += _literal(self.says[end : match.start()])
            interval = _INTERVAL if match[2] == "interval" else rf"{_NUMBER}(?:\s+{_INTERVAL})?"
            out += f"({interval if match[2] == 'interval' or match[3].endswith('i') else _NUMBER})"
            end = match.end()
        return re.compile(out + _literal(self.says[end:]))

    def place_in(self, text: str) -> re.Match[str]:
        """Where it stands in its page. Raises ValueError where it does not stand there once."""
        matches = [*self.pattern().finditer(text)]
        if len(matches) != 1:
            raise ValueError(f"{self.page} says this {len(matches)} times: {self.says}")
        return matches[0]

    def written(self, source: pandas.DataFrame | dict[str, Any]) -> list[str]:
        """Its figures as the measures of a run, or what a command printed, give them, in the order of the sentence."""
        of = printed if isinstance(source, dict) else figure
        numbers = {name: of(source, wanted) for name, wanted in self.figures.items()}  # pyright: ignore[reportArgumentType]
        return [numbers[m[1]].written(m[2], m[3]) for m in _PLACE.finditer(self.says)]


def _literal(text: str) -> str:
    return r"\s+".join(re.escape(word) for word in re.split(r"\s+", text))


def figure(rows: Any, wanted: str) -> Figure:
    """The number that the words of a claim select from the measures of a whole run. Raises ValueError where they
    select none or, without `max` or `min`, several."""
    from probe.runs import AXES

    words = wanted.split()
    extreme = words.pop(0) if words[0] in ("max", "min") else None
    (analyzer, name), places = words[0].split("/"), dict(word.split("=", 1) for word in words[1:])
    kept = rows[(rows.analyzer == analyzer) & (rows.name == name) & (rows.task_id == "")]
    for axis in AXES:
        label, column = places.get(axis), kept[axis]
        if label is None:
            kept = kept[column.isna()]
        elif ".." in label:
            low, high = label.split("..")
            kept = kept[column.between(float(low), float(high))]
        elif label != "*":
            kept = kept[column.map(lambda value: _label(value)) == label]
    if not len(kept) or (extreme is None and len(kept) > 1):
        raise ValueError(
            f"{len(kept)} measures are {wanted!r}: is the run complete, and measured by this version?"
        )
    at = kept.value.idxmin() if extreme == "min" else kept.value.idxmax()
    row = kept.loc[at]
    ends = [None if end != end or end is None else float(end) for end in (row.low, row.high)]
    return Figure(float(row.value), ends[0], ends[1], int(row.n))


def printed(document: dict[str, Any], wanted: str) -> Figure:
    """The number at some keys of a JSON document. Raises ValueError where there is none."""
    at: Any = document
    for key in wanted.split("."):
        if not isinstance(at, dict) or key not in at:
            raise ValueError(f"nothing is printed at {wanted!r}: no {key}")
        at = at[key]
    if isinstance(at, dict):
        return Figure(at["value"], at["low"], at["high"], at["n"])
    return Figure(float(at), None, None, 1)


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class Table(NamedTuple):
    """What claims.toml holds."""

    runs: dict[str, list[str]]
    """Commands of every run by name, with RUN for its directory."""
    commands: dict[str, str]
    """Commands that print a JSON document, by name."""
    claims: list[Claim]
    unchecked: list[dict[str, str]]
    """Sentences with figures that no single run gives: page, says, why."""


def read(path: Path = TABLE) -> Table:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return Table(
        table["runs"], table["commands"], [Claim(**claim) for claim in table["claims"]], table["unchecked"]
    )


def without_claim(page: str, table: Table) -> Iterator[str]:
    """Lines of a page with an interval that neither a claim nor an unchecked sentence holds. Raises ValueError for one that
    the page does not have once."""
    text = (ROOT / page).read_text(encoding="utf-8")
    sentences = [claim for claim in table.claims if claim.page == page]
    sentences += [Claim(page, "", entry["says"], {}) for entry in table.unchecked if entry["page"] == page]
    spans = [sentence.place_in(text).span() for sentence in sentences]
    for match in re.finditer(_INTERVAL, text):
        if not any(start <= match.start() and match.end() <= end for start, end in spans):
            line = text[: match.start()].count("\n")
            yield f"{page}:{line + 1}: {text.splitlines()[line]}"


def checked(claim: Claim, source: pandas.DataFrame | dict[str, Any], write: bool = False) -> str | None:
    """What is wrong with a claim, None where nothing is; with `write` the page gets the run's figures."""
    path = ROOT / claim.page
    text = path.read_text(encoding="utf-8")
    try:
        match, figures = claim.place_in(text), claim.written(source)
    except ValueError as error:
        return str(error)
    old = [re.sub(r"\s+", " ", group) for group in match.groups()]
    if old == figures:
        return None
    if write:
        new, end = "", 0
        for number, value in enumerate(figures, 1):
            new, end = new + text[end : match.start(number)] + value, match.end(number)
        path.write_text(new + text[end:], encoding="utf-8")
    line = text[: match.start()].count("\n") + 1
    wrong = [f"{was} is {now}" for was, now in zip(old, figures, strict=True) if was != now]
    return f"{claim.page}:{line}: in the run {claim.run}, {'; '.join(wrong)}: {' '.join(claim.says.split())}"


def execute(command: str, path: Path) -> str:
    """What a command prints, run in the root of the repository, RUN in it being a path. Raises CalledProcessError where it fails."""
    words = [word.replace("RUN", str(path)) for word in shlex.split(command)]
    if words[0] in ("probe", "pip"):
        words[:1] = ["python", "-m", words[0]]
    if words[0] == "python":
        words[0] = sys.executable
    click.echo(shlex.join(words), err=True)
    return subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


@click.command()
@click.argument("given", nargs=-1, metavar="[NAME=RUN]...")
@click.option(
    "--out",
    default="runs/claims",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where runs are made.",
)
@click.option("--given-only", is_flag=True, help="Make no run: check the claims of those that are given.")
@click.option("--write", is_flag=True, help="Put the figures of the runs into the pages.")
@click.option(
    "--list", "listed", is_flag=True, help="Print every run with its commands, and how many claims name it."
)
def main(given: tuple[str, ...], out: Path, given_only: bool, write: bool, listed: bool) -> None:
    """Check the figures of README and docs against runs of the default model; exit code 1 where one differs.

    What a command of the table prints can be given as NAME=FILE.json.
    """
    table = read()
    if listed:
        for name, lines in {**table.runs, **{name: [line] for name, line in table.commands.items()}}.items():
            click.echo(f"{name}: {sum(claim.run == name for claim in table.claims)} claims")
            click.echo("".join(f"    {line}\n" for line in lines), nl=False)
        for entry in table.unchecked:
            click.echo(f"not checked, {entry['why']}: {entry['says']}")
        return
    paths = {name: Path(path) for name, _, path in (word.partition("=") for word in given)}
    if not all(path.name for path in paths.values()) or not paths.keys() <= {*table.runs, *table.commands}:
        raise click.UsageError(f"give NAME=PATH; names are {', '.join([*table.runs, *table.commands])}")
    wrong = 0
    for name in [*table.runs, *table.commands]:
        if given_only and name not in paths:
            continue
        source = _source(name, table, paths.get(name), out)
        claims = [claim for claim in table.claims if claim.run == name]
        faults = [fault for claim in claims if (fault := checked(claim, source, write))]
        wrong += len(faults)
        click.echo(f"{name}: {len(claims) - len(faults)} of {len(claims)} claims hold")
        for fault in faults:
            click.echo(f"  {fault}")
    raise SystemExit(1 if wrong else 0)


def _source(name: str, table: Table, given: Path | None, out: Path) -> pandas.DataFrame | dict[str, Any]:
    """The measures of a run, or what a command prints: given, or made."""
    if name in table.commands:
        return json.loads(given.read_text("utf-8") if given else execute(table.commands[name], out))
    import probe

    path = given or out / name
    if not given and not (path / "measures.parquet").exists():
        for command in table.runs[name]:
            execute(command, path)
    return probe.open(path).measures()


if __name__ == "__main__":
    main()
