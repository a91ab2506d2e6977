"""What hiding or deleting a step changes, and whether what is read most is what matters.

A random span of the same length in the source's place is the control of each ablation. Pairs of a task are not
independent: intervals of correlations resample tasks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.cot.reads import NAME, Reads, step_reads
from probe.analyzers.registry import MEAN, OVER_TASKS, RANKS, Figure, Measure, measure
from probe.analyzers.rows import WHOLE_RUN
from probe.maths.intervals import ratio_interval
from probe.maths.rank_correlation import spearman, spearman_within
from probe.maths.statistics import log_complement
from probe.prompts.labels import ANSWER, UNCHANGED, step_of
from probe.runs.records import PassageRecord

if TYPE_CHECKING:
    from probe.analyzers.rows import Row
    from probe.runs import Run, TaskRun

CAUSES = ("total", "direct", "state_total", "state_direct", "both_total", "both_direct", "deleted")
RANDOM = "random"
"""`control` of a random span of the same length in the source's place."""
ABLATIONS = (*CAUSES, *(f"{RANDOM}_{cause}" for cause in CAUSES))

_ABLATED = (
    "a source is masked from all that follows (experiment `total`), from the rows that emit the answer "
    "(`direct`), left out of the state of recurrent layers (`state_total`, `state_direct`) or of both memories "
    "(`both_total`, `both_direct`), or not in the text (`deleted`); control `random`: a random span of the same length in "
    "its place"
)
_KNOCKOUTS = ("experiment:knockouts", "experiment:state_knockouts", "experiment:joint_knockouts")
_NEEDS = (*_KNOCKOUTS, "experiment:deletions")
_MEANS = "Of the run: mean over the steps of a task, then over tasks."
KNOCKOUT_KL = measure(
    NAME,
    "knockout_kl",
    unit="nats",
    axes="experiment control? step? reader? span",
    means=f"KL(base‖changed) over the whole vocabulary when {_ABLATED}; mean over the reader's rows behind the source, "
    "which n counts.",
    needs=_NEEDS,
    figure=Figure(kind="matrix", x="span", by="step", card="cycle"),
)
ANSWER_CHANGE = measure(
    NAME,
    "answer_change",
    unit="nats",
    of="task run",
    axes="experiment control? span?",
    means=f"Change of the answer's log-probability when {_ABLATED}; below 0 where the source helped. {_MEANS}",
    interval=OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="experiment", card="reasoning"),
)
ANSWER_ODDS_CHANGE = measure(
    NAME,
    "answer_odds_change",
    unit="nats",
    of="task run",
    axes="experiment control? span?",
    means=f"Change of the answer's log-odds log p/(1 − p) when {_ABLATED}; below 0 where the source helped. {_MEANS}",
    interval=OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="experiment", card="reasoning"),
)
_NET_MEANS = (
    "less the same of a random span of its length in its place: what the source itself does. Paired by source; mean over "
    "the steps of a task, then over tasks."
)
ANSWER_CHANGE_NET = measure(
    NAME,
    "answer_change_minus_random",
    unit="nats",
    of="run",
    axes="experiment",
    means=f"`answer_change` of a step {_NET_MEANS}",
    interval=MEAN,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="experiment", card="reasoning"),
)
ANSWER_ODDS_CHANGE_NET = measure(
    NAME,
    "answer_odds_change_minus_random",
    unit="nats",
    of="run",
    axes="experiment",
    means=f"`answer_odds_change` of a step {_NET_MEANS}",
    interval=MEAN,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="experiment", card="reasoning"),
)
PASSED_ON = measure(
    NAME,
    "passed_on",
    unit="share of KL",
    of="run",
    axes="experiment",
    means="1 − Σ direct / Σ total of `knockout_kl` of the answer, over the steps that have both: 1 where the answer reads what "
    "later steps made of a step and not the step itself, 0 where it reads the step itself. `experiment`: the total "
    "knock-out, of keys, of states (`state_total`) or of both.",
    interval=MEAN,
    needs=_KNOCKOUTS,
    figure=Figure(kind="text", card="reasoning"),
)
_NET = {ANSWER_CHANGE: ANSWER_CHANGE_NET, ANSWER_ODDS_CHANGE: ANSWER_ODDS_CHANGE_NET}
_CORRELATED = (
    "of a number of a pair of reader and source (`correlate`: `read_mass`, `read_norm` and `read_logit`, means over "
    "layers and heads or their sum; `read_rate`, mass per token; `span_tokens`; `recency`, how near it is) with the "
    "`cause`, `knockout_kl`, of an ablation (`experiment`)"
)
CAUSAL_SPEARMAN_WITHIN = measure(
    NAME,
    "causal_spearman_within",
    unit="rank correlation",
    of="run",
    axes="correlate cause experiment",
    means=f"Rank correlation {_CORRELATED}, with ranks taken within each task; n counts pairs.",
    interval=RANKS,
    needs=(*_KNOCKOUTS, "3 pairs"),
    figure=Figure(kind="estimates", by="correlate", card="reasoning"),
)
CAUSAL_SPEARMAN = measure(
    NAME,
    "causal_spearman",
    unit="rank correlation",
    of="run",
    axes="correlate cause experiment",
    means=f"Spearman's rank correlation {_CORRELATED}, over the pairs of all tasks, which n counts.",
    interval=RANKS,
    needs=(*_KNOCKOUTS, "3 pairs"),
    figure=Figure(kind="estimates", by="correlate", card="reasoning"),
)


