"""The command line: parse, call one function, print. stdout carries data, stderr progress and messages."""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unicodedata import category

import click

from probe import __version__
from probe.errors import (
    ArtifactCorrupt,
    BadInput,
    ModelUnavailable,
    ProbeError,
    RunDirectoryError,
    UsageError,
)

_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
_run_argument = click.argument("run", type=click.Path(path_type=Path))


class _Commands(click.Group):
    """Turns probe's errors into one message and their exit code, for every command alike."""

    def invoke(self, ctx: click.Context) -> Any:
        from probe.runner import Stopped

        try:
            return super().invoke(ctx)
        except ProbeError as error:
            _say(str(error))
            ctx.exit(error.exit_code)
        except Stopped as stopped:
            _say(f"stopped by {stopped}; `probe resume` continues the run")
            ctx.exit(128 + stopped.number)
        except KeyboardInterrupt:
            ctx.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)


def _say(message: str) -> None:
    click.echo(_printable(message), err=True)


def _printable(text: str) -> str:
    """Model and file text is data: what moves a cursor or reorders a line never reaches a terminal.

    Line breaks, tabs and the spaces of other scripts stay.
    """
    return "".join(c if c.isprintable() or c in "\n\t" or category(c) == "Zs" else "\ufffd" for c in text)


def _plain() -> bool:
    return not sys.stderr.isatty() or bool(os.environ.get("NO_COLOR")) or bool(os.environ.get("CI"))


def _dump(value: Any) -> None:
    # ASCII alone: it survives every encoding of stdout, and nothing in it can reorder a terminal's line.
    click.echo(json.dumps(value, default=str))


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="probe")
def main() -> None:
    """Probe tool use and chain-of-thought reasoning in language models.

    A hooked transformer runs the tasks of a file; its hidden states, key/value memory and attention over tool
    descriptions are captured into a run directory, analyzed and reported.

    \b
    probe run tasks/tools.jsonl                      the default model on the shipped tool tasks
    probe run my.jsonl --model gemma-2b --dtype bfloat16
    probe show runs/<id>                             what came out; `probe report` for the picture
    """
    # The interpreter's last garbage collection looks through all of torch and transformers: a second.
    atexit.register(gc.freeze)


_tool_files = click.option(
    "--tool-file",
    "files",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Python file whose public, typed functions are tools; it is run. May be repeated.",
)


