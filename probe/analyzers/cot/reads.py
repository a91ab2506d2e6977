"""What each step of a reasoning reads from earlier text: the matrices, and what they say of distance and heads.

The reads of a step are those of the rows that emitted its tokens: the token at position p was emitted by the
row at p − 1. Reading is correlational: what a step attends to most is often not what its result depends on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.registry import (
    EMITTING,
    NORM_OF_READ,
    OVER_TASKS,
    SHARE_OVER_TASKS,
    Figure,
    Measure,
    measure,
)
from probe.analyzers.rows import WHOLE_RUN, Grid, Row
from probe.maths.intervals import SEED
from probe.prompts.labels import ANSWER, BOS, OTHER, RESULT, SINK, STEP, Label, step_label, step_of
from probe.runs.read import finished
from probe.runs.records import PassageRecord

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

NAME = "cot"
LIFETIME_SHARE = 0.02
"""A step is in use as long as a later one spends more than this share of its attention on it."""
PROXIMITY_IGNORE = 4
"""Steps so near are left out of a receiver head's score."""
EXCHANGES = 199
MOST_TASKS = 64
"""Tasks in which reads are exchanged."""
LEAST_STEPS = 10
"""Kurtosis over fewer columns says nothing."""
TOP_HEADS = 20
LEVEL = 0.05

READ_MASS = measure(
    NAME,
    "read_mass",
    unit="probability",
    axes="layer? step? reader? span",
    means="Attention mass that a step, or the answer, spends on a source: Σ α over the source's positions, mean over "
    "the rows that emitted the reader's tokens and over heads; by layer, and without one the mean over layers.",
    needs=("attn_to_spans", EMITTING),
    figure=Figure(kind="matrix", x="span", by="step", card="cycle"),
)
READ_NORM = measure(
    NAME,
    "read_norm",
    unit="residual norm",
    axes="layer? step? reader? span",
    means=f"Mean over the same rows and heads as `read_mass` of {NORM_OF_READ}",
    source="Kobayashi et al. 2020, eq. 5",
    needs=("value_to_spans", EMITTING),
    figure=Figure(kind="matrix", x="span", by="step", card="cycle"),
)
READ_ORIGIN = measure(
    NAME,
    "read_origin",
    unit="probability",
    of="task run",
    axes="step? reader? kind? origin",
    means="Attention mass by who wrote what is read: `prompt`, `model` (its own steps), `environment` (results of "
    "tools), `sink`, or `markup` between them; mean over layers, heads and rows; they add up to 1. Of the run: mean "
    "over a task's readers, then over tasks of a kind.",
    interval=SHARE_OVER_TASKS,
    needs=("attn_to_spans", EMITTING),
    figure=Figure(kind="bars", by="origin"),
)
SPAN_TOKENS = measure(
    NAME,
    "span_tokens",
    unit="tokens",
    axes="span",
    means="How many tokens a source has: a long span is read more because it is long.",
    needs=("attn_to_spans", EMITTING),
    figure=Figure(kind="text", by="span", card="cycle"),
)
READ_DISTANCE = measure(
    NAME,
    "read_distance",
    unit="probability",
    axes="distance",
    means="Attention mass that a step spends on the step `distance` steps before it (0: itself); mean over the steps "
    "that have one so far back, which n counts, over layers and heads. The answer is no step here.",
    needs=("attn_to_spans", EMITTING),
    figure=Figure(kind="curve", x="distance"),
)
MEMORY_LIFETIME = measure(
    NAME,
    "memory_lifetime",
    unit="steps",
    axes="step threshold",
    means="Steps from step `step` to the last later reader that spends more than `threshold` of its attention on it; "
    "0 where none does; the answer counts as one step more; n counts later readers.",
    needs=("attn_to_spans", EMITTING),
    figure=Figure(kind="bars", by="step", card="cycle"),
)
RECEIVER_KURTOSIS = measure(
    NAME,
    "receiver_kurtosis",
    unit="kurtosis",
    of="task run",
    axes="layer head half?",
    means="Fisher's kurtosis over the steps of how much each is read by steps at least "
    f"{PROXIMITY_IGNORE} later, in attention per token of the source; of the run, the "
    f"{TOP_HEADS} heads that are highest on `half` of the tasks: their mean over the others.",
    source="Bogdan et al. 2025, Thought anchors, section 5",
    interval=OVER_TASKS,
    needs=("attn_to_spans", EMITTING, f"{LEAST_STEPS} steps"),
    figure=Figure(kind="table", by="head"),
)
RECEIVER_P = measure(
    NAME,
    "receiver_p_corrected",
    unit="p-value",
    of="run",
    axes="layer head",
    means="Share of exchanges in which some head has as high a mean `receiver_kurtosis` over tasks: what each step reads is "
    "exchanged among the steps that it may read, so that steps agree on none, in up to "
    f"{MOST_TASKS} tasks. Corrected for the number of heads; n are exchanges.",
    source="Westfall and Young 1993",
    needs=("attn_to_spans", EMITTING, f"{LEAST_STEPS} steps"),
    figure=Figure(kind="table", by="head"),
)
RECEIVERS_FOUND = measure(
    NAME,
    "receivers_found",
    unit="heads",
    of="run",
    means="Number of heads whose `receiver_p_corrected` is below 0.05; n are tasks.",
    needs=("attn_to_spans", EMITTING, f"{LEAST_STEPS} steps"),
    figure=Figure(kind="text"),
)