def measures(run: Run) -> Iterator[Row]:
    """Nothing where no experiment was made."""
    frame: Any = run.table("reasoning")
    base = {
        task_id: float(rows["log_prob"].iloc[0])
        for task_id, rows in frame[(frame["experiment"] == UNCHANGED) & (frame["reader"] == ANSWER)].groupby(
            "task_id"
        )
    }
    frame = frame[frame["experiment"].isin(ABLATIONS)]
    if not len(frame):
        return
    rows = frame.to_dict("records")
    changes: dict[tuple[Measure, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        task_id, answer, place = row["task_id"], row["reader"] == ANSWER, ablation(row["experiment"])
        if not math.isnan(row["kl"]):
            reader: dict[str, Any] = {"reader": ANSWER} if answer else {"step": step_of(row["reader"])}
            yield KNOCKOUT_KL.row(
                task_id, row["kl"], n=int(row["n_rows"]), span=row["source"], **place, **reader
            )
        if answer and task_id in base and math.isfinite(row["log_prob"]):
            was, now = base[task_id], row["log_prob"]
            for defined, value in (
                (ANSWER_CHANGE, now - was),
                (ANSWER_ODDS_CHANGE, _log_odds(now) - _log_odds(was)),
            ):
                yield defined.row(task_id, value, span=row["source"], **place)
                if step_of(str(row["source"])) is not None:
                    by_task = changes.setdefault((defined, row["experiment"]), {})
                    by_task.setdefault(task_id, {})[row["source"]] = value
    for (defined, name), by_task in changes.items():
        yield defined.mean([_mean(values.values()) for values in by_task.values()], **ablation(name))
        control = changes.get((defined, f"{RANDOM}_{name}"), {})
        pairs = [
            [
                value - control[task_id][step]
                for step, value in steps.items()
                if step in control.get(task_id, {})
            ]
            for task_id, steps in by_task.items()
        ]
        if any(pairs):
            yield _NET[defined].mean([_mean(of_task) for of_task in pairs if of_task], experiment=name)
    yield from _passed_on(rows)
    yield from _correlations(run, rows)


def _passed_on(rows: Sequence[dict[str, Any]]) -> Iterator[Row]:
    by_step: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["reader"] == ANSWER and step_of(str(row["source"])) is not None and not math.isnan(row["kl"]):
            by_step.setdefault((row["task_id"], row["source"]), {})[row["experiment"]] = row["kl"]
    for whole, part in (("total", "direct"), ("state_total", "state_direct"), ("both_total", "both_direct")):
        total: dict[str, float] = {}
        indirect: dict[str, float] = {}
        for (task_id, _), kl in by_step.items():
            if {whole, part} <= kl.keys():
                total[task_id] = total.get(task_id, 0.0) + kl[whole]
                indirect[task_id] = indirect.get(task_id, 0.0) + kl[whole] - kl[part]
        if sum(total.values()) > 0:
            above, below = [*indirect.values()], [*total.values()]
            interval = ratio_interval(above, below)
            share = sum(above) / sum(below)
            yield PASSED_ON.row(WHOLE_RUN, share, n=len(below), interval=interval, experiment=whole)


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


def ablation(name: str) -> dict[str, Any]:
    """The columns of an ablation as the table of experiments names it."""
    experiment = name.removeprefix("random_")
    return {"experiment": experiment} | ({"control": RANDOM} if experiment != name else {})


def _log_odds(log_prob: float) -> float:
    return log_prob - log_complement(log_prob)


def _correlations(run: Run, rows: list[dict[str, Any]]) -> Iterator[Row]:
    numbers = {task_id: _correlates(run[task_id]) for task_id in {row["task_id"] for row in rows}}
    frame: Any = run.table("reasoning")
    for row in frame[(frame["experiment"] == "read_logit") & frame["layer"].isna()].to_dict("records"):
        of_pair = numbers.get(row["task_id"], {}).get((row["reader"], row["source"]))
        if of_pair is not None:
            of_pair["read_logit"] = row["value"]
    for experiment in CAUSES:
        by_number: dict[str, list[tuple[float, float, str]]] = {}
        for row in rows:
            if row["experiment"] == experiment and not math.isnan(row["kl"]):
                for name, value in numbers[row["task_id"]].get((row["reader"], row["source"]), {}).items():
                    by_number.setdefault(name, []).append((value, row["kl"], row["task_id"]))
        for name, triples in by_number.items():
            x, y, tasks = (np.array(column) for column in zip(*triples, strict=True))
            groups = np.unique(tasks, return_inverse=True)[1]
            place = {"correlate": name, "cause": KNOCKOUT_KL.name, "experiment": experiment}
            for defined, correlate in (
                (CAUSAL_SPEARMAN_WITHIN, spearman_within),
                (CAUSAL_SPEARMAN, spearman),
            ):
                estimate = correlate(x, y, groups)
                if estimate is not None:
                    yield defined.row(
                        WHOLE_RUN, estimate.value, n=len(x), interval=estimate.interval, **place
                    )


def _correlates(task: TaskRun) -> dict[tuple[str, str], dict[str, float]]:
    """(reader, source) → what no intervention made: mean reads over layers and heads, length and recency."""
    passage = task.typed(PassageRecord).passage
    first: dict[str, int] = {}
    for span in passage.spans:
        first.setdefault(span.label, span.start)
    end, size = {span.label: span.end for span in passage.spans}, passage.lengths
    numbers: dict[tuple[str, str], dict[str, float]] = {}
    for reader in first:
        for source in first if reader == ANSWER or step_of(reader) is not None else ():
            if first[reader] >= end[source]:
                numbers[reader, source] = {
                    "span_tokens": float(size[source]),
                    "recency": float(end[source] - first[reader]),
                }
    for name, site in (("read_mass", "attn_to_spans"), ("read_norm", "value_to_spans")):
        reads = step_reads(task, site)
        if reads is not None:
            for pair, value in _pairs(reads):
                if pair in numbers:
                    numbers[pair][name] = value
    for (_, source), of_pair in numbers.items():
        if "read_mass" in of_pair:
            of_pair["read_rate"] = of_pair["read_mass"] / size[source]
    return numbers


def _pairs(reads: Reads) -> Iterator[tuple[tuple[str, str], float]]:
    mean = reads.values.mean(0)
    for i, reader in enumerate(reads.readers):
        for j, source in enumerate(reads.labels):
            if not np.isnan(mean[i, j]):
                yield (reader, source), float(mean[i, j])
