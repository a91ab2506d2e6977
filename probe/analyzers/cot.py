"""What each step of a reasoning, or each turn of an agent, reads from the memory of earlier text, and how large that memory is.

The reads of a step are those of the rows that emitted its tokens: the token at position p was emitted by the
row at p − 1. Reading is correlational: what a step attends to most is often not what its result depends on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.measure import WHOLE_RUN, Grid, Measure, finished
from probe.analyzers.statistics import wilson

if TYPE_CHECKING:
    from probe.store import Run, TaskRun

_NAME = "cot"
ANSWER = "answer"
"""`variant` of the rows whose reader is the answer; its `step` is null."""
_PATTERN_ELEMENTS = 1 << 24


def measures(run: Run) -> Iterator[Measure | Grid]:
    """Measures of every `cot` and `agent` task, then the accuracy of the first.

    For an agent `step` is the turn, and results are sources of their own (`span` is `result:K`).
    """
    scores = []
    for task in finished(run, "cot", "agent"):
        for name, site, unit in (
            ("read_mass", "attn_to_spans", "probability"),
            ("read_norm", "value_to_spans", "residual norm"),
        ):
            reads = step_reads(task, site)
            if reads is not None:
                yield from _read_rows(task.id, name, unit, reads)
        yield from _memory(task.id, memory_bytes(run, task))
        yield from _reconstruction(run, task)
        if task.record["kind"] == "cot" and "score" in task.record:
            scores.append(task.record["score"])
    if scores:
        share = sum(scores) / len(scores)
        low, high = wilson(share, len(scores))
        yield Measure(
            task_id=WHOLE_RUN,
            analyzer=_NAME,
            name="accuracy",
            value=share,
            unit="share of tasks",
            low=low,
            high=high,
            n=len(scores),
        )


# -- reads -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reads:
    """Reader × source matrices, one a layer."""

    readers: list[str]
    """`step:1`, `step:2`, … and `answer`, those whose rows were captured."""
    rows: np.ndarray
    """[reader]: how many rows emitted the reader's tokens."""
    layers: list[int]
    labels: list[str]
    """Sources, in order of first appearance."""
    values: np.ndarray
    """[layer, reader, span], mean over the reader's rows and the heads; NaN where a source lies ahead."""
    n_heads: int


def step_reads(task: TaskRun, site: str) -> Reads | None:
    """Mean of `attn_to_spans` or `value_to_spans` over each reader's rows; None where it was not captured."""
    if site not in task:
        return None
    spans, labels = task.record["spans"], task.labels()
    row_of = {int(position): row for row, position in enumerate(task["rows"])}
    emitting = {
        label: [row_of[p - 1] for p in _positions(spans, label) if p - 1 in row_of]
        for label in dict.fromkeys(span["label"] for span in spans)
        if label == ANSWER or label.startswith("step:")
    }
    emitting = {label: rows for label, rows in emitting.items() if rows}
    if not emitting:
        return None
    last = {label: int(task["rows"][max(rows)]) for label, rows in emitting.items()}
    first = {label: min(_positions(spans, label), default=0) for label in labels}
    reads = task[site].double().numpy()
    values = np.stack([reads[:, :, rows].mean((1, 2)) for rows in emitting.values()], axis=1)
    ahead = np.array([[first[source] > last[reader] for source in labels] for reader in emitting])
    values[:, ahead] = np.nan
    layers = task.listed("layers")
    return Reads(
        readers=list(emitting),
        rows=np.array([len(rows) for rows in emitting.values()]),
        layers=list(range(len(reads))) if layers is None else layers,
        labels=labels,
        values=values,
        n_heads=reads.shape[1],
    )


def _positions(spans: list[dict[str, Any]], label: str) -> list[int]:
    return [p for span in spans if span["label"] == label for p in range(span["start"], span["end"])]