def _run_options(function: Callable) -> Callable:
    options = [
        click.option(
            "--model",
            default="smollm2-135m",
            show_default=True,
            help="Name, hub id, directory or random:NAME; see `probe models`.",
        ),
        click.option(
            "--tools",
            type=click.Path(),
            help="Tool catalogue [default: ../tools beside the task file's folder, else ./tools].",
        ),
        click.option(
            "--tool-file",
            "tool_files",
            type=click.Path(),
            multiple=True,
            help="Python file whose public, typed functions agents may call; it is run. May be repeated.",
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            help="Run directory, new or empty [default: a fresh one in runs/].",
        ),
        click.option("--limit", metavar="N|A-B", help="Only the first N tasks, or tasks A to B (from 1)."),
        click.option(
            "--task-id", "task_ids", multiple=True, metavar="ID", help="Only this task; may be repeated."
        ),
        click.option(
            "--seed", type=int, default=0, show_default=True, help="Of sampling; greedy runs do not use it."
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            default="float32",
            show_default=True,
        ),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N or auto."),
        click.option("--revision", help="Hub revision of the model."),
        click.option("--offline", is_flag=True, help="Never look for anything outside this machine."),
        click.option(
            "--batch-size",
            default="auto",
            show_default=True,
            metavar="N|auto",
            help="Sequences that run together.",
        ),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(1),
            help="[default: 8 prompting, 48 tool_selection, 256 cot, 512 agent, results included]",
        ),
        click.option(
            "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy."
        ),
        click.option("--top-p", type=float, help="Nucleus sampling: mass kept."),
        click.option("--top-k", type=click.IntRange(1), help="Sampling from the k most probable tokens."),
        click.option(
            "--reasoning",
            type=click.Choice(["generate", "reference"]),
            default="generate",
            show_default=True,
            help="cot: let the model reason, or teacher-force the task's own steps.",
        ),
        click.option(
            "--tool-choice",
            type=click.Choice(["auto", "required"]),
            default="auto",
            show_default=True,
            help="agent: `required` begins the first turn with the opener of a call.",
        ),
        click.option(
            "--capture",
            metavar="SITES",
            help="Comma-separated sites, `default`, `all`, `none`; SITE:all keeps every position.",
        ),
        click.option("--layers", metavar="L", help="Layers to capture, such as 0,4-7,-1 [default: all]."),
        click.option(
            "--max-bytes", type=click.IntRange(1), help="Refuse to start a run predicted to write more."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@main.command()
@click.argument("tasks", type=click.Path(path_type=Path))
@_run_options
@click.option(
    "--dry-run", is_flag=True, help="Load no weights: validate, render the first prompt, predict sizes."
)
@click.option("--no-analyze", is_flag=True, help="Leave analyses and report for later.")
@_json_option
def run(
    tasks: Path,
    dry_run: bool,
    no_analyze: bool,
    as_json: bool,
    batch_size: str,
    out: Path | None,
    **options: Any,
) -> None:
    """Run the tasks of a JSON-lines file and print the run directory.

    Exit codes: 0 all tasks ran, 1 some task failed, 2 usage, 3 bad input file, 4 run directory busy or not
    empty, 6 model not available, 7 disk or I/O.
    """
    from probe import runner

    options["batch_size"] = _batch_size(batch_size)
    if dry_run:
        _dry_run(tasks, out, options, as_json)
        return
    with _progress() as progress:
        model = options.pop("model")
        done = runner.run(tasks, model=model, out=out, analyze=not no_analyze, progress=progress, **options)
    _finished(done, as_json)


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise click.BadParameter(f"{text}: a positive number or auto", param_hint="--batch-size")
    return int(text)


def _finished(done: Any, as_json: bool) -> None:
    summary = _summary(done)
    if as_json:
        _dump({"run": str(done.path), **summary})
    else:
        _print_summary(summary)
        if summary["report"]:
            _say(f"report: {summary['report']}")
        click.echo(str(done.path))
    if summary["counts"].get("error") or summary["counts"].get("nonfinite"):
        raise ProbeError("some tasks failed; `probe show` names them")


def _summary(done: Any) -> dict[str, Any]:
    from probe.analyzers.statistics import bootstrap_mean, wilson

    counts: dict[str, int] = {}
    scores: dict[str, list[float]] = {}
    for task in done:
        record = task.record
        counts[record["status"]] = counts.get(record["status"], 0) + 1
        if "score" in record:
            scores.setdefault(record["kind"], []).append(record["score"])
    accuracy = {}
    for kind, values in scores.items():
        mean = sum(values) / len(values)
        # A prompting task's score is a share of its variants: no longer right or wrong, so no Wilson interval.
        shares = set(values) <= {0.0, 1.0}
        low, high = wilson(mean, len(values)) if shares else bootstrap_mean(values) or (0.0, 1.0)
        accuracy[kind] = {
            "mean": mean,
            "low": low,
            "high": high,
            "n": len(values),
            "unit": "share of tasks" if shares else "mean score",
        }
    report = done.path / "report.html"
    return {
        "status": done.run["status"],
        "counts": counts,
        "accuracy": accuracy,
        "report": str(report) if report.exists() else None,
    }


def _print_summary(summary: dict[str, Any]) -> None:
    counts = ", ".join(f"{n} {status}" for status, n in sorted(summary["counts"].items()))
    _say(f"{summary['status']}: {counts or 'no task'}")
    for kind, value in summary["accuracy"].items():
        _say(
            f"{kind}: score {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}] 95 %, n = {value['n']}"
        )


def _dry_run(tasks: Path, out: Path | None, options: dict[str, Any], as_json: bool) -> None:
    from probe.dryrun import dry_run

    found = dry_run(tasks, out, options)
    if as_json:
        _dump(found)
    else:
        _print_dry_run(found)
    if found["refused"]:
        raise UsageError(found["refused"])


def _print_dry_run(found: dict[str, Any]) -> None:
    click.echo(_printable(found["first_prompt"]["text"]))
    _say("—" * 40)
    first = found["first_prompt"]
    _say(f"first task {first['id']}: {first['n_tokens']} tokens, template {first['template']['name']}")
    _say(
        f"{found['n_tasks']} tasks, {found['prompt_tokens']:,} prompt tokens, at most {found['new_tokens']:,} new"
    )
    _say(f"on disk at most {found['disk_bytes']:,} bytes; in memory about {found['memory_bytes']:,} bytes")
    for site, size in found["costliest"]:
        _say(f"  {site:16} {size:>15,} bytes")


@main.command()
@_run_argument
@click.option("--no-analyze", is_flag=True)
@_json_option
def resume(run: Path, no_analyze: bool, as_json: bool) -> None:
    """Run what is missing of an interrupted run."""
    from probe import runner

    with _progress() as progress:
        done = runner.resume(run, analyze=not no_analyze, progress=progress)
    _finished(done, as_json)


@main.command()
@_run_argument
@_json_option
def verify(run: Path, as_json: bool) -> None:
    """Check every file of a run against its checksum. Exit code 5 if something is missing or altered."""
    from probe.store import verify as check

    report = check(run)
    if as_json:
        _dump({"run": str(run), "complete": report.complete, "problems": report.problems})
    else:
        state = "complete" if report.complete else "incomplete"
        click.echo(f"{state}: {len(report.problems)} problems")
        for problem in report.problems:
            click.echo(_printable(problem))
    if report.problems:
        raise ArtifactCorrupt(f"{run}: {len(report.problems)} files do not check")


@main.command("ls")
@click.argument("directory", type=click.Path(path_type=Path), default=Path("runs"), required=False)
@_json_option
def ls(directory: Path, as_json: bool) -> None:
    """List the runs of a directory (default: runs)."""
    from probe.store import list_runs

    runs = list_runs(directory)
    if as_json:
        _dump(runs)
        return
    if not runs:
        _say(f"no runs in {directory}")
    for row in runs:
        cells = [
            row.get("id"),
            row.get("status"),
            _or_dash(row.get("model")),
            f"{_or_dash(row.get('tasks_done'))}/{_or_dash(row.get('tasks_total'))}",
            _bytes(row.get("bytes")),
        ]
        click.echo(_printable("  ".join(str(cell) for cell in cells)))


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


@main.command()
@_run_argument
@click.argument("task_id", required=False)
@_json_option
def show(run: Path, task_id: str | None, as_json: bool) -> None:
    """Show a run, or one task of it."""
    from probe.show import run_lines, task_lines
    from probe.store import Run

    opened = Run(run)
    if as_json:
        if task_id:
            task = opened[task_id]
            _dump({**task.record, "tensors": {name: list(task.shape(name)) for name in task}})
        else:
            _dump({"run": str(run), **_summary(opened), "run_json": opened.run})
        return
    for line in task_lines(opened[task_id]) if task_id else run_lines(opened, _summary(opened)):
        click.echo(_printable(line))


@main.command()
@_run_argument
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--no-model", is_flag=True, help="Make no experiment: measure what the run itself holds.")
@click.option(
    "--orders",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="Orders drawn a task that shows 5 or more tools; of fewer, all are made.",
)
@click.option(
    "--draws", type=click.IntRange(min=2), default=4, show_default=True, help="Intentions drawn a task."
)
@click.option(
    "--every-tool",
    is_flag=True,
    help="Act upon every tool and exchange every pair, not only the most probable and the right ones.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of orders, intentions and controls.")
@_json_option
def analyze(run: Path, names: tuple[str, ...], no_model: bool, as_json: bool, **effort: Any) -> None:
    """Make experiments on a run, measure it, and renew its measures and report.

    Without a NAME, experiments that are missing are made and all analyzers that apply are run. With names, only
    these: an experiment that is named is made again and its analyzer is run; options act on what is made.

    \b
    Analyzers read the run alone: tool, prompting, cot, distribution, and those of installed packages.
    Experiments load the run's model and score its tool tasks again with one thing changed:
      base, order, content_free                   nothing; other orders; a request without content
      mask_all, mask_all_random                   no later token reads a description; as many others
      mask_decision, mask_decision_random         the decision alone does not
      mask_window                                 the same in one window of layers
      remove, swap, scramble                      a tool gone; descriptions exchanged; its name shuffled
      word                                        one word hidden at a time; made only where it is named
      intention                                   the model first says what it wants
      heads                                       heads that point at the tool read nothing
    or run its chains of thought again:
      knockouts                                   later tokens, or the answer alone, do not read a step
      deletions                                   a step is not in the text
      read_logit                                  what each step's memory brings to the emitted tokens' logits
      answer_lens                                 the answer's probability by step and layer
      early_answer, filler, mistake, paraphrase   made only where they are named: they write text
      resampling, regenerated                     so are these

    or run its prompting tasks again from the middle:
      lens                                        the shift of a prompt, layer by layer
      patch                                       a prompt's mean difference added to bare states, and taken out
      tuned_lens, task_vector                     made only where they are named

    What was made stays in the run. docs/tool-use.md, docs/cot.md, docs/prompting.md and docs/distribution.md
    define every experiment and measure.
    """
    from probe.analyzers import analyze as compute
    from probe.interventions import EXPERIMENTS, Effort, analyzer_of, intervene
    from probe.report import write_report
    from probe.store import Run

    opened = Run(run)
    experiments = [name for name in names if name in EXPERIMENTS]
    analyzers = [name for name in names if name not in EXPERIMENTS]
    if experiments and no_model:
        raise UsageError(f"analyze {experiments[0]} --no-model: an experiment needs the model")
    _refuse_unknown(analyzers, EXPERIMENTS)
    if experiments or not (names or no_model):
        with _progress() as progress:
            try:
                intervene(opened, experiments, effort=Effort(**effort), progress=progress)
            except (BadInput, ModelUnavailable, RunDirectoryError) as error:
                if experiments:
                    raise
                _say(f"no experiments: {error}")
    read = dict.fromkeys(analyzer_of(name) for name in experiments)
    analyzers += [name for name in read if name not in analyzers]
    table = compute(opened, analyzers)
    if opened.has_report:
        write_report(opened)
    counts: dict[str, int] = {}
    for analyzer in table.column("analyzer").to_pylist():
        counts[analyzer] = counts.get(analyzer, 0) + 1
    if as_json:
        _dump({"run": str(run), "rows": table.num_rows, "by_analyzer": counts})
    else:
        for name, count in counts.items():
            click.echo(f"{name}: {count:,} measures")


def _refuse_unknown(names: Sequence[str], experiments: Sequence[str]) -> None:
    """Before the experiments, which take minutes."""
    from difflib import get_close_matches

    from probe.analyzers import analyzers

    known = [*analyzers(), *experiments]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UsageError(f"no analyzer or experiment {name!r}: {hint}")


@main.command()
@_run_argument
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write here [default: report.html in the run]."
)
@_json_option
def report(run: Path, output: Path | None, as_json: bool) -> None:
    """Write the run's report, one self-contained HTML file."""
    from probe.report import write_report
    from probe.store import Run

    path = write_report(Run(run), output)
    _dump({"report": str(path)}) if as_json else click.echo(str(path))


