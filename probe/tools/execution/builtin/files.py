"""Reading under one directory, and nothing outside it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from probe.tools.execution.failure import Failure

MAX_BYTES = 4 * 2**20
MAX_FILES = 1000
_ARCHIVE = (Path(__file__).parents[1] / "workspace").resolve()
"""What comes with this package: installers link it to their caches."""


def read(path: str, first_line: int | None = None, last_line: int | None = None, *, root: str) -> str:
    """The text of a file under `root`, whole or from one line to another, both included and counted from 1."""
    text = file_text(path, root)
    if first_line is None and last_line is None:
        return text
    # Line feeds alone end lines, as an editor counts them; splitlines knows more.
    lines = text.split("\n")
    lines = [line + "\n" for line in lines[:-1]] + lines[-1:] * bool(lines[-1])
    first, last = first_line or 1, len(lines) if last_line is None else last_line
    if first_line == 0 or first < 1 or last < first:
        raise Failure(f"there are no lines {first_line} to {last_line}: count from 1")
    if first > len(lines):
        raise Failure(f"the file ends at line {len(lines)}")
    return "".join(lines[first - 1 : last])


def file_text(path: str, root: str) -> str:
    """The text of a regular UTF-8 file under `root`; no link may lead out of it."""
    base = Path(root).resolve()
    if "\0" in path or len(path) > 4096:
        raise Failure("that is no path")
    try:
        place = (base / path).resolve(strict=True)
    except (OSError, RuntimeError):
        raise _missing(path, base) from None
    if not place.is_relative_to(base):
        raise Failure(f"{path!r} is outside the workspace: give a path inside it")
    try:
        # Not blocking: opening a named pipe would wait for its other end.
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Failure(f"{path!r} cannot be read ({error.strerror})") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise _missing(path, base)
    if status.st_nlink > 1 and base != _ARCHIVE:
        os.close(descriptor)
        raise Failure(
            f"{path!r} has another name (a hard link), which may lie outside the workspace: copy it"
        )
    with open(descriptor, "rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise Failure(f"{path!r} is larger than {MAX_BYTES // 2**20} MiB", kind="output_limit")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Failure(f"{path!r} is no text") from None


def list_files(root: str, suffixes: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of the regular files under `root`, in order, links and hidden names left out, at most MAX_FILES."""
    base, count = Path(root).resolve(), 0
    for folder, folders, names in os.walk(base, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            place = Path(folder, name)
            if name.startswith(".") or place.is_symlink() or not place.is_file():
                continue
            if suffixes and place.suffix.lower() not in suffixes:
                continue
            if count == MAX_FILES:
                return
            count += 1
            yield place.relative_to(base).as_posix()


def _missing(path: str, base: Path) -> Failure:
    names = list(list_files(str(base)))
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return Failure(f"there is no file {path[:200]!r} in the workspace; it has {shown or 'none'}")
