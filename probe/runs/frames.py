"""A run in bulk, as data frames with a row a task: what was asked and chosen, measures side by side, states of a layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from probe.errors import UsageError
from probe.runs.bulk import DECISION, TaskArray, TensorChoice, task_array
from probe.runs.files import RECORD, FileFault
from probe.runs.tables import AXES
from probe.runs.task import TaskRun

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingTypeStubs]
    import pyarrow

TASK_FIELDS = {
    "id": "string",
    "kind": "string",
    "status": "string",
    "score": "float64",
    "target": "string",
    "chosen": "string",
    "chosen_tool": "string",
    "n_prompt": "int64",
    "n_new": "int64",
    "seconds": "float64",
    "completion": "string",
    "finish_reason": "string",
}
"""Columns of the task table. A list of acceptable targets is JSON; what a record does not have is null."""


class Frames:
    """The part of a run that gives data frames."""

    path: Path

    def __iter__(self) -> Iterator[TaskRun]:
        raise NotImplementedError

    def measures(self, arrow: Any = False) -> Any:
        raise NotImplementedError

    def tasks(self) -> pandas.DataFrame:
        """One row a task, by id: the columns of TASK_FIELDS, and `metadata.KEY` for each key of the tasks' metadata."""
        import pandas as pd  # pyright: ignore[reportMissingTypeStubs]

        tasks = list(self)
        frame = task_table(tasks).to_pandas(types_mapper={_int64(): pd.Int64Dtype()}.get).set_index("id")
        metadata = [metadata_of(task) for task in tasks]
        keys = dict.fromkeys(key for entry in metadata for key in entry)
        more = {f"metadata.{key}": [entry.get(key) for entry in metadata] for key in keys}
        return cast("Any", frame).join(pd.DataFrame(more, index=frame.index))

    def wide(self, *names: str) -> pandas.DataFrame:
        """Measures with one row a task, by id, and one column a number: `NAME`, and where one measure has several numbers of a
        task, `NAME axis=label …`; what a task does not have is NaN.

        Names are MEASURE or ANALYZER.MEASURE; without any, all that have one number a task. `run.measures()` has the same one
        number a row. Raises UsageError for a name of which the run has no row, RunDirectoryError where it was not analyzed.
        """
        import pandas as pd  # pyright: ignore[reportMissingTypeStubs]

        rows: Any = self.measures()
        rows = rows[rows["task_id"] != ""]
        full = rows["analyzer"] + "." + rows["name"]
        for name in names:
            if not ((rows["name"] == name) | (full == name)).any():
                near = get_close_matches(name, [*rows["name"].unique(), *full.unique()], n=1)
                hint = f"did you mean {near[0]}?" if near else f"`probe analyze {self.path}` measures more"
                raise UsageError(f"{self.path}: no task has a measure {name!r}: {hint}")
        if names:
            rows = rows[rows["name"].isin(names) | full.isin(names)]
        else:
            several = rows.duplicated(["analyzer", "name", "task_id"])
            rows = rows[~full.isin(full[several])]
        shared = rows.groupby("name")["analyzer"].transform("nunique") > 1
        column = rows["name"].where(~shared, rows["analyzer"] + "." + rows["name"])
        for axis in AXES:
            # An axis that is the same in all rows of a measure tells nothing apart.
            varies = rows.groupby(["analyzer", "name"])[axis].transform(lambda v: v.nunique(dropna=False)) > 1
            told = rows[axis].notna() & varies
            column = column.where(~told, column + f" {axis}=" + rows[axis].astype(str))
        keyed = rows.assign(column=column)
        frame = keyed.pivot(index="task_id", columns="column", values="value")
        order = [task.id for task in self if task.id in frame.index]
        return frame.reindex(index=order, columns=pd.unique(column)).rename_axis(index="id", columns=None)

    def states(
        self,
        layer: int,
        *,
        step: int = 0,
        span: str | None = None,
        site: str = "resid_post",
        passage: str | None = None,
    ) -> pandas.DataFrame:
        """A state of every task at a layer, [task, d_model], float32, by id: `.to_numpy()` is the one array.

        It is that of the position which emits token `step` of the completion (0: the last of the prompt; negative: from the
        end), or with `span` (`user`, `tool:NAME`, …) the mean over that span. `passage` is a variant of prompting tasks
        (default: base). Tasks that failed, or that do not have it, have no row. Raises UsageError where no task has it.
        """
        import pandas as pd  # pyright: ignore[reportMissingTypeStubs]

        name = site if span is None else "resid_span_mean"
        choice = TensorChoice(name, layer, step if span is None else None, span, passage, checked=True)
        taken = task_array(self, choice)
        if len(taken.axes) != 2:
            raise UsageError(
                f"{site} has the axes {', '.join(taken.axes[1:])} beside a layer's row, and no state a row of a layer: read it with run.tensor"
            )
        return pd.DataFrame(taken.values, index=pd.Index(taken.ids, name="id"))

    def tensor(
        self,
        name: str,
        *,
        layer: int | None = None,
        row: int | str | None = DECISION,
        span: str | None = None,
        passage: str | None = None,
        checked: bool = False,
    ) -> TaskArray:
        """A tensor of all tasks as one array: `values` [task, …], `ids` and, read when asked for, `labels`.

        `layer` None keeps all that were captured. `row` is `decision` (the first), a number as `step` of `states`, or None for all;
        of `logits` and `log_probs` a number is the decision or step. `span` takes the column of that label. `passage` is a variant
        of prompting tasks (default: base). No more of the files is read than the array takes, so checksums are compared only
        where `checked`; `probe verify` compares all. Tasks that do not have it have no row. Raises UsageError where no task has it, and
        where what is left differs in shape from task to task.
        """
        return task_array(self, TensorChoice(name, layer, row, span, passage, checked))


def _int64() -> Any:
    import pyarrow as pa

    return pa.int64()


def metadata_of(task: TaskRun) -> dict[str, Any]:
    """What a task file gave a task as `metadata`; empty where it gave none."""
    metadata = task.record.get("metadata")
    return cast("dict[str, Any]", metadata) if isinstance(metadata, dict) else {}


def task_table(tasks: Sequence[TaskRun]) -> pyarrow.Table:
    """One flat row a task, columns as TASK_FIELDS; of a `prompting` task that of its `base` variant. Raises ArtifactCorrupt."""
    import pyarrow as pa

    kinds = {"string": pa.string(), "float64": pa.float64(), "int64": pa.int64()}
    schema = pa.schema([pa.field(name, kinds[kind]) for name, kind in TASK_FIELDS.items()])
    return pa.Table.from_pylist([_task_row(task) for task in tasks], schema=schema)


def _task_row(task: TaskRun) -> dict[str, Any]:
    record = task.record
    passages = record.get("passages")
    from probe.prompts.labels import BASE

    base = passages.get(BASE) if isinstance(passages, dict) else None
    source = (base if isinstance(base, dict) else {}) | record
    row = {name: source.get(name) for name in TASK_FIELDS}
    for name, kind in TASK_FIELDS.items():
        value = row[name]
        if value is None:
            continue
        if kind == "string":
            row[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        elif not isinstance(value, (int, float)):
            raise FileFault(task.path / RECORD, "altered", f"{name} is {value!r}, not a number")
    return row
