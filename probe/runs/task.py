"""One task of a run as it is read: its record, and its tensors when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from probe.errors import UsageError
from probe.runs.files import TENSORS, FileFault
from probe.runs.folder import TaskFolder
from probe.runs.html import task_html
from probe.runs.packed import PackedTask
from probe.runs.records import Passage, PassageRecord, PassagesRecord, T, TaskRecord, decode
from probe.runs.tensors import Header

if TYPE_CHECKING:
    import torch


class NotInRun(UsageError, KeyError):
    """No such task in the run, or no such tensor in the task; the message names what is there."""

    __str__ = Exception.__str__  # KeyError would print the quoted repr


class TaskRun:
    """One committed task of a run: its record and, lazily, its tensors."""

    def __init__(self, task_id: str, source: TaskFolder | PackedTask):
        self.id = task_id
        self.path = source.path
        """The folder of the task, or of the pack that it lies in."""
        self.source = source
        self._typed: dict[type[TaskRecord], Any] = {}

    def __repr__(self) -> str:
        return f"TaskRun({self.id!r})"

    @cached_property
    def record(self) -> dict[str, Any]:
        """The record, compared with its checksum."""
        return self.source.record()

    def typed(self, struct: type[T]) -> T:
        """The record as a struct of `probe.runs.records`. Raises ArtifactCorrupt when it is none."""
        if struct not in self._typed:
            self._typed[struct] = decode(self.record, struct, self.path)
        return self._typed[struct]

    def _repr_html_(self) -> str:
        return task_html(self)

    @property
    def passages(self) -> dict[str, Passage]:
        """Passages of the record by name, `main` where there is one; none of a task that could not be run."""
        if "error" in self.record:
            return {}
        if "passages" in self.record:
            return dict(self.typed(PassagesRecord).passages)
        return {"main": self.typed(PassageRecord).passage}

    @property
    def _header(self) -> Header:
        return self.source.header

    def keys(self) -> list[str]:
        """Names of the tensors that were captured, sorted; for `prompting` as VARIANT/NAME."""
        return sorted(self._header.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._header.tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor, read now, with the dtype it was saved in. Raises NotInRun when it was not captured."""
        self._require(name)
        return self.source.tensor(name)

    def slice(self, name: str) -> Any:
        """The safetensors slice of one tensor: index it (`task.slice("keys")[layer]`) to read a part."""
        self._require(name)
        return self.source.slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header alone."""
        self._require(name)
        return self._header.tensors[name].shape

    def dtype(self, name: str) -> str:
        """Dtype of one tensor as safetensors spells it (F32, BF16, I64, …), from the header alone."""
        self._require(name)
        return self._header.tensors[name].dtype

    def axes(self, name: str) -> tuple[str, ...]:
        """Name of each axis of one tensor."""
        self._require(name)
        return self._header.axes[name]

    @property
    def metadata(self) -> dict[str, str]:
        """The text metadata of the tensors file; `axes` and what else is structured is JSON."""
        return self._header.metadata

    def layers(self, name: str) -> list[int]:
        """Layer numbers along the first axis of one tensor: those of what attention reads have the layers with attention alone."""
        return self.listed_layers(name.rpartition("/")[0] or "main", self.axes(name), self.shape(name)[0])

    def listed_layers(self, passage: str, axes: tuple[str, ...], count: int) -> list[int]:
        """Layer numbers along an axis of `count` layers of a tensor with these axes; no byte of the tensor is compared."""
        listed = self.listed("layers", passage)
        if not {"head", "kv_head"}.isdisjoint(axes):
            listed = self.listed("attention_layers", passage) or listed
        return listed if listed is not None and len(listed) == count else list(range(count))

    def labels(self, passage: str = "main") -> list[str]:
        """Span label of each column of `attn_to_spans`, `value_to_spans` and `resid_span_mean`."""
        labels = self.listed("labels", passage)
        if labels is None:
            raise NotInRun(
                f"task {self.id!r}: no span labels for the passage {passage!r}: no span site was captured"
            )
        return labels

    def parts(self, passage: str = "main") -> list[tuple[str, str]]:
        """(span label, part) of each column of `attn_to_parts` and `value_to_parts`; empty where there are none."""
        return [(label, part) for label, part in self.listed("parts", passage) or ()]

    def listed(self, key: str, passage: str = "main") -> list[Any] | None:
        """A JSON list of the metadata: under `PASSAGE/key`, or under `key` as a list or as {passage: list}.

        None where there is none. Raises ArtifactCorrupt when it is not JSON.
        """
        text = self.metadata.get(f"{passage}/{key}", self.metadata.get(key))
        if text is None:
            return None
        try:
            value: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FileFault(self.path / TENSORS, "altered", f"metadata {key!r}: {error}") from error
        if isinstance(value, dict):
            value = cast("dict[str, Any]", value).get(passage)
        return cast("list[Any]", value) if isinstance(value, list) else None

    def _require(self, name: str) -> None:
        if name not in self._header.tensors:
            captured = ", ".join(self.keys()) or "no tensor at all"
            raise NotInRun(f"task {self.id!r}: {name!r} was not captured; there is {captured}")
