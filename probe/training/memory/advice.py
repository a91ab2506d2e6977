"""Whether a plan fits a GPU, what would make it fit, and how far batch and length can go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from probe.errors import UsageError
from probe.training.memory.estimate import estimate, with_targets
from probe.training.memory.plan import Architecture, FineTuningPlan

LONGEST_SEARCH = 1 << 20


def verdict(
    arch: Architecture, plan: FineTuningPlan, usable: int, targets: tuple[str, ...], shown: int = 4
) -> dict[str, Any]:
    """`fits`, `margin_bytes` (negative: missing), the cheapest `changes` that fit, the largest batch and length.

    Changes are ordered by what they cost: first those that compute the same numbers, then those that compute the
    same more slowly, then those that train something else.
    """
    total = estimate(arch, plan).total_bytes
    fits = total <= usable
    changes = []
    for words, changed in [] if fits else _changes(plan, targets):
        try:
            needed = estimate(arch, changed).total_bytes
        except UsageError:
            continue
        if needed <= usable:
            options = {f.name: getattr(changed, f.name) for f in fields(plan)}
            changes.append(
                {
                    "change": words,
                    "options": {k: v for k, v in options.items() if v != getattr(plan, k)},
                    "total_bytes": needed,
                    "margin_bytes": usable - needed,
                }
            )
        if len(changes) == shown:
            break
    if not fits and plan.n_gpus == 1 and not plan.optimizer_in_backward:
        changes += _sharded(arch, plan, usable)
    return {
        "fits": fits,
        "usable_bytes": usable,
        "margin_bytes": usable - total,
        "changes": changes,
        "largest_batch": _largest(arch, plan, usable, "batch", LONGEST_SEARCH),
        "largest_length": _largest(arch, plan, usable, "length", arch.n_ctx),
    }


def _changes(plan: FineTuningPlan, targets: tuple[str, ...]) -> Iterator[tuple[str, FineTuningPlan]]:
    """Plans that need less, cheapest first, alone and then together."""
    steps: list[tuple[str, dict[str, Any]]] = []
    if plan.attention == "eager":
        steps.append(("sdpa attention", {"attention": "sdpa"}))
    if plan.batch > 1 and not plan.optimizer_in_backward:  # which steps after every batch
        steps.append(
            (
                f"batch 1 × {plan.batch} accumulation steps",
                {"batch": 1, "accumulation": plan.accumulation * plan.batch},
            )
        )
    if not plan.checkpointing:
        steps.append(("gradient checkpointing", {"checkpointing": True}))
    if plan.optimizer.startswith("adamw") and plan.optimizer != "adamw-8bit":
        steps.append(("8-bit AdamW", {"optimizer": "adamw-8bit"}))
    together: list[str] = []
    values: dict[str, Any] = {}
    for words, change in steps:
        yield words, replace(plan, **change)
    for words, change in steps:
        together.append(words)
        values |= change
        if len(together) > 1:
            yield " + ".join(together), replace(plan, **values)
    for method in ("lora", "qlora"):
        if plan.method == "full" or (plan.method == "lora" and method == "qlora"):
            bare = replace(plan, method=method, targets=())
            yield f"--method {method}", with_targets(bare, targets)
            yield (
                f"--method {method} + " + " + ".join(together or ["gradient checkpointing"]),
                with_targets(replace(bare, **{**values, "checkpointing": True}), targets),
            )


def _sharded(arch: Architecture, plan: FineTuningPlan, usable: int) -> list[dict[str, Any]]:
    """The fewest GPUs of a kind over which the same training fits, with weights, gradients and optimizer sharded."""
    for n_gpus in (2, 4, 8, 16, 32, 64):
        needed = estimate(arch, replace(plan, zero=3, n_gpus=n_gpus)).total_bytes
        if needed <= usable:
            words = f"--zero 3 --gpus {n_gpus}, that is {n_gpus} times the batch"
            options = {"zero": 3, "n_gpus": n_gpus}
            margin = usable - needed
            return [{"change": words, "options": options, "total_bytes": needed, "margin_bytes": margin}]
    return []


def _largest(arch: Architecture, plan: FineTuningPlan, usable: int, what: str, limit: int) -> int | None:
    """The largest batch or length that fits with everything else as it is, None if not even 1 does."""

    def fits(value: int) -> bool:
        return estimate(arch, replace(plan, **{what: value})).total_bytes <= usable

    low, high = 0, 1
    while high < limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low or None
