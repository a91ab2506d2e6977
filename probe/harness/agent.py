"""The other side of an agent's transcript: reads each turn, executes what it calls, and says what comes back.

Whatever a turn gets wrong, in the call or in the tool, is a typed result that goes back to the model and into
the record; nothing a model writes raises.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.capture import Reply
from probe.prompts import Prompt
from probe.tasks.schema import AgentTask
from probe.tools.calls import Call, judge, read_calls
from probe.tools.execution import ToolResult, Workspace, call, executables

if TYPE_CHECKING:
    from probe.tools.execution import Executable

NOTHING_CALLED = "Nothing was called. Answer the user in plain words."
"""What comes back for a call of the listed "no tool"."""

# What may stand before a call's own text, and what may still follow it before the turn is over.
_MARKS_BEFORE = re.compile(
    r"(?:<\|?tool_call\|?>|<\|python_(?:tag|start)\|>|\[TOOL_CALLS\]|```\w*|<function=)?[\s\[]*\Z"
)
_MARKS_BEHIND = re.compile(r"(?:[\s\[\],;]|</?tool_call>|<\|/?\w+\|>|```)*")
_MARKS = ("</tool_call>", "<tool_call>", "```", "<function=", "<|", '{"', "[TOOL_CALLS]")


class Episode:
    """One run of an agent task: what the model may call, and the facts that its calls have kept.

    `tools` is what can be executed by name (None: `executables()`). Facts are kept in a new file for each
    episode, which goes with it.
    """

    def __init__(self, task: AgentTask, prompt: Prompt, tools: Mapping[str, Executable] | None = None):
        self._task, self._prompt = task, prompt
        self._tools = executables() if tools is None else tools
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def over(self, text: str) -> bool:
        """Whether the model has gone on to something else behind its call: its turn ends there."""
        calls = read_calls(text, tools=self._task.tools)
        if not calls:
            return False
        behind = text[calls[-1].end :]
        behind = behind[_MARKS_BEHIND.match(behind).end() :]  # type: ignore[union-attr]
        opener = (self._prompt.call_prefix or "").strip()
        return bool(behind) and not any(mark.startswith(behind) for mark in (*_MARKS, opener))

    def reply(self, text: str) -> Reply:
        """The result of the turn's call.

        The record gets `called`, `call`, `result`, and for a wrong call `call_error` and `call_error_kind`.
        """
        calls = read_calls(text, tools=self._task.tools)
        if not calls:
            return Reply(None, {"called": None, "call": None})
        first = calls[0]
        start, name = _places(text, first, self._prompt.call_prefix or "")
        written = {"name": first.name, "arguments": first.arguments, "text": first.text}
        if first.name is not None and first.name == self._prompt.template.get("no_tool_name"):
            found = {"called": None, "call": written | {"name": None}, "result": {"content": NOTHING_CALLED}}
            return Reply(NOTHING_CALLED, found, start, name)
        verdict = judge(calls, self._task.tools)
        found: dict[str, Any] = {"called": first.name, "call": written}
        if verdict.error is not None:
            result = _wrong(first.name or "", verdict.error, verdict.message or "")
            found |= {"call_error": verdict.message, "call_error_kind": verdict.error}
        else:
            result = self._execute(str(first.name), first.arguments or {})
        return Reply(result.content, found | {"result": _said(result)}, start, name)

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _execute(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        if name not in self._tools:
            message = f"{name} is shown, and nothing here can run it: answer without it"
            return _wrong(name, "unavailable", message)
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="probe-task-")
        kept = Workspace(state=Path(self._scratch.name, "facts.sqlite"))
        return call(name, arguments, tools=self._tools, workspace=kept)


def _places(text: str, first: Call, opener: str) -> tuple[int, int | None]:
    """Characters at which a call begins, its marks included, and at which it names its tool.

    White space before it belongs to it as far as the template's own opener begins with some.
    """
    begin = _MARKS_BEFORE.search(text[: first.start])
    start = begin.start() if begin else first.start
    space = opener[: len(opener) - len(opener.lstrip())]
    start -= len(space) if text[:start].endswith(space) else 0
    if not first.name:
        return start, None
    keyed = re.compile(rf'"name"\s*:\s*"(?={re.escape(first.name)})').search(text, first.start)
    at = keyed.end() if keyed else text.find(first.name, first.start)
    return start, at if at >= 0 else None


def _wrong(name: str, kind: str, message: str) -> ToolResult:
    content = json.dumps({"error": kind, "message": message}, ensure_ascii=False)
    return ToolResult(tool=name, content=content, error=kind, message=message)


def _said(result: ToolResult) -> dict[str, Any]:
    """What the record keeps of a result; an error only where there is one."""
    out: dict[str, Any] = {"content": result.content}
    if result.error is not None:
        out |= {"error": result.error, "message": result.message}
    if result.printed:
        out["printed"] = result.printed
    return out | {"seconds": round(result.seconds, 4)}
