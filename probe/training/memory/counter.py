"""Activations of a family that no tape describes: counted on the tensors that autograd saves in its layers.

The model is cut to its first layer, and to that and one of each kind of layer it has (attention, linear attention,
state space, convolution, experts), and run forward without memory; the difference is a layer of the kind, the rest
is what lies outside of layers. All are a·length + b·length² a sequence, so two lengths give them at every size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from probe.training.memory.plan import DTYPES, FineTuningPlan, Kept

Line = tuple[float, float]
"""Bytes of a sequence: by token, by pair of tokens."""


class ActivationCounter:
    """Bytes kept by layers and outside of them, by plan; counted once for each kind of plan.

    `kinds`: indices of the layers that are alike, a tuple a kind; `chunk`: tokens that recurrent layers pad to a
    multiple of. `reason` is set where a family cannot be counted.
    """

    def __init__(
        self, name: str, window: int | None, kinds: tuple[tuple[int, ...], ...] = ((0, 1),), chunk: int = 1
    ):
        self._name, self._window, self._kinds, self._chunk = name, window, kinds, chunk
        self._lines: dict[tuple, list[Line] | None] = {}
        self.reason: str | None = None

    def __call__(self, plan: FineTuningPlan) -> Kept | None:
        """What is kept for `plan`; None if the family cannot run without memory."""
        masked = self._window is not None and plan.length > self._window and plan.attention == "sdpa"
        several = min(plan.batch, 2)  # of one sequence, some tensors need no copy to be contiguous
        adapters = (plan.method, plan.targets, plan.rank, plan.adapter_precision, plan.adapter_dropout)
        key = (plan.precision, plan.attention, adapters, masked, several)
        if key not in self._lines:
            try:
                self._lines[key] = self._count(plan, self._lengths(masked))
            except Exception as error:  # a family's own code, where tensors have no numbers, raises anything
                from probe.training.outline import first_line

                self.reason = first_line(error)
                self._lines[key] = None
        lines = self._lines[key]
        if lines is None:
            return None
        length = _above(plan.length, self._chunk)
        outside, *layers = (plan.batch * (slope * length + curve * length**2) for slope, curve in lines)
        counts = [len(kind) for kind in self._kinds]
        whole = sum(count * size for count, size in zip(counts, layers, strict=True))
        return Kept(whole / sum(counts), max(layers), outside)

    def _lengths(self, masked: bool) -> tuple[int, int]:
        """Two lengths, on the side of the window where the plan's is.

        Odd numbers of tokens: autocast's copies of weights are told from activations by their shape alone, and
        widths are round (2 × 128 tokens of width d look like a k_proj [256, d]). Of chunks, odd numbers too.
        """
        start = (self._window or 0) // 2 * 2 if masked else 0
        if self._chunk == 1:
            return start + 67, start + 131
        first = start // self._chunk + 1
        return first * self._chunk, (first + 2) * self._chunk

    def _count(self, plan: FineTuningPlan, lengths: tuple[int, int]) -> list[Line]:
        """The lines of what lies outside of layers and of a layer of each kind.

        The first layer is there in each: what it keeps beside another one of its kind is a layer of that kind.
        """
        base = self._kinds[0][0]
        pairs = [[base, kind[-1]] for kind in self._kinds]
        kept = self._kept(plan, [[base], *pairs], lengths)
        single = [kept[(base,), length] for length in lengths]
        layers = [
            [kept[tuple(pair), n] - one for n, one in zip(lengths, single, strict=True)] for pair in pairs
        ]
        rest = [one - layer for one, layer in zip(single, layers[0], strict=True)]
        return [_line(values, *lengths) for values in (rest, *layers)]

    def _kept(
        self, plan: FineTuningPlan, choices: list[list[int]], lengths: tuple[int, int]
    ) -> dict[Any, float]:
        from probe.training.outline import kept_by_layers

        adapters: dict[str, Any] | None = None
        if plan.method != "full":
            adapters = {
                "rank": plan.rank,
                "targets": plan.targets,
                "four_bit": plan.method == "qlora",
                "double": plan.double_quantization,
                "size": plan.adapter_size,
                "dropout": plan.adapter_dropout,
            }
        batch = min(plan.batch, 2)
        count = partial(
            kept_by_layers,
            self._name,
            choices,
            batch,
            lengths,
            dtype=DTYPES.get(plan.precision, plan.precision),
            attention="eager" if plan.attention == "eager" else "sdpa",
            autocast=plan.precision == "autocast",
            adapters=adapters,
        )
        try:
            kept = count()
        except Exception:  # a family that reads the mask, which a causal batch does not need
            kept = count(masks=True)
        return {key: size / batch for key, size in kept.items()}


def _above(length: int, chunk: int) -> int:
    """The first multiple of `chunk` that is not below `length`."""
    return -(-length // chunk) * chunk


def _line(values: list[float], short: int, long: int) -> Line:
    """a and b of value = a·length + b·length² through two lengths."""
    pair = (values[1] / long - values[0] / short) / (long - short)
    return values[0] / short - pair * short, pair
