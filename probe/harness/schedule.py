"""Which tasks run together and in what order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.harness.sizes import batch_bytes

if TYPE_CHECKING:
    from probe.capture import CaptureSpec, Generation, Job
    from probe.harness.plan import Options, TaskPlan

_BATCH = {"cpu": 8, "cuda": 32}
"""Sequences of a batch where memory allows: on two cores 16 were 7 % faster than 8, and 32 no faster than 16."""
_SHARE = 0.5
"""Share of the free memory that a batch may be estimated to take."""
_MANY_BATCHES = 4
"""From so many batches on the first task of the first kind runs alone, and its record is there early: a batch is prefilled whole
before its first token, so that of 72 tasks the first record took twice as long. Fewer batches would be slowed noticeably."""


@dataclass
class Group:
    """The tasks of one kind: captured and generated alike."""

    kind: str
    spec: CaptureSpec
    generation: Generation
    batches: list[list[TaskPlan]]


def schedule(plans: Sequence[TaskPlan], shape: Any, choices: Options) -> Iterator[Group]:
    """Group the tasks that have prompts by kind, find the prefixes they share, and cut batches."""
    from probe.capture import plan_shared

    kinds: dict[str, list[TaskPlan]] = {}
    for plan in plans:
        if plan.fault:
            continue
        kinds.setdefault(plan.task.kind, []).append(plan)
    for number, (kind, group) in enumerate(kinds.items()):
        spec = choices.capture_spec(kind, shape.n_layers)
        plan_shared([job for plan in group for job in plan.jobs])
        generation = choices.generation(kind)
        room = _Room(shape, spec, generation, choices)
        batches = list(_batches(group, room.fits))
        alone = number == 0 and choices.batch_size is None and len(batches) >= _MANY_BATCHES
        if alone and len(batches[0]) > 1:
            batches[:1] = [batches[0][:1], batches[0][1:]]
        yield Group(kind, spec, generation, batches)


class _Room:
    """Whether jobs fit into one batch: by number where `--batch-size` gives one, else by memory too."""

    def __init__(self, shape: Any, spec: CaptureSpec, generation: Generation, choices: Options):
        self._ask = (shape, spec, choices.itemsize, generation.max_new_tokens)
        self._size = choices.batch_size
        cuda = choices.device != "cpu"
        self._most = self._size or _BATCH["cuda" if cuda else "cpu"]
        self._bytes = choices.batch_bytes or batch_budget(choices)

    def fits(self, jobs: list[Job]) -> bool:
        if len(jobs) > self._most or self._size:
            return len(jobs) <= self._most
        return batch_bytes(jobs, *self._ask) <= self._bytes


def batch_budget(choices: Options) -> int:
    """Bytes that a batch may be estimated to take: half of what is free now."""
    return int(_SHARE * _free_bytes(choices.device != "cpu"))


def _free_bytes(cuda: bool) -> float:
    """Memory that is free: of the GPUs, or of the machine within its control group's limit."""
    import psutil

    if cuda:
        import torch

        if torch.cuda.is_available():
            return sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
    free = float(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):
        root = Path("/sys/fs/cgroup")
        limit, used = ((root / name).read_text() for name in ("memory.max", "memory.current"))
        free = min(free, int(limit) - int(used))
    return free


def _batches(plans: list[TaskPlan], fits: Callable[[list[Job]], bool]) -> Iterator[list[TaskPlan]]:
    """Whole tasks of like length together, longest first, so that peak memory shows at once.

    Tasks that share a prefix stay side by side, so that it is run once and need not be kept for long.
    """
    batch: list[TaskPlan] = []
    for plan in _in_order(plans):
        if batch and not fits([job for entry in [*batch, plan] for job in entry.jobs]):
            yield batch
            batch = []
        batch.append(plan)
    if batch:
        yield batch


def _in_order(plans: Sequence[TaskPlan]) -> list[TaskPlan]:
    """Depth first through the tree of shared prefixes of the first passages, the longest task first at every branch: no
    more prefixes are needed at a time than one continues another."""
    numbers: dict[tuple[int, ...], int] = {}
    longest: dict[int, int] = {}
    branches = []
    for plan in plans:
        ids = plan.prompts[0].token_ids
        branch = [numbers.setdefault(tuple(ids[:end]), len(numbers)) for end in plan.jobs[0].prefix_ends]
        branches.append(branch)
        for number in branch:
            longest[number] = max(longest.get(number, 0), _length(plan))
    places = [
        [*((-longest[number], number) for number in branch), (-_length(plan), -1)]
        for plan, branch in zip(plans, branches, strict=True)
    ]
    return [plans[index] for index in sorted(range(len(plans)), key=places.__getitem__)]


def _length(plan: TaskPlan) -> int:
    return max(len(prompt.token_ids) for prompt in plan.prompts)
