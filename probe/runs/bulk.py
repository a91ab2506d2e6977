"""One tensor of all tasks of a run as one array: of each file no more is read than the array takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from probe.errors import UsageError
from probe.runs.files import FileFault, opened
from probe.runs.remote import Ranges
from probe.runs.tensors import Header, TensorInfo, tensor_of

if TYPE_CHECKING:
    import numpy as np
    import pandas  # pyright: ignore[reportMissingTypeStubs]

DECISION = "decision"
"""The row of the first position that was decided: the last of the prompt, or where an agent's first call names its tool."""
MOST_READS = 64
"""Pieces of one tensor that are read one by one; of more the stretch that holds them all is read."""


class TensorsLike(Protocol):
    """What is read of a task."""

    id: str

    @property
    def source(self) -> Any: ...
    def listed(self, key: str, passage: str = ...) -> list[Any] | None: ...
    def listed_layers(self, passage: str, axes: tuple[str, ...], count: int) -> list[int]: ...


@dataclass
class TaskArray:
    """A tensor of many tasks."""

    values: np.ndarray
    """[task, …]; floats are float32."""
    ids: list[str]
    """The task of each row of `values`."""
    axes: tuple[str, ...]
    """Names of the axes, `task` first."""
    run: Any

    @cached_property
    def labels(self) -> pandas.DataFrame:
        """A row a row of `values`, by id: the columns of `run.tasks()`. Reads every record."""
        return self.run.tasks().loc[self.ids]


@dataclass(frozen=True)
class TensorChoice:
    """What is taken of each task."""

    name: str
    layer: int | None = None
    row: int | str | None = DECISION
    span: str | None = None
    passage: str | None = None
    checked: bool = False

    def __str__(self) -> str:
        places = {"layer": self.layer, "row": self.row, "span": self.span, "passage": self.passage}
        told = ", ".join(f"{name} {value}" for name, value in places.items() if value is not None)
        return f"{self.name} ({told})" if told else self.name


def task_array(run: Any, choice: TensorChoice) -> TaskArray:
    """The tensor of every task that has it. Raises UsageError where none has, or where the tasks' shapes differ."""
    import numpy as np

    values: np.ndarray | None = None
    ids: list[str] = []
    axes: tuple[str, ...] = ()
    for task in run:
        taken = of_task(task, choice)
        if taken is None:
            continue
        part, axes = taken
        if values is None:
            values = np.empty((len(run), *part.shape), part.dtype)
        if part.shape != values.shape[1:]:
            at = next(
                (name for name, a, b in zip(axes, part.shape, values.shape[1:], strict=False) if a != b),
                "axis",
            )
            raise UsageError(
                f"{run.path}: {choice}: tasks {ids[0]!r} and {task.id!r} have {values.shape[1:]} and {part.shape}: no one array, "
                f"since the number of {at}s differs: take one of them, or read task by task"
            )
        values[len(ids)] = part
        ids.append(task.id)
    if values is None:
        raise UsageError(
            f"{run.path}: no task has {choice}: `probe run --capture` and `--layers` say what is kept, and a task's `keys()` and "
            "`labels()` what it has"
        )
    return TaskArray(values[: len(ids)], ids, ("task", *axes), run)


def of_task(task: Any, choice: TensorChoice) -> tuple[np.ndarray, tuple[str, ...]] | None:
    """The part of one task's tensor, and the names of its axes; None where the task does not have it."""
    header: Header = task.source.header if choice.checked else task.source.unchecked_header
    named = tensor_name(header, choice)
    if named is None:
        return None
    name, passage = named
    axes, info = header.axes[name], header.tensors[name]
    chosen: dict[str, int] = {}
    for axis, asked in (("layer", choice.layer), ("span", choice.span)):
        if asked is not None and axis not in axes:
            raise UsageError(f"{choice}: {choice.name} has the axes {', '.join(axes)} and no {axis}")
    if choice.layer is not None:
        layers = task.listed_layers(passage, axes, info.shape[axes.index("layer")])
        if choice.layer not in layers:
            return None
        chosen["layer"] = layers.index(choice.layer)
    if choice.span is not None:
        labels = task.listed("labels", passage) or []
        if choice.span not in labels:
            return None
        chosen["span"] = labels.index(choice.span)
    if choice.row is not None:
        for axis in {"row", "decision", "step"}.intersection(axes):
            index = _index(task, choice, passage, axis, info.shape[axes.index(axis)])
            if index is None:
                return None
            chosen[axis] = index
    if choice.checked:
        return _checked(task, name, axes, chosen)
    return read_part(task.source.place(name), axes, chosen)


def tensor_name(header: Header, choice: TensorChoice) -> tuple[str, str] | None:
    """Name of the tensor in the file and its passage, `base` where none is asked for; None where there is none."""
    if choice.passage is None and choice.name in header.tensors:
        return choice.name, "main"
    from probe.prompts.labels import BASE

    passages = (choice.passage,) if choice.passage is not None else (BASE, *_passages(header))
    for passage in passages:
        if (name := f"{passage}/{choice.name}") in header.tensors:
            return name, passage
    return None


def _passages(header: Header) -> Iterator[str]:
    return (name.rpartition("/")[0] for name in header.tensors if "/" in name)


