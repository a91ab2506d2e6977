"""Interleaved rounds: what ran next to each other is compared with each other, and with nothing else."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any


def now(device: str) -> float:
    """Seconds; on CUDA after all queued work is done."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


class Timings:
    """Seconds of every contestant by round; a contestant may run in the first rounds only."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def ratios(self, numerator: str, denominator: str) -> list[float]:
        """One ratio a round in which both ran."""
        pairs = zip(self.seconds.get(numerator, []), self.seconds.get(denominator, []), strict=False)
        return [above / below for above, below in pairs]


def run_rounds(
    contestants: Mapping[str, Callable[[], Any]],
    rounds: Mapping[str, int],
    device: str,
    before_round: Callable[[int], None] = lambda number: None,
    seen: Callable[[str, int, Any], None] = lambda name, number, result: None,
) -> Timings:
    """A B C, A B C, …: in round r run every contestant with more than r rounds, in the order given.

    `seen` gets each result outside of the timed part; garbage is collected before each turn, so that nobody
    pays for what another left.
    """
    timings = Timings()
    gc.collect()
    gc.freeze()  # a pass over what the libraries made takes 0.3 s and would fall on anybody
    try:
        for number in range(max(rounds[name] for name in contestants)):
            before_round(number)
            for name, contestant in contestants.items():
                if number >= rounds[name]:
                    continue
                gc.collect()
                started = now(device)
                result = contestant()
                timings.seconds.setdefault(name, []).append(now(device) - started)
                seen(name, number, result)
                del result
    finally:
        gc.unfreeze()
    return timings
