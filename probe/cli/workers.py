"""One run by many: parts of it put together."""

from __future__ import annotations

from pathlib import Path

import click

from probe.cli import console
from probe.cli.run import print_end


@console.main.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory, new or empty.")
@click.option("--no-analyze", is_flag=True, help="Leave analyses and report for later.")
@console.json_option
def merge(runs: tuple[Path, ...], out: Path, no_analyze: bool, as_json: bool) -> None:
    """Put runs of the shards of a task file together, as one run.

    What differs in weights, chat template, options or task file is refused by name (exit code 2). Every task is compared with
    its checksums while it is copied. Tasks that no run has are missing; `probe resume` runs them.
    """
    from probe import api

    with console.watched() as progress:
        done = api.merge(runs, out, analyze=not no_analyze, progress=progress)
    print_end(done, as_json)