@dataclass(frozen=True)
class Reads:
    """Reader × source matrices, one a layer."""

    readers: list[str]
    """`step:1`, `step:2`, … and `answer`."""
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

    Over all heads, or of one; of all captured layers, or of one. None where the site was not captured, or not in all rows
    that emitted the steps and the answer (`--rows`): what some rows read is not what a step does. Raises
    IndexError for a layer or head that the run does not have.
    """
    if site not in task:
        return None
    layers = task.layers(site)
    n_heads = task.shape(site)[1]
    if layer is not None and layer not in layers:
        raise IndexError(f"layer {layer} was not captured: there are {', '.join(map(str, layers))}")
    if head is not None and not 0 <= head < n_heads:
        raise IndexError(f"no head {head}: there are {n_heads}, from 0")
    passage, labels = task.typed(PassageRecord).passage, task.labels()
    row_of = {int(position): row for row, position in enumerate(task["rows"])}
    spoken = {
        label: passage.emitting(label)
        for label in passage.lengths
        if label == ANSWER or step_of(label) is not None
    }
    if not all(position in row_of for positions in spoken.values() for position in positions):
        return None
    emitting = {label: [row_of[p] for p in positions] for label, positions in spoken.items() if positions}
    if not emitting:
        return None
    last = {label: int(task["rows"][max(rows)]) for label, rows in emitting.items()}
    first = {label: min(passage.positions(label), default=0) for label in labels}
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


def read_rows(task_id: str, defined: Measure, reads: Reads) -> Iterator[Grid]:
    """One matrix a layer, then their mean over the layers."""
    axes = [reader_axis(reads.readers), {"span": reads.labels}]
    n = reads.rows[:, None] * reads.n_heads
    yield defined.grid(task_id, reads.values, {"layer": reads.layers}, *axes, n=n)
    yield defined.grid(task_id, reads.values.mean(0), *axes, n=n * len(reads.layers))


def reader_axis(readers: list[str]) -> dict[str, list[Any]]:
    """The columns of readers: `step` of a step, `reader` of the answer."""
    return {
        "step": [step_of(label) for label in readers],
        "reader": [ANSWER if label == ANSWER else None for label in readers],
    }


def origin(label: str) -> str:
    """Who wrote the memory under a label."""
    kind = Label.parse(label).kind
    kinds = {STEP: "model", ANSWER: "model", RESULT: "environment", BOS: "sink", SINK: "sink"}
    return kinds.get(kind, "markup" if kind == OTHER else "prompt")


def origins(task_id: str, reads: Reads) -> Iterator[Grid]:
    """Readers × who wrote what they read."""
    names = list(dict.fromkeys(origin(label) for label in reads.labels))
    mean = np.nan_to_num(reads.values.mean(0))
    sums = [mean[:, [origin(label) == name for label in reads.labels]].sum(1) for name in names]
    n = (reads.rows * reads.n_heads * len(reads.layers))[:, None]
    yield READ_ORIGIN.grid(
        task_id, np.stack(sums, axis=1), reader_axis(reads.readers), {"origin": names}, n=n
    )


def mean_origins(run: Run) -> Iterator[Row]:
    """`read_origin` of the run."""
    by_origin: dict[tuple[str, str], list[float]] = {}
    for task in finished(run, "cot", "agent", "replay"):
        reads = step_reads(task)
        for grid in () if reads is None else origins(task.id, reads):
            for column, name in enumerate(grid.axes[1]["origin"]):
                mean = float(grid.values[:, column].mean())
                by_origin.setdefault((task.record["kind"], name), []).append(mean)
    for (kind, name), values in by_origin.items():
        yield READ_ORIGIN.share(values, origin=name, kind=kind)


# -- what the matrices say -------------------------------------------------------------------------------------


def span_tokens(task: TaskRun) -> Iterator[Grid]:
    """How many tokens each label has: a long span is read more because it is long."""
    sizes = task.typed(PassageRecord).passage.lengths
    if sizes:
        yield SPAN_TOKENS.grid(
            task.id, np.array(list(sizes.values()), dtype=np.float64), {"span": list(sizes)}
        )


def _between_steps(reads: Reads) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """[reader, source] mean over layers, readers' and sources' numbers; the answer reads as one step more."""
    columns = [i for i, label in enumerate(reads.labels) if step_of(label) is not None]
    sources = [step_of(reads.labels[i]) or 0 for i in columns]
    last = max(sources, default=0)
    readers = np.array([step_of(label) or last + 1 for label in reads.readers])
    return reads.values.mean(0)[:, columns], readers, sources


def distances(task_id: str, reads: Reads) -> Iterator[Grid]:
    """Mean mass by how many steps lie between reader and source."""
    values, readers, sources = _between_steps(reads)
    steps = np.array([label != ANSWER for label in reads.readers])
    gaps = readers[:, None] - np.array(sources, dtype=int)[None]
    by_gap = {}
    for gap in range(int(gaps.max(initial=-1)) + 1):
        masses = values[(gaps == gap) & steps[:, None]]
        masses = masses[~np.isnan(masses)]
        if len(masses):
            by_gap[gap] = masses
    if by_gap:
        yield READ_DISTANCE.grid(
            task_id,
            np.array([masses.mean() for masses in by_gap.values()]),
            {"distance": list(by_gap)},
            n=np.array([len(masses) for masses in by_gap.values()]),
        )


def lifetimes(task_id: str, reads: Reads) -> Iterator[Grid]:
    """How long each step that has a later reader is in use."""
    values, readers, sources = _between_steps(reads)
    in_use, later = [], []
    for column, source in enumerate(sources):
        behind = (readers > source) & ~np.isnan(values[:, column])
        using = readers[behind & (values[:, column] > LIFETIME_SHARE)]
        in_use.append(float(using.max() - source) if len(using) else 0.0)
        later.append(int(behind.sum()))
    readable = [i for i, count in enumerate(later) if count]
    if readable:
        yield MEMORY_LIFETIME.grid(
            task_id,
            np.array([in_use[i] for i in readable]),
            {"step": [sources[i] for i in readable], "threshold": [LIFETIME_SHARE] * len(readable)},
            n=np.array([later[i] for i in readable]),
        )


def step_blocks(task: TaskRun) -> np.ndarray | None:
    """[layer, head, reader, source] attention per token of the source, steps by steps; rows are those that emitted the
    reader's tokens. None below LEAST_STEPS."""
    if "attn_to_spans" not in task:
        return None
    passage, labels = task.typed(PassageRecord).passage, task.labels()
    numbers = sorted(k for k in (step_of(label) for label in labels) if k is not None)
    if len(numbers) < LEAST_STEPS:
        return None
    row_of = {int(position): row for row, position in enumerate(task["rows"])}
    rows, tokens = [], []
    for k in numbers:
        positions = passage.emitting(step_label(k))
        if not positions or not all(position in row_of for position in positions):
            return None
        rows.append([row_of[position] for position in positions])
        tokens.append(len(passage.positions(step_label(k))))
    reads = task["attn_to_spans"].double().numpy()[..., [labels.index(step_label(k)) for k in numbers]]
    return np.stack([reads[:, :, step_rows].mean(2) for step_rows in rows], axis=2) / np.array(tokens)


