"""Estimated against tracked peak memory of a training step, over a grid.

`python -m benchmarks.finetune_memory` prints the table of docs/memory.md; nothing is allocated.
"""

from __future__ import annotations

import itertools
import sys
from functools import cache
from typing import Any

from probe.finetune.command import architecture
from probe.finetune.memory import Plan, estimate, with_targets
from probe.finetune.tracked import tracked_step

NAMES = ("tiny-llama", "tiny-gemma", "tiny-gpt2", "tiny-neox")
SMALL = ("smollm2-135m", "gpt2", "pythia-160m")
Case = tuple[str, str, str, str, bool, int, int]
"""Shape, method, precision, attention, checkpointing, batch, length."""


def _cases(names: tuple[str, ...], *sizes: tuple[int, int]) -> list[Case]:
    precisions = {"full": ("mixed", "bfloat16", "float32", "autocast"), "lora": ("mixed", "float32")}
    return [
        (name, method, precision, attention, checkpointing, *size)
        for name, method, attention, checkpointing, size in itertools.product(
            names, ("full", "lora", "qlora"), ("sdpa", "eager"), (False, True), sizes
        )
        for precision in precisions.get(method, ("mixed",))
    ]


GRID: list[Case] = _cases(NAMES, (1, 128), (2, 256), (4, 512)) + [
    case for case in _cases(SMALL, (2, 256)) if case[2] == "mixed"
]
QUICK: list[Case] = [
    ("tiny-llama", "full", "mixed", "sdpa", False, 2, 256),
    ("tiny-gemma", "full", "float32", "eager", True, 2, 256),
    ("tiny-gpt2", "lora", "mixed", "sdpa", True, 2, 256),
    ("tiny-neox", "qlora", "mixed", "eager", False, 2, 256),
]


@cache
def _known(name: str) -> Any:
    return architecture("random:" + name)


def compare(case: Case) -> tuple[int, int]:
    """Estimated and tracked peak bytes of tensors."""
    name, method, precision, attention, checkpointing, batch, length = case
    arch, known = _known(name)
    plan = with_targets(
        Plan(
            method=method,
            precision=precision,
            attention=attention,
            checkpointing=checkpointing,
            batch=batch,
            length=length,
        ),
        known,
    )
    return estimate(arch, plan).peak.total, tracked_step("random:" + name, plan)["peak_bytes"]


def main() -> None:
    """Print the table as Markdown, the worst error last."""
    out = sys.stdout.write
    out(
        "| shape | method | precision | attention | checkpointing | batch × length | estimate | tracked | error |\n"
    )
    out("|---|---|---|---|---|---|---|---|---|\n")
    errors = []
    for case in GRID:
        estimated, tracked = compare(case)
        errors.append(estimated / tracked - 1)
        name, method, precision, attention, checkpointing, batch, length = case
        out(
            f"| {name} | {method} | {precision} | {attention} | {'yes' if checkpointing else 'no'} "
            f"| {batch} × {length} | {estimated:,} | {tracked:,} | {errors[-1]:+.1%} |\n"
        )
        sys.stdout.flush()
    within = sum(abs(error) <= 0.05 for error in errors)
    out(f"\n{within} of {len(errors)} within 5 %; from {min(errors):+.1%} to {max(errors):+.1%}.\n")


if __name__ == "__main__":
    main()
