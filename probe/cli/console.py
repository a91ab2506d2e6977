"""What all commands share: the group, errors and their exit codes, printing, progress."""

from __future__ import annotations

import atexit
import errno
import gc
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import click

from probe import __version__
from probe.errors import BadInput, DiskError, ProbeError, UsageError
from probe.jsontext import inert as printable

_JSON, _DUMPED = "probe.json", "probe.dumped"
"""In the context of a call: whether it asked for JSON, and whether a document was printed."""


def _note_json(context: click.Context, _option: click.Parameter, wanted: bool) -> bool:
    context.meta[_JSON] = wanted
    return wanted


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,
    callback=_note_json,
    help="Print one JSON document on stdout.",
)
pager_option = click.option("--no-pager", is_flag=True, help="Print long output at once, on a terminal too.")


class RunPath(click.Path):
    """A run directory, or with `readable` the URL of a run too, for commands that write nothing into it."""

    def __init__(self, readable: bool = False) -> None:
        super().__init__(path_type=Path)
        self._readable = readable

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or "://" not in value:
            return super().convert(value, param, ctx)
        from probe.runs.remote import located

        path = located(value)
        if not self._readable and not isinstance(path, Path):
            raise UsageError(
                f"{path}: a run at a URL is read alone (show, report -o, figures, view, compare, diff, export): copy it here first"
            )
        return path


run_argument = click.argument("run", type=RunPath())
readable_run_argument = click.argument("run", type=RunPath(readable=True), metavar="RUN|URL")


