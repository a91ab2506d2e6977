"""What a run left: `analyze`, `show`, `report`, `ls`, `verify`, `diff`, `export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from probe.cli import console
from probe.cli.run import summary
from probe.errors import (
    ArtifactCorrupt,
    BadInput,
    ModelUnavailable,
    ProbeError,
    RunDirectoryError,
    UsageError,
)


@console.main.command()
@console.run_argument
@console.json_option
def verify(run: Path, as_json: bool) -> None:
    """Check every file of a run against its checksum. Exit code 5 if something is missing or altered."""
    from probe.runs import verify as check

    report = check(run)
    if as_json:
        console.dump({"run": str(run), "complete": report.complete, "problems": report.problems})
    else:
        state = "complete" if report.complete else "incomplete"
        console.echo(f"{state}: {len(report.problems)} problems")
        for problem in report.problems:
            console.echo(console.printable(problem))
    if report.problems:
        raise ArtifactCorrupt(f"{run}: {len(report.problems)} files do not check")


@console.main.command("ls")
@click.argument("directory", type=click.Path(path_type=Path), default=Path("runs"), required=False)
@console.json_option
def ls(directory: Path, as_json: bool) -> None:
    """List the runs of a directory (default: runs)."""
    from probe.runs import list_runs

    runs = list_runs(directory)
    if as_json:
        console.dump(runs)
        return
    if not runs:
        console.say(f"no runs in {directory}")
    for row in runs:
        cells = [
            row.get("id"),
            row.get("status"),
            _or_dash(row.get("model")),
            f"{_or_dash(row.get('tasks_done'))}/{_or_dash(row.get('tasks_total'))}",
            _bytes(row.get("bytes")),
        ]
        console.echo(console.printable("  ".join(str(cell) for cell in cells)))


def _or_dash(value: Any) -> Any:
    return "-" if value is None else value


def _bytes(size: Any) -> str:
    if not isinstance(size, int | float):
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return "-"


@console.main.command()
@console.run_argument
@click.argument("task_id", required=False)
@console.json_option
def show(run: Path, task_id: str | None, as_json: bool) -> None:
    """Show a run, or one task of it."""
    from probe.cli.show import run_lines, task_lines
    from probe.runs import Run

    opened = Run(run)
    if as_json:
        if task_id:
            task = opened[task_id]
            console.dump({**task.record, "tensors": {name: list(task.shape(name)) for name in task}})
        else:
            console.dump({"run": str(run), **summary(opened), "run_json": opened.run})
        return
    for line in task_lines(opened[task_id]) if task_id else run_lines(opened, summary(opened)):
        console.echo(console.printable(line))


class _WithExperiments(click.Command):
    """A command whose help ends with the registry of experiments: read when help is asked for, not before."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from probe.experiments import EXPERIMENTS

        titles = {
            "tool": "Experiments on tool tasks, scored again with one thing changed",
            "cot": "Experiments on chains of thought",
            "prompting": "Experiments on prompting tasks, run again from the middle",
        }
        for analyzer, title in titles.items():
            entries = [entry for entry in EXPERIMENTS.values() if entry.analyzer == analyzer]
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (e.name, e.changes.replace("`", "") + (" (runs only if named)" if e.by_name else ""))
                        for e in entries
                    ]
                )


