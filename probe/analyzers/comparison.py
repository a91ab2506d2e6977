"""Two or more runs of the same tasks, paired by task: what changed, by how much, whether by chance, and where inside.

From records, measures.parquet and the captured states alone. Rows of measures are paired where task and all columns that
say where they were taken are the same; a task's pairs are then averaged over layers, heads, steps, spans and tools. Where
the models have other layers or heads, rows are averaged over these first: layer k of one is not layer k of the other.
Every difference is that of a run from the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from probe.analyzers.rows import WHOLE_RUN
from probe.errors import UsageError
from probe.maths.intervals import mean_interval, share_difference, share_interval, welch_interval
from probe.maths.paired import difference_interval, difference_p, is_right_or_wrong
from probe.maths.statistics import entropy
from probe.prompts.labels import NO_TOOL
from probe.runs import AXES, Run, TaskRun
from probe.runs.bulk import step_row
from probe.runs.edits import edits_text
from probe.runs.records import (
    AgentRecord,
    CotRecord,
    PromptingRecord,
    TaskRecord,
    ToolRecord,
    struct_of,
)

if TYPE_CHECKING:
    import pandas

MOST_RUNS = 20
CHANCE = 0.05
"""Corrected p-value up to which a difference counts as more than chance."""
_GEOMETRY = ("layer", "layer_to", "head")
_AVERAGED = (*_GEOMETRY, "step", "span", "tool", "other_tool", "token", "word", "word_index")
"""Axes over which a task's pairs are averaged; what differs elsewhere is another number."""
_LABELS = [axis for axis in AXES if axis not in _AVERAGED]
_PLACE = ["task_id", "analyzer", "name", *AXES]
_GROUP = ["analyzer", "name", *_LABELS, "tools", "unit"]
RIGHT, OTHERS = "right", "other"
STATES = "resid_post"
"""Tensor whose rows say where two runs of one model part."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, as tables; the first run is the one that the others are compared with."""

    runs: pandas.DataFrame
    """One row a run, kind of task and measure: value, low, high, n, n_failed, unit."""
    differences: pandas.DataFrame
    """One row a run and measure: base, value, difference, low, high, n, p, p_corrected, clear, left_out, unit, and where
    it was taken."""
    flips: pandas.DataFrame
    """One row a task that turned right or wrong: both choices with their probabilities."""
    layers: pandas.DataFrame
    """One row a run, measure and layer, where the models have the same layers: base, value, difference, low, high, n."""
    strata: pandas.DataFrame
    """With `by`: one row a run, kind and label, with its difference from the first label; else empty."""
    notes: tuple[str, ...]
    """What a reader must know before the numbers."""

    def clear(self) -> pandas.DataFrame:
        """The differences that chance does not explain (p_corrected ≤ .05), the clearest first."""
        if self.differences.empty:
            return self.differences
        rows: Any = self.differences[self.differences["clear"]]
        return rows.sort_values(["p_corrected", "p"], kind="stable")

    def document(self) -> dict[str, Any]:
        """All of it as JSON values; absent is null."""
        tables = ("runs", "differences", "flips", "layers", "strata")
        return {name: _records(getattr(self, name)) for name in tables} | {"notes": list(self.notes)}

    def _repr_html_(self) -> str:
        from probe.analyzers.comparison_html import comparison_html

        return comparison_html(self.document(), _records(self.clear()))

    def write(self, path: Path) -> None:
        """The differences as a .parquet, .jsonl or .csv file. Raises UsageError for another name, and DiskError."""
        import pyarrow as pa

        from probe.runs.export import FORMATS, encode, file_format, write_file

        format = file_format(path, FORMATS)
        write_file(path, encode(pa.Table.from_pylist(_records(self.differences)), format))


