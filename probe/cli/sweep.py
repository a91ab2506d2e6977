"""`probe sweep`: the runs of a grid, in one folder, and their comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from probe.cli import console
from probe.cli.run import parse_batch_size, read_system, shared_options
from probe.errors import ProbeError, UsageError

_OWN = "none"
"""What stands for the tasks' own system messages among the files."""


def _listed(_ctx: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())


@console.main.command()
@click.argument("tasks", type=click.Path(path_type=Path))
@click.option(
    "--model",
    "models",
    multiple=True,
    callback=_listed,
    default=("smollm2-135m",),
    show_default=True,
    metavar="A,B",
    help="Models, with commas between them or the option repeated; see `probe models`.",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    callback=_listed,
    default=("float32",),
    show_default=True,
    metavar="A,B",
    help="float32, bfloat16, float16.",
)
@click.option(
    "--system",
    "systems",
    multiple=True,
    metavar="FILE",
    help=f"Text file of a system message, in place of the tasks' own; `{_OWN}` is their own. May be repeated.",
)
@click.option(
    "--seed",
    "seeds",
    callback=console.numbers(int),
    default="0",
    show_default=True,
    metavar="N,N",
    help="Seeds of sampling; greedy runs do not use them.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the runs; the same one is continued [default: runs/sweep-NAME].",
)
@shared_options
@click.option("--dry-run", is_flag=True, help="Load no weights: list the cells and what they would cost.")
@console.json_option
def sweep(
    tasks: Path,
    models: tuple[str, ...],
    dtypes: tuple[str, ...],
    systems: tuple[str, ...],
    seeds: tuple[int, ...],
    out: Path | None,
    dry_run: bool,
    as_json: bool,
    batch_size: str,
    **options: Any,
) -> None:
    """Run TASKS under every model, dtype, system message and seed, and compare the runs.

    \b
    probe sweep tasks.jsonl --model gpt2,smollm2-135m           two models
    probe sweep tasks.jsonl --system none --system brief.txt    the tasks as they are, and under another system message
    probe sweep tasks.jsonl --temperature 1 --seed 0,1,2 --dry-run

    Each cell is a run, as of `probe run` with its options. The same command continues a sweep that was stopped and adds
    cells to one that is finished; what is finished is not run again. A cell that fails does not end the others: the exit
    code is 1 then. At the end the runs are compared with the first one, as by `probe compare`.
    """
    from probe.api import sweep as run_cells
    from probe.api import sweep_folder
    from probe.harness.sweep import grid, predict

    options["batch_size"] = parse_batch_size(batch_size)
    texts = _texts(systems)
    folder = out or sweep_folder(tasks)
    cells = grid(models, dtypes, seeds, texts)
    if len(set(seeds)) > 1 and not options["temperature"]:
        console.say("--seed: greedy runs are the same under every seed; --temperature samples")
    if dry_run:
        _print_costs(folder, predict(tasks, folder, cells, options), as_json)
        return
    with console.watched() as progress:
        done = run_cells(
            tasks,
            models=models,
            dtypes=dtypes,
            seeds=seeds,
            systems=texts,
            out=folder,
            progress=progress,
            **options,
        )
    comparison, why = _comparison(done.runs)
    if as_json:
        told = [entry.document() for entry in done.cells]
        console.dump({"folder": str(folder), "cells": told, "comparison": comparison, "not_compared": why})
    else:
        if comparison is not None:
            from probe.cli.compare import comparison_lines

            for line in comparison_lines(comparison):
                console.echo(console.printable(line))
        elif why:
            console.say(f"not compared: {why}")
        for entry in done.cells:
            console.echo(str(entry.path))
    if done.problems:
        listed = "; ".join(f"{name}: {problem}" for name, problem in done.problems.items())
        raise ProbeError(f"{len(done.problems)} of {len(cells)} cells failed: {listed}")


def _texts(systems: tuple[str, ...]) -> dict[str, str | None]:
    """Name → text of the system messages, in the order in which they are given."""
    texts: dict[str, str | None] = {}
    for given in systems:
        name = given if given == _OWN else Path(given).stem
        if name in texts:
            raise UsageError(f"--system {given}: another file is called {name} too: rename one of them")
        texts[name] = None if given == _OWN else read_system(Path(given))
    return texts


def _comparison(runs: list[Any]) -> tuple[dict[str, Any] | None, str | None]:
    """The document of the runs' comparison, or why there is none."""
    from probe.analyzers.comparison import compare

    try:
        return compare(runs).document(), None
    except ProbeError as error:
        return None, str(error) if len(runs) > 1 else "there is one run alone" if runs else "no run ended"


def _print_costs(folder: Path, cells: list[dict[str, Any]], as_json: bool) -> None:
    problems = [cell["problem"] for cell in cells if cell["problem"]]
    if as_json:
        console.dump({"folder": str(folder), "cells": cells})
    else:
        for cell in cells:
            console.echo(
                console.printable(f"{Path(cell['run']).name}  {cell['status']}  {_cost(cell)}".rstrip())
            )
        total = sum(cell.get("disk_bytes", 0) for cell in cells)
        console.say(f"{len(cells)} cells, on disk at most {total:,} bytes in {folder}")
    if problems:
        raise ProbeError(f"{len(problems)} of {len(cells)} cells cannot be run: {problems[0]}")


def _cost(cell: dict[str, Any]) -> str:
    if cell["problem"]:
        return str(cell["problem"])
    if "n_tasks" not in cell:
        return ""
    return (
        f"{cell['n_tasks']} tasks, {cell['prompt_tokens']:,} prompt tokens, at most {cell['new_tokens']:,} new and "
        f"{cell['disk_bytes']:,} bytes, in memory about {cell['memory_bytes']:,} bytes"
    )
