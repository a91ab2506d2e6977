"""One run by many: workers that join it, and parts of it put together."""

from __future__ import annotations

from pathlib import Path

import click

from probe.cli import console
from probe.cli.run import print_end


@console.main.command()
@console.run_argument
@click.option("--device", help="cpu, cuda, cuda:N or auto [default: that of the run].")
@click.option(
    "--lease",
    "lease_s",
    type=click.FloatRange(1),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="How long this worker may give no sign of life before one on another machine takes over its tasks.",
)
@click.option("--no-analyze", is_flag=True, help="Leave analyses and report for later.")
@console.json_option
def worker(run: Path, device: str | None, lease_s: float, no_analyze: bool, as_json: bool) -> None:
    """Run tasks of a run beside other workers, until every task is committed.

    May be started any number of times, on any machine that sees the run directory, by hand, Slurm or anything else:
    `probe run … --prepare` begins a run for it. A worker that is killed costs the tasks that it was at, which others run
    again. The last one writes the manifest, the analyses and the report.
    """
    from probe import api

    with console.watched() as progress:
        done = api.work(run, analyze=not no_analyze, device=device, lease_s=lease_s, progress=progress)
    if done is not None:
        print_end(done, as_json)
    elif as_json:
        console.dump({"run": str(run), "status": "started"})
    else:
        console.say("other workers are still at it: the last one writes the end")
        console.echo(str(run))


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
