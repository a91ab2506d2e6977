"""`pack` and `unpack`: many finished tasks in a few large files, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from probe.cli import console
from probe.cli.folder import bytes_text

if TYPE_CHECKING:
    from probe.runs import Packing


@console.main.command()
@console.run_argument
@click.option(
    "--pack-bytes",
    type=console.Count(min=1),
    default=2 * 2**30,
    show_default=True,
    help="Bytes of tensors at which a pack is full.",
)
@click.option("--dry-run", is_flag=True, help="Change nothing: say what would be packed.")
@console.json_option
def pack(run: Path, pack_bytes: int, dry_run: bool, as_json: bool) -> None:
    """Seal the finished tasks of a run into a few large files.

    \b
    probe pack runs/mine                        three files a task become five a pack of 2 GiB
    probe unpack runs/mine                      every file back, byte for byte

    Everything works on a packed run as before, on a half-packed one and on one that has not ended. A pack is written beside the
    tasks and read back before they are removed: one that is stopped loses nothing, and the same command goes on. Meanwhile the
    disk needs room for one more pack.
    """
    from probe.runs import pack_run

    _act(
        run,
        dry_run,
        as_json,
        "pack",
        lambda only_say, **steps: pack_run(run, pack_bytes, dry_run=only_say, **steps),
    )


@console.main.command()
@console.run_argument
@click.option("--dry-run", is_flag=True, help="Change nothing: say what would be unpacked.")
@console.json_option
def unpack(run: Path, dry_run: bool, as_json: bool) -> None:
    """Put the tasks of a packed run back into folders of their own, byte for byte as they were."""
    from probe.runs import unpack_run

    _act(
        run, dry_run, as_json, "unpack", lambda only_say, **steps: unpack_run(run, dry_run=only_say, **steps)
    )


def _act(run: Path, dry_run: bool, as_json: bool, verb: str, act: Callable[..., Packing]) -> None:
    if dry_run:
        done = act(True)
    else:
        with console.ProgressBar() as progress:
            done = act(
                False,
                begins=lambda count: progress.start(count) if count else None,
                told=lambda count: progress.done(0, count),
            )
    if as_json:
        console.dump({"run": str(run), "dry_run": dry_run} | done.document())
        return
    would = "would be " if dry_run else ""
    what = "sealed into" if verb == "pack" else "taken out of"
    left = ""
    if done.n_left:
        left = f"; {done.n_left} traces of an earlier one that was stopped {would or 'are '}removed"
    n_files = 5 * done.n_packs if verb == "pack" else 3 * done.n_tasks
    packs = "1 pack" if done.n_packs == 1 else f"{done.n_packs} packs"
    console.echo(
        f"{done.n_tasks} tasks, {bytes_text(done.n_bytes)}, {would}{what} {packs}: {n_files} files in place of {done.n_files}{left}"
    )