def receiver_scores(blocks: np.ndarray) -> np.ndarray:
    """[layer, head] kurtosis of how much each step is read by steps at least PROXIMITY_IGNORE later; of `step_blocks`.

    Bogdan et al. 2025, "Thought anchors", section 5: attention averaged over the block of two sentences, so per
    token of the source; the vertical score of a step is the mean over its later readers; a head's score is
    Fisher's kurtosis over the steps, NaN where it reads all alike.
    """
    n = blocks.shape[-1]
    later = np.tri(n, k=-PROXIMITY_IGNORE)[:, : n - PROXIMITY_IGNORE]
    vertical = np.einsum("lhrs,rs->lhs", blocks[..., : n - PROXIMITY_IGNORE], later / later.sum(0))
    spread = vertical - vertical.mean(-1, keepdims=True)
    variance = np.square(spread).mean(-1)
    flat = np.sqrt(variance) <= 1e-12 * np.abs(vertical).max(-1)
    return np.where(flat, np.nan, (spread**4).mean(-1) / np.where(flat, 1, variance) ** 2 - 3)


def receiver_p(by_task: Iterable[np.ndarray], exchanges: int = EXCHANGES) -> np.ndarray:
    """[layer, head]: `receiver_p_corrected` of the `step_blocks` of tasks, the true order counted; NaN where a head reads all
    steps alike."""
    generator = np.random.default_rng(SEED)
    observed, exchanged = 0.0, 0.0
    for blocks in by_task:
        observed = observed + receiver_scores(blocks)
        drawn = [receiver_scores(_exchanged(blocks, generator)) for _ in range(exchanges)]
        exchanged = exchanged + np.stack(drawn)
    highest = np.nanmax(exchanged, axis=(1, 2))
    reached = (1 + (highest >= np.asarray(observed)[..., None]).sum(-1)) / (1 + exchanges)
    return np.where(np.isnan(observed), np.nan, reached)


