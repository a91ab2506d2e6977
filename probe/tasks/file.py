"""A task file: reading it with every mistake placed, choosing from it, and warnings about it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from probe.errors import BadInput, UsageError
from probe.jsontext import (
    Check,
    JsonFile,
    Spot,
    check_fields,
    check_object,
    check_string,
    check_text,
    nearest,
    printable,
    quoted,
)
from probe.tasks.kind import Shelf, Task
from probe.tasks.kinds import kind_named, kind_names, kind_of
from probe.tools.definitions import Tool, catalogue_files

Runnable = Callable[[], Mapping[str, Tool]]
"""Definitions of tools that can be run, by name."""
_COMMON: dict[str, Check] = {"id": check_text, "kind": check_string, "metadata": check_object}

_ADVICE = {
    "model": "take it out, and give it with --model",
    "temperature": "take it out, and give it with --temperature",
    "top_p": "take it out, and give it with --top-p",
    "seed": "take it out, and give it with --seed",
    "max_tokens": "take it out, and give it with --max-new-tokens",
    "max_completion_tokens": "take it out, and give it with --max-new-tokens",
    "tool_choice": "take it out; --tool-choice required makes agents call",
    "parallel_tool_calls": "take it out: one call is asked for",
    "functions": 'rename it to "tools"',
    "conversations": 'rename it to "messages"',
    "function_call": 'take it out; "target" is the tool to call',
    "stream": "take it out",
}
"""What to do with fields of requests to a server."""


class TaskFile(msgspec.Struct, frozen=True, kw_only=True):
    """A task file that has been read and found right."""

    path: str
    """Path as given."""
    sha256: str
    """Hash of the file's bytes, hexadecimal."""
    tasks: tuple[Task, ...]


class _Checks:
    """Checks of the lines of a file, made once for each kind that it has."""

    def __init__(self, shelf: Shelf):
        self._shelf = shelf
        self._fields: dict[str, dict[str, Check]] = {}

    def task(self, value: dict[str, Any], line: int, spot: Spot) -> Task | None:
        """The task of a line, or None where `spot` has faults."""
        name = value.get("kind")
        kind = kind_named(name) if isinstance(name, str) else None
        if kind is None:
            if isinstance(name, str):
                fix = f"the nearest kind is {quoted(nearest(name, kind_names()))}"
                spot["kind"].fault(f"unknown kind {quoted(name)}", fix)
            # Which other fields belong here depends on the kind, so only those that every kind has are checked.
            common = {field: value[field] for field in _COMMON if field in value}
            check_fields(common, spot, _COMMON, ("id", "kind"))
            return None
        if kind.name not in self._fields:
            self._fields[kind.name] = _COMMON | dict(kind.fields(self._shelf))
        fields = check_fields(value, spot, self._fields[kind.name], ("id", "kind", *kind.required), _ADVICE)
        kind.compare(fields, spot)
        fields.pop("kind", None)
        return None if spot.faults else kind.task(**fields, raw=value, line=line)


def line_faults(value: dict[str, Any]) -> list[str]:
    """What `read_tasks` would say of a line without a catalogue, as `field: what is wrong: what to do`."""
    spot = Spot([])
    _Checks(Shelf({})).task(value, 1, spot)
    return [str(fault) for fault in spot.faults]


def read_tasks(path: Path, catalogue: dict[str, Tool] | None, runnable: Runnable | None = None) -> TaskFile:
    """Read and check a task file; names in `tools` are looked up in `catalogue`.

    An agent task may also name what `runnable()` gives, where the catalogue has no such name.

    Raises BadInput with every mistake of every line, and nothing else whatever the bytes.
    """
    source = JsonFile(Path(path))
    checks = _Checks(Shelf(catalogue or {}, runnable))
    first_lines: dict[str, int] = {}
    tasks: list[Task] = []
    for line, value in source.objects():
        spot = Spot([])
        task = checks.task(value, line, spot)
        name = value.get("id")
        if isinstance(name, str) and first_lines.setdefault(name, line) != line:
            what = f"{quoted(name)} is the id of line {first_lines[name]} already"
            spot["id"].fault(what, "give every task its own id")
        if task and not spot.faults:
            tasks.append(task)
        source.report(spot.faults)
    if not tasks and not source.problems:
        source.add(1, 1, "file: has no task: write one JSON object a line")
    if source.problems:
        raise BadInput(source.problems)
    return TaskFile(path=str(path), sha256=source.sha256, tasks=tuple(tasks))