@console.main.command(cls=_WithExperiments)
@console.run_argument
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--no-model", is_flag=True, help="Run no experiment: measure what the run holds.")
@click.option(
    "--orders",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="Orders drawn for a task of 5 or more tools; fewer tools: all orders.",
)
@click.option(
    "--draws",
    type=click.IntRange(min=2),
    default=4,
    show_default=True,
    help="Intentions drawn for each task.",
)
@click.option(
    "--every-tool",
    is_flag=True,
    help="Change every tool and swap every pair, not only the most probable and the right ones.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of orders, intentions and controls."
)
@console.json_option
def analyze(run: Path, names: tuple[str, ...], no_model: bool, as_json: bool, **effort: Any) -> None:
    """Make experiments on a run, measure it, and renew its measures and report.

    Without a NAME, the experiments that are missing and all analyzers that apply are run. With names, only these: a
    named experiment is repeated and its analyzer is run. Options apply to the experiments that run now.

    Analyzers read the run alone: tool, prompting, cot, distribution, and those of installed packages.

    What was made stays in the run. docs/tool-use.md, docs/cot.md, docs/prompting.md and docs/distribution.md
    define every experiment and measure.
    """
    from probe.analyzers import analyze as compute
    from probe.experiments import EXPERIMENTS, Effort, intervene
    from probe.report import write_report
    from probe.runs import Run

    opened = Run(run)
    experiments = [name for name in names if name in EXPERIMENTS]
    analyzers = [name for name in names if name not in EXPERIMENTS]
    if experiments and no_model:
        raise UsageError(f"analyze {experiments[0]} --no-model: an experiment needs the model")
    _refuse_unknown(analyzers, list(EXPERIMENTS))
    if experiments or not (names or no_model):
        with console.watched() as progress:
            try:
                intervene(opened, experiments, effort=Effort(**effort), progress=progress)
            except (BadInput, ModelUnavailable, RunDirectoryError) as error:
                if experiments:
                    raise
                console.say(f"no experiments: {error}")
    read = dict.fromkeys(EXPERIMENTS[name].analyzer for name in experiments)
    analyzers += [name for name in read if name not in analyzers]
    table = compute(opened, analyzers)
    if opened.has_report:
        write_report(opened)
    counts: dict[str, int] = {}
    for analyzer in table.column("analyzer").to_pylist():
        counts[analyzer] = counts.get(analyzer, 0) + 1
    if as_json:
        console.dump({"run": str(run), "rows": table.num_rows, "by_analyzer": counts})
    else:
        for name, count in counts.items():
            console.echo(f"{name}: {count:,} measures")


def _refuse_unknown(names: Sequence[str], experiments: Sequence[str]) -> None:
    """Refuse unknown names before the experiments, which take minutes."""
    from difflib import get_close_matches

    from probe.analyzers import analyzers

    known = [*analyzers(), *experiments]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UsageError(f"no analyzer or experiment {name!r}: {hint}")


@console.main.command()
@console.run_argument
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write here [default: report.html in the run]."
)
@console.json_option
def report(run: Path, output: Path | None, as_json: bool) -> None:
    """Write the run's report, one self-contained HTML file."""
    from probe.report import write_report
    from probe.runs import Run

    path = write_report(Run(run), output)
    console.dump({"report": str(path)}) if as_json else console.echo(str(path))


@console.main.command()
@click.argument("baseline", type=click.Path(path_type=Path))
@console.run_argument
@console.json_option
def diff(baseline: Path, run: Path, as_json: bool) -> None:
    """Compare two runs; exit code 1 names the first task, site, layer and row that diverges."""
    from probe.runs import Run
    from probe.runs import diff as compare

    comparison = compare(Run(baseline), Run(run))
    if as_json:
        console.dump({"equal": not comparison, "differences": [_as_dict(item) for item in comparison]})
    elif not comparison:
        console.echo("no difference beyond tolerance")
    else:
        for item in comparison[:10]:
            console.echo(console.printable(item.message))
        if len(comparison) > 10:
            console.echo(f"… and {len(comparison) - 10} more")
    if comparison:
        raise ProbeError(f"{len(comparison)} differences, the first: {comparison[0].message}")


def _as_dict(item: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(item)


@console.main.command()
@console.run_argument
@click.option("--format", "form", type=click.Choice(["parquet", "jsonl", "csv"]), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@console.json_option
def export(run: Path, form: str, output: Path, as_json: bool) -> None:
    """Write the measures (a file), or measures and tasks (a directory), for other tools."""
    from probe.runs import Run
    from probe.runs import export as write

    paths = [str(path) for path in write(Run(run), form, output)]
    console.dump({"files": paths}) if as_json else console.echo("\n".join(paths))
