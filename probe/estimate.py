"""Predicted bytes of a run, on disk and in memory, from shapes alone: no weights are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.capture import CaptureSpec
    from probe.plan import Options, Plan

_FIXED_PER_TASK = 3000
"""record.json, checksums and the safetensors header besides text and ids, in bytes."""


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that sizes depend on."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    n_ctx: int
    n_params: int | None = None


@dataclass(frozen=True)
class Estimate:
    """Upper bounds: every task generates as many tokens as it may."""

    disk_bytes: int
    memory_bytes: int
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
            f"the run would write about {self.disk_bytes:,} bytes, more than --max-bytes {max_bytes:,}. "
            f"Most of it: {costly}. Capture less with --capture or --layers, or --limit the tasks."
        )


def passage_bytes(
    shape: Any, spec: CaptureSpec, itemsize: int, n_prompt: int, n_new: int, n_labels: int, n_decisions: int
) -> dict[str, int]:
    """Bytes of each captured tensor of one passage; `shape` has the fields of Shape."""
    layers = len(spec.layer_list(shape.n_layers))
    n_run = n_prompt + n_new - 1
    rows = n_run if spec.all_rows else n_new
    head_rows = layers * shape.n_heads * rows
    sizes = {
        "resid_post": layers * rows * shape.d_model * itemsize,
        "resid_span_mean": layers * n_labels * shape.d_model * itemsize,
        "keys": layers * shape.n_kv_heads * n_run * shape.d_head * itemsize,
        "values": layers * shape.n_kv_heads * n_run * shape.d_head * itemsize,
        "queries": head_rows * shape.d_head * itemsize,
        "z": head_rows * shape.d_head * itemsize,
        "attn_to_spans": head_rows * n_labels * 4,
        "value_to_spans": head_rows * n_labels * 4,
        "logits": n_decisions * shape.d_vocab * 4,
        "log_probs": n_new * 4,
    }
    kept = {site: size for site, size in sizes.items() if site in spec.sites}
    return kept | {"token_ids": 8 * (n_prompt + n_new), "rows": 8 * rows, "decisions": 8 * n_decisions}


def estimate(plans: Sequence[Plan], shape: Any, itemsize: int, choices: Options) -> Estimate:
    """What a run of these plans would write and hold. `shape`: ModelFacts or Shape; itemsize of the dtype."""
    from probe.schedule import schedule

    by_site: Counter[str] = Counter()
    prompt_tokens = new_tokens = peak = 0
    for group in schedule(plans, shape, choices):
        kind, spec, limit = group.kind, group.spec, group.generation.max_new_tokens
        for batch in group.batches:
            held = 0
            for plan in batch:
                for job in plan.jobs:
                    prompt = job.prompt
                    forced = len(prompt.token_ids) - prompt.n_prompt
                    n_new = job.most_new(limit)
                    labels = len(prompt.labels) + (1 if kind != "cot" else 6)
                    sizes = passage_bytes(
                        shape, spec, itemsize, prompt.n_prompt, n_new, labels, 2 if kind == "cot" else 1
                    )
                    by_site.update(sizes)
                    by_site["record"] += _FIXED_PER_TASK + 2 * len(prompt.text.encode()) + 12 * n_new
                    prompt_tokens += len(prompt.token_ids)
                    new_tokens += n_new - forced
                    held += sum(sizes.values())
                    held += (
                        2
                        * shape.n_layers
                        * shape.n_kv_heads
                        * shape.d_head
                        * itemsize
                        * (prompt.n_prompt + n_new)
                    )
            peak = max(peak, held)
    weights = (shape.n_params or 0) * itemsize
    return Estimate(
        sum(by_site.values()), weights + peak, dict(by_site), len(plans), prompt_tokens, new_tokens
    )
