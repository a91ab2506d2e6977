"""Which tasks run together and in what order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.capture import CaptureSpec, Generation
    from probe.plan import Options, Plan

_BATCH = 8
_BATCH_TOKENS = 8192


@dataclass
class Group:
    """The tasks of one kind: captured and generated alike."""

    kind: str
    spec: CaptureSpec
    generation: Generation
    batches: list[list[Plan]]


def schedule(plans: Sequence[Plan], shape: Any, choices: Options) -> Iterator[Group]:
    """Group the tasks by kind, find the prefixes they share, and cut batches."""
    from probe.capture import CaptureSpec, plan_shared
    from probe.scoring import task_kind

    kinds: dict[str, list[Plan]] = {}
    for plan in plans:
        kinds.setdefault(task_kind(plan.task), []).append(plan)
    for kind, group in kinds.items():
        spec = CaptureSpec.parse(choices.capture, choices.layers, kind, shape.n_layers)
        plan_shared([job for plan in group for job in plan.jobs])
        yield Group(kind, spec, choices.generation(kind), list(_batches(group, choices.batch_size)))


def _batches(plans: list[Plan], size: int | None) -> Iterator[list[Plan]]:
    """Whole tasks of like length together, longest first, so that peak memory shows at once.

    Tasks that share a prefix stay side by side, so that it is run once and need not be kept for long.
    """
    longest: dict[tuple[int, ...], int] = {}
    for plan in plans:
        longest[_prefix(plan)] = max(longest.get(_prefix(plan), 0), _length(plan))
    waiting = sorted(plans, key=lambda plan: (-longest[_prefix(plan)], _prefix(plan), -_length(plan)))
    batch: list[Plan] = []
    n_jobs = 0
    for plan in waiting:
        limit = size or max(1, min(_BATCH, _BATCH_TOKENS // _length(batch[0] if batch else plan)))
        if batch and n_jobs + len(plan.jobs) > max(limit, len(batch[0].jobs)):
            yield batch
            batch, n_jobs = [], 0
        batch.append(plan)
        n_jobs += len(plan.jobs)
    if batch:
        yield batch


def _length(plan: Plan) -> int:
    return max(len(prompt.token_ids) for prompt in plan.prompts)


def _prefix(plan: Plan) -> tuple[int, ...]:
    """The shared tokens of a task's first passage; tasks without any are all alike."""
    return tuple(plan.prompts[0].token_ids[: plan.jobs[0].shared])
