"""A run as a folder that `datasets.load_from_disk` opens: a row a task, or a row a token with its state, shuffled over all tasks.

The folder has files in Arrow's stream format, `dataset_info.json` and, written last, `state.json`.
Source: huggingface/datasets, arrow_dataset.py, save_to_disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from probe.errors import UsageError
from probe.runs.bulk import TensorChoice, as_array, fill, small, task_array
from probe.runs.files import FileFault, disk_errors, encode_json, opened, sync_directory, write_new
from probe.runs.frames import metadata_of, task_table
from probe.runs.tensors import TensorInfo
from probe.runs.write import prepare

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

SHARD_ROWS = 100_000
"""Rows of a file of tokens."""
TASK_BLOCK = 1_000
"""Tasks whose rows are made together."""


def write_tasks(run: Any, output: Path, choice: TensorChoice | None) -> list[Path]:
    """A row a task: the columns of `run.tasks()`, and with a choice the tensor of each task that has it, in a column of its name.

    A key of the metadata whose values are not all of one type of texts, numbers and truth values, or null, has them as JSON.
    Raises UsageError (`output` is not new or empty, or no task has the tensor), ArtifactCorrupt and DiskError.
    """
    taken = None if choice is None else task_array(run, choice)
    metadata = _metadata_types(run)

    def tables() -> Iterator[pyarrow.Table]:
        block: list[Any] = []
        start = 0
        place = {} if taken is None else {task_id: number for number, task_id in enumerate(taken.ids)}
        for task in run:
            if taken is None or task.id in place:
                block.append(task)
            if len(block) == TASK_BLOCK:
                yield with_states(block, start)
                block, start = [], start + TASK_BLOCK
        if block or not start:
            yield with_states(block, start)

    def with_states(block: list[Any], start: int) -> pyarrow.Table:
        table = task_table(block)
        for key, kind in metadata.items():
            table = table.append_column(f"metadata.{key}", _metadata_column(block, key, kind))
        if taken is None or choice is None:
            return table
        return table.append_column(choice.name, nested(taken.values[start : start + len(block)]))

    return _write(output, [tables])


def _metadata_types(run: Any) -> dict[str, str | None]:
    """Key of the tasks' metadata → `bool`, `int`, `float` or `str`, the type of all its values; None where they have none."""
    kinds: dict[str, set[str]] = {}
    inexact: set[str] = set()  # keys with an integer that a float64 may not hold
    for task in run:
        for key, value in metadata_of(task).items():
            kinds.setdefault(key, set())
            if value is not None:
                fits = not isinstance(value, int) or abs(value) < 1 << 63
                if isinstance(value, int) and abs(value) > 1 << 53:
                    inexact.add(key)
                kinds[key].add(type(value).__name__ if fits else "")
    types: dict[str, str | None] = {}
    for key, names in kinds.items():
        if names == {"int", "float"} and key not in inexact:
            names = {"float"}
        types[key] = (
            next(iter(names)) if len(names) == 1 and names <= {"bool", "int", "float", "str"} else None
        )
    return types


def _metadata_column(tasks: list[Any], key: str, kind: str | None) -> pyarrow.Array:
    import pyarrow as pa

    types = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}
    values = [metadata_of(task).get(key) for task in tasks]
    if kind is None:
        values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.array(values, types[kind or "str"])


def write_tokens(
    run: Any,
    output: Path,
    layer: int,
    *,
    site: str = "resid_post",
    seed: int = 0,
    shard_rows: int = SHARD_ROWS,
    told: Callable[[int], None] | None = None,
) -> list[Path]:
    """A row a captured position: task, passage, position, token_id and the state there, [d_model], float32.

    The rows of all tasks are drawn into one order by `seed`, and cut into files of `shard_rows`: each file is of tasks from the whole run.
    What training a sparse autoencoder takes. Checksums are not compared: `probe verify` does. Raises as `write_tasks`.
    """
    import numpy as np

    stretches = list(_stretches(run, layer, site))
    if not stretches:
        raise UsageError(
            f"{run.path}: no task has {site} at layer {layer}: `probe run --capture` says what is kept"
        )
    if len({(entry.info.shape[2:], entry.info.dtype) for entry in stretches}) > 1:
        raise UsageError(f"{run.path}: {site} differs in size or dtype from task to task")
    ends = np.cumsum([len(entry.positions) for entry in stretches])
    order = np.random.default_rng(seed).permutation(int(ends[-1]))

    def shard(chosen: np.ndarray) -> Callable[[], Iterator[pyarrow.Table]]:
        def tables() -> Iterator[pyarrow.Table]:
            yield _token_table(stretches, ends, chosen, site)
            if told:
                told(len(chosen))

        return tables

    return _write(output, [shard(order[at : at + shard_rows]) for at in range(0, len(order), shard_rows)])


