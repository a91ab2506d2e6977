"""Predicted bytes of a run, on disk and in memory, from shapes alone: no weights are needed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from probe.capture.spec import ROWS
from probe.harness.sizes import batch_bytes, job_bytes, most_new
from probe.prompts import Span
from probe.prompts.labels import ANSWER
from probe.tasks import kind_of, record

if TYPE_CHECKING:
    from probe.capture import CaptureSpec
    from probe.harness.plan import Options, TaskPlan

_TASK_BYTES = 800
"""Checksums, and what a safetensors header says besides tensors and labels."""
_TENSOR_BYTES = 128
"""A tensor's entry in the header and its axes."""


_LOG_PROB = -12.345678901234567
"""A log-probability with as many digits as real ones have."""
_CHARACTERS = 10
"""Characters of a token: as many digits as the longest words need."""


@dataclass(frozen=True)
class RunEstimate:
    """Sizes if every task generates as many tokens as it may; what ends early takes less."""

    disk_bytes: int
    memory_bytes: int
    """Peak of weights, cache and what is held of the largest batch, without the interpreter and libraries."""
    by_site: dict[str, int]
    n_tasks: int
    prompt_tokens: int
    new_tokens: int

    def costliest(self, count: int) -> list[tuple[str, int]]:
        return sorted(self.by_site.items(), key=lambda item: -item[1])[:count]

    def refusal(self, max_bytes: int | None) -> str | None:
        """Why a run that may write at most max_bytes is refused; None if it is not."""
        if max_bytes is None or self.disk_bytes <= max_bytes:
            return None
        costly = ", ".join(f"{site} {size:,}" for site, size in self.costliest(4))
        return (
            f"the run would write up to {self.disk_bytes:,} bytes, more than --max-bytes {max_bytes:,}. "
            f"Most of it: {costly}. Capture less with --capture, --layers or --rows, or --limit the tasks."
        )


def estimate(plans: Sequence[TaskPlan], shape: Any, itemsize: int, choices: Options) -> RunEstimate:
    """What a run of these plans would write and hold. `shape`: ModelFacts or Shape; itemsize of the dtype."""
    from probe.harness.schedule import schedule

    by_site: Counter[str] = Counter()
    prompt_tokens = new_tokens = peak = 0
    for group in schedule(plans, shape, choices):
        limit = group.generation.max_new_tokens
        for batch in group.batches:
            for plan in batch:
                by_site["record"] += _record_bytes(plan, group.spec.sites, limit, shape.n_ctx)
                for job in plan.jobs:
                    n_new = most_new(job, limit, shape.n_ctx)
                    by_site.update(job_bytes(job, shape, group.spec, itemsize, n_new))
                    forced = len(job.prompt.token_ids) - job.prompt.n_prompt
                    prompt_tokens += len(job.prompt.token_ids)
                    new_tokens += n_new - forced
            jobs = [job for plan in batch for job in plan.jobs]
            peak = max(peak, batch_bytes(jobs, shape, group.spec, itemsize, limit))
    weights = (shape.n_params or 0) * itemsize
    return RunEstimate(
        sum(by_site.values()), weights + peak, dict(by_site), len(plans), prompt_tokens, new_tokens
    )


def by_choice(
    plans: Sequence[TaskPlan], shape: Any, itemsize: int, choices: Options, disk_bytes: int
) -> dict[str, dict[str, int]]:
    """Bytes on disk, of a run that takes `disk_bytes`, under each word of `--rows`: option → word → bytes."""
    rest = disk_bytes - _captured_bytes(plans, shape, itemsize, choices)
    # `SITE:all` says of rows what --rows says.
    sites = None if choices.capture is None else choices.capture.replace(":all", "")
    return {
        "rows": {
            word: rest + _captured_bytes(plans, shape, itemsize, replace(choices, capture=sites, rows=word))
            for word in ROWS
        }
    }


def _captured_bytes(plans: Sequence[TaskPlan], shape: Any, itemsize: int, choices: Options) -> int:
    specs: dict[str, CaptureSpec] = {}
    total = 0
    for plan in plans:
        kind = plan.task.kind
        if kind not in specs:
            specs[kind] = choices.capture_spec(kind, shape.n_layers)
        limit = choices.generation(kind).max_new_tokens
        for job in plan.jobs:
            n_new = most_new(job, limit, shape.n_ctx)
            total += sum(job_bytes(job, shape, specs[kind], itemsize, n_new).values())
    return total


def _record_bytes(plan: TaskPlan, sites: Collection[str], limit: int, n_ctx: int) -> int:
    """record.json, checksums and the header of the tensors: a record is simulated and measured."""
    from probe.capture import Outcome
    from probe.capture.sites import ALWAYS, SITES

    kind = kind_of(plan.task)
    outcomes, total = [], 0
    for job in plan.jobs:
        prompt, n_new = job.prompt, most_new(job, limit, n_ctx)
        ids = prompt.token_ids[: prompt.n_prompt]
        filler = "x" * round(n_new * len(prompt.text.encode()) / len(ids))
        labels = job.controller.labels(prompt, n_new)
        scores = [[_LOG_PROB] * len(candidate.token_ids) for candidate in prompt.candidates]
        spans = [*prompt.spans, Span(ANSWER, len(ids), len(ids) + n_new)]
        outcomes.append(
            Outcome(
                token_ids=ids + (ids * n_new)[:n_new],
                n_prompt=len(ids),
                n_new=n_new,
                finish_reason="length",
                completion=filler,
                token_characters=[_CHARACTERS] * n_new,
                spans=spans,
                # Together they decode to the whole sequence.
                span_texts=[prompt.text, *[""] * (len(spans) - 2), filler],
                labels=labels,
                parts=list(prompt.tool_parts),
                layers=[],
                tensors={},
                candidate_log_probs=[_LOG_PROB] * len(scores),
                candidate_token_log_probs=scores,
                opener_log_prob=_LOG_PROB if prompt.n_opener else None,
                parsed=job.controller.example(prompt, n_new, filler, scores),
            )
        )
        prefix = 2 * len(f"{prompt.passage}/") if kind.several else 0
        n_tensors = len(ALWAYS) + sum(bool(prompt.tool_parts) or not SITES[name].of_parts for name in sites)
        named = len(json.dumps(labels)) + len(json.dumps(list(prompt.tool_parts)))
        total += (_TENSOR_BYTES + prefix) * n_tensors + named
    whole = record(plan.task, plan.prompts, outcomes, 0.1234)
    return total + _TASK_BYTES + len(json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode())
