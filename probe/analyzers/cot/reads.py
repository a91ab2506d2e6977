"""What each step of a reasoning reads from earlier text: the matrices, and what they say of distance and heads.

The reads of a step are those of the rows that emitted its tokens: the token at position p was emitted by the
row at p − 1. Reading is correlational: what a step attends to most is often not what its result depends on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.rows import WHOLE_RUN, Grid, Row, finished
from probe.maths.statistics import bootstrap_mean

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

NAME = "cot"
ANSWER = "answer"
"""`variant` of the rows whose reader is the answer; its `step` is null."""


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


def step_reads(
    task: TaskRun, site: str = "attn_to_spans", *, layer: int | None = None, head: int | None = None
) -> Reads | None:
    """Mean of `attn_to_spans` (probability) or `value_to_spans` (residual norm) over each reader's rows.

    Over all heads, or of one; of all captured layers, or of one. None where the site was not captured. Raises
    IndexError for a layer or head that the run does not have.
    """
    if site not in task:
        return None
    layers = task.listed("layers") or list(range(task.shape(site)[0]))
    n_heads = task.shape(site)[1]
    if layer is not None and layer not in layers:
        raise IndexError(f"layer {layer} was not captured: there are {', '.join(map(str, layers))}")
    if head is not None and not 0 <= head < n_heads:
        raise IndexError(f"no head {head}: there are {n_heads}, from 0")
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
    stored = task[site] if layer is None else task.slice(site)[layers.index(layer)][None]
    reads = (stored if head is None else stored[:, head : head + 1]).double().numpy()
    values = np.stack([reads[:, :, rows].mean((1, 2)) for rows in emitting.values()], axis=1)
    ahead = np.array([[first[source] > last[reader] for source in labels] for reader in emitting])
    values[:, ahead] = np.nan
    return Reads(
        readers=list(emitting),
        rows=np.array([len(rows) for rows in emitting.values()]),
        layers=layers if layer is None else [layer],
        labels=labels,
        values=values,
        n_heads=reads.shape[1],
    )


def _positions(spans: list[dict[str, Any]], label: str) -> list[int]:
    return [p for span in spans if span["label"] == label for p in range(span["start"], span["end"])]


def read_rows(task_id: str, name: str, unit: str, reads: Reads) -> Iterator[Grid]:
    """One matrix a layer, then their mean over the layers."""
    layer = {"layer": reads.layers}
    reader = {
        "step": [number(label) for label in reads.readers],
        "variant": [ANSWER if label == ANSWER else None for label in reads.readers],
    }
    source = {"span": reads.labels}
    common: dict[str, Any] = {"task_id": task_id, "analyzer": NAME, "name": name, "unit": unit}
    n = reads.rows[:, None] * reads.n_heads
    yield Grid(**common, values=reads.values, axes=[layer, reader, source], n=n)
    yield Grid(**common, values=reads.values.mean(0), axes=[reader, source], n=n * len(reads.layers))


def number(label: str) -> int | None:
    return int(label.removeprefix("step:")) if label.startswith("step:") else None


def origin(label: str) -> str:
    """Who wrote the memory under a label."""
    kind = label.partition(":")[0]
    kinds = {"step": "model", "answer": "model", "result": "environment", "bos": "sink", "sink": "sink"}
    return kinds.get(kind, "markup" if kind == "other" else "prompt")


def origins(task_id: str, reads: Reads) -> Iterator[Grid]:
    """`read_origin`: the mass by who wrote what is read: the prompt, the model's own steps, the environment
    (results of tools), the sink, or markup between them. Means over layers; they add up to 1."""
    names = list(dict.fromkeys(origin(label) for label in reads.labels))
    mean = np.nan_to_num(reads.values.mean(0))
    sums = [mean[:, [origin(label) == name for label in reads.labels]].sum(1) for name in names]
    reader = {
        "step": [number(label) for label in reads.readers],
        "variant": [ANSWER if label == ANSWER else None for label in reads.readers],
    }
    yield Grid(
        task_id=task_id,
        analyzer=NAME,
        name="read_origin",
        unit="probability",
        values=np.stack(sums, axis=1),
        axes=[reader, {"span": names}],
        n=(reads.rows * reads.n_heads * len(reads.layers))[:, None],
    )


def mean_origins(run: Run) -> Iterator[Row]:
    """`read_origin` over the run: the mean over a task's readers, then over tasks, by kind of task (`variant`)."""
    found: dict[tuple[str, str], list[float]] = {}
    for task in finished(run, "cot", "agent"):
        reads = step_reads(task)
        for grid in () if reads is None else origins(task.id, reads):
            for column, name in enumerate(grid.axes[1]["span"]):
                found.setdefault((task.record["kind"], name), []).append(float(grid.values[:, column].mean()))
    for (kind, name), values in found.items():
        low, high = bootstrap_mean(values) or (None, None)
        yield Row(
            task_id=WHOLE_RUN,
            analyzer=NAME,
            name="read_origin",
            value=sum(values) / len(values),
            unit="probability",
            n=len(values),
            low=low,
            high=high,
            span=name,
            variant=kind,
        )


