"""A short program in Monty, an interpreter of Python without files, processes and network.

The program is a model's, so nothing of this machine is in its reach; clock and random numbers are fixed, so
that it prints the same every time.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic_monty import CollectString, Monty, MontyCrashedError, MontyError

from probe.tools.execution.failure import Failure

MAX_SECONDS = 10.0
_MEMORY_BYTES = 128 * 2**20
_PRINTED_BYTES = 16_000
_OS: Any = {
    "datetime": datetime(2025, 1, 1, tzinfo=UTC),
    "timezone": "utc",
    "sleep": "zero",
    "random_start": {"seed": 0},
}


def execute(code: str, timeout_s: float = 5.0) -> str:
    """What a program prints, or the value of its last expression where it prints nothing."""
    if not 0 < timeout_s <= MAX_SECONDS:
        raise Failure(f"timeout_s must be above 0 and at most {MAX_SECONDS:g}, is {timeout_s}")
    limits: Any = {"max_feed_duration_secs": timeout_s, "max_memory": _MEMORY_BYTES}
    printed = CollectString(_PRINTED_BYTES)
    try:
        with Monty() as pool, pool.checkout(limits=limits, os_policy=_OS) as session:
            value = session.feed_run(code, print_callback=printed)
    except MontyCrashedError as error:
        raise Failure(f"the sandbox gave up ({error})", kind="crashed") from None
    except MontyError as error:
        raise _failure(error, printed.output) from None
    return printed.output or ("" if value is None else str(value))


def _failure(error: MontyError, printed: str) -> Failure:
    cause = error.exception()
    message = f"{type(cause).__name__}: {cause}"
    if printed:
        message = f"it printed {printed[-500:]!r} and then raised {message}"
    if isinstance(cause, MemoryError):
        full = len(printed.encode()) * 2 > _PRINTED_BYTES
        return Failure(message, kind="output_limit" if full else "memory_limit")
    return Failure(message, kind="timeout" if isinstance(cause, TimeoutError) else "refused")
