"""Times that tests hold, and processor time in units of a reference that runs in the same process.

Seconds say as much about the machine and what else runs on it as about the code. Work that shares a core and its
caches with other processes slows down together with its reference, but by another factor: 4 references alone were
16 beside a busy neighbour. So times are held by `make test-timing` alone, which runs one test at a time; the default
suite runs the same tests for what they compute.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

HELD = "PROBE_TEST_TIMES" in os.environ
"""Whether times are held."""
_LINE = json.dumps(
    {"id": "task", "tools": ["search", "weather"], "target": None, "text": "Is it raining? " * 4}
)


def sized(n: int) -> int:
    """How much a test of times takes: n where they are held, a twentieth for what it computes."""
    return n if HELD else n // 20


def within(limit: float, value: float) -> bool:
    """Whether a time is below its limit; always, where times are not held."""
    return value < limit or not HELD


def seconds(call: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def references(call: Callable[[], object]) -> float:
    """Processor time of a call over that of json.loads of 100,000 lines, all kept, run before and after it."""
    times = [seconds(run) for run in (_parse, call, _parse)]
    return 2 * times[1] / (times[0] + times[2])


def _parse() -> list[dict]:
    return [json.loads(_LINE) for _ in range(100_000)]