# -- what the matrices say -------------------------------------------------------------------------------------

LIFETIME_SHARE = 0.02
"""A step is in use as long as a later one spends more than this share of its attention on it."""
PROXIMITY_IGNORE = 4
"""Steps so near are left out of a receiver head's score."""
LEAST_STEPS = 10
"""Kurtosis over fewer columns says nothing."""
TOP_HEADS = 20


def span_tokens(task: TaskRun) -> Iterator[Grid]:
    """How many tokens each label has: a long span is read more because it is long."""
    sizes: dict[str, int] = {}
    for span in task.record["spans"]:
        sizes[span["label"]] = sizes.get(span["label"], 0) + span["end"] - span["start"]
    if sizes:
        yield Grid(
            task_id=task.id,
            analyzer=NAME,
            name="span_tokens",
            unit="tokens",
            values=np.array(list(sizes.values()), dtype=np.float64),
            axes=[{"span": list(sizes)}],
        )


def _between_steps(reads: Reads) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """[reader, source] mean over layers, readers' and sources' numbers; the answer reads as one step more."""
    columns = [i for i, label in enumerate(reads.labels) if number(label) is not None]
    sources = [number(reads.labels[i]) or 0 for i in columns]
    last = max(sources, default=0)
    readers = np.array([number(label) or last + 1 for label in reads.readers])
    return reads.values.mean(0)[:, columns], readers, sources


def distances(task_id: str, reads: Reads) -> Iterator[Grid]:
    """`read_distance`: mean mass that a step spends on the step `variant` steps before it (0: itself).

    Means over the steps that have one so far back, layers and heads; n counts those steps. The answer is no
    step here.
    """
    values, readers, sources = _between_steps(reads)
    steps = np.array([label != ANSWER for label in reads.readers])
    gaps = readers[:, None] - np.array(sources, dtype=int)[None]
    found = {}
    for gap in range(int(gaps.max(initial=-1)) + 1):
        own = values[(gaps == gap) & steps[:, None]]
        own = own[~np.isnan(own)]
        if len(own):
            found[gap] = own
    if found:
        yield Grid(
            task_id=task_id,
            analyzer=NAME,
            name="read_distance",
            unit="probability",
            values=np.array([own.mean() for own in found.values()]),
            axes=[{"variant": [str(gap) for gap in found]}],
            n=np.array([len(own) for own in found.values()]),
        )


