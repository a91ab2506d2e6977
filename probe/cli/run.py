"""Running tasks: `run` and `resume`, their options, and what they print at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from probe.cli import console
from probe.errors import ProbeError, UsageError

if TYPE_CHECKING:
    from probe.capture.edits import Steering


def read_system(path: Path) -> str:
    """The text of a system message's file, without blanks around it. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is no UTF-8"
        raise UsageError(f"--system {path}: {why}: give a file that holds the message's text") from None


def _system_text(_ctx: click.Context, _parameter: click.Parameter, path: Path | None) -> str | None:
    return None if path is None else read_system(path)


def _options_of_one_run(function: Callable) -> Callable:
    """Options that runs of a sweep do not share."""
    options = [
        click.option(
            "--model",
            default="smollm2-135m",
            show_default=True,
            help="Name, hub id, directory or random:NAME; see `probe models`.",
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            help="Run directory, new or empty [default: a fresh one in runs/].",
        ),
        click.option(
            "--seed",
            type=console.Count(),
            default=0,
            show_default=True,
            help="Seed of sampling; greedy runs do not use it.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            default="float32",
            show_default=True,
        ),
        click.option(
            "--edit",
            "edits",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Run under the edits of a file that `probe.write_edits` wrote: vectors added to states of layers.",
        ),
        click.option(
            "--system",
            type=click.Path(path_type=Path),
            metavar="FILE",
            callback=_system_text,
            help="Text file: the system message of every task, in place of its own.",
        ),
        click.option(
            "--shard",
            metavar="I/N",
            help="Only the tasks whose ids fall into the I-th of N parts; `probe merge` puts the parts together.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def shared_options(function: Callable) -> Callable:
    """Options of a run that all runs of a sweep share."""
    options = [
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
        click.option("--limit", metavar="N|A-B", help="Only the first N tasks, or tasks A to B (from 1)."),
        click.option(
            "--task-id", "task_ids", multiple=True, metavar="ID", help="Only this task; may be repeated."
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
            type=console.Count(1),
            help="[default: 8 prompting, 128 tool_selection, 256 cot, 512 agent, results included]",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(0),
            default=0.0,
            show_default=True,
            help="Sampling temperature; 0 is greedy.",
        ),
        click.option("--top-p", type=float, help="Nucleus sampling: mass kept."),
        click.option("--top-k", type=console.Count(1), help="Sampling from the k most probable tokens."),
        click.option(
            "--generator",
            type=click.Choice(["probe", "vllm", "transformers", "none"]),
            default="probe",
            show_default=True,
            help="What chooses the tokens. vllm: a server, then one prefill here; transformers: its `generate`, then the same; "
            "none: nothing is generated.",
        ),
        click.option(
            "--generator-url", metavar="URL", help="vllm: the server, such as http://localhost:8000."
        ),
        click.option(
            "--generator-model",
            metavar="NAME",
            help="vllm: name under which it serves the model [default: the only one].",
        ),
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
            "--template-arg",
            "template_args",
            multiple=True,
            metavar="KEY=VALUE",
            help="Variable of the chat template, such as enable_thinking=false; may be repeated.",
        ),
        click.option(
            "--date", metavar="ISO", help="What a chat template is told that writes the date [default: now]."
        ),
        click.option(
            "--capture",
            metavar="SITES",
            help="Comma-separated sites, `default`, `all`, `none`; SITE:all keeps every position.",
        ),
        click.option("--layers", metavar="L", help="Layers to capture, such as 0,4-7,-1 [default: all]."),
        click.option(
            "--rows",
            metavar="WORDS",
            help="Positions that have a row: `generated` (one a token of the completion), `all`, or fewer: `decision`, and with a comma "
            "`spans` (the last of each span) or `steps` (the last of each step) [default: generated].",
        ),
        click.option(
            "--max-bytes", type=console.Count(1), help="Refuse to start a run predicted to write more."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@console.main.command()
@click.argument("tasks", type=click.Path(path_type=Path))
@_options_of_one_run
@shared_options
@click.option(
    "--dry-run", is_flag=True, help="Load no weights: validate, render the first prompt, predict sizes."
)
@click.option("--no-analyze", is_flag=True, help="Leave analyses and report for later.")
@click.option(
    "--workers",
    type=console.Count(1),
    help="Processes of this machine that share the run and the weights' memory.",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Share the run among actors of a Ray cluster (HOST:PORT, auto, local); --workers says how many.",
)
@click.option("--prepare", is_flag=True, help="Only begin the run: `probe worker RUN` runs its tasks.")
@console.json_option
def run(
    tasks: Path,
    dry_run: bool,
    no_analyze: bool,
    workers: int | None,
    ray: str | None,
    prepare: bool,
    as_json: bool,
    batch_size: str,
    out: Path | None,
    **options: Any,
) -> None:
    """Run the tasks of a JSON-lines file and print the run directory.

    Exit codes: 0 all tasks ran, 1 some task failed, 2 usage, 3 bad input file, 4 run directory busy or not
    empty, 6 model not available, 7 disk or I/O.
    """
    from probe import api

    options["batch_size"] = parse_batch_size(batch_size)
    edits = api.read_edits(options["edits"]) if options["edits"] else ()
    del options["edits"]
    if dry_run:
        _dry_run(tasks, out, options, edits, as_json)
        return
    with console.watched() as progress:
        model = options.pop("model")
        done = api.run(
            tasks,
            model=model,
            out=out,
            analyze=not no_analyze,
            progress=progress,
            edits=edits,
            workers=workers,
            ray=ray,
            prepare=prepare,
            **options,
        )
    if prepare:
        console.say(f"prepared: `probe worker {done.path}`, any number of times, runs it")
    print_end(done, as_json)


def parse_batch_size(text: str) -> int | None:
    """`auto` is None. Raises BadParameter."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise click.BadParameter(f"{text}: a positive number or auto", param_hint="--batch-size")
    return int(text)


def print_end(done: Any, as_json: bool) -> None:
    """What a command that ran tasks prints last. Raises ProbeError where some task failed."""
    from probe.runs.summary import summary

    totals = summary(done)
    if as_json:
        console.dump({"run": str(done.path), **totals})
    else:
        _print_summary(totals)
        if totals["report"]:
            console.say(f"report: {totals['report']}")
        console.echo(str(done.path))
    if totals["counts"].get("error") or totals["counts"].get("nonfinite"):
        raise ProbeError("some tasks failed; `probe show` names them")


def _print_summary(summary: dict[str, Any]) -> None:
    from probe.runs.summary import fallback_lines, score_text

    counts = ", ".join(f"{n} {status}" for status, n in sorted(summary["counts"].items()))
    console.say(f"{summary['status']}: {counts or 'no task'}")
    for kind, value in summary["accuracy"].items():
        console.say(f"{kind}: score {score_text(value)}")
    for line in fallback_lines(summary):
        console.say(line)


def _dry_run(
    tasks: Path, out: Path | None, options: dict[str, Any], edits: tuple[Steering, ...], as_json: bool
) -> None:
    from probe.harness.dryrun import dry_run

    predicted = dry_run(tasks, out, options, edits)
    if as_json:
        console.dump(predicted)
    else:
        _print_dry_run(predicted)
    if predicted["refused"]:
        raise UsageError(predicted["refused"])
    if predicted["without_prompt"]:
        raise ProbeError(f"{len(predicted['without_prompt'])} of {predicted['n_tasks']} tasks cannot be run")


def _print_dry_run(predicted: dict[str, Any]) -> None:
    if first := predicted["first_prompt"]:
        console.echo(console.printable(first["text"]))
        console.say("—" * 40)
        console.say(
            f"first task {first['id']}: {first['n_tokens']} tokens, template {first['template']['name']}"
        )
    for notice in predicted["notices"]:
        console.say(notice)
    console.say(
        f"{predicted['n_tasks']} tasks, {predicted['prompt_tokens']:,} prompt tokens, at most {predicted['new_tokens']:,} new"
    )
    console.say(
        f"on disk at most {predicted['disk_bytes']:,} bytes; in memory about {predicted['memory_bytes']:,} bytes"
    )
    for site, size in predicted["costliest"]:
        console.say(f"  {site:16} {size:>15,} bytes")
    for option, sizes in predicted["by_choice"].items():
        for word, size in sizes.items():
            console.say(f"  {f'--{option} {word}':20} {size:>15,} bytes on disk at most")


@console.main.command()
@console.run_argument
@click.option("--no-analyze", is_flag=True)
@click.option(
    "--workers", type=console.Count(1), help="Processes of this machine that share what is missing."
)
@console.json_option
def resume(run: Path, no_analyze: bool, workers: int | None, as_json: bool) -> None:
    """Run what is missing of an interrupted run."""
    from probe import api

    with console.watched() as progress:
        done = api.resume(run, analyze=not no_analyze, workers=workers, progress=progress)
    print_end(done, as_json)
