"""Tools that are really executed: which there are, and one door to call them.

`executables()` gives every tool that can be run here by name: those of this package, those that installed
packages add through the entry points group `probe.tools`, and the typed functions of given Python files.
`call(…)` checks the arguments, runs the tool in a process of its own under its limits, and returns a
`ToolResult`. Whatever a call or a tool does wrong is a result that a model can read, never an exception.

What is trusted: a tool's code may be careless (it may hang, raise, fork or print without end) but is not
hostile. What is not trusted: arguments, which a model writes. Code in arguments runs in an interpreter that
has neither files, processes nor network (`builtin/snippet.py`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probe.tools.execution.calls import ToolResult, Workspace, call
    from probe.tools.execution.failure import Failure
    from probe.tools.execution.registry import BUILTIN, Executable, Limits, executables

__all__ = ["BUILTIN", "Executable", "Failure", "Limits", "ToolResult", "Workspace", "call", "executables"]

_HOME = {
    "BUILTIN": "registry",
    "Executable": "registry",
    "Failure": "failure",
    "Limits": "registry",
    "ToolResult": "calls",
    "Workspace": "calls",
    "call": "calls",
    "executables": "registry",
}


def __getattr__(name: str):
    # The process that runs a tool imports this package on its way to one module: it pays for no other.
    if name in _HOME:
        return getattr(import_module(f"probe.tools.execution.{_HOME[name]}"), name)
    raise AttributeError(f"module 'probe.tools.execution' has no attribute {name!r}")
