"""The documentation is held to the code: measures, experiments, commands and links that stand there exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import click
import pytest

import probe
from probe.analyzers import analyze
from probe.analyzers.registry import REGISTRY
from probe.cli import main
from probe.experiments import EXPERIMENTS, Effort, intervene, read_by
from probe.experiments.tool import conditions, heads, intentions
from probe.runs import Run
from tests.defined import check_defined
from tests.planted import copier

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/contract.md",
    "docs/releasing.md",
    "docs/report.md",
    "docs/tool-use.md",
    "docs/distribution.md",
    "docs/lora.md",
    "docs/memory.md",
    "docs/prompting.md",
    "docs/cot.md",
    "tasks/README.md",
    "tools/README.md",
)
REFERENCE = ROOT / "docs" / "tool-use.md"
COLUMNS = ("layer", "head", "step", "span", "tool", "variant")


class Documented(NamedTuple):
    unit: str
    always: frozenset[str]
    """Columns that are filled in every row."""
    sometimes: frozenset[str]


def rows_of(text: str) -> list[list[str]]:
    lines = (line for line in text.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([\w-]+)`", cell)


@pytest.fixture(scope="module")
def documented() -> dict[tuple[str, str], Documented]:
    """(name, task or run) → what the reference says."""
    by_name: dict[tuple[str, str], Documented] = {}
    for cells in rows_of(REFERENCE.read_text()):
        if len(cells) != 7 or cells[1] not in ("task", "run"):
            continue
        used, brackets = frozenset(names_in(cells[4])), frozenset(re.findall(r"\(`(\w+)`\)", cells[4]))
        for name in names_in(cells[0]):
            assert (name, cells[1]) not in by_name, f"{name} stands twice"
            by_name[name, cells[1]] = Documented(cells[3], used - brackets, brackets)
    return by_name


@pytest.fixture(scope="module")
def measures(tmp_path_factory):
    """All experiments and measures of a planted model on few tasks, among them one without a right tool and two
    with listed intentions."""
    path = tmp_path_factory.mktemp("copier")
    plant = copier(path / "model")
    lines = [dict(task) for task in plant.tasks if len(task["tools"]) == 3][:22]
    lines[0]["target"] = None
    for line in lines[1:3]:
        line["intentions"] = ["first of all", "then the rest"]
    tasks = path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = probe.run(tasks, model=str(plant.path), out=path / "run", analyze=False)
    intervene(run, read_by("tool"), effort=Effort(draws=2, random_heads=2))
    analyze(run, ["tool"])
    frame = Run(run.path).measures()
    frame["of"] = ["task" if task_id else "run" for task_id in frame.task_id]
    return frame


def test_every_measure_is_documented_with_its_unit_and_columns(measures, documented):
    assert set(measures.analyzer) == {"tool"}
    defined = {name for analyzer, name in REGISTRY if analyzer == "tool"}
    of_leaderboard = {("bfcl_accuracy", "run"): "needs tasks of the leaderboard"}
    check_defined(measures[measures.name.isin(defined)], "tool", of_leaderboard)
    for (name, of), rows in measures[~measures.name.isin(defined)].groupby(["name", "of"]):
        entry = documented.get((name, of))
        assert entry is not None, f"{name} of a {of} is missing in {REFERENCE.name}"
        assert set(rows.unit) == {entry.unit}, name
        filled = {column for column in COLUMNS if rows[column].notna().any()}
        assert entry.always <= filled <= entry.always | entry.sometimes, name
        assert rows[[*entry.always]].notna().all(axis=None), name


def test_every_documented_measure_is_made(measures, documented):
    yielded = set(zip(measures.name, measures.of, strict=True))
    literals = {
        node.value
        for path in (ROOT / "probe" / "analyzers").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
    }
    # A layer is decodable or not: it may have no row here.
    defined = {name for analyzer, name in REGISTRY if analyzer == "tool"}
    absent = {key for key in documented if key not in yielded and key[0] not in defined}
    assert absent <= {("decodable_layer", "run")}
    assert {name for name, _ in absent} <= literals


def test_every_experiment_is_described_and_every_number_is_the_codes():
    text = " ".join(REFERENCE.read_text().split())
    table = [cells for cells in rows_of(REFERENCE.read_text()) if len(cells) == 3]
    assert sorted(name for cells in table for name in names_in(cells[0])) == sorted(read_by("tool"))
    effort = Effort()
    for phrase in (
        f"one of {conditions.WINDOWS} windows",
        f"n! orders of up to {conditions.EXACT_TOOLS} tools",
        f"`--orders` ({effort.orders})",
        f"`--draws` ({effort.draws})",
        f"the first {heads._ALONE} one by one, and {effort.random_heads} random sets",
        f"{effort.random_heads} random sets cannot give a rank below 1/{1 + effort.random_heads}",
        f"at most {conditions.MANY_TOOLS} are shown",
        f"at most {intentions.MOST_TOKENS} tokens",
        f'"{intentions.LEAD.strip()}"',
        *(f'"{content}"' for content in conditions.CONTENT_FREE),
    ):
        assert phrase in text, phrase
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in read_by("tool") if name != "base")
    asked = {name for name in read_by("tool") if "runs only if named" in _row_of(table, name)}
    assert asked == {name for name, entry in read_by("tool").items() if entry.by_name}


def help_of(name: str) -> str:
    """What `probe NAME --help` prints."""
    command = main.commands[name]
    return command.get_help(click.Context(command, info_name=name))


def _row_of(table: list[list[str]], name: str) -> str:
    return next(" ".join(cells) for cells in table if names_in(cells[0]) == [name])


def test_the_commands_help_names_every_experiment():
    words = set(re.findall(r"\w+", help_of("analyze")))
    assert set(EXPERIMENTS) <= words


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_documentation_exist_with_their_options(page):
    for line in (ROOT / page).read_text().splitlines():
        match = re.match(r"    (?:\.venv/bin/)?probe (.*)", line)
        if not match:
            continue
        words = shlex.split(match[1], comments=True)
        command: click.Command = main
        while isinstance(command, click.Group) and words:
            default = getattr(command, "default", None)
            assert default or words[0] in command.commands, line
            command = command.commands[words.pop(0) if words[0] in command.commands else default]
        options = {option for parameter in command.params for option in parameter.opts}
        given = {word for word in words if re.match(r"--?[a-z]", word)}
        assert given <= options, line


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_documentation_lead_somewhere(page):
    path = ROOT / page
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text()):
        linked = (path.parent / target).resolve() if target else path
        assert linked.exists(), f"{page}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)", linked.read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{page}: #{anchor}"
