"""States of constant size, which layers without attention keep of a sequence in place of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

_N_STATES = 4
"""Convolutions and recurrences that a layer of transformers may have; unused ones take no memory."""


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

    @property
    def numbers(self) -> Tensor:
        """[number] float64: those of the recurrence; of a layer that has convolutions alone, those of their windows."""
        recurrences = [state for state in self.recurrent_states.values() if state is not None]
        kept = recurrences or self.tensors()
        return torch.cat([state.detach().flatten().double() for state in kept] or [torch.zeros(0).double()])

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
class Checkpoint:
    """The state of a layer behind the first tokens of a sequence."""

    state: State
    passing: bool = False
    """Whether it goes with the next one: it was reached by a step, or made again on the way to another."""


Run = Callable[[State, Tensor], Tensor]
"""Runs a layer's module on inputs [1, position, d_model] from a state, which it leaves behind the last of them."""
