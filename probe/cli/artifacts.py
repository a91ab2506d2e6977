"""What a run left: `analyze`, `show`, `report`, `view`, `figures`, `verify`, `diff`, `export`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from probe.cli import console
from probe.errors import (
    ArtifactCorrupt,
    ProbeError,
    UsageError,
)
from probe.report import FORMATS


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


@console.main.command()
@console.readable_run_argument
@click.argument("task_id", required=False)
@click.option("--full", is_flag=True, help="Leave nothing out of long texts.")
@console.pager_option
@console.json_option
def show(run: Path, task_id: str | None, full: bool, no_pager: bool, as_json: bool) -> None:
    """Show a run, or one task of it."""
    from probe.cli.show import run_lines, task_lines
    from probe.runs import Run
    from probe.runs.summary import summary

    opened = Run(run)
    if as_json:
        if task_id:
            task = opened[task_id]
            console.dump({**task.record, "tensors": {name: list(task.shape(name)) for name in task}})
        else:
            console.dump({"run": str(run), **summary(opened), "run_json": opened.run})
        return
    lines = task_lines(opened[task_id], full) if task_id else run_lines(opened, summary(opened))
    console.echo_lines(lines, no_pager)


class _WithExperiments(click.Command):
    """A command whose help ends with the registry of experiments: read when help is asked for, not before."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from probe.experiments import EXPERIMENTS

        titles = {
            "tool": "Experiments on tool tasks, scored again with one thing changed",
            "features": "Experiments with a sparse autoencoder",
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
@click.option("--dry-run", is_flag=True, help="Load no weights: say what the experiments would run.")
@click.option("--no-model", is_flag=True, help="Run no experiment: measure what the run holds.")
@click.option(
    "--quick",
    is_flag=True,
    help="Make the deciding experiments alone: masks with their controls, swap; knockouts; patch.",
)
@click.option(
    "--train",
    metavar="OTHER_RUN",
    type=click.Path(path_type=Path),
    help="foresight: fit on this run's tasks too, and test on RUN's.",
)
@click.option(
    "--prompted",
    metavar="OTHER_RUN",
    type=click.Path(path_type=Path),
    help="foresight: what this run of the same tasks, under another prompt, chooses.",
)
@click.option(
    "--orders",
    type=console.Count(min=1),
    default=6,
    show_default=True,
    help="Orders drawn for a task of 5 or more tools; fewer tools: all orders.",
)
@click.option(
    "--draws",
    type=console.Count(min=2),
    help="Intentions drawn for each task (default: as many as --standard-error asks for), and continuations of a reasoning (4).",
)
@click.option(
    "--standard-error",
    type=click.FloatRange(min=0, min_open=True, max=0.5),
    default=0.05,
    show_default=True,
    help="Of P(action | state): 8 to --most-draws intentions are drawn, as many as it takes.",
)
@click.option(
    "--most-draws",
    type=console.Count(min=8),
    default=32,
    show_default=True,
    help="Most intentions drawn for a task to reach the standard error.",
)
@click.option(
    "--every-tool",
    is_flag=True,
    help="Change every tool and swap every pair, not only the most probable and the right ones.",
)
@click.option(
    "--pairs",
    type=click.Choice(["request", "description"]),
    default="request",
    show_default=True,
    help="patching: what the two prompts of a pair differ in.",
)
@click.option(
    "--systems",
    nargs=2,
    metavar="TEXT TEXT",
    help="patching: pairs of a task under these two system prompts.",
)
@click.option("--between", nargs=2, metavar="TASK TASK", help="patching: the one pair of these two tasks.")
@click.option(
    "--layers",
    "steer_layers",
    metavar="L,L…",
    callback=console.numbers(int),
    help="steering: layers behind which vectors are added (default: a third, two thirds and all of the way up).",
)
@click.option(
    "--doses",
    metavar="D,D…",
    callback=console.numbers(float),
    help="steering: lengths of vectors, in mean lengths of a state (default: 0.1,0.25,0.5,1).",
)
@click.option(
    "--most-kl",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="steering: price on unrelated text, nats, that the chosen layer and dose may have.",
)
@click.option(
    "--seed",
    type=console.Count(),
    default=0,
    show_default=True,
    help="Seed of orders, intentions and controls.",
)
@console.json_option
def analyze(
    run: Path,
    names: tuple[str, ...],
    no_model: bool,
    quick: bool,
    train: Path | None,
    prompted: Path | None,
    dry_run: bool,
    as_json: bool,
    **effort: Any,
) -> None:
    """Make experiments on a run, measure it, and renew its measures and report.

    Without a NAME, the experiments that are missing and all analyzers that apply are run. With names, only these: a
    named experiment is repeated and its analyzer is run. Options apply to the experiments that run now.

    Analyzers read the run alone: tool, foresight, features, prompting, cot, distribution, and those of installed packages.

    What was made stays in the run. docs/tool-use.md, docs/cot.md, docs/prompting.md and docs/distribution.md
    define every experiment and measure.
    """
    from probe import api
    from probe.analyzers.findings import findings
    from probe.harness.runner import RunStopped, stopping

    if dry_run:
        if no_model:
            raise UsageError("--dry-run with --no-model: nothing would be run")
        _dry_run(run, names, quick, effort, as_json)
        return
    with console.watched() as progress, stopping():
        try:
            opened = api.analyze(
                run,
                names,
                model=not no_model,
                quick=quick,
                train=train,
                prompted=prompted,
                progress=progress,
                **effort,
            )
        except RunStopped as stopped:
            stopped.advice = f"what was made is kept: {_going_on(run, names)}"
            raise
    counts: Counter[str] = Counter()
    for part in opened.table_parts("measures"):
        values = part["analyzer"].value_counts().to_pylist()
        counts.update({value["values"]: value["counts"] for value in values})
    sentences = findings(opened)
    more: dict[str, list[str]] = {}
    if "foresight" in names:
        from probe.analyzers.foresight import reasons

        more["foresight"] = reasons(opened)
    if "steering" in names:
        from probe.analyzers.tool.steering import claims

        more["steering"] = claims(opened)
    report = None if opened.report_path is None else str(opened.report_path)
    if as_json:
        document = {"run": str(run), "rows": counts.total(), "by_analyzer": counts}
        console.dump(document | {"findings": sentences, **more, "report": report})
        return
    for name, count in counts.items():
        console.echo(f"{name}: {count:,} measures")
    for sentence in sentences:
        console.echo(console.printable(sentence))
    for reason in more.get("foresight", ()):
        console.say(f"foresight: {reason}")
    for claim in more.get("steering", ()):
        console.echo(console.printable(f"steering: {claim}"))
    if report:
        console.say(f"report: {report}")
    console.echo(str(run))


@console.main.command()
@console.run_argument
@click.option(
    "--sae",
    required=True,
    metavar="DIR|HUB_ID",
    help="Directory, or OWNER/REPOSITORY/FOLDER of the hub: SAELens' cfg.json and sae_weights.safetensors, or Gemma Scope's params.npz "
    "or params.safetensors.",
)
@click.option(
    "--layer", type=console.Count(), help="Behind which it was trained, where its files do not say."
)
@click.option("--no-model", is_flag=True, help="Ablate nothing: read the states that the run holds.")
@click.option(
    "--top",
    type=console.Count(min=1),
    default=10,
    show_default=True,
    help="Features of the chosen tool that are ablated.",
)
@click.option("--seed", type=console.Count(), default=0, show_default=True, help="Seed of random features.")
@console.json_option
def features(
    run: Path, sae: str, layer: int | None, no_model: bool, top: int, seed: int, as_json: bool
) -> None:
    """What a sparse autoencoder makes of a run's choices of tools: how much it explains, which features go with which tool, and
    whether the choice flips without them.

    It is applied to the residual stream that the run holds; nothing is run for that. Then the run's model scores the names again
    with the features of the chosen tool set to zero, beside as many random ones and beside the reconstruction alone. Both stay
    in the run, those of one autoencoder a layer. docs/tool-use.md defines the measures.
    """
    from probe import api
    from probe.analyzers.features import sentences
    from probe.harness.runner import RunStopped, stopping

    with console.watched() as progress, stopping():
        try:
            opened = api.features(
                run, sae, layer=layer, model=not no_model, top=top, seed=seed, progress=progress
            )
        except RunStopped as stopped:
            stopped.advice = "what was made is kept: the same command goes on"
            raise
    told = sentences(opened)
    if as_json:
        console.dump({"run": str(run), "sae": sae, "findings": told})
        return
    for sentence in told:
        console.echo(console.printable(sentence))
    console.echo(str(run))


def _going_on(run: Path, names: Sequence[str]) -> str:
    """What makes the rest of a call that was stopped: without names all that is not made by name alone."""
    from probe.experiments import EXPERIMENTS

    by_name = [EXPERIMENTS[name] for name in names if name in EXPERIMENTS and EXPERIMENTS[name].by_name]
    if not by_name:
        return f"`probe analyze {run}` goes on"
    goes_on = all(entry.resumes for entry in by_name)
    call = " ".join(["probe analyze", str(run), *(entry.name for entry in by_name)])
    return f"`{call}` {'goes on' if goes_on else 'begins these again'}"


def _dry_run(run: Path, names: tuple[str, ...], quick: bool, effort: dict[str, Any], as_json: bool) -> None:
    from probe.experiments import EXPERIMENTS, Effort, predict
    from probe.runs import Run

    asked = [name for name in names if name in EXPERIMENTS]
    told = predict(Run(run), asked, quick=quick, effort=Effort(**effort)) if asked or not names else {}
    if as_json:
        console.dump({"run": str(run), "experiments": told})
        return
    for analyzer, cost in told.items():
        console.echo(
            f"{analyzer}: {cost['tasks']:,} tasks, about {cost['conditions']:,} conditions and {cost['tokens']:,} tokens, "
            f"{cost['ratio']:.1f} times those of the run"
        )
    if not told:
        console.echo("nothing is missing")


@console.main.command()
@console.readable_run_argument
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


@console.main.command("figures")
@console.readable_run_argument
@click.argument("names", nargs=-1, metavar="[MEASURE]...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder to write into [default: figures].",
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(FORMATS),
    multiple=True,
    default=("pdf",),
    show_default=True,
    help="vega: a Vega-Lite specification as JSON. May be repeated.",
)
@console.json_option
def figures(
    run: Path, names: tuple[str, ...], output: Path | None, formats: tuple[str, ...], as_json: bool
) -> None:
    """Write the run's measures as figures for a paper: points with intervals, curves, bars and matrices."""
    from probe.report.figures import write_figures
    from probe.runs import Run

    paths = [str(path) for path in write_figures(Run(run), output or Path("figures"), formats, names)]
    if as_json:
        console.dump({"files": paths})
        return
    for path in paths:
        console.echo(console.printable(path))
    if not paths:
        console.say(f"{run}: no measure of more than one number: name one, or `probe analyze {run}`")


@console.main.command()
@click.argument("runs", nargs=-1, required=True, type=console.RunPath(readable=True), metavar="RUN|URL...")
@click.option(
    "--port", type=console.Count(min=0, max=65535), default=0, help="Listen here [default: a free port]."
)
@click.option("--no-browser", is_flag=True, help="Say the address and open no browser.")
@console.json_option
def view(runs: tuple[Path, ...], port: int, no_browser: bool, as_json: bool) -> None:
    """Show runs in the browser without writing a file: each task is read when it is opened. Ctrl-C ends it.

    For runs too large for one page. The server listens on this machine alone, and its address holds a random token.
    """
    import webbrowser
    from contextlib import ExitStack, suppress

    from probe.report.server import Server, private_link
    from probe.runs import Run

    try:
        server = Server([Run(path) for path in runs], port)
    except OSError as error:
        raise UsageError(f"cannot listen on port {port}: {error.strerror}: give another --port") from None
    console.dump({"address": server.address}) if as_json else console.echo(server.address)
    with server, ExitStack() as opened:
        if not no_browser:
            with suppress(OSError):  # no room for the link's file: the address is printed
                webbrowser.open(opened.enter_context(private_link(server.address)))
        server.serve_forever()


@console.main.command()
@click.argument("baseline", type=console.RunPath(readable=True), metavar="RUN|URL")
@console.readable_run_argument
@console.json_option
def diff(baseline: Path, run: Path, as_json: bool) -> None:
    """Compare two runs; exit code 1 names the first task, site, layer and row that diverges."""
    from probe.runs import Run
    from probe.runs import diff as compare
    from probe.runs.edits import edits_text

    runs = Run(baseline), Run(run)
    hashes = [(opened.run.get("edits") or {}).get("sha256") for opened in runs]
    comparison = compare(*runs)
    if hashes[0] != hashes[1]:
        texts = (console.printable(edits_text(opened.run) or "none") for opened in runs)
        console.say(f"the runs are under other edits: {' / '.join(texts)}")
    if as_json:
        differences = [_as_dict(item) for item in comparison]
        same = hashes[0] == hashes[1]
        console.dump({"equal": not comparison, "same_edits": same, "differences": differences})
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
@console.readable_run_argument
@click.option(
    "--format",
    "form",
    type=click.Choice(["parquet", "jsonl", "csv", "eval", "arrow", "tokens"]),
    help="[default: as the file's extension says]; eval: a log of Inspect; arrow: a row a task, for datasets; tokens: a row a token.",
)
@click.option("--layer", type=int, help="arrow, tokens: the layer whose states are written.")
@click.option(
    "--site", default="resid_post", show_default=True, help="arrow, tokens: what is written with --layer."
)
@click.option(
    "--row",
    default="decision",
    show_default=True,
    help="arrow: whose state; 0 emits the first token, -1 the last.",
)
@click.option(
    "--seed",
    type=console.Count(min=0),
    default=0,
    show_default=True,
    help="tokens: of the order of the rows.",
)
@click.option(
    "--shard-rows",
    type=console.Count(min=1),
    default=100_000,
    show_default=True,
    help="tokens: rows of a file.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="File, directory, or - for stdout."
)
@console.json_option
def export(
    run: Path,
    form: str | None,
    layer: int | None,
    site: str,
    row: str,
    seed: int,
    shard_rows: int,
    output: Path,
    as_json: bool,
) -> None:
    """Write the measures (a file, or - for stdout), or measures and tasks (a directory), for other tools.

    \b
    probe export runs/mine -o measures.parquet
    probe export runs/mine --format csv -o tables/     measures.csv and tasks.csv
    probe export runs/mine -o mine.eval                the tasks as a log that `inspect view` opens
    probe export runs/mine --format arrow --layer 15 -o tasks/     a row a task with its state, for datasets.load_from_disk
    probe export runs/mine --format tokens --layer 15 -o tokens/   a row a token, shuffled over all tasks
    """
    _refuse_unused(form, layer)
    if form in ("arrow", "tokens"):
        paths = _export_dataset(run, form, layer, site, row, seed, shard_rows, output)
        console.dump({"files": paths}) if as_json else console.echo("\n".join(paths))
        return
    from probe.runs import Run
    from probe.runs import export as write
    from probe.runs.export import measures_bytes

    if str(output) == "-":
        if form in (None, "eval") or as_json:
            raise UsageError("-o -: give --format of a table, and no --json: one document goes to stdout")
        console.echo_bytes(measures_bytes(Run(run), form))
        return
    paths = [str(path) for path in write(Run(run), form, output)]
    console.dump({"files": paths}) if as_json else console.echo("\n".join(paths))


_EXPORT_OPTIONS = {
    "layer": ("arrow", "tokens"),
    "site": ("arrow", "tokens"),
    "row": ("arrow",),
    "seed": ("tokens",),
    "shard_rows": ("tokens",),
}
"""Option of `export` → the formats that take it."""


def _refuse_unused(form: str | None, layer: int | None) -> None:
    """Raise UsageError for an option that was given and would change nothing."""
    context = click.get_current_context()
    for name, forms in _EXPORT_OPTIONS.items():
        if context.get_parameter_source(name) is click.core.ParameterSource.DEFAULT:
            continue
        option = f"--{name.replace('_', '-')}"
        if form not in forms:
            raise UsageError(f"{option}: is for --format {' and '.join(forms)}")
        if form == "arrow" and layer is None:
            raise UsageError(f"{option}: says which state of a --layer is written: give --layer too")


def _export_dataset(
    run: Path, form: str, layer: int | None, site: str, row: str, seed: int, shard_rows: int, output: Path
) -> list[str]:
    from probe.runs import Run
    from probe.runs.bulk import TensorChoice
    from probe.runs.datasets import write_tasks, write_tokens

    if str(output) == "-":
        raise UsageError("-o -: a data set is a folder: give a new one")
    if form == "tokens":
        if layer is None:
            raise UsageError("--format tokens: give --layer: a row has the state of one layer")
        return [
            str(path)
            for path in write_tokens(Run(run), output, layer, site=site, seed=seed, shard_rows=shard_rows)
        ]
    at = int(row) if re.fullmatch(r"-?[0-9]+", row) else row
    choice = None if layer is None else TensorChoice(site, layer, at)
    return [str(path) for path in write_tasks(Run(run), output, choice)]
