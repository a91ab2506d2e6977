"""Stopping a run by a signal, between two operations."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class RunStopped(BaseException):
    """A signal asked the run to stop. No Exception: nothing that takes a failure for that of a task may take it."""

    def __init__(self, number: int):
        self.number = number
        self.advice = ""
        """How to go on."""
        super().__init__(number)

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}" + (f": {self.advice}" if self.advice else "")


@contextmanager
def stopping() -> Iterator[None]:
    """SIGINT and SIGTERM stop the run between two operations; a second one stops at once."""

    def stop(number: int, _frame: Any) -> None:
        for known in previous:
            signal.signal(known, signal.SIG_DFL)
        raise RunStopped(number)

    previous: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            previous[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread: the caller's handlers stay
        previous.clear()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
