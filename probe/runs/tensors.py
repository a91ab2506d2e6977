"""Tensors of one task in the safetensors format, written piece by piece and read lazily.

The format (huggingface/safetensors, README): 8 bytes little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}`, then the data without gaps. It is written
here rather than by the library because the library makes one more copy of all data, leaves out fsync and
makes the file readable by its owner alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from probe.runs.files import SCHEMA, FileFault, decode_json, opened, printable, read_at
from probe.runs.remote import RangeTensors, RunUrl

if TYPE_CHECKING:
    import torch

_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32",
    "uint32": "U32", "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32",
    "float64": "F64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_HEADER_LIMIT = 100_000_000  # the library refuses longer ones


class Array(NamedTuple):
    """One tensor to save, and the name of each of its axes (docs/contract.md, section 5)."""

    tensor: torch.Tensor
    """Any float, integer or bool dtype, on any device."""
    axes: tuple[str, ...]


class Encoded(NamedTuple):
    """The bytes of one tensors.safetensors, not yet joined."""

    header: bytes
    data: list[torch.Tensor]
    """Tensors on the CPU, contiguous, in file order."""
    size: int
    """Bytes of the file."""

    def chunks(self) -> Iterator[Any]:
        yield self.header
        if self.data:
            import torch

            for tensor in self.data:
                if tensor.numel():
                    # As bytes, because NumPy has no bfloat16.
                    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
                    yield memoryview(array)


def encode(arrays: dict[str, Array], metadata: dict[str, str]) -> Encoded:
    """Lay out a safetensors file; the metadata gets `schema` and `axes` (JSON, name → axis names).

    Raises ValueError when an array's axes do not fit its shape or its dtype cannot be saved.
    """
    moved = {printable(name): _on_cpu(name, array) for name, array in arrays.items()}
    if len(moved) != len(arrays):
        raise ValueError(f"two tensor names look the same once written: {sorted(arrays)}")
    # Widest items first keeps every tensor aligned to its item size.
    order = sorted(moved, key=lambda name: (-moved[name].element_size(), name))
    axes = {printable(name): array.axes for name, array in sorted(arrays.items())}
    infos: dict[str, TensorInfo] = {}
    offset = 0
    for name in order:
        tensor = moved[name]
        offset += tensor.numel() * tensor.element_size()
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        infos[name] = TensorInfo(dtype, tuple(tensor.shape), offset)
    whole = metadata | {"schema": str(SCHEMA), "axes": json.dumps(axes, ensure_ascii=False)}
    header = encode_header(infos, whole)
    return Encoded(header, [moved[name] for name in order], len(header) + offset)


def encode_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file before its data; `tensors` in the order of their bytes. Raises ValueError where too many."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, info in tensors.items():
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, info.end]}
        start = info.end
    text = printable(json.dumps(header, ensure_ascii=False, separators=(",", ":"))).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_LIMIT:
        raise ValueError(
            f"the header of {len(tensors)} tensors takes {len(text)} bytes, over {_HEADER_LIMIT}"
        )
    return len(text).to_bytes(8, "little") + text


def _on_cpu(name: str, array: Array) -> torch.Tensor:
    tensor = array.tensor
    if not name or name == "__metadata__":
        raise ValueError(f"{name!r} cannot name a tensor")
    if len(array.axes) != tensor.ndim:
        raise ValueError(f"{name}: {len(array.axes)} axes {array.axes} for the shape {tuple(tensor.shape)}")
    if str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
        raise ValueError(f"{name}: cannot save the dtype {tensor.dtype}")
    return tensor.detach().cpu().contiguous()


class TensorInfo(NamedTuple):
    """What the header says of one tensor."""

    dtype: str
    """Dtype as safetensors spells it: F32, BF16, I64, …"""
    shape: tuple[int, ...]
    end: int
    """Where its bytes end, from the first byte of data on."""

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype]


class Header(NamedTuple):
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    axes: dict[str, tuple[str, ...]]
    size: int
    """Bytes of the whole file."""
    data_start: int
    """Bytes before the data."""

    def offset(self, name: str) -> int:
        """Where the bytes of a tensor begin in the file."""
        info = self.tensors[name]
        return self.data_start + info.end - info.n_bytes


def read_header(path: Path) -> Header:
    """Names, shapes and metadata of a safetensors file, without torch.

    Raises a Fault when the header is damaged or the file is not exactly as long as the header says: a mapped
    file that is too short would kill the process on the first touch (SIGBUS), so this comes before any map.
    """
    with opened(path) as (descriptor, size):
        start = read_at(descriptor, 8)
        length = int.from_bytes(start, "little")
        _check_length(path, size, length)
        return _header(path, size, length, read_at(descriptor, length))


def header_in(path: Path, size: int, start: bytes) -> Header:
    """The same of a file whose first bytes are at hand. Raises as `read_header`."""
    length = int.from_bytes(start[:8], "little")
    _check_length(path, size, length)
    if len(start) < 8 + length:
        return read_header(path)
    return _header(path, size, length, start[8 : 8 + length])


def _check_length(path: Path, size: int, length: int) -> None:
    if size < 8 or length > min(size - 8, _HEADER_LIMIT):
        raise FileFault(path, "truncated" if length <= _HEADER_LIMIT else "altered", f"{size} bytes")


def _header(path: Path, size: int, length: int, text: bytes) -> Header:
    try:
        entries: Any = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        entries = decode_json(path, text)
    metadata = entries.pop("__metadata__", {})
    try:
        tensors = {name: _info(entry) for name, entry in entries.items()}
        axes = {name: tuple(names) for name, names in json.loads(metadata["axes"]).items()}
        fits = all(isinstance(value, str) for value in metadata.values()) and all(
            len(axes[name]) == len(info.shape) for name, info in tensors.items()
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FileFault(path, "altered", f"header: {type(error).__name__} {error}"[:200]) from error
    if not fits:
        raise FileFault(path, "altered", "header: axes and shapes do not fit")
    expected = 8 + length + max((info.end for info in tensors.values()), default=0)
    if size != expected:
        raise FileFault(
            path, "truncated" if size < expected else "altered", f"{size} bytes instead of {expected}"
        )
    return Header(tensors, metadata, axes, size, 8 + length)


def _info(entry: dict[str, Any]) -> TensorInfo:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise ValueError("offsets and shapes are counts")
    if end - start != math.prod(shape) * _ITEM_BYTES[entry["dtype"]]:
        raise ValueError("offsets and shape do not fit")
    return TensorInfo(entry["dtype"], shape, end)


def tensor_of(data: bytearray, info: TensorInfo) -> torch.Tensor:
    """The tensor in these bytes, which are not copied. Imports torch."""
    import torch

    dtype = torch_dtype(info.dtype)
    if not data:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(info.shape)


class MappedTensor:
    """A tensor in a part of a file, of which an index reads what it takes, as a slice of safetensors does."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index].clone()

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)


def mapped_tensor(path: Path, offset: int, info: TensorInfo) -> MappedTensor:
    """The tensor at an offset of a file whose length was checked. Imports torch."""
    import numpy as np

    if not info.n_bytes:
        return MappedTensor(tensor_of(bytearray(), info))
    import torch

    # Copy on write: torch takes no array that may not be written.
    data: Any = np.memmap(path, np.uint8, "c", offset, (info.n_bytes,))
    dtype = torch_dtype(info.dtype)
    return MappedTensor(torch.from_numpy(data).view(dtype).reshape(info.shape))


def torch_dtype(name: str) -> torch.dtype:
    """A dtype by the name that safetensors has for it. Imports torch."""
    import torch

    return getattr(torch, next(dtype for dtype, spelled in _DTYPES.items() if spelled == name))


def open_tensors(path: Path, header: Header) -> Any:
    """The safetensors reader of a file whose header was read. Imports torch."""
    if isinstance(path, RunUrl):
        return RangeTensors(path, header.tensors, header.size, torch_dtype)
    with opened(path) as (_, size):
        if size != header.size:
            raise FileFault(path, "truncated" if size < header.size else "altered", f"{size} bytes")
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(os.fspath(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise FileFault(path, "altered", str(error)[:200]) from error