@main.command()
@click.argument("baseline", type=click.Path(path_type=Path))
@_run_argument
@_json_option
def diff(baseline: Path, run: Path, as_json: bool) -> None:
    """Compare two runs; exit code 1 names the first task, site, layer and row that diverges."""
    from probe.store import Run
    from probe.store import diff as compare

    found = compare(Run(baseline), Run(run))
    if as_json:
        _dump({"equal": not found, "differences": [_as_dict(item) for item in found]})
    elif not found:
        click.echo("no difference beyond tolerance")
    else:
        for item in found[:10]:
            click.echo(_printable(item.message))
        if len(found) > 10:
            click.echo(f"… and {len(found) - 10} more")
    if found:
        raise ProbeError(f"{len(found)} differences, the first: {found[0].message}")


def _as_dict(item: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(item)


@main.command()
@_run_argument
@click.option("--format", "form", type=click.Choice(["parquet", "jsonl", "csv"]), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@_json_option
def export(run: Path, form: str, output: Path, as_json: bool) -> None:
    """Write the measures (a file), or measures and tasks (a directory), for other tools."""
    from probe.store import Run
    from probe.store import export as write

    paths = [str(path) for path in write(Run(run), form, output)]
    _dump({"files": paths}) if as_json else click.echo("\n".join(paths))


@main.group()
def tasks() -> None:
    """Task files."""


@tasks.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tools", type=click.Path(path_type=Path), help="Tool catalogue.")
@_tool_files
@_json_option
def lint(file: Path, tools: Path | None, files: tuple[Path, ...], as_json: bool) -> None:
    """Check a task file: mistakes (exit code 3), then what may be meant differently."""
    from probe.plan import runnable
    from probe.tasks import find_catalogue, read_tasks
    from probe.tasks import lint as check
    from probe.tools import read_catalogue

    path = find_catalogue(file, tools)
    read = read_tasks(file, read_catalogue(path) if path else None, lambda: runnable(files))
    warnings = check(read)
    if as_json:
        _dump({"tasks": len(read.tasks), "warnings": warnings})
        return
    for warning in warnings:
        click.echo(_printable(warning))
    _say(f"{len(read.tasks)} tasks, {len(warnings)} warnings")


@tasks.group("import")
def import_commands() -> None:
    """Task files from the data of benchmarks."""


@import_commands.command("bfcl")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--category", required=True, help="Such as simple_python, multiple, live_multiple, irrelevance."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Task file to write.")
@_json_option
def import_bfcl(directory: Path, category: str, output: Path, as_json: bool) -> None:
    """Write a category of the Berkeley Function Calling Leaderboard as tool_selection tasks.

    DIRECTORY is the unpacked package bfcl-eval (pip download --no-deps bfcl-eval, and unzip) or its folder data.
    """
    from probe.bfcl import read_bfcl
    from probe.store.export import write_file

    found = read_bfcl(directory, category)
    lines = [json.dumps(task, ensure_ascii=False) + "\n" for task in found.tasks]
    write_file(output, "".join(lines).encode())
    if as_json:
        refused = [{"id": task_id, "reason": reason} for task_id, reason in found.refused]
        _dump({"file": str(output), "tasks": len(found.tasks), "refused": refused})
        return
    for task_id, reason in found.refused:
        _say(f"left out {task_id}: {reason}")
    _say(f"{len(found.tasks)} tasks, {len(found.refused)} left out")
    click.echo(str(output))


@main.group("tools")
def tool_commands() -> None:
    """Tools: catalogues of definitions, and the tools that can be run."""


@tool_commands.command("list")
@click.option(
    "--tools", type=click.Path(path_type=Path), help="Tool catalogue [default: ./tools where there is one]."
)
@_tool_files
@_json_option
def list_tools(tools: Path | None, files: tuple[Path, ...], as_json: bool) -> None:
    """List the tools of a catalogue and those that can be run."""
    from probe.toolbox.registry import executables, listing
    from probe.tools import catalogue_files, read_catalogue

    path = tools or (Path("tools") if catalogue_files(Path("tools")) else None)
    rows = listing(read_catalogue(path) if path else {}, str(path), executables(files))
    if as_json:
        _dump(rows)
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        mark = "runs" if row["runs"] else "-"
        click.echo(_printable(f"{row['name']:{width}}  {mark:4}  {row['description']}"))
    for row in rows:
        if row["problem"]:
            _say(f"{row['name']}: {row['problem']}")


@tool_commands.command("call")
@click.argument("name")
@click.argument("arguments", metavar="ARGS-JSON")
@_tool_files
@click.option(
    "--root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The only directory that tools read from [default: a small archive of probe's own].",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, dir_okay=False),
    help="SQLite file of kept facts [default: none, nothing outlives the call].",
)
@_json_option
def call_tool(
    name: str, arguments: str, files: tuple[Path, ...], root: Path | None, state: Path | None, as_json: bool
) -> None:
    """Run a tool on a JSON object of arguments and print what a model would read.

    Exit code 1 where the call went wrong: what is printed then is the error, {"error": kind, "message": …}.
    """
    from probe.toolbox import Workspace, call, executables

    result = call(name, arguments, tools=executables(files), workspace=Workspace(root=root, state=state))
    _dump(result.as_dict()) if as_json else click.echo(_printable(result.content))
    if result.error == "unknown_tool":
        raise UsageError(f"{result.message}; `probe tools list` has all")
    if result.error:
        raise ProbeError(f"{name}: {result.error}: {result.message}")


