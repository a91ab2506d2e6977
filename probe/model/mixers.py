"""Layers whose memory is a state of constant size: state-space models, linear attention, short convolutions.

transformers' own module is run, once for each run of tokens, on the state of that run's sequence. A state cannot be cut
back to an earlier position; so what the module was given is kept by position beside the keys and values, states are
kept where runs ended, and one in between is made again from the inputs since the last of these. Whether that is what the
model computes is judged when it is loaded: its logits against the plain model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from probe.model.attention import current_pass
from probe.model.cache import KVCache
from probe.model.pieces import Piece, left_out, lengths
from probe.model.recurrent import Checkpoint, Run, State
from probe.model.sublayers import states_of
from probe.model.unregistered import Method

_USES = {"update_conv_state", "update_recurrent_state"}
"""Methods of transformers' cache that such a module calls."""


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module keeps a convolution's or a recurrence's state in transformers' cache."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if _keeps_its_own(module):
        return True
    return code is not None and not _USES.isdisjoint(code.co_names)


def carries_state(module: nn.Module) -> bool:
    """Whether a module that is given several tokens goes on from a recurrent state; transformers' Mamba begins anew, and is
    run token by token."""
    code = inspect.unwrap(type(module).forward).__code__
    named = [name for constant in code.co_consts if isinstance(constant, tuple) for name in constant]
    takes = not {"initial_state", "initial_states"}.isdisjoint(map(str, named))
    return takes or not (_keeps_its_own(module) or "update_recurrent_state" in code.co_names)


def _keeps_its_own(module: nn.Module) -> bool:
    """Whether a module keeps its state in itself and not in a cache (RecurrentGemma)."""
    return type(module).__name__ == "RecurrentGemmaRecurrentBlock"


def recurrents(blocks: Sequence[nn.Module]) -> dict[int, nn.Module]:
    """The recurrent module of each decoder block that has one."""
    return {
        layer: module
        for layer, block in enumerate(blocks)
        for module in block.modules()
        if is_recurrent(module)
    }


def by_run(layer: int, module: nn.Module) -> tuple[nn.Module, Method]:
    """A recurrent module with its stand-in."""
    return module, ("forward", partial(_recurrent_forward, module, layer))


def _recurrent_forward(module: nn.Module, layer: int, *args, **named):
    current = current_pass()
    cache, pieces = current.cache, current.pieces
    run = runner(module, cache, args, named)
    if pieces is None:
        positions = current.positions[:, 0].tolist()
        cache.store_inputs(layer, run.given, list(enumerate(positions)))
        outputs = []
        for row, (position, inputs) in enumerate(zip(positions, run.given.split(1), strict=True)):
            without = left_out(current.edits[row], layer, position, position) if current.edits else []
            if without:
                state = cache.state_without(layer, row, position, without, run)
            else:
                state = cache.take_state(layer, row, position, run)
            outputs.append(run(state, inputs))
            cache.keep_point(layer, row, position + 1, Checkpoint(state, passing=True))
        return run.result(torch.cat(outputs))
    cache.store_inputs(layer, run.given, [(piece.row, piece.start) for piece in pieces])
    parts = []
    for piece, inputs in zip(pieces, run.given.split(lengths(pieces), 1), strict=True):
        cache.continue_copies(layer, piece.row)
        parts.append(run_piece(cache, layer, piece, inputs, run))
    return run.result(torch.cat(parts, 1))


def runner(module: nn.Module, cache: KVCache, args: tuple, named: dict[str, Any]) -> Runner:
    """What runs a recurrent module from any state, with the other arguments of a call that it had."""
    return (_OwnState if _keeps_its_own(module) else Runner)(module, cache, args, named)


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


class _OwnState(Runner):
    """Runs a module that keeps its state in itself, which is put into it and taken out again."""

    def _output(self, state: State, inputs: Tensor) -> Tensor:
        module: Any = self._module
        positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
        if state.recurrent is not None:
            positions += 1  # at position 0 it begins anew
        module.conv1d_state, module.rg_lru.recurrent_states = state.conv_states[0], state.recurrent
        output = type(module).forward(module, inputs, positions, None, use_cache=True)
        state.conv_states[0], state.recurrent_states[0] = module.conv1d_state, module.rg_lru.recurrent_states
        module.conv1d_state = module.rg_lru.recurrent_states = None
        self._more = tuple(output[1:])
        return output[0]


def run_piece(cache: KVCache, layer: int, piece: Piece, inputs: Tensor, run: Run) -> Tensor:
    """Outputs [1, query, d_model] of a layer for one run of tokens, whose inputs [1, query, d_model] the cache has.

    Tokens that see others than all before them (packed candidates) are run path by path, each from the state behind
    the last token that it sees.
    """
    start, row, n_lasting = piece.start, piece.row, len(piece.tokens) - piece.beside
    behind: dict[int, State] = {}
    outputs = []
    for begin, end, parent, parent_again, continued in piece.stretches:
        if without := left_out(piece.edits, layer, parent + 1, start + begin):
            state = cache.state_without(layer, row, parent + 1, without, run)
            # A state in between is made again from this one, never from one before the change.
            cache.keep_point(layer, row, parent + 1, Checkpoint(state.fork()))
        elif parent in behind:
            state = behind[parent].fork() if parent_again else behind.pop(parent)
        else:
            state = cache.state_at(layer, row, parent + 1, run)
        outputs.append(run(state, inputs[:, begin:end]))
        if continued:
            behind[start + end - 1] = state
        if end == n_lasting:
            cache.keep_point(layer, row, start + end, Checkpoint(state.fork() if continued else state))
    return torch.cat(outputs, 1)