def numbers(kind: type) -> Callable[[click.Context, click.Parameter, str | None], tuple[Any, ...] | None]:
    """What reads an option of several numbers with commas between them."""

    def read(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[Any, ...] | None:
        try:
            return None if value is None else tuple(kind(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"{value!r}: numbers with commas between them") from None

    return read


class Count(click.IntRange):
    """A whole number as people write it: 2000000000, 2_000_000_000 or 2e9."""

    name = "integer"

    def _describe_range(self) -> str:
        return super()._describe_range() if (self.min, self.max) != (None, None) else ""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number: Any = value
        if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?[eE]\+?[0-9]{1,2}", value.strip()):
            exact = Decimal(value)
            number = int(exact) if exact == exact.to_integral_value() else value
        return super().convert(number, param, ctx)


class Commands(click.Group):
    """Turns probe's errors into one message and their exit code, for every command alike."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except OSError as error:  # of --help and --version, which print before a command is invoked
            _say_unwritten(error)
            raise SystemExit(DiskError.exit_code) from None

    def invoke(self, ctx: click.Context) -> Any:
        from probe.harness.stop import RunStopped

        try:
            return super().invoke(ctx)
        except ProbeError as error:
            problems = {"problems": error.problems} if isinstance(error, BadInput) else {}
            _end(ctx, str(error), error.exit_code, problems)
        except RunStopped as stopped:
            _end(ctx, str(stopped), 128 + stopped.number)
        except KeyboardInterrupt:
            _end(ctx, "stopped by SIGINT", 130)
        except OSError as error:
            _say_unwritten(error)
            ctx.exit(DiskError.exit_code)


def _end(ctx: click.Context, message: str, code: int, more: dict[str, Any] | None = None) -> None:
    """Say why a command ends, as a document too where one was asked for, and end it with its code."""
    say(message)
    if ctx.meta.get(_JSON) and not ctx.meta.get(_DUMPED):
        with suppress(OSError):  # the code says what went wrong first
            dump({"error": message, "exit_code": code} | (more or {}))
    ctx.exit(code)


def _say_unwritten(error: OSError) -> None:
    _silence(sys.stdout)
    if error.errno != errno.EPIPE:  # who closed a pipe knows
        where = "standard output" if error.filename is None else error.filename
        say(f"{where}: {error.strerror or error}: check the disk, or give another place to write to")


def say(message: str) -> None:
    """Progress and messages, on stderr. What cannot be written there is dropped: it decides nothing."""
    try:
        click.echo(printable(message), err=True)
    except OSError:
        _silence(sys.stderr)


def echo(text: str = "") -> None:
    """Data, on stdout. Raises OSError, which ends the command with exit code 7."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, "standard output is closed")
    click.echo(text)


def echo_lines(lines: Iterable[str], no_pager: bool) -> None:
    """Lines as `echo`, made printable; on a terminal that is too low for them through the user's pager ($PAGER)."""
    shown = map(printable, lines)
    if no_pager or sys.stdout is None or not sys.stdout.isatty():
        for line in shown:
            echo(line)
        return
    text = "\n".join(shown)
    if text.count("\n") + 1 < shutil.get_terminal_size().lines:
        echo(text)
    else:
        os.environ.setdefault("LESS", "-RS")  # rows of a table stay rows: → and ← show the rest of a wide one
        click.echo_via_pager(f"{text}\n")


def echo_bytes(data: bytes) -> None:
    """A file's bytes, on stdout. Raises OSError as `echo`."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, "standard output is closed")
    click.echo(data, nl=False)


def _silence(stream: IO[str] | None) -> None:
    """What a stream still holds goes nowhere: the interpreter's last flush would fail and change the exit code."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # pyright: ignore[reportOptionalMemberAccess]


def plain() -> bool:
    return (
        sys.stderr is None
        or not sys.stderr.isatty()
        or bool(os.environ.get("NO_COLOR"))
        or bool(os.environ.get("CI"))
    )


def dump(value: Any) -> None:
    if context := click.get_current_context(silent=True):
        context.meta[_DUMPED] = True
    # ASCII alone: it survives every encoding of stdout, and nothing in it can reorder a terminal's line.
    echo(json.dumps(value, default=str))


SETTINGS = Path("probe.toml")
"""Options of commands, a table a command, in the folder that probe is called from."""


def read_settings(path: Path, group: click.Group) -> dict[str, Any]:
    """The options that a TOML file sets, as click takes them: `[run]` with `model = "gemma-2b"`, `[tasks.lint]`.

    Raises BadInput for what is no TOML, and for a command or an option that there is none of.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput([f"{path}: {error}"]) from None
    return _of_command(path, group, content)


def _of_command(path: Path, command: click.Command, content: dict[str, Any]) -> dict[str, Any]:
    group = command if isinstance(command, click.Group) else None
    parameters = {
        spelling.lstrip("-").replace("-", "_"): parameter
        for parameter in command.params
        for spelling in (str(parameter.name), *parameter.opts)
    }
    settings: dict[str, Any] = {}
    for key, value in content.items():
        parameter = parameters.get(key.replace("-", "_"))
        if group is not None and key in group.commands and isinstance(value, dict):
            settings[key] = _of_command(path, group.commands[key], value)
        elif parameter is not None and not isinstance(value, dict):
            settings[str(parameter.name)] = value
        else:
            kind = "commands" if group is not None else "options"
            what = sorted(group.commands if group is not None else (n.replace("_", "-") for n in parameters))
            name = "probe" if command is main else command.name
            raise BadInput([f"{path}: {name} has no {key!r}: its {kind} are {', '.join(what)}"])
    return settings


@click.group(
    cls=Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "auto_envvar_prefix": "PROBE",
    },
)
@click.version_option(__version__, prog_name="probe")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Probe tool use and chain-of-thought reasoning in language models.

    A hooked transformer runs the tasks of a file; its hidden states, key/value memory and attention over tool
    descriptions are captured into a run directory, analyzed and reported.

    \b
    probe run tasks/tools.jsonl                      the default model on the shipped tool tasks
    probe run my.jsonl --model gemma-2b --dtype bfloat16
    probe show runs/<id>                             what came out; `probe report` for the picture

    An option that is not given is taken from the environment (PROBE_RUN_MODEL for --model of run), else from probe.toml
    in this folder (model = "…" under [run]).
    """
    if SETTINGS.is_file():
        ctx.default_map = read_settings(SETTINGS, main)
        say(f"options of {SETTINGS} are used where none is given")
    # The interpreter's last garbage collection looks through all of torch and transformers: a second.
    atexit.register(gc.freeze)


class ProgressBar:
    """Rich bar on a terminal, plain lines elsewhere; tasks, tokens per second and time left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._total = self._done = self._tokens = 0
        self._unit = "tasks"
        self._started = self._logged_at = 0.0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        gc.unfreeze()

    def log(self, message: str) -> None:
        say(message)

    def start(self, total: int, unit: str = "tasks") -> None:
        import time

        self.end()
        gc.freeze()
        gc.enable()
        self._total, self._unit, self._started = total, unit, time.monotonic()
        self._done = self._tokens = 0
        if plain():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn(unit),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(unit, total=total, rate="")
        with suppress(OSError):
            self._bar.start()

    def expect(self, total: int) -> None:
        """How many there are, as far as can be said now."""
        self._total = total
        if self._bar is not None:
            with suppress(OSError):
                self._bar.update(self._task, total=total)

    def end(self) -> None:
        gc.enable()
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()
            self._bar = None

    def done(self, n_tokens: int, count: int = 1) -> None:
        import time

        self._done += count
        self._tokens += n_tokens
        now = time.monotonic()
        elapsed = max(now - self._started, 1e-9)
        rate = f"{self._tokens / elapsed:,.0f} tokens/s" if self._tokens else ""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.update(self._task, advance=count, rate=rate)
        elif self._done and (now - self._logged_at > 10 or self._done == self._total):
            self._logged_at = now
            left = elapsed / self._done * (self._total - self._done)
            say(
                ", ".join(
                    filter(None, (f"{self._done}/{self._total} {self._unit}", rate, f"{left:.0f} s left"))
                )
            )


@contextmanager
def watched() -> Iterator[ProgressBar]:
    """Watches a run; until the model is loaded no garbage is collected, and what is there then is left alone.

    torch, transformers and a model are a million objects that stay to the end: looking through them took 0.6 s
    while they were made and 0.3 s of the first task.
    """
    gc.disable()
    try:
        with ProgressBar() as progress:
            yield progress
    finally:
        gc.unfreeze()
        gc.enable()
