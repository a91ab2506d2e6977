"""probe: run prompting, tool-selection and chain-of-thought tasks on a hooked transformer and keep what it did.

`probe.run(…)` runs a task file, `probe.open(path)` reads a run without a model, `probe.load(name)` gives a
model to capture from. Nothing heavy is imported until it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probe.api import load
    from probe.runner import run
    from probe.store import Run as open

__version__ = "0.1.0"
__all__ = ["load", "open", "run"]


def __getattr__(name: str):
    if name == "load":
        from probe.api import load as found
    elif name == "open":
        from probe.store import Run as found
    elif name == "run":
        from probe.runner import run as found
    else:
        raise AttributeError(f"module 'probe' has no attribute {name!r}")
    return found
