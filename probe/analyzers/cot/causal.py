"""What hiding or deleting a step changes, and whether what is read most is what matters.

`knockout_kl` is KL(base‖changed), nats, the mean over the rows of the reader `step` (null: the answer) when the
source `span` is changed in the way of `variant`: total, direct, deleted, and each with a random run of as many
positions in its place (random_…). `answer_change` is the change of the answer's log-probability,
`answer_odds_change` that of its log-odds, nats: below 0 where the source helped.

`causal_spearman` sets what a reader reads from a source against that divergence, over all pairs;
`causal_spearman_within` correlates the ranks within each task. `variant` is "NUMBER~knockout_kl:ABLATION"; beside
the reads stand the source's length and how far back it lies. Pairs of a task are not independent: intervals
resample tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.cot.reads import ANSWER, NAME, Reads, number, step_reads
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.rank_correlation import spearman, spearman_within
from probe.maths.statistics import bootstrap_mean, log_complement

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

ABLATIONS = ("total", "direct", "deleted", "random_total", "random_direct", "random_deleted")
CAUSES = ("total", "direct", "deleted")


def measures(run: Run) -> Iterator[Row]:
    """Nothing where no experiment was made."""
    frame: Any = run.reasoning()
    base = {
        task_id: float(rows["log_prob"].iloc[0])
        for task_id, rows in frame[(frame["experiment"] == "base") & (frame["reader"] == ANSWER)].groupby(
            "task_id"
        )
    }
    frame = frame[frame["experiment"].isin(ABLATIONS)]
    if not len(frame):
        return
    rows = frame.to_dict("records")
    changes: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        answer = row["reader"] == ANSWER
        common: dict[str, Any] = {"task_id": row["task_id"], "analyzer": NAME, "unit": "nats"}
        common |= {"span": row["source"], "variant": row["experiment"]}
        if not math.isnan(row["kl"]):
            yield Row(
                **common,
                name="knockout_kl",
                value=row["kl"],
                n=int(row["n_rows"]),
                step=None if answer else number(row["reader"]),
            )
        if answer and row["task_id"] in base and math.isfinite(row["log_prob"]):
            was = base[row["task_id"]]
            own = {
                "answer_change": row["log_prob"] - was,
                "answer_odds_change": _log_odds(row["log_prob"]) - _log_odds(was),
            }
            for name, value in own.items():
                yield Row(**common, name=name, value=value, n=1)
                if str(row["source"]).startswith("step:"):
                    changes.setdefault((name, row["experiment"]), {}).setdefault(row["task_id"], []).append(
                        value
                    )
    yield from _means(changes)
    yield from _correlations(run, rows)


def _log_odds(log_prob: float) -> float:
    return log_prob - log_complement(log_prob)


def _means(changes: dict[tuple[str, str], dict[str, list[float]]]) -> Iterator[Row]:
    """Over the steps of a task, then over tasks."""
    for (name, ablation), by_task in changes.items():
        values = [sum(own) / len(own) for own in by_task.values()]
        low, high = bootstrap_mean(values) or (None, None)
        yield Row(
            task_id=WHOLE_RUN,
            analyzer=NAME,
            name=name,
            value=sum(values) / len(values),
            unit="nats",
            n=len(values),
            low=low,
            high=high,
            variant=ablation,
        )


def _correlations(run: Run, rows: list[dict[str, Any]]) -> Iterator[Row]:
    numbers = {task_id: _correlates(run[task_id]) for task_id in {row["task_id"] for row in rows}}
    frame: Any = run.reasoning()
    for row in frame[(frame["experiment"] == "read_logit") & frame["layer"].isna()].to_dict("records"):
        own = numbers.get(row["task_id"], {}).get((row["reader"], row["source"]))
        if own is not None:
            own["read_logit"] = row["value"]
    for cause in CAUSES:
        found: dict[str, list[tuple[float, float, str]]] = {}
        for row in rows:
            if row["experiment"] == cause and not math.isnan(row["kl"]):
                for name, value in numbers[row["task_id"]].get((row["reader"], row["source"]), {}).items():
                    found.setdefault(name, []).append((value, row["kl"], row["task_id"]))
        for name, triples in found.items():
            x, y, tasks = (np.array(column) for column in zip(*triples, strict=True))
            groups = np.unique(tasks, return_inverse=True)[1]
            for measure, correlate in (
                ("causal_spearman", spearman),
                ("causal_spearman_within", spearman_within),
            ):
                estimate = correlate(x, y, groups)
                if estimate is not None:
                    low, high = estimate.interval or (None, None)
                    yield Row(
                        task_id=WHOLE_RUN,
                        analyzer=NAME,
                        name=measure,
                        value=estimate.value,
                        unit="rank correlation",
                        n=len(x),
                        low=low,
                        high=high,
                        variant=f"{name}~knockout_kl:{cause}",
                    )


def _correlates(task: TaskRun) -> dict[tuple[str, str], dict[str, float]]:
    """(reader, source) → what no intervention made: mean reads over layers and heads, length and recency."""
    first: dict[str, int] = {}
    end: dict[str, int] = {}
    size: dict[str, int] = {}
    for span in task.record["spans"]:
        label = span["label"]
        first.setdefault(label, span["start"])
        end[label] = span["end"]
        size[label] = size.get(label, 0) + span["end"] - span["start"]
    found: dict[tuple[str, str], dict[str, float]] = {}
    for reader in first:
        for source in first if reader == ANSWER or number(reader) is not None else ():
            if first[reader] >= end[source]:
                found[reader, source] = {
                    "span_tokens": float(size[source]),
                    "recency": float(end[source] - first[reader]),
                }
    for name, site in (("read_mass", "attn_to_spans"), ("read_norm", "value_to_spans")):
        reads = step_reads(task, site)
        if reads is not None:
            for pair, value in _pairs(reads):
                if pair in found:
                    found[pair][name] = value
    for (_, source), own in found.items():
        if "read_mass" in own:
            own["read_rate"] = own["read_mass"] / size[source]
    return found


def _pairs(reads: Reads) -> Iterator[tuple[tuple[str, str], float]]:
    mean = reads.values.mean(0)
    for i, reader in enumerate(reads.readers):
        for j, source in enumerate(reads.labels):
            if not np.isnan(mean[i, j]):
                yield (reader, source), float(mean[i, j])