def _index(task: Any, choice: TensorChoice, passage: str, axis: str, count: int) -> int | None:
    """The index along rows, decisions or steps; None where the task has none such."""
    prefix = "" if passage == "main" else f"{passage}/"
    if choice.row == DECISION:
        if axis == "decision":
            return 0 if count else None
        if axis == "step":
            raise UsageError(f"{choice.name} has no decisions: give row as a number, 0 for the first token")
        rows, decisions = (small(task, f"{prefix}{name}") for name in ("rows", "decisions"))
        return rows.index(decisions[0]) if decisions and decisions[0] in rows else None
    if not isinstance(choice.row, int):
        raise UsageError(
            f"row {choice.row!r}: give {DECISION!r}, or a number: 0 emits the first token, -1 the last"
        )
    if axis == "row":
        if task.record["status"] not in ("ok", "truncated") or passage not in task.passages:
            return None
        return step_row(task, task.passages[passage], choice.row, prefix)
    index = choice.row if choice.row >= 0 else count + choice.row
    return index if 0 <= index < count else None


def step_row(task: Any, passage: Any, step: int = 0, prefix: str = "") -> int | None:
    """The row of the captured states that emitted token `step` of the completion; None where it was not captured.

    Rows are the emitting positions, or with `--capture SITE:all` every position.
    """
    position = passage.n_prompt - 1 + (step if step >= 0 else passage.n_new + step)
    rows: list[int] = task[f"{prefix}rows"].tolist()
    return rows.index(position) if position in rows and position >= passage.n_prompt - 1 else None


def small(task: Any, name: str) -> list[int]:
    """A tensor of positions, read where it lies."""
    if name not in task.source.unchecked_header.tensors:
        return []
    return read_part(task.source.place(name), ("position",), {})[0].tolist()


def _checked(
    task: Any, name: str, axes: tuple[str, ...], chosen: dict[str, int]
) -> tuple[np.ndarray, tuple[str, ...]]:
    part = task.slice(name)[tuple(chosen.get(axis, slice(None)) for axis in axes)]
    left = tuple(axis for axis in axes if axis not in chosen)
    return (part.float() if part.is_floating_point() else part).numpy(), left


def read_part(
    where: Any, axes: tuple[str, ...], chosen: dict[str, int]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The part of a tensor with these indices, read from its file; floats become float32."""
    import numpy as np

    info: TensorInfo = where.info
    left = tuple(axis for axis in axes if axis not in chosen)
    last = max((number for number, axis in enumerate(axes) if axis in chosen), default=-1)
    before = [
        range(size) if axis not in chosen else range(chosen[axis], chosen[axis] + 1)
        for axis, size in zip(axes[: last + 1], info.shape[: last + 1], strict=True)
    ]
    pieces = int(np.prod([len(part) for part in before], dtype=np.int64))
    if pieces > MOST_READS:  # along the leading axes only, then in memory
        first = next((number for number, axis in enumerate(axes) if axis not in chosen), len(axes))
        whole = read_part(where, axes, {axis: chosen[axis] for axis in axes[:first]})[0]
        index = tuple(chosen.get(axis, slice(None)) for axis in axes[first:])
        return whole[index], left
    inner = info.shape[last + 1 :]
    size = int(np.prod(inner, dtype=np.int64)) * info.item_bytes
    strides = [
        int(np.prod(info.shape[number + 1 :], dtype=np.int64)) * info.item_bytes for number in range(last + 1)
    ]
    data = bytearray(pieces * size)
    view = memoryview(data)
    with opened(where.path) as (descriptor, length):
        for number, indices in enumerate(product(*before)):
            offset = where.offset + sum(i * stride for i, stride in zip(indices, strides, strict=True))
            if offset + size > length:
                raise FileFault(where.path, "truncated", f"{length} bytes")
            fill(descriptor, view[number * size : (number + 1) * size], offset, where.path)
    shape = tuple(size for axis, size in zip(axes, info.shape, strict=True) if axis not in chosen)
    return as_array(data, info, shape), left


def fill(descriptor: Any, view: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer from the bytes at an offset of what was `opened`. Raises a Fault where there are fewer."""
    if isinstance(descriptor, Ranges):
        view[:] = descriptor.range(offset, offset + view.nbytes)
        return
    while view.nbytes:
        count = os.preadv(descriptor, [view], offset)
        if not count:
            raise FileFault(path, "truncated", f"ends before {offset}")
        view, offset = view[count:], offset + count


def as_array(data: bytearray, info: TensorInfo, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes of a tensor as an array; floats become float32, which holds every bfloat16 and float16."""
    import numpy as np

    if info.dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    kinds = {
        "F32": "f4",
        "F64": "f8",
        "F16": "f2",
        "I64": "i8",
        "I32": "i4",
        "I16": "i2",
        "I8": "i1",
        "BOOL": "?",
    }
    if kind := kinds.get(info.dtype):
        array = np.frombuffer(data, np.dtype(kind).newbyteorder("<")).reshape(shape)
        return array.astype(np.float32, copy=False) if kind[0] == "f" else array
    tensor = tensor_of(data, info._replace(shape=shape))
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