class _OrAdapter(click.Group):
    """A first word that is no command is the argument of `adapter`: `probe lora PATH`."""

    default = "adapter"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


@main.group("lora", cls=_OrAdapter)
def lora() -> None:
    """Low-rank adapters: measure one (`probe lora ADAPTER`), compare ranks, compare runs before and after."""


@lora.command("adapter")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="Compare with this model's weights; auto: the one it names.")
@click.option("--alpha", type=float, help="Where a single file has no adapter_config.json: scale alpha / r.")
@click.option("--modules", is_flag=True, help="A line a module [default: a line a kind of module].")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the measures to this parquet file."
)
@click.option("--offline", is_flag=True, help="Never look for anything outside this machine.")
@_json_option
def lora_adapter(
    adapter: Path,
    base: str | None,
    alpha: float | None,
    modules: bool,
    output: Path | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Measure every B A of a PEFT LoRA adapter: norms, ranks, and with --base what it did to the weights.

    ADAPTER is a safetensors file, a directory, or a tree with several adapters. docs/lora.md defines the measures.
    """
    from probe.lora import command

    documents, measures = command.examine(adapter, base, alpha=alpha, offline=offline, log=_say)
    if output:
        command.write_parquet(measures, output)
    if as_json:
        _dump({"adapters": documents})
        return
    for found in documents:
        for line in command.lines(found, modules):
            click.echo(_printable(line))


def _numbers(kind: type) -> Callable[[click.Context, click.Parameter, str | None], tuple[Any, ...] | None]:
    """Several numbers with commas between them."""

    def read(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[Any, ...] | None:
        try:
            return None if value is None else tuple(kind(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"{value!r}: numbers with commas between them") from None

    return read


@lora.command("sweep")
@click.option("--ranks", callback=_numbers(int), help="Ranks [default: 1,2,4,8,16,64; --quick 4,64].")
@click.option("--seeds", type=click.IntRange(1), help="Trainings of each at its chosen rate [default: 3].")
@click.option(
    "--rates", callback=_numbers(float), help="Learning rates of adapters [default: 3e-4,1e-3,3e-3]."
)
@click.option(
    "--full-rates", callback=_numbers(float), help="Those of full fine-tuning [default: 3e-5,1e-4,3e-4]."
)
@click.option("--no-full", is_flag=True, help="Without full fine-tuning.")
@click.option(
    "--steps", type=click.IntRange(1), help="Optimizer steps of a training [default: 400; --quick 12]."
)
@click.option("--batch-size", "batch", type=click.IntRange(1), help="Lines a step [default: 8].")
@click.option(
    "--low", type=click.IntRange(1), help="The low rank of the claim [default: 4, else the lowest]."
)
@click.option("--quick", is_flag=True, help="Minutes instead of hours: a look, not a result.")
@click.option("--model", default="smollm2-135m", show_default=True, help="The model that is fine-tuned.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="train, selection, validation, text .jsonl [default: Tarn].",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Its directory [default: runs/lora-sweep(-quick)].",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it into this .png or .svg file.")
@click.option("--offline", is_flag=True, help="Never look for anything outside this machine.")
@_json_option
def lora_sweep(
    output: Path | None,
    plot: Path | None,
    data: Path | None,
    offline: bool,
    low: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Fine-tune at several ranks and put to the test that a low rank forgets and overfits less than a high one.

    Every finished training is kept: the same command continues a sweep that was stopped. docs/lora.md defines
    the measures and says how to read them.
    """
    from probe.lora import command

    setting = command.setting(given)
    command.check_plot(plot)
    directory = output or Path("runs") / ("lora-sweep-quick" if setting.quick else "lora-sweep")
    found = command.sweep(directory, setting, low, data=data, offline=offline, log=_say, watch=_trainings)
    if plot:
        command.draw(found, plot)
    if as_json:
        _dump(found)
        return
    for line in command.sweep_lines(found):
        click.echo(_printable(line))


@contextmanager
def _trainings(total: int) -> Iterator[Callable[[str], None]]:
    """A bar over the trainings of a sweep on a terminal, a line a training elsewhere."""
    if _plain():
        count = iter(range(1, total + 1))
        yield lambda message: _say(f"{next(count)}/{total} {message}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("trainings"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("trainings", total=total)

        def done(message: str) -> None:
            bar.console.print(message, markup=False, highlight=False)
            bar.advance(task)

        yield done


@lora.command("compare")
@click.argument("base", type=click.Path(path_type=Path), metavar="RUN_BASE")
@click.argument("adapted", type=click.Path(path_type=Path), metavar="RUN_ADAPTED")
@click.option("--all", "every", is_flag=True, help="Every measure, not only those that changed.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the differences to this parquet file."
)
@_json_option
def lora_compare(base: Path, adapted: Path, every: bool, output: Path | None, as_json: bool) -> None:
    """What fine-tuning changed: every measure of two runs of the same tasks, paired task by task. No model is used."""
    from probe.lora import command
    from probe.lora import compare as comparison
    from probe.store import Run

    found = comparison.compare(Run(base), Run(adapted))
    if output:
        command.write_parquet(comparison.measures(found), output)
    if as_json:
        _dump(found)
        return
    for line in comparison.lines(found, every):
        click.echo(_printable(line))


@main.command("memory")
@click.argument("model", required=False)
@click.option("--list-gpus", is_flag=True, help="The GPUs that --gpu knows, and their memory.")
@click.option(
    "--rule-of-thumb", "rule", is_flag=True, help="The half-precision rule, and what it leaves out."
)
@click.option("--gpu", help="Such as rtx-4090, a100-80gb, or a size such as 24GiB.")
@click.option("--method", default="full", show_default=True, help="full, lora or qlora.")
@click.option(
    "--precision", default="mixed", show_default=True, help="mixed: 16 bits, float32 masters; autocast; …"
)
@click.option("--optimizer", default="adamw", show_default=True, help="adamw is torch's fused one.")
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences at once on a GPU.")
@click.option("--length", type=int, default=512, show_default=True, help="Tokens of a sequence.")
@click.option("--attention", default="sdpa", show_default=True, help="sdpa, flash or eager.")
@click.option("--checkpointing", is_flag=True, help="Gradient checkpointing, layer by layer.")
@click.option("--accumulation", type=int, default=1, show_default=True, help="Batches before a step.")
@click.option("--rank", type=int, default=16, show_default=True, help="Of LoRA.")
@click.option("--targets", help="Layers LoRA adapts, such as q_proj,v_proj [default: all of a layer].")
@click.option("--no-double-quantization", is_flag=True, help="QLoRA with float32 constants.")
@click.option("--zero", type=int, default=0, show_default=True, help="ZeRO stage; 3 is FSDP's full shard.")
@click.option("--gpus", "n_gpus", type=int, default=1, show_default=True, help="GPUs that share the states.")
@click.option(
    "--measure",
    type=click.Choice(["tracked", "real"]),
    is_flag=False,
    flag_value="tracked",
    help="Follow one step without its memory, or run one.",
)
@click.option("--device", default="cpu", show_default=True, help="Of --measure real: cpu or cuda.")
@click.option("--plot", help="Draw the peak and the step in time into this .png or .svg.")
@click.option("--revision", help="Hub revision of the model.")
@click.option("--offline", is_flag=True, help="Never look for anything outside this machine.")
@_json_option
def memory(
    model: str | None, list_gpus: bool, rule: bool, gpu: str | None, as_json: bool, **options: Any
) -> None:
    """Memory that fine-tuning MODEL takes, by its configuration alone: weights, gradients, optimizer, activations.

    With --rule-of-thumb MODEL may be a number of parameters, such as 2B. Exit code 0 also where it does not fit.
    """
    from probe.finetune import command

    if model is None and not list_gpus:
        raise UsageError(
            "give a MODEL such as gemma-2b, or a number of parameters such as 2B with --rule-of-thumb"
        )
    found, rows = command.cards() if list_gpus else command.examine(model or "", rule, gpu, options)
    if as_json:
        _dump(found)
        return
    from rich.console import Console

    console = Console(no_color=bool(os.environ.get("NO_COLOR")), soft_wrap=True, highlight=False)
    for row in rows:
        console.print(row)


def _rule(
    _ctx: click.Context, parameter: click.Parameter, values: tuple[float, ...]
) -> list[tuple[str, float]]:
    assert parameter.name is not None
    return [(parameter.name.replace("_", "-"), value) for value in values]


def _rule_option(name: str, help_text: str) -> Callable:
    kind = int if name == "top-k" else float
    return click.option(f"--{name}", type=kind, multiple=True, callback=_rule, help=help_text)


@main.command("distribution")
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--task", metavar="ID", help="Task of the run [default: the first that keeps logits].")
@click.option("--passage", metavar="NAME", help="Of a prompting task: the variant [default: the first].")
@click.option("--decision", type=int, help="Captured decision of the task, from 0 [default: 0].")
@click.option("--row", type=int, help="Position instead: generated token of the run, or token of the prompt.")
@click.option(
    "--all", "every", is_flag=True, help="Every decision of the run, or every position of the prompt."
)
@click.option("--prompt", metavar="TEXT", help="Look at what follows this text.")
@click.option(
    "--texts", metavar="FILE", type=click.Path(path_type=Path), help="Loss of these texts, one a line."
)
@click.option(
    "--against", metavar="FILE", type=click.Path(path_type=Path), help="The gap from --texts to these."
)
@click.option("--model", metavar="NAME", help="For --prompt and --texts [default: smollm2-135m].")
@click.option(
    "--student", metavar="NAME", help="With --prompt: model that is distilled [default: a uniform one]."
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--offline", is_flag=True, help="Never look for anything outside this machine.")
@click.option(
    "--temperature", metavar="T|T,T|LOW:HIGH:COUNT", help="Of tokens [default: a grid, rules at 1]."
)
@click.option("--entropy", "entropies", type=float, multiple=True, help="Find the τ with this entropy, nats.")
@_rule_option("top-p", "Smallest most probable set of this mass; rules may be repeated.")
@_rule_option("top-k", "This many most probable tokens.")
@_rule_option("min-p", "At least this share of the highest probability.")
@_rule_option("typical", "Surprisal nearest to the entropy, up to this mass.")
@_rule_option("epsilon", "At least this probability.")
@_rule_option("eta", "At least min(ε, √ε·exp(−entropy)).")
@click.option("--plot", metavar="FILE", type=click.Path(path_type=Path), help="Write figures: .png or .svg.")
@_json_option
def distribution(as_json: bool, **asked: Any) -> None:
    """An output distribution: temperature, truncation, and its energies.

    \b
    probe distribution RUN                      the run's first captured decision
    probe distribution RUN --all                all of them: does the nucleus follow the entropy?
    probe distribution --prompt "The cat"       what follows a text
    probe distribution --texts A --against B    loss as energy against free energy, and the gap of B from A

    docs/distribution.md defines every number.
    """
    from probe.output.command import Request, execute, lines

    names = ("top_p", "top_k", "min_p", "typical", "epsilon", "eta")
    rules = tuple(rule for name in names for rule in asked.pop(name))
    found = execute(Request(**asked, rules=rules), _say)
    if as_json:
        _dump(found)
        return
    for line in lines(found):
        click.echo(_printable(line))


@main.command()
@_json_option
def models(as_json: bool) -> None:
    """List the model names probe knows; any hub id or directory works as well."""
    from probe.model.names import DEFAULT, SHAPES, aliases

    if as_json:
        _dump({"default": DEFAULT, "random": sorted(SHAPES), "aliases": aliases()})
        return
    click.echo(f"{DEFAULT}  (default) SmolLM2-135M-Instruct, dequantised from Q4_1")
    click.echo("random:NAME  random weights, no download; NAME is one of " + ", ".join(SHAPES))
    click.echo("DIRECTORY or FILE.gguf  local weights")
    click.echo("org/name[@revision]  any causal language model on the hub that needs no remote code")
    click.echo(
        f"{len(aliases())} TransformerLens aliases, among them gemma-2b, gpt2-small, pythia-70m (--json lists all)"
    )


@main.command()
@_json_option
def doctor(as_json: bool) -> None:
    """Say what probe finds here: versions, device, memory, cached default model, disk."""
    from probe.doctor import examine

    found = examine()
    if as_json:
        _dump(found)
        return
    for name, value in found.items():
        click.echo(f"{name}: {value}")


class _Progress:
    """Rich bar on a terminal, plain lines elsewhere; tasks, tokens per second and time left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._total = self._done = self._tokens = 0
        self._started = self._said = 0.0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def log(self, message: str) -> None:
        if message == "analyzing":
            gc.enable()
            if self._bar is not None:
                self._bar.stop()
        _say(message)

    def start(self, total: int) -> None:
        import time

        gc.freeze()
        gc.enable()
        self._total, self._started = total, time.monotonic()
        if _plain():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("tasks"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task("tasks", total=total, rate="")

    def done(self, record: dict[str, Any], n_tokens: int) -> None:
        import time

        self._done += 1
        self._tokens += n_tokens
        now = time.monotonic()
        elapsed = max(now - self._started, 1e-9)
        rate = f"{self._tokens / elapsed:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, advance=1, rate=rate)
        elif now - self._said > 10 or self._done == self._total:
            self._said = now
            left = elapsed / self._done * (self._total - self._done)
            _say(f"{self._done}/{self._total} tasks, {rate}, {left:.0f} s left")


@contextmanager
def _progress() -> Iterator[_Progress]:
    """Watches a run; until the model is loaded no garbage is collected, and what is there then is left alone.

    torch, transformers and a model are a million objects that stay to the end: looking through them took 0.6 s
    while they were made and 0.3 s of the first task.
    """
    gc.disable()
    try:
        with _Progress() as progress:
            yield progress
    finally:
        gc.unfreeze()
        gc.enable()
