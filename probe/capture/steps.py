"""What the recorder kept of the decode steps of a batch, and of the results that were given back in between."""

from __future__ import annotations

import torch
from torch import Tensor

from probe.capture.prefill import PartResult
from probe.model.attention import RECORDED, Recorder


class Steps:
    """The rows that a batch left behind its prompts, in the order in which they were run."""

    def __init__(self) -> None:
        self._segments: list[_StepBlock | _ResultRows] = []

    def add(self, active: list[int], recorder: Recorder) -> None:
        """A decode step of these sequences, in the order of their rows in the cache."""
        last = self._segments[-1] if self._segments else None
        if not isinstance(last, _StepBlock) or last.active != active:
            last = _StepBlock(list(active))
            self._segments.append(last)
        last.add(recorder)

    def give(self, index: int, ran: PartResult) -> None:
        """A result that was run on top of a sequence."""
        self._segments.append(_ResultRows(index, ran))

    def close(self) -> None:
        """Stack what is open: the set of sequences changes."""
        if self._segments and isinstance(self._segments[-1], _StepBlock):
            self._segments[-1].close()

    def rows(self, index: int, prefilled: PartResult) -> dict[str, dict[int, Tensor]]:
        """What was recorded of one sequence, its prompt first: state → layer → tensor with rows first."""
        segments = [segment for segment in self._segments if index in segment.active]
        return {
            name: {
                layer: torch.cat([*states, *(segment.of(name, layer, index) for segment in segments)])
                for layer, states in by_layer.items()
            }
            for name, by_layer in prefilled.states.items()
        }


class _StepBlock:
    """Consecutive decode steps with the same active sequences; stacked once when the set changes."""

    def __init__(self, active: list[int]):
        self.active = active
        self._steps: list[dict[str, dict[int, Tensor]]] = []
        self._stacked: dict[tuple[str, int], Tensor] = {}

    def add(self, recorder: Recorder) -> None:
        self._steps.append(recorder.states)

    def close(self) -> None:
        """Stack what was collected: state, layer → [step, sequence, …]."""
        if not self._steps:
            return
        for name, by_layer in self._steps[0].items():
            for layer in by_layer:
                states = torch.stack([step[name][layer] for step in self._steps])
                states = states.squeeze(RECORDED[name] + 1)  # a step has one query
                old = self._stacked.get((name, layer))
                self._stacked[name, layer] = states if old is None else torch.cat([old, states])
        self._steps = []

    def of(self, name: str, layer: int, index: int) -> Tensor:
        return self._stacked[name, layer][:, self.active.index(index)]


class _ResultRows:
    """A result that was run on top of a sequence: the rows it left, read as those of a segment are."""

    def __init__(self, index: int, ran: PartResult):
        self.active, self._ran = [index], ran

    def of(self, name: str, layer: int, _index: int) -> Tensor:
        return torch.cat(self._ran.states[name][layer])
