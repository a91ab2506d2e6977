"""The memory of recurrent layers along a sequence that is given: states where steps end, and outputs rebuilt from them.

A recurrent layer reads c_t = G(M_{t−1}, u_t) and writes M_t = F(M_{t−1}, u_t), where u_t is what its module is given and
M_t its state: the recurrence, and the window of any convolution. The sequence is run once, as a capture runs it; then each
layer alone goes over it again, from one stored state to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.capture.prefill import Part, prefill
from probe.model.attention import KVCache, Recorder
from probe.model.hooked import Model
from probe.model.mixers import runner
from probe.model.recurrent import State
from probe.model.sublayers import states_of


@dataclass(frozen=True)
class StateStretch:
    """What a recurrent layer did between two positions of a sequence."""

    layer: int
    start: int
    end: int
    norm: float
    """‖S‖ of the state behind position end − 1, Frobenius"""
    change: float
    """‖S − S′‖ with S′ the state behind position start − 1, all zeros where nothing is before"""
    error: float
    """max |c − o| over the rows start … end − 1: outputs c rebuilt from the state stored behind start − 1 and the rows' inputs,
    o what the layer gave when the model ran"""
    largest: float
    """max |o| over the whole sequence"""


def state_stretches(model: Model, token_ids: Sequence[int], bounds: Sequence[int]) -> Iterator[StateStretch]:
    """Every recurrent layer between each two neighbors of `bounds` (positions, ascending, from 0 to the number of tokens).

    One layer's states are held at a time. Raises ValueError for bounds that do not cover the sequence.
    """
    if list(bounds) != sorted({*bounds, 0, len(token_ids)}):
        raise ValueError(f"bounds {list(bounds)} do not ascend from 0 to {len(token_ids)}")
    cache, recorder = KVCache(1, len(token_ids)), Recorder(layers=frozenset())
    calls: dict[int, tuple[tuple, dict]] = {}
    outputs: dict[int, list[Tensor]] = {layer: [] for layer in model.recurrent}

    def hook_of(layer: int):
        def hook(_module, args, named, output):
            calls[layer] = args, named
            outputs[layer].append(states_of(output)[0])

        return hook

    hooks = [
        module.register_forward_hook(hook_of(layer), with_kwargs=True)
        for layer, module in model.recurrent.items()
    ]
    try:
        with model.recording(recorder):
            part = Part(0, token_ids, 0, len(token_ids), len(token_ids), (), ())
            prefill(model, recorder, cache, [part])
    finally:
        for hook in hooks:
            hook.remove()
    for layer, module in model.recurrent.items():
        inputs, given = cache.inputs[layer][0], torch.cat(outputs.pop(layer))
        run = runner(module, cache, *calls.pop(layer))
        largest = float(given.abs().max())
        stored = State()
        with torch.inference_mode():
            for start, end in zip(bounds, bounds[1:], strict=False):
                state = stored.fork()
                rebuilt = run(state, inputs[:, start:end])[0]
                before, behind = stored.numbers, state.numbers
                yield StateStretch(
                    layer,
                    start,
                    end,
                    norm=float(behind.norm()),
                    change=float((behind - before if len(before) else behind).norm()),
                    error=float((rebuilt.float() - given[start:end].float()).abs().max()),
                    largest=largest,
                )
                stored = state
