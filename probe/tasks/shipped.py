"""The task files that probe ships: `probe:tools` is tasks/tools.jsonl wherever probe is installed."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from probe.errors import UsageError
from probe.jsontext import nearest

PREFIX = "probe:"


def shipped_path(path: str | Path) -> Path:
    """The file that `probe:NAME` names; any other path as it is. Raises UsageError for a name that is none."""
    text = str(path)
    if not text.startswith(PREFIX):
        return Path(path)
    name = text.removeprefix(PREFIX).removesuffix(".jsonl")
    files = {file.stem: file for file in _folder().glob("*.jsonl")}
    if name not in files:
        near = f": did you mean {PREFIX}{nearest(name, tuple(files))}?" if files else ""
        raise UsageError(f"{text}: probe ships {', '.join(sorted(files)) or 'no task file here'}{near}")
    return files[name]


def _folder() -> Path:
    """A checkout's own folder, else what was installed from a wheel."""
    checkout = Path(__file__).parents[2]
    if (checkout / "setup.cfg").is_file():
        return checkout / "tasks"
    return Path(sysconfig.get_path("data")) / "share" / "probe" / "tasks"
