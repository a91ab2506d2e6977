"""What may be changed in a forward pass: keys that queries cannot see, updates that a recurrent state is not given, heads that
read nothing, states of a layer.

A knock-out removes edges before the softmax, so that the remaining weights are renormalized, as if the keys had
never been written (Geva et al. 2023, "Dissecting recall of factual associations"). An ablated head's read is
replaced after the softmax. A knock-out from a recurrent state leaves out what some positions did to it. All act from a
position on; what lies before is untouched and can be shared.

A state edit adds a vector to a state, or moves the state to one: steering (Turner et al. 2023, "Activation
addition"), ablation and activation patching, at a run of positions or from one on, tokens that are generated included.

A residual patch sets the residual stream at the last position alone (activation patching; Hendel et al. 2023,
"In-context learning creates task vectors"): blocks up to its layer need not be run, and those behind it run for one
position.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from probe.errors import UsageError

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


@dataclass(frozen=True)
class StateKnockout:
    """From position rows_from on, recurrent layers go on from a state that the inputs at positions start … end − 1 never
    changed: neither the recurrence nor the windows of convolutions. Attention sees what it saw."""

    start: int
    end: int
    rows_from: int
    layers: frozenset[int] | None = None
    """None: in all recurrent layers."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= self.rows_from:
            raise ValueError(
                f"a knock-out of positions {self.start} to {self.end} from row {self.rows_from} on: needs "
                "0 ≤ start < end ≤ rows_from"
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


StateSite = Literal["resid_post", "attn_out", "mlp_out", "z"]


@dataclass(frozen=True, eq=False)
class StateEdit:
    """A state of one layer at positions start … end − 1, or from `start` on, is changed.

    `add`: state + dose · values. `replace`: state + dose · (values − state), so that dose 1 puts values in its place and
    zeros ablate. Edits of one site act in the order in which they are given.
    """

    site: StateSite
    """The residual stream behind a block, what its attention or its MLP adds to it, or one head's output."""
    layer: int
    values: Tensor
    """[d_model], [d_head] for `z`; or one for each position, [position, …]"""
    how: Literal["add", "replace"] = "add"
    head: int | None = None
    """Query head, of `z` alone."""
    start: int = 0
    end: int | None = None
    dose: float = 1.0

    def __post_init__(self) -> None:
        if self.site not in get_args(StateSite):
            raise ValueError(f"site {self.site!r}: one of {', '.join(get_args(StateSite))}")
        if self.how not in ("add", "replace"):
            raise ValueError(f"how {self.how!r}: add or replace")
        if (self.head is None) == (self.site == "z"):
            raise ValueError("an edit of z names its head, and no other edit does")
        if not 0 <= self.start < (self.start + 1 if self.end is None else self.end):
            raise ValueError(f"positions {self.start} to {self.end}: needs 0 ≤ start < end")
        n_values = self.values.shape[0] if self.values.ndim == 2 else None
        if self.values.ndim not in (1, 2) or n_values not in (None, (self.end or 0) - self.start):
            raise ValueError(
                f"values {tuple(self.values.shape)}: one vector, or one for each of the positions from {self.start} to {self.end}"
            )

    @property
    def rows_from(self) -> int:
        """The first position that is changed."""
        return self.start

    def change(self, states: Tensor, positions: Tensor) -> Tensor:
        """`states` [query, d] with those changed whose `positions` [query] are meant."""
        meant = positions >= self.start
        if self.end is not None:
            meant &= positions < self.end
        if not bool(meant.any()):
            return states
        values = self.values.to(states)
        if values.ndim == 2:
            values = values[(positions - self.start).clamp(0, len(values) - 1).to(values.device)]
        moved = states + self.dose * (values if self.how == "add" else values - states)
        return moved.where(meant[:, None].to(states.device), states)


@dataclass(frozen=True, eq=False)
class ResidualPatch:
    """The residual stream behind block `layer`, given: states [sequence, d_model], one position a sequence, or those of all
    positions of a flat pass."""

    layer: int
    states: Tensor


Edit = Knockout | StateKnockout | HeadAblation | StateEdit


def refuse_misfits(edits: Iterable[StateEdit], shape: Any) -> None:
    """Raise UsageError for a layer, head or size that a model has not; `shape` has the model's n_layers, n_heads, d_model
    and d_value, and `layers` where the last may differ."""
    for edit in edits:
        if not 0 <= edit.layer < shape.n_layers:
            raise UsageError(f"edit of layer {edit.layer}: the model has layers 0 to {shape.n_layers - 1}")
        if edit.head is not None and not 0 <= edit.head < shape.n_heads:
            raise UsageError(f"edit of head {edit.head}: the model has heads 0 to {shape.n_heads - 1}")
        layers = getattr(shape, "layers", None) or [shape] * shape.n_layers
        size = shape.d_model if edit.head is None else layers[edit.layer].d_value
        if edit.values.shape[-1] != size:
            raise UsageError(
                f"edit of {edit.site}: values of {edit.values.shape[-1]} numbers; the model has {size}"
            )
