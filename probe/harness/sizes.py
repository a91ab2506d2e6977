"""Bytes of passages and batches from shapes alone: what is saved, and what is held while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probe.prompts.labels import ANSWER, OTHER, result_label, step_label

if TYPE_CHECKING:
    from probe.capture import CaptureSpec, Job
    from probe.prompts import Prompt


TURN_TOKENS = 32
"""What a call and the result of it take at least, by estimate."""


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that sizes depend on."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_params: int | None = None


def passage_bytes(
    shape: Any, spec: CaptureSpec, itemsize: int, n_prompt: int, n_new: int, nlabels: int, n_decisions: int
) -> dict[str, int]:
    """Bytes of each captured tensor of one passage; `shape` has the fields of Shape."""
    layers = len(spec.layer_list(shape.n_layers))
    n_run = n_prompt + n_new - 1
    rows = n_run if spec.all_rows else n_new
    head_rows = layers * shape.n_heads * rows
    sizes = {
        "resid_post": layers * rows * shape.d_model * itemsize,
        "resid_span_mean": layers * nlabels * shape.d_model * itemsize,
        "keys": layers * shape.n_kv_heads * n_run * shape.d_head * itemsize,
        "values": layers * shape.n_kv_heads * n_run * shape.d_head * itemsize,
        "queries": head_rows * shape.d_head * itemsize,
        "z": head_rows * shape.d_head * itemsize,
        "attn_to_spans": head_rows * nlabels * 4,
        "value_to_spans": head_rows * nlabels * 4,
        "logits": n_decisions * shape.d_vocab * 4,
        "log_probs": n_new * 4,
    }
    kept = {site: size for site, size in sizes.items() if site in spec.sites}
    return kept | {"token_ids": 8 * (n_prompt + n_new), "rows": 8 * rows, "decisions": 8 * n_decisions}


def batch_bytes(
    jobs: Sequence[Job], shape: Any, spec: CaptureSpec, itemsize: int, limit: int, kind: str
) -> int:
    """Peak memory of one batch beside the weights: the cache, and the most that any phase holds on top.

    Prefill holds one pass of intermediates; decoding holds what the hooks kept, twice while it is stacked;
    the end holds the tensors of finished passages until they are written, and blocks of pattern and logits.
    """
    from probe.capture.passage import PATTERN_ELEMENTS
    from probe.capture.prefill import PASS_TOKENS

    layers = len(spec.layer_list(shape.n_layers))
    longest = max(job.prompt.n_prompt + most_new(job, limit, shape.n_ctx) for job in jobs)
    position = 2 * shape.n_layers * shape.n_kv_heads * shape.d_head * itemsize
    prefixes = {end for job in jobs for end in job.prefix_ends}
    cache = position * ((len(jobs) + len(prefixes)) * longest + sum(prefixes))
    passed = min(PASS_TOKENS, sum(len(job.prompt.token_ids) - job.shared for job in jobs))
    prefill = passed * (3 * shape.d_mlp + 8 * shape.d_model) * itemsize
    reads = bool(spec.sites & {"attn_to_spans", "value_to_spans", "queries"})
    row = layers * itemsize * shape.d_model * (1 if spec.sites & {"resid_post", "resid_span_mean"} else 0)
    row += layers * itemsize * shape.n_heads * shape.d_head * (reads + ("z" in spec.sites))
    rows = sum(most_new(job, limit, shape.n_ctx) for job in jobs)
    if spec.all_rows:
        rows += sum(job.prompt.n_prompt for job in jobs)
    written = sum(
        sum(job_bytes(job, shape, spec, itemsize, most_new(job, limit, shape.n_ctx), kind).values())
        for job in jobs
    )
    blocks = 4 * 4 * PATTERN_ELEMENTS * reads + 2 * 4 * 64 * shape.d_vocab
    return cache + max(prefill, 2 * row * rows, row * rows + written + blocks)


def most_new(job: Job, limit: int, n_ctx: int) -> int:
    """Tokens after the prompt if nothing ends early; the last one is never run and may pass the context."""
    return min(job.most_new(limit), n_ctx + 1 - job.prompt.n_prompt)


def job_bytes(
    job: Job, shape: Any, spec: CaptureSpec, itemsize: int, n_new: int, kind: str
) -> dict[str, int]:
    """Bytes of each captured tensor of a job that makes n_new tokens."""
    prompt = job.prompt
    decisions = turns_of(job, n_new) if kind == "agent" else 2 if kind == "cot" else 1
    labels = len(labels_of(prompt, kind, decisions))
    return passage_bytes(shape, spec, itemsize, prompt.n_prompt, n_new, labels, decisions)


def turns_of(job: Job, n_new: int) -> int:
    """How many turns an agent may take, by estimate."""
    return min(job.max_turns, 1 + n_new // TURN_TOKENS)


def labels_of(prompt: Prompt, kind: str, turns: int = 1) -> list[str]:
    """Labels of a finished passage; how many steps a free reasoning takes is a guess."""
    if kind == "agent":
        between = [label for k in range(1, turns) for label in (step_label(k), result_label(k))]
        return list(dict.fromkeys([*prompt.labels, *between, OTHER, ANSWER]))
    if kind != "cot":
        return [*prompt.labels, ANSWER]
    if prompt.forced_steps:
        return list(dict.fromkeys([*prompt.labels, OTHER, ANSWER]))
    return list(dict.fromkeys([*prompt.labels, *(step_label(number) for number in range(1, 6)), ANSWER]))
