"""Layers whose memory is a state of constant size: state-space models, linear attention, short convolutions.

transformers' own module is run, once for each run of tokens, on the state of that run's sequence. A state cannot be cut
back to an earlier position; so what the module was given is kept by position beside the keys and values, states are
kept where runs ended, and one in between is made again from the inputs since the last of these.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer

from probe.model.sublayers import states_of

if TYPE_CHECKING:
    from probe.model.cache import KVCache
    from probe.model.pieces import Piece

_USES = {"update_conv_state", "update_recurrent_state"}
"""Methods of transformers' cache that such a module calls."""

_N_STATES = 4
"""Convolutions and recurrences that a layer of transformers may have; unused ones take no memory."""


def carries_state(module: nn.Module) -> bool:
    """Whether a module that is given several tokens goes on from a recurrent state; transformers' Mamba begins anew, and is
    run token by token."""
    code = inspect.unwrap(type(module).forward).__code__
    named = [name for constant in code.co_consts if isinstance(constant, tuple) for name in constant]
    return "update_recurrent_state" not in code.co_names or not {
        "initial_state",
        "initial_states",
    }.isdisjoint(map(str, named))


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module keeps a convolution's or a recurrence's state in transformers' cache."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and not _USES.isdisjoint(code.co_names)


class State(LinearAttentionLayer):
    """What a layer keeps of one sequence: the last inputs of its convolution, and its recurrent state."""

    def __init__(self, number_of_states: int = _N_STATES):
        super().__init__(number_of_states)

    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        # As transformers' own, which also marks addresses as static, and for that loads torch's compiler (3 s).
        if conv_states is not None:
            kernel = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            self.dtype, self.device = conv_states.dtype, conv_states.device
            self.conv_kernel_size[state_idx] = kernel
            self.conv_states[state_idx] = conv_states.new_zeros((*conv_states.shape[:-1], kernel))
            self.is_conv_states_initialized[state_idx] = True
        if recurrent_states is not None:
            self.recurrent_states[state_idx] = torch.zeros_like(recurrent_states)
            self.is_recurrent_states_initialized[state_idx] = True

    def tensors(self) -> list[Tensor]:
        """Convolution states [1, channel, kernel], then recurrent ones [1, …]; none before the first token."""
        kept = (*self.conv_states.values(), *self.recurrent_states.values())
        return [state for state in kept if state is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def recurrent(self) -> Tensor | None:
        """The recurrent state [1, …]; None of a convolution."""
        return self.recurrent_states[0]

    def fork(self) -> State:
        """A state of its own with the same numbers: modules change theirs in place."""
        twin = State()
        twin.dtype, twin.device = self.dtype, self.device
        twin.conv_kernel_size = dict(self.conv_kernel_size)
        twin.has_previous_state = dict(self.has_previous_state)
        for name in ("conv", "recurrent"):
            begun = dict(getattr(self, f"is_{name}_states_initialized"))
            setattr(twin, f"is_{name}_states_initialized", begun)
            states = getattr(self, f"{name}_states").items()
            setattr(twin, f"{name}_states", {i: None if s is None else s.clone() for i, s in states})
        return twin


@dataclass(frozen=True)
class Point:
    """The state of a layer behind the first tokens of a sequence."""

    state: State
    passing: bool = False
    """Whether it was reached by a step, and goes with the next one."""


class Runner:
    """Runs a recurrent module as it was called, for a part of its inputs and from a state that it leaves behind them."""

    def __init__(self, module: nn.Module, cache: KVCache, args: tuple, named: dict[str, Any]):
        self._module, self._cache, self._args, self._named = module, cache, args, dict(named)
        self._name = list(inspect.signature(type(module).forward).parameters)[1]
        self._layer = getattr(module, "layer_idx", 0)
        self.given: Tensor = args[0] if args else named[self._name]
        """[sequence, query, d_model]"""
        self._more: tuple | None = None

    def __call__(self, state: State, inputs: Tensor) -> Tensor:
        """Outputs [1, query, d_model]."""
        begun = state.recurrent is not None
        parts = inputs.split(1, 1) if begun and not carries_state(self._module) else (inputs,)
        outputs = [self._output(state, part) for part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _output(self, state: State, inputs: Tensor) -> Tensor:
        self._cache.layers = {self._layer: state}  # type: ignore[assignment]
        try:
            if self._args:
                output = type(self._module).forward(self._module, inputs, *self._args[1:], **self._named)
            else:
                output = type(self._module).forward(self._module, **{**self._named, self._name: inputs})
        finally:
            self._cache.layers = []
        self._more = tuple(output[1:]) if isinstance(output, tuple | list) else None
        return states_of(output)

    def result(self, outputs: Tensor) -> Any:
        """Outputs of all parts, as the module gives its own."""
        return outputs if self._more is None else (outputs, *self._more)


def run_piece(cache: KVCache, layer: int, piece: Piece, inputs: Tensor, run: Runner) -> Tensor:
    """Outputs [1, query, d_model] of a layer for one run of tokens, whose inputs [1, query, d_model] the cache has.

    Tokens that see others than all before them (packed candidates) are run path by path, each from the state behind
    the last token that it sees.
    """
    n_tokens, start = len(piece.tokens), piece.start
    n_lasting = n_tokens - piece.beside
    parents = _parents(piece)
    heads = [i for i in range(n_tokens) if i == 0 or parents[i] != start + i - 1]
    forks = {parents[i] - start + 1 for i in heads if parents[i] >= start}
    cuts = sorted({*heads, *forks, n_lasting, n_tokens} - {0})
    behind: dict[int, State] = {}
    outputs, begin = [], 0
    for end in cuts:
        parent = parents[begin]
        state = (
            behind[parent].fork() if parent in behind else cache.state_at(layer, piece.row, parent + 1, run)
        )
        outputs.append(run(state, inputs[:, begin:end]))
        behind[start + end - 1] = state
        if end == n_lasting:
            cache.keep_point(layer, piece.row, start + end, Point(state.fork()))
        begin = end
    return torch.cat(outputs, 1)


def _parents(piece: Piece) -> list[int]:
    """Of each token the slot of the last one that it sees before itself, −1 for none."""
    if piece.seen is None:
        return list(range(piece.start - 1, piece.n_keys - 1))
    slots = torch.arange(1, piece.n_keys + 1)
    before = torch.where(piece.seen, slots, 0)
    before[torch.arange(len(piece.tokens)), piece.slots] = 0
    return (before.max(1).values - 1).tolist()
