"""What may be changed in a forward pass: keys that queries cannot see, and heads that read nothing.

A knock-out removes edges before the softmax, so that the remaining weights are renormalized, as if the keys had
never been written (Geva et al. 2023, "Dissecting recall of factual associations"). An ablated head's read is
replaced after the softmax. Both act from a query position on; what lies before is untouched and can be shared.

A residual patch sets the residual stream at the last position alone (activation patching; Hendel et al. 2023,
"In-context learning creates task vectors"): blocks up to its layer need not be run, and those behind it run for one
position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Knockout:
    """Queries at positions ≥ rows_from do not see the keys at positions start … end − 1."""

    start: int
    end: int
    rows_from: int
    layers: frozenset[int] | None = None
    """None: in all layers."""

    def __post_init__(self) -> None:
        # Position 0 is the attention sink; a query without any key has no softmax.
        if not 0 < self.start < self.end <= self.rows_from:
            raise ValueError(
                f"a knock-out of positions {self.start} to {self.end} from row {self.rows_from} on: needs "
                "0 < start < end ≤ rows_from"
            )

    def acts(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers


@dataclass(frozen=True, eq=False)
class HeadAblation:
    """The reads of some heads, at positions ≥ rows_from, are replaced: by zero or by given vectors."""

    heads: Mapping[int, tuple[int, ...]]
    """layer → query heads"""
    rows_from: int
    reads: Mapping[int, Tensor] | None = None
    """layer → [head, d_head] in the order of `heads`; None: zeros."""


@dataclass(frozen=True, eq=False)
class ResidualPatch:
    """The residual stream behind block `layer`, given: states [sequence, d_model], one position a sequence."""

    layer: int
    states: Tensor


Edit = Knockout | HeadAblation
