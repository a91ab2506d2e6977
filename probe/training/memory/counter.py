"""Activations of a family that no tape describes: counted on the tensors that autograd saves in one layer.

The model is cut to one layer and to two and run forward without memory; the difference is a layer, the rest is
what lies outside of layers. Both are a·length + b·length² a sequence, so two lengths give them at every size.
"""

from __future__ import annotations

import logging
from typing import Any

from probe.training.memory.plan import DTYPES, FineTuningPlan

Line = tuple[float, float]
"""Bytes of a sequence: by token, by pair of tokens."""


class ActivationCounter:
    """Bytes kept by a layer and outside of layers, by plan; counted once for each kind of plan."""

    def __init__(self, name: str, window: int | None):
        self._name, self._window = name, window
        self._lines: dict[tuple, tuple[Line, Line] | None] = {}

    def __call__(self, plan: FineTuningPlan) -> tuple[float, float] | None:
        """Bytes that one layer keeps and bytes kept outside of the layers, loss included; None if it cannot run."""
        masked = self._window is not None and plan.length > self._window and plan.attention == "sdpa"
        several = min(plan.batch, 2)  # of one sequence, some tensors need no copy to be contiguous
        key = (plan.precision, plan.attention, plan.method, plan.targets, plan.rank, masked, several)
        if key not in self._lines:
            # Odd numbers of tokens: autocast's copies of weights are told from activations by their shape alone,
            # and widths are round (2 × 128 tokens of width d look like a k_proj [256, d]).
            start = (self._window or 0) // 2 * 2 if masked else 0
            try:
                self._lines[key] = self._count(plan, start + 67, start + 131)
            except (RuntimeError, NotImplementedError, TypeError) as error:
                logging.getLogger(__name__).info("%s cannot run without memory: %s", self._name, error)
                self._lines[key] = None
        lines = self._lines[key]
        if lines is None:
            return None
        layer, outside = (
            plan.batch * (slope * plan.length + curve * plan.length**2) for slope, curve in lines
        )
        return layer, outside

    def _count(self, plan: FineTuningPlan, short: int, long: int) -> tuple[Line, Line]:
        layers, rest = [], []
        for length in (short, long):
            single, double = (self._kept(plan, n, length) / min(plan.batch, 2) for n in (1, 2))
            layers.append(double - single)
            rest.append(2 * single - double)
        return _line(layers, short, long), _line(rest, short, long)

    def _kept(self, plan: FineTuningPlan, n_layers: int, length: int) -> int:
        from probe.training.outline import kept_by_layers

        adapters: dict[str, Any] | None = None
        if plan.method != "full":
            adapters = {
                "rank": plan.rank,
                "targets": plan.targets,
                "four_bit": plan.method == "qlora",
                "double": plan.double_quantization,
            }
        return kept_by_layers(
            self._name,
            n_layers,
            min(plan.batch, 2),
            length,
            dtype=DTYPES.get(plan.precision, plan.precision),
            attention="eager" if plan.attention == "eager" else "sdpa",
            autocast=plan.precision == "autocast",
            adapters=adapters,
        )


def _line(values: list[float], short: int, long: int) -> Line:
    """a and b of value = a·length + b·length² through two lengths."""
    pair = (values[1] / long - values[0] / short) / (long - short)
    return values[0] / short - pair * short, pair
