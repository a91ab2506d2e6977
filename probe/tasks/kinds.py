"""The kinds of task: those of this package and those of others (entry points `probe.tasks`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from probe.errors import UsageError
from probe.tasks.agent import AGENT
from probe.tasks.cot import COT
from probe.tasks.kind import Kind, Setting, Task
from probe.tasks.passages import passage_record
from probe.tasks.prompting import PROMPTING
from probe.tasks.replay import REPLAY
from probe.tasks.tool_selection import TOOL_SELECTION

if TYPE_CHECKING:
    from probe.capture import Job, Outcome
    from probe.prompts import Codec, Prompt
    from probe.tools.execution import Executable

KINDS: dict[str, Kind] = {kind.name: kind for kind in (PROMPTING, TOOL_SELECTION, AGENT, COT, REPLAY)}
"""Kinds of this package, by name."""


@cache
def _installed() -> dict[str, EntryPoint]:
    """Kinds of other packages, by name; none is loaded. Raises UsageError when two share a name."""
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group="probe.tasks"):
        if point.name in {*KINDS, *points}:
            raise UsageError(
                f"two installed kinds of task are called {point.name!r}; the second is {point.value}"
            )
        points[point.name] = point
    return points


def kind_names() -> tuple[str, ...]:
    """Names of all kinds that are installed."""
    return (*KINDS, *_installed())


def kind_named(name: str) -> Kind | None:
    """A kind; other packages are asked only for what is not of this one. Raises UsageError for a broken one."""
    if name in KINDS or name not in _installed():
        return KINDS.get(name)
    point = _installed()[name]
    try:
        kind = point.load()
    except Exception as error:  # of whatever a package that we do not know raises
        raise UsageError(f"the kind of task {name!r} ({point.value}) cannot be loaded: {error}") from error
    if not isinstance(kind, Kind) or kind.name != name:
        raise UsageError(f"{point.value} is no kind of task that is tagged {name!r}")
    return kind


def kind_of(task: Task) -> Kind:
    """The kind of a task. Raises UsageError where no installed package has it."""
    kind = kind_named(task.kind)
    if kind is None:
        raise UsageError(f"no installed package has tasks of the kind {task.kind!r}")
    return kind


def render(task: Task, codec: Codec, *, max_new_tokens: int, reference: bool = False) -> list[Prompt]:
    """The prompts of a task, one a passage. `reference` teacher-forces the reasoning that it gives."""
    return kind_of(task).render(task, codec, Setting(max_new_tokens, reference))


def jobs(
    task: Task,
    prompts: Sequence[Prompt],
    tools: Mapping[str, Executable] | None = None,
    *,
    must_call: bool = False,
) -> list[Job]:
    """What the model has to do for a task: one job a passage. `tools` is what calls can execute (None: all)."""
    return kind_of(task).jobs(task, prompts, Setting(0, must_call=must_call, tools=lambda: tools))


def record(
    task: Task, prompts: Sequence[Prompt], outcomes: Sequence[Outcome], seconds: float
) -> dict[str, Any]:
    """The task's record.json (docs/contract.md, section 5). `score` is absent without a target."""
    kind = kind_of(task)
    truncated = any(prompt.truncation for prompt in prompts)
    out: dict[str, Any] = {
        "id": task.id,
        "kind": kind.name,
        "status": "truncated" if truncated else "ok",
        "seconds": round(seconds, 4),
    }
    if task.metadata is not None:
        out["metadata"] = task.metadata
    if not kind.several:
        out |= passage_record(prompts[0], outcomes[0])
    return out | kind.score(task, prompts, outcomes)


def error_record(task: Task, status: str, message: str, seconds: float) -> dict[str, Any]:
    """The record of a task that could not be run to its end."""
    out = {"id": task.id, "kind": task.kind, "status": status, "error": message, "seconds": round(seconds, 4)}
    return out | kind_of(task).target(task)
