"""Two runs of the same tasks, before and after fine-tuning: every measure of tool, prompting and cot, task by task.

From measures.parquet and the records alone. Rows are paired where task and all columns that say where they were
taken are the same; a task's pairs are averaged over layers, heads, steps, spans and tools, and the interval resamples
tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from probe.analyzers.rows import WHOLE_RUN, Row
from probe.errors import UsageError
from probe.maths.intervals import mean_interval
from probe.runs import AXES, Run, TaskRun
from probe.runs.read import finished
from probe.runs.records import AgentRecord, TaskRecord, ToolRecord, struct_of

if TYPE_CHECKING:
    import pandas

ANALYZERS = ("tool", "prompting", "cot")
_AVERAGED = ("layer", "layer_to", "head", "step", "span", "tool", "other_tool", "token", "word", "word_index")
"""Axes over which a task's pairs are averaged; what differs elsewhere is another number."""
_LABELS = [axis for axis in AXES if axis not in _AVERAGED]
_PLACE = ["task_id", "analyzer", "name", *AXES]
TARGET, OTHERS = "right tool", "other tools"
_ROLES = {TARGET: "right", OTHERS: "other"}


def compare(base: Run, adapted: Run) -> dict[str, Any]:
    """Paired differences adapted − base, one entry a measure and place (and right or other tools).

    `at` holds the columns that are filled beside those averaged over. Each has the means of both over the paired
    tasks, the difference, its 95 % interval over tasks (None below eight tasks) and n, the tasks. Raises UsageError where nothing can be paired.
    """
    import pandas

    tables = [_table(run) for run in (base, adapted)]
    pairs = tables[0].merge(tables[1], on=[*_PLACE, "unit"], suffixes=("_base", "_adapted"))
    if pairs.empty:
        raise UsageError(
            f"{base.path} and {adapted.path} share no measure of a task: were the same tasks run?"
        )
    targets = {task.id: _right(task) for task in finished(base, "tool_selection", "agent")}
    pairs["tools"] = [
        None if tool is None else TARGET if tool in targets.get(task, ()) else OTHERS
        for task, tool in zip(pairs["task_id"], pairs["tool"], strict=True)
    ]
    group = ["analyzer", "name", *_LABELS, "tools", "unit"]
    by_task = pairs.groupby([*group, "task_id"], dropna=False, sort=True)[
        ["value_base", "value_adapted"]
    ].mean()
    frame = cast("pandas.DataFrame", by_task).reset_index()
    differences = []
    for key, rows in frame.groupby(group, dropna=False, sort=True):
        parts = dict(zip(group, cast("tuple[Any, ...]", key), strict=True))
        at = {axis: _plain(parts[axis]) for axis in _LABELS if not pandas.isna(parts[axis])}
        tools = parts["tools"] if isinstance(parts["tools"], str) else None
        differences.append(
            {name: parts[name] for name in ("analyzer", "name", "unit")}
            | {"at": at, "tools": tools}
            | _difference(rows["value_base"].tolist(), rows["value_adapted"].tolist())
        )
    return {
        "base": _named(base),
        "adapted": _named(adapted),
        "same_task_file": base.run["task_file"]["sha256"] == adapted.run["task_file"]["sha256"],
        "rows_paired": len(pairs),
        "rows_unpaired": [len(table) - len(pairs) for table in tables],
        "measures": differences,
    }