def compare(runs: Sequence[Run], by: str | None = None) -> Comparison:
    """Put runs of the same tasks side by side; one run alone only with `by`.

    `by` is `variant` (of prompting tasks, paired by task) or `metadata.KEY` (a stratum a value). Raises UsageError for
    runs that share no task or have no measures, for more than MOST_RUNS, and for a `by` that no task has.
    """
    import pandas as pd

    if not runs or (len(runs) < 2 and by is None):
        raise UsageError("give two runs or more, or one with --by")
    if len(runs) > MOST_RUNS:
        raise UsageError(f"at most {MOST_RUNS} runs are compared: {len(runs)} are given")
    labels = labels_of(runs)
    records = [{task.id: task.typed(struct_of(task.record)) for task in run} for run in runs]
    base = records[0]
    notes: list[str] = []
    differences, flips, layers = [], [], []
    first = _by_place(runs[0], base) if len(runs) > 1 else None
    for label, run, those in zip(labels[1:], runs[1:], records[1:], strict=True):
        assert first is not None
        notes += [f"{label}: {note}" for note in _notes(runs[0], run, base, those)]
        second = _by_place(run, those)
        alike = geometry(runs[0]) == geometry(run)
        paired = _pairs(first, second, alike)
        notes += [f"{label}: {note}" for note in _unpaired(first, second, paired)]
        if not set(base) & set(those):
            raise UsageError(f"{runs[0].path} and {run.path} have no task in common")
        differences += [{"run": label} | row for row in _differences(paired)]
        flips += [{"run": label} | row for row in _flips(base, those)]
        if alike:
            layers += [{"run": label} | row for row in _layers(paired)]
            layers += [{"run": label} | row for row in _states(runs[0], run, base, those)]
    strata = (
        [
            {"run": label} | row
            for label, of_run in zip(labels, records, strict=True)
            for row in _strata(of_run, by)
        ]
        if by
        else []
    )
    if by and not strata:
        raise UsageError(f"no task has {by!r}: give variant (of prompting tasks) or metadata.KEY")
    frame = pd.DataFrame(differences)
    if len(frame):
        frame["p_corrected"] = frame.groupby("run")["p"].transform(_corrected)
        frame["clear"] = frame["p_corrected"] <= CHANCE
    board = [
        row for label, run, of in zip(labels, runs, records, strict=True) for row in _board(label, run, of)
    ]
    return Comparison(
        pd.DataFrame(board),
        frame,
        pd.DataFrame(flips),
        pd.DataFrame(layers),
        pd.DataFrame(strata),
        tuple(notes),
    )


def labels_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its directory's, its whole path where two have one name, numbered where one is given again."""
    names = [run.path.name for run in runs]
    paths = [str(run.path) for run in runs]
    return [
        (name if names.count(name) == 1 else path)
        + (f" ({paths[: at + 1].count(path)})" if path in paths[:at] else "")
        for at, (name, path) in enumerate(zip(names, paths, strict=True))
    ]


def geometry(run: Run) -> tuple[Any, ...]:
    """Layers, heads and width of a run's model."""
    model = run.run.get("model") or {}
    return tuple(model.get(key) for key in ("n_layers", "n_heads", "d_model"))


def _corrected(p: pandas.Series) -> np.ndarray:
    import scipy.stats

    return scipy.stats.false_discovery_control(p.to_numpy())


def _notes(base: Run, run: Run, first: dict[str, TaskRecord], second: dict[str, TaskRecord]) -> Iterator[str]:
    if geometry(base) != geometry(run):
        yield "another model: measures are averaged over its layers and heads before they are compared, and no layer is"
    elif _weights(base) is not None and _weights(base) == _weights(run):
        yield "the same weights"
    edits = [edits_text(opened.run) for opened in (base, run)]
    if edits[0] != edits[1]:
        yield f"edits {edits[1] or 'none'}, against {edits[0] or 'none'}"
    systems = [(opened.run.get("options") or {}).get("system") for opened in (base, run)]
    if systems[0] != systems[1]:
        yield "another system message"
    files = [(opened.run.get("task_file") or {}).get("sha256") for opened in (base, run)]
    if files[0] != files[1]:
        yield "another task file: tasks of the same id are compared"
    shared = first.keys() & second.keys()
    failed = sorted(
        task for task in shared if first[task].error is not None or second[task].error is not None
    )
    if failed:
        yield f"{len(failed)} tasks failed in one of the runs and are left out: {_listed(failed)}"
    for name, ids in (("the first run", first.keys() - shared), ("this run", second.keys() - shared)):
        if ids:
            yield f"{len(ids)} tasks are in {name} alone and are left out: {_listed(sorted(ids))}"


def _weights(run: Run) -> str | None:
    return (run.run.get("model") or {}).get("weights_hash")


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")


# -- the board of runs ---------------------------------------------------------------------------------------------