class _StateRows(NamedTuple):
    """The states of one passage at one layer: [row, d_model] in one piece of a file."""

    task: str
    passage: str
    path: Path
    offset: int
    info: TensorInfo
    positions: list[int]
    token_ids: list[int]


def _stretches(run: Any, layer: int, site: str) -> Iterator[_StateRows]:
    for task in run:
        header = task.source.unchecked_header
        for name in header.tensors:
            if name.rpartition("/")[2] != site:
                continue
            axes = header.axes[name]
            if axes != ("layer", "row", "d_model"):
                raise UsageError(
                    f"{site} has the axes {', '.join(axes)}: a row a token is made of layer, row, d_model"
                )
            prefix = name.removesuffix(site)
            passage = prefix.rstrip("/") or "main"
            where = task.source.place(name)
            layers = task.listed_layers(passage, axes, where.info.shape[axes.index("layer")])
            if layer not in layers:
                continue
            step = where.info.n_bytes // max(where.info.shape[0], 1)
            rows, token_ids = small(task, f"{prefix}rows"), small(task, f"{prefix}token_ids")
            yield _StateRows(
                task.id,
                passage,
                where.path,
                where.offset + layers.index(layer) * step,
                where.info,
                rows,
                [token_ids[row] for row in rows],
            )


def _token_table(
    stretches: list[_StateRows], ends: np.ndarray, chosen: np.ndarray, site: str
) -> pyarrow.Table:
    import numpy as np
    import pyarrow as pa

    which = np.searchsorted(ends, chosen, "right")
    rows = chosen - np.concatenate([[0], ends])[which]
    first = stretches[0].info
    size = first.shape[2] * first.item_bytes
    data = bytearray(len(chosen) * size)
    view = memoryview(data)
    in_files = np.lexsort((rows, which))  # each file is opened once
    at = 0
    while at < len(in_files):
        path = stretches[which[in_files[at]]].path
        with opened(path) as (descriptor, length):
            while at < len(in_files) and (entry := stretches[which[in_files[at]]]).path == path:
                number = int(in_files[at])
                offset = entry.offset + int(rows[number]) * size
                if offset + size > length:
                    raise FileFault(path, "truncated", f"{length} bytes")
                fill(descriptor, view[number * size : (number + 1) * size], offset, path)
                at += 1
    values = as_array(data, first, (len(chosen), first.shape[2]))
    of = [stretches[number] for number in which]
    columns = {
        "task": pa.array([entry.task for entry in of], pa.string()),
        "passage": pa.array([entry.passage for entry in of], pa.string()),
        "position": pa.array([e.positions[row] for e, row in zip(of, rows, strict=True)], pa.int32()),
        "token_id": pa.array([e.token_ids[row] for e, row in zip(of, rows, strict=True)], pa.int64()),
        site: nested(values),
    }
    return pa.table(columns)


def nested(values: np.ndarray) -> pyarrow.Array:
    """An array [row, …] as a column of lists of fixed sizes."""
    import pyarrow as pa

    column = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def _write(output: Path, shards: list[Callable[[], Iterable[pyarrow.Table]]]) -> list[Path]:
    """Write a folder of a data set; without state.json, which comes last, nothing takes it for one."""
    import pyarrow as pa

    prepare(output)
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        paths: list[Path] = []
        for number, shard in enumerate(shards):
            path = output / f"data-{number:05}-of-{len(shards):05}.arrow"
            with pa.OSFile(str(path), "wb") as sink:
                writer: Any = None
                for table in shard():
                    writer = writer or pa.ipc.new_stream(sink, table.schema)
                    writer.write_table(table)
                writer.close()
            with opened(path) as (descriptor, _):
                os.fsync(descriptor)
            paths.append(path)
        state = {
            "_data_files": [{"filename": path.name} for path in paths],
            "_fingerprint": os.urandom(8).hex(),
            **{
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
            },
            "_split": None,
        }
        for name, content in (("dataset_info.json", {}), ("state.json", state)):
            write_new(output / name, [encode_json(content)])
            paths.append(output / name)
        sync_directory(output)
    return paths