def lifetimes(task_id: str, reads: Reads) -> Iterator[Grid]:
    """`memory_lifetime`: how many steps after step `step` the last reader comes that spends more than
    LIFETIME_SHARE of its attention on it; 0 where none does, the answer counts as one step more. n: later readers.
    """
    values, readers, sources = _between_steps(reads)
    found, later = [], []
    for column, source in enumerate(sources):
        behind = (readers > source) & ~np.isnan(values[:, column])
        using = readers[behind & (values[:, column] > LIFETIME_SHARE)]
        found.append(float(using.max() - source) if len(using) else 0.0)
        later.append(int(behind.sum()))
    there = [i for i, count in enumerate(later) if count]
    if there:
        yield Grid(
            task_id=task_id,
            analyzer=NAME,
            name="memory_lifetime",
            unit="steps",
            values=np.array([found[i] for i in there]),
            axes=[{"step": [sources[i] for i in there], "variant": [f"share>{LIFETIME_SHARE}"] * len(there)}],
            n=np.array([later[i] for i in there]),
        )


def receiver_scores(task: TaskRun) -> np.ndarray | None:
    """[layer, head] kurtosis of how much each step is read by steps at least PROXIMITY_IGNORE later.

    Bogdan et al. 2025, "Thought anchors", section 5: attention averaged over the block of two sentences, so per
    token of the source; the vertical score of a step is the mean over its later readers; a head's score is
    Fisher's kurtosis over the steps. Rows are those that emitted the reader's tokens. None below LEAST_STEPS.
    """
    if "attn_to_spans" not in task:
        return None
    from scipy.stats import kurtosis

    spans, labels = task.record["spans"], task.labels()
    numbers = sorted(k for k in (number(label) for label in labels) if k is not None)
    if len(numbers) < LEAST_STEPS:
        return None
    row_of = {int(position): row for row, position in enumerate(task["rows"])}
    rows, tokens = [], []
    for k in numbers:
        positions = _positions(spans, f"step:{k}")
        rows.append([row_of[p - 1] for p in positions if p - 1 in row_of])
        tokens.append(len(positions))
    if not all(rows):
        return None
    reads = task["attn_to_spans"].double().numpy()[..., [labels.index(f"step:{k}") for k in numbers]]
    blocks = np.stack([reads[:, :, own].mean(2) for own in rows], axis=2) / np.array(tokens)
    vertical = [
        blocks[:, :, i + PROXIMITY_IGNORE :, i].mean(-1) for i in range(len(numbers) - PROXIMITY_IGNORE)
    ]
    return kurtosis(np.stack(vertical, axis=-1), axis=-1, fisher=True, bias=True)


def _heads(task: TaskRun, scores: np.ndarray) -> list[dict[str, list[int]]]:
    stored = task.listed("layers")
    layers = list(range(scores.shape[0])) if stored is None else stored
    return [{"layer": layers}, {"head": list(range(scores.shape[1]))}]


def receivers(task: TaskRun) -> Iterator[Grid]:
    """`receiver_kurtosis` of every head of a long enough reasoning; n are its steps."""
    scores = receiver_scores(task)
    if scores is not None:
        yield Grid(
            task_id=task.id,
            analyzer=NAME,
            name="receiver_kurtosis",
            unit="kurtosis",
            values=scores,
            axes=_heads(task, scores),
            n=sum(number(label) is not None for label in task.labels()),
        )


def top_receivers(run: Run) -> Iterator[Row]:
    """The TOP_HEADS heads of highest mean `receiver_kurtosis` over the tasks, intervals over tasks."""
    scored = [(task, receiver_scores(task)) for task in finished(run, "cot")]
    scored = [(task, scores) for task, scores in scored if scores is not None]
    if not scored:
        return
    axes = _heads(scored[0][0], scored[0][1])
    by_task = np.stack([scores for _, scores in scored])
    mean = by_task.mean(0)
    order = [int(i) for i in np.argsort(-mean, axis=None, kind="stable") if not np.isnan(mean.flat[i])]
    for place in order[:TOP_HEADS]:
        layer, head = divmod(place, mean.shape[1])
        low, high = bootstrap_mean(by_task[:, layer, head].tolist()) or (None, None)
        yield Row(
            task_id=WHOLE_RUN,
            analyzer=NAME,
            name="receiver_kurtosis",
            value=float(mean[layer, head]),
            unit="kurtosis",
            n=len(scored),
            low=low,
            high=high,
            layer=axes[0]["layer"][layer],
            head=head,
        )