def _p_right(record: TaskRecord) -> float | None:
    """P of the right candidates of a decision."""
    if isinstance(record, ToolRecord):
        return sum(
            entry.probability for entry in record.decision.tool_probabilities if entry.tool in record.right
        )
    return None


def _entropy(record: TaskRecord) -> float | None:
    """Of P(tool | context)."""
    if isinstance(record, ToolRecord):
        p = np.array([entry.probability for entry in record.decision.tool_probabilities])
        return entropy(np.log(np.maximum(p, np.finfo(float).tiny)))
    return None


def _n_tokens(record: TaskRecord) -> float | None:
    if isinstance(record, ToolRecord | CotRecord | AgentRecord):
        return float(record.passage.n_prompt + record.passage.n_new)
    if isinstance(record, PromptingRecord):
        return float(sum(passage.n_prompt + passage.n_new for passage in record.passages.values()))
    return None


_BOARD: dict[str, tuple[str, Callable[[TaskRecord], float | None]]] = {
    "score": ("mean score", lambda record: record.score),
    "p_right": ("probability", _p_right),
    "entropy": ("nats", _entropy),
    "call_right": (
        "share of tasks",
        lambda record: (
            float(record.calls_right)
            if isinstance(record, ToolRecord) and record.calls_right is not None
            else None
        ),
    ),
    "tokens": ("tokens a task", _n_tokens),
    "seconds": ("seconds a task", lambda record: record.seconds),
}
"""Columns of the board: unit, and the number of a task, None where its kind has none."""
_SHARES = ("score", "p_right", "call_right")
"""Those that lie between 0 and 1."""


def _board(label: str, run: Run, records: dict[str, TaskRecord]) -> Iterator[dict[str, Any]]:
    model = (run.run.get("model") or {}).get("name")
    for kind in dict.fromkeys(record.kind for record in records.values()):
        of_kind = [record for record in records.values() if record.kind == kind]
        ended = [record for record in of_kind if record.error is None]
        for name, (unit, value) in _BOARD.items():
            values = [number for record in ended if (number := value(record)) is not None]
            if values:
                interval = share_interval(values) if name in _SHARES else mean_interval(values)
                low, high = interval or (None, None)
                yield {
                    "run": label, "model": model, "kind": kind, "measure": name, "value": float(np.mean(values)),
                    "low": low, "high": high, "n": len(values), "n_failed": len(of_kind) - len(ended), "unit": unit,
                }  # fmt: skip


# -- measures ------------------------------------------------------------------------------------------------------


def _by_place(run: Run, records: dict[str, TaskRecord]) -> Any:
    """The measures of a run's tasks and their scores, one row a place."""
    import pandas as pd

    if not run.has_measures:
        raise UsageError(f"{run.path} has no measures: `probe analyze {run.path}` makes them")
    table = run.measures(arrow=True).to_pandas()
    table = table[table["task_id"] != WHOLE_RUN]
    table = table[np.isfinite(table["value"])][[*_PLACE, "unit", "value"]]
    scores = [
        {"task_id": id, "analyzer": record.kind, "name": "score", "unit": "score", "value": record.score}
        for id, record in records.items()
        if record.error is None and record.score is not None
    ]
    if scores:
        table = pd.concat([table, pd.DataFrame(scores).reindex(columns=table.columns)], ignore_index=True)
    for axis, (kind, _) in AXES.items():
        if kind == "string":
            table[axis] = table[axis].astype(object).where(table[axis].notna(), None)
        else:
            table[axis] = table[axis].astype("Int64" if kind == "int32" else "Float64")
    right = {
        id: record.right for id, record in records.items() if isinstance(record, ToolRecord | AgentRecord)
    }
    table["tools"] = [
        None if tool is None else RIGHT if tool in right.get(task, ()) else OTHERS
        for task, tool in zip(table["task_id"], table["tool"], strict=True)
    ]
    return table


def _pairs(first: Any, second: Any, alike: bool) -> Any:
    """Rows of the same place in both, `value_base` and `value`; with `left_out`, what has no partner."""
    on = [*_PLACE, "tools", "unit"]
    tables = [first, second]
    if not alike:
        on = [column for column in on if column not in _GEOMETRY]
        tables = [table.groupby(on, dropna=False)["value"].mean().reset_index() for table in tables]
    pairs = tables[0].merge(tables[1], on=on, suffixes=("_base", ""))
    sizes = [table.groupby(["analyzer", "name"]).size() for table in (*tables, pairs)]
    left = sizes[0].add(sizes[1], fill_value=0).sub(2 * sizes[2], fill_value=0).astype(int).to_dict()
    pairs["left_out"] = [left[key] for key in zip(pairs["analyzer"], pairs["name"], strict=True)]
    return pairs