def _table(run: Run) -> pandas.DataFrame:
    import numpy as np
    import pandas as pd

    if not run.has_measures:
        raise UsageError(f"{run.path} has no measures: `probe analyze {run.path}` makes them")
    table = run.measures(arrow=True).to_pandas()
    table = table[(table["task_id"] != WHOLE_RUN) & table["analyzer"].isin(ANALYZERS)]
    table = table[np.isfinite(table["value"])][[*_PLACE, "unit", "value"]]
    scores = [
        {"task_id": task.id, "analyzer": record.kind, "name": "score", "unit": "score", "value": record.score}
        for task in run
        if (record := task.typed(TaskRecord)).score is not None
    ]
    if scores:
        table = pd.concat([table, pd.DataFrame(scores).reindex(columns=table.columns)], ignore_index=True)
    for axis, (kind, _) in AXES.items():
        if kind == "string":
            table[axis] = table[axis].astype(object).where(table[axis].notna(), None)
        else:
            table[axis] = table[axis].astype("Int64" if kind == "int32" else "Float64")
    return table


def _plain(label: Any) -> Any:
    """A label as a value of Python's own."""
    return label.item() if hasattr(label, "item") else label


def _right(task: TaskRun) -> tuple[str | None, ...]:
    record = task.typed(struct_of(task.record))
    return record.right if isinstance(record, ToolRecord | AgentRecord) else ()


def _difference(base: list[float], adapted: list[float]) -> dict[str, Any]:
    differences = [after - before for before, after in zip(base, adapted, strict=True)]
    n = len(differences)
    interval = mean_interval(differences)
    return {
        "base": sum(base) / n,
        "adapted": sum(adapted) / n,
        "difference": sum(differences) / n,
        "low": interval[0] if interval else None,
        "high": interval[1] if interval else None,
        "n": n,
    }


def _named(run: Run) -> dict[str, Any]:
    model = run.run["model"]
    return {"run": str(run.path), "model": model["name"], "weights_hash": model.get("weights_hash")} | (
        {"adapter": model["adapter"]} if "adapter" in model else {}
    )


def measures(comparison: dict[str, Any]) -> list[Row]:
    """The differences as rows with the columns of a run's measures; `role` says which tools: `right`, `other`."""
    return [
        Row(
            task_id=WHOLE_RUN,
            analyzer="lora",
            name=f"{entry['analyzer']}:{entry['name']}_change",
            value=entry["difference"],
            unit=entry["unit"],
            n=entry["n"],
            low=entry["low"],
            high=entry["high"],
            place=entry["at"] | ({"role": _ROLES[entry["tools"]]} if entry["tools"] else {}),
        )
        for entry in comparison["measures"]
    ]


def lines(comparison: dict[str, Any], every: bool) -> list[str]:
    """The comparison as lines: differences whose interval excludes 0, the clearest first, or every one."""
    entries = comparison["measures"]
    clear = [e for e in entries if e["low"] is not None and (e["low"] > 0 or e["high"] < 0)]
    judged = sum(e["low"] is not None for e in entries)
    text = [f"{comparison['base']['model']} → {comparison['adapted']['model']}, adapted − base, task by task"]
    if comparison["base"]["weights_hash"] == comparison["adapted"]["weights_hash"]:
        text.append("note: both runs have the same weights")
    if not comparison["same_task_file"]:
        text.append("note: the task files differ; only tasks of the same id are compared")
    shown = entries if every else sorted(clear, key=_clarity, reverse=True)[:40]
    names = [
        " ".join(
            str(part)
            for part in (e["analyzer"], e["name"], *e["at"].values(), e["tools"])
            if part is not None
        )
        for e in shown
    ]
    width = max(map(len, names), default=0)
    for name, e in zip(names, shown, strict=True):
        interval = f"[{e['low']:+.4g}, {e['high']:+.4g}]" if e["low"] is not None else "no interval"
        values = f"{e['base']:>11.4g} → {e['adapted']:<11.4g} {e['difference']:>+11.4g} {interval}"
        text.append(f"{name:{width}} {values} {e['unit']}, n = {e['n']}")
    text.append(
        f"{len(clear)} of {judged} measures have a 95 % interval without 0; {0.05 * judged:.0f} would by chance alone"
    )
    return text


def _clarity(entry: dict[str, Any]) -> float:
    return abs(entry["difference"]) / (entry["high"] - entry["low"] or float("inf"))
