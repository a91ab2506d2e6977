"""A pair of prompts and what of one replaces what of the other, in either mode: the patches of `patching`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.experiments.tool.attribution import Row
from probe.experiments.tool.pairs import PromptPair, Region
from probe.model.edits import StateEdit

if TYPE_CHECKING:
    from torch import Tensor

    from probe.capture.trials import Bench, PatchTrial, Unchanged

LEAST_GAP = 1.0
"""Nats by which the log-odds under the two prompts have to differ."""
DENOISE, NOISE = "denoise", "noise"
_KEPT = {"resid_post": "resid"}
"""Sites that are kept under another name."""


@dataclass(frozen=True, eq=False)
class Side:
    """One mode of a pair: the prompt that is changed, and those that its states are replaced by."""

    pair: PromptPair
    mode: str
    base: Unchanged
    donors: dict[str, Unchanged]
    places: dict[str, int]
    """Place of the base and of each donor in the runs of `PromptPair.spans`."""

    @property
    def sign(self) -> int:
        """+1 where the pair's donor should raise the log-odds."""
        return 1 if log_odds(self.donors["pair"].log_probs) > log_odds(self.base.log_probs) else -1

    def moved(
        self, donor: str, runs: Sequence[tuple[Region, ...]], site: str, layer: int
    ) -> list[tuple[int, Tensor]]:
        """(first slot, what the states from there on become) of each run: the donor's states, or, where a run has another
        length there, the base's moved by the difference of the means."""
        changed = []
        for run in runs:
            here = self._states(self.base, run[self.places["base"]], site, layer)
            theirs = self._states(self.donors[donor], run[self.places[donor]], site, layer)
            if len(here) != len(theirs):
                theirs = here + (theirs.float().mean(0) - here.float().mean(0)).to(here)
            changed.append((run[self.places["base"]][0], theirs))
        return changed

    def aligned(self, donor: str, runs: Sequence[tuple[Region, ...]]) -> str:
        lengths = (
            [end - start for start, end in (run[self.places[d]] for run in runs)] for d in ("base", donor)
        )
        here, theirs = lengths
        return "position" if here == theirs else "mean"

    def _states(self, of: Unchanged, region: Region, site: str, layer: int) -> Tensor:
        start, end = region
        return of.states[_KEPT.get(site, site)][layer][start - of.first : end - of.first]

    def trial(
        self,
        donor: str,
        runs: Sequence[tuple[Region, ...]],
        site: str,
        heads: Sequence[tuple[int, int | None]],
    ) -> PatchTrial:
        """The states of a site at these runs replaced, in each (layer, head); no head where the site has none."""
        from probe.capture.trials import PatchTrial

        edits = []
        for layer, head in heads:
            for start, states in self.moved(donor, runs, site, layer):
                values = states if head is None else states[:, head]
                edits.append(StateEdit(site, layer, values, "replace", head, start, start + len(values)))  # pyright: ignore[reportArgumentType]
        return PatchTrial.of(edits)

    def effects(self, bench: Bench, trials: Sequence[PatchTrial]) -> list[float]:
        """By how many nats each moves the log-odds to where the donor should bring them."""
        before = log_odds(self.base.log_probs)
        return [self.sign * (log_odds(after) - before) for after in bench.trials(self.base, trials)]

    def linear(
        self, gradients: Mapping[str, Mapping[int, Tensor]], runs, site: str, layer: int
    ) -> np.ndarray:
        """The first-order estimate of the effect of the pair's donor: one number, or one a head, nats."""
        kept = _KEPT.get(site, site)
        total: Any = 0.0
        for (start, states), run in zip(self.moved("pair", runs, site, layer), runs, strict=True):
            here = self._states(self.base, run[self.places["base"]], site, layer)
            at = slice(start - self.base.first, start - self.base.first + len(here))
            product = gradients[kept][layer][at].double() * (states.double() - here.double())
            total = total + product.sum((0, 2) if site == "z" else (0, 1))
        return self.sign * np.atleast_1d(total.cpu().numpy())

    def row(self, **columns: Any) -> Row:
        return {"mode": self.mode, "donor": "pair"} | columns


def log_odds(log_probs: Sequence[float]) -> float:
    return log_probs[0] - log_probs[1]


def sides(bench: Bench, pair: PromptPair, *, least: float) -> Iterator[Row | Side]:
    """The row of the pair, then, where its gap is at least `least` nats, each direction, its base the prompt that was run last."""
    clean, control, corrupt = (
        None if prompt is None else bench.run(prompt, pair.names, pair.first)
        for prompt in (pair.clean, pair.control, pair.corrupt)
    )
    assert clean is not None and corrupt is not None
    odds = log_odds(clean.log_probs), log_odds(corrupt.log_probs)
    if not all(map(math.isfinite, odds)):
        yield {"status": "not_finite"}
        return
    status = "ok" if abs(odds[0] - odds[1]) >= least else "small_gap"
    yield {"status": status, "clean": odds[0], "corrupt": odds[1]}
    if status == "ok":
        donors = {"pair": clean} | ({"control": control} if control else {})
        yield Side(pair, DENOISE, corrupt, donors, {"base": 1, "pair": 0, "control": 2})
        clean = bench.run(pair.clean, pair.names, pair.first)
        yield Side(pair, NOISE, clean, {"pair": corrupt}, {"base": 0, "pair": 1})