def _unpaired(first: Any, second: Any, pairs: Any) -> Iterator[str]:
    """Measures that no task has at one place in both runs."""
    names = [set(zip(table["analyzer"], table["name"], strict=True)) for table in (first, second, pairs)]
    for where, only in (("the first run", names[0]), ("this run", names[1])):
        if alone := sorted(f"{analyzer} {name}" for analyzer, name in only - names[2]):
            yield f"{len(alone)} measures of {where} have no partner in the other and are left out: {_listed(alone)}"


def _differences(pairs: Any) -> Iterator[dict[str, Any]]:
    by_task = pairs.groupby([*_GROUP, "task_id"], dropna=False, sort=True)
    frame = by_task.agg({"value_base": "mean", "value": "mean", "left_out": "first"}).reset_index()
    for key, rows in frame.groupby(_GROUP, dropna=False, sort=True):
        first, second = rows["value_base"].to_numpy(), rows["value"].to_numpy()
        yield (
            _named(dict(zip(_GROUP, cast("tuple[Any, ...]", key), strict=True)))
            | _difference(first, second)
            | {"p": difference_p(first, second), "left_out": int(rows["left_out"].iloc[0])}
        )


def _named(parts: dict[str, Any]) -> dict[str, Any]:
    """Which number a group of rows is, from the group's columns."""
    import pandas as pd

    at = [f"{axis} {parts[axis]}" for axis in _LABELS if not pd.isna(parts[axis])]
    tools = parts["tools"] if isinstance(parts["tools"], str) else None
    named = {name: parts[name] for name in ("analyzer", "name", "unit")}
    return named | {"at": " ".join(at) or None, "tools": tools}


