"""probe: run prompting, tool-selection and chain-of-thought tasks on a hooked transformer and keep what it did.

`probe.run(…)` runs a task file, `probe.open(path)` reads a run without a model, `probe.load(name)` gives a
model to capture from. Nothing heavy is imported until it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probe.api import (
        analyze,
        compare,
        features,
        figures,
        import_tasks,
        load,
        measures,
        memory,
        merge,
        pack,
        pull,
        push,
        read_edits,
        resume,
        run,
        sweep,
        unpack,
        widget,
        write_edits,
    )
    from probe.capture.edits import Steering
    from probe.runs import Run as open

__version__ = "0.1.0"
__all__ = [
    "Steering",
    "analyze",
    "compare",
    "features",
    "figures",
    "import_tasks",
    "load",
    "measures",
    "memory",
    "merge",
    "open",
    "pack",
    "pull",
    "push",
    "read_edits",
    "resume",
    "run",
    "sweep",
    "unpack",
    "widget",
    "write_edits",
]


def __getattr__(name: str):
    if name == "open":
        from probe.runs import Run

        return Run
    if name == "Steering":
        from probe.capture.edits import Steering

        return Steering
    if name in __all__:
        from probe import api

        return getattr(api, name)
    raise AttributeError(f"module 'probe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