def _exchanged(blocks: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The blocks with what each step reads exchanged among the steps at least PROXIMITY_IGNORE earlier, alike in all heads."""
    out = blocks.copy()
    for reader in range(PROXIMITY_IGNORE + 1, blocks.shape[2]):
        order = generator.permutation(reader - PROXIMITY_IGNORE + 1)
        out[:, :, reader, : len(order)] = blocks[:, :, reader, order]
    return out


def _heads(task: TaskRun, scores: np.ndarray) -> list[dict[str, list[int]]]:
    return [{"layer": task.layers("attn_to_spans")}, {"head": list(range(scores.shape[1]))}]


def receivers(task: TaskRun) -> Iterator[Grid]:
    """`receiver_kurtosis` of every head of a long enough reasoning; n are its steps."""
    blocks = step_blocks(task)
    if blocks is not None:
        scores = receiver_scores(blocks)
        n_steps = sum(step_of(label) is not None for label in task.labels())
        yield RECEIVER_KURTOSIS.grid(task.id, scores, *_heads(task, scores), n=n_steps)


def top_receivers(run: Run) -> Iterator[Row | Grid]:
    """The TOP_HEADS heads whose mean `receiver_kurtosis` is highest on one half of the tasks, every second one, measured on the
    other half: what is highest of hundreds is high by chance as well. And `receiver_p_corrected` of every head."""
    axes: list[dict[str, list[int]]] = []
    scored: list[np.ndarray] = []
    for task in finished(run, "cot"):
        blocks = step_blocks(task)
        if blocks is not None:
            scores = receiver_scores(blocks)
            axes = axes or _heads(task, scores)
            scored.append(scores)
    if len(scored) < 2:
        return
    by_task = np.stack(scored)
    again = (step_blocks(task) for task in finished(run, "cot"))
    p = receiver_p(islice((blocks for blocks in again if blocks is not None), MOST_TASKS))
    yield RECEIVER_P.grid(WHOLE_RUN, p, *axes, n=EXCHANGES)
    yield RECEIVERS_FOUND.row(WHOLE_RUN, float((p < LEVEL).sum()), n=min(len(scored), MOST_TASKS))
    for half in (0, 1):
        mean, tested = by_task[half::2].mean(0), by_task[1 - half :: 2]
        order = [int(i) for i in np.argsort(-mean, axis=None, kind="stable") if not np.isnan(mean.flat[i])]
        for place in order[:TOP_HEADS]:
            layer, head = divmod(place, mean.shape[1])
            values = tested[:, layer, head]
            at = {"layer": axes[0]["layer"][layer], "head": head, "half": half}
            if not np.isnan(values).any():
                yield RECEIVER_KURTOSIS.mean(values.tolist(), **at)
