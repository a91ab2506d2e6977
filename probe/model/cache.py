"""What a model keeps of the sequences of a batch: keys and values, and of recurrent layers inputs and states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from probe.model.pieces import Piece, lengths
from probe.model.recurrent import Checkpoint, Run, State


def _zeros(size: Sequence[int], like: Tensor) -> Tensor:
    """Zeros with dtype and device of `like`. On a CPU pages take memory when they are first written: few sequences
    of a batch fill the whole capacity, and touching 1.5 GB took 1 to 6 s."""
    if like.device.type != "cpu":
        return like.new_zeros(size)
    return torch.from_numpy(np.zeros(math.prod(size) * like.itemsize, np.uint8)).view(like.dtype).view(size)


@dataclass(frozen=True)
class RowMemory:
    """What the cache holds of the first positions of one sequence."""

    states: dict[str, dict[int, Tensor]]
    """`keys`, `values` and `inputs` → layer → [head, position, …]"""
    points: dict[int, dict[int, Checkpoint]]
    """layer → tokens → the state behind them, of recurrent layers"""

    @property
    def nbytes(self) -> int:
        buffers = sum(tensor.nbytes for store in self.states.values() for tensor in store.values())
        points = [point for by_length in self.points.values() for point in by_length.values()]
        return buffers + sum(point.state.nbytes for point in points)


class KVCache(Cache):
    """Keys and values of a batch in buffers of fixed capacity, axes [sequence, kv_head, position, d_head].

    Preallocated because growing by concatenation copies the whole memory at each step, and kept for the next
    batch because fresh pages cost as much again; zeroed at first because a masked key with weight 0 still
    multiplies its value, and 0 · NaN is NaN. Layers keep every position, also where the layer's window is
    smaller. Of a recurrent layer what its module is given is kept alike (`inputs`, of one head), and states
    behind some positions (`probe.model.recurrent`).
    """

    def __init__(self, batch: int, capacity: int):
        super().__init__(layers=[])
        self._memory: dict[tuple[str, int], Tensor] = {}
        self.restart(batch, capacity)

    def restart(self, batch: int, capacity: int) -> None:
        """Begin another batch in the same memory, which grows where it is too small."""
        self.batch, self.capacity = batch, capacity
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.inputs: dict[int, Tensor] = {}
        self.points: dict[int, dict[int, dict[int, Checkpoint]]] = {}
        """recurrent layer → sequence → tokens → the state behind them"""
        self.handed: dict[int, int] = {}
        """layer → numbers a position that the model hands over to be kept; absent where it keeps none of its own"""
        self._pieces: Sequence[Piece] | None = None
        self._copies: Sequence[tuple[int, int, int]] = ()
        self._slots: Tensor | int = 0
        self._n_keys = 0

    @property
    def _stores(self) -> dict[str, dict[int, Tensor]]:
        return {"keys": self.keys, "values": self.values, "inputs": self.inputs}

    def aim_pieces(self, pieces: Sequence[Piece], copies: Sequence[tuple[int, int, int]] = ()) -> None:
        """The next forward writes flat runs of tokens, each into its sequence from its first slot on.

        Then, layer by layer and in order, `copies` (source, target, length) give the first positions of one
        sequence to another, so that a run may continue one of the same forward.
        """
        self._pieces, self._n_keys = pieces, max(piece.n_keys for piece in pieces)
        self._copies = copies

    def aim_step(self, slots: Tensor | int, n_keys: int) -> None:
        """The next forward writes one token a sequence, to one slot for all or to slots [sequence]."""
        self._pieces, self._slots, self._n_keys = None, slots, n_keys

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """What a model stores, handed back as it is: `attend` keeps what the attention reads (`store`), which for
        latent attention is made of what is stored."""
        self.handed[layer_idx] = sum(
            states.shape[1] * states.shape[3] for states in (key_states, value_states)
        )
        return key_states, value_states

    def store(self, layer: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values [sequence, kv_head, position, d_head] of the tokens that are run.

        Returns those of all positions of a step; of a flat pass the buffers are read run by run.
        """
        self._write("keys", layer, key_states)
        self._write("values", layer, value_states)
        keys, values = self.keys[layer], self.values[layer]
        if self._pieces is not None:
            return keys, values
        batch = key_states.shape[0]
        return keys[:batch, :, : self._n_keys], values[:batch, :, : self._n_keys]

    def _write(self, name: str, layer: int, states: Tensor) -> None:
        buffer = self._reserve(name, layer, states)
        if self._pieces is not None:
            parts = states[0].split(lengths(self._pieces), 1)
            for piece, states_of_piece in zip(self._pieces, parts, strict=True):
                buffer[piece.row, :, piece.start : piece.n_keys] = states_of_piece
            for source, target, length in self._copies:
                buffer[target, :, :length] = buffer[source, :, :length]
            return
        batch = states.shape[0]
        if isinstance(self._slots, int):
            buffer[:batch, :, self._slots] = states[:, :, 0]
        else:
            slots = self._slots.to(buffer.device)
            buffer[torch.arange(batch, device=buffer.device), :, slots] = states[:, :, 0]

    def _reserve(self, name: str, layer: int, states: Tensor) -> Tensor:
        store = self._stores[name]
        if layer not in store:
            memory = self._memory.get((name, layer))
            if memory is None or memory.shape[0] < self.batch or memory.shape[2] < self.capacity:
                # It never shrinks, and is freed before its successor is made.
                rows, length = (self.batch, self.capacity) if memory is None else memory.shape[::2]
                memory = None
                self._memory.pop((name, layer), None)
                size = (max(rows, self.batch), states.shape[1], max(length, self.capacity), states.shape[3])
                memory = _zeros(size, states)
                self._memory[name, layer] = memory
            store[layer] = memory[: self.batch, :, : self.capacity]
        return store[layer]

    # -- recurrent layers ----------------------------------------------------------------------------------

    def store_inputs(self, layer: int, inputs: Tensor, starts: Sequence[tuple[int, int]]) -> None:
        """Keep what a recurrent layer is given, [sequence, query, d_model]; `starts` (sequence, slot) are where it is
        written: states behind later slots are none of the sequence any more."""
        self._write("inputs", layer, inputs[:, None])
        of_layer = self.points.setdefault(layer, {})
        for row, start in starts:
            points = of_layer.setdefault(row, {})
            of_layer[row] = {length: point for length, point in points.items() if length <= start}

    def continue_copies(self, layer: int, row: int) -> None:
        """Give a sequence the state of the one that it continues within the pass (`aim_pieces`)."""
        for source, target, length in self._copies:
            if target == row and length in self.points[layer].get(source, {}):
                self.points[layer].setdefault(row, {})[length] = self.points[layer][source][length]

    def state_at(self, layer: int, row: int, length: int, run: Run) -> State:
        """A state of its own behind the first `length` tokens, made again from the last one that is held."""
        points = self.points.setdefault(layer, {}).setdefault(row, {})
        held = max((n for n in points if n <= length), default=0)
        state = points[held].state.fork() if held else State()
        if held < length:
            run(state, self.inputs[layer][row, :, held:length])
            points[length] = Checkpoint(state.fork(), passing=True)
        return state

    def take_state(self, layer: int, row: int, length: int, run: Run) -> State:
        """As `state_at`; one that would go with the next checkpoint is given away and not copied."""
        points = self.points.setdefault(layer, {}).setdefault(row, {})
        if length in points and points[length].passing:
            return points.pop(length).state
        return self.state_at(layer, row, length, run)

    def state_without(
        self, layer: int, row: int, length: int, left_out: Sequence[tuple[int, int]], run: Run
    ) -> State:
        """A state of its own behind the first `length` tokens, had the inputs at the positions start … end − 1 of each pair of
        `left_out` never come: the recurrence and the windows of convolutions go over them unchanged. The other inputs are
        those that the sequence has."""
        position = min(start for start, _ in left_out)
        state = self.state_at(layer, row, position, run)
        for start, end in (*sorted(left_out), (length, length)):
            if position < start:
                run(state, self.inputs[layer][row, :, position:start])
            position = max(position, end)
        return state

    def keep_point(self, layer: int, row: int, length: int, point: Checkpoint) -> None:
        """Hold the state behind the first `length` tokens, in place of what steps left."""
        points = self.points[layer].setdefault(row, {})
        self.points[layer][row] = {n: held for n, held in points.items() if not held.passing} | {
            length: point
        }

    # -- whole sequences -----------------------------------------------------------------------------------

    def take(self, row: int, length: int) -> RowMemory:
        """A copy of the first positions of one sequence."""
        states = {
            name: {layer: buffer[row, :, :length].clone() for layer, buffer in store.items()}
            for name, store in self._stores.items()
        }
        return RowMemory(states, {layer: self._held(layer, row, length) for layer in self.points})

    def put(self, row: int, memory: RowMemory) -> None:
        """Write what was taken to the first positions of one sequence."""
        for name, by_layer in memory.states.items():
            for layer, states in by_layer.items():
                self._reserve(name, layer, states[None])[row, :, : states.shape[1]] = states
        for layer, points in memory.points.items():
            self.points.setdefault(layer, {})[row] = dict(points)

    def copy(self, source: int, target: int, length: int, start: int = 0) -> None:
        """Give the first positions of one sequence to another, or those from `start` to `length`, in all layers."""
        for store in self._stores.values():
            for buffer in store.values():
                buffer[target, :, start:length] = buffer[source, :, start:length]
        for layer, by_row in self.points.items():
            by_row[target] = self._held(layer, source, length)

    def move(self, source: int, target: int) -> None:
        """Copy one sequence's memory over another's (used when a finished sequence leaves the batch)."""
        self.copy(source, target, self.capacity)

    def _held(self, layer: int, row: int, length: int) -> dict[int, Checkpoint]:
        """The states that are held behind at most so many tokens. Lasting ones are never changed, whoever runs on takes a
        fork; a passing one may be taken by its own sequence alone."""
        return {
            n: Checkpoint(point.state.fork(), passing=True) if point.passing else point
            for n, point in self.points[layer].get(row, {}).items()
            if n <= length
        }

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before those of this forward; 0 in a flat pass, whose runs begin where they like."""
        return 0 if self._pieces is not None else self._n_keys - 1