def _difference(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    low, high = difference_interval(first, second) or (None, None)
    before, after = float(first.mean()), float(second.mean())
    return {
        "base": before,
        "value": after,
        "difference": after - before,
        "low": low,
        "high": high,
        "n": len(first),
    }


# -- tasks ---------------------------------------------------------------------------------------------------------


def _flips(first: dict[str, TaskRecord], second: dict[str, TaskRecord]) -> Iterator[dict[str, Any]]:
    """Tasks with a score of 1 in one run and another in the other."""
    for task, before in first.items():
        after = second.get(task)
        if after is None or before.score is None or after.score is None:
            continue
        if (before.score == 1) == (after.score == 1):
            continue
        yield {
            "task_id": task,
            "kind": before.kind,
            "turned": "right" if after.score == 1 else "wrong",
            "base_choice": _choice(before),
            "base_probability": _probability(before),
            "choice": _choice(after),
            "probability": _probability(after),
        }


def _choice(record: TaskRecord) -> str | None:
    """What was chosen or answered."""
    if isinstance(record, ToolRecord):
        return record.decision.chosen or NO_TOOL
    if isinstance(record, AgentRecord):
        called = [turn.called for turn in record.turns if turn.called]
        return " → ".join([*called, *([record.answer.strip()] if record.answer else [])])
    if isinstance(record, CotRecord):
        return record.answer
    if isinstance(record, PromptingRecord):
        return ", ".join(
            f"{name}: {passage.chosen}" for name, passage in record.passages.items() if passage.chosen
        )
    return None


def _probability(record: TaskRecord) -> float | None:
    """P of the chosen candidate, where candidates were scored."""
    if isinstance(record, ToolRecord):
        return max(entry.probability for entry in record.decision.tool_probabilities)
    return None


# -- inside --------------------------------------------------------------------------------------------------------


def _layers(pairs: Any) -> Iterator[dict[str, Any]]:
    """Differences of the measures that are taken by layer, layer by layer; a task's heads, spans and tools are averaged."""
    rows = pairs[pairs["layer"].notna() & pairs["layer_to"].isna()]
    group = [*_GROUP, "layer"]
    by_task: Any = rows.groupby([*group, "task_id"], dropna=False, sort=True)[["value_base", "value"]]
    for key, of_layer in by_task.mean().reset_index().groupby(group, dropna=False, sort=True):
        parts = dict(zip(group, cast("tuple[Any, ...]", key), strict=True))
        pair = of_layer["value_base"].to_numpy(), of_layer["value"].to_numpy()
        yield _named(parts) | {"layer": int(parts["layer"])} | _difference(*pair)


def _states(
    base: Run, run: Run, first: dict[str, TaskRecord], second: dict[str, TaskRecord]
) -> Iterator[dict[str, Any]]:
    """‖h' − h‖ / ‖h‖ by layer, of the residual stream behind it at the row that emits the first token."""
    distances: dict[int, list[float]] = {}
    for task in first.keys() & second.keys():
        if first[task].error is not None or second[task].error is not None:
            continue
        states = [_first_states(opened[task]) for opened in (base, run)]
        if not states[0] or not states[1]:
            continue
        for layer in states[0].keys() & states[1].keys():
            before, after = states[0][layer], states[1][layer]
            distances.setdefault(layer, []).append(
                float(np.linalg.norm(after - before) / max(np.linalg.norm(before), np.finfo(float).tiny))
            )
    for layer, values in sorted(distances.items()):
        low, high = mean_interval(values) or (None, None)
        yield {
            "analyzer": "states", "name": "state_distance", "at": None, "tools": None, "layer": layer, "base": 0.0,
            "value": float(np.mean(values)), "difference": float(np.mean(values)), "low": low, "high": high,
            "n": len(values), "unit": "of the state's norm",
        }  # fmt: skip


def _first_states(task: TaskRun) -> dict[int, np.ndarray]:
    """Layer → state where the first token is emitted, as float64; empty where none was captured."""
    if STATES not in task or (row := step_row(task, task.passages["main"])) is None:
        return {}
    states = task.slice(STATES)[:, row].double().numpy()
    return dict(zip(task.layers(STATES), states, strict=True))


# -- strata --------------------------------------------------------------------------------------------------------


def _strata(records: dict[str, TaskRecord], by: str) -> Iterator[dict[str, Any]]:
    """Scores by label of `by`; the difference is that from the first label, paired by task where the tasks are the same."""
    for kind in dict.fromkeys(record.kind for record in records.values()):
        scores: dict[str, dict[str, float]] = {}
        for task, record in records.items():
            if record.kind == kind and record.error is None:
                for label, score in _labelled(record, by):
                    scores.setdefault(label, {})[task] = score
        for label, of_label in scores.items():
            values = list(of_label.values())
            low, high = share_interval(values) or (None, None)
            row = {
                "kind": kind,
                "label": label,
                "score": float(np.mean(values)),
                "low": low,
                "high": high,
                "n": len(values),
            }
            yield row | _against(next(iter(scores.values())), of_label)


def _labelled(record: TaskRecord, by: str) -> list[tuple[str, float]]:
    if by == "variant":
        if not isinstance(record, PromptingRecord):
            return []
        return [(name, p.score) for name, p in record.passages.items() if p.score is not None]
    place, _, key = by.partition(".")
    value = (record.metadata or {}).get(key) if place == "metadata" else None
    return [] if value is None or record.score is None else [(str(value), record.score)]


def _against(first: dict[str, float], second: dict[str, float]) -> dict[str, Any]:
    """The difference of a stratum from the first one."""
    nothing = dict.fromkeys(("difference", "difference_low", "difference_high", "p"))
    if second is first:
        return nothing | {"paired": None}
    shared = [task for task in first if task in second]
    if shared:
        before, after = np.array([[scores[task] for task in shared] for scores in (first, second)])
        interval, p, paired = difference_interval(before, after), difference_p(before, after), len(shared)
        gap = float(after.mean() - before.mean())
    else:
        before, after = np.array(list(first.values())), np.array(list(second.values()))
        gap, p, paired = float(after.mean() - before.mean()), None, 0
        if is_right_or_wrong(before, after):
            interval = share_difference(float(after.mean()), len(after), float(before.mean()), len(before))
        else:
            interval = welch_interval((after, np.ones(len(after))), (before, np.ones(len(before))))
    low, high = interval or (None, None)
    return {"difference": gap, "difference_low": low, "difference_high": high, "p": p, "paired": paired}


def _records(frame: Any) -> list[dict[str, Any]]:
    return [
        {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in row.items()}
        for row in frame.to_dict("records")
    ]
