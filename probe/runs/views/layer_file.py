"""States of many tasks, set aside on a temporary file and read a layer at a time."""

from __future__ import annotations

import os
import tempfile
from typing import NamedTuple

import numpy as np

from probe.runs.files import temporary_files

CHUNK_BYTES = 16 * 2**20
"""What is gathered before it is written: a layer of a chunk lies in one piece."""


class _Chunk(NamedTuple):
    offset: int
    """Bytes before it."""
    n: int
    """Rows."""


class LayerFile:
    """Rows of states [row, layer, d_model], float32, on a temporary file.

    A run of 10,000 tasks has more of them than is to be held; a task's file is checked whole whenever it is opened, so
    that it is opened once. Raises DiskError where the file cannot be written or read.
    """

    def __init__(self) -> None:
        with temporary_files():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the states)
        self._chunks: list[_Chunk] = []
        self._waiting: list[np.ndarray] = []
        self._waiting_bytes = 0
        self.n = 0
        self.shape: tuple[int, ...] = ()
        """[layer, d_model]"""

    def add(self, states: np.ndarray) -> None:
        """Keep some rows, all of the same layers and width."""
        self.shape = self.shape or states.shape[1:]
        rows = np.array(states, dtype=np.float32)
        self._waiting.append(rows)
        self._waiting_bytes += rows.nbytes
        self.n += len(rows)
        if self._waiting_bytes >= CHUNK_BYTES:
            self._write()

    def layer(self, index: int) -> np.ndarray:
        """[row, d_model] of the layer at a place in the list of layers."""
        self._write()
        out = np.empty((self.n, *self.shape[1:]), dtype=np.float32)
        width = out[:1].nbytes
        start = 0
        with temporary_files():
            for offset, n in self._chunks:
                part = os.pread(self._file.fileno(), n * width, offset + index * n * width)
                out[start : start + n] = np.frombuffer(part, np.float32).reshape(n, *self.shape[1:])
                start += n
        return out

    def _write(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting)
        self._waiting, self._waiting_bytes = [], 0
        with temporary_files():
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(np.ascontiguousarray(rows.swapaxes(0, 1)).tobytes())
            self._file.flush()
        self._chunks.append(_Chunk(offset, len(rows)))
