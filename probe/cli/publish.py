"""`push` and `pull`: a run as a dataset repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from probe.cli import console


@console.main.command()
@console.run_argument
@click.argument("repository", metavar="REPO")
@click.option(
    "--public", is_flag=True, help="Make a new repository one that everybody sees [default: private]."
)
@click.option("-m", "--message", help="Message of the commit.")
@console.json_option
def push(run: Path, repository: str, public: bool, message: str | None, as_json: bool) -> None:
    """Upload a finished run to the dataset repository REPO, OWNER/NAME, of the Hugging Face hub.

    \b
    hf auth login
    probe push runs/mine me/my-run              a private repository, with a card that says what the run is
    probe pull me/my-run --out runs/copy        elsewhere

    The run is verified first. Its files tell what ran where: prompts and completions, the command line, paths of this machine.
    A repository that is there keeps its visibility.
    """
    from probe.runs import Run, publish

    commit = publish.push(Run(run), repository, public=public, message=message)
    console.dump({"repository": repository, "commit": commit}) if as_json else console.echo(commit)


@console.main.command()
@click.argument("repository", metavar="REPO")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Run directory, new or empty [default: runs/NAME of the repository].",
)
@click.option("--revision", help="Branch, tag or commit [default: the newest].")
@console.json_option
def pull(repository: str, out: Path | None, revision: str | None, as_json: bool) -> None:
    """Download a run that `probe push` uploaded, and compare every checksum before it appears.

    \b
    probe pull me/my-run                        into runs/my-run
    probe pull me/my-run --revision 1f2e3d4 --out runs/then

    Its report.html is a page of whoever pushed it: `probe report` makes it again.
    """
    from probe.runs import publish

    run = publish.pull(repository, out or Path("runs") / repository.rpartition("/")[2], revision=revision)
    console.dump({"run": str(run.path), "tasks": len(run)}) if as_json else console.echo(str(run.path))
