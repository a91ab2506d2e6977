"""The registry of experiments: one frozen record for each, next to the function that makes it.

Command line, documentation and the loops that make experiments read this registry; nothing else lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Analyzer = Literal["tool", "features", "cot", "prompting"]
Maker = TypeVar("Maker", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment: a run's tasks again with one thing changed."""

    name: str
    analyzer: Analyzer
    """The analyzer that reads it, and so the kind of task that it takes."""
    changes: str
    """What is changed, in a sentence."""
    cost: str
    """How much is run: conditions or forwards of a task."""
    asks: str | None = None
    """The question that it answers, in a sentence, where the change does not say it."""
    loop: str
    """The loop over tasks that makes it (`probe.experiments`): that of its analyzer unless given."""
    make: Callable[..., Any]
    """What makes it. tool: (subjects, bench) → conditions of each subject. cot: (bench, chain, task, names) → (rows,
    tokens run), once for all names with the same function. prompting: (states, seed) → rows. attribution, patching:
    (bench, tasks) → (task, rows)."""
    by_name: bool = False
    """Runs only if named: it writes text, or costs much."""
    deciding: bool = False
    """Whether it says if there is a cause at all, or is its control: `--quick` makes these alone."""
    requires: Literal["", "attention", "reads", "state", "hybrid"] = ""
    """What of a model it needs: a layer with attention; attention in every layer whose reads W_O is given as they are; a layer
    with a recurrent state; one with attention and one with such a state."""
    resumes: bool = False
    """Whether a named call goes on with what one that was stopped had not made, and does not begin again."""
    rows: tuple[str, ...] = ()
    """Values of the table's column `experiment`: its own name unless given."""

    def lacks(self, layers: Sequence[Mapping[str, Any]]) -> str | None:
        """Why a model with these layers (`model.layers` of run.json) cannot have it; None: it can."""
        if self.requires in ("state", "hybrid") and not any(layer.get("state_bytes") for layer in layers):
            return "no layer of the model has a recurrent state"
        if (
            self.requires in ("", "state") or not layers
        ):  # layers that were not told apart yet are of attention alone
            return None
        if not any(layer["n_heads"] for layer in layers):
            return "no layer of the model has attention"
        for number, layer in enumerate(layers) if self.requires == "reads" else ():
            if not layer["n_heads"]:
                return f"layer {number} of the model has no attention"
            if layer.get("state_bytes"):
                return f"layer {number} of the model has a recurrence beside its attention"
            if layer.get("gated"):
                return f"what the heads of layer {number} read passes a gate or a norm before W_O"
        return None


EXPERIMENTS: dict[str, Experiment] = {}
"""Experiments by name, in the order in which they are made."""


def experiment(
    analyzer: Analyzer,
    name: str | None = None,
    *,
    changes: str,
    cost: str,
    rows: Sequence[str] = (),
    loop: str | None = None,
    **facts: Any,
) -> Callable[[Maker], Maker]:
    """Decorator: enter what makes an experiment under `name`, or under the function's own; `facts`: `asks`, `by_name`, `deciding`,
    `requires`, `resumes`.

    Raises ValueError where the name is taken.
    """

    def enter(make: Maker) -> Maker:
        title = name or make.__name__
        if title in EXPERIMENTS:
            raise ValueError(f"two experiments are called {title}")
        EXPERIMENTS[title] = Experiment(
            name=title,
            analyzer=analyzer,
            changes=changes,
            cost=cost,
            loop=loop or analyzer,
            make=make,
            rows=tuple(rows) or (title,),
            **facts,
        )
        return make

    return enter


def each(single: Callable[[Any], Iterator[Any]]) -> Callable[[Sequence[Any], Any], list[list[Any]]]:
    """A maker for several subjects from one that needs a single subject and nothing else."""

    def make(subjects: Sequence[Any], _bench: Any) -> list[list[Any]]:
        return [list(single(subject)) for subject in subjects]

    make.__name__, make.__doc__ = single.__name__, single.__doc__
    return make


def read_by(analyzer: str) -> dict[str, Experiment]:
    """The experiments that an analyzer reads, by name."""
    return {name: entry for name, entry in EXPERIMENTS.items() if entry.analyzer == analyzer}
