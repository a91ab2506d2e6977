"""Tasks: a file for each kind, the registry of kinds, and task files.

answer_types, gists, quantities → dates, markup, statements → answers → messages, passages, warnings → kind → choice → prompting, tool_selection, agent → replay, cot → kinds → file. A kind is one
record (`Kind`): the fields of a line, its prompts, its jobs, its score. Importing this package does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.tasks.agent import AgentTask
    from probe.tasks.cot import CotTask
    from probe.tasks.file import TaskFile, find_catalogue, in_shard, lint, read_tasks, select
    from probe.tasks.kind import Kind, Setting, Shelf, Task
    from probe.tasks.kinds import KINDS, error_record, jobs, kind_named, kind_of, record, render
    from probe.tasks.messages import Message
    from probe.tasks.prompting import Pair, PromptingTask, Variant
    from probe.tasks.replay import ReplayTask, replay_of
    from probe.tasks.tool_selection import ToolTask

__all__ = [
    "KINDS",
    "AgentTask",
    "CotTask",
    "Kind",
    "Message",
    "Pair",
    "PromptingTask",
    "ReplayTask",
    "Setting",
    "Shelf",
    "Task",
    "TaskFile",
    "ToolTask",
    "Variant",
    "error_record",
    "find_catalogue",
    "in_shard",
    "jobs",
    "kind_named",
    "kind_of",
    "lint",
    "read_tasks",
    "record",
    "render",
    "replay_of",
    "select",
]

_MODULES = {
    "agent": ("AgentTask",),
    "cot": ("CotTask",),
    "file": (
        "TaskFile",
        "find_catalogue",
        "in_shard",
        "lint",
        "read_tasks",
        "select",
    ),
    "kind": (
        "Kind",
        "Setting",
        "Shelf",
        "Task",
    ),
    "kinds": (
        "KINDS",
        "error_record",
        "jobs",
        "kind_named",
        "kind_of",
        "record",
        "render",
    ),
    "messages": ("Message",),
    "prompting": (
        "Pair",
        "PromptingTask",
        "Variant",
    ),
    "replay": (
        "ReplayTask",
        "replay_of",
    ),
    "tool_selection": ("ToolTask",),
}
"""Module → what this package has of it, imported when it is asked for: who reads a run needs no task file."""


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module 'probe.tasks' has no attribute {name!r}")
    return getattr(import_module(f"probe.tasks.{module}"), name)
