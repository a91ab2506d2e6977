"""How a tool says that it cannot do what was asked."""

from __future__ import annotations


class Failure(Exception):
    """A tool understood its arguments and cannot do this; the message says why and what would work.

    Any other exception is reported as the tool's own mistake. `kind` is one of `probe.tools.execution.calls.KINDS`.
    """

    def __init__(self, message: str, kind: str = "refused"):
        self.kind = kind
        super().__init__(message)
