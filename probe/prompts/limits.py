"""Limits of time and memory for code of other people that runs in this process: chat templates."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_GIB = 2**30
_LOOKS = 0.1
"""Seconds between two looks at the clock."""
_IDLE = 5.0
"""Seconds without work after which the one that looks ends."""


class LimitExceeded(BaseException):
    """Raised in a thread that has run for too long; no `except Exception` on its way keeps it."""


class _Deadline:
    """A thread that looks at the clock while others work, one of them at a time."""

    def __init__(self):
        self._turn = threading.Lock()
        self._looking = False
        self._thread: int | None = None
        self._until = 0.0

    def begin(self, seconds: float) -> None:
        with self._turn:
            self._thread, self._until = threading.get_ident(), time.monotonic() + seconds
            if not self._looking:
                self._looking = True
                threading.Thread(target=self._look, daemon=True).start()

    def end(self) -> None:
        """LimitExceeded will not be raised in this thread any more."""
        with self._turn:
            if self._thread is None:  # it may be on its way, and must not arrive behind this
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), None)
            self._thread, self._until = None, time.monotonic() + _IDLE

    def _look(self) -> None:
        while True:
            time.sleep(_LOOKS)
            with self._turn:
                if time.monotonic() <= self._until:
                    continue
                if self._thread is None:
                    self._looking = False
                    return
                raised, thread = ctypes.py_object(LimitExceeded), ctypes.c_ulong(self._thread)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, raised)
                self._thread = None


_WATCH, _ONE_AT_A_TIME = _Deadline(), threading.RLock()


def within(seconds: float, function: Callable[[], T], *, memory: int = 2 * _GIB) -> T:
    """What the function returns. Raises LimitExceeded where it has not come to an end in time.

    Where the system limits a process's memory, what would take more bytes than `memory` on top of what is in use raises
    MemoryError. Time is looked at between two steps of Python, not within one.
    """
    with _ONE_AT_A_TIME, _memory(memory):
        try:
            _WATCH.begin(seconds)
            return function()
        finally:
            _WATCH.end()


@contextmanager
def _memory(more: int) -> Iterator[None]:
    """The process may take that many bytes more; nothing where the system does not tell or does not limit them."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + more
        lower = before[0] == resource.RLIM_INFINITY or limit < before[0]
    except (ImportError, OSError, ValueError, IndexError):
        yield
        return
    if lower:
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        if lower:
            resource.setrlimit(resource.RLIMIT_AS, before)
