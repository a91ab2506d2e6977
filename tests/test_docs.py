"""The documentation is held to the code: measures, experiments, commands and links that stand there exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest

import probe
from probe.analyzers import analyze
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
    "docs/index.md",
    "docs/temperature.md",
    "docs/top-p.md",
    "docs/boltzmann.md",
    "docs/lora.md",
    "docs/memory.md",
    "docs/intervals.md",
    "docs/prompting.md",
    "docs/cot.md",
    "docs/templates.md",
    "tasks/README.md",
    "tools/README.md",
)
REFERENCE = ROOT / "docs" / "tool-use.md"
REPLAYED = ("replay_argmax_share", "replay_delta_log_prob", "replay_largest_delta_log_prob")
COLUMNS = ("layer", "head", "step", "span", "tool", "variant")


def rows_of(text: str) -> list[list[str]]:
    lines = (line for line in text.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([\w-]+)`", cell)


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
    intervene(run, read_by("tool"), effort=Effort(draws=2, random_heads=2, doses=(4e-4,), most_kl=1e9))
    analyze(run, ["tool"])
    return Run(run.path).measures()


def test_every_measure_of_tools_is_made_with_its_unit_and_columns(measures):
    assert set(measures.analyzer) == {"tool"}
    absent = {("bfcl_accuracy", "run"): "needs tasks of the leaderboard"}
    absent |= {(name, "task"): "is of a replayed log" for name in REPLAYED}
    if "decodable_layer" not in set(measures.name):
        absent["decodable_layer", "run"] = "a layer is decodable or not"
    check_defined(measures, "tool", absent)


@pytest.mark.parametrize("analyzer", ["tool", "features", "cot"])
def test_every_experiment_stands_in_a_table(analyzer):
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    marker = f"<!-- experiments: {analyzer} -->\n"
    (table,) = [page.partition(marker)[2].partition("<!-- end -->")[0] for page in pages if marker in page]
    cells = {names_in(row[0])[0]: row[-1] for row in rows_of(table)[1:]}
    assert cells.keys() == read_by(analyzer).keys()
    by_name = {name for name, cost in cells.items() if "runs only if named" in cost}
    assert by_name == {name for name, entry in read_by(analyzer).items() if entry.by_name}


def test_every_number_of_an_experiment_is_the_codes():
    text = " ".join(REFERENCE.read_text().split())
    effort = Effort()
    for phrase in (
        f"one of {conditions.WINDOWS} windows",
        f"n! orders of up to {conditions.EXACT_TOOLS} tools",
        f"`--orders` ({effort.orders})",
        f"{intentions.FIRST_DRAWS} to {effort.most_draws} drawn at temperature 1, untruncated, as many as `--standard-error` "
        f"({effort.standard_error})",
        f"Controls: {intentions.FIRST_DRAWS} times random tokens",
        f"the first {heads._ALONE} one by one, and {effort.random_heads} random sets",
        f"{effort.random_heads} random sets cannot give a rank below 1/{1 + effort.random_heads}",
        f"at most {conditions.MANY_TOOLS} are shown",
        f"at most {intentions.MOST_TOKENS} tokens",
        f'"{intentions.LEAD.strip()}"',
        *(f'"{content}"' for content in conditions.CONTENT_FREE),
    ):
        assert phrase in text, phrase


def help_of(name: str) -> str:
    """What `probe NAME --help` prints."""
    command = main.commands[name]
    return command.get_help(click.Context(command, info_name=name))


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


def test_every_page_stands_in_the_sites_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    listed = {
        line for table in re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL) for line in table.split()
    }
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert pages - {"index"} <= listed


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
