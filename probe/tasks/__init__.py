"""Tasks: a file for each kind, the registry of kinds, and task files.

answer_types, gists, quantities → dates, markup, statements → answers → messages, passages, warnings → kind → choice →
prompting, tool_selection, agent → replay, cot → kinds → file. A kind is one record (`Kind`): the fields of a line, its
prompts, its jobs, its score. Importing this package does not load torch.
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
    "AgentTask": "agent",
    "CotTask": "cot",
    "TaskFile": "file",
    "find_catalogue": "file",
    "in_shard": "file",
    "lint": "file",
    "read_tasks": "file",
    "select": "file",
    "Kind": "kind",
    "Setting": "kind",
    "Shelf": "kind",
    "Task": "kind",
    "KINDS": "kinds",
    "error_record": "kinds",
    "jobs": "kinds",
    "kind_named": "kinds",
    "kind_of": "kinds",
    "record": "kinds",
    "render": "kinds",
    "Message": "messages",
    "Pair": "prompting",
    "PromptingTask": "prompting",
    "Variant": "prompting",
    "ReplayTask": "replay",
    "replay_of": "replay",
    "ToolTask": "tool_selection",
}
"""What is imported when it is first asked for → its module: who reads a run needs no task file."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"probe.tasks.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'probe.tasks' has no attribute {name!r}")
