"""One call of a tool: its arguments checked, the tool run, and a result that a model can read."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from probe.jsontext import JsonFault, StrictJsonError, loads, nearest, printable, quoted
from probe.tools.calls import UncheckedArguments, check_arguments
from probe.tools.definitions import Tool
from probe.tools.execution.registry import Executable, executables

KINDS = {
    "unknown_tool": "no tool has this name",
    "not_json": "the arguments are no JSON object",
    "missing_argument": "a required argument is not there",
    "unexpected_argument": "an argument that the tool does not have",
    "mistyped_argument": "an argument of another JSON type",
    "invalid_argument": "an argument outside what its schema allows",
    "refused": "the tool understood and cannot do it",
    "raised": "the tool's code raised an exception",
    "timeout": "the tool took longer than its limit",
    "output_limit": "the tool printed or returned more than its limit",
    "memory_limit": "the tool needed more memory than its limit",
    "forbidden": "the tool tried to start a process or to reach a network",
    "crashed": "the tool's process ended without a result",
    "bad_result": "the tool returned something that is no JSON value",
    "unavailable": "the tool cannot run here",
}
"""Every way in which a call can go wrong."""

MAX_ARGUMENT_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """What tools may read and keep; one for each task keeps tasks apart."""

    root: Path | None = None
    """The only directory that files are read from. None: the small archive that comes with this package."""
    state: Path | None = None
    """SQLite file in which facts are kept. None: nothing outlives a call."""

    def given(self, name: str) -> str | None:
        """Path `root` or `state` as text for the tool's process."""
        if name == "root":
            return str((self.root or Path(__file__).with_name("workspace")).resolve())
        return str(self.state.resolve()) if self.state else None


@dataclass(frozen=True, kw_only=True)
class ToolResult:
    """Outcome of one call."""

    tool: str
    content: str
    """What the model reads: the result as text or JSON, or `{"error": kind, "message": …}`. It is data."""
    value: Any = None
    """The result as a JSON value; None beside an error."""
    error: str | None = None
    """One of `KINDS`; None: the call went well."""
    message: str | None = None
    """What is wrong and what would work; None: the call went well."""
    printed: str = ""
    """What the tool wrote to its standard output and error; no model reads it."""
    seconds: float = 0.0
    """Seconds that the tool alone took; 0 where it was not run."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def call(
    name: str,
    arguments: str | Mapping[str, Any],
    *,
    tools: Mapping[str, Executable] | None = None,
    workspace: Workspace | None = None,
) -> ToolResult:
    """Call a tool with a JSON text or a mapping of arguments; never raises for what a model or a tool does.

    `tools` is what may be called (None: `executables()`), `workspace` what the tools may read and keep.
    """
    tools = executables() if tools is None else tools
    executable = tools.get(name)
    if executable is None:
        near = nearest(name, tuple(tools))
        hint = f": the nearest is {quoted(near)}" if near else ""
        return _wrong(name, "unknown_tool", f"there is no tool {quoted(name)}{hint}")
    try:
        checked = _decode(arguments)
    except StrictJsonError as error:
        return _wrong(name, "not_json", f"the arguments are no JSON object: {error}")
    try:
        wrong = check_arguments(executable.tool, checked)
    except UncheckedArguments as error:
        return _wrong(name, "unavailable", str(error))
    if wrong:
        return _wrong(name, *wrong)
    if executable.unavailable:
        return _wrong(name, "unavailable", f"{name} {executable.unavailable}")
    return _run(executable, checked, workspace or Workspace())


def _decode(arguments: str | Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as an object of strict JSON, however they are given. Raises StrictJsonError."""
    if not isinstance(arguments, str):
        try:
            arguments = json.dumps(dict(arguments))
        except (TypeError, ValueError, RecursionError) as error:
            raise StrictJsonError([JsonFault((), f"no JSON ({error})", "give JSON values")]) from None
    if len(arguments.encode("utf-8", "replace")) > MAX_ARGUMENT_BYTES:
        raise StrictJsonError([JsonFault((), f"longer than {MAX_ARGUMENT_BYTES:,} bytes", "shorten them")])
    value = loads(arguments)
    if not isinstance(value, dict):
        raise StrictJsonError([JsonFault((), "not an object", 'write {"name": value, …}')])
    return value


def _run(executable: Executable, arguments: dict[str, Any], workspace: Workspace) -> ToolResult:
    from probe.tools.execution import process

    name, limits = executable.tool.name, executable.limits
    request = {
        # The directory of this package first: the process must find this version of it.
        "path": [str(Path(__file__).parents[2]), *(path for path in sys.path if path)],
        "module": executable.module,
        "attribute": executable.attribute,
        "file": executable.file,
        "arguments": _whole(executable.tool, arguments)
        | {place: workspace.given(place) for place in executable.places},
        "limits": asdict(limits),
    }
    try:
        outcome = process.run(request)
    except OSError as error:
        return _wrong(name, "unavailable", f"no process can be started for {name} ({error.strerror})")
    answer = outcome.answer
    beside = {"printed": outcome.printed, "seconds": outcome.seconds}
    if "error" in answer:
        message = printable(_clean(str(answer["message"])), 1000)
        kind = answer["error"] if answer["error"] in KINDS else "refused"
        return _wrong(name, kind, message, **beside)
    value = answer["value"]
    content = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(content.encode()) > limits.output_bytes:
        message = f"the result is longer than {limits.output_bytes:,} bytes: ask for less"
        return _wrong(name, "output_limit", message, **beside)
    return ToolResult(tool=name, content=content, value=value, **beside)


def _whole(tool: Tool, arguments: dict[str, Any]) -> dict[str, Any]:
    """Whole numbers as Python's int where the schema asks for one: JSON Schema takes 2.0 for an integer."""
    schemas = tool.parameters.get("properties", {})
    whole = {
        name for name, part in schemas.items() if isinstance(part, dict) and part.get("type") == "integer"
    }
    return {
        name: int(value) if isinstance(value, float) and name in whole else value
        for name, value in arguments.items()
    }


def _clean(text: str) -> str:
    """Text that UTF-8 can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def _wrong(name: str, kind: str, message: str, **beside: Any) -> ToolResult:
    content = json.dumps({"error": kind, "message": message}, ensure_ascii=False)
    return ToolResult(tool=name, content=content, error=kind, message=message, **beside)
