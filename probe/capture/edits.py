"""Edits by name of place, so that one fits every prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from probe.errors import UsageError
from probe.model.edits import Edit, StateEdit, StateSite

if TYPE_CHECKING:
    from torch import Tensor

    from probe.prompts import Prompt

How = Literal["add", "replace"]
_LISTED = 12
"""Labels that a message names."""
PLACES = ("all", "prompt", "decision", "generated")
"""Positions by name: every one; those of the prompt; from the row on that emits the first new token, or names the tool;
those behind the prompt. Else a span label, such as `tool:search`, or `tool:*` for all that begin so."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Steering:
    """A change of one state at a named place: state + dose · values, or state + dose · (values − state).

    `site` is `resid_post`, `attn_out`, `mlp_out` or `z` (of one `head`); `values` [d_model], for `z` [d_head]; `at` is
    one of `PLACES`, a span label, or a pair of positions. A span that a prompt does not have is not changed in it.
    """

    site: StateSite
    layer: int
    values: Tensor
    how: How = "add"
    head: int | None = None
    at: str | tuple[int, int] = "decision"
    dose: float = 1.0

    def __post_init__(self) -> None:
        try:
            self._edit(*((0, None) if isinstance(self.at, str) else self.at))
        except ValueError as error:
            raise UsageError(f"edit: {error}") from None
        if self.values.ndim != 1 or not bool(self.values.isfinite().all()):
            raise UsageError(f"edit of {self.site}: values are one vector of finite numbers")

    @property
    def everywhere(self) -> StateEdit:
        """The same at every position: what a model is asked about, whether it can have it."""
        return self._edit(0, None)

    def on(self, prompt: Prompt) -> list[StateEdit]:
        """The edits of one prompt; none where it has no such span."""
        if not isinstance(self.at, str):
            return [self._edit(*self.at)]
        whole = {
            "all": (0, None),
            "prompt": (0, prompt.n_prompt),
            "decision": (prompt.n_prompt - 1, None),
            "generated": (prompt.n_prompt, None),
        }
        if self.at in whole:
            return [self._edit(*whole[self.at])]
        named = self.at.removesuffix("*") if self.at.endswith("*") else None
        return [
            self._edit(span.start, span.end)
            for span in prompt.spans
            if (span.label == self.at if named is None else span.label.startswith(named))
        ]

    def _edit(self, start: int, end: int | None) -> StateEdit:
        return StateEdit(self.site, self.layer, self.values, self.how, self.head, start, end, self.dose)

    def document(self) -> dict[str, Any]:
        """What it does, without its vector."""
        at = self.at if isinstance(self.at, str) else list(self.at)
        fields = {
            "site": self.site,
            "layer": self.layer,
            "head": self.head,
            "how": self.how,
            "at": at,
            "dose": self.dose,
        }
        return {name: value for name, value in fields.items() if value is not None}


def on_prompt(edits: Iterable[Steering | Edit], prompt: Prompt) -> tuple[Edit, ...]:
    """Edits of one prompt, those by name of place among them put where they belong."""
    return tuple(
        part for edit in edits for part in (edit.on(prompt) if isinstance(edit, Steering) else (edit,))
    )


def refuse_idle(edits: Iterable[Steering], prompts: Sequence[Prompt]) -> None:
    """Raise UsageError for an edit whose place is in none of the prompts: the run would be one without it."""
    for edit in edits:
        if not any(edit.on(prompt) for prompt in prompts):
            labels = list(dict.fromkeys(span.label for prompt in prompts for span in prompt.spans))
            more = f" and {len(labels) - _LISTED} more" if len(labels) > _LISTED else ""
            raise UsageError(
                f"edit of {edit.site} at {edit.at}: no prompt has such a place; write {', '.join(PLACES)}, or a label: "
                f"{', '.join(labels[:_LISTED])}{more}"
            )