def _read_rows(task_id: str, name: str, unit: str, reads: Reads) -> Iterator[Grid]:
    """One matrix a layer, then their mean over the layers."""
    layer = {"layer": reads.layers}
    reader = {
        "step": [_number(label) for label in reads.readers],
        "variant": [ANSWER if label == ANSWER else None for label in reads.readers],
    }
    source = {"span": reads.labels}
    common: dict[str, Any] = {"task_id": task_id, "analyzer": _NAME, "name": name, "unit": unit}
    n = reads.rows[:, None] * reads.n_heads
    yield Grid(**common, values=reads.values, axes=[layer, reader, source], n=n)
    yield Grid(**common, values=reads.values.mean(0), axes=[reader, source], n=n * len(reads.layers))


def _number(label: str) -> int | None:
    return int(label.removeprefix("step:")) if label.startswith("step:") else None


# -- memory ------------------------------------------------------------------------------------------------------


def memory_bytes(run: Run, task: TaskRun) -> dict[str, int]:
    """Bytes of keys and values that the positions of each label take in the KV cache, all layers together.

    2 · n_layers · n_kv_heads · d_head · item size a position. The last emitted token is never run and so has
    no entry.
    """
    import torch

    model, record = run.run["model"], task.record
    item = getattr(torch, model["dtype"]).itemsize
    per_position = 2 * model["n_layers"] * model["n_kv_heads"] * model["d_head"] * item
    n_run = record["n_prompt"] + record["n_new"] - 1
    found: dict[str, int] = {}
    for span in record["spans"]:
        positions = max(0, min(span["end"], n_run) - span["start"])
        if positions:
            found[span["label"]] = found.get(span["label"], 0) + positions * per_position
    return found


def _memory(task_id: str, found: dict[str, int]) -> Iterator[Grid]:
    if found:
        steps = [_number(label) for label in found]
        where = {
            "step": steps,
            "span": [None if k is not None else s for k, s in zip(steps, found, strict=True)],
        }
        values = np.array(list(found.values()), dtype=np.float64)
        yield Grid(
            task_id=task_id, analyzer=_NAME, name="memory_bytes", unit="bytes", values=values, axes=[where]
        )


def _reconstruction(run: Run, task: TaskRun) -> Iterator[Grid]:
    """max |c − z| / max |z| by layer: the reads c rebuilt from the saved queries, keys and values.

    It checks that the saved memory is the one that the model used. A learned sink is not saved, so a model
    that has one is left out.
    """
    if not all(site in task for site in ("queries", "keys", "values", "z")):
        return
    if "sink" in (task.listed("labels") or ()):
        return
    from probe.reads import LayerAttention

    stored = task.listed("layers")
    layers = list(range(task.shape("z")[0])) if stored is None else stored
    n_heads, n_rows = task.shape("z")[1:3]
    facts = [LayerAttention(**run.run["model"]["attention"][layer]) for layer in layers]
    errors = [reconstruction_error(task, index, fact) for index, fact in enumerate(facts)]
    yield Grid(
        task_id=task.id,
        analyzer=_NAME,
        name="reconstruction_error",
        unit="relative",
        values=np.array(errors),
        axes=[{"layer": layers}],
        n=n_rows * n_heads,
    )


def reconstruction_error(task: TaskRun, index: int, layer: Any) -> float:
    """max |c − z| / max |z| over all rows and heads of the captured layer number `index`.

    c = Σ_j α_j v_j with α from the saved queries and keys; `layer` is the layer's LayerAttention.
    """
    from probe.reads import pattern, read

    queries, keys, values, z = (task.slice(site)[index] for site in ("queries", "keys", "values", "z"))
    rows = task["rows"]
    block = max(1, _PATTERN_ELEMENTS // (queries.shape[0] * keys.shape[1]))
    worst = 0.0
    for start in range(0, len(rows), block):
        at = slice(start, start + block)
        rebuilt = read(pattern(queries[:, at], keys, rows[at], layer), values)
        worst = max(worst, float((rebuilt - z[:, at].float()).abs().max()))
    return worst / float(z.float().abs().max())
