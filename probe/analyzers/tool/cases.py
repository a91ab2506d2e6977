"""What the parts of the tool analyzer read: one `Case` a task, and the conditions under which it was rescored.

No-tool has a place among the candidates of every case, the last one. Everything here is at the level of the
choice: a candidate's log-probability is that of its whole name, in nats.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probe.analyzers.rows import finished
from probe.prompts.labels import NO_TOOL

if TYPE_CHECKING:
    import pandas

    from probe.runs import Run


@dataclass(frozen=True)
class Case:
    """One `tool_selection` task: its candidates, their scores, and which of them are right."""

    id: str
    names: list[str | None]
    """The shown tools in shown order, then None for no-tool."""
    log_probs: np.ndarray
    """[candidate], nats, finite."""
    right: frozenset[str | None]
    tokens: list[list[float]] | None
    """Log-probability of each token of each name, without the call opener; None in runs that lack them."""
    opener: float
    """log P(call opener), 0 where the template lists no-tool as a name of its own."""
    complement: bool
    """Whether no-tool is the complement of the call opener, and so has no tokens."""
    spoken: list[str | None]
    """The names as the call spells them; None for a complement no-tool."""

    @property
    def n_tools(self) -> int:
        return len(self.names) - 1

    @property
    def wants_tool(self) -> bool:
        """Whether a tool is among the right choices."""
        return self.right != {None}

    @property
    def is_right(self) -> np.ndarray:
        """[candidate], bool."""
        return np.array([name in self.right for name in self.names])

    @classmethod
    def of(cls, record: dict[str, Any]) -> Case:
        entries = sorted(record["tool_probabilities"], key=lambda entry: entry["tool"] is None)
        target = record["target"] or None
        names = [entry["tool"] for entry in entries]
        complement = record.get("no_tool") == "complement"
        no_tool = None if complement else record.get("template", {}).get("no_tool_name", NO_TOOL)
        with_tokens = all("token_log_probs" in entry for entry in entries)
        return cls(
            id=record["id"],
            names=names,
            log_probs=np.array([entry["log_prob"] for entry in entries], dtype=np.float64),
            right=frozenset(target if isinstance(target, list) else [target]),
            tokens=[entry["token_log_probs"] for entry in entries] if with_tokens else None,
            opener=record.get("opener_log_prob", 0.0),
            complement=complement,
            spoken=[no_tool if name is None else name for name in names],
        )


def cases(run: Run) -> list[Case]:
    """The `tool_selection` tasks of a run that ran to their end."""
    return [Case.of(task.record) for task in finished(run, "tool_selection")]


# -- interventions ---------------------------------------------------------------------------------------------


class Condition(NamedTuple):
    """One changed prompt: what was changed, and what each candidate then scored."""

    detail: Any
    log_probs: np.ndarray
    """[candidate], in the order of the case's names."""


def conditions(frame: pandas.DataFrame, experiment: str, known: Sequence[Case]) -> dict[str, list[Condition]]:
    """The conditions of one experiment by task, for experiments that show the candidates of the task.

    Raises ValueError where a condition scores other candidates than its task shows.
    """
    rows = frame.loc[frame["experiment"] == experiment].sort_values(["task_id", "condition"], kind="stable")
    by_id = {case.id: case for case in known}
    found: dict[str, list[Condition]] = {}
    columns = (rows[name].tolist() for name in ("task_id", "condition", "detail", "tool", "log_prob"))
    for (task_id, number), group in groupby(zip(*columns, strict=True), key=lambda row: row[:2]):
        if task_id in by_id:
            case = by_id[task_id]
            entries = list(group)
            # Null comes as None or as NaN, as the column has it.
            scored = {row[3] if isinstance(row[3], str) else None: row[4] for row in entries}
            if len(scored) != len(entries) or set(scored) != set(case.names):
                raise ValueError(
                    f"interventions: {task_id}, {experiment} {number}: not the task's candidates"
                )
            detail = json.loads(entries[0][2]) if isinstance(entries[0][2], str) else None
            values = np.array([scored[name] for name in case.names], dtype=np.float64)
            found.setdefault(task_id, []).append(Condition(detail, values))
    return found


# -- choices ---------------------------------------------------------------------------------------------------


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis; −inf has no mass."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def picks(scores: np.ndarray) -> np.ndarray:
    """What is chosen, over the last axis: 1 at the maximum, shared equally where several candidates have it."""
    best = scores == scores.max(-1, keepdims=True)
    return best / best.sum(-1, keepdims=True)
