"""Chain of thought: what each step, or each turn of an agent, reads, and what proof there is that it matters.

    reads         step × step matrices, distances, lifetimes, receiver heads: from attention alone
    memory        bytes, norms, and the head outputs rebuilt from the saved keys and values
    recurrent     the same of layers whose memory is a state, and what each step changes in it
    lens          the logits that each source brings, and the answer's probability by step and layer
    causal        what masking or deleting a step changes, set against the reads
    faithfulness  early answers, filler, mistakes, paraphrases
    rewriting     what the model writes anew after a step was masked or drawn again

The last four and the states, and what needs W_O or the unembedding, come from experiments with the model: absent without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from probe.analyzers.cot import causal, faithfulness, lens, recurrent, rewriting
from probe.analyzers.cot.memory import memory, memory_bytes, norms, reconstruction, reconstruction_error
from probe.analyzers.cot.reads import (
    NAME,
    READ_MASS,
    READ_NORM,
    Reads,
    distances,
    lifetimes,
    mean_origins,
    origins,
    read_rows,
    receivers,
    span_tokens,
    step_reads,
    top_receivers,
)
from probe.analyzers.registry import WILSON, Figure, measure
from probe.analyzers.rows import Grid, Row
from probe.runs.read import finished
from probe.runs.records import PassageRecord

if TYPE_CHECKING:
    from probe.runs import Run

__all__ = ["Reads", "measures", "memory_bytes", "reconstruction_error", "step_reads"]

ACCURACY = measure(
    NAME,
    "accuracy",
    unit="share of tasks",
    of="run",
    means="Share of `cot` tasks whose answer is right.",
    interval=WILSON,
    figure=Figure(kind="estimates"),
)


def measures(run: Run) -> Iterator[Row | Grid]:
    """Measures of every `cot`, `agent` and `replay` task, then those over all of the first kind.

    For an agent `step` is the turn, and results are sources of their own (`span` is `result:K`).
    """
    scores = []
    for task in finished(run, "cot", "agent", "replay"):
        mass = step_reads(task, "attn_to_spans")
        norm = step_reads(task, "value_to_spans")
        if mass is not None:
            yield from read_rows(task.id, READ_MASS, mass)
            yield from span_tokens(task)
            yield from distances(task.id, mass)
            yield from lifetimes(task.id, mass)
            yield from origins(task.id, mass)
        if norm is not None:
            yield from read_rows(task.id, READ_NORM, norm)
        yield from receivers(task)
        yield from memory(task.id, memory_bytes(run, task))
        yield from norms(task)
        yield from reconstruction(run, task)
        record = task.typed(PassageRecord)
        if record.kind == "cot" and record.score is not None:
            scores.append(record.score)
    yield from top_receivers(run)
    yield from mean_origins(run)
    yield from recurrent.measures(run)
    yield from lens.measures(run)
    yield from causal.measures(run)
    yield from faithfulness.measures(run)
    yield from rewriting.measures(run)
    if scores:
        yield ACCURACY.share(scores)
