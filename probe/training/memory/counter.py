"""Activations of a family that no tape describes: counted on the tensors that autograd saves in its layers.

The model is cut to its first layer, and to that and one of each kind of layer it has (attention, linear attention,
state space, convolution, experts), and run forward and backward without memory. What the second keeps is a layer of
its kind, the rest lies outside of layers; what is alive beside it while it runs backward is its scratch.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from probe.training.memory.plan import DTYPES, FineTuningPlan, Retention


class Curve(NamedTuple):
    """Bytes of a sequence: by token, by token of the text padded to whole chunks, by pair of tokens."""

    token: float = 0.0
    padded: float = 0.0
    pair: float = 0.0

    def at(self, length: int, chunk: int) -> float:
        return self.token * length + self.padded * _above(length, chunk) + self.pair * length**2


class ActivationCounter:
    """Bytes kept by layers and outside of them, by plan; counted once for each kind of plan.

    `kinds`: indices of the layers that are alike, a tuple a kind; `chunk`: tokens that recurrent layers pad to a
    multiple of, 0 where they go token by token; `n_ctx`: positions. `reason` is set where a family cannot be counted.
    """

    def __init__(
        self,
        name: str,
        window: int | None,
        kinds: tuple[tuple[int, ...], ...] = ((0, 1),),
        chunk: int = 1,
        n_ctx: int = 1 << 20,
    ):
        self._name, self._window, self._kinds, self._chunk, self._n_ctx = name, window, kinds, chunk, n_ctx
        self._curves: dict[tuple, list[tuple[Curve, Curve]] | None] = {}
        self.reason: str | None = None

    def __call__(self, plan: FineTuningPlan) -> Retention | None:
        """What is kept for `plan`; None if the family cannot run without memory."""
        masked = self._window is not None and plan.length > self._window and plan.attention == "sdpa"
        several = min(plan.batch, 2)  # of one sequence, some tensors need no copy to be contiguous
        adapters = (plan.method, plan.targets, plan.rank, plan.adapter_precision, plan.adapter_dropout)
        key = (plan.precision, plan.attention, adapters, masked, several)
        if key not in self._curves:
            squares = masked or plan.attention == "eager"
            try:
                self._curves[key] = self._count(plan, self._lengths(masked, squares), squares)
            except Exception as error:  # a family's own code, where tensors have no numbers, raises anything
                from probe.training.outline import first_line

                self.reason = first_line(error)
                self._curves[key] = None
        curves = self._curves[key]
        if curves is None:
            return None
        (outside, _), *layers = (
            [plan.batch * curve.at(plan.length, max(1, self._chunk)) for curve in pair] for pair in curves
        )
        counts = [len(kind) for kind in self._kinds]
        whole = sum(count * kept for count, (kept, _) in zip(counts, layers, strict=True))
        scratch = max(max(0.0, size) for _, size in layers)
        return Retention(whole / sum(counts), max(kept for kept, _ in layers), outside, scratch)

    def _lengths(self, masked: bool, squares: bool) -> tuple[int, ...]:
        """Lengths to count at, on the side of the window where the plan's is: two, or three for one unknown more.

        Odd numbers of tokens: autocast's copies of weights are told from activations by their shape alone, and
        widths are round (2 × 128 tokens of width d look like a k_proj [256, d]). Long texts where they cost nothing,
        so that activations and not weights make a layer's scratch; short ones where Python walks along the text.
        """
        if self._chunk > 1:
            return 2 * self._chunk, 4 * self._chunk, 3 * self._chunk + 3
        if self._chunk == 0:
            return 35, 67
        if self._window is not None or self._n_ctx < 507:
            start = (self._window or 0) // 2 * 2 if masked else 0
            return (start + 67, start + 131, start + 35)[: 2 + squares]
        return (259, 507, 131)[: 2 + squares]

    def _count(
        self, plan: FineTuningPlan, lengths: tuple[int, ...], squares: bool
    ) -> list[tuple[Curve, Curve]]:
        """Curves of what is kept and of scratch: outside of layers, and of a layer of each kind.

        The first layer is there in each: what is kept beside another one of its kind is a layer of that kind.
        """
        base = self._kinds[0][0]
        pairs = [[base, kind[-1]] for kind in self._kinds]
        counted = self._counted(plan, [[base], *pairs], lengths)
        single = [counted[(base,), length][0] for length in lengths]
        curves, rest = [], single
        for pair in pairs:
            both = [counted[tuple(pair), length] for length in lengths]
            kept = [size - alone for (size, _), alone in zip(both, single, strict=True)]
            curves.append((self._curve(kept, lengths), self._scratch([s for _, s in both], lengths, squares)))
            if len(curves) == 1:
                rest = [alone - layer for alone, layer in zip(single, kept, strict=True)]
        return [(self._curve(rest, lengths), Curve()), *curves]

    def _curve(self, values: list[float], lengths: tuple[int, ...]) -> Curve:
        """What is kept, through its values at two lengths, and at three where a text is padded to chunks."""
        if self._chunk > 1:
            return Curve(*_solved([[n, _above(n, self._chunk), n * n] for n in lengths], values))
        token, pair = _solved([[n, n * n] for n in lengths[:2]], values[:2])
        return Curve(token, 0.0, pair)

    def _scratch(self, values: list[float], lengths: tuple[int, ...], squares: bool) -> Curve:
        """The scratch that grows with the text; the rest is a gradient of a weight, which is counted as such."""
        if self._chunk > 1 or not squares:
            return Curve(padded=_solved([[1, n] for n in lengths[:2]], values[:2])[1])
        _, token, pair = _solved([[1, n, n * n] for n in lengths], values)
        return Curve(token, 0.0, pair)

    def _counted(
        self, plan: FineTuningPlan, choices: list[list[int]], lengths: tuple[int, ...]
    ) -> dict[Any, tuple[float, float]]:
        from probe.training.memory.cut import kept_by_layers

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
            lengths[:2] if self._chunk > 1 else lengths,
            dtype=DTYPES.get(plan.precision, plan.precision),
            attention="eager" if plan.attention == "eager" else "sdpa",
            autocast=plan.precision == "autocast",
            adapters=adapters,
        )
        try:
            kept = count()
        except Exception:  # a family that reads the mask, which a causal batch does not need
            kept = count(masks=True)
        return {key: (size / batch, scratch / batch) for key, (size, scratch) in kept.items()}


def _above(length: int, chunk: int) -> int:
    """The first multiple of `chunk` that is not below `length`."""
    return -(-length // chunk) * chunk


def _solved(rows: list[list[int]], values: list[float]) -> list[float]:
    """x of rows · x = values."""
    import numpy as np

    return np.linalg.solve(np.array(rows, float), np.array(values, float)).tolist()
