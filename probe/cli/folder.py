"""A folder of one's own: `init` fills it, `ls` and `rm` look after its runs, `completion` makes a shell know the commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from probe.cli import console
from probe.errors import ProbeError, RunDirectoryError

_COLUMNS = ("id", "status", "model", "tasks", "bytes", "score")


@console.main.command("ls")
@click.argument("directory", type=click.Path(path_type=Path), default=Path("runs"), required=False)
@click.option(
    "--scores", is_flag=True, help="The mean score of each kind of task too: records are read for it."
)
@click.option(
    "--sort",
    type=click.Choice(["created", *_COLUMNS[:5]]),
    default="created",
    show_default=True,
    help="Smallest or oldest first.",
)
@click.option("--reverse", is_flag=True, help="Largest or newest first.")
@click.option("--model", metavar="TEXT", help="Only runs of models whose name holds this.")
@click.option(
    "--status", metavar="WORD", help="Only runs of this status: done, failed, interrupted, started, broken."
)
@console.json_option
def ls(
    directory: Path,
    scores: bool,
    sort: str,
    reverse: bool,
    model: str | None,
    status: str | None,
    as_json: bool,
) -> None:
    """List the runs of a directory (default: runs)."""
    from probe.runs import list_runs

    runs = [
        row
        for row in list_runs(directory)
        if (model is None or model.lower() in str(row["model"]).lower())
        and (status is None or status == row["status"])
    ]
    key = {"tasks": "tasks_done"}.get(sort, sort)
    # What has none comes last, whichever way round.
    known, unknown = ([row for row in runs if (row[key] is None) is absent] for absent in (False, True))
    runs = sorted(known, key=lambda row: row[key], reverse=reverse) + unknown
    if scores:
        for row in runs:
            row["scores"] = _scores(row)
    if as_json:
        console.dump(runs)
        return
    if not runs:
        console.say(f"no runs in {directory}")
    else:
        _print_table(runs, scores)


def _scores(row: dict[str, Any]) -> dict[str, Any] | None:
    from probe.runs import Run
    from probe.runs.summary import summary

    if row["problem"] is not None:
        return None
    try:
        return summary(Run(row["path"]))["accuracy"]
    except ProbeError as error:
        row["problem"] = str(error)
        return None


def _print_table(runs: Sequence[dict[str, Any]], scores: bool) -> None:
    from probe.runs.summary import score_text

    columns = _COLUMNS if scores else _COLUMNS[:5]
    lines: list[list[str]] = [list(columns)]
    for row in runs:
        done, total = row["tasks_done"], row["tasks_total"]
        state = "running" if row["active"] else row["status"]
        cells = [
            row["id"],
            state,
            row["model"],
            f"{_or_dash(done)}/{_or_dash(total)}",
            bytes_text(row["bytes"]),
        ]
        if scores:
            scored = (row["scores"] or {}).items()
            cells.append("; ".join(f"{kind} {score_text(value)}" for kind, value in scored) or None)
        lines.append([console.printable(_or_dash(cell)) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        console.echo(padded.rstrip())


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)


def bytes_text(size: Any) -> str:
    """A number of bytes as people read it."""
    if not isinstance(size, int | float):
        return "-"
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


@console.main.command("rm")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@console.json_option
def rm(runs: tuple[Path, ...], yes: bool, as_json: bool) -> None:
    """Remove runs, whole.

    What is no run, is written to just now, or holds files that no run has stays as it is (exit code 4).
    """
    from probe.runs import remove_run

    names = ", ".join(console.printable(str(run)) for run in runs)
    if not yes and not click.confirm(f"Remove {names}?", err=True):
        raise click.Abort
    removed: dict[str, int] = {}
    kept: list[ProbeError] = []
    for run in runs:
        try:
            removed[str(run)] = remove_run(run)
        except ProbeError as error:
            kept.append(error)
    if as_json:
        console.dump({"removed": removed, "kept": [str(error) for error in kept]})
    else:
        for run, size in removed.items():
            console.echo(console.printable(f"{run}  {bytes_text(size)}"))
    if kept:
        raise RunDirectoryError("; ".join(map(str, kept)))


@console.main.command("init")
@click.argument("directory", type=click.Path(path_type=Path), default=Path(), required=False)
@console.json_option
def init(directory: Path, as_json: bool) -> None:
    """Write a small start into a folder: tasks of two kinds, and the tools that they name.

    A file that is there already stops it before anything is written.
    """
    from probe.runs.export import write_file

    texts = starting_files()
    if taken := next((name for name in texts if (directory / name).exists()), None):
        raise RunDirectoryError(f"{directory / taken}: is there already: give another folder")
    for name, text in texts.items():
        write_file(directory / name, text.encode())
    if as_json:
        console.dump({"files": [str(directory / name) for name in texts]})
        return
    for name in texts:
        console.echo(str(directory / name))
    console.say(f"next: probe run {directory / 'tasks' / 'first.jsonl'}")


def starting_files() -> dict[str, str]:
    """Path → text of the files of a new folder."""
    import json

    tools = [
        {
            "name": "weather",
            "description": "Says what weather a city has today.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name of the city."}},
                "required": ["city"],
            },
        },
        {
            "name": "currency",
            "description": "Converts an amount of money from one currency to another.",
            "parameters": {
                "type": "object",
                "properties": {
                    "amount": {"type": "number"},
                    "from": {"type": "string", "description": "Such as EUR."},
                    "to": {"type": "string"},
                },
                "required": ["amount", "from", "to"],
            },
        },
        {
            "name": "reminder",
            "description": "Reminds the user of something at a time.",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "time": {"type": "string", "description": "HH:MM"},
                },
                "required": ["text", "time"],
            },
        },
    ]
    names = [tool["name"] for tool in tools]
    tasks: list[dict[str, Any]] = [
        {
            "id": "umbrella",
            "kind": "tool_selection",
            "input": "Do I need an umbrella in Oslo today?",
            "tools": names,
            "target": "weather",
        },
        {
            "id": "dollars",
            "kind": "tool_selection",
            "input": "What are 40 euros in dollars?",
            "tools": names,
            "target": "currency",
        },
        {
            "id": "thanks",
            "kind": "tool_selection",
            "input": "Thank you, that was all.",
            "tools": names,
            "target": None,
        },
        {
            "id": "marbles",
            "kind": "cot",
            "question": "Ana has 3 bags of 4 marbles and gives 5 marbles away. How many has she left?",
            "answer": "7",
            "steps": ["3 bags of 4 marbles are 12 marbles.", "12 less 5 are 7."],
        },
    ]
    return {
        "tasks/first.jsonl": "".join(json.dumps(task, ensure_ascii=False) + "\n" for task in tasks),
        "tools/catalogue.json": json.dumps(tools, indent=2) + "\n",
    }


@console.main.command("completion")
@click.argument("shell", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
@console.json_option
def completion(shell: str, as_json: bool) -> None:
    """Print what makes a shell complete commands, options and their values.

    \b
    bash   eval "$(probe completion bash)"                     in ~/.bashrc
    zsh    eval "$(probe completion zsh)"                      in ~/.zshrc
    fish   probe completion fish | source                      in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    source = get_completion_class(shell)
    assert source is not None
    script = source(console.main, {}, "probe", "_PROBE_COMPLETE").source()
    console.dump({"shell": shell, "script": script}) if as_json else console.echo(script)
