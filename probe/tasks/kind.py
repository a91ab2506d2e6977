"""What a kind of task is: one record that says all of it, from the fields of a line to the line of a listing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from probe.jsontext import Check, Spot
from probe.tools.definitions import Tool

if TYPE_CHECKING:
    from probe.capture import Job, Outcome
    from probe.prompts import Codec, Prompt
    from probe.tools.execution import Executable


class Task(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """One line of a task file; the tag of a subclass is the name of its kind."""

    id: str
    metadata: dict[str, Any] | None = None
    raw: dict[str, Any] = {}
    """The object as in the file."""
    line: int = 0
    """1-based line of the file; 0 for a task made in code."""

    @property
    def kind(self) -> str:
        return str(self.__struct_config__.tag)


T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Shelf:
    """Tools that a line may name."""

    catalogue: Mapping[str, Tool]
    runnable: Callable[[], Mapping[str, Tool]] | None = None
    """Definitions of tools that can be run, by name. Asking may load other packages."""


@dataclass(frozen=True)
class Setting:
    """What a run asks of all its tasks."""

    max_new_tokens: int
    """Tokens that the context must have room for behind a prompt."""
    reference: bool = False
    """Whether reasoning that a task gives is teacher-forced."""
    must_call: bool = False
    """Whether a call of a tool is forced to begin."""
    tools: Callable[[], Mapping[str, Executable] | None] = lambda: None
    """What calls can execute (None: all that is installed)."""
    earlier: Callable[[str], Mapping[str, Any] | None] = lambda _task_id: None
    """The record that a task has in the run already, by its id: what it did to the world is not done again."""


def _one_job_a_prompt(task: Task, prompts: Sequence[Prompt], _setting: Setting) -> list[Job]:
    from probe.capture import Job

    return [Job(prompt, task.id) for prompt in prompts]


@dataclass(frozen=True, kw_only=True)
class Kind(Generic[T]):
    """A kind of task. Fields without a default are required."""

    task: type[T]
    fields: Callable[[Shelf], Mapping[str, Check]]
    """Checks of the fields beside `id`, `kind` and `metadata`."""
    required: Sequence[str]
    """Fields that a line must have beside `id` and `kind`."""
    render: Callable[[T, Codec, Setting], list[Prompt]]
    """The prompts, one a passage."""
    score: Callable[[T, Sequence[Prompt], Sequence[Outcome]], dict[str, Any]]
    """What the record says beside the passage: `target` and `score` where there are such, and the rest."""
    max_new_tokens: int
    """Most tokens of a task where the run does not set it."""
    jobs: Callable[[T, Sequence[Prompt], Setting], list[Job]] = _one_job_a_prompt
    """What the model has to do, one job a prompt, with its controller."""
    compare: Callable[[dict[str, Any], Spot], None] = lambda _fields, _spot: None
    """Checks fields against each other, and may complete them."""
    several: bool = False
    """Whether a task has several passages: `score` gives them by name, and their tensors have prefixed names."""
    memory: bool = False
    """Whether keys, values, queries and head outputs are captured by default."""
    calls: bool = False
    """Whether tools are executed on the way."""
    reserve: int = 0
    """Tokens beyond max_new_tokens that the context must have room for."""
    under: Callable[[T, str], T] | None = None
    """The task under a system message, in place of its own; None: the kind takes none from the run."""
    target: Callable[[T], dict[str, Any]] = lambda _task: {}
    """What the record of a task that failed still says of its target."""
    gist: Callable[[Mapping[str, Any]], str] = lambda record: record.get("completion", "")[:60]
    """A record in a few words; of the kinds of this package `probe.tasks.gists` says them, without what runs a task."""
    text: Callable[[T], tuple[str, ...]] = lambda task: (task.id,)
    """What makes two tasks the same: the text that is asked, then what is shown with it."""
    lint: Callable[[Sequence[T]], Iterable[tuple[T | None, str]]] = lambda _tasks: ()
    """Warnings about one task of this kind, or (None) about all of a file's tasks of it."""

    @property
    def name(self) -> str:
        return str(self.task.__struct_config__.tag)
