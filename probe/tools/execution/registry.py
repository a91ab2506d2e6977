"""Which tools can be run: this package's own, those of installed packages, and functions of Python files."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from probe.errors import BadInput, UsageError
from probe.jsontext import printable, quoted
from probe.tools.definitions import Tool, parse_tool

_DEFINITIONS = Path(__file__).with_name("definitions.json")
BUILTIN = "probe"
"""Source of this package's own tools: they read what they are given, and keep facts in a file of the task."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one call of a tool may use."""

    seconds: float = 5.0
    """Seconds of the clock, after the interpreter has started."""
    output_bytes: int = 16_384
    """Bytes of the result in UTF-8, and as many of what is printed."""
    memory_bytes: int = 512 * 2**20
    """Bytes of address space."""
    network: bool = False
    processes: bool = False

    def __post_init__(self) -> None:
        for name in ("seconds", "output_bytes", "memory_bytes"):
            if not 0 < getattr(self, name) < 2**62:
                raise ValueError(f"limit {name} must be above 0, is {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Executable:
    """A tool together with the function that runs it."""

    tool: Tool
    module: str
    attribute: str
    """The function in `module`; it takes the arguments of a call by name and returns a JSON value."""
    file: str | None = None
    """The Python file that `module` is loaded from; None: it is imported by name."""
    source: str = BUILTIN
    """Where the tool comes from: `probe`, an entry point's value or a file."""
    limits: Limits = field(default_factory=Limits)
    places: tuple[str, ...] = ()
    """Fields of the `Workspace` that the function takes beside the arguments."""
    unavailable: str | None = None
    """Why it cannot run here; None: it can."""


def executables(files: Iterable[Path] = ()) -> dict[str, Executable]:
    """Every tool that can be run, by name. `files` are Python files whose public functions become tools.

    A tool of an installed package that cannot be loaded is listed with the reason. Raises BadInput for a file
    that defines no tool or a malformed one, UsageError where two tools share a name.
    """
    by_name = dict(_builtin())
    for point in entry_points(group="probe.tools"):
        _add(by_name, _installed(point))
    for path in files:
        for executable in _of_file(Path(path)):
            _add(by_name, executable)
    return by_name


def _add(by_name: dict[str, Executable], new: Executable) -> None:
    if new.tool.name in by_name:
        first = by_name[new.tool.name].source
        raise UsageError(f"two tools are called {quoted(new.tool.name)}: one of {first}, one of {new.source}")
    by_name[new.tool.name] = new


@functools.cache
def _builtin() -> dict[str, Executable]:
    by_name = {}
    for entry in json.loads(_DEFINITIONS.read_text(encoding="utf-8")):
        module, attribute = entry.pop("function").split(":")
        limits, places, needs = (entry.pop(name, None) for name in ("limits", "places", "needs"))
        missing = needs and find_spec(needs["module"]) is None
        tool = parse_tool(entry)
        by_name[tool.name] = Executable(
            tool=tool,
            module=f"probe.tools.execution.builtin.{module}",
            attribute=attribute,
            limits=Limits(**limits or {}),
            places=tuple(places or ()),
            unavailable=f"needs the package {needs['package']}: pip install {needs['package']}"
            if missing
            else None,
        )
    return by_name


def listing(
    catalogue: Mapping[str, Tool], origin: str, runnable: Mapping[str, Executable]
) -> list[dict[str, Any]]:
    """One row a tool, those of the catalogue (read from `origin`) first: its definition, `source`, whether it
    `runs`, its `limits` where it does, and the `problem` that keeps a tool from being used as it is shown."""
    rows = []
    for name in dict.fromkeys((*catalogue, *runnable)):
        executable = runnable.get(name)
        tool = catalogue.get(name) or runnable[name].tool
        problem = executable.unavailable if executable else None
        if executable and not problem and tool.parameters != executable.tool.parameters:
            problem = f"its parameters in {origin} are not those of the tool that runs"
        rows.append(
            {
                "name": name,
                "description": tool.description,
                "parameters": tool.parameters,
                "source": executable.source if executable else origin,
                "runs": bool(executable and not executable.unavailable),
                "limits": asdict(executable.limits) if executable else None,
                "problem": problem,
            }
        )
    return rows


# --- tools of other packages ---


def _installed(point: EntryPoint) -> Executable:
    module, _, attribute = point.value.partition(":")
    try:
        function = point.load()
        return Executable(
            tool=_definition(function, point.name),
            module=module,
            attribute=attribute,
            source=point.value,
            limits=_limits(function),
        )
    # A package that we do not know may raise anything; the other tools still work.
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {error}", 300)
        return Executable(
            tool=Tool(name=point.name),
            module=module,
            attribute=attribute,
            source=point.value,
            unavailable=f"cannot be loaded ({reason})",
        )


def _limits(function: Any) -> Limits:
    """What a function declares as its attribute `limits`: a `Limits`, or a dict of its fields."""
    declared = getattr(function, "limits", None)
    if declared is None or isinstance(declared, Limits):
        return declared or Limits()
    known = {part.name for part in fields(Limits)}
    if not isinstance(declared, dict) or set(declared) - known:
        raise ValueError(f"its limits must be a dict of {', '.join(sorted(known))}")
    return Limits(**declared)


def _definition(function: Any, name: str | None = None) -> Tool:
    """A tool's definition: the attribute `definition`, else made of signature and docstring. Raises ValueError."""
    declared = getattr(function, "definition", None)
    if declared is None:
        from probe.model.signatures import definition_of

        declared = definition_of(function)
    tool = parse_tool(declared)
    if name not in (None, tool.name):
        raise ValueError(f"is called {tool.name!r}, and its entry point {name!r}: make them one name")
    return tool


# --- tools of a Python file ---


def _of_file(path: Path) -> list[Executable]:
    """The tools of one file: its public functions, in order. The file is run, as any program of its author."""
    where = printable(str(path), 4096)
    lines = _function_lines(path, where)
    module = _load(path, where)
    problems, executables = [], []
    for name, line in lines.items():
        function = getattr(module, name, None)
        if not inspect.isfunction(function) or function.__module__ != module.__name__:
            continue
        try:
            tool, limits = _definition(function), _limits(function)
        except (TypeError, ValueError) as error:
            what = " ".join(str(error).split())
            problems.append(f"{where}:{line}:1: {name}: {printable(what, 300)}: correct the function")
            continue
        executables.append(
            Executable(
                tool=tool,
                module=module.__name__,
                attribute=name,
                file=str(path.resolve()),
                source=str(path),
                limits=limits,
            )
        )
    if not executables and not problems:
        fix = "write one with type hints and a docstring that describes every argument"
        problems.append(f"{where}:1:1: file: defines no public function: {fix}")
    if problems:
        raise BadInput(problems)
    return executables


def _function_lines(path: Path, where: str) -> dict[str, int]:
    try:
        tree = ast.parse(path.read_bytes())
    except OSError as error:
        raise BadInput(
            [f"{where}:1:1: file: cannot be read ({error.strerror}): give a Python file"]
        ) from None
    except SyntaxError as error:
        place = f"{error.lineno or 1}:{error.offset or 1}"
        raise BadInput([f"{where}:{place}: file: not Python ({error.msg}): correct it"]) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise BadInput([f"{where}:1:1: file: not Python ({error}): give a Python file"]) from None
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node.name: node.lineno for node in defined if not node.name.startswith("_")}


def _load(path: Path, where: str) -> ModuleType:
    # A name of its own, so that no file can stand for an installed module.
    name = f"probe_tool_file_{path.stem}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadInput([f"{where}:1:1: file: its name does not end in .py: rename it"])
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        what = printable(f"{type(error).__name__}: {error}", 300)
        raise BadInput([f"{where}:1:1: file: cannot be loaded ({what}): correct it"]) from None
    return module
