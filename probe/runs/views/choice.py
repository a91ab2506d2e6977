"""Choices of tool tasks: candidates, their scores, and which of them are right.

Log-probabilities are those of whole names, in nats; no tool is the last candidate of every task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from probe.prompts.labels import NO_TOOL, tool_label
from probe.runs.read import finished
from probe.runs.records import ToolRecord

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

Target = Literal["chosen", "right"]
"""What heads point at and probes find: the most probable tool, or the right ones."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Choice of a `tool_selection` task."""

    id: str
    names: list[str | None]
    """Candidates: shown tools in shown order, then None for no tool."""
    log_probs: np.ndarray
    """[candidate], nats, finite."""
    right: tuple[str | None, ...]
    """Acceptable candidates, None for no tool; never empty."""
    chosen: str | None
    """Most probable candidate."""
    chosen_tool: str
    """Most probable tool, also where no tool at all is more probable."""
    description_tokens: dict[str, int]
    """Number of tokens of each tool's definition."""
    part_tokens: dict[str, dict[str, int]]
    """Number of tokens of each part of each tool's definition; no part in runs that do not tell them apart."""
    name_log_probs: list[list[float]] | None
    """Log-probability of each token of each name, without the call opener; None in runs that lack them."""
    opener: float
    """log P(call opener), 0 where it was not scored."""
    spoken: list[str | None]
    """Names as the call spells them; None for no tool where it is the complement of the opener."""

    @classmethod
    def of(cls, record: ToolRecord) -> Choice:
        """The choice that a record holds."""
        decision, spans = record.decision, record.passage.spans
        entries = sorted(decision.tool_probabilities, key=lambda entry: entry.tool is None)
        name_log_probs = [entry.token_log_probs for entry in entries if entry.token_log_probs is not None]
        no_tool = None
        if record.no_tool != "complement":
            no_tool = record.passage.template.no_tool_name or NO_TOOL
        return cls(
            id=record.id,
            names=[entry.tool for entry in entries],
            log_probs=np.array([entry.log_prob for entry in entries], dtype=np.float64),
            right=record.right,
            chosen=decision.chosen,
            chosen_tool=decision.chosen_tool,
            description_tokens={
                name: sum(span.length for span in spans if span.label == tool_label(name))
                for name in decision.tools
            },
            part_tokens={
                name: {
                    part: count
                    for (label, part), count in record.passage.tool_parts.items()
                    if label == tool_label(name)
                }
                for name in decision.tools
            },
            name_log_probs=name_log_probs if len(name_log_probs) == len(entries) else None,
            opener=decision.opener_log_prob or 0.0,
            spoken=[no_tool if entry.tool is None else entry.tool for entry in entries],
        )

    @property
    def tools(self) -> list[str]:
        """Shown tools in shown order."""
        return [name for name in self.names if name is not None]

    @property
    def n_tools(self) -> int:
        """Number of shown tools."""
        return len(self.names) - 1

    @property
    def wants_tool(self) -> bool:
        """Whether a tool is among the acceptable candidates."""
        return set(self.right) != {None}

    @property
    def is_right(self) -> np.ndarray:
        """[candidate], bool."""
        return np.array([name in self.right for name in self.names])

    def targets(self, target: Target) -> tuple[str | None, ...]:
        """The most probable tool (`chosen`), or every acceptable candidate (`right`)."""
        return (self.chosen_tool,) if target == "chosen" else self.right

    def places(self, target: Target, tools: Sequence[str]) -> list[int]:
        """Index in `tools` of each target; empty where none of them is a target."""
        return [index for index, name in enumerate(tools) if name in self.targets(target)]

    def role(self, tool: str) -> set[str]:
        """`chosen` (the most probable tool), `right` (acceptable), both, or else `other`."""
        roles = {"chosen"} if tool == self.chosen_tool else set()
        roles |= {"right"} if tool in self.right else set()
        return roles or {"other"}


def choices(run: Run) -> list[Choice]:
    """Choices of the `tool_selection` tasks of a run that ran to their end."""
    return [Choice.of(task.typed(ToolRecord)) for task in finished(run, "tool_selection")]


def decision_states(task: TaskRun) -> tuple[list[int], np.ndarray] | None:
    """The captured layers, and the residual stream [layer, d_model], float32, at the row that emits a name's first token;
    None where it was not captured there."""
    if "resid_post" not in task:
        return None
    row = (task["rows"] == int(task["decisions"][0])).nonzero()
    if not len(row):
        return None
    at = int(row[0, 0])
    states = task.slice("resid_post")[:, at : at + 1, :][:, 0].float().numpy()
    return task.layers("resid_post"), states