def find_catalogue(task_file: Path, given: Path | None) -> Path | None:
    """The catalogue of a task file: the one given, else `../tools` from its folder, else `./tools`, or None.

    A default counts only where it holds a `.json` or `.jsonl` file.
    """
    if given is not None:
        return given
    beside = Path(os.path.normpath(Path(task_file).parent / ".." / "tools"))
    return next((path for path in (beside, Path("tools")) if catalogue_files(path)), None)


def select(tasks: Sequence[Task], limit: str | None, ids: Sequence[str]) -> tuple[Task, ...]:
    """The tasks with the given ids (all where none is given), then of those the part that `limit` names.

    `limit` is "N", the first N, or "A-B", 1-based and inclusive; file order is kept.
    Raises UsageError for an unknown id, and for a limit that is neither or starts after the last task.
    """
    known = {task.id: task for task in tasks}
    wanted = dict.fromkeys(ids)
    if unknown := [name for name in wanted if name not in known]:
        pairs = ((quoted(name), quoted(nearest(name, tuple(known)))) for name in unknown)
        raise UsageError(
            "\n".join(f"--task-id: no task {name}: the nearest id is {near}" for name, near in pairs)
        )
    chosen = tuple(task for task in tasks if not wanted or task.id in wanted)
    if limit is None:
        return chosen
    match = re.fullmatch(r"(?:([0-9]{1,18})-)?([0-9]{1,18})", limit)
    first, last = (int(match[1] or 1), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UsageError(f"--limit: {quoted(limit)} is no number or range: write 10 (the first ten) or 11-20")
    if first > len(chosen):
        raise UsageError(f"--limit: {quoted(limit)} starts after the last task: there are {len(chosen)}")
    return chosen[first - 1 : last]


def in_shard(tasks: Sequence[Task], shard: str | None) -> tuple[Task, ...]:
    """The tasks of the shard "I/N", the I-th of N (from 1); all of them where `shard` is None.

    Which shard a task belongs to follows from its id alone, so that it is the same on every machine and in every file.
    Raises UsageError for what is no shard.
    """
    if shard is None:
        return tuple(tasks)
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(
            f"--shard: {quoted(shard)} is no shard: write 1/4 (the first of four), 2/4 and so on"
        )
    chosen = tuple(task for task in tasks if _number_of(task.id) % count == number - 1)
    if not chosen:
        raise UsageError(
            f"--shard: no one of the {len(tasks)} tasks is in {quoted(shard)}: make fewer shards"
        )
    return chosen


def _number_of(task_id: str) -> int:
    return int.from_bytes(hashlib.sha256(task_id.encode(errors="surrogatepass")).digest()[:8])


# --- warnings ---


def lint(file: TaskFile) -> list[str]:
    """What is allowed but may spoil a result: `FILE:LINE: ID: what`, then `FILE: what` about all of it."""
    path = printable(file.path, 4096)
    by_kind: dict[str, list[Task]] = {}
    for task in file.tasks:
        by_kind.setdefault(task.kind, []).append(task)
    warnings = [pair for tasks in by_kind.values() for pair in kind_of(tasks[0]).lint(tasks)]
    about = [(task, text) for task, text in warnings if task is not None]
    about = sorted([*about, *_repeats(file.tasks)], key=lambda pair: pair[0].line)
    lines = [f"{path}:{task.line}: {printable(task.id)}: {text}" for task, text in about]
    return lines + [f"{path}: {text}" for task, text in warnings if task is None]


def _repeats(tasks: Sequence[Task]) -> Iterator[tuple[Task, str]]:
    """Tasks of one kind whose text is that of an earlier one, case, spacing and punctuation aside."""
    first: dict[tuple[str, ...], Task] = {}
    for task in tasks:
        text, *shown = kind_of(task).text(task)
        words = " ".join(re.findall(r"\w+", text.casefold())) or text
        earlier = first.setdefault((task.kind, words, *shown), task)
        if earlier is not task:
            yield task, f"nearly the same text as {quoted(earlier.id)} (line {earlier.line})"
