"""Bytes of passages and batches from shapes alone: what is saved, and what is held while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.capture import CaptureSpec, Job


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that sizes depend on."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_value: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_params: int | None = None
    without_attention: tuple[int, ...] = ()
    float32_residual: bool = False

    def attending(self, layers: Iterable[int]) -> list[int]:
        """Those of these layers that have attention."""
        return [layer for layer in layers if layer not in self.without_attention]

    def alike(self, layers: Iterable[int]) -> bool:
        """Heads that differ by layer are known when the model is loaded."""
        return True


def passage_bytes(
    shape: Any,
    spec: CaptureSpec,
    itemsize: int,
    n_prompt: int,
    n_new: int,
    nlabels: int,
    n_decisions: int,
    n_parts: int = 0,
    n_rows: int | None = None,
) -> dict[str, int]:
    """Bytes of each captured tensor of one passage with so many rows (None: one a token after the prompt); `shape` has the
    fields of Shape."""
    from probe.capture.sites import Sizes, site_bytes

    n_run = n_prompt + n_new - 1
    layers = spec.layer_list(shape.n_layers)
    sizes = Sizes(
        shape,
        itemsize,
        layers=len(layers),
        rows=n_new if n_rows is None else n_rows,
        positions=n_run,
        tokens=n_run + 1,
        steps=n_new,
        spans=nlabels,
        decisions=n_decisions,
        parts=n_parts,
        alike=shape.alike(layers),
        attending=len(shape.attending(layers)),
    )
    return site_bytes(spec.sites, sizes)


def batch_bytes(jobs: Sequence[Job], shape: Any, spec: CaptureSpec, itemsize: int, limit: int) -> int:
    """Peak memory of one batch beside the weights: the cache, and the most that any phase holds on top.

    Prefill holds one pass of intermediates; decoding holds what the hooks kept, twice while it is stacked;
    the end holds the tensors of finished passages until they are written, and blocks of pattern and logits.
    """
    from probe.capture.passage import PATTERN_ELEMENTS
    from probe.capture.prefill import PASS_TOKENS
    from probe.capture.sites import needs_of, row_bytes, sequence_bytes

    longest = max(job.prompt.n_prompt + most_new(job, limit, shape.n_ctx) for job in jobs)
    prefixes = {end for job in jobs for end in job.prefix_ends}
    cache = (len(jobs) + len(prefixes)) * sequence_bytes(shape, itemsize, longest)
    cache += sum(sequence_bytes(shape, itemsize, end, states=1) for end in prefixes)
    passed = min(PASS_TOKENS, sum(len(job.prompt.token_ids) - job.shared for job in jobs))
    prefill = passed * (3 * shape.d_mlp + 8 * shape.d_model) * itemsize
    needs = needs_of(spec.sites)
    row = row_bytes(shape, itemsize, spec.layer_list(shape.n_layers), needs)
    rows = sum(most_new(job, limit, shape.n_ctx) for job in jobs)
    # What prefixes keep for transcripts that continue each other.
    kept = {pair for job in jobs for pair in zip(job.prefix_ends, job.prefix_rows, strict=True)}
    cache += row * sum(end - first for end, first in kept)
    rows += sum(len(spec.before_completion(job.prompt)) for job in jobs)
    written = sum(
        sum(job_bytes(job, shape, spec, itemsize, most_new(job, limit, shape.n_ctx)).values()) for job in jobs
    )
    blocks = 4 * 4 * PATTERN_ELEMENTS * ("queries" in needs) + 2 * 4 * 64 * shape.d_vocab
    return cache + max(prefill, 2 * row * rows, row * rows + written + blocks)


def most_new(job: Job, limit: int, n_ctx: int) -> int:
    """Tokens after the prompt if nothing ends early; the last one is never run and may pass the context."""
    return min(job.most_new(limit), n_ctx + 1 - job.prompt.n_prompt)


def job_bytes(job: Job, shape: Any, spec: CaptureSpec, itemsize: int, n_new: int) -> dict[str, int]:
    """Bytes of each captured tensor of a job that makes n_new tokens."""
    prompt, controller = job.prompt, job.controller
    labels = controller.labels(prompt, n_new)
    decisions = controller.n_decisions(n_new)
    parts = len(prompt.tool_parts)
    rows = spec.n_rows(prompt, controller.span_ends(prompt), n_new, decisions)
    return passage_bytes(
        shape, spec, itemsize, prompt.n_prompt, n_new, len(labels), decisions, parts, n_rows=rows
    )
